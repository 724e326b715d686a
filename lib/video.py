"""Frames of a video file: which ones are sampled, how they are decoded exactly, and a cache.

Reading a video never opens another file. Every error is a DataError that names the file.
"""
import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import av
import torch
from av.sidedata.sidedata import SideDataContainer
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms import v2

from lib.common import DataError, written_whole

# Files of films, cameras, discs and the web.
SUFFIXES = tuple((
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .3gp .ogv .mts .m2ts .m2t .vob .3g2 "
    ".asf .f4v .mxf .dv .divx .ogm .m2v .mpe .gif"
).split())


class Segment(NamedTuple):
    """A video file, or the seconds [start, end) of one. None: from its beginning, to its end."""
    path: str
    start: float | None = None
    end: float | None = None


class Piece(NamedTuple):
    """T decoded frames of the seconds [start, end) of a file: their times and uint8 (T,3,H,W)."""
    start: float
    end: float
    times: list
    frames: torch.Tensor


def as_segments(segments_or_paths):
    """A list of Segments, or of paths of whole files -> list of Segment. One alone: TypeError."""
    if isinstance(segments_or_paths, (Segment, str, bytes, os.PathLike)):
        raise TypeError(f"expected a list of paths or Segments, not {segments_or_paths!r}")
    return [x if isinstance(x, Segment) else Segment(os.fspath(x)) for x in segments_or_paths]


def read_frames(segment_or_path, frames):
    """T evenly spaced frames of a Segment or a file. -> uint8 (T,3,H,W), upright

    Raises a DataError that names the file.
    """
    [segment] = as_segments([segment_or_path])
    return read_segment(segment, frames).frames


def read_segment(segment, frames):
    """Read a Segment as one Piece of T frames. Times are in seconds, as a player shows them.

    Of mp4/mov, matroska/webm, avi and MPEG-TS, only the segment and a little around it is read. The
    Piece is that of reading the whole file, with one exception: in an MPEG-TS that was joined from
    recordings whose time stamps start anew, this is noticed only if they fall back by more than a
    sixteenth of the file; otherwise, a segment is where its time stamps are.
    """
    [piece] = _read(segment.path, frames, lambda times: [_range_of(segment, times)], segment)
    return piece


def read_pieces(path, frames, window=0):
    """Cut a file into Pieces of about `window` seconds. -> iterator, in order

    A file of at most 1.5 windows is one Piece, and so is any file if window is 0. An mp4/mov or
    matroska/webm file is opened, and its packet table read, only once.
    """
    return _read(path, frames, lambda times: _cut(times, window))


def start_time(path):
    """The time stamp, in seconds, that a file begins with: what times count from. 0.0 if unknown.

    Only the header is read. Raises a DataError that names the file.
    """
    with _explained(path), _open(path) as (file, stream):
        return _file_start(file) or 0.0


# ---- which frames ----
# A range (a, b) means frames a, ..., b - 1. `times` holds one time for each frame of the file, in
# seconds as a player shows them, sorted.


def sample_indices(n, frames):
    """Which T of n frames are sampled: the middle of each of T equal intervals. -> list

    If n < T, all frames are taken, and the last one is repeated.
    """
    k = min(n, frames)
    starts = [n * i // k for i in range(k + 1)]
    middles = [(start + end - 1) // 2 for start, end in zip(starts, starts[1:])]
    return middles + [n - 1] * (frames - k)


def _chosen(a, b, T):
    """The numbers of the T frames that are sampled from a range."""
    return [a + i for i in sample_indices(b - a, T)]


def _range_of(segment, times):
    """The range that begins within a segment; if none does, the frame that is shown then."""
    start = segment.start or 0
    a = bisect.bisect_left(times, start - 1e-6)
    b = len(times)
    if segment.end is not None:
        b = bisect.bisect_left(times, segment.end - 1e-6)
    if a == len(times) and start + 1e-6 > _end(times):
        raise DataError(f"{segment.path}: ends after {times[-1]:.1f} s, before the clip's "
                        f"start at {start} s")
    if a >= b:
        a = max(0, bisect.bisect_right(times, start + 1e-6) - 1)
    return a, max(b, a + 1)


def _end(times):
    """When the last frame ends, if it lasts as long as the one before it."""
    return 2 * times[-1] - times[-2:][0]


def _cut(times, window):
    """Ranges of equal parts of about `window` seconds; a single one if times last little longer."""
    start = times[0]
    length = _end(times) - start
    n = 1
    if window and length > 1.5 * window:
        n = round(min(len(times), length / window))
    bounds = [bisect.bisect_left(times, start + length * k / n - 1e-6) for k in range(n)]
    bounds.append(len(times))
    # A part is empty where a single frame lasts longer than it.
    return [(a, b) for a, b in zip(bounds, bounds[1:]) if a < b]


def _seconds(times, start, rate):
    """Convert time stamps of frames to seconds as a player shows them, sorted.

    times: in seconds, in file order; None where unknown. start: of the file, which may be that of
    its sound, or None. rate: frames per second, for unknown times. Where recordings were joined,
    time stamps start anew; here, they continue where the last one ended.
    """
    step = float(1 / rate)
    earlier = max(1, 4 * step)  # frames may be out of order by a few
    later = 36_000  # when a clock wraps after 26 hours, this is in fact earlier
    shift = 0
    known = [k for k, time in enumerate(times) if time is not None]
    last = -step  # as if a frame came just before the first one
    if known:
        last += times[known[0]] - known[0] * step
    seconds = []
    for time in times:
        if time is None:
            time = last + step - shift
        elif not -earlier < time + shift - last < later:
            shift = last + step - time
        seconds.append(time + shift)
        last = max(last, seconds[-1])
    origin = _origin(min(seconds), start)
    return sorted(time - origin for time in seconds)


def _file_start(file):
    """The time stamp, in seconds, that a file begins with; None if unknown."""
    # avi stores when frames are decoded, which is a few frames before they are shown.
    if file.format.name == "avi" or file.start_time is None:
        return None
    return file.start_time / av.time_base


def _origin(first, start):
    """What times count from: the first frame or, if that is earlier, the start of the sound."""
    if start is not None and start < first - 1e-5:  # more than rounding
        return start
    return first


# ---- decoding ----

# Video formats that never open another file: no playlists, no lists of files, no numbered pictures.
DEMUXERS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,live_flv,ogg,"
            "rm,mxf,gxf,nut,nuv,nsv,dv,wtv,ivf,obu,h261,h263,h264,hevc,vvc,vc1,m4v,mjpeg,"
            "cavsvideo,dirac,dnxhd,swf,gif,apng,yuv4mpegpipe")
MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
MATROSKA = "matroska,webm"
OPTIONS = dict(protocol_whitelist="file", format_whitelist=DEMUXERS)
AREA = 2 ** 19  # pixels per frame at most: more than encoders use, and 1.5 MB even from 8K video
CANVAS = 2 ** 26  # pixels per frame of the file at most: decoders take memory before they decode
REORDERED = 32  # packets at most between one and another that is shown earlier: 16 frames, 2 fields
# Titles in old files are not always UTF-8. From version 19 on, PyAV accepts them by default;
# earlier ones need an option.
ANY_TITLE = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}


class _Unseekable(Exception):
    """The packets of a file don't tell where its frames are."""


class _Disk(io.FileIO):
    """A file whose first error of reading is raised by PyAV; others would only be printed."""
    failed = False

    def seek(self, *place):
        with contextlib.suppress(OSError):  # damaged files may refer to places that can't be
            return super().seek(*place)
        return -1

    def read(self, size):
        if self.failed:
            return b""
        try:
            return super().read(size)
        except OSError:
            self.failed = True
            raise


@contextlib.contextmanager
def _open(path):
    """Open a file. -> (file, its best video stream)"""
    with _Disk(path) as disk, av.open(disk, options=OPTIONS, **ANY_TITLE) as file:
        best = file.streams.best("video")
        streams = []
        for stream in file.streams.video:
            cover = stream.disposition & av.stream.Disposition.attached_pic
            if stream.codec_context and not cover:
                streams.append(stream)
        if not streams:
            raise DataError(f"{path}: not a video, or cut off: no video stream that can be decoded")
        # A stream of a single frame is a preview, even if it is marked as the best.
        stream = max(streams, key=lambda stream: (stream.frames != 1, stream is best))
        if stream.width * stream.height > CANVAS:
            raise DataError(f"{path}: its frames are too large: {stream.width} x {stream.height}")
        # Decoding threads cost workers more than they gain.
        stream.codec_context.thread_type = "NONE"
        yield file, stream


@contextlib.contextmanager
def _explained(path):
    """Turn errors of reading a video into a DataError that names it."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:  # torch raises the second
        raise DataError(f"{path}: needs more memory than there is") from e
    except av.FFmpegError as e:
        raise DataError(f"{path}: can't be decoded ({e.strerror}): not a video, or cut off; "
                        "playlists and lists of files are not followed") from e
    except FileNotFoundError as e:
        raise DataError(f"{path}: is missing") from e
    except OSError as e:
        raise DataError(f"{path}: can't be read: {e.strerror}") from e


def _read(path, T, cut, segment=None):
    """Yield a Piece for each range that cut(times of the frames) returns.

    mp4/mov and matroska/webm tell every frame's time without decoding, and some more formats where
    to find a segment: `_seek_frames`. Any other file, and the rest of a file where this fails, is
    decoded from the start: `_count_frames`.
    """
    ways = [_seek_frames(path, T, cut), _count_frames(path, T, cut)]
    if segment and segment[1:] != (None, None):
        ways.insert(0, _seek_frames(path, T, cut, segment))
    done = 0
    with _explained(path):
        for pieces in ways:
            with contextlib.suppress(_Unseekable):
                for piece in itertools.islice(pieces, done, None):
                    yield piece
                    done += 1
                return


@contextlib.contextmanager
def _damage_allowed():
    """Skip damaged parts of a file. Lack of memory is not damage."""
    try:
        yield
    except MemoryError:
        raise
    except av.FFmpegError:
        pass


def _packets(file, stream):
    """Yield the packets up to the end or to damage."""
    with _damage_allowed():
        yield from file.demux(stream)


def _decode(file, stream):
    """Yield every frame, in order. Damaged packets are skipped."""
    for packet in _packets(file, stream):
        with _damage_allowed():
            yield from packet.decode()


def _listed(file, stream, begin=None, end=math.inf):
    """The time stamps of frames and of keyframes, as the packets tell them, sorted.

    begin: time stamp to seek to. end: time stamp, in seconds, that ends the list.
    """
    if begin is not None:
        file.seek(begin, stream=stream)
    shown = []
    keys = []
    late = 0
    for packet in _packets(file, stream):
        if packet.is_keyframe and not packet.is_discard:
            keys.append(packet.pts)
        if packet.size and not packet.is_discard and (keys or begin is None):
            shown.append(packet.pts)
            late += packet.pts is not None and packet.pts * stream.time_base > end
        if late > REORDERED:
            break
    # In joined recordings, time stamps start anew, also those of keyframes.
    if not keys or None in shown or len(set(shown)) < len(shown) or keys != sorted(keys):
        raise _Unseekable
    return sorted(shown), keys


def _listed_near(file, stream, segment):
    """What `_listed` returns for the part of a file that a segment needs, and the file's origin."""
    name = file.format.name
    # In avi, packets of H.264 and later codecs don't tell when they are shown.
    mixed = name == "avi" and stream.codec.name in ("h264", "hevc", "vvc")
    first = next(_decode(file, stream), None)
    if name not in (MP4, MATROSKA, "avi", "mpegts") or mixed or not first or first.time is None:
        raise _Unseekable
    origin = _origin(first.time, _file_start(file))
    start = max(first.time, origin + (segment.start or 0))
    end = math.inf if segment.end is None else origin + segment.end
    latest = _latest(file, stream)
    for earlier in (1, 10, 100):
        begin = round(max(0, start - earlier) / stream.time_base)
        shown, keys = _listed(file, stream, min(begin, latest), end)
        # Of the frames before a keyframe, none is shown after it.
        if keys[0] * stream.time_base - 1e-6 <= start <= shown[-1] * stream.time_base:
            return shown[bisect.bisect_left(shown, keys[0]):], keys, origin
    raise _Unseekable


def _latest(file, stream):
    """The latest time stamp that may be seeked to. Raises _Unseekable where recordings are joined.

    Matroska/webm is read to its end for later ones, and MPEG-TS has no table to tell what it holds.
    """
    if file.format.name == MATROSKA:
        file.seek(0, stream=stream)  # reads the table of keyframes
        if len(stream.index_entries) > 1:
            return stream.index_entries[-2].timestamp
    if file.format.name == "mpegts":
        stamps = []
        for k in range(16):
            file.seek(file.size * k // 16, unsupported_byte_offset=True)
            known = (packet.dts for packet in file.demux(stream) if packet.dts is not None)
            stamps += itertools.islice(known, 1)
        if stamps != sorted(stamps):
            raise _Unseekable
    return math.inf


def _seek_frames(path, T, cut, segment=None):
    """The fast way of `_read`: seek to the keyframe before each frame that is wanted -> Pieces.

    Raises _Unseekable if this way does not apply or a frame is not found.
    """
    with _open(path) as (file, stream):
        pixels = stream.codec_context.format
        # A palette comes with the first packet that is read, and never again.
        if pixels is not None and pixels.has_palette:
            raise _Unseekable
        if segment:
            shown, keys, origin = _listed_near(file, stream, segment)
        elif file.format.name in (MP4, MATROSKA):
            shown, keys = _listed(file, stream)
            origin = _origin(float(shown[0] * stream.time_base), _file_start(file))
        else:
            raise _Unseekable
        times = [float(pts * stream.time_base) - origin for pts in shown]
        ranges = [(a, b, _chosen(a, b, T)) for a, b in cut(times)]
        wanted = {shown[i]: i for _, _, chosen in ranges for i in chosen}
        found = {}
        # MPEG-TS is searched for when packets are decoded.
        early = round(1 / stream.time_base) if file.format.name == "mpegts" else 0
        last_key = packets = None
        for a, b, chosen in ranges:
            for i in chosen:
                if i in found:
                    continue
                before = bisect.bisect_right(keys, shown[i]) - 1
                key = keys[max(0, before)]
                if key != last_key:  # otherwise, decoding continues from here
                    file.seek(key - early, stream=stream)
                    packets = itertools.dropwhile(lambda p: p.pts != key, _packets(file, stream))
                    last_key = key
                _decode_until(i, packets, stream, wanted, found)
                if i not in found:
                    raise _Unseekable
            yield _piece(path, times, a, b, chosen, found)
            found = {i: pixels for i, pixels in found.items() if i >= b}


def _decode_until(i, packets, stream, wanted, found):
    """Decode until frame i. wanted: {pts: number}. Adds these frames to found: {number: pixels}.

    A packet that is not wanted is decoded only if other frames refer to it.
    """
    for packet in packets:
        needed = packet.pts in wanted or not packet.size  # an empty one flushes the last frames
        stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        with _damage_allowed():
            for frame in packet.decode():
                if frame.pts in wanted:
                    found[wanted[frame.pts]] = _pixels(frame, stream)
        if max(found, default=-1) >= i:  # in order: i is found or missing
            return


def _count_frames(path, T, cut):
    """The way of `_read` that is exact for any file: decode from the start and count -> Pieces.

    One pass over the file finds the times of all frames, and another their pixels. A single Piece
    usually needs only the first: the time stamps of the packets nearly always tell in advance which
    frames to keep.
    """
    with _open(path) as (file, stream):
        start = _file_start(file)
        # FFmpeg's guess is made from time stamps where there are any, be it only a few.
        rate = start is not None and stream.codec_context.framerate
        rate = rate or stream.guessed_rate or 25
        stamps = []
        for packet in _packets(file, stream):
            if packet.size:
                stamps.append(packet.pts and float(packet.pts * stream.time_base))
    expected = []
    with contextlib.suppress(DataError):  # starts after the end: wait for the true times
        ranges = cut(_seconds(stamps, start, rate)) if stamps else []
        if len(ranges) == 1:
            expected = _chosen(*ranges[0], T)
    times = []
    found = {}
    for k, (frame, stream) in enumerate(_decode_all(path)):
        times.append(frame.time)
        if k in expected:
            found[k] = _pixels(frame, stream)
    if not times:
        raise DataError(f"{path}: has no frame that can be decoded")
    times = _seconds(times, start, rate)
    again = enumerate(_decode_all(path))
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


def _decode_all(path):
    """Yield every frame of a file, and its stream."""
    with _open(path) as (file, stream):
        for frame in _decode(file, stream):
            yield frame, stream


def _pixels(frame, stream):
    """A decoded frame -> uint8 (3,H,W): upright, with square pixels, AREA of them at most."""
    ratio = float(stream.sample_aspect_ratio or 1)  # width of a pixel over its height
    scale = min(1, (AREA / (frame.width * frame.height * ratio)) ** 0.5)
    W = max(1, round(frame.width * ratio * scale))
    H = max(1, round(frame.height * scale))
    # Of a longer strip, encoders use a small part of what it would be resized to.
    W = min(W, 99 * H)
    H = min(H, 99 * W)
    curve = frame.color_trc
    frame.color_trc = UNSPECIFIED  # not used here, and FFmpeg refuses some
    if frame.colorspace == 10:
        frame.colorspace = BT2020
    if frame.colorspace > 7 and frame.colorspace != BT2020:  # nor does it know these matrices
        frame.colorspace = UNSPECIFIED
    # PyAV 19 keeps the threads of a conversion. A process forked later lacks them, and would wait
    # for them forever.
    plane = frame.reformat(W, H, format="rgb24", threads=1).planes[0]
    x = torch.frombuffer(bytearray(plane), dtype=torch.uint8)
    x = x.view(H, plane.line_size)[:, :W * 3]  # lines are padded
    x = x.reshape(H, W, 3)
    # Before PyAV 19, frame.side_data would keep every frame in memory forever.
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
    if curve in (PQ, HLG):
        x = _from_hdr(x, curve)
    return x.permute(2, 0, 1).contiguous()


# FFmpeg's numbers of transfer curves and matrices.
PQ = 16
HLG = 18
UNSPECIFIED = 2
BT2020 = 9


def _from_hdr(x, curve):
    """HDR uint8 (H,W,3) -> ordinary colours (BT.709), with white at 203 nits. See ITU-R BT.2100."""
    code = torch.arange(256) / 255
    if curve == PQ:
        power = code ** (32 / 2523)
        light = (power - 0.8359375).clamp(0) / (18.8515625 - 18.6875 * power)
        light = light ** (16384 / 2610) * 10_000
    else:
        bright = ((code - 0.55991073) / 0.17883277).exp() + 0.28466892
        light = torch.where(code > 0.5, bright, 4 * code ** 2) / 12
        light = light ** 1.2 * 1000  # on a screen of 1000 nits
    to_bt709 = torch.tensor([  # rows: red, green and blue of BT.2020
        [1.6605, -0.1246, -0.0182],
        [-0.5876, 1.1329, -0.1006],
        [-0.0728, -0.0083, 1.1187],
    ])
    light = light[x.int()] / 203 @ to_bt709
    return (light.clamp(0, 1) ** (1 / 2.2) * 255).round().to(torch.uint8)


def _piece(path, times, a, b, chosen, found):
    """The Piece of a range from the chosen frames. found: those decoded, {number: (3,H,W)}."""
    frames = [found.get(i) for i in chosen]
    if not found.keys() & chosen:
        raise DataError(f"{path}: has no frame that can be decoded")
    end = times[b] if b < len(times) else _end(times)
    return Piece(times[a], end, [times[i] for i in chosen], torch.stack(_fill(frames)))


def _fill(frames):
    """Replace None by the frame before it or the first one, and resize all to the first one."""
    last = next(x for x in frames if x is not None)
    size = last.shape[1:]
    filled = []
    for x in frames:
        if x is not None:
            last = v2.functional.resize(x, size, antialias=True)
        filled.append(last)
    return filled


# ---- cache ----

EDITION = 3  # raise it when decoded pixels or times change: then all cache files are made again


class FrameCache:
    """Keeps the T frames of each Segment in a file, as JPEG (quality 95, short side at most 256).

    A file is valid only while the video's size, modification time, T and span stay the same. Any
    number of processes may share a folder. If it can't be written, videos are decoded each time,
    after one warning. Frames pass through JPEG the first time too, so that a run sees the same
    pixels whether or not they were cached before.
    """

    def __init__(self, folder, frames):
        self.folder = Path(folder)
        self.frames = frames

    def read(self, segment):
        """Read a Segment from the cache, or decode it into the cache. -> uint8 (T,3,H,W)

        Raises DataError.
        """
        path = os.path.abspath(segment.path)
        try:
            stat = os.stat(path)
        except OSError:
            return read_frames(segment, self.frames)  # says what is wrong
        span = [self.frames, *segment[1:]]
        # Size and time are not in the name, so that a changed video replaces its old frames.
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
            _warn(self.folder, e.strerror)
        return torch.stack(decode_jpeg(jpegs, ImageReadMode.RGB))

    def _save(self, file, key, jpegs):
        """Write a line of JSON, then all pictures in order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = [*map(len, jpegs)]
        body = torch.cat(jpegs).numpy().tobytes()
        head = json.dumps([key, sizes, zlib.crc32(body)])
        with written_whole(file, flush=False) as part:  # a damaged file is made again
            Path(part).write_bytes(head.encode() + b"\n" + body)

    def _load(self, file, key):
        """Load what `_save` wrote. -> uint8 (T,3,H,W). Raises ValueError if the key differs."""
        head, body = file.read_bytes().split(b"\n", 1)
        saved, sizes, crc = json.loads(head)
        if saved != key or zlib.crc32(body) != crc:
            raise ValueError  # another video or span, or damaged
        jpegs = torch.frombuffer(bytearray(body), dtype=torch.uint8).split(sizes)
        return torch.stack(decode_jpeg(list(jpegs), ImageReadMode.RGB))


@functools.cache
def _warn(folder, why):
    """Say once that a cache is of no use."""
    print(f"warning: frame cache {folder} can't be written ({why}): videos are decoded each time",
          file=sys.stderr)


def frame_reader(frames, cache=None):
    """Make a function Segment -> uint8 (T,3,H,W). cache: the folder of a FrameCache."""
    if cache:
        return FrameCache(cache, frames).read
    return functools.partial(read_frames, frames=frames)
