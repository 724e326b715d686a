"""Workers, signals and jobs: every program ends in time, with one line and a status."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, children, ended, free_port, noise_video, refused, torchrun

from lib import processes, shapes
from lib.common import DataError
from lib.processes import loading, noting_signals, start_processes

TRAIN = ["--data", "my.csv", "--clip", "tiny", "--frames", "2", "--batch", "4", "--log-every", "1",
         "--device", "cpu"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with my.csv: 8 videos to train, 2 to test."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "videos").mkdir()
    rows = ["video,caption,split\n"]
    for i in range(10):
        noise_video(folder / f"videos/{i}.mp4", i)
        rows.append(f"videos/{i}.mp4,number {i},{'train' if i < 8 else 'test'}\n")
    (folder / "my.csv").write_text("".join(rows))
    return folder


# ---- every way out of `loading` ends its workers ----


class Numbers:
    """Items are tensors that hold their number, and who read them. Item 5 has a mishap."""

    def __init__(self, mishap=None):
        self.mishap = mishap

    def __getitem__(self, i):
        if i >= 5 and self.mishap == "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(60)
        if i == 5 and self.mishap == "error":
            raise KeyError(f"no item {i}")
        if i == 5 and isinstance(self.mishap, int):
            os.kill(os.getpid(), self.mishap)
            time.sleep(60)
        return torch.tensor([i, os.getpid()])


BATCHES = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10, 11]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order(workers, capfd):
    with loading(Numbers(), BATCHES, torch.stack, workers) as found:
        batches = [x for x in found]
    assert [x[:, 0].tolist() for x in batches] == BATCHES
    assert len({int(x[0, 1]) for x in batches}) == max(1, workers)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mishap, kind, words", [
    (None, ZeroDivisionError, None),
    ("deaf", ZeroDivisionError, None),
    ("error", KeyError, "no item 5"),
    (signal.SIGKILL, DataError, "a process that reads videos died"),
])
def test_every_way_out_ends_the_workers(mishap, kind, words):
    before = children(os.getpid())
    with pytest.raises(kind, match=words):
        with loading(Numbers(mishap), [[i] for i in range(100)], workers=2) as found:
            for [x] in found:
                if x[0] == 1 and kind is ZeroDivisionError:
                    1 / 0
    assert children(os.getpid()) == before


# ---- programs: dead workers, limits of the machine ----


def test_a_killed_worker_ends_training(videos):
    out = "--out", videos / "killed.pt"
    job = torchrun(ROOT / "train.py", *TRAIN, "--epochs", 4000, "--workers", 2, *out, cwd=videos,
                   processes=1)
    assert any(line.startswith("step     5/") for line in job.stdout)
    os.kill(children(job.pid)[0], signal.SIGKILL)
    refused(ended(job), "a process that reads videos died", "fewer --workers")


@pytest.mark.parametrize("limit, advice", [
    ("ulimit -n 24", "ulimit -n 4096"),
    ("ulimit -f 200", "fewer --workers"),
])
def test_limits_of_the_machine_end_training_with_advice(tmp_path, limit, advice):
    """A batch of the warm-up is 393 kB."""
    shapes.render_shapes(tmp_path / "shapes", train=4, val=0, test=0)
    words = ["bash", "-c", f'{limit}; exec "$0" "$@"', sys.executable, ROOT / "train.py", "--root",
             "shapes", "--batch", "4", "--pretrain", "8", "--device", "cpu", "--workers", "4"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and advice in last


# ---- signals ----


def test_signals_are_noted():
    before = [signal.getsignal(number) for number in processes.SIGNALS]
    with noting_signals() as noted:
        for number in processes.SIGNALS:
            os.kill(os.getpid(), number)
        assert noted == processes.SIGNALS
        with pytest.raises(KeyboardInterrupt):  # a second time
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert [signal.getsignal(number) for number in processes.SIGNALS] == before


def test_what_runs_in_the_background_hears_a_sigint_and_under_nohup_no_sighup():
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # as nohup does, and a shell in the background
    try:
        with noting_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            assert noted == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- jobs ----


@pytest.mark.parametrize("rank, world, device, words", [
    (None, "2", "cpu", "process None of 2 .*torchrun"),
    ("0", None, "cpu", "process 0 of None .*torchrun"),
    ("2", "2", "cpu", "process 2 of 2 .*torchrun"),
    ("0", "2", "cuda:0", "2 processes on one GPU: give --device cuda"),
    ("0", "2", "mps", "serves one process"),
    ("0", "1", "cuda:99", "--device cuda:99 can't be used .*try --device cpu$"),
])
def test_jobs_that_are_none(rank, world, device, words, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is not None:
            monkeypatch.setenv(name, value)
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
def test_two_processes(tmp_path, monkeypatch, words, statuses):
    """Each result on both; one that dies ends the other, in one line."""
    (tmp_path / "job.py").write_text(JOB)
    there = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2")
    jobs = []
    for rank in "01":
        for name, value in dict(there, RANK=rank).items():
            monkeypatch.setenv(name, value)
        jobs.append(torchrun(tmp_path / "job.py", *words, cwd=tmp_path, processes=1))
    results = [ended(job) for job in jobs]
    assert [status for status, *_ in results] == statuses
    assert [out for _, out, _ in results] == ["one for all\n", ""]
    if words:
        assert results[0][2].splitlines()[-1].startswith("error: another process of this job died")


WITHOUT_FORK = """
import multiprocessing
from lib.processes import run
import eval, search, train

def main():
    common = ["--device", "cpu", "--workers", "1"]
    train.main([*{words!r}, "--epochs", "1", *common])
    eval.main(["--ckpt", "model.pt", *common])
    return search.main(["a number", "--ckpt", "model.pt", "--videos", "videos", *common])

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    raise SystemExit(run(main))
"""


@pytest.mark.slow
def test_programs_run_without_fork(videos):
    """As on macOS and from Python 3.14 on: what workers are given can be pickled."""
    (videos / "all.py").write_text(WITHOUT_FORK.format(words=TRAIN))
    status, _, err = ended(torchrun(videos / "all.py", cwd=videos, processes=1))
    assert status == 0 and "encoded 10 videos" in err
