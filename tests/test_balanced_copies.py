"""`equinorm.balance`: a balanced copy that differs from the model in nothing but its weights."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

import equinorm

BATCH = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    ).double()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


def test_copy_is_balanced_and_model_untouched():
    net = network().eval()
    net[0].weight.requires_grad_(False)
    net(BATCH).sum().backward()
    before, gradient = state(net), net[3].weight.grad.clone()
    versions = [parameter._version for parameter in net.parameters()]
    balanced = equinorm.balance(net, (BATCH,))
    assert same_state(net, before)
    assert torch.equal(net[3].weight.grad, gradient)
    assert [parameter._version for parameter in net.parameters()] == versions
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in balanced.parameters()}
    in_place = copy.deepcopy(net)
    equinorm.balance_(in_place, (BATCH,))
    assert same_state(balanced, state(in_place))
    assert not same_state(balanced, before)
    assert equinorm.deviation(net, balanced, (BATCH,)) < 1e-12
    assert not balanced.training
    assert not balanced[0].weight.requires_grad
    assert balanced[3].weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copy_keeps_class_mode_dtype_and_buffers(training, dtype):
    net = network().to(dtype).train(training)
    net.register_buffer("unsaved", torch.arange(3), persistent=False)
    net[1].running_mean.uniform_(-1, 1)
    balanced = equinorm.balance(net, (BATCH.to(dtype),), p=1, c=1.5)
    assert type(balanced) is type(net)
    assert [module.training for module in balanced.modules()] == [module.training for module in net.modules()]
    assert [p.dtype for p in balanced.parameters()] == [p.dtype for p in net.parameters()]
    assert torch.equal(balanced[1].running_mean, net[1].running_mean)
    assert torch.equal(balanced.unsaved, net.unsaved)
    assert "unsaved" not in balanced.state_dict()


def test_powers_of_two_and_options_reach_the_copy():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    exact = equinorm.balance(net, BATCH, power_of_two=True, cycles=3)
    assert torch.equal(exact(BATCH), net(BATCH))
    part = equinorm.balance(net, (BATCH,), modules=[net[0], "2"])
    assert torch.equal(part[4].weight, net[4].weight)
    assert not torch.equal(part[0].weight, net[0].weight)
    hidden = equinorm.balance(net, (BATCH,), opaque=net[4])
    assert torch.equal(hidden[4].weight, net[4].weight)
    assert not torch.equal(hidden[0].weight, net[0].weight)


class Tied(nn.Module):
    """Weights that are one by identity, and two parameters and a buffer that lie in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.second.weight = self.first.weight
        self.register_buffer("mirror", self.third.weight.detach()[1:])
        self.fourth = nn.Linear(8, 8, bias=False)
        self.fourth.weight = nn.Parameter(self.third.weight.detach().T)

    def forward(self, x):
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return self.fourth(torch.relu(self.third(h))) + self.mirror.sum()


def test_ties_stay_by_identity_and_by_memory():
    net = Tied().double()
    net.mirror = net.third.weight.detach()[1:]  # double() has parted them
    net.fourth.weight = nn.Parameter(net.third.weight.detach().T, requires_grad=False)
    balanced = equinorm.balance(net, (BATCH,))
    assert balanced.first.weight is balanced.second.weight
    assert balanced.fourth.weight.data_ptr() == balanced.third.weight.data_ptr() != net.third.weight.data_ptr()
    assert balanced.fourth.weight.stride() == (1, 8)
    assert (balanced.third.weight.requires_grad, balanced.fourth.weight.requires_grad) == (True, False)
    with torch.no_grad():
        balanced.third.weight.fill_(3)
    assert bool((balanced.fourth.weight == 3).all())
    assert bool((balanced.mirror == 3).all())
    assert not bool((net.mirror == 3).any())


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return weight_norm(layer)


@pytest.mark.parametrize(
    "prepare",
    [
        old_weight_norm,
        parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_what_is_computed_anew_before_every_call_can_be_copied(prepare):
    net = nn.Sequential(prepare(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    net(BATCH)  # computes them, with a graph
    before = state(net)
    balanced = equinorm.balance(net, (BATCH,))
    assert same_state(net, before)
    assert equinorm.deviation(net, balanced, (BATCH,)) < 1e-12
    balanced(BATCH).sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_what_cannot_be_copied_is_said():
    net = network()
    net.cached = net(BATCH)
    with pytest.raises(
        equinorm.EquinormError, match=re.escape("cannot copy Sequential to balance the copy: attribute 'cached': RuntimeError")
    ) as info:
        equinorm.balance(net, (BATCH,))
    assert "or balance the model itself with balance_." in str(info.value)


def test_python_modules_in_attributes_are_shared():
    net = network().eval()
    net.F, net[0].torch = nn.functional, torch
    balanced = equinorm.balance(net, (BATCH,))
    assert balanced.F is nn.functional
    assert balanced[0].torch is torch
    assert equinorm.deviation(net, balanced, (BATCH,)) < 1e-12


def test_refusals():
    net = network().eval()
    with pytest.raises(equinorm.BalanceError, match="use balance_ with it"):
        equinorm.balance(net, (BATCH,), optimizer=torch.optim.SGD(net.parameters()))
    with pytest.raises(equinorm.EquinormError, match=r"model must be a torch\.nn\.Module, not int"):
        equinorm.balance(3, (BATCH,))
    with pytest.raises(equinorm.BalanceError, match="no module 'absent'"):
        equinorm.balance(net, (BATCH,), modules="absent")


def test_wrappers_are_copied_along():
    net = network().eval()
    averaged = equinorm.balance(AveragedModel(net), (BATCH,))
    assert isinstance(averaged, AveragedModel)
    assert equinorm.deviation(net, averaged, (BATCH,)) < 1e-12
    compiled = equinorm.balance(torch.compile(net, backend="eager"), (BATCH,))
    inner = compiled._orig_mod
    assert type(compiled) is type(torch.compile(net))
    assert equinorm.deviation(net, inner, (BATCH,)) < 1e-12
    assert not torch.equal(inner[3].weight, net[3].weight)
    with torch.no_grad():
        inner[5].weight.zero_()
    assert torch.equal(compiled(BATCH), inner(BATCH))
