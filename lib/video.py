"""Frames of a video file: which ones, decoding them exactly, whole or by pieces, and a cache of them.

In this order: Segment and sample_indices, read_frames and read_pieces, the fast way (seek) and the exact way (count),
FrameCache. A video opens no file but itself. All errors are DataErrors that name the file.
"""
import bisect
import contextlib
import hashlib
import itertools
import json
import os
import sys
import zlib
from pathlib import Path
from typing import NamedTuple, Optional

import av
import torch
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms import v2

from lib.common import DataError, written_whole


class Segment(NamedTuple):
    """A video file, or the seconds [start, end) of one; None means from the beginning or to the end."""
    path: str
    start: Optional[float] = None
    end: Optional[float] = None


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


# Titles of old files are not always UTF-8. From version 19 on PyAV reads them by itself; before, it has to be asked to.
ANY_TITLE = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


def _open(path):
    """-> (open file, its first stream of moving pictures)."""
    only = dict(protocol_whitelist="file", format_whitelist=DEMUXERS)
    try:  # absolute, or "12:30.mp4" would be a protocol named 12
        file = av.open(os.path.abspath(path), options=only, **ANY_TITLE)
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
    # PyAV 19 keeps the threads of a conversion: in a process forked later they are missing, and it waits for them.
    plane = frame.reformat(format="rgb24", threads=1).planes[0]  # its lines are padded
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


# ---- cache ----

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
            with written_whole(file, flush=False) as part:  # a damaged file is made again
                Path(part).write_bytes(json.dumps([key, sizes, zlib.crc32(body)]).encode() + b"\n" + body)
        except OSError as e:
            self._warn(e)
        return self._decode(body, sizes)
