#!/usr/bin/env python3
"""Search your own videos by text, and find the moment.

    python search.py "a dog jumps into water" --videos ~/clips      # CLIP ViT-B/32 as it is
    python search.py "a red star" --videos data/shapes/videos --ckpt model.pt
    python search.py photo.jpg --videos ~/clips                     # videos that look like it
    python search.py --videos ~/clips                               # prompts, or reads a pipe
    python search.py --videos ~/clips --serve                       # a page to search and watch on
    python search.py -0 "a dog" --videos ~/clips | xargs -0 ls -l   # only file names
    torchrun --nproc_per_node 8 search.py "a dog" --videos ~/clips  # each process does its share

A long video is split into pieces of a few seconds, and each piece is a row of the gallery. The
embeddings are kept in the folder .tmass-index/ (lib/index.py), so only new videos are encoded. This
file follows the steps of a search: encoding, build_index, queries, search in two stages, results,
and the command line.
"""
import collections
import contextlib
import functools
import glob
import itertools
import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

import data
from eval import add_run, autocast, encode_texts, lowest_if_nan
from lib import exact
from lib import index as store
from lib.common import (
    DataError,
    Parser,
    Progress,
    check_outputs,
    clock,
    cure,
    escaped,
    first_few,
    first_line,
    numeric,
    write_output,
)
from lib.index import INDEX, File, ShardWriter, list_videos
from lib.processes import ALONE, Stopped, cores, loading, noting_signals, run, start_processes
from lib.serve import SearchPage, count_pieces, span
from lib.video import SUFFIXES, Piece, read_frames, read_pieces
from lib.weights import load_model
from tmass import cosine

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic")
ROWS = 1000   # number of pieces scored exactly at a time
ON_PAGE = 20  # least number of results on the page


# ---- encoding ----

@dataclass
class PieceDataset(IterableDataset):
    """The pieces of a folder's files. Each file is read by one worker, in order.

    Yields (file number, Piece of the tensors of up to `batch` Pieces) and, at the end of a file,
    (file number, File). If the system refused to read a file, which says nothing about the file
    itself, its File has an empty `content`.
    """
    folder: str
    files: list          # of File
    known: set           # of (stamp, content): the frames of such files are not read
    read: Callable       # path -> Pieces
    transform: Callable
    batch: int

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for v in range(first, len(self.files), step):
            file = self.files[v]
            path = os.path.join(self.folder, file.name)
            why = None
            content = ""
            try:
                content = store.content_of(path)
                if (file.stamp, content) not in self.known:
                    pieces = (
                        piece._replace(frames=self.transform(piece.frames))
                        for piece in self.read(path)
                    )
                    while part := list(itertools.islice(pieces, self.batch)):
                        yield v, default_collate(part)
            # An unreadable file must not end the search: it is recorded like any other.
            except (DataError, OSError, MemoryError) as error:
                why = str(error)
                if path not in why:
                    why = f"{path}: can't be read: {why}"
                if was_refused(path, error):
                    content = ""
            yield v, file._replace(why=why, content=content)


def was_refused(path, error):
    """Whether the system, not the file, caused the error, so that reading may succeed next time."""
    # Lack of memory, for which torch raises a RuntimeError, is one of the errors with a `cure`.
    while error and not (isinstance(error, OSError) or cure(error)):
        error = error.__context__
    return error is not None or not os.access(path, os.R_OK)


@torch.no_grad()
def encode_files(model, folder, files, shards, window, workers=0, batch=16, amp="off"):
    """Encode files of a Folder. -> iterator over (Shard of one file, whether it was encoded)

    files: list of File. shards: what is in the index; a file with the stamp and content of one of
    theirs is a copy of it, or has another name now, and gets its rows. Error messages are added to
    folder.reasons; a file that the system refused to read yields nothing, and is tried again next
    time.
    """
    device = model.clip.logit_scale.device
    T = model.frames
    known = {
        (file.stamp, file.content): (file, shard)
        for shard in shards for file in shard.files if file.content and not file.why
    }
    read = functools.partial(read_pieces, frames=T, window=window)
    transform = data.transform_for(model.clip)
    dataset = PieceDataset(folder.path, files, set(known), read, transform, batch)
    workers = min(len(files), cores() if workers is None else workers)
    empty = torch.zeros(0, T, model.clip.embed_dim), torch.zeros(0, T), torch.zeros(0, 2)
    begun = collections.defaultdict(list)  # what is encoded of each file so far
    with loading(dataset, workers=workers, pin=device.type == "cuda") as batches:
        for v, entry in batches:
            if isinstance(entry, Piece):
                pixels = entry.frames.to(device, non_blocking=True)
                with autocast(device, amp):
                    f = model.encode_video(pixels)
                times = torch.stack(entry.times, 1)
                spans = torch.stack([entry.start, entry.end], 1)
                begun[v].append((f.cpu(), times.float(), spans.float()))
                continue
            parts = begun.pop(v, [])
            key = entry.stamp, entry.content
            if entry.why:  # perhaps part-way: none of the file's pieces are kept
                parts = []
                folder.reasons.append(entry.why)
            if key in known:
                other, shard = known[key]
                shard = store.keep_files(shard, [file is other for file in shard.files])
                yield shard._replace(files=[entry]), False
            elif entry.content:
                tensors = map(torch.cat, zip(empty, *parts))
                yield store.file_shard(*tensors, entry), entry.why is None


# ---- the index of each folder, and the gallery of all ----

class Index(NamedTuple):
    """The pieces of all shards as one gallery of P rows. All processes have the same."""

    shards: list           # of Shard
    starts: torch.Tensor   # (shards + 1,): the number of each shard's first row, then P
    file: torch.Tensor     # (P,) int64: each row's file, as an index into `paths`; -1: not searched
    paths: list            # of the files
    names: list            # of the files, as shown in results
    stopped: bool = False  # Ctrl-C ended the encoding


named = set()  # error messages that were printed: each is printed once


def update_folder(encode, folder, where, mark, size, new, job, stopped, saved):
    """Encode the new and changed files of a Folder, in all processes together.

    encode: encode_files with its settings. where: the folder of its shards. mark: the fingerprint.
    size: (T,D). stopped: list of the signals that ended the encoding; new ones are added.
    -> ({name: Shard}, number of videos encoded)
    """
    names = sorted(glob.glob(f"{mark}*.shard", root_dir=where))  # from the oldest
    names = job.gather(names)[0]
    shards = store.open_shards(where, names, size, job)
    newest = store.newest_files(shards, folder.stamps)
    stamps = folder.stamps if new else {}
    files = [File(*item) for item in stamps.items() if item[0] not in newest]
    if not files or stopped:
        return shards, 0
    progress = Progress("encoding", len(files), unit="files", enabled=job.rank == 0)
    writer = ShardWriter(where, mark, saved)
    encoded = 0
    with noting_signals() as stopping:
        with contextlib.suppress(Stopped):
            found = encode(folder, files[job.rank::job.world], shards.values())
            for done, (shard, is_new) in enumerate(found, 1):
                writer.add(shard)
                encoded += is_new
                progress.update(done * job.world)  # assume that all progress equally
                if stopping:
                    break
        writer.save()
        encoded = sum(job.gather(encoded))  # also waits until all processes have saved
        stopped += job.join(stopping)
    shards |= store.open_shards(where, job.join(writer.names), size, job)
    if job.rank == 0:
        store.join_small(where, mark, shards)
    return shards, encoded


def build_index(
    model, paths, window=10, index_dir=None, new=True, job=ALONE, saved=lambda: None, quiet=False,
    **encoding
):
    """Build the Index of folders and files. Only new and changed files are encoded.

    paths: list of folders and files. window: length of a piece in seconds. index_dir: where to keep
    the embeddings, instead of in the folders. new=False: use only what the index holds. saved:
    called after each shard that is saved. quiet: print nothing if there is nothing new. encoding:
    workers, batch and amp, as for encode_files.

    Ctrl-C stops the encoding, and the Index holds what was encoded so far. Raises DataError if
    there is nothing to search, or the embeddings can't be saved.
    """
    if isinstance(paths, (str, bytes, os.PathLike)):  # a str would pass as a list of letters
        raise TypeError(f"paths must be a list of folders and files, not {paths!r}")
    # Files may change in the meantime, so all processes work from the list of the first.
    folders = job.gather(list_videos(paths, new))[0]
    mark = store.fingerprint(model, window)
    size = model.frames, model.clip.embed_dim
    encode = functools.partial(encode_files, model, window=window, **encoding)
    shards = []
    file = []
    found = {}  # real path of each file that is searched: path as given
    names = []
    reasons = []
    why = "the index holds none of these videos (run without -n to find them)"
    encoded = 0
    stopped = []
    for folder in folders:
        where = store.shard_folder(folder.path, index_dir)
        opened, count = update_folder(
            encode, folder, where, mark, size, new, job, stopped, saved)
        shards += opened.values()
        encoded += count
        reasons += job.join(folder.reasons)
        base = os.path.realpath(folder.path)
        newest = store.newest_files(opened, folder.stamps)
        numbers = {}  # File: position in `found`
        for name, one in newest.items():
            real = os.path.join(base, name)  # a file may lie in two of `paths`
            if one.why:
                why = one.why
            elif real not in found:
                numbers[one] = len(found)
                found[real] = os.path.join(folder.path, name)
                names.append(name)
        for shard in opened.values():
            # Two searches at once may have encoded a file: it counts in one of their shards.
            searched = [numbers.pop(one, -1) for one in shard.files]
            searched = torch.tensor(searched, dtype=torch.int64)
            file.append(searched[shard.file.long()])
    # Only Ctrl-C goes on to answer the queries. What was encoded is saved in either case.
    for number in stopped:
        if number != signal.SIGINT or not found:
            raise KeyboardInterrupt(number)
    file = torch.cat(file) if file else torch.zeros(0)
    fresh = sorted({*reasons} - named)
    named.update(fresh)
    if encoded or fresh or not quiet:
        pieces = (file >= 0).sum().item()
        line = f"{len(found)} in the index, {_count(pieces, 'piece')}"
        if new:
            line = f"encoded {_count(encoded, 'video')}, {line}"
        else:
            line += " (-n: some may be gone)"
        if stopped:
            line += "; stopped: the next search encodes the others"
        if fresh:
            line += "; left out:"
        job.say("\n  ".join([line, *first_few(fresh)]))
    if not found:
        raise DataError(f"nothing to search: {[*reasons, why][0]}")
    starts = torch.tensor([0, *(len(shard.file) for shard in shards)]).cumsum(0)
    # Every query reads all pooled frames of this process' shards. Other tensors stay memory-mapped.
    for s in range(job.rank, len(shards), job.world):
        mean = shards[s].mean.to(model.clip.logit_scale.device)
        shards[s] = shards[s]._replace(mean=mean)
    paths = list(found.values())
    return Index(shards, starts, file, paths, names if len(folders) == 1 else paths, bool(stopped))


def _count(number, noun):
    """A number with its noun: 1 piece, 2 pieces."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ---- queries ----

def names_file(query):
    """Whether a query is the path of a picture or video. Raises DataError if that is missing."""
    if not query.lower().endswith((*PICTURES, *SUFFIXES)):
        return False
    if os.path.isfile(query):
        return True
    if " " in query and os.sep not in query:  # words, such as "how to open file.mp4"
        return False
    raise DataError(f"{query}: there is no such picture or video; to look for these words, add "
                    "others")


def read_picture(path):
    """Read a picture, rotated as its EXIF data says. -> uint8 (1,3,H,W). Raises DataError."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits of grey, which convert("RGB") would clip
                picture = picture.convert("I").point(lambda x: x / 256)
            picture = picture.convert("RGB")
    except Exception as error:  # each format's decoder raises its own errors
        raise DataError(f"picture {path} can't be read: {first_line(error)}") from None
    return pil_to_tensor(picture)[None]


@torch.no_grad()
def encode_query(model, tokenizer, query, job=ALONE, amp="off"):
    """Encode a text, or the picture or video of which it is the path. str -> t (1,D)"""
    if not names_file(query):
        return encode_texts(model, tokenizer, [query], job, amp=amp)
    if query.lower().endswith(PICTURES):
        frames = read_picture(query)
    else:
        frames = read_frames(query, model.frames)
    pixels = data.transform_for(model.clip)(frames)[None]
    # Not normalised, as for a text: the noise does not scale with t, so |t| matters.
    return model.encode_video(pixels.to(model.clip.logit_scale.device)).mean(1)


# ---- search: the best pieces by their pooled frames, then exact scores ----
# Each process reads its share of the shards, and then of the best pieces.

class Hit(NamedTuple):
    """A result: the piece [start, end) of a file. Times are in seconds."""

    score: float
    file: int  # index into Index.paths
    at: float  # time of the frame nearest to the text
    start: float
    end: float
    times: list  # of the T frames


@torch.no_grad()
def point_scores(text, index, job=ALONE):
    """First stage: cos(t, pooled frames). text (1,D) -> (P,); -inf for what is not searched."""
    unit = F.normalize(text.float(), dim=-1)[0]
    starts = index.starts.tolist()
    scores = unit.new_zeros(starts[-1])
    for s in range(job.rank, len(index.shards), job.world):
        scores[starts[s]:starts[s + 1]] = index.shards[s].mean.float() @ unit
    scores = lowest_if_nan(job.sum(scores))
    ignored = (index.file < 0).to(unit.device)
    return scores.masked_fill(ignored, -torch.inf)


def read_rows(index, rows):
    """Read rows (n,) from their shards. -> frames (n,T,D), times (n,T), spans (n,2)"""
    numbers = torch.bucketize(rows, index.starts[1:], right=True)
    rows = rows - index.starts[numbers]
    parts = []
    for s, row in zip(numbers.tolist(), rows.tolist()):
        shard = index.shards[s]
        parts.append((shard.frames[row], shard.times[row], shard.spans[row]))
    return [torch.stack(x) for x in zip(*parts)]


@torch.no_grad()
def score_rows(model, text, index, rows, job=ALONE):
    """Second stage: exact scores, in closed form. text (1,D), rows (n,) -> (n,)"""
    scores = text.new_zeros(len(rows))
    for part in exact.blocks(len(rows), ROWS)[job.rank::job.world]:
        f, *_ = read_rows(index, rows[part])
        f = f.to(text.device).float()
        scores[part] = exact.score(model, text, f, expected=True)
    return lowest_if_nan(job.sum(scores).cpu())


def best_hits(text, index, rows, scores, top, pieces, exists):
    """The Hits of the `top` best files, or pieces. text (1,D), rows (n,), scores (n,) -> list

    Each file is listed once, by its best piece, unless `pieces` is true. Ties are ordered by path,
    then by time. exists: whether a path is still there.
    """
    files = index.file[rows].tolist()
    values = scores.tolist()
    chosen = {}  # number of the file, or of the piece: its position in `rows`
    for k in sorted(range(len(rows)), key=lambda k: (-values[k], index.paths[files[k]], k)):
        if len(chosen) < top and values[k] > -math.inf and exists(index.paths[files[k]]):
            chosen.setdefault(k if pieces else files[k], k)
    chosen = list(chosen.values())
    if not chosen:
        return []
    f, times, spans = read_rows(index, rows[chosen])
    S = cosine(text.cpu(), f.float())  # cos(t, f_j)  (n,T)
    at = times.gather(1, S.argmax(1, keepdim=True))[:, 0]
    columns = [x.tolist() for x in (at, *spans.T, times)]
    return [Hit(values[k], files[k], *moment) for k, *moment in zip(chosen, *columns)]


@torch.no_grad()
def search(
    model, t, index, top=5, shortlist=1000, pieces=False, job=ALONE, exists=os.path.exists
):
    """Find the best videos for each text. t (N,D), Index -> N lists of at most `top` Hits.

    The `shortlist` pieces whose pooled frames are nearest to the text get exact scores; more of
    them, if they belong to too few files. pieces: list every piece, instead of each file once.
    exists: function of a path; files that are not there any more are left out.
    """
    if not torch.is_tensor(t):
        raise TypeError(f"t must be embeddings (N,D), as encode_texts makes them, not {t!r}")
    P = len(index.file)
    found = []
    for text in t.split(1):
        points = point_scores(text, index, job)
        K = max(shortlist, top)
        while True:
            rows = points.topk(min(K, P)).indices.cpu().sort().values
            rows = rows[index.file[rows] >= 0]
            scores = score_rows(model, text, index, rows, job)
            hits = best_hits(text, index, rows, scores, top, pieces, exists)
            if K >= P or job.gather(len(hits))[0] >= min(top, len(index.paths)):
                break
            K *= 4
        found.append(hits)
    return found


# ---- results ----

def table(query, hits, index):
    """A query's results as a table for the terminal. -> str"""
    lines = [f"\n{escaped(query)}", " rank   score  at       file"]
    pieces = count_pieces(index)
    for rank, hit in enumerate(hits, 1):
        name = escaped(index.names[hit.file]) + span(hit, pieces)
        lines.append(f"{rank:5d} {hit.score:7.4f}  {clock(hit.at)}  {name}")
    return "\n".join(lines)


def print_files(names, end):
    """Print only file names: escaped on a terminal, and elsewhere the exact bytes of the names."""
    if sys.stdout.isatty() and end == "\n":
        names = map(escaped, names)
    text = "".join(name + end for name in names)
    sys.stdout.buffer.write(os.fsencode(text))
    sys.stdout.buffer.flush()


def questions(args, job):
    """Yield queries: from the command line, else one by one from a prompt or a pipe."""
    yield from args.query
    if args.query:
        return
    sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    asked = terminal
    line = ""
    while line is not None:
        if line.strip():
            asked = True
            yield line.strip()
        line = None
        if job.rank == 0:
            with contextlib.suppress(EOFError), contextlib.redirect_stdout(sys.stderr):
                line = input("query> " if terminal else "")
        line = job.gather(line)[0]
    if not asked:
        raise DataError(
            'no query: say what to look for, as in search.py "a dog jumps" --videos DIR, or give '
            "one query per line on standard input"
        )


def answer(model, tokenizer, index, args, job):
    """Print the results of every query. -> {query: [dict of rank, score, ...]}, exit status."""
    found = {}
    status = 0
    for query in questions(args, job):
        try:
            t = encode_query(model, tokenizer, query, job, args.amp)
        except DataError as error:
            if args.query:
                raise
            # One of several that are asked one by one: the others have their answers.
            with contextlib.redirect_stdout(sys.stderr):
                job.say(f"error: {escaped(str(error))}")
            status = 2
            continue
        [hits] = search(model, t, index, args.top, pieces=args.pieces, job=job)
        if not hits:
            if not any(map(os.path.exists, index.paths)):
                raise DataError("the videos of the index are gone: run without -n to find others")
            raise DataError(f"{args.ckpt}: no score of {query!r} is a finite number: its weights "
                            "are damaged, or its training went wrong")
        found[query] = [
            dict(rank=rank, score=hit.score, file=index.paths[hit.file], at=round(hit.at, 3),
                 start=round(hit.start, 3), end=round(hit.end, 3))
            for rank, hit in enumerate(hits, 1)
        ]
        if args.files and job.rank == 0:
            print_files([record["file"] for record in found[query]], args.end)
        elif not args.files and args.json != "-":
            job.say(table(query, hits, index))
    return found, status


# ---- command line ----

def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("query", nargs="*",
                   help="what to look for; none: asks, or reads one a line from a pipe")
    p.add_argument("--ckpt", metavar="NAME", default="ViT-B/32",
                   help="ViT-B/32, ViT-B/16, ViT-L/14 or any CLIP's file, a checkpoint of "
                        "train.py, or a released T-MASS or X-Pool one (default: %(default)s)")
    p.add_argument("--videos", metavar="PATH", nargs="+", action="extend", required=True,
                   help="folders and files to search")
    p.add_argument("--window", metavar="SECONDS", type=numeric(float, 0, 1e6), default=10,
                   help="a video longer than 1.5 of these is searched by pieces of about this "
                        "length; 0: whole videos (default: %(default)s)")
    p.add_argument("--pieces", action="store_true",
                   help="list every piece, not each file once by its best")
    p.add_argument("--top", metavar="N", type=numeric(int, 1), default=5,
                   help="results to show (default: %(default)s)")
    p.add_argument("-f", "--files", action="store_true",
                   help="print file names alone, for other programs")
    p.add_argument("-0", "--null", dest="end", action="store_const", const="\x00", default="\n",
                   help="the same, each name ended by a NUL byte, for xargs -0")
    p.add_argument("-n", "--no-new", action="store_true",
                   help="search what the index holds: don't look for new files")
    p.add_argument("--update", action="store_true",
                   help="only bring the index up to date, for cron; says what is new")
    p.add_argument("--index", metavar="DIR",
                   help=f"keep embeddings there (default: {INDEX}/ in the searched folder)")
    g = p.add_argument_group("page")
    g.add_argument("--serve", metavar="PORT", type=numeric(int, 0, 65535), nargs="?", const=8000,
                   help="show a page to search and watch on (port 8000; 0: any that is free)")
    g.add_argument("--host", default="127.0.0.1",
                   help="the address or name to serve it at; 0.0.0.0: to all who can reach this "
                        "machine; by default for this machine alone (default: %(default)s)")
    g.add_argument("--every", metavar="MINUTES", type=numeric(float, 0.01, 10 ** 6),
                   help="look for new videos again and again (default: at the start alone)")
    add_run(p)
    args = p.parse_intermixed_args(argv)  # several queries, options between them
    args.files |= args.end == "\0"
    results = args.query or args.files or args.json
    for wrong, message in (
        (not all(map(str.strip, args.query)), "the query is empty: say what to look for"),
        (results and (args.update or args.serve is not None),
         "--update and --serve take no query, and nothing that is for its results"),
        (args.update and args.no_new, "--update looks for new files: drop -n"),
        (args.every and args.serve is None, "--every goes with --serve"),
        ((args.json or "").lower().endswith((*SUFFIXES, *PICTURES)),
         f"--json {args.json} has the name of a video or picture: give another name"),
        (args.files and args.json == "-",
         "file names and --json - would be mixed on standard output: give --json FILE"),
    ):
        if wrong:
            p.error(message)
    return args


def main(argv=None):
    args = parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        job = start_processes(args.device)
        page = None
        if args.serve is not None:
            if job.world > 1:
                raise DataError("--serve is for one process: start it without torchrun")
            page = SearchPage(args.host, args.serve)
        # What can be wrong is looked at before a model is downloaded.
        if args.json != "-":
            check_outputs({"--json": args.json}, [args.ckpt])
        list_videos(args.videos, not args.no_new)
        for query in args.query:
            names_file(query)
        model, tokenizer, config = load_model(args.ckpt, job)
        line = (f"{args.ckpt}: T={model.frames}, pooling {model.config['pooling']}, radius "
                f"{model.config['radius']}, on {job.device}")
        if "unfinished" in config:
            line += f", unfinished: {config['unfinished']}"
        if not args.update:
            job.say(line)
        build = functools.partial(
            build_index,
            model,
            args.videos,
            args.window,
            args.index,
            new=not args.no_new,
            job=job,
            quiet=args.update or page,
            workers=args.workers,
            batch=args.batch,
            amp=args.amp,
        )
        if page:
            def find(query, index):  # only texts: no file that a browser names is opened
                t = encode_texts(model, tokenizer, [query], amp=args.amp)
                return search(model, t, index, max(args.top, ON_PAGE), pieces=args.pieces)[0]

            return page.run(build, find, model.frames, args.every)
        index = build()
    if args.update:
        return 0
    found, status = answer(model, tokenizer, index, args, job)
    text = json.dumps(found, indent=1)
    if args.json == "-":
        job.say(text)
    elif args.json and job.rank == 0:
        write_output("--json", args.json, text)
    return status


if __name__ == "__main__":
    sys.exit(run(main))
