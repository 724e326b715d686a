"""The released code's protocol, literally, and its checkpoints: the same tensors give the same."""
import pytest
import torch
from conftest import (
    D,
    cos,
    features,
    literal_pool,
    literal_radius,
    literal_score,
    noise_video,
    refused,
    small_model,
)

import eval
from eval import released_scores
from lib import weights
from lib.common import WeightsError
from lib.weights import load_checkpoint


@torch.no_grad()
def literal_released(model, t, f, caption_of, trials):
    """The honestly pooled video picks the sample, the one pooled by its caption scores it."""
    sims = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            honest = literal_pool(model, t[i], f[j])
            own = literal_pool(model, t[caption_of[j]], f[j])
            r = literal_radius(model, torch.stack([cos(t[i], x) for x in f[j]]))
            samples = [t[i] + r * e for e in model.noise(trials)] if trials else [t[i]]
            sims[i, j] = cos(max(samples, key=lambda sample: cos(sample, honest)), own)
    return sims


@pytest.mark.parametrize("method", [
    dict(),
    dict(prior="uniform", heads=4, frames=12),
    dict(radius="scaled", heads=2, frames=3),
    dict(radius="mean", prior="uniform"),
    dict(radius="none", frames=7),
    dict(pooling="query", frames=5),
], ids=str)
@pytest.mark.parametrize("trials", [0, 1, 8])
def test_released_scores_equal_the_literal_protocol(method, trials):
    """More texts than videos, captions of the videos in any order among them."""
    model = small_model(dropout=0.5, **method).train()  # scoring drops nothing
    t, f = features(9, 6, frames=model.frames)
    caption_of = torch.tensor([4, 0, 8, 1, 7, 2])
    leaking = released_scores(model, t, f, caption_of, trials)
    literal = literal_released(model, t, f, caption_of, trials)
    assert (leaking - literal).abs().max() < 5e-6 and model.pool.training
    honest = model.score(t, f, trials)
    own = caption_of, torch.arange(6)
    assert (leaking[own] - honest[own]).abs().max() < 5e-6
    assert (leaking - honest).abs().max() > 1e-3  # elsewhere they differ


def test_released_tmass_equals_its_tensors(released, cache):
    path, state, hf = released
    model, tokenizer, config = load_checkpoint(path)
    assert config == dict(released=True, frames=12)
    assert (model.config["radius"], model.config["prior"]) == ("linear", "uniform")
    # Each tensor of the file is in the model, unchanged.
    loaded = {x.numpy().tobytes() for x in model.state_dict().values()}
    for name, x in state.items():
        if name.startswith(("pool_frames.", "stochastic.")) and "learnable_scalar" not in name:
            assert x.numpy().tobytes() in loaded, name
    g = torch.Generator().manual_seed(1)
    t = torch.randn(3, D, generator=g)
    f = torch.randn(2, 12, D, generator=g)
    S = torch.nn.functional.cosine_similarity(t[0], f[0], dim=-1)
    branch = "stochastic.std_branch.linear_proj"
    R = torch.exp(S @ state[f"{branch}.weight"].T + state[f"{branch}.bias"])
    torch.testing.assert_close(model.radius(S), R)
    assert (model.score(t, f, 6) - literal_score(model, t, f, 6)).abs().max() < 2e-6
    ids = tokenizer(["a dog runs", "two people talk on a stage"])
    pixels = torch.randn(2, 1, 3, 32, 32, generator=g)
    with torch.no_grad():
        for ours, theirs in ((model.encode_text(ids), hf.get_text_features(ids)),
                             (model.encode_video(pixels)[:, 0],
                              hf.get_image_features(pixels[:, 0]))):
            assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_xpool_has_no_radius(released, cache, tmp_path):
    state = {key: x for key, x in released[1].items() if not key.startswith("stochastic.")}
    torch.save(dict(state_dict=state), tmp_path / "xpool.pth")
    model, _, config = load_checkpoint(tmp_path / "xpool.pth")
    assert config["released"] and model.config["radius"] == "none"
    t, f = features(2, 2, frames=12)
    assert torch.equal(model.score(t, f, 20), model.score(t, f, 0))


@pytest.mark.parametrize("name, shape, named", [
    ("pool_frames.layer_norm3.bias", None, "pool.ln3.bias"),
    ("pool_frames.extra", 1, "pool.extra"),
    ("stochastic.other", 1, "stochastic.other"),
    ("stochastic.std_branch.linear_proj.weight", (D, 5, 5), "radius.linear.weight"),
    ("clip.vision_model.encoder.layers.0.self_attn.k_proj.bias", None, "k_proj.bias"),
    # CLIP4Clip and its kin
    ("transformerClip.resblocks.0.attn.in_proj_weight", 1, "transformerClip.resblocks.0"),
    ("frame_position_embeddings.weight", (77, D), "frame_position_embeddings.weight"),
    ("global_mat_weight", 1, "global_mat_weight"),
])
def test_what_is_left_over_is_named(released, tmp_path, name, shape, named):
    for kin in (True, False):  # beside the released parts, or beside a CLIP
        state = {key: x for key, x in released[1].items() if kin or key.startswith("clip.")}
        state.pop(name, None)
        if shape:
            state[name] = torch.ones(shape)
        elif name not in released[1] or not kin and not name.startswith("clip."):
            continue
        torch.save(dict(state_dict=state), tmp_path / "odd.pth")
        with pytest.raises(WeightsError, match=named) as error:
            load_checkpoint(tmp_path / "odd.pth")
        assert "\n" not in str(error.value) and str(error.value).startswith(f"{tmp_path}/odd.pth: ")


def test_evaluating_a_released_checkpoint_shows_both_numbers(released, cache, call, tmp_path):
    rows = ["video,caption"]
    for k in range(4):
        noise_video(tmp_path / f"{k}.mp4", k)
        rows.append(f"{k}.mp4,noise number {k}")
    (tmp_path / "my.csv").write_text("\n".join(rows))
    status, out, err = call(eval, "--ckpt", released[0], "--data", tmp_path / "my.csv",
                            "--workers", 0, "--device", "cpu", "--released-protocol")
    assert status == 0, err
    assert "4 texts, 4 videos" in out and out.count("t2v") == 2 and "LEAKING" in out


def test_without_the_vocabulary_the_line_says_what_goes_where(
    released, call, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMASS_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "VOCABULARY_URL", "http://127.0.0.1:9/simple_vocab.txt.gz")
    result = call(eval, "--ckpt", released[0], "--data", "msrvtt", "--device", "cpu")
    refused(result, "simple_vocab.txt.gz: could not be downloaded", f"at {tmp_path}")
