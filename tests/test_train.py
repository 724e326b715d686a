"""Training: functions of the step, one process against two, exact resume, kills, guards, bad input.

Runs are real processes. Most are forked from a server that has imported train.py (forkserver),
which saves seconds each; torchrun and the plain command line have tests of their own.
"""
import argparse
import contextlib
import copy
import csv
import fcntl
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
from conftest import free_port
from test_weights import DAMAGE, setting, soon  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from videos import write_video

import data
import train
from eval import format_metrics
from lib import processes, runs
from lib.processes import ALONE
from lib.weights import read_weights

ROOT = Path(train.__file__).resolve().parent
SMALL = ["--data", "set/my.csv", "--clip", "tiny", "--frames", 2, "--batch", 4, "--epochs", 2,
         "--workers", 0, "--log-every", 1, "--device", "cpu"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220),
           "yellow": (220, 210, 40), "white": (240, 240, 240), "black": (10, 10, 10)}


def write_table(path, rows, columns=("video", "caption", "split")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """36 videos from one colour to another: 26 train, 5 val, 5 test. -> the folder of set/."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "set").mkdir()
    rows, blend = [], torch.linspace(0, 1, 8)[:, None, None, None]
    for i, (a, b) in enumerate(itertools.product(COLOURS, COLOURS)):
        frames = (1 - blend) * torch.tensor(COLOURS[a]) + blend * torch.tensor(COLOURS[b])
        frames = frames.expand(8, 48, 48, 3).to(torch.uint8).contiguous()
        write_video(folder / "set" / f"{a}-{b}.mp4", frames)
        split = {3: "val", 5: "test"}.get(i % 7, "train")
        rows.append((f"{a}-{b}.mp4", f"the picture turns from {a} to {b}", split))
    write_table(folder / "set" / "my.csv", rows)
    return folder


@pytest.fixture
def here(videos, tmp_path, monkeypatch):
    """A working folder of the test's own, with the data set in set/."""
    (tmp_path / "set").symlink_to(videos / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def start():
    """start(folder, *args) -> Job: train.py in a process of its own."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    context, jobs = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["train", "videos", "pytest"])

    def start(folder, *args, file_limit=None, slow_workers=False):
        jobs.append(Job(context, folder, args, file_limit, slow_workers))
        return jobs[-1]
    yield start
    for job in jobs:
        job.process.kill()


def child(folder, args, file_limit, slow_workers):
    os.chdir(folder)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if slow_workers:  # as on a busy machine
        begin = processes._obey
        processes._obey = lambda ending: (time.sleep(0.2), begin(ending))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as on the command line
    sys.argv = ["train.py", *args]
    sys.exit(train.run(train.main))


class Job:
    def __init__(self, context, folder, args, file_limit, slow_workers):
        self.folder = Path(folder)
        for name in ("stdout.txt", "stderr.txt"):
            (self.folder / name).unlink(missing_ok=True)
        args = [str(a) for a in args]
        arguments = str(folder), args, file_limit, slow_workers
        self.process = context.Process(target=child, args=arguments)
        self.process.start()

    def read(self, name):
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    out = property(lambda self: self.read("stdout.txt"))
    err = property(lambda self: self.read("stderr.txt"))

    def said(self):
        return self.out[-2000:] + self.err[-2000:]

    def wait(self, timeout=120):
        """-> exit status, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.said()}"
        return self.process.exitcode

    def until(self, condition, timeout=90):
        deadline = time.time() + timeout
        while not condition(self):
            assert self.process.is_alive() and time.time() < deadline, f"over: {self.said()}"
            time.sleep(0.002)
        return self

    def finish(self):
        assert self.wait() == 0, self.err
        return self


def reaches(step):
    return lambda job: f"step {step:5d}/" in job.out


def steps(folder):
    with open(Path(folder) / "model.log.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def weights(path):
    return read_weights(path)["model"]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


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


# ---- pure functions of the step ----

def test_learning_rate_by_hand():
    rates = [train.learning_rate(s, 10, 0.2) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)  # half way down the cosine: (6 - 2) / 8
    assert rates[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert all(0 < x <= 1 for x in rates)
    assert train.learning_rate(0, 1, 0.0) == 1  # a single step learns


def test_batches():
    every = list(train.Batches(23, 4, 3, seed=1))
    assert len(every) == train.Batches(23, 4, 3, seed=1).total == 15  # 5 an epoch, 3 pairs over
    for epoch in range(3):
        pairs = [pair for batch in every[5 * epoch:5 * epoch + 5] for pair in batch]
        assert {e for e, _ in pairs} == {epoch} and len({i for _, i in pairs}) == 20
    assert [i for _, i in every[0]] != [i for _, i in every[5]]  # another order each epoch
    assert every != list(train.Batches(23, 4, 3, seed=2))
    for start in (1, 5, 7, 15):
        assert list(train.Batches(23, 4, 3, seed=1, start=start)) == every[start:]
    shares = [list(train.Batches(23, 4, 3, seed=1, start=2, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares)] == every[2:]


def test_settings_of_the_method_are_written_once():
    """TMASS.__init__ has them: recipes and options name no other, and every one has an option."""
    parameters = inspect.signature(train.TMASS.__init__).parameters
    defaults = {k: x.default for k, x in parameters.items() if k not in ("self", "clip")}
    assert len(defaults) == 10 and train.METHOD == defaults == train.TMASS(
        train.CLIP(vocab_size=300, **train.TINY)).config
    options = vars(train.parser().parse_args([]))
    assert train.BASE.keys() <= options.keys()
    assert all(options[name] is None for name in train.BASE)  # else it would hide the recipe's
    for recipe in train.RECIPES.values():
        assert recipe.keys() <= train.BASE.keys()


def test_a_data_set_without_a_recipe_trains_with_the_default_one(here, monkeypatch):
    assert set(train.RECIPES) < set(data.names())
    for name in ("vatex", "charades"):
        assert name in data.names() and name not in train.RECIPES
        args = train.parser().parse_args(["--data", name])
        assert train.settle(args, 1) is None
        assert {k: getattr(args, k) for k in train.BASE} == train.BASE
        assert args.root == str(here / "data" / name)


@pytest.mark.parametrize("words, steps", [
    ("", 300), ("--clip tiny", 300), ("--clip any.pt", 0), ("--init any.pt", 0),
    ("--init any.pt --pretrain 7", 7)])
def test_loaded_weights_are_not_warmed_up_unasked(words, steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parser().parse_args(words.split())
    assert train.settle(args, 1) is None
    assert args.pretrain == steps


def test_moved_shapes_are_resumed_with_frames_beside_them(here, one_step):
    """What lies in the old place would be a folder that is no data set."""
    resumable(one_step, data="shapes", root=str(here / "old"), cache=str(here / "old/frames"))
    for words, cache in (("", "old/frames"), ("--root old", "old/frames"),
                         ("--root new", "new/frames"), ("--root new --cache c", "c")):
        args = train.parser().parse_args(["--resume", *words.split()])
        train.settle(args, 1)
        assert args.cache == str(here / cache), words


def test_help_has_each_setting_with_its_default_and_all_recipes(capsys):
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in train.BASE.items():
        assert f" --{name.replace('_', '-')} " in text, name
        assert f"(default: {value})" in text
    for name, recipe in train.RECIPES.items():
        assert f"{name}: {next(iter(recipe))}=" in text


# ---- one process against two ----

GRADIENTS = """
import copy, functools, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import train
from clip_model import CLIP
from lib.processes import Job
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
        clip = CLIP(vocab_size=512, **train.TINY)
        model = TMASS(clip, frames=3, dropout=0.2, prior_std=0.1, **method).train()
        alone = copy.deepcopy(model)
        rows = slice(0, cut) if rank == 0 else slice(cut, 8)
        ddp = DistributedDataParallel(model, static_graph=True)
        torch.manual_seed(5)  # noise and dropout
        gather = functools.partial(train.Gather.apply, Job(rank, 2), cut != 4)
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


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(script, *args, cwd, **popen):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ["--nproc_per_node", "2", "--master_port", free_port()]
    command = [*TORCHRUN, *options, str(script), *map(str, args)]
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes, **popen)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    job = torchrun(tmp_path / "gradients.py", cwd=tmp_path)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err[-3000:]
    assert out.count("equal") == 24


BIASED = """
import sys, torch, train

class Biased(train.CLIP):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))

train.CLIP = Biased
sys.exit(train.run(train.main))
"""


def test_two_processes_train_as_one(here, start):
    """Also where an encoder, as SigLIP does, has a parameter that no score depends on."""
    for name in ("one", "two"):
        (here / name).mkdir()
    (here / "biased.py").write_text(BIASED)
    settings = [*SMALL[2:], "--data", here / "set/my.csv", "--clip-lr", 1e-5, "--head-lr", 1e-4,
                "--batch", 6]
    one = start(here / "one", *settings)
    job = torchrun(here / "biased.py", *settings, cwd=here / "two")
    out, err = job.communicate(timeout=150)
    assert job.returncode == 0, err[-3000:]
    one.finish()
    a, b = steps(here / "one"), steps(here / "two")
    assert len(a) == len(b) == 8
    for x, y in zip(a, b):
        for key in ("loss", "stochastic", "support", "ce"):
            assert float(x[key]) == pytest.approx(float(y[key]), rel=1e-5, abs=1e-5)
        assert float(x["grad_norm"]) == pytest.approx(float(y["grad_norm"]), rel=1e-3)

    def metrics(text):
        return [line for line in text.splitlines() if line.startswith(("validation", "test"))]
    assert metrics(one.out) == metrics(out) and len(metrics(out)) == 4
    assert out.count("settings:") == 1 and out.count("step     1/8") == 1  # only rank 0 speaks
    assert sorted(p.name for p in (here / "two").iterdir()) == ["model.log.csv", "model.pt"]


def children(pid):
    lists = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(lists).split()]


def test_a_dead_process_ends_the_job(here):
    with open(here / "out.txt", "w") as file:
        job = torchrun(ROOT / "train.py", *SMALL, "--epochs", 2000, cwd=here)
        try:
            for line in job.stdout:
                file.write(line)
                if line.startswith("step     3/"):
                    break
            workers = children(job.pid)
            assert len(workers) == 2
            os.kill(workers[1], signal.SIGKILL)
            started = time.time()
            out, err = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode not in (0, None) and time.time() - started < 60
    assert "SIGKILL" in err or "Signal 9" in err, err[-3000:]
    assert "error: another process of this job died; the last checkpoint" in err
    assert f"go on with torchrun --nproc_per_node 2 {ROOT / 'train.py'} --data" in err
    assert "pair.cc" not in err
    assert not any(Path(f"/proc/{p}").exists() for p in workers)
    assert read_weights(here / "model.pt")["finished"] is False


# ---- resume ----

RESUMABLE = [*SMALL, "--workers", 2, "--epochs", 3, "--save-every", 4, "--clip-lr", 5e-4,
             "--head-lr", 1e-3]


@pytest.fixture(scope="session")
def uninterrupted(videos, start, tmp_path_factory):
    """-> (folder, seconds) of a run of 18 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "set").symlink_to(videos / "set")
    started = time.time()
    job = start(folder, *RESUMABLE).finish()
    return folder, time.time() - started, job.out


def check_equal(folder, whole):
    assert same(weights(folder / "model.pt"), weights(whole / "model.pt"))
    rows = [[(r["step"], r["loss"], r["grad_norm"]) for r in steps(x)] for x in (folder, whole)]
    assert rows[0] == rows[1]


def test_an_uninterrupted_run(uninterrupted):
    folder, _, out = uninterrupted
    content = read_weights(folder / "model.pt")
    assert content["finished"] and content["step"] == 18 and "optimizer" not in content
    assert [int(r["step"]) for r in steps(folder)] == list(range(1, 19))
    best = content["best"][0]
    assert f"the result is that of step {best}, the best on the validation split" in out
    assert "test: t2v R@1" in out and "checkpoint: model.pt" in out and "left" in out


@pytest.mark.parametrize("number, step", [
    (signal.SIGTERM, 8), (signal.SIGINT, 3), (signal.SIGHUP, 5)])
def test_resume_is_exact(here, start, uninterrupted, call, number, step):
    job = start(here, *RESUMABLE).until(reaches(step))
    os.kill(job.process.pid, number)
    assert job.wait() == 128 + number, job.err
    assert f"stopped by {number.name} after step" in job.out
    assert job.out.rstrip().endswith("--resume")
    assert "continue with: python train.py" in job.out
    assert job.err == "" and step <= read_weights(here / "model.pt")["step"] < 18
    if number == signal.SIGTERM:  # what an unfinished run refuses
        status, _, err = call(*RESUMABLE)
        assert status == 2 and "unfinished run" in err and "--resume" in err
        status, _, err = call(*RESUMABLE, "--batch", 6, "--resume")
        assert status == 2 and "--batch 6 differs from 4" in err
    # model.pt has all other settings
    start(here, "--resume", "--workers", 2, "--log-every", 1, "--save-every", 4).finish()
    check_equal(here, uninterrupted[0])
    if number == signal.SIGTERM:
        before = (here / "model.pt").read_bytes()
        status, out, err = call("--resume")
        assert status == 0 and "is finished (step 18): nothing to resume" in out
        assert before == (here / "model.pt").read_bytes()


def test_a_signal_to_all_processes_while_validating(here, start, uninterrupted):
    """As from a terminal or a batch system: all workers get it too."""
    job = start(here, *RESUMABLE).until(reaches(6))
    job.until(lambda job: len(children(job.process.pid)) > 2)  # two read for training
    for pid in (*children(job.process.pid), job.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert job.wait() == 143 and job.err == "", job.err
    assert "validation after epoch 1" in job.out and read_weights(here / "model.pt")["step"] == 6
    start(here, *RESUMABLE, "--resume").finish()
    check_equal(here, uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["training", "validation"])
def test_a_signal_to_all_processes_while_workers_start(here, start, when):
    """A worker that gets it before it could say that it ignores it would take the run with it."""
    for k in range(3):
        flags = "--workers", 2, "--epochs", 300, "--out", f"{k}.pt"
        job = start(here, *SMALL, *flags, slow_workers=True)
        there = job.until(reaches(6)) and 2 if when == "validation" else 0  # workers of training
        job.until(lambda job: len(children(job.process.pid)) > there)
        time.sleep(random.uniform(0, 0.2))
        for pid in (*children(job.process.pid), job.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert job.wait() == 143 and job.err == "", job.err
        content = read_weights(here / f"{k}.pt")
        step = content["step"]
        assert not content["finished"] and f"stopped by SIGTERM after step {step};" in job.out
        assert step >= (6 if when == "validation" else 1)  # what was under way was done and saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_die_with_the_job_are_no_bad_video(here, start, number):
    job = start(here, *SMALL, "--workers", 2, "--epochs", 300).until(reaches(2))
    workers = children(job.process.pid)
    os.kill(job.process.pid, number)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert job.wait() == 128 + number and job.err == "", job.err
    assert read_weights(here / "model.pt")["finished"] is False
    assert job.out.rstrip().endswith("--resume")


@pytest.mark.slow
def test_sigterm_under_torchrun(here):
    settings = [*SMALL[2:], "--data", here / "set/my.csv", "--epochs", 12, "--skip-bad"]
    for name in ("whole", "cut"):
        (here / name).mkdir()
    whole = torchrun(ROOT / "train.py", *settings, cwd=here / "whole")
    job = torchrun(ROOT / "train.py", *settings, cwd=here / "cut")
    lines = list(itertools.takewhile(lambda line: not line.startswith("step     3/"), job.stdout))
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=100)
    assert job.returncode != 0, (lines, out, err[-3000:])
    assert out.count("stopped by SIGTERM after step") == 1, (lines, out, err[-3000:])
    content = read_weights(here / "cut" / "model.pt")
    assert 3 <= content["step"] < 72 and not content["finished"]
    command = shlex.split(out.split("continue with: ")[1].splitlines()[0])
    assert command[:3] == ["torchrun", "--nproc_per_node", "2"] and command[-1] == "--resume"
    again = torchrun(*command[3:], cwd=here / "cut")
    assert [again.communicate(timeout=150), again.returncode][1] == 0
    assert [whole.communicate(timeout=150), whole.returncode][1] == 0
    check_equal(here / "cut", here / "whole")


def descendants(pid):
    return [pid, *itertools.chain(*map(descendants, children(pid)))]


@pytest.mark.slow
def test_sigterm_under_torchrun_while_no_batch_arrives(here):
    """One process waits for workers that stand still, and the other for that process."""
    (here / "run.py").write_text("import sys, train, lib.processes\n"
                                 "lib.processes.STUCK = 1\n"
                                 "lib.processes.GRACE = 0.5\n"
                                 "if __name__ == '__main__':\n"
                                 "    sys.exit(train.run(train.main))\n")
    settings = [*SMALL, "--workers", 2, "--epochs", 2000, "--save-every", 10_000, "--batch", 2]
    job = torchrun(here / "run.py", *settings, cwd=here)
    stopped = []
    try:
        assert any(line.startswith("step     3/") for line in job.stdout)
        [rank] = [pid for pid in children(job.pid)
                  if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        for server in children(rank):
            stopped += children(server)
        assert len(stopped) == 2
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        everyone = descendants(job.pid)[1:]
        job.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=20)
        deadline = time.monotonic() + 10  # the system may be slow to forget them
        while left := [pid for pid in everyone if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        job.kill()
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    step = read_weights(here / "model.pt")["step"]
    assert step >= 3 and f"stopped by SIGTERM after step {step};" in out, (out, err[-3000:])
    assert "error: " not in err


def test_a_signal_during_the_last_save_ends_the_run(here, call, monkeypatch):
    save = runs.save_checkpoint

    def interrupted(*arguments, finished, **state):
        save(*arguments, finished=finished, **state)
        if finished:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs, "save_checkpoint", interrupted)
    status, out, _ = call(*SMALL)
    assert status == 128 + signal.SIGTERM and "stopped by SIGTERM after step 12;" in out
    assert "test: " not in out and read_weights("model.pt")["finished"]


def kill_and_resume(folder, start, uninterrupted, when):
    whole, seconds, _ = uninterrupted
    args = [*RESUMABLE, "--save-every", 1, "--resume"]  # --resume without a checkpoint starts
    job = start(folder, *args)
    if when is None:  # while saving
        step = random.randint(1, 15)
        job.until(reaches(step))
        job.until(lambda job: list(folder.glob("model.pt*.part")) or "checkpoint:" in job.out)
    else:
        time.sleep(when * seconds)
    helpers = children(job.process.pid) if job.process.is_alive() else []
    job.process.kill()
    job.process.join()
    if (folder / "model.pt").exists():
        assert read_weights(folder / "model.pt")["format"] == "tmass"
    for pid in helpers:  # its data workers would notice within seconds, and leave
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    start(folder, *args).finish()
    check_equal(folder, whole)
    assert not (folder / "model.pt.lock").exists()


@pytest.mark.slow
def test_kill_at_random_moments(here, start, uninterrupted):
    for k, when in enumerate((None, random.uniform(0.1, 0.5), random.uniform(0.5, 0.9))):
        folder = here / str(k)
        folder.mkdir()
        (folder / "set").symlink_to(here / "set")
        kill_and_resume(folder, start, uninterrupted, when)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(20))
def test_kill_at_twenty_random_moments(here, start, uninterrupted, k):
    kill_and_resume(here, start, uninterrupted, None if k % 3 == 0 else random.uniform(0.05, 1.1))


@pytest.mark.slow
def test_full_disk_while_saving(here, start, uninterrupted):
    job = start(here, *RESUMABLE).until(reaches(2))
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143
    before = (here / "model.pt").read_bytes()
    job = start(here, "--resume", "--save-every", 4, "--log-every", 1, file_limit=len(before) // 2)
    assert job.wait() == 2
    assert job.err.startswith("error: cannot write checkpoint model.pt: ")
    assert job.err.count("\n") == 1
    hint = "; the last checkpoint, if any, is intact: go on with python train.py --resume "
    assert hint in job.err
    assert (here / "model.pt").read_bytes() == before and not list(here.glob("*.part"))
    start(here, "--resume", "--save-every", 4, "--log-every", 1).finish()
    check_equal(here, uninterrupted[0])


def test_full_disk_under_the_log(here, call):
    assert call(*SMALL, "--epochs", 0)[0] == 0
    content = read_weights("model.pt")
    torch.save({**content, "finished": False}, "model.pt")  # as of a run that failed at its start
    os.remove("model.log.csv")
    os.symlink("/dev/full", "model.log.csv")
    status, out, err = call(*SMALL)
    go_on = "intact: go on with python train.py --data", "--resume"
    refused(status, out, err, "No space left on device", *go_on)


# ---- what is there already ----

def test_out_replaces_nothing_but_a_run_that_may_go(here, call):
    Path("notes.txt").write_text("of mine")
    Path("empty.pt").touch()
    torch.save({"some.weight": torch.ones(2)}, "other.pt")
    shutil.copy("set/red-red.mp4", "film.mp4")
    os.symlink("notes.txt", "link.pt")
    os.mkfifo("pipe.pt")
    os.mkdir("folder")
    assert call(*SMALL, "--epochs", 0)[0] == 0
    kept = {p: p.read_bytes() for p in here.iterdir() if p.is_file()}
    names = ("notes.txt", "empty.pt", "other.pt", "film.mp4", "link.pt", "pipe.pt", "folder",
             "/dev/null")
    for flags in ((), ("--overwrite",), ("--resume",), ("--overwrite", "--resume")):
        for name in names:
            refused(*call(*SMALL, "--out", name, *flags), name)
    refused(*call(*SMALL, "--epochs", 1), "model.pt holds a finished run", "--overwrite")
    for option in ("--init", "--clip"):
        same_file = option, "model.pt", "--out", "folder/../model.pt", "--overwrite"
        reason = "model.pt is what --clip or --init starts from"
        refused(*call(*SMALL, *same_file), reason)
    Path("new.log.csv").write_text("step\n1\n")
    refused(*call(*SMALL, "--out", "new.pt"), "new.log.csv belongs to another run, whose new.pt")
    Path("new.log.csv").unlink()
    assert kept == {p: p.read_bytes() for p in here.iterdir() if p.is_file()}
    assert os.path.islink("link.pt")
    status, out, err = call(*SMALL, "--epochs", 1, "--overwrite")
    assert status == 0 and read_weights("model.pt")["step"] == 6


@pytest.mark.parametrize("name", ["", "a" * 245])
def test_a_name_that_cannot_be_written_is_refused_before_anything_long(here, call, name):
    status, out, err = call(*SMALL, "--out", name)
    refused(status, out, err, f"--out {name} cannot be written")
    assert not out and os.listdir(here) == ["set"]


SCALER = dict(scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000,
              _growth_tracker=2)


def unfinished(**values):
    return lambda content: content.update(values)


def moments(content):
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def state_of(**values):
    """A change of what the optimizer keeps of each parameter."""
    def change(content):
        for state in content["optimizer"]["state"].values():
            state.update({name: change_of(state[name]) for name, change_of in values.items()})
    return change


RUN_DAMAGE = [
    lambda c: c.pop("optimizer"),
    unfinished(optimizer=5),
    lambda c: c["optimizer"].pop("state"),
    moments,
    *(unfinished(step=x) for x in ("1", 1.5, -1, None, True)),
    *(unfinished(best=x) for x in (5, ["x", 1], [1, "x"], [1, math.nan], [], {}, "", 0, False)),
    *(state_of(step=lambda _, x=x: torch.tensor(x)) for x in ([1.0, 2.0], math.nan)),
    *(state_of(exp_avg=change) for change in (torch.Tensor.to_sparse, lambda x: x * math.nan)),
    *(unfinished(scaler=dict(SCALER, **{name: x})) for name in SCALER for x in ("x", None)),
    *(unfinished(scaler=dict(SCALER, scale=x)) for x in (0.0, -1.0, math.nan, torch.ones(2))),
    unfinished(training={}),
    setting("config", help=True, epochs="x"),
    setting("config", **{"": True, "epochs": "x"}),
    lambda c: c["config"].update({5: True, "epochs": "x"}),
    *(unfinished(bad_videos=x) for x in (5, None, [5])),
    unfinished(training=5),
    unfinished(scaler=5),
    unfinished(finished="no"),
]


@pytest.fixture(scope="session")
def one_step(videos, tmp_path_factory, start):
    """What an unfinished run holds."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "set").symlink_to(videos / "set")
    job = start(folder, *SMALL, "--epochs", 300).until(reaches(2))
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143
    return folder / "model.pt"


@pytest.mark.slow
def test_damaged_runs_are_not_resumed(here, call, one_step, soon):  # noqa: F811
    wrong = []
    whole = read_weights(one_step)
    for number, damage in enumerate([*DAMAGE, *RUN_DAMAGE]):
        content = copy.deepcopy(whole)
        damage(content)
        torch.save(content, "model.pt")
        signal.alarm(20)  # for each
        try:
            status, out, err = call("--resume", "--workers", 0)
        except Exception as error:
            wrong.append((number, repr(error)))
            continue
        if status != 2 or err.count("\n") != 1 or "model.pt" not in err:
            wrong.append((number, status, err[-300:]))
    assert not wrong


def resumable(one_step, **settings):
    """Make model.pt a run that ends after an epoch, with other settings. -> what it holds."""
    content = copy.deepcopy(read_weights(one_step))
    content["config"] |= dict(epochs=1, workers=0) | settings
    torch.save(content, "model.pt")
    return content


def test_settings_of_a_run_are_those_that_options_take(here, call, one_step):
    wrong = dict(amp="x", augment="x", grad_checkpoint="no", head_lr=11, root=3)
    for name, value in wrong.items():
        resumable(one_step, **{name: value})
        refused(*call("--resume", "--device", "cpu"), str(value))
    # The model has 2 frames. What is not said is as if it were not there.
    resumable(one_step, gone="a setting of an older version", frames=9, warmup=None, head_lr=None)
    assert call("--resume", "--device", "cpu")[0] == 0


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
    old["config"].update(data=os.path.abspath("moved/my.csv"), root=os.path.abspath("moved"))
    torch.save(old, "model.pt")
    assert call("--resume", "--device", "cpu")[0] == 0
    resumable(one_step)
    assert call(*elsewhere)[0] == 0
    config = read_weights("model.pt")["config"]
    assert (config["data"], config["root"]) == (str(own_copy / "moved/my.csv"),
                                                str(own_copy / "moved"))


def test_clip_can_be_left_as_it_is(here, call):
    assert call(*SMALL, "--epochs", 0, "--out", "start.pt")[0] == 0
    status, out, _ = call(*SMALL, "--epochs", 1, "--freeze-clip", "--radius", "scaled")
    assert status == 0 and "CLIP 0 parameters" in out and "clip_lr" not in out
    before, after = weights("start.pt"), weights("model.pt")
    clip = [name for name in before if name.startswith("clip.")]
    assert clip and all(torch.equal(before[name], after[name]) for name in clip)
    assert not torch.equal(before["pool.linear.weight"], after["pool.linear.weight"])
    nothing = "--freeze-clip", "--pooling", "query", "--radius", "none", "--out", "none.pt"
    refused(*call(*SMALL, *nothing), "--freeze-clip leaves nothing to train")


def test_a_frozen_run_is_resumed_frozen(here, start, call):
    job = start(here, *SMALL, "--epochs", 300, "--freeze-clip").until(reaches(2))
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143
    before = resumable("model.pt")
    status, out, err = call("--resume", "--device", "cpu")
    assert status == 0 and "freeze_clip=True" in out, err
    same_scale = weights("model.pt")["clip.logit_scale"], before["model"]["clip.logit_scale"]
    assert torch.equal(*same_scale)


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


def test_a_run_with_steps_is_not_overwritten_and_one_without_is(here, start, call):
    status, _, err = call(*SMALL, "--heads", 3)  # fails when the model is built, leaves nothing
    assert status == 2 and not os.path.exists("model.pt")
    assert call(*SMALL, "--epochs", 0)[0] == 0
    torch.save({**read_weights("model.pt"), "finished": False}, "model.pt")
    job = start(here, *SMALL, "--epochs", 300).until(reaches(2))
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143
    before = Path("model.pt").read_bytes()
    for flags in ((), ("--overwrite",)):
        refused(*call(*SMALL, *flags), "model.pt holds an unfinished run at step", "--resume")
    assert before == Path("model.pt").read_bytes()


def test_each_run_has_its_own_log(here, call):
    assert call(*SMALL, "--epochs", 1, "--out", "a.pt")[0] == 0
    first = Path("a.log.csv").read_text()
    assert call(*SMALL, "--epochs", 1, "--out", "b.pt", "--seed", 5)[0] == 0
    assert first == Path("a.log.csv").read_text() != Path("b.log.csv").read_text()
    assert len(first.splitlines()) == 1 + 6 + 1  # a head, six steps, one validation


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
    job = start(here, *SMALL, "--workers", 1, "--epochs", 300, "--save-every", 1).until(reaches(3))
    for flags in ((), ("--resume",), ("--overwrite",)):
        reason = f"model.pt is being written by process {job.process.pid}: "
        refused(*call(*SMALL, "--epochs", 300, *flags), reason)
    assert job.process.is_alive() and (here / "model.pt.lock").exists()
    job.process.kill()  # its worker lives on for some seconds, and the lock does not
    job.process.join()
    job = start(here, *SMALL, "--epochs", 300, "--resume").until(lambda job: "300  loss" in job.out)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143 and not (here / "model.pt.lock").exists()


def test_a_lock_that_its_run_has_just_removed(here, call, monkeypatch):
    """A third run might have locked a new file of that name meanwhile: two would write."""
    lockf = fcntl.lockf

    def later(file, *flags):
        os.unlink(file.name)  # as the run that had it does at its end
        lockf(file, *flags)

    monkeypatch.setattr(fcntl, "lockf", later)
    refused(*call(*SMALL), "model.pt is being written")
    assert not Path("model.pt").exists()


# ---- guards ----

def test_ten_steps_that_are_not_finite_stop(here, call):
    diverging = ("--epochs", 20, "--head-lr", 10, "--weight-decay", 0, "--warmup", 0,
                 "--save-every", 1)
    Path("no-val.csv").write_text(Path("set/my.csv").read_text().replace(",val", ",train"))
    status, out, err = call(*SMALL, *diverging, "--data", "no-val.csv", "--root", "set")
    kept = "model.pt keeps the last good state, step"
    refused(status, out, err, "10 steps in a row, to ", "logit scale", kept)
    content = read_weights(here / "model.pt")
    assert f"keeps the last good state, step {content['step']};" in err and content["step"] < 26
    assert out.count("step skipped") >= 10
    refused(*call(*SMALL, *diverging, "--out", "val.pt"), "scores are not finite numbers")
    for kept in (content["model"], weights("val.pt"), read_weights("val.pt")["training"]["model"]):
        assert all(torch.isfinite(x).all() for x in kept.values())


def test_a_single_bad_step_is_skipped(here, call, monkeypatch):
    true, calls = train.TMASS.losses, []

    def losses(self, t, f):  # the real losses, but one of them spoilt
        calls.append(0)
        out = true(self, t, f)
        return {**out, "loss": out["loss"] * math.nan} if len(calls) == 3 else out
    monkeypatch.setattr(train.TMASS, "losses", losses)
    status, out, err = call(*SMALL, "--epochs", 1)
    assert status == 0 and out.count("skipped") == 1
    assert "step 3: loss or gradient is not finite; step skipped (1 so far)" in out
    assert all(torch.isfinite(x).all() for x in weights(here / "model.pt").values())


class Waits(TorchDispatchMode):
    """Counts how often the program reads a number that a device would have to be waited for."""
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_and_waits_for_nothing(fp16):
    torch.manual_seed(0)
    model = train.TMASS(train.CLIP(vocab_size=300, **train.TINY), frames=2)
    optimizer = train.make_optimizer(model, argparse.Namespace(**train.BASE))
    scaler = torch.amp.GradScaler("cpu", init_scale=8., enabled=fp16)
    ids, pixels = torch.randint(1, 300, (4, 9)), torch.rand(4, 2, 3, 32, 32)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3

    def step(factor):
        loss = factor * model(ids, pixels)["loss"]
        with Waits() as waits:
            norm, finite = train.descend(loss, model, optimizer, scaler)
        assert waits.count == 0
        assert bool(finite) and 0 < norm < math.inf or not finite
        return bool(finite), copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    finite, (weights, moments) = step(1.)
    assert finite
    for factor in (math.nan, math.inf):
        finite, (again, same_moments) = step(factor)
        assert not finite and same(weights, again)
        for k, state in moments.items():
            assert same(state, same_moments[k])
    assert scaler.get_scale() == (2. if fp16 else 1.)
    finite, (changed, _) = step(1.)
    assert finite and not same(weights, changed)


def test_skipped_steps_are_named_when_they_are_logged(here, call, monkeypatch):
    true, calls = train.TMASS.losses, []

    def losses(self, t, f):  # the real losses, but from step 3 on spoilt
        calls.append(0)
        out = true(self, t, f)
        return {**out, "loss": out["loss"] * math.nan} if len(calls) >= 3 else out
    monkeypatch.setattr(train.TMASS, "losses", losses)
    status, out, err = call(*SMALL, "--epochs", 9, "--log-every", 100)  # and at each epoch's 6th
    kept = "model.pt keeps the last good state, step 0"
    refused(status, out, err, "10 steps in a row, to 12, were not finite", kept)
    line = r"step (\d+): loss or gradient is not finite; step skipped \((\d+) so far\)"
    assert re.findall(line, out) == [(str(step), str(step - 2)) for step in range(3, 13)]
    assert len(calls) == 12


def test_weights_that_are_not_finite_are_never_saved(here, call, monkeypatch):
    assert call(*SMALL, "--epochs", 0, "--out", "good.pt")[0] == 0
    content = read_weights("good.pt")
    content["model"]["clip.visual.conv1.weight"][0, 0] = math.inf
    torch.save(content, "bad.pt")
    status, out, err = call(*SMALL, "--clip", "bad.pt")
    refused(status, out, err, "model.pt", "not written", "not finite (clip.visual.conv1.weight)")
    assert not os.path.exists("model.pt")
    true, calls = train.TMASS.losses, []

    def losses(self, t, f):  # the real losses; in step 5 a weight overflows that they do not show
        calls.append(0)
        if len(calls) == 5:
            self.clip.token_embedding.weight.data[0] = math.inf
        return true(self, t, f)
    monkeypatch.setattr(train.TMASS, "losses", losses)
    status, out, err = call(*SMALL, "--save-every", 2)
    intact = "an earlier model.pt, if any, is intact"
    refused(status, out, err, "not finite (clip.token_embedding.weight)", intact)
    content = read_weights("model.pt")
    assert content["step"] == 4 and all(torch.isfinite(x).all() for x in content["model"].values())


@pytest.fixture
def own_copy(videos, tmp_path, monkeypatch):
    """As `here`, but the data set may be spoilt."""
    shutil.copytree(videos / "set", tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bad_videos(own_copy, call):
    good = (own_copy / "set/red-green.mp4").read_bytes()  # rows 2 and 4, and so on, train
    for content in (b"", b"this is no video at all" * 50, good[:len(good) // 3]):
        (own_copy / "set/red-green.mp4").write_bytes(content)
        refused(*call(*SMALL, "--epochs", 1), "red-green.mp4")
    os.remove(own_copy / "set/blue-green.mp4")
    refused(*call(*SMALL), "blue-green.mp4", "row 15", "--skip-bad")
    for name in ("red-yellow", "red-black"):  # of validation and test
        (own_copy / f"set/{name}.mp4").write_bytes(b"broken")
    status, out, err = call(*SMALL, "--skip-bad")
    assert status == 0 and not err
    listed = (own_copy / "model.bad.txt").read_text()
    for name in ("red-green", "blue-green", "red-yellow", "red-black"):
        assert listed.count(f"{name}.mp4") == 1
    assert len(listed.splitlines()) == 4
    assert "--skip-bad: 1 missing videos left out" in out
    assert "4 videos left out, listed in model.bad.txt" in out


def test_what_of_the_data_counts_for_nothing_is_said(own_copy, call):
    table = Path("set/my.csv").read_text()
    for name in re.findall("(.*mp4).*,val\n", table):
        os.remove(f"set/{name}")
    long = "red " * 50
    Path("set/my.csv").write_text(table.replace("the picture turns from red to green", long))
    status, out, err = call(*SMALL, "--epochs", 0, "--skip-bad")
    assert status == 0 and "val: all 5 videos are missing" in out, err
    assert "train: 1 captions are longer than the encoder's 48 tokens, and are cut" in out
    assert "the first: red red" in out


def test_parts_of_a_killed_save_are_removed_by_the_next_run(here, call):
    left = "model.pt.123.0a1b2c3d.part"
    others = "model.pt.mine.part", "other.pt.123.0a1b2c3d.part"
    for name in (left, *others):
        Path(name).write_bytes(b"half a checkpoint")
    refused(*call(*SMALL, "--data", "absent.csv"), "absent.csv")
    assert not os.path.exists(left) and all(map(os.path.exists, others))


def test_settings_without_effect_are_not_printed(here, call):
    def shown(*flags):
        status, out, _ = call(*SMALL, "--epochs", 0, "--overwrite", *flags)
        assert status == 0
        line = next(line for line in out.splitlines() if line.startswith("settings: "))
        return {x.split("=")[0] for x in line.removeprefix("settings: ").split(", ")}
    every = shown()
    assert train.METHOD.keys() | {"cache", "seed", "out"} <= every
    assert not {"resume", "overwrite"} & every
    assert every - shown("--radius", "none") == {"prior", "prior_std", "support_video"}
    assert every - shown("--freeze-clip") == {"clip_lr"}
    left_out = every - shown("--prior", "uniform", "--pooling", "mean")
    assert left_out == {"prior_std", "heads", "dropout"}


@pytest.mark.parametrize("moment", ["at once", "later"])
def test_a_dead_worker_names_a_video(here, start, moment):
    job = start(here, *SMALL, "--workers", 1, "--epochs", 500, "--batch", 8)
    job.until(reaches(2 if moment == "later" else 1))
    worker, = children(job.process.pid)
    os.kill(worker, signal.SIGKILL)
    refused(job.wait(60), job.out, job.err, "error: a decoding process died while it read ", ".mp4")
    assert read_weights(here / "model.pt")["format"] == "tmass"


@pytest.mark.slow
def test_memory_stays_flat(here, start):
    def resident(job):
        status = Path(f"/proc/{job.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])
    job = start(here, *SMALL, "--batch", 8, "--epochs", 170, "--workers", 1)
    job.until(reaches(100), 200)
    before = resident(job)
    job.until(reaches(500), 400)
    grown = resident(job) / before - 1
    job.process.kill()
    assert grown <= 0.05


# ---- what the flags do ----

def test_precision_and_checkpointing(here, call):
    losses = {}
    runs = dict(plain=[], recomputed=["--grad-checkpoint"], bf16=["--amp", "bf16"])
    for name, flags in runs.items():
        status, out, err = call(*SMALL, "--out", f"{name}/model.pt", *flags)
        assert status == 0 and ("on cpu, amp bf16" in out) == (name == "bf16")
        losses[name] = torch.tensor([float(r["loss"]) for r in steps(here / name)])
    assert torch.allclose(losses["plain"], losses["recomputed"], rtol=1e-4)
    assert not torch.equal(losses["plain"], losses["bf16"])
    assert torch.allclose(losses["plain"], losses["bf16"], rtol=0.1)
    assert {x.dtype for x in weights(here / "bf16/model.pt").values()} == {torch.float32}


def test_float16_scales_its_loss_and_resumes_exactly(here, start, call):
    fp16 = [*SMALL, "--amp", "fp16", "--epochs", 1, "--clip-lr", 1e-4, "--head-lr", 1e-3]
    status, out, _ = call(*fp16, "--out", "whole/model.pt")
    assert status == 0 and "on cpu, amp fp16" in out and "skipped" not in out
    assert call(*fp16, "--amp", "off", "--out", "plain/model.pt")[0] == 0
    a, b = ([float(row["loss"]) for row in steps(here / name)] for name in ("whole", "plain"))
    a, b = torch.tensor(a), torch.tensor(b)
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=0.05)
    assert {x.dtype for x in weights("whole/model.pt").values()} == {torch.float32}
    job = start(here, *fp16, "--save-every", 1).until(reaches(2))
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 143, job.err
    content = read_weights("model.pt")
    assert content["scaler"]["scale"] == 65536
    assert content["scaler"]["_growth_tracker"] == content["step"]
    start(here, "--resume", "--log-every", 1).finish()
    check_equal(here, here / "whole")


def test_float16_may_seek_its_scale_for_long_but_not_for_ever(here, call, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=2. ** 32))
    status, out, err = call(*SMALL, "--amp", "fp16", "--epochs", 3)
    assert status == 0 and 10 < out.count("step skipped") < 18, (out.count("skipped"), err)
    assert "step 1: loss or gradient is not finite; step skipped (1 so far)" in out
    assert all(torch.isfinite(x).all() for x in weights("model.pt").values())
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=4.))
    true = train.TMASS.losses
    nan = lambda *args: {k: x * math.nan for k, x in true(*args).items()}
    monkeypatch.setattr(train.TMASS, "losses", nan)
    status, out, err = call(*SMALL, "--amp", "fp16", "--epochs", 6, "--out", "nan.pt")
    kept = "keeps the last good state, step 0"
    refused(status, out, err, "30 steps in a row, to 30, were not finite", kept)


def test_warm_up_in_float16_learns_and_takes_no_step_that_is_not_finite(capsys):
    phrases = train.shapes_pictures(128, torch.Generator().manual_seed(0), 32)[1]
    tokenizer = train.Tokenizer.learn(phrases, 300, context_length=48)
    torch.manual_seed(0)
    small = dict(train.TINY, image_size=16, vision_width=64, vision_layers=1, text_width=64,
                 text_layers=1)
    model = train.TMASS(train.CLIP(vocab_size=tokenizer.vocab_size, **small))
    flags = ["--amp", "fp16", "--seed", "1", "--warmup", "0.1", "--workers", "0"]
    args = train.parser().parse_args(flags)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2. ** 120)
    args.pretrain = 2
    train.pretrain(model, tokenizer, args, scaler, ALONE)
    assert same(before, model.state_dict()) and scaler.get_scale() == 2. ** 118
    args.pretrain = 8
    train.pretrain(model, tokenizer, args, torch.amp.GradScaler("cpu"), ALONE)
    said = re.findall(r"pretrain (\d+)/\1  loss ([\d.]+)", capsys.readouterr().out)
    assert [steps for steps, _ in said] == ["2", "8"]
    assert float(said[1][1]) < float(said[0][1]) - 0.01


def test_pictures_of_the_warm_up_do_not_depend_on_workers():
    tokenizer = train.Tokenizer()
    drawn = functools.partial(train.draw, tokenizer, 16, 5)
    found = []
    for workers in (0, 2):
        with train.loading(range(4), [[step] for step in range(4)], drawn, workers) as loader:
            found.append([(ids.clone(), pictures.clone()) for ids, pictures in loader])
    for alone, worker in zip(*found):
        assert torch.equal(alone[0], worker[0]) and torch.equal(alone[1], worker[1])
    assert len(found[0]) == 4 and not torch.equal(found[0][0][1], found[0][1][1])


def test_activation_of_a_clip_file(here, call):
    assert call(*SMALL, "--epochs", 0)[0] == 0
    for name, quick in (("gelu", False), ("quickgelu", True)):
        flags = "--clip", "model.pt", "--activation", name, "--epochs", 0, "--out", f"{name}.pt"
        assert call(*SMALL, *flags)[0] == 0
        assert read_weights(f"{name}.pt")["clip"]["quick_gelu"] is quick


def test_the_command_printed_gives_the_line_printed(own_copy, run, call):
    """With videos that lie elsewhere, are missing or broken, and frames from a cache."""
    (own_copy / "my.csv").write_text((own_copy / "set/my.csv").read_text())
    os.remove("set/red-white.mp4")  # of the test split
    Path("set/white-red.mp4").write_bytes(b"broken")
    os.rename("set", "films")
    flags = ("--data", "my.csv", "--videos", "films", "--skip-bad", "--cache", "my frames",
             "--out", "a model.pt")
    status, out, err = call(*SMALL, *flags)
    assert status == 0, err
    line = next(x for x in out.splitlines() if x.startswith("test: "))
    command = shlex.split(out.split("evaluate it again: ")[1])
    assert command[:2] == ["python", "eval.py"]
    done = run(*command[1:], "--json", "again.json", cwd=own_copy)
    assert done.returncode == 0, done.stderr
    assert f"test: {format_metrics(json.loads(Path('again.json').read_text()))}" == line


def test_videos_in_another_folder_than_the_annotations(own_copy, call):
    os.rename("set", "films")
    os.mkdir("set")
    os.rename("films/my.csv", "set/my.csv")
    refused(*call(*SMALL), "26 of 26 videos are missing", "--videos")
    refused(*call(*SMALL, "--videos", "absent"), "absent: there is no such folder")
    status, _, err = call(*SMALL, "--epochs", 1, "--videos", "films")
    assert status == 0, err
    assert read_weights("model.pt")["config"]["videos"] == str(own_copy / "films")
    assert read_weights("model.pt")["config"]["root"] == str(own_copy / "set")


def test_commands_to_go_on_with(monkeypatch):
    """Of one process and of two machines; that of one machine is run by another test."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "my set.csv"])
    assert runs.go_on() == "python train.py --data 'my set.csv' --resume"
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume"])
    job = dict(LOCAL_WORLD_SIZE="8", GROUP_WORLD_SIZE="2", MASTER_ADDR="node1")
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert runs.go_on() == ("torchrun --nproc_per_node 8 --nnodes 2 --rdzv_backend c10d "
                             "--rdzv_endpoint node1:29500 train.py --resume")


def test_few_pairs_slow_runs_and_no_steps_are_said_plainly(here, call, capsys):
    reason = "my.csv: 26 training pairs are too few for a batch of 27: lower --batch"
    refused(*call(*SMALL, "--batch", 27), reason)
    status, out, _ = call(*SMALL, "--epochs", 0)
    assert status == 0 and "0 steps of 4 pairs" in out
    assert "no step: the starting point is the result" in out
    values = {k: torch.tensor(1.5) for k in (*train.Log.TERMS, "scale", "grad_norm")}
    args = train.parser().parse_args(["--epochs", "1", "--head-lr", "1e-3", "--clip-lr", "1e-5"])
    args.out = "slow.pt"
    args.batch = 4
    log = train.Log(args, ALONE, None, train.Batches(8, 4, 1, 0))
    for seconds in (129, 0.003):
        log.flags.append(torch.tensor(True))
        log.since = time.monotonic() - seconds
        log.done = 0
        log.step(1, values, 1.0)
    slow, fast = capsys.readouterr().out.splitlines()
    assert "0.03 pairs/s  0:02:09 left" in slow
    assert re.search(r" 1[23]\d\d pairs/s  0:00:00 left", fast)


def test_cache_trains_from_its_files(own_copy, call, monkeypatch):
    assert call(*SMALL, "--cache", "frames")[0] == 0
    kept = list((own_copy / "frames").glob("*.jpegs"))
    assert len(kept) >= 34  # each epoch leaves 2 of 26 pairs out
    first = weights("model.pt")
    opened = []
    monkeypatch.setattr(data, "read_frames", lambda *args, **kwargs: opened.append(args))
    assert call(*SMALL, "--cache", "frames", "--overwrite")[0] == 0
    assert not opened and same(first, weights("model.pt"))


def test_init_and_the_baseline(here, call):
    assert call(*SMALL, "--radius", "none", "--epochs", 1)[0] == 0
    content = read_weights("model.pt")
    assert content["config"]["support_weight"] == 0 == content["tmass"]["support_weight"]
    first = steps(here)[0]
    assert float(first["loss"]) == pytest.approx(float(first["ce"]))  # no mass: X-Pool's loss
    status, out, _ = call(*SMALL, "--init", "model.pt", "--epochs", 0, "--out", "grown.pt")
    assert status == 0 and "starting anew: radius.linear.weight, radius.linear.bias" in out
    grown = weights("grown.pt")
    assert all(torch.equal(x, grown[k]) for k, x in content["model"].items())
    status, out, _ = call(*SMALL, "--init", "grown.pt", "--epochs", 0, "--out", "again.pt")
    assert status == 0 and "starting anew" not in out and same(grown, weights("again.pt"))
    grown_to = "--init", "grown.pt", "--out", "x.pt"
    refused(*call(*SMALL, *grown_to, "--pooling", "mean"), "don't fit the model asked for")
    refused(*call(*SMALL, *grown_to, "--heads", 4), "grown.pt has 1 heads", "--heads 1")
    refused(*call(*SMALL, *grown_to, "--frames", 3), "radius.linear.weight", "--frames")
    assert not os.path.exists("x.pt")
    clip_of = "--clip", "grown.pt", "--epochs", 0, "--out", "clip.pt"  # its CLIP and tokenizer only
    status, out, _ = call(*SMALL, *clip_of)
    assert status == 0 and read_weights("clip.pt")["merges"] == content["merges"]
    assert torch.equal(weights("clip.pt")["clip.text_projection"], grown["clip.text_projection"])


# ---- bad input ----

def test_bad_options_cost_one_line(here, run):
    """The command itself, once; the others below call it within this process."""
    result = run("train.py", *SMALL, "--radius", "square", cwd=here, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    refused(result.returncode, result.stdout, result.stderr, "'square'")


NUMBERS = {"--head-lr": ("nan", "-1", "1e9"), "--clip-lr": ("-1", "inf"),
           "--weight-decay": ("nan", "-0.1"),
           "--dropout": ("nan", "1"), "--warmup": ("1.5", "nan"), "--support-weight": ("inf", "-1"),
           "--ce-weight": ("nan",), "--prior-std": ("nan", "-1", "1e30"),
           "--heads": ("0", "-1", "x"),
           "--seed": ("-1", str(10 ** 22), "1.5"),
           "--pretrain": ("-1", "1e3"), "--epochs": ("-1", str(10 ** 12)),
           "--batch": ("1", "0", str(10 ** 12)), "--frames": ("0", "-3", str(10 ** 9)),
           "--workers": ("-1", str(10 ** 6)), "--save-every": ("0",),
           "--log-every": ("0", "-1"), "--val-videos": ("-1",)}


def test_numbers_that_make_no_sense_are_refused_at_once(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is here: what is read first would be missed first
    for option, values in NUMBERS.items():
        for value in values:
            result = call("--data", "absent.csv", f"{option}={value}")
            refused(*result, f"argument {option}: ", f"'{value}'")
    assert not list(tmp_path.iterdir())


def test_bad_input(own_copy, call):
    (own_copy / "file").write_text("a regular file")  # of nobody's format
    (own_copy / "folder").mkdir()
    write_table("set/columns.csv", [("red-red.mp4", "hello")], ("video", "text"))
    first = "red-red.mp4", "hello", "train"
    write_table("set/caption.csv", [first, ("red-blue.mp4", " ", "train")])
    write_table("set/gone.csv", [first, ("nowhere.mp4", "hello", "train")])
    torch.save({"model": [1, 2]}, "other.pt")
    torch.save({"some.weight": torch.ones(2)}, "strange.pt")
    whole = Path("set/red-red.mp4").read_bytes()
    Path("cut.pt").write_bytes(whole[:100])
    cases = {
        ("--data", "nothing"): "unknown data set 'nothing'",
        ("--data", "msrvtt", "--root", "no/such"): "no/such",
        ("--data", "msrvtt", "--root", "folder"): "MSRVTT_train.9k.csv",
        ("--data", "absent.csv"): "absent.csv",
        ("--data", "set/columns.csv"): "caption",
        ("--data", "set/caption.csv"): "row 3",
        ("--data", "set/gone.csv"): "row 3",
        ("--root", "folder"): "videos are missing",
        ("--out", "folder"): "--out folder cannot be written: give a plain file's name",
        ("--out", "file/model.pt"): "file/model.pt",
        ("--out", "file"): "file",
        ("--batch", 1): "--batch",
        ("--batch", 100): "are too few for a batch of 100: lower --batch",
        ("--batch", "many"): "many",
        ("--pooling", "max"): "max",
        ("--dropout", 1): "--dropout",
        ("--frames", 0): "--frames",
        ("--heads", 3): "heads=3",
        ("--pretrain", 5): "--pretrain",
        ("--colour", "red"): "--colour",
        ("--clip", "ViT-B/99"): "ViT-B/99",
        ("--clip", "cut.pt"): "cut.pt",
        ("--clip", "strange.pt"): "strange.pt",
        ("--init", "cut.pt"): "cut.pt",
        ("--init", "absent.pt"): "absent.pt",
        ("--init", "other.pt"): "other.pt",
        ("--out", "strange.pt", "--resume"): "strange.pt is not a checkpoint of this program",
        ("--device", "gpu"): "gpu",
        ("--device", "meta"): "--device meta",
        ("--device", "cuda:99"): "--device cuda:99",
        ("--activation", "gelu"): "--activation is for weights that are loaded",
    }
    before = sorted(p.name for p in own_copy.iterdir())
    for args, reason in cases.items():
        refused(*call(*SMALL, *args), reason)
    assert sorted(p.name for p in own_copy.iterdir()) == before  # nothing was begun, nothing lost
    assert Path("file").read_text() == "a regular file"
