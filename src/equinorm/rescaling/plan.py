"""A plan: one member of a network's orbit, apart from any module, to be applied wherever the same tensors are."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from equinorm._display import and_more, count, storing
from equinorm._errors import RescaleError, describe
from equinorm._memory import place_of
from equinorm._scaling import Cast, Scaling
from equinorm.modules.choosing import tensors_of, unwrapped
from equinorm.rescaling.optimizer_wrappers import Optimizers
from equinorm.rescaling.orbit import Orbit
from equinorm.rescaling.powers_of_two import round_to_powers_of_two
from equinorm.sharding.modules import reshard


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Log-scales together with how each tensor moves with them, by name: made on one machine, applied on another.

    A plan keeps a network's function whatever its weights are; they are those of least norm for the weights that it was made
    from.

    Attributes:
        log_scales: float64 natural logarithms of shape (num_free,).
        scalings: how each parameter and floating-point buffer moves with these, by its names in the model.
        stored: the same by the keys of a checkpoint's files, where these are not the names; else empty.
        casts: where the network rounds values that scale.
        backward: functions with a backward pass of their own that the model calls.

    >>> import copy, torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> twin = copy.deepcopy(net)
    >>> plan = equinorm.symmetries(net, torch.randn(1, 8)).balance().plan()
    >>> plan.apply_(twin)
    >>> equinorm.deviation(net, twin, torch.randn(1, 8)) < 1e-6
    True
    """

    log_scales: Tensor = field(repr=False)
    scalings: tuple[Scaling, ...] = field(repr=False)
    stored: tuple[Scaling, ...] = field(repr=False, default=())
    casts: tuple[Cast, ...] = field(repr=False, default=())
    backward: tuple[str, ...] = field(repr=False, default=())

    @property
    def num_free(self) -> int:
        """Number of free log-scales."""
        return len(self.log_scales)

    @property
    def fingerprint(self) -> str:
        """Of names, shapes and how each tensor moves, not of the log-scales: equal for plans that fit the same weights."""
        digest = hashlib.sha256()
        for scaling in (*self.scalings, *self.stored):
            facts = [scaling.names, scaling.shape, scaling.kind, scaling.offset, [e for e, _ in scaling.factors]]
            digest.update(json.dumps(facts).encode())
            for _, ids in scaling.factors:
                digest.update(json.dumps(ids.shape).encode())
                digest.update(np.ascontiguousarray(ids.numpy(), np.int64).tobytes())
        return digest.hexdigest()

    def bind(self, model: nn.Module) -> Orbit:
        """The orbit of a live module with these tensors; nothing is exported or read.

        Raises:
            RescaleError: if the model has other tensors, of other shapes, or tied otherwise.
        """
        model = unwrapped(model)
        reshard(model)
        self._check_fit(model)
        return Orbit(model, self.num_free, self.scalings, (), (), backward=self.backward, casts=self.casts)

    def apply_(self, model: nn.Module, optimizer: Optimizers | None = None) -> None:
        """Rescale a live module in place, all tensors or none.

        Args:
            model: with the tensors of the model that the plan was made for, by name.
            optimizer: one or several, whose state to move along.

        Raises:
            RescaleError: if the model does not fit, or cannot be rescaled exactly; nothing is written then.
        """
        self.bind(model).rescale_(self.log_scales, optimizer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a safetensors file, whole or not at all; one that exists is replaced.

        Raises:
            EquinormError: if it cannot be written, or safetensors is not installed.
        """
        storing().write_plan(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan that `save` has written.

        Raises:
            EquinormError: if the file cannot be read, is damaged or no plan, or safetensors is not installed.
        """
        return storing().read_plan(path)

    def rewrite(self, source: str | os.PathLike[str], output: str | os.PathLike[str]) -> int:
        """Write a checkpoint's folder, or one file of it, rescaled; the source stays as it is.

        Args:
            source: a folder with safetensors, or one such file.
            output: folder or file to write, which must not exist; it is absent or whole at any time.

        Returns:
            How many entries underflowed.

        Raises:
            EquinormError: if keys or shapes are not those of the plan, a tensor cannot be rescaled exactly, or the output
                cannot be written.
        """
        return storing().rewrite(self, source, output)

    def __str__(self) -> str:
        moving = [scaling for scaling in self.scalings if scaling.factors]
        most = float(self.log_scales.abs().max().exp()) if self.num_free else 1.0
        return (
            f"plan of {count(self.num_free, 'scale')} for {count(len(moving), 'tensor')} of {len(self.scalings)}, "
            f"the largest ×{most:.4g} or its inverse"
        )

    def _check_fit(self, model: nn.Module) -> None:
        """Refuse a model whose tensors are not those of the plan."""
        known = {name: scaling for scaling in self.scalings for name in scaling.names}
        tensors, what = tensors_of(model), describe(model)
        missing = [name for name in known if name not in tensors]
        unknown = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in known]
        for names, text in ((missing, "lacks"), (unknown, "has, and the plan does not know,")):
            if names:
                raise RescaleError(f"the plan does not fit: {what} {text} {count(len(names), 'tensor')}: {and_more(names)}.")
        for name, scaling in known.items():
            if tuple(tensors[name].shape) != scaling.shape:
                shapes = f"{tuple(tensors[name].shape)} in {what} and {scaling.shape} in the plan"
                raise RescaleError(f"the plan does not fit: {name} has shape {shapes}.")
        places: dict[Any, str] = {}
        for name, scaling in known.items():
            other = places.setdefault(place_of(tensors[name]), name)
            if other not in scaling.names and scaling.numel:
                raise RescaleError(f"the plan does not fit: {other} and {name} are tied in {what}, and not in the plan.")


def plan_of(orbit: Orbit, log_scales: Tensor, power_of_two: bool) -> Plan:
    """The plan that takes an orbit's model to some log-scales, rounded to powers of two if so asked."""
    if power_of_two:
        log_scales = round_to_powers_of_two(log_scales.double(), [*orbit.scalings, *orbit.casts])
    return Plan(log_scales.detach().clone(), orbit.scalings, (), orbit.casts, orbit.backward)
