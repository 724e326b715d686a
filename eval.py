"""Evaluate a checkpoint: encode -> score -> ranks -> metrics.

    python eval.py --ckpt model.pt                                    # the data set it was trained on
    python eval.py --ckpt model.pt --data my.csv --root videos/       # another one
    python eval.py --ckpt ViT-B/32 --data msrvtt --pooling mean       # CLIP as it is: are data and weights right?
    python eval.py --ckpt best.pth --data msrvtt --released-protocol  # a released checkpoint: its published number too
    python eval.py --ckpt model.pt --analyze --report report.html     # what lies behind the numbers, and a page

In the order of the data: what stands above `ranks` never sees `owner`, which video a caption describes.
"""
import argparse
import json
import os
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
from clip_model import WeightsError
from lib.common import check_output, numeric, output
from lib.processes import ALONE, run, start_processes
from lib.report import analysis_text, analyze, write_report
from lib.shapes import shapes_ceiling
from lib.weights import load_checkpoint
from tmass import POOLINGS, PRIORS, MeanPool, QueryPool, sample_cosines

CUTOFFS = (1, 5, 10, 50)


# ---- encode ----
# Batches are dealt out to the processes whole, and are the same whatever their number: so are the results.
# amp="bf16": the towers multiply in bfloat16; embeddings, and all that follows, are float32.

def blocks(n, size):
    """The slices that cut n rows into pieces of `size`."""
    return [slice(i, i + size) for i in range(0, n, size)]


@torch.no_grad()
def encode_texts(model, tokenizer, captions, job=ALONE, batch=256, amp="off"):
    """captions (N) -> t (N,D), on the model's device; sharded over the processes."""
    device = model.clip.logit_scale.device
    t = torch.zeros(len(captions), model.clip.config["embed_dim"], device=device)
    for rows in blocks(len(captions), batch)[job.rank::job.world]:
        ids = tokenizer(captions[rows]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
            t[rows] = model.encode_text(ids)
    return job.sum(t)


def collate(items):
    """Items of VideoDataset -> (uint8 (v,T,3,R,R) of those that could be read, or None; each one's error or None)."""
    good = [x for x in items if not isinstance(x, Exception)]
    return torch.stack(good) if good else None, [str(x) if isinstance(x, Exception) else None for x in items]


@torch.no_grad()
def encode_videos(model, clips, job=ALONE, cache=None, workers=0, batch=16, bad=None, amp="off"):
    """clips (V) -> f (V,T,D), on the model's device; each video decoded once, sharded over the processes.

    A video that can't be read raises its DataError; with bad={} its message goes there by its number, its row is zeros.
    """
    device, V, T = model.clip.logit_scale.device, len(clips), model.frames
    f = torch.zeros(V, T, model.clip.config["embed_dim"], device=device)
    transform = data.test_transform(model.clip.config["image_size"])
    dataset = data.VideoDataset(clips, T, transform, cache=data.FrameCache(cache, T) if cache else None)
    mine = [range(V)[rows] for rows in blocks(V, batch)[job.rank::job.world]]
    failed, told = {}, time.time()
    with data.loading(dataset, mine, collate, min(workers, len(mine)), pin=device.type == "cuda") as loader:
        for rows, (frames, errors) in zip(mine, loader):
            failed.update((v, e) for v, e in zip(rows, errors) if e)
            if failed and bad is None:
                break
            if frames is not None:
                read = [v for v, e in zip(rows, errors) if not e]
                with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                    f[read] = model.encode_video(frames.to(device, non_blocking=True))
            if time.time() - told > 20:
                told = time.time()
                job.say(f"encoded {rows[-1] + 1} of {V} videos")
    failed = dict(sorted(job.join(list(failed.items()))))  # an error of one process ends all of them
    if failed and bad is None:
        raise data.DataError(next(iter(failed.values())))
    if bad is not None:
        bad.update(failed)
    return job.sum(f)


# ---- score ----

@torch.no_grad()
def score_all(model, t, f, job=ALONE, trials=20, seed=24, expected=False):
    """Honest scores of all pairs, float32, sharded over the processes by videos. t (N,D), f (V,T,D) -> sims (N,V)."""
    sims = t.new_zeros(len(t), len(f))
    for columns in blocks(len(f), 128)[job.rank::job.world]:
        sims[:, columns] = model.score(t, f[columns], trials, seed, expected)
    return job.sum(sims)


@torch.no_grad()
def released_scores(model, t, f, caption_of, trials=20, seed=24):
    """LEAKING: what the released evaluation ranks by. t (N,D), f (V,T,D), caption_of (V,), a text each -> sims (N,V).

    The honestly pooled video picks the sample, m* = argmax_m cos(t_i + R_ij ε_m, psi(f_j | t_i)), and that sample is
    scored with the video as pooled by its own caption, cos(t_i + R_ij ε_m*, psi(f_j | t_caption(j))), whatever text i.
    Differs from the released code: the noise is shared by all pairs, as in `score`; there it is fresh for every pair.
    """
    eps = model.noise(trials, seed).to(t.device) if trials else t.new_zeros(1, t.shape[1])  # no noise: the point text
    sims = t.new_empty(len(t), len(f))
    for columns in blocks(len(f), 32):
        own = model.pool(t[caption_of[columns]], f[columns]).diagonal().T  # psi(f_j | its own caption)  (v,D)
        for rows in blocks(len(t), 64):
            S = torch.einsum("nd,vtd->nvt", F.normalize(t[rows], dim=-1), F.normalize(f[columns], dim=-1))
            v, r, t_i = model.pool(t[rows], f[columns]), model.radius(S), t[rows, None]
            picked = sample_cosines(t_i, v, r, eps).argmax(-1, keepdim=True)  # m*  (n,v,1)
            sims[rows, columns] = sample_cosines(t_i, own, r, eps).gather(-1, picked)[..., 0]
    return sims


# ---- ranks ----

def lowest_if_nan(x):
    """A score that is not a number counts as the lowest: it ranks at chance, not first. (...) -> (...)."""
    return x.masked_fill(x.isnan(), -torch.inf)


def tied_rank(scores, own, dim):
    """Rank of `own`, one of the scores along dim: 1 + those above + half of the others that tie. -> one axis less."""
    own = own.unsqueeze(dim)
    return 1 + (scores > own).sum(dim).double() + ((scores == own).sum(dim).double() - 1) / 2


def ranks(sims, owner):
    """Where the right answers stand, 1-based, ties averaged. sims (N,V), owner (N,) -> (t2v (N,), v2t (V,)), float64.

    t2v: each caption ranks all videos. v2t in the convention of the published tables: a video's score for another's
    captions is the maximum over them, and its own captions are ranked among the V sets. A video without captions is a
    distractor in t2v and has v2t rank NaN.
    """
    N, V = sims.shape
    sims, owner = lowest_if_nan(sims), torch.as_tensor(owner, device=sims.device)
    own = sims.gather(1, owner[:, None])[:, 0]  # each caption with its video  (N)
    t2v = torch.cat([tied_rank(sims[rows], own[rows], 1) for rows in blocks(N, 4096)])
    described = owner.unique()  # the videos that have captions
    v2t = sims.new_full((V,), torch.nan, dtype=torch.float64)
    for columns in blocks(V, 512):
        part = sims[:, columns]
        best = part.new_full((V, part.shape[1]), -torch.inf)  # [v, w]: all captions of video v with video w
        best = best.scatter_reduce(0, owner[:, None].expand_as(part), part, "amax")
        v2t[columns] = tied_rank(best[described], best.diagonal(-columns.start), 0)
    captioned = torch.zeros(V, dtype=torch.bool, device=sims.device).index_fill(0, described, True)
    return t2v.cpu(), v2t.masked_fill(~captioned, torch.nan).cpu()


def strict_v2t_ranks(sims, owner):
    """The strict v2t: rank of a video's best own caption among all N. sims (N,V), owner (N,) -> (V,), NaN without any.

    Ties are averaged: of the other captions that tie with k own ones, 1/(k+1) are expected above the first own one.
    """
    V, out = sims.shape[1], []
    sims, owner = lowest_if_nan(sims), torch.as_tensor(owner, device=sims.device)
    for columns in blocks(V, 512):
        part = sims[:, columns]
        own = owner[:, None] == torch.arange(V, device=sims.device)[columns]  # (N,v)
        best = part.masked_fill(~own, -torch.inf).amax(0)
        tied = part == best
        mine = (tied & own).sum(0).double()
        rank = 1 + (part > best).sum(0).double() + (tied & ~own).sum(0).double() / (mine + 1)
        out.append(rank.masked_fill(~own.any(0), torch.nan))
    return torch.cat(out).cpu()


# ---- metrics ----

def metrics(ranks):
    """ranks (n,), 1-based, NaN = no rank -> dict(R1, R5, R10, R50: percent, MdR, MnR)."""
    ranks = torch.as_tensor(ranks, dtype=torch.float64)
    ranks = ranks[~ranks.isnan()]
    out = {f"R{k}": 100 * (ranks <= k).double().mean().item() for k in CUTOFFS}
    return dict(out, MdR=ranks.quantile(0.5).item(), MnR=ranks.mean().item())


def dsl(sims, dim=0):
    """Dual softmax: a score weighted by how much the candidate prefers this query to the others. sims (N,V) -> (N,V).

    dim: the axis of the queries, 0 for t2v, 1 for v2t. Transductive: it uses all queries at once; a search has one.
    """
    return sims * (100 * sims).softmax(dim)


def measure(t2v_sims, owner, v2t_sims=None):
    """All metrics of a similarity matrix. (N,V), owner (N,) -> dict(t2v, v2t, v2t_strict)."""
    t2v, v2t = ranks(t2v_sims, owner)
    if v2t_sims is None:
        v2t_sims = t2v_sims
    else:
        v2t = ranks(v2t_sims, owner)[1]
    return dict(t2v=metrics(t2v), v2t=metrics(v2t), v2t_strict=metrics(strict_v2t_ranks(v2t_sims, owner)))


# ---- a whole split ----

class Split(NamedTuple):
    """What `rank_split` computed; ann: without the videos that can't be read, left_out: a message for each of those."""
    t: torch.Tensor     # (N,D)
    f: torch.Tensor     # (V,T,D)
    sims: torch.Tensor  # (N,V)
    ann: data.Annotations
    left_out: list


def rank_split(model, tokenizer, ann, job=ALONE, workers=0, skip_bad=False, cache=None, batch=16, amp="off",
               name="the model", **scoring):
    """Encode and score: Annotations -> Split. scoring: the arguments of `score_all`; name: of the model, for errors."""
    training, bad = model.training, {}
    model.eval()
    f = encode_videos(model, ann.segments, job, cache, workers, batch, bad if skip_bad else None, amp)
    if bad:
        keep = [v for v in range(len(ann.segments)) if v not in bad]
        ann, f = ann.take(keep), f[keep]
        job.say(f"--skip-bad: {len(bad)} unreadable videos left out; {len(ann.captions)} texts, "
                f"{len(ann.segments)} videos remain")
    if not ann.captions:
        raise data.DataError(f"nothing to evaluate: no caption with a readable video ({len(bad)} videos left out)")
    distinct = {c: i for i, c in enumerate(dict.fromkeys(ann.captions))}  # equal captions tie exactly, and cost once
    t = encode_texts(model, tokenizer, list(distinct), job, amp=amp)
    sims = score_all(model, t, f, job, **scoring)
    wrong = (~sims.isfinite()).sum().item()
    if wrong:
        raise WeightsError(f"{name}: {wrong} of {sims.numel()} scores are not finite numbers, nothing can be ranked: "
                           "its weights are damaged, or its training went wrong")
    if len(distinct) < len(ann.captions):
        rows = [distinct[c] for c in ann.captions]
        t, sims = t[rows], sims[rows]
    model.train(training)
    return Split(t, f, sims, ann, list(bad.values()))


def evaluate(model, tokenizer, ann, job=ALONE, trials=20, seed=24, expected=False, with_dsl=False, released=False,
             **how):
    """Annotations -> what `summarise` gives. how: the other arguments of `rank_split`."""
    split = rank_split(model, tokenizer, ann, job, trials=trials, seed=seed, expected=expected, **how)
    return summarise(model, split, trials, seed, expected, with_dsl, released)


def summarise(model, split, trials=20, seed=24, expected=False, with_dsl=False, released=False):
    """Split -> dict(t2v, v2t, v2t_strict: metrics; texts, videos, ...; if wanted, dsl and released_protocol alike)."""
    owner, sims = split.ann.owner, split.sims
    out = dict(measure(sims, owner), texts=len(owner), videos=len(split.ann.segments), left_out=split.left_out)
    out.update(model.config, prior=model.prior, prior_std=model.prior_std, trials=trials, seed=seed, expected=expected)
    if with_dsl:
        out["dsl"] = measure(dsl(sims, 0), owner, dsl(sims, 1))
    if released:
        out.update(released_protocol(model, split, trials, seed))
    return out


def released_protocol(model, split, trials, seed):
    """The released protocol, which is defined for one caption per video, on each video's first caption.

    -> dict(released_protocol: metrics; first_captions: the honest ones of these, where a video has more or none).
    """
    first = {v: i for i, v in reversed(list(enumerate(split.ann.owner)))}  # video -> its first caption
    videos = sorted(first)
    texts, own = torch.tensor([first[v] for v in videos], device=split.sims.device), range(len(videos))
    leaking = released_scores(model, split.t[texts], split.f[videos], torch.arange(len(videos)), trials, seed)
    out = dict(released_protocol=dict(measure(leaking, own), texts=len(videos), videos=len(videos)))
    if split.sims.shape != leaking.shape:
        out["first_captions"] = measure(split.sims[texts][:, videos], own)
    return out


def format_metrics(result):
    """The result of `evaluate` in one line."""
    parts = []
    for way in ("t2v", "v2t"):
        m = result[way]
        recalls = "  ".join(f"R@{k} {m[f'R{k}']:.1f}" for k in CUTOFFS[:3])
        parts.append(f"{way} {recalls}  MdR {m['MdR']:g}  MnR {m['MnR']:.1f}")
    return f"{'   '.join(parts)}   ({result['texts']} texts, {result['videos']} videos)"


def report(result):
    """The result of `evaluate` as a table."""
    def rows(part, label=""):
        for way, name in (("t2v", "t2v"), ("v2t", "v2t, max over captions"), ("v2t_strict", "v2t, strict")):
            m = part[way]
            recalls = "".join(f"{m[f'R{k}']:8.1f}" for k in CUTOFFS)
            yield f"{label + name:32s}{recalls}{m['MdR']:8g}{m['MnR']:8.1f}"
    heads = "".join(f"{head:>8s}" for head in [f"R@{k}" for k in CUTOFFS] + ["MdR", "MnR"])
    lines = [f"{result['texts']} texts, {result['videos']} videos", " " * 32 + heads, *rows(result)]
    if "dsl" in result:
        lines += ["DSL is transductive: it uses all queries at once; not comparable with the rows above",
                  *rows(result["dsl"], "DSL ")]
    if "released_protocol" in result:
        lines += ["LEAKING: the released protocol scores a video as pooled by its own ground-truth caption, whatever",
                  "the query. To compare with published numbers only. (There, each pair has noise of its own.)"]
        if "first_captions" in result:
            n = result["released_protocol"]["texts"]
            lines += [f"It is defined for one caption per video: each video's first ({n} texts); above are all.",
                      *rows(result["first_captions"], "first, honest: ")]
        lines += rows(result["released_protocol"], "LEAKING ")
    return "\n".join(lines)


# ---- command line: what evaluation and search share ----

def add_common(p, batch):
    """The options that evaluation and search share. -> the last group."""
    g = p.add_argument_group("scoring")
    g.add_argument("--trials", type=numeric(int, 0, 10 ** 5), default=20,
                   help="M, samples of the text mass; 0 scores the point text (default: %(default)s)")
    g.add_argument("--expected", action=argparse.BooleanOptionalAction, default=False,
                   help="score by the mean of the best of M, in closed form, without noise (default: %(default)s)")
    g.add_argument("--seed", type=numeric(int, 0, 2 ** 63 - 1), default=24, help="of the samples (default: 24)")
    g.add_argument("--prior", choices=PRIORS, help="of the samples (default: as trained; released code: uniform)")
    g.add_argument("--prior-std", type=numeric(float, 0, 1e6),
                   help="of the normal prior (default: as trained; released code for LSMDC: 0.003)")
    g.add_argument("--pooling", choices=POOLINGS,
                   help="how frames become a video; mean and query need no weights (default: as trained; CLIP: query)")
    g = p.add_argument_group("run")
    g.add_argument("--activation", choices=("quickgelu", "gelu"),
                   help="of CLIP, where the guess that is printed is wrong: OpenAI's is quickgelu, LAION's gelu")
    g.add_argument("--amp", choices=("off", "bf16"), default="off",
                   help="bf16: encode in bfloat16, about 3 times as fast where CPU or GPU has it; scores move by about "
                        "3e-4 (default: %(default)s)")
    g.add_argument("--json", metavar="FILE", help="write the result there too")
    g.add_argument("--report", metavar="FILE", help="write a page to look at: one .html file with frames and settings")
    g.add_argument("--batch", type=numeric(int, 1, 10 ** 6), default=batch,
                   help="videos encoded at once (default: %(default)s)")
    g.add_argument("--workers", type=numeric(int, 0, 1000), default=min(8, os.cpu_count() or 1),
                   help="processes that decode videos (default: %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    return g


# How the files that an option writes begin, and what else stands in their first 1,000 bytes.
OUTPUTS = {"--json": ((b'{\n "', b"{}"), b""), "--report": (b"<!DOCTYPE html>", b"<title>T-MASS"),
           "--save": (b"PK", b"tmass scores")}


def check_outputs(args):
    """Before anything long starts: each output can be written, no two options name one file. Raises DataError."""
    named = {"--ckpt": args.ckpt}
    for option in OUTPUTS:
        path = getattr(args, option[2:], None)
        if path is None or (option, path) == ("--json", "-"):  # standard output
            continue
        for other, file in named.items():
            if os.path.realpath(path) == os.path.realpath(file):
                raise data.DataError(f"{option} {path} and {other} {file} are one file: give each its own")
        check_output(option, path, *OUTPUTS[option])
        named[option] = path


def load_model(args, job):
    """The checkpoint of --ckpt on the job's device, as the options want it. -> (model, tokenizer, config)."""
    check_outputs(args)
    with job.first_alone():
        model, tokenizer, config = load_checkpoint(args.ckpt, args.activation)
    if args.pooling and args.pooling != model.config["pooling"]:
        if args.pooling == "xpool":
            raise WeightsError(f"--pooling xpool: {args.ckpt} has no weights for it; choose mean or query")
        model.pool = MeanPool() if args.pooling == "mean" else QueryPool()
        model.config = dict(model.config, pooling=args.pooling)
    model.to(job.device)
    model.prior = args.prior or model.prior
    model.prior_std = model.prior_std if args.prior_std is None else args.prior_std
    prior = f"prior {model.prior}" + (f" (std {model.prior_std:g})" if model.prior == "normal" else "")
    drawn = "their best on average, in closed form" if args.expected else f"seed {args.seed}"
    job.say(f"{args.ckpt}: T={model.frames}, pooling {model.config['pooling']}, radius {model.config['radius']}, "
            f"{args.trials} samples, {prior}, {drawn}, on {job.device}")
    return model, tokenizer, config


def write_json(path, content):
    """A JSON file, whole or not at all."""
    with output("--json", path) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


# ---- command line ----

def parse_args(argv=None):
    p = data.Parser(__doc__)
    p.add_argument("--ckpt", default="model.pt", help="a checkpoint of train.py, a released T-MASS or X-Pool one, or a "
                                                      "CLIP: ViT-B/32 or the like, or a file (default: %(default)s)")
    p.add_argument("--data", help="name of a data set or path of a .csv (default: what the checkpoint was trained on)")
    p.add_argument("--root", help="folder of the data set (default: as in training; for a .csv, the folder it lies in)")
    p.add_argument("--videos", metavar="DIR", help="folder of its videos (default: as in training, or within --root)")
    p.add_argument("--split", choices=(*data.SPLITS, "all"), help="(default: test; all of a .csv not trained on)")
    p.add_argument("--dsl", action="store_true", help="add rows with dual softmax, which uses all queries at once")
    p.add_argument("--released-protocol", action="store_true", help="add what the released, LEAKING evaluation reports")
    p.add_argument("--analyze", action="store_true",
                   help="add 95%% intervals, relevant against irrelevant pairs, recall by video complexity and length")
    g = add_common(p, batch=16)
    g.add_argument("--save", metavar="FILE", help="write similarities, ranks, embeddings, captions, clips there")
    g.add_argument("--cache", metavar="DIR", help="keep every video's sampled frames there as JPEG, as in train.py")
    g.add_argument("--skip-bad", action="store_true", help="leave unreadable videos out and count them (default: stop)")
    args = p.parse_args(argv)
    if args.json == "-":
        p.error("--json -: eval.py prints its table there; give the name of a file")
    return args


def load_data(args, config):
    """The annotations that command line and checkpoint's config ask for. -> (Annotations, name, root, split)."""
    trained_on = config.get("data")
    if args.data is None and trained_on is None:
        raise data.DataError(f"{args.ckpt} does not say which data set it was trained on: give --data and --root")
    same = args.data is None or trained_on in (args.data, os.path.abspath(args.data))
    name = trained_on if same else args.data
    root = args.root or (config.get("root") if same else None)
    videos = args.videos or (config.get("videos") if same else None)
    foreign = name.endswith(".csv") and not same  # no row of it was trained on
    split = args.split or ("all" if foreign else "test")
    if split == "all" or foreign:
        ann = data.load_annotations(name, root, split, videos)
    else:
        ann = data.load_split(name, root, split, config.get("val_videos", 0), config.get("seed", 24), videos)
    if not ann.captions:
        raise data.DataError(f"{name} has no caption in split {split}: choose another --split")
    return ann, name, root, split


def save_scores(path, split, places, result):
    """Everything that the metrics are computed from, and they, as plain tensors and lists."""
    ann, clips = split.ann, [list(clip) for clip in split.ann.segments]  # path, start, end
    tensors = dict(sims=split.sims.cpu(), t=split.t.cpu(), f=split.f.cpu(), owner=torch.tensor(ann.owner),
                   t2v_ranks=places[0], v2t_ranks=places[1])
    content = dict(format="tmass scores", **tensors, captions=ann.captions, clips=clips, result=result)
    with output("--save", path) as part, open(part, "wb") as file:
        torch.save(content, file)


def main(argv=None):
    args = parse_args(argv)
    job = start_processes(args.device)
    model, tokenizer, config = load_model(args, job)
    ann, name, root, split = load_data(args, config)
    ann, missing = data.present(ann, args.skip_bad)
    if missing:
        job.say(f"--skip-bad: {len(missing)} missing videos left out; {len(ann.captions)} texts, "
                f"{len(ann.segments)} videos remain")
    scoring = dict(trials=args.trials, seed=args.seed, expected=args.expected)
    ranked = rank_split(model, tokenizer, ann, job, args.workers, args.skip_bad, args.cache, args.batch, args.amp,
                        args.ckpt, **scoring)
    result = summarise(model, ranked, **scoring, with_dsl=args.dsl, released=args.released_protocol)
    result.update(ckpt=args.ckpt, data=name, split=split, missing=len(missing), amp=args.amp)
    job.say(f"{name}, split {split}: {report(result)}")
    ceiling = shapes_ceiling(root) if name == "shapes" and split == "test" else None
    if ceiling is not None:
        result["ceiling"] = ceiling
        job.say(f"oracle ceiling of t2v R@1: {ceiling:.1f} (captions leave things out, fit several videos)")
    if job.rank == 0:
        write_results(args, model, ranked, result, job)
    return 0


def write_results(args, model, split, result, job):
    """--analyze, --report, --json and --save, of a Split and its result, which the analysis joins."""
    t, f, sims, ann, _ = split
    places = ranks(sims, ann.owner) if args.analyze or args.report or args.save else None
    if args.analyze or args.report:
        analysis = analyze(model, t, f, ann.captions, ann.owner, sims, places, args.trials, args.seed)
        if args.analyze:
            result["analysis"] = analysis
            job.say("\n" + analysis_text(analysis))
        if args.report:
            log = os.path.splitext(args.ckpt)[0] + ".log.csv"
            write_report(args.report, result, analysis, ann, sims, places, log, seed=args.seed)
            job.say(f"report: {args.report}")
    if args.json:
        write_json(args.json, result)
    if args.save:
        save_scores(args.save, split, places, result)


if __name__ == "__main__":
    sys.exit(run(main))
