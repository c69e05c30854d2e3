"""What stands on the edges of a network's graph: run with numbers, and compared with how discovery says that it scales."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import equinorm
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.discovery.graph.running import graph_values


class Numbers:
    """Runs one model's graph, with the weights that the model has then.

    Args:
        model: stays untouched but for what is done to its weights in between.
        args: its positional inputs.
        kwargs: its keyword inputs.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any] | None) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        (self.program,) = (call.exported.program for call in graphs_of(model, args, kwargs))

    @torch.no_grad()
    def captured(self) -> dict[str, Tensor]:
        """The numbers of every value; random ones are the same every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return graph_values(self.program, self.model, copy.deepcopy(self.args), copy.deepcopy(self.kwargs))


def apart(model: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None, **options) -> dict[str, float]:
    """Rescale a copy by a random member: how far each value is from what its scaling says, relative to its largest entry."""
    model = copy.deepcopy(model)
    symmetries, numbers = equinorm.symmetries(model, args, kwargs, **options), Numbers(model, args, kwargs)
    log_scales = torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = numbers.captured()
    symmetries.rescale_(log_scales)
    after, found = numbers.captured(), {}
    for value in symmetries.values:
        scaling = value.scaling
        if scaling is None or value.name not in before or "empty" in value.operator:
            continue
        one, other = before[value.name], after[value.name]
        if scaling.factors:
            one = one + scaling.offset
            other = (other + scaling.offset) * (-scaling.log_scales(log_scales)).exp()
        found[value.name] = _relative(other, one)
    return found


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    largest = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else torch.tensor(1.0)
    return float(difference.max() / largest.clamp(min=1e-300)) if difference.numel() else 0.0
