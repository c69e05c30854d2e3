"""Files of tensors: what they hold, read without running code in them, and weights taken over as they are stored."""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from equinorm._display import and_more, sizes
from equinorm._errors import EquinormError, dtype_name, first_line
from equinorm._memory import place_of
from equinorm.checkpoints.stored import is_counter

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Suffixes of weight files."""

_HOLDERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
"""Keys below which checkpoints keep a state dict, the likeliest first."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that wrappers add to names: DataParallel, torch.compile, sharding, checkpointing."""

_SHOWN = 8


class InputError(EquinormError):
    """What the user named cannot be read or does not fit together."""


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Load a weight file into a model; every key must match. Of tied tensors one name suffices.

    Tensors keep the file's dtype: where the model's is another, the model's is changed.

    Returns:
        What a reader must know: where in the file the weights were, what was taken off their names, whose dtype changed.

    Raises:
        InputError: with the keys that are missing, unexpected, of another shape or kind, or that hold NaN or inf.
    """
    state, held = _tensors(path)
    own = model.state_dict()
    state, renamed = _renamed(state, own)
    _check_keys(path, state, own)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    bad = [key for key, value in state.items() if key in parameters and not _is_finite(value)]
    if bad:
        raise InputError(f"{path} holds NaN or inf in {shorten(bad)}. Such weights cannot be balanced or compared.")
    converted = _convert(model, path, state, own)
    model.load_state_dict(state, strict=False)
    now = model.state_dict()
    lost = [key for key, value in state.items() if key in now and not _same(now[key], value)]
    if lost:
        raise InputError(
            f"the model does not hold the weights of {path} as they are, but other numbers or another dtype in "
            f"{shorten(lost)}: it changes what is loaded, or keeps one tensor under names that differ in the file."
        )
    return tuple(f"{path}: {note}" for note in (held, renamed, converted) if note)


def _is_finite(tensor: Tensor) -> bool:
    """Neither NaN nor inf; torch.isfinite does not know floats of one byte."""
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def read(path: Path, what: str, advice: str) -> Any:
    """What a file holds, without running code in it.

    Args:
        path: a .safetensors file, or one that torch.save has written.
        what: is looked for in it.
        advice: what the file must be.

    Raises:
        InputError: with the cause, if it cannot be read.
    """
    readable(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"cannot read {what} from {path}: {_cause(error, path)}. {advice}") from error


def parts(value: Any) -> dict[Any, Any]:
    """What a file holds, by name, or by place: 0, 1, …"""
    if isinstance(value, dict):
        return value
    return dict(enumerate(value if isinstance(value, (list, tuple)) else [value]))


def _cause(error: Exception, path: Path) -> str:
    """Why a file cannot be read; accounts of the unpickler itself speak of bytes and are left out."""
    if not os.path.getsize(path):
        return "it is empty"
    found = re.search(r"Unsupported (?:global|class|function)[^:]*: (?:GLOBAL )?([\w.]+)", str(error))
    if found is not None:
        return f"it holds more than tensors ({found.group(1)}), which only code could make"
    if "TorchScript" in str(error):
        return "it is a TorchScript archive"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if re.search(r"zip archive|not fully covered|header too", str(error)):
        return f"it is damaged, cut short or something else ({first_sentence(error)})"
    if isinstance(error, (RuntimeError, safetensors.SafetensorError)):
        return first_sentence(error)
    if isinstance(error, (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError)):
        return "it is damaged, or was not written by torch.save"
    return f"{type(error).__name__}: {first_line(error)}"


def _tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict of a file, and where in the file it was."""
    readable(path)
    if path.suffix not in WEIGHTS:
        raise InputError(f"{path}: unknown suffix {path.suffix!r} for weights. Known are {', '.join(WEIGHTS)}.")
    advice = "It must be a .safetensors file, or a state dict saved by torch.save(model.state_dict(), path)."
    found = read(path, "weights", advice)
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no state dict, but a value of type {type(found).__name__}. Save model.state_dict().")
    odd = _odd(found)
    if not odd:
        return found, ""
    dicts = [key for key in odd if isinstance(found[key], dict) and found[key] and not _odd(found[key])]
    known = [key for key in _HOLDERS if key in dicts] or (dicts if len(dicts) == 1 else [])
    if known:
        others = [key for key in dicts if key != known[0]]
        beside = f", not those below {shorten([repr(key) for key in others])}" if others else ""
        return found[known[0]], f"the weights below {known[0]!r} were read{beside}"
    if dicts:
        listed = shorten([repr(key) for key in dicts])
        raise InputError(f"{path} holds several state dicts, below {listed}. Save the one that is meant by itself.")
    kinds = shorten([f"{key!r}: {type(found[key]).__name__}" for key in odd])
    raise InputError(f"{path} holds no state dict, which has names and tensors alone: {kinds}. Save model.state_dict().")


def _odd(state: Mapping[Any, Any]) -> list[Any]:
    """Keys of what stands in no state dict."""
    return [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]


def _renamed(state: dict[str, Tensor], own: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The state under the model's names, if only wrappers or one prefix set them apart; and what was taken off."""
    if not state or all(key in own for key in state):
        return state, ""
    names = {_unwrapped(key): key for key in own}
    found = {key: names.get(_unwrapped(key)) for key in state}
    if len(names) == len(own) and None not in found.values() and len(set(found.values())) == len(found):
        marks = sorted({part for key in (*state, *own) for part in key.split(".") if part in _WRAPPERS})
        parts = " and ".join(repr(f"{part}.") for part in marks)
        return {str(found[key]): value for key, value in state.items()}, f"names were read without {parts}, which wrappers add"
    first = next(iter(state)).split(".")
    for count in range(1, len(first)):
        prefix = ".".join(first[:count]) + "."
        if all(key.startswith(prefix) and key.removeprefix(prefix) in own for key in state):
            return {
                key.removeprefix(prefix): value for key, value in state.items()
            }, f"names were read without the prefix {prefix!r}"
    return state, ""


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _check_keys(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    present = {_memory(own[key]) for key in own.keys() & state.keys()}
    missing = [key for key in own if key not in state and not is_counter(key) and _memory(own[key]) not in present]
    unexpected = [key for key in state if key not in own]
    both = [key for key in own if isinstance(own[key], Tensor) and key in state]
    shaped = [(key, state[key].shape, own[key].shape) for key in both]
    shapes = [f"{key} (file {sizes(file)}, model {sizes(ours)})" for key, file, ours in shaped if file != ours]
    kinds = [
        f"{key} (file {dtype_name(state[key].dtype)}, model {dtype_name(own[key].dtype)})"
        for key in both
        if not _fits(state[key], own[key])
    ]
    parts = [("missing in the file", missing), ("unexpected in the file", unexpected), ("of another shape", shapes)]
    parts.append(("of another kind of number", kinds))
    if any(keys for _, keys in parts):
        listed = "; ".join(f"{len(keys)} {what}: {shorten(keys)}" for what, keys in parts if keys)
        raise InputError(
            f"{path} does not match the model. Of its keys {listed}. Name another file, or set the sizes with --set."
        )


def _convert(model: nn.Module, path: Path, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> str:
    """Give parameters and buffers the dtype that they have in the file; says which had another."""
    wanted: dict[Any, torch.dtype] = {}
    changed: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for key, value in state.items():
        before = own[key]
        if isinstance(before, Tensor) and before.dtype != value.dtype and before.is_floating_point():
            if wanted.setdefault(_memory(before), value.dtype) != value.dtype:
                raise InputError(f"{path} holds {key} in {dtype_name(value.dtype)}, and in another dtype under another name.")
            changed[value.dtype, before.dtype] = changed.get((value.dtype, before.dtype), 0) + 1
    if not changed:
        return ""
    if isinstance(model, fx.GraphModule):
        (file, exported), *_ = changed
        raise InputError(
            f"{path} holds {dtype_name(file)}, but the model was exported in {dtype_name(exported)}. Export it in the file's."
        )
    made: dict[Any, Tensor] = {}
    for module, name, tensor, memory in _held(model):
        if memory in wanted:
            new = made.setdefault(memory, tensor.detach().to(wanted[memory]))
            if isinstance(tensor, nn.Parameter):
                tensor.data = new  # the same object, wherever else it is held
            else:
                setattr(module, name, new)
    counts = [
        f"{count} in {dtype_name(file)} where the model has {dtype_name(before)}" for (file, before), count in changed.items()
    ]
    return f"tensors keep the file's dtype ({', '.join(counts)})"


def _held(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Any]]:
    """Every place where a parameter or buffer is held, and its memory before any is changed."""
    return [
        (module, name, tensor, _memory(tensor))
        for module in model.modules()
        for group in (module._parameters, module._buffers)
        for name, tensor in group.items()
        if tensor is not None
    ]


def _fits(stored: Tensor, own: Tensor) -> bool:
    """Whether a model can hold this: floating-point numbers of any width, others without a loss."""
    if own.dtype == stored.dtype or (own.is_floating_point() and stored.is_floating_point()):
        return True
    return not own.is_floating_point() and torch.equal(stored.to(own.dtype).to(stored.dtype), stored)


def _same(held: Any, stored: Tensor) -> bool:
    """Whether a model holds what a file does: bitwise, but that whole numbers may have another width."""
    if not isinstance(held, Tensor) or (held.is_floating_point() and held.dtype != stored.dtype):
        return False
    bits = [part.detach().contiguous().flatten().view(torch.uint8) for part in (held, stored.to(held.device, held.dtype))]
    return torch.equal(*bits)


def _memory(value: Any) -> Any:
    return place_of(value) if isinstance(value, Tensor) else id(value)


# ------------------------------------------------------------------------------------------------------------------- words


def readable(path: Path) -> None:
    """Refuse a path that is no file.

    Raises:
        InputError: if it is missing or a folder.
    """
    if not path.exists():
        raise InputError(f"there is no file {path}.")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file.")


def shorten(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    return and_more(names, _SHOWN) or "none"


def first_sentence(error: BaseException) -> str:
    """First sentence of an error's first line, without the place in PyTorch's own source."""
    return re.sub(r"^\[enforce fail at [^]]*\][ .]*", "", first_line(error)).partition(". ")[0]
