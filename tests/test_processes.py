"""Workers and jobs: every program ends in time, with one line and a status, whatever happens.

Programs run as processes forked from a server that has imported them; each has a time limit.
"""
import contextlib
import ctypes
import datetime
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import free_port
from videos import numbered, write_video

import lib.processes
from data import VideoDataset
from lib.common import DataError
from lib.processes import loading, noting_signals, start_processes, worker_place
from lib.video import Segment

ROOT = Path(lib.processes.__file__).resolve().parent.parent
LIMIT = 30  # seconds from the mishap to the end of a program; before, it was for ever


TRAIN = ["train.py", "--data", "my.csv", "--clip", "tiny", "--frames", "2", "--batch", "4",
         "--epochs", "400", "--log-every", "1", "--device", "cpu"]
PROGRAMS = {  # each reads or writes videos by workers
    "train": TRAIN,
    "eval": ["eval.py", "--ckpt", "trained.pt", "--split", "all",
             "--device", "cpu", "--batch", "1"],
    "search": ["search.py", "a number", "--ckpt", "trained.pt", "--videos", "videos",
               "--device", "cpu", "--batch", "1"],
    "check": ["data.py", "check", "--data", "my.csv", "--decode"],
    "render": ["lib.shapes", "--root", "rendered", "--videos", "30", "1", "1"],
}


@pytest.fixture(scope="module")
def start():
    """start(folder, words, prepare=None, *its arguments) -> Run: a program as a process."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "search", "videos", "pytest"])
    runs = []

    def start(folder, words, prepare=None, *arguments):
        runs.append(Run(context, folder, words, prepare, arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()


def child(folder, words, prepare, arguments):
    import data
    import eval
    import lib.shapes
    import search
    import train
    os.chdir(folder)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as on the command line
    sys.argv = [str(word) for word in words]
    if prepare:
        prepare(*arguments)
    mains = {"train.py": train.main, "eval.py": eval.main, "search.py": search.main,
             "data.py": data.main, "lib.shapes": lib.shapes.main, "job": job_main}
    sys.exit(lib.processes.run(mains[words[0]]))


class Run:
    def __init__(self, context, folder, words, prepare, arguments):
        self.folder = Path(folder)
        self.process = context.Process(target=child, args=(str(folder), words, prepare, arguments))
        self.process.start()

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    out = property(lambda self: self.read("stdout.txt"))
    err = property(lambda self: self.read("stderr.txt"))

    def wait(self, limit=LIMIT):
        """-> exit status, within the limit; no process of its own is left."""
        self.process.join(limit)
        status = self.process.exitcode
        assert status is not None, f"still there after {limit} s: {self.out[-2000:]} {self.err}"
        return status

    def until(self, text, limit=60):
        """Wait until it has printed a text; -> its children."""
        deadline = time.monotonic() + limit
        while text not in self.out:
            assert self.process.is_alive() and time.monotonic() < deadline, (self.out, self.err)
            time.sleep(0.005)
        return children(self.process.pid)

    def fails(self, *words, limit=LIMIT):
        """It ends in time with one line that holds these words, and status 2."""
        status = self.wait(limit)
        assert status == 2, (status, self.out[-2000:], self.err)
        assert "Traceback" not in self.err and self.err.count("error: ") == 1, self.err
        line = self.err.splitlines()[-1]
        assert line.startswith("error: ") and all(word in line for word in words), (words, line)


@pytest.fixture(scope="module")
def videos(tmp_path_factory, start):
    """24 videos, 16 to train, 4 to validate, 4 to test; my.csv, and the checkpoint trained.pt."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "videos").mkdir()
    rows = ["video,caption,split"]
    for i in range(24):
        write_video(folder / "videos" / f"{i}.mp4", numbered(8 + i)[i:])
        split = {4: "val", 5: "test"}.get(i % 6, "train")
        rows.append(f"videos/{i}.mp4,number {i},{split}")
    (folder / "my.csv").write_text("\n".join(rows) + "\n")
    words = [*TRAIN, "--epochs", "0", "--workers", "0", "--out", "trained.pt"]
    assert start(folder, words).wait(60) == 0
    return folder


@pytest.fixture
def here(videos, tmp_path, monkeypatch):
    """A folder of the test's own with these videos."""
    shutil.copytree(videos, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def children(pid):
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in lists for word in text.split()]


def gone(pids, limit=10):
    """Whether processes have ended, zombies aside, within the limit."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        states = []
        for pid in pids:
            with contextlib.suppress(OSError):
                states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        if all(state == "Z" for state in states):
            return True
        time.sleep(0.05)
    return False


# ---- every way out of `loading` ends its workers ----


class Numbers:
    """Items are tensors that hold their number, and who read them; some end the worker or wait."""

    def __init__(self, n=12, **mishaps):
        self.n = n
        self.mishaps = mishaps  # number: what happens there

    def __getitem__(self, i):
        mishap = self.mishaps.get(f"at{i}")
        if mishap == "exit":
            os._exit(9)
        if mishap == "error":
            raise KeyError(f"no item {i}")
        if mishap == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return torch.tensor([i, *worker_place(), os.getpid()])


class Stream(Numbers):
    def __iter__(self):
        k, n = worker_place()
        for i in range(k, self.n, n):
            yield self[i], i


BATCHES = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10, 11]]


def together(items):
    return torch.stack(items), len(items)


def workers_of(tensors):
    return sorted({int(row[3]) for tensor in tensors for row in tensor.view(-1, 4)})


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
def test_batches_come_in_order_and_streams_whole(workers):
    with loading(Numbers(), BATCHES, together, workers) as found:
        batches = list(found)
    assert [x[:, 0].tolist() for x, _ in batches] == BATCHES
    assert [n for _, n in batches] == [len(keys) for keys in BATCHES]
    places = [set(x[:, 1].tolist()) for x, _ in batches]
    assert places == [{k % max(1, workers)} for k in range(5)]  # each its share
    pids = workers_of([x for x, _ in batches])
    assert (pids == [os.getpid()]) == (workers == 0)
    assert workers == 0 or gone(pids, 0.5)
    with loading(Stream(), workers=workers) as found:
        assert sorted(x[0].item() for x, _ in found) == list(range(12))


def test_workers_end_without_a_word(capfd):
    """Wherever they are when they are asked to: most have just ended by themselves."""
    for _ in range(10):
        with loading(Numbers(), BATCHES, together, workers=7) as found:
            assert len(list(found)) == 5
    assert capfd.readouterr() == ("", "")


def test_batches_for_a_gpu_are_pinned_one_ahead(monkeypatch):
    """Where there is no GPU, what would copy to its memory is noted instead."""
    pinned = []
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: pinned.append(device))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    forkserver.ensure_running()  # beside the thread that pins, workers are not forked from here
    before = children(os.getpid())
    with loading(Numbers(), BATCHES, together, workers=2, pin=True) as found:
        batches = list(found)
    assert [x[:, 0].tolist() for x, _ in batches] == BATCHES and [n for _, n in batches][0] == 3
    if torch.cuda.is_available():
        assert all(x.is_pinned() for x, _ in batches)
    else:
        assert [x is y for x, (y, _) in zip(pinned[1::2], batches)] == [True] * 5
        assert set(pinned[::2]) == {3}
    started = time.monotonic()
    with pytest.raises(DataError, match="exit status 9"):
        with loading(Numbers(at7="exit"), BATCHES, together, workers=2, pin=True) as found:
            list(found)
    with loading(Numbers(at3="stop"), BATCHES, together, workers=2, pin=True) as found:
        next(found)  # and the thread waits for the next
    assert time.monotonic() - started < 8 and children(os.getpid()) == before


@pytest.mark.parametrize("way", ["break", "exception", "generator"])
def test_every_way_out_ends_the_workers(way):
    def reading():
        with loading(Numbers(1000), [[i] for i in range(1000)], together, workers=2) as found:
            for x, _ in found:
                yield workers_of([x])
    started = time.monotonic()
    pids = children(os.getpid())
    if way == "generator":
        batches = reading()
        next(batches)
        batches.close()
    else:
        with contextlib.suppress(ZeroDivisionError):
            with loading(Numbers(1000), [[i] for i in range(1000)], together, workers=2) as found:
                for _ in found:
                    if way == "break":
                        break
                    1 / 0
    assert time.monotonic() - started < 3 and set(children(os.getpid())) <= set(pids)


def test_a_worker_that_does_not_go_is_killed():
    """A stopped process takes no notice of what it is asked."""
    batches = [[i] for i in range(12)]
    started = time.monotonic()
    with loading(Numbers(at2="stop", at3="stop"), batches, together, workers=2) as found:
        pids = [workers_of([next(found)[0]])[0] for _ in range(2)]
    assert time.monotonic() - started < 6 and gone(pids, 0.5)


def test_a_worker_that_dies_before_it_is_asked_is_said_to_have_died(monkeypatch):
    """On a busy machine the main process comes to its pipe only after the worker's end."""
    begin = multiprocessing.Process.start

    def start(process):
        begin(process)
        process.join(5)

    monkeypatch.setattr(multiprocessing.Process, "start", start)
    with pytest.raises(DataError, match="a decoding process died .exit status 9"):
        with loading(Numbers(at0="exit"), [[0]], together, workers=1) as found:
            list(found)


def name_or_exit(segment):
    """Reads a video: its name; bad.mp4 ends the worker."""
    if segment.path == "bad.mp4":
        os._exit(9)
    return segment.path


def test_the_video_that_a_dead_worker_was_reading_is_named():
    dataset = VideoDataset([Segment(name) for name in ("0.mp4", "1.mp4", "bad.mp4")], 4, str)
    dataset.read = name_or_exit
    names = []
    with pytest.raises(DataError, match=r"died while it read bad\.mp4 .exit status 9"):
        with loading(dataset, [[0], [1], [2]], workers=3) as found:
            for batch in found:
                names += batch
    assert names == ["0.mp4", "1.mp4"]


def test_the_first_error_is_kept():
    """An exception that is kept, with its frames, keeps no worker either."""
    for dataset, kind, words in (
            (Numbers(at3="exit"), DataError, "a decoding process died .exit status 9.*--workers"),
            (Numbers(at4="error"), RuntimeError, "(?s)in a worker.*__getitem__.*'no item 4'")) * 10:
        started = time.monotonic()
        pids = children(os.getpid())
        with pytest.raises(kind, match=words) as kept:
            with loading(dataset, BATCHES, together, workers=2) as found:
                for _ in found:
                    pass
        assert kept.value.__traceback__ and time.monotonic() - started < 5
        assert set(children(os.getpid())) <= set(pids)


def test_workers_leave_when_the_program_is_killed(here, start):
    job = start(here, [*TRAIN, "--workers", "2"])
    pids = job.until("step     3/")
    assert len(pids) == 2
    job.process.kill()
    assert gone(pids)


# ---- programs: bad videos, dead workers, errors, limits ----


def test_an_unreadable_video_ends_training(here, start):
    (here / "videos/3.mp4").write_text("this is no video" * 50)
    start(here, [*TRAIN, "--workers", "2"]).fails("videos/3.mp4", limit=30)
    assert (here / "model.pt").exists() and not list(here.glob("*.lock"))


def kill_the_second_worker():
    """When it opens its third video, as the system does for want of memory."""
    import av
    opened = []
    plain = av.open

    def opening(*arguments, **options):
        opened.append(0)
        if multiprocessing.current_process().name.endswith(":2") and len(opened) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **options)

    av.open = opening


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_killed_worker_beside_a_living_one(here, start, program):
    words = [*PROGRAMS[program], *(["--workers", "2"] if program != "render" else [])]
    start(here, words, kill_the_second_worker).fails("a decoding process died", "(Killed)")


def limit_files(n):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))


@pytest.mark.parametrize("program", PROGRAMS)
def test_too_few_file_descriptors(here, start, program):
    words = [*PROGRAMS[program], *(["--workers", "4"] if program != "render" else [])]
    start(here, words, limit_files, 14 if program == "render" else 24).fails("Too many open files")


def fail_in_a_step(error):
    """The third gradient can't be computed."""
    calls = []
    plain = torch.Tensor.backward

    def backward(*arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            raise error
        return plain(*arguments, **options)

    torch.Tensor.backward = backward


def test_an_exception_in_a_step_ends_training(here, start):
    job = start(here, [*TRAIN, "--workers", "2"], fail_in_a_step, RuntimeError("boom"))
    assert job.wait() == 1 and job.err.endswith("RuntimeError: boom\n")  # a fault of the program


def test_too_little_memory_in_a_step_is_one_line(here, start):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    job = start(here, [*TRAIN, "--workers", "2"], fail_in_a_step, error)
    job.fails("CUDA out of memory", "--batch", "--amp", "--grad-checkpoint")


def shrink_shared_memory():
    """/dev/shm of 64 kB for this process, as a container's 64 MB is for real batches."""
    new_mounts = 0x20000
    if ctypes.CDLL(None).unshare(new_mounts):
        sys.exit(77)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], check=True)


def test_batches_do_not_need_dev_shm(here, start):
    """Docker's has 64 MB, less than one batch of CLIP's pictures; here a batch is of 98 kB."""
    words = [*TRAIN, "--batch", "16", "--epochs", "3", "--workers", "2"]
    job = start(here, words, shrink_shared_memory)
    status = job.wait(30)
    if status == 77:
        pytest.skip("may not mount")
    assert status == 0 and "step     3/3" in job.out, job.err


@pytest.mark.slow
def test_a_signal_is_not_kept_waiting_for_a_batch(here, start):
    """All workers stand still, as those that wait for a network disk."""
    job = start(here, [*TRAIN, "--workers", "2"])
    for pid in job.until("step     5/"):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM and job.err == "", job.err
    step = torch.load("model.pt", weights_only=True)["step"]
    assert step >= 5 and f"stopped by SIGTERM after step {step};" in job.out


def test_a_terminal_that_closes_is_a_signal_to_save(here, start):
    job = start(here, [*TRAIN, "--workers", "2"])
    job.until("step     5/")
    os.kill(job.process.pid, signal.SIGHUP)
    assert job.wait() == 128 + signal.SIGHUP and job.err == "", job.err
    assert torch.load("model.pt", weights_only=True)["step"] >= 5


def test_signals_are_noted():
    before = [signal.getsignal(number) for number in lib.processes.SIGNALS]
    with noting_signals() as noted:
        for number in lib.processes.SIGNALS:
            os.kill(os.getpid(), number)
        assert noted == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        with pytest.raises(KeyboardInterrupt):  # a second time
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert [signal.getsignal(number) for number in lib.processes.SIGNALS] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with noting_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert noted == []
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


# ---- jobs ----


@pytest.mark.parametrize("rank, world", [
    (None, "abc"), (None, "0"), (None, "2"), ("0", None), ("0", "abc"), ("0", "0"), ("2", "2"),
    ("-1", "2")])
def test_a_job_that_is_none(rank, world, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=f"process {rank} of {world} .*torchrun"):
        start_processes("cpu")


@pytest.mark.parametrize("device, words", [
    ("cuda:0", "2 processes on one GPU: give --device cuda"), ("mps", "serves one process"),
    ("gpu", "--device gpu can't be used")])
def test_devices_that_no_job_can_have(device, words, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=words):
        start_processes(device)
    assert not dist.is_initialized()


def test_a_device_that_is_not_there(monkeypatch):
    for name in ("mps", "cuda:99", "meta"):
        with pytest.raises(DataError, match=f"^--device {name} can't be used .*try --device cpu$"):
            start_processes(name)


def set_environment(values):
    os.environ.update(values)


def job_main():
    """What two processes do together; with `die`, one of them leaves."""
    job = start_processes("cpu")
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout >= datetime.timedelta(days=1)
    assert job.sum(torch.eye(2)[job.rank]).tolist() == [1, 1]
    assert job.gather({"rank": job.rank}) == [{"rank": 0}, {"rank": 1}]
    assert job.join([1, job.rank]) == [1, 0] and job.largest([job.rank]) == 1
    with job.first_alone():
        job.say("one for all")
    if sys.argv[1:] == ["die"] and job.rank == 1:
        os._exit(7)
    job.sum(torch.ones(2))
    return 0


@pytest.mark.parametrize("die", [False, True])
def test_two_processes(tmp_path, start, die):
    """Each result on both; one that dies ends the other, in one line."""
    port = free_port()
    runs = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        job = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=rank)
        words = ["job", *(["die"] if die else [])]
        runs.append(start(tmp_path / rank, words, set_environment, job))
    assert [run.wait(30) for run in runs] == ([2, 7] if die else [0, 0]), [run.err for run in runs]
    assert [run.out for run in runs] == ["one for all\n", ""]
    if die:
        assert "Traceback" not in runs[0].err  # PyTorch 2.8 also says whom it found
        assert runs[0].err.splitlines()[-1].startswith("error: another process of this job died")


# ---- no fork ----

WITHOUT_FORK = """
import multiprocessing, sys
from lib import shapes
from lib.processes import run
import data, eval, search, train
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    mains = dict(train=train.main, eval=eval.main, search=search.main, check=data.main,
                 render=shapes.main)
    for line in open("commands.txt"):
        name, *words = line.rstrip("\\n").split("\\t")
        sys.argv = [name + ".py", *words]
        assert run(mains[name]) == 0, line
"""


@pytest.mark.parametrize("method, programs", [
    ("forkserver", ["train", "eval", "search"]),
    pytest.param("spawn", list(PROGRAMS), marks=pytest.mark.slow),
    pytest.param("forkserver", ["check", "render"], marks=pytest.mark.slow)])
def test_programs_run_without_fork(here, method, programs):
    """As on macOS and from Python 3.14 on: what workers are given can be pickled."""
    lines = []
    for name in programs:
        more = dict(train=["--epochs", "1"], eval=["--batch", "8"]).get(name, [])
        workers = [] if name == "render" else ["--workers", "2"]
        lines.append("\t".join([name, *PROGRAMS[name][1:], *more, *workers]))
    (here / "commands.txt").write_text("\n".join(lines) + "\n")
    (here / "all.py").write_text(WITHOUT_FORK)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "all.py", method], cwd=here, env=env, timeout=240,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = dict(train="step     4/4", eval="24 texts, 24 videos", check="16 decode, 0 don't",
                    search="encoded 24 videos", render="30/1/1 videos")
    assert all(expected[name] in done.stdout + done.stderr for name in programs), done.stdout


class Parents:
    """Items that say which process started the one that reads them."""

    def __getitem__(self, key):
        return torch.tensor(os.getppid())


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="not forked")
def test_workers_are_not_forked_beside_other_threads():
    """A fork copies locks that other threads hold, and not the threads."""
    parents = []
    for beside in (False, True):
        ending = threading.Event()
        thread = threading.Thread(target=ending.wait, args=(60,))
        if beside:
            thread.start()
        with lib.processes.loading(Parents(), [[0]], torch.stack, workers=1) as found:
            (parent,) = next(iter(found))
        parents.append(parent.item())
        ending.set()
    assert parents[0] == os.getpid() and parents[1] != os.getpid()
