"""Draw the mass of one caption of `shapes`: the picture in README.

    python study/mass.py --ckpt model.pt --text 0 --out .github/mass.svg
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from eval import score_split  # noqa: E402
from lib.mass import draw_mass, measure_mass  # noqa: E402
from lib.weights import load_checkpoint  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--ckpt", default="model.pt")
    p.add_argument("--text", type=int, default=0, help="number of the caption in the test split")
    p.add_argument("--out", default=str(ROOT / ".github" / "mass.svg"))
    args = p.parse_args()
    model, tokenizer, config = load_checkpoint(args.ckpt)
    ann = data.load_split("shapes", config["root"], "test")
    scored = score_split(model, tokenizer, ann, cache=config["cache"])
    i = args.text
    right = ann.owner[i]
    wrong = scored.sims[i].index_fill(0, torch.tensor([right]), -torch.inf).argmax().item()
    mass = measure_mass(model, scored.t[i], scored.f[[right, wrong]], 20, 24)
    svg = draw_mass(mass).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    Path(args.out).write_text(svg, encoding="utf-8")
    print(f"“{ann.captions[i]}”: {args.out}\n|t| {mass['length']:.2f}; {100 * mass['share']:.1f} % of the "
          f"samples' spread in the plane (2/D = {200 / scored.t.shape[1]:.1f} %)")
    for name, pair in mass["numbers"].items():
        print(f"{name:24}" + "".join(f"{x:9.4f}" for x in pair))


if __name__ == "__main__":
    main()
