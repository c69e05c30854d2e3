"""Records as JSON."""

import math
from dataclasses import asdict
from typing import Any


def as_json(record: Any) -> dict[str, Any]:
    """A record as JSON holds it: numbers that are not finite become the strings "inf", "-inf" and "nan"."""
    return _plain(asdict(record))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
