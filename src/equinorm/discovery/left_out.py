"""Entries of a model's tensors that no operation of a graph reads: with a longer input, say, others are cut out of a table."""

import math
from collections.abc import Iterable

from torch import Tensor, fx

from equinorm._scaling import Reason
from equinorm.discovery.graph.export import Exported
from equinorm.discovery.table_entries import Box, unread
from equinorm.discovery.table_flow import Flow, Known
from equinorm.discovery.values import Constant, Source

LEFT_OUT = Reason("no operation", "inputs of this size leave these entries out, others may not")


def left_out(graphs: Iterable[tuple[Exported, Known]]) -> dict[Source, list[Tensor]]:
    """For each tensor that graphs read in part, and each of its axes, a mask of places at which entries are not read.

    Args:
        graphs: each with the numbers of those of its values that no input and no weight can change.
    """
    read: dict[Source, list[Box]] = {}
    whole: set[Source] = set()
    for exported, known in graphs:
        graph, inputs = exported.aliases.graph.graph, exported.inputs
        flow = Flow(known, _of_weights(exported))
        used = (node for node in graph.nodes if node.op == "placeholder" and node.users)
        tables = {node: source for node in used if isinstance(source := inputs[node.name][0], Source)}
        tables = {node: source for node, source in tables.items() if math.prod(source.shape) > 1}
        whole |= {source for node, source in tables.items() if node in flow.whole}
        read |= {source: [] for source in tables.values() if source not in read}
        for node, boxes in flow.boxes(graph, [node for node, source in tables.items() if source not in whole]).items():
            read[tables[node]] += boxes
    found = {source: unread(source.shape, boxes) for source, boxes in read.items() if source not in whole}
    return {source: masks for source, masks in found.items() if any(bool(mask.any()) for mask in masks)}


def _of_weights(exported: Exported) -> list[fx.Node]:
    """Tensors of the model, and those that they and constants alone decide."""
    found: dict[fx.Node, bool] = {}
    for node in exported.aliases.graph.graph.nodes:
        value = exported.inputs[node.name][0] if node.op == "placeholder" else None
        if isinstance(value, (Source, Constant)) or node.op == "get_attr":
            found[node] = isinstance(value, Source)
        elif node.op == "call_function" and all(argument in found for argument in node.all_input_nodes):
            found[node] = any(found[argument] for argument in node.all_input_nodes)
    return [node for node, is_of_weights in found.items() if is_of_weights and isinstance(node.meta.get("val"), Tensor)]
