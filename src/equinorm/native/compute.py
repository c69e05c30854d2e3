"""Where and how passes over weights run."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how passes over weights run.

    Attributes:
        device: of the weights.
        dtype: of sums and scales.
        native: dtypes of the tensors that compiled kernels work on; empty if PyTorch's operations do all.
    """

    device: torch.device
    dtype: torch.dtype
    native: frozenset[torch.dtype] = frozenset()
