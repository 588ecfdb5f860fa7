"""Norms that do not depend on how a batch is split over ranks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugrl.distributed import all_reduce_sum_grad, world_size
from ugrl.errors import ConfigError
from ugrl.precision import full_precision


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, on any device and backend (torch's refuses CPU tensors).

    Parameters, buffers and evaluation are those of :class:`torch.nn.BatchNorm2d`, and so is training with one process.
    Ranks may hold different numbers of images. One all-reduce forward, one backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, D, h, w) → the same shape and dtype."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        with full_precision(input):
            return self._synchronised(input)

    def _synchronised(self, x_BDhw: Tensor) -> Tensor:
        mean_D, var_D = self.running_mean, self.running_var
        if mean_D is None or var_D is None or self.num_batches_tracked is None or self.momentum is None:
            raise ConfigError("SyncBatchNorm2d: needs running statistics and a momentum")
        # E[x²] − E[x]² cancels where the mean is large, so the sums are those of x minus the running mean, which is
        # the same on every rank and costs no second round of messages.
        shift_D = mean_D.clone()
        x = x_BDhw if x_BDhw.dtype == torch.float64 else x_BDhw.float()
        x = x - _channels(shift_D.to(x.dtype))
        dim = x.shape[1]
        count = x.new_full((1,), x.numel() // dim)
        sums = all_reduce_sum_grad(torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count]))
        n = sums[2 * dim].detach()
        offset_D = sums[:dim] / n
        variance_D = (sums[dim : 2 * dim] / n - offset_D.square()).clamp_min(0)
        with torch.no_grad():
            mean_D.lerp_((offset_D + shift_D).to(mean_D.dtype), self.momentum)
            var_D.lerp_((variance_D * (n / (n - 1).clamp_min(1))).to(var_D.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        scale_D = self.weight.to(x.dtype) * torch.rsqrt(variance_D + self.eps)
        y = x * _channels(scale_D) + _channels(self.bias.to(x.dtype) - offset_D * scale_D)
        return y.to(x_BDhw.dtype)


def _channels(x_D: Tensor) -> Tensor:
    return x_D[None, :, None, None]


class GroupNorm2d(nn.GroupNorm):
    """Group norm with 32 groups, or fewer where the width is no multiple of 32."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(32, channels), channels)

    def forward(self, input: Tensor) -> Tensor:
        """(B, D, h, w) → the same shape and dtype."""
        with full_precision(input):
            x = input if input.dtype == torch.float64 else input.float()
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps).to(input.dtype)


def make_norm(kind: str, channels: int) -> nn.Module:
    """The norm named ``kind``.

    Args:
        kind: ``sync_batch`` or ``group``.
        channels: Number of channels D.

    Raises:
        ConfigError: The kind is unknown.
    """
    if kind == "sync_batch":
        return SyncBatchNorm2d(channels)
    if kind == "group":
        return GroupNorm2d(channels)
    raise ConfigError(f"model.norm: got '{kind}', expected sync_batch or group")
