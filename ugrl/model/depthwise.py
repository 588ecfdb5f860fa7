"""Depthwise convolutions whose gradients are depthwise convolutions too, for training on a CPU.

PyTorch's backward pass of wide or dilated ones falls back to slow kernels on a CPU, while its forward pass is fast.
Both gradients can be written as forward passes: that of the input is a convolution with the mirrored kernel, that of
the weights one of the input with the output's gradient as kernel, where stride and dilation change places. The numbers
are the same but for rounding; ``python -m bench --only depthwise`` times it. On other devices nothing changes.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _DepthwiseConv(torch.autograd.Function):
    """A depthwise convolution of stride 1."""

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C1KK: Tensor, bias_C: Tensor | None, padding: tuple[int, int], dilation: int
    ) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight_C1KK)
        ctx.padding, ctx.dilation = padding, dilation
        return F.conv2d(x_BCHW, weight_C1KK, bias_C, 1, padding, dilation, len(weight_C1KK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BChw: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C1KK = ctx.saved_tensors
        (batch, channels), size = x_BCHW.shape[:2], weight_C1KK.shape[-2:]
        padding, dilation = ctx.padding, ctx.dilation
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            mirrored = weight_C1KK.flip(2, 3)
            rest = [dilation * (k - 1) - p for k, p in zip(size, padding, strict=True)]
            grad_x = F.conv2d(grad_BChw, mirrored, None, 1, rest, dilation, channels)
        if ctx.needs_input_grad[1]:
            # Every channel of every image is a channel here.
            every = x_BCHW.reshape(1, batch * channels, *x_BCHW.shape[2:])
            kernel = grad_BChw.reshape(batch * channels, 1, *grad_BChw.shape[2:])
            found = F.conv2d(every, kernel, None, dilation, padding, 1, batch * channels)
            grad_weight = found.view(batch, channels, 1, *size).sum(0)
        grad_bias = grad_BChw.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose backward pass is fast on a CPU; see the module.

    Compiled, exported, under autocast and on other devices it is its base class.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> DepthwiseConv2d:
        """One that shares the parameters of a convolution for which :func:`gains` is true."""
        made = cls.__new__(cls)
        made.__dict__.update(conv.__dict__)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, h, w)."""
        weight = self.weight
        plain = (
            input.device.type != "cpu"
            or input.dtype != weight.dtype
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
        )
        if plain:
            return super().forward(input)
        out: Tensor = _DepthwiseConv.apply(input, weight, self.bias, self.padding, self.dilation[0])
        return out


def gains(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution whose backward pass gains: depthwise, stride 1, and wide or dilated.

    The 3×3 ones that are not dilated have fast kernels.
    """
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    depthwise = module.groups == module.in_channels == module.out_channels > 1
    height, width = module.dilation
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    inside = all(p <= r for p, r in zip(module.padding, reach, strict=True))
    slow = max(module.kernel_size) > 3 or height > 1
    return depthwise and module.stride == (1, 1) and height == width and inside and slow


def quicken(body: nn.Module) -> int:
    """Exchange the convolutions below a module for which :func:`gains` is true; returns their number.

    Names and parameters stay.
    """
    found = 0
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            if gains(child):
                setattr(parent, name, DepthwiseConv2d.of(child))
                found += 1
    return found
