"""Discovery against the oracle: on small networks it must find exactly the rescalings that derivatives find."""

import pytest
from groups_of import check_groups
from oracle import verdict
from small_networks import constants as cases_constants, layers as cases_layers, products as cases_products
from small_networks.cases import CASES, INPUTS

import equinorm

assert cases_constants
assert cases_layers
assert cases_products  # imported for what they enter into CASES

KNOWN_MISSED: dict[str, tuple[int, str]] = {
    "chosen from tables of two sizes": (3, "a negative index means other rows in each"),
    "layers of one table, stacked": (2, "rows and columns of a table scale alike in all of its layers"),
    "chosen, narrowed and split": (3, "where chosen rows are cut apart, all rows scale alike"),
}
"""Networks with symmetries that discovery does not find: how many, and why."""


@pytest.mark.parametrize("name", CASES)
def test_finds_what_derivatives_find(name: str) -> None:
    result = verdict(CASES[name], INPUTS[name])
    missed, _ = KNOWN_MISSED.get(name, (0, ""))
    assert result.residual < 1e-10, f"unsound: a discovered rescaling changes the outputs: {result}"
    assert result.found <= result.dimension, f"unsound: {result}"
    assert result.found_all == result.num_free, f"two free log-scales move the weights alike: {result}"
    assert result.dimension - result.found == missed, f"missed: {result}"
    check_groups(result.symmetries)  # here, so that no network is exported twice for it


@pytest.mark.parametrize("way", cases_constants.PADDED)
def test_columns_that_read_padding_are_free_however_they_are_written(way: str) -> None:
    title = f"columns that read padding: {way}"  # nothing depends on these columns, so that derivatives cannot tell
    found = equinorm.symmetries(CASES[title], INPUTS[title])
    assert found.num_free == 3 + 2


@pytest.mark.parametrize("way", cases_constants.UNSCALED)
def test_columns_that_read_zeros_beside_what_does_not_scale_are_free(way: str) -> None:
    title = f"columns that read {way} of what does not scale"
    assert equinorm.symmetries(CASES[title], INPUTS[title]).num_free == 4 + 2


def test_weights_that_read_zeros_alone_are_free() -> None:
    title = "weights that read zeros alone"
    found = equinorm.symmetries(CASES[title], INPUTS[title])
    assert {scaling.name for scaling in found.scalings if scaling.factors} > {"c.weight", "e.weight"}
