"""Gradients that do not scale: behind backward passes that may not be linear they are refused, not moved wrongly."""

import copy

import pytest
import torch
from torch import nn

import equinorm
from equinorm import RescaleError


class Clamped(torch.autograd.Function):
    """The identity, with gradients that are clamped."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-3, 1e-3)


class Clamping(nn.Module):
    def forward(self, x):
        return Clamped.apply(x)


def network(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *middle, nn.Linear(6, 3)).double(), torch.randn(5, 4, dtype=torch.float64)


def clamp(gradient):
    return gradient.clamp(-1e-3, 1e-3)


def module_hook(net):
    net[2].register_full_backward_hook(lambda module, inputs, outputs: tuple(map(clamp, inputs)))


def module_pre_hook(net):
    net[2].register_full_backward_pre_hook(lambda module, outputs: tuple(map(clamp, outputs)))


def parameter_hook(net):
    net[0].weight.register_hook(clamp)


def after_accumulation(net):
    def clamped(parameter):
        parameter.grad.clamp_(-1e-3, 1e-3)

    net[0].weight.register_post_accumulate_grad_hook(clamped)


WAYS = {
    "function": (None, "the autograd function Clamped"),
    "module": (module_hook, "a backward hook of module '2'"),
    "module, before": (module_pre_hook, "a backward hook of module '2'"),
    "parameter": (parameter_hook, r"a hook of 0\.weight"),
    "accumulated": (after_accumulation, r"a hook of 0\.weight"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradients_behind_a_clamp_are_refused(way, when):
    hook, words = WAYS[way]
    net, inputs = network(*([Clamping()] if hook is None else []))
    if hook is not None and when == "before":
        hook(net)
    symmetries = equinorm.symmetries(net, (inputs,))
    if hook is not None and when == "after":
        hook(net)
    if symmetries.num_free == 0:  # a hook that can read activations pins them
        assert way.startswith("module")
        assert when == "before"
        return
    assert symmetries.num_free == 6
    net(inputs).square().sum().backward()
    before = copy.deepcopy(net)
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    z = torch.randn(symmetries.num_free, dtype=torch.float64)
    with pytest.raises(RescaleError, match=rf"cannot rescale the gradient of .*: {words} may change gradients .*zero_grad"):
        symmetries.rescale_(z)
    assert all(torch.equal(new, old) for new, old in zip(net.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(net.parameters(), gradients, strict=True))
    net.zero_grad()
    symmetries.rescale_(z)
    assert equinorm.deviation(net, before, (inputs,)) <= 1e-12


def test_gradients_of_torch_s_own_functions_move():
    """Checkpointed blocks have a backward pass of torch's own, which is that of their operations."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, _ = network()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    net, inputs = Checkpointed(), torch.randn(5, 4, dtype=torch.float64)
    symmetries = equinorm.symmetries(net, (inputs,))
    assert symmetries.backward == ()
    net(inputs).square().sum().backward()
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    moved = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(inputs).square().sum().backward()
    for parameter, old in zip(net.parameters(), moved, strict=True):
        torch.testing.assert_close(parameter.grad, old, rtol=1e-11, atol=1e-13)


def test_apply_is_left_as_it_was():
    before = torch.autograd.Function.__dict__["apply"]
    equinorm.symmetries(*network())
    assert torch.autograd.Function.__dict__["apply"] is before
