"""Search: the index, the two stages, and the command line."""
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_eval import ENV, D, T, called, folder, make, noise_video, one_error  # noqa: F401

import data
import eval as ev
import search as se
from tmass import load_checkpoint, save_checkpoint


def test_mistakes_are_one_line(folder, tmp_path, capsys, monkeypatch):
    good, videos = folder / "model.pt", folder / "videos"
    (tmp_path / "empty").mkdir()
    for arguments, *words in (
            (["x"], "--videos"), (["--videos", videos], "query"), ([" ", "--videos", videos], "query"),
            (["x", "--videos", tmp_path / "nowhere"], "nowhere", "no such folder"), (["x", "--videos", good], "model.pt", "no such folder"),
            (["x", "--videos", tmp_path / "empty"], "empty", "no videos"), (["x", "--videos", videos, "--top", 0], "--top", "0")):
        status, out, err = called(capsys, monkeypatch, "--ckpt", good, "--workers", 0, "--device", "cpu", *arguments, room=se)
        assert one_error(status, out, err, *words), (arguments, status, err)


def test_search_refreshes_its_index(folder, tmp_path, capsys, monkeypatch):
    """New, changed and gone files; a second query encodes nothing; other weights start anew; scores are the exact ones."""
    for v in range(3):
        noise_video(tmp_path / f"v{v}.mp4", v)
    (tmp_path / "below").mkdir()
    noise_video(tmp_path / "below" / "v3.MP4", 3)
    (tmp_path / "notes.txt").write_text("not a video")

    def query(*more, ckpt=folder / "model.pt"):
        arguments = ["--ckpt", ckpt, "a red dog", "--videos", tmp_path, "--workers", 0, "--device", "cpu", *more]
        status, out, err = called(capsys, monkeypatch, *arguments, room=se)
        assert status == 0, err
        return out
    out = query("a cat", "--top", 3, "--json", tmp_path / "hits.json")
    assert "encoded 4 videos, 4 in the index" in out and "a cat" in out
    hits = json.loads((tmp_path / "hits.json").read_text())
    assert [h["rank"] for h in hits["a red dog"]] == [1, 2, 3] and list(hits) == ["a red dog", "a cat"]
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    files = ["below/v3.MP4", "v0.mp4", "v1.mp4", "v2.mp4"]
    f = ev.encode_videos(model, [data.Clip(str(tmp_path / name), None, None) for name in files])
    scores = model.score(ev.encode_texts(model, tokenizer, ["a red dog"]), f)[0]
    expected = [(scores[v].item(), str(tmp_path / files[v])) for v in scores.argsort(descending=True)[:3]]
    for h, (score, file) in zip(hits["a red dog"], expected):
        assert abs(h["score"] - score) < 1e-3 and h["file"] == file  # float16 in the index
    index = torch.load(tmp_path / se.INDEX, weights_only=True)
    assert index["frames"].dtype == index["mean"].dtype == torch.float16
    assert index["frames"].shape == (4, T, D) and list(index["files"]) == files

    assert "encoded 0 videos, 4 in the index" in query()
    noise_video(tmp_path / "v4.mp4", 4)        # new
    noise_video(tmp_path / "v1.mp4", 11)       # changed
    os.utime(tmp_path / "v1.mp4", ns=(1, 1))
    (tmp_path / "v0.mp4").unlink()             # gone
    assert "encoded 2 videos, 4 in the index" in query()
    kept, again = se.build_index(model, str(tmp_path)), torch.load(tmp_path / se.INDEX, weights_only=True)
    files = ["below/v3.MP4", "v1.mp4", "v2.mp4", "v4.mp4"]
    fresh = ev.encode_videos(model, [data.Clip(str(tmp_path / name), None, None) for name in files])
    assert kept.names == list(again["files"]) == files and (kept.frames.float() - fresh).abs().max() < 1e-2 * fresh.abs().max()
    assert (kept.mean.float() - se.pooled(fresh)).abs().max() < 1e-3

    (tmp_path / se.INDEX).write_bytes((tmp_path / se.INDEX).read_bytes()[:3000])  # damaged
    out = query()
    assert "not a readable index" in out and "encoded 4 videos, 4 in the index" in out
    with torch.no_grad():
        model.clip.visual.proj += 0.1
    save_checkpoint(tmp_path / "other.pt", model, tokenizer, {})
    out = query(ckpt=tmp_path / "other.pt")
    assert "other weights" in out and "encoded 4 videos, 4 in the index" in out and "encoded 0 videos" in query(ckpt=tmp_path / "other.pt")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_an_index_survives_a_kill(folder, tmp_path):
    """A folder of many videos takes hours: what was encoded before a kill -9 is not encoded again, and the result is the same."""
    for k in range(40):
        noise_video(tmp_path / f"{k:02d}.mp4", k)
    script = "import sys, search; search.CHUNK, search.SAVE_SECONDS = 3, 0; sys.exit(search.run(search.main))"
    arguments = ["--ckpt", folder / "model.pt", "noise", "--videos", tmp_path, "--workers", "0", "--device", "cpu", "--top", "40"]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = {**os.environ, **ENV, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (tmp_path / se.INDEX).exists() and time.time() < deadline:
        time.sleep(0.002)
    job.kill()
    job.wait()
    had = len(torch.load(tmp_path / se.INDEX, weights_only=True)["files"])
    assert 3 <= had < 40 and had % 3 == 0
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100).stdout
    assert f"encoded {40 - had} videos, 40 in the index" in again
    (tmp_path / se.INDEX).unlink()
    anew = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100).stdout
    assert "encoded 40 videos" in anew and again.splitlines()[-40:] == anew.splitlines()[-40:]


def test_search_with_bad_videos_and_folders(folder, run, tmp_path, capsys, monkeypatch):
    noise_video(tmp_path / "good.mp4", 0)
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:200])
    arguments = ["--ckpt", folder / "model.pt", "x", "--videos", tmp_path, "--workers", 0, "--device", "cpu"]
    status, _, err = called(capsys, monkeypatch, *arguments, room=se)
    assert status == 2 and "bad.mp4" in err and "--skip-bad" in err and len(err.strip().splitlines()) == 1
    status, out, _ = called(capsys, monkeypatch, *arguments, "--skip-bad", room=se)  # what was encoded before the error is not lost
    assert status == 0 and "encoded 0 videos, 1 in the index; 1 unreadable ones left out: bad.mp4" in out
    odd = os.fsencode(tmp_path) + b"/caf\xe9.mp4"  # not Unicode: found and shown, whatever the terminal's encoding
    os.link(tmp_path / "good.mp4", odd)
    done = run("search.py", *arguments, "--skip-bad", env={**ENV, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and "caf\\udce9.mp4" in done.stdout, done.stderr
    os.unlink(odd)
    status, _, err = called(capsys, monkeypatch, *arguments, room=se)  # known from the index, and still an error
    assert status == 2 and "bad.mp4" in err
    noise_video(tmp_path / "bad.mp4", 1)  # repaired
    status, out, _ = called(capsys, monkeypatch, *arguments, room=se)
    assert status == 0 and "encoded 1 videos, 2 in the index" in out
    (tmp_path / se.INDEX).unlink()
    (tmp_path / se.INDEX).mkdir()  # nothing can be written there
    status, out, _ = called(capsys, monkeypatch, *arguments, room=se)
    assert status == 0 and "searching without saving" in out and "good.mp4" in out
    assert sorted(os.listdir(tmp_path)) == [se.INDEX, "bad.mp4", "good.mp4"]


@pytest.mark.parametrize("trials, method", [
    (0, {}), (5, {}), (5, dict(heads=4, radius="scaled")), (5, dict(pooling="mean")), (5, dict(radius="none"))])
def test_search_is_exact(trials, method):
    """Over everything: the order of `score`. A shortlist as long as the gallery: the same. Shards: merged as the whole."""
    model, g = make(**method), torch.Generator().manual_seed(1)
    t, f = torch.randn(3, D, generator=g), torch.randn(50, 1, D, generator=g) + 0.7 * torch.randn(50, T, D, generator=g)
    half = f.half()
    index = se.Index(half, se.pooled(half).half(), [str(v) for v in range(50)])
    scores, ids = model.score(t, half.float(), trials).sort(dim=1, descending=True)
    for shortlist in (0, 50):
        found, where = se.search(model, t, index, shortlist, top=7, trials=trials)
        assert torch.equal(where, ids[:, :7]) and (found - scores[:, :7]).abs().max() < 1e-6
    parts = []
    for first, last in ((0, 20), (20, 50)):
        found, where = se.search(model, t, se.Index(half[first:last], index.mean[first:last], index.names[first:last]), 0, 7, trials)
        parts.append((found, where + first))
    assert torch.equal(se.merge(parts, 7)[1], ids[:, :7])
    points = (F.normalize(t, dim=-1) @ index.mean.float().T).sort(dim=1, descending=True).indices
    found, where = se.search(model, t, index, 4, 4, trials)
    assert all(set(a.tolist()) == set(b.tolist()) for a, b in zip(where, points[:, :4]))
    assert (found - model.score(t, half.float(), trials).gather(1, where)).abs().max() < 1e-6 and (found.diff(dim=1) <= 0).all()
    assert se.search(model, t, index, 1000, top=99, trials=trials)[1].shape == (3, 50)
