"""Training: the step, one process against two, exact resume, kills, guards, bad input.

Runs are real processes. Most are forked from a server that has imported train.py (forkserver),
which saves seconds each; torchrun and the plain command line have tests of their own.
"""
import contextlib
import copy
import csv
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SLOW, free_port
from videos import write_video

import data
import train
from clip_model import CLIP
from eval import format_metrics
from lib import processes, runs, shapes, video
from lib.weights import read_weights
from tmass import TMASS

SMALL = ["--data", "set/my.csv", "--clip", "tiny", "--frames", 2, "--batch", 4, "--epochs", 2,
         "--workers", 0, "--log-every", 1, "--device", "cpu"]
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 220),
    "yellow": (220, 210, 40),
    "white": (240, 240, 240),
    "black": (10, 10, 10),
}


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """36 videos from one colour to another: 26 train, 5 val, 5 test. -> the folder of set/."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "set").mkdir()
    rows = [("video", "caption", "split")]
    blend = torch.linspace(0, 1, 8)[:, None, None, None]
    for i, (a, b) in enumerate(itertools.product(COLOURS, COLOURS)):
        frames = (1 - blend) * torch.tensor(COLOURS[a]) + blend * torch.tensor(COLOURS[b])
        frames = frames.expand(8, 48, 48, 3).to(torch.uint8).contiguous()
        write_video(folder / "set" / f"{a}-{b}.mp4", frames)
        split = {3: "val", 5: "test"}.get(i % 7, "train")
        rows.append((f"{a}-{b}.mp4", f"the picture turns from {a} to {b}", split))
    with open(folder / "set" / "my.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture
def here(videos, tmp_path, monkeypatch):
    """A working folder of the test's own, with the data set in set/."""
    (tmp_path / "set").symlink_to(videos / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_copy(videos, tmp_path, monkeypatch):
    """As `here`, but the data set may be spoilt."""
    shutil.copytree(videos / "set", tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- how runs are started and what they leave ----


@pytest.fixture(scope="session")
def start():
    """start(folder, *args) -> Job: train.py in a process of its own."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "videos", "pytest"])
    jobs = []

    def start(folder, *args, file_limit=None):
        jobs.append(Job(context, folder, args, file_limit))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.kill()


def child(folder, args, file_limit):
    os.chdir(folder)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as on the command line
    sys.argv = ["train.py", *args]
    sys.exit(train.run(train.main))


class Job:
    def __init__(self, context, folder, args, file_limit):
        self.folder = Path(folder)
        for name in ("stdout.txt", "stderr.txt"):
            (self.folder / name).unlink(missing_ok=True)
        arguments = str(folder), list(map(str, args)), file_limit
        self.process = context.Process(target=child, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    out = property(lambda self: self.read("stdout.txt"))
    err = property(lambda self: self.read("stderr.txt"))
    said = property(lambda self: self.out[-2000:] + self.err[-2000:])

    def wait(self, timeout=120):
        """-> exit status, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.said}"
        return self.process.exitcode

    def until(self, condition, timeout=90):
        deadline = time.time() + timeout
        while not condition(self):
            assert self.process.is_alive() and time.time() < deadline, f"over: {self.said}"
            time.sleep(0.002)
        return self

    def stop(self, number=signal.SIGTERM):
        """Send a signal, upon which the run ends in order."""
        os.kill(self.pid, number)
        assert self.wait() == 128 + number and "error" not in self.err, self.said
        return self

    def finish(self):
        assert self.wait() == 0, self.said
        return self


def reaches(step):
    return lambda job: f"step {step:5d}/" in job.out


def torchrun(script, *args, cwd, processes=2):
    """Start a program, and without torchrun for one process. -> Popen, with pipes of text"""
    command = [sys.executable]
    if processes > 1:
        options = ["--nproc_per_node", str(processes), "--master_port", free_port()]
        command += ["-m", "torch.distributed.run", *options]
    command += [str(script), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes)


def ended(job, timeout=150):
    """What a Popen printed, once it has ended. -> (exit status, stdout, stderr)"""
    try:
        out, err = job.communicate(timeout=timeout)
    finally:
        job.kill()
    return job.returncode, out, err


def children(pid):
    lists = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(lists).split()]


def steps(folder):
    with open(Path(folder) / "model.log.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def column(folder, name):
    return torch.tensor([float(row[name]) for row in steps(folder)])


def weights(path):
    return read_weights(path)["model"]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def close(a, b):
    assert a.keys() == b.keys()
    gaps = {k: (a[k] - b[k]).double().norm() for k in a}
    return all(gap <= 1e-4 * b[k].double().norm() + 1e-5 for k, gap in gaps.items())


def check_equal(folder, whole):
    assert same(weights(folder / "model.pt"), weights(whole / "model.pt"))
    rows = [[(r["step"], r["loss"], r["grad_norm"]) for r in steps(x)] for x in (folder, whole)]
    assert rows[0] == rows[1]


def metrics(out):
    return [line for line in out.splitlines() if line.startswith(("validation", "test: "))]


def check_test_again(run, folder, out):
    """The command printed at the end gives the line of the test again."""
    command = shlex.split(out.split("evaluate it again: ")[1])
    assert command[:2] == ["python", "eval.py"]
    done = run(*command[1:], "--device", "cpu", "--json", "again.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "again.json").read_text())
    assert metrics(out)[-1] == f"test: {format_metrics(result)}"


def refused(status, out, err, *words):
    """A mistake costs one line that says what it is, and status 2."""
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, out, err)
    assert all(part in err for part in words), (words, err)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*args) -> (exit status, stdout, stderr): the command line within this process."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in processes.SIGNALS}
        capsys.readouterr()
        try:
            status = train.run(train.main)
        except SystemExit as e:
            status = e.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return status, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes started here: on a busy machine threads crawl."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spoil(monkeypatch):
    """spoil(number, spoilt): the losses of the calls for which spoilt(number) are NaN."""
    true = TMASS.losses

    def spoil(spoilt):
        numbers = itertools.count(1)

        def losses(self, t, f):
            factor = math.nan if spoilt(next(numbers)) else 1
            return {name: loss * factor for name, loss in true(self, t, f).items()}

        monkeypatch.setattr(TMASS, "losses", losses)

    return spoil


# ---- settings and pure functions of the step ----


def test_learning_rate_by_hand():
    rates = [train.learning_rate(s, 10, 0.2) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)  # half way down the cosine: (6 - 2) / 8
    assert rates[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert all(0 < x <= 1 for x in rates)
    assert train.learning_rate(0, 1, 0.0) == 1  # a single step learns


def test_batches():
    every = list(data.Batches(23, 4, 3, seed=1))
    assert len(every) == data.Batches(23, 4, 3, seed=1).total == 15  # 5 an epoch, 3 pairs over
    for epoch in range(3):
        pairs = [pair for batch in every[5 * epoch:5 * epoch + 5] for pair in batch]
        assert {e for e, _ in pairs} == {epoch} and len({i for _, i in pairs}) == 20
    assert [i for _, i in every[0]] != [i for _, i in every[5]]  # another order each epoch
    assert every != list(data.Batches(23, 4, 3, seed=2))
    for start in (1, 5, 7, 15):
        assert list(data.Batches(23, 4, 3, seed=1, start=start)) == every[start:]
    shares = [list(data.Batches(23, 4, 3, seed=1, start=2, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares)] == every[2:]


def test_settings_of_the_method_are_written_once(capsys):
    """TMASS.__init__ has them: recipes name no other, and every one has an option."""
    parameters = inspect.signature(TMASS.__init__).parameters
    defaults = {k: x.default for k, x in parameters.items() if k not in ("self", "clip")}
    assert train.METHOD == defaults == TMASS(CLIP(vocab_size=300, **shapes.TINY)).config
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in (train.BASE | train.PLACES | train.RUN).items():
        assert f" --{name.replace('_', '-')} " in text, name
        assert name not in train.BASE or value in (None, False) or f"(default: {value})" in text
    for name, recipe in train.RECIPES.items():
        assert recipe.keys() <= train.BASE.keys() and f"{name}: {next(iter(recipe))}=" in text
    assert vars(train.parser().parse_args([])) == {}  # else a default would hide the recipe's


def settle(words, saved=None):
    args, _ = train.settle(vars(train.parser().parse_args(words.split())), saved)
    return args


def test_a_data_set_without_a_recipe_trains_with_the_default_one(here):
    assert set(train.RECIPES) < set(data.names())
    for name in ("vatex", "charades"):
        assert name in data.names() and name not in train.RECIPES
        args = settle(f"--data {name}")
        assert {k: getattr(args, k) for k in train.BASE} == train.BASE
        assert args.root == str(here / "data" / name)


@pytest.mark.parametrize("words, steps", [
    ("", 300),
    ("--clip tiny", 300),
    ("--clip any.pt", 0),
    ("--init any.pt", 0),
    ("--init any.pt --pretrain 7", 7),
])
def test_loaded_weights_are_not_warmed_up_unasked(words, steps):
    assert settle(words).pretrain == steps


@pytest.mark.parametrize("words, cache", [
    ("", "old/frames"),
    ("--root old", "old/frames"),
    ("--root new", "new/frames"),
    ("--root new --cache c", "c"),
])
def test_moved_shapes_are_resumed_with_frames_beside_them(here, words, cache):
    """What lies in the old place would be a folder that is no data set."""
    config = dict(data="shapes", root=str(here / "old"), cache=str(here / "old/frames"))
    assert settle(words, dict(config=config, splits={})).cache == str(here / cache)


# ---- one process against two ----

GRADIENTS = """
import copy, functools, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from clip_model import CLIP
from lib.processes import Gather, Job
from lib.shapes import TINY
from tmass import TMASS

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
objects = [torch.randint(1, 500, (8, 12)), torch.randint(0, 256, (8, 3, 3, 32, 32)).byte()]
dist.broadcast_object_list(objects)
ids, video = objects
for method in (dict(), dict(radius="scaled", support_video="batch", ce_weight=0.5),
               dict(pooling="mean", radius="mean"),
               dict(pooling="query", radius="none", support_weight=0.0)):  # has no parameter
    for cut in (4, 5, 1):
        torch.manual_seed(3)
        clip = CLIP(vocab_size=512, **TINY)
        model = TMASS(clip, frames=3, dropout=0.2, prior_std=0.1, **method).train()
        alone = copy.deepcopy(model)
        model.chunk = 7 if cut == 5 else 0
        rows = slice(0, cut) if rank == 0 else slice(cut, 8)
        ddp = DistributedDataParallel(model, static_graph=True)
        torch.manual_seed(5)  # noise and dropout
        gather = functools.partial(Gather.apply, Job(rank, 2), cut != 4)
        out = ddp(ids[rows], video[rows], gather=gather)
        out["loss"].backward()
        two = {k: p.grad for k, p in model.named_parameters()}
        torch.manual_seed(5)
        one = alone(ids, video)
        one["loss"].backward()
        assert abs(out["loss"] - one["loss"]) < 1e-5, (out["loss"], one["loss"])
        total = sum(p.grad.norm() ** 2 for p in alone.parameters()) ** 0.5
        for k, p in alone.named_parameters():
            assert p.grad is not None, k
            gap, size = (p.grad - two[k]).norm(), p.grad.norm()
            # a bias before a softmax has a gradient of rounding errors
            assert gap <= 1e-4 * size + 1e-7 * total, (method, cut, k, gap / size)
        print(f"equal {rank} {cut}", flush=True)
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """With shares of the same size and others, and with --chunk."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    status, out, err = ended(torchrun(tmp_path / "gradients.py", cwd=tmp_path))
    assert status == 0 and out.count("equal") == 24, err[-3000:]


TRAIN = """
import sys
import train

if __name__ == "__main__":
    sys.exit(train.run(train.main))
"""
UNUSED = """
import torch
from lib import encoders, shapes

class Biased(shapes.CLIP):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))

shapes.CLIP = encoders.ENCODERS["clip"] = Biased
"""
BATCHNORM = """
import json
import open_clip

resnet = dict(
    embed_dim=32,
    vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32),
    text_cfg=dict(context_length=20, vocab_size=49408, width=64, heads=1, layers=1),
)
with open("resnet.json", "w") as file:
    json.dump(resnet, file)
open_clip.add_model_config("resnet.json")
"""


def one_and_two(here, code, *settings, chunk):
    """Train with one and with two processes, in the folders 1 and 2. -> what they printed"""
    (here / "run.py").write_text(code + TRAIN)
    settings = [*SMALL, "--data", here / "set/my.csv", "--clip-lr", 1e-5, "--head-lr", 1e-4,
                "--batch", 6, *settings]
    jobs = []
    for count, more in ((1, []), (2, ["--chunk", chunk])):
        folder = here / str(count)
        folder.mkdir()
        jobs.append(torchrun(here / "run.py", *settings, *more, cwd=folder, processes=count))
    (status, one, err), (status2, two, err2) = map(ended, jobs)
    assert (status, status2) == (0, 0), (err, err2[-3000:])
    for name, error in (("loss", 1e-5), ("stochastic", 1e-5), ("ce", 1e-5), ("grad_norm", 1e-3)):
        a, b = column(here / "1", name), column(here / "2", name)
        assert len(a) == 8 and torch.allclose(a, b, rtol=error, atol=1e-5)
    assert close(weights(here / "2/model.pt"), weights(here / "1/model.pt"))
    assert metrics(one) == metrics(two) and len(metrics(two)) == 3
    assert two.count("given:") == two.count("step     1/8") == 1  # only rank 0 speaks
    assert {"model.log.csv", "model.pt"} == {p.name for p in (here / "2").glob("model*")}
    return one, two


def test_two_processes_train_as_one(here):
    """Also in chunks, and where an encoder has a parameter that no score depends on, as SigLIP."""
    one_and_two(here, UNUSED, chunk=5)


@pytest.mark.slow
def test_batch_normalisation_keeps_its_statistics(here, run):
    """Those of the batch would differ with its share; and from what is tested and saved."""
    pytest.importorskip("open_clip")
    _, out = one_and_two(here, BATCHNORM, "--clip", "open_clip:resnet", chunk=0)
    check_test_again(run, here / "2", out)


def test_a_process_without_a_readable_video_takes_no_part(own_copy):
    """Its share of a batch is one pair here. The steps are those of one process all the same."""
    Path("set/red-green.mp4").write_bytes(b"broken")
    settings = [*SMALL, "--data", own_copy / "set/my.csv", "--batch", 2, "--skip-bad"]
    for count in (1, 2):
        folder = own_copy / str(count)
        folder.mkdir()
        job = torchrun(ROOT / "train.py", *settings, cwd=folder, processes=count)
        status, out, err = ended(job)
        assert status == 0 and "skipped" not in out, err[-3000:]
        assert (folder / "model.bad.txt").read_text().count("red-green.mp4: ") == 1
    a, b = column(own_copy / "1", "loss"), column(own_copy / "2", "loss")
    assert len(a) == 26 and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_dead_process_ends_the_job(here):
    job = torchrun(ROOT / "train.py", *SMALL, "--epochs", 2000, cwd=here)
    try:
        assert any(line.startswith("step     3/") for line in job.stdout)
        workers = children(job.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
    finally:
        status, _, err = ended(job, timeout=60)
    assert status and ("SIGKILL" in err or "Signal 9" in err), err[-3000:]
    assert "error: another process of this job died" in err and "--resume" in err
    assert not any(Path(f"/proc/{p}").exists() for p in workers)
    assert read_weights(here / "model.pt")["finished"] is False


NODES = """
import os
os.chdir("node" + os.environ["RANK"])
"""


@pytest.mark.parametrize("found", [{0: 2, 1: 3}, pytest.param({0: 2}, marks=pytest.mark.slow)])
def test_nodes_that_find_different_checkpoints(here, one_step, found):
    """As where each node has a disk of its own. found: the step of each one's file."""
    (here / "run.py").write_text(NODES + TRAIN)
    for node in range(2):
        (here / f"node{node}").mkdir()
    for node, step in found.items():
        resumable(one_step, path=here / f"node{node}/model.pt", step=step)
    status, out, err = ended(torchrun(here / "run.py", "--resume", "--device", "cpu", cwd=here))
    assert status and re.search(r"exitcode *: 2", err), err[-3000:]
    errors = {line.split("error: ")[1] for line in err.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1 and "different checkpoints in --out model.pt" in errors.pop()
    assert "train.py" not in err and "step" not in out  # no stack


# ---- stop and resume ----

RESUMABLE = [*SMALL, "--workers", 2, "--epochs", 3, "--save-every", 4, "--clip-lr", 5e-4,
             "--head-lr", 1e-3]
GO_ON = ["--resume", "--workers", 2, "--log-every", 1, "--save-every", 4]  # the rest is in model.pt


@pytest.fixture(scope="session")
def uninterrupted(videos, start, tmp_path_factory):
    """-> (folder, seconds, stdout) of a run of 18 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "set").symlink_to(videos / "set")
    started = time.time()
    job = start(folder, *RESUMABLE).finish()
    return folder, time.time() - started, job.out


@pytest.fixture(scope="session")
def one_step(videos, tmp_path_factory, start):
    """What an unfinished run holds."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "set").symlink_to(videos / "set")
    start(folder, *SMALL, "--epochs", 300).until(reaches(2)).stop()
    return folder / "model.pt"


def resumable(source, path="model.pt", step=None, **settings):
    """Make model.pt a run that ends after an epoch, with other settings. -> what it holds."""
    content = copy.deepcopy(read_weights(source))
    content["config"] |= dict(epochs=1) | settings
    content["step"] = step or content["step"]
    torch.save(content, path)
    return content


def test_an_uninterrupted_run(uninterrupted, call, monkeypatch):
    folder, _, out = uninterrupted
    content = read_weights(folder / "model.pt")
    assert content["finished"] and content["step"] == 18 and "optimizer" not in content
    assert [int(r["step"]) for r in steps(folder)] == list(range(1, 19))
    best = content["best"][0]
    assert f"the result is that of step {best}, the best on the validation split" in out
    assert "test: t2v R@1" in out and "checkpoint: model.pt" in out and "left" in out
    monkeypatch.chdir(folder)
    before = Path("model.pt").read_bytes()
    status, out, err = call("--resume")
    assert status == 0 and "is finished (step 18): nothing to resume" in out
    assert before == Path("model.pt").read_bytes()


@pytest.mark.parametrize("number, step, workers_get", [
    (signal.SIGTERM, 8, None),
    (signal.SIGINT, 3, None),
    (signal.SIGHUP, 5, None),
    (signal.SIGTERM, 6, signal.SIGTERM),  # in validation, from a batch system
    (signal.SIGINT, 2, signal.SIGKILL),  # they are no bad videos
])
def test_resume_is_exact(here, start, uninterrupted, number, step, workers_get):
    job = start(here, *RESUMABLE).until(reaches(step))
    workers = children(job.pid)
    os.kill(job.pid, number)
    for pid in workers if workers_get else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, workers_get)
    assert job.wait() == 128 + number and job.err == "", job.said
    assert f"stopped by {number.name} after step" in job.out
    assert job.out.rstrip().endswith("--resume")
    assert step <= read_weights(here / "model.pt")["step"] < 18
    start(here, *GO_ON).finish()
    check_equal(here, uninterrupted[0])


def test_resumed_with_another_chunk(here, start, uninterrupted):
    start(here, *RESUMABLE, "--chunk", 3).until(reaches(5)).stop()
    start(here, *GO_ON, "--chunk", 5).finish()
    assert close(weights("model.pt"), weights(uninterrupted[0] / "model.pt"))


@pytest.mark.slow
def test_sigterm_under_torchrun(here):
    settings = [*SMALL, "--data", here / "set/my.csv", "--epochs", 12, "--skip-bad"]
    for name in ("whole", "cut"):
        (here / name).mkdir()
    whole = torchrun(ROOT / "train.py", *settings, cwd=here / "whole")
    job = torchrun(ROOT / "train.py", *settings, cwd=here / "cut")
    assert any(line.startswith("step     3/") for line in job.stdout)
    job.send_signal(signal.SIGTERM)
    status, out, err = ended(job)
    assert status and out.count("stopped by SIGTERM after step") == 1, (out, err[-3000:])
    content = read_weights(here / "cut" / "model.pt")
    assert 3 <= content["step"] < 72 and not content["finished"]
    again = torchrun(ROOT / "train.py", *settings, "--resume", cwd=here / "cut")
    assert ended(again)[0] == ended(whole)[0] == 0
    check_equal(here / "cut", here / "whole")


@pytest.mark.slow
def test_sigterm_under_torchrun_while_no_batch_arrives(here):
    """One process waits for its workers, and the other for that process."""
    (here / "run.py").write_text(SLOW + TRAIN)
    settings = [*SMALL, "--workers", 2, "--epochs", 2000, "--save-every", 10_000, "--batch", 2]
    job = torchrun(here / "run.py", *settings, cwd=here)
    try:
        assert any(line.startswith("step     3/") for line in job.stdout)
        (here / "slow").touch()
        time.sleep(3)
        job.send_signal(signal.SIGTERM)
    finally:
        _, out, err = ended(job, timeout=40)
    step = read_weights(here / "model.pt")["step"]
    assert step >= 3 and f"stopped by SIGTERM after step {step};" in out, (out, err[-3000:])
    assert "error: " not in err


@pytest.mark.parametrize("moment, number", [
    ("rendering", signal.SIGTERM),
    ("warm-up", signal.SIGTERM),
    ("warm-up", signal.SIGINT),
    ("warm-up", signal.SIGHUP),
])
def test_a_signal_before_the_first_step(tmp_path, start, moment, number):
    if moment == "warm-up":
        shapes.render_shapes(tmp_path / "made", train=64, val=0, test=0)
    job = start(tmp_path, "--root", "made", "--workers", 2, "--pretrain", 100_000)
    job.until(lambda job: moment == "rendering" or "amp off" in job.out)
    job.until(lambda job: len(children(job.pid)) == 2)
    os.kill(job.pid, number)
    assert job.wait(60) == 128 + number, job.said
    assert "nothing was saved" in job.out + job.err and "Traceback" not in job.err
    assert not list(tmp_path.glob("model*"))


def test_a_signal_during_the_last_save(here, call, monkeypatch):
    save = runs.save_checkpoint

    def interrupted(*arguments, finished, **state):
        save(*arguments, finished=finished, **state)
        if finished:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs, "save_checkpoint", interrupted)
    status, out, _ = call(*SMALL)
    assert status == 128 + signal.SIGTERM and "stopped by SIGTERM after step 12;" in out
    assert "test: " not in out and read_weights("model.pt")["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("k", range(12))
def test_kill_at_random_moments(here, start, uninterrupted, k):
    whole, seconds, _ = uninterrupted
    args = [*RESUMABLE, "--save-every", 1, "--resume"]  # --resume without a checkpoint starts
    job = start(here, *args)
    if k % 3:
        time.sleep(random.uniform(0.05, 1.1) * seconds)
    else:  # while saving
        job.until(reaches(random.randint(1, 15)))
        job.until(lambda job: list(here.glob("model.pt*.part")) or "checkpoint:" in job.out)
    workers = children(job.pid) if job.process.is_alive() else []
    job.process.kill()
    job.process.join()
    if (here / "model.pt").exists():
        assert read_weights(here / "model.pt")["format"] == "tmass"
    for pid in workers:  # they would notice within seconds, and leave
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    start(here, *args).finish()
    check_equal(here, whole)


@pytest.mark.slow
def test_full_disk_while_saving(here, start, uninterrupted):
    start(here, *RESUMABLE).until(reaches(2)).stop()
    before = (here / "model.pt").read_bytes()
    job = start(here, *GO_ON, "--workers", 0, file_limit=len(before) // 2)
    refused(job.wait(), job.out, job.err, "cannot write checkpoint model.pt: ", "is intact")
    assert (here / "model.pt").read_bytes() == before and not list(here.glob("*.part"))
    start(here, *GO_ON).finish()
    check_equal(here, uninterrupted[0])


def test_a_run_is_its_data(own_copy, call, one_step):
    """It goes on with the same data at another place, and with no other."""
    os.rename("set", "moved")
    elsewhere = "--resume", "--device", "cpu", "--data", "moved/my.csv"
    table = Path("moved/my.csv").read_text()
    for split, before, after in (("train", "to red,", "to pink,"), ("test", ",test", ",train"),
                                 ("val", "from red to white", "from white to red")):
        resumable(one_step)
        Path("moved/my.csv").write_text(table.replace(before, after))
        kept = Path("model.pt").read_bytes()
        refused(*call(*elsewhere), "model.pt", "split than this", "--data")
        assert Path("model.pt").read_bytes() == kept, split
    Path("moved/my.csv").write_text(table)
    old = resumable(one_step)
    del old["splits"]  # as older versions wrote it: nothing says that the data are the same
    torch.save(old, "model.pt")
    refused(*call(*elsewhere), "--data", "differs")
    place = dict(data=os.path.abspath("moved/my.csv"), root=os.path.abspath("moved"))
    old["config"].update(place, gone="a setting of an older version", warmup=None)
    torch.save(old, "model.pt")
    assert call("--resume", "--device", "cpu")[0] == 0
    resumable(one_step)
    refused(*call("--resume", "--batch", 6), "--batch 6 differs from 4")
    assert call(*elsewhere)[0] == 0
    assert place.items() <= read_weights("model.pt")["config"].items()


def moments(content):
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def not_finite(content):
    content["model"]["pool.q.weight"][0] = math.nan


@pytest.mark.parametrize("forge", [
    None,  # the file is cut
    lambda c: c.update(step="1.5"),
    lambda c: c.update(best=5),
    lambda c: c["config"].update(head_lr=[1]),
    lambda c: c["clip"].update(vision_heads="3"),
    lambda c: c.pop("optimizer"),
    lambda c: c["model"].popitem(),
    moments,
    not_finite,
])
def test_forged_runs_are_not_resumed(here, call, one_step, soon, forge):
    content = resumable(one_step)
    if forge:
        forge(content)
        torch.save(content, "model.pt")
    else:
        Path("model.pt").write_bytes(one_step.read_bytes()[:-5000])
    before = Path("model.pt").read_bytes()
    refused(*call("--resume", "--workers", 0, "--device", "cpu"), "model")
    assert Path("model.pt").read_bytes() == before


# ---- what is there already ----


def test_out_replaces_nothing_but_a_run_that_may_go(here, call):
    Path("notes.txt").write_text("of mine")
    Path("empty.pt").touch()
    torch.save({"some.weight": torch.ones(2)}, "other.pt")
    os.symlink("notes.txt", "link.pt")
    os.mkfifo("pipe.pt")
    os.mkdir("folder")
    assert call(*SMALL, "--epochs", 0)[0] == 0
    kept = {p: p.read_bytes() for p in here.iterdir() if p.is_file()}
    names = ("notes.txt", "empty.pt", "other.pt", "link.pt", "pipe.pt", "folder", "/dev/null")
    for flags in ((), ("--overwrite",), ("--resume",)):
        for name in names:
            refused(*call(*SMALL, "--out", name, *flags), name)
    refused(*call(*SMALL, "--epochs", 1), "model.pt holds a finished run", "--overwrite")
    for option in ("--init", "--clip"):
        same_file = option, "model.pt", "--out", "folder/../model.pt", "--overwrite"
        refused(*call(*SMALL, *same_file), "model.pt is what --clip or --init starts from")
    Path("new.log.csv").write_text("step\n1\n")
    refused(*call(*SMALL, "--out", "new.pt"), "new.log.csv belongs to another run, whose new.pt")
    Path("new.log.csv").unlink()
    assert kept == {p: p.read_bytes() for p in here.iterdir() if p.is_file()}
    assert call(*SMALL, "--epochs", 1, "--overwrite")[0] == 0
    assert read_weights("model.pt")["step"] == 6


def test_a_run_with_steps_is_not_overwritten_and_one_without_is(here, start, call):
    refused(*call(*SMALL, "--heads", 3), "heads=3")  # fails when the model is built
    assert os.listdir() == ["set"]
    assert call(*SMALL, "--epochs", 0)[0] == 0
    torch.save({**read_weights("model.pt"), "finished": False}, "model.pt")
    start(here, *SMALL, "--epochs", 300).until(reaches(2)).stop()
    before = Path("model.pt").read_bytes()
    for flags in ((), ("--overwrite",)):
        refused(*call(*SMALL, *flags), "model.pt holds an unfinished run at step", "--resume")
    assert before == Path("model.pt").read_bytes()


def test_a_run_goes_on_with_what_is_whole_of_its_log(here, call, one_step):
    whole = one_step.with_name("model.log.csv").read_bytes()
    row = whole.splitlines()[1]
    others = [b"step,gone\n", b"x" + row + b"\n", b",\n", b"1," * 20 + b"\n", b"\0\xff\n\n", row]
    for before, after in ((whole, b"".join(others)), (b"", b"other,columns\n1,2\n"), (b"", b"")):
        resumable(one_step)
        Path("model.log.csv").write_bytes(before + after)
        assert call("--resume", "--device", "cpu")[0] == 0
        lines = Path("model.log.csv").read_bytes().splitlines()
        assert lines[:len(before.splitlines())] == before.splitlines()
        assert lines[0] == whole.splitlines()[0] and steps(here)
        assert not any(line in lines for line in after.splitlines() if line != row)


def test_one_run_per_out_at_a_time(here, start, call):
    """Its log tells; model.bin would have the same."""
    job = start(here, *SMALL, "--workers", 1, "--epochs", 300, "--save-every", 1).until(reaches(3))
    for flags in ((), ("--resume",), ("--overwrite",), ("--out", "model.bin")):
        refused(*call(*SMALL, "--epochs", 300, *flags), "another run writes model.")
    assert job.process.is_alive() and not os.path.exists("model.bin")
    job.process.kill()  # its worker lives on for some seconds, and the lock does not
    job.process.join()
    start(here, *SMALL, "--epochs", 300, "--resume").until(lambda job: "step" in job.out).stop()


# ---- guards ----


def test_ten_steps_that_are_not_finite_stop(here, call, spoil):
    """What is advised then works."""
    spoil(lambda step: 4 < step <= 14)
    status, out, err = call(*SMALL, "--epochs", 3, "--save-every", 1)
    refused(status, out, err, "10 steps in a row, to 14, were not finite: model.pt keeps the last")
    assert out.count("step skipped") == 10
    assert all(torch.isfinite(x).all() for x in weights("model.pt").values())
    advice = shlex.split(err.split("lower rates: ")[1])
    assert advice[:3] == ["--init", "model.pt", "--out"]
    assert call(*SMALL, *advice)[0] == 0


def test_a_run_that_diverges_is_not_saved(here, call):
    diverging = ["--epochs", 20, "--head-lr", 10, "--weight-decay", 0, "--warmup", 0]
    refused(*call(*SMALL, *diverging), "scores are not finite numbers")
    assert all(torch.isfinite(x).all() for x in weights("model.pt").values())


def test_a_single_bad_step_is_skipped(here, call, spoil):
    spoil(lambda step: step == 3)
    status, out, err = call(*SMALL, "--epochs", 1)
    assert status == 0 and out.count("skipped") == 1
    assert "step 3: loss or gradient is not finite; step skipped (1 in a row)" in out
    assert all(torch.isfinite(x).all() for x in weights(here / "model.pt").values())


def test_weights_that_are_not_finite_are_never_saved(here, call, monkeypatch):
    """In step 5, a weight overflows that the losses do not show."""
    true = TMASS.losses
    numbers = itertools.count(1)

    def losses(self, t, f):
        if next(numbers) == 5:
            self.clip.token_embedding.weight.data[0] = math.inf
        return true(self, t, f)

    monkeypatch.setattr(TMASS, "losses", losses)
    result = call(*SMALL, "--save-every", 2)
    refused(*result, "model.pt", "not finite (clip.token_embedding.weight)", "is intact")
    content = read_weights("model.pt")
    assert content["step"] == 4 and all(torch.isfinite(x).all() for x in content["model"].values())


def test_bad_videos(own_copy, call):
    good = (own_copy / "set/red-green.mp4").read_bytes()  # of train
    for content in (b"", b"this is no video at all" * 50, good[:len(good) // 3]):
        (own_copy / "set/red-green.mp4").write_bytes(content)
        refused(*call(*SMALL, "--epochs", 1), "red-green.mp4")
    os.remove(own_copy / "set/blue-green.mp4")
    refused(*call(*SMALL), "blue-green.mp4", "row 15", "--skip-bad")
    for name in ("red-yellow", "red-black"):  # of validation and test
        (own_copy / f"set/{name}.mp4").write_bytes(b"broken")
    status, out, err = call(*SMALL, "--skip-bad")
    assert status == 0 and not err
    assert "--skip-bad: 1 missing videos left out" in out
    assert "4 videos left out, listed in model.bad.txt" in out
    lines = (own_copy / "model.bad.txt").read_text().splitlines()
    bad = sorted(re.match(".*/set/(.*?).mp4", line)[1] for line in lines)
    assert bad == ["blue-green", "red-black", "red-green", "red-yellow"]
    assert all(line.startswith(str(own_copy)) for line in lines)


def test_what_of_the_data_counts_for_nothing_is_said(own_copy, call):
    table = Path("set/my.csv").read_text()
    for name in re.findall("(.*mp4).*,val\n", table):
        os.remove(f"set/{name}")
    status, out, err = call(*SMALL, "--epochs", 0, "--skip-bad")
    assert status == 0 and "val: all 5 videos are missing" in out, err
    assert "no step: the starting point is the result" in out


# ---- what the options do ----


def test_chunk_and_bfloat16(here, call):
    flags = dict(plain=[], chunked=["--chunk", 3], bf16=["--amp", "bf16"])
    for name, more in flags.items():
        status, out, err = call(*SMALL, "--epochs", 1, "--out", f"{name}/model.pt", *more)
        assert status == 0 and ("on cpu, amp bf16" in out) == (name == "bf16")
    plain = column(here / "plain", "loss")
    assert torch.allclose(column(here / "chunked", "loss"), plain, rtol=1e-5)
    assert close(weights("chunked/model.pt"), weights("plain/model.pt"))
    halved = column(here / "bf16", "loss")
    assert not torch.equal(halved, plain) and torch.allclose(halved, plain, rtol=0.1)
    assert {x.dtype for x in weights("bf16/model.pt").values()} == {torch.float32}


def test_float16_scales_its_loss_and_resumes_exactly(here, start, call):
    fp16 = [*SMALL, "--amp", "fp16", "--epochs", 1, "--clip-lr", 1e-4, "--head-lr", 1e-3]
    status, out, _ = call(*fp16, "--out", "whole/model.pt")
    assert status == 0 and "on cpu, amp fp16" in out and "skipped" not in out
    assert call(*fp16, "--amp", "off", "--out", "plain/model.pt")[0] == 0
    halved, plain = (column(here / name, "loss") for name in ("whole", "plain"))
    assert not torch.equal(halved, plain) and torch.allclose(halved, plain, rtol=0.05)
    assert {x.dtype for x in weights("whole/model.pt").values()} == {torch.float32}
    start(here, *fp16, "--save-every", 1).until(reaches(2)).stop()
    content = read_weights("model.pt")
    assert content["scaler"]["scale"] == 65536
    assert content["scaler"]["_growth_tracker"] == content["step"]
    start(here, "--resume", "--log-every", 1).finish()
    check_equal(here, here / "whole")


def test_float16_may_seek_its_scale_for_long_but_not_for_ever(here, call, monkeypatch, spoil):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=2. ** 32))
    status, out, err = call(*SMALL, "--amp", "fp16", "--epochs", 3)
    assert status == 0 and 10 < out.count("step skipped") < 18, (out.count("skipped"), err)
    assert all(torch.isfinite(x).all() for x in weights("model.pt").values())
    spoil(lambda step: True)
    result = call(*SMALL, "--amp", "fp16", "--epochs", 6, "--out", "nan.pt")
    refused(*result, "30 steps in a row, to 30, were not finite", "--amp bf16")


def test_the_command_printed_gives_the_line_printed(own_copy, run, call):
    """With videos that lie elsewhere, are missing or broken, and frames from a cache."""
    shutil.copy("set/my.csv", "my.csv")
    os.remove("set/red-white.mp4")  # of the test split
    Path("set/white-red.mp4").write_bytes(b"broken")
    os.rename("set", "films")
    flags = ("--data", "my.csv", "--videos", "films", "--skip-bad", "--cache", "my frames",
             "--out", "a model.pt")
    status, out, err = call(*SMALL, *flags)
    assert status == 0, err
    config = read_weights("a model.pt")["config"]
    assert (config["root"], config["videos"]) == (str(own_copy), str(own_copy / "films"))
    check_test_again(run, own_copy, out)


def test_cache_trains_from_its_files(own_copy, call, monkeypatch):
    assert call(*SMALL, "--cache", "frames")[0] == 0
    kept = list((own_copy / "frames").glob("*.jpegs"))
    assert len(kept) >= 34  # each epoch leaves 2 of 26 pairs out
    first = weights("model.pt")
    opened = []
    monkeypatch.setattr(video, "read_frames", lambda *args, **kwargs: opened.append(args))
    assert call(*SMALL, "--cache", "frames", "--overwrite")[0] == 0
    assert not opened and same(first, weights("model.pt"))


def test_init_and_the_baseline(here, call):
    assert call(*SMALL, "--radius", "none", "--epochs", 1)[0] == 0
    content = read_weights("model.pt")
    assert content["config"]["support_weight"] == 0 == content["tmass"]["support_weight"]
    first = steps(here)[0]
    assert float(first["loss"]) == pytest.approx(float(first["ce"]))  # no mass: X-Pool's loss
    status, out, _ = call(*SMALL, "--init", "model.pt", "--epochs", 0, "--out", "grown.pt")
    assert status == 0 and "starting anew: radius (LinearRadius)" in out
    grown = weights("grown.pt")
    assert all(torch.equal(x, grown[k]) for k, x in content["model"].items())
    grown_to = "--init", "grown.pt", "--out", "x.pt"
    refused(*call(*SMALL, *grown_to, "--heads", 4), "grown.pt has 1 heads", "--heads 1")
    assert not os.path.exists("x.pt")
    for option, value, anew in (("--frames", 3, "radius (LinearRadius)"),
                                ("--pooling", "mean", "pool (MeanPool)")):
        _, out, _ = call(*SMALL, *grown_to, "--epochs", 0, option, value, "--overwrite")
        assert f"starting anew: {anew}\n" in out
    assert torch.equal(weights("x.pt")["radius.linear.weight"], grown["radius.linear.weight"])
    clip_of = "--clip", "grown.pt", "--epochs", 0, "--out", "clip.pt"  # its CLIP and tokenizer only
    assert call(*SMALL, *clip_of)[0] == 0
    assert read_weights("clip.pt")["merges"] == content["merges"]
    assert torch.equal(weights("clip.pt")["clip.text_projection"], grown["clip.text_projection"])


def test_a_frozen_clip_stays_as_it_is(here, start, call):
    """In a resumed run, too."""
    assert call(*SMALL, "--epochs", 0, "--out", "start.pt")[0] == 0
    frozen = [*SMALL, "--freeze-clip", "--radius", "scaled"]
    job = start(here, *frozen, "--epochs", 300).until(reaches(2)).stop()
    assert "CLIP 0 parameters" in job.out
    resumable("model.pt")
    assert call("--resume", "--device", "cpu")[0] == 0
    before, after = weights("start.pt"), weights("model.pt")
    clip = [name for name in before if name.startswith("clip.")]
    assert clip and all(torch.equal(before[name], after[name]) for name in clip)
    assert not torch.equal(before["pool.linear.weight"], after["pool.linear.weight"])
    nothing = "--pooling", "query", "--radius", "none", "--out", "none.pt"
    refused(*call(*frozen, *nothing), "--freeze-clip leaves nothing to train")


def test_tensorboard(here, call, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert call(*SMALL, "--epochs", 1, "--tensorboard", "curves")[0] == 0
    found = EventAccumulator("curves").Reload()
    assert {"loss", "support", "head_lr", "clip_lr", "scale", "val_R1"} <= set(
        found.Tags()["scalars"])
    points = [(point.step, f"{point.value:.4g}") for point in found.Scalars("loss")]
    assert points == [(int(row["step"]), f"{float(row['loss']):.4g}") for row in steps(here)]


def test_tensorboard_is_asked_for_where_it_is_missing(here, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import fails
    refused(*call(*SMALL, "--tensorboard", "curves"), "pip install tensorboard")
    assert os.listdir(here) == ["set"]


# ---- bad input ----


def test_bad_options_cost_one_line(here, run):
    """The command itself, once; the others below call it within this process."""
    result = run("train.py", *SMALL, "--radius", "square", cwd=here, timeout=60)
    refused(result.returncode, result.stdout, result.stderr, "'square'")
    assert result.stdout == ""


NUMBERS = {
    "--head-lr": ("nan", "-1", "1e9"),
    "--clip-lr": ("-1", "inf"),
    "--dropout": ("nan", "1"),
    "--warmup": ("1.5", "nan"),
    "--support-weight": ("inf", "-1"),
    "--prior-std": ("nan", "-1", "1e30"),
    "--heads": ("0", "-1", "x"),
    "--seed": ("-1", str(10 ** 22), "1.5"),
    "--pretrain": ("-1", "1e3"),
    "--batch": ("1", "0", str(10 ** 12)),
    "--frames": ("0", "-3", str(10 ** 9)),
    "--chunk": ("-1", "x"),
    "--workers": ("-1", str(10 ** 6)),
    "--log-every": ("0", "-1"),
}


def test_numbers_that_make_no_sense_are_refused_at_once(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is here: what is read first would be missed first
    for option, values in NUMBERS.items():
        for value in values:
            result = call("--data", "absent.csv", f"{option}={value}")
            refused(*result, f"argument {option}: ", f"'{value}'")
    assert not list(tmp_path.iterdir())


BAD = {
    "--data nothing": "unknown data set 'nothing'",
    "--data msrvtt --root no/such": "no/such",
    "--data msrvtt --root folder": "MSRVTT_train.9k.csv",
    "--data absent.csv": "absent.csv",
    "--root folder": "26 of 26 videos are missing",
    "--videos absent": "absent: there is no such folder",
    "--out folder": "--out folder cannot be written: give a plain file's name",
    "--out file/model.pt": "file/model.pt",
    "--batch 27": "my.csv: 26 training pairs are too few for a batch of 27: lower --batch",
    "--batch many": "many",
    "--pooling max": "max",
    "--pretrain 5": "--pretrain",
    "--colour red": "--colour",
    "--clip ViT-B/99": "ViT-B/99",
    "--clip cut.pt": "cut.pt",
    "--clip strange.pt": "strange.pt",
    "--init cut.pt": "cut.pt",
    "--init absent.pt": "absent.pt",
    "--init other.pt": "other.pt",
    "--out strange.pt --resume": "strange.pt is not a checkpoint of this program",
    "--device gpu": "gpu",
    "--device meta": "--device meta",
    "--device cuda:99": "--device cuda:99",
}


def test_bad_input(own_copy, call):
    Path("file").write_text("a regular file")
    Path("folder").mkdir()
    torch.save({"model": [1, 2]}, "other.pt")
    torch.save({"some.weight": torch.ones(2)}, "strange.pt")
    Path("cut.pt").write_bytes(Path("set/red-red.mp4").read_bytes()[:100])
    before = sorted(p.name for p in own_copy.iterdir())
    for words, reason in BAD.items():
        refused(*call(*SMALL, *words.split()), reason)
    assert sorted(p.name for p in own_copy.iterdir()) == before  # nothing was begun, nothing lost
    assert Path("file").read_text() == "a regular file"
