"""Settings that stand in files beside other people's weights: heads, norms, activation, pixels."""
import json

from lib.common import WeightsError

# What CLIP takes of each tower's settings in open_clip_config.json; the sizes are read off the
# weights, patch dropout is for training alone, and anything else changes what is computed.
OPEN_CLIP = {
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio",
                   "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}


GUESSED = "guessed: usual width"


def settings_beside(path, sd, shapes):
    """What tensors don't tell. -> (arguments of CLIP, why this activation, where heads are from)

    By the settings file beside the weights, else by where these come from. path: the file that has
    the state dict sd. shapes: the sizes that it tells. Raises WeightsError for settings that CLIP
    would not compute.
    """
    hf = any("text_model." in key for key in sd)
    file = path.with_name("config.json" if hf else "open_clip_config.json")
    content = read_settings(file)
    section = "vision_config" if hf else "model_cfg"
    # Hugging Face keeps what pixels are normalised with in a file of its own, open_clip does not.
    pixels = {}
    if hf:
        pixels = read_settings(path.with_name("preprocessor_config.json"))
    try:
        found = pixel_settings(pixels, "image_mean", "image_std")
        if section not in content:
            quick_gelu, why = activation_by_origin(path, sd, hf)
            return found | dict(quick_gelu=quick_gelu), why, GUESSED
        found |= hf_settings(content) if hf else open_clip_settings(content, shapes)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from None
    except (LookupError, ValueError, AttributeError, TypeError, ArithmeticError) as error:
        raise WeightsError(f"{file}: not readable as a CLIP's settings: {error!r}") from None
    return found, f"by {file}", f"by {file.name}"


def activation_by_origin(path, sd, hf):
    """Which GELU weights without settings were trained with. -> (quick_gelu, why)"""
    if hf:
        return True, "HF's default; a config.json beside the file would tell"
    if "input_resolution" in sd:
        return True, "OpenAI's"
    # Any other file is open_clip's, whose own models are GELU.
    name = path.name.lower().replace("_", "")
    quick_gelu = "quickgelu" in name or "openai" in name
    having = "with" if quick_gelu else "without"
    other = "gelu" if quick_gelu else "quickgelu"
    return quick_gelu, (f"an open_clip file {having} quickgelu or openai in its name; "
                        f"to change: --activation {other}")


def read_settings(file):
    """The dict in a file of JSON; {} where there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: not readable as JSON settings: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: not readable as JSON settings: no dict")
    return content


def hf_settings(content):
    """Of a CLIPConfig. It leaves out what is as CLIPVisionConfig and CLIPTextConfig have it."""
    vision = content["vision_config"]
    text = content.get("text_config", {})
    return dict(
        vision_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
        norm_eps=the_same("layer_norm_eps", vision, text, 1e-5),
        quick_gelu=quick(the_same("hidden_act", vision, text, "quick_gelu")),
    )


def open_clip_settings(content, shapes):
    """Of a CLIP of open_clip."""
    model = content["model_cfg"]
    towers = {}
    for name, known in OPEN_CLIP.items():
        towers[name] = model.get(name, {})
        for key, value in towers[name].items():
            if value and key not in known:
                raise WeightsError(f"{name}.{key} is {value!r}, which clip_model.CLIP does not "
                                   "compute: use --clip open_clip:NAME=FILE")
    head_width = towers["vision_cfg"].get("head_width", 64)
    found = dict(
        vision_heads=shapes["vision_width"] // head_width,
        text_heads=towers["text_cfg"].get("heads", 8),
        quick_gelu=bool(model.get("quick_gelu", False)),
    )
    return found | pixel_settings(content.get("preprocess_cfg", {}), "mean", "std")


def the_same(name, vision, text, default):
    """A setting that both towers must share here."""
    values = [tower.get(name, default) for tower in (vision, text)]
    if values[0] != values[1]:
        raise WeightsError(f"{name} is {values[0]} for images and {values[1]} for texts, and "
                           "clip_model.CLIP has one for both")
    return values[0]


def quick(hidden_act):
    """Whether an activation of transformers is QuickGELU."""
    if hidden_act not in ("quick_gelu", "gelu"):
        raise WeightsError(f"hidden_act is {hidden_act!r}, expected quick_gelu or gelu")
    return hidden_act == "quick_gelu"


def pixel_settings(content, mean, std):
    """What pixels are normalised with. -> arguments of CLIP, as far as they are there."""
    if mean not in content or std not in content:
        return {}
    for name in (mean, std):
        numbers = content[name]
        kinds = [type(x) for x in numbers] if isinstance(numbers, list) else []
        if len(kinds) != 3 or not {int, float}.issuperset(kinds):
            raise WeightsError(f"{name} is {numbers!r:.60}, expected three numbers")
    return dict(mean=tuple(content[mean]), std=tuple(content[std]))


def described(clip, why, heads_by):
    """A line about a CLIP: what of it was guessed, and what is unusual."""
    config = clip.config
    millions = sum(p.numel() for p in clip.parameters()) / 1e6
    heads = [tower.transformer.resblocks[0].attn.heads for tower in (clip.visual, clip)]
    name = "QuickGELU" if config["quick_gelu"] else "GELU"
    line = (f"{millions:.1f} M parameters, {clip.image_size} px images in patches of "
            f"{config['patch_size']}, {heads[0]} and {heads[1]} heads ({heads_by}), {name} ({why})")
    if "mean" in config or "std" in config:
        line += f", pixels normalised by {clip.mean_std.flatten(1).tolist()}"
    return line
