"""An independent count of permutations: no graph, no laws, only numbers.

On a network whose axes have at most four entries, every choice of an involution for each axis of each parameter is tried
(products of transpositions of disjoint entries; the others follow from these). Those that leave the outputs as they were are
all there are.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import equinorm

CHUNK = 4096
"""Choices that are tried at once."""

Choice = tuple[tuple[int, ...], ...]
"""For each axis of each parameter, the entry that comes to each place."""


def involutions(size: int) -> list[tuple[int, ...]]:
    """All orders that undo themselves."""
    return [p for p in itertools.permutations(range(size)) if all(p[p[i]] == i for i in range(size))]


def preserving(model: nn.Module, args: Sequence[Tensor], limit: float = 1e-10) -> set[Choice]:
    """Every choice of involutions that leaves the outputs as they were, for weights drawn at random."""
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}
    names = list(drawn)
    axes = [(name, axis, involutions(size)) for name in names for axis, size in enumerate(drawn[name].shape)]
    before = torch.func.functional_call(model, drawn, tuple(args))

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, tuple(args))

    found: set[Choice] = set()
    for choices in _chunks(itertools.product(*(options for _, _, options in axes))):
        batch = {name: tensor.expand(len(choices), *tensor.shape) for name, tensor in drawn.items()}
        for place, (name, axis, _) in enumerate(axes):
            order = torch.tensor([choice[place] for choice in choices])
            shape = [len(choices)] + [order.shape[1] if at == axis else 1 for at in range(drawn[name].dim())]
            batch[name] = batch[name].gather(axis + 1, order.reshape(shape).expand(batch[name].shape))
        after = torch.func.vmap(outputs)(batch)
        same = (after - before).abs().flatten(1).amax(1) <= limit * before.abs().max()
        found |= {choices[place] for place in same.nonzero().flatten().tolist()}
    return found


def claimed(model: nn.Module, args: Sequence[Tensor]) -> set[Choice]:
    """Every choice of involutions in the group that was discovered."""
    permutations = equinorm.permutations(model, tuple(args))
    parameters = dict(model.named_parameters())
    marks = {n: [torch.arange(size) for size in p.shape] for n, p in parameters.items()}
    options = []
    for family in permutations.families:
        orders = itertools.product(itertools.permutations(range(family.size)), repeat=family.orders)
        options.append([torch.tensor(order).reshape(family.shape) for order in orders])
    found: set[Choice] = set()
    for permutation in itertools.product(*options):
        choice = [_moved(permutations, permutation, name, axis, p) for name in parameters for axis, p in enumerate(marks[name])]
        if all(order and all(order[order[i]] == i for i in range(len(order))) for order in choice):
            found.add(tuple(choice))
    return found


def _moved(
    permutations: equinorm.Permutations, permutation: Sequence[Tensor], name: str, axis: int, places: Tensor
) -> tuple[int, ...]:
    """Places along one axis after a permutation, read off numbers that stand there in place of weights.

    Empty if they depend on places in another axis, which no choice for each axis says.
    """
    parameter = permutations.model.get_parameter(name)
    shape = [-1 if at == axis else 1 for at in range(parameter.dim())]
    with torch.no_grad():
        parameter.copy_(places.reshape(shape).expand(parameter.shape))
        permutations.permute_(permutation)
    result = parameter.detach().movedim(axis, 0).reshape(len(places), -1).long()
    return tuple(result[:, 0].tolist()) if bool((result == result[:, :1]).all()) else ()


def _chunks(choices: Iterator[Choice]) -> Iterator[list[Choice]]:
    while chunk := list(itertools.islice(choices, CHUNK)):
        yield chunk
