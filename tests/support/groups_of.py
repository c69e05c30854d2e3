"""Scale groups against the scalings that they are made from."""

import torch

import equinorm


def check_groups(symmetries: equinorm.Symmetries) -> None:
    """Each class is in one group, and what all groups say of a tensor is what its scaling says."""
    groups = symmetries.groups()
    ids = torch.cat([group.ids for group in groups]).sort().values
    assert ids.tolist() == list(range(1, symmetries.num_free + 1)), "classes in no group, or in several"
    z = torch.randn(symmetries.num_free, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scaling in symmetries.scalings:
        parts = [axis.log_scales(z) for group in groups for axis in group.axes if axis.tensor == scaling.name]
        said = sum(parts, start=torch.zeros((), dtype=torch.float64))
        assert torch.allclose(said.expand(scaling.shape), scaling.log_scales(z).expand(scaling.shape), rtol=0, atol=1e-14)
    assert all(group.up or group.along or group.down for group in groups), "a group that moves nothing"
    assert str(groups)
