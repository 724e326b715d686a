"""Evaluate a checkpoint: encode -> score -> ranks -> metrics.

    python eval.py --ckpt model.pt                                    # on what it was trained for
    python eval.py --ckpt model.pt --data my.csv --root videos/       # on another data set
    python eval.py --ckpt ViT-B/32 --data msrvtt --pooling mean       # CLIP: are the data right?
    python eval.py --ckpt best.pth --data msrvtt --released-protocol  # with the published number
    python eval.py --ckpt model.pt --analyze --report report.html     # what lies behind the numbers

The file follows the data: N texts t (N,D) and V videos f (V,T,D) of T frames, scores sims (N,V).
Nothing above `ranks` sees `owner` (N,), the number of the video that each text describes.
"""
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
from lib import exact
from lib.check import say_cut
from lib.common import DataError, Parser, Progress, WeightsError, output
from lib.options import add_common, load_model, read_features, write_json
from lib.processes import ALONE, loading, run, start_processes
from lib.report import analysis_text, analyze, metrics_text, write_report
from lib.shapes import shapes_ceiling
from lib.tables import has_splits
from lib.video import FrameCache, Segment, as_segment

CUTOFFS = (1, 5, 10, 50)

# ---- encode ----
#
# The processes of a job share the batches out. A batch is the same whatever their number, and so
# are the results.


def blocks(n, size):
    """The slices that cut n rows into blocks of `size` rows."""
    return [slice(start, start + size) for start in range(0, n, size)]


def refuse_lone(name, value, kinds, wanted):
    """Raise a TypeError for one item in place of a list: a str is also a list of its letters."""
    if isinstance(value, kinds):
        raise TypeError(f"{name} must be a list of {wanted}, and is one {type(value).__name__}")


@torch.no_grad()
def encode_texts(model, tokenizer, captions, job=ALONE, batch=256, amp="off"):
    """captions (N) -> t (N,D), float32, on the model's device.

    amp="bf16": the towers multiply in bfloat16, here and in `encode_videos`.
    """
    refuse_lone("captions", captions, str, "str")
    device = model.clip.logit_scale.device
    t = torch.zeros(len(captions), model.clip.embed_dim, device=device)
    for rows in blocks(len(captions), batch)[job.rank::job.world]:
        ids = tokenizer(captions[rows]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
            t[rows] = model.encode_text(ids)
    return job.sum(t)


def collate(items):
    """Items of VideoDataset -> (pixels (n,T,3,P,P) of those that could be read, {k: error}).

    Pixels are None where no item could be read.
    """
    errors = {k: str(x) for k, x in enumerate(items) if isinstance(x, DataError)}
    read = [x for k, x in enumerate(items) if k not in errors]
    return torch.stack(read) if read else None, errors


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

    cache: the folder of a FrameCache. A video that can't be read raises its DataError; with a dict
    as `bad` the message goes there, by the video's number, and its row of f is zeros.
    """
    kinds = (Segment, str, os.PathLike)
    refuse_lone("segments_or_paths", segments_or_paths, kinds, "Segment, str or Path")
    segments = [as_segment(x) for x in segments_or_paths]
    V = len(segments)
    T = model.frames
    device = model.clip.logit_scale.device
    f = torch.zeros(V, T, model.clip.embed_dim, device=device)
    transform = data.transform_for(model.clip)
    frame_cache = FrameCache(cache, T) if cache else None
    dataset = data.VideoDataset(segments, T, transform, frame_cache)
    batches = [range(V)[rows] for rows in blocks(V, batch)]
    mine = batches[job.rank::job.world]
    workers = min(workers, len(mine))
    progress = Progress("encoding", V, enabled=job.rank == 0)
    failed = {}
    with loading(dataset, mine, collate, workers, pin=device.type == "cuda") as loader:
        for rows, (pixels, errors) in zip(mine, loader):
            for k, error in errors.items():
                failed[rows[k]] = error
            if failed and bad is None:
                break
            read = [v for v in rows if v not in failed]
            if read:
                pixels = pixels.to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                    f[read] = model.encode_video(pixels)
            progress.update(rows[-1] + 1)
    # All processes hear of an error: those without one would wait for the others for ever.
    failed = job.join(list(failed.items()))
    failed = dict(sorted(failed))
    if bad is not None:
        bad.update(failed)
    elif failed:
        raise DataError(next(iter(failed.values())))
    return job.sum(f)


# ---- score ----


@torch.no_grad()
def score_all(model, t, f, job=ALONE, trials=20, seed=24, expected=False):
    """The scores of all pairs, float32. t (N,D), f (V,T,D) -> sims (N,V)."""
    sims = t.new_zeros(len(t), len(f))
    # A score depends on its text and its video alone, so columns can be computed anywhere.
    for columns in blocks(len(f), 128)[job.rank::job.world]:
        sims[:, columns] = exact.score(model, t, f[columns], trials, seed, expected)
    return job.sum(sims)


@torch.no_grad()
def released_scores(model, t, f, caption_of, trials=20, seed=24):
    """LEAKING: what the released evaluation ranks by. t (N,D), f (V,T,D) -> sims (N,V).

    caption_of (V,): the text of each video. The honestly pooled video picks the sample,
    m* = argmax_m cos(t_i + R_ij·ε_m, psi(f_j | t_i)), and that sample is scored with the video as
    pooled by its own caption, cos(t_i + R_ij·ε_m*, psi(f_j | t_caption(j))), whatever text i says.
    Differs from the released code: all pairs share the noise, which is drawn for each one there.
    """
    eps = t.new_zeros(1, t.shape[1])  # the point text
    if trials:
        eps = model.noise(trials, seed).to(t.device)
    unit_t = F.normalize(t, dim=-1)
    unit_f = F.normalize(f, dim=-1)
    sims = t.new_empty(len(t), len(f))
    for columns in blocks(len(f), 32):
        own_t = t[caption_of[columns]]
        own = model.pool(own_t, f[columns]).diagonal().T      # psi(f_j | t_caption(j))  (V,D)
        for rows in blocks(len(t), 64):
            S = torch.einsum("nd,vtd->nvt", unit_t[rows], unit_f[columns])
            R = model.radius(S)
            v = model.pool(t[rows], f[columns])               # psi(f_j | t_i)         (N,V,D)
            t_i = t[rows, None]
            honest = exact.sample_cosines(t_i, v, R, eps)           #                        (N,V,M)
            leaking = exact.sample_cosines(t_i, own, R, eps)
            best = honest.argmax(-1, keepdim=True)            # m*                     (N,V,1)
            sims[rows, columns] = leaking.gather(-1, best).squeeze(-1)
    return sims


# ---- ranks ----


def lowest_if_nan(x):
    """A score that is not a number counts as the lowest: it ranks at chance, not first."""
    return x.masked_fill(x.isnan(), -torch.inf)


def tied_rank(scores, own, dim):
    """The rank of `own`, one of the scores along dim: 1 + those above + half of those that tie."""
    above = (scores > own).sum(dim)
    tied = (scores == own).sum(dim) - 1
    return 1 + above + tied.double() / 2


def ranks(sims, owner):
    """Ranks of the right answers, from 1, float64. sims (N,V), owner (N,) -> t2v (N,), v2t (V,).

    t2v: each text ranks the videos. v2t, as in the published tables: each video ranks the videos
    by the best score that a caption of theirs has with it. One without captions is no such rival
    and has the rank NaN, but every text ranks it.
    """
    # On the CPU: Apple's GPUs (--device mps) have no float64.
    sims = lowest_if_nan(sims.cpu())
    owner = torch.as_tensor(owner).cpu()
    N, V = sims.shape
    own = sims.gather(1, owner[:, None])      # each text with its video               (N,1)
    t2v = tied_rank(sims, own, dim=1)

    best = sims.new_full((V, V), -torch.inf)  # of the captions of video v, with w     (V,V)
    rows = owner[:, None].expand(N, V)
    best = best.scatter_reduce(0, rows, sims, "amax")
    described = owner.unique()
    ranked = tied_rank(best[described], best.diagonal(), dim=0)
    v2t = torch.full((V,), torch.nan, dtype=torch.float64)
    v2t[described] = ranked[described]
    return t2v, v2t


# ---- metrics ----


def metrics(ranks):
    """ranks (n,), from 1, NaN for none -> dict(R1, R5, R10, R50: percent, MdR, MnR)."""
    ranks = torch.as_tensor(ranks, dtype=torch.float64)
    ranks = ranks[~ranks.isnan()]
    found = {}
    for k in CUTOFFS:
        hits = (ranks <= k).double()
        found[f"R{k}"] = 100 * hits.mean().item()
    found["MdR"] = ranks.quantile(0.5).item()
    found["MnR"] = ranks.mean().item()
    return found


def dsl(sims, dim=0):
    """Dual softmax: a score counts more where the candidate prefers this query. (N,V) -> (N,V).

    dim: the axis of the queries, 0 for t2v, 1 for v2t. It is transductive: all queries are used at
    once, where a search has one.
    """
    return sims * (100 * sims).softmax(dim)


def measure(t2v_sims, owner, v2t_sims=None):
    """The metrics of scores, the same for both ways unless given. (N,V) -> dict(t2v, v2t)."""
    t2v, v2t = ranks(t2v_sims, owner)
    if v2t_sims is not None:
        _, v2t = ranks(v2t_sims, owner)
    return dict(t2v=metrics(t2v), v2t=metrics(v2t))


def format_metrics(result):
    """The result of `evaluate` in one line."""
    parts = []
    for way in ("t2v", "v2t"):
        m = result[way]
        parts.append(f"{way} R@1 {m['R1']:.1f}  R@5 {m['R5']:.1f}  R@10 {m['R10']:.1f}  "
                     f"MdR {m['MdR']:g}  MnR {m['MnR']:.1f}")
    parts.append(f"({result['texts']} texts, {result['videos']} videos)")
    return "   ".join(parts)


# ---- a whole split ----


class Scored(NamedTuple):
    """A split's embeddings and scores."""
    t: torch.Tensor        # (N,D)
    f: torch.Tensor        # (V,T,D)
    sims: torch.Tensor     # (N,V)
    ann: data.Annotations  # without the videos that can't be read
    left_out: list         # what is wrong with each of those
    scoring: dict          # trials, seed, expected


def say_left_out(job, what, ann):
    job.say(f"--skip-bad: {what} videos left out; {len(ann.captions)} texts, "
            f"{len(ann.segments)} videos remain")


def score_split(
    model,
    tokenizer,
    ann,
    job=ALONE,
    workers=0,
    skip_bad=False,
    cache=None,
    batch=16,
    amp="off",
    name="the model",
    trials=20,
    seed=24,
    expected=False,
    features=None,
):
    """Encode and score. Annotations -> Scored. name: of the model, for errors.

    features: t (N,D) and f (V,T,D), where they are made already.
    """
    scoring = dict(trials=trials, seed=seed, expected=expected)
    training = model.training
    model.eval()
    bad = {} if skip_bad else None
    # Equal texts are scored once: so they tie exactly.
    if features:
        t, f = features
        t, rows = t.unique(dim=0, return_inverse=True)
    else:
        f = encode_videos(model, ann.segments, job, cache, workers, batch, bad, amp)
        if bad:
            readable = [v for v in range(len(f)) if v not in bad]
            f = f[readable]
            ann = ann.take(readable)
            say_left_out(job, f"{len(bad)} unreadable", ann)
        if not ann.captions:
            raise DataError("nothing to evaluate: no caption has a video that can be read")
        row = {caption: i for i, caption in enumerate(dict.fromkeys(ann.captions))}
        t = encode_texts(model, tokenizer, list(row), job, amp=amp)
        rows = [row[caption] for caption in ann.captions]
    sims = score_all(model, t, f, job, **scoring)
    wrong = (~sims.isfinite()).sum().item()
    if wrong:
        raise WeightsError(f"{name}: {wrong} of {sims.numel()} scores are not finite numbers, so "
                           "nothing can be ranked: its weights are damaged, or its training failed")
    model.train(training)
    left_out = list(bad.values()) if bad else []
    return Scored(t[rows], f, sims[rows], ann, left_out, scoring)


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
        result["dsl"] = measure(dsl(sims, 0), owner, dsl(sims, 1))
    if released:
        result.update(released_protocol(model, scored))
    return result


def released_protocol(model, scored):
    """What the released, LEAKING evaluation reports. -> dict(released_protocol, first_captions).

    It is defined for one caption per video, so it takes each video's first. first_captions: the
    honest metrics of those, where a video has more or none.
    """
    first = {}
    for i, v in enumerate(scored.ann.owner):
        first.setdefault(v, i)
    videos = sorted(first)
    texts = [first[v] for v in videos]
    t = scored.t[texts]
    f = scored.f[videos]
    own = torch.arange(len(videos))
    scoring = scored.scoring
    leaking = released_scores(model, t, f, own, scoring["trials"], scoring["seed"])
    out = dict(released_protocol=measure(leaking, own))
    out["released_protocol"].update(texts=len(texts), videos=len(videos))
    if scored.sims.shape != leaking.shape:
        honest = scored.sims[texts][:, videos]
        out["first_captions"] = measure(honest, own)
    return out


def evaluate(model, tokenizer, ann, with_dsl=False, released=False, **settings):
    """Annotations -> the dict of `summarise`. settings: job, workers, ... of `score_split`."""
    scored = score_split(model, tokenizer, ann, **settings)
    return summarise(model, scored, with_dsl, released)


# ---- command line ----


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--ckpt", default="model.pt",
        help="a checkpoint of train.py, a released T-MASS or X-Pool one, or a CLIP: "
             "ViT-B/32 or the like, or a file (default: %(default)s)")
    add("--data",
        help="name of a data set or path of a .csv (default: what --ckpt trained on)")
    add("--root",
        help="folder of the data set (default: as in training; for a .csv, its own)")
    add("--videos", metavar="DIR",
        help="folder of its videos (default: as in training, or within --root)")
    add("--split", choices=(*data.SPLITS, "all"),
        help="(default: test; all of a .csv without that column that --ckpt did not "
             "train on)")
    add("--features", metavar="FILE",
        help="score features made elsewhere, of torch.save: t (N,D), f (V,T,D) and "
             "owner (N,), the number of each text's video, as --save writes them")
    add("--dsl", action="store_true",
        help="add rows with dual softmax, which uses all queries at once")
    add("--released-protocol", action="store_true",
        help="add what the released, LEAKING evaluation reports")
    add("--analyze", action="store_true",
        help="add 95%% intervals, relevant against irrelevant pairs, recall by video "
             "complexity and caption length")
    add = add_common(p)
    add("--save", metavar="FILE",
        help="write similarities, ranks, embeddings, captions and segments there")
    add("--cache", metavar="DIR",
        help="keep every video's sampled frames there as JPEG (default: where training "
             "kept those of the same data set)")
    add("--skip-bad", action="store_true",
        help="leave unreadable videos out and count them (default: stop)")
    args = p.parse_args(argv)
    if args.json == "-":
        p.error("--json -: eval.py prints its table there; give the name of a file")
    if args.features and (args.data or args.frames):
        p.error("--features takes the place of --data and --frames")
    return args


def as_trained(args, config, job):
    """What is not given in args becomes what it was in training, on the same data set."""
    cache = args.cache
    for name in ("data", "root", "videos", "cache"):
        if getattr(args, name) is None and isinstance(config.get(name), str):
            setattr(args, name, config[name])
    # Frames from training's cache went through JPEG: with them training's numbers come out again.
    if args.cache != cache and not os.path.isdir(args.cache):
        job.say(f"{args.cache}, where training kept its frames, is gone: numbers can differ a "
                "little from training's, whose frames went through JPEG")
        args.cache = None


def load_data(args, config, job):
    """The split that is asked for. -> (Annotations, the number of missing videos)."""
    trained_on = config.get("data")
    if not (args.data or trained_on):
        raise DataError(f"{args.ckpt} does not say which data set it was trained on: "
                        "give --data and --root")
    # Training keeps the absolute path of a .csv.
    same = args.data is None or trained_on in (args.data, os.path.abspath(args.data))
    if same:
        as_trained(args, config, job)
    if args.split is None:  # no row of another .csv was trained on
        whole = args.data.endswith(".csv") and not has_splits(args.data)
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


def save_scores(path, scored, t2v, v2t, result):
    """Everything that the metrics are computed from, and they, as plain tensors and lists."""
    content = dict(
        format="tmass scores",
        sims=scored.sims.cpu(),
        t=scored.t.cpu(),
        f=scored.f.cpu(),
        owner=torch.tensor(scored.ann.owner),
        t2v_ranks=t2v,
        v2t_ranks=v2t,
        captions=scored.ann.captions,
        clips=[list(segment) for segment in scored.ann.segments],  # path, start, end
        result=result,
    )
    with output("--save", path) as part, open(part, "wb") as file:
        torch.save(content, file)


def write_results(args, model, scored, result, job):
    """--analyze, --report, --json and --save. The result gets the analysis."""
    t2v, v2t = ranks(scored.sims, scored.ann.owner)
    if args.analyze or args.report:
        analysis = analyze(model, scored, t2v, v2t)
    if args.analyze:
        result["analysis"] = analysis
        job.say("\n" + analysis_text(analysis))
    if args.report:
        log = os.path.splitext(args.ckpt)[0] + ".log.csv"
        write_report(args.report, model, result, analysis, scored, t2v, log)
        job.say(f"report: {args.report}")
    if args.json:
        write_json(args.json, result)
    if args.save:
        save_scores(args.save, scored, t2v, v2t, result)


def main(argv=None):
    args = parse_args(argv)
    job = start_processes(args.device)
    model, tokenizer, config = load_model(args, job)
    missing = 0
    features = None
    if args.features:
        ann, features = read_features(args.features, model)
        args.data = args.features
        args.split = "all"
    else:
        ann, missing = load_data(args, config, job)
        say_cut(job, tokenizer, ann.captions, args.split)
    scored = score_split(
        model,
        tokenizer,
        ann,
        job,
        workers=args.workers,
        skip_bad=args.skip_bad,
        cache=args.cache,
        batch=args.batch,
        amp=args.amp,
        name=args.features or args.ckpt,
        trials=args.trials,
        seed=args.seed,
        expected=args.expected,
        features=features,
    )
    result = summarise(model, scored, args.dsl, args.released_protocol)
    for name in ("ckpt", "data", "split", "amp"):
        result[name] = getattr(args, name)
    result["missing"] = missing
    job.say(f"{args.data}, split {args.split}: {metrics_text(result)}")
    ceiling = None
    if args.data == "shapes" and args.split == "test":
        ceiling = shapes_ceiling(args.root)
    if ceiling is not None:
        result["ceiling"] = ceiling
        job.say(f"oracle ceiling of t2v R@1: {ceiling:.1f} (a caption can fit several videos)")
    # After the table: if a file can't be written, the numbers are there.
    if job.rank == 0:
        write_results(args, model, scored, result, job)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
