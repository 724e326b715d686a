"""What search remembers of files: links, names, copies, what is away, and what the system refused;
and what can be asked: pictures, videos, several at once."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from before import ENV, folder, make, noise_video  # noqa: F401
from conftest import ROOT
from PIL import Image
from test_search import answers, ask, ended, files_in_shards, forked, shards  # noqa: F401
from videos import numbered, write_video

import data
import search as se
from lib import exact
from lib import index as store
from lib.common import DataError
from lib.index import File
from lib.video import read_frames
from lib.weights import load_checkpoint

WEEK = 7 * 24 * 3600


def found(ask, videos, *more):  # noqa: F811
    """-> (what is said, the names of what is found, in order)"""
    out, err = ask("noise", "--videos", videos, "--top", 99, *more)
    return err, [line.split()[-1] for line in out.splitlines()[3:]]


# ---- which files ----

def test_linked_folders_are_followed_once(tmp_path):
    inside = tmp_path / "inside"
    (inside / "real").mkdir(parents=True)
    (tmp_path / "outside" / "below").mkdir(parents=True)
    for path in (inside / "real" / "a.mp4", inside / "b.mp4", tmp_path / "outside" / "c.mp4",
                 tmp_path / "outside" / "below" / "d.mp4"):
        path.write_text("x")
    for name, target in (("a link to real", "real"), ("loop", "."), ("out", "../outside"),
                         ("out again", "../outside"), ("nowhere", "../missing")):
        (inside / name).symlink_to(target)
    (tmp_path / "outside" / "back").symlink_to(inside)
    (inside / "e.mp4").symlink_to("b.mp4")
    (inside / "f.mp4").symlink_to("missing.mp4")
    [listed] = store.list_videos([inside])
    assert list(listed.stamps) == ["b.mp4", "e.mp4", "out/below/d.mp4", "out/c.mp4", "real/a.mp4"]
    assert listed.refused == []


def test_folders_that_cannot_be_listed_are_named(tmp_path, ask):  # noqa: F811
    """Also by the superuser, who may do all but list a path that is too long."""
    noise_video(tmp_path / "a.mp4", 0)
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(17):
            os.mkdir("x" * 250)
            os.chdir("x" * 250)
    finally:
        os.chdir(here)
    err, names = found(ask, tmp_path)
    assert names == ["a.mp4"] and "1 unreadable left out:\n" in err
    assert err.endswith("xxx: File name too long\n")
    (tmp_path / "a.mp4").unlink()
    assert "too long" in ask("x", "--videos", tmp_path, expect=2)[1]


def test_what_the_system_refused_is_tried_again(tmp_path, ask, monkeypatch):  # noqa: F811
    """A file that can't be read, one that goes away after it was listed; bad content is remembered.
    """
    noise_video(tmp_path / "a.mp4", 0)
    noise_video(tmp_path / "lost.mp4", 1)
    (tmp_path / "bad.mp4").write_text("nothing")
    (tmp_path / "refused.mp4").symlink_to("/proc/self/mem")  # a regular file; reading it fails
    listing = se.list_videos

    def list_and_lose(*arguments):
        folders = listing(*arguments)
        (tmp_path / "lost.mp4").rename(tmp_path / "away")
        return folders
    with monkeypatch.context() as patch:
        patch.setattr(se, "list_videos", list_and_lose)
        err, names = found(ask, tmp_path)
    assert names == ["a.mp4"] and "encoded 1 videos, 1 in the index" in err
    assert "3 unreadable left out" in err and err.count("(tried again next time)") == 2
    for name in ("lost.mp4", "refused.mp4"):
        assert any(name in line for line in err.splitlines() if "tried again" in line)
    assert sorted(files_in_shards(tmp_path)) == ["a.mp4", "bad.mp4"]
    (tmp_path / "away").rename(tmp_path / "lost.mp4")
    err, names = found(ask, tmp_path)
    assert "encoded 1 videos, 2 in the index" in err and "2 unreadable" in err
    missing = str(tmp_path / "missing.mp4")
    for path, refused in ((missing, True), (str(tmp_path / "bad.mp4"), False)):
        with pytest.raises(DataError) as caught:
            list(se.read_pieces(path, 4))
        assert se.was_refused(path, caught.value) == refused


def test_what_is_away_for_a_while_costs_nothing(tmp_path, ask):  # noqa: F811
    for name in ("disk", "rest"):
        (tmp_path / name).mkdir()
    for v in range(6):
        noise_video(tmp_path / "disk" / f"{v}.mp4", v)
    noise_video(tmp_path / "rest" / "a.mp4", 9)
    everything = found(ask, tmp_path)[1]
    first = shards(tmp_path)
    [missed] = [path.removesuffix(".shard").split("-")[0] + ".missed" for path in first]
    missed = tmp_path / se.INDEX / missed

    def age(days):
        times = json.loads(missed.read_text())
        missed.write_text(json.dumps({name: time.time() - days * 24 * 3600 for name in times}))
        return sorted(times)

    (tmp_path / "disk").rename(tmp_path.parent / "disk away")
    err, names = found(ask, tmp_path)
    assert names == ["rest/a.mp4"] and "encoded 0 videos, 1 in the index" in err
    assert age(days=30) == [f"disk/{v}.mp4" for v in range(6)]
    found(ask, tmp_path)  # as long as the folder itself is away, nothing is dropped
    (tmp_path.parent / "disk away").rename(tmp_path / "disk")
    err, names = found(ask, tmp_path)
    assert "encoded 0 videos, 7 in the index" in err and names == everything
    assert shards(tmp_path) == first and json.loads(missed.read_text()) == {}

    for v in range(5):
        (tmp_path / "disk" / f"{v}.mp4").unlink()
    found(ask, tmp_path)
    age(days=6)
    found(ask, tmp_path)
    assert shards(tmp_path) == first
    age(days=8)
    found(ask, tmp_path)
    assert sorted(files_in_shards(tmp_path)) == ["disk/5.mp4", "rest/a.mp4"]
    (tmp_path / "disk" / "5.mp4").unlink()
    for damage in ("[1]", "{", "5", '{"x": []}', 10 ** 5 * "[", '{"disk/5.mp4": null}',
                   '{"disk/5.mp4": "x"}', '{"disk/5.mp4": 1' + 400 * "0" + "}"):
        missed.write_text(damage)
        assert "encoded 0 videos, 1 in the index" in found(ask, tmp_path)[0]
        assert list(json.loads(missed.read_text())) == ["disk/5.mp4"]


def test_nothing_that_is_gone_is_shown(tmp_path, ask):  # noqa: F811
    for v in range(4):
        noise_video(tmp_path / f"{v}.mp4", v)
    names = found(ask, tmp_path)[1]
    (tmp_path / names[0]).unlink()
    assert found(ask, tmp_path, "-n")[1] == names[1:]
    (tmp_path / names[1]).unlink()
    out = ask("noise", "--videos", tmp_path, "-n", "--top", 1)[0]
    assert names[2] in out and names[0] not in out and names[1] not in out
    for name in names[2:]:
        (tmp_path / name).unlink()
    err = ask("noise", "--videos", tmp_path, "-n", expect=2)[1]
    assert "gone" in err.splitlines()[-1]


def test_many_that_are_gone_are_looked_for_once(tmp_path, ask, monkeypatch):  # noqa: F811
    noise_video(tmp_path / "00.mp4", 0)
    for v in range(1, 30):
        shutil.copy(tmp_path / "00.mp4", tmp_path / f"{v:02d}.mp4")
    found(ask, tmp_path)
    for v in range(29):
        (tmp_path / f"{v:02d}.mp4").unlink()
    searched = []
    searching = se.search
    monkeypatch.setattr(se, "search", lambda *a, **k: searched.append(1) or searching(*a, **k))
    assert "29.mp4" in ask("noise", "--videos", tmp_path, "-n", "--top", 1)[0]
    assert len(searched) == 2


def test_copies_are_encoded_once(tmp_path, ask):  # noqa: F811
    """A new name, a new time, a copy; not what has the same size alone."""
    for v in range(3):
        noise_video(tmp_path / f"{v}.mp4", v)
    found(ask, tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "0.mp4").rename(tmp_path / "below" / "renamed.mp4")
    shutil.copy(tmp_path / "1.mp4", tmp_path / "copy.mp4")
    os.utime(tmp_path / "2.mp4", ns=(1, 1))
    err, names = found(ask, tmp_path)
    assert "encoded 0 videos, 4 in the index, 4 pieces" in err
    assert sorted(names) == ["1.mp4", "2.mp4", "below/renamed.mp4", "copy.mp4"]
    noise_video(tmp_path / "d.mp4", 7)
    for name in ("d.mp4", "e.mp4", "f.mp4"):
        (tmp_path / f"bad {name}").write_text("nothing to see")
    err, names = found(ask, tmp_path)
    assert "encoded 1 videos, 5 in the index, 5 pieces; 3 unreadable" in err
    body = bytearray((tmp_path / "1.mp4").read_bytes())
    place = body.index(b"mdat") + 40
    body[place] ^= 1
    (tmp_path / "1.mp4").write_bytes(body)
    assert "encoded 1 videos, 5 in the index" in found(ask, tmp_path)[0]
    _, names = found(ask, tmp_path)
    fresh = found(ask, tmp_path, "--index", tmp_path / "other")[1]
    assert sorted(names) == sorted(fresh)
    scores = [{x["file"]: x["score"] for x in answers(path)} for path in (
        scored(ask, tmp_path), scored(ask, tmp_path, "--index", tmp_path / "other"))]
    assert scores[0].keys() == scores[1].keys()
    assert all(abs(scores[0][name] - scores[1][name]) < 1e-4 for name in scores[0])


def scored(ask, videos, *more):  # noqa: F811
    path = videos / f"{len(more)}.json"
    ask("noise", "--videos", videos, "--top", 99, "--json", path, *more)
    return path


def test_content_of_long_files(tmp_path):
    """Size, first and last megabyte count; what is between does not."""
    path = tmp_path / "x"
    seen = set()
    for first, middle, last, size in ((0, 0, 0, 3), (1, 0, 0, 3), (0, 0, 1, 3), (0, 0, 0, 4)):
        parts = [bytes([first]), bytes([middle]) * (size - 2), bytes([last])]
        path.write_bytes(b"".join(part * store.MEGABYTE for part in parts))
        seen.add(store.content_of(path))
    assert len(seen) == 4
    body = bytearray(3 * store.MEGABYTE)
    body[store.MEGABYTE + 5] = 1
    path.write_bytes(body)
    assert store.content_of(path) in seen


def test_a_folder_may_have_any_name(tmp_path, ask):  # noqa: F811
    """Also one that is no Unicode: its index is read back."""
    videos = tmp_path / os.fsdecode(b"caf\xe9 \x1b[31m")
    videos.mkdir()
    noise_video(tmp_path / "v.mp4", 0)
    (tmp_path / "v.mp4").rename(videos / "v.mp4")
    for times in (1, 0):
        err, names = found(ask, videos)
        assert f"encoded {times} videos, 1 in the index" in err and names == ["v.mp4"]


def test_shards_that_the_system_refuses_hide_no_others(tmp_path, ask):  # noqa: F811
    noise_video(tmp_path / "v.mp4", 0)
    found(ask, tmp_path)
    [name] = shards(tmp_path)
    for other in ("0", "z"):
        link = tmp_path / se.INDEX / f"{name[:17]}{other}.shard"
        link.symlink_to("missing" if other == "0" else link)
    began = time.monotonic()
    err, names = found(ask, tmp_path)
    assert names == ["v.mp4"] and "encoded 0 videos, 1 in the index" in err
    assert "(No such file or directory)" in err and "(Too many levels of symbolic links)" in err
    assert "damaged" not in err and time.monotonic() - began < 5


@pytest.mark.skipif(sys.platform != "linux", reason="its limit of memory")
def test_too_little_memory_is_no_damage(tmp_path):
    P = 40_000
    times = torch.zeros(P, 4)
    shard = store.file_shard(torch.zeros(P, 4, 16), times, times[:, :2], File("a", (1, 2), None))
    store.write_shard(tmp_path, "x.shard", shard)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0])
    bytes_ = pages * resource.getpagesize() + 2 ** 21
    try:
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, limits[1]))
        with pytest.raises(DataError, match="x.shard can't be opened .*memory"):
            store.read_shard(str(tmp_path / "x.shard"), (4, 16))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert len(store.read_shard(str(tmp_path / "x.shard"), (4, 16)).file) == P


@pytest.mark.parametrize("name", ["/etc/hostname", "../a.mp4", "b/../../a.mp4", "..", ""])
def test_an_index_leads_to_nothing_outside_its_folder(tmp_path, name):
    """Whoever may write to it could have the page let out any file."""
    times = torch.zeros(1, 4)
    for other, sound in (("..b..mp4", True), ("a/b.mp4", True), (name, False)):
        file = File(other, (1, 2), None)
        shard = store.file_shard(torch.zeros(1, 4, 16), times, times[:, :2], file)
        store.write_shard(tmp_path, "x.shard", shard)
        assert (store.read_shard(tmp_path / "x.shard", (4, 16)) is not None) == sound


def test_without_new_files_no_named_one_is_encoded(tmp_path, ask):  # noqa: F811
    for v in range(2):
        noise_video(tmp_path / f"{v}.mp4", v)
    paths = tmp_path / "0.mp4", tmp_path / "1.mp4"
    err = ask("x", "-n", "--videos", *paths, expect=2)[1]
    assert "encoded 0" in err and "without -n" in err and not (tmp_path / se.INDEX).exists()
    found(ask, paths[0])
    out, err = ask("x", "-n", "--videos", *paths)
    assert "encoded 0 videos, 1 in the index" in err and "1.mp4" not in out


def test_a_folder_that_went_away_is_not_made_anew(tmp_path, folder, monkeypatch, ask):  # noqa: F811
    """A disk may be mounted there again; what was encoded is searched, and said to be unsaved."""
    videos = tmp_path / "disk"
    videos.mkdir()
    noise_video(videos / "a.mp4", 0)
    reading = se.read_pieces

    def read_and_lose(*arguments, **options):
        yield from reading(*arguments, **options)
        videos.rename(tmp_path / "away")
    monkeypatch.setattr(se, "read_pieces", read_and_lose)
    err = ask("x", "--videos", videos, expect=2)[1]
    assert "searching without saving" in err and "are gone" in err
    assert os.listdir(tmp_path) == ["away"]


def test_a_bad_file_is_named_where_it_is_now(tmp_path, ask):  # noqa: F811
    (tmp_path / "old").mkdir()
    noise_video(tmp_path / "old" / "a.mp4", 0)
    (tmp_path / "old" / "bad.mp4").write_text("nothing")
    first = found(ask, tmp_path / "old")[0].splitlines()[-1]
    (tmp_path / "old").rename(tmp_path / "new")
    again = found(ask, tmp_path / "new")[0]
    assert "encoded 0" in again and "can't be decoded" in first
    assert again.splitlines()[-1] == first.replace("/old/", "/new/")


def test_linked_folders_beside_each_other_count_once(tmp_path, ask):  # noqa: F811
    (tmp_path / "v" / "below").mkdir(parents=True)
    noise_video(tmp_path / "v" / "a.mp4", 0)
    noise_video(tmp_path / "v" / "below" / "b.mp4", 1)
    (tmp_path / "link").symlink_to("v")
    for more in ("link", "link/below", "v/../link/below", "v/below"):
        out, err = ask("-f", "x", "--videos", tmp_path / "v", tmp_path / more)
        assert len(out.splitlines()) == 2, (more, out)
        assert "2 in the index, 2 pieces" in err


# ---- what is encoded so far ----

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 130)])
def test_what_is_encoded_is_kept_and_searched(
    folder, ask, tmp_path, monkeypatch, number, status  # noqa: F811
):
    monkeypatch.setattr(store, "FULL", 1)
    (tmp_path / "v").mkdir()
    for v in range(60):
        noise_video(tmp_path / "v" / f"{v:03d}.mp4", v)
    options = ["--videos", tmp_path / "v", "--batch", 1]
    json_ = ["--json", tmp_path / "x.json", "--top", 999]
    pid = forked("noise", *options, *json_, ckpt=folder / "model.pt")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "v").glob(f"{se.INDEX}/*.shard")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(pid, number)
    assert ended(pid) == status
    kept = len(files_in_shards(tmp_path / "v"))
    assert 0 < kept < 60
    if status == 0:
        assert len(answers(tmp_path / "x.json")) == kept
    out, err = ask(*options, "--update")
    assert f"encoded {60 - kept} videos, 60 in the index" in err and out == ""
    assert "encoded 0 videos, 60 in the index" in ask(*options, "--update")[1]


def test_saving_is_due_only_if_there_is_something_to_save(tmp_path, monkeypatch):
    """--serve opens the index anew after each save: a long video must not make it do so in vain."""
    monkeypatch.setattr(store, "OLD", 0)
    writer = store.ShardWriter(tmp_path, "mark")
    assert not writer.save_if_due()
    file = store.File("a.mp4", (1, 1), "damaged")
    nothing = torch.zeros(0, 4, 8), torch.zeros(0, 4), torch.zeros(0, 2)
    writer.parts.append(store.file_shard(*nothing, file))
    time.sleep(0.01)
    assert writer.save_if_due() and len(list(tmp_path.glob("mark*.shard"))) == 1
    assert not writer.save_if_due()


# ---- what can be asked ----

@pytest.mark.parametrize("pooling", ["xpool", "mean", "query"])
def test_pictures_and_videos_as_queries(tmp_path, folder, ask, pooling):  # noqa: F811
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    options = ["--videos", folder / "videos", "--index", tmp_path / "index", "--top", 7]
    if pooling != "xpool":
        model.pool = make(pooling=pooling).pool
        options += ["--pooling", pooling]
    transform = data.test_transform(16)
    frames = read_frames(str(folder / "videos" / "v3.mp4"), 4)
    picture = tmp_path / "Photo.PNG"
    Image.fromarray(frames[1].permute(1, 2, 0).numpy()).save(picture)
    video = folder / "videos" / "v5.mp4"
    queries = ["noise", str(picture), str(video), "missing.jpg"]
    ask(*queries, *options, "--json", tmp_path / "x.json")
    with torch.no_grad():
        one = model.encode_video(transform(frames[1:2])[None])[0, 0]
        several = model.encode_video(transform(read_frames(str(video), 4))[None])[0].mean(0)
        names = [f"v{v}.mp4" for v in range(7)]
        paths = [str(folder / "videos" / name) for name in names]
        f = torch.stack([model.encode_video(transform(read_frames(path, 4))[None])[0]
                         for path in paths])
        t = torch.stack([one, several])
        scores = exact.score(model, t, f, expected=True)
    for query, row in zip(queries[1:], scores):
        hits = {x["file"]: x["score"] for x in answers(tmp_path / "x.json", query)}
        expected = dict(zip(paths, row.tolist()))
        assert hits == pytest.approx(expected, abs=2e-3)
    assert len(answers(tmp_path / "x.json", "missing.jpg")) == 7  # no file: a text
    assert answers(tmp_path / "x.json", "noise") != answers(tmp_path / "x.json", str(picture))
    t = se.encode_queries(model, tokenizer, [str(picture), "noise", str(video)])
    assert torch.allclose(t[0], one, atol=1e-5) and torch.allclose(t[2], several, atol=1e-5)
    with pytest.raises(TypeError, match="list of str"):
        se.encode_queries(model, tokenizer, "noise")


def test_upright_pictures_and_damaged_ones(tmp_path, folder, ask):  # noqa: F811
    wide = numbered(1, 64)[0, :32].permute(2, 0, 1)
    wide[:, :, 40:] = 255
    turned = Image.fromarray(wide.rot90(1, (1, 2)).permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    turned.save(tmp_path / "a.png", exif=exif)
    read = se.read_picture(str(tmp_path / "a.png"))
    assert read.shape == (1, 3, 32, 64) and torch.equal(read[0], wide)
    for mode in ("L", "1", "P", "RGBA", "CMYK", "I;16"):
        Image.new(mode, (5, 4)).save(tmp_path / "b.tiff")
        assert se.read_picture(str(tmp_path / "b.tiff")).shape == (1, 3, 4, 5)
    grey = torch.arange(0, 2 ** 16, 2 ** 8).to(torch.uint16).numpy()[None]
    for order, mode in (("<", "I;16"), (">", "I;16B")):  # of bytes
        deep = Image.frombytes(mode, (256, 1), grey.astype(f"{order}u2").tobytes())
        deep.save(tmp_path / "b.tiff")
        assert se.read_picture(str(tmp_path / "b.tiff"))[0, 2, 0].tolist() == list(range(256))
    body = (tmp_path / "a.png").read_bytes()
    for name, damaged in (("c.jpg", b""), ("c.png", body[:60]), ("c.heic", b"x" * 99)):
        (tmp_path / name).write_bytes(damaged)
        err = ask(tmp_path / name, "--videos", folder / "videos", expect=2)[1]
        assert f"error: picture {tmp_path / name} can't be read: " in err.splitlines()[-1]
    write_video(tmp_path / "v.mp4", numbered(8))
    (tmp_path / "w.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:100])
    assert "w.mp4" in ask(tmp_path / "w.mp4", "--videos", tmp_path / "v.mp4", expect=2)[1]


# ---- for other programs ----

@pytest.mark.slow
def test_names_are_the_bytes_that_open_the_files(tmp_path, folder):  # noqa: F811
    (tmp_path / "v").mkdir()
    names = [b"caf\xe9.mp4", b"new\nline.mp4", b"\x1b[31m.mp4", "\u202eb.mp4".encode()]
    for v, name in enumerate(names):
        noise_video(tmp_path / "v.mp4", v)
        os.rename(tmp_path / "v.mp4", os.fsencode(tmp_path / "v") + b"/" + name)
    command = [sys.executable, str(ROOT / "search.py"), "x", "--videos", str(tmp_path / "v"),
               "--ckpt", str(folder / "model.pt"), "--device", "cpu", "--workers", "0"]
    options = dict(capture_output=True, timeout=60, env={**os.environ, **ENV, "LC_ALL": "C"})
    null = subprocess.run([*command, "-0"], **options)
    lines = subprocess.run([*command, "-f"], **options)
    paths = null.stdout.split(b"\0")
    assert paths.pop() == b"" and sorted(map(os.path.basename, paths)) == sorted(names)
    assert all(map(os.path.isfile, paths))
    assert lines.stdout == b"\n".join(paths) + b"\n"


def test_videos_of_every_option_are_searched(tmp_path, ask):  # noqa: F811
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        noise_video(tmp_path / name / f"{name}.mp4", ord(name))
    out, _ = ask("noise", "--videos", tmp_path / "a", "--videos", tmp_path / "b")
    assert "a.mp4" in out and "b.mp4" in out


def test_names_and_json_are_not_mixed(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        se.parse_args(["noise", "-f", "--json", "-", "--videos", str(tmp_path)])
    assert end.value.code == 2 and "would be mixed" in capsys.readouterr().err
