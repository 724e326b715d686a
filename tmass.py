"""T-MASS: text as a stochastic embedding for text-video retrieval (CVPR 2024, arXiv 2403.17998), and its exact scorer.

One letter per axis, everywhere, text always left of video:

    N texts   V videos   T frames   L tokens   D joint width   H heads   M noise samples   R pixels   K = H*T + 2

    captions -> ids (N,L)  -> encode_text    t (N,D)   ---+--> pool(t, f)    v (N,V,D) --+
    frames (V,T,3,R,R)     -> encode_video   f (V,T,D) ---+--> cos(t, f)     S (N,V,T)   +--> sims (N,V)
                                                          +--> radius(S)     R (N,V,D) --+

Read in this order: XPool (the fusion psi), Radius (R), stochastic_text, support_text, symmetric_cross_entropy,
TMASS.forward (the training objective), TMASS.score (what evaluation and search rank by). Nothing here knows which video
a text belongs to, except that `forward` takes matched pairs: the scorer cannot see the ground truth.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import WeightsError

RADII = ("none", "mean", "scaled", "linear")
POOLINGS = ("xpool", "mean", "query")
PRIORS = ("normal", "uniform")
SUPPORTS = ("matched", "batch")


# ---- frame pooling: v = psi(f | t) ----

class XPool(nn.Module):
    """Feature fusion psi: text-conditioned pooling of frames (arXiv 2203.15086). t (N,D), f (V,T,D) -> v (N,V,D)."""

    def __init__(self, width, heads=1, dropout=0.3):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2, self.ln3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out, self.linear = (nn.Linear(width, width) for _ in range(5))
        for layer in (self.q, self.k, self.v, self.out, self.linear):  # at first, psi is a weighted mean of frames
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, t, f, generator=None):
        """In the order that suits few texts and training: only what a text has pooled meets Wv, Wo and W."""
        H, D = self.heads, t.shape[1]
        f1 = self.ln1(f)  # one LN1 is shared by text and frames
        q = self.query(t)
        Wk, Wv = (layer.weight.view(H, D // H, D) for layer in (self.k, self.v))
        k = torch.einsum("nhd,hde->nhe", q, Wk)
        qk = torch.einsum("nhe,vte->nvht", k, f1)                           # q·k_j = (Wkᵀ q)·LN1(f_j) + q·bk
        qk = qk + (q * self.k.bias.view(H, D // H)).sum(-1)[:, None, :, None]
        a = (qk / math.sqrt(D // H)).softmax(-1)                            # a = softmax_j(q·k_j / sqrt(D/H))
        u = torch.einsum("nvht,vte->nvhe", a, f1)                           # Σ_j a_j u_j = Wv Σ_j a_j LN1(f_j) + bv
        u = torch.einsum("nvhe,hde->nvhd", u, Wv).flatten(2) + self.v.bias
        x = self.ln2(self.out(u))                                           # o = Wo concat_h(Σ_j a_j u_j) + bo
        p = self.dropout * (self.training and torch.is_grad_enabled())      # scoring drops nothing
        return self.ln3(x + drop(self.linear(x), p, generator))             # v = LN3(x + Dropout(W x + b))

    def span(self, f):
        """What of v needs no text: Z with v_ij = Σ_k c_ijk Z_jk. f (V,T,D) -> (what `coefficients` needs, Z (V,K,D)).

        All of psi but two normalisations is linear in the frames. With u_j = Wo_h Wv_h LN1(f_j) (biases folded in, as
        Σ_j a_j = 1 per head; j runs over the H*T head-frame pairs) and ~ for "centred over D", as LayerNorm does:
            x = LN2(Σ a_j u_j) = Σ (a_j/s) g2⊙ũ_j + b2,        s² = aᵀ G a + ε,   G = ũ ũᵀ / D
            y = x + W x + b    = Σ (a_j/s) z_j + z_0,          z_j = (I+W)(g2⊙ũ_j),   z_0 = (I+W) b2 + b
            v = LN3(y)         = Σ c_j g3⊙z̃_j + c_0 g3⊙z̃_0 + b3,   (c, c_0) = (a/s, 1)/s',
                                                      s'² = (a/s, 1)ᵀ Q (a/s, 1) + ε,   Q = z̃ z̃ᵀ / D
        so that Z_j = (g3⊙z̃_1 ... g3⊙z̃_HT, g3⊙z̃_0, b3), and the coefficients are (c, c_0, 1).
        """
        V, T, D = f.shape
        H = self.heads
        f1 = self.ln1(f)
        u = self.v(f1).view(V, T, H, D // H)
        u = torch.einsum("vthd,ehd->vhte", u, self.out.weight.view(D, H, D // H)) + self.out.bias / H  # (V,H,T,D)
        u = u.flatten(1, 2)  # (V,H*T,D)
        u = u - u.mean(-1, keepdim=True)
        x = torch.cat([self.ln2.weight * u, self.ln2.bias.expand(V, 1, D)], 1)  # (V,H*T+1,D)
        z = x + x @ self.linear.weight.T
        z[:, -1] += self.linear.bias
        z = z - z.mean(-1, keepdim=True)
        Z = torch.cat([self.ln3.weight * z, self.ln3.bias.expand(V, 1, D)], 1)  # (V,K,D), K = H*T + 2
        k = self.k(f1).view(V, T, H, D // H).transpose(1, 2)  # (V,H,T,D/H)
        return (k, u @ u.mT / D, z @ z.mT / D), Z

    def query(self, t):
        """q of every text, once. t (N,D) -> (N,H,D/H)."""
        return self.q(self.ln1(t)).unflatten(-1, (self.heads, -1))

    def coefficients(self, q, terms):
        """The c of `span`, texts last: sums over K then run along memory. q (N,H,D/H) -> (V,K,N)."""
        (k, G, Q), scale = terms, math.sqrt(q.shape[-1])
        a = torch.cat([(dots(q[:, h], k[:, h]) / scale).softmax(1) for h in range(self.heads)], 1)  # (V,H*T,N)
        a *= ((G @ a * a).sum(1, keepdim=True) + self.ln2.eps).rsqrt()                           # a/s
        c = F.pad(a, (0, 0, 0, 1), value=1.0)                                                    # (a/s, 1)
        c *= ((Q @ c * c).sum(1, keepdim=True) + self.ln3.eps).rsqrt()                    # (c, c_0)
        return F.pad(c, (0, 0, 0, 1), value=1.0)                                                 # b3 counts once


class MeanPool(nn.Module):
    """v = mean_j f_j whatever the text (the CLIP4Clip baseline). t (N,D), f (V,T,D) -> v (N,V,D)."""

    def forward(self, t, f, generator=None):
        return f.mean(1).expand(len(t), -1, -1)

    def span(self, f):
        Z = f.mean(1, keepdim=True)  # K = 1, c = 1
        return Z, Z

    def query(self, t):
        return t

    def coefficients(self, q, Z):
        return q.new_ones(len(Z), 1, len(q))


class QueryPool(nn.Module):
    """v = Σ_j softmax_j(cos(t, f_j) / 0.1) f_j/|f_j|. t (N,D), f (V,T,D) -> v (N,V,D).

    Query scoring (arXiv 2205.08508), without a parameter: what a CLIP that nobody trained further is searched with.
    """

    def forward(self, t, f, generator=None):
        unit = F.normalize(f, dim=-1)
        a = (torch.einsum("nd,vtd->nvt", F.normalize(t, dim=-1), unit) / 0.1).softmax(-1)  # (N,V,T)
        return torch.einsum("nvt,vtd->nvd", a, unit)

    def span(self, f):
        Z = F.normalize(f, dim=-1)  # K = T, c = the softmax
        return Z, Z

    def query(self, t):
        return F.normalize(t, dim=-1)

    def coefficients(self, q, Z):
        return (dots(q, Z) / 0.1).softmax(1)


def dots(t, z):
    """Dot products of vectors of videos with texts, as one product of two matrices. t (N,D), z (V,K,D) -> (V,K,N)."""
    return (z.flatten(0, 1) @ t.T).view(*z.shape[:2], len(t))


def drop(x, p, generator=None):
    """Dropout from an explicit generator, which torch's own does not take: a step can be repeated. x (...) -> (...)."""
    if p == 0:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator) / (1 - p)


# ---- the text mass: t_s = t + R·ε ----

class Radius(nn.Module):
    """Similarity-aware radius of the text mass (paper, section 3.3). S = cos(t, f_j) (...,T) -> R (...,D).

    none 0 (T-MASS becomes X-Pool) | mean exp(mean_j S_j) | scaled exp(θ mean_j S_j) | linear exp(S W + b), W (T,D).
    """

    def __init__(self, kind, frames, width):
        super().__init__()
        self.kind, self.frames, self.width = kind, frames, width
        if kind == "scaled":
            self.theta = nn.Parameter(torch.ones(()))  # differs from the released code, which leaves θ uninitialised
        if kind == "linear":
            self.linear = nn.Linear(frames, width)  # identity start: only the first T dimensions see S
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def scalar(self, S):
        """The radius where one number serves all dimensions. S (...,T) -> (...)."""
        if self.kind == "none":
            return S.new_zeros(S.shape[:-1])
        return (S.mean(-1) if self.kind == "mean" else self.theta * S.mean(-1)).exp()

    def forward(self, S):
        if S.shape[-1] != self.frames:
            raise WeightsError(f"this model was built for {self.frames} frames per video and got {S.shape[-1]}: "
                               f"sample {self.frames}")
        if self.kind == "linear":
            return self.linear(S).exp()  # R = exp(S W + b)
        return self.scalar(S).unsqueeze(-1).expand(*S.shape[:-1], self.width)


def stochastic_text(t, r, eps):
    """A sample of the text mass (paper, eq. 4). t, r, eps (...,D) -> (...,D)."""
    return t + r * eps  # t_s = t + R·ε


def support_text(t, v, r):
    """The point of the text mass's surface that looks towards the video (paper, eq. 7). t, v, r (...,D) -> (...,D)."""
    return t + F.normalize(v - t, dim=-1) * r  # t_sup = t + (v-t)/|v-t| · R


def cosine(a, b):
    """cos of last axes, broadcast. (...,D), (...,D) -> (...)."""
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


def symmetric_cross_entropy(sims, scale):
    """Text->video (rows) and video->text (columns) InfoNCE, averaged; pair i is (i, i). sims (N,N) -> ()."""
    logits, target = scale * sims, torch.arange(len(sims), device=sims.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ---- the best of M samples ----

def best_cosine(t, v, r, noise):
    """The score of the text mass: max_m cos(t + R⊙ε_m, v), or its mean, or cos(t, v). t, v, r (...,D) -> (...).

    noise: samples ε (M,D); or what the mean needs, (mean, std, E_M), see expected_cosine; or None.
    """
    if noise is None:
        return cosine(t, v)
    if torch.is_tensor(noise):
        return sample_cosines(t, v, r, noise).amax(-1)
    return expected_cosine(t, v, r, *noise)


def sample_cosines(t, v, r, eps):
    """cos(t + R⊙ε_m, v) of every sample, without M copies of the text. t, v, r (...,D), eps (M,D) -> (...,M)."""
    tv, vv, tt = (t * v).sum(-1), v.square().sum(-1), t.square().sum(-1)
    return cosines(tv, vv, tt, (r * v) @ eps.T, (r * t) @ eps.T, r.square() @ eps.square().T)


def cosines(tv, vv, tt, rv, rt, rr):
    """(t·v + (R⊙v)·ε) / (|v| sqrt(|t|² + 2 (R⊙t)·ε + (R⊙R)·ε²)), in place. tv, vv, tt (...), the others (...,M)."""
    ts_norm = rr.add_(rt, alpha=2).add_(tt.unsqueeze(-1)).clamp_min_(1e-16).sqrt_()  # |t_s|
    return rv.add_(tv.unsqueeze(-1)).div_(ts_norm).div_(vv.clamp_min(1e-16).sqrt().unsqueeze(-1))


def expected_cosine(t, v, r, mean, std, largest):
    """The mean of max_m cos(t + R⊙ε_m, v) over ε, to first order in ε: s = a + E_M b. t, v, r (...,D) -> (...).

    ε = μ + σ z with z ~ N(0, I): exactly so for the normal prior (μ = 0, σ = std), and to all purposes for the uniform
    one (1/2, 1/√12), whose sums over D dimensions are normal. Then t_s = c + σ R⊙z with c = t + μR, of length
    |t_s|² = |c|² + 2σ (R⊙c)·z + σ²|R⊙z|², where the last term hardly leaves its mean σ²|R|². Let τ² = |c|² + σ²|R|²:
        cos(t_s, v) = (c·v + σ (R⊙v)·z) / (|v| τ sqrt(1 + 2σ (R⊙c)·z/τ²))
                    ≈ (c·v + σ (R⊙v)·z - σ k (R⊙c)·z) / (|v| τ),   k = c·v/τ²,
    which is normal with mean a = c·v/(|v| τ) and deviation b = σ|g|/(|v| τ), g = R⊙(v - k c). The largest of M such
    numbers is a + E_M b on average: a cosine, shrunk by |t|/τ, and a bonus for a wide mass.
    """
    c = t + mean * r if mean else t
    cv = (c * v).sum(-1)                                                          # c·v
    tau2 = (c.square().sum(-1) + std ** 2 * r.square().sum(-1)).clamp_min(1e-16)  # τ² = |c|² + σ²|R|²
    g = r * (v - (cv / tau2).unsqueeze(-1) * c)                                   # g = R⊙(v - k c)
    return (cv + largest * std * g.norm(dim=-1)) / (v.norm(dim=-1).clamp_min(1e-8) * tau2.sqrt())  # a + E_M b


def largest_of_normals(M):
    """E_M, the mean of the largest of M standard normals: ∫ x d(Φ(x)^M), by a sum that is exact to rounding."""
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)  # M up to 10^12 stays inside
    density = M * torch.exp((M - 1) * torch.special.log_ndtr(x) - x.square() / 2) / math.sqrt(2 * math.pi)
    return float((x * density).sum() * 0.001)


# ---- the model ----

class TMASS(nn.Module):
    """CLIP + frame pooling + radius. `model(ids, video)` is the training objective, `model.score(t, f)` ranks.

    clip: a clip_model.CLIP. frames: T. pooling: xpool | mean | query. radius: none | mean | scaled | linear.
    prior of ε: normal (times prior_std) | uniform on [0, 1). L = L(t_s) + support_weight L(t_sup) + ce_weight L(t).
    support_video: the v that t_sup looks towards; `matched` psi(f_i | t_i) as in the paper, or `batch`, the mean of
    psi(f_i | t_n) over the batch's texts n (the released code's).
    """

    def __init__(self, clip, frames=12, pooling="xpool", heads=1, dropout=0.3, radius="linear", prior="normal",
                 prior_std=1.0, support_weight=0.8, ce_weight=0.0, support_video="matched"):
        super().__init__()
        D = clip.config["embed_dim"]
        for name, value, known in (("pooling", pooling, POOLINGS), ("radius", radius, RADII), ("prior", prior, PRIORS),
                                   ("support_video", support_video, SUPPORTS)):
            if value not in known:
                raise WeightsError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        if heads < 1 or D % heads:
            raise WeightsError(f"heads={heads} does not divide the joint width {D}")
        self.config = dict(frames=frames, pooling=pooling, heads=heads, dropout=dropout, radius=radius, prior=prior,
                           prior_std=prior_std, support_weight=support_weight, ce_weight=ce_weight,
                           support_video=support_video)
        self.frames, self.prior, self.prior_std = frames, prior, prior_std
        self.support_weight, self.ce_weight, self.support_video = support_weight, ce_weight, support_video
        self.clip = clip
        self.pool = {"xpool": lambda: XPool(D, heads, dropout), "mean": MeanPool, "query": QueryPool}[pooling]()
        self.radius = Radius(radius, frames, D)

    def encode_text(self, ids):
        """ids (N,L) -> t (N,D), float32, not normalised."""
        return self.clip.encode_text(ids).float()

    def encode_video(self, frames):
        """frames (V,T,3,R,R), uint8 or normalised float -> f (V,T,D), float32, not normalised; each frame alone."""
        V, T = frames.shape[:2]
        return self.clip.encode_image(frames.flatten(0, 1)).float().view(V, T, -1)

    def sample_noise(self, shape, generator=None, device=None):
        """ε ~ P: N(0, prior_std²), or U[0,1) per dimension (the released code's default; its mean is not 0)."""
        if self.prior == "uniform":
            return torch.rand(shape, generator=generator, device=device)
        return torch.randn(shape, generator=generator, device=device) * self.prior_std

    def forward(self, ids, video, generator=None, gather=None):
        """Training objective on matched pairs. ids (N,L), video (N,T,3,R,R) -> dict(loss, ce, stochastic, support).

        generator: where noise and dropout come from (default: torch's global one). gather: joins the rows of all
        processes with gradient, so that the contrast is over the global batch.
        """
        t, f = self.encode_text(ids), self.encode_video(video)
        if gather is not None:
            t, f = gather(t), gather(f)
        with torch.autocast(t.device.type, enabled=False):  # losses stay float32
            return self.losses(t, f, generator)

    def losses(self, t, f, generator=None):
        """L_total = L(t_s) + α L(t_sup) + β L(t) (paper, eq. 9). t (N,D), f (N,T,D) -> dict of scalars."""
        scale = self.clip.logit_scale.exp()
        v = self.pool(t, f, generator)                                # v_ij = psi(f_j | t_i)  (N,N,D)
        v_pair = v.diagonal().T                                       # psi(f_i | t_i)  (N,D)
        r = self.radius(cosine(t[:, None], f))                        # R of the matched pair only  (N,D)
        eps = self.sample_noise(t.shape, generator, t.device)
        v_sup = v_pair if self.support_video == "matched" else v.mean(0)
        z = dict(ce=t, stochastic=stochastic_text(t, r, eps), support=support_text(t, v_sup, r))
        out = {name: symmetric_cross_entropy(cosine(z_i[:, None], v), scale) for name, z_i in z.items()}
        return dict(loss=out["stochastic"] + self.support_weight * out["support"] + self.ce_weight * out["ce"], **out)

    # ---- exact scoring of all pairs ----

    def noise(self, trials, seed=24):
        """The M samples of ε that all pairs share, drawn on the CPU: the same noise for every device. -> (M,D)."""
        width = self.clip.config["embed_dim"]
        return self.sample_noise((trials, width), torch.Generator().manual_seed(seed)).to(self.clip.logit_scale.device)

    @torch.no_grad()
    def score(self, t, f, trials=20, seed=24, expected=False, chunk_mb=256):
        """Score every text with every video: max_m cos(t_i + R_ij·ε_m, v_ij). t (N,D), f (V,T,D) -> sims (N,V).

        trials: M; 0 scores the point text t. seed: of the noise, which all pairs share (differs from the released code,
        which draws it anew for each: the distribution is the same, and here no other text or video moves a score).
        expected: the mean of that maximum over the noise, in closed form (`expected_cosine`): no noise, no seed.
        f: of any precision, on any device; scored in float32 on the device of t, within about chunk_mb megabytes.
        Equals the literal formula up to rounding. Few texts are pooled as in training, by three D x D products a pair;
        for more, the span of each video (XPool.span) costs 4T such products a video, and none a pair.
        """
        (N, D), (V, T, _), H = t.shape, f.shape, self.config["heads"]
        with torch.autocast(t.device.type, enabled=False):
            t, sims = t.float(), torch.empty(N, V, device=t.device)
            noise = self._noise(trials, seed, expected, t.device)
            few = 3 * N <= 4 * T
            floats, M, K = chunk_mb * 2 ** 20 / 4, 0 if expected else trials, H * T + 2
            tile = int(floats / 4 / ((H + 5) * D))      # pairs at once, of which vectors of width D are held
            pairs = int(floats / 2 / (10 * K + 4 * M))  # pairs at once, of which all else is held
            if t.device.type == "cpu":
                pairs, tile = min(pairs, 65536), min(tile, 1024)  # what stays in the cache is several times faster
            n = max(1, min(N, tile))
            v = max(1, min(V, (tile if few else pairs) // n, int(floats / 4 / (7 * K * D))))
            texts = t, F.normalize(t, dim=-1), self.pool.query(t)
            for j in range(0, V, v):
                fj = f[j:j + v].to(t.device).float()
                unit, span = F.normalize(fj, dim=-1), None if few else self.pool.span(fj)
                if not few and self.radius.kind != "linear":
                    unit = unit.mean(1, keepdim=True)  # mean_j cos(t, f_j) = t/|t| · mean_j f_j/|f_j| is all it needs
                for i in range(0, N, n):
                    ti, unit_ti, q = (x[i:i + n] for x in texts)
                    S = None if noise is None else torch.einsum("nd,vtd->vnt", unit_ti, unit)  # cos(t, f_j)
                    if few:
                        r = None if noise is None else self.radius(S)
                        block = best_cosine(ti, self.pool(ti, fj).transpose(0, 1), r, noise)  # video first, as below
                    else:
                        block = self._score_block(ti, q, S, *span, noise, max(1, tile // n))
                    sims[i:i + n, j:j + v] = block.T
            return sims

    def _noise(self, trials, seed, expected, device):
        """What `best_cosine` needs to know of ε."""
        if trials == 0 or self.radius.kind == "none":
            return None
        if not expected:
            return self.noise(trials, seed).to(device)
        mean, std = (0.5, 12 ** -0.5) if self.prior == "uniform" else (0.0, self.prior_std)
        return mean, std, largest_of_normals(trials)

    def _score_block(self, t, q, S, terms, Z, noise, tile):
        """Scores by the algebra of XPool.span. t (N,D), q: pool.query(t), S (V,N,T), tile: videos at once -> (V,N)."""
        V, _, D = Z.shape
        c = self.pool.coefficients(q, terms)                              # v = Σ_k c_k Z_k  (V,K,N)
        if self.radius.kind == "linear" and noise is not None:
            parts = [slice(j, j + tile) for j in range(0, V, tile)]
            return torch.cat([best_cosine(t, c[j].mT @ Z[j], self.radius(S[j]), noise) for j in parts])
        # One R for all dimensions leaves the products, and nothing is D wide: t·v = Σ_k c_k (t·Z_k), |v|² = cᵀ Z Zᵀ c.
        tv, tt = (dots(t, Z) * c).sum(1), t.square().sum(-1)              # (V,N), (N)
        vv = (Z @ Z.mT @ c * c).sum(1).clamp_min(1e-16)                   # (V,N)
        if noise is None:
            return tv / (vv * tt.clamp_min(1e-16)).sqrt()
        r = self.radius.scalar(S)                                         # (V,N)
        if torch.is_tensor(noise):
            e, r = noise.T, r.unsqueeze(-1)                           # (D,M), (V,N,1)
            rv, rt, rr = r * (c.mT @ (Z @ e)), r * (t @ e), r.square() * e.square().sum(0)
            return cosines(tv, vv, tt, rv, rt, rr).amax(-1)
        mean, std, largest = noise                                        # expected_cosine by its products
        cv = tv + mean * r * (Z.sum(-1, keepdim=True) * c).sum(1)
        cc = tt + 2 * mean * r * t.sum(-1) + D * (mean * r).square()
        tau2 = (cc + D * (std * r).square()).clamp_min(1e-16)
        k = cv / tau2
        g = r * (vv - 2 * k * cv + k.square() * cc).clamp_min(0).sqrt()   # |R(v - k c)|
        return (cv + largest * std * g) / (vv * tau2).sqrt()
