"""Train T-MASS.

    python train.py                                     # the embedded data set, on a CPU
    python train.py --data msrvtt --out msrvtt.pt       # a benchmark, from OpenAI's CLIP
    python train.py --data my.csv --out my.pt           # a table: video, caption[, split, ...]
    torchrun --nproc_per_node 8 train.py --data msrvtt  # several GPUs; --batch is for all of them

Data order, augmentation, noise, dropout and learning rate depend only on the seed and the step. So
to resume exactly, a run needs only its weights, the state of its optimizer and its step number.
"""
import contextlib
import functools
import inspect
import math
import os
import shlex
import signal
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
from clip_model import CLIP, Tokenizer
from eval import AMP, autocast, evaluate, format_metrics
from lib.check import say_cut
from lib.common import DataError, Parser, Progress, WeightsError, mixed_seed, numeric
from lib.processes import (
    DEVICE,
    Gather,
    Stopped,
    loading,
    noting_signals,
    process_died,
    run,
    start_processes,
)
from lib.runs import (
    START_ONLY,
    Checkpoint,
    Log,
    board,
    check_settings,
    earlier_run,
    go_on,
    only_run,
    without_effect,
)
from lib.shapes import render_shapes, shapes_pictures
from lib.video import FrameCache
from lib.weights import ACTIVATIONS, build_own, load_checkpoint, load_strictly
from tmass import POOLINGS, PRIORS, RADII, SUPPORTS, TMASS, symmetric_cross_entropy

# ---- settings ----

METHOD = {  # the method's settings and their defaults, read from TMASS
    name: parameter.default
    for name, parameter in inspect.signature(TMASS).parameters.items()
    if name != "clip"
}
BASE = dict(
    METHOD,
    clip="ViT-B/32",
    batch=32,
    epochs=5,
    head_lr=1e-5,
    clip_lr=1e-6,
    freeze_clip=False,
    weight_decay=0.2,
    warmup=0.1,
    augment="crop-flip",
    pretrain=0,
    val_videos=0,
    amp="off",
    seed=24,
)
RECIPES = {  # what differs from BASE, by data set
    "shapes": dict(
        clip="tiny",
        frames=6,
        batch=64,
        epochs=3,
        head_lr=1e-3,
        clip_lr=5e-4,
        pretrain=300,
        dropout=0.1,
        prior_std=0.1,
        augment="none",  # captions say what is on the left and what on the right
    ),
    "msrvtt": dict(head_lr=3e-5, prior="uniform", support_video="batch"),
    "msrvtt-7k": dict(dropout=0.4, prior="uniform", support_video="batch"),
    "lsmdc": dict(prior_std=0.003, support_weight=0.0),
    "didemo": dict(dropout=0.4, prior="uniform", support_weight=0.0),
    "msvd": dict(dropout=0.4),
}
RECIPES_ARE = """\
Recipes, where they differ from the defaults above, which are those of the other data sets.
msrvtt, lsmdc and didemo are the released commands; none was released for the others: msrvtt-7k and
msvd have X-Pool's rates and dropout, the rest are ours. Every value can be overridden."""
TINY = dict(  # a CLIP that is small enough to be trained from scratch on a CPU
    embed_dim=128,
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_layers=3,
    context_length=48,
    text_width=128,
    text_layers=2,
    quick_gelu=False,
)


def learning_rate(step, total, warmup):
    """The learning rate as a factor of its peak. warmup: a fraction of the total steps.

    It rises linearly during warm-up, then falls towards 0 along a cosine.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2


# ---- the training loop ----

def descend(loss, model, optimizer, scaler):
    """One optimizer step, with the gradient clipped to norm 1. -> norm (), finite ()

    norm: of the gradient before clipping. finite: whether loss and gradient are finite. If not, the
    optimizer itself skips the step, on the device, so that nothing here waits for the device.

    With --amp fp16, the scaler multiplies the loss by an adaptive factor, so that gradients neither
    underflow nor overflow. All processes take the same step, because their gradients are already
    averaged.
    """
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    finite = torch.isfinite(loss + norm)
    # If found_inf is 1, fused AdamW changes nothing. On MPS it ignores found_inf, so wait there.
    optimizer.found_inf = (~finite).float()
    if loss.device.type != "mps" or finite:
        optimizer.step()
    scaler.update()
    with torch.no_grad():
        model.clip.logit_scale.clamp_(max=math.log(100))
    return norm, finite


def fit(args, job, checkpoint, batches, splits, noted):
    """Train to the last step, or until a signal arrives. -> 0, or the signal's number.

    On a signal, the current step is finished and the checkpoint saved.
    """
    model = checkpoint.model
    parallel = model
    if job.world > 1:
        # Static: each step uses the same parameters, perhaps not all (SigLIP's bias is unused).
        parallel = DistributedDataParallel(model, static_graph=True)
    gather = functools.partial(Gather.apply, job, args.skip_bad)
    log = Log(args, job, checkpoint, batches)
    model.train()
    model.clip.train(not args.freeze_clip)
    with read_batches(args, job, checkpoint, batches, splits["train"]) as loader:
        for step, (ids, pixels, bad) in enumerate(loader, batches.start):
            # A bad video comes up once per caption and epoch, but is listed only once.
            new = [line for line in dict.fromkeys(bad) if line not in checkpoint.bad_videos]
            checkpoint.bad_videos += new
            factor = learning_rate(step, batches.total, args.warmup)
            for group in checkpoint.optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            # Makes noise and dropout the same in all processes, and in a resumed run.
            torch.manual_seed(mixed_seed(args.seed, step))

            ids = ids.to(job.device, non_blocking=True)
            pixels = pixels.to(job.device, non_blocking=True)
            with autocast(job.device, args.amp):
                losses = parallel(ids, pixels, gather=gather)
            norm, finite = descend(losses["loss"], model, checkpoint.optimizer, checkpoint.scaler)
            log.flags.append(finite)

            done = step + 1
            end_of_epoch = done % batches.per_epoch == 0
            # The last step of an epoch must not be saved before its validation.
            checkpoint.unsaved = None if end_of_epoch else done
            # Reading numbers waits for the device, so only logged or saved steps do it.
            if end_of_epoch or done % args.log_every == 0:
                scale = model.clip.logit_scale.exp()
                log.step(done, dict(losses, grad_norm=norm, scale=scale), factor)
            if end_of_epoch and splits["val"].segments:
                epoch = done // batches.per_epoch
                R1 = test(args, job, checkpoint, splits["val"], f"validation after epoch {epoch}")
                checkpoint.validated(done, R1)
                log.row(step=done, epoch=epoch, val_R1=R1)
            stopping = job.largest(noted)
            saving = stopping or end_of_epoch or done % args.save_every == 0
            if saving and log.was_finite(done):
                checkpoint.save(done)
            if stopping:
                return stopping
    checkpoint.save(batches.total, finished=True)
    return job.largest(noted)


def test(args, job, checkpoint, annotations, title):
    """Evaluate, and print the metrics in one line. -> t2v R@1 in percent."""
    result = evaluate(checkpoint.model, checkpoint.tokenizer, annotations, job=job,
                      workers=args.workers, skip_bad=args.skip_bad, cache=args.cache)
    job.say(f"{title}: {format_metrics(result)}")
    checkpoint.bad_videos += result["left_out"]
    return result["t2v"]["R1"]


# ---- batches ----

@dataclass
class Batches:
    """This process's share of each batch, from step `start` on: lists of (epoch, pair).

    An incomplete batch at the end of an epoch is dropped. This differs from the released code,
    which trains on it.
    """
    pairs: int
    batch: int
    epochs: int
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        self.per_epoch = self.pairs // self.batch
        self.total = self.per_epoch * self.epochs

    def __iter__(self):
        share = self.batch // self.world
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            order = torch.randperm(self.pairs, generator=generator).tolist()
            for k in range(self.per_epoch):
                first = k * self.batch + self.rank * share
                if epoch * self.per_epoch + k >= self.start:
                    yield [(epoch, pair) for pair in order[first:first + share]]


def collate(tokenizer, skip_bad, items):
    """Pairs -> ids (B,L), pixels uint8 (B,T,3,P,P), errors of the pairs that were left out.

    Raises the DataError of a pair that can't be read; with skip_bad, only if no pair can be read.
    """
    good, bad = data.readable(items, skip_bad)
    if not good:
        raise DataError(f"no video of a whole batch can be read; the first error: {bad[0]}")
    pixels, captions = zip(*good)
    return tokenizer(captions), torch.stack(pixels), list(bad.values())


def read_batches(args, job, checkpoint, batches, annotations):
    """Context manager: iterates over the collated batches, which worker processes read."""
    clip = checkpoint.model.clip
    transform = data.train_transform(clip.image_size)
    if args.augment == "none":
        transform = data.transform_for(clip)
    cache = FrameCache(args.cache, args.frames) if args.cache else None
    dataset = data.PairDataset(annotations, args.frames, transform, args.seed, cache)
    finish = functools.partial(collate, checkpoint.tokenizer, args.skip_bad)
    return loading(dataset, batches, finish, args.workers, pin=job.device.type == "cuda")


# ---- what is trained ----

def build(args, captions, saved, job):
    """Build the model to start from: that of --resume, --init or --clip. -> (model, tokenizer)."""
    if saved:
        # This also raises if the best weights so far are damaged.
        model, tokenizer, _ = build_own(saved, args.out)
        # If those are from an earlier epoch, the latest weights are stored beside them.
        if "training" in saved:
            model, tokenizer, _ = build_own(saved | saved["training"], args.out)
        return model, tokenizer
    torch.manual_seed(args.seed)
    method = {name: getattr(args, name) for name in METHOD}
    if args.clip == "tiny" and not args.init:
        tokenizer = Tokenizer.learn(captions, 600, TINY["context_length"])
        return TMASS(CLIP(vocab_size=tokenizer.vocab_size, **TINY), **method), tokenizer
    start, tokenizer, _ = load_checkpoint(args.init or args.clip, args.activation)
    model = TMASS(start.clip, **method)
    if args.init:
        new = []
        # If the radius differs from the checkpoint's, it starts anew; all other weights must fit.
        if args.radius != start.config["radius"]:
            start.radius = model.radius
            new = [f"radius.{name}" for name in model.radius.state_dict()]
        heads = start.config["heads"]
        if heads != args.heads and list(model.pool.parameters()):
            raise WeightsError(f"--init {args.init} has {heads} heads: give --heads {heads}")
        load_strictly(model, start.state_dict(), "the model asked for with --pooling and --frames")
        job.say(f"init: {args.init}" + (f"; starting anew: {', '.join(new)}" if new else ""))
    return model, tokenizer


def make_optimizer(model, args):
    """AdamW with one group for CLIP and one for what T-MASS adds. peak: a group's highest rate."""
    head = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    clip = [] if args.freeze_clip else list(model.clip.parameters())
    if not head + clip:
        raise DataError("--freeze-clip leaves nothing to train: choose --pooling xpool, or a "
                        "--radius that learns")
    # This differs from the released code, which adds epsilon before the bias correction, and decays
    # the weights after the update.
    return torch.optim.AdamW(
        [dict(params=clip, peak=args.clip_lr), dict(params=head, peak=args.head_lr)],
        lr=0,
        eps=1e-6,
        weight_decay=args.weight_decay,
        fused=True,
    )


def draw(tokenizer, size, seed, steps):
    """Draw the pairs of one warm-up step. -> ids (128,L), pictures uint8 (128,3,P,P).

    steps: a list of one step number. Each step gets new pairs.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, *steps))
    pictures, phrases = shapes_pictures(128, generator, size)
    return tokenizer(phrases), pictures


def pretrain(model, tokenizer, args, scaler, job):
    """Warm up the tiny CLIP on single pictures. Real runs start from a pretrained CLIP instead."""
    clip = model.clip
    optimizer = torch.optim.AdamW(
        clip.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    progress = Progress("pretrain", args.pretrain, "steps", enabled=job.rank == 0)
    steps = range(args.pretrain)
    draw_pairs = functools.partial(draw, tokenizer, clip.image_size, args.seed)
    with loading(steps, [[step] for step in steps], draw_pairs, args.workers) as loader:
        for step, (ids, pixels) in enumerate(loader):
            optimizer.param_groups[0]["lr"] = 2e-3 * learning_rate(step, args.pretrain, args.warmup)
            with autocast(job.device, args.amp):
                t = clip.encode_text(ids.to(job.device))
                v = clip.encode_image(pixels.to(job.device))
            sims = F.normalize(t.float(), dim=-1) @ F.normalize(v.float(), dim=-1).T
            loss = symmetric_cross_entropy(sims, clip.logit_scale.exp())
            descend(loss, model, optimizer, scaler)
            progress.update(step + 1)
    job.say(f"pretrain {args.pretrain}/{args.pretrain}  loss {loss.item():.3f}")


# ---- options ----

def listed(settings):
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def data_name(text):
    return os.path.abspath(text) if text.endswith(".csv") else text


def parser():
    recipes = [f"  {name}: {listed(recipe)}" for name, recipe in RECIPES.items()]
    p = Parser(__doc__, later=BASE, epilog="\n".join([RECIPES_ARE, *recipes]))
    option = p.option
    count = numeric(int, 1)
    folder = os.path.abspath
    rate = numeric(float, 0, 10)
    size = numeric(int, 1, 1000)
    weight = numeric(float, 0, 1e6)
    whole = numeric(int, 0, 10 ** 6)

    p.group("data")
    option("data NAME", f"{', '.join(data.names())}, or a .csv (default: shapes)", data_name)
    option("root DIR", "folder of the data set (default: data/NAME; of a .csv, its own)", folder)
    option("videos DIR", "folder of the videos, where they lie apart from the annotations", folder)
    option("val-videos N", "so many are held out of train to choose the checkpoint, where a data "
           "set has no validation split: 500 is plenty", whole)
    option("cache DIR", "folder that keeps frames as JPEG, so that a video is decoded once: faster "
           "from the second epoch on (default: none; shapes: frames/ beside its videos)", folder)
    option("augment", "crop-flip: one random crop and flip per video; none: where captions say "
           "left and right", ("crop-flip", "none"))
    option("workers N", "processes that read videos: more, while the device waits for them",
           numeric(int, 0, 1000), min(8, os.cpu_count() or 1))
    option("skip-bad", "leave out videos that are missing or broken, and list them", bool)

    p.group("model")
    option("clip NAME", "ViT-B/32, ViT-B/16, ViT-L/14 (downloaded on first use), a file of "
           "weights, or tiny")
    option("activation", "of --clip, where the guess that is printed is wrong", ACTIVATIONS)
    option("init FILE", "start from a whole checkpoint: this program's, released T-MASS or X-Pool")
    option("frames T", "T, frames sampled per video: time and memory grow with it", size)
    option("pooling", "how frames become one vector: xpool learns to, for each text; query does so "
           "without a parameter; mean is the same for all texts", POOLINGS)
    option("heads H", "attention heads of xpool", size)
    option("dropout", "in xpool", numeric(float, 0, 0.99))
    option("radius", "of the text mass: linear is the paper's, none the X-Pool baseline", RADII)
    option("prior", "distribution of the noise: normal in the paper, uniform as released", PRIORS)
    option("prior-std", "of the normal prior: at 1 the noise is longer than CLIP's texts", weight)
    option("support-weight", "weight of the support text's loss (radius none: 0)", weight)
    option("support-video", "what the support text looks towards: its own video, or the mean over "
           "the batch's texts, as released", SUPPORTS)
    option("ce-weight", "weight of the point text's loss", weight)

    p.group("optimisation")
    option("epochs N", "passes over all (caption, video) pairs; 0 writes the starting point", whole)
    option("batch B", "pairs per step, over all processes: more are a harder contrast",
           numeric(int, 2, 10 ** 6))
    option("head-lr", "peak learning rate of pooling and radius", rate)
    option("clip-lr", "peak learning rate of CLIP: far lower, so that it forgets little", rate)
    option("freeze-clip", "leave CLIP as it is, and train pooling and radius alone", bool)
    option("weight-decay", "of AdamW", rate)
    option("warmup", "share of the steps in which learning rates rise; then a cosine to 0",
           numeric(float, 0, 1))
    option("pretrain STEPS", "shapes: steps of the tiny CLIP on single pictures before", whole)
    option("seed", "of everything random", numeric(int, 0, 2 ** 63 - 1))

    p.group("run")
    option("out FILE", "the checkpoint; its log is NAME.log.csv", default="model.pt")
    option("save-every STEPS", "steps between two saves; each epoch ends with one", count, 500)
    option("log-every STEPS", "steps between two lines", count, 20)
    option("tensorboard DIR", "folder for TensorBoard: what the log has, as curves", board)
    option("amp", "towers in bfloat16: less memory, two to four times as fast where the device has "
           "it; or in float16 with a scaled loss (T4, V100)", AMP)
    option("device", "cpu, cuda or mps", default=DEVICE)
    option("grad-checkpoint", "compute the towers twice: less memory, a third slower", bool)
    option("overwrite", "replace a finished run in --out", bool)
    option("resume", "continue the run in --out, exactly, or start it", bool)
    return p


def settle(args, world):
    """Complete args from the run to resume or from the recipe. -> the run's checkpoint, or None."""
    chosen = {}
    saved = earlier_run(args)
    if saved:
        chosen = check_settings(parser(), saved["config"], args.out) | saved["tmass"]
        if args.data not in (None, chosen.get("data")):  # the same data in another place
            chosen.update(root=None, videos=None)
        # Frames are kept beside the videos, not in the place where these were before.
        if chosen.get("data") == "shapes" and args.root not in (None, chosen.get("root")):
            chosen.update(cache=None)
    chosen |= {name: value for name, value in vars(args).items() if value is not None}
    name = chosen.setdefault("data", "shapes")
    vars(args).update(BASE | RECIPES.get(name, {}) | chosen)
    # With R = 0, the support text is the text itself: without its loss, this is X-Pool.
    if args.radius == "none" and "support_weight" not in chosen:
        args.support_weight = 0.0
    # The warm-up is for random weights, and would harm those that are loaded.
    if (args.init or args.clip != "tiny") and "pretrain" not in chosen:
        args.pretrain = 0
    args.root = args.root or os.path.abspath(data.default_root(name))
    if name == "shapes":
        args.cache = args.cache or os.path.join(args.root, "frames")
    if args.batch % world:
        raise DataError(f"--batch {args.batch} is for all processes: give a multiple of {world}")
    if args.pretrain and name != "shapes":
        raise DataError("--pretrain is only for --data shapes: start from weights with --clip")
    if args.activation and args.clip == "tiny" and not args.init:
        raise DataError("--activation is for weights that are loaded: give --clip or --init")
    return saved


# ---- the run ----

def main(argv=None):
    args = parser().parse_args(argv)
    job = start_processes(args.device)
    try:
        with only_run(args.out) if job.rank == 0 else contextlib.nullcontext():
            return train(args, job)
    except (OSError, RuntimeError, WeightsError) as error:
        # Causes outside this process: another process died, or the disk is full.
        why = str(error).split("; ")[0]
        if process_died(error):
            why = "another process of this job died"
        elif not isinstance(error, OSError) and not error.__cause__:
            raise
        raise DataError(f"{why}; the last checkpoint, if any, is intact: go on with "
                        f"{go_on()}") from error


def train(args, job):
    """The whole run, from completing the settings to the test. -> exit status."""
    saved = settle(args, job.world)
    if saved and saved.get("finished", True):
        job.say(f"{args.out} is finished (step {saved.get('step')}): nothing to resume. Test it: "
                f"{evaluation(args)}")
        return 0
    splits, missing = load_splits(args, job)
    captions = splits["train"].captions
    with job.first_alone():
        try:
            model, tokenizer = build(args, captions, saved, job)
        except ValueError as error:  # TMASS and CLIP raise it for a wrong setting
            raise WeightsError(str(error)) from None
    model.to(job.device)
    model.clip.grad_checkpoint = args.grad_checkpoint
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(job.device.type, enabled=args.amp == "fp16")
    checkpoint = Checkpoint(args, job, model, tokenizer, optimizer, scaler, splits, saved)
    checkpoint.bad_videos += missing
    batches = Batches(len(captions), args.batch, args.epochs, args.seed, checkpoint.step, job.rank,
                      job.world)
    announce(args, job, splits, optimizer, batches)
    say_cut(job, tokenizer, captions, "train")
    if saved is None:
        if args.pretrain:
            pretrain(model, tokenizer, args, scaler, job)
        checkpoint.save(0)
    model.clip.requires_grad_(not args.freeze_clip)
    # All of its tensors have been copied: free the memory.
    del saved

    with noting_signals() as noted:
        try:
            stopped = fit(args, job, checkpoint, batches, splits, noted)
        except (Stopped, DataError, RuntimeError):
            if not noted:
                raise
            # No batch arrived: the workers are slow, or the signal ended them. The other processes
            # wait in the middle of a step, or are gone: so nothing more is exchanged with them.
            stopped = noted[0]
            checkpoint.job = job._replace(world=1)
            if checkpoint.unsaved:
                checkpoint.save(checkpoint.unsaved)
    if stopped:
        checkpoint.list_bad()
        name = signal.Signals(stopped).name
        job.say(f"stopped by {name} after step {checkpoint.step}; continue with: {go_on()}")
        return 128 + stopped
    if checkpoint.best:
        job.say(f"the result is that of step {checkpoint.best[0]}, the best on the validation "
                "split")
    if splits["test"].segments:
        test(args, job, checkpoint, splits["test"], "test")
    checkpoint.list_bad()
    job.say(f"checkpoint: {args.out}   evaluate it again: {evaluation(args)}")
    return 0


def load_splits(args, job):
    """Load the splits. -> {train, val, test: Annotations}, a line per missing video left out."""
    if args.data == "shapes":
        with job.first_alone():
            render_shapes(args.root)  # on first use
    splits = {}
    missing = []
    for name in data.SPLITS:
        split = data.load_split(args.data, args.root, name, args.val_videos, args.seed, args.videos)
        splits[name], absent = data.present(split, args.skip_bad)
        missing += absent
        if absent and not splits[name].segments:
            job.say(f"{name}: all {len(absent)} videos are missing")
    if missing:
        job.say(f"--skip-bad: {len(missing)} missing videos left out")
    pairs = len(splits["train"].captions)
    if pairs < args.batch:
        raise DataError(f"{args.data}: {pairs} training pairs are too few for a batch of "
                        f"{args.batch}: lower --batch")
    return splits, missing


def announce(args, job, splits, optimizer, batches):
    """Print the settings and the plan, before anything takes long."""
    unused = {*START_ONLY, *without_effect(args)}
    settings = {name: x for name, x in sorted(vars(args).items()) if name not in unused}
    job.say(f"settings: {listed(settings)}")
    for split, annotations in splits.items():
        job.say(f"{split:5s} {len(annotations.captions)} texts, "
                f"{len(annotations.segments)} videos")
    for name, group in zip(("CLIP", "head"), optimizer.param_groups):
        size = sum(p.numel() for p in group["params"])
        job.say(f"{name} {size:,} parameters, learning rate {group['peak']:g}")
    job.say(f"{batches.total} steps of {args.batch} pairs, over {job.world} processes on "
            f"{job.device}, amp {args.amp}")
    if not batches.total:
        job.say("no step: the starting point is the result")
    elif not splits["val"].segments:
        job.say("no validation split: the last epoch is the result")


def evaluation(args):
    """The command that repeats the test. Its other settings are in the checkpoint."""
    words = ["python", "eval.py", "--ckpt", args.out]
    if args.skip_bad:
        words.append("--skip-bad")
    if args.device != DEVICE:
        words += ["--device", args.device]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(run(main))
