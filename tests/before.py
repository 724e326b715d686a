"""What test_search, test_index and test_serve took from test_eval, until they are rewritten."""
import sys

import pytest
import torch
import torch.nn.functional as F
from videos import write_video

import eval as ev
from clip_model import CLIP, Tokenizer
from lib.weights import save_checkpoint
from tmass import TMASS

D, T = 64, 4
ENV = {"OMP_NUM_THREADS": "1"}


def make(**method):
    torch.manual_seed(0)
    clip = CLIP(embed_dim=D, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
                context_length=16, vocab_size=514, text_width=64, text_layers=1)
    model = TMASS(clip, **{"frames": T, "dropout": 0.0, **method}).eval()
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += 0.1 * torch.randn_like(p)
    if model.config["pooling"] == "xpool":
        model.pool.q.weight.data *= 10  # attention sharp enough for the text to matter
    return model


def noise_video(path, seed):
    g = torch.Generator().manual_seed(seed)
    frames = F.interpolate(torch.rand(6, 3, 4, 4, generator=g), size=(32, 48)) * 255
    write_video(path, frames.permute(0, 2, 3, 1).byte().contiguous())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven videos; a caption each in one.csv, up to three in many.csv, of which model.pt is."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "videos").mkdir()
    one = ["video,caption"]
    many = ["video,caption,split"]
    for v in range(7):
        noise_video(folder / "videos" / f"v{v}.mp4", v)
        # at most 16 byte-level tokens, or they would all be cut to the same
        one.append(f"v{v}.mp4,{'ab cdefg'[v:]} {v}")
        many += [f"v{v}.mp4,{i} of {v},test" for i in range(v % 3 + 1)]
    many += ["v0.mp4,someone,test", "v1.mp4,someone,test"]  # one text, two owners: an exact tie
    (folder / "one.csv").write_text("\n".join(one) + "\n")
    (folder / "many.csv").write_text("\n".join(many) + "\n")
    config = dict(data=str(folder / "many.csv"), root=str(folder / "videos"), seed=24)
    save_checkpoint(folder / "model.pt", make(), Tokenizer((), 16), config)
    return folder


def called(capsys, monkeypatch, *args, program=ev):
    """A command line in this process, for the many ways to get it wrong. -> (status, out, err)."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, args)])
    try:
        status = ev.run(program.main)
    except SystemExit as e:  # argparse
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


def one_error(status, out, err, *words):
    """Exit status 2 and a last line that says why, no traceback."""
    last = (err.strip().splitlines() or [""])[-1]
    says = "error: " in last and all(word in last for word in words)
    return status == 2 and says and "Traceback" not in err


def inodes(*folders):
    """What is there, and whether it is still the same file."""
    files = [x for folder in folders for x in folder.iterdir()]
    return sorted((x, x.lstat().st_mode, x.lstat().st_ino, x.lstat().st_size) for x in files)
