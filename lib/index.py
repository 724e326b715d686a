"""The index of a folder: embeddings of its videos' pieces, in shards, which are never rewritten.

A shard is a file that holds the pieces of some videos. Any number of processes, machines and
searches may add shards to a folder at once; a killed run loses what it had not yet saved. In this
order: which videos, Shard, what embeddings depend on, a shard's file, all shards of a folder,
repacking.
"""
import contextlib
import glob
import hashlib
import itertools
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from lib.common import (
    DataError,
    curable,
    cure,
    escaped,
    first_few,
    first_line,
    remove_parts,
    why_not_written,
    write_text,
    written_whole,
)
from lib.processes import ALONE
from lib.video import SUFFIXES, spelled

INDEX = ".tmass-index"
FORMAT = "tmass index 2"
FULL = 4000             # a shard is saved when it has so many pieces: opening one takes 1 ms
OLD = 60                # or when the one before was saved so many seconds ago
SMALL = 16              # so many shards that are less than an eighth full are joined
MISSED = 7 * 24 * 3600  # seconds that a file must be gone before its rows are dropped
MEGABYTE = 2 ** 20
MEANS = 2 * 2 ** 30     # bytes of pooled frames that stay on a GPU: 2 million pieces of D = 512


# ---- which videos ----

class Folder(NamedTuple):
    """Videos to be searched, and the folder that they lie in."""

    path: str
    stamps: Optional[dict]  # {name in the folder: (size, mtime_ns)}; None: what the index has
    whole: bool             # these are all videos of the folder: others are gone
    refused: list           # what can't be looked into, and why


def list_videos(paths, new=True):
    """Folders, with those below them, and files. -> list of Folder

    new=False: what is in the folders is not looked at.
    """
    folders = []
    named = {}  # files, by the folder that they lie in
    for path in map(spelled, paths):
        if os.path.isdir(path):
            refused = []
            stamps = videos_below(path, refused) if new else None
            folders.append(Folder(path, stamps, new, refused))
        elif os.path.isfile(path):
            folder, name = os.path.split(path)
            named.setdefault(folder, {})[name] = stamp_of(path)
        else:
            raise DataError(
                f"--videos {path}: there is no such folder or file (queries come before --videos)"
            )
    # Of a folder whose files are named one by one, the other files are not gone.
    folders += [Folder(folder, stamps, False, []) for folder, stamps in named.items()]
    if new and not any(folder.stamps for folder in folders):
        searched = " ".join(map(os.fspath, paths))
        reasons = (reason for folder in folders for reason in folder.refused)
        why = next(reasons, ", ".join(SUFFIXES))
        raise DataError(f"--videos {searched}: no videos in it ({why})")
    return folders


def stamp_of(path):
    """What tells whether a file has changed."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def videos_below(folder, refused):
    """Videos of a folder and those below it, hidden ones left out. -> {relative name: stamp}

    Links to folders are followed, each folder once. refused: gets what can't be looked into.
    """
    found = {}
    seen = set()

    def note(error):
        refused.append(f"{error.filename}: {error.strerror}")

    for base, folders, files in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()  # in place: os.walk goes on into what is left
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        # What is linked comes last, so that a folder's own name is found before a link to it.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(base, name)), name))
        below = base[len(folder):].lstrip(os.sep)
        for name in files:
            path = os.path.join(base, name)
            if not name.lower().endswith(SUFFIXES) or name.startswith("."):
                continue
            try:
                if os.path.isfile(path):
                    found[os.path.join(below, name)] = stamp_of(path)
            except OSError as error:  # it went away, or may not be looked at
                note(error)
    return dict(sorted(found.items()))


# ---- shards ----

class File(NamedTuple):
    """A file of a folder, as it was when it was read."""

    name: str
    stamp: tuple
    why: Optional[str]  # nothing of it can be searched; None: it can
    content: str = ""   # `content_of` it; shards of earlier versions have none


class Shard(NamedTuple):
    """P pieces of whole files."""

    frames: torch.Tensor  # (P,T,D) float16: embeddings of the sampled frames
    mean: torch.Tensor    # (P,D) float16: `pooled` of them
    times: torch.Tensor   # (P,T) float32: seconds at which the frames are shown
    spans: torch.Tensor   # (P,2) float32: start and end of the piece
    file: torch.Tensor    # (P,) int32: which of `files` a piece belongs to
    files: list           # of File


def file_shard(frames, times, spans, file):
    """The pieces of one file. frames (P,T,D), times (P,T), spans (P,2) -> Shard"""
    mean = pooled(frames).half()
    numbers = torch.zeros(len(frames), dtype=torch.int32)
    return Shard(frames.half(), mean, times, spans, numbers, [file])


def pooled(f):
    """First-stage vector of each piece: the unit mean of its unit frames. f (P,T,D) -> (P,D)."""
    unit = F.normalize(f.float(), dim=-1)
    return F.normalize(unit.mean(1), dim=-1)


def join_shards(parts):
    """Several shards as one. list of Shard -> Shard."""
    files = []
    numbers = []
    for part in parts:
        numbers.append(part.file + len(files))
        files += part.files
    tensors = zip(*(part[:4] for part in parts))
    return Shard(*map(torch.cat, tensors), torch.cat(numbers), files)


def keep_files(shard, keep):
    """The part of a shard that belongs to some of its files. keep: a bool per file -> Shard."""
    files = list(itertools.compress(shard.files, keep))
    keep = torch.tensor(keep, dtype=torch.bool)
    number = keep.cumsum(0, dtype=torch.int32) - 1  # of each file that stays
    rows = keep[shard.file.long()]
    return Shard(*(x[rows] for x in shard[:4]), number[shard.file[rows].long()], files)


# ---- what embeddings depend on ----

def fingerprint(model, window):
    """What embeddings depend on, as 16 letters: the image tower, T and the window in seconds.

    Every weight counts, in a sum of its tensor's bits, and about 64 of each tensor by themselves.
    """
    known = FORMAT, model.frames, float(window), model.clip.config
    digest = hashlib.sha256(repr(known).encode())
    tensors = sorted(model.clip.visual.state_dict().items())
    sums = []
    single = []
    for _, x in tensors:
        bits = x.flatten().view(torch.int32)
        sums.append(bits.sum(dtype=torch.int64))
        single.append(bits[::max(1, len(bits) // 64)])
    # Two copies from the device for all tensors: each copy waits for it.
    sums = torch.stack(sums).tolist()
    sizes = [len(x) for x in single]
    single = torch.cat(single).cpu().split(sizes)
    for (name, x), total, some in zip(tensors, sums, single):
        content = name, tuple(x.shape), total, some.tolist()
        digest.update(repr(content).encode())
    return digest.hexdigest()[:16]


# ---- the file of a shard ----

def content_of(path):
    """What copies of a file have in common, its size, first and last megabyte, as 32 letters.

    Raises OSError.
    """
    # A whole film would take longer to read than its frames do.
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(b"%d" % size)
        for start in (0, max(0, size - MEGABYTE)):
            file.seek(start)
            digest.update(file.read(MEGABYTE))
    return digest.hexdigest()


def new_name(mark):
    """A shard's name, later ones after earlier ones. mark: the fingerprint."""
    return f"{mark}-{time.time_ns():016x}-{secrets.token_hex(4)}.shard"


def write_shard(folder, name, shard):
    """Save a shard. Raises OSError or, as torch does where a disk is full, RuntimeError."""
    # A folder of videos is not made anew: it is on a disk that went away, or was renamed.
    folder = Path(folder)
    folder.mkdir(parents=folder.name != INDEX, exist_ok=True)
    files = list(map(tuple, shard.files))  # torch reads back no other class
    content = dict(shard._asdict(), files=files, format=FORMAT)
    with written_whole(folder / name) as part, open(part, "wb") as file:
        torch.save(content, file)


def read_shard(path, size):
    """-> Shard, memory-mapped; None where the file is damaged.

    size: (T,D) of the model. No checksums: a shard may have gigabytes. Raises OSError, and
    DataError where there is too little memory.
    """
    with curable(f"{path} can't be opened"), open(path, "rb") as file:
        # torch maps a file by its name, which has to be Unicode.
        name = path if str(path).isprintable() else f"/dev/fd/{file.fileno()}"
        try:
            content = torch.load(name, map_location="cpu", mmap=True, weights_only=True)
            shard = Shard(*(content[field] for field in Shard._fields))
            shard = shard._replace(files=[File(*file) for file in shard.files])
            return shard if fits_together(shard, *size) else None
        except Exception as error:  # a damaged file fails in zip, pickle or torch, as each does
            if isinstance(error, OSError) or cure(error):
                raise
            return None


def fits_together(shard, T, D):
    """Are a shard's tensors and files of the types and sizes of a Shard, and its times numbers?

    Also raises an error where they are not.
    """
    P = len(shard.frames)
    shapes = [(P, T, D), (P, D), (P, T), (P, 2), (P,)]
    for x, shape, kind in zip(shard, shapes, ("f2", "f2", "f4", "f4", "i4")):
        x = x.numpy()  # an error where it is sparse, or has no values
        if x.shape != shape or x.dtype != kind:
            return False
    for name, stamp, why, content in shard.files:
        types = [type(part) for part in (name, *stamp, why or "", content)]
        # The page lets out what a name leads to: nothing above the folder.
        if types != [str, int, int, str, str] or {"", ".."} & {*name.split(os.sep)}:
            return False
    known = (shard.file >= 0) & (shard.file < len(shard.files))
    good = known, shard.times.isfinite(), shard.spans.isfinite()
    return all(x.all() for x in good)


class ShardWriter:
    """Saves files' pieces as they are encoded: when they fill a shard, or after a while.

    parts: a Shard of each file that is not saved yet, to be added to.
    unsaved: {name: Shard} of those that could not be written, which is said once.
    """

    def __init__(self, folder, mark):
        self.folder = folder
        self.mark = mark
        self.parts = []
        self.saved = time.monotonic()
        self.unsaved = {}

    def save_if_due(self):
        """To be called as often as one likes. -> whether it was due"""
        waited = time.monotonic() - self.saved
        due = sum(len(part.file) for part in self.parts) >= FULL or waited > OLD
        if due:
            self.save()
        return due

    def save(self):
        if not self.parts:
            return
        name = new_name(self.mark)
        shard = join_shards(self.parts)
        try:
            write_shard(self.folder, name, shard)
        except (OSError, RuntimeError) as error:
            if not self.unsaved:
                why = why_not_written(error) or first_line(error)
                print(
                    f"cannot write {escaped(self.folder)} ({why}): searching without saving, so "
                    "the next search encodes again; --index DIR names another folder",
                    file=sys.stderr,
                )
            self.unsaved[name] = shard
        self.parts = []
        self.saved = time.monotonic()


# ---- all shards of a folder ----

def shard_folder(folder, index_dir=None):
    """Where a folder's shards are: beside its videos, or in a folder of their own in index_dir."""
    if index_dir is None:
        return os.path.join(folder, INDEX)
    # However the folder is named, its shards are found again.
    real = os.fsencode(os.path.realpath(folder))
    name = hashlib.sha256(real).hexdigest()
    return os.path.join(index_dir, name[:12])


def open_shards(folder, mark, known, job, size):
    """All sound shards of a folder, the same on all processes. -> {name: Shard}

    known: {name: Shard, or None where it is damaged}: those opened before; new ones are added.
    size: (T,D) of the model.
    """
    # Processes of other searches may repack meanwhile: all of ours must see the same shards.
    for attempt in range(100):
        names = sorted(glob.glob(f"{mark}*.shard", root_dir=folder))  # the oldest first
        names = job.gather(names)[0]
        complete = True
        for name in names:
            if name in known:
                continue
            path = os.path.join(folder, name)
            try:
                known[name] = read_shard(path, size)
                why = "is damaged and left out, and may be deleted"
            except OSError as error:
                if not os.path.lexists(path):  # repacked a moment ago: look again
                    complete = False
                    continue
                known[name] = None
                why = f"can't be read ({error.strerror})"
            if known[name] is None:
                job.say(f"{escaped(path)} {why}: its files are encoded again")
        if all(job.gather(complete)):
            break
        time.sleep(0.1)
    missing = job.join([name for name in names if not known.get(name)])
    return {name: known[name] for name in names if name not in missing}


def newest_shards(shards, stamps):
    """Which shard's rows of a file count: the newest. -> {file name: shard name}

    shards: {name: Shard}. stamps: {file name: stamp}: a file counts only if it is as it was when
    it was encoded; None: every file counts.
    """
    newest = {}
    # Shards' names are in the order of time: the last that has a file is the newest.
    for key, shard in sorted(shards.items()):
        for name, stamp, *_ in shard.files:
            if stamps is None or stamps.get(name) == stamp:
                newest[name] = key
    return newest


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


# ---- repacking ----

def newest_with_missed(folder, where, mark, shards, newest):
    """`newest`, and the newest rows of files that are not there, which may come back.

    They count a week from when they were first missed, which a file beside the shards tells, and
    for as long as the folder that they were in is not there either: it may be a disk.
    """
    path = os.path.join(where, f"{mark}.missed")
    since = {}  # name: seconds since 1970
    with contextlib.suppress(Exception):  # there is none, or it is damaged in one of many ways
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        since = {name: float(when) for name, when in saved.items()}
    both = newest_shards(shards, None) | newest
    times = {name: since.get(name, time.time()) for name in both if name not in newest}
    if times != since:
        write_text(path, json.dumps(times))
    for name, when in times.items():
        base = os.path.dirname(os.path.join(folder, name))
        if time.time() - when >= MISSED and os.access(base, os.R_OK):
            del both[name]
    return both


def repack(folder, mark, shards, newest):
    """Put what counts of mostly empty shards into new ones; only then are the old ones removed.

    Also removed are the parts of shards that killed searches left.
    """
    for part in glob.glob(f"{glob.escape(folder)}/{mark}*.part"):
        remove_parts(part.rsplit(".", 3)[0])  # which leaves those that are being written
    # Shards are never rewritten: searches that have one open must not see it change.
    counts = {}  # of each shard: does a file's part of it count?
    chosen = []
    small = []
    for key, shard in shards.items():
        counts[key] = [newest.get(file.name) == key for file in shard.files]
        of_files = torch.tensor(counts[key], dtype=torch.bool)
        rows = of_files[shard.file.long()].sum().item()
        if not any(counts[key]) or 2 * rows < len(shard.file):
            chosen.append(key)
        elif 8 * rows < FULL:
            small.append(key)
    if len(chosen) + len(small) >= SMALL:
        chosen += small
    # A few at a time, as these are in memory together.
    for start in range(0, len(chosen), SMALL):
        old = chosen[start:start + SMALL]
        shard = join_shards([keep_files(shards[key], counts[key]) for key in old])
        if shard.files:
            write_shard(folder, new_name(mark), shard)
        for key in old:
            with contextlib.suppress(FileNotFoundError):  # another search was faster
                os.unlink(os.path.join(folder, key))


def summary(encoded, files, pieces, reasons, stopped):
    """What is in the index, and ten of the reasons why something is not, a line each."""
    line = f"encoded {encoded} videos, {files} in the index, {pieces} pieces"
    if stopped:
        line += "; stopped: the next search encodes the others"
    if reasons:
        line += f"; {len(reasons)} unreadable left out:"
    return "\n  ".join(map(escaped, [line, *first_few(reasons)]))
