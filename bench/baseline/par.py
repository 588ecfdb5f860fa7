"""PAR as AFA publishes it: neighbours by one-hot 3×3 convolutions, everything again for each threshold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ugrl.method.refine import AROUND, PAR


def neighbours(x_BCHW: Tensor, kernel: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """Every neighbour of every channel, (B, C, 8·dilations, H, W)."""
    b, c, h, w = x_BCHW.shape
    out = []
    for d in dilations:
        padded = F.pad(x_BCHW, [d] * 4, mode="replicate").view(b * c, 1, h + 2 * d, w + 2 * d)
        out.append(F.conv2d(padded, kernel, dilation=d).view(b, c, 8, h, w))
    return torch.cat(out, 2)


def naive_par(par: PAR, image: Tensor, masks: Tensor) -> Tensor:
    """Every neighbour of every channel and mask materialised, the affinity computed by every call."""
    kernel = image.new_zeros((8, 1, 3, 3))
    for n, (dy, dx) in enumerate(AROUND):
        kernel[n, 0, 1 + dy, 1 + dx] = 1
    near = neighbours(image, kernel, par.dilations)
    spread = near.std(2, keepdim=True)
    energy = -(((near - image[:, :, None]).abs() / (spread + 1e-8) / par.w1) ** 2)
    weight = energy.mean(1, keepdim=True).softmax(2) + image.new_tensor(par.position())[:, None, None]
    for _ in range(par.iterations):
        masks = (neighbours(masks, kernel, par.dilations) * weight).sum(2)
    return masks


@torch.no_grad()
def naive_labels(par: PAR, image: Tensor, cam_nHW: Tensor, classes: Tensor, high: float, low: float) -> Tensor:
    """Labels (H, W) of one image (3, H, W) from the CAMs of its classes, which count from 0."""
    size = image.shape[-2:]
    half = [n // 2 for n in size]
    small = F.interpolate(image[None], half, mode="bilinear")
    keys = torch.cat([classes.new_zeros(1), classes + 1])
    won = []
    for score in (high, low):
        logits = torch.cat([torch.full_like(cam_nHW[:1], score), cam_nHW])[None]
        masks = F.interpolate(logits, half, mode="bilinear").softmax(1)
        won.append(keys[F.interpolate(naive_par(par, small, masks), size, mode="bilinear").argmax(1)[0]])
    label = won[0].masked_fill(won[0] == 0, 255)
    return label.masked_fill(won[0] + won[1] == 0, 0)
