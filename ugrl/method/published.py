"""AFA's way from a propagated CAM to the labels of its segmentation loss (``propagate: afa``).

Source: AFA's public code, read for what its paper (Ru et al., CVPR 2022) leaves open. It differs from
:func:`ugrl.method.pseudo.propagate_cam` with PAR in these points: the walk moves the probabilities of background and
classes and not the CAM; its weights are those of the largest scale, and columns of them are divided by their sum and
0.1 more; PAR gets what comes out as it is, without a softmax; and the labels of the affinity loss stay those of the
CAM that did not walk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ugrl.grid import near, resize_maps, spans
from ugrl.method.refine import PAR, decide
from ugrl.precision import full_precision
from ugrl.types import IGNORE

#: What is added to the sum of a column of the walk; AFA's guard against a column of zeros.
EXTRA = 0.1


@torch.no_grad()
def walk_of(affinity_BNN: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """T: sigmoid(A)² within the radius, each column divided by its sum and :data:`EXTRA` more.

    Args:
        affinity_BNN: Affinity logits on ``grid``, N = h·w; symmetric.
        grid: ``(h, w)``.
        radius: Chebyshev distance, in cells.

    Returns:
        (B, N, N). A map x (1, N) walks to x T.
    """
    a_BNN = affinity_BNN if affinity_BNN.dtype == torch.float64 else affinity_BNN.float()
    squared_BNN = a_BNN.sigmoid().square() * near(grid, radius, a_BNN.device)
    return squared_BNN / (squared_BNN.sum(1, keepdim=True) + EXTRA)


@torch.no_grad()
def walked_labels(
    cam_PHW: Tensor,
    pairs_P2: Tensor,
    boxes_B4: Tensor,
    images_B3HW: Tensor,
    walk_BNN: Tensor,
    grid: tuple[int, int],
    *,
    par: PAR,
    high: float,
    low: float,
) -> tuple[Tensor, Tensor]:
    """Pseudo-labels of a CAM that walked along the affinity, refined by PAR in the valid box.

    Args:
        cam_PHW: Normalised maps in [0, 1).
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` on the CPU.
        images_B3HW: Normalised images.
        walk_BNN: :func:`walk_of` on ``grid``.
        grid: Cells ``(h, w)`` of the largest scale's last map.
        par: Pixel-adaptive refinement.
        high: Score of the background in the run that finds the classes.
        low: Score of the background in the run that finds the background.

    Returns:
        As :func:`ugrl.method.refine.refine_labels`.
    """
    b, size = walk_BNN.shape[0], (int(cam_PHW.shape[-2]), int(cam_PHW.shape[-1]))
    labels_BHW = torch.full((b, *size), IGNORE, dtype=torch.int64, device=cam_PHW.device)
    conf_BHW = cam_PHW.new_zeros((b, *size))
    for k, (start, end) in enumerate(spans(pairs_P2, b)):
        y0, y1, x0, x1 = (int(v) for v in boxes_B4[k])
        if start == end or y0 == y1 or x0 == x1:
            # No class: the same answer as the plain thresholds give for a best CAM of 0.
            labels_BHW[k, y0:y1, x0:x1], conf_BHW[k, y0:y1, x0:x1] = 0, low
            continue
        score_nN = resize_maps(cam_PHW[start:end], grid).flatten(1).to(walk_BNN)
        runs = []
        for background in (high, low):
            with full_precision(walk_BNN):
                prob_cN = torch.cat([torch.full_like(score_nN[:1], background), score_nN]).softmax(0)
                moved_chw = (prob_cN @ walk_BNN[k]).view(-1, *grid).to(cam_PHW.dtype)
            runs.append(resize_maps(moved_chw, size)[:, y0:y1, x0:x1])
        scores_2chw = _refined(torch.stack(runs), images_B3HW[k, :, y0:y1, x0:x1].to(cam_PHW.dtype), par)
        label, conf = decide(scores_2chw[:, 1:], scores_2chw[:, 0], pairs_P2[start:end, 1])
        labels_BHW[k, y0:y1, x0:x1], conf_BHW[k, y0:y1, x0:x1] = label, conf
    return labels_BHW, conf_BHW


def _refined(runs_2chw: Tensor, image_3hw: Tensor, par: PAR) -> Tensor:
    """PAR at half of the box's size: the image shrinks as everywhere, the scores with their corners aligned (AFA)."""
    size = (int(image_3hw.shape[-2]), int(image_3hw.shape[-1]))
    half = (max(1, size[0] // 2), max(1, size[1] // 2))
    small_2chw = F.interpolate(runs_2chw, size=half, mode="bilinear", align_corners=True)
    masks_1Khw = small_2chw.flatten(0, 1)[None]
    refined_Khw = par(resize_maps(image_3hw, half)[None], masks_1Khw)[0]
    return resize_maps(refined_Khw, size).view_as(runs_2chw)
