"""SmoothQuant's rule as log-scales: its own formula where channels are free, and exact where they are tied."""

import copy

import pytest
import torch
from torch import nn

import equinorm
from equinorm import EqualizeError
from equinorm.quantization import smooth


class Attention(nn.Module):
    """A normalization with three readers; two queries share what each of two values gives."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4)
        self.o = nn.Linear(8, 6)

    def forward(self, x):
        y = self.norm(x)
        q = self.q(y).unflatten(-1, (4, 2)).transpose(-2, -3)
        k, v = (layer(y).unflatten(-1, (2, 2)).transpose(-2, -3).repeat_interleave(2, -3) for layer in (self.k, self.v))
        z = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.o(z.transpose(-2, -3).flatten(-2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Attention().double().eval().requires_grad_(False)
    model.norm.weight.uniform_(0.1, 30.0)
    return model


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(3)]


def seen(model, batches):
    """What the layers behind the normalization and the last one read at most, and the weights that read it."""
    inputs = {}
    layers = (model.q, model.o)
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs.setdefault(layer, []).append(args[0].flatten(0, -2)))
    for batch in batches:
        model(batch)
    for layer in layers:
        layer._forward_pre_hooks.clear()
    readers = torch.cat([model.q.weight, model.k.weight, model.v.weight])
    largest = [torch.cat(inputs[layer]).abs().amax(0) for layer in layers]
    return [(largest[0], readers.abs().amax(0)), (largest[1], model.o.weight.abs().amax(0))]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_it_is_smoothquants_formula_where_channels_are_free_and_keeps_the_function(model, batches, alpha):
    before = copy.deepcopy(model)
    (a, w), (values, outputs) = seen(model, batches)
    symmetries = equinorm.symmetries(model, (batches[0],))
    symmetries.rescale_(smooth(symmetries, batches, alpha))
    scales = a**alpha / w ** (1 - alpha)
    torch.testing.assert_close(model.norm.weight, before.norm.weight / scales, rtol=1e-12, atol=0)
    for name in ("q", "k", "v"):
        own, old = getattr(model, name).weight, getattr(before, name).weight
        outer = own / (old * scales)  # queries, keys and values have scales of their own outputs besides
        torch.testing.assert_close(outer, outer[:, :1].expand_as(outer), rtol=1e-12, atol=0)
    wished = (alpha * values.log() - (1 - alpha) * outputs.log()).unflatten(0, (2, 2, 2)).mean(1, keepdim=True)
    tied = wished.expand(2, 2, 2).flatten().exp()
    torch.testing.assert_close(model.o.weight, before.o.weight * tied, rtol=1e-12, atol=0)
    assert equinorm.deviation(before, model, (batches[0],)) < 1e-12


def test_every_batch_counts_and_buffers_stay(batches):
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()  # in training mode, as it is given
    symmetries = equinorm.symmetries(net, (batches[0][0],))
    flat = [batch.flatten(0, 1) for batch in batches]
    whole, before = smooth(symmetries, flat), net[0].running_mean.clone()
    assert not torch.equal(whole, smooth(symmetries, flat[:1]))
    assert torch.equal(net[0].running_mean, before)
    assert net.training


def test_channels_that_are_zero_stay(model, batches):
    model.norm.weight[2] = model.norm.bias[2] = 0
    symmetries = equinorm.symmetries(model, (batches[0],))
    symmetries.rescale_(smooth(symmetries, batches))
    before = model.q.weight[:, 2].clone()
    symmetries.rescale_(smooth(symmetries, batches))  # smoothing what is smooth changes nothing
    torch.testing.assert_close(model.q.weight[:, 2], before, rtol=1e-9, atol=0)
    (a, w), _ = seen(model, batches)
    apart = [i for i in range(6) if i != 2]
    torch.testing.assert_close(a[apart], w[apart], rtol=1e-9, atol=0)


def test_what_cannot_be_smoothed_is_refused(model, batches):
    symmetries = equinorm.symmetries(model, (batches[0],))
    with pytest.raises(EqualizeError, match=r"alpha must be a number from 0 to 1, not 1\.5"):
        smooth(symmetries, batches, 1.5)
    with pytest.raises(EqualizeError, match="Attention does not run on calibration batch 1"):
        smooth(symmetries, [batches[0], torch.randn(2, 5, 7).double()])
    with pytest.raises(EqualizeError, match=r"what [qkv]\.weight reads is NaN or inf"):
        smooth(symmetries, [batches[0] * float("nan")])
    alone = nn.Linear(3, 2)
    with pytest.raises(EqualizeError, match="no linear map of Linear reads an activation that can scale"):
        smooth(equinorm.symmetries(alone, (torch.randn(2, 3),)), [torch.randn(2, 3)])
