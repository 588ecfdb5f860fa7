"""Hiera on images of any size: timm builds it for one.

Its weights know no size but that of the position embedding, which is resampled as timm resamples a ViT's. What else
holds a size are numbers of modules without weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models.hiera import Reroll
from torch import Tensor


def prepare_hiera(body: Any) -> None:
    """Let positions follow the size; call it once."""
    if body.pos_embed is not None and body.pos_embed_win is None:
        body._pos_embed = partial(_add_positions, body, tuple(body.tokens_spatial_shape))


def fit_hiera(body: Any, height: int, width: int) -> None:
    """Make the model ready for images of a size, whose sides are multiples of 32."""
    size, stride = (height, width), body.patch_stride
    tokens = [side // s for side, s in zip(size, stride, strict=True)]
    if tokens == list(body.tokens_spatial_shape):
        return
    body.tokens_spatial_shape = tokens
    body.mask_spatial_shape = [t // m for t, m in zip(tokens, body.mask_unit_size, strict=True)]
    body.unroll.size = tokens
    body.reroll = Reroll(size, stride, body.unroll.schedule, body.stage_ends, body.q_pool)


def _add_positions(body: Any, native: tuple[int, int], x_BND: Tensor) -> Tensor:
    """Tokens with the position embedding, resampled where the grid is not the one that it was trained on."""
    position: Tensor = body.pos_embed
    if tuple(body.tokens_spatial_shape) != native:
        grid = position.transpose(1, 2).unflatten(2, native)
        grid = F.interpolate(grid, size=body.tokens_spatial_shape, mode="bicubic", antialias=True)
        position = grid.flatten(2).transpose(1, 2)
    return x_BND + position
