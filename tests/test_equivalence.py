"""Deviation of outputs, and equivalence of weights under rescaling."""

import copy

import pytest
import torch
from torch import Tensor, nn

import equinorm


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.LeakyReLU(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor]:
    return (torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype),)


def rescaled(net: nn.Module, args: tuple, std: float = 2.0) -> tuple[nn.Module, Tensor]:
    twin = copy.deepcopy(net)
    symmetries = equinorm.symmetries(twin, args)
    z = std * torch.randn(symmetries.num_free, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    symmetries.rescale_(z)
    return twin, z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rescaled_networks_are_equivalent(dtype):
    net, args = network(dtype), inputs(dtype)
    twin, z = rescaled(net, args)
    before = [p.detach().clone() for p in (*net.parameters(), *twin.parameters())]
    found = equinorm.equivalence(net, twin, args)
    assert found.equivalent
    assert not found.different
    torch.testing.assert_close(found.log_scales, z, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (*net.parameters(), *twin.parameters()), strict=True))


def test_the_connecting_scales_connect():
    net, args = network(), inputs()
    twin, _ = rescaled(net, args)
    found = equinorm.equivalence(net, twin, args)
    equinorm.symmetries(net, args).rescale_(found.log_scales)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [("2.weight", (3, 5), 1.01), ("4.bias", (2,), 1.001), ("6.weight", (0, 0), -1.0), ("0.weight", (7, 7), 0.0)],
)
def test_one_changed_entry_is_seen(name, index, change):
    net, args = network(), inputs()
    twin, _ = rescaled(net, args)
    twin.get_parameter(name).data[index] *= change
    found = equinorm.equivalence(net, twin, args)
    assert not found.equivalent
    assert name in [tensor for tensor, _ in found.different]
    assert found.difference == max(difference for _, difference in found.different)


def test_other_weights_are_not_equivalent():
    assert not equinorm.equivalence(network(seed=0), network(seed=1), inputs()).equivalent


def test_dead_channels_are_compared_too():
    """Channels without a canonical scale: one hears nothing, one speaks to nobody, and a chain of both."""
    net, args = network(), inputs()
    net[2].weight.data[3], net[2].bias.data[3] = 0, 0
    net[4].weight.data[5], net[4].bias.data[5] = 0, 0
    net[4].weight.data[5, 3] = 0.7
    net[4].weight.data[:, 7] = 0
    twin, _ = rescaled(net, args)
    assert not torch.equal(net[4].weight[5, 3], twin[4].weight[5, 3])
    assert equinorm.equivalence(net, twin, args).equivalent
    twin[2].weight.data[7, 0] *= 2
    assert not equinorm.equivalence(net, twin, args).equivalent


def test_batch_norm_statistics_count():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double().eval()
    args = (torch.randn(1, 3, 9, 9).double(),)
    twin, _ = rescaled(net, args)
    assert equinorm.equivalence(net, twin, args).equivalent
    twin[1].running_mean += 0.5
    found = equinorm.equivalence(net, twin, args)
    assert [name for name, _ in found.different] == ["1.running_mean"]


def test_different_architectures_are_an_error():
    with pytest.raises(equinorm.EquivalenceError, match=r"0\.weight: \(16, 8\) and \(5, 8\)"):
        equinorm.equivalence(network(), nn.Sequential(nn.Linear(8, 5)).double(), inputs())


def test_different_graphs_are_an_error():
    net, twin = network(), network()
    twin[1] = nn.Tanh()
    with pytest.raises(equinorm.EquivalenceError, match="different operations"):
        equinorm.equivalence(net, twin, inputs())
    twin[1] = nn.LeakyReLU(0.3)  # the same symmetries, another function
    with pytest.raises(equinorm.EquivalenceError, match="different operations"):
        equinorm.equivalence(net, twin, inputs())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_equivalent(value):
    net = nn.Linear(3, 2)
    twin = copy.deepcopy(net)
    twin.weight.data[0, 0] = value
    assert not equinorm.equivalence(net, twin, torch.randn(2, 3)).equivalent


def test_another_buffer_is_an_error():
    net, twin = network(), network()
    twin.register_buffer("extra", torch.zeros(3))
    with pytest.raises(equinorm.EquivalenceError, match=r"extra: absent and \(3,\)"):
        equinorm.equivalence(net, twin, inputs())


def test_deviation_is_relative_to_the_second_output():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    a.weight.data, b.weight.data = torch.tensor([[1.0, 0], [0, 3]]), torch.tensor([[1.0, 0], [0, 4]])
    assert equinorm.deviation(a, b, torch.eye(2)) == 0.25
    assert equinorm.deviation(b, a, torch.eye(2)) == pytest.approx(1 / 3)


class Several(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor | tuple]:
        return {"first": x, "rest": (x + y, {"last": self.factor * 1000 * y})}


def test_deviation_of_nested_outputs_is_the_largest():
    args, kwargs = (torch.ones(3),), {"y": torch.ones(3)}
    assert equinorm.deviation(Several(1.0), Several(1.0), args, kwargs) == 0.0
    assert equinorm.deviation(Several(1.1), Several(1.0), args, kwargs) == pytest.approx(0.1)


def test_deviation_draws_the_same_random_numbers_and_keeps_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    twin, args = copy.deepcopy(net), (torch.randn(6, 8),)
    state = torch.get_rng_state()
    assert equinorm.deviation(net, twin, args) == 0.0
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        twin[0].bias.add_(1)
    once = equinorm.deviation(net, twin, args)
    torch.manual_seed(1)
    assert equinorm.deviation(net, twin, args) == once  # whatever the user's seed
    assert torch.equal(net[1].running_mean, torch.zeros(8))
    assert net[1].num_batches_tracked == 0


def test_random_numbers_of_devices_that_a_model_does_not_use_are_left_alone(monkeypatch):
    """A seed would wait for CUDA to start; to ask for a state would start it, which a forked worker cannot do."""

    for name in ("get_rng_state", "set_rng_state", "manual_seed_all", "_lazy_call"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(f"torch.cuda.{name} was called"))
    net, args = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(6, 8),)
    assert equinorm.deviation(net, net, args) == 0.0
    assert equinorm.equivalence(net, net, args).equivalent
    assert equinorm.align(net, net, args, data=[args]).distance_after <= 1e-6


def test_deviation_of_networks_with_expanded_buffers():
    net = nn.Sequential(nn.Linear(3, 2))
    net.register_buffer("gain", torch.ones(1).expand(4))
    assert equinorm.deviation(net, net, torch.randn(1, 3)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_deviation_of_outputs_that_are_not_finite(value):
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    a.bias.data[0] = value
    assert equinorm.deviation(a, b, torch.eye(2)) == float("inf")
    b.bias.data[0] = value
    assert equinorm.deviation(a, b, torch.eye(2)) == 0.0


def test_deviation_names_the_inputs_that_do_not_fit():
    with pytest.raises(equinorm.EquivalenceError, match=r"Sequential does not run on inputs \(float32\[3, 9\]\)"):
        equinorm.deviation(network(torch.float32), network(torch.float32), torch.randn(3, 9))


def test_complex_weights_are_compared_whole():
    net = nn.Sequential(nn.Linear(4, 8, dtype=torch.complex64), nn.Linear(8, 3, dtype=torch.complex64))
    other, x = copy.deepcopy(net), (torch.randn(2, 4, dtype=torch.complex64),)
    assert equinorm.equivalence(net, other, x).equivalent
    with torch.no_grad():
        other[0].weight.imag.mul_(-3)
    found = equinorm.equivalence(net, other, x)
    assert not found.equivalent
    assert [name for name, _ in found.different] == ["0.weight"]


class PartlyComplex(nn.Module):
    """Real layers whose channels move, then complex weights, which stay."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)
        self.waves = nn.Parameter(torch.randn(3, 5, dtype=torch.complex64))

    def forward(self, x):
        return (self.down(self.up(x).relu()).to(torch.complex64) @ self.waves).abs()


def test_channels_beside_complex_weights_are_matched():
    torch.manual_seed(0)
    net, x = PartlyComplex(), torch.randn(2, 4)
    other, permutations = copy.deepcopy(net), equinorm.permutations(net, x)
    permutations.permute_(permutations.random(torch.Generator().manual_seed(1)))
    assert equinorm.equivalence(net, other, x).joined_by == ("permutation",)
    with torch.no_grad():
        other.waves[1, 2] = 3 - 4j
        net.waves[1, 2] = 1j
    (change,) = equinorm.equivalence(net, other, x).changes
    assert (change.entry, change.first, change.second) == ("waves[1, 2]", 1j, 3 - 4j)
    assert "went from 0+1j to 3-4j" in str(change)
    whole = sum(float(p.detach().abs().square().sum()) for p in other.parameters())
    assert equinorm.align(net, other, x, rescale=False).distance_after == pytest.approx(abs(3 - 5j) / whole**0.5, rel=1e-6)
    forms = [[*equinorm.canonical(model, x, power_of_two=True).parameters()][1:] for model in (net, other)]
    assert all(torch.equal(one, same) for one, same in zip(*forms, strict=True))


def test_the_coarser_of_two_dtypes_sets_the_tolerance():
    net, x = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), torch.tensor([[1, 2]])
    half = copy.deepcopy(net).bfloat16()
    with pytest.raises(equinorm.EquivalenceError, match=r"0\.weight is float32 in the first .* bfloat16 in the second"):
        equinorm.align(net, half, x)
    tolerances = {equinorm.equivalence(*pair, x).tolerance for pair in ((net, half), (half, net))}
    assert tolerances == {2e-2}


def test_two_modes_are_named():
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)), torch.randn(2, 4)
    with pytest.raises(equinorm.EquivalenceError, match=r"first network is in training mode, the second in evaluation mode"):
        equinorm.equivalence(net, copy.deepcopy(net).eval(), x)


def test_counters_that_nothing_reads_do_not_matter():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)).eval()
    other = copy.deepcopy(net)
    other[1].num_batches_tracked += 1
    assert equinorm.equivalence(net, other, (torch.randn(2, 3, 4, 4),)).equivalent


def test_a_weight_between_dead_channels_is_joined_along_both_sides():
    """Nothing enters the first layer's channels and nothing leaves the second's: only the weight between tells their scales."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in (*net[0].parameters(), net[2].bias, net[4].weight):
            parameter.zero_()
    twin, x = copy.deepcopy(net), (torch.randn(2, 4, dtype=torch.float64),)
    symmetries = equinorm.symmetries(twin, x)
    symmetries.rescale_(torch.randn(symmetries.num_free, dtype=torch.float64))
    found = equinorm.equivalence(net, twin, x)
    assert found.equivalent, found
    equinorm.symmetries(net, x).rescale_(found.log_scales)
    torch.testing.assert_close(net[2].weight, twin[2].weight, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
def test_a_little_training_in_half_precision_is_told_from_rounding(dtype, noise):
    """Rounding changes an entry by a share of itself; training changes small ones by more, which a channel's largest hide."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    x, twin, tuned = (torch.randn(4, 32, dtype=dtype),), copy.deepcopy(net), copy.deepcopy(net)
    for _ in range(2):
        found = equinorm.symmetries(twin, x)
        logs = 0.5 * torch.randn(found.num_free, dtype=torch.float64)
        with torch.no_grad():
            for scaling in found.scalings:
                tensor = found.tensors[scaling.name]
                tensor.copy_(tensor.double() * scaling.log_scales(logs).exp())
        assert equinorm.equivalence(net, twin, x).equivalent
    with torch.no_grad():
        for layer in (tuned[0], tuned[2], tuned[4]):
            layer.weight += noise * layer.weight.float().std() * torch.randn(layer.weight.shape)
    found = equinorm.equivalence(twin, tuned, x)
    assert not found.equivalent
    assert found.difference <= found.tolerance
    assert {change.tensor for change in found.changes} == {"0.weight", "2.weight", "4.weight"}
    assert 0 < sum(change.entries for change in found.changes) < found.size / 2
    assert "more than rounding to half precision" in str(found)
    assert equinorm.equivalence(twin, tuned, x, tolerance=found.tolerance).equivalent
