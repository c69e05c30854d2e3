"""Preparing for quantization: folding and freeing are exact, what cannot be done is left and said, and bounds go back."""

import copy
import math
import warnings

import pytest
import torch
from graph_values import apart
from normalized_networks import Net, trained
from oracle import verdict
from torch import Tensor, nn
from torch.nn import functional as F

import equinorm
from equinorm.quantization import Clamp, prepare, settle_
from equinorm.quantization.prepare import Preparation


@pytest.fixture(scope="module")
def images() -> tuple[Tensor]:
    return (3 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def net_of(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return trained(nn.Sequential(*modules))


def test_a_network_with_some_of_everything(images):
    torch.manual_seed(0)
    net = trained(Net())
    before = copy.deepcopy(net.state_dict())
    prepared, found = prepare(net, images)
    assert dict(found.folded) == {"n1": "c1", "n2": "c2, c3", "n3": "c5", "n5": "f2"}
    assert dict(found.freed) == {"a1": 8, "a2": 8}
    assert next(iter(found.left)) == "n4"
    assert found.left["n4"] == "aten.relu stands beside it, not a layer; c7 behind it pads with zeros"
    assert [name.split(" at ")[0] for name in list(found.left)[1:]] == ["aten.relu6"]
    assert found.deviation == equinorm.deviation(net, prepared, images) <= 1e-12
    assert [type(part) for part in (prepared.n1, prepared.n2, prepared.a1)] == [nn.Identity, nn.Identity, Clamp]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert str(found).startswith("Net: 4 batch normalizations folded, 2 bounded activations set free, 2 left; deviation ")
    assert "  a2 set free: 8 bounds" in str(found)
    assert "<th>set free</th>" in found._repr_html_()

    symmetries = equinorm.symmetries(prepared, images)
    assert symmetries.num_free == 38 > equinorm.symmetries(net, images).num_free == 27
    symmetries.rescale_(torch.randn(38, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert equinorm.deviation(net, prepared, images) <= 1e-12
    assert len(prepared.a1.upper.unique()) == 8
    assert settle_(prepared) == 2


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(2, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 9)),
        (nn.Conv3d(2, 6, 3, bias=False), nn.BatchNorm3d(6), (2, 4, 4, 4)),
        (nn.ConvTranspose2d(2, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), (4, 5)),
        (nn.Linear(2, 6), nn.BatchNorm1d(6, affine=False), (2,)),
    ],
)
def test_layers_in_front(layer, norm, shape):
    net, args = net_of(layer, norm, nn.ReLU()), (torch.randn(3, *shape, dtype=torch.float64),)
    prepared, found = prepare(net, args)
    assert dict(found.folded) == {"1": "0"}
    assert found.deviation <= 1e-14
    if isinstance(layer, nn.Conv3d):  # where PyTorch can, it gives the same
        fused = nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])
        torch.testing.assert_close(prepared[0].state_dict(), fused.state_dict(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(4), (4, 9)),
        (nn.Conv3d(4, 6, 3, padding="valid"), nn.BatchNorm3d(4), (4, 4, 4, 4)),
        (nn.Linear(4, 6), nn.BatchNorm1d(4, affine=False), (4,)),
    ],
)
def test_layers_behind(layer, norm, shape):
    net, args = net_of(nn.ReLU(), norm, layer), (torch.randn(3, *shape, dtype=torch.float64),)
    _, found = prepare(net, args)
    assert dict(found.folded) == {"1": "2"}
    assert found.deviation <= 1e-14


class NormAndMore(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Left(nn.Module):
    """A normalization behind a convolution, and something in the way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.c, self.d, self.n = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        if way == "subclass":
            self.n = type(
                "NormAndMore", (nn.BatchNorm2d,), {"forward": lambda self, x: nn.BatchNorm2d.forward(self, x).relu()}
            )(3)
        if way == "shared":
            self.d.weight = self.c.weight
        if way == "normed":
            nn.utils.parametrizations.weight_norm(self.c)
        if way == "joined":
            self.n = nn.BatchNorm2d(6)
        if way == "hook":
            self.n.register_forward_hook(lambda module, args, result: result * 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        h = self.c(x)
        if self.way == "twice":
            h = self.c(h)
        if self.way == "functional":
            h = F.conv2d(x, self.c.weight, self.c.bias, padding=1)
        y = self.n(torch.cat([h, h], 1) if self.way == "joined" else h)
        if self.way == "again":
            y = self.n(self.d(y))
        if self.way == "read":
            y = y + h
        if self.way == "shared":
            y = self.d(y)
        return (y, h) if self.way == "returned" else y.relu()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(8, 6), (2, 6, 8)), (nn.Conv1d(3, 6, 1), (3, 6))],
    ids=["a sequence", "no batch"],
)
def test_channels_along_another_axis_are_left(layer, shape):
    """As many as it normalizes, but not those."""
    net, args = net_of(layer, nn.BatchNorm1d(6), nn.ReLU()), (torch.randn(shape, dtype=torch.float64),)
    prepared, found = prepare(net, args)
    assert found.left["1"].startswith("0 has its channels along another axis")
    assert equinorm.deviation(net, prepared, args) == 0.0


@pytest.mark.parametrize("limit", ["1e-5", math.nan, -1.0, True])
def test_limits_are_numbers(limit):
    with pytest.raises(equinorm.EqualizeError, match="limit must be None or a number from 0"):
        prepare(net_of(nn.Linear(8, 6)), torch.randn(2, 8, dtype=torch.float64), limit=limit)


def test_weights_that_are_buffers_are_left():
    net, args = net_of(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()), (torch.randn(2, 8, dtype=torch.float64),)
    weight = net[0].weight.detach()
    del net[0].weight
    net[0].register_buffer("weight", weight)
    _, found = prepare(net, args)
    assert found.left["1"].startswith("the weight of 0 is computed or shared")


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("subclass", "its class, NormAndMore, may do more than normalize"),
        ("hook", "hooks run with it"),
        ("twice", "c is used more than once"),
        ("functional", "beside it is no module"),
        ("again", "the graph calls it 2 times"),
        ("read", "more than one reads conv2d, in front of it"),
        ("returned", "more than one reads conv2d, in front of it; the model returns it"),
        ("shared", "c is used more than once; d is used more than once"),
        ("normed", "the weight of c is computed or shared"),
        ("joined", "one layer in front is joined with itself"),
    ],
)
def test_normalizations_that_are_left(way, why):
    torch.manual_seed(0)
    net, args = trained(Left(way)), (torch.randn(2, 3, 6, 6, dtype=torch.float64),)
    prepared, found = prepare(net, args)
    assert not found.folded
    assert why in found.left["n"]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), prepared.state_dict().values(), strict=True))


def test_normalizations_of_timm_leave_the_activations_that_they_run(images):
    norm_act = pytest.importorskip("timm.layers.norm_act")

    class Mine(norm_act.BatchNormAct2d):
        pass

    norms = norm_act.BatchNormAct2d(4, act_layer=nn.ReLU6), norm_act.BatchNormAct2d(4, apply_act=False), Mine(3)
    convolutions = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 3, 3, bias=False)
    net = net_of(*(part for pair in zip(convolutions, norms, strict=True) for part in pair))
    prepared, found = prepare(net, images)
    assert dict(found.folded) == {"1": "0", "3": "2"}
    assert dict(found.freed) == {"1.act": 4}
    assert list(found.left) == ["5"]
    assert "its class, Mine, may do more than normalize: prepare torch.export.export(model, args)" in found.left["5"]
    assert found.deviation <= 1e-12
    assert not any("running_mean" in name for name in prepared.state_dict() if not name.startswith("5"))


def test_what_was_done_fits_a_screen(images):
    names = [f"blocks.{number}" for number in range(60)]
    many = Preparation(
        "Net", dict.fromkeys(names, "conv"), dict.fromkeys(names, 8), dict.fromkeys(names, "hooks run with it"), 0.0
    )
    lines = str(many).splitlines()
    assert len(lines) == 18
    assert lines[8] == "  … and 53 more in folded"
    assert lines[-1] == "  blocks.0, blocks.1, blocks.2, blocks.3 and 56 more modules left: hooks run with it"


def test_clamps_are_bitwise_what_they_were_and_by_powers_of_two_stay_so():
    net = net_of(nn.Linear(3, 5), nn.ReLU6(), nn.Linear(5, 4), nn.Hardtanh(-0.5, 0.25), nn.Linear(4, 2)).float()
    args = (20 * torch.randn(64, 3),)
    prepared, found = prepare(net, args)
    assert found.deviation == 0
    assert found.freed == {"1": 5, "3": 4}
    symmetries = equinorm.symmetries(prepared, args)
    counted = {s.name: s.kind for s in symmetries.scalings if s.factors}
    assert [name for name, kind in counted.items() if kind == "buffer"] == ["1.upper", "3.lower", "3.upper"]
    energy = sum(float(layer.weight.detach().square().sum()) for layer in net[::2])
    assert symmetries.balance().norm_before == pytest.approx(energy**0.5), "bounds count in no norm"
    symmetries.rescale_(torch.arange(-4.0, 5.0) * math.log(2))
    assert torch.equal(prepared(*args), net(*args))
    assert not torch.equal(prepared[3].lower, -prepared[3].upper)


def test_clamps_against_derivatives_and_their_values_against_numbers():
    net, args = net_of(nn.Linear(2, 3), nn.Hardtanh(-0.5, 0.5), nn.Linear(3, 2)), (torch.randn(2, 2, dtype=torch.float64),)
    prepared, _ = prepare(net, args)
    result = verdict(copy.deepcopy(prepared), args, buffers=["1.lower", "1.upper"])
    assert result.residual < 1e-10
    assert result.dimension == result.found == result.num_free == 3
    assert max(apart(prepared, args).values()) <= 1e-12


def test_what_settles_goes_back():
    net, args = (
        net_of(nn.Linear(2, 3), nn.ReLU6(), nn.Linear(3, 2), nn.Hardtanh(), nn.Linear(2, 1)),
        (torch.randn(9, 2).double(),),
    )
    prepared, _ = prepare(net, args)
    moved = copy.deepcopy(prepared)
    assert settle_(prepared) == 0
    assert [str(prepared[1]), str(prepared[3])] == ["ReLU6()", "Hardtanh(min_val=-1.0, max_val=1.0)"]
    equinorm.symmetries(moved, args).rescale_(torch.tensor([1.0, 1, 1, 0, 1]))
    assert settle_(moved) == 1
    assert str(moved[1]) == f"Hardtanh(min_val=0.0, max_val={6 * math.e})"
    assert equinorm.deviation(moved, net, args) <= 1e-12


def test_settled_clamps_stay_and_are_set_free_again():
    net, args = net_of(nn.Linear(2, 3), nn.ReLU6(), nn.Linear(3, 2)), (9 * torch.randn(99, 2, dtype=torch.float64),)
    prepared, _ = prepare(net, args)
    before = equinorm.symmetries(prepared, args)
    before.rescale_(torch.tensor([0.5, 1.0, 2.0]))
    state = copy.deepcopy(prepared.state_dict())
    assert settle_(prepared) == 1
    assert float(prepared[0](args[0]).detach().max()) > prepared[1].most == 6 * math.exp(2)
    with pytest.raises(equinorm.EquinormError, match="'1'"):  # its bound for all would not follow
        before.rescale_(torch.ones(3))
    assert equinorm.symmetries(prepared, args).num_free == 0
    again, _ = prepare(prepared, args)
    equinorm.symmetries(again, args).rescale_(torch.tensor([1.0, 2.0, 3.0]))
    assert equinorm.deviation(again, net, args) <= 1e-12
    settle_(again)
    again.load_state_dict(state)  # of smaller bounds, then of larger ones
    assert again[1].most == prepared[1].most
    assert max(equinorm.deviation(model, net, args) for model in (prepared, again)) <= 1e-12


class Calls(nn.Module):
    """One ReLU6 for two layers, of as many channels or of others."""

    def __init__(self, second: int, inplace: bool = False) -> None:
        super().__init__()
        self.up, self.across, self.down = nn.Linear(3, 4), nn.Linear(4, second), nn.Linear(second, 2)
        self.act, self.inplace = nn.ReLU6(inplace), inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y = self.down(self.act(self.across(self.act(h))))
        return y + h.sum() if self.inplace else y


def test_one_activation_called_twice():
    torch.manual_seed(0)
    args = (9 * torch.randn(7, 3, dtype=torch.float64),)
    prepared, found = prepare(Calls(4).double().eval(), args)
    assert found.freed == {"act": 4}
    before, symmetries = copy.deepcopy(prepared), equinorm.symmetries(prepared, args)
    assert symmetries.num_free == 4  # the two layers are tied
    symmetries.rescale_(torch.randn(4))
    assert equinorm.deviation(before, prepared, args) <= 1e-12
    _, found = prepare(Calls(5).double().eval(), args)
    assert found.left["act"].startswith(
        "it is called 2 times, on other channels: give each call a module of its own, or prepare"
    )


def test_what_an_activation_changes_in_place_and_others_read_is_left():
    torch.manual_seed(0)
    _, found = prepare(Calls(4, inplace=True).double().eval(), (torch.randn(7, 3, dtype=torch.float64),))
    assert not found.freed
    assert "act" in found.left


def test_activations_that_are_left():
    net = net_of(nn.ReLU6(), nn.Linear(3, 3), nn.ReLU6(), nn.Sigmoid())
    net[2].register_forward_hook(lambda module, args, result: result + 1)
    _, found = prepare(net, torch.randn(2, 3).double())
    assert found.left == {"0": "nothing that it bounds can scale", "2": "hooks run with it"}


def test_refusals():
    net, args = net_of(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(5, 3).double(),)
    with pytest.raises(equinorm.EqualizeError, match=r"deviates by .* more than 1e-30: 1 batch normalizations"):
        prepare(net, args, limit=1e-30)
    net[1].train()
    with pytest.raises(equinorm.EqualizeError, match="Sequential is in training mode, as 1, and what is quantized"):
        prepare(net, args)
    with pytest.raises(equinorm.EqualizeError, match=r"must be a torch\.nn\.Module, not int"):
        prepare(3, args)
    assert isinstance(prepare(net.eval(), args, fold=False)[0][1], nn.BatchNorm1d)


def test_least_maximum_warns_of_batch_normalization():
    net, args = net_of(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(5, 3).double(),)
    with pytest.warns(
        UserWarning, match="^'1' .batch normalization. will be folded .* Fold first: equinorm.quantization.prepare"
    ):
        equinorm.symmetries(net, args).balance(p=math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equinorm.symmetries(net, args).balance(p=2)
        equinorm.symmetries(prepare(net, args)[0], args).balance(p=math.inf)
