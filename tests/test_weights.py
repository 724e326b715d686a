"""lib/weights.py: checkpoints of ours, whole or not at all, and what is said of other files."""
import math
import os
import resource

import pytest
import torch
from conftest import T, features, small_model

from clip_model import Tokenizer
from lib.common import DataError, WeightsError
from lib.weights import load_checkpoint, not_finite, read_weights, save_checkpoint
from tmass import TMASS


def save(path, model=None, **state):
    save_checkpoint(path, model or small_model(), Tokenizer((), 16), dict(seed=3), **state)


def refuses(path, message):
    """load_checkpoint says so, in one line. -> the line"""
    with pytest.raises(WeightsError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- writing ----

@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_comes_back(tmp_path, old):
    """And so does one written before encoders had names, and runs a number of steps."""
    model = small_model(radius="scaled", heads=2)
    path = tmp_path / "m.pt"
    tokenizer = Tokenizer(["a b", "c d"], 16)
    model.clip.token_embedding = torch.nn.Embedding(516, 64)
    save_checkpoint(path, model, tokenizer, dict(seed=3), step=7, total=9, finished=False)
    if old:
        content = torch.load(path, weights_only=True)
        del content["encoder"], content["total"]
        torch.save(content, path)
    again, its_tokenizer, config = load_checkpoint(path)
    assert config == dict(seed=3, unfinished="step 7" + ("" if old else " of 9"))
    assert its_tokenizer.merges == tokenizer.merges and its_tokenizer.context_length == 16
    assert again.config == model.config and not again.training
    t, f = features(3, 3)
    assert torch.equal(again.score(t, f), model.score(t, f))
    assert os.listdir(tmp_path) == ["m.pt"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint that is there already, and another file beside it. -> (path, its bytes)"""
    (tmp_path / "m.pt.part").write_text("the user's")
    save(tmp_path / "m.pt")
    return tmp_path / "m.pt", (tmp_path / "m.pt").read_bytes()


def assert_left_as_it_was(path, content):
    assert path.read_bytes() == content
    assert sorted(os.listdir(path.parent)) == ["m.pt", "m.pt.part"]


def test_a_save_that_the_system_cuts_short_keeps_the_last_good_file(saved):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # Python ignores its signal
    try:
        with pytest.raises(WeightsError, match="cannot write .*m.pt: .*too large.* is intact"):
            save(saved[0], step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_left_as_it_was(*saved)


def test_an_interrupted_save_keeps_the_last_good_file(saved, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(saved[0], step=2)
    assert_left_as_it_was(*saved)


@pytest.mark.parametrize("name, value", [
    ("pool.q.weight", math.nan), ("clip.ln_final.bias", math.inf)])
def test_weights_that_are_not_finite_are_not_saved_and_warned_of(saved, capsys, name, value):
    path, content = saved
    model = small_model()
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(WeightsError, match=f"not written.*not finite .{name}.*is intact"):
        save(path, model)
    with pytest.raises(WeightsError, match="not finite"):
        save(path, weights=model.state_dict())
    assert_left_as_it_was(path, content)
    state = torch.load(path, weights_only=True)
    torch.save(dict(state, model=model.state_dict()), path.parent / "nan.pt")
    load_checkpoint(path.parent / "nan.pt")
    assert f"nan.pt: weights that are not finite ({name})" in capsys.readouterr().out


def test_large_weights_are_finite_though_their_sum_is_not():
    good = {"a": torch.full((9,), 3e38), "b": torch.full((2,), 6e4).half(), "c": torch.arange(4)}
    assert not_finite(good) == []
    assert not_finite(good | {"d": torch.tensor([math.inf, -math.inf])}) == ["d"]


# ---- reading ----

def setting(section, **values):
    """A change of a checkpoint's content: these values in one of its parts."""
    return lambda content: content[section].update(values)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("merges"), "it has no 'merges'"),
    (lambda c: c.pop("config"), "it has no 'config'"),
    (lambda c: c.update(config=7), "m.pt"),
    (lambda c: c.update(version=99), "version 99"),
    (lambda c: c.update(clip=7), "m.pt"),
    (lambda c: c.update(encoder="colours"), "its encoder colours is none of clip, open_clip"),
    (lambda c: c.update(model=5), "m.pt"),
    (setting("clip", shape=3), "shape"),
    (setting("clip", vision_heads=1.0), "m.pt"),
    (setting("clip", mean=5), "m.pt"),
    (setting("tmass", temperature=3), "temperature"),
    (setting("tmass", pooling="max"), "'max': choose"),
    (setting("tmass", prior_std="wide"), "m.pt"),
    (setting("tmass", heads=0), "heads"),
    (setting("tmass", frames=float(T)), "m.pt"),
    (setting("tmass", frames=9), "size mismatch for radius.linear.weight"),
    (lambda c: c["model"].pop("pool.ln1.bias"), 'Missing key.*"pool.ln1.bias"'),
    (setting("model", new=torch.ones(1)), 'Unexpected key.*"new"'),
    (setting("model", **{"clip.ln_final.bias": "x"}), "clip.ln_final.bias"),
    (setting("model", **{"clip.ln_final.bias": torch.zeros(64).to_sparse()}), "m.pt"),
    (lambda c: c.update(merges=["a"]), "'a' is no merge"),
    (lambda c: c.update(merges=["a b"] * 9), "out of range"),
])
def test_a_damaged_checkpoint_is_one_line(tmp_path, change, message):
    path = tmp_path / "m.pt"
    save(path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    line = refuses(path, message)
    assert line.startswith(f"{path}: a checkpoint of train.py that can't be used: ")
    assert line.endswith("; use the program that wrote it, or train again")


def damaged(path):
    """Zeros within a tensor, which torch does not notice."""
    save(path)
    body = bytearray(path.read_bytes())
    at = body.index(small_model().pool.q.weight.detach().numpy().tobytes()) + 500
    body[at:at + 100] = bytes(100)
    path.write_bytes(body)


def cut_short(path):
    save(path)
    path.write_bytes(path.read_bytes()[:-5000])


def in_itself(path):
    """A dict that holds itself."""
    content = {}
    content["model"] = content
    torch.save(content, path)


@pytest.mark.parametrize("write, message", [
    (lambda path: None, "no such file, and none of the names ViT-B/32"),
    (os.mkfifo, "no such file, or a pipe"),
    (os.mkdir, "a folder with none of model.safetensors"),
    (lambda path: path.write_bytes(b""), "no readable weights: truncated"),
    (lambda path: path.write_text("hello\n"), "no readable weights: truncated"),
    (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "no readable weights: truncated"),
    (cut_short, "no readable weights"),
    (damaged, "damaged, the checksum of .* is wrong: get the file again"),
    (lambda path: torch.save([1], path), "no readable weights: expected a dict"),
    (lambda path: torch.save({0: 1}, path), "no readable weights: expected a dict"),
    (lambda path: torch.save(dict(x=os.system), path), "Python objects.*save its state_dict"),
    (lambda path: torch.save(dict(weight=torch.ones(2)), path), "not a CLIP .*found weight"),
    (lambda path: torch.save(dict(state_dict=5), path), "not a CLIP .*found state_dict"),
    (in_itself, "not a CLIP"),
])
def test_files_that_are_no_checkpoint_are_one_line(tmp_path, soon, write, message):
    write(tmp_path / "m.pt")
    assert refuses(tmp_path / "m.pt", message).startswith(f"{tmp_path}/m.pt: ")


def test_too_little_memory_is_called_that(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(dict(x=torch.zeros(50_000_000)), path)
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 50_000_000, limits[1]))
    try:
        with pytest.raises(DataError, match="m.pt: no room to load it .*memory.*: use a smaller"):
            read_weights(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_settings_that_are_asked_for_count(tmp_path):
    """Another pooling and number of frames than in training, where no weights depend on them."""
    from lib.processes import ALONE
    from lib.weights import load_model

    save(tmp_path / "m.pt", small_model(radius="scaled"))
    ckpt = str(tmp_path / "m.pt")
    model, _, _ = load_model(ckpt, ALONE, "mean", 9, "uniform", 0.5)
    trained, _, _ = load_checkpoint(ckpt)
    wanted = TMASS(trained.clip, 9, "mean", radius="scaled", prior="uniform", prior_std=0.5)
    wanted.radius.load_state_dict(trained.radius.state_dict())
    t, f = features(3, 2, frames=9)
    assert model.frames == model.config["frames"] == 9 and not model.training
    assert torch.equal(model.score(t, f, 5), wanted.score(t, f, 5))
