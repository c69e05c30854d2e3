"""The library needs nothing that only the command line needs, and the command says what it misses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
LIBRARY = """
import torch, equinorm
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
x = (torch.randn(3, 4),)
equinorm.balance_(model, x)
assert equinorm.symmetries(model, x).num_free == 8
equinorm.ENorm(torch.optim.SGD(model.parameters(), lr=0.1), model, x)
"""


def python(program, *arguments, missing):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", WITHOUT.format(missing=missing) + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_library_works_without_what_commands_need():
    ran = python(LIBRARY, missing=["matplotlib", "rich", "typer", "click"])
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("program", ["import equinorm_command as c; c.main()", "import equinorm.cli.__main__"])
@pytest.mark.parametrize("missing", ["matplotlib", "rich", "typer"])
def test_the_command_names_the_extra_in_one_sentence(program, missing):
    ran = python(program, "demo", missing=[missing])
    advice = f"the command line needs {missing}, which the library alone does not. Run pip install 'equinorm[cli]'."
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"error: {advice}\n")


def test_what_is_missing_is_json_with_json():
    ran = python("import equinorm_command as c; c.main()", "demo", "--json", missing=["rich", "typer", "matplotlib"])
    error = json.loads(ran.stdout)["error"]
    assert (ran.returncode, error["exit_code"], error["kind"]) == (2, 2, "ModuleNotFoundError")
    assert "needs matplotlib, rich and typer, which" in error["message"]
