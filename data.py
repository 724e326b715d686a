"""Captions and the video segments that they describe: data sets, readers, batches.

    python data.py check --data msrvtt [--root DIR]            # what is there, what is missing
    python data.py check --data my.csv --decode                # and which videos can't be read

In this order: Annotations, the data sets that training and evaluation iterate over, a reader for
the files of each published data set, DATASETS, splits.
"""
import functools
import hashlib
import html
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
from lib.video import Segment, as_segments, frame_reader

SPLITS = ("train", "val", "test")
# What else a csv may call them.
SPLIT_NAMES = dict.fromkeys(["valid", "validate", "validation", "dev"], "val")
SPLIT_NAMES |= dict(training="train", testing="test")


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

    def of_files(self, paths):
        """Keep only the segments of these files. -> Annotations"""
        paths = set(paths)
        return self.take([v for v, segment in enumerate(self.segments) if segment.path in paths])

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
# A reader is a generator, read(root, split, find) -> (segment, caption, where) for each caption:
# root (Path): the folder of the annotation files. split: "train", "val" or "test".
# find(name): the Segment of a whole file, wherever below the folder of the videos it lies.
# where: the file and line, for error messages. Rows with equal segments describe one video.


def read_csv(path, split, find):
    """Read a csv with columns video, caption and optionally split, start, end (seconds).

    Without a split column, it is divided by `split_by_name`.
    """
    rows = tables.read_table(Path(path), tables.YOUR_CSV, ["video", "caption"])
    split_of = tables.split_by_name([os.path.normpath(row["video"]) for _, row in rows])
    for line, row in rows:
        where = f"{path}, row {line}"
        if not row["video"]:
            raise DataError(f"{where}: empty video; fill it in or delete the row")
        name = os.path.normpath(row["video"])
        row_split = row.get("split", split_of[name]).lower()
        row_split = SPLIT_NAMES.get(row_split, row_split)
        if row_split not in SPLITS:
            raise DataError(f"{where}: split {row['split']!r} must be train, val or test")
        start = tables.seconds(row, "start", where)
        end = tables.seconds(row, "end", where)
        if end is not None and end <= (start or 0):
            raise DataError(f"{where}: end {end} must come after start {start}")
        if split in ("all", row_split):
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
        if clip != LSMDC_BROKEN:
            yield find(f"{movie}/{clip}.avi"), fields[5], where


def read_didemo(root, split, find):
    name = f"didemo_{split}_label.csv"
    if not (root / name).is_file():
        yield from _read_didemo_json(root / f"{split}_data.json", f"didemo (or {name})", find)
        return
    columns = ["video_path", "starts", "ends", "text"]
    for line, row in tables.read_table(root / name, "didemo", columns):
        where = f"{name}, row {line}"
        # The values look like "tensor([[31]])".
        span = re.findall(r"\d+", f"{row['starts']} {row['ends']}")
        if len(span) != 2:
            raise DataError(f"{where}: starts {row['starts']!r} and ends {row['ends']!r} must be "
                            "seconds")
        # A start after the end is swapped with it, as in the released code.
        start, end = sorted(map(float, span))
        path = find(os.path.basename(row["video_path"])).path
        yield Segment(path, start, end), row["text"], where


def _read_didemo_json(path, what, find):
    """The descriptions of a video's moments, one per entry, are joined into one paragraph."""
    videos = {}
    for number, entry in enumerate(tables.read_json(path, what, list), 1):
        where = f"{path.name}, entry {number}"
        video = tables.field_of(entry, "video", where)
        _, paragraph = videos.setdefault(video, (where, []))
        paragraph += tables.sentences(entry, "description", where)
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
        described.add(video)
        if split != "train" and video not in wanted:
            continue
        segment = find(video + ".mp4")
        # Some people have the whole YouTube videos, others only the ten-second clips.
        match = re.fullmatch(r"(.{11})_(\d{6})_(\d{6})", video)
        if match and not os.path.isfile(segment.path):
            uncut = find(match[1] + ".mp4").path
            if os.path.isfile(uncut):
                segment = Segment(uncut, float(match[2]), float(match[3]))
        for caption in tables.sentences(entry, "enCap", where):
            yield segment, caption, where
    tables.warn_of_silent(f"{split}_list.txt", wanted, described)


def read_charades(root, split, find):
    name = f"Charades_v1_{split}.csv"
    for line, row in tables.read_table(root / name, "charades", ["id", "script"]):
        if row["script"]:
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
    read: Callable  # a reader
    published: dict = {}  # split -> what its authors count
    has_val: bool = True  # has its own validation split; if not, --val-videos are held out of train

    def splits(self):
        return [split for split in SPLITS if split != "val" or self.has_val]


DATASETS = {
    "msrvtt": DataSet(
        read_msrvtt,
        dict(train="180,000 texts, 9,000 videos", test="1,000 texts, 1,000 videos"),
        has_val=False,
    ),
    "msrvtt-7k": DataSet(
        functools.partial(read_msrvtt, size="7k"),
        dict(train="140,200 texts, 7,010 videos", test="1,000 texts, 1,000 videos"),
        has_val=False,
    ),
    "lsmdc": DataSet(
        read_lsmdc,
        dict(train="101,079 texts", val="7,408 texts", test="1,000 texts, 1,000 videos"),
    ),
    "didemo": DataSet(
        read_didemo,
        dict(train="8,362 texts", val="1,062 texts", test="1,004 texts"),
    ),
    "vatex": DataSet(
        read_vatex,
        dict(
            train="259,910 texts, 25,991 videos",
            val="15,000 texts, 1,500 videos",
            test="15,000 texts, 1,500 videos",
        ),
    ),
    "charades": DataSet(
        read_charades,
        dict(train="7,985 videos", test="1,863 videos"),
        has_val=False,
    ),
    "msvd": DataSet(
        read_msvd,
        dict(train="1,200 videos", val="100 videos", test="27,763 texts, 670 videos"),
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
    if it is a different one.
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
        return _collect(read_csv(name, split, tables.video_finder(videos or root, belongs="")))
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose {', '.join(names())}, or give the path "
                        "of a .csv file")
    find = tables.video_finder(videos or root, belongs="" if videos else "videos")
    rows = []
    for part in DATASETS[name].splits():
        if split in ("all", part):
            rows += DATASETS[name].read(root, part, find)
    return _collect(rows)


# As Python, JSON or NumPy write a list of sentences, or of lists of words.
LIST = re.compile(r"\[[\s[]*(['\"].*)?\]", re.DOTALL)


def _collect(rows):
    """The rows that a reader yields -> Annotations. Rows with equal segments share a video."""
    number = {}
    where = []
    captions = []
    owner = []
    for segment, caption, line in rows:
        if not html.unescape(html.unescape(caption)).strip():  # cleaned as by CLIP's tokenizer
            raise DataError(f"{line}: empty caption; fill it in or delete it")
        if LIST.fullmatch(caption.strip()):
            raise DataError(f"{line}: this caption is a list; give each sentence a row of its own: "
                            'df = df.explode("caption") before df.to_csv')
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
    randomly chosen files (see seed), with all their segments, are held out of train.
    """
    name = str(name_or_csv)
    whole = split in ("test", "all") or not val_videos
    if whole or load_annotations(name, root, "val", videos).segments:
        return load_annotations(name, root, split, videos)
    annotations = load_annotations(name, root, "train", videos)
    files = list(dict.fromkeys(segment.path for segment in annotations.segments))
    if val_videos >= len(files):
        raise DataError(f"--val-videos {val_videos}: {name} has only {len(files)} training videos")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[:val_videos] if split == "val" else order[val_videos:]
    return annotations.of_files([files[k] for k in chosen])


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
    problems = 0
    for split in known.splits() if known else SPLITS:
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
        counts = f"{len(annotations.captions)} texts, {len(annotations.segments)} videos"
        published = known and known.published.get(split)
        if published:
            counts += f" (published: {published})"
        print(f"{split:5s} {counts}, {len(missing)} of them missing")
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
