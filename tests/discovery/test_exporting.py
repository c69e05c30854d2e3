"""The border to torch.export: blocks it records oddly, and what is said where it refuses."""

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import equinorm

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Runs a function of (net, hidden) between two layers."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), function

    def forward(self, x: Tensor) -> Any:
        return self.b(self.function(self, self.a(x).relu()))


@torch.no_grad()
def positions(h: Tensor) -> Tensor:
    return torch.arange(h.shape[-1], dtype=h.dtype)


@torch.no_grad()
def positions_and_more(h: Tensor) -> tuple[Tensor, Tensor]:
    return positions(h), positions(h).sin()


def beside(net: Any, h: Tensor) -> Tensor:
    return h * positions(h + 1)


def twice(net: Any, h: Tensor) -> Tensor:
    return h * positions(h + 1) * positions((h * 2)[:1])


def several(net: Any, h: Tensor) -> Tensor:
    a, b = positions_and_more(h.sin())
    return h * a * b


def cast(net: Any, h: Tensor) -> Tensor:
    wide = h + 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gain = torch.ones(wide.shape[-1], dtype=h.dtype) * 2
    return h * gain


def written(net: Any, h: Tensor) -> Tensor:
    gain = positions(h + 1)
    h[:, :2] = 1.0
    return h * gain


@pytest.mark.parametrize(("function", "free"), [(beside, 6), (twice, 6), (several, 6), (cast, 5), (written, 6)])
def test_values_used_for_their_shape_only(function, free):
    """The position 0 leaves a column of the next weight to zeros: it is free by itself."""
    net = Net(function)
    found = equinorm.symmetries(net, X)
    assert found.num_free == free
    before = net(X)
    found.rescale_(torch.randn(free, dtype=torch.float64))
    torch.testing.assert_close(net(X), before, rtol=1e-12, atol=1e-12)


@dataclass
class Batch:
    x: Tensor


class Easy(dict):
    __getattr__ = dict.__getitem__


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, batch: Any) -> Tensor:
        return self.b(self.a(batch.x).relu())


class Returns(Takes):
    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return [self.kind(x=self.b(self.a(x).relu()))]


@pytest.mark.parametrize("kind", [Batch, Easy])
def test_classes_that_the_exporter_does_not_know(kind):
    for model, args, does in ((Takes(), (kind(x=X),), "is given"), (Returns(kind), (X,), "returns")):
        with pytest.raises(equinorm.ExportError) as caught:
            equinorm.symmetries(model, args)
        assert f"it {does} an object of class {kind.__name__}" in str(caught.value)
        assert "register_dataclass" in str(caught.value)
        assert "control flow" not in str(caught.value)


def test_the_advice_for_unknown_classes_works():
    @dataclass
    class Known(Batch):
        pass

    class Registered(Easy):
        pass

    torch.export.register_dataclass(Known, serialized_type_name="equinorm.tests.Known")
    pytree.register_pytree_node(
        Registered,
        lambda value: ([*value.values()], [*value]),
        lambda values, keys: Registered(zip(keys, values, strict=True)),
        flatten_with_keys_fn=lambda value: ([(pytree.MappingKey(key), part) for key, part in value.items()], [*value]),
    )
    for kind in (Known, Registered):
        assert equinorm.symmetries(Takes(), (kind(x=X),)).num_free == 5
        assert equinorm.symmetries(Returns(kind), X).num_free == 5


def test_classes_registered_without_keys():
    class Half(Easy):
        pass

    pytree.register_pytree_node(Half, lambda v: ([*v.values()], [*v]), lambda v, keys: Half(zip(keys, v, strict=True)))
    with pytest.raises(equinorm.ExportError, match=r"an object of class Half.*with flatten_with_keys_fn"):
        equinorm.symmetries(Takes(), (Half(x=X),))


def test_errors_are_short_and_hold_their_cause():
    def branching(net: Any, h: Tensor) -> Tensor:
        return h if h.sum() > 0 else -h

    with pytest.raises(equinorm.ExportError) as caught:
        equinorm.symmetries(Net(branching), X)
    error = caught.value
    assert "attribute `cause`" in str(error)
    assert "GuardOnDataDependentSymNode" in type(error.cause).__name__
    assert "torch/export/_trace.py" in "".join(traceback.format_exception(error.cause))
    assert len("".join(traceback.format_exception(error)).splitlines()) < 40


def test_an_error_of_the_model_shows_its_own_line():
    def wrong(net: Any, h: Tensor) -> Tensor:
        return h @ h

    with pytest.raises(equinorm.ExportError, match="does not run on inputs") as caught:
        equinorm.symmetries(Net(wrong), X)
    assert "return h @ h" in "".join(traceback.format_exception(caught.value))
    assert isinstance(caught.value.cause, RuntimeError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built")
@pytest.mark.parametrize("apart", [True, False])
def test_sharded_models_are_refused_and_survive(apart):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        net = FullyShardedDataParallel(inner, use_orig_params=apart, device_id=torch.device("cpu"))
        before = net(X)
        with pytest.raises(equinorm.ExportError, match="before it is wrapped"):
            equinorm.symmetries(net, X)
        assert torch.equal(net(X), before)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    pytest.importorskip("transformers")
    from zoo import from_torchvision as zoo_torchvision

    zoo_torchvision.import_models()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(**sizes)).double().eval()


TOKENS = torch.randint(0, 20, (1, 5), generator=torch.Generator().manual_seed(0))


def test_language_models_need_no_advice_about_caches(llama):
    plain = equinorm.symmetries(llama, TOKENS)
    assert plain.num_free == equinorm.symmetries(llama, TOKENS, {"use_cache": False}).num_free > 0
    assert llama.config.use_cache
    before = llama.generate(TOKENS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    plain.rescale_(torch.randn(plain.num_free, dtype=torch.float64))
    after = llama.generate(TOKENS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits), rtol=1e-9, atol=1e-9)


def test_caches_do_not_count_as_outputs_of_language_models(llama):
    twin = copy.deepcopy(llama)
    assert equinorm.balance_(twin, TOKENS).converged
    assert equinorm.deviation(twin, llama, TOKENS) < 1e-12


def test_adapters_around_language_models_need_no_advice_about_caches(llama):
    class PeftModel(nn.Module):
        """As peft's: keywords go to the model inside, of which its own forward says nothing."""

        __module__ = "peft.peft_model"

        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def get_base_model(self):
            return self.base_model

        def forward(self, *args, **kwargs):
            return self.base_model(*args, **kwargs)

    assert equinorm.symmetries(PeftModel(llama), TOKENS).num_free == equinorm.symmetries(llama, TOKENS).num_free > 0


def test_a_cache_that_is_asked_for_is_refused_with_a_cure(llama):
    with pytest.raises(equinorm.ExportError, match=r"returns a DynamicCache.*\{'use_cache': False\}") as caught:
        equinorm.symmetries(llama, TOKENS, {"use_cache": True})
    assert "functorch" not in str(caught.value)


def test_recorders_of_hidden_states_pin_nothing_until_they_are_asked_for(llama):
    before = equinorm.symmetries(llama, TOKENS).num_free
    llama(TOKENS, output_hidden_states=True)
    assert any(module._forward_hooks for module in llama.modules())
    assert equinorm.symmetries(llama, TOKENS).num_free == before
    assert equinorm.symmetries(llama, TOKENS, {"output_hidden_states": True}).num_free < before
    handle = llama.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert equinorm.symmetries(llama, TOKENS).num_free < before
    handle.remove()


def test_data_of_a_parameter_is_named_with_its_cure():
    """Whether a forward says `.data` or `.detach()` is all the difference."""
    with pytest.raises(equinorm.ExportError, match=r"by its `\.data`.*Write `\.detach\(\)` there"):
        equinorm.symmetries(Net(lambda net, h: h * net.a.bias.data), X)
    assert equinorm.symmetries(Net(lambda net, h: h * net.a.bias.detach()), X).num_free > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_vmap_over_a_parameter_is_named():
    with pytest.raises(equinorm.ExportError, match=r"within torch\.vmap or torch\.func.*declare the submodule"):
        equinorm.symmetries(Net(lambda net, h: torch.vmap(lambda row: net.b.weight @ row)(h) @ net.b.weight), X)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_sharded_parameters_are_refused_before_anything_runs(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        net = Net(lambda net, h: pytest.fail("the model ran"))
        net.b.weight = nn.Parameter(distribute_tensor(net.b.weight.detach(), init_device_mesh("cpu", (1,))))
        with pytest.raises(equinorm.ExportError, match=r"b\.weight is sharded over processes.*before it is sharded"):
            equinorm.permutations(net, X)  # what has no way to look at a part
    finally:
        torch.distributed.destroy_process_group()
