"""Pictures of a checkpoint, as SVG or PNG: its training, its pairs, and the mass of a text.

    python study/figures.py curves --out curves.svg                   # columns of NAME.log.csv
    python study/figures.py pairs --out pairs.svg                     # scores and |R|₁
    python study/figures.py mass --text "a red star" --out mass.png   # a caption, or any text

These options of eval.py can be given, too: --ckpt, --data, --root, --videos, --split, --trials,
--seed, --cache, --workers, --device.
"""
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation  # noqa: E402
from data import Annotations  # noqa: E402
from lib import exact  # noqa: E402
from lib.common import DataError, Parser, check_outputs, program, written_whole  # noqa: E402
from lib.processes import start_processes  # noqa: E402
from lib.tables import read_table  # noqa: E402
from lib.weights import load_model  # noqa: E402
from tmass import cosine, stochastic_text, support_text  # noqa: E402

SAMPLES = 100  # that are drawn for each video
COLOURS = ("#0072b2", "#d55e00")  # of right and wrong: told apart by the colour-blind, too
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tmass",  # the same file each time
}


def draw_curves(figure, path):
    """Plot the columns of a log against the step. path: of train.py's log."""
    rows = [row for _, row in read_table(Path(path), "a log", ["step", "epoch"])]
    names = [name for name in rows[0] if name not in ("step", "epoch")]
    lines = (len(names) + 1) // 2
    figure.set_size_inches(5.5, 1.7 * lines)
    for k, name in enumerate(names, 1):
        known = [row for row in rows if row[name]]
        steps = [int(row["step"]) for row in known]
        values = [float(row[name]) for row in known]
        axis = figure.add_subplot(lines, 2, k)
        axis.plot(steps, values, ".-", color=COLOURS[0], markersize=4)
        axis.set_title(name)
    figure.supxlabel("step")


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
        "score: cos(t_s, v) of the best sample": sims,
        "|R|₁: the radius, summed over its dimensions": sizes,
    }
    figure.set_size_inches(5.5, 6.5)
    for axis, (label, values) in zip(figure.subplots(2), labels.items()):
        values = values.cpu().numpy()
        ends = values.min(), values.max()
        for colour, (kind, chosen) in zip(COLOURS, kinds.items()):
            x = values[chosen]
            axis.hist(x, bins=60, range=ends, density=True, histtype="stepfilled", color=colour,
                      alpha=0.6, label=f"{kind}\n{len(x):,} pairs, {x.mean():.3g} ± {x.std():.3g}")
        axis.set(xlabel=label, ylabel="density", yticks=[])
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


@torch.no_grad()
def draw_mass(figure, model, scored, is_caption):
    """The mass of a text in the plane through t and the v of two videos. scored: of that text.

    The videos are a caption's own and the nearest wrong one; or else the nearest two. This is an
    orthogonal projection, with one scale for both axes: first what lies near t, then all.
    """
    t = scored.t[0]                                                # (D,)
    order = scored.sims[0].argsort(descending=True).tolist()
    if len(order) < 2:
        raise DataError("a mass is drawn with two videos, and there is only one")
    names = "nearest video", "next video"
    if is_caption:
        [right] = scored.ann.owner
        order.remove(right)
        order.insert(0, right)
        names = "right video", "nearest wrong video"
    f = scored.f[order[:2]]                                        # (2,T,D)
    trials, seed, _ = scored.scoring.values()
    noise = exact.noise_of(model, trials, seed, expected=True)
    if noise is None:
        raise DataError("without radius or samples there is no mass to draw: use another --ckpt")
    mean, std, _ = noise
    v = model.pool(t[None], f)[0]                                  # (2,D)
    R = model.radius(cosine(t, f)).expand_as(v)                    # (2,D)
    eps = model.noise(trials, seed)                                # (M,D), as in TMASS.score
    best = exact.sample_cosines(t, v, R, eps).max(-1)
    samples = stochastic_text(t, R[:, None], model.noise(SAMPLES, seed))
    # An orthonormal basis (D,2). On the CPU, because not every device supports QR.
    plane = torch.linalg.qr((v - t).T.cpu()).Q.to(t)
    # QR leaves the signs open: put the right v to the right of t, and the wrong one above it.
    plane = plane * ((v - t) @ plane).diagonal().sign()
    reach = ((samples - t) @ plane).norm(dim=-1).max()
    angle = torch.linspace(0, 2 * torch.pi, 100).to(t)
    circle = torch.stack([angle.cos(), angle.sin()], 1) @ plane.T  # (100,D)

    figure.set_size_inches(5.5, 10.5)
    near, whole = figure.subplots(2)
    points = [
        (whole, f[0], "s", 5, COLOURS[0], f"frames of the {names[0]}"),
        (whole, support_text(t, v[:1], R[:1]), "D", 5, "black", "support text"),
    ]
    for k, (colour, name) in enumerate(zip(COLOURS, names)):
        way = torch.stack([t, v[k]])
        nearest = stochastic_text(t, R[k], eps[best.indices[k]])
        points += [
            (near, samples[k], ".x"[k], 4, colour, f"samples for the {name}"),
            (near, nearest[None], "o", 10, colour, f"the best of {trials} of them"),
            (near, t + mean * R[k] + std * R[k].mean() * circle, "-", 1, colour, None),
            (near, t + (way - t) * reach / (v[k] - t).norm(), "-", 1, colour, None),
            (whole, way, "-", 1, colour, None),
            (whole, v[k:k + 1], "^v"[k], 8, colour, f"v of the {name}"),
        ]
    for axis, x, mark, size, colour, label in points:
        x, y = ((x - t) @ plane).T.cpu()
        axis.plot(x, y, mark, color=colour, label=label, markersize=size, fillstyle="none")
    side = 2 * reach.item()
    whole.indicate_inset([-side / 2, -side / 2, side, side], edgecolor="black")
    near.set_title("near t: lines lead to both v")
    whole.set_title("the whole plane: the box holds the samples")
    for axis in (near, whole):
        axis.plot(0, 0, "P", color="black", label="t, the text")
        axis.set_aspect("equal", "datalim")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    figure.suptitle(textwrap.fill(f"“{scored.ann.captions[0]}”", 50), parse_math=False)

    def both(values):
        return " and ".join(f"{x:.3f} for the {name}" for x, name in zip(values.tolist(), names))

    about = (
        f"A sample is t_s = t + R·ε. R has a number for each of the {len(t)} dimensions, made from "
        "the cosines of the text with the video's frames. It is on average "
        f"{both(R.mean(1))}. A larger R is a wider cloud: the circles show R times the standard "
        f"deviation of ε, {std:.2g}. A video's score is the cosine of v with its best sample, "
        f"{both(best.values)}; with t alone it would be {both(cosine(t, v))}. Distances between t "
        f"and both v are true. The samples are {(samples[0] - t).norm(dim=-1).mean().item():.1f} "
        "away from t, mostly in dimensions not seen."
    )
    figure.supxlabel(textwrap.fill(about, 75), x=0.02, ha="left", fontsize=10)


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("figure", choices=("curves", "pairs", "mass"))
    p.add_argument("--text", help="of the mass (default: the first caption)")
    p.add_argument("--out", metavar="FILE", required=True, help="the picture: .svg or .png")
    args, others = p.parse_known_args(argv)
    options = evaluation.parse_args(others)
    kind = Path(args.out).suffix[1:]
    if kind not in ("svg", "png"):
        p.error(f"--out {args.out}: name a .svg or .png")
    log = Path(options.ckpt).with_suffix(".log.csv")
    check_outputs({"--out": args.out}, [options.ckpt, log])
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("pictures need a package: pip install matplotlib") from None
    matplotlib.rcParams.update(STYLE)
    figure = Figure(layout="constrained")
    if args.figure == "curves":
        draw_curves(figure, log)
    else:
        job = start_processes(options.device)
        model, tokenizer, config = load_model(options.ckpt, job)
        ann, _ = evaluation.load_data(options, config, job)
        own = dict(zip(ann.captions, ann.owner))
        text = args.text or ann.captions[0]
        if args.figure == "mass":
            ann = Annotations(ann.segments, [text], [own.get(text, 0)])
        scored = evaluation.score_split(
            model, tokenizer, ann, trials=options.trials, seed=options.seed, cache=options.cache,
            workers=options.workers)
        if args.figure == "mass":
            draw_mass(figure, model, scored, text in own)
        else:
            draw_pairs(figure, model, scored)
    with written_whole(args.out) as part:
        figure.savefig(part, format=kind, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
