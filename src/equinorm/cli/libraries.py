"""Models of other libraries: a folder of a transformers checkpoint, a name of timm. Nothing is fetched, ever."""

import difflib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equinorm._display import count
from equinorm._errors import first_line
from equinorm.checkpoints.folder import INDEX, ONE
from equinorm.cli.weights import InputError, first_sentence, readable, shorten

_TOKENS = 8
"""Length of the text that a language model is run with."""


def from_transformers(folder: Path, trust: bool, device: str) -> tuple[nn.Module, dict[str, Tensor], tuple[str, ...]]:
    """The model of a checkpoint's folder, inputs for it if its configuration tells their shapes, and notes.

    Args:
        folder: with config.json and safetensors, one or several with an index.
        trust: run Python code that lies in the folder.
        device: "meta" to build the architecture alone; no weights are looked for then.

    Raises:
        InputError: if the folder is no checkpoint, a part of it is missing, or transformers cannot build it.
    """
    configuration = described(folder)
    if device != "meta":
        _check_weights(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers: Any = _library("transformers", "hf:", "pip install 'equinorm[transformers]'")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    own = configuration.get("auto_map", {})
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **here)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # the keys and values of a cache are outputs that scale
        make = _maker(transformers, config, own if trust else {}, folder)
        if device == "meta":
            with torch.device("meta"):
                model = make.from_config(config, trust_remote_code=trust) if _is_auto(make) else make._from_config(config)
            return model, examples(model, config), ()
        more = here if _is_auto(make) else {"local_files_only": True}
        options = {"config": config, "dtype": "auto", "use_safetensors": True}
        model, found = make.from_pretrained(folder, **options, **more, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:
        refusal = _refusal(folder, error, {} if trust else own)
        if refusal is error:
            raise
        raise refusal from error
    notes = _notes(folder, model, found)
    return model, examples(model, config), notes


def _refusal(folder: Path, error: Exception, not_run: Mapping[str, Any]) -> InputError:
    """What to tell of an error while a folder is loaded, which may come of code of its own that was not run."""
    if not_run and (isinstance(error, InputError) or "trust_remote_code" in str(error)):
        code = shorten(sorted({str(name).partition(".")[0].rpartition("--")[2] + ".py" for name in not_run.values()}))
        return InputError(
            f"{folder} needs Python code of its own ({code}), which is not run unasked. Read it, then pass --trust-remote-code."
        )
    if isinstance(error, InputError):
        return error
    return InputError(f"transformers cannot load {folder}: {type(error).__name__}: {first_sentence(error)}{_root(error)}.")


def _notes(folder: Path, model: nn.Module, found: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader must know of what transformers found; refuses weights that are missing or of another shape."""
    for what, keys in (("lacks", found["missing_keys"]), ("has in another shape", found["mismatched_keys"])):
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            raise InputError(f"{folder} {what} {count(len(names), 'weight')} of {type(model).__name__}: {shorten(names)}.")
    unused = sorted(found["unexpected_keys"])
    extra = f"{count(len(unused), 'weight')} that {type(model).__name__} does not have: {shorten(unused)}"
    return (f"{folder} holds {extra}",) if unused else ()


def from_timm(name: str, settings: Mapping[str, Any], device: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of timm with random weights, the same ones every time, and an image of its default size.

    Args:
        name: as `timm.create_model` takes it.
        settings: further arguments of `timm.create_model`.
        device: "meta" to allocate nothing.

    Raises:
        InputError: if timm is missing, has no such model or cannot build it so.
    """
    timm: Any = _library("timm", "timm:", "pip install timm")
    known = timm.list_models()
    plain = name.partition(".")[0]
    if plain not in known:
        near = difflib.get_close_matches(plain, known, 4)
        hint = f"Near are {', '.join(near)}" if near else "timm.list_models() lists those that it has"
        raise InputError(f"timm {timm.__version__} has no model {name!r}. {hint}.")
    fixed = [key for key in settings if key in ("pretrained", "pretrained_cfg", "checkpoint_path", "model_name", "cache_dir")]
    if fixed:
        raise InputError(f"timm:{name} takes no --set {fixed[0]}: nothing is fetched. Name a file with --weights.")
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False, **settings)
            channels, *sizes = timm.data.resolve_model_data_config(model, args=dict(settings))["input_size"]
            image = torch.randn(1, settings.get("in_chans", channels), *sizes, dtype=next(model.parameters()).dtype)
    except Exception as error:
        raise InputError(f"timm cannot build {name}: {type(error).__name__}: {first_line(error)}.") from error
    return model, (image,)


def _library(name: str, scheme: str, command: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise InputError(f"{scheme} needs {missing}, which is not installed. Run {command}.") from error
    except Exception as error:
        raise InputError(f"{scheme} needs {name}, whose import raised {type(error).__name__}: {first_line(error)}.") from error


def described(folder: Path) -> Mapping[str, Any]:
    """What config.json holds.

    Raises:
        InputError: if there is no folder or no such file, or it cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}. hf: reads a checkpoint's folder on this machine, and fetches nothing.")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no checkpoint of transformers: it holds no config.json. {_way_to_checkpoint(folder)}")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} describes no model: it holds no JSON object.")
    return found


def _root(error: BaseException) -> str:
    """What an error comes from, such as a package that cannot be imported, if it says so."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return "" if root is error else f" ({type(root).__name__}: {first_sentence(root)})"


def _way_to_checkpoint(folder: Path) -> str:
    """What to do about a folder that holds no config.json."""
    if (folder / "adapter_config.json").is_file():
        return "It holds an adapter: load it, merge it into its model (merge_and_unload), and save that with save_pretrained."
    if found := sorted(path for path in folder.glob("snapshots/*") if (path / "config.json").is_file()):
        return f"It is a folder of the hub's cache: name the snapshot in it, {found[-1]}."
    return "Write it with save_pretrained."


def _check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors, or without some that its index names."""
    if (folder / ONE).exists():
        readable(folder / ONE)
        return
    index = folder / INDEX
    if not index.is_file():
        raise InputError(
            f"{folder} holds neither {ONE} nor {INDEX}, and other formats are not read. Write it with save_pretrained."
        )
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights: {type(error).__name__}: {first_line(error)}.") from error
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise InputError(
            f"{folder} lacks {len(missing)} of {count(len(shards), 'file')} that its index names: {shorten(missing)}."
        )


def _maker(transformers: Any, config: Any, own: Mapping[str, str], folder: Path) -> Any:
    """The class that builds what the configuration names: of transformers, or an Auto class for the folder's own code."""
    named: Sequence[str] = getattr(config, "architectures", None) or ()
    for auto, place in own.items():
        if auto != "AutoConfig" and place.rpartition(".")[2] in named and hasattr(transformers, auto):
            return getattr(transformers, auto)
    if not named:
        return transformers.AutoModel
    found = getattr(transformers, named[0], None)
    if found is None:
        raise InputError(f"transformers {transformers.__version__} has no {named[0]}, which {folder / 'config.json'} names.")
    return found


def _is_auto(make: Any) -> bool:
    return make.__name__.startswith("AutoModel")


def examples(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Inputs by keyword, as far as a configuration of transformers tells their shapes: tokens, an image, or sound."""
    device = next(model.parameters()).device
    name = getattr(model, "main_input_name", None)
    words = getattr(config.get_text_config(), "vocab_size", None)
    tokens = (torch.arange(_TOKENS, device=device) % words)[None] if isinstance(words, int) else None
    more: dict[str, Tensor] = {}
    if tokens is not None and getattr(config, "is_encoder_decoder", False):
        more["decoder_input_ids"] = tokens.clone()
    if tokens is not None and name == "input_ids":
        return {name: tokens, **more}
    if name == "pixel_values":
        size = getattr(config, "image_size", None)
        sizes = [size, size] if isinstance(size, int) else size
        if isinstance(sizes, (list, tuple)) and len(sizes) == 2:
            shape = (1, getattr(config, "num_channels", 3), *sizes)
            return {name: _noise(model, shape)}
    bands, places, length = (getattr(config, key, None) for key in ("num_mel_bins", "max_source_positions", "max_length"))
    if name == "input_features" and isinstance(bands, int) and isinstance(places, int):  # a spectrum, halved in time
        return {name: _noise(model, (1, bands, 2 * places)), **more}
    if name == "input_values" and isinstance(bands, int) and isinstance(length, int):  # a spectrum of one length
        return {name: _noise(model, (1, length, bands))}
    bands, halvings = (getattr(config, key, None) for key in ("input_feat_per_channel", "num_conv_layers"))
    if name == "input_features" and isinstance(bands, int) and isinstance(halvings, int):
        return {name: _noise(model, (1, _TOKENS << halvings, bands)), **more}
    kernels, strides = (getattr(config, key, None) for key in ("conv_kernel", "conv_stride"))
    if name == "input_values" and kernels and strides:  # a wave, of which convolutions make frames
        length = _TOKENS
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            length = (length - 1) * stride + kernel
        return {name: _noise(model, (1, length)), **more}
    return {}


def _noise(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The same random numbers every time, of a model's dtype."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(parameter.device, parameter.dtype)
