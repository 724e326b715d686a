"""One text's mass as a picture: where its samples are, beside the right video and a wrong one.

The picture is an orthogonal projection, at one scale, on the plane through t, the right video's v
and the wrong one's: these three stand where they are. What is at right angles to the plane, as
nearly all of the noise is, can't be seen in it.
"""
import torch
import torch.nn.functional as F

from lib import exact
from tmass import cosine, stochastic_text, support_text

SAMPLES = 200  # that are drawn for each of the two videos


@torch.no_grad()
def measure_mass(model, t, f, trials, seed):
    """A text beside two videos. t (D,), f (2,T,D), the right one first -> dict; None without mass.

    points: {kind of MARKS: places in the plane (n,2)}, t at (0, 0). length: |t|. share: of the
    samples' spread, what lies in the plane (2/D where R is one number). numbers: {name: of both}.
    """
    noise = exact.noise_of(model, trials, seed, expected=True)
    if noise is None:
        return None
    v = model.pool(t[None], f)[0]                               # (2,D)
    R = model.radius(cosine(t, f)).expand_as(v)
    eps = model.noise(trials, seed).to(t)                       # (M,D), as in TMASS.score
    cosines = exact.sample_cosines(t, v, R, eps)                # (2,M)
    drawn = stochastic_text(t, R[:, None], model.noise(SAMPLES, seed).to(t))
    kinds = dict(
        wrong=drawn[1],
        right=drawn[0],
        frame=f[0],
        support=support_text(t, v[:1], R[:1]),
        v_right=v[:1],
        v_wrong=v[1:],
        best=stochastic_text(t, R[:1], eps[cosines[0].argmax()]),
        t=t[None],
    )

    ahead = F.normalize(v[0] - t, dim=0)
    aside = v[1] - t
    aside = F.normalize(aside - (aside @ ahead) * ahead, dim=0)
    plane = torch.stack([ahead, aside], 1)                      # (D,2), orthonormal
    spread = R[0].square()  # of the samples along each axis, but for a factor

    mean, std, largest = noise
    shrunk = exact.expected_cosine(t, v, R, mean, std, 0)
    average = exact.expected_cosine(t, v, R, mean, std, largest)
    numbers = {
        "mean of R": R.mean(1),
        "cos(t, v)": cosine(t, v),
        "cos(t_s, v), best sample": cosines.amax(1),
        "h·cos": shrunk,
        "E_M b": average - shrunk,
        "h·cos + E_M b": average,
    }
    return dict(
        points={kind: (x - t) @ plane for kind, x in kinds.items()},
        length=t.norm().item(),
        share=(spread @ plane.square()).sum().item() / spread.sum().item(),
        numbers={name: x.tolist() for name, x in numbers.items()},
    )


# ---- the picture ----

WIDTH = 480
HEIGHT = 240  # of each of two views
MARGIN = 20
ARROW = 70    # pixels of the lines from t towards both v
# Each kind has a shape of its own, so that nothing depends on colour: what follows a mark's place
# in an SVG path, and what it stands for. Later kinds lie on earlier ones.
MARKS = {
    "wrong": ("m-3-3l6 6m0-6l-6 6", "sample, R of the wrong video"),
    "right": ("h0", "sample, R of the right video"),
    "frame": ("m-4-4h8v8h-8Z", "frame of the right video"),
    "support": ("m-8 0l8-8l8 8l-8 8Z", "support text"),
    "v_right": ("m0-9l8 14h-16Z", "v of the right video"),
    "v_wrong": ("m0 9l8-14h-16Z", "v of the nearest wrong one"),
    "best": ("m-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0", "best sample, right video"),
    "t": ("h0", "t, the text"),
}
# Colours of its own: the picture is also a file, outside the page that has others.
STYLE = """
.mass text{font:14px system-ui,sans-serif;fill:#5b616b}
.mass path{fill:none;stroke:#1f5fbf;stroke-width:1.6;stroke-linecap:round}
.mass .wrong,.mass .v_wrong{stroke:#a35c00;stroke-width:1.2}.mass .v_wrong{stroke-width:2}
.mass .right{stroke-width:4.4}.mass .v_right{fill:#1f5fbf}
.mass .frame,.mass .line{stroke:#7a828e;stroke-width:1.2}
.mass .best,.mass .t{stroke:#d1242f;stroke-width:2.4}.mass .t{stroke-width:11}
@media(prefers-color-scheme:dark){.mass text{fill:#a2a8b3}.mass path{stroke:#7fb0ff}
.mass .wrong,.mass .v_wrong{stroke:#e0b050}.mass .frame,.mass .line{stroke:#8b949e}
.mass .v_right{fill:#7fb0ff}.mass .best,.mass .t{stroke:#ff7b72}}
"""


def path(kind, places, shape):
    """places: pixels from the left and the top (n,2) -> a mark at each of them."""
    marks = "".join(f"M{x:.1f} {y:.1f}{shape}" for x, y in places.tolist())
    return f'<path class="{kind}" d="{marks}"/>'


def view(points, framed, top, title):
    """All that lies in a box around the framed kinds, from `top` pixels on. -> SVG"""
    seen = torch.cat([points[kind] for kind in framed])
    low = seen.amin(0)
    high = seen.amax(0)
    room = low.new_tensor([WIDTH, HEIGHT]) - 2 * MARGIN
    scale = (room / (high - low).clamp_min(1e-9)).amin()
    down = low.new_tensor([scale, -scale])  # y grows downwards in a picture
    corner = low.new_tensor([MARGIN, top + MARGIN])
    places = {kind: (x - (low + high) / 2) * down + room / 2 for kind, x in points.items()}
    svg = f'<text x="{MARGIN}" y="{top}">{title}</text>'
    for kind in ("v_right", "v_wrong"):
        x, y = (F.normalize(places[kind] - places["t"]) * ARROW)[0].tolist()
        svg += path("line", places["t"] + corner, f"l{x:.1f} {y:.1f}")
    for kind, (shape, _) in MARKS.items():
        x = places[kind]
        inside = (x > -1) & (x < room + 1)
        svg += path(kind, x[inside.all(1)] + corner, shape)
    return svg


def draw_mass(mass):
    """The dict of measure_mass -> SVG: all of it, the samples from near by, a key."""
    points = {kind: x.cpu() for kind, x in mass["points"].items()}
    svg = view(points, MARKS, 16, "the plane through t and both v, at one scale")
    svg += view(points, ("wrong", "right", "best", "t"), HEIGHT + 32, "the same, near t")
    for n, (kind, (shape, name)) in enumerate(MARKS.items()):
        place = torch.tensor([[16 + n % 2 * 235, 2 * HEIGHT + 56 + n // 2 * 24]])
        x, y = place[0].tolist()
        svg += path(kind, place, shape) + f'<text x="{x + 16}" y="{y + 5}">{name}</text>'
    return (f'<svg class="mass" role="img" viewBox="0 0 {WIDTH} {2 * HEIGHT + 144}" '
            f'aria-label="the text mass"><style>{STYLE}</style>{svg}</svg>')
