"""The image-text models that a run can be built on: ENCODERS, at the end, name -> class.

An encoder is an nn.Module with

    encode_text(ids (N,L)) -> (N,D)
    encode_image(pixels (N,3,P,P)) -> (N,D), of uint8 pixels, which it normalises itself
    logit_scale    a parameter (): the logarithm of the factor that cosines are multiplied by
    embed_dim      D
    image_size     P
    tokenizer      list of N str -> ids (N,L); with its `context_length`, captions that are cut are
                   counted (clip_model.CLIP has none: its tokenizer is learnt or loaded beside it)
    config         plain values: the arguments with which its class builds it again, without weights
    resize         optional: (mode, interpolation) of data.test_transform, where it is not CLIP's

With a class and its entry in ENCODERS, all programs have it: `--clip NAME` is ENCODERS[NAME](), and
`--clip NAME:TEXT` is ENCODERS[NAME](TEXT).
"""
import contextlib
import copy
import json
import logging
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from clip_model import CLIP
from lib.common import WeightsError, first_line

CONFIG = "open_clip_config.json"


def shown(settings):
    """Settings on one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@contextlib.contextmanager
def _explaining(what):
    """Turn any error of open_clip or of its downloads into a WeightsError of one line."""
    logging.disable(logging.WARNING)  # it reports every attempt to download
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # of timm, transformers, huggingface_hub, the network ...
        raise WeightsError(f"{what}: {first_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)


# hf-hub: and local-dir: include their weights. A folder may be called lr=1e-5, with a "=".
NAME = re.compile("(?s)(local-dir:.*|hf-hub:[^=]*|[^/=]*)(?:/([^=]*))?(?:=(.*))?")


def _wanted_by(library, name, tag):
    """The settings that open_clip records for its weights of a model, for one tag or for all.

    -> ({setting: value} on which they agree, [setting on which they differ])
    """
    known = library.list_pretrained_tags_by_model(name)
    wanted = [library.get_pretrained_cfg(name, each) for each in ([tag] if tag else known)]
    if not all(wanted):
        raise WeightsError(f"open_clip:{name}: open_clip has no weights {tag} for it; it has "
                           f"{', '.join(known) or 'none'}")
    agreed = {}
    differing = []
    for key in ("mean", "std", "interpolation", "resize_mode", "quick_gelu"):
        values = {settings.get(key) for settings in wanted}
        if len(values) == 1:
            agreed[key] = values.pop()
        elif values:
            differing.append(key)
    return agreed, differing


@contextlib.contextmanager
def source(name, files):
    """Where open_clip finds a model: its name, or a folder with the files that a checkpoint keeps.

    files: list of (name, content) from `kept`.
    """
    if not files:
        yield name
        return
    with TemporaryDirectory() as folder:
        for file, content in files:
            # The base name alone: nothing is written outside of the folder.
            Path(folder, Path(file).name).write_bytes(content.encode("latin-1"))
        path = Path(folder, CONFIG)
        config = json.loads(path.read_text())
        text_cfg = config["model_cfg"]["text_cfg"]
        if "hf_model_name" in text_cfg:
            text_cfg["hf_model_name"] = folder
        if "hf_tokenizer_name" in text_cfg:
            # Loading a checkpoint must not run code that came with it.
            text_cfg.setdefault("tokenizer_kwargs", {})["trust_remote_code"] = False
        path.write_text(json.dumps(config))
        yield f"local-dir:{folder}"


def kept(model, tokenizer, model_cfg):
    """What a checkpoint needs to rebuild model and tokenizer. -> files, as `source` takes them

    CLIP's own vocabulary is not included: it comes with open_clip.
    """
    text_config = getattr(getattr(model, "text", None), "config", None)  # a tower of transformers
    with TemporaryDirectory() as folder:
        for part in (tokenizer, text_config):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        Path(folder, CONFIG).write_text(json.dumps(dict(model_cfg=model_cfg)))
        # As text, one character per byte, because torch cannot load empty bytes again.
        paths = Path(folder).glob("*.*")
        return [(path.name, path.read_bytes().decode("latin-1")) for path in paths]


class OpenCLIP(nn.Module):
    """A model of open_clip. Its tokenizer always pads to the full length.

    open_clip: NAME there with random weights, NAME/TAG with those of a tag, hf-hub:ORG/MODEL or
    local-dir:FOLDER with their own; NAME=FILE leaves those of FILE to the caller, as does
    NAME/TAG=FILE with the settings of a tag. quick_gelu: overrides the settings. files: see
    `source`. settings: the rest of config; given with them, no weights are loaded.
    """

    def __init__(self, open_clip="", quick_gelu=None, files=(), **settings):
        super().__init__()
        try:
            import open_clip as library
        except ImportError as error:
            raise WeightsError("models of open_clip need a package: pip install open_clip_torch "
                               f"({error})") from None
        name, tag, self.file = NAME.fullmatch(open_clip).groups()
        trained = bool(tag or ":" in name) and not self.file and not settings
        agreed, differing = _wanted_by(library, name, tag)
        # Some models with GELU have tags, such as openai, that were trained with QuickGELU.
        if quick_gelu is None:
            quick_gelu = bool(agreed.get("quick_gelu"))
        with source(name, files) as place:
            # First, as the weights may be gigabytes to download.
            with _explaining(f"open_clip:{name}: its vocabulary can't be loaded"):
                self.tokenizer = library.get_tokenizer(place)
            with _explaining(f"open_clip:{name}"):
                model_cfg = library.get_model_config(place)
                self.model = library.create_model(
                    place,
                    tag if trained else None,
                    load_weights=trained,
                    require_pretrained=trained,
                    force_quick_gelu=quick_gelu,
                    force_preprocess_cfg=agreed,
                    pretrained_text=False,
                )
                # save_checkpoint stores `merges` of any tokenizer.
                self.tokenizer.merges = files or kept(self.model, self.tokenizer, model_cfg)
        pixels = library.transform.PreprocessCfg(**library.get_model_preprocess_cfg(self.model))
        height, width = library.utils.to_2tuple(pixels.size)
        if height != width or pixels.resize_mode == "longest":
            raise WeightsError(f"open_clip:{name}: images of {height} x {width}, resized by "
                               f"{pixels.resize_mode}, are not supported")
        self.config = dict(
            open_clip=name,
            quick_gelu=quick_gelu,
            image_size=height,
            mean=tuple(pixels.mean),
            std=tuple(pixels.std),
            resize=(pixels.resize_mode, pixels.interpolation),
        ) | settings
        self.embed_dim = model_cfg["embed_dim"]
        self.image_size = height
        self.resize = self.config["resize"]
        mean_std = torch.tensor([self.config["mean"], self.config["std"]]).view(2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)
        self.eval()
        if differing and self.file:
            print(f"warning: open_clip's own weights of {name} differ in {', '.join(differing)}: "
                  f"give the tag that fits the file: open_clip:{name}/TAG={self.file}")
        if not settings:
            origin = "trained" if trained or self.file else "random weights: give NAME/TAG or =FILE"
            print(f"open_clip:{open_clip} ({origin}): {shown(self.config)}")

    @property
    def visual(self):
        """The image tower."""
        return self.model.visual

    @property
    def logit_scale(self):
        """The logarithm of the factor that cosines are multiplied by, a parameter ()."""
        return self.model.logit_scale

    def encode_image(self, images):
        """images (N,3,P,P) -> (N,D). uint8 is normalised here; floats must be already."""
        if images.dtype == torch.uint8:
            mean, std = self.mean_std
            images = (images / 255 - mean) / std
        return self.model.encode_image(images)

    def encode_text(self, ids):
        """ids (N,L) -> (N,D)."""
        return self.model.encode_text(ids)


ENCODERS = dict(clip=CLIP, open_clip=OpenCLIP)


def say_cut(job, tokenizer, captions, what):
    """Print how many captions are too long for the encoder, whose tokenizer may be any."""
    most = getattr(tokenizer, "context_length", None)
    if not most:
        return
    empty, full = tokenizer(["", "a " * most])
    padding = empty.mode().values
    longer = copy.copy(tokenizer)
    longer.context_length = 2 * most
    # A token takes at least one byte, except start, end and one more: skip short captions quickly.
    cut = [x for x in captions if len(x.encode()) > most - 4
           and (longer([x]) != padding).sum() > (full != padding).sum()]
    if cut:
        job.say(f"{what}: {len(cut)} captions are longer than the encoder's {most} tokens, and "
                f"are cut; the first: {cut[0]!r:.60}")
