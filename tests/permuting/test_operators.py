"""Operators one by one, each behind a hidden layer, against brute force; those that PyTorch makes of others among them."""

import copy
import inspect

import pytest
import torch
from permutation_oracle import claimed, preserving
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import equinorm

ROWS = torch.tensor([0, 2, 2, 1, 4])
"""Places that an index names."""


SHAPES = {"w": (3, 3), "v": (3,), "b": (3, 2)}


class Net(nn.Module):
    """A function of a hidden layer of three channels, and of the parameters that it names."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.read = [name for name in inspect.signature(function).parameters if name != "h"]
        for name in self.read:
            self.register_parameter(name, nn.Parameter(torch.randn(SHAPES[name], dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(torch.tanh(x @ self.a), *(getattr(self, name) for name in self.read))


def transformed(h: Tensor) -> Tensor:
    """A filter of rows, in their frequencies."""
    spectrum = torch.view_as_real(torch.fft.rfft(h, dim=0)) * torch.tensor([1.0, 0.5], dtype=h.dtype)
    return torch.fft.irfft(torch.view_as_complex(spectrum), n=5, dim=0)


def diagonal_and_rest(h: Tensor, w: Tensor) -> Tensor:
    return h * w.diagonal() + h @ w


OPERATORS = {
    "cosine_similarity": lambda h, w, v, b: F.cosine_similarity(h, (w @ v)[None]) + h @ b[:, 0],
    "pairwise_distance": lambda h, v: F.pairwise_distance(h, v[None]),
    "inner": lambda h, w, b: torch.inner(h, w) @ b,
    "tensordot": lambda h, w, b: torch.tensordot(h, w, dims=1) @ b,
    "multi_dot": lambda h, w, b: torch.linalg.multi_dot([h, w, b]),
    "kron": lambda h, v, b: h @ b + torch.kron(v, v).sum(),
    "hstack": lambda h, v, b: torch.hstack([h, h * v]) @ torch.vstack([b, b]),
    "quantile": lambda h, b: torch.quantile(h, 0.3, dim=0) @ b,
    "mse_loss": lambda h, v, b: F.mse_loss(h, v.expand_as(h)) + h @ b,
    "huber_loss of each": lambda h, v, b: F.huber_loss(h, v.expand_as(h), reduction="none") @ b,
    "vdot": lambda h, w, v, b: h @ b * torch.vdot(v, w @ v),
    "addr": lambda h, w, v, b: h @ torch.addr(w, v, w @ v) @ b,
    "addbmm": lambda h, w, b: torch.addbmm(h @ w, h.expand(2, 5, 3), w.expand(2, 3, 3)) @ b,
    "trace": lambda h, w, b: h @ w @ b + torch.trace(w),
    "diagonal": lambda h, w, b: diagonal_and_rest(h, w) @ b,
    "diagonal beside": lambda h, w, b: h @ w @ b + torch.diagonal(w, 1).prod(),
    "diag_embed": lambda h, v, b: h @ torch.diag_embed(v) @ b,
    "kthvalue": lambda h, b: (h.kthvalue(2, dim=1).values[:, None] + h.kthvalue(2, dim=0).values) @ b,
    "dist": lambda h, v, b: h @ b * torch.dist(v, h),
    "cummax": lambda h, b: h.cummax(0).values @ b,
    "cummax of channels": lambda h, b: h.cummax(1).values @ b,
    "fft": lambda h, b: transformed(h) @ b,
    "fft of channels": lambda h, b: torch.fft.fft(h, dim=1).abs() @ b,
    "scatter_add": lambda h, b: torch.zeros_like(h).scatter_add(0, ROWS[:, None].expand_as(h), h) @ b,
    "scatter_reduce": lambda h, v, b: h.scatter_reduce(0, ROWS[:, None].expand_as(h), h * v, "amax") @ b,
    "scatter_add of channels": lambda h, b: h.scatter_add(1, (ROWS[:, None] % 3).expand_as(h), h) @ b,
    "index_copy": lambda h, v, b: h.index_copy(0, ROWS[3:], v.expand(2, 3)) @ b,
    "index_fill": lambda h, b: h.index_fill(0, ROWS[:2], 0.5) @ b,
    "index_put": lambda h, v, b: h.index_put((ROWS[3:],), v, accumulate=True) @ b,
    "index_put of channels": lambda h, b: h.T.index_put((ROWS[:1],), h[:, 0].mean()).T @ b,
    "channel_shuffle": lambda h, v, b: F.channel_shuffle(torch.cat([h, h * v], 1)[..., None], 3)[..., 0] @ torch.cat([b, b]),
    "grid_sample": lambda h, b: (
        F.grid_sample(h[..., None, None], h.new_full((5, 1, 1, 2), 0.3), align_corners=False)[..., 0, 0] @ b
    ),
}

MISSED = {"diagonal beside": 1, "fft of channels": 7, "index_put of channels": 1}
"""How many are missed: of two numbers that are multiplied, of magnitudes of a spectrum, of channels that are not written."""


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OPERATORS)
def test_every_permutation_behind_an_operator_is_found_or_known_to_be_missed(name):
    torch.manual_seed(0)
    inputs = (torch.randn(5, 2, dtype=torch.float64),)
    there, found = preserving(Net(OPERATORS[name]), inputs), claimed(Net(OPERATORS[name]), inputs)
    assert found <= there
    assert len(there - found) == MISSED.get(name, 0)


def test_channels_of_a_spectral_norm_move():
    """Its matrices are divided by a scalar product of buffers, which move along."""
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.ReLU(), spectral_norm(nn.Linear(5, 3)), nn.GELU(), nn.Linear(3, 2))
    net, x = net.double().eval(), torch.randn(6, 4, dtype=torch.float64)
    group, before = equinorm.permutations(net, x), net(x)
    assert [family.size for family in group.families] == [5, 3]
    group.permute_([torch.arange(family.size).flip(0) for family in group.families])
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)
    twin = copy.deepcopy(net)
    group = equinorm.permutations(twin, x)
    group.permute_(group.random(torch.Generator().manual_seed(1)))
    assert equinorm.equivalence(net, twin, x).equivalent
    assert equinorm.align(net, twin, x).distance_after == 0


class Codebook(nn.Module):
    """The row of a codebook that lies in the direction of a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.keys = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        scores = F.normalize(torch.tanh(self.first(x)), dim=-1) @ F.normalize(self.keys, dim=-1).T
        return self.last(F.embedding(scores.argmax(-1), self.keys))


def test_rows_of_a_codebook_move_that_are_normalized_and_transposed():
    """A norm that is bounded from below may be the same for all rows; the rows are not."""
    net, x = Codebook().double(), torch.randn(9, 4, dtype=torch.float64)
    group, before = equinorm.permutations(net, x), net(x)
    assert sorted(family.size for family in group.families) == [3, 6]
    group.permute_(group.random(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)
