"""Captions and the segments of video that they describe: data sets, readers, batches.

    python data.py check --data msrvtt [--root DIR]            # what is there, what is missing
    python data.py check --data my.csv --decode --list bad.csv # and which videos can't be read

In this order: Annotations, what training and evaluation iterate over, the readers of each data
set's own files, DATASETS, splits.
"""
import functools
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

from lib.common import DataError, Parser, first_few, mixed_seed, numeric, program
from lib.shapes import shapes_table
from lib.tables import (
    field_of,
    has_splits,
    listed_ids,
    read_json,
    read_table,
    read_text,
    sentences,
    split_by_name,
    warn_of_silent,
    warn_once,
)
from lib.video import SUFFIXES, Segment, read_frames, spelled

SPLITS = ("train", "val", "test")


@dataclass
class Annotations:
    """A split: caption i describes segments[owner[i]].

    segments (V), captions (N), owner (N); where (V): the line of a file that names each segment.
    """
    segments: list
    captions: list
    owner: list
    where: list | None = None

    def take(self, videos):
        """The annotations of some segments, by their numbers, in their order here."""
        number = {old: new for new, old in enumerate(sorted(videos))}
        texts = [i for i, v in enumerate(self.owner) if v in number]
        return Annotations(
            [self.segments[v] for v in number],
            [self.captions[i] for i in texts],
            [number[self.owner[i]] for i in texts],
            self.where and [self.where[v] for v in number],
        )


# ---- what training and evaluation iterate over: uint8 throughout, CLIP normalises ----


def train_transform(size):
    """uint8 (T,3,H,W) -> uint8 (T,3,P,P): one random crop and flip for all frames of a video."""
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def test_transform(size, mode="shortest", interpolation="bicubic"):
    """uint8 (T,3,H,W) -> uint8 (T,3,P,P): short side to P, bicubic, centre crop: as CLIP's own.

    mode: squash makes both sides P, as some other models want it.
    """
    sides = [size, size] if mode == "squash" else size
    resize = v2.Resize(sides, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])


def transform_for(clip):
    """test_transform as an encoder wants it; as CLIP's own where it does not say."""
    return test_transform(clip.image_size, *getattr(clip, "resize", ()))


class VideoDataset:
    """Each segment once. Item v -> uint8 (T,3,P,P), or the DataError of a video that can't be read.

    The error is a value, because one that is raised would end the worker.
    """

    def __init__(self, segments, frames, transform, cache=None):
        self.segments = segments
        self.transform = transform
        self.read = cache.read if cache else functools.partial(read_frames, frames=frames)
        # By process: the segment that it reads + 1. All workers and the main process see it.
        self.reading = torch.zeros(1024, dtype=torch.int32).share_memory_()

    def __getitem__(self, key):
        try:
            return self.item(key)
        except DataError as error:
            return error

    def item(self, v):
        """The frames of a segment, transformed. -> uint8 (T,3,P,P). Raises DataError."""
        self.note(v)
        return self.transform(self.read(self.segments[v]))

    def note(self, v):
        """Leave word of what this process reads, for the message if that kills it."""
        self.reading[os.getpid() % len(self.reading)] = v + 1

    def was_reading(self, pid):
        """The path that a process which died was reading."""
        noted = self.reading[pid % len(self.reading)]
        return self.segments[noted - 1].path if noted else "an unknown video"


class PairDataset(VideoDataset):
    """Each caption with its video. Item (epoch, i) -> uint8 (T,3,P,P), caption i; or DataError.

    Augmentation depends on (seed, epoch, i) alone: not on the worker, not on what was read before.
    """

    def __init__(self, annotations, frames, transform, seed=0, cache=None):
        super().__init__(annotations.segments, frames, transform, cache)
        self.annotations = annotations
        self.seed = seed

    def item(self, key):
        epoch, i = key
        # torchvision draws from the CPU's global generator: it is set, and put back afterwards.
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would set the GPU's too, which is the training's.
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, i))
            pixels = super().item(self.annotations.owner[i])
        return pixels, self.annotations.captions[i]


def readable(items, skip_bad):
    """A batch's items that could be read, and what is wrong with the others, by their places.

    Without skip_bad one that can't be read is raised.
    """
    errors = {k: str(item) for k, item in enumerate(items) if isinstance(item, DataError)}
    if errors and not skip_bad:
        raise items[min(errors)]
    return [item for k, item in enumerate(items) if k not in errors], errors


# ---- files of videos ----

UNPACKED = (  # folders that the archives unpack to
    "videos", "all", "MSRVTT/videos/all", "TrainValVideo", "TestVideo", "YouTubeClips",
    "Charades_v1", "Charades_v1_480",
)


def video_finder(root, videos=None):
    """find(name) -> the Segment that is the whole file, by its name or with another suffix.

    It looks below `videos` (default: root), and below a folder videos in there, in the folders of
    UNPACKED, then in the folder itself.
    Of a video that is nowhere, the path is the one where it belongs.
    """
    base = Path(videos or root)
    folders = [base / above / name for name in UNPACKED for above in ("", "videos")]
    folders = list(filter(Path.is_dir, folders))
    if not folders and not videos:
        folders = [base / "videos"]  # where they belong
    folders.append(base)

    def find(name):
        stem = name.rsplit(".", 1)[0]  # DiDeMo's names end in any suffix, or in a bare dot
        for other in [name, *(stem + suffix for suffix in SUFFIXES)]:
            for folder in folders:
                path = spelled(folder / other)
                if os.path.isfile(path):
                    return Segment(path)
        return Segment(str(folders[0] / name))
    return find


# ---- readers ----
# A reader gets the folder of the annotation files, a split, and `find`, which makes the Segment of
# a video's file wherever that lies. It yields (Segment, caption, where) per caption; `where` names
# the line for messages.


def read_csv(path, root, split):
    """A csv: video, caption and optionally split, start, end (seconds). Paths are below root."""
    for line, row in read_table(
        Path(path), "--data, a csv file with the columns video and caption", ["video", "caption"]
    ):
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
            raise DataError(f"{where}: end {end} must come after start {start}, and neither be "
                            "negative")
        yield Segment(spelled(Path(root) / name), start, end), row["caption"], where


def read_msrvtt(root, split, find, size="9k"):
    if split == "test":
        name = "MSRVTT_JSFUSION_test.csv"
        for line, row in read_table(root / name, "msrvtt (1k-A test)", ["video_id", "sentence"]):
            segment = find(row["video_id"] + ".mp4")
            yield segment, row["sentence"], f"{name}, row {line}"
        return
    table = f"MSRVTT_train.{size}.csv"
    ids = [row["video_id"] for _, row in read_table(root / table, "msrvtt", ["video_id"])]
    segments = {video: find(video + ".mp4") for video in ids}
    described = set()
    name = "MSRVTT_data.json"
    content = read_json(root / name, "msrvtt", dict)
    for number, sentence in enumerate(field_of(content, "sentences", name, list), 1):
        where = f"{name}, sentence {number}"
        video = field_of(sentence, "video_id", where)
        described.add(video)
        if video in segments:
            yield segments[video], field_of(sentence, "caption", where), where
    warn_of_silent(table, segments, described)


LSMDC = dict(
    train="LSMDC16_annos_training.csv",
    val="LSMDC16_annos_val.csv",
    test="LSMDC16_challenge_1000_publictect.csv",
)
LSMDC_BROKEN = "1012_Unbreakable_00.05.16.065-00.05.21.941"


def read_lsmdc(root, split, find):
    name = LSMDC[split]
    for number, line in enumerate(read_text(root / name, "lsmdc").split("\n"), 1):
        if not line:
            continue
        where = f"{name}, row {number}"
        fields = line.split("\t")
        if len(fields) != 6:
            raise DataError(f"{where}: {len(fields)} tab-separated fields, expected 6, the last a "
                            "sentence; fetch the file again")
        clip = fields[0].lstrip('"')  # some ids begin with a stray quote
        # The id goes on with the hour in which the clip begins: Movie_00.01.02.003-...
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
    for line, row in read_table(root / name, f"didemo (or {other})", columns):
        where = f"{name}, row {line}"
        # They look like "tensor([[31]])".
        numbers = [re.search(r"\d+", row[column]) for column in ("starts", "ends")]
        if not all(numbers):
            raise DataError(f"{where}: starts {row['starts']!r} and ends {row['ends']!r} hold no "
                            "seconds")
        start, end = (float(number[0]) for number in numbers)
        if start >= end:
            swapped.append(where)
        path = find(os.path.basename(row["video_path"])).path
        yield Segment(path, *sorted([start, end])), row["text"], where
    if swapped:
        more = f" and {len(swapped) - 1} more" if swapped[1:] else ""
        warn_once(f"{swapped[0]}{more}: the end is not after the start; the two are swapped, as in "
                  "the released code")


def _read_didemo_json(root, name, find):
    """An entry per described moment: the descriptions of a video, in order, are one paragraph."""
    videos = {}
    for number, entry in enumerate(read_json(root / name, "didemo", list), 1):
        where = f"{name}, entry {number}"
        video = field_of(entry, "video", where)
        text = field_of(entry, "description", where, (str, list))
        texts = [text] if isinstance(text, str) else sentences(entry, "description", where)
        _, paragraph = videos.setdefault(video, (where, []))
        paragraph += texts
    for video, (where, paragraph) in videos.items():
        yield find(video), " ".join(paragraph), where


def read_vatex(root, split, find):
    name = "vatex_training_v1.0.json"
    wanted = ()
    # As the peers divide it, two lists halve the published validation file.
    if split != "train":
        name = "vatex_validation_v1.0.json"
        wanted = set(listed_ids(root / f"{split}_list.txt", "vatex"))
    described = set()
    for number, entry in enumerate(read_json(root / name, "vatex", list), 1):
        where = f"{name}, entry {number}"
        video = field_of(entry, "videoID", where)
        match = re.fullmatch(r"(.{11})_(\d{6})_(\d{6})", video)
        if not match:
            raise DataError(f"{where}: videoID {video!r} is not <11 characters>_<start>_<end>; "
                            "fetch the file again")
        described.add(video)
        if split != "train" and video not in wanted:
            continue
        segment = find(video + ".mp4")
        # Some download whole YouTube videos, others the ten seconds of each.
        if not os.path.isfile(segment.path):
            uncut = find(match[1] + ".mp4").path
            if os.path.isfile(uncut):
                segment = Segment(uncut, float(match[2]), float(match[3]))
        for caption in sentences(entry, "enCap", where):
            yield segment, caption, where
    warn_of_silent(f"{split}_list.txt", wanted, described)


def read_charades(root, split, find):
    name = f"Charades_v1_{split}.csv"
    for line, row in read_table(root / name, "charades", ["id", "script"]):
        if row["script"].strip():
            yield find(row["id"] + ".mp4"), row["script"], f"{name}, row {line}"


def read_msvd(root, split, find):
    """Its captions come as a pickle of lists of words; captions_msvd.json is {id: [caption, ...]}:

        captions = pickle.load(open("raw-captions.pkl", "rb"))
        captions = {video: [*map(" ".join, words)] for video, words in captions.items()}
        json.dump(captions, open("captions_msvd.json", "w"))
    """
    name = "captions_msvd.json"
    captions = read_json(root / name, "msvd", dict)
    table = f"{split}_list.txt"
    videos = listed_ids(root / table, "msvd")
    warn_of_silent(table, videos, captions)
    for line, video in enumerate(videos, 1):
        segment = find(video + ".avi")
        for caption in sentences(captions, video, name):
            yield segment, caption, f"{table}, row {line}"


# ---- data sets ----


class DataSet(NamedTuple):
    """How a data set is read, and what was published about it. To add one, add its entry below."""
    read: Callable  # (root, split, find) -> (Segment, caption, where) per caption
    published: dict = {}  # split -> (texts, videos), None: not published
    has_val: bool = True  # a validation split of its own; else --val-videos are held out of train

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
    """The names that --data takes, beside the path of a csv."""
    return ["shapes", *DATASETS]


def default_root(name):
    """The folder of a data set's files where --root does not say: data/NAME, or a csv's own."""
    return Path(name).parent if name.endswith(".csv") else Path("data", name.split("-")[0])


def load_annotations(name_or_csv, root=None, split="train", videos=None):
    """A data set's split as its files say. -> Annotations. Raises DataError.

    root: the folder of the annotation files (default: data/NAME). videos: that of the videos, where
    it is another one. A csv without a split column has all rows in every split.
    """
    name = str(name_or_csv)
    if split not in (*SPLITS, "all"):
        raise DataError(f"unknown split {split!r}: choose train, val, test or all")
    if videos and not os.path.isdir(videos):
        raise DataError(f"--videos {videos}: there is no such folder; name the one that holds the "
                        "video files")
    root = Path(root or default_root(name))
    if name == "shapes":
        name = str(shapes_table(root))
    if name.endswith(".csv"):
        return _collect(read_csv(name, videos or root, split))
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose {', '.join(names())}, or give the path "
                        "of a .csv file")
    if not root.is_dir():
        raise DataError(f"{root} is missing: put {name}'s files there (README, Data), or name the "
                        "folder with --root")
    find = video_finder(root, videos)
    rows = []
    for part in DATASETS[name].splits():
        if split in ("all", part):
            rows += DATASETS[name].read(root, part, find)
    return _collect(rows)


def _collect(rows):
    """What a reader yields -> Annotations; a segment that comes again is the same video."""
    number = {}
    where = []
    captions = []
    owner = []
    for segment, caption, line in rows:
        if not html.unescape(html.unescape(caption)).strip():  # as CLIP's tokenizer reads it
            raise DataError(f"{line}: empty caption; fill it in or delete it")
        if segment not in number:
            number[segment] = len(number)
            where.append(line)
        # JSON can hold half a character, which can't be written anywhere
        captions.append(caption.strip().encode(errors="replace").decode())
        owner.append(number[segment])
    return Annotations(list(number), captions, owner, where)


# ---- splits ----


def load_split(name_or_csv, root=None, split="train", val_videos=0, seed=24, videos=None):
    """The split that training and evaluation use; no test video is in another one. -> Annotations.

    A data set's own splits where it has them. Without a validation split, val_videos videos, a
    seeded choice, are held out of train. A csv without a split column: see `split_by_name`.
    """
    name = str(name_or_csv)
    if name.endswith(".csv") and split != "all" and not has_splits(name):
        return _divide_csv(name, root, split, videos)
    if split in ("test", "all") or name not in DATASETS or DATASETS[name].has_val:
        return load_annotations(name, root, split, videos)
    annotations = load_annotations(name, root, "train", videos)
    V = len(annotations.segments)
    if val_videos >= V:
        raise DataError(f"--val-videos {val_videos}: {name} has {V} training videos in all")
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed)).tolist()
    return annotations.take(order[:val_videos] if split == "val" else order[val_videos:])


def _divide_csv(path, root, split, videos):
    """The split of a csv without a split column."""
    annotations = load_annotations(path, root, "all", videos)
    # By the names as the csv has them: they stay the same wherever it lies.
    table = read_table(Path(path), "--data", ["video"])
    names = {v: row["video"].strip() for v, (_, row) in zip(annotations.owner, table)}
    splits = split_by_name([os.path.normpath(name) for name in names.values()])
    annotations = annotations.take([v for v, other in enumerate(splits) if other == split])
    if not annotations.segments and split != "val":
        raise DataError(f"{path} has one video and no split column: to train and test, add videos "
                        "or the column")
    return annotations


def present(annotations, skip_bad=False):
    """Leave out videos that are not there, or raise a DataError without skip_bad.

    Asked before anything long starts. -> (Annotations of the others, a line about each missing one)
    """
    there = []
    missing = []
    for v, segment in enumerate(annotations.segments):
        if os.path.isfile(segment.path):
            there.append(v)
        else:
            where = f" ({annotations.where[v]})" if annotations.where else ""
            missing.append(f"{segment.path}{where}")
    if missing and not skip_bad:
        raise DataError(f"{len(missing)} of {len(annotations.segments)} videos are missing: "
                        f"{'; '.join(first_few(missing))}: put them there, name their folder with "
                        "--videos, or leave them out with --skip-bad")
    return annotations.take(there), missing


# ---- command line ----


def main(argv=None):
    from lib.check import check
    p = Parser(__doc__)
    add = p.add_argument
    add("command", choices=["check"], help="say what of a data set is there, and what is missing")
    add("--data", required=True, help=f"{', '.join(names())}, or a .csv")
    add("--root", help="folder of the data set (default: data/NAME)")
    add("--videos", help="folder of the videos, where it is another one")
    add("--decode", action="store_true", help="read every video, and list which can't be read")
    add("--cache", help="with --decode: keep the frames there, for other --cache")
    add("--frames", type=numeric(int, 1, 1000),
        help="with --cache: frames per video, as in training (default: 12; shapes: 6)")
    add("--list", help="write all missing and bad videos there, as a csv")
    add("--workers", type=numeric(int, 0), default=os.cpu_count() or 1,
        help="processes that decode (default: %(default)s)")
    args = p.parse_args(argv)
    if (args.cache or args.frames) and not args.decode:
        p.error("--cache and --frames go with --decode")
    return check(args)


if __name__ == "__main__":
    sys.exit(program(main, OSError))  # of --list
