"""Graphs that `torch.export` wrote: modules whose mode and sizes stand in their operations."""

import torch
from torch import Tensor, fx, nn


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
