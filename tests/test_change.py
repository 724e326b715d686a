"""README's table "Change it": each row is done here, in as few lines as it says.

An encoder is added in test_encoders.py.
"""
import csv
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, T, features, noise_video, small_clip
from torch import nn

import data
import eval as ev
import tmass
import train
from clip_model import Tokenizer
from lib import exact
from lib.video import Segment
from lib.weights import load_checkpoint, save_checkpoint
from tmass import TMASS


class CentralRadius(nn.Module):
    """R = exp(S·c), c the larger, the nearer to the middle; it counts on tensors of its own."""

    def __init__(self, frames, width):
        super().__init__()
        self.c = torch.hann_window(frames + 2)[1:-1]
        self.register_buffer("most", torch.tensor(2.0), persistent=False)
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("counts", torch.ones(frames, dtype=torch.bool))
        self.dropout = nn.Dropout(0.5)

    def forward(self, S):
        R = (self.dropout(S)[..., self.counts] @ self.c / self.calls).exp()
        return R.minimum(self.most)[..., None]


class MaxPool(nn.Module):
    """v = max_j f_j."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, t, f):
        return f.amax(1).expand(len(t), -1, -1)


@pytest.mark.parametrize("choices, option, added", [
    ("RADII", "radius", CentralRadius), ("POOLINGS", "pooling", MaxPool)])
def test_a_radius_or_a_pooling_is_a_class_and_an_entry(
        choices, option, added, monkeypatch, tmp_path):
    monkeypatch.setitem(getattr(tmass, choices), "new", added)
    model = TMASS(small_clip(), frames=T, **{option: "new"}).eval()
    t, f = features(9, 5)
    scores = model.score(t, f)
    assert (scores - model.score(t, f, 0)).abs().max() > 1e-3  # the mass counts
    model.losses(t[:5], f)["loss"].backward()
    save_checkpoint(tmp_path / "m.pt", model, Tokenizer((), 16), {})
    again, _, _ = load_checkpoint(tmp_path / "m.pt")
    assert torch.equal(again.train().score(t, f), scores)  # nothing is dropped
    assert (exact.score(again, t, f) - scores).abs().max() < 2e-6
    assert train.parser().parse_args([f"--{option}", "new"])


def test_a_data_set_is_a_reader_and_an_entry(monkeypatch, tmp_path):
    def read_films(root, split, find):
        for line, text in enumerate((root / f"{split}.txt").read_text().splitlines(), 1):
            name, caption = text.split(" ", 1)
            yield Segment(str(root / name)), caption, f"{split}.txt, row {line}"

    monkeypatch.setitem(data.DATASETS, "films", data.DataSet(read_films, has_val=False))
    for split in ("train", "test"):
        lines = []
        for k in range(4):
            noise_video(tmp_path / f"{split}{k}.mp4", k)
            lines.append(f"{split}{k}.mp4 a noise of kind {k}")
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    films = ["--data", "films", "--root", str(tmp_path)]
    on_cpu = ["--workers", "0", "--device", "cpu"]
    out = str(tmp_path / "films.pt")
    # Without a recipe of its own, it trains with the default one.
    small = ["--clip", "tiny", "--frames", "2", "--batch", "2", "--epochs", "1"]
    assert train.main([*films, *small, *on_cpu, "--out", out]) == 0
    assert ev.main(["--ckpt", out, *on_cpu]) == 0
    assert data.main(["check", *films]) == 0


CHANGES = [  # of a setting and a loss: file, old line, what stands there then
    ("tmass.py", 'support_video="matched"):', 'support_video="matched", pull_weight=0.0):'),
    ("tmass.py", "        self.support_video = support_video\n",
     "        self.support_video = support_video\n        self.pull_weight = pull_weight\n"),
    ("tmass.py", "        return dict(loss=loss,",
     "        loss = loss + self.pull_weight * (1 - cosine(t, v_sup)).mean()\n"
     "        return dict(loss=loss,"),
    ("train.py", '    g.add_argument("--ce-weight"',
     '    g.add_argument("--pull-weight", type=weight, help="of a pull towards the video")\n'
     '    g.add_argument("--ce-weight"'),
]


@pytest.mark.slow
def test_a_setting_and_a_loss_are_a_few_lines(tmp_path):
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name, old, new in CHANGES:
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1, old
        (tmp_path / name).write_text(text.replace(old, new))

    def run_copy(*words):
        command = [sys.executable, *words, "--workers", "0", "--device", "cpu"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    rows = ["video,caption,split"]
    for k in range(8):
        noise_video(tmp_path / f"{k}.mp4", k)
        rows.append(f"{k}.mp4,the number {k},{'train' if k < 4 else 'test'}")
    (tmp_path / "my.csv").write_text("\n".join(rows))
    run_copy("train.py", "--data", "my.csv", "--clip", "tiny", "--frames", "2", "--batch", "2",
             "--epochs", "1", "--pull-weight", "5", "--log-every", "1")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content["tmass"]["pull_weight"] == content["config"]["pull_weight"] == 5
    with open(tmp_path / "model.log.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["loss"]) > float(row["stochastic"]) + 0.8 * float(row["support"]) + 0.1
    assert "t2v" in run_copy("eval.py")
