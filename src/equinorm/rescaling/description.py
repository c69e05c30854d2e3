"""An orbit in words: what moves, what is pinned, and by what."""

from collections.abc import Mapping

from torch import Tensor

from equinorm._display import EACH, SCREEN, as_html, count, percent, shortened
from equinorm._errors import describe
from equinorm._scaling import Pin, by_operation
from equinorm.rescaling.casts import described
from equinorm.rescaling.orbit import Orbit


def text(orbit: Orbit) -> str:
    """Everything if it fits a screen, else a summary."""
    lines = sum(bool(scaling.factors) for scaling in orbit.scalings) + len(orbit.pins) + len(described(orbit.casts))
    return details(orbit) if lines <= SCREEN else _summary(orbit)


def details(orbit: Orbit) -> str:
    """How every tensor moves, and every pin."""
    place = {id: f"{family.tensor}[{family.axis}]" for family in orbit.families for id in family.ids}
    lines = [_heading(orbit)]
    for scaling in orbit.scalings:
        if scaling.factors:
            parts = [_factor(exponent, ids, place) for exponent, ids in scaling.factors]
            shift = f" + {scaling.offset:g}" if scaling.offset else ""
            lines.append(f"  {' = '.join(scaling.names)}{shift} {list(scaling.shape)}: {', '.join(parts)}")
    lines += described(orbit.casts)
    if orbit.pins:
        lines.append("pinned:")
        lines += [f"  {pin.tensor}[{pin.axis}]: {pin.channels} channels by {pin.reason}" for pin in orbit.pins]
    return "\n".join(lines)


def markup(orbit: Orbit) -> str:
    """A table for notebooks."""
    facts: list[tuple[str, object]] = [
        ("free scale classes", f"{orbit.num_free:,} in {count(len(orbit.families), 'family', 'families')}"),
        ("parameters that move", percent(orbit.coverage, 1.0)),
        ("pinned", count(sum(pin.channels for pin in orbit.pins), "channel")),
    ]
    if orbit.casts:
        facts.append(("powers of two only", "; ".join(line.strip() for line in described(orbit.casts)[1:])))
    reasons = [(name, f"{channels:,}", f"{len(pins):,}") for name, channels, pins in by_operation(orbit.pins)]
    return as_html(
        f"Symmetries of {describe(orbit.model)}",
        facts,
        (("free classes of", "number"), [(f"{f.tensor}[{f.axis}]", f"{len(f.ids):,}") for f in orbit.families], "families"),
        (("pinned by", "channels", "axes"), reasons, "reasons"),
    )


def _heading(orbit: Orbit) -> str:
    families = count(len(orbit.families), "family", "families")
    return (
        f"{describe(orbit.model)}: {orbit.num_free} free scale classes in {families}; "
        f"{percent(orbit.coverage, 1.0)} of the parameters move"
    )


def _summary(orbit: Orbit) -> str:
    families = [
        f"{count(len(family.ids), 'class', 'classes')} from {family.tensor}[{family.axis}]" for family in orbit.families
    ]
    reasons = [
        f"{count(channels, 'channel')} on {count(len(pins), 'axis', 'axes')} by {name}, as {_example(pins[0])}"
        for name, channels, pins in by_operation(orbit.pins)
    ]
    lines = [_heading(orbit), *(f"  {line}" for line in shortened(families, EACH, "families"))]
    lines += described(orbit.casts)
    if reasons:
        lines += ["pinned:", *(f"  {line}" for line in shortened(reasons, EACH, "reasons"))]
    return "\n".join([*lines, "symmetries.details() shows every tensor and every pin."])


def _example(pin: Pin) -> str:
    return f"{pin.tensor}[{pin.axis}]" + (f" at {pin.reason.source}" if pin.reason.source else "")


def _factor(exponent: float, ids: Tensor, place: Mapping[int, str]) -> str:
    """How one axis of a tensor moves, in words."""
    axes = [axis for axis in range(ids.dim()) if ids.size(axis) > 1]
    free = ids[ids > 0]
    names = dict.fromkeys(place[id] for id in free.flatten().tolist())
    shown = ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
    power = "" if abs(exponent) == 1 else f"^{abs(exponent):g}"
    share = "" if free.numel() == ids.numel() else f" ({free.numel()} of {ids.numel()})"
    where = f"axis {'×'.join(map(str, axes))}" if axes else "all"
    return f"{where} {'×' if exponent > 0 else '÷'} {shown}{power}{share}"
