"""Properties of discovery on random networks: what is found never changes the outputs, however the network is written."""

import copy
import math
import os
from collections import Counter

import torch
from hypothesis import HealthCheck, given, note, settings

import equinorm
from networks import Network, arguments, networks

EXAMPLES = int(os.environ.get("EQUINORM_EXAMPLES", "200"))
CONDITION = 1e3
"""Networks that amplify relative changes of their weights more than this say nothing at 1e-12, and are left out."""

SETTINGS = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200)


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


def test_random_members_leave_outputs_unchanged() -> None:
    seen: Counter[str] = Counter()

    @SETTINGS
    @given(networks())
    def holds(network: Network) -> None:
        args = arguments(network, seed=1)
        seen["networks"] += 1
        amplification = condition(network, args)
        if not amplification < CONDITION:
            seen["ill-conditioned"] += 1
            return
        symmetries = equinorm.symmetries(network, args)
        note(str(symmetries))
        if not symmetries.num_free:
            return
        seen["free"] += 1
        generator = torch.Generator().manual_seed(2)
        log_scales = torch.randn(symmetries.num_free, generator=generator, dtype=torch.float64)
        assert equinorm.deviation(rescaled(network, symmetries, log_scales), network, args) <= 1e-12
        whole = all(exponent == round(exponent) for scaling in symmetries.scalings for exponent, _ in scaling.factors)
        if network.is_exact and whole:
            seen["exact"] += 1
            powers = torch.randint(-3, 4, (symmetries.num_free,), generator=generator).double() * math.log(2)
            assert equinorm.deviation(rescaled(network, symmetries, powers), network, args) == 0.0

    holds()
    print(dict(seen))  # noqa: T201  # shown by pytest -s
    assert seen["free"] >= 0.3 * seen["networks"], f"too few networks with symmetries to say anything: {seen}"
    assert seen["exact"] >= 0.2 * seen["networks"], f"too few exact networks: {seen}"


def test_the_same_network_written_in_another_way() -> None:
    seen: Counter[str] = Counter()

    @settings(SETTINGS, max_examples=max(EXAMPLES // 2, 1))  # the member test is the important one; this one traces twice
    @given(networks())
    def holds(network: Network) -> None:
        args = arguments(network, seed=1)
        other = network.rewrite()
        if not condition(network, args) < CONDITION:
            return
        assert equinorm.deviation(other, network, args) <= 1e-10  # the two ways compute the same
        left, right = equinorm.symmetries(network, args), equinorm.symmetries(other, args)
        note(f"{left}\n---\n{right}")
        seen["free"] += left.num_free > 0
        assert left.num_free == right.num_free

    holds()
    assert seen["free"] > 0
