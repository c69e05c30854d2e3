"""Symmetries: every rescaling of a network's channels that leaves its function unchanged."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from equinorm._display import and_more
from equinorm._errors import BalanceError, EquinormError, ExportError, check_module, warn
from equinorm.balancing.balance import Balance, balance as balance_orbit
from equinorm.balancing.options import BalanceOptions
from equinorm.discovery.by_twin import discover_by_twin
from equinorm.discovery.discover import discover
from equinorm.discovery.graph.export import Graphs
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.discovery.inner_values import InnerValues
from equinorm.grouping.orbit import GroupedOrbit
from equinorm.modules.choosing import Choice, chosen, unwrapped
from equinorm.modules.copying import duplicate
from equinorm.modules.running import on_cpu
from equinorm.rescaling import description
from equinorm.rescaling.optimizer_wrappers import Optimizers
from equinorm.sharding.modules import is_any_sharded


@dataclass(frozen=True, slots=True, eq=False)
class Symmetries(GroupedOrbit):
    """The group of rescalings that `symmetries` discovered.

    Attributes:
        model: the network; untouched, and its weights were not read.
        num_free: dimension of the group: the number of free log-scales.
        scalings: how each parameter and floating-point buffer moves with the free log-scales.
        families: free classes by the tensor axis that introduced them.
        pins: channels that cannot scale, each with the operation and source line that says so.
        seconds: time for export and for interpretation.
        fingerprint: of the graph and its constants: equal for models that run the same operations.
        values: how every value inside the network scales, in the order of its graph: of the first inputs, in the model's mode.
        backward: functions with a backward pass of their own that the model calls; gradients behind them may not scale.
        casts: where the network rounds values that scale to fewer bits than their weights have (`h.bfloat16()`, autocast in a
            forward): their classes take powers of two only.
    """

    seconds: tuple[float, float] = field(repr=False)
    fingerprint: str = field(repr=False)

    @on_cpu()
    def balance(
        self,
        p: float = 2.0,
        c: float = 1.0,
        cycles: int | None = None,
        tol: float = 1e-6,
        method: str = "two-level",
        *,
        biases: bool = False,
        modules: Choice | None = None,
        progress: Callable[[int, float], None] | None = None,
        compile: bool | None = None,
    ) -> Balance:
        """Find the rescaling-equivalent weights of least ℓp norm; the model is untouched.

        Minimises φ(z) = Σ_k c_k ‖W_k(z)‖_p^p over log-scales z, with c_k = c^(−pk) for a weight of depth k (the largest
        c^(−k)·|w| if p = ∞). For finite p the minimum is unique on the channels that a path of nonzero weights joins to an
        input and to an output; the others (dead) stay at scale 1. For p = ∞ the least maximum is reached, provably, at one
        of many points: channels below it are made even.

        Args:
            p: any positive number, or math.inf (cross-layer equalization).
            c: asymmetry: at the optimum each channel's out-norm is c times its in-norm on a chain of layers. c > 1 moves energy
                towards the output.
            cycles: exactly so many cycles; None for as many as `tol` takes, at most 10,000.
            tol: on ρ = ‖r − s‖₁ / ‖r + s‖₁ of the channels' in- and out-energies; for p = ∞ see `Balance.residuals`.
            method: "two-level" (first one scalar for each layer, then one for each channel, accelerated) or "cyclic"
                (Algorithm 1 of the paper: layer by layer on current weights).
            biases: count biases in the norm too. They are always rescaled.
            modules: names or modules outside of which nothing may move; None for the whole model.
            progress: called after every cycle with its number and the residual.
            compile: read large weights with kernels in C++, for p = 1 and 2 on a CPU. None: if they came with the package.
                True: otherwise g++ or clang++ compiles them now, in a second or two.

        Returns:
            The balanced point and its record. Running out of cycles is a result with a reason, not an error.

        Raises:
            EquinormError: for arguments out of range, weights that are NaN, inf or on the meta device, or no compiler.

        Source: Stock, Graham, Gribonval, Jégou, ICLR 2019, Section 3; Algorithm 1.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> balance = equinorm.symmetries(net, (torch.randn(1, 8),)).balance()
        >>> balance.converged, balance.norm_after < balance.norm_before
        (True, True)
        """
        if progress is not None and not callable(progress):
            raise BalanceError(f"progress must be a function of a cycle's number and residual, not {progress!r}.")
        options = BalanceOptions(p, c, cycles, tol, method, biases, modules, compile)
        if p == math.inf:
            _warn_of_batch_norm(self.values)
        return balance_orbit(self, options, progress)

    def details(self) -> str:
        """How every tensor moves, and every pin, however many lines that takes; `print(symmetries)` fits a screen.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> print(equinorm.symmetries(net, (torch.randn(1, 8),)).details())
        Sequential: 16 free scale classes in 1 family; 98.1% of the parameters move
          0.weight [16, 8]: axis 0 × 0.weight[0]
          0.bias [16]: axis 0 × 0.weight[0]
          2.weight [4, 16]: axis 1 ÷ 0.weight[0]
        pinned:
          2.weight[0]: 4 channels by model output
        """
        return description.details(self)

    def __str__(self) -> str:
        return description.text(self)

    def _repr_html_(self) -> str:
        return description.markup(self)


def _warn_of_batch_norm(values: InnerValues) -> None:
    """Say that least maximum weights are not those that quantizers round where they fold batch normalization first."""
    norms = [value for value in values if "batch_norm" in value.operator and "running_mean" in value.reads]
    if norms:
        names = [repr(norm.module or norm.name) for norm in norms]
        warn(
            f"{and_more(names, 1)} (batch normalization) will be folded into the layers beside it when "
            "the network is quantized, and p = inf evens out the weights as they are now, not the folded ones. Fold first: "
            "equinorm.quantization.prepare(model, args) gives a folded copy to balance."
        )


@on_cpu()
def symmetries(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_norm: str = "affine",
    both_modes: bool = False,
    opaque: Choice = (),
    also: Sequence[tuple | Tensor | Mapping[str, Any]] = (),
) -> Symmetries:
    """Discover every rescaling of channels that leaves a network's function unchanged.

    The model is exported once with `torch.export` and its graph is run on integer labels instead of numbers. Operations
    without a rule pin what they touch, so that what is found is exact: sound for every input of these shapes, in the mode
    (training or evaluation) that the model is in. Weights are not read; tensors on the meta device suffice. Integer buffers
    count as constants.

    Args:
        model: any module that `torch.export` can handle; torch.compile, DistributedDataParallel, DataParallel and AveragedModel
            are looked through. One that fully_shard or parallelize_module has sharded is analysed by an unsharded twin without
            numbers; every process must call this, and whatever reads or moves its weights.
        args: its positional inputs, a tuple (one tensor may stand alone).
        kwargs: its keyword inputs.
        batch_norm: "affine": exact in both modes; γ and β are a neuron's incoming weights and what stands in front of the
            normalization is pinned. "evaluation": as the affine map that it is in evaluation mode: the weights in front and the
            running mean scale too, and γ by the inverse; exact in that mode only, so not for models that are trained further.
            "statistics": the weights in front, γ, β and the running statistics scale together, exact only up to the
            normalization's eps.
        both_modes: find what holds in training and in evaluation mode, from one export of each, instead of what holds in the
            mode that the model is in.
        opaque: names or submodules that `torch.export` cannot record, or that it should not look into. What they are given,
            what they return, and their own tensors are pinned. The model runs once, as it is, to see what they return; they
            must return tensors of the same shapes, and the same numbers beside them, for all inputs.
        also: further inputs, each a tuple of positional ones or a dict of keyword ones in place of the first: what holds for
            all of them. For models that compute something else for other shapes: positions up to a sequence's length, say.

    Returns:
        The group: its dimension, how every tensor moves, and why channels are pinned.

    Raises:
        ExportError: if the model cannot be exported with these inputs.

    Source: PyTorch's exported graphs; positive homogeneity as in Stock et al., ICLR 2019, Section 3.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> equinorm.symmetries(net, (torch.randn(1, 8),)).num_free
    16
    """
    if batch_norm not in ("affine", "evaluation", "statistics"):
        raise EquinormError(f"batch_norm must be 'affine', 'evaluation' or 'statistics', not {batch_norm!r}.")
    return symmetries_of(graphs_of(model, args, kwargs, opaque, both_modes=both_modes, also=also), batch_norm)


def symmetries_of(graphs: Graphs, batch_norm: str = "affine", *, inner: bool = True) -> Symmetries:
    """What `symmetries` finds in graphs that others may read too.

    Args:
        graphs: of a model.
        batch_norm: "affine", "evaluation" or "statistics".
        inner: False to record no values and to drop the graphs, for models of which much else must fit into memory.
    """
    found = (discover_by_twin if is_any_sharded(graphs.model) else discover)(graphs, batch_norm, inner=inner)
    return Symmetries(graphs.model, **{part.name: getattr(found, part.name) for part in fields(found)})


def balance_(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    p: float = 2.0,
    *,
    optimizer: Optimizers | None = None,
    power_of_two: bool = False,
    opaque: Choice = (),
    **options: Any,
) -> Balance:
    """Balance a model in place: `symmetries(model, args, kwargs).balance(p, **options).apply_(optimizer, power_of_two)`.

    Args:
        model: any module that `torch.export` can handle.
        args: its positional inputs.
        kwargs: its keyword inputs.
        p: the norm.
        optimizer: one or several, whose state to move along.
        power_of_two: round scales to powers of two.
        opaque: names or submodules that are not looked into, as in `symmetries`.
        options: further arguments of `Symmetries.balance`.

    Returns:
        The record of the balance that was applied.

    Raises:
        EquinormError: if any of the three steps refuses; nothing is written then.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> equinorm.balance_(net, (torch.randn(1, 8),)).converged
    True
    """
    found = symmetries(model, args, kwargs, opaque=opaque).balance(p, **options)
    found.apply_(optimizer, power_of_two)
    return found


def balance(
    model: nn.Module,
    args: tuple | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    p: float = 2.0,
    *,
    power_of_two: bool = False,
    opaque: Choice = (),
    **options: Any,
) -> nn.Module:
    """A balanced copy of a model: `balance_` on a copy. The model is untouched.

    The copy has its own memory. Its class, dtypes, devices, ties, buffers, hooks and mode are the model's; it has no gradients.

    Args:
        model: any module that `torch.export` can handle and `copy.deepcopy` can copy.
        args: its positional inputs.
        kwargs: its keyword inputs.
        p: the norm.
        power_of_two: round scales to powers of two.
        opaque: names or submodules that are not looked into, as in `symmetries`.
        options: further arguments of `Symmetries.balance`.

    Returns:
        The copy.

    Raises:
        EquinormError: if the model cannot be copied, or cannot be balanced.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> x = torch.randn(1, 8)
    >>> balanced = equinorm.balance(net, (x,))
    >>> equinorm.deviation(net, balanced, (x,)) < 1e-5
    True
    """
    check_module(model)
    if "optimizer" in options:
        raise BalanceError("an optimizer holds the state of the model's own weights, not of a copy's: use balance_ with it.")
    inner = unwrapped(model)
    hidden = list(chosen(inner, opaque, ExportError, "opaque"))
    if options.get("modules") is not None:
        options["modules"] = list(chosen(inner, options["modules"], BalanceError, "modules"))
    copied = duplicate(model, "to balance the copy", ", or balance the model itself with balance_")
    balance_(copied, args, kwargs, p, power_of_two=power_of_two, opaque=hidden, **options)
    return copied
