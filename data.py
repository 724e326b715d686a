"""Captions and the video segments that they describe: data sets, readers, batches.

    python data.py check --data msrvtt [--root DIR]            # what is there, what is missing
    python data.py check --data my.csv --decode                # and which videos can't be read

In this order: Annotations, the data sets that training and evaluation iterate over, a reader for
the files of each published data set, DATASETS, splits.
"""
import functools
import hashlib
import html
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.transforms import v2

from lib import shapes, tables
from lib.common import DataError, Parser, Progress, first_few, mixed_seed, numeric, program
from lib.processes import loading
from lib.video import Segment, as_segments, frame_reader, video_finder

SPLITS = ("train", "val", "test")


@dataclass
class Annotations:
    """A split: caption i describes segments[owner[i]].

    segments (V), captions (N), owner (N). where (V): the file and line that name each segment.
    """
    segments: list
    captions: list
    owner: list
    where: list | None = None

    def take(self, videos):
        """Keep only the videos with these numbers, in their present order. -> Annotations"""
        number = {old: new for new, old in enumerate(sorted(videos))}
        texts = [i for i, v in enumerate(self.owner) if v in number]
        return Annotations(
            [self.segments[v] for v in number],
            [self.captions[i] for i in texts],
            [number[self.owner[i]] for i in texts],
            self.where and [self.where[v] for v in number],
        )

    def checksum(self):
        """Of all captions in order, with names and seconds of their videos, without folders."""
        digest = hashlib.sha256()
        for caption, v in zip(self.captions, self.owner):
            path, *seconds = self.segments[v]
            name = os.path.splitext(os.path.basename(path))[0]
            # ascii() is the same in every version of Python, and takes names of any bytes.
            digest.update(ascii((caption, v, name, seconds)).encode())
        return digest.hexdigest()


# ---- what training and evaluation iterate over: always uint8; CLIP normalises the pixels ----


def train_transform(size):
    """uint8 (T,3,H,W) -> uint8 (T,3,P,P): the same random crop and flip for all frames."""
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def test_transform(size, mode="shortest", interpolation="bicubic"):
    """uint8 (T,3,H,W) -> uint8 (T,3,P,P): resize, then crop the centre; the defaults are CLIP's.

    mode: "shortest" resizes the shorter side to P, "squash" both sides, as some other models do.
    """
    sides = [size, size] if mode == "squash" else size
    resize = v2.Resize(sides, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])


def transform_for(clip):
    """test_transform for an encoder: with its `resize` settings if it has any, else CLIP's."""
    return test_transform(clip.image_size, *getattr(clip, "resize", ()))


class VideoDataset:
    """One item per segment. Item v -> uint8 (T,3,P,P), or a DataError if it can't be read.

    The DataError is returned, not raised, because raising it would end the worker.
    """

    def __init__(self, segments_or_paths, frames, transform, cache=None):
        self.segments = as_segments(segments_or_paths)
        self.transform = transform
        self.read = frame_reader(frames, cache)

    def __getitem__(self, key):
        try:
            return self.item(key)
        except DataError as error:
            return error

    def item(self, v):
        """The frames of a segment, transformed. -> uint8 (T,3,P,P). Raises DataError."""
        return self.transform(self.read(self.segments[v]))


class PairDataset(VideoDataset):
    """One item per caption. Item (epoch, i) -> (uint8 (T,3,P,P), caption i), or a DataError.

    Augmentation depends only on (seed, epoch, i), not on the worker or on earlier items.
    """

    def __init__(self, annotations, frames, transform, seed=0, cache=None):
        super().__init__(annotations.segments, frames, transform, cache)
        self.annotations = annotations
        self.seed = seed

    def item(self, key):
        epoch, i = key
        # torchvision draws from the global CPU generator: seed it here, and restore it afterwards.
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPU's generator, which training uses.
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, i))
            pixels = super().item(self.annotations.owner[i])
        return pixels, self.annotations.captions[i]


def readable(items):
    """Separate a batch's items from its errors. -> (readable items, {position: error message})."""
    errors = {k: str(item) for k, item in enumerate(items) if isinstance(item, DataError)}
    return [item for k, item in enumerate(items) if k not in errors], errors


@dataclass
class Batches:
    """This process's share of each batch, from step `start` on: lists of (epoch, pair).

    An incomplete batch at the end of an epoch is dropped. This differs from the released code,
    which trains on it.
    """
    pairs: int
    batch: int
    epochs: int
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        self.per_epoch = self.pairs // self.batch
        self.total = self.per_epoch * self.epochs

    def __iter__(self):
        share = self.batch // self.world
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            order = torch.randperm(self.pairs, generator=generator).tolist()
            for k in range(self.per_epoch):
                first = k * self.batch + self.rank * share
                if epoch * self.per_epoch + k >= self.start:
                    yield [(epoch, pair) for pair in order[first:first + share]]


# ---- readers ----
# A reader takes the folder of the annotation files, a split, and `find` of video_finder. It yields
# (Segment, caption, where) for each caption; `where` is the file and line for error messages.


def read_csv(path, split, find):
    """Read a csv with columns video, caption and optionally split, start, end (seconds)."""
    what = "--data, a csv file with the columns video and caption"
    for line, row in tables.read_table(Path(path), what, ["video", "caption"]):
        where = f"{path}, row {line}"
        row_split = row.get("split", split).strip()
        if "split" in row and row_split not in SPLITS:
            raise DataError(f"{where}: split {row['split']!r} must be train, val or test")
        if split not in ("all", row_split):
            continue
        name = row["video"].strip()
        if not name:
            raise DataError(f"{where}: empty video; fill it in or delete the row")
        try:
            texts = [row.get(column, "").strip() for column in ("start", "end")]
            start, end = (float(text) if text else None for text in texts)
        except ValueError:
            raise DataError(f"{where}: start {row.get('start')!r} and end {row.get('end')!r} must "
                            "be seconds") from None
        last = math.inf if end is None else end
        if not 0 <= (start or 0) < last:
            raise DataError(f"{where}: end {end} must come after start {start}, and neither may be "
                            "negative")
        yield Segment(find(name).path, start, end), row["caption"], where


def read_msrvtt(root, split, find, size="9k"):
    if split == "test":
        name = "MSRVTT_JSFUSION_test.csv"
        columns = ["video_id", "sentence"]
        for line, row in tables.read_table(root / name, "msrvtt (1k-A test)", columns):
            segment = find(row["video_id"] + ".mp4")
            yield segment, row["sentence"], f"{name}, row {line}"
        return
    table = f"MSRVTT_train.{size}.csv"
    ids = [row["video_id"] for _, row in tables.read_table(root / table, "msrvtt", ["video_id"])]
    segments = {video: find(video + ".mp4") for video in ids}
    described = set()
    name = "MSRVTT_data.json"
    content = tables.read_json(root / name, "msrvtt", dict)
    for number, sentence in enumerate(tables.field_of(content, "sentences", name, list), 1):
        where = f"{name}, sentence {number}"
        video = tables.field_of(sentence, "video_id", where)
        described.add(video)
        if video in segments:
            yield segments[video], tables.field_of(sentence, "caption", where), where
    tables.warn_of_silent(table, segments, described)


LSMDC = dict(
    train="LSMDC16_annos_training.csv",
    val="LSMDC16_annos_val.csv",
    test="LSMDC16_challenge_1000_publictect.csv",
)
# This clip is known to be bad, so its row is skipped.
LSMDC_BROKEN = "1012_Unbreakable_00.05.16.065-00.05.21.941"


def read_lsmdc(root, split, find):
    name = LSMDC[split]
    for number, line in enumerate(tables.read_text(root / name, "lsmdc").split("\n"), 1):
        if not line:
            continue
        where = f"{name}, row {number}"
        fields = line.split("\t")
        if len(fields) != 6:
            raise DataError(f"{where}: {len(fields)} tab-separated fields, expected 6, the last a "
                            "sentence; fetch the file again")
        clip = fields[0].lstrip('"')  # some ids begin with a stray quote
        # After the movie's name comes the clip's start time, hour first: Movie_00.01.02.003-...
        movie = clip.split(".")[0][:-3]
        if not movie:
            raise DataError(f"{where}: clip id {clip!r} does not begin with the movie's name; "
                            "fetch the file again")
        if clip != LSMDC_BROKEN:
            yield find(f"{movie}/{clip}.avi"), fields[5], where


def read_didemo(root, split, find):
    name = f"didemo_{split}_label.csv"
    other = f"{split}_data.json"
    if not (root / name).is_file() and (root / other).is_file():
        yield from _read_didemo_json(root, other, find)
        return
    columns = ["video_path", "starts", "ends", "text"]
    swapped = []
    for line, row in tables.read_table(root / name, f"didemo (or {other})", columns):
        where = f"{name}, row {line}"
        # The values look like "tensor([[31]])".
        numbers = [re.search(r"\d+", row[column]) for column in ("starts", "ends")]
        if not all(numbers):
            raise DataError(f"{where}: starts {row['starts']!r} and ends {row['ends']!r} contain "
                            "no seconds")
        start, end = (float(number[0]) for number in numbers)
        if start >= end:
            swapped.append(where)
        path = find(os.path.basename(row["video_path"])).path
        yield Segment(path, *sorted([start, end])), row["text"], where
    if swapped:
        more = f" and {len(swapped) - 1} more" if swapped[1:] else ""
        tables.warn_once(f"{swapped[0]}{more}: the end is not after the start; the two are "
                         "swapped, as in the released code")


def _read_didemo_json(root, name, find):
    """The descriptions of a video's moments, one per entry, are joined into one paragraph."""
    videos = {}
    for number, entry in enumerate(tables.read_json(root / name, "didemo", list), 1):
        where = f"{name}, entry {number}"
        video = tables.field_of(entry, "video", where)
        text = tables.field_of(entry, "description", where, (str, list))
        texts = [text] if isinstance(text, str) else tables.sentences(entry, "description", where)
        _, paragraph = videos.setdefault(video, (where, []))
        paragraph += texts
    for video, (where, paragraph) in videos.items():
        yield find(video), " ".join(paragraph), where


def read_vatex(root, split, find):
    name = "vatex_training_v1.0.json"
    wanted = ()
    # As in related work, two lists of ids divide the published validation file into val and test.
    if split != "train":
        name = "vatex_validation_v1.0.json"
        wanted = set(tables.listed_ids(root / f"{split}_list.txt", "vatex"))
    described = set()
    for number, entry in enumerate(tables.read_json(root / name, "vatex", list), 1):
        where = f"{name}, entry {number}"
        video = tables.field_of(entry, "videoID", where)
        match = re.fullmatch(r"(.{11})_(\d{6})_(\d{6})", video)
        if not match:
            raise DataError(f"{where}: videoID {video!r} is not <11 characters>_<start>_<end>; "
                            "fetch the file again")
        described.add(video)
        if split != "train" and video not in wanted:
            continue
        segment = find(video + ".mp4")
        # Some people have the whole YouTube videos, others only the ten-second clips.
        if not os.path.isfile(segment.path):
            uncut = find(match[1] + ".mp4").path
            if os.path.isfile(uncut):
                segment = Segment(uncut, float(match[2]), float(match[3]))
        for caption in tables.sentences(entry, "enCap", where):
            yield segment, caption, where
    tables.warn_of_silent(f"{split}_list.txt", wanted, described)


def read_charades(root, split, find):
    name = f"Charades_v1_{split}.csv"
    for line, row in tables.read_table(root / name, "charades", ["id", "script"]):
        if row["script"].strip():
            yield find(row["id"] + ".mp4"), row["script"], f"{name}, row {line}"


def read_msvd(root, split, find):
    """captions_msvd.json is {id: [caption, ...]}. To make it from the published pickle of words:

        captions = pickle.load(open("raw-captions.pkl", "rb"))
        captions = {video: [*map(" ".join, words)] for video, words in captions.items()}
        json.dump(captions, open("captions_msvd.json", "w"))
    """
    name = "captions_msvd.json"
    captions = tables.read_json(root / name, "msvd", dict)
    table = f"{split}_list.txt"
    videos = tables.listed_ids(root / table, "msvd")
    tables.warn_of_silent(table, videos, captions)
    for line, video in enumerate(videos, 1):
        segment = find(video + ".avi")
        for caption in tables.sentences(captions, video, name):
            yield segment, caption, f"{table}, row {line}"


# ---- data sets ----


class DataSet(NamedTuple):
    """How a data set is read, and its published size. To add one, add its entry below."""
    read: Callable  # (root, split, find) -> (Segment, caption, where) per caption
    published: dict = {}  # split -> (texts, videos); None where not published
    has_val: bool = True  # has its own validation split; if not, --val-videos are held out of train

    def splits(self):
        return [split for split in SPLITS if split != "val" or self.has_val]


DATASETS = {
    "msrvtt": DataSet(
        read_msrvtt,
        dict(train=(180_000, 9_000), test=(1_000, 1_000)),
        has_val=False,
    ),
    "msrvtt-7k": DataSet(
        functools.partial(read_msrvtt, size="7k"),
        dict(train=(140_200, 7_010), test=(1_000, 1_000)),
        has_val=False,
    ),
    "lsmdc": DataSet(
        read_lsmdc,
        dict(train=(101_079, None), val=(7_408, None), test=(1_000, 1_000)),
    ),
    "didemo": DataSet(
        read_didemo,
        dict(train=(8_362, None), val=(1_062, None), test=(1_004, None)),
    ),
    "vatex": DataSet(
        read_vatex,
        dict(train=(259_910, 25_991), val=(15_000, 1_500), test=(15_000, 1_500)),
    ),
    "charades": DataSet(
        read_charades,
        dict(train=(None, 7_985), test=(None, 1_863)),
        has_val=False,
    ),
    "msvd": DataSet(
        read_msvd,
        dict(train=(None, 1_200), val=(None, 100), test=(27_763, 670)),
    ),
}


def names():
    """The names that --data accepts, besides the path of a csv."""
    return ["shapes", *DATASETS]


def default_root(name):
    """The default of --root: data/NAME (msrvtt-7k: data/msrvtt), or the folder of a csv."""
    return Path(name).parent if name.endswith(".csv") else Path("data", name.split("-")[0])


def load_annotations(name_or_csv, root=None, split="train", videos=None):
    """Load a split as the data set's files define it. -> Annotations. Raises DataError.

    root: folder of the annotation files (default: see default_root). videos: folder of the videos,
    if it is a different one. Without a split column, every split of a csv has all of its rows.
    """
    name = str(name_or_csv)
    if split not in (*SPLITS, "all"):
        raise DataError(f"unknown split {split!r}: choose train, val, test or all")
    if videos and not os.path.isdir(videos):
        raise DataError(f"--videos {videos}: there is no such folder; name the one that holds the "
                        "video files")
    root = Path(root or default_root(name))
    if name == "shapes":
        name = str(shapes.shapes_table(root))
    if name.endswith(".csv"):
        return _collect(read_csv(name, split, video_finder(videos or root, belongs="")))
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose {', '.join(names())}, or give the path "
                        "of a .csv file")
    if not root.is_dir():
        raise DataError(f"{root} is missing: put {name}'s files there (README, Data), or name the "
                        "folder with --root")
    find = video_finder(videos or root, belongs="" if videos else "videos")
    rows = []
    for part in DATASETS[name].splits():
        if split in ("all", part):
            rows += DATASETS[name].read(root, part, find)
    return _collect(rows)


def _collect(rows):
    """The rows that a reader yields -> Annotations. Rows with equal segments share a video."""
    number = {}
    where = []
    captions = []
    owner = []
    for segment, caption, line in rows:
        if not html.unescape(html.unescape(caption)).strip():  # cleaned as by CLIP's tokenizer
            raise DataError(f"{line}: empty caption; fill it in or delete it")
        if segment not in number:
            number[segment] = len(number)
            where.append(line)
        # JSON can hold half a character, which no file or terminal can.
        captions.append(caption.strip().encode(errors="replace").decode())
        owner.append(number[segment])
    return Annotations(list(number), captions, owner, where)


# ---- splits ----


def load_split(name_or_csv, root=None, split="train", val_videos=0, seed=24, videos=None):
    """Load the split that training and evaluation use. -> Annotations.

    This is the data set's own split if it has one. If it has no validation split, val_videos
    randomly chosen videos (see seed) are held out of train. A csv without a split column is divided
    by `split_by_name`. Splits that are made here have no video in common.
    """
    name = str(name_or_csv)
    if name.endswith(".csv") and split != "all" and not tables.has_splits(name):
        return _divide_csv(name, root, split, videos)
    whole = split in ("test", "all") or not val_videos
    if whole or load_annotations(name, root, "val", videos).segments:
        return load_annotations(name, root, split, videos)
    annotations = load_annotations(name, root, "train", videos)
    V = len(annotations.segments)
    if val_videos >= V:
        raise DataError(f"--val-videos {val_videos}: {name} has {V} training videos in all")
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed)).tolist()
    return annotations.take(order[:val_videos] if split == "val" else order[val_videos:])


def _divide_csv(path, root, split, videos):
    """One split of a csv without a split column. -> Annotations."""
    annotations = load_annotations(path, root, "all", videos)
    # By the names as they are in the csv, so that moving the csv does not change its splits.
    table = tables.read_table(Path(path), "--data", ["video"])
    name_of = {v: row["video"].strip() for v, (_, row) in zip(annotations.owner, table)}
    splits = tables.split_by_name([os.path.normpath(name) for name in name_of.values()])
    annotations = annotations.take([v for v, other in enumerate(splits) if other == split])
    if not annotations.segments and split != "val":
        raise DataError(f"{path} has one video and no split column: to train and test, add videos "
                        "or a split column")
    return annotations


def present(annotations, skip_bad=False):
    """Leave out missing videos. -> (Annotations of the others, a line about each missing video).

    Raises a DataError without skip_bad. Called before any long computation starts.
    """
    existing = []
    missing = []
    for v, segment in enumerate(annotations.segments):
        if os.path.isfile(segment.path):
            existing.append(v)
        else:
            where = f" ({annotations.where[v]})" if annotations.where else ""
            missing.append(f"{segment.path}: missing{where}")
    if missing and not skip_bad:
        raise DataError(f"{len(missing)} of {len(annotations.segments)} videos are missing: "
                        f"{'; '.join(first_few(missing))}: put them there, name their folder with "
                        "--videos, or leave them out with --skip-bad")
    return annotations.take(existing), missing


# ---- python data.py check ----


def check(args):
    """Print what each split has. -> 0, or 1 if anything is missing or bad"""
    known = DATASETS.get(args.data)
    splits = known.splits() if known else SPLITS
    if args.data.endswith(".csv") and not tables.has_splits(args.data):
        splits = ["all"]
    problems = 0
    for split in splits:
        try:
            annotations = load_annotations(args.data, args.root, split, args.videos)
        except DataError as error:
            # A known data set has files for each split: the others may be complete.
            if not known:
                raise
            problems += 1
            print(*first_few([f"{split:5s} {error}"]))
            continue
        there, missing = present(annotations, skip_bad=True)
        published = known.published.get(split, ()) if known else ()
        counts = [f"{len(annotations.captions)} texts", f"{len(annotations.segments)} videos"]
        for k, number in enumerate(published):
            if number:
                counts[k] += f" (published {number})"
        print(f"{split:5s} {', '.join(counts)}, {len(missing)} of them missing")
        lines = list(missing)
        # A user's own csv may go without a validation split.
        if not annotations.captions and (split != "val" or known):
            lines.append(f"{split}: no caption belongs to this split")
        if args.decode:
            bad = unreadable(there.segments, args.workers)
            lines += bad
            print(f"      {len(there.segments) - len(bad)} decode, {len(bad)} don't")
        for line in first_few(lines):
            print(f"      {line}")
        problems += len(lines)
    return 1 if problems else 0


def unreadable(segments, workers):
    """Read every segment. -> the error messages"""
    # `len` in place of a transform: workers need not hand over any pixels.
    dataset = VideoDataset(segments, 1, len)
    progress = Progress("decoding", len(segments), every=5)
    bad = []
    with loading(dataset, [[v] for v in range(len(segments))], list, workers) as batches:
        for v, (item,) in enumerate(batches):
            if isinstance(item, DataError):
                bad.append(str(item))
            progress.update(v + 1)
    return bad


# ---- command line ----


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("command", choices=["check"],
                   help="say what of a data set is there, and what is missing")
    p.add_argument("--data", metavar="NAME", required=True, help=f"{', '.join(names())}, or a .csv")
    p.add_argument("--root", metavar="DIR", help="folder of the data set (default: data/NAME)")
    p.add_argument("--videos", metavar="DIR", help="folder of the videos, where it is another one")
    p.add_argument("--decode", action="store_true",
                   help="read every video, and list which can't be read")
    p.add_argument("--workers", metavar="N", type=numeric(int, 0),
                   help="processes that decode (default: one per core, at most 8)")
    args = p.parse_args(argv)
    return check(args)


if __name__ == "__main__":
    sys.exit(program(main))
