"""The analysis against literal loops; the page parsed, its pictures decoded, seen by a browser."""
import json
import re
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from itertools import combinations
from urllib.parse import unquote

import pytest
import torch
import torch.nn.functional as F
from conftest import BROWSER, D, features, literal_pool, literal_radius, small_model
from torchvision.io import decode_image
from videos import numbered, numbers, write_video

import data
import eval as ev
from clip_model import Tokenizer
from lib import exact, report
from lib.weights import save_checkpoint

M = 4
EVIL = '<script>alert("1")</script> & \'two\''


def scored_pairs(N=12, V=7, trials=M, **method):
    """A model, and its scores of N texts and V videos; the last video has no caption."""
    model = small_model(**method)
    t, f = features(N, V)
    owner = [i % (V - 1) for i in range(N)]
    ann = data.Annotations([], ["word"] * N, owner)
    sims = exact.score(model, t, f, trials, 3)
    return model, ev.Scored(t, f, sims, ann, [], dict(trials=trials, seed=3, expected=False))


def analyze(model, scored):
    return report.analyze(model, scored, *ev.ranks(scored.sims, scored.ann.owner))


@torch.no_grad()
def test_analysis_against_literal_loops():
    model, scored = scored_pairs()
    t, f, _, ann, *_ = scored
    a = analyze(model, scored)
    pairs = {"relevant": [], "irrelevant": []}
    points = torch.zeros(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            v = literal_pool(model, t[i], f[j])
            R = literal_radius(model, F.cosine_similarity(t[i], f[j], dim=-1))
            points[i, j] = F.cosine_similarity(t[i], v, dim=0)
            best = F.cosine_similarity(t[i] + R * model.noise(M, 3), v, dim=-1).max().item()
            kind = "relevant" if ann.owner[i] == j else "irrelevant"
            pairs[kind].append((points[i, j].item(), best, R.abs().sum().item()))
    for kind, rows in pairs.items():
        assert a[kind]["pairs"] == len(rows)
        for key, column in zip(("point", "best", "radius"), torch.tensor(rows).T):
            assert a[kind][key]["mean"] == pytest.approx(column.mean().item(), rel=1e-3, abs=1e-5)
            assert a[kind][key]["std"] == pytest.approx(column.std(correction=0).item(), rel=1e-3)
        beats = sum(best > point for point, best, _ in rows)
        assert a[kind]["best_beats_point"] == pytest.approx(100 * beats / len(rows))
    first = [points[i].argmax() == v for i, v in enumerate(ann.owner)]
    assert a["point_R1"] == pytest.approx(100 * sum(first).item() / len(first))
    json.dumps(a, allow_nan=False)


def test_complexity_against_literal_loops():
    model, scored = scored_pairs()
    diversity = []
    for frames in scored.f:
        apart = [1 - F.cosine_similarity(x, y, dim=0).item() for x, y in combinations(frames, 2)]
        diversity.append(sum(apart) / len(apart))
    torch.testing.assert_close(report.frame_diversity(scored.f), torch.tensor(diversity))
    rank = ev.ranks(scored.sims, scored.ann.owner)[0].tolist()
    rows = analyze(model, scored)["complexity"]
    assert sum(row["texts"] for row in rows) == len(rank) and len(rows) == 3
    end = -1
    for row in rows:
        assert end < row["least"] <= row["most"]  # in order, and no value in two thirds
        end = row["most"]
        hits = []
        for r, v in zip(rank, scored.ann.owner):
            if row["least"] - 1e-5 <= diversity[v] <= row["most"] + 1e-5:
                hits.append(r <= 1)
        assert row["R1"] == pytest.approx(100 * sum(hits) / row["texts"])
        assert len(hits) == row["texts"] and row["low"] <= row["R1"] <= row["high"]


def test_a_third_may_be_empty():
    """Where most texts have the same value, they stay together."""
    values = torch.tensor([1., 1, 1, 1, 2])
    rows = report.thirds(values, torch.ones(5), torch.arange(5), torch.ones(5))
    assert [(row["third"], row["texts"]) for row in rows] == [("low", 4), ("high", 1)]
    assert all(row["R1"] == row["R1_point"] == 100 for row in rows)


def test_intervals_of_the_analysis():
    """They hold eval.py's metrics, without videos that have no caption; a seed repeats them."""
    model, scored = scored_pairs(40, 21)
    a = analyze(model, scored)
    assert a == analyze(model, scored)
    m = ev.measure(scored.sims, scored.ann.owner)
    for way, found in a["intervals"].items():
        for k, x in found.items():
            assert x["value"] == pytest.approx(m[way][k]) and x["low"] <= x["value"] <= x["high"]


def test_bootstrap_width():
    """As the binomial says for one text per video; four texts that fall together are worth one."""
    def width(hits, video):
        torch.manual_seed(0)
        x = report.recall_intervals(2 - hits.long(), video)["R1"]
        assert x["low"] < x["value"] < x["high"] and x["value"] == pytest.approx(50)
        return x["high"] - x["low"]

    for n in (100, 1600):
        hits = torch.arange(n) % 2 == 0
        assert width(hits, torch.arange(n)) == pytest.approx(2 * 1.96 * 50 / n ** .5, rel=.1)
    once = torch.arange(100) % 2 == 0
    four = torch.arange(100).repeat_interleave(4)
    assert width(once[four], four) == pytest.approx(width(once, torch.arange(100)), rel=.1)


def test_sample_of_irrelevant_pairs():
    """Never a relevant pair in it, and near the mean of all."""
    model, scored = scored_pairs(200, 130)
    owner = torch.tensor(scored.ann.owner)[:, None]
    a = analyze(model, scored)
    assert a["irrelevant"]["pairs"] == 20_000 and "a seeded sample" in report.analysis_text(a)
    others = scored.sims.scatter(1, owner, torch.nan).nanmean().item()
    assert a["irrelevant"]["best"]["mean"] == pytest.approx(others, abs=.002)
    # a score that tells the two kinds apart
    marked = scored._replace(sims=torch.zeros(200, 130).scatter(1, owner, 1.))
    a = analyze(model, marked)
    assert a["relevant"]["best"]["mean"] == 1 and a["irrelevant"]["best"]["mean"] == 0


@pytest.mark.parametrize("radius, trials", [("none", M), ("mean", M), ("linear", 0)])
def test_other_radii_and_no_samples(radius, trials):
    model, scored = scored_pairs(radius=radius, trials=trials)
    a = analyze(model, scored)
    if radius == "none":
        assert a["relevant"]["radius"] == dict(mean=0, std=0)
    if radius == "mean":  # one number, for all dimensions
        S = F.cosine_similarity(scored.t[:, None], scored.f[scored.ann.owner], dim=-1)
        size = D * S.mean(-1).exp()
        assert a["relevant"]["radius"]["mean"] == pytest.approx(size.mean().item(), rel=1e-5)
    if radius == "none" or not trials:
        assert a["relevant"]["best_beats_point"] == 0
        assert a["relevant"]["best"] == a["relevant"]["point"]
    text = report.analysis_text(a)
    assert f" {a['intervals']['v2t']['R10']['value']:.1f} [" in text and "12 relevant pairs" in text


# ---- the page ----

class Page(HTMLParser):
    """Tags opened and closed in order, links, images, and the text of each result."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.links = []
        self.images = []
        self.items = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag != "script" and not any(name.startswith("on") for name in attrs)
        if tag == "a":
            self.links.append(unquote(attrs["href"]))
        if tag == "img":
            self.images.append(attrs)
        if tag == "li":
            self.items.append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text
        if "li" in self.open:
            self.items[-1] += text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """eval.py's report of eight videos with hostile names and captions. -> Page, folder, result"""
    folder = tmp_path_factory.mktemp("report")
    names = [f"<script>{v}&.mp4" for v in range(7)]
    names.append("a_name_without_a_place_to_break_" * 7 + ".mp4")
    lines = ["video,caption"]
    for v, name in enumerate(names):
        write_video(folder / name, numbered(16 * v + 16)[16 * v:], fps=4, codec="libvpx-vp9", g=8)
        evil = EVIL.replace('"', '""')
        lines += [f'{name},"{evil} {v}"', f"{name},{v} {'W' * 150}"]
    (folder / "my.csv").write_text("\n".join(lines))
    save_checkpoint(folder / "m.pt", small_model(), Tokenizer((), 16), {})
    words = ["--data", folder / "my.csv", "--ckpt", folder / "m.pt", "--device", "cpu"]
    words += ["--workers", 0, "--trials", M, "--dsl", "--released-protocol", "--analyze"]
    words += ["--json", folder / "r.json", "--report", folder / "r.html", "--save", folder / "s.pt"]
    assert ev.main([*map(str, words)]) == 0
    page = Page((folder / "r.html").read_text(encoding="utf-8"))
    return page, folder, json.loads((folder / "r.json").read_text())


def test_what_the_page_says(written):
    page, folder, result = written
    source = (folder / "r.html").read_text(encoding="utf-8").lower()
    assert not any(x in source for x in ("http:", "https:", "url(", "<svg"))
    assert f"{EVIL} " in page.text and "16 captions, 8 videos" in page.text
    a = result["analysis"]
    assert a["relevant"]["pairs"] == 16 and a["irrelevant"]["pairs"] == 112
    tables = [report.metrics_table(result), report.pairs_table(a)]
    for cell in sum([row for _, rows in tables for row in rows], []):
        assert cell in re.sub(" +", " ", page.text)
    for note in ("transductive", "LEAKING: the released", "seed 24", "low: ", str(folder)):
        assert note in page.text


def test_cards(written):
    """Scores are those of the caption, in order; the right video is marked; links are moments."""
    page, folder, _ = written
    saved = torch.load(folder / "s.pt", weights_only=True)
    cards = (folder / "r.html").read_text(encoding="utf-8").split("<article")[1:]
    for card in cards:
        card = Page("<article" + card.split("</article>")[0] + "</article>")
        i = saved["captions"].index(re.search("“(.*)”", card.text)[1])
        sims = saved["sims"][i]
        right = saved["owner"][i]
        assert f"rank {saved['t2v_ranks'][i]:g} of 8" in card.text
        order = sims.sort(descending=True).indices.tolist()
        places = order[:5] if right in order[:5] else [*order[:5], right]
        assert len(card.items) == len(places)
        for n, (v, item, link) in enumerate(zip(places, card.items, card.links)):
            assert f"{sims[v]:.4f}" in item and ("✓ the right video" in item) == (v == right)
            path, moment = link.split("#t=")
            assert folder / path == folder / saved["clips"][v][0]
            images = card.images[4 * n:4 * n + 4]
            nearest = F.cosine_similarity(saved["t"][i], saved["f"][v], dim=-1).argmax().item()
            assert [x["class"] for x in images].index("nearest") == nearest
            jpeg = bytearray(b64decode(images[nearest]["src"].split(",")[1]))
            shown = decode_image(torch.frombuffer(jpeg, dtype=torch.uint8))
            assert numbers(shown[None]) == [16 * v + int(float(moment) * 4)]


def test_queries_chosen():
    """The best is furthest ahead, the worst furthest behind; each of another video."""
    owner = torch.arange(9).repeat_interleave(2)
    sims = F.one_hot(owner).float()
    sims[8, 4] = 3
    sims[9, 4] = 2
    sims[14, 7] = -1
    chosen = report.choose_queries(sims, owner.tolist())
    assert chosen["Best"][0] == 8 and chosen["Worst"][0] == 14
    for texts in chosen.values():
        assert len(set(owner[texts].tolist())) == 3


def test_about_six_of_many_frames():
    """With the nearest among them, each with its own time."""
    for T, nearest, shown in ((12, 1, [1, 3, 5, 7, 9, 11]), (4, 1, [0, 1, 2, 3]), (1, 0, [0])):
        page = Page(report.strip([10. + k for k in range(T)], nearest, [*map(str, range(T))]))
        assert [int(x["src"]) for x in page.images] == shown
        assert [x["alt"] for x in page.images] == [f"at 0:00:{10 + k}" for k in shown]
        assert [x["src"] for x in page.images if x["class"]] == [str(nearest)]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(written, tmp_path, width):
    """No wider than the window, though captions and names have no place to break."""
    _, folder, _ = written
    # Chromium has no windows below 500 pixels: an iframe of the wanted width stands for one.
    probe = tmp_path / "probe.html"
    page = json.dumps((folder / "r.html").read_text(encoding="utf-8")).replace("</", "<\\/")
    probe.write_text(f"""<!DOCTYPE html><body style="margin:0">
        <iframe id="f" style="width:{width}px;height:9000px;border:0"></iframe><script>
        f.onload = () => {{
            const d = f.contentDocument;
            const outside = [...d.querySelectorAll('body *')].filter(
                x => x.getBoundingClientRect().right > {width} + 1);
            const broken = [...d.images].filter(x => !x.naturalWidth);
            document.title = ['probe', d.documentElement.scrollWidth, outside.length, broken.length,
                              d.images.length].join(' ') }};
        f.srcdoc = {page};</script>""", encoding="utf-8")
    options = ("--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --dump-dom "
               "--disable-background-networking --virtual-time-budget=5000 --window-size=1200,1600")
    command = [BROWSER, *options.split(), f"--user-data-dir={tmp_path / 'p'}", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    *found, images = map(int, re.search("<title>probe (.*?)<", dom)[1].split())
    assert found == [width, 0, 0] and images > 24
