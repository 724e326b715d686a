"""lib/weights.py: checkpoints of ours, whole or not at all, and what is said of damaged ones."""
import math
import os
import resource

import pytest
import torch

from clip_model import CLIP, Tokenizer
from lib import weights
from lib.common import DataError, WeightsError
from lib.weights import load_checkpoint, not_finite, save_checkpoint
from tmass import TMASS

SIZES = dict(
    embed_dim=64, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
    context_length=16, vocab_size=514, text_width=64, text_layers=1)


def make(**method):
    """A small model whose weights are all away from where they start."""
    torch.manual_seed(0)
    model = TMASS(CLIP(**SIZES), **{"frames": 4, "dropout": 0.0, **method}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def refuses(path, message):
    """load_checkpoint says so, in one line. -> the line"""
    with pytest.raises(WeightsError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- writing ----

def test_checkpoint_round_trip(tmp_path):
    torch.manual_seed(0)
    clip = CLIP(**dict(SIZES, vocab_size=516))
    model = TMASS(clip, frames=4, dropout=0.0, radius="scaled", heads=2).eval()
    path = tmp_path / "m.pt"
    tokenizer = Tokenizer(["a b", "c d"], 16)
    save_checkpoint(path, model, tokenizer, dict(data="shapes", seed=3), step=7)
    again, its_tokenizer, config = load_checkpoint(path)
    assert config == dict(data="shapes", seed=3)
    assert its_tokenizer.merges == tokenizer.merges and its_tokenizer.context_length == 16
    assert again.config == model.config and not again.training
    t, f = torch.randn(3, 64), torch.randn(3, 4, 64)
    assert torch.equal(again.score(t, f), model.score(t, f))
    assert torch.load(path, weights_only=True)["step"] == 7
    assert os.listdir(tmp_path) == ["m.pt"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint that is there already, and another file beside it. -> (path, its bytes)"""
    (tmp_path / "m.pt.part").write_text("the user's")
    save_checkpoint(tmp_path / "m.pt", make(), Tokenizer((), 16), {}, step=1)
    return tmp_path / "m.pt", (tmp_path / "m.pt").read_bytes()


def assert_left_as_it_was(path, content):
    assert path.read_bytes() == content
    assert sorted(os.listdir(path.parent)) == ["m.pt", "m.pt.part"]
    assert (path.parent / "m.pt.part").read_text() == "the user's"


def test_a_save_that_the_system_cuts_short_keeps_the_last_good_file(saved):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # Python ignores its signal
    try:
        with pytest.raises(WeightsError,
                           match="cannot write checkpoint .*m.pt: .*too large.* is intact"):
            save_checkpoint(saved[0], make(), Tokenizer((), 16), {}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_left_as_it_was(*saved)


def test_an_interrupted_save_keeps_the_last_good_file(saved, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved[0], make(), Tokenizer((), 16), {}, step=2)
    assert_left_as_it_was(*saved)


@pytest.mark.parametrize("size", [0, 3_000_000])
def test_a_full_disk_is_called_one(saved, monkeypatch, size):
    """/dev/full answers every write as a full disk does; torch makes another error of it."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    full = lambda path, mode: open("/dev/full", mode)
    monkeypatch.setattr(weights, "open", full, raising=False)
    with pytest.raises(WeightsError, match="cannot write .*the disk is full; .* is intact"):
        save_checkpoint(saved[0], make(), Tokenizer((), 16), {}, optimizer=torch.zeros(size))
    assert_left_as_it_was(*saved)


# ---- weights that are not finite ----

@pytest.mark.parametrize("name, value", [
    ("pool.q.weight", math.nan), ("clip.ln_final.bias", math.inf)])
def test_weights_that_are_not_finite_are_not_saved_and_warned_of(saved, capsys, name, value):
    path, content = saved
    model = make()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(WeightsError, match=f"not written.*not finite .{name}.*is intact"):
        save_checkpoint(path, model, Tokenizer((), 16), {})
    with pytest.raises(WeightsError, match="not finite"):
        save_checkpoint(path, make(), Tokenizer((), 16), {}, weights=model.state_dict())
    assert_left_as_it_was(path, content)
    state = torch.load(path, weights_only=True)
    torch.save(dict(state, model=model.state_dict()), path.parent / "nan.pt")
    load_checkpoint(path.parent / "nan.pt")
    assert f"nan.pt: weights that are not finite ({name})" in capsys.readouterr().out


def test_large_weights_are_finite_though_their_sum_is_not(saved, capsys):
    model = make()
    with torch.no_grad():
        model.pool.q.weight.fill_(3e38)
    save_checkpoint(saved[0], model, Tokenizer((), 16), {})
    load_checkpoint(saved[0])
    assert "finite" not in capsys.readouterr().out


def test_finite_weights_are_seen_to_be_in_one_wait_for_the_device(monkeypatch):
    """A truth value of a tensor is what a GPU is waited for."""
    waits = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: waits.append(x) or x.item() != 0)
    good = {"a": torch.ones(3), "b": torch.full((2,), 6e4).half(), "c": torch.arange(4)}
    assert not_finite(good) == [] and len(waits) == 1
    assert not_finite(good | {"d": torch.tensor([math.inf, -math.inf])}) == ["d"]


# ---- reading ----

@pytest.mark.parametrize("write, message", [
    (lambda path: None, "m.pt: no such file, and none of the names ViT-B/32"),
    (lambda path: path.write_bytes(b""), "m.pt: no readable weights"),
    (lambda path: path.write_text("hello\n"), "m.pt: no readable weights"),
    (lambda path: torch.save({"weight": torch.ones(2)}, path),
     "m.pt: not a checkpoint of train.py.*not a CLIP"),
    (lambda path: torch.save({"state_dict": 5}, path),
     "m.pt: not a checkpoint of train.py.*not: state_dict"),
])
def test_files_that_are_no_checkpoint_are_named(tmp_path, write, message):
    write(tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", message)


def test_a_checkpoint_that_was_cut_short(tmp_path):
    path = tmp_path / "m.pt"
    save_checkpoint(path, make(), Tokenizer((), 16), {})
    path.write_bytes(path.read_bytes()[:-5000])
    refuses(path, "m.pt")


def setting(section, **values):
    """A change of a checkpoint's content: these values in one of its parts."""
    return lambda content: content[section].update(values)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("merges"), "it has no 'merges'"),
    (lambda c: c.pop("config"), "it has no 'config'"),
    (lambda c: c.update(version=99), "version 99"),
    (lambda c: c.update(clip=7), "m.pt"),
    (lambda c: c.update(model=5), "m.pt"),
    (setting("clip", shape=3), "shape"),
    (setting("clip", vision_heads="four"), "m.pt"),
    (setting("tmass", temperature=3), "temperature"),
    (setting("tmass", pooling="max"), "'max': choose"),
    (setting("tmass", heads=0), "heads"),
    (setting("tmass", frames="four"), "m.pt"),
    (setting("tmass", frames=9), "size mismatch for radius.linear.weight"),
    (lambda c: c["model"].pop("pool.ln1.bias"), 'Missing key.*"pool.ln1.bias"'),
    (lambda c: c["model"].update(new=torch.ones(1)), 'Unexpected key.*"new"'),
    (lambda c: c.update(merges=["a"]), "'a' is no merge"),
])
def test_a_damaged_checkpoint_is_one_line(tmp_path, change, message):
    path = tmp_path / "m.pt"
    save_checkpoint(path, make(), Tokenizer((), 16), {})
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    line = refuses(path, message)
    assert line.startswith(f"{path}: a checkpoint of train.py that can't be used: ")
    assert line.endswith("; use the program that wrote it, or train again")


def test_zeros_in_a_tensor_are_found(tmp_path):
    path = tmp_path / "m.pt"
    save_checkpoint(path, make(), Tokenizer((), 16), {})
    body = bytearray(path.read_bytes())
    at = body.index(make().pool.q.weight.detach().numpy().tobytes()) + 500
    body[at:at + 100] = bytes(100)
    path.write_bytes(body)
    refuses(path, "m.pt: damaged, the checksum of .* is wrong: get the file again")


def test_too_little_memory_is_called_that(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(dict(x=torch.zeros(50_000_000)), path)
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 50_000_000, limits[1]))
    try:
        with pytest.raises(DataError, match="m.pt: no room to load it .*memory.*: use a smaller"):
            weights.read_weights(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_file_that_the_system_can_not_read_is_not_called_truncated():
    path = "/proc/self/mem"  # its beginning is no memory of any process
    if not os.path.exists(path):
        pytest.skip(f"needs {path}")
    refuses(path, f"{path}: no readable weights: Input/output error")


@pytest.mark.parametrize("scale", [torch.zeros(2, 2), torch.zeros(0, 2)])
def test_a_temperature_of_another_size(tmp_path, scale):
    torch.save(make().clip.state_dict() | dict(logit_scale=scale), tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", "m.pt: .*size mismatch for logit_scale")


@pytest.mark.parametrize("make_file, message", [
    (os.mkfifo, "m.pt: a pipe or a device; give the name of a plain file"),
    (os.mkdir, "m.pt: a folder; name the weights file in it"),
])
def test_a_pipe_or_a_folder_is_called_that(tmp_path, soon, make_file, message):
    make_file(tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", message)
