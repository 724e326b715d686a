"""The embedded data set: always the same, safe to kill, described truly, read as any csv."""

import json
import multiprocessing
import re
import resource
import shutil
import time
import zlib

import pytest
import torch

import data
from lib import shapes
from lib import video as decode
from lib.common import DataError
from lib.shapes import (
    FRAMES,
    SIDE,
    WORDS,
    ShapesVideos,
    draw_shots,
    oracle_ceiling,
    random_shots,
    render_shapes,
    shapes_of,
    shapes_pictures,
)

SMALL = dict(train=6, val=2, test=4, seed=5)


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    render_shapes(root, **SMALL, workers=0)
    return root


def test_same_files_whatever_the_workers(root, tmp_path, capsys):
    render_shapes(tmp_path / "two", **SMALL, workers=2)
    here = contents(root)
    assert contents(tmp_path / "two") == here and len(here) == 12 + 2
    # there already means nothing to do
    capsys.readouterr()
    render_shapes(root, **SMALL | dict(seed=99))
    assert contents(root) == here and capsys.readouterr() == ("", "")


def test_killed_while_rendering_goes_on(tmp_path, soon):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    sizes = dict(train=24, val=0, test=3, seed=5, workers=0)
    render_shapes(whole, **sizes)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=render_shapes, args=(cut,), kwargs=sizes)
    process.start()
    while len(list(cut.glob("videos/*.mp4"))) < 5:
        time.sleep(.01)
    process.kill()
    process.join()
    done = sorted(cut.glob("videos/*.mp4"))
    # never half a data set that looks whole, nor half a video
    assert 5 <= len(done) < 27 and not (cut / "captions.csv").exists()
    assert all(p.read_bytes() == (whole / "videos" / p.name).read_bytes() for p in done)
    (cut / "videos" / "00026.part").write_text("what a kill leaves of the last video")
    before = done[0].stat().st_mtime_ns
    render_shapes(cut, **sizes)
    assert done[0].stat().st_mtime_ns == before
    assert contents(cut) == contents(whole)


VERSION_1 = '{"settings": {"version": 1, "train": 6, "val": 2, "test": 4, "seed": 5}}'


@pytest.mark.parametrize("prepare, rendering, reading", [
    (lambda root: shutil.rmtree(root), None, "holds no data set shapes: `python train.py` renders"),
    (lambda root: (root / "shapes.json").unlink(), "neither empty nor made by shapes.py", None),
    (lambda root: (root / "shapes.json").write_text("{}"), "choose another --root", None),
    (lambda root: (root / "shapes.json").write_text(VERSION_1),
     "holds version 1 of shapes, but this is version 2: delete it, .* --videos 6 2 4$", None),
    (lambda root: (root / "captions.csv").unlink(), "unfinished data set with .*'train': 6.*delete",
     "an incomplete data set shapes.*--videos 6 2 4 --seed 5$"),
])
def test_refusals(root, tmp_path, prepare, rendering, reading):
    """What a user made is never replaced, and what only reads makes nothing at all."""
    other = shutil.copytree(root, tmp_path / "other")
    prepare(other)
    before = contents(other)
    with pytest.raises(DataError, match=reading or rendering):
        data.load_annotations("shapes", other, "test")
    if rendering:
        with pytest.raises(DataError, match=rendering):
            render_shapes(other, train=4, val=0, test=2, seed=6, workers=0)
    assert contents(other) == before


def test_where_nothing_can_be_written(root, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, said in (("file", "neither empty"), ("file/below", "can't be written there")):
        with pytest.raises(DataError, match=f"{said}.*choose another --root"):
            render_shapes(tmp_path / folder, **SMALL)
    videos = ShapesVideos(tmp_path / "nowhere", **SMALL)
    # a worker must not die of it
    assert isinstance(videos[0], DataError) and "00000.mp4" in str(videos[0])


def test_too_few_descriptors_are_named(root):
    files = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                files.append(open(root / "shapes.json"))
        with pytest.raises(OSError, match="Too many open files"):
            shapes_of(root)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def understand(caption):
    """Caption -> facts (6) with -1, from its words and their order alone."""
    facts, colour = [], -1
    for words in WORDS[:2]:
        found = [
            (k, name)
            for k, names in enumerate(words)
            for name in names
            if re.search(rf"\b{name}\b", caption)
        ]
        assert len(found) < 2, caption
        facts.append(found[0][0] if found else -1)
        caption = caption.replace(found[0][1] if found else "", "")
    for word in caption.replace(",", "").split():
        thing = [k for k, names in enumerate(WORDS[2]) if word in names]
        if thing:
            facts += [thing[0], colour]
            colour = -1
        colour = next((k for k, names in enumerate(WORDS[3]) if word in names), colour)
    return facts


def test_captions_tell_what_is_shown(tmp_path, monkeypatch):
    drawn = []  # nobody looks at the pictures here
    monkeypatch.setattr(shapes, "draw_shots", lambda facts, pose, size: drawn.append(facts))
    monkeypatch.setattr(shapes, "write_video", lambda *_: None)
    videos = ShapesVideos(tmp_path, 60, 0, 200, 3)
    for i in range(len(videos)):
        captions, shots, says = videos[i]
        assert len(captions) == (4 if i < 60 else 8) and 2 <= len(shots) <= 4
        seen = drawn[i][decode.sample_indices(FRAMES, 6)].tolist()
        assert {*map(tuple, seen)} == {*map(tuple, shots)}
        for caption, said in zip(captions, says):
            assert understand(caption) == said
            assert any(all(s in (-1, f) for s, f in zip(said, shot)) for shot in shots)


def weighted(pixels):
    """A sum that changes with the values and their places; a rounding elsewhere hardly moves it."""
    values = pixels.flatten().double()
    return (values * (torch.arange(len(values)) % 251)).sum().item()


def test_pixels_and_captions_are_those_of_this_version(tmp_path, monkeypatch):
    """Who changes them changes SHAPES_VERSION, or an old folder would pass for a new one."""
    written = []
    monkeypatch.setattr(shapes, "write_video", lambda path, frames, rate: written.append(frames))
    videos = ShapesVideos(tmp_path, 8, 1, 3, 24)
    items = [videos[i] for i in range(len(videos))]
    assert shapes.SHAPES_VERSION == 2 and all(x.shape == (FRAMES, 3, SIDE, SIDE) for x in written)
    assert zlib.crc32(json.dumps(items).encode()) == 3146925238
    assert sum(map(weighted, written)) == pytest.approx(119743821777, rel=1e-7)
    pictures, phrases = shapes_pictures(128, torch.Generator().manual_seed(7))
    assert zlib.crc32(json.dumps(phrases).encode()) == 2825444681
    assert weighted(pictures) == pytest.approx(6790783876, rel=1e-7)


def test_things_stand_where_the_facts_say():
    facts, pose = random_shots(300, torch.Generator().manual_seed(1))
    pose[:, [6, 7, 8, 10, 11, 12]] = torch.tensor([-.47, 0, 0, .47, 0, 0])
    pose[:, :5] = torch.tensor([1., 0, 0, 0, 1])
    pictures = draw_shots(facts, pose, 96)
    for column, (thing, colour) in ((25, (2, 3)), (70, (4, 5))):
        full = facts[:, thing] != 4  # a ring shows the place in its middle
        paint = (shapes.PAINTS[facts[:, colour]].flatten(1) * 255 * .93)
        seen = pictures[:, :, 47, column].float()
        assert (seen - paint)[full].abs().max() < 12
        assert (seen - paint)[~full].abs().amax(1).gt(12).float().mean() > .7


def test_ceiling_is_what_a_loop_finds():
    generator = torch.Generator().manual_seed(2)
    facts, owner = torch.randint(2, (40, 6), generator=generator), torch.arange(40) // 4 + 7
    target = torch.arange(10).repeat(3) + 7
    says = facts[(target - 7) * 4 + torch.randint(4, (30,), generator=generator)]
    says = says.where(torch.rand(30, 6, generator=generator) > .3, -1)
    expected = 0
    for said, video in zip(says.tolist(), target.tolist()):
        fitting = set()
        for shot, v in zip(facts.tolist(), owner.tolist()):
            if all(s == -1 or s == f for s, f in zip(said, shot)):
                fitting.add(v)
        assert video in fitting
        expected += 1 / len(fitting)
    assert oracle_ceiling(facts, owner, says, target) == pytest.approx(100 * expected / 30)
    assert 10 < 100 * expected / 30 < 80


def test_csv_reader_reads_it(root):
    for split, videos, texts in (("train", 6, 24), ("val", 2, 2), ("test", 4, 32)):
        for name in ("shapes", str(root / "captions.csv")):
            annotations = data.load_annotations(name, root, split)
            assert len(annotations.segments) == videos and len(annotations.captions) == texts
