"""The same tests on another device: EQUINORM_DEVICE=cuda makes all tensors there."""

import contextlib
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def by_default():
    device = os.environ.get("EQUINORM_DEVICE")
    with contextlib.nullcontext() if device is None else torch.device(device):
        yield
