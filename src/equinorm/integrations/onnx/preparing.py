"""Bring an ONNX graph into the form in which quantizers round it: normalizations folded, bounds free to scale."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._symmetries import symmetries
from equinorm.integrations.onnx.bounds import Freed, as_relus_, clips, free_, settle_
from equinorm.integrations.onnx.files import Stored
from equinorm.integrations.onnx.folding import fold_
from equinorm.integrations.onnx.surgery import Surgery
from equinorm.quantization.freeing import chosen_names, varying

NODES = "nodes."
"""In front of a node's name, as the name of its module."""

BROADCASTING = 8
"""Version of ONNX's operators from which Min and Max broadcast."""


@dataclass(eq=False)
class Preparing:
    """What is done to a graph whenever its file is read.

    Attributes:
        fold: fold batch normalization.
        shapes: of the bounds of Clips that are set free, and their dtypes, by what the Clips make.
        folded: normalizations, and into what each was folded.
        freed: Clips that were set free, with their number of bounds.
        left: what stayed as it was, and why.
    """

    fold: bool
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    freed: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _bounds: list[Freed] = field(default_factory=list)

    def apply(self, file: Stored) -> Stored:
        """Change a file that was just read."""
        if self.fold:
            self.folded, left = fold_(file)
            self.left = {**left, **self.left}
        self._bounds = free_(file, self.shapes)
        return file

    def settle(self, file: Stored) -> int:
        """Turn bounds that stayed equal back into Clips, once the numbers are in the file; how many are left."""
        return settle_(file, self._bounds)


def planned(
    file: Stored, fold: bool, free: Sequence[str], read: Callable[[Stored], nn.Module], args: Sequence[Tensor]
) -> Preparing:
    """What can be done to a file.

    Args:
        file: just read; is changed.
        fold: fold batch normalization.
        free: patterns of the names of Clips whose bounds are set free.
        read: makes a module of a file.
        args: its inputs.
    """
    plan = Preparing(fold)
    plan.apply(file)
    if not free:
        return plan
    named = {clip.name: clip for clip in clips(Surgery(file))}
    chosen, kept = chosen_names(named, [one if fnmatch.filter(named, one) else one.removeprefix(NODES) for one in free])
    plan.left |= kept
    bounded = list(chosen.values())
    if not bounded:
        return plan
    if file.opsets.get("", 1) < BROADCASTING:
        why = f"bounds by channel need version {BROADCASTING} of ONNX's operators"
        plan.left |= dict.fromkeys((clip.name for clip in bounded), why)
        return plan
    as_relus_(file, {clip.output for clip in bounded})
    module = read(file)
    found = symmetries(module, tuple(args), batch_norm="evaluation").values
    names = {output: name for name, _, outputs in module.nodes.order for output in outputs}  # type: ignore[union-attr]
    for clip in bounded:
        calls: list[Any] = [v for v in found if v.module == f"{NODES}{names[clip.output]}" and v.operator == "aten.relu"]
        shape = varying(calls[0]) if len(calls) == 1 else None
        if shape is None:
            plan.left[clip.name] = "nothing that it bounds can scale"
        elif sum(size > 1 for size in shape) != 1:
            plan.left[clip.name] = "what it bounds scales along more than one axis, or as a whole"
        else:
            plan.shapes[clip.output] = shape, calls[0].dtype
            plan.freed[clip.name] = torch.Size(shape).numel()
    return plan
