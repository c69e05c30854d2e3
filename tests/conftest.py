"""Shared fixtures: threads, and operators that torchvision lacks in its CPU-less build."""

import torch

torch.set_num_threads(1)  # several workers share the cores
