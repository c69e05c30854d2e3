"""The kernels in C++ do what the plain passes do: every shape and dtype, whole networks, any number of threads."""

import copy
import functools
import gc
import math
import sys
import weakref
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch
from algorithm_1 import algorithm_1_, convolutional, layers_of, mlp, needs_compiler, step, unbalance_
from hypothesis import HealthCheck, Phase, given, settings
from kernel_checks import NETWORKS, channels_last, follows_algorithm_1, spread, transposed
from random_networks.networks import Network, arguments, networks
from torch import nn

import equinorm
from equinorm import ENorm, EquinormError, native
from equinorm.balancing.layout import NetworkLayout
from equinorm.balancing.norm import Norm
from equinorm.native import compiler, kernels
from equinorm.training.native_cycle import Schedule, program

pytestmark = needs_compiler

PAIRS = [
    (torch.float32, torch.float32, 2e-6),
    (torch.float32, torch.float64, 1e-14),
    (torch.float64, torch.float64, 1e-14),
    (torch.bfloat16, torch.float32, 2e-6),
    (torch.bfloat16, torch.float64, 1e-14),
]
SHAPES = [(1, 1), (3, 5), (7, 33), (9, 31), (40, 2049), (2500, 17), (70, 4100), (1, 3000), (5000, 1)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs() / expected.abs()).max())


@pytest.mark.parametrize(("dtype", "sums"), [pair[:2] for pair in PAIRS])
@pytest.mark.parametrize("shape", SHAPES)
def test_largest_entries_of_columns(dtype, sums, shape, threads):
    torch.manual_seed(0)
    matrix, kernels = torch.randn(shape).to(dtype), native.kernels_for(dtype, sums)
    for count in (1, 2):
        threads(count)
        assert torch.equal(kernels.largest(matrix), matrix.abs().amax(0))
    matrix[shape[0] // 2, shape[1] // 2] = -math.inf
    matrix[0, 0] = math.nan
    torch.testing.assert_close(kernels.largest(matrix), matrix.abs().amax(0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "sums", "limit"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1, 2])
def test_sums_along_both_sides(dtype, sums, limit, shape, p, threads):
    torch.manual_seed(0)
    rows, columns = shape
    whole = torch.randn(rows, columns + 3).to(dtype)
    matrix, factors = whole[:, 1 : columns + 1], tuple(0.5 + torch.rand(size, dtype=sums) for size in shape)
    energies = matrix.double().abs() ** p
    expected = energies @ factors[1].double(), factors[0].double() @ energies
    results = []
    for sides in ((True, True), (True, False), (False, True)):
        for count in (1, 2):
            threads(count)
            out = tuple(
                torch.full((size,), torch.nan, dtype=sums) if asked else None for size, asked in zip(shape, sides, strict=True)
            )
            native.kernels_for(dtype, sums).sums(p, matrix.data_ptr(), shape, columns + 3, factors, out)
            results.append(out)
    for out in results:
        for found, right in zip(out, expected, strict=True):
            assert found is None or relative(found, right) <= limit
    for one, two in zip(results[::2], results[1::2], strict=True):
        assert all(a is b or torch.equal(a, b) for a, b in zip(one, two, strict=True)), "more threads give other sums"


@pytest.mark.parametrize(("dtype", "sums", "limit"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_with_and_without_a_part(dtype, sums, limit, shape):
    torch.manual_seed(0)
    tensor, part = (torch.randn(shape).to(dtype) for _ in range(2))
    scales = [2.0 ** torch.randint(-3, 4, (size,)).to(sums) for size in (*shape, *shape)]
    r, c, part_r, part_c = (scale.double() for scale in scales)
    whole, moved = tensor.double() * r[:, None] * c, part.double() * part_r[:, None] * part_c
    rest = (tensor.double() - part.double()) * r[:, None] * c + moved
    sum_, kept, alone = tensor.clone(), part.clone(), tensor.clone()
    pointers = [scale.data_ptr() for scale in scales]
    moves = [
        native.Move(sum_.data_ptr(), kept.data_ptr(), *shape, *pointers),
        native.Move(alone.data_ptr(), None, *shape, *pointers),
    ]
    native.kernels_for(dtype, sums).scale_(native.array(native.Move, moves))
    assert torch.equal(alone, whole.to(dtype)), "powers of two are exact"
    assert torch.equal(kept, moved.to(dtype))
    torch.testing.assert_close(sum_.double(), rest, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps * 8)


def test_bfloat16_is_rounded_to_the_nearest_even():
    values = torch.tensor([1.0, -3.0, 0.0, float("inf"), float("nan"), 1e-39]).repeat(3).bfloat16()
    scale = torch.tensor([1 + 2.0**-8 + 2.0**-16, 1 + 3 * 2.0**-8, 0.1]).repeat_interleave(6)
    found, one = values.clone(), torch.ones(1)
    move = native.Move(found.data_ptr(), None, 1, 18, one.data_ptr(), scale.data_ptr(), one.data_ptr(), scale.data_ptr())
    native.kernels_for(torch.bfloat16, torch.float32).scale_(native.array(native.Move, [move]))
    torch.testing.assert_close(found, (values.float() * scale).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_averages(dtype):
    torch.manual_seed(0)
    part, weight = (torch.randn(70_001).to(dtype) for _ in range(2))
    expected = 0.75 * part.double() - 0.5 * weight.double()
    native.kernels_for(dtype, torch.promote_types(dtype, torch.float32)).follow_(part, weight, 0.75, -0.5)
    torch.testing.assert_close(part.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_dtypes_without_kernels():
    assert native.kernels_for(torch.float16, torch.float32) is None
    assert native.kernels_for(torch.float64, torch.float32) is None


def is_recorded(hook: ENorm) -> bool:
    return hook._step._recording.cycle._program is not None


@pytest.mark.parametrize("lay_out", [transposed, channels_last, spread, lambda model: model])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_cycles_in_every_layout(lay_out, network, p):
    hook = follows_algorithm_1(lay_out, network, p, compile=True)
    assert is_recorded(hook) == (p != 3 and lay_out is not spread)


class Mixed(nn.Module):
    """Depthwise and grouped convolutions, a concatenation, a transposed convolution, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.depthwise, self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1, groups=2)
        self.up, self.down = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 8, 2, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.first(x), self.second(x)], 1).relu()
        x = self.grouped(self.depthwise(x).relu()).relu()
        x = x + self.down(self.up(x).relu())
        return self.head(x.relu().mean((2, 3)))


class Attention(nn.Module):
    """One packed weight for queries, keys and values: channels of a family are not contiguous in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(("kind", "shape"), [(Mixed, (2, 3, 6, 6)), (Attention, (2, 4, 5))])
@pytest.mark.parametrize("method", ["cyclic", "two-level"])
def test_channels_in_every_arrangement(kind, shape, method):
    torch.manual_seed(0)
    model, inputs = kind().double(), torch.randn(*shape, dtype=torch.float64)
    unbalance_(model, inputs)
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    for network, compile in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        hook = ENorm(optimizer, network, (inputs,), cycles=3, method=method, compile=compile)
        hook.cycle_()
        assert is_recorded(hook) == compile
    for compiled, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-11, atol=1e-300)
    assert equinorm.deviation(model, before, (inputs,)) <= 1e-12


def test_random_networks(monkeypatch):
    seen: Counter[str] = Counter()
    drawn: set[tuple[str, ...]] = set()

    @hypothesis.seed(2)
    @settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(networks())
    def holds(network: Network) -> None:
        if seen["free"] == 8:  # how many draws that takes depends on what hypothesis reads in the sources
            return
        operations = tuple(step.op for step in network.steps)
        if network.casts or operations in drawn:  # the hook refuses real scales where a network rounds; many draws are alike
            return
        drawn.add(operations)
        inputs = arguments(network, seed=1)
        try:
            found = equinorm.symmetries(network, inputs, both_modes=True)
        except equinorm.ExportError:  # numbers of an alias, on which the exporter would branch
            return
        if not found.num_free:
            return
        seen["free"] += 1
        monkeypatch.setattr("equinorm.training.enorm.symmetries", lambda *_, **__: found)  # traced once for four hooks
        for method in ("cyclic", "two-level"):
            (compiled, recorded), (plain, _) = (cycled(network, inputs, method, compile) for compile in (True, False))
            seen["recorded"] += recorded
            for one, other in zip(compiled, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-300)

    holds()
    assert seen["free"] == 8
    assert seen["recorded"] >= 0.5 * 2 * seen["free"], f"the kernels hardly ever ran: {seen}"


def cycled(network: Network, inputs: tuple, method: str, compile: bool) -> tuple[list[torch.Tensor], bool]:
    """The weights after two cycles, and whether kernels made them; the network has its own again."""
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with ENorm(optimizer, network, inputs, cycles=2, method=method, compile=compile) as hook:
        hook.cycle_()
        moved, recorded = [parameter.detach().clone() for parameter in network.parameters()], is_recorded(hook)
    network.load_state_dict(before)
    return moved, recorded


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch need not have GNU's entry to OpenMP")
def test_threads_are_those_of_pytorch():
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line.split()[-1]}
    assert kernels._parallel() is not None
    _ = native.kernels_for(torch.float32, torch.float32)
    after = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line.split()[-1]}
    assert after == loaded, "a second OpenMP was loaded"


def test_steps_do_not_depend_on_threads(threads):
    torch.manual_seed(0)
    model, inputs = mlp(3, 300, dtype=torch.float32), torch.randn(4, 5)
    models = [copy.deepcopy(model) for _ in range(2)]
    for count, twin in enumerate(models, 1):
        threads(count)
        ENorm(torch.optim.SGD(twin.parameters(), lr=0.0), twin, (inputs,), compile=True).cycle_()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_weights_whose_memory_is_replaced():
    torch.manual_seed(0)
    model, inputs = convolutional(), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    unbalance_(model, inputs)
    plain = copy.deepcopy(model)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), compile=True)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        hook.cycle_()
        algorithm_1_(layers_of(plain), 2)
    for moved, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/no/such/compiler", "cannot run /no/such/compiler: No such file"),
        ("false", "false ended with 1: no message"),
        ("true", "cannot load what true should have made: .*kernels.so"),
        ("'/no/such dir/g++' -v", "cannot run /no/such dir/g\\+\\+"),
    ],
)
def test_a_compiler_that_fails_is_named(monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(EquinormError, match=reason):
        native.kernels_for.__wrapped__(torch.float32, torch.float32)


@pytest.mark.parametrize("named", [None, "", " "])
def test_no_compiler(monkeypatch, named):
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EquinormError, match="no c\\+\\+, g\\+\\+ or clang\\+\\+ on the PATH"):
        native.kernels_for.__wrapped__(torch.float32, torch.float32)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder with the kernels of one pair of types as a wheel holds them."""
    folder = tmp_path_factory.mktemp("package")
    file = folder / compiler.shipped_file("float", "float")
    file.parent.mkdir()
    assert compiler.compile_library("float", "float", file, shipped=True) == ""
    return folder


@pytest.fixture
def installed(shipped, monkeypatch):
    monkeypatch.setattr(kernels, "FOLDER", shipped)
    for name in ("_shipped", "kernels_for"):
        fresh = functools.cache(getattr(kernels, name).__wrapped__)
        monkeypatch.setattr(kernels, name, fresh)
    monkeypatch.setattr(native, "kernels_for", kernels.kernels_for)
    monkeypatch.setattr(kernels, "PAIRS", (("float", "float"),))
    return monkeypatch


def trained(compile: bool | None) -> tuple[list[torch.Tensor], bool]:
    """Weights and averages after a few steps, and whether kernels made them."""
    torch.manual_seed(0)
    model, inputs = mlp(3, 300, dtype=torch.float32), torch.randn(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    hook = ENorm(optimizer, model, (inputs,), c=1.2, compile=compile)
    for _ in range(3):
        step(model, optimizer, inputs)
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    return [*(parameter.detach() for parameter in model.parameters()), *momenta], is_recorded(hook)


def test_shipped_kernels_need_no_compiler_and_give_the_same_bits(installed, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    native.require()
    assert kernels.are_shipped()
    found, were_used = trained(compile=None)
    assert were_used
    monkeypatch.undo()
    expected, were_compiled = trained(compile=True)
    assert were_compiled
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_kernels_of_other_sources_or_for_other_machines_are_left_alone(installed, shipped, tmp_path):
    assert kernels.are_shipped()
    for change in ("sources", "processor", "file"):
        kernels._shipped.cache_clear()
        with installed.context() as patch:
            if change == "sources":
                (tmp_path / "program.cpp").write_text("other")
                patch.setattr(compiler, "SOURCES", (tmp_path / "program.cpp",))
            elif change == "processor":
                patch.setattr(kernels, "is_x86", lambda: True)
                patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
            else:
                patch.setattr(kernels, "FOLDER", tmp_path)
                (tmp_path / compiler.shipped_file("float", "float")).parent.mkdir()
                (tmp_path / compiler.shipped_file("float", "float")).write_bytes(b"\x7fELF of another machine")
            assert not kernels.are_shipped(), change
            assert not trained(compile=None)[1]


def test_norms_that_are_not_recorded():
    model = mlp()
    found = equinorm.symmetries(model, (torch.randn(1, 5, dtype=torch.float64),))
    assert program(NetworkLayout((), (), 0), found.tensors, Norm(3.0), torch.float64, Schedule((), (), False, 0, 0.0)) is None


def test_autograd_and_balances_see_that_weights_have_moved():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), compile=True)
    loss, balance = model(inputs).square().mean(), hook.symmetries.balance()
    hook.cycle_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(equinorm.RescaleError, match="weights have changed since this balance"):
        balance.apply_()


@pytest.mark.parametrize("compile", [False, True])
def test_gradients_that_are_dropped_are_freed(compile):
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hook = ENorm(optimizer, model, (inputs,), compile=compile)
    step(model, optimizer, inputs)
    gradients = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    optimizer.zero_grad()
    gc.collect()
    assert not any(gradient() is not None for gradient in gradients)
    momentum = weakref.ref(optimizer.state[model[0].weight]["momentum_buffer"])
    hook.remove()
    optimizer.state.clear()
    gc.collect()
    assert momentum() is None
