"""Why a model could not be exported, and what to do: what the exporter says, in one sentence."""

import re
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from equinorm._errors import ExportError, describe, describe_inputs, does_not_run, first_line


def failure(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], error: Exception, eager: Exception | None) -> ExportError:
    """Restate the call and the exporter's first line; `eager` is what the model itself raises with these inputs."""
    if eager is not None:
        text = does_not_run(model, args, kwargs, eager)
    else:
        text = f"cannot export {describe(model)} with inputs {describe_inputs(args, kwargs)}: {_advice(model, error)}"
    found = ExportError(text)
    found.cause = eager or error
    return found


def _advice(model: nn.Module, error: Exception) -> str:
    """What went wrong and what to do."""
    text, first = str(error), first_line(error, "no message")
    shown = "the model branches on the value of a tensor" if "data-dependent" in first else first
    unknown = re.search(r"(Unsupported input type|Found|flatten_with_keys_fn for type:) <class '([\w.<>]+)'>", first)
    unknown = unknown or re.fullmatch(r"(unhashable) type: '(?!(?:list|dict|set)')(\w+)'", first)  # PyTorch 2.11
    if unknown:
        advice = _unknown_class(unknown.group(2), unknown.group(1))
    elif "fake tensor in the exported program" in first:
        advice = (
            "a forward reads a parameter or buffer by its `.data`, or within torch.vmap or torch.func, which torch.export "
            "cannot follow. Write `.detach()` there, which is the same without gradients; write what torch.vmap computes "
            "without it, or declare the submodule that runs it opaque (opaque='its.name')."
        )
    elif isinstance(model, torch.jit.ScriptModule):
        advice = "TorchScript keeps no Python to record. Give the module that it was made from."
    elif "Inference tensors cannot" in first:
        advice = (
            "a parameter, buffer or input was made within torch.inference_mode(), and autograd cannot use it. Make it outside "
            "of that, or clone() it; torch.no_grad() does no such harm."
        )
    elif "in output" in shown or "output to be" in text:
        advice = f"{shown}. Let it return tensors in tuples, lists and dicts only."
    elif packed := _packed(model) if "torch.classes" in text else []:
        return (
            "torch.export cannot record packed weights. Declare the modules that hold them opaque "
            f"(opaque={packed!r}) so that the rest can be analysed."
        )
    else:
        advice = _unrecorded(model, error, shown)
    return f"{advice} The exporter's full report is in the attribute `cause`."


def _unrecorded(model: nn.Module, error: Exception, shown: str) -> str:
    """Advice where an operation, or control flow, cannot be recorded: where that is, and how to go on without it."""
    frame = re.search(r'File "([^"]*)", line (\d+), in \w+\n +(?:\(.*\) )?(\S[^\n]*)', str(error))
    where = f" at {frame.group(1).rsplit('/', 1)[-1]}:{frame.group(2)} `{frame.group(3)}`" if frame else ""
    operator = re.search(r"(?:aten|prims|torchvision|torch\.ops)[.:\w]+", str(error))
    blamed = f" The operation is {operator.group()}." if operator else ""
    module = _innermost(model, error)
    way = f"declare the submodule opaque (opaque={module!r}) so that the rest can be analysed, " if module else ""
    return (
        f"{type(error).__name__}: {shown}{where}.{blamed} The model runs with these inputs, but has control flow on data or an "
        f"operation that torch.export cannot record: {way}pass the submodule without it, or rewrite that line."
    )


def _unknown_class(path: str, met: str) -> str:
    """Advice where tensors come in objects of a class that torch.export cannot take apart."""
    name = path.rpartition(".")[2]
    does = {"Found": "returns", "unhashable": "returns", "Unsupported input type": "is given"}.get(met, "is given or returns")
    if name.endswith("Cache"):
        advice = "Leave it out: scales hold for every call alike."
        if does == "returns":
            advice = (
                "Ask for none: kwargs={'use_cache': False}; on the command line, model.config.use_cache = False in the factory."
            )
        return f"it {does} a {name}, which torch.export does not know. {advice}"
    return (
        f"it {does} an object of class {name}, and torch.export does not know which tensors that holds. Register the class "
        "before the analysis, with torch.export.register_dataclass, or torch.utils._pytree.register_pytree_node (with "
        "flatten_with_keys_fn) for others than dataclasses; or wrap the model so that there are tensors, tuples, "
        "lists and dicts only."
    )


def _packed(model: nn.Module) -> list[str]:
    """Names of the outermost modules of torch.ao that hold packed weights."""
    kinds = {name: type(module).__module__ for name, module in model.named_modules()}
    found = []
    for name, module in model.named_modules():
        if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
            parts = name.split(".")
            above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            found += [holder for holder in above if kinds[holder].startswith("torch.ao.")][:1]
    return [*dict.fromkeys(found)]


def _innermost(model: nn.Module, error: BaseException | None) -> str:
    """Name of the innermost submodule whose forward raised this."""
    names = {id(module): name for name, module in model.named_modules() if name}
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        modules = [names[id(frame.f_locals["self"])] for frame, _ in frames if id(frame.f_locals.get("self")) in names]
        if modules:
            return modules[-1]
        error = error.__cause__ or error.__context__
    return ""
