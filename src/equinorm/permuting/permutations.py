"""Permutations: every reordering of a network's hidden channels that leaves its function unchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from equinorm._errors import PermutationError
from equinorm.discovery.graph.export import Graphs
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.modules.choosing import Choice, tensors_of
from equinorm.modules.running import on_cpu
from equinorm.permuting import description
from equinorm.permuting.discover import discover
from equinorm.permuting.families import AxisPin, ChannelFamily, PermutationSpec
from equinorm.permuting.layout import Layout
from equinorm.permuting.optimizer_state import states_of
from equinorm.permuting.points import Points
from equinorm.permuting.reading import families, pins, places
from equinorm.permuting.writing import Reordering
from equinorm.rescaling.all_or_none import write_all_
from equinorm.rescaling.checks import check_in_place, unchanged
from equinorm.rescaling.model_guard import ModelGuard
from equinorm.rescaling.optimizer_wrappers import Optimizers, check_trains

Permutation = tuple[Tensor, ...]
"""For each family the channel that comes to each place, of shape `family.shape`."""


@dataclass(frozen=True, slots=True, eq=False)
class Permutations:
    """The group of permutations of hidden channels that `permutations` discovered.

    Attributes:
        model: the network; untouched, and its weights were not read.
        families: channels that are permuted among themselves, with the axes of all tensors that move along.
        pins: what cannot be permuted, each with the operation and source line that says so.
        seconds: time for export and for interpretation.
        layout: the same, in parts of axes.
        points: where activations can be compared, if `align` asked for them.
    """

    model: nn.Module = field(repr=False)
    families: tuple[ChannelFamily, ...]
    pins: tuple[AxisPin, ...] = field(repr=False)
    seconds: tuple[float, float] = field(repr=False)
    layout: Layout = field(repr=False)
    points: Points | None = field(default=None, repr=False)
    _guard: ModelGuard = field(init=False, repr=False)

    def __post_init__(self) -> None:
        advice = "since the model was analysed, so its permutations may be others now. Analyse it again."
        object.__setattr__(self, "_guard", ModelGuard(self.model, advice))

    @property
    def num_families(self) -> int:
        """Number of families."""
        return len(self.families)

    @property
    def num_channels(self) -> int:
        """Channels that can be permuted, those of each head or group counted apart."""
        return description.channels(self.families)

    def identity(self) -> Permutation:
        """The permutation that moves nothing."""
        return tuple(torch.arange(family.size).expand(family.shape).clone() for family in self.families)

    def random(self, generator: Generator | None = None) -> Permutation:
        """A random permutation, uniform over the group.

        Args:
            generator: of random numbers, on the CPU; None for PyTorch's own.

        Returns:
            For each family an int64 tensor of shape `family.shape`: the channel that comes to each place.

        Raises:
            PermutationError: if the generator is none.
        """
        if generator is not None and not isinstance(generator, Generator):
            raise PermutationError(
                f"generator must be a torch.Generator or None, not {generator!r}. For a seed: torch.Generator().manual_seed(0)."
            )
        return tuple(torch.rand(f.shape, generator=generator, dtype=torch.float64).argsort(-1) for f in self.families)

    def spec(self) -> PermutationSpec:
        """Which axes move with which family, as tables in both directions.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> spec = equinorm.permutations(net, (torch.randn(1, 8),)).spec()
        >>> spec.perm_to_axes
        {'0.weight[0]': [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]}
        >>> spec.axes_to_perm["2.weight"]
        (None, '0.weight[0]')

        Source: the form of Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023.
        """
        return self.layout.spec()

    @on_cpu()
    def permute_(self, permutation: Sequence[Tensor] | Mapping[str, Tensor], optimizer: Optimizers | None = None) -> None:
        """Permute the model in place, all tensors or none: channel `order[i]` of a family comes to place i.

        Parameters, buffers, gradients and the state of `optimizer` move along. Outputs are the same, bitwise where sums have a
        fixed order, otherwise to rounding. Where a network drops entries at random, the same seed drops other channels.

        Args:
            permutation: an order for each family, int64 of shape `family.shape`; or a dict from names of families, in
                which those that are missing stay.
            optimizer: one or several, whose state to move along.

        Raises:
            PermutationError: if an order is no permutation of its channels, if a tensor has changed since it was analysed or
                cannot be written; nothing is written then.
            RescaleError: if modules have changed since they were analysed, or how the optimizer works is not known.

        >>> import torch, equinorm
        >>> net, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)), torch.randn(3, 8)
        >>> before = net(x)
        >>> permutations = equinorm.permutations(net, (x,))
        >>> permutations.permute_(permutations.random())
        >>> torch.allclose(net(x), before, atol=1e-5)
        True
        """
        orders = self.layout.orders(permutation)
        self._guard.check()
        tensors = tensors_of(self.model)
        moves, moving = list[Reordering](), dict[int, tuple[str, list[Tensor | None]]]()
        for source, axes in self.layout.axes.items():
            indices = places(axes, orders)
            if all(index is None for index in indices):
                continue
            tied = unchanged(source.names, source.shape, tensors, PermutationError)
            moves.append(Reordering(source.names[0], tied[0], indices))
            for tensor in tied:
                moving[id(tensor)] = source.names[0], indices
                if tensor.grad is not None:
                    moves.append(Reordering(f"gradient of {source.names[0]}", tensor.grad, indices))
        if optimizer is not None:
            check_trains(optimizer, self.model)
            moves += [Reordering(what, state, moving[owner][1]) for what, state, owner in states_of(optimizer, moving)]
        for move in moves:
            check_in_place(move.what, move.tensor, "permute", PermutationError)
        write_all_(moves, PermutationError)

    def details(self) -> str:
        """Every family with all that moves along, and every pin, however many lines that takes.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        >>> print(equinorm.permutations(net, (torch.randn(1, 8),)).details())
        Sequential: 16 channels in 1 family can be permuted
          16 channels: 0.weight[0], 0.bias[0], 2.weight[1]
        pinned:
          0.weight[1]: 8 channels by model input
          2.weight[0]: 4 channels by model output
          2.bias[0]: 4 channels by model output
        """
        return description.details(self.model, self.families, self.pins)

    def __str__(self) -> str:
        return description.text(self.model, self.families, self.pins)

    def _repr_html_(self) -> str:
        return description.markup(self.model, self.families, self.pins)


@on_cpu()
def permutations(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    both_modes: bool = False,
    opaque: Choice = (),
    also: Sequence[tuple | Tensor | Mapping[str, Any]] = (),
) -> Permutations:
    """Discover every permutation of hidden channels that leaves a network's function unchanged.

    The model is exported once with `torch.export` and its graph is run on axes instead of numbers: elementwise operations ask
    that their operands are permuted alike, products that are summed ask that both factors are. Operations without a law
    pin what they touch, so that what is found is exact, whatever the weights, unless a router's scores tie. No weight is read.

    Args:
        model: any module that `torch.export` can handle; torch.compile, DistributedDataParallel, DataParallel and AveragedModel
            are looked through.
        args: its positional inputs, a tuple (one tensor may stand alone).
        kwargs: its keyword inputs.
        both_modes: find what holds in training and in evaluation mode, instead of in the mode that the model is in.
        opaque: names or submodules that are not looked into, as in `symmetries`: all that they touch is pinned.
        also: further inputs, for all of which the permutations must hold, as in `symmetries`.

    Returns:
        The group: its families, how every tensor moves, and why axes are pinned.

    Raises:
        ExportError: if the model cannot be exported with these inputs.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    >>> equinorm.permutations(net, (torch.randn(1, 8),)).num_families
    1
    """
    return permutations_of(graphs_of(model, args, kwargs, opaque, both_modes=both_modes, also=also))


def permutations_of(graphs: Graphs, *, with_points: bool = False) -> Permutations:
    """What `permutations` finds in graphs that others may read too; with points, the graph is kept."""
    found = discover(graphs)
    free, all_families = families(found.axes, found.dependence)
    around = [found.dependence.of(atom) for atom in free]
    points = Points.of(*found.own) if with_points else None
    layout = Layout(all_families, found.axes, free, around)
    return Permutations(graphs.model, all_families, pins(found.axes), found.seconds, layout, points)
