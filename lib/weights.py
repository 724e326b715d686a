"""Weights and checkpoints: OpenAI, Hugging Face, open_clip, released T-MASS and X-Pool, and our own."""
import errno
import hashlib
import http.client
import json
import os
import secrets
import warnings
import zipfile
from pathlib import Path

import torch

from clip_model import CLIP, Tokenizer, WeightsError, listed, load_strictly
from tmass import TMASS

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
VOCABULARY_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MODELS = {  # name -> file, SHA-256
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
}


def load_vocabulary():
    """CLIP's vocabulary, from the cache folder or downloaded on first use -> Tokenizer."""
    return Tokenizer.from_file(fetch(VOCABULARY_URL, VOCABULARY_SHA256))


def fetch(url, sha256):
    """Path of a file in the cache folder (TMASS_CACHE, else ~/.cache/tmass): downloaded once; SHA-256 checked."""
    folder = Path(os.environ.get("TMASS_CACHE") or "~/.cache/tmass").expanduser()
    path = folder / url.rsplit("/", 1)[-1]
    try:
        if path.is_file():
            found = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    found.update(chunk)
            if found.hexdigest() == sha256:
                return path
            print(f"{path}: wrong SHA-256 (a partial or another file), downloading it again")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}", flush=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)  # renamed when the hash is right
        return path
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise WeightsError(f"{path.name}: could not be had from {url}: {error}; put the file with SHA-256 {sha256} at "
                           f"{path} (TMASS_CACHE sets another folder)") from None


def read_weights(path):
    """TorchScript archive, torch.save or .safetensors file -> the dict in it: a state dict, or one with it inside."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {'a folder; name the weights file in it' if path.is_dir() else 'no such file'}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else ()
        if any(name.endswith("/constants.pkl") for name in names):  # TorchScript
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, OpenAI's files stay what they are
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise WeightsError(f"{path}: reading .safetensors needs a package: pip install safetensors") from None
    except Exception as error:  # a file of another kind fails in pickle, zip or torch, each with errors of its own
        why = ("it holds Python objects beside tensors, and loading those could run any code" if "GLOBAL" in str(error)
               else "truncated, or not a TorchScript archive, torch.save or .safetensors file")
        raise WeightsError(f"{path}: no readable weights: {why}") from None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise WeightsError(f"{path}: no readable weights: expected a dict of named tensors, found another "
                           f"{type(weights).__name__}")
    return weights


HF_NAMES = {  # part of a name in transformers' CLIPModel -> in OpenAI's CLIP; in this order
    "vision_model.": "visual.", "text_model.": "", "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection", "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.": "", "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post", "final_layer_norm": "ln_final", "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_", "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}


def to_openai_names(sd):
    """State dict of HF's CLIPModel, of either open_clip class or of OpenAI's CLIP -> the same under OpenAI's names."""
    if not_tensors := [k for k, v in sd.items() if not torch.is_tensor(v)]:
        raise WeightsError(f"expected a state dict, a dict of tensors; these are none: {listed(not_tensors)}")
    sd = {k.removeprefix("text."): v for k, v in sd.items()}  # CustomTextCLIP's
    if not any(k.startswith("text_model.") for k in sd):
        return sd
    named = {}
    for key, value in sd.items():
        for theirs, openai in HF_NAMES.items():
            key = key.replace(theirs, openai)
        if not key.endswith("position_ids"):  # 0, 1, 2, ...
            named[key] = value.T.contiguous() if key in ("visual.proj", "text_projection") else value
    for key in [k for k in named if ".attn.q_proj." in k]:
        parts = [key.replace("q_proj", p) for p in ("q_proj", "k_proj", "v_proj")]
        if lost := [p for p in parts if p not in named]:
            raise WeightsError(f"weights that don't fit a CLIP with a vision transformer, missing: {listed(lost)}")
        named[key.replace("q_proj.", "in_proj_")] = torch.cat([named.pop(p) for p in parts])
    return named


def activation(weights, sd, path):
    """Which GELU the weights were trained with: files don't say in their tensors -> (quick_gelu, why).

    1. our checkpoints record it; 2. so does config.json (HF) or open_clip_config.json beside a file of those projects;
    3. HF names and OpenAI's archives (known by their input_resolution) are QuickGELU; 4. any other file is open_clip's:
    QuickGELU if its name has "quickgelu" or "openai" in it, else GELU (LAION, DataComp). The user's word goes first.
    """
    if isinstance(weights.get("clip"), dict) and "quick_gelu" in weights["clip"]:
        return weights["clip"]["quick_gelu"], "recorded in this checkpoint"
    hf = any("text_model." in k for k in sd)
    beside = path.with_name("config.json" if hf else "open_clip_config.json")
    if beside.is_file():
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
            if hf and "vision_config" in config:
                return config["vision_config"].get("hidden_act", "quick_gelu") == "quick_gelu", f"by {beside}"
            if not hf and "model_cfg" in config:
                return bool(config["model_cfg"].get("quick_gelu", False)), f"by {beside}"
        except (ValueError, AttributeError) as error:
            raise WeightsError(f"{beside}: not readable as JSON settings: {error}") from None
    if hf:
        return True, "HF's default; a config.json beside the file would tell"
    if "input_resolution" in sd:
        return True, "OpenAI's"
    if any(word in path.name.lower().replace("_", "") for word in ("quickgelu", "openai")):
        return True, "an open_clip file with quickgelu or openai in its name; to change: --activation gelu"
    return False, "an open_clip file without quickgelu or openai in its name; to change: --activation quickgelu"


def find_weights(name_or_path):
    """"ViT-B/32", "ViT-B/16", "ViT-L/14" (downloaded on first use), or a file -> its path."""
    if name_or_path in MODELS:
        file, sha256 = MODELS[name_or_path]
        return fetch(f"{OPENAI_URL}/{sha256}/{file}", sha256)
    path = Path(name_or_path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file, and none of the names {', '.join(MODELS)}")
    return path


def load_clip(name_or_path, quick_gelu=None):
    """A name or a file (`find_weights`) -> CLIP in float32; says what it loaded and with which activation.

    Files: OpenAI's archives, state dicts of HF's CLIPModel and of open_clip, checkpoints of this project and of T-MASS
    and X-Pool as released, of which it takes the CLIP part. quick_gelu=None: by the rule of `activation`.
    """
    path = find_weights(name_or_path)
    return clip_from(read_weights(path), path, quick_gelu)


def clip_from(weights, path, quick_gelu=None):
    """The CLIP in what `read_weights` found in a file."""
    sd = state_dict_in(weights)
    sd = {k.removeprefix("clip."): v for k, v in sd.items() if k.startswith("clip.")} or sd
    try:
        quick, why = activation(weights, sd, path) if quick_gelu is None else (quick_gelu, "as told")
        clip = CLIP.from_state_dict(to_openai_names(sd), quick)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    millions = sum(p.numel() for p in clip.parameters()) / 1e6
    print(f"CLIP from {path}: {millions:.1f} M parameters, {clip.config['image_size']} px images in patches of "
          f"{clip.config['patch_size']}, {'QuickGELU' if quick else 'GELU'} ({why})")
    return clip


def state_dict_in(weights):
    """The state dict that a checkpoint holds, or is, without DistributedDataParallel's prefix."""
    sd = next((weights[k] for k in ("model", "state_dict") if isinstance(weights.get(k), dict)), weights)
    return {str(k).removeprefix("module."): v for k, v in sd.items()}


# ---- checkpoints ----

def save_checkpoint(path, model, tokenizer, config, weights=None, **state):
    """Write one self-contained file: config, weights (the model's, unless others are given), tokenizer, state.

    state: tensors and plain values only. Written beside the target under a name of its own, flushed to disk, renamed:
    a kill at any moment leaves the old file or the new one. Refuses weights that are not finite. Raises WeightsError.
    """
    path = os.fspath(path)
    kept = f"an earlier {path}, if any, is intact"
    content = dict(format="tmass", version=1, config=config, clip=model.clip.config, tmass=model.config,
                   model=model.state_dict() if weights is None else weights,
                   merges=list(tokenizer.merges), context_length=tokenizer.context_length, **state)
    if broken := not_finite(content["model"]) or weights is not None and not_finite(model.state_dict()):
        raise WeightsError(f"checkpoint {path} not written: weights that are not finite ({listed(broken)}); {kept}")
    part = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"cannot write checkpoint {path}: {cause(error)}; {kept}") from error
    finally:
        if os.path.exists(part):
            os.unlink(part)


def cause(error):
    """Why a file could not be written; torch raises a RuntimeError of its own, with the system's error behind it."""
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    return "no space left on the disk" if getattr(error, "errno", 0) == errno.ENOSPC else str(error).splitlines()[0]


def not_finite(state):
    """The names of tensors with a value that is no number or infinite."""
    suspects = {name: x for name, x in state.items() if not x.sum().isfinite()}  # 10 times faster than isfinite()
    return [name for name, x in suspects.items() if not x.isfinite().all()]


def load_checkpoint(name_or_path, activation=None):
    """A name or file of weights -> (model in eval mode on the CPU, tokenizer, config dict).

    A checkpoint of ours, or a released T-MASS or X-Pool one; or any CLIP that `load_clip` takes, by name or file: then
    nothing was trained further, frames are pooled by `query`, and radius is none (config: zero_shot=True).
    activation: quickgelu or gelu, where what the file says of it is wrong.
    """
    path, quick_gelu = find_weights(name_or_path), None if activation is None else activation == "quickgelu"
    content = read_weights(path)
    load = _load_ours if content.get("format") == "tmass" else _load_foreign
    model, tokenizer, config = load(content, path, quick_gelu)
    if broken := not_finite(model.state_dict()):
        print(f"warning: {path}: weights that are not finite ({listed(broken)}): its scores mean nothing")
    return model.eval(), tokenizer, config


def _load_ours(content, path, quick_gelu):
    """What save_checkpoint wrote -> (model, tokenizer, config)."""
    try:
        if content["version"] != 1:
            raise WeightsError(f"it is of version {content['version']}, and this program reads version 1")
        sizes = content["clip"] if quick_gelu is None else dict(content["clip"], quick_gelu=quick_gelu)
        with torch.device("meta"):  # no memory, no random numbers: the weights are given
            model = TMASS(CLIP(**sizes), **content["tmass"])
        load_strictly(model, {k: x.float() for k, x in content["model"].items()}, "its own settings")
        return model, Tokenizer(content["merges"], content["context_length"]), dict(content["config"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise WeightsError(f"{path}: a checkpoint of train.py that can't be used: {why}; "
                           "use the program that wrote it, or train again") from None


RELEASED_NAMES = {"pool_frames.": "pool.", "stochastic.std_branch.": "radius.", "cross_attn.": "", "_proj.": ".",
                  "layer_norm": "ln"}  # part of a name there -> here


def _load_foreign(content, path, quick_gelu):
    """A released checkpoint (HF's CLIP, pool_frames, stochastic), or a CLIP alone -> (model, tokenizer, config)."""
    state, head = state_dict_in(content), {}
    released = any(key.startswith("pool_frames.") for key in state)
    try:
        clip = clip_from(content, path, quick_gelu)
    except WeightsError as error:
        also = "" if released else "; nor is it a checkpoint of train.py or of the released code"
        raise WeightsError(f"{error}{also}") from None
    for key, x in state.items() if released else ():
        if not key.startswith("clip.") and key != "stochastic.std_branch.learnable_scalar":  # never used
            for theirs, ours in RELEASED_NAMES.items():
                key = key.replace(theirs, ours)
            head[key] = x.float()
    if "radius.linear.weight" in head:
        method = dict(frames=head["radius.linear.weight"].shape[1], prior="uniform", support_video="batch")
    else:  # X-Pool, or nothing trained at all
        method = dict(radius="none", support_weight=0.0, pooling="xpool" if released else "query")
    model, tokenizer = TMASS(clip, **method), load_vocabulary()
    load_strictly(model, {**{"clip." + k: x for k, x in clip.state_dict().items()}, **head}, f"the model of {path}")
    if tokenizer.vocab_size != clip.config["vocab_size"]:
        raise WeightsError(f"{path}: a CLIP of {clip.config['vocab_size']} tokens, and CLIP's vocabulary has "
                           f"{tokenizer.vocab_size}: without training, only CLIPs with that vocabulary can be used")
    tokenizer.context_length = clip.config["context_length"]
    return model, tokenizer, dict({"released" if released else "zero_shot": True}, frames=model.frames)
