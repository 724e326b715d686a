"""Processes: this one among those that torchrun started, workers that read data, and signals."""
import contextlib
import datetime
import itertools
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, reduction, resource_tracker
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lib.common import DataError, UserError, curable, first_line, program

# ---- this process among several ----


class Job(NamedTuple):
    """This process among those that torchrun started, and its device. By default, it is alone."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def say(self, text):
        """Print, in process 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, x):
        """Sum over all processes; each has filled its own rows only. (...) -> (...), on all."""
        if self.world > 1:
            dist.all_reduce(x)  # plus zeros: exact for any number of processes
        return x

    def gather(self, value):
        """Collect plain objects or CPU tensors of all processes. -> list by rank, on all."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def join(self, entries):
        """Join the lists of all processes, without duplicates. -> list, on all."""
        lists = self.gather(entries)
        return list(dict.fromkeys(itertools.chain(*lists)))

    def largest(self, numbers):
        """The maximum over all processes of lists of whole numbers; 0 if there are none."""
        number = max(numbers, default=0)
        if self.world > 1:
            number = torch.tensor(number, device=self.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    @contextlib.contextmanager
    def first_alone(self):
        """Let process 0 run the block before the others do: it may download or render."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()


class Gather(torch.autograd.Function):
    """Join the rows of all processes, with gradient: (n,...) on each -> (Σ n,...) on all, by rank.

    Every process computes the same loss of all rows, and so the same gradient. Each keeps the
    gradient of its own rows, times the number of processes, because DistributedDataParallel
    averages. The result is exactly the gradient that a single process would compute.
    """
    @staticmethod
    def forward(ctx, job, uneven, x):
        """uneven: row counts may differ, as --skip-bad drops rows. Exchanging them costs a wait."""
        counts = job.gather(len(x)) if uneven else [len(x)] * job.world
        # A sum, where each process fills its own rows, is exact and also works for uneven counts.
        first = sum(counts[:job.rank])
        ctx.job = job
        ctx.rows = slice(first, first + len(x))
        joined = x.new_zeros(sum(counts), *x.shape[1:])
        joined[ctx.rows] = x
        return job.sum(joined)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, gradient[ctx.rows] * ctx.job.world


ALONE = Job()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of --device, where it is not given
# Processes wait for each other while one of them downloads or reads more videos than the others, or
# while a user thinks at a prompt. torch's timeout of 10 minutes (NCCL) or 30 (gloo) is too short.
PATIENCE = datetime.timedelta(days=7)


def start_processes(device):
    """Join the job that torchrun started, if there is one. -> Job. Raises DataError on failure."""
    rank, world = _place_in_job()
    if world > 1:
        if device.startswith("cuda:"):
            raise DataError(f"--device {device} puts {world} processes on one GPU: give --device "
                            "cuda")
        if device.startswith("mps"):
            raise DataError("--device mps serves one process: start it without torchrun")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    _try_device(device)
    if world > 1 and not dist.is_initialized():
        try:
            store, *_ = next(rendezvous("env://"))  # this waits 30 minutes at most
            backend = "nccl" if device.startswith("cuda") else "gloo"
            with _stdout_to_stderr():
                dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank,
                                        world_size=world)
        except (RuntimeError, ValueError) as e:
            raise DataError(f"process {rank} can't join the others ({first_line(e)}): start them "
                            "with torchrun, or unset RANK and WORLD_SIZE to run alone") from e
    return Job(rank, world, torch.device(device))


@contextlib.contextmanager
def _stdout_to_stderr():
    """Send printed text to standard error: gloo of PyTorch 2.8 prints its connections."""
    sys.stdout.flush()
    # Both are open: `program` makes sure of it.
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _place_in_job():
    """Read torchrun's environment variables. -> (rank, world); (0, 1) without torchrun."""
    rank = os.environ.get("RANK")
    world = os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return 0, 1
    with contextlib.suppress(TypeError, ValueError):
        if 0 <= int(rank) < int(world):
            return int(rank), int(world)
    raise DataError(f"process {rank} of {world} (RANK, WORLD_SIZE in the environment): start jobs "
                    "with torchrun, or unset both to run alone")


def _try_device(device):
    """Use a device once. Raises DataError if that fails."""
    try:
        if device.startswith("mps") and not torch.backends.mps.is_available():
            raise RuntimeError("this machine or this torch has no MPS")
        torch.zeros(1, device=device).item()
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as e:  # depending on the device
        raise DataError(f"--device {device} can't be used ({first_line(e)}): "
                        "try --device cpu") from e


def process_died(error):
    """Whether an error, of gloo or NCCL, means that another process of the job has died."""
    match = re.search("torch.distributed|gloo|nccl|peer", f"{type(error)} {error}", re.IGNORECASE)
    return dist.is_initialized() and match


def run(main):
    """`program` for a main that torchrun may have started in several processes. -> exit status."""
    try:
        status = program(main)
    except RuntimeError as e:
        if not process_died(e):
            raise
        print(f"error: another process of this job died ({first_line(e)})", file=sys.stderr)
        status = 2
    if dist.is_initialized():
        if status > 1:
            # A process that failed must not wait for the others; and when Python exits normally,
            # gloo's threads sometimes abort it.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    return status


# ---- signals ----

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)
_noted = []  # signals received in noting_signals


class Stopped(Exception):
    """A signal asked the program to stop, and no batch arrives after which it could."""


@contextlib.contextmanager
def noting_signals():
    """Record SIGINT, SIGTERM and SIGHUP for the loop to check. -> list of those received.

    A second signal of the same kind raises KeyboardInterrupt at once.
    """
    def note(number, frame):
        if number in _noted:
            raise KeyboardInterrupt
        _noted.append(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN or number == signal.SIGINT:  # nohup ignores SIGHUP
            signal.signal(number, note)
    try:
        yield _noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _noted.clear()


# ---- workers that read data ----
# torch's DataLoader is not used. It hands batches over in a thread, where an error is printed and
# lost. It reports a worker's death by an exception in the middle of any other line. At exit, it
# waits forever for workers that ignore SIGTERM. It needs /dev/shm, which is small in a container.
# Here, a worker does one thing at a time: it reads a batch, waits until the main process asks for
# it, and hands it over.

GRACE = 3  # seconds that workers have to end when asked to; then they are killed
STUCK = 5  # seconds of waiting for a batch after which a signal no longer waits for it
_place = (0, 1)


def worker_place():
    """(k, n): this process is worker k of n; (0, 1) outside of workers."""
    return _place


@contextlib.contextmanager
def loading(dataset, batches=None, collate=list, workers=0, pin=False):
    """`with loading(...) as found:` iterates over collate(items) for each list of keys in batches.

    batches: lists of the dataset's keys; their order is kept. None: the dataset is an iterable of
    finished batches, which it divides by worker_place(); they arrive as they are ready. A batch is
    a list or tuple. The workers end within seconds, however the block is left. If a worker dies
    (out of memory, a crash in a codec), a DataError names the video by the dataset's `was_reading`.
    """
    pool = {}  # pipe through which a worker hands over its batches -> its process
    ending = multiprocessing.RawValue("b", 0)
    source = (dataset, batches, collate)
    if os.name == "nt":  # Windows can neither send descriptors nor block signals
        workers = 0
    try:
        found = _read(*source)
        if workers:
            _start(pool, workers, ending, source)
            found = _receive(pool, dataset, in_order=batches is not None)
        yield _pinned(found) if workers and pin else found
    finally:
        _end(pool, ending)


def _start(pool, workers, ending, source):
    """Start the workers, with signals blocked until each has its own handlers."""
    context = _context()
    # If a fork server starts them, it imports torch once for all.
    context.set_forkserver_preload([__name__, type(source[0]).__module__])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with curable("workers can't be started"):
            if context.get_start_method() != "fork":
                # Its start unblocks them. A fork server without them blocked would end at a signal
                # to all processes, as torchrun's is, and its workers could no longer be killed.
                resource_tracker.ensure_running()
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for k in range(workers):
                pipe, other_end = multiprocessing.Pipe()
                arguments = ((k, workers), ending, pipe, other_end, source)
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                pool[pipe] = process
                other_end.close()  # now the pipe closes when the process ends
                # A worker that has died is noticed where its batch is waited for.
                with contextlib.suppress(ConnectionError):
                    pipe.send(None)  # asks for the first batch
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context():
    """How workers are started: Python's default, but never a fork beside other threads.

    A fork copies locks that are held by threads which the copy lacks. gloo's threads left a worker
    of Python 3.10 waiting forever for the lock of Python's list of threads (1 of 10 jobs).
    """
    method = None
    threads = dist.is_initialized() or threading.active_count() > 1
    if threads and multiprocessing.get_start_method() == "fork":
        method = "forkserver"
    return multiprocessing.get_context(method)


def _work(place, ending, main_end, pipe, source):
    """What a worker runs."""
    global _place
    _place = place
    main_end.close()  # a copy: now the pipe closes when the main process ends
    torch.set_num_threads(1)
    try:
        _obey(ending)
        _answer(pipe, source)
    finally:
        os._exit(0)  # at once: a signal during Python's own exit would print a stack


def _answer(pipe, source):
    """Hand over a batch whenever the main process asks for one; at the end, None or an error.

    True announces a batch, which does not go through the pipe itself: see `_send`.
    """
    last = None
    with contextlib.suppress(EOFError, ConnectionError):  # the main process has ended
        try:
            with curable("a batch can't be read or handed over"):
                for batch in _read(*source):
                    pipe.recv()
                    _send(pipe, batch)
        except (UserError, OSError) as e:
            last = e
        except Exception:
            last = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        pipe.recv()
        pipe.send(last)


def _obey(ending):
    """In a worker, ignore signals until the main process ends the workers.

    Ctrl-C, or a SIGTERM to the whole job, is not meant for a worker: its batch may be wanted.
    """
    def handle(number, frame):
        if ending.value:
            sys.exit()

    for number in SIGNALS:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _read(dataset, batches, collate):
    """The batches that this process reads: its share of an iterable dataset, or every n-th."""
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
        pipe = _wait(at_work[:1] if in_order else at_work)
        try:
            with curable("a batch can't be received"):
                message = pipe.recv()
                if message is True:
                    batch = _received(pipe)
                    pipe.send(None)  # asks for the next one
        except (EOFError, ConnectionError) as e:
            raise _death(pool, pipe, dataset) from e
        at_work.remove(pipe)
        if message is True:
            at_work.append(pipe)  # behind the others
            yield batch
        elif message is not None:
            raise message


def _wait(pipes):
    """Wait until a pipe has a message, or its worker has died. -> that pipe"""
    began = time.monotonic()
    while not (ready := connection.wait(pipes, timeout=1)):
        if _noted and time.monotonic() - began > STUCK:
            raise Stopped
    return ready[0]


def _death(pool, pipe, dataset):
    """The DataError for a worker that died."""
    process = pool[pipe]
    process.join(GRACE)
    code = process.exitcode or 0
    why = signal.strsignal(-code) if code < 0 else f"exit status {code}"
    reading = ""
    if hasattr(dataset, "was_reading"):
        reading = f" while it read {dataset.was_reading(list(pool).index(pipe))}"
    return DataError(f"a decoding process died{reading} ({why}): check that video, or the "
                     "machine's memory (fewer --workers)")


def _end(pool, ending):
    """End the workers. All together, they have GRACE seconds to clean up."""
    ending.value = 1
    deadline = time.monotonic() + GRACE
    try:
        for process in pool.values():
            process.terminate()
        for process in pool.values():
            process.join(max(0, deadline - time.monotonic()))
    finally:
        for process in pool.values():
            process.kill()
            process.join(GRACE)


def _pinned(batches):
    """Yield batches in page-locked memory, from which a GPU copies them while it computes.

    A thread receives and pins one batch ahead.
    """
    device = torch.cuda.current_device()

    def fetch():
        torch.cuda.set_device(device)  # the current device is per thread
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


# A batch travels in a file in memory, whose descriptor follows the message. Tensors are copied only
# once, outlive the worker, and do not fill /dev/shm.

def _send(pipe, batch):
    """Hand over a batch, a list or tuple."""
    if hasattr(os, "memfd_create"):
        file = open(os.memfd_create("batch"), "wb")
    else:  # macOS
        file = tempfile.TemporaryFile()
    with file:
        torch.save(batch, file)
        file.seek(0)
        pipe.send(True)
        reduction.send_handle(pipe, file.fileno(), None)


def _received(pipe):
    """The batch that `_send` sent."""
    with open(reduction.recv_handle(pipe), "rb") as file:
        return torch.load(f"/dev/fd/{file.fileno()}", weights_only=False, mmap=True)
