"""The losses the way the public recipe computes them: full-size tensors, boolean masks, questions to the host."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ugrl.types import IGNORE


def classification_loss(logits_BF: Tensor, tags_BF: Tensor, w_BF: Tensor) -> Tensor:
    """Multi-label soft-margin loss, entries with y = 1 weighted."""
    weight = torch.ones_like(logits_BF)
    weight[tags_BF == 1] = w_BF[tags_BF == 1].to(weight)
    return F.binary_cross_entropy_with_logits(logits_BF, tags_BF, weight=weight)


def segmentation_loss(
    seg_BChw: Tensor, labels_BHW: Tensor, w_BC: Tensor, *, balance: Literal["none", "fg_bg"] = "none"
) -> Tensor:
    """Cross-entropy of logits at the labels' size, weighted pixel by pixel."""
    logits = F.interpolate(seg_BChw, size=labels_BHW.shape[1:], mode="bilinear", align_corners=False)
    weight_BHW = torch.zeros_like(logits[:, 0])
    for b in range(len(labels_BHW)):
        valid = labels_BHW[b] != IGNORE
        weight_BHW[b, valid] = w_BC[b, labels_BHW[b, valid]].to(weight_BHW)
    loss_BHW = F.cross_entropy(logits, labels_BHW, ignore_index=IGNORE, reduction="none") * weight_BHW
    if balance == "none":
        return _mean(loss_BHW, labels_BHW != IGNORE)
    ground = labels_BHW == 0
    return 0.5 * (_mean(loss_BHW, ground) + _mean(loss_BHW, (labels_BHW != IGNORE) & ~ground))


def _mean(x_BHW: Tensor, where: Tensor) -> Tensor:
    if not where.any():
        return x_BHW.sum() * 0
    return x_BHW[where].mean()


def radius_mask(h: int, w: int, radius: int, device: torch.device) -> Tensor:
    """Which pairs of positions are near each other, bool (N, N); made once."""
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    return near & ~torch.eye(h * w, dtype=torch.bool, device=device)


def affinity_labels(labels_Bhw: Tensor, eligible_Bhw: Tensor, mask_NN: Tensor) -> Tensor:
    """1 same, 0 different, 255 ignored for every pair, int64 (B, N, N)."""
    flat_B1N = labels_Bhw.flatten(1)[:, None]
    rows = flat_B1N.repeat(1, flat_B1N.shape[-1], 1)
    label = (rows == rows.permute(0, 2, 1)).long()
    out_BN = (labels_Bhw == IGNORE).flatten(1) | ~eligible_Bhw.flatten(1)
    for b in range(len(label)):
        label[b, ~mask_NN] = IGNORE
        label[b, :, out_BN[b]] = IGNORE
        label[b, out_BN[b], :] = IGNORE
    return label


def affinity_loss(affinity_BNN: Tensor, labels_BNN: Tensor) -> Tensor:
    """½·mean(1 − σ(A) | same) + ½·mean(σ(A) | different) over masks of all pairs."""
    probability = torch.sigmoid(affinity_BNN)
    same, different = (labels_BNN == 1).to(torch.int16), (labels_BNN == 0).to(torch.int16)
    loss = probability.sum() * 0
    if same.any():
        loss = loss + 0.5 * torch.sum(same * (1 - probability)) / same.sum()
    if different.any():
        loss = loss + 0.5 * torch.sum(different * probability) / different.sum()
    return loss


def contrastive_loss(emb_BDhw: Tensor, labels_Bhw: Tensor, pool_Bhw: Tensor, *, tau: float) -> Tensor:
    """Eqs. 10 and 11 with the whole matrix of an image's anchors at once, image by image."""
    total, anchors = emb_BDhw.sum() * 0, 0
    for b in range(len(emb_BDhw)):
        chosen_N = pool_Bhw[b] & (labels_Bhw[b] != IGNORE)
        label_N = labels_Bhw[b][chosen_N]
        x_ND = emb_BDhw[b].permute(1, 2, 0)[chosen_N]
        similarity_NN = x_ND @ x_ND.T / tau
        other_NN = ~torch.eye(len(label_N), dtype=torch.bool, device=label_N.device)
        positive_NN = (label_N[:, None] == label_N[None]) & other_NN
        counts_N = positive_NN.any(dim=1)
        if not counts_N.any():
            continue
        all_N = similarity_NN.masked_fill(~other_NN, -torch.inf).logsumexp(dim=1)
        same_N = similarity_NN.masked_fill(~positive_NN, -torch.inf).logsumexp(dim=1)
        total = total + (all_N - same_N)[counts_N].sum()
        anchors += int(counts_N.sum())
    return total / max(anchors, 1)
