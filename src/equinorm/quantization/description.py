"""An equalization in words, as a table and as plain data."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from equinorm._display import as_html, by_reason, count, plain
from equinorm._errors import describe

if TYPE_CHECKING:
    from equinorm.quantization.equalization import Equalization

_FIELDS = ("noise_before", "noise_after", "measured_before", "measured_after", "gap", "converged", "reason", "samples")


def text(found: "Equalization") -> str:
    """One line."""
    return (
        f"{found.scheme}: signal over quantization noise {change(found.noise_before, found.noise_after)} predicted, "
        f"{change(found.measured_before, found.measured_after)} measured; {found.reason}"
    )


def facts(found: "Equalization") -> list[tuple[str, str]]:
    """Names and values."""
    return [
        ("scheme", str(found.scheme)),
        ("signal over noise, predicted", change(found.noise_before, found.noise_after)),
        ("signal over noise, measured", change(found.measured_before, found.measured_after)),
        ("result", found.reason),
        ("free classes", f"{found.symmetries.num_free:,}"),
        ("calibration", count(found.samples, "sample")),
        *([("biases corrected", count(len(found.corrections), "layer"))] if found.corrections else []),
        *([("left", _shortened(found.left))] if found.left else []),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in found.seconds.items())),
    ]


def table(found: "Equalization") -> list[tuple[str, str, str, str]]:
    """Name, kind, dB before and after of every tensor."""
    return [(t.name, t.kind, f"{t.before:.1f}", f"{t.after:.1f}") for t in found.tensors]


def markup(found: "Equalization") -> str:
    """A table for notebooks."""
    columns = "signal over noise of", "kind", "before, dB", "after, dB"
    return as_html(f"Equalization of {describe(found.model)}", facts(found), (columns, table(found), "tensors"))


def as_dict(found: "Equalization") -> dict[str, Any]:
    """All but the model and the data."""
    tensors = [{"name": t.name, "kind": t.kind, "before": t.before, "after": t.after} for t in found.tensors]
    record = {name: getattr(found, name) for name in _FIELDS}
    further = {
        "left": dict(found.left),
        "log_scales": found.log_scales.tolist(),
        "corrected": sorted(found.corrections),
        "seconds": dict(found.seconds),
    }
    return plain({"scheme": str(found.scheme), **record, "tensors": tensors, **further})


def _shortened(left: Mapping[str, str]) -> str:
    """Why sums stay in float, and how many for each reason."""
    return "; ".join(f"{first}{f' and {len(more)} more' if more else ''}: {why}" for why, (first, *more) in by_reason(left))


def change(before: float, after: float) -> str:
    """Two numbers of decibels."""
    return f"{before:.1f} → {after:.1f} dB"
