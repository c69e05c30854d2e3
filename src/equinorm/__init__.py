"""Equinorm: find, solve and apply the rescaling symmetries of PyTorch networks."""

import importlib.metadata

from equinorm import quantization, rules
from equinorm._alignment import Alignment, align
from equinorm._deviation import deviation
from equinorm._equivalence import Equivalence, equivalence
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
from equinorm.permuting.families import AxisPart, AxisPin, ChannelFamily, PermutationSpec
from equinorm.permuting.permutations import Permutations, permutations
from equinorm.quantization.equalization import Equalization
from equinorm.quantization.equalize import equalize, equalize_
from equinorm.rescaling.optimizer_state import register_optimizer
from equinorm.rescaling.plan import Plan
from equinorm.training.enorm import ENorm

__version__ = importlib.metadata.version("equinorm")

__all__ = [
    "Alignment",
    "AxisPart",
    "AxisPin",
    "Balance",
    "BalanceError",
    "ChannelFamily",
    "ENorm",
    "Equalization",
    "EqualizeError",
    "EquinormError",
    "Equivalence",
    "EquivalenceError",
    "ExportError",
    "Family",
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
    "Symmetries",
    "__version__",
    "align",
    "balance",
    "balance_",
    "deviation",
    "equalize",
    "equalize_",
    "equivalence",
    "permutations",
    "quantization",
    "register_optimizer",
    "register_rule",
    "rules",
    "symmetries",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
