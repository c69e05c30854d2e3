"""A real, trained network: the ResNet-20 and the CIFAR-10 test images that lie beside the project, where they do."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT.parent / "shared" / "models" / "resnet20-cifar10.safetensors"
IMAGES = ROOT.parent / "shared" / "cifar10" / "test.tar.xz"

pytestmark = pytest.mark.skipif(
    not (WEIGHTS.exists() and IMAGES.exists()), reason="the trained network and images are not here"
)


@pytest.fixture(scope="module")
def resnet20():
    return importlib.import_module("resnet20")


@pytest.mark.parametrize(
    ("dtype", "power_of_two", "tolerance"),
    [(torch.float64, False, 1e-12), (torch.float32, False, 1e-5), (torch.float32, True, 0.0)],
    ids=["float64", "float32", "powers of two"],
)
def test_every_prediction_is_unchanged(resnet20, dtype, power_of_two, tolerance):
    """On the first 250 images; benchmarks/resnet20.py does all 10,000."""
    record = resnet20.compare(WEIGHTS, IMAGES, 250, dtype, power_of_two)
    assert record["same_predictions"] == 250
    assert record["deviation"] <= tolerance
    assert record["accuracy"] > 0.7  # it is the trained network
    assert record["norm_after"] < record["norm_before"]
    assert record["free_classes"] > 300
