"""Equinorm: find, solve and apply the rescaling symmetries of PyTorch networks."""

import importlib.metadata

from equinorm import quantization, rules
from equinorm._deviation import deviation
from equinorm._errors import (
    BalanceError,
    EqualizeError,
    EquinormError,
    EquivalenceError,
    ExportError,
    PermutationError,
    RescaleError,
)
from equinorm._scaling import Family, Pin, Reason, Scaling
from equinorm._symmetries import Symmetries, balance, balance_, symmetries
from equinorm.balancing.balance import Balance
from equinorm.discovery.user_rules import register_rule
from equinorm.grouping.check import MappingCheck
from equinorm.grouping.groups import ScaleGroup
from equinorm.joining.alignment import Alignment, align
from equinorm.joining.canonical import Canonical, canonical, canonical_
from equinorm.joining.differences import Change
from equinorm.joining.equivalence import Equivalence, equivalence
from equinorm.joining.interpolation import interpolate
from equinorm.joining.signs import Flip, Signs, signs
from equinorm.permuting.families import AxisPart, AxisPin, ChannelFamily, PermutationSpec
from equinorm.permuting.permutations import Permutations, permutations
from equinorm.permuting.user_rules import register_axes
from equinorm.quantization.equalization import Equalization
from equinorm.quantization.equalize import equalize, equalize_
from equinorm.rescaling.optimizer_laws import register_optimizer
from equinorm.rescaling.plan import Plan
from equinorm.training.enorm import ENorm

__version__ = importlib.metadata.version("equinorm")

__all__ = [
    "Alignment",
    "AxisPart",
    "AxisPin",
    "Balance",
    "BalanceError",
    "Canonical",
    "Change",
    "ChannelFamily",
    "ENorm",
    "Equalization",
    "EqualizeError",
    "EquinormError",
    "Equivalence",
    "EquivalenceError",
    "ExportError",
    "Family",
    "Flip",
    "MappingCheck",
    "PermutationError",
    "PermutationSpec",
    "Permutations",
    "Pin",
    "Plan",
    "Reason",
    "RescaleError",
    "ScaleGroup",
    "Scaling",
    "Signs",
    "Symmetries",
    "__version__",
    "align",
    "balance",
    "balance_",
    "canonical",
    "canonical_",
    "deviation",
    "equalize",
    "equalize_",
    "equivalence",
    "interpolate",
    "permutations",
    "quantization",
    "register_axes",
    "register_optimizer",
    "register_rule",
    "rules",
    "signs",
    "symmetries",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
