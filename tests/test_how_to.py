"""What the pages tell a reader to run does run, in order, and prints what they say it prints."""

# ruff: noqa: E402 -- the benchmarks are no part of the package

import contextlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from equinorm_command import main

ROOT = Path(__file__).parents[1]

from zoo import from_torchvision as zoo_torchvision

with contextlib.suppress(ImportError):  # transformers imports torchvision, whose compiled operators may be missing here
    zoo_torchvision.import_models()

PAGES = [*sorted((ROOT / "docs").glob("how-to-*.md")), ROOT / "README.md"]
PAGES.remove(ROOT / "docs" / "how-to-sharded.md")  # it takes two processes: tests/sharding runs it
PAGES += [
    ROOT / "docs" / f"{name}.md" for name in ("architecture", "getting-started", "index", "models", "permutations", "rules")
]

NEEDS = {"how-to-onnx": ("onnx", "onnxscript", "onnxruntime"), "how-to-hugging-face": ("transformers",)}
NEEDS |= dict.fromkeys(["how-to-checkpoints", "how-to-scale-groups"], ("transformers",))
NEEDS |= {"how-to-quantization-tools": ("torchao", "onnx", "onnxscript", "onnxruntime", "sklearn")}
NEEDS |= dict.fromkeys(["how-to-quantize"], ("sklearn",))
"""What a page needs that the tests need not have."""

BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
SMALL = 1e-5
"""Below this a number is rounding, and differs from machine to machine."""

SECONDS = re.compile(r"\b\d+ s\b")
"""How long something took."""


def same_text(printed, expected):
    """Equal word by word, and number by number to 3 %; rounding errors, seconds and what stands for `…` may be anything."""
    printed, expected = (SECONDS.sub("0 s", text) for text in (printed, expected))
    said, wanted = NUMBER.findall(printed), NUMBER.findall(expected)
    words = re.escape(NUMBER.sub("0", " ".join(expected.split()))).replace("…", ".*")
    if not re.fullmatch(words, NUMBER.sub("0", " ".join(printed.split()))):
        return False
    if "…" in expected:
        return True
    pairs = [(float(a), float(b)) for a, b in zip(said, wanted, strict=True)]
    return all(a == b or max(abs(a), abs(b)) < SMALL or abs(a - b) <= 0.03 * max(abs(a), abs(b)) for a, b in pairs)


def run_console(text, monkeypatch, capsys):
    """Run each line after `$ equinorm`, which ends with 0 or says `# exit code 1`; other commands are for the reader."""
    for line in re.findall(r"^\$ equinorm (.*)$", text.replace("\\\n", " "), re.MULTILINE):
        monkeypatch.setattr(sys, "argv", ["equinorm", *shlex.split(line, comments=True)])
        with pytest.raises(SystemExit) as ended:
            main()
        wanted = int((re.findall(r"# exit code (\d)", line) or [0])[0])
        assert int(ended.value.code or 0) == wanted, f"equinorm {line} ended with {ended.value.code}: {capsys.readouterr()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_in_order_and_print_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    if missing := [name for name in NEEDS.get(page.stem, ()) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    generator, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    names, printed, ran = {"__name__": "__main__"}, None, 0
    try:
        for kind, text in BLOCK.findall(page.read_text("utf-8")):
            if kind == "text":
                if printed is not None:
                    assert same_text(printed, text), f"{page.name} says it prints\n{text}\nand it prints\n{printed}"
                printed = None
                continue
            if kind == "python":
                exec(compile(text, page.name, "exec"), names)
            else:
                run_console(text, monkeypatch, capsys)
            printed, ran = capsys.readouterr().out, ran + 1
    finally:
        torch.random.set_rng_state(generator)
        torch.set_default_dtype(dtype)
    assert ran


def test_a_wrong_output_is_noticed():
    assert same_text("norm 2.001 → 1, rounding 3e-9", "norm 2 → 1, rounding 5.2e-10")
    assert not same_text("norm 2.2 → 1", "norm 2 → 1")
    assert not same_text("norm 2 → 1", "norm 2 → 1 and more")
    assert same_text("norm 2 → 1 and more", "norm 2 → 1 …")
