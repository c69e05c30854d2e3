"""What is told about a network: pins with their lines, families, roles, depths, unused tensors."""

import torch
from exactness import X, two_layers
from torch import Tensor, nn

import equinorm


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(torch.nn.functional.gelu(hidden))  # the line that pins


def test_pins_name_operation_and_source_line():
    symmetries = equinorm.symmetries(Smooth().double(), X)
    (pin,) = [pin for pin in symmetries.pins if pin.tensor == "up.weight"]
    assert pin.channels == 6
    assert pin.reason.operation == "aten.gelu"
    assert pin.reason.source.startswith("test_description.py:")
    assert "the line that pins" in pin.reason.code
    assert str(pin.reason) in str(symmetries)


def test_families_and_text():
    symmetries = equinorm.symmetries(two_layers(), X)
    assert [(f.tensor, f.axis, f.ids) for f in symmetries.families] == [("0.weight", 0, range(1, 7))]
    text = str(symmetries)
    assert "6 free scale classes" in text
    assert "2.weight [3, 6]: axis 1 ÷ 0.weight[0]" in text
    assert symmetries.coverage == (24 + 6 + 18) / (24 + 6 + 18 + 3)


class Tables(nn.Module):
    """Tokens that indices choose, of places only the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Parameter(torch.randn(11, 4)), nn.Parameter(torch.randn(9, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.tokens[index] + self.places[: index.shape[1]])


def test_each_column_of_tables_has_one_class():
    symmetries = equinorm.symmetries(Tables(), torch.randint(0, 11, (2, 5)))
    columns = [(exponent, ids.tolist()) for s in symmetries.scalings for exponent, ids in s.factors]
    assert columns == [(1.0, [[1, 2, 3, 4]]), (1.0, [[1, 2, 3, 4]]), (-1.0, [[1, 2, 3, 4]])]
    assert "places [9, 4]: axis 1 × tokens[1]\n" in str(symmetries)


def test_roles_and_depths():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).double().eval()
    scalings = {s.name: (s.role, s.depth) for s in equinorm.symmetries(net, torch.randn(1, 3, 8, 8).double()).scalings}
    assert scalings["0.weight"] == ("weight", 1)
    assert scalings["0.bias"] == ("bias", 1)
    assert scalings["1.weight"] == ("weight", 2)
    assert scalings["1.bias"] == ("bias", 2)
    assert scalings["4.weight"] == ("weight", 3)


def test_unused_parameters_are_listed():
    net = two_layers()
    net.spare = nn.Linear(2, 5).double()
    net.forward = lambda x: net[2](net[1](net[0](x)))
    pins = {pin.tensor: (pin.channels, str(pin.reason)) for pin in equinorm.symmetries(net, X).pins}
    assert pins["spare.weight"] == pins["spare.bias"] == (5, "no operation (the graph does not use it)")
