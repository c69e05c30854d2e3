"""What the command line reports, as plain records: numbers, strings and lists, ready for a renderer or for JSON."""

from dataclasses import dataclass

from equinorm.balancing.balance import TensorEnergy
from equinorm.reporting.records import Weights as Weights


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """Free classes of one axis: how many, and how many tensors move with any of them."""

    tensor: str
    axis: int
    classes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class PinRow:
    """Channels that cannot scale and the operation and source line that say so."""

    tensor: str
    axis: int
    channels: int
    operation: str
    detail: str
    source: str
    code: str
    module: str


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor: how many of its entries a free class moves."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    role: str
    entries: int
    moving: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """Record of `equinorm inspect`; `moving` and `parameters` count entries of parameters, `notes` are about the weights."""

    model: str
    inputs: str
    num_free: int
    parameters: int
    moving: int
    coverage: float
    families: tuple[FamilyRow, ...]
    pins: tuple[PinRow, ...]
    tensors: tuple[TensorRow, ...]
    seconds_export: float
    seconds_labels: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Balancing:
    """Record of `equinorm balance`: the fields of `Balance`, and what was verified and written.

    `energies` sum (have their maximum, if p = ∞) to `energy_before` and `energy_after`; norms are these to the power 1/p.
    """

    model: str
    inputs: str
    p: float
    c: float
    method: str
    biases: bool
    power_of_two: bool
    tol: float
    num_free: int
    dead: int
    norm_before: float
    norm_after: float
    energy_before: float
    energy_after: float
    energies: tuple[TensorEnergy, ...]
    residuals: tuple[float, ...]
    residual: float
    cycles: int
    converged: bool
    reason: str
    deviation: float
    limit: float
    dtype: str
    changed: bool
    seconds: float
    output: str | None = None
    report: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor whose canonical forms differ, relatively by this much."""

    tensor: str
    difference: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Record of `equinorm compare`.

    `equivalent`, `difference`, `tolerance` and `different` are those of `equinorm.equivalence`. They are None where the
    networks have different tensors, so that no rescaling can join them; `note` says so. Else it says what the verdict does not.
    """

    model_a: str
    model_b: str
    inputs: str
    deviation: float
    limit: float
    same_outputs: bool
    equivalent: bool | None
    difference: float | None
    tolerance: float | None
    different: tuple[Difference, ...]
    num_scales: int | None
    largest_scale: float | None
    note: str
    notes: tuple[str, ...] = ()
