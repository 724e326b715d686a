"""Whether what a checkpoint says makes sense: asked before anything is built from it."""
from collections import OrderedDict

import torch

from clip_model import Tokenizer
from lib.common import WeightsError

SIZE = (int, 1, 2 ** 20)
COUNT = (int, 0, 2 ** 62)
WEIGHT = ((int, float), 0, 1e6)
TEXT = (str, "", "\U0010ffff")
# What a checkpoint of ours says beside its tensors: the names, their type, least and most.
SETTINGS = {
    "clip": {
        "embed_dim image_size patch_size vision_width vision_layers": SIZE,
        "context_length vocab_size text_width text_layers": SIZE,
        "quick_gelu": (bool, False, True),
        "vision_heads text_heads vision_mlp text_mlp": SIZE,
        "norm_eps": ((int, float), 0, 1),
        "mean std resize": ((list, tuple),),
        "open_clip": TEXT,
    },
    "tmass": {
        "frames heads": (int, 1, 1000),
        "dropout": ((int, float), 0, 1),
        "prior_std support_weight ce_weight": WEIGHT,
        "pooling radius prior support_video": TEXT,
    },
}
SETTINGS["config"] = SETTINGS["tmass"] | {
    "data clip amp augment device out": TEXT,
    "epochs pretrain val_videos workers seed": COUNT,
    "batch save_every log_every": (int, 1, 2 ** 31),
    "head_lr clip_lr weight_decay warmup": WEIGHT,
}
STATE = {
    "version step": COUNT,
    "context_length": SIZE,
    "finished": (bool, False, True),
    "clip tmass config model optimizer scaler training": ((dict, OrderedDict),),
    "merges bad_videos": (list,),
}


def check_range(values, table, where=""):
    """Raise a WeightsError where a value is of another type than the table's, or out of range."""
    for names, (kinds, *ends) in table.items():
        for name in values.keys() & names.split():
            value = values[name]
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            # No isinstance: True is no whole number here.
            if type(value) not in kinds or ends and not ends[0] <= value <= ends[1]:
                wanted = " or ".join(kind.__name__ for kind in kinds)
                limits = f" from {ends[0]} to {ends[1]}" if ends and str not in kinds else ""
                raise WeightsError(f"{where}{name} is {value!r:.60}, expected {wanted}{limits}")


def check_own(content):
    """Raise an error, a WeightsError if it can, unless all that a checkpoint of ours says makes
    sense. Nothing is built before: some of it would take for ever, or all memory."""
    check_range(content, STATE)
    if content["version"] != 1:
        raise WeightsError(f"it is of version {content['version']}, and this program reads "
                           "version 1")
    for section, table in SETTINGS.items():
        check_range(content[section], table, f"{section}.")
    for weights in (content, content.get("training", {})):
        check_tensors(weights.get("model", {}))
    sizes = content["clip"]
    if "open_clip" in sizes:
        return
    if sizes["image_size"] % sizes["patch_size"]:
        raise WeightsError("clip.image_size is no multiple of clip.patch_size")
    layers = sum(name.endswith(".ln_1.weight") for name in content["model"])
    expected = sizes["vision_layers"] + sizes["text_layers"]
    if layers != expected:
        raise WeightsError(f"its weights are of {layers} layers, its settings say {expected}")
    check_merges(content["merges"], sizes["vocab_size"])
    if content["context_length"] != sizes["context_length"]:
        raise WeightsError("context_length differs from clip.context_length")


def check_merges(merges, vocab_size):
    """Raise a ValueError unless merges join what is known by then, and make that vocabulary."""
    tokenizer = Tokenizer(merges)
    if len(tokenizer.rank) < len(merges) or tokenizer.vocab_size != vocab_size:
        raise WeightsError(f"{len(tokenizer.rank)} different merges do not make a vocabulary of "
                           f"{vocab_size}")
    known = set(Tokenizer().symbols)
    for pair in tokenizer.rank:
        if not known.issuperset(pair):
            raise WeightsError(f"merge {' '.join(pair)!r} joins what no merge before it made")
        known.add("".join(pair))


def check_tensors(sd):
    """Raise a WeightsError unless all values are plain tensors of floats, with values."""
    wrong = []
    for key, x in sd.items():
        plain = torch.is_tensor(x) and x.layout == torch.strided and not x.is_meta
        if not plain or not (x.is_floating_point() or key.endswith("num_batches_tracked")):
            wrong.append(key)
    if wrong:
        raise WeightsError("expected a state dict, a dict of float tensors; these are none: "
                           f"{listed(wrong)}")


def listed(names, most=8):
    """The first few names, in one line."""
    names = sorted(map(str, names))
    line = ", ".join(names[:most])
    if len(names) > most:
        line += f" and {len(names) - most} more"
    return line
