"""PyTorch's own operator samples as small networks, and the ground truth of how they may be rescaled."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import equinorm

TOLERANCE = 1e-12  # relative, float64: rounding only


@dataclass(frozen=True)
class Sample:
    """One call of an operator: `operation(*leaves)` with all float tensors among its arguments as leaves."""

    name: str
    operation: Callable[..., Any]
    leaves: tuple[Tensor, ...]


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def call(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Sample:
    """A sample from any call; its float tensors, nested or not, become leaves."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(flat) if is_float(value)]

    def operation(*leaves: Tensor) -> Any:
        values = list(flat)
        for place, leaf in zip(places, leaves, strict=True):
            values[place] = leaf
        args, kwargs = pytree.tree_unflatten(values, spec)
        return function(*args, **kwargs)

    return Sample(name, operation, tuple(flat[i].detach().clone() for i in places))


def database(name: str, largest: int = 150) -> Iterator[Sample]:
    """PyTorch's samples for one entry of its operator database, none with more than `largest` entries."""
    from torch.testing._internal.common_methods_invocations import op_db

    for info in op_db:
        if info.name != name:
            continue
        title = f"{info.name}.{info.variant_test_name}".rstrip(".")
        torch.default_generator.manual_seed(0)
        dtype = torch.float64 if torch.float64 in info.supported_dtypes("cpu") else torch.complex128
        if dtype not in info.supported_dtypes("cpu"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = list(info.sample_inputs_func(info, "cpu", dtype, requires_grad=False))  # itself: no new seed for each
        for number, sample in enumerate(samples):
            made = call(f"{title}#{number}", info.op, sample.input, *sample.args, **sample.kwargs)
            if made.leaves and sum(leaf.numel() for leaf in made.leaves) <= largest:
                yield made


class Wrapped(nn.Module):
    """operation(x_1 · s_1, …) · g: every entry of every float operand has a scale of its own in front of it.

    Scales are parameters of one axis that are viewed at the operand's shape, so that each entry has a class of its own.

    Args:
        sample: what to wrap.
        raw: operands that are parameters themselves, used directly.
        gains: multiply each result by a parameter, so that classes of results stay visible.
    """

    def __init__(self, sample: Sample, raw: Sequence[int] = (), gains: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def positive(count: int) -> nn.Parameter:
            return nn.Parameter(0.5 + torch.rand(count, generator=generator, dtype=torch.float64))

        self.operation = sample.operation
        self.inputs = tuple(leaf for i, leaf in enumerate(sample.leaves) if i not in raw)
        self.raw = {i: nn.Parameter(sample.leaves[i].clone()) for i in raw}
        self.raws = nn.ParameterList(self.raw.values())
        self.scales = nn.ParameterList([positive(leaf.numel()) for leaf in self.inputs])
        self.gains = None
        with torch.no_grad():
            results = [part for part in flat_results(self(*self.inputs)) if is_float(part)]
        if gains:
            self.gains = nn.ParameterList([positive(part.numel()) for part in results])

    def forward(self, *inputs: Tensor) -> list[Any]:
        scaled = iter([x * scale.view(x.shape) for x, scale in zip(inputs, self.scales, strict=True)])
        total = len(self.raw) + len(inputs)
        results = flat_results(self.operation(*(self.raw[i] if i in self.raw else next(scaled) for i in range(total))))
        if self.gains is None:
            return results
        gains = iter(self.gains)
        return [part * next(gains).view(part.shape) if is_float(part) else part for part in results]


def flat_results(results: Any) -> list[Any]:
    return [part for part in pytree.tree_leaves(results) if isinstance(part, Tensor)]


def true_dimension(model: Wrapped, found: int, draws: int = 1000) -> int:
    """Dimension of the entrywise scalings of all parameters that leave the float outputs unchanged to first order.

    The null space of the Jacobian with respect to the logarithms of all entries, stacked over random weights and inputs:
    shuffled samples, so that they stay in the operator's domain. Drawing stops once no more than `found` dimensions are left.
    Derivatives are central differences along a basis of what is left, relative to the largest output (step 1e-5, error about
    1e-10); singular values under 1e-6 count as zero.
    """
    generator = torch.Generator().manual_seed(2)
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    basis = torch.eye(sum(sizes), dtype=torch.float64)
    before = [parameter.detach().clone() for parameter in parameters]

    def run(logs: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        for parameter, value, log in zip(parameters, start, logs.split(sizes), strict=True):
            parameter.copy_(value * log.exp().view(value.shape))
        torch.default_generator.manual_seed(3)
        parts = [torch.view_as_real(p.resolve_conj()) if p.is_complex() else p for p in model(*inputs) if is_float(p)]
        return torch.cat([part.reshape(-1).double() for part in parts])

    with torch.no_grad():
        for draw in range(draws):
            if basis.size(1) <= found:
                break
            shuffled = [x.reshape(-1)[torch.randperm(x.numel(), generator=generator)].view(x.shape) for x in model.inputs]
            inputs = model.inputs if draw == 0 else shuffled
            jitter = [torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5 for p in parameters]
            start = [value * (1.5 * noise).exp() for value, noise in zip(before, jitter, strict=True)]
            h = 1e-5
            unit = run(torch.zeros(sum(sizes)), inputs).nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-30)
            columns = [(run(h * v, inputs) - run(-h * v, inputs)) / (2 * h * unit) for v in basis.T]
            jacobian = torch.stack(columns, dim=1).nan_to_num(0.0, 0.0, 0.0)
            _, singular, right = torch.linalg.svd(jacobian, full_matrices=jacobian.size(0) < jacobian.size(1))
            rank = int((singular > 1e-6).sum())
            basis = basis @ right[rank:].T
    for parameter, value in zip(parameters, before, strict=True):
        with torch.no_grad():
            parameter.copy_(value)
    return basis.size(1)


def moved(model: nn.Module, args: tuple, std: float, power_of_two: bool = False) -> tuple[nn.Module, int]:
    """A copy at a random point of the discovered group, and the dimension of the group."""
    twin = copy.deepcopy(model)
    group = equinorm.symmetries(twin, args)
    generator = torch.Generator().manual_seed(5)
    group.rescale_(std * torch.randn(group.num_free, generator=generator, dtype=torch.float64), power_of_two=power_of_two)
    return twin, group.num_free


def check_sound(model: Wrapped, title: str) -> int:
    """Random members of the group at three magnitudes leave the outputs where they are; returns the group's dimension."""
    group = equinorm.symmetries(model, model.inputs)
    generator = torch.Generator().manual_seed(5)
    for std in (0.1, 1.0, 5.0):
        twin = copy.deepcopy(model)
        logs = std * torch.randn(group.num_free, generator=generator, dtype=torch.float64)
        dataclasses.replace(group, model=twin).rescale_(logs)
        deviation = equinorm.deviation(twin, model, model.inputs)
        assert deviation <= TOLERANCE, f"{title}: log-scales of size {std} change the outputs by {deviation:.1e}"
    return group.num_free
