"""timm's models, at the size of image that each was made for, or at a part of it.

Needs timm (`pip install --no-deps timm`) and torchvision.
"""

import contextlib
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


def build(name: str, part: int = 1) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model and an image for it, of one part of the height and width that it was made for."""
    model = _timm().create_model(name, pretrained=False)
    channels, height, width = model.pretrained_cfg["input_size"]
    if part > 1:
        with contextlib.suppress(TypeError):  # of no fixed size
            model = _timm().create_model(name, pretrained=False, img_size=height // part)
    return model, (torch.randn(1, channels, height // part, width // part),), {}
