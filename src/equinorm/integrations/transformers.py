"""ENorm as a callback of Hugging Face's `transformers.Trainer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import equinorm
from equinorm.integrations import check_options, example, first_installed, whole_state
from equinorm.sharding.boxes import whole

TrainerCallback: Any = first_installed(["transformers"], "transformers").TrainerCallback

FILE = "equinorm.pt"
"""Written into every checkpoint of the Trainer."""


class ENormCallback(TrainerCallback):
    """Equi-normalization after every optimizer step of `Trainer.train`; saved and restored with the Trainer's checkpoints.

    `equinorm.ENorm` is created when training begins, after checkpoints have been loaded, and removed when it ends. Training
    that resumes reads `equinorm.pt` in `TrainingArguments.resume_from_checkpoint`, else in the checkpoint of that step in
    `output_dir`: the path given to `Trainer.train` alone does not reach callbacks. Where there is no such file, as after
    training without this callback, only the number of steps is taken over. Hyperparameter search saves no state.

    Args:
        args: example inputs, a tuple (one tensor may stand alone).
        kwargs: example keyword inputs. Default, if there are neither: the model's `dummy_inputs`, which language models have.
        **options: everything else that `equinorm.ENorm` takes.

    Attributes:
        hook: the `equinorm.ENorm` of the current or last training, or None.

    Raises:
        ExportError: when training begins, if there are no example inputs, or the model cannot be exported with them.
        RescaleError: when training begins, if the file belongs to other weights; and as `equinorm.ENorm`.
    """

    def __init__(self, args: tuple | Tensor | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any) -> None:
        self.hook: equinorm.ENorm | None = None
        check_options(equinorm.ENorm, options)
        self._args, self._kwargs, self._options = args, kwargs, options

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Create the hook."""
        model = objects["model"]
        self.on_train_end(args, state, control)
        self.hook = equinorm.ENorm(objects["optimizer"], model, *self._example(model), **self._options)
        if state.global_step:
            self._restore(self.hook, model, args, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Write the state beside the checkpoint, whole where the model is sharded: every process comes here."""
        if self.hook is None or args.save_only_model:
            return
        saved = {"hook": whole_state(self.hook), "weights": fingerprint(objects["model"])}
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            torch.save(saved, folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Remove the hook."""
        if self.hook is not None:
            self.hook.remove()

    @staticmethod
    def _restore(hook: equinorm.ENorm, model: nn.Module, args: Any, step: int) -> None:
        named = args.resume_from_checkpoint
        path = Path(named) / FILE if isinstance(named, str) else Path(args.output_dir, f"checkpoint-{step}", FILE)
        if not path.is_file():
            hook.steps = step
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["weights"] != fingerprint(model):
            raise equinorm.RescaleError(
                f"{path} was saved with other weights than those that training resumes with. "
                "Name the checkpoint in TrainingArguments(resume_from_checkpoint=...) too, or delete that file."
            )
        hook.load_state_dict(saved["hook"])

    def _example(self, model: Any) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = self._args, self._kwargs
        if args is None and not kwargs:
            kwargs = getattr(model, "dummy_inputs", {})
            if getattr(model, "main_input_name", None) not in kwargs:  # images and sound: the default is made for text
                raise equinorm.ExportError(
                    f"no example inputs for {type(model).__name__}: pass ENormCallback(args=...) or ENormCallback(kwargs=...)."
                )
        return example(args, kwargs, next(model.parameters()).device)


def fingerprint(model: nn.Module) -> int:
    """Sum of the bytes of every parameter: the same for the same weights on any devices."""
    tensors = (whole(parameter.detach()).contiguous().reshape(-1) for parameter in model.parameters())
    return sum(int(tensor.view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors)
