"""Weights and checkpoints: OpenAI, Hugging Face, open_clip, released T-MASS and X-Pool, ours."""
import hashlib
import http.client
import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from textwrap import shorten

import torch
from safetensors.torch import load_file

from clip_model import CLIP, Tokenizer, sizes_of
from lib.common import (
    WeightsError,
    curable,
    cure,
    explained,
    first_few,
    first_line,
    why_not_written,
    written_whole,
)
from lib.encoders import PREFIX, OpenCLIP, split_name
from lib.settings import described, settings_beside
from tmass import POOLINGS, TMASS

# ---- downloads ----

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
VOCABULARY_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MODELS = {  # name: (file, SHA-256)
    "ViT-B/32": (
        "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": (
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": (
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
}
OTHER_NAMES = {
    "ViT-B-32": "ViT-B/32",
    "ViT-B-16": "ViT-B/16",
    "ViT-L-14": "ViT-L/14",
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
    "openai/clip-vit-large-patch14": "ViT-L/14",
}
FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
         "open_clip_pytorch_model.bin")


def load_vocabulary():
    """CLIP's vocabulary, from the cache folder or downloaded on first use. -> Tokenizer"""
    return Tokenizer.from_file(fetch(VOCABULARY_URL, VOCABULARY_SHA256))


def find_weights(name_or_path):
    """A name of MODELS or OTHER_NAMES (downloaded on first use), a file, or a folder -> Path."""
    path = Path(name_or_path)
    if path.is_dir():
        return _file_in(path)
    if path.exists():
        return path
    name = str(name_or_path)
    name = OTHER_NAMES.get(name, name)
    if name not in MODELS:
        raise WeightsError(f"{path}: no such file, and none of the names {', '.join(MODELS)}")
    file, sha256 = MODELS[name]
    return fetch(f"{OPENAI_URL}/{sha256}/{file}", sha256)


def _file_in(folder):
    """The weights file in a folder that save_pretrained or open_clip wrote."""
    for name in FILES:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return file
    raise WeightsError(f"{folder}: a folder; name the weights file in it (there is none of "
                       f"{', '.join(FILES)})")


def fetch(url, sha256):
    """Download a file once, into the cache folder (TMASS_CACHE, else ~/.cache/tmass). -> its path

    A file that is already there is used if its SHA-256 is right.
    """
    name = os.path.basename(url)
    folder = Path(os.environ.get("TMASS_CACHE") or "~/.cache/tmass").expanduser()
    path = folder / name
    try:
        if path.is_file():
            # Read in one go: the model will need more memory than its file does here.
            if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return path
            print(f"{path}: wrong SHA-256 (incomplete, or another file), downloading it again")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}", flush=True)
        # This writes to a temporary name, and renames the file only if its hash is right.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise WeightsError(f"{name}: could not be downloaded from {url}: {error}; put the file "
                           f"with SHA-256 {sha256} at {path} (TMASS_CACHE sets another folder)"
                           ) from None
    return path


# ---- files of weights ----

def check_tensors(sd):
    """Raise a WeightsError unless all values are plain float tensors, with data.

    Counters and masks are not weights: int64 and bool are taken too.
    """
    wrong = []
    for key, x in sd.items():
        plain = torch.is_tensor(x) and x.layout == torch.strided and not x.is_meta
        if not plain or not (x.is_floating_point() or x.dtype in (torch.int64, torch.bool)):
            wrong.append(key)
    if wrong:
        raise WeightsError("expected a state dict, a dict of float tensors; these are not: "
                           f"{listed(wrong)}")


def listed(names):
    """The first few names, on one line."""
    return ", ".join(first_few(sorted(map(str, names))))


def read_weights(path):
    """Read a TorchScript archive, torch.save or .safetensors file. -> the dict in it, on the CPU

    The dict is a state dict, or holds one beside other entries.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        why = "a pipe or a device; give the name of a plain file"
        raise WeightsError(f"{path}: {why if path.exists() else 'no such file'}")
    with curable(f"{path}: no room to load it"):
        try:
            weights = content_of(path)
        except WeightsError:
            raise
        # Files of other kinds fail in many ways, in pickle, zipfile or torch.
        except Exception as error:
            if cure(error):
                raise
            why = getattr(error, "strerror", None) or (
                "truncated, or not a TorchScript archive, torch.save or .safetensors file")
            if "GLOBAL" in str(error):
                why = ("it holds Python objects beside tensors, and loading those could run any "
                       "code; if you trust it, write a clean file: python -c \"import torch; "
                       f"c = torch.load({str(path)!r}, weights_only=False); "
                       f"c = next((c[k] for k in {HOLDERS} if k in c), c) if type(c) is dict "
                       "else c; torch.save(c.state_dict() if hasattr(c, 'state_dict') else c, "
                       "'clean.pt')\"")
            raise WeightsError(f"{path}: no readable weights: {why}") from None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise WeightsError(f"{path}: no readable weights: expected a dict of named tensors, "
                           f"not this {type(weights).__name__}")
    return weights


def content_of(path):
    """Read a weights file according to its kind. -> its content"""
    entries = _zip_entries(path)
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    if any(name.endswith("/constants.pkl") for name in entries):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but OpenAI's files use it
            return torch.jit.load(path, map_location="cpu").state_dict()
    with torch.serialization.safe_globals(_numpy_scalars()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _zip_entries(path):
    """The names in a zip, which is what torch writes, with valid checksums; [] for other files."""
    if not zipfile.is_zipfile(path):
        return []
    # torch itself does not verify the checksums.
    with zipfile.ZipFile(path) as file:
        if part := file.testzip():
            raise WeightsError(f"{path}: damaged, the checksum of {part} is wrong: get the file "
                               "again, or train again")
        return file.namelist()


def _read_parts(path):
    """The weights of all files that an index of save_pretrained names."""
    files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    weights = {}
    for name in sorted(files):
        weights |= read_weights(path.with_name(name))  # refuses a path into another folder
    return weights


def _numpy_scalars():
    """The types that make up NumPy numbers, often saved beside weights. None of them runs code."""
    import numpy  # which torchvision requires
    scalar = numpy.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    types = {type(numpy.dtype(code)) for code in "?bhilqBHILQefdgFDGSUMm"}
    return [numpy.dtype, *types, *((scalar, name) for name in names)]


HOLDERS = ("state_dict", "model_state_dict", "model")
# Added to names: within, by torch.compile and FSDP; before, by DistributedDataParallel, Lightning.
INNER = r"_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."
WRAPPERS = re.compile(rf"^(module\.|model\.|{INNER})+|{INNER}")


def _state_dict_in(weights):
    """The state dict in a file's content, without what wrappers add to its names."""
    while inner := [weights[key] for key in HOLDERS if isinstance(weights.get(key), dict)]:
        weights = inner[0]
    sd = {}
    for key, x in weights.items():
        key = WRAPPERS.sub("", str(key))
        # In some files, the temperature has shape (1,).
        sd[key] = x.squeeze() if key.endswith("logit_scale") and torch.is_tensor(x) else x
    return sd


HF_NAMES = {  # part of a name in transformers' CLIPModel -> in OpenAI's CLIP; in this order
    "vision_model.": "visual.",
    "text_model.": "",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TRANSPOSED = ("visual.proj", "text_projection")
# Entries that are not weights, in OpenAI's archives, HF's files and torch's AveragedModel.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids",
               "num_batches_tracked", "n_averaged")


def to_openai_names(sd):
    """State dict of HF's CLIPModel, of either open_clip class or of OpenAI's CLIP -> OpenAI's."""
    # In open_clip's CustomTextCLIP, the names of the text tower begin with "text.".
    sd = {key.removeprefix("text."): x for key, x in sd.items() if not key.endswith(NOT_WEIGHTS)}
    check_tensors(sd)
    if not any(key.startswith("text_model.") for key in sd):
        return sd
    named = {}
    for key, x in sd.items():
        key = renamed(key, HF_NAMES)
        # HF's projections are Linear layers, (out, in); OpenAI's are matrices, (in, out).
        named[key] = x.T.contiguous() if key in TRANSPOSED else x
    # HF keeps q, k and v apart; OpenAI has them in one tensor.
    for key in list(named):
        if ".attn.q_proj." in key:
            others = [key.replace("q_proj", other) for other in ("k_proj", "v_proj")]
            parts = [named.pop(name) for name in (key, *others)]
            named[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return named


def renamed(key, names):
    """Replace each part of a name that is a key of `names`, in their order."""
    for theirs, openai in names.items():
        key = key.replace(theirs, openai)
    return key


# ---- any CLIP ----

def load_clip(name_or_path):
    """Load a CLIP by its name or file (`find_weights`) -> CLIP in float32; print what it is.

    Files: OpenAI's archives, state dicts of HF's CLIPModel and of open_clip, and the CLIP in our
    checkpoints and in released ones of T-MASS and X-Pool. open_clip: names -> OpenCLIP.
    """
    if str(name_or_path).startswith(PREFIX):
        return _load_open_clip(str(name_or_path))
    path = find_weights(name_or_path)
    content = read_weights(path)
    if content.get("format") == "tmass":
        return build_own(content, path)[0].clip
    return _clip_from(content, path)


def _load_open_clip(name):
    """A name after open_clip:, perhaps with a tag or a weights file -> OpenCLIP."""
    model, tag, file = split_name(name)
    load = not file and (tag or ":" in model)
    clip = OpenCLIP(model, tag, load)
    origin = ""
    if file:
        sd = _state_dict_in(read_weights(file))
        sd = {name: x for name, x in sd.items() if name not in NOT_WEIGHTS}
        load_strictly(clip.model, sd, f"open_clip's {model}")
        origin = ", as for open_clip's own weights" if clip.agreed else ", by default"
        if clip.differing:
            print(f"warning: {name}: open_clip's own weights differ in "
                  f"{', '.join(clip.differing)}: give the tag that fits the file: "
                  f"{PREFIX}{model}/TAG={file}")
    elif not load:
        print(f"{name}: random weights; for trained ones give {name}/TAG or {name}=FILE")
    millions = sum(p.numel() for p in clip.parameters()) / 1e6
    print(f"{name}: {millions:.1f} M parameters, {clip.image_size} px images, pixels minus "
          f"{clip.config['mean']} over {clip.config['std']}, resized by {clip.resize[0]}{origin}")
    return clip


def _clip_from(weights, path):
    """Build the CLIP whose weights `read_weights` found in a file."""
    sd = _state_dict_in(weights)
    in_checkpoint = {k.removeprefix("clip."): x for k, x in sd.items() if k.startswith("clip.")}
    sd = in_checkpoint or sd
    settings, why, heads_by = settings_beside(path, sd)
    what = ("not a checkpoint of train.py or of the released code, and not a CLIP with a vision "
            "transformer")
    with explained(path, what, f"found {listed(sd)}"):
        clip = CLIP.from_state_dict(to_openai_names(sd), **settings)
    print(f"CLIP from {path}: {described(clip, why, heads_by)}")
    return clip


# ---- checkpoints ----

def save_checkpoint(path, model, tokenizer, config, weights=None, **state):
    """Write one self-contained file: config, weights, tokenizer, state.

    weights: a state dict to save instead of the model's. state: tensors and plain values only.
    A kill at any moment leaves the old file or the new one. Weights that are not finite are
    refused. Raises WeightsError.
    """
    intact = f"an earlier {path}, if any, is intact"
    own = model.state_dict()
    weights = weights or own
    # Check both: training may have diverged after the best weights were kept.
    if broken := not_finite(weights) or not_finite(own):
        raise WeightsError(f"checkpoint {path} not written: weights that are not finite "
                           f"({listed(broken)}); {intact}")
    content = dict(
        format="tmass",
        version=1,
        config=config,
        clip=model.clip.config,
        tmass=model.config,
        model=weights,
        merges=list(tokenizer.merges),
        context_length=tokenizer.context_length,
        **state,
    )
    try:
        # Given a name instead, torch.save would hide the system's error, such as a full disk.
        with written_whole(path) as part, open(part, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        why = why_not_written(error) or first_line(error)
        raise WeightsError(f"cannot write checkpoint {path}: {why}; {intact}") from error


def not_finite(state):
    """The names of tensors that contain an infinity or NaN."""
    # This waits for the device only once, and a sum is 10 times as fast as isfinite().
    sums = torch.stack([x.sum(dtype=torch.float32) for x in state.values()])
    if sums.sum().isfinite():
        return []
    return [name for name, x in state.items() if not x.isfinite().all()]


def load_checkpoint(name_or_path):
    """A name or file of weights -> (model in eval mode on the CPU, tokenizer, config dict).

    Takes our checkpoints, released ones of T-MASS and X-Pool, and any CLIP that `load_clip` takes.
    A CLIP is used zero-shot: frames are pooled by `query`, and there is no radius.
    """
    if str(name_or_path).startswith(PREFIX):
        clip = load_clip(name_or_path)
        model = TMASS(clip, **_method_of({}))
        return model.eval(), clip.tokenizer, {"zero_shot": True, "frames": model.frames}
    path = find_weights(name_or_path)
    content = read_weights(path)
    if content.get("format") == "tmass":
        model, tokenizer, config = build_own(content, path)
    else:
        model, config = _load_foreign(content, path)
        tokenizer = _vocabulary_of(model.clip, path)
    if broken := not_finite(model.state_dict()):
        print(f"warning: {path}: weights that are not finite ({listed(broken)}): "
              "its scores mean nothing")
    return model.eval(), tokenizer, config


def usable(path):
    """`explained` for our own checkpoints."""
    return explained(path, "a checkpoint of train.py that can't be used",
                     "use the program that wrote it, or train again")


def build_own(content, path):
    """Rebuild what save_checkpoint wrote. -> (model, tokenizer, config)"""
    with usable(path):
        if content["version"] != 1:
            raise ValueError(f"it has version {content['version']}, and this program reads 1")
        settings = content["clip"]
        if "open_clip" in settings:
            clip = OpenCLIP(**settings, files=content["merges"])
            tokenizer = clip.tokenizer
        else:
            weights = {k.removeprefix("clip."): x for k, x in content["model"].items()}
            with torch.device("meta"):  # no memory or random numbers: the weights follow
                clip = CLIP(**settings | sizes_of(weights))
            tokenizer = Tokenizer(content["merges"], content["context_length"])
        # Not on meta: a radius may have tensors that are not among the weights.
        model = TMASS(clip, **content["tmass"])
        load_strictly(model, content["model"], "its own settings")
        D = clip.embed_dim
        model.score(torch.zeros(1, D), torch.zeros(1, model.frames, D))  # fails if they don't fit
        return model, tokenizer, content["config"]


def load_model(ckpt, job, pooling=None, frames=None, prior=None, prior_std=None):
    """`load_checkpoint` on the job's device, with other settings than in training where given."""
    # The first process may have to download the weights, which the others then find.
    with job.first_alone():
        model, tokenizer, config = load_checkpoint(ckpt)
    if pooling and pooling != model.config["pooling"]:
        model.pool = POOLINGS[pooling](model.clip.embed_dim, 1, 0.0)
        if list(model.pool.parameters()):
            raise WeightsError(f"--pooling {pooling}: {ckpt} has no weights for it; choose mean "
                               "or query")
        model.config["pooling"] = pooling
    if frames:
        try:
            model.radius(torch.zeros(frames))
        except (ValueError, RuntimeError) as error:
            raise WeightsError(f"--frames {frames}: {error}") from None
        model.frames = frames
        model.config["frames"] = frames
    model.prior = prior or model.prior
    if prior_std is not None:
        model.prior_std = prior_std
    return model.to(job.device), tokenizer, config


RELEASED_NAMES = {  # part of a name in a released checkpoint -> here; in this order
    "pool_frames.": "pool.",
    "stochastic.std_branch.": "radius.",
    "cross_attn.": "",
    "_proj.": ".",
    "layer_norm": "ln",
}


def _load_foreign(content, path):
    """A released checkpoint (HF's CLIP, pool_frames, stochastic) or a CLIP -> (model, config)."""
    sd = _state_dict_in(content)
    released = any(key.startswith("pool_frames.") for key in sd)
    clip = _clip_from(content, path)
    # In a released file, all entries outside of CLIP belong to pooling or radius.
    head = {renamed(k, RELEASED_NAMES): x for k, x in sd.items() if released and k[:5] != "clip."}
    head.pop("radius.learnable_scalar", None)  # the released code never reads it
    with explained(path, "not a checkpoint of the released code", f"found {listed(head)}"):
        model = TMASS(clip, **_method_of(head))
    own = {f"clip.{key}": x for key, x in clip.state_dict().items()}
    load_strictly(model, own | head, f"the model of {path}")
    kind = "released" if released else "zero_shot"
    return model, {kind: True, "frames": model.config["frames"]}


def _method_of(head):
    """The settings of TMASS for a released checkpoint's tensors beside CLIP; {}: CLIP alone."""
    if "radius.linear.weight" in head:
        frames = head["radius.linear.weight"].shape[1]
        return dict(frames=frames, prior="uniform", support_video="batch")
    pooling = "xpool" if head else "query"
    return dict(radius="none", support_weight=0.0, pooling=pooling)


def _vocabulary_of(clip, path):
    """CLIP's vocabulary -> Tokenizer. WeightsError if the weights have another number of tokens."""
    tokenizer = load_vocabulary()
    expected = clip.config["vocab_size"]
    if tokenizer.vocab_size != expected:
        raise WeightsError(f"{path}: a CLIP of {expected} tokens, and CLIP's vocabulary has "
                           f"{tokenizer.vocab_size}: without training, only CLIPs with that "
                           "vocabulary can be used")
    tokenizer.context_length = clip.config["context_length"]
    return tokenizer


def load_strictly(module, sd, what):
    """Make the tensors of sd the module's own. A WeightsError names those that don't fit."""
    try:
        check_tensors(sd)
        # Users may have converted the file to half precision.
        sd = {name: x.float() if x.is_floating_point() else x for name, x in sd.items()}
        module.load_state_dict(sd, assign=True)
    except (RuntimeError, WeightsError) as error:
        # torch's message has many lines: `shorten` makes one of them.
        raise WeightsError(f"weights that don't fit {what}: {shorten(str(error), 500)}") from None
