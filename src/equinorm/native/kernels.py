"""The passes of `program.cpp`, compiled on first use."""

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from equinorm._errors import EquinormError
from equinorm.native.structures import INT, NUMBER, POINTER, SIZE, Program

SOURCE = Path(__file__).with_name("program.cpp")


TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "BFloat16"}
"""What C++ calls the dtypes that it knows."""


DEVICES = ("cpu",)
"""Where they run; elsewhere torch.compile makes kernels."""


_SIGNATURES = {
    "equinorm_sum": (INT, POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER, POINTER, INT),
    "equinorm_cycle": (POINTER, POINTER, POINTER, POINTER, POINTER, INT, INT, INT),
    "equinorm_scale": (POINTER, SIZE, INT),
    "equinorm_follow": (POINTER, POINTER, SIZE, NUMBER, NUMBER, INT),
}


class Kernels:
    """The compiled passes for one dtype of tensors and one of sums and scales.

    All tensors lie dense in a CPU's memory. Functions whose names end in an underscore write to tensors, by address: who calls
    `scale_` tells autograd (`increment_version`).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None

    def sums(
        self,
        p: int,
        first: int,
        shape: tuple[int, int],
        pitch: int,
        factors: tuple[Tensor, Tensor],
        out: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """out[0]_i = Σ_j |w_ij|^p factors[1]_j and out[1]_j = Σ_i |w_ij|^p factors[0]_i, in one pass.

        Args:
            p: 1 or 2.
            first: address of the first entry.
            shape: rows and columns.
            pitch: entries from the start of a row to that of the next.
            factors: of each row and of each column.
            out: sums of each row and of each column; None for those that are not needed.
        """
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (*factors, *out))
        self._library.equinorm_sum(p, first, *shape, pitch, *pointers, torch.get_num_threads())

    def cycle(self, program: Program, tensors: ctypes.Array, weights: Tensor, z: Tensor, cycles: int, levels: bool) -> None:
        """Cycles of coordinate steps, after one of a scalar for each family if `levels`; z, float64, from 0, follows."""
        scales = torch.ones_like(z)  # exp(pz)
        pointers = (ctypes.addressof(program), ctypes.addressof(tensors), weights.data_ptr(), z.data_ptr(), scales.data_ptr())
        self._library.equinorm_cycle(*pointers, cycles, levels, torch.get_num_threads())

    def scale_(self, moves: ctypes.Array) -> None:
        """tensor ← r · (tensor − part) · c + part, after part ← part_r · part · part_c."""
        self._library.equinorm_scale(ctypes.addressof(moves), len(moves), torch.get_num_threads())

    def follow_(self, part: Tensor, weight: Tensor, keep: float, add: float) -> None:
        """part ← keep · part + add · weight; both lie in memory alike."""
        self._library.equinorm_follow(part.data_ptr(), weight.data_ptr(), part.numel(), keep, add, torch.get_num_threads())
        torch.autograd.graph.increment_version(part)


@functools.cache
def kernels_for(dtype: torch.dtype, sums: torch.dtype) -> Kernels | None:
    """The passes over tensors of `dtype`, with sums and scales in float32 or float64; None for a dtype that has none.

    Raises:
        EquinormError: if they cannot be compiled on this machine.
    """
    if dtype not in TYPES or (dtype == torch.float64 and sums != torch.float64):
        return None
    try:
        # Windows keeps the file of what is loaded.
        with tempfile.TemporaryDirectory(prefix="equinorm", ignore_cleanup_errors=True) as folder:
            built = Path(folder) / "kernels.so"
            _compile([f"-DType={TYPES[dtype]}", f"-DSum={TYPES[sums]}", "-o", str(built)])
            return Kernels(ctypes.CDLL(str(built)))
    except OSError as error:
        raise _refusal(f"cannot load what {' '.join(_compiler())} should have made: {error}") from error


def require() -> None:
    """See that there is a compiler.

    Raises:
        EquinormError: if there is none.
    """
    _compiler()


def _compiler() -> list[str]:
    """The command: what CXX says, or the first that is on the PATH."""
    named = os.environ.get("CXX", "").strip()
    if named:
        return [named] if shutil.which(named) else shlex.split(named)
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise _refusal("there is no c++, g++ or clang++ on the PATH")
    return [found]


def _compile(arguments: list[str]) -> None:
    tune = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has no OpenMP: one thread there
    quiet = "-w"  # who uses it cannot mend warnings
    flags = ["-std=c++17", "-O3", tune, *threads, "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", quiet]
    command = _compiler()
    try:
        done = subprocess.run(
            [*command, *flags, str(SOURCE), *arguments], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise _refusal(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise _refusal(f"{command[0]} ended with {done.returncode}: {lines[0].strip()}")


def _refusal(reason: str) -> EquinormError:
    return EquinormError(
        f"cannot compile the kernels of compile=True on this machine: {reason}. They need g++ or clang++, or the compiler that "
        "the environment variable CXX names. Leave out compile=True to do without."
    )
