"""A balance in words, as a table and as plain data."""

from typing import TYPE_CHECKING, Any

from equinorm._display import as_html, count, norm_name, plain
from equinorm._errors import describe

if TYPE_CHECKING:
    from equinorm.balancing.balance import Balance

_FIELDS = ("p", "c", "method", "norm_before", "norm_after", "residuals", "residual", "cycles", "converged", "reason", "dead")


def text(balance: "Balance") -> str:
    """One line."""
    if not balance.energies:
        return balance.reason
    asymmetry = f", c = {balance.c:g}" if balance.c != 1 else ""
    return (
        f"{norm_name(balance.p)} norm {balance.norm_before:.6g} → {balance.norm_after:.6g}{asymmetry}, residual "
        f"{balance.residual:.1e} after {count(balance.cycles, f'{balance.method} cycle')}"
        + ("" if balance.converged else f": {balance.reason}")
        + (f"; {count(len(balance.dead), 'dead channel')} left at scale 1" if balance.dead else "")
    )


def markup(balance: "Balance") -> str:
    """A table for notebooks."""
    title = f"Balance of {describe(balance.symmetries.model)}"
    if not balance.energies:
        return as_html(title, [("result", balance.reason)])
    cycles = count(balance.cycles, f"{balance.method} cycle")
    facts = [
        (f"{norm_name(balance.p)} norm", f"{balance.norm_before:.6g} → {balance.norm_after:.6g}"),
        ("residual", f"{balance.residuals[0]:.1e} → {balance.residual:.1e} after {cycles}"),
        *([("asymmetry c", f"{balance.c:g}")] if balance.c != 1 else []),
        ("result", balance.reason),
        *([("left at scale 1", count(len(balance.dead), "dead channel"))] if balance.dead else []),
    ]
    rows = [(energy.name, f"{energy.before:.6g}", f"{energy.after:.6g}") for energy in balance.energies]
    return as_html(title, facts, (("energy of", "before", "after"), rows, "tensors"))


def as_dict(balance: "Balance") -> dict[str, Any]:
    """All but the model, as JSON holds it."""
    energies = [{"name": e.name, "before": e.before, "after": e.after} for e in balance.energies]
    record = {name: getattr(balance, name) for name in _FIELDS}
    return plain({**record, "energies": energies, "log_scales": balance.log_scales.tolist()})
