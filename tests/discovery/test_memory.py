"""Memory: equal ids lie in one place, labels leave what repeats, and what nobody asks for is dropped."""

import torch
from torch import nn

import equinorm
from equinorm._symmetries import symmetries_of
from equinorm.discovery.graph.of_model import graphs_of
from equinorm.discovery.labels import compact


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 2))


def test_ids_that_repeat_leave_their_memory():
    ids = compact(torch.arange(10).expand(64, 10).contiguous())
    assert ids.shape == (1, 10)
    assert ids.untyped_storage().nbytes() == ids.nbytes


def test_equal_ids_of_several_tensors_lie_in_one_place():
    scalings = {scaling.name: scaling for scaling in equinorm.symmetries(network(), torch.randn(1, 3)).scalings}
    places = [scalings[name].factors[0][1].untyped_storage().data_ptr() for name in ("0.weight", "0.bias", "2.weight")]
    assert scalings["2.weight"].factors[0][0] == 1.0  # its own rows come first, the columns that it reads second
    assert places[0] == places[1] == scalings["2.weight"].factors[1][1].untyped_storage().data_ptr() != places[2]


def test_without_values_inside_everything_else_is_the_same():
    graphs = graphs_of(network().bfloat16(), torch.randn(1, 3, dtype=torch.bfloat16), None)
    whole, lean = symmetries_of(graphs), symmetries_of(graphs, inner=False)
    assert len(whole.values) > 5
    assert len(lean.values) == len(graphs._kept) == 0
    assert (lean.num_free, lean.families, lean.pins, lean.fingerprint) == (
        *(whole.num_free, whole.families, whole.pins, whole.fingerprint),
    )
    for one, other in zip(whole.scalings, lean.scalings, strict=True):
        assert (one.names, one.depth, len(one.factors)) == (other.names, other.depth, len(other.factors))
        assert all(a == b and torch.equal(i, j) for (a, i), (b, j) in zip(one.factors, other.factors, strict=True))
