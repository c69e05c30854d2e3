"""The permutation that brings weights near to others."""

from torch import Tensor

from equinorm.permuting.arrangement import Sides
from equinorm.permuting.assignment import fixed_point
from equinorm.permuting.layout import Layout
from equinorm.permuting.matching import Tensors


def nearest(
    layout: Layout,
    weights: tuple[Tensors, Tensors],
    start: Tensors,
    sweeps: int,
    activations: Sides | None = None,
) -> tuple[dict[str, Tensor], int, float]:
    """Matching of one set of weights to another by sweeps of linear assignments, as in `equinorm.align`.

    Args:
        layout: where channels stand.
        weights: the tensors of one network by name, then of another of the same architecture; of one dtype, float32 or
            float64, on the CPU.
        start: the order of every family to start from, by name.
        sweeps: most of them.
        activations: these are matched, and weights only of families that stand at none of their points.

    Returns:
        An order of our channels for each family, by its name, the number of sweeps, and the sum of all products of what
        was matched first.
    """
    one, other = ([tensors[name] for name in layout.names] for tensors in weights)
    sides = [Sides(one, other, [*layout.axes.values()])]
    if activations is not None:
        sides.insert(0, activations)
    begun = {atom: start[family.name] for atom, family in zip(layout.atoms, layout.families, strict=True)}
    orders, taken, agreement = fixed_point(sides, layout.around, begun, sweeps)
    return layout.by_name([orders[atom] for atom in layout.atoms]), taken, agreement
