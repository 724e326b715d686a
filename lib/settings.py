"""Settings in the files beside other projects' weights: heads, norms, activation, pixels."""
from lib.common import WeightsError
from lib.tables import read_json
from lib.validate import explained

# The settings of a tower in open_clip_config.json that may be set. Sizes follow from the weights,
# and patch dropout matters in training only. Any other setting changes what is computed.
OPEN_CLIP = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio",
             "patch_dropout", "context_length", "vocab_size", "heads"}


def settings_beside(path, sd):
    """What tensors don't tell. -> (arguments of CLIP, why this activation, where heads are from)

    It is read from the settings files beside the weights or, without them, guessed from the origin
    of the weights. path: the file with the state dict sd. Raises WeightsError for settings that
    clip_model.CLIP does not support.
    """
    hf = any("text_model." in key for key in sd)
    file = path.with_name("config.json" if hf else "open_clip_config.json")
    content = read_settings(file)
    # Hugging Face has a separate file for the mean and std of pixels; open_clip does not.
    pixels = read_settings(path.with_name("preprocessor_config.json")) if hf else {}
    with explained(path.parent, "not readable as a CLIP's settings", "get its .json files again"):
        found = pixel_settings(pixels, "image_")
        section = "vision_config" if hf else "model_cfg"
        if section not in content:
            found["quick_gelu"], why = activation_by_origin(path, sd, hf)
            return found, why, "guessed: usual width"
        found |= hf_settings(content) if hf else open_clip_settings(content, sd)
    return found, f"by {file}", f"by {file.name}"


def read_settings(file):
    """The dict in a JSON file; {} if there is no such file."""
    return read_json(file, "the weights beside it", dict) if file.is_file() else {}


def activation_by_origin(path, sd, hf):
    """Guess which GELU weights without settings were trained with. -> (quick_gelu, why)"""
    if hf:
        return True, "HF's default; to be sure, put its config.json beside the file"
    if "input_resolution" in sd:
        return True, "OpenAI's"
    # Any other file is from open_clip, whose own models use GELU.
    name = path.name.lower().replace("_", "")
    if "quickgelu" in name or "openai" in name:
        return True, ("an open_clip file with quickgelu or openai in its name; to change: "
                      "--activation gelu")
    return False, ("an open_clip file without quickgelu or openai in its name; to change: "
                   "--activation quickgelu")


def hf_settings(content):
    """Arguments of CLIP from a CLIPConfig, which omits settings that have their default."""
    towers = [content["vision_config"], content.get("text_config", {})]
    vision, text = towers
    hidden_act = the_same("hidden_act", towers, "quick_gelu")
    if hidden_act not in ("quick_gelu", "gelu"):
        raise WeightsError(f"hidden_act is {hidden_act!r}, expected quick_gelu or gelu")
    return dict(
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


def open_clip_settings(content, sd):
    """Arguments of CLIP from an open_clip_config.json."""
    model = content["model_cfg"]
    vision = model.get("vision_cfg", {})
    text = model.get("text_cfg", {})
    for key, value in [*vision.items(), *text.items()]:
        if value and key not in OPEN_CLIP:
            raise WeightsError(f"{key} is {value!r}, which clip_model.CLIP does not compute: use "
                               "--clip open_clip:NAME=FILE")
    width = len(sd["visual.conv1.weight"])
    found = dict(
        vision_heads=width // vision.get("head_width", 64),
        text_heads=text.get("heads", 8),
        quick_gelu=bool(model.get("quick_gelu", False)),
    )
    return found | pixel_settings(content.get("preprocess_cfg", {}))


def pixel_settings(content, prefix=""):
    """The mean and std that normalise pixels, as far as they are set. -> arguments of CLIP"""
    found = {}
    for key in content.keys() & {prefix + "mean", prefix + "std"}:
        try:
            red, green, blue = map(float, content[key])
        except (TypeError, ValueError):
            raise WeightsError(f"{key} is {content[key]!r:.60}, expected three numbers") from None
        found[key.removeprefix(prefix)] = (red, green, blue)
    return found


def described(clip, why, heads_by):
    """A line about a CLIP: its size, what was guessed, and what is unusual."""
    config = clip.config
    millions = sum(p.numel() for p in clip.parameters()) / 1e6
    heads = [tower.transformer.resblocks[0].attn.heads for tower in (clip.visual, clip)]
    name = "QuickGELU" if config["quick_gelu"] else "GELU"
    line = (f"{millions:.1f} M parameters, {clip.image_size} px images in patches of "
            f"{config['patch_size']}, {heads[0]} and {heads[1]} heads ({heads_by}), {name} ({why})")
    if "mean" in config or "std" in config:
        line += f", pixels normalised by {clip.mean_std.flatten(1).tolist()}"
    return line
