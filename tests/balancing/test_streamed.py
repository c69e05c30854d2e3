"""Energies that are read from the weights each time, against energies that are kept, and what they take of memory."""

import copy
import functools
import math

import pytest
import torch
from algorithm_1 import needs_compiler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import equinorm
from equinorm.balancing import weight_passes
from equinorm.balancing.assemble import problem_of
from equinorm.balancing.blocks import Block
from equinorm.balancing.energy_reader import AT_ONCE
from equinorm.balancing.layout import lay_out
from equinorm.balancing.options import BalanceOptions
from equinorm.balancing.problem import Problem
from equinorm.balancing.scope import counted
from equinorm.balancing.streamed import Stream, StreamedBlock
from equinorm.balancing.weight_passes import CompiledPass, StripPass
from equinorm.rescaling import writing


class Loop(nn.Module):
    """A residual stream that one layer feeds back into itself: the diagonal of its weight joins classes to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(a, b, bias=False) for a, b in [(4, 30), (30, 30), (30, 3)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.relu(h + torch.relu(self.inner(h))))


class Dense(nn.Module):
    """Concatenation: one weight whose columns belong to three families, one of them the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = nn.Linear(5, 9), nn.Linear(5, 7), nn.Linear(21, 11), nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([torch.relu(self.a(x)), x, torch.relu(self.b(x))], 1)
        return self.last(torch.relu(self.c(hidden)))


class Transposed(nn.Module):
    """Weights of shape (in, out), and one that is a transposed view of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 40)), nn.Parameter(torch.randn(30, 40).t())
        self.c = nn.Parameter(torch.randn(30, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.relu(x @ self.a) @ self.b) @ self.c


def convolutions(kernel: int, channels_last: bool = False) -> nn.Module:
    pad = kernel // 2
    net = nn.Sequential(
        nn.Conv2d(3, 12, kernel, padding=pad),
        nn.ReLU(),
        nn.Conv2d(12, 20, kernel, padding=pad),
        nn.ReLU(),
        nn.Conv2d(20, 4, kernel, padding=pad),
    )
    return net.to(memory_format=torch.channels_last) if channels_last else net  # type: ignore[call-overload]


def flattened() -> nn.Module:
    """A linear layer behind images of 12 entries a channel."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(120, 50), nn.ReLU(), nn.Linear(50, 4, bias=False)
    )


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 70), nn.ReLU(), nn.Linear(70, 90), nn.ReLU(), nn.Linear(90, 5)), (1, 8)),
    "loops": (Loop, (1, 4)),
    "concatenation": (Dense, (1, 5)),
    "transposed": (Transposed, (1, 6)),
    "3 x 3": (lambda: convolutions(3), (1, 3, 8, 8)),
    "5 x 5, channels last": (lambda: convolutions(5, True), (1, 3, 8, 8)),
    "1 x 1": (lambda: convolutions(1), (1, 3, 8, 8)),
    "flattened": (flattened, (1, 3, 5, 6)),
}


@functools.cache
def spread(name: str) -> equinorm.Symmetries:
    """Symmetries of a network whose channels were spread over two decades."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    symmetries = equinorm.symmetries(build(), (torch.randn(*shape),))
    symmetries.rescale_((2 * torch.rand(symmetries.num_free, dtype=torch.float64) - 1) * math.log(10))
    return symmetries


def analysed(name: str, dtype: torch.dtype = torch.float32) -> equinorm.Symmetries:
    """The same of a copy that may be changed."""
    found = copy.deepcopy(spread(name))
    found.model.to(dtype)
    return found


def energies(symmetries: equinorm.Symmetries, p: float, streams: bool, compile: bool = False, c: float = 1.1) -> Problem:
    scalings = counted(symmetries.scalings, biases=False)
    held = torch.zeros(symmetries.num_free + 1, dtype=torch.bool)
    network = lay_out(scalings, symmetries.family_ranges, symmetries.num_free, held)
    options = BalanceOptions(p, c, tol=1e-9, method="two-level" if streams else "cyclic", compile=compile)
    return problem_of(network, symmetries.tensors, options)


@pytest.fixture(params=[AT_ONCE, 50], ids=["strips", "tiny strips"])
def strips(request, monkeypatch):
    """Strips of a few entries show mistakes at their edges."""
    monkeypatch.setattr("equinorm.balancing.energy_reader.AT_ONCE", request.param)
    monkeypatch.setattr("equinorm._memory.STRIP", request.param)
    monkeypatch.setattr("equinorm.balancing.energy_reader.STRIP", request.param)


both_ways = pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "compiled"])


@pytest.mark.usefixtures("strips")
@both_ways
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readings_are_the_kept_energies(name, p, dtype, compile):
    symmetries = analysed(name, dtype)
    kept, streamed = energies(symmetries, p, False), energies(symmetries, p, True, compile)
    if compile and name in ("linear", "transposed", "1 x 1"):
        assert all(
            isinstance(block.stream.reader, CompiledPass) for block in streamed.blocks if isinstance(block, StreamedBlock)
        )
    assert any(isinstance(block, StreamedBlock) for block in streamed.blocks)
    assert len(kept.blocks) == len(streamed.blocks)
    z = torch.randn(symmetries.num_free + 1, dtype=torch.float64)
    z[0] = 0
    for precise, tolerance in ((False, 1e-5), (True, 1e-12)):
        if precise:
            streamed.refine()
        for one, other in zip(kept.blocks, streamed.blocks, strict=True):
            for side in (0, 1):
                expected = one.log_energies(side, z, kept.norm)
                torch.testing.assert_close(other.log_energies(side, z, kept.norm), expected, rtol=0, atol=tolerance)
    assert streamed.constants.keys() == kept.constants.keys()
    for index, value in kept.constants.items():
        assert streamed.constants[index] == pytest.approx(value, abs=1e-5)


@both_ways
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("tol", [1e-6, 1e-12])
def test_single_precision_reaches_the_minimum_of_double(name, p, tol, compile):
    symmetries = analysed(name)
    coarse = symmetries.balance(p=p, tol=tol, compile=compile)
    assert coarse.converged
    symmetries.model.double()
    fine = symmetries.balance(p=p, tol=1e-13)
    torch.testing.assert_close(coarse.log_scales, fine.log_scales, rtol=0, atol=max(1e3 * tol, 1e-9))
    assert coarse.norm_after == pytest.approx(fine.norm_after, rel=1e-6)


@both_ways
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_that_single_precision_cannot_hold(scale, compile):
    symmetries = analysed("linear")
    expected = symmetries.balance(tol=1e-9).log_scales
    first, second = (symmetries.tensors[name] for name in ("0.weight", "2.weight"))
    with torch.no_grad():
        first.mul_(scale)
        second.mul_(1 / scale)
    balance = symmetries.balance(tol=1e-9, compile=compile)
    assert balance.converged
    assert not balance.dead
    shift = torch.zeros_like(expected)
    shift[:70] = -math.log(scale)
    torch.testing.assert_close(balance.log_scales, expected + shift, rtol=0, atol=1e-5)


@both_ways
def test_dead_channels_are_found_and_left_out(compile):
    symmetries = analysed("linear")
    with torch.no_grad():
        symmetries.tensors["0.weight"][3] = 0
        symmetries.tensors["2.weight"][:, 3] = 7
        symmetries.tensors["2.weight"][5, torch.arange(70) != 3] = 0  # hears channel 3 only
        symmetries.tensors["4.weight"][:, 8] = 0
    balance = symmetries.balance(tol=1e-6, compile=compile)
    assert balance.dead == (4, 70 + 6, 70 + 9)
    assert balance.converged
    symmetries.model.double()
    torch.testing.assert_close(balance.log_scales, symmetries.balance(tol=1e-12).log_scales, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    symmetries = analysed("linear")
    with torch.no_grad():
        symmetries.tensors["2.weight"][1, 2] = value
    with pytest.raises(equinorm.BalanceError, match=r"2\.weight: it holds (NaN|inf)"):
        symmetries.balance()


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {part.untyped_storage()._cdata for part in args if isinstance(part, Tensor)}
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor) and part.untyped_storage()._cdata not in inputs:
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_no_weight_is_copied(monkeypatch, dtype, p):
    """Beside originals to put back, balancing and rescaling hold a strip and vectors, whatever the size of the weights."""
    monkeypatch.setattr(writing, "KEPT", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 8)).to(dtype)
    symmetries = equinorm.symmetries(net, (torch.randn(1, 64, dtype=dtype),))
    with Largest() as largest:
        balance = symmetries.balance(p=p, tol=1e-9)
        balance.apply_(power_of_two=True)
    assert balance.converged
    weight = 4096 * 4096 * (4 if dtype == torch.float32 else 2)
    assert largest.bytes <= 8 * AT_ONCE < weight / 3


def test_energies_of_kernels_are_kept_only_where_they_are_small():
    symmetries = analysed("3 x 3")
    streams = [stream for stream in energies(symmetries, 2.0, True).streams if isinstance(stream, Stream)]
    assert [isinstance(stream.reader, StripPass) and stream.reader.keeps for stream in streams] == [True]  # 4 of 36 bytes
    half = analysed("3 x 3", torch.bfloat16)
    streams = [stream for stream in energies(half, 2.0, True).streams if isinstance(stream, Stream)]
    assert [isinstance(stream.reader, StripPass) and stream.reader.keeps for stream in streams] == [False]  # 4 of 18
    assert weight_passes.KEPT == 8


def test_runs_of_equal_scales_are_summed():
    """The columns of a linear layer behind a flattened image are as many as there are channels."""
    symmetries = analysed("flattened")
    weight = next(i for i, scaling in enumerate(counted(symmetries.scalings, biases=False)) if scaling.shape == (50, 120))
    for p in (2.0, math.inf):
        (block,) = (b for b in energies(symmetries, p, False).blocks if b.tensor == weight)
        assert isinstance(block, Block)
        assert block.energies.shape == (50, 10)
        weights = symmetries.tensors["3.weight"].detach().double().abs().view(50, 10, 12)
        expected = weights.amax(2) if p == math.inf else weights.square().sum(2)
        torch.testing.assert_close(block.energies, expected, rtol=1e-14, atol=0)


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_largest_entries(name, dtype):
    """p = ∞: the largest |w| · s of every channel."""
    symmetries = analysed(name, dtype)
    found = energies(symmetries, math.inf, True, c=1.0)
    z = torch.randn(symmetries.num_free + 1, dtype=torch.float64)
    z[0] = 0
    for index, scaling in enumerate(counted(symmetries.scalings, biases=False)):
        moved = symmetries.tensors[scaling.name].detach().double().abs().log()
        for exponent, ids in scaling.factors:
            moved = moved + exponent * z[ids]
        assert found.log_energies(z)[index] == pytest.approx(float(moved.max()), abs=1e-12)
        blocks = [block for block in found.blocks if block.tensor == index]
        if len(blocks) > 1 or name == "loops":
            continue
        for place, side in enumerate(blocks[0].sides):
            for _, ids in scaling.factors:
                if side.family >= 0 and torch.isin(ids, side.ids).all():
                    rows = [moved[(ids == i).expand(moved.shape)].max() for i in side.ids]
                    logs = blocks[0].log_energies(place, z, found.norm)
                    torch.testing.assert_close(logs, torch.stack(rows), rtol=0, atol=1e-12)


def test_weights_on_a_loop_that_are_not_finite():
    """Their energy never changes, but it counts in the norm."""
    symmetries = analysed("loops")
    with torch.no_grad():
        symmetries.tensors["inner.weight"][3, 3] = math.nan
    with pytest.raises(equinorm.BalanceError, match=r"inner\.weight: it holds NaN"):
        symmetries.balance()


@pytest.mark.parametrize("name", ["linear", "concatenation", "3 x 3"])
def test_autocast_and_inference_mode_change_nothing(name):
    """Sums in bfloat16 would lead elsewhere, and inference tensors count no versions."""
    symmetries = analysed(name)
    expected = symmetries.balance(tol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(symmetries.balance(tol=1e-6).log_scales, expected.log_scales)
    with torch.inference_mode():
        assert torch.equal(symmetries.balance(tol=1e-6).log_scales, expected.log_scales)
