"""Signs: channels that may be multiplied by −1, a group of its own beside the positive scales."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from equinorm._class_ids import add_to_classes_
from equinorm._display import count
from equinorm._errors import RescaleError, describe
from equinorm._scaling import Family, Pin, Scaling
from equinorm.discovery.discover import discover
from equinorm.discovery.graph.export import Graphs
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.joining.sign_choice import positive_signs
from equinorm.modules.choosing import Choice, tensors_of
from equinorm.modules.running import on_cpu
from equinorm.rescaling.all_or_none import write_all_
from equinorm.rescaling.checks import check_in_place, unchanged
from equinorm.rescaling.model_guard import ModelGuard
from equinorm.rescaling.optimizer_state import shift, state_of
from equinorm.rescaling.optimizer_wrappers import Optimizers, check_trains, unwrapped_optimizers


@dataclass(frozen=True, slots=True, eq=False)
class Flip:
    """One tensor w ↦ (w + offset) · Π_f signs[ids_f − 1] − offset.

    Attributes:
        names: dotted names in the model, several if tied.
        shape: of the tensor.
        kind: "parameter" or "buffer".
        ids: of sign classes, one tensor for each factor, which broadcast to `shape`; they count from 1, and 0 stays.
        offset: number that the network adds before it uses the tensor.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    ids: tuple[Tensor, ...] = field(repr=False)
    offset: float = 0.0

    def of(self, signs: Tensor) -> Tensor:
        """The sign of every entry; float64, broadcasts to `shape`."""
        padded = torch.cat([torch.ones(1, dtype=torch.float64), signs.double()])
        found = torch.ones((), dtype=torch.float64)
        for ids in self.ids:
            found = found * padded[ids]
        return found


@dataclass(slots=True, eq=False)
class _Flipped:
    """tensor ← (tensor + offset) · sign − offset."""

    what: str
    tensor: Tensor
    sign: Tensor
    offset: float = 0.0
    original: Tensor | None = None
    """What was there, where adding an offset rounds."""

    def taken(self) -> Tensor:
        """What the tensor becomes."""
        if not self.offset:
            return self.tensor * self._sign()
        self.original = self.tensor.detach().clone()
        return (self.tensor + self.offset) * self._sign() - self.offset

    def given_back(self, taken: Tensor) -> Tensor:
        """What it was."""
        return taken * self._sign() if self.original is None else self.original

    def _sign(self) -> Tensor:
        return self.sign.to(self.tensor.device, self.tensor.real.dtype)


class _Place(NamedTuple):
    """A tensor, which of its axes the classes of a family stand along, and the families along the others."""

    flip: int
    at: int
    beside: frozenset[int]


@dataclass(frozen=True, slots=True, eq=False)
class Signs:
    """The group of flips of sign that `signs` discovered.

    Attributes:
        model: the network; untouched, and its weights were not read.
        num_free: number of sign classes, each of which may flip.
        flips: how each parameter and floating-point buffer flips.
        families: sign classes by the tensor axis that introduced them.
        pins: channels that cannot flip, each with the operation and source line that says so.
        seconds: time for export and for interpretation.
    """

    model: nn.Module = field(repr=False)
    num_free: int
    flips: tuple[Flip, ...] = field(repr=False)
    families: tuple[Family, ...]
    pins: tuple[Pin, ...] = field(repr=False)
    seconds: tuple[float, float] = field(repr=False)
    _guard: ModelGuard = field(init=False, repr=False)

    def __post_init__(self) -> None:
        advice = "since the model was analysed, so its signs may be others now. Analyse it again."
        object.__setattr__(self, "_guard", ModelGuard(self.model, advice))

    def random(self, generator: Generator | None = None) -> Tensor:
        """Random signs, uniform over the group: −1 or 1 for each class, int64 of shape (num_free,)."""
        return 2 * torch.randint(0, 2, (self.num_free,), generator=generator) - 1

    @on_cpu()
    def flip_(self, signs: Tensor, optimizer: Optimizers | None = None) -> None:
        """Flip signs in place: parameters, buffers, gradients and the optimizer's state. Every entry keeps its magnitude.

        Args:
            signs: −1 or 1 for each class, of shape (num_free,).
            optimizer: one or several, whose state to move along.

        Raises:
            RescaleError: if signs are none, the model has changed, or a tensor cannot be written; all is as it was then.

        >>> import torch, equinorm
        >>> net, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)), torch.randn(3, 8)
        >>> before = net(x)
        >>> signs = equinorm.signs(net, x)
        >>> signs.num_free
        16
        >>> signs.flip_(signs.random())
        >>> torch.allclose(net(x), before, atol=1e-6)
        True
        """
        if not isinstance(signs, Tensor) or tuple(signs.shape) != (self.num_free,) or not bool((signs.abs() == 1).all()):
            raise RescaleError(f"signs must be a tensor of −1 and 1 of shape ({self.num_free},).")
        self._guard.check()
        writes = list(self._writes(signs.detach().cpu(), optimizer))
        for write in writes:
            check_in_place(write.what, write.tensor, "flip")
        write_all_(writes, RescaleError)

    def _writes(self, signs: Tensor, optimizer: Optimizers | None) -> Iterator["_Flipped"]:
        """All that flips."""
        tensors, moving = tensors_of(self.model), dict[int, tuple[str, Tensor, float]]()
        for flip in self.flips:
            sign = flip.of(signs)
            if bool((sign == 1).all()):
                continue
            tied = unchanged(flip.names, flip.shape, tensors)
            for tensor in tied:
                moving[id(tensor)] = flip.names[0], sign, flip.offset
                if tensor.grad is not None:
                    yield _Flipped(f"gradient of {flip.names[0]}", tensor.grad, sign)
            yield _Flipped(flip.names[0], tied[0], sign, flip.offset)
        if optimizer is None:
            return
        check_trains(optimizer, self.model)
        for inner, wrappers in unwrapped_optimizers(optimizer):
            for parameter in (p for group in inner.param_groups for p in group["params"] if id(p) in moving):
                name, sign, offset = moving[id(parameter)]
                for holder in (inner, *wrappers):
                    for state, value, law in state_of(holder, parameter, name):
                        if law.exponent % 2:
                            yield _Flipped(f"{state} of {name}", value, sign, shift(inner, law, state, name, offset))

    def flipped(self, tensors: Mapping[str, Tensor], signs: Tensor) -> dict[str, Tensor]:
        """Copies of tensors after flips; offsets are in them already."""
        return {flip.names[0]: tensors[flip.names[0]] * flip.of(signs).to(tensors[flip.names[0]].dtype) for flip in self.flips}

    def fit(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], passes: int = 50) -> Tensor:
        """Signs that bring one set of weights near to another: each class in turn takes the sign of Σ a·b over what it flips.

        All start where sums over entries with one product of classes are positive, the largest first; then they are taken in
        turn until none changes.

        Args:
            ours: tensors of one network by name, offsets included.
            theirs: of another.
            passes: most of them.
        """
        products = [(f, ours[f.names[0]].double() * theirs[f.names[0]].double()) for f in self.flips if f.ids]
        signs = positive_signs(((flip.ids, product) for flip, product in products), self.num_free)
        standing = self._standing([flip for flip, _ in products])
        waiting = {*range(len(standing))}
        for _ in range(passes):
            for number, family in enumerate(self.families):
                if number not in waiting:  # nothing beside it has changed
                    continue
                waiting.discard(number)
                span = slice(family.ids.start, family.ids.stop)
                score = _scores([(*products[place.flip], place.at) for place in standing[number]], signs)[span]
                settled = torch.where(score == 0, signs[span], score.sign())
                if not torch.equal(settled, signs[span]):
                    signs[span] = settled
                    waiting |= {other for place in standing[number] for other in place.beside}
            if not waiting:
                break
        return torch.where(signs[1:] < 0, -1, 1)

    def _standing(self, flips: Sequence[Flip]) -> list[list[_Place]]:
        """For each family where its classes stand."""
        owner = torch.full((self.num_free + 1,), -1)
        for number, family in enumerate(self.families):
            owner[family.ids.start : family.ids.stop] = number
        found: list[list[_Place]] = [[] for _ in self.families]
        for index, flip in enumerate(flips):
            owners = [{*owner[ids.unique()].tolist()} - {-1} for ids in flip.ids]
            for at, own in enumerate(owners):
                beside = frozenset().union(*(others for other, others in enumerate(owners) if other != at))
                for number in own:
                    found[number].append(_Place(index, at, beside))
        return found

    def __str__(self) -> str:
        families = count(sum(1 for _ in self.families), "family", "families")
        return f"{describe(self.model)}: {self.num_free} channels in {families} may change their sign"


def _scores(places: Sequence[tuple[Flip, Tensor, int]], signs: Tensor) -> Tensor:
    """Σ a·b over all that each class flips at some places, with the signs of all other classes."""
    scores = torch.zeros_like(signs)
    for flip, rest, at in places:
        ids = flip.ids[at]
        for other, own in enumerate(flip.ids):
            if other != at:
                rest = rest * torch.where(own == ids, 0.0, signs[own])
        add_to_classes_(scores, ids, rest)
    return scores


@on_cpu()
def signs(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    both_modes: bool = False,
    opaque: Choice = (),
    also: Sequence[tuple | Tensor | Mapping[str, Any]] = (),
) -> Signs:
    """Discover every flip of sign that leaves a network's function unchanged.

    Channels may be multiplied by −1 where odd functions (tanh, sin), or nothing, stand between layers, where values meet an
    output projection, queries meet keys, a convolution meets batch normalization. The graph is run on the labels of scales, by
    rules of their own: odd functions hand a flip through, even ones swallow it, all others pin.

    Args:
        model: any module that `torch.export` can handle.
        args: its positional inputs, a tuple (one tensor may stand alone).
        kwargs: its keyword inputs.
        both_modes: find what holds in training and in evaluation mode.
        opaque: names or submodules that are not looked into, as in `symmetries`.
        also: further inputs, as in `symmetries`.

    Returns:
        The group: sign classes, how every tensor flips, why channels are pinned.

    Raises:
        ExportError: if the model cannot be exported with these inputs.

    >>> import torch, equinorm
    >>> relu, tanh = (torch.nn.Sequential(torch.nn.Linear(8, 16), part, torch.nn.Linear(16, 4)) for part in
    ...               (torch.nn.ReLU(), torch.nn.Tanh()))
    >>> [equinorm.signs(net, torch.randn(1, 8)).num_free for net in (relu, tanh)]
    [0, 16]
    """
    return signs_of(graphs_of(model, args, kwargs, opaque, both_modes=both_modes, also=also))


def signs_of(graphs: Graphs) -> Signs:
    """What `signs` finds in graphs that others may read too."""
    found = discover(graphs, "evaluation", signs=True)
    kept = _whole(found.scalings, found.num_free)
    number = torch.zeros(found.num_free + 1, dtype=torch.int64)
    number[1:][kept] = torch.arange(1, int(kept.sum()) + 1)
    flips = tuple(_flip(scaling, number) for scaling in found.scalings)
    families = []
    for family in found.families:
        ids = number[family.ids.start : family.ids.stop]
        ids = ids[ids > 0]
        if len(ids):
            families.append(Family(family.tensor, family.axis, range(int(ids[0]), int(ids[-1]) + 1)))
    return Signs(graphs.model, int(kept.sum()), flips, tuple(families), found.pins, found.seconds)


def _whole(scalings: Sequence[Scaling], size: int) -> Tensor:
    """Which classes enter every tensor with a whole number as exponent, and some with an odd one."""
    broken, odd = (torch.zeros(size + 1, dtype=torch.bool) for _ in range(2))
    for exponent, ids in (factor for scaling in scalings for factor in scaling.factors):
        (broken if exponent != round(exponent) else odd)[ids.unique()] |= exponent != round(exponent) or bool(exponent % 2)
    return (odd & ~broken)[1:]


def _flip(scaling: Scaling, number: Tensor) -> Flip:
    """How a tensor flips, in the classes that are kept: even powers do nothing."""
    ids = tuple(number[ids] for exponent, ids in scaling.factors if exponent == round(exponent) and exponent % 2)
    return Flip(scaling.names, scaling.shape, scaling.kind, tuple(i for i in ids if bool((i > 0).any())), scaling.offset)
