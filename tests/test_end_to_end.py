"""What README promises, typed as README types it: train, evaluate and search on real mp4 files."""
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_readme import COMMANDS, README
from torchvision.io import write_jpeg


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A small `shapes` where README's commands look for it, and a model trained on it."""
    folder = tmp_path_factory.mktemp("newcomer")
    numbers = "--videos", 120, 10, 30
    assert run("lib/shapes.py", "--root", "data/shapes", *numbers, cwd=folder).returncode == 0
    done = run("train.py", "--pretrain", 100, "--epochs", 2, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_train_says_what_it_does_and_names_the_checkpoint(trained):
    folder, said = trained
    for line in (r"train +480 texts, 120 videos", r"val +10 texts", r"pretrain +100/100",
                 r"validation after epoch 2", r"test: t2v R@1 [\d.]+", r"checkpoint: model.pt"):
        assert re.search(line, said), (line, said)
    rows = (folder / "model.log.csv").read_text().splitlines()
    assert rows[0].startswith("step,epoch,loss") and len(rows) > 3


def test_evaluation_is_well_above_chance_and_repeats_itself(trained, run):
    folder, said = trained
    results = []
    for name in ("a.json", "b.json"):
        done = run("eval.py", "--ckpt", "model.pt", "--json", name, cwd=folder)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((folder / name).read_text()))
    first, again = results
    assert first["t2v"] == again["t2v"] and (first["videos"], first["texts"]) == (30, 240)
    assert first["t2v"]["R1"] > 20 and first["t2v"]["R5"] > 50  # chance: 3.3 and 17
    assert f"{first['t2v']['R1']:.1f}" in re.search(r"test: t2v R@1 ([\d.]+)", said)[1]
    assert "ceiling" in done.stdout


@pytest.mark.slow
def test_search_finds_what_was_asked_for(trained, run):
    folder, _ = trained
    lines = (folder / "data/shapes/captions.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines if line.endswith(",test")]
    rows = rows[::8]  # one caption per video
    asked = [row for row in rows if len(row) == 3][:10]  # captions without a comma
    queries = [row[1] for row in asked]
    (folder / "gallery").mkdir(exist_ok=True)
    for row in rows:
        shutil.copy(folder / "data/shapes" / row[0], folder / "gallery")
    gallery = "--ckpt", "model.pt", "--videos", "gallery"
    done = run("search.py", *queries, *gallery, "--top", 10, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "encoded 30 videos, 30 in the index" in done.stderr
    parts = done.stdout.split(asked[0][1])[1]
    found = sum(row[0].split("/")[1] in done.stdout.split(row[1], 1)[1][:900] for row in asked)
    assert found >= 6, (parts, done.stdout)  # among 10 of 30: chance 3.3
    again = run("search.py", queries[0], *gallery, cwd=folder)
    assert "encoded 0 videos, 30 in the index" in again.stderr


def test_readmes_python_runs(trained):
    """The way in from Python; the small data set has videos of lower numbers."""
    folder, _ = trained
    code, search = re.findall(r"```python\n(.*?)```", README, re.S)
    for part, most in ((code, 15), (search, 6)):
        assert len([line for line in part.splitlines() if line.strip()]) <= most
    code = code.replace("(1600, 1601, 1602)", "(130, 131, 132)")
    code += "print(sims.shape, R.shape, t_s.shape)"
    code = code.replace("print(model.score", "sims = (model.score", 1) + "\n" + search
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 3]) torch.Size([2, 3, 128]) torch.Size([20, 128])" in done.stdout


@pytest.mark.slow
def test_readmes_commands_run_as_they_stand(trained, run):
    """Each evaluation and search of README where `python train.py` has run.

    ~/clips is a folder of videos, and the trained model stands for the CLIP that would be
    downloaded. The benchmarks' videos are not here: their commands don't run.
    """
    folder, _ = trained
    shutil.copytree(folder / "data/shapes/videos", folder / "clips")
    write_jpeg(torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8), str(folder / "photo.jpg"))
    ran = {"eval.py": 0, "search.py": 0}
    for command in COMMANDS:
        script = command.removeprefix("python ").split(" ")[0]
        if script not in ran or "--data" in command:
            continue
        words = [word.replace("~", str(folder)) for word in shlex.split(command)]
        model = [] if "--ckpt" in words else ["--ckpt", "model.pt"]
        # The star is what is typed where a query is asked for.
        done = run(*words[1:], *model, cwd=folder, stdin="a star\n")
        assert done.returncode == 0, (command, done.stderr)
        ran[script] += 1
    assert ran["eval.py"] >= 4 and ran["search.py"] >= 4


@pytest.mark.slow
def test_a_setting_and_a_loss_are_a_few_lines(trained, tmp_path):
    """Two rows of README's table "Change it", done in a copy of the project."""
    folder, _ = trained
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    changes = [
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
    for name, old, new in changes:
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1, old
        (tmp_path / name).write_text(text.replace(old, new))

    def run_copy(*words):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    start = folder / "model.pt"
    run_copy("train.py", "--root", folder / "data/shapes", "--clip", start, "--epochs", "1",
             "--pull-weight", "5", "--log-every", "1", "--out", "pulled.pt")
    saved = torch.load(tmp_path / "pulled.pt", weights_only=True)
    assert saved["tmass"]["pull_weight"] == saved["config"]["pull_weight"] == 5
    with open(tmp_path / "pulled.log.csv", newline="") as file:
        row = next(csv.DictReader(file))
    known = float(row["stochastic"]) + 0.8 * float(row["support"])
    assert float(row["loss"]) > known + 0.1
    assert "t2v R@1" in run_copy("eval.py", "--ckpt", "pulled.pt")
