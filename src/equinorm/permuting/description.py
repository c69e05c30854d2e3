"""Permutations in words: what moves together, what is pinned, and by what."""

from collections.abc import Sequence

from torch import nn

from equinorm._display import EACH, SCREEN, as_html, count, shortened
from equinorm._errors import describe
from equinorm._scaling import by_operation
from equinorm.permuting.families import AxisPin, ChannelFamily


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
    reasons = [
        f"{number} channels on {count(len(here), 'axis', 'axes')} by {name}" for name, number, here in by_operation(pins)
    ]
    lines = [_heading(model, families), *(f"  {line}" for line in shortened(rows, EACH, "families"))]
    lines += ["pinned:", *(f"  {line}" for line in shortened(reasons, EACH, "reasons"))]
    return "\n".join([*lines, "permutations.details() shows every axis and every pin."])


def details(model: nn.Module, families: Sequence[ChannelFamily], pins: Sequence[AxisPin]) -> str:
    """Every family with all that moves along, and every pin."""
    lines = [_heading(model, families), *(f"  {family}" for family in families)]
    return "\n".join([*lines, "pinned:", *(f"  {pin}" for pin in pins)] if pins else lines)


def markup(model: nn.Module, families: Sequence[ChannelFamily], pins: Sequence[AxisPin]) -> str:
    """A table for notebooks."""
    rows = [(f.name, f"{f.size:,}", f"{f.orders:,}", f"{len(f.axes):,}") for f in families]
    reasons = [(name, f"{number:,}", f"{len(here):,}") for name, number, here in by_operation(pins)]
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
