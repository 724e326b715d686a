"""Settings in the files beside other projects' weights: heads, norms, activation, pixels."""
import re

from lib.common import WeightsError, explained
from lib.tables import read_json

# How the names of a tower's settings in open_clip_config.json begin that may have any value. Sizes
# follow from the weights, patch dropout matters in training only, and the last three rows matter
# only beside a setting that is refused, such as timm_model_name.
OPEN_CLIP = (
    "image_size", "patch_", "width", "layers", "head", "mlp_ratio", "context_length", "vocab_size",
    "eos_id", "pad_id",
    "attn_pooler_",
    "timm_",
    "hf_",
)
# The usual values of other settings. Any other value changes what is computed.
USUAL = ("tok", "argmax", "learnable", "linear", "default")


def settings_beside(path, sd):
    """What tensors don't tell. -> (arguments of CLIP, why this activation, where heads are from)

    It is read from the settings files beside the weights or, without them, guessed from the origin
    of the weights. path: the file with the state dict sd. Raises WeightsError for settings that
    clip_model.CLIP does not support.
    """
    hf = any("text_model." in key for key in sd)
    file = path.with_name("config.json" if hf else "open_clip_config.json")
    content = _read_settings(file)
    # Hugging Face has a separate file for what is done to images; open_clip does not.
    images = content.get("preprocess_cfg") or {}
    if hf:
        images = _read_settings(path.with_name("preprocessor_config.json"))
    with explained(path.parent, "not readable as a CLIP's settings", "get its .json files again"):
        if hf:
            images = _as_open_clip(images)
        found = _pixel_settings(images)
        section = "vision_config" if hf else "model_cfg"
        if any(name.startswith(section) for name in content):
            vision, more = _hf_settings(content) if hf else _open_clip_settings(content, sd)
            found |= more
            if "image_size" in vision:
                side = max(_sides(vision["image_size"]))
                if side % vision.get("patch_size", side):
                    raise WeightsError(f"image_size is {side}, expected a multiple of patch_size")
                found["image_size"] = side
            why, heads_by = f"by {file}", f"by {file.name}"
        else:
            found["quick_gelu"], why = _activation_by_origin(path, sd, hf)
            heads_by = "guessed: usual width"
    return found, why, heads_by


def _read_settings(file):
    """The dict in a JSON file; {} if there is no such file."""
    return read_json(file, "the weights beside it", dict) if file.is_file() else {}


def _activation_by_origin(path, sd, hf):
    """Guess which GELU weights without settings were trained with. -> (quick_gelu, why)"""
    if hf:
        return True, "HF's default; to be sure, put its config.json beside the file"
    if "input_resolution" in sd:
        return True, "OpenAI's"
    # Any other file is from open_clip, whose own models use GELU.
    name = path.name.lower().replace("_", "")
    quick = "quickgelu" in name or "openai" in name
    return quick, (f"an open_clip file with{'' if quick else 'out'} quickgelu or openai in its "
                   "name; for its own settings: open_clip:NAME=FILE")


def _hf_settings(content):
    """A CLIPConfig, which omits settings that have their default. -> as `_open_clip_settings`"""
    # In older files that have both, vision_config_dict counts.
    towers = [content.get(f"{name}_config_dict") or content.get(f"{name}_config") or {}
              for name in ("vision", "text")]
    vision, text = towers
    hidden_act = the_same("hidden_act", towers, "quick_gelu")
    if hidden_act not in ("quick_gelu", "gelu"):
        raise WeightsError(f"hidden_act is {hidden_act!r}, expected quick_gelu or gelu")
    return vision, dict(
        vision_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
        norm_eps=the_same("layer_norm_eps", towers, 1e-5),
        quick_gelu=hidden_act == "quick_gelu",
    )


def the_same(name, towers, default):
    """A setting that must be the same in both towers."""
    images, texts = [tower.get(name, default) for tower in towers]
    if images != texts:
        raise WeightsError(f"{name} is {images} for images and {texts} for texts, and "
                           "clip_model.CLIP has one for both")
    return images


def _sides(size):
    """The different numbers in a size: a number, or a list or dict of two. -> set"""
    return set(map(int, re.findall("[0-9.]+", str(size))))


def _open_clip_settings(content, sd):
    """An open_clip_config.json -> (settings of its image tower, arguments of CLIP)"""
    model = content["model_cfg"]
    vision = model.get("vision_cfg") or {}
    text = model.get("text_cfg") or {}
    for key, value in [*vision.items(), *text.items()]:
        allowed = key.startswith(OPEN_CLIP) and not key.endswith("_name")
        if value and value not in USUAL and not allowed:
            raise WeightsError(f"{key} is {value!r}, which clip_model.CLIP does not compute: use "
                               "--clip open_clip:local-dir:FOLDER")
    width = len(sd["visual.conv1.weight"])
    return vision, dict(
        vision_heads=width // vision.get("head_width", 64),
        text_heads=text.get("heads", 8),
        quick_gelu=model.get("quick_gelu") or False,
    )


def _as_open_clip(images):
    """The settings of Hugging Face's CLIPImageProcessor -> those of open_clip's preprocess_cfg"""
    size = images.get("size") or 224
    crop = images.get("crop_size") or size
    if images.get("do_center_crop", True) and _sides(size) != _sides(crop):
        raise WeightsError(f"size is {size} and crop_size {crop}, expected the same")
    normalised = images.get("do_normalize", True)
    return dict(
        mean=images.get("image_mean") if normalised else [0, 0, 0],
        std=images.get("image_std") if normalised else [1, 1, 1],
        resize_mode="squash" if "height" in str(size) else "shortest",
        interpolation={2: "bilinear", 3: "bicubic"}.get(images.get("resample", 3), "another"),
    )


def _pixel_settings(content):
    """How images are resized and pixels normalised, as far as it is set. -> arguments of CLIP"""
    mode = content.get("resize_mode") or "shortest"
    interpolation = content.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise WeightsError(f"resize is {mode}, {interpolation}: expected shortest or squash, "
                           "bicubic or bilinear")
    found = dict(resize=(mode, interpolation))
    for key in ("mean", "std"):
        numbers = content.get(key)
        if numbers is None:
            continue
        try:
            red, green, blue = map(float, numbers)
        except (TypeError, ValueError):
            raise WeightsError(f"image_{key} is {numbers!r:.60}, expected three numbers") from None
        found[key] = (red, green, blue)
    return found


def described(clip, why, heads_by):
    """A line about a CLIP: its size, what was guessed, and what is unusual."""
    config = clip.config
    millions = sum(p.numel() for p in clip.parameters()) / 1e6
    heads = [tower.transformer.resblocks[0].attn.heads for tower in (clip.visual, clip)]
    name = "QuickGELU" if config["quick_gelu"] else "GELU"
    line = (f"{millions:.1f} M parameters, {clip.image_size} px images in patches of "
            f"{config['patch_size']}, {heads[0]} and {heads[1]} heads ({heads_by}), {name} ({why})")
    if config.keys() & {"mean", "std", "resize"}:
        line += (f", pixels normalised by {clip.mean_std.flatten(1).tolist()}, resized by "
                 f"{' '.join(clip.resize)}")
    return line
