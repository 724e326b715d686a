"""study/bench.py at small sizes, and the pictures of study/figures.py."""
import re
import sys

import figures
import pytest
import torch

from lib.common import program
from lib.shapes import render_shapes, tiny_clip
from lib.weights import save_checkpoint
from tmass import TMASS

CAPTION = "a red star"
LOG = "step,epoch,loss,val_R1\n1,1,3.5,\n2,1,2.5,50\n"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """The name of a checkpoint with random weights, beside its log and six videos."""
    folder = tmp_path_factory.mktemp("study")
    root = folder / "shapes"
    render_shapes(root, train=1, val=1, test=4, workers=0)
    torch.manual_seed(0)
    clip, tokenizer = tiny_clip([CAPTION])
    config = dict(data="shapes", root=str(root))
    for radius in ("linear", "none"):
        model = TMASS(clip, frames=2, radius=radius)
        save_checkpoint(folder / f"{radius}.pt", model, tokenizer, config)
    (folder / "linear.log.csv").write_text(LOG)
    return f"{folder}/linear.pt"


@pytest.mark.slow
@pytest.mark.parametrize("bench, rows", [
    ("gpu", "CPU: loss | 0.0e+00|scoring|literal|towers|training step|DataLoader|keeps up"),
    ("search", "search of 5000 pieces"),
    ("moment", "32 captions of 4 videos"),
])
def test_bench(run, ckpt, bench, rows):
    options = ["--device", "cpu", "--small", "--ckpt", ckpt]
    done = run("study/bench.py", bench, *options, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "SMALL SIZES\n\n| what | measured |" in done.stdout
    for what in rows.split("|"):
        assert what in done.stdout


def draw(*command):
    """-> exit status"""
    try:
        return program(lambda: figures.main(command))
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("command, said", [
    (["curves"], "loss|val_R1|step"),
    (["pairs"], "32 pairs|96 pairs"),
    (["mass"], "for the right video and|wider cloud"),
    (["mass", "--text", CAPTION], f"“{CAPTION}”|for the nearest video and"),
])
def test_figures(ckpt, tmp_path, command, said):
    pytest.importorskip("matplotlib")
    svg = tmp_path / "a.svg"
    assert draw(*command, "--ckpt", ckpt, "--out", str(svg)) == 0
    text = re.sub("<.*?>", "", svg.read_text(), flags=re.S)
    for words in said.split("|"):
        assert words in " ".join(text.split())


@pytest.mark.parametrize("command, word", [
    ("mass --out mass.pdf", ".svg or .png"),
    ("curves --ckpt none.pt --out a.svg", "none.log.csv"),
    ("mass --ckpt none.pt --out a.svg", "radius"),
])
def test_refused(ckpt, monkeypatch, capsys, command, word):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ckpt.rpartition("/")[0])
    assert draw(*command.split()) == 2
    assert word in capsys.readouterr().err


def test_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    assert draw("curves", "--out", "a.svg") == 2
    assert "pip install matplotlib" in capsys.readouterr().err
