"""Recurrent layers and cells: each hidden channel with its gates, the same at every step.

h_t = f(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh), where the rows of the weights hold one segment of channels for each gate.
"""

from collections.abc import Sequence
from typing import Any

from equinorm.permuting.atoms import Axis, Sum, cut, is_pinned, size_of
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.movement import along
from equinorm.permuting.laws.registry import Call, law
from equinorm.permuting.values import Laid, Stacked

_GATES = {"lstm": 4, "gru": 3, "lstm_cell": 4, "gru_cell": 3}
"""Gates of those that have more than one."""


def _channels(book: LawBook, gates: int, weights: Sequence[Laid]) -> Axis:
    """The hidden channels, which each gate has in its rows, in every weight and bias."""
    found: Axis = ()
    for weight in weights:
        rows = weight.axes[0]
        pieces = cut(rows, [size_of(rows) // gates] * gates, book.reason)
        if pieces is None:
            book.pin_axis(rows, "its gates are no parts of its rows")
            pieces = [book.fixed(size_of(rows) // gates)]
        for piece in pieces:
            found = book.same(found, piece)
    return found


def _step(book: LawBook, name: str, x: Axis, weights: Sequence[Laid], projection: Laid | None = None) -> tuple[Axis, Axis]:
    """Axes of a state and, for an LSTM, of its memory."""
    channels = _channels(book, _GATES.get(name, 1), weights)
    state = channels
    book.same(x, weights[0].axes[1])
    if projection is not None:
        book.same(channels, projection.axes[1])
        state = projection.axes[0]
    book.same(state, weights[1].axes[1])
    return state, channels


def _starts(book: LawBook, start: Laid, axis: Axis) -> None:
    """A first state has the axis; numbers that do not vary along it, such as zeros, fit any."""
    if start.number is None or is_pinned([start.axes[-1]]):
        book.same(start.axes[-1], axis)


@law("rnn_relu rnn_tanh gru lstm")
def recurrent(book: LawBook, call: Call) -> Any:
    """Several layers, each in one or two directions: weights of a direction are W_ih, W_hh, their biases, and a projection."""
    if "batch_sizes" in call.arguments:
        book.pin(call.arguments, "packed sequences have no law")
        return [book.all_fixed(part.shape) for part in call.result]
    starts = call.hx if call.operator_name == "lstm" else [call.hx]
    time = 1 if call.batch_first and len(call.input.axes) == 3 else 0
    inputs = along(book, call.input, [time], call.input.shape, "a step of time")
    directions = 2 if call.bidirectional else 1
    passes = call.num_layers * directions
    weights = list(call.params)
    count = len(weights) // passes
    axis, ended = inputs.axes[-1], list[tuple[Axis, Axis]]()
    for number in range(passes):
        own = weights[number * count : (number + 1) * count]
        projection = own[-1] if count in (3, 5) else None
        ended.append(_step(book, call.operator_name, axis, own[:-1] if projection is not None else own, projection))
        for start, part in zip(starts, ended[-1], strict=False):
            _starts(book, start, part)
        if number % directions == directions - 1:
            parts = tuple(state for state, _ in ended[-directions:])
            axis = parts[0] if directions == 1 else (Sum(parts),)
    lead = tuple(axis for place, axis in enumerate(inputs.axes[:-1]) if place != time)
    for start in starts:
        book.pin_axis(start.axes[0], "a layer or a direction")
        book.join(Laid(lead), Laid(start.axes[1:-1]))
    last = [_layers(book, [(*lead, ends[place]) for ends in ended]) for place in range(len(starts))]
    return [Laid((*inputs.axes[:-1], axis)), *last]


def _layers(book: LawBook, axes: list[tuple[Axis, ...]]) -> Laid | Stacked:
    """Last states of every layer and direction."""
    if len(axes) == 1:
        return Laid(((), *axes[0]))
    return Stacked(0, tuple(map(Laid, axes)))


@law("rnn_relu_cell rnn_tanh_cell gru_cell lstm_cell")
def cell(book: LawBook, call: Call) -> Any:
    """One step."""
    starts = call.hx if call.operator_name == "lstm_cell" else [call.hx]
    weights = [value for value in (call.w_ih, call.w_hh, call.get("b_ih"), call.get("b_hh")) if value is not None]
    state, channels = _step(book, call.operator_name, call.input.axes[-1], weights)
    for start in starts:
        _starts(book, start, channels)
    lead = (
        book.join(Laid(call.input.axes[:-1]), *(Laid(start.axes[:-1]) for start in starts)) if len(call.input.axes) > 1 else ()
    )
    result = Laid((*lead, state))
    return [result, result] if call.operator_name == "lstm_cell" else result
