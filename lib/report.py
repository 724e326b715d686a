"""What lies behind the metrics: an analysis, and an HTML page of tables and cards.

`analyze` computes confidence intervals of recall, compares relevant with irrelevant pairs, and
splits recall by video complexity. `analysis_text` formats this for the terminal, and `write_report`
writes the page.

A page is one HTML file that runs no scripts and loads nothing from the network. Text from users,
such as captions and file names, must go through `esc`. The search page (lib/serve.py) has the same
style and pictures.
"""
import functools
import html
import os
import textwrap
from base64 import b64encode
from urllib.parse import quote

import torch
from torchvision.io import encode_jpeg
from torchvision.transforms.v2.functional import resize

from lib import exact
from lib.common import clock, escaped, write_output
from lib.video import read_segment, start_time
from tmass import cosine

RECALLS = (1, 5, 10)
MOST_PAIRS = 20_000  # irrelevant pairs to analyse; if there are more, they are sampled
RESAMPLES = 2000     # per bootstrap
CARDS = 3            # queries of each kind, best and worst
TOP = 5              # results on a card

# ---- analysis ----


def frame_diversity(f):
    """Mean cosine distance between the frames of each video. f (V,T,D) -> (V,)."""
    T = f.shape[1]
    f = torch.nn.functional.normalize(f, dim=-1)
    # The diagonal adds nothing: a frame's distance to itself is 0.
    return (1 - f @ f.mT).sum((1, 2)) / max(1, T * (T - 1))


def recall_intervals(ranks, video):
    """Recall in percent with 95 % bootstrap intervals. -> {R1, R5, R10: dict(value, low, high)}.

    ranks (n,): of each text; video (n,): number of its video. The bootstrap resamples videos, each
    with all its texts, because the ranks of texts of the same video are correlated.
    """
    hits = torch.stack([ranks <= k for k in RECALLS], 1).double()
    videos, group = video.unique(return_inverse=True)
    n = len(videos)
    rates = []
    for _ in range(RESAMPLES):
        # How often the video of each text is drawn.
        weight = torch.randint(n, (n,)).bincount(minlength=n)[group].double()
        rates.append(weight @ hits / weight.sum())
    ends = torch.stack(rates).quantile(hits.new_tensor([0.025, 0.975]), dim=0)
    table = 100 * torch.stack([hits.mean(0), *ends], 1)
    rows = [dict(zip(("value", "low", "high"), row)) for row in table.tolist()]
    return {f"R{k}": row for k, row in zip(RECALLS, rows)}


def thirds(values, ranks, video, point_hits):
    """R@1 of the texts with low, middle and high values. All (N,) -> list of a dict for each third.

    ranks: with samples; point_hits: whether the point text ranks its video first. Texts with equal
    values stay together, so thirds may differ in size, and empty ones are left out.
    """
    bounds = values.quantile(values.new_tensor([1 / 3, 2 / 3]))
    third = torch.bucketize(values, bounds)
    rows = []
    for k, name in enumerate(("low", "middle", "high")):
        chosen = third == k
        inside = values[chosen].tolist()
        if inside:  # empty if too many texts have the same value
            row = recall_intervals(ranks[chosen], video[chosen])["R1"]
            row["R1"] = row.pop("value")
            row["R1_point"] = percent(point_hits[chosen])
            row.update(third=name, least=min(inside), most=max(inside), texts=len(inside))
            rows.append(row)
    return rows


def percent(hits):
    return 100 * hits.double().mean().item()


def _irrelevant_pairs(owner, V):
    """Irrelevant pairs (text i, video j), at most MOST_PAIRS. owner (N,) -> i (P,), j (P,)."""
    # Pairs are numbered by text, then by video, cyclically from the one after the text's own.
    number = torch.randperm(len(owner) * (V - 1))[:MOST_PAIRS]
    i = number // (V - 1)
    j = (owner[i] + 1 + number % (V - 1)) % V
    return i, j


def _radius_l1(model, t, f, i, j):
    """|R_ij|₁ of the pairs (i, j). t (N,D), f (V,T,D), i (P,), j (P,) -> (P,), on the CPU."""
    sizes = []
    for texts, videos in zip(i.split(2048), j.split(2048)):
        R = model.radius(cosine(t[texts, None], f[videos]))  # (P,D), or (P,1) if all D are equal
        sizes.append(t.shape[1] * R.abs().mean(-1).cpu())
    return torch.cat(sizes)


def _margins(sims, owner):
    """Score of the right video minus the best wrong one's. sims (N,V), owner (N,) -> (N,)."""
    own = sims.gather(1, owner[:, None])
    others = sims.scatter(1, owner[:, None], -torch.inf)
    return own.squeeze(1) - others.amax(1)


def spread(x):
    """The mean and the standard deviation of x (P,), NaN if P = 0. -> dict(mean, std)"""
    mean = x.mean()
    std = (x - mean).square().mean().sqrt()
    return dict(mean=mean.item(), std=std.item())


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def analyze(model, scored, t2v, v2t):
    """Analyse an eval.Scored, with its ranks t2v (N,) and v2t (V,). -> dict of plain values

    - intervals: recall with its confidence intervals.
    - relevant, irrelevant: mean and standard deviation, over such pairs, of the point text's
      cos(t, v), the score in sims (cos(t_s, v) of the best sample, or its mean) and |R|₁. Relevant
      pairs are a text and its own video; irrelevant ones are all others, or a seeded sample.
    - point_R1, complexity: R@1 without samples, and R@1 by third of the videos' frame diversity.
    """
    t, f, sims, ann, _, scoring = scored
    sims = sims.cpu()
    torch.manual_seed(scoring["seed"])
    owner = torch.tensor(ann.owner)
    point = sims  # cos(t, v)
    if scoring["trials"]:
        point = exact.score(model, t, f, trials=0).cpu()
    out = dict(scoring)
    described = owner.unique()  # videos without captions have no v2t rank
    out["intervals"] = dict(t2v=recall_intervals(t2v, owner),
                            v2t=recall_intervals(v2t[described], described))

    pairs = dict(relevant=(torch.arange(len(t)), owner),
                 irrelevant=_irrelevant_pairs(owner, len(f)))
    for kind, (i, j) in pairs.items():
        out[kind] = dict(
            pairs=len(i),
            point=spread(point[i, j]),
            best=spread(sims[i, j]),
            radius=spread(_radius_l1(model, t, f, i, j)),
            best_beats_point=percent(sims[i, j] > point[i, j]),
        )

    point_hits = _margins(point, owner) > 0
    out["point_R1"] = percent(point_hits)
    diversity = frame_diversity(f).cpu()[owner]
    out["complexity"] = thirds(diversity, t2v, owner, point_hits)
    return out


# ---- tables ----
#
# A table is a pair (heads, rows), in which all cells are str. `_text_table` formats it for the
# terminal, and `html_table` for a page.

WAYS = {"t2v": "t2v", "v2t": "v2t, max over captions"}
COLUMNS = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")  # the order of eval.metrics
# Optional parts of a result: the start of the label of their rows, and a note for the reader.
PARTS = {
    "honest": ("", ""),
    "dsl": ("DSL ", "DSL is transductive: it uses all queries at once. It is not comparable with "
            "the other rows."),
    "first_captions": ("first captions, honest: ", "The released protocol uses the first "
                       "caption of each video, because it is defined for one caption per video; "
                       "the first rows use all captions."),
    "released_protocol": ("LEAKING ", "LEAKING: the released protocol scores a video as pooled by "
                          "its own ground-truth caption, whatever the query. For comparison with "
                          "published numbers only. (There, each pair has its own noise.)"),
}
PAIR_ROWS = {"point": ("cos(t, v), point text", 3), "best": ("cos(t_s, v), best sample", 3),
             "radius": ("|R|₁, radius of the text mass", 1)}
COMPLEXITY = "video complexity (frame diversity)"


def metrics_table(result):
    """A table of all metrics in a result of eval.summarise. -> heads, rows"""
    parts = dict(result, honest=result)
    rows = []
    for key, (label, _) in PARTS.items():
        if key not in parts:
            continue
        for way, name in WAYS.items():
            cells = [f"{x:g}" if k == "MdR" else f"{x:.1f}" for k, x in parts[key][way].items()]
            rows.append([label + name, *cells])
    return ["", *COLUMNS], rows


def _metrics_notes(result):
    """The notes that belong below a result's metrics. -> list of str"""
    return [note for key, (_, note) in PARTS.items() if key in result]


def _intervals_table(a):
    rows = []
    for way, found in a["intervals"].items():
        cells = [f"{x['value']:.1f} [{x['low']:.1f}, {x['high']:.1f}]" for x in found.values()]
        rows.append([way, *cells])
    return ["recall, 95 % interval", *COLUMNS[:3]], rows


def pairs_table(a):
    """A table that compares relevant with irrelevant pairs. -> heads, rows"""
    kinds = ("relevant", "irrelevant")
    rows = []
    for key, (label, digits) in PAIR_ROWS.items():
        cells = []
        for kind in kinds:
            mean, std = a[kind][key].values()
            cells.append(f"{mean:.{digits}f} ± {std:.{digits}f}")
        rows.append([label, *cells])
    beats = [f"{a[kind]['best_beats_point']:.1f}" for kind in kinds]
    rows.append(["best sample beats point text, %", *beats])
    return ["mean ± std", *kinds], rows


def _thirds_table(a):
    """A table of R@1 by third of the texts. -> heads, rows"""
    rows = []
    for x in a["complexity"]:
        rows.append([
            f"{x['third']}: {x['least']:.3f} to {x['most']:.3f}",
            str(x["texts"]),
            f"{x['R1']:.1f} [{x['low']:.1f}, {x['high']:.1f}]",
            f"{x['R1_point']:.1f}",
        ])
    return [f"t2v R@1 by {COMPLEXITY}", "texts", "95 % interval", "point text"], rows


def _text_table(heads, rows):
    """Format a table for the terminal, the first column left-aligned, the others right-aligned."""
    lines = [""] * (1 + len(rows))
    align = str.ljust
    for column in zip(heads, *rows):
        width = max(map(len, column)) + 2
        lines = [line + align(cell, width) for line, cell in zip(lines, column)]
        align = str.rjust
    return "\n".join(lines)


def metrics_text(result):
    """Format the result of eval.summarise for the terminal."""
    notes = "".join("\n" + textwrap.fill(note, 98) for note in _metrics_notes(result))
    return f"""{result["texts"]} texts, {result["videos"]} videos
{_text_table(*metrics_table(result))}{notes}"""


def _about_pairs(a):
    """Which pairs were analysed, and how many, as a phrase."""
    others = "all irrelevant"
    if a["irrelevant"]["pairs"] == MOST_PAIRS:
        others = "a seeded sample of the irrelevant"
    return (f"{a['relevant']['pairs']} relevant pairs (a caption and its own video), "
            f"{a['irrelevant']['pairs']} others ({others} ones)")


def analysis_text(a):
    """Format the result of `analyze` for the terminal."""
    return f"""{_text_table(*_intervals_table(a))}

{_about_pairs(a)}
{_text_table(*pairs_table(a))}

{_text_table(*_thirds_table(a))}"""


# ---- parts of a page ----

# Colours are variables, so that the dark scheme only redefines these.
STYLE = """
:root{color-scheme:light dark;--ink:#1a1c20;--soft:#5b616b;--page:#f6f6f4;--card:#fff;
--rule:#dcdcd8;--on:#1f5fbf;--off:#8a5a00;--good:#0b6b3a;--goodbg:#e4f4ea}
@media(prefers-color-scheme:dark){:root{--ink:#e9eaec;--soft:#a2a8b3;--page:#131518;--card:#1c1f24;
--rule:#353a42;--on:#7fb0ff;--off:#e0b050;--good:#7fdba4;--goodbg:#173325}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header{max-width:1240px;margin:0 auto;padding:0 clamp(14px,2vw,32px)}
header{padding-top:clamp(12px,2vw,28px)}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:2.2rem 0 .3rem}
h3{font-size:1rem;margin:0 0 .15rem;line-height:1.35}
p{margin:.5rem 0 .8rem}
h1,h3,p,li,td:nth-child(2):last-child{overflow-wrap:anywhere}
a{color:var(--on)}
.soft{color:var(--soft);font-size:.92rem}
.warn{border:2px solid var(--off);border-radius:10px;padding:8px 12px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:16px;
margin-top:16px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:16px;
min-width:0;margin:0}
.scroll{overflow-x:auto}
table{font-size:.95rem;border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child>*{border-bottom:0}
th:first-child{text-align:left;font-weight:500;min-width:7.5em}
td:nth-child(n+3) span,td:not(:last-child) span{white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:.88rem}
ol{list-style:none;margin:10px 0 0;padding:0;display:grid;gap:10px}
.strip{display:flex;gap:3px}
.strip img{flex:1;width:0;min-width:0;aspect-ratio:4/3;object-fit:contain;border-radius:4px;
background:var(--page)}
.strip .nearest{outline:3px solid var(--on);outline-offset:-1px}
li{font-size:.92rem}
.mark{color:var(--good);white-space:nowrap}
li:has(.mark){border-left:5px solid var(--good);background:var(--goodbg);padding:7px;
border-radius:7px}
@media(max-width:520px){.card{padding:12px 8px}table{font-size:.78rem}th,td{padding:5px 3px}
th:first-child{min-width:0}thead th{font-size:.74rem}}
"""


def esc(x):
    """Escape any text for HTML."""
    return html.escape(escaped(str(x), keep="\n\t"))


def document(title, body, policy):
    """A complete HTML document. title: text; body: HTML; policy: Content-Security-Policy."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{esc(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>
"""


def html_table(heads, rows):
    """A table for a page, with the first word of each cell in large type. -> HTML"""
    head = ""
    for name in heads:
        head += f'<th scope="col">{esc(name)}</th>'
    body = ""
    for first, *others in rows:
        body += f'<tr><th scope="row">{esc(first)}</th>'
        for cell in others:
            large, _, small = esc(cell).partition(" ")
            body += f"<td>{large} <span>{small}</span></td>"
        body += "</tr>"
    return f"""<div class="card scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>"""


@functools.lru_cache(maxsize=200)
def read_pictures(segment, frames, size):
    """The T sampled frames of a segment, for a page. -> their times, their JPEGs as bytes

    size: of the shorter side, in pixels. Raises DataError.
    """
    piece = read_segment(segment, frames)
    pictures = resize(piece.frames, [size], max_size=4 * size, antialias=True)
    jpegs = encode_jpeg(list(pictures), quality=75)
    return piece.times, [bytes(jpeg.numpy()) for jpeg in jpegs]


def strip(times, nearest, sources):
    """About six of T frames in a row, with the nearest one, by its number, marked. -> HTML

    sources: the address of each frame, as HTML.
    """
    # Every second of twelve frames shows what happens, and is large enough to see.
    step = max(1, len(times) // 6)
    images = ""
    for k in range(nearest % step, len(times), step):
        css = "nearest" if k == nearest else ""
        images += f"""<img class="{css}" src="{sources[k]}" loading="lazy"
 alt="at {clock(times[k])}">"""
    return f'<div class="strip">{images}</div>'


def moment(start, at):
    """The end of a link to a video, with which a player begins `at` seconds after the first frame.

    start: the file's `start_time`, from which players count.
    """
    # Times are rounded, and just before a frame, a player would show the previous one.
    return f"#t={start + at + 0.004:.3f}"


# ---- the page of an evaluation ----


def choose_queries(sims, owner):
    """Choose the best and the worst texts, of different videos. -> {title: list of text numbers}.

    sims (N,V), owner (N). A text is the better, the further its own video is ahead of all others.
    """
    margin = _margins(sims, torch.tensor(owner))
    order = margin.argsort(descending=True).tolist()
    chosen = {}
    for title, texts in (("Best", order), ("Worst", order[::-1])):
        first = {}
        for i in texts:
            first.setdefault(owner[i], i)
        chosen[title] = list(first.values())[:CARDS]
    return chosen


def query_card(i, scored, rank, folder):
    """The best videos for text i, then the right one if it is not among them. -> HTML.

    rank: of the right video. folder: where the page is.
    """
    t, f, sims, ann, *_ = scored
    right = ann.owner[i]
    found = sims[i].topk(min(TOP, len(f))).indices.tolist()
    if right not in found:
        found.append(right)
    items = ""
    for v in found:
        segment = ann.segments[v]
        times, jpegs = read_pictures(segment, f.shape[1], 96)
        sources = [f"data:image/jpeg;base64,{b64encode(jpeg).decode()}" for jpeg in jpegs]
        nearest = cosine(t[i], f[v]).argmax().item()
        link = os.path.relpath(segment.path, folder)
        link = quote(os.fsencode(link))  # a file name need not be valid Unicode
        mark = '<b class="mark">✓ the right video</b>' if v == right else ""
        items += f"""<li>{strip(times, nearest, sources)}{sims[i, v].item():.4f}
<a href="{link}{moment(start_time(segment.path), times[nearest])}">
{esc(os.path.basename(segment.path))}</a> at {clock(times[nearest])} {mark}</li>"""
    return f"""<article class="card"><h3 dir="auto">“{esc(ann.captions[i])}”</h3>
<p class="soft">right video: rank {rank:g} of {len(f)}</p><ol>{items}</ol></article>"""


def write_report(path, result, a, scored, t2v):
    """Write the page of an evaluation.

    result: of eval.summarise; a: of `analyze`; t2v (N,): ranks.
    """
    lead = (f"{result['data']}, split {result['split']}: {result['texts']} captions, "
            f"{result['videos']} videos")
    notes = ""
    for note in _metrics_notes(result):
        notes += f'<p class="warn">{esc(note)}</p>'
    queries = ""
    folder = os.path.dirname(path) or "."
    for title, texts in choose_queries(scored.sims.cpu(), scored.ann.owner).items():
        cards = ""
        for i in texts:
            cards += query_card(i, scored, t2v[i].item(), folder)
        queries += f'<h2>{title}</h2><div class="cards">{cards}</div>'
    settings = [
        [name, str(value)] for name, value in result.items() if isinstance(value, (str, int, float))
    ]
    body = f"""<header><h1>T-MASS: text-video retrieval</h1><p class="soft">{esc(lead)}</p></header>
<main><h2>Metrics</h2>{html_table(*metrics_table(result))}{notes}
<p class="soft">Recall in percent. The intervals come from a bootstrap over videos, each with all
its texts (seed {a["seed"]}). They don't cover the variation between training seeds.</p>
{html_table(*_intervals_table(a))}
<h2>Relevant and irrelevant pairs</h2><p class="soft">{esc(_about_pairs(a))}.</p>
{html_table(*pairs_table(a))}
<h2>Which texts are found</h2><p class="soft">Frame diversity: mean pairwise cosine distance of a
video's frame embeddings. Point text: without samples (over all texts: R@1
{a["point_R1"]:.1f}).</p>{html_table(*_thirds_table(a))}
<h2>Queries</h2><p class="soft">The best videos for some captions: those whose own video is furthest
ahead of all others, and furthest behind the best. A green bar and ✓ mark it; where it ranks lower,
it comes last. Videos of the same score share their mean rank. Before a file's name is its score;
the name links to the outlined frame, the nearest to the caption.</p>{queries}
<h2>Settings</h2>{html_table(["", ""], settings)}</main>"""
    # Whatever a caption contains, under this policy a browser runs no script and loads nothing.
    page = document("T-MASS: text-video retrieval", body,
                    "default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    write_output("--report", path, page)
