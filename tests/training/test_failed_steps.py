"""A step of ENorm whose writes fail on the way: everything is put back, and the next step goes on."""

import copy

import pytest
import torch
from algorithm_1 import mlp
from torch import nn, optim

import equinorm
from equinorm import ENorm, RescaleError
from equinorm.rescaling.mover import Mover


class Gain(nn.Module):
    """A gain with an offset, which moves by several factors' shifts."""

    def __init__(self):
        super().__init__()
        self.first, self.gain, self.last = nn.Linear(5, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(nn.functional.layer_norm(self.first(x), (6,)) * (1 + self.gain))


CASES = {
    "decay in squares": (mlp, optim.Adam, {"weight_decay": 0.1}, False),
    "decay in momentum": (mlp, optim.SGD, {"weight_decay": 0.1, "momentum": 0.9}, False),
    "kernels": (mlp, optim.SGD, {"weight_decay": 0.1, "momentum": 0.9}, True),
    "offset": (lambda: Gain().double(), optim.SGD, {"momentum": 0.9}, False),
}


def numbers(hook, net, optimizer):
    state = [value for parameter in net.parameters() for value in optimizer.state[parameter].values()]
    return [
        *net.parameters(),
        *(parameter.grad for parameter in net.parameters()),
        *state,
        *hook._step.optimizers.all[0].parts.tensors(),
    ]


def failing_at(monkeypatch, number):
    """The operation of this number fails; returns all that were begun."""
    done, do = [], Mover._do

    def fail(self, move, step, is_back=False):
        if is_back:
            return do(self, move, step, True)
        done.append(step)
        if len(done) == number + 1:
            raise RuntimeError("device lost")
        return do(self, move, step)

    monkeypatch.setattr(Mover, "_do", fail)
    return done


def unbalanced(case):
    make, kind, options, compile = CASES[case]
    torch.manual_seed(0)
    net, inputs = make(), torch.randn(8, 5, dtype=torch.float64)
    optimizer = kind(net.parameters(), lr=0.01, **options)
    hook = ENorm(optimizer, net, (inputs,), every=1000, compile=compile)
    for _ in range(2):
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()
    return net, inputs, optimizer, hook


@pytest.mark.parametrize("case", CASES)
def test_every_operation_that_may_fail(monkeypatch, case):
    net, inputs, optimizer, hook = unbalanced(case)
    before = [tensor.detach().clone() for tensor in numbers(hook, net, optimizer)]
    function = copy.deepcopy(net)
    total = count(monkeypatch, case)
    for number in range(total):
        with monkeypatch.context() as patch:
            done = failing_at(patch, number)
            with pytest.raises(
                RescaleError, match=r"moving .* failed: RuntimeError: device lost\. What had moved was put back"
            ):
                hook.cycle_()
            assert len(done) == number + 1
        for tensor, old in zip(numbers(hook, net, optimizer), before, strict=True):
            torch.testing.assert_close(tensor.detach(), old, rtol=1e-11, atol=1e-14)
    hook.cycle_()
    assert any(not torch.equal(new, old) for new, old in zip(net.parameters(), function.parameters(), strict=True))
    assert equinorm.deviation(net, function, (inputs,)) <= 1e-11


def count(monkeypatch, case):
    """How many operations there are."""
    *_, hook = unbalanced(case)
    with monkeypatch.context() as patch:
        done = failing_at(patch, -2)
        hook.cycle_()
    assert len(done) >= (0 if case == "kernels" else 6)
    return len(done)


def test_kernels_are_put_back(monkeypatch):
    """The compiled kernels have run, and an operation behind them fails."""
    net, _, optimizer, hook = unbalanced("kernels")
    before = [tensor.detach().clone() for tensor in numbers(hook, net, optimizer)]
    run_ = Mover._move_natively_

    def fail(self, recorded, done):
        run_(self, recorded, done)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Mover, "_move_natively_", fail)
        with pytest.raises(RescaleError, match="MemoryError"):
            hook.cycle_()
    for tensor, old in zip(numbers(hook, net, optimizer), before, strict=True):
        torch.testing.assert_close(tensor.detach(), old, rtol=1e-11, atol=1e-14)
    old = copy.deepcopy(net)
    hook.cycle_()
    assert not torch.equal(net[0].weight, old[0].weight)


def test_what_cannot_be_put_back_is_named(monkeypatch):
    *_, hook = unbalanced("decay in momentum")
    do, done = Mover._do, []

    def fail(self, move, step, is_back=False):
        done.append(step)
        if is_back or len(done) == 4:
            raise RuntimeError("device lost")
        do(self, move, step)

    monkeypatch.setattr(Mover, "_do", fail)
    with pytest.raises(RescaleError, match=r"could not be put back, load a checkpoint: .*0\.weight"):
        hook.cycle_()


@pytest.mark.parametrize("case", [case for case in CASES if case != "kernels"])
def test_every_write_that_may_fail(monkeypatch, case):
    """An operation writes several times: by rows and by columns, a strip at a time, a part after the other."""
    net, inputs, optimizer, hook = unbalanced(case)
    before = [tensor.detach().clone() for tensor in numbers(hook, net, optimizer)]
    function = copy.deepcopy(net)
    number = 0
    for number in range(1000):
        left = [number]

        def failing(write, left=left):
            def fail(self, *args, **options):
                left[0] -= 1
                if left[0] == -1:
                    raise RuntimeError("device lost")
                return write(self, *args, **options)

            return fail

        with monkeypatch.context() as patch:
            for kind in ("mul_", "add_", "sub_", "clamp_"):
                patch.setattr(torch.Tensor, kind, failing(getattr(torch.Tensor, kind)))
            try:
                hook.cycle_()
                break
            except RescaleError as error:
                assert "What had moved was put back" in str(error)  # noqa: PT017
            except RuntimeError as error:  # before anything was written
                assert str(error) == "device lost"  # noqa: PT017
        for tensor, old in zip(numbers(hook, net, optimizer), before, strict=True):
            torch.testing.assert_close(tensor.detach(), old, rtol=1e-11, atol=1e-14)
    assert number > 6
    assert equinorm.deviation(net, function, (inputs,)) <= 1e-11
