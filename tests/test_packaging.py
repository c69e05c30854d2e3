"""What installs with the library, and with each extra; `make dist` checks the archives themselves."""

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
UPPER = ("reporting", "checkpoints", "cli", "experiments", "integrations")
"""Folders that may need an extra."""

APART = {"llmcompressor"}
"""What `make` does not install: it needs an older transformers than the tests do."""


def packages(lines: list[str]) -> set[str]:
    return {re.split(r"[^\w\[\]-]", line)[0] for line in lines}


def imported(path: Path) -> set[str]:
    """Packages that a file imports, wherever in it, and by `needed` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "needed":
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            found |= {str(name.value).partition(".")[0]} if isinstance(name, ast.Constant) else set()
    return found - set(sys.stdlib_module_names) - {"equinorm", "equinorm_command"}


def files(*folders: str) -> list[Path]:
    package = ROOT / "src" / "equinorm"
    return [p for p in package.rglob("*.py") if (p.relative_to(package).parts[0] in folders) == bool(folders)]


def test_library_needs_torch_and_numpy_alone():
    assert packages(PROJECT["dependencies"]) == {"torch", "numpy"}
    assignment = ROOT / "src" / "equinorm" / "permuting" / "assignment.py"
    core = [path for path in files() if path not in [*files(*UPPER), assignment]]
    assert set().union(*map(imported, core)) == {"torch", "numpy"}
    assert imported(assignment) - {"torch", "numpy"} == packages(EXTRAS["align"])  # when an assignment is asked for


def test_command_line_needs_its_extra_alone():
    assert packages(EXTRAS["cli"]) == {"rich", "typer", "safetensors", "matplotlib"}
    needed = set().union(*map(imported, files("reporting", "cli")))
    assert needed == packages(EXTRAS["cli"]) | {"torch", "numpy", "sklearn"}  # the last for `demo`


def test_checkpoints_need_what_writes_them_and_what_knows_their_keys():
    assert set().union(*map(imported, files("checkpoints"))) == {"torch", "safetensors", "transformers"}


def test_entry_point_knows_the_extra():
    import equinorm_command

    assert set(equinorm_command.NEEDED) == packages(EXTRAS["cli"])


@pytest.mark.parametrize("extra", ["demo", "experiments"])
def test_extras_for_commands_include_the_command_line(extra):
    assert "equinorm[cli]" in packages(EXTRAS[extra])


def test_extras_that_errors_name_exist():
    texts = [path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"'equinorm\[([\w-]+)\]'", text)}
    assert {"cli", "demo", "experiments"} <= named <= set(EXTRAS)


def test_everything_that_installs_is_pinned():
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line}
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    wanted = packages([line for lines in [PROJECT["dependencies"], *EXTRAS.values(), *groups.values()] for line in lines])
    assert {re.sub(r"\[.*", "", name) for name in wanted} - {"equinorm"} - APART <= pinned
