"""Discovery against the oracle on blocks of every family of timm and torchvision: every rescaling that derivatives find.

EQUINORM_ZOO=1 tests every block (fifteen minutes); the default is a few.
"""

import importlib.util
import os

import pytest

if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
    pytest.skip("timm and torchvision are not installed", allow_module_level=True)

from vision_blocks.from_timm import TIMM
from vision_blocks.from_torchvision import TORCHVISION

from zoo import from_timm as zoo_timm

BLOCKS = {f"timm {name}": block for name, block in TIMM.items()}
BLOCKS |= {f"torchvision {name}": block for name, block in TORCHVISION.items()}

QUICK = ["timm vision_transformer", "timm cait", "timm efficientnet, inverted residual", "timm focalnet", "timm shvit"]
QUICK += ["torchvision resnet", "torchvision fcn"]


@pytest.mark.parametrize("name", BLOCKS if os.environ.get("EQUINORM_ZOO") else QUICK)
def test_every_symmetry_is_found_or_known_to_be_missed(name):
    block = BLOCKS[name]
    judged = block.judged()
    assert judged.residual < 1e-9
    assert judged.found == block.found
    assert judged.dimension == block.found + block.missed


def test_every_family_has_a_block():
    assert {zoo_timm.family(name) for name in zoo_timm.names()} == TIMM.families
    assert not [name for name, block in BLOCKS.items() if bool(block.missed) != bool(block.why)]
