"""Models of open_clip as encoders: the same features, and trained, saved, resumed and searched."""
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from videos import numbered, write_video

import eval
import search
import train
from lib.common import WeightsError
from lib.encoders import say_cut, split_name
from lib.index import fingerprint
from lib.weights import load_checkpoint, load_clip, save_checkpoint
from tmass import TMASS

open_clip = pytest.importorskip("open_clip")
# A small model of the kind that clip_model.CLIP is not: timm's tower, text without a mask, and as
# in SigLIP a parameter that no cosine depends on.
SMALL = dict(
    embed_dim=32,
    init_logit_bias=-10,
    custom_text=True,
    vision_cfg=dict(timm_model_name="fastvit_t8", timm_model_pretrained=False, timm_pool="avg",
                    timm_proj=None, image_size=64),
    text_cfg=dict(context_length=20, vocab_size=49408, width=64, heads=2, layers=1,
                  no_causal_mask=True),
)


# A small RN50, OpenAI's tower with BatchNorm.
RESNET = dict(
    embed_dim=32,
    vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=16),
    text_cfg=dict(context_length=20, vocab_size=49408, width=64, heads=2, layers=1),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The name of SMALL in open_clip, which then knows RESNET as resnet, too."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "small.json").write_text(json.dumps(SMALL))
    (folder / "resnet.json").write_text(json.dumps(RESNET))
    open_clip.add_model_config(folder)
    return "small"


def the_same(ours, theirs):
    return (ours - theirs).norm() <= 1e-4 * theirs.norm()


def compare(clip, tokenizer, theirs, known):
    """known: their tokenizer, or the name of one."""
    pixels = torch.randint(0, 256, (2, 3, clip.image_size, clip.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(clip.config[key]).view(3, 1, 1) for key in ("mean", "std"))
    texts = ["a dog runs", "two people talk on a stage"]
    known = open_clip.get_tokenizer(known) if isinstance(known, str) else known
    theirs.eval()
    with torch.no_grad():
        image = theirs.encode_image((pixels / 255 - mean) / std)
        text = theirs.encode_text(known(texts))
        assert the_same(clip.encode_image(pixels), image) and image.std() > 0
        assert the_same(clip.encode_text(tokenizer(texts)), text) and text.std() > 0
        assert clip.embed_dim == image.shape[1] == text.shape[1]


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
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    del content["clip"]["quick_gelu"]
    torch.save(content | dict(merges=[]), tmp_path / "m.pt")  # as they were written before
    again, tokenizer, _ = load_checkpoint(tmp_path / "m.pt")
    compare(again.clip, tokenizer, theirs, small)
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


GREY = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear",
            resize_mode="squash", quick_gelu=True)


def test_a_file_gets_what_the_weights_of_its_model_want(small, tmp_path, monkeypatch, capsys):
    torch.save(open_clip.create_model(small).state_dict(), tmp_path / "w.pt")
    file = f"={tmp_path / 'w.pt'}"

    def download(*_, **__):
        raise AssertionError("a file needs no download")
    monkeypatch.setattr("open_clip.factory.download_pretrained", download)

    def load(tags, name):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, small, tags)
        config = load_clip(f"open_clip:{name}").config
        return config, capsys.readouterr().out
    config, out = load(dict(one=GREY, two=dict(GREY)), small + file)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5) and config["quick_gelu"]
    assert config["resize"] == ("squash", "bilinear")
    assert "resized by squash, as for open_clip's own weights" in out and "warning" not in out

    dark = GREY | dict(mean=(0.1, 0.1, 0.1), quick_gelu=False)
    config, out = load(dict(one=GREY, two=dark), small + file)
    assert "differ in mean, quick_gelu: give the tag that fits the file" in out
    assert f"open_clip:{small}/TAG=" in out
    assert config["mean"][0] == 0.48145466 and config["std"] == (0.5, 0.5, 0.5)
    config, out = load(dict(one=GREY, two=dark), f"{small}/two{file}")
    assert config["mean"] == (0.1, 0.1, 0.1) and "warning" not in out
    with pytest.raises(WeightsError, match="has no weights tow for it; it has one, two"):
        load(dict(one=GREY, two=dark), f"{small}/tow{file}")
    assert "by default" in load({}, small + file)[1]


def training(name):
    """A model in training mode, but for BatchNorm: its statistics are those of the weights."""
    torch.manual_seed(0)
    model = TMASS(load_clip(f"open_clip:{name}"), frames=3, dropout=0.3)
    for key, x in model.named_buffers():
        if key.endswith("running_mean"):
            x.normal_(std=0.1)
    model.train()
    for module in model.clip.modules():
        if hasattr(module, "running_mean"):
            module.eval()
    return model


@pytest.mark.parametrize("name, dtype, at_most", [
    ("small", torch.float64, 1e-12),
    ("resnet", torch.float64, 1e-12),
    ("resnet", torch.bfloat16, 5e-3),  # 1.7e-2 from the gradient in float32
])
def test_chunks_change_no_gradient(small, name, dtype, at_most):
    """Beyond rounding: in float64, which autocast leaves alone, there is next to none."""
    model = training(name)
    if dtype == torch.float64:
        model.clip.double()
    ids = model.clip.tokenizer(["a dog runs", "two people talk"])
    pixels = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    gradients = []
    for model.chunk in (0, 4, 100):
        model.zero_grad()
        torch.manual_seed(1)  # of the noise
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids, pixels)["loss"]
        loss.backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts).double())
    plain, *others = gradients
    for chunked in others:
        assert (chunked - plain).norm() < at_most * plain.norm()


@pytest.mark.parametrize("name", ["small", "resnet"])
def test_batchnorm_in_evaluation_mode_keeps_its_statistics(small, name):
    """And what a picture's embedding is does not depend on its batch."""
    model = training(name)
    before = {key: x.clone() for key, x in model.clip.named_buffers()}
    assert any(key.endswith("running_var") for key in before)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    whole = model.clip.encode_image(images)
    alone = torch.cat([model.clip.encode_image(image[None]) for image in images])
    assert the_same(alone, whole)
    assert all(torch.equal(x, before[key]) for key, x in model.clip.named_buffers())


def test_files_of_other_kinds(small, tmp_path):
    """In half precision and with OpenAI's three sizes, as its archives are; averaged by torch."""
    torch.manual_seed(3)
    theirs = open_clip.create_model(small)
    name = f"open_clip:{small}={tmp_path / 'w.pt'}"
    plain = theirs.state_dict()
    sizes = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(9))
    halves = {key: x.half() if x.is_floating_point() else x for key, x in plain.items()}
    averaged = {f"module.{key}": x for key, x in plain.items()}
    for sd in (halves | sizes, averaged | dict(n_averaged=torch.tensor(2))):
        torch.save(sd, tmp_path / "w.pt")
        model, tokenizer, _ = load_checkpoint(name)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        fingerprint(model, 10)
        theirs.load_state_dict({key: model.clip.model.state_dict()[key] for key in plain})
        compare(model.clip, tokenizer, theirs, small)
    for wrong in (torch.zeros(1).to_sparse(), torch.zeros((), dtype=torch.complex64), "x"):
        torch.save(plain | {"text.ln_final.bias": wrong}, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match="don't fit open_clip's small: .*text.ln_final.bias"):
            load_clip(name)


def test_a_side_of_images_that_is_written_twice(small, tmp_path):
    """As JSON has it, in a list."""
    for name, side in (("square", [64, 64]), ("wide", [64, 96])):
        vision = SMALL["vision_cfg"] | dict(image_size=side)
        (tmp_path / f"{name}.json").write_text(json.dumps(SMALL | dict(vision_cfg=vision)))
    open_clip.add_model_config(tmp_path)
    assert load_clip("open_clip:square").image_size == 64
    with pytest.raises(WeightsError, match="images of 64 x 96, resized by shortest, are not supp"):
        load_clip("open_clip:wide")


@pytest.mark.parametrize("name, parts", [
    ("a", ("a", None, None)),
    ("a/b", ("a", "b", None)),
    ("a=b/c=d", ("a", None, "b/c=d")),
    ("a/b=c\nd", ("a", "b", "c\nd")),
    ("hf-hub:a/b", ("hf-hub:a/b", None, None)),
    ("hf-hub:a/b=c", ("hf-hub:a/b", None, "c")),
    ("local-dir:/a/b=c", ("local-dir:/a/b=c", None, None))])
def test_parts_of_a_name(name, parts):
    assert split_name(f"open_clip:{name}") == parts


@pytest.mark.parametrize("name, message", [
    ("open_clip:no-such-model", "open_clip:no-such-model: "),
    ("open_clip:small/no-such-tag", "open_clip:small: "),
    ("open_clip:small=no-such-file.pt", "no-such-file.pt: no such file")])
def test_names_that_are_none(small, name, message):
    with pytest.raises(WeightsError, match=message) as error:
        load_checkpoint(name)
    assert "\n" not in str(error.value)


# ---- models and vocabularies of the Hub ----


def hf_tokenizer(kind):
    """A small one of transformers. siglip: the end of a text is its padding too."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    names = ["<pad>", "</s>", "<s>", "<unk>", "<cls>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=names,
                                              show_progress=False)
    bpe.train_from_iterator(["a dog runs", "two people talk on a stage"] * 3, trainer)
    form = "$A </s>" if kind == "siglip" else "<s> $A </s>"
    ids = [(name, k) for k, name in enumerate(names)]
    bpe.post_processor = tokenizers.processors.TemplateProcessing(form, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="</s>" if kind == "siglip" else "<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<cls>",
    )


def hub(folder, **text):
    """A folder as open_clip writes it for the Hub: a small model, its settings, a vocabulary."""
    torch.manual_seed(4)
    config = SMALL | dict(text_cfg=SMALL["text_cfg"] | text)
    settings = dict(config, vision_cfg=dict(SMALL["vision_cfg"]))
    theirs = open_clip.CustomTextCLIP(**{k: x for k, x in settings.items() if k != "custom_text"})
    pixels = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear",
                  resize_mode="squash")
    open_clip.set_model_preprocess_cfg(theirs, pixels)
    push = pytest.importorskip("open_clip.push_to_hf_hub")
    push.save_for_hf(theirs, hf_tokenizer("siglip"), config, folder, safe_serialization=False)
    return theirs


def published(folder, cache, name="acme/small"):
    """What is in a folder, as the Hub's client keeps it. -> its name in open_clip"""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    return f"hf-hub:{name}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of the Hub's client, who may ask nobody."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def keep_and_load(model, tokenizer, tmp_path):
    """Save, forget where all of it came from, load. -> (model, tokenizer)"""
    save_checkpoint(tmp_path / "m.pt", model, tokenizer, {})
    for folder in ("hub", "folder"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    again, tokenizer, _ = load_checkpoint(tmp_path / "m.pt")
    assert again.clip.config == model.clip.config
    assert fingerprint(again, 10) == fingerprint(model, 10)
    return again, tokenizer


@pytest.mark.parametrize("vocabulary", [{}, {"hf_tokenizer_name": "acme/small"}])
@pytest.mark.parametrize("place", ["hf-hub", "local-dir"])
def test_a_checkpoint_needs_no_hub(vocabulary, place, tmp_path, cache, capsys):
    theirs = hub(tmp_path / "folder", **vocabulary)
    name = published(tmp_path / "folder", cache)
    if place == "local-dir":
        name = f"local-dir:{tmp_path / 'folder'}"
    known = open_clip.get_tokenizer(name)
    model, tokenizer, _ = load_checkpoint(f"open_clip:{name}")
    out = capsys.readouterr().out
    assert "(0.1, 0.2, 0.3) over (0.4, 0.5, 0.6), resized by squash" in out and "random" not in out
    compare(model.clip, tokenizer, theirs, known)
    for _ in range(2):  # a checkpoint of what a checkpoint held, too
        model, tokenizer = keep_and_load(model, tokenizer, tmp_path)
        compare(model.clip, tokenizer, theirs, known)
    with pytest.raises(WeightsError, match=f"open_clip:{name}: "):
        load_checkpoint(f"open_clip:{name}")


def test_what_has_no_weights_is_not_made_up(tmp_path):
    hub(tmp_path / "lr=1e-5")
    for file in (tmp_path / "lr=1e-5").glob("*.bin"):
        file.unlink()
    with pytest.raises(WeightsError, match="lr=1e-5.* could not be loaded"):
        load_checkpoint(f"open_clip:local-dir:{tmp_path / 'lr=1e-5'}")


def test_a_text_tower_of_transformers(tmp_path):
    """Its settings stand in the Hub, apart from open_clip's."""
    transformers = pytest.importorskip("transformers")
    tower = transformers.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1,
                                    num_attention_heads=2, intermediate_size=64)
    tower.save_pretrained(tmp_path / "folder")
    hf_tokenizer("bert").save_pretrained(tmp_path / "folder")
    text = dict(hf_model_name=str(tmp_path / "folder"), hf_proj_type="mlp", context_length=20,
                hf_pooler_type="mean_pooler", hf_tokenizer_name=str(tmp_path / "folder"))
    (tmp_path / "multilingual.json").write_text(json.dumps(SMALL | dict(text_cfg=text)))
    open_clip.add_model_config(tmp_path / "multilingual.json")
    torch.manual_seed(0)
    theirs = open_clip.create_model("multilingual", pretrained_text=False)
    torch.manual_seed(0)
    model, tokenizer, _ = load_checkpoint("open_clip:multilingual")
    known = tokenizer
    compare(model.clip, tokenizer, theirs, known)
    model, tokenizer = keep_and_load(model, tokenizer, tmp_path)
    compare(model.clip, tokenizer, theirs, known)


def test_a_checkpoint_runs_no_code_and_writes_nowhere(tmp_path, monkeypatch):
    hub(tmp_path / "folder", hf_tokenizer_name="acme/small",
        tokenizer_kwargs=dict(trust_remote_code=True))
    config = tmp_path / "folder" / "tokenizer_config.json"
    model, tokenizer, _ = load_checkpoint(f"open_clip:local-dir:{tmp_path / 'folder'}")
    files = dict(tokenizer.merges)
    settings = json.loads(files[config.name])
    settings["auto_map"] = {"AutoTokenizer": [None, "code.Evil"]}
    settings["tokenizer_class"] = "Evil"
    files[config.name] = json.dumps(settings)
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


def test_a_vocabulary_that_can_not_be_had(tmp_path, cache):
    """That of SigLIP 2 stands in the Hub of Hugging Face."""
    hub(tmp_path / "folder", hf_tokenizer_name="acme/elsewhere")
    name = published(tmp_path / "folder", cache)
    for name in (name, "ViT-B-16-SigLIP2/webli"):
        model = name.removesuffix("/webli")
        words = f"{model}: its vocabulary can't be loaded: "
        with pytest.raises(WeightsError, match=words) as error:
            load_checkpoint(f"open_clip:{name}")
        assert "\n" not in str(error.value)


class Job:
    rank = 0
    say = print


@pytest.mark.parametrize("kind", ["clip", "siglip", "bert", "clips"])
def test_captions_that_are_cut_are_counted(kind, capsys):
    """The longest that fits, and one token more."""
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=20)
    around = {"clip": 2, "siglip": 1, "bert": 2, "clips": 3}[kind]
    if kind != "clip":
        tokenizer = object.__new__(open_clip.tokenizer.HFTokenizer)
        vars(tokenizer).update(tokenizer=hf_tokenizer(kind), context_length=20, tokenizer_mode=kind,
                               clean_fn=str.strip, strip_sep_token=False)
    fits = "a " * (20 - around)
    say_cut(Job, tokenizer, [fits, "b " * 50, fits + "dog", "two people talk", ""], "train")
    assert "train: 2 captions are longer than the encoder's 20 tokens" in capsys.readouterr().out
    say_cut(Job, tokenizer, [fits], "train")
    assert not capsys.readouterr().out


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
def test_programs_need_the_hub_once(here, tmp_path, run):
    """The programs themselves, whose Hub is a cache that is gone after training."""
    hub(tmp_path / "folder", hf_tokenizer_name="acme/small")
    clip = "open_clip:" + published(tmp_path / "folder", tmp_path / "home" / "hub")
    env = dict(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")

    def checked(script, *words, status=0):
        done = run(script, *words, timeout=120, env=env)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr
    long = "picture " * 30
    table = (tmp_path / "my.csv").read_text()
    (tmp_path / "my.csv").write_text(table.replace("picture number 2", long))
    out = checked("train.py", *words(clip), "--out", "whole.pt")
    assert "train: 1 captions are longer than the encoder's 20 tokens" in out
    (tmp_path / "home").rename(tmp_path / "gone")
    use(checked, "whole.pt")
    checked("train.py", *words("tiny"), "--init", "whole.pt", "--out", "more.pt")
    query = ["search.py", "picture", "--videos", ".", "--device", "cpu", "--ckpt"]
    out = checked(*query, clip, status=2)
    assert "Traceback" not in out and clip in out
    checked(*query, "open_clip:local-dir:folder")


@pytest.mark.slow
def test_training_with_a_real_encoder(here, run):
    def checked(script, *words):
        done = run(script, *words, timeout=280)
        assert done.returncode == 0, done.stderr
        return done.stdout
    clip = "open_clip:PE-Core-T-16-384"
    checked("train.py", *words(clip), "--out", "whole.pt")
    use(checked, clip)
