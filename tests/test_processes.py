"""Workers, signals and jobs: every program ends in time, with one line and a status."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SLOW, free_port
from torch.utils.data import IterableDataset, get_worker_info
from videos import numbered, write_video

from lib import processes
from lib.common import DataError
from lib.processes import loading, noting_signals, start_processes
from lib.weights import read_weights

LIMIT = 90  # seconds that a program may take to start, or to end; a busy machine needs many
TRAIN = ["train.py", "--data", "my.csv", "--clip", "tiny", "--frames", "2", "--batch", "4",
         "--epochs", "4000", "--log-every", "1", "--device", "cpu"]


class Run:
    """A program as a process, in a group of its own."""

    def __init__(self, folder, words, shell="", env=None, around=()):
        self.out = folder / "out.txt"
        self.err = folder / "err.txt"
        command = [*around, "bash", "-c", f'{shell} exec "$0" "$@"', sys.executable]
        command += [ROOT / words[0], *words[1:]]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err,
                                            start_new_session=True)

    def until(self, text):
        """Wait until it has printed a text; -> its children."""
        deadline = time.monotonic() + LIMIT
        while text not in self.out.read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.01)
        return children(self.process.pid)

    def ends(self, status, *words):
        """It ends in time with this status, no stack, and these words in its last line."""
        assert self.process.wait(LIMIT) == status, self.err.read_text()
        err = self.err.read_text()
        assert "Traceback" not in err
        lines = (self.out.read_text() + err).splitlines()
        assert all(word in lines[-1] for word in words), lines[-3:]


@pytest.fixture
def start():
    """start(folder, words, shell="", env=None, around=()) -> Run"""
    runs = []

    def start(*arguments, **options):
        runs.append(Run(*arguments, **options))
        return runs[-1]

    yield start
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """24 videos, 16 to train, 4 to validate, 4 to test, and my.csv."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "videos").mkdir()
    rows = ["video,caption,split"]
    for i in range(24):
        write_video(folder / "videos" / f"{i}.mp4", numbered(8 + i)[i:])
        split = {4: "val", 5: "test"}.get(i % 6, "train")
        rows.append(f"videos/{i}.mp4,number {i},{split}")
    (folder / "my.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def here(videos, tmp_path):
    return Path(shutil.copytree(videos, tmp_path / "here"))


def children(pid):
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted(int(word) for text in lists for word in text.split())


# ---- every way out of `loading` ends its workers ----


def worker_place():
    """(k, n): this process is worker k of n; (0, 1) outside of workers."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


class Numbers:
    """Items are tensors that hold their number, and who read them. Item `at` has a mishap."""

    def __init__(self, mishap=None, at=5):
        self.mishap = mishap
        self.at = at

    def __getitem__(self, i):
        if i >= self.at and self.mishap == "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(60)
        if i == self.at and self.mishap == "error":
            raise KeyError(f"no item {i}")
        if i == self.at and isinstance(self.mishap, int):
            os.kill(os.getpid(), self.mishap)
            time.sleep(60)
        return torch.tensor([i, *worker_place(), os.getpid()])


class Stream(Numbers, IterableDataset):
    def __iter__(self):
        k, n = worker_place()
        for i in range(k, 12, n):
            yield self[i], i


BATCHES = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10, 11]]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order_and_streams_whole(workers, capfd):
    with loading(Numbers(), BATCHES, torch.stack, workers) as found:
        batches = list(found)
    assert [x[:, 0].tolist() for x in batches] == BATCHES
    assert {x[0, 2].item() for x in batches} == {max(1, workers)}
    assert all((x[:, 3] == os.getpid()).all() == (workers == 0) for x in batches)
    with loading(Stream(), workers=workers) as found:
        stream = list(found)
    assert all(type(batch) is tuple for batch in stream)
    assert sorted(x[0].item() for x, _ in stream) == list(range(12))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mishap, kind, words", [
    (None, StopIteration, None), (None, ZeroDivisionError, None), ("deaf", StopIteration, None),
    ("error", KeyError, "no item 5"),
    (signal.SIGKILL, DataError, "a process that reads videos died"),
    (signal.SIGTERM, DataError, "a process that reads videos died")])
def test_every_way_out_ends_the_workers(mishap, kind, words):
    before = children(os.getpid())
    started = time.monotonic()
    with pytest.raises(kind, match=words):
        with loading(Numbers(mishap), [[i] for i in range(100)], workers=2) as found:
            for [x] in found:
                if x[0] == 1 and kind is ZeroDivisionError:
                    1 / 0
                if x[0] == 1 and kind is StopIteration:
                    raise StopIteration
    assert time.monotonic() - started < 15 and children(os.getpid()) == before


def test_workers_are_as_many_as_the_cores_that_may_be_used():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(allowed)])
    try:
        assert processes.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


# ---- programs: bad videos, dead workers, limits of the machine ----


def test_an_unreadable_video_ends_training(here, start):
    (here / "videos/3.mp4").write_text("this is no video" * 50)
    start(here, [*TRAIN, "--workers", "2"]).ends(2, "error: ", "videos/3.mp4")


def test_a_killed_worker_ends_training(here, start):
    run = start(here, [*TRAIN, "--workers", "2"])
    os.kill(run.until("step     5/")[0], signal.SIGKILL)
    run.ends(2, "error: a process that reads videos died", "fewer --workers")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder with four videos of shapes."""
    root = tmp_path_factory.mktemp("shapes") / "shapes"
    words = [sys.executable, "-m", "lib.shapes", "--root", root, "--videos", "4", "0", "0"]
    subprocess.run(words, cwd=ROOT, check=True, timeout=LIMIT)
    return root


SMALL_SHM = "mount --make-rprivate / && mount -t tmpfs -o size=64k tmpfs /dev/shm;"


@pytest.mark.parametrize("shell, workers, advice", [
    ("ulimit -n 24;", "4", "ulimit -n 4096"), ("ulimit -f 200;", "1", "fewer --workers"),
    ("ulimit -f 200;", "2", "fewer --workers"), (SMALL_SHM, "1", "fewer --workers")])
def test_limits_of_the_machine_end_training_with_advice(
        shapes, tmp_path, start, shell, workers, advice):
    """A batch of the warm-up is 393 kB."""
    words = ["train.py", "--root", shapes, "--batch", "4", "--pretrain", "8", "--device", "cpu",
             "--workers", workers]
    around = ["unshare", "-m"] if shell == SMALL_SHM else []
    if around and subprocess.run([*around, "true"]).returncode:
        pytest.skip("may not mount")
    start(tmp_path, words, shell, around=around).ends(2, "error: ", advice)


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_a_signal_while_batches_are_slow(here, start, number, kill):
    (here / "sitecustomize.py").write_text(SLOW)
    env = dict(PYTHONPATH=f"{here}:{ROOT}")
    run = start(here, [*TRAIN, "--workers", "2"], env=env)
    run.until("step     5/")
    (here / "slow").touch()
    time.sleep(3)
    kill(run.process.pid, number)
    run.ends(128 + number, f"stopped by {number.name} after step ")
    assert run.err.read_text() == ""
    assert read_weights(here / "model.pt")["step"] >= 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step(tmp_path, start, number):
    run = start(tmp_path, ["train.py", "--root", "shapes", "--workers", "1", "--device", "cpu"])
    deadline = time.monotonic() + LIMIT
    while not list(tmp_path.glob("shapes/videos/*.mp4")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(run.process.pid, number)
    run.ends(128 + number)
    assert "nothing was saved" in run.err.read_text()
    assert not (tmp_path / "model.pt").exists()


def test_signals_are_noted():
    before = [signal.getsignal(number) for number in processes.SIGNALS]
    with noting_signals() as noted:
        for number in processes.SIGNALS:
            os.kill(os.getpid(), number)
        assert noted == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        with pytest.raises(KeyboardInterrupt):  # a second time
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert [signal.getsignal(number) for number in processes.SIGNALS] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does in the background
    try:
        with noting_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            assert noted == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, interrupt)


# ---- jobs ----


@pytest.mark.parametrize("rank, world", [
    (None, "abc"), (None, "2"), ("0", None), ("0", "0"), ("2", "2"), ("-1", "2")])
def test_a_job_that_is_none(rank, world, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=f"process {rank} of {world} .*torchrun"):
        start_processes("cpu")


@pytest.mark.parametrize("world, device, words", [
    ("2", "cuda:0", "2 processes on one GPU: give --device cuda"),
    ("2", "mps", "serves one process"), ("2", "gpu", "--device gpu can't be used"),
    ("1", "cuda:99", "--device cuda:99 can't be used .*try --device cpu$")])
def test_devices_that_no_job_can_have(world, device, words, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(DataError, match=words):
        start_processes(device)
    assert not dist.is_initialized()


JOB = """
import os, sys, torch
from lib.processes import Gather, run, start_processes

def main():
    job = start_processes("cpu")
    assert job.sum(torch.eye(2)[job.rank]).tolist() == [1, 1]
    assert job.gather({"rank": job.rank}) == [{"rank": 0}, {"rank": 1}]
    assert job.join([1, job.rank]) == [1, 0]
    assert job.largest([job.rank]) == 1
    for rows in ([0, 3], [3, 0], [1, 2]):
        own = torch.arange(3.).split(rows)[job.rank].requires_grad_()
        joined = Gather.apply(job, True, own)
        assert joined.tolist() == [0, 1, 2]
        (joined ** 2).sum().backward()
        assert own.grad.tolist() == (4 * own).tolist()  # twice, because DDP averages
    with job.first_alone():
        job.say("one for all")
    if sys.argv[1:] == ["die"] and job.rank == 1:
        os._exit(7)
    job.sum(torch.ones(2))
    return 0

if __name__ == "__main__":
    sys.exit(run(main))
"""


@pytest.mark.parametrize("words, statuses", [([], [0, 0]), (["die"], [2, 7])])
def test_two_processes(tmp_path, start, words, statuses):
    """Each result on both; one that dies ends the other, in one line."""
    port = free_port()
    runs = []
    for rank in ("0", "1"):
        folder = tmp_path / rank
        folder.mkdir()
        (folder / "job.py").write_text(JOB)
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=rank)
        runs.append(start(folder, [folder / "job.py", *words], env=env))
    assert [run.process.wait(LIMIT) for run in runs] == statuses, runs[0].err.read_text()
    assert [run.out.read_text() for run in runs] == ["one for all\n", ""]
    if words:
        runs[0].ends(2, "error: another process of this job died")


WITHOUT_FORK = """
import multiprocessing, sys
from lib.processes import run
import eval, search, train

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    common = ["--device", "cpu", "--workers", "1"]
    sys.argv[1:] = [*{words!r}, "--epochs", "1", *common]
    assert run(train.main) == 0
    sys.argv[1:] = ["--ckpt", "model.pt", *common]
    assert run(eval.main) == 0
    sys.argv[1:] = ["a number", "--ckpt", "model.pt", "--videos", "videos", *common]
    sys.exit(run(search.main))
"""


def test_programs_run_without_fork(here, start):
    """As on macOS and from Python 3.14 on: what workers are given can be pickled."""
    (here / "all.py").write_text(WITHOUT_FORK.format(words=TRAIN[1:]))
    run = start(here, [here / "all.py"])
    assert run.process.wait(2 * LIMIT) == 0, run.err.read_text()
    assert "encoded 24 videos" in run.err.read_text()
