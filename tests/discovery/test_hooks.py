"""What hooks read does not scale, and nothing else is pinned for them."""

import pytest
import torch
from exactness import X, two_layers
from torch import nn

import equinorm


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_what_hooks_read_is_pinned(kind):
    net, seen = two_layers(), []
    if kind == "forward":
        net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    elif kind == "pre":
        net[2].register_forward_pre_hook(lambda module, args: seen.append(args))
    else:
        net[0].register_full_backward_hook(lambda module, into, out: None)
    symmetries = equinorm.symmetries(net, X)
    assert symmetries.num_free == 0
    assert any("observed" in pin.reason.operation for pin in symmetries.pins)
    assert len(net[0]._forward_hooks) == (kind == "forward")


@pytest.mark.parametrize(
    "register", [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook]
)
def test_what_hooks_of_all_modules_read_is_pinned(register):
    seen: list = []
    handle = register(lambda module, *values: seen.append(values))
    try:
        assert equinorm.symmetries(two_layers(), X).num_free == 0
    finally:
        handle.remove()
    assert equinorm.symmetries(two_layers(), X).num_free == 6


def test_a_hook_elsewhere_pins_nothing():
    net = nn.Sequential(*two_layers(), nn.ReLU(), nn.Linear(3, 2)).double()
    net[4].register_forward_hook(lambda module, args, output: None)
    assert equinorm.symmetries(net, X).num_free == 6


@pytest.mark.parametrize("write", [False, True])
def test_a_hook_reads_what_the_model_itself_does_not_use(write):
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.side, self.down = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            h = self.up(x).relu()
            self.side(h)
            if write:
                h = h.clone()
                h[:, :1] = 0
            return self.down(h)

    model, x = Side(), torch.randn(5, 3)
    assert equinorm.symmetries(model, x).num_free == 4 + write  # a column of `down` that reads zeros alone
    model.side.register_forward_hook(lambda *_: None)
    assert equinorm.symmetries(model, x).num_free == write
