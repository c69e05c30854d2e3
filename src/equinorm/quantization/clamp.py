"""An activation that is bounded channel by channel, so that its bounds can scale with what they bound."""

import torch
from torch import Tensor, nn


class Clamp(nn.Module):
    """min(max(x, lower), upper) with bounds that broadcast to x: buffers, which scale and count in no norm.

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
        low, high = (torch.full(shape, bound, dtype=dtype, device=device) for bound in self.bounds)
        if self.bounds[0]:
            self.register_buffer("lower", low)
        self.register_buffer("upper", high)

    def forward(self, input: Tensor) -> Tensor:
        """The bounded input; from 0 on as a ReLU, which quantizers fuse with the layer in front."""
        if self.bounds[0]:
            return torch.clamp(input, self.lower, self.upper)
        return torch.minimum(torch.relu(input), self.upper)

    def settled(self) -> nn.Module:
        """What the activation was if its bounds are all equal, by other numbers perhaps; itself otherwise."""
        bounds = [torch.unique(buffer) for buffer in self.buffers()]
        if any(len(bound) != 1 for bound in bounds):
            return self
        numbers = [bound.item() for bound in bounds]
        low, high = numbers if self.bounds[0] else (0.0, *numbers)
        plain = self.kind(inplace=self.inplace) if self.kind is nn.ReLU6 and (low, high) == self.bounds else None
        return (plain or nn.Hardtanh(low, high, inplace=self.inplace)).train(self.training)

    def extra_repr(self) -> str:
        """What it was, and the shape of its bounds."""
        return f"{self.kind.__name__} of {self.bounds}, {tuple(self.upper.shape)}"
