"""Processes: the one of several that torchrun started, workers that read data, and signals."""
import contextlib
import datetime
import itertools
import os
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import multiprocessing  # Python's, but tensors travel in shared memory

from lib.common import DataError, UserError, cure, first_line, program

# ---- this process among several ----


class Job(NamedTuple):
    """This process among those that torchrun started, and its device. Alone, nothing is joined."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def say(self, text):
        """Print, by one process for all."""
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, x):
        """The sum over the processes, each with its own rows of zeros. (...) -> (...), on all."""
        if self.world > 1:
            dist.all_reduce(x)  # x + 0 is exact: the result does not depend on their number
        return x

    def gather(self, value):
        """The values of all processes by rank: plain objects or CPU tensors. -> list, on all."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def join(self, entries):
        """The lists of all processes as one, each entry once. -> list, on all."""
        lists = self.gather(entries)
        return list(dict.fromkeys(itertools.chain(*lists)))

    def largest(self, number):
        """The largest of the processes' whole numbers. -> int, on all."""
        if self.world > 1:
            number = torch.tensor(number, device=self.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    @contextlib.contextmanager
    def first_alone(self):
        """Process 0 runs the block before the others do: it may download or render."""
        if self.world > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()


ALONE = Job()
# Processes wait for each other while one of them downloads, reads more videos than the others, or
# while a person thinks at a prompt; torch's 10 minutes (NCCL) or 30 (gloo) would end such a job.
PATIENCE = datetime.timedelta(days=7)


def start_processes(device):
    """Join the job that torchrun started, if it did. -> Job. DataError if job or device can't be had."""
    rank, world = _place_in_job()
    if rank is not None and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > 1:
        raise DataError(f"--device {device} puts all {world} processes on one GPU: give --device cuda")
    elif device == "mps" and world > 1:
        raise DataError("--device mps serves one process: start it without torchrun")
    _try_device(device, rank is not None)
    if rank is None:
        return Job(device=torch.device(device))
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        try:
            with _stdout_to_stderr():
                dist.init_process_group(backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as e:
            raise DataError(f"process {rank} can't join the others ({first_line(e)}): start them with "
                            "torchrun, or unset RANK and WORLD_SIZE to run alone") from e
    return Job(dist.get_rank(), dist.get_world_size(), torch.device(device))


@contextlib.contextmanager
def _stdout_to_stderr():
    """What is printed inside goes to standard error: gloo of PyTorch 2.8 prints whom it found."""
    sys.stdout.flush()
    stdout = None
    with contextlib.suppress(OSError):  # one of the two is closed
        stdout = os.dup(1)
        os.dup2(2, 1)
    try:
        yield
    finally:
        if stdout is not None:
            os.dup2(stdout, 1)
            os.close(stdout)


def _place_in_job():
    """What torchrun says in the environment. -> (rank, world); (None, 1) for a process alone."""
    rank = os.environ.get("RANK")
    world = os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return None, 1
    with contextlib.suppress(TypeError, ValueError):
        if 0 <= int(rank) < int(world):
            return int(rank), int(world)
    raise DataError(f"process {rank} of {world} (RANK, WORLD_SIZE in the environment): start a job with "
                    "torchrun, or unset both to run alone")


def _try_device(device, parallel):
    """Use a device once. Raises DataError where that fails."""
    try:
        if device == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("neither this machine nor this torch has it")
        torch.zeros(1, device=device).item()
        if parallel and device.startswith("cuda"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as e:  # torch's ways to say so
        raise DataError(f"--device {device} can't be used ({first_line(e)}): try --device cpu") from e


def process_died(error):
    """Whether an error says that another process of the job is gone, as gloo and NCCL put it."""
    text = str(error).lower()
    words = ("peer", "gloo", "nccl", "timed out")
    joined = dist.is_available() and dist.is_initialized()
    return joined and (isinstance(error, dist.DistError) or any(word in text for word in words))


def run(main):
    """`program` for a main that torchrun may have started in several processes. -> exit status."""
    status = 2
    try:
        status = program(main)
    except RuntimeError as e:
        if not process_died(e):
            raise
        print(f"error: another process of this job died ({first_line(e)})", file=sys.stderr)
    finally:
        if status != 2 and dist.is_initialized():  # one that failed must not wait for the others
            dist.destroy_process_group()
    return status


# ---- signals ----

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)
_noted = []  # by noting_signals, for all who wait


class Stopped(Exception):
    """A signal asked the program to stop, and no batch comes that it could stop after."""


@contextlib.contextmanager
def noting_signals():
    """Note SIGINT, SIGTERM and SIGHUP for the loop to look at. -> list of those that came.

    The second signal of a kind ends the program at once.
    """
    def note(number, frame):
        if number in _noted:
            raise KeyboardInterrupt
        _noted.append(number)

    before = {}
    for number in SIGNALS:
        before[number] = signal.getsignal(number)
        if before[number] != signal.SIG_IGN or number == signal.SIGINT:  # nohup ignores SIGHUP
            signal.signal(number, note)
    try:
        yield _noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _noted.clear()


@contextlib.contextmanager
def _holding_signals():
    """Signals wait while workers start, so that none gets one before it can deal with it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- workers that read data ----
# torch's DataLoader is not used: it hands batches over in a thread, where an error is printed and
# lost; it raises a worker's death in the middle of any other line; and at exit it waits for ever
# for workers that ignore SIGTERM. Here each worker does one thing at a time and has a pipe of its
# own, and whatever happens to it is seen where the next batch is waited for.

AHEAD = 1  # batches that a worker has handed over; it may have read one more
GRACE = 3  # seconds in which a worker ends when it is asked to; then it is killed
STUCK = 5  # seconds without a batch after which a signal is not kept waiting for one
_place = (0, 1)


def worker_place():
    """(k, n): this process is the k-th of n that read; (0, 1) where there are no workers."""
    return _place


@contextlib.contextmanager
def loading(dataset, batches=None, collate=list, workers=0, pin=False):
    """`with loading(...) as found:` iterates over what `collate` makes of each list of items.

    batches: lists of the dataset's keys, whose order is kept. None: the dataset is a stream of
    finished batches, divided by worker_place(), and they come as they are ready.
    Every way out of the block ends the workers within seconds. A worker that dies (out of memory,
    a crash in a codec) raises a DataError, which names the video if the dataset has `was_reading`.
    """
    pool = []
    ending = multiprocessing.RawValue("b", 0)
    source = (dataset, batches, collate)
    try:
        with _holding_signals(), _explaining("workers can't be started"):
            for k in range(workers):
                pool.append(_Worker((k, workers), ending, source))
        found = _receive(pool, dataset, batches is not None) if workers else _read(*source)
        yield _pinned(found) if workers and pin else found
    finally:
        _end(pool, ending)


class _Worker:
    """A process that reads every n-th batch, and the pipe through which it hands them over."""

    def __init__(self, place, ending, source):
        self.pipe, other_end = multiprocessing.Pipe()
        arguments = (place, ending, other_end, source)
        self.process = multiprocessing.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        other_end.close()  # else the end of the process would not be that of the pipe
        for _ in range(AHEAD):
            self.pipe.send(None)

    def receive(self):
        """Its next message; then it may send another one."""
        message = self.pipe.recv()
        self.pipe.send(None)
        return message


def _work(place, ending, pipe, source):
    """The life of a worker: one batch for each message from the main process, then None."""
    global _place
    _place = place
    _mind_signals(ending)
    torch.set_num_threads(1)
    last = None
    with contextlib.suppress(EOFError, ConnectionError):  # the main process is gone
        try:
            with _explaining("a batch can't be handed over"):
                for batch in _read(*source):
                    _await_message(pipe)
                    pipe.send(batch)  # this moves tensors to shared memory
        except UserError as e:
            last = e
        except Exception:
            last = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        pipe.send(last)
        while True:  # shared memory of the last batches is had from this process
            _await_message(pipe)


def _mind_signals(ending):
    """In a worker: only the main process ends it.

    A Ctrl-C, or a SIGTERM to the whole job, is for the main process, which may want its batch.
    """
    def handle(number, frame):
        if ending.value:
            sys.exit()

    for number in SIGNALS:
        signal.signal(number, handle)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _await_message(pipe):
    """Wait until the main process wants something; end when it is gone."""
    parent = multiprocessing.parent_process()
    if parent.sentinel in connection.wait([pipe, parent.sentinel]):
        sys.exit()
    pipe.recv()


def _read(dataset, batches, collate):
    """The batches that this process is to read: its share of a stream, or every n-th."""
    if batches is None:
        yield from dataset
        return
    k, n = worker_place()
    for keys in itertools.islice(batches, k, None, n):
        yield collate([dataset[key] for key in keys])


def _receive(pool, dataset, in_order):
    """Yield the batches of all workers, in turn or as they are ready."""
    at_work = list(pool)
    while at_work:
        worker = _wait(at_work[:1] if in_order else at_work, pool, dataset)
        try:
            with _explaining("a batch can't be received"):
                message = worker.receive()
        except (EOFError, ConnectionError) as e:
            raise _death(worker.process, dataset) from e
        if isinstance(message, Exception):
            raise message
        at_work.remove(worker)
        if message is not None:
            at_work.append(worker)  # behind the others
            yield message


def _wait(expected, pool, dataset):
    """Wait for one of the expected workers. -> the first with a message."""
    began = time.monotonic()
    pipes = [worker.pipe for worker in expected]
    ends = [worker.process.sentinel for worker in pool]
    while True:
        ready = connection.wait(pipes + ends, timeout=1)
        for worker in pool:
            if worker.process.sentinel in ready:
                raise _death(worker.process, dataset)
        for worker in expected:
            if worker.pipe in ready:
                return worker
        if _noted and time.monotonic() - began > STUCK:
            raise Stopped(_noted[0])


def _death(process, dataset):
    """The DataError of a worker that ended by itself."""
    process.join(1)
    code = process.exitcode or 0
    why = signal.strsignal(-code) if code < 0 else f"exit status {code}"
    reading = ""
    if hasattr(dataset, "was_reading"):
        reading = f" while it read {dataset.was_reading(process.pid)}"
    return DataError(f"a decoding process died{reading} ({why}): check that video, or the machine's "
                     "memory (fewer --workers)")


@contextlib.contextmanager
def _explaining(what):
    """An error of the system inside, if it is one that can be cured, is a DataError that says how."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as e:
        if not cure(e):
            raise
        raise DataError(f"{what} ({first_line(e)}): {cure(e)}") from e


def _pinned(batches):
    """The batches in page-locked memory, from which a GPU copies them while it computes.

    A thread receives and pins one batch ahead.
    """
    device = torch.cuda.current_device()

    def fetch():
        torch.cuda.set_device(device)  # each thread has one of its own
        batch = next(batches, ())
        return [x.pin_memory() if torch.is_tensor(x) else x for x in batch]

    thread = ThreadPoolExecutor(1)
    try:
        following = thread.submit(fetch)
        while batch := following.result():
            following = thread.submit(fetch)
            yield batch
    finally:
        thread.shutdown(wait=False)  # it ends when the workers have ended


def _end(pool, ending):
    """End the workers: what they have in hand may be tidied up, for GRACE seconds in all."""
    ending.value = 1
    deadline = time.monotonic() + GRACE
    try:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.process.join(max(0, deadline - time.monotonic()))
    finally:
        for worker in pool:
            worker.process.kill()
            worker.process.join()
