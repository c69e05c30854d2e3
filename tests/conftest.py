"""Shared by all tests: threads, operators that torchvision may lack, garbage, and Ctrl-C where the system ignores it."""

import gc
import signal

import pytest
import torch

from zoo import from_torchvision

torch.set_num_threads(1)  # several workers share the cores
from_torchvision.declare_operators()  # before anything imports torchvision: transformers, timm and lightning do


def pytest_collection_finish() -> None:
    """Thousands of tests and what they import stay to the end: nobody has to look through them for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where whoever started the tests has it ignored, as shells do in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
