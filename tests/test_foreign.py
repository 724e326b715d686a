"""CLIPs as others keep them: names and downloads, transformers' folders, wrappers, strangers.

transformers is the yardstick, on random weights.
"""
import functools
import hashlib
import http.server
import json
import os
import threading

import pytest
import torch
from conftest import hf_clip, shaken, small_clip
from safetensors.torch import save_file

import data
from clip_model import CLIP, MEAN, STD
from lib import weights
from lib.common import UserError, WeightsError
from lib.weights import load_checkpoint, load_clip, to_openai_names


def batch(tokens=600):
    """Random pixels, and ids of three texts whose end is the largest id."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, tokens - 2, (3, 77), generator=g)
    for row, length in zip(ids, (5, 40, 77)):
        row[length - 1:] = 0
        row[length - 1] = tokens - 1
    return torch.randint(0, 256, (3, 3, 32, 32), generator=g, dtype=torch.uint8), ids


@torch.no_grad()
def assert_same(clip, hf, mean=MEAN, std=STD, tokens=600):
    pixels, ids = batch(tokens)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    images = hf.get_image_features((pixels / 255 - mean) / std)
    for ours, theirs in ((clip.encode_image(pixels), images),
                         (clip.encode_text(ids), hf.get_text_features(ids))):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


# ---- Hugging Face's form ----


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


@pytest.mark.parametrize("heads, eps, act", [((4, 2), 1e-5, "quick_gelu"), ((1, 2), 1e-2, "gelu")])
def test_a_folder_of_save_pretrained_is_read_whole(tmp_path, capsys, heads, eps, act):
    more = dict(layer_norm_eps=eps, hidden_act=act)
    vision, text = (dict(more, num_attention_heads=count) for count in heads)
    hf = hf_clip(600, vision, text)
    hf.save_pretrained(tmp_path)
    mean = (0.5, 0.4, 0.3)
    std = (0.5, 0.5, 0.6)
    edit(tmp_path / "preprocessor_config.json", image_mean=mean, image_std=std, resample=2,
         size=dict(height=32, width=32))
    clip = load_clip(str(tmp_path))
    assert_same(clip, hf, mean, std)
    frames = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    squashed = data.test_transform(32, "squash", "bilinear")(frames)
    assert torch.equal(data.transform_for(clip)(frames), squashed)
    assert f"mean {mean}" in capsys.readouterr().out
    again = CLIP(**clip.config)
    assert again.config == clip.config


@pytest.mark.parametrize("file, values, message", [
    ("config", dict(vision_config__hidden_act="gelu"), "gelu.* for images and .*quick_gelu.* for"),
    ("config", dict(text_config__layer_norm_eps=1e-3), "0.001"),
    ("config", dict(vision_config__hidden_act="relu"), "hidden_act is 'relu', expected one of"),
    ("config", dict(vision_config__num_attention_heads="x"), "not a CLIP"),
    ("config", dict(vision_config__image_size=48), "images of .*48.*, its weights for 32"),
    ("config", dict(model_type="siglip"), "model_type is 'siglip'.*give open_clip:NAME"),
    ("config", dict(vision_config=5), "not a CLIP"),
    ("preprocessor_config", dict(size=dict(shortest_edge=36), crop_size=32), "images of .*36"),
    ("preprocessor_config", dict(resample=0), "resample is 0"),
    ("preprocessor_config", dict(do_normalize=False), "do_normalize is False"),
    ("preprocessor_config", dict(image_mean=[0.5]), "not a CLIP"),
    ("preprocessor_config", dict(image_std=5), "not a CLIP"),
    ("config", None, "config.json: not valid JSON"),
])
def test_what_the_settings_ask_for_and_clip_can_not_do(tmp_path, file, values, message):
    hf_clip(600).save_pretrained(tmp_path)
    path = tmp_path / f"{file}.json"
    if values:
        edit(path, **values)
    else:
        path.write_text("{")
    with pytest.raises(UserError, match=message) as error:
        load_clip(tmp_path)
    assert "\n" not in str(error.value)


def test_sharded_weights(tmp_path):
    hf = hf_clip(600)
    names = sorted(hf.state_dict())
    places = {}
    for k in range(2):
        part = {name: hf.state_dict()[name] for name in names[k::2]}
        file = f"model-0000{k + 1}-of-00002.safetensors"
        save_file(part, tmp_path / file)
        places |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map=places)))
    for name in (tmp_path, index):
        assert_same(load_clip(name), hf)
    (tmp_path / file).unlink()
    for places in (places, {"a": "../elsewhere.bin"}):
        index.write_text(json.dumps(dict(weight_map=places)))
        with pytest.raises(WeightsError, match=str(tmp_path)):
            load_clip(tmp_path)


# ---- files of weights ----


def put(prefix):
    return lambda sd: {prefix + key: x for key, x in sd.items()}


def beside_numbers(sd):
    numpy = pytest.importorskip("numpy")
    return dict(state_dict=sd, loss=numpy.float64(1.5), step=numpy.int64(3), best=numpy.float32(2))


WRAPPED = {
    "ddp compiled": put("_orig_mod.module."),
    "lightning": lambda sd: dict(state_dict=put("model.")(sd), epoch=3, loops=[1]),
    "deepspeed": lambda sd: dict(module=sd, optimizer={}),
    "fsdp": lambda sd: {key.replace("resblocks.", "resblocks._fsdp_wrapped_module."): x
                        for key, x in put("_fsdp_wrapped_module.")(sd).items()},
    "in each other": lambda sd: dict(model=dict(model_state_dict=put("module.")(sd))),
    "averaged": lambda sd: dict(put("module.")(sd), n_averaged=torch.tensor(3)),
    "logit_scale": lambda sd: sd | dict(logit_scale=sd["logit_scale"].view(1)),
    "half": lambda sd: {key: x.half() for key, x in sd.items()},
    "numpy": beside_numbers,
    "model_ema": lambda sd: dict(model=sd, model_ema=dict(module={}), optimizer=dict(state={})),
    "head": lambda sd: dict(state_dict=sd, head=dict(weight=torch.zeros(1))),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_come_off(tmp_path, wrapper, capsys):
    sd = small_clip().state_dict()
    torch.save(WRAPPED[wrapper](sd), tmp_path / "w.pt")
    clip = load_clip(tmp_path / "w.pt")
    assert clip.config["quick_gelu"]
    for name, x in clip.state_dict().items():
        exact = sd[name].half().float() if wrapper == "half" else sd[name]
        assert torch.equal(x, exact) and x.dtype == torch.float32
    beside = wrapper in ("model_ema", "head")
    assert (f" is loaded, not {wrapper}" in capsys.readouterr().out) == beside


LORA = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize("name, change, message", [
    ("w.pt", {"extra.weight": torch.zeros(1)}, 'Unexpected key.*"extra.weight"'),
    ("w.pt", {"ln_final.bias": None}, 'Missing key.*"ln_final.bias"'),
    ("w.pt", {"visual.ln_pre.bias": torch.zeros(3)}, "size mismatch for visual.ln_pre.bias"),
    ("w.pt", {"logit_scale": torch.zeros(0, 2)}, "size mismatch for logit_scale"),
    ("w.pt", {"visual.ln_pre.bias": "x"}, "visual.ln_pre.bias"),
    ("w.pt", {"visual.ln_pre.bias": torch.zeros(64).long()}, "visual.ln_pre.bias"),
    ("w.pt", {LORA: torch.zeros(1)}, "adapter: .*merge_and_unload"),
    ("open_clip_pytorch_model.bin", {}, "open_clip:NAME=.*pytorch_model.bin"),
    ("vit_b_32-quickgelu-laion400m_e31.pt", {}, "open_clip:NAME="),
    ("beside/w.pt", {}, "open_clip:NAME=.*w.pt"),
])
def test_what_is_not_a_clip_alone_is_named(tmp_path, name, change, message):
    sd = small_clip().state_dict() | change
    path = tmp_path / name
    if path.parent != tmp_path:
        path.parent.mkdir()
        (path.parent / "open_clip_config.json").write_text("{}")
    torch.save({key: x for key, x in sd.items() if x is not None}, path)
    with pytest.raises(WeightsError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")


# ---- OpenAI's names and archives ----


class WritesWhenLoaded(torch.nn.Module):
    """TorchScript runs __setstate__ of what it loads."""

    def __init__(self, path):
        super().__init__()
        self.path: str = path
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self):
        return self.weight

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path, self.weight, self.training = state
        torch.save(self.weight, self.path)


def archive(clip):
    """A CLIP as OpenAI's files are: TorchScript, half precision, sizes."""
    holder = torch.nn.Module()
    sizes = dict(input_resolution=32, context_length=77, vocab_size=600)
    for name, x in (*clip.state_dict().items(), *sizes.items()):
        *modules, last = name.split(".")
        place = holder
        for module in modules:
            if module not in dict(place.named_children()):
                place.add_module(module, torch.nn.Module())
            place = place.get_submodule(module)
        place.register_buffer(last, torch.as_tensor(x).half() if last not in sizes
                              else torch.tensor(x))
    return torch.jit.script(holder)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_nothing_in_an_archive_is_run(tmp_path):
    victim = tmp_path / "victim"
    torch.jit.script(WritesWhenLoaded(str(victim))).save(tmp_path / "w.pt")
    victim.unlink(missing_ok=True)
    torch.jit.load(tmp_path / "w.pt")
    assert victim.exists()  # so it would be
    victim.write_text("the user's")
    with pytest.raises(WeightsError, match="w.pt: a TorchScript archive.*could run any code"):
        load_checkpoint(tmp_path / "w.pt")
    assert victim.read_text() == "the user's"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real server, whose file is as OpenAI's ViT-B/32. -> (its path, CLIP, cache folder)"""
    clip = CLIP.from_state_dict(to_openai_names(hf_clip(600).state_dict()
                                                | dict(logit_scale=torch.tensor(2.5))))
    with pytest.warns():
        archive(shaken(clip)).save(tmp_path / "served.pt")
    sha256 = hashlib.sha256((tmp_path / "served.pt").read_bytes()).hexdigest()
    file = tmp_path / sha256 / "ViT-B-32.pt"
    file.parent.mkdir()
    (tmp_path / "served.pt").rename(file)
    monkeypatch.setitem(weights.MODELS, "ViT-B/32", ("ViT-B-32.pt", sha256))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TMASS_CACHE", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(weights, "OPENAI_URL", f"http://127.0.0.1:{httpd.server_port}")
        yield file, clip, tmp_path / "cache"
        httpd.shutdown()


def test_a_name_is_downloaded_once_and_then_used_offline(server, capsys):
    file, clip, cache = server
    loaded = load_clip("ViT-B/32")
    pixels, ids = batch()
    with torch.no_grad():
        for ours, theirs in ((loaded.encode_image(pixels), clip.encode_image(pixels)),
                             (loaded.encode_text(ids), clip.encode_text(ids))):
            assert (ours - theirs).norm() < 5e-3 * theirs.norm()  # half precision
    assert loaded.config["quick_gelu"] and "downloading http" in capsys.readouterr().out
    assert os.listdir(cache) == ["ViT-B-32.pt"]
    file.unlink()
    for name in ("ViT-B-32", "openai/clip-vit-base-patch32", cache / "ViT-B-32.pt"):
        load_clip(name)


@pytest.mark.parametrize("fault, message", [("other", "invalid hash"), ("gone", "404")])
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(server, fault, message, capsys):
    file, _, cache = server
    body = file.read_bytes()
    cache.mkdir()
    (cache / "ViT-B-32.pt").write_bytes(body[:1000])  # as an interrupted wget leaves it
    file.unlink()
    if fault == "other":
        file.write_bytes(body[:-1])
    with pytest.raises(WeightsError, match=message) as error:
        load_clip("ViT-B/32")
    sha256 = weights.MODELS["ViT-B/32"][1]
    assert f"put the file with SHA-256 {sha256} at {cache}" in str(error.value)
    assert "ViT-B-32.pt: wrong SHA-256" in capsys.readouterr().out
    file.write_bytes(body)
    load_clip("ViT-B/32")
    assert (cache / "ViT-B-32.pt").read_bytes() == body


def test_a_clip_alone_is_used_zero_shot(cache, tmp_path):
    hf = hf_clip()
    save_file(hf.state_dict(), tmp_path / "clip.safetensors")
    model, tokenizer, config = load_checkpoint(tmp_path / "clip.safetensors")
    assert config == dict(zero_shot=True, frames=12) and not model.training
    assert tokenizer.encode("a diagram") == [320, 22697] and tokenizer.context_length == 77
    assert (model.config["pooling"], model.config["radius"]) == ("query", "none")
    assert_same(model.clip, hf, tokens=49408)
    torch.save(small_clip().state_dict(), tmp_path / "small.pt")
    with pytest.raises(WeightsError, match="small.pt: a CLIP of 514 tokens.*has 49408"):
        load_checkpoint(tmp_path / "small.pt")
