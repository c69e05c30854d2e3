"""Mappings for SmoothQuant and AWQ in llm-compressor's own classes, for any model that exports."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import equinorm
from equinorm.grouping.mappings import SmoothMapping
from equinorm.integrations import first_installed

_SMOOTHQUANT: Any = first_installed(["llmcompressor.modifiers.transform.smoothquant.utils"], "llmcompressor")
_AWQ: Any = first_installed(["llmcompressor.modifiers.transform.awq.mappings"], "llmcompressor")
_LINEARIZE: Any = first_installed(["llmcompressor.modeling.moe.linearize"], "llmcompressor")
_NORMS: Any = first_installed(["llmcompressor.modeling.offset_norm"], "llmcompressor").NormCalibrationModule
_REGISTRY: Any = first_installed(["compressed_tensors.registry"], "llmcompressor")

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""Layers of one expert, by the tensor that holds those of all experts before llm-compressor takes them apart."""


@dataclass(frozen=True, slots=True)
class Mappings:
    """What to give to llm-compressor's modifiers as `mappings`.

    Attributes:
        smoothquant: for `SmoothQuantModifier`: norms and all layers that read them.
        awq: for `AWQModifier`: these, and layers behind which no norm stands, such as up_proj and down_proj.
        left_out: groups of free scales that these classes cannot say, each with the reason, as sentences.
    """

    smoothquant: list[Any]
    awq: list[Any]
    left_out: list[str] = field(default_factory=list)


def mappings(symmetries: "equinorm.Symmetries") -> Mappings:
    """Mappings of a model, one for each layer of it, from its scale groups.

    Every module that reads a norm is named, routers and shared experts included, so that smoothing leaves the model's function
    as it is. Names are whole names; experts, which llm-compressor takes apart before it begins, are one pattern for a layer.

    Args:
        symmetries: of the model as transformers builds it; it may lie on the meta device.

    Raises:
        ImportError: if llm-compressor is not installed.
    """
    apart = {name for name, _ in _LINEARIZE.get_non_linearized_moes(symmetries.model)}
    found = symmetries.mappings()
    result = Mappings([], [], [f"{why}." for _, why in found.left_out])
    for mapping in found:
        why = _refusal(symmetries, mapping, apart)
        if why:
            result.left_out.append(f"{mapping}: {why}.")
            continue
        for smooth, balance in _named(mapping, apart):
            result.awq.append(_AWQ.AWQMapping(smooth, balance))
            if mapping.is_gain:
                result.smoothquant.append(_SMOOTHQUANT.LayerMap(balance_layers=[*balance], smooth_layers=smooth))
    return result


def _refusal(symmetries: "equinorm.Symmetries", mapping: SmoothMapping, apart: set[str]) -> str:
    """Why llm-compressor cannot smooth so, or nothing."""
    scalings = {scaling.name: scaling for scaling in symmetries.scalings}
    (up,) = mapping.group.up
    if mapping.offset and not _knows_offset(symmetries, mapping.smooth):
        return f"the network adds {mapping.offset:g} to the gain, and llm-compressor does not know this norm"
    for axis, place in [(up, 0), *((axis, 1) for axis in mapping.group.down)]:
        expert = axis.tensor.rpartition(".")[0] in apart and axis.tensor.rpartition(".")[2] in _PARTS
        if not expert and (not axis.tensor.endswith(".weight") or len(scalings[axis.tensor].shape) > 2):
            return f"{axis.tensor} is not the weight of a linear layer or a norm"
        if not expert and axis.axes != (place,):
            return f"{axis.tensor} holds these channels along axis {axis.axes}, not {place}"
    if mapping.group.along and bool((up.ids == 0).any()):
        return "only some of its channels scale, and it has a bias, of which llm-compressor would divide all"
    return ""


def _knows_offset(symmetries: "equinorm.Symmetries", module: str) -> bool:
    """Does llm-compressor turn this kind of norm, which adds 1 to its gain, into a plain one first?"""
    name = _REGISTRY.standardize_lookup_name(type(symmetries.model.get_submodule(module)).__name__)
    return name in (*_NORMS.registered_names(), *_NORMS.registered_aliases())


def _named(mapping: SmoothMapping, apart: set[str]) -> Iterator[tuple[str, list[str]]]:
    """The mapping in names and patterns of the model whose experts are modules; one for each expert if both are theirs."""
    holder, _, tensor = mapping.smooth.rpartition(".")
    if holder not in apart:
        yield mapping.smooth, [name for one in mapping.balance for name in _patterns(one, apart)]
        return
    (up,) = mapping.group.up
    behind = [name.rpartition(".")[2] for name in mapping.balance]
    for expert in range(up.ids.size(0)):
        yield (
            f"{holder}.{expert}.{_PARTS[tensor][-1]}",
            [f"{holder}.{expert}.{part}" for name in behind for part in _PARTS[name]],
        )


def _patterns(name: str, apart: set[str]) -> list[str]:
    """A module's name; for the experts of a layer a pattern for each of their layers."""
    holder, _, tensor = name.rpartition(".")
    if holder not in apart:
        return [name]
    return [rf"re:{re.escape(holder)}\.\d+\.{part}$" for part in _PARTS[tensor]]
