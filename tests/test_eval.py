"""Ranks and metrics by hand and by literal loops, the released protocol, eval.py on real files."""
import contextlib
import dataclasses
import functools
import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import free_port
from videos import write_video

import data
import eval as ev
import search
from clip_model import CLIP, Tokenizer
from lib import common, exact, report, video, weights
from lib.video import read_frames
from lib.weights import load_checkpoint, save_checkpoint
from tmass import POOLINGS, TMASS, MeanPool

D, T, NAN = 64, 4, float("nan")
ENV = {"OMP_NUM_THREADS": "1"}


# ---- ranks and metrics ----

def test_ranks_by_hand():
    """Four videos, of which the last has no caption. Both of video 0's captions meet a tie."""
    sims = torch.tensor([[0.9, 0.1, 0.9, 0.0],    # of video 0: tied with video 2 for place 1
                         [0.2, 0.5, 0.1, 0.6],    # of video 0: after videos 3 and 1
                         [0.9, 0.4, 0.0, 0.7],    # of video 1: after videos 0 and 3
                         [0.1, 0.5, 0.3, 0.3]])   # of video 2: after video 1, tied with video 3
    t2v, v2t = ev.ranks(sims, [0, 0, 1, 2])
    assert t2v.tolist() == [1.5, 3, 3, 2.5]
    # video 0: its captions' best is 0.9, as is video 1's, and video 2's is 0.1 -> 1.5;
    # video 1: its own 0.4 comes after 0.5 and 0.5 -> 3;
    # video 2: its own 0.3 comes after max(0.9, 0.1) and before 0 -> 2
    expected = torch.tensor([1.5, 3, 2, NAN], dtype=torch.float64)
    torch.testing.assert_close(v2t, expected, equal_nan=True)
    m = ev.metrics(v2t)
    assert m == dict(R1=0, R5=100, R10=100, R50=100, MdR=2, MnR=6.5 / 3)
    four = dict(R1=25, R5=50, R10=75, R50=75, MdR=4, MnR=17.25)
    assert ev.metrics([1, 2, 6, 60]) == four


def literal_ranks(sims, owner):
    N, V = sims.shape

    def rank(own, others):
        return 1 + sum(x > own for x in others) + sum(x == own for x in others) / 2

    t2v = []
    for i in range(N):
        others = [sims[i, v].item() for v in range(V) if v != owner[i]]
        t2v.append(rank(sims[i, owner[i]].item(), others))
    best = {}
    for v in set(owner):
        captions = [i for i in range(N) if owner[i] == v]
        best[v] = [max(sims[i, w].item() for i in captions) for w in range(V)]
    v2t = [NAN] * V
    for w in best:
        v2t[w] = rank(best[w][w], [best[v][w] for v in best if v != w])
    return t2v, v2t


def test_ranks_equal_literal_loops():
    """Random sizes, many ties, videos without captions."""
    g = torch.Generator().manual_seed(0)
    for N, V in ((13, 7), (1, 1), (6, 12), (23, 11)):
        sims = torch.randint(0, 6, (N, V), generator=g) / 8
        owner = torch.randint(0, V, (N,), generator=g)
        for found, literal in zip(ev.ranks(sims, owner), literal_ranks(sims, owner.tolist())):
            expected = torch.tensor(literal, dtype=torch.float64)
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_scores_that_are_not_numbers_rank_at_chance():
    sims = torch.full((5, 5), NAN)
    for ranks in ev.ranks(sims, range(5)):
        assert ranks.tolist() == [3] * 5
    sims[0, 1:] = -5.0
    assert ev.ranks(sims, range(5))[0][0] == 5  # its own score is the one that is not a number


class NoDoubles(torch.Tensor):
    """A tensor of a device without float64, as Apple's: what makes one there is an error."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return out.as_subclass(torch.Tensor)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return out


@torch.no_grad()
def test_a_device_without_float64():
    """Ranks, metrics, the released protocol and the analysis are the same there."""
    model = make()
    t = torch.randn(9, D)
    f = torch.randn(5, T, D)
    ann = data.Annotations([], ["a caption"] * 9, [0, 1, 2, 3, 0, 1, 2, 3, 0])
    scoring = dict(trials=3, seed=5, expected=False)
    results = []
    for kind in (torch.Tensor, NoDoubles):
        sims = ev.score_all(model, t, f, **scoring).as_subclass(kind)
        scored = ev.Scored(t.as_subclass(kind), f.as_subclass(kind), sims, ann, [], scoring)
        result = ev.summarise(model, scored, with_dsl=True, released=True)
        results.append((result, report.analyze(model, scored, *ev.ranks(sims, ann.owner))))
    assert results[0] == results[1]
    with pytest.raises(TypeError, match="float64"):
        t.as_subclass(NoDoubles).double()


def test_dsl_by_hand():
    sims = torch.tensor([[0.5, 0.4], [0.5, 0.1]])
    low = 0.1 * torch.tensor(-30.0).exp().item()
    torch.testing.assert_close(ev.dsl(sims), torch.tensor([[0.25, 0.4], [0.25, low]]))
    torch.testing.assert_close(ev.dsl(sims.T, 1), ev.dsl(sims).T)


# ---- a small model, real files ----


def make(**method):
    torch.manual_seed(0)
    clip = CLIP(embed_dim=D, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
                context_length=16, vocab_size=514, text_width=64, text_layers=1)
    model = TMASS(clip, **{"frames": T, "dropout": 0.0, **method}).eval()
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += 0.1 * torch.randn_like(p)
    if model.config["pooling"] == "xpool":
        model.pool.q.weight.data *= 10  # attention sharp enough for the text to matter
    return model


def noise_video(path, seed):
    g = torch.Generator().manual_seed(seed)
    frames = F.interpolate(torch.rand(6, 3, 4, 4, generator=g), size=(32, 48)) * 255
    write_video(path, frames.permute(0, 2, 3, 1).byte().contiguous())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven videos; a caption each in one.csv, up to three in many.csv, of which model.pt is."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "videos").mkdir()
    one = ["video,caption"]
    many = ["video,caption,split"]
    for v in range(7):
        noise_video(folder / "videos" / f"v{v}.mp4", v)
        # at most 16 byte-level tokens, or they would all be cut to the same
        one.append(f"v{v}.mp4,{'ab cdefg'[v:]} {v}")
        many += [f"v{v}.mp4,{i} of {v},test" for i in range(v % 3 + 1)]
    many += ["v0.mp4,someone,test", "v1.mp4,someone,test"]  # one text, two owners: an exact tie
    (folder / "one.csv").write_text("\n".join(one) + "\n")
    (folder / "many.csv").write_text("\n".join(many) + "\n")
    config = dict(data=str(folder / "many.csv"), root=str(folder / "videos"), seed=24)
    save_checkpoint(folder / "model.pt", make(), Tokenizer((), 16), config)
    return folder


def on(folder, *args):
    return ["--ckpt", folder / "model.pt", "--workers", 0, "--device", "cpu", *args]


def called(capsys, monkeypatch, *args, program=ev):
    """A command line in this process, for the many ways to get it wrong. -> (status, out, err)."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, args)])
    try:
        status = ev.run(program.main)
    except SystemExit as e:  # argparse
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def call(capsys, monkeypatch):
    """call("--ckpt", ...) -> (status, stdout, stderr)."""
    return functools.partial(called, capsys, monkeypatch)


def one_error(status, out, err, *words):
    """Exit status 2 and a last line that says why, no traceback."""
    last = (err.strip().splitlines() or [""])[-1]
    says = "error: " in last and all(word in last for word in words)
    return status == 2 and says and "Traceback" not in err


def annotations(folder, name):
    return data.load_annotations(str(folder / name), str(folder / "videos"), "all")


def saved(path):
    return torch.load(path, weights_only=True)


def literal_sims(model, tokenizer, ann, released=False):
    """Every score from its definition: one text, one video, one sample at a time.

    released: the honestly pooled video picks the sample, and the video pooled by its own caption
    is what this sample is scored with.
    """
    t = [model.encode_text(tokenizer([c]))[0] for c in ann.captions]
    f = []
    for segment in ann.segments:
        pixels = data.test_transform(16)(read_frames(segment, T))
        f.append(model.encode_video(pixels[None])[0])
    sims = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            honest = model.pool(t[i][None], f[j][None])[0, 0]
            own = model.pool(t[ann.owner.index(j)][None], f[j][None])[0, 0]
            R = model.radius(F.cosine_similarity(t[i][None], f[j], dim=-1))
            samples = [t[i] + R * eps for eps in model.noise(3, seed=5)]
            best = max(samples, key=lambda t_s: float(F.cosine_similarity(t_s, honest, dim=0)))
            sims[i, j] = F.cosine_similarity(best, own if released else honest, dim=0)
    return sims


@torch.no_grad()
def test_evaluate_equals_literal_loops(folder):
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    ann = annotations(folder, "one.csv")
    t, f, sims, *_ = ev.score_split(model, tokenizer, ann, batch=3, trials=3, seed=5)
    assert (sims - literal_sims(model, tokenizer, ann)).abs().max() < 1e-5
    caption_of = torch.tensor(ann.owner).argsort()
    leaking = ev.released_scores(model, t, f, caption_of, 3, 5)
    assert (leaking - literal_sims(model, tokenizer, ann, released=True)).abs().max() < 1e-5
    assert (leaking - sims).abs().max() > 1e-3  # another score
    assert (leaking - sims).diagonal().abs().max() < 1e-5  # but not of the matched pairs
    point = ev.released_scores(model, t, f, caption_of, trials=0)
    assert (point - exact.score(model, t, f, 0)).diagonal().abs().max() < 1e-5
    result = ev.evaluate(model, tokenizer, ann, trials=3, seed=5, with_dsl=True, released=True)
    assert result["t2v"] == ev.metrics(ev.ranks(sims, ann.owner)[0])
    assert result["released_protocol"]["t2v"] == ev.metrics(ev.ranks(leaking, ann.owner)[0])
    assert result["dsl"]["v2t"] == ev.metrics(ev.ranks(ev.dsl(sims, 1), ann.owner)[1])
    json.dumps(result, allow_nan=False)
    printed = report.metrics_text(result)
    assert all(word in printed for word in ("LEAKING", "transductive", "7 texts, 7 videos"))
    line = ev.format_metrics(result)
    assert f"R@1 {result['t2v']['R1']:.1f}" in line and "7 videos" in line


@torch.no_grad()
def test_the_released_protocol_takes_each_videos_first_caption(folder):
    """Of 15 captions for 7 videos, 7 count, beside honest rows of them; an 8th video has none."""
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    many = annotations(folder, "many.csv")
    segments = [many.segments[2], *many.segments]
    many = dataclasses.replace(many, segments=segments, owner=[v + 1 for v in many.owner])
    first = [many.owner.index(v) for v in range(1, 8)]
    captions = [many.captions[i] for i in first]
    one = data.Annotations(many.segments[1:], captions, list(range(7)))
    whole = ev.evaluate(model, tokenizer, many, trials=5, released=True)
    alone = ev.evaluate(model, tokenizer, one, trials=5, released=True)
    leaking = whole["released_protocol"]
    assert (leaking["texts"], leaking["videos"]) == (7, 7)
    assert leaking == alone["released_protocol"]
    assert whole["first_captions"] == {way: alone[way] for way in ("t2v", "v2t")}
    assert "first_captions" not in alone
    printed = report.metrics_text(whole)
    for words in ("caption of each video (7 texts)", "first captions, honest: t2v", "LEAKING t2v"):
        assert words in printed
    assert "first" not in report.metrics_text(alone)


def test_each_item_is_encoded_once_and_equal_captions_tie(folder, monkeypatch):
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    ann = annotations(folder, "many.csv")
    seen, texts = [], []
    read, encode = video.read_frames, model.encode_text
    monkeypatch.setattr(video, "read_frames", lambda x, frames: seen.append(x) or read(x, frames))
    monkeypatch.setattr(model, "encode_text", lambda ids: texts.append(len(ids)) or encode(ids))
    model.train()
    model.clip.eval()  # as --freeze-clip leaves it
    modes = [part.training for part in model.modules()]
    split = ev.score_split(model, tokenizer, ann)
    assert [part.training for part in model.modules()] == modes
    assert sorted(seen) == sorted(ann.segments)
    assert sum(texts) == len(set(ann.captions)) == len(ann.captions) - 1
    assert torch.equal(split.sims[-1], split.sims[-2]) and torch.equal(split.t[-1], split.t[-2])


def test_evaluation_cannot_see_the_owner(folder):
    """Scores stay whatever `owner` says, and follow texts and videos where these are put."""
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    ann = annotations(folder, "many.csv")
    N, V = len(ann.captions), len(ann.segments)
    g = torch.Generator().manual_seed(0)
    whole = ev.score_split(model, tokenizer, ann)
    swapped = dataclasses.replace(ann, owner=[(v + 3) % V for v in ann.owner])
    other = ev.score_split(model, tokenizer, swapped)
    assert torch.equal(other.sims, whole.sims)
    places = [ev.ranks(x.sims, x.ann.owner)[0] for x in (whole, other)]
    assert not torch.equal(*places)  # there it does enter
    texts = torch.randperm(N, generator=g).tolist()
    videos = torch.randperm(V, generator=g).tolist()
    owner = [videos.index(ann.owner[i]) for i in texts]
    captions = [ann.captions[i] for i in texts]
    moved = data.Annotations([ann.segments[v] for v in videos], captions, owner)
    there = ev.score_split(model, tokenizer, moved)
    assert (there.sims - whole.sims[texts][:, videos]).abs().max() < 1e-6


def test_lists_of_captions_and_of_videos(folder):
    """A Segment, a str and a Path are the same video; one of them is no list, nor is a caption."""
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    path = folder / "videos" / "v3.mp4"
    segment = video.Segment(str(path))
    f = ev.encode_videos(model, [segment, str(path), path, video.Segment(str(path), 0.1, 0.2)])
    assert torch.equal(f[0], f[1]) and torch.equal(f[0], f[2]) and not torch.equal(f[0], f[3])
    assert ev.encode_videos(model, (x for x in [path])).shape == (1, T, D)
    for lone in (segment, str(path), path):
        with pytest.raises(TypeError, match="expected a list of paths or Segments"):
            ev.encode_videos(model, lone)
    with pytest.raises(TypeError, match="captions must be a list of str"):
        ev.encode_texts(model, tokenizer, "a dog")
    assert ev.encode_texts(model, tokenizer, ("a dog", "a cat")).shape == (2, D)


@pytest.mark.slow
def test_two_processes_report_what_one_does(folder, run, tmp_path):
    """Seven videos and 14 distinct texts in batches of 2: neither divides."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    results = []
    for start in ([], torchrun):
        file = tmp_path / f"{len(start)}.json"
        command = [sys.executable, *start, ev.__file__, *on(folder, "--split", "all", "--dsl")]
        command += ["--workers", 1, "--batch", 2, "--json", file]
        done = subprocess.run(list(map(str, command)), env={**os.environ, **ENV}, timeout=120,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("7 videos") == 1  # one process prints
        results.append(json.loads(file.read_text()))
    assert results[0] == results[1]
    assert results[0]["videos"] == 7 and results[0]["texts"] == 15


def test_command_line(folder, run, tmp_path, call):
    """What the checkpoint trained on; all rows of another csv; a bad video is named, or counted."""
    status, out, err = call(*on(folder, "--trials", 3, "--seed", 5, "--prior", "uniform"),
                            "--cache", tmp_path / "cache", "--json", tmp_path / "out.json")
    assert status == 0 and "15 texts, 7 videos" in out and "prior uniform" in out, out + err
    result = json.loads((tmp_path / "out.json").read_text())
    expected = dict(split="test", prior="uniform", trials=3, seed=5)
    assert expected.items() <= result.items()
    assert len(os.listdir(tmp_path / "cache")) == 7
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    other = tmp_path / "other.csv"
    names = [folder / "videos" / "v1.mp4", "broken.mp4", folder / "videos" / "v2.mp4", "gone.mp4"]
    other.write_text("video,caption\n" + "".join(f"{name},caption\n" for name in names))
    # a csv without that column: all rows, or the split that training would make
    rest = ["--data", folder / "one.csv", "--root", folder / "videos"]
    for more, split in (([], "all"), (["--split", "test"], "test")):
        assert call(*on(folder, *rest, *more, "--json", tmp_path / "out.json"))[0] == 0
        found = json.loads((tmp_path / "out.json").read_text())
        expected = data.load_split(str(folder / "one.csv"), str(folder / "videos"), split)
        assert (found["split"], found["texts"]) == (split, len(expected.captions))
    assert found["texts"] < 7
    arguments = on(folder, "--data", other)
    status, out, err = call(*arguments, "--skip-bad", "--released-protocol")
    assert status == 0 and "LEAKING" in out, out + err
    assert "1 unreadable videos left out; 2 texts, 2 videos remain" in out
    assert "1 missing videos left out; 3 texts, 3 videos remain" in out
    assert one_error(*call(*arguments), "gone.mp4")
    other.write_text("video,caption\nbroken.mp4,two\n")
    assert one_error(*call(*arguments), "broken.mp4")
    assert one_error(*call(*arguments, "--skip-bad"), "nothing to evaluate")
    done = run("eval.py", *arguments, env=ENV)  # and once in a process of its own
    assert one_error(done.returncode, done.stdout, done.stderr, "broken.mp4")
    # FFmpeg before 8 also says what it found; that line is its own.
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr


def test_mistakes_are_one_line(folder, tmp_path, call):
    good = folder / "model.pt"
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    content = saved(good)
    torch.save({**content, "tmass": {**content["tmass"], "frames": 12}}, tmp_path / "frames.pt")
    torch.save({**content, "config": {}}, tmp_path / "nodata.pt")
    checkpoints = {"none.pt": "none.pt", "cut.pt": "cut.pt", "text.pt": "text.pt",
                   "other.pt": "other.pt", "frames.pt": "radius.linear", "nodata.pt": "--data"}
    for name, word in checkpoints.items():
        arguments = ["--workers", 0, "--device", "cpu", "--ckpt", tmp_path / name]
        status, out, err = call(*arguments)
        assert one_error(status, out, err, name, word), (name, status, err)
    options = (
        ("--data", tmp_path / "none.csv"), ("--data", "nonsense"),
        ("--json", "-"),
        ("--split", "train"),
        ("--seed", -1), ("--seed", 2 ** 70), ("--seed", 10 ** 22),
        ("--prior", "odd"),
        ("--prior-std", "nan"), ("--prior-std", "inf"), ("--prior-std", 1e300), ("--prior-std", -1),
        ("--device", "foo"), ("--device", "meta"), ("--device", "cuda:99"),
        ("--trials", -1), ("--trials", 10 ** 11), ("--trials", "2.5"),
        ("--batch", 0), ("--batch", "nan"),
        ("--workers", 10 ** 9),
    )
    named = {"--data": "", "--split": "no caption in split"}  # these errors don't name the option
    for option, value in options:
        status, out, err = call(*on(folder, option, value))
        words = [named.get(option, option), str(value)]
        assert one_error(status, out, err, *words), (option, value, status, err)


def test_results_replace_the_files_that_are_named(folder, tmp_path, call, monkeypatch):
    """Whatever was in them; a link stays one, and no temporary file is left."""
    monkeypatch.chdir(tmp_path)
    outputs = {"--json": "r.json", "--report": "link", "--save": "r.pt"}
    for name in ("r.json", "notes", "r.pt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to("notes")
    for trials in (1, 2):
        options = [word for pair in outputs.items() for word in pair]
        status, out, err = call(*on(folder, *options, "--trials", trials))
        assert status == 0 and "report: link" in out, err
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["trials"] == trials and saved(tmp_path / "r.pt")["result"] == result
        assert (tmp_path / "notes").read_text().startswith("<!DOCTYPE html>")
    assert sorted(os.listdir()) == ["link", "notes", "r.json", "r.pt"]
    assert os.readlink("link") == "notes"


def inodes(*folders):
    """What is there, and whether it is still the same file."""
    files = [x for folder in folders for x in folder.iterdir()]
    return sorted((x, x.lstat().st_mode, x.lstat().st_ino, x.lstat().st_size) for x in files)


@pytest.mark.parametrize("option", ["--json", "--report", "--save"])
def test_what_no_result_replaces(option, folder, tmp_path, call, monkeypatch):
    """What the same command reads, however it is spelled, and what is no plain file."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    (tmp_path / "link").symlink_to(folder / "model.pt")
    (tmp_path / "here").symlink_to(tmp_path)
    before = inodes(folder, folder / "videos", tmp_path)
    checkpoint = folder / "model.pt", os.path.relpath(folder / "model.pt"), "link"
    read = folder / "many.csv", folder / "videos" / "v3.mp4"
    nowhere = "pipe", "/dev/null", "folder", "folder/", "missing/x"
    for name in (*checkpoint, *read, *nowhere):
        status, out, err = call(*on(folder), option, name)
        assert one_error(status, out, err, option, str(name)), (name, status, err)
        assert name in read or "T=" not in out  # refused before the model is loaded
    other = "--save" if option == "--json" else "--json"
    for one, two in (("new", "new"), ("new", tmp_path / "new"), ("here/new", "./new")):
        assert one_error(*call(*on(folder), option, one, other, two), "new")
    assert inodes(folder, folder / "videos", tmp_path) == before


@pytest.mark.parametrize("name", ["new/", ""])
def test_a_result_needs_the_name_of_a_file(name, folder, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert one_error(*call(*on(folder, "--trials", 1, "--json", name)), "--json", name)
    assert os.listdir() == []


def test_a_full_disk_is_called_so(folder, tmp_path, call, monkeypatch):
    """/dev/full takes the place of the temporary file: writing to it fails as on a full disk."""
    @contextlib.contextmanager
    def full(path):
        yield "/dev/full"
    monkeypatch.setattr(common, "written_whole", full)
    for option in ("--json", "--report", "--save"):
        status, out, err = call(*on(folder, "--trials", 1, option, tmp_path / "out"))
        assert one_error(status, out, err, option, "out", "disk is full"), err
    assert os.listdir(tmp_path) == []


def test_saved_scores(folder, tmp_path, call):
    """From the file alone the metrics come out exactly, and so do the scores."""
    outputs = ["--save", tmp_path / "s.pt", "--json", tmp_path / "s.json"]
    assert call(*on(folder, "--split", "all", "--trials", 3, *outputs))[0] == 0
    content = saved(tmp_path / "s.pt")
    result = json.loads((tmp_path / "s.json").read_text())
    assert ev.measure(content["sims"], content["owner"]).items() <= result.items()
    places = ev.ranks(content["sims"], content["owner"])
    assert torch.equal(content["t2v_ranks"], places[0])
    assert torch.equal(content["v2t_ranks"], places[1])
    model, _, _ = load_checkpoint(folder / "model.pt")
    assert torch.equal(exact.score(model, content["t"], content["f"], 3), content["sims"])
    ann = annotations(folder, "many.csv")
    assert (content["captions"], content["owner"].tolist()) == (ann.captions, ann.owner)
    assert [video.Segment(*x) for x in content["clips"]] == ann.segments
    assert content["result"] == result


def test_another_number_of_frames(folder, tmp_path, call):
    """Where the radius is not tied to it; where nothing is sampled no sample is printed."""
    status, out, err = call(*on(folder, "--frames", T + 1))
    assert one_error(status, out, err, f"--frames {T + 1}: this model was built for {T} frames")
    config = dict(data=str(folder / "many.csv"), root=str(folder / "videos"))
    save_checkpoint(tmp_path / "none.pt", make(radius="none"), Tokenizer((), 16), config)
    arguments = ["--workers", 0, "--device", "cpu", "--ckpt", tmp_path / "none.pt"]
    arguments += ["--save", tmp_path / "s.pt"]
    status, out, err = call(*arguments, "--frames", T + 1)
    assert status == 0 and f"T={T + 1}, " in out and "radius none, on cpu" in out, err
    content = saved(tmp_path / "s.pt")
    assert content["f"].shape[1] == content["result"]["frames"] == T + 1


def test_the_mean_of_several_seeds(folder, tmp_path, call, run):
    files = [tmp_path / f"{seed}.json" for seed in (1, 2)]
    for seed, file in enumerate(files):
        assert call(*on(folder, "--seed", seed, "--json", file))[0] == 0
    rates = [json.loads(file.read_text())["t2v"]["R1"] for file in files]
    done = run("study/mean.py", *files)
    mean = sum(rates) / 2
    std = abs(rates[0] - rates[1]) / math.sqrt(2)
    assert done.returncode == 0 and f"{mean:.1f} ± {std:.1f}" in done.stdout, done.stderr
    files[0].write_text("{}")
    done = run("study/mean.py", *files)
    assert one_error(done.returncode, done.stdout, done.stderr, str(files[0]), "t2v")


def test_a_csv_with_splits_means_its_test_rows(folder, tmp_path, call):
    rows = [f"v{v}.mp4,text {v},{'train' if v < 5 else 'test'}" for v in range(7)]
    (tmp_path / "my.csv").write_text("\n".join(["video,caption,split", *rows]))
    status, out, err = call(*on(folder, "--data", tmp_path / "my.csv", "--root",
                                folder / "videos"))
    assert status == 0 and "split test: 2 texts, 2 videos" in out, err


def test_pieces_of_no_length(folder, call):
    arguments = "x", "--videos", folder / "videos", "--ckpt", folder / "model.pt", "--window"
    for window in ("5e-324", "1e-09"):  # as many pieces as memory would hold
        assert one_error(*call(*arguments, window, program=search), "--window", window)


def test_a_cache_folder_of_nobody(folder, call, monkeypatch):
    monkeypatch.setenv("TMASS_CACHE", "~nosuchuser")
    arguments = "--ckpt", "ViT-B/32", "--data", folder / "one.csv"
    assert one_error(*call(*arguments), "home directory", "set TMASS_CACHE")


def test_the_samples_on_average(folder, tmp_path, call):
    """--expected has no seed, is what `score` gives, and lies near the mean over many seeds."""
    scores = []
    for seed in range(12):
        file = tmp_path / "s.pt"
        expected = ["--expected"] if seed < 2 else []
        status, out, _ = call(*on(folder, "--seed", seed, "--save", file, *expected))
        assert status == 0 and ("closed form" in out) == bool(expected)
        assert (f"seed {seed}" in out) != bool(expected)
        scores.append(saved(file)["sims"])
    one, two, *sampled = scores
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    ann = annotations(folder, "many.csv")
    assert torch.equal(one, two)
    assert torch.equal(one, ev.score_split(model, tokenizer, ann, expected=True).sims)
    average = torch.stack(sampled).mean(0)
    assert (one - average).abs().mean() < (sampled[0] - average).abs().mean()
    result = ev.evaluate(model, tokenizer, ann, expected=True)
    assert result["expected"] and result["t2v"] == ev.metrics(ev.ranks(one, ann.owner)[0])


def test_bfloat16(folder, tmp_path, call):
    """The towers round, and the embeddings are float32 all the same; scores move by little."""
    contents = []
    for amp in ("off", "bf16"):
        file = tmp_path / f"{amp}.pt"
        assert call(*on(folder, "--amp", amp, "--trials", 0, "--save", file))[0] == 0
        contents.append(saved(file))
    off, half = contents
    assert half["result"]["amp"] == "bf16"
    assert {half[name].dtype for name in ("t", "f", "sims")} == {torch.float32}
    for name in ("t", "f"):
        moved = (off[name] - half[name]).norm() / off[name].norm()
        assert 1e-5 < moved < 0.03, (name, moved)
    assert (off["sims"] - half["sims"]).abs().max() < 0.02


@pytest.fixture
def scores(folder, tmp_path, call):
    """scores("--pooling", "mean") -> what --save writes, of the point text."""
    def scores(*args):
        status, out, err = call(*on(folder, "--trials", 0, "--save", tmp_path / "p.pt", *args))
        assert status == 0, err
        return saved(tmp_path / "p.pt")
    return scores


class FirstFrame(MeanPool):
    """A pooling that only this test knows."""

    def forward(self, t, f):
        return f[:, 0].expand(len(t), -1, -1)


def test_another_pooling(scores, tmp_path, call, monkeypatch):
    """A pooling without weights suits a checkpoint of xpool; xpool needs its weights."""
    monkeypatch.setitem(POOLINGS, "first", FirstFrame)
    content = scores()
    t, f = content["t"], content["f"]
    unit = F.normalize(f, dim=-1)
    cos = torch.einsum("nd,vtd->nvt", F.normalize(t, dim=-1), unit)
    query = torch.einsum("nvt,vtd->nvd", (cos / 0.1).softmax(-1), unit)
    videos = dict(mean=f.mean(1)[None], query=query, first=f[None, :, 0])
    for name, v in videos.items():
        content = scores("--pooling", name)
        literal = F.cosine_similarity(t[:, None], v, dim=-1)
        assert (content["sims"] - literal).abs().max() < 1e-5
        assert content["result"]["pooling"] == name
    save_checkpoint(tmp_path / "mean.pt", make(pooling="mean"), Tokenizer((), 16), {})
    arguments = ["--ckpt", tmp_path / "mean.pt", "--device", "cpu", "--pooling", "xpool"]
    assert one_error(*call(*arguments), "--pooling xpool", "mean.pt", "no weights")


def test_a_clip_that_nobody_trained_further(folder, tmp_path, call, monkeypatch):
    """--ckpt takes CLIP's own weights: pooled by `query` or `mean`, without a radius or samples."""
    # CLIP's vocabulary is a download
    monkeypatch.setattr(weights, "load_vocabulary", lambda: Tokenizer((), 16))
    clip = make().clip
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    arguments = ["--ckpt", tmp_path / "clip.pt", "--workers", 0, "--device", "cpu"]
    assert one_error(*call(*arguments), "clip.pt", "--data")
    arguments += ["--data", folder / "one.csv", "--root", folder / "videos"]
    arguments += ["--save", tmp_path / "s.pt"]
    results = {}
    for name, pooling in (("query", []), ("mean", ["--pooling", "mean"])):
        status, out, err = call(*arguments, *pooling)
        assert status == 0 and "7 texts, 7 videos" in out, err
        assert f"pooling {name}, radius none" in out
        results[name] = saved(tmp_path / "s.pt")
    content = results["mean"]
    mean = content["f"].mean(1)
    literal = F.cosine_similarity(content["t"][:, None], mean[None], dim=-1)
    assert (content["sims"] - literal).abs().max() < 1e-5
    assert (results["query"]["sims"] - literal).abs().max() > 1e-5


@pytest.mark.parametrize("weight", ["clip.text_projection", "clip.token_embedding.weight",
                                    "radius.linear.bias"])
def test_scores_that_are_not_finite_are_never_a_result(weight, folder, tmp_path, call):
    content = saved(folder / "model.pt")
    content["model"][weight][-1] = NAN  # of the tokens: end of text
    torch.save(content, tmp_path / "broken.pt")
    arguments = ["--ckpt", tmp_path / "broken.pt", "--workers", 0, "--device", "cpu"]
    arguments += ["--json", tmp_path / "r.json"]
    status, out, err = call(*arguments, "--save", tmp_path / "r.pt")
    assert one_error(status, out, err, "broken.pt", "not finite") and "R@1" not in out
    assert os.listdir(tmp_path) == ["broken.pt"]
    arguments += ["--videos", folder / "videos", "--index", tmp_path / "index"]
    found = call("a query", *arguments, program=search)
    assert one_error(*found, "broken.pt", "finite", "a query")
    assert not (tmp_path / "r.json").exists()


def test_videos_that_lie_elsewhere(folder, tmp_path, call):
    """--videos DIR, and the checkpoint's own: what training used need not be named again."""
    table = tmp_path / "my.csv"
    table.write_text((folder / "many.csv").read_text())
    videos = str(folder / "videos")
    configs = {"bare.pt": {}, "trained.pt": dict(videos=videos, root=str(tmp_path))}
    for name, config in configs.items():
        config.update(data=str(table), seed=24)
        save_checkpoint(tmp_path / name, make(), Tokenizer((), 16), config)
    arguments = ["--workers", 0, "--device", "cpu", "--trials", 1, "--ckpt"]
    assert one_error(*call(*arguments, tmp_path / "bare.pt"), "7 of 7 videos are missing")
    results = []
    for more in ([tmp_path / "bare.pt", "--videos", videos], [tmp_path / "trained.pt"]):
        status, out, err = call(*arguments, *more)
        assert status == 0 and "15 texts, 7 videos" in out, err
        results.append(out.split("split test")[1])
    model, tokenizer, _ = load_checkpoint(tmp_path / "trained.pt")
    ann = data.load_split(str(table), None, "test", videos=videos)
    printed = report.metrics_text(ev.evaluate(model, tokenizer, ann, trials=1))
    assert results[0] == results[1] and printed in results[0]


def test_evaluation_repeats_what_training_printed(run, call, tmp_path):
    """Without an option: frames come from training's cache. If that is gone, eval.py says so."""
    root = tmp_path / "shapes"
    made = run("lib/shapes.py", "--root", root, "--videos", 6, 2, 6, env=ENV)
    assert made.returncode == 0, made.stderr
    small = ["--root", root, "--pretrain", 2, "--epochs", 1, "--batch", 8, "--workers", 0]
    trained = run("train.py", *small, cwd=tmp_path, env=ENV)
    assert trained.returncode == 0, trained.stderr
    arguments = ["--ckpt", tmp_path / "model.pt", "--workers", 0, "--device", "cpu"]
    arguments += ["--save", tmp_path / "s.pt"]
    status, out, err = call(*arguments)
    assert status == 0 and "differ" not in out, err
    cached = saved(tmp_path / "s.pt")
    assert f"test: {ev.format_metrics(cached['result'])}" in trained.stdout
    for cache in (root / "frames", tmp_path / "other"):  # JPEG too
        assert call(*arguments, "--cache", cache)[0] == 0
        assert torch.equal(saved(tmp_path / "s.pt")["sims"], cached["sims"])
    assert len(os.listdir(tmp_path / "other")) == 6
    (root / "frames").rename(tmp_path / "gone")
    status, out, err = call(*arguments)
    assert status == 0 and "frames, where training kept its frames, is gone" in out, err
    assert not torch.equal(saved(tmp_path / "s.pt")["sims"], cached["sims"])
    assert not (root / "frames").exists()


def test_processes_that_cannot_start_or_are_lost(folder, call, monkeypatch):
    """A job half started by hand, a port that is taken, a process that dies: one line each."""
    monkeypatch.setenv("RANK", "0")
    assert one_error(*call(*on(folder)), "process 0", "torchrun")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        there = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        assert one_error(*call(*on(folder)), "process 0", "torchrun")
    there["MASTER_PORT"] = free_port()
    code = ("import os, sys, eval\n"
            "if os.environ['RANK'] == '1':\n"
            "    eval.encode_texts = lambda *args, **kwargs: os._exit(9)\n"
            "sys.exit(eval.run(eval.main))")
    command = [sys.executable, "-c", code, *map(str, on(folder))]
    started = []
    for rank in (0, 1):
        env = {**os.environ, **ENV, **there, "RANK": str(rank)}
        process = subprocess.Popen(command, env=env, cwd=os.path.dirname(ev.__file__), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
    (out, err), _ = (process.communicate(timeout=120) for process in started)
    assert started[1].returncode == 9
    assert one_error(started[0].returncode, out, err, "another process", "died"), err
    assert "R@1" not in out
