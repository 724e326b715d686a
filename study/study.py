"""What the text mass is worth, measured on `shapes`.

    python study/study.py [--seeds 1 2 3] [--only xpool paper]

Trains what is not trained yet, evaluates what is not evaluated yet, prints the tables of STUDY.md.
Stopped at any time, the same command goes on. Within a seed all variants start from the same
warmed-up CLIP and see the same batches, so differences are paired. All is done in one process on
one thread, seed by seed. Checkpoints stay in runs/study/; one that was evaluated is a line of
study/study.jsonl, and is not evaluated again.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import train  # noqa: E402
from eval import encode_texts, encode_videos, metrics, ranks, released_scores  # noqa: E402
from lib import exact  # noqa: E402
from lib.shapes import ShapesVideos, shapes_of  # noqa: E402
from lib.weights import load_checkpoint  # noqa: E402
from tmass import cosine  # noqa: E402

RESULTS, SHAPES = ROOT / "study" / "study.jsonl", ROOT / "data" / "shapes"
NORMAL = "--radius {} --prior normal --prior-std {} --support-weight {}"
VARIANTS = {  # what it is, and the flags of train.py; the first one is the baseline
    "xpool": ("X-Pool (radius none)", "--radius none"),
    "paper": ("linear, N(0,1), support 0.8 (paper)", NORMAL.format("linear", 1, 0.8)),
    "linear01": ("linear, std 0.1, support 0.8", NORMAL.format("linear", 0.1, 0.8)),
    "released": (
        "linear, uniform, batch support 0.8 (released)",
        "--radius linear --prior uniform --support-weight 0.8 --support-video batch",
    ),
    "linear01-nosupport": ("linear, std 0.1, no support", NORMAL.format("linear", 0.1, 0)),
    "scaled01": ("scaled, std 0.1, support 0.8", NORMAL.format("scaled", 0.1, 0.8)),
    "mean": ("mean pooling, no radius", "--radius none --pooling mean"),
    "query": ("query pooling, no radius", "--radius none --pooling query"),
}
TRIALS = (0, 1, 5, 20, 50)
STUDENT = {
    2: 12.71,
    3: 4.30,
    4: 3.18,
    5: 2.78,
    6: 2.57,
    7: 2.45,
    8: 2.36,
    9: 2.31,
    10: 2.26,
}  # by number of values


# ---- training ----


def prepare():
    """In this process each video is decoded and resized once (shapes has no augmentation: its
    pixels stay the same) and
    train.py leaves the test split to `evaluated`."""
    kept, item, load = {}, data.VideoDataset.item, train.load_splits

    def once(self, v):
        if self.segments[v] not in kept:
            kept[self.segments[v]] = item(self, v)
        return kept[self.segments[v]]

    def without_test(args, job):
        splits, missing = load(args, job)
        return {**splits, "test": splits["test"].take([])}, missing

    data.VideoDataset.item, train.load_splits = once, without_test


def trained(runs, name, seed):
    """The checkpoint of a variant, trained if it isn't; of "start", the warmed-up CLIP of a seed.
    """
    out, done = runs / f"{name}-{seed}" / "model.pt", runs / f"{name}-{seed}.seconds"  # of one core
    if not done.exists():
        flags = ["--epochs", "0"]
        if name != "start":
            flags = [
                "--pretrain",
                "0",
                "--clip",
                str(trained(runs, "start", seed)),
                *VARIANTS[name][1].split(),
            ]
        out.parent.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        status = train.main(
            ["--seed", str(seed), "--workers", "0", "--resume", "--out", str(out), *flags]
        )
        if status:
            sys.exit(status)
        done.write_text(f"{time.process_time() - started:.0f}")
    return out


# ---- evaluation ----


class Test:
    """The test split, the first caption of each video, and two measures of complexity that no
    model decides.
    """

    def __init__(self):
        self.ann = data.load_split("shapes", SHAPES, "test")
        self.owner = torch.tensor(self.ann.owner)
        V, settings = len(self.ann.segments), dict(shapes_of(SHAPES)[0])
        self.first = torch.tensor([self.ann.owner.index(v) for v in range(V)])
        rendered = ShapesVideos(
            SHAPES / "videos", *(settings[k] for k in ("train", "val", "test", "seed"))
        )
        shots = [len(rendered[len(rendered) - V + v][1]) for v in range(V)]
        frames = data.VideoDataset(
            self.ann.segments, 6, data.test_transform(32), SHAPES / "frames"
        )
        apart = torch.tensor([colour_distance(frames[v]) for v in range(V)])
        third = torch.bucketize(apart, apart.quantile(torch.tensor([1 / 3, 2 / 3])))
        self.groups = dict(shots=torch.tensor(shots)[self.owner], colours=third[self.owner])


def colour_distance(frames):
    """Mean distance in RGB of the same pixel in two frames of a video, over all pairs. uint8
    (T,3,R,R) -> float.
    """
    T, x = len(frames), frames.float()
    return (x[:, None] - x).norm(dim=2).mean((-2, -1)).sum().item() / (T * (T - 1))


def brief(sims, owner):
    """sims (N,V), owner (N,) -> {t2v, v2t: metrics}, rounded."""
    places = dict(zip(("t2v", "v2t"), ranks(sims, owner)))
    return {
        way: {k: round(x, 3) for k, x in metrics(places[way]).items() if k != "R50"}
        for way in places
    }


def closed_form(model, t, f):
    """The parts of best-of-20 in closed form (exact.expected_cosine). t (N,D), f (V,T,D) -> dict
    of (N,V).

    s = cos·h + shift + bonus: the point text's cosine, shrunk by h = |t|/τ; what the prior's mean
    adds; E_M b. Beside them the mean of R, and the length of the noise over that of the text,
    σ|R|/|t|.
    """
    mean, std, largest = exact.noise_of(model, 20, 24, expected=True)
    parts = []
    for rows in torch.arange(len(t)).split(25):
        t_i, v = t[rows, None], model.pool(t[rows], f)
        R = model.radius(cosine(t[rows, None, None], f)).expand_as(v)
        c = t_i + mean * R
        tau = (c.square().sum(-1) + std**2 * R.square().sum(-1)).sqrt()
        g = R * (v - ((c * v).sum(-1) / tau.square())[..., None] * c)
        length = v.norm(dim=-1) * tau
        parts.append(dict(
            cos=cosine(t_i, v),
            h=t_i.norm(dim=-1) / tau,
            shift=mean * (R * v).sum(-1) / length,
            bonus=largest * std * g.norm(dim=-1) / length,
            radius=R.mean(-1),
            noise=std * R.norm(dim=-1) / t_i.norm(dim=-1),
        ))
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def share(part, s):
    """What a term makes of the variance of s over the videos of a text, in %; mean over texts.
    (N,V) each.
    """
    part, s = part - part.mean(1, keepdim=True), s - s.mean(1, keepdim=True)
    return 100 * ((part * s).sum(1) / s.square().sum(1)).mean().item()


def rank_correlation(a, b):
    """Spearman's, over the videos of one text; mean over texts. (N,V) each."""
    a, b = (x.argsort(1).argsort(1).double() for x in (a, b))
    return cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)).mean().item()


def what_moves(p, s):
    """What makes the ranking by best-of-20 s (N,V), over all videos and over the ten nearest to
    the point text.

    p: the dict of closed_form. -> {part of the score: [its share of the variance, that over ten]}
    """
    h = p["h"].mean(1, keepdim=True)
    terms = dict(
        point=p["cos"] * h, tau=p["cos"] * (p["h"] - h), shift=p["shift"], bonus=p["bonus"]
    )
    ten = p["cos"].topk(10).indices
    out = {k: [share(x, s), share(x.gather(1, ten), s.gather(1, ten))] for k, x in terms.items()}
    out["correlation"] = [
        rank_correlation(p["cos"], s),
        rank_correlation(p["cos"].gather(1, ten), s.gather(1, ten)),
    ]
    out["same_first"] = [100 * (s.argmax(1) == p["cos"].argmax(1)).double().mean().item()]
    return out


@torch.no_grad()
def evaluated(runs, name, seed, test):
    """A line of the results: of one checkpoint every number of samples, the leak, pairs, ranking,
    groups of videos.
    """
    path, owner, each = trained(runs, name, seed), test.owner, torch.arange(len(test.ann.segments))
    model, tokenizer, config = load_checkpoint(path)
    t = encode_texts(model, tokenizer, test.ann.captions)
    f = encode_videos(model, test.ann.segments, cache=config["cache"])
    mass = model.config["radius"] != "none"
    sims = {str(M): exact.score(model, t, f, M) for M in (TRIALS if mass else (0,))}
    best = sims["20" if mass else "0"]
    row = dict(
        variant=name,
        seed=seed,
        train=VARIANTS[name][1],
        leak={},
        groups={},
        train_seconds=int((runs / f"{name}-{seed}.seconds").read_text()),
    )
    hits = ranks(best, owner)[0] <= 1
    for what, group in test.groups.items():
        row["groups"][what] = {
            str(k): 100 * hits[group == k].double().mean().item() for k in group.unique().tolist()
        }
    shuffled = torch.randperm(len(each), generator=torch.Generator().manual_seed(0))
    for what, order in (("matched", each), ("shuffled", shuffled)):
        t1 = t[test.first[order]]
        row["leak"][what] = dict(
            honest=brief(exact.score(model, t1, f), each),
            released=brief(released_scores(model, t1, f, each), each),
        )
    p = dict(cos=sims["0"][test.first])
    if mass:
        sims["expected"] = exact.score(model, t, f, 20, expected=True)
        s, p = sims["expected"][test.first], closed_form(model, t[test.first], f)
        assert (p["cos"] * p["h"] + p["shift"] + p["bonus"] - s).abs().max() < 1e-4
        row["ranking"] = what_moves(p, s)
        p.update(best=best[test.first], beats=100.0 * (best[test.first] > p["cos"]))
    own = torch.eye(len(f), dtype=torch.bool)
    row["pairs"] = {k: [x[own].mean().item(), x[~own].mean().item()] for k, x in p.items()}
    row["scores"] = {M: brief(x, owner) for M, x in sims.items()}
    return row


# ---- tables: by[variant][seed] is a line of the results ----


def interval(values):
    """Mean, standard deviation, and half a 95 % Student interval of the mean."""
    n = len(values)
    std = statistics.stdev(values) if n > 1 else math.nan
    return statistics.mean(values), std, STUDENT.get(n, math.nan) * std / math.sqrt(n)


def cell(rows, value, digits=1):
    """mean ± std of a value of each row."""
    mean, std, _ = interval([value(row) for row in rows.values()])
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if len(rows) > 1 else "")


def gap(rows, base, value):
    """The mean difference to the baseline within seeds, with its 95 % interval."""
    if rows is base:
        return "-"
    mean, _, half = interval([value(rows[s]) - value(base[s]) for s in rows if s in base])
    return f"{mean:+.1f} ± {half:.1f}"


def score(metric="R1", way="t2v", M="20"):
    """What to read from a row; without a mass every M is the point text."""
    return lambda row: row["scores"].get(M, row["scores"]["0"])[way][metric]


def table(title, head, by, cells):
    """Markdown, one line a variant. cells(rows of a variant) -> list."""
    print(f"\n{title}\n\n| | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
    for name, rows in by.items():
        print(f"| {VARIANTS[name][0]} | {' | '.join(cells(rows))} |")


def tables(by):
    base, mass = (
        by["xpool"],
        {name: rows for name, rows in by.items() if "--radius none" not in VARIANTS[name][1]},
    )
    table(
        "Primary outcome, fixed before running: t2v R@1 against X-Pool, paired; M = 20",
        [
            "seeds",
            "t2v R@1",
            "difference to X-Pool (95 %)",
            "R@5",
            "MnR",
            "v2t R@1",
            "difference (95 %)",
        ],
        by,
        lambda rows: [
            str(len(rows)),
            cell(rows, score()),
            gap(rows, base, score()),
            cell(rows, score("R5")),
            cell(rows, score("MnR"), 2),
            cell(rows, score(way="v2t")),
            gap(rows, base, score(way="v2t")),
        ],
    )

    def samples(rows, M):
        mean, _, half = interval([score(M=M)(row) - score()(row) for row in rows.values()])
        return cell(rows, score(M=M)) + (f" ({mean:+.2f} ± {half:.2f})" if M != "20" else "")

    columns = [*map(str, TRIALS), "expected"]
    table(
        "Samples at search time, M: t2v R@1 (difference to M = 20, 95 %)",
        columns,
        mass,
        lambda rows: [samples(rows, M) for M in columns],
    )
    for what in ("matched", "shuffled"):
        found = lambda part, metric: lambda row: row["leak"][what][part]["t2v"][metric]
        worth = lambda row: found("released", "R1")(row) - found("honest", "R1")(row)
        table(
            f"The leak, captions {what} (first caption of each video, M = 20)",
            ["honest R@1", "LEAKING R@1", "worth in R@1", "honest MnR", "LEAKING MnR"],
            by,
            lambda rows: [
                cell(rows, found("honest", "R1")),
                cell(rows, found("released", "R1")),
                cell(rows, worth),
                cell(rows, found("honest", "MnR")),
                cell(rows, found("released", "MnR")),
            ],
        )

    def both(rows, part, key, digits):
        if key not in next(iter(rows.values()))[part]:
            return "-"
        sides = range(len(next(iter(rows.values()))[part][key]))
        return " / ".join(cell(rows, lambda row: row[part][key][side], digits) for side in sides)

    table(
        "Relevant / irrelevant pairs (first caption of each video)",
        [
            "cos(t, v)",
            "best of 20 cos(t_s, v)",
            "mean of R",
            "length of the noise over that of t",
            "h",
            "E_M b",
            "best sample beats the point text, %",
        ],
        by,
        lambda rows: [
            both(rows, "pairs", key, 1 if key == "beats" else 3)
            for key in ("cos", "best", "radius", "noise", "h", "bonus", "beats")
        ],
    )
    digits = dict(tau=2, correlation=3)
    table(
        "What moves the ranking: shares of the score's variance over one text's videos, % "
        "(all / the first ten)",
        [
            "cosine of the point text",
            "τ",
            "mean of the prior",
            "bonus E_M b",
            "rank correlation with the point text",
            "same first video, %",
        ],
        mass,
        lambda rows: [
            both(rows, "ranking", key, digits.get(key, 1))
            for key in ("point", "tau", "shift", "bonus", "correlation", "same_first")
        ],
    )
    thirds = ["least apart", "middle", "most apart"]
    for what, head in (("shots", ["2 shots", "3 shots", "4 shots"]), ("colours", thirds)):
        at = [
            lambda row, k=k: row["groups"][what][k]
            for k in sorted(next(iter(base.values()))["groups"][what])
        ]
        table(
            f"t2v R@1 by complexity, {what} (difference to X-Pool, 95 %)",
            head,
            by,
            lambda rows: [
                cell(rows, x) + f" ({gap(rows, base, x)})" * (rows is not base) for x in at
            ],
        )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(1, 11)), help="(default: 1 to 10)"
    )
    p.add_argument(
        "--only",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="these variants; tables compare with xpool, and need it (default: all)",
    )
    p.add_argument(
        "--no-training",
        action="store_true",
        help="evaluate what is trained, print tables of what is there",
    )
    args = p.parse_args()
    runs, test = ROOT / "runs" / "study", None
    os.chdir(ROOT)
    torch.set_num_threads(1)
    prepare()
    rows = map(json.loads, RESULTS.read_text().splitlines())
    known = {(row["variant"], row["seed"]): row for row in rows}
    for name, seed in [(name, seed) for seed in args.seeds for name in args.only]:
        there = (runs / f"{name}-{seed}.seconds").exists()
        if (name, seed) in known or (args.no_training and not there):
            continue
        trained(runs, name, seed)
        test = test or Test()
        known[name, seed] = evaluated(runs, name, seed, test)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(known[name, seed]) + "\n")
        print(f"seed {seed}, {name}: t2v R@1 {score()(known[name, seed]):.1f}", flush=True)
    by = {name: {s: known[name, s] for s in args.seeds if (name, s) in known} for name in args.only}
    by = {name: rows for name, rows in by.items() if rows}
    if "xpool" in by:
        tables(by)
    seconds = [row["train_seconds"] for rows in by.values() for row in rows.values()]
    print(f"\n{len(seconds)} trainings took {sum(seconds) / 60:.0f} minutes of one core")


if __name__ == "__main__":
    main()
