"""The architecture: floors that know only those below them, folders without circles, and a core without output or files."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "equinorm"

FLOORS = [
    *["_errors", "_display", "native", "_memory", "modules", "_arguments", "_scaling", "_class_ids", "sharding"],
    *["discovery", "rescaling", "permuting", "balancing", "grouping", "_symmetries", "_deviation", "quantization", "joining"],
    *["training", "rules", "__init__"],
    *["reporting", "checkpoints", "experiments", "integrations", "cli", "__main__"],
]
"""Folders and files at the package's root, from the ground up."""

CORE = FLOORS[: FLOORS.index("__init__") + 1]
"""Floors that neither print nor touch files."""

STRANGERS = {
    "modules": ["native", "_display"],
    "native": ["_memory", "modules", "_scaling"],
    "rescaling": ["discovery"],
    "sharding": ["native"],
    "balancing": ["discovery", "permuting"],
    "grouping": ["balancing", "permuting", "discovery.graph", "discovery.rules"],
    "permuting.laws": ["discovery.graph", "permuting.interpreter", "permuting.discover"],
    "reporting": ["discovery", "rescaling", "training", "_symmetries", "joining", "__init__"],
    "discovery.graph": ["discovery.rules", "discovery.interpreter", "discovery.resolve"],
    "checkpoints": ["discovery", "training"],
    "experiments": ["checkpoints"],
}
"""What stands below a folder and is none of its business."""

LINES, WIDTH, ARGUMENTS, AT_THE_ROOT = 320, 128, 6, 12
"""Most lines and columns of a file, positional arguments of a function, and files beside the folders."""

OUTPUT_CALLS = {"print", "open", "input", "unlink", "read_text", "read_bytes", "write_text", "write_bytes", "load", "save"}
OUTPUT_PACKAGES = {"io", "logging", "matplotlib", "pathlib", "rich", "safetensors", "shutil", "subprocess", "tempfile", "typer"}
ALLOWED = {
    "discovery.graph.export": {"io", "logging"},
    "native.compiler": {"pathlib", "read_bytes", "shutil", "subprocess"},
    "native.kernels": {"pathlib", "tempfile"},
}
"""To keep the exporter quiet; to compile, and to know of which sources kernels were made."""

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Every file by its dotted name below the package."""

FOLDERS = sorted(name for name, path in FILES.items() if path.name == "__init__.py" and name != "__init__")


def imported(name: str) -> set[str]:
    """Dotted names of what a file imports anywhere, for annotations too; files of ours by their place in the package."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole.removeprefix("equinorm.") in FILES else str(node.module))
    return {"__init__" if target == "equinorm" else target.removeprefix("equinorm.") for target in found}


def floor(name: str) -> str:
    return name.split(".")[0]


def is_within(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def test_floors_name_everything_at_the_root():
    assert sorted(FLOORS) == sorted({floor(name) for name in FILES})
    assert sum("." not in name and name not in FOLDERS for name in FILES) <= AT_THE_ROOT


@pytest.mark.parametrize("name", FILES)
def test_imports_come_from_below(name):
    above = {target for target in imported(name) & FILES.keys() if FLOORS.index(floor(target)) > FLOORS.index(floor(name))}
    assert not above


@pytest.mark.parametrize("folder", STRANGERS)
def test_folders_keep_to_themselves(folder):
    assert folder in FOLDERS
    for name in FILES:
        if is_within(name, folder):
            assert not [t for t in imported(name) for stranger in STRANGERS[folder] if is_within(t, stranger)], name


def test_no_two_files_import_each_other():
    graph = {name: imported(name) & FILES.keys() - {name} for name in FILES}
    assert [*TopologicalSorter(graph).static_order()]  # raises CycleError


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_say_what_they_take_give_and_never_import(folder):
    text = ast.get_docstring(ast.parse(FILES[folder].read_text("utf-8"))) or ""
    assert "Takes" in text
    assert "Gives" in text
    assert "imports" in text


@pytest.mark.parametrize("name", FILES)
def test_files_and_signatures_stay_short(name):
    text = FILES[name].read_text("utf-8")
    assert len(text.splitlines()) <= LINES
    if name.startswith("cli."):  # typer reads a command's options from its arguments
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            assert len([argument for argument in given if argument not in ("self", "cls")]) <= ARGUMENTS, node.name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.[ch]pp")), ids=lambda path: path.name)
def test_sources_of_kernels_stay_short(path):
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("name", [name for name in FILES if floor(name) in CORE])
def test_core_neither_prints_nor_touches_files(name):
    tree = ast.parse(FILES[name].read_text("utf-8"))
    called = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not (called & OUTPUT_CALLS) - ALLOWED.get(name, set())
    assert not {target.split(".")[0] for target in imported(name)} & OUTPUT_PACKAGES - ALLOWED.get(name, set())


def test_core_asks_for_what_stands_above_in_one_place():
    askers = [name for name in FILES if floor(name) in CORE and "import_module" in FILES[name].read_text("utf-8")]
    assert askers == ["_display"]
