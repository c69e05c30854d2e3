"""Records of scale groups, and how they read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor

from equinorm._display import count, listed, shortened
from equinorm._errors import EquinormError
from equinorm._scaling import Pin, Reason

AXES, VALUES, GROUPS = 6, 4, 12
"""Most axes and lines of values that a group shows, and most groups of a network."""


@dataclass(frozen=True, slots=True, eq=False)
class ScaledAxis:
    """An axis of a tensor that moves with a scale group: entry i, plus the offset, by exp(exponents_i · z[ids_i − 1]).

    Attributes:
        tensor: name of the parameter or buffer.
        axes: along which it moves; most often one. Experts that lie in one tensor have two, (expert, channel); none where one
            class moves the whole tensor.
        ids: of the free classes, counted from 1; 0 for entries that this group leaves alone. int64, of size 1 along other axes.
        exponents: of these classes; float64, of the same shape.
        uses: the operations in which the network uses the tensor, with source lines.
        offset: number that the network adds before it uses the tensor (1 for gains written 1 + w), otherwise 0.
    """

    tensor: str
    axes: tuple[int, ...]
    ids: Tensor = field(repr=False)
    exponents: Tensor = field(repr=False)
    uses: tuple[Reason, ...] = field(repr=False, default=())
    offset: float = field(repr=False, default=0.0)

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.axes))}]" if self.axes else self.tensor

    @property
    def channels(self) -> Tensor:
        """Ids along the axes that move, without those of size 1."""
        return self.ids.reshape([self.ids.size(axis) for axis in self.axes])

    def log_scales(self, z: Tensor) -> Tensor:
        """Log-scales of the entries for free log-scales z, of the shape of `ids`: float64."""
        padded = torch.cat([torch.zeros(1, dtype=torch.float64), z.double()])
        return self.exponents * padded[self.ids]


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """A value inside the network that carries a scale group.

    Attributes:
        name: in `Symmetries.values`.
        made_by: the operation that makes it, with the user's source line and the module.
        shape: its sizes; −1 for those that data decide.
    """

    name: str
    made_by: Reason
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return str(self.made_by)


@dataclass(frozen=True, slots=True, eq=False)
class ScaleGroup:
    """Channels that scale together: who brings their scales in, who takes them out, and what carries them in between.

    Attributes:
        up: axes that bring the scales into an activation: a norm's gain, a layer's out-axis.
        down: axes that take them out again: in-axes of those that read the activation.
        along: biases and buffers that move with `up`, as a layer's bias.
        activations: values that carry the scales, in the order of the graph.
        ids: the free classes, ascending, counted from 1; empty if all is pinned.
        pinned_by: what pins channels of `up`; all of them if there are no ids.

    The layer in front brings in two scales, the layer behind takes them out, ReLU carries them:

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4))
    >>> group, output = equinorm.symmetries(net, (torch.randn(5, 3),)).groups()
    >>> str(group.up[0]), str(group.down[0]), str(group.along[0]), group.ids.tolist()
    ('0.weight[0]', '2.weight[1]', '0.bias[0]', [1, 2])
    >>> print(output)
    2.weight[0] is pinned: 4 channels by model output.
    """

    up: tuple[ScaledAxis, ...]
    down: tuple[ScaledAxis, ...]
    along: tuple[ScaledAxis, ...]
    activations: tuple[Activation, ...] = field(repr=False)
    ids: Tensor
    pinned_by: tuple[Pin, ...]

    @property
    def axes(self) -> tuple[ScaledAxis, ...]:
        """All that moves."""
        return (*self.up, *self.down, *self.along)

    @property
    def is_pinned(self) -> bool:
        """Can none of it scale?"""
        return not len(self.ids)

    def __str__(self) -> str:
        pins = "; ".join(f"{count(pin.channels, 'channel')} by {pin.reason}" for pin in self.pinned_by)
        if self.is_pinned:
            return f"{enumerated(self.up)} is pinned: {pins}."
        scales = count(len(self.ids), "scale")
        lines = [f"{self._up() if self.up else 'Nothing'} {_verb('bring', self.up)} in {scales}."]
        if self.down:
            them = "it" if len(self.ids) == 1 else "them"
            lines.append(f"  {enumerated(self.down)} {_verb('take', self.down)} {them} out.")
        if self.along:
            lines.append(f"  {enumerated(self.along)} {_verb('move', self.along)} along.")
        if self.activations:
            lines.append(f"  Carried by {count(len(self.activations), 'value')}:")
            lines += [f"    {line}" for line in shortened([str(value) for value in self.activations], VALUES, "values")]
        if pins:
            lines.append(f"  Pinned: {pins}.")
        return "\n".join(lines)

    def _up(self) -> str:
        """The axes that bring the scales in; some may do so inversely, as keys do to queries."""
        first = signs(self.up[0])
        inverse = [axis for axis in self.up if all(first.get(id, 0) * sign < 0 for id, sign in signs(axis).items())]
        plain = [axis for axis in self.up if axis not in inverse]
        return enumerated(plain) + (f" and, inversely, {enumerated(inverse)}" if inverse else "")


class ScaleGroups(Sequence[ScaleGroup]):
    """The groups of a network, free ones first; prints the first below each other, and `of` gives those of one tensor."""

    def __init__(self, groups: Sequence[ScaleGroup], names: Mapping[str, str]) -> None:
        """`names` are those of all tensors, each with the first name of the tensor."""
        self._groups, self._names = tuple(groups), names

    def __getitem__(self, key):  # pyright: ignore
        return self._groups[key]

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        return count(len(self), "scale group")

    def __str__(self) -> str:
        return "\n".join(shortened([str(group) for group in self._groups], GROUPS, "groups"))

    def of(self, tensor: str) -> list[ScaleGroup]:
        """The groups that move this tensor, or would, were they not pinned.

        Args:
            tensor: name of a parameter or buffer; any of them, if it is tied.

        Raises:
            EquinormError: if no tensor has this name.
        """
        if tensor not in self._names:
            hint = did_you_mean(get_close_matches(tensor, self._names, 4))
            raise EquinormError(f"there is no parameter or floating-point buffer {tensor!r}.{hint}")
        return [group for group in self._groups if any(axis.tensor == self._names[tensor] for axis in group.axes)]


def enumerated(things: Sequence[object], most: int = AXES) -> str:
    """Things in a sentence.

    >>> enumerated(["a", "b", "c"]), enumerated("abcdefgh", 3)
    ('a, b and c', 'a, b and 6 more')
    """
    words = list(dict.fromkeys(map(str, things)))
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return listed(words)


def did_you_mean(near: Sequence[str]) -> str:
    """The end of an error about a name that is not there.

    >>> did_you_mean(["a", "b"]), did_you_mean([])
    (' Did you mean a and b?', '')
    """
    return f" Did you mean {enumerated(near)}?" if near else ""


def _verb(verb: str, axes: Sequence[ScaledAxis]) -> str:
    """In the number of its subject: factors of one axis are one."""
    return verb if len({*map(str, axes)}) > 1 else f"{verb}s"


def signs(axis: ScaledAxis) -> dict[int, float]:
    """The sign with which each class moves an axis."""
    mask = axis.ids > 0
    return dict(zip(axis.ids[mask].tolist(), axis.exponents[mask].sign().tolist(), strict=True))
