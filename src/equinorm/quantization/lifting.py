"""Graphs of torch.fx: operations that could be modules become modules, so that they are prepared as all modules are."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from equinorm._arguments import is_number
from equinorm.discovery.graph.nodes import bind, module_of, operator_name

aten = torch.ops.aten

BOUNDS = {
    "relu6": (),
    "hardtanh": ("min_val", "max_val"),
    "clamp": ("min", "max"),
    "clip": ("min", "max"),
    "clamp_min": ("min",),
    "clamp_max": ("max",),
}
"""Operations that bound by numbers, and these in order."""

FUNCTIONS = {functional.relu6, functional.hardtanh, functional.hardtanh_, torch.clamp, torch.clamp_, torch.clip, torch.clip_}
FUNCTIONS |= {torch.clamp_min, torch.clamp_min_, torch.clamp_max, torch.clamp_max_}

LAYERS: dict[Any, Any] = {
    aten.linear.default: nn.Linear,
    aten.conv1d.default: nn.Conv1d,
    aten.conv1d.padding: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv2d.padding: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d,
    aten.conv3d.padding: nn.Conv3d,
    aten.conv_transpose1d.default: nn.ConvTranspose1d,
    aten.conv_transpose2d.input: nn.ConvTranspose2d,
    aten.conv_transpose3d.input: nn.ConvTranspose3d,
}
NORMS: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
"""Batch normalizations by the axes of what they read."""

STATISTICS = ("running_mean", "running_var")


@dataclass(eq=False)
class Lifted:
    """An operation that became a module.

    Attributes:
        graph: of which it is.
        node: the operation.
        name: of the module in the graph.
        module: the module.
        tensors: names of what it holds.
        was: what the node was: its kind, target and arguments.
    """

    graph: fx.GraphModule
    node: fx.Node
    name: str
    module: nn.Module
    tensors: set[str]
    was: tuple[str, Any, tuple, dict]

    def now(self) -> nn.Module:
        """The module in its place by now."""
        return self.graph.get_submodule(self.name)

    def lower(self) -> None:
        """Make the node what it was, unless another module, or one with more tensors, is in its place."""
        now = self.now()
        if isinstance(now, nn.Identity):
            self.node.replace_all_uses_with(self.node.args[0])  # type: ignore[arg-type]
            self.graph.graph.erase_node(self.node)
        elif now is self.module and {*now.state_dict()} == self.tensors:
            read = self.node.args[0]  # another one by now, if a normalization in front is gone
            self.node.op, self.node.target, args, kwargs = self.was
            self.node.args, self.node.kwargs = (read, *args[1:]) if args else (), kwargs if args else {**kwargs, "input": read}


def lift_bounds_(model: nn.Module) -> list[Lifted]:
    """Make a module of each bounding operation of a model's graphs, and of each call of one that is called again; in place."""
    found: list[Lifted] = []
    for graph in _graphs(model):
        called: set[int] = set()
        for node in list(graph.graph.nodes):
            module = _bounding(node) if node.op != "call_module" else None
            if node.op == "call_module" and type(known := graph.get_submodule(str(node.target))) in (nn.ReLU6, nn.Hardtanh):
                module = copy.deepcopy(known) if id(known) in called else None
                called.add(id(known))
            if module is not None:
                found.append(_lifted(graph, node, _free(graph, node), module))
        graph.recompile()
    return found


def lift_norms_(model: nn.Module) -> list[Lifted]:
    """Make modules of exported batch normalizations, and of all layers beside them; their tensors keep their names."""
    found: list[Lifted] = []
    for graph in _graphs(model):
        nodes = list(graph.graph.nodes)
        norms = [node for node in nodes if node.target is aten.batch_norm.default]
        made = {node: part for node in norms if (part := _made(graph, node, _norm)) is not None}
        if made:
            around = [node for node in nodes if node.target in LAYERS]
            made |= {node: part for node in around if (part := _made(graph, node, _layer)) is not None}
        for node, (name, module) in made.items():
            found.append(_lifted(graph, node, name, module.train(False)))
        graph.recompile()
    return found


def lower_(lifted: list[Lifted]) -> None:
    """Put back what was lifted in vain, and take out of the graphs what does nothing any more."""
    for part in lifted:
        part.lower()
    stays = {(part.graph, part.name) for part in lifted if part.node.op == "call_module"}
    for graph in dict.fromkeys(part.graph for part in lifted):
        for node in [node for node in graph.graph.nodes if node.op == "get_attr" and not node.users]:
            if (graph, str(node.target).rpartition(".")[0]) in stays:
                graph.graph.erase_node(node)
        called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
        for part in lifted:
            if part.graph is graph and part.name not in called and not part.now().state_dict():
                graph.delete_submodule(part.name)
        graph.recompile()


def _graphs(model: nn.Module) -> list[fx.GraphModule]:
    return [module for module in model.modules() if isinstance(module, fx.GraphModule)]


def _lifted(graph: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> Lifted:
    """Put a module into the graph in place of an operation."""
    was = node.op, node.target, node.args, dict(node.kwargs)
    graph.add_submodule(name, module)
    node.op, node.target, node.args, node.kwargs = "call_module", name, (_operand(node),), {}
    node.meta["nn_module_stack"] = {name: (name, type(module))}
    return Lifted(graph, node, name, module, {*module.state_dict()}, was)


def _operand(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")  # functions call it so, where it is named


def _free(graph: fx.GraphModule, node: fx.Node) -> str:
    """A name for a module: that of the module which the operation was, or the operation's own."""
    known = {name for name, _ in graph.named_modules()} | set(vars(graph)) | {*graph._parameters, *graph._buffers}
    stem = module_of(node).partition("@")[0]
    stem = node.name if stem in known or not stem else stem
    name, number = stem, 0
    while name in known:
        number += 1
        name = f"{stem}_{number}"
    return name


def _bounding(node: fx.Node) -> nn.Module | None:
    """A module that does what this operation does, if it bounds by numbers that are not 0 or none."""
    target: Any = node.target
    name = operator_name(node)
    if node.op == "call_method":
        name = str(target)
    elif node.op == "call_function" and target in FUNCTIONS:
        name = target.__name__
    places = BOUNDS.get(name.removesuffix("_"))
    if places is None or not isinstance(_operand(node), fx.Node):
        return None
    given: dict[str, Any] = {**dict(zip((*places, "inplace"), node.args[1:], strict=False)), **node.kwargs}
    inplace = name.endswith("_") or bool(given.pop("inplace", False))
    if given.keys() - {*places, "input", "self"}:
        return None
    if not places:
        return nn.ReLU6(inplace)
    unset = (-1.0, 1.0) if name.startswith("hardtanh") else (None, None)
    low, high = (
        next((given.get(place, default) for place in places if place.startswith(kind)), None)
        for kind, default in zip(("min", "max"), unset, strict=True)
    )
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if not (is_number(low) and is_number(high)):
        return None
    is_free = {low, high} <= {0, -math.inf, math.inf}
    return None if is_free or not low < high else nn.Hardtanh(float(low), float(high), inplace)


def _made(
    graph: fx.GraphModule, node: fx.Node, make: Callable[[fx.Node, Any], nn.Module | None]
) -> tuple[str, nn.Module] | None:
    """The module that an operation with tensors of its own is, and its name: where it alone reads all that the name holds."""
    named = bind(node.target, node.args, dict(node.kwargs))
    tensors = {key: value for key, value in named.items() if isinstance(value, fx.Node) and value.op == "get_attr"}
    paths = {str(value.target).rpartition(".")[0] for value in tensors.values()}
    wanted = {key: str(value.target).rpartition(".")[2] for key, value in tensors.items()}
    if len(paths) != 1 or "" in paths or any(key != name for key, name in wanted.items()):
        return None
    (path,) = paths
    holder = graph.get_submodule(path)
    held = {name for name, _ in (*holder.named_parameters(), *holder.named_buffers())}
    inside = [other for other in graph.graph.nodes if other.op == "get_attr" and str(other.target).startswith(f"{path}.")]
    if held - {"num_batches_tracked"} != wanted.keys() or any(user is not node for other in inside for user in other.users):
        return None
    module = make(node, named)
    if module is None:
        return None
    for name, tensor in (*holder._parameters.items(), *holder._buffers.items()):
        if name in module._parameters:
            module._parameters[name] = tensor  # type: ignore[assignment]
        else:
            module._buffers[name] = tensor
    return path, module


def _norm(node: fx.Node, named: Any) -> nn.Module | None:
    given = named["input"].meta.get("val")
    if given is None or named["training"] or any(named[name] is None for name in STATISTICS):
        return None
    kind = NORMS.get(given.dim())
    return None if kind is None else kind(given.shape[1], named["eps"], affine=named["weight"] is not None, device="meta")


def _layer(node: fx.Node, named: Any) -> nn.Module | None:
    """A layer without numbers."""
    kind, value = LAYERS[node.target], named["weight"].meta.get("val")
    if value is None or not isinstance(named["input"], fx.Node):
        return None
    shape, has_bias = tuple(value.shape), named["bias"] is not None
    if kind is nn.Linear:
        return nn.Linear(shape[1], shape[0], has_bias, device="meta")
    axes, groups = len(shape) - 2, named["groups"]
    is_transposed = issubclass(kind, nn.modules.conv._ConvTransposeNd)
    channels = (shape[0], shape[1] * groups) if is_transposed else (shape[1] * groups, shape[0])
    settings = {key: named[key] for key in ("stride", "padding", "dilation", "output_padding") if key in named}
    settings = {key: v if isinstance(v, str) else tuple(v) * (axes if len(v) == 1 else 1) for key, v in settings.items()}
    return kind(*channels, shape[2:], **settings, groups=groups, bias=has_bias, device="meta")
