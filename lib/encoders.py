"""Other image-text models, of the package open_clip, behind the interface of clip_model.CLIP.

What TMASS needs of such a model: encode_text, encode_image, logit_scale, embed_dim, image_size,
resize, grad_checkpoint, and config, the arguments that build it again; and a tokenizer, texts ->
ids (N,L). To add another kind, write such a class and name it in lib/weights.py.
"""
import contextlib
import json
import logging
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from lib.common import WeightsError, first_line

PREFIX = "open_clip:"
CONFIG = "open_clip_config.json"


def package():
    """open_clip, where it is installed."""
    try:
        import open_clip
    except ImportError as error:
        raise WeightsError("models of open_clip need a package: pip install open_clip_torch "
                           f"({error})") from None
    return open_clip


@contextlib.contextmanager
def explaining(what):
    """The errors of open_clip, and of its downloads, as one line."""
    logging.disable(logging.WARNING)  # it tells of every try to download
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # of timm, transformers, huggingface_hub, the network ...
        raise WeightsError(f"{what}: {first_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)


# hf-hub: and local-dir: have weights of their own; a folder may be called lr=1e-5.
NAME = re.compile(f"(?s){PREFIX}" r"(local-dir:.*|hf-hub:[^=]*|[^/=]*)(?:/([^=]*))?(?:=(.*))?")


def split_name(name):
    """open_clip:NAME, open_clip:NAME/TAG, open_clip:NAME=FILE -> (NAME, TAG or None, FILE or None)

    NAME may be hf-hub:ORG/MODEL or local-dir:FOLDER. NAME/TAG=FILE: a file of the tag's kind.
    """
    return NAME.fullmatch(name).groups()


def wanted_by(name, tag):
    """What open_clip's weights of a model want, all of them or those of a tag.

    -> ({setting: value} on which they agree, [setting on which they differ])
    """
    library = package()
    known = library.list_pretrained_tags_by_model(name)
    wanted = [library.get_pretrained_cfg(name, each) for each in ([tag] if tag else known)]
    if not all(wanted):
        raise WeightsError(f"{PREFIX}{name}: open_clip has no weights {tag} of it; it has "
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
    """Where open_clip finds a model: its name, or a folder of what a checkpoint keeps of it.

    files: (name, content) each, by `kept`.
    """
    if not files:
        yield name
        return
    with TemporaryDirectory() as folder:
        for file, content in files:
            # A plain name: nothing is written beyond the folder.
            Path(folder, Path(file).name).write_bytes(content.encode("latin-1"))
        path = Path(folder, CONFIG)
        config = json.loads(path.read_text())
        text_cfg = config["model_cfg"]["text_cfg"]
        if "hf_model_name" in text_cfg:
            text_cfg["hf_model_name"] = folder
        if "hf_tokenizer_name" in text_cfg:
            # To load a checkpoint must not run code that came with it.
            text_cfg.setdefault("tokenizer_kwargs", {})["trust_remote_code"] = False
        path.write_text(json.dumps(config))
        yield f"local-dir:{folder}"


def kept(model, tokenizer, model_cfg):
    """What a checkpoint needs to build model and tokenizer again. -> files, as `source` takes them

    CLIP's own vocabulary is not among them: it comes with open_clip.
    """
    text_config = getattr(getattr(model, "text", None), "config", None)  # of transformers' towers
    with TemporaryDirectory() as folder:
        for part in (tokenizer, text_config):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        Path(folder, CONFIG).write_text(json.dumps(dict(model_cfg=model_cfg)))
        # As text, each byte a letter, because torch does not read again the bytes of an empty file.
        paths = Path(folder).glob("*.*")
        return [(path.name, path.read_bytes().decode("latin-1")) for path in paths]


class OpenCLIP(nn.Module):
    """A model of open_clip. open_clip: its name there; the other arguments are in its settings.

    load: the weights of the tag, or of what hf-hub: or local-dir: names; else they are random.
    files: as in `source`. tokenizer: open_clip's, always of its full length.
    """

    def __init__(self, open_clip, tag=None, load=False, quick_gelu=None, files=(), **settings):
        super().__init__()
        library = package()
        self.agreed, self.differing = wanted_by(open_clip, tag)
        # Some names are GELU's and have tags, such as openai, that were trained with QuickGELU.
        if quick_gelu is None:
            quick_gelu = bool(self.agreed.get("quick_gelu"))
        with explaining(PREFIX + open_clip), source(open_clip, files) as place:
            model_cfg = library.get_model_config(place)
            # Before gigabytes of weights are downloaded.
            with explaining(f"{PREFIX}{open_clip}: its vocabulary could not be had"):
                self.tokenizer = library.get_tokenizer(place)
            self.model = library.create_model(
                place,
                tag if load else None,
                load_weights=load,
                require_pretrained=load,
                force_quick_gelu=quick_gelu,
                force_preprocess_cfg=self.agreed,
                pretrained_text=False,
            )
            # Where a checkpoint finds what to keep of our own tokenizer.
            self.tokenizer.merges = files or kept(self.model, self.tokenizer, model_cfg)
        self.embed_dim = model_cfg["embed_dim"]
        pixels = library.transform.PreprocessCfg(**library.get_model_preprocess_cfg(self.model))
        _, height, width = pixels.input_size
        if height != width or pixels.resize_mode == "longest":
            raise WeightsError(f"{PREFIX}{open_clip}: images of {height} x {width}, resized by "
                               f"{pixels.resize_mode}, are not supported")
        settings = dict(
            image_size=height,
            mean=tuple(pixels.mean),
            std=tuple(pixels.std),
            resize=(pixels.resize_mode, pixels.interpolation),
        ) | settings
        self.config = dict(open_clip=open_clip, quick_gelu=quick_gelu, **settings)
        self.image_size = height
        self.resize = settings["resize"]
        self.checkpointing = False
        mean_std = torch.tensor([settings["mean"], settings["std"]]).view(2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)
        self.eval()

    @property
    def visual(self):
        """The image tower."""
        return self.model.visual

    @property
    def logit_scale(self):
        """The logarithm of what cosines are multiplied with, a parameter ()."""
        return self.model.logit_scale

    @property
    def grad_checkpoint(self):
        """True trades a third of the speed for memory in training."""
        return self.checkpointing

    @grad_checkpoint.setter
    def grad_checkpoint(self, enable):
        if enable != self.checkpointing:
            self.model.set_grad_checkpointing(enable)
        self.checkpointing = enable

    def encode_image(self, images):
        """images (N,3,P,P) -> (N,D). uint8 is normalised here, floats have been already."""
        if images.dtype == torch.uint8:
            mean, std = self.mean_std
            images = (images / 255 - mean) / std
        return self.model.encode_image(images)

    def encode_text(self, ids):
        """ids (N,L) -> (N,D)."""
        return self.model.encode_text(ids)
