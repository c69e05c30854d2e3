"""Each command stands in a file of its own name and knows nothing of the others."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import source
from cli_tools import APP
from typer.main import get_command
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


@pytest.mark.parametrize("columns", [50, 80, 99, 100])
def test_names_of_options_are_whole_in_terminals_of_any_width(columns):
    plain = {**os.environ, "COLUMNS": str(columns), "TERMINAL_WIDTH": "", "NO_COLOR": "1", "TERM": "dumb"}
    ran = subprocess.run([sys.executable, "-c", source.ALL_HELP], capture_output=True, text=True, check=True, env=plain)
    told = json.loads(ran.stdout)
    for name, command in get_command(APP).commands.items():
        assert " ".join(command.help.split("\n\n")[0].split()) in words(told[""])
        assert max(map(len, told[name].splitlines())) <= columns
        written = re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?!…)", told[name])
        assert {text for one in command.params for text in (*one.opts, *one.secondary_opts) if text[0] == "-"} <= {*written}, (
            name
        )


def words(text):
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_needs_no_torch():
    program = source.ALL_HELP + "print(sorted({'equinorm', 'numpy', 'torch'} & sys.modules.keys()), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout).keys() == {"", *COMMANDS}
    assert ran.stderr == "[]\n"
