"""Plans: a rescaling apart from any module, as a file, applied to others by name."""

import copy
import math

import pytest
import safetensors.torch
import torch
from torch import nn

import equinorm
from equinorm import EquinormError, Plan, RescaleError


class Tied(nn.Module):
    """A network that reads one matrix twice."""

    def __init__(self, width=6):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 4)
        self.twin = nn.Linear(4, width, bias=False)
        self.twin.weight = self.first.weight
        with torch.no_grad():
            self.first.weight.mul_(20)
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) + torch.relu(self.twin(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tied().double()


ARGS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(model, **options):
    return equinorm.symmetries(model, ARGS).balance().plan(**options)


def test_a_plan_comes_back_from_its_file_and_does_the_same(model, tmp_path):
    plan = made(model)
    plan.save(tmp_path / "scales.safetensors")
    read = Plan.load(tmp_path / "scales.safetensors")
    assert read.fingerprint == plan.fingerprint
    assert torch.equal(read.log_scales, plan.log_scales)
    assert [s.names for s in read.scalings] == [s.names for s in plan.scalings]
    assert "scales for" in str(read)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    read.apply_(one)
    equinorm.symmetries(other, ARGS).balance().apply_()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.first.weight, model.first.weight)
    assert one.twin.weight is one.first.weight
    assert equinorm.deviation(one, model, ARGS) < 1e-12


def test_ids_are_stored_along_axes_and_once(tmp_path):
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
    equinorm.symmetries(net, torch.randn(1, 64)).balance().plan().save(tmp_path / "plan.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "plan.safetensors")
    assert sum(tensor.numel() for key, tensor in stored.items() if key != "log_scales") == 3 * 512  # rows, a bias, columns


def test_powers_of_two_are_bitwise_the_same_and_move_the_optimizer(model, tmp_path):
    made(model, power_of_two=True).save(tmp_path / "plan.safetensors")
    plan, twin = Plan.load(tmp_path / "plan.safetensors"), copy.deepcopy(model)
    twos = plan.log_scales / math.log(2)
    assert torch.allclose(twos, twos.round(), atol=1e-12)
    assert float(twos.abs().max()) >= 1
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    twin(ARGS).square().sum().backward()
    optimizer.step()
    before = optimizer.state[twin.first.weight]["momentum_buffer"].clone()
    outputs = twin(ARGS).detach()
    plan.apply_(twin, optimizer)
    assert torch.equal(twin(ARGS), outputs)
    assert not torch.equal(optimizer.state[twin.first.weight]["momentum_buffer"], before)


def test_half_precision_takes_plans_of_powers_of_two_alone(model):
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(RescaleError, match="Use powers of two"):
        made(model).apply_(half)
    before = half.first.weight.clone()
    made(model, power_of_two=True).apply_(half)
    assert not torch.equal(half.first.weight, before)


def untied(model):
    model.twin.weight = nn.Parameter(model.first.weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: delattr(model, "twin"), "lacks 1 tensor: twin.weight"),
        (lambda model: setattr(model, "extra", nn.Linear(2, 2)), "the plan does not know, 2 tensors: extra.weight"),
        (
            lambda model: setattr(model, "last", nn.Linear(6, 5).double()),
            r"last.weight has shape \(5, 6\) in Tied and \(4, 6\)",
        ),
        (untied, "no longer do"),
    ],
)
def test_other_models_are_refused_and_stay_as_they_are(model, change, said):
    plan = made(model)
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RescaleError, match=said):
        plan.apply_(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_ties_that_the_plan_does_not_know_are_refused():
    nets = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)]
    plan = equinorm.symmetries(nets[0], torch.randn(2, 4)).balance().plan()
    nets[1][2].weight = nets[1][0].weight
    with pytest.raises(RescaleError, match=r"0\.weight and 2\.weight are tied in Sequential, and not in the plan"):
        plan.apply_(nets[1])


def test_casts_are_remembered(tmp_path):
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)).bfloat16().float())

    torch.manual_seed(0)
    net = Rounded()
    equinorm.symmetries(net, torch.randn(2, 4)).balance().plan().save(tmp_path / "plan.safetensors")
    with pytest.raises(RescaleError, match="rounds a value that scales to bfloat16"):
        Plan.load(tmp_path / "plan.safetensors").apply_(net)


def test_damaged_and_foreign_files_are_refused(model, tmp_path):
    path = tmp_path / "plan.safetensors"
    made(model).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(EquinormError, match="its header needs"):
        Plan.load(path)
    place = len(whole) - 8  # an id
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(EquinormError, match="is damaged"):
        Plan.load(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(EquinormError, match="is no plan"):
        Plan.load(path)
    with pytest.raises(EquinormError, match="No such file"):
        Plan.load(tmp_path / "absent.safetensors")
    with pytest.raises(EquinormError, match=r"there is no folder .*absent. Nothing was written"):
        made(model).save(tmp_path / "absent" / "plan.safetensors")


def test_files_with_other_keys_are_refused_before_anything_is_written(model, tmp_path):
    plan = made(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "twin.weight"}
    for change, said in (
        ({"more": torch.zeros(1)}, "does not know 1 key: more"),
        ({"first.bias": torch.zeros(2)}, "has shape"),
    ):
        safetensors.torch.save_file({**state, **change}, tmp_path / "model.safetensors")
        with pytest.raises(EquinormError, match=said):
            plan.rewrite(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    safetensors.torch.save_file({"first.bias": state["first.bias"]}, tmp_path / "model.safetensors")
    with pytest.raises(EquinormError, match="the files lack"):
        plan.rewrite(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    assert plan.rewrite(tmp_path / "model.safetensors", tmp_path / "part.safetensors") == 0  # one file need not hold all
    assert not (tmp_path.parent / f"{tmp_path.name}-out").exists()
