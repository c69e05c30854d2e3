"""Reading what the command line names: models, their weights and inputs. Everything here only reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equinorm._errors import describe, describe_inputs, first_line
from equinorm.cli.factories import built, settings_of
from equinorm.cli.inputs import read_inputs
from equinorm.cli.libraries import from_timm, from_transformers
from equinorm.cli.onnx_files import from_onnx, is_onnx
from equinorm.cli.weights import InputError, load_weights, readable
from equinorm.sharding.modules import on_meta


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model that is ready to run.

    Attributes:
        name: as the user wrote it.
        model: the module, with its weights.
        args: positional inputs.
        kwargs: keyword inputs.
        notes: what was done to make model and weights fit, for the user to know.
    """

    name: str
    model: nn.Module = field(repr=False)
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name and class, as records have them."""
        return f"{self.name} ({describe(self.model)})"

    @property
    def inputs(self) -> str:
        """Shapes and dtypes of its inputs, as records have them."""
        return describe_inputs(self.args, self.kwargs)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a model is made from.

    Attributes:
        name: ``package.module:factory``, ``hf:FOLDER`` or the folder itself, ``timm:NAME``, an ``.onnx`` or a ``.pt2`` file.
        weights: file to load into it.
        settings: arguments of a factory, as ``name=value``.
        trust: run code that comes with a checkpoint.
        device: "cpu", or "meta" for a model without numbers.
        train: training or evaluation mode; None for evaluation, or for the mode in which a ``.pt2`` file was exported.
        fold: of an ONNX file, fold batch normalization.
        free: of an ONNX file, set bounds free, or those of these names.
    """

    name: str
    weights: Path | None = None
    settings: Sequence[str] = ()
    trust: bool = False
    device: str = "cpu"
    train: bool | None = None
    fold: bool = False
    free: bool | Sequence[str] = False


def load(source: ModelSource, inputs: Sequence[str], needs_inputs: bool = True) -> Loaded:
    """Load a model with its weights and inputs.

    Args:
        source: what it is made from.
        inputs: shapes or files, see `read_inputs`; none for the example inputs of whatever brings some.
        needs_inputs: refuse a model without inputs.

    Raises:
        InputError: for whatever cannot be found, read or matched.
    """
    if source.device not in ("cpu", "meta"):
        raise InputError(f"--device {source.device}: there are cpu and meta, where a model has shapes and no numbers.")
    if is_onnx(source.name):
        return _onnx(source, inputs)
    if source.device == "meta" and source.weights is not None:
        raise InputError(f"--device meta builds {source.name} without numbers. Leave out --weights, or --device.")
    model, args, kwargs, notes = _model(source)
    held = [*model.named_parameters(), *model.named_buffers()]
    if source.device == "cpu" and (empty := next((name for name, tensor in held if tensor.is_meta), None)):
        raise InputError(
            f"{empty} of {source.name} is on the meta device and holds no numbers. Let it be made on the cpu; "
            "`equinorm inspect --device meta` needs no numbers."
        )
    if source.weights is not None:
        notes = (*notes, *load_weights(model, source.weights))
    if inputs:
        args, kwargs = read_inputs(inputs, _floating(model))
    elif needs_inputs and not args and not kwargs:
        exported, main = source.name.endswith(".pt2"), getattr(model, "main_input_name", None)
        example = "--input with the shapes it was exported with" if exported else "--input 1x3x224x224"
        example = f"--input {main}=1x3x224x224" if isinstance(main, str) else example
        raise InputError(f"{source.name} needs inputs to run with. Give their shapes or a file, for example {example}.")
    if source.device == "meta":
        args, kwargs = on_meta((args, dict(kwargs)))
    return Loaded(source.name, model, args, dict(kwargs), notes)


def is_folder(name: str) -> bool:
    """Is this the path of a folder, not something else that commands know?"""
    return Path(name).expanduser().is_dir()


def takes_settings(name: str) -> bool:
    """Whether a model is called with arguments: factories are, what files hold is not."""
    return not name.startswith("hf:") and not name.endswith((".pt2", ".onnx")) and not is_folder(name)


def _model(source: ModelSource) -> tuple[nn.Module, tuple, Mapping[str, Any], tuple[str, ...]]:
    """The model, the inputs that it brings, and notes on its weights."""
    name, is_meta = source.name, source.device == "meta"
    settings = settings_of(source.settings)
    scheme, _, rest = ("hf", "", name) if is_folder(name) else name.partition(":")
    if name.endswith(".pt2") and scheme != "hf":
        if source.train is not None:
            raise InputError(f"{name} was exported in one mode, which cannot change. Leave out --train and --eval.")
        if settings or is_meta:
            raise InputError(f"{name} is exported as it is. Leave out {'--set' if settings else '--device meta'}.")
        return *_exported(Path(name)), ()
    if scheme == "hf":
        if settings:
            raise InputError(f"{name} takes no --set: a checkpoint is built from its own config.json. Edit a copy of that.")
        model, kwargs, notes = from_transformers(Path(rest).expanduser(), source.trust, source.device)
        found = model, (), kwargs, notes
    elif scheme == "timm":
        model, args = from_timm(rest, settings, source.device)
        random = f"{name}: weights are random, drawn with seed 0. Name those that are meant with --weights."
        found = model, args, {}, () if is_meta or source.weights is not None else (random,)
    else:
        found = built(name, settings, source.device), (), {}, ()
    found[0].train(bool(source.train))
    return found


def _onnx(source: ModelSource, inputs: Sequence[str]) -> Loaded:
    options = {"--weights": source.weights, "--set": source.settings, "--train": source.train}
    if wrong := [name for name, value in options.items() if value]:
        raise InputError(f"{source.name} is a graph with its own weights, for inference. Leave out {wrong[0]}.")
    if source.device != "cpu":
        raise InputError(f"{source.name} holds numbers. Leave out --device {source.device}.")
    model, args, notes = from_onnx(source.name, inputs, source.fold, source.free)
    return Loaded(source.name, model, args, {}, notes)


def _exported(path: Path) -> tuple[nn.Module, tuple, Mapping[str, Any]]:
    readable(path)
    try:
        program = torch.export.load(path)
        model = program.module()
    except Exception as error:
        raise InputError(
            f"cannot read {path} as an exported program: {first_line(error)}. "
            "Write it with torch.export.save, by this version of PyTorch."
        ) from error
    args, kwargs = program.example_inputs or ((), {})
    return model, tuple(args), dict(kwargs)


def _floating(model: nn.Module) -> torch.dtype:
    """The model's own dtype: that of its first floating-point tensor."""
    tensors = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
