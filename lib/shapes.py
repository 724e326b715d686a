"""The synthetic data set `shapes`: small mp4 files, and captions that leave out facts.

    python -m lib.shapes --root DIR --videos 1500 100 500

The first `python train.py` renders that many into data/shapes.
"""
import csv
import functools
import io
import json
import math
import re
import sys
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from clip_model import CLIP, Tokenizer
from lib.common import (
    DataError,
    Parser,
    Progress,
    mixed_seed,
    numeric,
    program,
    write_whole,
    written_whole,
)
from lib.processes import loading
from lib.tables import read_json
from tmass import symmetric_cross_entropy

# ---- facts and words ----
# A video is a sequence of shots. A shot has six facts: sky, ground, then shape and colour of the
# left sticker and of the right one. A caption describes one shot, left sticker first; facts that
# it leaves out are -1. Each fact has two wordings; the warm-up's phrases use only the first.
# CLIP sees single frames, which show neither order nor motion, so captions don't mention them.


def _table(text):
    """The rows of a table: one per line, with cells separated by bars."""
    lines = text.strip().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


SKIES = _table("""
    at night           | under the stars     | 0A0E30 3A2F78 FFF6D0
    at noon            | under a blue sky    | 2E8BE6 A8DCF5
    at sunset          | in the evening glow | 7A2A5E FF8A3C FFE27A
    at dawn            | under a pink sky    | C75B9B FFC9D6
    in the rain        | under grey clouds   | 4C5866 8A97A3 C7D0D8
    in a snowfall      | under falling snow  | 8FB4CF C6DCEC FFFFFF
    under green lights | below an aurora     | 06282E 0E5A4A 5CF2A0
    in the fog         | in a white mist     | E4E8EA F4F6F6
""")  # colours: at the top, at the horizon, and of what is in the sky
GROUNDS = _table("""
    on the sea     | over waves        | 0B6E99 6FD3E0
    on sand        | among dunes       | E3B565 C98A3B
    on snow        | on a white field  | F2F7FB D3E2EE
    on a meadow    | among green hills | 8CC751 5E9E3A
    on bricks      | over a brick wall | B4573F E3CBB8
    on tiles       | over a chessboard | 30343A DDE2E6
    on lava        | over glowing rock | 4A0F0A FF6A1A
    on a dark road | on asphalt        | 3C3F45 F2E9C8
""")
SHAPES = _table("""
    circle   | disc
    square   | box
    triangle | wedge
    star     | sparkle
    ring     | hoop
    cross    | plus
""")
COLOURS = _table("""
    red    | crimson   | E53935
    orange | tangerine | FF8F0F
    yellow | golden    | FFDD2D
    green  | emerald   | 2FA84F
    blue   | azure     | 1E78E5
    purple | violet    | 9230B0
    black  | inky      | 25252B
    white  | ivory     | FAFAF5
""")
FACTS = [SKIES, GROUNDS, SHAPES, COLOURS, SHAPES, COLOURS]
WORDS = [[row[:2] for row in rows] for rows in FACTS]
FORMS = [
    "a {left} and a {right} {ground} {sky}",  # the warm-up's
    "a {left} next to a {right} {ground} {sky}",
    "{sky}, a {left} beside a {right} {ground}",
    "there is a {left} with a {right} {ground} {sky}",
    "{sky} we see a {left} and a {right} {ground}",
    "a video that shows a {left} near a {right} {ground}, {sky}",
]
POSE = _table("""
    zoom         |  1   | .04 | .06
    camera x     |  0   | 0   | .04
    camera y     |  0   | 0   | .04
    time         |  0   | 6   | 2
    light        |  1   | .05 | 0
    confetti     |  0   | 0   | 0
    left x       | -.47 | .03 | .03
    left y       |  0   | .08 | .05
    left angle   |  0   | .12 | .12
    left radius  |  .39 | .03 | 0
    right x      |  .47 | .03 | .03
    right y      |  0   | .08 | .05
    right angle  |  0   | .12 | .12
    right radius |  .39 | .03 | 0
""")  # how a shot is seen: mean, spread between shots, and how far it moves within a shot
NUMBERS = [list(map(float, row[1:])) for row in POSE]
MEAN, SPREAD, REACH = torch.tensor(NUMBERS).T  # each (14,)
LEFT_OUT = torch.tensor([.06, .06, 0, .04, 0, .04])  # how often a caption leaves out each fact
CAPTIONS = dict(train=4, val=1, test=8)  # per video; the more queries, the less noise in R@1
FRAMES = 24  # per video
RATE = 8  # frames per second
SIDE = 96  # pixels
SHAPES_VERSION = 2  # raise it when files change; older folders are refused

# ---- drawing ----
# Coordinates: x from -1 to 1 to the right (n,1,S), y from -1 to 1 upwards (n,S,1); px is the side
# of a pixel. A picture is (3,n,S,S), so that an amount (n,S,S) of paint applies to each channel.


def _paints(row):
    """The colours RRGGBB in the last cell of a row -> tensors (3,1,1,1) in 0..1."""
    colours = [list(bytes.fromhex(code)) for code in row[-1].split()]
    return torch.tensor(colours).view(-1, 3, 1, 1, 1) / 255


PAINTS = torch.cat([_paints(row) for row in COLOURS])
CELLS = 1021  # with one speck each, before the pattern repeats
# Each cell has four random numbers: x, y and rarity of its speck, and one more. Three of them are
# also the colour of confetti. All are repeated once, so that the sum of two indices is an index.
SPECKS = torch.rand(4, CELLS, generator=torch.Generator().manual_seed(0))
SPECKS = SPECKS.repeat(1, 2)


def _specks(x, y, density, radius, px):
    """Specks scattered over a plane, at most one in each unit cell.

    x (n,1,S), y (n,S,1) -> amount of speck, number of the cell, both (n,S,S).
    """
    column = x.floor()
    row = y.floor()
    cell = column.long() * 61 % CELLS
    cell = cell + row.long() * 157 % CELLS
    right = x - column - .3 - (.4 * SPECKS[0])[cell]
    up = y - row - .3 - (.4 * SPECKS[1])[cell]
    amount = (radius - torch.hypot(right, up)) / px + .5
    return amount.clamp_(0, 1) * (SPECKS[2] < density)[cell], cell


def _draw_sky(sky, x, y, time, px):
    """x (n,1,S), y (n,H,1), time (n,1,1) -> (3,n,H,S)."""
    top, low, *others = _paints(SKIES[sky])
    low_part = .75 - .75 * y  # brighter towards the horizon
    picture = torch.lerp(top, low, low_part.clamp(0, 1))
    picture = picture.repeat(1, 1, 1, x.shape[2])
    name = SKIES[sky][0]
    if name == "at night":
        across = x * 4 + time / 4
        amount, _ = _specks(across, y * 4, .6, .12, px * 4)
    elif name == "at sunset":
        distance = torch.hypot(x - .1 * time.sin(), y - .35)
        amount = (.3 - distance) / px + .5
    elif name == "in the rain":
        streak = (x * 9 - y * 3 + time * 2) % 1
        amount = (.12 - (streak - .5).abs()) * 2
    elif name == "in a snowfall":
        across = x * 3.5 + time / 4
        amount, _ = _specks(across, y * 3.5 + time, .7, .16, px * 3.5)
    elif name == "under green lights":
        bend = (3 * y + time).sin()
        amount = (x * 4 + bend).sin() * .6
    else:
        return picture
    return picture.lerp_(others[0], amount.clamp_(0, 1))


def _draw_ground(ground, x, y, time, px):
    """x (n,1,S), y (n,H,1), time (n,1,1) -> (3,n,H,S), the y of the horizon."""
    name = GROUNDS[ground][0]
    horizon = .02
    if name == "on bricks":
        row = (y * 4).floor()
        level = (y * 4 - row - .5).abs()
        upright = ((x * 2 + row / 2) % 1 - .5).abs() * 2
        amount = (.07 - torch.minimum(level, upright)) / px / 4 + .5
    elif name == "on tiles":
        amount = ((x * 2.5).floor() + (y * 2.5).floor()) % 2
    elif name == "on a dark road":
        line = .06 - (y + .55).abs()
        dash = ((x + time / 4) * 1.5 % 1 - .5).abs() - .2
        amount = torch.minimum(line, dash) / px + .5
    else:
        horizon = .02 + .13 * (2.2 * x + time / 4).sin()
        hill = -.45 + .16 * (2.4 * x + time / 3).sin()
        amount = (hill - y) / px + .5
    if name in ("on the sea", "on lava"):
        bend = 1.3 * (3 * x + time).sin()
        wave = (10 * y + bend + time).sin()
        amount = (wave - .4) / px / 9 + .5
    paint, second = _paints(GROUNDS[ground])
    picture = paint.repeat(1, *amount.shape)
    return picture.lerp_(second, amount.clamp_(0, 1)), horizon


def _span(numbers):
    """The slice from the first to the last of some numbers, in ascending order."""
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


def _alike(values):
    """Group equal values (n,). -> pairs (value, its rows: a slice if they are adjacent)"""
    for value in values.unique().tolist():
        rows = (values == value).nonzero()[:, 0]
        span = _span(rows)
        together = span.stop - span.start == len(rows)
        yield value, span if together else rows  # a slice costs no copy


def _draw_scenery(picture, facts, x, y, time, px):
    """Draw skies and grounds, each only in the rows of pixels where one may be visible."""
    # The horizon is never above .15 nor below -.11.
    first = int((y > .15 + px).all(0).sum())  # first row with ground
    last = int((y > -.11 - px).any(0).sum())  # first row without sky
    for sky, rows in _alike(facts[:, 0]):
        above = y[rows, :last]
        picture[:, rows, :last] = _draw_sky(sky, x[rows], above, time[rows], px)
    for ground, rows in _alike(facts[:, 1]):
        below = y[rows, first:]
        soil, horizon = _draw_ground(ground, x[rows], below, time[rows], px)
        cover = (horizon - y[rows, first:last]) / px + .5
        sky = picture[:, rows, first:last]
        both = soil[:, :, :last - first]
        both[:] = sky.lerp(both, cover.clamp_(0, 1))
        picture[:, rows, first:] = soil


def _outline(shape, x, y):
    """Signed distance from a shape of radius 1, negative inside. x, y (n,S,S) -> (n,S,S)."""
    r = torch.hypot(x, y)
    name = SHAPES[shape][0]
    if name == "circle":
        return r - .9
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - .78
    if name == "ring":
        return (r - .66).abs() - .26
    if name == "cross":
        x = x.abs()
        y = y.abs()
        nearer = torch.minimum(x, y)
        farther = torch.maximum(x, y)
        return torch.maximum(nearer - .3, farther - .9)
    # Triangle and star consist of equal sectors, all folded into one half of a sector. In it, their
    # edge runs from the tip (1, 0) to a corner at (1 - ex, ey).
    tips, inner, grow = (3, .5, .08) if name == "triangle" else (5, .45, .04)
    half = math.pi / tips
    turn = torch.atan2(x, y) / (2 * half) + .5
    angle = (turn % 1 - .5).abs() * 2 * half
    ex = 1 - inner * math.cos(half)
    ey = inner * math.sin(half)
    beyond = ey * (r * angle.cos() - 1)
    beyond = beyond + ex * r * angle.sin()
    return beyond / math.hypot(ex, ey) - grow


def _draw_sticker(picture, facts, pose, x, y, px):
    """Draw a sticker on each picture: a shadow, a white rim, and a shape that is lighter on top.

    facts (n,2): shape and colour. pose (n,4): x, y, angle, radius.
    """
    for shape, rows in _alike(facts[:, 0]):
        at_x, at_y, angle, radius = pose[rows].T[..., None, None]  # each (n,1,1)
        right = (x[rows] - at_x) / radius
        up = (y[rows] - at_y) / radius
        across = right * angle.cos() - up * angle.sin()
        along = right * angle.sin() + up * angle.cos()
        distance = _outline(shape, across, along).mul_(radius)
        # Where some picture shows shadow or rim (S,S). The rest stays as it is.
        near = distance.amin(0) < .4 / 2.2 + px
        height = _span(near.any(1).nonzero())
        width = _span(near.any(0).nonzero())
        distance = distance[:, height, width]
        inside = (-distance / px).add_(.5).clamp_(0, 1)
        rim = (.055 - distance).div_(px).add_(.5).clamp_(0, 1)
        shadow = (.4 - 2.2 * distance).clamp_(0, 1)
        bright = inside * (.93 + .07 * along[:, height, width])
        paint = PAINTS[facts[rows, 1], :, 0].transpose(0, 1)  # (3,n,1,1)
        spot = picture[:, rows, height, width]
        spot *= (1 - shadow) * (1 - rim)
        spot += (rim - inside) + paint * bright
        picture[:, rows, height, width] = spot  # spot is a copy if rows are not a slice


def draw_shots(facts, pose, size):
    """Draw a picture for each row. facts (n,6), pose (n,14) -> uint8 (n,3,size,size).

    pose has the columns of POSE.
    """
    px = 2 / size
    line = (torch.arange(size) + .5) * px - 1
    zoom, camera_x, camera_y, time, light, confetti = pose.T[:6, :, None, None]  # each (n,1,1)
    x = (line + camera_x) / zoom  # (n,1,S)
    y = (camera_y - line[:, None]) / zoom  # (n,S,1)
    picture = torch.empty(3, len(facts), size, size)
    _draw_scenery(picture, facts, x, y, time, px)
    for strewn, rows in _alike(confetti.flatten()):
        if strewn:
            across = x[rows] * 3 + time[rows] / 3
            along = y[rows] * 3 - time[rows] / 2
            amount, cell = _specks(across, along, .4, .16, px * 3)
            paint = SPECKS[[3, 0, 1]][:, cell]
            picture[:, rows] = picture[:, rows].lerp(paint, amount)
    _draw_sticker(picture, facts[:, 2:4], pose[:, 6:10], x, y, px)
    _draw_sticker(picture, facts[:, 4:6], pose[:, 10:14], x, y, px)
    # In place: new memory pages cost as much as the arithmetic.
    picture.mul_(light).mul_(255).clamp_(0, 255)
    return picture.byte().transpose(0, 1)


# ---- random shots, captions and videos ----


def random_shots(n, generator):
    """Draw n shots at random. -> their facts (n,6) and poses (n,14), as for `draw_shots`"""
    facts = [torch.randint(len(words), (n,), generator=generator) for words in WORDS]
    u = torch.rand(n, 14, generator=generator) * 2 - 1
    return torch.stack(facts, 1), MEAN + SPREAD * u


def _describe(facts, generator, forms, second):
    """A caption for each shot. Each wording is the second one with probability `second`.

    facts (n,6) -> (n texts, the facts that they mention (n,6), -1 for the others)
    """
    n = len(facts)
    u, v = torch.rand(2, n, 6, generator=generator)
    says = facts.where(u >= LEFT_OUT, -1)
    chosen = torch.randint(len(forms), (n,), generator=generator).tolist()
    wordings = (v < second).long().tolist()
    texts = []
    for form, mentioned, wording in zip(chosen, says.tolist(), wordings):
        words = []
        for choices, fact, k in zip(WORDS, mentioned, wording):
            words.append(choices[fact][k] if fact >= 0 else "")
        sky, ground, shape, colour, shape2, colour2 = words
        left = f"{colour} {shape}"
        right = f"{colour2} {shape2}"
        text = forms[form].format(left=left, right=right, sky=sky, ground=ground)
        text = " ".join(text.split()).replace(" ,", ",").strip(" ,")
        texts.append(re.sub(r"\ba (?=[aeiou])", "an ", text))
    return texts, says


def shapes_pictures(n, generator, size=32):
    """Random pairs for the warm-up, in the first wording. -> (uint8 (n,3,size,size), n phrases)"""
    facts, pose = random_shots(n, generator)
    phrases, _ = _describe(facts, generator, FORMS[:1], second=0)
    return draw_shots(facts, pose, size), phrases


def _animate(pose, generator):
    """The pose of each shot (shots,14) -> each frame's shot (FRAMES,) and pose (FRAMES,14).

    No shot is shorter than 5 frames, so that 6 sampled frames include every shot.
    """
    shots = len(pose)
    extra = torch.randint(shots, (FRAMES - 5 * shots,), generator=generator)
    lengths = 5 + extra.bincount(minlength=shots)
    u = torch.rand(3, shots, 14, generator=generator) * 2 - 1
    pose = pose.clone()
    pose[:, 4] += .15 * u[0, :, 4] - .05  # light
    pose[:, 5] = u[0, :, 5] > 0  # confetti or none
    shot = torch.arange(shots).repeat_interleave(lengths)
    seconds = [torch.arange(n) - n / 2 for n in lengths.tolist()]
    t = torch.cat(seconds)[:, None] / RATE
    drift, sway, phase = u[:, shot]
    motion = drift * t + sway * (4 * t + 3 * phase).sin()
    return shot, pose[shot] + REACH * motion


class ShapesVideos(Dataset):
    """All videos, by number. Item i -> captions, facts of the shots (S,6), facts mentioned (n,6).

    Each video has its own random generator, and is rendered unless its file exists. Facts are
    lists. If a file can't be written, the item is a DataError; raising it would end the worker.
    """

    def __init__(self, folder, train, val, test, seed):
        self.folder = Path(folder)
        self.splits = ["train"] * train + ["val"] * val + ["test"] * test
        self.seed = seed

    def __len__(self):
        return len(self.splits)

    def path(self, i):
        return self.folder / f"{i:05d}.mp4"

    def __getitem__(self, i):
        path = self.path(i)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, i))
        shots = int(torch.randint(2, 5, (), generator=generator))
        facts, pose = random_shots(shots, generator)
        captions = CAPTIONS[self.splits[i]]
        described = torch.randint(shots, (captions,), generator=generator)
        texts, says = _describe(facts[described], generator, FORMS, second=.2)
        try:
            if not path.exists() or not path.stat().st_size:  # empty after a power cut
                shot, pose = _animate(pose, generator)
                write_video(path, draw_shots(facts[shot], pose, SIDE), RATE)
        except OSError as e:
            return DataError(f"{path} can't be written: {e.strerror}: make room or use another "
                             "--root")
        return texts, facts.tolist(), says.tolist()


def write_video(path, frames, rate):
    """uint8 (T,3,H,W), W a multiple of 32 -> an H.264 file."""
    H, W = frames.shape[2:]
    options = {"preset": "superfast", "crf": "22"}  # slower presets write different bytes each time
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate, options, width=W, height=H, pix_fmt="yuv420p")
        stream.thread_type = "FRAME"
        stream.thread_count = 1
        for pixels in frames.permute(0, 2, 3, 1):
            frame = av.VideoFrame(W, H, "rgb24")
            plane = torch.frombuffer(frame.planes[0], dtype=torch.uint8)
            plane.view(H, W, 3).copy_(pixels)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    # A kill leaves this file, which the next rendering replaces.
    part = path.with_suffix(".part")
    part.write_bytes(content.getvalue())
    part.replace(path)


# ---- the folder ----


def oracle_ceiling(facts, owner, says, target):
    """The expected R@1, in percent, of a search that knows all facts.

    A caption fits a video if it fits one of its shots. Among the videos that fit, the search picks
    one at random. facts (S,6) and owner (S,): all shots and their videos. says (N,6), -1 for facts
    that a caption leaves out, and target (N,): all captions and their videos.
    """
    total = 0
    for said, video in zip(says, target.tolist()):
        fits = ((said == -1) | (said == facts)).all(1)
        found = set(owner[fits].tolist())
        total += (video in found) / len(found)
    return 100 * total / len(says)


def shapes_of(root):
    """What a folder holds of this data set. -> (settings, whether it is complete)

    ({}, False) for an empty or missing folder. Raises DataError if it holds anything else, or
    another version.
    """
    root = Path(root)
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return {}, False
    try:
        settings = json.loads((root / "shapes.json").read_text(encoding="utf-8"))["settings"]
        version = settings["version"]
        numbers = "{train} {val} {test}".format(**settings)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        raise DataError(f"{root} is neither empty nor made by shapes.py: choose another --root") \
            from None
    if version != SHAPES_VERSION:
        raise DataError(f"{root} holds version {version} of shapes, but this is version "
                        f"{SHAPES_VERSION}: delete it, then render it again: "
                        f"python -m lib.shapes --root {root} --videos {numbers}")
    return settings, (root / "captions.csv").exists()


def shapes_table(root):
    """The path of captions.csv. Raises DataError if the data set has not been rendered."""
    settings, whole = shapes_of(root)
    if not whole:
        missing = "an incomplete data set" if settings else "no data set"
        numbers = "{train} {val} {test} --seed {seed}" if settings else "1500 100 500"
        numbers = numbers.format(**settings)
        raise DataError(f"{root} holds {missing} shapes: `python train.py` renders it, or "
                        f"python -m lib.shapes --root {root} --videos {numbers}")
    return Path(root) / "captions.csv"


def render_shapes(root, train=1500, val=100, test=500, seed=24, workers=None):
    """Render the data set unless it exists: shapes.json (settings, ceiling), videos, captions.csv.

    captions.csv is written last; the next call continues a rendering that was stopped. The files
    are the same for any number of workers.
    """
    root = Path(root)
    wanted = dict(version=SHAPES_VERSION, train=train, val=val, test=test, seed=seed)
    begun, whole = shapes_of(root)
    if whole:
        return
    if begun and begun != wanted:
        raise DataError(f"{root} holds an unfinished data set with {begun}: delete it, or choose "
                        "another --root")
    videos = ShapesVideos(root / "videos", train, val, test, seed)
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_whole(root / "shapes.json", json.dumps(dict(settings=wanted)))
        videos.folder.mkdir(exist_ok=True)
        rows, ceiling = _render(videos, workers)
        write_whole(root / "shapes.json", json.dumps(dict(settings=wanted, ceiling=ceiling)))
        with written_whole(root / "captions.csv") as part, \
                open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    except OSError as e:
        raise DataError(f"{root}: shapes can't be written there: {e.strerror}; choose another "
                        "--root") from None
    best = f"; highest R@1 that the captions allow: {ceiling:.1f} %" if test else ""
    print(f"shapes: {train}/{val}/{test} videos to train, validate and test in {root}{best}")


def _render(videos, workers):
    """Write all videos. -> (rows of captions.csv, oracle_ceiling of the test split or None)"""
    rows = [("video", "caption", "split")]
    facts, owner, says, target = [], [], [], []
    progress = Progress(f"rendering {videos.folder.parent}", len(videos))
    numbers = [[i] for i in range(len(videos))]
    with loading(videos, numbers, workers=workers) as items:
        for i, [item] in enumerate(items):
            if isinstance(item, DataError):
                raise item
            captions, shots, mentioned = item
            name = f"videos/{videos.path(i).name}"
            split = videos.splits[i]
            rows += [(name, caption, split) for caption in captions]
            if split == "test":
                facts += shots
                owner += [i] * len(shots)
                says += mentioned
                target += [i] * len(mentioned)
            progress.update(i + 1)
    if not target:
        return rows, None
    columns = map(torch.tensor, (facts, owner, says, target))
    return rows, oracle_ceiling(*columns)


def shapes_ceiling(root=None):
    """The ceiling that was recorded when rendering, in percent; None if there is none."""
    try:
        about = read_json(Path(root or "data/shapes", "shapes.json"), "shapes", dict)
        ceiling = about["ceiling"]
        return ceiling if 0 <= ceiling <= 100 else None
    except (ValueError, KeyError, TypeError):
        return None


# ---- the CLIP that is trained on it from scratch ----


TINY = dict(  # a CLIP that is small enough to be trained from scratch on a CPU
    embed_dim=128,
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_layers=3,
    context_length=48,
    text_width=128,
    text_layers=2,
    quick_gelu=False,
)


def tiny_clip(captions):
    """A CLIP with random weights, whose vocabulary is that of the captions. -> (CLIP, Tokenizer)"""
    tokenizer = Tokenizer.learn(captions, 600, TINY["context_length"])
    return CLIP(vocab_size=tokenizer.vocab_size, **TINY), tokenizer


def draw(tokenizer, size, seed, steps):
    """Draw the pairs of one warm-up step. -> ids (128,L), pictures uint8 (128,3,P,P).

    steps: a list of one step number. Each step gets new pairs.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, *steps))
    pictures, phrases = shapes_pictures(128, generator, size)
    return tokenizer(phrases), pictures


def warm_up(clip, tokenizer, rates, seed, workers, say):
    """Train the tiny CLIP on single pictures. rates: one factor of the learning rate per step."""
    optimizer = torch.optim.AdamW(
        clip.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    device = clip.logit_scale.device
    batches = [[step] for step in range(len(rates))]
    draw_pairs = functools.partial(draw, tokenizer, clip.image_size, seed)
    with loading(range(len(rates)), batches, draw_pairs, workers) as loader:
        for step, (ids, pixels) in enumerate(loader):
            optimizer.param_groups[0]["lr"] = 2e-3 * rates[step]
            t = clip.encode_text(ids.to(device))
            v = clip.encode_image(pixels.to(device))
            sims = F.normalize(t, dim=-1) @ F.normalize(v, dim=-1).T
            loss = symmetric_cross_entropy(sims, clip.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(max=math.log(100))
            if (step + 1) % 100 == 0 or step + 1 == len(rates):
                say(f"pretrain {step + 1}/{len(rates)}  loss {loss.item():.3f}")


# ---- command line ----


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--root", metavar="DIR", required=True, help="folder to write into")
    p.add_argument("--videos", type=numeric(int, 0), nargs=3,
                   metavar=("TRAIN", "VAL", "TEST"), required=True,
                   help="number of videos per split")
    p.add_argument("--seed", type=numeric(int, 0), default=24,
                   help="of everything random (default: %(default)s)")
    args = p.parse_args(argv)
    wanted = dict(zip(CAPTIONS, args.videos), seed=args.seed)
    render_shapes(args.root, **wanted)
    settings, _ = shapes_of(args.root)
    if not wanted.items() <= settings.items():  # it was there already, and was not touched
        raise DataError(f"{args.root} holds another data set already: delete it, or choose another "
                        "--root")
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
