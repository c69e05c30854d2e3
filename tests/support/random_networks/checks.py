"""What is asked of a random network: nothing that discovery finds may change its outputs."""

import copy
import math

import torch

import equinorm
from random_networks.networks import Network, arguments

CONDITION = 1e3
"""Networks that amplify relative changes of their weights more than this say nothing at 1e-12, and are left out."""

LIMIT = 1e-12


class UnsoundError(AssertionError):
    """A rescaling that was found changes what the network computes."""


def condition(network: Network, args: tuple) -> float:
    """How much the network amplifies a relative change of 1e-9 in its weights."""
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-9 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return equinorm.deviation(other, network, args) / 1e-9


def rescaled(network: Network, symmetries: equinorm.Symmetries, log_scales: torch.Tensor) -> Network:
    """The network moved by one member of the group, and the original left as it was."""
    original = copy.deepcopy(network)
    symmetries.rescale_(log_scales)
    moved = copy.deepcopy(network)
    network.load_state_dict(original.state_dict())
    return moved


def check(network: Network) -> set[str]:
    """Rescale by random members, real ones and powers of two; say what could be looked at.

    Returns:
        "free" if there were symmetries, "exact" if powers of two were held to bitwise equality, "cast" if real scales were
        refused because of a cast; "ill-conditioned" alone if nothing could be said.

    Raises:
        UnsoundError: with the deviation and the symmetries.
    """
    args, others = arguments(network, seed=1), arguments(network, seed=3)  # others: of other sizes, where data decide them
    is_tame = all(condition(network, given) < CONDITION for given in (args, others))
    if not is_tame and not network.casts:
        return {"ill-conditioned"}
    symmetries = equinorm.symmetries(network, args)
    if not symmetries.num_free:
        return set()
    seen = {"free"}
    generator = torch.Generator().manual_seed(2)
    log_scales = torch.randn(symmetries.num_free, generator=generator, dtype=torch.float64)
    powers = torch.randint(-3, 4, (symmetries.num_free,), generator=generator).double() * math.log(2)
    if symmetries.casts:
        seen.add("cast")
        _refuses(network, symmetries, log_scales)
    elif is_tame:
        for given in (args, others):
            _holds(network, symmetries, given, log_scales, LIMIT)
    entries = [*symmetries.scalings, *symmetries.casts]
    whole = all(exponent == round(exponent) for entry in entries for exponent, _ in entry.factors)
    rounded = any(scaling.offset and scaling.factors for scaling in symmetries.scalings)  # s·(1 + w) − 1 is stored
    if network.is_exact and whole and not rounded:
        seen.add("exact")
        for given in (args, others):
            _holds(network, symmetries, given, powers, 0.0)
    return seen


def _holds(network: Network, symmetries: equinorm.Symmetries, args: tuple, log_scales: torch.Tensor, limit: float) -> None:
    found = equinorm.deviation(rescaled(network, symmetries, log_scales), network, args)
    if not found <= limit:
        raise UnsoundError(f"deviation {found:.1e}, limit {limit:g}\n{symmetries}")


def _refuses(network: Network, symmetries: equinorm.Symmetries, log_scales: torch.Tensor) -> None:
    try:
        rescaled(network, symmetries, log_scales)
    except equinorm.RescaleError:
        return
    raise UnsoundError(f"real scales were taken although a cast rounds them\n{symmetries}")
