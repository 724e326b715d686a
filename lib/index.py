"""The index of a folder: the embeddings of its videos' pieces, stored in shards.

A shard is a file with the pieces of some videos, and is never rewritten. Any number of processes,
machines and searches may add shards to a folder at the same time. A run that is killed loses only
what it had not saved yet. Rows of files that are away stay, because a disk may come back; deleting
the folder .tmass-index/ starts anew. This file has these parts: finding videos, Shard, the
fingerprint of the model, the file of a shard, and all shards of a folder.
"""
import contextlib
import errno
import hashlib
import itertools
import os
import secrets
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from clip_model import CLIP
from lib.common import (
    DataError,
    curable,
    cure,
    escaped,
    first_line,
    spelled,
    why_not_written,
    written_whole,
)
from lib.encoders import OpenCLIP
from lib.video import SUFFIXES

INDEX = ".tmass-index"
FORMAT = "tmass index 2"
FULL = 4000  # pieces after which a shard is saved; opening a shard takes 1 ms
OLD = 60     # seconds after which a shard is saved even if it is not full
SMALL = 64   # number of shards that need not be full
MEGABYTE = 2 ** 20


# ---- finding videos ----

# Folders of NAS and other systems, in small letters: pictures of videos, and what was deleted.
SYSTEM = ("@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "$recycle.bin",
          "system volume information", "lost+found")


class Folder(NamedTuple):
    """A folder, and which of its videos to search."""

    path: str
    stamps: dict | None  # {name in the folder: (size, mtime_ns)}; None: all in the index
    reasons: list        # error messages, for what could not be read just now


def list_videos(paths, new=True):
    """Find the videos in folders, searched recursively, and among single files. -> list of Folder

    new=False: don't look into the folders. Raises DataError if there is nothing.
    """
    folders = []
    named = {}  # folder: {name: stamp} of the single files in it
    for path in map(spelled, paths):
        if os.path.isdir(path):
            reasons = []
            stamps = videos_below(path, reasons) if new else None
            folders.append(Folder(path, stamps, reasons))
        elif os.path.isfile(path):
            folder, name = os.path.split(path)
            named.setdefault(folder, {})[name] = _stamp_of(path)
        else:
            raise DataError(
                f"--videos {path}: there is no such folder or file (queries come before --videos)"
            )
    folders += [Folder(folder, stamps, []) for folder, stamps in named.items()]
    if new and not any(folder.stamps for folder in folders):
        searched = " ".join(map(os.fspath, paths))
        reasons = [reason for folder in folders for reason in folder.reasons]
        why = [*reasons, ", ".join(SUFFIXES)][0]
        raise DataError(f"--videos {searched}: no videos found ({why})")
    return folders


def _stamp_of(path):
    """(size, mtime_ns) of a file, which tell whether it has changed."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def videos_below(folder, reasons):
    """Find the videos in a folder, recursively, except hidden ones. -> {relative name: stamp}

    Links to folders are followed, but each folder is visited once. reasons: list to which error
    messages are added.
    """
    folder = os.fspath(folder)
    found = {}
    seen = set()

    def note(error):
        reasons.append(f"{error.filename}: {error.strerror}")

    def visible(names):
        return [name for name in names if name[0] != "." and name.lower() not in SYSTEM]

    for base, folders, files in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()  # in place, so that os.walk doesn't descend into them
            continue
        seen.add(real)
        # Links come last, so that a folder is found under its own name rather than a link's.
        folders[:] = visible(folders)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(base, name)), name))
        below = base[len(folder):].lstrip(os.sep)
        for name in visible(files):
            path = os.path.join(base, name)
            try:
                if name.lower().endswith(SUFFIXES) and os.path.isfile(path):
                    found[os.path.join(below, name)] = _stamp_of(path)
            except OSError as error:  # deleted in the meantime, or no permission
                note(error)
    return dict(sorted(found.items()))


# ---- shards ----

class File(NamedTuple):
    """A file in a folder, as it was when it was encoded."""

    name: str
    stamp: tuple
    why: str | None = None     # why it can't be read; None if it can
    content: str = ""          # its content_of; empty in shards of earlier versions


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
    """Hash a file's size, first and last megabyte, to recognise it elsewhere. -> 32 hex digits

    It is the same file only if its stamp is the same too: reading all of a long film would take
    longer than decoding the sampled frames. Raises OSError.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(b"%d" % size)
        for start in (0, max(0, size - MEGABYTE)):
            file.seek(start)
            digest.update(file.read(MEGABYTE))
    return digest.hexdigest()


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
    """Open a shard, memory-mapped. -> Shard

    size: (T,D) of the model. There are no checksums, because a shard may be gigabytes long. Raises
    OSError, also if it is damaged, and DataError if there is too little memory.
    """
    with curable(f"{path} can't be opened"), open(path, "rb") as file:
        # torch maps a file by its name, which must be valid Unicode.
        name = path if str(path).isprintable() else f"/dev/fd/{file.fileno()}"
        try:
            content = torch.load(name, map_location="cpu", mmap=True, weights_only=True)
            shard = Shard(*(content[field] for field in Shard._fields))
            shard = shard._replace(files=[File(*file) for file in shard.files])
            if _is_valid(shard, *size):
                return shard
        except Exception as error:  # a damaged file may raise nearly any error
            if isinstance(error, OSError) or cure(error):
                raise
    raise OSError(errno.EBADMSG, "it is damaged: you can delete it")


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

    saved: called after each save. names: of the shards that were written. unsaved: {name: Shard} of
    those that could not be, and why.
    """

    def __init__(self, folder, mark, saved=lambda: None):
        self.folder = folder
        self.mark = mark
        self.saved = saved
        self.names = []
        self.unsaved = {}
        self.why = ""
        self.start()

    def start(self):
        """Start a new shard."""
        self.parts = []  # a Shard of each file
        self.started = time.monotonic()

    def add(self, part):
        """Add the Shard of a file, and save what is full or old."""
        self.parts.append(part)
        full = sum(len(part.file) for part in self.parts) >= FULL
        if full or time.monotonic() - self.started > OLD:
            self.save()

    def save(self):
        """Save what was added."""
        if not self.parts:
            return
        # Names sort by time of creation.
        name = f"{self.mark}-{time.time_ns():016x}-{secrets.token_hex(4)}.shard"
        shard = _join_shards(self.parts)
        try:
            write_shard(self.folder, name, shard)
            self.names.append(name)
        except (OSError, RuntimeError) as error:
            self.unsaved[name] = shard
            self.why = (f"cannot write {self.folder} "
                        f"({why_not_written(error) or first_line(error)}): use --index DIR to keep "
                        "the embeddings elsewhere")
        self.start()
        self.saved()


# ---- all shards of a folder ----

def shard_folder(folder, index_dir=None):
    """The folder of a folder's shards: inside it, or a subfolder of index_dir if that is given."""
    if not index_dir:
        return os.path.join(folder, INDEX)
    # Named after the real path, so that every spelling of the path finds the same shards.
    real = os.fsencode(os.path.realpath(folder))
    name = hashlib.sha256(real).hexdigest()
    return os.path.join(index_dir, name[:12])


def open_shards(folder, names, size, job):
    """Open shards, the same ones in all processes. -> {name: Shard}, without what can't be read

    size: (T,D) of the model.
    """
    opened = {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            opened[name] = read_shard(path, size)
        except FileNotFoundError:  # another search has joined it with others
            continue
        except OSError as error:
            job.say(f"{escaped(path)} is left out ({error.strerror}): its files are encoded again")
    missing = job.join([name for name in names if name not in opened])
    return {name: shard for name, shard in opened.items() if name not in missing}


def newest_files(shards, stamps):
    """Find the newest File of each name. -> {name: File}

    shards: {name: Shard}. stamps: {file name: stamp}. A file's rows are valid only if its stamp is
    the same as when it was encoded. None: all rows are valid.
    """
    newest = {}
    # Shards' names sort by time, so the last shard that has a file is its newest.
    for _, shard in sorted(shards.items()):
        for file in shard.files:
            if stamps is None or stamps.get(file.name) == file.stamp:
                newest[file.name] = file
    return newest


def join_small(folder, mark, shards):
    """If many shards are not full, write their valid rows to full ones; then delete them."""
    # Shards are never rewritten, so that searches that have one open don't see it change.
    small = {key: x for key, x in shards.items() if len(x.file) < FULL}
    if len(small) <= SMALL:
        return
    newest = newest_files(shards, None)
    writer = ShardWriter(folder, mark)
    with contextlib.suppress(OSError):  # can't be deleted: they stay
        for shard in small.values():
            writer.add(keep_files(shard, [newest[file.name] is file for file in shard.files]))
        writer.save()
        for key in () if writer.unsaved else small:
            os.unlink(os.path.join(folder, key))
