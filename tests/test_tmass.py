"""The method piece by piece: against plain loops, and numbers of the code before this one."""
import inspect
import json
import math
from pathlib import Path

import pytest
import torch

import tmass
from clip_model import CLIP
from tmass import (
    TMASS,
    LinearRadius,
    MeanRadius,
    ScaledRadius,
    stochastic_text,
    support_text,
    symmetric_cross_entropy,
)

D = 64
T = 4


def tiny_clip(width=D):
    return CLIP(embed_dim=width, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
                context_length=16, vocab_size=514, text_width=64, text_layers=1)


def make(seed=0, shake=0.1, **method):
    """A small model whose head has left its identity start, so that no term hides behind a zero."""
    torch.manual_seed(seed)
    settings = {"frames": T, "dropout": 0.0, **method}
    model = TMASS(tiny_clip(), **settings).eval()
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += shake * torch.randn_like(p)
    return model


def features(N, V, seed=1, frames=T):
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(N, D, generator=g)
    v = torch.randn(V, 1, D, generator=g)
    return t, v + 0.7 * torch.randn(V, frames, D, generator=g)


# ---- the paper once more, in plain loops ----


def layer_norm(x, ln):
    return (x - x.mean()) / (x.var(unbiased=False) + ln.eps).sqrt() * ln.weight + ln.bias


def cos(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@torch.no_grad()
def literal_pool(model, t, f):
    """psi(f | t) of one text t (D) and one video f (T,D)."""
    if model.config["pooling"] == "mean":
        return sum(f) / len(f)
    if model.config["pooling"] == "query":
        e = [math.exp(cos(t, x) / 0.1) for x in f]
        return sum(w / sum(e) * x / x.norm() for w, x in zip(e, f))
    p = model.pool
    H = model.config["heads"]
    d = len(t) // H
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
    """R of one pair. S (T) -> (D)."""
    kind = model.config["radius"]
    width = model.clip.embed_dim
    if kind == "none":
        return torch.zeros(width)
    if kind == "linear":
        return torch.exp(model.radius.linear.weight @ S + model.radius.linear.bias)
    theta = float(model.radius.theta) if kind == "scaled" else 1.0
    return torch.full((width,), math.exp(theta * float(S.mean())))


@torch.no_grad()
def literal_score(model, t, f, trials, seed=24):
    """max_m cos(t_i + R_ij ε_m, v_ij), one pair and one sample at a time."""
    eps = model.noise(trials, seed) if trials else torch.zeros(1, t.shape[1])
    sims = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            v = literal_pool(model, t[i], f[j])
            R = literal_radius(model, torch.tensor([cos(t[i], x) for x in f[j]]))
            sims[i, j] = max(cos(t[i] + R * e, v) for e in eps)
    return sims


METHODS = [
    dict(),
    dict(heads=4),
    dict(prior="uniform"),
    dict(radius="none"),
    dict(radius="mean"),
    dict(radius="scaled"),
    dict(radius="scaled", heads=2, prior_std=0.3),
    dict(pooling="mean"),
    dict(pooling="mean", radius="mean"),
    dict(pooling="mean", radius="none"),
    dict(pooling="query"),
    dict(pooling="query", radius="none"),
    dict(pooling="query", radius="scaled", prior="uniform"),
]
NAMES = [",".join(f"{k}={v}" for k, v in m.items()) or "default" for m in METHODS]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("trials", [0, 1, 5])
def test_score_equals_plain_loops(method, trials):
    model = make(**method)
    t, f = features(7, 5)
    sims = model.score(t, f, trials)
    assert sims.shape == (7, 5)
    assert sims.dtype == torch.float32
    assert (sims - literal_score(model, t, f, trials)).abs().max() < 2e-6


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_pool_equals_plain_loops(method):
    model = make(**method)
    t, f = features(4, 3)
    v = model.pool(t, f)
    assert v.shape == (4, 3, D)
    for i in range(4):
        for j in range(3):
            want = literal_pool(model, t[i], f[j])
            torch.testing.assert_close(v[i, j], want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", tmass.RADII)
def test_radius_equals_plain_loops(kind):
    model = make(radius=kind)
    S = torch.rand(3, 2, T) * 2 - 1
    R = model.radius(S)
    assert R.shape == ((3, 2, D) if kind == "linear" else (3, 2, 1))
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(R[i, j].expand(D), literal_radius(model, S[i, j]))


@pytest.mark.parametrize("support_video", tmass.SUPPORTS)
@pytest.mark.parametrize("radius", tmass.RADII)
def test_losses_equal_plain_loops(radius, support_video):
    model = make(radius=radius, support_video=support_video, support_weight=0.6, ce_weight=0.3)
    B = 4
    t, f = features(B, B)
    v = [[literal_pool(model, t[i], f[j]) for j in range(B)] for i in range(B)]
    torch.manual_seed(5)
    eps = torch.randn(B, D)
    z = dict(ce=[], stochastic=[], support=[])
    for i in range(B):
        R = literal_radius(model, torch.tensor([cos(t[i], x) for x in f[i]]))
        v_sup = v[i][i]
        if support_video == "batch":
            v_sup = sum(v[n][i] for n in range(B)) / B
        z["ce"].append(t[i])
        z["stochastic"].append(t[i] + R * eps[i])
        z["support"].append(t[i] + (v_sup - t[i]) / (v_sup - t[i]).norm() * R)
    scale = float(model.clip.logit_scale.detach().exp())
    want = {}
    for name, x in z.items():
        sims = [[cos(x[i], v[i][j]) for j in range(B)] for i in range(B)]
        want[name] = float(symmetric_cross_entropy(torch.tensor(sims), scale))
    torch.manual_seed(5)
    got = model.losses(t, f)
    for name in want:
        assert got[name].item() == pytest.approx(want[name], abs=1e-4)
    total = want["stochastic"] + 0.6 * want["support"] + 0.3 * want["ce"]
    assert got["loss"].item() == pytest.approx(total, abs=2e-4)


# ---- numbers of the code before this one ----


RECORDED = json.loads((Path(__file__).parent / "test_tmass.json").read_text())


def wave(*shape, phase):
    """Numbers that look random and are the same in every version of PyTorch."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * count.square() + phase).float().view(shape)


def recorded_model(config):
    """The model that a record was made with: D = 8, T = 3, parameters moved by `wave`."""
    model = TMASS(tiny_clip(8), **{"frames": 3, "dropout": 0.0, **config}).train()
    model.clip.logit_scale.data.fill_(1.6)
    head = {name: p for name, p in model.named_parameters() if not name.startswith("clip.")}
    for k, p in enumerate(head.values()):
        p.data += 0.1 * wave(*p.shape, phase=k)
    return model, head


@pytest.mark.parametrize("record", RECORDED, ids=[str(x["config"]) for x in RECORDED])
def test_losses_gradients_and_scores_are_those_of_the_first_version(record):
    """What commit d4fcab6 computed, before tmass.py was rewritten to be read."""
    model, head = recorded_model(record["config"])
    t = wave(4, 8, phase=0.5).requires_grad_()
    f = (wave(4, 1, 8, phase=1.5) + 0.7 * wave(4, 3, 8, phase=2.5)).requires_grad_()
    torch.manual_seed(5)
    losses = model.losses(t, f)
    assert {k: x.item() for k, x in losses.items()} == pytest.approx(record["losses"], rel=1e-5)

    losses["loss"].backward()
    moved = dict(head, t=t, f=f, logit_scale=model.clip.logit_scale)
    norms = {name: p.grad.norm().item() for name, p in moved.items()}
    # A bias of k moves all logits of a text alike, and softmax does not see it.
    assert norms.pop("pool.k.bias", 0) < 1e-6
    assert norms == pytest.approx(record["gradients"], rel=1e-5, abs=1e-7)

    sims = model.score(wave(6, 8, phase=3.5), f[:2].detach(), 4)
    torch.testing.assert_close(sims, torch.tensor(record["sampled"]), atol=1e-6, rtol=0)


# ---- the pieces ----


def test_linear_radius_starts_as_identity_and_scaled_as_mean():
    S = torch.rand(2, T)
    want = torch.cat([S.exp(), torch.ones(2, D - T)], -1)
    torch.testing.assert_close(LinearRadius(T, D)(S), want)
    torch.testing.assert_close(ScaledRadius(T, D)(S), MeanRadius(T, D)(S))


def test_radius_of_another_T_is_refused():
    with pytest.raises(ValueError, match="4 frames per video and got 7: sample 4"):
        make().radius(torch.rand(2, 7))
    t, _ = features(2, 2)
    for N in (1, 2):
        with pytest.raises(ValueError, match="4 frames per video and got 7"):
            make().score(t[:N], torch.randn(2, 7, D))


def test_stochastic_and_support_text():
    t = torch.tensor([3.0, 0.0])
    v = torch.tensor([3.0, 2.0])
    t_s = stochastic_text(t, torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5]))
    assert torch.equal(t_s, torch.tensor([2.0, 1.0]))
    t_sup = support_text(t, v, torch.tensor([9.0, 0.25]))
    torch.testing.assert_close(t_sup, torch.tensor([3.0, 0.25]))  # direction (0, 1)
    # v = t has no direction, and must not give nan.
    assert torch.isfinite(support_text(t, t, torch.ones(2))).all()


def test_symmetric_cross_entropy_by_hand():
    sims = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.5, 0.4], [0.0, 0.6, 0.7]])
    scale = 7.0
    e = [[math.exp(scale * float(x)) for x in row] for row in sims]
    rows = sum(-math.log(e[i][i] / sum(e[i])) for i in range(3)) / 3
    columns = sum(-math.log(e[i][i] / sum(e[k][i] for k in range(3))) for i in range(3)) / 3
    got = float(symmetric_cross_entropy(sims, scale))
    assert got == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_radius_none_is_xpool():
    """Every loss and the score are those of the point text; prior and trials play no part."""
    model = make(radius="none", support_weight=0.0)
    t, f = features(6, 6)
    out = model.losses(t, f)
    assert torch.equal(out["loss"], out["ce"])
    assert torch.equal(out["stochastic"], out["ce"])
    assert torch.equal(model.score(t, f, 20), model.score(t, f, 0))
    want = torch.cosine_similarity(t[:, None], model.pool(t, f), dim=-1)
    torch.testing.assert_close(model.score(t, f, 20), want, atol=1e-6, rtol=0)


IDS = torch.tensor([[512, 5, 9, 513], [512, 7, 3, 513], [512, 8, 8, 513]])


def pixels(B=3):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (B, T, 3, 16, 16), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_gradient_reaches_every_parameter(method):
    model = make(**method).train()
    torch.manual_seed(1)
    out = model(IDS, pixels())
    assert set(out) == {"loss", "ce", "stochastic", "support"}
    assert all(x.shape == () for x in out.values())
    out["loss"].backward()
    for name, p in model.named_parameters():
        dead = p.grad is None or not p.grad.abs().sum() > 0
        # A bias of k moves all logits of a text alike, and softmax does not see it.
        assert not dead or name == "pool.k.bias", name


def test_forward_is_repeatable_from_the_seed_and_gathers():
    model = make(dropout=0.4).train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(IDS, pixels())["loss"].item())
    assert losses[0] == losses[1] != losses[2]
    shapes = []
    torch.manual_seed(1)
    again = model(IDS, pixels(), gather=lambda x: shapes.append(tuple(x.shape)) or x)
    assert again["loss"].item() == losses[0]
    assert shapes == [(3, D), (3, T, D)]


# ---- a batch larger than memory ----


def gradient(model, chunk, amp=False, B=16):
    """The gradient of a training step, as one vector of float64."""
    model.chunk = chunk
    model.zero_grad()
    ids = IDS.repeat(B, 1)[:B]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = model(ids, pixels(B))["loss"]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_chunks_change_no_gradient(chunk):
    model = make(dropout=0.3).train()
    plain = gradient(model, 0)
    assert apart(gradient(model, chunk), plain) < 1e-6
    rounded = gradient(model, 0, amp=True)
    rounding = apart(rounded, plain)
    # However many chunks there are: their gradients are added up in float32.
    assert apart(gradient(model, chunk, amp=True), rounded) < 0.1 * rounding


def test_only_one_chunk_is_computed_at_a_time():
    model = make().train()
    rows = dict(visual=[], transformer=[])
    for name, sizes in rows.items():
        tower = getattr(model.clip, name)
        tower.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
    gradient(model, 5, B=4)
    assert rows["visual"][:4] == [5, 5, 5, 1]            # 4 videos of 4 frames
    assert sorted(rows["visual"][4:]) == [1, 5, 5, 5]    # again, for the backward pass
    assert rows["transformer"] == [4, 4]
    with torch.no_grad():
        model.encode_video(pixels(4))
    assert rows["visual"][8:] == [16]  # it needs no memory for a backward pass


def test_a_chunk_is_computed_again_with_the_same_dropout():
    model = make().train()
    model.chunk = 5
    model.clip.visual.ln_post = torch.nn.Dropout(0.5)
    images = pixels().flatten(0, 1)
    gradients = []
    for chunked in (True, False):
        model.zero_grad()
        torch.manual_seed(1)
        if chunked:
            f = model.encode_video(pixels()).flatten(0, 1)
        else:
            f = torch.cat([model.clip.encode_image(part) for part in images.split(5)])
        f.square().sum().backward()
        gradients.append(model.clip.visual.proj.grad.clone())
        gradients.append(torch.rand(3))  # what is drawn next is the same, too
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])


@pytest.mark.parametrize("chunk", [0, 5])
def test_no_videos_and_no_texts(chunk):
    """As in a process whose share of a batch has no readable video."""
    model = make().train()
    model.chunk = chunk
    t = model.encode_text(IDS[:0])
    f = model.encode_video(pixels()[:0])
    assert t.shape == (0, D)
    assert f.shape == (0, T, D)
    (t.sum() + f.sum()).backward()
    towers = [p for name, p in model.clip.named_parameters() if name != "logit_scale"]
    assert all(p.grad is not None and not p.grad.any() for p in towers)


# ---- dropout and noise ----


def test_dropout_is_inside_the_residual_and_off_in_eval():
    model = make(dropout=0.9)
    t, f = features(3, 3)
    assert torch.equal(model.pool(t, f), model.pool(t, f))
    model.train()
    assert not torch.equal(model.pool(t, f), model.pool(t, f))
    all_dropped = make(dropout=1.0).train().pool(t, f)  # v = LN3(x)
    without = make()
    without.pool.linear.weight.data.zero_()
    without.pool.linear.bias.data.zero_()
    torch.testing.assert_close(all_dropped, without.pool(t, f))


def test_scoring_drops_nothing_in_training_mode():
    model = make(dropout=0.5).train()
    t, f = features(7, 5)
    assert torch.equal(model.score(t, f), make(dropout=0.5).score(t, f))
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("prior, std, mean, spread", [
    ("normal", 0.5, 0, 0.5), ("uniform", 1.0, 0.5, 12 ** -0.5)])
def test_prior(prior, std, mean, spread):
    model = make(prior=prior, prior_std=std)
    state = torch.get_rng_state()
    eps = model.noise(2000, 3)
    assert torch.equal(torch.get_rng_state(), state)  # it has a generator of its own
    assert eps.shape == (2000, D)
    assert float(eps.mean()) == pytest.approx(mean, abs=0.01)
    assert float(eps.std()) == pytest.approx(spread, rel=0.02)
    assert torch.equal(eps, model.noise(2000, 3))
    assert not torch.equal(eps, model.noise(2000, 4))


def test_score_has_no_way_to_receive_the_owner():
    """Its inputs are two sides' features and numbers; training leaves nothing that it reads."""
    assert list(inspect.signature(TMASS.score).parameters) == ["self", "t", "f", "trials", "seed"]
    model = make()
    before = set(vars(model)) | set(model.state_dict())
    t, f = features(5, 5)
    first = model.score(t, f, 4)
    model.losses(t, f)  # sees matched pairs
    assert set(vars(model)) | set(model.state_dict()) == before
    assert torch.equal(model.score(t, f, 4), first)


def test_settings_are_a_plain_dict_and_names_of_parameters_stay():
    model = make(heads=2, radius="scaled", prior_std=0.5)
    assert model.config == dict(
        frames=T, pooling="xpool", heads=2, dropout=0.0, radius="scaled", prior="normal",
        prior_std=0.5, support_weight=0.8, ce_weight=0.0, support_video="matched")
    names = ("ln1", "ln2", "ln3", "q", "k", "v", "out", "linear")
    layers = [f"pool.{layer}.{part}" for layer in names for part in ("weight", "bias")]
    head = [name for name, _ in model.named_parameters() if not name.startswith("clip.")]
    assert head == [*layers, "radius.theta"]
    head = [name for name in make(pooling="query").state_dict() if not name.startswith("clip.")]
    assert head == ["radius.linear.weight", "radius.linear.bias"]


@pytest.mark.parametrize("wrong", [
    dict(radius="big"), dict(pooling="max"), dict(prior="cauchy"), dict(support_video="all"),
    dict(heads=7), dict(heads=0)], ids=str)
def test_unknown_settings_are_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        TMASS(tiny_clip(), **wrong)
