"""Memory: tensors that lie in files are read piece by piece, and what was read is given back."""

import json
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from equinorm._memory import forget
from equinorm._scaling import Scaling
from equinorm.balancing.energy_reader import Reading
from equinorm.balancing.layout import lay_out
from equinorm.balancing.norm import Norm
from equinorm.checkpoints.folder import open_checkpoint
from equinorm.checkpoints.solving import ComponentWeights

STATUS = Path("/proc/self/status")
ROWS, COLUMNS = 3072, 8192

needs_linux = pytest.mark.skipif(not STATUS.exists(), reason="memory is measured by /proc, which Linux has")


def memory(name):
    """Bytes, from what the system says of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(16, COLUMNS).repeat(ROWS // 16, 1).bfloat16()
    save_file({"w": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    return open_checkpoint(tmp_path)


@needs_linux
@pytest.mark.parametrize("sides", [1, 2])
def test_reading_a_weight_takes_the_memory_of_a_part_of_it(checkpoint, sides):
    columns, rows = torch.arange(1, COLUMNS + 1), torch.arange(COLUMNS + 1, COLUMNS + ROWS + 1)
    factors = ((-1.0, columns[None, :]), (1.0, rows[:, None]))[:sides]
    count = COLUMNS + ROWS * (sides - 1)
    families = [(1, COLUMNS + 1), (COLUMNS + 1, COLUMNS + ROWS + 1)][:sides]
    scaling = Scaling(("w",), (ROWS, COLUMNS), torch.bfloat16, "parameter", "weight", 1, factors)
    (layout,) = lay_out([scaling], families, count, torch.zeros(count + 1, dtype=torch.bool)).layouts
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = memory("VmHWM")
    weights = ComponentWeights(checkpoint, [scaling])
    weight = weights["w"]
    reading = Reading(layout, weight, Norm(2.0), torch.float32)
    energies = reading.read_energies() if sides == 1 else sum(strip.sum(0) for _, _, strip in reading.strips())
    assert memory("VmHWM") - before < weight.nbytes / 2
    torch.testing.assert_close(energies.flatten(), weight.float().square().sum(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(weights.bounds("w").flatten(), weight.double().norm(dim=1), rtol=1e-4, atol=0)


@needs_linux
def test_only_the_part_that_was_read_is_given_back_and_it_is_read_again(checkpoint):
    before = memory("RssFile")
    whole = checkpoint.files[0].mapped("w").view(torch.int16)
    first, second = whole.chunk(2)
    total = int(whole.sum())
    held = memory("RssFile") - before
    forget(first)
    assert held - 0.6 * whole.nbytes < memory("RssFile") - before < held - 0.4 * whole.nbytes
    forget(second)
    forget(torch.zeros(1 << 20))  # lies in no file
    assert int(whole.sum()) == total


def test_tensors_in_ordinary_memory_are_never_forgotten(checkpoint):
    lies, own = checkpoint.files[0].mapped("w"), torch.ones(1 << 22)
    forget(own)
    assert bool((own == 1).all())
    assert lies.shape == (ROWS, COLUMNS)


def test_what_users_wrote_into_mappings_of_their_own_stays(checkpoint):
    lies = checkpoint.files[0].mapped("w")
    with open(checkpoint.files[0].path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    own = torch.frombuffer(pages, dtype=torch.uint8)
    own.fill_(7)
    forget(own)
    assert bool((own == 7).all())
    assert lies.shape == (ROWS, COLUMNS)
