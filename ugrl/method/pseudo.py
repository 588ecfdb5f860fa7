"""Pseudo-labels from CAMs by two thresholds, and CAMs propagated along the affinity (step 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ugrl.errors import UgrlError
from ugrl.grid import cell_means, inside_cells, inside_pixels, resize_maps, stack_pairs
from ugrl.method.class_vectors import local_affinity
from ugrl.precision import full_precision
from ugrl.types import IGNORE


def check_thresholds(high: float, low: float) -> None:
    """Raise unless ``0 <= low <= high``.

    Raises:
        UgrlError: The order is another; the message names both values.
    """
    if not 0.0 <= low <= high:
        raise UgrlError(f"pseudo-label thresholds: got low {low} and high {high}, expected 0 <= low <= high")


@torch.no_grad()
def pseudo_labels(
    cam_PHW: Tensor,
    pairs_P2: Tensor,
    boxes_B4: Tensor,
    *,
    batch: int,
    high: float = 0.55,
    low: float = 0.35,
) -> tuple[Tensor, Tensor]:
    """Label every pixel by its best class's CAM.

    Above ``high`` the class, at most ``low`` background, between and outside the box ignored. Of two classes with the
    same CAM the one with the lower index wins. An image without a tag is background inside its box.

    Args:
        cam_PHW: Normalised maps in [0, 1).
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)``.
        batch: Number of images B.
        high: Threshold of a class, exclusive.
        low: Threshold of background, inclusive.

    Returns:
        int64 (B, H, W) labels 0, 1…F or 255; and their confidence in the CAM's dtype: the distance to the threshold
        that decided, ``cam - high`` for a class, ``low - cam`` for background, 0 where ignored.

    Raises:
        UgrlError: Not ``0 <= low <= high``.
    """
    check_thresholds(high, low)
    cam_BnHW, _ = stack_pairs(cam_PHW, pairs_P2, batch)
    # The class number of each slot, packed the same way; an empty slot is 0 and its CAM never exceeds ``high``.
    class_Bn, _ = stack_pairs(pairs_P2[:, 1] + 1, pairs_P2, batch)
    best_BHW, slot_BHW = cam_BnHW.max(1)
    class_Bn = class_Bn.to(cam_PHW.device, non_blocking=True)
    classes_BHW = class_Bn.gather(1, slot_BHW.flatten(1)).view_as(slot_BHW)
    inside_BHW = inside_pixels(boxes_B4, (cam_PHW.shape[-2], cam_PHW.shape[-1]), cam_PHW.device)
    is_class = (best_BHW > high) & inside_BHW
    is_ground = (best_BHW <= low) & inside_BHW
    labels_BHW = torch.where(is_class, classes_BHW, torch.where(is_ground, 0, IGNORE))
    conf_BHW = torch.where(is_class, best_BHW - high, torch.where(is_ground, low - best_BHW, 0.0))
    return labels_BHW, conf_BHW


@torch.no_grad()
def random_walk(
    cam_PN: Tensor,
    pairs_P2: Tensor,
    ahat_BNN: Tensor,
    *,
    beta: float = 2.0,
) -> Tensor:
    """Walk the maps along an affinity.

    ``T = rows normalised of (A^beta)``, then ``cam' = T cam``: every position takes a weighted mean of what its
    neighbours have. A scale of A's rows cancels.

    Args:
        cam_PN: Maps on the last-stage grid, flattened.
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major.
        ahat_BNN: Non-negative affinity, zero between positions that must not exchange anything.
        beta: Exponent, > 0.

    Returns:
        (P, N), within the range of the input; 0 where a position has no neighbour.

    Raises:
        UgrlError: ``beta`` is not positive.
    """
    if beta <= 0:
        raise UgrlError(f"propagation: got beta {beta}, expected > 0")
    with full_precision(cam_PN):
        walk_BNN = ahat_BNN.to(cam_PN.dtype) ** beta
        sums_BN1 = walk_BNN.sum(-1, keepdim=True)
        walk_BNN = torch.where(sums_BN1 > 0, walk_BNN / sums_BN1, 0.0)
        cam_BnN, ranges = stack_pairs(cam_PN, pairs_P2, ahat_BNN.shape[0])
        out_BnN = cam_BnN @ walk_BNN.transpose(1, 2)
    return torch.cat([out_BnN[b, : end - start] for b, (start, end) in enumerate(ranges)])


@torch.no_grad()
def propagate_cam(
    cam_PHW: Tensor,
    pairs_P2: Tensor,
    affinity_BNN: Tensor,
    boxes_B4: Tensor,
    *,
    grid: tuple[int, int],
    radius: int = 8,
    beta: float = 2.0,
) -> Tensor:
    """The affinity-propagated CAM (``propagate: affinity``).

    Cell means over the valid box, one :func:`random_walk` along sigmoid(A) within the radius on the last-stage grid,
    positions outside the box giving nothing, and back to the image's size.

    Source: AFA's released code (``propagte_aff_cam_with_bkg``): beta 2, no squaring, radius 8. Two departures: there
    the walk is applied to the softmax of the CAMs with a background score, here to the CAM itself, so that thresholds
    and PAR read it in the same unit (the constant background is a fixed point of T anyway); and there the affinity
    is that of the largest scale, here the only one that is computed, of scale 1.

    Args:
        cam_PHW: Normalised CAM of each pair, in [0, 1).
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major.
        affinity_BNN: Affinity logits on ``grid``, N = h·w.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)``.
        grid: Cells ``(h, w)`` of the last stage's map.
        radius: Chebyshev distance beyond which A is not trained, in cells.
        beta: As in :func:`random_walk`.

    Returns:
        (P, H, W) in [0, 1), zero outside the box. Not normalised again, as AFA does not.

    Raises:
        UgrlError: As :func:`random_walk`, or N is not h·w.
    """
    size = int(cam_PHW.shape[-2]), int(cam_PHW.shape[-1])
    inside_BN = inside_cells(boxes_B4, size, grid, cam_PHW.device).flatten(1).to(cam_PHW.dtype)
    # Positions of padding give nothing but do receive: the way back to the image is bilinear, and pixels at the edge of
    # the box lean on cells beyond it.
    ahat_BNN = local_affinity(affinity_BNN, grid=grid, radius=radius) * inside_BN[:, None, :]
    inside_PHW = inside_pixels(boxes_B4[pairs_P2[:, 0]], size, cam_PHW.device)
    share_Phw = cell_means(inside_PHW.to(cam_PHW.dtype), grid)
    mean_Phw = torch.where(share_Phw > 0, cell_means(cam_PHW, grid) / share_Phw, 0.0)
    moved_PN = random_walk(mean_Phw.flatten(1), pairs_P2, ahat_BNN, beta=beta)
    return resize_maps(moved_PN.view(moved_PN.shape[0], *grid), size) * inside_PHW
