"""Permutations in words: what moves together, what is pinned, and by what."""

from collections.abc import Sequence

from torch import nn

from equinorm._display import as_html, count, shortened
from equinorm._errors import describe
from equinorm.permuting.families import AxisPin, ChannelFamily

SCREEN = 24
"""Most lines about families and pins that are shown instead of a summary."""

_FAMILIES, _REASONS = 9, 9
"""Most lines of a summary about each."""


def channels(families: Sequence[ChannelFamily]) -> int:
    """Channels of all families, those of each head or group counted apart."""
    return sum(family.size * family.orders for family in families)


def text(model: nn.Module, families: Sequence[ChannelFamily], pins: Sequence[AxisPin]) -> str:
    """Everything if it fits a screen, else a summary."""
    if len(families) + len(pins) <= SCREEN:
        return details(model, families, pins)
    rows = [
        f"{f'{f.orders} × ' if f.within else ''}{f.size} channels of {f.name}, along {count(len(f.axes), 'axis', 'axes')}"
        for f in families
    ]
    reasons = [f"{number} channels on {count(axes, 'axis', 'axes')} by {name}" for name, number, axes in _reasons(pins)]
    lines = [_heading(model, families), *(f"  {line}" for line in shortened(rows, _FAMILIES, "families"))]
    lines += ["pinned:", *(f"  {line}" for line in shortened(reasons, _REASONS, "reasons"))]
    return "\n".join([*lines, "permutations.details() shows every axis and every pin."])


def details(model: nn.Module, families: Sequence[ChannelFamily], pins: Sequence[AxisPin]) -> str:
    """Every family with all that moves along, and every pin."""
    lines = [_heading(model, families), *(f"  {family}" for family in families)]
    return "\n".join([*lines, "pinned:", *(f"  {pin}" for pin in pins)] if pins else lines)


def markup(model: nn.Module, families: Sequence[ChannelFamily], pins: Sequence[AxisPin]) -> str:
    """A table for notebooks."""
    rows = [(f.name, f"{f.size:,}", f"{f.orders:,}", f"{len(f.axes):,}") for f in families]
    reasons = [(name, f"{number:,}", f"{axes:,}") for name, number, axes in _reasons(pins)]
    facts = [("channels that can be permuted", f"{channels(families):,} in {count(len(rows), 'family', 'families')}")]
    return as_html(
        f"Permutations of {describe(model)}",
        facts,
        (("family", "channels", "orders", "axes"), rows, "families"),
        (("pinned by", "channels", "axes"), reasons, "reasons"),
    )


def _heading(model: nn.Module, families: Sequence[ChannelFamily]) -> str:
    number = count(len(families), "family", "families")
    return f"{describe(model)}: {channels(families)} channels in {number} can be permuted"


def _reasons(pins: Sequence[AxisPin]) -> list[tuple[str, int, int]]:
    """Each operation that pins, with channels and axes; most channels first."""
    found: dict[str, tuple[int, int]] = {}
    for pin in pins:
        name = pin.reason.operation + (f" ({pin.reason.detail})" if pin.reason.detail else "")
        number, axes = found.get(name, (0, 0))
        found[name] = number + pin.channels, axes + 1
    return sorted(((name, *numbers) for name, numbers in found.items()), key=lambda row: -row[1])
