"""`import equinorm` shows its public names alone, and brings nothing along that PyTorch does not."""

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path

import equinorm


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_dir_is_what_is_public():
    assert dir(equinorm) == sorted(equinorm.__all__)
    assert len(set(equinorm.__all__)) == len(equinorm.__all__)
    assert [name for name in dir(equinorm) if name.startswith("_")] == ["__version__"]
    assert not {"balancing", "discovery", "native", "rescaling", "training", "importlib"} & set(dir(equinorm))


def test_every_name_that_is_imported_is_public():
    tree = ast.parse(Path(inspect.getfile(equinorm)).read_text("utf-8"))
    names = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert names | {"__version__"} == set(equinorm.__all__)


def test_every_public_name_has_a_docstring():
    for name in set(equinorm.__all__) - {"__version__"}:
        assert (getattr(equinorm, name).__doc__ or "").strip(), name


def test_star_imports_the_same():
    found: dict[str, object] = {}
    exec("from equinorm import *", found)
    assert {name for name in found if name != "__builtins__"} == set(equinorm.__all__)
    assert isinstance(found["rules"], types.ModuleType)


def test_import_brings_nothing_along_that_torch_does_not():
    code = """
import sys, torch, numpy
before = {name.partition(".")[0] for name in sys.modules}
import equinorm
print(*{name.partition(".")[0] for name in sys.modules} - before)
"""
    assert set(fresh(code).split()) - sys.stdlib_module_names == {"equinorm"}
