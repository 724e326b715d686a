"""The index of a folder: embeddings of its videos' pieces, in shards, which are never rewritten.

A shard is a file that holds the pieces of some videos. Any number of processes, machines and
searches may add shards to a folder at once; a killed run loses what it had not yet saved. In this
order: which videos, Shard, what embeddings depend on, a shard's file, all shards of a folder,
copies, repacking.
"""
import contextlib
import hashlib
import json
import os
import secrets
import sys
import time
from collections import Counter
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from lib.common import DataError, escaped, write_text, written_whole
from lib.processes import ALONE
from lib.video import SUFFIXES, spelled

INDEX = ".tmass-index"
FORMAT = "tmass index 2"
FULL = 1000             # a shard is saved when it has so many pieces
OLD = 60                # or when the one before was saved so many seconds ago
SMALL = 16              # so many shards that are less than half full are joined
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
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise TypeError(f"paths must be a list of folders and files, not {paths!r} itself")
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
        reasons = [folder.refused[0] for folder in folders if folder.refused]
        reasons.append(", ".join(SUFFIXES))
        raise DataError(f"--videos {searched}: no videos in it ({reasons[0]})")
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
        for name in files:
            path = os.path.join(base, name)
            if not name.lower().endswith(SUFFIXES) or name.startswith("."):
                continue
            try:
                if os.path.isfile(path):
                    found[os.path.relpath(path, folder)] = stamp_of(path)
            except OSError as error:  # it went away, or may not be looked at
                note(error)
    return {name: found[name] for name in sorted(found)}


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


def count_pieces(parts):
    """How many pieces several shards have together."""
    return sum(len(part.file) for part in parts)


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
    keep = torch.tensor(keep, dtype=torch.bool)
    rows = keep[shard.file.long()].nonzero()[:, 0]
    number = keep.cumsum(0, dtype=torch.int32) - 1  # of each file that stays
    files = [shard.files[k] for k in keep.nonzero()[:, 0].tolist()]
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

def new_name(mark):
    """A shard's name, later ones after earlier ones. mark: the fingerprint."""
    return f"{mark}-{time.time_ns():016x}-{secrets.token_hex(4)}.shard"


def write_shard(folder, name, shard):
    """Save a shard. Raises OSError or, as torch does where a disk is full, RuntimeError."""
    os.makedirs(folder, exist_ok=True)
    mark = name.partition("-")[0]
    content = dict(format=FORMAT, mark=mark, **shard._asdict())
    content["files"] = [tuple(file) for file in shard.files]  # torch reads back no other class
    with written_whole(os.path.join(folder, name)) as part:
        with open(part, "wb") as file:
            torch.save(content, file)


def read_shard(path, mark, size=None):
    """-> Shard, memory-mapped; None where the file is damaged. Raises FileNotFoundError.

    size: (T,D) of the model. No checksums: a shard may have gigabytes.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        shard = Shard(*(content[name] for name in Shard._fields))
        shard = shard._replace(files=[File(*file) for file in shard.files])
        known = content["format"] == FORMAT and content["mark"] == mark
        return shard if known and fits_together(shard, size) else None
    except FileNotFoundError:
        raise
    except Exception:  # a damaged file fails in zip, pickle or torch, each with errors of its own
        return None


def fits_together(shard, size=None):
    """Are a shard's tensors and files of the types and sizes of a Shard, and its times numbers?"""
    P, T, D = shard.frames.shape
    shapes = [(P, T, D), (P, D), (P, T), (P, 2), (P,)]
    kinds = [torch.float16, torch.float16, torch.float32, torch.float32, torch.int32]
    for x, shape, kind in zip(shard, shapes, kinds):
        plain = x.layout == torch.strided and x.device.type == "cpu"
        if not plain or x.shape != shape or x.dtype != kind:
            return False
    for name, stamp, why, content in shard.files:
        stamped = stamp is None or [type(part) for part in stamp] == [int, int]
        texts = name, why or "", content
        if not stamped or any(type(text) is not str for text in texts):
            return False
    if size not in (None, (T, D)):
        return False
    if not shard.times.isfinite().all() or not shard.spans.isfinite().all():
        return False
    if P == 0:
        return True
    return bool(0 <= shard.file.min() and shard.file.max() < len(shard.files))


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
        due = count_pieces(self.parts) >= FULL or waited > OLD
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
                self.warn(error)
            self.unsaved[name] = shard
        self.parts = []
        self.saved = time.monotonic()

    def warn(self, error):
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        print(
            f"cannot write {escaped(self.folder)} ({why}): searching without saving, so the next "
            "search encodes again; --index DIR names another folder",
            file=sys.stderr,
        )


# ---- all shards of a folder ----

def shard_folder(folder, index_dir=None):
    """Where a folder's shards are: beside its videos, or in a folder of their own in index_dir."""
    if index_dir is None:
        return os.path.join(folder, INDEX)
    # However the folder is named, its shards are found again.
    real = os.fsencode(os.path.realpath(folder))
    name = hashlib.sha256(real).hexdigest()
    return os.path.join(index_dir, name[:12])


def shard_names(folder, mark):
    """The file names of a fingerprint's shards, oldest first."""
    try:
        names = os.listdir(folder)
    except OSError:  # no index yet
        return []
    names = [name for name in names if name.endswith(".shard")]
    return sorted(name for name in names if name.startswith(mark))


def open_shards(folder, mark, known, job, size=None):
    """All sound shards of a folder, the same on all processes. -> {name: Shard}

    known: {name: Shard, or None where it is damaged}: those opened before; new ones are added.
    size: (T,D) of the model.
    """
    # Processes of other searches may repack meanwhile: all of ours must see the same shards.
    for attempt in range(100):
        names = job.gather(shard_names(folder, mark))[0]
        with contextlib.suppress(FileNotFoundError):  # repacked a moment ago: look again
            for name in names:
                if name in known:
                    continue
                path = os.path.join(folder, name)
                known[name] = read_shard(path, mark, size)
                if known[name] is None:
                    job.say(
                        f"{escaped(path)} is damaged and left out: its files are encoded again; "
                        "it may be deleted"
                    )
        complete = all(name in known for name in names)
        if all(job.gather(complete)):
            break
        time.sleep(0.1)
    return {name: known[name] for name in names if known.get(name)}


def newest_shards(shards, stamps):
    """Which shard's rows of a file count: the newest. -> {file name: shard name}

    shards: {name: Shard}. stamps: {file name: stamp}: a file counts only if it is as it was when
    it was encoded; None: every file counts.
    """
    newest = {}
    # Shards' names are in the order of time: the first that has a file is the newest.
    for key, shard in sorted(shards.items(), reverse=True):
        for name, stamp, *_ in shard.files:
            if name not in newest and (stamps is None or stamps.get(name) == stamp):
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


# ---- copies: files of the same size, first and last megabyte ----

def content_of(path):
    """What copies of a file have in common, as 32 letters. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(b"%d" % size)
        for start in (0, max(0, size - MEGABYTE)):
            file.seek(start)
            digest.update(file.read(MEGABYTE))
    return digest.hexdigest()


def divide_copies(folder, names, shards):
    """A Folder's new files: one of each content, then their copies. -> (names, names, contents)

    contents: {name: `content_of` it} of those whose size another file has, new or known.
    """
    sizes = [folder.stamps[name][0] for name in names]
    for shard in shards.values():
        sizes += [file.stamp[0] for file in shard.files if file.stamp]
    sizes = Counter(sizes)
    contents = {}
    first = {}  # content: the name that has it
    for name in names:
        size = folder.stamps[name][0]
        if size and sizes[size] > 1:
            with contextlib.suppress(OSError):  # said where its frames are read
                contents[name] = content_of(os.path.join(folder.path, name))
        first.setdefault(contents.get(name, name), name)
    firsts = list(first.values())
    copies = [name for name in names if first[contents.get(name, name)] != name]
    return firsts, copies, contents


def add_copies(folder, names, contents, shards, writer):
    """Give each file that is a copy of a known one the rows of that. -> the names that are none"""
    known = {}
    for key, shard in shards.items():
        for number, file in enumerate(shard.files):
            if file.content and file.why is None:
                known[file.content] = key, number
    others = []
    for name in names:
        content = contents.get(name)
        if content not in known:
            others.append(name)
            continue
        key, number = known[content]
        keep = [k == number for k in range(len(shards[key].files))]
        part = keep_files(shards[key], keep)
        file = File(name, folder.stamps[name], None, content)
        writer.parts.append(part._replace(files=[file]))
        writer.save_if_due()
    writer.save()
    return others


# ---- repacking ----

def newest_with_missed(folder, where, mark, shards, newest):
    """`newest`, and the newest rows of files that are not there, which may come back.

    They count a week from when they were first missed, which a file beside the shards tells, and
    for as long as the folder that they were in is not there either: it may be a disk.
    """
    path = os.path.join(where, f"{mark}.missed")
    since = {}  # name: seconds since 1970
    with contextlib.suppress(OSError, ValueError, TypeError):  # there is none, or it is damaged
        with open(path, encoding="utf-8") as file:
            since = dict(json.load(file))
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
    """Put what counts of mostly empty shards into new ones; only then are the old ones removed."""
    counts = {}  # of each shard: does a file's part of it count?
    chosen = []
    small = []
    for key, shard in shards.items():
        counts[key] = [newest.get(file.name) == key for file in shard.files]
        of_files = torch.tensor(counts[key], dtype=torch.bool)
        rows = of_files[shard.file.long()].sum().item()
        if not any(counts[key]) or 2 * rows < len(shard.file):
            chosen.append(key)
        elif 2 * rows < FULL:
            small.append(key)
    if len(chosen) + len(small) >= SMALL:
        chosen += small
    old = []
    parts = []
    for key in chosen:
        old.append(os.path.join(folder, key))
        parts.append(keep_files(shards[key], counts[key]))
        # One new shard at a time is in memory.
        if count_pieces(parts) < FULL and key != chosen[-1]:
            continue
        if any(part.files for part in parts):
            write_shard(folder, new_name(mark), join_shards(parts))
        for path in old:
            with contextlib.suppress(FileNotFoundError):  # another search was faster
                os.unlink(path)
        old = []
        parts = []


def summary(encoded, files, pieces, reasons, stopped):
    """What is in the index, and ten of the reasons why something is not, a line each."""
    line = f"encoded {encoded} videos, {files} in the index, {pieces} pieces"
    if stopped:
        line += "; stopped: the next search encodes the others"
    if reasons:
        line += f"; {len(reasons)} unreadable left out:"
    lines = [line, *reasons[:10]]
    if len(reasons) > 10:
        lines.append(f"and {len(reasons) - 10} others")
    return "\n  ".join(map(escaped, lines))
