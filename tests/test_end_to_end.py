"""What README and docs/ promise, typed as they type it, on small stand-ins for what they name."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PAGES, ROOT, D
from torchvision.io import write_jpeg

from lib import shapes

NOT_RUN = {  # what a command or a block of Python holds -> why it can't be run here
    "pip install": "a download; .ci/run does it",
    "torchrun": "needs several GPUs; test_train.py and test_index.py start jobs",
    "--serve": "runs until Ctrl-C; test_serve.py asks it for pages",
    "pytest": "this is it",
    "study/study.py": "takes hours",
    "study/bench.py": "takes minutes; test_bench.py",
    "study/figures.py": "needs matplotlib",
    "open_clip:": "a download",
    "NAME": "stands for a name",
    "f[:, None]": "needs a radius that takes one frame",
    "import pandas": "makes a csv: test_data.py",
    "df.explode": "makes a csv: test_data.py",
}

# In the place of `python`: our programs, small trainings, and model.pt for a CLIP that would be
# downloaded.
PYTHON = f"""#!{sys.executable}
import os
import sys

script, *words = sys.argv[1:]
words = [word.replace("ViT-B/32", "model.pt").replace("/fast/", "fast/") for word in words]
if script == "train.py":
    out = ["--out", "again.pt", "--overwrite"]
    words = ["--clip", "model.pt", *out, *words, "--epochs", "1", "--batch", "16"]
if script == "search.py" and "--ckpt" not in words:
    words += ["--ckpt", "model.pt"]
if script.endswith(".py"):
    script = os.path.join({str(ROOT)!r}, script)
os.execv(sys.executable, [sys.executable, script, *words])
"""


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A home with a small `shapes` where README's commands look for it, and a model of it."""
    folder = tmp_path_factory.mktemp("newcomer")
    shapes.render_shapes(folder / "data/shapes", train=60, val=4, test=30)
    words = "--pretrain", 60, "--epochs", 1, "--batch", 32
    done = run("train.py", *words, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def home(trained):
    """And in it what the pages name: clips, a photo, MSR-VTT, embeddings, videos of shapes."""
    folder, _ = trained
    videos = folder / "data/shapes/videos"
    shutil.copytree(videos, folder / "clips")
    write_jpeg(torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8), str(folder / "photo.jpg"))
    for page in PAGES:  # tests of the whole `shapes` have four digits
        for number in re.findall(r"\b(?:1[6-9]|20)\d\d\b", page.read_text()):
            shutil.copy(videos / "00070.mp4", videos / f"0{number}.mp4")
    msrvtt = folder / "data/msrvtt"
    msrvtt.mkdir()
    shutil.copytree(videos, msrvtt / "videos")
    names = [f"{number:05d}" for number in range(30)]
    sentences = [dict(video_id=name, caption=f"a video of {name}") for name in names]
    (msrvtt / "MSRVTT_data.json").write_text(json.dumps(dict(videos=[], sentences=sentences)))
    (msrvtt / "MSRVTT_train.9k.csv").write_text("\n".join(["video_id", *names]))
    rows = [f"{number},k,000{number},a test" for number in range(70, 80)]
    table = ["key,vid_key,video_id,sentence", *rows]
    (msrvtt / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(table))
    (folder / "bin").mkdir()
    (folder / "bin/python").write_text(PYTHON)
    (folder / "bin/python").chmod(0o755)
    return folder


def test_evaluation_is_well_above_chance_and_repeats_itself(trained, run):
    folder, said = trained
    done = run("eval.py", "--ckpt", "model.pt", "--json", "a.json", cwd=folder)
    assert done.returncode == 0 and "ceiling" in done.stdout, done.stderr
    result = json.loads((folder / "a.json").read_text())
    assert (result["videos"], result["texts"]) == (30, 240)
    assert result["t2v"]["R1"] > 12 and result["t2v"]["R5"] > 40  # chance: 3.3 and 17
    assert f"test: t2v R@1 {result['t2v']['R1']:.1f} " in said


def runnable(texts):
    return [text for text in texts if not any(part in text for part in NOT_RUN)]


def run_line(command, folder):
    """Run a command in the home folder, as typed. The star is typed where a query is asked for."""
    env = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{folder}/bin:{env['PATH']}"
    done = subprocess.run(command, cwd=folder, env=env, input="a star\n", capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, (command, done.stderr)


def test_python_runs(home):
    """All blocks of a page, one after the other; each page has names of its own."""
    code = f"import numpy, torch; numpy.savez('features.npz', t=torch.randn(5, {2 * D}), " \
           f"f=torch.randn(4, 6, {2 * D}), owner=torch.arange(5) % 4)\n"
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.S | re.M)
        page_code = "\n".join(runnable(blocks))
        code += f"exec({page_code!r}, {{}})\n"
    run_line([sys.executable, "-c", code], home)


@pytest.mark.slow
def test_commands_run_as_they_stand(home):
    ran = 0
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
        shown = "".join(block for language, block in blocks if language != "python")
        lines = shown.splitlines() + re.findall(r"`(python [^`\n]+)`", text)
        commands = [line for line in lines if re.match("python |for |torchrun |pip ", line)]
        for command in runnable(dict.fromkeys(commands)):
            run_line(["bash", "-c", command.replace(" 3 4 5;", ";")], home)  # of five seeds, two
            ran += 1
    assert ran > 10
