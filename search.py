#!/usr/bin/env python3
"""Search your own videos by text, and find the moment.

    python search.py "a dog jumps into water" --videos ~/clips      # CLIP ViT-B/32 as it is
    python search.py "a red star" --videos data/shapes/videos --ckpt model.pt
    python search.py --videos ~/clips                               # asks; from a pipe, one a line
    python search.py -f "a dog" --videos ~/clips | head -1          # file names alone
    torchrun --nproc_per_node 8 search.py "a dog" --videos ~/clips  # each process does its share

A video is searched by pieces of some seconds; a piece is a row of the gallery. Their embeddings
stay in the folder .tmass-index/ (lib/index.py): only what is new is encoded. In this order:
list_videos, encoding, build_index, search (two stages), the command line.
"""
import contextlib
import hashlib
import json
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

import data
from eval import encode_texts, lowest_if_nan
from lib import exact
from lib.common import DataError, Parser, Progress, WeightsError, clock, escaped, numeric
from lib.index import ShardWriter, file_shard, fingerprint, newest_shards, open_shards, repack
from lib.options import add_common, load_model, write_json
from lib.processes import ALONE, loading, run, start_processes, worker_place
from lib.report import write_search_report
from lib.video import SUFFIXES, Piece, Segment, read_pieces, spelled

INDEX = ".tmass-index"
MEANS = 2 * 2 ** 30  # bytes of pooled frames that stay on a GPU: of 2 million pieces where D = 512
ROWS = 1000          # pieces that are scored exactly at once


# ---- which videos ----

class Folder(NamedTuple):
    """Videos to be searched, and the folder that they lie in."""

    path: str
    stamps: dict  # {name in the folder: (size, mtime_ns)}; None: what the index has, unseen
    whole: bool   # these are all videos of the folder: others are gone


def list_videos(paths, new=True):
    """Folders, with those below them, and files. -> list of Folder

    new=False: what is in the folders is not looked at.
    """
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise TypeError(f"paths must be a list of folders and files, not {paths!r} itself")
    folders = []
    named = {}  # files, by the folder that they lie in
    for path in map(spelled, paths):
        if os.path.isdir(path):
            stamps = videos_below(path) if new else None
            folders.append(Folder(path, stamps, whole=new))
        elif os.path.isfile(path):
            folder, name = os.path.split(path)
            named.setdefault(folder, {})[name] = stamp_of(path)
        else:
            raise DataError(
                f"--videos {path}: there is no such folder or file (queries come before --videos)"
            )
    # Of a folder whose files are named one by one, the other files are not gone.
    folders += [Folder(folder, stamps, whole=False) for folder, stamps in named.items()]
    if new and not any(folder.stamps for folder in folders):
        searched = " ".join(map(os.fspath, paths))
        raise DataError(f"--videos {searched}: no videos in it ({', '.join(SUFFIXES)})")
    return folders


def stamp_of(path):
    """What tells whether a file has changed."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def videos_below(folder):
    """Videos of a folder and those below it, hidden ones left out. -> {relative name: stamp}"""
    found = {}
    for base, folders, files in os.walk(folder):
        # In place: os.walk goes on into what is left.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(base, name)
            is_video = name.lower().endswith(SUFFIXES) and not name.startswith(".")
            if is_video and os.path.isfile(path):
                found[os.path.relpath(path, folder)] = stamp_of(path)
    return {name: found[name] for name in sorted(found)}


# ---- encoding ----

class PieceDataset(data.VideoDataset, IterableDataset):
    """The pieces of files as a stream of batches; each file is read by one worker, in order.

    -> (rows, pixels uint8 (n,T,3,P,P) or None). A row is (file number, Piece without its frames),
    (file number, None) at the file's end, or (file number, why it can't be read).
    """

    def __init__(self, segments, frames, transform, window, batch):
        super().__init__(segments, frames, transform)
        self.frames = frames
        self.window = window
        self.batch = batch

    def __iter__(self):
        first, step = worker_place()
        rows = []
        pixels = []
        for v in range(first, len(self.segments), step):
            self.note(v)
            try:
                for piece in read_pieces(self.segments[v].path, self.frames, self.window):
                    rows.append((v, piece._replace(frames=None)))
                    pixels.append(self.transform(piece.frames))
                    if len(pixels) == self.batch:
                        yield rows, torch.stack(pixels)
                        rows = []
                        pixels = []
                rows.append((v, None))
            # A bad file is a result and no end: the other files are still to be read.
            except DataError as error:
                rows.append((v, str(error)))
        if rows:
            yield rows, torch.stack(pixels) if pixels else None


@torch.no_grad()
def encode_files(model, folder, names, writer, window, job=ALONE, workers=0, batch=16, amp="off"):
    """Encode this process' share of a folder's files. -> how many of them can be read

    folder: a Folder. names: of those of its files that all processes share. writer: a ShardWriter.
    """
    device = model.clip.logit_scale.device
    T = model.frames
    names = names[job.rank::job.world]
    segments = [Segment(os.path.join(folder.path, name)) for name in names]
    transform = data.test_transform(model.clip.image_size, *model.clip.resize)
    dataset = PieceDataset(segments, T, transform, window, batch)
    total = len(names) * job.world  # as if all processes were as far as this one
    progress = Progress("encoding", total, unit="files", enabled=job.rank == 0)
    nothing = torch.zeros(0, T, model.clip.embed_dim), torch.zeros(0, T), torch.zeros(0, 2)
    # A file's pieces may come in several batches, between those that other workers read.
    begun = {}  # file number: its pieces so far
    done = 0
    readable = 0
    workers = min(workers, len(names))
    with loading(dataset, workers=workers, pin=device.type == "cuda") as batches:
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
                    begun.setdefault(v, [nothing]).append((next(embedded), times, span))
                    continue
                done += 1
                pieces = begun.pop(v, [nothing])
                if entry is None:
                    readable += 1
                else:  # of a file that breaks off nothing is searched
                    pieces = [nothing]
                tensors = (torch.cat(x) for x in zip(*pieces))
                file = names[v], folder.stamps[names[v]], entry
                writer.parts.append(file_shard(*tensors, file))
            progress.update(done * job.world)
            writer.save_if_due()
    writer.save()
    return readable


# ---- the index of a folder, the gallery of all ----

class Index(NamedTuple):
    """The pieces of all shards as one gallery of P rows; the same on all processes."""

    shards: list          # of Shard
    starts: torch.Tensor  # the number of each shard's first row, and P
    file: torch.Tensor    # (P,) int64: which of `paths` a row belongs to; -1: it doesn't count
    paths: list           # of the files
    names: list           # of the files as results print them


def shard_folder(folder, index_dir=None):
    """Where a folder's shards are: beside its videos, or in a folder of their own in index_dir."""
    if index_dir is None:
        return os.path.join(folder, INDEX)
    # However the folder is named, its shards are found again.
    real = os.fsencode(os.path.realpath(folder))
    name = hashlib.sha256(real).hexdigest()
    return os.path.join(index_dir, name[:12])


def update_index(model, folder, where, mark, job, **encoding):
    """Encode what is new or changed in a Folder, all processes together.

    where: the folder of its shards. mark: the fingerprint. encoding: as encode_files takes it.
    -> ({name: Shard}, newest_shards of them, how many files were encoded)
    """
    known = {}
    size = model.frames, model.clip.embed_dim
    writer = ShardWriter(where, mark)
    # Files may come and go: all processes share out what the first one saw.
    folder = folder._replace(stamps=job.gather(folder.stamps)[0])
    shards = open_shards(where, mark, known, job, size)
    newest = newest_shards(shards, folder.stamps)
    names = [name for name in folder.stamps or () if name not in newest]
    encoded = 0
    if names:
        count = encode_files(model, folder, names, writer, job=job, **encoding)
        encoded = sum(job.gather(count))  # waits for all
        shards = open_shards(where, mark, known, job, size)
        for unsaved in job.gather(writer.unsaved):
            shards.update(unsaved)
        newest = newest_shards(shards, folder.stamps)
    if folder.whole and job.rank == 0 and not writer.unsaved:
        with contextlib.suppress(OSError, RuntimeError):  # it can't be written: nothing is lost
            repack(where, mark, shards, newest)
    return shards, newest, encoded


def build_index(model, paths, window=10, index_dir=None, new=True, job=ALONE, **encoding):
    """The Index of folders and files, of which only what is new or changed is encoded.

    paths: list of folders and files. window: seconds of a piece. index_dir: where embeddings are
    kept, if not in the folders. new=False: what the index has, without a look for new files.
    encoding: workers, batch, amp. Raises DataError where nothing can be searched.
    """
    folders = list_videos(paths, new)
    mark = fingerprint(model, window)
    shards = []
    file = []
    found = {}  # absolute path: path
    names = []
    unreadable = {}  # path: why
    encoded = 0
    for folder in folders:
        where = shard_folder(folder.path, index_dir)
        parts, newest, count = update_index(
            model, folder, where, mark, job, window=window, **encoding
        )
        encoded += count
        for key, shard in parts.items():
            numbers = []  # of the shard's files in `found`; -1: its rows don't count
            for name, _, why in shard.files:
                path = os.path.join(folder.path, name)
                real = os.path.abspath(path)
                number = -1
                # A file may be in two of `paths`; it counts once.
                if newest.get(name) == key and real not in found:
                    if why is None:
                        number = len(found)
                        found[real] = path
                        names.append(name if len(folders) == 1 else path)
                    else:
                        unreadable[path] = why
                numbers.append(number)
            shards.append(shard)
            file.append(torch.tensor(numbers, dtype=torch.int64)[shard.file.long()])
    file = torch.cat(file) if file else torch.zeros(0, dtype=torch.int64)
    pieces = (file >= 0).sum().item()
    job.say(summary(encoded, len(found), pieces, list(unreadable)))
    if not found:
        searched = " ".join(map(os.fspath, paths))
        missing = "the index holds none of its videos (without -n they are looked for)"
        why = next(iter(unreadable.values()), missing)
        raise DataError(f"--videos {searched}: nothing to search: {why}")
    sizes = [len(shard.file) for shard in shards]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    shards = move_means(shards, model.clip.logit_scale.device, job)
    return Index(shards, starts, file, list(found.values()), names)


def summary(encoded, files, pieces, unreadable):
    """What is in the index, in a line. unreadable: paths, of which ten are named."""
    line = f"encoded {encoded} videos, {files} in the index, {pieces} pieces"
    if unreadable:
        some = ", ".join(unreadable[:10])
        more = ", ..." if len(unreadable) > 10 else ""
        line += f"; {len(unreadable)} unreadable left out: {some}{more}"
    return escaped(line)


def move_means(shards, device, job=ALONE, most=MEANS):
    """Put this process' pooled frames on the device, `most` bytes of them: every query needs all.

    On the CPU they stay in their files, memory-mapped. list of Shard -> list of Shard.
    """
    moved = []
    for s, shard in enumerate(shards):
        if s % job.world == job.rank and shard.mean.nbytes <= most:
            most -= shard.mean.nbytes
            shard = shard._replace(mean=shard.mean.to(device))
        moved.append(shard)
    return moved


# ---- search: the best pieces by their pooled frames, then exact scores ----
# Each process searches every world-th shard.

class Hit(NamedTuple):
    """A piece [start, end) of a file, and the time of its frame nearest to the text, in seconds."""

    score: float
    file: int  # of Index.paths
    at: float
    start: float
    end: float


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
        # The best of all processes are among the best of each.
        best, rows = scores.topk(min(shortlist, P))
        parts = job.gather((best.cpu(), rows.cpu()))
        best, rows = (torch.cat(x) for x in zip(*parts))
        rows = rows[best.topk(min(shortlist, len(best))).indices]
        rows = rows[index.file[rows] >= 0]
        if shortlist >= P or len(index.file[rows].unique()) >= files:
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
    moments = []  # at, start, end
    for part in rows.split(ROWS):
        f, times, spans = read_rows(index, part)
        f = f.to(text.device).float()
        S = f @ text[0] / f.norm(dim=-1).clamp_min(1e-12)  # |t| cos(t, f_j)  (n,T)
        nearest = S.argmax(1, keepdim=True).cpu()
        scores.append(exact.score(model, text, f, **scoring)[0])
        moments.append(torch.cat([times.gather(1, nearest), spans], 1))
    scores = torch.cat(scores).cpu()
    scores = lowest_if_nan(scores)
    moments = torch.cat(moments)
    file = index.file[rows]
    best = scores  # of each piece, or of each file
    if not pieces:
        best = scores.new_full((len(index.paths),), -torch.inf)
        best.scatter_reduce_(0, file, scores, "amax")
    # Only what can be among the best becomes a Hit: there may be a million rows.
    top = min(top, len(best))
    least = best.topk(top).values[-1]
    good = (scores >= least) & (scores > -torch.inf)
    if not pieces:
        good &= scores == best[file]
    found = zip(scores[good].tolist(), file[good].tolist(), moments[good].tolist())
    return [Hit(score, number, *moment) for score, number, moment in found]


def merge(parts, index, top, pieces=False):
    """The best of several lists of Hits, ties by names and times; each file once, but for pieces.

    The top K of several top Ks is exact.
    """
    hits = [hit for part in parts for hit in part]
    hits.sort(key=lambda hit: (-hit.score, index.paths[hit.file], hit.start))
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
    everything = (index.file >= 0).nonzero()[:, 0]
    exhaustive = not shortlist or shortlist >= len(everything)
    files = 0 if pieces else top
    found = []
    # Some texts at a time, as the point scores of a million pieces take 4 MB a text.
    for texts in t.split(16):
        points = None if exhaustive else point_scores(texts, index, job)
        for i, text in enumerate(texts.split(1)):
            rows = everything
            if not exhaustive:
                rows = best_rows(points[i], index, max(shortlist, top), files, job)
            hits = score_rows(model, text, index, rows, top, pieces, job, **scoring)
            parts = job.gather(hits)
            found.append(merge(parts, index, top, pieces))
    return found


# ---- command line ----

def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("query", nargs="*", help="what to look for; none: asks, or reads one a line from a pipe")
    add("--ckpt", default="ViT-B/32",
        help="ViT-B/32, ViT-B/16, ViT-L/14 or any CLIP's file, a checkpoint of train.py, or a "
             "released T-MASS or X-Pool one (default: %(default)s)")
    add("--videos", metavar="PATH", nargs="+", required=True, help="folders and files to search")
    add("--window", type=numeric(float, 0, 1e6), default=10, metavar="SECONDS",
        help="a video longer than 1.5 of these is searched by pieces of about this length; "
             "0: whole videos (default: %(default)s)")
    add("--pieces", action="store_true", help="list every piece, not each file once by its best")
    add("--top", type=numeric(int, 1), default=5, help="results to show (default: %(default)s)")
    add("--shortlist", type=numeric(int, 0), default=1000, metavar="K",
        help="score exactly the best K pieces by mean-pooled frames; 0: all (default: %(default)s)")
    add("-f", "--files", action="store_true", help="print file names alone, for other programs")
    add("-n", "--no-new", action="store_true",
        help="search what the index holds: don't look for new files")
    add("--index", metavar="DIR",
        help=f"keep embeddings there (default: {INDEX}/ in the searched folder)")
    add_common(p, batch=16)
    p.set_defaults(expected=True)
    args = p.parse_intermixed_args(argv)  # several queries, options between them
    if not all(query.strip() for query in args.query):
        p.error("the query is empty: say what to look for")
    if 0 < args.window < 0.01:
        p.error(f"--window {args.window}: give 0.01 seconds at least, or 0 for whole videos")
    return args


def questions(args, job):
    """Lists of queries: of the command line; or asked for at a terminal, or read from a pipe."""
    if args.query:
        yield args.query
        return
    sys.stdin.reconfigure(errors="replace")
    asked = False
    while line := job.gather(next_line(args) if job.rank == 0 else None)[0]:
        if line.strip():
            asked = True
            yield [line.strip()]
    if not asked and not sys.stdin.isatty():
        raise DataError(
            'no query: say what to look for, as in search.py "a dog jumps" --videos DIR, or one a '
            "line on standard input"
        )


def next_line(args):
    """A line of standard input, "" at its end; at a terminal after a prompt."""
    # Nobody reads the answers any more (| head), and no file is to have them.
    if getattr(sys.stdout, "error", None) and not (args.json or args.report):
        return ""
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    try:
        return input("query> ") + "\n"
    except EOFError:
        return ""


def table(query, hits, index):
    """A query's results for people."""
    lines = [f"\n{escaped(query)}", " rank   score  at       file"]
    pieces = index.file[index.file >= 0].bincount()  # of each file
    for rank, hit in enumerate(hits, 1):
        name = escaped(index.names[hit.file])
        if pieces[hit.file] > 1:
            name += f"   ({clock(hit.start)} to {clock(hit.end)})"
        lines.append(f"{rank:5d} {hit.score:7.4f}  {clock(hit.at)}  {name}")
    return "\n".join(lines)


def answer(model, tokenizer, index, args, job):
    """Search for every query, and print what is found. -> {query: [dict of rank, score, ...]}"""
    found = {}
    scoring = dict(trials=args.trials, seed=args.seed, expected=args.expected)
    for queries in questions(args, job):
        t = encode_texts(model, tokenizer, queries, job, amp=args.amp)
        results = search(model, t, index, args.shortlist, args.top, args.pieces, job, **scoring)
        for query, hits in zip(queries, results):
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
            if args.files:
                names = [escaped(record["file"]) for record in found[query]]
                job.say("\n".join(names))
            elif args.json != "-":
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
        settings["videos"] = " ".join(args.videos)
        settings.update(model.config, prior=model.prior, prior_std=model.prior_std)
        write_search_report(args.report, found, settings)
        print(f"report: {args.report}", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        job = start_processes(args.device)
        model, tokenizer, _ = load_model(args, job)
        index = build_index(
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
    found = answer(model, tokenizer, index, args, job)
    if job.rank == 0:
        write_results(model, found, args)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
