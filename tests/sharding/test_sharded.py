"""Weights that torch.distributed has sharded, in two and four processes on CPUs; `sharded_checks` has what they check."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built")

if torch.distributed.is_available():
    import sharded_checks


@pytest.fixture(scope="module")
def failures_of_two() -> list[dict[str, str]]:
    return sharded_checks.failures(2, [*sharded_checks.CHECKS[2]])


@pytest.mark.parametrize("name", [*sharded_checks.CHECKS[2]])
def test_two_processes(failures_of_two, name):
    for failed in failures_of_two:
        assert name not in failed, failed[name]


def test_every_check_of_two_processes_ran(failures_of_two):
    assert failures_of_two == [{}, {}]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_more_networks_in_more_processes(count):
    for failed in sharded_checks.failures(count, [*sharded_checks.CHECKS[count]], thorough=True):
        assert not failed, "\n".join(failed.values())
