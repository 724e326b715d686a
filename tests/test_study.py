"""The study's measures on a small model, and STUDY.md against the runs in study.jsonl."""

import json

import pytest
import torch
from conftest import ROOT

import study
from lib import exact
from lib.shapes import tiny_clip
from tmass import TMASS


@pytest.mark.parametrize("prior", ["normal", "uniform"])
def test_parts_of_the_score_add_up(prior):
    torch.manual_seed(0)
    clip, _ = tiny_clip(["a red star"])
    model = TMASS(clip, frames=3, prior=prior, prior_std=0.7).eval()
    t, f = torch.randn(30, 128) + 0.5, torch.randn(12, 3, 128)
    with torch.no_grad():
        p, s = study.closed_form(model, t, f), exact.score(model, t, f, 20, expected=True)
        assert torch.allclose(p["cos"], exact.score(model, t, f, 0), atol=1e-5)
        assert torch.allclose(p["cos"] * p["h"] + p["shift"] + p["bonus"], s, atol=1e-5)
        assert (
            (p["shift"] == 0).all() == (prior == "normal")
            and (p["bonus"] > 0).all()
            and (p["h"] < 1.5).all()
        )
    found = study.what_moves(p, s)
    for k in (0, 1):  # over all videos, over the first ten
        assert sum(found[part][k] for part in ("point", "tau", "shift", "bonus")) == pytest.approx(
            100, abs=1e-3
        )
        assert -1 < found["correlation"][k] < 1
    other = study.what_moves(p, p["cos"])
    assert other["correlation"] == pytest.approx([1, 1]) and other["same_first"] == [100]


def test_colour_distance_is_what_a_loop_finds():
    frames = torch.randint(
        256, (3, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    apart = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for y in (0, 1):
            apart += [
                (frames[a, :, y, x].double() - frames[b, :, y, x].double()).norm() for x in (0, 1)
            ]
    assert study.colour_distance(frames) == pytest.approx(sum(apart).item() / len(apart), rel=1e-5)


def test_study_md_tells_what_the_runs_say(capsys):
    by = {name: {} for name in study.VARIANTS}
    for row in map(json.loads, study.RESULTS.read_text().splitlines()):
        assert row["train"] == study.VARIANTS[row["variant"]][1]
        by[row["variant"]][row["seed"]] = row
    study.tables(by)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "study" / "STUDY.md").read_text().splitlines()
    assert len(lines) > 50 and [line for line in lines if line not in page] == []
