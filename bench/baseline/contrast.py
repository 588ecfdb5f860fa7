"""The contrastive loss of one image as one would write it: the whole matrix and masks."""

from __future__ import annotations

import torch
from torch import Tensor


def naive(emb: Tensor, labels: Tensor, pool: Tensor, tau: float) -> Tensor:
    """Eqs. 10 and 11 of the first image.

    Args:
        emb: Unit-length embeddings (1, D, h, w).
        labels: (1, h, w).
        pool: bool (1, h, w).
        tau: Temperature.

    Returns:
        Mean over anchors, each of which needs a positive.
    """
    chosen = pool[0].flatten()
    x, c = emb[0].flatten(1).T[chosen], labels[0].flatten()[chosen]
    s = x @ x.T / tau
    other = ~torch.eye(len(c), dtype=torch.bool, device=c.device)
    pos = (c[:, None] == c[None]) & other
    everything = s.masked_fill(~other, float("-inf")).logsumexp(1)
    return (everything - s.masked_fill(~pos, float("-inf")).logsumexp(1)).mean()
