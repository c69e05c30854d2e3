"""Hooks of modules: which only look, and which see gradients."""

from typing import Any

from torch import nn

from equinorm.modules.choosing import walked


def only_looks(hook: Any) -> bool:
    """Is this a hook of a library that changes nothing and shows nothing to users that the model does not return?

    Those of torch.nn.utils (weight norm, pruning) prepare a module's own parameters; transformers records outputs that it was
    asked to return.
    """
    kind = getattr(type(hook), "__module__", "") or ""
    return kind.startswith("torch.nn.utils") or getattr(hook, "__module__", "") in _RECORDERS


_RECORDERS = ("transformers.utils.output_capturing", "transformers.utils.generic")


def backward_hooks(model: nn.Module) -> list[str]:
    """Modules with hooks that see, and may change, gradients."""
    found = [name for name, module in dict(walked(model)).items() if module._backward_hooks or module._backward_pre_hooks]
    return [f"a backward hook of {f'module {name!r}' if name else 'the model itself'}" for name in found]
