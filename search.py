#!/usr/bin/env python3
"""Search your own videos by text, and find the moment.

    python search.py "a dog jumps into water" --videos ~/clips      # CLIP ViT-B/32 as it is
    python search.py "a red star" --videos data/shapes/videos --ckpt model.pt
    python search.py photo.jpg --videos ~/clips                     # what looks like it
    python search.py --videos ~/clips                               # asks; from a pipe, one a line
    python search.py --videos ~/clips --serve                       # a page to search and watch on
    python search.py -0 "a dog" --videos ~/clips | xargs -0 ls -l   # file names alone
    torchrun --nproc_per_node 8 search.py "a dog" --videos ~/clips  # each process does its share

A video is searched by pieces of some seconds; a piece is a row of the gallery. Their embeddings
stay in the folder .tmass-index/ (lib/index.py): only what is new is encoded. In this order:
encoding, build_index, queries, search (two stages), the command line.
"""
import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

import data
from eval import encode_texts, lowest_if_nan, refuse_lone
from lib import exact
from lib import index as store
from lib.common import DataError, Parser, Progress, WeightsError, cure, numeric
from lib.index import INDEX, File, ShardWriter, list_videos, move_means
from lib.options import add_common, load_model, write_json
from lib.page import read_picture
from lib.processes import (
    ALONE,
    Stopped,
    loading,
    noting_signals,
    run,
    start_processes,
    worker_place,
)
from lib.report import write_search_report
from lib.serve import SearchPage, print_files, questions, table
from lib.video import SUFFIXES, Piece, Segment, read_frames, read_pieces
from tmass import cosine

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic")
ROWS = 1000   # pieces that are scored exactly at once
ON_PAGE = 20  # results at least on the page


# ---- encoding ----

class PieceDataset(data.VideoDataset, IterableDataset):
    """The pieces of a folder's files as batches; each file is read by one worker, in order.

    -> (rows, pixels uint8 (n,T,3,P,P) or None). A row is (file number, Piece without its frames),
    or at the file's end (file number, File). A File has no content where the system refused to read
    it: that is no property of the file. known: contents of which nothing is read.
    """

    def __init__(self, folder, files, frames, window, transform, batch, known):
        segments = [Segment(os.path.join(folder, file.name)) for file in files]
        super().__init__(segments, frames, transform)
        self.read = functools.partial(read_pieces, frames=frames, window=window)
        self.files = files
        self.batch = batch
        self.known = known

    def __iter__(self):
        first, step = worker_place()
        rows = []
        pixels = []
        for v in range(first, len(self.files), step):
            self.note(v)
            path = self.segments[v].path
            why = None
            content = ""
            try:
                content = store.content_of(path)
                pieces = () if content in self.known else self.read(path)
                for piece in pieces:
                    rows.append((v, piece._replace(frames=None)))
                    pixels.append(self.transform(piece.frames))
                    if len(pixels) == self.batch:
                        yield rows, torch.stack(pixels)
                        rows = []
                        pixels = []
            # A bad file is a result and no end: the other files are still to be read.
            except (DataError, OSError, MemoryError) as error:
                why = str(error)
                if path not in why:
                    why = f"video {path} can't be read: {why}"
                if was_refused(path, error):
                    content = ""
            rows.append((v, self.files[v]._replace(why=why, content=content)))
        if rows:
            yield rows, torch.stack(pixels) if pixels else None


def was_refused(path, error):
    """Whether the system is why a file can't be read, which it may be able to the next time."""
    # Want of memory, which torch calls a RuntimeError, has a cure.
    while error and not (isinstance(error, OSError) or cure(error)):
        error = error.__context__
    return error is not None or not os.access(path, os.R_OK)


@torch.no_grad()
def encode_files(
    model, folder, files, shards, writer, job, stopping, window, saved=lambda: None, workers=0,
    batch=16, amp="off"
):
    """Encode this process' share of a folder's files. -> how many of them were encoded

    folder: a Folder, whose `refused` is added to. files: the Files that all processes share.
    shards: of what is encoded already: a copy of it gets the same rows. writer: a ShardWriter.
    stopping: becomes true where no more is to be encoded. saved: is called whenever a shard is
    saved.
    """
    device = model.clip.logit_scale.device
    T = model.frames
    files = files[job.rank::job.world]
    known = {x.content: (x, shard) for shard in shards for x in shard.files if not x.why}
    known.pop("", None)  # shards of earlier versions have no contents
    transform = data.transform_for(model.clip)
    dataset = PieceDataset(folder.path, files, T, window, transform, batch, set(known))
    total = len(files) * job.world  # as if all processes were as far as this one
    progress = Progress("encoding", total, unit="files", enabled=job.rank == 0)
    nothing = torch.zeros(0, T, model.clip.embed_dim), torch.zeros(0, T), torch.zeros(0, 2)
    # A file's pieces may come in several batches, between those that other workers read.
    begun = [[nothing] for _ in files]  # each file's pieces so far
    done = 0
    encoded = []  # why they can't be read, None for those that can
    reading = loading(dataset, workers=min(workers, len(files)), pin=device.type == "cuda")
    with contextlib.suppress(Stopped), reading as batches:
        for rows, pixels in batches:
            if pixels is not None:
                pixels = pixels.to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                    f = model.encode_video(pixels)
                embedded = iter(f.cpu().split(1))
            for v, entry in rows:
                if isinstance(entry, Piece):
                    times = torch.tensor([entry.times])
                    span = torch.tensor([[entry.start, entry.end]])
                    begun[v].append((next(embedded), times, span))
                    continue
                done += 1
                if not entry.content:
                    folder.refused.append(f"{entry.why} (tried again next time)")
                elif entry.content in known:
                    other, shard = known[entry.content]
                    part = store.keep_files(shard, [file is other for file in shard.files])
                    writer.parts.append(part._replace(files=[entry]))
                else:
                    # Of a file that breaks off nothing is searched.
                    pieces = begun[v][:1] if entry.why else begun[v]
                    tensors = (torch.cat(x) for x in zip(*pieces))
                    writer.parts.append(store.file_shard(*tensors, entry))
                    encoded.append(entry.why)
                begun[v] = None
            progress.update(done * job.world)
            if writer.save_if_due():
                saved()
            if stopping:
                break
    writer.save()
    return encoded.count(None)


# ---- the index of a folder, the gallery of all ----

class Index(NamedTuple):
    """The pieces of all shards as one gallery of P rows; the same on all processes."""

    shards: list          # of Shard
    starts: torch.Tensor  # the number of each shard's first row, and P
    file: torch.Tensor    # (P,) int64: which of `paths` a row belongs to; -1: it doesn't count
    paths: list           # of the files
    names: list           # of the files as results print them
    unsaved: bool = False  # this process could not write some of it


def update_index(model, folder, where, mark, new, job, stopped, **encoding):
    """Encode what is new or changed in a Folder, all processes together.

    where: the folder of its shards. mark: the fingerprint. new=False: nothing is encoded. stopped:
    the signals that have ended the encoding, to be added to. encoding: as encode_files takes it.
    -> ({name: Shard}, newest_shards of them, how many files were encoded, what could not be saved)
    """
    writer = ShardWriter(where, mark)
    size = model.frames, model.clip.embed_dim
    opened = functools.partial(store.open_shards, where, mark, {}, job, size)
    shards = opened()
    newest = store.newest_shards(shards, folder.stamps)
    stamps = folder.stamps or {}
    files = [File(name, stamp, None) for name, stamp in stamps.items() if name not in newest]
    encoded = 0
    if files and new and not stopped:
        noting = contextlib.nullcontext([])
        if threading.current_thread() is threading.main_thread():  # others are not told of signals
            noting = noting_signals()
        with noting as stopping:
            known = shards.values()
            count = encode_files(model, folder, files, known, writer, job, stopping, **encoding)
            encoded = sum(job.gather(count))  # waits for all
            stopped += job.join(stopping)
        shards = opened()
        for unsaved in job.gather(writer.unsaved):
            shards.update(unsaved)
        newest = store.newest_shards(shards, folder.stamps)
    if folder.whole and job.rank == 0 and not writer.unsaved:
        with contextlib.suppress(OSError, RuntimeError):  # it can't be written: nothing is lost
            kept = store.newest_with_missed(folder.path, where, mark, shards, newest)
            store.repack(where, mark, shards, kept)
    return shards, newest, encoded, writer.unsaved


def build_index(model, paths, window=10, index_dir=None, new=True, job=ALONE, **encoding):
    """The Index of folders and files, of which only what is new or changed is encoded.

    paths: list of folders and files. window: seconds of a piece. index_dir: where embeddings are
    kept, if not in the folders. new=False: what the index has, without a look for new files.
    encoding: workers, batch, amp, saved. Ctrl-C ends the encoding: the Index is then of what was
    encoded. Raises DataError where nothing can be searched.
    """
    refuse_lone("paths", paths, (str, bytes, os.PathLike), "folders and files")
    # Files may come and go: all processes share out what the first one saw.
    folders = job.gather(list_videos(paths, new))[0]
    mark = store.fingerprint(model, window)
    shards = []
    file = []
    found = {}  # what tells files apart: path
    real_folder = functools.cache(os.path.realpath)
    names = []
    reasons = []  # why files can't be read
    encoded = 0
    stopped = []
    unsaved = {}
    several = len(folders) > 1
    for folder in folders:
        where = store.shard_folder(folder.path, index_dir)
        parts, newest, count, lost = update_index(
            model, folder, where, mark, new, job, stopped, window=window, **encoding
        )
        encoded += count
        unsaved |= lost
        shards += parts.values()
        for key, shard in parts.items():
            numbers = []  # of the shard's files in `found`; -1: its rows don't count
            for name, _, why, _ in shard.files:
                path = os.path.join(folder.path, name)
                number = -1
                real = path
                if several:  # a file may be in two of `paths`; it counts once
                    base, last = os.path.split(path)
                    real = real_folder(base), last
                if newest.get(name) == key and real not in found:
                    if why is None:
                        number = len(found)
                        found[real] = path
                        names.append(path if several else name)
                    else:  # it may have been elsewhere when it was read
                        reasons.append(f"video {path}{why.rpartition(name)[2]}")
                numbers.append(number)
            file.append(torch.tensor(numbers, dtype=torch.int64)[shard.file.long()])
        reasons += folder.refused
    reasons = job.join(reasons)
    if set(stopped) - {signal.SIGINT}:  # to be ended, not to answer: what is encoded is saved
        raise KeyboardInterrupt
    pieces = sum((numbers >= 0).sum().item() for numbers in file)
    job.say(store.summary(encoded, len(found), pieces, reasons, stopped))
    if not found:
        searched = " ".join(map(os.fspath, paths))
        reasons.append("the index holds none of its videos (without -n they are looked for)")
        raise DataError(f"--videos {searched}: nothing to search: {reasons[0]}")
    starts = torch.tensor([0, *map(len, file)]).cumsum(0)
    shards = move_means(shards, model.clip.logit_scale.device, job)
    return Index(shards, starts, torch.cat(file), list(found.values()), names, bool(unsaved))


# ---- queries ----

@torch.no_grad()
def encode_queries(model, tokenizer, queries, job=ALONE, amp="off"):
    """Texts, and paths of pictures and videos, in any mixture. queries (N) -> t (N,D)

    A picture's or a video's own embedding takes the text's place.
    """
    t = encode_texts(model, tokenizer, queries, job, amp=amp)
    transform = data.transform_for(model.clip)
    for text, query in zip(t, queries):
        name = query.lower()
        if name.endswith(PICTURES) and os.path.isfile(query):
            frames = read_picture(query)
        elif name.endswith(SUFFIXES) and os.path.isfile(query):
            frames = read_frames(query, model.frames)
        else:
            continue
        pixels = transform(frames)[None].to(t.device)
        # Not normalised: beside the noise, a text counts with its length.
        text.copy_(model.encode_video(pixels)[0].mean(0))
    return t


# ---- search: the best pieces by their pooled frames, then exact scores ----
# Each process searches every world-th shard.

class Hit(NamedTuple):
    """A piece [start, end) of a file, and the time of its frame nearest to the text, in seconds."""

    score: float
    file: int  # of Index.paths
    at: float
    start: float
    end: float
    times: list  # of the T frames


@torch.no_grad()
def point_scores(t, index, job=ALONE):
    """First stage: cos(t, pooled frames) of this process' rows, others -inf. t (N,D) -> (N,P)."""
    unit = F.normalize(t.float(), dim=-1)
    starts = index.starts.tolist()
    scores = unit.new_full((len(t), starts[-1]), -torch.inf)
    for s in range(job.rank, len(index.shards), job.world):
        mean = index.shards[s].mean.to(t.device)  # already there, but for those beyond MEANS
        scores[:, starts[s]:starts[s + 1]] = unit @ mean.float().T
    gone = (index.file < 0).to(t.device)
    return scores.masked_fill_(gone, -torch.inf)


def best_rows(scores, index, shortlist, files, job=ALONE):
    """The rows of the best `shortlist` scores of all processes. scores (P,) -> row numbers (n,).

    There are more where these belong to fewer than `files` files.
    """
    P = len(scores)
    scores = lowest_if_nan(scores)
    files = min(files, len(index.paths))
    while True:
        shortlist = min(shortlist, P)
        # The best of all processes are among the best of each.
        best, rows = scores.topk(shortlist)
        parts = job.gather((best.cpu(), rows.cpu()))
        best, rows = (torch.cat(x) for x in zip(*parts))
        rows = rows[best.topk(shortlist).indices]
        rows = rows[index.file[rows] >= 0]
        if shortlist == P or len(index.file[rows].unique()) >= files:
            return rows.unique()
        shortlist *= 4


def shard_of(index, rows):
    """Which shard each row is in. rows (n,) -> (n,)."""
    return torch.bucketize(rows, index.starts[1:], right=True)


def read_rows(index, rows):
    """What the shards have of some rows, in order. -> frames (n,T,D), times (n,T), spans (n,2)"""
    # Rows are in order, so those of a shard follow each other.
    numbers, sizes = shard_of(index, rows).unique_consecutive(return_counts=True)
    parts = []
    for s, own in zip(numbers.tolist(), rows.split(sizes.tolist())):
        shard = index.shards[s]
        own = own - index.starts[s]
        parts.append((shard.frames[own], shard.times[own], shard.spans[own]))
    return [torch.cat(x) for x in zip(*parts)]


@torch.no_grad()
def score_rows(model, text, index, rows, top, pieces=False, job=ALONE, **scoring):
    """Second stage: exact scores of this process' share of the rows.

    text (1,D), rows (n,), in order -> the `top` best Hits, and those that tie with them.
    scoring: trials, seed, expected.
    """
    rows = rows[shard_of(index, rows) % job.world == job.rank]
    if not len(rows):
        return []
    scores = []
    for part in rows.split(ROWS):
        f, *_ = read_rows(index, part)
        f = f.to(text.device).float()
        scores.append(exact.score(model, text, f, **scoring)[0])
    scores = torch.cat(scores).cpu()
    scores = lowest_if_nan(scores)
    file = index.file[rows]
    best = scores  # of each piece, or of each file
    if not pieces:
        best = scores.new_full((len(index.paths),), -torch.inf)
        best.scatter_reduce_(0, file, scores, "amax")
    # Only what can be among the best becomes a Hit: there may be a million rows.
    top = min(top, len(best))
    good = scores >= best.topk(top).values[-1]
    f, times, spans = read_rows(index, rows[good])
    S = cosine(text.cpu(), f.float())  # cos(t, f_j)  (n,T)
    at = times.gather(1, S.argmax(1, keepdim=True))[:, 0]
    columns = [x.tolist() for x in (scores[good], file[good], at, *spans.T, times)]
    return [Hit(*values) for values in zip(*columns) if values[0] > -torch.inf]


def merge(parts, index, top, pieces=False):
    """The best of several lists of Hits, ties by names and times; each file once, but for pieces.

    The top K of several top Ks is exact.
    """
    hits = itertools.chain(*parts)
    hits = sorted(hits, key=lambda hit: (-hit.score, index.paths[hit.file], hit.start))
    if not pieces:
        first = {}
        for hit in hits:
            first.setdefault(hit.file, hit)
        hits = list(first.values())
    return hits[:top]


@torch.no_grad()
def search(model, t, index, shortlist=1000, top=5, pieces=False, job=ALONE, **scoring):
    """The best videos for each text. t (N,D), Index -> N lists of at most `top` Hits.

    Scores are exact for the `shortlist` pieces (0: all) whose pooled frames are nearest to the
    text. pieces: list every piece, not each file once. scoring: trials, seed, expected.
    """
    if not torch.is_tensor(t):
        raise TypeError(f"t must be embeddings (N,D), as encode_texts makes them, not {t!r}")
    shortlist = max(shortlist or len(index.file), top)
    files = 0 if pieces else top
    found = []
    # Some texts at a time, as the point scores of a million pieces take 4 MB a text.
    for texts in t.split(16):
        points = point_scores(texts, index, job)
        for text, scores in zip(texts.split(1), points):
            rows = best_rows(scores, index, shortlist, files, job)
            hits = score_rows(model, text, index, rows, top, pieces, job, **scoring)
            found.append(merge(job.gather(hits), index, top, pieces))
    return found


# ---- command line ----

def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("query", nargs="*", help="what to look for; none: asks, or reads one a line from a pipe")
    add("--ckpt", default="ViT-B/32",
        help="ViT-B/32, ViT-B/16, ViT-L/14 or any CLIP's file, a checkpoint of train.py, or a "
             "released T-MASS or X-Pool one (default: %(default)s)")
    add("--videos", metavar="PATH", nargs="+", action="extend", required=True,
        help="folders and files to search")
    add("--window", type=numeric(float, 0, 1e6), default=10, metavar="SECONDS",
        help="a video longer than 1.5 of these is searched by pieces of about this length; "
             "0: whole videos (default: %(default)s)")
    add("--pieces", action="store_true", help="list every piece, not each file once by its best")
    add("--top", type=numeric(int, 1), default=5, help="results to show (default: %(default)s)")
    add("--shortlist", type=numeric(int, 0), default=1000, metavar="K",
        help="score exactly the best K pieces by mean-pooled frames; 0: all (default: %(default)s)")
    add("-f", "--files", action="store_true", help="print file names alone, for other programs")
    add("-0", "--null", dest="end", action="store_const", const="\0", default="\n",
        help="the same, each name ended by a NUL byte, for xargs -0")
    add("-n", "--no-new", action="store_true",
        help="search what the index holds: don't look for new files")
    add("--update", action="store_true", help="only bring the index up to date, for cron")
    add("--index", metavar="DIR",
        help=f"keep embeddings there (default: {INDEX}/ in the searched folder)")
    add = p.add_argument_group("page").add_argument
    add("--serve", type=numeric(int, 0, 65535), nargs="?", const=8000, metavar="PORT",
        help="show a page to search and watch on (port 8000; 0: any that is free)")
    add("--host", default="127.0.0.1",
        help="the address or name to serve it at; 0.0.0.0: to all who can reach this machine "
             "(default: %(default)s, for this machine alone)")
    add("--every", type=numeric(float, 0.01, 10 ** 6), metavar="MINUTES",
        help="look for new videos again and again (default: at the start alone)")
    add_common(p)
    p.set_defaults(expected=True)
    args = p.parse_intermixed_args(argv)  # several queries, options between them
    if 0 < args.window < 0.01:
        p.error(f"--window {args.window}: give 0.01 seconds at least, or 0 for whole videos")
    if not all(query.strip() for query in args.query):
        p.error("the query is empty: say what to look for")
    if args.query and (args.update or args.serve is not None):
        p.error("--update and --serve take no query")
    args.files |= args.end == "\0"
    if args.files and args.json == "-":
        p.error("file names and --json - would be mixed on standard output: give --json FILE")
    return args


def search_present(model, t, index, args, job=ALONE):
    """`search` as the options say it, without files that went away since the index was opened."""
    scoring = dict(trials=args.trials, seed=args.seed, expected=args.expected)
    while True:
        found = search(model, t, index, args.shortlist, args.top, args.pieces, job, **scoring)
        shown = [index.paths[hit.file] for hits in found for hit in hits]
        if job.gather(all(map(os.path.exists, shown)))[0]:
            return found
        # Where one is gone many may be, as a disk is away.
        there = job.gather([*map(os.path.exists, index.paths)])[0]
        index.file[~torch.tensor([*there, True])[index.file]] = -1


def answer(model, tokenizer, index, args, job):
    """Search for every query, and print what is found. -> {query: [dict of rank, score, ...]}"""
    found = {}
    for queries in questions(args, job):
        t = encode_queries(model, tokenizer, queries, job, args.amp)
        results = search_present(model, t, index, args, job)
        for query, hits in zip(queries, results):
            if not hits and (index.file < 0).all():
                raise DataError("the videos of the index are gone: look for others, without -n")
            if not hits:
                raise WeightsError(
                    f"{args.ckpt}: no score of {query!r} is a finite number, nothing can be "
                    "ranked: its weights are damaged, or its training went wrong"
                )
            found[query] = [
                dict(rank=rank, score=hit.score, file=index.paths[hit.file], at=round(hit.at, 3),
                     start=round(hit.start, 3), end=round(hit.end, 3))
                for rank, hit in enumerate(hits, 1)
            ]
            if args.files and job.rank == 0:
                print_files([record["file"] for record in found[query]], args.end)
            elif not args.files and args.json != "-":
                job.say(table(query, hits, index))
    return found


def write_results(model, found, args):
    """--json and --report."""
    if args.json == "-":
        print(json.dumps(found, indent=1), flush=True)
    elif args.json:
        write_json(args.json, found)
    if args.report:
        names = "ckpt", "window", "shortlist", "trials", "expected", "seed"
        settings = {name: getattr(args, name) for name in names}
        settings.update(model.config, prior=model.prior, prior_std=model.prior_std)
        settings["videos"] = " ".join(args.videos)
        write_search_report(args.report, found, settings)
        print(f"report: {args.report}", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        job = start_processes(args.device)
        page = None
        if args.serve is not None:
            if job.world > 1:
                raise DataError("--serve is for one process: start it without torchrun")
            page = SearchPage(args.host, args.serve)  # before what takes long: it may not be free
        model, tokenizer, _ = load_model(args, job)
        build = functools.partial(
            build_index,
            model,
            args.videos,
            args.window,
            args.index,
            new=not args.no_new,
            job=job,
            workers=args.workers,
            batch=args.batch,
            amp=args.amp,
        )
        if page:
            args.top = max(args.top, ON_PAGE)

            def find(query, index):  # a path from a browser is a text too
                t = encode_texts(model, tokenizer, [query], amp=args.amp)
                return search_present(model, t, index, args)[0]

            return page.run(build, find, model.frames, args.every)
        index = build()
    if args.update:
        return 2 if index.unsaved else 0
    found = answer(model, tokenizer, index, args, job)
    if job.rank == 0:
        write_results(model, found, args)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
