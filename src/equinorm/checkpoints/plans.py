"""Plans as files, and what they do to files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from equinorm._errors import dtype_name
from equinorm._scaling import Cast, Reason, Scaling
from equinorm.checkpoints.folder import open_checkpoint
from equinorm.checkpoints.rewriting import Rewriting, moves_of, rewrite_file
from equinorm.checkpoints.staging import rewrite_folder
from equinorm.checkpoints.stored import CheckpointError, open_stored, save_tensors
from equinorm.reporting.files import OutputError, write_atomically
from equinorm.rescaling.plan import Plan

_FORMAT = "equinorm plan 1"


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """See `Plan.save`. Ids that several tensors share are stored once."""
    ids = _Ids()
    described = {
        "fingerprint": plan.fingerprint,
        "scalings": [_described(scaling, ids) for scaling in plan.scalings],
        "stored": [_described(scaling, ids) for scaling in plan.stored],
        "casts": [_described_cast(cast, ids) for cast in plan.casts],
        "backward": plan.backward,
    }
    tensors = {"log_scales": plan.log_scales.contiguous(), **ids.tensors}
    metadata = {"format": _FORMAT, "plan": json.dumps(described)}
    write_atomically([(Path(path), lambda target: save_tensors(tensors, target, metadata))], force=True)


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """See `Plan.load`."""
    stored = open_stored(Path(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is no plan of equinorm, which Plan.save and equinorm balance --plan write.")
            described: Mapping[str, Any] = json.loads(metadata["plan"])
            tensors = {key: _wide(file.get_tensor(key)) for key in stored.by_key}
        plan = Plan(
            tensors["log_scales"],
            tuple(_scaling(part, tensors) for part in described["scalings"]),
            tuple(_scaling(part, tensors) for part in described["stored"]),
            tuple(_cast(part, tensors) for part in described["casts"]),
            tuple(described["backward"]),
        )
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: it describes no plan ({type(error).__name__}). Make it again.") from error
    highest = max((int(ids.max()) for s in (*plan.scalings, *plan.stored) for _, ids in s.factors if ids.numel()), default=0)
    if plan.fingerprint != described["fingerprint"] or highest > plan.num_free or not bool(plan.log_scales.isfinite().all()):
        raise CheckpointError(f"{path} is damaged: its tensors are not those that it was written with. Make it again.")
    return plan


def rewrite(plan: Plan, source: str | os.PathLike[str], output: str | os.PathLike[str]) -> int:
    """See `Plan.rewrite`."""
    source, output = Path(source), Path(output)
    if source.is_dir():
        checkpoint = open_checkpoint(source)
        return rewrite_folder(checkpoint, Rewriting(plan, moves_of(plan, checkpoint.entries, True)), output).underflows
    stored = open_stored(source)
    if output.suffix != ".safetensors":
        raise OutputError(f"{source} is one file and goes to one: {output} must end in .safetensors.")
    return rewrite_file(stored, Rewriting(plan, moves_of(plan, stored.by_key, False)), output)


class _Ids:
    """Id tensors by content, to be stored once each."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, bytes], str] = {}

    def name(self, ids: Tensor) -> str:
        """What they are stored as; 32 bits are enough for two billion classes."""
        small = ids.to(torch.int32).contiguous()
        key = (tuple(small.shape), small.numpy().tobytes())
        if key not in self._names:
            self._names[key] = f"ids.{len(self._names)}"
            self.tensors[self._names[key]] = small
        return self._names[key]


def _wide(tensor: Tensor) -> Tensor:
    """Ids in 64 bits, once for all tensors that share them."""
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _factors(factors: Sequence[tuple[float, Tensor]], ids: _Ids) -> list[tuple[float, str]]:
    return [(exponent, ids.name(part)) for exponent, part in factors]


def _read_factors(found: Sequence[Any], tensors: Mapping[str, Tensor]) -> tuple[tuple[float, Tensor], ...]:
    return tuple((float(exponent), tensors[name]) for exponent, name in found)


def _described(scaling: Scaling, ids: _Ids) -> dict[str, Any]:
    return {
        "names": scaling.names,
        "shape": scaling.shape,
        "dtype": dtype_name(scaling.dtype),
        "kind": scaling.kind,
        "role": scaling.role,
        "depth": scaling.depth,
        "factors": _factors(scaling.factors, ids),
        "offset": scaling.offset,
        "is_squared": scaling.is_squared,
    }


def _scaling(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scaling:
    return Scaling(
        names=tuple(found["names"]),
        shape=tuple(found["shape"]),
        dtype=getattr(torch, found["dtype"]),
        kind=found["kind"],
        role=found["role"],
        depth=int(found["depth"]),
        factors=_read_factors(found["factors"], tensors),
        offset=float(found["offset"]),
        is_squared=bool(found["is_squared"]),
    )


def _described_cast(cast: Cast, ids: _Ids) -> dict[str, Any]:
    reason = cast.reason
    return {
        "dtype": dtype_name(cast.dtype),
        "reason": [reason.operation, reason.detail, reason.source, reason.code, reason.module],
        "factors": _factors(cast.factors, ids),
        "tensor": cast.tensor,
        "by_autocast": cast.by_autocast,
    }


def _cast(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Cast:
    dtype, factors = getattr(torch, found["dtype"]), _read_factors(found["factors"], tensors)
    return Cast(dtype, Reason(*found["reason"]), factors, found["tensor"], bool(found["by_autocast"]))
