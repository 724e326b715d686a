"""README's table "Change it": each row is done here, in as few lines as it says."""
import pytest
import torch
import torch.nn.functional as F
from test_eval import noise_video
from torch import nn

import data
import eval as ev
import tmass
import train
from clip_model import CLIP, Tokenizer
from lib import exact
from lib.video import Segment
from lib.weights import load_checkpoint, save_checkpoint
from tmass import TMASS

D = 64
T = 4


class MaxRadius(nn.Module):
    """R = exp(max_j S_j)."""

    def __init__(self, frames, width):
        super().__init__()

    def forward(self, S):
        return S.amax(-1, keepdim=True).exp()


class CentralRadius(nn.Module):
    """R = exp(S·c), c the larger, the nearer to the middle; it counts on tensors of its own."""

    def __init__(self, frames, width):
        super().__init__()
        self.c = torch.hann_window(frames + 2)[1:-1]
        self.register_buffer("most", torch.tensor(2.0), persistent=False)
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("counts", torch.ones(frames, dtype=torch.bool))
        self.dropout = nn.Dropout(0.5)

    def forward(self, S):
        R = (self.dropout(S)[..., self.counts] @ self.c / self.calls).exp()
        return R.minimum(self.most)[..., None]


class MaxPool(nn.Module):
    """v = max_j f_j."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, t, f):
        return f.amax(1).expand(len(t), -1, -1)


def small_clip():
    return CLIP(embed_dim=D, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
                context_length=16, vocab_size=514, text_width=64, text_layers=1)


def scores_right(model):
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(9, D, generator=generator)
    f = torch.randn(5, T, D, generator=generator)
    literal = model.score(t, f, 6)
    assert (exact.score(model, t, f, 6) - literal).abs().max() < 2e-6
    assert (literal - model.score(t, f, 0)).abs().max() > 1e-3  # the mass counts


@pytest.mark.parametrize("choices, name, added", [("RADII", "max", MaxRadius),
                                                  ("RADII", "central", CentralRadius),
                                                  ("POOLINGS", "max", MaxPool)])
def test_a_radius_or_a_pooling_is_a_class_and_an_entry(choices, name, added, monkeypatch, tmp_path):
    monkeypatch.setitem(getattr(tmass, choices), name, added)
    option = dict(RADII="radius", POOLINGS="pooling")[choices]
    model = TMASS(small_clip(), frames=T, **{option: name}).eval()
    scores_right(model)
    losses = model.losses(torch.randn(3, D), torch.randn(3, T, D))
    losses["loss"].backward()
    save_checkpoint(tmp_path / "m.pt", model, Tokenizer((), 16), {})
    again, _, _ = load_checkpoint(tmp_path / "m.pt")
    scores_right(again)
    t, f = torch.randn(3, D), torch.randn(2, T, D)
    scores = model.score(t, f)
    assert torch.equal(again.score(t, f), scores)
    again.train()  # and nothing is dropped while it scores
    assert torch.equal(again.score(t, f), scores)
    assert (exact.score(again, t, f) - scores).abs().max() < 2e-6
    assert all(part.training for part in again.modules())
    assert train.parser().parse_args([f"--{option}", name])  # and the command line knows it


def test_a_data_set_is_a_reader_and_an_entry(monkeypatch, tmp_path):
    def read_films(root, split, folders):
        for line, text in enumerate((root / f"{split}.txt").read_text().splitlines(), 1):
            name, caption = text.split(" ", 1)
            yield Segment(str(root / name)), caption, f"{split}.txt, row {line}"

    monkeypatch.setitem(data.DATASETS, "films", data.DataSet(read_films, has_val=False))
    for split in ("train", "test"):
        lines = []
        for k in range(4):
            noise_video(tmp_path / f"{split}{k}.mp4", k)
            lines.append(f"{split}{k}.mp4 a noise of kind {k}")
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    out = str(tmp_path / "films.pt")
    # without a recipe of its own it trains with the default one
    arguments = ["--data", "films", "--root", str(tmp_path), "--clip", "tiny", "--frames", "2",
                 "--batch", "2", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    assert train.main([*arguments, "--out", out]) == 0
    assert ev.main(["--ckpt", out, "--workers", "0", "--device", "cpu"]) == 0
    assert data.main(["check", "--data", "films", "--root", str(tmp_path)]) == 0


class ColourAndLetters(nn.Module):
    """An encoder of another kind: mean colour of a picture, counts of letters of a text."""

    def __init__(self):
        super().__init__()
        self.embed_dim = D
        self.image_size = 16
        self.config = {}
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.image = nn.Linear(3, D)
        self.text = nn.Linear(514, D)

    def encode_image(self, pixels):
        return self.image(pixels.float().mean((2, 3)) / 255)

    def encode_text(self, ids):
        return self.text(F.one_hot(ids, 514).float().sum(1))


def test_an_encoder_is_an_object_with_six_members(tmp_path):
    model = TMASS(ColourAndLetters(), frames=T)
    tokenizer = Tokenizer(context_length=16)
    paths = [tmp_path / f"{k}.mp4" for k in range(3)]
    for k, path in enumerate(paths):
        noise_video(path, k)
    pixels = torch.randint(0, 256, (3, T, 3, 16, 16), dtype=torch.uint8)
    model(tokenizer(["a", "b", "c"]), pixels)["loss"].backward()
    model.eval()
    t = ev.encode_texts(model, tokenizer, ["red", "blue"])
    f = ev.encode_videos(model, paths)
    assert exact.score(model, t, f).shape == (2, 3)
