"""Models whose weights accelerate keeps elsewhere."""

import pytest
import torch

import equinorm
from equinorm import ExportError

accelerate = pytest.importorskip("accelerate")


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


@pytest.mark.parametrize("kind", ["cpu", "disk", "one layer"])
def test_offloaded_weights_are_refused_until_they_are_back(kind, tmp_path):
    x, model = torch.randn(2, 8), net()
    wanted = model(x)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif kind == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "disk"}, main_device="cpu", offload_dir=str(tmp_path))
    for ask in (equinorm.balance_, equinorm.permutations, equinorm.signs):
        with pytest.raises(ExportError, match=r"accelerate offloads weights of Sequential .*remove_hook_from_submodules"):
            ask(model, (x,))
    assert torch.equal(model(x), wanted)
    accelerate.hooks.remove_hook_from_submodules(model)
    balance = equinorm.balance_(model, (x,))
    assert balance.norm_after < balance.norm_before
    assert torch.allclose(model(x), wanted, atol=1e-5)


def test_weights_that_stay_where_they_are_are_balanced():
    x, model = torch.randn(2, 8), accelerate.dispatch_model(net(), {"": "cpu"}, force_hooks=True)
    wanted = model(x)
    balance = equinorm.balance_(model, (x,))
    assert balance.norm_after < balance.norm_before
    assert torch.allclose(model(x), wanted, atol=1e-5)
