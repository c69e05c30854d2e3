"""Each command stands in a file of its own name and knows nothing of the others."""

import ast
import inspect
import sys

import pytest
from cli_tools import APP

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
