"""An independent count of rescaling symmetries: no graph, no labels, only derivatives.

A rescaling w_i ↦ w_i·exp(t_i·ε) of single weight entries preserves the function f if and only if

    Σ_i t_i ∂f(w, x)/∂log w_i = 0    for all weights w and inputs x.

Every random draw of (w, x) and of a projection of the outputs gives one linear equation for t. Their common solutions are
the Lie algebra of all entrywise rescalings that preserve f: its dimension is what discovery must find.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import equinorm

GAP = 1e-6, 1e-10
"""Singular values, relative to the largest: none may lie between. Measured ones are below 1e-14 or above 1e-5."""


@dataclass(frozen=True)
class Verdict:
    """What the oracle says of one network.

    Attributes:
        dimension: of the group of entrywise rescalings of live entries that preserve the function.
        found: dimension of the discovered group, restricted to live entries.
        found_all: dimension of the discovered group on all entries: `num_free` if no two log-scales say the same.
        num_free: what discovery claims.
        residual: largest |J·t| / |t| over discovered generators, relative to the largest singular value: 0 if sound.
        live: entries on which the outputs depend; a dead entry (a bias in front of a batch norm) could take any scale.
        symmetries: what was discovered.
    """

    dimension: int
    found: int
    found_all: int
    num_free: int
    residual: float
    live: int
    symmetries: equinorm.Symmetries


def verdict(model: nn.Module, args: Sequence, seed: int = 0, buffers: Sequence[str] = (), **options: str) -> Verdict:
    """Compare discovery with the oracle on one small network, whose weights, and these buffers, are redrawn."""
    model = model.double()
    for module in model.modules():
        if getattr(module, "eps", None):
            module.eps = 0.3  # a tiny eps is almost a symmetry; 0 stays 0
    args = pytree.tree_map(lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a, tuple(args))
    symmetries = equinorm.symmetries(model, args, **options)
    parameters = {**dict(model.named_parameters()), **{name: model.get_buffer(name) for name in buffers}}
    offsets = {name: scaling.offset for scaling in symmetries.scalings for name in scaling.names}
    jacobian = equations(model, parameters, args, offsets, seed)
    live = jacobian.abs().amax(0) > 1e-12 * jacobian.abs().max()
    generators = _generators(symmetries, parameters)
    singular = torch.linalg.svdvals(jacobian[:, live])
    largest = float(singular[0])
    residual = (generators @ jacobian.T).abs().amax() / largest if symmetries.num_free else 0.0
    return Verdict(
        dimension=int(live.sum()) - _rank(singular),
        found=_rank(torch.linalg.svdvals(generators[:, live])) if symmetries.num_free else 0,
        found_all=_rank(torch.linalg.svdvals(generators)) if symmetries.num_free else 0,
        num_free=symmetries.num_free,
        residual=float(residual),
        live=int(live.sum()),
        symmetries=symmetries,
    )


def equations(
    model: nn.Module, parameters: dict[str, Tensor], args: Sequence, offsets: dict[str, float], seed: int = 0
) -> Tensor:
    """One row for each draw of weights, inputs and output projection: the derivative by log(w + offset) of every entry."""
    generator = torch.Generator().manual_seed(seed)
    _randomise_buffers(model, generator)
    count = sum(p.numel() for p in parameters.values())
    rows = []
    while len(rows) < 1.5 * count + 16:
        drawn = {name: _weight(p, generator).requires_grad_() for name, p in parameters.items()}
        inputs = pytree.tree_map(lambda a: _input(a, generator), args)
        _forget(model)
        outputs = torch.func.functional_call(model, drawn, inputs)
        flat = [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.is_floating_point()]
        total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in flat)
        grads = torch.autograd.grad(total, list(drawn.values()), allow_unused=True)
        pieces = [
            torch.zeros(w.numel()) if g is None else (g * (w + offsets.get(name, 0.0))).detach().flatten()
            for g, (name, w) in zip(grads, drawn.items(), strict=True)
        ]
        row = torch.cat([piece.double() for piece in pieces])
        if row.any():  # all zero where every ReLU is off
            rows.append(row / row.abs().max())
    return torch.stack(rows)


def _weight(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Entries of either sign, none close to 0, a layer's gain close to 1."""
    size = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
    sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1
    fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
    return (size * sign / fan_in**0.5).detach()


def _input(value: object, generator: torch.Generator) -> object:
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return torch.randint(0, int(value.max()) + 1, value.shape, generator=generator)


def _forget(model: nn.Module) -> None:
    """Let modules drop what they keep from one call to the next, as some do when their mode is set."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    model.eval()
    for module, mode in modes:
        module.training = mode


def _randomise_buffers(model: nn.Module, generator: torch.Generator) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def _generators(symmetries: equinorm.Symmetries, parameters: dict[str, Tensor]) -> Tensor:
    """Row j: the exponent with which free log-scale j moves each weight entry."""
    of = {name: scaling for scaling in symmetries.scalings for name in scaling.names}
    blocks = []
    for name, parameter in parameters.items():
        block = torch.zeros(symmetries.num_free + 1, parameter.numel(), dtype=torch.float64)
        for exponent, ids in of[name].factors:
            places = ids.expand(parameter.shape).reshape(1, -1)
            block.scatter_add_(0, places, torch.full(places.shape, exponent, dtype=torch.float64))
        blocks.append(block[1:])
    return torch.cat(blocks, dim=1)


def _rank(singular: Tensor) -> int:
    relative = singular / singular[0]
    large, small = GAP
    unclear = relative[(relative < large) & (relative > small)]
    assert not len(unclear), f"no gap in the singular values: {unclear.tolist()}"
    return int((relative >= large).sum())
