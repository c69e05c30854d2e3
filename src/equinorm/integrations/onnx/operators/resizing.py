"""Resizing: entries chosen, or mixed, along each axis by itself."""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from equinorm.integrations.onnx.operators.movement import numbers
from equinorm.integrations.onnx.operators.registry import NodeCall, operator


def _places(mode: str, size: int, new: int, scale: float) -> ndarray:
    """Where each entry of the result lies on the axis of the input; in single precision as in onnxruntime, for ties."""
    at = np.arange(new, dtype=np.float32)
    if mode == "asymmetric":
        return at / np.float32(scale)
    if mode == "align_corners":
        return at * (size - 1) / (new - 1) if new > 1 else at * 0
    if mode == "pytorch_half_pixel" and new == 1:
        return at * 0
    return (at + 0.5) / np.float32(scale) - 0.5


def _nearest(places: ndarray, mode: str) -> ndarray:
    """Places rounded to entries."""
    if mode == "floor":
        return np.floor(places)
    if mode == "ceil":
        return np.ceil(places)
    return np.floor(places + 0.5) if mode == "round_prefer_ceil" else np.ceil(places - 0.5)


def _mixing(places: ndarray, size: int) -> ndarray:
    """The matrix of linear interpolation, (new, old)."""
    places = np.clip(places, 0, size - 1)
    low = np.minimum(np.floor(places).astype(np.int64), size - 1)
    high, share = np.minimum(low + 1, size - 1), places - low
    matrix = np.zeros((len(places), size))
    np.add.at(matrix, (np.arange(len(places)), low), 1 - share)
    np.add.at(matrix, (np.arange(len(places)), high), share)
    return matrix


@operator(
    "Resize",
    "antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside extrapolation_value "
    "keep_aspect_ratio_policy mode nearest_mode",
    settings=(1, 2, 3),
)
def resize(call: NodeCall, x: Tensor, *given: ndarray | None) -> Tensor:
    """Another size by nearest or linear interpolation."""
    _, scales, sizes = (None, *given, None) if call.opset < 11 else (*given, *[None] * (3 - len(given)))
    coordinates = call.get("coordinate_transformation_mode", "half_pixel" if call.opset >= 11 else "asymmetric")
    mode = call.get("mode", "nearest")
    rounding = call.get("nearest_mode", "round_prefer_floor" if call.opset >= 11 else "floor")
    known = ("asymmetric", "align_corners", "half_pixel", "pytorch_half_pixel")
    call.need(mode in ("nearest", "linear") and coordinates in known, f"resizing by {mode} with {coordinates}")
    stretches = call.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    call.need(stretches and not call.get("antialias", 0), "resizing that keeps ratios or smooths")
    axes = [*range(x.dim())] if call.get("axes") is None else [axis % x.dim() for axis in call.get("axes")]
    if sizes is not None and sizes.size:
        wanted = [(new, new / x.shape[axis]) for axis, new in zip(axes, numbers(sizes), strict=True)]
    else:
        call.need(scales is not None and scales.size > 0, "sizes that data decide")
        factors = np.asarray(scales).reshape(-1)
        wanted = [(int(np.floor(x.shape[axis] * s)), float(s)) for axis, s in zip(axes, factors, strict=True)]
    for axis, (new, scale) in zip(axes, wanted, strict=True):
        whole = coordinates != "align_corners" or new == scale * x.shape[axis]
        call.need(whole or sizes is not None, "corners of a size that was rounded")
        if new != x.shape[axis] or scale != 1:
            how = "" if mode == "linear" else "ceil" if call.opset < 11 and scale < 1 else rounding
            x = _resized(x, axis, _places(coordinates, x.shape[axis], new, scale), how)
    return x


def _resized(x: Tensor, axis: int, places: ndarray, rounding: str) -> Tensor:
    size = x.shape[axis]
    if rounding:
        rows = np.clip(_nearest(places, rounding), 0, size - 1).astype(np.int64)
        return x.index_select(axis, torch.tensor(rows.tolist()))
    matrix = torch.tensor(_mixing(places, size).tolist(), dtype=x.dtype)
    return torch.matmul(x.movedim(axis, -1), matrix.t()).movedim(-1, axis)


@operator("Upsample", "mode scales", settings=(1,))
def upsample(call: NodeCall, x: Tensor, scales: Any = None) -> Tensor:
    """What Resize was before version 10."""
    factors = call.get("scales") if scales is None else scales
    return resize(NodeCall("Resize", 10, {"mode": call.get("mode", "nearest")}), x, np.asarray(factors))
