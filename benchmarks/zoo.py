"""Discovery on every torchvision classification model: free classes, coverage, times, and the deviation of a random member.

    python benchmarks/zoo.py [--models alexnet resnet18] [--output benchmarks/results/torchvision.jsonl] [--seed 0]

One model is in memory at a time. Weights are random; statistics, gains, shifts and zero-initialised heads are redrawn first,
so that no symmetry violation can hide behind a zero or a one.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import equinorm

WHOLE_IMAGE = ("vit", "swin", "maxvit")
"""Models whose input must have the size that they were built for."""


def import_models() -> Any:
    """torchvision.models; its compiled operators may be missing, which classification does not need."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_models.library = library  # type: ignore[attr-defined]  # definitions live as long as this object
    from torchvision import models

    return models


def names() -> list[str]:
    """Every classification model of torchvision."""
    models = import_models()
    return models.list_models(module=models)


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model in evaluation mode and float64, none of whose tensors is zero or constant, and its input."""
    models = import_models()
    torch.manual_seed(seed)
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, **options).double().eval()
    randomise_(model)
    size = 224 if name.startswith(WHOLE_IMAGE) else 96
    return model, (torch.randn(2, 3, size, size, dtype=torch.float64),)


@torch.no_grad()
def randomise_(model: nn.Module) -> None:
    """Redraw statistics, vectors and constant tensors; small shifts, gains around 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        is_constant = bool((parameter == parameter.flatten()[0]).all())
        if parameter.dim() == 1 or is_constant:
            if (name.endswith("weight") and parameter.dim() == 1) or name.endswith(("layer_scale", "logit_scale")):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)


@torch.no_grad()
def measure(name: str, seed: int = 0) -> dict[str, Any]:
    """One record: what is found, how long it takes, and how far a random member of the group moves the outputs."""
    model, args = build(name, seed)
    started = time.perf_counter()
    symmetries = equinorm.symmetries(model, args)
    seconds = time.perf_counter() - started
    before = model(*args)
    log_scales = torch.randn(symmetries.num_free, dtype=torch.float64)
    symmetries.rescale_(log_scales)
    after = model(*args)
    return {
        "model": name,
        "free": symmetries.num_free,
        "coverage": round(symmetries.coverage, 6),
        "parameters": sum(p.numel() for p in model.parameters()),
        "export_seconds": round(symmetries.seconds[0], 3),
        "interpretation_seconds": round(symmetries.seconds[1], 3),
        "seconds": round(seconds, 3),
        "deviation": float((after - before).abs().max() / before.abs().max()),
        "output_spread": float(before.std() / before.abs().max()),
        "largest_log_scale": float(log_scales.abs().max()) if symmetries.num_free else 0.0,
        "seed": seed,
        "input": list(args[0].shape),
        "torch": torch.__version__,
        "equinorm": equinorm.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def sweep(models: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of these models, one in memory at a time; a model that fails yields its error."""
    for name in models:
        try:
            yield measure(name, seed)
        except Exception as error:
            yield {"model": name, "error": f"{type(error).__name__}: {error}"}
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="*", help="names; default: all")
    parser.add_argument("--output", type=Path, help="file of JSON lines to write; default: print only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for record in sweep(options.models or names(), options.seed):
        lines.append(json.dumps(record))
        print(lines[-1], flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
