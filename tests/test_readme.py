"""What README and docs/training.md say of the project exists: files, options, functions; the text
they give to copy works.
"""

import functools
import inspect
import json
import pickle
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import tmass
from lib.shapes import tiny_clip
from lib.weights import save_checkpoint

README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.S | re.M)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README + TRAINING, flags=re.S))
COMMANDS = [re.split(r"\s+#\s", line)[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS += [code for code in INLINE if re.match(r"(pip|python|torchrun) ", code)]
SCRIPTS = ("train.py", "eval.py", "search.py", "data.py", "lib/shapes.py")


@pytest.mark.parametrize("page", ["README.md", "study/STUDY.md"])
def test_every_link_into_the_project_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    ours = [link for link in links if not link.startswith("http")]
    assert ours
    for link in ours:
        assert ((ROOT / page).parent / link).exists(), link


def test_the_picture_needs_nothing_from_outside():
    tags = [
        element.tag.split("}")[1]
        for element in ElementTree.parse(ROOT / ".github/method.svg").iter()
    ]
    assert {"circle", "text", "style"} <= set(tags) and not {
        "script",
        "image",
        "foreignObject",
    } & set(tags)
    assert "@import" not in (ROOT / ".github/method.svg").read_text()


def test_every_program_is_named_in_reading_order():
    files = re.findall(r"^(?:\| )?\[(\w+\.py)\]\(\1\)", README.split("## The five")[1], re.M)
    assert files[:6] == ["tmass.py", "clip_model.py", "data.py", "train.py", "eval.py", "search.py"]
    assert sorted(files[:6]) == sorted(path.name for path in ROOT.glob("*.py"))


def test_each_equation_names_a_function_that_exists():
    table = README.split("## The method")[1].split("## Data")[0]
    names = re.findall(r"\| `([A-Za-z_.]+)` \|$", table, re.M)
    assert len(names) == 5
    for name in names:
        assert callable(functools.reduce(getattr, name.split("."), tmass)), name


@pytest.fixture(scope="module")
def helps(run):
    """{script: its --help}"""
    return {
        script: run(script, *(["check"] if script == "data.py" else []), "--help").stdout
        for script in SCRIPTS
    }


def test_every_option_in_a_command_exists_in_that_program(helps):
    seen = 0
    for command in COMMANDS:
        script = re.search(r"\b(?:train|eval|search|data|shapes)\.py", command)
        for option in re.findall(
            r"(?<!\S)--?[a-z][a-z-]*", command.split(script[0])[1] if script else ""
        ):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", helps[script[0]]), (
                f"README: {command}: {option}"
            )
            seen += 1
    assert seen > 20


def test_every_option_in_the_text_exists_in_some_program(helps):
    options = {code.split()[0] for code in INLINE if code.startswith("-")}
    assert len(options) > 12
    for option in options:
        assert any(re.search(rf"(?<![\w-]){option}(?![\w-])", text) for text in helps.values()), (
            option
        )


def test_every_data_set_has_a_row_and_a_place_to_look():
    table = README.split("## Data")[1].split("## Train")[0]
    for name in data.DATASETS:
        row = next(line for line in table.splitlines() if re.match(rf"\|[^|]*`{name}`", line))
        assert "https://" in row, name


def test_the_lines_that_convert_msvds_pickle_give_what_the_reader_reads(tmp_path):
    code = "import json, pickle" + inspect.getdoc(data.read_msvd).split(":", 2)[2]
    with open(tmp_path / "raw-captions.pkl", "wb") as file:
        pickle.dump(
            {"a_0_5": [["a", "dog", "runs"], ["it", "runs"]], "b_1_2": [["a", "cat"]]}, file
        )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    captions = json.loads((tmp_path / "captions_msvd.json").read_text())
    assert captions == {"a_0_5": ["a dog runs", "it runs"], "b_1_2": ["a cat"]}
    (tmp_path / "test_list.txt").write_text("a_0_5\nb_1_2\n")
    (tmp_path / "videos").mkdir()
    for name in captions:
        (tmp_path / "videos" / f"{name}.avi").touch()
    read = data.load_annotations("msvd", tmp_path, "test")
    assert list(read.captions) == ["a dog runs", "it runs", "a cat"] and list(read.owner) == [
        0,
        0,
        1,
    ]


def test_embeddings_from_anywhere_are_scored(tmp_path, monkeypatch):
    """The Python of docs/training.md."""
    N, V, T, D = 12, 5, 4, 128
    torch.manual_seed(0)
    clip, tokenizer = tiny_clip(["a red star", "a blue ring"])
    linear = tmass.TMASS(clip, frames=T).eval()
    save_checkpoint(tmp_path / "model.pt", linear, tokenizer, {})
    t = torch.randn(N, D)
    f = torch.randn(V, T, D)
    owner = np.arange(N, dtype=np.int32) % V
    np.savez(tmp_path / "features.npz", t=t.double().numpy(), f=f.numpy(), owner=owner)
    monkeypatch.chdir(tmp_path)
    whole, pooled, *_ = re.findall(r"^```python\n(.*?)^```$", TRAINING, re.S | re.M)
    names = {}
    exec(whole, names)
    literal = linear.score(t, f)
    assert torch.allclose(names["sims"], literal, atol=1e-5)
    assert ((names["t2v"] == 1).numpy() == (literal.argmax(1).numpy() == owner)).all()
    assert len(names["v2t"]) == V

    # What it says of videos of one vector each: any radius but one that is linear in other frames.
    names["f"] = f.mean(1)
    with pytest.raises(ValueError):
        exec(pooled, names)
    for frames, radius in ((T, "none"), (T, "mean"), (T, "scaled"), (1, "linear")):
        names["model"] = tmass.TMASS(clip, frames=frames, radius=radius).eval()
        exec(pooled, names)
        assert torch.allclose(names["sims"], names["model"].score(t, f.mean(1)[:, None]), atol=1e-5)
