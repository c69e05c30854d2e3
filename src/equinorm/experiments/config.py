"""Configurations: one run, and one sweep over methods, depths, batch sizes and seeds."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from equinorm._errors import EquinormError
from equinorm.balancing.options import LARGEST_P, LEAST_P


class ExperimentError(EquinormError):
    """An experiment was asked for that cannot be run; says what to change."""


@dataclass(frozen=True, slots=True)
class Method:
    """What a method adds to stochastic gradient descent.

    Attributes:
        label: for tables and pictures.
        norm: "none", "batch" or "group".
        weight_norm: weights written as g·v/‖v‖.
        balancing: "" or the `method` of the hook `equinorm.ENorm` after every step.
        path: divide gradients by the path-norm's κ (path-SGD).
        init: "he", "pathcond" or "balanced": what is done to the He weights before the first step.
    """

    label: str
    norm: str = "none"
    weight_norm: bool = False
    balancing: str = ""
    path: bool = False
    init: str = "he"


METHODS = {
    "baseline": Method("baseline"),
    "bn": Method("BN", norm="batch"),
    "gn": Method("GN", norm="group"),
    "wn": Method("WN", weight_norm=True),
    "wn_bn": Method("WN + BN", norm="batch", weight_norm=True),
    "path_sgd": Method("path-SGD", path=True),
    "pathcond": Method("PathCond init", init="pathcond"),
    "balanced": Method("balanced init", init="balanced"),
    "enorm": Method("ENorm", balancing="cyclic"),
    "enorm_exact": Method("ENorm exact", balancing="two-level"),
    "enorm_bn": Method("ENorm + BN", norm="batch", balancing="cyclic"),
    "enorm_gn": Method("ENorm + GN", norm="group", balancing="cyclic"),
}

_LEAST = {
    **dict.fromkeys(("width", "batch", "epochs", "cycles", "every", "path_every"), 1),
    **dict.fromkeys(("depth", "lr", "momentum", "weight_decay", "clip", "agc", "warmup", "head", "branch", "c", "c_end"), 0),
}
"""Least value of each number of a run; c = 0 chooses c by depth, and 0 switches others off."""

NETWORKS = ("fc", "conv", "resnet18c", "resnet18", "resnet50")


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that decides the result of one training run, but for the machine.

    Attributes:
        data: "digits", "cifar10", or "images" (a folder of images).
        network: one of `NETWORKS`.
        method: one of `METHODS`.
        depth: number of width × width layers of the fully connected network.
        width: features of its hidden layers; channels of the first convolution of the others.
        biases: of linear and convolution layers.
        batch: images in a batch.
        epochs: passes over the training images.
        lr: learning rate before its linear way to 0.
        momentum: of SGD.
        weight_decay: coupled, on every parameter.
        clip: largest global norm of what the optimizer takes for the gradient; 0 for no limit.
        agc: adaptive gradient clipping (Brock et al., 2021): largest norm of a neuron's gradient over that of its weights, or
            over 0.001, but in the last layer; 0 for no limit.
        warmup: epochs in which the learning rate grows linearly from 0.
        head: factor on the initial weights of the last layer; below 1 the network starts with small logits.
        branch: factor on the initial weights of the last layer of each residual branch; below 1 blocks start near the identity.
        identity: learned skips start at the identity, and `centred` leaves them.
        centred: subtract from each inner neuron's weights their mean over the fan-in, at the start and after every step.
        centralise: subtract from each neuron's gradient its mean over the fan-in, but in the first layer (Yong et al., 2020).
        c: asymmetry of ENorm; 0 in a sweep stands for what `asymmetry` gives at each depth.
        c_end: what c becomes, linearly over the epochs; 0 for no change.
        p: its norm.
        cycles: after a step.
        every: how many steps between two balancings.
        count_biases: count biases in the norm.
        match_biases: False leaves biases where they are, which changes the function.
        symmetric_biases: let biases take the steps that they would take at c = 1.
        path_every: how many steps between two computations of path-SGD's κ.
        augment: crops (28 of 32 after padding 2) and flips of small images.
        bfloat16: products while training are in bfloat16 (autocast); weights, steps and scores stay in float32.
        compiled: the network and the passes of ENorm are compiled (`torch.compile`); worth its minute on a GPU.
        held_out: train without the held-out training images and score on them, not on the test images.
        seed: of weights and batches.
    """

    data: str = "digits"
    network: str = "fc"
    method: str = "baseline"
    depth: int = 1
    width: int = 500
    biases: bool = False
    batch: int = 256
    epochs: int = 60
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 1e-3
    clip: float = 0.0
    agc: float = 0.0
    warmup: float = 0.0
    head: float = 1.0
    branch: float = 1.0
    identity: bool = False
    centred: bool = False
    centralise: bool = False
    c: float = 1.0
    c_end: float = 0.0
    p: float = 2.0
    cycles: int = 1
    every: int = 1
    count_biases: bool = False
    match_biases: bool = True
    symmetric_biases: bool = True
    path_every: int = 1
    augment: bool = False
    bfloat16: bool = False
    compiled: bool = False
    held_out: bool = False
    seed: int = 0

    @property
    def hidden_layers(self) -> int:
        """Of the fully connected network: one in front of its square weights, and one behind each of them."""
        return self.depth + 1

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("network", NETWORKS), ("data", ("digits", "cifar10", "images"))):
            if getattr(self, name) not in known:
                raise ExperimentError(f"there is no {name} {getattr(self, name)!r}. It is one of {', '.join(known)}.")

    def check(self) -> None:
        """Refuse numbers that no run can have.

        Raises:
            ExperimentError: with the option and its bounds.
        """
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise ExperimentError(f"{name} must be a number of at least {least}, not {value!r}.")
        if not isinstance(self.p, (int, float)) or not (LEAST_P <= self.p <= LARGEST_P or self.p == math.inf):
            raise ExperimentError(f"p must be a number from {LEAST_P:g} to {LARGEST_P:g}, or inf, not {self.p!r}.")
        if METHODS[self.method].balancing == "two-level" and math.isinf(self.p):
            raise ExperimentError(f"{self.method} follows the minimum of a finite p. Use enorm for p=inf.")

    @property
    def unused(self) -> list[str]:
        """Options without effect on this run, for its method and network."""
        method, unused = METHODS[self.method], []
        if not method.balancing:
            unused += ["c_end", "cycles", "every", "match_biases", "symmetric_biases"]
        if not method.balancing and method.init != "balanced":
            unused += ["c", "p", "count_biases"]
        if not method.path:
            unused += ["path_every"]
        if self.network != "fc":
            unused += ["depth"]
        if not self.network.startswith("resnet"):
            unused += ["branch", "identity"]
        return unused

    def canonical(self) -> "Run":
        """The same run with options that it does not use at their defaults, so that it is equal to its like."""
        return replace(self, **{name: DEFAULTS[name] for name in self.unused})


DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(Run)}
EXTRAS = {"momentum": 0.9, "head": 0.1, "centralise": True, "weight_decay": 0.004}
"""What any method may use: four options that do not look at the batch."""

OPTIONS = [name for name in DEFAULTS if name not in ("method", "lr", "seed", "held_out")]
"""What may follow the name of a method."""


def decade(index: int) -> float:
    """The grid of learning rates: …, 0.1, 0.2, 0.5, 1, 2, 5, … with 1 at index 0."""
    return float(f"{(1, 2, 5)[index % 3]}e{index // 3}")


def place(lr: float) -> int:
    """Index of a learning rate in the grid.

    Raises:
        ExperimentError: if it is not in the grid.
    """
    for index in range(-30, 31):
        if abs(decade(index) - lr) <= 1e-9 * lr:
            return index
    raise ExperimentError(f"{lr:g} is no learning rate of the grid: it holds 1, 2 and 5 times powers of ten.")


@dataclass(frozen=True, slots=True)
class Sweep:
    """Runs to compare, each method at the learning rate that the held-out images choose.

    Attributes:
        base: the run that all others are made from.
        methods: names in `METHODS`; options of a run may follow, as in "enorm:c=1.2,clip=1".
        depths: of the fully connected network; ignored for others.
        batches: batch sizes.
        seeds: how many final runs.
        select_epochs: of the runs that choose the learning rate; 0 takes the first of `lrs` without a search.
        lrs: where the search for it starts.
    """

    base: Run = field(default_factory=Run)
    methods: tuple[str, ...] = ("baseline", "bn", "gn", "path_sgd", "enorm", "enorm_exact")
    depths: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (256,)
    seeds: int = 3
    select_epochs: int = 5
    lrs: tuple[float, ...] = (1e-3, 5e-3, 0.02, 0.1, 0.5)

    def cells(self) -> list[Run]:
        """One run for each method, depth and batch size; its learning rate and seed are still open."""
        depths = self.depths if self.base.network == "fc" else (DEFAULTS["depth"],)
        runs = [self.cell(method, depth, batch) for depth in depths for batch in self.batches for method in self.methods]
        return list(dict.fromkeys(runs))

    def cell(self, method: str, depth: int, batch: int) -> Run:
        """The run of a method at one depth and batch size."""
        run = replace(parse(method, self.base), depth=depth, batch=batch)
        run.check()
        return replace(run, c=run.c or asymmetry(depth)).canonical()


def asymmetry(depth: int) -> float:
    """c that keeps the norms of the first and last layer of a fully connected network within a factor of 6.2: at most 1.2."""
    return round(min(1.2, 6.2 ** (1 / (depth + 1))), 2)


def parse(text: str, base: Run) -> Run:
    """A method with options of its own, such as "enorm:c=1.2,clip=1".

    Raises:
        ExperimentError: for an option or a value that no run has.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in OPTIONS:
            raise ExperimentError(f"{text!r}: {key!r} is no option of a method. Options are {', '.join(OPTIONS)}.")
        options[key] = convert(key, value)
    return replace(base, method=name, **options)


def convert(key: str, value: str) -> Any:
    """Text as the type of a field of `Run`."""
    kind = type(DEFAULTS[key])
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return kind(value)
    except (KeyError, ValueError):
        raise ExperimentError(f"{key}={value!r}: not a value of type {kind.__name__}.") from None
