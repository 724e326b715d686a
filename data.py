"""Videos and captions: what a split holds, how frames are read, what a batch is made of.

    python data.py check --data msrvtt [--root DIR] [--videos DIR]     # what is there, what is missing, where it goes
    python data.py check --data my.csv --decode --list bad.csv        # and which videos can't be read

Order of reading: Clip and Annotations, read_frames, the datasets that training and evaluation iterate over, the readers
of each data set's own files.
"""
import bisect
import contextlib
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import av
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms import v2

from shapes import DataError, Parser, escaped, numeric, program, shapes_table, written_whole


class Clip(NamedTuple):
    """A video file, or the seconds [start, end) of one; None means from the beginning or to the end."""
    path: str
    start: Optional[float] = None
    end: Optional[float] = None


@dataclass
class Annotations:
    """A split. clips (V), captions (N), owner (N): caption i describes clips[owner[i]]. where (V): each one's line."""
    clips: list
    captions: list
    owner: list
    where: Optional[list] = None

    def take(self, videos):
        """The annotations of some videos, by index, in their order here."""
        new = {v: k for k, v in enumerate(sorted(videos))}
        kept = [i for i, o in enumerate(self.owner) if o in new]
        where = self.where and [self.where[v] for v in new]
        return Annotations([self.clips[v] for v in new], [self.captions[i] for i in kept],
                           [new[self.owner[i]] for i in kept], where)


# ---- frames ----

# Containers of moving pictures that open no file but their own: no playlists, lists of files, numbered pictures.
DEMUXERS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,live_flv,ogg,rm,mxf,gxf,nut,nuv,"
            "nsv,dv,wtv,ivf,obu,h261,h263,h264,hevc,vvc,vc1,m4v,mjpeg,cavsvideo,dirac,dnxhd,swf,gif,apng,yuv4mpegpipe")


def sample_indices(n, frames):
    """Which of n frames are taken: the middle of each of T equal intervals; every one, then the last again if n < T."""
    k = min(n, frames)
    starts = [n * i // k for i in range(k + 1)]
    return [(a + b - 1) // 2 for a, b in zip(starts, starts[1:])] + [n - 1] * (frames - k)


class Piece(NamedTuple):
    """T decoded frames of the seconds [start, end) of a file: when each is shown, and uint8 (T,3,H,W), upright."""
    start: float
    end: float
    times: list
    frames: torch.Tensor


def read_frames(clip, frames):
    """Decode T frames of a clip, sampled evenly. -> uint8 (T,3,H,W), turned as the file says. Raises DataError."""
    return read_clip(clip, frames).frames


def read_clip(clip, frames):
    """The one Piece that a clip is. Seconds count from the first frame. Raises DataError, which names the file."""
    [piece] = _read(clip.path, frames, lambda times: [_span(times, clip)])
    return piece


def read_pieces(path, frames, window=0):
    """The pieces of about `window` seconds that a file is cut into, in order; one where it is short, or window 0.

    -> iterator of Piece. The file is opened, and its table of packets read, once for all of them.
    """
    return _read(path, frames, lambda times: _cut(times, window))


def _read(path, T, cut):
    """The Pieces that `cut` asks for: the times of all frames, in seconds from the first -> ranges [(a, b)] of frames.

    mp4/mov and matroska/webm tell every frame's time without decoding: seek to the keyframe before each wanted frame,
    and skip what no other frame refers to. Everything else is decoded from the start and counted. A frame that can't
    be decoded is replaced by the one before.
    """
    path = str(path)
    if not os.path.exists(path):
        raise DataError(f"video {path} is missing")
    if os.path.getsize(path) == 0:
        raise DataError(f"video {path} is empty (0 bytes)")
    done = 0
    try:
        file, stream = _open(path)
        with file:
            seekable = "mp4" in file.format.name or "matroska" in file.format.name
            fast = _seek_frames(file, stream, T, cut) if seekable else None
            for piece in fast or [None]:
                if piece is None:
                    break
                yield piece
                done += 1
            else:
                return
        yield from itertools.islice(_count_frames(path, T, cut), done, None)  # from where the fast way stopped
    except av.FFmpegError as e:
        raise DataError(f"video {path} can't be decoded: {e.strerror or e}") from None


def _open(path):
    """-> (open file, its first stream of moving pictures)."""
    only = dict(protocol_whitelist="file", format_whitelist=DEMUXERS)
    try:  # absolute, or "12:30.mp4" would be a protocol named 12; and old files have titles that are not UTF-8
        file = av.open(os.path.abspath(path), options=only, metadata_errors="ignore")
    except av.ArgumentError:  # FFmpeg's word for a format that is not in the list
        raise DataError(f"{path} is not a video, or cut off (playlists and lists of files are not followed)") from None
    covers = av.stream.Disposition.attached_pic
    streams = [s for s in file.streams.video if s.codec_context is not None and not s.disposition & covers]
    if not streams:
        file.close()
        raise DataError(f"{path} is not a video, is cut off, or has no video stream that can be decoded")
    stream = streams[0]
    stream.codec_context.thread_type = "NONE"  # in DataLoader workers frame threads cost more than they give
    return file, stream


def _packets(file, stream):
    """The packets as far as the file goes: where it is damaged, what came before still counts."""
    try:
        yield from file.demux(stream)
    except av.FFmpegError:
        pass


def _span(times, clip):
    """The range [a, b) of the sorted times, in seconds from the first, that lies in the clip; at least one frame."""
    a = 0 if clip.start is None else bisect.bisect_left(times, clip.start - 1e-6)
    b = len(times) if clip.end is None else bisect.bisect_left(times, clip.end - 1e-6)
    if a >= len(times):
        raise DataError(f"video {clip.path} ends after {times[-1]:.1f} s, before the clip's start at {clip.start} s")
    return a, max(b, a + 1)


def _end(times):
    """When the last frame ends: it stays as long as the others do on average."""
    return times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1)


def _cut(times, window):
    """Equal parts of about `window` seconds of what is longer than 1.5 windows, else the whole. -> ranges [(a, b)]."""
    length = _end(times)
    n = min(len(times), round(length / window)) if window and length > 1.5 * window else 1
    bounds = [bisect.bisect_left(times, length * k / n - 1e-6) for k in range(n)] + [len(times)]
    return [(a, b) for a, b in zip(bounds, bounds[1:]) if a < b]  # a still that lasts longer than a piece


def _chosen(a, b, T):
    """The T frames that are taken of the range [a, b)."""
    return [a + i for i in sample_indices(b - a, T)]


def _piece(path, times, a, b, chosen, found):
    """The Piece of the frames [a, b): those chosen, as far as they were found, {number: (3,H,W)}."""
    frames = [found.get(i) for i in chosen]
    if all(x is None for x in frames):
        raise DataError(f"video {path} has no frame that can be decoded")
    end = times[b] if b < len(times) else _end(times)
    return Piece(times[a], end, [times[i] for i in chosen], torch.stack(_fill(frames)))


def _seek_frames(file, stream, T, cut):
    """The fast way of _read. Yields Pieces, and None where it does not apply or a frame was not found."""
    packets = [(p.pts, p.is_keyframe) for p in _packets(file, stream) if p.size and not p.is_discard]
    if not packets or any(pts is None for pts, _ in packets):
        yield None
        return
    shown = sorted(pts for pts, _ in packets)  # in the stream's unit of time
    keys = sorted(pts for pts, key in packets if key)
    times = [float((pts - shown[0]) * stream.time_base) for pts in shown]
    spans = [(a, b, _chosen(a, b, T)) for a, b in cut(times)]
    wanted = {shown[i]: i for _, _, chosen in spans for i in chosen}
    code, found, last_key, source = stream.codec_context, {}, None, None
    for a, b, chosen in spans:
        for i in chosen:
            if i in found:
                continue
            key = keys[max(0, bisect.bisect_right(keys, shown[i]) - 1)] if keys else shown[0]
            if key != last_key:  # else: go on decoding where we are
                file.seek(key, stream=stream)
                last_key, source = key, _packets(file, stream)
            for packet in source:
                code.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
                with contextlib.suppress(av.FFmpegError):
                    for frame in packet.decode():
                        if frame.pts in wanted:
                            found[wanted[frame.pts]] = _pixels(frame)
                if i in found:
                    break
            else:
                yield None
                return
        yield _piece(file.name, times, a, b, chosen, found)
        found = {i: x for i, x in found.items() if i >= b}


def _count_frames(path, T, cut):
    """The exact way of _read for any container: decode from the start, and count. Yields Pieces.

    Frame times need one pass over the file, the pixels another. What is a single piece mostly needs but one: the number
    of packets nearly always is that of frames, so those that will be wanted are known before.
    """
    file, stream = _open(path)
    with file:
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        n = sum(1 for packet in _packets(file, stream) if packet.size)
    times, found, keep = [], {}, []
    with contextlib.suppress(DataError):  # a clip that starts after the end: the true times will tell
        spans = cut([k / rate for k in range(n)]) if n else []
        keep = _chosen(*spans[0], T) if len(spans) == 1 else []
    for k, frame in enumerate(_decode(path)):
        times.append(k / rate if frame.time is None else frame.time)
        if k in keep:
            found[k] = _pixels(frame)
    if not times:
        raise DataError(f"video {path} has no frame that can be decoded")
    times = [t - times[0] for t in times]
    again = enumerate(_decode(path))
    for a, b in cut(times):
        chosen = _chosen(a, b, T)
        if any(i not in found for i in chosen):
            found = {}
            for k, frame in again:
                if k in chosen:
                    found[k] = _pixels(frame)
                if k >= chosen[-1]:
                    break
        yield _piece(path, times, a, b, chosen, found)


def _decode(path):
    """Every frame of a file, in order; a damaged packet costs its own frames only."""
    file, stream = _open(path)
    with file:
        for packet in _packets(file, stream):
            frames = []
            with contextlib.suppress(av.FFmpegError):
                frames = packet.decode()
            yield from frames


def _pixels(frame):
    """A decoded frame -> uint8 (3,H,W), upright."""
    plane = frame.reformat(format="rgb24").planes[0]  # its lines are padded
    x = torch.frombuffer(bytearray(plane), dtype=torch.uint8).view(frame.height, plane.line_size)
    x = x[:, :frame.width * 3].reshape(frame.height, frame.width, 3)
    return torch.rot90(x, round((frame.rotation or 0) / 90) % 4).permute(2, 0, 1).contiguous()


def _fill(found):
    """Frames not found repeat the one before (the first found, at the start); all get the first one's size."""
    last = next(x for x in found if x is not None)
    size, out = last.shape[1:], []
    for x in found:
        last = last if x is None else x if x.shape[1:] == size else v2.functional.resize(x, size, antialias=True)
        out.append(last)
    return out


class FrameCache:
    """Each clip's T sampled frames in one file, as JPEG (quality 95, short side at most 256): it is decoded once.

    A file counts only while the video's size, time of change, T and span are what they were. Files are written beside
    and renamed: any number of workers and processes may share a folder. Where it can't be written, videos are decoded
    each time, after one warning. Frames pass through JPEG the first time too: a run sees the same pixels whatever the
    cache held before.
    """

    def __init__(self, folder, frames):
        self.folder, self.frames = Path(folder), frames
        self.warned = torch.zeros(1).share_memory_()  # one warning from all workers
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            self._warn(e)

    def _warn(self, e):
        if not self.warned.item():
            self.warned.fill_(1)
            why = "that is a file" if isinstance(e, FileExistsError) else e.strerror or e
            print(f"warning: frame cache {self.folder} can't be written ({why}): videos are decoded each time",
                  file=sys.stderr)

    def _decode(self, body, sizes):
        pictures = torch.frombuffer(bytearray(body), dtype=torch.uint8).split(sizes)
        return torch.stack(decode_jpeg(list(pictures), ImageReadMode.RGB))

    def read(self, clip):
        """The clip's frames, from the cache or decoded into it. -> uint8 (T,3,H,W). Raises what read_frames raises."""
        path = os.path.abspath(clip.path)
        try:
            stat = os.stat(path)
        except OSError:
            return read_frames(clip, self.frames)  # says what is wrong
        key = [path, stat.st_size, stat.st_mtime_ns, self.frames, clip.start, clip.end]
        name = hashlib.sha1(json.dumps([path, *key[3:]]).encode()).hexdigest()
        file = self.folder / f"{name}.jpegs"
        try:
            head, body = file.read_bytes().split(b"\n", 1)  # a line of JSON, then the pictures one after the other
            saved, sizes, crc = json.loads(head)
            if saved == key and zlib.crc32(body) == crc:
                return self._decode(body, sizes)
        except (OSError, ValueError, TypeError, RuntimeError):  # absent or damaged: the video again
            pass
        frames = read_frames(clip, self.frames)
        if min(frames.shape[-2:]) > 256:
            frames = v2.functional.resize(frames, 256, antialias=True)
        jpegs = [encode_jpeg(x, quality=95).numpy().tobytes() for x in frames]
        body, sizes = b"".join(jpegs), [len(x) for x in jpegs]
        try:
            with written_whole(file) as part:
                Path(part).write_bytes(json.dumps([key, sizes, zlib.crc32(body)]).encode() + b"\n" + body)
        except OSError as e:
            self._warn(e)
        return self._decode(body, sizes)


# ---- transforms and datasets: uint8 throughout, CLIP normalises ----

def train_transform(size):
    """uint8 (T,3,H,W) -> uint8 (T,3,size,size): one random crop and flip for all frames of a video."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()])


def test_transform(size):
    """uint8 (T,3,H,W) -> uint8 (T,3,size,size): short side to size, bicubic, centre crop, as CLIP was trained."""
    resize = v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])


class VideoDataset(Dataset):
    """Each clip once. Item v -> uint8 (T,3,R,R), or a bad video's DataError as a value: a worker that raises dies."""

    def __init__(self, clips, frames, transform, cache=None):
        self.clips, self.transform = clips, transform
        self.read = cache.read if cache else functools.partial(read_frames, frames=frames)  # a lambda can't be spawned
        self.reading = torch.zeros(256, 2, dtype=torch.long).share_memory_()  # per worker: its pid, clip + 1

    def __len__(self):
        return len(self.clips)

    def note(self, v):
        worker = torch.utils.data.get_worker_info()
        if worker and worker.id < len(self.reading):
            self.reading[worker.id] = torch.tensor([os.getpid(), v + 1])

    def video(self, v):
        self.note(v)
        return self.transform(self.read(self.clips[v]))

    item = video

    def __getitem__(self, key):
        try:
            return self.item(key)
        except DataError as e:
            return e

    def was_reading(self, pid):
        """What a worker that died was decoding, for the error message."""
        paths = (str(self.clips[v - 1].path) for p, v in self.reading.tolist() if p == pid and v)
        return next(paths, "an unknown video")


class PairDataset(VideoDataset):
    """Each caption with its video. Item (epoch, i) -> (uint8 (T,3,R,R), caption i, i), or a DataError as a value.

    Augmentation depends on (seed, epoch, i) alone: neither on the worker nor on what was read before.
    """

    def __init__(self, ann, frames, transform, seed=0, cache=None):
        super().__init__(ann.clips, frames, transform, cache)
        self.ann, self.seed = ann, seed

    def __len__(self):
        return len(self.ann.captions)

    def item(self, key):
        epoch, i = key
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's global generator
            # torch.manual_seed would also set the GPU's, which is the training's
            torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * 1_000_003 + i) % 2 ** 63)
            return self.video(self.ann.owner[i]), self.ann.captions[i], i


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _ignore_signals(worker):
    """In a worker: a Ctrl-C, or a SIGTERM to the whole job, is for the main process, which may still want its batch."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def loading(dataset, batches=None, collate=None, workers=0, pin=False):
    """`with loading(...) as batches:` what collate makes of each list of items, read by worker processes, in order.

    Without batches the dataset is a stream that makes its own, and they come as they are ready.

    Signals are held back while workers start, so that none dies before it ignores them. A worker that dies all the same (out of memory, a
    crash in a codec) ends the block with a DataError that names the video it was reading; torch tells of it at any moment.
    """
    order = dict(batch_size=None, in_order=False) if batches is None else dict(batch_sampler=batches, collate_fn=collate)
    loader = DataLoader(dataset, **order, num_workers=workers, pin_memory=pin, worker_init_fn=_ignore_signals)
    try:
        try:
            hold = workers and hasattr(signal, "pthread_sigmask")
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if hold else None
            try:
                iterator = iter(loader)
            finally:
                if hold:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield iterator
        except (EOFError, ConnectionError):  # it died while handing a batch over
            time.sleep(1)                    # in a moment torch's SIGCHLD handler raises what says more
            raise
    except Exception as e:
        told = e
        while told and not (pid := re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", str(told))):
            told = told.__context__  # torch raises it at any moment: while a file is written, another error comes of it
        if not told:
            raise
        video, why = dataset.was_reading(int(pid[1])), str(told).splitlines()[0]
        raise DataError(f"a decoding process died while it read {video} ({why}): check that video, or the machine's "
                        "memory (fewer --workers)") from e


# ---- the data sets' own files ----
# A reader gets the folder of the annotation files, a split, and the folders that may hold the videos. It yields
# (Clip, caption, where) per caption; `where` names the line for messages.

UNPACKED = ("videos", "videos/all", "all", "MSRVTT/videos/all", "TrainValVideo", "TestVideo", "YouTubeClips",
            "Charades_v1_480")
SUFFIXES = (".mp4", ".avi", ".mov", ".m4v", ".mpg", ".3gp", ".webm", ".mkv")  # DiDeMo's end in any, or in a bare dot


def video_folders(root, videos=None):
    """Where a data set's videos are sought: in `videos` (default: root), first in what the archives unpack to."""
    base = str(videos or root)
    found = [os.path.join(base, name) for name in UNPACKED if os.path.isdir(os.path.join(base, name))]
    if not found and not videos:
        found = [os.path.join(base, "videos")]  # where they belong
    return [*found, base]


def video_file(folders, name):
    """A video in one of the folders, by its name in the annotations or under another suffix; else where it belongs."""
    names = [name, *(name.rsplit(".", 1)[0] + end for end in SUFFIXES)]
    paths = (os.path.join(folder, name) for name in names for folder in folders)
    return next(filter(os.path.isfile, paths), os.path.join(folders[0], name))


def read_text(path, what):
    """A text file's content, or a DataError that says which file is missing and where it goes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: it belongs to {what}; put it there, or choose another --root") from None
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path}, row {line}: not UTF-8 text (byte {e.object[e.start]:#x}); save it as UTF-8") from None
    except OSError as e:
        raise DataError(f"{path} can't be read: {e.strerror or e}") from None


def read_json(path, what, kind):
    try:
        content = json.loads(read_text(path, what))
    except json.JSONDecodeError as e:
        raise DataError(f"{path}, line {e.lineno}: not valid JSON ({e.msg}); fetch the file again") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: holds no JSON {'object' if kind is dict else 'list'}; fetch the file again")
    return content


def read_table(path, what, columns):
    """Rows of a csv file with a header that has `columns` at least. -> list of (line that the row begins in, dict)."""
    reader = csv.reader(io.StringIO(read_text(path, what), newline=""), strict=True)
    rows, line = [], 1
    try:
        for fields in reader:
            if fields:
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as e:
        raise DataError(f"{path}, row {line}: {e}; check its double quotes: one that is opened there must be closed, "
                        "one within a text is written twice") from None
    header = [x.strip() for x in rows[0][1]] if rows else []
    missing = [c for c in columns if c not in header]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; its first line is {header}")
    for column in header:
        if column and header.count(column) > 1:
            raise DataError(f"{path} has the column {column} {header.count(column)} times: one is enough")
    if not rows[1:]:
        raise DataError(f"{path} has a header, but no row below it")
    for number, fields in rows[1:]:
        if len(fields) != len(header):
            raise DataError(f"{path}, row {number}: not as many fields as the header has ({len(fields)}, not "
                            f"{len(header)}); a text with commas belongs in double quotes")
    return [(number, dict(zip(header, fields))) for number, fields in rows[1:]]


def read_csv(path, root, split):
    """Your own csv: video, caption and optionally split, start, end (seconds). Paths are relative to root."""
    for number, row in read_table(Path(path), "--data", ["video", "caption"]):
        where = f"{path}, row {number}"
        if "split" in row and row["split"].strip() not in SPLITS:
            raise DataError(f"{where}: split {row['split']!r} must be train, val or test")
        if split != "all" and row.get("split", split).strip() != split:
            continue
        if not row["video"].strip():
            raise DataError(f"{where}: empty video; fill it in or delete the row")
        try:
            start, end = (float(row[c]) if row.get(c, "").strip() else None for c in ("start", "end"))
        except ValueError:
            raise DataError(f"{where}: start {row.get('start')!r} and end {row.get('end')!r} must be seconds") from None
        if not 0 <= (start or 0) < (math.inf if end is None else end):
            raise DataError(f"{where}: end {end} must come after start {start}, and neither be negative")
        yield Clip(str(Path(root) / row["video"].strip()), start, end), row["caption"], where


def read_msrvtt(root, split, folders, size="9k"):
    if split == "test":
        name = "MSRVTT_JSFUSION_test.csv"
        for number, row in read_table(root / name, "msrvtt (1k-A test)", ["video_id", "sentence"]):
            yield Clip(video_file(folders, row["video_id"] + ".mp4")), row["sentence"], f"{name}, row {number}"
        return
    rows = read_table(root / f"MSRVTT_train.{size}.csv", "msrvtt", ["video_id"])
    clips = {row["video_id"]: Clip(video_file(folders, row["video_id"] + ".mp4")) for _, row in rows}
    content = read_json(root / "MSRVTT_data.json", "msrvtt", dict)
    for k, sentence in enumerate(_field(content, "sentences", "MSRVTT_data.json", list), 1):
        where = f"MSRVTT_data.json, sentence {k}"
        video = _field(sentence, "video_id", where)
        if video in clips:
            yield clips[video], _field(sentence, "caption", where), where


def _field(row, key, where, kind=str):
    if not isinstance(row, dict) or not isinstance(row.get(key), kind):
        raise DataError(f"{where}: has no {key!r} as expected; fetch the file again")
    return row[key]


def _sentences(row, key, where):
    """A video's captions; none where the file has no entry. A string would pass as a list of letters."""
    texts = [] if row.get(key) is None else row[key]
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise DataError(f"{where}: {key!r} should hold a list of sentences; fetch the file again")
    return texts


LSMDC_BAD = "1012_Unbreakable_00.05.16.065-00.05.21.941"
LSMDC = dict(train="LSMDC16_annos_training.csv", val="LSMDC16_annos_val.csv",
             test="LSMDC16_challenge_1000_publictect.csv")


def read_lsmdc(root, split, folders):
    for number, line in enumerate(read_text(root / LSMDC[split], "lsmdc").split("\n"), 1):
        if not line:
            continue
        where, fields = f"{LSMDC[split]}, row {number}", line.split("\t")
        if len(fields) != 6 or not fields[5].strip():
            raise DataError(f"{where}: {len(fields)} tab-separated fields, expected 6, the last a sentence; "
                            "fetch the file again")
        clip = fields[0].lstrip('"')  # some ids begin with a stray quote
        movie = clip.split(".")[0][:-3]
        if not movie:
            raise DataError(f"{where}: clip id {clip!r} does not begin with the movie's name; fetch the file again")
        if clip != LSMDC_BAD:  # known to be broken
            yield Clip(video_file(folders, f"{movie}/{clip}.avi")), fields[5], where


def read_didemo(root, split, folders):
    name, other = f"didemo_{split}_label.csv", f"{split}_data.json"
    if not (root / name).is_file() and (root / other).is_file():
        yield from read_didemo_json(root, other, folders)
        return
    turned = []
    for number, row in read_table(root / name, f"didemo (or {other})", ["video_path", "starts", "ends", "text"]):
        where = f"{name}, row {number}"
        start, end = (re.search(r"\d+", row[c]) for c in ("starts", "ends"))  # "tensor([[31]])"
        if not start or not end:
            raise DataError(f"{where}: starts {row['starts']!r} and ends {row['ends']!r} hold no seconds")
        start, end = float(start[0]), float(end[0])
        if start >= end:  # swapped as in the released code
            start, end = end, start
            turned.append(where)
        yield Clip(video_file(folders, row["video_path"].rsplit("/", 1)[-1]), start, end), row["text"], where
    if turned:
        more = f" and {len(turned) - 1} more" if turned[1:] else ""
        warn_once(f"{turned[0]}{more}: the end is not after the start; the two are swapped, as in the released code")


def read_didemo_json(root, name, folders):
    """An entry per described segment: a video's descriptions, in the file's order, are one paragraph, as in the csv."""
    videos = {}
    for k, item in enumerate(read_json(root / name, "didemo", list), 1):
        where = f"{name}, entry {k}"
        text = _field(item, "description", where, (str, list))
        _, paragraph = videos.setdefault(_field(item, "video", where), (where, []))
        paragraph += [text] if isinstance(text, str) else _sentences(item, "description", where)
    for video, (where, paragraph) in videos.items():
        yield Clip(video_file(folders, video)), " ".join(paragraph), where


@functools.cache
def warn_once(line):
    """A warning, once per program and by its first process only: train and test may read the same file."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {line}", file=sys.stderr)


def read_vatex(root, split, folders):
    name = "vatex_training_v1.0.json" if split == "train" else "vatex_validation_v1.0.json"
    listed = None if split == "train" else set(read_text(root / f"{split}_list.txt", "vatex").split())
    for k, item in enumerate(read_json(root / name, "vatex", list), 1):
        where = f"{name}, entry {k}"
        video = _field(item, "videoID", where)
        match = re.fullmatch(r"(.{11})_(\d{6})_(\d{6})", video)
        if not match:
            raise DataError(f"{where}: videoID {video!r} is not <11 characters>_<start>_<end>; fetch the file again")
        if listed is not None and video not in listed:
            continue
        clip = Clip(video_file(folders, video + ".mp4"))
        if not os.path.isfile(clip.path):
            uncut = video_file(folders, match[1] + ".mp4")  # the YouTube video
            clip = Clip(uncut, float(match[2]), float(match[3])) if os.path.isfile(uncut) else clip
        for caption in _sentences(item, "enCap", where):
            yield clip, caption, where


def read_charades(root, split, folders):
    name = f"Charades_v1_{split}.csv"
    for number, row in read_table(root / name, "charades", ["id", "script"]):
        if row["script"].strip():
            yield Clip(video_file(folders, row["id"] + ".mp4")), row["script"], f"{name}, row {number}"


def read_msvd(root, split, folders):
    captions = read_json(root / "captions_msvd.json", "msvd", dict)
    for number, video in enumerate(read_text(root / f"{split}_list.txt", "msvd").split(), 1):
        clip = Clip(video_file(folders, video + ".avi"))
        for caption in _sentences(captions, video, "captions_msvd.json"):
            yield clip, caption, f"{split}_list.txt, row {number}"


READERS = {"msrvtt": read_msrvtt, "msrvtt-7k": functools.partial(read_msrvtt, size="7k"), "lsmdc": read_lsmdc,
           "didemo": read_didemo, "vatex": read_vatex, "charades": read_charades, "msvd": read_msvd}
NO_VAL = ("msrvtt", "msrvtt-7k", "charades")  # no official validation split
SPLITS = ("train", "val", "test")


def load_annotations(name_or_csv, root=None, split="train", videos=None):
    """A data set's split as its files say. A csv without a split column has all rows in every split. -> Annotations.

    root: the folder of the annotation files (default: data/NAME). videos: that of the videos, where it is another one.
    """
    name = str(name_or_csv)
    if split not in (*SPLITS, "all"):
        raise DataError(f"unknown split {split!r}: choose train, val, test or all")
    if videos and not os.path.isdir(videos):
        raise DataError(f"--videos {videos}: there is no such folder; name the one that holds the video files")
    if name.endswith(".csv"):
        if not os.path.isfile(name):
            raise DataError(f"{name} is missing: --data wants a csv file with the columns video and caption")
        return _collect(read_csv(name, videos or root or Path(name).parent, split))
    root = Path(root or Path("data") / name.split("-")[0])
    if name == "shapes":
        return _collect(read_csv(shapes_table(root), videos or root, split))
    if name not in READERS:
        names = ", ".join(["shapes", *READERS])
        raise DataError(f"unknown data set {name!r}: choose {names}, or give the path of a .csv file")
    if not root.is_dir():
        raise DataError(f"{root} is missing: put {name}'s files there (README, Data), or name the folder with --root")
    folders = video_folders(root, videos)
    splits = [s for s in (SPLITS if split == "all" else [split]) if s != "val" or name not in NO_VAL]
    return _collect(row for s in splits for row in READERS[name](root, s, folders))


def _collect(rows):
    clips, captions, owner, where = {}, [], [], []
    for clip, caption, line in rows:
        if not caption.strip():
            raise DataError(f"{line}: empty caption; fill it in or delete it")
        if clip not in clips:
            clips[clip] = len(clips)
            where.append(line)
        captions.append(caption.strip())
        owner.append(clips[clip])
    return Annotations(list(clips), captions, owner, where)


def load_split(name_or_csv, root=None, split="train", val_videos=0, seed=24, videos=None):
    """The split that training and evaluation use: disjoint, and the test split never chooses anything. -> Annotations.

    Official splits where they exist. msrvtt and charades have no validation split: val_videos videos, a seeded choice,
    are held out of train. A csv without a split column is divided by split_by_name.
    """
    name = str(name_or_csv)
    if name.endswith(".csv") and split != "all" and not has_splits(name):
        ann = load_annotations(name, root, "all", videos)
        chosen = split_by_name([os.path.relpath(c.path, videos or root or Path(name).parent) for c in ann.clips])
        ann = ann.take([v for v in range(len(ann.clips)) if chosen[v] == split])
        if not ann.clips and split != "val":
            raise DataError(f"{name} has one video and no split column: to train and test, add videos or the column")
        return ann
    if name in NO_VAL and split in ("train", "val"):
        ann = load_annotations(name, root, "train", videos)
        if val_videos >= len(ann.clips):
            raise DataError(f"--val-videos {val_videos}: {name} has {len(ann.clips)} training videos in all")
        held = set(torch.randperm(len(ann.clips), generator=torch.Generator().manual_seed(seed))[:val_videos].tolist())
        return ann.take([v for v in range(len(ann.clips)) if (v in held) == (split == "val")])
    return load_annotations(name, root, split, videos)


def has_splits(path):
    """Does a csv say itself which row belongs to which split?"""
    return os.path.isfile(path) and "split" in read_table(Path(path), "--data", ["video"])[0][1]


def split_by_name(names):
    """File names -> each one's split: 80 % train, 10 % val, 10 % test, by a hash of the name: adding videos moves none.

    Only where train or test would get fewer than two (nearly never from 60 videos on) do the nearest by hash make up
    the two (of two or three videos, the one): these may move when the list grows.
    """
    code = {name: zlib.crc32(os.fsencode(name)) for name in names}
    order = sorted(code, key=lambda name: (code[name] % 10, code[name], name))
    tenths = [code[name] % 10 for name in order]
    least = min(2, len(order) // 2)
    most = len(order) - least
    test = min(max(bisect.bisect_left(tenths, 1), least), most)
    train = max(min(bisect.bisect_left(tenths, 2), most), test)
    split = dict.fromkeys(order[:test], "test") | dict.fromkeys(order[test:train], "val")
    return [split.get(name, "train") for name in names]


def ten(lines):
    """The first ten, and how many more there are."""
    return [*lines[:10], f"and {len(lines) - 10} more"] if len(lines) > 10 else lines


def present(ann, skip_bad=False):
    """Are the videos there? Asked before anything long starts. -> (annotations of those, lines about the others)."""
    gone = [v for v, clip in enumerate(ann.clips) if not os.path.isfile(clip.path)]
    lines = [f"{ann.clips[v].path} ({ann.where[v]})" if ann.where else str(ann.clips[v].path) for v in gone]
    if gone and not skip_bad:
        raise DataError(f"{len(gone)} of {len(ann.clips)} videos are missing: {'; '.join(ten(lines))}: put them there, "
                        "name their folder with --videos, or leave them out with --skip-bad")
    return (ann.take(set(range(len(ann.clips))) - set(gone)) if gone else ann), lines


# ---- command line ----

PUBLISHED = {  # (texts, videos) per split, None where the number is not published
    "msrvtt": dict(train=(180_000, 9_000), test=(1_000, 1_000)),
    "msrvtt-7k": dict(train=(140_200, 7_010), test=(1_000, 1_000)),
    "lsmdc": dict(train=(101_079, None), val=(7_408, None), test=(1_000, 1_000)),
    "didemo": dict(train=(8_362, None), val=(1_062, None), test=(1_004, None)),
    "vatex": dict(train=(259_910, 25_991), val=(15_000, 1_500), test=(15_000, 1_500)),
    "charades": dict(train=(None, 7_985), test=(None, 1_863)),
    "msvd": dict(train=(None, 1_200), val=(None, 100), test=(27_763, 670)),
}
LIST = "video,problem\n"  # the first line of what --list writes
EVERY = 5                 # seconds between two lines of progress


def decode_all(clips, frames, cache, workers):
    """Read every clip, and tell on stderr how far that is. -> (file, what is wrong with it) of those that can't be."""
    dataset, bad = VideoDataset(clips, frames, len, cache), []
    began = told = time.monotonic()
    with loading(dataset, [[v] for v in range(len(clips))], list, min(workers, len(clips))) as items:
        for done, (item,) in enumerate(items, 1):
            if isinstance(item, DataError):
                bad.append((clips[done - 1].path, f"bad: {item}"))
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                rate = done / (told - began)
                left = datetime.timedelta(seconds=round((len(clips) - done) / rate))
                print(f"      {done}/{len(clips)} videos, {rate:.1f}/s, {left} left", file=sys.stderr)
    return bad


def show(problems):
    for line in ten([line for _, line in problems]):
        print(f"      {escaped(line)}")


def check(args):
    """What of a data set is there. -> 0, or 1 where something is missing or bad."""
    if args.list:  # replaces nothing but such a list
        plain = os.path.isfile(args.list) and not os.path.islink(args.list)
        ours = plain and open(args.list, "rb").read(len(LIST)) == LIST.encode()
        folder = os.path.dirname(os.path.abspath(args.list))
        if os.path.lexists(args.list) and not ours or not os.access(folder, os.W_OK):
            raise DataError(f"--list {args.list} can't be written: name a new file, or such a list, in your folder")
    frames = args.frames or (6 if args.data == "shapes" else 12)
    cache = FrameCache(args.cache, frames) if args.cache else None
    whole = args.data.endswith(".csv") and not has_splits(args.data)
    problems = []  # (video, what is the matter)
    for split in ["all"] if whole else [s for s in SPLITS if s != "val" or args.data not in NO_VAL]:
        try:
            ann = load_annotations(args.data, args.root, split, args.videos)
        except DataError as e:
            if args.data not in READERS:
                raise
            problems.append(("", f"{split}: {e}"))
            print(escaped(f"{split:5s} {e}"))
            continue
        found = present(ann, skip_bad=True)[0].clips
        there = set(found)
        gone = [(c.path, f"missing {c.path} ({line})") for c, line in zip(ann.clips, ann.where) if c not in there]
        counts = [f"{len(ann.captions)} texts", f"{len(ann.clips)} videos"]
        for k, n in enumerate(PUBLISHED.get(args.data, {}).get(split, ())):
            counts[k] += f" (published {n})" if n else ""
        print(f"{split:5s} {', '.join(counts)}, {len(gone)} of them missing")
        show(gone)
        bad = []
        if args.decode:
            bad = decode_all(found, frames, cache, args.workers)
            print(f"      {len(found) - len(bad)} decode, {len(bad)} don't")
            show(bad)
        problems += gone + bad
    if args.list:
        with written_whole(args.list) as part, open(part, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(LIST)
            csv.writer(file, lineterminator="\n").writerows(problems)
    return 1 if problems else 0


def main(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="what of a data set is there, what is missing, and where it belongs")
    c.add_argument("--data", required=True, help=f"{', '.join(READERS)}, shapes, or a .csv")
    c.add_argument("--root", help="folder of the data set (default: data/NAME)")
    c.add_argument("--videos", metavar="DIR", help="folder of the videos, where it is another one (default: --root)")
    c.add_argument("--decode", action="store_true", help="read every video, and tell which can't be read")
    c.add_argument("--cache", metavar="DIR", help="with --decode: keep the frames there, for --cache of the others")
    c.add_argument("--frames", type=numeric(int, 1, 1000), metavar="T",
                   help="with --cache: frames per video, as in training (default: 12; shapes: 6)")
    c.add_argument("--list", metavar="FILE", help="write all missing and bad videos there (csv); ten of each are shown")
    c.add_argument("--workers", type=numeric(int, 0), default=os.cpu_count() or 1,
                   help="processes that decode (default: %(default)s)")
    args = p.parse_args(argv)
    if (args.cache or args.frames) and not args.decode:
        c.error("--cache and --frames go with --decode")
    return check(args)


if __name__ == "__main__":
    sys.exit(program(main, OSError))  # of --list
