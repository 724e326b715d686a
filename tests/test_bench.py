"""study/bench.py gpu: the one command of a GPU hour, run on the CPU at small sizes."""
import math
import re

import pytest
import torch

PRECISIONS = "float32", "bf16", "fp16"
VITS = "ViT-B/32", "ViT-B/16"
pytestmark = pytest.mark.slow


def table_of(text):
    """The table that is printed as Markdown. -> {first cell: second cell}"""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["what", "measured"]
    assert all(len(row) == 2 for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    return dict(rows[1:])


def numbers(cell):
    return [float(x) for x in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?:e[+-]\d+)?", cell)]


def test_the_table_of_a_gpu(run):
    options = ["--device", "cpu", "--small"]
    done = run("study/bench.py", "gpu", *options, env={"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Not run on a GPU: cpu, torch ")
    assert "small sizes" in done.stdout.splitlines()[0]
    table = table_of(done.stdout)

    for what in ("scores, sampled", "scores, expected", "scores, point text"):
        assert f"device against CPU: {what}" in table
    for what in ("losses", "gradients"):
        for how in ("all in float32", "TF32 convolution, torch's default"):
            gap = table[f"device against CPU: {what}, {how}"]
            assert numbers(gap)[0] == 0, gap  # the device is the CPU: the same sums
            assert "within 1e-5" in gap
    for way in ("sampled", "expected"):
        for n in (20, 50):
            assert len(numbers(table[f"scoring {n} x {n}, {way}"])) == 3
    kinds = []
    for name in VITS:
        for precision in PRECISIONS:
            kinds += [f"towers, {name}, {precision}"]
            for again in ("", ", --chunk 4"):
                kinds += [f"training, {name}, batch 4, T=3, {precision}{again}"]
    for what in kinds:
        first, second, *more = numbers(table[what])
        assert 0 < first < math.inf and 0 <= second < math.inf and not more
    loader = table["loader, 2 workers, T=3, cached"]
    assert re.search(r"pairs/s, keeps up with \d+ of the 12 kinds of training above", loader)
    search = [cell for what, cell in table.items() if what.startswith("search of 5000 pieces: ")]
    assert len(search) == 5 and all(numbers(cell) for cell in search)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_no_gpu_is_said(run):
    done = run("study/bench.py", "gpu", timeout=100)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--device cpu --small" in done.stderr
