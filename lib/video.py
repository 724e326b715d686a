"""Frames of a video file: which are taken, how they are decoded exactly, and a cache of them.

A video opens no file but itself. Every error is a DataError that names the file.
"""
import bisect
import contextlib
import hashlib
import itertools
import json
import os
import struct
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import av
import torch
from av.sidedata.sidedata import SideDataContainer
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms import v2

from lib.common import DataError, written_whole

# of films, cameras, discs and the web
SUFFIXES = tuple((
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .3gp .ogv .mts .m2ts .m2t .vob .3g2 "
    ".asf .f4v .mxf .dv .divx .ogm .m2v .mpe .gif"
).split())


class Segment(NamedTuple):
    """A video file, or the seconds [start, end) of one. None: from its beginning, or to its end."""
    path: str
    start: float | None = None
    end: float | None = None


class Piece(NamedTuple):
    """T decoded frames of the seconds [start, end) of a file: their times, and uint8 (T,3,H,W)."""
    start: float
    end: float
    times: list
    frames: torch.Tensor


def spelled(path):
    """A path as the disk spells it, where é is one character or two; a missing one as it is."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    if path.isascii() or not name or os.path.exists(path):
        return path
    folder = spelled(folder)
    for form in ("NFC", "NFD"):
        other = os.path.join(folder, unicodedata.normalize(form, name))
        if os.path.exists(other):
            return other
    return path


def as_segment(segment_or_path):
    """A Segment as it is; a path as the Segment that is the whole file."""
    if isinstance(segment_or_path, Segment):
        return segment_or_path
    return Segment(os.fspath(segment_or_path))


def read_frames(segment_or_path, frames):
    """T frames, taken evenly, of a Segment or a file. -> uint8 (T,3,H,W), upright.

    Raises DataError, which names the file.
    """
    return read_segment(as_segment(segment_or_path), frames).frames


def read_segment(segment, frames):
    """The Piece of T frames that a Segment is. Seconds are those that a player shows."""
    [piece] = _read(segment.path, frames, lambda times: [_range_of(segment, times)])
    return piece


def read_pieces(path, frames, window=0):
    """The Pieces of about `window` seconds that a file is cut into, in order. -> iterator

    A file shorter than 1.5 windows is one Piece, and so is any file with window 0. The file is
    opened, and its table of packets read, once for all of them.
    """
    return _read(path, frames, lambda times: _cut(times, window))


# ---- which frames ----
# A range (a, b) stands for the frames a, ..., b - 1. Times are in seconds as a player shows them,
# sorted, one for each frame of the file.


def sample_indices(n, frames):
    """The T of n frames that are taken: the middle of each of T equal intervals.

    If there are fewer than T, all of them, and then the last one again.
    """
    k = min(n, frames)
    middles = [(n * i // k + n * (i + 1) // k - 1) // 2 for i in range(k)]
    return middles + [n - 1] * (frames - k)


def _chosen(a, b, T):
    """The numbers of the T frames that are taken of a range."""
    return [a + i for i in sample_indices(b - a, T)]


def _range_of(segment, times):
    """The range that begins in a segment; if none does, the frame that is on the screen then."""
    start = segment.start or 0
    a = bisect.bisect_left(times, start - 1e-6)
    b = len(times)
    if segment.end is not None:
        b = bisect.bisect_left(times, segment.end - 1e-6)
    if a == len(times) and start + 1e-6 > _end(times):
        raise DataError(f"video {segment.path} ends after {times[-1]:.1f} s, before the clip's "
                        f"start at {start} s")
    if a >= b:
        a = max(0, bisect.bisect_right(times, start + 1e-6) - 1)
    return a, max(b, a + 1)


def _end(times):
    """When the last frame ends: it stays as long as the others do on average."""
    return times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1)


def _cut(times, window):
    """The ranges of equal parts of about `window` seconds; the whole if it is not much longer."""
    start = times[0]
    length = _end(times) - start
    n = 1
    if window and length > 1.5 * window:
        n = round(min(len(times), length / window))
    bounds = [bisect.bisect_left(times, start + length * k / n - 1e-6) for k in range(n)]
    bounds.append(len(times))
    # a part is empty where a single frame lasts longer
    return [(a, b) for a, b in zip(bounds, bounds[1:]) if a < b]


def _seconds(times, origin, rate=25):
    """Seconds as a player shows them, sorted, from those of frames in order, None where unknown.

    origin: when the file starts, be it with sound, in microseconds or None. Where recordings were
    joined, times start anew: they go on where the last one ended. rate: frames per second, for
    times that are unknown.
    """
    step = float(1 / rate)
    earlier = max(1, 4 * step)  # frames may be out of order by a few
    shift = 0
    starts = (time - k * step for k, time in enumerate(times) if time is not None)
    last = next(starts, 0) - step
    seconds = []
    for time in times:
        if time is None:
            time = last + step - shift
        # of a clock that wraps after 26 hours, ten hours later is earlier too
        elif not -earlier < time + shift - last < 36_000:
            shift = last + step - time
        seconds.append(time + shift)
        last = max(last, seconds[-1])
    seconds.sort()
    start = seconds[0]
    if origin is not None and origin / av.time_base < start - 1e-5:  # more than it is rounded
        start = origin / av.time_base
    return [time - start for time in seconds]


# ---- decoding ----


def _read(path, T, cut):
    """Yield a Piece for each range that `cut` makes of the times of all frames.

    mp4/mov and matroska/webm tell every frame's time without decoding: `_seek_frames`. Any other
    file, and what is left of one where that fails, is decoded from the start: `_count_frames`.
    """
    if not os.path.exists(path):
        raise DataError(f"video {path} is missing")
    if os.path.getsize(path) == 0:
        raise DataError(f"video {path} is empty (0 bytes)")
    done = 0
    try:
        file, stream = _open(path)
        with file:
            pieces = None
            # palettes come with the first packet that is read, and never again
            if file.format.name in SEEKABLE and stream.pix_fmt != "pal8":
                pieces = _seek_frames(file, stream, T, cut)
            for piece in pieces or [None]:
                if piece is None:
                    break
                yield piece
                done += 1
            else:
                return
        yield from itertools.islice(_count_frames(path, T, cut), done, None)
    except (MemoryError, RuntimeError) as e:  # the second is torch's word for it
        raise DataError(f"video {path} needs more memory than there is") from e
    except av.FFmpegError as e:
        _check_disk(path)
        raise DataError(f"video {path} can't be decoded: {e.strerror or e}") from e


# Containers of moving pictures that open no file but their own: no playlists, lists of files or
# numbered pictures.
DEMUXERS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,live_flv,ogg,"
            "rm,mxf,gxf,nut,nuv,nsv,dv,wtv,ivf,obu,h261,h263,h264,hevc,vvc,vc1,m4v,mjpeg,"
            "cavsvideo,dirac,dnxhd,swf,gif,apng,yuv4mpegpipe")
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
AREA = 2 ** 19  # pixels of a frame: more than encoders look at, and 1.5 MB where they come from 8K
# Titles of old files are not always UTF-8. PyAV reads them by itself from version 19 on; before, it
# has to be asked to.
ANY_TITLE = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


def _open(path):
    """-> (open file, its best stream of moving pictures)."""
    only = dict(protocol_whitelist="file", format_whitelist=DEMUXERS)
    try:  # absolute, or "12:30.mp4" would be a protocol named 12
        file = av.open(os.path.abspath(path), options=only, **ANY_TITLE)
    except av.ArgumentError:  # FFmpeg's word for a format that is not in the list
        _check_disk(path)
        raise DataError(f"{path} is not a video, or cut off (playlists and lists of files are not "
                        "followed)") from None
    best = file.streams.best("video")
    streams = [
        stream for stream in file.streams.video
        if stream.codec_context
        and not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        file.close()
        raise DataError(f"{path} is not a video, is cut off, or has no video stream that can be "
                        "decoded")
    # a single frame is a preview, though it be marked as the best
    stream = max(streams, key=lambda stream: (stream.frames != 1, stream is best))
    # frame threads cost workers more than they give
    stream.codec_context.thread_type = "NONE"
    return file, stream


@contextlib.contextmanager
def _damage_allowed():
    """What is damaged costs itself only. Want of memory is no damage."""
    try:
        yield
    except MemoryError:
        raise
    except av.FFmpegError:
        pass


def _packets(file, stream):
    """The packets as far as the file goes: where it is damaged, what came before still counts."""
    position = 0
    with _damage_allowed():
        for packet in file.demux(stream):
            position = packet.pos or position
            yield packet
    _check_disk(file.name, position)


def _check_disk(path, position=0):
    """Raise DataError where the system can't read on: FFmpeg calls that the end, or damage."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            while file.read(2 ** 20):
                pass
    except OSError as e:
        raise DataError(f"video {path} can't be read: {e.strerror}") from e


def _seek_frames(file, stream, T, cut):
    """The fast way of _read: seek to the keyframe before each frame that is taken.

    Yields Pieces, and None where it does not apply or a frame is not found.
    """
    shown = []  # when frames are shown, in the stream's unit of time
    keys = []
    for packet in _packets(file, stream):
        if packet.size and not packet.is_discard:
            shown.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    # joined: times start anew, and so do those of keyframes
    if not shown or None in shown or len(set(shown)) < len(shown) or keys != sorted(keys):
        yield None
        return
    shown.sort()
    times = _seconds([float(pts * stream.time_base) for pts in shown], file.start_time)
    ranges = [(a, b, _chosen(a, b, T)) for a, b in cut(times)]
    wanted = {shown[i]: i for _, _, chosen in ranges for i in chosen}
    found = {}
    last_key = packets = None
    for a, b, chosen in ranges:
        for i in chosen:
            if i in found:
                continue
            key = shown[0]
            if keys:
                key = keys[max(0, bisect.bisect_right(keys, shown[i]) - 1)]
            if key != last_key:  # else decoding goes on where it is
                file.seek(key, stream=stream)
                packets = _packets(file, stream)
                last_key = key
            _decode_until(i, packets, stream, wanted, found)
            if i not in found:
                yield None
                return
        yield _piece(file.name, times, a, b, chosen, found)
        found = {i: pixels for i, pixels in found.items() if i >= b}


def _decode_until(i, packets, stream, wanted, found):
    """Add to `found` {number: pixels} all frames `wanted` {pts: number}, until frame i is found.

    Packets that are not wanted are decoded only if other frames refer to them.
    """
    for packet in packets:
        needed = packet.pts in wanted or not packet.size  # an empty one gives the last frames
        stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        with _damage_allowed():
            for frame in packet.decode():
                if frame.pts in wanted:
                    found[wanted[frame.pts]] = _pixels(frame, stream)
        if max(found, default=-1) >= i:  # frames come in order: i will not come after a later one
            return


def _count_frames(path, T, cut):
    """The exact way of _read for any file: decode from the start, and count. Yields Pieces.

    The times of the frames need one pass over the file, their pixels another. A single Piece mostly
    needs but one: the packets nearly always tell the times of the frames, so that those to be taken
    are known before.
    """
    file, stream = _open(path)
    with file:
        # avi tells when frames are decoded, a few before they are shown
        start = None if file.format.name == "avi" else file.start_time
        rate = stream.codec_context.framerate
        # the guess looks at times, of which few may be known
        if not rate or start is None:
            rate = stream.guessed_rate or 25
        stamps = []
        for packet in _packets(file, stream):
            if packet.size:
                stamps.append(packet.pts and float(packet.pts * stream.time_base))  # None stays
    expected = []
    with contextlib.suppress(DataError):  # a start after the end: the true times will tell
        ranges = cut(_seconds(stamps, start, rate)) if stamps else []
        if len(ranges) == 1:
            expected = _chosen(*ranges[0], T)
    times = []
    found = {}
    for k, (frame, stream) in enumerate(_decode(path)):
        times.append(frame.time)
        if k in expected:
            found[k] = _pixels(frame, stream)
    if not times:
        raise DataError(f"video {path} has no frame that can be decoded")
    times = _seconds(times, start, rate)
    again = enumerate(_decode(path))
    for a, b in cut(times):
        chosen = _chosen(a, b, T)
        if any(i not in found for i in chosen):
            found = {}
            for k, (frame, stream) in again:
                if k in chosen:
                    found[k] = _pixels(frame, stream)
                if k >= chosen[-1]:
                    break
        yield _piece(path, times, a, b, chosen, found)


def _decode(path):
    """Every frame of a file, in order, and its stream; a damaged packet costs its frames only."""
    file, stream = _open(path)
    with file:
        for packet in _packets(file, stream):
            with _damage_allowed():
                for frame in packet.decode():
                    yield frame, stream


def _pixels(frame, stream):
    """A decoded frame -> uint8 (3,H,W): upright, of square pixels, AREA of them at most."""
    ratio = float(stream.sample_aspect_ratio or 1)  # of a pixel's width to its height
    scale = min(1, (AREA / (frame.width * frame.height * ratio)) ** 0.5)
    W = max(1, round(frame.width * ratio * scale))
    H = max(1, round(frame.height * scale))
    # of a longer strip, encoders look at a small part of what it would be resized to
    W = min(W, 99 * H)
    H = min(H, 99 * W)
    # PyAV 19 keeps the threads of a conversion: in a process forked later they are missing, and it
    # waits for them.
    plane = frame.reformat(W, H, format="rgb24", threads=1).planes[0]
    x = torch.frombuffer(bytearray(plane), dtype=torch.uint8)
    x = x.view(H, plane.line_size)[:, :W * 3].reshape(H, W, 3)  # lines are padded
    # frame.side_data would keep every frame for ever, in PyAV before 19
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = struct.unpack_from("5i", matrix)
        if abs(b) + abs(c) > abs(a) + abs(d):
            x = x.transpose(0, 1)
            a = c
            d = b
        if d < 0:
            x = x.flip(0)
        if a < 0:
            x = x.flip(1)
    if frame.color_trc in (PQ, HLG):
        x = _from_hdr(x, frame.color_trc)
    return x.permute(2, 0, 1).contiguous()


PQ = 16  # as FFmpeg numbers transfer curves
HLG = 18


def _from_hdr(x, curve):
    """HDR uint8 (H,W,3) -> the colours of ordinary video, where white is 203 nits. ITU-R BT.2100"""
    code = torch.arange(256) / 255
    if curve == PQ:
        power = code ** (32 / 2523)
        light = (power - 0.8359375).clamp(0) / (18.8515625 - 18.6875 * power)
        light = light ** (16384 / 2610) * 10_000
    else:
        bright = ((code - 0.55991073) / 0.17883277).exp() + 0.28466892
        light = torch.where(code > 0.5, bright, 4 * code ** 2) / 12
        light = light ** 1.2 * 1000  # on a screen of 1000 nits
    to_bt709 = torch.tensor([  # red, green and blue of BT.2020, a row each
        [1.6605, -0.1246, -0.0182],
        [-0.5876, 1.1329, -0.1006],
        [-0.0728, -0.0083, 1.1187],
    ])
    light = light[x.int()] / 203 @ to_bt709
    return (light.clamp(0, 1) ** (1 / 2.2) * 255).round().to(torch.uint8)


def _piece(path, times, a, b, chosen, found):
    """The Piece of a range from the frames chosen, as far as they were found {number: (3,H,W)}."""
    frames = [found.get(i) for i in chosen]
    if not found.keys() & chosen:
        raise DataError(f"video {path} has no frame that can be decoded")
    end = times[b] if b < len(times) else _end(times)
    return Piece(times[a], end, [times[i] for i in chosen], torch.stack(_fill(frames)))


def _fill(frames):
    """A frame that is None becomes the one before, or the first there is, whose size all get."""
    last = next(x for x in frames if x is not None)
    size = last.shape[1:]
    filled = []
    for x in frames:
        if x is not None:
            last = v2.functional.resize(x, size, antialias=True)
        filled.append(last)
    return filled


# ---- cache ----

EDITION = 3  # of what is decoded: one more where pixels or times change, and files are made again


class FrameCache:
    """The T frames of each Segment in a file, as JPEG (quality 95, short side at most 256).

    A file counts only while the video's size, time of change, T and span are what they were. Any
    number of processes may share a folder. Where it can't be written, videos are decoded each time,
    after one warning. Frames pass through JPEG the first time too, so that a run sees the same
    pixels whatever the cache held before.
    """

    def __init__(self, folder, frames):
        self.folder = Path(folder)
        self.frames = frames
        self.warned = torch.zeros(1).share_memory_()  # one warning from all workers
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            self._warn(e)

    def read(self, segment):
        """Its frames, from the cache or decoded into it. -> uint8 (T,3,H,W); raises DataError."""
        path = os.path.abspath(segment.path)
        try:
            stat = os.stat(path)
        except OSError:
            return read_frames(segment, self.frames)  # says what is wrong
        span = [self.frames, *segment[1:]]
        key = [EDITION, path, stat.st_size, stat.st_mtime_ns, *span]
        name = hashlib.sha1(json.dumps([path, *span]).encode()).hexdigest()
        file = self.folder / f"{name}.jpegs"
        try:
            return self._load(file, key)
        except (OSError, ValueError, TypeError, RuntimeError):
            pass  # absent, damaged, or of a video that has changed
        frames = read_frames(segment, self.frames)
        if min(frames.shape[-2:]) > 256:
            frames = v2.functional.resize(frames, 256, antialias=True)
        jpegs = encode_jpeg(list(frames), quality=95)
        try:
            self._save(file, key, jpegs)
        except OSError as e:
            self._warn(e)
        return torch.stack(decode_jpeg(jpegs, ImageReadMode.RGB))

    def _save(self, file, key, jpegs):
        """A line of JSON, then the pictures one after the other."""
        sizes = [*map(len, jpegs)]
        body = torch.cat(jpegs).numpy().tobytes()
        head = json.dumps([key, sizes, zlib.crc32(body)])
        with written_whole(file, flush=False) as part:  # a damaged file is made again
            Path(part).write_bytes(head.encode() + b"\n" + body)

    def _load(self, file, key):
        """What _save wrote with this key. -> uint8 (T,3,H,W), or ValueError if it is another."""
        head, body = file.read_bytes().split(b"\n", 1)
        saved, sizes, crc = json.loads(head)
        if saved != key or zlib.crc32(body) != crc:
            raise ValueError  # another video or span, or damaged
        jpegs = torch.frombuffer(bytearray(body), dtype=torch.uint8).split(sizes)
        return torch.stack(decode_jpeg(list(jpegs), ImageReadMode.RGB))

    def _warn(self, error):
        if not self.warned:
            self.warned.fill_(1)
            why = error.strerror or error
            if isinstance(error, FileExistsError):
                why = "that is a file"
            print(f"warning: frame cache {self.folder} can't be written ({why}): videos are "
                  "decoded each time", file=sys.stderr)
