"""timm's models, at the size of image that each was made for.

Needs timm (`pip install --no-deps timm`) and torchvision.
"""

from typing import Any

import torch
from torch import nn

from zoo.from_torchvision import import_models


def _timm() -> Any:
    import_models()
    import timm

    return timm


def names() -> list[str]:
    """Every architecture of timm."""
    return _timm().list_models()


def family(name: str) -> str:
    """Models of one file of definitions."""
    return _timm().model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model and an image for it."""
    model = _timm().create_model(name, pretrained=False)
    return model, (torch.randn(1, *model.pretrained_cfg["input_size"]),), {}
