"""When outputs count as exact: limits by dtype."""

import torch
from torch import nn

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest relative deviation of outputs that counts as exact, by the coarsest dtype of the parameters. In double and single
precision real scales round every weight once; in half precision only powers of two are applied; ten roundings are allowed."""

VERIFYING = "to verify its outputs"
"""What the command line copies models for."""


def coarsest(*models: nn.Module) -> torch.dtype:
    """The floating dtype of least precision among the models' parameters."""
    dtypes = {tensor.dtype for model in models for tensor in model.parameters() if tensor.dtype in LIMITS}
    return max(dtypes, key=lambda dtype: LIMITS[dtype], default=torch.float32)
