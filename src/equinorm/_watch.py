"""A model's mode, and whether it is still the model that was analysed."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from equinorm._errors import RescaleError


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into training mode, and back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Watch:
    """Notices modules and tensors that were added, removed or replaced.

    Args:
        model: as it was analysed.
        moving: names of the tensors that move.
    """

    def __init__(self, model: nn.Module, moving: Mapping[str, Tensor]) -> None:
        self._children = [(name, module, self._inside(module)) for name, module in model.named_modules(remove_duplicate=True)]
        self._tensors: list[tuple[str, Mapping[str, Tensor | None], str, Tensor]] = []
        for name, tensor in moving.items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            held = module._parameters if key in module._parameters else module._buffers
            self._tensors.append((name, held, key, tensor))

    @staticmethod
    def _inside(module: nn.Module) -> tuple[int, ...]:
        return (*map(id, module._modules.values()), *map(id, module._parameters))

    def check(self) -> None:
        """Raise if the model is not what it was.

        Raises:
            RescaleError: naming the module or tensor that changed.
        """
        for name, module, inside in self._children:
            if self._inside(module) != inside:
                where = f"module {name!r}" if name else "the model itself"
                self._refuse(f"modules or parameters were added to {where}, removed from it, or replaced")
        for name, held, key, tensor in self._tensors:
            if held.get(key) is not tensor:
                self._refuse(f"{name} was replaced by another tensor")

    def _refuse(self, what: str) -> None:
        raise RescaleError(
            f"{what} since ENorm analysed the model, so its symmetries may be others now. "
            "Call remove() on the old hook and create a new ENorm."
        )
