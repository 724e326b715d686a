"""Weights as other people keep them: settings beside them, wrappers around them, folders of parts.

transformers and open_clip are the yardstick, on random weights.
"""
import argparse
import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from test_clip import TINY, assert_same_features, batch, shaken
from test_weights import make

import data
from clip_model import CLIP, Tokenizer
from lib import weights
from lib.common import WeightsError
from lib.index import fingerprint
from lib.weights import find_weights, load_checkpoint, load_clip, read_weights, save_checkpoint
from tmass import TMASS

UNUSUAL = dict(vision_heads=4, text_heads=2, vision_mlp=96, text_mlp=160, norm_eps=1e-3,
               mean=(0.5, 0.5, 0.5), std=(0.4, 0.5, 0.6))


# ---- settings ----

def hf_with(tmp_path, vision=None, text=None):
    """A CLIPModel saved as transformers does it, with settings that no shape tells."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    towers = []
    for name, more in (("text", text), ("vision", vision)):
        tower = dict(hidden_size=TINY[f"{name}_width"], intermediate_size=96,
                     num_hidden_layers=TINY[f"{name}_layers"], num_attention_heads=1)
        towers.append(tower | (more or {}))
    towers[0] |= dict(vocab_size=TINY["vocab_size"], eos_token_id=TINY["vocab_size"] - 1)
    towers[1] |= dict(image_size=TINY["image_size"], patch_size=TINY["patch_size"])
    config = transformers.CLIPConfig(*towers, projection_dim=TINY["embed_dim"])
    hf = shaken(transformers.CLIPModel(config))
    hf.save_pretrained(tmp_path)
    return hf


@pytest.mark.parametrize("heads, eps, act", [((4, 2), 1e-5, "quick_gelu"), ((1, 2), 1e-2, "gelu")])
def test_a_folder_of_save_pretrained_is_read_whole(tmp_path, capsys, heads, eps, act):
    more = dict(layer_norm_eps=eps, hidden_act=act)
    hf = hf_with(tmp_path, more | dict(num_attention_heads=heads[0]),
                 more | dict(num_attention_heads=heads[1]))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.5, 0.6])))
    clip = load_clip(str(tmp_path))
    out = capsys.readouterr().out
    assert f"{heads[0]} and {heads[1]} heads (by config.json)" in out and "0.4" in out
    images, ids = batch(TINY)
    with torch.no_grad():
        assert_same_features(clip, TINY, hf.get_image_features(images), hf.get_text_features(ids))
        raw = torch.randint(0, 256, images.shape, dtype=torch.uint8)
        pixels = (raw / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))
        pixels /= torch.tensor([0.5, 0.5, 0.6]).view(3, 1, 1)
        torch.testing.assert_close(clip.encode_image(raw), clip.encode_image(pixels))


def edit(file, **values):
    """Change values in a file of JSON, section__name=value; makes the file where there is none."""
    content = json.loads(file.read_text()) if file.exists() else {}
    for name, value in values.items():
        *sections, last = name.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    file.write_text(json.dumps(content))


def test_settings_that_older_files_have_twice(tmp_path):
    """Those of vision_config_dict count for transformers; some files have nothing else."""
    unusual = dict(num_attention_heads=4, layer_norm_eps=1e-2, hidden_act="gelu")
    hf = hf_with(tmp_path, unusual, unusual)
    content = json.loads((tmp_path / "config.json").read_text())
    twice = {f"{name}_dict": content.pop(name) for name in ("vision_config", "text_config")}
    images, ids = batch(TINY)
    for other in ({}, dict(vision_config={}, text_config=dict(num_attention_heads=1)),
                  dict(vision_config=None, text_config=None)):
        (tmp_path / "config.json").write_text(json.dumps(content | twice | other))
        clip = load_clip(tmp_path)
        with torch.no_grad():
            assert_same_features(
                clip, TINY, hf.get_image_features(images), hf.get_text_features(ids))


def test_the_side_of_images_is_that_of_the_settings(tmp_path):
    hf_with(tmp_path)
    edit(tmp_path / "config.json", vision_config__image_size=TINY["image_size"] + 3)
    with pytest.raises(WeightsError, match="image_size is 19, expected a multiple"):
        load_clip(tmp_path)
    edit(tmp_path / "config.json", vision_config__image_size=32)
    with pytest.raises(WeightsError, match="size mismatch for visual.positional_embedding"):
        load_clip(tmp_path)


@pytest.mark.parametrize("settings, resize, mean", [
    (dict(resample=2), ("shortest", "bilinear"), None),
    (dict(size=dict(height=16, width=16), do_center_crop=False), ("squash", "bicubic"), None),
    (dict(size=dict(height=16, width=16)), ("squash", "bicubic"), None),  # as other processors
    (dict(size=16, crop_size=dict(height=16, width=16)), ("shortest", "bicubic"), None),
    (dict(do_normalize=False, image_mean=[0.5] * 3), ("shortest", "bicubic"), (0, 0, 0)),
    (dict(image_mean=None, image_std=None), ("shortest", "bicubic"), None)])
def test_what_is_done_to_images_of_hugging_face(tmp_path, capsys, settings, resize, mean):
    hf_with(tmp_path)
    edit(tmp_path / "preprocessor_config.json", **settings)
    clip = load_clip(tmp_path)
    assert clip.resize == resize and clip.config.get("mean") == mean
    unusual = mean or resize != ("shortest", "bicubic")
    assert (f"resized by {' '.join(resize)}" in capsys.readouterr().out) == bool(unusual)
    frames = torch.randint(0, 256, (1, 3, 20, 30), dtype=torch.uint8)
    wanted = data.test_transform(16, *resize)(frames)
    assert torch.equal(data.transform_for(clip)(frames), wanted)
    again = CLIP(**clip.config)
    assert again.resize == resize and again.config == clip.config


@pytest.mark.parametrize("settings, message", [
    (dict(size=dict(shortest_edge=256), crop_size=224), "size is .*256.* and crop_size 224"),
    (dict(resample=0), "resample|another")])
def test_what_can_not_be_done_to_images_is_refused(tmp_path, settings, message):
    hf_with(tmp_path)
    edit(tmp_path / "preprocessor_config.json", **settings)
    with pytest.raises(WeightsError, match=message):
        load_clip(tmp_path)


def test_a_guess_is_called_one(tmp_path, capsys):
    hf = hf_with(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    clip = load_clip(tmp_path / "model.safetensors")
    assert "heads (guessed: usual width)" in capsys.readouterr().out
    assert clip.config["mean"] == (0.5, 0.5, 0.5)
    assert clip.state_dict().keys() == weights.to_openai_names(hf.state_dict()).keys()


@pytest.mark.parametrize("vision, text, message", [
    (dict(hidden_act="gelu"), {}, "hidden_act is gelu for images and quick_gelu for texts"),
    (dict(layer_norm_eps=1e-3), {}, "layer_norm_eps"),
    (dict(hidden_act="relu"), dict(hidden_act="relu"), "'relu', expected quick_gelu or gelu"),
    (dict(num_attention_heads=4), {}, None)])
def test_what_can_not_be_computed_is_an_error(tmp_path, vision, text, message):
    hf_with(tmp_path, vision, text)
    if message is None:
        content = json.loads((tmp_path / "config.json").read_text())
        content["vision_config"]["num_attention_heads"] = "x"
        (tmp_path / "config.json").write_text(json.dumps(content))
        message = "config.json|not a CLIP"
    with pytest.raises(WeightsError, match=message) as error:
        load_clip(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [True, False])
def test_pixels_that_are_no_three_numbers(tmp_path, config):
    hf_with(tmp_path)
    if not config:
        (tmp_path / "config.json").unlink()
    for mean in (5, [0.5], ["a", "b", "c"]):
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps(dict(image_mean=mean, image_std=[0.5] * 3)))
        with pytest.raises(WeightsError, match="image_mean is .*, expected three numbers"):
            load_clip(tmp_path)


def open_clip_with(tmp_path, vision, text, **more):
    """A CLIP of open_clip and its open_clip_config.json."""
    model = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    vision = dict(layers=TINY["vision_layers"], width=TINY["vision_width"],
                  patch_size=TINY["patch_size"], image_size=TINY["image_size"]) | vision
    text = dict(vocab_size=TINY["vocab_size"], width=TINY["text_width"],
                layers=TINY["text_layers"]) | text
    theirs = shaken(model.CLIP(TINY["embed_dim"], model.CLIPVisionCfg(**vision),
                               model.CLIPTextCfg(**text)))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = dict(model_cfg=dict(embed_dim=TINY["embed_dim"], vision_cfg=vision, text_cfg=text),
                  preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return theirs


def test_settings_of_open_clip(tmp_path, capsys):
    theirs = open_clip_with(tmp_path, dict(head_width=16, mlp_ratio=2.0), dict(heads=4))
    clip = load_clip(tmp_path)
    images, ids = batch(TINY)
    with torch.no_grad():
        assert_same_features(clip, TINY, theirs.encode_image(images), theirs.encode_text(ids))
    assert clip.config["mean"] == (0.5, 0.5, 0.5)
    assert "(by open_clip_config.json)" in capsys.readouterr().out


def test_all_settings_of_open_clip_written_out(tmp_path):
    """Most of them as open_clip has them by itself; null is as if it were not there."""
    theirs = open_clip_with(tmp_path, dict(image_size=[16, 16]), dict(heads=4))
    model = pytest.importorskip("open_clip.model")
    content = json.loads((tmp_path / "open_clip_config.json").read_text())
    towers = content["model_cfg"]
    towers["vision_cfg"] = dataclasses.asdict(model.CLIPVisionCfg(**towers["vision_cfg"]))
    towers["text_cfg"] = dataclasses.asdict(model.CLIPTextCfg(**towers["text_cfg"]))
    towers["quick_gelu"] = None
    content["preprocess_cfg"] = dict(mean=None, resize_mode="squash", interpolation="bilinear")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    clip = load_clip(tmp_path)
    images, ids = batch(TINY)
    with torch.no_grad():
        assert_same_features(clip, TINY, theirs.encode_image(images), theirs.encode_text(ids))
    assert clip.resize == ("squash", "bilinear") and "mean" not in clip.config


@pytest.mark.parametrize("values, message", [
    (dict(preprocess_cfg__resize_mode="longest"), "longest"),
    (dict(model_cfg__vision_cfg__image_size=[8, 32]), "size mismatch for visual.positional"),
    (dict(model_cfg__text_cfg__pool_type="last"), "pool_type is 'last'.*open_clip:local-dir")])
def test_settings_of_open_clip_that_are_refused(tmp_path, values, message):
    open_clip_with(tmp_path, {}, dict(heads=1))
    edit(tmp_path / "open_clip_config.json", **values)
    with pytest.raises(WeightsError, match=message):
        load_clip(tmp_path)


def test_a_setting_of_open_clip_that_is_not_computed(tmp_path):
    open_clip_with(tmp_path, dict(no_ln_pre=True), dict(heads=1))
    with pytest.raises(WeightsError, match="no_ln_pre is True"):
        load_clip(tmp_path)


def test_unusual_settings_are_kept_in_a_checkpoint(tmp_path):
    model = make()
    usual = fingerprint(model, 10)
    sizes = dict(model.clip.config)
    torch.manual_seed(1)
    model = TMASS(CLIP(**sizes, **UNUSUAL), frames=4).eval()
    assert model.clip.config == sizes | UNUSUAL and fingerprint(model, 10) != usual
    tokenizer = Tokenizer(context_length=sizes["context_length"])
    save_checkpoint(tmp_path / "m.pt", model, tokenizer, {})
    again = load_checkpoint(tmp_path / "m.pt")[0]
    pixels = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    ids = torch.tensor([[512, 5, 7, 513]])
    with torch.no_grad():
        torch.testing.assert_close(again.encode_video(pixels), model.encode_video(pixels))
        torch.testing.assert_close(again.encode_text(ids), model.encode_text(ids))
        plain = TMASS(CLIP(**sizes), frames=4).eval()
        with pytest.raises(RuntimeError, match="size mismatch"):
            plain.load_state_dict(model.state_dict())  # the MLPs are of another width
    # The CLIP in such a checkpoint, for --clip.
    clip = load_clip(tmp_path / "m.pt")
    assert clip.config == model.clip.config


def test_pixels_alone_change_the_fingerprint():
    """An index of other pixels must not be searched."""
    model = make()
    usual = fingerprint(model, 10)
    other = TMASS(CLIP(**model.clip.config, mean=(0.5, 0.5, 0.5)), frames=4)
    other.load_state_dict(model.state_dict())
    assert fingerprint(other, 10) != usual


# ---- wrappers ----

def put(prefix):
    return lambda sd: {prefix + key: x for key, x in sd.items()}


WRAPPED = {
    "ddp": put("module."),
    "compiled": put("_orig_mod."),
    "compiled ddp": put("module._orig_mod."),
    "ddp compiled": put("_orig_mod.module."),
    "lightning": lambda sd: dict(state_dict=put("model.")(sd), epoch=3, loops=[1]),
    "fsdp": lambda sd: {key.replace("resblocks.", "resblocks._fsdp_wrapped_module."): x
                        for key, x in put("_fsdp_wrapped_module.")(sd).items()},
    "model_state_dict": lambda sd: dict(model_state_dict=sd, optimizer_state_dict={}),
    "in each other": lambda sd: dict(model=dict(state_dict=put("module.")(sd))),
    "averaged": lambda sd: dict(put("module.")(sd), n_averaged=torch.tensor(3)),
    "logit_scale": lambda sd: sd | dict(logit_scale=sd["logit_scale"].view(1)),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_come_off(tmp_path, wrapper):
    sd = make().clip.state_dict()
    torch.save(WRAPPED[wrapper](sd), tmp_path / "w.pt")
    loaded = load_clip(tmp_path / "w.pt").state_dict()
    assert loaded.keys() == sd.keys()
    assert all(torch.equal(loaded[key], x) for key, x in sd.items())


def test_numbers_of_numpy_beside_weights(tmp_path):
    numpy = pytest.importorskip("numpy")
    sd = make().clip.state_dict()
    beside = dict(loss=numpy.float64(1.5), step=numpy.int64(3), best=numpy.float32(2),
                  name=numpy.str_("run"), day=numpy.datetime64("2024-02-29"))
    torch.save(dict(state_dict=sd, **beside), tmp_path / "w.pt")
    assert load_clip(tmp_path / "w.pt").state_dict().keys() == sd.keys()
    assert read_weights(tmp_path / "w.pt")["loss"] == 1.5


@pytest.mark.parametrize("hold", [
    lambda clip: dict(state_dict=clip.state_dict(), args=argparse.Namespace(lr=1)),
    lambda clip: dict(model_state_dict=clip.state_dict(), args=argparse.Namespace(lr=1)),
    lambda clip: dict(model=clip, epoch=1),
    lambda clip: clip])
def test_other_objects_beside_weights_name_the_line_that_makes_a_clean_file(
    tmp_path, monkeypatch, hold
):
    clip = make().clip
    torch.save(hold(clip), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="Python objects.*if you trust it") as error:
        load_clip(tmp_path / "w.pt")
    line = str(error.value).split('python -c "')[1].rsplit('"', 1)[0]
    monkeypatch.chdir(tmp_path)
    exec(line, {})
    assert load_clip("clean.pt").state_dict().keys() == clip.state_dict().keys()


# ---- folders and names ----

@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_sharded_weights(tmp_path, form):
    sd = {key: x.clone() for key, x in make().clip.state_dict().items()}
    names = sorted(sd)
    stem = "model" if form == "safetensors" else "pytorch_model"
    places = {}
    for k in range(2):
        part = {name: sd[name] for name in names[k::2]}
        file = f"{stem}-0000{k + 1}-of-00002.{form}"
        (save_file if form == "safetensors" else torch.save)(part, tmp_path / file)
        places |= dict.fromkeys(part, file)
    index = tmp_path / f"{stem}.{form}.index.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map=places)))
    for name in (tmp_path, index):
        assert load_clip(name).state_dict().keys() == sd.keys()
    index.write_text(json.dumps(dict(weight_map={"a": "../elsewhere.bin"})))
    with pytest.raises(WeightsError):
        load_clip(index)
    (tmp_path / file).unlink()
    index.write_text(json.dumps(dict(weight_map=places)))
    with pytest.raises(WeightsError, match=f"{file}: no such file"):
        load_clip(tmp_path)


def test_names_in_other_spellings(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "fetch", lambda url, sha256: url.rsplit("/", 1)[1])
    for name in ("ViT-B/32", "ViT-B-32", "openai/clip-vit-base-patch32"):
        assert find_weights(name) == "ViT-B-32.pt"
    assert find_weights("openai/clip-vit-large-patch14") == "ViT-L-14.pt"
    (tmp_path / "ViT-B-32").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert find_weights("ViT-B-32").name == "ViT-B-32"  # a file of that name comes first
