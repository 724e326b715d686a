"""Videos that people have: which frames, when, from which stream, upright, in shape; the cache."""

import multiprocessing
import os
import resource
import shutil
import struct
import subprocess
import sys
import unicodedata
from fractions import Fraction

import av
import pytest
import torch
from conftest import ROOT
from videos import copy_videos, numbered, numbers, write_video

import search
from data import load_annotations
from lib.common import DataError
from lib.video import (
    FrameCache,
    Segment,
    read_frames,
    read_pieces,
    read_segment,
    sample_indices,
)


def close(seconds):
    return pytest.approx(seconds, abs=2e-5)


def shown(path, start, end, T):
    return numbers(read_frames(Segment(path, start, end), T))


def refused(path, span=(), T=4):
    with pytest.raises(DataError) as e:
        read_frames(Segment(str(path), *span), T)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_sampling_rule():
    assert sample_indices(120, 12) == [4 + 10 * i for i in range(12)]
    assert sample_indices(10, 4) == [0, 3, 5, 8]  # [0,2) [2,5) [5,7) [7,10): (start + end) // 2
    assert sample_indices(3, 5) == [0, 1, 2, 2, 2]
    for n in range(12, 200):
        # as the paper's code states it
        bounds = [int(x) for x in torch.linspace(0, n, 13, dtype=torch.float64) + 1e-9]
        assert sample_indices(n, 12) == [(a + b - 1) // 2 for a, b in zip(bounds, bounds[1:])]


# ---- which frames, and when ----

X264 = {"bf": 3, "g": 20, "x264-params": "open-gop=1:b-pyramid=normal"}
FILES = {  # containers and codecs that people have
    "bframes.mp4": dict(bf=3, g=30),
    "opengop.mp4": X264,
    "fragmented.mp4": dict(bf=2, g=25, movflags="frag_keyframe+empty_moov"),
    "opengop.mkv": X264,
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": 8},
    "mpeg4.avi": dict(codec="mpeg4", bf=2),
    "h264.avi": dict(bf=2, g=24),
    "opengop.ts": X264,
    "mpeg2.ts": dict(codec="mpeg2video", bf=2),
    "x.mpg": dict(codec="mpeg2video", bf=2),
}
STEADY = list(range(100))
SLOWER = [k + 3 * max(0, k - 30) for k in STEADY]  # to a quarter
LATE = [250 + k for k in STEADY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


def make(folder, name, times=STEADY, late=0):
    path = folder / f"{times[0]}_{times[-1]}_{late}_{name}"
    if not path.exists():
        write_video(path, numbered(100), fps=25, times=times, late=late, **FILES[name])
    return path


@pytest.mark.parametrize("name, times, late", [
    *((name, STEADY, 0) for name in FILES),
    *((name, times, 0) for name in ("bframes.mp4", "opengop.mkv", "mpeg2.ts")
      for times in (SLOWER, LATE)),
    *((name, STEADY, 3) for name in ("bframes.mp4", "opengop.mkv", "opengop.ts")),
])
def test_frames_and_times_are_exact(folder, name, times, late):
    """Of a segment, they are those of the whole file, whose frames are all counted."""
    path = make(folder, name, times, late)
    whole = read_segment(Segment(path), 100)
    assert numbers(whole.frames) == STEADY and whole.frames.is_contiguous()
    first = whole.times[0]
    assert first == pytest.approx(late, abs=.07)  # encoders of sound begin a little early
    assert whole.times == close([first + (k - times[0]) / 25 for k in times])
    for T in (1, 12, 110):
        assert shown(path, None, None, T) == sample_indices(100, T)
    ends = [*whole.times[1:], whole.end]
    for start, end in [(0, .2), (1, 2), (1.2, 1.28), (2.01, 2.8), (3.5, 99), (0, 2), (1.9, 31)]:
        start, end = start + first, end + first
        inside = [k for k in STEADY if start - 1e-6 <= whole.times[k] < end - 1e-6]
        chosen = [inside[i] for i in sample_indices(len(inside), 8)]
        piece = read_segment(Segment(path, start, end), 8)
        assert numbers(piece.frames) == chosen
        assert piece.times == [whole.times[k] for k in chosen]
        assert (piece.start, piece.end) == (whole.times[inside[0]], ends[inside[-1]])
    assert "before the clip's start at 29" in refused(path, (29, 30))


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_ffmpeg(folder, name):
    path = make(folder, name)
    command = ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    pixels = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8).view(-1, 64, 64, 3)
    ours = read_frames(path, 100).permute(0, 2, 3, 1)
    assert (pixels.int() - ours.int()).abs().max() <= 3


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.ts", "x.avi"])
def test_a_segment_costs_a_segment(tmp_path, name):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(40, (48, 128, 128, 3), generator=generator, dtype=torch.uint8)
    codec = dict(codec="mpeg4") if name == "x.avi" else {}
    write_video(tmp_path / "part.mp4", numbered(48, 128) + noise, g=16, **codec)
    copy_videos(tmp_path / name, [tmp_path / "part.mp4"] * 30, later=0 if codec else 6)

    def read(*span):
        with open("/proc/self/io") as file:
            before = int(file.readline().split()[1])
        frames = shown(tmp_path / name, *span, 8)
        with open("/proc/self/io") as file:
            return frames, int(file.readline().split()[1]) - before

    for second in (0, 90, 174):
        frames, cost = read(second + 2, second + 3)
        assert frames == list(range(16, 24)) and cost < os.path.getsize(tmp_path / name) / 2
    _, cost = read(None, None)
    assert cost > os.path.getsize(tmp_path / name)


@pytest.mark.parametrize("name", ["aa.ts", "aa.mkv", "aa.mpg"])
def test_times_that_start_anew_go_on(tmp_path, name):
    """A recording, and the same once more behind it in one file."""
    path = tmp_path / name
    codec = "mpeg2video" if name == "aa.mpg" else "libx264"
    write_video(path, numbered(40), 25, codec, bf=2, g=12)
    path.write_bytes(2 * path.read_bytes())
    pieces = list(read_pieces(path, 10, .4))
    assert [piece.start for piece in pieces] == close([.4 * k for k in range(8)])
    assert [piece.end for piece in pieces] == close([.4 * k for k in range(1, 9)])
    assert sum((numbers(piece.frames) for piece in pieces), []) == 2 * list(range(40))
    piece = read_segment(Segment(path, 1.5, 1.7), 5)
    assert numbers(piece.frames) == [38, 39, 0, 1, 2]
    assert piece.times == close([1.52, 1.56, 1.6, 1.64, 1.68])
    assert shown(path, .4, .8, 10) == list(range(10, 20))
    assert shown(path, 2, 2.4, 10) == list(range(10, 20))  # of the second half


def test_recordings_whose_times_begin_a_little_apart_are_joined(tmp_path):
    """No two frames have the same time: sorted as they are, the two would be mixed."""
    body = b""
    for late in (21, 0):  # milliseconds
        times = [late + 125 * k for k in range(40)]
        path = tmp_path / f"{late}.mkv"
        write_video(path, numbered(40), 1000, "mjpeg", pix_fmt="yuvj420p", times=times)
        body += path.read_bytes()
    (tmp_path / "x.mkv").write_bytes(body)
    pieces = list(read_pieces(tmp_path / "x.mkv", 40, 5))
    assert [numbers(piece.frames) for piece in pieces] == 2 * [list(range(40))]


def test_a_clock_that_seems_to_jump_by_a_day_goes_on(tmp_path):
    """MPEG-TS counts 26 hours: FFmpeg takes a clock that falls back by minutes for the next day."""
    write_video(tmp_path / "a.ts", numbered(16), bf=2, g=8)
    copy_videos(tmp_path / "b.ts", [tmp_path / "a.ts"], later=600)
    path = tmp_path / "ba.ts"
    path.write_bytes((tmp_path / "b.ts").read_bytes() + (tmp_path / "a.ts").read_bytes())
    assert [piece.end for piece in read_pieces(path, 4, 0)] == close([4])


def test_raw_streams_have_the_rate_of_their_header(tmp_path):
    name = "mpeg2video"
    write_video(tmp_path / "x.m2v", numbered(40), fps=50, codec=name, container=name)
    write_video(tmp_path / "h264.m2v", numbered(40), fps=50, container="h264")
    for name in ("x.m2v", "h264.m2v"):
        assert shown(tmp_path / name, .4, None, 20) == list(range(20, 40)), name


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


@pytest.mark.parametrize("late", [0, 50_000])
@pytest.mark.parametrize("unknown", [lambda k: k < 20, lambda k: k % 12, lambda k: k % 2])
def test_times_that_are_unknown_lie_between_those_that_are_known(tmp_path, late, unknown):
    path = tmp_path / "x.ts"
    times = [late + k for k in range(60)]
    write_video(path, numbered(60), fps=10, bf=2, g=12, times=times)
    path.write_bytes(without_times(path.read_bytes(), unknown))
    piece = read_segment(Segment(path, 3, 4), 10)
    assert numbers(piece.frames) == list(range(30, 40))
    assert piece.times == close([3 + k / 10 for k in range(10)])
    [whole] = read_pieces(path, 6)
    assert (whole.start, whole.end) == close((0, 6))


@pytest.mark.parametrize("name", ["slides.mp4", "slides.ts"])
def test_a_segment_in_which_no_frame_begins_shows_the_one_before(tmp_path, name):
    path = tmp_path / name
    write_video(path, numbered(4), fps=25, times=[0, 250, 500, 750])
    spans = [(3, 7), (None, 0), (10, 10), (10, 20), (19.9, 20), (31, 35), (39, None)]
    for span, number in zip(spans, (0, 0, 1, 1, 1, 3, 3)):
        assert shown(path, *span, 2) == [number] * 2, span
    assert "before the clip's start at 40 s" in refused(path, (40, 41))


# ---- which stream ----


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_a_picture_is_not_the_video(folder, tmp_path, name):
    """Neither a preview of one frame nor a cover; a file of nothing else is none."""
    picture = tmp_path / "cover.jpg"
    write_video(picture, numbered(1), codec="mjpeg", container="image2", pix_fmt="yuvj420p")
    write_video(tmp_path / "preview.mp4", numbered(1, 32))
    film = make(folder, "bframes.mp4")
    for first in (tmp_path / "preview.mp4", picture):
        copy_videos(tmp_path / name, [first, film], together=True, covers=[picture])
        assert numbers(read_frames(tmp_path / name, 100)) == STEADY
    copy_videos(tmp_path / "cover.mp4", [picture], covers=[picture])
    refused(tmp_path / "cover.mp4")


# ---- colours ----


def test_colours_of_a_palette(tmp_path):
    """It comes with the first packet that is read, and not again after seeking."""
    write_video(tmp_path / "x.mov", numbered(20), codec="qtrle", pix_fmt="gray")
    assert shown(tmp_path / "x.mov", 0, 99, 20) == list(range(20))


@pytest.mark.parametrize("name, values, as_if", [
    ("colorspace", [8, *range(11, 18)], 2),
    ("colorspace", [10], 9),
    ("color_trc", range(16), 2),
    ("color_primaries", range(13), 2),
])
def test_tags_of_colours_are_no_reason_to_lose_a_video(tmp_path, name, values, as_if):
    """Screen captures and old exports have wrong ones. They are shown as if they had another."""
    colours = torch.randint(256, (1, 64, 64, 3), generator=torch.Generator().manual_seed(0))

    def tagged(value):
        path = tmp_path / f"{value}.mkv"
        write_video(path, colours.byte(), codec="ffv1",
                    setup=lambda stream: setattr(stream.codec_context, name, value))
        return read_frames(path, 1)

    assert all(tagged(value).equal(tagged(as_if)) for value in values)


def brightness(curve, light):
    """The PQ or HLG code, 0 to 1, of light in nits; HLG on a screen of 1000 nits. float (...)"""
    if curve == 16:
        power = (light / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    scene = (light / 1000) ** (1 / 1.2)
    bright = 0.17883277 * (12 * scene - 0.28466892).clamp(1e-9).log() + 0.55991073
    return torch.where(scene > 1 / 12, bright, (3 * scene).sqrt())


@pytest.mark.parametrize("curve", [16, 18])
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
    line = 64 * torch.stack(planes, -1).round().repeat_interleave(16, 0)  # 10 of 16 bits

    def phone(stream):
        x = stream.codec_context
        x.color_trc, x.color_primaries, x.colorspace, x.color_range = curve, 9, 9, 1

    write_video(path, line.to(torch.uint16).expand(1, 16, 128, 3), codec="ffv1",
                pix_fmt="yuv444p10le", source="yuv444p16le", setup=phone)
    got = read_frames(path, 1)[0, :, 8, 8::16].T.int()
    assert (got - ordinary).abs().max() <= (5 if curve == 16 else 45)
    saturation = got.amax(1) - got.amin(1)
    wanted = ordinary.amax(1) - ordinary.amin(1)
    assert (saturation - wanted)[[3, 4, 6, 7]].abs().max() <= 2  # grey stays grey
    assert (saturation > 0.9 * wanted)[:3].all()


# ---- upright, in shape, of any size ----

@pytest.mark.parametrize("a, b, c, d", [
    (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
    (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0),
])
def test_all_display_matrices_are_followed(tmp_path, a, b, c, d):
    one = 1 << 16
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
    path = tmp_path / "phone.mp4"
    levels = torch.tensor([[30, 90], [150, 210]])
    picture = levels.repeat_interleave(16, 0).repeat_interleave(32, 1).byte()
    write_video(path, picture[None, :, :, None].expand(2, 32, 64, 3).contiguous(),
                setup=lambda stream: stream.set_display_matrix(matrix))
    frame = read_frames(path, 1)[0, 0]
    assert frame.shape == ((32, 64) if a else (64, 32))
    # The point (x, y) comes to (a x + c y, b x + d y): to the right, and down.
    expected = levels if a else levels.T
    if a + c < 0:
        expected = expected.fliplr()
    if b + d < 0:
        expected = expected.flipud()
    H, W = frame.shape
    assert (frame[H // 4::H // 2, W // 4::W // 2] - expected).abs().max() < 8


@pytest.mark.parametrize("name, ratio, turned, size", [
    ("x.mp4", 2, False, (64, 128)),
    ("x.mp4", 2, True, (128, 64)),
    ("x.ts", Fraction(1, 2), False, (64, 32)),
    ("x.ts", Fraction(64, 45), False, (64, 91)),
])
def test_pixels_that_are_not_square(tmp_path, name, ratio, turned, size):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = ratio
        if turned:
            stream.set_display_rotation(90)
    write_video(tmp_path / name, numbered(2), setup=setup)
    assert read_frames(tmp_path / name, 3).shape == (3, 3, *size)


@pytest.mark.parametrize("H, W, size", [
    (300, 400, (256, 341)),
    (2, 66_000, (2, 198)),  # a short side of 224 would make gigabytes of it
    (16_000, 16, (1584, 16)),  # no JPEG is so long
])
def test_frames_of_any_size_are_cached_small(tmp_path, H, W, size):
    write_video(tmp_path / "x.mkv", torch.full((1, H, W, 3), 90, dtype=torch.uint8), codec="ffv1")
    frames = FrameCache(tmp_path / "cache", 2).read(Segment(tmp_path / "x.mkv"))
    assert frames.shape == (2, 3, *size) and (frames.int() - 90).abs().max() < 8


LIMITED = """
import resource
import sys
import torch
from lib.video import DataError, read_frames
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for room in (150, 1):
    resource.setrlimit(resource.RLIMIT_AS, (used + room * 2 ** 20, -1))
    try:
        print(*read_frames(sys.argv[1], 12).shape)
    except DataError as error:
        print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_frames_are_shrunk_as_they_are_decoded(tmp_path):
    """12 of 4K in 150 MB: as they are they would be 300, and a copy of them."""
    path = tmp_path / "x.avi"
    frame = torch.full((2160, 3840, 3), 90, dtype=torch.uint8)
    write_video(tmp_path / "one.avi", [frame], codec="mjpeg", pix_fmt="yuvj420p")
    copy_videos(path, [tmp_path / "one.avi"] * 12)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == f"12 3 543 965\n{path}: needs more memory than there is\n", done.stderr


def test_a_canvas_may_be_too_large(tmp_path):
    """480 bytes that would take a minute and gigabytes."""
    header = b"GIF89a" + struct.pack("<2H", 16_000, 16_000) + b"\x80\0\0" + bytes(6)
    picture = b"," + struct.pack("<4H", 0, 0, 1, 1) + b"\0\2\2\x44\1\0"
    (tmp_path / "x.gif").write_bytes(header + 12 * picture + b";")
    assert "too large: 16000 x 16000" in refused(tmp_path / "x.gif")


# ---- bad files ----


def test_bad_videos_name_the_file(folder, tmp_path):
    good = make(folder, "bframes.mp4").read_bytes()
    contents = {
        "empty.mp4": b"",
        "cut.mp4": good[:len(good) // 2],  # its index is at the end
        "header.avi": make(folder, "mpeg4.avi").read_bytes()[:2000],
        "text.mp4": b"This is not a video.\n" * 50,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "cut off" in refused(tmp_path / name) or name == "header.avi"
    (tmp_path / "folder.mp4").mkdir()
    refused(tmp_path / "folder.mp4")
    refused(tmp_path / "missing.mp4")


def test_damaged_videos_give_what_they_hold(folder, tmp_path):
    for name in ("opengop.mkv", "mpeg4.avi", "mpeg2.ts", "vp9.webm"):
        body = make(folder, name).read_bytes()
        (tmp_path / name).write_bytes(body[:len(body) * 6 // 10])
        got = numbers(read_frames(tmp_path / name, 8))
        assert len(got) == 8 and got == sorted(got) and 8 < got[-1] < 90, (name, got)


@pytest.mark.parametrize("start", [None, 2])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_gives_frames_or_a_data_error(folder, tmp_path, name, start):
    body = make(folder, name).read_bytes()
    path = tmp_path / name
    for at in range(0, len(body), len(body) // 9):
        for rest in (b"", bytes(300) + body[at + 300:]):  # cut off, or a hole
            path.write_bytes(body[:at] + rest)
            try:
                assert len(shown(path, start, None, 4)) == 4
            except DataError as error:
                assert str(path) in str(error)


def test_a_lost_frame_loses_no_others(tmp_path):
    """The pieces before it are read by seeking, those after it by counting; none comes twice."""
    path = tmp_path / "x.mkv"
    write_video(path, numbered(200), fps=10, codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][40]
    body = path.read_bytes()
    at = body.index(b"\xff\xd8", packet.pos)
    path.write_bytes(body[:at] + bytes(packet.size - 16) + body[at + packet.size - 16:])
    pieces = list(read_pieces(path, 10, 1))
    assert len(pieces) == 20 and numbers(pieces[3].frames) == list(range(30, 40))
    assert numbers(pieces[4].frames)[:9] == list(range(41, 50))


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
    assert len(said) == 4 * len(paths) and "Traceback" not in done.stderr
    for path in paths:
        error = f"True {path}: can't be read: Input/output error"
        assert [said.pop(0) for _ in range(4)] == ["frames 12", "frames 4", error, error]


# ---- which files ----


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
    [segment] = load_annotations(root / "x.csv", None, "all").segments
    assert os.path.samefile(segment.path, root / name)
    [folder] = search.list_videos([unicodedata.normalize(disk, str(root / asked_name))])
    assert list(folder.stamps) == [name]


# ---- the frame cache ----


@pytest.fixture
def film(tmp_path):
    """Large enough for threads, which a conversion may leave behind: a forked process lacks them"""
    write_video(tmp_path / "film.mp4", numbered(40, 320), g=8)
    return Segment(tmp_path / "film.mp4")


def test_cache_hit_equals_decoding_and_does_not_decode(film, tmp_path, capfd):
    cache = FrameCache(tmp_path / "c", 6)
    first = cache.read(film)
    assert numbers(first) == sample_indices(40, 6)
    stat = os.stat(film.path)
    with open(film.path, "wb") as file:  # same size and time, nothing to decode in it
        file.write(bytes(stat.st_size))
    os.utime(film.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # the same pixels whether it came from the video or the cache
    assert torch.equal(cache.read(film), first)
    for other, span in ((FrameCache(tmp_path / "c", 7), film), (cache, film._replace(start=1.0))):
        with pytest.raises(DataError, match="film.mp4"):
            other.read(span)
    os.utime(film.path)  # a changed video is decoded again
    with pytest.raises(DataError, match="film.mp4"):
        cache.read(film)
    assert capfd.readouterr() == ("", "") and len(os.listdir(tmp_path / "c")) == 1


def test_damaged_cache_files_are_replaced(film, tmp_path):
    cache = FrameCache(tmp_path / "c", 4)
    first = cache.read(film)
    file = next((tmp_path / "c").iterdir())
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-200] ^= 255
    for damage in (b"", b"\n", whole[:50], whole[:-100], flipped, b"[]\n" + whole, b"1\n"):
        file.write_bytes(damage)
        assert torch.equal(cache.read(film), first) and file.read_bytes() == whole


def with_full_disk(folder, segments, out):
    if folder.name == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # a file can't grow beyond 500 bytes
    cache = FrameCache(folder, 4)
    out.put([numbers(cache.read(segment)) for segment in segments])


def test_processes_share_a_cache_and_do_without(film, tmp_path, capfd, soon):
    (tmp_path / "file").write_text("mine")
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    segments = [film._replace(start=s / 2) for s in range(10)] * 2
    wanted = [numbers(read_frames(segment, 4)) for segment in segments]
    for name in ("shared", "shared", "full", "file"):
        args = (tmp_path / name, segments, out)
        context.Process(target=with_full_disk, args=args, daemon=True).start()
    assert [out.get() for _ in range(4)] == [wanted] * 4
    assert len(os.listdir(tmp_path / "shared")) == 10 and os.listdir(tmp_path / "full") == []
    said = sorted(capfd.readouterr().err.splitlines())
    assert len(said) == 2 and (tmp_path / "file").read_text() == "mine"
    assert f"frame cache {tmp_path}/file can't be written (File exists): videos are" in said[0]
    assert f"frame cache {tmp_path}/full can't be written (File too large): videos" in said[1]
