"""Classification, segmentation and affinity losses, each a mean over the batch of *all* ranks.

Every loss here returns ``local sum · ranks / all-reduced count``: the mean of the returned values
over ranks is the loss of the global batch, and averaging gradients over ranks (what
``DistributedDataParallel`` does) gives its gradient. Where nothing counts, the result is a zero
that is still connected to the graph. Arithmetic is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ugrl.bilinear import resize, resize_gradient
from ugrl.distributed import all_reduce_sum, world_size
from ugrl.errors import ConfigError
from ugrl.grid import near, near_tokens
from ugrl.precision import full_precision
from ugrl.types import IGNORE


def unit_shares(counts: Tensor, dtype: torch.dtype, more: int = 0) -> Tensor:
    """What one entry contributes to a global mean: ranks / all-reduced count.

    Args:
        counts: int64, any shape: entries on this rank. Every rank calls with the same shape.
        dtype: Type of the result.
        more: Added to each all-reduced count.

    Returns:
        Same shape; ``ranks`` where no rank has an entry (nothing will be multiplied by it).
    """
    return world_size() / (all_reduce_sum(counts) + more).clamp(min=1).to(dtype)


def classification_loss(logits_BF: Tensor, tags_BF: Tensor, w_BF: Tensor) -> Tensor:
    """Multi-label soft-margin loss (binary cross-entropy on logits), the y=1 entries weighted.

    Eq. 6 with the sign of its log terms restored. Mean over the images of all ranks and F classes.

    Args:
        logits_BF: Class scores.
        tags_BF: 0 or 1.
        w_BF: Weights ŵ of the entries with y=1, foreground columns only; y=0 weighs 1 whatever w says.

    Returns:
        Scalar.
    """
    with full_precision(logits_BF):
        x_BF = logits_BF if logits_BF.dtype == torch.float64 else logits_BF.float()
        y_BF = tags_BF.to(x_BF.dtype)
        w_BF = torch.where(y_BF > 0.5, w_BF.detach().to(x_BF.dtype), 1.0)
        bce_BF = F.binary_cross_entropy_with_logits(x_BF, y_BF, weight=w_BF, reduction="none")
        count = torch.full((), x_BF.numel(), device=x_BF.device, dtype=torch.int64)
        return bce_BF.sum() * unit_shares(count, x_BF.dtype)


class _WeightedCrossEntropy(torch.autograd.Function):
    """Σ_p weight_p · CE(upsampled logits_p, label_p), one image at a time.

    Softmax minus one-hot is at hand when the loss is, so the gradient is taken at once and brought
    down to the logits' grid: no (B, C, H, W) tensor ever exists, only two of a single image.
    """

    @staticmethod
    def forward(ctx: Any, seg_BChw: Tensor, labels_BHW: Tensor, weight_BHW: Tensor, with_grad: bool) -> Tensor:
        size = (labels_BHW.shape[-2], labels_BHW.shape[-1])
        total = seg_BChw.new_zeros(())
        grad_BChw = torch.empty_like(seg_BChw) if with_grad else None
        for b in range(seg_BChw.shape[0]):
            index_1HW, weight_HW = labels_BHW[b : b + 1], weight_BHW[b]
            seg_1Chw = seg_BChw[b : b + 1]
            logp_CHW = resize(seg_1Chw, size)[0].log_softmax(0)
            total -= (logp_CHW.gather(0, index_1HW)[0] * weight_HW).sum()
            if grad_BChw is not None:
                g_CHW = logp_CHW.exp_().mul_(weight_HW)
                g_CHW.scatter_add_(0, index_1HW, -weight_HW[None])
                grad_BChw[b] = resize_gradient(g_CHW[None], (seg_1Chw.shape[-2], seg_1Chw.shape[-1]))[0]
        if grad_BChw is not None:
            ctx.save_for_backward(grad_BChw)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_BChw,) = ctx.saved_tensors
        return grad_BChw * grad, None, None, None


def segmentation_loss(
    seg_BChw: Tensor, labels_BHW: Tensor, w: Tensor, *, balance: Literal["none", "fg_bg"] = "none"
) -> Tensor:
    """Cross-entropy at the label resolution, weighted by image and class or by pixel (Eq. 8, repaired).

    Logits are upsampled bilinearly (align_corners=False). The weighted sum over valid pixels is
    divided by their number, not by the sum of weights, over all ranks.

    Args:
        seg_BChw: Decoder logits.
        labels_BHW: int64, 255 is ignored.
        w: Weights ŵ by image and class (B, C): pixel p of image b weighs w[b, Y_p]; or by pixel (B, H, W). No gradient
            goes there.
        balance: ``fg_bg``: the mean of a background and a foreground term, each over its own global
            count; a kind that no rank has is 0 and the other keeps its ½.

    Returns:
        Scalar.

    Raises:
        ConfigError: Unknown ``balance``.
    """
    if balance not in ("none", "fg_bg"):
        raise ConfigError(f"balance: {balance!r}, expected 'none' or 'fg_bg'")
    with full_precision(seg_BChw):
        x_BChw = seg_BChw if seg_BChw.dtype == torch.float64 else seg_BChw.float()
        valid_BHW = labels_BHW != IGNORE
        safe_BHW = labels_BHW.where(valid_BHW, 0).long()  # 255 would gather out of range
        weight_BHW = w.detach().to(x_BChw.dtype)
        if w.dim() == 2:
            weight_BHW = weight_BHW.gather(1, safe_BHW.flatten(1)).view_as(safe_BHW)
        if balance == "none":
            share_BHW = valid_BHW * unit_shares(valid_BHW.sum(), x_BChw.dtype)
        else:
            fg_BHW = valid_BHW & (labels_BHW != 0)
            n_fg = fg_BHW.sum()
            shares_2 = 0.5 * unit_shares(torch.stack([valid_BHW.sum() - n_fg, n_fg]), x_BChw.dtype)
            share_BHW = valid_BHW * torch.where(fg_BHW, shares_2[1], shares_2[0])
        with_grad = x_BChw.requires_grad and torch.is_grad_enabled()
        loss: Tensor = _WeightedCrossEntropy.apply(x_BChw, safe_BHW, weight_BHW * share_BHW, with_grad)
        return loss


def affinity_loss(
    affinity_BNN: Tensor,
    labels_Bhw: Tensor,
    eligible_Bhw: Tensor,
    *,
    radius: int = 8,
    tokens_Bn: Tensor | None = None,
    as_afa: bool = False,
) -> Tensor:
    """½·mean(1 − σ(A) | same label) + ½·mean(σ(A) | different label) (Eq. 12 with AFA's sign).

    The means go over ordered pairs i ≠ j of one image, at most ``radius`` apart in rows and in
    columns, both eligible and neither ignored; each over the pairs of all ranks. A kind of pair that
    no rank has is 0 and the other keeps its ½.

    Args:
        affinity_BNN: Logits, N = h·w in row-major order, or of ``tokens_Bn``.
        labels_Bhw: Labels on the same grid, 255 is ignored.
        eligible_Bhw: bool, which positions may form pairs.
        radius: Chebyshev distance in grid cells.
        tokens_Bn: :func:`eligible_tokens`: the positions that the logits belong to; pairs with another position are
            not counted, so that all eligible ones must be among them. ``None``: all positions.
        as_afa: Whether the pairs i = i count too, and each mean is divided by one pair more.

    Returns:
        Scalar. Minimising it raises the affinity of equal labels and lowers that of different ones.

    Raises:
        ConfigError: The affinity's N is neither h·w nor the number of tokens.
    """
    B, h, w = labels_Bhw.shape
    n = h * w if tokens_Bn is None else tokens_Bn.shape[1]
    if affinity_BNN.shape != (B, n, n):
        raise ConfigError(f"affinity: shape {tuple(affinity_BNN.shape)}, expected {(B, n, n)}")
    with full_precision(affinity_BNN):
        A_BNN = affinity_BNN if affinity_BNN.dtype == torch.float64 else affinity_BNN.float()
        usable_BN = (eligible_Bhw & (labels_Bhw != IGNORE)).flatten(1)
        labels_BN = labels_Bhw.flatten(1)
        if tokens_Bn is None:
            near_BNN = near((h, w), radius, labels_Bhw.device)[None]
        else:
            # Padding repeats a token that the row has already (or one that is not usable): count each once.
            first_Bn = torch.ones_like(tokens_Bn, dtype=torch.bool)
            first_Bn[:, 1:] = tokens_Bn[:, 1:] > tokens_Bn[:, :-1]
            usable_BN = usable_BN.gather(1, tokens_Bn) & first_Bn
            labels_BN = labels_BN.gather(1, tokens_Bn)
            near_BNN = near_tokens(tokens_Bn, w, radius)
        if not as_afa:
            near_BNN.diagonal(dim1=1, dim2=2).fill_(False)
        pair_BNN = usable_BN[:, :, None] & usable_BN[:, None, :] & near_BNN
        same_BNN = labels_BN[:, :, None] == labels_BN[:, None, :]
        n_same = (pair_BNN & same_BNN).sum()
        shares_2 = 0.5 * unit_shares(torch.stack([n_same, pair_BNN.sum() - n_same]), A_BNN.dtype, more=int(as_afa))
        # 1 − σ(A) is σ(−A): one sigmoid serves both kinds and nothing cancels near 1.
        wrong_BNN = torch.where(same_BNN, -A_BNN, A_BNN).sigmoid()
        return (wrong_BNN * (torch.where(same_BNN, shares_2[0], shares_2[1]) * pair_BNN)).sum()


def eligible_tokens(labels_Bhw: Tensor, eligible_Bhw: Tensor) -> Tensor:
    """The positions that :func:`affinity_loss` will read, so that no other logit has to be computed.

    The host waits for their number: cheap on a CPU, and the reason why the step does it there only.

    Args:
        labels_Bhw: Labels, 255 is ignored.
        eligible_Bhw: bool, which positions may form pairs.

    Returns:
        int64 (B, n): ascending positions of each image; n is the largest number of an image (at least 1), and the
        last position of a shorter one is repeated.
    """
    usable_BN = (eligible_Bhw & (labels_Bhw != IGNORE)).flatten(1)
    count_B = usable_BN.sum(1)
    n = max(1, int(count_B.max()))
    # A stable sort of "not usable" keeps the usable positions in front, in order.
    order_Bn = (~usable_BN).to(torch.uint8).argsort(dim=1, stable=True)[:, :n]
    last_B1 = order_Bn.gather(1, (count_B - 1).clamp(min=0)[:, None])
    return order_Bn.where(torch.arange(n, device=order_Bn.device) < count_B[:, None], last_B1)
