"""What both forms of the contrastive loss share: taking the anchors, counting them, and the loss from its sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ugrl.types import IGNORE

FIXED_SHIFT_TAU = 0.03  # e^(−2/0.03) = 1e-29, well inside of float32
BINS = IGNORE + 1  # one per label; the last one counts what is no anchor


class Take(torch.autograd.Function):
    """Rows of the embeddings for several groups of anchors; one gradient tensor serves all groups.

    No position is taken twice, so the backward pass writes instead of adding: no order of summation.
    Rows come as float32, or as float64 from float64.
    """

    @staticmethod
    def forward(ctx: Any, emb_BND: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        """One (G, n, D) for each (G, n) of indices into the B·N pixels."""
        ctx.save_for_backward(*indices)
        ctx.blank = emb_BND.new_zeros(()).expand(emb_BND.shape), emb_BND.stride()
        dtype = torch.float64 if emb_BND.dtype == torch.float64 else torch.float32
        N = emb_BND.shape[1]
        return tuple(emb_BND[i_GN // N, i_GN % N].to(dtype) for i_GN in indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Write each group's gradient to its pixels; the others get 0."""
        blank, stride = ctx.blank
        out_BND = torch.empty_strided(blank.shape, stride, dtype=blank.dtype, device=blank.device).zero_()
        N = out_BND.shape[1]
        for i_GN, grad_GND in zip(ctx.saved_tensors, grads, strict=True):
            out_BND[i_GN // N, i_GN % N] = grad_GND.to(out_BND.dtype)
        return out_BND, *(None for _ in grads)


def class_counts(key_BN: Tensor) -> Tensor:
    """int64 (B, 256): anchors by class; the last bin holds the rest."""
    zeros = torch.zeros(key_BN.shape[0], BINS, dtype=torch.int64, device=key_BN.device)
    return zeros.scatter_add_(1, key_BN, torch.ones_like(key_BN))


def loss_from_sums(logpos: Tensor, logneg: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The losses ℓ = log(1 + N/P), and what they make of a pair's e^{S/τ} in the gradient.

    Args:
        logpos: log P, −∞ where there is no positive: such an anchor's loss is 0 and so are its factors.
        logneg: log N, −∞ where there is no negative. Same shape.
        with_grad: Whether the factors are wanted.

    Returns:
        ℓ, and (2, …) or None: log of −∂ℓ/∂P and of ∂ℓ/∂N.
    """
    empty = logpos == float("-inf")
    ratio = (logneg - logpos).masked_fill_(empty, float("-inf"))  # −∞ − −∞ is NaN
    loss = torch.logaddexp(ratio, torch.zeros_like(ratio))
    if not with_grad:
        return loss, None
    return loss, torch.stack([ratio - loss - logpos, -loss - logpos]).masked_fill_(empty, float("-inf"))
