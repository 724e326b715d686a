"""Measurements of search, subcommands of study/bench.py: its index, its shortlist, its moments."""
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import peak_memory, scoring_model, seconds

import data
import eval as eval_
import search as se
from lib import index as store
from lib import shapes
from lib import video as decode
from lib.weights import load_checkpoint


def written():
    """Bytes that this process has written so far. On Linux."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar"):
            return int(line.split()[1])


def elapsed(run):
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def index(pieces=1_000_000, a_file=10, D=512, T=12):
    """Search's index of random features: making it, what that writes and needs, adding to it,
    opening and asking it.

    All by search.py's own code on real (empty) files; only decoding and the image tower are left
    out. 1,000,000 pieces take 13.4 GB.
    """
    g = torch.Generator().manual_seed(0)
    model = scoring_model(D, T)
    t = torch.randn(16, D, generator=g)
    noise = 0.7 * torch.randn(512, T, D, generator=g)
    model.encode_video = lambda x: torch.randn(len(x), 1, D, generator=g) + noise[:len(x)]
    data.test_transform = lambda *settings: lambda x: x
    times = [k / 2 for k in range(T)]
    nothing = torch.zeros(1)
    a_video = [decode.Piece(10.0 * k, 10.0 * k + 10, times, nothing) for k in range(a_file)]
    se.read_pieces = lambda path, frames, window: iter(a_video)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # until queries: there is little to compute
    with tempfile.TemporaryDirectory() as folder:
        files = pieces // a_file
        for k in range(files):
            below = Path(folder, f"{k // 1000:03d}")
            below.mkdir(exist_ok=True)
            Path(below, f"video {k:06d}.mp4").touch()

        def build(new=True):
            return se.build_index(model, [folder], new=new, batch=256)

        before = written()
        start = time.perf_counter()
        memory = peak_memory(build)
        took = time.perf_counter() - start
        wrote = written() - before
        shards = list(Path(folder, se.INDEX).iterdir())
        size = sum(file.stat().st_size for file in shards)
        print(f"{files} files, {pieces} pieces, T={T} D={D}: made in {took:.0f} s; "
              f"{size / 1e9:.2f} GB in {len(shards)} shards; written {wrote / size:.3f} times "
              f"that; peak memory {memory:.2f} GB", flush=True)
        for k in range(1000 // a_file):
            Path(folder, f"new {k:03d}.mp4").write_text(str(k))  # or they would be copies
        print(f"adding 1,000 pieces: {elapsed(build):.1f} s; opening it with nothing new: "
              f"{elapsed(build):.1f} s, with -n: {elapsed(lambda: build(False)):.1f} s", flush=True)

        torch.set_num_threads(threads)
        gallery = build(False)
        one = t[:1]
        memory = peak_memory(lambda: se.search(model, one, gallery, expected=True))
        rows = se.best_rows(se.point_scores(one, gallery)[0], gallery, 1000, 5)
        runs = {
            "both": lambda: se.search(model, one, gallery, expected=True),
            "points": lambda: se.point_scores(one, gallery),
            "exact": lambda: se.score_rows(model, one, gallery, rows, 5, expected=True),
        }
        s = seconds(runs, repeat=5)
        print(f"a query, {threads} threads, shortlist 1,000: {s['both'] * 1e3:.0f} ms: "
              f"{s['points'] * 1e3:.0f} ms for the point scores, {s['exact'] * 1e3:.0f} ms for the "
              f"exact ones; peak memory {memory:.2f} GB, mapped pages included", flush=True)
        rows = torch.arange(len(gallery.file))[:10_000]
        run = {"exact": lambda: se.score_rows(model, one, gallery, rows, 5, expected=True)}
        print(f"exact scores of everything (--shortlist 0): "
              f"{seconds(run, repeat=2)['exact']:.2f} s per 10,000 pieces")


def test_split(ckpt):
    """The test split of what a checkpoint was trained on. -> model, tokenizer, Annotations"""
    model, tokenizer, config = load_checkpoint(ckpt)
    val_videos = config.get("val_videos", 0)
    seed = config.get("seed", 24)
    ann = data.load_split(config["data"], config.get("root"), "test", val_videos, seed)
    return model, tokenizer, ann


@torch.no_grad()
def shortlist(ckpt="model.pt"):
    """How much of the exact top 10 of a trained model's test split a shortlist by mean-pooled
    frames keeps."""
    model, tokenizer, ann = test_split(ckpt)
    t = eval_.encode_texts(model, tokenizer, ann.captions)
    f = eval_.encode_videos(model, ann.segments, workers=2)
    V, T, _ = f.shape
    shard = store.file_shard(f, torch.zeros(V, T), torch.zeros(V, 2), None)
    names = [f"{v:06d}" for v in range(V)]
    gallery = se.Index([shard], torch.tensor([0, V]), torch.arange(V), names, names)
    exact = se.search(model, t, gallery, 0, 10)
    for K in (10, 20, 50, 100, 200):
        if K >= V:
            break
        kept = []
        for best, found in zip(exact, se.search(model, t, gallery, K, 10)):
            both = {hit.file for hit in best} & {hit.file for hit in found}
            kept.append(len(both) / min(10, V))
        print(f"shortlist of {K:4d} of {V} videos keeps {100 * statistics.mean(kept):.1f} % of the "
              f"exact top 10 ({len(kept)} queries)")


def facts_of(segments, root):
    """What is seen in shapes' videos, drawn again but not written.

    -> {path: (facts of its frames (frames,6), {caption: what it says (6,), -1 for nothing})}
    """
    settings = json.loads((root / "shapes.json").read_text())["settings"]
    sizes = [settings[key] for key in ("train", "val", "test", "seed")]
    drawn = []
    draw = shapes.draw_shots
    write = shapes.write_video
    shapes.draw_shots = lambda facts, *_: drawn.append(facts)
    shapes.write_video = lambda *_: None
    truth = {}
    with tempfile.TemporaryDirectory() as folder:
        videos = shapes.ShapesVideos(Path(folder), *sizes)
        for segment in segments:
            captions, _, says = videos[int(Path(segment.path).stem)]
            truth[segment.path] = drawn[-1], dict(zip(captions, torch.tensor(says)))
    shapes.draw_shots = draw
    shapes.write_video = write
    return truth


@torch.no_grad()
def moment(ckpt="model.pt"):
    """How often the time that search gives lies in a shot that the caption describes: shapes' test
    captions, each with its own video."""
    model, tokenizer, ann = test_split(ckpt)
    truth = facts_of(ann.segments, Path(ann.segments[0].path).parent.parent)
    paths = [segment.path for segment in ann.segments]
    with tempfile.TemporaryDirectory() as folder:
        gallery = se.build_index(model, paths, index_dir=folder, workers=1)
        row = {gallery.paths[number]: k for k, number in enumerate(gallery.file.tolist())}
        t = eval_.encode_texts(model, tokenizer, ann.captions)
        right = []
        chance = []
        for text, caption, owner in zip(t.split(1), ann.captions, ann.owner):
            facts, says = truth[paths[owner]]
            fits = (facts == says[caption]) | (says[caption] < 0)
            described = fits.all(1)  # frames of shots that the caption fits
            rows = torch.tensor([row[paths[owner]]])
            (hit,) = se.score_rows(model, text, gallery, rows, 1)
            right.append(described[round(hit.at * shapes.RATE)].item())
            chance.append(described.double().mean().item())
    print(f"{len(right)} captions of {len(paths)} videos: the moment lies in a described shot for "
          f"{100 * statistics.mean(right):.1f} % (chance {100 * statistics.mean(chance):.1f} %)")
