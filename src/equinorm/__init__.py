"""Equinorm: find, solve and apply the rescaling symmetries of PyTorch networks."""

import importlib.metadata

from equinorm import quantization, rules
from equinorm._deviation import deviation
from equinorm._equivalence import Equivalence, equivalence
from equinorm._errors import BalanceError, EqualizeError, EquinormError, EquivalenceError, ExportError, RescaleError
from equinorm._scaling import Family, Pin, Reason, Scaling
from equinorm._symmetries import Symmetries, balance, balance_, symmetries
from equinorm.balancing.balance import Balance
from equinorm.discovery.user_rules import register_rule
from equinorm.quantization.equalization import Equalization
from equinorm.quantization.equalize import equalize, equalize_
from equinorm.rescaling.optimizer_state import register_optimizer
from equinorm.training.enorm import ENorm

__version__ = importlib.metadata.version("equinorm")

__all__ = [
    "Balance",
    "BalanceError",
    "ENorm",
    "Equalization",
    "EqualizeError",
    "EquinormError",
    "Equivalence",
    "EquivalenceError",
    "ExportError",
    "Family",
    "Pin",
    "Reason",
    "RescaleError",
    "Scaling",
    "Symmetries",
    "__version__",
    "balance",
    "balance_",
    "deviation",
    "equalize",
    "equalize_",
    "equivalence",
    "quantization",
    "register_optimizer",
    "register_rule",
    "rules",
    "symmetries",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
