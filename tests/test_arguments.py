"""What is no argument of that kind is refused in words, and shares are not rounded to all or nothing."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import equinorm
from equinorm import BalanceError, EquinormError, RescaleError
from equinorm._display import needed, percent
from equinorm.reporting import words


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4)


WRONG = {
    "a string": "abc",
    "bytes": b"abc",
    "strings": ["a", "b", "c"],
    "ragged": [[1.0], 2.0, 3.0],
    "a number": 3,
    "None": None,
    "meta": torch.zeros(3, device="meta"),
    "sparse": torch.ones(3).to_sparse(),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "booleans": torch.ones(3, dtype=torch.bool),
    "objects": np.array([object()] * 3),
    "no numbers": torch.tensor([0.0, float("nan"), 1.0]),
    "another shape": torch.zeros(2),
}


@pytest.mark.parametrize("kind", WRONG)
def test_log_scales_of_another_kind(kind):
    net, inputs = network()
    before = copy.deepcopy(net)
    symmetries = equinorm.symmetries(net, inputs)
    with pytest.raises(RescaleError, match="log_scales must"):
        symmetries.rescale_(WRONG[kind])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("make", [list, tuple, np.asarray, torch.tensor])
def test_log_scales_in_every_form(make):
    net, inputs = network()
    before = net[0].weight.detach().clone()
    equinorm.symmetries(net, inputs).rescale_(make([0, 1, 2]), power_of_two=False)
    torch.testing.assert_close(net[0].weight.detach(), before * torch.tensor([0.0, 1.0, 2.0]).exp()[:, None])
    scaling = equinorm.symmetries(net, inputs).scalings[0]
    torch.testing.assert_close(scaling.log_scales(make([0, 1, 2])), torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(4, 3).state_dict(), "not OrderedDict. A state dict holds weights without their network"),
        (nn.Linear, "not type. That is a class: make one of it"),
        ("my-llama", "not str. Load it first"),
        (np.tanh, "not ufunc. Wrap what it computes in a module's forward"),
    ],
)
def test_what_is_no_model(model, words):
    x = torch.randn(2, 4)
    calls = equinorm.symmetries, equinorm.balance, equinorm.permutations, equinorm.equalize, equinorm.canonical
    for call in (*calls, equinorm.quantization.prepare, lambda model, x: equinorm.deviation(model, nn.Linear(4, 3), x)):
        with pytest.raises(EquinormError, match=f"must be a torch.nn.Module, {re.escape(words)}"):
            call(model, x)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        (
            (),
            {},
            "inputs (): TypeError: Sequential.forward() missing 1 required positional argument: 'input'. Give example inputs",
        ),
        ((2, 4), {}, "Give tensors, such as torch.randn(2, 4), not their shape."),
        ((torch.ones(2, 4, device="meta"),), {}, "The model is in cpu and its inputs in meta: bring both to one device."),
        ((torch.ones(2, 9),), {}, "and its forward takes (input)."),
        ((), {"x": torch.ones(2, 4)}, "unexpected keyword argument 'x'. It is called as model(*args, **kwargs)"),
    ],
)
def test_what_to_give_to_a_model_that_does_not_run(args, kwargs, words):
    with pytest.raises(equinorm.ExportError, match=re.escape(words)):
        equinorm.symmetries(network()[0], args, kwargs)


def test_dtypes_that_do_not_meet():
    net, inputs = network()
    with pytest.raises(equinorm.EquivalenceError, match=r"in float64 and its inputs in float32: bring both to one dtype\."):
        equinorm.deviation(net, copy.deepcopy(net).double(), inputs)


def test_the_optimizer_comes_first():
    net, inputs = network()
    with pytest.raises(RescaleError, match=r"not Sequential\. The optimizer comes before the model\."):
        equinorm.ENorm(net, torch.optim.SGD(net.parameters(), lr=0.1), inputs)


@pytest.mark.parametrize(
    ("also", "words"),
    [
        (3, "also must be a list of further inputs, not int"),
        ("x", "also must be a list of further inputs, not str"),
        (torch.randn(2, 4), r"For one: also=\[...\], around this Tensor"),
        ({"input": torch.randn(2, 4)}, r"For one: also=\[...\], around this dict"),
        ([3], "must hold further inputs .*, not int"),
        (None, "not NoneType"),
    ],
)
def test_further_inputs_of_another_kind(also, words):
    net, inputs = network()
    with pytest.raises(EquinormError, match=words):
        equinorm.symmetries(net, inputs, also=also)


def test_one_further_input():
    net, inputs = network()
    for also in ([torch.randn(5, 4)], ((torch.randn(5, 4),),), [{"input": torch.randn(3, 4)}][:0]):
        assert equinorm.symmetries(net, inputs, also=also).num_free == 3


def test_progress_is_called():
    net, inputs = network()
    with pytest.raises(BalanceError, match="progress must be a function of a cycle's number and residual, not 3"):
        equinorm.symmetries(net, inputs).balance(progress=3)


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (203_520, 203_530, "> 99.9%"),
        (203_530, 203_530, "100.0%"),
        (10, 203_530, "< 0.1%"),
        (0, 203_530, "0.0%"),
        (0, 0, "0.0%"),
        (1, 3, "33.3%"),
        (-1, 1000, "-0.1%"),
    ],
)
def test_shares(part, whole, shown):
    assert percent(part, whole) == shown
    assert not whole or words.percent(part, whole) == shown.replace("%", " %")


def test_all_but_a_few_is_not_all():
    net = nn.Sequential(nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 2))
    symmetries = equinorm.symmetries(net, torch.randn(1, 400))
    assert "> 99.9% of the parameters move" in str(symmetries)
    assert "100.0% of the parameters move" in str(
        equinorm.symmetries(nn.Sequential(*net[:2], nn.Linear(500, 2, bias=False)), torch.randn(1, 400))
    )


def test_names_that_changed_are_quoted():
    net, inputs = network()
    symmetries = equinorm.symmetries(net, inputs)
    net.add_module("3", nn.ReLU())
    with pytest.raises(RescaleError, match=r"^'3' in the model itself was added, removed or replaced"):
        symmetries.rescale_(torch.zeros(3))
    net, inputs = network()
    symmetries = equinorm.symmetries(net, inputs)
    net[1].__class__ = nn.Tanh
    with pytest.raises(RescaleError, match=r"^its class in module '1' of the model was added, removed or replaced"):
        symmetries.rescale_(torch.zeros(3))


@pytest.mark.parametrize("call", [equinorm.symmetries, equinorm.balance_])
def test_exported_programs_are_told_what_to_do(call):
    net, inputs = network()
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    with pytest.raises(EquinormError, match=r"not ExportedProgram\. Give its \.module\(\)"):
        call(torch.export.export(net, inputs), inputs)


@pytest.mark.parametrize("call", [equinorm.symmetries, equinorm.permutations, equinorm.equalize])
def test_inputs_by_name_are_told_where_they_go(call):
    net, inputs = network()
    with pytest.raises(EquinormError, match=r"a tuple of inputs, not dict\. Give inputs by name as the next argument"):
        call(net.eval(), {"input": inputs})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.zeros(2, 4), "data must be batches of positional inputs, not Tensor. For one: [x]."),
        ([], "data hold no batch"),
        ([torch.zeros(2, 4), {"input": torch.zeros(2, 4)}], "data batch 1 must be a tuple of inputs, not dict."),
    ],
)
def test_data_of_another_kind(data, words):
    net, x = network()
    with pytest.raises(equinorm.EquivalenceError) as caught:
        equinorm.align(net, copy.deepcopy(net), x, data=data)
    assert str(caught.value).startswith(words)
    assert "kwargs" not in str(caught.value)  # a batch has none


@pytest.mark.parametrize(
    ("module", "lacking"), [("no_such.part", "no_such, which is not installed"), ("json.no_such", "a newer json")]
)
def test_what_is_to_be_installed(module, lacking):
    with pytest.raises(equinorm.PermutationError) as caught:
        needed(module, "tests need", "test", equinorm.PermutationError)
    assert str(caught.value) == f"tests need {lacking}: pip install 'equinorm[test]'."


def test_an_optimizer_of_another_model_is_refused():
    net, inputs = network()
    optimizer = torch.optim.Adam(copy.deepcopy(net).parameters())
    symmetries, permutations = equinorm.symmetries(net, inputs), equinorm.permutations(net, inputs)
    before = copy.deepcopy(net.state_dict())
    calls = (
        lambda: symmetries.rescale_(torch.ones(3), optimizer),
        lambda: symmetries.balance().apply_(optimizer),
        lambda: symmetries.balance().plan().apply_(net, optimizer),
        lambda: permutations.permute_({"0.weight[0]": torch.tensor([2, 0, 1])}, optimizer),
    )
    for call in calls:
        with pytest.raises(RescaleError, match="Adam holds no parameter of Sequential"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    symmetries.rescale_(torch.ones(3), torch.optim.Adam(net[2].parameters()))  # one of a part may leave the rest


def test_a_seed_is_no_generator():
    net, inputs = network()
    with pytest.raises(EquinormError, match=r"generator must be .* not 0\. For a seed"):
        equinorm.permutations(net, inputs).random(0)


def test_warnings_name_the_line_of_the_caller():
    head, inputs = network()
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), *head).eval()
    net[:2].requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen parameters stay") as told:
        hook = equinorm.ENorm(torch.optim.SGD(net.parameters(), lr=0.1), net, inputs)
    assert told[0].filename == __file__
    hook.remove()
    for call in (equinorm.balance, equinorm.balance_):
        with pytest.warns(UserWarning, match=r"'1' \(batch normalization\) will be folded") as told:
            call(net, inputs, p=float("inf"))
        assert told[0].filename == __file__


def test_a_network_without_parameters_of_its_own():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 3), nn.Linear(3, 2)]

        def forward(self, x):
            return self.layers[1](self.layers[0](x).relu())

    assert "only in an nn.ModuleList" in str(equinorm.balance_(Listed(), torch.randn(2, 4)))


def test_infinity_as_text_is_told_how_to_write_it():
    net, inputs = network()
    with pytest.raises(BalanceError, match=r"write math\.inf"):
        equinorm.balance_(net, inputs, p="inf")
