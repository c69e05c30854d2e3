"""A trained CIFAR ResNet-20, balanced: predictions and deviation on CIFAR-10's test images.

    python benchmarks/resnet20.py WEIGHTS.safetensors TEST_IMAGES.tar.xz [--images 10000] [--output FILE.jsonl]

The images are read from an archive of JPEG files in one folder for each class. `resnet20` is also a factory for the command
line:

    cd benchmarks
    equinorm balance resnet20:resnet20 --weights WEIGHTS.safetensors --input 1x3x32x32 --output balanced.safetensors
"""

import copy
import io
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import equinorm
from common import options_of, report

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.padding = (n_out - n_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + x)


class ResNet20(nn.Module):
    """He et al. 2016: three stages of three blocks, widths 16, 32, 64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for stage in (1, 2, 3):
            n_in, n_out = widths[stage - 1], widths[stage]
            blocks = [Block(n_in, n_out, 1 if stage == 1 else 2), Block(n_out, n_out, 1), Block(n_out, n_out, 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20() -> ResNet20:
    """An untrained network, in evaluation mode."""
    return ResNet20().eval()


def trained(weights: Path) -> ResNet20:
    """The network with these weights; the counters that the file leaves out stay 0."""
    model = resnet20()
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return model


def read_images(archive: Path, count: int) -> tuple[Tensor, Tensor]:
    """Normalized images (count, 3, 32, 32) in float64, and labels."""
    pixels, labels = [], []
    with tarfile.open(archive) as members:
        for member in members:
            if not member.isfile():
                continue
            file = members.extractfile(member)
            assert file is not None
            pixels.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            labels.append(CLASSES.index(PurePosixPath(member.name).parent.name))
            if len(pixels) == count:
                break
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std, torch.tensor(labels)


def compare(weights: Path, archive: Path, count: int, dtype: torch.dtype, power_of_two: bool, p: float = 2.0) -> dict[str, Any]:
    """One record: norms, accuracy, how many predictions agree, and the largest relative difference of outputs."""
    before = trained(weights).to(dtype)
    after = copy.deepcopy(before)
    images, labels = read_images(archive, count)
    balance = equinorm.symmetries(after, (images[:1].to(dtype),)).balance(p=p, tol=1e-10)
    balance.apply_(power_of_two=power_of_two)
    agree, right, worst, largest = 0, 0, 0.0, 0.0
    with torch.no_grad():
        for batch, label in zip(images.split(250), labels.split(250), strict=True):
            a, b = before(batch.to(dtype)), after(batch.to(dtype))
            agree += int((a.argmax(1) == b.argmax(1)).sum())
            right += int((b.argmax(1) == label).sum())
            worst, largest = max(worst, float((a - b).abs().max())), max(largest, float(a.abs().max()))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "power_of_two": power_of_two,
        "p": p,
        "images": len(images),
        "free_classes": balance.symmetries.num_free,
        "same_predictions": agree,
        "accuracy": right / len(images),
        "deviation": worst / largest,
        "norm_before": balance.norm_before,
        "norm_after": balance.norm_after,
        "residual": balance.residual,
        "cycles": balance.cycles,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    for dtype, power_of_two in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        report([compare(options.weights, options.images, options.count, dtype, power_of_two)], options.output)


if __name__ == "__main__":
    main()
