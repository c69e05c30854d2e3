"""Bias correction: what rounding shifts on average, taken out of the biases."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equinorm.quantization.batches import Batch
from equinorm.quantization.calls import Call
from equinorm.quantization.fake import Simulation, broadcast, outputs

Key = tuple[str, int]


def mean_shifts(simulation: Simulation, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By how much to raise the outputs of every layer, for each channel: E[y − ŷ] over samples and positions.

    Layers are corrected from the first to the last within each batch, so that each sees corrected inputs; the means over
    batches are returned. A weight that is used again gets the mean over its uses.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, Section 4.2.
    """
    sums: dict[str, Tensor] = {}
    uses: dict[str, int] = {}

    def mean(call: Call, result: Tensor) -> Tensor:
        return result.detach().movedim(call.axis, 0).flatten(1).double().mean(1).cpu()

    for batch in batches:
        wanted: dict[Key, Tensor] = {}

        def remember(call: Call, wanted: dict[Key, Tensor] = wanted) -> Tensor:
            result = call.run()
            wanted[call.name, call.number] = mean(call, result)
            return result

        def correct(call: Call, wanted: dict[Key, Tensor] = wanted) -> Tensor:
            result = simulation.handle(call)
            if (call.name, call.number) not in simulation.points or not has_bias(simulation.model, call.name):
                return result
            shift = wanted[call.name, call.number] - mean(call, result)
            sums[call.name] = sums.get(call.name, torch.zeros_like(shift)) + shift
            uses[call.name] = uses.get(call.name, 0) + 1
            return result + broadcast(shift, call, result)

        outputs(simulation.model, batch, remember)
        outputs(simulation.model, batch, correct, simulation.add)
    return {name: total / uses[name] for name, total in sums.items()}


def has_bias(model: nn.Module, weight: str) -> bool:
    """Does a linear or convolutional module hold this weight, so that it has a bias of its own, or can be given one?

    What other modules share is left: a shift is that of one layer.
    """
    owner, _, name = weight.rpartition(".")
    module = model.get_submodule(owner)
    if name != "weight" or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return False
    tensors = [tensor for part in model.modules() for tensor in part._parameters.values()]
    return all(sum(tensor is own for tensor in tensors) == 1 for own in (module.weight, module.bias) if own is not None)


def correct_(model: nn.Module, shifts: dict[str, Tensor]) -> None:
    """Add shifts to the biases of the modules that hold these weights; one without a bias gets one."""
    for name, shift in shifts.items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        with torch.no_grad():
            if module.bias is None:
                weight = module.weight
                module.bias = nn.Parameter(
                    torch.zeros(len(shift), dtype=weight.dtype, device=weight.device), weight.requires_grad
                )
            module.bias.add_(shift.to(module.bias.device, module.bias.dtype))
