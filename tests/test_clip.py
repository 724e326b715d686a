"""Tokenizer, towers, and weights of other projects, against third-party code where installed."""

import csv
import gzip
import hashlib
import http.server
import json
import os
import re
import threading

import pytest
import torch

import clip_model
from clip_model import CLIP, Tokenizer
from lib import weights
from lib.common import DataError, WeightsError
from lib.weights import load_clip, read_weights, save_checkpoint, to_openai_names
from tmass import TMASS

TEXTS = [
    "a red circle on black",
    "",
    "  TWO   dogs,\tplaying!  ",
    "it's 2024: we're the BEST",
    "!!!...???",
    "x" * 300,
    "word " * 500,
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u00df \u0130 1/2 \u00bd \u2167 x\u00b2",
    "fish &amp;amp; chips &lt;b&gt; &quot;hi&quot; &#233;",
    "<i>fish</i> &amp;amp; chips",
    "\u00e2\u20ac\u0153broken\u00e2\u20ac\ufffd quotes\u00e2\u20ac\u2122s",
    "\u200bzero\u00a0width\u3000wide\x1cspace",
    "\ud800 lone surrogate",
    "a <|startoftext|> b <|endoftext|> c",
]
TINY = dict(
    embed_dim=24,
    image_size=16,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    context_length=77,
    vocab_size=600,
    text_width=128,
    text_layers=2,
)


@pytest.fixture(scope="module")
def clip_tokenizer(shared):
    return Tokenizer.from_file(shared / "clip" / "bpe_simple_vocab_16e6.txt.gz")


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    clip = CLIP(**(TINY | changes))
    with torch.no_grad():  # norms and biases start at 1 and 0, where mistakes hide
        for name, p in clip.named_parameters():
            if p.ndim == 1 and p.numel() > 1:
                p.add_(torch.randn_like(p) * 0.1)
    return clip


# ---- tokenizer ----
@pytest.mark.parametrize("merges", [0, 60])
def test_every_text_comes_back(merges):
    tok = (
        Tokenizer.learn(["a red circle left of a blue square"] * 3, merges)
        if merges
        else Tokenizer()
    )
    for text in ["a red circle", "hello world", "na\u00efve \u65e5\u672c \U0001f600 zebra", ""]:
        assert tok.decode(tok.encode(text)) == text
        assert tok.decode(tok([text, "a longer text that makes the first one padded"])[0]) == text
    for text in TEXTS:
        once = tok.decode(tok.encode(text))
        assert tok.decode(tok.encode(once)) == once
    assert max(tok.encode(" ".join(TEXTS))) < tok.vocab_size == 514 + len(tok.merges)


def test_batches_are_as_long_as_their_longest_text_and_cut_texts_keep_their_end():
    tok = Tokenizer(context_length=10)
    ids = tok(["ab", "abcd", ""])
    assert ids.tolist() == [
        [512, *tok.encode("ab"), 513, 0, 0],
        [512, *tok.encode("abcd"), 513],
        [512, 513, 0, 0, 0, 0],
    ]
    assert ids.argmax(-1).tolist() == [3, 5, 1]
    ids = tok(["a", "abcdefghijklmnop"])
    assert ids.shape == (2, 10) and ids[1, -1] == tok.end and tok.decode(ids[1]) == "abcdefgh"
    assert tok("one text").shape == (1, 9) and tok([]).shape == (0, 2)


def test_learnt_merges_shorten_the_texts_and_rebuild_the_tokenizer():
    texts = ["the red circle", "the red square", "a red circle", "the blue circle"]
    tok = Tokenizer.learn(texts, 8)
    assert len(tok.merges) == 8 and tok.merges == Tokenizer.learn(texts, 8).merges
    assert len(tok.encode("the red circle")) < len(Tokenizer().encode("the red circle"))
    assert Tokenizer(tok.merges).encode(texts[0]) == tok.encode(texts[0])
    assert Tokenizer.learn(["abc abc de"], 99).merges == (
        "b c</w>",
        "a bc</w>",
    )  # until no pair occurs twice
    assert Tokenizer.learn(["abc abc de"], 99).encode("abc") == [513]


def test_clip_ids_of_known_captions(clip_tokenizer):
    assert clip_tokenizer.vocab_size == 49408 and len(clip_tokenizer.merges) == 48894
    assert clip_tokenizer(["a photo of a cat", "a diagram"]).tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407],
        [49406, 320, 22697, 49407, 0, 0, 0],
    ]
    assert Tokenizer(clip_tokenizer.merges).encode("Hello World!") == clip_tokenizer.encode(
        "hello   world!"
    )


def captions(shared):
    videos = json.loads((shared / "msvd" / "captions_msvd.json").read_text()).values()
    texts = [caption for video in videos for caption in video[:4]]
    for name in ("didemo_test_label", "didemo_val_label"):
        with open(shared / "didemo" / f"{name}.csv", newline="", encoding="utf-8") as file:
            texts += [row["text"] for row in csv.DictReader(file)]
    with open(shared / "msrvtt" / "MSRVTT_JSFUSION_test.csv", newline="", encoding="utf-8") as file:
        texts += [row["sentence"] for row in csv.DictReader(file)]
    return texts


def test_ids_equal_open_clips_on_real_captions(shared, clip_tokenizer):
    theirs = pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()
    texts = sorted(set(captions(shared))) + TEXTS
    assert len(texts) > 5000
    for start in range(0, len(texts), 512):
        batch = texts[start : start + 512]
        ids = torch.zeros(len(batch), 77, dtype=torch.long)
        ours = clip_tokenizer(batch)
        ids[:, : ours.shape[1]] = ours
        expected = theirs(batch)
        wrong = [text for text, a, b in zip(batch, ids, expected) if not torch.equal(a, b)]
        assert not wrong, (len(wrong), wrong[:3])


def test_vocabulary_files_that_are_none(tmp_path, shared):
    text, short, cut = tmp_path / "text.gz", tmp_path / "short.gz", tmp_path / "cut.gz"
    text.write_text("i n\n")
    short.write_bytes(gzip.compress(b"header\ni n\n"))
    cut.write_bytes((shared / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()[:100_000])
    for path in (text, cut, tmp_path, tmp_path / "missing.gz"):
        with pytest.raises((OSError, EOFError)):
            Tokenizer.from_file(path)
    with pytest.raises(ValueError, match=f"{short}: 2 merges, CLIP's vocabulary has 48894"):
        Tokenizer.from_file(short)
    for merge in ("in", "a b c", ""):
        with pytest.raises(ValueError, match="no merge"):
            Tokenizer([merge])


# ---- towers ----
def test_shapes_config_and_state_dict():
    clip = tiny(quick_gelu=False)
    images, ids = torch.randn(3, 3, 16, 16), Tokenizer()(["a", "red circle"])
    assert clip.encode_image(images).shape == (3, 24) and clip.encode_text(ids).shape == (2, 24)
    assert clip.config == TINY | {"quick_gelu": False}
    assert CLIP(**clip.config).state_dict().keys() == clip.state_dict().keys()
    again = CLIP.from_state_dict(clip.half().state_dict(), quick_gelu=False)
    assert again.config == clip.config and all(
        p.dtype == torch.float32 and p.requires_grad for p in again.parameters()
    )
    clip.float()
    assert torch.equal(again.encode_image(images), clip.encode_image(images))
    assert torch.equal(again.encode_text(ids), clip.encode_text(ids))
    with torch.no_grad():
        CLIP.from_state_dict(clip.state_dict()).logit_scale.zero_()
    assert clip.logit_scale != 0  # a copy, not a view of the given weights


def test_uint8_images_are_scaled_and_normalised():
    clip, x = (
        tiny(),
        torch.randint(
            0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ),
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip_model.MEAN, clip_model.STD))
    torch.testing.assert_close(clip.encode_image(x), clip.encode_image((x / 255 - mean) / std))


def test_a_text_cut_to_the_longest_equals_padding_to_77():
    clip, tok = tiny(), Tokenizer()
    ids = tok(["a", "red circle", "a longer text"])
    padded = torch.zeros(3, 77, dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    a, b = clip.encode_text(ids), clip.encode_text(padded)
    assert ((a - b).norm(dim=-1) / b.norm(dim=-1)).max() <= 1e-6


def test_gradient_reaches_every_parameter():
    clip = tiny(vision_layers=4)
    text = clip.encode_text(Tokenizer()(["a red circle", "b"]))
    image = clip.encode_image(torch.randn(2, 3, 16, 16))
    (clip.logit_scale * (text * image).tanh().sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in clip.parameters())


def test_towers_that_cannot_be(tmp_path):
    sd = tiny().state_dict()
    faults = {
        "vision transformer: it has no 'visual.positional_embedding'; found a": {
            "a": torch.zeros(1)
        },
        "Unexpected key.*extra.weight": sd | {"extra.weight": torch.zeros(1)},
        "Missing key.*ln_final.bias": {k: v for k, v in sd.items() if k != "ln_final.bias"},
        "size mismatch for visual.ln_pre.bias": sd | {"visual.ln_pre.bias": torch.zeros(3)},
        "not a CLIP.*unpack": sd | {"text_projection": torch.zeros(3)},
    }
    for message, bad in faults.items():
        with pytest.raises((LookupError, ValueError, RuntimeError)):
            CLIP.from_state_dict(bad)
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(WeightsError, match=message) as caught:
            load_clip(tmp_path / "bad.pt")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path / 'bad.pt'}: ")
    with pytest.raises(ValueError, match="multiple of 64"):
        tiny(text_width=200)


def test_autocast_and_empty_batches():
    clip, ids, images = tiny(), Tokenizer()(["a red circle", "b"]), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = clip.encode_image(images), clip.encode_text(ids)
    torch.testing.assert_close(image.float(), clip.encode_image(images), atol=0.05, rtol=0.05)
    torch.testing.assert_close(text.float(), clip.encode_text(ids), atol=0.05, rtol=0.05)
    (image.sum() + text.sum()).backward()
    assert clip.encode_image(images[:0]).shape == clip.encode_text(Tokenizer()([])).shape == (0, 24)


@torch.no_grad()
def test_patches_are_the_convolution():
    """They go through a product; 20 pixels hold two patches of 8, as for a convolution."""
    torch.manual_seed(0)
    tower = clip_model.VisionTransformer(24, 20, 8, 64, 1, 2, clip_model.QuickGELU, 256)
    images = torch.randn(5, 3, 20, 20)
    seen = []
    tower.ln_pre.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    y = tower(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tower(images).float() - y).norm() < 0.02 * y.norm()
    conv = tower.conv1(images).flatten(2).mT  # (N,L-1,W)
    for x, precision in zip(seen, (1e-6, 0.01)):
        patches = x[:, 1:] - tower.positional_embedding[1:]
        assert (patches - conv).norm() < precision * conv.norm()
        assert torch.equal(
            x[:, 0], (tower.class_embedding + tower.positional_embedding[0]).expand(5, -1)
        )


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_the_last_block_computes_the_token_that_is_read_alone(causal):
    block = tiny().transformer.resblocks[-1]
    x = torch.randn(3, 7, block.ln_1.weight.numel())
    read = torch.tensor([0, 3, 6])
    whole = block(x, causal)
    one = block(x, causal, read)
    assert one.shape == (3, 1, x.shape[2]) and one.numel() < whole.numel()
    torch.testing.assert_close(one[:, 0], whole[range(3), read])


# From commit d4fcab6 in float64, with parameters, pixels and ids that are formulas.
IMAGE_FEATURES = [
    [-0.09803528, 0.26346828, 0.50105859, 0.50299322],
    [-0.04222534, 0.38856505, 0.63660722, 0.58524307],
]
TEXT_FEATURES = [
    [0.08075085, 0.07582639, 0.03523960, -0.02192093],
    [-0.00817181, -0.01280227, -0.01141162, -0.00465391],
]


@torch.no_grad()
def test_features_are_those_that_were_written_down():
    clip = CLIP(**(TINY | dict(embed_dim=4))).double()
    for i, (name, p) in enumerate(clip.named_parameters()):
        wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i)
        base = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        p.copy_((base + 0.2 * wave).view_as(p))
    pixels = (torch.arange(2 * 3 * 16 * 16) * 37 % 251).byte().view(2, 3, 16, 16)
    ids = torch.tensor([[598, 5, 17, 599, 0], [598, 300, 42, 7, 599]])
    for ours, written in (
        (clip.encode_image(pixels), IMAGE_FEATURES),
        (clip.encode_text(ids), TEXT_FEATURES),
    ):
        written = torch.tensor(written, dtype=torch.float64)
        assert (ours - written).norm() <= 1e-6 * written.norm()


# ---- weights of other projects ----
B32 = dict(
    embed_dim=512,
    image_size=224,
    patch_size=32,
    vision_width=768,
    vision_layers=12,
    context_length=77,
    vocab_size=49408,
    text_width=512,
    text_layers=12,
)
SIZES = [pytest.param(TINY, id="small"), pytest.param(B32, id="ViT-B/32", marks=pytest.mark.slow)]


def batch(size, n=3):
    """Random normalised images and ids of n texts, whose end is the largest id, padded with 0."""
    g, end = torch.Generator().manual_seed(1), size["vocab_size"] - 1
    ids = torch.randint(1, end - 1, (n, 77), generator=g)
    for i, length in enumerate([5, 40, 77][:n]):
        ids[i, 0], ids[i, length - 1 :] = end - 1, 0
        ids[i, length - 1] = end
    return torch.randn(n, 3, size["image_size"], size["image_size"], generator=g), ids


def shaken(model):
    """Random biases and norms: they start at 0 and 1, where a mistake in names does not show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def assert_same_features(clip, size, image, text):
    images, ids = batch(size)
    with torch.no_grad():
        for ours, theirs in ((clip.encode_image(images), image), (clip.encode_text(ids), text)):
            assert (
                theirs.std() > 1e-3
                and ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max() <= 1e-5
            )


def hf_clip(size, act="quick_gelu"):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)

    def tower(name, **config):
        width, layers = size[f"{name}_width"], size[f"{name}_layers"]
        return config | dict(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            hidden_act=act,
        )

    text = tower("text", vocab_size=size["vocab_size"], eos_token_id=size["vocab_size"] - 1)
    vision = tower("vision", image_size=size["image_size"], patch_size=size["patch_size"])
    return shaken(
        transformers.CLIPModel(
            transformers.CLIPConfig(text, vision, projection_dim=size["embed_dim"])
        )
    )


@pytest.mark.parametrize("size", SIZES)
def test_hf_weights_give_hf_features(size, tmp_path, capsys):
    hf = hf_clip(size)
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    clip = load_clip(tmp_path / "pytorch_model.bin")
    assert (
        clip.config == size | {"quick_gelu": True} and ", QuickGELU (HF" in capsys.readouterr().out
    )
    images, ids = batch(size)
    with torch.no_grad():
        assert_same_features(clip, size, hf.get_image_features(images), hf.get_text_features(ids))


def test_hf_safetensors_and_the_activation_that_a_config_beside_it_names(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    hf = hf_clip(TINY, act="gelu")
    safetensors.save_file(hf.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf.config.to_dict()))
    clip = load_clip(tmp_path / "model.safetensors")
    assert not clip.config["quick_gelu"] and ", GELU (by" in capsys.readouterr().out
    images, ids = batch(TINY)
    with torch.no_grad():
        assert_same_features(clip, TINY, hf.get_image_features(images), hf.get_text_features(ids))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json: not valid JSON"):
        load_clip(tmp_path / "model.safetensors")


@pytest.mark.parametrize("prefix", ["clip.", "module.clip."])
def test_released_checkpoints_give_their_clip(prefix, tmp_path):
    hf = hf_clip(TINY)
    sd = {f"{prefix}{k}": v for k, v in hf.state_dict().items()} | {
        "pool_frames.linear_proj.weight": torch.zeros(2, 2)
    }
    sd[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save({"epoch": 5, "state_dict": sd, "optimizer": {}}, tmp_path / "model_best.pth")
    images, ids = batch(TINY)
    with torch.no_grad():
        assert_same_features(
            load_clip(tmp_path / "model_best.pth"),
            TINY,
            hf.get_image_features(images),
            hf.get_text_features(ids),
        )
    del sd[f"{prefix}vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    torch.save({"state_dict": sd}, tmp_path / "model_best.pth")
    with pytest.raises(
        WeightsError,
        match="model_best.pth: .*it has no 'visual.transformer.resblocks.1.attn.k_proj.bias'",
    ):
        load_clip(tmp_path / "model_best.pth")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "kind, file, quick",
    [("CLIP", "epoch_5.pt", False), ("CustomTextCLIP", "vit_b_32-quickgelu-laion400m.pt", True)],
)
def test_open_clip_weights_give_open_clip_features(kind, file, quick, size, tmp_path, capsys):
    model = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    vision = model.CLIPVisionCfg(
        size["vision_layers"],
        size["vision_width"],
        patch_size=size["patch_size"],
        image_size=size["image_size"],
    )
    text = model.CLIPTextCfg(
        vocab_size=size["vocab_size"],
        width=size["text_width"],
        heads=size["text_width"] // 64,
        layers=size["text_layers"],
    )
    theirs = shaken(getattr(model, kind)(size["embed_dim"], vision, text, quick_gelu=quick))
    sd = theirs.state_dict()
    if not quick:  # as open_clip's own training saves it
        sd = {"epoch": 5, "name": "run", "state_dict": {f"module.{k}": v for k, v in sd.items()}}
    torch.save(sd, tmp_path / file)
    clip = load_clip(tmp_path / file)
    assert clip.config == size | {"quick_gelu": quick}
    assert f", {'QuickGELU' if quick else 'GELU'} (an open_clip" in capsys.readouterr().out
    images, ids = batch(size)
    with torch.no_grad():
        assert_same_features(clip, size, theirs.encode_image(images), theirs.encode_text(ids))
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": not quick}})
    )
    assert load_clip(tmp_path / file).config["quick_gelu"] != quick


@pytest.mark.parametrize(
    "name, quick",
    [
        ("ViT-B-32_openai.pt", True),
        ("vit_b_32-quickgelu-laion.pt", True),
        ("laion2b_b79k.bin", False),
    ],
)
def test_the_activation_of_open_clip_files_goes_by_their_name(name, quick, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / name)
    assert load_clip(tmp_path / name).config["quick_gelu"] is quick


class Archive(CLIP):
    """Traced, this is what OpenAI's files are: TorchScript, half precision, three size entries."""

    def __init__(self, **config):
        super().__init__(**config)
        for name, value in (("input_resolution", 16), ("context_length", 77), ("vocab_size", 600)):
            self.register_buffer(name, torch.tensor(value))
        del self.mean_std  # a trace would save it

    def forward(self, images, ids):
        return self.encode_image(images), self.encode_text(ids)


def save_archive(path):
    torch.manual_seed(0)
    archive = shaken(Archive(**TINY)).half()
    images, ids = batch(TINY)
    with pytest.warns(), torch.no_grad():  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(archive, (images.half(), ids)), path)
        return [features.float() for features in archive.float()(images, ids)]


def test_openai_archives(tmp_path, capsys):
    features = save_archive(tmp_path / "ViT.pt")
    clip = load_clip(tmp_path / "ViT.pt")
    assert (
        clip.config == TINY | {"quick_gelu": True}
        and "QuickGELU (OpenAI's)" in capsys.readouterr().out
    )
    assert_same_features(clip, TINY, *features)


def test_our_own_checkpoints_give_their_clip(tmp_path):
    clip = tiny(quick_gelu=False, vocab_size=514)
    save_checkpoint(tmp_path / "model.pt", TMASS(clip), Tokenizer(), {})
    again = load_clip(tmp_path / "model.pt")
    assert again.config == clip.config
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), clip.state_dict().values())
    )
    assert to_openai_names(clip.state_dict()).keys() == clip.state_dict().keys()


def test_files_that_are_no_weights(tmp_path):
    sd = tiny().state_dict()
    torch.save(sd, tmp_path / "good.pt")
    torch.save(sd, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("good", "old"):
        assert read_weights(tmp_path / f"{name}.pt").keys() == sd.keys()
        (tmp_path / f"cut {name}.pt").write_bytes((tmp_path / f"{name}.pt").read_bytes()[:-20_000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello, this is text\n")
    (tmp_path / "zip.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save([sd], tmp_path / "list.pt")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pt")
    torch.save({"weight": torch.zeros(1), "run": os.system}, tmp_path / "object.pt")
    torch.save({"weight": torch.zeros(1), "epoch": 3}, tmp_path / "value.pt")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pt")
    save_archive(tmp_path / "whole.archive")
    (tmp_path / "cut archive.pt").write_bytes((tmp_path / "whole.archive").read_bytes()[:-20_000])
    faults = {
        "truncated": [
            "cut good.pt",
            "cut old.pt",
            "cut archive.pt",
            "empty.pt",
            "text.pt",
            "zip.pt",
        ],
        "list": ["list.pt"],
        "named": ["numbered.pt"],
        "any code": ["object.pt"],
        "epoch": ["value.pt"],
        "conv1.weight": ["resnet.pt"],
        "truncated|pip install": ["text.safetensors"],
        "no such file.*ViT-B/16": ["missing.pt"],
        "a folder": [""],
    }
    for expected, name in [
        (expected, name) for expected, names in faults.items() for name in names
    ]:
        with pytest.raises(WeightsError, match=expected) as caught:
            load_clip(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


# ---- downloads ----
@pytest.fixture
def server(monkeypatch, tmp_path):
    """A real HTTP server of the files in `files`: None is answered with 404, `cut` stops midway."""

    class Handler(http.server.BaseHTTPRequestHandler):
        files, cut, asked = {}, set(), []

        def do_GET(self):
            self.asked.append(self.path)
            body = self.files.get(self.path)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path in self.cut else body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("TMASS_CACHE", str(tmp_path / "cache" / "tmass"))
        monkeypatch.setattr(weights, "OPENAI_URL", url)
        monkeypatch.setattr(weights, "VOCABULARY_URL", f"{url}/bpe_simple_vocab_16e6.txt.gz")
        yield Handler
        httpd.shutdown()


@pytest.fixture
def archive(server, monkeypatch, tmp_path):
    """A small archive on the server as ViT-B/32 -> its bytes and its place in the cache folder."""
    save_archive(tmp_path / "served.pt")
    body = (tmp_path / "served.pt").read_bytes()
    sha256 = hashlib.sha256(body).hexdigest()
    monkeypatch.setitem(weights.MODELS, "ViT-B/32", ("ViT-B-32.pt", sha256))
    server.place = f"/{sha256}/ViT-B-32.pt"
    server.files[server.place] = body
    return body, tmp_path / "cache" / "tmass" / "ViT-B-32.pt"


def test_a_name_is_downloaded_once_and_then_used_offline(server, archive, capfd):
    body, path = archive
    assert load_clip("ViT-B/32").config == TINY | {"quick_gelu": True}
    assert path.read_bytes() == body and os.listdir(path.parent) == ["ViT-B-32.pt"]
    said = capfd.readouterr()
    assert f"downloading {weights.OPENAI_URL}{server.place} to {path}" in said.out
    assert re.search(
        r"100(\.0)?%", said.err
    )  # as tqdm writes it, or torch where tqdm is not installed
    server.files.clear()
    assert load_clip("ViT-B/32").config["embed_dim"] == 24 and len(server.asked) == 1


@pytest.mark.parametrize(
    "fault, says",
    [("other", "invalid hash"), ("cut", "invalid hash"), ("gone", "404"), ("offline", "refused")],
)
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(
    fault, says, server, archive, monkeypatch
):
    body, path = archive
    if fault == "other":
        server.files[server.place] = body[:-1] + bytes([body[-1] ^ 1])
    elif fault == "cut":
        server.cut.add(server.place)
    elif fault == "gone":
        server.files.clear()
    else:
        monkeypatch.setattr(weights, "OPENAI_URL", "http://127.0.0.1:1")
    with pytest.raises(WeightsError, match=says) as caught:
        load_clip("ViT-B/32")
    assert f"put the file with SHA-256 {weights.MODELS['ViT-B/32'][1]} at {path}" in str(
        caught.value
    )
    assert os.listdir(path.parent) == []


def test_a_wrong_file_in_the_cache_is_never_used(server, archive, capsys):
    body, path = archive
    path.parent.mkdir(parents=True)
    path.write_bytes(body[:1000])  # as an interrupted wget leaves it
    server.cut.add(server.place)
    with pytest.raises(WeightsError, match="ViT-B-32.pt"):
        load_clip("ViT-B/32")
    server.cut.clear()
    load_clip("ViT-B/32")
    assert path.read_bytes() == body and f"{path}: wrong SHA-256" in capsys.readouterr().out


def test_the_vocabulary_is_downloaded_and_checked(server, shared, tmp_path):
    body = (shared / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    server.files["/bpe_simple_vocab_16e6.txt.gz"] = body[:-1]
    with pytest.raises(WeightsError, match="bpe_simple_vocab_16e6.txt.gz"):
        weights.load_vocabulary()
    server.files["/bpe_simple_vocab_16e6.txt.gz"] = body
    assert weights.load_vocabulary().vocab_size == 49408
    server.files.clear()
    assert weights.load_vocabulary().encode("a diagram") == [320, 22697]


def test_a_cache_folder_that_cannot_be_written(server, archive, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMASS_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="TMASS_CACHE"):
        load_clip("ViT-B/32")


# ---- preprocessing ----
def test_preprocessing_is_pils_bicubic_pipeline_within_two_levels():
    """CLIP was trained on PIL's: short side resized bicubically, centre cropped, normalised."""
    from PIL import Image

    from data import test_transform

    torch.manual_seed(0)
    clip = CLIP(
        **(TINY | dict(image_size=224, patch_size=32, vision_width=256, vision_layers=4))
    ).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip_model.MEAN, clip_model.STD))
    g = torch.Generator().manual_seed(0)
    for H, W in ((240, 320), (360, 203), (480, 854), (120, 160), (224, 224)):
        waves = torch.nn.functional.interpolate(
            torch.rand(2, 3, 9, 12, generator=g), size=(H, W), mode="bicubic"
        )
        edges = (torch.rand(2, 3, H // 16 + 1, W // 16 + 1, generator=g) < 0.2).float()
        edges = edges.repeat_interleave(16, 2).repeat_interleave(16, 3)
        frames = (
            ((waves + edges[..., :H, :W] + 0.05 * torch.randn(2, 3, H, W, generator=g)) * 160)
            .clamp(0, 255)
            .byte()
        )
        ours, theirs = test_transform(224)(frames), []
        for frame in frames:
            w, h = (224, int(224 * H / W)) if W < H else (int(224 * W / H), 224)
            picture = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((w, h), Image.BICUBIC)
            left, top = round((w - 224) / 2), round((h - 224) / 2)
            picture = picture.crop((left, top, left + 224, top + 224))
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            theirs.append(pixels.view(224, 224, 3).permute(2, 0, 1))
        theirs = torch.stack(theirs)
        assert ours.dtype == torch.uint8 and ours.shape == theirs.shape == (2, 3, 224, 224)
        levels = (ours.float() - theirs.float()).abs()
        with torch.no_grad():
            a, b = clip.encode_image(ours), clip.encode_image((theirs / 255 - mean) / std)
        moved = ((a - b).norm(dim=-1) / b.norm(dim=-1)).max()
        print(
            f"{H}x{W}: off by {levels.mean():.3f} levels of 255 on average, "
            f"{levels.max():.0f} at most; "
            f"embedding by {moved:.1e}"
        )
        assert levels.mean() <= 2 and moved < 0.01


@pytest.mark.parametrize(
    "vision_width, text_width, heads",
    [
        (768, 512, (12, 8)),  # ViT-B
        (1024, 768, (16, 12)),  # ViT-L
        (1280, 1024, (16, 16)),  # ViT-H
        (1408, 1024, (16, 16)),  # ViT-g
        (1664, 1280, (16, 20)),  # ViT-bigG
    ],
)
def test_heads_of_published_sizes(vision_width, text_width, heads):
    """Of open_clip's configurations; a state dict without settings does not tell them."""
    with torch.device("meta"):
        clip = CLIP(64, 28, 14, vision_width, 1, 8, 260, text_width, 1)
    towers = (clip.visual, clip)
    assert tuple(tower.transformer.resblocks[0].attn.heads for tower in towers) == heads
