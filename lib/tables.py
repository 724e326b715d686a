"""Annotation files: text, JSON, csv, and the videos that they name.

A DataError names the line that is wrong.
"""
import bisect
import csv
import functools
import io
import json
import math
import os
import sys
import unicodedata
import zlib
from pathlib import Path

from lib.common import DataError, escaped, first_few, spelled
from lib.video import SUFFIXES, Segment

YOUR_CSV = "--data, a csv file with the columns video and caption"


def read_text(path, what):
    """Read a text file. Raises a DataError that names a missing file and where it belongs."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise DataError(f"{path}, row {line}: not UTF-8 text (byte {byte:#x}); save it as "
                        "UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; it belongs to {what}: put it there, or choose "
                        "another --root") from None


def read_json(path, what, kind):
    """Read a JSON file that must hold a value of type `kind`, dict or list."""
    content = read_text(path, what)
    try:
        content = json.loads(content)
    # Not JSON, or a number of 5,000 digits (ValueError); 100,000 nested brackets (RecursionError).
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(content, kind):
        expected = "object" if kind is dict else "list"
        raise DataError(f"{path} is not a JSON {expected}; fetch the file again")
    return content


def read_table(path, what, columns):
    """Rows of a csv file whose header must have `columns`. -> list of (line number, dict)"""
    reader = csv.reader(io.StringIO(read_text(path, what), newline=""), strict=True)
    # Not a DictReader: it does not tell where a row begins, which is where people look for it.
    rows = []
    line = 1
    try:
        for fields in reader:
            if fields:
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, row {line}: {error}; check its double quotes: one that opens "
                        "there must be closed, and one within a text is written twice") from None
    header = [name.strip() for name in rows.pop(0)[1]] if rows else []
    for name in columns:
        if header.count(name) != 1:
            raise DataError(f"{path} must have one column {name}; its first line is {header}")
    for line, fields in rows:
        if len(fields) != len(header):
            raise DataError(f"{path}, row {line}: not as many fields as in the header "
                            f"({len(fields)}, not {len(header)}); a text with commas belongs in "
                            "double quotes")
    return [(line, dict(zip(header, map(str.strip, fields)))) for line, fields in rows]


def field_of(entry, key, where, kind=str):
    """The value of a key in a JSON object. Raises a DataError unless it has type `kind`."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise DataError(f"{where}: {key!r} is missing or of another type; fetch the file again")
    return entry[key]


def seconds(row, column, where):
    """The number in a column; None if the cell is empty or the table has no such column."""
    text = row.get(column, "")
    try:
        value = float(text or "0")
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise DataError(f"{where}: {column} {text!r} must be seconds, from 0 on, or empty")
    return value if text else None


def sentences(entry, key, where):
    """A video's captions: a list, or a single one; empty if the video has no entry."""
    texts = entry.get(key) or []
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {key!r} should hold a list of sentences; fetch the file again")
    return texts


# ---- splits and lists ----


def has_splits(path):
    """Whether a csv file has a split column."""
    # The first line tells; parsing all of 180,000 takes a second.
    header = read_text(Path(path), YOUR_CSV).split("\n", 1)[0]
    return "split" in [name.strip(' "\r') for name in header.split(",")]


def split_by_name(files):
    """80 % train, 10 % val, 10 % test by a hash of the file's name. -> {name: split}

    Adding videos does not move the others, with one exception. If train or test would get fewer
    than two files (or than one, of two or three files), the files with the nearest hashes fill it
    up. They may move when the list grows. From 60 files on, this almost never happens.
    """
    def tenth_and_code(name):
        code = zlib.crc32(name.encode())
        return code % 10, code, name

    order = sorted(set(files), key=tenth_and_code)
    tenths = [tenth_and_code(name)[0] for name in order]
    least = min(2, len(order) // 2)
    most = len(order) - least
    test = min(max(bisect.bisect_left(tenths, 1), least), most)
    train = max(min(bisect.bisect_left(tenths, 2), most), test)
    split = dict.fromkeys(order, "train")
    split |= dict.fromkeys(order[:test], "test")
    split |= dict.fromkeys(order[test:train], "val")
    return split


def listed_ids(path, what):
    """The ids in a list of videos; some lists give them as file names."""
    return [video.split(".")[0] for video in read_text(path, what).split()]


def warn_of_silent(table, videos, described):
    """Print a warning that names the videos of a table which no caption describes."""
    silent = sorted(set(videos) - set(described))
    if silent:
        warn_once(f"{table}: {len(silent)} of its {len(videos)} videos have no caption: "
                  f"{', '.join(first_few(silent))}")


@functools.cache
def warn_once(line):
    """Print a warning only once, even if several splits read the same file."""
    # In one process only: otherwise, torchrun would print it once per GPU.
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {escaped(line)}", file=sys.stderr)


# ---- the videos that they name ----


UNPACKED = (  # folders that the data sets' archives unpack to
    "videos", "all", "MSRVTT/videos/all", "TrainValVideo", "TestVideo", "YouTubeClips",
    "Charades_v1", "Charades_v1_480",
)


def video_finder(base, belongs):
    """Make find(name) -> Segment of a whole file, for a name with its suffix, another one or none.

    find searches the folder `base`, then the folders UNPACKED in it and in a folder videos in it.
    If a video is missing, the Segment has the path where it belongs: in the folder `belongs` of
    base.
    """
    base = Path(base)
    folders = [base / above / name for name in UNPACKED for above in ("", "videos")]
    folders = [base, *filter(Path.is_dir, folders)]

    @functools.cache
    def videos_in(folder):  # {name without suffix: path}; of two, the mp4
        videos = {}
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            stem, suffix = os.path.splitext(unicodedata.normalize("NFC", file))
            if suffix == ".mp4" or suffix.lower() in SUFFIXES and stem not in videos:
                videos[stem] = os.path.join(folder, file)
        return videos

    @functools.cache
    def find(name):
        for folder in folders:
            path = spelled(folder / name)
            if os.path.isfile(path):
                return Segment(path)
        stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
        # "talk.1" has no suffix: talk.mp4 is another video. Some of DiDeMo's names end in a dot.
        if suffix.lower() not in (".", *SUFFIXES):
            stem += suffix
        above, stem = os.path.split(stem)
        for folder in folders:
            path = videos_in(spelled(folder / above)).get(stem, "")
            if os.path.isfile(path):
                return Segment(path)
        return Segment(str(base / belongs / name))
    return find
