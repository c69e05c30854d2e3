"""Random members on small networks, blocks of vision models and language models: outputs stay what they were.

EQUINORM_ZOO=1 tests every one (fifteen minutes); the default is a few.
"""

import copy
import importlib.util
import os

import pytest
import torch
from small_networks import constants, layers, products
from small_networks.cases import CASES, INPUTS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import equinorm

__all__ = ["constants", "layers", "products"]  # which enter their cases

IS_WHOLE = bool(os.environ.get("EQUINORM_ZOO"))
LIMIT = 1e-12
MANY = 8
"""Small networks that are always tested."""

BLOCKS = ["timm vision_transformer", "timm efficientnet, inverted residual", "timm swin_transformer", "torchvision densenet"]
MODELS = ["llama"]


def deviation(model: nn.Module, args: tuple, kwargs: dict | None = None) -> float:
    permutations = equinorm.permutations(model, args, kwargs)
    before = copy.deepcopy(model)
    permutations.permute_(permutations.random(torch.Generator().manual_seed(0)))
    return equinorm.deviation(model, before, args, kwargs)


@pytest.mark.parametrize("name", list(CASES) if IS_WHOLE else list(CASES)[:: max(1, len(CASES) // MANY)])
def test_small_networks(name):
    model = copy.deepcopy(CASES[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    assert deviation(model, INPUTS[name]) <= LIMIT


if importlib.util.find_spec("timm") is not None and importlib.util.find_spec("torchvision") is not None:
    from vision_blocks.blocks import drawn
    from vision_blocks.from_timm import TIMM
    from vision_blocks.from_torchvision import TORCHVISION

    from zoo.__main__ import randomise_, staying_double

    ALL = {f"timm {name}": block for name, block in TIMM.items()} | {f"torchvision {n}": b for n, b in TORCHVISION.items()}

    @pytest.mark.parametrize("name", ALL if IS_WHOLE else [name for name in BLOCKS if name in ALL])
    def test_blocks_of_vision_models(name):
        torch.manual_seed(0)
        made = ALL[name].made().double()
        randomise_(made)
        args = pytree.tree_map(_double, tuple(drawn(arg) for arg in ALL[name].args))
        with staying_double():
            assert deviation(made, args) <= LIMIT


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", MODELS)
def test_language_models(name):
    from zoo.__main__ import build, outputs, staying_double

    with staying_double(), torch.no_grad():
        model, args, kwargs = build("transformers", name)
        before = outputs(model, args, kwargs, seed=0)[0]
        permutations = equinorm.permutations(model, args, kwargs)
        permutations.permute_(permutations.random(torch.Generator().manual_seed(0)))
        assert float((outputs(model, args, kwargs, seed=0)[0] - before).abs().max()) <= LIMIT * float(before.abs().max())
        assert permutations.num_families == 9  # the stream; of both layers heads, heads that share keys, values, gates
