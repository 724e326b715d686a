"""Other image-text models, of the package open_clip, behind the interface of clip_model.CLIP.

What TMASS needs of such a model: encode_text, encode_image, logit_scale, embed_dim, image_size,
resize, grad_checkpoint, and config, the arguments that build it again; beside it a tokenizer,
texts -> ids (N,L). To add another kind, write such a class and name it in lib/weights.py.
"""
import contextlib
import logging

import torch
from torch import nn

from lib.common import WeightsError, first_line

PREFIX = "open_clip:"


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


def split_name(name):
    """open_clip:NAME, open_clip:NAME/TAG, open_clip:NAME=FILE -> (NAME, TAG or None, FILE or None)

    NAME may be hf-hub:ORG/MODEL, which has weights of its own.
    """
    name = name.removeprefix(PREFIX)
    name, _, file = name.partition("=")
    if name.startswith("hf-hub:"):
        return name, None, file or None
    name, _, tag = name.partition("/")
    return name, tag or None, file or None


class OpenCLIP(nn.Module):
    """A model of open_clip. open_clip: its name there; the other arguments are in its settings.

    tag: of weights to download; without one they are random, except for hf-hub: with `load`. What
    hf-hub: names is asked of the Hub, or its cache, whenever it is built.
    """

    def __init__(self, open_clip, tag=None, load=False, **settings):
        super().__init__()
        library = package()
        # Some names are GELU's and have tags, such as openai, that were trained with QuickGELU.
        if tag and (library.get_pretrained_cfg(open_clip, tag) or {}).get("quick_gelu"):
            settings["quick_gelu"] = True
        with explaining(PREFIX + open_clip):
            self.model = library.create_model(
                open_clip,
                tag,
                load_weights=load or bool(tag),
                force_quick_gelu=settings.get("quick_gelu", False),
                pretrained_text=False,
            )
        pixels = library.get_model_preprocess_cfg(self.model)
        size = pixels["size"]
        if isinstance(size, int):
            size = (size, size)
        if size[0] != size[1] or pixels["resize_mode"] == "longest":
            raise WeightsError(f"{PREFIX}{open_clip}: images of {size[0]} x {size[1]}, resized by "
                               f"{pixels['resize_mode']}, are not supported")
        settings = dict(
            image_size=size[0],
            mean=tuple(pixels["mean"]),
            std=tuple(pixels["std"]),
            resize=(pixels["resize_mode"], pixels["interpolation"]),
        ) | settings
        self.config = dict(open_clip=open_clip, **settings)
        self.image_size = settings["image_size"]
        self.resize = settings["resize"]
        mean_std = torch.tensor([settings["mean"], settings["std"]]).view(2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)
        self.eval()
        with torch.no_grad():
            blank = torch.zeros(1, 3, self.image_size, self.image_size)
            self.embed_dim = self.encode_image(blank).shape[1]

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
        return False

    @grad_checkpoint.setter
    def grad_checkpoint(self, enable):
        if enable:
            self.model.set_grad_checkpointing(True)

    def encode_image(self, images):
        """images (N,3,P,P) -> (N,D). uint8 is normalised here, floats have been already."""
        if images.dtype == torch.uint8:
            mean, std = self.mean_std
            images = (images / 255 - mean) / std
        return self.model.encode_image(images)

    def encode_text(self, ids):
        """ids (N,L) -> (N,D)."""
        return self.model.encode_text(ids)


def warn_of_pixels(clip):
    """Say so where open_clip's own weights of this model want other pixels than a file gets."""
    name = clip.config["open_clip"]
    for tag in package().list_pretrained_tags_by_model(name):
        wanted = package().get_pretrained_cfg(name, tag)
        for key in ("mean", "std"):
            value = wanted.get(key) or clip.config[key]
            if tuple(value) != clip.config[key]:
                print(f"warning: {PREFIX}{name}=FILE gets pixels with {key} {clip.config[key]}; "
                      f"the weights {tag} want {value}: for those give {PREFIX}{name}/{tag}")
                return


class OpenTokenizer:
    """The tokenizer of a model of open_clip: texts -> ids (N,L), always of its full length."""
    merges = ()  # what a checkpoint keeps of a Tokenizer; here the model's name is enough

    def __init__(self, name):
        with explaining(f"{PREFIX}{name}: its vocabulary could not be had"):
            self.tokenizer = package().get_tokenizer(name)
        self.context_length = self.tokenizer.context_length

    def __call__(self, texts):
        return self.tokenizer([texts] if isinstance(texts, str) else list(texts))
