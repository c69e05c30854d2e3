r"""What paths through a network weigh: path-SGD, and PathCond's initialisation.

With squared weights and inputs of ones, a ReLU network is linear and the sum of its outputs is

    π = Σ_paths Π_{e in path} w_e²,        κ_e = ∂π / ∂(w_e²):

one forward and one backward pass. κ is also the diagonal of the path kernel. Where w ↦ s·w, κ ↦ s⁻²·κ: the update
w ← w − η·κ⁻¹·∂L/∂w commutes with every rescaling. Max-pooling passes the heaviest of its inputs on, as in the network.

Sources: Neyshabur, Salakhutdinov, Srebro, NeurIPS 2015 (path-SGD); PathCond, arXiv 2602.19799.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.func import functional_call

from equinorm import Scaling, Symmetries

_EVALUATIONS = 2000
"""Most evaluations of PathCond's objective."""


def kappa(model: nn.Module, shape: Sequence[int], unit: float = 1.0) -> dict[str, Tensor]:
    """κ of every parameter of a network of linear, convolution, pooling and ReLU layers, skips and biases.

    Args:
        model: the network; untouched.
        shape: of one input, without the batch axis.
        unit: what to divide κ by.
    """
    parameters = dict(model.named_parameters())
    squares = {name: parameter.detach().square().requires_grad_() for name, parameter in parameters.items()}
    example = next(iter(squares.values()))
    ones = torch.ones(1, *shape, dtype=example.dtype, device=example.device)
    total = functional_call(model, squares, (ones,)).sum() / unit
    gradients = torch.autograd.grad(total, list(squares.values()))
    return dict(zip(squares, gradients, strict=True))


class PathSGD:
    """Divides gradients by κ before the optimizer sees them.

    κ is divided by its mean over all weights at the start, once, so that learning rates compare with those of SGD. An
    edge with κ = 0 is on no path: its gradient is 0 and stays 0.

    Args:
        model: the network.
        shape: of one input.
        every: how many steps to keep κ for.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], every: int = 1) -> None:
        self._parameters = dict(model.named_parameters())
        self._every, self._steps = every, 0
        first = kappa(model, shape).values()
        self._unit = sum(float(part.double().sum()) for part in first) / sum(part.numel() for part in first)
        self._compute: Callable[[], dict[str, Tensor]] = lambda: kappa(model, shape, self._unit)
        self._kappa: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Steps made, the unit of κ, and κ where it is kept for further steps."""
        return {"steps": self._steps, "unit": self._unit, "kappa": self._kappa if self._steps % self._every else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._steps, self._unit, self._kappa = state["steps"], state["unit"], state["kappa"]

    @torch.no_grad()
    def divide_(self) -> None:
        """Divide every gradient; call between `backward` and `step`."""
        if self._steps % self._every == 0:
            with torch.enable_grad():
                self._kappa = list(self._compute().values())
            for part in self._kappa:
                part.clamp_min_(torch.finfo(part.dtype).tiny)
        self._steps += 1
        for parameter, part in zip(self._parameters.values(), self._kappa, strict=True):
            if parameter.grad is not None:
                parameter.grad.div_(part)


def condition_(symmetries: Symmetries, shape: Sequence[int], tol: float = 1e-9) -> tuple[float, float, float]:
    """Move a network to the rescaling-equivalent point that PathCond chooses, in place.

    Minimises f(z) = P·log Σ_i κ_i e^(−2(Bz)_i) + 2 Σ_i (Bz)_i over log-scales z, where (Bz)_i is the log-scale of weight i
    and P the number of weights with κ > 0: the trace of the path kernel against its determinant (of its diagonal). Convex.

    Args:
        symmetries: of the network.
        shape: of one input.
        tol: on the largest entry of ∇f / P.

    Returns:
        f before and after, and the largest entry of ∇f / P after.
    """
    objective = _Objective(symmetries, kappa(symmetries.model, shape))
    z = torch.zeros(symmetries.num_free, dtype=torch.float64, requires_grad=True)
    before = float(objective(z.detach()))
    solver = optim.LBFGS(
        [z],
        max_iter=_EVALUATIONS,
        max_eval=_EVALUATIONS,
        tolerance_grad=tol * objective.count,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = objective(z)
        value.backward()
        return value

    if symmetries.num_free:
        solver.step(closure)
    z.grad = None
    after = objective(z)
    after.backward()
    assert z.grad is not None
    slope = float(z.grad.abs().max()) / objective.count if symmetries.num_free else 0.0
    symmetries.rescale_(z.detach())
    return before, float(after.detach()), slope


class _Objective:
    """f(z) on κ summed over the axes along which a weight's scale does not vary."""

    def __init__(self, symmetries: Symmetries, kappas: dict[str, Tensor]) -> None:
        self._terms: list[tuple[Tensor, Tensor, Scaling]] = []
        self.count = 0.0
        for scaling in symmetries.scalings:
            if scaling.kind != "parameter":
                continue
            weight = kappas[next(name for name in scaling.names if name in kappas)].detach().cpu().double()
            present = (weight > 0).double()
            constant = [axis for axis in range(weight.dim()) if all(ids.size(axis) == 1 for _, ids in scaling.factors)]
            if constant:
                weight, present = (part.sum(constant, keepdim=True) for part in (weight, present))
            self.count += float(present.sum())
            self._terms.append((weight, present, scaling))

    def __call__(self, z: Tensor) -> Tensor:
        logs, linear = [], z.new_zeros(())
        for weight, present, scaling in self._terms:
            scale = scaling.log_scales(z)
            logs.append((weight.log() - 2 * scale).flatten().logsumexp(0))
            linear = linear + (present * scale).sum()
        return self.count * torch.stack(logs).logsumexp(0) + 2 * linear
