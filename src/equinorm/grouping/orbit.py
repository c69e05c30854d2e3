"""An orbit that knows its scale groups."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from equinorm.discovery.inner_values import InnerValues
from equinorm.grouping.check import AxisName, MappingCheck, check
from equinorm.grouping.find import groups
from equinorm.grouping.groups import ScaleGroups
from equinorm.grouping.mappings import SmoothMappings, mappings
from equinorm.grouping.wishes import Wishes, nearest
from equinorm.modules.running import on_cpu
from equinorm.rescaling.orbit import Orbit


@dataclass(frozen=True, slots=True, eq=False)
class GroupedOrbit(Orbit):
    """All rescaling-equivalent weights of one model, and how the values inside scale with these.

    Attributes:
        values: how every value inside the network scales, in the order of its graph: of the first inputs, in the model's mode.
    """

    values: InnerValues = field(repr=False)

    @on_cpu()
    def groups(self) -> ScaleGroups:
        """Scale groups: for each family of classes the axes that bring it in, those that take it out, and what carries it.

        These are what tables of mappings for smoothing and quantization write down by hand: which norm feeds which
        projections. Groups of which all is pinned come last, with the reason.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4, bias=False))
        >>> print(equinorm.symmetries(net, (torch.randn(5, 3),)).groups()[1])
        2.weight[0] is pinned: 4 channels by model output.
        """
        return groups(self, self.values)

    @on_cpu()
    def mappings(self) -> SmoothMappings:
        """The groups in the form of mappings: a norm, or a layer, and every module that reads what it scales.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4))
        >>> print(equinorm.symmetries(net, (torch.randn(5, 3),)).mappings())
        0 → 2
        """
        return mappings(self.groups())

    @on_cpu()
    def check(self, smooth: AxisName, balance: Iterable[AxisName]) -> MappingCheck:
        """Is it right to scale one axis and to make up for it on others?

        Args:
            smooth: a tensor and its axis, a tensor, or a module (its weight): a norm, or the layer in front.
            balance: modules, tensors, or tensors with an axis, that take the scale out.

        Returns:
            `valid`, and what is missing, too much or pinned, with source lines. It prints as sentences.

        Raises:
            EquinormError: for names that the model does not have, or a tensor of which the axis is not clear.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4))
        >>> symmetries = equinorm.symmetries(net, (torch.randn(5, 3),))
        >>> print(symmetries.check("0", ["2"]))
        0.weight[0] → 2.weight[1]: right.
        >>> symmetries.check("0", []).valid
        False
        """
        return check(self, self.groups(), smooth, balance)

    @on_cpu()
    def scales(self, wishes: Wishes, reduce: str = "geometric mean") -> Tensor:
        """The valid log-scales nearest to scales that are wished for on some axes; 0 for all other classes.

        Minimises Σ_i (Σ_f exponent_f · z[ids_f(i)] − log s_i)² over z: channels of one class (queries that share a key,
        halves that rotate together, tied weights) get the geometric mean of their wishes. Where a channel's scale is pinned
        its wish is left out.

        Args:
            wishes: scales s > 0 by (name of a tensor, axis), of the shape of that axis: what its entries are to be multiplied
                with. For experts in one tensor the axis is a tuple; for one scale of a whole tensor an empty one.
            reduce: "geometric mean", or "maximum" or "minimum": the largest or smallest wish for a class. Where axes that move
                inversely, as queries and keys, have wishes, those of the axis that is named first decide.

        Returns:
            Free log-scales of shape (num_free,), float64, for `rescale_`.

        Raises:
            RescaleError: for unknown tensors and axes, other shapes, scales that are not positive, axes that are pinned.

        >>> import torch, equinorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 4))
        >>> symmetries = equinorm.symmetries(net, (torch.randn(5, 3),))
        >>> symmetries.scales({("0.weight", 0): [2.0, 0.5]})
        tensor([ 0.6931, -0.6931], dtype=torch.float64)
        >>> symmetries.rescale_(_)
        """
        return nearest(self, wishes, reduce)
