"""The same tests on another device: EQUINORM_DEVICE=cuda makes all tensors there."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def by_default():
    with torch.device(os.environ.get("EQUINORM_DEVICE", "cpu")):
        yield
