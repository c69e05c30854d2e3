"""The law of an optimizer's state: its next update is that of the same optimizer carried in the new coordinates."""

import torch
from algorithm_1 import mlp
from torch import nn, optim

import equinorm
from equinorm import ENorm

TINY = 1e-300
"""ε of adaptive optimizers: it does not scale, so the laws hold up to it."""

STEPS = 4


def gradients_(model: nn.Module, inputs: torch.Tensor) -> None:
    model.zero_grad()
    (model(inputs) - 1).square().mean().backward()


def unbalanced() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model, inputs = mlp(depth=2, width=6), torch.randn(64, 5, dtype=torch.float64)
    found = equinorm.symmetries(model, (inputs,))
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
    return model, inputs


def check_carried(model, inputs, make, rtol: float, decays: list[float] | None = None) -> None:
    """The same with several optimizers, which `make` makes of all parameters."""
    optimizers = make([*model.parameters()])
    hook = ENorm(optimizers, model, (inputs,), every=100)
    twin = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    history: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    warm = {}
    if isinstance(optimizers[0], optim.Adadelta):  # ε alone gets it going: start with averages instead
        warm = {"step": torch.tensor(1.0), "square_avg": 0.5, "acc_delta": 0.02}
        _warm(optimizers[0], warm, [torch.ones_like(p) for p in twin])
    for step in range(STEPS):
        gradients_(model, inputs)
        if decays:
            optimizers[0].param_groups[0]["weight_decay"] = decays[step]
        history.append(([p.detach().clone() for p in model.parameters()], [p.grad.clone() for p in model.parameters()]))
        for optimizer in optimizers:
            optimizer.step()
    assert hook.steps == STEPS
    before = [parameter.detach().clone() for parameter in model.parameters()]
    points = _points(optimizers)
    hook.cycle_()
    scales = [now.detach() / start for now, start in zip(model.parameters(), before, strict=True)]
    assert any(bool((scale - 1).abs().max() > 0.1) for scale in scales)

    # The same optimizers in the new coordinates s·w: they are shown the same history there.
    carried = make(twin)
    if warm:
        _warm(carried[0], warm, scales)
    for step, (weights, gradients) in enumerate(history):
        if decays:
            carried[0].param_groups[0]["weight_decay"] = decays[step]
        for parameter, weight, gradient, scale in zip(twin, weights, gradients, scales, strict=True):
            parameter.data.copy_(weight * scale)
            parameter.grad = gradient / scale
        for optimizer in carried:
            optimizer.step()
    for parameter, own, moved, scale in zip(twin, model.parameters(), model.parameters(), scales, strict=True):
        parameter.data.copy_(moved)
        if id(own) in points:  # another point of its path is where it was, in the new coordinates
            carried[0].state[parameter]["z"].copy_(points[id(own)] * scale)

    gradients_(model, inputs)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, moved in zip(twin, model.parameters(), strict=True):
        parameter.grad = moved.grad.clone()
    hook.remove()
    for optimizer in (*optimizers, *carried):
        optimizer.step()
    for parameter, moved, start in zip(twin, model.parameters(), before, strict=True):
        update, expected = moved.detach() - start, parameter.detach() - start
        assert bool(expected.abs().max() > 0)
        torch.testing.assert_close(update, expected, rtol=rtol, atol=1e-12 * float(expected.abs().max()))


def _points(optimizers):
    """Points that schedule-free optimizers keep beside the weights."""
    states = [entry for optimizer in optimizers for entry in optimizer.state.items()]
    return {id(parameter): state["z"].clone() for parameter, state in states if "z" in state}


def _warm(optimizer, state, scales):
    """Averages that a longer run would have: of squared gradients, and of squared updates, in coordinates s·w."""
    for parameter, scale in zip(optimizer.param_groups[0]["params"], scales, strict=True):
        optimizer.state[parameter] = {
            "step": state["step"].clone(),
            "square_avg": state["square_avg"] / scale.square(),
            "acc_delta": torch.full_like(scale, state["acc_delta"]),  # ε sets its size, and does not scale
        }
