"""What a rule may ask for: labels of values, and laws between them.

Rules see the network one operation at a time through a `Trace`. They read labels, and impose laws on them: equal, constant
along axes, pinned, contracted. A parameter has no label until its first use gives it one; later uses must agree with it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from equinorm._scaling import HALVES, IN_HALF, Reason
from equinorm.discovery.classes import PINNED, ZERO, Classes
from equinorm.discovery.graph.sizes import Sizes
from equinorm.discovery.labels import Factor, Label, compact
from equinorm.discovery.values import Chosen, Constant, Source, Value, View


@dataclass(eq=False)
class Trace:
    """The laws gathered so far, and the operation that is being looked at."""

    classes: Classes = field(default_factory=Classes)
    batch_norm: str = "affine"
    signs: bool = False
    """Are scales −1, by the rules of `SIGNS`, instead of positive?"""
    sizes: Sizes = field(default_factory=lambda: Sizes(1009))
    """The number that stands for each size that data decide; small, since a label may write it out."""
    reason: Reason = field(default_factory=lambda: Reason("model"))
    shifted: dict[Source, dict[float, Source]] = field(default_factory=dict)
    read: set[Source] = field(default_factory=set)
    """Parameters of which operations read entries before they had a label, other than to shift them."""
    idle: list[Source | View] = field(default_factory=list)
    """Parameters that met the constant zero alone, so that they may scale in any way that another use does not forbid."""
    casts: list[tuple[Value, torch.dtype, Reason, bool]] = field(default_factory=list)
    """Values that lose bits where an operation reads them, what it rounds to, the operation, and whether by autocast."""

    # ------------------------------------------------------------------------------------------------------- labels

    def fresh(self, shape: Sequence[int], axes: Sequence[int]) -> Label:
        """A label of one new class for each index of `axes`."""
        sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
        ids = torch.from_numpy(self.classes.fresh(int(np.prod(sizes, dtype=np.int64)))).reshape(sizes)
        return Label.of(shape, ids)

    def label(self, value: Value | float) -> Label:
        """The label of a value or a number. A parameter without one gets the most general product over its axes."""
        if isinstance(value, Label):
            return value
        if isinstance(value, (bool, int, float, complex)):
            return Label.of((), torch.tensor(ZERO if value in (0, *(() if self.signs else (math.inf, -math.inf))) else PINNED))
        if isinstance(value, Constant):
            return _constant_label(value.value, not self.signs)
        if isinstance(value, Chosen):  # any entry may be any row
            return self.merge(value.value, [value.axis]).expand(value.shape)
        if isinstance(value, View):
            self.label(value.source)
            assert value.label is not None
            return value.label
        if value.label is None:
            value.label = self._general(value.shape, range(len(value.shape))) if value.may_scale else Label(value.shape)
        return value.label

    def _general(self, shape: Sequence[int], along: Iterable[int]) -> Label:
        """The most general product of classes over these axes."""
        axes = [axis for axis in along if shape[axis] > 1]
        parts = [self.fresh(shape, axes[:1])]
        for axis in axes[1:]:  # scales of two axes are defined up to a common factor only: fix the first index
            ids = np.append(PINNED, self.classes.fresh(shape[axis] - 1))
            sizes = [-1 if other == axis else 1 for other in range(len(shape))]
            parts.append(Label.of(shape, torch.from_numpy(ids).reshape(sizes)))
        return Label(tuple(shape), tuple(factor for part in parts for factor in part.factors))

    def is_unlabelled(self, value: object) -> bool:
        """Is this a parameter that no operation has used yet?"""
        source = value.source if isinstance(value, View) else value
        return isinstance(source, Source) and source.may_scale and source.label is None

    def assign(self, value: Value, wanted: Label) -> None:
        """Give a tensor of the model its label at its first use; ask any other value to have this one."""
        if isinstance(value, View) and value.label is None:
            self.assign(value.source, value.back(wanted))
        elif isinstance(value, Source) and value.label is None:
            value.label = Label(value.shape, wanted.definite().factors)
        else:
            self.equal(self.label(value), wanted)

    def filled(self, label: Label, axes: Sequence[int] = ()) -> Label:
        """The label with a new class for every constant zero: what meets zeros only may scale at will there.

        Where all entries along `axes` are zero there is none: another factor already moves them together.
        """
        silent = label.zeros()
        if silent is not None and axes:
            silent = silent & ~silent.all(dim=tuple(axes), keepdim=True)
        if silent is None or not bool(silent.any()):
            return label.definite()
        ids = torch.full(silent.shape, PINNED)
        ids[silent] = torch.from_numpy(self.classes.fresh(int(silent.sum())))
        return Label(label.shape, (*label.definite().factors, Factor(Fraction(1), ids)))

    def affine(self, value: object, factor: float, number: float) -> View | None:
        """factor·w + number for a parameter that has no label yet: it scales as w + number/factor does, a tensor of its own.

        None for anything else, for |w| + number, and for sums in half precision, where s·(1 + w) − 1 cannot be stored to the
        precision of 1 + w; these are pinned, with that reason.
        """
        if not isinstance(value, (Source, View)) or not self.is_unlabelled(value):
            return None
        view = value if isinstance(value, View) else View(value, tuple(range(len(value.shape))))
        factor, source = view.factor * factor, view.source
        if not factor or not math.isfinite(factor):
            return None
        if number and source.dtype in HALVES:
            self.pin(value, IN_HALF)
            return None
        if number:
            offset = number / factor
            if not view.is_itself or source.offset or not offset or not math.isfinite(offset):
                return None
            fresh = Source(source.names, source.shape, source.kind, source.dtype, offset=offset)
            source = self.shifted.setdefault(source, {}).setdefault(offset, fresh)
        return replace(view, source=source, factor=factor)

    def settle(self) -> None:
        """Give idle and shifted parameters their label and offset; pin those that the network also reads in another way."""
        for value in self.idle:
            if (value.source if isinstance(value, View) else value) not in self.shifted:
                self.label(value)
        self.reason = Reason("several uses of one parameter", "with a number added and without, or with several")
        for source, shifts in self.shifted.items():
            if source.label is not None or source in self.read or len(shifts) > 1:
                for value in (source, *shifts.values()):
                    self.pin(value)
            else:
                ((source.offset, shifted),) = shifts.items()
                source.label = shifted.label

    def reduced(self, label: Label) -> Label:
        """The same label in fewer factors: without those that are pinned by now, or cancel."""
        kept: list[Factor] = []
        for factor in label.factors:
            ids = compact(torch.from_numpy(self.classes.resolve(factor.ids.numpy())))
            if ids.numel() == 1 and ids.item() == PINNED:
                continue
            inverse = Factor(-factor.exponent, ids)
            twin = next((i for i, other in enumerate(kept) if _same(inverse, other)), None)
            if twin is None:
                is_new = bool((ids >= 0).all()) and not torch.equal(ids, factor.ids)
                kept.append(Factor(factor.exponent, ids) if is_new else factor)
            else:
                del kept[twin]
        return Label(label.shape, tuple(kept))

    # --------------------------------------------------------------------------------------------------------- laws

    def pin(self, value: Value | float, detail: str = "") -> Label:
        """Ask that no entry of the value scales; return the pinned label of its shape."""
        label = self.label(value.value if isinstance(value, Chosen) else value)
        self._vanish(list(label.factors), replace(self.reason, detail=detail))
        return Label(value.shape if isinstance(value, Chosen) else label.shape)

    def equal(self, left: Label, right: Label) -> None:
        """Ask that two labels agree at every entry, broadcast against each other."""
        shape = torch.broadcast_shapes(left.shape, right.shape)
        left, right = left.expand(shape), right.expand(shape)
        factors = list(left.factors)
        for factor in right.factors:
            twin = next((i for i, f in enumerate(factors) if _same(f, factor)), None)
            if twin is None:
                factors.append(Factor(-factor.exponent, factor.ids))
            else:
                del factors[twin]
        self._vanish(factors, self.reason)

    def add(self, left: Value | float, right: Value | float) -> Label:
        """The label of a sum (or maximum, or choice) of two values: their labels must agree except where one is zero."""
        for one, other in ((left, right), (right, left)):
            if isinstance(one, (Source, View)) and self.is_unlabelled(one) and not self.label(other).is_zero:
                self.assign(one, self.filled(self._fold(self.label(other), one.shape)))
        a, b = self.label(left), self.label(right)
        shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
        self.equal(a, b)
        a, b = a.expand(shape), b.expand(shape)
        a_zero, b_zero = a.zeros(), b.zeros()
        if a_zero is None or (b_zero is not None and bool((b_zero & a_zero).eq(a_zero).all())):
            return a  # wherever a is zero, so is b
        if b_zero is None:
            return b
        choice = torch.where(a_zero, self._single(b), self._single(a))
        return Label.of(shape, choice)

    def merge(self, value: Value, axes: Sequence[int]) -> Label:
        """Ask that the label be constant along `axes`; return it with size 1 there."""
        shape = value.shape
        axes = sorted({axis % max(len(shape), 1) for axis in axes}) if shape else []
        if self.is_unlabelled(value):  # a class for each index of the other axes, and none that they share
            self.assign(value, self._general(shape, [axis for axis in range(len(shape)) if axis not in axes]))
        label = self.label(value)
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        varying = [factor for factor in label.factors if factor.varies(axes)]
        steady = tuple(factor for factor in label.factors if not factor.varies(axes))
        if not varying:
            return Label(shape, steady)
        if len(varying) == 1:
            (factor,) = varying
            joint = Factor(factor.exponent, factor.ids.amax(axes, keepdim=True))  # ZERO only where all entries are zero
        else:
            sizes = torch.broadcast_shapes(*(f.ids.shape for f in varying))
            silent = torch.stack([(f.ids == ZERO).expand(sizes) for f in varying]).any(0).all(dim=axes, keepdim=True)
            ids = torch.from_numpy(self.classes.fresh(silent.numel())).reshape(silent.shape)
            joint = Factor(Fraction(1), torch.where(silent, ZERO, ids))
        self._vanish([*varying, Factor(-joint.exponent, joint.ids)], self.reason)
        return Label(shape, (*steady, Factor(joint.exponent, compact(joint.ids))))

    def _fold(self, label: Label, shape: Sequence[int]) -> Label:
        """Ask that a label be constant along the axes on which a tensor of `shape` is broadcast to it."""
        lead = len(label.shape) - len(shape)
        if lead < 0:
            return self._fold(label.expand((1,) * -lead + label.shape), shape)
        broadcast = [axis for axis in range(len(label.shape)) if axis < lead or shape[axis - lead] == 1]
        label = self.merge(label, broadcast)
        return Label(tuple(shape), tuple(Factor(f.exponent, f.ids.reshape(f.ids.shape[lead:])) for f in label.factors))

    def _single(self, label: Label) -> Tensor:
        """Ids of one factor of exponent 1 that says the same."""
        if not label.factors:
            return torch.tensor(PINNED).expand(label.shape)
        if len(label.factors) == 1 and label.factors[0].exponent == 1:
            return label.ids()[0]
        sizes = torch.broadcast_shapes(*(f.ids.shape for f in label.factors))
        ids = torch.from_numpy(self.classes.fresh(int(np.prod(sizes)))).reshape(sizes)
        silent = torch.stack([(f.ids == ZERO).expand(sizes) for f in label.factors]).any(0)
        ids = torch.where(silent, ZERO, ids)
        self._vanish_flat([*label.factors, Factor(Fraction(-1), ids)], self.reason)
        return ids.expand(label.shape)

    def _vanish(self, factors: list[Factor], reason: Reason, start: int = 0) -> None:
        """Ask that the product of these factors be 1 at every entry.

        Along an axis on which only some factors vary, it is enough that those be constant there and that the law hold at
        its first index. The zeros must not be among them: they would hide the others.
        """
        if not any(factor.has_zero for factor in factors):
            for axis in range(start, factors[0].ids.dim() if factors else 0):
                varying = [factor for factor in factors if factor.varies([axis])]
                if varying and len(varying) < len(factors):
                    first = [Factor(-f.exponent, f.ids.narrow(axis, 0, 1)) for f in varying]
                    self._vanish([*varying, *first], reason, axis + 1)
                    factors = [Factor(f.exponent, f.ids.narrow(axis, 0, 1)) for f in factors]
        self._vanish_flat(factors, reason)

    def _vanish_flat(self, factors: Sequence[Factor], reason: Reason) -> None:
        if factors:
            factors = _without_repeats(factors)
            sizes = torch.broadcast_shapes(*(factor.ids.shape for factor in factors))
            self.classes.equate([(f.exponent, f.ids.expand(sizes).reshape(-1).numpy()) for f in factors], reason)


_MANY = 1 << 14
"""Entries from which on it pays to look for slices that say the same as those before them."""


def _without_repeats(factors: Sequence[Factor]) -> Sequence[Factor]:
    """The same laws without slices that repeat the one before, as most of a sequence of tokens does."""
    for axis in range(factors[0].ids.dim()):
        sizes = torch.broadcast_shapes(*(factor.ids.shape for factor in factors))
        if sizes[axis] < 3 or math.prod(sizes) < _MANY:
            continue
        others = [other for other in range(len(sizes)) if other != axis]
        new = torch.zeros(sizes[axis] - 1, dtype=torch.bool)
        for factor in factors:
            if factor.ids.size(axis) > 1:
                later, earlier = factor.ids.narrow(axis, 1, len(new)), factor.ids.narrow(axis, 0, len(new))
                new |= (later != earlier).any(others) if others else later != earlier
        if bool(new.all()):
            continue
        kept = torch.cat([torch.ones(1, dtype=torch.bool), new]).nonzero().flatten()
        factors = [Factor(f.exponent, f.ids.index_select(axis, kept) if f.ids.size(axis) > 1 else f.ids) for f in factors]
    return factors


def _same(left: Factor, right: Factor) -> bool:
    if left.exponent != right.exponent or left.ids.shape != right.ids.shape:
        return False
    return (left.ids is right.ids or torch.equal(left.ids, right.ids)) and not left.has_zero


def _constant_label(value: Tensor, infinities_fit: bool) -> Label:
    if value.is_meta or value.layout != torch.strided or not (value.dtype.is_floating_point or value.dtype.is_complex):
        return Label(tuple(value.shape))
    value = value.cpu()  # labels live there, wherever the model does
    fits = (value == 0) | value.isinf() if infinities_fit else value == 0
    return Label.of(value.shape, torch.where(fits, ZERO, PINNED))
