"""Checks that a checkpoint's content makes sense, before anything is built from it."""
import contextlib
from textwrap import shorten

import torch

from clip_model import Tokenizer, sizes_of
from lib.common import WeightsError, curable, cure, first_few

# A file may hold anything. While it is interpreted, these errors are due to its content.
MISTAKES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


@contextlib.contextmanager
def explained(path, what, advice):
    """Turn any error caused by the content of a file into a WeightsError of one line."""
    with curable(f"{path}: no room to load it"):
        try:
            yield
        except MISTAKES as error:
            # Not the file's fault, but a limit of the machine.
            if cure(error):
                raise
            why = shorten(str(error), 500)
            if isinstance(error, KeyError):
                why = f"it has no {error}"
            raise WeightsError(f"{path}: {what}: {why}; {advice}") from None


def usable(path):
    """`explained` for our own checkpoints."""
    return explained(path, "a checkpoint of train.py that can't be used",
                     "use the program that wrote it, or train again")


COUNT = ("int", 0, 2 ** 62)
AMOUNT = ("int", 1, 1000)
WEIGHT = ("int float", 0, 1e6)
SHARE = ("int float", 0, 1)
FLAG = ("bool",)
TEXT = ("str",)
RESIZE = ("('shortest','bicubic') ('shortest','bilinear') ('squash','bicubic') "
          "('squash','bilinear')")
# The settings in our checkpoints: name or names -> (type or types, least, most), or its values.
SETTINGS = {
    "clip": {
        "quick_gelu": FLAG,
        "vision_heads text_heads": AMOUNT,
        "image_size": COUNT,
        "norm_eps": SHARE,
        "mean std": ("list tuple",),
        "resize": (RESIZE,),
        "open_clip": TEXT,
    },
    "tmass": {
        "frames heads": AMOUNT,
        "dropout": SHARE,
        "prior_std support_weight ce_weight": WEIGHT,
    },
    # Only what evaluation reads. Before a run is resumed, train.py's options check the rest.
    "config": {"data": TEXT, "val_videos seed": COUNT},
    "scaler": {
        "scale growth_factor backoff_factor": ("float", 1e-30, 1e30),
        "growth_interval _growth_tracker": COUNT,
    },
}
STATE = {
    "version step": COUNT,
    "finished": FLAG,
    "clip tmass config model optimizer scaler training splits": ("dict OrderedDict",),
    "merges bad_videos": ("list",),
}


def check_range(values, table, where=""):
    """Raise a WeightsError if a value is out of range, or of a type that the table lacks."""
    for names, (kinds, *ends) in table.items():
        for name in values.keys() & names.split():
            value = values[name]
            # isinstance would accept True as an int.
            known = {type(value).__name__, repr(value).replace(" ", "")} & set(kinds.split())
            if not known or ends and not ends[0] <= value <= ends[1]:
                wanted = kinds.replace(" ", " or ")
                limits = f" from {ends[0]} to {ends[1]}" if ends else ""
                raise WeightsError(f"{where}{name} is {value!r:.60}, expected {wanted}{limits}")


def check_own(content):
    """Raise an error, if possible a WeightsError, unless the content of our checkpoint makes sense.

    This comes before anything is built, which could take forever, or all memory.
    """
    check_range(content, STATE)
    if content["version"] != 1:
        raise WeightsError(f"it has version {content['version']}, but this program reads "
                           "version 1")
    for section, table in SETTINGS.items():
        check_range(({"scaler": {}} | content)[section], table, f"{section}.")
    check_tensors(content["model"])
    if "open_clip" in content["clip"]:
        return
    sizes = sizes_of({name.removeprefix("clip."): x for name, x in content["model"].items()})
    for recorded in (content, content["clip"]):
        for name in recorded.keys() & sizes.keys():
            # Compare as text: 16.0 == 16 and True == 1, but neither is a size.
            if repr(recorded[name]) != repr(sizes[name]):
                raise WeightsError(f"{name} is {recorded[name]!r:.60}, but {sizes[name]} in its "
                                   "weights")
    _check_merges(content["merges"], sizes["vocab_size"])


def _check_merges(merges, vocab_size):
    """Raise a WeightsError unless merges join known symbols and give a vocabulary of that size."""
    tokenizer = Tokenizer(merges)
    if len(tokenizer.rank) < len(merges) or tokenizer.vocab_size != vocab_size:
        raise WeightsError(f"{len(tokenizer.rank)} different merges do not make a vocabulary of "
                           f"{vocab_size}")
    known = set(Tokenizer().symbols)
    for pair in tokenizer.rank:
        if not known.issuperset(pair):
            raise WeightsError(f"merge {' '.join(pair)!r} joins what no earlier merge made")
        known.add("".join(pair))


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
