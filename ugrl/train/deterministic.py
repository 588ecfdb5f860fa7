"""Runs that repeat to the last bit on the same hardware, at the cost of slower kernels."""

from __future__ import annotations

import os

import torch


def make_deterministic(device: torch.device) -> None:
    """Have every operator choose a kernel that repeats; one that has none raises.

    Args:
        device: Where the training runs. cuBLAS reads its setting when it is first used: call this before.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
