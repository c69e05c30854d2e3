"""Equinorm: find, solve and apply the rescaling symmetries of PyTorch networks."""

import importlib.metadata

from equinorm._deviation import deviation as deviation
from equinorm._equivalence import Equivalence as Equivalence, equivalence as equivalence
from equinorm._errors import (
    BalanceError as BalanceError,
    EquinormError as EquinormError,
    EquivalenceError as EquivalenceError,
    ExportError as ExportError,
    RescaleError as RescaleError,
)
from equinorm._scaling import Family as Family, Pin as Pin, Reason as Reason, Scaling as Scaling
from equinorm._symmetries import Symmetries as Symmetries, balance as balance, balance_ as balance_, symmetries as symmetries
from equinorm.balancing.balance import Balance as Balance
from equinorm.discovery.user_rules import register_rule as register_rule
from equinorm.rescaling.optimizer_state import register_optimizer as register_optimizer
from equinorm.training.enorm import ENorm as ENorm

__version__ = importlib.metadata.version("equinorm")
