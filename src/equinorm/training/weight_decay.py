"""Coupled weight decay inside an optimizer's averages, told apart exactly.

With coupled weight decay λ an average of degree 1 is

    M = Σ_i a_i (g_i + λ w_i) = Σ_i a_i g_i + λ Σ_i a_i w_i,

whose first part scales by 1/s and whose second by s; one of degree 2 is Σ a_i g_i² + 2λ Σ a_i g_i w_i + λ² Σ a_i w_i², with the
factors s^−2, 1 and s². The parts that contain w are kept beside the optimizer by its own recursion, so that after a rescaling
the average is the one of an optimizer that had worked in the new coordinates from the start.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from equinorm import native
from equinorm._errors import EquinormError, RescaleError
from equinorm.rescaling.optimizer_laws import Average, Group, Law, coupled_decay, laws
from equinorm.rescaling.optimizer_state import check_group, refusal, state_of
from equinorm.sharding.boxes import held_like
from equinorm.training.decay_recursion import CompiledFollow, Entering, Parts, follow

SWITCHES = {"momentum_buffer": "momentum", "grad_avg": "centered", "max_exp_avg_sq": "amsgrad"}
"""States that PyTorch's optimizers keep only where a setting is neither False nor 0, and that setting."""


@dataclass(frozen=True, slots=True, eq=False)
class _SteppedParameter:
    """A parameter that is about to be stepped.

    Attributes:
        name: of the parameter.
        parameter: itself.
        group: that it is in.
        decay: weight decay that enters its averages.
        laws: of the states that an optimizer with the settings of this group keeps.
        present: keys of the states that are there already.
    """

    name: str
    parameter: Tensor
    group: Group
    decay: float
    laws: Mapping[str, Law]
    present: frozenset[str]


class DecayParts:
    """The parts of an optimizer's averages that contain weights.

    Args:
        optimizer: whose averages.
        names: name by `id` of every parameter that moves.
        offsets: number that the network adds before it uses the tensor, by name, where it is not 0.
        compile: the recursion of averages of degree 1, by kernels in C++ or torch.compile; None: by kernels that came with the
            package.

    Attributes:
        moving: names of the parameters that move now; others may later, and are followed until then.
        is_following: False from when steps are made without `before_step`: what is known is then of the past.
    """

    def __init__(
        self, optimizer: optim.Optimizer, names: Mapping[int, str], offsets: Mapping[str, float], compile: bool | None = False
    ) -> None:
        self._optimizer, self._names, self._offsets = optimizer, names, offsets
        self._parts: dict[str, dict[str, Parts]] = {}  # of every parameter whose averages were followed from their start
        self._late: set[str] = set()  # parameters whose averages were there already
        self._entered = False
        self.is_following = True
        self.moving = {*names.values()}
        self._loaded: set[str] = set()  # what was loaded since the last step: the optimizer's state, ours
        self._early: dict[str, dict[str, Parts]] | None = None  # ours, loaded before the optimizer's state was made
        self._handle = optimizer.register_load_state_dict_post_hook(self._after_loading)
        self._follow = CompiledFollow(bool(compile)) if native.are_wanted(compile) else follow
        laws(optimizer)

    def of(self, name: str, key: str) -> Parts:
        """The parts of one state tensor; empty if it holds no weight decay."""
        return self._parts.get(name, {}).get(key, {})

    def tensors(self) -> list[Tensor]:
        """All parts."""
        return [part for states in self._parts.values() for parts in states.values() for part in parts.values()]

    def before_step(self, is_idle: bool = False) -> None:
        """Follow what the optimizer is about to do. Call it before every step, with the gradients in place.

        Args:
            is_idle: does the step only make the optimizer's state, as before it is loaded?

        Raises:
            RescaleError: if an average contains weight decay that was not followed from its start, or cannot be.
        """
        if self._loaded == {"optimizer"}:  # what we followed belongs to a state that is gone
            self._parts, self._late = {}, set()
        self._early = None
        if is_idle and self._loaded == {"ours"}:
            self._early, self._parts = self._parts, {}
        self._loaded = set()
        if self._entered:
            raise RescaleError(
                "the optimizer's last step did not end, so how much of its state is weight decay is not known any more. "
                "Load a checkpoint, or clear the optimizer's state and create a new ENorm."
            )
        stepped = [*self._stepped()]
        for one in stepped:
            self._meet_(one)
        entries = [(one, key, average) for one in stepped for key, average in self._entries(one)]  # refuses first
        self._entered = bool(entries)
        entering = [self._entering(*entry) for entry in entries]
        try:
            self._follow([one.plain for one in entering if one.is_plain])
        except EquinormError:  # it cannot be compiled: nothing was done
            self._entered = False
            raise
        for one in entering:
            if not one.is_plain:
                one.enter_(self._optimizer)

    def _after_loading(self, _: optim.Optimizer) -> None:
        """The optimizer's state was loaded; what was loaded for it before belongs to it."""
        self._loaded.add("optimizer")
        if self._early is not None:
            self.take(self._early)
            self._early = None

    def after_step(self) -> None:
        """The step has ended."""
        self._entered = False

    def stop(self) -> None:
        """Follow no more."""
        self.is_following = False
        self._handle.remove()

    def _stepped(self) -> Iterator[_SteppedParameter]:
        """The parameters that the optimizer is about to step, but for those that are known to hold no weight decay."""
        for group in self._optimizer.param_groups:
            decay, kept = coupled_decay(self._optimizer, group), self._kept(group)
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                check_group(self._optimizer, group, name)
                if not decay and (name in self._late or (name in self._parts and not self._parts[name])):
                    continue
                yield _SteppedParameter(name, parameter, group, decay, kept, self._present(parameter, name))

    def _present(self, parameter: Tensor, name: str) -> frozenset[str]:
        """Keys of the averages of a parameter that are there already."""
        if name not in self._parts and float(self._optimizer.state.get(parameter, {}).get("step", 1)) == 0:
            return frozenset()  # Adagrad makes its state, still zero, before the first step
        return frozenset(key for key, _, law in state_of(self._optimizer, parameter, name) if not law.is_copy)

    def _meet_(self, stepped: _SteppedParameter) -> None:
        """Note what starts with this step: a parameter without averages is followed, an average that is gone is anew."""
        if stepped.name not in self._parts:
            if stepped.present:
                self._late.add(stepped.name)
                return
            self._parts[stepped.name] = {}
        for key in stepped.laws.keys() - stepped.present:
            self._parts[stepped.name].pop(key, None)

    def _entries(self, stepped: _SteppedParameter) -> Iterator[tuple[str, Average]]:
        """Key and recursion of each average that weight decay enters, or has entered."""
        for key, law in stepped.laws.items():
            self.check(stepped.group, law, key, stepped.name, key in stepped.present)
            if law.average is not None and (stepped.decay or self.of(stepped.name, key)):
                yield key, law.average

    def _entering(self, stepped: _SteppedParameter, key: str, average: Average) -> Entering:
        """What this step does to one average, whose parts are there from now on."""
        group, parameter = stepped.group, stepped.parameter
        parts = self._parts.setdefault(stepped.name, {}).setdefault(key, {})
        for exponent in _powers(average):
            parts.setdefault(exponent, torch.zeros_like(parameter))
        starts = average.starts_whole and key not in self._optimizer.state.get(parameter, {})
        add = (1.0 if starts else average.add(group)) * stepped.decay
        is_plain = average.degree == 1 and getattr(self._optimizer, "found_inf", None) is None
        is_ascent = bool(group.get("maximize", False))
        return Entering(parts, parameter, average.keep(group), add, stepped.decay, is_ascent, is_plain)

    def _kept(self, group: Group) -> dict[str, Law]:
        """Laws of the states that an optimizer with these settings keeps: all but those that a setting has switched off."""
        off = {key for key, setting in SWITCHES.items() if not group.get(setting, True)}
        return {key: law for key, law in laws(self._optimizer).items() if key not in off}

    def check(self, group: Group, law: Law, key: str, name: str, is_present: bool) -> None:
        """Refuse a state whose weight decay cannot be told apart.

        Raises:
            RescaleError: if it was not followed from its start, or is no sum of parts.
        """
        decay = coupled_decay(self._optimizer, group)
        if not decay or law.is_copy or name not in self.moving:
            return
        if law.average is None:
            remedy = "Use decoupled weight decay, or none."
        elif name in self._offsets:
            remedy = f"It is used as {self._offsets[name]:g} + w: exclude it from weight decay."
        elif is_present and not (self.is_following and name in self._parts):
            remedy = (
                "How much of it is weight decay is not known: create ENorm before the first step, or load its state_dict. In a "
                "run that began without ENorm, begin the optimizer's averages anew: optimizer.state.clear()."
            )
        else:
            return
        raise refusal(self._optimizer, key, name, decay, remedy)

    def check_settings(self) -> None:
        """Refuse what the first step would, before there is one: averages of these settings that are no sums.

        Raises:
            RescaleError: which names the state and the first parameter that has it.
        """
        for group in self._optimizer.param_groups:
            self._check_formulas(group)
            for name in filter(self.moving.__contains__, (self._names.get(id(p), "") for p in group["params"])):
                check_group(self._optimizer, group, name)
                for key, law in self._kept(group).items():
                    self.check(group, law, key, name, is_present=False)

    def _check_formulas(self, group: Group) -> None:
        """Refuse an optimizer that was said to be like another, and lacks the settings of its formulas."""
        for key, law in self._kept(group).items():
            try:
                _ = law.average is not None and (law.average.keep(group), law.average.add(group))
            except KeyError as error:
                kind = type(self._optimizer).__name__
                raise RescaleError(
                    f"{kind} was registered to keep {key!r} as another optimizer does, whose setting {error} it has not. "
                    "Register the exponents of its states instead."
                ) from None

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, dict[str, Parts]]:
        """The parts by parameter name, state key and exponent of s; zeros where they start with the next step.

        `torch.distributed.checkpoint` loads into what is there, and nothing else.
        """
        found = {name: {key: dict(parts) for key, parts in states.items()} for name, states in self._parts.items()}
        for group in self._optimizer.param_groups if self.is_following else ():
            averages = {key: law.average for key, law in self._kept(group).items() if law.average is not None}
            for parameter in group["params"] if coupled_decay(self._optimizer, group) else ():
                name = self._names.get(id(parameter))
                if name is None or name in found or not parameter.requires_grad or self._present(parameter, name):
                    continue
                found[name] = {
                    key: {power: torch.zeros_like(parameter.detach()) for power in _powers(average)}
                    for key, average in averages.items()
                }
        return found

    def read(self, state: Mapping[str, Mapping[str, Mapping[int, Tensor]]]) -> dict[str, dict[str, Parts]]:
        """What `state_dict` returned, of parameters that this optimizer trains.

        Raises:
            RescaleError: if it names averages that this optimizer does not have, or other shapes.
        """
        tensors = dict(self._parameters())
        loaded: dict[str, dict[str, Parts]] = {}
        for name, states in items(state):
            loaded[name] = {}
            for key, parts in items(states):
                law = laws(self._optimizer).get(str(key))
                powers = () if law is None or law.average is None else _powers(law.average)
                if tuple(sorted(power for power, _ in items(parts))) != powers or not powers:
                    kind = type(self._optimizer).__name__
                    raise RescaleError(f"the state holds weight decay of {name} in {key!r}, which is not one of {kind}.")
                for power, part in items(parts):
                    loaded[name].setdefault(key, {})[power] = _like(part, tensors[name], name)
        return loaded

    def take(self, loaded: dict[str, dict[str, Parts]]) -> None:
        """Go on from what `read` returned."""
        self._parts, self._late, self._entered = loaded, set(), False
        self._loaded.add("ours")

    def trains(self, name: str) -> bool:
        """Is this one of the optimizer's parameters?"""
        return name in dict(self._parameters())

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._names:
                    yield self._names[id(parameter)], parameter


def _powers(average: Average) -> tuple[int, ...]:
    """Of s, by which the parts of an average that contain weights scale."""
    return (1,) if average.degree == 1 else (0, 2)


def items(found: Any) -> list[tuple[Any, Any]]:
    """Of a dict that was saved.

    Raises:
        RescaleError: for anything else.
    """
    if not isinstance(found, Mapping):
        raise RescaleError(f"not the weight decay that ENorm saves: {type(found).__name__} where a dict should be.")
    return list(found.items())


def _like(part: Any, parameter: Tensor, name: str) -> Tensor:
    """A copy on the parameter's device, in its dtype, and sharded as it is."""
    if not isinstance(part, Tensor) or part.shape != parameter.shape:
        shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise RescaleError(
            f"the state holds weight decay of {name} in shape {shape} where the model has {tuple(parameter.shape)}."
        )
    return held_like(f"weight decay of {name}", part, parameter)
