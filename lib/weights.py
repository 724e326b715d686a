"""Weights and checkpoints: OpenAI, Hugging Face's form of it, released T-MASS and X-Pool, ours."""
import functools
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

from clip_model import CLIP, MEAN, STD, Tokenizer, sizes_of
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
from lib.encoders import CONFIG, ENCODERS, shown
from lib.tables import read_json
from tmass import TMASS

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
FILES = ("model.safetensors", "pytorch_model.bin")
MERGE = "merge it into its model first: merge_and_unload().save_pretrained(FOLDER)"


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
    """The weights file in a folder that save_pretrained wrote."""
    for name in FILES:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return file
    raise WeightsError(
        f"{folder}: a folder with none of {', '.join(FILES)}: name the file in it; of an adapter, "
        f"{MERGE}; of open_clip, give open_clip:local-dir:{folder}")


@functools.cache
def _sha256(path, stamp):
    """The SHA-256 of a file. stamp: its time of change, so that a content is read only once."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(url, sha256):
    """Download a file once, into the cache folder (TMASS_CACHE, else ~/.cache/tmass). -> its path

    A file that is already there is used if its SHA-256 is right.
    """
    name = os.path.basename(url)
    folder = Path(os.environ.get("TMASS_CACHE") or "~/.cache/tmass").expanduser()
    path = folder / name
    try:
        if path.is_file():
            if _sha256(path, path.stat().st_mtime_ns) == sha256:
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

def listed(names):
    """The first few names, on one line."""
    return ", ".join(first_few(sorted(map(str, names))))


def read_weights(path):
    """Read a torch.save, .safetensors or OpenAI's TorchScript file. -> the dict in it, on the CPU

    The dict is a state dict, or holds one beside other entries. Nothing in the file is run.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, or a pipe or device")
    with curable(f"{path}: no room to load it"):
        try:
            weights = _content_of(path)
        except WeightsError:
            raise
        # Files of other kinds fail in many ways, in pickle, zipfile or torch.
        except Exception as error:
            if cure(error):
                raise
            why = getattr(error, "strerror", None) or (
                "truncated, or not a torch.save or .safetensors file")
            if "GLOBAL" in str(error):
                why = ("it holds Python objects beside tensors, and loading those could run any "
                       "code: save its state_dict() alone, with the program that wrote it")
            raise WeightsError(f"{path}: no readable weights: {why}") from None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise WeightsError(f"{path}: no readable weights: expected a dict of named tensors, "
                           f"not this {type(weights).__name__}")
    return weights


def _content_of(path):
    """Read a weights file according to its kind. -> its content"""
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):  # which is what torch writes
        with zipfile.ZipFile(path) as file:
            if any(name.endswith("/constants.pkl") for name in file.namelist()):
                return _read_archive(path)
            # torch itself does not verify the checksums.
            if part := file.testzip():
                raise WeightsError(f"{path}: damaged, the checksum of {part} is wrong: get the "
                                   "file again, or train again")
    with torch.serialization.safe_globals(_numpy_scalars()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_archive(path):
    """The state dict of one of OpenAI's TorchScript archives. Loading any other could run code."""
    known = [sha256 for _, sha256 in MODELS.values()]
    if _sha256(path, path.stat().st_mtime_ns) not in known:
        raise WeightsError(f"{path}: a TorchScript archive, but none of OpenAI's ("
                           f"{', '.join(MODELS)}), and loading it could run any code: if you trust "
                           "it, save torch.jit.load(FILE).state_dict() with torch.save")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but OpenAI's files use it
        return torch.jit.load(path, map_location="cpu").state_dict()


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
    types = [getattr(numpy.dtypes, name) for name in numpy.dtypes.__all__]
    return [numpy.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *types]


HOLDERS = ("state_dict", "model_state_dict", "model", "module")
# Added to names: within, by torch.compile and FSDP; before, by DistributedDataParallel, Lightning.
INNER = r"_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."
WRAPPERS = re.compile(rf"^(module\.|model\.|{INNER})+|{INNER}")
# Entries that are not weights, in OpenAI's archives, HF's files and torch's AveragedModel.
NOT_WEIGHTS = re.compile(r"(input_resolution|context_length|vocab_size|n_averaged|.*position_ids)")


def _state_dict_in(weights, path):
    """The state dict in a file's content, without what wrappers add to its names.

    Weights beside it, such as an EMA copy, are named in a line.
    """
    for holder in 2 * HOLDERS:  # they may hold each other
        if isinstance(weights.get(holder), dict):
            beside = [
                key for key, x in weights.items() if key != holder and isinstance(x, dict)
                and ("ema" in key or any(map(torch.is_tensor, x.values())))]
            if beside:
                print(f"{path}: its {holder} is loaded, not {listed(beside)}")
            weights = weights[holder]
    sd = {WRAPPERS.sub("", str(key)): x for key, x in weights.items()}
    return {key: x for key, x in sd.items() if not NOT_WEIGHTS.fullmatch(key)}


def load_strictly(module, sd, what):
    """Load all tensors of sd into a module, into float32. A WeightsError names what doesn't fit."""
    on_meta = next(module.parameters()).is_meta
    try:
        module.load_state_dict(sd, assign=on_meta)
    except RuntimeError as error:
        # torch's message has many lines: `shorten` makes one of them.
        raise WeightsError(f"weights that don't fit {what}: {shorten(str(error), 500)}") from None
    if on_meta:
        module.float()


# ---- Hugging Face's form of CLIP ----

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


def renamed(key, names):
    """Replace each part of a name that is a key of `names`, in their order."""
    for theirs, openai in names.items():
        key = key.replace(theirs, openai)
    return key


def to_openai_names(sd):
    """State dict of transformers' CLIPModel -> one with the names of OpenAI's CLIP."""
    named = {}
    for key, x in sd.items():
        key = renamed(key, HF_NAMES)
        # HF's projections are Linear layers, (out, in); OpenAI's are matrices, (in, out).
        named[key] = x.T.contiguous() if key in TRANSPOSED else x
    # HF keeps q, k and v apart; OpenAI has them in one tensor.
    for key in list(named):
        if ".attn.q_proj." in key:
            parts = [named.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            named[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return named


SUPPORTED = dict(  # settings of which clip_model.CLIP has these values alone; the first: by default
    model_type=("clip", "clip_vision_model", "clip_text_model"),
    hidden_act=("quick_gelu", "gelu"),
    do_resize=(True,),
    do_rescale=(True,),
    do_normalize=(True,),
    resample=(3, 2),  # bicubic, bilinear
)


def hf_settings(folder, image_size):
    """What tensors don't tell, from the JSON files of save_pretrained. -> arguments of CLIP"""
    config = _settings_in(folder / "config.json")
    images = _settings_in(folder / "preprocessor_config.json")
    towers = [config.get(f"{name}_config", {}) for name in ("vision", "text")]
    for part in (config, images, *towers):
        for key, values in SUPPORTED.items():
            if part.get(key, values[0]) not in values:
                raise WeightsError(f"{key} is {part[key]!r}, expected one of {values}")
    vision, text = towers
    sizes = [vision.get("image_size"), images.get("size"), images.get("crop_size")]
    if {*re.findall(r"\d+", str(sizes))} - {str(image_size)}:
        raise WeightsError(f"its settings are for images of {sizes}, its weights for {image_size}")
    settings = dict(
        mean=tuple(images.get("image_mean", MEAN)),
        std=tuple(images.get("image_std", STD)),
        resize=(
            "squash" if "height" in str(images.get("size")) else "shortest",
            "bilinear" if images.get("resample") == 2 else "bicubic",
        ),
    )
    if config:
        shared = [(tower.get("hidden_act", "quick_gelu"), tower.get("layer_norm_eps", 1e-5))
                  for tower in towers]
        if shared[0] != shared[1]:
            raise WeightsError(f"{shared[0]} for images and {shared[1]} for texts")
        activation, settings["norm_eps"] = shared[0]
        settings["quick_gelu"] = activation == "quick_gelu"
        settings["vision_heads"] = vision.get("num_attention_heads", 12)
        settings["text_heads"] = text.get("num_attention_heads", 8)
    return settings


def _settings_in(file):
    return read_json(file, "the weights beside it", dict) if file.is_file() else {}


# ---- checkpoints ----

def save_checkpoint(path, model, tokenizer, config, weights=None, **state):
    """Write one self-contained file: config, weights, tokenizer, state.

    weights: a state dict to save instead of the model's. state: tensors and plain values only.
    A kill at any moment leaves the old file or the new one. Weights that are not finite are
    refused, and encoders that could not be built again. Raises WeightsError.
    """
    intact = f"an earlier {path}, if any, is intact"
    own = model.state_dict()
    weights = weights or own
    # Check both: training may have diverged after the best weights were kept.
    if broken := not_finite(weights) or not_finite(own):
        raise WeightsError(f"checkpoint {path} not written: weights that are not finite "
                           f"({listed(broken)}); {intact}")
    names = [name for name, kind in ENCODERS.items() if kind is type(model.clip)]
    if not names:
        raise WeightsError(f"checkpoint {path} not written: its encoder is of the class "
                           f"{type(model.clip).__name__}, which is not in ENCODERS "
                           f"(lib/encoders.py); {intact}")
    content = dict(
        format="tmass",
        version=1,
        config=config,
        encoder=names[0],
        clip=model.clip.config,
        tmass=model.config,
        model=weights,
        merges=list(getattr(tokenizer, "merges", ())),
        context_length=getattr(tokenizer, "context_length", None),
        **state,
    )
    try:
        with written_whole(path) as part:
            # Given a name instead, torch.save would hide the system's error, such as a full disk.
            with open(part, "wb") as file:
                torch.save(content, file)
            if names[0] not in ("clip", "open_clip"):
                with explained(f"checkpoint {path} not written", "it could not be loaded again",
                               f"lib/encoders.py says what an encoder has; {intact}"):
                    _build(read_weights(part))
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


def usable(path):
    """`explained` for our own checkpoints."""
    return explained(path, "a checkpoint of train.py that can't be used",
                     "use the program that wrote it, or train again")


def build_own(content, path):
    """Rebuild what save_checkpoint wrote. -> (model in eval mode, tokenizer, config)"""
    with usable(path):
        return _build(content)


def _build(content):
    if content["version"] != 1:
        raise ValueError(f"it has version {content['version']}, and this program reads 1")
    settings = content["clip"]
    # Old checkpoints have no `encoder`.
    name = content.get("encoder", "open_clip" if "open_clip" in settings else "clip")
    if name not in ENCODERS:
        raise ValueError(f"its encoder {name} is none of {', '.join(ENCODERS)}")
    weights = content["model"]
    if name == "clip":
        sizes = sizes_of({key.removeprefix("clip."): x for key, x in weights.items()})
        with torch.device("meta"):  # no memory or random numbers: the weights follow
            clip = ENCODERS[name](**settings | sizes)
        clip.tokenizer = Tokenizer(content["merges"], content["context_length"])
    else:
        files = dict(files=content["merges"]) if name == "open_clip" else {}
        clip = ENCODERS[name](**settings, **files)
    # Not on meta: a radius may have tensors that are not among the weights.
    model = TMASS(clip, **content["tmass"])
    load_strictly(model, weights, "its own settings")
    try_out(model, clip.tokenizer([""]))
    config = dict(content["config"])
    if not content.get("finished", True):
        config["unfinished"] = f"step {content['step']}"
        if "total" in content:  # old checkpoints don't have it
            config["unfinished"] += f" of {content['total']}"
    return model, clip.tokenizer, config


@torch.no_grad()
def try_out(model, ids):
    """Score a pair, which fails if the parts of a model don't fit. ids (1,L). -> eval mode"""
    model.eval()
    t = model.encode_text(ids)
    side = model.clip.image_size
    f = model.encode_video(torch.zeros(1, 1, 3, side, side, dtype=torch.uint8))
    model.score(t, f.expand(1, model.frames, -1))


def load_clip(name_or_path):
    """The encoder of what `load_checkpoint` takes, and of a CLIP with any vocabulary."""
    model, _, _ = _load(name_or_path)
    return model.clip


def load_checkpoint(name_or_path):
    """A name or file of weights -> (model in eval mode on the CPU, tokenizer, config dict).

    Takes our checkpoints, released ones of T-MASS and X-Pool, a CLIP of OpenAI or in Hugging Face's
    form, by its name (`find_weights`) or file, and NAME[:TEXT] with a NAME of ENCODERS. An encoder
    alone is used zero-shot: frames are pooled by `query`, and there is no radius. A checkpoint that
    is not finished has config["unfinished"], "step 34 of 279".
    """
    model, tokenizer, config = _load(name_or_path)
    if broken := not_finite(model.state_dict()):
        print(f"warning: {name_or_path}: weights that are not finite ({listed(broken)}): "
              "its scores mean nothing")
    if tokenizer is None:
        tokenizer = load_vocabulary()
        expected = model.clip.config["vocab_size"]
        if tokenizer.vocab_size != expected:
            raise WeightsError(f"{name_or_path}: a CLIP of {expected} tokens, and CLIP's "
                               f"vocabulary has {tokenizer.vocab_size}: without training, only "
                               "CLIPs with that vocabulary can be used")
        tokenizer.context_length = model.clip.config["context_length"]
    return model.eval(), tokenizer, config


def _load(name_or_path):
    """As `load_checkpoint`, but the tokenizer is None for a CLIP that comes without."""
    kind, _, name = str(name_or_path).partition(":")
    if kind in ENCODERS and kind != "clip":
        clip = ENCODERS[kind](*filter(None, [name]))
        if file := getattr(clip, "file", None):
            sd = _state_dict_in(read_weights(file), file)
            load_strictly(clip.model, sd, f"open_clip's {name}")
        model = TMASS(clip, **method_of({}))
        return model, clip.tokenizer, dict(zero_shot=True, frames=model.frames)
    path = find_weights(name_or_path)
    content = read_weights(path)
    if content.get("format") == "tmass":
        return build_own(content, path)
    sd = _state_dict_in(content, path)
    what = "not a CLIP with a vision transformer, nor a checkpoint of T-MASS, X-Pool or train.py"
    with explained(path, what, f"found {listed(sd)}; for other models give open_clip:NAME"):
        model, config = _build_foreign(sd, path)
    return model, None, config


RELEASED_NAMES = {  # part of a name in a released checkpoint -> here; in this order
    "pool_frames.": "pool.",
    "stochastic.std_branch.": "radius.",
    "cross_attn.": "",
    "_proj.": ".",
    "layer_norm": "ln",
}


def _build_foreign(sd, path):
    """A released checkpoint (HF's CLIP, pool_frames, stochastic) or a CLIP. -> (model, config)"""
    inside = {key[5:]: x for key, x in sd.items() if key.startswith("clip.")}
    head = {key: x for key, x in sd.items() if inside and not key.startswith("clip.")}
    head.pop("stochastic.std_branch.learnable_scalar", None)  # the released code never reads it
    if others := [key for key in head if not key.startswith(("pool_frames.", "stochastic."))]:
        raise WeightsError(f"beside a CLIP, it has another model's {listed(others)}")
    head = {renamed(key, RELEASED_NAMES): x for key, x in head.items()}
    clip = _build_clip(inside or sd, path)
    model = TMASS(clip, **method_of(head))
    own = {f"clip.{key}": x for key, x in clip.state_dict().items()}
    load_strictly(model, own | head, "the released code's model")
    try_out(model, torch.zeros(1, 3, dtype=torch.long))
    kind = "released" if head else "zero_shot"
    return model, {kind: True, "frames": model.frames}


def method_of(head):
    """The settings of TMASS for a released checkpoint's tensors beside CLIP; {}: CLIP alone."""
    if "radius.linear.weight" in head:
        frames = head["radius.linear.weight"].shape[1]
        return dict(frames=frames, prior="uniform", support_video="batch")
    pooling = "xpool" if head else "query"
    return dict(radius="none", support_weight=0.0, pooling=pooling)


def _build_clip(sd, path):
    """A CLIP of OpenAI, or in Hugging Face's form; print its settings."""
    settings = {}
    origin = "OpenAI's names: QuickGELU"
    if any(re.search(r"(base_model|base_layer|lora_\w+)\.", key) for key in sd):
        raise WeightsError(f"it holds an adapter: {MERGE}")
    if any(key.startswith("text_model.") for key in sd):
        sd = to_openai_names(sd)
        settings = hf_settings(path.parent, sizes_of(sd)["image_size"])
        known = "quick_gelu" in settings
        origin = f"heads and activation {'by' if known else 'guessed without its'} config.json"
    elif (path.parent / CONFIG).exists() or re.search("open_?clip|laion|datacomp", path.name, re.I):
        raise WeightsError("open_clip's, which knows its settings: give open_clip:NAME="
                           f"{path} with its name of the model, or open_clip:local-dir:FOLDER")
    with torch.device("meta"):  # no memory or random numbers: the weights follow
        clip = CLIP(**sizes_of(sd) | settings)
    load_strictly(clip, sd, "CLIP")
    print(f"CLIP from {path} ({origin}): {shown(clip.config)}")
    return clip


def load_model(ckpt, job, pooling=None, frames=None, prior=None, prior_std=None):
    """`load_checkpoint` on the job's device, with other settings than in training where given."""
    # The first process may have to download the weights, which the others then find.
    with job.first_alone():
        model, tokenizer, config = load_checkpoint(ckpt)
    asked = dict(pooling=pooling, frames=frames, prior=prior, prior_std=prior_std)
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked:
        try:
            model.radius(torch.zeros(frames or model.frames))
        except (ValueError, RuntimeError) as error:
            raise WeightsError(f"--frames {frames}: {error}") from None
        as_trained = model.state_dict()
        model = TMASS(model.clip, **model.config | asked).eval()
        # Another pooling has no use for the weights of the one in training.
        kept = {name: x for name, x in as_trained.items() if name in model.state_dict()}
        load_strictly(model, kept, f"--pooling {pooling}, for which {ckpt} has no weights")
    return model.to(job.device), tokenizer, config
