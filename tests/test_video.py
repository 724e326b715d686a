"""The videos that people have: when a frame is shown, which stream, upright, in shape, in size."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import unicodedata
from fractions import Fraction

import av
import pytest
import torch
from conftest import ROOT
from videos import numbered, numbers, write_video, write_with_sound

import search
from data import load_annotations
from lib import index
from lib import video as decode
from lib.common import DataError
from lib.video import SUFFIXES, FrameCache, Segment, read_frames, read_pieces, read_segment


def close(seconds):
    return pytest.approx(seconds, abs=2e-5)


# ---- when ----

def joined(path, frames, **options):
    """A recording, and the same once more behind it in one file."""
    write_video(path, frames, **options)
    path.write_bytes(2 * path.read_bytes())
    return path


@pytest.mark.parametrize("name", ["aa.ts", "aa.mkv"])
def test_times_that_start_anew_go_on(tmp_path, name):
    path = joined(tmp_path / name, numbered(40), bf=2, g=12)
    piece = read_segment(Segment(path, 6, 8), 16)
    assert numbers(piece.frames) == list(range(8, 24))  # of the second half
    assert piece.times == close([6 + k / 8 for k in range(16)])
    pieces = list(read_pieces(path, 16, 2))
    assert [piece.start for piece in pieces] == close([0, 2, 4, 6, 8])
    assert [piece.end for piece in pieces] == close([2, 4, 6, 8, 10])
    shown = [number for piece in pieces for number in numbers(piece.frames)]
    assert shown == 2 * list(range(40))
    # one pass is enough: the packets tell when their frames are shown
    assert numbers(read_frames(Segment(path, 4.5, 5.5), 8)) == [36, 37, 38, 39, 0, 1, 2, 3]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_recordings_whose_times_begin_a_little_apart_are_joined(tmp_path, order):
    """No two frames have the same time: sorted as they are, the two would be mixed."""
    for name in order:
        start = dict(a=0, b=21)[name]  # milliseconds
        with av.open(str(tmp_path / f"{name}.mkv"), "w") as file:
            stream = file.add_stream("mjpeg", rate=1000)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuvj420p"
            for k, x in enumerate(numbered(40)):
                frame = av.VideoFrame.from_ndarray(x.numpy(), format="rgb24")
                frame.pts = start + 125 * k
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    path = tmp_path / "joined.mkv"
    path.write_bytes(b"".join((tmp_path / f"{name}.mkv").read_bytes() for name in order))
    pieces = list(read_pieces(path, 40, 5))
    assert [numbers(piece.frames) for piece in pieces] == 2 * [list(range(40))]
    assert pieces[-1].end == pytest.approx(10, abs=0.2)


def test_discs_and_recordings_of_another_rate_are_joined(tmp_path):
    path = joined(tmp_path / "aa.mpg", numbered(40), fps=25, codec="mpeg2video", bf=2)
    piece = read_segment(Segment(path, 1.5, 1.7), 5)
    assert numbers(piece.frames) == [38, 39, 0, 1, 2]
    assert piece.times == close([1.52, 1.56, 1.6, 1.64, 1.68])


def test_a_clock_that_seems_to_jump_by_a_day_goes_on(tmp_path):
    """MPEG-TS counts 26 hours: FFmpeg takes a clock that falls back by minutes for the next day."""
    write_video(tmp_path / "late.ts", numbered(16), bf=2, g=8)
    late = (tmp_path / "late.ts").read_bytes()
    with av.open(str(tmp_path / "late.ts")) as source, av.open(str(tmp_path / "b.ts"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts += 90_000 * 600
                packet.dts += 90_000 * 600
                packet.stream = stream
                out.mux(packet)
    path = tmp_path / "ba.ts"
    path.write_bytes((tmp_path / "b.ts").read_bytes() + late)
    assert [piece.end for piece in read_pieces(path, 4, 0)] == close([4])


@pytest.mark.parametrize("fps", [8, 1])
def test_h264_in_avi_is_counted_in_the_order_of_showing(tmp_path, fps):
    """avi tells only when frames are decoded."""
    path = tmp_path / "x.avi"
    write_video(path, numbered(48), fps=fps, bf=2, g=24)
    piece = read_segment(Segment(path, 40 / fps, 48 / fps), 8)
    assert numbers(piece.frames) == list(range(40, 48))
    assert piece.times == close([k / fps for k in range(40, 48)])


def test_raw_streams_have_the_rate_of_their_header(tmp_path):
    name = "mpeg2video"
    write_video(tmp_path / "x.m2v", numbered(40), fps=50, codec=name, container=name)
    write_video(tmp_path / "h264.m2v", numbered(40), fps=50, container="h264")
    for name in ("x.m2v", "h264.m2v"):
        assert numbers(read_frames(Segment(tmp_path / name, 0.4), 20)) == list(range(20, 40)), name


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.ts"])
def test_sound_may_begin_before_the_picture(tmp_path, name):
    path = tmp_path / name
    write_with_sound(path, numbered(40), late=3)
    with av.open(str(path)) as file:  # encoders of sound begin a few milliseconds early
        first = file.streams.video[0]
        first = float(first.start_time * first.time_base) - file.start_time / 1e6
    assert first == pytest.approx(3, abs=0.07)
    piece = read_segment(Segment(path, first + 2, first + 3), 8)
    assert numbers(piece.frames) == list(range(16, 24))
    assert piece.times == close([first + 2 + k / 8 for k in range(8)])
    pieces = list(read_pieces(path, 4, 1))
    assert [piece.start for piece in pieces] == close([first + k for k in range(5)])
    assert pieces[-1].end == close(first + 5)
    with pytest.raises(DataError, match=r"ends after 7\.9 s, before the clip's start at 8.5"):
        read_frames(Segment(path, 8.5), 4)


def without_times(ts, unknown):
    """An MPEG-TS file of one stream in which the pictures k with unknown(k) have no time."""
    ts = bytearray(ts)
    k = 0
    for at in range(0, len(ts), 188):
        begins = ts[at + 1] & 0x40
        more = 1 + ts[at + 4] if ts[at + 3] & 0x20 else 0
        at += 4 + more
        if begins and ts[at:at + 4] == b"\0\0\1\xe0":
            if unknown(k):
                ts[at + 7] &= 0x3f
                n = ts[at + 8]
                ts[at + 9:at + 9 + n] = b"\xff" * n
            k += 1
    return bytes(ts)


@pytest.mark.parametrize("late", [0, 5000])
@pytest.mark.parametrize("unknown", [
    lambda k: k == 0,
    lambda k: k < 20,
    lambda k: k % 12,
    lambda k: k % 2,
])
def test_times_that_are_unknown_lie_between_those_that_are_known(tmp_path, late, unknown):
    path = tmp_path / "x.ts"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv420p", dict(bf="2", g="12")
        stream.codec_context.thread_type = "FRAME"
        for k, x in enumerate(numbered(60)):
            frame = av.VideoFrame.from_ndarray(x.numpy(), format="rgb24")
            frame.pts = 10 * late + k
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    path.write_bytes(without_times(path.read_bytes(), unknown))
    piece = read_segment(Segment(path, 3, 4), 10)
    assert numbers(piece.frames) == list(range(30, 40))
    assert piece.times == close([3 + k / 10 for k in range(10)])
    [whole] = read_pieces(path, 6)
    assert (whole.start, whole.end) == close((0, 6))


@pytest.mark.parametrize("name", ["slides.mp4", "slides.ts"])
def test_a_segment_in_which_no_frame_begins_shows_the_one_before(tmp_path, name):
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, x in enumerate(numbered(4)):
            frame = av.VideoFrame.from_ndarray(x.numpy(), format="rgb24")
            frame.pts, frame.time_base = 10_000 * k, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    spans = [(3, 7), (None, 0), (10, 10), (10, 20), (19.9, 20), (31, 35), (39, None)]
    for span, shown in zip(spans, (0, 0, 1, 1, 1, 3, 3)):
        assert numbers(read_frames(Segment(path, *span), 2)) == [shown] * 2, span
    with pytest.raises(DataError, match="before the clip's start at 40 s"):
        read_frames(Segment(path, 40, 41), 2)


# ---- which stream ----

@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_a_preview_of_one_frame_is_not_the_video(tmp_path, name):
    write_video(tmp_path / "a.mp4", numbered(1, 32))
    write_video(tmp_path / "b.mp4", numbered(40))
    sources = [av.open(str(tmp_path / name)) for name in ("a.mp4", "b.mp4")]
    with av.open(str(tmp_path / name), "w") as out:
        streams = [out.add_stream_from_template(source.streams.video[0]) for source in sources]
        for source, stream in zip(sources, streams):
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
            source.close()
    assert numbers(read_frames(tmp_path / name, 40)) == list(range(40))


# ---- upright, in shape ----

def test_colours_of_a_palette(tmp_path):
    """It comes with the first packet that is read, and not again after seeking."""
    write_video(tmp_path / "x.mov", numbered(20), codec="qtrle", pix_fmt="gray")
    assert numbers(read_frames(tmp_path / "x.mov", 20)) == list(range(20))


LEVELS = {(-1, -1): 30, (1, -1): 90, (-1, 1): 150, (1, 1): 210}  # by corner: x to the right, y down


def corners(H=32, W=64, n=2):
    """n frames of which each quarter has its own grey. -> uint8 (n,H,W,3)"""
    x = torch.zeros(n, H, W, 3, dtype=torch.uint8)
    for (right, down), level in LEVELS.items():
        rows = slice(H // 2, None) if down > 0 else slice(H // 2)
        columns = slice(W // 2, None) if right > 0 else slice(W // 2)
        x[:, rows, columns] = level
    return x


@pytest.mark.parametrize("a, b, c, d", [
    (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
    (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0),
])
def test_all_display_matrices_are_followed(tmp_path, a, b, c, d):
    one = 1 << 16
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
    path = tmp_path / "phone.mp4"
    write_video(path, corners(), setup=lambda stream: stream.set_display_matrix(matrix))
    frame = read_frames(path, 1)[0, 0]
    assert frame.shape == ((32, 64) if a else (64, 32))
    H, W = frame.shape
    for (x, y), level in LEVELS.items():
        right = a * x + c * y  # where the matrix puts this corner
        down = b * x + d * y
        assert abs(frame[(2 + down) * H // 4, (2 + right) * W // 4].item() - level) < 8, (x, y)


@pytest.mark.parametrize("ratio, turned, size", [
    (Fraction(2), False, (64, 128)),
    (Fraction(2), True, (128, 64)),
    (Fraction(1, 2), False, (64, 32)),
    (Fraction(64, 45), False, (64, 91)),
])
@pytest.mark.parametrize("name", ["x.mp4", "x.ts"])
def test_pixels_that_are_not_square(tmp_path, name, ratio, turned, size):
    if turned and name == "x.ts":
        pytest.skip("no display matrix in MPEG-TS")

    def setup(stream):
        stream.codec_context.sample_aspect_ratio = ratio
        if turned:
            stream.set_display_rotation(90)
    write_video(tmp_path / name, corners(64, 64), setup=setup)
    assert read_frames(tmp_path / name, 3).shape == (3, 3, *size)


@pytest.mark.parametrize("H, W", [(2, 66_000), (16_000, 16)])
def test_strips_are_no_load(tmp_path, H, W):
    """A short side of 224 would make gigabytes of them, and no JPEG is so long."""
    strip = torch.full((1, H, W, 3), 90, dtype=torch.uint8)
    write_video(tmp_path / "x.mkv", strip, codec="ffv1")
    frames = FrameCache(tmp_path / "cache", 1).read(Segment(tmp_path / "x.mkv"))
    assert max(frames.shape[-2:]) <= 99 * min(frames.shape[-2:])
    assert (frames.int() - 90).abs().max() < 8


def brightness(curve, light):
    """The PQ or HLG code, 0 to 1, of light in nits; HLG on a screen of 1000 nits. float (...)"""
    if curve == decode.PQ:
        power = (light / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    scene = (light / 1000) ** (1 / 1.2)
    bright = 0.17883277 * (12 * scene - 0.28466892).clamp(1e-9).log() + 0.55991073
    return torch.where(scene > 1 / 12, bright, (3 * scene).sqrt())


@pytest.mark.parametrize("curve", [decode.PQ, decode.HLG])
def test_hdr_looks_like_ordinary_video(tmp_path, curve):
    path = tmp_path / "phone.mkv"
    ordinary = torch.tensor([[230, 40, 30], [40, 220, 50], [30, 40, 225], [128, 128, 128],
                             [255, 255, 255], [200, 160, 120], [20, 20, 20], [0, 0, 0]])
    bt2020 = torch.tensor([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114],
                           [0.0164, 0.0880, 0.8956]])  # ITU-R BT.2087
    light = (ordinary / 255) ** 2.2 @ bt2020.T * 203
    red, green, blue = brightness(curve, light).unbind(-1)
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    blue_chroma = (blue - luma) / 1.8814
    red_chroma = (red - luma) / 1.4746
    planes = [64 + 876 * luma, 512 + 896 * blue_chroma, 512 + 896 * red_chroma]

    def marked(x):
        x.color_trc, x.color_primaries, x.colorspace, x.color_range = curve, 9, 9, 1
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 16, "yuv444p10le"
        marked(stream.codec_context)
        frame = av.VideoFrame(128, 16, "yuv444p10le")
        for plane, values in zip(frame.planes, planes):
            line = values.round().to(torch.int16).repeat_interleave(16)
            rows = torch.zeros(16, plane.line_size // 2, dtype=torch.int16)
            rows[:, :128] = line
            plane.update(rows.numpy().tobytes())
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    got = read_frames(path, 1)[0, :, 8, 8::16].T.int()
    assert (got - ordinary).abs().max() <= (5 if curve == decode.PQ else 45)
    saturation = got.amax(1) - got.amin(1)
    wanted = ordinary.amax(1) - ordinary.amin(1)
    assert (saturation - wanted)[[3, 4, 6, 7]].abs().max() <= 2  # grey stays grey
    assert (saturation > 0.9 * wanted)[:3].all()


# ---- size ----

def read_within(path, room, out):
    """Leave in `out` the shape of 12 frames, or the error, with `room` bytes more than now."""
    torch.set_num_threads(1)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))
    taken = []
    with contextlib.suppress(MemoryError):
        while not room:  # what earlier tests gave back
            taken.append(bytearray(2 ** 22))
    try:
        out.put(tuple(read_frames(path, 12).shape))
    except DataError as error:
        out.put(str(error))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_frames_are_shrunk_as_they_are_decoded(tmp_path):
    """12 of 4K in 150 MB: as they are they would be 300, and a copy of them. And 8K in none."""
    fork = multiprocessing.get_context("fork")
    got = []
    for H, n, room in ((2160, 12, 150), (4608, 1, 0)):
        path = tmp_path / f"{H}.avi"
        frame = torch.full((H, H * 16 // 9, 3), 90, dtype=torch.uint8)
        write_video(path, [frame] * n, codec="mjpeg", pix_fmt="yuvj420p")
        out = fork.SimpleQueue()
        process = fork.Process(target=read_within, args=(path, room * 2 ** 20, out))
        process.start()
        process.join(60)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0
        got.append(out.get())
    shape, error = got
    assert shape[:2] == (12, 3) and shape[2] * shape[3] <= 2 ** 19 * 1.01
    assert shape[3] / shape[2] == pytest.approx(16 / 9, rel=0.01)
    assert "4608.avi: needs more memory than there is" in error


def test_a_lost_frame_does_not_make_all_others_pile_up(tmp_path, monkeypatch):
    path = tmp_path / "x.mkv"
    write_video(path, numbered(200), fps=10, codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][40]
        start, size = packet.pos, packet.size
    body = path.read_bytes()
    at = body.index(b"\xff\xd8", start)
    path.write_bytes(body[:at] + bytes(size - 16) + body[at + size - 16:])
    most = []
    until = decode._decode_until

    def watched(i, packets, stream, wanted, found):
        until(i, packets, stream, wanted, found)
        most.append(len(found))
    monkeypatch.setattr(decode, "_decode_until", watched)
    pieces = list(read_pieces(path, 10, 1))
    assert len(pieces) == 20 and max(most) <= 12
    assert numbers(pieces[4].frames)[:9] == list(range(41, 50))


# ---- a disk that fails ----

# Reads of the file BAD fail from the byte AT on.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ssize_t read(int fd, void *to, size_t n) {
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    char link[64], name[4096] = {0};
    const char *bad = getenv("BAD");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (bad && readlink(link, name, sizeof name - 1) > 0 && !strcmp(name, bad)) {
        off_t left = atol(getenv("AT")) - lseek(fd, 0, SEEK_CUR);
        if (left <= 0) { errno = EIO; return -1; }
        if ((off_t)n > left) n = left;
    }
    return real(fd, to, n);
}
"""
READING = """
import os
import sys
import search
from lib.common import DataError
from lib.video import read_frames, read_pieces
for path in sys.argv[1:]:
    size = os.path.getsize(path)
    for at in (2 * size, 0.6 * size):
        os.environ |= dict(BAD=path, AT=str(int(at)))
        for read in (read_frames, lambda *args: list(read_pieces(*args, 2))):
            try:
                print("frames", len(read(path, 12)))
            except DataError as error:
                print(search.was_refused(path, error), error)
"""


@pytest.mark.skipif(not (shutil.which("cc") and sys.platform == "linux"),
                    reason="needs a C compiler and Linux")
def test_what_the_disk_does_not_give_is_not_the_end(tmp_path):
    """An error of the disk in the middle of a file is an error, and tried again the next time."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (64, 96, 3), generator=generator, dtype=torch.uint8)
    paths = []
    for name, options in {
        "whole.mp4": {},
        "fast.mp4": dict(movflags="faststart"),
        "parts.mp4": dict(movflags="frag_keyframe+empty_moov"),
        "x.mkv": {},
        "x.ts": {},
        "x.avi": dict(codec="mpeg4"),
    }.items():
        paths.append(str(tmp_path / name))
        write_video(paths[-1], [noise] * 60, **options)
    (tmp_path / "shim.c").write_text(SHIM)
    command = ["cc", "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    env = {**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so")}
    done = subprocess.run([sys.executable, "-c", READING, *paths], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert len(said) == 4 * len(paths), done.stderr
    for path in paths:
        error = f"True {path}: can't be read: Input/output error"
        assert [said.pop(0) for _ in range(4)] == ["frames 12", "frames 4", error, error]


# ---- which files ----

def test_data_sets_and_search_know_the_same_suffixes(tmp_path):
    names = [f"clip{k}{suffix}" for k, suffix in enumerate(SUFFIXES)]
    for name in names:
        (tmp_path / name).touch()
    assert sorted(index.videos_below(tmp_path, [])) == sorted(names)
    (tmp_path / "Charades_v1_test.csv").write_text(
        "id,script\n" + "".join(f"clip{k},A person waits.\n" for k in range(len(names)))
    )
    annotations = load_annotations("charades", tmp_path, "test")
    assert [os.path.basename(segment.path) for segment in annotations.segments] == names
    for suffix in ".mts .m2ts .m2t .vob .3g2 .asf .f4v .mxf .dv .divx .ogm .m2v .mpe .gif".split():
        assert suffix in SUFFIXES


@pytest.mark.parametrize("disk, asked", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_in_another_unicode_form_are_found(tmp_path, disk, asked):
    root = tmp_path / unicodedata.normalize(asked, "vidéos")  # its own form may be another
    name = unicodedata.normalize(disk, "café.mp4")
    asked_name = unicodedata.normalize(asked, "café.mp4")
    root.mkdir()
    (root / name).touch()
    if (root / asked_name).exists():
        pytest.skip("this disk knows no forms")
    (root / "x.csv").write_text(f"video,caption\n{asked_name},a dog\n", encoding="utf-8")
    (root / "Charades_v1_test.csv").write_text(
        f"id,script\n{asked_name[:-4]},A person waits.\n", encoding="utf-8"
    )
    for data, folder in ((root / "x.csv", None), ("charades", root)):
        [segment] = load_annotations(data, folder, "all" if folder is None else "test").segments
        assert os.path.samefile(segment.path, root / name)
    [folder] = search.list_videos([unicodedata.normalize(disk, str(root / asked_name))])
    assert list(folder.stamps) == [name]


def test_frames_cached_by_another_edition_are_made_again(tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"
    write_video(path, numbered(20))
    cache = FrameCache(tmp_path / "cache", 4)
    monkeypatch.setattr(decode, "EDITION", 1)
    cache.read(Segment(path))
    [file] = (tmp_path / "cache").iterdir()
    before = file.read_bytes()
    monkeypatch.undo()
    cache.read(Segment(path))
    assert file.read_bytes() != before
