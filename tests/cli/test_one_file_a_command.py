"""Each command stands in a file of its own name and knows nothing of the others."""

import ast
import inspect
import json
import subprocess
import sys

import pytest
import source
from cli_tools import APP
from typer.testing import CliRunner

import equinorm_command

COMMANDS = {command.callback.__name__: command.callback for command in APP.registered_commands}


def test_commands_in_the_order_of_use():
    order = ["inspect", "balance", "equalize", "apply", "compare", "align", "canonical", "demo", "train", "figures"]
    assert [*COMMANDS] == order == [*equinorm_command.COMMANDS]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_told_in_one_file(name):
    assert COMMANDS[name].__module__ == f"equinorm.cli.{name}"
    tree = ast.parse(inspect.getsource(sys.modules[f"equinorm.cli.{name}"]))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "equinorm.cli.terminal" in imported
    assert not imported & {f"equinorm.cli.{other}" for other in COMMANDS}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_that_of_the_command_without_importing_it(name):
    """What is read from the file of a command says what the command says."""
    asked = [*name.split(), "--help"]
    assert asked in equinorm_command.LIGHT
    found = equinorm_command.assembled(equinorm_command.described([name] if name else COMMANDS))
    light, full = (CliRunner().invoke(app, asked) for app in (found, APP))
    assert (light.exit_code, light.stdout) == (0, full.stdout)


def test_help_needs_no_torch():
    program = source.ALL_HELP + "print(sorted({'equinorm', 'numpy', 'torch'} & sys.modules.keys()), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout).keys() == {"", *COMMANDS}
    assert ran.stderr == "[]\n"
