"""Writes into shared memory that discovery must not lose: in subgraphs, around hooks, through masks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equinorm

X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Runs a function of (net, x) with a few layers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.keep, self.side = function, Keep(), [nn.ReLU()]
        self.a, self.b, self.d = (nn.Linear(i, o, bias=False) for i, o in ((6, 5), (6, 5), (5, 2)))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


class Keep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def check(net: nn.Module, x: Tensor = X) -> int:
    """A random member of the group leaves the function alone; its dimension."""
    torch.manual_seed(1)
    net = net.double().eval()
    group = equinorm.symmetries(net, x)
    before = copy.deepcopy(net)
    group.rescale_(2 * torch.randn(group.num_free, dtype=torch.float64))
    for factor in (1.0, -0.7):
        torch.testing.assert_close(net(factor * x), before(factor * x), rtol=1e-11, atol=1e-11)
    return group.num_free


def masked(net, x):
    h = net.a(x).clone()
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]]).bool()
    h[mask, torch.tensor([1, 0, 3, 4, 2])] = net.b(x[0, 0])
    return net.d(F.relu(h))


def dropped(net, x):
    h = net.a(x)
    with torch.no_grad():
        F.dropout(h, 0.5, False)[:, :2].copy_(net.b(x)[:, :2])
    return net.d(F.relu(h))


def joined(net, x):
    h = net.a(x)
    with torch.no_grad():
        torch.einsum("ij->ij", h)[:, :2].copy_(net.b(x)[:, :2])
    return net.d(F.relu(h))


def detached(net, x):
    h = net.a(x)
    with torch.no_grad():
        d = h.detach()
    d[:, :2].copy_(net.b(x)[:, :2])
    return net.d(F.relu(h))


def returned_dropout(net, x):
    h = net.a(x)
    with torch.no_grad():
        d = F.dropout(h, 0.5, False)
    d[:, :2].copy_(net.b(x)[:, :2])
    return net.d(F.relu(h))


def filled(net, x):
    h = net.a(x)
    with torch.no_grad():
        z = torch.zeros_like(h)
        z[:, :2].copy_(h[:, :2])
    return net.d(F.relu(z)) + torch.atleast_2d(x.sum())


def beside_a_dropout(net, x):
    h = net.a(x)
    with torch.no_grad():
        g = net.b(x).clone()
        g[:, :2].copy_(h[:, :2])
    return net.d(F.relu(g)), F.dropout(net.b(x), 0.5, False)


@pytest.mark.parametrize("function", [dropped, joined, detached, returned_dropout, filled, beside_a_dropout])
def test_writes_in_subgraphs(function):
    check(Net(function))


def test_masks_in_front_of_other_indices():
    check(Net(masked), torch.randn(3, 4, 6, dtype=torch.float64))


def through_a_module(net, x):
    h = net.a(x)
    net.keep(h[:, :2]).copy_(net.b(x)[:, :2])
    return net.d(F.relu(h))


def behind_a_module(net, x):
    h = net.a(x)
    kept = net.keep(h)
    h[:, 2:].copy_(net.b(x)[:, 2:])
    return net.d(F.relu(kept))


@pytest.mark.parametrize("function", [through_a_module, behind_a_module])
@pytest.mark.parametrize("everywhere", [True, False])
def test_hooks_do_not_hide_writes(function, everywhere):
    net, register = Net(function), nn.modules.module.register_module_forward_hook
    handle = (register if everywhere else net.keep.register_forward_hook)(lambda *_: None)
    try:
        check(net)
    finally:
        handle.remove()


def test_hooks_of_all_modules_see_modules_that_no_model_holds():
    def beside(net, x):
        return net.side[0](x @ net.a.weight.T) @ net.d.weight.T

    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert check(Net(beside)) == 0
    finally:
        handle.remove()
    assert check(Net(beside)) == 5


class Ranked(nn.Module):
    """Weighs what two of five layers give by the scores of the two largest, as mixtures of experts do."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late
        self.score, self.a, self.d = nn.Linear(6, 5), nn.Linear(6, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        values, places = self.score(x).softmax(-1).topk(2)
        same = values.view(-1, 2)
        values /= values.sum(-1, keepdim=True)
        if self.late:
            values = same + 0  # through another name for what was changed
        h = F.relu(self.a(x)) * places.sum(-1, keepdim=True)
        return self.d(h * values[:, :1])


def test_results_of_one_operation_do_not_share_memory(monkeypatch):
    asked = []
    whole = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram, "run_decompositions", lambda self, *args: asked.append(1) or whole(self, *args)
    )
    assert check(Ranked(late=False)) == 4
    assert not asked  # it takes as long as the export itself
    check(Ranked(late=True))
    assert asked


def test_a_result_that_is_read_by_another_name_after_a_write_is_seen_changed():
    def doubled(net, x):
        high, _ = net.a(x).max(0, keepdim=True)
        other = high[:, :5]
        high += net.b(x)[:1]
        return net.d(F.relu(other))

    assert check(Ranked(late=True)) == 4
    assert check(Net(doubled)) == 5
