"""Search: pieces and moments, shards, the two stages, and the command line on real files."""
import contextlib
import functools
import io
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, free_port
from test_eval import (  # noqa: F401
    ENV,
    D,
    T,
    called,
    folder,
    inodes,
    make,
    noise_video,
    one_error,
)
from videos import numbered, numbers, write_video

import clip_model
import data
import eval as ev
import search as se
from lib import exact, processes, weights
from lib import index as store
from lib import video as decode
from lib.common import Progress
from lib.page import found_segment
from lib.video import DataError, read_pieces, sample_indices
from lib.weights import load_checkpoint, save_checkpoint
from tmass import TMASS


@pytest.fixture
def ask(folder, capsys, monkeypatch):  # noqa: F811
    """ask("a dog", "--videos", DIR) -> what stands on standard output, and on standard error."""
    def ask(*args, ckpt=folder / "model.pt", expect=0):
        common = ["--ckpt", ckpt, "--workers", 0, "--device", "cpu"]
        status, out, err = called(capsys, monkeypatch, *args, *common, program=se)
        assert status == expect, (out, err)
        return out, err
    return ask


def answers(path, query="noise"):
    return json.loads(path.read_text())[query]


def same(a, b):
    """The same results, but for rounding."""
    which = [[(x["file"], x["at"], x["start"]) for x in found] for found in (a, b)]
    return which[0] == which[1] and all(abs(x["score"] - y["score"]) < 1e-3 for x, y in zip(a, b))


def forked(*args, ckpt, **env):
    """Run search.py in a copy of this process, which saves the time of starting one. -> its pid"""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        torch.set_num_threads(1)  # a copy has no other threads
        os.environ.update(env)
        common = ["--ckpt", str(ckpt), "--workers", "0", "--device", "cpu"]
        sys.argv = ["search.py", *map(str, args), *common]
        # shown where a test fails
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        status = ev.run(se.main)
    finally:
        os._exit(status)


@contextlib.contextmanager
def killing(pid, timeout=120):
    """A process that is not done by then is killed, so that nothing waits for it for ever."""
    timer = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def ended(pid):
    """The exit status of a process that `forked` started."""
    with killing(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def shards(videos):
    return sorted(name for name in os.listdir(videos / se.INDEX) if name.endswith(".shard"))


def files_in_shards(videos):
    """Files in the shards of a folder, each counted as often as it is there."""
    contents = [torch.load(videos / se.INDEX / name, weights_only=True) for name in shards(videos)]
    return [name for content in contents for name, *_ in content["files"]]


# ---- pieces ----

@pytest.mark.parametrize("name, options", [
    ("x.mp4", dict(bf=2, g=25)),
    ("x.mkv", dict(bf=3, g=40)),
    ("x.ts", dict(bf=2, g=25)),
    ("x.avi", dict(codec="mpeg4", bf=2)),
])
def test_pieces_are_equal_and_exact(tmp_path, name, options):
    write_video(tmp_path / name, numbered(230), fps=10, **options)
    for window, n in ((0, 1), (20, 1), (15.4, 1), (15, 2), (10, 2), (5, 5), (1, 23)):
        pieces = list(read_pieces(tmp_path / name, 6, window))
        bounds = [-(-230 * k // n) for k in range(n + 1)]
        assert len(pieces) == n
        for piece, a, b in zip(pieces, bounds, bounds[1:]):
            chosen = [a + i for i in sample_indices(b - a, 6)]
            assert numbers(piece.frames) == chosen
            assert piece.times == pytest.approx([i / 10 for i in chosen])
            assert (piece.start, piece.end) == pytest.approx((a / 10, b / 10))


def test_pieces_of_one_file_open_it_once(tmp_path, monkeypatch):
    write_video(tmp_path / "x.mp4", numbered(200), fps=10, g=25, bf=2)
    opened, packets, plain_open, plain_packets = [], [], decode._open, decode._packets
    monkeypatch.setattr(decode, "_open", lambda path: opened.append(path) or plain_open(path))

    def counted(file, stream):
        for packet in plain_packets(file, stream):
            packets.append(packet)
            yield packet
    monkeypatch.setattr(decode, "_packets", counted)
    assert len(list(read_pieces(tmp_path / "x.mp4", 4, 1))) == 20 and len(opened) == 1
    assert len(packets) < 2.2 * 200 + 40  # the table, then every packet once


def test_a_piece_that_the_fast_way_loses_is_counted(tmp_path, monkeypatch):
    """From the piece where a frame is not found on, the exact way goes on; no piece comes twice."""
    write_video(tmp_path / "x.mp4", numbered(200), fps=10, g=25)
    fast = decode._seek_frames

    def broken(*args):
        for k, piece in enumerate(fast(*args)):
            yield piece if k < 3 else None
    whole = list(read_pieces(tmp_path / "x.mp4", 4, 2))
    monkeypatch.setattr(decode, "_seek_frames", broken)
    again = list(read_pieces(tmp_path / "x.mp4", 4, 2))
    assert len(again) == len(whole) == 10
    for a, b in zip(whole, again):
        assert torch.equal(a.frames, b.frames) and a.times == pytest.approx(b.times)


def test_odd_lengths(tmp_path):
    """A still of one frame; a slide show whose frames last longer than a piece."""
    write_video(tmp_path / "still.mp4", numbered(1))
    assert [numbers(p.frames) for p in read_pieces(tmp_path / "still.mp4", 3, 10)] == [[0, 0, 0]]
    write_video(tmp_path / "slides.mp4", numbered(4), fps=1)
    slides = [numbers(p.frames) for p in read_pieces(tmp_path / "slides.mp4", 2, 0.1)]
    assert slides == [[0, 0], [1, 1], [2, 2], [3, 3]]


PLAYLISTS = {
    "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{other}\n#EXT-X-ENDLIST\n",
    "list.ts": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{other}\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile {other}\n",
    "concat.ts": "ffconcat version 1.0\nfile {other}\n",
    "dash.mp4": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
                'mediaPresentationDuration="PT4S" profiles="urn:mpeg:dash:profile:isoff-main:2011">'
                '<Period>'
                '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1000">'
                '<BaseURL>{other}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
               "m=video 5004 RTP/AVP 96\n"
               "a=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_video_opens_nothing_but_itself(tmp_path, name):
    write_video(tmp_path / "other.ts", numbered(20), fps=10)
    (tmp_path / name).write_text(PLAYLISTS[name].format(other="other.ts"))
    before = os.stat(tmp_path / "other.ts").st_atime_ns
    with pytest.raises(DataError, match=name):
        list(read_pieces(tmp_path / name, 4))
    with pytest.raises(DataError, match=name):
        decode.read_frames(decode.Segment(tmp_path / name), 4)
    assert os.stat(tmp_path / "other.ts").st_atime_ns == before


@pytest.mark.parametrize("fps, window, n", [(Fraction(3, 10), 3, 40), (25, 7, 1300)])
def test_what_is_shown_of_a_piece_is_what_was_encoded(tmp_path, fps, window, n):
    """Though its bounds are float32 in an index, and in milliseconds in a report."""
    path = tmp_path / "x.mp4"
    write_video(path, numbered(n, 16), fps=fps, g=50)
    for piece in read_pieces(path, 4, window):
        bounds = piece.start, piece.end
        for start, end in (torch.tensor(bounds).tolist(), [round(x, 3) for x in bounds]):
            shown = decode.read_segment(found_segment(str(path), start, end), 4)
            assert shown.times == piece.times


# ---- the command line ----

def test_mistakes_are_one_line(folder, run, tmp_path, capsys, monkeypatch):  # noqa: F811
    good, videos = folder / "model.pt", folder / "videos"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_text("nothing")
    for arguments, *words in (
            (["x"], "--videos"), ([" ", "--videos", videos], "query"),
            (["--videos", videos, "a dog"], "a dog", "before --videos"),
            (["x", "--videos", tmp_path / "nowhere"], "nowhere", "no such folder"),
            (["x", "--videos", videos, "--window", "nan"], "nan"),
            (["x", "--videos", videos, "--top", 0], "--top", "0"),
            (["x", "--videos", tmp_path / "empty"], "empty", "no videos"),
            (["x", "--videos", videos, "-n", "--index", tmp_path / "i"], "without -n"),
            (["x", "--videos", videos, "--ckpt", "nosuch.pt"], "nosuch.pt", "ViT-B/32")):
        common = ["--ckpt", good, "--workers", 0, "--device", "cpu"]
        status, out, err = called(capsys, monkeypatch, *common, *arguments, program=se)
        about = str(good), "encoded 0"  # what is said before the error
        err = "".join(line for line in err.splitlines(True) if not line.startswith(about))
        assert one_error(status, out, err, *words), (arguments, status, err)
    bad = tmp_path / "bad"
    status, out, err = called(capsys, monkeypatch, *common, "x", "--videos", bad, program=se)
    assert status == 2 and "1 unreadable left out" in err
    assert "nothing to search" in err.splitlines()[-1] and "x.mp4" in err


def test_search_refreshes_its_index(folder, ask, tmp_path):  # noqa: F811
    """New, changed and gone files; nothing is encoded twice; weights and windows live together."""
    for v in range(3):
        noise_video(tmp_path / f"v{v}.mp4", v)
    (tmp_path / "below").mkdir()
    noise_video(tmp_path / "below" / "v3.MP4", 3)
    (tmp_path / "notes.txt").write_text("not a video")
    query = lambda *more, **options: ask("a red dog", *more, "--videos", tmp_path, **options)
    out, err = query("--top", 3, "a cat", "--json", tmp_path / "hits.json")
    assert "encoded 4 videos, 4 in the index, 4 pieces" in err
    assert "\na cat\n rank   score  at       file\n    1 " in out
    hits = json.loads((tmp_path / "hits.json").read_text())
    assert list(hits) == ["a red dog", "a cat"]
    assert [h["rank"] for h in hits["a red dog"]] == [1, 2, 3]
    assert all(list(h) == ["rank", "score", "file", "at", "start", "end"] for h in hits["a cat"])
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    files = ["below/v3.MP4", "v0.mp4", "v1.mp4", "v2.mp4"]
    f = ev.encode_videos(model, [decode.Segment(str(tmp_path / name)) for name in files])
    t = ev.encode_texts(model, tokenizer, ["a red dog"])
    scores = exact.score(model, t, f, expected=True)[0]
    best = scores.argsort(descending=True)[:3]
    expected = [(scores[v].item(), str(tmp_path / files[v])) for v in best]
    for h, (score, file) in zip(hits["a red dog"], expected):
        assert abs(h["score"] - score) < 1e-3  # float16 in the index
        assert h["file"] == file and (h["start"], h["end"]) == (0, 0.75)
        name = os.path.relpath(file, tmp_path)
        assert f"{h['score']:.4f}  0:00:00  {name}\n" in out  # one piece: no span

    first = shards(tmp_path)
    body = (tmp_path / se.INDEX / first[0]).read_bytes()
    assert len(first) == 1 and "encoded 0 videos, 4 in the index" in query()[1]
    assert shards(tmp_path) == first
    noise_video(tmp_path / "v4.mp4", 4)        # new
    noise_video(tmp_path / "v1.mp4", 11)       # changed
    os.utime(tmp_path / "v1.mp4", ns=(1, 1))
    (tmp_path / "v2.mp4").rename(tmp_path / "v2.txt")  # gone
    assert "encoded 0 videos, 4 in the index" in query("-n")[1]  # no look at what is there
    assert "encoded 2 videos, 4 in the index" in query()[1]
    assert shards(tmp_path)[0] == first[0]
    assert (tmp_path / se.INDEX / first[0]).read_bytes() == body  # never rewritten
    files = ["below/v3.MP4", "v0.mp4", "v1.mp4", "v4.mp4"]
    index = se.build_index(model, [str(tmp_path)])
    segments = [decode.Segment(str(tmp_path / name)) for name in files]
    fresh = ev.encode_videos(model, segments)
    assert sorted(index.names) == files
    assert index.shards[0].frames.dtype == index.shards[0].mean.dtype == torch.float16
    for row, number in enumerate(index.file.tolist()):
        if number >= 0:
            s = 0 if row < 4 else 1
            f = fresh[files.index(index.names[number])]
            frames, mean = (x[row - 4 * s].float() for x in index.shards[s][:2])
            assert (frames - f).abs().max() < 1e-2 * f.abs().max()
            assert (mean - store.pooled(f[None])[0]).abs().max() < 1e-3
    (tmp_path / "v2.txt").rename(tmp_path / "v2.mp4")
    assert "encoded 0 videos, 5 in the index" in query()[1]  # its rows were still there

    with torch.no_grad():
        model.clip.visual.proj[3, 5] += 0.1
    save_checkpoint(tmp_path / "other.pt", model, tokenizer, {})
    assert "encoded 5 videos, 5 in the index" in query(ckpt=tmp_path / "other.pt")[1]
    assert "encoded 5 videos, 5 in the index, 15 pieces" in query("--window", .25)[1]
    ours, other = folder / "model.pt", tmp_path / "other.pt"
    for more, ckpt in (([], ours), ([], other), (["--window", .25], ours)):
        assert "encoded 0 videos, 5 in the index" in query(*more, ckpt=ckpt)[1]
    names = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert not [name for name in names if name.endswith(".part")]


def test_damaged_shards_are_left_out(ask, tmp_path):
    for v in range(2):
        noise_video(tmp_path / f"{v}.mp4", v)
    before = ask("noise", "--videos", tmp_path)[0]
    for damage in (lambda body: body[:3000], lambda body: b"", lambda body: b"\0" * len(body),
                   lambda body: body[:-700] + bytes(700)):
        path = tmp_path / se.INDEX / shards(tmp_path)[0]
        path.write_bytes(damage(path.read_bytes()))
        out, err = ask("noise", "--videos", tmp_path)
        assert out == before and err.count("is damaged and left out") == 1
        assert "encoded 2 videos, 2 in the index" in err
        path.unlink()
    (path,) = [tmp_path / se.INDEX / name for name in shards(tmp_path)]
    content = torch.load(path, weights_only=True)
    torch.save(dict(content, frames=content["frames"][:1]), path)  # parts that don't fit together
    assert "is damaged and left out" in ask("noise", "--videos", tmp_path)[1]


@pytest.mark.parametrize("change", [
    *(lambda c, x=x: c.update(files=x) for x in (
        5, None, (), ["0.mp4"], [("0.mp4", (1, 2))], [(5, (1, 2), None)],
        [("0.mp4", 7, None)], [("0.mp4", ("1", 2), None)], [("0.mp4", (1, 2), 5)],
        [("0.mp4", (1, 2), None, 5)])),
    *(lambda c, name=name: c.update({name: c[name].to_sparse()})
      for name in ("frames", "mean", "times", "spans", "file")),
    *(lambda c, name=name: c[name].fill_(math.nan) for name in ("times", "spans")),
    *(lambda c, name=name: c.update({name: c[name].double()}) for name in ("frames", "file")),
    lambda c: c.update(mean=c["mean"].to("meta")),
    lambda c: c.update(frames=[1]),
    lambda c: c.update(frames=c["frames"][:, :2], times=c["times"][:, :2]),    # another T
    lambda c: c.update(frames=c["frames"][..., :9], mean=c["mean"][:, :9]),    # another D
])
def test_shards_of_other_types_and_sizes_are_damaged(tmp_path, change):
    path = tmp_path / "x.shard"
    times = torch.arange(4).float()[None]
    file = store.File("0.mp4", (1, 2), None, "abc")
    store.write_shard(tmp_path, path.name, store.file_shard(torch.randn(1, 4, 16), times,
                                                            times[:, :2], file))
    content = torch.load(path, weights_only=True)
    assert store.read_shard(path, (4, 16)).files == [file]
    torch.save(dict(content, files=[("0.mp4", (1, 2), None)]), path)  # of an earlier version
    assert store.read_shard(path, (4, 16)).files == [file._replace(content="")]
    change(content)
    torch.save(content, path)
    assert store.read_shard(path, (4, 16)) is None


def test_mostly_empty_shards_are_repacked(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MISSED", 0)
    for v in range(5):
        noise_video(tmp_path / f"{v}.mp4", v)
    ask("noise", "--videos", tmp_path)
    (tmp_path / "0.mp4").unlink()
    first = shards(tmp_path)
    ask("noise", "--videos", tmp_path)
    ask("noise", "--videos", tmp_path / "1.mp4")  # the others were not asked for: they are not gone
    assert shards(tmp_path) == first
    for v in (1, 2):
        (tmp_path / f"{v}.mp4").unlink()
    before = ask("noise", "--videos", tmp_path)[0]
    assert shards(tmp_path) != first and sorted(files_in_shards(tmp_path)) == ["3.mp4", "4.mp4"]
    monkeypatch.setattr(store, "SMALL", 3)
    for v in range(5, 8):
        noise_video(tmp_path / f"{v}.mp4", v)
        out = ask("noise", "--videos", tmp_path)[0]
    assert len(shards(tmp_path)) == 2
    assert sorted(files_in_shards(tmp_path)) == [f"{v}.mp4" for v in range(3, 8)]
    assert ask("noise", "--videos", tmp_path)[0] == out
    assert set(before.split()) - {str(rank) for rank in range(9)} <= set(out.split())


def test_pieces_and_the_moment(folder, ask, tmp_path):  # noqa: F811
    """A long video by its best piece, or all; the time is that of the frame nearest to the text."""
    g = torch.Generator().manual_seed(5)
    scenes = F.interpolate(torch.rand(12, 3, 4, 4, generator=g), size=(32, 48)) * 255
    scenes = scenes.permute(0, 2, 3, 1).byte().repeat_interleave(300, 0)
    write_video(tmp_path / "long.mp4", scenes, fps=1)  # an hour
    noise_video(tmp_path / "short.mp4", 1)
    arguments = ["a red dog", "--videos", tmp_path, "--window", 600, "--top", 9]
    out, _ = ask(*arguments, "--json", tmp_path / "best.json")
    row = r"\n +\d  0\.\d{4}  (0:[0-5]\d:[0-5]\d)  long.mp4   \(0:\d0:00 to [01]:\d0:00\)\n"
    assert re.search(row, out), out
    ask(*arguments, "--pieces", "--json", tmp_path / "all.json")
    best, every = (answers(tmp_path / name, "a red dog") for name in ("best.json", "all.json"))
    assert len(best) == 2 and len(every) == 7
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    t = model.encode_text(tokenizer(["a red dog"])).detach()
    transform, expected = data.test_transform(16), []
    for name in ("long.mp4", "short.mp4"):
        for piece in read_pieces(tmp_path / name, T, 600):
            f = model.encode_video(transform(piece.frames)[None]).detach()
            at = piece.times[F.cosine_similarity(t[:, None], f, dim=-1)[0].argmax()]
            score = exact.score(model, t, f, expected=True).item()
            expected.append((score, name, at, piece.start, piece.end))
    expected.sort(key=lambda x: -x[0])
    found = [(os.path.basename(x["file"]), x["at"], x["start"], x["end"]) for x in every]
    assert found == [(name, *(round(x, 3) for x in moment)) for _, name, *moment in expected]
    assert [x["score"] for x in every] == pytest.approx([x[0] for x in expected], abs=1e-3)
    for file in best:
        first = next(x for x in every if x["file"] == file["file"])
        assert file["start"] == first["start"]
    whole = ask("a red dog", "--videos", tmp_path, "--window", 0, "--pieces", "--top", 9)[0]
    assert len(whole.strip().splitlines()) == 4 and "(" not in whole


def test_bad_videos_and_odd_names(ask, run, folder, tmp_path):  # noqa: F811
    """What can't be read is named and left out; hostile names and lists do no harm."""
    noise_video(tmp_path / "good.mp4", 0)
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:200])
    for name, text in PLAYLISTS.items():
        (tmp_path / name).write_text(text.format(other="good.mp4"))
    out, err = ask("x", "--videos", tmp_path)
    assert "encoded 1 videos, 1 in the index, 1 pieces; 7 unreadable left out:\n" in err
    assert re.search(r"\n  .*bad\.mp4: can't be decoded: Invalid data", err)
    assert [line.split()[-1] for line in out.strip().splitlines()[2:]] == ["good.mp4"]
    out, err = ask("x", "--videos", tmp_path)  # not tried again until it changes, and still named
    assert "encoded 0 videos, 1 in the index" in err and "bad.mp4" in err
    assert len(err.splitlines()) == 2 + 7
    for k in range(8):
        (tmp_path / f"b{k}.mp4").touch()
    err = ask("x", "--videos", tmp_path)[1]
    assert "15 unreadable" in err and err.count(".mp4") + err.count(".ts") == 10
    assert err.count("\n  ") == 11 and err.endswith("\n  and 5 more\n")
    noise_video(tmp_path / "bad.mp4", 1)  # repaired
    assert "encoded 1 videos, 2 in the index" in ask("x", "--videos", tmp_path)[1]

    odd = tmp_path / "odd"
    odd.mkdir()
    for name in (b"caf\xe9.mp4", b"\x1b]0;owned\x07\x1b[31m.mp4", b"new\nline.mp4",
                 b"\x7f\xc2\x9b.mp4",
                 "\u202egpj.mp4".encode(), b"<b>.mp4"):
        os.link(tmp_path / "good.mp4", os.fsencode(odd) + b"/" + name)
    (odd / "\x1b[2Jbad.mp4").write_text("")
    done = run("search.py", "x", "--ckpt", folder / "model.pt", "--videos", odd,
               "--workers", 1, "--top", 9,
               "--report", tmp_path / "r.html", env={**ENV, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0, done.stderr
    for text in (r"caf\udce9.mp4", r"\x1b]0;owned\x07\x1b[31m.mp4", r"new\nline.mp4",
                 r"\x7f\x9b.mp4",
                 r"\u202egpj.mp4", "<b>.mp4"):
        assert text in done.stdout
    assert r"\x1b[2Jbad.mp4" in done.stderr
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;.mp4" in page and "<b>.mp4" not in page
    for text in (done.stdout, done.stderr, page):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_where_the_index_goes(ask, tmp_path):
    (tmp_path / "v").mkdir()
    noise_video(tmp_path / "v" / "a.mp4", 0)
    (tmp_path / "v" / se.INDEX).write_text("nothing can be written here")
    out, err = ask("x", "--videos", tmp_path / "v")
    assert "cannot write" in err and "searching without saving" in err and "--index" in err
    assert "a.mp4" in out
    assert "cannot write" in ask("--update", "--videos", tmp_path / "v", expect=2)[1]  # for cron
    for _ in range(2):
        out, err = ask("x", "--videos", tmp_path / "v", "--index", tmp_path / "index")
    assert "encoded 0 videos, 1 in the index" in err and "cannot" not in err
    (tmp_path / "w").mkdir()
    noise_video(tmp_path / "w" / "a.mp4", 1)
    noise_video(tmp_path / "w" / "b.mp4", 2)
    common = ["--index", tmp_path / "index"]
    ask("x", "--videos", tmp_path / "w", *common)  # another folder's videos in the same place
    err = ask("x", "--videos", tmp_path / "v", *common)[1]
    assert "encoded 0 videos, 1 in the index" in err
    assert sorted(os.listdir(tmp_path / "v")) == [se.INDEX, "a.mp4"]


def test_several_folders_and_files(ask, tmp_path):
    for name in ("v", "w"):
        (tmp_path / name).mkdir()
        for k in range(2):
            noise_video(tmp_path / name / f"{k}.mp4", k + 7 * (name == "w"))
    files = lambda *paths: sorted(ask("-f", "x", "--top", 9, "--videos", *paths)[0].splitlines())
    all_ = [str(tmp_path / name / f"{k}.mp4") for name in "vw" for k in range(2)]
    assert files(tmp_path / "v", tmp_path / "w") == files(tmp_path) == all_
    assert files(tmp_path / "v", all_[3]) == all_[:2] + all_[3:]
    assert files(all_[1]) == all_[1:2]
    assert files(tmp_path, tmp_path / "v", all_[0]) == all_  # each once


def test_queries_from_a_pipe_and_output_for_programs(
    ask, run, folder, monkeypatch, tmp_path  # noqa: F811
):
    videos = folder / "videos"
    lines = lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    lines(b"a dog\n\n  \na c\xe9t")
    out, _ = ask("--videos", videos, "--json", tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    assert list(found) == ["a dog", "a c\ufffdt"]
    assert re.findall(r"\n(a .*)\n rank", out) == list(found)
    lines(b"a dog\n")
    out, err = ask("--videos", videos, "--json", "-")
    assert same(json.loads(out)["a dog"], found["a dog"])  # nothing else on standard output
    lines(b"a dog\nmore\n")
    out, _ = ask("-f", "--top", 2, "--videos", videos)
    assert out.splitlines()[:2] == [x["file"] for x in found["a dog"][:2]]
    assert len(out.splitlines()) == 4
    lines(b"\n")
    out, err = ask("--videos", videos, expect=2)
    assert "error: no query" in err and out == ""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    lines(f"a dog\n{broken}\nmore\n".encode())
    out, err = ask("--videos", videos, "--json", tmp_path / "y.json", expect=2)
    assert list(json.loads((tmp_path / "y.json").read_text())) == ["a dog", "more"]
    assert err.count("error: ") == 1 and "broken.png" in err
    command = [sys.executable, str(ROOT / "search.py"), "--videos", str(videos),
               "--ckpt", str(folder / "model.pt"),
               "--device", "cpu"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job = subprocess.Popen(command, **pipes, env={**os.environ, **ENV})
    with killing(job.pid):
        job.stdin.write(b"a dog\n" * 10_000)  # as many as fit: more than can be answered
        job.stdin.flush()
        job.stdout.readline()
        job.stdout.close()  # as head does
        with contextlib.suppress(BrokenPipeError):
            job.stdin.close()
        err = job.stderr.read().decode()
        assert job.wait() == 0 and "Traceback" not in err and "BrokenPipe" not in err


@pytest.mark.parametrize("words", [
    "--update -n", "--update --json x.json", "--update -f", "--serve --report x.html",
    "--serve -0", "--every 5", "--index="])
def test_options_that_would_do_nothing_are_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        se.parse_args(["--videos", "x", *words.split()])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --")


def test_what_no_result_replaces(ask, folder, tmp_path):  # noqa: F811
    """The weights, the pictures that are asked for, the videos that are searched, a device."""
    picture = tmp_path / "photo.png"
    write_video(picture, numbered(1), codec="png", container="image2", pix_fmt="rgb24")
    shutil.copy(folder / "videos" / "v1.mp4", tmp_path / "v1.mp4")
    (tmp_path / "link").symlink_to(folder / "model.pt")
    ask("x", "--videos", tmp_path)  # the index is made
    names = ["photo.png", "v1.mp4", "link", ".", "missing/x"]
    files = [folder / "model.pt", *(tmp_path / name for name in names), "/dev/null"]
    for option in ("--json", "--report"):
        for file in files:
            before = inodes(folder, tmp_path)
            _, err = ask(picture, "--videos", tmp_path, option, file, expect=2)
            assert f"error: {option} {file}" in err, err
            assert inodes(folder, tmp_path) == before
    _, err = ask("x", "--videos", tmp_path, "--json", "new", "--report", "./new", expect=2)
    assert "new: this command reads or writes" in err
    for _ in range(2):  # a result is replaced
        ask(picture, "--videos", tmp_path, "--json", tmp_path / "x", "--report", tmp_path / "y")
    assert len(answers(tmp_path / "x", str(picture))) == 1


def test_a_video_that_is_left_out_is_not_replaced(ask, folder, tmp_path):  # noqa: F811
    shutil.copy(folder / "videos" / "v1.mp4", tmp_path / "v1.mp4")
    (tmp_path / "broken.mp4").write_text("no video")
    ask("x", "--videos", tmp_path, "--json", tmp_path / "broken.mp4", expect=2)
    assert (tmp_path / "broken.mp4").read_text() == "no video"


def test_a_picture_that_a_pipe_names(ask, folder, tmp_path, monkeypatch):  # noqa: F811
    picture = tmp_path / "photo.png"
    write_video(picture, numbered(1), codec="png", container="image2", pix_fmt="rgb24")
    content = picture.read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{picture}\n".encode())))
    ask("--videos", folder / "videos", "--json", picture, expect=2)
    assert picture.read_bytes() == content


@pytest.mark.parametrize("to_file", [False, True])
def test_a_terminal_is_asked(folder, tmp_path, to_file):  # noqa: F811
    pid, terminal = pty.fork()
    if pid == 0:
        status = 99
        try:
            torch.set_num_threads(1)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
            if to_file:  # results alone go there: the terminal still asks
                sys.stdout = open(tmp_path / "results", "w")
            sys.argv = ["search.py", "--videos", str(folder / "videos")]
            sys.argv += ["--ckpt", str(folder / "model.pt")]
            sys.argv += ["--device", "cpu"]
            status = ev.run(se.main)
        finally:
            os._exit(status)
    seen = b""

    def read_until(mark, times):
        nonlocal seen
        while seen.count(mark) < times:
            seen += os.read(terminal, 4096)
    with killing(pid):
        read_until(b"query> ", 1)
        os.write(terminal, b"a dog\n")
        read_until(b"query> ", 2)
        os.write(terminal, b"\n")
        read_until(b"query> ", 3)
        os.write(terminal, b"\x04")  # Ctrl-D
        with contextlib.suppress(OSError):  # its end
            while part := os.read(terminal, 4096):
                seen += part
    assert ended(pid) == 0
    results = (tmp_path / "results").read_bytes() if to_file else seen
    assert results.count(b" rank   score  at       file") == 1
    assert (b"query> " in results) != to_file


def test_a_plain_clip_is_a_checkpoint(released, cache, ask, tmp_path):
    """Nothing trained: frames weighted by their nearness to the text, of CLIP's own embeddings."""
    clip = clip_model.CLIP.from_state_dict(weights.to_openai_names(released[2].state_dict()))
    torch.save(released[2].state_dict(), tmp_path / "pytorch_model.bin")
    for v in range(4):
        noise_video(tmp_path / f"{v}.mp4", v)
    ckpt = tmp_path / "pytorch_model.bin"
    _, err = ask("a dog runs", "--videos", tmp_path, "--json", tmp_path / "x.json", ckpt=ckpt)
    assert "encoded 4 videos, 4 in the index" in err
    tokenizer, transform = weights.load_vocabulary(), data.test_transform(32)
    t = clip.encode_text(tokenizer(["a dog runs"]))
    for x in answers(tmp_path / "x.json", "a dog runs"):
        f = clip.encode_image(transform(decode.read_frames(decode.Segment(x["file"]), 12)))
        a = (F.cosine_similarity(t, f) / 0.1).softmax(0)
        v = (a[:, None] * F.normalize(f, dim=-1)).sum(0)
        assert x["score"] == pytest.approx(F.cosine_similarity(t[0], v, dim=0).item(), abs=5e-3)


def test_without_a_checkpoint_and_without_a_network(
    ask, folder, monkeypatch, tmp_path  # noqa: F811
):
    """--ckpt is CLIP ViT-B/32; where it can't be had one line says which file to put where."""
    monkeypatch.setenv("TMASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "OPENAI_URL", "http://127.0.0.1:9")
    ckpt = se.parse_args(["a dog", "--videos", "x"]).ckpt
    _, err = ask("a dog", "--videos", folder / "videos", ckpt=ckpt, expect=2)
    sha256, last = weights.MODELS["ViT-B/32"][1], err.splitlines()[-1]
    assert last.startswith("error: ")
    assert f"put the file with SHA-256 {sha256} at {tmp_path / 'cache' / 'ViT-B-32.pt'}" in last


def test_sampling_and_bfloat16_on_request(ask, folder, tmp_path):  # noqa: F811
    runs = dict(closed=[], again=["--seed", 5], sampled=["--no-expected"],
                other=["--no-expected", "--seed", 5],
                point=["--trials", 0], bf16=["--amp", "bf16", "--index", tmp_path / "i"])
    scores = {}
    for name, options in runs.items():
        arguments = ["--videos", folder / "videos", "--top", 7, *options]
        ask("a red dog", *arguments, "--json", tmp_path / f"{name}.json")
        found = {x["file"]: x["score"] for x in answers(tmp_path / f"{name}.json", "a red dog")}
        scores[name] = torch.tensor([found[file] for file in sorted(found)])
    assert torch.equal(scores["closed"], scores["again"])
    assert not torch.equal(scores["sampled"], scores["other"])
    for name in ("sampled", "other", "point"):
        assert 1e-4 < (scores[name] - scores["closed"]).abs().max() < 0.3
    assert 0 < (scores["bf16"] - scores["closed"]).abs().max() < 0.02


def test_progress_and_shards_that_are_old(ask, folder, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.setattr(se, "Progress", functools.partial(Progress, every=0))
    monkeypatch.setattr(store, "OLD", 0)
    for v in range(4):
        noise_video(tmp_path / f"{v}.mp4", v)
    out, err = ask("x", "--videos", tmp_path, "--batch", 1)
    assert len(shards(tmp_path)) >= 3
    assert "encoding: 2 of 4 files, " in err and "encoding: 4 of 4 files, " in err
    assert "encoding" not in out


def test_an_index_stays_in_use():
    """The fingerprint of a model is what it was when the format was fixed, as written down then."""
    sizes = dict(embed_dim=8, image_size=16, patch_size=8, vision_width=64, vision_layers=1)
    sizes.update(context_length=16, vocab_size=514, text_width=64, text_layers=1)
    clip = clip_model.CLIP(**sizes)
    model = TMASS(clip, frames=4)
    for x in clip.visual.state_dict().values():
        x.copy_(torch.arange(x.numel()).view_as(x) / 7)
    assert store.fingerprint(model, 10) == "f9a7b0b5a8e42c53"
    assert store.fingerprint(model, 2.5) == "3c42eb476f2f7f67"
    for k in range(64):  # any weight counts
        before = store.fingerprint(model, 10)
        with torch.no_grad():
            clip.visual.proj[k, k % 8] += 1e-3
        assert store.fingerprint(model, 10) != before


def test_a_lone_name_is_no_list():
    for lone in ("videos", Path("videos"), b"videos"):
        with pytest.raises(TypeError, match="list of folders and files"):
            se.build_index(make(), lone)
    f = torch.randn(3, T, D)
    with pytest.raises(TypeError, match="encode_texts"):
        se.search(make(), "a dog", gallery(f, [3]))


def test_pooled_frames_stay_on_the_device():
    """As far as they fit, and those that this process needs; on the CPU they are not copied."""
    index = gallery(torch.randn(12, T, D), [3, 3, 3, 3])
    size = index.shards[0].mean.nbytes
    for job, most, expected in (
            (processes.ALONE, 9 * size, "1111"),
            (processes.ALONE, 2 * size, "1100"),
            (processes.Job(1, 2), 9 * size, "0101"),
            (processes.Job(1, 2), size, "0100")):
        moved = se.move_means(index.shards, torch.device("meta"), job, most)
        assert "".join(str(int(shard.mean.is_meta)) for shard in moved) == expected
    same_place = se.move_means(index.shards, torch.device("cpu"))
    for a, b in zip(same_place, index.shards):
        assert a.mean is b.mean


# ---- kills, and many at once ----

def test_an_index_survives_kills(folder, tmp_path, ask, monkeypatch):  # noqa: F811
    """kill -9 at five random moments costs at most what is younger than the last shard."""
    monkeypatch.setattr(store, "FULL", 3)
    ckpt, peace = folder / "model.pt", tmp_path / "peace"
    peace.mkdir()
    for k in range(80):
        noise_video(peace / f"{k:02d}.mp4", k)
    shutil.copytree(peace, tmp_path / "war")
    arguments = ["noise", "--window", .25, "--top", 80, "--batch", 4]
    alone = [*arguments, "--videos", peace, "--json", tmp_path / "peace.json"]
    assert ended(forked(*alone, ckpt=ckpt)) == 0
    moments, had, index = random.Random(0), 0, tmp_path / "war" / se.INDEX
    for k in range(5):
        pid = forked(*arguments, "--videos", tmp_path / "war", ckpt=ckpt)
        deadline = time.time() + 60
        while time.time() < deadline and len(list(index.glob("*.shard"))) <= had:
            time.sleep(0.002)
        time.sleep(0.005 * moments.random())  # anywhere between two shards, or within one
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (-signal.SIGKILL, 0)
        now = files_in_shards(tmp_path / "war")
        assert len(now) == len(set(now)) > had  # nothing twice, nothing lost
        had, before = len(now), had
        if had == 80:  # a slow observer: all but the last start was killed
            break
    assert before
    _, err = ask(*arguments, "--videos", tmp_path / "war", "--json", tmp_path / "war.json")
    assert f"encoded {80 - had} videos, 80 in the index, 240 pieces" in err
    war = answers(tmp_path / "war.json")
    war = [dict(x, file=x["file"].replace("/war/", "/peace/")) for x in war]
    assert same(war, answers(tmp_path / "peace.json"))


def test_two_searches_at_once(folder, tmp_path, ask, monkeypatch):  # noqa: F811
    monkeypatch.setattr(store, "FULL", 3)
    (tmp_path / "v").mkdir()
    for k in range(20):
        noise_video(tmp_path / "v" / f"{k:02d}.mp4", k)
    arguments = ["noise", "--videos", tmp_path / "v", "--top", 20]
    pids = []
    for k in range(2):
        pids.append(forked(*arguments, "--json", tmp_path / f"{k}.json", ckpt=folder / "model.pt"))
    assert [ended(pid) for pid in pids] == [0, 0]
    _, err = ask(*arguments, "--json", tmp_path / "after.json")
    assert "encoded 0 videos, 20 in the index, 20 pieces" in err
    for k in range(2):
        found = answers(tmp_path / f"{k}.json")
        assert same(found, answers(tmp_path / "after.json")) and len(found) == 20


@pytest.mark.parametrize("saved", [True, False])
def test_two_processes_are_one(folder, tmp_path, ask, monkeypatch, saved):  # noqa: F811
    """Each encodes its share into shards of its own and searches its share; saved or not."""
    monkeypatch.setattr(store, "FULL", 3)
    (tmp_path / "v").mkdir()
    for k in range(11):
        noise_video(tmp_path / "v" / f"{k:02d}.mp4", k)
    (tmp_path / "v" / "bad.mp4").write_text("")
    arguments = ["noise", "more", "--videos", tmp_path / "v"]
    arguments += ["--window", .25, "--top", 4, "--shortlist", 9]
    if not saved:
        (tmp_path / "v" / se.INDEX).write_text("")
    job = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    two = [*arguments, "--json", tmp_path / "two.json"]
    ckpt = folder / "model.pt"
    pids = [forked(*two, ckpt=ckpt, **job, RANK=str(k), LOCAL_RANK=str(k)) for k in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0]
    if saved:
        assert len(files_in_shards(tmp_path / "v")) == 12 and len(shards(tmp_path / "v")) > 2
        assert "encoded 0 videos, 11 in the index" in ask(*arguments)[1]
        shutil.rmtree(tmp_path / "v" / se.INDEX)
    ask(*arguments, "--json", tmp_path / "one.json")
    for query in ("noise", "more"):
        assert same(answers(tmp_path / "one.json", query), answers(tmp_path / "two.json", query))


def test_a_process_may_have_nothing_to_search(folder, tmp_path, ask):  # noqa: F811
    """Two processes, one shard: the second has no row of it."""
    (tmp_path / "v").mkdir()
    noise_video(tmp_path / "v" / "0.mp4", 0)
    arguments = ["noise", "--videos", tmp_path / "v"]
    ask(*arguments, "--json", tmp_path / "one.json")
    for shortlist in (0, 1):
        job = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        two = [*arguments, "--shortlist", shortlist, "--json", tmp_path / "two.json"]
        pids = []
        for rank in "01":
            ranks = dict(RANK=rank, LOCAL_RANK=rank)
            pids.append(forked(*two, ckpt=folder / "model.pt", **job, **ranks))
        assert [ended(pid) for pid in pids] == [0, 0]
        assert same(answers(tmp_path / "one.json"), answers(tmp_path / "two.json"))


@pytest.mark.slow
def test_torchrun(folder, run, tmp_path, ask):  # noqa: F811
    (tmp_path / "v").mkdir()
    for k in range(6):
        noise_video(tmp_path / "v" / f"{k}.mp4", k)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *torchrun, str(ROOT / "search.py"), "noise",
               "--videos", str(tmp_path / "v"), "--ckpt", str(folder / "model.pt"),
               "--device", "cpu", "--workers", "1"]
    options = dict(capture_output=True, text=True, timeout=170, env={**os.environ, **ENV})
    done = subprocess.run([*command, "--json", str(tmp_path / "two.json")], **options)
    assert done.returncode == 0 and done.stdout.count(" rank   score") == 1, done.stderr
    assert len(shards(tmp_path / "v")) == 2
    ask("noise", "--videos", tmp_path / "v", "--json", tmp_path / "one.json")
    assert same(answers(tmp_path / "one.json"), answers(tmp_path / "two.json"))
    piped = [x for x in command if x != "noise"] + ["-f", "-n"]
    piped = subprocess.run(piped, input="noise\nnoise\n", **options)
    found = [x["file"] for x in answers(tmp_path / "one.json")]
    assert piped.stdout.splitlines() == 2 * found, piped.stderr


# ---- the two stages ----

def gallery(f, sizes, pieces_of=1):
    """An Index of features (V,T,D) in shards of these sizes, so many pieces to a file."""
    parts, names = f.half().split(sizes), []
    shards_ = []
    for part in parts:
        P = len(part)
        times = torch.arange(T).float().expand(P, T)
        spans = torch.arange(P).float()[:, None] + torch.tensor([0., 1.])
        mean = store.pooled(part).half()
        number = torch.arange(P).int() // pieces_of
        shards_.append(store.Shard(part, mean, times, spans, number, []))
    file = torch.arange(len(f)) // pieces_of
    names = [f"{v:04d}" for v in range(int(file.max()) + 1)]
    return se.Index(shards_, torch.tensor([0, *sizes]).cumsum(0), file, names, names)


@pytest.mark.parametrize("trials, method", [
    (0, {}), (5, {}), (5, dict(heads=4, radius="scaled")), (5, dict(pooling="mean")),
    (5, dict(pooling="query")),
    (5, dict(radius="none"))])
@pytest.mark.parametrize("expected", [False, True])
def test_search_is_exact(trials, method, expected):
    """The order of `score`, over everything and by a shortlist of all, however shards are cut."""
    model = make(**method)
    g = torch.Generator().manual_seed(1)
    t = torch.randn(3, D, generator=g)
    f = torch.randn(50, 1, D, generator=g) + 0.7 * torch.randn(50, T, D, generator=g)
    scoring = dict(trials=trials, expected=expected)
    scores, ids = exact.score(model, t, f.half().float(), **scoring).sort(dim=1, descending=True)
    for sizes in ([50], [20, 0, 30], [1] * 50):
        index = gallery(f, sizes)
        for shortlist in (0, 50):
            for i, hits in enumerate(se.search(model, t, index, shortlist, top=7, **scoring)):
                assert [x.file for x in hits] == ids[i, :7].tolist()
                assert [x.score for x in hits] == pytest.approx(scores[i, :7].tolist(), abs=1e-6)
    mean = torch.cat([shard.mean for shard in index.shards]).float()
    points = (F.normalize(t, dim=-1) @ mean.T).sort(dim=1, descending=True).indices
    for i, hits in enumerate(se.search(model, t, index, 4, 4, **scoring)):
        assert {x.file for x in hits} == set(points[i, :4].tolist())
        found = f.half().float()[[x.file for x in hits]]
        again = exact.score(model, t[i:i + 1], found, **scoring)[0]
        assert [x.score for x in hits] == pytest.approx(again.tolist(), abs=1e-6)
        assert (again.diff() <= 0).all()
    assert [len(hits) for hits in se.search(model, t, index, 1000, top=99, **scoring)] == [50] * 3


def test_one_row_per_file_however_many_pieces_it_has():
    """The shortlist grows until it has enough files; what doesn't count or has no score is out."""
    model, g = make(), torch.Generator().manual_seed(1)
    t, f = torch.randn(1, D, generator=g), torch.randn(60, T, D, generator=g)
    f[:20] = t + 0.1 * f[:20]  # all pieces of two files are nearer to the text than the others
    index = gallery(f, [20, 40], pieces_of=10)
    (hits,) = se.search(model, t, index, shortlist=3, top=5)
    assert len(hits) == len({x.file for x in hits}) == 5
    assert sorted(x.file for x in hits[:2]) == [0, 1]
    scores = exact.score(model, t, f.half().float())[0]
    best = scores.view(6, 10).amax(1)
    assert [x.score for x in hits] == pytest.approx([best[x.file].item() for x in hits], abs=1e-6)
    (hits,) = se.search(model, t, index, shortlist=3, top=3, pieces=True)
    assert len(hits) == 3 and all(x.file < 2 for x in hits)
    index.file[:10] = -1  # a file that is gone
    for shortlist in (0, 3):
        (hits,) = se.search(model, t, index, shortlist, top=6)
        assert hits[0].file == 1 and len(hits) == 5
    index.shards[0].frames[15] = torch.nan
    assert len(se.search(model, t, index, 0, top=60, pieces=True)[0]) == 49


def test_equal_scores_stand_in_the_order_of_names():
    model = make()
    f = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1)).expand(12, T, D)
    index = gallery(f, [5, 7], pieces_of=2)._replace(paths=list("fedcba"))
    (hits,) = se.search(model, torch.randn(1, D), index, 0, top=3)
    assert [x.file for x in hits] == [5, 4, 3] and [x.start for x in hits] == [5, 3, 1]
