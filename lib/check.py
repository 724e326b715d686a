"""Which files of a data set are there, which are missing, and which videos can't be read.

`python data.py check` calls this.
"""
import copy
import csv

import data
from lib.common import DataError, Progress, check_output, escaped, first_few, output
from lib.processes import loading
from lib.tables import has_splits
from lib.video import FrameCache

HEADER = "video,problem\n"  # the first line of what --list writes
EVERY = 5  # seconds between progress lines


def check(args):
    """Print what each split has. -> 0, or 1 if anything is missing or bad"""
    if args.list:
        check_output("--list", args.list, HEADER.encode())
    # As in training: cached frames are found again only under the same number.
    frames = args.frames or (6 if args.data == "shapes" else 12)
    cache = FrameCache(args.cache, frames) if args.cache else None
    known = data.DATASETS.get(args.data)
    splits = known.splits() if known else data.SPLITS
    if args.data.endswith(".csv") and not has_splits(args.data):
        splits = ["all"]
    problems = []  # (video, problem)
    for split in splits:
        try:
            annotations = data.load_annotations(args.data, args.root, split, args.videos)
        except DataError as error:
            # A known data set has files for each split: the others may be complete.
            if not known:
                raise
            problems.append(("", f"{split}: {error}"))
            print(escaped(f"{split:5s} {error}"))
            continue
        problems += _check_split(args, known, split, annotations, frames, cache)
    if args.list:
        with output("--list", args.list) as part, \
                open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            file.write(HEADER)
            csv.writer(file, lineterminator="\n").writerows(problems)
    return 1 if problems else 0


def _check_split(args, known, split, annotations, frames, cache):
    """Print what a split has. known: its DataSet, or None. -> [(video, problem)]"""
    there, lines = data.present(annotations, skip_bad=True)
    paths = {segment.path for segment in there.segments}
    away = [segment.path for segment in annotations.segments if segment.path not in paths]
    missing = [(path, f"missing {line}") for path, line in zip(away, lines)]
    published = known.published.get(split, ()) if known else ()
    counts = [f"{len(annotations.captions)} texts", f"{len(annotations.segments)} videos"]
    for k, number in enumerate(published):
        if number:
            counts[k] += f" (published {number})"
    print(f"{split:5s} {', '.join(counts)}, {len(missing)} of them missing")
    # A user's own csv may go without a validation split.
    if not annotations.captions and (split != "val" or known):
        missing.append(("", f"{split}: no caption belongs to this split"))
    _print_problems(missing)
    bad = []
    if args.decode:
        bad = _decode(there.segments, frames, cache, args.workers)
        print(f"      {len(there.segments) - len(bad)} decode, {len(bad)} don't")
        _print_problems(bad)
    return missing + bad


def say_cut(job, tokenizer, captions, what):
    """Print how many captions are too long for the encoder, whatever its tokenizer."""
    most = tokenizer.context_length
    empty, full = tokenizer(["", "a " * most])
    padding = empty.mode().values
    longer = copy.copy(tokenizer)
    longer.context_length = 2 * most
    # A token takes at least one byte, except start, end and one more: skip short captions quickly.
    cut = [x for x in captions if len(x.encode()) > most - 4
           and (longer([x]) != padding).sum() > (full != padding).sum()]
    if cut:
        job.say(f"{what}: {len(cut)} captions are longer than the encoder's {most} tokens, and "
                f"are cut; the first: {escaped(cut[0]):.60}")


def _decode(segments, frames, cache, workers):
    """Read every segment. -> [(file, problem)] of those that can't be read"""
    # `len` in place of a transform: workers need not hand over any pixels.
    dataset = data.VideoDataset(segments, frames, len, cache)
    progress = Progress("decoding", len(segments), every=EVERY)
    bad = []
    keys = [[v] for v in range(len(segments))]
    with loading(dataset, keys, list, min(workers, len(segments))) as batches:
        for v, (item,) in enumerate(batches):
            if isinstance(item, DataError):
                bad.append((segments[v].path, f"bad: {item}"))
            progress.update(v + 1)
    return bad


def _print_problems(problems):
    for line in first_few([line for _, line in problems]):
        print(f"      {escaped(line)}")
