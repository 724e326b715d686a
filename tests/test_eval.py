"""Ranks and metrics by hand and by literal loops, the released protocol, eval.py on real files."""
import dataclasses
import json
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, D, T, ended, literal_score, noise_video, refused, small_model, torchrun

import data
import eval as ev
from clip_model import Tokenizer
from lib import exact
from lib.video import Segment, read_frames
from lib.weights import load_checkpoint, save_checkpoint
from tmass import POOLINGS

NAN = float("nan")


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
    assert ev.metrics([1, 2, 6, 60]) == dict(R1=25, R5=50, R10=75, R50=75, MdR=4, MnR=17.25)


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
        assert not torch.is_tensor(out) or out.dtype != torch.float64
        return out


def test_a_device_without_float64():
    sims = torch.rand(9, 5)
    owner = [0, 1, 2, 3, 0, 1, 2, 3, 0]
    results = [ev.measure(sims.as_subclass(kind), owner) for kind in (torch.Tensor, NoDoubles)]
    assert str(results[0]) == str(results[1])


def test_dsl_by_hand():
    sims = torch.tensor([[0.5, 0.4], [0.5, 0.1]])
    low = 0.1 * torch.tensor(-30.0).exp().item()
    torch.testing.assert_close(ev.dsl(sims), torch.tensor([[0.25, 0.4], [0.25, low]]))
    torch.testing.assert_close(ev.dsl(sims.T, 1), ev.dsl(sims).T)


# ---- a small model, real files ----


def make(**method):
    model = small_model(**method)
    if model.config["pooling"] == "xpool":
        model.pool.q.weight.data *= 10  # attention sharp enough for the text to matter
    return model


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


@pytest.fixture
def loaded(folder):
    """Model, tokenizer, and the annotations of many.csv."""
    model, tokenizer, _ = load_checkpoint(folder / "model.pt")
    return model, tokenizer, annotations(folder, "many.csv")


def annotations(folder, name):
    return data.load_annotations(str(folder / name), str(folder / "videos"), "all")


def on(folder, *words):
    return ["--workers", 0, "--device", "cpu", "--ckpt", folder / "model.pt", *words]


@pytest.fixture
def saved(call, folder, tmp_path):
    """saved(*words) -> what --save writes, and what is printed."""

    def saved(*words):
        status, out, err = call(ev, *on(folder, "--save", tmp_path / "s.pt", *words))
        assert status == 0, err
        return torch.load(tmp_path / "s.pt", weights_only=True), out

    return saved


@torch.no_grad()
def test_evaluate_equals_literal_loops(folder, loaded):
    """Each text and each video by itself, each score from its definition."""
    model, tokenizer, _ = loaded
    ann = annotations(folder, "one.csv")
    t = torch.cat([model.encode_text(tokenizer([caption])) for caption in ann.captions])
    f = []
    for segment in ann.segments:
        pixels = data.test_transform(16)(read_frames(segment, T))
        f.append(model.encode_video(pixels[None])[0])
    literal = literal_score(model, t, torch.stack(f), 3, seed=5)
    t, f, sims, *_ = ev.score_split(model, tokenizer, ann, batch=3, trials=3, seed=5)
    assert (sims - literal).abs().max() < 1e-5
    leaking = ev.released_scores(model, t, f, torch.tensor(ann.owner).argsort(), 3, 5)
    result = ev.evaluate(model, tokenizer, ann, trials=3, seed=5, with_dsl=True, released=True)
    assert result["t2v"] == ev.metrics(ev.ranks(sims, ann.owner)[0])
    assert result["released_protocol"]["t2v"] == ev.metrics(ev.ranks(leaking, ann.owner)[0])
    assert result["dsl"]["v2t"] == ev.metrics(ev.ranks(ev.dsl(sims, 1), ann.owner)[1])
    json.dumps(result, allow_nan=False)


@torch.no_grad()
def test_the_released_protocol_takes_each_videos_first_caption(loaded):
    """Of 15 captions for 7 videos, 7 count, beside honest rows of them; an 8th video has none."""
    model, tokenizer, many = loaded
    first = [many.owner.index(v) for v in range(7)]
    one = data.Annotations(many.segments, [many.captions[i] for i in first], list(range(7)))
    more = [many.segments[2], *many.segments]
    many = dataclasses.replace(many, segments=more, owner=[v + 1 for v in many.owner])
    whole = ev.evaluate(model, tokenizer, many, trials=5, released=True)
    alone = ev.evaluate(model, tokenizer, one, trials=5, released=True)
    assert whole["released_protocol"] == alone["released_protocol"]
    assert whole["released_protocol"]["texts"] == whole["released_protocol"]["videos"] == 7
    assert whole["first_captions"] == {way: alone[way] for way in ("t2v", "v2t")}
    assert "first_captions" not in alone


def test_evaluation_cannot_see_the_owner(loaded):
    """Scores stay whatever `owner` says, and follow texts and videos where these are put."""
    model, tokenizer, ann = loaded
    model.train()
    model.clip.eval()  # as --freeze-clip leaves it
    modes = [part.training for part in model.modules()]
    whole = ev.score_split(model, tokenizer, ann)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(whole.sims[-1], whole.sims[-2])  # equal captions tie exactly
    swapped = dataclasses.replace(ann, owner=[(v + 3) % 7 for v in ann.owner])
    other = ev.score_split(model, tokenizer, swapped)
    assert torch.equal(other.sims, whole.sims)
    places = [ev.ranks(x.sims, x.ann.owner)[0] for x in (whole, other)]
    assert not torch.equal(*places)  # there it does enter
    texts = torch.randperm(15).tolist()
    videos = torch.randperm(7).tolist()
    moved = data.Annotations(
        [ann.segments[v] for v in videos],
        [ann.captions[i] for i in texts],
        [videos.index(ann.owner[i]) for i in texts],
    )
    there = ev.score_split(model, tokenizer, moved)
    assert (there.sims - whole.sims[texts][:, videos]).abs().max() < 1e-6


def test_lists_of_captions_and_of_videos(loaded):
    """A Segment, a str and a Path are the same video; one of them is no list, nor is a caption."""
    model, tokenizer, ann = loaded
    segment = ann.segments[3]
    f = ev.encode_videos(model, [segment, segment.path, Segment(segment.path, 0.1, 0.2)])
    assert torch.equal(f[0], f[1]) and not torch.equal(f[0], f[2])
    for lone in (segment, segment.path):
        with pytest.raises(TypeError, match="expected a list of paths or Segments"):
            ev.encode_videos(model, lone)
    with pytest.raises(TypeError, match="captions must be a list of str"):
        ev.encode_texts(model, tokenizer, "a dog")
    assert ev.encode_texts(model, tokenizer, ("a dog", "a cat")).shape == (2, D)


@pytest.mark.slow
def test_two_processes_report_what_one_does(folder, tmp_path):
    """Seven videos and 14 distinct texts in batches of 2: neither divides."""
    results = []
    for count in (1, 2):
        file = tmp_path / f"{count}.json"
        words = on(folder, "--split", "all", "--dsl", "--workers", 1, "--batch", 2, "--json", file)
        status, out, err = ended(torchrun(ROOT / "eval.py", *words, cwd=folder, processes=count))
        assert status == 0 and out.count("7 videos") == 1, err  # one process prints
        results.append(json.loads(file.read_text()))
    assert results[0] == results[1] and results[0]["texts"] == 15


# ---- what is evaluated ----


def test_which_rows_are_evaluated(folder, tmp_path, saved):
    """The checkpoint's test split; of another csv the test rows or, without any, all of them."""
    result = saved("--trials", 3, "--seed", 5, "--prior", "uniform")[0]["result"]
    assert dict(split="test", texts=15, prior="uniform", trials=3, seed=5).items() <= result.items()
    other = ["--root", folder / "videos", "--data"]
    assert saved(*other, folder / "one.csv")[0]["result"]["split"] == "all"
    rows = [f"v{v}.mp4,text {v},{'train' if v < 5 else 'test'}\n" for v in range(7)]
    (tmp_path / "my.csv").write_text("video,caption,split\n" + "".join(rows))
    assert saved(*other, tmp_path / "my.csv")[0]["captions"] == ["text 5", "text 6"]


def test_videos_that_are_missing_or_broken_are_left_out_and_counted(folder, tmp_path, saved):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    names = [folder / "videos" / "v1.mp4", "broken.mp4", folder / "videos" / "v2.mp4", "gone.mp4"]
    rows = [f"{name},{k}\n" for k, name in enumerate(names)]
    (tmp_path / "my.csv").write_text("video,caption\n" + "".join(rows))
    content, out = saved("--data", tmp_path / "my.csv", "--skip-bad", "--released-protocol")
    assert (content["captions"], content["owner"].tolist()) == (["0", "2"], [0, 1])
    assert "LEAKING" in out and "1 missing videos" in out and "1 unreadable videos" in out


# ---- how it is scored ----


@pytest.mark.parametrize("words, how", [
    ("--trials 3", dict(trials=3)), ("--expected --seed 1", dict(expected=True))])
def test_saved_scores(loaded, tmp_path, saved, words, how):
    """From the file alone the metrics come out exactly, and so do the scores."""
    content, _ = saved(*words.split(), "--json", tmp_path / "s.json")
    result = json.loads((tmp_path / "s.json").read_text())
    assert content["result"] == result
    assert ev.measure(content["sims"], content["owner"]).items() <= result.items()
    places = ev.ranks(content["sims"], content["owner"])
    assert all(map(torch.equal, places, (content["t2v_ranks"], content["v2t_ranks"])))
    model, _, ann = loaded
    assert torch.equal(exact.score(model, content["t"], content["f"], **how), content["sims"])
    assert (content["captions"], content["owner"].tolist()) == (ann.captions, ann.owner)
    assert [Segment(*x) for x in content["clips"]] == ann.segments


def test_bfloat16(saved):
    """The towers round, and the embeddings are float32 all the same; scores move by little."""
    off, half = (saved("--amp", amp, "--trials", 0)[0] for amp in ("off", "bf16"))
    assert half["result"]["amp"] == "bf16" and half["t"].dtype == torch.float32
    assert 1e-5 < (off["sims"] - half["sims"]).abs().max() < 0.02


def test_another_pooling(saved):
    """A pooling without weights suits a checkpoint of xpool."""
    for name in ("mean", "query"):
        content, _ = saved("--trials", 0, "--pooling", name)
        t = content["t"]
        v = POOLINGS[name]()(t, content["f"])
        assert (content["sims"] - F.cosine_similarity(t[:, None], v, dim=-1)).abs().max() < 1e-5
        assert content["result"]["pooling"] == name


# ---- results, and mistakes ----


def test_results_replace_the_files_that_are_named(folder, tmp_path, call, monkeypatch):
    """Whatever was in them; a link stays one, and no temporary file is left."""
    monkeypatch.chdir(tmp_path)
    for name in ("r.json", "notes", "r.pt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to("notes")
    outputs = "--json", "r.json", "--report", "link", "--save", "r.pt"
    assert call(ev, *on(folder, "--trials", 1, *outputs))[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["trials"] == 1
    assert torch.load("r.pt", weights_only=True)["result"]["trials"] == 1
    assert (tmp_path / "notes").read_text().startswith("<!DOCTYPE html>")
    assert sorted(os.listdir()) == ["link", "notes", "r.json", "r.pt"]
    assert os.readlink("link") == "notes"


REFUSED = {  # command -> what must be in the line
    "--ckpt none.pt": "none.pt",
    "--ckpt frames.pt": "radius.linear",
    "--ckpt nodata.pt": "--data",
    "--ckpt broken.pt": "not finite",
    "--ckpt mean.pt --pooling xpool": "--pooling xpool",
    "--frames 5": "--frames 5",
    "--data gone.csv": "gone.mp4",
    "--data bad.csv": "text.mp4",
    "--data bad.csv --skip-bad": "nothing to evaluate",
    "--videos none": "none: there is no such folder",
    "--split train": "no caption in split train",
    "--seed -1": "argument --seed",
    "--trials 99999999999": "argument --trials",
    "--prior-std 1e300": "argument --prior-std",
    "--batch 0": "argument --batch",
    "--workers 999999999": "argument --workers",
    "--device foo": "--device foo",
    "--device meta": "--device meta",
    "--json -": "--json -",
    "--json new/": "--json new/ cannot be written",
    "--save missing/x": "--save missing/x cannot be written",
    "--report pipe": "--report pipe cannot be written",
    "--json ./nodata.pt --ckpt nodata.pt": "--json ./nodata.pt: this command reads",
    "--save link": "--save link: this command reads",
    "--report link.csv": "--report link.csv: this command reads",
    "--save v3.mp4": "--save v3.mp4: this command reads",
    "--json new --save here/new": "--save here/new: this command reads or writes",
}


def test_mistakes_are_one_line(folder, tmp_path, call, monkeypatch):
    """And cost nothing: what was there stays as it was, and nothing new is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "gone.csv").write_text("video,caption\ngone.mp4,gone\n")
    (tmp_path / "bad.csv").write_text("video,caption\ntext.mp4,bad\n")
    whole = torch.load(folder / "model.pt", weights_only=True)
    torch.save({**whole, "tmass": {**whole["tmass"], "frames": 12}}, "frames.pt")
    torch.save({**whole, "config": {}}, "nodata.pt")
    whole["model"]["clip.text_projection"][-1] = NAN
    torch.save(whole, "broken.pt")
    save_checkpoint("mean.pt", make(pooling="mean"), Tokenizer((), 16), {})
    os.mkfifo("pipe")
    links = {"link": "model.pt", "link.csv": "many.csv", "v3.mp4": "videos/v3.mp4"}
    for name, there in links.items():
        os.symlink(folder / there, name)
    os.symlink(".", "here")

    def content():
        files = [x for x in (*tmp_path.iterdir(), *folder.rglob("*")) if x.is_file()]
        return {x: x.read_bytes() for x in files}, sorted(os.listdir())

    before = content()
    for words, reason in REFUSED.items():
        refused(call(ev, *on(folder, *words.split())), reason)
    assert content() == before
    monkeypatch.setenv("TMASS_CACHE", "~nosuchuser")
    refused(call(ev, "--ckpt", "ViT-B/32", "--data", folder / "one.csv"), "set TMASS_CACHE")
