"""What the tests of the command line share."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from equinorm_command import application

APP = application()
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, with the models of cli_models importable; modules that it writes there go with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    yield tmp_path
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def invoke(*arguments, code=0):
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def record(*arguments, code=0):
    """The JSON object that a command prints, and nothing else."""
    return json.loads(invoke(*arguments, "--json", code=code).stdout, parse_constant=lambda name: pytest.fail(name))


def refusal(*arguments):
    """The one message of a refused command."""
    result = invoke(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


def balanced(model, *more, output="out.safetensors", size="2x8"):
    return record("balance", f"cli_models:{model}", "--input", size, "--output", output, *more)
