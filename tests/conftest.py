"""Shared by all tests: threads, operators that torchvision may lack, and Ctrl-C where the system ignores it."""

import signal

import pytest
import torch

from zoo import from_torchvision

torch.set_num_threads(1)  # several workers share the cores
from_torchvision.declare_operators()  # before anything imports torchvision: transformers, timm and lightning do


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where whoever started the tests has it ignored, as shells do in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
