"""What lies behind the metrics, for the terminal and as a page to look at.

`analyze` computes and `analysis_text` prints: intervals of recall, relevant against irrelevant
pairs, recall by third. `write_report` and `write_search_report` write a page each (lib/page.py).
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
MOST_PAIRS = 20_000  # irrelevant pairs that are looked at: a sample where there are more
BINS = 40            # of a histogram
RESAMPLES = 2000     # of a bootstrap

# ---- analysis ----


def frame_diversity(f):
    """Mean cosine distance between two frames of a video. f (V,T,D) -> (V,)."""
    T = f.shape[1]
    f = F.normalize(f, dim=-1)
    # A frame is at no distance from itself, so the sum may run over the diagonal, too.
    return (1 - f @ f.mT).sum((1, 2)) / max(1, T * (T - 1))


def recall_intervals(ranks, video):
    """Recall in percent with 95 % intervals. -> {R1, R5, R10: dict(value, low, high)}.

    ranks (n,), video (n,): the number of each text's. Texts of one video are found or missed
    together, so it is videos that are drawn anew, each with all its texts.
    """
    hits = torch.stack([ranks <= k for k in RECALLS], 1).double()
    group = video.unique(return_inverse=True)[1]
    texts = group.bincount().double()
    n = len(texts)
    found = hits.new_zeros(n, len(RECALLS)).index_add(0, group, hits)
    rates = []
    # One draw at a time: all at once would need RESAMPLES numbers for each video.
    for _ in range(RESAMPLES):
        times = torch.randint(n, (n,)).bincount(minlength=n).double()
        rates.append(times @ found / (times @ texts))
    ends = torch.stack(rates).quantile(hits.new_tensor([0.025, 0.975]), dim=0)
    table = 100 * torch.stack([hits.mean(0), *ends], 1)
    rows = [dict(zip(("value", "low", "high"), row)) for row in table.tolist()]
    return {f"R{k}": row for k, row in zip(RECALLS, rows)}


def thirds(values, ranks, video, point_hits):
    """R@1 by third of the texts' values, with samples and without. All (N,) -> list of dict.

    Texts of equal values stay together.
    """
    bounds = values.quantile(values.new_tensor([1 / 3, 2 / 3]))
    third = torch.bucketize(values, bounds)
    rows = []
    for k, name in enumerate(("low", "middle", "high")):
        chosen = third == k
        inside = values[chosen].tolist()
        if inside:  # it is empty where too many texts have the same value
            row = recall_intervals(ranks[chosen], video[chosen])["R1"]
            row["R1"] = row.pop("value")
            row["R1_point"] = percent(point_hits[chosen])
            row.update(third=name, least=min(inside), most=max(inside), texts=len(inside))
            rows.append(row)
    return rows


def percent(hits):
    return 100 * hits.double().mean().item()


def irrelevant_pairs(owner, V):
    """Texts and videos that don't belong together, MOST_PAIRS at most. owner (N,) -> i, j (P,)."""
    others = max(1, V - 1)
    count = len(owner) * (V - 1)
    # The pairs are numbered text by text, each text's from the video after its own on.
    if count > MOST_PAIRS:
        number = torch.randint(count, (MOST_PAIRS,))
    else:
        number = torch.arange(count)
    i = number // others
    j = (owner[i] + 1 + number % others) % V
    return i, j


def radius_l1(model, t, f, i, j):
    """|R_ij|₁ of pairs (i, j). t (N,D), f (V,T,D), i, j (P,) -> (P,), on the CPU."""
    sizes = []
    for texts, videos in zip(i.split(2048), j.split(2048)):
        R = model.radius(cosine(t[texts, None], f[videos]))  # (P,D), or (P,1): one for all D
        sizes.append(t.shape[1] * R.abs().mean(-1).cpu())
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


def histogram(pairs):
    """Counts in common bins; what is not a number is left out. {kind: (P,)} -> dict."""
    values = torch.cat(list(pairs.values()))
    values = values[values.isfinite()].tolist() or [0, 1]
    low = min(values)
    high = max(values)
    # Where all are equal, as |R|₁ = 0 of radius none, the bins would have no width.
    if high - low < 1e-6 * max(1, abs(low)):
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
    """What the scores are made of. An eval.Scored, its ranks t2v (N,) and v2t (V,) -> plain dict.

    intervals: of recall. relevant: pairs of a text and its own video; irrelevant: all others, or a
    seeded sample; of both cos(t, v) of the point text, cos(t_s, v) of the best sample as in sims,
    |R|₁. complexity: R@1 by third of the texts, with samples and without.
    """
    t, f, sims, ann, _, scoring = scored
    trials = scoring["trials"]
    seed = scoring["seed"]
    sims = sims.cpu()
    torch.manual_seed(seed)
    owner = torch.tensor(ann.owner)
    N, V = sims.shape
    # cos(t, v), which is what sims are where nothing is sampled.
    point = exact.score(model, t, f, trials=0).cpu() if trials else sims
    out = dict(trials=trials, seed=seed)
    described = owner.unique()  # a video without captions has no v2t rank
    out["intervals"] = dict(t2v=recall_intervals(t2v, owner),
                            v2t=recall_intervals(v2t[described], described))

    pairs = dict(relevant=(torch.arange(N), owner),
                 irrelevant=irrelevant_pairs(owner, V))
    best = {}
    size = {}
    for kind, (i, j) in pairs.items():
        best[kind] = sims[i, j]
        size[kind] = radius_l1(model, t, f, i, j)
        out[kind] = dict(
            pairs=len(i),
            point=spread(point[i, j]),
            best=spread(best[kind]),
            radius=spread(size[kind]),
            best_beats_point=percent(best[kind] > point[i, j]) if len(i) else None,
            sampled=kind == "irrelevant" and N * (V - 1) > MOST_PAIRS,
        )
    out["histograms"] = dict(similarity=histogram(best), radius=histogram(size))

    point_hits = margins(point, owner) > 0
    out["point_R1"] = percent(point_hits)
    diversity = frame_diversity(f).cpu()[owner]
    out["complexity"] = thirds(diversity, t2v, owner, point_hits)
    return out


# ---- tables ----
#
# A table is its heads and its rows of cells, text all of it: `text_table` writes it for the
# terminal, `html_table` for a page, where only the first word of a cell is large.

WAYS = {"t2v": "t2v", "v2t": "v2t, max over captions"}
COLUMNS = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")  # as eval.metrics has them
# Parts of a result beside its own metrics: how their rows begin, and what must be said of them.
PARTS = {
    "dsl": ("DSL ", "DSL is transductive: it uses all queries at once. It is not comparable with "
            "the other rows."),
    "first_captions": ("first captions, honest: ", "The released protocol takes each video's "
                       "first ({texts} texts), as it is defined for one caption per video; the "
                       "first rows are of all."),
    "released_protocol": ("LEAKING ", "LEAKING: the released protocol scores a video as pooled by "
                          "its own ground-truth caption, whatever the query. To compare with "
                          "published numbers only. (There, each pair has noise of its own.)"),
}
PAIR_ROWS = {"point": ("cos(t, v), point text", 3), "best": ("cos(t_s, v), best sample", 3),
             "radius": ("|R|₁, radius of the text mass", 1)}
COMPLEXITY = "video complexity (frame diversity)"


def number(x, digits=1):
    return "–" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def metrics_table(result):
    """All metrics of a result of eval.summarise."""
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


def metrics_notes(result):
    """What must be said of a result's rows."""
    released = result.get("released_protocol", {})
    return [note.format(**released) for key, (_, note) in PARTS.items() if key in result]


def intervals_table(a):
    rows = []
    for way, found in a["intervals"].items():
        cells = [f"{x['value']:.1f} [{x['low']:.1f}, {x['high']:.1f}]" for x in found.values()]
        rows.append([way, *cells])
    return ["recall, 95 % interval", *COLUMNS[:3]], rows


def pairs_table(a):
    """Relevant beside irrelevant pairs."""
    kinds = ("relevant", "irrelevant")
    rows = []
    for key, (label, digits) in PAIR_ROWS.items():
        pair = [a[kind][key].values() for kind in kinds]
        cells = [f"{number(mean, digits)} ± {number(std, digits)}" for mean, std in pair]
        rows.append([label, *cells])
    beats = [number(a[kind]["best_beats_point"]) for kind in kinds]
    rows.append(["best sample beats point text, %", *beats])
    return ["mean ± std", *kinds], rows


def thirds_table(a):
    """R@1 by third of the texts."""
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


def text_table(heads, rows):
    """A table for the terminal: the first column to the left, the others to the right."""
    lines = [""] * (1 + len(rows))
    align = str.ljust
    for column in zip(heads, *rows):
        width = max(map(len, column)) + 2
        lines = [line + align(cell, width) for line, cell in zip(lines, column)]
        align = str.rjust
    return "\n".join(lines)


def metrics_text(result):
    """The result of eval.summarise for the terminal."""
    lines = [f"{result['texts']} texts, {result['videos']} videos"]
    lines.append(text_table(*metrics_table(result)))
    for note in metrics_notes(result):
        lines.append(textwrap.fill(note, 98))
    return "\n".join(lines)


def about_pairs(a):
    """How many pairs, and which, in words."""
    others = "a seeded sample of the irrelevant" if a["irrelevant"]["sampled"] else "all irrelevant"
    return (f"{a['relevant']['pairs']} relevant pairs (a caption and its own video), "
            f"{a['irrelevant']['pairs']} others ({others} ones)")


def analysis_text(a):
    """The result of `analyze` for the terminal."""
    tables = [table(a) for table in (intervals_table, pairs_table, thirds_table)]
    intervals, pairs, complexity = (text_table(*table) for table in tables)
    return f"{intervals}\n\n{about_pairs(a)}\n{pairs}\n\n{complexity}"


# ---- pages ----


def segment_name(segment):
    """File name, and the seconds where it is a part of a file."""
    name = os.path.basename(segment.path)
    if segment == Segment(segment.path):
        return name
    end = "the end" if segment.end is None else f"{segment.end:g} s"
    return f"{name} ({segment.start or 0:g} s to {end})"


def choose_queries(sims, owner, t2v, seed):
    """Best, worst and random texts, of one video each. sims (N,V) -> {title: texts}.

    Best and worst are so by rank, then by the margin to the best wrong video.
    """
    margin = margins(sims, owner).tolist()
    rank = t2v.tolist()
    best = sorted(range(len(rank)), key=lambda i: (rank[i], -margin[i]))
    missed = [i for i in reversed(best) if rank[i] > 1]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(rank), generator=generator).tolist()
    chosen = {}
    seen = set()  # videos: no card shows the answer of another one
    for title, texts, most in (("Best", best, 2), ("Worst", missed, 2), ("Random", shuffled, 4)):
        chosen[title] = []
        for i in texts:
            video = owner[i].item()
            if len(chosen[title]) < most and video not in seen:
                chosen[title].append(i)
                seen.add(video)
    return chosen


def moment(path, page_path, seconds, label):
    """A link from a page to a moment of a video file. label: text. -> HTML."""
    folder = os.path.dirname(os.path.abspath(page_path))
    # The bytes of the name: it need not be Unicode.
    link = os.fsencode(os.path.relpath(path, folder))
    return f'<a href="{quote(link)}#t={seconds:g}">{esc(label)}</a>'


def mass_figure(i, model, scored):
    """Text i's mass beside its right and its nearest wrong video. -> HTML, empty without them."""
    right = scored.ann.owner[i]
    found = scored.sims[i].argsort(descending=True).tolist()
    found.remove(right)
    # With one video alone there is no wrong one, and nothing to compare.
    f = scored.f[[right, *found[:1]]]
    trials, seed, _ = scored.scoring.values()
    points, numbers = measure_mass(model, scored.t[i], f, trials, seed)
    if points is None:
        return ""
    rows = [[name, *(f"{x:.4f}" for x in pair.tolist())] for name, pair in numbers.items()]
    table = html_table(["its mass", "right video", "nearest wrong video"], rows)
    return draw_mass(points) + table


def query_card(i, scored, rank, top, pictures, page_path, mass=""):
    """The best videos of text i, then the right one where it is not among them. -> HTML.

    pictures: segment -> HTML. mass: what `mass_figure` gives.
    """
    sims = scored.sims[i]
    ann = scored.ann
    right = ann.owner[i]
    found = sims.topk(min(top, len(sims))).indices.tolist()
    # Pairs, not a dict: a rank among ties may be the place of another video.
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


def query_cards(model, scored, t2v, page_path):
    """The best videos of chosen texts, and their masses. -> HTML."""
    scored = scored._replace(sims=scored.sims.cpu())
    owner = torch.tensor(scored.ann.owner)
    pictures = functools.cache(strip)  # no video is decoded twice
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


def figures(pictures):
    """{title: chart} -> HTML."""
    cards = ""
    for title, chart in pictures.items():
        cards += f'<div class="card"><h4>{esc(title)}</h4>{chart}</div>'
    return f'<div class="cards">{cards}</div>'


def write_report(path, model, result, a, scored, t2v, log):
    """The page of an evaluation. a: of `analyze`; t2v (N,): the ranks; log: path of train.py's."""
    notes = ""
    for note in metrics_notes(result):
        notes += f'<p class="warn">{esc(note)}</p>'
    pairs = {}
    for title, key, label in (("Similarity, best sample", "similarity", "cos(t_s, v)"),
                              ("Radius of the text mass", "radius", "|R|₁")):
        pairs[title] = histogram_chart(a["histograms"][key], title, label)
    samples = f"{a['trials']} samples"
    if result["expected"]:
        samples = f"best of {a['trials']} on average"
    chart = thirds_chart(a["complexity"], COMPLEXITY, samples)
    complexity = figures({f"t2v R@1 by {COMPLEXITY}": chart})
    body = f"""<section><h2>Metrics</h2>{html_table(*metrics_table(result))}{notes}
<p class="soft">Recall in percent. The intervals are those of a bootstrap over videos, each with all
its texts (seed {a['seed']}): they say nothing about other training seeds.</p>
{html_table(*intervals_table(a))}</section>
<section><h2>Queries</h2><p class="soft">The best videos for chosen captions. A green bar and ✓ mark
the right one; where it is further down, it comes last with its rank. The mass is seen on
the plane through t, the right video's v and the nearest wrong one's, which holds about 2/D of the
samples' spread. h·cos, the cosine shrunk by the mass, and E_M b, a bonus for a wide one, add up to
what the best of {a['trials']} samples is on average.</p>
{query_cards(model, scored, t2v, path)}</section>
<section><h2>Relevant and irrelevant pairs</h2>
<p class="soft">{esc(about_pairs(a))}; shares are of each kind's own pairs.</p>
{html_table(*pairs_table(a))}{figures(pairs)}</section>
<section><h2>Which texts are found</h2><p class="soft">Frame diversity: mean pairwise cosine
distance of a video's frame embeddings. Diamonds: the point text alone, without samples (over all
texts: R@1 {a['point_R1']:.1f}).</p>{complexity}</section>"""
    curves = training_charts(log)
    if curves:
        body += f"<section><h2>Training</h2>{figures(curves)}</section>"
    lead = (f"{result['data']}, split {result['split']}: {result['texts']} captions, "
            f"{result['videos']} videos")
    write_page(path, page("T-MASS: text-video retrieval", lead, body, result))


def write_search_report(path, found, settings):
    """The page of a search. found: {query: [dict(rank, score, file, at, start, end)]}."""
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
    lead = (f"Queries: {len(found)}. Scores order the videos of one query; they are no "
            "probabilities. The framed picture is the frame nearest to the "
            "query, and a name leads to it.")
    body = f'<div class="cards">{cards}</div>'
    write_page(path, page("T-MASS: search results", lead, body, settings))
