"""Draw the mass of one caption of `shapes`, as in the report of eval.py: the picture in README.

    python study/mass.py --ckpt model.pt --text 1138 --out .github/mass.svg
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from eval import score_split  # noqa: E402
from lib.mass import MARKS, NAMES, NEAR_T, measure_mass, view  # noqa: E402
from lib.page import HEIGHT, STYLE, WIDTH, esc  # noqa: E402
from lib.weights import load_checkpoint  # noqa: E402


def document(caption, points):
    """A file of its own. -> SVG"""
    wide = view(points, MARKS, "along t → v of the right video")
    near = view(points, NEAR_T, "the same, near t")
    body = f'<text x="8" y="20">“{esc(caption)}”</text>'
    for top, picture in ((32, wide), (32 + HEIGHT, near)):
        place = f'<svg y="{top}" width="{WIDTH}" height="{HEIGHT}"'
        body += picture.replace("<svg", place, 1)
    for n, (kind, name) in enumerate(NAMES.items()):
        x = 20 + n % 2 * 238
        y = 54 + 2 * HEIGHT + n // 2 * 24
        body += f'<path class="{kind}" d="M{x} {y}{MARKS[kind]}"/>'
        body += f'<text x="{x + 14}" y="{y + 4}">{name}</text>'
    # A page's style, whose pictures are as wide as their column.
    style = STYLE + f"svg svg{{width:{WIDTH}px;height:{HEIGHT}px}}.mass{{font-family:sans-serif}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mass" role="img" aria-label="a text mass" '
        f'viewBox="0 0 {WIDTH} {148 + 2 * HEIGHT}"><style>{style}</style>{body}</svg>\n'
    )


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--ckpt", default="model.pt")
    p.add_argument("--text", type=int, default=1138, help="number of a caption of the test split")
    p.add_argument("--out", default=str(ROOT / ".github" / "mass.svg"))
    args = p.parse_args()
    model, tokenizer, config = load_checkpoint(args.ckpt)
    ann = data.load_split("shapes", config["root"], "test")
    scored = score_split(model, tokenizer, ann, cache=config["cache"])
    order = scored.sims[args.text].argsort(descending=True).tolist()
    right = ann.owner[args.text]
    wrong = next(v for v in order if v != right)
    f = scored.f[[right, wrong]]
    points, numbers = measure_mass(model, scored.t[args.text], f, trials=20, seed=24)
    caption = ann.captions[args.text]
    Path(args.out).write_text(document(caption, points), encoding="utf-8")
    print(f"“{caption}”, right video at place {order.index(right) + 1}: {args.out}")
    for name, pair in numbers.items():
        print(f"{name:26}" + "".join(f"{x:9.4f}" for x in pair))


if __name__ == "__main__":
    main()
