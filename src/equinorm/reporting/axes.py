"""Two axes to draw on."""

from typing import Any

from matplotlib import pyplot

from equinorm._errors import EquinormError


def two_axes(given: Any, height: float) -> Any:
    """The axes that a user gives, or new ones side by side.

    Raises:
        EquinormError: if they are not two.
    """
    axes = pyplot.subplots(1, 2, figsize=(10, height), layout="constrained")[1] if given is None else given
    try:
        _, _ = axes
    except (TypeError, ValueError) as error:
        raise EquinormError(f"axes must be two of matplotlib's, not {type(axes).__name__}.") from error
    return axes
