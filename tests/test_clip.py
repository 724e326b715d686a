"""clip_model.py: the tokenizer against open_clip's, the towers against transformers."""
import csv
import gzip
import json

import pytest
import torch
from conftest import shaken, small_clip
from torchvision.transforms import v2

from clip_model import CLIP, Tokenizer
from data import test_transform as preprocess

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


@pytest.fixture(scope="module")
def clip_tokenizer(shared):
    return Tokenizer.from_file(shared / "clip" / "bpe_simple_vocab_16e6.txt.gz")


# ---- tokenizer ----


@pytest.mark.parametrize("merges", [0, 60])
def test_every_text_comes_back(merges):
    tok = Tokenizer.learn(["a red circle left of a blue square"] * 3, merges)
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
    ids = tok(["a", "abcdefghijklmnop"])
    assert ids.shape == (2, 10) and ids[1, -1] == tok.end and tok.decode(ids[1]) == "abcdefgh"
    assert tok("one text").shape == (1, 9) and tok([]).shape == (0, 2)


def test_learnt_merges_shorten_the_texts_and_rebuild_the_tokenizer():
    texts = ["the red circle", "the red square", "a red circle", "the blue circle"]
    tok = Tokenizer.learn(texts, 8)
    assert len(tok.merges) == 8 and tok.merges == Tokenizer.learn(texts, 8).merges
    assert len(tok.encode("the red circle")) < len(Tokenizer().encode("the red circle"))
    assert Tokenizer(tok.merges).encode(texts[0]) == tok.encode(texts[0])
    whole = Tokenizer.learn(["abc abc de"], 99)  # until no pair occurs twice
    assert whole.merges == ("b c</w>", "a bc</w>") and whole.encode("abc") == [513]


def captions(shared):
    videos = json.loads((shared / "msvd" / "captions_msvd.json").read_text()).values()
    texts = [caption for video in videos for caption in video[:4]]
    for file, column in (("didemo/didemo_test_label", "text"),
                         ("msrvtt/MSRVTT_JSFUSION_test", "sentence")):
        with open(shared / f"{file}.csv", newline="", encoding="utf-8") as rows:
            texts += [row[column] for row in csv.DictReader(rows)]
    return texts


def test_ids_equal_open_clips_on_real_captions(shared, clip_tokenizer):
    theirs = pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()
    texts = sorted(set(captions(shared)))[::3] + TEXTS
    assert len(texts) > 3000
    wanted = theirs(texts)
    ids = clip_tokenizer(texts)
    assert torch.equal(ids, wanted[:, :ids.shape[1]]) and not wanted[:, ids.shape[1]:].any()


def test_vocabulary_files_that_are_none(tmp_path, shared):
    path = tmp_path / "vocabulary.gz"
    whole = (shared / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    for content in (b"i n", whole[:100_000]):
        path.write_bytes(content)
        with pytest.raises((OSError, EOFError)):
            Tokenizer.from_file(path)
    path.write_bytes(gzip.compress(b"header\ni n\n"))
    with pytest.raises(ValueError, match=f"{path}: 2 merges, CLIP's vocabulary has 48894"):
        Tokenizer.from_file(path)
    with pytest.raises(ValueError, match="no merge"):
        Tokenizer(["in"])


# ---- towers ----


def test_a_state_dict_gives_the_sizes():
    clip = shaken(CLIP(**small_clip().config | dict(quick_gelu=False)))
    again = CLIP.from_state_dict(clip.half().state_dict(), quick_gelu=False)
    assert again.config == clip.config
    assert all(p.dtype == torch.float32 and p.requires_grad for p in again.parameters())
    pixels = torch.randn(3, 3, 16, 16)
    assert torch.equal(again.encode_image(pixels), clip.float().encode_image(pixels))
    with torch.no_grad():
        CLIP.from_state_dict(clip.state_dict()).logit_scale.zero_()
    assert clip.logit_scale != 0  # a copy, not a view of the given weights


def test_a_text_cut_to_the_longest_equals_one_padded():
    clip = small_clip()
    ids = Tokenizer()(["a", "red circle"])
    padded = torch.zeros(2, 16, dtype=torch.long)
    padded[:, :ids.shape[1]] = ids
    short = clip.encode_text(ids)
    assert (short - clip.encode_text(padded)).norm() <= 1e-6 * short.norm()


# From commit d4fcab6 in float64, with parameters, pixels and ids that are formulas.
TINY = dict(embed_dim=4, image_size=16, patch_size=8, vision_width=64, vision_layers=2,
            context_length=77, vocab_size=600, text_width=128, text_layers=2)
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
    clip = CLIP(**TINY).double()
    for i, (name, p) in enumerate(clip.named_parameters()):
        wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i)
        base = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        p.copy_((base + 0.2 * wave).view_as(p))
    pixels = (torch.arange(2 * 3 * 16 * 16) * 37 % 251).byte().view(2, 3, 16, 16)
    ids = torch.tensor([[598, 5, 17, 599, 0], [598, 300, 42, 7, 599]])
    for ours, written in ((clip.encode_image(pixels), IMAGE_FEATURES),
                          (clip.encode_text(ids), TEXT_FEATURES)):
        written = torch.tensor(written, dtype=torch.float64)
        assert (ours - written).norm() <= 1e-6 * written.norm()


@pytest.mark.parametrize("vision_width, text_width, heads", [
    (768, 512, (12, 8)),  # ViT-B
    (1024, 768, (16, 12)),  # ViT-L
    (1280, 1024, (16, 16)),  # ViT-H
    (1664, 1280, (16, 20)),  # ViT-bigG
])
def test_heads_of_published_sizes(vision_width, text_width, heads):
    """Of open_clip's configurations; a state dict without settings does not tell them."""
    with torch.device("meta"):
        clip = CLIP(64, 28, 14, vision_width, 1, 8, 260, text_width, 1)
    towers = (clip.visual, clip)
    assert tuple(tower.transformer.resblocks[0].attn.heads for tower in towers) == heads


# ---- preprocessing ----


@pytest.mark.parametrize("H, W", [(240, 320), (360, 203), (120, 160)])
def test_preprocessing_is_pils_bicubic_pipeline_within_two_levels(H, W):
    """CLIP was trained on PIL's: short side resized bicubically, centre cropped."""
    g = torch.Generator().manual_seed(0)
    waves = torch.rand(1, 3, 9, 12, generator=g)
    waves = torch.nn.functional.interpolate(waves, size=(H, W), mode="bicubic")
    noise = 0.1 * torch.randn(1, 3, H, W, generator=g)
    frames = ((waves + noise) * 200).clamp(0, 255).byte()
    pipeline = v2.Compose([v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    picture = pipeline(v2.functional.to_pil_image(frames[0]))
    theirs = v2.functional.pil_to_tensor(picture)
    assert (preprocess(224)(frames)[0].float() - theirs.float()).abs().mean() <= 2
