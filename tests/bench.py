"""Measurements, printed as ratios and asserted nowhere: python tests/bench.py encode (one function per subcommand)."""
import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"


def seconds(runs, repeat=7):
    """Names and functions -> least seconds of each, run in turns after one warm-up: a busy machine only ever adds time."""
    times = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: min(t[1:]) for name, t in times.items()}


def encode(images=16, texts=64):
    """ViT-B/32 with random weights, float32, one batch for all: our image tower against transformers' (sdpa) and open_clip's,
    and texts cut to the longest of their batch against padding to 77."""
    import open_clip
    import transformers

    from clip_model import CLIP, Tokenizer, to_openai_names
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=dict(eos_token_id=49407), attn_implementation="sdpa")  # its defaults are ViT-B/32
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
    print(f"device {device}, {torch.get_num_threads()} threads, {images} images, {texts} texts a batch, lengths {source}: "
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
                     "open_clip": lambda: oc.encode_image(x)})
        gap = max((ours.encode_image(x) - f).norm() / f.norm() for f in (hf.get_image_features(x), oc.encode_image(x)))
        print(f"image tower: {images / t['ours']:.1f} images/s; speed against transformers {t['transformers'] / t['ours']:.2f}x, "
              f"open_clip {t['open_clip'] / t['ours']:.2f}x; features differ by {gap:.1e}")
        t = seconds({"cut": lambda: [ours.encode_text(i) for i in cut], "padded": lambda: [ours.encode_text(i) for i in batches],
                     "transformers": lambda: [hf.get_text_features(i) for i in batches],
                     "open_clip": lambda: [oc.encode_text(i) for i in batches]}, repeat=3)
        gap = max((ours.encode_text(a) - ours.encode_text(b)).norm() / ours.encode_text(b).norm() for a, b in zip(cut, batches))
        print(f"text tower: {len(cut) * texts / t['cut']:.0f} texts/s, cut to {[i.shape[1] for i in cut]} tokens; speed against padding "
              f"to 77 {t['padded'] / t['cut']:.2f}x (transformers, padded: {t['transformers'] / t['cut']:.2f}x, open_clip, padded: "
              f"{t['open_clip'] / t['cut']:.2f}x); features differ by {gap:.1e}")


if __name__ == "__main__":
    benches = {f.__name__: f for f in (encode,)}
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    for name, bench in benches.items():
        commands.add_parser(name, help=" ".join(bench.__doc__.split()))
    benches[parser.parse_args().bench]()
