"""Collectives that are the identity with one process.

Every mean of the method is a sum over the global batch divided by an all-reduced count; the
functions here are all it takes. Values go through the default process group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, without gradient. The argument is left alone."""
    y = x.detach()
    if world_size() > 1:
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y)
    return y


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose backward is the sum of the incoming gradients over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        g = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g)
        return g


def all_reduce_sum_grad(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, differentiable: every rank's loss may depend on every rank's x."""
    return _AllReduceSum.apply(x) if world_size() > 1 else x


def all_gather_rows(x: Tensor) -> Tensor:
    """Concatenate equally-shaped ``x`` (n, …) of all ranks to (G·n, …), in rank order, without gradient."""
    x = x.detach().contiguous()
    g = world_size()
    if g == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(g)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class _AllGatherRows(torch.autograd.Function):
    """Gather whose backward sums every rank's gradient for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return all_gather_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        g = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g)
        start = rank() * ctx.rows
        return g[start : start + ctx.rows]


def all_gather_rows_grad(x: Tensor) -> Tensor:
    """Like :func:`all_gather_rows`, and differentiable."""
    return _AllGatherRows.apply(x) if world_size() > 1 else x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Average over ranks, without gradient."""
    return all_reduce_sum(x) / world_size()


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def is_main() -> bool:
    """Whether this process writes files and progress."""
    return rank() == 0
