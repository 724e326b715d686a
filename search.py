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
file follows the steps of a search: encoding, build_index, queries, search in two stages, and the
command line.
"""
import contextlib
import functools
import itertools
import json
import os
import signal
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchvision.transforms.v2.functional import pil_to_tensor

import data
from eval import add_common, encode_texts, lowest_if_nan, say_loaded
from lib import exact
from lib import index as store
from lib.common import (
    DataError,
    Parser,
    Progress,
    WeightsError,
    check_outputs,
    clock,
    cure,
    escaped,
    first_line,
    numeric,
    write_output,
)
from lib.index import INDEX, File, ShardWriter, list_videos, move_means
from lib.processes import (
    ALONE,
    Stopped,
    cores,
    loading,
    noting_signals,
    run,
    start_processes,
)
from lib.serve import SearchPage, count_pieces, span
from lib.video import SUFFIXES, Piece, Segment, read_frames, read_pieces
from lib.weights import load_model
from tmass import cosine

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic")
ROWS = 1000   # number of pieces scored exactly at a time
ON_PAGE = 20  # least number of results on the page


# ---- encoding ----

class PieceDataset(data.VideoDataset, IterableDataset):
    """The pieces of a folder's files, in batches. Each file is read by one worker, in order.

    Yields (rows, pixels uint8 (n,T,3,P,P) or None). A row is (file number, Piece without frames)
    or, at the end of a file, (file number, File). If the system refused to read a file, which says
    nothing about the file itself, its File has an empty `content`.

    known: set of values of `content_of`. The frames of files with such content are not read.
    """

    def __init__(self, folder, files, frames, window, transform, batch, known):
        segments = [Segment(os.path.join(folder, file.name)) for file in files]
        super().__init__(segments, frames, transform)
        self.read = functools.partial(read_pieces, frames=frames, window=window)
        self.files = files
        self.batch = batch
        self.known = known

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = []
        pixels = []
        for v in range(first, len(self.files), step):
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
                        yield rows, default_collate(pixels)
                        rows = []
                        pixels = []
            # An unreadable file must not end the search: it is recorded like any other.
            except (DataError, OSError, MemoryError) as error:
                why = str(error)
                if path not in why:
                    why = f"{path}: can't be read: {why}"
                if was_refused(path, error):
                    content = ""
            rows.append((v, self.files[v]._replace(why=why, content=content)))
        if rows:
            yield rows, default_collate(pixels) if pixels else None


def was_refused(path, error):
    """Whether the system, not the file, caused the error, so that reading may succeed next time."""
    # Lack of memory, for which torch raises a RuntimeError, is one of the errors with a `cure`.
    while error and not (isinstance(error, OSError) or cure(error)):
        error = error.__context__
    return error is not None or not os.access(path, os.R_OK)


@torch.no_grad()
def encode_files(
    model, folder, files, shards, writer, job, stopping, window, saved=lambda: None, workers=0,
    batch=16, amp="off"
):
    """Encode this process' share of a folder's files. -> number of videos encoded

    folder: a Folder; error messages are added to its `refused`. files: all new Files, to be divided
    among the processes. shards: what is already encoded; copies of those files reuse their rows.
    writer: a ShardWriter. stopping: a list; encoding stops once it is not empty. saved: called
    after each shard that is saved while encoding.
    """
    device = model.clip.logit_scale.device
    T = model.frames
    files = files[job.rank::job.world]
    known = {
        file.content: (file, shard)
        for shard in shards for file in shard.files if not file.why
    }
    known.pop("", None)  # the `content` of files in shards of earlier versions
    transform = data.transform_for(model.clip)
    dataset = PieceDataset(folder.path, files, T, window, transform, batch, set(known))
    total = len(files) * job.world  # assume that all processes progress equally
    progress = Progress("encoding", total, unit="files", enabled=job.rank == 0)
    empty = torch.zeros(0, T, model.clip.embed_dim), torch.zeros(0, T), torch.zeros(0, 2)
    # A file's pieces may span several batches, mixed with batches from other workers.
    begun = [[empty] for _ in files]  # the pieces of each file so far
    done = 0
    encoded = 0
    workers = min(len(files), cores() if workers is None else workers)
    reading = loading(dataset, workers=workers, pin=device.type == "cuda")
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
                    # If reading fails part-way, none of the file's pieces are kept.
                    pieces = begun[v][:1] if entry.why else begun[v]
                    tensors = (torch.cat(x) for x in zip(*pieces))
                    writer.parts.append(store.file_shard(*tensors, entry))
                    encoded += entry.why is None
                begun[v] = None
            progress.update(done * job.world)
            if writer.save_if_due():
                saved()
            if stopping:
                break
    writer.save()
    return encoded


# ---- the index of each folder, and the gallery of all ----

class Index(NamedTuple):
    """The pieces of all shards as one gallery of P rows. All processes have the same."""

    shards: list          # of Shard
    starts: torch.Tensor  # (shards + 1,): the number of each shard's first row, then P
    file: torch.Tensor    # (P,) int64: each row's file, as an index into `paths`; -1: not searched
    paths: list           # of the files
    names: list           # of the files, as shown in results
    unsaved: bool = False  # some of it could not be saved by this process
    stopped: bool = False  # Ctrl-C ended the encoding


def update_index(model, folder, where, mark, new, job, stopped, **encoding):
    """Encode the new and changed files of a Folder, in all processes together.

    where: the folder of its shards. mark: the fingerprint. new=False: nothing is encoded. stopped:
    list of the signals that interrupted the encoding; new ones are added. encoding: arguments of
    encode_files. -> ({name: Shard}, their newest_shards, number of videos encoded, what could not
    be saved)
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
        with noting_signals() as stopping:
            known = shards.values()
            count = encode_files(model, folder, files, known, writer, job, stopping, **encoding)
            encoded = sum(job.gather(count))  # also waits until all processes have saved
            stopped += job.join(stopping)
        shards = opened()
        for unsaved in job.gather(writer.unsaved):
            shards.update(unsaved)
        newest = store.newest_shards(shards, folder.stamps)
    if folder.whole and job.rank == 0 and not writer.unsaved:
        with contextlib.suppress(OSError, RuntimeError):  # can't be written: the old shards stay
            kept = store.newest_with_missed(folder.path, where, mark, shards, newest)
            store.repack(where, mark, shards, kept)
    return shards, newest, encoded, writer.unsaved


def build_index(model, paths, window=10, index_dir=None, new=True, job=ALONE, **encoding):
    """Build the Index of folders and files. Only new and changed files are encoded.

    paths: list of folders and files. window: length of a piece in seconds. index_dir: where to keep
    the embeddings, instead of in the folders. new=False: use only what the index holds. encoding:
    workers, batch, amp and saved, as for encode_files.

    Ctrl-C stops the encoding, and the Index holds what was encoded so far. Raises DataError if
    there is nothing to search.
    """
    if isinstance(paths, (str, bytes, os.PathLike)):  # a str would pass as a list of letters
        raise TypeError(f"paths must be a list of folders and files, not {paths!r}")
    # Files may change in the meantime, so all processes work from the list of the first.
    folders = job.gather(list_videos(paths, new))[0]
    mark = store.fingerprint(model, window)
    shards = []
    file = []
    found = {}  # what identifies a file: path as given
    real_folder = functools.cache(os.path.realpath)
    names = []
    reasons = []  # error messages of unreadable files
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
            numbers = []  # the position in `found` of each of the shard's files; -1: not searched
            for name, _, why, _ in shard.files:
                path = os.path.join(folder.path, name)
                number = -1
                real = path
                if several:  # a file that lies in two of `paths` is searched once
                    base, last = os.path.split(path)
                    real = real_folder(base), last
                if newest.get(name) == key and real not in found:
                    if why is None:
                        number = len(found)
                        found[real] = path
                        names.append(path if several else name)
                    else:  # it may have been elsewhere when it was read
                        reasons.append(f"{path}{why.rpartition(name)[2]}")
                numbers.append(number)
            file.append(torch.tensor(numbers, dtype=torch.int64)[shard.file.long()])
        reasons += folder.refused
    reasons = job.join(reasons)
    # Only Ctrl-C goes on to answer the queries. What was encoded is saved in either case.
    if set(stopped) - {signal.SIGINT}:
        raise KeyboardInterrupt
    pieces = sum((numbers >= 0).sum().item() for numbers in file)
    job.say(store.summary(encoded, len(found), pieces, reasons, stopped))
    if not found:
        searched = " ".join(map(os.fspath, paths))
        reasons.append("the index holds none of its videos (run without -n to find them)")
        raise DataError(f"--videos {searched}: nothing to search: {reasons[0]}")
    starts = torch.tensor([0, *map(len, file)]).cumsum(0)
    shards = move_means(shards, model.clip.logit_scale.device, job)
    return Index(shards, starts, torch.cat(file), list(found.values()), names, bool(unsaved),
                 bool(stopped))


# ---- queries ----

@torch.no_grad()
def encode_queries(model, tokenizer, queries, job=ALONE, amp="off"):
    """Encode queries, each a text or the path of a picture or video. list of N str -> t (N,D)

    A picture or video is encoded by the image tower, and its embedding takes the place of a text's.
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
        # Not normalised, as for a text: the noise does not scale with t, so |t| matters.
        text.copy_(model.encode_video(pixels)[0].mean(0))
    return t


# ---- search: the best pieces by their pooled frames, then exact scores ----
# With several processes, process `rank` searches the shards rank, rank + world, ...

class Hit(NamedTuple):
    """A result: the piece [start, end) of a file. Times are in seconds."""

    score: float
    file: int  # index into Index.paths
    at: float  # time of the frame nearest to the text
    start: float
    end: float
    times: list  # of the T frames


@torch.no_grad()
def point_scores(t, index, job=ALONE):
    """First stage: cos(t, pooled frames). t (N,D) -> (N,P), with -inf for other processes' rows."""
    unit = F.normalize(t.float(), dim=-1)
    starts = index.starts.tolist()
    scores = unit.new_full((len(t), starts[-1]), -torch.inf)
    for s in range(job.rank, len(index.shards), job.world):
        mean = index.shards[s].mean.to(t.device)  # move_means has put most of them there
        scores[:, starts[s]:starts[s + 1]] = unit @ mean.float().T
    ignored = (index.file < 0).to(t.device)
    return scores.masked_fill_(ignored, -torch.inf)


def best_rows(scores, index, shortlist, files, job=ALONE):
    """The rows of the `shortlist` best scores over all processes. scores (P,) -> rows (n,), sorted

    The shortlist is extended until its rows belong to at least `files` files.
    """
    P = len(scores)
    scores = lowest_if_nan(scores)
    files = min(files, len(index.paths))
    while True:
        shortlist = min(shortlist, P)
        # The best rows overall are among the best rows of each process.
        best, rows = scores.topk(shortlist)
        parts = job.gather((best.cpu(), rows.cpu()))
        best, rows = (torch.cat(x) for x in zip(*parts))
        rows = rows[best.topk(shortlist).indices]
        rows = rows[index.file[rows] >= 0]
        if shortlist == P or len(index.file[rows].unique()) >= files:
            return rows.unique()
        shortlist *= 4


def shard_of(index, rows):
    """The number of each row's shard. rows (n,) -> (n,)."""
    return torch.bucketize(rows, index.starts[1:], right=True)


def read_rows(index, rows):
    """Read rows (n,), sorted, from their shards. -> frames (n,T,D), times (n,T), spans (n,2)"""
    # As the rows are sorted, rows of the same shard are adjacent.
    numbers, sizes = shard_of(index, rows).unique_consecutive(return_counts=True)
    parts = []
    for s, inside in zip(numbers.tolist(), rows.split(sizes.tolist())):
        shard = index.shards[s]
        inside = inside - index.starts[s]
        parts.append((shard.frames[inside], shard.times[inside], shard.spans[inside]))
    return [torch.cat(x) for x in zip(*parts)]


@torch.no_grad()
def score_rows(model, text, index, rows, top, pieces=False, job=ALONE, **scoring):
    """Second stage: exact scores of this process' share of the rows. text (1,D), rows (n,), sorted

    -> list of Hit, unsorted: the `top` best files, or pieces if `pieces` is true, including all
    ties. A file may have several Hits. scoring: trials, seed, expected.
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
    # Only rows that can be among the best become Hits: there may be a million rows.
    top = min(top, len(best))
    good = scores >= best.topk(top).values[-1]
    f, times, spans = read_rows(index, rows[good])
    S = cosine(text.cpu(), f.float())  # cos(t, f_j)  (n,T)
    at = times.gather(1, S.argmax(1, keepdim=True))[:, 0]
    columns = [x.tolist() for x in (scores[good], file[good], at, *spans.T, times)]
    return [Hit(*values) for values in zip(*columns) if values[0] > -torch.inf]


def merge(parts, index, top, pieces=False):
    """The `top` best of several lists of Hits. Ties are ordered by path, then by time.

    Each file is listed once, by its best piece, unless `pieces` is true. The result is exact if
    each list holds the best of its own process.
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
    """Find the best videos for each text. t (N,D), Index -> N lists of at most `top` Hits.

    The `shortlist` pieces (0: all) whose pooled frames are nearest to the text get exact scores.
    pieces: list every piece, instead of each file once. scoring: trials, seed, expected.
    """
    if not torch.is_tensor(t):
        raise TypeError(f"t must be embeddings (N,D), as encode_texts makes them, not {t!r}")
    shortlist = max(shortlist or len(index.file), top)
    files = 0 if pieces else top
    found = []
    # A few texts at a time, because the point scores of a million pieces take 4 MB per text.
    for texts in t.split(16):
        points = point_scores(texts, index, job)
        for text, scores in zip(texts.split(1), points):
            rows = best_rows(scores, index, shortlist, files, job)
            hits = score_rows(model, text, index, rows, top, pieces, job, **scoring)
            found.append(merge(job.gather(hits), index, top, pieces))
    return found


# ---- input and output ----

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


def questions(args, job):
    """Yield lists of queries: from the command line, else one by one from a prompt or a pipe."""
    if args.query:
        yield args.query
        return
    sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    asked = False
    line = ""
    while line is not None:
        if line.strip():
            asked = True
            yield [line.strip()]
        line = None
        # Stop if the reader of the results has gone (| head) and no file is to be written.
        unread = getattr(sys.stdout, "error", None) and not args.json
        if job.rank == 0 and not unread:
            # Standard output may be a file, which is for results.
            out = sys.stdout if sys.stdout.isatty() else sys.stderr
            with contextlib.suppress(EOFError), contextlib.redirect_stdout(out):
                line = input("query> " if terminal else "")
        line = job.gather(line)[0]
    if not asked and not terminal:
        raise DataError(
            'no query: say what to look for, as in search.py "a dog jumps" --videos DIR, or give '
            "one query per line on standard input"
        )


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
    else:
        errors = sys.getfilesystemencodeerrors()
        sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors=errors)
    print(*names, sep=end, end=end, flush=True)


def write_results(found, args):
    """Write the file of --json."""
    if args.json == "-":
        print(json.dumps(found, indent=1), flush=True)
    elif args.json:
        write_output("--json", args.json, json.dumps(found, indent=1))


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
    p.add_argument("--shortlist", metavar="K", type=numeric(int, 0), default=1000,
                   help="score exactly the best K pieces by mean-pooled frames; 0: all (default: "
                        "%(default)s)")
    p.add_argument("-f", "--files", action="store_true",
                   help="print file names alone, for other programs")
    p.add_argument("-0", "--null", dest="end", action="store_const", const="\x00",
                   help="the same, each name ended by a NUL byte, for xargs -0")
    p.add_argument("-n", "--no-new", action="store_true",
                   help="search what the index holds: don't look for new files")
    p.add_argument("--update", action="store_true",
                   help="only bring the index up to date, for cron")
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
    add_common(p)
    p.set_defaults(expected=True, end="\n")
    args = p.parse_intermixed_args(argv)  # several queries, options between them
    if 0 < args.window < 0.01:
        p.error(f"--window {args.window}: give 0.01 seconds at least, or 0 for whole videos")
    if not all(query.strip() for query in args.query):
        p.error("the query is empty: say what to look for")
    args.files |= args.end == "\0"
    results = args.query or args.files or args.json or args.report
    if results and (args.update or args.serve is not None):
        p.error("--update and --serve take no query, and nothing that is for its results")
    if args.update and args.no_new:
        p.error("--update looks for new files: drop -n")
    if args.every and args.serve is None:
        p.error("--every goes with --serve")
    for option in ("json", "report"):
        path = getattr(args, option) or ""
        if path.lower().endswith((*SUFFIXES, *PICTURES)):
            p.error(f"--{option} {path} has the name of a video or picture: give another name")
    if args.index == "":
        p.error("--index is empty: name a folder")
    if args.files and args.json == "-":
        p.error("file names and --json - would be mixed on standard output: give --json FILE")
    return args


def search_present(model, t, index, args, job=ALONE):
    """`search` with the given options. Files deleted since the index was opened are left out."""
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
    """Print the results of every query. -> {query: [dict of rank, score, ...]}, exit status."""
    found = {}
    status = 0
    for queries in questions(args, job):
        try:
            t = encode_queries(model, tokenizer, queries, job, args.amp)
        except DataError as error:
            if args.query:
                raise
            # One of several that are asked one by one: the others have their answers.
            if job.rank == 0:
                print(f"error: {escaped(str(error))}", file=sys.stderr)
            status = 2
            continue
        results = search_present(model, t, index, args, job)
        for query, hits in zip(queries, results):
            if not hits:
                if (index.file < 0).all():
                    raise DataError("the videos of the index are gone: run without -n to find "
                                    "others")
                raise WeightsError(
                    f"{args.ckpt}: no score of {query!r} is a finite number, so nothing can be "
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
    return found, status


def main(argv=None):
    args = parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        job = start_processes(args.device)
        page = None
        if args.serve is not None:
            if job.world > 1:
                raise DataError("--serve is for one process: start it without torchrun")
            page = SearchPage(args.host, args.serve)  # first, in case the port is not free
        outputs = {"--json": args.json if args.json != "-" else None, "--report": args.report}
        check_outputs(outputs, [args.ckpt, *args.query])
        model, tokenizer, _ = load_model(
            args.ckpt, job, args.pooling, args.frames, args.prior, args.prior_std)
        say_loaded(args, model, job)
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

            def find(query, index):  # only texts: no file that a browser names is opened
                t = encode_texts(model, tokenizer, [query], amp=args.amp)
                return search_present(model, t, index, args)[0]

            return page.run(build, find, model.frames, args.every)
        index = build()
        check_outputs(outputs, index.paths)
    if args.update:
        return 2 if index.unsaved else 0
    found, status = answer(model, tokenizer, index, args, job)
    if job.rank == 0:
        write_results(found, args)
    return status


if __name__ == "__main__":
    sys.exit(run(main))
