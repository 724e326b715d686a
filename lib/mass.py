"""One text's mass as a picture: where its samples are, beside the right video and a wrong one.

The picture is an orthogonal projection, at one scale, on the plane through t, the right video's v
and the wrong one's: these three stand where they are. What is at right angles to the plane, as
nearly all of the noise is, can't be seen in it.
"""
import torch

from lib import exact
from lib.page import BOTTOM, LEFT, RIGHT, TOP, Axes, draw_legend
from tmass import cosine, stochastic_text, support_text

SAMPLES = 200  # that are drawn for each of the two videos
# Each kind of point has a shape of its own, so that nothing depends on colour: what follows its
# place in an SVG path. Later kinds lie on earlier ones.
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
    """A text beside two videos. t (D,), f (2,T,D), the right one first -> points, numbers.

    points: {kind of MARKS: places in the plane (n,2)}, t at (0, 0). numbers: {name: (2,)}. Both are
    None where nothing is sampled, or there is no wrong video.
    """
    noise = exact.noise_of(model, trials, seed, expected=True)
    if noise is None or len(f) == 1:
        return None, None
    v = model.pool(t[None], f)[0]                               # (2,D)
    R = model.radius(cosine(t, f)).expand_as(v)
    eps = model.noise(trials, seed)                             # (M,D), as in TMASS.score
    best = exact.sample_cosines(t, v, R, eps).max(-1)
    drawn = stochastic_text(t, R[:, None], model.noise(SAMPLES, seed))
    # Orthonormal (D,2); on the CPU, as not every device can do it.
    plane = torch.linalg.qr((v - t).T.cpu()).Q.to(t)
    # The right v lies to the right of t, and the wrong one above: QR leaves the signs open.
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
    spread = R.square()  # of the samples, in each dimension, but for a factor
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
    """The points of some kinds, at one scale. -> SVG."""
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
    """The points of measure_mass -> HTML: all of them, the samples from near by, and a key."""
    wide = view(points, MARKS, "along t → v of the right video")
    near = view(points, NEAR_T, "the same, near t")
    legend = draw_legend(NAMES, {kind: "M13 7" + shape for kind, shape in MARKS.items()})
    return f'<div class="mass">{wide}{near}{legend}</div>'
