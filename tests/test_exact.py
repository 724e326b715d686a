"""The fast scorer against TMASS.score, for poolings and radii that it knows and others."""
import inspect
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_tmass import (
    METHODS,
    NAMES,
    D,
    T,
    cos,
    features,
    literal_pool,
    literal_radius,
    make,
    tiny_clip,
)
from torch import nn

import tmass
from eval import released_scores
from lib import exact
from lib.exact import expected_cosine, largest_of_normals, sample_cosines
from tmass import TMASS, LinearRadius, MeanRadius, XPool, cosine


class MaxPool(nn.Module):
    """A pooling that only this test knows; it drops, and what it returns is expanded."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, t, f):
        """t (N,D), f (V,T,D) -> v (N,V,D)."""
        return self.dropout(self.linear(f).amax(1)).expand(len(t), -1, -1)


class FirstXPool(XPool):
    """What inherits from a known pooling is not the known pooling."""

    def forward(self, t, f):
        """t (N,D), f (V,T,D) -> v (N,V,D)."""
        return super().forward(t, f[:, :1]) + 0.1 * t[:, None]


class MaxRadius(nn.Module):
    """R = exp(max_j S_j): one number for a pair."""

    def __init__(self, frames, width):
        super().__init__()

    def forward(self, S):
        """S (...,T) -> R (...,1)."""
        return S.amax(-1, keepdim=True).exp()


class SpreadRadius(MeanRadius):
    """What inherits from a known radius is not the known radius."""

    def forward(self, S):
        """S (...,T) -> R (...,1)."""
        return S.std(-1, keepdim=True)


class WideRadius(nn.Module):
    """A number for each dimension, some of them negative, and parameters of its own."""

    def __init__(self, frames, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, width))

    def forward(self, S):
        """S (...,T) -> R (...,D)."""
        return S.amin(-1, keepdim=True) * self.weight


class ConstantRadius(WideRadius):
    """It returns its own parameter, which nothing may write to."""

    def forward(self, S):
        """S (...,T) -> R (...,D)."""
        return self.weight.expand(*S.shape[:-1], -1)


class SquaredRadius(LinearRadius):
    """What inherits from a known radius is not the known radius."""

    def forward(self, S):
        """S (...,T) -> R (...,D)."""
        return super().forward(S).square()


POOLINGS = {**tmass.POOLINGS, "max": MaxPool, "first": FirstXPool}
RADII = {**tmass.RADII, "max": MaxRadius, "spread": SpreadRadius, "wide": WideRadius,
         "squared": SquaredRadius, "constant": ConstantRadius}
SETTINGS = [dict(prior_std=0.5), dict(prior="uniform", heads=4)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine, threads that share so little work mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build(monkeypatch):
    """build(pooling=..., radius=..., ...) -> a model, of classes that tmass.py lists or not."""
    monkeypatch.setattr(tmass, "POOLINGS", POOLINGS)
    monkeypatch.setattr(tmass, "RADII", RADII)
    return make


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_the_literal_score(build, pooling, radius):
    """One text and many, chunked and whole, half precision, in training mode and not."""
    for settings in SETTINGS:
        model = build(pooling=pooling, radius=radius, **settings)
        state = {name: x.clone() for name, x in model.state_dict().items()}
        t, f = features(9, 5)
        half = f.half()
        for trials in (0, 5):
            literal = model.score(t, f, trials)
            literal_half = model.score(t, half.float(), trials)
            for N in (1, T, 9):
                assert gap(exact.score(model, t[:N], f, trials), literal[:N]) < 2e-6
                assert gap(exact.score(model, t[:N], half, trials), literal_half[:N]) < 2e-6
                chunked = exact.score(model, t[:N], f, trials, chunk_mb=0.01)
                assert gap(chunked, literal[:N]) < 2e-6
        model.train()
        dropping = exact.score(model, t, f, 5)
        assert gap(dropping, literal) < 2e-6
        assert all(part.training for part in model.modules())
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_expected_is_near_the_mean_over_many_sets_of_noise(build, pooling, radius):
    """And equal for one text and many, chunked and whole, and without a seed."""
    model = build(pooling=pooling, radius=radius, prior_std=0.2)
    t, f = features(6, 4)
    M = 8
    expected = exact.score(model, t, f, M, expected=True)
    sets = torch.stack([model.score(t, f, M, seed) for seed in range(100)])
    mean = sets.mean(0)
    of_one = (sets - mean).abs().mean()
    assert (expected - mean).abs().mean() < 0.3 * of_one + 1e-6
    for chunk_mb in (0.001, 0.02, 0.3):
        assert gap(exact.score(model, t, f, M, expected=True, chunk_mb=chunk_mb), expected) < 1e-6
    assert gap(exact.score(model, t[:2], f, M, expected=True), expected[:2]) < 1e-6
    other_seed = exact.score(model, t, f, M, seed=1, expected=True)
    assert torch.equal(other_seed, expected)
    point = exact.score(model, t, f, 0)
    assert torch.equal(exact.score(model, t, f, 0, expected=True), point)


def test_the_seed_and_the_number_of_samples_count():
    model = make()
    t, f = features(9, 5)
    scores = exact.score(model, t, f)
    assert torch.equal(scores, exact.score(model, t, f, 20, 24))
    assert gap(scores, exact.score(model, t, f, 20, 25)) > 1e-3
    assert (exact.score(model, t, f, 40) >= scores - 1e-6).all()  # more samples of the same seed


def test_autocast_and_dtype_of_the_inputs_do_not_matter():
    model = make()
    t, f = features(9, 5)
    want = exact.score(model, t, f)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.score(model, t, f), want)
    assert exact.score(model, t.half(), f.half()).dtype == torch.float32
    assert not exact.score(model, t.requires_grad_(), f).requires_grad


@pytest.mark.parametrize("N, V", [(0, 3), (3, 0), (0, 0)])
def test_no_texts_or_no_videos(N, V):
    t, f = features(9, 5)
    for expected in (False, True):
        assert exact.score(make(), t[:N], f[:V], expected=expected).shape == (N, V)


def test_another_number_of_frames_is_refused():
    t = torch.randn(9, D)
    for N in (1, 9):
        with pytest.raises(ValueError, match="4 frames per video and got 7: sample 4"):
            exact.score(make(), t[:N], torch.randn(2, 7, D))


# ---- leaks ----


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("expected", [False, True])
def test_a_pair_alone_equals_its_entry_and_permuting_permutes(method, expected):
    model = make(**method)
    t, f = features(9, 6)

    def score(t, f):
        return exact.score(model, t, f, 8, expected=expected)
    sims = score(t, f)
    for i, j in ((0, 0), (3, 5), (8, 2)):
        alone = score(t[i:i + 1], f[j:j + 1])
        assert abs(float(alone) - float(sims[i, j])) < 1e-6
    g = torch.Generator().manual_seed(2)
    texts = torch.randperm(9, generator=g)
    videos = torch.randperm(6, generator=g)
    assert gap(score(t[texts], f[videos]), sims[texts][:, videos]) < 1e-6


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("expected", [False, True])
def test_chunked_equals_whole(method, expected):
    model = make(**method)
    t, f = features(33, 21)
    for N in (33, 3):
        whole = exact.score(model, t[:N], f, 6, expected=expected)
        for chunk_mb in (0.001, 0.02, 0.3):
            chunked = exact.score(model, t[:N], f, 6, expected=expected, chunk_mb=chunk_mb)
            assert gap(chunked, whole) < 1e-6


def test_score_has_no_way_to_receive_the_owner():
    inputs = list(inspect.signature(exact.score).parameters)
    assert inputs == ["model", "t", "f", "trials", "seed", "expected", "chunk_mb"]


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
        model = make(draw, shake=0.0, radius="linear", prior_std=0.1)
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


# ---- samples, and the mean of their best in closed form ----


def test_sample_cosines_equal_plain_loops():
    model = make()
    t, _ = features(4, 3)
    eps = model.noise(6)
    v = torch.randn(4, 3, D)
    for R in (torch.rand(4, 3, D), torch.rand(4, 3, 1)):
        got = sample_cosines(t[:, None], v, R, eps)
        want = [[[cos(t[i] + R[i, j] * e, v[i, j]) for e in eps] for j in range(3)]
                for i in range(4)]
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=0)


def test_expected_cosine_takes_one_radius_or_one_for_each_dimension():
    t = torch.randn(4, 1, D)
    v = torch.randn(4, 3, D)
    R = torch.rand(4, 3, 1)
    moments = (0.5, 12 ** -0.5, largest_of_normals(20))
    one = expected_cosine(t, v, R, *moments)
    torch.testing.assert_close(one, expected_cosine(t, v, R.expand(4, 3, D), *moments))


def test_largest_of_normals():
    """By integrals known in closed form, and by counting."""
    root = math.sqrt(math.pi)
    of_four = 3 / root * (1 - math.acos(1 / 3) / math.pi)
    known = {1: 0, 2: 1 / root, 3: 1.5 / root, 4: of_four, 20: 1.86747505979832}
    for M, value in known.items():
        assert abs(largest_of_normals(M) - value) < 1e-9, M
    drawn = torch.randn(200_000, 7, generator=torch.Generator().manual_seed(0)).amax(1)
    error = float(drawn.std()) / 200_000 ** 0.5
    assert abs(largest_of_normals(7) - float(drawn.mean())) < 5 * error
    values = [largest_of_normals(M) for M in (10, 10 ** 3, 10 ** 6, 10 ** 9, 10 ** 11)]
    assert values == sorted(values)
    assert values[-1] < math.sqrt(2 * math.log(10 ** 11))


@torch.no_grad()
def literal_expected(model, t, f, trials):
    """s = a + E_M b, one pair at a time, in float64."""
    mean, std = 0, model.prior_std
    if model.prior == "uniform":
        mean, std = 0.5, 12 ** -0.5
    sims = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            v = literal_pool(model, t[i], f[j]).double()
            R = literal_radius(model, torch.tensor([cos(t[i], x) for x in f[j]])).double()
            c = t[i] + mean * R
            tau2 = sum(float(x) ** 2 for x in c) + std ** 2 * sum(float(x) ** 2 for x in R)
            g = [float(R[d] * v[d] - c @ v / tau2 * R[d] * c[d]) for d in range(D)]
            b = std * math.sqrt(sum(x * x for x in g))
            best = float(c @ v) + largest_of_normals(trials) * b
            sims[i, j] = best / (float(v.norm()) * math.sqrt(tau2))
    return sims


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_expected_equals_its_formula(method):
    model = make(**method)
    t, f = features(6, 5)
    for N, trials in ((6, 20), (6, 1), (2, 20)):  # many texts, the mean alone, few texts
        got = exact.score(model, t[:N], f, trials, expected=True)
        assert gap(got, literal_expected(model, t[:N], f, trials)) < 2e-6


def wide_model(**method):
    torch.manual_seed(0)
    return TMASS(tiny_clip(512), frames=T, **method).eval()


@pytest.mark.parametrize("method", [
    dict(), dict(prior_std=0.1), dict(prior="uniform"),
    dict(radius="mean", prior="uniform", heads=4)], ids=str)
def test_expected_is_nearer_to_the_mean_of_sampling_than_sampling_is(method):
    """D = 512, M = 20, 1,000 sets of noise: it errs at most a tenth as much as one set."""
    model = wide_model(**method)
    g = torch.Generator().manual_seed(1)
    t = torch.randn(8, 512, generator=g)
    v = torch.randn(8, 1, 512, generator=g)
    # Cosines of about a half on the diagonal.
    f = v + 0.7 * torch.randn(8, T, 512, generator=g) + 0.5 * t[:, None]
    with torch.no_grad():
        R = model.radius(cosine(t[:, None, None], f))
        samples = sample_cosines(t[:, None], model.pool(t, f), R, model.noise(20_000)).double()
    sets = samples.unflatten(-1, (1000, 20)).amax(-1)
    mean = sets.mean(-1)
    of_one = (sets - mean[..., None]).abs().mean()
    closed = (exact.score(model, t, f, 20, expected=True) - mean).abs().mean()
    assert closed < of_one / 10, (closed, of_one)
    single = exact.score(model, t, f, 1, expected=True)
    assert (single - samples.mean(-1)).abs().mean() < of_one / 10  # the mean of one sample


def test_score_memory_stays_within_its_budget():
    """1,000 x 300 pairs, M = 20, D = 256: (pairs, M, D) would be 6 GB, and 64 MB are allowed.

    Many samples are few pairs at once: 1,000 x 20,000 cosines would be 80 MB, three times.
    """
    code = f"""
import resource, sys, torch
sys.path[:0] = [{str(ROOT)!r}]
from clip_model import CLIP
from lib.exact import score
from tmass import TMASS, MeanPool, MeanRadius
torch.set_num_threads(1)
model = TMASS(CLIP(256, 16, 8, 64, 1, 16, 514, 64, 1), frames=12).eval()
t, f = torch.randn(1000, 256), torch.randn(300, 12, 256)
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          timeout=120)
    assert int(done.stdout) / 1024 < 100
