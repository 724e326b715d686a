"""`python study/bench.py gpu`: all that is to be measured on a GPU, as one table for study/."""
import copy
import itertools
import os
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from measure import (
    VITS,
    camera_video,
    median_seconds,
    peak_memory,
    random_clip,
    random_features,
    random_ids,
    scoring_model,
    synchronize,
)

import data
import search as se
from lib import exact
from lib import index as store
from lib.processes import loading
from lib.video import FrameCache, Segment
from tmass import TMASS

FULL = dict(
    clip={},                    # the sizes of ViT-B/32 and B/16 as they are
    frames=12,                  # T
    trials=20,                  # M
    agree=4,                    # pairs of the comparison with the CPU
    galleries=(1000, 10_000),   # texts and videos scored with each other
    images=384,                 # at once
    texts=256,
    batch=32,                   # pairs of a training step
    chunk=64,                   # frames at a time
    videos=64,                  # that the loader reads from the cache
    loaded=40,                  # batches of them
    workers=8,
    pieces=1_000_000,           # searched
    queries=10,
    repeat=5,                   # calls of which the median counts
)
SMALL = dict(
    clip=dict(embed_dim=64, image_size=64, vision_width=64, vision_layers=2, vocab_size=514,
              text_width=64, text_layers=2),
    frames=3,
    trials=5,
    agree=3,
    galleries=(20, 50),
    images=8,
    texts=8,
    batch=4,
    chunk=4,
    videos=4,
    loaded=2,
    workers=2,
    pieces=5000,
    queries=2,
    repeat=1,
)
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 16  # of a caption, with start and end
SHARD = 1000  # pieces


def gpu(device="cuda", small=False):
    """All that a GPU is needed for, in one table, in less than ten minutes: device against CPU,
    scoring, towers, training, loader, search. Random weights."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("error: no GPU here; --device cpu --small shows that all of it runs", file=sys.stderr)
        return 2
    sizes = SMALL if small else FULL
    rows = []
    rates = []  # pairs/s of every kind of training, for the loader to be compared with
    began = time.perf_counter()
    parts = {
        "agreement": lambda: agreement(device, sizes),
        "scoring": lambda: scoring(device, sizes),
        "towers": lambda: towers(device, sizes),
        "training": lambda: training(device, sizes, rates),
        "loader": lambda: loader(device, sizes, rates),
        "search": lambda: searching(device, sizes),
    }
    for name, part in parts.items():
        start = time.perf_counter()
        torch.manual_seed(0)
        rows += part()
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(heading(device, small))
    print()
    print("| what | measured |")
    print("|---|---|")
    for what, measured in rows:
        print(f"| {what} | {measured} |")
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    return 0


def heading(device, small):
    """Where it ran, in a line or two."""
    versions = f"torch {torch.__version__}, {os.cpu_count()} CPU cores"
    if torch.device(device).type == "cuda":
        gigabytes = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
        text = f"{torch.cuda.get_device_name(device)}, {gigabytes:.0f} GB, {versions}, "
        text += f"CUDA {torch.version.cuda}"
    else:
        text = f"Not run on a GPU: {device}, {versions}"
    if small:
        text += "; small sizes, which show that it runs and not how fast"
    return text


def autocast(device, precision):
    """As --amp: the towers multiply in that precision."""
    dtype = PRECISIONS[precision]
    kind = torch.device(device).type
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32)


# ---- device against CPU ----

def make_model(sizes, name="ViT-B/32", device="cpu"):
    """T-MASS on a CLIP of the named size, without dropout, which devices draw differently."""
    torch.manual_seed(0)
    clip = random_clip(name, **sizes["clip"])
    return TMASS(clip, sizes["frames"], dropout=0.0).to(device)


def make_batch(model, pairs, device="cpu"):
    """-> ids (pairs,L), pixels (pairs,T,3,P,P)"""
    size = model.clip.image_size
    pixels = torch.randint(0, 256, (pairs, model.frames, 3, size, size), dtype=torch.uint8)
    ids = random_ids([TOKENS] * pairs, TOKENS, model.clip.config["vocab_size"])
    return ids.to(device), pixels.to(device)


def losses_and_gradients(model, ids, pixels, eps):
    """-> losses (4,), {name of a parameter: gradient}, on the CPU. eps (pairs,D): the noise."""
    model.zero_grad()
    model.sample_noise = lambda *shape, **where: eps.to(ids.device)
    losses = model(ids, pixels)
    losses["loss"].backward()
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradients[name] = p.grad.cpu()
    return torch.stack(list(losses.values())).detach().cpu(), gradients


def judged(gap):
    """A difference, and whether it is one of rounding."""
    return f"{gap:.1e} ({'within' if gap <= 1e-5 else 'above'} 1e-5)"


def agreement(device, sizes):
    """Scores, losses and gradients in float32: how far the device is from the CPU."""
    rows = []
    g = torch.Generator().manual_seed(0)
    model = scoring_model(512, sizes["frames"])
    there = copy.deepcopy(model).to(device)
    t, f = random_features(sizes["galleries"][0] // 4, 512, sizes["frames"], g)
    ways = {"sampled": {}, "expected": dict(expected=True), "point text": dict(trials=0)}
    for name, how in ways.items():
        how = dict(trials=sizes["trials"]) | how
        ours = exact.score(model, t, f, **how)
        theirs = exact.score(there, t.to(device), f.to(device), **how).cpu()
        gap = (ours - theirs).abs().max().item()
        rows.append((f"device against CPU: scores, {name}", judged(gap)))

    model = make_model(sizes).train()
    there = copy.deepcopy(model).to(device)
    ids, pixels = make_batch(model, sizes["agree"])
    eps = torch.randn(sizes["agree"], model.clip.embed_dim, generator=g)
    losses, gradients = losses_and_gradients(model, ids, pixels, eps)
    # cuDNN multiplies convolutions in TF32 unless told otherwise, as the patches' is.
    for tf32 in (False, True):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = tf32
        others = losses_and_gradients(there, ids.to(device), pixels.to(device), eps)
        torch.backends.cudnn.allow_tf32 = before
        gap = ((losses - others[0]) / losses).abs().max().item()
        apart = [(x - others[1][name]).norm() / x.norm().clamp_min(1e-12)
                 for name, x in gradients.items()]
        how = "TF32 convolution, torch's default" if tf32 else "all in float32"
        rows.append((f"device against CPU: losses, {how}", judged(gap)))
        rows.append((f"device against CPU: gradients, {how}", judged(max(apart).item())))
    return rows


# ---- scoring ----

@torch.no_grad()
def scoring(device, sizes):
    """All pairs of a gallery, sampled and in closed form."""
    rows = []
    g = torch.Generator().manual_seed(0)
    model = scoring_model(512, sizes["frames"]).to(device)
    for n in sizes["galleries"]:
        t, f = random_features(n, 512, sizes["frames"], g, device)
        for name, expected in (("sampled", False), ("expected", True)):
            def run():
                exact.score(model, t, f, sizes["trials"], expected=expected)
            took = median_seconds(run, device, sizes["repeat"])
            memory = peak_memory(run, device)
            measured = f"{took:.3g} s, {took / n / n * 1e6:.3g} us a pair, {memory:.2f} GB"
            rows.append((f"scoring {n} x {n}, {name}", measured))
    return rows


# ---- towers ----

@torch.no_grad()
def towers(device, sizes):
    """Images and texts a second."""
    rows = []
    for name, precision in itertools.product(VITS, PRECISIONS):
        clip = random_clip(name, **sizes["clip"]).to(device).eval()
        size = clip.image_size
        images = torch.randint(0, 256, (sizes["images"], 3, size, size), dtype=torch.uint8)
        images = images.to(device)
        lengths = [TOKENS] * sizes["texts"]
        ids = random_ids(lengths, TOKENS, clip.config["vocab_size"]).to(device)
        with autocast(device, precision):
            image_time = median_seconds(
                lambda: clip.encode_image(images), device, sizes["repeat"]
            )
            text_time = median_seconds(lambda: clip.encode_text(ids), device, sizes["repeat"])
        measured = f"{len(images) / image_time:.0f} images/s, {len(ids) / text_time:.0f} texts/s"
        rows.append((f"towers, {name}, {precision}", measured))
    return rows


# ---- training ----

def training_step(model, optimizer, ids, pixels, precision):
    """A step as train.py takes it. -> function"""
    device = ids.device.type
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

    def step():
        optimizer.zero_grad()
        with autocast(device, precision):
            loss = model(ids, pixels)["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return step


def training(device, sizes, rates):
    """Pairs a second, which `rates` gets too, and peak memory with weights and optimizer."""
    rows = []
    for name, precision, chunk in itertools.product(VITS, PRECISIONS, (0, sizes["chunk"])):
        try:
            rate, memory = measure_training(name, precision, chunk, device, sizes)
            rates.append(rate)
            measured = f"{rate:.3g} pairs/s, {memory:.2f} GB"
        except torch.OutOfMemoryError:
            measured = "out of memory"
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        how = precision + (f", --chunk {chunk}" if chunk else "")
        what = f"training, {name}, batch {sizes['batch']}, T={sizes['frames']}, {how}"
        rows.append((what, measured))
    return rows


def measure_training(name, precision, chunk, device, sizes):
    """-> pairs a second, peak memory in GB"""
    model = make_model(sizes, name, device).train()
    model.chunk = chunk
    ids, pixels = make_batch(model, sizes["batch"], device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.2, fused=True)
    step = training_step(model, optimizer, ids, pixels, precision)
    step()  # makes the optimizer's state
    kept = [ids, pixels]
    for p in model.parameters():
        kept += [p, *optimizer.state.get(p, {}).values()]
        if p.grad is not None:
            kept.append(p.grad)
    memory = sum(x.nbytes for x in kept) / 2 ** 30 + peak_memory(step, device)
    took = median_seconds(step, device, sizes["repeat"])
    return sizes["batch"] / took, memory


# ---- the loader ----

def stack_pixels(items):
    """Items of PairDataset -> [pixels (B,T,3,P,P)]."""
    return [torch.stack([pixels for pixels, _ in items])]


def loader(device, sizes, rates):
    """Do the workers keep up? Cached frames, as training crops them, on their way to the device."""
    with tempfile.TemporaryDirectory() as folder:
        g = torch.Generator().manual_seed(0)
        path = os.path.join(folder, "0.mp4")
        camera_video(path, 375, g)
        segments = [Segment(path)]
        for k in range(1, sizes["videos"]):
            segments.append(Segment(os.path.join(folder, f"{k}.mp4")))
            os.link(path, segments[k].path)
        T = sizes["frames"]
        cache = os.path.join(folder, "cache")
        for segment in segments:
            FrameCache(cache, T).read(segment)
        ann = data.Annotations(segments, ["-"] * len(segments), list(range(len(segments))))
        dataset = data.PairDataset(ann, T, data.train_transform(224), cache=cache)
        pairs = itertools.cycle(range(len(segments)))
        batch = sizes["batch"]
        batches = []
        for k in range(sizes["workers"] + sizes["loaded"]):
            batches.append([(0, next(pairs)) for _ in range(batch)])
        pin = torch.device(device).type == "cuda"
        took = []
        start = time.perf_counter()
        with loading(dataset, batches, stack_pixels, sizes["workers"], pin) as loaded:
            for (pixels,) in loaded:
                pixels.to(device, non_blocking=True)
                synchronize(device)
                took.append(time.perf_counter() - start)
    # The first batch of each worker also waits for its start.
    spent = took[-1] - took[sizes["workers"] - 1]
    rate = sizes["loaded"] * batch / spent
    what = f"loader, {sizes['workers']} workers, T={T}, cached"
    slower = sum(rate >= training_rate for training_rate in rates)
    keeps_up = f"keeps up with {slower} of the {len(rates)} kinds of training above"
    return [(what, f"{rate:.3g} pairs/s, {keeps_up}")]


# ---- search ----

@torch.no_grad()
def searching(device, sizes):
    """A query on a large gallery. Only one shard's frames are made, and stand for all of them."""
    D = 512
    T = sizes["frames"]
    P = sizes["pieces"]
    model = scoring_model(D, T).to(device)
    g = torch.Generator().manual_seed(0)
    _, f = random_features(SHARD, D, T, g)
    first = store.file_shard(f, torch.zeros(SHARD, T), torch.zeros(SHARD, 2), None)
    shards = []
    for _ in range(P // SHARD):
        mean = F.normalize(torch.randn(SHARD, D, generator=g), dim=-1)
        shards.append(first._replace(mean=mean.half()))
    starts = torch.arange(0, P + 1, SHARD)
    file = torch.arange(P) // 10
    names = [f"{k:07d}" for k in range(P // 10)]
    start = time.perf_counter()
    shards = se.move_means(shards, torch.device(device))
    synchronize(device)
    moved = time.perf_counter() - start
    gallery = se.Index(shards, starts, file, names, names)
    texts = itertools.cycle(torch.randn(sizes["queries"], 1, D, generator=g).to(device))
    ways = {
        "a query": lambda: se.search(model, next(texts), gallery, expected=True),
        "a query, sampled": lambda: se.search(model, next(texts), gallery),
        "point scores alone": lambda: se.point_scores(next(texts), gallery),
    }
    what = f"search of {P} pieces"
    rows = [(f"{what}: pooled frames to the device, once", f"{moved * 1e3:.3g} ms")]
    for name, run in ways.items():
        took = median_seconds(run, device, sizes["queries"])
        rows.append((f"{what}: {name}", f"{took * 1e3:.3g} ms"))
    memory = peak_memory(ways["a query"], device)
    rows.append((f"{what}: extra peak memory of a query", f"{memory:.2f} GB"))
    return rows
