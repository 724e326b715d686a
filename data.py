"""Videos and captions: what a split holds, how frames are read, what a batch is made of.

    python data.py check --data msrvtt [--root DIR] [--decode]     # what is there, what is missing, where it belongs

Order of reading: Clip and Annotations, read_frames, the datasets that training and evaluation iterate over, the readers of each data
set's own files.
"""
import bisect
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import av
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms import v2

from shapes import DataError, Parser, numeric, program, shapes_table, written_whole


class Clip(NamedTuple):
    """A video file, or the seconds [start, end) of one; None means from the beginning or to the end."""
    path: str
    start: Optional[float] = None
    end: Optional[float] = None


@dataclass
class Annotations:
    """One split. clips (V); captions (N); owner (N): caption i describes clips[owner[i]]; where (V): the line that names each clip."""
    clips: list
    captions: list
    owner: list
    where: Optional[list] = None

    def take(self, videos):
        """The annotations of some videos, by index, in their order here."""
        new = {v: k for k, v in enumerate(sorted(videos))}
        pairs = [(c, new[o]) for c, o in zip(self.captions, self.owner) if o in new]
        where = self.where and [self.where[v] for v in new]
        return Annotations([self.clips[v] for v in new], [c for c, _ in pairs], [o for _, o in pairs], where)


# ---- frames ----

def sample_indices(n, frames):
    """Which of n frames are taken: the middle of each of T equal intervals; fewer than T: every one, then the last again. -> list of T."""
    k = min(n, frames)
    starts = [n * i // k for i in range(k + 1)]
    return [(a + b - 1) // 2 for a, b in zip(starts, starts[1:])] + [n - 1] * (frames - k)


def read_frames(clip, frames):
    """Decode T frames of a clip, sampled evenly. -> uint8 (T,3,H,W), turned as the file says. Raises DataError, which names the file.

    mp4/mov and matroska/webm tell every frame's time without decoding: seek to the keyframe before each wanted frame, and skip what no
    other frame refers to. Everything else is decoded from the start and counted. A frame that can't be decoded is replaced by the one
    before.
    """
    path, T = str(clip.path), frames
    try:
        if not os.path.exists(path):
            raise DataError(f"video {path} is missing")
        if os.path.getsize(path) == 0:
            raise DataError(f"video {path} is empty (0 bytes)")
        file, stream = _open(path)
        with file:
            found = _seek_frames(file, stream, clip, T) if "mp4" in file.format.name or "matroska" in file.format.name else None
        return torch.stack(_fill(found or _count_frames(path, clip, T)))
    except av.FFmpegError as e:
        raise DataError(f"video {path} can't be decoded: {e.strerror or e}") from None


def _open(path):
    """-> (open file, its first stream of moving pictures)."""
    # absolute, or "12:30.mp4" would be a protocol named 12; and old files have titles that are not UTF-8
    file = av.open(os.path.abspath(path), metadata_errors="ignore")
    covers, name = av.stream.Disposition.attached_pic, file.format.name
    stream = next((s for s in file.streams.video if s.codec_context is not None and not s.disposition & covers), None)
    if stream is None or name in ("tty", "image2") or name.endswith("_pipe"):
        file.close()
        raise DataError(f"{path} is not a video, is cut off, or has no video stream that can be decoded")
    stream.codec_context.thread_type = "NONE"  # one thread per DataLoader worker: frame threads cost more than they give
    return file, stream


def _packets(file, stream):
    """The packets as far as the file goes: where it is damaged, what came before still counts."""
    try:
        yield from file.demux(stream)
    except av.FFmpegError:
        pass


def _span(times, clip):
    """Indices [a, b) of the sorted times, in seconds from the first, that lie in the clip; at least one frame."""
    a = 0 if clip.start is None else bisect.bisect_left(times, clip.start - 1e-6)
    b = len(times) if clip.end is None else bisect.bisect_left(times, clip.end - 1e-6)
    if a >= len(times):
        raise DataError(f"video {clip.path} ends after {times[-1]:.1f} s, before the clip's start at {clip.start} s")
    return a, max(b, a + 1)


def _seek_frames(file, stream, clip, T):
    """The fast way of read_frames. -> list of T (3,H,W), or None where it does not apply or a frame was not found."""
    packets = [(p.pts, p.is_keyframe) for p in _packets(file, stream) if p.size and not p.is_discard]
    if not packets or any(pts is None for pts, _ in packets):
        return None
    times = sorted(pts for pts, _ in packets)
    a, b = _span([float((t - times[0]) * stream.time_base) for t in times], clip)
    wanted = [times[a + i] for i in sample_indices(b - a, T)]
    keys = sorted(pts for pts, key in packets if key)
    code, found, last_key = stream.codec_context, {}, None
    for target in sorted(set(wanted)):
        if target in found:
            continue
        key = keys[max(0, bisect.bisect_right(keys, target) - 1)] if keys else times[0]
        if key != last_key:  # else: go on decoding where we are
            file.seek(key, stream=stream)
            last_key, packet_source = key, _packets(file, stream)
        for packet in packet_source:
            code.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
            try:
                for frame in packet.decode():
                    if frame.pts in wanted:
                        found[frame.pts] = _pixels(frame)
            except av.FFmpegError:
                continue
            if target in found:
                break
    return [found[t] for t in wanted] if len(found) == len(set(wanted)) else None


def _count_frames(path, clip, T):
    """The exact way of read_frames for any container: decode from the start, and count. -> list of T (3,H,W)."""
    file, stream = _open(path)
    with file:  # the number of packets is that of frames nearly always; where it isn't, a second pass follows
        n = sum(1 for p in _packets(file, stream) if p.size)
    times, kept = _decode_all(path, set(sample_indices(n, T)) if n and clip[1:] == (None, None) else set())
    if not times:
        raise DataError(f"video {path} has no frame that can be decoded")
    a, b = _span([t - times[0] for t in times], clip)
    wanted = [a + i for i in sample_indices(b - a, T)]
    if any(i not in kept for i in wanted):
        kept = _decode_all(path, set(wanted))[1]
    return [kept.get(i) for i in wanted]


def _decode_all(path, keep):
    """Decode everything. -> (time of every frame in seconds, {number: (3,H,W)} of the frames to keep)."""
    times, kept = [], {}
    file, stream = _open(path)
    with file:
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        for packet in _packets(file, stream):
            try:
                for frame in packet.decode():
                    if len(times) in keep:
                        kept[len(times)] = _pixels(frame)
                    times.append(len(times) / rate if frame.time is None else frame.time)
            except av.FFmpegError:  # a damaged packet costs its own frames only
                continue
    return times, kept


def _pixels(frame):
    """A decoded frame -> uint8 (3,H,W), upright."""
    plane = frame.reformat(format="rgb24").planes[0]  # its lines are padded
    x = torch.frombuffer(bytearray(plane), dtype=torch.uint8).view(frame.height, plane.line_size)[:, :frame.width * 3]
    return torch.rot90(x.reshape(frame.height, frame.width, 3), round((frame.rotation or 0) / 90) % 4).permute(2, 0, 1).contiguous()


def _fill(found):
    """Frames that were not found repeat the one before (the first found, at the start); all get the first one's size."""
    last = next(x for x in found if x is not None)
    size, out = last.shape[1:], []
    for x in found:
        last = last if x is None else x if x.shape[1:] == size else v2.functional.resize(x, size, antialias=True)
        out.append(last)
    return out


class FrameCache:
    """Each video's T sampled frames as JPEG (quality 95, short side at most 256) in one file per clip, so that a video is decoded once.

    A file counts only while the video's size, time of change, T and span are what they were. Files are written beside and renamed: any
    number of workers and processes may share a folder. Where it can't be written, videos are decoded each time, after one warning.
    Frames pass through JPEG the first time too: a run sees the same pixels whatever the cache held before.
    """

    def __init__(self, folder, frames):
        self.folder, self.frames, self.warned = Path(folder), frames, torch.zeros(1).share_memory_()  # one warning from all workers
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            self._warn(e)

    def _warn(self, e):
        if not self.warned.item():
            self.warned.fill_(1)
            print(f"warning: frame cache {self.folder} can't be written ({e.strerror or e}): videos are decoded instead", file=sys.stderr)

    def _decode(self, body, sizes):
        pictures = torch.frombuffer(bytearray(body), dtype=torch.uint8).split(sizes)
        return torch.stack(decode_jpeg(list(pictures), ImageReadMode.RGB))

    def read(self, clip):
        """The clip's frames, from the cache or decoded into it. -> uint8 (T,3,H,W). Raises DataError as read_frames does."""
        path = os.path.abspath(clip.path)
        try:
            stat = os.stat(path)
        except OSError:
            return read_frames(clip, self.frames)  # says what is wrong
        key = [path, stat.st_size, stat.st_mtime_ns, self.frames, clip.start, clip.end]
        file = self.folder / (hashlib.sha1(json.dumps([path, *key[3:]]).encode()).hexdigest() + ".jpegs")
        try:
            head, body = file.read_bytes().split(b"\n", 1)  # a line of JSON, then the pictures one after the other
            saved, sizes, crc = json.loads(head)
            if saved == key and zlib.crc32(body) == crc:
                return self._decode(body, sizes)
        except (OSError, ValueError, TypeError, RuntimeError):  # absent or damaged: the video again
            pass
        frames = read_frames(clip, self.frames)
        if min(frames.shape[-2:]) > 256:
            frames = v2.functional.resize(frames, 256, antialias=True)
        jpegs = [encode_jpeg(x, quality=95).numpy().tobytes() for x in frames]
        body, sizes = b"".join(jpegs), [len(x) for x in jpegs]
        try:
            with written_whole(file) as part:
                Path(part).write_bytes(json.dumps([key, sizes, zlib.crc32(body)]).encode() + b"\n" + body)
        except OSError as e:
            self._warn(e)
        return self._decode(body, sizes)


# ---- transforms and datasets: uint8 throughout, CLIP normalises ----

def train_transform(size):
    """uint8 (T,3,H,W) -> uint8 (T,3,size,size): one random crop and flip for all frames of a video."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()])


def test_transform(size):
    """uint8 (T,3,H,W) -> uint8 (T,3,size,size): short side to size, bicubic, centre crop, as CLIP was trained."""
    return v2.Compose([v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])


class VideoDataset(Dataset):
    """Each clip once. Item v -> uint8 (T,3,R,R), or the DataError of a bad video as a value (a worker that raises would die)."""

    def __init__(self, clips, frames, transform, cache=None):
        self.clips, self.transform = clips, transform
        self.read = cache.read if cache else functools.partial(read_frames, frames=frames)  # not a lambda: workers may be spawned
        self.reading = torch.zeros(256, 2, dtype=torch.long).share_memory_()  # per worker its pid and clip + 1, should it die

    def __len__(self):
        return len(self.clips)

    def video(self, v):
        worker = torch.utils.data.get_worker_info()
        if worker and worker.id < len(self.reading):
            self.reading[worker.id] = torch.tensor([os.getpid(), v + 1])
        return self.transform(self.read(self.clips[v]))

    def __getitem__(self, v):
        try:
            return self.video(v)
        except DataError as e:
            return e

    def was_reading(self, pid):
        """What a worker that died was decoding, for the error message."""
        return next((str(self.clips[v - 1].path) for p, v in self.reading.tolist() if p == pid and v), "an unknown video")


class PairDataset(VideoDataset):
    """Each caption with its video. Item (epoch, i) -> (uint8 (T,3,R,R), caption i, i), or a DataError as a value.

    Augmentation depends on (seed, epoch, i) alone: neither on the worker nor on what was read before.
    """

    def __init__(self, ann, frames, transform, seed=0, cache=None):
        super().__init__(ann.clips, frames, transform, cache)
        self.ann, self.seed = ann, seed

    def __len__(self):
        return len(self.ann.captions)

    def __getitem__(self, item):
        epoch, i = item
        try:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's global generator; torch.manual_seed would
                # also set the GPU's, which is the training's
                torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * 1_000_003 + i) % 2 ** 63)
                return self.video(self.ann.owner[i]), self.ann.captions[i], i
        except DataError as e:
            return e


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _ignore_signals(worker):
    """In a worker process: a Ctrl-C, or a SIGTERM to the whole job, is for the main process, which may still want its batch."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def loading(dataset, batches, collate=None, workers=0, pin=False):
    """`with loading(...) as batches:` what collate makes of each list of items, read by worker processes, in order.

    Signals are held back while workers start, so that none dies before it ignores them. A worker that dies all the same (out of memory, a
    crash in a codec) ends the block with a DataError that names the video it was reading; torch tells of it at any moment.
    """
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin,
                        worker_init_fn=_ignore_signals)
    try:
        try:
            hold = workers and hasattr(signal, "pthread_sigmask")
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if hold else None
            try:
                iterator = iter(loader)
            finally:
                if hold:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield iterator
        except (EOFError, ConnectionError):  # it died while handing a batch over: in a moment torch's SIGCHLD handler raises more
            time.sleep(1)
            raise
    except RuntimeError as e:
        pid = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", str(e))
        if not pid:
            raise
        raise DataError(f"a decoding process died while it read {dataset.was_reading(int(pid[1]))} ({str(e).splitlines()[0]}): check that "
                        "video, or the machine's memory (fewer --workers)") from e


# ---- the data sets' own files ----
# A reader yields (file, start, end, caption, where) per caption; `where` names the line for messages. Roots default to data/NAME.

def read_text(root, name, what):
    """A text file's content, or a DataError that says which file is missing and where it goes."""
    path = Path(root) / name
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: it belongs to {what}; put it there, or name the right folder with --root") from None
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} can't be read: {e}") from None


def read_json(root, name, what, kind):
    try:
        content = json.loads(read_text(root, name, what))
        if not isinstance(content, kind):
            raise DataError(f"{Path(root) / name}: should hold a JSON {'object' if kind is dict else 'list'}: fetch the file again")
        return content
    except json.JSONDecodeError as e:
        raise DataError(f"{Path(root) / name}, line {e.lineno}: not valid JSON ({e.msg}): fetch the file again") from None


def read_table(root, name, what, columns):
    """Rows of a csv file with a header. -> list of (row number as an editor shows it, dict); checks that the columns are there."""
    reader = csv.DictReader(io.StringIO(read_text(root, name, what), newline=""))
    rows = []
    try:
        missing = [c for c in columns if c not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{Path(root) / name} has no column {', '.join(missing)}; its first line is {reader.fieldnames}")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{Path(root) / name}, row {reader.line_num}: not as many fields as the header has")
            rows.append((reader.line_num, row))
    except csv.Error as e:  # mostly a quote that is never closed
        raise DataError(f"{Path(root) / name}, row {reader.line_num}: {e}") from None
    return rows


def video_file(root, *names):
    """The first of some possible files that exists, under root/videos, root/videos/all or root; the first possibility where none does."""
    places = [Path(root) / folder / name for name in names for folder in ("videos", "videos/all", ".")]
    return str(next((p for p in places if p.is_file()), places[0]))


def read_csv(path, root, split):
    """Your own csv: video, caption and optionally split, start, end (seconds). Paths relative to root, by default the csv's folder."""
    path = Path(path)
    for number, row in read_table(path.parent, path.name, "--data", ["video", "caption"]):
        where = f"{path}, row {number}"
        if "split" in row and row["split"].strip() not in SPLITS:
            raise DataError(f"{where}: split {row['split']!r} must be train, val or test")
        if split != "all" and row.get("split", split).strip() != split:
            continue
        if not row["video"].strip() or not row["caption"].strip():
            raise DataError(f"{where}: empty {'video' if not row['video'].strip() else 'caption'}; fill it in or delete the row")
        try:
            start, end = (float(row[c]) if (row.get(c) or "").strip() else None for c in ("start", "end"))
        except ValueError:
            raise DataError(f"{where}: start {row.get('start')!r} and end {row.get('end')!r} must be seconds") from None
        if not 0 <= (start or 0) < (math.inf if end is None else end):
            raise DataError(f"{where}: end {end} must come after start {start}, and neither be negative")
        yield str(Path(root) / row["video"].strip()), start, end, row["caption"].strip(), where


def read_msrvtt(root, split, size="9k"):
    if split == "test":
        name = "MSRVTT_JSFUSION_test.csv"
        for number, row in read_table(root, name, "msrvtt (1k-A test)", ["video_id", "sentence"]):
            yield video_file(root, row["video_id"] + ".mp4"), None, None, row["sentence"], f"{name}, row {number}"
        return
    name = f"MSRVTT_train.{size}.csv"
    ids = {row["video_id"] for _, row in read_table(root, name, "msrvtt", ["video_id"])}
    content, files = read_json(root, "MSRVTT_data.json", "msrvtt", dict), {}
    for k, sentence in enumerate(_field(content, "sentences", "MSRVTT_data.json", list)):
        where = f"MSRVTT_data.json, sentence {k + 1}"
        video = _field(sentence, "video_id", where)
        if video in ids:
            if video not in files:
                files[video] = video_file(root, video + ".mp4")
            yield files[video], None, None, _field(sentence, "caption", where), where


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


def read_lsmdc(root, split):
    name = dict(train="LSMDC16_annos_training.csv", val="LSMDC16_annos_val.csv", test="LSMDC16_challenge_1000_publictect.csv")[split]
    for number, line in enumerate(read_text(root, name, "lsmdc").split("\n"), 1):
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 6 or not fields[5].strip():
            raise DataError(f"{Path(root) / name}, row {number}: {len(fields)} tab-separated fields, expected 6, the last a sentence")
        clip = fields[0].lstrip('"')  # some ids begin with a stray quote
        movie = clip.split(".")[0][:-3]
        if not movie:
            raise DataError(f"{Path(root) / name}, row {number}: clip id {clip!r} does not begin with the movie's name")
        if clip != LSMDC_BAD:  # known to be broken
            yield video_file(root, f"{movie}/{clip}.avi"), None, None, fields[5].strip(), f"{name}, row {number}"


def read_didemo(root, split):
    name = f"didemo_{split}_label.csv"
    suffixes = (".mp4", ".avi", ".mov", ".m4v", ".mpg", ".3gp", ".webm", ".mkv")  # names end in any of them, or in a bare dot
    files = lambda base: video_file(root, base, *(re.sub(r"\.[^.]*$", "", base) + x for x in suffixes))
    if not (Path(root) / name).is_file() and (Path(root) / f"{split}_data.json").is_file():
        name = f"{split}_data.json"
        for k, item in enumerate(read_json(root, name, "didemo", list), 1):
            where = f"{name}, entry {k}"
            text = _field(item, "description", where, (str, list))
            text = text if isinstance(text, str) else " ".join(_sentences(item, "description", where))
            yield files(_field(item, "video", where)), None, None, text, where
        return
    for number, row in read_table(root, name, "didemo (or the json form)", ["video_path", "starts", "ends", "text"]):
        where = f"{name}, row {number}"
        start, end = (re.search(r"\d+", row[c]) for c in ("starts", "ends"))  # "tensor([[31]])"
        if not start or not end or float(start[0]) >= float(end[0]):
            raise DataError(f"{where}: starts {row['starts']!r} and ends {row['ends']!r} hold no seconds")
        yield files(row["video_path"].rsplit("/", 1)[-1]), float(start[0]), float(end[0]), row["text"], where


def read_vatex(root, split):
    name = "vatex_training_v1.0.json" if split == "train" else "vatex_validation_v1.0.json"
    listed = None if split == "train" else set(read_text(root, f"{split}_list.txt", "vatex").split())
    for k, item in enumerate(read_json(root, name, "vatex", list), 1):
        where = f"{name}, entry {k}"
        video = _field(item, "videoID", where)
        match = re.fullmatch(r"(.{11})_(\d{6})_(\d{6})", video)
        if not match:
            raise DataError(f"{where}: videoID {video!r} is not <11 characters>_<start>_<end>")
        if listed is not None and video not in listed:
            continue
        path, start, end = video_file(root, video + ".mp4"), None, None
        if not os.path.isfile(path) and os.path.isfile(video_file(root, match[1] + ".mp4")):  # the uncut YouTube video
            path, start, end = video_file(root, match[1] + ".mp4"), float(match[2]), float(match[3])
        for caption in _sentences(item, "enCap", where):
            yield path, start, end, caption, where


def read_charades(root, split):
    name = f"Charades_v1_{split}.csv"
    for number, row in read_table(root, name, "charades", ["id", "script"]):
        if row["script"].strip():
            yield video_file(root, row["id"] + ".mp4"), None, None, row["script"], f"{name}, row {number}"


def read_msvd(root, split):
    captions = read_json(root, "captions_msvd.json", "msvd", dict)
    for number, video in enumerate(read_text(root, f"{split}_list.txt", "msvd").split(), 1):
        path = video_file(root, video + ".avi", video + ".mp4")
        for caption in _sentences(captions, video, f"{Path(root) / 'captions_msvd.json'}"):
            yield path, None, None, caption, f"{split}_list.txt, row {number}"


READERS = {"msrvtt": read_msrvtt, "msrvtt-7k": functools.partial(read_msrvtt, size="7k"), "lsmdc": read_lsmdc, "didemo": read_didemo,
           "vatex": read_vatex, "charades": read_charades, "msvd": read_msvd}
NO_VAL = ("msrvtt", "msrvtt-7k", "charades")  # no official validation split
SPLITS = ("train", "val", "test")


def load_annotations(name_or_csv, root=None, split="train"):
    """One split of a data set, as its files say. A csv without a split column has the same rows in every split. -> Annotations."""
    name = str(name_or_csv)
    if split not in (*SPLITS, "all"):
        raise DataError(f"unknown split {split!r}: choose train, val, test or all")
    if name.endswith(".csv"):
        if not os.path.isfile(name):
            raise DataError(f"{name} is missing: --data wants the path of a csv file with the columns video and caption")
        return _collect(read_csv(name, root or Path(name).parent, split))
    root = Path(root or Path("data") / name.split("-")[0])
    if name == "shapes":
        return _collect(read_csv(shapes_table(root), root, split))
    if name not in READERS:
        raise DataError(f"unknown data set {name!r}: choose {', '.join(['shapes', *READERS])}, or give the path of a .csv file")
    if not root.is_dir():
        raise DataError(f"{root} is missing: put {name}'s files there (README, Data), or name the folder with --root; "
                        f"`python data.py check --data {name}` lists them")
    splits = [s for s in (SPLITS if split == "all" else [split]) if s != "val" or name not in NO_VAL]
    return _collect(row for s in splits for row in READERS[name](root, s))


def _collect(rows):
    clips, captions, owner, where = {}, [], [], []
    for path, start, end, caption, line in rows:
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{line}: empty caption")
        clip = Clip(path, start, end)
        if clip not in clips:
            clips[clip] = len(clips)
            where.append(line)
        captions.append(caption.strip())
        owner.append(clips[clip])
    return Annotations(list(clips), captions, owner, where)


def load_split(name_or_csv, root=None, split="train", val_videos=0, seed=24):
    """The split that training and evaluation use: disjoint, and the test split never chooses anything. -> Annotations.

    Official splits where they exist. msrvtt and charades have no validation split: val_videos videos, a seeded choice, are held out of
    train.
    A csv without a split column is divided by a hash of each file's name, 80 % train, 10 % val, 10 % test: adding rows moves no video.
    """
    name = str(name_or_csv)
    if name.endswith(".csv") and split != "all":
        ann = load_annotations(name, root, "all")
        if has_splits(name):
            return load_annotations(name, root, split)
        base = str(root or Path(name).parent)
        part = [zlib.crc32(os.path.relpath(c.path, base).encode()) % 10 for c in ann.clips]
        ann = ann.take([v for v, p in enumerate(part) if ("test" if p == 0 else "val" if p == 1 else "train") == split])
        if not ann.clips and split != "val":
            raise DataError(f"{name} has no split column, and none of its videos falls into {split} (80 % train, 10 % val, 10 % test, "
                            "by a hash of the name): add the column")
        return ann
    if name in NO_VAL and split in ("train", "val"):
        ann = load_annotations(name, root, "train")
        if val_videos >= len(ann.clips):
            raise DataError(f"--val-videos {val_videos}: {name} has {len(ann.clips)} training videos in all")
        held = set(torch.randperm(len(ann.clips), generator=torch.Generator().manual_seed(seed))[:val_videos].tolist())
        return ann.take([v for v in range(len(ann.clips)) if (v in held) == (split == "val")])
    return load_annotations(name, root, split)


def has_splits(path):
    """Does a csv say itself which row belongs to which split?"""
    try:
        return "split" in next(csv.reader(io.StringIO(read_text(Path(path).parent, Path(path).name, "--data"), newline="")), [])
    except csv.Error:  # load_annotations says what is wrong
        return False


def present(ann, skip_bad=False):
    """Check that every video file is there, before anything long starts. -> (annotations of those that are, lines about the others)."""
    gone = [v for v, clip in enumerate(ann.clips) if not os.path.isfile(clip.path)]
    lines = [f"{ann.clips[v].path} ({ann.where[v]})" if ann.where else str(ann.clips[v].path) for v in gone]
    if gone and not skip_bad:
        raise DataError(f"{len(gone)} of {len(ann.clips)} videos are missing: {'; '.join(lines[:10])}{'; ...' if len(gone) > 10 else ''}: "
                        "put them there, name the folder with --root, or leave them out with --skip-bad")
    return (ann.take(set(range(len(ann.clips))) - set(gone)) if gone else ann), lines


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


def check(args):
    """What of a data set is there. -> 0, or 1 where something is missing or bad."""
    good = True
    whole = args.data.endswith(".csv") and os.path.isfile(args.data) and not has_splits(args.data)
    for split in ["all"] if whole else [s for s in SPLITS if s != "val" or args.data not in NO_VAL]:
        try:
            ann = load_annotations(args.data, args.root, split)
        except DataError as e:
            if args.data not in READERS:
                raise
            good, _ = False, print(f"{split:5s} {e}")
            continue
        found, gone = present(ann, skip_bad=True)
        counts = zip(("texts", "videos"), (len(ann.captions), len(ann.clips)), PUBLISHED.get(args.data, {}).get(split, (None, None)))
        told = [f"{n} {what}{f' (published {published})' if published else ''}" for what, n, published in counts]
        print(f"{split:5s} {', '.join(told)}, {len(gone)} of them missing")
        for line in gone[:10]:
            print(f"      missing {line}")
        bad = []
        if args.decode:
            loader = DataLoader(VideoDataset(found.clips, 12, len), batch_size=None, num_workers=args.workers)
            bad = [x for x in loader if isinstance(x, Exception)]
            print(f"      {len(found.clips) - len(bad)} decode, {len(bad)} don't")
            for e in bad:
                print(f"      bad: {e}")
        good = good and not gone and not bad
    return 0 if good else 1


def main(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="what of a data set is there, what is missing, and where it belongs")
    c.add_argument("--data", required=True, help=f"{', '.join(READERS)}, shapes, or a .csv")
    c.add_argument("--root", help="folder of the data set (default: data/NAME)")
    c.add_argument("--decode", action="store_true", help="open every video and list the bad ones")
    c.add_argument("--workers", type=numeric(int, 0), default=os.cpu_count() or 1, help="processes that decode (default: %(default)s)")
    return check(p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(program(main))
