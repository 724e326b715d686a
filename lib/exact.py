"""The scores of `TMASS.score`, computed many times faster; and the mean best of M in closed form.

`TMASS.score` pools every video for every text through D x D matrices, and compares M noisy copies
of every text with every pooled video. This module avoids that work:

- `_xpool_span`: whatever the text, a video pooled by XPool lies in the span of a few vectors. They
  are computed once per video, and for each text only the coefficients remain to be computed.
- `sample_cosines`: cos(t + R·ε_m, v) of M samples needs only three products with the samples, and
  no copies of the text.
- `expected_cosine`: the mean of the best of M samples, over the noise, needs no samples at all.

Only XPool and LinearRadius have a faster version here. All other poolings and radii are simply
called, so a new class is scored correctly without any change.
"""
import functools
import math

import torch
import torch.nn.functional as F

from tmass import LinearRadius, NoRadius, XPool, cosine

TINY = 1e-16  # lower bound for a squared length in a denominator


# ---- XPool ----


def _xpool_span(pool, t):
    """XPool as a span, v_ij = Σ_k c_ijk Z_jk with K = T*H + 2. t (N,D) -> function.

    The function maps f (V,T,D) to the spanning vectors Z (V,K,D) and the coefficients c (V,K,N).

    For given attention weights a, psi is affine in LN1(f) except for the normalisations in LN2 and
    LN3, which only rescale. Let j run over the T*H pairs of a frame and a head, Wo_h be the columns
    of Wo for that head, ũ be u minus its mean over D, and g, b be the weight and bias of a
    LayerNorm. Then

        u_j = Wo_h (Wv LN1(f_j))_h + (Wo bv + bo)/H     since the a_j of a head add up to 1

        x = LN2(Σ_j a_j u_j)
          = Σ_j (a_j/s) g2·ũ_j + b2                     s² = |Σ_j a_j ũ_j|²/D + eps

        y = x + W x + b
          = Σ_j (a_j/s) z_j + z_0                       z_j = (I + W) g2·ũ_j
                                                        z_0 = (I + W) b2 + b
        v = LN3(y)
          = Σ_j (a_j/s/s') g3·z̃_j + g3·z̃_0/s' + b3      s'² = |Σ_j (a_j/s) z̃_j + z̃_0|²/D + eps

    so that Z = (g3·z̃_1, ..., g3·z̃_TH, g3·z̃_0, b3) and c = (a/s/s', 1/s', 1). Both s² and s'² are
    quadratic forms plus eps: s² = aᵀ G a + eps with G = ũ ũᵀ/D, and s'² is the same with z̃ for ũ
    and (a/s, 1) for a.
    """
    H = pool.heads
    q = _xpool_query(pool, t)                               # (H,N,D)
    # Wo_h Wv_h as one matrix saves a product for every frame.
    Wo = pool.out.weight.unflatten(1, (H, -1))              # (D,H,D/H)
    Wv = pool.v.weight.unflatten(0, (H, -1))                # (H,D/H,D)
    Wu = torch.einsum("dhe,hec->hdc", Wo, Wv).flatten(0, 1)
    bu = pool.out(pool.v.bias).repeat(H) / H                # (H*D)

    def span(f):
        V, T, D = f.shape
        f = pool.ln1(f)
        u = centred(F.linear(f, Wu, bu).view(V, T * H, D))
        b2 = pool.ln2.bias.expand(V, 1, D)
        x = torch.cat([pool.ln2.weight * u, b2], 1)
        z = x + x @ pool.linear.weight.T                    # (V,T*H+1,D), z_0 last
        z[:, -1] += pool.linear.bias
        z = centred(z)
        b3 = pool.ln3.bias.expand(V, 1, D)
        Z = torch.cat([pool.ln3.weight * z, b3], 1)

        logits = f @ q.flatten(0, 1).T                      # (V,T,H*N)
        a = logits.view(V, T, H, -1).softmax(1)
        a = a.flatten(1, 2)                                 # (V,T*H,N)
        G = u @ u.mT / D
        a *= (form(G, a) + pool.ln2.eps).rsqrt()            # a/s
        c = F.pad(a, (0, 0, 0, 1), value=1.0)               # (a/s, 1)
        G = z @ z.mT / D
        c *= (form(G, c) + pool.ln3.eps).rsqrt()            # (a/s/s', 1/s')
        return Z, F.pad(c, (0, 0, 0, 1), value=1.0)
    return span


def _xpool_query(pool, t):
    """The queries, projected to be multiplied with frames: q·(Wk x) = (Wkᵀ q)·x. (N,D) -> (H,N,D).

    The bias of k is left out: it adds the same number to all logits of a query, which doesn't
    change their softmax.
    """
    q = pool.split_heads(pool.q(pool.ln1(t)))               # (N,H,D/H)
    Wk = pool.k.weight.unflatten(0, (pool.heads, -1))       # (H,D/H,D)
    return torch.einsum("nhd,hde->hne", q, Wk) / math.sqrt(q.shape[-1])


def _pool_few(pool, t, f):
    """XPool.forward reordered to be fast for few texts. t (N,D), f (V,T,D) -> v (N,V,D).

    As Σ_j a_j Wv x_j = Wv Σ_j a_j x_j, pooled vectors are multiplied by Wv instead of all frames.
    """
    f = pool.ln1(f)
    q = _xpool_query(pool, t)
    a = torch.einsum("hnd,vtd->hnvt", q, f).softmax(-1)
    o = torch.einsum("hnvt,vtd->hnvd", a, f)
    Wv = pool.v.weight.unflatten(0, (pool.heads, -1))
    o = torch.einsum("hnve,hde->nvhd", o, Wv).flatten(2)
    x = pool.ln2(pool.out(o + pool.v.bias))
    return pool.ln3(x + pool.linear(x))


def centred(x):
    """x minus its mean over the last axis, as in LayerNorm."""
    return x - x.mean(-1, keepdim=True)


def form(G, a):
    """The quadratic form aᵀ G a. G (V,K,K), a (V,K,N) -> (V,1,N)."""
    return (G @ a).mul_(a).sum(1, keepdim=True)


# ---- the best of M samples ----


@torch.no_grad()
def sample_cosines(t, v, R, eps, products=None):
    """cos(t + R·ε_m, v) of every sample, from three products. t, v, R (...,D) -> (...,M).

    eps (M,D). R may be (...,1). products: those of t and v, if known; v is then overwritten.

        cos(t_s, v) = (t·v + (R·v)·ε) / (|v| |t_s|)
        |t_s|² = |t|² + 2 (R·t)·ε + (R·R)·(ε·ε)
    """
    tv, vv, tt = products or products_of(t, v)
    R, _ = torch.broadcast_tensors(R, t)
    # Other memory for each would cost as much as the multiplications.
    x = torch.mul(R, v, out=v if products else None)
    along = x @ eps.T
    across = torch.mul(R, t, out=x) @ eps.T
    square = torch.mul(R, R, out=x) @ eps.square().T
    dot = along.add_(tv[..., None])
    square.add_(across, alpha=2).add_(tt[..., None])        # |t_s|²
    vv = vv.clamp_min(TINY)
    lengths = square.clamp_min_(TINY).mul_(vv[..., None]).sqrt_()
    return dot.div_(lengths)


@torch.no_grad()
def expected_cosine(t, v, R, mean, std, largest, products=None):
    """The mean of max_m cos(t + R·ε_m, v) over the noise. t, v, R (...,D) -> (...).

    R may be (...,1). mean, std: of ε. largest: E_M, the mean of the largest of M standard normals.
    products: those of t and v, if known; v is then overwritten.

    Let ε = μ + σ z with z ~ N(0, I). This is exact for the normal prior (μ = 0). For the uniform
    prior (μ = 1/2, σ = 1/√12) it is a good approximation, because its sums over D dimensions are
    close to normal. Then

        t_s = c + σ R·z                                 c = t + μ R
        |t_s|² = |c|² + 2σ (R·c)·z + σ² |R·z|²

    The last term stays close to its mean, σ²|R|². Let τ² = |c|² + σ²|R|². To first order in z,

        cos(t_s, v) = (c·v + σ (R·v)·z) / (|v| τ sqrt(1 + 2σ (R·c)·z/τ²))
                    ≈ (c·v + σ g·z) / (|v| τ)           g = R·(v - k c)
                                                        k = c·v/τ²

    which is normal, with mean c·v/(|v| τ) and standard deviation σ|g|/(|v| τ). The best of M such
    numbers has the mean

        (c·v + E_M σ|g|) / (|v| τ)

    The first term is a cosine, shrunk by |c|/τ. The second is a bonus for a wide mass.
    """
    R, _ = torch.broadcast_tensors(R, t)
    c = t
    if mean:
        c = t + mean * R
        products = None
    cv, vv, cc = products or products_of(c, v)
    tau2 = cc + std ** 2 * squared(R)
    tau2 = tau2.clamp_min(TINY)
    k = cv / tau2
    g = torch.addcmul(v, k[..., None], c, value=-1, out=v if products else None).mul_(R)
    spread = std * g.norm(dim=-1)
    return (cv + largest * spread) / (vv.clamp_min(TINY) * tau2).sqrt()


def largest_of_normals(M):
    """E_M, the mean of the largest of M standard normals: 12 - ∫ Φ(x)^M dx, x from -12 to 12.

    For M up to 10^12, the trapezoidal rule is exact up to rounding, because the integrand is flat
    at both ends.
    """
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    below = (M * torch.special.log_ndtr(x)).exp()
    return 12 - torch.trapezoid(below, x).item()


def products_of(t, v):
    """t·v, |v|² and |t|². t, v (...,D) -> 3 (...)."""
    return (t * v).sum(-1), squared(v), squared(t)


def squared(x):
    """|x|². (...,D) -> (...)."""
    return x.norm(dim=-1).square()


# ---- all pairs ----


@torch.no_grad()
def score(model, t, f, trials=20, seed=24, expected=False, chunk_mb=256):
    """Compute the scores of TMASS.score. t (N,D), f (V,T,D) -> sims (N,V), float32, on t's device.

    trials: M; 0 scores the point text. expected: score by the mean of the best of M over the noise,
    which needs no seed. f may have any floating-point type and device. chunk_mb: approximate memory
    for intermediate results, in megabytes.
    """
    t = t.float()
    N, D = t.shape
    V, T, _ = f.shape
    H = model.config["heads"]
    pool = model.pool
    is_xpool = type(pool) is XPool  # a subclass may compute something else
    # A span takes 2T products with D x D matrices per video, _pool_few 3 per pair.
    has_span = is_xpool and N > T
    if is_xpool and not has_span:
        pool = functools.partial(_pool_few, pool)

    # Pairs at a time: `wide` if each needs vectors of width D, `pairs` if only coefficients.
    floats = int(chunk_mb * 2 ** 18)
    wide = floats // (4 * ((H + 5) * D + trials))
    pairs = floats // (16 * (H * T + trials))
    if t.device.type == "cpu":  # twice as fast, because blocks fit into the cache
        wide = min(wide, 512)
        pairs = min(pairs, 16384)
    if has_span:
        n = max(1, min(N, 2048, pairs))
        v = min(pairs // n, wide, 64)
    else:
        n = max(1, min(N, wide))
        v = wide // n

    sims = t.new_empty(N, V)
    head = torch.nn.ModuleList([model.pool, model.radius]).eval()  # no dropout
    with torch.autocast(t.device.type, enabled=False):
        noise = noise_of(model, trials, seed, expected)
        model.radius(t.new_zeros(1, T))  # raises an error if the radius needs another T
        radius = _fast_radius(model.radius)
        for texts in blocks(N, n):
            t_i = t[texts]
            if has_span:
                span = _xpool_span(pool, t_i)
            for videos in blocks(V, v):
                f_j = f[videos].to(t)
                if has_span:
                    best = _best_of_span(t_i, f_j, span, radius, noise, wide)
                else:
                    best = _best_of_pooled(t_i, f_j, pool, radius, noise)
                sims[texts, videos] = best.T
    head.train(model.training)
    return sims


def _best_of_pooled(t, f, pool, radius, noise):
    """Scores computed by calling the pooling. t (N,D), f (V,T,D) -> (V,N)."""
    v = pool(t, f).transpose(0, 1)                          # (V,N,D)
    if noise is None:
        return cosine(t, v)
    return _best_of(t, v, radius(similarities(t, f)), noise)


def _best_of_span(t, f, span, radius, noise, wide):
    """Scores computed from a span, in tiles of `wide` pairs. t (N,D), f (V,T,D) -> (V,N)."""
    Z, c = span(f)
    tv = (Z @ t.T * c).sum(1)                               # (V,N)
    vv = form(Z @ Z.mT, c).squeeze(1)                       # (V,N)
    tt = squared(t)                                         # (N)
    if noise is None:
        return tv / (vv * tt).clamp_min(TINY).sqrt()
    S = similarities(t, f)
    best = torch.empty_like(tv)
    # All videos of the block, however few: tiles have the same size for any number of texts.
    for texts in blocks(len(t), wide // len(f)):
        v = c[:, :, texts].mT @ Z                           # (V,texts,D)
        products = tv[:, texts], vv[:, texts], tt[texts]
        best[:, texts] = _best_of(t[texts], v, radius(S[:, texts]), noise, products)
    return best


def _best_of(t, v, R, noise, products=None):
    """The best of M samples, or its mean. t, v (...,D), R (...,D) or (...,1) -> (...).

    noise: the result of noise_of, not None.
    """
    if torch.is_tensor(noise):
        return sample_cosines(t, v, R, noise, products).amax(-1)
    return expected_cosine(t, v, R, *noise, products)


def noise_of(model, trials, seed, expected):
    """Samples (M,D); or, if expected, (mean, std, E_M); or None if the point text is scored."""
    if trials == 0 or type(model.radius) is NoRadius:
        return None
    if not expected:
        return model.noise(trials, seed)
    largest = largest_of_normals(trials)
    if model.prior == "uniform":
        return 0.5, 12 ** -0.5, largest
    return 0.0, model.prior_std, largest


def similarities(t, f):
    """S = cos(t, f_j). t (N,D), f (V,T,D) -> (V,N,T)."""
    S = F.normalize(f, dim=-1) @ t.T
    return S.div_(t.norm(dim=-1).clamp_min(1e-12)).mT


def _fast_radius(radius):
    """LinearRadius with its bias as part of the product, to save a pass. Others are unchanged."""
    if type(radius) is not LinearRadius:
        return radius
    bias = radius.linear.bias[None]
    W = torch.cat([radius.linear.weight.T, bias])           # (T+1,D)
    return lambda S: (F.pad(S, (0, 1), value=1.0) @ W).exp_()


def blocks(total, size):
    """Split range(total) into slices of at most `size`. -> list of slice"""
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, total, size)]
