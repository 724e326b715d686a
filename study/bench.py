"""Speed and memory, as the rows of a table. Models have random weights, except for `moment`.

    scoring   all pairs, sampled and in closed form, against the literal formula and the floor:
              three products and one exp, without which no score can be computed
    towers    images and texts a second
    train     a training step: pairs a second and peak memory, with and without --chunk
    reading   batches that a DataLoader's workers hand over; decoding against OpenCV
    search    an index of --pieces: made, opened, asked (a million take 13.4 GB of disk)
    moment    how often the time that search gives lies in a shot that the caption describes
    gpu       the device against the CPU, scoring, towers, train and reading: under ten minutes

The peak memory of a CPU is known on Linux alone, and with MALLOC_MMAP_THRESHOLD_=65536 in the
environment: then what is freed goes back to the system at once.
"""
import argparse
import contextlib
import copy
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import search as searching  # noqa: E402
from clip_model import CLIP  # noqa: E402
from eval import autocast, encode_texts  # noqa: E402
from lib import exact, shapes  # noqa: E402
from lib.common import DataError, program  # noqa: E402
from lib.processes import DEVICE, cores, loading  # noqa: E402
from lib.video import Piece, Segment, read_frames, sample_indices  # noqa: E402
from lib.weights import load_checkpoint  # noqa: E402
from tmass import TMASS  # noqa: E402

D = 512
M = 20
TOKENS = 16  # of a caption, with start and end
TINY = dict(image_size=32, patch_size=32, vision_width=64, vision_layers=1, context_length=TOKENS,
            vocab_size=514, text_width=64, text_layers=1)
VIT = dict(image_size=224, vision_width=768, vision_layers=12, context_length=77,
           vocab_size=49408, text_width=512, text_layers=12)
CLIPS = {
    "ViT-B/32": VIT | dict(patch_size=32),
    "ViT-B/16": VIT | dict(patch_size=16),
    "tiny": TINY,
}
FULL = dict(
    frames=12,   # T
    images=384,
    videos=64,   # that the loader reads
    batches=20,  # of them
    repeat=3,    # calls, of which the fastest counts
)
SMALL = dict(
    clip=["tiny"],
    galleries=[20],
    frames=3,
    images=8,
    videos=4,
    batches=4,
    repeat=1,
    batch=4,
    chunk=4,
    pieces=5000,
)


# ---- clocks, memory, models ----

def say(what, measured):
    print(f"| {what} | {measured} |", file=sys.__stdout__, flush=True)


def seconds(args, **runs):
    """Least seconds of each call: a busy machine only adds. In turns, so that it adds to all."""
    times = {name: [] for name in runs}
    for _ in range(args.repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if args.cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: min(taken[1:]) for name, taken in times.items()}


def peak_memory(args, run):
    """How far a call lifts the peak of memory above what is in use before it, in GB."""
    if args.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 30
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        run()
        return torch.nan
    peak.write_text("5")  # it starts anew
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 2 ** 20


def resident(name):
    """A size in kB from Linux's account of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0])


def make_model(args, clip="tiny"):
    """T-MASS on the CPU. Its head is moved off its start, so that no part of it does nothing."""
    torch.manual_seed(0)
    model = TMASS(CLIP(embed_dim=D, **CLIPS[clip]), args.frames, dropout=0).eval()
    for head in (model.pool, model.radius):
        for p in head.parameters():
            p.data += 0.05 * torch.randn_like(p) / max(p.shape) ** 0.5
    return model


def random_features(args, n):
    """Embeddings of n texts and videos, whose frames are alike. -> t (n,D), f (n,T,D)"""
    t = torch.randn(n, D)
    f = torch.randn(n, 1, D) + 0.7 * torch.randn(n, args.frames, D)
    return t.to(args.device), f.to(args.device)


def random_batch(clip, pairs, frames):
    """-> ids (pairs,L), pixels uint8 (pairs,T,3,P,P), on the device of clip"""
    last = clip.config["vocab_size"] - 1  # the end of a text
    ids = torch.randint(1, last, (pairs, TOKENS))
    ids[:, -1] = last
    size = clip.image_size
    pixels = torch.randint(256, (pairs, frames, 3, size, size), dtype=torch.uint8)
    device = clip.logit_scale.device
    return ids.to(device), pixels.to(device)


# ---- the benches ----

@torch.no_grad()
def scoring(args):
    model = make_model(args).to(args.device)
    tile = 65536 if args.cuda else 512  # pairs that fit into the cache
    r = torch.randn(tile, D, device=args.device)
    grown = torch.empty_like(r)
    eps = torch.randn(D, M, device=args.device)
    product = torch.empty(tile, M, device=args.device)
    for n in args.galleries:
        t, f = random_features(args, n)

        def floor():
            for _ in range(n * n // tile):
                torch.exp(r, out=grown)
                for _ in range(3):
                    torch.mm(grown, eps, out=product)

        def sampled():
            return exact.score(model, t, f, M)

        def closed_form():
            exact.score(model, t, f, M, expected=True)

        s = seconds(args, sampled=sampled, closed_form=closed_form, floor=floor)
        us = ", ".join(f"{name} {1e6 * taken / n / n:.3g}" for name, taken in s.items())
        say(f"scoring {n} x {n}, T={args.frames}, D={D}, M={M}",
            f"us a pair: {us}; {peak_memory(args, sampled):.2f} GB")
        if n == args.galleries[0]:
            start = time.perf_counter()
            literal = model.score(t, f, M).cpu()
            taken = time.perf_counter() - start
            gap = (literal - sampled().cpu()).abs().max()
            say(f"the literal formula, {n} x {n}",
                f"{taken / s['sampled']:.0f} times as long; largest difference {gap:.1e}")


@torch.no_grad()
def towers(args):
    for name, amp in itertools.product(args.clip, args.amp):
        clip = CLIP(embed_dim=D, **CLIPS[name]).to(args.device).eval()
        ids, pixels = random_batch(clip, args.images, 1)
        with autocast(args.device, amp):
            s = seconds(args, images=lambda: clip.encode_image(pixels[:, 0]),
                        texts=lambda: clip.encode_text(ids))
        say(f"towers, {name}, --amp {amp}",
            f"{args.images / s['images']:.0f} images/s, {args.images / s['texts']:.0f} texts/s")


def train(args):
    """-> pairs a second of each kind of training"""
    rates = []
    for name, amp, chunk in itertools.product(args.clip, args.amp, (0, args.chunk)):
        def several_steps():
            model = make_model(args, name).to(args.device).train()
            model.chunk = chunk
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            scaler = torch.amp.GradScaler(args.device.type, enabled=amp == "fp16")
            ids, pixels = random_batch(model.clip, args.batch, args.frames)

            def step():
                with autocast(args.device, amp):
                    loss = model(ids, pixels)["loss"]
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

            rates.append(args.batch / seconds(args, step=step)["step"])

        what = f"a training step, {name}, --batch {args.batch} --chunk {chunk} --amp {amp}"
        try:
            memory = peak_memory(args, several_steps)
            say(what, f"{rates[-1]:.3g} pairs/s, {memory:.2f} GB with weights and optimizer")
        except torch.OutOfMemoryError:
            say(what, "out of memory")
    return rates


def opencv_frames(path, T):
    """OpenCV's way to the same frames: seek each. -> uint8 (T,3,H,W)"""
    import cv2
    cv2.setNumThreads(1)
    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for i in sample_indices(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), T):
        video.set(cv2.CAP_PROP_POS_FRAMES, i)
        picture = cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB)
        frames.append(torch.from_numpy(picture).permute(2, 0, 1))
    return torch.stack(frames)


def reading(args):
    """-> pairs a second that workers hand over from the frame cache"""
    T = args.frames
    with tempfile.TemporaryDirectory() as folder:
        segments = [Segment(f"{folder}/{k}.mp4") for k in range(args.videos)]
        path = segments[0].path
        scene = F.interpolate(torch.rand(1, 3, 60, 80) * 255, (480, 640), mode="bicubic")[0]
        frames = []
        for k in range(375):  # a texture that drifts, with grain
            x = scene[:, k // 2:k // 2 + 240, k // 3:k // 3 + 320] + 4 * torch.randn(3, 240, 320)
            frames.append(x.clamp(0, 255).byte())
        shapes.write_video(Path(path), torch.stack(frames), 25)
        for segment in segments[1:]:
            os.link(path, segment.path)
        try:
            s = seconds(args, ours=lambda: read_frames(path, T),
                        opencv=lambda: opencv_frames(path, T))
            say(f"decoding {T} of 375 frames, 320x240 H.264",
                f"{1e3 * s['ours']:.1f} ms, {s['ours'] / s['opencv']:.2f} of OpenCV's time")
        except ImportError:
            say("decoding against OpenCV", "not compared: pip install opencv-python-headless")

        workers = cores()
        # The first batch of each worker also waits for its start, and is not counted.
        rows = torch.arange((workers + args.batches) * args.batch) % args.videos
        batches = rows.view(-1, args.batch).tolist()
        for cache in (None, f"{folder}/cache"):
            dataset = data.VideoDataset(segments, T, data.train_transform(224), cache)
            if cache:
                for v in range(args.videos):
                    dataset[v]  # fills it
            took = []
            with loading(dataset, batches, default_collate, workers, args.cuda) as loader:
                for pixels in loader:
                    pixels.to(args.device)
                    took.append(time.perf_counter())
            rate = args.batches / (took[-1] - took[workers - 1])
            say(f"DataLoader, {workers} workers, {'cached' if cache else 'decoded'}, T={T}",
                f"{rate:.3g} batches/s of {args.batch} pairs")
    return rate * args.batch


@torch.no_grad()
def search(args):
    """By search.py's own code on empty files: only decoding and the image tower are left out."""
    a_file = 10  # pieces
    model = make_model(args).to(args.device)
    noise = 0.7 * torch.randn(256, args.frames, D)
    model.encode_video = lambda x: torch.randn(len(x), 1, D) + noise[:len(x)]
    data.transform_for = lambda clip: lambda x: x
    times = [k / 2 for k in range(args.frames)]
    pieces = [Piece(10.0 * k, 10.0 * k + 10, times, torch.zeros(1)) for k in range(a_file)]
    searching.read_pieces = lambda path, frames, window: iter(pieces)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(args.pieces // a_file):
            Path(folder, f"video {k:06d}.mp4").touch()

        def build():
            return searching.build_index(model, [folder], batch=256)

        start = time.perf_counter()
        memory = peak_memory(args, build)
        took = time.perf_counter() - start
        shards = list(Path(folder, searching.INDEX).iterdir())
        size = sum(shard.stat().st_size for shard in shards) / 1e9
        gallery = build()
        t = torch.randn(1, D, device=args.device)
        s = seconds(args, opened=build, asked=lambda: searching.search(model, t, gallery))
        say(f"search of {len(gallery.file)} pieces, T={args.frames}, D={D}",
            f"made in {took:.0f} s with {memory:.2f} GB, {size:.2f} GB in {len(shards)} shards, "
            f"opened in {s['opened']:.1f} s, asked in {1e3 * s['asked']:.0f} ms")


def moment(args):
    """shapes' test captions, each with its own video."""
    model, tokenizer, config = load_checkpoint(args.ckpt)
    ann = data.load_split("shapes", config.get("root"), "test")
    paths = [segment.path for segment in ann.segments]
    settings, _ = shapes.shapes_of(Path(paths[0]).parent.parent)
    del settings["version"]
    # The videos are drawn again, but not written, to know what is seen in each of their frames.
    drawn = []
    shapes.draw_shots = lambda facts, *_: drawn.append(facts)
    shapes.write_video = lambda *_: None
    right = []
    chance = []
    with tempfile.TemporaryDirectory() as folder:
        gallery = searching.build_index(model, paths, index_dir=folder)
        videos = shapes.ShapesVideos(folder, **settings)
        for path in paths:
            captions, _, says = videos[int(Path(path).stem)]
            t = encode_texts(model, tokenizer, captions)
            found = searching.search(model, t, gallery, top=len(paths))
            for said, hits in zip(torch.tensor(says), found):
                fits = (drawn[-1] == said) | (said < 0)
                described = fits.all(1)  # frames of shots that the caption fits
                [at] = [hit.at for hit in hits if gallery.paths[hit.file] == path]
                right.append(described[round(at * shapes.RATE)].item())
                chance.append(described.double().mean().item())
    say(f"the moment lies in a described shot, {len(right)} captions of {len(paths)} videos",
        f"{100 * statistics.mean(right):.1f} % (chance {100 * statistics.mean(chance):.1f} %)")


def agreement(args):
    """How far the device is from the CPU, relative to the length of what is compared."""
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions, as of the patches
    model = make_model(args, args.clip[0])
    ids, pixels = random_batch(model.clip, 4, args.frames)
    t, f = random_features(args, args.galleries[0] // 4)
    eps = torch.randn(4, D)
    found = []
    for device in (torch.device("cpu"), args.device):
        there = copy.deepcopy(model).to(device)
        there.sample_noise = lambda shape, device: eps.to(device)
        loss = there(ids.to(device), pixels.to(device))["loss"]
        loss.backward()
        gradients = [p.grad.flatten() for p in there.parameters() if p.grad is not None]
        del there.sample_noise
        near = t.to(device), f.to(device)
        found.append({
            "loss": loss.detach(),
            "gradients": torch.cat(gradients),
            "scores, sampled": exact.score(there, *near),
            "scores, closed form": exact.score(there, *near, expected=True),
        })
    for name, x in found[0].items():
        gap = (found[1][name].cpu() - x).norm() / x.norm()
        say(f"device against CPU: {name}", f"{gap:.1e}")


def gpu(args):
    agreement(args)
    scoring(args)
    towers(args)
    rates = train(args)
    rate = reading(args)
    slower = sum(rate >= other for other in rates)
    say("the loader, cached", f"keeps up with {slower} of {len(rates)} kinds of training above")


def main(argv=None):
    benches = (scoring, towers, train, reading, search, moment, gpu)
    benches = {bench.__name__: bench for bench in benches}
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bench", choices=benches)
    p.add_argument("--device", type=torch.device, default=DEVICE)
    p.add_argument("--galleries", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    p.add_argument("--clip", nargs="+", default=["ViT-B/32", "ViT-B/16"])
    p.add_argument("--amp", nargs="+", default=["off", "bf16"])
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--chunk", type=int, default=64, help="frames")
    p.add_argument("--pieces", type=int, default=1_000_000)
    p.add_argument("--ckpt", default="model.pt", help="trained on shapes")
    p.add_argument("--small", action="store_true", help="only to see that it runs")
    p.set_defaults(**FULL)
    args = p.parse_args(argv)
    args.cuda = args.device.type == "cuda"
    if args.small:
        vars(args).update(SMALL)
    elif args.bench == "gpu" and not args.cuda:
        raise DataError("no GPU here: bench.py gpu --small shows that it runs")
    name = args.device
    if args.cuda:
        name = torch.cuda.get_device_name(args.device)
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads{', SMALL SIZES' * args.small}\n")
    say("what", "measured")
    say("---", "---")
    with contextlib.redirect_stdout(sys.stderr):  # what build_index tells is no row
        benches[args.bench](args)
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
