"""What ONNX operators compute, in PyTorch's operations, so that labels can ride on them.

Takes a node's attributes and its inputs. Gives its outputs. Never imports the files that nodes come from.
"""

from equinorm.integrations.onnx.operators import (
    contraction,
    elementwise,
    movement,
    normalization,
    pooling,
    recurrent,
    reduction,
    resizing,
)
from equinorm.integrations.onnx.operators.registry import TABLE, NodeCall, Operator, UnreadError

__all__ = [
    "TABLE",
    "NodeCall",
    "Operator",
    "UnreadError",
    "contraction",
    "elementwise",
    "movement",
    "normalization",
    "pooling",
    "recurrent",
    "reduction",
    "resizing",
]
