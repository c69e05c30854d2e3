"""Recurrent layers: PyTorch's own, behind a product of the inputs with their weights, whose in-axis stays free to scale."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from equinorm.integrations.onnx.operators.registry import NodeCall, operator

ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""PyTorch's gates by their places in ONNX: i f g o of i o f c, r z n of z r h."""

ACTIVATIONS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}


@operator(
    "LSTM GRU RNN",
    "activations clip direction hidden_size input_forget layout linear_before_reset",
    settings=(4,),
    weights=(1, 2, 3),
)
def recurrent(call: NodeCall, x: Tensor, weight: Tensor, again: Tensor, *rest: Tensor | None) -> list[Tensor]:
    """One layer in one or two directions over (steps, batch, channels)."""
    bias, lengths, state, cell, peepholes = (*rest, *[None] * (5 - len(rest)))
    name, directions = call.operator, weight.shape[0]
    call.need(lengths is None, "sequences of several lengths")
    call.need(peepholes is None and not call.get("input_forget", 0), "gates that read the cell, or are coupled")
    call.need(not call.get("layout", 0) and call.get("clip") is None, "another layout, or clipped gates")
    call.need(name != "GRU" or call.get("linear_before_reset", 0) == 1, "a reset in front of its product")
    given = [text.lower() for text in call.get("activations") or ACTIVATIONS[name] * directions]
    kinds = (ACTIVATIONS[name] * directions, ["relu"] * directions if name == "RNN" else ())
    call.need(given in kinds, "other activations")
    width = again.shape[-1]
    if state is None:
        state = x.new_zeros(directions, x.shape[1], width)
    if name == "LSTM" and cell is None:
        cell = x.new_zeros(directions, x.shape[1], width)
    kind = f"rnn_{given[0]}" if name == "RNN" else name.lower()
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[call.get("direction", "forward")]
    found = []
    for place, reverse in enumerate(backwards):
        own = bias[place] if bias is not None else None
        first = [part[place : place + 1] for part in ((state, cell) if cell is not None else (state,))]
        steps = _gates(x.flip(0) if reverse else x, weight[place], own, name)
        output, *last = _run(kind, steps, again[place], own, first, name)
        found.append((output.flip(0) if reverse else output, *last))
    outputs, *last = zip(*found, strict=True)
    results = [torch.stack(outputs, 1), *(torch.cat(parts, 0) for parts in last)]
    return results[: call.outputs]


def _gates(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """What the inputs add to the gates, in PyTorch's order."""
    sums = F.linear(x, weight, None if bias is None else bias[: len(weight)])
    return _reordered(sums, name, -1)


def _reordered(gates: Tensor, name: str, axis: int = 0) -> Tensor:
    parts = gates.chunk(len(ORDER[name]), axis)
    return torch.cat([parts[gate] for gate in ORDER[name]], axis)


def _run(
    kind: str, gates: Tensor, weight: Tensor, bias: Tensor | None, first: Sequence[Tensor], name: str
) -> tuple[Tensor, ...]:
    """All steps; the gates come through a unit matrix, which changes no bit of them."""
    size = len(weight)
    unit = torch.eye(size, dtype=gates.dtype)
    parts = [unit, _reordered(weight, name)]
    if bias is not None:
        parts += [gates.new_zeros(size), _reordered(bias[size:], name)]
    start = [*first] if name == "LSTM" else first[0]
    return getattr(torch, kind)(gates, start, parts, bias is not None, 1, 0.0, False, False, False)
