"""Every way in which scale classes lie along a tensor, against the energies and gradients written out entry by entry."""

import math

import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

import equinorm
from equinorm import ENorm


class Quantizer(nn.Module):
    """Nearest of a few codes: squares, products and squares of distances meet in one class."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
        self.codes, self.decoder = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, w = self.encoder(x), self.codes
        distances = z.pow(2).sum(1, keepdim=True) - 2 * z @ w.T + w.pow(2).sum(1)
        return self.decoder(nn.functional.embedding(distances.argmin(1), w))


class SquaredRecurrence(nn.Module):
    """h ← relu(W h + U x)² twice: W's rows enter with exponent 1, its columns with −2, both of one class on the diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = (nn.Linear(a, b, bias=False) for a, b in [(3, 4), (4, 4), (4, 2)])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x)).square()
        for _ in range(2):
            h = torch.relu(self.again(h) + self.first(x)).square()
        return self.last(h)


class Paired(nn.Module):
    """A gain whose entries scale in pairs."""

    def __init__(self, kind: type = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.last = kind(8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(x).view(-1, 4, 2).sum(-1)))


class PartlyPinned(nn.Module):
    """A gain whose first two channels an activation pins."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(torch.cat([torch.sigmoid(y[:, :2]), torch.relu(y[:, 2:])], 1))


class Rotary(nn.Module):
    """Normalized queries and keys, rotated in neighbouring pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (self._turned(norm(layer(x))) for norm, layer in ((self.q_norm, self.queries), (self.k_norm, self.keys)))
        return nn.functional.scaled_dot_product_attention(q, k, self.values(x))

    def _turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.7 ** torch.arange(4, dtype=x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


def _heads() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()


CASES = [
    pytest.param(Quantizer, (7, 6), id="distances to codes"),
    pytest.param(SquaredRecurrence, (7, 3), id="squared recurrence"),
    pytest.param(Paired, (7, 8), id="pairs"),
    pytest.param(lambda: Paired(nn.RMSNorm), (7, 8), id="pairs, one factor"),
    pytest.param(PartlyPinned, (7, 6), id="partly pinned"),
    pytest.param(Rotary, (2, 5, 8), id="rotary pairs"),
    pytest.param(_heads, (2, 5, 8), id="encoder layer"),
]


def energies(symmetries: equinorm.Symmetries, z: Tensor, biases: bool) -> Tensor:
    """|w|² of every entry that counts at log-scales z, from the scalings alone."""
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), z])
    counted = [s for s in symmetries.scalings if s.factors and s.kind == "parameter" and (biases or s.role == "weight")]
    found = []
    for scaling in counted:
        logs = sum(exponent * padded[ids] for exponent, ids in scaling.factors)
        found.append((scaling.effective(symmetries.tensors[scaling.name]).square() * torch.exp(2 * logs)).flatten())
    return torch.cat(found)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("build", "shape"), CASES)
def test_the_least_norm_is_that_of_the_entries(build, shape, biases):
    torch.manual_seed(0)
    model = build().double()
    symmetries = equinorm.symmetries(model, (torch.randn(*shape, dtype=torch.float64),))
    balance = symmetries.balance(tol=1e-12, biases=biases)
    assert balance.converged
    assert not balance.dead

    def objective(z):
        variable = torch.from_numpy(z).requires_grad_()
        total = energies(symmetries, variable, biases).sum()
        (gradient,) = torch.autograd.grad(total, variable)
        return float(total.detach()), gradient.numpy()

    best = optimize.minimize(objective, torch.zeros(symmetries.num_free).double().numpy(), jac=True, method="L-BFGS-B",
                             options={"ftol": 0.0, "gtol": 1e-10, "maxiter": 10**5})  # fmt: skip
    assert balance.norm_before**2 == pytest.approx(float(energies(symmetries, 0 * balance.log_scales, biases).sum()), rel=1e-12)
    assert balance.norm_after**2 == pytest.approx(float(energies(symmetries, balance.log_scales, biases).sum()), rel=1e-12)
    assert balance.norm_after**2 == pytest.approx(best.fun, rel=1e-9)


@pytest.mark.parametrize(("build", "shape"), CASES)
def test_the_hook_goes_to_the_same_norm(build, shape):
    torch.manual_seed(0)
    model = build().double()
    inputs = torch.randn(*shape, dtype=torch.float64)
    least = equinorm.symmetries(model, (inputs,)).balance(tol=1e-12).norm_after
    hook = ENorm(torch.optim.SGD(model.parameters(), lr=0.0), model, (inputs,), cycles=50)
    for _ in range(40):
        hook.cycle_()
        if hook.residual() < 1e-12:
            break
    after = equinorm.symmetries(model, (inputs,)).balance(cycles=0)
    assert after.norm_before == pytest.approx(least, rel=1e-9)


def test_equivalence_counts_gains_that_scale_in_pairs():
    torch.manual_seed(0)
    model, twin = Paired().double(), Paired().double()
    twin.load_state_dict(model.state_dict())
    inputs = (torch.randn(7, 8, dtype=torch.float64),)
    found = equinorm.symmetries(twin, inputs)
    found.rescale_(torch.randn(found.num_free, dtype=torch.float64))
    assert equinorm.equivalence(model, twin, inputs).equivalent


def test_a_network_of_dead_channels_is_not_called_converged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    nn.init.zeros_(model[2].weight)
    inputs = (torch.randn(1, 4).double(),)
    balance = equinorm.symmetries(model, inputs).balance()
    assert not balance.converged
    assert len(balance.dead) == 6
    assert "no path of nonzero weights" in str(balance)
    assert math.isclose(balance.norm_before, 0.0)
    assert equinorm.equivalence(model, model, inputs).equivalent  # which has no need of a minimum
