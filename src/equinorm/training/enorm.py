"""ENorm while training: a few cycles after every optimizer step, and everything that belongs to the weights moves along."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn, optim

from equinorm._errors import EquinormError, RescaleError, describe
from equinorm._symmetries import symmetries
from equinorm.balancing.norm import Norm
from equinorm.balancing.scope import held_classes
from equinorm.modules.choosing import Choice, unwrapped
from equinorm.modules.running import on_cpu
from equinorm.rescaling.casts import check_training
from equinorm.rescaling.optimizer_wrappers import Optimizers, unwrapped_optimizers
from equinorm.sharding.modules import is_any_sharded
from equinorm.training.averages import listed
from equinorm.training.selection import Selection
from equinorm.training.settings import SelectionOptions, Settings, StepOptions
from equinorm.training.step import Step
from equinorm.training.turns import Turns


class ENorm:
    """Equi-normalization after every step of an optimizer.

    Each time the optimizer has stepped, weights move along their rescaling orbit towards the point of least ℓp norm:
    W_k ← D_{k−1}^{−1} W_k D_k with D = √(R / cL) for each channel, R its out-norm and L its in-norm. The rescaling leaves
    the network's function as it is. Biases, buffers, gradients, averaged weights and the state of the optimizer move along, so
    that the next update is the one of an optimizer that had worked at the new point from the start.

    Args:
        optimizer: one, or a list of all that train the model, such as Muon beside AdamW; a step is over when all have stepped.
            SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, RMSprop, Adadelta, Rprop, Muon, LBFGS, Lion (lion_pytorch, timm),
            those of schedulefree, Adafactor where no scale differs along what it averages over, or one that
            `register_optimizer` knows. Coupled weight decay inside averages is followed exactly. The wrappers of accelerate
            and Lightning are looked through, and the slow weights of Lookahead (timm, pytorch_optimizer) move along.
        model: the network that it trains; torch.compile, DistributedDataParallel and DataParallel are looked through.
        args: example inputs, a tuple (one tensor may stand alone). The model is exported with them once in each mode, and
            what moves leaves the function as it is in both.
        kwargs: example keyword inputs.
        p: the norm, any positive number or math.inf.
        c: asymmetry; above 1 moves energy towards the output. `hook.c` may be set while training.
        cycles: how many, each time.
        every: run after every so many steps only.
        method: "cyclic": cycles of Algorithm 1. "two-level": cycles of the two-level method, which follow the exact minimiser.
        biases: count biases in the norm. They are rescaled either way.
        match_biases: False leaves biases as they are, which changes the network's function; as the authors' code did, which
            also let them take plain steps (`symmetric_biases=False`).
        symmetric_biases: where c is not 1, the optimizer's steps of biases (weight decay included) are changed to what they
            would be at c = 1, since plain ones diverge in networks of more than about ten layers: relative to the bias they
            are c^{k(q−k)} times as long behind layer k of q, 237 times in the middle of 11 layers for c = 1.2. False: plain
            steps.
        batch_norm: "affine" or "statistics", as in `symmetries`.
        modules: names or modules outside of which nothing may move.
        frozen: "hold": parameters that do not require gradients stay as they are, and so does every class that would move one;
            a warning says so. What has been saved of them elsewhere, as the base of adapters (PEFT, LoRA), stays valid. What
            is unfrozen while training moves from then on. "move": they are rescaled like others.
        opaque: names or submodules that `torch.export` cannot record, as in `symmetries`.
        also: further example inputs, of other shapes, as in `symmetries`.
        averages: averaged weights of this model, one or a list of: a module (`torch.optim.swa_utils.AveragedModel`, timm's
            `ModelEmaV3`), an object with `shadow_params` (those of torch_ema and diffusers), or a dict of tensors by the names
            of the model's parameters.
        gradients: rescale gradients that are still there after the step, those behind clamps in hooks or in autograd functions
            as if their backward pass were linear. False saves the time where they are zeroed anyway; of several optimizers
            those of the last one that stepped.
        power_of_two: round scales to powers of two, exact in every dtype short of its limits; needed for float16 and bfloat16
            weights, and where the model itself casts what scales to fewer bits, as by h.bfloat16(); not for autocast.
        compile: run the passes over the weights as compiled kernels, 1.4 to 2 times as fast on a CPU. None: on a CPU, if
            they came with the package. True: otherwise g++ or clang++ compiles them now, in a second or two; on a GPU
            torch.compile makes them at the first step. False: PyTorch's operations.

    Attributes:
        settings: p, c, cycles, every and method.
        symmetries: what was found, with what is pinned and why.
        optimizers: that it hangs on, without their wrappers.
        steps: how many steps the optimizer has made, or all of several together.

    Raises:
        ExportError: if the model cannot be exported.
        BalanceError: for arguments out of range, and if no channel of the model can be rescaled.
        RescaleError: for optimizers that are not known and tensors that cannot be moved exactly. Later, at a step, if the
            model has changed or if weight decay in the optimizer's state is not known; no weight has moved then.

    Source: Stock, Graham, Gribonval, Jégou, ICLR 2019, Algorithm 1 and Sections 3.5 and 4.

    >>> import torch, equinorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> hook = equinorm.ENorm(optimizer, net, (torch.randn(1, 8),))
    >>> before = hook.residual()
    >>> net(torch.randn(32, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> hook.residual() < before
    True
    """

    @on_cpu()
    def __init__(
        self,
        optimizer: Optimizers,
        model: nn.Module,
        args: tuple | Tensor,
        kwargs: Mapping[str, Any] | None = None,
        p: float = 2.0,
        c: float = 1.0,
        *,
        cycles: int = 1,
        every: int = 1,
        method: str = "cyclic",
        biases: bool = False,
        match_biases: bool = True,
        symmetric_biases: bool = True,
        batch_norm: str = "affine",
        modules: Choice | None = None,
        frozen: str = "hold",
        opaque: Choice = (),
        also: Sequence[tuple | Tensor | Mapping[str, Any]] = (),
        averages: Any = (),
        gradients: bool = True,
        power_of_two: bool = False,
        compile: bool | None = None,
    ) -> None:
        stepped = unwrapped_optimizers(optimizer)
        self.settings = Settings(p, c, cycles, every, method)
        wanted = SelectionOptions(biases, match_biases, frozen)
        options = StepOptions(Norm(p), method, symmetric_biases, power_of_two, compile)
        self.optimizers, self.model = tuple(one for one, _ in stepped), unwrapped(model)
        self.steps, self._turns, self._gradients = 0, Turns(self.optimizers), gradients
        self.symmetries = found = symmetries(
            self.model, args, kwargs, batch_norm=batch_norm, both_modes=True, opaque=opaque, also=also
        )
        held = held_classes(found, modules)
        selection = Selection(found, held, wanted)
        selection.check(modules)
        check_training(found.casts, held, selection.candidates, power_of_two)
        copies = listed(averages)
        options = options.sharded(copies) if is_any_sharded(self.model) else options
        self._step = Step(found, selection, stepped, copies, c, options)
        selection.tell()
        self._check_hooks()
        reason = "ENorm runs between graphs: compile the step without fullgraph=True, or the model alone"
        untraced: Any = partial(torch.compiler.disable, reason=reason)
        self._look, self._residual, self._run = map(
            untraced, (self._step.before_step, self._step.residual, self._step.run_cycles)
        )
        before, after = untraced(self._before_step), untraced(self._after_step)
        self._handles = [one.register_step_pre_hook(before) for one in self.optimizers]
        self._handles += [one.register_step_post_hook(after) for one in self.optimizers]

    def _check_hooks(self) -> None:
        """Refuse an optimizer after whose steps another hook moves the same tensors."""
        for hook in [hook for one in self.optimizers for hook in one._optimizer_step_post_hooks.values()]:
            other = getattr(inspect.unwrap(hook), "__self__", None)
            if isinstance(other, ENorm) and other._step.shares(self._step):
                way = "call its remove() first, or make a new optimizer if you did not keep it"
                raise RescaleError(f"this optimizer is hooked already, by {other!r}: {way}.")

    # ---------------------------------------------------------------------------------------------------------- using

    @property
    def c(self) -> float:
        """Asymmetry; may be set while training."""
        return self.settings.c

    @c.setter
    def c(self, value: float) -> None:
        settings = replace(self.settings, c=value)
        self._step.weigh(value)
        self.settings = settings

    def residual(self) -> float:
        """ρ = ‖r − s‖₁ / ‖r + s‖₁ of the current weights, r and s the in- and out-energies (p = ∞: maxima) of the channels.

        NaN if one of these is not finite.
        """
        return self._residual()

    def cycle_(self) -> None:
        """Run the cycles now, whatever `every` says: for loops without `optimizer.step()`, or to start balanced.

        Raises:
            RescaleError: if the model has changed since it was analysed, or a state tensor cannot move; nothing has moved then.
        """
        self._run(self.settings.cycles, self._gradients)

    def remove(self) -> None:
        """Detach from the optimizer. The weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._step.optimizers.stop()
        self._step.forget()

    def __enter__(self) -> "ENorm":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """Steps made, c, and the weight decay inside of the optimizers' averages; save it with the optimizers' own states.

        Tensors are references, as in `torch.optim`. Between the steps of several optimizers it also says which have stepped.
        """
        between = {"stepped": [*self._turns.counts]} if any(self._turns.counts) else {}
        return {"steps": self.steps, "c": self.c, "decay": self._step.optimizers.state_dict(), **between}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            RescaleError: if it belongs to another model.
        """
        if not isinstance(state, Mapping) or {*state} - {"stepped"} != {"steps", "c", "decay"}:
            what = (", ".join(map(str, state)) or "nothing") if isinstance(state, Mapping) else type(state).__name__
            raise RescaleError(f"not a state of ENorm, which holds steps, c and decay: {what}.")
        if type(state["steps"]) is not int or state["steps"] < 0:
            raise RescaleError(f"steps must be an integer of at least 0, not {state['steps']!r}.")
        turns = Turns(self.optimizers, state.get("stepped"))
        Settings(**{**asdict(self.settings), "c": state["c"]})
        self._step.optimizers.load_state_dict(state["decay"])
        self.steps, self.c, self._turns = state["steps"], state["c"], turns

    def __reduce__(self) -> NoReturn:
        raise EquinormError(
            "a hook belongs to one optimizer and one model, and is not copied or pickled: keep it outside of the model, make a "
            "new ENorm for a copy of both, and load what state_dict() gives."
        )

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in asdict(self.settings).items())
        return f"ENorm({describe(self.model)}: {self.symmetries.num_free} free scale classes, {options}, {self.steps} steps)"

    def _before_step(self, optimizer: optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Look at the gradients that the step will use: where it calls a closure, only that computes them."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._look(optimizer)
            return None

        def followed() -> Any:
            loss = closure()
            self._look(optimizer)
            return loss

        return ((*args[:1], followed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": followed})

    def _after_step(self, optimizer: optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._step.after_step(optimizer) and self._turns.take(optimizer):
            self.steps += 1
            if self.steps % self.settings.every == 0:  # another's gradients may be those of a step to come
                used = None if self._gradients else optimizer
                self._step.run_cycles(self.settings.cycles, self._gradients or len(self.optimizers) > 1, used)
