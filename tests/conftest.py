"""Shared by all tests: threads, operators that torchvision may lack, and Ctrl-C where the system ignores it."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from zoo import from_torchvision as zoo_torchvision

torch.set_num_threads(1)  # several workers share the cores
zoo_torchvision.declare_operators()  # before anything imports torchvision: transformers, timm and lightning do

collect_ignore_glob = ["blocks*.py"]  # need timm, as tests/discovery/test_completeness_vision.py sees to


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where whoever started the tests has it ignored, as shells do in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
