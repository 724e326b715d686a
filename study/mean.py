"""The mean ± std over seeds of what `eval.py --json` wrote, a file for each seed.

    python study/mean.py seed*.json
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.common import Parser, program  # noqa: E402
from lib.tables import field_of, read_json  # noqa: E402

COLUMNS = ("R1", "R5", "R10", "MdR", "MnR")


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("files", nargs="+", type=Path, help="results of the same model, data and split")
    args = p.parse_args(argv)
    results = [read_json(path, "--json of eval.py", dict) for path in args.files]
    print(f"{len(results)} files  " + "".join(f"{name:>14}" for name in COLUMNS))
    for way in ("t2v", "v2t"):
        cells = []
        for name in COLUMNS:
            values = []
            for path, result in zip(args.files, results):
                metrics = field_of(result, way, path, dict)
                values.append(field_of(metrics, name, path, (int, float)))
            # Of a sample: there is none of one file.
            std = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.1f} ± {std:.1f}")
        print(f"{way:<9}" + "".join(f"{cell:>14}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
