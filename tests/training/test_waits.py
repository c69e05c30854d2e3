"""On an accelerator a step queues its work: the CPU looks at no number, and nothing goes back and forth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

SCRIPT = Path(__file__).parents[1] / "support" / "pretended_device.py"


@pytest.fixture(scope="module")
def report():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch knows no devices written in Python")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_step_waits_and_all_tensors_are_on_the_device(report):
    cases = {name: found for name, found in report.items() if name != "control"}
    assert len(cases) > 20
    assert {name: found["waits"] for name, found in cases.items() if found["waits"]} == {}


def test_steps_on_it_are_those_on_the_cpu(report):
    assert [name for name, found in report.items() if not found["same"]] == []


def test_a_wait_would_be_seen(report):
    assert len(report["control"]["waits"]) == 4
    assert "expected all tensors on one device" in report["control"]["refused"]
