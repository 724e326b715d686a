"""Clips and captions: what a split holds, what a batch is made of, and the readers of every data set's own files.

    python data.py check --data msrvtt [--root DIR] [--videos DIR]     # what is there, what is missing, where it goes
    python data.py check --data my.csv --decode --list bad.csv        # and which videos can't be read

Order of reading: Annotations, the datasets that training and evaluation iterate over, the readers, the check.
"""
import bisect
import csv
import functools
import io
import json
import math
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lib.common import DataError, Parser, clock, escaped, numeric, program, written_whole
from lib.processes import loading, worker_place
from lib.shapes import shapes_table
from lib.video import FrameCache, Segment, read_frames


@dataclass
class Annotations:
    """A split. segments (V), captions (N), owner (N): caption i describes segments[owner[i]]. where (V): each one's line."""
    segments: list
    captions: list
    owner: list
    where: Optional[list] = None

    def take(self, videos):
        """The annotations of some videos, by index, in their order here."""
        new = {v: k for k, v in enumerate(sorted(videos))}
        kept = [i for i, o in enumerate(self.owner) if o in new]
        where = self.where and [self.where[v] for v in new]
        return Annotations([self.segments[v] for v in new], [self.captions[i] for i in kept],
                           [new[self.owner[i]] for i in kept], where)


# ---- transforms and datasets: uint8 throughout, CLIP normalises ----

def train_transform(size):
    """uint8 (T,3,H,W) -> uint8 (T,3,size,size): one random crop and flip for all frames of a video."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()])


def test_transform(size):
    """uint8 (T,3,H,W) -> uint8 (T,3,size,size): short side to size, bicubic, centre crop, as CLIP was trained."""
    resize = v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])


class VideoDataset(Dataset):
    """Each clip once. Item v -> uint8 (T,3,R,R), or a bad video's DataError as a value: a worker that raises dies."""

    def __init__(self, clips, frames, transform, cache=None):
        self.segments, self.transform = clips, transform
        self.read = cache.read if cache else functools.partial(read_frames, frames=frames)  # a lambda can't be spawned
        self.reading = torch.zeros(256, 2, dtype=torch.long).share_memory_()  # per worker: its pid, clip + 1

    def __len__(self):
        return len(self.segments)

    def note(self, v):
        worker, _ = worker_place()
        if worker < len(self.reading):
            self.reading[worker] = torch.tensor([os.getpid(), v + 1])

    def video(self, v):
        self.note(v)
        return self.transform(self.read(self.segments[v]))

    item = video

    def __getitem__(self, key):
        try:
            return self.item(key)
        except DataError as e:
            return e

    def was_reading(self, pid):
        """What a worker that died was decoding, for the error message."""
        paths = (str(self.segments[v - 1].path) for p, v in self.reading.tolist() if p == pid and v)
        return next(paths, "an unknown video")


class PairDataset(VideoDataset):
    """Each caption with its video. Item (epoch, i) -> (uint8 (T,3,R,R), caption i, i), or a DataError as a value.

    Augmentation depends on (seed, epoch, i) alone: neither on the worker nor on what was read before.
    """

    def __init__(self, ann, frames, transform, seed=0, cache=None):
        super().__init__(ann.segments, frames, transform, cache)
        self.ann, self.seed = ann, seed

    def __len__(self):
        return len(self.ann.captions)

    def item(self, key):
        epoch, i = key
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's global generator
            # torch.manual_seed would also set the GPU's, which is the training's
            torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * 1_000_003 + i) % 2 ** 63)
            return self.video(self.ann.owner[i]), self.ann.captions[i], i


# ---- the data sets' own files ----
# A reader gets the folder of the annotation files, a split, and the folders that may hold the videos. It yields
# (Segment, caption, where) per caption; `where` names the line for messages.

UNPACKED = ("videos", "videos/all", "all", "MSRVTT/videos/all", "TrainValVideo", "TestVideo", "YouTubeClips",
            "Charades_v1_480")
SUFFIXES = (".mp4", ".avi", ".mov", ".m4v", ".mpg", ".3gp", ".webm", ".mkv")  # DiDeMo's end in any, or in a bare dot


def video_folders(root, videos=None):
    """Where a data set's videos are sought: in `videos` (default: root), first in what the archives unpack to."""
    base = str(videos or root)
    found = [os.path.join(base, name) for name in UNPACKED if os.path.isdir(os.path.join(base, name))]
    if not found and not videos:
        found = [os.path.join(base, "videos")]  # where they belong
    return [*found, base]


def video_file(folders, name):
    """A video in one of the folders, by its name in the annotations or under another suffix; else where it belongs."""
    names = [name, *(name.rsplit(".", 1)[0] + end for end in SUFFIXES)]
    paths = (os.path.join(folder, name) for name in names for folder in folders)
    return next(filter(os.path.isfile, paths), os.path.join(folders[0], name))


def read_text(path, what):
    """A text file's content, or a DataError that says which file is missing and where it goes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: it belongs to {what}; put it there, or choose another --root") from None
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path}, row {line}: not UTF-8 text (byte {e.object[e.start]:#x}); save it as UTF-8") from None
    except OSError as e:
        raise DataError(f"{path} can't be read: {e.strerror or e}") from None


def read_json(path, what, kind):
    try:
        content = json.loads(read_text(path, what))
    except json.JSONDecodeError as e:
        raise DataError(f"{path}, line {e.lineno}: not valid JSON ({e.msg}); fetch the file again") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: holds no JSON {'object' if kind is dict else 'list'}; fetch the file again")
    return content


def read_table(path, what, columns):
    """Rows of a csv file with a header that has `columns` at least. -> list of (line that the row begins in, dict)."""
    reader = csv.reader(io.StringIO(read_text(path, what), newline=""), strict=True)
    rows, line = [], 1
    try:
        for fields in reader:
            if fields:
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as e:
        raise DataError(f"{path}, row {line}: {e}; check its double quotes: one that is opened there must be closed, "
                        "one within a text is written twice") from None
    header = [x.strip() for x in rows[0][1]] if rows else []
    missing = [c for c in columns if c not in header]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; its first line is {header}")
    for column in header:
        if column and header.count(column) > 1:
            raise DataError(f"{path} has the column {column} {header.count(column)} times: one is enough")
    if not rows[1:]:
        raise DataError(f"{path} has a header, but no row below it")
    for number, fields in rows[1:]:
        if len(fields) != len(header):
            raise DataError(f"{path}, row {number}: not as many fields as the header has ({len(fields)}, not "
                            f"{len(header)}); a text with commas belongs in double quotes")
    return [(number, dict(zip(header, fields))) for number, fields in rows[1:]]


def read_csv(path, root, split):
    """Your own csv: video, caption and optionally split, start, end (seconds). Paths are relative to root."""
    for number, row in read_table(Path(path), "--data", ["video", "caption"]):
        where = f"{path}, row {number}"
        if "split" in row and row["split"].strip() not in SPLITS:
            raise DataError(f"{where}: split {row['split']!r} must be train, val or test")
        if split != "all" and row.get("split", split).strip() != split:
            continue
        if not row["video"].strip():
            raise DataError(f"{where}: empty video; fill it in or delete the row")
        try:
            start, end = (float(row[c]) if row.get(c, "").strip() else None for c in ("start", "end"))
        except ValueError:
            raise DataError(f"{where}: start {row.get('start')!r} and end {row.get('end')!r} must be seconds") from None
        if not 0 <= (start or 0) < (math.inf if end is None else end):
            raise DataError(f"{where}: end {end} must come after start {start}, and neither be negative")
        yield Segment(str(Path(root) / row["video"].strip()), start, end), row["caption"], where


def read_msrvtt(root, split, folders, size="9k"):
    if split == "test":
        name = "MSRVTT_JSFUSION_test.csv"
        for number, row in read_table(root / name, "msrvtt (1k-A test)", ["video_id", "sentence"]):
            yield Segment(video_file(folders, row["video_id"] + ".mp4")), row["sentence"], f"{name}, row {number}"
        return
    rows = read_table(root / f"MSRVTT_train.{size}.csv", "msrvtt", ["video_id"])
    clips = {row["video_id"]: Segment(video_file(folders, row["video_id"] + ".mp4")) for _, row in rows}
    content = read_json(root / "MSRVTT_data.json", "msrvtt", dict)
    for k, sentence in enumerate(_field(content, "sentences", "MSRVTT_data.json", list), 1):
        where = f"MSRVTT_data.json, sentence {k}"
        video = _field(sentence, "video_id", where)
        if video in clips:
            yield clips[video], _field(sentence, "caption", where), where


def _field(row, key, where, kind=str):
    if not isinstance(row, dict) or not isinstance(row.get(key), kind):
        raise DataError(f"{where}: has no {key!r} as expected; fetch the file again")
    return row[key]


def _sentences(row, key, where):
    """A video's captions; none where the file has no entry. A string would pass as a list of letters."""
    texts = [] if row.get(key) is None else row[key]
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise DataError(f"{where}: {key!r} should hold a list of sentences; fetch the file again")
    return texts


LSMDC_BAD = "1012_Unbreakable_00.05.16.065-00.05.21.941"
LSMDC = dict(train="LSMDC16_annos_training.csv", val="LSMDC16_annos_val.csv",
             test="LSMDC16_challenge_1000_publictect.csv")


def read_lsmdc(root, split, folders):
    for number, line in enumerate(read_text(root / LSMDC[split], "lsmdc").split("\n"), 1):
        if not line:
            continue
        where, fields = f"{LSMDC[split]}, row {number}", line.split("\t")
        if len(fields) != 6 or not fields[5].strip():
            raise DataError(f"{where}: {len(fields)} tab-separated fields, expected 6, the last a sentence; "
                            "fetch the file again")
        clip = fields[0].lstrip('"')  # some ids begin with a stray quote
        movie = clip.split(".")[0][:-3]
        if not movie:
            raise DataError(f"{where}: clip id {clip!r} does not begin with the movie's name; fetch the file again")
        if clip != LSMDC_BAD:  # known to be broken
            yield Segment(video_file(folders, f"{movie}/{clip}.avi")), fields[5], where


def read_didemo(root, split, folders):
    name, other = f"didemo_{split}_label.csv", f"{split}_data.json"
    if not (root / name).is_file() and (root / other).is_file():
        yield from read_didemo_json(root, other, folders)
        return
    turned = []
    for number, row in read_table(root / name, f"didemo (or {other})", ["video_path", "starts", "ends", "text"]):
        where = f"{name}, row {number}"
        start, end = (re.search(r"\d+", row[c]) for c in ("starts", "ends"))  # "tensor([[31]])"
        if not start or not end:
            raise DataError(f"{where}: starts {row['starts']!r} and ends {row['ends']!r} hold no seconds")
        start, end = float(start[0]), float(end[0])
        if start >= end:  # swapped as in the released code
            start, end = end, start
            turned.append(where)
        yield Segment(video_file(folders, row["video_path"].rsplit("/", 1)[-1]), start, end), row["text"], where
    if turned:
        more = f" and {len(turned) - 1} more" if turned[1:] else ""
        warn_once(f"{turned[0]}{more}: the end is not after the start; the two are swapped, as in the released code")


def read_didemo_json(root, name, folders):
    """An entry per described segment: a video's descriptions, in the file's order, are one paragraph, as in the csv."""
    videos = {}
    for k, item in enumerate(read_json(root / name, "didemo", list), 1):
        where = f"{name}, entry {k}"
        text = _field(item, "description", where, (str, list))
        _, paragraph = videos.setdefault(_field(item, "video", where), (where, []))
        paragraph += [text] if isinstance(text, str) else _sentences(item, "description", where)
    for video, (where, paragraph) in videos.items():
        yield Segment(video_file(folders, video)), " ".join(paragraph), where


@functools.cache
def warn_once(line):
    """A warning, once per program and by its first process only: train and test may read the same file."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {line}", file=sys.stderr)


def read_vatex(root, split, folders):
    name = "vatex_training_v1.0.json" if split == "train" else "vatex_validation_v1.0.json"
    listed = None if split == "train" else set(read_text(root / f"{split}_list.txt", "vatex").split())
    for k, item in enumerate(read_json(root / name, "vatex", list), 1):
        where = f"{name}, entry {k}"
        video = _field(item, "videoID", where)
        match = re.fullmatch(r"(.{11})_(\d{6})_(\d{6})", video)
        if not match:
            raise DataError(f"{where}: videoID {video!r} is not <11 characters>_<start>_<end>; fetch the file again")
        if listed is not None and video not in listed:
            continue
        clip = Segment(video_file(folders, video + ".mp4"))
        if not os.path.isfile(clip.path):
            uncut = video_file(folders, match[1] + ".mp4")  # the YouTube video
            clip = Segment(uncut, float(match[2]), float(match[3])) if os.path.isfile(uncut) else clip
        for caption in _sentences(item, "enCap", where):
            yield clip, caption, where


def read_charades(root, split, folders):
    name = f"Charades_v1_{split}.csv"
    for number, row in read_table(root / name, "charades", ["id", "script"]):
        if row["script"].strip():
            yield Segment(video_file(folders, row["id"] + ".mp4")), row["script"], f"{name}, row {number}"


def read_msvd(root, split, folders):
    captions = read_json(root / "captions_msvd.json", "msvd", dict)
    for number, video in enumerate(read_text(root / f"{split}_list.txt", "msvd").split(), 1):
        clip = Segment(video_file(folders, video + ".avi"))
        for caption in _sentences(captions, video, "captions_msvd.json"):
            yield clip, caption, f"{split}_list.txt, row {number}"


READERS = {"msrvtt": read_msrvtt, "msrvtt-7k": functools.partial(read_msrvtt, size="7k"), "lsmdc": read_lsmdc,
           "didemo": read_didemo, "vatex": read_vatex, "charades": read_charades, "msvd": read_msvd}
NO_VAL = ("msrvtt", "msrvtt-7k", "charades")  # no official validation split
SPLITS = ("train", "val", "test")


def load_annotations(name_or_csv, root=None, split="train", videos=None):
    """A data set's split as its files say. A csv without a split column has all rows in every split. -> Annotations.

    root: the folder of the annotation files (default: data/NAME). videos: that of the videos, where it is another one.
    """
    name = str(name_or_csv)
    if split not in (*SPLITS, "all"):
        raise DataError(f"unknown split {split!r}: choose train, val, test or all")
    if videos and not os.path.isdir(videos):
        raise DataError(f"--videos {videos}: there is no such folder; name the one that holds the video files")
    if name.endswith(".csv"):
        if not os.path.isfile(name):
            raise DataError(f"{name} is missing: --data wants a csv file with the columns video and caption")
        return _collect(read_csv(name, videos or root or Path(name).parent, split))
    root = Path(root or Path("data") / name.split("-")[0])
    if name == "shapes":
        return _collect(read_csv(shapes_table(root), videos or root, split))
    if name not in READERS:
        names = ", ".join(["shapes", *READERS])
        raise DataError(f"unknown data set {name!r}: choose {names}, or give the path of a .csv file")
    if not root.is_dir():
        raise DataError(f"{root} is missing: put {name}'s files there (README, Data), or name the folder with --root")
    folders = video_folders(root, videos)
    splits = [s for s in (SPLITS if split == "all" else [split]) if s != "val" or name not in NO_VAL]
    return _collect(row for s in splits for row in READERS[name](root, s, folders))


def _collect(rows):
    clips, captions, owner, where = {}, [], [], []
    for clip, caption, line in rows:
        if not caption.strip():
            raise DataError(f"{line}: empty caption; fill it in or delete it")
        if clip not in clips:
            clips[clip] = len(clips)
            where.append(line)
        captions.append(caption.strip())
        owner.append(clips[clip])
    return Annotations(list(clips), captions, owner, where)


def load_split(name_or_csv, root=None, split="train", val_videos=0, seed=24, videos=None):
    """The split that training and evaluation use: disjoint, and the test split never chooses anything. -> Annotations.

    Official splits where they exist. msrvtt and charades have no validation split: val_videos videos, a seeded choice,
    are held out of train. A csv without a split column is divided by split_by_name.
    """
    name = str(name_or_csv)
    if name.endswith(".csv") and split != "all" and not has_splits(name):
        ann = load_annotations(name, root, "all", videos)
        chosen = split_by_name([os.path.relpath(c.path, videos or root or Path(name).parent) for c in ann.segments])
        ann = ann.take([v for v in range(len(ann.segments)) if chosen[v] == split])
        if not ann.segments and split != "val":
            raise DataError(f"{name} has one video and no split column: to train and test, add videos or the column")
        return ann
    if name in NO_VAL and split in ("train", "val"):
        ann = load_annotations(name, root, "train", videos)
        if val_videos >= len(ann.segments):
            raise DataError(f"--val-videos {val_videos}: {name} has {len(ann.segments)} training videos in all")
        held = set(torch.randperm(len(ann.segments), generator=torch.Generator().manual_seed(seed))[:val_videos].tolist())
        return ann.take([v for v in range(len(ann.segments)) if (v in held) == (split == "val")])
    return load_annotations(name, root, split, videos)


def has_splits(path):
    """Does a csv say itself which row belongs to which split?"""
    return os.path.isfile(path) and "split" in read_table(Path(path), "--data", ["video"])[0][1]


def split_by_name(names):
    """File names -> each one's split: 80 % train, 10 % val, 10 % test, by a hash of the name: adding videos moves none.

    Only where train or test would get fewer than two (nearly never from 60 videos on) do the nearest by hash make up
    the two (of two or three videos, the one): these may move when the list grows.
    """
    code = {name: zlib.crc32(os.fsencode(name)) for name in names}
    order = sorted(code, key=lambda name: (code[name] % 10, code[name], name))
    tenths = [code[name] % 10 for name in order]
    least = min(2, len(order) // 2)
    most = len(order) - least
    test = min(max(bisect.bisect_left(tenths, 1), least), most)
    train = max(min(bisect.bisect_left(tenths, 2), most), test)
    split = dict.fromkeys(order[:test], "test") | dict.fromkeys(order[test:train], "val")
    return [split.get(name, "train") for name in names]


def ten(lines):
    """The first ten, and how many more there are."""
    return [*lines[:10], f"and {len(lines) - 10} more"] if len(lines) > 10 else lines


def present(ann, skip_bad=False):
    """Are the videos there? Asked before anything long starts. -> (annotations of those, lines about the others)."""
    gone = [v for v, clip in enumerate(ann.segments) if not os.path.isfile(clip.path)]
    lines = [f"{ann.segments[v].path} ({ann.where[v]})" if ann.where else str(ann.segments[v].path) for v in gone]
    if gone and not skip_bad:
        raise DataError(f"{len(gone)} of {len(ann.segments)} videos are missing: {'; '.join(ten(lines))}: put them there, "
                        "name their folder with --videos, or leave them out with --skip-bad")
    return (ann.take(set(range(len(ann.segments))) - set(gone)) if gone else ann), lines


# ---- command line ----

PUBLISHED = {  # (texts, videos) per split, None where the number is not published
    "msrvtt": dict(train=(180_000, 9_000), test=(1_000, 1_000)),
    "msrvtt-7k": dict(train=(140_200, 7_010), test=(1_000, 1_000)),
    "lsmdc": dict(train=(101_079, None), val=(7_408, None), test=(1_000, 1_000)),
    "didemo": dict(train=(8_362, None), val=(1_062, None), test=(1_004, None)),
    "vatex": dict(train=(259_910, 25_991), val=(15_000, 1_500), test=(15_000, 1_500)),
    "charades": dict(train=(None, 7_985), test=(None, 1_863)),
    "msvd": dict(train=(None, 1_200), val=(None, 100), test=(27_763, 670)),
}
LIST = "video,problem\n"  # the first line of what --list writes
EVERY = 5                 # seconds between two lines of progress


def decode_all(clips, frames, cache, workers):
    """Read every clip, and tell on stderr how far that is. -> (file, what is wrong with it) of those that can't be."""
    dataset, bad = VideoDataset(clips, frames, len, cache), []
    began = told = time.monotonic()
    with loading(dataset, [[v] for v in range(len(clips))], list, min(workers, len(clips))) as items:
        for done, (item,) in enumerate(items, 1):
            if isinstance(item, DataError):
                bad.append((clips[done - 1].path, f"bad: {item}"))
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                rate = done / (told - began)
                left = clock(round((len(clips) - done) / rate))
                print(f"      {done}/{len(clips)} videos, {rate:.1f}/s, {left} left", file=sys.stderr)
    return bad


def show(problems):
    for line in ten([line for _, line in problems]):
        print(f"      {escaped(line)}")


def check(args):
    """What of a data set is there. -> 0, or 1 where something is missing or bad."""
    if args.list:  # replaces nothing but such a list
        plain = os.path.isfile(args.list) and not os.path.islink(args.list)
        ours = plain and open(args.list, "rb").read(len(LIST)) == LIST.encode()
        folder = os.path.dirname(os.path.abspath(args.list))
        if os.path.lexists(args.list) and not ours or not os.access(folder, os.W_OK):
            raise DataError(f"--list {args.list} can't be written: name a new file, or such a list, in your folder")
    frames = args.frames or (6 if args.data == "shapes" else 12)
    cache = FrameCache(args.cache, frames) if args.cache else None
    whole = args.data.endswith(".csv") and not has_splits(args.data)
    problems = []  # (video, what is the matter)
    for split in ["all"] if whole else [s for s in SPLITS if s != "val" or args.data not in NO_VAL]:
        try:
            ann = load_annotations(args.data, args.root, split, args.videos)
        except DataError as e:
            if args.data not in READERS:
                raise
            problems.append(("", f"{split}: {e}"))
            print(escaped(f"{split:5s} {e}"))
            continue
        found = present(ann, skip_bad=True)[0].segments
        there = set(found)
        gone = [(c.path, f"missing {c.path} ({line})") for c, line in zip(ann.segments, ann.where) if c not in there]
        counts = [f"{len(ann.captions)} texts", f"{len(ann.segments)} videos"]
        for k, n in enumerate(PUBLISHED.get(args.data, {}).get(split, ())):
            counts[k] += f" (published {n})" if n else ""
        print(f"{split:5s} {', '.join(counts)}, {len(gone)} of them missing")
        show(gone)
        bad = []
        if args.decode:
            bad = decode_all(found, frames, cache, args.workers)
            print(f"      {len(found) - len(bad)} decode, {len(bad)} don't")
            show(bad)
        problems += gone + bad
    if args.list:
        with written_whole(args.list) as part, open(part, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(LIST)
            csv.writer(file, lineterminator="\n").writerows(problems)
    return 1 if problems else 0


def main(argv=None):
    p = Parser(__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="what of a data set is there, what is missing, and where it belongs")
    c.add_argument("--data", required=True, help=f"{', '.join(READERS)}, shapes, or a .csv")
    c.add_argument("--root", help="folder of the data set (default: data/NAME)")
    c.add_argument("--videos", metavar="DIR", help="folder of the videos, where it is another one (default: --root)")
    c.add_argument("--decode", action="store_true", help="read every video, and tell which can't be read")
    c.add_argument("--cache", metavar="DIR", help="with --decode: keep the frames there, for --cache of the others")
    c.add_argument("--frames", type=numeric(int, 1, 1000), metavar="T",
                   help="with --cache: frames per video, as in training (default: 12; shapes: 6)")
    c.add_argument("--list", metavar="FILE", help="write all missing and bad videos there (csv); ten of each are shown")
    c.add_argument("--workers", type=numeric(int, 0), default=os.cpu_count() or 1,
                   help="processes that decode (default: %(default)s)")
    args = p.parse_args(argv)
    if (args.cache or args.frames) and not args.decode:
        c.error("--cache and --frames go with --decode")
    return check(args)


if __name__ == "__main__":
    sys.exit(program(main, OSError))  # of --list
