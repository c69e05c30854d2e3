"""The value of one operation: computed where it is constant, pinned where nothing is known, otherwise by its rule."""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from equinorm.discovery.any_size import OF_DATA, alike, asks_for_size, at_one_size, cut, has_unknown_size
from equinorm.discovery.graph.nodes import bind, fill_value, is_computable, is_small, is_static, mapped
from equinorm.discovery.labels import Label
from equinorm.discovery.rules import SIGNS, Call, find, key, why_not
from equinorm.discovery.selected_rows import follow
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import VALUES, Chosen, Constant, Source, Value, source_of

_BRINGS_ZEROS = "pad constant_pad_nd tril triu diag diag_embed diagflat block_diag im2col"
"""Movements whose results have zeros that their inputs lack."""

_MANY = 4
"""Factors of a label from which on it pays to look which of them still say something."""

MARKS = {"opaque.default": "declared opaque", "observed.default": "kept for later, or read by a hook"}
"""What operations of our own in a graph stand for."""

_NO_RULE = "no rule: taken to fit no scale"

_NO_SIGN = "not known to be odd or even"

_PASS: Any = object()
"""What a case answers that says nothing about an operation."""


class Operation:
    """One operation of a graph, on values instead of numbers.

    Args:
        node: the operation.
        args: values of its positional arguments.
        kwargs: values of the others.
        trace: gathers the laws.
    """

    def __init__(self, node: fx.Node, args: tuple, kwargs: dict[str, Any], trace: Trace) -> None:
        self.node, self.args, self.kwargs, self.trace = node, args, kwargs, trace
        self.target: Any = node.target
        self.result: Any = trace.sizes.known(node.meta.get("val"))
        self.tensors = list(flat((args, kwargs)))
        self.is_at_one_size = False

    def value(self) -> Any:
        """What the first of `_CASES` says that says anything."""
        value = next(value for case in _CASES if (value := case(self)) is not _PASS)
        return alike(self.trace, value, self.node.meta["val"]) if self.is_at_one_size else value

    def call(self) -> Call:
        """The operation as rules see it."""
        return Call(self.target, bind(self.target, self.args, self.kwargs), self.result)

    def _part(self) -> Any:
        """A part of several results."""
        return self.args[0][self.args[1]] if self.target is operator.getitem else _PASS

    def _assertion(self) -> Any:
        """What stands before every conversion and reads no entry."""
        return None if self.target is torch.ops.aten._assert_tensor_metadata.default else _PASS

    def _size(self) -> Any:
        """A size that data decide."""
        return self.result if asks_for_size(self.node) else _PASS

    def _of_unknown_sizes(self) -> Any:
        """Operations on sizes or numbers that data decide, but for those whose law is the same at every size."""
        if not has_unknown_size(self.node) or not isinstance(self.target, torch._ops.OpOverload):
            return _PASS
        if (pieces := cut(self.trace, self.node, self.args, self.kwargs, self.result)) is not None:
            return pieces
        found = at_one_size(self.node, self.args, self.kwargs, self.result, self.trace.sizes)
        if found is None:
            return self._unknown(OF_DATA)
        self.args, self.kwargs = found
        self.tensors, self.is_at_one_size = list(flat((self.args, self.kwargs))), True
        return _PASS

    def _no_operator(self) -> Any:
        """Python's own functions of numbers, and those that run graphs."""
        if isinstance(self.target, torch._ops.OpOverload):
            return _PASS
        return self._unknown() if self.tensors else self.target(*self.args, **self.kwargs)

    def _computed(self) -> Any:
        """What depends on constants only, in-place updates included."""
        if not all(isinstance(value, Constant) for value in self.tensors) or not is_computable(self.node):
            return _PASS
        with torch.no_grad():
            return _wrapped(self.target(*mapped(self.args, _number), **mapped(self.kwargs, _number)))

    def _filled(self) -> Any:
        """New tensors of one number."""
        value = fill_value(self.node) if is_small(self.node) else None
        return _PASS if value is None else Constant(torch.full(self.result.shape, value, dtype=self.result.dtype))

    def _of_chosen_rows(self) -> Any:
        """What leaves rows that data chose apart."""
        if not any(isinstance(value, Chosen) for value in self.tensors):
            return _PASS
        followed = follow(self.trace, self.call())
        return _PASS if followed is None else followed

    def _of_pinned(self) -> Any:
        """Whatever is done with what does not scale, but for zeros that come in."""
        name = key(self.target) if isinstance(self.target, torch._ops.OpOverload) else ""
        if name in _BRINGS_ZEROS.split() or (
            name == "mul" and any(type(value) in (int, float) and not value for value in self.args)
        ):
            return _PASS
        return pinned(self.result) if all(is_pinned(value, self.trace) for value in self.tensors) else _PASS

    def _by_rule(self) -> Any:
        """What the operator's rule says, and pinned where no rule can."""
        rule = find(self.target, SIGNS) if self.trace.signs else find(self.target)
        if rule is None or not is_static(self.result):
            return self._unknown()
        label = rule(self.trace, self.call())
        self._note_reads(label)
        if isinstance(label, VALUES) and not (self.result.dtype.is_floating_point or self.result.dtype.is_complex):
            return self.trace.pin(label, "rounds to integers")  # for example a sum with dtype=torch.int64
        if isinstance(label, VALUES) and self.result.dtype.itemsize == 1:
            return self.trace.pin(label, "rounds to eight bits, which saturate")
        if isinstance(label, Label) and len(label.factors) > _MANY:
            return self.trace.reduced(label)
        return label

    def _note_reads(self, result: Any) -> None:
        """Remember parameters whose entries were read although nothing asked how they scale, as by sign(w)."""
        shown = source_of(result)
        for source in filter(None, map(source_of, self.tensors)):
            if source.label is None and shown not in (source, *self.trace.shifted.get(source, {}).values()):
                self.trace.read.add(source)

    def _unknown(self, detail: str = _NO_RULE) -> Any:
        """Pin everything that goes in; what comes out does not scale."""
        why = MARKS.get(getattr(self.target, "__name__", "")) or detail
        if isinstance(self.target, torch._ops.OpOverload):
            why = (_NO_SIGN if self.trace.signs else why_not(key(self.target))) or why
        for value in self.tensors:
            self.trace.pin(value, why)
        return pinned(self.result)


_CASES: tuple[Callable[[Operation], Any], ...] = (
    Operation._part,  # of what may hold no tensor
    Operation._assertion,  # takes tensors and must not pin them, whatever their sizes
    Operation._size,  # reads no entry either
    Operation._of_unknown_sizes,  # before all that looks at shapes
    Operation._no_operator,  # before all that looks at a schema
    Operation._computed,  # numbers say more than labels: before every law
    Operation._filled,  # whatever goes in does not matter: before what pins it
    Operation._of_chosen_rows,  # before anything asks for the label of chosen rows, which makes all rows scale alike
    Operation._of_pinned,  # before the rules: what does not scale needs no law, nor a reason why not
    Operation._by_rule,  # always says something
)
"""Kinds of operations, in the order in which they are tried: each counts on those before it to have said nothing."""


def flat(values: Any) -> Iterable[Value]:
    """Every tensor value in nested lists and dicts."""
    if isinstance(values, VALUES):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from flat(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from flat(value)


def is_pinned(value: Value, trace: Trace) -> bool:
    """Is it known that no entry of the value scales?"""
    if isinstance(value, Chosen):
        return is_pinned(value.value, trace)
    if trace.is_unlabelled(value):
        return False
    if isinstance(value, Source) and value.label is None:
        return trace.batch_norm == "affine"
    label = trace.label(value)
    return not label.factors


def pinned(result: Any) -> Any:
    """Labels of results that do not scale."""
    if isinstance(result, Tensor):
        return Label(tuple(result.shape))  # sizes that no number stands for stay symbols: no rule looks at them
    if isinstance(result, (list, tuple)):
        return [pinned(part) for part in result]
    return result


def _number(argument: Any) -> Any:
    return argument.value if isinstance(argument, Constant) else argument


def _wrapped(output: Any) -> Any:
    return Constant(output) if isinstance(output, Tensor) else [_wrapped(part) for part in output]
