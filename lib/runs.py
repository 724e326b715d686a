"""The files of a training run: lock, log, checkpoint, and what may be resumed or replaced."""
import argparse
import contextlib
import csv
import functools
import hashlib
import os
import re
import shlex
import sys
import time
from dataclasses import InitVar, dataclass, field

import torch

from lib.common import WeightsError, check_output, clock, close_on_windows, write_text
from lib.processes import Job
from lib.validate import check_own, usable
from lib.weights import read_weights, save_checkpoint
from tmass import TMASS

START_ONLY = ("resume", "overwrite", "tensorboard")  # for one start; not saved
# Settings that may change with --resume: the result stays the same.
FREE = (*START_ONLY, "out", "workers", "device", "save_every", "log_every", "cache", "skip_bad",
        "grad_checkpoint", "root", "videos")


def option(name):
    """The name of a setting on the command line."""
    return "--" + name.replace("_", "-")


def beside(out, ending):
    """NAME.pt -> NAME with another ending."""
    return os.path.splitext(out)[0] + ending


@contextlib.contextmanager
def only_run(out):
    """Let only one run at a time write --out, by locking a file beside it."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        check_output("--out", out)
        lock = open(out + ".lock", "a+")
    except OSError as error:
        raise WeightsError(f"--out {out} cannot be written: {error.strerror}; choose another "
                           "--out") from None
    with lock:
        try:
            import fcntl
            # The system releases it however this process ends. Workers would inherit a flock.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its run ended, and removed it, after it was opened here: a third may have a new one.
            if not os.fstat(lock.fileno()).st_nlink:
                raise BlockingIOError
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise WeightsError(f"{out} is being written by process {lock.read()}: choose another "
                               "--out") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        lock.truncate(0)
        print(os.getpid(), end="", file=lock, flush=True)
        try:
            yield
        finally:
            close_on_windows(lock)
            os.unlink(lock.name)


def earlier_run(args):
    """The checkpoint in --out for --resume to continue from; None if a new run may start there.

    A new run may replace a run without a completed step or, with --overwrite, a finished one.
    """
    out = args.out
    for source in filter(None, (args.clip, args.init)):
        if os.path.realpath(source) == os.path.realpath(out):
            raise WeightsError(f"--out {out} is what --clip or --init starts from: choose another "
                               "--out")
    if not os.path.lexists(out):
        for ending in (".log.csv", ".bad.txt"):
            path = beside(out, ending)
            if os.path.lexists(path):
                raise WeightsError(f"{path} belongs to another run, whose {out} is gone: move it, "
                                   "or choose another --out")
        return None
    # A file that this program did not write is never replaced, whatever the options.
    content = {}
    with contextlib.suppress(WeightsError):
        content = read_weights(out)
    if content.get("format") != "tmass":
        raise WeightsError(f"--out {out} is not a checkpoint of this program, and stays as it is: "
                           "choose another --out")
    if args.resume:
        _check_run(content, out)
        _check_unchanged(args, content)
        return content
    finished = content.get("finished", True)
    if finished and not args.overwrite:
        raise WeightsError(f"{out} holds a finished run: choose another --out, or replace it with "
                           "--overwrite")
    if not finished and content.get("step"):
        raise WeightsError(f"{out} holds an unfinished run at step {content['step']}: --resume it, "
                           "or choose another --out")
    return None


def checksum(annotations):
    """Checksum of all captions in order, with names and seconds of their videos; no folders."""
    digest = hashlib.sha256()
    for caption, v in zip(annotations.captions, annotations.owner):
        path, *seconds = annotations.segments[v]
        name = os.path.splitext(os.path.basename(path))[0]
        # ascii() is the same in every version of Python, and takes names of any bytes.
        digest.update(ascii((caption, v, name, seconds)).encode())
    return digest.hexdigest()


def check_settings(parser, config, path):
    """Parse a run's settings as its options would. -> dict. WeightsError if one is refused."""
    def fault(message):
        raise ValueError(message)

    # Old checkpoints may have others.
    known = vars(parser.parse_args([])).keys() & config.keys()
    parser.error = fault
    words = []
    with usable(path):
        for name in known:
            value = config[name]
            if value is not None and value is not False:
                words.append(option(name) if value is True else f"{option(name)}={value}")
        settings = vars(parser.parse_args(words))
    return {name: settings[name] for name in known if settings[name] is not None}


def _check_unchanged(args, content):
    """Refuse settings that differ from the resumed run's, unless they do not affect the result."""
    free = (*FREE, "data") if "splits" in content else FREE  # its checksum decides
    for name, before in content["config"].items():
        now = vars(args).get(name)
        if now is not None and now != before and name not in free:
            raise WeightsError(f"{option(name)} {now} differs from {before} in {args.out}: drop "
                               "it to resume, or start anew with another --out")


def go_on():
    """The command that continues this run: what the user typed, plus --resume."""
    env = os.environ
    words = ["python"]
    if "LOCAL_WORLD_SIZE" in env:
        words = ["torchrun", "--nproc_per_node", env["LOCAL_WORLD_SIZE"]]
        # With several nodes, it has to be typed on each.
        if env["GROUP_WORLD_SIZE"] != "1":
            words += ["--nnodes", env["GROUP_WORLD_SIZE"], "--rdzv_backend", "c10d",
                      "--rdzv_endpoint", env["MASTER_ADDR"] + ":29500"]
    words += sys.argv
    if "--resume" not in words:
        words.append("--resume")
    return shlex.join(words)


def _check_run(content, path):
    """Raise a WeightsError unless --resume can go on from this checkpoint."""
    with usable(path):
        check_own(content)
        if not all(isinstance(line, str) for line in content["bad_videos"]):
            raise ValueError("bad_videos is not a list of lines")
        content.get("training", content)["model"]  # the weights to go on from
        step, R1 = (0, 0) if content["best"] is None else content["best"]
        if not 0 <= step <= content["step"] or not 0 <= R1 <= 100:
            raise ValueError(f"best is {content['best']!r:.60}")


def _load_optimizer(optimizer, saved):
    """Restore the moments of a saved state_dict(). Raises ValueError if they don't fit."""
    # The learning rates come from the settings, whatever the file says.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(dict(saved, param_groups=groups))
    # load_state_dict compares nothing. What the loss does not depend on, such as SigLIP's bias,
    # has no gradient and no moments.
    for p, moments in optimizer.state.items():
        for name, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape)):
            if moments[name].shape != shape or not moments[name].isfinite().all():
                raise ValueError(f"the optimizer's {name} has another size, or is not finite")


def board(folder):
    """The type of --tensorboard -> a function that makes the writer. Fails without its package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise argparse.ArgumentTypeError("needs a package: pip install tensorboard") from None
    return functools.partial(SummaryWriter, folder)


@dataclass
class Log:
    """Writes NAME.log.csv, one row per logged step, and prints a line for each.

    Resuming drops the rows after the step it starts from. Only process 0 writes the file.
    """
    args: argparse.Namespace
    job: Job
    checkpoint: "Checkpoint"
    batches: object  # train.Batches
    # Whether each step since the last check was finite: on the device, so that no step waits.
    flags: list = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0

    TERMS = ("loss", "stochastic", "support", "ce")
    FIELDS = ("step", "epoch", *TERMS, "head_lr", "clip_lr", "scale", "grad_norm", "pairs_per_s",
              "val_R1")
    # A complete row: a full disk, an editor or another version may have left other lines.
    ROW = r"(\d+)(,[^,\n]*){11}\n"

    def __post_init__(self):
        start = self.batches.start
        path = os.devnull if self.job.rank else beside(self.args.out, ".log.csv")
        kept = []
        if start and os.path.isfile(path):
            with open(path, newline="", errors="replace") as file:
                for row in file:
                    step = re.match(self.ROW, row)
                    if step and float(step[1]) <= start:
                        kept.append(row)
        # Line buffering: the file can be followed while training runs.
        file = open(path, "w", buffering=1, newline="")
        self.writer = csv.DictWriter(file, self.FIELDS)
        self.writer.writeheader()
        file.writelines(kept)
        self.board = None
        if self.args.tensorboard and self.job.rank == 0:
            self.board = self.args.tensorboard(purge_step=start + 1)
        self.since = time.monotonic()  # time of the last row
        self.done = start

    def was_finite(self, done):
        """Report the steps up to `done` that were skipped. -> whether the last step was finite

        Too many in a row end the run: 10, or 30 with fp16, which halves the loss scale at each
        until the gradients fit. This waits for the device.
        """
        # One copy of all flags costs a single wait.
        flags = torch.stack(self.flags).tolist() if self.flags else []
        self.flags.clear()
        for step, finite in enumerate(flags, done - len(flags) + 1):
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if not finite:
                self.skipped += 1
                self.job.say(f"step {step}: loss or gradient is not finite; step skipped "
                             f"({self.skipped} so far)")
            if self.in_a_row == (30 if self.args.amp == "fp16" else 10):
                scale = self.checkpoint.model.clip.logit_scale.exp().item()
                raise WeightsError(
                    f"{self.in_a_row} steps in a row, to {step}, were not finite (logit scale "
                    f"{scale:.1f}): {self.args.out} keeps the last good state, step "
                    f"{self.checkpoint.step}; lower the rates")
        return self.in_a_row == 0

    def step(self, done, values, factor):
        """Print a line and write a row. values: name -> tensor (). This waits for the device."""
        self.was_finite(done)
        args = self.args
        # One copy from the device, not one for each number.
        numbers = torch.stack(list(values.values())).tolist()
        seconds = time.monotonic() - self.since
        speed = (done - self.done) * args.batch / seconds
        row = dict(
            zip(values, numbers),
            step=done,
            epoch=(done - 1) // self.batches.per_epoch + 1,
            head_lr=args.head_lr * factor,
            clip_lr=args.clip_lr * factor,
            pairs_per_s=speed,
        )
        terms = "  ".join(f"{name} {row[name]:.3f}" for name in self.TERMS)
        left = clock((self.batches.total - done) * args.batch / speed)
        self.job.say(f"step {done:5d}/{self.batches.total}  epoch {row['epoch']}/{args.epochs}  "
                     f"{terms}  lr {row['head_lr']:.1e}/{row['clip_lr']:.1e}  "
                     f"{speed:.{0 if speed >= 10 else 2}f} pairs/s  {left} left")
        self.row(**row)

    def row(self, **values):
        for name, value in values.items():
            if isinstance(value, float):
                values[name] = f"{value:.6g}"
                if self.board:
                    self.board.add_scalar(name, value, values["step"])
        if self.board:
            self.board.flush()
        self.writer.writerow(values)
        self.since = time.monotonic()
        self.done = values["step"]


@dataclass
class Checkpoint:
    """All that training changes, in one file: the result, and what resuming needs.

    The result is the best epoch on the validation split or, without one, the latest weights.
    """
    args: argparse.Namespace
    job: Job
    model: TMASS
    tokenizer: object
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    splits: dict
    saved: InitVar = None      # a checkpoint to resume from
    step: int = 0
    best: list = None          # [step, R@1] of the best validation
    best_weights: dict = None
    bad_videos: list = field(default_factory=list)
    unsaved: int = None        # the last step, if it may be saved now

    def __post_init__(self, saved):
        self.sums = {name: checksum(annotations) for name, annotations in self.splits.items()}
        if saved:
            with usable(self.args.out):
                _load_optimizer(self.optimizer, saved["optimizer"])
                self.scaler.load_state_dict(saved.get("scaler", {}))
            self.step = saved["step"]
            self.best = saved["best"]
            self.bad_videos = saved["bad_videos"]
            # Old checkpoints don't record their splits.
            for split, before in saved.get("splits", {}).items():
                if self.sums.get(split) != before:
                    raise WeightsError(f"{self.args.out} was trained with another {split} split "
                                       "than this: --resume needs its data, wherever it is now "
                                       "(--data, --root, --videos), and with --skip-bad the same "
                                       "videos missing")
            if "training" in saved:
                self.best_weights = saved["model"]

    def validated(self, step, R1):
        """Keep the weights if they are the best so far. R1: in percent."""
        if self.best is None or R1 > self.best[1]:
            self.best = [step, R1]
            state = self.model.state_dict()
            # On the CPU: the device needs its memory for training.
            self.best_weights = {k: x.detach().to("cpu", copy=True) for k, x in state.items()}

    def save(self, step, finished=False):
        """Called in all processes; process 0 writes. If finished, the model becomes the result."""
        self.step = step
        self.bad_videos = self.job.join(self.bad_videos)
        state = dict(step=step, best=self.best, bad_videos=self.bad_videos, finished=finished,
                     splits=self.sums)
        if not finished:
            state["optimizer"] = self.optimizer.state_dict()
            state["scaler"] = self.scaler.state_dict()
            # The result is an earlier epoch's: the weights to continue from are kept beside it.
            if self.best_weights:
                state["training"] = dict(model=self.model.state_dict())
        if self.job.rank == 0:
            config = {k: x for k, x in vars(self.args).items() if k not in START_ONLY}
            save_checkpoint(self.args.out, self.model, self.tokenizer, config,
                            weights=self.best_weights, **state)
        if finished and self.best_weights:
            self.model.load_state_dict(self.best_weights)

    def list_bad(self):
        """Write NAME.bad.txt: what --skip-bad left out."""
        lines = self.job.join(self.bad_videos)
        if lines and self.job.rank == 0:
            path = beside(self.args.out, ".bad.txt")
            write_text(path, "\n".join([*lines, ""]))
            print(f"--skip-bad: {len(lines)} videos left out, listed in {path}")


def without_effect(args):
    """Yield the settings that have no effect because of others."""
    if args.radius == "none":
        yield from ("prior", "prior_std", "support_video")
    if args.prior == "uniform":
        yield "prior_std"
    if args.support_weight == 0:
        yield "support_video"
    if args.pooling != "xpool":
        yield from ("heads", "dropout")
    if args.freeze_clip:
        yield "clip_lr"
