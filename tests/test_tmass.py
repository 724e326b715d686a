"""The method piece by piece against literal loops, the scorer against the literal formula, and its leak invariants."""
import inspect
import math
import os
import subprocess
import sys

import pytest
import torch

import tmass
from clip_model import CLIP
from eval import released_scores
from lib.common import WeightsError
from tmass import (
    TMASS,
    largest_of_normals,
    sample_cosines,
    stochastic_text,
    support_text,
    symmetric_cross_entropy,
)

D, T = 64, 4


def tiny_clip():
    return CLIP(embed_dim=D, image_size=16, patch_size=8, vision_width=64, vision_layers=1, context_length=16,
                vocab_size=514, text_width=64, text_layers=1)


def make(seed=0, shake=0.1, **method):
    """A small model whose head is moved away from its identity start, so that no term hides behind a zero."""
    torch.manual_seed(seed)
    model = TMASS(tiny_clip(), **{"frames": T, "dropout": 0.0, **method}).eval()
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += shake * torch.randn_like(p)
    return model


def features(N, V, seed=1, frames=T):
    g = torch.Generator().manual_seed(seed)
    t, v = torch.randn(N, D, generator=g), torch.randn(V, 1, D, generator=g)
    return t, v + 0.7 * torch.randn(V, frames, D, generator=g)


def layer_norm(x, ln):
    return (x - x.mean()) / (x.var(unbiased=False) + ln.eps).sqrt() * ln.weight + ln.bias


@torch.no_grad()
def literal_pool(model, t, f):
    """psi(f | t) for one text t (D) and one video f (T,D), written from the paper."""
    if model.config["pooling"] == "mean":
        return sum(f) / len(f)
    if model.config["pooling"] == "query":
        e = [math.exp(cos(t, x) / 0.1) for x in f]
        return sum(w / sum(e) * x / x.norm() for w, x in zip(e, f))
    p, H = model.pool, model.config["heads"]
    d = D // H
    q = p.q.weight @ layer_norm(t, p.ln1) + p.q.bias
    k = [p.k.weight @ layer_norm(x, p.ln1) + p.k.bias for x in f]
    u = [p.v.weight @ layer_norm(x, p.ln1) + p.v.bias for x in f]
    heads = []
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        e = [math.exp(float(q[part] @ x[part]) / math.sqrt(d)) for x in k]
        heads.append(sum(w / sum(e) * x[part] for w, x in zip(e, u)))
    o = p.out.weight @ torch.cat(heads) + p.out.bias
    x = layer_norm(o, p.ln2)
    return layer_norm(x + p.linear.weight @ x + p.linear.bias, p.ln3)


@torch.no_grad()
def literal_radius(model, S):
    kind = model.config["radius"]
    if kind == "none":
        return torch.zeros(D)
    if kind == "linear":
        return torch.exp(model.radius.linear.weight @ S + model.radius.linear.bias)
    return torch.full((D,), math.exp(float(S.mean()) * (float(model.radius.theta) if kind == "scaled" else 1.0)))


def cos(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@torch.no_grad()
def literal_score(model, t, f, trials, seed=24):
    """max_m cos(t_i + R_ij ε_m, v_ij), one pair and one sample at a time."""
    eps = model.noise(trials, seed) if trials else torch.zeros(1, D)
    out = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            v = literal_pool(model, t[i], f[j])
            r = literal_radius(model, torch.tensor([cos(t[i], x) for x in f[j]]))
            out[i, j] = max(cos(t[i] + r * e, v) for e in eps)
    return out


METHODS = [dict(), dict(heads=4), dict(pooling="mean"), dict(radius="none"), dict(radius="mean"),
           dict(radius="scaled"), dict(prior="uniform"), dict(radius="scaled", heads=2, prior_std=0.3),
           dict(pooling="mean", radius="mean"), dict(pooling="mean", radius="none"), dict(pooling="query"),
           dict(pooling="query", radius="none"), dict(pooling="query", radius="scaled", prior="uniform")]
NAMES = [",".join(f"{k}={v}" for k, v in m.items()) or "default" for m in METHODS]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("trials", [0, 1, 5])
def test_score_equals_literal_formula(method, trials):
    model = make(**method)
    t, f = features(7, 5)
    sims = model.score(t, f, trials)
    assert sims.shape == (7, 5) and sims.dtype == torch.float32
    assert (sims - literal_score(model, t, f, trials)).abs().max() < 2e-6


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("trials", [0, 1, 5])
def test_few_texts_score_as_many_do(method, trials):
    """Up to T texts go another way, and whatever the precision of f; 7 texts take the span's."""
    model = make(**method)
    t, f = features(7, 5)
    literal, half = literal_score(model, t, f, trials), f.half()
    for N in (1, 3, T):
        few = model.score(t[:N], f, trials)
        assert (few - literal[:N]).abs().max() < 2e-6 and (few - model.score(t, f, trials)[:N]).abs().max() < 2e-6
        assert (model.score(t[:N], half, trials) - model.score(t, half, trials)[:N]).abs().max() < 2e-6
    assert torch.equal(model.score(t, half, trials), model.score(t, half.float(), trials))


def test_scoring_drops_nothing_in_training_mode():
    model = make(dropout=0.5).train()
    t, f = features(7, 5)
    assert torch.equal(model.score(t, f), make(dropout=0.5).score(t, f))
    assert torch.equal(model.score(t[:2], f), make(dropout=0.5).score(t[:2], f))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_pool_equals_literal(method):
    model = make(**method)
    t, f = features(4, 3)
    v = model.pool(t, f)
    assert v.shape == (4, 3, D)
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(v[i, j], literal_pool(model, t[i], f[j]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", tmass.RADII)
def test_radius_equals_literal(kind):
    model = make(radius=kind)
    S = torch.rand(3, 2, T) * 2 - 1
    r = model.radius(S)
    assert r.shape == (3, 2, D)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(r[i, j], literal_radius(model, S[i, j]))


def test_linear_radius_starts_as_identity_and_scaled_as_mean():
    S = torch.rand(2, T)
    fresh = tmass.Radius("linear", T, D)(S)
    torch.testing.assert_close(fresh, torch.cat([S.exp(), torch.ones(2, D - T)], -1))
    torch.testing.assert_close(tmass.Radius("scaled", T, D)(S), tmass.Radius("mean", T, D)(S))


def test_radius_of_another_T_is_refused():
    with pytest.raises(WeightsError, match="4 frames per video and got 7"):
        make().radius(torch.rand(2, 7))


def test_stochastic_and_support_text():
    t, v = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 2.0])
    t_s = stochastic_text(t, torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5]))
    assert torch.equal(t_s, torch.tensor([2.0, 1.0]))
    t_sup = support_text(t, v, torch.tensor([9.0, 0.25]))
    torch.testing.assert_close(t_sup, torch.tensor([3.0, 0.25]))  # direction (0, 1)
    assert torch.isfinite(support_text(t, t, torch.ones(2))).all()  # v = t has no direction, and must not give nan


def test_symmetric_cross_entropy_by_hand():
    sims, scale, n = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.5, 0.4], [0.0, 0.6, 0.7]]), 7.0, 3
    e = [[math.exp(scale * float(x)) for x in row] for row in sims]
    rows = sum(-math.log(e[i][i] / sum(e[i])) for i in range(n)) / n
    columns = sum(-math.log(e[i][i] / sum(e[k][i] for k in range(n))) for i in range(n)) / n
    assert float(symmetric_cross_entropy(sims, scale)) == pytest.approx((rows + columns) / 2, rel=1e-5)


@pytest.mark.parametrize("support_video", tmass.SUPPORTS)
@pytest.mark.parametrize("radius", tmass.RADII)
def test_losses_equal_literal(radius, support_video):
    model = make(radius=radius, support_video=support_video, support_weight=0.6, ce_weight=0.3)
    N = 4
    t, f = features(N, N)
    v = [[literal_pool(model, t[i], f[j]) for j in range(N)] for i in range(N)]
    eps = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
    z = dict(ce=[], stochastic=[], support=[])
    for i in range(N):
        r = literal_radius(model, torch.tensor([cos(t[i], x) for x in f[i]]))
        look = v[i][i] if support_video == "matched" else sum(v[n][i] for n in range(N)) / N
        z["ce"].append(t[i])
        z["stochastic"].append(t[i] + r * eps[i])
        z["support"].append(t[i] + (look - t[i]) / (look - t[i]).norm() * r)
    scale = float(model.clip.logit_scale.detach().exp())
    want = {}
    for name, x in z.items():
        sims = [[cos(x[i], v[i][j]) for j in range(N)] for i in range(N)]
        want[name] = float(symmetric_cross_entropy(torch.tensor(sims), scale))
    got = model.losses(t, f, torch.Generator().manual_seed(5))
    for name in want:
        assert float(got[name]) == pytest.approx(want[name], abs=1e-4)
    assert float(got["loss"]) == pytest.approx(want["stochastic"] + 0.6 * want["support"] + 0.3 * want["ce"], abs=2e-4)


def test_radius_none_is_xpool():
    """Every loss term and the score are those of the point text; training and scoring ignore prior and trials."""
    model = make(radius="none", support_weight=0.0)
    t, f = features(6, 6)
    out = model.losses(t, f)
    assert torch.equal(out["loss"], out["ce"]) and torch.equal(out["stochastic"], out["ce"])
    assert torch.equal(model.score(t, f, 20), model.score(t, f, 0))
    torch.testing.assert_close(model.score(t, f, 20), torch.cosine_similarity(t[:, None], model.pool(t, f), dim=-1),
                               atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_gradient_reaches_every_parameter(method):
    model = make(**method).train()
    ids = torch.tensor([[512, 5, 9, 513], [512, 7, 3, 513], [512, 8, 8, 513]])
    video = torch.randint(0, 256, (3, T, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = model(ids, video, torch.Generator().manual_seed(1))
    assert set(out) == {"loss", "ce", "stochastic", "support"} and all(x.shape == () for x in out.values())
    out["loss"].backward()
    for name, p in model.named_parameters():
        dead = p.grad is None or not p.grad.abs().sum() > 0
        # a key bias moves the logits of all frames alike, and softmax does not see it
        assert not dead or name == "pool.k.bias", name


def test_forward_is_repeatable_from_its_generator():
    model = make(dropout=0.4).train()
    ids = torch.tensor([[512, 5, 513], [512, 7, 513]])
    video = torch.randint(0, 256, (2, T, 3, 16, 16), dtype=torch.uint8)
    a, b, c = (float(model(ids, video, torch.Generator().manual_seed(s))["loss"]) for s in (1, 1, 2))
    assert a == b != c


def test_dropout_keeps_the_mean_and_is_off_in_eval():
    x = torch.ones(200, 200)
    y = tmass.drop(x, 0.25, torch.Generator().manual_seed(0))
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)] and y.mean() == pytest.approx(1, abs=0.02)
    model = make(dropout=0.9)
    t, f = features(3, 3)
    assert torch.equal(model.pool(t, f), model.pool(t, f))


@pytest.mark.parametrize("prior, std, mean, spread", [("normal", 0.5, 0, 0.5), ("uniform", 1.0, 0.5, 12 ** -0.5)])
def test_prior(prior, std, mean, spread):
    eps = make(prior=prior, prior_std=std).noise(2000, 3)
    assert eps.shape == (2000, D)
    assert float(eps.mean()) == pytest.approx(mean, abs=0.01) and float(eps.std()) == pytest.approx(spread, rel=0.02)
    assert torch.equal(eps, make(prior=prior, prior_std=std).noise(2000, 3))
    assert not torch.equal(eps, make(prior=prior).noise(2000, 4))


# ---- leak invariants ----

@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("expected", [False, True])
def test_a_pair_alone_equals_its_entry_and_permuting_permutes(method, expected):
    model = make(**method)
    t, f = features(9, 6)
    sims = model.score(t, f, 8, expected=expected)
    for i, j in ((0, 0), (3, 5), (8, 2)):
        assert abs(float(model.score(t[i:i + 1], f[j:j + 1], 8, expected=expected)) - float(sims[i, j])) < 1e-6
    g = torch.Generator().manual_seed(2)
    texts, videos = torch.randperm(9, generator=g), torch.randperm(6, generator=g)
    assert (model.score(t[texts], f[videos], 8, expected=expected) - sims[texts][:, videos]).abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("expected", [False, True])
def test_chunked_equals_whole(method, expected):
    model = make(**method)
    t, f = features(33, 21)
    for rows in (slice(33), slice(3)):
        whole = model.score(t[rows], f, 6, expected=expected)
        for chunk_mb in (0.001, 0.02, 0.3):
            assert (model.score(t[rows], f, 6, expected=expected, chunk_mb=chunk_mb) - whole).abs().max() < 1e-6


def test_score_has_no_way_to_receive_the_owner():
    """Its inputs are the two sides' features and numbers; it reads nothing that training could have left behind."""
    inputs = list(inspect.signature(TMASS.score).parameters)
    assert inputs == ["self", "t", "f", "trials", "seed", "expected", "chunk_mb"]
    model = make()
    before = set(vars(model)) | set(model.state_dict())
    t, f = features(5, 5)
    first = model.score(t, f, 4)
    model.losses(t, f, torch.Generator().manual_seed(0))  # sees matched pairs
    assert set(vars(model)) | set(model.state_dict()) == before and torch.equal(model.score(t, f, 4), first)


def test_null_honest_is_at_chance_and_released_protocol_is_not():
    """Unpaired random features, sharpened attention: whoever finds 'the right' video has seen the ground truth.

    Under the null hypothesis a text's rank is uniform on 1..V, so the mean of N ranks has mean (V+1)/2 and standard
    deviation at most sqrt((V²-1)/12) (ranks of texts that share a gallery are correlated, hence one seed of the
    features per draw and the mean over 5 draws). Honest must lie within 4 standard errors over draws; the released
    protocol must be better than chance by more than 6.
    """
    N, honest, leaking = 60, [], []
    for draw in range(5):
        model = make(draw, shake=0.0, radius="linear", prior_std=0.1)
        model.pool.q.weight.data *= 6  # a trained model attends sharply; an untrained one takes nearly the mean
        t, f = features(N, N, seed=100 + draw)
        f = torch.randn(N, T, D, generator=torch.Generator().manual_seed(draw))  # diverse frames, unrelated to t
        released = released_scores(model, t, f, torch.arange(N), 10)
        for sims, ranks in ((model.score(t, f, 10), honest), (released, leaking)):
            ranks.append(float((sims > sims.diagonal()[:, None]).sum(1).float().mean() + 1))
    chance, error = (N + 1) / 2, math.sqrt((N * N - 1) / 12 / N / 5)
    assert abs(sum(honest) / 5 - chance) < 4 * error, honest
    assert sum(leaking) / 5 < chance - 6 * error, leaking


def test_sample_cosines_equal_literal():
    model = make()
    t, f = features(4, 3)
    eps, r, v = model.noise(6), torch.rand(4, 3, D), torch.randn(4, 3, D)
    got = sample_cosines(t[:, None], v, r, eps)
    want = torch.tensor([[[cos(t[i] + r[i, j] * e, v[i, j]) for e in eps] for j in range(3)] for i in range(4)])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


# ---- without sampling: the mean of best-of-M in closed form ----

def test_largest_of_normals():
    """By integrals known in closed form, and by counting."""
    root = math.sqrt(math.pi)
    of_four = 3 / root * (1 - math.acos(1 / 3) / math.pi)
    known = {1: 0, 2: 1 / root, 3: 1.5 / root, 4: of_four, 20: 1.86747505979832}
    for M, value in known.items():
        assert abs(largest_of_normals(M) - value) < 1e-9, M
    drawn = torch.randn(200_000, 7, generator=torch.Generator().manual_seed(0)).amax(1)
    assert abs(largest_of_normals(7) - float(drawn.mean())) < 5 * float(drawn.std()) / 200_000 ** 0.5
    values = [largest_of_normals(M) for M in (10, 10 ** 3, 10 ** 6, 10 ** 9, 10 ** 11)]
    assert values == sorted(values) and values[-1] < math.sqrt(2 * math.log(10 ** 11))


@torch.no_grad()
def literal_expected(model, t, f, trials):
    """s = a + E_M b, one pair at a time, in float64."""
    mean, std = (0.5, 12 ** -0.5) if model.prior == "uniform" else (0, model.prior_std)
    out = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            v = literal_pool(model, t[i], f[j]).double()
            r = literal_radius(model, torch.tensor([cos(t[i], x) for x in f[j]])).double()
            c = t[i] + mean * r
            tau2 = sum(float(x) ** 2 for x in c) + std ** 2 * sum(float(x) ** 2 for x in r)
            g = [float(r[d] * v[d] - c @ v / tau2 * r[d] * c[d]) for d in range(D)]
            b = std * math.sqrt(sum(x * x for x in g))
            out[i, j] = (float(c @ v) + largest_of_normals(trials) * b) / (float(v.norm()) * math.sqrt(tau2))
    return out


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_expected_equals_its_formula(method):
    model = make(**method)
    t, f = features(6, 5)
    for N, trials in ((6, 20), (6, 1), (2, 20)):  # many texts, the mean alone, few texts
        got = model.score(t[:N], f, trials, expected=True)
        assert (got - literal_expected(model, t[:N], f, trials)).abs().max() < 2e-6
    assert torch.equal(model.score(t, f, 0, expected=True), model.score(t, f, 0))
    assert torch.equal(model.score(t, f, 9, seed=1, expected=True), model.score(t, f, 9, seed=2, expected=True))


@pytest.mark.parametrize("method", [dict(), dict(prior_std=0.1), dict(prior="uniform"),
                                    dict(radius="mean", prior="uniform", heads=4)], ids=str)
def test_expected_is_nearer_to_the_mean_of_sampling_than_sampling_is(method):
    """D = 512, M = 20, 1,000 independent sets of noise: the closed form errs at most a tenth as much as one set."""
    torch.manual_seed(0)
    clip = CLIP(embed_dim=512, image_size=16, patch_size=8, vision_width=64, vision_layers=1, context_length=16,
                vocab_size=514, text_width=64, text_layers=1)
    model = TMASS(clip, frames=T, **method).eval()
    g = torch.Generator().manual_seed(1)
    t, v = torch.randn(8, 512, generator=g), torch.randn(8, 1, 512, generator=g)
    f = v + 0.7 * torch.randn(8, T, 512, generator=g) + 0.5 * t[:, None]  # cosines of about a half on the diagonal
    with torch.no_grad():
        r = model.radius(tmass.cosine(t[:, None, None], f))
        samples = sample_cosines(t[:, None], model.pool(t, f), r, model.noise(20_000)).double()  # (8,8,20000)
    sets = samples.unflatten(-1, (1000, 20)).amax(-1)
    mean = sets.mean(-1)
    of_one, closed = (sets - mean[..., None]).abs().mean(), (model.score(t, f, 20, expected=True) - mean).abs().mean()
    assert closed < of_one / 10, (closed, of_one)
    single = model.score(t, f, 1, expected=True)
    assert (single - samples.mean(-1)).abs().mean() < of_one / 10  # the mean of one sample


def test_score_memory_stays_within_its_budget():
    """1,000 x 300 pairs, M = 20, D = 256: (pairs, M, D) would take 6 GB; a process may grow by little over 64 MB."""
    code = f"""
import resource, sys, torch
sys.path[:0] = [{os.getcwd()!r}, {os.path.dirname(tmass.__file__)!r}]
from clip_model import CLIP
from tmass import TMASS
torch.set_num_threads(1)
model = TMASS(CLIP(256, 16, 8, 64, 1, 16, 514, 64, 1), frames=12).eval()
t, f = torch.randn(1000, 256), torch.randn(300, 12, 256)
model.score(t[:9], f[:9])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.score(t, f, chunk_mb=64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) / 1024 < 100


def test_unknown_choices_are_refused():
    for wrong in (dict(radius="big"), dict(pooling="max"), dict(prior="cauchy"), dict(support_video="all"),
                  dict(heads=7), dict(heads=0)):
        with pytest.raises(WeightsError, match=str(next(iter(wrong.values())))):
            TMASS(tiny_clip(), **wrong)
