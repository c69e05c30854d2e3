"""Sweeps by name: the paper's experiments, and reduced ones for CPUs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from equinorm._errors import first_line
from equinorm.experiments.config import EXTRAS, METHODS, ExperimentError, Run, Sweep

_FC = Run(data="cifar10", network="fc", width=500, batch=256, epochs=60, weight_decay=1e-3, c=1.2)
_CONV = Run(
    data="cifar10", network="conv", width=128, batch=256, epochs=128, momentum=0.9, weight_decay=1e-3, c=1.1, augment=True
)
_RESNET = Run(data="cifar10", network="resnet18c", width=64, epochs=90, momentum=0.9, weight_decay=1e-4, c=1.2, augment=True)
_ALL = tuple(name for name in METHODS if name != "balanced")
_CORE = ("baseline", "bn", "gn", "path_sgd", "enorm", "enorm_exact", "enorm_bn")
WITH_EXTRAS = ",".join(f"{name}={value:g}" for name, value in EXTRAS.items())
_EQUAL = (
    *(f"{name}:{WITH_EXTRAS}" for name in ("baseline", "bn", "gn", "path_sgd")),
    "bn:weight_decay=0.004",
    f"enorm:{WITH_EXTRAS},c=0",
    f"baseline:{WITH_EXTRAS},biases=1",
    f"enorm:{WITH_EXTRAS},c=0,biases=1",
)
"""The methods with the same extras, as docs/claims.md compares them."""
_TRIALS = (
    f"enorm:{WITH_EXTRAS},c=0",
    f"enorm_exact:{WITH_EXTRAS},c=0",
    f"enorm:{WITH_EXTRAS},c=1",
    f"enorm:{WITH_EXTRAS},c=1.2,c_end=1",
    f"enorm:{WITH_EXTRAS},c=0,p=1",
    f"enorm:{WITH_EXTRAS},c=0,p=3",
    f"enorm:{WITH_EXTRAS},c=0,clip=1",
    f"enorm:{WITH_EXTRAS},c=0,warmup=0.3",
    *(f"enorm:{WITH_EXTRAS},c=0,biases=1{rest}" for rest in ("", ",match_biases=0", ",symmetric_biases=0")),
    f"baseline:{WITH_EXTRAS},biases=1",
    "enorm:c=0,weight_decay=0.004",
    *(f"{name}:{WITH_EXTRAS}" for name in ("balanced", "baseline", "gn", "bn", "wn")),
)
"""What theory suggests beside the variant of ENorm that docs/claims.md compares, and others with its extras."""
_NORMS = ("baseline", "bn", "gn", "enorm", "enorm_bn")
_BESIDE_SKIPS = "head=0.1,centralise=1,biases=1,centred=1,identity=1"
"""What brings a ResNet without normalization near one with batch normalization: docs/results-convolutional.md."""
_CONV_128 = Sweep(
    replace(_CONV, width=16, weight_decay=5e-4, c=1.2, bfloat16=True),
    tuple(f"{name}{extras}" for extras in (":head=0.1,centralise=1", "") for name in _NORMS),
    seeds=2,
    select_epochs=0,
    lrs=(0.05,),
)
_RESNETS = Sweep(_RESNET, ("bn", "gn", "enorm"), batches=(16, 32, 64, 128, 256), seeds=3, select_epochs=5)

PRESETS = {
    "digits": Sweep(
        Run(data="digits", depth=16, width=64, batch=64, epochs=20, weight_decay=1e-4, clip=1.0, c=1.2),
        ("baseline", "bn", "gn", "path_sgd", "enorm", "enorm_exact"),
        depths=(16,),
        batches=(64,),
        seeds=3,
        select_epochs=6,
        lrs=(0.02, 0.1, 0.5),
    ),
    "fc": Sweep(_FC, (*_ALL, *_EQUAL), depths=(1, 5, 9, 15, 19), seeds=5, select_epochs=10),
    "fc-cpu": Sweep(
        replace(_FC, epochs=20), (*_CORE, *_EQUAL), depths=(1, 9, 15), seeds=3, select_epochs=3, lrs=(0.02, 0.1, 0.5)
    ),
    "fc-trials": Sweep(replace(_FC, epochs=3), _TRIALS, depths=(9,), seeds=1, select_epochs=3, lrs=(0.02, 0.05)),
    "fc-60": Sweep(_FC, _NORMS, depths=(1, 5, 9, 15, 19), seeds=2, select_epochs=0, lrs=(0.05,)),
    "fc-60-bfloat16": Sweep(replace(_FC, bfloat16=True), _NORMS, depths=(1, 9), seeds=2, select_epochs=0, lrs=(0.05,)),
    "conv": Sweep(_CONV, _NORMS, seeds=5, select_epochs=10),
    "conv-reduced": Sweep(replace(_CONV, width=16, epochs=6), _NORMS, seeds=3, select_epochs=2, lrs=(0.005, 0.02, 0.1)),
    "conv-short": replace(_CONV_128, base=replace(_CONV_128.base, epochs=8)),
    "conv-short-float32": replace(_CONV_128, base=replace(_CONV_128.base, epochs=8, bfloat16=False)),
    "conv-128": _CONV_128,
    "conv-128-float32": replace(_CONV_128, base=replace(_CONV_128.base, bfloat16=False)),
    "resnet18": _RESNETS,
    "resnet18-reduced": Sweep(
        replace(_RESNET, width=8, epochs=3),
        ("bn", "gn", "enorm"),
        batches=(16, 64, 256),
        seeds=3,
        select_epochs=1,
        lrs=(0.005, 0.02, 0.1),
    ),
    "resnet18-recipe": Sweep(
        replace(_RESNET, width=8, epochs=10, weight_decay=5e-4, c=1.0),
        (
            *(f"{name}:{_BESIDE_SKIPS}" for name in ("enorm", "baseline")),
            *(f"{name}:head=0.1,centralise=1{rest}" for name in ("bn", "gn") for rest in ("", ",identity=1")),
        ),
        batches=(128,),
        seeds=2,
        select_epochs=0,
        lrs=(0.1,),
    ),
    "resnet18-identity": replace(_RESNETS, base=replace(_RESNET, network="resnet18")),
    "resnet50-identity": replace(_RESNETS, base=replace(_RESNET, network="resnet50")),
}


def preset(name: str) -> Sweep:
    """A sweep by name, or from a .json or .yaml file with the fields of `Sweep` (and of `Run` below "base").

    Raises:
        ExperimentError: if there is none of that name, or the file holds something else.
    """
    if Path(name).suffix in (".json", ".yaml", ".yml"):
        return _read(Path(name))
    if name not in PRESETS:
        raise ExperimentError(f"there is no preset {name!r}. There are {', '.join(PRESETS)}.")
    return PRESETS[name]


def _read(path: Path) -> Sweep:
    try:
        text = path.read_text("utf-8")
        found = dict(json.loads(text) if path.suffix == ".json" else _yaml(text, path))
        base = Run(**found.pop("base", {}))
        return Sweep(base, **{key: _field(key, value) for key, value in found.items()})
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExperimentError(f"cannot read {path} as a sweep: {reason}.") from error


def _field(key: str, value: Any) -> Any:
    """A field of a sweep as it stands in a file: lists become tuples."""
    default = getattr(Sweep(), key, None)
    if not isinstance(default, tuple):
        return value
    kinds = {str: str, int: int, float: (int, float)}[type(default[0])]
    if not isinstance(value, list) or not all(isinstance(part, kinds) for part in value) or not value:
        raise ValueError(f"{key} must be a list such as {json.dumps(default)}")
    return tuple(value)


def _yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ExperimentError(
            f"{path} needs PyYAML, which is not installed: pip install 'equinorm[experiments]', or write JSON."
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error
