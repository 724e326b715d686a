"""The parts of an HTML page: style, tables, pictures, and charts as inline SVG.

A page is one HTML file that runs no scripts and loads nothing from the network. Text from users,
such as captions and file names, must go through `esc`. Charts can be read without colours.
"""
import base64
import csv
import html
import itertools
import math
import os
import platform
import time
from typing import NamedTuple

import av
import torch
from PIL import Image, ImageOps
from torchvision.io import encode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from lib.common import DataError, clock, escaped, first_line, write_output
from lib.video import Segment, read_segment

# Colours are variables, so that the dark scheme only redefines these. Charts use their own classes.
STYLE = """
:root{color-scheme:light dark;--ink:#1a1c20;--soft:#5b616b;--page:#f6f6f4;--card:#fff;
--rule:#dcdcd8;--on:#1f5fbf;--off:#8a5a00;--good:#0b6b3a;--goodbg:#e4f4ea}
@media(prefers-color-scheme:dark){:root{--ink:#e9eaec;--soft:#a2a8b3;--page:#131518;--card:#1c1f24;
--rule:#353a42;--on:#7fb0ff;--off:#e0b050;--good:#7fdba4;--goodbg:#173325}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 clamp(14px,3vw,32px)}
header{padding-top:clamp(20px,4vw,44px)}
footer{padding-top:28px;padding-bottom:40px;font-size:.85rem}
h1{font-size:clamp(1.5rem,4vw,2.1rem);line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:2.6rem 0 .3rem}
h3{font-size:1.02rem;margin:1.4rem 0 .6rem}
h4{font-size:1rem;margin:0 0 .15rem;line-height:1.35}
p{margin:.5rem 0 .8rem}
h1,h2,h4,p,dd,.file,li{overflow-wrap:anywhere}
.soft,figcaption,footer{color:var(--soft)}
.soft{font-size:.92rem}
.warn{border:2px solid var(--off);border-radius:10px;padding:8px 12px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px;
margin-top:16px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:16px;
min-width:0;margin:0}
.card h2{margin-top:0}
.scroll{overflow-x:auto}
table{font-size:.95rem;border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child>*{border-bottom:0}
th:first-child{text-align:left;font-weight:500;min-width:7.5em}
thead th{color:var(--soft);font-weight:500;font-size:.88rem}
td small{display:block;color:var(--soft);font-size:.78rem;white-space:nowrap}
ol{list-style:none;margin:10px 0 0;padding:0;display:grid;gap:10px}
ol figure{margin:0}
.strip{display:flex;gap:3px;align-items:flex-start}
.strip img{flex:1;width:0;height:auto;max-height:120px;object-fit:contain;border-radius:5px;
background:var(--page)}
.strip .nearest{outline:4px solid #0072b2;outline-offset:-4px}
figcaption{font-size:.85rem;display:flex;flex-wrap:wrap;gap:0 .8em;margin-top:3px;
font-variant-numeric:tabular-nums}
figcaption b{color:var(--ink)}
.right{border-left:5px solid var(--good);background:var(--goodbg);padding:7px;border-radius:7px}
.right .mark{color:var(--good);font-weight:650}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:8px 20px;margin:0}
dl div{min-width:0}
dt{color:var(--soft);font-size:.82rem}
dd{margin:0}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:13px}
.card svg{max-width:600px;overflow:visible}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}
.on{fill:var(--on);fill-opacity:.45;stroke:var(--on);stroke-width:1.6}
.off{fill:url(#hatch);stroke:var(--off);stroke-width:1.6;stroke-dasharray:4 2}
.hatch{stroke:var(--off);stroke-width:1.4;stroke-opacity:.75}
.whisker{stroke:var(--ink);stroke-width:1.8;fill:none}
.diamond{fill:var(--card);stroke:var(--ink);stroke-width:1.8}
[class^=line]{fill:none;stroke:var(--on);stroke-width:2;stroke-linecap:round}
.line1{stroke-dasharray:7 4;stroke:var(--off)}.line2{stroke-dasharray:2 4;stroke:var(--ink)}
.line3{stroke-dasharray:9 4 2 4;stroke:var(--soft)}
.mass path{fill:none;stroke:var(--on);stroke-width:1.6;stroke-linecap:round}
.mass .grid{stroke:var(--rule)}.mass .axis{stroke:var(--soft)}
.mass .wrong,.mass .v_wrong{stroke:var(--off)}.mass .wrong{stroke-width:1.1}
.mass .right{stroke-width:4.4}.mass .v_right{fill:var(--on)}.mass .frame{stroke:var(--soft)}
.mass .support{fill:var(--card)}.mass .best,.mass .support,.mass .t{stroke:var(--ink)}
.mass .best,.mass .support{stroke-width:2.4}.mass .t{stroke-width:11}
@media(max-width:520px){.card{padding:12px 8px}table{font-size:.78rem}th,td{padding:5px 3px}
th:first-child{min-width:0}thead th{font-size:.74rem}td small{font-size:.66rem;white-space:normal}}
.key{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.85rem;color:var(--soft);margin:.3rem 0 0}
.key span{display:flex;align-items:center;gap:6px}.key svg{width:26px}
"""

# The pattern that fills .off. A page with charts must include it once.
HATCH = """
<svg width="0" height="0" style="position:absolute;width:0;height:0" aria-hidden="true"><defs>
<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse"
 patternTransform="rotate(45)">
<path class="hatch" d="M0 0V6"/></pattern></defs></svg>
"""


def esc(x):
    """Escape any text for HTML."""
    return html.escape(escaped(str(x), keep="\n\t"), quote=True)


def page(title, lead, body, settings):
    """A report as an HTML document. title, lead: text; body: HTML.

    settings: a dict; its numbers and strings are listed, together with the versions of libraries.
    """
    versions = dict(Python=platform.python_version(), torch=torch.__version__, av=av.__version__)
    items = ""
    for name, value in {**settings, **versions}.items():
        if isinstance(value, (str, int, float)):
            items += f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>"
    # Whatever a caption contains, under this policy a browser runs no script and loads nothing.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return document(title, f"""{HATCH}
<header><h1>{esc(title)}</h1><p class="soft">{esc(lead)}</p></header>
<main>{body}
<section><h2>Settings and versions</h2><div class="card"><dl>{items}</dl></div></section></main>
<footer>Written by T-MASS on {time.strftime('%Y-%m-%d %H:%M')}.</footer>""", policy)


def document(title, body, policy):
    """A complete HTML document. title: text; body: HTML; policy: Content-Security-Policy."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="{policy}">
<title>{esc(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>
"""


def write_page(path, text):
    """Write a page, whole or not at all. Bytes that aren't valid text become &#NUMBER;."""
    write_output("--report", path, text.encode(errors="xmlcharrefreplace"))


def html_table(heads, rows):
    """A table for a page, with the first word of each cell in large type. -> HTML"""
    body = ""
    for first, *others in rows:
        body += f'<tr><th scope="row">{esc(first)}</th>'
        for cell in others:
            large, _, small = cell.partition(" ")
            body += f"<td>{esc(large)} <small>{esc(small)}</small></td>"
        body += "</tr>"
    head = ""
    for name in heads:
        head += f'<th scope="col">{esc(name)}</th>'
    return f"""<div class="card scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>"""


# ---- pictures ----


def read_picture(path):
    """Read a picture, rotated as its EXIF data says. -> uint8 (1,3,H,W). Raises DataError."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits of grey, which convert("RGB") would clip
                picture = picture.convert("I").point(lambda x: x / 256)
            picture = picture.convert("RGB")
    except Exception as error:  # each format's decoder raises its own errors
        raise DataError(f"picture {path} can't be read: {first_line(error)}") from None
    return pil_to_tensor(picture)[None]


def shrunk(frame, height=96):
    """Resize a frame. uint8 (3,H,W) -> (3,height,w). Keeps the aspect ratio within limits."""
    # A very wide frame is squeezed, or it would leave no room for the others.
    width = round(height * frame.shape[2] / frame.shape[1])
    width = max(16, min(4 * height, width))
    return resize(frame, [height, width], antialias=True)


def jpeg(frame):
    """Encode a frame. uint8 (3,H,W) -> bytes of a JPEG."""
    return encode_jpeg(frame, quality=75).numpy().tobytes()


def embedded(frame):
    """Embed a frame in a page. uint8 (3,H,W) -> attributes of an <img>."""
    frame = shrunk(frame)
    _, height, width = frame.shape
    source = base64.b64encode(jpeg(frame)).decode()
    return f'width="{width}" height="{height}" src="data:image/jpeg;base64,{source}"'


def nearest_of(times, at):
    """The index of the time nearest to `at`."""
    distances = [abs(time - at) for time in times]
    return distances.index(min(distances))


def images(times, at, attributes, name=""):
    """About six of T frames in a row, with the one nearest to the time `at` marked. -> HTML

    attributes: function of a frame's index that gives the attributes of its <img>. name: text that
    comes before the frame's time in its alt text.
    """
    # Every second of twelve frames shows what happens, and is large enough to see.
    step = max(1, len(times) // 6)
    nearest = None if at is None else nearest_of(times, at)
    found = ""
    for k in range((nearest or 0) % step, len(times), step):
        css = "nearest" if k == nearest else ""
        found += f'<img class="{css}" {attributes(k)} alt="{esc(name)}at {clock(times[k])}">'
    return f'<div class="strip">{found}</div>'


def found_segment(path, start, end):
    """The Segment of a piece, whose bounds are rounded in an index, and in what is printed."""
    # A bound that was rounded up would come after the frame that it is of.
    return Segment(path, start - 0.004, end - 0.004)


def strip(segment, frames=6, at=None):
    """`images` of a segment, from which `frames` frames are sampled. -> HTML."""
    try:
        piece = read_segment(segment, frames)
    except DataError as e:
        return f"<p>no picture: {esc(e)}</p>"
    name = os.path.basename(segment.path)
    return images(piece.times, at, lambda k: embedded(piece.frames[k]), f"{name} ")


def hit(images, rank, score, name, css=""):
    """One result as an item of a list. images, name: HTML; css: class of the item. -> HTML"""
    return f"""<li class="{css}"><figure>{images}<figcaption><b>{rank:g}</b>
<span>score {score:.4f}</span><span class="file">{name}</span></figcaption></figure></li>"""


# ---- charts ----

WIDTH = 480
HEIGHT = 270
# The edges of the plotting area, in pixels from the left or the top:
LEFT = 46
RIGHT = 466
TOP = 12
BOTTOM = 226
MOST_POINTS = 400  # a longer curve is thinned out to between this and twice this


def ticks(low, high):
    """Four to ten evenly spaced round numbers from low to high."""
    step = 10 ** math.floor(math.log10(high - low))
    while high - low < 4 * step:
        step /= 2
    first = math.ceil(low / step - 1e-9)  # the margin keeps a tick at an end despite rounding
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


class Axes(NamedTuple):
    """The axes of a plot, which map values to pixels."""
    x: tuple         # (low, high)
    y: tuple         # (low, high)
    label: str       # of x
    unit: str = ""   # of y
    names: dict = {}  # {x: text}, labels instead of numbers

    def at_x(self, value):
        """A value of x -> pixels from the left, as text for SVG."""
        low, high = self.x
        return f"{LEFT + (value - low) / (high - low) * (RIGHT - LEFT):.1f}"

    def at_y(self, value):
        """A value of y -> pixels from the top, as text for SVG."""
        low, high = self.y
        return f"{BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP):.1f}"

    def svg(self, about, marks):
        """Draw the plot. marks: SVG; about: description for screen readers. -> SVG"""
        # Drawn from back to front: the grid, the marks, the axis.
        grid = ""
        for v in ticks(*self.y):
            grid += f"""<path class="grid" d="M{LEFT} {self.at_y(v)}H{RIGHT}"/>
<text x="{LEFT - 6}" y="{self.at_y(v)}" dy="4" text-anchor="end">{v:g}{self.unit}</text>"""
        names = self.names or {v: f"{v:g}" for v in ticks(*self.x)}
        below = ""
        for v, name in names.items():
            below += f"""<text x="{self.at_x(v)}" y="{BOTTOM + 17}"
text-anchor="middle">{esc(name)}</text>"""
        return f"""<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(about)}">
{grid}{below}{marks}<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>
<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}"
text-anchor="middle">{esc(self.label)}</text></svg>"""


# The shapes of marks in a legend, by CSS class. Other classes are shown as a line.
MARKS = {"on": "M1 13V3H25V13Z", "off": "M1 13V3H25V13Z", "diamond": "M13 1L19 7L13 13L7 7Z"}


def draw_legend(entries, marks=MARKS):
    """A legend. entries: {CSS class of a mark: text}; marks: {CSS class: SVG path}. -> HTML"""
    spans = ""
    for css, text in entries.items():
        path = marks.get(css, "M1 7H25")
        spans += f"""<span><svg viewBox="0 0 26 14" aria-hidden="true">
<path class="{css}" d="{path}"/></svg>{esc(text)}</span>"""
    return f'<p class="key">{spans}</p>'


def histogram_chart(h, about, label):
    """Histograms of relevant and irrelevant pairs, each in percent of its own kind. -> HTML

    h: the result of lib.report.histogram.
    """
    edges = h["edges"]
    shares = {}
    # Relevant pairs are drawn last, half transparent, so that both can be seen.
    for css, kind in (("off", "irrelevant"), ("on", "relevant")):
        total = max(1, sum(h[kind]))
        shares[css] = [100 * count / total for count in h[kind]]
    top = max(1, *shares["on"], *shares["off"])
    axes = Axes((edges[0], edges[-1]), (0, 1.05 * top), label, "%")
    marks = ""
    for css, heights in shares.items():
        path = f"M{axes.at_x(edges[0])} {BOTTOM}"
        for height, edge in zip(heights, edges[1:]):
            path += f"V{axes.at_y(height)}H{axes.at_x(edge)}"
        marks += f'<path class="{css}" d="{path}V{BOTTOM}Z"/>'
    return axes.svg(about, marks) + draw_legend({"on": "relevant", "off": "irrelevant"})


def thirds_chart(rows, label, samples):
    """R@1 of each third: a bar with its interval, and a diamond for the point text. -> HTML

    rows: the result of lib.report.thirds. label: of the x axis. samples: the name of the bars.
    """
    names = {n: f"{row['third']} ({row['texts']} texts)" for n, row in enumerate(rows)}
    top = max(max(10, row["high"], row["R1_point"]) for row in rows)
    axes = Axes((-0.5, len(rows) - 0.5), (0, min(104, 1.08 * top)), label, "%", names)
    marks = ""
    for n, row in enumerate(rows):
        x = axes.at_x(n)
        y = {name: axes.at_y(row[name]) for name in ("R1", "low", "high", "R1_point")}
        marks += f"""<path class="on" d="M{x} {BOTTOM}m-34 0V{y["R1"]}h68V{BOTTOM}Z"/>
<path class="whisker" d="M{x} {y["low"]}V{y["high"]}
M{x} {y["low"]}m-7 0h14M{x} {y["high"]}m-7 0h14"/>
<path class="diamond" d="M{x} {y["R1_point"]}m20-7l7 7l-7 7l-7-7Z"/>"""
    about = f"R@1, {label}: " + ", ".join(f"{row['third']} {row['R1']:.1f}" for row in rows)
    # The bar shows the scores that were evaluated. Without samples, the diamond is at its top.
    legend = {"on": f"{samples}, 95 % interval", "diamond": "point text"}
    return axes.svg(about, marks) + draw_legend(legend)


def _line_chart(curves, about, unit=""):
    """Curves over training steps, in different dashes. {name: [(step, value)]} -> HTML"""
    steps, values = zip(*itertools.chain(*curves.values()))
    top = max(values) or 1
    axes = Axes((0, max(steps) + 1), (0, 1.05 * top), "step", unit)
    marks = ""
    legend = {}
    for n, (name, curve) in enumerate(curves.items()):
        path = "L".join(f"{axes.at_x(step)} {axes.at_y(value)}" for step, value in curve)
        # A cross at the last point, so that a single one can be seen.
        marks += f'<path class="line{n}" d="M{path}m-3-3l6 6m0-6l-6 6"/>'
        legend[f"line{n}"] = name
    return axes.svg(about, marks) + draw_legend(legend)


def _read_curve(rows, name):
    """The finite values of a log's column, thinned out if there are many. -> [(step, value)]."""
    curve = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
    curve = [point for point in curve if math.isfinite(point[1])]
    return curve[::max(1, len(curve) // MOST_POINTS)]


def training_charts(path):
    """Charts of a log of train.py. -> {title: HTML}, empty if path is not such a log."""
    charts = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for title, unit, *names in (
            ("Training losses", "", "loss", "stochastic", "support", "ce"),
            ("Validation t2v R@1", "%", "val_R1"),
        ):
            curves = {name: curve for name in names if (curve := _read_curve(rows, name))}
            if curves:
                charts[title] = _line_chart(curves, f"{title} by training step", unit)
    except (OSError, ValueError, KeyError, TypeError):  # no log, or a log in another format
        return {}
    return charts
