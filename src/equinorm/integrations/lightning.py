"""ENorm as a callback of PyTorch Lightning, under either of its names, `lightning` and `pytorch_lightning`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import equinorm
from equinorm.integrations import check_options, example, first_installed, whole_state
from equinorm.modules.choosing import chosen, unwrapped

_PACKAGE: Any = first_installed(["lightning.pytorch", "pytorch_lightning"], "lightning")
Callback: Any = _PACKAGE.Callback

AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}
"""Callbacks that keep a copy of the module with averaged weights."""


class ENorm(Callback):
    """Equi-normalization after every optimizer step of `Trainer.fit`; saved and restored with Lightning's checkpoints.

    `equinorm.ENorm` is created when training starts, after checkpoints have been loaded, and removed when it ends. The copies
    in which Lightning's own callbacks average weights move along.

    Args:
        args: example inputs, a tuple (one tensor may stand alone). Default: the module's `example_input_array`.
        kwargs: example keyword inputs.
        module: name of the submodule that is exported. Default: the LightningModule itself, whose forward must then compute
            what its training_step trains, and nothing that needs a trainer.
        optimizer: which of several optimizers, counted from 0; a list of all that train the model, such as Muon beside AdamW.
        **options: everything else that `equinorm.ENorm` takes.

    Attributes:
        hook: the `equinorm.ENorm` of the current or last training, or None.

    Raises:
        ExportError: when training starts, if there are no example inputs, or the module cannot be exported with them.
        RescaleError: when training starts, if there are several optimizers and none was chosen; and as `equinorm.ENorm`.
    """

    def __init__(
        self,
        args: tuple | Tensor | None = None,
        kwargs: Mapping[str, Any] | None = None,
        module: str | None = None,
        optimizer: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.hook: equinorm.ENorm | None = None
        check_options(equinorm.ENorm, options)
        self._args, self._kwargs, self._module, self._optimizer, self._options = args, kwargs, module, optimizer, options
        self._restored: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Under which a checkpoint holds the state: several callbacks must differ in it."""
        return f"{type(self).__qualname__}(module={self._module!r}, optimizer={self._optimizer!r})"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget what an earlier run restored."""
        self._restored = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the hook."""
        self._remove()
        optimizers = self._optimizers(trainer.optimizers, pl_module)
        args, kwargs = trainer.precision_plugin.convert_input(self._example(pl_module))
        given = self._options.get("averages", ())
        averages = [*(given if isinstance(given, (tuple, list)) else [given]), *self._averages(trainer, pl_module)]
        options = {**self._options, "averages": averages}
        self.hook = equinorm.ENorm(optimizers, self._chosen(pl_module), args, kwargs, **options)
        if self._restored:
            self.hook.load_state_dict(self._restored)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the hook."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hook."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """What `equinorm.ENorm.state_dict` returns, whole in every process; what was restored, before training has started."""
        return self._restored if self.hook is None else whole_state(self.hook)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the hook is created."""
        self._restored = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hook: that belongs to one optimizer and one model."""
        return {**self.__dict__, "hook": None}

    def _optimizers(self, optimizers: Sequence[Any], pl_module: nn.Module) -> list[Any]:
        """Those that train the model, of all that the trainer has."""
        name, given = type(pl_module).__name__, self._optimizer
        if given is None and len(optimizers) != 1:
            raise equinorm.RescaleError(
                f"{name} has {len(optimizers)} optimizers; choose one of them, as in ENorm(optimizer=0), or all that train the "
                "model, as in ENorm(optimizer=[0, 1])."
            )
        places = [given or 0] if given is None or isinstance(given, int) else [*given]
        if not places or not all(isinstance(place, int) and 0 <= place < len(optimizers) for place in places):
            raise equinorm.RescaleError(f"optimizer={given!r}, but {name} has {len(optimizers)} of them, counted from 0.")
        return [optimizers[place] for place in places]

    def _chosen(self, pl_module: nn.Module) -> nn.Module:
        if self._module is None:
            if getattr(pl_module.forward, "__func__", None) is _PACKAGE.LightningModule.forward:
                names = [name for name, part in pl_module.named_children() if next(part.parameters(), None) is not None]
                parts = " or ".join(f"ENorm(module={name!r})" for name in names)
                raise equinorm.ExportError(
                    f"{type(pl_module).__name__} has no forward of its own, by which ENorm would find its symmetries. Name the "
                    f"submodule that it trains, as in {parts or 'ENorm(module=...)'}, or write a forward."
                )
            return pl_module
        (model,) = chosen(pl_module, self._module, equinorm.ExportError, "module").values()
        return model

    def _averages(self, trainer: Any, pl_module: Any) -> Iterator[nn.Module]:
        """The copies of the module in which other callbacks average its weights: they move along."""
        for callback in trainer.callbacks:
            if AVERAGING.isdisjoint(kind.__name__ for kind in type(callback).__mro__):
                continue
            copy = getattr(callback, "_average_model", None)
            if not isinstance(copy, nn.Module):
                raise equinorm.RescaleError(
                    f"{type(callback).__name__} averages weights, but the copy that it keeps is not where ENorm looks for it "
                    "(_average_model), and would not move along. Average with torch.optim.swa_utils and ENorm(averages=...)."
                )
            yield self._chosen(unwrapped(copy.to(pl_module.device)))

    def _remove(self) -> None:
        if self.hook is not None:
            self.hook.remove()

    def _example(self, pl_module: Any) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = self._args, self._kwargs
        if args is None and not kwargs:
            args = pl_module.example_input_array
            if args is None:
                raise equinorm.ExportError(
                    f"no example inputs for {type(pl_module).__name__}: pass ENorm(args=...), or set its example_input_array."
                )
            args, kwargs = ((), args) if isinstance(args, dict) else (args, None)
        return example(args, kwargs, pl_module.device)
