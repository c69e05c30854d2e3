"""Properties of discovery on random networks: what is found never changes the outputs, however the network is written."""

import contextlib
import os
from collections import Counter

from hypothesis import HealthCheck, Phase, given, note, settings
from random_networks.checks import CONDITION, check, condition
from random_networks.networks import Network, arguments, networks

import equinorm
from equinorm.discovery.resolve import UNUSED

EXAMPLES = int(os.environ.get("EQUINORM_EXAMPLES", "50"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES <= 200,
    phases=[Phase.explicit, Phase.generate] if EXAMPLES <= 200 else list(Phase),
)
"""Up to 200 networks are the same each time, and one that fails is shown as it is; looking for a smaller one takes minutes, and
EQUINORM_EXAMPLES=201 does so."""


def test_random_members_leave_outputs_unchanged() -> None:
    seen: Counter[str] = Counter()

    @SETTINGS
    @given(networks())
    def holds(network: Network) -> None:
        seen["networks"] += 1
        with contextlib.suppress(equinorm.ExportError):  # numbers of an alias, on which the exporter would branch
            seen.update(check(network))

    holds()
    print(dict(seen))  # noqa: T201  # shown by pytest -s
    assert seen["free"] >= 0.3 * seen["networks"], f"too few networks with symmetries to say anything: {seen}"
    assert seen["exact"] >= 0.2 * seen["networks"], f"too few exact networks: {seen}"


def classes(found: equinorm.Symmetries, idle: set[str]) -> set[int]:
    """Free classes but of some tensors: of values that reach no output, a graph has more or fewer as it is written."""
    return {id for scaling in found.scalings if scaling.name not in idle for id in scaling.free().tolist()}


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
        try:
            left, right = equinorm.symmetries(network, args), equinorm.symmetries(other, args)
        except equinorm.ExportError:
            return
        note(f"{left}\n---\n{right}")
        seen["free"] += left.num_free > 0
        idle = {pin.tensor for found in (left, right) for pin in found.pins if pin.reason == UNUSED}
        assert len(classes(left, idle)) == len(classes(right, idle))

    holds()
    assert seen["free"] > 0
