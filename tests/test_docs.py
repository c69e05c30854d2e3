"""What the pages say of measurements is what the files of results say; of rules and commands, what the source says."""
# ruff: noqa: E402 -- the script that fills the pages is no part of the package

from pathlib import Path

import pytest
import torch

import equinorm
from equinorm.rescaling import optimizer_laws

ROOT = Path(__file__).parents[1]

import fill
import source

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_results_and_source(page):
    text = page.read_text("utf-8")
    assert fill.filled(text) == text, "run `make docs`, which writes the tables, and commit what it changes"


def test_every_marker_is_known_and_closed():
    count = 0
    for page in PAGES:
        for name in fill.OPENING.findall(page.read_text("utf-8")):
            assert name in fill.MARKERS, f"{page.name}: {name}"
            count += 1
    assert count > 30
    filled = fill._FILLED.findall("".join(page.read_text("utf-8") for page in PAGES))
    assert len(filled) == count


def test_filling_replaces_what_stood_there():
    text = "a <!-- one x -->old<!-- end --> b\n\n<!-- one y z -->\nold\n<!-- end -->\n"
    made = fill.filled(text, {"one": lambda *words: f"[{'+'.join(words)}]"})
    assert made == "a <!-- one x -->[x]<!-- end --> b\n\n<!-- one y z -->\n\n[y+z]\n\n<!-- end -->\n"


def test_optimizers_of_users_are_not_in_the_table(monkeypatch):
    monkeypatch.setattr(optimizer_laws, "LAWS", dict(optimizer_laws.LAWS))
    monkeypatch.setattr(source, "LAWS", optimizer_laws.LAWS)
    before = source.optimizers()
    equinorm.register_optimizer(type("Mine", (torch.optim.SGD,), {}), like=torch.optim.SGD)
    assert "Mine" in [kind.__name__ for kind in source.LAWS]
    assert source.optimizers() == before
