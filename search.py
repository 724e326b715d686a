"""Search your own videos by text, and find the moment.

    python search.py "a dog jumps into water" --videos ~/clips          # CLIP ViT-B/32, nothing trained
    python search.py "a red star" --videos data/shapes/videos --ckpt model.pt
    python search.py --videos ~/clips                                   # asks; from a pipe, one query a line
    python search.py -f "a dog" --videos ~/clips | head -1              # file names alone
    torchrun --nproc_per_node 8 search.py "a dog" --videos ~/clips      # each process encodes and searches its share

A video is searched by pieces of some seconds; a piece is a row of the gallery. Their embeddings are kept in shards,
files that are never rewritten, in the folder .tmass-index/: any number of processes, machines and searches may add to
it at once, and a run that is killed loses what is younger than its last shard. In this order: list_videos, Shard and
how one is written and read, build_index (only what is new is encoded), search (two stages), the command line.
"""
import contextlib
import hashlib
import json
import os
import secrets
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

import data
from clip_model import WeightsError
from eval import add_common, encode_texts, load_model, lowest_if_nan, write_json
from lib import video as decode
from lib.common import clock, escaped, numeric, written_whole
from lib.processes import ALONE, run, start_processes, worker_place
from lib.report import write_search_report

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv")
INDEX, FORMAT = ".tmass-index", "tmass index 2"
FULL, OLD = 1000, 60  # a shard is saved when it holds so many pieces, or is so many seconds old
SMALL = 16            # so many shards that are mostly empty are made one


# ---- which videos ----

class Place(NamedTuple):
    """A folder whose videos are searched. files: {name in it: (size, mtime_ns)}, or None for what the index holds.

    whole: these are all its videos, not some that were named: what is not among them is gone.
    """
    folder: str
    files: dict
    whole: bool


def list_videos(paths, new=True):
    """Folders, with those below, and files. -> list of Place. new=False: no look at what is in the folders."""
    places, named = [], {}
    for path in paths:
        if os.path.isdir(path):
            places.append(Place(path, videos_below(path) if new else None, new))
        elif os.path.isfile(path):
            named.setdefault(os.path.dirname(path), {})[os.path.basename(path)] = stamp_of(path)
        else:
            raise data.DataError(f"--videos {path}: there is no such folder or file (queries come before --videos)")
    if new and not named and not any(place.files for place in places):
        raise data.DataError(f"--videos {' '.join(paths)}: no videos in it ({', '.join(SUFFIXES)})")
    return places + [Place(folder, files, False) for folder, files in named.items()]


def stamp_of(path):
    """What tells whether a file has changed."""
    return os.stat(path).st_size, os.stat(path).st_mtime_ns


def videos_below(folder):
    """Videos of a folder and those below it, hidden ones left out. -> {name relative to it: stamp}, sorted."""
    found = {}
    for base, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(base, name)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and os.path.isfile(path):
                found[os.path.relpath(path, folder)] = stamp_of(path)
    return dict(sorted(found.items()))


# ---- shards ----

class Shard(NamedTuple):
    """P pieces of whole files, as one file of the index holds them."""
    frames: torch.Tensor  # (P,T,D) float16
    mean: torch.Tensor    # (P,D) float16: their `pooled`
    times: torch.Tensor   # (P,T) float32: seconds at which the frames are shown
    spans: torch.Tensor   # (P,2) float32: start and end of the piece
    file: torch.Tensor    # (P,) int32: which of files
    files: list           # (name in the folder, its stamp when it was read, None or why it can't be read)


def pooled(f):
    """First-stage vector of each piece: the unit mean of unit frames. f (P,T,D) -> (P,D)."""
    return F.normalize(F.normalize(f.float(), dim=-1).mean(1), dim=-1)


def fingerprint(model, window):
    """What embeddings depend on: the image tower, T and the window. Each weight counts in a sum of its bits: 0.1 s."""
    digest = hashlib.sha256(repr((FORMAT, model.frames, float(window), model.clip.config)).encode())
    for name, x in sorted(model.clip.visual.state_dict().items()):
        bits = x.detach().contiguous().view(-1).view(torch.int32)
        some = bits[::max(1, len(bits) // 64)].tolist()
        digest.update(repr((name, tuple(x.shape), bits.sum(dtype=torch.int64).item(), some)).encode())
    return digest.hexdigest()[:16]


def write_shard(folder, mark, shard):
    """Save a shard under a name of its own. Raises OSError or, as torch tells of a full disk, RuntimeError."""
    os.makedirs(folder, exist_ok=True)
    name = f"{mark}-{time.time_ns():016x}-{secrets.token_hex(4)}.shard"  # in the order of time
    with written_whole(os.path.join(folder, name)) as part, open(part, "wb") as file:
        torch.save(dict(format=FORMAT, mark=mark, **shard._asdict()), file)


def read_shard(path, mark):
    """-> Shard, memory-mapped; None where it is damaged."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        shard = Shard(*(content[name] for name in Shard._fields))
        P, T, D = shard.frames.shape
        shapes = [tuple(x.shape) for x in shard[1:5]]
        sound = content["format"] == FORMAT and content["mark"] == mark and shapes == [(P, D), (P, T), (P, 2), (P,)]
        return shard if sound and (not P or 0 <= shard.file.min() <= shard.file.max() < len(shard.files)) else None
    except FileNotFoundError:
        raise
    except Exception:  # a damaged file fails in zip, pickle or torch, each with errors of its own
        return None


def open_shards(folder, mark, known, job):
    """All sound shards of an index, the same on all processes. known: those opened before. -> {name: Shard}."""
    for attempt in range(100):
        try:
            names = sorted(x for x in os.listdir(folder) if x.startswith(mark) and x.endswith(".shard"))
        except OSError:  # no index yet
            names = []
        names, shards = job.gather(names)[0], {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another search has just repacked it: look again
                shards[name] = known[name] if name in known else read_shard(os.path.join(folder, name), mark)
        if all(n == len(names) for n in job.gather(len(shards))):
            break
        time.sleep(0.1)
    for name, shard in shards.items():
        if shard is None and name not in known:
            path = escaped(os.path.join(folder, name))
            job.say(f"{path} is damaged and left out: its files are encoded again; it may be deleted")
    known.update(shards)
    return {name: shard for name, shard in shards.items() if shard is not None}


def join_shards(parts):
    """Several shards as one."""
    files, numbers = [], []
    for part in parts:
        numbers.append(part.file + len(files))
        files += part.files
    return Shard(*(torch.cat(x) for x in zip(*(part[:4] for part in parts))), torch.cat(numbers), files)


def take_files(shard, living):
    """The part of a shard that still counts. living: bool per file."""
    number = torch.tensor(living, dtype=torch.int32).cumsum(0, dtype=torch.int32) - 1
    rows = torch.tensor(living, dtype=torch.bool)[shard.file.long()].nonzero()[:, 0]
    files = [file for file, lives in zip(shard.files, living) if lives]
    return Shard(*(x[rows] for x in shard[:4]), number[shard.file[rows].long()], files)


def sort_out(shards, files):
    """What counts: the newest rows of each file that is as it was. -> {file: (shard, None or why unreadable)}."""
    held = {}
    for key, shard in sorted(shards.items(), reverse=True):
        for name, stamp, why in shard.files:
            if name not in held and (files is None or files.get(name) == stamp):
                held[name] = key, why
    return held


def repack(folder, mark, shards, held):
    """Put what still counts of shards that are mostly empty into new ones; only then are the old ones removed."""
    living = {key: [held.get(file[0], "-")[0] == key for file in shard.files] for key, shard in shards.items()}
    empty, small = [], []
    for key, shard in shards.items():
        rows = int(torch.tensor(living[key], dtype=torch.bool)[shard.file.long()].sum())
        if not any(living[key]) or 2 * rows < len(shard.file):
            empty.append(key)
        elif 2 * rows < FULL:
            small.append(key)
    chosen = empty + (small if len(empty + small) >= SMALL else [])
    old, new = [], []
    for key in chosen:
        old.append(os.path.join(folder, key))
        new.append(take_files(shards[key], living[key]))
        if sum(len(part.file) for part in new) >= FULL or key == chosen[-1]:
            if any(part.files for part in new):
                write_shard(folder, mark, join_shards(new))
            for path in old:
                with contextlib.suppress(FileNotFoundError):  # another search was faster
                    os.unlink(path)
            old, new = [], []


# ---- encoding ----

class PieceDataset(data.VideoDataset, IterableDataset):
    """The pieces of files as a stream of batches: each file is read by one worker, in order.

    -> (rows, uint8 (n,T,3,R,R) or None): a row is (file, Piece without its frames), (file, None) at the file's end, or
    (file, why it can't be read).
    """

    def __init__(self, clips, frames, transform, window, batch):
        super().__init__(clips, frames, transform)
        self.frames, self.window, self.batch = frames, window, batch

    def __iter__(self):
        (worker, workers), rows, frames = worker_place(), [], []
        for v in range(worker, len(self.segments), workers):
            self.note(v)
            try:
                for piece in decode.read_pieces(self.segments[v].path, self.frames, self.window):
                    rows.append((v, piece._replace(frames=None)))
                    frames.append(self.transform(piece.frames))
                    if len(frames) == self.batch:
                        yield rows, torch.stack(frames)
                        rows, frames = [], []
                rows.append((v, None))
            except data.DataError as e:
                rows.append((v, str(e)))
        if rows:
            yield rows, torch.stack(frames) if frames else None


def tell_progress(done, files, seconds, job):
    """Files done, files/s and the time left, as if all processes were as far as this one."""
    if job.rank:
        return
    speed, end = done / seconds, "\r" if sys.stderr.isatty() else "\n"
    left = clock((files - done) / speed) if done else "an unknown time"
    line = f"encoding: {done * job.world} of {files * job.world} files, {speed * job.world:.1f} files/s, {left} left"
    print(f"{line:78s}", end=end, file=sys.stderr, flush=True)


@torch.no_grad()
def encode_files(model, place, todo, save, window, job=ALONE, workers=0, batch=16, amp="off"):
    """Encode this process' share of the files. save(Shard) is called when a shard is full, or old, and at the end."""
    mine, T, D = todo[job.rank::job.world], model.frames, model.clip.config["embed_dim"]
    device = model.clip.logit_scale.device
    clips = [data.Segment(os.path.join(place.folder, name)) for name in mine]
    dataset = PieceDataset(clips, T, data.test_transform(model.clip.config["image_size"]), window, batch)
    nothing = [x.half() for x in (torch.zeros(0, T, D), torch.zeros(0, D))] + [torch.zeros(0, T), torch.zeros(0, 2)]
    nothing = Shard(*nothing, torch.zeros(0, dtype=torch.int32), [])
    begun, whole, done = {}, [], 0  # pieces of files under way; the whole ones' shards
    began = told = saved = time.time()
    with data.loading(dataset, workers=min(workers, len(mine)), pin=device.type == "cuda") as batches:
        for rows, frames in batches:
            if frames is not None:
                with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                    f = model.encode_video(frames.to(device, non_blocking=True)).cpu()
                embedded = zip(f.half(), pooled(f).half())
            for v, piece in rows:
                if isinstance(piece, decode.Piece):
                    moments = torch.tensor(piece.times), torch.tensor([piece.start, piece.end])
                    begun.setdefault(v, []).append((*next(embedded), *moments))
                    continue
                pieces, file = begun.pop(v, []), (mine[v], place.files[mine[v]], piece)
                done += 1
                if piece is None:
                    tensors = [torch.stack(x) for x in zip(*pieces)]
                    whole.append(Shard(*tensors, torch.zeros(len(pieces), dtype=torch.int32), [file]))
                else:
                    whole.append(nothing._replace(files=[file]))
            now = time.time()
            if now - told > (2 if sys.stderr.isatty() else 20):
                told = now
                tell_progress(done, len(mine), now - began, job)
            if whole and (now - saved > OLD or sum(len(part.file) for part in whole) >= FULL):
                save(join_shards(whole))
                whole, saved = [], now
    if whole:
        save(join_shards(whole))


# ---- the index of a folder, the gallery of all ----

class Index(NamedTuple):
    """The pieces of all shards as one gallery of P rows; the same on all processes."""
    shards: list         # of Shard
    first: torch.Tensor  # the number of each one's first row, and P
    file: torch.Tensor   # (P,) int64: which of paths a row belongs to, -1: it doesn't count
    paths: list          # of the files
    shown: list          # their names as results show them


def update_index(model, place, folder, mark, window, job=ALONE, workers=0, batch=16, amp="off"):
    """Encode what is new or changed in a place. -> ({name: Shard}, `sort_out` of them, number of files encoded)."""
    known, unsaved = {}, {}

    def save(shard):
        try:
            write_shard(folder, mark, shard)
        except (OSError, RuntimeError) as e:
            if not unsaved:
                why = getattr(e, "strerror", None) or str(e).splitlines()[0]
                print(f"cannot write {escaped(folder)} ({why}): searching without saving, so the next search encodes "
                      "again; --index DIR names another folder", file=sys.stderr)
            unsaved[f"{mark}-{job.rank}-{len(unsaved)}"] = shard

    place = place._replace(files=job.gather(place.files)[0])
    shards = open_shards(folder, mark, known, job)
    held = sort_out(shards, place.files)
    todo = [name for name in place.files or {} if name not in held]
    if todo:
        encode_files(model, place, todo, save, window, job, workers, batch, amp)
        everybodys = job.gather(unsaved)  # waits for all
        shards = open_shards(folder, mark, known, job)
        for part in everybodys:
            shards.update(part)
        held = sort_out(shards, place.files)
    if place.whole and job.rank == 0 and not unsaved:
        with contextlib.suppress(OSError, RuntimeError):  # it can't be written: nothing is lost
            repack(folder, mark, shards, held)
    return shards, held, sum(name in held and held[name][1] is None for name in todo)


def index_folder(place, index):
    """Where the shards of a place are: beside its videos, or in a folder of their own below --index."""
    if index is None:
        return os.path.join(place.folder, INDEX)
    return os.path.join(index, hashlib.sha256(os.fsencode(os.path.realpath(place.folder))).hexdigest()[:12])


def build_index(model, videos, window=10, index=None, new=True, job=ALONE, workers=0, batch=16, amp="off"):
    """The Index of folders and files; only what is new is encoded. Raises DataError where nothing can be searched."""
    places, mark = list_videos(videos, new), fingerprint(model, window)
    shards, files, paths, shown, unreadable, encoded = [], [], {}, [], {}, 0
    for place in places:
        found, held, n = update_index(model, place, index_folder(place, index), mark, window, job, workers, batch, amp)
        encoded += n
        for key, shard in found.items():
            numbers = []
            for name, _, _ in shard.files:
                path, (holder, why) = os.path.join(place.folder, name), held.get(name, (None, None))
                counts = holder == key and os.path.abspath(path) not in paths  # a file may be in two of --videos
                numbers.append(len(paths) if counts and why is None else -1)
                if counts and why is None:
                    paths[os.path.abspath(path)] = path
                    shown.append(name if len(places) == 1 else path)
                elif counts:
                    unreadable[path] = why
            shards.append(shard)
            files.append(torch.tensor(numbers, dtype=torch.int64)[shard.file.long()])
    told = f"encoded {encoded} videos, {len(paths)} in the index, {sum(int((x >= 0).sum()) for x in files)} pieces"
    if unreadable:
        more = ", ..." if len(unreadable) > 10 else ""
        told += f"; {len(unreadable)} unreadable left out: {', '.join(list(unreadable)[:10])}{more}"
    job.say(escaped(told))
    if not paths:
        why = next(iter(unreadable.values()), "the index holds none of its videos (without -n they are looked for)")
        raise data.DataError(f"--videos {' '.join(videos)}: nothing to search: {why}")
    first = torch.tensor([0] + [len(shard.file) for shard in shards]).cumsum(0)
    return Index(shards, first, torch.cat(files), list(paths.values()), shown)


# ---- search: the best pieces by their pooled frames, then exact scores ----
# Each process searches every world-th shard.

class Hit(NamedTuple):
    """A result: the piece [start, end) of a file, and the time of its frame nearest to the text, in seconds."""
    score: float
    file: int  # of Index.paths
    at: float
    start: float
    end: float


@torch.no_grad()
def point_scores(t, index, job=ALONE):
    """First stage: cos(t, pooled frames) of this process' rows, -inf for all others. t (N,D) -> (N,P)."""
    unit, first = F.normalize(t.float(), dim=-1), index.first.tolist()
    scores = unit.new_full((len(t), first[-1]), -torch.inf)
    for s in range(job.rank, len(index.shards), job.world):
        scores[:, first[s]:first[s + 1]] = unit @ index.shards[s].mean.to(t.device).float().T
    return scores.masked_fill_((index.file < 0).to(t.device), -torch.inf)


def best_rows(scores, index, shortlist, files, job=ALONE):
    """The rows of the best `shortlist` scores of all processes; more where they belong to fewer than `files` files."""
    scores, P, files = lowest_if_nan(scores), len(scores), min(files, len(index.paths))
    while True:
        best, rows = scores.topk(min(shortlist, P))
        best, rows = (torch.cat(x) for x in zip(*job.gather((best.cpu(), rows.cpu()))))
        rows = rows[best.topk(min(shortlist, len(best))).indices]
        rows = rows[index.file[rows] >= 0]
        if shortlist >= P or len(index.file[rows].unique()) >= files:
            return rows.unique()
        shortlist *= 4


@torch.no_grad()
def score_rows(model, text, index, rows, top, pieces=False, job=ALONE, **scoring):
    """Second stage: the best of those rows that are this process', by exact scores. text (1,D) -> list of Hit."""
    shard = torch.bucketize(rows, index.first[1:], right=True)
    rows = rows[shard % job.world == job.rank]
    scores, moments = torch.zeros(0), torch.zeros(0, 3)
    for part in rows.split(FULL):
        numbers, sizes = torch.bucketize(part, index.first[1:], right=True).unique_consecutive(return_counts=True)
        held = []
        for s, own in zip(numbers.tolist(), part.split(sizes.tolist())):
            own = own - index.first[s]
            held.append([x[own] for x in index.shards[s][:4]])
        f, _, times, spans = (torch.cat(x) for x in zip(*held))
        f = f.to(text.device).float()
        S = F.normalize(f, dim=-1) @ F.normalize(text[0], dim=-1)  # cos(t, f_j)  (n,T)
        at = times.gather(1, S.argmax(1, keepdim=True).cpu())
        scores = torch.cat([scores, model.score(text, f, **scoring)[0].cpu()])
        moments = torch.cat([moments, torch.cat([at, spans], 1)])
    scores, file = lowest_if_nan(scores), index.file[rows]
    best = scores  # of each piece, or of each file
    if not pieces:
        best = scores.new_full((len(index.paths),), -torch.inf).scatter_reduce(0, file, scores, "amax")
    least = best.topk(min(top, len(best))).values.min() if len(best) else 0
    good = (scores >= least) & (scores == (best if pieces else best[file])) & (scores > -torch.inf)
    hits = [Hit(score, number, *moment) for score, number, moment
            in zip(scores[good].tolist(), file[good].tolist(), moments[good].tolist())]
    return merge([hits], index, top, pieces)


def merge(parts, index, top, pieces=False):
    """The best of several lists of hits, which is exact: the top K of the top Ks. Ties by names and times."""
    hits = sorted((hit for part in parts for hit in part), key=lambda x: (-x.score, index.paths[x.file], x.start))
    if not pieces:  # the first of each file
        hits = list({hit.file: hit for hit in reversed(hits)}.values())[::-1]
    return hits[:top]


@torch.no_grad()
def search(model, t, index, shortlist=1000, top=5, pieces=False, job=ALONE, **scoring):
    """The best videos for each text: exact scores of the `shortlist` best pieces by mean-pooled frames (0: of all).

    t (N,D), Index -> N lists of at most `top` Hits. scoring: what model.score takes.
    """
    found, everything = [], (index.file >= 0).nonzero()[:, 0]
    whole = not shortlist or shortlist >= len(everything)
    for texts in t.split(16):
        points = None if whole else point_scores(texts, index, job)
        for i, text in enumerate(texts.split(1)):
            rows = everything if whole else best_rows(points[i], index, max(shortlist, top), 0 if pieces else top, job)
            hits = score_rows(model, text, index, rows, top, pieces, job, **scoring)
            found.append(merge(job.gather(hits), index, top, pieces))
    return found


# ---- command line ----

def parse_args(argv=None):
    p = data.Parser(__doc__)
    p.add_argument("query", nargs="*", help="what to look for; none: asks, or reads one a line from a pipe")
    p.add_argument("--ckpt", default="ViT-B/32",
                   help="ViT-B/32, ViT-B/16, ViT-L/14 or any CLIP's file, a checkpoint of train.py, or a released "
                        "T-MASS or X-Pool one (default: %(default)s)")
    p.add_argument("--videos", metavar="PATH", nargs="+", required=True, help="folders and files to search")
    p.add_argument("--window", type=numeric(float, 0, 1e6), default=10, metavar="SECONDS",
                   help="a video longer than 1.5 of these is searched by pieces of about this length; 0: whole videos "
                        "(default: %(default)s)")
    p.add_argument("--pieces", action="store_true", help="list every piece, not each file once by its best")
    p.add_argument("--top", type=numeric(int, 1), default=5, help="results to show (default: %(default)s)")
    p.add_argument("--shortlist", type=numeric(int, 0), default=1000, metavar="K",
                   help="score exactly the best K pieces by mean-pooled frames; 0: all (default: %(default)s)")
    p.add_argument("-f", "--files", action="store_true", help="print file names alone, for other programs")
    p.add_argument("-n", "--no-new", action="store_true", help="search what the index holds: don't look for new files")
    p.add_argument("--index", metavar="DIR", help=f"keep embeddings there (default: {INDEX}/ in the searched folder)")
    add_common(p, batch=16)
    p.set_defaults(expected=True)
    args = p.parse_intermixed_args(argv)  # several queries, options between them
    if not all(q.strip() for q in args.query):
        p.error("the query is empty: say what to look for")
    return args


def questions(args, job):
    """Lists of queries: those of the command line; or asked for at a terminal, or one a line from a pipe."""
    if args.query:
        yield args.query
        return
    sys.stdin.reconfigure(errors="replace")
    asked = False
    while line := job.gather(next_line() if job.rank == 0 else None)[0]:
        if line.strip():
            asked = True
            yield [line.strip()]
    if not asked and not sys.stdin.isatty():
        raise data.DataError('no query: say what to look for, as in search.py "a dog jumps" --videos DIR, or one a '
                             "line on standard input")


def next_line():
    """A line of standard input, "" at its end; at a terminal after a prompt."""
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    try:
        return input("query> ") + "\n"
    except EOFError:
        return ""


def table(query, hits, index):
    """A query's results for people."""
    lines = [f"\n{escaped(query)}", " rank   score  at       file"]
    several = index.file[index.file >= 0].bincount()
    for rank, x in enumerate(hits, 1):
        piece = f"   ({clock(x.start)} to {clock(x.end)})" if several[x.file] > 1 else ""
        lines.append(f"{rank:5d} {x.score:7.4f}  {clock(x.at)}  {escaped(index.shown[x.file])}{piece}")
    return "\n".join(lines)


def run_search(model, tokenizer, index, args, job):
    """Answer every query. -> {query: [dict(rank, score, file, at, start, end)]}."""
    found = {}
    scoring = dict(trials=args.trials, seed=args.seed, expected=args.expected)
    for queries in questions(args, job):
        t = encode_texts(model, tokenizer, queries, job, amp=args.amp)
        results = search(model, t, index, args.shortlist, args.top, args.pieces, job, **scoring)
        for query, hits in zip(queries, results):
            if not hits:
                raise WeightsError(f"{args.ckpt}: no score of {query!r} is a finite number, nothing can be ranked: its "
                                   "weights are damaged, or its training went wrong")
            found[query] = [dict(rank=rank, score=x.score, file=index.paths[x.file], at=round(x.at, 3),
                                 start=round(x.start, 3), end=round(x.end, 3))
                            for rank, x in enumerate(hits, 1)]
            if args.files:
                job.say("\n".join(escaped(x["file"]) for x in found[query]))
            elif args.json != "-":
                job.say(table(query, hits, index))
    return found


def main(argv=None):
    args = parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        job = start_processes(args.device)
        model, tokenizer, _ = load_model(args, job)
        index = build_index(model, args.videos, args.window, args.index, not args.no_new, job, args.workers, args.batch,
                            args.amp)
    found = run_search(model, tokenizer, index, args, job)
    if job.rank == 0:
        if args.json == "-":
            print(json.dumps(found, indent=1), flush=True)
        elif args.json:
            write_json(args.json, found)
        if args.report:
            settings = dict(ckpt=args.ckpt, videos=" ".join(args.videos), window=args.window, shortlist=args.shortlist)
            settings.update(trials=args.trials, expected=args.expected, seed=args.seed)
            settings.update(model.config, prior=model.prior, prior_std=model.prior_std)
            write_search_report(args.report, found, settings)
            print(f"report: {args.report}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
