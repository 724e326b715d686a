"""Videos of every container, all data sets' files, the frame cache, and users' mistakes."""

import contextlib
import csv
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter

import av
import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader
from videos import numbered, numbers, write_video

import data
from data import PairDataset, VideoDataset, load_annotations, load_split, present
from lib import shapes, tables
from lib import video as decode
from lib.common import DataError, program
from lib.video import FrameCache, Segment, read_frames, sample_indices


def test_sampling_rule():
    assert sample_indices(120, 12) == [4 + 10 * i for i in range(12)]
    assert sample_indices(10, 4) == [0, 3, 5, 8]  # [0,2) [2,5) [5,7) [7,10): (start + end) // 2
    assert sample_indices(3, 5) == [0, 1, 2, 2, 2]
    assert sample_indices(1, 2) == [0, 0]
    for n in range(12, 200):
        # as the paper's code states it
        bounds = [int(x) for x in torch.linspace(0, n, 13, dtype=torch.float64) + 1e-9]
        assert sample_indices(n, 12) == [(a + b - 1) // 2 for a, b in zip(bounds, bounds[1:])]


# ---- decoding ----

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


FILES = {  # containers and codecs that people have; 100 frames at 25 per second
    "bframes.mp4": dict(bf=3, g=30),
    "opengop.mp4": {"bf": 3, "g": 20, "x264-params": "open-gop=1:b-pyramid=normal"},
    "fragmented.mp4": dict(bf=2, g=25),
    "x.mkv": dict(bf=2, g=25),
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": 8},
    "mpeg4.avi": dict(codec="mpeg4", bf=2),
    "x.ts": dict(bf=2, g=25),
    "x.mpg": dict(codec="mpeg2video", bf=2),
}


def make(folder, name, n=100):
    path = folder / f"{n}_{name}"
    if not path.exists():
        write_video(path, numbered(n), fps=25, **FILES[name])
        if name.startswith("fragmented"):  # as cameras and browsers write it: no index at all
            options = {"movflags": "frag_keyframe+empty_moov"}
            with (
                av.open(str(path)) as source,
                av.open(str(path) + ".mp4", "w", options=options) as out,
            ):
                stream = out.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        out.mux(packet)
            os.replace(str(path) + ".mp4", path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_exact_frames(folder, name):
    path = make(folder, name)
    for T in (1, 12, 110):
        assert numbers(read_frames(Segment(path), T)) == sample_indices(100, T)
    assert torch.equal(read_frames(path, 12), read_frames(Segment(str(path)), 12))
    assert torch.equal(read_frames(str(path), 12), read_frames(path, 12))
    x = read_frames(Segment(str(path), 1.0, 2.0), 5)
    assert x.dtype == torch.uint8 and x.shape == (5, 3, 64, 64) and x.is_contiguous()
    assert numbers(x) == [25 + i for i in sample_indices(25, 5)]
    assert numbers(read_frames(Segment(path, 3.5), 4)) == [88 + i for i in sample_indices(12, 4)]
    assert numbers(read_frames(Segment(path, None, 0.2), 8)) == [0, 1, 2, 3, 4, 4, 4, 4]
    # than its annotation says, as some of didemo
    shorter = read_frames(Segment(path, 2.0, 31.0), 5)
    assert numbers(shorter) == [50 + i for i in sample_indices(50, 5)]
    with pytest.raises(DataError, match=f"{name}: ends after 4.0 s, before the clip's start at 9"):
        read_frames(Segment(path, 9.0, 10.0), 4)


def test_the_fast_way_is_taken_and_agrees(folder, monkeypatch):
    path = make(folder, "bframes.mp4")
    fast = read_frames(Segment(path), 12)
    with monkeypatch.context() as m:
        m.setattr(decode, "_count_frames", None)  # would raise
        assert torch.equal(read_frames(Segment(path), 12), fast)
    monkeypatch.setattr(decode, "_seek_frames", lambda *_: [None])
    assert torch.equal(read_frames(Segment(path), 12), fast)


READ_THEN_FORK = """
import sys
from torch.utils.data import DataLoader
from lib.video import Segment, read_frames
def read(paths):
    return read_frames(Segment(paths[0]), 12)
first = read(sys.argv[1:])
workers = dict(num_workers=2, multiprocessing_context="fork", timeout=30)
for frames in DataLoader(sys.argv[1:] * 4, collate_fn=read, **workers):
    assert frames.equal(first)
    print("equal", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no worker is forked")
def test_workers_read_after_the_process_that_forks_them_has(tmp_path):
    """Threads that a conversion leaves behind are missing in the copy: it would wait for them."""
    write_video(tmp_path / "x.mp4", numbered(40, 320))
    command = [sys.executable, "-c", READ_THEN_FORK, str(tmp_path / "x.mp4")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 4


def test_variable_frame_rate(tmp_path):
    path, frames = tmp_path / "vfr.mp4", numbered(60)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.codec_context.thread_type = "yuv420p", "FRAME"
        for i, x in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(x.numpy(), format="rgb24")
            frame.pts = i if i < 30 else 30 + 4 * (i - 30)  # slows down to a quarter
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    # by frames, not by time
    assert numbers(read_frames(Segment(path), 12)) == sample_indices(60, 12)
    assert numbers(read_frames(Segment(path, 1.2, None), 3)) == [
        30 + i for i in sample_indices(30, 3)
    ]


@pytest.mark.parametrize("angle", [90, -90])
def test_rotation_and_odd_metadata(tmp_path, angle):
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "qqqqqqqq"
        stream = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(angle)  # counter-clockwise
        x = torch.zeros(32, 64, 3, dtype=torch.uint8)
        x[:, :32] = 250  # the left half is light
        for _ in range(4):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(x.numpy(), format="rgb24")))
        file.mux(stream.encode())
    assert b"qqqqqqqq" in path.read_bytes()
    # a title that is not UTF-8
    path.write_bytes(path.read_bytes().replace(b"qqqqqqqq", b"caf\xe9 \xff\xfe\xe9"))
    y = read_frames(Segment(path), 2)
    assert y.shape == (2, 3, 64, 32)
    y = y if angle == 90 else y.flip(2)
    assert y[:, :, 36:].min() > 220 and y[:, :, :28].max() < 30  # left has become bottom, or top


def test_cover_picture_is_not_the_video(folder, tmp_path):
    """An mkv/mp4 whose first video stream is a still picture; and one that is nothing else."""
    picture = tmp_path / "cover.png"
    write_video(picture, numbered(1), codec="png", container="image2", pix_fmt="rgb24")
    for wanted in (True, False):
        path = tmp_path / f"cover{wanted}.mp4"
        film = str(make(folder, "bframes.mp4"))
        with av.open(film) as film, av.open(str(picture)) as still, av.open(str(path), "w") as out:
            cover = out.add_stream_from_template(still.streams.video[0])
            cover.disposition = av.stream.Disposition.attached_pic
            sources = [(still, cover)]
            if wanted:
                sources.append((film, out.add_stream_from_template(film.streams.video[0])))
            for source, stream in sources:
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        out.mux(packet)
        if wanted:
            assert numbers(read_frames(Segment(path), 12)) == sample_indices(100, 12)
        else:
            with pytest.raises(DataError, match="coverFalse.mp4"):
                read_frames(Segment(path), 12)


def test_names_that_look_like_something_else(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "concat:a.mp4", "%03d.mp4", "-i.mp4", "a #1?.mp4"):
        shutil.copy(make(folder, "bframes.mp4"), name)
        assert numbers(read_frames(Segment(name), 4)) == sample_indices(100, 4), name


def bad_videos(folder, tmp_path):
    good = make(folder, "bframes.mp4").read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(good[:len(good) // 2])  # its index is at the end
    (tmp_path / "cut_index.mp4").write_bytes(good[:-300])
    (tmp_path / "header.avi").write_bytes(make(folder, "mpeg4.avi").read_bytes()[:2000])
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 50)
    noise = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "noise.mp4").write_bytes(bytes(noise.tolist()))
    write_video(
        tmp_path / "picture.png", numbered(1), codec="png", container="image2", pix_fmt="rgb24"
    )
    os.replace(tmp_path / "picture.png", tmp_path / "picture.mp4")
    with av.open(str(tmp_path / "audio.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        for k in range(4):
            frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            frame.sample_rate, frame.pts = 16000, 1024 * k
            frame.planes[0].update(bytes(4096))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (tmp_path / "folder.mp4").mkdir()
    return [
        "missing.mp4",
        "empty.mp4",
        "cut.mp4",
        "cut_index.mp4",
        "header.avi",
        "text.mp4",
        "noise.mp4",
        "picture.mp4",
        "audio.mp4",
        "folder.mp4",
    ]


def test_bad_videos_name_the_file(folder, tmp_path):
    for name in bad_videos(folder, tmp_path):
        with pytest.raises(DataError) as e:
            read_frames(Segment(str(tmp_path / name)), 4)
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value), name


def test_damaged_videos_give_what_they_hold(folder, tmp_path):
    for name in ("x.mkv", "mpeg4.avi", "x.ts", "vp9.webm"):
        body = make(folder, name).read_bytes()
        (tmp_path / name).write_bytes(body[:len(body) * 6 // 10])
        got = numbers(read_frames(Segment(tmp_path / name), 8))
        assert len(got) == 8 and got == sorted(got) and 8 < got[-1] < 90, (name, got)
    g = torch.Generator().manual_seed(0)
    for name in FILES:  # noise in the middle: decoders raise, repair, or lose the frame
        hole = bytearray(make(folder, name).read_bytes())
        a = len(hole) * 4 // 10
        hole[a:a + 700] = bytes(torch.randint(0, 256, (700,), generator=g).tolist())
        (tmp_path / name).write_bytes(hole)
        x = read_frames(Segment(str(tmp_path / name)), 8)
        assert x.shape == (8, 3, 64, 64) and len(set(numbers(x))) > 2, (name, numbers(x))


def test_any_damage_gives_frames_or_a_data_error(folder, tmp_path):
    g = torch.Generator().manual_seed(1)
    random = lambda n: torch.randint(0, n, (1,), generator=g).item()
    outcomes = Counter()
    for k in range(200):
        name = list(FILES)[k % len(FILES)]
        body, file = bytearray(make(folder, name).read_bytes()), tmp_path / name
        a, n = random(len(body)), random(600)
        body[a:None if k % 3 == 0 else a + n] = bytes(0 if k % 3 == 0 else n)  # cut off, or a hole
        file.write_bytes(body)
        try:
            assert read_frames(Segment(str(file)), 4).shape == (4, 3, 64, 64)
            outcomes["read"] += 1
        except DataError as e:
            assert str(file) in str(e)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 20


def test_frames_of_other_sizes_are_brought_to_the_first():
    a, b = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(3, 4, 6, dtype=torch.uint8)
    got = decode._fill([None, a, None, b])
    assert [x.shape for x in got] == [(3, 8, 8)] * 4
    assert got[3].min() == 1
    assert got[2] is a
    assert got[0] is a


# ---- transforms and datasets ----

def test_transforms():
    x = torch.randint(
        0, 256, (5, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for transform in (data.train_transform(32), data.test_transform(32)):
        y = transform(x)
        assert y.shape == (5, 3, 32, 32) and y.dtype == torch.uint8
    same = x[:1].expand(5, -1, -1, -1)
    y = data.train_transform(32)(same)
    assert (y == y[:1]).all()  # one crop for the whole video
    assert torch.equal(data.test_transform(32)(x), data.test_transform(32)(x))


def pair_items(dataset, items, workers):
    return list(
        DataLoader(
            dataset, sampler=items, batch_size=None, num_workers=workers, collate_fn=lambda x: x
        )
    )


def test_augmentation_depends_on_seed_epoch_and_item_only(folder):
    clips = [Segment(str(make(folder, "bframes.mp4"))), Segment(str(make(folder, "mpeg4.avi")))]
    ann = data.Annotations(clips, ["a", "b", "c"], [0, 1, 1])
    dataset = PairDataset(ann, 4, data.train_transform(32), seed=3)
    items = [(0, 0), (0, 1), (1, 0), (0, 2), (0, 0)]
    here, there = pair_items(dataset, items, 0), pair_items(dataset, items, 2)
    state = torch.get_rng_state()
    again = [dataset[item] for item in reversed(items)][::-1]
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(here, there, again):
        assert a[1:] == b[1:] == c[1:] and torch.equal(a[0], b[0]) and torch.equal(a[0], c[0])
    assert [caption for _, caption in here] == ["a", "b", "a", "c", "a"]
    assert not torch.equal(here[0][0], here[2][0])  # another epoch
    assert not torch.equal(
        here[0][0], PairDataset(ann, 4, data.train_transform(32), seed=4)[0, 0][0]
    )
    pixels, _ = PairDataset(ann, 4, data.train_transform(32), seed=2 ** 62)[5, 0]
    assert pixels.shape == (4, 3, 32, 32)


def test_augmentation_leaves_the_gpu_generator_alone(folder, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(1)
    # what the dataset must not do: with --workers 0 it runs in the process that trains
    assert seeded == [1]
    ann = data.Annotations([Segment(str(make(folder, "bframes.mp4")))], ["a"], [0])
    assert PairDataset(ann, 4, data.train_transform(32))[0, 0][1] == "a" and seeded == [1]


def test_bad_video_is_a_value(folder, tmp_path):
    clips = [Segment(str(make(folder, "bframes.mp4"))), Segment(str(tmp_path / "gone.mp4"))]
    pairs = PairDataset(data.Annotations(clips, ["a", "b"], [0, 1]), 4, data.test_transform(32))
    for workers in (0, 1):
        good, bad = pair_items(VideoDataset(clips, 4, data.test_transform(32)), [0, 1], workers)
        assert good.shape == (4, 3, 32, 32)
        assert isinstance(bad, DataError)
        assert "gone.mp4" in str(bad)
        good, bad = pair_items(pairs, [(0, 0), (0, 1)], workers)
        assert good[1] == "a" and isinstance(bad, DataError) and "gone.mp4" in str(bad)


# ---- the frame cache ----

@pytest.fixture
def film(folder, tmp_path):
    path = tmp_path / "film.mp4"
    shutil.copy(make(folder, "bframes.mp4"), path)
    return Segment(str(path))


def close(a, b):
    # JPEG's loss on hard edges
    return a.shape == b.shape and (a.float() - b.float()).abs().mean() < 4


def test_cache_hit_equals_decoding_and_does_not_decode(film, tmp_path, capfd):
    cache, frames = FrameCache(tmp_path / "c", 6), read_frames(film, 6)
    first = cache.read(film)
    assert close(first, frames) and numbers(first) == numbers(frames) and first.dtype == torch.uint8
    stat = os.stat(film.path)
    with open(film.path, "wb") as file:  # same size and time, nothing to decode in it
        file.write(bytes(stat.st_size))
    os.utime(film.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # the same pixels whether it came from the video or the cache
    assert torch.equal(cache.read(film), first)
    assert torch.equal(FrameCache(tmp_path / "c", 6).read(film), first)  # a later run
    with pytest.raises(DataError, match="film.mp4"):
        FrameCache(tmp_path / "c", 7).read(film)  # another T is another file
    with pytest.raises(DataError, match="film.mp4"):
        cache.read(Segment(film.path, 1.0, None))  # another span too
    os.utime(film.path)
    with pytest.raises(DataError, match="film.mp4"):
        cache.read(film)  # a changed video is decoded again
    assert capfd.readouterr() == ("", "") and len(os.listdir(tmp_path / "c")) == 1


def test_cache_sees_a_changed_video(film, folder, tmp_path):
    cache = FrameCache(tmp_path / "c", 4)
    assert numbers(cache.read(film)) == sample_indices(100, 4)
    shutil.copy(make(folder, "bframes.mp4", 40), film.path)
    assert numbers(cache.read(film)) == sample_indices(40, 4)
    os.unlink(film.path)
    with pytest.raises(DataError, match="missing"):
        cache.read(film)


def test_large_videos_are_cached_small(tmp_path):
    write_video(
        tmp_path / "large.mp4",
        torch.full((4, 300, 400, 3), 90, dtype=torch.uint8),
        preset="ultrafast",
    )
    frames = FrameCache(tmp_path / "c", 2).read(Segment(str(tmp_path / "large.mp4")))
    assert frames.shape == (2, 3, 256, 341)


def test_corrupt_cache_file_is_replaced(film, tmp_path):
    cache = FrameCache(tmp_path / "c", 4)
    first = cache.read(film)
    file = next((tmp_path / "c").iterdir())
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-200] ^= 255
    for damage in (
        b"",
        b"\n",
        whole[:50],
        whole[:-100],
        bytes(flipped),
        b"[]\n" + whole,
        b"1\n",
        bytes(3000),
    ):
        file.write_bytes(damage)
        assert torch.equal(cache.read(film), first) and file.read_bytes() == whole


def read_many(folder, clips, out):
    torch.set_num_threads(1)
    out.put(sum(sum(numbers(FrameCache(folder, 4).read(clip))) for clip in clips))


def test_two_processes_share_a_cache(film, tmp_path):
    context = multiprocessing.get_context("fork")
    clips, out = [Segment(film.path, s / 10) for s in range(10)] * 2, context.Queue()
    people = [
        context.Process(target=read_many, args=(tmp_path / "c", clips, out)) for _ in range(2)
    ]
    [p.start() for p in people]
    want = sum(sum(numbers(read_frames(clip, 4))) for clip in clips)
    assert [out.get(timeout=60) for _ in people] == [want, want]
    [p.join() for p in people]
    assert len(os.listdir(tmp_path / "c")) == 10 and not list((tmp_path / "c").glob("*.part"))


def test_unwritable_cache_warns_once(film, tmp_path, capfd):
    (tmp_path / "file").write_text("")  # below a regular file not even root can write
    cache = FrameCache(tmp_path / "file" / "c", 4)
    frames = read_frames(film, 4)
    assert close(cache.read(film), frames) and close(cache.read(film), frames)
    err = capfd.readouterr().err
    assert err.count("\n") == err.count(f"warning: frame cache {tmp_path}/file/c") == 1
    dataset = VideoDataset([film] * 3, 4, data.test_transform(64), cache.folder)
    assert all(close(x, frames) for x in pair_items(dataset, [0, 1, 2], 2))
    assert capfd.readouterr().err == err


def with_full_disk(folder, clip, out):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # a file can't grow beyond 500 bytes
    torch.set_num_threads(1)
    cache = FrameCache(folder, 4)
    out.put([numbers(cache.read(clip)) for _ in range(2)])


@contextlib.contextmanager
def on_a_full_disk(path, flush=True):
    yield "/dev/full"


def test_the_warning_says_what_is_wrong_with_the_cache(film, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("mine")
    assert close(FrameCache(tmp_path / "file", 4).read(film), read_frames(film, 4))
    assert (tmp_path / "file").read_text() == "mine"
    assert capfd.readouterr().err == (
        f"warning: frame cache {tmp_path}/file can't be written (it is a file): "
        "videos are decoded each time\n"
    )
    monkeypatch.setattr(decode, "written_whole", on_a_full_disk)
    cache = FrameCache(tmp_path / "c", 4)
    assert close(cache.read(film), read_frames(film, 4))
    assert close(cache.read(film), read_frames(film, 4))
    assert capfd.readouterr().err == (
        f"warning: frame cache {tmp_path}/c can't be written (No space left on device): "
        "videos are decoded each time\n"
    )


def test_full_disk_falls_back_to_decoding(film, tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    child = context.Process(target=with_full_disk, args=(tmp_path / "c", film, out))
    child.start()
    assert out.get(timeout=60) == [sample_indices(100, 4)] * 2
    child.join()
    assert os.listdir(tmp_path / "c") == []  # no half-written file stays
    assert capfd.readouterr().err.count("warning: frame cache") == 1


# ---- your own csv ----

def table(path, *rows, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)
    return str(path)


def test_csv(tmp_path):
    name = table(tmp_path / "my.csv", ["video", "caption", "split", "start", "end"],
                 ["a.mp4", "Ein Café, \"rot\"\nund blau", "train", "", ""],
                 ["a.mp4", "again", "train", "", ""], ["a.mp4", "a part", "train", "1.5", "3"],
                 ["/abs/b.mp4", " b ", "test", "", "2"],
                 encoding="utf-8-sig")  # as Excel writes it: with a byte order mark
    train = load_annotations(name, split="train")
    assert relative(train, tmp_path) == [("a.mp4", None, None), ("a.mp4", 1.5, 3.0)]
    assert train.owner == [0, 0, 1]
    assert train.captions == ['Ein Café, "rot"\nund blau', "again", "a part"]
    assert train.where[1] == f"{name}, row 5"
    assert load_annotations(name, split="test").segments == [Segment("/abs/b.mp4", None, 2.0)]
    assert load_annotations(name, split="test").captions == ["b"]
    assert load_annotations(name, split="val").segments == []
    assert len(load_annotations(name, split="all").captions) == 4
    assert load_annotations(name, "/elsewhere").segments[0].path == "/elsewhere/a.mp4"
    assert load_split(name, split="train").captions == train.captions


@pytest.mark.parametrize(
    "rows, message",
    [
        ([["file", "caption"], ["a", "b"]], "has no column video"),
        ([["video", "text"], ["a", "b"]], "has no column caption"),
        ([], "has no column video, caption"),
        ([["video;caption"], ["a.mp4;x"]], "its first line is ['video;caption']"),
        ([["video", "caption"]], "has a header, but no row below it"),
        ([["video", "caption", "video"], ["a.mp4", "x", "b.mp4"]], "has the column video 2 times"),
        ([["video", "caption"], ["a.mp4", "two\nlines"], ["b.mp4", ""]], "row 4: empty caption"),
        ([["video", "caption"], ["a.mp4", ""], ["b.mp4", "x"]], "row 2: empty caption"),
        ([["video", "caption"], ["a.mp4", "&nbsp; &amp;nbsp;"]], "row 2: empty caption"),
        (
            [["video", "caption"], [], ["a.mp4", "two\nlines", "too much"], ["b.mp4", "x"]],
            "row 3: not as many fields",
        ),
        (
            [["video", "caption"], ["a.mp4", "x"], ["b.mp4", "y" * 200_000]],
            "row 3: field larger than",
        ),
        ([["video", "caption"], ["a.mp4", "x"], ["a.mp4", " "]], "row 3: empty caption"),
        ([["video", "caption"], ["", "x"]], "row 2: empty video"),
        ([["video", "caption"], ["a.mp4"]], "row 2: not as many fields"),
        ([["video", "caption"], ["a.mp4", "one", "two"]], "row 2: not as many fields"),
        ([["video", "caption", "split"], ["a.mp4", "one"]], "row 2: not as many fields"),
        (
            [["video", "caption", "split"], ["a.mp4", "one", "training"]],
            "row 2: split 'training' must be",
        ),
        ([["video", "caption", "start"], ["a.mp4", "x", "soon"]], "row 2: start 'soon'"),
        (
            [["video", "caption", "start", "end"], ["a.mp4", "x", "3", "3"]],
            "row 2: end 3.0 must come after start 3.0",
        ),
        ([["video", "caption", "start"], ["a.mp4", "x", "-1"]], "row 2: end None"),
        ([["video", "caption", "end"], ["a.mp4", "x", "nan"]], "row 2: end nan"),
    ],
)
def test_csv_mistakes(tmp_path, rows, message):
    name = table(tmp_path / "my.csv", *rows)
    with pytest.raises(DataError) as e:
        load_annotations(name)
    assert f"{name}" in str(e.value) and message in str(e.value)


@pytest.mark.parametrize("text, row", [
    ('a.mp4,x\nb.mp4,"never closed\nc.mp4,y\nd.mp4,z\n', 3),        # would swallow c and d
    ('a.mp4,"x\ny"\nb.mp4,"never closed\nc.mp4,"closed here"\n', 4),  # would swallow half of c
    ('a.mp4,"a "quoted" word"\nb.mp4,x\n', 2),
    ('a.mp4,x\n' + 'b.mp4,"never closed\n' + "c.mp4,y\n" * 30000, 3),  # longer than a field may be
])
def test_a_quote_in_the_wrong_place_says_where(tmp_path, text, row):
    (tmp_path / "my.csv").write_text("video,caption\n" + text)
    with pytest.raises(DataError, match=f"my.csv, row {row}: .*double quotes"):
        load_annotations(tmp_path / "my.csv")


def test_rows_are_named_by_the_line_they_begin_in(tmp_path):
    name = table(
        tmp_path / "my.csv",
        ["video", " caption "],
        ["a.mp4", "one\ntwo"],
        [],
        ["b.mp4", "three\nfour\nfive"],
        ["c.mp4", "six"],
    )
    ann = load_annotations(name)
    lines = open(name).read().splitlines()
    for where, clip in zip(ann.where, ann.segments):
        assert lines[int(where.split()[-1]) - 1].startswith(os.path.basename(clip.path))


def test_csv_files_that_are_none(tmp_path):
    (tmp_path / "open.csv").write_text('video,caption\na.mp4,"never closed\n' + "b.mp4,x\n" * 30000)
    # nor is this quote
    (tmp_path / "header.csv").write_text('"video,caption\n' + "a.mp4,x\n" * 30000)
    assert program(lambda: data.main(["check", "--data", str(tmp_path / "header.csv")])) == 2
    (tmp_path / "latin.csv").write_bytes("video,caption\na.mp4,café\n".encode("latin-1"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(
        DataError, match="latin.csv, row 2: not UTF-8 text .byte 0xe9.; save it as UTF-8"
    ):
        load_annotations(tmp_path / "latin.csv")
    for name in ("open.csv", "header.csv", "latin.csv", "folder.csv", "gone.csv"):
        for load in (load_annotations, load_split):
            with pytest.raises(DataError, match=name):
                load(tmp_path / name)
    with pytest.raises(DataError, match="unknown split 'dev'"):
        load_annotations(tmp_path / "open.csv", split="dev")
    with pytest.raises(DataError, match="unknown data set 'mrsvtt': choose shapes, msrvtt"):
        load_annotations("mrsvtt")


def test_videos_are_held_out_of_a_csv_without_validation(tmp_path):
    rows = [(f"v{i // 2}.mp4", "x", "test" if i > 15 else "train") for i in range(20)]
    name = table(tmp_path / "my.csv", ["video", "caption", "split"], *rows)
    train, val, test = (load_split(name, None, split, 3) for split in ("train", "val", "test"))
    assert (len(train.segments), len(val.segments), len(test.segments)) == (5, 3, 2)
    assert not set(val.segments) & set(train.segments + test.segments)
    assert len(load_split(name).segments) == 8 and not load_split(name, None, "val").segments
    with pytest.raises(DataError, match="--val-videos 8: .*my.csv has 8 training videos"):
        load_split(name, None, "train", 8)
    name = table(tmp_path / "own.csv", ["video", "caption", "split"], *rows, ("v.mp4", "x", "val"))
    assert len(load_split(name, None, "train", 3).segments) == 8
    assert len(load_split(name, None, "val", 3).segments) == 1


def test_csv_without_split_column_is_divided_by_name(tmp_path):
    rows = [[f"v{i // 2}.mp4", f"caption {i}"] for i in range(400)]
    name = table(tmp_path / "my.csv", ["video", "caption"], *rows)
    # as the file says: every row in any split
    assert len(load_annotations(name, split="val").captions) == 400
    parts = {s: load_split(name, split=s) for s in data.SPLITS}
    paths = {s: {c.path for c in ann.segments} for s, ann in parts.items()}
    assert sum(map(len, paths.values())) == len(set.union(*paths.values())) == 200
    assert 140 <= len(paths["train"]) <= 175
    assert len(paths["val"]) >= 10
    assert len(paths["test"]) >= 10
    for ann in parts.values():
        number = [int(os.path.basename(c.path)[1:-4]) for c in ann.segments]
        assert all(int(c.split()[1]) // 2 == number[o] for c, o in zip(ann.captions, ann.owner))
        assert [int(w.split()[-1]) for w in ann.where] == [2 + 2 * n for n in number]
    more = tmp_path / "elsewhere"
    more.mkdir()
    grown = table(
        more / "other.csv",
        ["video", "caption"],
        *[[f"new{i}.mp4", "x"] for i in range(50)],
        *reversed(rows),
    )
    for split in data.SPLITS:  # more rows, in another order, in another folder: no video moves
        now = {os.path.basename(c.path) for c in load_split(grown, split=split).segments}
        assert {os.path.basename(p) for p in paths[split]} <= now


def test_a_csv_is_divided_the_same_in_any_locale():
    """Without UTF-8 in file names, é has another byte there, or none."""
    code = "from lib.tables import split_by_name; print(split_by_name(['caf\\xe9.mp4', 'b', 'c']))"
    found = set()
    for locale in ("C", "C.UTF-8"):
        env = dict(os.environ, LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env,
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_a_split_column_is_seen_without_parsing_the_whole_csv(tmp_path, monkeypatch):
    rows = [["v.mp4", "x", "train"]] * 1000
    lines = []
    reader = csv.reader

    class Reader:
        line_num = 0

        def __init__(self, *args, **settings):
            self.rows = reader(*args, **settings)

        def __iter__(self):
            for row in self.rows:
                lines.append(row)
                yield row

    for header, expected in ((["video", "caption", "split"], True), (["video", "a", "b"], False)):
        name = table(tmp_path / "my.csv", header, *rows)
        monkeypatch.setattr(csv, "reader", Reader)
        assert tables.has_splits(name) == expected
        monkeypatch.undo()
        assert len(lines) == 2
        lines.clear()


def divided(tmp_path, files):
    """How a csv without splits is divided. -> {split: set of file names}; no video in two."""
    rows = [[file, f"{file} {k}"] for k in range(2) for file in files]
    name = table(tmp_path / "my.csv", ["video", "caption"], *rows)
    parts = {s: load_split(name, split=s) for s in data.SPLITS}
    assert sum(len(ann.captions) for ann in parts.values()) == 2 * len(files)
    names = {s: {os.path.basename(c.path) for c in ann.segments} for s, ann in parts.items()}
    assert set.union(*names.values()) == set(files) and sum(map(len, names.values())) == len(files)
    return names


def test_a_csv_is_divided_by_its_content_alone(tmp_path):
    """Names may be absolute: it matters neither where the csv lies nor --root."""
    rows = [["video", "caption"], *([f"{tmp_path}/v/{i}.mp4", f"caption {i}"] for i in range(80))]
    (tmp_path / "other").mkdir()
    names = table(tmp_path / "my.csv", *rows), table(tmp_path / "other" / "my.csv", *rows)
    for split in data.SPLITS:
        one, other = (load_split(name, split=split) for name in names)
        assert one.captions == other.captions == load_split(names[0], "/root", split).captions


def test_a_small_csv_without_splits_can_train_and_test(tmp_path):
    for n in (2, 3, 4, 8, 20, 40):
        for prefix in "abcde":
            files = [f"{prefix}{i}.mp4" for i in range(n)]
            now = divided(tmp_path, files)
            assert min(len(now["train"]), len(now["test"])) >= min(2, n // 2)
            grown = divided(tmp_path, files[::-1] + [f"new{i}.mp4" for i in range(200)])
            for split, others in (("test", ("train", "val")), ("train", ("test", "val"))):
                moved = [x for x in now[split] if any(x in grown[other] for other in others)]
                # only those that made up the two move
                assert len(moved) <= 2 and (not moved or len(now[split]) <= 2)
    name = table(
        tmp_path / "one.csv", ["video", "caption", "start"], ["v0.mp4", "x", 0], ["v0.mp4", "y", 5]
    )
    with pytest.raises(DataError, match="one.csv has one video and no split column"):
        [load_split(name, split=s) for s in ("train", "test")]


def test_clips_of_one_file_stay_in_one_split(tmp_path):
    rows = [[f"v{i % 3}.mp4", "x", i] for i in range(30)]
    name = table(tmp_path / "my.csv", ["video", "caption", "start"], *rows)
    paths = [{c.path for c in load_split(name, split=s).segments} for s in ("train", "test")]
    assert all(paths) and not set.intersection(*paths)


# ---- the data sets' files ----

def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def relative(ann, root):
    return [(os.path.relpath(c.path, root), c.start, c.end) for c in ann.segments]


def paths(ann, root):
    return [os.path.relpath(c.path, root) for c in ann.segments]


def msrvtt(root):
    videos = [dict(video_id=f"video{i}", split="train") for i in range(12)]
    sentences = []
    for k in range(3):
        sentences += [
            dict(caption=f"sentence {k} of {i}", video_id=f"video{i}", sen_id=3 * i + k)
            for i in range(12)
        ]
    (root / "MSRVTT_data.json").write_text(json.dumps(dict(videos=videos, sentences=sentences)))
    table(root / "MSRVTT_train.9k.csv", ["video_id"], *[[f"video{i}"] for i in range(10)])
    table(root / "MSRVTT_train.7k.csv", ["video_id"], *[[f"video{i}"] for i in range(7)])
    table(root / "MSRVTT_JSFUSION_test.csv", ["key", "vid_key", "video_id", "sentence"],
          ["ret0", "msr11", "video11", "a, b"], ["ret1", "msr10", "video10", "c"])
    return root


def test_msrvtt(tmp_path):
    root = msrvtt(tmp_path)
    touch(root, "videos/all/video1.mp4", "video2.mp4")
    train = load_annotations("msrvtt", root)
    assert len(train.segments) == 10 and len(train.captions) == 30
    names = [os.path.basename(c.path) for c in train.segments]
    assert all(c.endswith(f"of {names[o][5:-4]}") for c, o in zip(train.captions, train.owner))
    assert paths(train, root)[:3] == ["videos/video0.mp4", "videos/all/video1.mp4", "video2.mp4"]
    assert len(load_annotations("msrvtt-7k", root).segments) == 7
    assert load_annotations("msrvtt", root, "val").segments == []
    test = load_split("msrvtt", root, "test")
    assert test.captions == ["a, b", "c"]
    assert paths(test, root) == ["videos/video11.mp4", "videos/video10.mp4"]
    # val_videos: held out of train by a seeded choice
    held, kept = load_split("msrvtt", root, "val", 3, 5), load_split("msrvtt", root, "train", 3, 5)
    assert len(held.segments) == 3 and len(held.captions) == 9
    assert len(kept.segments) == 7 and not set(held.segments) & set(kept.segments)
    assert (
        held == load_split("msrvtt", root, "val", 3, 5) != load_split("msrvtt", root, "val", 3, 6)
    )
    assert load_split("msrvtt", root, "val").segments == []
    assert load_split("msrvtt", root, "train") == train
    with pytest.raises(DataError, match="--val-videos 10: msrvtt has 10"):
        load_split("msrvtt", root, "train", 10)


def test_missing_and_broken_annotation_files(tmp_path):
    with pytest.raises(DataError, match="nowhere is missing.*--root"):
        load_annotations("msrvtt", tmp_path / "nowhere")
    root = msrvtt(tmp_path)
    for content, message in (
        (None, f"{root}/MSRVTT_data.json is missing: it belongs to msrvtt"),
        ("{", "not valid JSON (Expecting property name enclosed in double quotes: line 1"),
        ("[]", "JSON object"),
        ("{}", "'sentences'"),
        ('{"sentences": [{"video_id": "video1"}]}', "sentence 1: 'caption' is missing"),
        ('{"sentences": [{"video_id": "video1", "caption": ""}]}', "sentence 1: empty caption"),
        (
            '{"sentences": [{"video_id": "video1", "caption": "x"}, {}]}',
            "sentence 2: 'video_id' is missing",
        ),
    ):
        (root / "MSRVTT_data.json").unlink() if content is None else (
            root / "MSRVTT_data.json"
        ).write_text(content)
        with pytest.raises(DataError, match="MSRVTT_data.json") as e:
            load_annotations("msrvtt", root)
        assert message in str(e.value)
        assert (content is None) == str(e.value).startswith(message)


GOOD = "0001_American_Beauty_00.00.51.926-00.00.54.129"


def lsmdc_row(clip, sentence="SOMEONE waits."):
    return "\t".join(
        [clip, "00.00.51.926", "00.00.54.129", "00.00.51.926", "00.00.54.129", sentence]
    )


def test_lsmdc(tmp_path):
    rows = [lsmdc_row(GOOD),
            lsmdc_row('"3002_30_MINUTES_OR_LESS_00.00.05.016-00.00.06.821', 'He says "no'),
            lsmdc_row(GOOD, "Again\r"), lsmdc_row("1012_Unbreakable_00.05.16.065-00.05.21.941")]
    (tmp_path / "LSMDC16_annos_training.csv").write_text("\n".join(rows) + "\n")
    ann = load_annotations("lsmdc", tmp_path)
    assert ann.captions == ["SOMEONE waits.", 'He says "no', "Again"]
    assert ann.owner == [0, 1, 0]  # a clip that repeats is one video
    assert relative(ann, tmp_path) == [
        (f"videos/0001_American_Beauty/{GOOD}.avi", None, None),
        (
            "videos/3002_30_MINUTES_OR_LESS/3002_30_MINUTES_OR_LESS_00.00.05.016-00.00.06.821.avi",
            None,
            None,
        ),
    ]
    (tmp_path / "LSMDC16_challenge_1000_publictect.csv").write_text(lsmdc_row(GOOD))
    assert len(load_annotations("lsmdc", tmp_path, "test").captions) == 1
    (tmp_path / "LSMDC16_annos_val.csv").write_text(lsmdc_row(GOOD) + "\n" + GOOD + "\tshort\n")
    with pytest.raises(
        DataError, match="LSMDC16_annos_val.csv, row 2: 2 tab-separated fields, expected 6"
    ):
        load_annotations("lsmdc", tmp_path, "val")
    # "/.avi" would lie outside the folder
    (tmp_path / "LSMDC16_annos_val.csv").write_text(lsmdc_row("") + "\n")
    with pytest.raises(DataError, match="LSMDC16_annos_val.csv, row 1: clip id ''"):
        load_annotations("lsmdc", tmp_path, "val")


DIDEMO = ["success", "video_path", "starts", "ends", "text", "formatted_data"]


def didemo_row(video, ends="tensor([[31]])", starts="tensor([[0]])"):
    return ["True", f"/home/x/all/{video}", starts, ends, "one. two, three", "/home/x.pth"]


def test_didemo_segments_become_one_paragraph(tmp_path):
    """The LocalizingMoments project's json has an entry per described segment."""
    segments = [
        ("a.mp4", "a dog runs."),
        ("b.mp4", "rain"),
        ("a.mp4", "then it sits"),
        ("c.avi", "x"),
        ("a.mp4", "it barks."),
    ]
    entries = [
        dict(video=v, description=d, times=[[0, 0]], annotation_id=k)
        for k, (v, d) in enumerate(segments)
    ]
    (tmp_path / "test_data.json").write_text(json.dumps(entries))
    ann = load_annotations("didemo", tmp_path, "test")
    assert ann.captions == ["a dog runs. then it sits it barks.", "rain", "x"]
    assert ann.owner == [0, 1, 2]
    assert paths(ann, tmp_path) == ["videos/a.mp4", "videos/b.mp4", "videos/c.avi"]
    assert ann.where == [f"test_data.json, entry {k}" for k in (1, 2, 4)]


def test_didemo_spans_the_wrong_way_round(folder, tmp_path, capsys, monkeypatch):
    """Swapped, as in the released code, and said once for all."""
    (tmp_path / "videos").mkdir()
    rows = []
    for k, (start, end) in enumerate([(0, 31), (2, 1), (30, 5), (3, 3)]):
        rows.append(didemo_row(f"{k}.mp4", f"tensor([[{end}]])", f"tensor([[{start}]])"))
        shutil.copy(make(folder, "bframes.mp4"), tmp_path / "videos" / f"{k}.mp4")
    table(tmp_path / "didemo_val_label.csv", DIDEMO, *rows)
    tables.warn_once.cache_clear()
    for _ in range(2):
        ann = load_annotations("didemo", tmp_path, "val")
        assert [c[1:] for c in ann.segments] == [(0, 31), (1, 2), (5, 30), (3, 3)]
    err = capsys.readouterr().err
    assert err.startswith("warning: didemo_val_label.csv, row 3 and 2 more: ") and "swapped" in err
    assert err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")  # another process of the same job
    tables.warn_once.cache_clear()
    assert load_annotations("didemo", tmp_path, "val") == ann and capsys.readouterr().err == ""
    assert numbers(read_frames(ann.segments[1], 2)) == [25 + i for i in sample_indices(25, 2)]
    # no time at all: the one frame there
    assert numbers(read_frames(ann.segments[3], 2)) == [75, 75]


def test_a_video_is_found_under_another_suffix(tmp_path):
    """Who re-encodes an archive gives it one suffix: every data set finds it."""
    table(tmp_path / "Charades_v1_test.csv", ["id", "script"], ["46GP8", "x"])
    (tmp_path / "LSMDC16_challenge_1000_publictect.csv").write_text(lsmdc_row(GOOD))
    touch(tmp_path, "videos/46GP8.webm", f"videos/0001_American_Beauty/{GOOD}.mp4")
    for name in ("charades", "lsmdc"):
        ann = load_annotations(name, tmp_path, "test")
        assert len(ann.segments) == 1 and present(ann) == (ann, [])


def test_didemo(tmp_path):
    touch(tmp_path, "videos/12@N01_dot.avi", "videos/34@N02.mov")
    rows = [didemo_row(name) for name in ("12@N01_dot.", "34@N02.mp4", "56@N03.mpg")]
    table(tmp_path / "didemo_test_label.csv", DIDEMO, *rows)
    ann = load_annotations("didemo", tmp_path, "test")
    assert paths(ann, tmp_path) == [
        "videos/12@N01_dot.avi",
        "videos/34@N02.mov",
        "videos/56@N03.mpg",
    ]
    assert all(c[1:] == (0, 31) for c in ann.segments)
    assert ann.captions == ["one. two, three"] * 3
    table(
        tmp_path / "didemo_val_label.csv",
        DIDEMO,
        didemo_row("a.mp4"),
        didemo_row("b.mp4", "tensor([[]])"),
    )
    with pytest.raises(DataError, match="didemo_val_label.csv, row 3: .*no seconds"):
        load_annotations("didemo", tmp_path, "val")
    entries = [dict(video="34@N02.mp4", description=["a dog.", "a cat."], times=[[0, 0]]),
               dict(video="c.mp4", description="whole", times=[])]
    (tmp_path / "train_data.json").write_text(json.dumps(entries))
    ann = load_annotations("didemo", tmp_path, "train")
    assert ann.captions == ["a dog. a cat.", "whole"]
    assert paths(ann, tmp_path) == ["videos/34@N02.mov", "videos/c.mp4"]


def test_vatex(tmp_path):
    entries = [dict(videoID="abc_-defg12_000005_000015", chCap=["x"], enCap=["one", "two"]),
               dict(videoID="uncutvideo1_000012_000022", chCap=["x"], enCap=["three"]),
               dict(videoID="nocaptions1_000000_000010", chCap=["x"]),
               dict(videoID="gonegonego1_000001_000011", enCap=["four"])]
    touch(
        tmp_path,
        "videos/abc_-defg12_000005_000015.mp4",
        "videos/uncutvideo1.mp4",
        "videos/abc_-defg12.mp4",
    )
    (tmp_path / "vatex_training_v1.0.json").write_text(json.dumps(entries))
    ann = load_annotations("vatex", tmp_path)
    assert relative(ann, tmp_path) == [
        ("videos/abc_-defg12_000005_000015.mp4", None, None), ("videos/uncutvideo1.mp4", 12, 22),
        ("videos/gonegonego1_000001_000011.mp4", None, None)]
    assert ann.captions == ["one", "two", "three", "four"] and ann.owner == [0, 0, 1, 2]
    (tmp_path / "vatex_validation_v1.0.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match="val_list.txt is missing"):
        load_annotations("vatex", tmp_path, "val")
    (tmp_path / "val_list.txt").write_text("uncutvideo1_000012_000022\n")
    (tmp_path / "test_list.txt").write_text(
        "abc_-defg12_000005_000015\r\ngonegonego1_000001_000011\n"
    )
    assert load_annotations("vatex", tmp_path, "val").captions == ["three"]
    assert load_annotations("vatex", tmp_path, "test").captions == ["one", "two", "four"]
    (tmp_path / "vatex_training_v1.0.json").write_text(
        json.dumps([entries[0], dict(videoID="short_1_2")])
    )
    with pytest.raises(DataError, match="vatex_training_v1.0.json, entry 2: videoID 'short_1_2'"):
        load_annotations("vatex", tmp_path)


def test_charades(tmp_path):
    head = ["id", "subject", "scene", "script", "length"]
    table(
        tmp_path / "Charades_v1_train.csv",
        head,
        *[[f"V{i}", "S", "Kitchen", f"A person, no {i}", "30"] for i in range(4)],
        ["V9", "S", "x", "", "3"],
    )
    table(
        tmp_path / "Charades_v1_test.csv",
        head,
        ["46GP8", "HR43", "Kitchen", "A person cooks\nand eats.", "24.8"],
        ["N11GT", "0KZ7"],
    )
    train = load_annotations("charades", tmp_path)
    assert paths(train, tmp_path) == [f"videos/V{i}.mp4" for i in range(4)]
    assert train.captions[2] == "A person, no 2"
    assert [
        len(load_split("charades", tmp_path, split, 1).segments) for split in ("val", "train")
    ] == [1, 3]
    with pytest.raises(DataError, match="Charades_v1_test.csv, row 4: not as many fields"):
        load_annotations("charades", tmp_path, "test")


def test_msvd(tmp_path):
    (tmp_path / "captions_msvd.json").write_text(
        json.dumps({"a_1_2": ["x", "y"], "b_3_4": ["z"], "other_1_2": ["w"]})
    )
    (tmp_path / "test_list.txt").write_text("b_3_4\na_1_2\nnever_5_6\n")
    touch(tmp_path, "videos/a_1_2.mp4")
    ann = load_annotations("msvd", tmp_path, "test")
    assert ann.captions == ["z", "x", "y"] and ann.owner == [0, 1, 1]
    assert paths(ann, tmp_path) == ["videos/b_3_4.avi", "videos/a_1_2.mp4"]


def test_lists_whose_ids_fit_no_caption(tmp_path, capsys):
    """Ids may be names of files; those without a caption are named; an empty split is a fault."""
    (tmp_path / "captions_msvd.json").write_text(json.dumps({"a_1_2": ["x"], "b_3_4": ["z"]}))
    (tmp_path / "train_list.txt").write_text("a_1_2.avi\nc_5_6.avi\nd_7_8.avi\n")
    (tmp_path / "val_list.txt").write_text("b_3_4\n")
    (tmp_path / "test_list.txt").write_text("e_9_9\n")
    touch(tmp_path, "videos/a_1_2.avi", "videos/b_3_4.avi")
    assert load_annotations("msvd", tmp_path, "train").captions == ["x"]
    err = capsys.readouterr().err
    assert err == "warning: train_list.txt: 2 of its 3 videos have no caption: c_5_6, d_7_8\n"
    assert data.main(["check", "--data", "msvd", "--root", str(tmp_path)]) == 1
    assert "      test: no caption belongs to this split\n" in capsys.readouterr().out
    vatex = [dict(videoID="abcdefghijk_000001_000011", enCap=["x"])]
    (tmp_path / "vatex_validation_v1.0.json").write_text(json.dumps(vatex))
    (tmp_path / "test_list.txt").write_text(
        "abcdefghijk_000001_000011.mp4 bbcdefghijk_000001_000011"
    )
    assert load_annotations("vatex", tmp_path, "test").captions == ["x"]
    assert "test_list.txt: 1 of its 2 videos have no caption: bbc" in capsys.readouterr().err
    msrvtt(tmp_path)
    with open(tmp_path / "MSRVTT_train.9k.csv", "a") as file:
        file.write("video777\n")
    load_annotations("msrvtt", tmp_path)
    assert "videos have no caption: video777" in capsys.readouterr().err


def test_a_csv_may_lack_a_split_to_validate_with_and_no_other(tmp_path):
    touch(tmp_path, "a.mp4")
    for split, status in (("train", 1), ("test", 1)):
        name = table(tmp_path / "my.csv", ["video", "caption", "split"], ["a.mp4", "x", split])
        assert data.main(["check", "--data", name]) == status
    table(name, ["video", "caption", "split"], ["a.mp4", "x", "train"], ["a.mp4", "x", "test"])
    assert data.main(["check", "--data", name]) == 0


@pytest.mark.parametrize(
    "folder", ["videos", "videos/all", "all", "YouTubeClips", "videos/YouTubeClips", "."]
)
def test_videos_may_lie_elsewhere_as_their_site_packs_them(tmp_path, folder):
    root, store = tmp_path / "annotations", tmp_path / "store"
    root.mkdir()
    (root / "captions_msvd.json").write_text(json.dumps({"a_1_2": ["x"], "b_3_4": ["z"]}))
    (root / "test_list.txt").write_text("a_1_2\nb_3_4\n")
    touch(store, f"{folder}/a_1_2.avi")
    ann = load_split("msvd", root, "test", videos=store)
    assert os.path.samefile(ann.segments[0].path, store / folder / "a_1_2.avi")
    assert ann.segments[1].path.startswith(str(store)) and not os.path.exists(ann.segments[1].path)
    touch(root, f"{folder}/b_3_4.avi")  # without --videos: the same names below the annotations
    ann = load_annotations("msvd", root, "test")
    assert os.path.isfile(ann.segments[1].path) and not os.path.isfile(ann.segments[0].path)
    with pytest.raises(DataError, match="1 of 2 videos are missing.*--videos"):
        present(ann)
    with pytest.raises(DataError, match="--videos .*nowhere: there is no such folder"):
        load_annotations("msvd", root, "test", videos=tmp_path / "nowhere")


def test_archives_as_their_sites_name_them(tmp_path):
    table(tmp_path / "Charades_v1_test.csv", ["id", "script"], ["46GP8", "A person cooks."])
    touch(
        tmp_path,
        "mp4/Charades_v1_480/46GP8.mp4",
        "mp4/MSRVTT/videos/all/video10.mp4",
        "mp4/TestVideo/video11.mp4",
    )
    ann = load_annotations("charades", tmp_path, "test", tmp_path / "mp4")
    assert relative(ann, tmp_path) == [("mp4/Charades_v1_480/46GP8.mp4", None, None)]
    ann = load_annotations("msrvtt", msrvtt(tmp_path), "test", tmp_path / "mp4")
    assert paths(ann, tmp_path) == [
        "mp4/TestVideo/video11.mp4",
        "mp4/MSRVTT/videos/all/video10.mp4",
    ]


def test_videos_of_a_csv_may_lie_elsewhere(tmp_path):
    (tmp_path / "clips").mkdir()
    name = table(
        tmp_path / "my.csv", ["video", "caption"], *[[f"v{i}.mp4", "x"] for i in range(200)]
    )
    there = {s: load_split(name, None, s, videos=tmp_path / "clips") for s in data.SPLITS}
    assert there["test"].segments[0].path.startswith(str(tmp_path / "clips" / "v"))
    for split in data.SPLITS:  # where they lie changes no split
        here = load_split(name, None, split)
        assert [os.path.basename(c.path) for c in there[split].segments] == [
            os.path.basename(c.path) for c in here.segments
        ]
    assert data.main(["check", "--data", name, "--videos", str(tmp_path)]) == 1
    touch(tmp_path / "clips", *[f"v{i}.mp4" for i in range(200)])
    assert data.main(["check", "--data", name, "--videos", str(tmp_path / "clips")]) == 0


def test_videos_of_a_csv_are_found_as_those_of_a_data_set(tmp_path):
    """In videos/, in the folder of an archive, under another suffix or with none in the csv."""
    names = ["a", "b.avi", "c.mp4", "d.mp4", "sub/e", "gone"]
    name = table(tmp_path / "my.csv", ["video", "caption"], *[[x, f"of {x}"] for x in names])
    found = ["a.mp4", "videos/b.webm", "YouTubeClips/c.mp4", "d.mp4", "videos/sub/e.mkv"]
    touch(tmp_path, *found, "videos/d.mp4")  # beside the csv comes first
    for videos in (None, tmp_path):
        ann = load_annotations(name, videos=videos)
        assert paths(ann, tmp_path) == [*found, "gone"]
    assert paths(load_annotations(name, tmp_path / "videos"), tmp_path)[1::3] == [
        "videos/b.webm", "videos/sub/e.mkv"]


@pytest.mark.parametrize("bad", ["letters", 3, [3], {"a": 1}, [None]])
def test_captions_of_another_kind(tmp_path, bad):
    entries = [dict(videoID="abcdefghijk_000001_000011", enCap=bad)]
    (tmp_path / "vatex_training_v1.0.json").write_text(json.dumps(entries))
    (tmp_path / "captions_msvd.json").write_text(json.dumps({"a_1_2": bad}))
    (tmp_path / "train_list.txt").write_text("a_1_2\n")
    (tmp_path / "train_data.json").write_text(
        json.dumps([dict(video="a.mp4", description=bad, times=[])])
    )
    files = {"vatex": "vatex_training_v1.0.json, entry 1", "msvd": "captions_msvd.json",
             "didemo": "train_data.json, entry 1"}
    for name, file in files.items():
        if (name, bad) == ("didemo", "letters"):  # there a whole paragraph is right
            assert load_annotations(name, tmp_path).captions == ["letters"]
            continue
        with pytest.raises(DataError, match=file):
            load_annotations(name, tmp_path)


def test_half_characters_in_json(tmp_path):
    """JSON can hold them, and no file, terminal or tokenizer can."""
    sentence = r"a dog \ud83d runs, a \ud83d\ude00 too"
    (tmp_path / "captions_msvd.json").write_text('{"a_1_2": ["' + sentence + '"]}')
    (tmp_path / "test_list.txt").write_text("a_1_2")
    ann = load_annotations("msvd", tmp_path, "test")
    assert ann.captions == ["a dog ? runs, a \U0001f600 too"]


def test_real_annotation_files(shared, tmp_path):
    for split, n in (("test", 1004), ("val", 1062)):
        ann = load_annotations("didemo", shared / "didemo", split)
        assert len(ann.captions) == n and all(c[1:] == (0, 31) for c in ann.segments)
    msvd = {s: load_annotations("msvd", shared / "msvd", s) for s in data.SPLITS}
    assert len(set().union(*(a.segments for a in msvd.values()))) == 1970  # no video in two splits
    assert [len(msvd[s].segments) for s in data.SPLITS] == [1200, 100, 670]
    assert len(msvd["test"].captions) == 27763
    assert sorted(Counter(msvd["test"].owner).values())[::669] == [21, 81]
    for file in (shared / "msrvtt").iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(dict(
        sentences=[dict(caption="x", video_id=f"video{i}", sen_id=i) for i in range(10000)])))
    train, test = (load_annotations("msrvtt", tmp_path, split) for split in ("train", "test"))
    small = load_annotations("msrvtt-7k", tmp_path)
    assert [len(a.segments) for a in (train, small, test)] == [9000, 7010, 1000]
    assert len(test.captions) == 1000
    assert set(small.segments) < set(train.segments)
    assert not set(test.segments) & set(train.segments)
    assert len(set(test.captions)) == 995


def test_missing_videos_are_counted_and_ten_named(tmp_path):
    rows = [[f"v{i}.mp4", f"c{i}"] for i in range(30)]
    name = table(tmp_path / "my.csv", ["video", "caption"], *rows, ["v3.mp4", "again"])
    touch(tmp_path, "v3.mp4", "v29.mp4")
    ann = load_annotations(name)
    with pytest.raises(DataError) as e:
        present(ann)
    text = str(e.value)
    assert "28 of 30 videos are missing" in text
    assert text.count(".mp4: missing (") == 10
    assert f"v0.mp4: missing ({name}, row 2)" in text
    assert "--skip-bad" in text
    found, lines = present(ann, skip_bad=True)
    assert found.captions == ["c3", "c29", "again"]
    assert found.owner == [0, 1, 0]
    assert len(lines) == 28
    assert paths(found, tmp_path) == ["v3.mp4", "v29.mp4"]
    assert found.where == [f"{name}, row 5", f"{name}, row 31"]
    assert present(found) == (found, [])


# ---- python data.py check ----

def test_check(run, folder, tmp_path, capsys):
    root = tmp_path / "m"
    root.mkdir()
    (msrvtt(root) / "MSRVTT_data.json").unlink()
    out = run("data.py", "check", "--data", "msrvtt", "--root", root)
    assert out.returncode == 1 and out.stderr == ""
    assert "MSRVTT_data.json is missing: it belongs to msrvtt" in out.stdout
    assert "2 texts (published 1000), 2 videos (published 1000), 2 of them missing" in out.stdout
    assert f"{root}/videos/video11.mp4: missing (MSRVTT_JSFUSION_test.csv, row 2)" in out.stdout
    shutil.copy(make(folder, "bframes.mp4"), tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("not a video")
    name = table(tmp_path / "my.csv", ["video", "caption"], ["a.mp4", "x"])
    assert data.main(["check", "--data", name, "--decode", "--workers", "1"]) == 0
    assert (
        "1 texts, 1 videos, 0 of them missing\n      1 decode, 0 don't\n" in capsys.readouterr().out
    )
    name = table(
        tmp_path / "my.csv",
        ["video", "caption", "split"],
        ["a.mp4", "x", "train"],
        ["b.mp4", "y", "test"],
    )
    assert data.main(["check", "--data", name]) == 0
    assert data.main(["check", "--data", name, "--decode", "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "0 decode, 1 don't" in out and f"{tmp_path}/b.mp4: can't be decoded" in out


def films(folder, tmp_path, good, bad, missing):
    """A csv of videos: some that decode, some that don't, some that are not there. -> its name."""
    names = [f"good{i}.mp4" for i in range(good)] + [f"bad{i}.mp4" for i in range(bad)]
    for name in names:
        if name.startswith("good"):
            shutil.copy(make(folder, "bframes.mp4"), tmp_path / name)
        else:
            (tmp_path / name).write_text("not a video")
    names += [f"gone {i}, é.mp4" for i in range(missing)]
    return table(
        tmp_path / "my.csv", ["video", "caption"], *[[name, f"of {name}"] for name in names]
    )


def test_check_counts_all_and_names_ten(folder, tmp_path, capsys):
    name = films(folder, tmp_path, 1, 12, 13)
    assert data.main(["check", "--data", name, "--decode", "--workers", "2"]) == 1
    out = capsys.readouterr().out
    assert "26 texts, 26 videos, 13 of them missing\n      1 decode, 12 don't\n" in out
    assert f"      {tmp_path}/gone 0, é.mp4: missing ({name}, row 15)\n" in out
    assert len(out.splitlines()) == 13 and out.endswith("      and 15 more\n")


def test_check_shows_odd_names_escaped(tmp_path, run):
    root = os.fsencode(tmp_path) + b"/caf\xe9"  # not UTF-8, as on old disks
    os.mkdir(root)
    name = table(tmp_path / "my.csv", ["video", "caption"], ["a\x1b[31m.mp4", "x"])
    arguments = ["check", "--data", name, "--root", os.fsdecode(root)]
    out = run("data.py", *arguments, env=dict(PYTHONIOENCODING="utf-8:strict"))
    assert out.returncode == 1 and out.stderr == ""
    assert f"{tmp_path}/caf\\udce9/a\\x1b[31m.mp4: missing ({name}, row 2)" in out.stdout


def test_check_mistakes(run, tmp_path, capsys):
    out = run("data.py", "check", "--data", "msrvvt")
    assert out.returncode == 2 and out.stdout == "" and out.stderr.count("\n") == 1
    assert out.stderr.startswith("error: unknown data set 'msrvvt'")
    for name in (str(tmp_path / "gone.csv"), table(tmp_path / "x.csv", ["a"])):
        assert program(lambda: data.main(["check", "--data", name])) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert data.main(["check", "--data", "vatex", "--root", str(tmp_path / "none")]) == 1
    assert "none is missing: put vatex's files there" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        data.main(["check"])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    for main, args in ((data.main, ["check", "--data", "vatex", "--workers", "-1"]),
                       (shapes.main, ["--root", str(tmp_path), "--videos", "-5", "1", "1"])):
        with pytest.raises(SystemExit) as e:
            main(args)
        assert e.value.code == 2 and "is not a whole number from 0 to" in capsys.readouterr().err


def test_render_never_passes_off_another_data_set(tmp_path, capsys):
    def command(n):
        return program(
            lambda: shapes.main(["--root", str(tmp_path / "s"), "--videos", str(n), "1", "1"])
        )

    assert command(2) == 0 and command(2) == 0
    assert command(3) == 2 and "holds another data set already" in capsys.readouterr().err
    table(tmp_path / "captions.csv", ["video", "caption"], ["mine.mp4", "x"])  # somebody's own
    assert program(lambda: shapes.main(["--root", str(tmp_path), "--videos", "2", "1", "1"])) == 2


def test_a_closed_pipe_ends_it_quietly(tmp_path):
    """python data.py check ... | head: who reads no further has no use for an error."""
    name = table(tmp_path / "my.csv", ["video", "caption"], *([f"{k}.mp4", "x"] for k in range(30)))
    command = [sys.executable, data.__file__, "check", "--data", name]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job.stdout.close()
    assert job.stderr.read() == "" and job.wait(60) == 0


@pytest.mark.parametrize("ceiling", ['"x"', "[1]", "NaN", "1e999", "-1", "null", "9" * 5000,
                                     "[" * 100_000])
def test_a_ceiling_that_is_no_percentage_is_none(tmp_path, ceiling):
    (tmp_path / "shapes.json").write_text('{"settings": {}, "ceiling": ' + ceiling + "}")
    assert shapes.shapes_ceiling(tmp_path) is None
    with pytest.raises(DataError, match="neither empty nor made by shapes.py"):
        shapes.shapes_of(tmp_path)
