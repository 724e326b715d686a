"""What a training run keeps: its lock, what may be resumed or replaced, its log, its checkpoint."""
import contextlib
import csv
import os
import stat

from clip_model import WeightsError
from lib.common import clock, write_text
from lib.weights import read_weights, save_checkpoint

START_ONLY = ("resume", "overwrite")  # settings of this start alone


@contextlib.contextmanager
def only_run(out):
    """One run at a time writes --out: a lock beside it, which dies with the process."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        lock = open(out + ".lock", "a+")
    except OSError as e:
        raise WeightsError(f"--out {out} cannot be written: {e.strerror}; choose another --out") from None
    with lock, contextlib.ExitStack() as end:
        try:
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise WeightsError(f"{out} is being written by process {lock.read()}: choose another --out") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        lock.truncate(0)
        print(os.getpid(), end="", file=lock, flush=True)
        end.callback(os.unlink, lock.name)
        yield


def earlier_run(args):
    """What --resume wants of --out. Only a run without a step, or with --overwrite a finished one, may go."""
    out, old = args.out, {}
    if os.path.realpath(out) in [os.path.realpath(path) for path in (args.clip, args.init) if path]:
        raise WeightsError(f"--out {out} is what --clip or --init starts from: choose another --out")
    if not os.path.lexists(out):
        for path in (os.path.splitext(out)[0] + ending for ending in (".log.csv", ".bad.txt")):
            if os.path.lexists(path):
                raise WeightsError(f"{path} is of another run, whose {out} is gone: move it, or choose another --out")
        return None
    if not stat.S_ISREG(os.lstat(out).st_mode):
        raise WeightsError(f"--out {out} is a folder, a link or a device: give the name of a plain file, new or old")
    with contextlib.suppress(WeightsError):
        old = read_weights(out)
    if old.get("format") != "tmass":
        raise WeightsError(f"--out {out} is not a checkpoint of ours, and stays as it is: choose another --out")
    if args.resume:
        return old
    if not old.get("finished", True) and old["step"]:
        raise WeightsError(f"{out} holds an unfinished run at step {old['step']}: --resume it, or choose another --out")
    if old.get("finished", True) and not args.overwrite:
        raise WeightsError(f"{out} holds a finished run: choose another --out, or replace it with --overwrite")
    return None


class Log:
    """NAME.log.csv: one row per logged step. Resuming drops the rows after the step it starts from."""
    TERMS = ("loss", "stochastic", "support", "ce")
    FIELDS = ("step", "epoch", *TERMS, "head_lr", "clip_lr", "scale", "grad_norm", "pairs_per_s", "val_R1")

    def __init__(self, out, start):
        path, rows = os.path.splitext(out)[0] + ".log.csv", []
        if start and os.path.isfile(path):
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= start]
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, self.FIELDS, restval="", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(rows)

    def step(self, done, args, batches, out, factor, speed, **more):
        """After `done` steps: a line on the screen and a row. speed in pairs/s."""
        row = dict(step=done, epoch=(done - 1) // batches.per_epoch + 1, **{k: out[k].item() for k in self.TERMS},
                   head_lr=args.head_lr * factor, clip_lr=args.clip_lr * factor, pairs_per_s=speed, **more)
        terms = "  ".join(f"{k} {row[k]:.3f}" for k in self.TERMS)
        left = clock((batches.total - done) * batches.batch / speed)
        print(f"step {done:5d}/{batches.total}  epoch {row['epoch']}/{args.epochs}  {terms}  lr {row['head_lr']:.1e}/"
              f"{row['clip_lr']:.1e}  {speed:.{0 if speed >= 10 else 2}f} pairs/s  {left} left", flush=True)
        self.row(**row)

    def row(self, **values):
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self.file.flush()


class Checkpoint:
    """One file: the result (the best epoch on the validation split, or the latest weights) and what resuming needs."""

    def __init__(self, args, model, tokenizer, optimizer, scaler, saved, job):
        self.out, self.model, self.tokenizer, self.optimizer, self.job = args.out, model, tokenizer, optimizer, job
        self.scaler, self.config = scaler, {k: v for k, v in vars(args).items() if k not in START_ONLY}
        self.step, self.best, self.bad_videos, self.best_weights = 0, None, [], None
        self.unsaved = None  # a step that may be saved at any time
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved.get("scaler", {}))
            self.step, self.best, self.bad_videos = saved["step"], saved["best"], saved["bad_videos"]
            if "training" in saved:
                self.best_weights = saved["model"]

    def validated(self, step, R1):
        """Keep the weights if they are the best so far. R1 in percent."""
        if self.best is None or R1 > self.best[1]:
            self.best = [step, R1]
            self.best_weights = {k: x.detach().to("cpu", copy=True) for k, x in self.model.state_dict().items()}

    def save(self, step, finished=False):
        """For all processes to call; process 0 writes. Once finished, the model holds the result."""
        self.step, self.bad_videos = step, self.job.join(self.bad_videos)
        state = dict(step=step, best=self.best, bad_videos=self.bad_videos, finished=finished)
        if not finished:
            state.update(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
            if self.best_weights is not None:
                state["training"] = dict(model=self.model.state_dict())
        if self.job.rank == 0:
            save_checkpoint(self.out, self.model, self.tokenizer, self.config, weights=self.best_weights, **state)
        if finished and self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)

    def list_bad(self, missing):
        """What --skip-bad left out, in a file beside the checkpoint."""
        lines = self.job.join(missing + self.bad_videos)
        if lines and self.job.rank == 0:
            path = os.path.splitext(self.out)[0] + ".bad.txt"
            write_text(path, "".join(line + "\n" for line in lines))
            print(f"--skip-bad: {len(lines)} videos left out, listed in {path}")
