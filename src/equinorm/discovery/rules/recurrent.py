"""Recurrent layers and cells. Gates are not homogeneous and pin what they read; weights absorb what inputs bring along.

h_t = f(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh). With f = ReLU each hidden channel scales as in a feed-forward network, the same
at every step. With gates (LSTM, GRU) and tanh the states are pinned; only what an LSTM's projection makes of them scales.
Signs are another matter: tanh is odd, so that states flip with what tanh reads, which is one of the gates' sums; the others, of
which a sigmoid is taken, are pinned.
"""

from collections.abc import Iterator, Sequence

import torch

from equinorm.discovery.labels import Label, move, move_one
from equinorm.discovery.rules.contraction import contract
from equinorm.discovery.rules.registry import Call, rule
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import Value

_GATES = "gates of a recurrent cell"

_SUMS = {"rnn_relu": 1, "rnn_tanh": 1, "gru": 3, "lstm": 4}
"""Sums that a cell makes of what it reads, by the start of its name; of three or more, tanh reads the third."""


def _read(trace: Trace, x: Value, axes: str, weights: Sequence[Value]) -> Iterator[Value]:
    """What one input adds to the gates: W·x, then its bias."""
    yield contract(trace, f"{axes}i,oi->{axes}o", x, weights[0])
    yield from weights[1:]


@rule("aten::rnn_relu.input aten::rnn_tanh.input aten::gru.input aten::lstm.input")
def recurrent(trace: Trace, call: Call) -> list[Label]:
    """Several layers, each in one or two directions: weights of a direction are W_ih, W_hh, their biases, and a projection."""
    x: Value = call.input
    first, *cells = call.hx if call.operator_name == "lstm" else [call.hx]
    if not trace.signs:
        for cell in cells:
            trace.pin(cell, _GATES)
    if call.batch_first:
        x = move_one(lambda ids: ids.transpose(0, 1), trace.label(x))
    weights, start = list(call.params), trace.label(first)
    directions = 2 if call.bidirectional else 1
    passes = call.num_layers * directions
    count = len(weights) // passes
    states: list[Label] = []
    inner: list[Label] = []
    for number in range(passes):
        own = weights[number * count : (number + 1) * count]
        state = move_one(lambda ids, row=number: ids.narrow(0, row, 1), start)
        last, kept = _direction(trace, call.operator_name, x, state, own, call.has_biases)
        states, inner = [*states, last], [*inner, kept]
        if trace.signs:
            for cell in cells:
                trace.add(kept, move_one(lambda ids, row=number: ids.narrow(0, row, 1), trace.label(cell)))
        if number % directions == directions - 1:
            size = (*x.shape[:2], states[-1].shape[-1])
            x = _one(move(lambda *ids: torch.cat(ids, -1), [state.expand(size) for state in states[-directions:]]))
    ends = [[state.expand((1, start.shape[1], state.shape[-1])) for state in side] for side in (states, inner)]
    output = trace.label(x)
    if call.batch_first:
        output = move_one(lambda ids: ids.transpose(0, 1), output)
    return [
        output,
        *(_one(move(lambda *ids: torch.cat(ids, 0), end)) for end in ends[: 2 if call.operator_name == "lstm" else 1]),
    ]


def _direction(
    trace: Trace, name: str, x: Value, start: Label, weights: Sequence[Value], has_biases: bool
) -> tuple[Label, Label]:
    """Labels of the state, and of it before a projection, (1, 1, channels): the same at all steps, in the whole batch."""
    pairs = [[weights[0], weights[2]], [weights[1], weights[3]]] if has_biases else [[weights[0]], [weights[1]]]
    shape = (1, 1, weights[1].shape[0] // _SUMS[name])
    is_free = trace.signs or name == "rnn_relu"
    kept = state = trace.fresh(shape, [2]) if is_free else Label(shape)
    sums = _sums(kept, name) if is_free else None
    if len(weights) > 2 * len(pairs[0]):
        state = contract(trace, "tbi,oi->tbo", kept, weights[-1])
    for value, own in ((x, pairs[0]), (state, pairs[1])):
        for part in _read(trace, value, "tb", own):
            if sums is None:
                trace.pin(part, _GATES)
            else:
                trace.add(sums, part)
    trace.add(state, start)
    return state, kept


def _sums(state: Label, name: str) -> Label:
    """Of the sums of a cell, the one that tanh reads (or ReLU) moves with the state."""
    pinned = Label(state.shape)
    parts = [state if _SUMS[name] == 1 or place == 2 else pinned for place in range(_SUMS[name])]
    return _one(move(lambda *ids: torch.cat(ids, -1), parts))


@rule("rnn_relu_cell rnn_tanh_cell gru_cell lstm_cell")
def cell(trace: Trace, call: Call) -> Label | list[Label]:
    """One step. A GRU's state is also mixed into the next one, an LSTM's second state too: those are pinned."""
    state, *others = call.hx if call.operator_name == "lstm_cell" else [call.hx]
    parts: list[Value] = []
    for value, own in ((call.input, (call.w_ih, call.b_ih)), (state, (call.w_hh, call.b_hh))):
        parts += _read(trace, value, "b" * (len(value.shape) - 1), [weight for weight in own if weight is not None])
    if trace.signs:
        return _flipping(trace, call, parts, [*others, *([state] if call.operator_name == "gru_cell" else [])])
    if call.operator_name == "rnn_relu_cell":
        label = trace.label(parts[0])
        for part in parts[1:]:
            label = trace.add(label, part)
        return label.expand(call.shape)
    for part in (*parts, *others, *([state] if call.operator_name == "gru_cell" else [])):
        trace.pin(part, _GATES)
    results = [call.result] if isinstance(call.result, torch.Tensor) else call.result
    labels = [Label(tuple(result.shape)) for result in results]
    return labels if len(labels) > 1 else labels[0]


def _flipping(trace: Trace, call: Call, parts: Sequence[Value], carried: Sequence[Value]) -> Label | list[Label]:
    """One step, when states flip: with what tanh reads, and with those of the step before that are carried on."""
    results = [call.result] if isinstance(call.result, torch.Tensor) else call.result
    shape = tuple(results[0].shape)
    state = trace.fresh((*[1] * (len(shape) - 1), shape[-1]), [len(shape) - 1])
    sums = _sums(state, call.operator_name.removesuffix("_cell"))
    for part in parts:
        trace.add(sums, part)
    for value in carried:
        trace.add(state, value)
    labels = [state.expand(shape) for _ in results]
    return labels if len(labels) > 1 else labels[0]


def _one(moved: Label | list[Label]) -> Label:
    assert isinstance(moved, Label)
    return moved
