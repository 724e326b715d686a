"""T-MASS: text as a stochastic embedding for text-video retrieval (CVPR 2024, arXiv 2403.17998).

The whole method, in the order of the paper. Every axis has one letter, and the text axis always
comes before the video axis:

    N texts    V videos    T frames    L tokens    D joint width    H heads    M noise samples
    P image side    B videos, each with its own text

    captions -> ids    (N,L)       -> encode_text  t (N,D)   --+--> pool(t, f)   v (N,V,D) --+
    videos   -> pixels (V,T,3,P,P) -> encode_video f (V,T,D) --+--> cos(t, f_j)  S (N,V,T)   |
                                                               +--> radius(S)    R (N,V,D) --+
                                                                        score(t, f) (N,V) <--+

Only the losses know which video a text belongs to. `TMASS.score`, which ranks the videos, treats
all pairs alike. It is written for readability; lib/exact.py computes the same scores much faster.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PRIORS = ("normal", "uniform")
SUPPORTS = ("matched", "batch")


# ---- frame pooling psi: one vector per text and video ----
#
# Each class is constructed with (width, heads, dropout) and maps t (N,D), f (V,T,D) -> v (N,V,D).
# A new class needs only an entry in POOLINGS. lib/exact.py has a faster version of XPool: a change
# to it needs the same change there, and the tests compare the two.


class XPool(nn.Module):
    """Text-conditioned attention over the frames (X-Pool, arXiv 2203.15086): the paper's choice."""

    def __init__(self, width, heads=1, dropout=0.3):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide the joint width {width}")
        self.heads = heads
        self.ln1 = nn.LayerNorm(width)  # shared by text and frames
        self.ln2 = nn.LayerNorm(width)
        self.ln3 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        # With identity weights, psi starts as a weighted mean of the frames, up to layer norms.
        for layer in (self.q, self.k, self.v, self.out, self.linear):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, t, f):
        """t (N,D), f (V,T,D) -> v (N,V,D)."""
        frames = self.ln1(f)
        q = self.split_heads(self.q(self.ln1(t)))               # (N,H,D/H)
        k = self.split_heads(self.k(frames))                    # (V,T,H,D/H)
        u = self.split_heads(self.v(frames))                    # (V,T,H,D/H)
        a = torch.einsum("nhd,vthd->nvht", q, k) / math.sqrt(q.shape[-1])
        a = a.softmax(-1)                                       # over the frames
        o = torch.einsum("nvht,vthd->nvhd", a, u).flatten(2)    # (N,V,D)
        x = self.ln2(self.out(o))
        return self.ln3(x + self.dropout(self.linear(x)))

    def split_heads(self, x):
        """(...,D) -> (...,H,D/H)."""
        return x.unflatten(-1, (self.heads, -1))


class MeanPool(nn.Module):
    """v = mean_j f_j, independent of the text: the CLIP4Clip baseline."""

    def __init__(self, *unused):
        super().__init__()

    def forward(self, t, f):
        """t (N,D), f (V,T,D) -> v (N,V,D)."""
        return f.mean(1).expand(len(t), -1, -1)


class QueryPool(nn.Module):
    """v = Σ_j a_j f_j/|f_j|, a = softmax_j(cos(t, f_j) / 0.1): query scoring (arXiv 2205.08508).

    It is conditioned on the text but has no parameters, so it suits a CLIP without fine-tuning.
    """

    def __init__(self, *unused):
        super().__init__()

    def forward(self, t, f):
        """t (N,D), f (V,T,D) -> v (N,V,D)."""
        t = F.normalize(t, dim=-1)
        f = F.normalize(f, dim=-1)
        a = torch.einsum("nd,vtd->nvt", t, f) / 0.1
        return torch.einsum("nvt,vtd->nvd", a.softmax(-1), f)


POOLINGS = {"xpool": XPool, "mean": MeanPool, "query": QueryPool}


# ---- similarity-aware radius of the text mass (section 3.3) ----
#
# Each class is constructed with (frames, width) and maps S_j = cos(t, f_j), (...,T) -> R (...,D),
# or (...,1) if all dimensions share one value. A new class needs only an entry in RADII.
# lib/exact.py has a faster version of LinearRadius, as of XPool.


class NoRadius(nn.Module):
    """R = 0: T-MASS becomes X-Pool."""

    def __init__(self, *unused):
        super().__init__()

    def forward(self, S):
        """S (...,T) -> R (...,1)."""
        return torch.zeros_like(S[..., :1])


class MeanRadius(nn.Module):
    """R = exp(mean_j S_j)."""

    def __init__(self, *unused):
        super().__init__()

    def forward(self, S):
        """S (...,T) -> R (...,1)."""
        return S.mean(-1, keepdim=True).exp()


class ScaledRadius(nn.Module):
    """R = exp(θ mean_j S_j), θ learnt."""

    def __init__(self, *unused):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(()))  # uninitialised and unused in the released code

    def forward(self, S):
        """S (...,T) -> R (...,1)."""
        return (self.theta * S.mean(-1, keepdim=True)).exp()


class LinearRadius(nn.Module):
    """R = exp(S W + b), W (T,D): the paper's choice."""

    def __init__(self, frames, width):
        super().__init__()
        self.linear = nn.Linear(frames, width)
        nn.init.eye_(self.linear.weight)  # at first, only the first T dimensions of R depend on S
        nn.init.zeros_(self.linear.bias)

    def forward(self, S):
        """S (...,T) -> R (...,D)."""
        frames = self.linear.in_features
        if S.shape[-1] != frames:
            raise ValueError(f"this model was built for {frames} frames per video and got "
                             f"{S.shape[-1]}: sample {frames}")
        return self.linear(S).exp()


RADII = {"none": NoRadius, "mean": MeanRadius, "scaled": ScaledRadius, "linear": LinearRadius}


# ---- the text mass ----


def stochastic_text(t, R, eps):
    """A sample of the text mass (eq. 4). t, eps (...,D), R (...,D) or (...,1) -> (...,D)."""
    return t + R * eps  # t_s = t + R·ε


def support_text(t, v, R):
    """Move t by R towards v (eq. 7). t, v (...,D), R (...,D) or (...,1) -> (...,D)."""
    return t + F.normalize(v - t, dim=-1) * R  # t_sup = t + (v - t)/|v - t| · R


def cosine(a, b):
    """Cosine similarity over the last axis, with broadcasting. a, b (...,D) -> (...)."""
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


def symmetric_cross_entropy(sims, scale):
    """Mean of the text-to-video and video-to-text cross entropies. sims (B,B), scale () -> ().

    Text i and video i are a matched pair; all other pairs are negatives.
    """
    logits = scale * sims
    target = torch.arange(len(sims), device=sims.device)
    text_to_video = F.cross_entropy(logits, target)
    video_to_text = F.cross_entropy(logits.T, target)
    return (text_to_video + video_to_text) / 2


# ---- the model ----


class TMASS(nn.Module):
    """CLIP with frame pooling and a radius.

    `model(ids, pixels)` computes the training losses, `model.score(t, f)` the scores for ranking.

    clip            image and text encoder with encode_text, encode_image, logit_scale, embed_dim
    frames          T
    pooling         how T frames become one vector: a key of POOLINGS
    heads, dropout  settings of the pooling; only XPool uses them
    radius          radius of the text mass: a key of RADII
    prior           distribution of the noise ε: "normal", N(0, prior_std²), or "uniform", U[0, 1)
    support_weight, ce_weight   α and β of the objective L(t_s) + α L(t_sup) + β L(t)
    support_video   the v that t_sup points towards: "matched", psi(f_i | t_i), as in the paper, or
                    "batch", the mean of psi(f_i | t_n) over the texts n, as in the released code
    """

    def __init__(self, clip, frames=12, pooling="xpool", heads=1, dropout=0.3, radius="linear",
                 prior="normal", prior_std=1.0, support_weight=0.8, ce_weight=0.0,
                 support_video="matched"):
        settings = locals()
        super().__init__()
        self.config = {k: x for k, x in settings.items() if k not in ("self", "clip", "__class__")}
        choices = dict(pooling=POOLINGS, radius=RADII, prior=PRIORS, support_video=SUPPORTS)
        for name, known in choices.items():
            if settings[name] not in known:
                listed = ", ".join(known)
                raise ValueError(f"unknown {name} {settings[name]!r}: choose one of {listed}")
        self.clip = clip
        self.pool = POOLINGS[pooling](clip.embed_dim, heads, dropout)
        self.radius = RADII[radius](frames, clip.embed_dim)
        self.frames = frames
        self.prior = prior
        self.prior_std = prior_std
        self.support_weight = support_weight
        self.ce_weight = ce_weight
        self.support_video = support_video
        self.chunk = 0  # rows per call of an encoder in training (in_chunks); 0: all at once

    def encode_text(self, ids):
        """ids (N,L) -> t (N,D), float32, not normalised."""
        return self.in_chunks(self.clip.encode_text, ids).float()

    def encode_video(self, pixels):
        """pixels (V,T,3,P,P), uint8 or normalised float -> f (V,T,D), float32, not normalised."""
        V, T = pixels.shape[:2]
        frames = self.in_chunks(self.clip.encode_image, pixels.flatten(0, 1))
        return frames.float().unflatten(0, (V, T))

    def in_chunks(self, encode, x):
        """encode(x), in training with the memory of self.chunk rows. x (N,...) -> (N,D).

        Of a chunk, only the embeddings are kept; the backward pass computes the rest a second time,
        with the same dropout. The gradient is that of the whole batch. Adding up the gradients of
        smaller batches would not give it, because the losses contrast all pairs of a batch.
        """
        if not self.chunk or not torch.is_grad_enabled():
            return encode(x)
        chunks = []
        for part in x.split(self.chunk):
            chunks.append(checkpoint(encode, part, use_reentrant=False))
            # Otherwise, autocast would add up the chunks' gradients in half precision.
            torch.clear_autocast_cache()
        return torch.cat(chunks)

    def sample_noise(self, shape, **where):
        """Sample ε ~ P. where: device and generator, passed to torch.rand or torch.randn."""
        if self.prior == "uniform":  # the released code's default; its mean is not 0
            return torch.rand(shape, **where)
        return self.prior_std * torch.randn(shape, **where)

    # -- training --

    def forward(self, ids, pixels, gather=None):
        """The training losses of matched pairs. ids (B,L), pixels (B,T,3,P,P) -> dict of scalars.

        gather: concatenates the rows of all processes, so that the losses contrast all pairs of
        the global batch.
        """
        t = self.encode_text(ids)
        f = self.encode_video(pixels)
        if gather is not None:
            t = gather(t)
            f = gather(f)
        with torch.autocast(t.device.type, enabled=False):  # the losses need float32
            return self.losses(t, f)

    def losses(self, t, f):
        """L(t_s) + α L(t_sup) + β L(t) (eq. 9). t (B,D), f (B,T,D) -> dict of scalars."""
        v = self.pool(t, f)                         # v_ij = psi(f_j | t_i)            (B,B,D)
        R = self.radius(cosine(t[:, None], f))      # of the matched pairs only        (B,D)
        v_sup = v.diagonal().T                      # psi(f_i | t_i)                   (B,D)
        if self.support_video == "batch":           # the released code differs from the paper here
            v_sup = v.mean(0)

        t_s = stochastic_text(t, R, self.sample_noise(t.shape, device=t.device))
        t_sup = support_text(t, v_sup, R)

        v = F.normalize(v, dim=-1)                  # only once: v is by far the largest tensor
        loss_s = self.contrast(t_s, v)
        loss_sup = self.contrast(t_sup, v)
        loss_t = self.contrast(t, v)
        loss = loss_s + self.support_weight * loss_sup + self.ce_weight * loss_t
        return dict(loss=loss, stochastic=loss_s, support=loss_sup, ce=loss_t)

    def contrast(self, z, v):
        """L(z), with sims[i, j] = cos(z_i, v_ij). z (B,D), v (B,B,D) of unit length -> ()."""
        sims = torch.einsum("nd,nvd->nv", F.normalize(z, dim=-1), v)
        return symmetric_cross_entropy(sims, self.clip.logit_scale.exp())

    # -- inference --

    def noise(self, trials, seed=24):
        """M = trials samples of ε, drawn on the CPU so that all devices get the same. -> (M,D)."""
        generator = torch.Generator().manual_seed(seed)
        eps = self.sample_noise((trials, self.clip.embed_dim), generator=generator)
        return eps.to(self.clip.logit_scale.device)

    @torch.no_grad()
    def score(self, t, f, trials=20, seed=24):
        """max_m cos(t_i + R_ij·ε_m, v_ij) for every pair. t (N,D), f (V,T,D) -> sims (N,V).

        trials is M; with 0, the score is that of the point text, cos(t_i, v_ij). All pairs share
        the same M samples. This differs from the released code, which draws new samples for each
        pair: each score has the same distribution, but here it does not depend on which other texts
        and videos are scored with it.
        """
        head = nn.ModuleList([self.pool, self.radius]).eval()  # dropout is for training
        eps = torch.zeros_like(t[:1])
        if trials > 0:
            eps = self.noise(trials, seed).to(t)                # (M,D)
        sims = t.new_empty(len(t), len(f))
        for j in range(len(f)):
            f_j = f[j:j + 1]                                    # (1,T,D)
            v = self.pool(t, f_j)                               # (N,1,D)
            R = self.radius(cosine(t[:, None], f_j))            # (N,D)
            t_s = stochastic_text(t[:, None], R[:, None], eps)  # (N,M,D)
            sims[:, j] = cosine(t_s, v).amax(-1)                # the maximum over samples
        head.train(self.training)
        return sims
