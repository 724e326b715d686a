"""The charts of a report: inline SVG without a script, whose marks differ without colour too."""
import csv
import html
import math
from typing import NamedTuple

from lib.common import escaped

WIDTH = 480
HEIGHT = 270
LEFT = 46  # of the plot in the picture; so are the next three
RIGHT = 466
TOP = 12
BOTTOM = 226
MOST_POINTS = 400  # of a curve

STYLE = """
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:13px}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}
.on{fill:var(--on);fill-opacity:.45;stroke:var(--on);stroke-width:1.6}
.off{fill:url(#hatch);stroke:var(--off);stroke-width:1.6;stroke-dasharray:4 2}
.hatch{stroke:var(--off);stroke-width:1.4;stroke-opacity:.75}
.whisker{stroke:var(--ink);stroke-width:1.8;fill:none}
.diamond{fill:var(--card);stroke:var(--ink);stroke-width:1.8}
[class^=line]{fill:none;stroke:var(--on);stroke-width:2;stroke-linecap:round}
.line1{stroke-dasharray:7 4;stroke:var(--off)}.line2{stroke-dasharray:2 4;stroke:var(--ink)}
.line3{stroke-dasharray:9 4 2 4;stroke:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.85rem;color:var(--soft);margin:.3rem 0 0}
.key span{display:flex;align-items:center;gap:6px}.key svg{width:26px}
"""

# What .off is filled with: a page needs it once.
HATCH = """
<svg width="0" height="0" style="position:absolute;width:0;height:0" aria-hidden="true"><defs>
<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse"
 patternTransform="rotate(45)">
<path class="hatch" d="M0 0V6"/></pattern></defs></svg>
"""


def esc(x):
    """Text as HTML: captions and file names may hold anything."""
    return html.escape(escaped(str(x), keep="\n\t"), quote=True)


def ticks(low, high):
    """Four to nine round numbers between low and high."""
    step = 10 ** math.floor(math.log10(high - low))
    while high - low < 4 * step:
        step /= 2
    first = math.ceil(low / step - 1e-9)  # rounding must not cost the tick at an end
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


class Axes(NamedTuple):
    """A plot's axes, which place its marks."""
    x: tuple         # (low, high)
    y: tuple
    label: str       # of x
    unit: str = ""   # of y
    names: dict = {}  # {x: text}, in place of numbers

    def at_x(self, value):
        """A value of x -> pixels from the left, as SVG's text."""
        low, high = self.x
        return f"{LEFT + (value - low) / (high - low) * (RIGHT - LEFT):.1f}"

    def at_y(self, value):
        """A value of y -> pixels from the top, as SVG's text."""
        low, high = self.y
        return f"{BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP):.1f}"

    def svg(self, about, marks):
        """The picture. about: what it shows, for those who can't see it; marks: SVG."""
        grid = ""
        for v in ticks(*self.y):
            grid += (f'<path class="grid" d="M{LEFT} {self.at_y(v)}H{RIGHT}"/>'
                     f'<text x="{LEFT - 6}" y="{self.at_y(v)}" dy="4" text-anchor="end">'
                     f"{v:g}{self.unit}</text>")
        names = self.names or {v: f"{v:g}" for v in ticks(*self.x)}
        below = ""
        for v, name in names.items():
            below += (f'<text x="{self.at_x(v)}" y="{BOTTOM + 17}" text-anchor="middle">'
                      f"{esc(name)}</text>")
        return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(about)}">'
                f'{grid}{below}{marks}<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'
                f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
                f"{esc(self.label)}</text></svg>")


# The marks of a legend; all others are lines.
MARKS = {"on": "M1 13V3H25V13Z", "off": "M1 13V3H25V13Z", "diamond": "M13 1L19 7L13 13L7 7Z"}


def key(entries):
    """A legend. entries: {class of the mark: text}."""
    spans = ""
    for css, text in entries.items():
        path = MARKS.get(css, "M1 7H25")
        spans += ('<span><svg viewBox="0 0 26 14" aria-hidden="true">'
                  f'<path class="{css}" d="{path}"/></svg>{esc(text)}</span>')
    return f'<p class="key">{spans}</p>'


def histogram_chart(h, about, label):
    """Relevant and irrelevant pairs over common bins, each as shares of its own kind."""
    edges = h["edges"]
    shares = {}
    for kind in ("irrelevant", "relevant"):
        total = max(1, sum(h[kind]))
        shares[kind] = [100 * count / total for count in h[kind]]
    top = max(1, *shares["relevant"], *shares["irrelevant"])
    axes = Axes((edges[0], edges[-1]), (0, 1.05 * top), label, "%")
    marks = ""
    for css, heights in zip(("off", "on"), shares.values()):
        path = f"M{axes.at_x(edges[0])} {axes.at_y(0)}"
        for height, edge in zip(heights, edges[1:]):
            path += f"V{axes.at_y(height)}H{axes.at_x(edge)}"
        marks += f'<path class="{css}" d="{path}V{axes.at_y(0)}Z"/>'
    return axes.svg(about, marks) + key({"on": "relevant", "off": "irrelevant"})


def thirds_chart(rows, label, samples):
    """R@1 by third: a bar with its interval for the samples, a diamond for the point text."""
    names = {n: f"{row['third']} ({row['texts']} texts)" for n, row in enumerate(rows)}
    top = max(max(10, row["high"], row["R1_point"]) for row in rows)
    axes = Axes((-0.5, len(rows) - 0.5), (0, min(104, 1.08 * top)), label, "%", names)
    marks = ""
    for n, row in enumerate(rows):
        x = axes.at_x(n)
        y = {name: axes.at_y(row[name]) for name in ("R1", "low", "high", "R1_point")}
        marks += (f'<path class="on" d="M{x} {BOTTOM}m-34 0V{y["R1"]}h68V{BOTTOM}Z"/>'
                  f'<path class="whisker" d="M{x} {y["low"]}V{y["high"]}M{x} {y["low"]}m-7 0h14'
                  f'M{x} {y["high"]}m-7 0h14"/>'
                  f'<path class="diamond" d="M{x} {y["R1_point"]}m20-7l7 7l-7 7l-7-7Z"/>')
    about = f"R@1, {label}: " + ", ".join(f"{row['third']} {row['R1']:.1f}" for row in rows)
    legend = {"on": f"{samples}, 95 % interval", "diamond": "point text"}
    return axes.svg(about, marks) + key(legend)


def line_chart(curves, about, unit=""):
    """Curves by training step, which differ in their dashes. curves: {name: [(step, value)]}."""
    points = [point for curve in curves.values() for point in curve]
    steps, values = zip(*points)
    top = max(values) or 1
    axes = Axes((min(steps), max(steps) + 1), (0, 1.05 * top), "step", unit)
    marks = ""
    for n, curve in enumerate(curves.values()):
        curve = [curve[0], *curve]  # one point alone becomes a line of no length: a dot
        path = "L".join(f"{axes.at_x(step)} {axes.at_y(value)}" for step, value in curve)
        marks += f'<path class="line{n}" d="M{path}"/>'
    legend = {f"line{n}": name for n, name in enumerate(curves)}
    return axes.svg(about, marks) + key(legend)


def read_curve(rows, name):
    """The finite values of a log's column. -> [(step, value)]."""
    curve = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
    curve = [point for point in curve if math.isfinite(point[1])]
    return curve[::max(1, len(curve) // MOST_POINTS)]


def training_charts(path):
    """The curves of a log of train.py. -> {title: chart}, empty where there are none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        losses = {name: read_curve(rows, name) for name in ("loss", "stochastic", "support", "ce")}
        recall = read_curve(rows, "val_R1")
    except (OSError, ValueError, KeyError, TypeError):  # no log, or the log of something else
        return {}
    losses = {name: curve for name, curve in losses.items() if curve}
    charts = {}
    if losses:
        charts["Training losses"] = line_chart(losses, "losses by training step")
    if recall:
        about = "validation R@1 by training step"
        charts["Validation t2v R@1"] = line_chart({"validation R@1": recall}, about, "%")
    return charts
