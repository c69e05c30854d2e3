"""Networks: sizes that are known, normalization where it belongs, symmetries that must be found."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import equinorm
from equinorm.experiments import networks
from equinorm.experiments.config import METHODS, Run
from zoo import from_torchvision as zoo_torchvision

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
CONV = Run(network="conv", width=128)


def build(run, shape=CIFAR, classes=10, seed=0):
    torch.manual_seed(seed)
    return networks.build(run, shape, classes)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


SIZES = [
    (Run(depth=1), CIFAR, 10, 3072 * 500 + 500 * 500 + 500 * 10),
    (Run(depth=15), CIFAR, 10, 5_291_000),
    (Run(depth=15, biases=True), CIFAR, 10, 5_291_000 + 16 * 500 + 10),
    (Run(depth=15, method="bn"), CIFAR, 10, 5_291_000 + 16 * 1000),
    (Run(depth=15, method="gn"), CIFAR, 10, 5_291_000 + 16 * 1000),
    (Run(depth=15, method="wn"), CIFAR, 10, 5_291_000 + 16 * 500 + 10),
    (CONV, CIFAR, 10, 9 * (3 * 128 + 2 * 128**2 + 128 * 256 + 2 * 256**2 + 256 * 320) + 320 * 320 + 320 * 10),
    (replace(CONV, method="bn"), CIFAR, 10, 2_615_808 + 2 * (128 + 256)),
    (Run(network="resnet18", width=64, method="bn"), IMAGENET, 1000, 11_689_512),
    (Run(network="resnet50", width=64, method="bn"), IMAGENET, 1000, 25_557_032),
    # type C: five more projections with their normalization
    (
        Run(network="resnet18c", width=64, method="bn"),
        IMAGENET,
        1000,
        11_689_512 + 2 * (64**2 + 128) + (128**2 + 256) + (256**2 + 512) + (512**2 + 1024),
    ),
]


@pytest.mark.parametrize(("run", "shape", "classes", "parameters"), SIZES)
def test_number_of_parameters(run, shape, classes, parameters):
    model = build(run, shape, classes)
    assert count(model) == parameters
    with torch.no_grad():
        assert model.eval()(torch.randn(2, *shape)).shape == (2, classes)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_identity_resnets_are_the_usual_ones(name):
    """With torchvision's weights, in order, they give torchvision's outputs."""
    torch.manual_seed(0)
    theirs = zoo_torchvision.import_models().get_model(name, weights=None).double().eval()
    ours = build(Run(network=name, width=64, method="bn"), IMAGENET, 1000).double().eval()
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other)
        images = torch.randn(2, *IMAGENET, dtype=torch.float64)
        assert float((ours(images) - theirs(images)).abs().max()) <= 1e-12 * float(theirs(images).abs().max())


def test_he_initialisation():
    model = build(Run(depth=3, biases=True))
    for layer in model:
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / layer.in_features), rel=0.03)
            assert not layer.bias.any()


def test_methods_start_from_the_same_weights():
    usual = [layer.weight for layer in build(Run(depth=3)) if isinstance(layer, nn.Linear)]
    for name in METHODS:
        own = [layer.weight for layer in build(Run(depth=3, method=name)) if isinstance(layer, nn.Linear)]
        assert all(torch.allclose(one, other, rtol=1e-6, atol=0) for one, other in zip(usual, own, strict=True)), name


def kinds(model):
    short = {nn.Linear: "L", nn.Conv2d: "C", nn.BatchNorm1d: "B", nn.BatchNorm2d: "B", nn.GroupNorm: "G", nn.ReLU: "R"}
    return "".join(short[type(layer)] for layer in model.modules() if type(layer) in short)


def test_normalization_stands_before_each_relu():
    assert kinds(build(Run(depth=2))) == "LRLRLRL"
    assert kinds(build(Run(depth=2, method="bn"))) == "LBRLBRLBRL"
    assert kinds(build(Run(depth=2, method="enorm_gn"))) == "LGRLGRLGRL"


def test_fully_convolutional_network_is_normalised_after_each_third_convolution():
    assert kinds(build(replace(CONV, width=8))) == "CR" * 9
    assert kinds(build(replace(CONV, width=8, method="bn"))) == "CRCRCBR" * 2 + "CR" * 3


@pytest.mark.parametrize(
    ("channels", "least", "expected"), [(64, 2, 32), (128, 2, 32), (500, 16, 25), (64, 16, 4), (16, 2, 8), (7, 2, 1)]
)
def test_groups(channels, least, expected):
    assert networks.groups(channels, least) == expected


def test_type_c_has_no_identity_skip():
    learned = [len(block.skip) for block in build(Run(network="resnet18c", width=8)).blocks]
    assert learned == [1] * 8
    assert [len(block.skip) for block in build(Run(network="resnet18", width=8)).blocks] == [0, 0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("run", "free"),
    [
        (Run(depth=3, width=32), 4 * 32),
        (Run(depth=3, width=32, method="bn"), 4 * 32),  # γ and β move
        (Run(network="conv", width=8), 3 * 8 + 3 * 16 + 2 * 20),
        # stem, inside of each block, and where a learned skip begins a new stream: every block, or every stage
        (Run(network="resnet18c", width=8), 8 + 2 * (8 + 16 + 32 + 64) * 2),
        (Run(network="resnet18", width=8), 2 * (8 + 16 + 32 + 64) + (8 + 16 + 32 + 64)),
    ],
)
def test_free_scale_classes(run, free):
    model = build(run)
    assert equinorm.symmetries(model, (torch.randn(2, *CIFAR),)).num_free == free


@pytest.mark.parametrize("name", ["resnet18c", "resnet18", "resnet50"])
def test_residual_networks_without_normalization_start_at_a_sane_size(name):
    outputs = build(Run(network=name, width=16))(torch.randn(16, *CIFAR))
    assert 0.1 < float(outputs.detach().std()) < 10


@pytest.mark.parametrize(("method", "ending"), [("baseline", "branch.2.weight"), ("bn", "branch.4.weight")])
def test_residual_branches_start_smaller(method, ending):
    run = Run(network="resnet18", width=8, method=method)
    plain, small = (dict(build(replace(run, branch=branch)).named_parameters()) for branch in (1.0, 0.1))
    for name, weight in plain.items():
        torch.testing.assert_close(small[name], weight * (0.1 if name.endswith(ending) else 1.0), rtol=1e-6, atol=0)
    assert sum(name.endswith(ending) for name in plain) == 8


def test_centred_weights_keep_images_apart():
    """He's weights hand on the mean of rectified units, which all images share; centred ones do not, at the same size."""
    alike, sizes = [], []
    for centred in (False, True):
        model = build(Run(network="resnet18c", width=8, centred=centred))
        images = torch.randn(8, *CIFAR, generator=torch.Generator().manual_seed(0))
        features = model.pool(model.blocks(model.stem(images))).detach()
        rows = torch.nn.functional.normalize(features, dim=1)
        alike.append(float((rows @ rows.T).mean()))
        sizes.append(float(features.norm()))
        means = model.blocks[3].branch[2].weight.detach().mean((1, 2, 3)).abs()
        assert (means < 1e-7).all() == centred
    assert alike[1] < alike[0] - 0.02
    assert 0.5 < sizes[1] / sizes[0] < 3


@pytest.mark.parametrize("method", ["enorm", "bn"])
@pytest.mark.parametrize("network", ["resnet18", "resnet18c"])
def test_skips_start_at_the_identity(network, method):
    """Channels go on as they are, in turn where a stage has more of them; branches shrink as beside identity skips."""
    torch.manual_seed(0)
    model = build(Run(network=network, width=8, method=method, centred=True, identity=True, branch=0.0)).eval()
    learned = [block.skip[0] for block in model.blocks if len(block.skip)]
    assert len(learned) == (8 if network == "resnet18c" else 3)
    images = torch.randn(2, *CIFAR)
    found = model.stem(images).detach()
    for block in model.blocks:
        outputs = block(found).detach()
        stride = found.size(2) // outputs.size(2)
        expected = found[:, :, ::stride, ::stride].repeat(1, outputs.size(1) // found.size(1), 1, 1)
        assert torch.allclose(outputs, expected, rtol=1e-4)
        found = outputs


def test_branches_beside_skips_that_start_at_the_identity_shrink_alike():
    sizes = [
        [float(block.branch[2].weight.detach().norm()) for block in build(Run(network=name, width=16, identity=True)).blocks]
        for name in ("resnet18", "resnet18c")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_weight_norm_is_exact():
    plain, normed = build(Run(depth=2, width=32)), build(Run(depth=2, width=32, method="wn"))
    images = torch.randn(4, *CIFAR)
    assert torch.allclose(plain(images), normed(images), rtol=1e-4, atol=1e-5)
    assert sum("original" in name for name, _ in normed.named_parameters()) == 8
