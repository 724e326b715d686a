"""The index of a folder: the embeddings of its videos' pieces, stored in shards.

A shard is a file with the pieces of some videos, and is never rewritten. Any number of processes,
machines and searches may add shards to a folder at the same time. A run that is killed loses only
what it had not saved yet. This file has these parts: finding videos, Shard, the fingerprint of the
model, the file of a shard, all shards of a folder, and repacking.
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

from clip_model import CLIP
from lib.common import (
    DataError,
    curable,
    cure,
    escaped,
    first_few,
    first_line,
    why_not_written,
    write_whole,
    written_whole,
)
from lib.encoders import OpenCLIP
from lib.processes import ALONE
from lib.video import SUFFIXES, spelled

INDEX = ".tmass-index"
FORMAT = "tmass index 2"
FULL = 4000             # pieces after which a shard is saved; opening a shard takes 1 ms
OLD = 60                # seconds after which a shard is saved even if it is not full
SMALL = 16              # number of shards less than an eighth full at which they are joined
MISSED = 7 * 24 * 3600  # seconds for which a file must be missing before its rows are dropped
MEGABYTE = 2 ** 20
MEANS = 2 * 2 ** 30     # bytes of pooled frames to keep on a GPU: 2 million pieces of D = 512


# ---- finding videos ----

class Folder(NamedTuple):
    """A folder, and which of its videos to search."""

    path: str
    stamps: Optional[dict]  # {name in the folder: (size, mtime_ns)}; None: all in the index
    whole: bool             # True if stamps lists all videos of the folder: others were deleted
    refused: list           # error messages, for what can't be read


def list_videos(paths, new=True):
    """Find the videos in folders, searched recursively, and among single files. -> list of Folder

    new=False: don't look into the folders.
    """
    folders = []
    named = {}  # folder: {name: stamp} of the single files in it
    for path in map(spelled, paths):
        if os.path.isdir(path):
            refused = []
            stamps = videos_below(path, refused) if new else None
            folders.append(Folder(path, stamps, new, refused))
        elif os.path.isfile(path):
            folder, name = os.path.split(path)
            named.setdefault(folder, {})[name] = _stamp_of(path)
        else:
            raise DataError(
                f"--videos {path}: there is no such folder or file (queries come before --videos)"
            )
    # Not `whole`: a folder's other files still exist when only some are named.
    folders += [Folder(folder, stamps, False, []) for folder, stamps in named.items()]
    if new and not any(folder.stamps for folder in folders):
        searched = " ".join(map(os.fspath, paths))
        reasons = (reason for folder in folders for reason in folder.refused)
        why = next(reasons, ", ".join(SUFFIXES))
        raise DataError(f"--videos {searched}: no videos found ({why})")
    return folders


def _stamp_of(path):
    """(size, mtime_ns) of a file, which tell whether it has changed."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def videos_below(folder, refused):
    """Find the videos in a folder, recursively, except hidden ones. -> {relative name: stamp}

    Links to folders are followed, but each folder is visited once. refused: list to which error
    messages are added.
    """
    folder = os.fspath(folder)
    found = {}
    seen = set()

    def note(error):
        refused.append(f"{error.filename}: {error.strerror}")

    for base, folders, files in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()  # in place, so that os.walk doesn't descend into them
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        # Links come last, so that a folder is found under its own name rather than a link's.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(base, name)), name))
        below = base[len(folder):].lstrip(os.sep)
        for name in files:
            path = os.path.join(base, name)
            if not name.lower().endswith(SUFFIXES) or name.startswith("."):
                continue
            try:
                if os.path.isfile(path):
                    found[os.path.join(below, name)] = _stamp_of(path)
            except OSError as error:  # deleted in the meantime, or no permission
                note(error)
    return dict(sorted(found.items()))


# ---- shards ----

class File(NamedTuple):
    """A file in a folder, as it was when it was encoded."""

    name: str
    stamp: tuple
    why: Optional[str]  # why it can't be read; None if it can
    content: str = ""   # its content_of; empty in shards of earlier versions


class Shard(NamedTuple):
    """The P pieces of some files. All pieces of a file are in the same shard."""

    frames: torch.Tensor  # (P,T,D) float16: embeddings of the sampled frames
    mean: torch.Tensor    # (P,D) float16: `pooled` frames
    times: torch.Tensor   # (P,T) float32: when each frame is shown, in seconds
    spans: torch.Tensor   # (P,2) float32: start and end of each piece, in seconds
    file: torch.Tensor    # (P,) int32: each piece's file, as an index into `files`
    files: list           # of File


def file_shard(frames, times, spans, file):
    """Make a Shard of one file's pieces. frames (P,T,D), times (P,T), spans (P,2) -> Shard"""
    mean = pooled(frames).half()
    numbers = torch.zeros(len(frames), dtype=torch.int32)
    return Shard(frames.half(), mean, times, spans, numbers, [file])


def pooled(f):
    """Normalised mean of the normalised frames, for the first stage. f (P,T,D) -> (P,D)."""
    unit = F.normalize(f.float(), dim=-1)
    return F.normalize(unit.mean(1), dim=-1)


def _join_shards(parts):
    """Concatenate shards. list of Shard -> Shard."""
    files = []
    numbers = []
    for part in parts:
        numbers.append(part.file + len(files))
        files += part.files
    tensors = zip(*(part[:4] for part in parts))
    return Shard(*map(torch.cat, tensors), torch.cat(numbers), files)


def keep_files(shard, keep):
    """Select some of a shard's files, with their rows. keep: a bool for each file -> Shard."""
    files = list(itertools.compress(shard.files, keep))
    keep = torch.tensor(keep, dtype=torch.bool)
    number = keep.cumsum(0, dtype=torch.int32) - 1  # the new number of each file that is kept
    rows = keep[shard.file.long()]
    return Shard(*(x[rows] for x in shard[:4]), number[shard.file[rows].long()], files)


# ---- the fingerprint of the model ----

def fingerprint(model, window):
    """Hash what the embeddings depend on: image tower, T, window in seconds. -> 16 hex digits

    Each weight tensor enters with the sum of all its values' bits, and about 64 single values.
    """
    settings = FORMAT, model.frames, float(window), model.clip.config
    digest = hashlib.sha256(repr(settings).encode())
    encoder = model.clip
    # Of other encoders, it isn't known what encodes images.
    tower = encoder.visual if isinstance(encoder, (CLIP, OpenCLIP)) else encoder
    tensors = sorted(tower.state_dict().items())
    sums = []
    samples = []
    for _, x in tensors:
        bits = x.flatten().view(torch.uint8 if x.nbytes % 4 else torch.int32)
        sums.append(bits.sum(dtype=torch.int64))
        samples.append(bits[::max(1, len(bits) // 64)])
    # Two copies from the device in all, rather than two per tensor: each copy synchronises.
    sums = torch.stack(sums).tolist()
    sizes = [len(x) for x in samples]
    samples = torch.cat(samples).cpu().split(sizes)
    for (name, x), total, sample in zip(tensors, sums, samples):
        content = name, tuple(x.shape), total, sample.tolist()
        digest.update(repr(content).encode())
    return digest.hexdigest()[:16]


# ---- the file of a shard ----

def content_of(path):
    """Hash a file's size, first and last megabyte, to recognise copies of it. -> 32 hex digits

    Raises OSError.
    """
    # Reading all of a long film would take longer than decoding the sampled frames.
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(b"%d" % size)
        for start in (0, max(0, size - MEGABYTE)):
            file.seek(start)
            digest.update(file.read(MEGABYTE))
    return digest.hexdigest()


def _new_name(mark):
    """A new shard's name. Names sort by time of creation. mark: the fingerprint."""
    return f"{mark}-{time.time_ns():016x}-{secrets.token_hex(4)}.shard"


def write_shard(folder, name, shard):
    """Save a shard. Raises OSError, or RuntimeError (by torch, if the disk is full)."""
    # The folder of the videos is not created: it was renamed, or its disk is no longer mounted.
    folder = Path(folder)
    folder.mkdir(parents=folder.name != INDEX, exist_ok=True)
    files = list(map(tuple, shard.files))  # torch.load with weights_only refuses other classes
    content = dict(shard._asdict(), files=files, format=FORMAT)
    with written_whole(folder / name) as part, open(part, "wb") as file:
        torch.save(content, file)


def read_shard(path, size):
    """Open a shard, memory-mapped. -> Shard, or None if it is damaged.

    size: (T,D) of the model. There are no checksums, because a shard may be gigabytes long. Raises
    OSError, and DataError if there is too little memory.
    """
    with curable(f"{path} can't be opened"), open(path, "rb") as file:
        # torch maps a file by its name, which must be valid Unicode.
        name = path if str(path).isprintable() else f"/dev/fd/{file.fileno()}"
        try:
            content = torch.load(name, map_location="cpu", mmap=True, weights_only=True)
            shard = Shard(*(content[field] for field in Shard._fields))
            shard = shard._replace(files=[File(*file) for file in shard.files])
            return shard if _is_valid(shard, *size) else None
        except Exception as error:  # a damaged file may raise nearly any error
            if isinstance(error, OSError) or cure(error):
                raise
            return None


def _is_valid(shard, T, D):
    """Whether a shard has the types and shapes of Shard, valid file numbers and finite times.

    May raise an error instead of returning False.
    """
    P = len(shard.frames)
    shapes = [(P, T, D), (P, D), (P, T), (P, 2), (P,)]
    for x, shape, kind in zip(shard, shapes, ("f2", "f2", "f4", "f4", "i4")):
        x = x.numpy()  # raises an error for a sparse tensor, or one without storage
        if x.shape != shape or x.dtype != kind:
            return False
    for name, stamp, why, content in shard.files:
        types = [type(part) for part in (name, *stamp, why or "", content)]
        # The page lets out what a name leads to: nothing above the folder.
        if types != [str, int, int, str, str] or {"", ".."} & {*name.split(os.sep)}:
            return False
    valid = (shard.file >= 0) & (shard.file < len(shard.files))
    good = valid, shard.times.isfinite(), shard.spans.isfinite()
    return all(x.all() for x in good)


class ShardWriter:
    """Collects the pieces of encoded files, and saves them as a shard when one is full or old.

    parts: list of Shards that are not saved yet, one for each file. Callers append to it.
    unsaved: {name: Shard} of those that could not be written. A message is printed for the first.
    """

    def __init__(self, folder, mark):
        self.folder = folder
        self.mark = mark
        self.parts = []
        self.saved = time.monotonic()
        self.unsaved = {}

    def save_if_due(self):
        """Save if the parts fill a shard, or the last save was long ago. -> whether it was due"""
        # The first batch of a long video leaves nothing to save yet.
        waited = time.monotonic() - self.saved if self.parts else 0
        due = sum(len(part.file) for part in self.parts) >= FULL or waited > OLD
        if due:
            self.save()
        return due

    def save(self):
        if not self.parts:
            return
        name = _new_name(self.mark)
        shard = _join_shards(self.parts)
        try:
            write_shard(self.folder, name, shard)
        except (OSError, RuntimeError) as error:
            if not self.unsaved:
                why = why_not_written(error) or first_line(error)
                print(
                    f"cannot write {escaped(self.folder)} ({why}): searching without saving, so "
                    "the next search encodes again; use --index DIR to save elsewhere",
                    file=sys.stderr,
                )
            self.unsaved[name] = shard
        self.parts = []
        self.saved = time.monotonic()


# ---- all shards of a folder ----

def shard_folder(folder, index_dir=None):
    """The folder of a folder's shards: inside it, or a subfolder of index_dir if that is given."""
    if index_dir is None:
        return os.path.join(folder, INDEX)
    # Named after the real path, so that every spelling of the path finds the same shards.
    real = os.fsencode(os.path.realpath(folder))
    name = hashlib.sha256(real).hexdigest()
    return os.path.join(index_dir, name[:12])


def open_shards(folder, mark, known, job, size):
    """Open all undamaged shards of a folder, the same in all processes. -> {name: Shard}

    known: {name: Shard, or None if damaged}, the shards opened before; new ones are added to it.
    size: (T,D) of the model.
    """
    # Another search may be repacking: try again until all processes have opened the same shards.
    for attempt in range(100):
        names = sorted(glob.glob(f"{mark}*.shard", root_dir=folder))  # oldest first
        names = job.gather(names)[0]
        complete = True
        for name in names:
            if name in known:
                continue
            path = os.path.join(folder, name)
            try:
                known[name] = read_shard(path, size)
                why = "is damaged and left out (you can delete it)"
            except OSError as error:
                if not os.path.lexists(path):  # removed by another search's repack
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
    """Find the newest shard of each file. -> {file name: shard name}

    shards: {name: Shard}. stamps: {file name: stamp}. A file's rows are valid only if its stamp is
    the same as when it was encoded. None: all rows are valid.
    """
    newest = {}
    # Shards' names sort by time, so the last shard that has a file is its newest.
    for key, shard in sorted(shards.items()):
        for name, stamp, *_ in shard.files:
            if stamps is None or stamps.get(name) == stamp:
                newest[name] = key
    return newest


def move_means(shards, device, job=ALONE, most=MEANS):
    """Move this process' pooled frames to the device, up to `most` bytes. list of Shard -> same

    Every query reads all of them. On the CPU they stay memory-mapped.
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
    """Add missing files, which may come back, to `newest`. -> {file name: shard name}

    A file is kept for a week after it was first missed, which is recorded in a file beside the
    shards. It is kept longer while its folder is missing too, as the folder may be on a disk that
    is not mounted.
    """
    path = os.path.join(where, f"{mark}.missed")
    since = {}  # name: when it was first missed, in seconds since 1970
    with contextlib.suppress(Exception):  # no such file, or it is damaged in one of many ways
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        since = {name: float(when) for name, when in saved.items()}
    both = newest_shards(shards, None) | newest
    times = {name: since.get(name, time.time()) for name in both if name not in newest}
    if times != since:
        write_whole(path, json.dumps(times))
    for name, when in times.items():
        base = os.path.dirname(os.path.join(folder, name))
        if time.time() - when >= MISSED and os.access(base, os.R_OK):
            del both[name]
    return both


def repack(folder, mark, shards, newest):
    """Copy the valid rows of small or mostly outdated shards to new shards; then delete the old.

    newest: {file name: shard name}.
    """
    # Shards are never rewritten, so that searches that have one open don't see it change.
    valid = {}  # name of a shard: for each of its files, whether its rows are the newest
    chosen = []
    small = []
    for key, shard in shards.items():
        valid[key] = [newest.get(file.name) == key for file in shard.files]
        of_files = torch.tensor(valid[key], dtype=torch.bool)
        rows = of_files[shard.file.long()].sum().item()
        if not any(valid[key]) or 2 * rows < len(shard.file):
            chosen.append(key)
        elif 8 * rows < FULL:
            small.append(key)
    if len(chosen) + len(small) >= SMALL:
        chosen += small
    # A few at a time, because they are in memory together.
    for start in range(0, len(chosen), SMALL):
        old = chosen[start:start + SMALL]
        shard = _join_shards([keep_files(shards[key], valid[key]) for key in old])
        if shard.files:
            write_shard(folder, _new_name(mark), shard)
        for key in old:
            with contextlib.suppress(FileNotFoundError):  # deleted by another search
                os.unlink(os.path.join(folder, key))


def summary(encoded, files, pieces, reasons, stopped):
    """The size of the index in words, and up to ten reasons why files were left out, one a line."""
    line = f"encoded {encoded} videos, {files} in the index, {pieces} pieces"
    if stopped:
        line += "; stopped: the next search encodes the others"
    if reasons:
        line += f"; {len(reasons)} unreadable left out:"
    return "\n  ".join(map(escaped, [line, *first_few(reasons)]))
