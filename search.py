"""Search a folder of videos by text.

    python search.py "a red circle" --videos DIR --ckpt model.pt
"""
import argparse
import hashlib
import os
import pickle
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
from eval import ALONE, add_common, blocks, encode_texts, encode_videos, load_model, run, start_processes, write_json
from report import write_search_report
from shapes import numeric, written_whole

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv")
INDEX, INDEX_FORMAT = ".tmass-index.pt", "tmass index 1"
CHUNK, SAVE_SECONDS = 1024, 60  # an index is made in chunks of videos, and saved between them this often


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


def read_index(path, mark, job=ALONE):
    """The index file if it is a sound one of this model, else None."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        sound = content["format"] == INDEX_FORMAT and len(content["frames"]) == len(content["mean"]) == len(content["files"])
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        job.say(f"{path} is not a readable index: making it anew")
        return None
    if content["fingerprint"] != mark:
        job.say(f"{path} was made with other weights: making it anew")
        return None
    return content


def build_index(model, folder, job=ALONE, workers=0, batch=16, skip_bad=False):
    """The Index of a folder, from its index file; only new and changed videos are encoded, those that are gone leave it."""
    path, mark, files = os.path.join(folder, INDEX), fingerprint(model), list_videos(folder)
    old = read_index(path, mark, job) or dict(files={}, bad={})
    known = {name: row for row, (name, seen) in enumerate(old["files"].items()) if files.get(name) == seen}
    bad = {name: entry for name, entry in old["bad"].items() if files.get(name) == entry[0]}  # not tried again until it changes
    new = [name for name in files if name not in known and name not in bad]
    fresh, saved, took = {}, time.time(), 0  # name -> its frames and their mean
    index = Index(old["frames"], old["mean"], list(old["files"])) if old["files"] else None
    if not new and (len(known), len(bad)) != (len(old["files"]), len(old["bad"])):
        index = _save_rows(path, mark, old, known, fresh, files, bad, job)
    for part in blocks(len(new), CHUNK):
        failed, clips = {}, [data.Clip(os.path.join(folder, name), None, None) for name in new[part]]
        f = encode_videos(model, clips, job, None, workers, batch, failed).cpu()
        bad.update((new[part][v], (files[new[part][v]], message)) for v, message in failed.items())
        fresh.update((name, (frames.half(), mean.half())) for v, (name, frames, mean) in enumerate(zip(new[part], f, pooled(f)))
                     if v not in failed)
        now = time.time()
        if part.stop >= len(new) or now - saved > max(SAVE_SECONDS, 10 * took):  # what is interrupted loses minutes, not a day
            index = _save_rows(path, mark, old, known, fresh, files, bad, job)
            saved, took = time.time(), time.time() - now
    names = index.names if index else []
    unreadable = f"; {len(bad)} unreadable ones left out: {', '.join(list(bad)[:10])}" if bad else ""
    job.say(f"encoded {len(fresh)} videos, {len(names)} in the index{unreadable}")
    if bad and not skip_bad:  # only now: what was encoded is kept
        raise data.DataError(f"{next(iter(bad.values()))[1]} ({len(bad)} unreadable in all): repair it, or leave it out with --skip-bad")
    if not names:
        raise data.DataError(f"--videos {folder}: none of its {len(bad)} videos can be read")
    return index


def _save_rows(path, mark, old, known, fresh, files, bad, job):
    """Join the old index's rows that still hold with the fresh ones, and save them. -> Index"""
    names = [name for name in files if name in known or name in fresh]
    rows = [fresh.get(name) or (old["frames"][known[name]], old["mean"][known[name]]) for name in names]
    frames, mean = (torch.stack(x) for x in zip(*rows)) if rows else (torch.empty(0), torch.empty(0))
    if job.rank == 0:
        kept = {name: files[name] for name in names}
        save_index(path, dict(format=INDEX_FORMAT, fingerprint=mark, frames=frames, mean=mean, files=kept, bad=bad), job)
    return Index(frames, mean, names)


def save_index(path, content, job=ALONE):
    """Written beside the target and renamed; a folder that can't be written costs the saving, not the search."""
    try:
        with written_whole(path) as part, open(part, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as e:
        why = getattr(e, "strerror", None) or str(e).splitlines()[0]
        job.say(f"cannot write {path} ({why}): searching without saving, so the next search encodes again")


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


@torch.no_grad()
def search(model, t, index, shortlist=1000, top=5, trials=20, seed=24):
    """The best videos for each text: exact T-MASS scores of the `shortlist` best by mean-pooled frames (0: of all videos).

    t (N,D), Index -> (scores (N,top), ids (N,top)). A gallery over several machines: search each one's index, shift the ids, `merge`.
    """
    V = len(index.frames)
    if not shortlist or shortlist >= V:
        parts = []
        for rows in blocks(V, 4096):
            scores = model.score(t, index.frames[rows], trials, seed)
            ids = torch.arange(rows.start, rows.start + scores.shape[1], device=t.device).expand_as(scores)
            parts = [merge(parts + [(scores, ids)], top)]
        return parts[0]
    found = []
    for query, ids in zip(t.split(1), best_points(t, index.mean, max(shortlist, top))):
        ids = ids.sort().values  # in the order of the file
        scores = model.score(query, index.frames[ids.cpu()], trials, seed)
        found.append(merge([(scores, ids[None])], top))
    return tuple(torch.cat(x) for x in zip(*found))


# ---- command line ----

def parse_args(argv=None):
    p = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("query", nargs="+", help="what to look for; several are looked for one after the other")
    p.add_argument("--ckpt", default="model.pt", help="a checkpoint of train.py, or a released T-MASS or X-Pool one (default: %(default)s)")
    p.add_argument("--videos", metavar="DIR", required=True, help=f"folder to search; embeddings are kept in DIR/{INDEX}")
    p.add_argument("--top", type=numeric(int, 1), default=5, help="videos to show (default: %(default)s)")
    p.add_argument("--shortlist", type=numeric(int, 0), default=1000, metavar="K",
                   help="score exactly the best K by mean-pooled frames; 0: all (default: %(default)s)")
    g = add_common(p, batch=16)
    g.add_argument("--skip-bad", action="store_true", help="leave out videos that can't be decoded, and count them")
    args = p.parse_intermixed_args(argv)  # several queries, options between them
    if not all(q.strip() for q in args.query):
        p.error("the query is empty: say what to look for")
    return args


def run_search(model, tokenizer, args, job):
    """Index the folder, print the best videos of each query. -> {query: [dict(rank, score, file)]}."""
    index = build_index(model, args.videos, job, args.workers, args.batch, args.skip_bad)
    t, found = encode_texts(model, tokenizer, args.query, job), {}
    for query, scores, ids in zip(args.query, *search(model, t, index, args.shortlist, args.top, args.trials, args.seed)):
        files = [os.path.join(args.videos, index.names[v]) for v in ids.tolist()]
        found[query] = [dict(rank=r, score=s, file=file) for r, (s, file) in enumerate(zip(scores.tolist(), files), 1)]
        job.say(f"\n{query}\n rank    score  file\n" + "\n".join(f"{x['rank']:5d}  {x['score']:7.4f}  {x['file']}" for x in found[query]))
    return found


def main(argv=None):
    args = parse_args(argv)
    job = start_processes(args.device)
    model, tokenizer, _ = load_model(args, job)
    found = run_search(model, tokenizer, args, job)
    if job.rank == 0:
        if args.json:
            write_json(args.json, found)
        if args.report:
            settings = dict(ckpt=args.ckpt, videos=args.videos, shortlist=args.shortlist, trials=args.trials, seed=args.seed)
            settings.update(model.config, prior=model.prior, prior_std=model.prior_std)
            write_search_report(args.report, found, settings)
            job.say(f"\nreport: {args.report}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
