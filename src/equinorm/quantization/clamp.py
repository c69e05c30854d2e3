"""An activation that is bounded channel by channel, so that its bounds can scale with what they bound."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class Clamp(nn.Module):
    """min(max(x, lower), upper) with bounds that broadcast to x: buffers, which scale and count in no norm.

    There is no buffer for a bound of 0, which no scale moves, nor for one that is infinite. Once settled, a ReLU is bounded by
    one number too, the largest of its upper bounds. That changes nothing in float. But onnxruntime fuses it with the layer in
    front, whose step then spans what the bounds leave, not all that the layer puts out.

    Args:
        activation: an nn.ReLU6 or nn.Hardtanh, whose bounds these are at first.
        shape: of the bounds, such as (channels, 1, 1).
        dtype: of what is bounded.
        device: where the bounds are.

    >>> import torch, equinorm
    >>> clamp = equinorm.quantization.Clamp(torch.nn.ReLU6(), (2, 1, 1), torch.float32)
    >>> clamp(torch.full((1, 2, 1, 1), 8.0)).flatten()
    tensor([6., 6.])
    """

    scalable_buffers = ("lower", "upper")
    lower: Tensor
    upper: Tensor

    def __init__(
        self, activation: nn.Hardtanh, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.kind, self.inplace, self.training = type(activation), activation.inplace, activation.training
        self.bounds = float(activation.min_val), float(activation.max_val)
        self.most: float | None = None
        low, high = (torch.full(shape, bound, dtype=dtype, device=device) for bound in self.bounds)
        for name, bound, buffer in (("lower", self.bounds[0], low), ("upper", self.bounds[1], high)):
            if bound and math.isfinite(bound):
                self.register_buffer(name, buffer)
        self.register_load_state_dict_post_hook(_measure_again)

    def forward(self, input: Tensor) -> Tensor:
        """The bounded input; from 0 on as a ReLU, which quantizers fuse with the layer in front.

        Not torch.clamp with tensors, which Inductor takes for one with numbers behind a quantized convolution, and fails.
        """
        low, high = (getattr(self, name, None) for name in self.scalable_buffers)
        if low is not None:
            input = torch.maximum(input, low)
        elif self.bounds[0] == 0:
            input = torch.relu(input) if self.most is None else torch.clamp(torch.relu(input), max=self.most)
        if high is not None:
            return torch.minimum(input, high)
        return torch.clamp(input, max=0) if self.bounds[1] == 0 else input

    def settled(self) -> nn.Module:
        """What the activation was if its bounds are all equal, by other numbers perhaps; otherwise one whose bounds stay."""
        found = {name: torch.unique(buffer) for name, buffer in self.named_buffers()}
        if any(len(bound) != 1 for bound in found.values()):
            return self._with_most(float(self.upper.max())) if self.bounds[0] == 0 and "upper" in found else self
        low, high = (
            found[name].item() if name in found else bound
            for name, bound in zip(self.scalable_buffers, self.bounds, strict=True)
        )
        plain = self.kind(inplace=self.inplace) if self.kind is nn.ReLU6 and (low, high) == self.bounds else None
        return (plain or nn.Hardtanh(low, high, inplace=self.inplace)).train(self.training)

    def freed(self) -> "Clamp":
        """One whose bounds can scale again."""
        return self if self.most is None else self._with_most(None)

    def _with_most(self, most: float | None) -> "Clamp":
        made = copy.deepcopy(self)
        made.most = most
        return made

    def extra_repr(self) -> str:
        """What it was, the shape of its bounds, and the largest of them if it is settled."""
        most = "" if self.most is None else f", at most {self.most}"
        return f"{self.kind.__name__} of {self.bounds}, {tuple(next(self.buffers()).shape)}{most}"


def _measure_again(clamp: nn.Module, _: Any) -> None:
    """Take the largest bound of those that were loaded, if it counts."""
    assert isinstance(clamp, Clamp)
    if clamp.most is not None:
        clamp.most = float(clamp.upper.max())
