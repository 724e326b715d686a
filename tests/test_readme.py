"""What README and the pages of docs/ say of the project exists: files, options, functions.

Their commands and their Python are run in test_end_to_end.py.
"""
import functools
import re

import pytest
from conftest import PAGES, ROOT

import data
import eval as ev
import search
import tmass
import train
from lib import shapes

TORCHRUN = {"--nproc", "--nnodes", "--rdzv"}
TEXT = "\n".join(page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "study/STUDY.md"], ids=lambda page: page.name)
def test_every_link_into_the_project_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_each_equation_names_a_function_that_exists():
    names = re.findall(r"\| `([A-Za-z_.]+)` \|$", TEXT, re.M)
    assert len(names) >= 5
    for name in names:
        assert callable(functools.reduce(getattr, name.split("."), tmass)), name


def test_every_option_exists_in_some_program(capsys):
    for main in (train.main, ev.main, search.main, data.main, shapes.main):
        for words in (["--help"], ["check", "--help"]):
            with pytest.raises(SystemExit):
                main(words)
    helps = capsys.readouterr().out
    options = set(re.findall(r"(?<=[` \[])--[a-z][a-z-]*", TEXT)) - TORCHRUN
    assert len(options) > 20
    for option in options:
        assert re.search(rf"{option}(?![\w-])", helps), option


def test_every_data_set_has_a_row_and_a_place_to_look():
    for name in data.DATASETS:
        assert re.search(rf"^\|[^|]*`{name}`.*https://", TEXT, re.M), name
