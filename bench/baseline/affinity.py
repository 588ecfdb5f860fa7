"""Eq. 1 the public way: every block's maps side by side, symmetrised, a 1×1 convolution to one map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pairs = tuple[tuple[Tensor, Tensor], ...]


def maps(pairs: Pairs, heads: int) -> Tensor:
    """Attention logits (B, heads·blocks, N, N) of queries and keys (B, N, D)."""

    def split(x_BND: Tensor) -> Tensor:
        b, n, d = x_BND.shape
        return x_BND.reshape(b, n, heads, d // heads).permute(0, 2, 1, 3)

    return torch.cat([split(q) @ split(k).transpose(-2, -1) for q, k in pairs], dim=1)


def public_affinity(pairs: Pairs, heads: int, weight_M: Tensor, bias_1: Tensor) -> Tensor:
    """Affinity logits (B, N, N)."""
    s_BMNN = maps(pairs, heads)
    s_BMNN = s_BMNN + s_BMNN.permute(0, 1, 3, 2)
    return F.conv2d(s_BMNN, weight_M.reshape(1, -1, 1, 1), bias_1)[:, 0]


def public_hidden(
    pairs: Pairs, heads: int, weight_KM: Tensor, bias_K: Tensor, weight_K: Tensor, bias_1: Tensor
) -> Tensor:
    """The same with a hidden layer over the maps."""
    s_BMNN = maps(pairs, heads)
    s_BMNN = s_BMNN + s_BMNN.permute(0, 1, 3, 2)
    h_BKNN = F.relu(F.conv2d(s_BMNN, weight_KM[:, :, None, None], bias_K))
    return F.conv2d(h_BKNN, weight_K.reshape(1, -1, 1, 1), bias_1)[:, 0]
