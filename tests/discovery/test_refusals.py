"""Errors: what was wrong and what to do, for models, inputs, arguments, and models that changed since."""

import copy

import pytest
import torch
from exactness import X, two_layers
from torch import Tensor, nn

import equinorm


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_not_exportable_says_what_to_do():
    net = nn.Sequential(nn.Linear(4, 4), Branching())
    with pytest.raises(equinorm.ExportError, match=r"cannot export Sequential with inputs \(float32\[2, 4\]\)") as error:
        equinorm.symmetries(net, torch.randn(2, 4))
    assert "control flow" in str(error.value)
    assert error.value.cause is not None


def test_wrong_shapes_are_an_export_error():
    with pytest.raises(equinorm.ExportError, match=r"float64\[2, 5\]"):
        equinorm.symmetries(two_layers(), torch.randn(2, 5).double())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: equinorm.symmetries(torch.relu, X), "torch.nn.Module"),
        (lambda: equinorm.symmetries(two_layers(), {"x": X}), "tuple of inputs"),
        (lambda: equinorm.symmetries(two_layers(), X, batch_norm="fused"), "'affine', 'evaluation' or 'statistics'"),
        (lambda: equinorm.symmetries(two_layers(), X, also=[5]), "also must hold further inputs"),
    ],
)
def test_arguments_out_of_range(call, words):
    with pytest.raises(equinorm.EquinormError, match=words):
        call()


def test_arguments_of_the_wrong_kind_are_named():
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 4)
    with pytest.raises(equinorm.EquinormError, match="kwargs must be a dict of keyword inputs, not list"):
        equinorm.symmetries(model, (inputs,), [1])
    with pytest.raises(equinorm.RescaleError, match=r"log_scales must be a tensor of shape \(5,\), not NoneType"):
        equinorm.symmetries(model, (inputs,)).rescale_(None)
    with pytest.raises(equinorm.EquivalenceError, match="args must be a tuple of inputs, not NoneType"):
        equinorm.deviation(model, model, None)


def test_tensors_without_a_shape_are_refused():
    with pytest.raises(equinorm.ExportError, match=r"tensors without a shape yet, as 0\.weight: run it once"):
        equinorm.symmetries(nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)), X.float())


@pytest.mark.parametrize("change", [lambda net: net.append(nn.ReLU()), lambda net: net.__setitem__(1, nn.GELU())])
def test_a_model_that_changed_is_refused(change):
    net = two_layers()
    found = equinorm.symmetries(net, X)
    balance = found.balance()
    found.rescale_(torch.ones(6))  # a rescaling is no change
    change(net)
    with pytest.raises(equinorm.RescaleError, match="since the model was analysed"):
        found.rescale_(torch.ones(6))
    with pytest.raises(equinorm.RescaleError):
        balance.apply_()


def test_parameters_may_be_replaced_by_others_of_their_shapes():
    net = two_layers()
    found = equinorm.symmetries(net, X)
    net.load_state_dict(two_layers().state_dict(), assign=True)
    before = net(X)
    found.rescale_(torch.ones(6))
    assert torch.allclose(net(X), before, rtol=1e-12)


def test_ties_made_later_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    found = equinorm.symmetries(net, X)
    copy.deepcopy(found).rescale_(torch.ones(8))  # a copy has a copied model
    net[2].bias = net[0].bias
    with pytest.raises(equinorm.RescaleError, match="shares its memory"):
        found.rescale_(torch.ones(8))


def test_function_transforms_are_refused_with_a_way_out():
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(torch.relu)(x)

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), Mapped(), nn.Linear(4, 2))
    with pytest.raises(equinorm.ExportError, match=r"torch\.vmap.*opaque"):
        equinorm.symmetries(model, torch.randn(2, 3))
    assert equinorm.symmetries(model, torch.randn(2, 3), opaque="3").num_free == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_told_what_to_give():
    for compiled in (torch.jit.script(two_layers()), torch.jit.trace(two_layers(), X)):
        with pytest.raises(equinorm.ExportError, match=r"keeps no Python to record\. Give the module"):
            equinorm.symmetries(compiled, X)


def test_tensors_of_inference_mode_are_named():
    with torch.inference_mode():
        net, inputs = two_layers(), X.clone()
    for call in ((net, X), (two_layers(), inputs)):
        with pytest.raises(equinorm.ExportError, match=r"within torch\.inference_mode.* clone"):
            equinorm.symmetries(*call)
