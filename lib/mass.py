"""A picture of one text's mass: its samples, with the right video and a wrong one.

The picture is an orthogonal projection onto the plane through t, the right video's v and the wrong
one's v, with the same scale on both axes. Distances between these three points are therefore true.
Nearly all of the noise is perpendicular to the plane and can't be seen.
"""
import torch

from lib import exact
from lib.page import BOTTOM, LEFT, RIGHT, TOP, Axes, draw_legend
from tmass import cosine, stochastic_text, support_text

SAMPLES = 200  # in the picture, for each of the two videos
# The shape of each kind of point, as an SVG path relative to its position. All shapes differ, so
# that none depends on colour. Later kinds are drawn over earlier ones.
MARKS = {
    "wrong": "m-3-3l6 6m0-6l-6 6",
    "right": "h0",
    "frame": "m-4-4h8v8h-8Z",
    "support": "m-6 0l6-6l6 6l-6 6Z",
    "v_right": "m0-7l7 12h-14Z",
    "v_wrong": "m0 7l7-12h-14Z",
    "best": "m-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0",
    "t": "h0",
}
NAMES = {
    "wrong": "sample, R of the wrong video",
    "right": "sample, R of the right video",
    "frame": "frame of the right video",
    "support": "support text",
    "v_right": "v of the right video",
    "v_wrong": "v of the nearest wrong video",
    "best": "best sample for the right video",
    "t": "t, the text",
}
NEAR_T = ("wrong", "right", "best", "t")


@torch.no_grad()
def measure_mass(model, t, f, trials, seed):
    """Measure a text's mass for two videos. t (D,), f (2,T,D) -> points, numbers

    f: the right video, then a wrong one. points: {kind, as in MARKS: (n,2)}, coordinates in the
    plane, with t at (0, 0). numbers: {name: (2,)}, a value for each video. Both are None if nothing
    is sampled, or if f has no wrong video.
    """
    noise = exact.noise_of(model, trials, seed, expected=True)
    if noise is None or len(f) == 1:
        return None, None
    v = model.pool(t[None], f)[0]                               # (2,D)
    R = model.radius(cosine(t, f)).expand_as(v)
    eps = model.noise(trials, seed)                             # (M,D), as in TMASS.score
    best = exact.sample_cosines(t, v, R, eps).max(-1)
    drawn = stochastic_text(t, R[:, None], model.noise(SAMPLES, seed))
    # An orthonormal basis (D,2). On the CPU, because not every device supports QR.
    plane = torch.linalg.qr((v - t).T.cpu()).Q.to(t)
    # QR leaves the signs open: put the right v to the right of t, and the wrong one above it.
    plane = plane * ((v - t) @ plane).diagonal().sign()
    points = dict(
        wrong=drawn[1],
        right=drawn[0],
        frame=f[0],
        support=support_text(t, v[:1], R[:1]),
        v_right=v[:1],
        v_wrong=v[1:],
        best=stochastic_text(t, R[:1], eps[best.indices[:1]]),
        t=t[None],
    )
    shrunk = exact.expected_cosine(t, v, R, *noise[:2], 0)
    spread = R.square()  # the samples' variance in each dimension, up to a constant factor
    return {kind: (x - t) @ plane for kind, x in points.items()}, {
        "|t|": t.norm().expand(2),
        "mean of R": R.mean(1),
        "cos(t, v)": cosine(t, v),
        "cos(t_s, v), best sample": best.values,
        "h·cos": shrunk,
        "E_M b": exact.expected_cosine(t, v, R, *noise) - shrunk,
        "spread in the plane, %": 100 * (spread @ plane.square()).sum(1) / spread.sum(1),
    }


def view(points, kinds, about):
    """Plot the points of some kinds, with the same scale on both axes. about: the label. -> SVG."""
    low, high = torch.cat([points[kind] for kind in kinds]).aminmax(dim=0)
    size = low.new_tensor([RIGHT - LEFT, BOTTOM - TOP])
    half = 0.54 * size * ((high - low) / size).amax().clamp_min(1e-6)
    ends = torch.stack([-half, half], 1) + (low + high)[:, None] / 2
    axes = Axes(*ends.tolist(), about)
    marks = ""
    for kind in kinds:
        path = ""
        for x, y in points[kind].tolist():
            path += f"M{axes.at_x(x)} {axes.at_y(y)}{MARKS[kind]}"
        marks += f'<path class="{kind}" d="{path}"/>'
    return axes.svg(about, marks)


def draw_mass(points):
    """Draw the points of measure_mass: all of them, a close-up of the samples, a legend. -> HTML"""
    wide = view(points, MARKS, "along t → v of the right video")
    near = view(points, NEAR_T, "the same, near t")
    legend = draw_legend(NAMES, {kind: "M13 7" + shape for kind, shape in MARKS.items()})
    return f'<div class="mass">{wide}{near}{legend}</div>'
