"""What the measurements share: clocks, peak memory, random models, texts and videos."""
import contextlib
import ctypes
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # tests/videos.py writes video files

from videos import write_video  # noqa: E402

from clip_model import CLIP  # noqa: E402
from tmass import TMASS  # noqa: E402

VITS = {  # the sizes of OpenAI's models
    "ViT-B/32": dict(patch_size=32),
    "ViT-B/16": dict(patch_size=16),
}
COMMON = dict(embed_dim=512, image_size=224, vision_width=768, vision_layers=12,
              context_length=77, vocab_size=49408, text_width=512, text_layers=12)


# ---- clocks and memory ----

def synchronize(device):
    """Wait until a GPU has done what it was given: without this only its launch would be timed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(runs, repeat=7):
    """{name: function} -> {name: least seconds}, run in turns after a warm-up.

    The least, as a busy machine only adds; in turns, so that it adds to all alike.
    """
    times = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: min(t[1:]) for name, t in times.items()}


def median_seconds(run, device, repeat=5, warmup=1):
    """Median seconds of a call, after some that are not counted. On a GPU by its own clock."""
    for _ in range(warmup):
        run()
    synchronize(device)
    times = []
    for _ in range(repeat):
        if torch.device(device).type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            synchronize(device)
            times.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def status(name):
    """A size in kB from Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])


def peak_memory(run, device="cuda" if torch.cuda.is_available() else "cpu"):
    """How far a call lifts the peak of memory above what is in use before it, in GB.

    Of the GPU, or of this process; NaN where the system doesn't tell.
    """
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 30
    before = None
    with contextlib.suppress(OSError, AttributeError):  # no Linux, or a container that forbids it
        ctypes.CDLL(None).malloc_trim(0)                # what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")   # VmHWM starts anew
        before = status("VmRSS")
    run()
    if before is None:
        return float("nan")
    return (status("VmHWM") - before) / 2 ** 20


# ---- models, texts, videos ----

def random_clip(name="ViT-B/32", **sizes):
    """CLIP of the named size with random weights."""
    return CLIP(**{**COMMON, **VITS[name], **sizes})


def scoring_model(D, T, **method):
    """A T-MASS whose head is moved off its start. CLIP, which has no part in scoring, is tiny."""
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=32, vision_width=64, vision_layers=1,
                 context_length=8, vocab_size=514, text_width=64, text_layers=1)
    model = TMASS(CLIP(embed_dim=D, **sizes), frames=T, **method).eval()
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += 0.05 * torch.randn_like(p) / max(p.shape, default=1) ** 0.5
    return model


def random_features(n, D, T, generator, device="cpu"):
    """Embeddings of n texts and videos, whose frames are alike. -> t (n,D), f (n,T,D)"""
    t = torch.randn(n, D, generator=generator)
    scene = torch.randn(n, 1, D, generator=generator)
    f = scene + 0.7 * torch.randn(n, T, D, generator=generator)
    return t.to(device), f.to(device)


def random_ids(lengths, width, vocab_size=49408):
    """Texts of so many tokens with start and end, padded with zeros. -> ids (N,width)"""
    ids = torch.randint(1, vocab_size - 2, (len(lengths), width))
    for row, length in zip(ids, lengths):
        row[0] = vocab_size - 2
        row[length - 1] = vocab_size - 1
        row[length:] = 0
    return ids


def camera_video(path, frames, generator):
    """H.264 of 320x240 at 25 fps: textures that drift, grain, a cut every 10 s."""
    pictures = []
    for i in range(frames):
        k = i % 250
        if k == 0:
            coarse = torch.rand(1, 3, 60, 80, generator=generator) * 255
            scene = F.interpolate(coarse, (480, 640), mode="bicubic")[0]
        x = scene[:, k // 2:k // 2 + 240, k // 3:k // 3 + 320]
        x = x + torch.randn(240, 320, generator=generator) * 4
        pictures.append(x.clamp(0, 255).byte().permute(1, 2, 0).contiguous())
    write_video(path, pictures, fps=25, preset="fast")
