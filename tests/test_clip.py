"""clip_model.py: tokenizer, towers, and the weights that people have, against third-party code where that is installed."""
import csv
import gzip
import json

import pytest
import torch

import clip_model
from clip_model import CLIP, Tokenizer, WeightsError

TEXTS = ["a red circle on black", "", "  TWO   dogs,\tplaying!  ", "it's 2024: we're the BEST", "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u00df \u0130",
         "fish &amp;amp; chips &lt;b&gt; &quot;hi&quot; &#233;", "\u00e2\u20ac\u0153broken\u00e2\u20ac\ufffd quotes\u00e2\u20ac\u2122s", "x" * 300, "word " * 500,
         "a <|startoftext|> b <|endoftext|> c", "\ud800 lone surrogate", "\u200bzero\u00a0width\u3000wide\x1cspace", "1/2 \u00bd \u2167 x\u00b2", "!!!...???"]
TINY = dict(embed_dim=24, image_size=16, patch_size=8, vision_width=64, vision_layers=2, context_length=77, vocab_size=600, text_width=128, text_layers=2)


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


# ---------------------------------------------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize("merges", [0, 60])
def test_every_text_comes_back(merges):
    tok = Tokenizer.learn(["a red circle left of a blue square"] * 3, merges) if merges else Tokenizer()
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
    assert ids.tolist() == [[512, *tok.encode("ab"), 513, 0, 0], [512, *tok.encode("abcd"), 513], [512, 513, 0, 0, 0, 0]]
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
    assert Tokenizer.learn(["abc abc de"], 99).merges == ("b c</w>", "a bc</w>")  # until no pair occurs twice
    assert Tokenizer.learn(["abc abc de"], 99).encode("abc") == [513]


def test_clip_ids_of_known_captions(clip_tokenizer):
    assert clip_tokenizer.vocab_size == 49408 and len(clip_tokenizer.merges) == 48894
    assert clip_tokenizer(["a photo of a cat", "a diagram"]).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 320, 22697, 49407, 0, 0, 0]]
    assert Tokenizer(clip_tokenizer.merges).encode("Hello World!") == clip_tokenizer.encode("hello   world!")


def captions(shared):
    texts = [c for video in json.loads((shared / "msvd" / "captions_msvd.json").read_text()).values() for c in video[:4]]
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
        batch = texts[start:start + 512]
        ids = torch.zeros(len(batch), 77, dtype=torch.long)
        ours = clip_tokenizer(batch)
        ids[:, :ours.shape[1]] = ours
        expected = theirs(batch)
        wrong = [text for text, a, b in zip(batch, ids, expected) if not torch.equal(a, b)]
        assert not wrong, (len(wrong), wrong[:3])


def test_vocabulary_files_that_are_none(tmp_path, shared):
    text, short, cut = tmp_path / "text.gz", tmp_path / "short.gz", tmp_path / "cut.gz"
    text.write_text("i n\n")
    short.write_bytes(gzip.compress(b"header\ni n\n"))
    cut.write_bytes((shared / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()[:100_000])
    for path in (text, short, cut, tmp_path, tmp_path / "missing.gz"):
        with pytest.raises(WeightsError, match=str(path)):
            Tokenizer.from_file(path)
    with pytest.raises(WeightsError, match="no merge"):
        Tokenizer(["in"])


# -------------------------------------------------------------------------------------------------------------- towers
def test_shapes_config_and_state_dict():
    clip = tiny(quick_gelu=False)
    images, ids = torch.randn(3, 3, 16, 16), Tokenizer()(["a", "red circle"])
    assert clip.encode_image(images).shape == (3, 24) and clip.encode_text(ids).shape == (2, 24)
    assert clip.config == TINY | {"quick_gelu": False} and CLIP(**clip.config).state_dict().keys() == clip.state_dict().keys()
    again = CLIP.from_state_dict(clip.half().state_dict(), quick_gelu=False)
    assert again.config == clip.config and all(p.dtype == torch.float32 and p.requires_grad for p in again.parameters())
    clip.float()
    assert torch.equal(again.encode_image(images), clip.encode_image(images)) and torch.equal(again.encode_text(ids), clip.encode_text(ids))
    with torch.no_grad():
        again.logit_scale.zero_()
    assert clip.logit_scale != 0  # a copy, not a view of the given weights


def test_uint8_images_are_scaled_and_normalised():
    clip, x = tiny(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip_model.MEAN, clip_model.STD))
    torch.testing.assert_close(clip.encode_image(x), clip.encode_image((x / 255 - mean) / std))


def test_a_text_cut_to_the_longest_equals_padding_to_77():
    clip, tok = tiny(), Tokenizer()
    ids = tok(["a", "red circle", "a longer text"])
    padded = torch.zeros(3, 77, dtype=torch.long)
    padded[:, :ids.shape[1]] = ids
    torch.testing.assert_close(clip.encode_text(ids), clip.encode_text(padded), atol=1e-6, rtol=1e-6)


def test_gradient_reaches_every_parameter_and_checkpointing_changes_none():
    clip, ids, images = tiny(), Tokenizer()(["a red circle", "b"]), torch.randn(2, 3, 16, 16)
    grads = []
    for clip.grad_checkpoint in (False, True):
        clip.zero_grad()
        loss = clip.logit_scale * (clip.encode_text(ids) * clip.encode_image(images)).tanh().sum()
        loss.backward()
        grads.append([p.grad.clone() for p in clip.parameters()])
    assert all(g.abs().sum() > 0 for g in grads[0])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_towers_that_cannot_be():
    sd = tiny().state_dict()
    with pytest.raises(WeightsError, match="vision transformer.*found a"):
        CLIP.from_state_dict({"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="unknown: extra.weight"):
        CLIP.from_state_dict(sd | {"extra.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="missing: ln_final.bias"):
        CLIP.from_state_dict({k: v for k, v in sd.items() if k != "ln_final.bias"})
    with pytest.raises(WeightsError, match="another size: visual.ln_pre.bias"):
        CLIP.from_state_dict(sd | {"visual.ln_pre.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="multiple of 64"):
        tiny(text_width=200)
