"""How every value inside a network scales: one record for each value of the exported graph, resolved when it is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import torch
from torch import Tensor

from equinorm._display import count
from equinorm._errors import EquinormError
from equinorm._scaling import Scaling
from equinorm.discovery.classes import Classes
from equinorm.discovery.labels import Label
from equinorm.discovery.resolve import factors


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What is kept of a value to tell how it scales.

    Attributes:
        label: of the value, or of the table whose rows it chooses; None if it does not scale.
        offset: what scales is the value plus this number.
        axis: along which data choose the entries, if they do.
        is_one: False where no single scale says how it moves.
    """

    label: Label | None = None
    offset: float = 0.0
    axis: int | None = None
    is_one: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class SolvedClasses:
    """The classes after all laws, and the free ones that move tensors of the model, ascending."""

    classes: Classes
    roots: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class InnerValue:
    """One value of a network's graph: an input, a tensor of the model, or what an operation makes.

    Attributes:
        name: of the graph's node; in a part of the graph that runs apart (autocast, no_grad), "part.node".
        operator: "aten.relu" and the like; "input", "parameter", "buffer" or "constant" for what enters the graph.
        module: dotted path of the module that made it; empty for the model itself.
        source: "file.py:12" of the user's innermost frame, or empty.
        shape: its sizes; −1 for those that data decide.
        dtype: its dtype.
        depth: number of weights on the longest path from an input to it.
        reads: names of the values that the operation reads, by its arguments' names: `{"input": "relu", "weight": "p_weight"}`;
            those in a list are numbered, as "tensors[0]".
        tensor: the first name of the model's tensor that it is, or empty.
        parameters: the parameters that alone determine it, as those of a weight's norm; none behind an input.
        is_returned: does the model return it, or does something read it that makes no value, as a hook?
        memory: name of the value in whose memory it lies: its own, or another's for a view.
    """

    name: str
    operator: str
    module: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    depth: int
    reads: Mapping[str, str]
    tensor: str
    parameters: tuple[str, ...]
    is_returned: bool
    memory: str
    _held: Held = field(repr=False)
    _solved: SolvedClasses = field(repr=False)

    @property
    def scaling(self) -> Scaling | None:
        """How it scales, in the form of a parameter's; without factors where it is pinned, None if no one scale says so."""
        held = self._held
        found = () if held.label is None else factors(held.label, self._solved.classes, self._solved.roots)
        is_chosen = held.axis is not None and any(ids.size(held.axis) > 1 for _, ids in found)
        if is_chosen or (found and not held.is_one):
            return None
        return Scaling((self.name,), self.shape, self.dtype, "value", "value", self.depth, found, held.offset if found else 0.0)

    def log_scales_along(self, axis: int, log_scales: Tensor) -> Tensor:
        """Log-scale of each index of an axis, such as the channels: float64, of shape (size of the axis,).

        Args:
            axis: of the value; negative ones count from the last.
            log_scales: free log-scales of shape (num_free,).

        Raises:
            EquinormError: if the value has no such axis, or scales differently along others too.
        """
        scaling, rank = self.scaling, len(self.shape)
        if not -rank <= axis < rank:
            raise EquinormError(f"{self.name} has {rank} axes: there is no axis {axis}.")
        others = [other for other in range(rank) if other != axis % rank]
        if scaling is None or any(ids.size(other) > 1 for _, ids in scaling.factors for other in others):
            raise EquinormError(f"{self.name}, of shape {self.shape}, does not scale along axis {axis} alone: see its scaling.")
        return scaling.log_scales(log_scales).reshape(-1).expand(self.shape[axis])


class InnerValues(Sequence[InnerValue]):
    """The values of a graph in its order; one by its name, too.

    What a layer reads, how that scales along its channels, and what the layer gives:

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4))
    >>> symmetries = equinorm.symmetries(net, (torch.randn(5, 3),))
    >>> (layer,) = symmetries.values.uses("2.weight")
    >>> layer.operator, layer.module, dict(layer.reads)
    ('aten.linear', '2', {'input': 'relu', 'weight': 'p_2_weight', 'bias': 'p_2_bias'})
    >>> symmetries.values[layer.reads["input"]].log_scales_along(-1, torch.tensor([0.5, 2.0]))
    tensor([0.5000, 2.0000], dtype=torch.float64)
    >>> layer.log_scales_along(-1, torch.tensor([0.5, 2.0]))
    tensor([0., 0., 0., 0.], dtype=torch.float64)
    """

    def __init__(self, values: Sequence[InnerValue]) -> None:
        self._values = tuple(values)
        self._places = {value.name: place for place, value in enumerate(self._values)}

    @overload
    def __getitem__(self, key: int | str) -> InnerValue: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[InnerValue, ...]: ...

    def __getitem__(self, key: int | str | slice) -> InnerValue | tuple[InnerValue, ...]:
        if not isinstance(key, str):
            return self._values[key]
        if key not in self._places:
            first = ", ".join(list(self._places)[:8])
            raise EquinormError(f"the graph has no value {key!r}. Its first values are {first}.")
        return self._values[self._places[key]]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[InnerValue]:
        return iter(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._places if isinstance(key, str) else key in self._values

    def __repr__(self) -> str:
        return count(len(self), "value")

    def readers(self, name: str) -> list[InnerValue]:
        """The values that read this one, in order."""
        return [value for value in self._values if name in value.reads.values()]

    def uses(self, parameter: str) -> list[InnerValue]:
        """The values in which this parameter meets an activation, as it is or changed (transposed, normalized), in order."""
        shown = {value.name for value in self._values if parameter in value.parameters}
        return [value for value in self._values if not value.parameters and shown & set(value.reads.values())]
