"""Names of a file as names of a module: tensors keep theirs, up to what PyTorch does not allow."""

from torch import nn


class TensorHolder(nn.Module):
    """Holds tensors and further parts; computes nothing."""


def legal(name: str) -> str:
    """A name without dots, for a submodule."""
    return name.replace(".", "_") or "_"


def free(holder: nn.Module, name: str) -> str:
    """This name, or one like it, that the module does not use yet."""
    while not name or hasattr(holder, name):
        name += "_"
    return name


def place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Where a tensor of this dotted name goes: the part that holds it, made if there is none, and its name there."""
    *parts, last = name.split(".")
    holder = root
    for part in parts:
        child = holder._modules.get(part)
        if not isinstance(child, TensorHolder):
            part = free(holder, part)
            child = TensorHolder()
            holder.add_module(part, child)
        holder = child
    return holder, free(holder, last)
