"""`make fuzz`: counts networks, and tells an unsound one with its seed."""

import json
import sys
from dataclasses import replace

import fuzz
import pytest

from equinorm.discovery.trace import Trace
from equinorm.discovery.values import View


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(fuzz, "EACH", 12)


def test_a_seed_draws_the_same_networks_again(monkeypatch):
    drawn = []
    monkeypatch.setattr(fuzz, "looked_at", lambda network, rewrites: drawn.append(repr(network)) or (set(), ""))
    fuzz.run(3, smallest=False, rewrites=False)
    first, drawn[:] = list(drawn), []
    fuzz.run(3, smallest=False, rewrites=False)
    assert drawn == first
    assert len(set(first)) > 6


def test_a_record_holds_counts_and_versions(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--seed", "5", "--output", str(tmp_path / "fuzz.jsonl")])
    assert fuzz.main() == 0
    record = json.loads((tmp_path / "fuzz.jsonl").read_text("utf-8"))
    assert (record["networks"], record["seeds"], record["unsound"], record["failed"]) == (12, [5, 5], 0, 0)
    assert record["free"] > 0
    assert set(record["versions"]) == {"equinorm", "torch", "hypothesis", "python"}
    assert "seed 5" in capsys.readouterr().out


@pytest.mark.slow
def test_an_unsound_rule_is_found(monkeypatch, capsys):
    """As it was: a number added to any function of a parameter counts as one added to the parameter."""
    affine = Trace.affine

    def careless(trace, value, factor, number):
        return affine(trace, replace(value, is_itself=True) if isinstance(value, View) else value, factor, number)

    monkeypatch.setattr(fuzz, "EACH", 60)
    monkeypatch.setattr(Trace, "affine", careless)
    kinds = set()
    for seed in range(3):
        seen, faults = fuzz.run(seed, smallest=False, rewrites=False)
        kinds |= {fault.split(":")[0] for fault in faults}
        assert seen["unsound"] == sum(fault.startswith("unsound") for fault in faults)
        if "unsound" in kinds:
            break
    assert "unsound" in kinds
    assert any(f"of seed {seed}" in fault and "deviation" in fault for fault in faults)
