"""The notebooks in examples/ run from top to bottom, and what is committed of them is what they show."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks need nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="the notebooks need nbclient and ipykernel")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
SECONDS = 600
"""Limit of one cell: under a minute for a whole notebook on two free cores, and tests share theirs."""


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """Lines without numbers, which differ between machines after training."""
    texts = [output.text for cell in code(notebook) for output in cell.outputs if output.output_type == "stream"]
    return ["".join(c for c in line if c not in "0123456789.%-+e") for line in "".join(texts).splitlines()]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the kernel's own machinery
def test_notebook_runs_and_shows_what_is_committed(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    committed = nbformat.read(path, as_version=4)
    assert all(cell.execution_count for cell in code(committed)), "run the notebook before it is committed"
    assert path.stat().st_size < 150_000, "outputs of committed notebooks are small"
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(notebook) == printed(committed)
    if os.environ.get("EQUINORM_WRITE_NOTEBOOKS"):
        nbformat.write(notebook, path)
