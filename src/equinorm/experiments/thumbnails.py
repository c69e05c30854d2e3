"""Small pictures of weights that fit into a line of JSON."""

import base64

import numpy as np
import torch
from torch import Tensor, nn

from equinorm.experiments.networks import layers_of

_SIZE = 40


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The first, the middle and the last matrix or kernel, as they enter the network."""
    layers = layers_of(model)
    names = list(layers)
    chosen = dict.fromkeys([names[0], names[len(names) // 2], names[-1]]) if names else {}
    with torch.no_grad():
        return {name: shrink(layers[name].weight) for name in chosen}


def shrink(weight: Tensor) -> Tensor:
    """Root mean squares of the blocks of a weight: outputs by inputs, at most 40 each."""
    weight = weight.detach().float().square()
    matrix = weight.flatten(2).mean(2) if weight.dim() > 2 else weight
    sizes = [min(size, _SIZE) for size in matrix.shape]
    return nn.functional.adaptive_avg_pool2d(matrix[None], (sizes[0], sizes[1]))[0].sqrt().cpu()


def encode(matrix: Tensor) -> str:
    """Rows, columns and the entries in half precision, as text."""
    rows, columns = matrix.shape
    return f"{rows}x{columns}:" + base64.b64encode(matrix.numpy().astype("<f2").tobytes()).decode("ascii")


def decode(text: str) -> np.ndarray:
    """What `encode` wrote."""
    shape, _, body = text.partition(":")
    rows, columns = map(int, shape.split("x"))
    return np.frombuffer(base64.b64decode(body), "<f2").astype(np.float64).reshape(rows, columns)
