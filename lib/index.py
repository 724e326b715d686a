"""The index of a folder: embeddings of its videos' pieces, in shards, which are never rewritten.

A shard is a file that holds the pieces of some videos. Any number of processes, machines and
searches may add shards to a folder at once; a killed run loses what it had not yet saved. In this
order: Shard, what embeddings depend on, a shard's file, all shards of a folder, repacking.
"""
import contextlib
import hashlib
import os
import secrets
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.common import escaped, written_whole

FORMAT = "tmass index 2"
FULL = 1000  # a shard is saved when it has so many pieces
OLD = 60     # or when the one before was saved so many seconds ago
SMALL = 16   # so many shards that are less than half full are joined


class Shard(NamedTuple):
    """P pieces of whole files."""

    frames: torch.Tensor  # (P,T,D) float16: embeddings of the sampled frames
    mean: torch.Tensor    # (P,D) float16: `pooled` of them
    times: torch.Tensor   # (P,T) float32: seconds at which the frames are shown
    spans: torch.Tensor   # (P,2) float32: start and end of the piece
    file: torch.Tensor    # (P,) int32: which of `files` a piece belongs to
    files: list           # (name in the folder, its stamp, None or why it can't be read)


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
    for name, stamp, why in shard.files:
        stamped = stamp is None or [type(part) for part in stamp] == [int, int]
        if type(name) is not str or not stamped or type(why) not in (str, type(None)):
            return False
    if type(shard.files) is not list or size not in (None, (T, D)):
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
        """To be called as often as one likes."""
        waited = time.monotonic() - self.saved
        if count_pieces(self.parts) >= FULL or waited > OLD:
            self.save()

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
        for name, stamp, _ in shard.files:
            if name not in newest and (stamps is None or stamps.get(name) == stamp):
                newest[name] = key
    return newest


def repack(folder, mark, shards, newest):
    """Put what counts of mostly empty shards into new ones; only then are the old ones removed."""
    counts = {}  # of each shard: does a file's part of it count?
    chosen = []
    small = []
    for key, shard in shards.items():
        counts[key] = [newest.get(name) == key for name, _, _ in shard.files]
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
