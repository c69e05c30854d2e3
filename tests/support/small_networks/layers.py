"""Chains, normalization, residual sums and data movement."""

import torch
from torch import nn

from small_networks.cases import CASES, case, conv, lin, seq, x

Flat, ReLU, F = nn.Flatten, nn.ReLU, nn.functional

# ------------------------------------------------------------------------------------------------- layers and activations
seq("linear network", x(4, 3), lin(3, 4), lin(4, 2))
seq("mlp", x(4, 3), lin(3, 5), ReLU(), lin(5, 4), ReLU(), lin(4, 2))
seq("mlp with biases", x(4, 3), lin(3, 5, True), ReLU(), lin(5, 4, True), ReLU(), lin(4, 2, True))
seq("leaky relu", x(4, 3), lin(3, 5), nn.LeakyReLU(0.2), lin(5, 2))
seq("prelu, one slope", x(4, 3), lin(3, 5), nn.PReLU(), lin(5, 2))
seq("prelu, slope per channel", x(4, 3), lin(3, 5), nn.PReLU(5), lin(5, 2))
seq("dropout in evaluation", x(4, 3), nn.Sequential(lin(3, 5), nn.Dropout(), ReLU(), lin(5, 2)).eval())
seq("conv2d", x(2, 2, 4, 4), conv(2, 3), ReLU(), conv(3, 2, bias=True, stride=2), ReLU(), Flat(), lin(8, 2))
seq("conv1d", x(2, 2, 6), nn.Conv1d(2, 3, 3), ReLU(), nn.Conv1d(3, 2, 2, stride=2), ReLU(), Flat(), lin(4, 2))
seq("conv3d", x(2, 1, 3, 3, 3), nn.Conv3d(1, 2, 2), ReLU(), nn.Conv3d(2, 2, 2), ReLU(), Flat(), lin(2, 2))
seq("grouped conv", x(2, 4, 4, 4), conv(4, 6, groups=2), ReLU(), conv(6, 3, groups=3), ReLU(), conv(3, 2, 1))
seq("depthwise conv", x(2, 2, 4, 4), conv(2, 3, 1), ReLU(), conv(3, 6, groups=3), ReLU(), conv(6, 2, 1))
seq("transposed conv", x(2, 2, 3, 3), nn.ConvTranspose2d(2, 3, 2), ReLU(), nn.ConvTranspose2d(3, 2, 2, bias=False))
seq(
    "transposed grouped conv1d",
    x(2, 2, 3),
    nn.ConvTranspose1d(2, 4, 2, groups=2),
    ReLU(),
    nn.ConvTranspose1d(4, 2, 2, groups=2),
)
seq(
    "pooling",
    x(2, 2, 8, 8),
    conv(2, 3),
    nn.MaxPool2d(2),
    conv(3, 3),
    nn.AvgPool2d(2),
    ReLU(),
    nn.AdaptiveAvgPool2d(1),
    Flat(),
    lin(3, 2),
)
seq("adaptive max pooling", x(2, 2, 6, 6), conv(2, 3), nn.AdaptiveMaxPool2d(2), Flat(), lin(12, 2))
seq("interpolation", x(2, 2, 3, 3), conv(2, 3), ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"), conv(3, 2, 1))
seq("pixel shuffle", x(2, 2, 3, 3), conv(2, 8), ReLU(), nn.PixelShuffle(2), ReLU(), conv(2, 2, 1))
seq("gelu", x(4, 3), lin(3, 5), nn.GELU(), lin(5, 2))
seq("clipped relu", x(4, 3), lin(3, 5), nn.Hardtanh(0, 0.3), lin(5, 2))
seq("tanh", x(4, 3), lin(3, 5, True), nn.Tanh(), lin(5, 4), ReLU(), lin(4, 2))

# --------------------------------------------------------------------------------------------------------- normalization
seq(
    "batch norm, training",
    x(6, 2, 4, 4),
    conv(2, 3),
    nn.BatchNorm2d(3),
    ReLU(),
    conv(3, 3),
    nn.BatchNorm2d(3),
    ReLU(),
    conv(3, 2, 1),
)
seq(
    "batch norm, evaluation",
    x(2, 2, 4, 4),
    conv(2, 3),
    nn.BatchNorm2d(3).eval(),
    ReLU(),
    conv(3, 3),
    nn.BatchNorm2d(3).eval(),
    ReLU(),
    conv(3, 2, 1),
)
CASES["batch norm, evaluation"].eval()
seq("layer norm", x(2, 4, 3), lin(3, 4), nn.LayerNorm(4), lin(4, 5), ReLU(), lin(5, 2))
seq("group norm", x(2, 2, 4, 4), conv(2, 4), nn.GroupNorm(2, 4), ReLU(), conv(4, 2, 1))
seq("instance norm", x(2, 2, 4, 4), conv(2, 3), nn.InstanceNorm2d(3, affine=True), ReLU(), conv(3, 2, 1))
seq("rms norm", x(2, 4, 3), lin(3, 4), nn.RMSNorm(4, eps=1e-2), lin(4, 5), ReLU(), lin(5, 2))


@case("rms norm by hand, gain 1 + w", x(2, 4), a=lin(4, 4), g=torch.zeros(4), b=lin(4, 2))
def _(m, x):
    h = m.a(x)
    return m.b(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2) * (1 + m.g))


@case("normalization without eps", x(3, 4), a=lin(4, 4), g=torch.ones(4), b=lin(4, 3))
def _(m, x):
    h = m.a(x)
    return m.b(h / (h.pow(2).mean(-1, keepdim=True).sqrt()) * m.g)


seq("weight norm", x(4, 3), nn.utils.parametrizations.weight_norm(lin(3, 4)), ReLU(), lin(4, 2))

# ------------------------------------------------------------------------------------------------------------- residuals


@case("residual identity", x(3, 3), a=lin(3, 4), b=lin(4, 5), c=lin(5, 4), d=lin(4, 2))
def _(m, x):
    h = m.a(x)
    return m.d(h + m.c(F.relu(m.b(h))))


@case("residual on the input", x(3, 3), b=lin(3, 5), c=lin(5, 3), d=lin(3, 2))
def _(m, x):
    return m.d(F.relu(x + m.c(F.relu(m.b(x)))))


@case("residual, projected", x(3, 3), a=lin(3, 4), b=lin(4, 4), c=lin(4, 3), s=lin(4, 3), d=lin(3, 2))
def _(m, x):
    h = F.relu(m.a(x))
    return m.d(F.relu(m.s(h) - m.c(F.relu(m.b(h)))))


@case("residual, option A", x(2, 2, 4, 4), a=conv(2, 2), b=conv(2, 4, stride=2), c=conv(4, 4), d=conv(4, 2, 1))
def _(m, x):
    h = F.relu(m.a(x))
    skip = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
    return m.d(F.relu(skip + m.c(F.relu(m.b(h)))))


@case("layer scale", x(3, 3), a=lin(3, 4), b=lin(4, 5), c=lin(5, 4), g=torch.ones(4), d=lin(4, 2))
def _(m, x):
    h = m.a(x)
    return m.d(h + m.g * m.c(F.relu(m.b(h))))


@case("subtraction", x(3, 3), a=lin(3, 4), b=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x)) - m.b(x).abs())


@case("maximum and minimum", x(3, 3), a=lin(3, 4), b=lin(3, 4), c=lin(3, 4), d=lin(4, 2))
def _(m, x):
    return m.d(torch.maximum(m.a(x), torch.minimum(m.b(x), m.c(x))))


@case("maxout", x(3, 3), a=lin(3, 8), d=lin(4, 2))
def _(m, x):
    return m.d(m.a(x).view(-1, 4, 2).amax(-1))


# ------------------------------------------------------------------------------------------------------------- movement


@case("dense concatenation", x(2, 2, 4, 4), a=conv(2, 3), b=conv(5, 2), c=conv(7, 2, 1))
def _(m, x):
    h = torch.cat([x, F.relu(m.a(x))], 1)
    h = torch.cat([h, F.relu(m.b(h))], 1)
    return m.c(h)


@case(
    "dense concatenation with batch norm",
    x(6, 2, 3, 3),
    a=conv(2, 3),
    n=nn.BatchNorm2d(5),
    b=conv(5, 2),
    k=nn.BatchNorm2d(7),
    c=conv(7, 2, 1),
)
def _(m, x):
    h = torch.cat([x, m.a(x)], 1)
    h = torch.cat([h, m.b(F.relu(m.n(h)))], 1)
    return m.c(F.relu(m.k(h)))


@case("channel shuffle", x(2, 2, 3, 3), a=conv(2, 6), b=conv(6, 6, groups=3), c=conv(6, 2, 1))
def _(m, x):
    h = F.relu(m.a(x)).view(2, 2, 3, 3, 3).transpose(1, 2).reshape(2, 6, 3, 3)
    return m.c(F.relu(m.b(h)))


@case("recurrent convolution that starts at zeros", x(2, 2, 3, 3), i=conv(2, 3, 1), h=conv(3, 3, 1), o=conv(3, 2, 1))
def _(m, x):
    h = torch.zeros(2, 3, 3, 3, dtype=x.dtype)
    for _ in range(2):
        h = F.relu(m.i(x) + m.h(h))
    return m.o(h)


@case("gain 1 − 2w", x(3, 3), a=lin(3, 4), g=torch.full((4,), 0.3), d=lin(4, 2))
def _(m, x):
    return m.d(F.relu(m.a(x)) * torch.rsub(m.g, 1.0, alpha=2.0))


@case("split and chunk", x(3, 3), a=lin(3, 6), b=lin(2, 3), c=lin(4, 3), d=lin(3, 2), e=lin(3, 2))
def _(m, x):
    one, two = F.relu(m.a(x)).split([2, 4], -1)
    h = F.relu(m.b(one) + m.c(two))
    left, right = torch.cat([h, h], -1).chunk(2, -1)
    return m.d(left) + m.e(right)


@case("flip, roll and constant indices", x(3, 3), a=lin(3, 4), b=lin(4, 4), d=lin(3, 2))
def _(m, x):
    h = F.relu(m.a(x))
    h = F.relu(m.b(h.flip(-1).roll(1, -1)) + h)
    return m.d(h[:, [2, 0, 2]])


@case("unfold", x(2, 2, 4, 4), a=conv(2, 2), b=lin(8, 3), d=lin(3, 2))
def _(m, x):
    return m.d(F.relu(m.b(F.unfold(F.relu(m.a(x)), 2, stride=2).transpose(1, 2))))


@case("reductions", x(3, 4, 3), a=lin(3, 4), b=lin(4, 3), d=lin(3, 2))
def _(m, x):
    h = F.relu(m.a(x))
    h = torch.cat([h.sum(1), h.mean(1)], 0) + h.amax(1).repeat(2, 1)
    return m.d(F.relu(m.b(h))).mean(0)


@case("mixer", x(2, 3, 4), a=lin(4, 3), t=lin(3, 5), u=lin(5, 3), c=lin(3, 4), e=lin(4, 3), d=lin(3, 2))
def _(m, x):
    h = m.a(x)
    h = h + m.u(F.relu(m.t(h.transpose(1, 2)))).transpose(1, 2)
    h = h + m.e(F.relu(m.c(h)))
    return m.d(h.mean(1))


@case("flatten into linear", x(2, 1, 4, 4), a=conv(1, 2), d=lin(32, 3), e=lin(3, 2))
def _(m, x):
    return m.e(F.relu(m.d(F.relu(m.a(x)).permute(0, 2, 3, 1).flatten(1))))


# ------------------------------------------------------------------------------------------------------------- recurrence


class Recurrent(nn.Module):
    """A layer, ReLU, a recurrent layer, another layer at every step."""

    def __init__(self, kind: type[nn.Module], out: int, **options: object) -> None:
        super().__init__()
        self.first, self.steps, self.last = lin(2, 3, True), kind(3, 2, **options), lin(out, 2, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.steps(self.first(x).relu())[0])


class Steps(nn.Module):
    """A recurrent cell, three times."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.first, self.cell, self.last = lin(2, 3, True), cell, lin(2, 2, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in self.first(x).relu().unbind(0):
            state = self.cell(step, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


for name, kind, out, options in [
    ("relu rnn", nn.RNN, 2, {"nonlinearity": "relu"}),
    ("relu rnn of two layers", nn.RNN, 2, {"nonlinearity": "relu", "num_layers": 2, "bias": False}),
    ("relu rnn in both directions", nn.RNN, 4, {"nonlinearity": "relu", "bidirectional": True, "batch_first": True}),
    ("tanh rnn", nn.RNN, 2, {}),
    ("gru of two layers", nn.GRU, 4, {"num_layers": 2, "bidirectional": True, "bias": False}),
    ("lstm", nn.LSTM, 2, {"batch_first": True}),
    ("lstm with projections", nn.LSTM, 1, {"proj_size": 1, "num_layers": 2, "bias": False}),
]:
    seq(name, x(4, 3, 2), Recurrent(kind, out, **options))
for name, cell in [
    ("relu rnn cell", nn.RNNCell(3, 2, nonlinearity="relu")),
    ("tanh rnn cell", nn.RNNCell(3, 2, bias=False)),
    ("gru cell", nn.GRUCell(3, 2)),
    ("lstm cell", nn.LSTMCell(3, 2)),
]:
    seq(name, x(4, 3, 2), Steps(cell))


# ------------------------------------------------------------------------------------------------------------- stacked results
@case("layers of one table, stacked", x(2, 2), a=lin(2, 3), table=x(2, 3, 3), d=lin(3, 2))
def stacked_layers(m, x):
    h, found = m.a(x).relu(), []
    for weight in m.table:
        h = nn.functional.linear(h, weight).relu()
        found.append(h)
    return m.d(torch.stack(found, 1)).sum(1)


@case("two layers, stacked and mixed", x(2, 2), a=lin(2, 3), b=lin(3, 3), d=lin(3, 2), mix=x(2, 2))
def mixed_layers(m, x):
    first = m.a(x).relu()
    return m.d(m.mix @ torch.stack([first, m.b(first).relu()], 1))
