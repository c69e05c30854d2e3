"""Discovery leaves a model as it was, and pins what a forward keeps for later calls."""

import copy
from collections import defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import equinorm


def test_the_model_is_untouched():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 3))
    net[1].eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    versions = [p._version for p in net.parameters()]
    equinorm.symmetries(net, torch.randn(2, 3, 8, 8))
    assert modes == [module.training for module in net.modules()]
    assert versions == [p._version for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_attributes_that_a_forward_assigns_are_put_back():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 5), None

        def forward(self, x):
            self.last = self.layer(x).relu()
            self.count = 1
            return self.last

    model = Keeps()
    equinorm.symmetries(model, (torch.randn(2, 4),))
    assert model.last is None
    assert not hasattr(model, "count")


@pytest.mark.parametrize("where", ["attribute", "dict", "list", "nested", "deque", "object", "tuple"])
def test_what_a_forward_keeps_for_later_calls_is_pinned(where):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
            self.cache, self.seen, self.last = {"lists": defaultdict(list)}, [], None
            self.queue, self.state = deque(), SimpleNamespace()

        def forward(self, x):
            if where == "dict" and "bias" not in self.cache:
                self.cache["bias"] = self.a.bias * 2
            bias = self.cache["bias"] if where == "dict" else self.a.bias * 2
            h = (nn.functional.linear(x, self.a.weight) + bias).relu()
            if where == "list":
                self.seen.append(h)
            if where == "nested":
                self.cache["lists"]["h"].append(h)
            if where == "deque":
                self.queue.append(h)
            if where == "object":
                self.state.h = h
            if where == "attribute":
                self.last = h
            if where == "tuple":
                self.last = (1, (h, None))
            return self.c(self.b(h).relu())

    model, x = Keeps().double(), torch.randn(2, 4, dtype=torch.float64)
    group = equinorm.symmetries(model, x)
    assert (group.num_free, model.last, model.seen, len(model.queue), vars(model.state)) == (6, None, [], 0, {})
    assert model.cache == {"lists": {}}
    assert any(pin.reason.operation == "equinorm.observed" for pin in group.pins)
    before = model(x)
    group.rescale_(torch.randn(6, dtype=torch.float64))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_recomputed_weights_are_not_kept():
    """The older weight norm assigns the weight anew before every call."""
    old = torch.nn.utils.weight_norm(nn.Linear(4, 5))
    net = nn.Sequential(old, nn.ReLU(), nn.Linear(5, 3))
    assert equinorm.symmetries(net, torch.randn(2, 4)).num_free >= 5
    assert not any(pin.reason.operation == "equinorm.observed" for pin in equinorm.symmetries(net, torch.randn(2, 4)).pins)


def test_hooks_that_a_model_installs_at_its_first_call_are_installed_once():
    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen, self.ready = nn.Linear(4, 5), [], False

        def forward(self, x):
            if not self.ready:
                self.layer.register_forward_hook(lambda module, args, output: self.seen.append(output))
                self.ready = True
            return self.layer(x).relu()

    model = Records()
    equinorm.symmetries(model, (torch.randn(2, 4),))
    assert (model.ready, model.seen, len(model.layer._forward_hooks)) == (False, [], 0)
    model(torch.randn(2, 4))
    assert len(model.seen) == 1
