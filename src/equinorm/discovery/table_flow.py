"""Follows entries of tables through a graph: tensors of the model, and what operations make of these alone.

A table enters as a label that tells the places of its entries, and is moved as labels are. What does more than to move
entries, or to compute with each by itself, reads all that it sees. Where it sees tables and constants only, its result is a
table too, and those are read as far as this is.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from equinorm.discovery.graph.nodes import CONSTANT_LIMIT, bind, is_static, is_unknown_number, results_of, subgraph
from equinorm.discovery.labels import Label, axis_runs
from equinorm.discovery.rules import Call, Trace, find, key
from equinorm.discovery.rules.movement import gathered, indexed, moved, padded, repeated, rows_selected, shaped_as, taken
from equinorm.discovery.table_entries import Box, are_same, box, entries, only, shows_any, unread
from equinorm.discovery.values import Constant

_SHAPES_ONLY = """_assert_tensor_metadata rand_like randn_like randint_like empty_like full_like zeros_like ones_like new_empty
new_full new_zeros new_ones"""
"""Operations that read no entry of what they are given."""

_ENTRYWISE = """alias detach detach_ clone contiguous to _to_copy type_as copy copy_ lift_fresh_copy dropout dropout_
feature_dropout alpha_dropout where masked_fill multiply subtract divide hardswish tril triu"""
"""Operations that compute with each entry by itself, beside those of which torch says so."""

_OVERWRITTEN = "slice_scatter select_scatter diagonal_scatter"
"""Operations that put others in the place of some entries of the first argument: these count as read."""

_HANDED_ON = {"copy": "src", "copy_": "src", "to": "self", "type_as": "self"}
"""Which argument such operations hand on, where it is one of several."""

_BILINEAR = "linear matmul mm bmm mv dot vdot inner einsum tensordot addmm addmv baddbmm addbmm addcmul"
"""Operations that are linear in each of two factors, beside products of entries."""

_ROWS = "linear layer_norm rms_norm softmax log_softmax _softmax _log_softmax"
"""Operations that keep apart what the first argument holds at different places of its first axes."""

_BY_INDEX = (indexed, rows_selected, gathered, taken)

_MOVEMENTS = (moved, repeated, shaped_as, padded, *_BY_INDEX)
"""Rules of operations that move entries."""

_RESHAPES = "view reshape flatten unflatten _unsafe_view view_copy ravel view_as reshape_as"

_KEEPS = f"""{_RESHAPES} slice narrow unsqueeze squeeze permute transpose t mT numpy_T movedim swapaxes expand expand_as
broadcast_to repeat tile flip roll cat concat stack"""
"""Movements that drop no entry if they return as many."""

_NOTHING, _ALL, _EACH, _MOVED = "nothing", "all", "each", "moved"
"""What an operation does with an argument: it reads nothing or all of it, computes with each entry by itself, or moves it."""

Known = Callable[[fx.Node], Tensor | None]
"""The numbers of a value that no input and no weight can change; None for others."""

_Part = tuple[fx.Node, Label]
"""A table, and which of its entries a value shows."""

_Shown = list[_Part] | dict[int, list[_Part]]
"""What a value shows of tables; of several values, by their number."""


class Flow:
    """See the module's docstring.

    Attributes:
        whole: tables of which all is read, as can be seen without following their entries.

    Args:
        known: numbers of values.
        own: tensors that those of the model and constants alone decide, these included, in the order of the graph.
    """

    def __init__(self, known: Known, own: Sequence[fx.Node]) -> None:
        self._known, self._own, self._trace = known, {*own}, Trace()
        self.whole: set[fx.Node] = set()
        self._read: dict[fx.Node, list[Box]] = {}
        self._made: dict[fx.Node, dict[fx.Node, list[_Part]]] = {}
        for node in reversed(own):
            if self._reads_whole(node):
                self.whole.add(node)

    def boxes(self, graph: fx.Graph, tables: Sequence[fx.Node]) -> dict[fx.Node, list[Box]]:
        """What is read of each table that enters a graph."""
        self._read = {table: [] for table in tables}
        if tables:
            self._note(_flat(self._run(graph, {table: [(table, entries(table.meta["val"].shape))] for table in tables})))
        for node, given in reversed(self._made.items()):
            masks = unread(node.meta["val"].shape, self._read.pop(node))
            for argument, parts in given.items():
                self._note(_behind(node, argument, parts, masks))
        return self._read

    def _reads_whole(self, node: fx.Node) -> bool:
        """Is all of a value read?"""
        graph, reached, waiting = node.graph, {node}, [node]
        while waiting:
            node = waiting.pop()
            for user in node.users:
                does = self._does(user, node) if user.op != "output" or user.graph is graph else _NOTHING  # of a subgraph
                if does == _ALL and (user not in self._own or user in self.whole) and not self._met(user, node):
                    return True
                following = [inner for inner, value in _entrances(user) if value is node]
                if (does == _EACH and not self._met(user, node)) or (does == _MOVED and self._keeps(user)):
                    following += [user] if user.meta["val"].numel() >= node.meta["val"].numel() else []
                waiting += [after for after in following if after not in reached]
                reached.update(following)
        return False

    def _keeps(self, node: fx.Node) -> bool:
        """Does a movement that returns as many entries as it is given drop none?"""
        target: Any = node.target
        table, *indices = node.all_input_nodes
        if find(target) not in (indexed, rows_selected) or len(indices) != 1 or not table.meta["val"].dim():
            return key(target) in _KEEPS.split()
        named, places = bind(target, node.args, node.kwargs), self._number(indices[0])
        axis = named["dim"] if "dim" in named else named["indices"].index(indices[0])
        size = table.meta["val"].shape[axis]
        is_whole_number = places is not None and places.dtype in (torch.int32, torch.int64)
        return is_whole_number and len(torch.unique(places % size)) == size

    def _run(self, graph: fx.Graph, carried: dict[fx.Node, _Shown]) -> _Shown:
        """Follow what enters a graph; return what its results show."""
        for node in graph.nodes:
            given = {argument: parts for argument in node.all_input_nodes if (parts := carried.get(argument))}
            if node.op == "output":
                results: Any = node.args[0]
                if isinstance(results, fx.Node):
                    return given.get(results, [])
                return {number: _flat(given.get(value, [])) for number, value in enumerate(results)}
            if given:
                carried[node] = self._shown(node, given)
        raise ValueError("graph without output")

    def _note(self, parts: list[_Part]) -> None:
        """Enter what is read."""
        for table, label in parts:
            found = box(table.meta["val"].shape, label)
            self._read[table] += [found] if found is not None else []

    def _shown(self, node: fx.Node, given: dict[fx.Node, _Shown]) -> _Shown:
        """What the value of a node shows."""
        if node.target is operator.getitem:
            (shown,), place = given.values(), node.args[1]
            return shown.get(place, []) if isinstance(shown, dict) and isinstance(place, int) else []
        body, _ = subgraph(node)
        if body is not None:
            return self._run(body.graph, {inner: given[value] for inner, value in _entrances(node) if value in given})
        found: list[_Part] = []
        several: dict[int, list[_Part]] = {}
        for argument, parts in given.items():
            does, parts = self._does(node, argument), _flat(parts)
            for kept in self._met(node, argument):
                parts = [
                    (table, only(label.expand(torch.broadcast_shapes(label.shape, kept.shape)), kept)) for table, label in parts
                ]
            if does == _ALL and node in self._own and node not in self.whole:
                self._made.setdefault(node, {})[argument] = parts
            elif does == _ALL:
                self._note(parts)
            for table, label in parts if does in (_EACH, _MOVED) else ():
                result = self._moved(node, argument, label) if does == _MOVED else label.expand(tuple(node.meta["val"].shape))
                if not isinstance(result, Label):
                    for number, part in enumerate(result):
                        several.setdefault(number, []).extend([(table, part)] if shows_any(part) else [])
                elif shows_any(result) and not any(table is other and are_same(result, part) for other, part in found):
                    found.append((table, result))
        if node in self._made:
            self._read[node] = []
            found.append((node, entries(node.meta["val"].shape)))
        return several or found

    def _does(self, node: fx.Node, argument: fx.Node) -> str:
        """What an operation does with an argument."""
        target: Any = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            return _NOTHING if target is operator.getitem or subgraph(node)[0] is not None else _ALL
        name, law = key(target), find(target)
        given, result = argument.meta.get("val"), node.meta.get("val")
        if name in _SHAPES_ONLY.split():
            return _NOTHING
        if name in _OVERWRITTEN.split():
            return _EACH if argument is node.args[0] and argument not in node.args[1:] else _ALL
        is_each = torch.Tag.pointwise in target.tags or name in _ENTRYWISE.split()
        if (not is_each and law not in _MOVEMENTS) or not isinstance(given, Tensor) or not is_static(result):
            return _ALL
        if is_each:
            if name in _HANDED_ON and bind(target, node.args, node.kwargs)[_HANDED_ON[name]] is not argument:
                return _NOTHING
            return _EACH if _broadcasts(given, result) and not self._is_bias(node, argument) else _ALL
        table, *indices = node.all_input_nodes
        is_unknown = argument is not table or any(self._number(index) is None for index in indices)
        is_asked = any(is_unknown_number(index.meta.get("val")) for index in indices)
        return _ALL if is_asked or (law in _BY_INDEX and is_unknown) else _MOVED

    def _is_bias(self, node: fx.Node, argument: fx.Node) -> bool:
        """Is it added to a product with a weight, one number for each column? Then as much is read of it as of the weight."""
        product = next((other for other in node.all_input_nodes if other is not argument), node)
        if _name(node) not in ("add", "add_") or _name(product) not in ("linear", "matmul", "mm") or product in self._own:
            return False
        weight: Any = product.args[1]
        given, made = argument.meta["val"], product.meta["val"]
        is_of_columns = weight.meta["val"].dim() > 1 and given.shape[-1:] == made.shape[-1:] == (given.numel(),)
        return weight in self._own and is_of_columns

    def _moved(self, node: fx.Node, argument: fx.Node, label: Label) -> Label | Sequence[Label]:
        """What is shown after a movement; nothing where too many places would have to be written down."""
        target: Any = node.target
        if _is_large(node, label):
            return []

        def value(other: fx.Node) -> Any:
            number, traced = self._number(other), other.meta.get("val")
            if other is argument or number is not None:
                return label if number is None else Constant(number)
            return Label(tuple(traced.shape)) if isinstance(traced, Tensor) else traced

        args, kwargs = map_arg((node.args, node.kwargs), value)  # pyright: ignore[reportGeneralTypeIssues]
        law: Any = find(target)
        return law(self._trace, Call(target, bind(target, args, kwargs), node.meta["val"]))

    def _met(self, node: fx.Node, argument: fx.Node) -> list[Tensor]:
        """Where entries of a factor meet others than zeros of constants, if not everywhere: only these are read."""
        if _name(node) in ("mul", "mul_", "multiply"):
            numbers = map(self._number, node.all_input_nodes)
            return [number != 0 for number in numbers if number is not None and _tells_apart(number)]
        return self._met_in_product(node, argument) if _name(node) in _BILINEAR.split() else []

    def _met_in_product(self, node: fx.Node, argument: fx.Node) -> list[Tensor]:
        """The same of any product: entries of which the result depends where a constant holds zeros, and all else ones."""
        values = {other: self._number(other) for other in node.all_input_nodes if other is not argument}
        values = {other: number if number is not None and _tells_apart(number) else None for other, number in values.items()}
        if not any(number is not None for number in values.values()):
            return []
        shape = argument.meta["val"].shape
        target: Any = node.target
        if any(part.meta["val"].numel() > CONSTANT_LIMIT for part in (argument, node, *values)):
            return [torch.zeros([1] * len(shape), dtype=torch.bool)]

        def value(other: fx.Node) -> Tensor:
            if other is argument:
                return ones
            number = values[other]
            return torch.ones(other.meta["val"].shape) if number is None else (number != 0).float()

        with torch.inference_mode(False), torch.enable_grad():
            ones = torch.ones(shape, requires_grad=True)
            args, kwargs = map_arg((node.args, node.kwargs), value)  # pyright: ignore[reportGeneralTypeIssues]
            (found,) = torch.autograd.grad(target(*args, **kwargs).sum(), ones, allow_unused=True, materialize_grads=True)
        return [] if bool(found.all()) else [found != 0]

    def _number(self, node: fx.Node) -> Tensor | None:
        """A value that no input and no weight can change, if its numbers are at hand."""
        number = self._known(node)
        return None if number is None or number.is_meta else number.cpu()


def _name(node: fx.Node) -> str:
    """Of the operator that a node calls, if it is one of PyTorch's."""
    return key(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def _tells_apart(number: Tensor) -> bool:
    """Has it zeros and others?"""
    return bool(number.any()) and not bool(number.all())


def _entrances(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """Placeholders of the graph that a node runs, and what it gives to each."""
    body, given = subgraph(node)
    return [*zip(body.graph.find_nodes(op="placeholder"), given, strict=True)] if body is not None else []


def _flat(parts: _Shown) -> list[_Part]:
    return parts if isinstance(parts, list) else [part for several in parts.values() for part in several]


def _along(axis: int, mask: Tensor, rank: int) -> Tensor:
    """A mask of places along an axis, as one of entries."""
    return mask.reshape([-1 if other == axis else 1 for other in range(rank)])


def _behind(node: fx.Node, argument: fx.Node, parts: list[_Part], masks: Sequence[Tensor]) -> list[_Part]:
    """What is read of an argument if these places of the result are not."""
    axes = [axis for axis, mask in enumerate(masks) if bool(mask.any())]
    target: Any = node.target
    named, is_read = bind(target, node.args, node.kwargs), not any(bool(mask.all()) for mask in masks)
    apart = len(masks) - len(named.get("normalized_shape", [-1]))
    if not axes:
        return parts
    of_rows = is_read and key(target) in _ROWS.split() and named.get("dim", -1) in (-1, len(masks) - 1)
    if not of_rows or max(axes) >= apart:
        return []
    for axis in axes if argument is node.args[0] else ():
        parts = [(table, only(label, _along(axis, ~masks[axis], len(masks)))) for table, label in parts]
    return parts


def _broadcasts(given: Tensor, result: Any) -> bool:
    """Is an argument broadcast to the result from the last axis on?"""
    if not isinstance(result, Tensor) or given.dim() > result.dim():
        return False
    return all(size in (1, whole) for size, whole in zip(reversed(given.shape), reversed(result.shape), strict=False))


def _is_large(node: fx.Node, label: Label) -> bool:
    """Would more places have to be written down than a constant may have entries?"""
    target: Any = node.target
    results = results_of(node.meta["val"])
    if all(result.numel() <= CONSTANT_LIMIT for result in results):
        return False
    if key(target) not in _RESHAPES.split():
        return all(returned.alias_info is None for returned in target._schema.returns)  # views of what repeats cost nothing
    runs = [run for run, _ in axis_runs(label.shape, results[0].shape)]
    counts = [[torch.Size([label.shape[axis] for axis in run]).numel() for run in runs if f.varies(run)] for f in label.factors]
    return any(torch.Size(sizes).numel() > CONSTANT_LIMIT for sizes in counts)
