"""Ranks and metrics by hand and by literal loops, the released protocol, and eval.py on real files as users run it."""
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from videos import write_video

import data
import eval as ev
import search
from clip_model import CLIP, Tokenizer
from lib import common, weights
from lib.weights import load_checkpoint, save_checkpoint
from tmass import TMASS

D, T, NAN = 64, 4, float("nan")
ENV = {"OMP_NUM_THREADS": "1"}


# ---- ranks and metrics ----

def test_ranks_by_hand():
    """Four videos, the last a distractor, with which video 2's caption ties; of video 0's two captions one is tied."""
    sims = torch.tensor([[0.9, 0.1, 0.9, 0.0],    # caption 0 of video 0: first, tied with video 2 -> 1.5
                         [0.2, 0.5, 0.1, 0.6],    # caption 1 of video 0: after the distractor and video 1 -> 3
                         [0.9, 0.4, 0.0, 0.7],    # caption 2 of video 1: -> 3
                         [0.1, 0.5, 0.3, 0.3]])   # caption 3 of video 2: one above, tied with the distractor -> 2.5
    t2v, v2t = ev.ranks(sims, [0, 0, 1, 2])
    assert t2v.tolist() == [1.5, 3, 3, 2.5]
    # video 0: own captions' best 0.9, video 1's caption 0.9 too, video 2's 0.1 -> 1.5;
    # video 1: own 0.4 against 0.5 and 0.5 -> 3;
    # video 2: own 0.3 against max(0.9, 0.1) and 0 -> 2; the distractor has no captions
    torch.testing.assert_close(v2t, torch.tensor([1.5, 3, 2, NAN], dtype=torch.float64), equal_nan=True)
    # strict: video 0's best own caption ties with caption 2 -> 1.5; video 1: 0.4 after 0.5, 0.5 -> 3; video 2: 0.3
    # after 0.9 -> 2
    strict = torch.tensor([1.5, 3, 2, NAN], dtype=torch.float64)
    torch.testing.assert_close(ev.strict_v2t_ranks(sims, [0, 0, 1, 2]), strict, equal_nan=True)
    m = ev.metrics(v2t)
    assert m == dict(R1=0, R5=100, R10=100, R50=100, MdR=2, MnR=6.5 / 3)
    assert ev.metrics([1, 2, 6, 60]) == dict(R1=25, R5=50, R10=75, R50=75, MdR=4, MnR=17.25)


def test_strict_ties_between_own_captions():
    """Equal captions of a video don't push each other down; a tying stranger is above the first of two in a third."""
    assert ev.strict_v2t_ranks(torch.ones(2, 1), [0, 0]).tolist() == [1]
    strict = ev.strict_v2t_ranks(torch.ones(3, 2), [0, 0, 1])
    torch.testing.assert_close(strict, torch.tensor([4 / 3, 2], dtype=torch.float64))


def literal_ranks(sims, owner):
    N, V = sims.shape

    def rank(own, others):
        return 1 + sum(x > own for x in others) + sum(x == own for x in others) / 2
    captions = {v: [i for i in range(N) if owner[i] == v] for v in range(V)}
    best = {v: {w: max(sims[i, w].item() for i in c) for w in range(V)} for v, c in captions.items() if c}
    t2v = [rank(sims[i, owner[i]].item(), [sims[i, v].item() for v in range(V) if v != owner[i]]) for i in range(N)]
    v2t = [rank(best[w][w], [best[v][w] for v in best if v != w]) if w in best else NAN for w in range(V)]
    strict = []
    for w in range(V):
        if w not in best:
            strict.append(NAN)
            continue
        mine = sum(sims[i, w].item() == best[w][w] for i in captions[w])
        others = [sims[i, w].item() for i in range(N) if owner[i] != w]
        strict.append(1 + sum(x > best[w][w] for x in others) + sum(x == best[w][w] for x in others) / (mine + 1))
    return t2v, v2t, strict


def test_ranks_equal_literal_loops(monkeypatch):
    """Random sizes, many ties, distractors; blocks smaller than the matrix, so that their seams are inside it."""
    whole = ev.blocks
    monkeypatch.setattr(ev, "blocks", lambda n, size: whole(n, 5))
    g = torch.Generator().manual_seed(0)
    for N, V in ((13, 7), (1, 1), (6, 12), (23, 11)):
        sims = torch.randint(0, 6, (N, V), generator=g) / 8
        owner = torch.randint(0, V, (N,), generator=g)
        expected = literal_ranks(sims, owner.tolist())
        for ours, literal in zip((*ev.ranks(sims, owner), ev.strict_v2t_ranks(sims, owner.tolist())), expected):
            torch.testing.assert_close(ours, torch.tensor(literal, dtype=torch.float64), equal_nan=True)


def test_scores_that_are_not_numbers_rank_at_chance():
    sims = torch.full((5, 5), NAN)
    for ranks in (*ev.ranks(sims, range(5)), ev.strict_v2t_ranks(sims, range(5))):
        assert ranks.tolist() == [3] * 5
    sims[0, 1:] = -5.0
    assert ev.ranks(sims, range(5))[0][0] == 5  # its own score is the one that is not a number


def test_dsl_by_hand():
    sims = torch.tensor([[0.5, 0.4], [0.5, 0.1]])
    low = 0.1 * torch.tensor(-30.0).exp().item()
    torch.testing.assert_close(ev.dsl(sims), torch.tensor([[0.25, 0.4], [0.25, low]]))
    torch.testing.assert_close(ev.dsl(sims.T, 1), ev.dsl(sims).T)


# ---- a small model, real files ----

def make(**method):
    torch.manual_seed(0)
    clip = CLIP(embed_dim=D, image_size=16, patch_size=8, vision_width=64, vision_layers=1, context_length=16,
                vocab_size=514, text_width=64, text_layers=1)
    model = TMASS(clip, **{"frames": T, "dropout": 0.0, **method}).eval()
    for name, p in model.named_parameters():
        p.data += 0.1 * torch.randn_like(p) * (not name.startswith("clip."))
    if model.config["pooling"] == "xpool":
        model.pool.q.weight.data *= 10  # attention sharp enough for the text to matter
    return model


def noise_video(path, seed):
    g = torch.Generator().manual_seed(seed)
    frames = F.interpolate(torch.rand(6, 3, 4, 4, generator=g), size=(32, 48)) * 255
    write_video(path, frames.permute(0, 2, 3, 1).byte().contiguous())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven videos (odd), a caption each in one.csv, up to three in many.csv; a checkpoint 'trained' on many.csv."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "videos").mkdir()
    one, many = ["video,caption"], ["video,caption,split"]
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


def literal_sims(model, tokenizer, ann, released=False):
    """Every score from its definition: one text, one video, one sample at a time.

    released: the honestly pooled video picks the sample, which is scored with the video pooled by its own caption.
    """
    t = [model.encode_text(tokenizer([c]))[0] for c in ann.captions]
    transform = data.test_transform(16)
    f = [model.encode_video(transform(data.read_frames(clip, T))[None])[0] for clip in ann.segments]
    sims = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            honest, own = (model.pool(t[k][None], f[j][None])[0, 0] for k in (i, ann.owner.index(j)))
            r = model.radius(F.cosine_similarity(t[i][None], f[j], dim=-1))
            samples = [t[i] + r * eps for eps in model.noise(3, seed=5)]
            best = max(samples, key=lambda ts: float(F.cosine_similarity(ts, honest, dim=0)))
            sims[i, j] = F.cosine_similarity(best, own if released else honest, dim=0)
    return sims


@torch.no_grad()
def test_evaluate_equals_literal_loops(folder):
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    ann = data.load_annotations(str(folder / "one.csv"), str(folder / "videos"), "all")
    split = ev.rank_split(model, tokenizer, ann, batch=3, trials=3, seed=5)
    assert (split.sims - literal_sims(model, tokenizer, ann)).abs().max() < 1e-5
    caption_of = torch.tensor(ann.owner).argsort()
    leaking = ev.released_scores(model, split.t, split.f, caption_of, 3, 5)
    assert (leaking - literal_sims(model, tokenizer, ann, released=True)).abs().max() < 1e-5
    assert (leaking - split.sims).abs().max() > 1e-3  # it is another thing
    assert (leaking.diagonal() - split.sims.diagonal()).abs().max() < 1e-5  # but on the matched pairs
    point = ev.released_scores(model, split.t, split.f, caption_of, trials=0)
    assert (point.diagonal() - model.score(split.t, split.f, 0).diagonal()).abs().max() < 1e-5
    result = ev.evaluate(model, tokenizer, ann, trials=3, seed=5, with_dsl=True, released=True)
    assert result["t2v"] == ev.metrics(ev.ranks(split.sims, ann.owner)[0])
    assert result["released_protocol"]["t2v"] == ev.metrics(ev.ranks(leaking, ann.owner)[0])
    assert result["dsl"]["v2t"] == ev.metrics(ev.ranks(ev.dsl(split.sims, 1), ann.owner)[1])
    json.dumps(result, allow_nan=False)
    assert all(word in ev.report(result) for word in ("LEAKING", "transductive", "7 texts, 7 videos"))
    assert f"R@1 {result['t2v']['R1']:.1f}" in ev.format_metrics(result) and "7 videos" in ev.format_metrics(result)


@torch.no_grad()
def test_the_released_protocol_takes_each_videos_first_caption(folder):
    """Of 15 captions for 7 videos seven are used, an eighth video without any is left out; honest rows are added."""
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    many = data.load_annotations(str(folder / "many.csv"), str(folder / "videos"), "all")
    many = dataclasses.replace(many, segments=[many.segments[2], *many.segments], owner=[v + 1 for v in many.owner])
    first = [many.owner.index(v) for v in range(1, 8)]
    one = data.Annotations(many.segments[1:], [many.captions[i] for i in first], list(range(7)))
    all_of_it, alone = (ev.evaluate(model, tokenizer, ann, trials=5, released=True) for ann in (many, one))
    leaking = dict(all_of_it["released_protocol"])
    assert (leaking["texts"], leaking["videos"]) == (7, 7) and leaking == alone["released_protocol"]
    assert all_of_it["first_captions"] == {way: alone[way] for way in ("t2v", "v2t", "v2t_strict")}
    assert "first_captions" not in alone
    printed = ev.report(all_of_it)
    assert "each video's first (7 texts)" in printed and "first, honest: t2v" in printed and "LEAKING t2v" in printed
    assert "first" not in ev.report(alone)


def test_each_item_is_encoded_once_and_equal_captions_tie(folder, monkeypatch):
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    ann = data.load_annotations(str(folder / "many.csv"), str(folder / "videos"), "all")
    seen, texts = [], []
    read, encode = data.read_frames, model.encode_text
    monkeypatch.setattr(data, "read_frames", lambda clip, frames: seen.append(clip) or read(clip, frames))
    monkeypatch.setattr(model, "encode_text", lambda ids: texts.append(len(ids)) or encode(ids))
    model.train()
    split = ev.rank_split(model, tokenizer, ann)
    assert model.training  # left as it was
    assert sorted(seen) == sorted(ann.segments) and sum(texts) == len(set(ann.captions)) == len(ann.captions) - 1
    assert torch.equal(split.sims[-1], split.sims[-2]) and torch.equal(split.t[-1], split.t[-2])


def test_evaluation_cannot_see_the_owner(folder):
    """The scores stay whatever `owner` says, and follow texts and videos where these are put; 14 distinct texts."""
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    ann = data.load_annotations(str(folder / "many.csv"), str(folder / "videos"), "all")
    N, V, g = len(ann.captions), len(ann.segments), torch.Generator().manual_seed(0)
    whole = ev.rank_split(model, tokenizer, ann)
    swapped = dataclasses.replace(ann, owner=[(v + 3) % V for v in ann.owner])
    other = ev.rank_split(model, tokenizer, swapped)
    assert torch.equal(other.sims, whole.sims)
    places = [ev.ranks(x.sims, x.ann.owner)[0] for x in (whole, other)]
    assert not torch.equal(*places)  # there it does enter
    texts, videos = torch.randperm(N, generator=g).tolist(), torch.randperm(V, generator=g).tolist()
    owner = [videos.index(ann.owner[i]) for i in texts]
    moved = data.Annotations([ann.segments[v] for v in videos], [ann.captions[i] for i in texts], owner)
    there = ev.rank_split(model, tokenizer, moved)
    assert (there.sims - whole.sims[texts][:, videos]).abs().max() < 1e-6


def test_a_decoding_process_that_dies_is_named(folder, monkeypatch):
    monkeypatch.setattr(data, "read_frames", lambda clip, frames: os._exit(9))
    with pytest.raises(data.DataError, match="v3.mp4.*--workers"):
        ev.encode_videos(make(), [data.Segment(str(folder / "videos" / "v3.mp4"), None, None)], workers=1)


def test_two_processes_report_what_one_does(folder, tmp_path):
    """Seven videos and 14 distinct texts in batches of 2: neither divides."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, start in (("one", []), ("two", torchrun)):
        command = [sys.executable, *start, ev.__file__, "--ckpt", folder / "model.pt", "--batch", 2, "--workers", 1,
                   "--split", "all",
                   "--dsl", "--device", "cpu", "--json", tmp_path / name]
        done = subprocess.run(list(map(str, command)), env={**os.environ, **ENV}, capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("7 videos") == 1  # one process speaks
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert one == two and one["videos"] == 7 and one["texts"] == 15


def test_command_line(folder, run, tmp_path, capsys, monkeypatch):
    """What the checkpoint was trained on; another csv: all rows; a bad video: named, or left out and counted."""
    arguments = ["--ckpt", folder / "model.pt", "--workers", 0, "--device", "cpu"]
    status, out, err = called(capsys, monkeypatch, *arguments, "--trials", 3, "--seed", 5, "--prior", "uniform",
                              "--cache", tmp_path / "cache", "--json", tmp_path / "out.json")
    assert status == 0 and "15 texts, 7 videos" in out and "prior uniform" in out, out + err
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["split"], result["prior"], result["trials"], result["seed"]) == ("test", "uniform", 3, 5)
    assert len(os.listdir(tmp_path / "cache")) == 7
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    other = tmp_path / "other.csv"
    names = [folder / "videos" / "v1.mp4", "broken.mp4", folder / "videos" / "v2.mp4", "gone.mp4"]
    other.write_text("video,caption\n" + "".join(f"{name},caption\n" for name in names))
    arguments += ["--data", other]
    status, out, err = called(capsys, monkeypatch, *arguments, "--skip-bad", "--released-protocol")
    assert status == 0 and "1 unreadable videos left out; 2 texts, 2 videos remain" in out, out + err
    assert "LEAKING" in out
    assert "1 missing videos left out; 3 texts, 3 videos remain" in out
    assert one_error(*called(capsys, monkeypatch, *arguments), "gone.mp4")
    other.write_text("video,caption\nbroken.mp4,two\n")
    assert one_error(*called(capsys, monkeypatch, *arguments), "broken.mp4")
    assert one_error(*called(capsys, monkeypatch, *arguments, "--skip-bad"), "nothing to evaluate")
    done = run("eval.py", *arguments, env=ENV)  # and once in a process of its own
    assert one_error(done.returncode, done.stdout, done.stderr, "broken.mp4") and len(done.stderr.splitlines()) == 1


def one_error(status, out, err, *words):
    """Exit status 2 and a last line that says why, no traceback."""
    last = (err.strip().splitlines() or [""])[-1]
    return status == 2 and "error: " in last and "Traceback" not in err and all(w in last for w in words)


def called(capsys, monkeypatch, *args, room=ev):
    """A command line of ours in this process, for the many ways to get it wrong. -> (status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [room.__file__, *map(str, args)])
    try:
        status = ev.run(room.main)
    except SystemExit as e:  # argparse
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


def test_mistakes_are_one_line(folder, tmp_path, capsys, monkeypatch):
    good = folder / "model.pt"
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    content = torch.load(good, weights_only=True)
    torch.save({**content, "tmass": {**content["tmass"], "frames": 12}}, tmp_path / "frames.pt")
    torch.save({**content, "config": {}}, tmp_path / "nodata.pt")
    for arguments, *words in (
            (["--ckpt", tmp_path / "none.pt"], "none.pt"), (["--ckpt", tmp_path / "cut.pt"], "cut.pt"),
            (["--ckpt", tmp_path / "text.pt"], "text.pt"), (["--ckpt", tmp_path / "other.pt"], "other.pt"),
            (["--ckpt", tmp_path / "frames.pt"], "frames.pt", "radius.linear"),
            (["--ckpt", tmp_path / "nodata.pt"], "--data"),
            (["--ckpt", good, "--data", tmp_path / "none.csv"], "none.csv"),
            (["--ckpt", good, "--data", "nonsense"], "nonsense"),
            (["--ckpt", good, "--json", tmp_path], "--json"),
            (["--ckpt", good, "--json", tmp_path / "no" / "x.json"], "--json"),
            (["--ckpt", good, "--json", "new/"], "--json new/"), (["--ckpt", good, "--json", ""], "--json"),
            (["--ckpt", good, "--split", "train"], "train", "no caption"),
            (["--ckpt", good, "--seed", -1], "--seed", "-1"), (["--ckpt", good, "--seed", 2 ** 70], "--seed"),
            (["--ckpt", good, "--prior-std", "nan"], "--prior-std", "nan"),
            (["--ckpt", good, "--prior-std", "inf"], "--prior-std", "inf"),
            (["--ckpt", good, "--device", "foo"], "--device foo"),
            (["--ckpt", good, "--device", "meta"], "--device meta"),
            (["--ckpt", good, "--trials", -1], "--trials", "-1"), (["--ckpt", good, "--batch", 0], "--batch", "0"),
            (["--ckpt", good, "--trials", 10 ** 11], "--trials", "100000000000"),
            (["--ckpt", good, "--trials", "2.5"], "--trials", "2.5"), (["--ckpt", good, "--seed", 10 ** 22], "--seed"),
            (["--ckpt", good, "--workers", 10 ** 9], "--workers"),
            (["--ckpt", good, "--batch", "nan"], "--batch", "nan"),
            (["--ckpt", good, "--prior-std", 1e300], "--prior-std"),
            (["--ckpt", good, "--device", "cuda:99"], "cuda:99"),
            (["--ckpt", good, "--device", ""], "--device"), (["--ckpt", good, "--json", "-"], "--json -"),
            (["--ckpt", good, "--prior", "odd"], "--prior"), (["--ckpt", good, "--prior-std", -1], "--prior-std")):
        status, out, err = called(capsys, monkeypatch, "--workers", 0, "--device", "cpu", *arguments)
        assert one_error(status, out, err, *words), (arguments, status, err)


@pytest.mark.parametrize("option", ["--json", "--report", "--save"])
def test_only_plain_files_are_written_over(option, folder, tmp_path, capsys, monkeypatch):
    """A result is renamed into place: a pipe, a device (/dev/stdout!) or a link there would be gone."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "kept.txt")
    (tmp_path / "kept.txt").write_text("kept")
    before = sorted((x.name, x.lstat().st_mode, x.lstat().st_ino) for x in tmp_path.iterdir())
    for name in ("pipe", "link", "kept.txt"):
        status, out, err = called(capsys, monkeypatch, *on(folder), option, tmp_path / name)
        assert one_error(status, out, err, option, name), (status, err)
    assert one_error(*called(capsys, monkeypatch, *on(folder), option, tmp_path), option, str(tmp_path))
    assert sorted((x.name, x.lstat().st_mode, x.lstat().st_ino) for x in tmp_path.iterdir()) == before


def on(folder, *args):
    return ["--ckpt", folder / "model.pt", "--workers", 0, "--device", "cpu", *args]


def test_what_the_user_made_is_kept_and_a_result_replaced(folder, tmp_path, capsys, monkeypatch):
    """Files that an option did not write are left as they are, though they are of its kind; its own last one is not."""
    monkeypatch.chdir(tmp_path)
    users = {"--json": ('{"videos": []}', "my own notes"), "--report": ("<!DOCTYPE html><title>Mine</title>", "notes"),
             "--save": ((folder / "model.pt").read_bytes(), b"PK")}
    for option, contents in users.items():
        for content in contents:
            content = content if isinstance(content, bytes) else content.encode()
            (tmp_path / "mine").write_bytes(content)
            status, out, err = called(capsys, monkeypatch, *on(folder), option, "mine")
            assert one_error(status, out, err, option, "mine") and (tmp_path / "mine").read_bytes() == content
    outputs = ["--json", "r.json", "--report", "r.html", "--save", "r.pt"]
    (tmp_path / "r.json").write_text("{}")  # holds nothing, as r.html does
    (tmp_path / "r.html").touch()
    assert called(capsys, monkeypatch, *on(folder, *outputs, "--trials", 1))[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("r.json", "r.html", "r.pt")}
    assert called(capsys, monkeypatch, *on(folder, *outputs, "--trials", 2))[0] == 0
    assert all((tmp_path / name).read_bytes() != content for name, content in before.items())
    assert sorted(x.name for x in tmp_path.iterdir()) == ["mine", *sorted(before)]
    (tmp_path / "here").symlink_to(tmp_path)
    model = (folder / "model.pt").read_bytes()
    for one, other in (("new", "new"), ("new", tmp_path / "new"), ("here/new", "./new")):
        assert one_error(*called(capsys, monkeypatch, *on(folder), "--json", one, "--save", other), "--json", "--save")
    status, out, err = called(capsys, monkeypatch, *on(folder), "--save", os.path.relpath(folder / "model.pt"))
    assert one_error(status, out, err, "--save", "--ckpt") and (folder / "model.pt").read_bytes() == model
    assert not (tmp_path / "new").exists() and "T=" not in out  # refused before the model was read


def test_a_full_disk_is_called_so(folder, tmp_path, capsys, monkeypatch):
    """/dev/full takes the place of the temporary file: every write to it fails as on a full disk."""
    @contextlib.contextmanager
    def full(path):
        yield "/dev/full"
    monkeypatch.setattr(common, "written_whole", full)
    for option in ("--json", "--report", "--save"):
        status, out, err = called(capsys, monkeypatch, *on(folder), "--trials", 1, option, tmp_path / "out")
        assert one_error(status, out, err, option, "out", "disk is full"), err
    assert os.listdir(tmp_path) == []


def test_saved_scores(folder, tmp_path, capsys, monkeypatch):
    """From the file alone the metrics come out exactly, and so do the scores."""
    args = on(folder, "--split", "all", "--trials", 3, "--save", tmp_path / "s.pt", "--json", tmp_path / "s.json")
    assert called(capsys, monkeypatch, *args)[0] == 0
    saved, result = torch.load(tmp_path / "s.pt", weights_only=True), json.loads((tmp_path / "s.json").read_text())
    assert all(result[way] == x for way, x in ev.measure(saved["sims"], saved["owner"]).items())
    for name, places in zip(("t2v_ranks", "v2t_ranks"), ev.ranks(saved["sims"], saved["owner"])):
        assert torch.equal(saved[name], places)
    model, _, _ = load_checkpoint(folder / "model.pt")
    assert torch.equal(model.score(saved["t"], saved["f"], 3), saved["sims"])
    ann = data.load_annotations(str(folder / "many.csv"), str(folder / "videos"), "all")
    assert (saved["captions"], saved["owner"].tolist()) == (ann.captions, ann.owner)
    assert [data.Segment(*clip) for clip in saved["clips"]] == ann.segments and saved["result"] == result


def test_the_samples_on_average(folder, tmp_path, capsys, monkeypatch):
    """--expected has no seed, is what `score` gives, and lies near the mean over many seeds."""
    files = [tmp_path / f"{seed}.pt" for seed in range(12)]
    for seed, file in enumerate(files):
        expected = ["--expected"] if seed < 2 else []
        status, out, _ = called(capsys, monkeypatch, *on(folder, "--seed", seed, "--save", file, *expected))
        assert status == 0 and ("closed form" in out) == bool(expected) and (f"seed {seed}" in out) != bool(expected)
    one, two, *sampled = (torch.load(file, weights_only=True)["sims"] for file in files)
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    ann = data.load_annotations(str(folder / "many.csv"), str(folder / "videos"), "all")
    assert torch.equal(one, two) and torch.equal(one, ev.rank_split(model, tokenizer, ann, expected=True).sims)
    off = [(x - torch.stack(sampled).mean(0)).abs().mean() for x in (one, sampled[0])]
    assert off[0] < off[1]
    result = ev.evaluate(model, tokenizer, ann, expected=True)
    assert result["expected"] and result["t2v"] == ev.metrics(ev.ranks(one, ann.owner)[0])


def test_bfloat16(folder, tmp_path, capsys, monkeypatch):
    """The towers round, and the embeddings are float32 all the same; scores move by little."""
    kept = []
    for amp in ("off", "bf16"):
        file = tmp_path / f"{amp}.pt"
        assert called(capsys, monkeypatch, *on(folder, "--amp", amp, "--trials", 0, "--save", file))[0] == 0
        kept.append(torch.load(file, weights_only=True))
    off, half = kept
    assert half["t"].dtype == half["f"].dtype == half["sims"].dtype == torch.float32 and half["result"]["amp"] == "bf16"
    for name in ("t", "f"):
        moved = (off[name] - half[name]).norm() / off[name].norm()
        assert 1e-5 < moved < 0.03, (name, moved)
    assert (off["sims"] - half["sims"]).abs().max() < 0.02


def test_another_pooling(folder, tmp_path, capsys, monkeypatch):
    """mean and query suit a checkpoint of xpool; xpool needs its weights."""
    t, f = (torch.load(_saved(folder, tmp_path, capsys, monkeypatch), weights_only=True)[k] for k in ("t", "f"))
    unit, point = F.normalize(f, dim=-1), F.normalize(t, dim=-1)
    weights = (torch.einsum("nd,vtd->nvt", point, unit) / 0.1).softmax(-1)
    videos = dict(mean=f.mean(1).expand(len(t), -1, -1), query=torch.einsum("nvt,vtd->nvd", weights, unit))
    for name, v in videos.items():
        saved = torch.load(_saved(folder, tmp_path, capsys, monkeypatch, "--pooling", name), weights_only=True)
        literal = F.cosine_similarity(t[:, None], v, dim=-1)
        assert (saved["sims"] - literal).abs().max() < 1e-5 and saved["result"]["pooling"] == name
    save_checkpoint(tmp_path / "mean.pt", make(pooling="mean"), Tokenizer((), 16), {})
    args = ["--ckpt", tmp_path / "mean.pt", "--device", "cpu", "--pooling", "xpool"]
    assert one_error(*called(capsys, monkeypatch, *args), "--pooling xpool", "mean.pt", "no weights")


def test_the_other_activation(folder, tmp_path, capsys, monkeypatch):
    """What the checkpoint says is put right by --activation, and only by that."""
    kept = {}
    for name in ("", "gelu", "quickgelu"):
        option = ["--activation", name] if name else []
        file = _saved(folder, tmp_path, capsys, monkeypatch, *option)
        kept[name] = torch.load(file, weights_only=True)["sims"]
    content = torch.load(folder / "model.pt", weights_only=True)
    same = "quickgelu" if content["clip"]["quick_gelu"] else "gelu"
    assert torch.equal(kept[""], kept[same]) and (kept["gelu"] - kept["quickgelu"]).abs().max() > 1e-5


def test_a_clip_that_nobody_trained_further(folder, tmp_path, capsys, monkeypatch):
    """--ckpt takes CLIP's own weights: pooled by nearness to the text, or by their mean; no radius, so no samples."""
    monkeypatch.setattr(weights, "load_vocabulary", lambda: Tokenizer((), 16))  # CLIP's is a download
    clip = make().clip
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    args = ["--ckpt", tmp_path / "clip.pt", "--workers", 0, "--device", "cpu"]
    assert one_error(*called(capsys, monkeypatch, *args), "clip.pt", "--data")
    results = {}
    for name, pooling in (("query", []), ("mean", ["--pooling", "mean"])):
        more = ["--data", folder / "one.csv", "--root", folder / "videos", "--save", tmp_path / "s.pt", *pooling]
        status, out, err = called(capsys, monkeypatch, *args, *more)
        assert status == 0 and f"pooling {name}, radius none" in out and "7 texts, 7 videos" in out, err
        results[name] = torch.load(tmp_path / "s.pt", weights_only=True)
    saved = results["mean"]
    literal = F.cosine_similarity(saved["t"][:, None], saved["f"].mean(1)[None], dim=-1)
    assert (saved["sims"] - literal).abs().max() < 1e-5
    assert (results["query"]["sims"] - literal).abs().max() > 1e-5


def _saved(folder, tmp_path, capsys, monkeypatch, *args):
    status, out, err = called(capsys, monkeypatch, *on(folder, "--trials", 0, "--save", tmp_path / "p.pt", *args))
    assert status == 0, err
    return tmp_path / "p.pt"


@pytest.mark.parametrize("weight", ["clip.text_projection", "clip.token_embedding.weight", "radius.linear.bias"])
def test_scores_that_are_not_finite_are_never_a_result(weight, folder, tmp_path, capsys, monkeypatch):
    content = torch.load(folder / "model.pt", weights_only=True)
    content["model"][weight][-1] = NAN  # of the tokens: end of text
    torch.save(content, tmp_path / "broken.pt")
    args = ["--ckpt", tmp_path / "broken.pt", "--workers", 0, "--device", "cpu"]
    status, out, err = called(capsys, monkeypatch, *args, "--json", tmp_path / "r.json", "--save", tmp_path / "r.pt")
    assert one_error(status, out, err, "broken.pt", "not finite") and "R@1" not in out
    assert os.listdir(tmp_path) == ["broken.pt"]
    args += ["--videos", folder / "videos", "--index", tmp_path / "index", "--json", tmp_path / "r.json"]
    assert one_error(*called(capsys, monkeypatch, "a query", *args, room=search), "broken.pt", "finite", "a query")
    assert not (tmp_path / "r.json").exists()


def test_videos_that_lie_elsewhere(folder, tmp_path, capsys, monkeypatch):
    """--videos DIR, and the checkpoint's own: what training used is used again without being named."""
    table = tmp_path / "my.csv"
    table.write_text((folder / "many.csv").read_text())
    for name, config in (("bare.pt", {}), ("trained.pt", dict(videos=str(folder / "videos"), root=str(tmp_path)))):
        save_checkpoint(tmp_path / name, make(), Tokenizer((), 16), dict(data=str(table), seed=24, **config))
    args = ["--workers", 0, "--device", "cpu", "--trials", 1, "--ckpt"]
    assert one_error(*called(capsys, monkeypatch, *args, tmp_path / "bare.pt"), "7 of 7 videos are missing")
    results = []
    for more in ([tmp_path / "bare.pt", "--videos", folder / "videos"], [tmp_path / "trained.pt"]):
        status, out, err = called(capsys, monkeypatch, *args, *more)
        assert status == 0 and "15 texts, 7 videos" in out, err
        results.append(out.split("split test")[1])
    model, tokenizer, _ = load_checkpoint(tmp_path / "trained.pt")
    ann = data.load_split(str(table), None, "test", videos=str(folder / "videos"))
    assert results[0] == results[1] and ev.report(ev.evaluate(model, tokenizer, ann, trials=1)) in results[0]


def test_processes_that_cannot_start_or_are_lost(folder, tmp_path, capsys, monkeypatch):
    """A job half started by hand, a port that is taken: one line. A process that dies ends the other, in one line."""
    monkeypatch.setenv("RANK", "0")
    assert one_error(*called(capsys, monkeypatch, *on(folder)), "process 0", "torchrun")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        there = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]), WORLD_SIZE="2")
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        assert one_error(*called(capsys, monkeypatch, *on(folder)), "process 0", "torchrun")
    code = ("import os, sys, eval\n"
            "if os.environ['RANK'] == '1':\n"
            "    eval.encode_texts = lambda *args, **kwargs: os._exit(9)\n"
            "sys.exit(eval.run(eval.main))")
    command = [sys.executable, "-c", code, *map(str, on(folder))]
    started = [subprocess.Popen(command, env={**os.environ, **ENV, **there, "RANK": str(rank)}, text=True,
                                cwd=os.path.dirname(ev.__file__), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for rank in (0, 1)]
    (out, err), _ = (process.communicate(timeout=120) for process in started)
    assert started[1].returncode == 9 and one_error(started[0].returncode, out, err, "another process", "died"), err
    assert "R@1" not in out
