"""Processes: the one of several that torchrun started, workers that read data, and signals."""
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
from multiprocessing import connection, reduction
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lib.common import DataError, UserError, curable, first_line, program

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
        if self.rank > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()


class Gather(torch.autograd.Function):
    """Join the rows of all processes, with gradient: (n,...) on each -> (Σ n,...) on all, by rank.

    Every process computes the same loss of all rows, hence the same gradient: each keeps that of
    its own rows, times the number of processes, as DistributedDataParallel averages. What comes out
    is exactly one process' gradient.
    """
    @staticmethod
    def forward(ctx, job, uneven, x):
        """uneven: the numbers of rows differ, as --skip-bad left some out; to ask costs a wait."""
        counts = job.gather(len(x)) if uneven else [len(x)] * job.world
        # Each adds its own rows to zeros, which is exact.
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
# Processes wait for each other while one of them downloads, reads more videos than the others, or
# while a person thinks at a prompt; torch's 10 minutes (NCCL) or 30 (gloo) would end such a job.
PATIENCE = datetime.timedelta(days=7)


def start_processes(device):
    """Join the job that torchrun started, if it did. -> Job. Raises DataError where that fails."""
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
    """What is printed inside goes to standard error: gloo of PyTorch 2.8 prints whom it found."""
    sys.stdout.flush()
    # Both are open: `program` has seen to that.
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _place_in_job():
    """What torchrun says in the environment. -> (rank, world); (0, 1) for a process alone."""
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
    """Use a device once. Raises DataError where that fails."""
    try:
        if device.startswith("mps") and not torch.backends.mps.is_available():
            raise RuntimeError("this machine or this torch has no MPS")
        torch.zeros(1, device=device).item()
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as e:  # torch's ways to say so
        raise DataError(f"--device {device} can't be used ({first_line(e)}): "
                        "try --device cpu") from e


def process_died(error):
    """Whether an error says that another process of the job is gone, as gloo or NCCL put it."""
    said = re.search("torch.distributed|gloo|nccl|peer", f"{type(error)} {error}", re.IGNORECASE)
    return dist.is_initialized() and said


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
        if status == 2:
            # What has failed must not wait for the others, and gloo's threads would now and then
            # abort a Python that ends by itself.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    return status


# ---- signals ----

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)
_noted = []  # by noting_signals, for whoever waits


class Stopped(Exception):
    """A signal asked the program to stop, and no batch comes that it could stop after."""


@contextlib.contextmanager
def noting_signals():
    """Note SIGINT, SIGTERM and SIGHUP for the loop to look at. -> list of those that came.

    The second one of a kind ends the program at once.
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
# torch's DataLoader is not used: it hands batches over in a thread, where an error is printed and
# lost; it raises a worker's death in the middle of any other line; at exit it waits for ever for
# workers that ignore SIGTERM; and it needs /dev/shm, which is small in a container. Here a worker
# does one thing at a time: it reads a batch, waits until it is asked for, and hands it over.

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
    finished batches, divided by worker_place(), and they come as they are ready. What comes is a
    list or tuple. Every way out of the block ends the workers within seconds. A worker that dies
    (out of memory, a crash in a codec) is a DataError, which names the video by `was_reading`.
    """
    pool = {}  # the pipe through which a worker hands its batches over: that process
    ending = multiprocessing.RawValue("b", 0)
    source = (dataset, batches, collate)
    if os.name == "nt":  # Windows has neither descriptors to send nor signals to hold back
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
    """Start the workers, and hold signals back until they can deal with them."""
    dataset = source[0]
    context = _context()
    # Where processes are not forked from this one, one that has imported torch starts them.
    context.set_forkserver_preload([__name__, type(dataset).__module__])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with curable("workers can't be started"):
            for k in range(workers):
                pipe, other_end = multiprocessing.Pipe()
                arguments = ((k, workers), ending, pipe, other_end, source)
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                pool[pipe] = process
                other_end.close()  # now the end of the process is the end of the pipe
                # It may have died: that is seen where its batch is waited for.
                with contextlib.suppress(ConnectionError):
                    pipe.send(None)  # asks for the first batch
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context():
    """How workers are started: as Python does it, but never forked beside other threads.

    A fork copies the locks of threads that the copy does not have: gloo's left a worker of Python
    3.10 waiting for ever for the lock of Python's own list of threads (1 of 10 jobs).
    """
    method = None
    threads = dist.is_initialized() or threading.active_count() > 1
    if threads and multiprocessing.get_start_method() == "fork":
        method = "forkserver"
    return multiprocessing.get_context(method)


def _work(place, ending, main_end, pipe, source):
    """The life of a worker."""
    global _place
    _place = place
    main_end.close()  # only a copy: now the end of the main process is the end of the pipe
    torch.set_num_threads(1)
    try:
        _obey(ending)
        _answer(pipe, source)
    finally:
        os._exit(0)  # at once: a signal in the middle of Python's own end would print a stack


def _answer(pipe, source):
    """Hand over a batch whenever the main process asks for one, then None, or what went wrong.

    True announces a batch, which takes another way than the pipe's: see `_send`.
    """
    last = None
    with contextlib.suppress(EOFError, ConnectionError):  # the main process is gone
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
    """In a worker, take signals from the main process only, and only to end.

    A Ctrl-C, or a SIGTERM to the whole job, is not for the worker: its batch may be wanted.
    """
    def handle(number, frame):
        if ending.value:
            sys.exit()

    for number in SIGNALS:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


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
        pipe = _wait(at_work[:1] if in_order else at_work)
        try:
            with curable("a batch can't be received"):
                message = pipe.recv()
                if message is True:
                    batch = _received(pipe)
                    pipe.send(None)  # asks for the one after it
        except (EOFError, ConnectionError) as e:
            raise _death(pool[pipe], dataset) from e
        at_work.remove(pipe)
        if message is True:
            at_work.append(pipe)  # behind the others
            yield batch
        elif message is not None:
            raise message


def _wait(pipes):
    """Wait for a message. -> a pipe that has one, or whose worker has died."""
    began = time.monotonic()
    while not (ready := connection.wait(pipes, timeout=1)):
        if _noted and time.monotonic() - began > STUCK:
            raise Stopped(_noted[0])
    return ready[0]


def _death(process, dataset):
    """The DataError of a worker that ended by itself."""
    process.join(GRACE)
    code = process.exitcode or 0
    why = signal.strsignal(-code) if code < 0 else f"exit status {code}"
    reading = ""
    if hasattr(dataset, "was_reading"):
        reading = f" while it read {dataset.was_reading(process.pid)}"
    return DataError(f"a decoding process died{reading} ({why}): check that video, or the "
                     "machine's memory (fewer --workers)")


def _end(pool, ending):
    """End the workers: what they have in hand may be tidied up, for GRACE seconds in all."""
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


# A batch goes through a file that is memory, whose descriptor follows the message: tensors are
# copied once, outlive the worker, and count in no /dev/shm.

def _send(pipe, batch):
    """Hand a batch over, a list or tuple."""
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
