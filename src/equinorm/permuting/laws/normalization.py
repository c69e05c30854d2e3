"""Normalization: statistics see no order; gain, shift and running statistics are permuted with what they meet."""

from typing import Any

from torch import Tensor

from equinorm.permuting.atoms import size_of, split_front
from equinorm.permuting.law_book import LawBook
from equinorm.permuting.laws.registry import Call, law
from equinorm.permuting.values import Laid


def _of_channels(book: LawBook, call: Call) -> Laid:
    """Gain, shift and statistics along axis 1."""
    axes = list(call.input.axes)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.get(name) is not None:
            axes[1] = book.same(axes[1], call.arguments[name].axes[0])
    return Laid(tuple(axes))


@law(
    "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional _batch_norm_no_update"
)
def batch_norm(book: LawBook, call: Call) -> Any:
    """Each channel over what it is in the whole batch."""
    result = _of_channels(book, call)
    channels = result.axes[1]
    book.see([channels])
    if isinstance(call.result, Tensor):
        return result
    return [result, *(Laid((channels,) if part.shape == (size_of(channels),) else ((),)) for part in call.result[1:])]


@law("instance_norm")
def instance_norm(book: LawBook, call: Call) -> Laid:
    """Each channel of each image over what it is in the whole image."""
    result = _of_channels(book, call)
    book.see(result.axes[:2])
    return result


@law("group_norm native_group_norm")
def group_norm(book: LawBook, call: Call) -> Any:
    """Groups of channels: groups among themselves, and channels within each."""
    groups = call.get("num_groups") or call.get("group")
    result = _of_channels(book, call)
    group, inside = split_front(result.axes[1], groups, book.because("its groups are no parts of its channels"))
    result = Laid((result.axes[0], (*group, *inside), *result.axes[2:]))
    book.see((result.axes[0], group))
    statistics = Laid((result.axes[0], group))
    return result if isinstance(call.result, Tensor) else [result, statistics, statistics]


@law("layer_norm native_layer_norm rms_norm _fused_rms_norm")
def layer_norm(book: LawBook, call: Call) -> Any:
    """Entries of the last axes over what all of these are."""
    number = len(call.normalized_shape)
    lead, inside = call.input.axes[: len(call.input.axes) - number], call.input.axes[len(call.input.axes) - number :]
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            inside = tuple(book.same(*pair) for pair in zip(inside, call.arguments[name].axes, strict=True))
    book.see(lead)
    result = Laid((*lead, *inside))
    if isinstance(call.result, Tensor):
        return result
    return [result, *(Laid((*lead, *((),) * (len(part.shape) - len(lead)))) for part in call.result[1:])]


@law("_weight_norm _weight_norm_interface")
def weight_norm(book: LawBook, call: Call) -> Any:
    """g·v / ‖v‖ with a norm for each place along one axis; for −1 one of all entries, of no order."""
    if call.dim == -1:
        book.see([])
        return call.v if isinstance(call.result, Tensor) else [call.v, call.g]
    place = call.dim % len(call.v.axes)
    norms = call.g.axes[place if len(call.g.axes) > 1 else 0]
    axis = book.same(call.v.axes[place], norms)
    book.see([axis])
    weight = call.v.with_axis(place, axis)
    return weight if isinstance(call.result, Tensor) else [weight, call.g]


@law("norm_except_dim")
def norm_except(book: LawBook, call: Call) -> Laid:
    """A norm for each place along one axis."""
    place = call.dim % len(call.v.axes)
    return Laid(tuple(axis if at == place else () for at, axis in enumerate(call.v.axes)))
