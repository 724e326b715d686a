"""Search: what is found and where, what is asked and printed, in one process and in several."""
import contextlib
import io
import json
import os
import pty
import shutil
import signal
import sys
import time

import av
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    SLOW,
    D,
    T,
    features,
    forked,
    free_port,
    noise_video,
    run_program,
    small_model,
    status_of,
)
from PIL import Image
from videos import numbered, write_video

import data
import eval as ev
import search
from clip_model import Tokenizer
from lib import exact
from lib import index as store
from lib.video import read_frames, read_pieces
from lib.weights import load_checkpoint, save_checkpoint

HERE = ["--workers", 0, "--device", "cpu"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with six videos in v/."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("v")
    for k in range(6):
        noise_video(tmp_path / "v" / f"{k}.mp4", k)
    return tmp_path


def answers(path):
    """The results in a file of --json, which holds one query's."""
    [found] = json.loads(path.read_text()).values()
    return found


def same(a, b):
    """Equal results, but for rounding."""
    assert [(x["file"], x["at"], x["start"]) for x in a] == [
        (x["file"], x["at"], x["start"]) for x in b]
    assert [x["score"] for x in a] == pytest.approx([x["score"] for x in b], abs=1e-3)


def stored(videos):
    """The names of the files in a folder's shards, each as often as it is there."""
    shards = (videos / search.INDEX).glob("*.shard")
    return [x[0] for path in shards for x in torch.load(path, weights_only=True)["files"]]


def until_saved(videos, shards=1):
    """Wait until a folder's index has so many shards."""
    deadline = time.monotonic() + 60
    while len([*(videos / search.INDEX).glob("*.shard")]) < shards:
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---- mistakes ----

@pytest.mark.parametrize("words, word", [
    ("x", "--videos"),
    ("x --videos nowhere --ckpt ViT-B/32", "nowhere"),  # before anything is downloaded
    ("x --videos empty --ckpt ViT-B/32", "no videos"),
    ("katz.png --videos v --ckpt ViT-B/32", "katz.png"),
    ("film.MP4 --videos v", "film.MP4"),
    ("broken.png --videos v", "broken.png"),
    ("broken.mp4 --videos v", "broken.mp4"),
    ("--videos v x", "x: there is no such folder or file (queries come before --videos)"),
    ("x --videos bad", "bad/x.mp4"),
    ("x --videos v -n", "without -n"),
    ("x --videos v --top 0", "--top"),
    ("x --videos v --ckpt nosuch.pt", "nosuch.pt"),
    ("x --videos v --json broken.mp4", "broken.mp4"),
    ("x --videos v --json model.pt --ckpt model.pt", "--json model.pt"),
    ("x --videos v --json missing/x", "missing"),
    ("x --videos v -f --json -", "--json -"),
    ("--videos v --update -n", "-n"),
    ("--videos v --update --json x.json", "--update"),
    ("--videos v --serve -0", "--serve"),
    ("--videos v --every 5", "--serve"),
])
def test_a_mistake_is_one_line(folder, call, ckpt, words, word):
    os.mkdir("empty")
    os.mkdir("bad")
    for path in ("bad/x.mp4", "broken.png", "broken.mp4"):
        (folder / path).write_text("nothing")
    shutil.copy(ckpt, "model.pt")
    before = sorted(folder.rglob("*"))
    status, out, err = call(search, "--ckpt", ckpt, *HERE, *words.split())
    last = err.splitlines()[-1]
    assert (status, out) == (2, "") and last.startswith("error: ") and word in last, err
    assert "Traceback" not in err
    changed = set(folder.rglob("*")) - set(before)
    assert all(search.INDEX in str(path) for path in changed)
    assert (folder / "broken.mp4").read_text() == "nothing"


# ---- what is found ----

def test_the_moment_of_the_best_piece(folder, ask, ckpt):
    """As TMASS scores, on average; the same from Python; by file or by piece."""
    scenes = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    scenes = F.interpolate(scenes, size=(32, 48)).permute(0, 2, 3, 1) * 255
    write_video("v/long.mp4", scenes.byte().repeat_interleave(30, 0), fps=1)  # six minutes
    ask("a red dog", "--videos", "v", "--window", 60, "--json", "best", "--top", 9)
    _, err = ask("a red dog", "--videos", "v", "--window", 60, "--json", "all", "--top", 99,
                 "--pieces")
    assert "encoded 0 videos, 7 in the index, 12 pieces" in err
    best, every = answers(folder / "best"), answers(folder / "all")
    assert len(best) == 7 and len(every) == 12
    model, tokenizer, _ = load_checkpoint(ckpt)
    t = ev.encode_texts(model, tokenizer, ["a red dog"])
    transform = data.test_transform(16)
    expected = []
    for path in sorted(map(str, folder.glob("v/*.mp4"))):
        for piece in read_pieces(path, T, 60):
            f = model.encode_video(transform(piece.frames)[None]).detach()
            nearest = F.cosine_similarity(t[:, None], f, dim=-1)[0].argmax()
            score = exact.score(model, t, f, expected=True).item()
            name = os.path.relpath(path)
            expected.append(dict(score=score, file=name, at=piece.times[nearest],
                                 start=piece.start))
    expected.sort(key=lambda x: -x["score"])
    same(every, expected)
    firsts = {}
    for x in expected:
        firsts.setdefault(x["file"], x)
    same(best, firsts.values())
    index = search.build_index(model, ["v"], window=60)
    [hits] = search.search(model, t, index, top=9)
    same([dict(x._asdict(), file=index.paths[x.file]) for x in hits], best)


@pytest.mark.parametrize("pooling", ["xpool", "mean", "query"])
def test_pictures_and_videos_as_queries(folder, ask, pooling):
    model = small_model(pooling=pooling)
    tokenizer = Tokenizer((), 16)
    save_checkpoint(folder / "other.pt", model, tokenizer, {})
    transform = data.test_transform(16)
    frames = read_frames("v/3.mp4", T)
    Image.fromarray(frames[1].permute(1, 2, 0).numpy()).save("Photo.PNG")
    queries = ["noise", "Photo.PNG", "v/5.mp4", "how to open Photo.PNG"]
    ask(*queries, "--videos", "v", "--top", 6, "--json", "x", ckpt=folder / "other.pt")
    found = json.loads((folder / "x").read_text())
    assert list(found) == queries  # the last is a text: there is no such file, and it has spaces
    with torch.no_grad():
        one = model.encode_video(transform(frames[1:2])[None])[0]
        several = model.encode_video(transform(read_frames("v/5.mp4", T))[None])[0]
        t = torch.stack([one[0], several.mean(0)])
        paths = [f"v/{k}.mp4" for k in range(6)]
        f = ev.encode_videos(model, paths)
        scores = exact.score(model, t, f, expected=True)
    for query, row in zip(queries[1:], scores):
        hits = {x["file"]: x["score"] for x in found[query]}
        assert hits == pytest.approx(dict(zip(paths, row.tolist())), abs=2e-3)


def test_upright_and_deep_pictures(tmp_path):
    wide = numbered(1, 64)[0, :32].permute(2, 0, 1)
    wide[:, :, 40:] = 255
    turned = Image.fromarray(wide.rot90(1, (1, 2)).permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    turned.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(search.read_picture(tmp_path / "a.png")[0], wide)
    for mode in ("L", "1", "P", "RGBA", "CMYK"):
        Image.new(mode, (5, 4)).save(tmp_path / "b.tiff")
        assert search.read_picture(tmp_path / "b.tiff").shape == (1, 3, 4, 5)
    grey = torch.arange(0, 2 ** 16, 2 ** 8).to(torch.uint16).numpy()[None]
    for order, mode in (("<", "I;16"), (">", "I;16B")):  # of bytes
        deep = Image.frombytes(mode, (256, 1), grey.astype(f"{order}u2").tobytes())
        deep.save(tmp_path / "b.tiff")
        assert search.read_picture(tmp_path / "b.tiff")[0, 2, 0].tolist() == list(range(256))


def gallery(f, sizes, pieces_of=1):
    """An Index of features (V,T,D) in shards of these sizes, so many pieces to a file."""
    shards = []
    for part in f.half().split(sizes):
        P = len(part)
        times = torch.arange(T).float().expand(P, T)
        spans = torch.arange(P).float()[:, None] + torch.tensor([0., 1.])
        shards.append(store.file_shard(part, times, spans, None))
    file = torch.arange(len(f)) // pieces_of
    names = [f"{v:04d}" for v in range(int(file.max()) + 1)]
    return search.Index(shards, torch.tensor([0, *sizes]).cumsum(0), file, names, names)


def found(model, t, index, *more, **options):
    return search.search(model, t, index, *more, exists=bool, **options)


@pytest.mark.parametrize("method", [
    {}, dict(heads=4, radius="scaled"), dict(pooling="mean"), dict(pooling="query"),
    dict(radius="none")])
def test_search_is_exact(method):
    """The order of exact.score, among all or a shortlist, however the shards are cut."""
    model = small_model(**method)
    t, f = features(3, 50)
    scores = exact.score(model, t, f.half().float(), expected=True)
    best, ids = scores.sort(dim=1, descending=True)
    for sizes in ([50], [20, 0, 30], [1] * 50):
        index = gallery(f, sizes)
        for i, hits in enumerate(found(model, t, index, 7)):
            assert [x.file for x in hits] == ids[i, :7].tolist()
            assert [x.score for x in hits] == pytest.approx(best[i, :7].tolist(), abs=1e-6)
    mean = torch.cat([shard.mean for shard in index.shards]).float()
    points = (F.normalize(t, dim=-1) @ mean.T).topk(4).indices
    for i, hits in enumerate(found(model, t, index, 4, shortlist=4)):
        files = [x.file for x in hits]
        assert sorted(files) == sorted(points[i].tolist())
        assert [x.score for x in hits] == pytest.approx(scores[i, files].tolist(), abs=1e-6)
        assert files == sorted(files, key=lambda v: -scores[i, v])


def test_one_result_per_file_however_many_pieces_it_has():
    """The shortlist grows until it has enough files; what has no score or is gone is left out."""
    model = small_model()
    t, f = features(1, 60)
    f[:20] = t + 0.1 * f[:20]  # all pieces of two files are nearer to the text than the others
    index = gallery(f, [20, 40], pieces_of=10)
    scores = exact.score(model, t, f.half().float(), expected=True).view(6, 10)
    [hits] = found(model, t, index, shortlist=3)
    assert len({x.file for x in hits}) == 5 and {x.file for x in hits[:2]} == {0, 1}
    assert [x.score for x in hits] == pytest.approx(
        [scores[x.file].max().item() for x in hits], abs=1e-6)
    [hits] = found(model, t, index, top=3, shortlist=3, pieces=True)
    assert len(hits) == 3 and all(x.file < 2 for x in hits)
    [hits] = search.search(model, t, index, 3, shortlist=3, exists="0001 0004 0005".__contains__)
    assert [x.file for x in hits] == [1, 4, 5] or [x.file for x in hits] == [1, 5, 4]
    index.file[:10] = -1  # a file that is not searched
    index.shards[0].frames[15] = torch.nan
    assert len(found(model, t, index, 60, pieces=True)[0]) == 49
    with pytest.raises(TypeError, match="encode_texts"):
        search.search(model, "a dog", index)


def test_equal_scores_stand_in_the_order_of_names():
    f = features(1, 1)[1].expand(12, T, D)
    index = gallery(f, [5, 7], pieces_of=2)._replace(paths=list("fedcba"))
    [hits] = found(small_model(), features(1, 1)[0], index, 3)
    assert [x.file for x in hits] == [5, 4, 3] and [x.start for x in hits] == [5, 3, 1]


# ---- questions and answers ----

def test_queries_from_a_pipe(folder, ask, monkeypatch):
    """One a line; a mistake in one leaves the others their answers."""
    (folder / "broken.png").write_text("nothing")
    lines = b"a dog\n\n  \nbroken.png\nkatz.png\na c\xe9t"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    out, err = ask("--videos", "v", "--json", "x", expect=2)
    assert list(json.loads((folder / "x").read_text())) == ["a dog", "a c\ufffdt"]
    assert out.count(" rank   score  at       file\n    1 ") == 2
    assert [line.split()[0] for line in err.splitlines() if ".png" in line] == ["error:"] * 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert "no query" in ask("--videos", "v", expect=2)[1]


def test_output_for_programs(folder, ask):
    """Names are the bytes that open the files; on a terminal, they can't do any harm."""
    names = [b"caf\xe9.mp4", b"new\nline.mp4", b"\x1b[31m.mp4", "\u202eb.mp4".encode()]
    for k, name in enumerate(names):
        os.rename(f"v/{k}.mp4", b"v/" + name)
    question = ["x", "--videos", "v", "--top", 9]
    files = [x["file"] for x in json.loads(ask(*question, "--json", "-")[0])["x"]]
    assert {os.path.basename(os.fsencode(x)) for x in files} == {*names, b"4.mp4", b"5.mp4"}
    for option, end in (("-0", "\0"), ("-f", "\n")):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())) as out:
            ask(*question, option)
        assert out.buffer.getvalue() == os.fsencode("".join(x + end for x in files))
    out, _ = ask(*question)
    for name in (r"caf\udce9.mp4", r"new\nline.mp4", r"\x1b[31m.mp4", r"\u202eb.mp4"):
        assert name in out


def test_a_terminal_is_asked(folder, ckpt):
    """On standard error, because results may go to a file."""
    pid, terminal = pty.fork()
    if pid == 0:
        status = 99
        try:
            signal.alarm(60)
            sys.stdin, sys.stdout, sys.stderr = open(0), open("results", "w"), open(2, "w")
            words = ["--videos", "v", "--ckpt", str(ckpt), "--device", "cpu", "--workers", "0"]
            status = run_program(lambda: search.main(words))
        finally:
            os._exit(status)
    lines = iter([b"a dog\n", b"\n", b"\x04"])
    with contextlib.suppress(OSError):  # its end
        while part := os.read(terminal, 4096):
            if part.endswith(b"query> "):
                os.write(terminal, next(lines))
    assert status_of(pid) == 0
    results = (folder / "results").read_text()
    assert results.count(" rank   score") == 1 and "query>" not in results


# ---- several processes, and sudden ends ----

@pytest.mark.parametrize("saved", [11, 1])
def test_two_processes_give_what_one_gives(folder, ask, ckpt, saved):
    """Each encodes its share into shards of its own, and reads its share of them."""
    for k in range(6, saved):
        noise_video(folder / "v" / f"{k}.mp4", k)
    for k in range(saved, 6):  # one shard: the second process has no row of it
        os.unlink(f"v/{k}.mp4")
    (folder / "v" / "bad.mp4").write_text("nothing")
    words = ["noise", "--videos", "v", "--window", .25, "--top", 9]
    job = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    two = [*words, "--json", "two", "--ckpt", ckpt, *HERE]
    pids = [forked(*two, **job, RANK=k, LOCAL_RANK=k) for k in "01"]
    assert [status_of(pid) for pid in pids] == [0, 0]
    assert len(stored(folder / "v")) == saved + 1
    assert f"encoded 0 videos, {saved} in the index" in ask(*words)[1]
    shutil.rmtree(folder / "v" / search.INDEX)
    ask(*words, "--json", "one")
    same(answers(folder / "two"), answers(folder / "one"))


def test_an_index_survives_kills(folder, ask, ckpt, monkeypatch):
    """kill -9 costs at most what is younger than the last shard; nothing is encoded twice."""
    monkeypatch.setattr(store, "FULL", 3)
    for k in range(6, 40):
        noise_video(folder / "v" / f"{k}.mp4", k)
    words = ["noise", "--videos", "v", "--window", .25, "--top", 99]
    kept = 0
    for _ in range(3):
        pid = forked(*words, "--ckpt", ckpt, *HERE)
        until_saved(folder / "v", kept + 1)
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) in (-signal.SIGKILL, 0)
        names = stored(folder / "v")
        assert len(names) == len(set(names)) > kept
        kept = len(names)
    _, err = ask(*words, "--json", "after")
    assert f"encoded {40 - kept} video" in err and "40 in the index, 120 pieces" in err
    ask(*words, "--index", "other", "--json", "fresh")
    same(answers(folder / "after"), answers(folder / "fresh"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_what_is_encoded_is_kept(folder, ask, ckpt, monkeypatch, number, status):
    """Ctrl-C searches it, too."""
    monkeypatch.setattr(store, "FULL", 1)
    for k in range(6, 60):
        noise_video(folder / "v" / f"{k}.mp4", k)
    pid = forked("noise", "--videos", "v", "--top", 99, "--json", "x", "--ckpt", ckpt, *HERE)
    until_saved(folder / "v")
    os.kill(pid, number)
    assert status_of(pid) == status
    kept = len(stored(folder / "v"))
    assert 0 < kept < 60
    if status == 0:
        assert len(answers(folder / "x")) == kept
    assert f"encoded {60 - kept} videos, 60 in" in ask("--videos", "v", "--update")[1]


def test_a_second_ctrl_c_ends_the_program(folder, ckpt, monkeypatch):
    monkeypatch.setattr(av, "open", av.open)
    exec(SLOW, {})
    (folder / "slow").touch()
    pid = forked("x", "--videos", "v", "--ckpt", ckpt, *HERE)
    for _ in range(2):
        time.sleep(1)
        os.kill(pid, signal.SIGINT)
    assert status_of(pid) == 130
