"""What a balance is about: the tensors that count, the classes that may move, and why there may be none."""

from collections.abc import Iterable

import torch
from torch import Tensor

from equinorm._display import count
from equinorm._errors import BalanceError, describe
from equinorm._scaling import Scaling
from equinorm.modules.choosing import Choice, chosen
from equinorm.rescaling.orbit import Orbit

_NO_PARAMETERS = "it has no parameters (layers in a plain list or dict are its own only in an nn.ModuleList or nn.ModuleDict)"


def counted(scalings: Iterable[Scaling], biases: bool) -> list[Scaling]:
    """Scalings of the tensors whose norm counts: weights that move, and biases if they are asked for."""
    return [s for s in scalings if s.factors and s.numel and s.kind == "parameter" and (biases or s.role == "weight")]


def nothing_moves(symmetries: Orbit, modules: Choice | None) -> str:
    """Why there is nothing to balance, in a sentence without its full stop: what pins most channels, and by what."""
    model = describe(symmetries.model)
    if not symmetries.num_free:
        pins = sorted(symmetries.pins, key=lambda pin: -pin.channels)
        shown = [f"{count(pin.channels, 'channel')} of {pin.tensor}[{pin.axis}] by {pin.reason}" for pin in pins[:3]]
        more = [f"and {len(pins) - 3} more"] if len(pins) > 3 else []
        none = "it has none" if next(symmetries.model.parameters(), None) is not None else _NO_PARAMETERS
        return f"no hidden channel of {model} can be rescaled: {'; '.join(shown + more) or none}"
    if modules is not None:
        return f"no hidden channel of {model} can be rescaled: none moves within the chosen modules alone"
    return f"no weight of {model} is to be balanced: what moves are biases, which do not count without biases=True, and buffers"


def held_classes(symmetries: Orbit, modules: Choice | None) -> Tensor:
    """Mask over 0..num_free of classes that move a tensor outside of the chosen modules."""
    held = torch.zeros(symmetries.num_free + 1, dtype=torch.bool)
    if modules is None:
        return held
    inside = chosen(symmetries.model, modules, BalanceError, "modules").values()
    moving = {id(tensor) for module in inside for tensor in (*module.parameters(), *module.buffers())}
    tensors = symmetries.tensors
    for scaling in symmetries.scalings:
        if id(tensors[scaling.name]) not in moving:
            held[scaling.free()] = True
    return held
