"""The passes of `program.cpp`: those that came with the package, or compiled on first use."""

import ctypes
import functools
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from equinorm._errors import EquinormError
from equinorm.native.compiler import FOLDER, PAIRS, compile_library, compiler, is_x86, shipped_file
from equinorm.native.structures import INT, NUMBER, POINTER, SIZE, Program

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "BFloat16"}
"""What C++ calls the dtypes that it knows."""


DEVICES = ("cpu",)
"""Where they run; elsewhere torch.compile makes kernels."""


_SIGNATURES = {
    "equinorm_use_threads": (POINTER,),
    "equinorm_sum": (INT, POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER, POINTER, INT),
    "equinorm_largest": (POINTER, SIZE, SIZE, POINTER, INT),
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
        library.equinorm_use_threads(_parallel())

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

    def largest(self, matrix: Tensor) -> Tensor:
        """The largest magnitude of each column; NaN where there is one."""
        found = torch.empty(matrix.size(1), dtype=matrix.dtype)
        self._library.equinorm_largest(matrix.data_ptr(), *matrix.shape, found.data_ptr(), torch.get_num_threads())
        return found

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
        EquinormError: if none came with the package and they cannot be compiled on this machine.
    """
    names = TYPES.get(dtype, ""), TYPES[sums]
    if names not in PAIRS:
        return None
    return _shipped(*names) or _compiled(*names)


def require() -> None:
    """See that there are kernels or a compiler.

    Raises:
        EquinormError: if there are neither.
    """
    _, reason = compiler()
    if reason and not are_shipped():
        raise _refusal(reason)


def are_wanted(compile: bool | None) -> bool:
    """Does this choice of `compile` use kernels on a CPU? None: if all came with the package and fit this machine."""
    return are_shipped() if compile is None else compile


def are_shipped() -> bool:
    """Do all kernels come with the package, and fit this machine and these sources?"""
    return all(_shipped(*names) is not None for names in PAIRS)


@functools.cache
def _shipped(entries: str, sums: str) -> Kernels | None:
    path = FOLDER / shipped_file(entries, sums)
    if not path.exists() or (is_x86() and not torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return None
    try:
        return Kernels(ctypes.CDLL(str(path)))
    except OSError:  # of another machine
        return None


def _compiled(entries: str, sums: str) -> Kernels:
    try:
        # Windows keeps the file of what is loaded.
        with tempfile.TemporaryDirectory(prefix="equinorm", ignore_cleanup_errors=True) as folder:
            built = Path(folder) / "kernels.so"
            reason = compile_library(entries, sums, built)
            if reason:
                raise _refusal(reason)
            return Kernels(ctypes.CDLL(str(built)))
    except OSError as error:
        raise _refusal(f"cannot load what {' '.join(compiler()[0])} should have made: {error}") from error


@functools.cache
def _parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP that PyTorch has loaded, or else the system's; None: kernels have one thread."""
    for name in (None, "libgomp.so.1") if os.name == "posix" else ():
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, POINTER).value
        except (OSError, AttributeError):
            continue
    return None


def _refusal(reason: str) -> EquinormError:
    return EquinormError(
        f"cannot compile the kernels of compile=True on this machine: {reason}. They need g++ or clang++, or the compiler that "
        "the environment variable CXX names. Leave out compile=True to do without."
    )
