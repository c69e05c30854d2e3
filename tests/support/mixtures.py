"""Mixtures of experts whose weights are three-dimensional: transformers' own, tiny, and small ones in every layout."""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

import equinorm
from zoo import from_transformers
from zoo.__main__ import randomise_

_IS_THERE = importlib.util.find_spec("transformers") is not None
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"] if _IS_THERE else []
"""Of transformers; of gpt_oss only gains move, which experts read: its gates clamp and add 1."""


class Experts(nn.Module):
    """Three experts on every input: x ↦ Σ_e sigmoid(gate_e x) · (up_e x) · down_e, gates and ups packed into one tensor.

    Args:
        transposed: of shape (experts, in, out), not (experts, out, in).
        interleaved: gates and ups take turns.
        biased: with biases of shape (experts, out).
        gated: False: relu of all instead of gates.
    """

    def __init__(self, transposed: bool = False, interleaved: bool = False, biased: bool = False, gated: bool = True) -> None:
        super().__init__()
        self.transposed, self.interleaved, self.gated = transposed, interleaved, gated
        inner, width = (4, 8) if gated else (8, 8)
        self.norm, self.last = nn.RMSNorm(5), nn.Linear(6, 3)
        self.gate_up, self.down = nn.Parameter(torch.randn(3, width, 5)), nn.Parameter(torch.randn(3, 6, inner))
        if transposed:
            self.gate_up, self.down = (nn.Parameter(w.detach().mT.contiguous()) for w in (self.gate_up, self.down))
        self.bias = nn.Parameter(torch.randn(3, 1, width)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        into, out = (w if self.transposed else w.mT for w in (self.gate_up, self.down))
        found = self.norm(x) @ into
        found = found if self.bias is None else found + self.bias
        if not self.gated:
            hidden = torch.relu(found)
        else:
            gate, up = (found[..., ::2], found[..., 1::2]) if self.interleaved else found.chunk(2, -1)
            hidden = torch.sigmoid(gate) * up
        return self.last(torch.relu((hidden @ out).sum(0)))


KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed, biased": {"biased": True},
    "interleaved": {"interleaved": True},
    "transposed": {"transposed": True, "biased": True},
    "transposed, interleaved": {"transposed": True, "interleaved": True},
    "plain": {"gated": False},
    "plain, transposed": {"gated": False, "transposed": True},
}
"""Options of `Experts`; none makes layouts that another makes."""


@functools.cache
def family(name: str) -> tuple[nn.Module, dict[str, Any], equinorm.Symmetries]:
    """One of transformers with one layer, in float64 and with all numbers random, its inputs, and its symmetries."""
    torch.manual_seed(0)
    model, _, inputs = from_transformers.build(name, num_hidden_layers=1, first_k_dense_replace=0)
    randomise_(model.double().eval())
    return model, inputs, equinorm.symmetries(model, (), inputs)


@functools.cache
def small(name: str) -> tuple[nn.Module, dict[str, Any], equinorm.Symmetries]:
    """The same of `Experts`."""
    torch.manual_seed(0)
    model, inputs = Experts(**KINDS[name]).double().eval(), {"x": torch.randn(4, 5, dtype=torch.float64)}
    return model, inputs, equinorm.symmetries(model, (), inputs)


def mixture(name: str) -> tuple[nn.Module, dict[str, Any], equinorm.Symmetries]:
    """Any of them; made once, so that a test must put back the weights that it changes."""
    return small(name) if name in KINDS else family(name)
