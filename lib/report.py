"""What lies behind the metrics, and pages to look at.

`analyze` computes and `analysis_text` prints: intervals of recall, relevant against irrelevant
pairs, recall by third. `write_report` and `write_search_report` write one HTML file each, without
scripts or anything from the network. What comes from users (captions, file names) passes `esc`.
"""
import base64
import math
import os
import platform
import textwrap
import time
from urllib.parse import quote

import av
import torch
import torch.nn.functional as F
import torchvision
from torchvision.io import encode_jpeg
from torchvision.transforms.v2.functional import resize

from lib import charts
from lib.charts import esc
from lib.common import DataError, clock, output
from lib.video import Segment, read_segment

RECALLS = (1, 5, 10)
MOST_PAIRS = 20_000  # irrelevant pairs that are looked at: a sample where there are more
BINS = 40            # of a histogram
RESAMPLES = 2000     # of a bootstrap

# ---- analysis ----


def frame_diversity(f):
    """Mean cosine distance between two frames of a video. f (V,T,D) -> (V,)."""
    T = f.shape[1]
    total = F.normalize(f.float(), dim=-1).sum(1)
    pairs = total.square().sum(-1) - T  # |Σ f_j|² = T + Σ_{j≠k} cos(f_j, f_k)
    if T == 1:
        return torch.zeros_like(pairs)
    return 1 - pairs / (T * (T - 1))


def bootstrap(hits, video, generator):
    """Recall in percent with 95 % intervals. hits (n,K), video (n,) -> K dict(value, low, high).

    video: the number of each text's. Texts of one video are found or missed together, so it is
    videos that are drawn anew, each with all its texts.
    """
    hits = hits.double()
    group = video.unique(return_inverse=True)[1]
    texts = group.bincount().double()
    n = len(texts)
    found = hits.new_zeros(n, hits.shape[1]).index_add(0, group, hits)
    rates = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(n, (n,), generator=generator)
        times = drawn.bincount(minlength=n).double()
        rates.append(times @ found / (times @ texts))
    low, high = torch.stack(rates).quantile(hits.new_tensor([0.025, 0.975]), dim=0)
    columns = 100 * torch.stack([hits.mean(0), low, high], 1)
    return [dict(zip(("value", "low", "high"), column)) for column in columns.tolist()]


def recall_intervals(ranks, video, generator):
    """ranks (n,) and the video of each text (n,) -> {R1, R5, R10: dict(value, low, high)}."""
    hits = torch.stack([ranks <= k for k in RECALLS], 1)
    names = [f"R{k}" for k in RECALLS]
    return dict(zip(names, bootstrap(hits, video, generator)))


def thirds(values, hits, video, generator):
    """R@1 by third of the texts' values; equal values stay together. -> list of dict.

    values (N,), video (N,), hits (N,2): of the samples, of the point text.
    """
    bounds = values.quantile(values.new_tensor([1 / 3, 2 / 3]))
    third = torch.bucketize(values, bounds)
    rows = []
    for k, name in enumerate(("low", "middle", "high")):
        chosen = third == k
        if chosen.any():
            samples, point = bootstrap(hits[chosen], video[chosen], generator)
            row = dict(third=name, texts=int(chosen.sum()), R1_point=point["value"])
            row.update(least=values[chosen].min().item(), most=values[chosen].max().item())
            rows.append(dict(row, R1=samples["value"], low=samples["low"], high=samples["high"]))
    return rows


def irrelevant_pairs(owner, V, generator):
    """Texts and videos that don't belong together, MOST_PAIRS at most. owner (N,) -> i, j (P,)."""
    others = max(1, V - 1)  # of each text; the pairs are numbered text by text
    count = len(owner) * (V - 1)
    number = torch.arange(min(count, MOST_PAIRS))
    if count > MOST_PAIRS:
        number = torch.randint(count, (MOST_PAIRS,), generator=generator)
    i = number // others
    j = (owner[i] + 1 + number % others) % V
    return i, j


def radius_l1(model, t, f, i, j):
    """|R_ij|₁ of pairs (i, j). t (N,D), f (V,T,D), i, j (P,) -> (P,), on the CPU."""
    sizes = []
    for texts, videos in zip(i.split(2048), j.split(2048)):
        S = F.cosine_similarity(t[texts, None], f[videos], dim=-1)  # (P,T)
        R = model.radius(S).expand(len(S), t.shape[1])              # (P,D); it may be (P,1)
        sizes.append(R.abs().sum(-1).cpu())
    return torch.cat(sizes)


def margins(sims, owner):
    """How far the right video is above the best other one. sims (N,V), owner (N,) -> (N,)."""
    own = sims.gather(1, owner[:, None])
    others = sims.scatter(1, owner[:, None], -torch.inf)
    return own.squeeze(1) - others.amax(1)


def spread(x):
    """x (P,) -> dict(mean, std), None where there are too few."""
    mean = x.mean().item() if len(x) else None
    std = x.std().item() if len(x) > 1 else None
    return dict(mean=mean, std=std)


def histogram(relevant, irrelevant):
    """Counts in common bins; what is not a number is left out. (P,), (Q,) -> dict."""
    both = torch.cat([relevant, irrelevant])
    both = both[both.isfinite()].tolist() or [0, 1]
    low = min(both)
    high = max(both)
    if high - low < 1e-6 * max(1, abs(low)):  # all are equal, as |R|₁ = 0 of radius none
        low -= 0.5
        high += 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
    out = dict(edges=edges)
    for kind, x in (("relevant", relevant), ("irrelevant", irrelevant)):
        out[kind] = torch.histc(x.double(), BINS, low, high).long().tolist()
    return out


@torch.no_grad()
def analyze(model, scored, t2v, v2t):
    """What the scores are made of. An eval.Scored, its ranks t2v (N,) and v2t (V,) -> plain dict.

    intervals: of recall. relevant: pairs of a text and its own video; irrelevant: all others, or a
    seeded sample; of both cos(t, v) of the point text, cos(t_s, v) of the best sample as in sims,
    |R|₁. complexity, length: R@1 by third of the texts, with samples and without.
    """
    t, f, sims, ann, *_ = scored
    sims = sims.cpu()
    trials = scored.scoring["trials"]
    seed = scored.scoring["seed"]
    generator = torch.Generator().manual_seed(seed)
    owner = torch.tensor(ann.owner)
    N, V = sims.shape
    point = sims  # cos(t, v)
    if trials:
        point = model.score(t, f, 0).cpu()
    out = dict(trials=trials, seed=seed)
    described = (~v2t.isnan()).nonzero()[:, 0]
    out["intervals"] = dict(t2v=recall_intervals(t2v, owner, generator),
                            v2t=recall_intervals(v2t[described], described, generator))

    pairs = dict(relevant=(torch.arange(N), owner),
                 irrelevant=irrelevant_pairs(owner, V, generator))
    best = {}
    size = {}
    for kind, (i, j) in pairs.items():
        best[kind] = sims[i, j]
        size[kind] = radius_l1(model, t, f, i, j)
        beats = 100.0 * (sims[i, j] > point[i, j])
        out[kind] = dict(pairs=len(i), point=spread(point[i, j]), best=spread(best[kind]),
                         radius=spread(size[kind]), best_beats_point=spread(beats)["mean"])
    out["relevant"]["sampled"] = False
    out["irrelevant"]["sampled"] = N * (V - 1) > MOST_PAIRS
    out["histograms"] = dict(similarity=histogram(**best), radius=histogram(**size))

    point_hits = margins(point, owner) > 0
    out["point_R1"] = 100 * point_hits.double().mean().item()
    hits = torch.stack([t2v <= 1, point_hits], 1)
    words = torch.tensor([float(len(caption.split())) for caption in ann.captions])
    out["complexity"] = thirds(frame_diversity(f).cpu()[owner], hits, owner, generator)
    out["length"] = thirds(words, hits, owner, generator)
    return out


# ---- tables: heads and rows of cells, for the terminal and for pages ----
# Only the first word of a cell is set large in a page.

WAYS = {"t2v": "t2v", "v2t": "v2t, max over captions"}
COLUMNS = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")  # as eval.metrics has them
PAIR_ROWS = {"point": ("cos(t, v), point text", 3), "best": ("cos(t_s, v), best sample", 3),
             "radius": ("|R|₁, radius of the text mass", 1)}
THIRDS = {"complexity": ("video complexity (frame diversity)", 3),
          "length": ("caption length (words)", 0)}


def number(x, digits=1):
    return "–" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def metrics_table(result):
    """All metrics of a result of eval.summarise."""
    parts = {"": result, "DSL ": result.get("dsl"),
             "first captions, honest: ": result.get("first_captions"),
             "LEAKING ": result.get("released_protocol")}
    rows = []
    for label, part in parts.items():
        for way, name in WAYS.items() if part else ():
            cells = [f"{x:g}" if k == "MdR" else f"{x:.1f}" for k, x in part[way].items()]
            rows.append([label + name, *cells])
    return ["", *COLUMNS], rows


def metrics_notes(result):
    """What must be said of a result's rows."""
    notes = []
    if "dsl" in result:
        notes.append("DSL is transductive: it uses all queries at once. It is not comparable with "
                     "the other rows.")
    if "released_protocol" in result:
        notes.append("LEAKING: the released protocol scores a video as pooled by its own "
                     "ground-truth caption, whatever the query. To compare with published numbers "
                     "only. (There, each pair has noise of its own.)")
    if "first_captions" in result:
        notes.append("It is defined for one caption per video, and takes each video's first "
                     f"({result['released_protocol']['texts']} texts); the first rows are of all.")
    return notes


def intervals_table(a):
    rows = []
    for way, found in a["intervals"].items():
        cells = [f"{x['value']:.1f} [{x['low']:.1f}, {x['high']:.1f}]" for x in found.values()]
        rows.append([way, *cells])
    return ["recall, 95 % interval", *COLUMNS[:3]], rows


def pairs_table(a):
    """Relevant beside irrelevant pairs."""
    kinds = (a["relevant"], a["irrelevant"])
    rows = []
    for key, (label, digits) in PAIR_ROWS.items():
        row = [label]
        for kind in kinds:
            x = kind[key]
            row.append(f"{number(x['mean'], digits)} ± {number(x['std'], digits)}")
        rows.append(row)
    beats = [number(kind["best_beats_point"]) for kind in kinds]
    rows.append(["best sample beats point text, %", *beats])
    return ["mean ± std", "relevant", "irrelevant"], rows


def thirds_table(a, key):
    """R@1 by third of the texts."""
    label, digits = THIRDS[key]
    rows = []
    for x in a[key]:
        values = f"{x['third']}: {x['least']:.{digits}f} to {x['most']:.{digits}f}"
        interval = f"[{x['low']:.1f}, {x['high']:.1f}]"
        rows.append([values, str(x["texts"]), f"{x['R1']:.1f}", interval, f"{x['R1_point']:.1f}"])
    return [f"t2v R@1 by {label}", "texts", "R@1", "95 %", "point text"], rows


def text_table(heads, rows):
    """A table for the terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = []
    for first, *others in (heads, *rows):
        line = first.ljust(widths[0])
        for cell, width in zip(others, widths[1:]):
            line += cell.rjust(width + 2)
        lines.append(line)
    return "\n".join(lines)


def html_table(heads, rows):
    """A table for a page."""
    body = ""
    for first, *others in rows:
        body += f'<tr><th scope="row">{esc(first)}</th>'
        for cell in others:
            large, _, small = cell.partition(" ")
            body += f"<td>{esc(large)} <small>{esc(small)}</small></td>"
        body += "</tr>"
    head = "".join(f'<th scope="col">{esc(x)}</th>' for x in heads)
    return (f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def metrics_text(result):
    """The result of eval.summarise for the terminal."""
    notes = [textwrap.fill(note, 98) for note in metrics_notes(result)]
    counts = f"{result['texts']} texts, {result['videos']} videos"
    return "\n".join([counts, text_table(*metrics_table(result)), *notes])


def about_pairs(a):
    """How many pairs, and which, in words."""
    others = "a seeded sample of the irrelevant" if a["irrelevant"]["sampled"] else "all irrelevant"
    return (f"{a['relevant']['pairs']} relevant pairs (a caption and its own video), "
            f"{a['irrelevant']['pairs']} others ({others} ones)")


def analysis_text(a):
    """The result of `analyze` for the terminal."""
    tables = [text_table(*thirds_table(a, key)) for key in THIRDS]
    return "\n\n".join([text_table(*intervals_table(a)),
                        about_pairs(a) + "\n" + text_table(*pairs_table(a)), *tables])


# ---- the page ----

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
h1,h4,p,dd,.file,li{overflow-wrap:anywhere}
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
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:12px;
margin:1.2rem 0}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:12px;
padding:12px 16px}
.tiles b{display:block;font-size:1.7rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.85rem}
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
"""


def page(title, lead, body, settings):
    """A whole document. title, lead: text; body: HTML; settings: what is a text or a number of it.
    """
    versions = dict(Python=platform.python_version(), torch=torch.__version__,
                    torchvision=torchvision.__version__, av=av.__version__)
    items = ""
    for name, value in {**settings, **versions}.items():
        if isinstance(value, (str, int, float)):
            items += f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{esc(title)}</title><style>{STYLE}{charts.STYLE}</style></head><body>{charts.HATCH}
<header><h1>{esc(title)}</h1><p class="soft">{esc(lead)}</p></header>
<main>{body}
<section><h2>Settings and versions</h2><div class="card"><dl>{items}</dl></div></section></main>
<footer>Written by T-MASS on {time.strftime('%Y-%m-%d %H:%M')}.</footer></body></html>
"""


def write_page(path, text):
    """Write a page whole. What is no Unicode in file names becomes a character reference."""
    with output("--report", path) as part:
        with open(part, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
            file.write(text)


def image(frame, name, css="", height=96):
    """uint8 (3,H,W) -> an <img> with a JPEG in it."""
    width = round(height * frame.shape[2] / frame.shape[1])
    width = max(16, min(4 * height, width))
    frame = resize(frame, [height, width], antialias=True)
    jpeg = base64.b64encode(encode_jpeg(frame, quality=75).numpy().tobytes())
    return (f'<img class="{css}" alt="{esc(name)}" width="{width}" height="{height}" '
            f'src="data:image/jpeg;base64,{jpeg.decode()}">')


def strip(segment, frames=6, at=None):
    """About six of a segment's T frames, the one nearest to the time `at` marked. -> HTML."""
    try:
        piece = read_segment(segment, frames)
    except DataError as e:
        return f"<p>no picture: {esc(e)}</p>"
    step = max(1, frames // 6)
    nearest = None
    chosen = range(0, frames, step)
    if at is not None:
        nearest = min(range(frames), key=lambda k: abs(piece.times[k] - at))
        chosen = range(nearest % step, frames, step)
    images = ""
    for k in chosen:
        name = f"{os.path.basename(segment.path)} at {clock(piece.times[k])}"
        images += image(piece.frames[k], name, "nearest" if k == nearest else "")
    return f'<div class="strip">{images}</div>'


def hit(images, rank, score, name, css=""):
    """One result. images: of `strip`; name: HTML."""
    return (f'<li class="{css}"><figure>{images}<figcaption><b>{rank:g}</b>'
            f'<span>score {score:.4f}</span><span class="file">{name}</span>'
            "</figcaption></figure></li>")


def segment_name(segment):
    """File name, and the seconds where it is a part of a file."""
    name = os.path.basename(segment.path)
    if segment.start is None and segment.end is None:
        return name
    end = "the end" if segment.end is None else f"{segment.end:g} s"
    return f"{name} ({segment.start or 0:g} s to {end})"


def choose_queries(sims, owner, t2v, each, seed):
    """Best, worst and random texts, of one video each. sims (N,V) -> {title: texts}.

    Best and worst are so by rank, then by the margin to the best wrong video.
    """
    keys = list(zip(t2v.tolist(), (-margins(sims, owner)).tolist()))
    best = sorted(range(len(keys)), key=keys.__getitem__)
    missed = [i for i in reversed(best) if t2v[i] > 1]
    shuffled = torch.randperm(len(best), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = {"Best": (best, each), "Worst": (missed, each), "Random": (shuffled, 2 * each)}
    chosen = {}
    seen = set()
    for title, (texts, count) in wanted.items():
        chosen[title] = []
        for i in texts:
            video = owner[i].item()
            if len(chosen[title]) < count and video not in seen:
                chosen[title].append(i)
                seen.add(video)
    return chosen


def query_card(i, sims, ann, rank, top, strips):
    """The best videos of text i, then the right one where it is not among them. -> HTML."""
    right = ann.owner[i]
    found = sims[i].topk(min(top, sims.shape[1])).indices.tolist()
    places = list(enumerate(found, 1))
    if right not in found:
        places.append((rank, right))
    rows = ""
    for place, v in places:
        segment = ann.segments[v]
        if v not in strips:
            strips[v] = strip(segment)
        name = esc(segment_name(segment))
        css = ""
        if v == right:
            css = "right"
            name = f'<span class="mark">✓ the right video</span> {name}'
        rows += hit(strips[v], place, sims[i, v].item(), name, css)
    ties = " (ties averaged)" if rank % 1 else ""
    return (f'<article class="card"><h4 dir="auto">“{esc(ann.captions[i])}”</h4><p class="soft">'
            f"right video: rank {rank:g} of {sims.shape[1]}{ties}</p><ol>{rows}</ol></article>")


def query_cards(scored, t2v, each=2, top=5):
    """The best videos of chosen texts. -> HTML."""
    sims = scored.sims.cpu()
    ann = scored.ann
    queries = choose_queries(sims, torch.tensor(ann.owner), t2v, each, scored.scoring["seed"])
    strips = {}  # no video is decoded twice
    body = ""
    for title, texts in queries.items():
        cards = [query_card(i, sims, ann, t2v[i].item(), top, strips) for i in texts]
        if cards:
            body += f'<h3>{title}</h3><div class="cards">{"".join(cards)}</div>'
    return body


def figures(pictures):
    """{title: chart} -> HTML."""
    cards = ""
    for title, chart in pictures.items():
        cards += f'<div class="card"><h4>{esc(title)}</h4>{chart}</div>'
    return f'<div class="cards">{cards}</div>'


def write_report(path, result, a, scored, t2v, log):
    """The page of an evaluation. a: of `analyze`; t2v (N,): the ranks; log: path of train.py's."""
    heads, rows = metrics_table(result)
    tiles = ""
    for name, value in zip(heads[1:], rows[0][1:]):
        tiles += f"<div><b>{value}</b><span>t2v {name}</span></div>"
    notes = "".join(f'<p class="warn">{esc(note)}</p>' for note in metrics_notes(result))
    pairs = {}
    for title, key, label in (("Similarity, best sample", "similarity", "cos(t_s, v)"),
                              ("Radius of the text mass", "radius", "|R|₁")):
        about = f"{title}: histogram, relevant and irrelevant pairs"
        pairs[title] = charts.histogram_chart(a["histograms"][key], about, label)
    samples = f"{a['trials']} samples"
    if result["expected"]:
        samples = f"best of {a['trials']} on average"
    groups = {}
    for key, (label, _) in THIRDS.items():
        about = f"thirds of the texts by {label}"
        groups[f"t2v R@1 by {label}"] = charts.thirds_chart(a[key], about, samples)
    body = f"""<div class="tiles">{tiles}</div>
<section><h2>Metrics</h2>{html_table(heads, rows)}{notes}<p class="soft">Recall in percent.
The intervals are those of a bootstrap over videos, each with all its texts (seed {a['seed']}): they
say nothing about other training seeds.</p>{html_table(*intervals_table(a))}</section>
<section><h2>Queries</h2><p class="soft">The best videos for chosen captions. A green bar and ✓ mark
the right one; where it is further down, it comes last with its rank.</p>
{query_cards(scored, t2v)}</section>
<section><h2>Relevant and irrelevant pairs</h2>
<p class="soft">{esc(about_pairs(a))}; shares are of each kind's own pairs.</p>
{html_table(*pairs_table(a))}{figures(pairs)}</section>
<section><h2>Which texts are found</h2><p class="soft">Frame diversity: mean pairwise cosine
distance of a video's frame embeddings. Diamonds: the point text alone, without samples (over all
texts: R@1 {a['point_R1']:.1f}).</p>{figures(groups)}</section>"""
    curves = charts.training_charts(log)
    if curves:
        body += f"<section><h2>Training</h2>{figures(curves)}</section>"
    lead = (f"{result['data']}, split {result['split']}: {result['texts']} captions, "
            f"{result['videos']} videos")
    write_page(path, page("T-MASS: text-video retrieval", lead, body, result))


def write_search_report(path, found, settings):
    """The page of a search. found: {query: [dict(rank, score, file, at, start, end)]}."""
    folder = os.path.dirname(os.path.abspath(path))
    cards = ""
    for query, results in found.items():
        rows = ""
        for x in results:
            segment = Segment(x["file"], x["start"], x["end"])
            images = strip(segment, settings.get("frames", 12), x["at"])
            link = quote(os.fsencode(os.path.relpath(x["file"], folder)))
            name = (f'<a href="{link}#t={x["at"]:g}">{esc(x["file"])} at {clock(x["at"])}</a>')
            rows += hit(images, x["rank"], x["score"], name)
        cards += (f'<section class="card"><h2 dir="auto">“{esc(query)}”</h2><ol>{rows}</ol>'
                  "</section>")
    lead = (f"{len(found)} {'query' if len(found) == 1 else 'queries'}; scores order the videos of "
            "one query, and are no probabilities; the framed picture is the frame nearest to the "
            "text, and a name leads to it")
    body = f'<div class="cards">{cards}</div>'
    write_page(path, page("T-MASS: search results", lead, body, settings))
