"""The tensors of a model that may move while it trains, those of its averages, and which of them move now."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from equinorm._errors import RescaleError
from equinorm._memory import local
from equinorm._scaling import HALVES, Scaling
from equinorm._symmetries import Symmetries
from equinorm.modules.choosing import tensors_of
from equinorm.rescaling.casts import refusal_in_half
from equinorm.rescaling.in_place import check_writable
from equinorm.rescaling.model_guard import ModelGuard
from equinorm.sharding.modules import reshard
from equinorm.training.averages import by_names, inner_module
from equinorm.training.selection import Selection

Placement = tuple[tuple[torch.device, torch.dtype, tuple[int, ...]], ...]
"""Device, dtype and strides of every tensor that moves."""

_ADVICE = (
    "since ENorm analysed the model, so its symmetries may be others now. Call remove() on the old hook and create a new ENorm."
)
"""What to do where a model has changed."""


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A tensor that moves, or may once it is unfrozen: its scaling, name, and the tensor itself."""

    scaling: Scaling
    name: str
    tensor: Tensor


class Bindings:
    """Scalings and the tensors that they move.

    Args:
        symmetries: of the model.
        selection: which tensors move.
        averages: of the weights: modules, lists, dicts.

    Attributes:
        all: of the model.
        own: those of them that move now.
        averaged: tensors of the averages that move now.

    Raises:
        RescaleError: for averages that lack a tensor.
    """

    def __init__(self, symmetries: Symmetries, selection: Selection, averages: Sequence[Any]) -> None:
        self._selection, self._model, tensors = selection, symmetries.model, symmetries.tensors
        self.all = [found for scaling in selection.candidates for found in _distinct(scaling, tensors)]
        self._in_modules: list[Bound] = []
        self._watches = [ModelGuard(symmetries.model, _ADVICE, {bound.name: bound.tensor for bound in self.all})]
        for average in averages:
            if isinstance(average, nn.Module):
                module = inner_module(average, [bound.name for bound in self.all])
                copies = _in_module(module, self.all)
                self._in_modules += copies
                tensors = {copy.name: copy.tensor for copy in copies}
                self._watches.append(ModelGuard(module, _ADVICE, tensors, "the averaged model"))
        self._lists = [average for average in averages if not isinstance(average, nn.Module)]
        self._listed = self._in_lists()
        if self._lists and not self._listed:
            raise RescaleError("none of the averages is of a parameter that moves: give those of this very model.")
        self.bind()

    def _in_lists(self) -> list[Bound]:
        """Averages in lists and dicts as they are now: libraries put others in their places."""
        found = []
        for average in self._lists:
            tensors = by_names(average, self._model)
            for bound in self.all:
                if bound.name in tensors:
                    found.append(_copy(bound, tensors[bound.name]))
        return found

    def bind(self) -> None:
        """Take what is selected now."""
        self._places = {id(scaling): index for index, scaling in enumerate(self._selection.moving)}
        self.own = [bound for bound in self.all if id(bound.scaling) in self._places]
        self.averaged = [bound for bound in (*self._in_modules, *self._listed) if id(bound.scaling) in self._places]

    @property
    def moving(self) -> list[Bound]:
        """All that moves now."""
        return [*self.own, *self.averaged]

    @property
    def place(self) -> Placement:
        """Where all that moves now is."""
        return tuple((bound.tensor.device, bound.tensor.dtype, local(bound.tensor).stride()) for bound in self.moving)

    def index(self, bound: Bound) -> int:
        """Of its scaling among those that move."""
        return self._places[id(bound.scaling)]

    def overlaps(self, other: "Bindings") -> bool:
        """Do both hold some tensor?"""
        return not {id(bound.tensor) for bound in self.all}.isdisjoint(id(bound.tensor) for bound in other.all)

    def check_models(self) -> None:
        """See that the models are what they were, and look where the averages are.

        Raises:
            RescaleError: if they are not.
        """
        reshard(self._model)
        for watch in self._watches:
            watch.check()
        if self._lists:
            now = self._in_lists()
            if [id(bound.tensor) for bound in now] != [id(bound.tensor) for bound in self._listed]:
                self._listed = now
                self.bind()

    def check_trained(self, owners: Container[int]) -> None:
        """Refuse trainable tensors that no optimizer of this hook steps: another one may, whose state would not move.

        Args:
            owners: `id` of every parameter that one steps.

        Raises:
            RescaleError: which names one.
        """
        for bound in self.own:
            if bound.tensor.requires_grad and id(bound.tensor) not in owners:
                raise RescaleError(
                    f"{bound.name} moves and requires gradients, but is not among the parameters of this optimizer. "
                    "Add it, give all optimizers that train the model, ENorm([one, other], model, ...), freeze it "
                    "(requires_grad_(False)), or keep it still with `modules`."
                )

    def check_tensors(self, power_of_two: bool) -> None:
        """Refuse tensors that cannot move exactly.

        Raises:
            RescaleError: which names one.
        """
        for bound in self.moving:
            _check_tensor(bound, power_of_two)


def _check_tensor(bound: Bound, power_of_two: bool) -> None:
    name, tensor = bound.name, bound.tensor
    if is_traceable_wrapper_subclass(local(tensor)):
        kind = type(local(tensor)).__name__
        raise RescaleError(f"cannot rescale {name}: it is a {kind}; ENorm needs plain dense tensors, or such in shards.")
    check_writable(name, local(tensor))
    if tensor.dtype in HALVES:
        if not power_of_two:
            raise RescaleError(refusal_in_half(name, tensor.dtype, "keep the weights in float32 (autocast does)"))
        if bound.scaling.offset:
            used = f"{bound.scaling.offset:g} + {name}"
            raise RescaleError(f"cannot rescale {name} exactly: the network uses {used}, and it is {tensor.dtype}.")


def _in_module(module: nn.Module, bounds: Sequence[Bound]) -> list[Bound]:
    """The tensors of a module with averaged weights, under the model's names."""
    tensors = tensors_of(module)
    for bound in bounds:
        if bound.name not in tensors:
            raise RescaleError(f"the averaged model has no {bound.name} of shape {tuple(bound.tensor.shape)}.")
    return [_copy(bound, tensors[bound.name]) for bound in bounds]


def _copy(bound: Bound, tensor: Tensor) -> Bound:
    """An average of a tensor."""
    if tensor.shape != bound.tensor.shape:
        found = f", but one of shape {tuple(tensor.shape)}"
        raise RescaleError(f"the averaged model has no {bound.name} of shape {tuple(bound.tensor.shape)}{found}.")
    return Bound(bound.scaling, bound.name, tensor)


def _distinct(scaling: Scaling, tensors: Mapping[str, Tensor]) -> list[Bound]:
    """Tied tensors, each once under its first name."""
    names = {id(tensors[name]): name for name in reversed(scaling.names) if name in tensors}
    return [Bound(scaling, name, tensors[name]) for name in reversed(names.values())]
