"""Processes: this one among those that torchrun started, workers that read data, and signals."""
import contextlib
import datetime
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
from multiprocessing import forkserver, queues, resource_tracker
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from lib.common import DataError, curable, cure, first_line, program

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
            dist.all_gather_object(values, value, group=_patient)
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
            dist.barrier(group=_patient)
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier(group=_patient)


class Gather(torch.autograd.Function):
    """Join the rows of all processes, with gradient: (n,...) on each -> (Σ n,...) on all, by rank.

    Every process computes the same loss of all rows, and so the same gradient. Each keeps the
    gradient of its own rows, times the number of processes, because DistributedDataParallel
    averages. The result is exactly the gradient that a single process would compute.
    """
    @staticmethod
    def forward(ctx, job, uneven, x):
        """uneven: row counts may differ or be 0, as --skip-bad drops rows. This costs a wait."""
        counts = [len(x)] * job.world
        if uneven:
            own = torch.zeros(job.world, dtype=torch.int64, device=x.device)
            own[job.rank] = len(x)
            counts = job.sum(own).tolist()
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
_patient = None  # the group that waits so long; tensors are exchanged under torch's own timeout


def start_processes(device=None):
    """Join the job that torchrun started, if there is one. -> Job. Raises DataError on failure."""
    global _patient
    device = device or DEVICE
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
                dist.init_process_group(backend, store=store, rank=rank, world_size=world)
                _patient = dist.new_group(timeout=PATIENCE, backend="gloo")
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


def run(main):
    """`program` for a main that torchrun may have started in several processes. -> exit status."""
    try:
        with _handling(_interrupt):
            status = program(main)
    except RuntimeError as e:
        # An error of gloo or NCCL in the middle of an exchange.
        if not dist.is_initialized() or not re.search("gloo|nccl|peer", f"{type(e)} {e}", re.I):
            raise
        print("error: another process of this job died; a training goes on with --resume",
              file=sys.stderr)
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


def _interrupt(number, frame):
    """End the program as Ctrl-C does; `program` makes an exit status of the signal's number."""
    raise KeyboardInterrupt(number)


def _note(number, frame):
    if number in _noted:
        _interrupt(number, frame)
    _noted.append(number)


@contextlib.contextmanager
def _handling(handler):
    """Handle SIGNALS by a function in this block, except a SIGHUP that nohup ignores.

    A shell's background jobs ignore SIGINT, but who sends it to one of them means it.
    """
    before = {}
    # Python handles signals in the main thread only.
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: old for n, old in before.items() if old != signal.SIG_IGN or n == signal.SIGINT}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def noting_signals():
    """Record SIGINT, SIGTERM and SIGHUP for the loop to check. -> list of those received.

    A second signal of the same kind raises KeyboardInterrupt at once.
    """
    try:
        with _handling(_note):
            yield _noted
    finally:
        _noted.clear()


# ---- workers that read data ----

WAIT = 2  # seconds without a batch after which signals and dead workers are looked for
# torch would report a dead worker by an exception in the middle of any line of the main thread,
# perhaps while a checkpoint is saved. Without this handler, it is noticed where a batch is awaited.
signal_handling._SIGCHLD_handler_set = True


def cores():
    """The default of --workers: the cores that this process may use, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


@contextlib.contextmanager
def loading(dataset, batches=None, collate=list, workers=0, pin=False):
    """`with loading(...) as found:` iterates over collate(items) for each list of keys in batches.

    batches: lists of the dataset's keys; their order is kept. None: the dataset is an
    IterableDataset of finished batches; they arrive as they are ready, as tuples. workers: None for
    cores(). The workers end within seconds, however the block is left. If one of them dies (out of
    memory, a crash in a codec), a DataError says so.

    collate makes large tensors with torch's default_collate, which lets a worker put them into
    shared memory itself. A thread of its own would do it otherwise, and only print an error.
    """
    if workers is None:
        workers = cores()
    if hasattr(batches, "__len__"):
        workers = min(workers, len(batches))
    loader = DataLoader(
        dataset,
        batch_size=None if batches is None else 1,  # 1: as batch_sampler says
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=tuple if batches is None else collate,
        pin_memory=pin,
        timeout=WAIT if workers else 0,
        worker_init_fn=_obey,
        multiprocessing_context=_context() if workers else None,
        generator=torch.Generator(),  # so that it draws nothing from the global one
        in_order=batches is not None,
    )
    others = multiprocessing.active_children()
    found = None
    try:
        with curable("workers can't be started"):
            found = _start(loader)
        yield _receive(found) if workers else found
    finally:
        # torch alone would wait 5 s for each worker that is in the middle of a batch.
        started = [x for x in multiprocessing.active_children() if x not in others]
        for process in started:
            process.terminate()
        for process in started:
            process.join(WAIT / len(started))
        for process in started:
            process.kill()
        if hasattr(found, "_shutdown_workers"):  # it has workers
            found._shutdown_workers()


def _start(loader):
    """iter(loader), with signals delivered only afterwards.

    An exception in the middle of a fork would go on in both processes.
    """
    held = []
    with _handling(lambda number, frame: held.append(number)):
        found = iter(loader)
    for number in held:
        signal.raise_signal(number)
    return found


def _context():
    """How workers are started: Python's default, but no fork beside threads of a job or a server.

    A fork copies locks that are held by threads which the copy lacks. gloo's threads left a worker
    of Python 3.10 waiting forever for the lock of Python's list of threads (1 of 10 jobs).
    """
    method = None
    served = threading.current_thread() is not threading.main_thread()
    if multiprocessing.get_start_method() == "fork" and (served or dist.is_initialized()):
        method = "forkserver"
    context = multiprocessing.get_context(method)
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torchvision"])  # imports it and torch once for all workers
        # A server that ended at a signal to the whole job would leave workers that nobody can end.
        resource_tracker.ensure_running()  # here, because it unblocks signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _obey(worker):
    """In a worker: Ctrl-C and SIGHUP are for the program; SIGTERM ends it, with exit code 0."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a fork server has them blocked
    # A batch that the queue's thread can't hand over would be lost, and waited for without end.
    queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


def _receive(found):
    """Yield the batches of a DataLoader's iterator that has workers."""
    while True:
        try:
            batch = next(found)
        except StopIteration:
            return
        except (EOFError, OSError, RuntimeError) as error:
            if _noted:
                raise Stopped from None
            if "timed out" in str(error):
                continue
            with curable("a batch can't be read or received"):
                if cure(error) or str(error).startswith("Caught"):  # in a worker
                    raise
            raise DataError(f"a process that reads videos died ({first_line(error)}): check the "
                            "videos, and the machine's memory and /dev/shm (fewer --workers)") \
                from None
        yield batch
