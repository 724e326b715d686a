"""Evaluate a checkpoint: encode -> score -> ranks -> metrics.

    python eval.py --ckpt model.pt                                    # on its own data set
    python eval.py --ckpt model.pt --data my.csv --root videos/       # on another data set
    python eval.py --ckpt ViT-B/32 --data msrvtt --pooling mean       # CLIP: are the data right?
    python eval.py --ckpt best.pth --data msrvtt --released-protocol  # with the published number
    python eval.py --ckpt model.pt --analyze --report report.html     # what lies behind the numbers

The file follows the computation: N texts t (N,D) and V videos f (V,T,D) of T frames, then scores
sims (N,V). Encoding and scoring never see `owner` (N,), the number of the video that each text
describes; only the leaking `released_scores` makes use of it.
"""
import argparse
import io
import json
import os
import sys
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

import data
from lib import exact, report
from lib.common import DataError, Parser, Progress, check_outputs, numeric, write_output
from lib.encoders import say_cut
from lib.processes import ALONE, loading, run, start_processes
from lib.weights import load_model
from tmass import POOLINGS, PRIORS

CUTOFFS = (1, 5, 10, 50)
# The options that are passed to `score_split` unchanged.
SETTINGS = ("skip_bad", "amp", "trials", "seed", "expected", "cache", "workers", "batch")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- encode ----
#
# The processes of a job divide the batches among them. The batches do not depend on the number of
# processes, so neither do the results.


def autocast(device, amp):
    """Context manager for the precision of the towers. amp: off, bf16 or fp16."""
    return torch.autocast(device.type, AMP[amp], enabled=amp != "off")


@torch.no_grad()
def encode_texts(model, tokenizer, captions, job=ALONE, batch=256, amp="off"):
    """captions (N) -> t (N,D), float32, on the model's device.

    With amp="bf16", the towers multiply in bfloat16, here and in `encode_videos`.
    """
    if isinstance(captions, str):  # it would pass as a list of letters
        raise TypeError("captions must be a list of str, not one str")
    device = model.clip.logit_scale.device
    t = torch.zeros(len(captions), model.clip.embed_dim, device=device)
    for rows in exact.blocks(len(captions), batch)[job.rank::job.world]:
        ids = tokenizer(captions[rows]).to(device)
        with autocast(device, amp):
            t[rows] = model.encode_text(ids)
    return job.sum(t)


def collate(items):
    """Items of VideoDataset -> (pixels (n,T,3,P,P) of the readable ones, {k: error of item k}).

    Pixels are None if no item could be read.
    """
    read, errors = data.readable(items)
    return default_collate(read) if read else None, errors


@torch.no_grad()
def encode_videos(
    model,
    segments_or_paths,
    job=ALONE,
    cache=None,
    workers=0,
    batch=16,
    bad=None,
    amp="off",
):
    """Segments or paths (V) -> f (V,T,D), float32, on the model's device; each is decoded once.

    cache: the folder of a FrameCache. A video that can't be read raises a DataError. If `bad` is a
    dict, the video's number and error message are added to it instead, and its row of f is zeros.
    """
    T = model.frames
    device = model.clip.logit_scale.device
    dataset = data.VideoDataset(segments_or_paths, T, data.transform_for(model.clip), cache)
    V = len(dataset.segments)
    f = torch.zeros(V, T, model.clip.embed_dim, device=device)
    batches = [range(V)[rows] for rows in exact.blocks(V, batch)]
    mine = batches[job.rank::job.world]
    progress = Progress("encoding", V, enabled=job.rank == 0)
    failed = {}
    with loading(dataset, mine, collate, workers, pin=device.type == "cuda") as loader:
        for rows, (pixels, errors) in zip(mine, loader):
            failed |= {rows[k]: error for k, error in errors.items()}
            if failed and bad is None:
                break
            if pixels is not None:
                read = [v for v in rows if v not in failed]
                pixels = pixels.to(device, non_blocking=True)
                with autocast(device, amp):
                    f[read] = model.encode_video(pixels)
            progress.update(rows[-1] + 1)
    # Every process gets all errors: one that saw none would wait for the others forever.
    failed = dict(sorted(job.join(list(failed.items()))))
    if bad is not None:
        bad.update(failed)
    elif failed:
        raise DataError(next(iter(failed.values())))
    return job.sum(f)


# ---- score ----


@torch.no_grad()
def score_all(model, t, f, job=ALONE, **scoring):
    """Scores of all pairs. t (N,D), f (V,T,D) -> sims (N,V). scoring: arguments of exact.score."""
    sims = t.new_zeros(len(t), len(f))
    # A score depends only on its text and its video, so any process can compute any column.
    for columns in exact.blocks(len(f), 128)[job.rank::job.world]:
        sims[:, columns] = exact.score(model, t, f[columns], **scoring)
    return job.sum(sims)


@torch.no_grad()
def released_scores(model, t, f, caption_of, trials=20, seed=24):
    """LEAKING: the scores of the released evaluation. t (N,D), f (V,T,D) -> sims (N,V).

    caption_of (V,): the number of each video's own text. The sample is chosen honestly, with the
    video pooled by text i: m* = argmax_m cos(t_i + R_ij·ε_m, psi(f_j | t_i)). But it is scored
    with the video pooled by its own caption: cos(t_i + R_ij·ε_m*, psi(f_j | t_caption(j))).

    This differs from the released code only in the noise: all pairs share the same samples, while
    the released code draws new ones for each pair.
    """
    head = torch.nn.ModuleList([model.pool, model.radius]).eval()  # dropout is for training
    eps = torch.zeros_like(t[:1])  # the point text
    if trials:
        eps = model.noise(trials, seed).to(t)
    sims = t.new_empty(len(t), len(f))
    for videos in exact.blocks(len(f), 4):
        f_j = f[videos]
        own = model.pool(t[caption_of[videos]], f_j).diagonal()      # psi(f_j | t_caption(j)) (D,V)
        v = model.pool(t, f_j).transpose(0, 1)                       # psi(f_j | t_i)        (V,N,D)
        R = model.radius(exact.similarities(t, f_j))                 #                       (V,N,D)
        honest = exact.sample_cosines(t, v, R, eps)                  #                       (V,N,M)
        leaking = exact.sample_cosines(t, own.T[:, None], R, eps)    #                       (V,N,M)
        best = honest.argmax(-1, keepdim=True)                       # m*                    (V,N,1)
        sims[:, videos] = leaking.gather(-1, best).squeeze(-1).T
    head.train(model.training)
    return sims


# ---- ranks ----


def lowest_if_nan(x):
    """Replace NaN by -inf, so that a score that is not a number never ranks first."""
    return x.masked_fill(x.isnan(), -torch.inf)


def tied_rank(scores, own, dim):
    """Rank of `own`, one of the scores along dim: 1 + number above + half the number of ties."""
    above = (scores > own).sum(dim)
    tied = (scores == own).sum(dim) - 1
    return 1 + above + tied.double() / 2


def ranks(sims, owner):
    """Ranks of the correct matches. sims (N,V), owner (N,) -> t2v (N,), v2t (V,), float64, from 1.

    t2v: each text ranks all videos. v2t, as in the published tables: each video w ranks all videos
    v by the best score between w and a caption of v. A video without captions is left out of this
    ranking, and its own v2t rank is NaN; in t2v it counts like any other.
    """
    # On the CPU, because Apple's GPUs (--device mps) have no float64.
    sims = lowest_if_nan(sims.cpu())
    owner = torch.as_tensor(owner).cpu()
    N, V = sims.shape
    own = sims.gather(1, owner[:, None])      # each text with its own video           (N,1)
    t2v = tied_rank(sims, own, dim=1)

    best = sims.new_full((V, V), -torch.inf)  # best caption of v (rows) for w (columns)
    rows = owner[:, None].expand(N, V)
    best = best.scatter_reduce(0, rows, sims, "amax")
    described = owner.unique()
    ranked = tied_rank(best[described], best.diagonal(), dim=0)
    v2t = torch.full((V,), torch.nan, dtype=torch.float64)
    v2t[described] = ranked[described]
    return t2v, v2t


# ---- metrics ----


def metrics(ranks):
    """ranks (n,), from 1; NaN is ignored -> dict(R1, R5, R10, R50 in percent, MdR, MnR)."""
    ranks = torch.as_tensor(ranks, dtype=torch.float64)
    ranks = ranks[~ranks.isnan()]
    found = {f"R{k}": 100 * (ranks <= k).double().mean().item() for k in CUTOFFS}
    return found | dict(MdR=ranks.quantile(0.5).item(), MnR=ranks.mean().item())


def dsl(sims, dim=0):
    """Dual softmax: weight a score by how much its candidate prefers this query. (N,V) -> (N,V).

    dim: the axis of the queries, 0 for t2v and 1 for v2t. The method is transductive: it uses all
    queries at once, while a search has only one. A negative score falls with the weight: there, the
    preference counts the wrong way round.
    """
    return sims * (100 * sims).softmax(dim)


def measure(sims, owner):
    """Metrics in both directions. sims (N,V), owner (N,) -> dict(t2v, v2t)."""
    t2v, v2t = ranks(sims, owner)
    return dict(t2v=metrics(t2v), v2t=metrics(v2t))


def format_metrics(result):
    """The result of `evaluate` in one line."""
    line = "{} R@1 {R1:.1f}  R@5 {R5:.1f}  R@10 {R10:.1f}  MdR {MdR:g}  MnR {MnR:.1f}"
    parts = [line.format(way, **result[way]) for way in ("t2v", "v2t")]
    parts.append(f"({result['texts']} texts, {result['videos']} videos)")
    return "   ".join(parts)


# ---- a whole split ----


class Scored(NamedTuple):
    """A split's embeddings and scores."""
    t: torch.Tensor        # (N,D)
    f: torch.Tensor        # (V,T,D)
    sims: torch.Tensor     # (N,V)
    ann: data.Annotations  # without the videos that can't be read
    left_out: list         # the error message of each of those
    scoring: dict          # trials, seed, expected


def say_left_out(job, what, ann):
    job.say(f"--skip-bad: {what} videos left out; {len(ann.captions)} texts, "
            f"{len(ann.segments)} videos remain")


def score_split(
    model,
    tokenizer,
    ann,
    job=ALONE,
    skip_bad=False,
    amp="off",
    trials=20,
    seed=24,
    expected=False,
    cache=None,
    workers=0,
    batch=16,
    name="the model",
):
    """Encode and score. Annotations -> Scored. name: what error messages call the model.

    cache, workers, batch: as for `encode_videos`. trials, seed, expected: as for `exact.score`.
    """
    scoring = dict(trials=trials, seed=seed, expected=expected)
    training = [part for part in model.modules() if part.training]
    model.eval()
    bad = {}
    f = encode_videos(model, ann.segments, job, cache, workers, batch, bad if skip_bad else None,
                      amp)
    if bad:
        readable = [v for v in range(len(f)) if v not in bad]
        f = f[readable]
        ann = ann.take(readable)
        say_left_out(job, f"{len(bad)} unreadable", ann)
    if not ann.captions:
        raise DataError("nothing to evaluate: no caption has a video that can be read")
    # Equal texts are scored once, so that they tie exactly.
    row = {caption: i for i, caption in enumerate(dict.fromkeys(ann.captions))}
    t = encode_texts(model, tokenizer, list(row), job, amp=amp)
    rows = [row[caption] for caption in ann.captions]
    sims = score_all(model, t, f, job, **scoring)
    if not sims.isfinite().all():
        raise DataError(f"{name}: some scores are not finite numbers, so nothing can be ranked: "
                           "its weights are damaged, or its training failed")
    for part in training:  # not all of it, where --freeze-clip leaves CLIP as it is
        part.training = True
    return Scored(t[rows], f, sims[rows], ann, list(bad.values()), scoring)


def summarise(model, scored, with_dsl=False, released=False):
    """Scored -> dict(t2v, v2t: metrics; texts, videos, settings; dsl, released_protocol, ...)."""
    owner = scored.ann.owner
    sims = scored.sims
    result = measure(sims, owner)
    result["texts"], result["videos"] = sims.shape
    result["left_out"] = scored.left_out
    result.update(model.config, prior=model.prior, prior_std=model.prior_std)
    result.update(scored.scoring)
    if with_dsl:
        by_text = measure(dsl(sims, 0), owner)
        by_video = measure(dsl(sims, 1), owner)
        result["dsl"] = dict(t2v=by_text["t2v"], v2t=by_video["v2t"])
    if released:
        result.update(released_protocol(model, scored))
    return result


def released_protocol(model, scored):
    """What the released, LEAKING evaluation reports. -> dict(released_protocol, first_captions).

    It is defined for one caption per video, so only the first of each video is used.
    first_captions: the honest metrics of the same pairs, if a video has more captions or none.
    """
    first = {}
    for i, v in enumerate(scored.ann.owner):
        first.setdefault(v, i)
    videos = sorted(first)
    texts = [first[v] for v in videos]
    own = torch.arange(len(videos))
    scoring = scored.scoring
    leaking = released_scores(model, scored.t[texts], scored.f[videos], own, scoring["trials"],
                              scoring["seed"])
    rows = dict(measure(leaking, own), texts=len(texts), videos=len(videos))
    out = dict(released_protocol=rows)
    if scored.sims.shape != leaking.shape:
        out["first_captions"] = measure(scored.sims[texts][:, videos], own)
    return out


def evaluate(model, tokenizer, ann, with_dsl=False, released=False, **settings):
    """Annotations -> the dict of `summarise`. settings: arguments of `score_split`."""
    scored = score_split(model, tokenizer, ann, **settings)
    return summarise(model, scored, with_dsl, released)


# ---- command line ----


def add_run(p):
    """Add the options that evaluation and search share. -> their group"""
    g = p.add_argument_group("run")
    g.add_argument("--amp", choices=("off", "bf16"), default="off",
                   help="bf16: encode in bfloat16, about 3 times as fast where CPU or GPU has it; "
                        "scores move by about 3e-4 (default: %(default)s)")
    g.add_argument("--json", metavar="FILE", help="write the result there too")
    g.add_argument("--batch", metavar="N", type=numeric(int, 1, 10 ** 6), default=16,
                   help="videos encoded at once (default: %(default)s)")
    g.add_argument("--workers", metavar="N", type=numeric(int, 0, 1000),
                   help="processes that decode videos (default: one per core, at most 8)")
    g.add_argument("--device",
                   help="cpu, cuda or mps (default: cuda where there is a GPU, else cpu)")
    return g


def say_loaded(args, model, job, unfinished=None):
    """Print what was loaded and how it scores."""
    settings = [f"{args.ckpt}: T={model.frames}, pooling {model.config['pooling']}, radius "
                f"{model.config['radius']}"]
    if model.config["radius"] != "none" and args.trials:  # otherwise nothing is sampled
        std = f" (std {model.prior_std:g})" if model.prior == "normal" else ""
        noise = "their best on average, in closed form" if args.expected else f"seed {args.seed}"
        settings += [f"{args.trials} samples", f"prior {model.prior}{std}", noise]
    if unfinished:
        settings.append(f"unfinished: {unfinished}")
    job.say(f"{', '.join(settings)}, on {job.device}")


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--ckpt", metavar="NAME", default="model.pt",
                   help="a checkpoint of train.py, a released T-MASS or X-Pool one, or a CLIP: "
                        "ViT-B/32 or the like, or a file (default: %(default)s)")
    p.add_argument("--data", metavar="NAME",
                   help="name of a data set or path of a .csv (default: what --ckpt trained on)")
    p.add_argument("--root", metavar="DIR",
                   help="folder of the data set (default: as in training; for a .csv, its own)")
    p.add_argument("--videos", metavar="DIR",
                   help="folder of its videos (default: as in training, or within --root)")
    p.add_argument("--split", choices=(*data.SPLITS, "all"),
                   help="(default: test; all of a .csv without that column that --ckpt did not "
                        "train on)")
    p.add_argument("--dsl", action="store_true",
                   help="add rows with dual softmax, which uses all queries at once")
    p.add_argument("--released-protocol", action="store_true",
                   help="add what the released, LEAKING evaluation reports")
    p.add_argument("--analyze", action="store_true",
                   help="add 95%% intervals, relevant against irrelevant pairs, recall by video "
                        "complexity")
    g = p.add_argument_group("scoring")
    g.add_argument("--trials", metavar="M", type=numeric(int, 0, 10 ** 5), default=20,
                   help="samples of the text mass; 0: the point text (default: %(default)s)")
    g.add_argument("--expected", default=False, action=argparse.BooleanOptionalAction,
                   help="score by the average best of M in closed form, without noise")
    g.add_argument("--seed", type=numeric(int, 0, 2 ** 63 - 1), default=24,
                   help="of the samples (default: %(default)s)")
    g.add_argument("--prior", choices=PRIORS,
                   help="of the samples (default: as trained; released code: uniform)")
    g.add_argument("--prior-std", type=numeric(float, 0, 1e6),
                   help="of the normal prior (default: as trained; released for LSMDC: 0.003)")
    g.add_argument("--pooling", choices=POOLINGS,
                   help="how frames become a video; mean and query need no weights (default: as "
                        "trained; CLIP: query)")
    g.add_argument("--frames", metavar="T", type=numeric(int, 1, 1000),
                   help="frames sampled per video, where the radius is not tied to the number in "
                        "training, as linear is (default: as trained)")
    g = add_run(p)
    g.add_argument("--report", metavar="FILE",
                   help="write a page to look at: one .html file with frames and settings")
    g.add_argument("--save", metavar="FILE",
                   help="write similarities, ranks, embeddings, captions and segments there")
    g.add_argument("--cache", metavar="DIR",
                   help="keep every video's sampled frames there as JPEG (default: where training "
                        "kept those of the same data set)")
    g.add_argument("--skip-bad", action="store_true",
                   help="leave unreadable videos out and count them, instead of stopping")
    args = p.parse_args(argv)
    if args.json == "-":
        p.error("--json -: eval.py prints its table there; give the name of a file")
    return args


def as_trained(args, config, job):
    """Fill in what is not given in args with what was used in training, on the same data set."""
    cache = args.cache
    for name in ("data", "root", "videos", "cache"):
        if getattr(args, name) is None and isinstance(config.get(name), str):
            setattr(args, name, config[name])
    # The frames in training's cache are JPEG: only with them are its numbers reproduced exactly.
    if args.cache != cache and not os.path.isdir(args.cache):
        job.say(f"{args.cache}, where training kept its frames, is gone: numbers can differ a "
                "little from training's, whose frames were compressed as JPEG")
        args.cache = None


def load_data(args, config, job):
    """Load the requested split. -> (Annotations, number of missing videos)."""
    trained_on = config.get("data")
    if not (args.data or trained_on):
        raise DataError(f"{args.ckpt} does not say which data set it was trained on: "
                        "give --data and --root")
    # Training records the absolute path of a .csv.
    same = args.data is None or trained_on in (args.data, os.path.abspath(args.data))
    if same:
        as_trained(args, config, job)
    if args.split is None:  # if it is another .csv, none of its rows was used in training
        whole = args.data.endswith(".csv") and not data.tables.has_splits(args.data)
        args.split = "all" if whole and not same else "test"
    ann = data.load_split(
        args.data,
        args.root,
        args.split,
        config.get("val_videos", 0),
        config.get("seed", 24),
        args.videos,
    )
    if not ann.captions:
        raise DataError(f"{args.data} has no caption in split {args.split}: choose another --split")
    ann, missing = data.present(ann, args.skip_bad)
    if missing:
        say_left_out(job, f"{len(missing)} missing", ann)
    return ann, len(missing)


def write_results(args, model, scored, result, job):
    """Write the output of --analyze, --report, --json and --save. Adds the analysis to result."""
    t, f, sims, ann, *_ = scored
    t2v, v2t = ranks(sims, ann.owner)
    if args.analyze or args.report:
        analysis = report.analyze(model, scored, t2v, v2t)
    if args.analyze:
        result["analysis"] = analysis
        job.say("\n" + report.analysis_text(analysis))
    if args.json:
        write_output("--json", args.json, json.dumps(result, indent=1))
    if args.save:
        # The metrics, and all that they are computed from, as plain tensors and lists.
        content = dict(
            format="tmass scores",
            sims=sims.cpu(),
            t=t.cpu(),
            f=f.cpu(),
            owner=torch.tensor(ann.owner),
            t2v_ranks=t2v,
            v2t_ranks=v2t,
            captions=ann.captions,
            clips=[list(segment) for segment in ann.segments],  # path, start, end
            result=result,
        )
        file = io.BytesIO()
        torch.save(content, file)
        write_output("--save", args.save, file.getvalue())
    if args.report:
        report.write_report(args.report, result, analysis, scored, t2v)
        job.say(f"report: {args.report}")


def main(argv=None):
    args = parse_args(argv)
    job = start_processes(args.device)
    outputs = {f"--{name}": getattr(args, name) for name in ("json", "report", "save")}
    check_outputs(outputs, [args.ckpt])
    model, tokenizer, config = load_model(
        args.ckpt, job, args.pooling, args.frames, args.prior, args.prior_std)
    say_loaded(args, model, job, config.get("unfinished"))
    ann, missing = load_data(args, config, job)
    tables = args.data if args.data.endswith(".csv") else args.root
    videos = [segment.path for segment in ann.segments]
    check_outputs(outputs, [args.ckpt, tables or data.default_root(args.data), *videos])
    say_cut(job, tokenizer, ann.captions, args.split)
    settings = {name: getattr(args, name) for name in SETTINGS}
    scored = score_split(model, tokenizer, ann, job, name=args.ckpt, **settings)
    result = summarise(model, scored, args.dsl, args.released_protocol)
    for name in ("ckpt", "data", "split", "amp"):
        result[name] = getattr(args, name)
    result["missing"] = missing
    if "unfinished" in config:
        result["unfinished"] = config["unfinished"]
    job.say(f"{args.data}, split {args.split}: {report.metrics_text(result)}")
    if args.data == "shapes" and args.split == "test":
        ceiling = data.shapes.shapes_ceiling(args.root)
        if ceiling is not None:
            result["ceiling"] = ceiling
            job.say(f"oracle ceiling of t2v R@1: {ceiling:.1f} (a caption can fit several videos)")
    # After the table, so that the numbers are shown even if a file can't be written.
    if job.rank == 0:
        write_results(args, model, scored, result, job)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
