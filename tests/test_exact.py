"""The fast scorer against TMASS.score, for poolings and radii that it knows and others."""
import inspect
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, D, T, features, small_clip, small_model
from torch import nn

import tmass
from eval import released_scores
from lib import exact
from lib.exact import largest_of_normals
from tmass import TMASS, LinearRadius, XPool, cosine


class MaxPool(nn.Module):
    """A pooling that only this test knows; it drops, and what it returns is expanded."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, t, f):
        return self.dropout(self.linear(f).amax(1)).expand(len(t), -1, -1)


class FirstXPool(XPool):
    """What inherits from a known pooling is not the known pooling."""

    def forward(self, t, f):
        return super().forward(t, f[:, :1]) + 0.1 * t[:, None]


class OwnRadius(nn.Module):
    """Some of it is negative; it returns its own parameter, which nothing may write to."""

    def __init__(self, frames, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, width))

    def forward(self, S):
        return self.weight.expand(*S.shape[:-1], -1)


class SquaredRadius(LinearRadius):
    """What inherits from a known radius is not the known radius."""

    def forward(self, S):
        return super().forward(S).square()


POOLINGS = {**tmass.POOLINGS, "max": MaxPool, "first": FirstXPool}
RADII = {**tmass.RADII, "own": OwnRadius, "squared": SquaredRadius}


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def literal_expected(model, t, f, M):
    """s = a + E_M b for all pairs, in float64."""
    v = model.pool(t, f).double()
    R = model.radius(cosine(t[:, None, None], f)).double().expand(*v.shape)
    mean, std = (0.5, 12 ** -0.5) if model.prior == "uniform" else (0, model.prior_std)
    c = t[:, None] + mean * R
    tau2 = (c ** 2).sum(-1) + std ** 2 * (R ** 2).sum(-1)
    k = (c * v).sum(-1) / tau2
    b = std * (R * v - k[..., None] * R * c).norm(dim=-1)
    return (((c * v).sum(-1) + largest_of_normals(M) * b) / v.norm(dim=-1) / tau2.sqrt()).float()


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_the_literal_score(monkeypatch, pooling, radius):
    """One text and many, chunked and whole, half precision, in training mode and not."""
    monkeypatch.setattr(tmass, "POOLINGS", POOLINGS)
    monkeypatch.setattr(tmass, "RADII", RADII)
    for settings in (dict(prior_std=0.5), dict(prior="uniform", heads=4)):
        model = small_model(pooling=pooling, radius=radius, **settings)
        state = {name: x.clone() for name, x in model.state_dict().items()}
        t, f = features(9, 5)
        f = f.half()
        for trials in (0, 5):
            literal = model.score(t, f.float(), trials)
            for N in (1, T, 9):
                assert gap(exact.score(model, t[:N], f, trials), literal[:N]) < 2e-6
                chunked = exact.score(model, t[:N], f, trials, chunk_mb=0.01)
                assert gap(chunked, literal[:N]) < 2e-6
        assert gap(exact.score(model.train(), t, f, 5), literal) < 2e-6
        assert all(part.training for part in model.modules())
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        model.eval()
        want = model.score(t, f.float(), 0)
        if radius != "none":
            want = literal_expected(model, t, f.float(), 8)
        for N in (1, 9):
            for chunk_mb in (0.001, 256):
                found = exact.score(model, t[:N], f, 8, expected=True, chunk_mb=chunk_mb)
                assert gap(found, want[:N]) < 2e-6


def test_the_seed_and_the_number_of_samples_count():
    model = small_model()
    t, f = features(9, 5)
    scores = exact.score(model, t, f)
    assert torch.equal(scores, exact.score(model, t, f, 20, 24))
    assert gap(scores, exact.score(model, t, f, 20, 25)) > 1e-3
    assert (exact.score(model, t, f, 40) >= scores - 1e-6).all()  # more samples of the same seed
    expected = exact.score(model, t, f, expected=True)
    assert torch.equal(expected, exact.score(model, t, f, seed=25, expected=True))


def test_autocast_and_dtype_of_the_inputs_do_not_matter():
    model = small_model()
    t, f = features(9, 5)
    want = exact.score(model, t, f)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.score(model, t, f), want)
    assert exact.score(model, t.half(), f).dtype == torch.float32


@pytest.mark.parametrize("N, V", [(0, 3), (3, 0)])
def test_no_texts_or_no_videos(N, V):
    t, f = features(9, 5)
    for expected in (False, True):
        assert exact.score(small_model(), t[:N], f[:V], expected=expected).shape == (N, V)


@pytest.mark.parametrize("score", [TMASS.score, exact.score])
def test_another_number_of_frames_is_refused(score):
    t, f = features(9, 5, frames=7)
    for N in (1, 9):
        with pytest.raises(ValueError, match="4 frames per video and got 7: sample 4"):
            score(small_model(), t[:N], f)


# ---- leaks ----


@pytest.mark.parametrize("method", [dict(heads=4), dict(pooling="query", radius="mean")], ids=str)
@pytest.mark.parametrize("expected", [False, True])
def test_a_pair_alone_equals_its_entry_and_permuting_permutes(method, expected):
    model = small_model(**method)
    t, f = features(9, 6)

    def score(t, f):
        return exact.score(model, t, f, 8, expected=expected)

    sims = score(t, f)
    for i, j in ((0, 0), (3, 5), (8, 2)):
        assert gap(score(t[i:i + 1], f[j:j + 1])[0, 0], sims[i, j]) < 1e-6
    texts = torch.randperm(9)
    videos = torch.randperm(6)
    assert gap(score(t[texts], f[videos]), sims[texts][:, videos]) < 1e-6


def test_score_has_no_way_to_receive_the_owner():
    """Its inputs are two sides' features and numbers."""
    inputs = [*inspect.signature(exact.score).parameters]
    assert inputs == ["model", "t", "f", "trials", "seed", "expected", "chunk_mb"]
    assert [*inspect.signature(TMASS.score).parameters] == ["self", "t", "f", "trials", "seed"]


def test_null_honest_is_at_chance_and_released_protocol_is_not():
    """Unpaired random features, sharpened attention: who finds the right video has seen the truth.

    Under the null hypothesis a text's rank is uniform on 1..V, so the mean of N ranks has mean
    (V+1)/2 and standard deviation at most sqrt((V²-1)/12) (ranks of texts that share a gallery are
    correlated, hence one seed of the features per draw and the mean over 5 draws). Honest must lie
    within 4 standard errors over draws; the released protocol must be better than chance by more
    than 6.
    """
    N = 60
    honest = []
    leaking = []
    for draw in range(5):
        model = small_model(draw, shake=0.0, prior_std=0.1)
        # A trained model attends sharply; an untrained one takes nearly the mean.
        model.pool.q.weight.data *= 6
        t, _ = features(N, N, seed=100 + draw)
        # Diverse frames, unrelated to t.
        f = torch.randn(N, T, D, generator=torch.Generator().manual_seed(draw))
        scores = exact.score(model, t, f, 10)
        released = released_scores(model, t, f, torch.arange(N), 10)
        for sims, ranks in ((scores, honest), (released, leaking)):
            above = sims > sims.diagonal()[:, None]
            ranks.append(float(above.sum(1).float().mean() + 1))
    chance = (N + 1) / 2
    error = math.sqrt((N * N - 1) / 12 / N / 5)
    assert abs(sum(honest) / 5 - chance) < 4 * error, honest
    assert sum(leaking) / 5 < chance - 6 * error, leaking


# ---- the mean of the best sample in closed form ----


def test_largest_of_normals():
    """By integrals known in closed form."""
    root = math.sqrt(math.pi)
    of_four = 3 / root * (1 - math.acos(1 / 3) / math.pi)
    known = {1: 0, 2: 1 / root, 3: 1.5 / root, 4: of_four, 20: 1.86747505979832}
    for M, value in known.items():
        assert abs(largest_of_normals(M) - value) < 1e-9, M
    largest = largest_of_normals(10 ** 11)
    assert largest_of_normals(10 ** 9) < largest < math.sqrt(2 * math.log(10 ** 11))


@pytest.mark.parametrize("method", [
    dict(), dict(prior_std=0.1), dict(prior="uniform"),
    dict(radius="mean", prior="uniform", heads=4)], ids=str)
def test_expected_is_nearer_to_the_mean_of_sampling_than_sampling_is(method):
    """D = 256, M = 20, 250 sets of noise: it errs at most a tenth as much as one set."""
    torch.manual_seed(0)
    model = TMASS(small_clip(256), frames=T, **method).eval()
    t = torch.randn(4, 256)
    # Cosines of about a half on the diagonal.
    f = torch.randn(4, 1, 256) + 0.7 * torch.randn(4, T, 256) + 0.5 * t[:, None]
    sets = torch.stack([exact.score(model, t, f, 20, seed) for seed in range(250)])
    mean = sets.mean(0)
    of_one = (sets - mean).abs().mean()
    assert (exact.score(model, t, f, 20, expected=True) - mean).abs().mean() < of_one / 10


MEMORY = """
import resource, torch
from clip_model import CLIP
from lib.exact import score
from tmass import TMASS, MeanPool, MeanRadius
model = TMASS(CLIP(256, 16, 8, 64, 1, 16, 514, 64, 1), frames=12).eval()
t, f = torch.randn(500, 256), torch.randn(100, 12, 256)
score(model, t[:20], f[:9])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score(model, t, f, chunk_mb=64)
score(model, t[:60], f[:20], 20_000, chunk_mb=64)
model.radius = MeanRadius()
score(model, t, f[:1], 20_000, chunk_mb=64)
model.pool = MeanPool()
score(model, t, f, chunk_mb=64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_score_memory_stays_within_its_budget():
    """500 x 100 pairs, M = 20, D = 256: (pairs, M, D) would be 1 GB, and 64 MB are allowed.

    Many samples are few pairs at once: 500 x 20,000 cosines would be 40 MB, three times.
    """
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True,
                          check=True, cwd=ROOT, timeout=120)
    assert int(done.stdout) / 1024 < 100
