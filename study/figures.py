"""Pictures of a checkpoint, as SVG or PNG: its training, its pairs, and the mass of a text.

    python study/figures.py curves --out curves.svg            # every column of NAME.log.csv
    python study/figures.py pairs --out pairs.svg              # scores and |R|₁, right and wrong
    python study/figures.py mass 1138 --out mass.svg           # a caption, by its number
    python study/figures.py mass "a red star" --out mass.png   # any other text
"""
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation  # noqa: E402
from lib import exact  # noqa: E402
from lib.common import DataError, Parser, check_outputs, program, written_whole  # noqa: E402
from lib.processes import ALONE  # noqa: E402
from lib.tables import read_table  # noqa: E402
from lib.weights import load_model  # noqa: E402
from tmass import cosine, stochastic_text, support_text  # noqa: E402

OPTIONS = ("ckpt", "data", "root", "videos", "split")  # of eval.py
TRIALS = 20    # M
SAMPLES = 100  # that are drawn for each video
SEED = 24      # of the samples
COLOURS = ("#0072b2", "#d55e00")  # of right and wrong: told apart by the colour-blind, too
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tmass",  # the same file each time
}


def draw_curves(figure, path):
    """Plot the columns of a log against the step. path: of train.py's log."""
    rows = [row for _, row in read_table(Path(path), "a log", ["step", "epoch"])]
    names = [name for name in rows[0] if name not in ("step", "epoch")]
    figure.set_size_inches(5.5, 1.7 * len(names[::2]))
    axes = figure.subplots(len(names[::2]), 2, squeeze=False).flat
    for axis, name in zip(axes, names):
        known = [row for row in rows if row[name]]
        steps = [int(row["step"]) for row in known]
        values = [float(row[name]) for row in known]
        axis.plot(steps, values, ".-", color=COLOURS[0], markersize=4)
        axis.set_title(name, fontsize=11)
    for axis in list(axes)[len(names):]:
        axis.remove()
    figure.supxlabel("step", fontsize=11)


@torch.no_grad()
def draw_pairs(figure, model, scored):
    """Histograms of the scores and of |R|₁, of relevant and irrelevant pairs. scored: a Scored."""
    t, f, sims, ann, *_ = scored
    sizes = torch.empty_like(sims)
    for rows in exact.blocks(len(t), 64):
        R = model.radius(exact.similarities(t[rows], f))           # (V,n,D) or (V,n,1)
        sizes[rows] = t.shape[1] * R.abs().mean(-1).T
    own = F.one_hot(torch.tensor(ann.owner), len(f)).bool()        # (N,V)
    kinds = {"relevant: a text, its own video": own, "irrelevant: all other pairs": ~own}
    labels = {
        f"score: cos(t_s, v), best of {TRIALS} samples": sims,
        "|R|₁: size of the radius, summed over dimensions": sizes,
    }
    figure.set_size_inches(5.5, 6.5)
    for axis, (label, values) in zip(figure.subplots(2), labels.items()):
        values = values.cpu()
        ends = values.min().item(), values.max().item()
        for colour, (kind, chosen) in zip(COLOURS, kinds.items()):
            x = values[chosen]
            axis.hist(x, bins=60, range=ends, density=True, color=colour, alpha=0.6,
                      label=f"{kind}\n{len(x):,} pairs, {x.mean():.3g} ± {x.std():.3g}")
        axis.set(xlabel=label, ylabel="density", yticks=[])
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=10)


@torch.no_grad()
def draw_mass(figure, model, text, t, f, names):
    """The mass of a text, in the plane through t and both v. t (D,), f (2,T,D), names of videos.

    An orthogonal projection, with one scale for both axes: first what lies near t, then all.
    """
    from matplotlib.patches import Circle
    noise = exact.noise_of(model, TRIALS, SEED, expected=True)
    if noise is None:
        raise DataError("a model of radius none has no mass to draw: use another --ckpt")
    mean, std, _ = noise
    v = model.pool(t[None], f)[0]                                  # (2,D)
    R = model.radius(cosine(t, f)).expand_as(v)                    # (2,D)
    eps = model.noise(TRIALS, SEED)                                # (M,D), as in TMASS.score
    best = exact.sample_cosines(t, v, R, eps).max(-1)
    samples = stochastic_text(t, R[:, None], model.noise(SAMPLES, SEED))
    nearest = stochastic_text(t, R, eps[best.indices])
    # An orthonormal basis (D,2). On the CPU, because not every device supports QR.
    plane = torch.linalg.qr((v - t).T.cpu()).Q.to(t)
    # QR leaves the signs open: put the right v to the right of t, and the wrong one above it.
    plane = plane * ((v - t) @ plane).diagonal().sign()

    def project(x):
        return (x - t).mm(plane).cpu().unbind(1)                   # x and y of each

    figure.set_size_inches(5.5, 10.5)
    near, whole = figure.subplots(2)
    reach = (samples - t).matmul(plane).norm(dim=-1).max().item()
    for k, (colour, name) in enumerate(zip(COLOURS, names)):
        near.plot(*project(samples[k]), ".x"[k], color=colour, markersize=4, alpha=0.6,
                  label=f"samples for the {name}")
        near.plot(*project(nearest[k:k + 1]), "o", color=colour, markersize=9, fillstyle="none",
                  markeredgewidth=2, label=f"the best of {TRIALS} of them")
        centre = project(t[None] + mean * R[k])
        near.add_patch(Circle(centre, std * R[k].mean().item(), edgecolor=colour, fill=False))
        way = F.normalize(v[k:k + 1] - t, dim=-1)
        near.plot(*project(torch.cat([t[None], t + reach * way])), color=colour)
        whole.plot(*project(torch.stack([t, v[k]])), color=colour)
        whole.plot(*project(v[k:k + 1]), "^v"[k], color=colour, markersize=9,
                   label=f"v of the {name}")
    whole.plot(*project(f[0]), "s", color=COLOURS[0], fillstyle="none",
               label=f"frames of the {names[0]}")
    support = support_text(t, v[:1], R[:1])
    whole.plot(*project(support), "D", color="black", fillstyle="none", label="support text")
    whole.indicate_inset([-reach, -reach, 2 * reach, 2 * reach], edgecolor="black")
    titles = "near t: lines lead to both v", "all of the plane: the box is the view above"
    for axis, title in zip((near, whole), titles):
        axis.plot(0, 0, "o", color="black", label="t, the text")
        axis.set_title(title, fontsize=11)
        axis.set_aspect("equal", "datalim")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=10)
    figure.suptitle(textwrap.fill(f"“{text}”", 50), parse_math=False)
    size = R.mean(1).tolist()
    point = cosine(t, v).tolist()
    score = best.values.tolist()
    away = (samples[0] - t).norm(dim=-1).mean()
    about = (
        f"A sample is t_s = t + R·ε. R has a number for each of the {len(t)} dimensions, made from "
        f"the cosines of the text with the video's frames: {size[0]:.2f} on average for the "
        f"{names[0]}, {size[1]:.2f} for the {names[1]}. A larger R is a wider cloud; circles show "
        f"R times the standard deviation of ε, {std:.2g}. A video's score is the cosine of its "
        f"best sample: {score[0]:.3f} for the {names[0]}, {score[1]:.3f} for the {names[1]} "
        f"(without samples {point[0]:.3f}, {point[1]:.3f}). Distances between t and both v are "
        f"true. The samples are {away:.1f} away from t, mostly in dimensions that are not seen."
    )
    figure.supxlabel(textwrap.fill(about, 75), x=0.02, ha="left", fontsize=10)


def find_text(args, tokenizer, model, ann, cache):
    """The text to draw and its two videos. -> text, t (D,), f (2,T,D), names of the videos

    A caption has a right video; of another text, the nearest two are drawn.
    """
    text = args.text
    if text.isdecimal():
        if int(text) >= len(ann.captions):
            raise DataError(f"caption {text}: there are {len(ann.captions)}, numbered from 0")
        text = ann.captions[int(text)]
    t = evaluation.encode_texts(model, tokenizer, [text])
    f = evaluation.encode_videos(model, ann.segments, cache=cache)
    order = exact.score(model, t, f, TRIALS, SEED)[0].argsort(descending=True).tolist()
    if len(order) < 2:
        raise DataError("the mass is drawn with two videos, and there is only one")
    names = ["nearest video", "next video"]
    if text in ann.captions:
        right = ann.owner[ann.captions.index(text)]
        order.remove(right)
        order.insert(0, right)
        names = ["right video", "nearest wrong video"]
    return text, t[0], f[order[:2]], names


def parse_args(argv):
    p = Parser(__doc__)
    p.add_argument("figure", choices=("curves", "pairs", "mass"))
    p.add_argument("text", nargs="?",
                   help="of the mass: the number of a caption of the split, or any text")
    p.add_argument("--out", metavar="FILE", required=True, help="the picture: .svg or .png")
    for name in OPTIONS:
        p.add_argument(f"--{name}", help="as eval.py's")
    args = p.parse_args(argv)
    if (args.figure == "mass") != bool(args.text):
        p.error("a text goes with mass, and mass needs one")
    if Path(args.out).suffix not in (".svg", ".png"):
        p.error(f"--out {args.out}: name a .svg or .png")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("pictures need a package: pip install matplotlib") from None
    given = [f"--{name}={value}" for name, value in vars(args).items()
             if value and name in OPTIONS]
    options = evaluation.parse_args(given)
    log = evaluation.log_of(options.ckpt)
    check_outputs({"--out": args.out}, [options.ckpt, log])
    matplotlib.rcParams.update(STYLE)
    figure = Figure(layout="constrained")
    if args.figure == "curves":
        draw_curves(figure, log)
    else:
        model, tokenizer, config = load_model(options.ckpt, ALONE)
        ann, _ = evaluation.load_data(options, config, ALONE)
        if args.figure == "pairs":
            scored = evaluation.score_split(model, tokenizer, ann, cache=options.cache)
            draw_pairs(figure, model, scored)
        else:
            draw_mass(figure, model, *find_text(args, tokenizer, model, ann, options.cache))
    with written_whole(args.out) as part:
        figure.savefig(part, format=Path(args.out).suffix[1:], metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
