"""Minimise: the log-scales of least noise, and an estimate of how far above the least they are."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from equinorm.quantization.noise import Noise

FRESH, SHARP, SHARPEST = (4.0, 16.0), 64.0, 256.0
"""Exponents of power means: first coarse ones, then one whose weights are found as multipliers, and one for the last digits."""

LATE = 12
"""The round from which digits are the last."""

ROUNDS, STEPS, MEMORY = 100, 60, 12
"""Rounds of multipliers at most, steps of each, and pairs that L-BFGS remembers."""

PATIENCE = 25
"""Rounds in which the gap must become smaller by a tenth."""

STILL = 8
"""Steps in a row after which little must be left: the quadratic model of the first ones knows few directions."""

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


@dataclass(frozen=True, slots=True, eq=False)
class LeastNoise:
    """Where the noise is least.

    Attributes:
        z: log-scales.
        value: ln N there.
        bound: estimate of the least ln N: a bound from below as far as the quadratic model of each search is right.
        rounds: of multipliers.
    """

    z: np.ndarray
    value: float
    bound: float
    rounds: int

    @property
    def gap(self) -> float:
        """By which share N is above the estimate of the least: N / bound − 1."""
        return math.expm1(max(self.value - self.bound, 0.0))


def minimize(noise: Noise, tol: float, limit: float, start: np.ndarray | None = None) -> LeastNoise:
    """Minimise the noise over the box |z| ≤ limit.

    The maxima make N kinked where it is least: many numbers are largest together. Multipliers μ say with which weight: the
    power mean with weights μ is smooth and below the maximum, so its minimum bounds N from below; the shares of numbers in it
    are the next μ. At the optimum both meet (the exponential method of multipliers).

    Args:
        noise: the function.
        tol: on the gap.
        limit: on every |z|.
        start: log-scales to start from; zeros if not given.
    """
    z = np.zeros(noise.num_free) if start is None else np.clip(start, -limit, limit)
    with one_thread():
        return _minimized(noise, z, tol, limit)


@contextmanager
def one_thread() -> Iterator[None]:
    """Without threads inside operations: thousands of small ones would wait for them most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _minimized(noise: Noise, z: np.ndarray, tol: float, limit: float) -> LeastNoise:
    best, lowest = (_value(noise, z), z), -math.inf
    rounds = 0
    for beta in FRESH:
        noise.sharpen(z, beta, None)
        z, _, _ = descend(noise.smooth, z, limit, 1e-3, STEPS)
    best = min(best, (_value(noise, z), z), key=lambda pair: pair[0])
    gaps: list[float] = []
    for rounds in range(1, ROUNDS + 1):
        noise.sharpen(z, SHARP if rounds < LATE else SHARPEST, None if rounds == 1 else min(1e-3, 2 * tol))
        z, value, slack = descend(noise.smooth, z, limit, min(1e-3, 0.02 * max(tol, 1e-12)), STEPS)
        if rounds > 1:
            lowest = max(lowest, value - slack)
        best = min(best, (_value(noise, z), z), key=lambda pair: pair[0])
        gaps.append(best[0] - lowest)
        if gaps[-1] <= math.log1p(tol) or (rounds > PATIENCE + 2 and gaps[-1] > 0.9 * gaps[-1 - PATIENCE]):
            break
    return LeastNoise(best[1], best[0], min(lowest, best[0]), rounds)


def _value(noise: Noise, z: np.ndarray) -> float:
    """ln N."""
    return float(np.log(noise.exact(z).sum()))


def descend(function: Function, z: np.ndarray, limit: float, tol: float, steps: int) -> tuple[np.ndarray, float, float]:
    """L-BFGS in a box, on the coordinates that its bounds do not hold.

    Returns:
        Where it ends, the value there, and by how much the quadratic model says that it can still fall.
    """
    value, gradient = function(z)
    pairs: list[tuple[np.ndarray, np.ndarray, float]] = []
    slack, still = math.inf, 0
    for _ in range(steps):
        is_held = ((z >= limit) & (gradient < 0)) | ((z <= -limit) & (gradient > 0))
        direction = np.where(is_held, 0.0, -_inverse(pairs, np.where(is_held, 0.0, gradient)))
        slope = dot(direction, gradient)
        if slope >= 0:
            pairs, direction = [], np.where(is_held, 0.0, -gradient)
            slope = dot(direction, gradient)
        slack = -slope
        still = still + 1 if pairs and slack <= tol else 0
        if still == STILL or slope == 0:
            break
        length, largest = 1.0, float(np.abs(direction).max())
        if not pairs:
            length = min(1.0, 0.5 / max(largest, 1e-300))
        length = min(length, 2.0 / max(largest, 1e-300))
        for _ in range(25):
            moved = np.clip(z + length * direction, -limit, limit)
            after, new = function(moved)
            if after <= value + 1e-4 * dot(gradient, moved - z):
                break
            length *= 0.4
        else:
            if not pairs:
                break
            pairs = []
            continue
        step, change = moved - z, new - gradient
        curvature = dot(step, change)
        if curvature > 1e-12 * dot(step, step):
            pairs = [*pairs[-MEMORY + 1 :], (step, change, curvature)]
        z, value, gradient = moved, after, new
    return z, value, slack


def dot(one: np.ndarray, other: np.ndarray) -> float:
    """Σ a·b, by NumPy's own loop: its library would start threads for it."""
    return float(np.einsum("i,i->", one, other))


def _inverse(pairs: list[tuple[np.ndarray, np.ndarray, float]], gradient: np.ndarray) -> np.ndarray:
    """The inverse Hessian of L-BFGS times a gradient."""
    result, kept = gradient.copy(), []
    for step, change, curvature in reversed(pairs):
        share = dot(step, result) / curvature
        result -= share * change
        kept.append(share)
    if pairs:
        step, change, curvature = pairs[-1]
        result *= curvature / dot(change, change)
    for (step, change, curvature), share in zip(pairs, reversed(kept), strict=True):
        result += (share - dot(change, result) / curvature) * step
    return result
