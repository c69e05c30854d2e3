"""What classes and globals around a model hold: followed where a forward may leave tensors, and no further."""

from torch import nn

from equinorm.discovery.graph.snapshot import Snapshot


class Here(nn.Linear):
    """Its class belongs to this module, whose globals are therefore looked into."""


def test_what_runs_the_tests_is_not_looked_into(request, monkeypatch):
    monkeypatch.setitem(globals(), "running", [request])
    snapshot = Snapshot(Here(2, 2), shared=True)
    assert any(holder is globals() for holder, *_ in snapshot._shared)
    assert id(request.session.items) not in snapshot._seen
