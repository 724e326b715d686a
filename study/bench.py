"""Measurements, printed as ratios and asserted nowhere: python study/bench.py encode.

`--help` names the others, each a function here, in bench_search.py or in bench_gpu.py.
"""
import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_gpu import gpu
from bench_search import index, moment, shortlist
from measure import (
    ROOT,
    VITS,
    camera_video,
    peak_memory,
    random_clip,
    random_features,
    random_ids,
    scoring_model,
    seconds,
    synchronize,
)

import data
from eval import collate
from lib import exact, shapes
from lib import video as decode
from lib.processes import loading
from lib.video import FrameCache, Segment, read_frames
from lib.weights import to_openai_names
from tmass import TMASS

SHARED = ROOT.parent / "shared" / "data"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- the towers ----

def caption_lengths():
    """Tokens of captions, with start and end. -> (list of int, where they come from)"""
    from clip_model import Tokenizer
    try:
        tokenizer = Tokenizer.from_file(SHARED / "clip" / "bpe_simple_vocab_16e6.txt.gz")
        path = SHARED / "msrvtt" / "MSRVTT_JSFUSION_test.csv"
        with open(path, newline="", encoding="utf-8") as file:
            captions = [row["sentence"] for row in csv.DictReader(file)]
        lengths = [len(tokenizer.encode(caption)) + 2 for caption in captions]
        return lengths, "of msrvtt's 1,000 test captions"
    except (OSError, ValueError):
        g = torch.Generator().manual_seed(0)
        lengths = torch.randn(1000, generator=g) * 4.0 + 11.7  # msrvtt's mean and spread
        lengths = lengths.clamp(5, 77).round().long().tolist()
        return lengths, "drawn from N(11.7, 4.0), at least 5"


def difference(pairs):
    """How far features are from others, relative to these: the largest of several. -> ()"""
    return max((a - b).norm() / b.norm() for a, b in pairs)


@torch.inference_mode()
def encode(images=16, texts=32):
    """ViT-B/32 with random weights, float32, one batch for all: our image tower against
    transformers' (sdpa) and open_clip's, and texts cut to the longest of their batch against
    padding to 77."""
    import open_clip
    import transformers

    from clip_model import CLIP
    torch.manual_seed(0)
    # its defaults are ViT-B/32
    text = dict(eos_token_id=49407)
    config = transformers.CLIPConfig(text_config=text, attn_implementation="sdpa")
    hf = transformers.CLIPModel(config)
    assert hf.config._attn_implementation == "sdpa"
    hf = hf.to(DEVICE).eval()
    ours = CLIP.from_state_dict(to_openai_names(hf.state_dict())).to(DEVICE).eval()
    other = open_clip.create_model("ViT-B-32-quickgelu", device=DEVICE).eval()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(images, 3, 224, 224, device=DEVICE)

    lengths, source = caption_lengths()
    print(f"device {DEVICE}, {torch.get_num_threads()} threads, {images} images, "
          f"{texts} texts a batch, lengths {source}: mean {statistics.mean(lengths):.1f}, "
          f"std {statistics.pstdev(lengths):.1f}, longest {max(lengths)}")
    padded = []
    for start in (0, texts):
        ids = random_ids(lengths[start:start + texts], 77)
        padded.append(ids.to(DEVICE))
    cut = [ids[:, :ids.argmax(-1).max() + 1].contiguous() for ids in padded]

    runs = {
        "ours": lambda: ours.encode_image(x),
        "transformers": lambda: hf.get_image_features(x),
        "open_clip": lambda: other.encode_image(x),
    }
    s = seconds(runs, repeat=15)
    f = ours.encode_image(x)
    gap = difference([(f, hf.get_image_features(x)), (f, other.encode_image(x))])
    print(f"image tower: {images / s['ours']:.1f} images/s; speed against transformers "
          f"{s['transformers'] / s['ours']:.2f}x, open_clip {s['open_clip'] / s['ours']:.2f}x; "
          f"features differ by {gap:.1e}")

    runs = {
        "cut": lambda: [ours.encode_text(ids) for ids in cut],
        "padded": lambda: [ours.encode_text(ids) for ids in padded],
    }
    s = seconds(runs)
    gap = difference(zip(runs["cut"](), runs["padded"]()))
    tokens = [ids.shape[1] for ids in cut]
    print(f"text tower: {len(cut) * texts / s['cut']:.0f} texts/s, cut to {tokens} tokens; speed "
          f"against padding to 77 {s['padded'] / s['cut']:.2f}x; features differ by {gap:.1e}")

    def half(tower, x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return tower(x).float()

    runs = {
        "images": lambda: ours.encode_image(x),
        "images, bf16": lambda: half(ours.encode_image, x),
        "texts": lambda: ours.encode_text(cut[0]),
        "texts, bf16": lambda: half(ours.encode_text, cut[0]),
    }
    s = seconds(runs)
    unit = {name: F.normalize(run(), dim=-1) for name, run in runs.items()}
    cosines = unit["texts"] @ unit["images"].T
    moved = (cosines - unit["texts, bf16"] @ unit["images, bf16"].T).abs()
    print(f"--amp bf16: images {s['images'] / s['images, bf16']:.1f}x, texts "
          f"{s['texts'] / s['texts, bf16']:.1f}x as fast; cos(t, f) moves by {moved.mean():.1e} on "
          f"average, at most {moved.max():.1e} (it spreads by {cosines.std():.1e})")


# ---- scoring ----

@torch.no_grad()
def scoring(D=512, T=12, M=20):
    """Exact all-pairs scoring, D=512, T=12, M=20: against the literal formula, the floor (three
    products and one exp on tiles in the cache), the closed form of best-of-M, and as it grows."""
    g = torch.Generator().manual_seed(0)
    model = scoring_model(D, T).to(DEVICE)
    xpool = scoring_model(D, T, radius="none").to(DEVICE)
    scaled = scoring_model(D, T, radius="scaled").to(DEVICE)
    print(f"device {DEVICE}, {torch.get_num_threads()} threads, D={D} T={T} M={M}")
    sizes = [250, 500, 2000]
    if DEVICE == "cuda":
        sizes.append(10_000)
    for n in sizes:
        t, f = random_features(n, D, T, g, DEVICE)
        s = seconds({"score": lambda: exact.score(model, t, f, M)}, repeat=3)["score"]
        print(f"{n:6d} x {n:<6d} {s:7.2f} s   {s / n / n * 1e6:.2f} us/pair")

    t, f = random_features(1000, D, T, g, DEVICE)
    P = 512 if DEVICE == "cpu" else 65536  # pairs of a tile
    r = torch.randn(P, D, device=DEVICE)
    e = torch.randn(D, M, device=DEVICE)
    product = torch.empty(P, M, device=DEVICE)
    grown = torch.empty_like(r)

    def floor():
        for _ in range(1_000_000 // P):
            torch.exp(r, out=grown)
            for _ in range(3):
                torch.mm(grown, e, out=product)

    runs = {
        "score": lambda: exact.score(model, t, f, M),
        "floor": floor,
        "point": lambda: exact.score(model, t, f, 0),
        "expected": lambda: exact.score(model, t, f, M, expected=True),
        "X-Pool": lambda: exact.score(xpool, t, f, M),
        "scaled": lambda: exact.score(scaled, t, f, M),
        "scaled, expected": lambda: exact.score(scaled, t, f, M, expected=True),
    }
    s = seconds(runs, repeat=5)
    literal = seconds({"literal": lambda: model.score(t, f, M)}, repeat=1)["literal"]
    gap = (exact.score(model, t, f, M) - model.score(t, f, M)).abs().max()
    print(f"  1000 x 1000   {s['score']:7.2f} s   {s['score']:.2f} us/pair; the literal formula "
          f"{literal:.1f} s: {literal / s['score']:.0f} times as long; floor {s['floor']:.2f} s: "
          f"we take {s['score'] / s['floor']:.1f} times that")
    print(f"  expected (no samples) {s['expected']:.2f} s, {s['expected'] / s['score']:.2f} of "
          f"sampling; scaled radius: sampled {s['scaled']:.2f} s, expected "
          f"{s['scaled, expected']:.2f} s; X-Pool (radius none) {s['X-Pool']:.2f} s; point text "
          f"{s['point']:.2f} s")
    print(f"  largest difference from the literal formula {gap:.1e}; extra peak memory "
          f"{peak_memory(runs['score']):.2f} GB")


# ---- reading videos ----

def repeat_video(path, target, times):
    """The packets of a file again and again, one after the other, without decoding them."""
    import av
    with av.open(target, "w") as out:
        with av.open(path) as source:
            stream = out.add_stream_from_template(source.streams.video[0])
        for k in range(times):
            with av.open(path) as source:
                length = source.duration / av.time_base
                for packet in source.demux(video=0):
                    if packet.dts is None:  # the end
                        continue
                    later = round(length * k / packet.time_base)
                    packet.pts += later
                    packet.dts += later
                    packet.stream = stream
                    out.mux(packet)


def pieces(minutes=20, T=12, window=10):
    """The pieces of a long 320x240 H.264 file against one sequential decode of it, one thread."""
    torch.set_num_threads(1)  # as a DataLoader's worker
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/long.mp4"
        seconds_written = 60 if minutes >= 1 else round(60 * minutes)
        g = torch.Generator().manual_seed(0)
        camera_video(f"{folder}/minute.mp4", seconds_written * 25, g)
        repeat_video(f"{folder}/minute.mp4", path, max(1, round(minutes)))

        def sequentially():
            with decode._open(path) as (file, stream):
                return sum(1 for packet in file.demux(stream) for _ in packet.decode())

        def read():
            return sum(1 for _ in decode.read_pieces(path, T, window))

        frames = sequentially()
        size = Path(path).stat().st_size
        s = seconds({"decode": sequentially, "pieces": read}, repeat=3)
        print(f"{frames} frames of 320x240 H.264, {size / 1e6:.0f} MB: {read()} pieces of "
              f"{window} s, T={T}, in {s['pieces']:.2f} s; one sequential decode "
              f"{s['decode']:.2f} s: {s['pieces'] / s['decode']:.2f} times that")


def opencv_reader(T):
    """OpenCV's way to the same frames: seek each. -> function of a path, or None without OpenCV"""
    try:
        import cv2
    except ImportError:
        print("OpenCV is not installed: not compared")
        return None
    cv2.setNumThreads(1)

    def read(path):
        video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        frames = []
        for i in decode.sample_indices(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), T):
            video.set(cv2.CAP_PROP_POS_FRAMES, i)
            picture = cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB)
            frames.append(torch.from_numpy(picture).permute(2, 0, 1))
        return torch.stack(frames)
    return read


def data_(videos=8, T=12):
    """Seconds per epoch from the videos and from the frame cache, and decoding against OpenCV's
    seek per frame. H.264 files of 15 s, 320x240, 25 fps."""
    torch.set_num_threads(1)  # as a DataLoader's worker
    with tempfile.TemporaryDirectory() as folder:
        g = torch.Generator().manual_seed(0)
        segments = [Segment(f"{folder}/{k}.mp4") for k in range(videos)]
        for segment in segments:
            camera_video(segment.path, 375, g)
        ann = data.Annotations(segments, ["-"] * videos, list(range(videos)))
        cache = FrameCache(f"{folder}/cache", T)
        plain = data.PairDataset(ann, T, data.train_transform(224))
        cached = data.PairDataset(ann, T, data.train_transform(224), cache=cache.folder)

        def epoch(dataset):
            return [dataset[0, i] for i in range(videos)]

        epoch(cached)  # fills the cache
        runs = {
            "decode": lambda: epoch(plain),
            "cache": lambda: epoch(cached),
            "decoding": lambda: [read_frames(segment, T) for segment in segments],
            "reading": lambda: [cache.read(segment) for segment in segments],
        }
        opencv = opencv_reader(T)
        if opencv:
            runs["opencv"] = lambda: [opencv(segment.path) for segment in segments]
        s = seconds(runs, repeat=5)
        size = sum(file.stat().st_size for file in Path(folder, "cache").iterdir()) / videos
        of_video = Path(segments[0].path).stat().st_size
        print(f"{videos} videos of {of_video / 1e3:.0f} kB, T={T}, one thread; cache "
              f"{size / 1e3:.0f} kB a video")
        print(f"an epoch (read, crop, resize): decode {s['decode']:.3f} s, cache "
              f"{s['cache']:.3f} s: the cache is {s['decode'] / s['cache']:.1f}x faster")
        print(f"frames alone: decode {s['decoding'] / videos * 1e3:.1f} ms, cache "
              f"{s['reading'] / videos * 1e3:.1f} ms a video: {s['decoding'] / s['reading']:.1f}x")
        if opencv:
            gap = 0
            for segment in segments:
                other = opencv(segment.path).int()
                apart = (read_frames(segment, T).int() - other).abs().max()
                gap = max(gap, apart.item())
            print(f"decoding takes {s['decoding'] / s['opencv']:.2f} of OpenCV's time "
                  f"({s['opencv'] / videos * 1e3:.1f} ms a video, seeking each frame); largest "
                  f"difference of a pixel {gap}")


def reading(videos=400, T=6, batch=4, times=3):
    """Batches a second that workers hand over: `shapes` videos, decoded or from the frame cache."""
    with tempfile.TemporaryDirectory() as folder:
        shapes.render_shapes(folder, train=videos, val=0, test=0)
        segments = data.load_split("shapes", folder, "train").segments
        batches = [list(range(k, k + batch)) for k in range(0, videos, batch)] * times
        transform = data.test_transform(32)
        datasets = {
            "decoded": data.VideoDataset(segments, T, transform),
            "cached": data.VideoDataset(segments, T, transform, f"{folder}/frames"),
        }
        for k in range(videos):
            datasets["cached"][k]  # fills the cache
        for what, dataset in datasets.items():
            for workers in (1, 2):
                with loading(dataset, batches, collate, workers) as loader:
                    for k, _ in enumerate(loader):
                        if k == workers:  # the first of each worker also waited for its start
                            start = time.perf_counter()
                took = time.perf_counter() - start
                print(f"{what}, {workers} workers: {(len(batches) - workers - 1) / took:.1f} "
                      f"batches/s of {batch} videos, T={T}", flush=True)


# ---- training ----

def memory(batch=32, chunk=0, amp="off", clip="ViT-B/32", T=12):
    """Peak memory of a training step, with weights, gradients and AdamW's state, and its seconds.
    One case per process. On a CPU, set MALLOC_MMAP_THRESHOLD_=65536 in the environment: then what
    is freed goes back to the system at once."""
    taken = 0.0

    def train():
        nonlocal taken
        torch.manual_seed(0)
        model = TMASS(random_clip(clip), T).to(DEVICE).train()
        model.chunk = chunk
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        size = model.clip.image_size
        for pairs in (2, batch):  # the first makes the optimizer's state
            pixels = torch.randint(0, 256, (pairs, T, 3, size, size), dtype=torch.uint8)
            pixels = pixels.to(DEVICE)
            ids = random_ids([16] * pairs, 16).to(DEVICE)
            start = time.perf_counter()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=amp == "bf16"):
                loss = model(ids, pixels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            synchronize(DEVICE)
            taken = time.perf_counter() - start

    peak = peak_memory(train)
    print(f"{clip}, T={T}, --batch {batch} --chunk {chunk} --amp {amp}: {peak:.1f} GB, "
          f"{taken:.0f} s a step on {DEVICE}")


class PlainTMASS(torch.nn.Module):
    """The training step as one would write it on transformers' CLIPModel, for comparison."""

    def __init__(self, hf, ours):
        super().__init__()
        D = ours.clip.embed_dim
        self.hf = hf
        for name in ("q", "k", "v", "out", "linear"):
            self.add_module(name, torch.nn.Linear(D, D))
        for name in ("ln1", "ln2", "ln3"):
            self.add_module(name, torch.nn.LayerNorm(D))
        self.radius = torch.nn.Linear(ours.frames, D)
        for name, layer in self.named_children():
            if name not in ("hf", "radius"):
                layer.load_state_dict(getattr(ours.pool, name).state_dict())
        self.radius.load_state_dict(ours.radius.linear.state_dict())
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))

    def forward(self, ids, mask, pixels):
        B, T = pixels.shape[:2]
        t = self.hf.get_text_features(ids, attention_mask=mask)
        pixels = (pixels.flatten(0, 1).float() / 255 - self.mean) / self.std
        f = self.hf.get_image_features(pixels).view(B, T, -1)
        f1 = self.ln1(f)
        q = self.q(self.ln1(t))
        a = torch.einsum("nd,vtd->nvt", q, self.k(f1)) / t.shape[1] ** 0.5
        x = torch.einsum("nvt,vtd->nvd", a.softmax(-1), self.v(f1))
        x = self.ln2(self.out(x))
        v = self.ln3(x + self.linear(x))
        own = v[range(B), range(B)]
        r = self.radius(F.cosine_similarity(t[:, None], f, dim=-1)).exp()
        t_s = t + r * torch.randn_like(t)
        t_sup = t + F.normalize(own - t, dim=-1) * r
        labels = torch.arange(B, device=t.device)
        loss = 0
        for weight, text in ((1.0, t_s), (0.8, t_sup)):
            logits = self.hf.logit_scale.exp() * F.cosine_similarity(text[:, None], v, dim=-1)
            both = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
            loss = loss + weight * both / 2
        return loss


def train_(batch=16, T=12, repeat=2):
    """A whole training step, ViT-B/32 with random weights: ours against the same step written
    plainly on transformers' CLIPModel (sdpa), in float32; ours in bf16; and with
    --chunk 64. One video of T frames and one caption of 12 tokens per pair."""
    import transformers

    from clip_model import CLIP
    torch.manual_seed(0)
    text = dict(eos_token_id=49407)
    config = transformers.CLIPConfig(text_config=text, attn_implementation="sdpa")
    hf = transformers.CLIPModel(config)
    clip = CLIP.from_state_dict(to_openai_names(hf.state_dict()))
    ours = TMASS(clip, T, dropout=0.0).to(DEVICE).train()
    plain = PlainTMASS(hf, ours).to(DEVICE).train()
    pixels = torch.randint(0, 256, (batch, T, 3, 224, 224), dtype=torch.uint8, device=DEVICE)
    ids = random_ids([12] * batch, 12).to(DEVICE)
    # transformers' processor pads captions to 77 with the end token; it attends to no padding
    padded = F.pad(ids, (0, 77 - 12), value=49407)
    mask = (torch.arange(77, device=DEVICE) < 12).long().expand(batch, -1)

    def our_loss():
        return ours(ids, pixels)["loss"]

    def plain_loss():
        return plain(padded, mask, pixels)

    def step(model, loss, amp=False):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.2, fused=True)

        def run():
            with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
                out = loss()
            optimizer.zero_grad()
            out.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return run

    losses = []
    for loss in (our_loss, plain_loss):
        torch.manual_seed(1)
        losses.append(loss().item())
    print(f"device {DEVICE}, {torch.get_num_threads()} threads, batch {batch}, T={T}; losses "
          f"{losses[0]:.4f}, plain {losses[1]:.4f}")
    runs = {
        "ours, fp32": step(ours, our_loss),
        "plain on transformers, fp32": step(plain, plain_loss),
        "plain, captions cut as ours": step(plain, lambda: plain(ids, mask[:, :12], pixels)),
        "ours, bf16": step(ours, our_loss, amp=True),
    }
    s = seconds(runs, repeat)  # in turns, for the ratios
    ours.chunk = 64
    for name in ("ours, fp32", "ours, bf16"):
        s.update(seconds({f"{name}, --chunk 64": runs[name]}, repeat))
    for name, time_of_step in s.items():
        print(f"{name:36s} {batch / time_of_step:7.2f} pairs/s")
    fp32 = s["ours, fp32"]
    print(f"speed against plain {s['plain on transformers, fp32'] / fp32:.2f}x (its captions cut "
          f"too: {s['plain, captions cut as ours'] / fp32:.2f}x); bf16 against fp32 "
          f"{fp32 / s['ours, bf16']:.2f}x")


def main(argv=None):
    benches = (encode, scoring, index, shortlist, moment, pieces, data_, reading, train_, memory,
               gpu)
    benches = {bench.__name__.rstrip("_"): bench for bench in benches}
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    for name, bench in benches.items():
        about = " ".join(bench.__doc__.split()).replace("%", "%%")
        command = commands.add_parser(name, help=about, description=about)
        if name == "index":
            command.add_argument("--pieces", type=int, default=1_000_000,
                                 help="ten to a file (default: %(default)s)")
        if name in ("shortlist", "moment"):
            command.add_argument("--ckpt", default="model.pt",
                                 help="a trained model (default: %(default)s)")
        if name == "memory":
            command.add_argument("--batch", type=int, default=32, help="(default: %(default)s)")
            command.add_argument("--chunk", type=int, default=0,
                                 help="frames at a time; 0: all at once (default: %(default)s)")
            command.add_argument("--amp", choices=("off", "bf16"), default="off",
                                 help="(default: %(default)s)")
            command.add_argument("--clip", choices=VITS, default="ViT-B/32",
                                 help="(default: %(default)s)")
        if name == "gpu":
            command.add_argument("--device", default="cuda", help="(default: %(default)s)")
            command.add_argument("--small", action="store_true",
                                 help="small sizes, to see on any machine that it runs")
    args = vars(parser.parse_args(argv))
    return benches[args.pop("bench")](**args)


if __name__ == "__main__":
    sys.exit(main())
