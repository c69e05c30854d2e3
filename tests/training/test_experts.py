"""The hook on mixtures of experts, against the same hook on lists of their entries."""

import contextlib
import itertools

import pytest
import torch
from algorithm_1 import needs_compiler
from mixtures import FAMILIES, KINDS, mixture
from torch import Tensor

from equinorm import ENorm
from equinorm.balancing import layout

OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


ROUNDED = {"deepseek_v3": {"power_of_two": True}}
"""Its router rounds to float32, so that only powers of two are exact."""


@contextlib.contextmanager
def untouched(model: torch.nn.Module):
    """Weights are afterwards what they were."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(state)
        model.zero_grad()


def steps(name: str, optimizer: str, **options) -> list[Tensor]:
    """Weights, momentum and gradients after three steps."""
    model, inputs, _ = mixture(name)
    with untouched(model):
        parameters = list(model.parameters())
        stepper, generator = OPTIMIZERS[optimizer](parameters), torch.Generator().manual_seed(0)
        ENorm(stepper, model, (), inputs, **options, **ROUNDED.get(name, {}))
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            stepper.step()
        states = [stepper.state[p] for p in parameters]
        found = [*parameters, *(p.grad for p in parameters), *(v for s in states for v in s.values() if torch.is_tensor(v))]
        return [value.detach().clone() for value in found]


CASES = [
    *itertools.product([*KINDS, *FAMILIES], OPTIMIZERS, [{}]),
    *itertools.product([*KINDS, *FAMILIES[:1]], OPTIMIZERS, [{"method": "two-level"}]),
    *itertools.product([*KINDS, *FAMILIES], ["momentum"], [{"compile": True}]),
    *itertools.product(KINDS, ["Adam"], [{"compile": True, "method": "two-level", "c": 1.1}]),
    *itertools.product(KINDS, ["momentum"], [{"p": 3.0}]),
]


@needs_compiler
@pytest.mark.parametrize(("name", "optimizer", "options"), CASES, ids=str)
def test_steps_are_those_on_the_entries(monkeypatch, name, optimizer, options):
    monkeypatch.setattr("equinorm.training.enorm.symmetries", lambda *_, **__: mixture(name)[2])  # traced once for all
    found = steps(name, optimizer, **options)
    for way in ("_is_along_one_axis", "_joined"):
        monkeypatch.setattr(layout, way, lambda *_: None)
    expected = steps(name, optimizer, **options | {"compile": False})
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [*KINDS, *FAMILIES])
def test_experts_run_in_the_kernels(monkeypatch, name):
    """No tensor of a mixture makes the compiled kernels give up."""
    model, inputs, symmetries = mixture(name)
    monkeypatch.setattr("equinorm.training.enorm.symmetries", lambda *_, **__: symmetries)
    with untouched(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        hook = ENorm(optimizer, model, (), inputs, compile=True, **ROUNDED.get(name, {}))
        assert hook._step._recording.cycle._program is not None


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", [*KINDS, *FAMILIES])
def test_powers_of_two_leave_outputs_as_they_are(monkeypatch, name, compile):
    model, inputs, symmetries = mixture(name)
    monkeypatch.setattr("equinorm.training.enorm.symmetries", lambda *_, **__: symmetries)
    with untouched(model), torch.no_grad():
        hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (), inputs, power_of_two=True, compile=compile)
        before, weights = model(**inputs), [parameter.clone() for parameter in model.parameters()]
        hook.cycle_()
        after = model(**inputs)
        assert torch.equal(*(found if isinstance(found, Tensor) else found.logits for found in (before, after)))
        assert any(not torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
