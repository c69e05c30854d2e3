"""A model and its modules: what wraps it, which of them the user names, in which mode and by which default device they run."""

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from equinorm._errors import EquinormError, describe

Choice = str | nn.Module | Sequence[str | nn.Module]
"""Modules of a model: a name or a module, or several."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside of torch.compile, DistributedDataParallel, DataParallel and AveragedModel."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # importing OptimizedModule takes seconds
            model = inner
        else:
            return model


def only_looks(hook: Any) -> bool:
    """Is this a hook of a library that changes nothing and shows nothing to users that the model does not return?

    Those of torch.nn.utils (weight norm, pruning) prepare a module's own parameters; transformers records outputs that it was
    asked to return.
    """
    kind = getattr(type(hook), "__module__", "") or ""
    return kind.startswith("torch.nn.utils") or getattr(hook, "__module__", "") in _RECORDERS


_RECORDERS = ("transformers.utils.output_capturing", "transformers.utils.generic")


def recomputed(module: nn.Module) -> list[str]:
    """Plain attributes that torch.nn.utils (weight norm, spectral norm, pruning) computes anew before every call."""
    own = dict(module.named_parameters(recurse=False))
    return [name for name in vars(module) if f"{name}_v" in own or f"{name}_orig" in own]


def duplicate(model: nn.Module, purpose: str, otherwise: str = "") -> nn.Module:
    """A deep copy in which tensors that share memory share it still.

    Args:
        model: what to copy; what torch.nn.utils computes anew before every call need not be a leaf of autograd.
        purpose: of the copy, for the error.
        otherwise: what else the user could do.

    Raises:
        EquinormError: if the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, _copied_tensors(model))
    except Exception as error:
        raise EquinormError(
            f"cannot copy {describe(model)} {purpose}: {_hinders(model)}{type(error).__name__}: {error}. "
            f"Make copy.deepcopy(model) work{otherwise}."
        ) from error


def _hinders(model: nn.Module) -> str:
    """The first plain attribute that cannot be copied, if there is one."""
    common = vars(nn.Module())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                if key not in common and not isinstance(value, ModuleType):
                    copy.deepcopy(value)
            except Exception:
                return f"attribute {f'{name}.{key}'.lstrip('.')!r}: "
    return ""


def _copied_tensors(model: nn.Module) -> dict[int, Any]:
    """Copies, by identity, of tensors that `copy.deepcopy` would part from others, or refuse; and Python's modules."""
    copies: dict[int, Any] = {}
    sharing: dict[int, dict[int, Tensor]] = {}
    for module in model.modules():
        for name in recomputed(module):
            tensor = vars(module)[name]
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                copies[id(tensor)] = tensor.detach().clone()
        copies |= {id(value): value for value in vars(module).values() if isinstance(value, ModuleType)}
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in copies and _is_plain(tensor):
                sharing.setdefault(tensor.untyped_storage()._cdata, {})[id(tensor)] = tensor
    for tensors in sharing.values():
        if len(tensors) > 1:
            memory = next(iter(tensors.values())).untyped_storage().clone()
            for key, tensor in tensors.items():
                place = (memory, tensor.storage_offset(), tensor.size(), tensor.stride())
                twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[key] = nn.Parameter(twin, False) if is_parameter else twin
                copies[key].requires_grad_(tensor.requires_grad)
    return copies


def _is_plain(tensor: Tensor) -> bool:
    """Is it no subclass of others, dense, and not part of a graph?"""
    is_own = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_own and tensor.is_leaf and not (tensor.is_conj() or tensor.is_neg())


def without_cache(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs with use_cache=False, where a model of transformers would return a cache that nobody has asked for.

    Keys and values that later calls reuse scale as those of one call do.
    """
    bases = (str(kind.__module__) for kind in type(model).__mro__)
    if not any(name.startswith("transformers.") for name in bases):
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    given = {*kwargs, *names[: len(args)]}
    return kwargs if "use_cache" not in names or given & {"use_cache", "past_key_values"} else {**kwargs, "use_cache": False}


_default = threading.local()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Make tensors of our own on the CPU, whatever `torch.set_default_device` says. Also a decorator."""
    device = torch.get_default_device()
    if device.type == "cpu":
        yield
        return
    before, _default.device = getattr(_default, "device", None), device
    try:
        with torch.device("cpu"):
            yield
    finally:
        _default.device = before


@contextlib.contextmanager
def by_default() -> Iterator[None]:
    """Within `on_cpu`: the default device that the user's code expects."""
    device = getattr(_default, "device", None)
    with contextlib.nullcontext() if device is None else device:
        yield


def is_exported(model: nn.Module) -> bool:
    """Is this a graph of PyTorch's own operators, as torch.export writes it? Its mode can neither be told nor changed."""
    return isinstance(model, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes
    )


def takes_one_size(model: nn.Module) -> bool:
    """Was this graph exported for inputs of one size, which it asks for?"""
    if not isinstance(model, fx.GraphModule):
        return False
    values = [node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return bool(tensors) and all(isinstance(size, int) for value in tensors for size in value.shape)


def parts_in_training(model: nn.Module) -> list[str]:
    """Names of modules in training mode, and of operations of exported graphs that run as in training."""
    graphs = {name: module for name, module in model.named_modules() if is_exported(module)}
    inside = tuple(f"{name}." if name else "" for name in graphs)
    found = [
        name
        for name, module in model.named_modules()
        if module.training and name not in graphs and not (graphs and name.startswith(inside))
    ]
    for graph in graphs.values():
        assert isinstance(graph, fx.GraphModule)
        found += [node.name for node in graph.graph.nodes if _trains(node)]
    return found


def _trains(node: fx.Node) -> bool:
    """Does this operation of a graph drop entries or normalize by each batch?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return any(given.get(name) is True for name in ("train", "training", "use_input_stats"))


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Put every module into training or evaluation mode, and back; None: leave them as they are."""
    before = [(module, module.training) for module in model.modules()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextlib.contextmanager
def own_backward() -> Iterator[dict[str, None]]:
    """Names of the autograd functions, torch's own aside, that are called within."""
    found: dict[str, None] = {}
    before = Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            found[f"the autograd function {cls.__name__}"] = None
        return before.__get__(None, cls)(*args, **kwargs)

    Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        Function.apply = before


def walked(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """All modules by every name, as `named_modules` gives them, at a third of its time."""
    found = [(prefix, model)]
    for name, child in model._modules.items():
        if child is not None:
            found += walked(child, f"{prefix}.{name}" if prefix else name)
    return found


def backward_hooks(model: nn.Module) -> list[str]:
    """Modules with hooks that see, and may change, gradients."""
    found = [name for name, module in dict(walked(model)).items() if module._backward_hooks or module._backward_pre_hooks]
    return [f"a backward hook of {f'module {name!r}' if name else 'the model itself'}" for name in found]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients, on random numbers of their own; its buffers are put back."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            yield
        finally:
            for buffer, value in before:
                buffer.copy_(value)


def chosen(model: nn.Module, choice: Choice, error: type[EquinormError], what: str) -> dict[str, nn.Module]:
    """The modules that the user names, by their names.

    Args:
        model: the model.
        choice: names or modules.
        error: what to raise for others.
        what: the argument's name.
    """
    entries = [choice] if isinstance(choice, (str, nn.Module)) else choice
    if not isinstance(entries, (tuple, list)):
        raise error(f"{what} must be names or modules, not {type(choice).__name__}.")
    known = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for entry in entries:
        names = [entry] if isinstance(entry, str) else [name for name, module in known.items() if module is entry]
        if not names or names[0] not in known:
            first = ", ".join(list(known)[1:9])
            given = repr(entry) if isinstance(entry, str) else f"{type(entry).__name__} of {what}"
            raise error(f"the model has no module {given}. Its first modules are {first}.")
        if not any(module is known[names[0]] for module in found.values()):
            found[names[0]] = known[names[0]]
    return found
