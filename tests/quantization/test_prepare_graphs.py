"""Preparing graphs of torch.fx and torch.export, modules in several places, and what is changed in place and read again."""

import copy
import math

import pytest
import torch
from normalized_networks import Net, trained
from torch import Tensor, fx, nn
from torch.nn import functional as F

import equinorm
from equinorm.quantization import Clamp, prepare, settle_


@pytest.fixture(scope="module")
def images() -> tuple[Tensor]:
    return (3 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def exported(net: nn.Module, args: tuple, **options) -> fx.GraphModule:
    return torch.export.export(net, args, **options).module()


def moved_apart(prepared: nn.Module, net: nn.Module, args: tuple) -> tuple[int, float]:
    """How many scales are free, and the deviation once they are random."""
    symmetries = equinorm.symmetries(prepared, args)
    symmetries.rescale_(torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return symmetries.num_free, equinorm.deviation(net, prepared, args)


def test_an_exported_graph_is_prepared_as_its_module_is_and_functions_too(images):
    torch.manual_seed(0)
    net = trained(Net())
    graph = exported(net, images)
    code, names = graph.code, [name for name, _ in graph.named_parameters()]
    prepared, found = prepare(graph, images)
    of_modules, as_modules = prepare(net, images)
    assert found.folded == as_modules.folded
    assert found.freed == {"a1": 8, "a2": 8, "relu6": 5}
    assert found.left.keys() == {"n4"}
    assert found.deviation <= 1e-12
    assert (graph.code, [name for name, _ in graph.named_parameters()]) == (code, names)
    assert dict(prepared.named_parameters()).keys() == dict(of_modules.named_parameters()).keys()
    assert sum("batch_norm" in str(node.target) for node in prepared.graph.nodes) == 1
    assert sum(
        node.op == "call_module" and "Clamp" in str(prepared.get_submodule(node.target)) for node in prepared.graph.nodes
    )
    free, apart = moved_apart(prepared, net, images)
    assert free > equinorm.symmetries(of_modules, images).num_free
    assert apart <= 1e-12
    assert settle_(prepared) == 3


class Functions(nn.Module):
    """One-sided bounds, methods, and a module for several calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width + 1) for width in range(3, 10))
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        bounds = [self.act, lambda h: h.clamp(max=2), lambda h: torch.clamp(h, min=-1), self.act]
        bounds += [lambda h: F.hardtanh(h, -2.0, 0.0), lambda h: F.relu6(h, inplace=True)]
        for layer, bound in zip(self.layers, bounds, strict=False):
            x = bound(layer(x))
        return self.layers[-1](x).clamp(0, 1)


@pytest.mark.parametrize("trace", ["export", "fx"])
def test_bounds_of_every_form(trace):
    torch.manual_seed(0)
    net, args = Functions().double().eval(), (9 * torch.randn(64, 3, dtype=torch.float64),)
    graph = exported(net, args) if trace == "export" else fx.symbolic_trace(net).eval()
    prepared, found = prepare(graph, args)
    assert sorted(found.freed.values()) == [4, 5, 6, 7, 8, 9]
    assert list(found.left.values()) == ["nothing that it bounds can scale"]
    assert found.deviation == 0.0
    clamps = [part for part in prepared.modules() if isinstance(part, Clamp)]
    assert sorted(len([*clamp.buffers()]) for clamp in clamps) == [1] * 6
    free, apart = moved_apart(prepared, net, args)
    assert free == 39
    assert apart <= 1e-12
    assert len(set(clamps[0].get_buffer("upper").tolist())) > 1


def test_powers_of_two_change_no_bit_of_a_graph():
    torch.manual_seed(0)
    net, args = Functions().eval(), (9 * torch.randn(64, 3),)
    prepared, _ = prepare(exported(net, args), args)
    equinorm.symmetries(prepared, args).rescale_((torch.arange(39.0) % 9 - 4) * math.log(2))
    assert torch.equal(prepared(*args), net(*args))


def test_a_graph_in_which_nothing_can_be_done_stays_as_it_is():
    net, args = nn.Sequential(nn.Sigmoid(), nn.ReLU6(), nn.Linear(3, 3), nn.BatchNorm1d(3)), (torch.randn(4, 3),)
    net[3].weight.data[0] = 2.0
    graph = exported(net.eval(), args)
    prepared, found = prepare(graph, args, fold=False)
    assert (found.freed, found.left) == ({}, {"1": "nothing that it bounds can scale"})
    assert prepared.code.split("def forward")[1] == graph.code.split("def forward")[1]


def test_a_graph_exported_in_training_mode_is_refused():
    args = (torch.randn(4, 3),)
    graph = exported(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).train(), args)
    with pytest.raises(equinorm.EqualizeError, match="is in training mode, as batch_norm"):
        prepare(graph, args)


def test_an_exported_graph_is_equalized(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU6(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[1].weight.mul_((2 * torch.randn(16)).exp())
    x = torch.randn(32, 8)
    sizes = {"dynamic": ({0: torch.export.Dim.DYNAMIC},), "fixed": None}
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=sizes["dynamic"]), tmp_path / "net.pt2")
    for graph in (torch.export.load(tmp_path / "net.pt2").module(), exported(net, (x,))):
        found = equinorm.equalize(graph, (x,), calibration=[(x,)], scheme="w8a8-tensor")
        assert found.measured_after > found.measured_before + 1
        assert equinorm.deviation(found.model, net, (x,)) <= 1e-5
        assert {point.weight for point in found.points} == {"0.weight", "3.weight"}


class Shared(nn.Module):
    """One ReLU6 under three names."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU6()
        self.first, self.second = nn.Sequential(nn.Linear(3, 4), act), nn.Sequential(nn.Linear(4, 5), act)
        self.act, self.last = act, nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.last(self.second(self.first(x))))


def test_one_module_under_several_names_becomes_one_for_each():
    torch.manual_seed(0)
    net, args = Shared().double().eval(), (9 * torch.randn(7, 3, dtype=torch.float64),)
    prepared, found = prepare(net, args)
    assert found.freed == {"first.1": 4, "second.1": 5}
    assert found.left == {"act": "nothing that it bounds can scale"}
    assert prepared.act is not prepared.first[1]
    assert isinstance(prepared.act, nn.ReLU6)
    free, apart = moved_apart(prepared, net, args)
    assert free == 9
    assert apart <= 1e-12


class Again(nn.Module):
    """A bound in place whose input is read again, as it is or as a view, after the bound or before."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up, self.down, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.fine, self.act = nn.ReLU6(inplace=True), nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.down(self.fine(self.up(x)))
        view = h.view(-1, 2, 2)
        if self.way == "before":
            view = view + 1
        y = self.act(h)
        if self.way == "returned":
            return self.out(y), h
        return self.out(y) + self.out({"itself": h, "a view": view.flatten(1), "before": view.flatten(1)}[self.way])


@pytest.mark.parametrize(("way", "within"), [("itself", True), ("a view", False), ("returned", False), ("before", True)])
def test_what_is_changed_in_place_and_read_again_is_left_alone(way, within):
    """Also where the example's numbers do not show it."""
    torch.manual_seed(0)
    net, args = Again(way).double().eval(), (9 * torch.randn(7, 3, dtype=torch.float64),)
    if within:
        net.down.weight.data.abs_().mul_(0.01)
        net.down.bias.data.fill_(1.0)
    prepared, found = prepare(net, args)
    assert found.freed["fine"] == 4
    if way == "before":
        assert "act" in found.freed or found.left["act"] == "nothing that it bounds can scale"
    else:
        assert found.left["act"].startswith("it changes in place what is read again: inplace=False")
    other = (90 * torch.randn(7, 3, dtype=torch.float64),)
    assert equinorm.deviation(net, prepared, other) <= 1e-12
    assert moved_apart(prepared, copy.deepcopy(net), other)[1] <= 1e-12


class Idle(nn.Module):
    """A layer whose first call nothing reads, as data of other channels would show; and a table that is a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.layer, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 5)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        self.layer(h)
        return self.head(self.layer(self.up(h).relu()))


def test_calls_that_nothing_reads_shift_no_other():
    torch.manual_seed(0)
    net, x = Idle().eval(), torch.randint(0, 5, (2, 4))
    found = equinorm.equalize(net, x, calibration=[x])
    assert [(p.name, p.weight, p.scaling.name) for p in found.points] == [
        ("up", "up.weight", "embedding"),
        ("layer (call 2)", "layer.weight", "relu"),
        ("table", "table.weight", "linear_2"),
    ]
    assert {tensor.name for tensor in found.tensors if tensor.kind == "weight"} == {point.weight for point in found.points}


class Undecided(Idle):
    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        self.layer(h)
        return self.head(self.layer(self.up(h).relu()).detach())


def test_calls_that_cannot_be_told_apart_are_refused():
    net, x = Undecided().eval(), torch.randint(0, 5, (2, 4))
    with pytest.raises(equinorm.EqualizeError, match="layer is called 2 times, and the outputs depend on 1; which"):
        equinorm.equalize(net, x, calibration=[x])


def test_only_bounds_that_are_named_are_set_free():
    torch.manual_seed(0)
    net, args = Functions().double().eval(), (9 * torch.randn(64, 3, dtype=torch.float64),)
    graph = exported(net, args)
    _, found = prepare(graph, args, free=["relu6_", "clamp*"])
    assert found.freed == {"clamp": 5, "clamp_1": 6, "relu6_": 9}
    assert found.left["act"] == "it is not among those that were named"
    with pytest.raises(equinorm.EqualizeError, match=r"free='none' is the name of no bounded activation\. These are act, "):
        prepare(graph, args, free="none")
    with pytest.raises(equinorm.EqualizeError, match=r"free='act' is the name of no bounded activation\. There is none\."):
        prepare(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()).double().eval(), args, free=["act"])
    with pytest.raises(equinorm.EqualizeError, match="free must be True, False or names of bounded activations, not 3"):
        prepare(graph, args, free=3)


def test_what_is_quantized_is_refused():
    net, args = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (torch.randn(4, 8),)
    rounded = copy.deepcopy(net)
    rounded[0].__class__ = type("Linear", (nn.Linear,), {"__module__": "torchao.quantization.linear"})
    for function in (prepare, equinorm.equalize, equinorm.equalize_):
        with pytest.raises(equinorm.EqualizeError, match=r"^0 \(Linear\) is quantized already. Equalize the float model"):
            function(rounded, args)


class Products(nn.Module):
    """Weights that are stored (in, out) and multiplied as such."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((6, 16), (16, 12), (12, 5), (5, 4))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.weights
        return torch.addmm(self.bias, torch.matmul((x @ a).relu(), other=b).relu(), c).relu().matmul(d)


@pytest.mark.parametrize("scheme", ["w8a8-tensor", "w4g4"])
def test_products_with_weights_are_rounded(scheme):
    torch.manual_seed(0)
    net, x = Products().eval(), torch.randn(32, 6)
    equinorm.symmetries(net, x).rescale_(1.5 * torch.randn(33))
    found = equinorm.equalize(net, x, calibration=[x], scheme=scheme)
    assert [(point.weight, point.is_transposed) for point in found.points] == [(f"weights.{i}", True) for i in range(4)]
    assert found.measured_after > found.measured_before + 10
    assert found.measured_after == pytest.approx(found.noise_after, abs=8)
