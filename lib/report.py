"""An analysis of the scores behind the metrics, for the terminal and as an HTML page.

`analyze` computes confidence intervals of recall, compares relevant with irrelevant pairs, and
splits recall by video complexity; `analysis_text` formats this. `write_report` and
`write_search_report` each write a page, built from the parts in lib/page.py.
"""
import functools
import math
import os
import textwrap
from urllib.parse import quote

import torch
import torch.nn.functional as F

from lib import exact
from lib.common import clock
from lib.mass import draw_mass, measure_mass
from lib.page import (
    esc,
    found_segment,
    histogram_chart,
    hit,
    html_table,
    page,
    strip,
    thirds_chart,
    training_charts,
    write_page,
)
from lib.video import Segment
from tmass import cosine

RECALLS = (1, 5, 10)
MOST_PAIRS = 20_000  # irrelevant pairs to analyse; if there are more, they are sampled
BINS = 40            # per histogram
RESAMPLES = 2000     # per bootstrap

# ---- analysis ----


def frame_diversity(f):
    """Mean cosine distance between the frames of each video. f (V,T,D) -> (V,)."""
    T = f.shape[1]
    f = F.normalize(f, dim=-1)
    # The diagonal adds nothing: a frame's distance to itself is 0.
    return (1 - f @ f.mT).sum((1, 2)) / max(1, T * (T - 1))


def recall_intervals(ranks, video):
    """Recall in percent with 95 % bootstrap intervals. -> {R1, R5, R10: dict(value, low, high)}.

    ranks (n,): of each text; video (n,): number of its video. The bootstrap resamples videos, each
    with all its texts, because the ranks of texts of the same video are correlated.
    """
    hits = torch.stack([ranks <= k for k in RECALLS], 1).double()
    group = video.unique(return_inverse=True)[1]
    texts = group.bincount().double()
    n = len(texts)
    found = hits.new_zeros(n, len(RECALLS)).index_add(0, group, hits)
    rates = []
    # One resample at a time: all at once would need RESAMPLES numbers for each video.
    for _ in range(RESAMPLES):
        times = torch.randint(n, (n,)).bincount(minlength=n).double()
        rates.append(times @ found / (times @ texts))
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
    others = max(1, V - 1)
    count = len(owner) * (V - 1)
    # Pairs are numbered by text, then by video, cyclically from the one after the text's own.
    if count > MOST_PAIRS:
        number = torch.randint(count, (MOST_PAIRS,))
    else:
        number = torch.arange(count)
    i = number // others
    j = (owner[i] + 1 + number % others) % V
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
    """x (P,) -> dict(mean, std), each None if there are too few values."""
    mean = x.mean().item() if len(x) else None
    std = x.std().item() if len(x) > 1 else None
    return dict(mean=mean, std=std)


def histogram(pairs):
    """Counts of finite values in common bins. {kind: (P,)} -> {kind: counts, "edges": edges}."""
    values = torch.cat(list(pairs.values()))
    values = values[values.isfinite()].tolist() or [0, 1]
    low = min(values)
    high = max(values)
    # If all values are equal, as |R|₁ = 0 for radius none, the bins would have no width. If they
    # nearly are, the six digits at the ticks could not tell them apart.
    if high - low < 1e-4 * max(1, abs(low)):
        low -= 0.5
        high += 0.5
    out = {}
    for kind, x in pairs.items():
        counts, edges = x.double().histogram(BINS, range=(low, high))
        out[kind] = counts.long().tolist()
    out["edges"] = edges.tolist()
    return out


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def analyze(model, scored, t2v, v2t):
    """Analyse an eval.Scored, with its ranks t2v (N,) and v2t (V,). -> dict of plain values

    - intervals: recall with its confidence intervals.
    - relevant, irrelevant: mean and standard deviation, over such pairs, of the point text's
      cos(t, v), the score in sims (cos(t_s, v) of the best sample, or its mean) and |R|₁. Relevant
      pairs are a text and its own video; irrelevant ones are all others, or a seeded sample.
    - histograms: of the scores and |R|₁ of these pairs.
    - point_R1, complexity: R@1 without samples, and R@1 by third of the videos' frame diversity.
    """
    t, f, sims, ann, _, scoring = scored
    trials = scoring["trials"]
    seed = scoring["seed"]
    sims = sims.cpu()
    torch.manual_seed(seed)
    owner = torch.tensor(ann.owner)
    N, V = sims.shape
    # cos(t, v): without samples, sims already hold it.
    point = exact.score(model, t, f, trials=0).cpu() if trials else sims
    out = dict(trials=trials, seed=seed)
    described = owner.unique()  # videos without captions have no v2t rank
    out["intervals"] = dict(t2v=recall_intervals(t2v, owner),
                            v2t=recall_intervals(v2t[described], described))

    pairs = dict(relevant=(torch.arange(N), owner),
                 irrelevant=_irrelevant_pairs(owner, V))
    best = {}
    size = {}
    for kind, (i, j) in pairs.items():
        best[kind] = sims[i, j]
        size[kind] = _radius_l1(model, t, f, i, j)
        out[kind] = dict(
            pairs=len(i),
            point=spread(point[i, j]),
            best=spread(best[kind]),
            radius=spread(size[kind]),
            best_beats_point=percent(best[kind] > point[i, j]) if len(i) else None,
            sampled=kind == "irrelevant" and N * (V - 1) > MOST_PAIRS,
        )
    out["histograms"] = dict(similarity=histogram(best), radius=histogram(size))

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
    "dsl": ("DSL ", "DSL is transductive: it uses all queries at once. It is not comparable with "
            "the other rows."),
    "first_captions": ("first captions, honest: ", "The released protocol uses the first "
                       "caption of each video ({texts} texts), because it is defined for one "
                       "caption per video; the first rows use all captions."),
    "released_protocol": ("LEAKING ", "LEAKING: the released protocol scores a video as pooled by "
                          "its own ground-truth caption, whatever the query. For comparison with "
                          "published numbers only. (There, each pair has its own noise.)"),
}
PAIR_ROWS = {"point": ("cos(t, v), point text", 3), "best": ("cos(t_s, v), best sample", 3),
             "radius": ("|R|₁, radius of the text mass", 1)}
COMPLEXITY = "video complexity (frame diversity)"


def number(x, digits=1):
    return "–" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def metrics_table(result):
    """A table of all metrics in a result of eval.summarise. -> heads, rows"""
    parts = {"": result}
    for key, (label, _) in PARTS.items():
        if key in result:
            parts[label] = result[key]
    rows = []
    for label, part in parts.items():
        for way, name in WAYS.items():
            cells = [f"{x:g}" if k == "MdR" else f"{x:.1f}" for k, x in part[way].items()]
            rows.append([label + name, *cells])
    return ["", *COLUMNS], rows


def _metrics_notes(result):
    """The notes that belong below a result's metrics. -> list of str"""
    released = result.get("released_protocol", {})
    return [note.format(**released) for key, (_, note) in PARTS.items() if key in result]


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
        pair = [a[kind][key].values() for kind in kinds]
        cells = [f"{number(mean, digits)} ± {number(std, digits)}" for mean, std in pair]
        rows.append([label, *cells])
    beats = [number(a[kind]["best_beats_point"]) for kind in kinds]
    rows.append(["best sample beats point text, %", *beats])
    return ["mean ± std", *kinds], rows


def _thirds_table(a):
    """A table of R@1 by third of the texts. -> heads, rows"""
    rows = []
    for x in a["complexity"]:
        rows.append([
            f"{x['third']}: {x['least']:.3f} to {x['most']:.3f}",
            str(x["texts"]),
            f"{x['R1']:.1f}",
            f"[{x['low']:.1f}, {x['high']:.1f}]",
            f"{x['R1_point']:.1f}",
        ])
    return [f"t2v R@1 by {COMPLEXITY}", "texts", "R@1", "95 %", "point text"], rows


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
    lines = [f"{result['texts']} texts, {result['videos']} videos"]
    lines.append(_text_table(*metrics_table(result)))
    for note in _metrics_notes(result):
        lines.append(textwrap.fill(note, 98))
    return "\n".join(lines)


def _about_pairs(a):
    """Which pairs were analysed, and how many, as a phrase."""
    others = "a seeded sample of the irrelevant" if a["irrelevant"]["sampled"] else "all irrelevant"
    return (f"{a['relevant']['pairs']} relevant pairs (a caption and its own video), "
            f"{a['irrelevant']['pairs']} others ({others} ones)")


def analysis_text(a):
    """Format the result of `analyze` for the terminal."""
    tables = [table(a) for table in (_intervals_table, pairs_table, _thirds_table)]
    intervals, pairs, complexity = (_text_table(*table) for table in tables)
    return f"{intervals}\n\n{_about_pairs(a)}\n{pairs}\n\n{complexity}"


# ---- pages ----


def segment_name(segment):
    """The file name of a segment, with its start and end unless it is a whole file."""
    name = os.path.basename(segment.path)
    if segment == Segment(segment.path):
        return name
    end = "the end" if segment.end is None else f"{segment.end:g} s"
    return f"{name} ({segment.start or 0:g} s to {end})"


def choose_queries(sims, owner, t2v, seed):
    """Choose the best, the worst and random texts. sims (N,V) -> {title: list of text numbers}.

    owner (N,); t2v (N,): ranks. The best texts are those of the lowest rank, and then of the widest
    margin. No two chosen texts share a video.
    """
    margin = _margins(sims, owner).tolist()
    rank = t2v.tolist()
    best = sorted(range(len(rank)), key=lambda i: (rank[i], -margin[i]))
    missed = [i for i in reversed(best) if rank[i] > 1]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(rank), generator=generator).tolist()
    chosen = {}
    seen = set()  # videos: no card may reveal another card's right video
    for title, texts, most in (("Best", best, 2), ("Worst", missed, 2), ("Random", shuffled, 4)):
        chosen[title] = []
        for i in texts:
            video = owner[i].item()
            if len(chosen[title]) < most and video not in seen:
                chosen[title].append(i)
                seen.add(video)
    return chosen


def moment(path, page_path, seconds, label):
    """Link from a page to a time in a video file. label: text. -> HTML."""
    folder = os.path.dirname(os.path.abspath(page_path))
    # As bytes, because a file name need not be valid Unicode.
    link = os.fsencode(os.path.relpath(path, folder))
    return f'<a href="{quote(link)}#t={seconds:g}">{esc(label)}</a>'


def mass_figure(i, model, scored):
    """Picture and numbers of text i's mass, with its right and its nearest wrong video. -> HTML.

    Empty if nothing is sampled, or there is only one video.
    """
    right = scored.ann.owner[i]
    found = scored.sims[i].argsort(descending=True).tolist()
    found.remove(right)
    # If there is only one video, then f holds no wrong one.
    f = scored.f[[right, *found[:1]]]
    trials, seed, _ = scored.scoring.values()
    points, numbers = measure_mass(model, scored.t[i], f, trials, seed)
    if points is None:
        return ""
    rows = [[name, *(f"{x:.4f}" for x in pair.tolist())] for name, pair in numbers.items()]
    table = html_table(["its mass", "right video", "nearest wrong video"], rows)
    return draw_mass(points) + table


def query_card(i, scored, rank, top, pictures, page_path, mass=""):
    """The `top` best videos for text i, then the right one if it is not among them. -> HTML.

    rank: of the right video. pictures: function of a segment that gives HTML. mass: HTML of
    `mass_figure`.
    """
    sims = scored.sims[i]
    ann = scored.ann
    right = ann.owner[i]
    found = sims.topk(min(top, len(sims))).indices.tolist()
    # Not a dict: because of ties, the right video's rank may equal the place of another video.
    places = list(enumerate(found, 1))
    if right not in found:
        places.append((rank, right))
    rows = ""
    for place, v in places:
        segment = ann.segments[v]
        name = moment(segment.path, page_path, segment.start or 0, segment_name(segment))
        css = ""
        if v == right:
            css = "right"
            name = f'<span class="mark">✓ the right video</span> {name}'
        rows += hit(pictures(segment), place, sims[v].item(), name, css)
    ties = " (ties averaged)" if rank % 1 else ""
    return (f'<article class="card"><h4 dir="auto">“{esc(ann.captions[i])}”</h4><p class="soft">'
            f"right video: rank {rank:g} of {len(sims)}{ties}</p><ol>{rows}</ol>"
            f"{mass}</article>")


def _query_cards(model, scored, t2v, page_path):
    """Cards of `choose_queries`' texts: the best videos for each, and its mass. -> HTML."""
    scored = scored._replace(sims=scored.sims.cpu())
    owner = torch.tensor(scored.ann.owner)
    pictures = functools.cache(strip)  # so that no video is decoded twice
    body = ""
    chosen = choose_queries(scored.sims, owner, t2v, scored.scoring["seed"])
    for title, texts in chosen.items():
        cards = ""
        for i in texts:
            mass = mass_figure(i, model, scored)
            cards += query_card(i, scored, t2v[i].item(), 5, pictures, page_path, mass)
        if cards:
            body += f'<h3>{title}</h3><div class="cards">{cards}</div>'
    return body


def _figures(pictures):
    """Arrange charts with their titles on cards. {title: HTML} -> HTML."""
    cards = ""
    for title, chart in pictures.items():
        cards += f'<div class="card"><h4>{esc(title)}</h4>{chart}</div>'
    return f'<div class="cards">{cards}</div>'


def write_report(path, model, result, a, scored, t2v, log):
    """Write the page of an evaluation.

    result: of eval.summarise; a: of `analyze`; t2v (N,): ranks; log: path of train.py's log.
    """
    notes = ""
    for note in _metrics_notes(result):
        notes += f'<p class="warn">{esc(note)}</p>'
    pairs = {}
    for title, key, label in (("Similarity, best sample", "similarity", "cos(t_s, v)"),
                              ("Radius of the text mass", "radius", "|R|₁")):
        pairs[title] = histogram_chart(a["histograms"][key], title, label)
    samples = f"{a['trials']} samples"
    if result["expected"]:
        samples = f"best of {a['trials']} on average"
    chart = thirds_chart(a["complexity"], COMPLEXITY, samples)
    complexity = _figures({f"t2v R@1 by {COMPLEXITY}": chart})
    body = f"""<section><h2>Metrics</h2>{html_table(*metrics_table(result))}{notes}
<p class="soft">Recall in percent. The intervals come from a bootstrap over videos, each with all
its texts (seed {a['seed']}). They don't cover the variation between training seeds.</p>
{html_table(*_intervals_table(a))}</section>
<section><h2>Queries</h2><p class="soft">The best videos for chosen captions. A green bar and ✓ mark
the right one; if it ranks lower, it comes last, with its rank. The mass is projected onto
the plane through t, the right video's v and the nearest wrong one's, which holds about 2/D of the
samples' spread. h·cos, the cosine shrunk by the mass, and E_M b, a bonus for a wide mass, add up to
the average of the best of {a['trials']} samples.</p>
{_query_cards(model, scored, t2v, path)}</section>
<section><h2>Relevant and irrelevant pairs</h2>
<p class="soft">{esc(_about_pairs(a))}; percentages are of each kind's own pairs.</p>
{html_table(*pairs_table(a))}{_figures(pairs)}</section>
<section><h2>Which texts are found</h2><p class="soft">Frame diversity: mean pairwise cosine
distance of a video's frame embeddings. Diamonds: the point text alone, without samples (over all
texts: R@1 {a['point_R1']:.1f}).</p>{complexity}</section>"""
    curves = training_charts(log)
    if curves:
        body += f"<section><h2>Training</h2>{_figures(curves)}</section>"
    lead = (f"{result['data']}, split {result['split']}: {result['texts']} captions, "
            f"{result['videos']} videos")
    write_page(path, page("T-MASS: text-video retrieval", lead, body, result))


def write_search_report(path, found, settings):
    """Write the page of a search. found: {query: [dict(rank, score, file, at, start, end)]}."""
    cards = ""
    for query, results in found.items():
        rows = ""
        for x in results:
            segment = found_segment(x["file"], x["start"], x["end"])
            images = strip(segment, settings.get("frames", 12), x["at"])
            label = f"{x['file']} at {clock(x['at'])}"
            name = moment(x["file"], path, x["at"], label)
            rows += hit(images, x["rank"], x["score"], name)
        cards += (f'<section class="card"><h2 dir="auto">“{esc(query)}”</h2><ol>{rows}</ol>'
                  "</section>")
    lead = (f"Queries: {len(found)}. Scores rank the videos for one query; they are not "
            "probabilities. The outlined picture is the frame nearest to the "
            "query, and the file name links to it.")
    body = f'<div class="cards">{cards}</div>'
    write_page(path, page("T-MASS: search results", lead, body, settings))
