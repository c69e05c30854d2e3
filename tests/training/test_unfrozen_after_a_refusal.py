"""A refused step leaves nothing recorded that belongs to the selection before it."""

import warnings

import pytest
import torch
from torch import nn, optim

from equinorm import ENorm, RescaleError


def test_what_is_unfrozen_moves_once_the_optimizer_knows_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    inputs = torch.randn(4, 6, dtype=torch.float64)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hook = ENorm(optimizer, model, (inputs,), cycles=100)
    hook.cycle_()
    first = model[0].weight.detach().clone()
    for before, after in zip(model[0].parameters(), model[4].parameters(), strict=True):  # as many tensors, which lie alike
        before.requires_grad_(True)
        after.requires_grad_(False)
    for _ in range(2):
        with pytest.raises(RescaleError, match="not among the parameters"):
            hook.cycle_()
    assert torch.equal(model[0].weight, first)
    expected = model(inputs)
    optimizer.add_param_group({"params": [*model[0].parameters()]})
    hook.cycle_()
    assert not torch.equal(model[0].weight, first)
    assert hook.residual() < 1e-9
    torch.testing.assert_close(model(inputs), expected, rtol=1e-12, atol=1e-14)
