"""Sweeps by name: the paper's experiments, and reduced ones for CPUs."""

from dataclasses import replace

from equinorm.experiments._runs import METHODS, ExperimentError, Run, Sweep

_FC = Run(data="cifar10", network="fc", width=500, batch=256, epochs=60, weight_decay=1e-3, c=1.2)
_CONV = Run(
    data="cifar10", network="conv", width=128, batch=256, epochs=128, momentum=0.9, weight_decay=1e-3, c=1.1, augment=True
)
_RESNET = Run(data="cifar10", network="resnet18c", width=64, epochs=90, momentum=0.9, weight_decay=1e-4, c=1.2, augment=True)
_ALL = tuple(name for name in METHODS if name not in ("balanced",))
_CORE = ("baseline", "bn", "gn", "path_sgd", "enorm", "enorm_exact", "enorm_bn")
_NORMS = ("baseline", "bn", "gn", "enorm", "enorm_bn")

PRESETS = {
    "digits": Sweep(
        Run(data="digits", depth=12, width=64, batch=64, epochs=20, weight_decay=1e-4, clip=1.0),
        ("baseline", "bn", "gn", "path_sgd", "enorm", "enorm_exact"),
        depths=(12,),
        batches=(64,),
        seeds=3,
        select_epochs=6,
        lrs=(0.02, 0.1, 0.5),
    ),
    "fc": Sweep(_FC, _ALL, depths=(1, 5, 9, 15, 19), seeds=5, select_epochs=10),
    "fc-cpu": Sweep(replace(_FC, epochs=20), _CORE, depths=(1, 9, 15), seeds=3, select_epochs=3),
    "conv": Sweep(_CONV, _NORMS, seeds=5, select_epochs=10),
    "conv-reduced": Sweep(replace(_CONV, width=32, epochs=12), _NORMS, seeds=3, select_epochs=3),
    "resnet18": Sweep(_RESNET, ("bn", "gn", "enorm"), batches=(16, 32, 64, 128, 256), seeds=3, select_epochs=5),
    "resnet18-reduced": Sweep(
        replace(_RESNET, width=16, epochs=8), ("bn", "gn", "enorm"), batches=(16, 64, 256), seeds=3, select_epochs=2
    ),
    "resnet18-identity": Sweep(
        replace(_RESNET, network="resnet18"), ("bn", "gn", "enorm"), batches=(16, 32, 64, 128, 256), seeds=3, select_epochs=5
    ),
    "resnet50-identity": Sweep(
        replace(_RESNET, network="resnet50"), ("bn", "gn", "enorm"), batches=(16, 32, 64, 128, 256), seeds=3, select_epochs=5
    ),
}


def preset(name: str) -> Sweep:
    """A sweep by name.

    Raises:
        ExperimentError: if there is none of that name.
    """
    if name not in PRESETS:
        raise ExperimentError(f"there is no preset {name!r}. There are {', '.join(PRESETS)}.")
    return PRESETS[name]
