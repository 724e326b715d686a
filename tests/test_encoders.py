"""Models of open_clip as encoders: the same features, and trained, saved, resumed and searched."""
import json
import os
import signal
import sys

import pytest
import torch
from videos import numbered, write_video

import eval
import search
import train
from lib import encoders
from lib.common import WeightsError
from lib.index import fingerprint
from lib.weights import load_checkpoint, load_clip, save_checkpoint

open_clip = pytest.importorskip("open_clip")
# A small model of the kind that clip_model.CLIP is not: timm's tower, text without a mask.
SMALL = dict(
    embed_dim=32,
    custom_text=True,
    vision_cfg=dict(timm_model_name="fastvit_t8", timm_model_pretrained=False, timm_pool="avg",
                    timm_proj=None, image_size=64),
    text_cfg=dict(context_length=20, vocab_size=49408, width=64, heads=2, layers=1,
                  no_causal_mask=True),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The name of SMALL in open_clip."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder)
    return "small"


def the_same(ours, theirs):
    return (ours - theirs).norm() <= 1e-4 * theirs.norm()


def compare(clip, tokenizer, theirs, name):
    pixels = torch.randint(0, 256, (2, 3, clip.image_size, clip.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(clip.config[key]).view(3, 1, 1) for key in ("mean", "std"))
    texts = ["a dog runs", "two people talk on a stage"]
    theirs.eval()
    with torch.no_grad():
        image = theirs.encode_image((pixels / 255 - mean) / std)
        text = theirs.encode_text(open_clip.get_tokenizer(name)(texts))
        assert the_same(clip.encode_image(pixels), image) and image.std() > 0
        assert the_same(clip.encode_text(tokenizer(texts)), text) and text.std() > 0


@pytest.mark.parametrize("name", ["PE-Core-T-16-384", "MobileCLIP-S1"])
def test_features_equal_open_clips(name, capsys):
    torch.manual_seed(0)
    theirs = open_clip.create_model(name)
    torch.manual_seed(0)
    model, tokenizer, config = load_checkpoint(f"open_clip:{name}")
    assert config["zero_shot"] and "random weights" in capsys.readouterr().out
    compare(model.clip, tokenizer, theirs, name)


def test_a_file_of_weights_and_a_checkpoint(small, tmp_path, capsys):
    torch.manual_seed(3)
    theirs = open_clip.create_model(small)
    torch.save(dict(state_dict={f"module.{k}": x for k, x in theirs.state_dict().items()}),
               tmp_path / "w.pt")
    name = f"open_clip:{small}={tmp_path / 'w.pt'}"
    model, tokenizer, _ = load_checkpoint(name)
    assert "random" not in capsys.readouterr().out
    compare(model.clip, tokenizer, theirs, small)
    save_checkpoint(tmp_path / "m.pt", model, tokenizer, {})
    again, tokenizer, _ = load_checkpoint(tmp_path / "m.pt")
    compare(again.clip, tokenizer, theirs, small)
    assert fingerprint(again, 10) == fingerprint(model, 10)
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="don't fit open_clip's small: .*Missing"):
        load_clip(name)


def test_the_activation_of_a_tag_is_kept(tmp_path, monkeypatch):
    """open_clip itself only warns that ViT-B-32/openai was trained with QuickGELU."""
    plain = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=1, width=64, patch_size=16),
                 text_cfg=dict(context_length=20, vocab_size=49408, width=64, heads=1, layers=1))
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    theirs = open_clip.create_model("plain", force_quick_gelu=True)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    tag = dict(file=str(tmp_path / "w.pt"), quick_gelu=True)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "plain", dict(quick=tag))
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: cfg["file"])
    model, tokenizer, _ = load_checkpoint("open_clip:plain/quick")
    compare(model.clip, tokenizer, theirs, "plain")
    save_checkpoint(tmp_path / "m.pt", model, tokenizer, {})
    again, tokenizer, _ = load_checkpoint(tmp_path / "m.pt")
    compare(again.clip, tokenizer, theirs, "plain")
    assert not isinstance(again.clip.model.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)


@pytest.mark.parametrize("name, message", [
    ("open_clip:no-such-model", "open_clip:no-such-model: "),
    ("open_clip:small/no-such-tag", "open_clip:small: "),
    ("open_clip:small=no-such-file.pt", "no-such-file.pt: no such file")])
def test_names_that_are_none(small, name, message):
    with pytest.raises(WeightsError, match=message) as error:
        load_checkpoint(name)
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_can_not_be_had(monkeypatch):
    """That of SigLIP 2 stands in the Hub of Hugging Face."""
    def offline(name):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")
    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(WeightsError, match="vocabulary could not be had: We couldn't") as error:
        encoders.OpenTokenizer("ViT-B-16-SigLIP2")
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(WeightsError, match="pip install open_clip_torch"):
        load_checkpoint("open_clip:PE-Core-T-16-384")


@pytest.fixture
def here(tmp_path, monkeypatch):
    with open(tmp_path / "my.csv", "w") as file:
        file.write("video,caption,split\n")
        for k in range(6):
            write_video(tmp_path / f"{k}.mp4", numbered(16)[k:k + 4])
            file.write(f"{k}.mp4,picture number {k},{'test' if k > 3 else 'train'}\n")
    monkeypatch.chdir(tmp_path)


def words(clip):
    return ["--data", "my.csv", "--clip", clip, "--frames", 2, "--batch", 2, "--workers", 0,
            "--device", "cpu", "--epochs", 2]


def use(run, clip):
    """Evaluate and search, with what was trained and with what it was trained from."""
    out = run("eval.py", "--ckpt", "whole.pt", "--device", "cpu")
    assert "2 texts, 2 videos" in out
    for ckpt in ("whole.pt", clip):
        out = run("search.py", "picture number 1", "--videos", ".", "--ckpt", ckpt,
                  "--device", "cpu", "--workers", 0)
        assert ".mp4" in out


@pytest.mark.slow
def test_training_with_an_encoder(small, here, monkeypatch, capsys):
    mains = {"train.py": train.main, "eval.py": eval.main, "search.py": search.main}
    clip = f"open_clip:{small}"
    norm = torch.nn.utils.clip_grad_norm_
    steps = []

    def run(script, *words, status=0):
        assert mains[script]([str(word) for word in words]) == status
        return capsys.readouterr().out

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm(*arguments)
    run("train.py", *words(clip), "--out", "whole.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stopping)
        run("train.py", *words(clip), "--out", "half.pt", status=128 + signal.SIGTERM)
    run("train.py", "--out", "half.pt", "--resume", "--device", "cpu")
    whole, half = (torch.load(f"{name}.pt", weights_only=True) for name in ("whole", "half"))
    assert whole["clip"]["open_clip"] and len(steps) == 2
    assert all(torch.equal(x, half["model"][key]) for key, x in whole["model"].items())
    use(run, clip)


@pytest.mark.slow
def test_training_with_a_real_encoder(here, run):
    def checked(script, *words):
        done = run(script, *words, timeout=280)
        assert done.returncode == 0, done.stderr
        return done.stdout
    clip = "open_clip:PE-Core-T-16-384"
    checked("train.py", *words(clip), "--out", "whole.pt")
    use(checked, clip)
