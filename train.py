"""Train T-MASS.

    python train.py                                      # the embedded data set, on a laptop CPU, in minutes
    python train.py --data msrvtt --out msrvtt.pt        # a benchmark, from OpenAI's CLIP
    python train.py --data my.csv --out my.pt            # your own videos: columns video, caption[, split, start, end]
    torchrun --nproc_per_node 8 train.py --data msrvtt   # several GPUs: --batch is that of all of them together

Data order, augmentation, noise and learning rate are pure functions of (seed, step), so resuming needs the step.
"""
import contextlib
import functools
import math
import os
import shlex
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
from clip_model import CLIP, Tokenizer, WeightsError
from eval import evaluate, format_metrics
from lib.common import clock, numeric
from lib.processes import Stopped, noting_signals, process_died, run, start_processes
from lib.runs import START_ONLY, Checkpoint, Log, earlier_run, only_run
from lib.shapes import render_shapes, shapes_pictures
from lib.weights import load_checkpoint, load_strictly
from tmass import POOLINGS, PRIORS, RADII, SUPPORTS, TMASS, symmetric_cross_entropy

RECIPES_ARE = ("msrvtt, lsmdc and didemo are the released commands; none was released for the others, which are ours\n"
               "(msrvtt-7k and msvd with X-Pool's rates and dropout). Every value can be overridden.")
BASE = dict(clip="ViT-B/32", frames=12, batch=32, epochs=5, head_lr=1e-5, clip_lr=1e-6, weight_decay=0.2, warmup=0.1,
            pretrain=0, pooling="xpool", heads=1, dropout=0.3, radius="linear", prior="normal", prior_std=1.0,
            support_weight=0.8, support_video="matched", ce_weight=0.0, augment="crop-flip")
RECIPES = {
    "shapes": dict(clip="tiny", frames=6, batch=64, epochs=3, head_lr=1e-3, clip_lr=5e-4, pretrain=300, dropout=0.1,
                   prior_std=0.1, augment="none"),  # captions say what is on the left and what on the right
    "msrvtt": dict(head_lr=3e-5, prior="uniform", support_video="batch"),
    "msrvtt-7k": dict(dropout=0.4, prior="uniform", support_video="batch"),
    "lsmdc": dict(prior_std=0.003, support_weight=0.0),
    "didemo": dict(dropout=0.4, prior="uniform", support_weight=0.0),
    "msvd": dict(dropout=0.4),
    "vatex": {}, "charades": {}, "csv": {},
}
NAMES = [name for name in RECIPES if name != "csv"]
TINY = dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=3, context_length=48,
            text_width=128, text_layers=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Free to change on --resume, because the result stays the same.
RUN_ONLY = (*START_ONLY, "out", "workers", "device", "save_every", "log_every", "cache", "skip_bad", "grad_checkpoint",
            "root", "videos")
METHOD = ("frames", "pooling", "heads", "dropout", "radius", "prior", "prior_std", "support_weight", "ce_weight",
          "support_video")  # what TMASS is made with


def parser():
    recipes = [f"  {name}: {', '.join(f'{k}={v}' for k, v in recipe.items()) or '-'}"
               for name, recipe in {"all": BASE, **RECIPES}.items()]
    p = data.Parser(__doc__, epilog="\n".join(["Defaults marked (recipe) depend on --data:", *recipes, RECIPES_ARE]))
    whole, count, size = numeric(int, 0, 10 ** 6), numeric(int, 1), numeric(int, 1, 1000)
    share, rate, weight = numeric(float, 0, 1), numeric(float, 0, 10), numeric(float, 0, 1e6)
    g = p.add_argument_group("data")
    g.add_argument("--data", help=f"{', '.join(NAMES)}, or the path of a .csv (default: shapes)")
    g.add_argument("--root", help="folder of the data set (default: data/NAME; for a .csv, the folder it lies in)")
    g.add_argument("--videos", metavar="DIR", help="folder of the videos, where they lie apart from the annotations")
    g.add_argument("--val-videos", type=whole, help="msrvtt, charades: held out of train to choose the checkpoint (0)")
    g.add_argument("--skip-bad", action="store_true", help="leave out and list videos that are missing or broken")
    g.add_argument("--cache", metavar="DIR", help="keep frames there as JPEG, so that a video is decoded once; advised "
                                                  "(default: none; shapes: frames/ beside its videos)")
    g.add_argument("--augment", choices=("crop-flip", "none"), help="one random crop and flip per video (recipe)")
    g.add_argument("--workers", type=numeric(int, 0, 1000), default=min(8, os.cpu_count() or 1),
                   help="processes that decode videos (default: %(default)s)")
    g = p.add_argument_group("model (recipe)")
    g.add_argument("--clip", help="ViT-B/32, ViT-B/16, ViT-L/14 (downloaded on first use), a weights file, or tiny")
    g.add_argument("--activation", choices=("quickgelu", "gelu"), help="of --clip, where it is taken for the other")
    g.add_argument("--init", metavar="CKPT", help="start from a whole checkpoint: ours, released T-MASS or X-Pool")
    g.add_argument("--frames", type=size, help="T, frames sampled per video")
    g.add_argument("--pooling", choices=POOLINGS, help="how frames become a video, for each text or for all")
    g.add_argument("--heads", type=size, help="attention heads of xpool")
    g.add_argument("--dropout", type=numeric(float, 0, 0.99), help="in xpool")
    g.add_argument("--radius", choices=RADII, help="of the text mass; none is the X-Pool baseline")
    g.add_argument("--prior", choices=PRIORS, help="distribution of the noise")
    g.add_argument("--prior-std", type=weight, help="of the normal prior; N(0,1) is larger than |t| itself for CLIP")
    g.add_argument("--support-weight", type=weight, help="weight of the support text's loss")
    g.add_argument("--support-video", choices=SUPPORTS, help="what it looks at: its own, or the batch's mean")
    g.add_argument("--ce-weight", type=weight, help="weight of the point text's loss")
    g = p.add_argument_group("optimisation (recipe)")
    g.add_argument("--epochs", type=whole, help="passes over all (caption, video) pairs; 0 writes the starting point")
    g.add_argument("--batch", type=numeric(int, 2, 10 ** 6), help="pairs per step, over all processes")
    g.add_argument("--head-lr", type=rate, help="peak learning rate of pooling and radius")
    g.add_argument("--clip-lr", type=rate, help="peak learning rate of CLIP")
    g.add_argument("--weight-decay", type=rate, help="of AdamW")
    g.add_argument("--warmup", type=share, help="share of the steps with a rising learning rate; cosine to 0 after")
    g.add_argument("--pretrain", type=whole, metavar="STEPS", help="shapes: image-text steps of the tiny CLIP before")
    g.add_argument("--seed", type=numeric(int, 0, 2 ** 63 - 1), help="of everything random (default: 24)")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="model.pt", help="the checkpoint; its log is NAME.log.csv (default: %(default)s)")
    g.add_argument("--overwrite", action="store_true", help="replace a finished run in --out")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, exactly, or start it")
    g.add_argument("--save-every", type=count, default=500, metavar="STEPS", help="and each epoch (%(default)s)")
    g.add_argument("--log-every", type=count, default=20, metavar="STEPS", help="(default: %(default)s)")
    g.add_argument("--amp", choices=AMP, help="towers in bfloat16, or float16 with a scaled loss (T4, V100) (off)")
    g.add_argument("--grad-checkpoint", action="store_true", help="towers computed twice: less memory, a third slower")
    g.add_argument("--device", default=DEVICE, help="(default: %(default)s)")
    return p


# ---- settings, and the run that is there already ----

def settle(args, world=1):
    """What is not given, from the run to resume or else from the recipe. -> the checkpoint to resume, or None."""
    given = {k for k, v in vars(args).items() if v is not None}
    saved = earlier_run(args)
    config = saved["config"] if saved else {}
    for k in given & config.keys() - set(RUN_ONLY):
        then, now = config[k], getattr(args, k)
        if now != then and not (k == "data" and os.path.abspath(now) == then):
            raise WeightsError(f"--{k.replace('_', '-')} {now} differs from {then} in {args.out}: drop it to resume, "
                               "or start anew with another --out")
    args.data = config.get("data", args.data or "shapes")
    name = "csv" if args.data.endswith(".csv") else args.data
    if name not in RECIPES:
        raise data.DataError(f"unknown data set {name!r}: choose {', '.join(NAMES)}, or give the path of a .csv file")
    for k, v in {**BASE, **RECIPES[name], "val_videos": 0, "seed": 24, "amp": "off", **config}.items():
        if getattr(args, k, None) is None:
            setattr(args, k, v)
    if args.radius == "none" and not saved and "support_weight" not in given:
        args.support_weight = 0.0  # a mass of no size has no support text: this is X-Pool
    args.data = os.path.abspath(args.data) if name == "csv" else name
    folder = os.path.dirname(args.data) if name == "csv" else os.path.join("data", name.split("-")[0])
    args.root = os.path.abspath(args.root or folder)
    if name == "shapes" and args.cache is None:
        args.cache = os.path.join(args.root, "frames")
    args.cache, args.videos = (x and os.path.abspath(x) for x in (args.cache, args.videos))
    if args.batch % world:
        raise data.DataError(f"--batch {args.batch} is that of all {world} processes: give a multiple of {world}")
    if args.pretrain and name != "shapes":
        raise data.DataError("--pretrain has pictures for --data shapes only: give --clip weights for other data")
    if args.activation and args.clip == "tiny" and not args.init:
        raise data.DataError("--activation is that of weights which are loaded: give --clip or --init")
    return saved


# ---- pure functions of the step ----

def learning_rate(step, total, warmup):
    """Linear warm-up over a share of the steps, then cosine to 0: a factor of the peak. step from 0 -> (0, 1]."""
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
    """One process' share of each step's batch, from `start` on: lists of (epoch, pair); incomplete ones are dropped."""

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


def collate(tokenizer, items):
    """Pairs -> (ids (B,L), video uint8 (B,T,3,R,R), the DataErrors of pairs that can't be read)."""
    bad = [x for x in items if isinstance(x, Exception)]
    good = [x for x in items if not isinstance(x, Exception)]
    if not good:
        return None, None, bad
    return tokenizer([caption for _, caption, _ in good]), torch.stack([frames for frames, _, _ in good]), bad


class Gather(torch.autograd.Function):
    """Join the rows of all processes, with gradient: (n,...) on each -> (Σ n,...) on all, in rank order.

    Every process computes the same global loss, hence the same gradient of the joined rows: each keeps that of its own,
    times the number of processes because DistributedDataParallel averages. The result is exactly one process' gradient.
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

def build(args, captions, saved, job):
    """The model to start from and its tokenizer: of the run to resume, or as --clip and --init say."""
    if saved:
        model = TMASS(CLIP(**saved["clip"]), **saved["tmass"])
        model.load_state_dict(saved.get("training", saved)["model"])
        return model, Tokenizer(saved["merges"], saved["context_length"])
    torch.manual_seed(args.seed)
    method = {k: getattr(args, k) for k in METHOD}
    if args.clip == "tiny" and not args.init:
        tokenizer = Tokenizer.learn(captions, 600)
        tokenizer.context_length = TINY["context_length"]
        return TMASS(CLIP(vocab_size=tokenizer.vocab_size, **TINY), **method), tokenizer
    start, tokenizer, _ = load_checkpoint(args.init or args.clip, args.activation)
    model = TMASS(start.clip, **method)
    if args.init:
        own = model.state_dict()
        state = {k: x for k, x in start.state_dict().items() if k in own or not k.startswith("radius.")}
        new = [k for k in own if k not in state and k.startswith("radius.")]
        load_strictly(model, {**state, **{k: own[k] for k in new}}, "the model asked for with --pooling and --frames")
        job.say(f"init: {args.init}" + (f"; starting anew: {', '.join(new)}" if new else ""))
    return model, tokenizer


def make_optimizer(model, args):
    """AdamW with one group for CLIP and one for what T-MASS adds; `peak` is a group's highest learning rate."""
    head = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    groups = [dict(params=list(model.clip.parameters()), peak=args.clip_lr), dict(params=head, peak=args.head_lr)]
    return torch.optim.AdamW(groups, lr=0, eps=1e-6, weight_decay=args.weight_decay, fused=True)


def descend(loss, model, clip, optimizer, scaler):
    """One step down the gradient, cut to norm 1. -> (that norm, whether it and the loss were finite; else no step).

    With --amp fp16 the scaler multiplies the loss, and learns by how much, so that float16 gradients neither vanish nor
    overflow. All processes do the same: their gradients are averaged already.
    """
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    finite = bool(torch.isfinite(loss + norm))
    if finite:
        scaler.step(optimizer)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
    scaler.update()
    return norm.item(), finite


def pretrain(clip, tokenizer, args, scaler, job):
    """Image-text warm-up of the tiny CLIP on single pictures, new at every step: a real run's trained CLIP."""
    optimizer = torch.optim.AdamW(clip.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    started = time.time()
    for step in range(args.pretrain):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate(step, args.pretrain, args.warmup)
        pictures, phrases = shapes_pictures(128, generator("cpu", args.seed, step), clip.config["image_size"])
        with torch.autocast(job.device.type, AMP[args.amp], enabled=args.amp != "off"):
            t, v = clip.encode_text(tokenizer(phrases).to(job.device)), clip.encode_image(pictures.to(job.device))
        sims = F.normalize(t.float(), dim=-1) @ F.normalize(v.float(), dim=-1).T
        loss = symmetric_cross_entropy(sims, clip.logit_scale.exp())
        descend(loss, clip, clip, optimizer, scaler)
        if (step + 1) % args.log_every == 0 or step + 1 == args.pretrain:
            left = (time.time() - started) / (step + 1) * (args.pretrain - step - 1)
            job.say(f"pretrain {step + 1:5d}/{args.pretrain}  loss {loss.item():.3f}  {clock(left)} left")


# ---- what is kept ----

# ---- the run ----

def main(argv=None):
    args = parser().parse_args(argv)
    job = start_processes(args.device)
    try:
        with only_run(args.out) if job.rank == 0 else contextlib.nullcontext():
            return train(args, job)
    except (OSError, RuntimeError, WeightsError) as e:  # what ends a run from outside: a full disk, a process that died
        lost = process_died(e)
        if not (lost or isinstance(e, OSError) or isinstance(e, WeightsError) and e.__cause__):
            raise
        why = "another process of this job died" if lost else str(e).split("; ")[0]
        raise data.DataError(f"{why}; the last checkpoint, if any, is intact: go on with {go_on()}") from e


def train(args, job):
    saved = settle(args, job.world)
    if saved and saved.get("finished", True):
        job.say(f"{args.out} is finished (step {saved.get('step')}): nothing to resume. Test it: {evaluation(args)}")
        return 0
    splits, missing = load_splits(args, job)
    with job.first_alone():
        model, tokenizer = build(args, splits["train"].captions, saved, job)
    model.to(job.device)
    model.clip.grad_checkpoint = args.grad_checkpoint
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(job.device.type, enabled=args.amp == "fp16")
    checkpoint = Checkpoint(args, model, tokenizer, optimizer, scaler, saved, job)
    fresh, saved = saved is None, None  # all of it has been copied: let the memory go
    pairs = len(splits["train"].captions)
    batches = Batches(pairs, args.batch, args.epochs, args.seed, checkpoint.step, job.rank, job.world)
    announce(args, splits, missing, optimizer, batches, job)
    if fresh:
        pretrain(model.clip, tokenizer, args, scaler, job)
        checkpoint.save(0)

    test_on = functools.partial(evaluate, model, tokenizer, job=job, workers=args.workers, skip_bad=args.skip_bad,
                                cache=args.cache)
    with noting_signals() as noted:
        try:
            stopped = fit(args, splits, model, tokenizer, optimizer, scaler, batches, checkpoint, test_on, noted, job)
        except Stopped:  # no batch comes; to save, processes would have to meet
            stopped = noted[0]
            if job.world == 1 and checkpoint.unsaved:
                checkpoint.save(checkpoint.unsaved)
        except data.DataError:
            if not noted:
                raise
            stopped = noted[0]  # which a decoding process did not survive
        if not stopped:
            checkpoint.save(batches.total, finished=True)
    checkpoint.list_bad(missing)
    if stopped:
        job.say(f"stopped by {signal.Signals(stopped).name} after step {checkpoint.step}; continue with: {go_on()}")
        return 128 + stopped
    if checkpoint.best:
        job.say(f"the result is that of step {checkpoint.best[0]}, the best on the validation split")
    if splits["test"].segments:
        job.say(f"test: {format_metrics(test_on(splits['test']))}")
    job.say(f"checkpoint: {args.out}   evaluate it again: {evaluation(args)}")
    return 0


def fit(args, splits, model, tokenizer, optimizer, scaler, batches, checkpoint, test_on, noted, job):
    """The training loop. -> 0 at its end, or the signal that ended it before, after saving."""
    log = Log(args.out, batches.start) if job.rank == 0 else None
    transform = data.test_transform if args.augment == "none" else data.train_transform
    dataset = data.PairDataset(splits["train"], args.frames, transform(model.clip.config["image_size"]), seed=args.seed,
                               cache=data.FrameCache(args.cache, args.frames) if args.cache else None)
    gpu = job.device.type == "cuda"
    ddp = DistributedDataParallel(model, device_ids=[job.device.index] if gpu else None) if job.world > 1 else model
    gather = Gather.apply if job.world > 1 else None
    skipped, in_a_row, seen, started = 0, 0, 0, time.time()
    model.train()
    with data.loading(dataset, batches, functools.partial(collate, tokenizer), args.workers, pin=gpu) as loader:
        for step, (ids, video, bad) in enumerate(loader, batches.start):
            factor = learning_rate(step, batches.total, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            note_bad(bad, ids, args.skip_bad, checkpoint.bad_videos)
            ids, video = ids.to(job.device, non_blocking=True), video.to(job.device, non_blocking=True)
            with torch.autocast(job.device.type, AMP[args.amp], enabled=args.amp != "off"):
                out = ddp(ids, video, generator(job.device, args.seed, step), gather)
            norm, finite = descend(out["loss"], model, model.clip, optimizer, scaler)
            scale = model.clip.logit_scale.exp().item()
            if finite:
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + (scaler.get_scale() <= 1)  # above 1, fp16 seeks its scale
                job.say(f"step {step + 1}: loss or gradient is not finite; step skipped ({skipped} so far)")
                if in_a_row == 10:
                    raise WeightsError(f"10 steps in a row, to {step + 1}, were not finite (logit scale {scale:.1f}): "
                                       f"{args.out} keeps the last good state, step {checkpoint.step}; lower the rates")

            done, seen, end_of_epoch = step + 1, seen + args.batch, (step + 1) % batches.per_epoch == 0
            if log and (done % args.log_every == 0 or end_of_epoch):
                log.step(done, args, batches, out, factor, seen / (time.time() - started), scale=scale, grad_norm=norm)
            checkpoint.unsaved = None if end_of_epoch or in_a_row else done  # not before the validation's result
            if end_of_epoch and splits["val"].segments:
                paused, epoch = time.time(), done // batches.per_epoch
                val = test_on(splits["val"])
                job.say(f"validation after epoch {epoch}: {format_metrics(val)}")
                checkpoint.validated(done, val["t2v"]["R1"])
                if log:
                    log.row(step=done, epoch=epoch, val_R1=val["t2v"]["R1"])
                started += time.time() - paused
            stopping = job.largest(max(noted, default=0))
            if (done % args.save_every == 0 or end_of_epoch or stopping) and not in_a_row:
                checkpoint.save(done)
            if stopping:
                return stopping
    return 0


def load_splits(args, job):
    """-> ({train, val, test: Annotations}, the messages of missing videos that --skip-bad left out)."""
    if args.data == "shapes":
        with job.first_alone():
            render_shapes(args.root)  # on first use
    splits, missing = {}, []
    for split in ("train", "val", "test"):
        ann = data.load_split(args.data, args.root, split, args.val_videos, args.seed, args.videos)
        splits[split], gone = data.present(ann, args.skip_bad)
        missing += gone
    pairs = len(splits["train"].captions)
    if pairs < args.batch:
        raise data.DataError(f"{args.data}: {pairs} training pairs make no batch of {args.batch}: lower --batch")
    return splits, missing


def announce(args, splits, missing, optimizer, batches, job):
    """The resolved truth, at the start."""
    job.say("settings: " + ", ".join(f"{k}={v}" for k, v in sorted(vars(args).items()) if k not in START_ONLY))
    for split, ann in splits.items():
        job.say(f"{split:5s} {len(ann.captions)} texts, {len(ann.segments)} videos")
    if missing:
        job.say(f"--skip-bad: {len(missing)} missing videos left out")
    for name, group in zip(("CLIP", "head"), optimizer.param_groups):
        job.say(f"{name} {sum(p.numel() for p in group['params']):,} parameters, learning rate {group['peak']:g}")
    precision = "float32" if args.amp == "off" else f"{args.amp} towers"
    job.say(f"{batches.total} steps of {args.batch} pairs, over {job.world} processes on {job.device}, {precision}")
    if not batches.total:
        job.say("no step: the starting point is the result")
    elif not splits["val"].segments:
        hint = "; --val-videos 500 would hold some out of train" if args.data in data.NO_VAL else ""
        job.say("no validation split: the last epoch is the result" + hint)


def note_bad(bad, ids, skip, noted):
    """Pairs of a batch that can't be read: stop at the first, or with --skip-bad note them, unless nothing is left."""
    if bad and not skip:
        raise bad[0]
    noted += [str(e) for e in bad if str(e) not in noted]
    if ids is None:
        raise data.DataError(f"no video of a whole batch can be read; the first: {bad[0]}")


def evaluation(args):
    """The command that gives the test line again: what else it needs is in the checkpoint."""
    words = ["python", "eval.py", "--ckpt", args.out] + ["--skip-bad"] * args.skip_bad
    words += ["--cache", os.path.relpath(args.cache)] if args.cache else []
    return shlex.join(words + (["--device", args.device] if args.device != DEVICE else []))


def go_on():
    """What the user typed, with --resume."""
    start = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        start = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
        if os.environ["GROUP_WORLD_SIZE"] != "1":  # on each node
            start += ["--nnodes", os.environ["GROUP_WORLD_SIZE"], "--rdzv_backend", "c10d",
                      "--rdzv_endpoint", os.environ["MASTER_ADDR"] + ":29500"]
    return shlex.join([*start, *sys.argv] + ["--resume"] * ("--resume" not in sys.argv))


if __name__ == "__main__":
    sys.exit(run(main))
