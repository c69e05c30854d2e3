"""Casts that matter: of values whose classes scale weights of more bits."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equinorm._class_ids import joint_log_scales
from equinorm._scaling import Cast, Scaling
from equinorm.discovery.resolve import factors
from equinorm.discovery.trace import Trace
from equinorm.discovery.values import loses, source_of


def casts(trace: Trace, scalings: Sequence[Scaling], roots: np.ndarray) -> tuple[Cast, ...]:
    """Casts that matter: of values whose classes scale weights of more bits. Others are as exact as weights of their own dtype.

    Args:
        trace: what was seen.
        scalings: of the model's tensors.
        roots: the free classes that these use.
    """
    anywhere = torch.rand(len(roots) + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    anywhere[0] = 0.0
    wide: dict[torch.dtype, Tensor] = {}
    found = []
    for value, dtype, reason, by_autocast in trace.casts:
        source = source_of(value)
        name = source.names[0] if source else ""
        cast = Cast(dtype, reason, factors(trace.label(value), trace.classes, roots), name, by_autocast)
        if dtype not in wide:
            free = [scaling.free() for scaling in scalings if loses(scaling.dtype, dtype)]
            wide[dtype] = torch.cat([torch.zeros(0, dtype=torch.long), *free])
        scales = bool((joint_log_scales(cast.factors, anywhere).abs() > 1e-9).any())  # its factors may cancel
        if scales and bool(torch.isin(cast.free(), wide[dtype]).any()):
            found.append(cast)
    return tuple(found)
