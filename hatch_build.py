"""Compiles the kernels of `src/equinorm/native` into the wheel, where the machine that builds it has a compiler.

Without one the wheel is pure, and kernels are compiled at run time or done without. EQUINORM_KERNELS says otherwise: "none" for
a pure wheel, "required" to fail rather than to make one. An editable installation takes none along.
"""

import importlib.util
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

SYSTEMS = ("linux", "darwin")
"""Where kernels are compiled; elsewhere wheels are pure."""


class Kernels(BuildHookInterface):
    """Adds compiled kernels, and the tag of the system that they are for."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before files are gathered."""
        asked = os.environ.get("EQUINORM_KERNELS", "")
        if version == "editable" or asked == "none":
            return
        compiler = _compiler(Path(self.root) / "src" / "equinorm" / "native")
        self._folder = tempfile.TemporaryDirectory(prefix="equinorm")
        reasons = (
            self._compile(compiler, Path(self._folder.name))
            if sys.platform in SYSTEMS
            else [f"there are none for {sys.platform}"]
        )
        if not reasons:
            for pair in compiler.PAIRS:
                name = compiler.shipped_file(*pair)
                build_data["force_include"][str(Path(self._folder.name) / name)] = f"equinorm/native/{name}"
            build_data["pure_python"], build_data["tag"] = False, f"py3-none-{_system()}"
        elif asked == "required":
            raise RuntimeError(f"EQUINORM_KERNELS=required, but the kernels cannot be compiled: {reasons[0]}.")
        else:
            self.app.display_warning(f"A wheel without compiled kernels, which are made at run time: {reasons[0]}.")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Leave nothing behind."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def _compile(self, compiler: ModuleType, folder: Path) -> list[str]:
        """All pairs of types; what went wrong."""

        def compiled(pair: tuple[str, str]) -> str:
            target = folder / compiler.shipped_file(*pair)
            target.parent.mkdir(exist_ok=True)
            return compiler.compile_library(*pair, target, shipped=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [reason for reason in pool.map(compiled, compiler.PAIRS) if reason]


def _compiler(folder: Path) -> ModuleType:
    """`native/compiler.py` by itself: the package cannot be imported while it is built."""
    spec = importlib.util.spec_from_file_location("compiler", folder / "compiler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _system() -> str:
    """Of this machine, as wheels name it; `MACOSX_DEPLOYMENT_TARGET` is the oldest macOS."""
    system = next(tag.platform for tag in sys_tags() if not tag.platform.startswith(("manylinux", "musllinux")))
    oldest = os.environ.get("MACOSX_DEPLOYMENT_TARGET")
    if oldest is None or not system.startswith("macosx_"):
        return system
    _, *_, processor = system.split("_", 3)
    major, _, minor = oldest.partition(".")
    return f"macosx_{major}_{minor or 0}_{processor}"
