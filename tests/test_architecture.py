"""The architecture: a stack of modules, each of which knows only those below it, and a core without output or files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "equinorm"

CORE = [
    "_errors",
    "_arguments",
    "native",
    "_modules",
    "_addresses",
    "_holders",
    "_snapshot",
    "_observed",
    "_opaque",
    "_classes",
    "_labels",
    "_values",
    "_trace",
    "rules._registry",
    "rules._movement",
    "rules._placement",
    "rules._inhomogeneous",
    "rules._elementwise",
    "rules._reduction",
    "rules._normalization",
    "rules._contraction",
    "rules._algebra",
    "rules._recurrent",
    "rules",
    "_mutation",
    "_choices",
    "_interpret",
    "_export",
    "_scaling",
    "_register",
    "_optimizers",
    "_compiled",
    "_decay",
    "_blocks",
    "_writing",
    "_rescale",
    "_casts",
    "_layout",
    "native._dense",
    "native._program",
    "_reading",
    "_streams",
    "_energy",
    "_families",
    "_rank_one",
    "_policies",
    "_active",
    "_maximum",
    "_system",
    "_solve",
    "_balance",
    "_watch",
    "_symmetries",
    "_deviation",
    "_equivalence",
    "_cycle",
    "_biases",
    "_matrices",
    "_mover",
    "_frozen",
    "_plan",
    "_training",
    "equinorm",
]
"""From graphs to results, bottom up: classes, labels, rules, discovery, rescaling, solving, the public names."""

EXPERIMENTS = [
    "_runs",
    "_data",
    "_folders",
    "_networks",
    "_paths",
    "_results",
    "_pictures",
    "_training",
    "_workers",
    "_protocol",
    "_groups",
    "_axes",
    "_figures",
    "_presets",
    "_command",
]
"""Configurations, data, networks, one run, many runs, what the commands do with them."""

COMMAND_LINE = [
    *["_records", "_weights", "_models", "_options", "_files", "_terminal", "_verify", "_demo", "_tables", "_report"],
    *["experiments", *(f"experiments.{name}" for name in EXPERIMENTS)],
    "cli",
]
"""On top of the public names: records, reading, writing, printing, what each command does, how it looks."""

INTEGRATIONS = ["integrations", "integrations.lightning", "integrations.transformers"]
"""ENorm in other training loops; nothing else imports them."""

ORDER = CORE + COMMAND_LINE + INTEGRATIONS

LIMIT = 320
"""Lines of one file."""

OUTPUT_CALLS = "print open input unlink read_text read_bytes write_text write_bytes load save"
OUTPUT_PACKAGES = "io logging matplotlib pathlib rich safetensors shutil subprocess tempfile typer"


def path_of(name: str) -> Path:
    inner = PACKAGE if name == "equinorm" else PACKAGE.joinpath(*name.split("."))
    return inner / "__init__.py" if inner.is_dir() else inner.with_suffix(".py")


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node outside of `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes(node)


def imported(name: str) -> Iterator[str]:
    """Dotted names that a module imports, at the top or inside of functions."""
    for node in nodes(ast.parse(path_of(name).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("equinorm.") in ORDER else str(node.module)


def test_order_names_every_module():
    found = set(PACKAGE.rglob("*.py"))
    assert found == {path_of(name) for name in ORDER}
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_modules_below(name):
    own = {target.removeprefix("equinorm.") for target in imported(name) if target.split(".")[0] == "equinorm"}
    assert own <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_files_stay_short(name):
    assert len(path_of(name).read_text("utf-8").splitlines()) <= LIMIT


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.[ch]pp")), ids=lambda path: path.name)
def test_sources_of_kernels_stay_short(path):
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= LIMIT
    assert max(map(len, lines)) <= 128


@pytest.mark.parametrize("name", CORE)
def test_core_neither_prints_nor_touches_files(name):
    tree = ast.parse(path_of(name).read_text("utf-8"))
    called = {ast.unparse(node.func).rpartition(".")[2] for node in nodes(tree) if isinstance(node, ast.Call)}
    assert not called & set(OUTPUT_CALLS.split())
    compiler = {"pathlib", "shutil", "subprocess", "tempfile"}
    allowed = {"_export": {"io", "logging"}, "native": compiler}.get(name, set())  # to keep the exporter quiet; to compile
    assert not {target.split(".")[0] for target in imported(name)} & set(OUTPUT_PACKAGES.split()) - allowed
