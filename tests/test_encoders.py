"""Encoders: one of the test's own goes through all programs; open_clip's, compared with itself."""
import json
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import noise_video, refused, small_clip
from torch import nn

import eval
import search
import train
from clip_model import Tokenizer
from lib.common import WeightsError
from lib.encoders import ENCODERS, say_cut
from lib.index import fingerprint
from lib.weights import load_checkpoint, load_clip, save_checkpoint
from tmass import TMASS

# ---- an encoder of the test's own ----


class Colours(nn.Module):
    """Mean colours of a picture's quarters, counts of a text's letters; names unlike CLIP's."""
    stop_at = None  # calls of encode_text until a signal arrives

    def __init__(self, side="8"):
        super().__init__()
        self.config = dict(side=side)
        self.image_size = int(side)
        self.embed_dim = 24
        self.tokenizer = Tokenizer()
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.pictures = nn.Linear(12, 24)
        self.letters = nn.Linear(514, 24)
        self.register_buffer("grey", torch.full((3,), 127, dtype=torch.uint8))

    def encode_image(self, pixels):
        assert pixels.dtype == torch.uint8
        x = pixels.float() - self.grey.view(3, 1, 1)
        return self.pictures(F.adaptive_avg_pool2d(x / 255, 2).flatten(1))

    def encode_text(self, ids):
        if Colours.stop_at is not None and torch.is_grad_enabled():
            Colours.stop_at -= 1
            if not Colours.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return self.letters(F.one_hot(ids, 514).float().mean(1))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with six videos and their table."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("films")
    rows = ["video,caption,split"]
    for k in range(6):
        noise_video(f"films/{k}.mp4", k)
        rows.append(f"{k}.mp4,noise number {'one two three four five six'.split()[k]},"
                    f"{'test' if k > 3 else 'train'}")
    (tmp_path / "films" / "my.csv").write_text("\n".join(rows))
    return tmp_path


CPU = "--device", "cpu", "--workers", 0
SMALL = ("--data", "films/my.csv", "--frames", 2, "--batch", 2, "--epochs", 2, "--log-every", 1,
         *CPU)


def test_an_encoder_is_a_class_and_an_entry(here, call, monkeypatch):
    monkeypatch.setitem(ENCODERS, "colours", Colours)

    def done(*words):
        status, out, err = call(*words)
        assert status == 0, err
        return out

    done(train, *SMALL, "--clip", "colours:12", "--out", "whole.pt")
    monkeypatch.setattr(Colours, "stop_at", 2)
    stopped = call(train, *SMALL, "--clip", "colours:12", "--out", "half.pt")
    assert stopped[0] == 128 + signal.SIGTERM
    out = done(eval, "--ckpt", "half.pt", "--json", "half.json", *CPU)
    assert ", unfinished: step 2 of 4" in out
    assert json.loads((here / "half.json").read_text())["unfinished"] == "step 2 of 4"
    done(train, "--out", "half.pt", "--resume", *CPU)
    whole, half = (load_checkpoint(f"{name}.pt")[0] for name in ("whole", "half"))
    for name, x in whole.state_dict().items():
        assert torch.equal(x, half.state_dict()[name]), name
    assert whole.clip.config == dict(side="12") and whole.clip.grey.dtype == torch.uint8
    start = Colours().pictures.weight
    assert not torch.equal(whole.clip.pictures.weight, start)

    out = done(eval, "--ckpt", "whole.pt", *CPU)
    assert "2 texts, 2 videos" in out and "unfinished" not in out
    assert "pooling query" in done(eval, "--ckpt", "colours", "--data", "films/my.csv", *CPU)

    for ckpt in ("whole.pt", "colours"):
        found = "noise number two", "--videos", "films", "--ckpt", ckpt, "--device", "cpu"
        assert ".mp4" in done(search, *found)
    assert fingerprint(whole, 10) == fingerprint(half, 10)
    for part in (whole.clip.pictures.bias, whole.clip.grey):  # 3 bytes are no whole number of int32
        before = fingerprint(whole, 10)
        part.data[1] += 1
        assert fingerprint(whole, 10) != before


class Forgetful(Colours):
    """Its config does not say how large its images are."""

    def __init__(self, side="8"):
        super().__init__(side)
        self.grown = nn.Linear(int(side), 1)
        self.config = {}


class Impolite(Colours):
    """Its config isn't plain."""

    def __init__(self, side="8"):
        super().__init__(side)
        self.config = dict(side=object)


@pytest.mark.parametrize("kind, entry, message", [
    (Forgetful, "colours", "grown.weight"),
    (Impolite, "colours", "Python objects"),
    (Colours, None, "Colours, which is not in ENCODERS"),
])
def test_what_could_not_be_built_again_is_refused_before_training(
    here, call, monkeypatch, kind, entry, message
):
    if entry:
        monkeypatch.setitem(ENCODERS, entry, kind)
        result = call(train, *SMALL, "--clip", "colours:12")
        refused(result, "model.pt not written", message, "lib/encoders.py")
        assert "step" not in result[1].split("steps of")[1]
    with pytest.raises(WeightsError, match=message):
        save_checkpoint("m.pt", TMASS(kind("12")), Tokenizer(), {})
    assert not [name for name in os.listdir() if ".pt" in name]


# ---- open_clip ----

# A small model of the kind that clip_model.CLIP is not: timm's tower with BatchNorm, text without
# a mask and, as in SigLIP, a parameter that no cosine depends on.
TOWERS = dict(
    embed_dim=32,
    init_logit_bias=-10,
    custom_text=True,
    vision_cfg=dict(timm_model_name="fastvit_t8", timm_model_pretrained=False, timm_pool="avg",
                    timm_proj=None, image_size=64),
    text_cfg=dict(context_length=20, vocab_size=49408, width=64, heads=2, layers=1,
                  no_causal_mask=True),
)
PLAIN = dict(
    embed_dim=32,
    vision_cfg=dict(image_size=32, layers=1, width=64, patch_size=16),
    text_cfg=dict(context_length=20, vocab_size=49408, width=64, heads=1, layers=1),
)


@pytest.fixture
def open_clip(tmp_path_factory):
    """The package, which knows the models `small`, `plain` and `wide`, too."""
    library = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("configs")
    wide = dict(PLAIN["vision_cfg"], image_size=[32, 48])
    for name, config in dict(small=TOWERS, plain=PLAIN, wide=PLAIN | dict(vision_cfg=wide)).items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    library.add_model_config(folder)
    torch.manual_seed(0)
    return library


def compare(clip, theirs, tokenizer):
    """The same features as open_clip's own, from uint8 pixels."""
    pixels = torch.randint(0, 256, (2, 3, clip.image_size, clip.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(clip.config[key]).view(3, 1, 1) for key in ("mean", "std"))
    texts = ["a dog runs", "two people talk on a stage"]
    theirs.eval()
    with torch.no_grad():
        image = theirs.encode_image((pixels / 255 - mean) / std)
        text = theirs.encode_text(tokenizer(texts))
        for ours, wanted in ((clip.encode_image(pixels), image),
                             (clip.encode_text(clip.tokenizer(texts)), text)):
            assert (ours - wanted).norm() <= 1e-5 * wanted.norm() and wanted.std() > 0
            assert ours.shape[1] == clip.embed_dim


def test_features_equal_open_clips(open_clip, capsys):
    name = "PE-Core-T-16-384"
    torch.manual_seed(0)
    theirs = open_clip.create_model(name)
    torch.manual_seed(0)
    model, _, config = load_checkpoint(f"open_clip:{name}")
    assert config["zero_shot"] and "random weights" in capsys.readouterr().out
    compare(model.clip, theirs, open_clip.get_tokenizer(name))


def test_a_file_of_weights_and_a_checkpoint(open_clip, tmp_path, capsys):
    """In half precision, with OpenAI's sizes and a wrapper; then as older checkpoints kept them."""
    theirs = open_clip.create_model("small")
    tokenizer = open_clip.get_tokenizer("small")
    weights = {f"module.{key}": x.half() if x.is_floating_point() else x
               for key, x in theirs.state_dict().items()}
    torch.save(weights | dict(vocab_size=torch.tensor(9)), tmp_path / "w.pt")
    model, own, _ = load_checkpoint(f"open_clip:small={tmp_path / 'w.pt'}")
    assert "random" not in capsys.readouterr().out
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    theirs.half().float()
    compare(model.clip, theirs, tokenizer)
    save_checkpoint(tmp_path / "m.pt", model, own, {})
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    for old in (False, True):
        if old:
            del content["clip"]["quick_gelu"], content["encoder"]
            torch.save(content | dict(merges=[]), tmp_path / "m.pt")
        again, _, _ = load_checkpoint(tmp_path / "m.pt")
        compare(again.clip, theirs, tokenizer)
        assert fingerprint(again, 10) == fingerprint(model, 10)


def test_the_settings_of_a_tag(open_clip, tmp_path, monkeypatch, capsys):
    """open_clip itself only warns that some models with GELU have weights with QuickGELU."""
    theirs = open_clip.create_model("plain", force_quick_gelu=True)
    tokenizer = open_clip.get_tokenizer("plain")
    file = str(tmp_path / "w.pt")
    torch.save(theirs.state_dict(), file)
    grey = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize_mode="squash",
                interpolation="bilinear", quick_gelu=True)
    dark = grey | dict(mean=(0.1, 0.1, 0.1), quick_gelu=False)
    tags = dict(quick=dict(grey, file=file), dark=dark)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "plain", tags)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: cfg["file"])
    for name in ("plain/quick", f"plain/quick={file}"):
        model, own, _ = load_checkpoint(f"open_clip:{name}")
        compare(model.clip, theirs, tokenizer)
        assert model.clip.config["mean"][0] == 0.5 and model.clip.resize == ("squash", "bilinear")
        save_checkpoint(tmp_path / "m.pt", model, own, {})
        compare(load_clip(tmp_path / "m.pt"), theirs, tokenizer)
    clip = load_clip(f"open_clip:plain={file}")
    assert clip.config["mean"][0] > 0.4 and clip.config["std"][0] == 0.5
    assert "differ in mean, quick_gelu: give the tag" in capsys.readouterr().out


@pytest.mark.parametrize("name, words", [
    ("no-such-model", "open_clip:no-such-model: "),
    ("plain/no-such-tag", "open_clip:plain: .*no weights no-such-tag"),
    ("plain=absent.pt", "absent.pt: no such file"),
    ("plain=other.pt", "don't fit open_clip's plain=other.pt: .*visual.proj"),
    ("wide", "images of 32 x 48"),
    ("local-dir:lr=1e-5", "lr=1e-5"),
])
def test_models_that_can_not_be_had(open_clip, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    torch.save(small_clip().state_dict(), "other.pt")
    with pytest.raises(WeightsError, match=words) as error:
        load_checkpoint(f"open_clip:{name}")
    assert "\n" not in str(error.value)


def hf_tokenizer():
    """A small one of transformers, whose end of a text is its padding, too."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"],
                                              show_progress=False)
    bpe.train_from_iterator(["a dog runs", "two people talk on a stage"] * 3, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="</s>", unk_token="<unk>", eos_token="</s>")


def hub(open_clip, folder, cache, **text):
    """A small model in a folder, and as the Hub's client keeps it. -> the model"""
    towers = TOWERS | dict(text_cfg=TOWERS["text_cfg"] | text)
    sizes = {key: x for key, x in towers.items() if key != "custom_text"}
    theirs = open_clip.CustomTextCLIP(**sizes | dict(vision_cfg=dict(sizes["vision_cfg"])))
    open_clip.set_model_preprocess_cfg(theirs, dict(
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", resize_mode="squash"))
    push = pytest.importorskip("open_clip.push_to_hf_hub")
    push.save_for_hf(theirs, hf_tokenizer(), towers, folder, safe_serialization=False)
    place = cache / "models--acme--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    return theirs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of the Hub's client, which may ask nobody."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("place, text", [
    ("hf-hub:acme/small", {}),
    ("local-dir:lr=1e-5", {"hf_tokenizer_name": "acme/small"}),
])
def test_a_checkpoint_needs_no_hub(open_clip, text, place, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    theirs = hub(open_clip, tmp_path / "lr=1e-5", cache, **text)
    tokenizer = open_clip.get_tokenizer(place)
    model, own, _ = load_checkpoint(f"open_clip:{place}")
    assert model.clip.config["mean"] == (0.1, 0.2, 0.3)
    compare(model.clip, theirs, tokenizer)
    shutil.rmtree("hub")
    shutil.rmtree("lr=1e-5")
    for _ in range(2):  # a checkpoint of what a checkpoint held, too
        save_checkpoint("m.pt", model, own, {})
        model, own, _ = load_checkpoint("m.pt")
        compare(model.clip, theirs, tokenizer)
    with pytest.raises(WeightsError, match=f"open_clip:{place}: "):
        load_checkpoint(f"open_clip:{place}")


def test_a_text_tower_of_transformers(open_clip, tmp_path):
    """Its settings lie in the Hub, apart from open_clip's."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "tower"
    transformers.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1,
                            num_attention_heads=2, intermediate_size=64).save_pretrained(folder)
    hf_tokenizer().save_pretrained(folder)
    text = dict(hf_model_name=str(folder), hf_proj_type="mlp", context_length=20,
                hf_pooler_type="mean_pooler", hf_tokenizer_name=str(folder))
    (tmp_path / "bert.json").write_text(json.dumps(TOWERS | dict(text_cfg=text)))
    open_clip.add_model_config(tmp_path / "bert.json")
    model, own, _ = load_checkpoint("open_clip:bert")
    save_checkpoint(tmp_path / "m.pt", model, own, {})
    shutil.rmtree(folder)
    again = load_clip(tmp_path / "m.pt")
    compare(again, model.clip.model, own)


def test_a_checkpoint_runs_no_code_and_writes_nowhere(open_clip, tmp_path, cache, monkeypatch):
    hub(open_clip, tmp_path / "folder", cache, hf_tokenizer_name="acme/small",
        tokenizer_kwargs=dict(trust_remote_code=True))
    model, tokenizer, _ = load_checkpoint(f"open_clip:local-dir:{tmp_path / 'folder'}")
    files = dict(tokenizer.merges)
    settings = json.loads(files["tokenizer_config.json"])
    settings |= dict(auto_map={"AutoTokenizer": [None, "code.Evil"]}, tokenizer_class="Evil")
    files["tokenizer_config.json"] = json.dumps(settings)
    files["code.py"] = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    files["../../escaped"] = ""
    tokenizer.merges = [*files.items()]
    save_checkpoint(tmp_path / "m.pt", model, tokenizer, {})
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a" / "b"))
    with pytest.raises(WeightsError, match="vocabulary can't be loaded") as error:
        load_checkpoint(tmp_path / "m.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()
    assert not [*tmp_path.rglob("escaped")]


@pytest.mark.parametrize("hub", [False, True])
def test_captions_that_are_cut_are_counted(open_clip, hub, capsys):
    """The longest that fits, and one token more."""
    class Job:
        say = print

    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=20)
    if hub:  # as in SigLIP, the end of a text is its padding, too
        tokenizer = object.__new__(open_clip.tokenizer.HFTokenizer)
        vars(tokenizer).update(tokenizer=hf_tokenizer(), context_length=20, tokenizer_mode="",
                               clean_fn=str.strip, strip_sep_token=False)
    fits = "a " * (19 if hub else 18)
    say_cut(Job, tokenizer, [fits, "b " * 50, fits + "dog", "two people talk", ""], "train")
    assert "train: 2 captions are longer than the encoder's 20 tokens" in capsys.readouterr().out
    say_cut(Job, tokenizer, [fits], "train")
    say_cut(Job, lambda texts: torch.zeros(len(texts), 1), [fits], "train")  # length unknown
    assert not capsys.readouterr().out
