"""torchvision's models and tiny ones of transformers: exact rescalings, and at least the free classes that are known to exist.

EQUINORM_ZOO=1 tests every model that `benchmarks/zoo` runs (half an hour, 12 GB); the default is a few small ones.
"""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)

import equinorm
from zoo import __main__ as zoo, from_torchvision as zoo_torchvision, from_transformers as zoo_transformers

LEAST = {
    "alexnet": 9344,
    "vgg11_bn": 10944,
    "resnet18": 2880,
    "resnet50": 11456,
    "mobilenet_v2": 712,
    "densenet121": 41760,
    "shufflenet_v2_x0_5": 3976,
    "mnasnet0_5": 9816,
    "regnet_y_400mf": 10288,
    "convnext_tiny": 8064,
    "resnext50_32x4d": 19008,
    "squeezenet1_0": 2976,
    "googlenet": 7280,
    "inception_v3": 17216,
    "swin_t": 19680,
    "vit_b_16": 37632,
    "maxvit_t": 13504,
}
"""Free classes that earlier work found: discovery must not fall behind."""

FEW = [
    "alexnet",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "mobilenet_v2",
    "mnasnet0_5",
]
"""Quick ones of every kind; vision transformers are looked at block by block in test_completeness_vision."""


ALL = bool(os.environ.get("EQUINORM_ZOO"))
TINY = ["llama", "mixtral", "gemma3", "t5", "mamba", "segformer"]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.mark.parametrize("name", zoo_torchvision.names() if ALL else FEW)
def test_torchvision_model(name: str) -> None:
    if zoo.look("torchvision", name)["parameters"] > zoo.LARGEST:
        pytest.skip(f"more than {zoo.LARGEST:.0f} parameters")
    record = zoo.measure("torchvision", name)
    assert record["output_spread"] > 0.01, "outputs that are all alike prove nothing"
    assert record["deviation"] <= 1e-12
    assert record["free"] >= LEAST.get(name, 1)


@needs_transformers
@pytest.mark.parametrize("name", zoo_transformers.names() if ALL else TINY)
def test_transformers_model(name: str) -> None:
    record = zoo.measure("transformers", name)
    assert record["output_spread"] > 0.01, "outputs that are all alike prove nothing"
    assert record["deviation"] <= 1e-12
    assert record["free"] >= 64


@needs_transformers
def test_experts_by_grouped_matrix_products() -> None:
    """These exist in float32 only, where powers of two leave the outputs bitwise as they were."""
    torch.manual_seed(0)
    model, _, kwargs = zoo_transformers.build("mixtral")
    model.eval().set_experts_implementation("grouped_mm")
    zoo.randomise_(model)
    with torch.no_grad():
        before = model(**kwargs).logits
        group = equinorm.symmetries(model, (), kwargs)
        assert group.num_free == 592
        group.rescale_(torch.randn(592, dtype=torch.float64), power_of_two=True)
        assert torch.equal(model(**kwargs).logits, before)


def test_a_rescaling_outside_the_group_is_seen() -> None:
    """The measurement can fail: one channel that moves without its consumers changes the outputs."""
    model, args, _ = zoo.build("torchvision", "squeezenet1_0")
    with torch.no_grad():
        before = model(*args)
        model.features[0].weight[3].mul_(1.1)
        assert float((model(*args) - before).abs().max() / before.abs().max()) > 1e-9


def test_training_mode_finds_the_same() -> None:
    """Affine batch norm is exact in both modes."""
    model, args, _ = zoo.build("torchvision", "resnet18")
    counts = [equinorm.symmetries(model.train(mode), args).num_free for mode in (False, True)]
    assert counts == [2880, 2880]
