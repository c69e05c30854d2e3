"""Along whole axes: what does not see in which order entries come takes an axis out; what does pins it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from equinorm.permuting.atoms import Axis, pin
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.movement import along
from equinorm.permuting.laws.registry import WHICH, Call, law
from equinorm.permuting.values import Laid


def _places(call: Call) -> list[int]:
    """The axes that an operation is along."""
    rank = len(call.input.shape)
    given = next((call.arguments[name] for name in ("dim", "dims") if call.get(name) is not None), None)
    given = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else given
    return [place % rank for place in given] if rank else []


def _without(call: Call, places: list[int]) -> Laid:
    """The axes that are left."""
    axes: list[Axis] = [() if place in places else axis for place, axis in enumerate(call.input.axes)]
    kept = (call.get("keepdim") and len(axes)) or None
    return Laid(tuple(axes if kept else [axis for place, axis in enumerate(axes) if place not in places]))


def _index(book: LawBook, call: Call, places: list[int], value: Laid) -> Callable[[], Laid]:
    """Places of entries along one axis go on naming them; along several they tell them apart. Only where the network asks."""
    reason, axes = book.because(WHICH), [call.input.axes[place] for place in places]
    if len(axes) == 1:
        return lambda: book.names(value.axes, axes[0])

    def used() -> Laid:
        pin(axes, reason)
        return value

    return used


@law(
    "sum mean amax amin prod nansum nanmean norm linalg_vector_norm logsumexp any all count_nonzero var std var_mean std_mean "
    "max min aminmax median nanmedian kthvalue dist"
)
def symmetric(book: LawBook, call: Call) -> Any:
    """Sums, means, maxima, norms: of no order."""
    if call.get("other") is not None:  # max(x, y), or the norm of x − y
        met = Laid(book.join(call.input, call.other))
        return Laid(()) if call.operator_name == "dist" else met
    places = _places(call)
    value = _without(call, places)
    if isinstance(call.result, Tensor):
        return value
    is_indexed = call.operator_name != "aminmax" and "_mean" not in call.operator_name
    return [value, _index(book, call, places, value) if is_indexed else value]


@law("argmax argmin")
def place_of(book: LawBook, call: Call) -> Laid:
    """The place of the largest entry, or of the smallest."""
    return _index(book, call, _places(call), _without(call, _places(call)))()


@law("softmax log_softmax _softmax _log_softmax")
def normalized(book: LawBook, call: Call) -> Laid:
    """Each entry over what all entries along an axis sum to."""
    book.mixes(call.input.axes, _places(call))
    return Laid(call.input.axes)


@law("cumsum cumprod logcumsumexp")
def cumulative(book: LawBook, call: Call) -> Laid:
    """Sums of what comes before."""
    return along(book, call.input, _places(call), call.shape, "sums what comes before")


@law("cummax cummin")
def extreme(book: LawBook, call: Call) -> list[Laid]:
    """The largest of what comes before, and its place."""
    return [along(book, call.input, _places(call), call.input.shape, "sees what comes before")] * 2


@law("sort topk")
def ordered(book: LawBook, call: Call) -> list[Any]:
    """Entries by size: of no order, but for the places that they had."""
    rank = len(call.input.shape)
    if not rank:
        return [Laid(()), Laid(())]
    place = (-1 if call.get("dim") is None else call.dim) % rank
    shape = call.result[0].shape
    if call.get("sorted") is False:
        axis = book.own_order(call.input.axes, place, shape[place])
    else:
        axis = book.fixed(shape[place], "puts entries in order")
    value = call.input.with_axis(place, axis)
    book.mixes(value.axes, [place])
    return [value, _index(book, call, [place], value)]


@law(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices "
    "max_pool3d_with_indices _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
def pooled(book: LawBook, call: Call) -> Any:
    """Neighbours along the last axes: channels stay what they are."""
    rank = next(int(number) for number in "123" if f"{number}d" in call.operator_name)
    parts = [call.result] if isinstance(call.result, Tensor) else call.result
    found = [along(book, call.input, range(-rank, 0), part.shape, "meets its neighbours") for part in parts]
    return found[0] if isinstance(call.result, Tensor) else found
