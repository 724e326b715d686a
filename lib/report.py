"""What lies behind the metrics: relevant against irrelevant pairs, recall with intervals, and a page to look at.

`analyze` computes, `analysis_text` prints; `write_report` and `write_search_report` write one self-contained HTML file
each: no script, no network, charts as inline SVG, frames as inline JPEG. Whatever comes from users (captions, file
names) is escaped by `esc`.
"""
import base64
import csv
import html
import math
import os
import platform
import time
from urllib.parse import quote

import av
import torch
import torch.nn.functional as F
import torchvision
from torchvision.io import encode_jpeg
from torchvision.transforms.v2.functional import resize

import data
from lib import video as decode
from lib.common import clock, escaped, output

RECALLS = (1, 5, 10)
MOST_PAIRS = 20_000  # irrelevant pairs looked at; more are sampled
BINS = 40


# ---- analysis ----

def frame_diversity(f):
    """How much a video's frames differ: mean pairwise cosine distance. f (V,T,D) -> (V,)."""
    T = f.shape[1]
    total = F.normalize(f.float(), dim=-1).sum(1).square().sum(-1)  # |Σ f_j|² = T + Σ_{j≠k} cos(f_j, f_k)
    return 1 - (total - T) / max(1, T * (T - 1)) if T > 1 else torch.zeros_like(total)


def bootstrap(hits, video, generator, resamples=2000):
    """95 % intervals of recall. hits (n,K), the texts' video (n,) -> list of K (percent, low, high).

    Texts of one video stand or fall together: videos are drawn again, each with all its texts.
    """
    group = video.unique(return_inverse=True)[1]
    n = int(group.max()) + 1
    sums = torch.zeros(n, hits.shape[1], dtype=torch.float64).index_add_(0, group, hits.double())
    texts, rates, block = group.bincount(minlength=n).double(), [], max(1, 2_000_000 // n)
    for start in range(0, resamples, block):
        drawn = torch.randint(n, (min(block, resamples - start), n), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64)  # how often each video was drawn
        times.scatter_add_(1, drawn, torch.ones_like(times))
        rates.append(times @ sums / (times @ texts)[:, None])
    low, high = torch.cat(rates).quantile(torch.tensor([.025, .975], dtype=torch.float64), dim=0)
    found = 100 * torch.stack([hits.double().mean(0), low, high], 1)  # (K,3)
    return [tuple(row) for row in found.tolist()]


def thirds(values, hits, point_hits, video, generator):
    """R@1 by third of a number per text; equal values stay together. values, hits, point_hits, video (N,) -> dicts."""
    bounds, out = values.quantile(torch.tensor([1 / 3, 2 / 3], dtype=values.dtype)), []
    part = torch.bucketize(values, bounds)
    for k, name in enumerate(("low", "middle", "high")):
        rows = part == k
        if rows.any():
            both = torch.stack([hits[rows], point_hits[rows]], 1)
            (r1, low, high), (point, *_) = bootstrap(both, video[rows], generator)
            out.append(dict(third=name, least=values[rows].min().item(), most=values[rows].max().item(),
                            texts=int(rows.sum()), R1=r1, low=low, high=high, R1_point=point))
    return out


def radius_l1(model, t, f, i, j, block=2048):
    """|R_ij|_1 of the pairs (i, j). t (N,D), f (V,T,D), i, j (P,) -> (P,) on the CPU."""
    t, f, out = F.normalize(t.float(), dim=-1), F.normalize(f.float(), dim=-1), []
    for a, b in zip(i.to(t.device).split(block), j.to(t.device).split(block)):
        out.append(model.radius((t[a, None] * f[b]).sum(-1)).abs().sum(-1).cpu())
    return torch.cat(out)


def spread(x):
    """x (P,) -> dict(mean, std), None where there are too few to tell."""
    return dict(mean=x.mean().item() if len(x) else None, std=x.std().item() if len(x) > 1 else None)


def histogram(relevant, irrelevant):
    """Counts in common bins; what isn't a number is left out. (P,), (Q,) -> dict(edges, relevant, irrelevant)."""
    parts = [x[x.isfinite()].double() for x in (relevant, irrelevant)]
    both = torch.cat(parts)
    low, high = (both.min().item(), both.max().item()) if len(both) else (0., 1.)
    if high - low < 1e-6 * max(1, abs(low)):  # all equal, as |R|_1 = 0 of radius none
        low, high = low - .5, high + .5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
    counts = [torch.histc(x, BINS, low, high).long().tolist() for x in parts]
    return dict(edges=edges, relevant=counts[0], irrelevant=counts[1])


@torch.no_grad()
def analyze(model, t, f, captions, owner, sims, ranks, trials=20, seed=24):
    """What the scores are made of. t (N,D), f (V,T,D), owner (N,), sims (N,V), ranks of eval.ranks -> plain dict.

    intervals: recall with 95 % intervals (`bootstrap`). relevant: pairs of a text and its own video; irrelevant: others
    (at most MOST_PAIRS, a seeded sample); of each cos(t, v), the best sample's cos(t_s, v) as in sims, |R|_1.
    complexity, length: R@1 by third, with samples and without.
    """
    generator = torch.Generator().manual_seed(seed)
    owner, (N, V) = torch.as_tensor(owner).cpu(), sims.shape
    t2v, v2t = ranks
    point = (model.score(t, f, 0) if trials else sims).cpu()  # cos(t, v): the point text
    sims = sims.cpu()
    out = dict(trials=trials, seed=seed, intervals={})
    captioned = ~v2t.isnan()
    for way, r, video in (("t2v", t2v, owner), ("v2t", v2t[captioned], torch.arange(V)[captioned])):
        found = bootstrap(torch.stack([r <= k for k in RECALLS], 1), video, generator)
        out["intervals"][way] = {f"R{k}": dict(zip(("value", "low", "high"), x)) for k, x in zip(RECALLS, found)}

    others = N * (V - 1)  # irrelevant pairs, numbered text by text
    k = torch.arange(others) if others <= MOST_PAIRS else torch.randint(others, (MOST_PAIRS,), generator=generator)
    i = k // max(1, V - 1)
    pairs = dict(relevant=(torch.arange(N), owner), irrelevant=(i, (owner[i] + 1 + k % max(1, V - 1)) % V))
    seen = {}
    for name, (i, j) in pairs.items():
        best, plain = sims[i, j], point[i, j]
        size = radius_l1(model, t, f, i, j) if len(i) else best
        seen[name] = best, size
        beats = 100 * (best > plain).double().mean().item() if len(i) else None
        out[name] = dict(pairs=len(i), sampled=name == "irrelevant" and others > MOST_PAIRS, point=spread(plain),
                         best=spread(best), radius=spread(size), best_beats_point=beats)
    both = zip(("similarity", "radius"), seen["relevant"], seen["irrelevant"])
    out["histograms"] = {what: histogram(ours, theirs) for what, ours, theirs in both}

    own = point.gather(1, owner[:, None])
    point_hits = (point.scatter(1, owner[:, None], -torch.inf).amax(1) < own[:, 0])
    out["point_R1"] = 100 * point_hits.double().mean().item()
    words = torch.tensor([float(len(c.split())) for c in captions])
    out["complexity"] = thirds(frame_diversity(f).cpu()[owner], t2v <= 1, point_hits, owner, generator)
    out["length"] = thirds(words, t2v <= 1, point_hits, owner, generator)
    return out


def number(x, digits=1):
    return "–" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def mean_std(x, digits):
    return f"{number(x['mean'], digits)} ± {number(x['std'], digits)}"


PAIR_ROWS = (("cos(t, v), point text", "point", 3), ("cos(t_s, v), best sample", "best", 3),
             ("|R|₁, radius of the text mass", "radius", 1))
THIRDS = (("complexity", "video complexity (frame diversity)", 3), ("length", "caption length (words)", 0))


def about_pairs(a):
    """How many pairs, and which, in words."""
    kind = "a seeded sample of the irrelevant" if a["irrelevant"]["sampled"] else "all irrelevant"
    relevant, others = a["relevant"]["pairs"], a["irrelevant"]["pairs"]
    return f"{relevant} relevant pairs (a caption and its own video), {others} others ({kind} ones)"


def analysis_text(a):
    """The result of `analyze` as a table for the terminal."""
    lines = ["recall in percent, with 95 % intervals (bootstrap over videos with all their texts)"]
    for way, found in a["intervals"].items():
        cells = [f"R@{k[1:]} {x['value']:.1f} [{x['low']:.1f}, {x['high']:.1f}]" for k, x in found.items()]
        lines.append(f"  {way}  {'   '.join(cells)}")
    lines += ["", about_pairs(a), f"  {'mean ± std':34s}{'relevant':>20s}{'irrelevant':>20s}"]
    for label, key, digits in PAIR_ROWS:
        ours, theirs = (mean_std(a[kind][key], digits) for kind in ("relevant", "irrelevant"))
        lines.append(f"  {label:34s}{ours:>20s}{theirs:>20s}")
    ours, theirs = (number(a[kind]["best_beats_point"]) for kind in ("relevant", "irrelevant"))
    lines.append(f"  {'best sample beats point text, %':34s}{ours:>20s}{theirs:>20s}")
    for key, label, digits in THIRDS:
        lines += ["", f"t2v R@1 by {label:40s}{'texts':>7s}{'R@1':>7s}{'95 %':>16s}{'point text':>12s}"]
        for x in a[key]:
            values = f"{x['least']:10.{digits}f} to {x['most']:<28.{digits}f}"
            interval = f"[{x['low']:.1f}, {x['high']:.1f}]"
            lines.append(f"  {x['third']:8s}{values}{x['texts']:8d}{x['R1']:7.1f}{interval:>16s}{x['R1_point']:12.1f}")
    return "\n".join(lines)


# ---- charts: inline SVG, distinguishable without colour ----

W, H, LEFT, RIGHT, TOP, BOTTOM = 480, 270, 46, 14, 12, 44


def esc(x):
    return html.escape(escaped(str(x), keep="\n\t"), quote=True)


def ticks(low, high, about=5):
    """Round numbers between low and high."""
    raw = (high - low) / about
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step >= raw)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(about, x, y, label, draw, x_ticks=None, unit=""):
    """An SVG with axes. x, y: (low, high); draw(X, Y): the marks, given the maps to pixels; x_ticks: (value, text)s."""
    def X(v):
        return LEFT + (v - x[0]) / (x[1] - x[0]) * (W - LEFT - RIGHT)

    def Y(v):
        return H - BOTTOM - (v - y[0]) / (y[1] - y[0]) * (H - TOP - BOTTOM)
    grid = below = ""
    for v in ticks(*y):
        grid += (f'<path class="grid" d="M{LEFT} {Y(v):.1f}H{W - RIGHT}"/>'
                 f'<text x="{LEFT - 6}" y="{Y(v) + 4:.1f}" text-anchor="end">{v:g}{unit}</text>')
    for v, text in x_ticks or [(v, f"{v:g}") for v in ticks(*x)]:
        below += f'<text x="{X(v):.1f}" y="{H - BOTTOM + 17}" text-anchor="middle">{esc(text)}</text>'
    axis = f'<path class="axis" d="M{LEFT} {H - BOTTOM}H{W - RIGHT}"/>'
    name = f'<text x="{(LEFT + W - RIGHT) / 2}" y="{H - 8}" text-anchor="middle">{esc(label)}</text>'
    inside = grid + below + draw(X, Y) + axis + name
    return f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(about)}">{inside}</svg>'


def key(*entries):
    """A legend. entries: (CSS class of the mark, text)."""
    shapes, out = dict(on="M1 13V3H25V13Z", off="M1 13V3H25V13Z", diamond="M13 1L19 7L13 13L7 7Z"), ""
    for css, text in entries:
        mark = f'<path class="{css}" d="{shapes.get(css, "M1 7H25")}"/>'
        out += f'<span><svg viewBox="0 0 26 14" aria-hidden="true">{mark}</svg>{esc(text)}</span>'
    return f'<p class="key">{out}</p>'


def histogram_chart(h, about, label):
    """Relevant filled, irrelevant hatched with a dashed outline, each as shares of its own kind."""
    def percent(counts):
        return [100 * n / max(1, sum(counts)) for n in counts]
    edges, relevant, irrelevant = h["edges"], percent(h["relevant"]), percent(h["irrelevant"])

    def draw(X, Y):
        out = ""
        for css, share in (("off", irrelevant), ("on", relevant)):
            path = f"M{X(edges[0]):.1f} {Y(0):.1f}"
            path += "".join(f"V{Y(s):.1f}H{X(e):.1f}" for s, e in zip(share, edges[1:]))
            out += f'<path class="{css}" d="{path}V{Y(0):.1f}Z"/>'
        return out
    svg = chart(about, (edges[0], edges[-1]), (0, 1.05 * max(1., *relevant, *irrelevant)), label, draw, unit="%")
    return svg + key(("on", "relevant"), ("off", "irrelevant"))


def thirds_chart(rows, label, samples):
    """R@1 by third: a bar with its interval for the samples, an open diamond for the point text."""
    def draw(X, Y):
        out = ""
        for n, r in enumerate(rows):
            x, zero = f"{X(n):.1f}", f"{Y(0):.1f}"
            bar, low, high, point = (f"{Y(r[k]):.1f}" for k in ("R1", "low", "high", "R1_point"))
            out += (f'<path class="on" d="M{x} {zero}m-34 0V{bar}h68V{zero}Z"/>'
                    f'<path class="whisker" d="M{x} {low}V{high}M{x} {low}m-7 0h14M{x} {high}m-7 0h14"/>'
                    f'<path class="diamond" d="M{x} {point}m20-7l7 7l-7 7l-7-7Z"/>')
        return out
    top = max(10., *(r["high"] for r in rows), *(r["R1_point"] for r in rows))
    names = [(n, f"{r['third']} ({r['texts']} texts)") for n, r in enumerate(rows)]
    about = f"R@1, {label}: " + ", ".join(f"{r['third']} {r['R1']:.1f}" for r in rows)
    return (chart(about, (-.5, len(rows) - .5), (0, min(104, top * 1.08)), label, draw, names, "%")
            + key(("on", f"{samples}, 95 % interval"), ("diamond", "point text")))


def line_chart(lines, about, label, unit=""):
    """lines: [(name, [(x, y)])], told apart by their dashes."""
    points = [p for _, line in lines for p in line]
    xs, ys = zip(*points)
    pad = (max(ys) - min(ys)) * .06 or 1
    x = min(xs), max(xs) + (min(xs) == max(xs))
    y = max(0, min(ys) - pad), max(ys) + pad

    def draw(X, Y):
        dots = points if len(lines) == 1 and len(points) < 20 else []
        out = "".join(f'<circle class="dot" cx="{X(a):.1f}" cy="{Y(b):.1f}" r="3.5"/>' for a, b in dots)
        for n, (_, line) in enumerate(lines):
            path = " ".join(f"{X(a):.1f},{Y(b):.1f}" for a, b in line)
            out += f'<polyline class="line{n}" points="{path}"/>'
        return out
    names = [(f"line{n}", name) for n, (name, _) in enumerate(lines)]
    return chart(about, x, y, label, draw, unit=unit) + key(*names)


def training_charts(path):
    """The curves of a log of train.py: [(title, svg)], nothing where there is none or it can't be read."""
    series = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for name in ("loss", "stochastic", "support", "ce", "val_R1"):
            line = [(float(r["step"]), float(r[name])) for r in rows if r.get(name)]
            line = [p for p in line if math.isfinite(p[1])]
            if line:
                series[name] = line[::max(1, len(line) // 400)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    val, out = series.pop("val_R1", None), []
    if series:
        out.append(("Training losses", line_chart(list(series.items()), "losses by training step", "step")))
    if val:
        svg = line_chart([("validation R@1", val)], "validation R@1 by training step", "step", "%")
        out.append(("Validation t2v R@1", svg))
    return out


# ---- the page ----

STYLE = """
:root{color-scheme:light dark;--ink:#1a1c20;--soft:#5b616b;--page:#f6f6f4;--card:#fff;--rule:#dcdcd8;--on:#1f5fbf;
--off:#8a5a00;--good:#0b6b3a;--goodbg:#e4f4ea}
@media(prefers-color-scheme:dark){:root{--ink:#e9eaec;--soft:#a2a8b3;--page:#131518;--card:#1c1f24;--rule:#353a42;
--on:#7fb0ff;--off:#e0b050;--good:#7fdba4;--goodbg:#173325}}*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 clamp(14px,3vw,32px)}
header{padding-top:clamp(20px,4vw,44px)}
h1{font-size:clamp(1.5rem,4vw,2.1rem);line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:2.6rem 0 .3rem}h3{font-size:1.02rem;margin:1.4rem 0 .6rem}
h4{font-size:1rem;margin:0 0 .15rem;line-height:1.35}h1,h4,p,dd,.file,li{overflow-wrap:anywhere}p{margin:.2rem 0 .8rem}
.soft,figcaption,footer{color:var(--soft)}.soft{font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:16px;min-width:0;margin:0}
.scroll{overflow-x:auto}table{font-size:.95rem;border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child>*{border-bottom:0}th:first-child{text-align:left;font-weight:500}
thead th{color:var(--soft);font-weight:500;font-size:.88rem}
td small,th small{display:block;font-weight:400;color:var(--soft);font-size:.78rem;white-space:nowrap}
th:first-child{min-width:7.5em}td.main{font-weight:650}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px;margin:1.2rem 0}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:12px 16px}
.tiles b{display:block;font-size:1.7rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.85rem}ol{list-style:none;margin:10px 0 0;padding:0;display:grid;gap:10px}
ol img{display:block;width:100%;height:auto;max-height:120px;object-fit:contain;object-position:left;border-radius:5px;
background:var(--page)}ol figure{margin:0}
figcaption{font-size:.85rem;display:flex;flex-wrap:wrap;gap:0 .8em;margin-top:3px;font-variant-numeric:tabular-nums}
figcaption b{color:var(--ink)}
.right{border-left:5px solid var(--good);background:var(--goodbg);padding:7px;border-radius:7px}
.right .mark{color:var(--good);font-weight:650}.gap{border-top:2px dotted var(--rule);padding-top:10px}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:13px}.grid{stroke:var(--rule)}
.axis{stroke:var(--soft)}.on{fill:var(--on);fill-opacity:.45;stroke:var(--on);stroke-width:1.6}
.off{fill:url(#hatch);stroke:var(--off);stroke-width:1.6;stroke-dasharray:4 2}
.hatch{stroke:var(--off);stroke-width:1.4;stroke-opacity:.75}.whisker{stroke:var(--ink);stroke-width:1.8;fill:none}
.diamond{fill:var(--card);stroke:var(--ink);stroke-width:1.8}[class^=line]{fill:none;stroke:var(--on);stroke-width:2}
.line1{stroke-dasharray:7 4;stroke:var(--off)}.line2{stroke-dasharray:2 3;stroke:var(--ink)}
.line3{stroke-dasharray:9 3 2 3;stroke:var(--soft)}.dot{fill:var(--on)}
.key{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.85rem;color:var(--soft);margin:.3rem 0 0}
.key span{display:flex;align-items:center;gap:6px}.key svg{width:26px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:8px 20px;margin:0}dl div{min-width:0}
dt{color:var(--soft);font-size:.82rem}dd{margin:0}
.warn{border:2px solid var(--off);border-radius:10px;padding:8px 12px}
footer{padding-top:28px;padding-bottom:40px;font-size:.85rem}
"""


def page(title, lead, body, settings):
    """A whole document. title and lead are text; body is HTML."""
    shown = {**settings, "Python": platform.python_version(), "torch": torch.__version__,
             "torchvision": torchvision.__version__, "av": av.__version__}
    items = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in shown.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{esc(title)}</title><style>{STYLE}</style></head><body>
<svg width="0" height="0" style="position:absolute;width:0;height:0" aria-hidden="true"><defs>
<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<path class="hatch" d="M0 0V6"/></pattern></defs></svg>
<header><h1>{esc(title)}</h1><p class="soft">{esc(lead)}</p></header>
<main>{body}
<section><h2>Settings and versions</h2><div class="card"><dl>{items}</dl></div></section></main>
<footer>Written by T-MASS on {time.strftime('%Y-%m-%d %H:%M')}.</footer></body></html>
"""


def write(path, text):
    """A page, whole or not at all. What isn't Unicode in file names becomes a character reference."""
    with output("--report", path) as part, open(part, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
        file.write(text)


def strip(clip, frames=6, height=96):
    """Frames of a clip side by side, as an <img> with a JPEG in it; a note where it can't be read."""
    try:
        return picture(data.read_frames(clip, frames), height, os.path.basename(clip.path))
    except data.DataError as e:
        return f"<p>no picture: {esc(e)}</p>"


def moment(clip, at, frames=12, height=96, shown=6):
    """As `strip`, of the piece that a search found: about every second of its T frames, that at time `at` framed."""
    try:
        piece = decode.read_clip(clip, frames)
    except data.DataError as e:
        return f"<p>no picture: {esc(e)}</p>"
    k, step = min(range(frames), key=lambda k: abs(piece.times[k] - at)), max(1, frames // shown)
    return picture(piece.frames[k % step::step], height, f"{os.path.basename(clip.path)} around {clock(at)}", k // step)


def picture(x, height, name, marked=None):
    """uint8 (n,3,H,W) -> an <img> of them side by side, one of them marked by a frame around it."""
    x = resize(x, [height, max(16, min(4 * height, round(height * x.shape[3] / x.shape[2])))], antialias=True)
    x = F.pad(x, (4, 4, 4, 4), value=255)
    if marked is not None:
        edge = torch.ones(x.shape[2:], dtype=torch.bool)
        edge[4:-4, 4:-4] = False
        x[marked] = x[marked].where(~edge, torch.tensor([0, 114, 178], dtype=torch.uint8).view(3, 1, 1))
    n, x = len(x), torch.cat(list(x), 2)
    jpeg = base64.b64encode(encode_jpeg(x, quality=75).numpy().tobytes()).decode()
    return (f'<img alt="{n} frames of {esc(name)}" width="{x.shape[2]}" height="{x.shape[1]}" '
            f'src="data:image/jpeg;base64,{jpeg}">')


def hit(picture, rank, score, name, right=None, gap=False, link=None):
    """One result. right: is it the video that was looked for? None where nobody knows. link: where its name leads."""
    mark = '<span class="mark">✓ the right video</span>' if right else ""
    name = f'<a href="{esc(link)}">{esc(name)}</a>' if link else esc(name)
    css = ("right" if right else "") + (" gap" if gap else "")
    caption = f'<b>{rank:g}</b><span>score {score:.4f}</span>{mark}<span class="file">{name}</span>'
    return f'<li class="{css}"><figure>{picture}<figcaption>{caption}</figcaption></figure></li>'


def clip_name(clip):
    """File name, and the seconds where it is a part of a file."""
    name, start, end = os.path.basename(clip.path), clip.start or 0, clip.end
    if clip.start is None and end is None:
        return name
    return f"{name} ({start:g} s to {'the end' if end is None else f'{end:g} s'})"


def choose_queries(sims, owner, t2v, each, seed):
    """Best, worst and random texts, one per video; best and worst by rank, then margin. -> [(title, text numbers)]."""
    own = sims.gather(1, owner[:, None])[:, 0]
    margin = (own - sims.scatter(1, owner[:, None], -torch.inf).amax(1)).tolist()
    order = sorted(range(len(t2v)), key=lambda i: (t2v[i].item(), -margin[i]))
    shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
    out, shown = [], set()
    missed = [i for i in reversed(order) if t2v[i] > 1]
    for title, texts, n in (("Best", order, each), ("Worst", missed, each), ("Random", shuffled, 2 * each)):
        chosen = []
        for i in texts:
            if len(chosen) < n and owner[i].item() not in shown:
                chosen.append(i)
                shown.add(owner[i].item())
        out.append((title, chosen))
    return out


def query_cards(sims, ann, t2v, each, top, seed):
    """Top videos of chosen queries, the right one marked, and shown below where it isn't among them."""
    sims, owner, strips = sims.cpu(), torch.as_tensor(ann.owner), {}

    def row(i, v, rank, gap=False):
        strips[v] = strips.get(v) or strip(ann.segments[v])
        return hit(strips[v], rank, sims[i, v].item(), clip_name(ann.segments[v]), v == ann.owner[i], gap)
    out = ""
    for title, chosen in choose_queries(sims, owner, t2v, each, seed):
        cards = ""
        for i in chosen:
            videos, right, rank = sims[i].topk(min(top, sims.shape[1])).indices.tolist(), ann.owner[i], t2v[i].item()
            rows = "".join(row(i, v, n) for n, v in enumerate(videos, 1))
            if right not in videos:
                rows += row(i, right, rank, True)
            place = f"rank {rank:g} of {sims.shape[1]}{' (ties averaged)' if rank % 1 else ''}"
            cards += (f'<article class="card"><h4 dir="auto">“{esc(ann.captions[i])}”</h4>'
                      f'<p class="soft">right video: {place}</p><ol>{rows}</ol></article>')
        out += f'<h3>{title}</h3><div class="cards">{cards}</div>' if chosen else ""
    return out


def metrics_table(result, a):
    """All rows of the result; intervals where there are some."""
    def rows(part, label, intervals=None):
        for way, name in (("t2v", "text → video"), ("v2t", "video → text<small>max over captions</small>"),
                          ("v2t_strict", "video → text<small>strict</small>")):
            m, cells = part[way], ""
            for k in RECALLS:
                x = (intervals or {}).get(way, {}).get(f"R{k}")
                interval = f"<small>{x['low']:.1f} – {x['high']:.1f}</small>" if x else ""
                cells += f'<td class="main">{m[f"R{k}"]:.1f}{interval}</td>'
            yield f'<tr><th scope="row">{label}{name}</th>{cells}<td>{m["MdR"]:g}</td><td>{m["MnR"]:.1f}</td></tr>'
    body, notes = "".join(rows(result, "", a["intervals"])), ""
    if "dsl" in result:
        body += "".join(rows(result["dsl"], "DSL "))
        notes += '<p class="soft">DSL is transductive, it uses all queries at once: not comparable with the others.</p>'
    if "first_captions" in result:
        body += "".join(rows(result["first_captions"], "First captions, honest: "))
    if "released_protocol" in result:
        body += "".join(rows(result["released_protocol"], "⚠ LEAKING "))
        first = " It ranks each video's first caption only." if "first_captions" in result else ""
        notes += ('<p class="warn"><b>LEAKING</b>: the released protocol scores a video as pooled by its own caption, '
                  f"whatever the query. To compare with published numbers only.{first}</p>")
    return table(["", *(f"R@{k}" for k in RECALLS), "MdR", "MnR"], body) + notes


def table(heads, body):
    heads = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs_table(a):
    """Means and spreads of `analyze`, relevant beside irrelevant."""
    body, kinds = "", (a["relevant"], a["irrelevant"])
    for label, what, d in PAIR_ROWS:
        cells = "".join(f"<td>{mean_std(k[what], d).replace('±', '<small>±')}</small></td>" for k in kinds)
        body += f'<tr><th scope="row">{label}</th>{cells}</tr>'
    cells = "".join(f"<td>{number(k['best_beats_point'])} %</td>" for k in kinds)
    body += f'<tr><th scope="row">best sample beats point text</th>{cells}</tr>'
    return table(("mean ± std", "relevant", "irrelevant"), body)


def figure(title, chart):
    return f'<div class="card"><h4>{esc(title)}</h4>{chart}</div>'


def plain(result):
    """The settings among a result: what is a text or a number."""
    words = {bool: lambda v: "yes" if v else "no", float: "{:g}".format, int: str, str: str}
    return {k: words[type(v)](v) for k, v in result.items() if type(v) in words}


def write_report(path, result, a, ann, sims, ranks, log=None, each=2, top=5, seed=24):
    """The report of an evaluation. result: of eval.main, a: of `analyze`, ranks: of eval.ranks, log: of train.py."""
    t2v, h = a["intervals"]["t2v"], a["histograms"]
    numbers = [(f"{x['value']:.1f}", f"t2v R@{k[1:]}") for k, x in t2v.items()]
    median = f"{result['t2v']['MdR']:g}"
    numbers += [(median, "median rank"), (len(ann.captions), "captions"), (len(ann.segments), "videos")]
    tiles = "".join(f"<div><b>{x}</b><span>{esc(label)}</span></div>" for x, label in numbers)
    charts = by = ""
    for title, what, label in (("Similarity, best sample", "similarity", "cos(t_s, v)"),
                               ("Radius of the text mass", "radius", "|R|₁")):
        charts += figure(title, histogram_chart(h[what], f"{title}: histogram, relevant and irrelevant pairs", label))
    samples = f"best of {a['trials']} on average" if result["expected"] else f"{a['trials']} samples"
    for k, label, _ in THIRDS:
        by += figure(f"t2v R@1 by {label}", thirds_chart(a[k], f"thirds of the texts by {label}", samples))
    curves = "".join(figure(*x) for x in (training_charts(log) if log else []))
    body = f"""<div class="tiles">{tiles}</div>
<section><h2>Metrics</h2><p class="soft">Recall in percent; below it the 95 % interval of a bootstrap over videos, each
with all its texts (seed {a['seed']}). An interval says nothing about other training seeds.</p>
{metrics_table(result, a)}</section>
<section><h2>Queries</h2><p class="soft">The best {top} videos for chosen captions. A green bar and ✓ mark the right
one; where it is further down, it comes last with its rank.</p>
{query_cards(sims, ann, ranks[0], each, top, seed)}</section>
<section><h2>Relevant and irrelevant pairs</h2>
<p class="soft">{esc(about_pairs(a))}; shares are of each kind's own pairs.</p>
{pairs_table(a)}<div class="cards" style="margin-top:16px">{charts}</div></section>
<section><h2>Which texts are found</h2><p class="soft">Frame diversity: mean pairwise cosine distance of a video's frame
embeddings. Diamonds: the point text alone, without samples
(over all texts: R@1 {a['point_R1']:.1f}).</p><div class="cards">{by}</div></section>"""
    if curves:
        body += f'<section><h2>Training</h2><div class="cards">{curves}</div></section>'
    lead = f"{result['data']}, split {result['split']}: {len(ann.captions)} captions, {len(ann.segments)} videos"
    write(path, page("T-MASS: text-video retrieval", lead, body, plain(result)))


def write_search_report(path, found, settings):
    """The report of a search. found: {query: [dict(rank, score, file, at, start, end)]}, settings: plain values."""
    cards, folder = "", os.path.dirname(os.path.abspath(path))
    for query, results in found.items():
        rows = ""
        for x in results:
            clip = data.Segment(x["file"], x["start"], x["end"])
            frames = moment(clip, x["at"], settings.get("frames", 12))
            link = quote(os.fsencode(os.path.relpath(x["file"], folder))) + f"#t={x['at']:g}"
            rows += hit(frames, x["rank"], x["score"], f"{x['file']} at {clock(x['at'])}", link=link)
        title = f'<h2 style="margin-top:0" dir="auto">“{esc(query)}”</h2>'
        cards += f'<section class="card">{title}<ol>{rows}</ol></section>'
    lead = (f"{len(found)} {'query' if len(found) == 1 else 'queries'}; scores order the videos of one query, and are "
            "no probabilities; the framed picture is the frame nearest to the text, and a name leads to it")
    body = f'<div class="cards" style="margin-top:20px">{cards}</div>'
    write(path, page("T-MASS: search results", lead, body, plain(settings)))
