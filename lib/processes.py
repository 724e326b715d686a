"""Processes: those that torchrun started, worker processes that read videos, and signals."""
import contextlib
import os
import re
import signal
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from clip_model import WeightsError
from lib.common import DataError, program

# ---- this process among several ----

class Job(NamedTuple):
    """This process among those that torchrun started, and its device. Alone, every method does nothing but its name."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def say(self, text):
        """Print, as one process of all; a file name that is not Unicode must not end a run."""
        if self.rank == 0:
            encoding = sys.stdout.encoding or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)

    def sum(self, x):
        """Join what the processes computed, each in its own rows of zeros. (...) -> (...), the same on all."""
        if self.world > 1:
            dist.all_reduce(x)  # x + 0: exact
        return x

    def join(self, lines):
        """The lists of all processes in one, each entry once."""
        return list(dict.fromkeys(x for part in self.gather(lines) for x in part))

    def gather(self, thing):
        """What each process has, by rank: any plain object or tensors of the CPU. -> list, the same on all."""
        parts = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, thing)
        return parts

    def largest(self, number):
        """Of all processes' numbers (an int)."""
        if self.world > 1:
            number = torch.tensor(number, device=self.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    @contextlib.contextmanager
    def first_alone(self):
        """Process 0 does what is inside, then the others: it may download or render."""
        if self.world > 1 and self.rank:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()


ALONE = Job()


def start_processes(device):
    """Join the job that torchrun started, if it did. -> Job. Raises DataError where device or job can't be had."""
    parallel = "RANK" in os.environ
    if parallel and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=device).item()
        if parallel and device.startswith("cuda"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as e:  # torch's ways to say so
        raise DataError(f"--device {device} can't be used ({str(e).splitlines()[0]}): try --device cpu") from e
    if not parallel:
        return Job(device=torch.device(device))
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        except (RuntimeError, ValueError) as e:
            raise DataError(f"process {os.environ['RANK']} can't join the others ({str(e).splitlines()[0]}): "
                                 "start them with torchrun, or unset RANK to run alone") from e
    return Job(dist.get_rank(), dist.get_world_size(), torch.device(device))


def run(main):
    """A program that torchrun may have started in several processes: `program`, and the processes part at its end."""
    try:
        return program(main, WeightsError)
    except RuntimeError as e:
        if not dist.is_initialized() or "peer" not in str(e).lower() and not isinstance(e, dist.DistError):
            raise
        print(f"error: another process of this job died ({str(e).splitlines()[0]})", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- worker processes, and signals ----

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _ignore_signals(worker):
    """In a worker: a Ctrl-C, or a SIGTERM to the whole job, is for the main process, which may still want its batch."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def loading(dataset, batches=None, collate=None, workers=0, pin=False):
    """`with loading(...) as batches:` what collate makes of each list of items, read by worker processes, in order.

    Without batches the dataset is a stream that makes its own, and they come as they are ready.

    Signals are held back while workers start, so that none dies before it ignores them. A worker that dies all the same
    (out of memory, a crash in a codec) ends the block with a DataError that names the video it was reading.
    """
    order = dict(batch_sampler=batches, collate_fn=collate)
    if batches is None:
        order = dict(batch_size=None, in_order=False)
    loader = DataLoader(dataset, **order, num_workers=workers, pin_memory=pin, worker_init_fn=_ignore_signals)
    try:
        try:
            hold = workers and hasattr(signal, "pthread_sigmask")
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if hold else None
            try:
                iterator = iter(loader)
            finally:
                if hold:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield iterator
        except (EOFError, ConnectionError):  # it died while handing a batch over
            time.sleep(1)                    # in a moment torch's SIGCHLD handler raises what says more
            raise
    except Exception as e:
        told = e
        while told and not (pid := re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", str(told))):
            told = told.__context__  # torch raises it at any moment: while a file is written, another error comes of it
        if not told:
            raise
        video, why = dataset.was_reading(int(pid[1])), str(told).splitlines()[0]
        raise DataError(f"a decoding process died while it read {video} ({why}): check that video, or the machine's "
                        "memory (fewer --workers)") from e


@contextlib.contextmanager
def noting_signals():
    """-> the SIGINT and SIGTERM that came while this is open, for the loop to look at; asked twice, it ends at once."""
    def note(number, frame):
        if number in noted:
            raise KeyboardInterrupt
        noted.append(number)
    noted, before = [], [signal.signal(number, note) for number in SIGNALS]
    try:
        yield noted
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)
