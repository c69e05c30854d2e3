"""What a `Balance` draws of itself: two axes, or a page."""

import math
import os
from typing import Any

import matplotlib

from equinorm._errors import describe
from equinorm._memory import is_sharded
from equinorm._scaling import Scaling
from equinorm.balancing.balance import Balance
from equinorm.reporting import pictures
from equinorm.reporting.axes import two_axes
from equinorm.reporting.files import write_report
from equinorm.reporting.records import Balanced, Weights
from equinorm.reporting.style import STYLE
from equinorm.reporting.words import solution


def plot(balance: Balance, axes: Any = None) -> Any:
    """See `Balance.plot`."""
    record = _balanced(balance)
    with matplotlib.rc_context(STYLE):
        axes = two_axes(axes, min(max(3.2, 1.3 + 0.3 * len(record.energies)), 9.0))
        left, right = axes
        if not balance.energies:
            left.text(0.0, 1.0, balance.reason, va="top", wrap=True, transform=left.transAxes)
            left.set_axis_off()
            right.set_axis_off()
            return axes
        pictures.energies(left, record)
        left.set_xlabel(f"energy of each tensor, {pictures.mathematics(record)}")
        pictures.convergence(right, record)
    return axes


def report(balance: Balance, path: str | os.PathLike[str]) -> None:
    """See `Balance.report`."""
    write_report(path, lambda target: pictures.draw(target, _balanced(balance), _weights(balance)))


def _balanced(balance: Balance) -> Balanced:
    model = describe(balance.symmetries.model)
    facts = [
        *solution(balance),
        ("method", balance.method),
        ("asymmetry c", f"{balance.c:g}"),
        ("free classes", f"{balance.symmetries.num_free:,}"),
        ("dead channels", f"{len(balance.dead):,}"),
        ("model", model),
    ]
    join = (lambda parts: max(parts, default=0.0)) if math.isinf(balance.p) else math.fsum
    totals = join([energy.before for energy in balance.energies]), join([energy.after for energy in balance.energies])
    return Balanced(model, balance.p, balance.c, balance.energies, totals, balance.residuals, 0.0, tuple(facts))


def _weights(balance: Balance) -> list[Weights]:
    """Weights as they are and as they would be; none once they have changed, or where no process holds all of them."""
    tensors = balance.symmetries.tensors
    if balance.versions != balance.symmetries.versions() or any(map(is_sharded, tensors.values())):
        return []

    def after(scaling: Scaling) -> Any:
        scales = scaling.log_scales(balance.log_scales).exp()
        return scaling.effective(tensors[scaling.name]).to("cpu", scales.dtype) * scales - scaling.offset

    return pictures.pictured(balance.symmetries.scalings, tensors, after)
