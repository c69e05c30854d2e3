"""torchvision's models: classification, segmentation, video, optical flow, and the backbones of detection."""

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

WHOLE_IMAGE = ("vit", "swin", "maxvit")
"""Models whose input must have the size that they were built for."""

VIDEO = ("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")
"""Models of clips."""

DETECTION = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", "ssd")
"""Detectors: boxes come from searches that depend on data, so only what stands before is exported."""

SMALL = ("quantized_googlenet", "quantized_inception_v3", "googlenet", "inception_v3")
"""Models whose constructor has init_weights, slow unless said."""


def declare_operators() -> None:
    """Declare the operators that torchvision asks for when imported, if its compiled ones do not fit this PyTorch.

    The networks themselves do not need them.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or "torchvision" in sys.modules:
        return
    for path in Path(found.origin).parent.glob("_C*.so"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(path))
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declare_operators.library = library  # type: ignore[attr-defined]  # definitions live as long as this object


def import_models() -> Any:
    """torchvision.models, with or without its compiled operators."""
    declare_operators()
    from torchvision import models

    return models


def names() -> list[str]:
    """Every model of torchvision. Those with quantized_ are the float models that quantization starts from."""
    return import_models().list_models()


def family(name: str) -> str:
    """Models of one file of definitions."""
    return import_models().get_model_builder(name).__module__.rsplit(".", 1)[-1]


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model and inputs for it."""
    models = import_models()
    options: dict[str, Any] = {"init_weights": True} if name in SMALL else {}
    if name not in models.list_models(module=models) or name.startswith("quantized"):
        options["weights"] = None
    if name.startswith((*DETECTION, "deeplabv3", "fcn", "lraspp")):
        options["weights_backbone"] = None
    with torch.device("cpu") if name.startswith("regnet") else contextlib.nullcontext():  # initialised with numbers read back
        model = models.get_model(name, **options)
    model.to(torch.get_default_device())
    if name.startswith(DETECTION):
        size = 300 if name == "ssd300_vgg16" else 96
        return model.backbone, (torch.randn(2, 3, size, size),), {}
    if name.startswith("raft"):
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)), {"num_flow_updates": 2}
    if name.startswith(VIDEO):
        size, frames = (224, 16) if name.startswith(("mvit", "swin3d", "s3d")) else (64, 8)
        return model, (torch.randn(1, 3, frames, size, size),), {}
    size = 224 if name.startswith(WHOLE_IMAGE) else 96
    return model, (torch.randn(2, 3, size, size),), {}
