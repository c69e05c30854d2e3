"""How values inside a network scale: against numbers, by name, and for what a layer reads and gives."""

import os

import pytest
import torch
from graph_values import apart
from hypothesis import HealthCheck, given, settings
from random_networks.checks import CONDITION, condition
from random_networks.networks import Network, arguments, networks
from small_networks import constants, layers, products
from small_networks.cases import CASES, INPUTS
from torch import Tensor, nn
from torch.nn import functional as F

import equinorm

assert constants
assert layers
assert products  # imported for what they enter into CASES

EXAMPLES = int(os.environ.get("EQUINORM_EXAMPLES", "200"))
EVERY = 1 if EXAMPLES > 200 else 32
"""Every which of the small networks is looked at."""


@pytest.mark.parametrize("name", list(CASES)[::EVERY])
def test_values_scale_as_said(name: str) -> None:
    found = apart(CASES[name], INPUTS[name])
    assert len(found) > 2
    assert max(found.values()) <= 1e-12, found


def test_values_of_random_networks_scale_as_said() -> None:
    seen = {"values": 0}

    @settings(max_examples=EXAMPLES // 15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200)
    @given(networks())
    def holds(network: Network) -> None:
        args = arguments(network, seed=1)
        if not condition(network, args) < CONDITION:
            return
        try:
            found = apart(network, args)
        except (equinorm.ExportError, equinorm.RescaleError):
            return
        seen["values"] += len(found)
        assert max(found.values()) <= 1e-12, found

    holds()
    assert seen["values"] > 20


class Block(nn.Module):
    """Convolutions with and without modules, a concatenation, a region without gradients, and a linear layer by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 5, 3)
        self.weight = nn.Parameter(torch.randn(6, 9, 1, 1))
        self.last = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.first(x), self.second(x)], 1).relu()
        h = F.conv2d(h, self.weight).relu()
        with torch.no_grad():
            h = h * 2.0
        return h.mean((2, 3)) @ self.last


def test_what_layers_read_and_give() -> None:
    torch.manual_seed(0)
    net, args = Block().double(), (torch.randn(2, 3, 6, 6).double(),)
    assert max(apart(net, args).values()) <= 1e-12
    symmetries = equinorm.symmetries(net, args)
    z = torch.randn(symmetries.num_free, dtype=torch.float64)
    scaling = {s.name: s.log_scales(z) for s in symmetries.scalings}
    values = symmetries.values
    (conv,) = values.uses("weight")
    assert (conv.operator, conv.module, conv.shape, conv.source.split(":")[0]) == (
        "aten.conv2d",
        "",
        (2, 6, 4, 4),
        "test_values.py",
    )
    read = values[conv.reads["input"]]
    assert (read.operator, conv.reads["weight"]) == ("aten.relu", "p_weight")
    into, out = read.log_scales_along(1, z), conv.log_scales_along(-3, z)
    torch.testing.assert_close(out[:, None] - into, scaling["weight"][:, :, 0, 0])
    torch.testing.assert_close(into, torch.cat([scaling["first.weight"].flatten(), scaling["second.bias"]]))
    torch.testing.assert_close(out, -scaling["last"].flatten())
    (joined,) = values.readers(values.uses("first.weight")[0].name)
    assert list(joined.reads) == ["tensors[0]", "tensors[1]"]
    (product,) = values.uses("last")
    assert product.scaling is not None
    assert not product.scaling.factors


def test_names_of_values() -> None:
    values = equinorm.symmetries(Block(), (torch.randn(2, 3, 6, 6),)).values
    assert [value.operator for value in values[:2]] == ["parameter", "parameter"]
    assert values["p_first_weight"].tensor == "first.weight"
    assert {value.name for value in values if value.operator == "input"} == {"x"}
    assert "x" in values
    assert len({value.name for value in values}) == len(values) == len(list(values))
    assert any("." in value.name for value in values), "values of the part without gradients"
    with pytest.raises(equinorm.EquinormError, match=r"no value 'nothing'\. Its first values are p_weight, p_last"):
        values["nothing"]
    with pytest.raises(equinorm.EquinormError, match="there is no axis 4"):
        values["x"].log_scales_along(4, torch.zeros(15))
    with pytest.raises(equinorm.EquinormError, match="does not scale along axis 0 alone"):
        values["relu"].log_scales_along(0, torch.zeros(15))


def test_rows_that_data_choose_have_no_one_scale() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.gates = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))

        def forward(self, i: Tensor) -> Tensor:
            return self.table[i] * self.gates[i]

    net, args = Chosen().double(), (torch.tensor([0, 2, 2]),)
    symmetries = equinorm.symmetries(net, args)
    assert symmetries.num_free
    assert any(value.scaling is None for value in symmetries.values)
    assert max(apart(net, args).values()) <= 1e-12


def test_shifted_gains_scale_with_their_offset() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.up = nn.Parameter(0.1 * torch.randn(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x * (1 + 0.5 * self.gain))

    net, args = Shifted().double(), (torch.randn(2, 4).double(),)
    offsets = {value.name: value.scaling.offset for value in equinorm.symmetries(net, args).values if value.scaling}
    assert offsets["p_gain"] == 2.0
    assert {offsets["mul"], offsets["add"]} == {1.0, 0.0}
    assert max(apart(net, args).values()) <= 1e-12


def test_the_mode_is_the_models_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    found = equinorm.symmetries(net, (torch.randn(2, 3, 8, 8),), both_modes=True)
    assert "aten.batch_norm" in {value.operator for value in found.values}
    assert not any(value.operator == "aten.add_" for value in found.values), "training mode counts its batches"
