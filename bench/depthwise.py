"""Gradients of depthwise convolutions on a CPU: written as convolutions, against PyTorch's own backward pass.

The cases are layers of EfficientNet-Lite0 at a crop of 256 px (``dilated`` is its last stage at an output stride of 16)
and of ConvNeXt. A call is a forward and a backward pass of eight images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.measure import Context, Entry, Skipped, compare, same
from ugrl.model.depthwise import DepthwiseConv2d

IMAGES = 8
#: Channels, side of the map, kernel and dilation.
CASES = {
    "depthwise/dilated": (1152, 16, 5, 2),
    "depthwise/wide": (672, 16, 5, 1),
    "depthwise/convnext": (384, 16, 7, 1),
}


def sides(channels: int, side: int, kernel: int, dilation: int) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Ours and PyTorch's: a call gives the output and both gradients."""
    g = torch.Generator().manual_seed(0)
    padding = dilation * (kernel // 2)
    plain = nn.Conv2d(channels, channels, kernel, 1, padding, dilation, channels, bias=False)
    with torch.no_grad():
        plain.weight.normal_(generator=g)
    x, grad = (torch.randn(IMAGES, channels, side, side, generator=g) for _ in range(2))
    x.requires_grad_()

    def both(conv: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            y = conv(x)
            return (y.detach(), *torch.autograd.grad(y, [x, *conv.parameters()], grad))

        return call

    return [both(DepthwiseConv2d.of(plain)), both(plain)]


def entries(ctx: Context) -> Iterator[Entry | Skipped]:
    """One comparison for each layer."""
    for name in filter(ctx.wants, CASES):
        yield Skipped(name, "a comparison on the CPU") if ctx.device.type == "cuda" else _entry(name, ctx)


def _entry(name: str, ctx: Context) -> Entry:
    channels, side, kernel, dilation = CASES[name]
    note = f"{IMAGES} maps of {channels} × {side} × {side}, kernel {kernel}, dilation {dilation}, float32"
    ours, plain = sides(channels, side, kernel, dilation)
    return compare(name, ours, plain, ctx=ctx, check=lambda a, b: same(name, a, b, 1e-4), note=note)
