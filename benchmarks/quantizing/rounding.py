"""Simulated quantization of an exported network: the same rounding for every way of rescaling.

Weights of convolutions and linear layers have symmetric steps: one for a tensor, for an output channel, or for every 32 input
channels of an output channel. What a convolution, linear layer, matrix product or addition of two activations reads has one
affine step, from the least to the largest value over the calibration batch, zero included. Everything else stays in float32.
Where ranges are clipped, each step is the one of 40 that leaves the least squared error of its weights.

Bias correction is empirical: on the calibration batch the float and the rounded network run side by side, and behind each
rounded layer the mean error of a channel is taken off before the next layer runs.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

aten = torch.ops.aten

CHANNELS = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 1,
    aten.conv2d.padding: 1,
    aten.linear.default: -1,
}
"""Operations whose second argument is a weight, and the axis of their channels."""

PRODUCTS = (aten.matmul.default, aten.bmm.default)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
"""Operations that read two activations. Sums are not rounded where tokens are read, since tools leave them alone there."""

GROUP = 32

HUGE = 1e9
"""Larger values are masks, and stay."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a network is rounded.

    Attributes:
        weight_bits: of each weight.
        granularity: "tensor", "channel" or "group": what shares a step.
        activation_bits: of each activation; None: activations stay.
        clipped: does each weight's range leave out what is far off?
        tool: "simulated", or the tool that rounds.
    """

    weight_bits: int
    granularity: str
    activation_bits: int | None = None
    clipped: bool = False
    tool: str = "simulated"

    @property
    def rounds_outputs(self) -> bool:
        """Does the tool also round what layers put out, even if no layer reads it as it is?"""
        return self.tool in ("onnxruntime", "pt2e-xnnpack")

    @property
    def fuses_clamps(self) -> bool:
        """Does it round only what a clamp leaves of a layer's output?"""
        return self.tool != "pt2e-xnnpack"


def rounds_sums(args: tuple[Tensor, ...]) -> bool:
    """Are sums of activations rounded? Not in networks that read tokens."""
    return args[0].is_floating_point()


def rounded_weight(weight: Tensor, setting: Setting) -> Tensor:
    """The nearest multiples of each group's step."""
    if setting.granularity == "tensor":
        return _rounded_rows(weight.reshape(1, -1), setting).reshape(weight.shape)
    if setting.granularity == "channel" or weight.shape[1] <= GROUP:
        return _rounded_rows(weight.reshape(len(weight), -1), setting).reshape(weight.shape)
    blocks = weight.reshape(len(weight), weight.shape[1], -1)
    padded = functional.pad(blocks, (0, 0, 0, -weight.shape[1] % GROUP))
    rows = padded.reshape(-1, GROUP * padded.shape[2])
    return _rounded_rows(rows, setting).reshape(padded.shape)[:, : weight.shape[1]].reshape(weight.shape)


def _rounded_rows(rows: Tensor, setting: Setting) -> Tensor:
    levels = 2 ** (setting.weight_bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    best, least = None, None
    for ratio in torch.linspace(0.35, 1.0, 40).tolist() if setting.clipped else (1.0,):
        step = largest * ratio / levels
        made = (rows / step).round().clamp(-levels, levels) * step
        error = (made - rows).square().sum(1, keepdim=True)
        better = None if least is None else error < least
        best, least = (made, error) if better is None else (torch.where(better, made, best), torch.minimum(error, least))
    assert best is not None
    return best


_EXPORTED: dict[str, fx.GraphModule] = {}


def likeness(model: nn.Module, args: tuple[Tensor, ...]) -> str:
    """A text that is the same for copies of one model whose parameters and buffers differ in nothing but values."""
    shapes = [(name, tuple(value.shape)) for name, value in (*model.named_parameters(), *model.named_buffers())]
    return f"{model!r} {getattr(model, 'code', '')} {shapes} {[tuple(a.shape) for a in args]}"


@torch.no_grad()
def exported(model: nn.Module, args: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph of a model, with its weights. Copies of one model are exported once."""
    key = likeness(model, args)
    if key not in _EXPORTED:
        _EXPORTED[key] = torch.export.export(copy.deepcopy(model), args).module(check_guards=False)
    graph = copy.deepcopy(_EXPORTED[key])
    held = dict([*graph.named_parameters(), *graph.named_buffers()])
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        held[name].copy_(value)
    return graph


@dataclass
class Rounded:
    """A network as exported, with rounded weights, ranges and corrections.

    Args:
        model: in evaluation mode.
        args: a calibration batch; every later batch has its size.
        setting: how to round.
    """

    model: nn.Module
    args: tuple[Tensor, ...]
    setting: Setting
    graph: fx.GraphModule = field(init=False)
    order: dict[fx.Node, int] = field(init=False)
    weights: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, tuple[float, int]] = field(default_factory=dict)
    corrections: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.graph = exported(self.model, self.args)
            self.order = {node: i for i, node in enumerate(self.graph.graph.nodes)}
            for node in self.layers():
                name = str(node.args[1].target)
                self.weights[name] = rounded_weight(self.tensor(name), self.setting)
            self._calibrate()

    def layers(self) -> Iterator[fx.Node]:
        """Layers whose weight is rounded."""
        for node in self.graph.graph.nodes:
            if node.target in CHANNELS and node.args[1].op == "get_attr":
                yield node

    def activations(self) -> set[fx.Node]:
        """Values that rounded operations read."""
        found = set()
        for node in self.graph.graph.nodes:
            if node.target in CHANNELS:
                found |= {node.args[0]}
            elif node.target in PRODUCTS or (node.target in SUMS and rounds_sums(self.args)):
                both = [value for value in node.args[:2] if isinstance(value, fx.Node) and value.op != "get_attr"]
                found |= set(both) if len(both) == 2 else set()
        return {node for node in found if node.meta["val"].is_floating_point() and node.meta["val"].dim() > 1}

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the exported network."""
        found: Any = self.graph
        for part in name.split("."):
            found = getattr(found, part)
        return found.detach()

    def _calibrate(self) -> None:
        """Ranges and corrections, from both networks side by side."""
        plain: dict[fx.Node, Any] = {}
        rounded: dict[fx.Node, Any] = {}
        layers, read = {*self.layers()}, self.activations() if self.setting.activation_bits else set()
        inputs = iter(self.args), iter(self.args)
        for node in self.graph.graph.nodes:
            exact = self._value(node, plain, inputs[0], {})
            value = self._value(node, rounded, inputs[1], self.weights)
            if node in layers:
                axis = CHANNELS[node.target] % exact.dim()
                others = [i for i in range(exact.dim()) if i != axis]
                self.corrections[node.name] = (exact - value).mean(others, keepdim=True)
                value = value + self.corrections[node.name]
            if node in read:
                self._measure(node.name, exact)
                value = self._rounded(node.name, value)
            plain[node], rounded[node] = exact, value
            self._forget(node, plain, rounded)

    def _measure(self, name: str, value: Tensor) -> None:
        """One affine step from the least to the largest value; masks of huge numbers have none."""
        low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
        if max(-low, high) < HUGE:
            step = max((high - low) / (2 ** (self.setting.activation_bits or 8) - 1), 1e-12)
            self.steps[name] = (step, round(-low / step))

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        if name not in self.steps:
            return value
        step, zero = self.steps[name]
        return torch.fake_quantize_per_tensor_affine(value, step, zero, 0, 2 ** (self.setting.activation_bits or 8) - 1)

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], inputs: Iterator[Tensor], weights: Mapping[str, Tensor]) -> Any:
        """What a node computes."""
        if node.op == "placeholder":
            return next(inputs)
        if node.op == "get_attr":
            return weights.get(str(node.target), self.tensor(str(node.target)))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "output":
            return args[0]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _forget(self, node: fx.Node, *held: dict[fx.Node, Any]) -> None:
        """Let go of what nobody reads any more."""
        for read in node.all_input_nodes:
            if max(read.users, key=self.order.__getitem__) is node:
                for values in held:
                    values.pop(read, None)

    @torch.no_grad()
    def run(self, args: tuple[Tensor, ...], corrected: bool = False) -> Any:
        """Outputs of the rounded network."""
        values: dict[fx.Node, Any] = {}
        inputs = iter(args)
        for node in self.graph.graph.nodes:
            value = self._value(node, values, inputs, self.weights)
            if corrected and node.name in self.corrections:
                value = value + self.corrections[node.name]
            values[node] = self._rounded(node.name, value) if node.name in self.steps else value
            self._forget(node, values)
        return value

    def bias_corrections(self) -> dict[str, Tensor]:
        """What to add to each bias, by its name, for tools that round by themselves."""
        found: dict[str, Tensor] = {}
        for node in self.layers():
            if len(node.args) > 2 and isinstance(node.args[2], fx.Node):
                found[str(node.args[2].target)] = self.corrections[node.name].flatten()
        return found
