"""The tensors of a model that may move while it trains, those of its averages, and which of them move now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from equinorm._errors import RescaleError
from equinorm._memory import local
from equinorm._modules import unwrapped
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.rescaling.in_place import check_writable
from equinorm.rescaling.model_guard import ModelGuard
from equinorm.sharding.modules import reshard
from equinorm.training.frozen import Selection

Place = tuple[tuple[torch.device, torch.dtype, tuple[int, ...]], ...]
"""Device, dtype and strides of every tensor that moves."""


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
        averages: modules with averaged weights.

    Attributes:
        all: of the model.
        own: those of them that move now.
        averaged: tensors of the averages that move now.

    Raises:
        RescaleError: for averages that lack a tensor.
    """

    def __init__(self, symmetries: Symmetries, selection: Selection, averages: Sequence[nn.Module]) -> None:
        self._selection, self._model = selection, symmetries.model
        self.all = [found for scaling in selection.candidates for found in _distinct(scaling, symmetries.tensors)]
        self._copies: list[Bound] = []
        self._watches = [ModelGuard(symmetries.model, {bound.name: bound.tensor for bound in self.all})]
        for module in averages:
            copies = _averaged(module, self.all)
            self._copies += copies
            tensors = {copy.name: copy.tensor for copy in copies}
            self._watches.append(ModelGuard(unwrapped(module), tensors, "the averaged model"))
        self.bind()

    def bind(self) -> None:
        """Take what is selected now."""
        self._places = {id(scaling): index for index, scaling in enumerate(self._selection.moving)}
        self.own = [bound for bound in self.all if id(bound.scaling) in self._places]
        self.averaged = [bound for bound in self._copies if id(bound.scaling) in self._places]

    @property
    def moving(self) -> list[Bound]:
        """All that moves now."""
        return [*self.own, *self.averaged]

    @property
    def place(self) -> Place:
        """Where all that moves now is."""
        return tuple((bound.tensor.device, bound.tensor.dtype, local(bound.tensor).stride()) for bound in self.moving)

    def index(self, bound: Bound) -> int:
        """Of its scaling among those that move."""
        return self._places[id(bound.scaling)]

    def overlaps(self, other: "Bindings") -> bool:
        """Do both hold some tensor?"""
        return not {id(bound.tensor) for bound in self.all}.isdisjoint(id(bound.tensor) for bound in other.all)

    def check_models(self) -> None:
        """See that the models are what they were.

        Raises:
            RescaleError: if they are not.
        """
        reshard(self._model)
        for watch in self._watches:
            watch.check()

    def check_trained(self, optimizer: optim.Optimizer) -> None:
        """Refuse trainable tensors that this optimizer does not step: another one may, whose state would not move.

        Raises:
            RescaleError: which names one.
        """
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for bound in self.own:
            if bound.tensor.requires_grad and id(bound.tensor) not in trained:
                raise RescaleError(
                    f"{bound.name} moves and requires gradients, but is not among the parameters of this optimizer. "
                    "Add it, freeze it (requires_grad_(False)), or keep it still with `modules`."
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
    if tensor.dtype in (torch.float16, torch.bfloat16):
        if not power_of_two:
            raise RescaleError(
                f"cannot rescale {name} exactly: it is {tensor.dtype}, where real scales are rounded away. "
                "Use power_of_two=True, or keep the weights in float32 (autocast does)."
            )
        if bound.scaling.offset:
            raise RescaleError(f"cannot rescale {name} exactly: the network uses 1 + {name}, and it is {tensor.dtype}.")


def _averaged(module: nn.Module, bounds: Sequence[Bound]) -> list[Bound]:
    """The tensors of a module with averaged weights, under the model's names."""
    tensors = dict([*unwrapped(module).named_parameters(), *unwrapped(module).named_buffers()])
    for bound in bounds:
        if bound.name not in tensors or tensors[bound.name].shape != bound.tensor.shape:
            raise RescaleError(f"the averaged model has no {bound.name} of shape {tuple(bound.tensor.shape)}.")
    return [Bound(bound.scaling, bound.name, tensors[bound.name]) for bound in bounds]


def _distinct(scaling: Scaling, tensors: Mapping[str, Tensor]) -> list[Bound]:
    """Tied tensors, each once under its first name."""
    names = {id(tensors[name]): name for name in reversed(scaling.names) if name in tensors}
    return [Bound(scaling, name, tensors[name]) for name in reversed(names.values())]
