"""What rules of your own are written with; see `equinorm.register_rule`."""

from equinorm.discovery.rules import TABLE, Call, Label, Trace, contract, find, key, qualified

__all__ = ["TABLE", "Call", "Label", "Trace", "contract", "find", "key", "qualified"]
