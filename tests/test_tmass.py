"""The method piece by piece, against plain loops and by hand."""
import math

import pytest
import torch
from conftest import (
    D,
    T,
    cos,
    features,
    literal_pool,
    literal_radius,
    literal_score,
    small_clip,
    small_model,
)

import tmass
from tmass import (
    TMASS,
    LinearRadius,
    MeanRadius,
    ScaledRadius,
    stochastic_text,
    support_text,
    symmetric_cross_entropy,
)

METHODS = [
    dict(),
    dict(heads=4),
    dict(prior="uniform"),
    dict(radius="none"),
    dict(radius="mean", prior_std=0.3),
    dict(radius="scaled", heads=2),
    dict(pooling="mean"),
    dict(pooling="query"),
    dict(pooling="query", radius="scaled", prior="uniform"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_pooling_and_score_equal_plain_loops(method):
    """Also in training mode, in which nothing is dropped while a model scores."""
    model = small_model(**method)
    t, f = features(5, 3)
    with torch.no_grad():
        v = model.pool(t, f)
        for i in range(5):
            for j in range(3):
                want = literal_pool(model, t[i], f[j])
                torch.testing.assert_close(v[i, j], want, atol=2e-5, rtol=1e-4)
    for trials in (0, 1, 5):
        literal = literal_score(model, t, f, trials)
        assert (model.score(t, f, trials) - literal).abs().max() < 2e-6
    assert (model.train().score(t, f, 5) - literal).abs().max() < 2e-6
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("support_video", tmass.SUPPORTS)
@pytest.mark.parametrize("method", [dict(heads=4), *({"radius": x} for x in tmass.RADII)], ids=str)
def test_losses_and_gradients_equal_plain_loops(method, support_video):
    model = small_model(support_video=support_video, support_weight=0.6, ce_weight=0.3, **method)
    model.clip.logit_scale.data.fill_(1.6)
    B = 3
    t, f = features(B, B)
    moved = {name: p for name, p in model.named_parameters() if not name.startswith("clip.")}
    moved.update(t=t.requires_grad_(), f=f.requires_grad_(), scale=model.clip.logit_scale)
    v = [[literal_pool(model, t[i], f[j]) for j in range(B)] for i in range(B)]
    torch.manual_seed(5)
    eps = torch.randn(B, D)
    z = dict(ce=[], stochastic=[], support=[])
    for i in range(B):
        R = literal_radius(model, torch.stack([cos(t[i], x) for x in f[i]]))
        v_sup = v[i][i]
        if support_video == "batch":
            v_sup = sum(v[n][i] for n in range(B)) / B
        z["ce"].append(t[i])
        z["stochastic"].append(t[i] + R * eps[i])
        z["support"].append(t[i] + (v_sup - t[i]) / (v_sup - t[i]).norm() * R)
    want = {}
    for name, x in z.items():
        sims = torch.stack([cos(x[i], v[i][j]) for i in range(B) for j in range(B)])
        want[name] = symmetric_cross_entropy(sims.view(B, B), model.clip.logit_scale.exp())
    want["loss"] = want["stochastic"] + 0.6 * want["support"] + 0.3 * want["ce"]

    torch.manual_seed(5)
    got = model.losses(t, f)
    assert got.keys() == want.keys()
    gradients = []
    for losses in (got, want):
        found = torch.autograd.grad(losses["loss"], [*moved.values()], allow_unused=True)
        gradients.append(dict(zip(moved, found)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_radii_start_alike():
    S = torch.rand(2, T)
    want = torch.cat([S.exp(), torch.ones(2, D - T)], -1)
    torch.testing.assert_close(LinearRadius(T, D)(S), want)
    torch.testing.assert_close(ScaledRadius(T, D)(S), MeanRadius(T, D)(S))


def test_stochastic_and_support_text_by_hand():
    t = torch.tensor([3.0, 0.0])
    v = torch.tensor([3.0, 2.0])
    t_s = stochastic_text(t, torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5]))
    assert t_s.tolist() == [2, 1]
    assert support_text(t, v, torch.tensor([9.0, 0.25])).tolist() == [3, 0.25]
    assert support_text(t, t, torch.ones(2)).isfinite().all()  # v = t has no direction


def test_symmetric_cross_entropy_by_hand():
    sims = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.5, 0.4], [0.0, 0.6, 0.7]])
    e = (7 * sims).exp()
    rows = sum(-math.log(e[i, i] / e[i].sum()) for i in range(3)) / 3
    columns = sum(-math.log(e[i, i] / e[:, i].sum()) for i in range(3)) / 3
    assert float(symmetric_cross_entropy(sims, 7)) == pytest.approx((rows + columns) / 2)


IDS = torch.tensor([[512, 5, 9, 513], [512, 7, 3, 513], [512, 8, 8, 513]])


def pixels(B=3):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (B, T, 3, 16, 16), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("method", METHODS[:1] + METHODS[-1:], ids=str)
def test_a_step_is_drawn_from_the_seed_and_reaches_every_parameter(method):
    model = small_model(**method).train()
    losses = []
    gathered = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = model(IDS, pixels(), gather=lambda x: gathered.append(tuple(x.shape)) or x)
        losses.append(out["loss"].item())
    assert losses[0] == losses[1] != losses[2]
    assert gathered[:2] == [(3, D), (3, T, D)]
    out["loss"].backward()
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    # A bias of k moves all logits of a text alike, and softmax does not see it.
    assert not set(still) - {"pool.k.bias"}


# ---- a batch larger than memory ----


def gradient(model, chunk, amp=False, B=6):
    """The gradient of a training step, as one vector of float64."""
    model.chunk = chunk
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = model(IDS.repeat(2, 1)[:B], pixels(B))["loss"]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_change_no_gradient(chunk):
    model = small_model().train()
    if chunk == 1000:  # what is drawn for it is drawn again, for the backward pass
        model.clip.visual.ln_post = torch.nn.Dropout(0.5)
    plain = gradient(model, 0)
    assert apart(gradient(model, chunk), plain) < 1e-5
    rounded = gradient(model, 0, amp=True)
    # However many chunks there are: their gradients are added up in float32.
    assert apart(gradient(model, chunk, amp=True), rounded) < 0.1 * apart(rounded, plain)


def test_only_one_chunk_is_computed_at_a_time():
    model = small_model().train()
    rows = []
    model.clip.visual.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    gradient(model, 5, B=4)
    assert rows[:4] == [5, 5, 5, 1]            # 4 videos of 4 frames
    assert sorted(rows[4:]) == [1, 5, 5, 5]    # again, for the backward pass
    with torch.no_grad():
        model.encode_video(pixels(4))
    assert rows[8:] == [16]  # it needs no memory for a backward pass


# ---- dropout, noise, settings ----


def test_dropout_is_inside_the_residual():
    t, f = features(3, 3)
    all_dropped = small_model(dropout=1.0).train().pool(t, f)  # v = LN3(x)
    without = small_model()
    without.pool.linear.weight.data.zero_()
    without.pool.linear.bias.data.zero_()
    torch.testing.assert_close(all_dropped, without.pool(t, f))


@pytest.mark.parametrize("prior, std, mean, spread", [
    ("normal", 0.5, 0, 0.5), ("uniform", 1.0, 0.5, 12 ** -0.5)])
def test_prior(prior, std, mean, spread):
    model = small_model(prior=prior, prior_std=std)
    state = torch.get_rng_state()
    eps = model.noise(2000, 3)
    assert torch.equal(torch.get_rng_state(), state)  # it has a generator of its own
    assert eps.shape == (2000, D)
    assert float(eps.mean()) == pytest.approx(mean, abs=0.01)
    assert float(eps.std()) == pytest.approx(spread, rel=0.02)
    assert torch.equal(eps, model.noise(2000, 3))


def test_settings_are_a_plain_dict_and_names_of_parameters_stay():
    model = small_model(heads=2, radius="scaled", prior_std=0.5)
    assert model.config == dict(
        frames=T, pooling="xpool", heads=2, dropout=0.3, radius="scaled", prior="normal",
        prior_std=0.5, support_weight=0.8, ce_weight=0.0, support_video="matched")
    layers = ("ln1", "ln2", "ln3", "q", "k", "v", "out", "linear")
    names = {f"pool.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    head = {name for name in model.state_dict() if not name.startswith("clip.")}
    assert head == names | {"radius.theta"}
    assert {"radius.linear.weight", "radius.linear.bias"} < {*small_model().state_dict()}


@pytest.mark.parametrize("wrong", [
    dict(radius="big"), dict(pooling="max"), dict(prior="cauchy"), dict(support_video="all"),
    dict(heads=7), dict(heads=0)], ids=str)
def test_unknown_settings_are_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        TMASS(small_clip(), **wrong)
