"""Fold batch normalization in evaluation mode into the layers in front of it, or behind it."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._symmetries import symmetries
from equinorm.discovery.inner_values import InnerValue, InnerValues
from equinorm.modules.choosing import Choice
from equinorm.quantization.freeing import EXPORT, has_hooks, module_at, put
from equinorm.quantization.lifting import lift_norms_, lower_

BatchNorm = nn.modules.batchnorm._BatchNorm
Layer = Any
"""A convolution or a linear layer."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ACTING = {"timm.layers.norm_act.BatchNormAct2d": ("drop", "act")}
"""Normalizations with modules of their own behind them, by their full names; and these, in the order in which they run."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OPERATORS = {
    *(f"aten.conv{transposed}{axes}d" for transposed in ("", "_transpose") for axes in (1, 2, 3)),
    "aten.linear",
}
"""What these layers run."""


class LeftError(Exception):
    """Why a normalization cannot be folded."""


def fold_(
    model: nn.Module, args: tuple | Tensor, kwargs: Mapping[str, Any] | None, opaque: Choice
) -> tuple[dict[str, str], dict[str, str]]:
    """Fold every batch normalization of a model that can be, in place; it becomes an nn.Identity, or what it ran behind it.

    Args:
        model: is changed: its convolutions and linear layers get new weights and biases.
        args: its positional inputs.
        kwargs: its keyword inputs.
        opaque: submodules that are not looked into.

    Returns:
        Into what each was folded, and why the others were left.
    """
    lifted = lift_norms_(model)
    try:
        return _folded(model, args, kwargs, opaque)
    finally:
        lower_(lifted)


def _folded(
    model: nn.Module, args: tuple | Tensor, kwargs: Mapping[str, Any] | None, opaque: Choice
) -> tuple[dict[str, str], dict[str, str]]:
    """The same for modules alone."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    if not norms:
        return {}, {}
    graph = _Graph(model, symmetries(model, args, kwargs, opaque=opaque).values)
    folded: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, norm in norms.items():
        try:
            folded[name] = graph.fold_(norm)
        except LeftError as error:
            left[name] = str(error)
    return folded, left


class _Graph:
    """A model and the values of its graph as they were before anything was folded.

    Folding changes weights and takes normalizations out, never what reads what, so that one look serves for all.
    """

    def __init__(self, model: nn.Module, values: InnerValues) -> None:
        self.model, self.values = model, values
        self.names = {id(module): name for name, module in model.named_modules()}

    def fold_(self, norm: BatchNorm) -> str:
        """Fold one normalization; says into what.

        Raises:
            LeftError: if it cannot be folded; nothing is changed then.
        """
        calls = [value for value in self.values if "batch_norm" in value.operator and module_at(self.model, value) is norm]
        if type(norm) not in NORMS and _behind_it(norm) is None:
            raise LeftError(f"its class, {type(norm).__name__}, may do more than normalize: {EXPORT}")
        if has_hooks(norm):
            raise LeftError("hooks run with it")
        if len(calls) != 1:
            raise LeftError(f"the graph calls it {len(calls)} times")
        if norm.training or norm.running_mean is None:
            raise LeftError("it uses the statistics of each batch")
        (call,) = calls
        try:
            layers = self._in_front(call)
            _fold_forward_(norm, layers)
        except LeftError as why:
            try:
                layers = self._behind(call)
            except LeftError as also:
                raise LeftError(f"{why}; {also}") from None
            for layer in layers:
                _fold_backward_(norm, layer)
        follow = _behind_it(norm)
        put(self.model, norm, nn.Identity() if follow is None else nn.Sequential(OrderedDict(follow)))
        return ", ".join(self.names[id(layer)] for layer in layers)

    def _in_front(self, call: InnerValue) -> list[Layer]:
        """The layers whose outputs, side by side, the normalization alone reads."""
        given = self.values[call.reads["input"]]
        if given.operator == "aten.cat":
            parts = [self.values[name] for name in given.reads.values()]
            if sum(part.shape[1] for part in parts) != given.shape[1]:
                raise LeftError("the layers in front are not joined channel by channel")
            if len({part.name for part in parts}) != len(parts):
                raise LeftError("one layer in front is joined with itself")
            self._is_alone(given)
        else:
            parts = [given]
        layers = [self._layer(part) for part in parts]
        for layer, part in zip(layers, parts, strict=True):
            self._has_channels_second(layer, part)
            self._is_alone(part)
        return layers

    def _behind(self, call: InnerValue) -> list[Layer]:
        """The layers that alone read what the normalization gives, where its shift becomes a bias."""
        readers = self.values.readers(call.name)
        if call.is_returned or not readers:
            raise LeftError("the model returns it")
        layers = [self._layer(reader) for reader in readers]
        for layer, reader in zip(layers, readers, strict=True):
            if reader.reads["input"] != call.name:
                raise LeftError(f"{reader.name} behind it reads it as a weight")
            if isinstance(layer, TRANSPOSED) or not _is_unpadded(layer):
                raise LeftError(f"{self.names[id(layer)]} behind it pads with zeros")
            self._has_channels_second(layer, call)
        return layers

    def _has_channels_second(self, layer: Layer, value: InnerValue) -> None:
        """The layer's channels are along axis 1, as the normalization's are: not so for sequences, and without a batch."""
        if len(value.shape) != layer.weight.dim():
            raise LeftError(f"{self.names[id(layer)]} has its channels along another axis")

    def _is_alone(self, value: InnerValue) -> None:
        if value.is_returned or len(self.values.readers(value.name)) != 1:
            raise LeftError(f"more than one reads {value.name}, in front of it")

    def _layer(self, value: InnerValue) -> Layer:
        """The layer that made a value, if its weight can be changed for this one call."""
        layer = module_at(self.model, value)
        if value.operator not in OPERATORS:
            raise LeftError(f"{value.operator} stands beside it, not a layer")
        if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
            raise LeftError(f"{value.name} beside it is no module")
        name, parameters = self.names[id(layer)], dict(self.model.named_parameters(remove_duplicate=False))
        for tensor in ("weight", "bias"):
            if (read := value.reads.get(tensor)) is None:
                continue
            stored = self.values[read].tensor
            if stored == "" or getattr(layer, tensor) is not parameters.get(stored):
                raise LeftError(f"the {tensor} of {name} is computed or shared")
            if len(self.values.uses(stored)) != 1:
                raise LeftError(f"{name} is used more than once")
        return layer


def _behind_it(norm: BatchNorm) -> list[tuple[str, nn.Module]] | None:
    """Names and modules of what a normalization runs on its result; None if that is not known."""
    names = ACTING.get(f"{type(norm).__module__}.{type(norm).__qualname__}")
    return None if names is None else [(name, getattr(norm, name)) for name in names]


def _is_unpadded(layer: Layer) -> bool:
    padding = getattr(layer, "padding", 0)
    return padding == "valid" or (
        not isinstance(padding, str) and not any(padding if isinstance(padding, tuple) else [padding])
    )


def _fold_forward_(norm: BatchNorm, layers: Sequence[Layer]) -> None:
    """Fold a normalization into the layers in front: a·(Wx + c) + b = (a·W)x + (a·c + b).

    PyTorch's own fusion does not know groups of transposed convolutions, nor linear layers in front of a normalization
    without gain.
    """
    sizes = [layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels for layer in layers]
    if sum(sizes) != norm.num_features:
        raise LeftError("the layers in front make other channels than it normalizes")
    parts = zip(layers, *(tensor.split(sizes) for tensor in _affine_map(norm)), strict=True)
    for layer, scale, shift in parts:
        groups = layer.groups if isinstance(layer, TRANSPOSED) else 0
        _set_(layer, *behind(layer.weight.detach(), layer.bias, scale, shift, groups))


def behind(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, groups: int = 0) -> tuple[Tensor, Tensor]:
    """Weight and bias of a·(Wx + c) + b, in double precision.

    Args:
        weight: of shape (out, …), or (in, out of one group, …).
        bias: c; None: 0.
        scale: a, one for each output channel.
        shift: b.
        groups: of a weight that is stored (in, out); 0 if it is not.
    """
    weight = weight.double()
    if groups:
        grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        scaled = (grouped * scale.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    else:
        scaled = (weight.flatten(1) * scale[:, None]).reshape(weight.shape)
    return scaled, shift if bias is None else bias.detach().double() * scale + shift


def _fold_backward_(norm: BatchNorm, layer: Layer) -> None:
    """Fold a normalization into a layer behind it: W·(a·x + b) = (W·a)·x + W·b."""
    scale, shift = _affine_map(norm)
    weight, groups = layer.weight.detach().double(), getattr(layer, "groups", 1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    scaled = (grouped * scale.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    bias = torch.einsum("goik,gi->go", grouped, shift.reshape(groups, -1)).reshape(-1)
    _set_(layer, scaled, bias if layer.bias is None else layer.bias.detach().double() + bias)


def _affine_map(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """a and b of a normalization that is a·x + b, in double precision."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return affine_map(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def affine_map(gain: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """a and b of γ(x − μ)/√(σ² + ε) + β = a·x + b, in double precision."""
    scale = (variance.detach().double() + eps).rsqrt()
    if gain is not None:
        scale = scale * gain.detach().double()
    shift = -mean.detach().double() * scale
    return scale, shift if bias is None else shift + bias.detach().double()


def _set_(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    """Give a layer another weight and bias, in its own dtype."""
    old = layer.weight
    layer.weight, layer.bias = (
        nn.Parameter(new.detach().to(old.device, old.dtype), requires_grad=old.requires_grad) for new in (weight, bias)
    )
