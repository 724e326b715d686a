"""The files of a training run: NAME.pt, the checkpoint, with NAME.log.csv and NAME.bad.txt."""
import csv
import os
import re
import time
from dataclasses import dataclass, field

import torch

from lib.common import DataError, clock, write_whole
from lib.weights import save_checkpoint, usable
from tmass import TMASS


@dataclass
class Run:
    """All that training changes, and what it depends on. `save` writes it, `resume` reads it."""
    model: TMASS
    tokenizer: object
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: dict               # the settings that are saved
    splits: dict               # split -> checksum of its annotations
    step: int = 0              # steps done
    total: int = 0             # steps of the whole run
    saved: int = 0             # step of the last checkpoint
    best: list = None          # [step, t2v R@1] of the best validation
    best_weights: dict = None
    bad_videos: list = field(default_factory=list)  # a line per video that was left out


def beside(out, ending):
    """NAME.pt -> NAME with another ending."""
    return os.path.splitext(out)[0] + ending


# ---- the checkpoint ----


def save(out, job, run, finished=False):
    """Write --out: what `resume` needs, and the result. Called in all processes; process 0 writes.

    The result is the best epoch on the validation split or, without one, the latest weights.
    """
    run.bad_videos = job.join(run.bad_videos)
    run.saved = run.step
    if job.rank > 0:
        return
    content = dict(
        step=run.step,
        total=run.total,
        best=run.best,
        bad_videos=run.bad_videos,
        finished=finished,
        splits=run.splits,
    )
    if not finished:
        content["optimizer"] = run.optimizer.state_dict()
        content["scaler"] = run.scaler.state_dict()
        if run.best_weights:  # the result is an earlier epoch's: training goes on from these
            content["training"] = dict(model=run.model.state_dict())
    save_checkpoint(out, run.model, run.tokenizer, run.config, weights=run.best_weights, **content)


def list_bad(out, job, run):
    """Write NAME.bad.txt: what --skip-bad left out, one video per line."""
    lines = job.join(run.bad_videos)
    if lines and job.rank == 0:
        path = beside(out, ".bad.txt")
        text = "".join(f"{line}\n" for line in lines)
        write_whole(path, text.encode(errors="surrogateescape"))
        print(f"--skip-bad: {len(lines)} videos left out, listed in {path}")


def resume(out, run, saved):
    """Go on exactly from what `save` wrote. run: with the weights to go on from."""
    with usable(out):
        if "training" in saved:
            run.best_weights = saved["model"]
        # The learning rates come from the settings.
        groups = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict(dict(saved["optimizer"], param_groups=groups))
        for p, moments in run.optimizer.state.items():  # load_state_dict compares nothing
            if not p.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:
                raise ValueError("its optimizer belongs to other weights")
        run.scaler.load_state_dict(saved.get("scaler", {}))
        run.step = int(saved["step"])
        run.saved = run.step
        if saved["best"]:
            step, R1 = saved["best"]
            run.best = [int(step), float(R1)]
        run.bad_videos = list(map(str, saved["bad_videos"]))
        splits = dict(saved.get("splits", {}))  # old checkpoints have none
    for split, before in splits.items():
        if run.splits.get(split) != before:
            raise DataError(f"{out} was trained with another {split} split than this: --resume "
                            "needs its data, wherever it is now (--data, --root, --videos), and "
                            "with --skip-bad the same videos missing")


# ---- the log ----


class Log:
    """NAME.log.csv, one row per logged step; a line is printed for each. Only process 0 writes.

    The file is locked while the run lasts, so that no other run writes the same checkpoint.
    """
    TERMS = ("loss", "stochastic", "support", "ce")
    FIELDS = ("step", "epoch", *TERMS, "head_lr", "clip_lr", "scale", "grad_norm", "pairs_per_s",
              "val_R1")
    ROW = r"(step|\d+)(,[^,\n]*){11}\n"  # a killed run may have left part of one

    def __init__(self, out, job):
        self.job = job
        self.path = os.devnull if job.rank else beside(out, ".log.csv")
        self.board = None
        try:
            os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
            # Line buffering: the file can be followed while training runs.
            self.file = open(self.path, "a+", buffering=1, newline="", errors="replace")
        except OSError as error:
            raise DataError(f"--out {out} cannot be written: {error.strerror}; choose another "
                            "--out") from None
        try:
            import fcntl
            if job.rank == 0:
                # Not flock, which workers would inherit and keep when this process dies.
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise DataError(f"another run writes {out}: choose another --out") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        self.file.seek(0)
        self.had_rows = len(self.file.readlines()) > 1

    def close(self):
        """Unlock the file; remove it if the run ended before its first step."""
        self.file.close()
        if self.job.rank == 0 and not os.path.getsize(self.path):
            os.unlink(self.path)

    def begin(self, start, batches, args):
        """Keep the rows up to the step that the run starts from."""
        self.batches = batches
        self.args = args
        end = 0
        self.file.seek(0)
        for line in iter(self.file.readline, ""):
            row = re.fullmatch(self.ROW, line)
            if not row or row[1] != "step" and int(row[1]) > start:
                break
            end = self.file.tell()
        if self.job.rank == 0:
            self.file.truncate(end)
        self.file.seek(0, os.SEEK_END)
        self.writer = csv.DictWriter(self.file, self.FIELDS, extrasaction="ignore")
        if args.tensorboard and self.job.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise DataError("--tensorboard needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(args.tensorboard, purge_step=start + 1)
        self.done = start
        self.since = time.monotonic()

    def step(self, done, values, factor):
        """Print a line and write a row. values: name -> tensor (). This waits for the device."""
        args = self.args
        # One copy from the device, not one for each number.
        numbers = torch.stack(list(values.values())).tolist()
        speed = (done - self.done) * args.batch / (time.monotonic() - self.since)
        row = dict(
            zip(values, numbers),
            epoch=(done - 1) // self.batches.per_epoch + 1,
            head_lr=args.head_lr * factor,
            clip_lr=args.clip_lr * factor,
            pairs_per_s=speed,
        )
        terms = "  ".join(f"{name} {row[name]:.3f}" for name in self.TERMS)
        left = clock((self.batches.total - done) * args.batch / speed)
        self.job.say(f"step {done:5d}/{self.batches.total}  epoch {row['epoch']}/{args.epochs}  "
                     f"{terms}  lr {row['head_lr']:.1e}/{row['clip_lr']:.1e}  "
                     f"{speed:.1f} pairs/s  {left} left")
        self.row(done, **row)

    def row(self, step, **values):
        """Write a row. values: those of FIELDS that are known."""
        if not self.file.tell():
            self.writer.writeheader()
        row = {name: f"{value:.6g}" for name, value in values.items()}
        self.writer.writerow(dict(row, step=step))
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        self.done = step
        self.since = time.monotonic()
