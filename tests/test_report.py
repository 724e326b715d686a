"""The analysis against literal loops; pages parsed, their pictures decoded, seen by a browser."""
import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image
from videos import numbered, write_video

import data
import eval as ev
from clip_model import CLIP, Tokenizer
from lib import common, exact, mass, report, video
from lib import page as pages
from lib.weights import save_checkpoint
from tmass import TMASS

D, T, M = 32, 3, 4
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next((path for path in BROWSERS if path), None)
ENV = {"OMP_NUM_THREADS": "1"}
EVIL = '<script>alert("1")</script> & \'two\''


def make_model(radius="linear"):
    torch.manual_seed(0)
    clip = CLIP(embed_dim=D, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
                context_length=16, vocab_size=Tokenizer().vocab_size, text_width=64, text_layers=1)
    model = TMASS(clip, frames=T, radius=radius).eval()
    if radius == "linear":
        torch.nn.init.normal_(model.radius.linear.weight, std=0.3)
    return model


def features(N=12, V=7, seed=0):
    """Random t, f and annotations; the last video has no caption, some have several."""
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(V, T, D, generator=g) * torch.rand(V, 1, 1, generator=g)
    f = f + torch.randn(V, 1, D, generator=g)
    owner = torch.arange(N) % (V - 1)
    t = f[owner, 0] + 4 * torch.randn(N, D, generator=g)
    captions = [" ".join(["word"] * (1 + 2 * i % 9)) for i in range(N)]
    return t, f, data.Annotations([], captions, owner.tolist())


def score(model, t, f, ann, trials=M, sims=None):
    if sims is None:
        sims = exact.score(model, t, f, trials, 3)
    return ev.Scored(t, f, sims, ann, [], dict(trials=trials, seed=3, expected=False))


def analyze(model, t, f, ann, trials=M, sims=None):
    """-> what `analyze` says, and the scores."""
    scored = score(model, t, f, ann, trials, sims)
    return report.analyze(model, scored, *ev.ranks(scored.sims, ann.owner)), scored.sims


@torch.no_grad()
def test_analysis_against_literal_loops():
    model = make_model()
    t, f, ann = features()
    N, V = len(t), len(f)
    a, _ = analyze(model, t, f, ann)
    eps = model.noise(M, 3)
    pairs = {"relevant": [], "irrelevant": []}
    points = torch.zeros(N, V)
    for i in range(N):
        for j in range(V):
            v = model.pool(t[i:i + 1], f[j:j + 1])[0, 0]
            R = model.radius(torch.stack([F.cosine_similarity(t[i], x, dim=0) for x in f[j]]))
            points[i, j] = F.cosine_similarity(t[i], v, dim=0)
            best = max(F.cosine_similarity(t[i] + R * e, v, dim=0).item() for e in eps)
            kind = "relevant" if ann.owner[i] == j else "irrelevant"
            pairs[kind].append((points[i, j].item(), best, R.abs().sum().item()))
    for kind, rows in pairs.items():
        assert a[kind]["pairs"] == len(rows) and not a[kind]["sampled"]
        for key, column in zip(("point", "best", "radius"), torch.tensor(rows).T):
            assert a[kind][key]["mean"] == pytest.approx(column.mean().item(), rel=1e-4)
            assert a[kind][key]["std"] == pytest.approx(column.std().item(), rel=1e-3)
        beats = sum(best > point for point, best, _ in rows)
        assert a[kind]["best_beats_point"] == pytest.approx(100 * beats / len(rows))
        for key in ("similarity", "radius"):
            assert sum(a["histograms"][key][kind]) == len(rows)
    hits = 0
    for i, v in enumerate(ann.owner):
        hits += all(points[i, v] > points[i, j] for j in range(V) if j != v)
    assert a["point_R1"] == pytest.approx(100 * hits / N)
    json.dumps(a, allow_nan=False)


def test_complexity_against_literal_loops():
    model = make_model()
    t, f, ann = features()
    a, sims = analyze(model, t, f, ann)
    diversity = []
    for frames in f:
        apart = [1 - F.cosine_similarity(x, y, dim=0).item() for x, y in combinations(frames, 2)]
        diversity.append(sum(apart) / 3)
    torch.testing.assert_close(report.frame_diversity(f), torch.tensor(diversity))
    assert report.frame_diversity(f[:, :1]).abs().max() < 1e-6
    rank = ev.ranks(sims, ann.owner)[0].tolist()
    of_texts = [diversity[v] for v in ann.owner]
    assert sum(row["texts"] for row in a["complexity"]) == len(t) and len(a["complexity"]) == 3
    end = -1.
    for row in a["complexity"]:
        assert end < row["least"] <= row["most"]  # in order, and no value in two thirds
        end = row["most"]
        low, high = row["least"] - 1e-5, row["most"] + 1e-5
        inside = [i for i, x in enumerate(of_texts) if low <= x <= high]
        assert len(inside) == row["texts"]
        hits = sum(rank[i] <= 1 for i in inside)
        assert row["R1"] == pytest.approx(100 * hits / len(inside))


def test_a_third_may_be_empty():
    """Where most texts have the same value, they stay together."""
    values = torch.tensor([1., 1, 1, 1, 2])
    rows = report.thirds(values, torch.ones(5), torch.arange(5), torch.ones(5))
    assert [(row["third"], row["texts"]) for row in rows] == [("low", 4), ("high", 1)]
    assert all(row["R1"] == row["R1_point"] == 100 for row in rows)


def test_intervals_of_the_analysis():
    """They hold eval.py's metrics, without videos that have no caption; a seed repeats them."""
    model = make_model()
    t, f, ann = features(40, 21)
    a, sims = analyze(model, t, f, ann)
    again, _ = analyze(model, t, f, ann)
    assert a == again
    m = ev.measure(sims, ann.owner)
    for way, found in a["intervals"].items():
        for k, x in found.items():
            assert x["value"] == pytest.approx(m[way][k]) and x["low"] <= x["value"] <= x["high"]


def bootstrap(hits, video, seed=0):
    torch.manual_seed(seed)
    found = report.recall_intervals(2 - hits.long(), video)["R1"]
    return found["value"], found["low"], found["high"]


def test_bootstrap_width():
    """As the binomial says for one text per video; four texts that fall together are worth one."""
    def width(hits, video):
        x, low, high = bootstrap(hits, video)
        assert low < x < high and x == pytest.approx(50)
        return high - low
    for n in (100, 400, 1600):
        hits = torch.arange(n) % 2 == 0
        assert width(hits, torch.arange(n)) == pytest.approx(2 * 1.96 * 50 / n ** .5, rel=.1)
    once = torch.arange(100) % 2 == 0
    four = torch.arange(100).repeat_interleave(4)
    assert width(once[four], four) == pytest.approx(width(once, torch.arange(100)), rel=.1)
    video = torch.arange(300) ** 2 % 41
    hits = torch.arange(300) ** 3 % 7 < 4
    same, again, other = (bootstrap(hits, video, seed) for seed in (0, 0, 1))
    assert same == again and same[0] == other[0] and same[1:] != other[1:]
    assert bootstrap(torch.ones(5), torch.arange(5)) == (100, 100, 100)


def test_sample_of_irrelevant_pairs(monkeypatch):
    """Never a relevant pair in it, and near the mean of all."""
    model = make_model()
    t, f, ann = features(60, 30)
    whole, _ = analyze(model, t, f, ann)
    monkeypatch.setattr(report, "MOST_PAIRS", 500)
    some, sims = analyze(model, t, f, ann)
    assert some["irrelevant"]["sampled"] and some["irrelevant"]["pairs"] == 500
    assert some["relevant"] == whole["relevant"]
    mean = whole["irrelevant"]["best"]["mean"]
    assert some["irrelevant"]["best"]["mean"] == pytest.approx(mean, abs=.05)
    # a score that tells the two kinds apart
    marked = torch.zeros_like(sims).scatter(1, torch.tensor(ann.owner)[:, None], 1.)
    a, _ = analyze(model, t, f, ann, sims=marked)
    assert a["relevant"]["best"]["mean"] == 1 and a["irrelevant"]["best"]["mean"] == 0


@pytest.mark.parametrize("radius, trials", [("none", M), ("mean", M), ("linear", 0)])
def test_other_radii_and_no_samples(radius, trials):
    model = make_model(radius)
    t, f, ann = features()
    a, _ = analyze(model, t, f, ann, trials)
    if radius == "none":
        assert a["relevant"]["radius"] == dict(mean=0, std=0)
    if radius == "mean":  # one number, for all dimensions
        S = F.cosine_similarity(t[:, None], f[ann.owner], dim=-1)
        size = D * S.mean(-1).exp()
        assert a["relevant"]["radius"]["mean"] == pytest.approx(size.mean().item(), rel=1e-5)
    if radius == "none" or not trials:
        assert a["relevant"]["best_beats_point"] == 0
        assert a["relevant"]["best"] == a["relevant"]["point"]
    text = report.analysis_text(a)
    assert f" {a['intervals']['v2t']['R10']['value']:.1f} [" in text and "12 relevant pairs" in text
    assert max(map(len, text.split("\n"))) < 100


def test_one_video_and_scores_that_are_no_numbers():
    model = make_model()
    t, f, _ = features()
    a, _ = analyze(model, t[:1], f[:1], data.Annotations([], ["a"], [0]))
    assert a["irrelevant"]["pairs"] == 0 and a["irrelevant"]["best"] == dict(mean=None, std=None)
    assert "–" in report.analysis_text(a)
    ann = data.Annotations([], ["a"] * len(t), [0] * len(t))
    a, sims = analyze(model, torch.full_like(t, torch.nan), f, ann)
    assert sims.isnan().all() and sum(a["histograms"]["similarity"]["relevant"]) == 0
    assert "–" in report.analysis_text(a)


# ---- the picture of a mass ----

@pytest.mark.parametrize("radius, prior", [("linear", "normal"), ("linear", "uniform"),
                                           ("mean", "normal")])
def test_numbers_of_a_mass_are_those_of_score(radius, prior):
    model = make_model(radius)
    model.prior, model.prior_std = prior, .3
    t, f, _ = features()
    t, f = t[0], f[[0, 4]]
    _, numbers = mass.measure_mass(model, t, f, M, 3)
    score = lambda **how: model.score(t[None], f, **how)[0]
    close = lambda name, wanted, far=1e-5: torch.testing.assert_close(
        numbers[name], wanted, atol=far, rtol=0)
    close("cos(t, v)", score(trials=0))
    close("cos(t_s, v), best sample", score(trials=M, seed=3))
    numbers["average"] = numbers["h·cos"] + numbers["E_M b"]
    close("average", torch.stack([score(trials=M, seed=seed) for seed in range(400)]).mean(0), .01)
    assert numbers["E_M b"].min() > 0
    S = F.cosine_similarity(t, f, dim=-1)
    close("mean of R", model.radius(S).mean(1))
    close("|t|", t.norm().expand(2))


@torch.no_grad()
def test_a_mass_in_its_plane():
    """t and both v are as far apart in it as they are; all else is its projection."""
    model = make_model()
    t, f, _ = features()
    for t, f in ((t[0], f[[0, 4]]), (t[1], f[[1, 2]]), (t[2], f[[2, 0]])):
        v = model.pool(t[None], f)[0]
        points, numbers = mass.measure_mass(model, t, f, M, 3)
        three = torch.cat([points["t"], points["v_right"], points["v_wrong"]])
        torch.testing.assert_close(torch.pdist(three), torch.pdist(torch.stack([t, *v])))
        assert points["t"].abs().max() == 0 and points["v_right"][0, 1].abs() < 1e-4
        assert points["v_right"][0, 0] > 0 and points["v_wrong"][0, 1] > 0
        # what a point has along t -> v, by the definition of a projection
        ahead = F.normalize(v[0] - t, dim=0)
        torch.testing.assert_close(points["frame"][:, 0], (f[0] - t) @ ahead)
        R = model.radius(F.cosine_similarity(t, f[0], dim=-1))
        support = F.normalize(v[0] - t, dim=0) * R
        torch.testing.assert_close(points["support"][0, 0], support @ ahead)
        samples = t + R * model.noise(M, 3)
        best = F.cosine_similarity(samples, v[0], dim=-1).argmax()
        torch.testing.assert_close(points["best"][0, 0], (samples[best] - t) @ ahead)
        noise = model.noise(200, 3)
        for k, kind in enumerate(("right", "wrong")):
            R = model.radius(F.cosine_similarity(t, f[k], dim=-1))
            torch.testing.assert_close(points[kind][:, 0], (R * noise) @ ahead)
            seen = 100 * points[kind].var(0).sum() / (R * noise).var(0).sum()
            assert numbers["spread in the plane, %"][k] == pytest.approx(seen.item(), rel=.25)


def test_no_mass_no_picture():
    t, f, ann = features()
    for radius, trials in (("none", M), ("linear", 0)):
        scored = score(make_model(radius), t, f, ann, trials)
        assert mass.measure_mass(make_model(radius), t[0], f[:2], trials, 3) == (None, None)
        assert report.mass_figure(0, make_model(radius), scored) == ""
    scored = score(make_model(), t[:1], f[:1], data.Annotations([], ["a"], [0]))
    assert report.mass_figure(0, make_model(), scored) == ""  # no wrong video


def test_marks_of_a_mass_need_no_colour():
    """Each kind has a shape of its own, or the width of a dot; nothing lies outside the picture."""
    t, f, _ = features()
    points, _ = mass.measure_mass(make_model(), t[0], f[[0, 4]], M, 3)
    drawn = {}
    wide, near, *legend = ElementTree.fromstring(mass.draw_mass(points)).iter("svg")
    for svg in (wide, near, *legend):
        *_, width, height = map(float, svg.get("viewBox").split())
        for path in svg.iter("path"):
            if path.get("class") in mass.MARKS:
                places = [re.match(r"(\S+) (\S+?)([hm].*)", move).groups()
                          for move in path.get("d").split("M")[1:]]
                assert all(0 < float(x) < width and 0 < float(y) < height for x, y, _ in places)
                drawn.setdefault(path.get("class"), []).append(places)
    for kind in ("right", "wrong"):  # all of it, near t, and the key
        assert list(map(len, drawn[kind])) == [200, 200, 1]
    assert drawn.keys() == mass.MARKS.keys() and len(legend) == len(drawn)
    shapes = {kind: views[-1][0][2] for kind, views in drawn.items()}
    dots = [kind for kind, shape in shapes.items() if shape == "h0"]
    assert dots == ["right", "t"] and len(set(shapes.values())) == len(shapes) - 1
    for kind, width in (("right", 4.4), ("t", 11)):
        assert re.search(rf"\.mass \.{kind}{{stroke-width:{width}}}", pages.STYLE)
    # videos that are alike, and a text that is its video: a picture all the same
    for right, wrong in ((f[0], f[0]), (t[0].expand(T, D), f[1])):
        points, _ = mass.measure_mass(make_model(), t[0], torch.stack([right, wrong]), M, 3)
        assert "nan" not in mass.draw_mass(points)


# ---- the page ----

class Page(HTMLParser):
    """Tags opened and closed in order, images, text of hits."""
    VOID = {"meta", "img", "path"}

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.images = []
        self.links = []
        self.hits = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        assert not any(name.startswith("on") or name == "srcset" for name in attrs)
        if "href" in attrs:  # a moment of a file
            assert tag == "a" and re.fullmatch(r"[^:?]*\.mp4#t=[\d.]+", attrs["href"])
            self.links.append(attrs["href"])
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
    assert page.tags.count("h1") == 1
    assert "Settings and versions" in page.text and torch.__version__ in page.text
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of 8 videos with hostile names and captions. -> its path, annotations, sims"""
    folder = tmp_path_factory.mktemp("report")
    names = [f"<script>{v}&.mp4" for v in range(7)]
    names.append("a_name_without_a_place_to_break_" * 7 + ".mp4")
    segments = []
    for v, name in enumerate(names):
        x = torch.full((6, 48, 64, 3), 30 * v, dtype=torch.uint8)
        x[:, 8:24, 8 * v:8 * v + 8] = torch.tensor([250, 120, 0], dtype=torch.uint8)
        write_video(folder / name, x)
        span = (0, .5) if name.startswith("a_") else ()
        segments.append(video.Segment(str(folder / name), *span))
    captions = [EVIL, *(f"caption {i} {'W' * 150}" for i in range(1, 16))]
    ann = data.Annotations(segments, captions, [i % 8 for i in range(16)])
    model = make_model()
    t, f, _ = features(16, 9)
    scored = score(model, t, f[:8], ann)
    t2v, v2t = ev.ranks(scored.sims, ann.owner)
    a = report.analyze(model, scored, t2v, v2t)
    log = ["step,epoch,loss,stochastic,support,ce,val_R1", "20,1,3.5,2,1.5,2.1,", "20,1,,,,,40",
           "40,2,2.5,1.5,1,nan,", "40,2,,,,,55"]
    (folder / "log.csv").write_text("\n".join(log))
    m = ev.measure(scored.sims, ann.owner)
    counts = dict(texts=16, videos=8)
    result = dict(m, dsl=m, released_protocol=dict(m, **counts), first_captions=m, **counts,
                  data=f"{EVIL}.csv", split="test", expected=True, **model.config)
    path = folder / "report.html"
    report.write_report(str(path), model, result, a, scored, t2v, str(folder / "log.csv"))
    return path, ann, scored.sims


def test_report(written):
    path, ann, sims = written
    page = sound(path.read_text(encoding="utf-8"))
    assert [p.name for p in path.parent.iterdir() if "part" in p.name] == []
    for words in (EVIL, "LEAKING", "transductive", "Validation t2v R@1", "best of 4 on average",
                  "caption of each video (16 texts)", "honest", "<script>0&.mp4", "(0 s to 0.5 s)"):
        assert words in page.text, words
    marked = [text for css, text in page.hits if "right" in css]
    # 2 best, 2 worst, 4 random: each shows its right video once
    assert len(marked) == page.tags.count("article") == 8
    for css, text in page.hits:
        assert ("✓ the right video" in text) == ("right" in css)
    assert 8 * 5 <= len(page.hits) <= 8 * 6 and len(page.images) == 6 * len(page.hits)
    # every result leads to its file, seen from the page
    assert len(page.links) == len(page.hits)
    for link in page.links:
        assert (path.parent / unquote(link.removesuffix("#t=0"))).is_file(), link


def test_the_right_video_and_its_rank(written):
    """Cards, read back: scores are those of the caption, in order; the right video is marked."""
    path, ann, sims = written
    ranks = ev.ranks(sims, ann.owner)[0]
    for card in path.read_text(encoding="utf-8").split("<article")[1:]:
        page = Page("<article" + card.split("</article>")[0] + "</article>")
        assert page.tags.count("svg") == 2 + len(mass.MARKS)
        i = ann.captions.index(page.text.split("“")[1].split("”")[0])
        order = sims[i].sort(descending=True).indices
        for n, (css, text) in enumerate(page.hits):
            names = map(report.segment_name, ann.segments)
            v = next(v for v, name in enumerate(names) if name in text)
            right = v == ann.owner[i]
            assert ("right" in css) == right and f"score {sims[i, v]:.4f}" in text
            assert v == order[n] if n < 5 else right
            if right:
                assert text.split()[0] == f"{ranks[i]:g}"
        assert f"rank {ranks[i]:g} of 8" in page.text
        right = ann.owner[i]
        wrong = next(v for v in order if v != right)
        best = card.split("best sample</th>")[1].split("</tr>")[0]
        assert re.findall(r"-?\d\.\d{4}", best) == [f"{sims[i, v]:.4f}" for v in (right, wrong)]


def test_a_tied_rank_hides_no_video():
    """Six videos tie: the right one's rank, 3.5, is nobody's place; nor is 3 of five that tie."""
    for V in (5, 6):
        segments = [video.Segment(f"{v}.mp4") for v in range(V)]
        ann = data.Annotations(segments, ["a"], [V - 1])
        scored = ev.Scored(None, None, torch.ones(1, V), ann, [], {})
        rank = (V + 1) / 2
        page = Page(report.query_card(0, scored, rank, 4, lambda segment: "", "p.html"))
        assert [text.split()[0] for _, text in page.hits[:4]] == ["1", "2", "3", "4"]
        assert sum(css == "right" for css, _ in page.hits) == 1
        assert ("ties averaged" in page.text) == (V == 6)


def test_queries_chosen():
    """The best has the widest margin, the worst the last rank; a seed chooses the random ones."""
    sims = torch.eye(9) + torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) * .1
    owner = torch.arange(9)
    sims[4, 4] = 3
    sims[7, 7] = -1
    t2v = ev.ranks(sims, owner)[0]

    def choose(seed):
        return report.choose_queries(sims, owner, t2v, seed)
    best, worst, random = choose(5).values()
    assert best[0] == 4 and worst == [7] and len(random) == 4
    assert len({*best, *worst, *random}) == 7
    assert choose(5)["Random"] == random
    assert any(choose(seed)["Random"] != random for seed in range(5))


def test_search_report(written, tmp_path):
    _, ann, _ = written
    files = [ann.segments[0].path, ann.segments[7].path, str(tmp_path / "gone<b>.mp4")]
    hits = []
    for n, x in enumerate(files, 1):
        hits.append(dict(rank=n, score=.9 - n / 10, file=x, at=n / 10, start=0, end=9))
    settings = dict(ckpt="m.pt", trials=20)
    report.write_search_report(str(tmp_path / "s.html"), {EVIL: hits}, settings)
    page = sound((tmp_path / "s.html").read_text(encoding="utf-8"))
    assert EVIL in page.text and len(page.hits) == 3 and len(page.images) == 2 * 6
    assert "no picture" in page.hits[2][1] and "✓" not in page.text
    for n, (_, text) in enumerate(page.hits, 1):
        assert f"score {.9 - n / 10:.4f}" in text


def test_the_matching_frame_is_framed(tmp_path):
    """At most six frames, with the one nearest to the time among them, each with its own time."""
    write_video(tmp_path / "x.mp4", numbered(240), fps=10)
    segment = video.Segment(str(tmp_path / "x.mp4"), 10, 20)
    for at, frames, place, says in ((11.0, 12, 0, "0:00:11"), (18.5, 12, 5, "0:00:18"),
                                    (14.4, 4, 1, "0:00:13"), (0.0, 12, 0, "0:00:10")):
        images = Page(report.strip(segment, frames, at)).images
        times = [image["alt"].removeprefix("x.mp4 at ") for image in images]
        assert len(times) == min(frames, 6) and times == sorted(times)
        classes = [image["class"] for image in images]
        assert classes.index("nearest") == place and classes.count("nearest") == 1
        assert times[place] == says
    assert "nearest" not in report.strip(segment, 6)


def test_unwritable(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "r.html", tmp_path / "folder"):
        with pytest.raises(common.DataError, match="cannot be written"):
            report.write_search_report(str(path), {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_names_that_are_not_unicode(tmp_path):
    found = [dict(rank=1, score=0., file="caf\udce9.mp4", at=0, start=0, end=1)]
    report.write_search_report(str(tmp_path / "r.html"), {"q": found}, {})
    sound((tmp_path / "r.html").read_text(encoding="utf-8"))


def test_odd_logs(tmp_path):
    """No log, an empty one, one of something else, one row: never an error."""
    path = tmp_path / "log.csv"
    assert pages.training_charts(path) == {}
    logs = {"": 0, "a,b\n1,2\n": 0, "step,loss\nx,y\n": 0, "step,loss\n5,1.5\n": 1,
            "step,loss\n5,nan\n": 0, "step,val_R1\n5,0\n": 1}
    for text, curves in logs.items():
        path.write_text(text)
        assert len(pages.training_charts(path)) == curves, text


def test_ticks():
    """Round numbers, few enough to be read, that cover what they stand for."""
    for low, high in ((0, 1), (0, 104), (.37, .44), (-3, 5), (130.2, 131.9), (1, 280)):
        found = pages.ticks(low, high)
        assert 4 <= len(found) <= 11 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
        step = found[1] - found[0]
        assert found[0] - low < step and high - found[-1] < step
        assert all(len(f"{x:g}") <= 6 for x in found)


@pytest.mark.parametrize("low", [0, 0.9, -136.131])
@pytest.mark.parametrize("width", [1e-5, 1e-4, 1e-3, 1])
def test_the_ticks_of_a_histogram_differ(low, width):
    """Also where all values are nearly equal."""
    x = low + width * torch.linspace(0, 1, 9)
    chart = pages.histogram_chart(report.histogram(dict(relevant=x, irrelevant=x)), "", "x")
    labels = re.findall(r'middle">([^<]+)<', chart)
    assert len(labels) > 4 and len(set(labels)) == len(labels)


def test_a_curve_of_one_point_is_seen(tmp_path):
    """As the validation of one epoch: a cross within the axes, whose numbers are whole steps."""
    (tmp_path / "log.csv").write_text("step,val_R1\n93,78\n")
    (chart,) = pages.training_charts(tmp_path / "log.csv").values()
    x, cross = re.search(r'class="line0" d="M([0-9.]+) [0-9.]+(.*)"', chart).groups()
    assert pages.LEFT < float(x) < pages.RIGHT and "l" in cross
    assert re.findall(r'middle">([^<]+)<', chart) == [*map(str, range(0, 100, 10)), "step"]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(written, tmp_path, width):
    """No wider than the window, though captions and names have no place to break."""
    path, *_ = written
    # chromium has no windows below 500 pixels: an iframe of the wanted width stands for one
    probe = tmp_path / "probe.html"
    page = json.dumps(path.read_text(encoding="utf-8")).replace("</", "<\\/")
    probe.write_text(f"""<!DOCTYPE html><body style="margin:0">
        <iframe id="f" style="width:{width}px;height:6000px;border:0"></iframe><script>
        f.onload = () => {{
            const d = f.contentDocument, e = d.documentElement;
            const outside = x => x.getBoundingClientRect().right > {width} + 1;
            const wide = [...d.querySelectorAll('body *')].filter(
                x => outside(x) && !x.closest('.scroll'));
            const sideways = [...d.querySelectorAll('.scroll')].filter(
                x => x.scrollWidth > x.clientWidth).length;
            const broken = [...d.images].filter(x => !x.naturalWidth).length;
            document.title = ['probe', e.clientWidth, e.scrollWidth, wide.length + sideways, broken,
                              d.images.length].join(' ') }};
        f.srcdoc = {page};</script>""", encoding="utf-8")

    def browse(*args):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                   "--no-first-run", "--hide-scrollbars", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync"]
        options += [f"--user-data-dir={tmp_path / 'p'}", f"--window-size={max(500, width)},1600"]
        command = [BROWSER, *options, *args, probe.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    dom = browse("--virtual-time-budget=5000", "--dump-dom").stdout
    found = dom.split("<title>probe ")[1].split("</title>")[0]
    seen, page_wide, outside, broken, images = map(int, found.split())
    assert seen == width and page_wide <= width
    assert outside == 0 and broken == 0 and images >= 24
    picture = tmp_path / "shot.png"
    browse(f"--screenshot={picture}", "--virtual-time-budget=5000")
    x = decode_image(str(picture), ImageReadMode.RGB)[:, :, :width].float()
    assert x.shape[2] == width and x.std() > 20  # something was painted
    assert Path(picture).stat().st_size > 20_000


# ---- through eval.py ----


@pytest.mark.slow
def test_command_line(run, tmp_path):
    """--analyze and --report on real files show what --json says; search makes a page, too."""
    lines = ["video,caption"]
    for v in range(4):
        frames = torch.full((6, 32, 32, 3), 60 * v, dtype=torch.uint8)
        write_video(tmp_path / f"{v}.mp4", frames)
        evil = EVIL.replace(",", "").replace('"', "")
        lines += [f"{v}.mp4,{evil} {v}", f"{v}.mp4,another caption of {v}"]
    (tmp_path / "my.csv").write_text("\n".join(lines))
    tokenizer = Tokenizer(context_length=16)
    save_checkpoint(tmp_path / "m.pt", make_model(), tokenizer, dict(data="shapes"))
    (tmp_path / "m.log.csv").write_text("step,loss\n20,3.5\n40,2.5\n")
    (tmp_path / "log.csv").write_text("step,val_R1\n20,40\n")  # another run's

    def called(program, *args):
        common = ["--ckpt", "m.pt", "--device", "cpu", "--workers", 0, "--trials", M]
        return run(program, *args, *common, cwd=tmp_path, env=ENV)
    args = ["--data", "my.csv", "--analyze", "--report", "r.html", "--json", "r.json"]
    out = called("eval.py", *args)
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    a = result["analysis"]
    page = sound((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert a["relevant"]["pairs"] == 8 and a["irrelevant"]["pairs"] == 24
    assert report.analysis_text(a) in out.stdout
    for way in ("t2v", "v2t"):
        values = {k: x["value"] for k, x in a["intervals"][way].items()}
        assert values == pytest.approx({k: result[way][k] for k in ("R1", "R5", "R10")})
    for cell in report.metrics_table(result)[1][0] + report.pairs_table(a)[1][0]:
        assert cell in page.text and cell in out.stdout  # one list of rows for both
    assert "<script>alert(1)</script> & 'two' " in page.text
    assert "8 captions, 4 videos" in page.text
    assert "Training losses" in page.text and "Validation" not in page.text
    (tmp_path / "m.log.csv").unlink()
    assert called("eval.py", *args).returncode == 0
    assert "Training" not in (tmp_path / "r.html").read_text(encoding="utf-8")  # not another run's
    outputs = ["--report", "s.html", "--json", "s.json"]
    out = called("search.py", "dark", "--videos", ".", *outputs)
    assert out.returncode == 0, out.stderr
    hits = sound((tmp_path / "s.html").read_text(encoding="utf-8")).hits
    found = json.loads((tmp_path / "s.json").read_text())["dark"]
    assert len(hits) == len(found) == 4
    for x, (_, text) in zip(found, hits):
        assert x["file"] in text and f"{x['score']:.4f}" in text
    missing = (["--report", "missing/r.html"], ["--data", "my.csv", "--json", "missing/x.json"])
    for args in missing:
        out = called("eval.py", *args)
        assert out.returncode == 2 and "error: " in out.stderr and "Traceback" not in out.stderr
