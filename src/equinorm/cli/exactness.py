"""When outputs count as exact: limits by dtype."""

import torch
from torch import nn

from equinorm._deviation import LIMITS

__all__ = ["LIMITS", "VERIFYING", "coarsest"]

VERIFYING = "to verify its outputs"
"""What the command line copies models for."""


def coarsest(*models: nn.Module) -> torch.dtype:
    """The floating dtype of least precision among the models' parameters."""
    dtypes = {tensor.dtype for model in models for tensor in model.parameters() if tensor.dtype in LIMITS}
    return max(dtypes, key=lambda dtype: LIMITS[dtype], default=torch.float32)
