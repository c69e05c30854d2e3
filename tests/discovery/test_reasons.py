"""What a pin says: functions that are not homogeneous by their names, and the way out where the exporter gives up."""

import pytest
import torch
from torch import Tensor, nn

import equinorm
from equinorm.discovery.rules import NOT_HOMOGENEOUS, SIGNS, TABLE, why_not
from equinorm.permuting.laws.registry import LAWS

F = nn.functional


class Between(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


NAMED = {
    "GELU": F.gelu,
    "SiLU": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "Softplus": F.softplus,
    "ELU": F.elu,
    "SELU": F.selu,
    "CELU": F.celu,
    "Mish": F.mish,
    "Hardswish": F.hardswish,
    "Hardsigmoid": F.hardsigmoid,
    "exp": torch.exp,
    "log1p": lambda x: x.abs().log1p(),
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "softmax": lambda x: x.softmax(-1),
    "log-softmax": lambda x: x.log_softmax(-1),
    "log-sum-exp": lambda x: x.logsumexp(-1, keepdim=True).expand_as(x),
    "round": torch.round,
    "ELU in place": lambda x: F.elu_(x),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_function_that_is_not_homogeneous_is_named(name):
    symmetries = equinorm.symmetries(Between(NAMED[name]), torch.randn(2, 3))
    assert symmetries.num_free == 0
    reasons = [pin.reason.detail for pin in symmetries.pins if pin.tensor == "up.weight"]
    assert reasons == [f"{name.removesuffix(' in place')} is not homogeneous"]


def test_an_operation_without_a_rule_is_said_to_have_none():
    symmetries = equinorm.symmetries(Between(lambda x: x * torch.linalg.matrix_exp(x.T @ x)[0, 0]), torch.randn(2, 3))
    assert any("no rule" in pin.reason.detail for pin in symmetries.pins)


NOT_EVERYWHERE = {"cholesky"}
"""Operators that not every version of PyTorch has: 2.14 has no cholesky any more."""


@pytest.mark.parametrize("table", [TABLE, SIGNS, LAWS, NOT_HOMOGENEOUS], ids=["scales", "signs", "axes", "not homogeneous"])
def test_operators_that_are_named_exist(table):
    missing = {name for name in table if "::" not in name and not hasattr(torch.ops.aten, name)}
    assert missing <= (NOT_EVERYWHERE if torch.__version__ >= (2, 14) else set())


def test_what_is_not_homogeneous_has_no_rule():
    assert not set(NOT_HOMOGENEOUS) & set(TABLE)
    assert why_not("silu_") == "SiLU is not homogeneous"
    assert why_not("cdist") == ""


_MORE = {
    "alpha_dropout": (0.5, True),
    "feature_alpha_dropout": (0.5, True),
    "kl_div": (torch.tensor(0.5),),
    "binary_cross_entropy_with_logits": (torch.full((4,), 0.25, dtype=torch.float64),),
    "logaddexp": (torch.tensor(0.5),),
    "logaddexp2": (torch.tensor(0.5),),
    "floor_divide": (0.2,),
    "huber_loss": (torch.full((4,), 0.5, dtype=torch.float64),),
    "smooth_l1_loss": (torch.full((4,), 0.5, dtype=torch.float64),),
    "cross_entropy_loss": (torch.full((4,), 0.25, dtype=torch.float64),),
    "_softmax": (0, False),
    "_log_softmax": (0, False),
    **dict.fromkeys(("softmax", "_safe_softmax", "log_softmax", "logsumexp", "logcumsumexp"), (0,)),
}
"""Further arguments of functions that need some."""


@pytest.mark.parametrize("name", sorted(set(NOT_HOMOGENEOUS) - {"binary_cross_entropy"}))  # which takes probabilities only
def test_no_degree_fits_what_is_not_homogeneous(name):
    """f(1.3·x) = r·f(x) and f(1.69·x) = r²·f(x) for no r, over three sets of x, as some functions are not defined on all."""
    function = getattr(torch, name, None) or getattr(F, name, None)
    if function is None:
        pytest.skip("a part of another function, not called by hand")

    def run(x: Tensor, scale: float) -> Tensor:
        torch.manual_seed(0)
        return torch.atleast_1d(function(x * scale, *_MORE.get(name, ()))).flatten()

    fits = []
    for x in ([-1.7, -0.4, 0.45, 2.6], [0.15, 0.35, 0.5, 0.57], [1.1, 1.5, 2.1, 3.7]):
        values = torch.tensor(x, dtype=torch.float64).reshape((1, 4, 1) if "feature" in name else (4,))
        first, second, third = (run(values, scale) for scale in (1.0, 1.3, 1.69))
        defined = first.isfinite() & second.isfinite() & third.isfinite()
        first, second, third = first[defined], second[defined], third[defined]
        ratio = (second / first)[first != 0].mean() if bool((first != 0).any()) else torch.tensor(1.0)
        fits.append(torch.allclose(second, ratio * first, atol=1e-9) and torch.allclose(third, ratio**2 * first, atol=1e-9))
    assert not all(fits)


class Sparse(nn.Module):
    """A graph layer that makes its adjacency matrix in its forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("counts", torch.eye(4, dtype=torch.long).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "csr":
            return torch.sparse_csr_tensor(torch.arange(5), torch.arange(4), torch.ones(4), (4, 4)) @ x
        if self.kind == "integer buffer":
            return torch.sparse.mm(self.counts.to(x.dtype), x)
        return torch.eye(4).to_sparse() @ x


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["coo", "integer buffer"])
def test_sparse_constants_of_a_forward_are_looked_through_or_pinned(kind):
    model = nn.Sequential(nn.Linear(3, 4), Sparse(kind), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    model[1].to(torch.float64)
    x = torch.randn(4, 3)
    symmetries = equinorm.symmetries(model.float(), x)
    assert symmetries.num_free >= 5
    moved = {name: value.clone() for name, value in model.state_dict().items() if not value.is_sparse}
    expected = model(x)
    symmetries.rescale_(torch.linspace(-1, 1, symmetries.num_free))
    assert any(not torch.equal(model.state_dict()[name], value) for name, value in moved.items())
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_constant_that_cannot_be_exported_names_the_way_out():
    model = nn.Sequential(nn.Linear(3, 4), Sparse("csr"), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(equinorm.ExportError, match="opaque='1'"):
        equinorm.symmetries(model, torch.randn(4, 3))
    assert equinorm.symmetries(model, torch.randn(4, 3), opaque="1").num_free == 5


class Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return flex_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_names_the_way_out_and_it_works():
    model = nn.Sequential(nn.Linear(8, 8), Flex(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False)
    x = torch.randn(1, 16, 8)
    with pytest.raises(equinorm.ExportError, match=r"FlexAttention or the like in 1, .*opaque='1'"):
        equinorm.symmetries(model, x)
    assert equinorm.symmetries(model, x, opaque="1").num_free == 6


def test_compiled_functions_run_in_an_opaque_module():
    class Compiled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.compile(lambda x: x.tanh(), backend="eager", fullgraph=True)(x)

    model = nn.Sequential(nn.Linear(3, 4), Compiled(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    assert equinorm.symmetries(model, torch.randn(2, 3), opaque="1").num_free == 5
