"""Every command, change and piece of Python in study/EXERCISES.md works, on a few videos."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

EXERCISES = (ROOT / "study" / "EXERCISES.md").read_text(encoding="utf-8")
MATPLOTLIB = find_spec("matplotlib")  # None where it is not installed
FEW = ["40", "4", "32"]  # videos to train, validate and test


def steps(text):
    """-> (kind, content) of all there is to do, in order: a "run", a "python" file, a "diff"."""
    found = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
        if kind:
            found.append((kind, block))
        else:
            found += [("run", line) for line in block.splitlines()]
    return found


def change(tree, diff):
    """Do what a diff without line numbers says: one file, one run of lines."""
    name, *lines = diff.splitlines()
    path = tree / name.removeprefix("--- ")
    old = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
    new = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, diff
    path.write_text(source.replace(old, new), encoding="utf-8")


def small(command):
    """The same command for a test: few videos, few steps."""
    words = shlex.split(command)
    assert words[0] == "python"
    if "--videos" in words:
        at = words.index("--videos") + 1
        words[at:at + 3] = FEW
    if "train.py" in words:
        words += ["--batch", "16", "--workers", "0"]
        if "--clip" not in words:
            words += ["--pretrain", "2"]
    return words[1:]


def call(tree, words):
    """Run Python in the tree. -> what it prints"""
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def take_back(tree):
    """The project's files as they are."""
    for name in (*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("study/*.*")):
        target = tree / name.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)


@pytest.mark.slow
def test_every_step_works(tmp_path):
    """In order, in a copy of the project; what was changed is taken back after each exercise."""
    take_back(tmp_path)
    call(tmp_path, ["-m", "lib.shapes", "--root", "data/shapes", "--videos", *FEW])
    printed = {}
    for part in re.split(r"^## ", EXERCISES, flags=re.M):
        for kind, content in steps(part):
            if kind == "diff":
                change(tmp_path, content)
            elif kind == "python":
                name = content.split("\n")[0].removeprefix("# ")
                (tmp_path / name).write_text(content, encoding="utf-8")
            elif MATPLOTLIB or "figures.py" not in content:
                printed.setdefault(content, []).append(call(tmp_path, small(content)))
        take_back(tmp_path)
    # the fast scorer is right about a radius that it does not know
    difference, = re.findall(r"largest difference (\S+)", *printed["python right.py"])
    assert float(difference) < 1e-5
    without, leaking = printed["python leak.py"]
    assert without != leaking
    # the closed form is nearer to the average of 1,000 sets of samples than one set is
    errors = re.findall(r"(?:cosine|samples) (0\.\d{4})", *printed["python pencil.py"])
    closed_form, one_set = map(float, errors)
    assert closed_form < one_set
