"""What stands on the edges of a network's graph: run with numbers, and compared with how discovery says that it scales."""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import equinorm
from equinorm.discovery.graph.export import export
from equinorm.discovery.values import Constant, Source


class Capture(fx.Interpreter):
    """Keeps a copy of every tensor under the name that discovery gives it."""

    def __init__(self, graph: fx.GraphModule, found: dict[str, Tensor], prefix: str = "") -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.found, self.prefix = found, prefix

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[self.prefix + n.name] = result.detach().clone()
        return result

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Graphs that run without gradients are captured too."""
        if getattr(target, "__name__", "") != "wrap_with_set_grad_enabled":
            return super().call_function(target, args, kwargs)
        name = next(name for name, part in self.module.named_children() if part is args[1])
        return Capture(args[1], self.found, f"{self.prefix}{name}.").run(*args[2:])


class UnknownNumbersError(Exception):
    """A plain attribute whose numbers only the exporter has."""


class Numbers:
    """Runs one model's graph, with the weights that the model has then.

    Args:
        model: stays untouched but for what is done to its weights in between.
        args: its positional inputs.
        kwargs: its keyword inputs.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any] | None) -> None:
        self.exported = export(model, args, kwargs)
        self.leaves = pytree.tree_leaves((args, kwargs or {}))
        self.buffers = {f"b_{name.replace('.', '_')}": buffer for name, buffer in model.named_buffers(remove_duplicate=False)}

    @torch.no_grad()
    def captured(self) -> dict[str, Tensor]:
        """The numbers of every value; random ones are the same every time."""
        leaves, given = iter(self.leaves), []
        for name, (value, origin) in self.exported.inputs.items():
            if isinstance(value, Source):
                given.append(self.exported.sources[value].detach())
            elif origin.parameters is None:
                given.append(next(leaves))
            else:
                given.append(value.value if isinstance(value, Constant) else self.buffers.get(name))
                if given[-1] is None:
                    raise UnknownNumbersError(name)
        found: dict[str, Tensor] = {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            copies = copy.deepcopy([part.detach() if isinstance(part, Tensor) else part for part in given])
            Capture(self.exported.aliases.graph, found).run(*copies)
        return found


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
