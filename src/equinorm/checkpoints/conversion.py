"""From names and shapes in a model to those in its files: transformers' own conversion, run on ids instead of weights.

Files of older checkpoints have other names, and parts where the model has one tensor (experts) or one where it has parts. What
transformers does to weights when it saves them it does here to labels: every entry of a tensor in a file learns which classes
move it.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equinorm._display import and_more, count, needed, sizes
from equinorm._errors import describe
from equinorm._memory import place_of
from equinorm._scaling import Scaling
from equinorm.checkpoints.stored import CheckpointError, Entry


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """How the tensors of files move.

    Attributes:
        scalings: one for each tensor of the files that belongs to the model, with all keys that hold it.
        unstored: scalings that no file holds: buffers that a model makes for itself.
        ignored: keys that the model says it does not read.
        converted: how many keys are not tensors of the model as they are.
    """

    scalings: tuple[Scaling, ...] = field(repr=False)
    unstored: tuple[Scaling, ...] = field(repr=False)
    ignored: tuple[str, ...]
    converted: int


def stored_scalings(model: nn.Module, scalings: Sequence[Scaling], entries: Mapping[str, Entry]) -> Conversion:
    """Find how every tensor of a checkpoint moves.

    Args:
        model: of transformers, on the meta device.
        scalings: of its tensors.
        entries: what the files hold, by key.

    Raises:
        CheckpointError: for keys that the model lacks, tensors that the files lack, or other shapes.
    """
    own = model.state_dict()
    owner = {name: number for number, scaling in enumerate(scalings) for name in scaling.names}
    direct, converted, unknown = _named(model, own, entries)
    ignored = tuple(key for key in unknown if _is_ignored(model, key))
    if lost := [key for key in unknown if key not in ignored]:
        said = f"{count(len(lost), 'key of the files belongs', 'keys of the files belong')} to no part of {describe(model)}"
        raise CheckpointError(
            f"{said}: {and_more(lost)}. Does config.json name the class that the weights are of (architectures)?"
        )
    found: dict[int, list[str]] = {}
    for key, name in direct.items():
        _check_shape(model, key, entries[key].shape, own[name].shape)
        if name in owner:
            found.setdefault(owner[name], []).append(key)
    stored = [replace(scalings[number], names=tuple(keys)) for number, keys in found.items()]
    rest = _missing(model, own, direct.values())
    if converted:
        stored += _Converter(model, scalings, owner).convert(rest, converted, entries)
    elif rest:
        raise CheckpointError(f"the files lack {count(len(rest), 'tensor')} of {describe(model)}: {and_more(rest)}.")
    unstored = tuple(scaling for scaling in scalings if own.keys().isdisjoint(scaling.names))
    dtypes = [replace(scaling, dtype=entries[scaling.name].dtype or torch.uint8) for scaling in stored]
    return Conversion(tuple(dtypes), unstored, ignored, len(converted))


def stored_tensors(model: nn.Module, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """What the files of a model that was changed hold, by key; keys that the model does not read are left out.

    Args:
        model: of transformers, with its weights.
        entries: what the files hold, by key.

    Raises:
        CheckpointError: if transformers cannot tell how files hold a tensor, or it has another shape there.
    """
    own = model.state_dict()
    direct, converted, _ = _named(model, own, entries)
    found = {key: own[name] for key, name in direct.items()}
    if converted:
        made: dict[str, Tensor] = {}
        for names in _layers(_missing(model, own, direct.values())):
            made |= _reverted(model, {name: own[name] for name in names})
        found |= {key: made[_under(model, key, converted[key], made)] for key in converted}
    for key, tensor in found.items():
        _check_shape(model, key, entries[key].shape, tensor.shape)
    return found


def _missing(model: nn.Module, own: Mapping[str, Tensor], present: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of the model that no key is by itself, under any of their names, and that it does need."""
    places = {place_of(own[name]) for name in present}
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return {
        name: tensor
        for name, tensor in own.items()
        if place_of(tensor) not in places and not any(re.search(pattern, name) for pattern in patterns)
    }


def _named(
    model: nn.Module, own: Mapping[str, Tensor], keys: Iterable[str]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Keys of files that are tensors of the model as they are, those that become parts of some, and those that are neither."""
    if all(key in own for key in keys):
        return {key: key for key in keys}, {}, []
    loading = _library("core_model_loading")
    transforms = _library("conversion_mapping").get_model_conversion_mapping(model)
    renamings = [part for part in transforms if isinstance(part, loading.WeightRenaming)]
    converters = [part for part in transforms if isinstance(part, loading.WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    direct: dict[str, str] = {}
    converted: dict[str, str] = {}
    unknown: list[str] = []
    for key in sorted(keys, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = key, None
        if name not in own:
            unknown.append(key)
        elif pattern is None:
            direct[key] = name
        else:
            converted[key] = name
    used: Any = [part for part in transforms if part.was_used()]
    model._weight_conversions = used  # what saving reverts
    return direct, converted, unknown


def _library(module: str) -> Any:
    """A module of transformers."""
    need = "checkpoints whose keys are not the names of the model's tensors need"
    return needed(f"transformers.{module}", need, "transformers", CheckpointError)


class _InPlace(TorchFunctionMode):
    """Keeps labels that repeat in memory of one row: what copies weights to lie densely does not copy them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


class _Converter:
    """Tensors of a model that files hold in parts, or as parts."""

    def __init__(self, model: nn.Module, scalings: Sequence[Scaling], owner: Mapping[str, int]) -> None:
        self._model, self._scalings, self._owner = model, scalings, owner
        self._base = max((int(ids.max()) for s in scalings for _, ids in s.factors if ids.numel()), default=0) + 1
        self._exponents = sorted({exponent for s in scalings for exponent, _ in s.factors})
        self._known: dict[tuple[Any, bytes], Tensor] = {}

    def convert(self, own: Mapping[str, Tensor], converted: Mapping[str, str], entries: Mapping[str, Entry]) -> list[Scaling]:
        """Scalings of the keys that are converted; `own` are the tensors of the model that no key is by itself."""
        found: dict[str, Scaling] = {}
        for names in _layers(own):
            found |= self._reverted([name for name in names if name in self._owner])
        stored: list[Scaling] = []
        for key in converted:
            name = _under(self._model, key, converted[key], found)
            _check_shape(self._model, key, entries[key].shape, found[name].shape)
            stored.append(replace(found.pop(name), names=(key,)))
        if found:
            raise CheckpointError(
                f"the files lack {count(len(found), 'tensor')} of {describe(self._model)}: {and_more(found)}."
            )
        return stored

    def _reverted(self, names: Sequence[str]) -> dict[str, Scaling]:
        """What files hold of some tensors of the model."""
        known = {name: self._scalings[self._owner[name]] for name in names}
        slots = max((len(scaling.factors) for scaling in known.values()), default=0)
        owners = {name: torch.full((), self._owner[name]).expand(scaling.shape) for name, scaling in known.items()}
        codes = ({name: self._codes(scaling, slot) for name, scaling in known.items()} for slot in range(slots))
        with _InPlace():
            parents, *runs = (_reverted(self._model, labels) for labels in (owners, *codes))
        return {
            key: self._joined(key, part.shape, torch.unique(_compact(part)).tolist(), [run[key] for run in runs])
            for key, part in parents.items()
        }

    def _codes(self, scaling: Scaling, slot: int) -> Tensor:
        """Id and exponent of one factor in one number for each entry."""
        if slot >= len(scaling.factors):
            return torch.zeros((), dtype=torch.long).expand(scaling.shape)
        exponent, ids = scaling.factors[slot]
        return torch.where(ids > 0, ids + self._base * self._exponents.index(exponent), 0).expand(scaling.shape)

    def _shared(self, ids: Tensor) -> Tensor:
        """The same ids in the same memory: hundreds of experts read one axis."""
        return self._known.setdefault((tuple(ids.shape), hashlib.blake2b(ids.numpy().data, digest_size=16).digest()), ids)

    def _joined(self, key: str, shape: Sequence[int], numbers: Sequence[int], codes: Sequence[Tensor]) -> Scaling:
        """One tensor of a file, from the tensors of the model that it comes from."""
        parents = [self._scalings[number] for number in numbers]
        if len({(p.offset, p.is_squared, p.kind) for p in parents}) > 1:
            names = [parent.name for parent in parents]
            raise CheckpointError(
                f"{key} holds tensors that {describe(self._model)} uses in different ways: {and_more(names)}."
            )
        factors: list[tuple[float, Tensor]] = []
        for code in codes:
            code = _compact(code)
            for place in torch.unique(torch.where(code > 0, code // self._base, -1)).tolist():
                if place >= 0:
                    ids = torch.where((code > 0) & (code // self._base == place), code % self._base, 0)
                    factors.append((self._exponents[place], self._shared(ids)))
        role = "weight" if any(parent.role == "weight" for parent in parents) else "bias"
        depth = max(parent.depth for parent in parents)
        return replace(parents[0], names=(key,), shape=tuple(shape), role=role, factors=tuple(factors), depth=depth)


def _reverted(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers makes of a model's tensors when it saves them."""
    loading = _library("core_model_loading")
    try:
        return loading.revert_weight_conversion(model, dict(tensors))
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot tell how files hold {and_more(tensors)} of {describe(model)}: "
            f"{type(error).__name__}: {error}. Save the folder again with save_pretrained(save_original_format=False)."
        ) from error


def _under(model: nn.Module, key: str, name: str, reverted: Collection[str]) -> str:
    """What transformers calls the tensor of a key when it saves it; `name` is the tensor that it becomes a part of."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for under in (key, key.removeprefix(prefix), prefix + key):
        if under in reverted:
            return under
    raise CheckpointError(
        f"{key} becomes a part of {name} in {describe(model)}, but transformers does not save it so: how it moves cannot be "
        "told. Load the folder and save it again with save_pretrained."
    )


def _compact(ids: Tensor) -> Tensor:
    """Narrowed to one entry along every axis along which it is constant; those that repeat in memory first."""
    for axis in range(ids.dim()):
        if ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, 1)
    for axis in range(ids.dim()):
        if ids.size(axis) > 1 and bool((ids == ids.narrow(axis, 0, 1)).all()):
            ids = ids.narrow(axis, 0, 1)
    return ids.contiguous()


def _layers(names: Iterable[str]) -> list[list[str]]:
    """Names by the first number in them: a layer at a time."""
    groups: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"^.*?\.\d+\.", name)
        groups.setdefault(number.group() if number else "", []).append(name)
    return [*groups.values()]


def _is_ignored(model: nn.Module, key: str) -> bool:
    """Does the model say that it does not read a key? Rotary frequencies and positions were stored once."""
    declared: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    patterns: list[str] = [*(declared or ())]
    buffers = [name for name, _ in model.named_buffers()]
    patterns += [r"\.attn\.masked_bias$"] if "attn.bias" in patterns else []  # GPT-2 stored it beside the causal mask
    patterns += [old for end, old in _NO_LONGER_STORED.items() if any(name.endswith(end) for name in buffers)]
    return any(re.search(pattern, key) for pattern in patterns)


_NO_LONGER_STORED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Patterns of keys that models with a buffer of this name make for themselves."""


def _check_shape(model: nn.Module, key: str, found: Sequence[int], own: Sequence[int]) -> None:
    if tuple(found) != tuple(own):
        shapes = f"{sizes(found)} in the files and {sizes(own)} in {describe(model)}"
        raise CheckpointError(f"{key} has the shape {shapes}. Do config.json and the weights belong together?")
