"""Ablations on `shapes`, in one command: python tests/study.py NAME [--seeds 5] [--jobs 2]

Runs train.py and eval.py over a grid and seeds. Within a seed all variants start from the same warmed-up CLIP, see the same batches, and are
compared in pairs. Every finished run is one JSON line in tests/study.jsonl and is not run again; checkpoints stay in runs/study/.
"""
import argparse
import concurrent.futures
import csv
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "tests" / "study.jsonl", ROOT / "runs" / "study"

XPOOL = {"X-Pool (radius none)": "--radius none"}
STUDIES = {  # name: (what is trained, {variant: flags of train.py}, [flags of eval.py for each]); the first variant is the baseline
    "method": {
        **XPOOL,
        "mean pooling, no radius": "--radius none --pooling mean",
        "linear, std 0.1, support 0.8": "--radius linear --prior normal --prior-std 0.1 --support-weight 0.8",
        "linear, std 0.1, no support": "--radius linear --prior normal --prior-std 0.1 --support-weight 0",
        "linear, N(0,1), support 0.8 (paper)": "--radius linear --prior normal --prior-std 1 --support-weight 0.8",
        "linear, uniform, batch support 0.8 (released)": "--radius linear --prior uniform --support-weight 0.8 --support-video batch",
        "scaled, std 0.1, support 0.8": "--radius scaled --prior normal --prior-std 0.1 --support-weight 0.8",
        "mean, std 0.1, support 0.8": "--radius mean --prior normal --prior-std 0.1 --support-weight 0.8",
        "linear, std 0.003, no support (released, LSMDC)": "--radius linear --prior normal --prior-std 0.003 --support-weight 0",
        "linear, std 0.1, support 0.8, point text 1": "--radius linear --prior normal --prior-std 0.1 --support-weight 0.8 --ce-weight 1",
    },
    "noise": {
        **XPOOL,
        **{f"linear, N(0, {std}²), support 0.8": f"--radius linear --prior normal --prior-std {std} --support-weight 0.8"
           for std in (0.003, 0.03, 0.1, 0.3, 1)},
    },
    "trials": {f"M = {m}": m for m in (20, 0, 1, 5, 50)},
    "leak": {},
    "settings": {  # where else might the mass help? X-Pool's radius none and T-MASS with each of these flags
        "as above": "",
        "mean pooling": "--pooling mean",
        "a fifth of the training videos": "--data runs/study/fifth.csv --root data/shapes --epochs 15",
    },
}
FIFTH = "--batch 64 --frames 6 --dropout 0.1 --augment none --head-lr 1e-3 --clip-lr 5e-4"  # the recipe of shapes, for a csv
WIDTH = 128  # D of the tiny CLIP
TRIALS_OF = ("linear, std 0.1, support 0.8", "linear, N(0,1), support 0.8 (paper)")


def command(*args):
    """Run one of our scripts on one thread; its output is kept for the error message. -> seconds of processor time, data workers included."""
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)
        _, status, used = os.wait4(done.pid, 0)
        if status:
            output.seek(0)
            raise RuntimeError(f"{' '.join(map(str, args))} ended with {os.waitstatus_to_exitcode(status)}: {output.read()[-2000:]}")
    return used.ru_utime + used.ru_stime


def finished():
    """All runs so far: {(variant's flags, evaluation flags, seed): row}."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(row["train"], row["eval"], row["seed"]): row for row in map(json.loads, lines)}


def start(seed):
    """The warmed-up CLIP that all variants of a seed start from."""
    path = RUNS / f"start-{seed}.pt"
    if not path.exists():
        command("train.py", "--epochs", 0, "--seed", seed, "--out", path)
    return path


def folder(train, seed):
    return RUNS / f"{''.join(c if c.isalnum() or c in '.-' else '_' for c in train)}-{seed}"


def checkpoint(train, seed):
    """Train a variant, or find it trained; `finished` beside it tells the seconds that it took."""
    path = folder(train, seed) / "model.pt"
    if not path.exists() or not (path.parent / "finished").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe = FIFTH if "--data" in train else "--pretrain 0"
        used = command("train.py", "--clip", start(seed), "--seed", seed, "--cache", RUNS / "frames", "--out", path, "--resume",
                       *recipe.split(), *train.split())
        (path.parent / "finished").write_text(f"{used:.0f}")
    return path


def run(train, flags, seed):
    """One line of the results: train (or find) a variant, evaluate it on the test split."""
    path = checkpoint(train, seed)
    out = path.parent / f"eval{abs(hash(flags))}.json"
    used = command("eval.py", "--ckpt", path, "--cache", RUNS / "frames", "--json", out, *flags.split())
    result = json.loads(out.read_text(), parse_float=lambda x: round(float(x), 4))
    out.unlink()
    row = dict(train=train, eval=flags, seed=seed, train_seconds=int((path.parent / "finished").read_text()), eval_seconds=round(used),
               **{k: result[k] for k in ("t2v", "v2t", "released_protocol", "analysis") if k in result})
    for key in ("histograms", "intervals"):
        row.get("analysis", {}).pop(key, None)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def captions():
    """The rows of shapes."""
    path = ROOT / "data" / "shapes" / "captions.csv"
    if not path.exists():
        start(1)  # renders it
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(name, rows):
    """A csv under runs/study, unless it is there."""
    path = RUNS / name
    if not path.exists():
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def shuffled():
    """The test split of shapes with its captions dealt out at random: no caption belongs to its video."""
    rows = [row for row in captions() if row["split"] == "test"]
    texts = [row["caption"] for row in rows]
    random.Random(0).shuffle(texts)
    write("shuffled.csv", [dict(video=row["video"], caption=text) for row, text in zip(rows, texts)])


def fifth():
    """shapes with a fifth of its training videos."""
    rows = captions()
    kept = set(sorted({row["video"] for row in rows if row["split"] == "train"})[::5])
    write("fifth.csv", [{k: row[k] for k in ("video", "caption", "split")} for row in rows if row["split"] != "train" or row["video"] in kept])


def interval(values):
    """Mean, standard deviation, and half a 95 % Student interval of the mean."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    n = len(values)
    std = statistics.stdev(values) if n > 1 else math.nan
    return statistics.mean(values), std, t.get(n, 1.96) * std / math.sqrt(n)


def cell(values, plus=""):
    """mean ± std, as text."""
    mean, std, _ = interval(values)
    return f"{mean:{plus}.1f} ± {std:.1f}"


def paired(rows, base, value):
    """The difference to the baseline within seeds with its 95 % interval, as text."""
    gap, _, half = interval([value(rows[s]) - value(base[s]) for s in rows if s in base])
    return "" if rows is base else f"{gap:+.1f} ± {half:.1f}"


def table(rows_of, way="t2v", step=None):
    """Markdown: mean ± std over seeds, and the paired difference to the first row, or to the first of each `step` rows."""
    print(f"\n| {way} | R@1 | difference in R@1 (95 % interval, paired) | R@5 | MnR | difference in MnR |\n|---|---|---|---|---|---|")
    names = list(rows_of)
    for k, (name, rows) in enumerate(rows_of.items()):
        base = rows_of[names[k - k % step if step else 0]]
        r1, r5, mnr = (cell([row[way][m] for row in rows.values()]) for m in ("R1", "R5", "MnR"))
        print(f"| {name} | {r1} | {paired(rows, base, lambda row: row[way]['R1'])} | {r5} | {mnr} | {paired(rows, base, lambda row: row[way]['MnR'])} |")
    rows = [row for rows in rows_of.values() for row in rows.values()]
    minutes = (sum({(r["train"], r["seed"]): r["train_seconds"] for r in rows}.values()) + sum(r["eval_seconds"] for r in rows)) / 60
    print(f"\n{len(base)} seeds: {', '.join(map(str, base))}; {minutes:.0f} minutes of one core, the training of "
          "variants that other tables share included")


def analysis_tables(rows_of):
    """Alignment and radius of relevant and irrelevant pairs; R@1 by thirds of video complexity and caption length, and the gain over the first row."""
    print("\n| relevant / irrelevant | cos(t, v) | best cos(t_s, v) | radius, mean of R | best sample beats point text, % |\n|---|---|---|---|---|")
    for name, rows in rows_of.items():
        cells = []
        for key, inner, scale in (("point", "mean", 1), ("best", "mean", 1), ("radius", "mean", WIDTH)):
            cells.append(" / ".join("{0:.3f} ± {1:.3f}".format(*interval([r["analysis"][side][key][inner] / scale for r in rows.values()]))
                                    for side in ("relevant", "irrelevant")))
        cells.append(" / ".join(cell([r["analysis"][side]["best_beats_point"] for r in rows.values()]) for side in ("relevant", "irrelevant")))
        print(f"| {name} | " + " | ".join(cells) + " |")
    base = next(iter(rows_of.values()))
    for what in ("complexity", "length"):
        print(f"\n| R@1 (gain over the first row) by third of {what} | low | middle | high |\n|---|---|---|---|")
        for name, rows in rows_of.items():
            cells = []
            for k in range(3):
                value = lambda row: row["analysis"][what][k]["R1"]
                gain = paired(rows, base, value)
                cells.append(cell([value(r) for r in rows.values()]) + (f" ({gain})" if gain else ""))
            print(f"| {name} | " + " | ".join(cells) + " |")


def noise_table(rows_of):
    """How long the noise is beside the text: std·|R|₂/|t| of relevant pairs, with |R|₂ ≈ √D·(mean of R), over the test captions."""
    if not all(folder(row["train"], s).exists() for rows in rows_of.values() for s, row in rows.items()):
        return print("\nThe noise's length needs the checkpoints in runs/study: delete the lines of noise in tests/study.jsonl to train them again.")
    sys.path.insert(0, str(ROOT))
    from tmass import load_checkpoint
    texts = [row["caption"] for row in captions() if row["split"] == "test"]
    print("\n| | mean length of t | length of R⊙ε over that of t |\n|---|---|---|")
    for name, rows in rows_of.items():
        lengths, ratios = [], []
        for seed, row in rows.items():
            model, tokenizer, _ = load_checkpoint(checkpoint(row["train"], seed))
            lengths.append(model.encode_text(tokenizer(texts)).norm(dim=-1).mean().item())
            ratios.append(model.prior_std * row["analysis"]["relevant"]["radius"]["mean"] / WIDTH ** 0.5 / lengths[-1])
        print(f"| {name} | {cell(lengths)} | " + "{0:.3f} ± {1:.3f} |".format(*interval(ratios)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=STUDIES)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread (default: %(default)s)")
    p.add_argument("--only", help="variants whose name contains this, and the baseline")
    args = p.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    if args.name == "trials":
        grid = {f"{v}: {name}": (STUDIES["method"][v], f"--trials {m}") for v in TRIALS_OF for name, m in STUDIES["trials"].items()}
    elif args.name == "leak":
        both = {"": "--released-protocol", ", captions shuffled": "--released-protocol --data runs/study/shuffled.csv --root data/shapes"}
        grid = {v + what: (STUDIES["method"][v], flags) for v in ("X-Pool (radius none)", *TRIALS_OF) for what, flags in both.items()}
    elif args.name == "settings":
        pair = {"X-Pool": STUDIES["method"]["X-Pool (radius none)"], "T-MASS": STUDIES["method"][TRIALS_OF[0]]}
        grid = {f"{setting}: {name}": (f"{flags} {more}".strip(), "--analyze") for setting, more in STUDIES["settings"].items() for name, flags in pair.items()}
    else:
        grid = {name: (flags, "--analyze") for name, flags in STUDIES[args.name].items()}
    if args.only:
        grid = {name: v for i, (name, v) in enumerate(grid.items()) if i == 0 or args.only in name}
    seeds, known = range(1, args.seeds + 1), finished()
    todo = [(train, flags, s) for s in seeds for train, flags in grid.values() if (train, flags, s) not in known]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        if todo:
            list(pool.map(start, seeds))
            shuffled(), fifth()
            list(pool.map(lambda job: checkpoint(*job), sorted({(train, s) for train, _, s in todo})))
        for k, row in enumerate(pool.map(lambda job: run(*job), todo), 1):
            print(f"{k}/{len(todo)} seed {row['seed']}: t2v R@1 {row['t2v']['R1']:.1f}  {row['train']} {row['eval']}", flush=True)
    known = finished()
    rows_of = {name: {s: known[train, flags, s] for s in seeds} for name, (train, flags) in grid.items()}
    table(rows_of, step=dict(trials=len(STUDIES["trials"]), settings=2).get(args.name))
    table(rows_of, "v2t", dict(trials=len(STUDIES["trials"]), settings=2).get(args.name))
    if args.name in ("method", "noise"):
        analysis_tables(rows_of)
    if args.name == "noise":
        noise_table(rows_of)
    if args.name == "leak":
        print("\n| | honest R@1 | honest MnR | LEAKING R@1 | LEAKING MnR |\n|---|---|---|---|---|")
        for name, rows in rows_of.items():
            cells = [interval([part["t2v"][m] for part in parts])[:2] for parts in (rows.values(), [r["released_protocol"] for r in rows.values()])
                     for m in ("R1", "MnR")]
            print(f"| {name} | " + " | ".join(f"{mean:.1f} ± {std:.1f}" for mean, std in cells) + " |")


if __name__ == "__main__":
    main()
