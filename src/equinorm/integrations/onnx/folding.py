"""Fold batch normalization of an ONNX graph into the convolution or Gemm in front."""

from typing import Any

from torch import Tensor

from equinorm.integrations.onnx.files import Stored
from equinorm.integrations.onnx.nodes import attributes
from equinorm.integrations.onnx.surgery import Surgery
from equinorm.quantization.folding import LeftError, affine_map, behind

LAYERS = ("Conv", "ConvTranspose", "Gemm")


def fold_(file: Stored) -> tuple[dict[str, str], dict[str, str]]:
    """Fold what can be: y = γ(Wx + b − μ)/√(σ² + ε) + β = W'x + b'. The layer then makes what the normalization made.

    Args:
        file: its model is changed.

    Returns:
        Into what each normalization was folded, and why the others were left, by the names of nodes.
    """
    surgery = Surgery(file)
    folded: dict[str, str] = {}
    left: dict[str, str] = {}
    idle: list[str] = []
    for norm in surgery.nodes("BatchNormalization"):
        name = norm.name or norm.output[0]
        try:
            folded[name] = _fold_(surgery, norm)
            idle += norm.input[1:]
        except LeftError as error:
            left[name] = str(error)
    if folded:
        surgery.done(idle)
    return folded, left


def _fold_(surgery: Surgery, norm: Any) -> str:
    settings = attributes(norm)
    given = norm.input[0]
    layer = surgery.makers.get(given)
    if surgery.file.opsets.get("", 1) < 7 or settings.get("training_mode") or settings.get("spatial", 1) != 1:
        raise LeftError("it uses the statistics of each batch, or is of an old definition")
    if len([name for name in norm.output if name]) > 1:
        raise LeftError("it returns statistics")
    if layer is None or layer.op_type not in LAYERS or layer.domain:
        raise LeftError(f"{'an input' if layer is None else layer.op_type} stands in front of it, not a layer")
    name = layer.name or layer.output[0]
    if not surgery.is_alone(given):
        raise LeftError(f"more than one reads {given}, in front of it")
    numbers = [found for part in norm.input[1:5] if (found := surgery.numbers(part)) is not None]
    if len(numbers) != 4:
        raise LeftError("its numbers are computed, or inputs of the model")
    weight = _own(surgery, layer, 1, name)
    bias = _own(surgery, layer, 2, name) if len(layer.input) > 2 and layer.input[2] else None
    gain, offset, mean, variance = numbers
    scale, shift = affine_map(gain, offset, mean, variance, float(settings.get("epsilon", 1e-5)))
    changed = behind(weight, bias, scale, shift, _groups(layer, weight, len(scale)))
    if bias is not None and changed[1].shape != bias.shape:
        raise LeftError(f"the bias of {name} is one number for several channels")
    surgery.change(layer.input[1], changed[0])
    if bias is not None:
        surgery.change(layer.input[2], changed[1])
    else:
        stem = layer.input[1].removesuffix("weight") + "bias" if layer.input[1].endswith("weight") else f"{name}_bias"
        del layer.input[2:]
        layer.input.append(surgery.add(stem, changed[1].to(weight.dtype)))
    surgery.swap(norm, [])
    layer.output[0] = norm.output[0]
    surgery.makers[layer.output[0]] = layer
    return name


def _own(surgery: Surgery, layer: Any, place: int, name: str) -> Tensor:
    """A weight or bias that this layer alone reads."""
    key = layer.input[place]
    found = surgery.numbers(key)
    if found is None or not surgery.is_alone(key):
        raise LeftError(f"{key} of {name} is computed, shared, or an input of the model")
    return found


def _groups(layer: Any, weight: Tensor, channels: int) -> int:
    """Groups of a weight that is stored (in, out); 0 for (out, in).

    Raises:
        LeftError: if the layer makes other channels than are normalized, or multiplies by more than its weight.
    """
    settings, kind = attributes(layer), layer.op_type
    groups = int(settings.get("group", 1))
    if kind == "Gemm" and (settings.get("transA") or settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0):
        raise LeftError("the Gemm in front multiplies by further numbers")
    is_stored_in_out = kind == "ConvTranspose" or (kind == "Gemm" and not settings.get("transB"))
    made = weight.shape[1] * groups if is_stored_in_out else weight.shape[0]
    if made != channels:
        raise LeftError("the layer in front makes other channels than it normalizes")
    return groups if is_stored_in_out else 0
