"""Bilinear resizing whose gradient repeats to the last bit where a deterministic run asks for that.

torch's gradient kernel on CUDA adds with atomics, in whatever order threads arrive; with
``torch.use_deterministic_algorithms`` it refuses, and ``interpolate`` turns into gathers and sorted scatters of every
pixel. The resize is separable, so its gradient is two products with small matrices, which is what is done then. The
values themselves come from the same kernel in both modes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ugrl.precision import full_precision


def resize(x_BDhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize (``align_corners=False``, no antialiasing).

    Args:
        x_BDhw: Maps to resize, float (B, D, H, W).
        size: ``(H, W)``.

    Returns:
        (B, D, H, W).
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x_BDhw, size=size, mode="bilinear", align_corners=False)
    y_BDHW: Tensor = _Resize.apply(x_BDhw, size)
    return y_BDHW


def resize_gradient(grad_BDHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Gradient of :func:`resize` by its input.

    Args:
        grad_BDHW: Gradient of the loss by the output, of the output's shape.
        size: ``(h, w)`` of its input.

    Returns:
        (B, D, h, w).
    """
    if not torch.are_deterministic_algorithms_enabled():
        big, small = list(grad_BDHW.shape[-2:]), [*grad_BDHW.shape[:2], *size]
        return torch.ops.aten.upsample_bilinear2d_backward(grad_BDHW, big, small, False, None, None)
    with full_precision(grad_BDHW):
        g = grad_BDHW if grad_BDHW.dtype == torch.float64 else grad_BDHW.float()
        rows_Hh = _weights(size[0], g.shape[-2], g.dtype, g.device)
        cols_Ww = _weights(size[1], g.shape[-1], g.dtype, g.device)
        return (rows_Hh.T @ (g @ cols_Ww)).to(grad_BDHW.dtype)


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BDhw: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.size = (x_BDhw.shape[-2], x_BDhw.shape[-1])
        return torch.ops.aten.upsample_bilinear2d(x_BDhw, list(size), False, None, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDHW: Tensor) -> tuple[Tensor, None]:
        return resize_gradient(grad_BDHW, ctx.size), None


@lru_cache(maxsize=64)
def _weights(n: int, out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(out, n): what each pixel of an axis takes of its ``n`` input pixels, in the kernel's arithmetic."""
    ratio = torch.tensor(n, dtype=dtype) / out
    at = ((torch.arange(out, dtype=dtype) + 0.5) * ratio - 0.5).clamp(min=0)
    low = at.floor().long().clamp(max=n - 1)
    part = at - low
    matrix = torch.zeros(out, n, dtype=dtype)
    place = torch.arange(out)
    matrix[place, low] = 1 - part
    matrix[place, (low + 1).clamp(max=n - 1)] += part
    return matrix.to(device)
