"""Evaluate a checkpoint, or search your own videos with it.

    python eval.py --ckpt model.pt                                     # the data set it was trained on
    python eval.py --ckpt model.pt --data my.csv --root videos/        # another one
    python eval.py --ckpt best.pth --data msrvtt --released-protocol   # a released checkpoint: its published number beside the honest one
    python eval.py --ckpt model.pt --analyze --report report.html      # what lies behind the numbers, and a page to look at
    python eval.py --ckpt model.pt --query "a red circle" --videos DIR # search a folder

encode -> score -> ranks -> metrics. `owner` (which video a caption describes) enters only in `ranks`: the scorer never sees it.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import re
import stat
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

import data
from clip_model import WeightsError
from report import analysis_text, analyze, write_report, write_search_report
from tmass import PRIORS, best_cosine, load_checkpoint

CUTOFFS = (1, 5, 10, 50)
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv")
INDEX, INDEX_FORMAT = ".tmass-index.pt", "tmass index 1"
CHUNK, SAVE_SECONDS = 1024, 60  # an index is made in chunks of videos, and saved between them this often


# ---- ranks and metrics ----

def blocks(n, size):
    """The slices that cut n rows into pieces of `size`."""
    return [slice(i, i + size) for i in range(0, n, size)]


def lowest_if_nan(x):
    """A score that is not a number counts as the lowest: a broken model then ranks at chance, not first. (...) -> (...)."""
    return x.masked_fill(x.isnan(), -torch.inf)


def tied_rank(scores, own, dim):
    """Rank of `own`, one of the scores along dim: 1 + those above it + half of the others that tie. (...) -> one axis less, float64."""
    scores, own = lowest_if_nan(scores), lowest_if_nan(own).unsqueeze(dim)
    return 1 + (scores > own).sum(dim).double() + ((scores == own).sum(dim).double() - 1) / 2


def ranks(sims, owner):
    """Where the right answers stand, 1-based, ties averaged. sims (N,V), owner (N,) -> (t2v (N,), v2t (V,)), float64 on the CPU.

    t2v: each caption ranks all videos. v2t in the convention of the published tables: a video's score for another's captions is the maximum
    over them, and its own captions are ranked among the V sets. A video without captions is a distractor in t2v and has v2t rank NaN.
    """
    N, V = sims.shape
    owner = torch.as_tensor(owner, device=sims.device)
    t2v = torch.cat([tied_rank(sims[rows], sims[rows].gather(1, owner[rows, None])[:, 0], 1) for rows in blocks(N, 4096)])
    described = owner.unique()  # the videos that have captions
    v2t = sims.new_full((V,), torch.nan, dtype=torch.float64)
    for columns in blocks(V, 512):
        part = sims[:, columns]
        best = part.new_full((V, part.shape[1]), -torch.inf)
        best = best.scatter_reduce(0, owner[:, None].expand_as(part), part, "amax")  # [v, w]: all captions of video v with video w
        v2t[columns] = tied_rank(best[described], best.diagonal(-columns.start), 0)
    captioned = torch.zeros(V, dtype=torch.bool, device=sims.device).index_fill(0, described, True)
    return t2v.cpu(), v2t.masked_fill(~captioned, torch.nan).cpu()


def strict_v2t_ranks(sims, owner):
    """The strict v2t: rank of a video's best own caption among all N captions. sims (N,V), owner (N,) -> (V,), NaN without captions.

    Ties are averaged: of the other captions that tie with k own ones, 1/(k+1) are expected above the first own one.
    """
    N, V = sims.shape
    owner = torch.as_tensor(owner, device=sims.device)
    out = []
    for columns in blocks(V, 512):
        part = lowest_if_nan(sims[:, columns])
        own = owner[:, None] == torch.arange(V, device=sims.device)[columns]  # (N,v)
        best = part.masked_fill(~own, -torch.inf).amax(0)
        tied = part == best
        mine = (tied & own).sum(0).double()
        rank = 1 + (part > best).sum(0).double() + (tied & ~own).sum(0).double() / (mine + 1)
        out.append(rank.masked_fill(~own.any(0), torch.nan))
    return torch.cat(out).cpu()


def metrics(ranks):
    """ranks (n,), 1-based, NaN = no rank -> dict(R1, R5, R10, R50: percent, MdR, MnR)."""
    ranks = torch.as_tensor(ranks, dtype=torch.float64)
    ranks = ranks[~ranks.isnan()]
    out = {f"R{k}": 100 * (ranks <= k).double().mean().item() for k in CUTOFFS}
    return dict(out, MdR=ranks.quantile(0.5).item(), MnR=ranks.mean().item())


def dsl(sims, dim=0):
    """Dual softmax: each score weighted by how much the candidate prefers this query to the other queries. sims (N,V) -> (N,V).

    dim: the axis of the queries, 0 for t2v, 1 for v2t. Transductive: it uses all queries at once, which a search does not have.
    """
    return sims * (100 * sims).softmax(dim)


def measure(t2v_sims, owner, v2t_sims=None):
    """All metrics of a similarity matrix. (N,V), owner (N,) -> dict(t2v, v2t, v2t_strict)."""
    v2t_sims = t2v_sims if v2t_sims is None else v2t_sims
    t2v, v2t = ranks(t2v_sims, owner)[0], ranks(v2t_sims, owner)[1]
    return dict(t2v=metrics(t2v), v2t=metrics(v2t), v2t_strict=metrics(strict_v2t_ranks(v2t_sims, owner)))


# ---- several processes ----

def processes():
    """(rank, world) of this process; (0, 1) where torchrun did not start it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def together(x):
    """Join what the processes computed, each in its own rows of a tensor of zeros. (...) -> (...), the same on all."""
    if processes()[1] > 1:
        dist.all_reduce(x)  # x + 0: exact
    return x


def say(text):
    """Print, as one process of all; a file name that is not Unicode must not end a search."""
    if processes()[0] == 0:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


# ---- encode and score ----
# Batches are dealt out to the processes whole, and are the same whatever their number, so that the numbers are the same too.

@torch.no_grad()
def encode_texts(model, tokenizer, captions, batch=256):
    """captions (N) -> t (N,D), on the model's device; sharded over the processes."""
    (rank, world), device = processes(), model.clip.logit_scale.device
    t = torch.zeros(len(captions), model.clip.config["embed_dim"], device=device)
    for i in range(rank * batch, len(captions), world * batch):
        t[i:i + batch] = model.encode_text(tokenizer(captions[i:i + batch]).to(device))
    return together(t)


def collate(items):
    """Items of VideoDataset -> (uint8 (v,T,3,R,R) of those that could be read, or None; per item its error message or None)."""
    good = [x for x in items if not isinstance(x, Exception)]
    return torch.stack(good) if good else None, [str(x) if isinstance(x, Exception) else None for x in items]


@torch.no_grad()
def encode_videos(model, clips, cache=None, workers=0, batch=16, bad=None, before=0, total=None):
    """clips (V) -> f (V,T,D), on the model's device; each video decoded once, sharded over the processes.

    A video that can't be read raises its DataError; with bad={} its message goes there under its number instead, and its row is zeros.
    before, total: what to tell of progress where these clips are a part of more.
    """
    (rank, world), device, V, T = processes(), model.clip.logit_scale.device, len(clips), model.frames
    f = torch.zeros(V, T, model.clip.config["embed_dim"], device=device)
    transform = data.test_transform(model.clip.config["image_size"])
    dataset = data.VideoDataset(clips, T, transform, cache=data.FrameCache(cache, T) if cache else None)
    mine = [list(range(i, min(i + batch, V))) for i in range(rank * batch, V, world * batch)]
    loader = DataLoader(dataset, batch_sampler=mine, num_workers=min(workers, len(mine)), collate_fn=collate,
                        pin_memory=device.type == "cuda")
    failed, told = {}, time.time()
    try:
        for rows, (frames, errors) in zip(mine, loader):
            failed.update((v, e) for v, e in zip(rows, errors) if e)
            if failed and bad is None:
                break
            if frames is not None:
                f[[v for v, e in zip(rows, errors) if not e]] = model.encode_video(frames.to(device, non_blocking=True))
            if time.time() - told > 20:
                told = time.time()
                say(f"encoded {before + rows[-1] + 1} of {total or V} videos")
    except RuntimeError as e:
        died = re.search(r"DataLoader worker \(pid\D* (\d+)", str(e))
        if died is None:
            raise
        video = dataset.was_reading(int(died[1]))
        raise data.DataError(f"a decoding process died while it read {video}: is memory short? try fewer --workers") from e
    if world > 1:  # an error of one process ends all of them
        parts = [None] * world
        dist.all_gather_object(parts, failed)
        failed = {v: e for part in parts for v, e in part.items()}
    if failed and bad is None:
        raise data.DataError(failed[min(failed)])
    if bad is not None:
        bad.update(sorted(failed.items()))
    return together(f)


@torch.no_grad()
def score_all(model, t, f, trials=20, seed=24):
    """Honest scores of all pairs in float32, blocks of videos dealt out to the processes. t (N,D), f (V,T,D) -> sims (N,V)."""
    rank, world = processes()
    sims = t.new_zeros(len(t), len(f))
    for columns in blocks(len(f), 128)[rank::world]:
        sims[:, columns] = model.score(t, f[columns], trials, seed)
    return together(sims)


def scores_of_pooled(model, t, f, v, trials, seed):
    """The scores of videos that are pooled already. t (N,D), f (V,T,D), v (N,V,D) or (V,D) for all texts -> sims (N,V)."""
    eps = model.noise(trials, seed).to(t.device) if trials else t.new_zeros(1, t.shape[1])  # no noise: the point text
    S = torch.einsum("nd,vtd->nvt", F.normalize(t, dim=-1), F.normalize(f, dim=-1))
    return best_cosine(t[:, None], v, model.radius(S), eps)


@torch.no_grad()
def released_scores(model, t, f, caption_of, trials=20, seed=24):
    """LEAKING: what the released evaluation ranks by. t (N,D), f (V,T,D), caption_of (V,) -> sims (N,V).

    Every video is pooled by its own caption whatever the query, v_j = psi(f_j | t_caption(j)); the radius is of the pair (text i, video j).
    Differs from the released code: the noise is shared by all pairs, as in `score`; there it is fresh for every pair.
    """
    sims = t.new_empty(len(t), len(f))
    for columns in blocks(len(f), 32):
        v = model.pool(t[caption_of[columns]], f[columns]).diagonal().T  # psi(f_j | its own caption)  (v,D)
        for rows in blocks(len(t), 256):
            sims[rows, columns] = scores_of_pooled(model, t[rows], f[columns], v, trials, seed)
    return sims


class Split(NamedTuple):
    """What `rank_split` computed: t (N,D), f (V,T,D), sims (N,V), the annotations without unreadable videos, and those (message each)."""
    t: torch.Tensor
    f: torch.Tensor
    sims: torch.Tensor
    ann: object
    left_out: list


def rank_split(model, tokenizer, ann, device=None, workers=0, skip_bad=False, cache=None, trials=20, seed=24, batch=16):
    """Encode and score a split: Annotations -> Split."""
    if device is not None:
        model.to(device)
    training, bad = model.training, {}
    model.eval()
    f = encode_videos(model, ann.clips, cache, workers, batch, bad if skip_bad else None)
    if bad:
        keep = [v for v in range(len(ann.clips)) if v not in bad]
        ann, f = ann.take(keep), f[keep]
        say(f"--skip-bad: {len(bad)} unreadable videos left out; {len(ann.captions)} texts, {len(ann.clips)} videos remain")
    if not ann.captions:
        raise data.DataError("nothing to evaluate: no caption with a readable video" + (f" ({len(bad)} videos left out)" if bad else ""))
    distinct = {c: i for i, c in enumerate(dict.fromkeys(ann.captions))}  # equal captions tie exactly, and cost once
    t = encode_texts(model, tokenizer, list(distinct))
    sims = score_all(model, t, f, trials, seed)
    if len(distinct) < len(ann.captions):
        rows = [distinct[c] for c in ann.captions]
        t, sims = t[rows], sims[rows]
    model.train(training)
    return Split(t, f, sims, ann, list(bad.values()))


def evaluate(model, tokenizer, ann, device=None, workers=0, skip_bad=False, cache=None, trials=20, seed=24, batch=16, with_dsl=False,
             released=False):
    """Annotations -> dict(t2v, v2t, v2t_strict: metrics; texts, videos, ...; dsl and released_protocol the same, where asked for)."""
    if released:
        _one_caption_each(ann)
    split = rank_split(model, tokenizer, ann, device, workers, skip_bad, cache, trials, seed, batch)
    return summarise(model, split, trials, seed, with_dsl, released)


def summarise(model, split, trials, seed, with_dsl=False, released=False):
    """The result of `evaluate`, of a Split."""
    owner, sims = split.ann.owner, split.sims
    out = dict(measure(sims, owner), texts=len(owner), videos=len(split.ann.clips), left_out=split.left_out)
    out.update(trials=trials, seed=seed, **{**model.config, "prior": model.prior, "prior_std": model.prior_std})
    if with_dsl:
        out["dsl"] = measure(dsl(sims, 0), owner, dsl(sims, 1))
    if released:
        caption_of = torch.tensor(owner, device=sims.device).argsort()
        out["released_protocol"] = measure(released_scores(model, split.t, split.f, caption_of, trials, seed), owner)
    return out


def _one_caption_each(ann):
    """The released protocol is defined for one caption per video only."""
    if sorted(ann.owner) != list(range(len(ann.clips))):
        raise data.DataError(f"--released-protocol needs exactly one caption per video, and this split has {len(ann.captions)} captions "
                             f"for {len(ann.clips)} videos: leave it out, or give --data a csv with one caption per video")


def format_metrics(result):
    """The result of `evaluate` in one line."""
    def part(way):
        m = result[way]
        return f"{way} " + "  ".join(f"R@{k} {m[f'R{k}']:.1f}" for k in CUTOFFS[:3]) + f"  MdR {m['MdR']:g}  MnR {m['MnR']:.1f}"
    return f"{part('t2v')}   {part('v2t')}   ({result['texts']} texts, {result['videos']} videos)"


def report(result):
    """The result of `evaluate` as a table."""
    def rows(part, label=""):
        for way, name in (("t2v", "t2v"), ("v2t", "v2t, max over captions"), ("v2t_strict", "v2t, strict")):
            m = part[way]
            yield f"{label + name:32s}" + "".join(f"{m[f'R{k}']:8.1f}" for k in CUTOFFS) + f"{m['MdR']:8g}{m['MnR']:8.1f}"
    heads = [f"R@{k}" for k in CUTOFFS] + ["MdR", "MnR"]
    lines = [f"{result['texts']} texts, {result['videos']} videos", f"{'':32s}" + "".join(f"{h:>8s}" for h in heads), *rows(result)]
    if "dsl" in result:
        lines += ["DSL is transductive: it uses all queries at once; not comparable with the rows above", *rows(result["dsl"], "DSL ")]
    if "released_protocol" in result:
        lines += ["LEAKING: the released protocol pools every video by its own ground-truth caption, whatever the query. To compare with",
                  "published numbers only. (Noise shared by all pairs here; the released code draws it afresh for each.)",
                  *rows(result["released_protocol"], "LEAKING ")]
    return "\n".join(lines)


# ---- search in a folder of videos ----

class Index(NamedTuple):
    """Embeddings of a folder's videos: frames (V,T,D) and their unit mean (V,D), float16, possibly memory-mapped; names (V)."""
    frames: torch.Tensor
    mean: torch.Tensor
    names: list


def pooled(f):
    """First-stage vector of each video: the unit mean of unit frames. f (V,T,D) -> (V,D)."""
    return F.normalize(F.normalize(f.float(), dim=-1).mean(1), dim=-1)


def fingerprint(model):
    """Identifies what video embeddings depend on: the image tower and T."""
    digest = hashlib.sha256(repr((model.frames, model.clip.config)).encode())
    for name, x in sorted(model.clip.visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def list_videos(folder):
    """Videos of a folder and those below it -> {name relative to it: (size, mtime_ns)}, sorted."""
    if not os.path.isdir(folder):
        raise data.DataError(f"--videos {folder}: there is no such folder")
    found = {}
    for base, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(base, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")):
            if os.path.isfile(path):
                found[os.path.relpath(path, folder)] = (os.stat(path).st_size, os.stat(path).st_mtime_ns)
    if not found:
        raise data.DataError(f"--videos {folder}: no videos in it ({', '.join(SUFFIXES)})")
    return dict(sorted(found.items()))


def read_index(path, mark):
    """The index file if it is a sound one of this model, else None."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        sound = content["format"] == INDEX_FORMAT and len(content["frames"]) == len(content["mean"]) == len(content["files"])
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        say(f"{path} is not a readable index: making it anew")
        return None
    if content["fingerprint"] != mark:
        say(f"{path} was made with other weights: making it anew")
        return None
    return content


def build_index(model, folder, workers=0, batch=16, skip_bad=False):
    """The Index of a folder, from its index file; only new and changed videos are encoded, those that are gone leave it."""
    path, mark, files = os.path.join(folder, INDEX), fingerprint(model), list_videos(folder)
    old = read_index(path, mark) or dict(files={}, bad={})
    known = {name: row for row, (name, seen) in enumerate(old["files"].items()) if files.get(name) == seen}
    bad = {name: entry for name, entry in old["bad"].items() if files.get(name) == entry[0]}  # not tried again until it changes
    new = [name for name in files if name not in known and name not in bad]
    fresh, saved, took = {}, time.time(), 0  # name -> its frames and their mean
    index = Index(old["frames"], old["mean"], list(old["files"])) if old["files"] else None
    if not new and (len(known), len(bad)) != (len(old["files"]), len(old["bad"])):
        index = _save_rows(path, mark, old, known, fresh, files, bad)
    for part in blocks(len(new), CHUNK):
        failed, clips = {}, [data.Clip(os.path.join(folder, name), None, None) for name in new[part]]
        f = encode_videos(model, clips, None, workers, batch, failed, part.start, len(new)).cpu()
        bad.update((new[part][v], (files[new[part][v]], message)) for v, message in failed.items())
        fresh.update((name, (frames.half(), mean.half())) for v, (name, frames, mean) in enumerate(zip(new[part], f, pooled(f)))
                     if v not in failed)
        now = time.time()
        if part.stop >= len(new) or now - saved > max(SAVE_SECONDS, 10 * took):  # what is interrupted loses minutes, not a day
            index = _save_rows(path, mark, old, known, fresh, files, bad)
            saved, took = time.time(), time.time() - now
    names = index.names if index else []
    unreadable = f"; {len(bad)} unreadable ones left out: {', '.join(list(bad)[:10])}" if bad else ""
    say(f"encoded {len(fresh)} videos, {len(names)} in the index{unreadable}")
    if bad and not skip_bad:  # only now: what was encoded is kept
        raise data.DataError(f"{next(iter(bad.values()))[1]} ({len(bad)} unreadable in all): repair it, or leave it out with --skip-bad")
    if not names:
        raise data.DataError(f"--videos {folder}: none of its {len(bad)} videos can be read")
    return index


def _save_rows(path, mark, old, known, fresh, files, bad):
    """Join the old index's rows that still hold with the fresh ones, and save them. -> Index"""
    names = [name for name in files if name in known or name in fresh]
    rows = [fresh.get(name) or (old["frames"][known[name]], old["mean"][known[name]]) for name in names]
    frames, mean = (torch.stack(x) for x in zip(*rows)) if rows else (torch.empty(0), torch.empty(0))
    if processes()[0] == 0:
        kept = {name: files[name] for name in names}
        save_index(path, dict(format=INDEX_FORMAT, fingerprint=mark, frames=frames, mean=mean, files=kept, bad=bad))
    return Index(frames, mean, names)


def save_index(path, content):
    """Written beside the target and renamed; a folder that can't be written costs the saving, not the search."""
    part = f"{path}.{os.getpid()}.part"
    try:
        try:
            with open(part, "wb") as file:
                torch.save(content, file)
            os.replace(part, path)
        finally:
            if os.path.isfile(part):
                os.unlink(part)
    except (OSError, RuntimeError) as e:
        why = getattr(e, "strerror", None) or str(e).splitlines()[0]
        say(f"cannot write {path} ({why}): searching without saving, so the next search encodes again")


def merge(parts, top):
    """The best of several shards' own bests: top K of top Ks, exact. [(scores (N,k), ids (N,k))] -> (scores (N,top), ids (N,top))."""
    scores, ids = (torch.cat(x, 1) for x in zip(*parts))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :top], ids.gather(1, order)[:, :top]


@torch.no_grad()
def best_points(t, mean, top):
    """First stage: the best videos by cos(t, mean frame), as one chunked product over a memory map. t (N,D), mean (V,D) -> ids (N,top)."""
    unit, parts = F.normalize(t.float(), dim=-1), []
    for rows in blocks(len(mean), 4096):  # what stays in the cache
        scores = unit @ mean[rows].to(t.device).float().T  # (N,v)
        scores, ids = scores.topk(min(top, scores.shape[1]), dim=1)
        parts = [merge(parts + [(scores, ids + rows.start)], top)]
    return parts[0][1]


def pool_few(pool, t, f):
    """psi(f | t) as XPool computes it, in the order that suits few texts: W after pooling instead of before. t (N,D), f (V,T,D) -> (N,V,D).

    Three D x D products per pair; `score` takes 4T per video, and then none per pair. (The keys' bias shifts all frames alike.)
    """
    H, D = pool.heads, t.shape[1]
    f1 = pool.ln1(f)
    q = torch.einsum("nhd,hde->nhe", pool.query(t), pool.k.weight.view(H, D // H, D)) / math.sqrt(D // H)
    a = torch.einsum("nhe,vte->nvht", q, f1).softmax(-1)                        # softmax_j(q·k_j / sqrt(D/H))
    u = torch.einsum("nvht,vte->nvhe", a, f1)                                   # Wv Σ_j a_j LN1(f_j) + bv = Σ_j a_j u_j
    u = torch.einsum("nvhe,hde->nvhd", u, pool.v.weight.view(H, D // H, D)).flatten(2) + pool.v.bias
    x = pool.ln2(pool.out(u))
    return pool.ln3(x + pool.linear(x))


@torch.no_grad()
def score_few(model, t, f, trials=20, seed=24):
    """What `model.score` computes, many times faster for a query or a few. t (N,D), f (V,T,D) of any precision -> sims (N,V)."""
    if len(t) > model.frames:
        return model.score(t, f.to(t.device).float(), trials, seed)
    sims = t.new_empty(len(t), len(f))
    for columns in blocks(len(f), 128):
        part = f[columns].to(t.device).float()
        for i, text in enumerate(t.split(1)):
            v = pool_few(model.pool, text, part) if model.config["pooling"] == "xpool" else model.pool(text, part)
            sims[i, columns] = scores_of_pooled(model, text, part, v, trials, seed)[0]
    return sims


@torch.no_grad()
def search(model, t, index, shortlist=1000, top=5, trials=20, seed=24):
    """The best videos for each text: exact T-MASS scores of the `shortlist` best by mean-pooled frames (0: of all videos).

    t (N,D), Index -> (scores (N,top), ids (N,top)). A gallery over several machines: search each one's index, shift the ids, `merge`.
    """
    V = len(index.frames)
    if not shortlist or shortlist >= V:
        parts = []
        for rows in blocks(V, 4096):
            scores = score_few(model, t, index.frames[rows], trials, seed)
            ids = torch.arange(rows.start, rows.start + scores.shape[1], device=t.device).expand_as(scores)
            parts = [merge(parts + [(scores, ids)], top)]
        return parts[0]
    found = []
    for query, ids in zip(t.split(1), best_points(t, index.mean, max(shortlist, top))):
        ids = ids.sort().values  # in the order of the file
        scores = score_few(model, query, index.frames[ids.cpu()], trials, seed)
        found.append(merge([(scores, ids[None])], top))
    return tuple(torch.cat(x) for x in zip(*found))


# ---- command line ----

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="model.pt", help="a checkpoint of train.py, or a released T-MASS or X-Pool one (default: %(default)s)")
    g = p.add_argument_group("evaluate")
    g.add_argument("--data", help="name of a data set or path of a .csv (default: what the checkpoint was trained on)")
    g.add_argument("--root", help="folder of the data set (default: as in training; for a .csv, the folder it lies in)")
    g.add_argument("--split", choices=("train", "val", "test", "all"), help="(default: test; for a .csv it was not trained on, all rows)")
    g.add_argument("--dsl", action="store_true", help="add rows with dual softmax, which is transductive: it uses all queries at once")
    g.add_argument("--released-protocol", action="store_true", help="add what the released, LEAKING evaluation reports")
    g.add_argument("--cache", metavar="DIR", help="keep every video's sampled frames there as JPEG, as in train.py")
    g.add_argument("--analyze", action="store_true",
                   help="add 95%% intervals, relevant against irrelevant pairs, recall by video complexity and caption length")
    g = p.add_argument_group("search")
    g.add_argument("--query", action="append", metavar="TEXT", help="what to look for; may be given several times")
    g.add_argument("--videos", metavar="DIR", help=f"folder to search; embeddings are kept in DIR/{INDEX}")
    g.add_argument("--top", type=int, default=5, help="videos to show (default: %(default)s)")
    g.add_argument("--shortlist", type=int, default=1000, metavar="K",
                   help="score exactly the best K by mean-pooled frames; 0: all (default: %(default)s)")
    g = p.add_argument_group("both")
    g.add_argument("--json", metavar="FILE", help="write the result there too")
    g.add_argument("--report", metavar="FILE", help="write a page to look at: one .html file with frames, charts and settings")
    g.add_argument("--trials", type=int, default=20, help="M, samples of the text mass; 0 scores the point text (default: %(default)s)")
    g.add_argument("--seed", type=int, default=24, help="of the samples (default: %(default)s)")
    g.add_argument("--prior", choices=PRIORS, help="of the samples (default: as in training; released: uniform, LSMDC normal)")
    g.add_argument("--prior-std", type=float, help="of the normal prior (default: as in training; released LSMDC: 0.003)")
    g.add_argument("--skip-bad", action="store_true",
                   help="leave out videos that are missing or can't be decoded, and count them (default: stop and name them)")
    g.add_argument("--batch", type=int, default=16, help="videos encoded at once (default: %(default)s)")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode videos (default: %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    args = p.parse_args(argv)
    for name, least in (("top", 1), ("shortlist", 0), ("trials", 0), ("batch", 1), ("workers", 0), ("prior_std", 0), ("seed", 0)):
        if getattr(args, name) is not None and not least <= getattr(args, name) < 2 ** 63:  # not: NaN is out of it too
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}, and less than 2^63")
    if bool(args.query) != bool(args.videos):
        p.error("a search needs both --query TEXT and --videos DIR")
    if args.query and not all(q.strip() for q in args.query):
        p.error("--query is empty: say what to look for")
    if args.query and (args.data or args.split or args.released_protocol or args.dsl or args.analyze):
        p.error("--query searches a folder: --data, --split, --dsl, --analyze and --released-protocol belong to an evaluation")
    return args


def start_processes(device):
    """Join the job that torchrun started, if it did. -> this process' device. Raises DataError if it can't be used."""
    parallel = "RANK" in os.environ and not dist.is_initialized()
    if parallel and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device).item()
        if parallel and device.startswith("cuda"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as e:  # torch's ways to say so
        raise data.DataError(f"--device {device} can't be used here ({str(e).splitlines()[0]}): try --device cpu") from e
    if parallel:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device)


def check_output(option, path):
    """Before anything long starts. Results are renamed into place, which would do away with a link, a pipe or a device (/dev/stdout)."""
    folder, name = os.path.split(os.path.abspath(path) if path else "")
    taken = os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode)
    if not name or taken or not os.access(folder, os.W_OK):
        raise data.DataError(f"{option} {path} cannot be written: give the name of a plain file, new or old, in a folder that exists")


def load_data(args, config):
    """The annotations that the command line and the checkpoint's config ask for. -> (Annotations, name, root, split)."""
    name, root, trained_on = args.data, args.root, config.get("data")
    if name is None and trained_on is None:
        raise data.DataError(f"{args.ckpt} does not say which data set it was trained on: give --data and --root")
    same = name is None or name == trained_on or (name.endswith(".csv") and os.path.abspath(name) == trained_on)
    name = trained_on if same else name
    root = root or (config.get("root") if same else None)
    split = args.split or ("test" if same or not name.endswith(".csv") else "all")
    if split == "all" or (not same and name.endswith(".csv")):
        return data.load_annotations(name, root, split), name, root, split
    return data.load_split(name, root, split, config.get("val_videos", 0), config.get("seed", 24)), name, root, split


def ceiling(root):
    """The best R@1 that shapes' captions allow, which its rendering wrote down. -> percent or None."""
    try:
        with open(os.path.join(root or os.path.join("data", "shapes"), "shapes.json"), encoding="utf-8") as file:
            return json.load(file).get("ceiling")
    except (OSError, ValueError):
        return None


def write_json(path, content):
    """Written beside the target and renamed, by one process."""
    if processes()[0] == 0:
        try:
            with open(path + ".part", "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(path + ".part", path)
        except OSError as e:
            raise data.DataError(f"--json {path} cannot be written: {e.strerror}") from e


def run_search(model, tokenizer, args):
    """Index the folder, print the best videos of each query. -> {query: [dict(rank, score, file)]}."""
    index = build_index(model, args.videos, args.workers, args.batch, args.skip_bad)
    t, found = encode_texts(model, tokenizer, args.query), {}
    for query, scores, ids in zip(args.query, *search(model, t, index, args.shortlist, args.top, args.trials, args.seed)):
        files = [os.path.join(args.videos, index.names[v]) for v in ids.tolist()]
        found[query] = [dict(rank=r, score=s, file=file) for r, (s, file) in enumerate(zip(scores.tolist(), files), 1)]
        say(f"\n{query}\n rank    score  file\n" + "\n".join(f"{x['rank']:5d}  {x['score']:7.4f}  {x['file']}" for x in found[query]))
    return found


def main(argv=None):
    args = parse_args(argv)
    device = start_processes(args.device)
    for option, path in (("--json", args.json), ("--report", args.report)):  # before anything long starts
        if path is not None:
            check_output(option, path)
    model, tokenizer, config = load_checkpoint(args.ckpt)
    model.to(device)
    model.prior, model.prior_std = args.prior or model.prior, model.prior_std if args.prior_std is None else args.prior_std
    say(f"{args.ckpt}: T={model.frames}, pooling {model.config['pooling']}, radius {model.config['radius']}, {args.trials} samples, "
        f"prior {model.prior}{f' (std {model.prior_std:g})' if model.prior == 'normal' else ''}, seed {args.seed}, on {device}")
    if args.query:
        found = run_search(model, tokenizer, args)
        write_json(args.json, found) if args.json else None
        if args.report and processes()[0] == 0:
            settings = dict(ckpt=args.ckpt, videos=args.videos, shortlist=args.shortlist, trials=args.trials, seed=args.seed)
            settings.update(model.config, prior=model.prior, prior_std=model.prior_std)
            write_search_report(args.report, found, settings)
            say(f"\nreport: {args.report}")
        return 0
    ann, name, root, split = load_data(args, config)
    if not ann.captions:
        raise data.DataError(f"{name} has no caption in split {split}: choose another --split")
    ann, missing = data.present(ann, args.skip_bad)
    if missing:
        say(f"--skip-bad: {len(missing)} missing videos left out; {len(ann.captions)} texts, {len(ann.clips)} videos remain")
    if args.released_protocol:
        _one_caption_each(ann)
    ranked = rank_split(model, tokenizer, ann, None, args.workers, args.skip_bad, args.cache, args.trials, args.seed, args.batch)
    result = summarise(model, ranked, args.trials, args.seed, args.dsl, args.released_protocol)
    result = dict(result, ckpt=args.ckpt, data=name, split=split, missing=len(missing))
    say(f"{name}, split {split}: {report(result)}")
    if name == "shapes" and split == "test" and ceiling(root) is not None:
        result["ceiling"] = ceiling(root)
        say(f"oracle ceiling of t2v R@1: {result['ceiling']:.1f} (captions leave things out, and fit several videos)")
    if (args.analyze or args.report) and processes()[0] == 0:
        explain(model, ranked, result, args)
    write_json(args.json, result) if args.json else None
    return 0


def explain(model, ranked, result, args):
    """--analyze and --report, of a Split; the analysis joins the result."""
    t, f, sims, ann, _ = ranked
    places = ranks(sims, ann.owner)
    analysis = analyze(model, t, f, ann.captions, ann.owner, sims, places, args.trials, args.seed)
    if args.report:
        log = os.path.join(os.path.dirname(os.path.abspath(args.ckpt)), "log.csv")
        write_report(args.report, result, analysis, ann, sims, places, log, seed=args.seed)
        say(f"report: {args.report}")
    if args.analyze:
        result["analysis"] = analysis
        say("\n" + analysis_text(analysis))


def cli():
    """User mistakes end in one clear line and exit status 2; anything else is a bug and shows where."""
    try:
        return main()
    except (data.DataError, WeightsError) as e:
        print(f"error: {e}", file=sys.stderr)  # stderr escapes what it can't encode
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(cli())
