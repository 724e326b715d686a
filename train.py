"""Train T-MASS.

    python train.py                                        # the embedded data set, on a laptop CPU, in minutes
    python train.py --data msrvtt --clip ViT-B/32          # a benchmark, from OpenAI's CLIP
    python train.py --data my.csv --root videos/           # your own videos: columns video, caption[, split, start, end]
    torchrun --nproc_per_node 8 train.py --data msrvtt     # several GPUs: the batch is the global one, whatever their number

Data order, augmentation, noise and learning rate are pure functions of (seed, step), so resuming needs the step number and nothing else.
"""
import argparse
import csv
import functools
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
from clip_model import CLIP, Tokenizer, WeightsError, load_clip, load_vocabulary, read_weights
from eval import evaluate, format_metrics, run, start_processes
from shapes import render_shapes, shapes_pictures
from tmass import POOLINGS, PRIORS, RADII, SUPPORTS, TMASS, load_checkpoint, save_checkpoint, symmetric_cross_entropy

# Defaults per data set: msrvtt, lsmdc and didemo are the released commands; no command was released for the others, which
# are ours (msrvtt-7k and msvd: X-Pool's rates and dropout). Every value can be overridden on the command line.
BASE = dict(clip="ViT-B/32", frames=12, batch=32, epochs=5, head_lr=1e-5, clip_lr=1e-6, weight_decay=0.2, warmup=0.1, pretrain=0,
            pooling="xpool", heads=1, dropout=0.3, radius="linear", prior="normal", prior_std=1.0, support_weight=0.8,
            support_video="matched", ce_weight=0.0, augment="crop-flip")
RELEASED = ("msrvtt", "lsmdc", "didemo")
RECIPES = {
    "shapes": dict(clip="tiny", frames=6, batch=64, epochs=3, head_lr=1e-3, clip_lr=5e-4, pretrain=300, dropout=0.1, prior_std=0.1,
                   augment="none"),  # captions say what is on the left and what on the right
    "msrvtt": dict(head_lr=3e-5, prior="uniform", support_video="batch"),
    "msrvtt-7k": dict(dropout=0.4, prior="uniform", support_video="batch"),
    "lsmdc": dict(prior_std=0.003, support_weight=0.0),
    "didemo": dict(dropout=0.4, prior="uniform", support_weight=0.0),
    "msvd": dict(dropout=0.4),
    "vatex": {}, "charades": {}, "csv": {},
}
TINY = dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=3, context_length=48, text_width=128, text_layers=2)
# Free to change on --resume, because the result stays the same.
RUN_ONLY = ("out", "resume", "workers", "device", "save_every", "log_every", "cache", "skip_bad", "grad_checkpoint", "root")
# What TMASS is made with.
METHOD = ("frames", "pooling", "heads", "dropout", "radius", "prior", "prior_std", "support_weight", "ce_weight", "support_video")


def parse_args(argv=None):
    """Command line -> settings; what is not given comes from the data set's recipe, or on --resume from the checkpoint."""
    p = data.Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Defaults marked (recipe) depend on --data:\n  all: " + ", ".join(f"{k}={v}" for k, v in BASE.items())
                    + "".join(f"\n  {n}: " + (", ".join(f"{k}={v}" for k, v in r.items()) or "-") for n, r in RECIPES.items())
                    + f"\n{', '.join(RELEASED)}: as in the released commands. The others are ours: none was released for them; "
                    "msrvtt-7k and msvd\ntake X-Pool's learning rates and dropout.")
    g = p.add_argument_group("data")
    g.add_argument("--data", help=f"{', '.join(n for n in RECIPES if n != 'csv')}, or the path of a .csv (default: shapes)")
    g.add_argument("--root", help="folder of the data set (default: data/NAME; for a .csv, the folder it lies in)")
    g.add_argument("--val-videos", type=int, help="msrvtt, charades: hold this many training videos out to choose the checkpoint "
                                                  "(default: 0, the last epoch is the result)")
    g.add_argument("--skip-bad", action="store_true",
                   help="leave out videos that are missing or can't be decoded, and count them (default: stop and name them)")
    g.add_argument("--cache", metavar="DIR",
                   help="keep every video's sampled frames there as JPEG, so that each video is decoded once; advised for real data "
                        "(default: none; shapes: frames/ beside its videos)")
    g.add_argument("--augment", choices=("crop-flip", "none"), help="of training videos: one random crop and flip per video (recipe)")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode videos (default: %(default)s)")
    g = p.add_argument_group("model (recipe)")
    g.add_argument("--clip", help="ViT-B/32, ViT-B/16, ViT-L/14 (downloaded on first use), a weights file, or tiny (from scratch)")
    g.add_argument("--init", metavar="CKPT", help="start from a whole checkpoint: ours, released T-MASS or X-Pool")
    g.add_argument("--frames", type=int, help="T, frames sampled per video")
    g.add_argument("--pooling", choices=POOLINGS, help="how frames become a video: for each text (xpool), or their mean")
    g.add_argument("--heads", type=int, help="attention heads of xpool")
    g.add_argument("--dropout", type=float, help="in xpool")
    g.add_argument("--radius", choices=RADII, help="of the text mass; none is the X-Pool baseline")
    g.add_argument("--prior", choices=PRIORS, help="distribution of the noise")
    g.add_argument("--prior-std", type=float, help="standard deviation of the normal prior; N(0,1) is larger than |t| itself for CLIP")
    g.add_argument("--support-weight", type=float, help="weight of the support text's loss")
    g.add_argument("--support-video", choices=SUPPORTS,
                   help="where the support text looks: at its own pooled video, or the batch's mean as released")
    g.add_argument("--ce-weight", type=float, help="weight of the point text's loss")
    g = p.add_argument_group("optimisation (recipe)")
    g.add_argument("--epochs", type=int, help="passes over all (caption, video) pairs; 0 writes the starting point")
    g.add_argument("--batch", type=int, help="pairs per step over all processes; each pair is contrasted with all of them")
    g.add_argument("--head-lr", type=float, help="peak learning rate of pooling and radius")
    g.add_argument("--clip-lr", type=float, help="peak learning rate of CLIP")
    g.add_argument("--weight-decay", type=float, help="of AdamW")
    g.add_argument("--warmup", type=float, help="share of the steps with a rising learning rate; cosine to 0 after")
    g.add_argument("--pretrain", type=int, metavar="STEPS", help="shapes: image-text steps of the tiny CLIP on single pictures first, "
                                                                 "as real runs start from a pretrained CLIP")
    g.add_argument("--seed", type=int, help="of everything random (default: 24)")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="model.pt", help="the checkpoint; log.csv is written beside it (default: %(default)s)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, exactly (if there is none, start it)")
    g.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="also save within an epoch (default: %(default)s)")
    g.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="(default: %(default)s)")
    g.add_argument("--amp", choices=("off", "bf16"),
                   help="bf16: towers in bfloat16, losses in float32; faster and smaller on recent GPUs and CPUs (default: off)")
    g.add_argument("--grad-checkpoint", action="store_true",
                   help="recompute the towers in the backward pass: much less memory, about a third slower")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    args = p.parse_args(argv)
    given = {k for k, v in vars(args).items() if v is not None}
    saved = _resumed(args, given)
    name = _fill_in(args, given)
    for bad, message in _mistakes(args, name):
        if bad:
            p.error(message)
    return args, saved


def _resumed(args, given):
    """With --resume and a checkpoint in --out: its content, and its settings into args. An unfinished run there is never overwritten."""
    saved = read_weights(args.out) if os.path.isfile(args.out) else None
    if saved is None or not args.resume and saved.get("finished", True):
        return None
    if saved.get("format") != "tmass":
        raise WeightsError(f"{args.out} is not a checkpoint of ours: choose another --out")
    if not args.resume:
        raise WeightsError(f"{args.out} holds an unfinished run at step {saved['step']}: continue it with --resume, or delete it, "
                           "or choose another --out")
    for k in given - set(RUN_ONLY):
        then, now = saved["config"].get(k), getattr(args, k)
        if now != then and not (k == "data" and os.path.abspath(now) == then):
            raise WeightsError(f"--{k.replace('_', '-')} {now} differs from {then} in {args.out}: drop it to resume, or start anew "
                               "with another --out")
    for k, v in saved["config"].items():
        if k not in RUN_ONLY or getattr(args, k, None) is None:
            setattr(args, k, v)
    return saved


def _fill_in(args, given):
    """What is not given, from the data set's recipe. -> its name in RECIPES."""
    args.data = args.data or "shapes"
    name = "csv" if args.data.endswith(".csv") else args.data
    if name not in RECIPES:
        raise data.DataError(f"unknown data set {args.data!r}: choose {', '.join(n for n in RECIPES if n != 'csv')}, "
                             "or give the path of a .csv file")
    for k, v in {**BASE, **RECIPES[name], "val_videos": 0, "seed": 24, "amp": "off"}.items():
        if getattr(args, k) is None:
            setattr(args, k, v)
    if args.radius == "none" and "support_weight" not in given:
        args.support_weight = 0.0  # a mass of no size has no support text: this is X-Pool
    if name == "csv":
        args.data = os.path.abspath(args.data)
    if args.root:
        args.root = os.path.abspath(args.root)
    if name == "shapes" and args.cache is None:
        args.cache = os.path.abspath(os.path.join(args.root or os.path.join("data", "shapes"), "frames"))
    return name


def _mistakes(args, name):
    world = int(os.environ.get("WORLD_SIZE", 1))
    return (
        (args.batch < 2, f"--batch {args.batch}: a contrast needs at least 2 pairs"),
        (args.batch % world, f"--batch {args.batch} is the global batch and must be a multiple of the {world} processes"),
        (args.frames < 1, f"--frames {args.frames}: at least 1"),
        (args.epochs < 0, f"--epochs {args.epochs}: at least 0"),
        (not 0 <= args.dropout < 1, f"--dropout {args.dropout}: from 0 to below 1"),
        (not 0 <= args.warmup <= 1, f"--warmup {args.warmup}: a share from 0 to 1"),
        (not 0 <= args.prior_std < math.inf, f"--prior-std {args.prior_std}: at least 0"),
        (args.workers < 0, f"--workers {args.workers}: at least 0"),
        (args.save_every < 1 or args.log_every < 1, "--save-every and --log-every: at least 1"),
        (args.val_videos < 0, f"--val-videos {args.val_videos}: at least 0"),
        (args.pretrain and name != "shapes", "--pretrain makes its pictures with --data shapes only; give --clip weights for other data"))


# ---- pure functions of the step ----

def learning_rate(step, total, warmup):
    """Linear warm-up over the first share of steps, then cosine to 0; a factor of each group's peak. step from 0 -> (0, 1]."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2


def generator(device, *numbers):
    """A generator seeded by a tuple such as (seed, step)."""
    mixed = 0
    for n in numbers:
        mixed = (mixed * 1_000_003 + n + 1) % (2 ** 63 - 1)
    return torch.Generator(device).manual_seed(mixed)


class Batches:
    """Every step's share of the global batch for one process, from `start` on: lists of (epoch, pair).

    An epoch's last, incomplete batch is dropped.
    """

    def __init__(self, pairs, batch, epochs, seed, start=0, rank=0, world=1):
        self.pairs, self.batch, self.seed, self.start, self.rank, self.world = pairs, batch, seed, start, rank, world
        self.per_epoch = pairs // batch
        self.total = self.per_epoch * epochs

    def __len__(self):
        return self.total - self.start

    def __iter__(self):
        share = self.batch // self.world
        for step in range(self.start, self.total):
            epoch, k = divmod(step, self.per_epoch)
            if k == 0 or step == self.start:
                order = torch.randperm(self.pairs, generator=generator("cpu", self.seed, epoch)).tolist()
            first = k * self.batch + self.rank * share
            yield [(epoch, i) for i in order[first:first + share]]


class Collate:
    """Pairs -> (ids (B,L), video uint8 (B,T,3,R,R), the DataErrors of pairs that can't be read)."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items):
        bad = [x for x in items if isinstance(x, Exception)]
        good = [x for x in items if not isinstance(x, Exception)]
        if not good:
            return None, None, bad
        return self.tokenizer([caption for _, caption, _ in good]), torch.stack([frames for frames, _, _ in good]), bad


# ---- several processes ----

class Gather(torch.autograd.Function):
    """Join the rows of all processes, with gradient: (n,...) on each -> (Σ n,...) on all, in rank order.

    Every process computes the same global loss, hence the same gradient of the joined rows: each keeps that of its own rows, times the
    number of processes because DistributedDataParallel averages. The result is exactly one process' gradient.
    """

    @staticmethod
    def forward(ctx, x):
        counts = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor(len(x), device=x.device))  # counts differ where --skip-bad left pairs out
        counts = [int(n) for n in counts]
        ctx.rows = slice(sum(counts[:dist.get_rank()]), sum(counts[:dist.get_rank() + 1]))
        padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.rows] * dist.get_world_size()


# ---- what is trained ----

def build(args, captions):
    """The model to start from and its tokenizer, as --clip and --init say."""
    torch.manual_seed(args.seed)
    method = {k: getattr(args, k) for k in METHOD}
    if args.init:
        start, tokenizer, _ = load_checkpoint(args.init)
        model = TMASS(start.clip, **method)
        state, own = start.state_dict(), model.state_dict()
        odd = sorted(k for k in state.keys() ^ own.keys() if not k.startswith("radius."))
        odd += [k for k in own if k in state and state[k].shape != own[k].shape]
        if odd:
            raise WeightsError(f"--init {args.init} does not fit the model asked for: {', '.join(odd[:5])}; "
                               "give the same --pooling and --frames")
        new = [k for k in own if k not in state]
        print(f"init: {args.init}" + (f"; starting anew: {', '.join(new)}" if new else ""))
        model.load_state_dict({**own, **{k: x for k, x in state.items() if k in own}})
        return model, tokenizer
    if args.clip == "tiny":
        tokenizer = Tokenizer.learn(captions, 600)
        tokenizer.context_length = TINY["context_length"]
        return TMASS(CLIP(vocab_size=tokenizer.vocab_size, **TINY), **method), tokenizer
    clip = load_clip(args.clip)
    ours = read_weights(args.clip) if os.path.isfile(args.clip) else {}
    tokenizer = Tokenizer(ours["merges"], ours["context_length"]) if ours.get("format") == "tmass" else load_vocabulary()
    return TMASS(clip, **method), tokenizer


def restore(saved):
    """The model and tokenizer of an interrupted run."""
    model = TMASS(CLIP(**saved["clip"]), **saved["tmass"])
    model.load_state_dict(saved.get("training", saved)["model"])
    return model, Tokenizer(saved["merges"], saved["context_length"])


def make_optimizer(model, args):
    """AdamW with one group for CLIP and one for what T-MASS adds; `peak` is a group's highest learning rate."""
    head = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    groups = [dict(params=list(model.clip.parameters()), peak=args.clip_lr), dict(params=head, peak=args.head_lr)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0, eps=1e-6, weight_decay=args.weight_decay, fused=True)


def pretrain(clip, tokenizer, args, job):
    """Image-text warm-up of the tiny CLIP on single pictures, fresh at every step: what a pretrained CLIP is to a real run."""
    optimizer = torch.optim.AdamW(clip.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    started = time.time()
    for step in range(args.pretrain):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate(step, args.pretrain, args.warmup)
        pictures, phrases = shapes_pictures(128, generator("cpu", args.seed, step), clip.config["image_size"])
        with torch.autocast(job.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            t, v = clip.encode_text(tokenizer(phrases).to(job.device)), clip.encode_image(pictures.to(job.device))
        loss = symmetric_cross_entropy(F.normalize(t.float(), dim=-1) @ F.normalize(v.float(), dim=-1).T, clip.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % args.log_every == 0 or step + 1 == args.pretrain:
            left = (time.time() - started) / (step + 1) * (args.pretrain - step - 1)
            job.say(f"pretrain {step + 1:5d}/{args.pretrain}  loss {loss.item():.3f}  {clock(left)} left")


def clock(seconds):
    """Seconds -> h:mm:ss or m:ss."""
    m, s = divmod(int(seconds + 0.5), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def check_writable(path):
    """Fail before training, not after it."""
    if os.path.isdir(path):
        raise WeightsError(f"--out {path} is a folder: give the name of a file, such as {os.path.join(path, 'model.pt')}")
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path + ".part", "wb"):
            pass
        os.unlink(path + ".part")
    except OSError as e:
        raise WeightsError(f"--out {path} cannot be written: {e.strerror}; choose another --out") from e


class Log:
    """log.csv beside the checkpoint: one row per logged step. Resuming drops the rows after the step it starts from."""
    FIELDS = ("step", "epoch", "loss", "stochastic", "support", "ce", "head_lr", "clip_lr", "scale", "grad_norm", "pairs_per_s", "val_R1")

    def __init__(self, out, start):
        path = os.path.join(os.path.dirname(os.path.abspath(out)), "log.csv")
        rows = []
        if start and os.path.isfile(path):
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= start]
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, self.FIELDS, restval="", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(rows)

    def step(self, done, args, batches, out, factor, scale, norm, speed):
        """After `done` steps: a line on the screen and a row. speed in pairs/s."""
        terms, epoch = {k: out[k].item() for k in ("loss", "stochastic", "support", "ce")}, (done - 1) // batches.per_epoch + 1
        head_lr, clip_lr = args.head_lr * factor, args.clip_lr * factor
        print(f"step {done:5d}/{batches.total}  epoch {epoch}/{args.epochs}  " + "  ".join(f"{k} {x:.3f}" for k, x in terms.items())
              + f"  lr {head_lr:.1e}/{clip_lr:.1e}  {speed:.0f} pairs/s  "
              f"{clock((batches.total - done) * args.batch / speed)} left", flush=True)
        self.row(step=done, epoch=epoch, head_lr=head_lr, clip_lr=clip_lr, scale=scale, grad_norm=norm, pairs_per_s=speed, **terms)

    def row(self, **values):
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self.file.flush()


class Checkpoint:
    """One file: the result (the best epoch on the validation split, or the latest weights) and, until finished, all that resuming needs."""

    def __init__(self, args, model, tokenizer, optimizer, saved, job):
        self.out, self.model, self.tokenizer, self.optimizer, self.job = args.out, model, tokenizer, optimizer, job
        self.config = {k: v for k, v in vars(args).items() if k != "resume"}
        self.step, self.best, self.bad_videos, self.best_weights = 0, None, [], None
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
            self.step, self.best, self.bad_videos = saved["step"], saved["best"], saved["bad_videos"]
            if "training" in saved:
                self.best_weights = saved["model"]

    def validated(self, step, R1):
        """Keep the weights if they are the best so far. R1 in percent."""
        if self.best is None or R1 > self.best[1]:
            self.best, self.best_weights = [step, R1], {k: x.detach().to("cpu", copy=True) for k, x in self.model.state_dict().items()}

    def save(self, step, finished=False):
        """For all processes to call; process 0 writes. Once finished, the model holds the result."""
        self.step, self.bad_videos = step, self.job.join(self.bad_videos)
        state = dict(step=step, best=self.best, bad_videos=self.bad_videos, finished=finished)
        if not finished:
            state["optimizer"] = self.optimizer.state_dict()
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
            with open(path, "w") as file:
                file.writelines(line + "\n" for line in lines)
            print(f"--skip-bad: {len(lines)} videos left out, listed in {path}")


class Signals:
    """SIGINT and SIGTERM are noted while this is open, and looked at after each step; asked twice, it ends at once."""

    def __enter__(self):
        self.noted = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        if number in self.noted:
            raise KeyboardInterrupt
        self.noted.append(number)

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- the run ----

def main(argv=None):
    args, saved = parse_args(argv)
    job = start_processes(args.device)
    if job.rank == 0:
        check_writable(args.out)
    if saved and saved.get("finished"):
        job.say(f"{args.out} is finished (step {saved['step']}): nothing to resume. Evaluate it: python eval.py --ckpt {args.out}")
        return 0
    splits, missing = load_splits(args, job)
    with job.first_alone():
        model, tokenizer = restore(saved) if saved else build(args, splits["train"].captions)
    model.to(job.device)
    model.clip.grad_checkpoint = args.grad_checkpoint
    optimizer = make_optimizer(model, args)
    checkpoint = Checkpoint(args, model, tokenizer, optimizer, saved, job)
    resumed, saved = saved is not None, None  # all of it has been copied: let the memory go
    batches = Batches(len(splits["train"].captions), args.batch, args.epochs, args.seed, checkpoint.step, job.rank, job.world)
    announce(args, splits, missing, optimizer, batches, job)
    if args.pretrain and not resumed:
        pretrain(model.clip, tokenizer, args, job)
    checkpoint.save(checkpoint.step)

    test_on = functools.partial(evaluate, model, tokenizer, job=job, workers=args.workers, skip_bad=args.skip_bad,
                                cache=args.cache)
    with Signals() as signals:
        stopped = fit(args, splits, model, tokenizer, optimizer, batches, checkpoint, test_on, signals, job)
        if not stopped:
            checkpoint.save(batches.total, finished=True)
    checkpoint.list_bad(missing)
    if stopped:
        job.say(f"stopped by {signal.Signals(stopped).name} after step {checkpoint.step}; continue with: {resume_command()}")
        return 128 + stopped
    if checkpoint.best:
        job.say(f"the result is that of step {checkpoint.best[0]}, the best on the validation split")
    if splits["test"].clips:
        job.say(f"test: {format_metrics(test_on(splits['test']))}")
    job.say(f"checkpoint: {args.out}   evaluate it again: python eval.py --ckpt {args.out}")
    return 0


def fit(args, splits, model, tokenizer, optimizer, batches, checkpoint, test_on, signals, job):
    """The training loop. -> 0 at its end, or the signal that ended it before, after saving."""
    log = Log(args.out, batches.start) if job.rank == 0 else None
    transform = data.test_transform if args.augment == "none" else data.train_transform
    dataset = data.PairDataset(splits["train"], args.frames, transform(model.clip.config["image_size"]), seed=args.seed,
                               cache=data.FrameCache(args.cache, args.frames) if args.cache else None)
    ddp = DistributedDataParallel(model, device_ids=[job.device.index] if job.device.type == "cuda" else None) if job.world > 1 else model
    gather = Gather.apply if job.world > 1 else None
    skipped_in_a_row, skipped, seen, started = 0, 0, 0, time.time()
    model.train()
    with data.loading(dataset, batches, Collate(tokenizer), args.workers, pin=job.device.type == "cuda") as loader:
        for step, (ids, video, bad) in enumerate(loader, batches.start):
            factor = learning_rate(step, batches.total, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            note_bad(bad, ids, args.skip_bad, checkpoint.bad_videos)
            with torch.autocast(job.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                out = ddp(ids.to(job.device, non_blocking=True), video.to(job.device, non_blocking=True),
                          generator(job.device, args.seed, step), gather)
            optimizer.zero_grad()
            out["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if torch.isfinite(out["loss"] + norm):
                optimizer.step()
                with torch.no_grad():
                    model.clip.logit_scale.clamp_(max=math.log(100))
                skipped_in_a_row = 0
            else:
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
                job.say(f"step {step + 1}: loss or gradient is not finite; step skipped ({skipped} so far)")
                if skipped_in_a_row == 10:
                    raise WeightsError(f"10 steps in a row were not finite, up to step {step + 1} (lr {args.head_lr * factor:.2e} and "
                                       f"{args.clip_lr * factor:.2e}, logit scale {model.clip.logit_scale.exp().item():.1f}): "
                                       f"{args.out} keeps the last good state; lower the rates")

            done, seen, end_of_epoch = step + 1, seen + args.batch, (step + 1) % batches.per_epoch == 0
            if log and (done % args.log_every == 0 or end_of_epoch):
                log.step(done, args, batches, out, factor, model.clip.logit_scale.exp().item(), norm.item(), seen / (time.time() - started))
            if end_of_epoch and splits["val"].clips:
                paused = time.time()
                val = test_on(splits["val"])
                model.train()
                started += time.time() - paused
                job.say(f"validation after epoch {done // batches.per_epoch}: {format_metrics(val)}")
                checkpoint.validated(done, val["t2v"]["R1"])
                if log:
                    log.row(step=done, epoch=done // batches.per_epoch, val_R1=val["t2v"]["R1"])
            stopping = job.largest(max(signals.noted, default=0))
            if (done % args.save_every == 0 or end_of_epoch or stopping) and not skipped_in_a_row:
                checkpoint.save(done)
            if stopping:
                return stopping
    return 0


def load_splits(args, job):
    """-> ({train, val, test: Annotations}, the messages of missing videos that --skip-bad left out)."""
    if args.data == "shapes":
        with job.first_alone():
            render_shapes(args.root or os.path.join("data", "shapes"))  # on first use
    splits, missing = {}, []
    for split in ("train", "val", "test"):
        splits[split], gone = data.present(data.load_split(args.data, args.root, split, args.val_videos, args.seed), args.skip_bad)
        missing += gone
    if len(splits["train"].captions) < args.batch:
        raise data.DataError(f"{args.data} has {len(splits['train'].captions)} training pairs, fewer than one batch of {args.batch}: "
                             "give a smaller --batch")
    return splits, missing


def announce(args, splits, missing, optimizer, batches, job):
    """The resolved truth, at the start."""
    job.say("settings: " + ", ".join(f"{k}={v}" for k, v in sorted(vars(args).items()) if k != "resume"))
    for split, ann in splits.items():
        job.say(f"{split:5s} {len(ann.captions)} texts, {len(ann.clips)} videos")
    if missing:
        job.say(f"--skip-bad: {len(missing)} missing videos left out")
    job.say("parameters: " + ", ".join(f"{name} {sum(p.numel() for p in group['params']):,} (lr {group['peak']:g})"
                                       for name, group in zip(("CLIP", "head"), optimizer.param_groups)))
    job.say(f"{batches.total} steps of {args.batch} pairs ({args.batch // job.world} on each of {job.world} processes) on {job.device}, "
            + ("bf16 towers" if args.amp == "bf16" else "float32"))
    if not splits["val"].clips:
        hint = "; --val-videos 500 would hold some out of train" if args.data in ("msrvtt", "msrvtt-7k", "charades") else ""
        job.say("no validation split: the last epoch is the result" + hint)


def note_bad(bad, ids, skip, noted):
    """Of the batch's pairs that can't be read: stop at the first, or with --skip-bad note them, unless nothing is left."""
    if bad and not skip:
        raise bad[0]
    noted += [str(e) for e in bad if str(e) not in noted]
    if ids is None:
        raise data.DataError(f"no video of a whole batch can be read; the first: {bad[0]}")


def resume_command():
    """What the user typed, with --resume."""
    return " ".join(["python", *sys.argv] + ([] if "--resume" in sys.argv else ["--resume"]))


def main_of_a_run():
    """`main`, whose failures tell how to go on."""
    try:
        return main()
    except OSError as e:  # a full disk under log.csv, for one
        raise data.DataError(f"{e}; the last checkpoint is intact: {resume_command()}") from e
    except RuntimeError as e:
        if not dist.is_initialized() or "peer" not in str(e).lower():
            raise
        print(f"error: another process of this job died ({str(e).splitlines()[0][:200]}); the last checkpoint is intact: "
              f"{resume_command()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run(main_of_a_run))
