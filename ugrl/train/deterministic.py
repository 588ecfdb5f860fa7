"""Runs that repeat to the last bit on the same hardware, at the cost of slower kernels."""

from __future__ import annotations

import os

import torch


def make_deterministic(device: torch.device) -> None:
    """Have every operator choose a kernel that repeats, for the rest of the process; one that has none raises.

    What it costs, on CUDA: attention's backward pass and reductions by index without atomics (torch sorts the indices),
    convolutions without cuDNN's search for the fastest algorithm, a fixed workspace of cuBLAS, no autotuning of what
    ``train.compile`` generates, and new tensors that are filled before use. On a CPU the kernels repeat anyway, with
    the same number of threads. The method's own gradients (:mod:`ugrl.bilinear`, the contrastive kernels) use no
    atomics in this mode.

    What repeats: the same configuration, data and software on the same kind and number of devices, across a resume too.
    Other devices, or another number of workers, add up in another order.

    Args:
        device: Where the training runs. cuBLAS reads its setting when it is first used: call this before.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
