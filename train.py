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
from argparse import SUPPRESS, Namespace

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

import data
from eval import AMP, autocast, evaluate, format_metrics
from lib import runs, shapes
from lib.common import DataError, Parser, mixed_seed, numeric
from lib.encoders import say_cut
from lib.processes import Gather, Stopped, loading, noting_signals, run, start_processes
from lib.weights import build_own, load_checkpoint, read_weights, usable
from tmass import POOLINGS, PRIORS, RADII, SUPPORTS, TMASS

# ---- settings ----

METHOD = {  # the method's settings and their defaults, read from TMASS
    name: parameter.default
    for name, parameter in inspect.signature(TMASS).parameters.items()
    if name != "clip"
}
BASE = dict(  # what decides the result: --resume refuses others
    METHOD,
    clip="ViT-B/32",
    init=None,
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
PLACES = dict(data="shapes", root=None, videos=None, cache=None)  # where things lie
RUN = dict(  # what is for one start, and is not saved
    out="model.pt",
    workers=None,
    skip_bad=False,
    chunk=0,
    save_every=500,
    log_every=20,
    tensorboard=None,
    device=None,
    overwrite=False,
    resume=False,
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


def learning_rate(step, total, warmup):
    """The learning rate as a factor of its peak. warmup: a fraction of the total steps.

    It rises linearly during warm-up, then falls towards 0 along a cosine.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2


# ---- the training loop ----


def fit(args, job, state, batches, splits, log, noted):
    """Train to the last step, or until a signal arrives. -> 0, or the signal's number.

    On a signal, the current step is finished and the checkpoint saved.
    """
    model = state.model
    optimizer = state.optimizer
    scaler = state.scaler  # does nothing without --amp fp16
    parallel = model
    if job.world > 1:
        # Static: each step uses the same parameters, perhaps not all (SigLIP's bias is unused).
        parallel = DistributedDataParallel(model, static_graph=True)
    gather = functools.partial(Gather.apply, job, args.skip_bad)
    model.train()
    model.clip.train(not args.freeze_clip)
    for module in model.clip.modules():
        if hasattr(module, "running_mean"):
            # Batch normalisation keeps its pretrained statistics: those of a batch would differ
            # with the number of processes that share it.
            module.eval()
    skipped = 0  # steps in a row whose gradient was not finite
    with read_batches(args, job, state, batches, splits["train"]) as loader:
        for step, (ids, pixels, bad) in enumerate(loader, batches.start):
            refuse_bad(args, job, ids, bad)
            factor = learning_rate(step, batches.total, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            # Makes noise and dropout the same in all processes, and in a resumed run.
            torch.manual_seed(mixed_seed(args.seed, step))

            ids = ids.to(job.device, non_blocking=True)
            pixels = pixels.to(job.device, non_blocking=True)
            with autocast(job.device, args.amp):
                losses = parallel(ids, pixels, gather=gather)
            optimizer.zero_grad()
            scaler.scale(losses["loss"]).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if norm.isfinite():  # differs from the released code, which takes the step
                scaler.step(optimizer)
                skipped = 0
            else:
                skipped += 1
                report_skipped(args, job, step + 1, skipped)
            scaler.update()
            with torch.no_grad():
                model.clip.logit_scale.clamp_(max=math.log(100))

            state.step = step + 1
            # A bad video comes up once per caption and epoch, but is listed only once.
            new = [line for line in dict.fromkeys(bad) if line not in state.bad_videos]
            state.bad_videos += new
            end_of_epoch = state.step % batches.per_epoch == 0
            if end_of_epoch or state.step % args.log_every == 0:
                scale = model.clip.logit_scale.exp()
                log.step(state.step, dict(losses, grad_norm=norm, scale=scale), factor)
            if end_of_epoch and splits["val"].segments:
                validate(args, job, state, splits["val"], log)
            stopping = job.largest(noted)
            if stopping or end_of_epoch or state.step % args.save_every == 0:
                runs.save(args.out, job, state)
            if stopping:
                return stopping
    return 0


def report_skipped(args, job, step, skipped):
    """Print that a step was not finite. Too many in a row are an error.

    With fp16, each of them halves the scale of the loss until the gradients fit: more are allowed.
    """
    job.say(f"step {step}: loss or gradient is not finite; step skipped ({skipped} in a row)")
    fp16 = args.amp == "fp16"
    if skipped == (30 if fp16 else 10):
        cure = "--amp bf16, then " if fp16 else ""
        raise DataError(f"{skipped} steps in a row, to {step}, were not finite: {args.out} keeps "
                        f"the last saved state; train on from it with {cure}lower rates: --init "
                        f"{args.out} --out NEW.pt --head-lr {args.head_lr / 10:g} --clip-lr "
                        f"{args.clip_lr / 10:g}")


def validate(args, job, state, annotations, log):
    """Evaluate after an epoch, and keep the weights if they are the best so far."""
    epoch = state.step // log.batches.per_epoch
    R1 = test(args, job, state, annotations, f"validation after epoch {epoch}")
    log.row(state.step, epoch=epoch, val_R1=R1)
    if state.best is None or R1 > state.best[1]:
        state.best = [state.step, R1]
        weights = state.model.state_dict()
        # On the CPU: the device needs its memory for training.
        state.best_weights = {k: x.detach().to("cpu", copy=True) for k, x in weights.items()}


def test(args, job, state, annotations, title):
    """Evaluate, and print the metrics in one line. -> t2v R@1 in percent."""
    result = evaluate(state.model, state.tokenizer, annotations, job=job, workers=args.workers,
                      skip_bad=args.skip_bad, cache=args.cache)
    job.say(f"{title}: {format_metrics(result)}")
    state.bad_videos += result["left_out"]
    return result["t2v"]["R1"]


# ---- batches ----


def collate(tokenizer, shape, items):
    """Items of PairDataset -> ids (n,L), pixels uint8 (n,T,3,P,P), error messages of the others.

    shape: (T,3,P,P), where no item of a process's share can be read.
    """
    good, bad = data.readable(items)
    captions = [caption for _, caption in good]
    pixels = torch.zeros(0, *shape, dtype=torch.uint8)
    if good:
        pixels = default_collate([x for x, _ in good])
    return tokenizer(captions), pixels, list(bad.values())


def refuse_bad(args, job, ids, bad):
    """Raise the error of a video that can't be read; with --skip-bad, only if a batch has no other.

    A process without any takes no part in the step.
    """
    if bad and not args.skip_bad:
        raise DataError(bad[0])
    if not len(ids) and job.world == 1:
        raise DataError(f"no video of a whole batch can be read; the first error: {bad[0]}")


def read_batches(args, job, state, batches, annotations):
    """Context manager: iterates over the collated batches, which worker processes read."""
    clip = state.model.clip
    transform = data.train_transform(clip.image_size)
    if args.augment == "none":
        transform = data.transform_for(clip)
    dataset = data.PairDataset(annotations, args.frames, transform, args.seed, args.cache)
    shape = args.frames, 3, clip.image_size, clip.image_size
    finish = functools.partial(collate, state.tokenizer, shape)
    return loading(dataset, batches, finish, args.workers, pin=job.device.type == "cuda")


# ---- what is trained ----


def form_of(part):
    """What must be the same for weights to go on: the class of a module, and its shapes."""
    return type(part), {name: x.shape for name, x in part.state_dict().items()}


def build(args, captions, saved, job):
    """Build the model to start from: that of --resume, --init or --clip. -> (model, tokenizer)."""
    if saved:
        # If the result so far is an earlier epoch's, the weights to go on from are beside it.
        model, tokenizer, _ = build_own(saved | saved.get("training", {}), args.out)
        return model, tokenizer
    torch.manual_seed(args.seed)
    method = {name: getattr(args, name) for name in METHOD}
    if args.clip == "tiny" and not args.init:
        clip, tokenizer = shapes.tiny_clip(captions)
        return TMASS(clip, **method), tokenizer
    start, tokenizer, _ = load_checkpoint(args.init or args.clip)
    model = TMASS(start.clip, **method)
    if args.init:
        anew = []
        for name in ("pool", "radius"):
            before = getattr(start, name)
            after = getattr(model, name)
            if form_of(before) != form_of(after):
                anew.append(f"{name} ({type(after).__name__})")
            else:
                after.load_state_dict(before.state_dict())
        heads = start.config["heads"]
        if heads != args.heads and args.pooling == start.config["pooling"] == "xpool":
            raise DataError(f"--init {args.init} has {heads} heads: give --heads {heads}")
        job.say(f"init: {args.init}; starting anew: {', '.join(anew) or 'nothing'}")
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


# ---- options ----


def listed(settings):
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "nothing"


def data_name(text):
    return os.path.abspath(text) if text.endswith(".csv") else text


def parser():
    recipes = [f"  {name}: {listed(recipe)}" for name, recipe in RECIPES.items()]
    p = Parser(__doc__, argument_default=SUPPRESS, epilog="\n".join([RECIPES_ARE, *recipes]))
    count = numeric(int, 1)
    folder = os.path.abspath
    rate = numeric(float, 0, 10)
    size = numeric(int, 1, 1000)
    weight = numeric(float, 0, 1e6)
    whole = numeric(int, 0, 10 ** 6)
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="NAME", type=data_name,
                   help=f"{', '.join(data.names())}, or a .csv (default: shapes)")
    g.add_argument("--root", metavar="DIR", type=folder,
                   help="folder of the data set (default: data/NAME; of a .csv, its own)")
    g.add_argument("--videos", metavar="DIR", type=folder,
                   help="folder of the videos, where they lie apart from the annotations")
    g.add_argument("--val-videos", metavar="N", type=whole,
                   help="so many are held out of train to choose the checkpoint, where a data set "
                        "has no validation split: 500 is plenty")
    g.add_argument("--cache", metavar="DIR", type=folder,
                   help="folder that keeps frames as JPEG, so that a video is decoded once: "
                        "faster from the second epoch on (default: none; shapes: frames/ beside "
                        "its videos)")
    g.add_argument("--augment", choices=("crop-flip", "none"),
                   help="crop-flip: one random crop and flip per video; none: where captions say "
                        "left and right")
    g.add_argument("--workers", metavar="N", type=numeric(int, 0, 1000),
                   help="processes that read videos: more, while the device waits for them "
                        "(default: one per core, at most 8)")
    g.add_argument("--skip-bad", action="store_true",
                   help="leave out videos that are missing or broken, and list them")

    g = p.add_argument_group("model")
    g.add_argument("--clip", metavar="NAME",
                   help="ViT-B/32, ViT-B/16, ViT-L/14 (downloaded on first use), a file of "
                        "weights, open_clip:NAME/TAG or another one of lib/encoders.py, or tiny")
    g.add_argument("--init", metavar="FILE",
                   help="start from a whole checkpoint: this program's, released T-MASS or X-Pool")
    g.add_argument("--frames", metavar="T", type=size,
                   help="T, frames sampled per video: time and memory grow with it")
    g.add_argument("--pooling", choices=POOLINGS,
                   help="how frames become one vector: xpool learns to, for each text; query does "
                        "so without a parameter; mean is the same for all texts")
    g.add_argument("--heads", metavar="H", type=size, help="attention heads of xpool")
    g.add_argument("--dropout", type=numeric(float, 0, 0.99), help="in xpool")
    g.add_argument("--radius", choices=RADII,
                   help="of the text mass: linear is the paper's, none the X-Pool baseline")
    g.add_argument("--prior", choices=PRIORS,
                   help="distribution of the noise: normal in the paper, uniform as released")
    g.add_argument("--prior-std", type=weight,
                   help="of the normal prior: at 1 the noise is longer than CLIP's texts")
    g.add_argument("--support-weight", type=weight,
                   help="weight of the support text's loss (radius none: 0)")
    g.add_argument("--support-video", choices=SUPPORTS,
                   help="what the support text looks towards: its own video, or the mean over the "
                        "batch's texts, as released")
    g.add_argument("--ce-weight", type=weight, help="weight of the point text's loss")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", metavar="N", type=whole,
                   help="passes over all (caption, video) pairs; 0 writes the starting point")
    g.add_argument("--batch", metavar="B", type=numeric(int, 2, 10 ** 6),
                   help="pairs per step, over all processes: more are a harder contrast")
    g.add_argument("--head-lr", type=rate, help="peak learning rate of pooling and radius")
    g.add_argument("--clip-lr", type=rate,
                   help="peak learning rate of CLIP: far lower, so that it forgets little")
    g.add_argument("--freeze-clip", action="store_true",
                   help="leave CLIP as it is, and train pooling and radius alone")
    g.add_argument("--weight-decay", type=rate, help="of AdamW")
    g.add_argument("--warmup", type=numeric(float, 0, 1),
                   help="share of the steps in which learning rates rise; then a cosine to 0")
    g.add_argument("--pretrain", metavar="STEPS", type=whole,
                   help="shapes: steps of the tiny CLIP on single pictures before")
    g.add_argument("--seed", type=numeric(int, 0, 2 ** 63 - 1), help="of everything random")

    g = p.add_argument_group("run")
    g.add_argument("--out", metavar="FILE", help="the checkpoint; its log is NAME.log.csv")
    g.add_argument("--save-every", metavar="STEPS", type=count,
                   help="steps between two saves; each epoch ends with one")
    g.add_argument("--log-every", metavar="STEPS", type=count, help="steps between two lines")
    g.add_argument("--tensorboard", metavar="DIR",
                   help="folder for TensorBoard: what the log has, as curves")
    g.add_argument("--amp", choices=AMP,
                   help="towers in bfloat16: less memory, two to four times as fast where the "
                        "device has it; or in float16 with a scaled loss (T4, V100)")
    g.add_argument("--device",
                   help="cpu, cuda or mps (default: cuda where there is a GPU, else cpu)")
    g.add_argument("--chunk", metavar="N", type=whole,
                   help="compute N frames or texts at a time, twice: memory no longer grows with "
                        "the batch, and the result is the same; a third slower")
    g.add_argument("--overwrite", action="store_true", help="replace a finished run in --out")
    g.add_argument("--resume", action="store_true",
                   help="continue the run in --out, exactly, or start it")
    for action in p._actions:
        default = (BASE | RUN).get(action.dest)
        if default not in (None, False):
            action.help = f"{action.help or ''} (default: {default})"
    return p


def settle(given, saved):
    """Put the settings together. given: those of the command line; saved: the run to resume.

    -> Namespace of all settings, dict of the recipe. Raises DataError.
    """
    earlier = {}
    if saved:
        known = BASE | PLACES  # old checkpoints may have others
        earlier = {k: x for k, x in saved["config"].items() if k in known and x is not None}
        for k, x in earlier.items():
            if known[k] is not None and type(known[k])(x) != x:
                raise ValueError(f"its {k} is {x!r}")
        # Checksums tell whether data in another place are the same; old checkpoints have none.
        fixed = BASE if "splits" in saved else BASE | dict(data=None)
        for name in given.keys() & earlier.keys() & fixed.keys():
            if given[name] != earlier[name]:
                raise DataError(f"--{name.replace('_', '-')} {given[name]} differs from "
                                f"{earlier[name]} in the run: drop it to resume, or start anew "
                                "with another --out")
    name = (PLACES | earlier | given)["data"]
    recipe = dict(RECIPES.get(name, {}))
    # With R = 0, the support text is the text itself: without its loss, this is X-Pool.
    if given.get("radius") == "none":
        recipe["support_weight"] = 0.0
    # The warm-up is for random weights, and would harm those that are loaded.
    if "init" in given or given.get("clip", "tiny") != "tiny":
        recipe["pretrain"] = 0
    # Data in another place have their videos and frames there.
    if name != earlier.get("data", name):
        earlier |= dict(root=None, videos=None)
    if name == "shapes" and "root" in given:
        earlier["cache"] = None

    args = Namespace(**BASE | PLACES | RUN | recipe | earlier | given)
    args.root = args.root or os.path.abspath(data.default_root(name))
    if name == "shapes":
        args.cache = args.cache or os.path.join(args.root, "frames")
    elif args.pretrain:
        raise DataError("--pretrain is only for --data shapes: start from weights with --clip")
    return args, recipe


# ---- the run ----


def main(argv=None):
    given = vars(parser().parse_args(argv))
    start = Namespace(**RUN | given)
    for source in (given.get("clip"), given.get("init")):
        if source and os.path.realpath(source) == os.path.realpath(start.out):
            raise DataError(f"--out {start.out} is what --clip or --init starts from: choose "
                            "another --out")
    plain = os.path.isfile(start.out) or not os.path.lexists(start.out)
    if not plain or not os.path.basename(start.out):
        raise DataError(f"--out {start.out} cannot be written: give a plain file's name")
    job = start_processes(start.device)
    with contextlib.closing(runs.Log(start.out, job)) as log:
        saved = find_run(start, job, log)
        if saved and saved.get("finished", True):
            job.say(f"{start.out} is finished (step {saved.get('step')}): nothing to resume. Test "
                    f"it: {evaluation(start)}")
            return 0
        with usable(start.out) if saved else contextlib.nullcontext():
            args, recipe = settle(given, saved)
        job.say(f"resuming {args.out}" if saved else f"recipe of {args.data}: {listed(recipe)}")
        job.say(f"given: {listed(given)}")
        try:
            state, batches, splits = prepare(args, job, saved, log)
        except KeyboardInterrupt:
            if job.rank == 0:
                print("stopped before the first step: nothing was saved", file=sys.stderr)
            raise
        del saved  # all of it has been copied
        return train(args, job, log, state, batches, splits)


def find_run(args, job, log):
    """What --out holds, for --resume to continue; None if a new run may start there.

    A new run may replace one without a completed step or, with --overwrite, a finished one.
    """
    out = args.out
    if os.path.lexists(out):
        saved = {}
        with contextlib.suppress(ValueError):  # no weights at all
            saved = read_weights(out)
        if saved.get("format") != "tmass":
            raise DataError(f"--out {out} is not a checkpoint of this program, and stays as it is: "
                            "choose another --out")
    elif log.had_rows:
        raise DataError(f"{log.path} belongs to another run, whose {out} is gone: move it, or "
                        "choose another --out")
    else:
        saved = None
    finished = saved and saved.get("finished", True)
    if finished and not args.resume and not args.overwrite:
        raise DataError(f"{out} holds a finished run: choose another --out, or replace it with "
                        "--overwrite")
    if saved and not finished and not args.resume and saved["step"]:
        raise DataError(f"{out} holds an unfinished run at step {saved['step']}: --resume it, or "
                        "choose another --out")
    if not args.resume:
        saved = None
    mark = None
    if saved:
        with usable(out):
            saved["config"] = saved["config"] | saved["tmass"]
            mark = [saved["step"], float(sum(x.double().sum() for x in saved["model"].values()))]
    if any(other != mark for other in job.gather(mark)):
        raise DataError(f"the processes of this job find different checkpoints in --out {out}: it "
                        "belongs on a disk that all nodes share")
    return saved


def prepare(args, job, saved, log):
    """Everything before the first step. -> Run, Batches, {split: Annotations}"""
    if args.batch % job.world:
        raise DataError(f"--batch {args.batch} is for all processes: give a multiple of "
                        f"{job.world}")
    splits, missing = load_splits(args, job)
    captions = splits["train"].captions
    with job.first_alone():
        try:
            model, tokenizer = build(args, captions, saved, job)
        except ValueError as error:  # TMASS and CLIP raise it for a wrong setting
            raise DataError(str(error)) from None
    model.to(job.device)
    model.chunk = args.chunk
    state = runs.Run(
        model,
        tokenizer,
        make_optimizer(model, args),
        torch.amp.GradScaler(job.device.type, enabled=args.amp == "fp16"),
        config={name: getattr(args, name) for name in BASE | PLACES},
        splits={name: annotations.checksum() for name, annotations in splits.items()},
    )
    if saved:
        runs.resume(args.out, state, saved)
    state.bad_videos += missing
    batches = data.Batches(len(captions), args.batch, args.epochs, args.seed, state.step,
                           job.rank, job.world)
    state.total = batches.total
    announce(args, job, splits, state.optimizer, batches)
    say_cut(job, tokenizer, captions, "train")
    log.begin(state.step, batches, args)
    if not saved:
        if args.pretrain:
            rates = [learning_rate(k, args.pretrain, args.warmup) for k in range(args.pretrain)]
            shapes.warm_up(model.clip, tokenizer, rates, args.seed, args.workers, job.say)
        runs.save(args.out, job, state)
    model.clip.requires_grad_(not args.freeze_clip)
    return state, batches, splits


def train(args, job, log, state, batches, splits):
    """Train, and test the result. -> exit status."""
    with noting_signals() as noted:
        try:
            stopped = fit(args, job, state, batches, splits, log, noted)
            if state.step == batches.total:
                runs.save(args.out, job, state, finished=True)
                stopped = job.largest(noted)
        except (Stopped, DataError, RuntimeError):
            if not noted:
                raise
            # No batch arrived: the workers are slow, or the signal ended them. The other processes
            # wait in the middle of a step, or are gone: so nothing more is exchanged with them.
            stopped = noted[0]
            job = job._replace(world=1)
            # The last step of an epoch was saved, or its validation is not over.
            if state.step % batches.per_epoch:
                runs.save(args.out, job, state)
    if stopped:
        runs.list_bad(args.out, job, state)
        name = signal.Signals(stopped).name
        job.say(f"stopped by {name} after step {state.saved}; to go on, give the same command "
                "with --resume")
        return 128 + stopped
    if state.best:
        state.model.load_state_dict(state.best_weights)
        job.say(f"the result is that of step {state.best[0]}, the best on the validation split")
    if splits["test"].segments:
        test(args, job, state, splits["test"], "test")
    runs.list_bad(args.out, job, state)
    job.say(f"checkpoint: {args.out}   evaluate it again: {evaluation(args)}")
    return 0


def load_splits(args, job):
    """Load the splits. -> {train, val, test: Annotations}, a line per missing video left out."""
    if args.data == "shapes":
        with job.first_alone():
            shapes.render_shapes(args.root)  # on first use
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
    """Print the plan, before anything takes long."""
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
    skip_bad = ["--skip-bad"] if args.skip_bad else []
    return shlex.join(["python", "eval.py", "--ckpt", args.out, *skip_bad])


if __name__ == "__main__":
    sys.exit(run(main))
