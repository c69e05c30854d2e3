"""Shared fixtures: threads, and operators that torchvision lacks in its CPU-less build."""

import torch

torch.set_num_threads(1)  # several workers share the cores

collect_ignore_glob = ["blocks*.py"]  # need benchmarks/ on the path and timm, as tests/test_completeness_vision.py sees to
