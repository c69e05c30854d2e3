"""Operators that PyTorch makes of others, as cosine_similarity: looked at as what they are made of where they have no law."""

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from equinorm.discovery.graph.nodes import is_static


def made_of(node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """The graph that an operation stands for, and what is given to it; None where PyTorch does not make it of others.

    Args:
        node: calls an operator; all of its tensors are of known sizes.
    """
    target, given = node.target, node.all_input_nodes
    values = [part.meta.get("val") for part in given]
    if not isinstance(target, torch._ops.OpOverload) or not values or not is_static(values):
        return None
    modes = {value.fake_mode for value in values if isinstance(value, FakeTensor)}
    if len(modes) != 1 or not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"):
        return None

    def run(*tensors: Tensor) -> object:
        args, kwargs = map_arg((node.args, node.kwargs), dict(zip(given, tensors, strict=True)).__getitem__)
        return target(*args, **kwargs)

    with modes.pop(), torch.no_grad():
        try:
            body = make_fx(run)(*values)
        except Exception:  # of a kind that only its own kernel can run: it stays without a law
            return None
    body.graph.eliminate_dead_code()
    for inner in body.graph.nodes:
        inner.meta = {**node.meta, **inner.meta} if inner.op == "call_function" else inner.meta
    return body, given
