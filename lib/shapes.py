"""The data set `shapes`, which makes itself: small mp4 files, and captions that leave facts out.

    python -m lib.shapes --root DIR --videos 1500 100 500

`python train.py` renders that many into data/shapes when it is first called.
"""
import csv
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import av
import torch

from lib.common import (
    DataError,
    Parser,
    Progress,
    mixed_seed,
    numeric,
    program,
    write_text,
    written_whole,
)
from lib.processes import loading
from lib.tables import read_json

# ---- facts and words ----
# A video is a sequence of shots. A shot has six facts: sky, ground, then shape and colour of the
# left sticker and of the right one. A caption describes one shot, left sticker first; a fact that
# it leaves out is -1. Each fact has two wordings; the warm-up's phrases use only the first.
# CLIP sees single frames, which show neither order nor motion, so captions don't mention them.


def _table(text):
    """The rows of a table, one a line: cells between bars."""
    return [re.split(r"\s*\|\s*", line.strip()) for line in text.strip().splitlines()]


SKIES = _table("""
    at night           | under the stars     | 0A0E30 3A2F78 FFF6D0
    at noon            | under a blue sky    | 2E8BE6 A8DCF5 A8DCF5
    at sunset          | in the evening glow | 7A2A5E FF8A3C FFE27A
    at dawn            | under a pink sky    | C75B9B FFC9D6 FFC9D6
    in the rain        | under grey clouds   | 4C5866 8A97A3 C7D0D8
    in a snowfall      | under falling snow  | 8FB4CF C6DCEC FFFFFF
    under green lights | below an aurora     | 06282E 0E5A4A 5CF2A0
    in the fog         | in a white mist     | E4E8EA F4F6F6 F4F6F6
""")  # colours: at the top, at the horizon, and of what is in the sky
GROUNDS = _table("""
    on the sea     | over waves        | .13 | 0B6E99 6FD3E0
    on sand        | among dunes       | .13 | E3B565 C98A3B
    on snow        | on a white field  | .13 | F2F7FB D3E2EE
    on a meadow    | among green hills | .13 | 8CC751 5E9E3A
    on bricks      | over a brick wall | 0   | B4573F E3CBB8
    on tiles       | over a chessboard | 0   | 30343A DDE2E6
    on lava        | over glowing rock | .13 | 4A0F0A FF6A1A
    on a dark road | on asphalt        | 0   | 3C3F45 F2E9C8
""")  # how high hills rise at the horizon; colours
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
FACTS = dict(sky=SKIES, ground=GROUNDS,
             shape=SHAPES, colour=COLOURS, shape2=SHAPES, colour2=COLOURS)
FORMS = [
    "a {colour} {shape} and a {colour2} {shape2} {ground} {sky}",  # the warm-up's
    "a {colour} {shape} next to a {colour2} {shape2} {ground} {sky}",
    "{sky}, a {colour} {shape} beside a {colour2} {shape2} {ground}",
    "there is a {colour} {shape} with a {colour2} {shape2} {ground} {sky}",
    "{sky} we see a {colour} {shape} and a {colour2} {shape2} {ground}",
    "a video that shows a {colour} {shape} near a {colour2} {shape2} {ground}, {sky}",
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
""")  # how shots are seen: the mean, how far it differs from shot to shot, and how far it moves
NUMBERS = [list(map(float, row[1:])) for row in POSE]
MEAN, SPREAD, REACH = torch.tensor(NUMBERS).T  # each (14,)
LEFT_OUT = torch.tensor([.06, .06, 0, .04, 0, .04])  # how often a caption leaves out each fact
CAPTIONS = dict(train=4, val=1, test=8)  # per video; 4,000 queries have a quarter of 500's noise
FRAMES = 24  # per video
RATE = 8  # frames per second
SIDE = 96  # pixels
SHAPES_VERSION = 2  # of what is drawn and written; older folders are refused
SETTINGS = dict(train=1500, val=100, test=500, seed=24)  # what `python train.py` renders

# ---- drawing ----
# Coordinates: x from -1 to 1 to the right (n,1,S), y from -1 to 1 upwards (n,S,1); px is a pixel's
# side in them. A picture is (3,n,S,S), so that an amount (n,S,S) of paint applies to each channel.
# What differs by kind is only where there is paint; all pictures are painted at once.

CELLS = 1021  # with a speck each, before they repeat
# Each cell has four random numbers: one more, then x, y and rarity of its speck; the first three
# are also the colour of confetti. They are here twice: the sum of two indices is an index.
SPECKS = torch.rand(4, CELLS, generator=torch.Generator().manual_seed(0))
SPECKS = SPECKS.roll(1, 0).repeat(1, 2)


def _paints(table, kinds):
    """The colours RRGGBB in the last cells of a table, for pictures of these kinds.

    kinds (n,): rows of the table -> (colours,3,n,1,1) in 0..1.
    """
    codes = [list(bytes.fromhex(row[-1])) for row in table]
    paints = torch.tensor(codes).view(len(table), -1, 3) / 255
    return paints[kinds].permute(1, 2, 0)[..., None, None]


def _by_kind(pattern, kinds, x, y, *time):
    """pattern(kind, x, y, time) for the pictures of each kind. kinds (n,), y (n,H,1) -> (n,H,S)."""
    found = torch.empty(*y.shape[:2], x.shape[2])
    for kind in kinds.unique().tolist():
        rows, = torch.where(kinds == kind)
        # index_select is five times as fast as an index in brackets
        found[rows] = pattern(kind, *[place.index_select(0, rows) for place in (x, y, *time)])
    return found


def _specks(x, y, density, radius, px):
    """Specks strewn over a plane, at most one in a unit cell.

    x (n,1,S), y (n,S,1) -> amount of speck (n,S,S), the numbers of its cell (4,n,S,S).
    """
    column = x.floor().long() * 61 % CELLS
    row = y.floor().long() * 157 % CELLS
    cell = column + row
    numbers = SPECKS.index_select(1, cell.flatten()).view(4, *cell.shape)
    right = x % 1 - .3 - .4 * numbers[1]
    up = y % 1 - .3 - .4 * numbers[2]
    amount = (radius - torch.hypot(right, up)) / px + .5
    return amount.clamp_(0, 1) * (numbers[3] < density), numbers


def _sky(kind, x, y, time):
    """The amount of a sky's third colour. x (n,1,S), y (n,S,1), time (n,1,1) -> (n,S,S) or 0."""
    px = 2 / x.shape[2]
    match SKIES[kind][0]:
        case "at night":
            return _specks(x * 4 + time / 4, y * 4, .6, .12, px * 4)[0]
        case "at sunset":
            distance = torch.hypot(x - .1 * time.sin(), y - .35)
            return (.3 - distance) / px + .5
        case "in the rain":
            streak = (x * 9 - y * 3 + time * 2) % 1
            return (.12 - (streak - .5).abs()) * 2
        case "in a snowfall":
            across = x * 3.5 + time / 4
            return _specks(across, y * 3.5 + time, .7, .16, px * 3.5)[0]
        case "under green lights":
            bend = (3 * y + time).sin()
            return (x * 4 + bend).sin() * .6
    return 0


def _ground(kind, x, y, time):
    """The amount of a ground's second colour. x (n,1,S), y (n,H,1), time (n,1,1) -> (n,H,S)."""
    px = 2 / x.shape[2]
    match GROUNDS[kind][0]:
        case "on bricks":
            level = (y * 4 % 1 - .5).abs()
            shifted = x * 2 + (y * 4).floor() / 2
            upright = (shifted % 1 - .5).abs() * 2
            return (.07 - torch.minimum(level, upright)) / px / 4 + .5
        case "on tiles":
            return ((x * 2.5).floor() + (y * 2.5).floor()) % 2
        case "on a dark road":
            line = .06 - (y + .55).abs()
            dash = ((x + time / 4) * 1.5 % 1 - .5).abs() - .2
            return torch.minimum(line, dash) / px + .5
        case "on the sea" | "on lava":
            bend = 1.3 * (3 * x + time).sin()
            wave = (10 * y + bend + time).sin()
            return (wave - .4) / px / 9 + .5
    hill = -.45 + .16 * (2.4 * x + time / 3).sin()
    return (hill - y) / px + .5


def _draw_scenery(facts, x, y, time, px):
    """Skies over grounds. facts (n,6), x (n,1,S), y (n,S,1), time (n,1,1) -> (3,n,S,S)."""
    skies, grounds = facts.T[:2]
    top, low, third = _paints(SKIES, skies)
    low_part = .75 - .75 * y  # brighter towards the horizon
    sky = torch.lerp(top, low, low_part.clamp_(0, 1)).repeat(1, 1, 1, x.shape[2])
    amount = _by_kind(_sky, skies, x, y, time)
    sky.lerp_(third, amount.clamp_(0, 1))
    # The horizon is never above .15: the rows before `first` have no ground.
    first = int((y > .15 + px).all(0).sum())
    y = y[:, first:]
    amount = _by_kind(_ground, grounds, x, y, time)
    ground = torch.lerp(*_paints(GROUNDS, grounds), amount.clamp_(0, 1))
    hills = torch.tensor([float(row[2]) for row in GROUNDS])[grounds]
    horizon = .02 + hills[:, None, None] * (2.2 * x + time / 4).sin()
    cover = (horizon - y) / px + .5
    sky[:, :, first:].lerp_(ground, cover.clamp_(0, 1))
    return sky


def _outline(kind, x, y):
    """Signed distance from a shape of radius 1, negative inside. x, y (n,S,S) -> (n,S,S)."""
    r = torch.hypot(x, y)
    match SHAPES[kind][0]:
        case "circle":
            return r - .9
        case "square":
            return torch.maximum(x.abs(), y.abs()) - .78
        case "ring":
            return (r - .66).abs() - .26
        case "cross":
            x = x.abs()
            y = y.abs()
            return torch.maximum(torch.minimum(x, y) - .3, torch.maximum(x, y) - .9)
        case "triangle":
            tips, inner, grow = 3, .5, .08
        case "star":
            tips, inner, grow = 5, .45, .04
    # These two are fans of equal sectors, folded into one half of a sector. Their edge there runs
    # from the tip (1, 0) to a corner (ex, ey) before it.
    half = math.pi / tips
    turn = torch.atan2(x, y) / (2 * half) + .5
    angle = (turn % 1 - .5).abs() * 2 * half
    ex = 1 - inner * math.cos(half)
    ey = inner * math.sin(half)
    beyond = ey * (r * angle.cos() - 1) + ex * r * angle.sin()
    return beyond / math.hypot(ex, ey) - grow


def _draw_sticker(picture, facts, pose, x, y, px):
    """Put a sticker on each picture: a shadow, a white rim, and a shape that is lighter at the top.

    facts (n,2): shape and colour. pose (n,4): x, y, angle, radius.
    """
    at_x, at_y, angle, radius = pose.T[..., None, None]  # each (n,1,1)
    right = (x - at_x) / radius
    up = (y - at_y) / radius
    across = right * angle.cos() - up * angle.sin()
    along = right * angle.sin() + up * angle.cos()
    distance = _by_kind(_outline, facts[:, 0], across, along).mul_(radius)
    # where a shadow or a rim is seen in some picture (S,S): the rest stays as it is
    near = distance.amin(0) < .4 / 2.2 + px
    start, end = near.nonzero().aminmax(dim=0)
    box = (..., *map(slice, start, end + 1))
    distance = distance[box]
    inside = (-distance / px).add_(.5).clamp_(0, 1)
    rim = (.055 - distance).div_(px).add_(.5).clamp_(0, 1)
    shadow = (.4 - 2.2 * distance).clamp_(0, 1)
    bright = inside * (.93 + .07 * along[box])
    paint, = _paints(COLOURS, facts[:, 1])
    spot = picture[box]
    spot *= (1 - shadow) * (1 - rim)
    spot += (rim - inside) + paint * bright


def draw_shots(facts, pose, size):
    """Draw a picture for each row. facts (n,6), pose (n,14) -> uint8 (n,3,size,size).

    pose has the columns of POSE.
    """
    px = 2 / size
    line = (torch.arange(size) + .5) * px - 1
    zoom, camera_x, camera_y, time, light, confetti = pose.T[:6, :, None, None]  # each (n,1,1)
    x = (line + camera_x) / zoom  # (n,1,S)
    y = (camera_y - line[:, None]) / zoom  # (n,S,1)
    picture = _draw_scenery(facts, x, y, time, px)
    strewn, *_ = torch.where(confetti)
    time = time[strewn]
    across = x[strewn] * 3 + time / 3
    amount, numbers = _specks(across, y[strewn] * 3 - time / 2, .4, .16, px * 3)
    bare = picture.index_select(1, strewn)
    picture[:, strewn] = bare.lerp_(numbers[:3], amount)
    _draw_sticker(picture, facts[:, 2:4], pose[:, 6:10], x, y, px)
    _draw_sticker(picture, facts[:, 4:6], pose[:, 10:14], x, y, px)
    # in place: pages of memory cost as much as the arithmetic
    picture.mul_(light).mul_(255).clamp_(0, 255)
    return picture.byte().transpose(0, 1)


# ---- shots, captions and videos by chance ----


def random_shots(n, generator):
    """-> facts (n,6) of n shots, and the pose (n,14) in which they are seen (`draw_shots`)."""
    facts = [torch.randint(len(rows), (n,), generator=generator) for rows in FACTS.values()]
    u = torch.rand(n, 14, generator=generator) * 2 - 1
    return torch.stack(facts, 1), MEAN + SPREAD * u


def _describe(facts, generator, forms, second):
    """A caption for each shot, whose words are the second ones with probability `second`.

    facts (n,6) -> (n texts, the facts that they mention (n,6), -1 elsewhere).
    """
    n = len(facts)
    u, v = torch.rand(2, n, 6, generator=generator)
    says = facts.where(u >= LEFT_OUT, -1)
    chosen = torch.randint(len(forms), (n,), generator=generator).tolist()
    wordings = (v < second).long().tolist()
    texts = []
    for form, mentioned, wording in zip(chosen, says.tolist(), wordings):
        words = {}
        for (name, rows), fact, k in zip(FACTS.items(), mentioned, wording):
            words[name] = rows[fact][k] if fact >= 0 else ""
        text = " ".join(forms[form].format(**words).split())
        text = text.replace(" ,", ",").strip(" ,")
        texts.append(re.sub(r"\ba (?=[aeiou])", "an ", text))
    return texts, says


def shapes_pictures(n, generator, size=32):
    """Fresh pairs for the warm-up, in plain words. -> (uint8 (n,3,size,size), n phrases)."""
    facts, pose = random_shots(n, generator)
    phrases, _ = _describe(facts, generator, FORMS[:1], second=0)
    return draw_shots(facts, pose, size), phrases


def _animate(pose, generator):
    """The pose of each shot (shots,14) -> each frame's shot (FRAMES,) and pose (FRAMES,14).

    No shot is shorter than 5 frames, so that 6 sampled frames see every shot.
    """
    shots = len(pose)
    extra = torch.randint(shots, (FRAMES - 5 * shots,), generator=generator)
    lengths = 5 + extra.bincount(minlength=shots)
    shot = torch.arange(shots).repeat_interleave(lengths)
    middle = lengths.cumsum(0) - lengths / 2
    t = (torch.arange(FRAMES) - middle[shot])[:, None] / RATE
    u = torch.rand(3, shots, 14, generator=generator) * 2 - 1
    drift, sway, phase = u[:, shot]
    motion = drift * t + sway * (4 * t + 3 * phase).sin()
    pose = pose[shot] + REACH * motion
    pose[:, 4] += .15 * drift[:, 4] - .05  # light
    pose[:, 5] = drift[:, 5] > 0  # confetti or none
    return shot, pose


class ShapesVideos:
    """All videos, by number. Item i -> captions, facts of the shots (S,6), facts mentioned (n,6).

    It is drawn by a generator of its own, and written to its file unless that is there. The facts
    are lists.
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
        if not path.exists() or not path.stat().st_size:  # a power cut can leave an empty file
            shot, pose = _animate(pose, generator)
            write_video(path, draw_shots(facts[shot], pose, SIDE), RATE)
        return texts, facts.tolist(), says.tolist()


def write_video(path, frames, rate):
    """uint8 (T,3,H,W) -> an H.264 file."""
    H, W = frames.shape[2:]
    # slower presets, and threads, write other bytes each time
    options = {"preset": "superfast", "crf": "22", "threads": "1"}
    with written_whole(path, flush=False) as part, av.open(part, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate, options, width=W, height=H, pix_fmt="yuv420p")
        for pixels in frames.permute(0, 2, 3, 1).numpy():
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


# ---- the folder ----


def oracle_ceiling(shots, says):
    """The R@1, in percent, of a search that knows all facts.

    A caption fits a video if it fits one of its shots, and of the videos that fit, its own among
    them, the search picks one at random. shots: the facts (S,6) of each video's shots. says (N,6):
    the facts that captions mention, -1 where they leave one out.
    """
    fitting = torch.zeros(len(says), dtype=torch.float64)  # videos
    for facts in shots:
        matches = (says[:, None] == -1) | (says[:, None] == facts)  # (N,S,6)
        fitting += matches.all(2).any(1)
    return (100 / fitting).mean().item()


def _about(root):
    return read_json(Path(root, "shapes.json"), "shapes", dict)


def shapes_of(root):
    """What a folder holds of this data set. -> (settings, is it whole?); ({}, False): it is free.

    Raises DataError for a folder that holds anything else, or an older version.
    """
    root = Path(root)
    try:
        if not root.exists() or not any(root.iterdir()):
            return {}, False
        settings = _about(root)["settings"]
        version = settings["version"]
        numbers = "{train} {val} {test}".format(**settings)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{root} is neither empty nor made by shapes.py: choose another --root") \
            from None
    if version != SHAPES_VERSION:
        raise DataError(f"{root} holds version {version} of shapes, and this is version "
                        f"{SHAPES_VERSION}: delete it, then make it anew: "
                        f"python -m lib.shapes --root {root} --videos {numbers}")
    return settings, (root / "captions.csv").exists()


def shapes_table(root):
    """-> the path of captions.csv, or a DataError if the data set has not been rendered."""
    settings, whole = shapes_of(root)
    if not whole:
        missing = "no whole data set" if settings else "no data set"
        numbers = "{train} {val} {test} --seed {seed}".format(**SETTINGS | settings)
        raise DataError(f"{root} holds {missing} shapes: `python train.py` renders it, or "
                        f"python -m lib.shapes --root {root} --videos {numbers}")
    return Path(root) / "captions.csv"


def render_shapes(root, workers=min(8, os.cpu_count() or 1), **settings):
    """Make the data set unless one is there: shapes.json (settings, ceiling), videos, captions.csv.

    settings: those that differ from SETTINGS. captions.csv is written last, and a rendering that
    was stopped goes on with the next call. The files are the same for any number of workers.
    """
    root = Path(root)
    videos = ShapesVideos(root / "videos", **SETTINGS | settings)
    settings = dict(version=SHAPES_VERSION, **SETTINGS | settings)
    begun, whole = shapes_of(root)
    if whole:
        return
    if begun and begun != settings:
        raise DataError(f"{root} holds an unfinished data set, of {begun}: delete it, or choose "
                        "another --root")
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_text(root / "shapes.json", json.dumps(dict(settings=settings)))
        videos.folder.mkdir(exist_ok=True)
        rows, ceiling = _render(videos, workers)
        write_text(root / "shapes.json", json.dumps(dict(settings=settings, ceiling=ceiling)))
        table = io.StringIO()
        csv.writer(table).writerows(rows)
        write_text(root / "captions.csv", table.getvalue())
    except OSError as e:
        raise DataError(f"{root}: shapes can't be written there: {e}; make room, or choose another "
                        "--root") from None
    made = "shapes: {train}/{val}/{test} videos to train, validate and test in ".format(**settings)
    best = f"; highest R@1 that the captions allow: {ceiling:.1f} %" if ceiling else ""
    print(f"{made}{root}{best}")


def _render(videos, workers):
    """Write all files. -> the rows of captions.csv, the test split's oracle_ceiling or None."""
    rows = [("video", "caption", "split")]
    shots = []
    says = []
    progress = Progress(f"rendering {videos.folder.parent}", len(videos))
    numbers = [[i] for i in range(len(videos))]
    with loading(videos, numbers, workers=min(workers, len(videos))) as items:
        for i, [(captions, facts, mentioned)] in enumerate(items):
            name = f"videos/{videos.path(i).name}"
            split = videos.splits[i]
            rows += [(name, caption, split) for caption in captions]
            if split == "test":
                shots.append(torch.tensor(facts))
                says += mentioned
            progress.update(i + 1)
    return rows, oracle_ceiling(shots, torch.tensor(says)) if says else None


def shapes_ceiling(root=None):
    """The ceiling that rendering wrote down, in percent; None if there is none."""
    try:
        ceiling = _about(root or "data/shapes")["ceiling"]
        return ceiling if 0 <= ceiling <= 100 else None
    except (ValueError, KeyError, TypeError):
        return None


# ---- command line ----


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--root", required=True, help="folder to write into")
    p.add_argument("--videos", type=numeric(int, 0), nargs=3, metavar=("TRAIN", "VAL", "TEST"),
                   required=True, help="number of videos per split")
    p.add_argument("--seed", type=numeric(int, 0), default=SETTINGS["seed"],
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
