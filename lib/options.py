"""Shared by eval.py and search.py: options, output files, and loading the model of --ckpt."""
import argparse
import json
import os
from pathlib import Path

import torch

import data
from lib.common import DataError, WeightsError, check_output, first_line, numeric, output
from lib.processes import DEVICE
from lib.report import segment_name
from lib.validate import MISTAKES
from lib.video import Segment
from lib.weights import ACTIVATIONS, load_checkpoint, read_weights
from tmass import POOLINGS, PRIORS


def add_common(p):
    """Add the options that evaluation and search share; those added next are in the last group."""
    option = p.option
    p.group("scoring")
    option("trials M", "samples of the text mass; 0: the point text", numeric(int, 0, 10 ** 5),
           20)
    option("expected", "score by the average best of M in closed form, without noise",
           default=False, action=argparse.BooleanOptionalAction)
    option("seed", "of the samples", numeric(int, 0, 2 ** 63 - 1), 24)
    option("prior", "of the samples (default: as trained; released code: uniform)", PRIORS)
    option("prior-std", "of the normal prior (default: as trained; released for LSMDC: 0.003)",
           numeric(float, 0, 1e6))
    option("pooling", "how frames become a video; mean and query need no weights (default: as "
           "trained; CLIP: query)", POOLINGS)
    option("frames T", "frames sampled per video, where the radius is not tied to the number in "
           "training, as linear is (default: as trained)", numeric(int, 1, 1000))
    p.group("run")
    option("activation", "of CLIP, where the guess that is printed is wrong: OpenAI's is "
           "quickgelu, LAION's gelu", ACTIVATIONS)
    option("amp", "bf16: encode in bfloat16, about 3 times as fast where CPU or GPU has it; "
           "scores move by about 3e-4", ("off", "bf16"), "off")
    option("json FILE", "write the result there too")
    option("report FILE", "write a page to look at: one .html file with frames and settings")
    option("batch N", "videos encoded at once", numeric(int, 1, 10 ** 6), 16)
    option("workers N", "processes that decode videos", numeric(int, 0, 1000),
           min(8, os.cpu_count() or 1))
    option("device", "cpu, cuda or mps", default=DEVICE)


# What the files that each option writes contain near their start, and no other files do.
OUTPUTS = {"--json": b'{\n "', "--report": b"<title>T-MASS", "--save": b"tmass scores"}


def _check_outputs(args):
    """Check early that each output can be written, and that no two options name the same file."""
    named = {os.path.realpath(args.ckpt): "--ckpt"}
    if getattr(args, "features", None):
        named[os.path.realpath(args.features)] = "--features"
    for option, mark in OUTPUTS.items():
        path = getattr(args, option[2:], None)
        # --json - is standard output.
        if path is None or (option, path) == ("--json", "-"):
            continue
        # Real paths are compared, because a file's path can be spelled in several ways.
        other = named.setdefault(os.path.realpath(path), option)
        if other != option:
            raise DataError(f"{option} {path} is also the file of {other}: give each its own")
        check_output(option, path, mark)


def load_model(args, job):
    """Load the model of --ckpt, and apply the options to it. -> (model, tokenizer, config)."""
    _check_outputs(args)
    # The first process may have to download the weights, which the others then find.
    with job.first_alone():
        model, tokenizer, config = load_checkpoint(args.ckpt, args.activation)
    if args.pooling and args.pooling != model.config["pooling"]:
        model.pool = POOLINGS[args.pooling](model.clip.embed_dim, 1, 0.0)
        if list(model.pool.parameters()):
            raise WeightsError(f"--pooling {args.pooling}: {args.ckpt} has no weights for it; "
                               "choose mean or query")
        model.config["pooling"] = args.pooling
    if args.frames:
        try:
            model.radius(torch.zeros(args.frames))
        except (ValueError, RuntimeError) as error:
            raise WeightsError(f"--frames {args.frames}: {error}") from None
        model.frames = args.frames
        model.config["frames"] = args.frames
    model.to(job.device)
    model.prior = args.prior or model.prior
    if args.prior_std is not None:
        model.prior_std = args.prior_std
    settings = [f"{args.ckpt}: T={model.frames}, pooling {model.config['pooling']}, radius "
                f"{model.config['radius']}"]
    if model.config["radius"] != "none" and args.trials:  # otherwise nothing is sampled
        std = f" (std {model.prior_std:g})" if model.prior == "normal" else ""
        noise = "their best on average, in closed form" if args.expected else f"seed {args.seed}"
        settings += [f"{args.trials} samples", f"prior {model.prior}{std}", noise]
    job.say(f"{', '.join(settings)}, on {job.device}")
    return model, tokenizer, config


def read_features(path, model):
    """Load --features. -> Annotations, (t (N,D), f (V,T,D)) on the model's device.

    A file of --save also holds captions and clips. If they are missing, texts and videos are named
    by their numbers. Sets model.frames to T.
    """
    content = read_weights(path)
    device = model.clip.logit_scale.device
    try:
        t = content["t"].float().to(device)
        f = content["f"].float().to(device)
        owner = torch.as_tensor(content["owner"])
        N = len(t)
        V = len(f)
        model.frames = f.shape[1]
        model.config["frames"] = model.frames
        # Raises an error if they don't fit each other or the model.
        model.score(t[:1], f[:1], 1)
        captions = content.get("captions", [f"text {i}" for i in range(N)])
        clips = content.get("clips", [(f"video {v}",) for v in range(V)])
        segments = [Segment(*clip) for clip in clips]
        list(map(segment_name, segments))  # it fails where a report would
        sizes = len(owner), len(captions), len(segments), len(owner.bincount(minlength=V))
        if not N or sizes != (N, N, V, V):
            raise ValueError(f"it has N, N, V, V = {sizes}")
    except MISTAKES as error:
        raise DataError(f"--features {path} must hold t (N,D), f (V,T,D) and owner (N,), the "
                        "number of each text's video, with the same D as --ckpt, and the same T "
                        f"if its radius is linear: {first_line(error)}") from None
    return data.Annotations(segments, captions, owner.tolist()), (t, f)


def write_json(path, content):
    """Write a JSON file, whole or not at all."""
    with output("--json", path) as part:
        text = json.dumps(content, indent=1)
        Path(part).write_text(text, newline="")  # the same on Windows: see OUTPUTS
