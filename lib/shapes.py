"""The data set that makes itself: small real mp4 files of several shots; captions tell of one shot and leave facts out.

    python -m lib.shapes --root DIR --videos 1500 100 500     # `python train.py` renders so many into data/shapes at first
"""
import csv
import json
import math
import os
import sys
from pathlib import Path

import av
import torch
from torch.utils.data import Dataset

from lib.common import DataError, Parser, numeric, program, write_text, written_whole
from lib.processes import loading

# ---- facts and words ----
# A shot has six facts: a sky and a ground, then shape and colour of the left thing and of the right. A caption tells
# of one shot, left thing first, not always of everything: -1 is a fact left unsaid. Each fact has two wordings, and the
# warm-up's phrases know the first only. Frames tell nothing of order or motion, so neither do captions.
SKIES = [["at night", "under the stars"], ["at noon", "under a blue sky"], ["at sunset", "in the evening glow"],
         ["at dawn", "under a pink sky"], ["in the rain", "under grey clouds"], ["in a snowfall", "under falling snow"],
         ["under green lights", "below an aurora"], ["in the fog", "in a white mist"]]
GROUNDS = [["on the sea", "over waves"], ["on sand", "among dunes"], ["on snow", "on a white field"],
           ["on a meadow", "among green hills"], ["on bricks", "over a brick wall"], ["on tiles", "over a chessboard"],
           ["on lava", "over glowing rock"], ["on a dark road", "on asphalt"]]
THINGS = [["circle", "disc"], ["square", "box"], ["triangle", "wedge"], ["star", "sparkle"], ["ring", "hoop"],
          ["cross", "plus"]]
COLOURS = [["red", "crimson"], ["orange", "tangerine"], ["yellow", "golden"], ["green", "emerald"], ["blue", "azure"],
           ["purple", "violet"], ["black", "inky"], ["white", "ivory"]]
WORDS = [SKIES, GROUNDS, THINGS, COLOURS, THINGS, COLOURS]  # the six facts, in order
FORMS = ["{a} and {b} {ground} {sky}", "{a} next to {b} {ground} {sky}", "{sky}, {a} beside {b} {ground}",
         "there is {a} with {b} {ground} {sky}", "{sky} we see {a} and {b} {ground}",
         "a video that shows {a} near {b} {ground}, {sky}"]
CAPTIONS = dict(train=4, val=1, test=8)  # per video; 4,000 test queries have a quarter of the sampling noise of 500
FRAMES, RATE, SIDE = 24, 8, 96           # frames per video, and per second; pixels
SHAPES_VERSION = 2                       # of what is drawn and told


def rgb(*codes):
    """0xRRGGBB codes -> (n,3,1,1) in 0..1."""
    return torch.tensor([[c >> 16, c >> 8 & 255, c & 255] for c in codes]).view(-1, 3, 1, 1) / 255


PAINTS = rgb(0xE53935, 0xFF8F0F, 0xFFDD2D, 0x2FA84F, 0x1E78E5, 0x9230B0, 0x25252B, 0xFAFAF5)
STREWN = torch.rand(4, 1021, generator=torch.Generator().manual_seed(0))  # where specks are, and how they look


def over(under, paint, w):
    """Paint over a picture as far as w (n,S,S) in 0..1 says. -> (n,3,S,S)."""
    return torch.lerp(under, paint, w.clamp(0, 1)[:, None])


def specks(x, y, density, radius, px):
    """Dots strewn over a plane, one at most in a cell. x (n,1,S), y (n,S,1) -> how much of a dot, its cell (n,S,S)."""
    column, row = x.floor(), y.floor()
    cell = (column.long() * 61 + row.long() * 157) % STREWN.shape[1]
    far = torch.hypot(x - column - .3 - .4 * STREWN[0][cell], y - row - .3 - .4 * STREWN[1][cell])
    return ((radius - far) / px + .5).clamp(0, 1) * (STREWN[2] < density)[cell], cell


SKY_PAINTS = [rgb(*codes).unsqueeze(1) for codes in (
    (0x0A0E30, 0x3A2F78), (0x2E8BE6, 0xA8DCF5), (0x7A2A5E, 0xFF8A3C), (0xC75B9B, 0xFFC9D6),
    (0x4C5866, 0x8A97A3), (0x8FB4CF, 0xC6DCEC), (0x06282E, 0x0E5A4A), (0xE4E8EA, 0xF4F6F6))]  # above and at the horizon
GROUND_PAINTS = [rgb(*codes).unsqueeze(1) for codes in (
    (0x0B6E99, 0x6FD3E0), (0xE3B565, 0xC98A3B), (0xF2F7FB, 0xD3E2EE), (0x8CC751, 0x5E9E3A),
    (0xB4573F, 0xE3CBB8), (0x30343A, 0xDDE2E6), (0x4A0F0A, 0xFF6A1A), (0x3C3F45, 0xF2E9C8))]


def scenery(sky, ground, x, y, s, px):
    """One sky over one ground at time s (n,1,1). x (n,1,S), y (n,S,1) in -1..1, y up, px: a pixel -> (n,3,S,S)."""
    top, low = SKY_PAINTS[sky]
    picture = over(top, low, .75 - y * .75 + 0 * x)  # brighter towards the horizon
    if sky == 0:
        picture = over(picture, rgb(0xFFF6D0), specks(x * 4 + s / 4, y * 4, .6, .12, px * 4)[0])
    if sky == 2:
        picture = over(picture, rgb(0xFFE27A), (.3 - torch.hypot(x - .1 * s.sin(), y - .35)) / px + .5)
    if sky == 4:
        picture = over(picture, rgb(0xC7D0D8), (.12 - ((x * 9 - y * 3 + s * 2) % 1 - .5).abs()) * 2)
    if sky == 5:
        picture = over(picture, rgb(0xFFFFFF), specks(x * 3.5 + s / 4, y * 3.5 + s, .7, .16, px * 3.5)[0])
    if sky == 6:
        picture = over(picture, rgb(0x5CF2A0), ((x * 4 + (3 * y + s).sin()).sin() * .6))
    a, b = GROUND_PAINTS[ground]
    if ground in (0, 6):
        soil = over(a, b, ((10 * y + 1.3 * (3 * x + s).sin() + s).sin() - .4) / px / 9 + .5)
    elif ground == 4:
        row = (y * 4).floor()
        joint = torch.minimum((y * 4 - row - .5).abs(), ((x * 2 + row / 2) % 1 - .5).abs() * 2) - .07
        soil = over(a, b, -joint / px / 4 + .5)
    elif ground == 5:
        soil = over(a, b, ((x * 2.5).floor() + (y * 2.5).floor()) % 2)
    elif ground == 7:
        soil = over(a, b, torch.minimum(.06 - (y + .55).abs(), ((x + s / 4) * 1.5 % 1 - .5).abs() - .2) / px + .5)
    else:
        soil = over(a, b, (-.45 + .16 * (2.4 * x + s / 3).sin() - y) / px + .5)
    flat = ground in (4, 5, 7)
    return over(picture, soil, ((.02 if flat else .02 + .13 * (2.2 * x + s / 4).sin()) - y + 0 * x) / px + .5)


def outline(kind, x, y):
    """Signed distance from a thing of radius 1, negative inside. x, y (n,S,S) -> (n,S,S)."""
    r = torch.hypot(x, y)
    if kind == 0:  # circle
        return r - .9
    if kind == 1:  # square
        return torch.maximum(x.abs(), y.abs()) - .78
    if kind == 4:  # ring
        return (r - .66).abs() - .26
    if kind == 5:  # cross
        x, y = x.abs(), y.abs()
        return torch.maximum(torch.minimum(x, y) - .3, torch.maximum(x, y) - .9)
    # triangle, star: a fan of equal sectors, folded; the edge runs from the tip (1, 0) to the corner
    tips, inner, grow = (3, .5, .08) if kind == 2 else (5, .45, .04)
    half = math.pi / tips
    angle = ((torch.atan2(x, y) / (2 * half) + .5) % 1 - .5).abs() * 2 * half
    ex, ey = 1 - inner * math.cos(half), inner * math.sin(half)
    return (ey * (r * angle.cos() - 1) + ex * r * angle.sin()) / math.hypot(ex, ey) - grow


def draw_shots(facts, pose, size):
    """facts (n,6), pose (n,14): zoom, camera x, y, time, light, confetti, twice x, y, angle, radius -> (n,3,S,S)."""
    px = 2 / size
    line = (torch.arange(size) + .5) * px - 1
    zoom, camera_x, camera_y, s, light, confetti, *things = pose.T[..., None, None]  # each (n,1,1)
    x, y = (line + camera_x) / zoom, (camera_y - line[:, None]) / zoom  # (n,1,S), (n,S,1)
    picture = torch.empty(len(facts), 3, size, size)
    for sky, ground in facts[:, :2].unique(dim=0).tolist():
        rows = (facts[:, 0] == sky) & (facts[:, 1] == ground)
        picture[rows] = scenery(sky, ground, x[rows], y[rows], s[rows], px)
    if confetti.any():
        dot, cell = specks(x * 3 + s / 3, y * 3 - s / 2, .4, .16, px * 3)
        picture = over(picture, STREWN[[3, 0, 1]][:, cell].transpose(0, 1), dot * confetti)
    left, right = (facts[:, 2], facts[:, 3], things[:4]), (facts[:, 4], facts[:, 5], things[4:])
    for thing, colour, (at_x, at_y, angle, radius) in (left, right):
        dx, dy = (x - at_x) / radius, (y - at_y) / radius
        dx, dy = dx * angle.cos() - dy * angle.sin(), dx * angle.sin() + dy * angle.cos()
        d = torch.empty_like(dx)
        for kind in thing.unique():
            rows = thing == kind
            d[rows] = outline(kind, dx[rows], dy[rows])
        d *= radius
        inside, rim = (-d / px + .5).clamp(0, 1), ((.055 - d) / px + .5).clamp(0, 1)
        shadow = (.4 - 2.2 * d).clamp(0, 1)  # a sticker: its shadow, a white rim, and the thing, lighter at the top
        picture *= ((1 - shadow) * (1 - rim))[:, None]
        picture += (rim - inside)[:, None] + PAINTS[colour] * (inside * (.93 + .07 * dy))[:, None]
    return (picture * light[:, None] * 255).clamp(0, 255).byte()


def random_shots(n, generator):
    """Facts (n,6), and the pose (n,14) they are seen in."""
    facts = torch.stack([torch.randint(len(words), (n,), generator=generator) for words in WORDS], 1)
    centre = torch.tensor([1, 0, 0, 0, 1, 0, -.47, 0, 0, .39, .47, 0, 0, .39])
    spread = torch.tensor([.04, 0, 0, 6, .05, 0, .03, .08, .12, .03, .03, .08, .12, .03])
    return facts, centre + spread * (torch.rand(n, 14, generator=generator) * 2 - 1)


def tell(facts, generator, forms, other):
    """A caption per shot (n,6), second words as often as `other` says -> n texts, what they say (n,6), -1: unsaid."""
    n = len(facts)
    u, v = torch.rand(2, n, 6, generator=generator)
    says = facts.where(u >= torch.tensor([.06, .06, 0, .04, 0, .04]), -1)
    chosen = torch.randint(len(forms), (n,), generator=generator).tolist()
    texts = []
    for row, second, form in zip(says.tolist(), (v < other).tolist(), chosen):
        sky, ground, *things = [words[fact][k] if fact >= 0 else "" for fact, k, words in zip(row, second, WORDS)]
        a, b = (f"{colour} {thing}".strip() for thing, colour in (things[:2], things[2:]))
        a, b = (f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in (a, b))
        text = " ".join(forms[form].format(a=a, b=b, sky=sky, ground=ground).split())
        texts.append(text.replace(" ,", ",").strip(" ,"))
    return texts, says


def shapes_pictures(n, generator, size=32):
    """Fresh pairs for the warm-up: plain words, no confetti, nothing moves. -> (uint8 (n,3,size,size), n phrases)."""
    facts, pose = random_shots(n, generator)
    return draw_shots(facts, pose, size), tell(facts, generator, FORMS[:1], 0)[0]


class ShapesVideos(Dataset):
    """Item i draws everything about video i from a generator of its own, and writes its file unless that is there.

    -> (captions, facts of its shots (S,6), what the captions say (n,6), as lists), or the DataError of a failed write.
    """

    def __init__(self, folder, train, val, test, seed):
        self.folder, self.splits, self.seed = Path(folder), ["train"] * train + ["val"] * val + ["test"] * test, seed

    def __len__(self):
        return len(self.splits)

    def path(self, i):
        return self.folder / f"{i:05d}.mp4"

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + i) % 2 ** 63)
        shots = int(torch.randint(2, 5, (), generator=generator))
        facts, pose = random_shots(shots, generator)
        told = torch.randint(shots, (CAPTIONS[self.splits[i]],), generator=generator)
        captions, says = tell(facts[told], generator, FORMS, .2)
        if not self.path(i).exists():
            extra = torch.randint(shots, (FRAMES - 5 * shots,), generator=generator)
            lengths = 5 + extra.bincount(minlength=shots)  # in frames; so 6 sampled frames see every shot
            u = torch.rand(3, shots, 14, generator=generator) * 2 - 1  # how things move: drift, sway and its phase
            pose[:, 4] += .15 * u[0, :, 4] - .05  # light
            pose[:, 5] = u[0, :, 5] > 0           # confetti, or none
            reach = torch.tensor([.06, .04, .04, 2, 0, 0, .03, .05, .12, 0, .03, .05, .12, 0])
            t = torch.cat([torch.arange(n) - n / 2 for n in lengths.tolist()])[:, None] / RATE
            shot = torch.arange(shots).repeat_interleave(lengths)
            drift, sway, phase = u[:, shot]
            frames = draw_shots(facts[shot], pose[shot] + reach * (drift * t + sway * (4 * t + 3 * phase).sin()), SIDE)
            try:
                write_video(self.path(i), frames, RATE)
            except (OSError, av.FFmpegError) as e:
                return DataError(f"{self.path(i)} can't be written: {e.strerror or e}: make room or use another --root")
        return captions, facts.tolist(), says.tolist()


def write_video(path, frames, rate):
    """uint8 (T,3,H,W), W a multiple of 32 -> an H.264 file, written whole (slower presets aren't deterministic)."""
    T, _, H, W = frames.shape
    with written_whole(path, flush=False) as part, av.open(part, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options={"preset": "superfast", "crf": "22"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.thread_type, stream.thread_count = "FRAME", 1
        for pixels in frames.permute(0, 2, 3, 1):
            frame, buffer = av.VideoFrame(W, H, "rgb24"), bytearray(3 * H * W)
            torch.frombuffer(buffer, dtype=torch.uint8).view(H, W, 3).copy_(pixels)
            frame.planes[0].update(buffer)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def oracle_ceiling(facts, owner, says, target):
    """R@1 in percent of one who sees every fact: a caption fits a video when it fits one of its shots; ties at random.

    facts (S,6) of all shots, owner (S,) their videos; says (N,6) with -1 for unsaid, target (N,) the captions' videos.
    """
    fits = [set(owner[((said == -1) | (said == facts)).all(1)].tolist()) for said in says]
    return 100 * sum((video in found) / len(found) for video, found in zip(target.tolist(), fits)) / len(fits)


def shapes_of(root):
    """What a folder holds of this data set, by shapes.json. -> (settings, whole?); ({}, False) where it may be made.

    Nobody's files are replaced: anything else in the folder is a DataError, and so is an older version of ours.
    """
    root = Path(root)
    try:
        if not root.exists() or root.is_dir() and not any(root.iterdir()):
            return {}, False
        settings = json.loads((root / "shapes.json").read_text(encoding="utf-8"))["settings"]
        version, numbers = settings["version"], "{train} {val} {test}".format(**settings)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{root} is neither empty nor made by shapes.py: choose another --root") from None
    if version != SHAPES_VERSION:
        raise DataError(f"{root} holds version {version} of shapes, and this is version {SHAPES_VERSION}: delete it, "
                        f"then make it anew: python -m lib.shapes --root {root} --videos {numbers}")
    return settings, (root / "captions.csv").exists()


def shapes_table(root):
    """The captions.csv of a data set that is there; reading makes nothing."""
    settings, whole = shapes_of(root)
    if not whole:
        numbers = "{train} {val} {test} --seed {seed}".format(**settings) if settings else "1500 100 500"
        raise DataError(f"{root} holds no {'whole ' if settings else ''}data set shapes: `python train.py` renders it, "
                        f"or python -m lib.shapes --root {root} --videos {numbers}")
    return Path(root) / "captions.csv"


def render_shapes(root, train=1500, val=100, test=500, seed=24, workers=None):
    """Make the data set unless one is there: shapes.json (settings, ceiling), videos/*.mp4, captions.csv.

    captions.csv comes last; a stopped rendering goes on with the next call. The files don't depend on `workers`.
    """
    root, wanted = Path(root), dict(version=SHAPES_VERSION, train=train, val=val, test=test, seed=seed)
    begun, whole = shapes_of(root)
    if whole:
        return
    if begun and begun != wanted:
        raise DataError(f"{root} holds an unfinished data set, of {begun}: delete it, or choose another --root")
    videos = ShapesVideos(root / "videos", train, val, test, seed)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_text(root / "shapes.json", json.dumps(dict(settings=wanted)))
        videos.folder.mkdir(exist_ok=True)
        rows, facts, owner, says, target = [("video", "caption", "split")], [], [], [], []
        with loading(videos, [[i] for i in range(len(videos))], workers=min(workers, len(videos))) as items:
            for i, [item] in enumerate(items):
                if isinstance(item, DataError):
                    raise item
                captions, shots, said = item
                rows += [(f"videos/{videos.path(i).name}", caption, videos.splits[i]) for caption in captions]
                if videos.splits[i] == "test":
                    facts, owner = facts + shots, owner + [i] * len(shots)
                    says, target = says + said, target + [i] * len(said)
                if (i + 1) % 300 == 0 or i + 1 == len(videos):
                    print(f"rendering {root}: {i + 1}/{len(videos)} videos", file=sys.stderr, flush=True)
        ceiling = oracle_ceiling(*map(torch.tensor, (facts, owner, says, target))) if target else None
        write_text(root / "shapes.json", json.dumps(dict(settings=wanted, ceiling=ceiling)))
        with written_whole(root / "captions.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    except OSError as e:
        raise DataError(f"{root}: shapes can't be written there: {e.strerror or e}; choose another --root") from None
    print(f"shapes: {train}/{val}/{test} videos to train, validate and test in {root}"
          + (f"; R@1 of one who sees everything: {ceiling:.1f} %" if target else ""))


def shapes_ceiling(root=None):
    """The best R@1 that the captions allow, which rendering wrote down. -> percent, or None where there is none."""
    try:
        return json.loads((Path(root or "data/shapes") / "shapes.json").read_text(encoding="utf-8"))["ceiling"]
    except (OSError, ValueError, KeyError):
        return None


# ---- command line ----

def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--root", required=True, help="folder to write into")
    p.add_argument("--videos", type=numeric(int, 0), nargs=3, metavar=("TRAIN", "VAL", "TEST"), required=True,
                   help="number of videos per split")
    p.add_argument("--seed", type=numeric(int, 0), default=24, help="of everything random (default: %(default)s)")
    args = p.parse_args(argv)
    wanted = dict(zip(CAPTIONS, args.videos), seed=args.seed)
    render_shapes(args.root, **wanted)
    if not wanted.items() <= shapes_of(args.root)[0].items():  # whole already, and not touched
        raise DataError(f"{args.root} holds another data set already: delete it, or choose another --root")
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
