"""The analysis against literal loops; the report parsed, its pictures decoded, seen by a browser if there is one."""
import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image, decode_jpeg
from videos import numbered, write_video

import data
import eval as ev
from clip_model import CLIP, Tokenizer
from lib import report
from lib.weights import save_checkpoint
from tmass import TMASS

D, T, M = 32, 3, 4
BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
ENV = {"OMP_NUM_THREADS": "1"}
EVIL = '<script>alert("1")</script> & \'two\''


def make_model(radius="linear"):
    torch.manual_seed(0)
    clip = CLIP(embed_dim=D, image_size=16, patch_size=8, vision_width=64, vision_layers=1, context_length=16,
                vocab_size=Tokenizer().vocab_size, text_width=64, text_layers=1)
    model = TMASS(clip, frames=T, radius=radius).eval()
    if radius == "linear":
        torch.nn.init.normal_(model.radius.linear.weight, std=0.3)
    return model


def features(N=12, V=7, seed=0):
    """Random t, f and owner; the last video has no caption, some have several."""
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(V, T, D, generator=g) * torch.rand(V, 1, 1, generator=g) + torch.randn(V, 1, D, generator=g)
    owner = torch.arange(N) % (V - 1)
    t = f[owner, 0] + 4 * torch.randn(N, D, generator=g)
    return t, f, owner.tolist(), [" ".join(["word"] * (1 + 2 * i % 9)) for i in range(N)]


def analyze(model, t, f, owner, captions, trials=M, seed=3):
    sims = model.score(t, f, trials, seed)
    return report.analyze(model, t, f, captions, owner, sims, ev.ranks(sims, owner), trials, seed), sims


@torch.no_grad()
def test_analysis_against_literal_loops():
    model, (t, f, owner, captions) = make_model(), features()
    a, _ = analyze(model, t, f, owner, captions)
    eps, seen, points = model.noise(M, 3), {True: [], False: []}, torch.zeros(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            v = model.pool(t[i:i + 1], f[j:j + 1])[0, 0]
            r = model.radius(torch.stack([F.cosine_similarity(t[i], x, dim=0) for x in f[j]]))
            points[i, j] = F.cosine_similarity(t[i], v, dim=0)
            best = max(F.cosine_similarity(t[i] + r * e, v, dim=0).item() for e in eps)
            seen[owner[i] == j].append((points[i, j].item(), best, r.abs().sum().item()))
    for name, rows in (("relevant", seen[True]), ("irrelevant", seen[False])):
        assert a[name]["pairs"] == len(rows) and not a[name]["sampled"]
        for key, column in zip(("point", "best", "radius"), torch.tensor(rows).T):
            assert a[name][key]["mean"] == pytest.approx(column.mean().item(), rel=1e-4)
            assert a[name][key]["std"] == pytest.approx(column.std().item(), rel=1e-3)
        assert a[name]["best_beats_point"] == pytest.approx(100 * sum(b > p for p, b, _ in rows) / len(rows))
        for key in ("similarity", "radius"):
            assert sum(a["histograms"][key][name]) == len(rows)
    hits = [all(points[i, owner[i]] > points[i, j] for j in range(len(f)) if j != owner[i]) for i in range(len(t))]
    assert a["point_R1"] == pytest.approx(100 * sum(hits) / len(hits))
    json.dumps(a, allow_nan=False)


def test_complexity_and_length_against_literal_loops():
    model, (t, f, owner, captions) = make_model(), features()
    a, sims = analyze(model, t, f, owner, captions)
    diversity = []
    for frames in f:
        apart = [1 - F.cosine_similarity(x, y, dim=0).item() for x, y in combinations(frames, 2)]
        diversity.append(sum(apart) / 3)
    torch.testing.assert_close(report.frame_diversity(f), torch.tensor(diversity))
    assert report.frame_diversity(f[:, :1]).tolist() == [0] * len(f)
    rank = ev.ranks(sims, owner)[0]
    for key, values in (("complexity", [diversity[v] for v in owner]), ("length", [len(c.split()) for c in captions])):
        rows, end = a[key], -1.
        assert sum(r["texts"] for r in rows) == len(t) and len(rows) == 3
        for r in rows:
            assert end < r["least"] <= r["most"]  # in order, and no value in two thirds
            end = r["most"]
            inside = [i for i, x in enumerate(values) if r["least"] - 1e-5 <= x <= r["most"] + 1e-5]
            assert len(inside) == r["texts"]
            assert r["R1"] == pytest.approx(100 * sum(rank[i].item() <= 1 for i in inside) / len(inside))


def test_intervals_of_the_analysis():
    """They hold the metrics of eval.py, the video without captions left out; a seed gives the same analysis again."""
    model, (t, f, owner, captions) = make_model(), features(40, 21)
    a, sims = analyze(model, t, f, owner, captions)
    again, _ = analyze(model, t, f, owner, captions)
    assert a == again
    m = ev.measure(sims, owner)
    for way, found in a["intervals"].items():
        for k, x in found.items():
            assert x["value"] == pytest.approx(m[way][k]) and x["low"] <= x["value"] <= x["high"]


def test_bootstrap_width():
    """As wide as the binomial says, with one text per video; four texts that stand or fall together are worth one."""
    def width(hits, video):
        (x, low, high), = report.bootstrap(hits[:, None], video, torch.Generator().manual_seed(0))
        assert low < x < high and x == pytest.approx(50)
        return high - low
    for n in (100, 400, 1600):
        hits = torch.arange(n) % 2 == 0
        assert width(hits, torch.arange(n)) == pytest.approx(2 * 1.96 * 50 / n ** .5, rel=.1)
    once, four = (torch.arange(100) % 2 == 0), torch.arange(100).repeat_interleave(4)
    assert width(once[four], four) == pytest.approx(width(once, torch.arange(100)), rel=.1)
    uneven = (torch.arange(300) ** 2 % 41, torch.arange(300) ** 3 % 7 < 4)
    same, again, other = (report.bootstrap(uneven[1][:, None], uneven[0], torch.Generator().manual_seed(seed))
                          for seed in (0, 0, 1))
    assert same == again and same[0][0] == other[0][0] and same[0][1:] != other[0][1:]
    assert report.bootstrap(torch.ones(5, 1), torch.arange(5), torch.Generator().manual_seed(0)) == [(100, 100, 100)]


def test_sample_of_irrelevant_pairs(monkeypatch):
    """Never a relevant pair in it, and near the mean of all."""
    model, (t, f, owner, captions) = make_model(), features(60, 30)
    whole, _ = analyze(model, t, f, owner, captions)
    monkeypatch.setattr(report, "MOST_PAIRS", 500)
    some, sims = analyze(model, t, f, owner, captions)
    assert some["irrelevant"]["sampled"] and some["irrelevant"]["pairs"] == 500
    assert some["relevant"] == whole["relevant"]
    assert some["irrelevant"]["best"]["mean"] == pytest.approx(whole["irrelevant"]["best"]["mean"], abs=.05)
    # a score that tells the two kinds apart
    marked = torch.zeros_like(sims).scatter(1, torch.tensor(owner)[:, None], 1.)
    a = report.analyze(model, t, f, captions, owner, marked, ev.ranks(marked, owner), M, 3)
    assert a["relevant"]["best"]["mean"] == 1 and a["irrelevant"]["best"]["mean"] == 0


@pytest.mark.parametrize("radius, trials", [("none", M), ("mean", M), ("linear", 0)])
def test_other_radii_and_no_samples(radius, trials):
    model, (t, f, owner, captions) = make_model(radius), features()
    a, _ = analyze(model, t, f, owner, captions, trials)
    if radius == "none":
        assert a["relevant"]["radius"] == dict(mean=0, std=0)
    if radius == "none" or not trials:
        assert a["relevant"]["best_beats_point"] == 0 and a["relevant"]["best"] == a["relevant"]["point"]
    text = report.analysis_text(a)
    assert f"R@10 {a['intervals']['v2t']['R10']['value']:.1f} [" in text and "12 relevant pairs" in text
    assert max(map(len, text.split("\n"))) < 100


def test_one_video_and_scores_that_are_no_numbers():
    model, (t, f, *_) = make_model(), features()
    a, _ = analyze(model, t[:1], f[:1], [0], ["a"])
    assert a["irrelevant"]["pairs"] == 0 and a["irrelevant"]["best"] == dict(mean=None, std=None)
    assert "–" in report.analysis_text(a)
    a, sims = analyze(model, torch.full_like(t, torch.nan), f, [0] * len(t), ["a"] * len(t))
    assert sims.isnan().all() and sum(a["histograms"]["similarity"]["relevant"]) == 0 and "–" in report.analysis_text(a)


# ---- the page ----

class Page(HTMLParser):
    """Tags opened and closed in order, images, text of hits."""
    VOID = {"meta", "img", "path", "circle", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.hits, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        assert not any(name.startswith("on") or name == "srcset" for name in attrs)
        if "href" in attrs:  # a moment of a file
            assert tag == "a" and re.fullmatch(r"[^:?]*\.mp4#t=[\d.]+", attrs["href"])
        if tag == "img":
            self.images.append(attrs)
        if tag == "li":
            self.hits.append((attrs["class"], ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag, tag

    def handle_data(self, text):
        self.text += text
        if "li" in self.open:
            self.hits[-1] = (self.hits[-1][0], self.hits[-1][1] + text + " ")


def sound(text):
    """What every report must be. -> Page"""
    low = text.lower()
    assert not any(x in low for x in ("http://", "https://", "<script"))
    assert "url(" not in low.replace("url(#hatch)", "")
    page = Page(text)
    for image in page.images:
        assert image["alt"] and image["src"].startswith("data:image/jpeg;base64,")
        jpeg = bytearray(base64.b64decode(image["src"].split(",", 1)[1]))
        x = decode_image(torch.frombuffer(jpeg, dtype=torch.uint8), ImageReadMode.RGB)
        assert x.shape == (3, int(image["height"]), int(image["width"]))
    assert page.tags.count("h1") == 1 and "Settings and versions" in page.text and torch.__version__ in page.text
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of 8 videos with hostile names and captions. -> (its path, annotations, sims)"""
    folder = tmp_path_factory.mktemp("report")
    names = [f"<script>{v}&.mp4" for v in range(7)] + ["a_name_without_a_place_to_break_" * 7 + ".mp4"]
    for v, name in enumerate(names):
        x = torch.full((6, 48, 64, 3), 30 * v, dtype=torch.uint8)
        x[:, 8:24, 8 * v:8 * v + 8] = torch.tensor([250, 120, 0], dtype=torch.uint8)
        write_video(folder / name, x)
    captions = [EVIL, *(f"caption {i} {'W' * 150}" for i in range(1, 16))]
    owner = [i % 8 for i in range(16)]
    clips = [data.Segment(str(folder / n), *((0, .5) if n.startswith("a_") else ())) for n in names]
    ann = data.Annotations(clips, captions, owner)
    model, (t, f, *_) = make_model(), features(16, 9)
    f = f[:8]
    sims = model.score(t, f, M, 3)
    ranks = ev.ranks(sims, owner)
    a = report.analyze(model, t, f, captions, owner, sims, ranks, M, 3)
    log = ["step,epoch,loss,stochastic,support,ce,val_R1", "20,1,3.5,2,1.5,2.1,", "20,1,,,,,40",
           "40,2,2.5,1.5,1,nan,", "40,2,,,,,55"]
    (folder / "log.csv").write_text("\n".join(log))
    m = ev.measure(sims, owner)
    result = dict(m, dsl=m, released_protocol=m, first_captions=m, data=f"{EVIL}.csv", split="test", trials=M, seed=3,
                  expected=True, **model.config)
    path = folder / "report.html"
    report.write_report(str(path), result, a, ann, sims, ranks, str(folder / "log.csv"), each=2, top=3)
    return path, ann, sims


def test_report(written):
    path, ann, sims = written
    text = path.read_text(encoding="utf-8")
    page = sound(text)
    assert [p.name for p in path.parent.iterdir() if "part" in p.name] == []
    assert all(x in page.text for x in (EVIL, "LEAKING", "transductive", "Validation t2v R@1"))
    assert "best of 4 on average" in page.text and "each video's first caption" in page.text and "honest" in page.text
    assert "<script>0&.mp4" in page.text and "(0 s to 0.5 s)" in page.text
    marked = [text for css, text in page.hits if "right" in css]
    assert len(marked) == text.count("<article") == 8  # 2 best, 2 worst, 4 random: each shows its right video once
    assert all("✓ the right video" in x for x in marked)
    assert not any("✓" in x for css, x in page.hits if "right" not in css)
    assert len(page.images) == len(page.hits) and 8 * 3 <= len(page.hits) <= 8 * 4


def test_the_right_video_and_its_rank(written):
    """Every card, read back: its scores are those of its caption, in order, and the mark is on the right video."""
    path, ann, sims = written
    ranks = ev.ranks(sims, ann.owner)[0]
    for card in path.read_text(encoding="utf-8").split("<article")[1:]:
        page = Page("<article" + card.split("</article>")[0] + "</article>")
        i = ann.captions.index(page.text.split("“")[1].split("”")[0])
        shown = sims[i].sort(descending=True)
        for n, (css, text) in enumerate(page.hits):
            v = next(v for v, clip in enumerate(ann.segments) if report.clip_name(clip) in text)
            assert ("right" in css) == (v == ann.owner[i]) and f"score {sims[i, v]:.4f}" in text
            assert v == shown.indices[n] if n < 3 else v == ann.owner[i]
            if "right" in css:
                assert text.split()[0] == f"{ranks[i]:g}"
        assert f"rank {ranks[i]:g} of 8" in page.text


def test_queries_chosen():
    """The best has the widest margin, the worst the last rank, none comes twice, a seed chooses the random ones."""
    sims, owner = torch.eye(9) + torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) * .1, torch.arange(9)
    sims[4, 4], sims[7, 7] = 3, -1
    t2v = ev.ranks(sims, owner)[0]
    (_, best), (_, worst), (_, random) = report.choose_queries(sims, owner, t2v, 2, 5)
    assert best[0] == 4 and worst == [7] and len(random) == 4 and len({*best, *worst, *random}) == 7
    assert report.choose_queries(sims, owner, t2v, 2, 5)[2][1] == random
    assert any(report.choose_queries(sims, owner, t2v, 2, s)[2][1] != random for s in range(5))


def test_search_report(written, tmp_path):
    _, ann, _ = written
    files = [ann.segments[0].path, ann.segments[7].path, str(tmp_path / "gone<b>.mp4")]
    found = {EVIL: [dict(rank=n, score=.9 - n / 10, file=x, at=n / 10, start=0, end=9) for n, x in enumerate(files, 1)]}
    report.write_search_report(str(tmp_path / "s.html"), found, dict(ckpt="m.pt", trials=20))
    page = sound((tmp_path / "s.html").read_text(encoding="utf-8"))
    assert EVIL in page.text and len(page.hits) == 3 and len(page.images) == 2 and "no picture" in page.hits[2][1]
    assert all(f"score {.9 - n / 10:.4f}" in text for n, (_, text) in enumerate(page.hits, 1)) and "✓" not in page.text


def test_the_matching_frame_is_framed(tmp_path):
    write_video(tmp_path / "x.mp4", numbered(240), fps=10)
    for at, T, shown, place in ((11.0, 12, 6, 0), (18.5, 12, 6, 5), (14.4, 4, 4, 1), (0.0, 12, 6, 0)):
        img = report.moment(data.Segment(str(tmp_path / "x.mp4"), 10, 20), at, T)
        width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', img).groups())
        body = base64.b64decode(re.search(r"base64,([^\"]+)", img)[1])
        x = decode_jpeg(torch.frombuffer(bytearray(body), dtype=torch.uint8)).float()
        assert x.shape == (3, height, width)
        red = x[0, 2].view(shown, -1).mean(1)  # of the upper edge: white, or blue
        assert [k for k in range(shown) if red[k] < 100] == [place]
    assert "0:00:00" in img and report.clock(3725.9) == "1:02:05"


def test_unwritable(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "r.html", tmp_path / "folder"):
        with pytest.raises(data.DataError, match="cannot be written"):
            report.write_search_report(str(path), {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_names_that_are_not_unicode(tmp_path):
    found = [dict(rank=1, score=0., file="caf\udce9.mp4", at=0, start=0, end=1)]
    report.write_search_report(str(tmp_path / "r.html"), {"q": found}, {})
    sound((tmp_path / "r.html").read_text(encoding="utf-8"))


def test_odd_logs(tmp_path):
    """No log, an empty one, one of something else, one row: curves where there are some, never an error."""
    path = tmp_path / "log.csv"
    assert report.training_charts(path) == []
    for text, n in (("", 0), ("a,b\n1,2\n", 0), ("step,loss\nx,y\n", 0), ("step,loss\n5,1.5\n", 1),
                    ("step,loss\n5,nan\n", 0), ("step,val_R1\n5,0\n", 1)):
        path.write_text(text)
        assert len(report.training_charts(path)) == n, text


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(written, tmp_path, width):
    """No wider than the window, though captions and names have no place to break; a frame of that width tells."""
    path, *_ = written
    # chromium has no windows below 500 pixels: an iframe of the wanted width takes the window's place, and says what is
    probe, page = tmp_path / "probe.html", json.dumps(path.read_text(encoding="utf-8")).replace("</", "<\\/")
    probe.write_text(f"""<!DOCTYPE html><body style="margin:0">
        <iframe id="f" style="width:{width}px;height:6000px;border:0"></iframe><script>
        f.onload = () => {{ const d = f.contentDocument, e = d.documentElement;
            const wide = [...d.querySelectorAll('body *')].filter(x => x.getBoundingClientRect().right > {width} + 1
                                                                        && !x.closest('.scroll'));
            const broken = [...d.images].filter(x => !x.naturalWidth).length;
            document.title = ['probe', e.clientWidth, e.scrollWidth, wide.length, broken, d.images.length].join(' ') }};
        f.srcdoc = {page};</script>""", encoding="utf-8")

    def browse(*args):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                   "--hide-scrollbars", "--disable-background-networking", "--disable-component-update"]
        options += ["--disable-sync", f"--user-data-dir={tmp_path / 'p'}", f"--window-size={max(500, width)},1600"]
        return subprocess.run([BROWSER, *options, *args, probe.as_uri()], capture_output=True, text=True, timeout=60)
    dom = browse("--virtual-time-budget=5000", "--dump-dom").stdout
    seen, page_wide, outside, broken, images = map(int, dom.split("<title>probe ")[1].split("</title>")[0].split())
    assert seen == width and page_wide <= width and outside == 0 and broken == 0 and images >= 24
    picture = tmp_path / "shot.png"
    browse(f"--screenshot={picture}", "--virtual-time-budget=5000")
    x = decode_image(str(picture), ImageReadMode.RGB)[:, :, :width].float()
    assert x.shape[2] == width and x.std() > 20  # something was painted
    assert Path(picture).stat().st_size > 20_000


# ---- through eval.py ----

def test_command_line(run, tmp_path):
    """--analyze and --report on real files: the page shows what --json says; search makes a page of its results."""
    lines = ["video,caption"]
    for v in range(4):
        write_video(tmp_path / f"{v}.mp4", torch.full((6, 32, 32, 3), 60 * v, dtype=torch.uint8))
        lines += [f"{v}.mp4,{EVIL.replace(',', '')} {v}".replace('"', ''), f"{v}.mp4,another caption of {v}"]
    (tmp_path / "my.csv").write_text("\n".join(lines))
    save_checkpoint(tmp_path / "m.pt", make_model(), Tokenizer(context_length=16), dict(data="shapes"))
    (tmp_path / "m.log.csv").write_text("step,loss\n20,3.5\n40,2.5\n")
    (tmp_path / "log.csv").write_text("step,val_R1\n20,40\n")  # another run's
    common, how = ["--ckpt", "m.pt", "--device", "cpu", "--workers", 0, "--trials", M], dict(cwd=tmp_path, env=ENV)
    args = ["--data", "my.csv", "--analyze", "--report", "r.html", "--json", "r.json"]
    out = run("eval.py", *common, *args, **how)
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    page, a = sound((tmp_path / "r.html").read_text(encoding="utf-8")), result["analysis"]
    assert a["relevant"]["pairs"] == 8 and a["irrelevant"]["pairs"] == 24 and report.analysis_text(a) in out.stdout
    for way in ("t2v", "v2t"):
        values = {k: x["value"] for k, x in a["intervals"][way].items()}
        assert values == pytest.approx({k: result[way][k] for k in ("R1", "R5", "R10")})
    assert "<script>alert(1)</script> & 'two' " in page.text and "8 captions, 4 videos" in page.text
    assert "Training losses" in page.text and "Validation" not in page.text
    (tmp_path / "m.log.csv").unlink()
    assert run("eval.py", *common, *args, **how).returncode == 0
    assert "Training" not in (tmp_path / "r.html").read_text(encoding="utf-8")  # no other run's curves in their place
    out = run("search.py", "dark", *common, "--videos", ".", "--report", "s.html", "--json", "s.json", **how)
    assert out.returncode == 0, out.stderr
    hits = sound((tmp_path / "s.html").read_text(encoding="utf-8")).hits
    found = json.loads((tmp_path / "s.json").read_text())["dark"]
    assert len(hits) == len(found) == 4
    assert all(x["file"] in text and f"{x['score']:.4f}" in text for x, (_, text) in zip(found, hits))
    for args in (["--report", "missing/r.html"], ["--data", "my.csv", "--json", "missing/x.json"]):
        out = run("eval.py", *common, *args, **how)
        assert out.returncode == 2 and "error: " in out.stderr and "Traceback" not in out.stderr
