"""The released code's protocol, literally, and its checkpoints: the same tensors give the same."""

import csv
import hashlib
import shutil

import pytest
import torch
from conftest import cos, features, literal_pool, literal_radius, literal_score
from conftest import small_model as make
from videos import numbered, write_video

import clip_model
from eval import released_scores
from lib import weights
from lib.common import WeightsError
from lib.weights import load_checkpoint

D, T = 64, 12


@torch.no_grad()
def literal_released(model, t, f, caption_of, trials):
    """The honestly pooled video picks the sample, the one pooled by its caption scores it."""
    out = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            honest, own = (
                literal_pool(model, t[i], f[j]),
                literal_pool(model, t[caption_of[j]], f[j]),
            )
            r = literal_radius(model, torch.tensor([cos(t[i], x) for x in f[j]]))
            samples = [t[i] + r * e for e in model.noise(trials)] if trials else [t[i]]
            out[i, j] = cos(max(samples, key=lambda ts: cos(ts, honest)), own)
    return out


@pytest.mark.parametrize(
    "method",
    [
        dict(zip(("prior", "radius", "heads", "frames", "pooling"), values))
        for values in (
            ("normal", "linear", 1, 4, "xpool"),
            ("uniform", "linear", 4, 12, "xpool"),
            ("normal", "scaled", 2, 3, "xpool"),
            ("uniform", "mean", 1, 4, "xpool"),
            ("normal", "none", 1, 7, "xpool"),
            ("normal", "linear", 1, 5, "query"),
        )
    ],
    ids=str,
)
@pytest.mark.parametrize("trials", [0, 1, 8])
def test_released_scores_equal_the_literal_protocol(method, trials):
    """More texts than videos, captions of the videos in any order among them."""
    model = make(dropout=0.5, **method).train()  # scoring drops nothing
    t, f = features(9, 6, frames=method["frames"])
    caption_of = torch.tensor([4, 0, 8, 1, 7, 2])
    got, want = (
        released_scores(model, t, f, caption_of, trials),
        literal_released(model, t, f, caption_of, trials),
    )
    assert (got - want).abs().max() < 5e-6
    model.train()
    training = released_scores(model, t, f, caption_of, trials)
    assert torch.equal(training, got) and model.pool.training  # nothing was dropped
    honest = model.score(t, f, trials)
    own = got[caption_of, torch.arange(6)]
    assert (own - honest[caption_of, torch.arange(6)]).abs().max() < 5e-6
    assert (got - honest).abs().max() > 1e-3  # elsewhere they differ


@pytest.fixture(scope="module")
def cache(shared, tmp_path_factory):
    """CLIP's vocabulary where a download would have put it."""
    folder = tmp_path_factory.mktemp("cache")
    shutil.copy(shared / "clip" / "bpe_simple_vocab_16e6.txt.gz", folder)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as the released code writes it: HF's CLIP, pool_frames, stochastic; random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=1,
        projection_dim=D,
    )
    hf = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=D,
            text_config=dict(size, vocab_size=49408, eos_token_id=49407),
            vision_config=dict(size, image_size=32, patch_size=16),
        )
    )
    state = {f"clip.{k}": x for k, x in hf.state_dict().items()}
    for name in (
        "cross_attn.q_proj",
        "cross_attn.k_proj",
        "cross_attn.v_proj",
        "cross_attn.out_proj",
        "linear_proj",
    ):
        state[f"pool_frames.{name}.weight"] = torch.eye(D) + 0.1 * torch.randn(D, D)
        state[f"pool_frames.{name}.bias"] = 0.1 * torch.randn(D)
    for name in ("layer_norm1", "layer_norm2", "layer_norm3"):
        state[f"pool_frames.{name}.weight"] = 1 + 0.1 * torch.randn(D)
        state[f"pool_frames.{name}.bias"] = 0.1 * torch.randn(D)
    state["stochastic.std_branch.linear_proj.weight"] = 0.3 * torch.randn(D, T)
    state["stochastic.std_branch.linear_proj.bias"] = 0.1 * torch.randn(D)
    state["stochastic.std_branch.learnable_scalar"] = torch.tensor(
        [float("nan")]
    )  # uninitialised there
    path = tmp_path_factory.mktemp("released") / "model_best.pth"
    torch.save(dict(epoch=5, state_dict=state, optimizer={"param_groups": []}), path)
    return path, state, hf


def test_released_tmass_equals_its_tensors(released, cache, monkeypatch):
    monkeypatch.setenv("TMASS_CACHE", str(cache))
    path, state, hf = released
    model, tokenizer, config = load_checkpoint(path)
    assert (
        config["released"]
        and model.config["radius"] == "linear"
        and model.config["prior"] == "uniform"
    )
    assert model.frames == T
    assert tokenizer.vocab_size == 49408
    get = lambda name: state[f"pool_frames.{name}"]  # noqa: E731
    for ours, theirs in (
        ("q", "cross_attn.q_proj"),
        ("out", "cross_attn.out_proj"),
        ("linear", "linear_proj"),
        ("ln2", "layer_norm2"),
    ):
        assert torch.equal(getattr(model.pool, ours).weight, get(theirs + ".weight"))
        assert torch.equal(getattr(model.pool, ours).bias, get(theirs + ".bias"))
    g = torch.Generator().manual_seed(1)
    t, f = torch.randn(3, D, generator=g), torch.randn(2, T, D, generator=g)
    S = torch.nn.functional.cosine_similarity(t[0], f[0], dim=-1)
    W, b = (state[f"stochastic.std_branch.linear_proj.{x}"] for x in ("weight", "bias"))
    literal = torch.exp(S @ W.T + b)
    torch.testing.assert_close(literal_radius(model, S), literal)
    torch.testing.assert_close(model.radius(S), literal)
    torch.testing.assert_close(
        model.pool(t, f)[0, 1], literal_pool(model, t[0], f[1]), atol=2e-5, rtol=1e-4
    )
    assert (model.score(t, f, 6) - literal_score(model, t, f, 6)).abs().max() < 2e-6
    ids = tokenizer(["a dog runs", "two people talk on a stage"])
    with torch.no_grad():
        theirs = hf.eval().get_text_features(ids)
        pixels = torch.randn(2, 3, 32, 32, generator=g)
        torch.testing.assert_close(model.encode_text(ids), theirs, atol=1e-5, rtol=1e-4)
        f = model.encode_video(pixels[:, None])[:, 0]
        torch.testing.assert_close(f, hf.get_image_features(pixels), atol=1e-5, rtol=1e-4)


def test_xpool_checkpoint_has_no_radius(released, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("TMASS_CACHE", str(cache))
    _, state, _ = released
    torch.save(
        dict(state_dict={k: x for k, x in state.items() if not k.startswith("stochastic.")}),
        tmp_path / "xpool.pth",
    )
    model, _, _ = load_checkpoint(tmp_path / "xpool.pth")
    assert model.config["radius"] == "none"
    t, f = torch.randn(2, D), torch.randn(2, T, D)
    assert torch.equal(model.score(t, f, 20), model.score(t, f, 0))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: s.pop("pool_frames.layer_norm3.bias"), "pool.ln3.bias"),
        (lambda s: s.update({"pool_frames.extra": torch.ones(1)}), "pool.extra"),
        (lambda s: s.update({"stochastic.other": torch.ones(1)}), "stochastic.other"),
        (
            lambda s: s.update({"stochastic.std_branch.linear_proj.weight": torch.ones(5)}),
            "odd.pth: not a checkpoint of the released code: .*pool.k.bias",
        ),
    ],
)
def test_anything_else_names_the_keys(released, cache, monkeypatch, tmp_path, change, named):
    monkeypatch.setenv("TMASS_CACHE", str(cache))
    state = dict(released[1])
    change(state)
    torch.save(dict(state_dict=state), tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=named):
        load_checkpoint(tmp_path / "odd.pth")


def archive(clip, path):
    """Write a CLIP as OpenAI's files are: TorchScript, half precision, sizes. -> its SHA-256"""
    holder = torch.nn.Module()
    for name, x in (
        *clip.state_dict().items(),
        ("input_resolution", torch.tensor(32)),
        ("context_length", torch.tensor(77)),
        ("vocab_size", torch.tensor(49408)),
    ):
        *modules, last = name.split(".")
        at = holder
        for module in modules:
            if module not in dict(at.named_children()):
                at.add_module(module, torch.nn.Module())
            at = at.get_submodule(module)
        at.register_buffer(last, x.half() if x.is_floating_point() else x)
    with pytest.warns():  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(holder), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["HF", "safetensors", "open_clip", "OpenAI", "name"])
def test_any_clip_can_be_used_as_it_is(released, cache, monkeypatch, tmp_path, form):
    """Not trained further: query pooling, no radius, CLIP's vocabulary; the file is read once."""
    monkeypatch.setenv("TMASS_CACHE", str(cache))
    names = {"safetensors": "clip.safetensors", "open_clip": "openai.bin"}
    hf, path = released[2], tmp_path / names.get(form, "clip.pt")
    clip = clip_model.CLIP.from_state_dict(weights.to_openai_names(hf.state_dict()))
    if form == "HF":
        torch.save(hf.state_dict(), path)
    elif form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(hf.state_dict(), path)
    elif form == "open_clip":
        torch.save({"state_dict": {"module." + k: x for k, x in clip.state_dict().items()}}, path)
    elif form == "OpenAI":
        archive(clip, path)
    else:
        sha256 = archive(clip, cache / "ViT-B-16.pt")  # as if downloaded before
        monkeypatch.setitem(weights.MODELS, "ViT-B/16", ("ViT-B-16.pt", sha256))
    reads, read = [], weights.read_weights
    monkeypatch.setattr(weights, "read_weights", lambda path: reads.append(path) or read(path))
    model, tokenizer, config = load_checkpoint("ViT-B/16" if form == "name" else path)
    assert len(reads) == 1 and config == dict(zero_shot=True, frames=12) and not model.training
    assert tokenizer.encode("a diagram") == [320, 22697] and tokenizer.context_length == 77
    assert (model.config["pooling"], model.config["radius"], model.config["support_weight"]) == (
        "query",
        "none",
        0,
    )
    assert model.clip.config["quick_gelu"]
    ids, pixels = tokenizer(["a dog runs", "two people talk on a stage"]), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        t, f = model.encode_text(ids), model.encode_video(pixels[:, None].expand(-1, T, -1, -1, -1))
        off = 1e-5 if form not in ("OpenAI", "name") else 2e-2  # half precision
        assert (t - clip.encode_text(ids)).abs().max() < off * t.abs().max()
        assert (f[:, 0] - clip.encode_image(pixels)).abs().max() < off * f.abs().max()
    t, f = features(5, 3, frames=T)
    assert (model.score(t, f) - literal_score(model, t, f, 0)).abs().max() < 2e-6


def test_what_is_neither_a_file_nor_a_name_and_a_clip_of_other_words(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("TMASS_CACHE", str(cache))
    with pytest.raises(
        WeightsError,
        match="ViT-B/31: no such file, and none of the names ViT-B/32, ViT-B/16, ViT-L/14",
    ):
        load_checkpoint("ViT-B/31")
    torch.save(make().clip.state_dict(), tmp_path / "small.pt")
    with pytest.raises(
        WeightsError, match="small.pt: a CLIP of 514 tokens, and CLIP's vocabulary has 49408"
    ):
        load_checkpoint(tmp_path / "small.pt")


def test_evaluating_a_released_checkpoint_shows_both_numbers(released, cache, run, tmp_path):
    with open(tmp_path / "my.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("video", "caption"))
        for i in range(4):
            write_video(tmp_path / f"{i}.mp4", numbered(16)[i * 4 : i * 4 + 4])
            rows.writerow((f"{i}.mp4", f"picture number {i}"))
    done = run(
        "eval.py",
        "--ckpt",
        released[0],
        "--data",
        tmp_path / "my.csv",
        "--released-protocol",
        env={"TMASS_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    assert (
        "4 texts, 4 videos" in done.stdout
        and done.stdout.count("t2v") == 2
        and "LEAKING" in done.stdout
    )


def test_without_the_vocabulary_the_message_says_what_goes_where(released, tmp_path, monkeypatch):
    monkeypatch.setenv("TMASS_CACHE", str(tmp_path))
    # nothing listens there
    monkeypatch.setattr(
        weights, "VOCABULARY_URL", "http://127.0.0.1:9/bpe_simple_vocab_16e6.txt.gz"
    )
    with pytest.raises(WeightsError, match="bpe_simple_vocab_16e6.txt.gz") as error:
        load_checkpoint(released[0])
    assert str(tmp_path) in str(error.value)
