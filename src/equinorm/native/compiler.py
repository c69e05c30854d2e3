"""The machine's own compiler, at work on `program.cpp`: at run time, and when a wheel is built.

Nothing beyond Python's standard library, so that a build needs neither PyTorch nor this package.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "program.cpp", FOLDER / "passes.hpp")

PAIRS = (("float", "float"), ("float", "double"), ("double", "double"), ("BFloat16", "float"), ("BFloat16", "double"))
"""What C++ calls the dtypes of tensors, and of sums and scales, that kernels know."""

# Products and sums are rounded one by one, so that every machine gives the same bits.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_QUIET = "-w"  # who uses it cannot mend warnings


def is_x86() -> bool:
    """Has this machine the processor that most have?"""
    return platform.machine().lower() in ("x86_64", "amd64")


def compiler() -> tuple[list[str], str]:
    """The command: what CXX says, or the first that is on the PATH; and why there is none."""
    named = os.environ.get("CXX", "").strip()
    if named:
        return [named] if shutil.which(named) else shlex.split(named), ""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return ([found], "") if found else ([], "there is no c++, g++ or clang++ on the PATH")


def compile_library(entries: str, sums: str, target: Path, shipped: bool = False) -> str:
    """Compile the kernels of one pair of types; what kept this machine from it, or "" if nothing.

    Args:
        entries: type of tensors, as C++ calls it.
        sums: of sums and scales.
        target: file to write.
        shipped: for every machine of this kind (x86: with AVX2), not for this one alone.
    """
    command, reason = compiler()
    if reason:
        return reason
    usual, own = (["-mavx2", "-mfma"], ["-march=native"]) if is_x86() else ([], ["-mcpu=native"])
    arguments = [
        *_FLAGS,
        *(usual if shipped else own),
        _QUIET,
        str(SOURCES[0]),
        f"-DType={entries}",
        f"-DSum={sums}",
        "-o",
        str(target),
    ]
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f"cannot run {command[0]}: {error.strerror}"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        return f"{command[0]} ended with {done.returncode}: {lines[0].strip()}"
    return ""


def shipped_file(entries: str, sums: str) -> str:
    """Name of the compiled kernels of one pair of types that a wheel holds; kernels of other sources have another."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:12]
    return f"shipped/{entries}-{sums}-{digest}.so"
