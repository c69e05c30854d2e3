"""ENorm on models that change after it has analysed them: refused where the function could change, followed elsewhere."""

import copy

import pytest
import torch
from algorithm_1 import algorithm_1_, layers_of, mlp, step
from torch import nn

from equinorm import ENorm, EquinormError, RescaleError


def test_changed_models_are_refused():
    def fresh():
        model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ENorm(optimizer, model, (inputs,))
        return model, optimizer, inputs

    model, optimizer, inputs = fresh()
    model.append(nn.Linear(3, 3).double())
    optimizer.add_param_group({"params": model[-1].parameters()})
    with pytest.raises(RescaleError, match="'9' in the model itself was added"):
        step(model, optimizer, inputs)
    model, optimizer, inputs = fresh()
    model[2] = nn.Linear(12, 12).double()
    with pytest.raises(RescaleError, match="replaced"):
        step(model, optimizer, inputs)
    model, optimizer, inputs = fresh()
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(RescaleError, match=r"'weight' in module '2' of the model was added, removed or replaced"):
        step(model, optimizer, inputs)


class Parts(nn.Module):
    """Layers of which the first keeps its outputs pinned; what is tied to it later must not move."""

    def __init__(self):
        super().__init__()
        self.pinned, self.free, self.last = (nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(3))
        self.act = nn.ReLU()
        self.register_buffer("shift", None)

    def forward(self, x):
        hidden = self.act(self.free(self.pinned(x).tanh()))
        return self.last(hidden if self.shift is None else hidden + self.shift)


def tie_parameter(model):
    model.pinned.weight = model.free.weight


def tie_data(model):
    model.pinned.weight.data = model.free.weight.data


def tie_moving(model):
    model.last.weight.data = model.free.weight.data


def add_bias(model):
    model.free.bias = nn.Parameter(torch.ones(6, dtype=torch.float64))


def add_buffer(model):
    model.shift = torch.ones(6, dtype=torch.float64)


def other_activation(model):
    model.act = nn.Tanh()


def other_class(model):
    model.act.__class__ = nn.Tanh


def other_shape(model):
    model.free.weight.data = torch.randn(4, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "change", [tie_parameter, tie_data, tie_moving, add_bias, add_buffer, other_activation, other_class, other_shape]
)
def test_changes_that_would_change_the_function_are_refused(change):
    torch.manual_seed(0)
    model, inputs = Parts(), torch.randn(4, 6, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    hook.cycle_()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RescaleError, match="since ENorm analysed the model"):
        hook.cycle_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_parameter_registered_again_is_no_change():
    model, inputs = Parts(), torch.randn(4, 6, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    setattr(model.free, "".join(["wei", "ght"]), model.free.weight)
    hook.cycle_()


def test_forward_hooks_that_are_added_give_a_warning():
    """Those that were there are part of the analysis; new ones may change what a module returns, or only look at it."""
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    old = model[1].register_forward_hook(lambda module, args, output: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = ENorm(optimizer, model, (inputs,))
    hook.cycle_()
    old.remove()
    hook.cycle_()
    model[3].register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.warns(UserWarning, match=r"forward hook was added to ReLU '3' of the model since ENorm analysed the model"):
        hook.cycle_()
    hook.cycle_()  # warnings are errors here: one is enough
    with pytest.warns(UserWarning, match=r"forward hook was added to ReLU '3' of the model since the model was analysed"):
        hook.symmetries.rescale_(torch.zeros(hook.symmetries.num_free, dtype=torch.float64))


def test_expanded_tensors_are_refused():
    model, inputs = Parts(), torch.randn(4, 6, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    model.free.weight.data = torch.randn(6, 1, dtype=torch.float64).expand(6, 6)
    before = model.last.weight.detach().clone()
    with pytest.raises(RescaleError, match=r"free\.weight in place: it is an inference or an expanded tensor"):
        hook.cycle_()
    assert torch.equal(model.last.weight, before)
    with pytest.raises(EquinormError, match="its entries share memory"):  # nothing else could move
        ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))


def test_a_model_that_changes_its_dtype_is_recorded_again():
    torch.manual_seed(0)
    model, inputs = mlp(dtype=torch.float32), torch.randn(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ENorm(optimizer, model, (inputs,))
    step(model, optimizer, inputs)
    model.double()
    plain = copy.deepcopy(model)
    step(model, optimizer, inputs.double())
    algorithm_1_(layers_of(plain), 2.0)
    torch.testing.assert_close(model[4].weight, plain[4].weight, rtol=1e-12, atol=0)


def test_weights_may_move_to_other_memory():
    """`parameters_to_vector` and its like give a parameter new memory; energies must come from there."""
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(4, 5, dtype=torch.float64)
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,))
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * torch.rand_like(vector), model.parameters())
    plain = copy.deepcopy(model)
    hook.cycle_()
    algorithm_1_(layers_of(plain), 2.0)
    for moved, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)
