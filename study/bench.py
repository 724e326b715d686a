"""Measurements, printed as ratios and asserted nowhere: python study/bench.py encode (one function per subcommand)."""
import argparse
import csv
import ctypes
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"


def seconds(runs, repeat=7):
    """Names and functions -> least seconds of each, run in turns after a warm-up: a busy machine only adds."""
    times = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: min(t[1:]) for name, t in times.items()}


def encode(images=16, texts=32):
    """ViT-B/32 with random weights, float32, one batch for all: our image tower against transformers' (sdpa) and
    open_clip's, and texts cut to the longest of their batch against padding to 77."""
    import open_clip
    import transformers

    from clip_model import CLIP, Tokenizer
    from lib.weights import to_openai_names
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # its defaults are ViT-B/32
    config = transformers.CLIPConfig(text_config=dict(eos_token_id=49407), attn_implementation="sdpa")
    hf = transformers.CLIPModel(config)
    assert hf.config._attn_implementation == "sdpa"
    hf = hf.to(device).eval()
    ours = CLIP.from_state_dict(to_openai_names(hf.state_dict())).to(device).eval()
    oc = open_clip.create_model("ViT-B-32-quickgelu", device=device).eval()
    oc.load_state_dict(ours.state_dict())
    x = torch.randn(images, 3, 224, 224, device=device)

    try:
        tok = Tokenizer.from_file(SHARED / "clip" / "bpe_simple_vocab_16e6.txt.gz")
        with open(SHARED / "msrvtt" / "MSRVTT_JSFUSION_test.csv", newline="", encoding="utf-8") as file:
            captions = [row["sentence"] for row in csv.DictReader(file)]
        lengths, source = [len(tok.encode(c)) + 2 for c in captions], "of msrvtt's 1,000 test captions"
    except (OSError, ValueError):
        g = torch.Generator().manual_seed(0)  # msrvtt's: mean 11.7, std 4.0 (with start and end), at least 5
        lengths = (torch.randn(1000, generator=g) * 4.0 + 11.7).clamp(5, 77).round().long().tolist()
        source = "drawn from N(11.7, 4.0), at least 5"
    print(f"device {device}, {torch.get_num_threads()} threads, {images} images, {texts} texts a batch, "
          f"lengths {source}: "
          f"mean {statistics.mean(lengths):.1f}, std {statistics.pstdev(lengths):.1f}, longest {max(lengths)}")
    batches = []
    for i in range(0, len(lengths) - texts + 1, texts):
        ids = torch.randint(1, 49000, (texts, 77))
        for row, n in zip(ids, lengths[i:i + texts]):
            row[0], row[n - 1], row[n:] = 49406, 49407, 0
        batches.append(ids.to(device))
    batches = batches[:2]
    cut = [ids[:, :(ids.argmax(-1).max() + 1)].contiguous() for ids in batches]

    with torch.inference_mode():
        t = seconds({"ours": lambda: ours.encode_image(x), "transformers": lambda: hf.get_image_features(x),
                     "open_clip": lambda: oc.encode_image(x)}, repeat=15)
        gap = max((ours.encode_image(x) - f).norm() / f.norm() for f in (hf.get_image_features(x), oc.encode_image(x)))
        print(f"image tower: {images / t['ours']:.1f} images/s; speed against transformers "
              f"{t['transformers'] / t['ours']:.2f}x, "
              f"open_clip {t['open_clip'] / t['ours']:.2f}x; features differ by {gap:.1e}")
        t = seconds({"cut": lambda: [ours.encode_text(i) for i in cut],
                     "padded": lambda: [ours.encode_text(i) for i in batches]})
        gap = max((ours.encode_text(a) - ours.encode_text(b)).norm() / ours.encode_text(b).norm()
                  for a, b in zip(cut, batches))
        print(f"text tower: {len(cut) * texts / t['cut']:.0f} texts/s, cut to {[i.shape[1] for i in cut]} tokens; "
              f"speed against padding to 77 {t['padded'] / t['cut']:.2f}x; features differ by {gap:.1e}")

        def half(tower, x):
            with torch.autocast(device, torch.bfloat16):
                return tower(x).float()
        t = seconds({"f": lambda: ours.encode_image(x), "f16": lambda: half(ours.encode_image, x),
                     "t": lambda: ours.encode_text(cut[0]), "t16": lambda: half(ours.encode_text, cut[0])})
        cosines = [F.normalize(t, dim=-1) @ F.normalize(f, dim=-1).T for t, f in (
            (ours.encode_text(cut[0]), ours.encode_image(x)),
            (half(ours.encode_text, cut[0]), half(ours.encode_image, x)))]
        moved = (cosines[0] - cosines[1]).abs()
        print(f"--amp bf16: images {t['f'] / t['f16']:.1f}x, texts {t['t'] / t['t16']:.1f}x as fast; "
              f"cos(t, f) moves by "
              f"{moved.mean():.1e} on average, at most {moved.max():.1e} (it spreads by {cosines[0].std():.1e})")


def literal_score(model, t, f, trials):
    """The inference of the paper as a careful person would write it: a loop over videos and trials."""
    eps, sims = model.noise(trials), []
    for j in range(len(f)):
        v = model.pool(t, f[j:j + 1])[:, 0]  # psi(f_j | t_i)  (N,D)
        r = model.radius(F.cosine_similarity(t[:, None], f[j][None], dim=-1))
        best = torch.full((len(t),), -2.0, device=t.device)
        for m in range(trials):
            best = torch.maximum(best, F.cosine_similarity(t + r * eps[m], v, dim=-1))
        sims.append(best)
    return torch.stack(sims, 1)


def scoring_model(D, T, **method):
    """An untrained T-MASS whose head is moved off its identity start; CLIP itself plays no part in scoring."""
    from clip_model import CLIP
    from tmass import TMASS
    torch.manual_seed(0)
    model = TMASS(CLIP(D, 32, 32, 64, 1, 8, 514, 64, 1), frames=T, **method).eval()
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += 0.05 * torch.randn_like(p) / max(p.shape, default=1) ** 0.5
    return model


def peak_memory(function):
    """How far a call lifts this process' (or the GPU's) peak memory above what is in use, in GB. On Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 30
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system first
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    size = lambda name: int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1])
    before = size("VmRSS")
    function()
    return (size("VmHWM") - before) / 2 ** 20


@torch.no_grad()
def scoring(D=512, T=12, M=20):
    """Exact all-pairs scoring, D=512, T=12, M=20: against the literal formula, the floor (three GEMMs and one exp on
    tiles in the cache), the closed form of best-of-M, and as it grows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, g = scoring_model(D, T).to(device), torch.Generator().manual_seed(0)
    xpool, scaled = scoring_model(D, T, radius="none").to(device), scoring_model(D, T, radius="scaled").to(device)
    features = lambda n: (torch.randn(n, D, generator=g).to(device),
                          (torch.randn(n, 1, D, generator=g) + 0.7 * torch.randn(n, T, D, generator=g)).to(device))
    print(f"device {device}, {torch.get_num_threads()} threads, D={D} T={T} M={M}")
    for n in (250, 500, 2000) + ((10_000,) if device == "cuda" else ()):
        t, f = features(n)
        s = seconds({"score": lambda: model.score(t, f, M)}, repeat=3)["score"]
        print(f"{n:6d} x {n:<6d} {s:7.2f} s   {s / n / n * 1e6:.2f} us/pair")
    t, f = features(1000)
    P = 512 if device == "cpu" else 65536
    r, e, tiles = torch.randn(P, D, device=device), torch.randn(D, M, device=device), 1_000_000 // P
    product, grown = torch.empty(P, M, device=device), torch.empty_like(r)

    def floor():
        for _ in range(tiles):
            torch.exp(r, out=grown)
            for _ in range(3):
                torch.mm(grown, e, out=product)
    s = seconds({"score": lambda: model.score(t, f, M), "floor": floor, "point": lambda: model.score(t, f, 0),
                 "expected": lambda: model.score(t, f, M, expected=True), "X-Pool": lambda: xpool.score(t, f, M),
                 "scaled": lambda: scaled.score(t, f, M),
                 "scaled, expected": lambda: scaled.score(t, f, M, expected=True)}, repeat=5)
    literal = seconds({"literal": lambda: literal_score(model, t, f, M)}, repeat=1)["literal"]
    gap = (model.score(t, f, M) - literal_score(model, t, f, M)).abs().max()
    print(f"  1000 x 1000   {s['score']:7.2f} s   {s['score']:.2f} us/pair; the literal formula {literal:.1f} s: "
          f"{literal / s['score']:.0f} times as long; "
          f"floor {s['floor']:.2f} s: we take {s['score'] / s['floor']:.1f} times that")
    print(f"  expected (no samples) {s['expected']:.2f} s, {s['expected'] / s['score']:.2f} of sampling; "
          f"scaled radius: sampled {s['scaled']:.2f} s, "
          f"expected {s['scaled, expected']:.2f} s; X-Pool (radius none) {s['X-Pool']:.2f} s; "
          f"point text {s['point']:.2f} s")
    print(f"  largest difference from the literal formula {gap:.1e}; extra peak memory "
          f"{peak_memory(lambda: model.score(t, f, M)):.2f} GB")


@torch.no_grad()
def index(pieces=1_000_000, a_file=10, D=512, T=12):
    """Search's index of random features: making it, what that writes and holds, adding to it, opening and asking it.

    All by search.py's own code on real (empty) files; only decoding and the image tower are left out. 1,000,000 pieces
    take 13.3 GB.
    """
    import tempfile

    import data
    import search as se
    from lib import video as decode
    g = torch.Generator().manual_seed(0)
    model, t = scoring_model(D, T), torch.randn(16, D, generator=g)
    noise = 0.7 * torch.randn(512, T, D, generator=g)
    model.encode_video = lambda x: torch.randn(len(x), 1, D, generator=g) + noise[:len(x)]
    data.test_transform = lambda size: lambda x: x
    times, nothing, threads = [k / 2 for k in range(T)], torch.zeros(1), torch.get_num_threads()
    torch.set_num_threads(1)  # until queries: there is little to compute
    a_video = [decode.Piece(10. * k, 10. * k + 10, times, nothing) for k in range(a_file)]
    decode.read_pieces = lambda path, T, window: iter(a_video)
    written = lambda: int(next(line for line in open("/proc/self/io") if line.startswith("wchar")).split()[1])

    def seconds_of(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        files = pieces // a_file
        for k in range(files):
            if k % 1000 == 0:
                Path(folder, f"{k // 1000:03d}").mkdir()
            Path(folder, f"{k // 1000:03d}", f"video {k:06d}.mp4").touch()
        build = lambda new=True: se.build_index(model, [folder], new=new, batch=256)
        before, start = written(), time.perf_counter()
        memory = peak_memory(build)
        took, wrote = time.perf_counter() - start, written() - before
        shards = list(Path(folder, se.INDEX).iterdir())
        size = sum(file.stat().st_size for file in shards)
        print(f"{files} files, {pieces} pieces, T={T} D={D}: made in {took:.0f} s; "
              f"{size / 1e9:.2f} GB in {len(shards)} shards; written {wrote / size:.3f} times that; "
              f"peak memory {memory:.2f} GB", flush=True)
        for k in range(1000 // a_file):
            Path(folder, f"new {k:03d}.mp4").touch()
        print(f"adding 1,000 pieces: {seconds_of(build):.1f} s; opening it with nothing new: {seconds_of(build):.1f} "
              f"s, with -n: {seconds_of(lambda: build(False)):.1f} s", flush=True)
        torch.set_num_threads(threads)
        gallery, one = build(False), t[:1]
        memory = peak_memory(lambda: se.search(model, one, gallery, expected=True))
        rows = se.best_rows(se.point_scores(one, gallery)[0], gallery, 1000, 5)
        s = seconds({"both": lambda: se.search(model, one, gallery, expected=True),
                     "points": lambda: se.point_scores(one, gallery),
                     "exact": lambda: se.score_rows(model, one, gallery, rows, 5, expected=True)}, repeat=5)
        print(f"a query, {threads} threads, shortlist 1,000: {s['both'] * 1e3:.0f} ms: {s['points'] * 1e3:.0f} ms for "
              f"the point scores, {s['exact'] * 1e3:.0f} ms for the exact ones; peak memory {memory:.2f} GB, mapped "
              "pages included", flush=True)
        part = gallery._replace(file=gallery.file.where(torch.arange(len(gallery.file)) < 10_000, -1))
        exact = seconds({"exact": lambda: se.search(model, one, part, 0, expected=True)}, repeat=2)["exact"]
        print(f"exact scores of everything (--shortlist 0): {exact:.2f} s per 10,000 pieces")


def test_split(ckpt):
    """The test split of what a checkpoint was trained on -> model, tokenizer, Annotations."""
    import data
    from lib.weights import load_checkpoint
    model, tokenizer, config = load_checkpoint(ckpt)
    root, held = config.get("root"), config.get("val_videos", 0)
    return model, tokenizer, data.load_split(config["data"], root, "test", held, config.get("seed", 24))


@torch.no_grad()
def shortlist(ckpt="model.pt"):
    """How much of the exact top 10 of a trained model's test split a shortlist by mean-pooled frames keeps."""
    import eval as eval_
    import search as se
    model, tokenizer, ann = test_split(ckpt)
    split = eval_.rank_split(model, tokenizer, ann, workers=2)
    V, T, _ = split.f.shape
    f, rows = split.f.half(), torch.arange(V)
    shard = se.Shard(f, se.pooled(f).half(), torch.zeros(V, T), torch.zeros(V, 2), rows.int(), [])
    gallery = se.Index([shard], torch.tensor([0, V]), rows, [f"{v:06d}" for v in range(V)], [])
    exact = se.search(model, split.t, gallery, 0, 10)
    for K in (10, 20, 50, 100, 200):
        if K < V:
            found = se.search(model, split.t, gallery, K, 10)
            kept = [len({x.file for x in a} & {x.file for x in b}) / 10 for a, b in zip(exact, found)]
            print(f"shortlist of {K:4d} of {V} videos keeps {100 * statistics.mean(kept):.1f} % of the exact top 10 "
                  f"({len(kept)} queries)")


@torch.no_grad()
def moment(ckpt="model.pt"):
    """How often the time that search gives lies in a shot that the caption tells of: shapes' test captions, each with
    its own video."""
    import json
    import tempfile

    import eval as eval_
    import search as se
    from lib import shapes
    model, tokenizer, ann = test_split(ckpt)
    root = Path(ann.segments[0].path).parent.parent
    settings = json.loads((root / "shapes.json").read_text())["settings"]
    seen, draw, write = [], shapes.draw_shots, shapes.write_video
    with tempfile.TemporaryDirectory() as folder:
        again = shapes.ShapesVideos(Path(folder), *(settings[key] for key in ("train", "val", "test", "seed")))
        shapes.draw_shots, shapes.write_video = lambda facts, *_: seen.append(facts), lambda *_: None
        truth = {}  # video -> facts of its frames (FRAMES,6), {caption: what it says (6,)}
        for clip in ann.segments:
            captions, _, says = again[int(Path(clip.path).stem)]
            truth[clip.path] = seen[-1], dict(zip(captions, torch.tensor(says)))
        shapes.draw_shots, shapes.write_video = draw, write
        gallery = se.build_index(model, [clip.path for clip in ann.segments], index=folder, workers=1)
    row = {gallery.paths[number]: k for k, number in enumerate(gallery.file.tolist())}
    t = eval_.encode_texts(model, tokenizer, ann.captions)
    hits, chance = [], []
    for text, caption, owner in zip(t.split(1), ann.captions, ann.owner):
        path = ann.segments[owner].path
        facts, says = truth[path]
        told = ((facts == says[caption]) | (says[caption] < 0)).all(1)  # frames of shots that the caption fits
        (hit,) = se.score_rows(model, text, gallery, torch.tensor([row[path]]), 1)
        hits.append(told[round(hit.at * shapes.RATE)].item())
        chance.append(told.double().mean().item())
    print(f"{len(hits)} captions of {len(ann.segments)} videos: the moment lies in a described shot for "
          f"{100 * statistics.mean(hits):.1f} % (chance {100 * statistics.mean(chance):.1f} %)")


def pieces(minutes=20, T=12, window=10):
    """The pieces of a long 320x240 H.264 file against one sequential decode of it, one thread."""
    import tempfile

    import av
    from videos import write_video

    from lib import video as decode
    torch.set_num_threads(1)  # as a DataLoader's worker
    g = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scenes = torch.rand(6, 3, 60, 80, generator=g) * 255
        scenes = torch.nn.functional.interpolate(scenes, (480, 640), mode="bicubic")
        frames = []
        for i in range(60 * 25):  # textures that drift, and grain: what a camera gives
            x = scenes[i // 250][:, i % 250 // 2:i % 250 // 2 + 240, i % 250 // 3:i % 250 // 3 + 320]
            x = x + torch.randn(240, 320, generator=g) * 4
            frames.append(x.clamp(0, 255).byte().permute(1, 2, 0).contiguous())
        write_video(f"{folder}/minute.mp4", frames, fps=25, preset="fast")
        with av.open(f"{folder}/long.mp4", "w") as out:  # the same minute again and again, without decoding it
            with av.open(f"{folder}/minute.mp4") as source:
                stream = out.add_stream_from_template(source.streams.video[0])
            for k in range(minutes):
                with av.open(f"{folder}/minute.mp4") as source:
                    for packet in source.demux(video=0):
                        if packet.dts is not None:
                            packet.pts += round(60 * k / packet.time_base)
                            packet.dts += round(60 * k / packet.time_base)
                            packet.stream = stream
                            out.mux(packet)

        def sequentially():
            file, stream = decode._open(f"{folder}/long.mp4")
            with file:
                return sum(1 for packet in file.demux(stream) for _ in packet.decode())
        read = lambda: sum(1 for _ in decode.read_pieces(f"{folder}/long.mp4", T, window))
        n, size = sequentially(), Path(folder, "long.mp4").stat().st_size
        s = seconds({"decode": sequentially, "pieces": read}, repeat=3)
        print(f"{n} frames of 320x240 H.264, {size / 1e6:.0f} MB: {read()} pieces of {window} s, T={T}, in "
              f"{s['pieces']:.2f} s; one sequential decode {s['decode']:.2f} s: {s['pieces'] / s['decode']:.2f} times "
              "that")


def data_(videos=8, T=12):
    """Seconds per epoch from the videos and from the frame cache, and decoding against OpenCV's seek per frame.
    H.264 files of 15 s, 320x240, 25 fps."""
    import tempfile

    from videos import write_video

    import data
    from lib import video as decode
    torch.set_num_threads(1)  # as a DataLoader's worker
    with tempfile.TemporaryDirectory() as folder:
        clips, g = [], torch.Generator().manual_seed(0)
        for k in range(videos):  # textures that drift, and grain: what a camera gives
            scene = F.interpolate(torch.rand(1, 3, 60, 80, generator=g) * 255, (480, 640), mode="bicubic")[0]
            frames = [scene[:, i // 2:i // 2 + 240, i // 3:i // 3 + 320] + torch.randn(240, 320, generator=g) * 4
                      for i in range(375)]
            clips.append(data.Segment(f"{folder}/{k}.mp4"))
            frames = [x.clamp(0, 255).byte().permute(1, 2, 0).contiguous() for x in frames]
            write_video(clips[-1].path, frames, fps=25, preset="fast")
        ann = data.Annotations(clips, ["-"] * videos, list(range(videos)))
        cache = data.FrameCache(f"{folder}/cache", T)
        plain, cached = (data.PairDataset(ann, T, data.train_transform(224), cache=c) for c in (None, cache))
        epoch = lambda dataset: [dataset[0, i] for i in range(videos)]
        epoch(cached)
        runs = {"decode": lambda: epoch(plain), "cache": lambda: epoch(cached),
                "decoding": lambda: [data.read_frames(c, T) for c in clips],
                "reading": lambda: [cache.read(c) for c in clips]}
        try:
            import cv2
            cv2.setNumThreads(1)

            def opencv(clip):
                video, out = cv2.VideoCapture(clip.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), []
                for i in decode.sample_indices(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), T):
                    video.set(cv2.CAP_PROP_POS_FRAMES, i)
                    out.append(torch.from_numpy(cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB)).permute(2, 0, 1))
                return torch.stack(out)
            runs["opencv"] = lambda: [opencv(c) for c in clips]
        except ImportError:
            print("OpenCV is not installed: not compared")
        t = seconds(runs, repeat=5)
        size = sum(f.stat().st_size for f in Path(folder, "cache").iterdir()) / videos
        print(f"{videos} videos of {Path(clips[0].path).stat().st_size / 1e3:.0f} kB, T={T}, one thread; cache "
              f"{size / 1e3:.0f} kB a video")
        print(f"an epoch (read, crop, resize): decode {t['decode']:.3f} s, cache {t['cache']:.3f} s: "
              f"the cache is {t['decode'] / t['cache']:.1f}x faster")
        print(f"frames alone: decode {t['decoding'] / videos * 1e3:.1f} ms, "
              f"cache {t['reading'] / videos * 1e3:.1f} ms a video: "
              f"{t['decoding'] / t['reading']:.1f}x")
        if "opencv" in t:
            gap = max((data.read_frames(c, T).int() - opencv(c).int()).abs().max().item() for c in clips)
            print(f"decoding takes {t['decoding'] / t['opencv']:.2f} of OpenCV's time "
                  f"({t['opencv'] / videos * 1e3:.1f} ms a video, seeking each "
                  f"frame); largest difference of a pixel {gap}")


def memory(T=12, batch=32):
    """What a training step keeps for its backward pass, counted tensor by tensor on the CPU (a GPU's is the same but
    for its allocator's rounding), for ViT-B/32 and B/16 by precision and --grad-checkpoint."""
    from clip_model import CLIP
    from tmass import TMASS

    def kept(model, pairs, amp):
        """GB that autograd keeps, each storage once, without the parameters."""
        known, total = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

        def pack(x):
            nonlocal total
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                total += storage.nbytes()
            return x  # and so stays: no address is used twice
        video = torch.randint(0, 256, (pairs, T, 3, 224, 224), dtype=torch.uint8)
        ids = torch.cat([torch.randint(1, 49000, (pairs, 15)), torch.full((pairs, 1), 49407)], 1)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=amp)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
            loss = model(ids, video)["loss"]
        del loss
        return total / 2 ** 30

    print(f"GB at --batch {batch}, T={T}: weights, gradients and AdamW's state + kept for the backward pass "
          "(with --grad-checkpoint one block, run again)")
    for name, patch in (("ViT-B/32", 32), ("ViT-B/16", 16)):
        torch.manual_seed(0)
        model = TMASS(CLIP(512, 224, patch, 768, 12, 77, 49408, 512, 12), T).train()
        fixed = 16 * sum(p.numel() for p in model.parameters()) / 2 ** 30
        for amp in (False, True):
            for model.clip.grad_checkpoint in (False, True):
                one, two = (kept(model, pairs, amp) for pairs in (1, 2))
                a_pair, whole = two - one, two + (batch - 2) * (two - one)
                if not model.clip.grad_checkpoint:
                    block = a_pair * batch / 12
                else:
                    whole += block
                again = ", grad-checkpoint" if model.clip.grad_checkpoint else ""
                print(f"{name}  {'bf16' if amp else 'fp32'}{again:17s} "
                      f"{fixed:.1f} + {whole:5.1f} = {fixed + whole:5.1f}", flush=True)


def train_(batch=16, T=12, repeat=2):
    """A whole training step, ViT-B/32 with random weights: ours against the same step written plainly on transformers'
    CLIPModel (sdpa), in float32; ours in bf16; and with --grad-checkpoint. One clip of T frames and one caption of
    12 tokens per pair."""
    import transformers

    from clip_model import CLIP
    from lib.weights import to_openai_names
    from tmass import TMASS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=dict(eos_token_id=49407), attn_implementation="sdpa")
    hf = transformers.CLIPModel(config)
    ours = TMASS(CLIP.from_state_dict(to_openai_names(hf.state_dict())), T, dropout=0.0).to(device)
    D = 512
    head = torch.nn.ModuleDict({k: torch.nn.Linear(D, D) for k in ("q", "k", "v", "out", "linear")})
    head.update({k: torch.nn.LayerNorm(D) for k in ("ln1", "ln2", "ln3")})
    head["radius"] = torch.nn.Linear(T, D)
    for name, layer in head.items():
        layer.load_state_dict((ours.radius.linear if name == "radius" else getattr(ours.pool, name)).state_dict())
    plain = torch.nn.ModuleDict(dict(clip=hf, head=head)).to(device).train()
    ours.train()
    video = torch.randint(0, 256, (batch, T, 3, 224, 224), dtype=torch.uint8, device=device)
    ids = torch.randint(1, 49000, (batch, 12), device=device)
    ids[:, 0], ids[:, -1] = 49406, 49407
    # transformers' processor pads captions to 77 with the end token; it attends to no padding
    padded = F.pad(ids, (0, 77 - 12), value=49407)
    mask = (torch.arange(77, device=device) < 12).long().expand(batch, -1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device).view(3, 1, 1)

    def loss_of_plain(ids, mask):
        t = hf.get_text_features(ids, attention_mask=mask)
        f = hf.get_image_features((video.flatten(0, 1).float() / 255 - mean) / std).view(batch, T, D)
        f1 = head["ln1"](f)
        q, k, u = head["q"](head["ln1"](t)), head["k"](f1), head["v"](f1)
        a = (torch.einsum("nd,vtd->nvt", q, k) / D ** 0.5).softmax(-1)
        x = head["ln2"](head["out"](torch.einsum("nvt,vtd->nvd", a, u)))
        v = head["ln3"](x + head["linear"](x))
        own = v[range(batch), range(batch)]
        r = head["radius"](F.cosine_similarity(t[:, None], f, dim=-1)).exp()
        loss, labels = 0, torch.arange(batch, device=device)
        for weight, text in ((1.0, t + r * torch.randn_like(t)), (0.8, t + F.normalize(own - t, dim=-1) * r)):
            logits = hf.logit_scale.exp() * F.cosine_similarity(text[:, None], v, dim=-1)
            loss = loss + weight * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return loss

    def step(model, loss, amp=False):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.2, fused=True)

        def run():
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                out = loss()
            optimizer.zero_grad()
            out.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return run

    def ours_loss():
        return ours(ids, video)["loss"]

    def report(name, run):
        ours.clip.grad_checkpoint = "checkpoint" in name
        s[name] = seconds({name: run}, repeat)[name] if name not in s else s[name]
        print(f"{name:36s} {batch / s[name]:7.2f} pairs/s", flush=True)

    torch.manual_seed(1)
    theirs = loss_of_plain(padded, mask).item()
    torch.manual_seed(1)
    print(f"device {device}, {torch.get_num_threads()} threads, batch {batch}, T={T}; losses "
          f"{ours_loss().item():.4f}, plain {theirs:.4f}")
    runs = {"ours, fp32": step(ours, ours_loss),
            "plain on transformers, fp32": step(plain, lambda: loss_of_plain(padded, mask)),
            "plain, captions cut as ours": step(plain, lambda: loss_of_plain(ids, mask[:, :12])),
            "ours, bf16": step(ours, ours_loss, True)}
    s = seconds(runs, repeat)  # in turns, for the ratios
    for name, run in runs.items():
        report(name, run)
    report("ours, fp32, grad-checkpoint", runs["ours, fp32"])
    report("ours, bf16, grad-checkpoint", runs["ours, bf16"])
    print(f"speed against plain {s['plain on transformers, fp32'] / s['ours, fp32']:.2f}x (its captions cut too: "
          f"{s['plain, captions cut as ours'] / s['ours, fp32']:.2f}x); bf16 against fp32 "
          f"{s['ours, fp32'] / s['ours, bf16']:.2f}x")


if __name__ == "__main__":
    benches = (encode, scoring, index, shortlist, moment, pieces, data_, train_, memory)
    benches = {f.__name__.rstrip("_"): f for f in benches}
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    for name, bench in benches.items():
        command = commands.add_parser(name, help=" ".join(bench.__doc__.split()).replace("%", "%%"))
        if name == "index":
            command.add_argument("--pieces", type=int, default=1_000_000, help="ten to a file (default: %(default)s)")
        if name in ("shortlist", "moment"):
            command.add_argument("--ckpt", default="model.pt", help="a trained model (default: %(default)s)")
    args = vars(parser.parse_args())
    benches[args.pop("bench")](**args)
