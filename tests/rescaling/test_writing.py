"""Writes that fail on the way: everything is put back, nothing is half rescaled, and no number leaves its dtype unsaid."""

import copy
import math

import pytest
import torch
from torch import nn

import equinorm
from equinorm import RescaleError, native
from equinorm.rescaling import writing
from equinorm.rescaling.factors import factors_of
from equinorm.rescaling.tensor_write import Write


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """These write in one call, within which nothing fails."""
    monkeypatch.setattr(native, "are_shipped", lambda: False)


def trained(dtype=torch.float64):
    """A network with gradients and an optimizer with state."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    inputs = torch.randn(4, 5, dtype=dtype)
    optimizer = torch.optim.Adam(net.parameters())
    net(inputs).square().mean().backward()
    optimizer.step()
    return net, inputs, optimizer


def everything(net, optimizer):
    """Weights, gradients and state."""
    state = [value for parameter in net.parameters() for value in optimizer.state[parameter].values()]
    return [tensor.detach().clone() for parameter in net.parameters() for tensor in (parameter, parameter.grad)] + state


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


def failing_at(monkeypatch, number, after=False, error=None):
    """The write of this number fails, before or after it has changed its tensor; returns how many there were."""
    done, write_ = [], writing._Piece.write_

    def fail(piece):
        done.append(piece)
        if after or len(done) != number + 1:
            write_(piece)
        if len(done) == number + 1:
            raise error or RuntimeError("device lost")

    monkeypatch.setattr(writing._Piece, "write_", fail)
    return done


@pytest.mark.parametrize("number", [*range(0, 24, 3), 23])
@pytest.mark.parametrize(("kept", "after"), [(writing.KEPT, False), (writing.KEPT, True), (0, False)])
@pytest.mark.parametrize("twos", [False, True])
def test_a_write_that_fails_leaves_the_old_point(monkeypatch, number, after, kept, twos):
    net, inputs, optimizer = trained()
    before = copies(everything(net, optimizer))
    symmetries = equinorm.symmetries(net, (inputs,))
    z = torch.randn(symmetries.num_free, dtype=torch.float64) * 3
    monkeypatch.setattr(writing, "KEPT", kept)
    done = failing_at(monkeypatch, number, after)
    with pytest.raises(RescaleError, match=r"writing .* failed: RuntimeError: device lost\. All is as it was before") as caught:
        symmetries.rescale_(z, optimizer, power_of_two=twos)
    assert len(done) == number + 1
    exact = bool(kept) or twos
    for tensor, old in zip(everything(net, optimizer), before, strict=True):
        assert torch.equal(tensor, old) if exact else torch.allclose(tensor, old, rtol=1e-14, atol=0)
    assert ("Put back to within rounding" in str(caught.value)) == (not exact and number > 0)
    monkeypatch.undo()
    old = copy.deepcopy(net)
    symmetries.rescale_(z, optimizer)  # and it can be tried again
    assert equinorm.deviation(net, old, (inputs,)) <= 1e-12


def test_what_could_not_be_put_back_is_named(monkeypatch):
    net, inputs, optimizer = trained()
    symmetries = equinorm.symmetries(net, (inputs,))
    failing_at(monkeypatch, 3)
    put_back_, broken = writing._Piece.put_back_, []

    def fail(piece):
        if piece.write.what == "0.weight":
            broken.append(piece)
            raise RuntimeError("device lost")
        put_back_(piece)

    monkeypatch.setattr(writing._Piece, "put_back_", fail)
    with pytest.raises(RescaleError, match=r"could not be put back, load them again: 0\.weight\."):
        symmetries.rescale_(torch.ones(symmetries.num_free), optimizer)
    assert broken


def test_strips_of_odd_sizes_are_all_kept(monkeypatch):
    """The room for originals is counted by tensors, and taken by strips, which begin at even addresses."""
    monkeypatch.setattr(writing, "STRIP", 15)
    weight = torch.randn(81, 3)
    before = weight.clone()
    write = Write("a", weight, factors_of([torch.full((1, 1), 0.3, dtype=torch.float64)]), True)
    last = [*writing._pieces(write, False)][-1].memory.data_ptr()
    real = writing._Piece.write_

    def failing(piece):
        if piece.memory.data_ptr() == last:
            raise RuntimeError("no more")
        real(piece)

    monkeypatch.setattr(writing._Piece, "write_", failing)
    with pytest.raises(RescaleError, match=r"no more. All is as it was before.$"):
        writing.write_([write], [False])
    assert torch.equal(weight, before)


@pytest.mark.parametrize("at_once", [1, 7, 1 << 16])
def test_factors_in_any_batches_are_the_same(monkeypatch, at_once):
    monkeypatch.setattr("equinorm._class_ids.AT_ONCE", at_once)
    exact = torch.tensor([2 * math.log(2)], dtype=torch.float64)
    logs = [*(torch.randn(n, 1, dtype=torch.float64) for n in (3, 0, 5, 1)), exact]
    for log, factor in zip(logs, factors_of(logs), strict=True):
        assert torch.equal(factor.log, log)
        assert factor.scale.shape == log.shape
        torch.testing.assert_close(factor.scale, log.exp(), rtol=1e-15, atol=0)
        if log.numel():
            assert (factor.low, factor.high, factor.is_exact) == (float(log.min()), float(log.max()), log is exact)


def test_exits_put_back_too(monkeypatch):
    """SystemExit, as signal handlers raise it, passes as it is."""
    net, inputs, optimizer = trained()
    before = copies(everything(net, optimizer))
    symmetries = equinorm.symmetries(net, (inputs,))
    failing_at(monkeypatch, 5, error=SystemExit(1))
    with pytest.raises(SystemExit):
        symmetries.rescale_(torch.ones(symmetries.num_free), optimizer)
    assert all(torch.equal(tensor, old) for tensor, old in zip(everything(net, optimizer), before, strict=True))


def test_gains_with_an_offset_are_put_back(monkeypatch):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gain, self.last = nn.Linear(4, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(nn.functional.layer_norm(self.first(x), (6,)) * (1 + self.gain))

    net = Gain().double()
    before = copy.deepcopy(net)
    symmetries = equinorm.symmetries(net, (torch.randn(2, 4).double(),))
    assert any(scaling.offset and scaling.factors for scaling in symmetries.scalings)
    monkeypatch.setattr(writing, "KEPT", 0)
    done = failing_at(monkeypatch, 1)
    with pytest.raises(RescaleError, match="All is as it was before"):
        symmetries.rescale_(torch.randn(symmetries.num_free))
    assert done[0].write.offset
    for old, new in zip(before.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-13, atol=1e-14)


# ------------------------------------------------------------------------------------------------------ out of range


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-200])
def test_squares_at_factors_beyond_float64(value):
    """s^−2 and its two factors overflow where exp_avg_sq itself need not: the result is right, or it is refused."""
    net, inputs, optimizer = trained()
    symmetries = equinorm.symmetries(net, (inputs,))
    with torch.no_grad():
        net[0].weight.mul_(1e250), net[0].bias.mul_(1e250)
        for parameter in net.parameters():
            parameter.grad = None
            optimizer.state[parameter]["exp_avg"].fill_(0.0)
            optimizer.state[parameter]["exp_avg_sq"].fill_(0.0)
        optimizer.state[net[0].weight]["exp_avg_sq"].fill_(value)
    before = copies(p.detach() for p in net.parameters())
    z = torch.cat([torch.full((8,), -400.0), torch.zeros(6)]).double()  # s^−2 = e^800
    if value == 1e-200:  # 1e-200 · e^800 = 1e147
        expected = 1e147
        symmetries.rescale_(z, optimizer)
        found = optimizer.state[net[0].weight]["exp_avg_sq"]
        torch.testing.assert_close(found.log(), torch.full_like(found, 800 + math.log(value)), rtol=1e-13, atol=0)
        assert 0.1 < float(found.max()) / expected < 10
    else:
        symmetries.rescale_(z, optimizer)
        found = optimizer.state[net[0].weight]["exp_avg_sq"]
        torch.testing.assert_close(found.log(), torch.full_like(found, 800 + math.log(value) if value else -math.inf))
    assert not torch.equal(net[0].weight, before[0])
    assert all(bool(v.isfinite().all()) for state in optimizer.state.values() for v in state.values())


def test_squares_that_overflow_are_refused():
    net, inputs, optimizer = trained()
    symmetries = equinorm.symmetries(net, (inputs,))
    with torch.no_grad():
        net[0].weight.mul_(1e250), net[0].bias.mul_(1e250)
        for parameter in net.parameters():
            parameter.grad = None
    before = copies(p.detach() for p in net.parameters())
    with pytest.raises(RescaleError, match=r"exp_avg_sq of 0\.weight: it would overflow torch.float64|would overflow float64"):
        symmetries.rescale_(torch.cat([torch.full((8,), -400.0), torch.zeros(6)]), optimizer)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("scale", [50.0, -50.0])
@pytest.mark.parametrize("how", ["parametrization", "written out"])
def test_weight_norms_whose_squares_leave_the_dtype(scale, how):
    """‖v‖² leaves float32 long before v does."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.last = nn.Parameter(torch.randn(8, 5)), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(x @ (self.v / self.v.norm(dim=1, keepdim=True)).T)

    torch.manual_seed(0)
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 8))
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3)) if how == "parametrization" else Written()
    inputs = torch.randn(4, 5)
    symmetries = equinorm.symmetries(net, (inputs,))
    (v,) = [scaling for scaling in symmetries.scalings if scaling.is_squared]
    z = torch.zeros(symmetries.num_free)
    z[v.free() - 1] = scale
    before = copy.deepcopy(net)
    with pytest.raises(RescaleError, match="takes norms of it"):
        symmetries.rescale_(z)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
    symmetries.rescale_(z / 2)
    assert equinorm.deviation(net, before, (inputs,)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gains_with_an_offset_converted_after_the_analysis(dtype):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.last = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(nn.functional.layer_norm(x, (4,)) * (1 + self.gain))

    net = Gain()
    symmetries = equinorm.symmetries(net, (torch.randn(2, 4),))
    net.to(dtype)
    before = copy.deepcopy(net)
    with pytest.raises(RescaleError, match=r"uses 1 \+ gain, and it is .*float16 now|uses 1 \+ gain, and it is bfloat16 now"):
        symmetries.rescale_(torch.full((symmetries.num_free,), math.log(2)))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


def test_float8_after_the_analysis():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    symmetries = equinorm.symmetries(net, (torch.randn(2, 4),))
    net[0].weight.data = net[0].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(RescaleError, match=r"0\.weight: its dtype is torch\.float8_e4m3fn"):
        symmetries.rescale_(torch.full((4,), math.log(2)))
