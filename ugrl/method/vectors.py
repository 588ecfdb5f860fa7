"""From a CAM to class vectors: the part of the walk that training and evaluation share."""

from __future__ import annotations

import torch
from torch import Tensor

from ugrl.grid import cell_means, inside_cells, scatter_pairs
from ugrl.method.cam import CamOutput
from ugrl.method.uncertainty import class_positions, class_vectors, local_affinity
from ugrl.types import Batch


@torch.no_grad()
def batch_vectors(batch: Batch, cam: CamOutput, *, radius: int, local: bool) -> tuple[Tensor, Tensor]:
    """Class vectors r of a batch (Eq. 2, repaired: a vector, not a scalar, per image and class).

    Args:
        batch: Tags, pairs and boxes are read.
        cam: Its CAM, with F4 and, where Â is wanted, the affinity logits.
        radius: Chebyshev radius of Â, in cells.
        local: Whether to spread the class weights by Â; without it Â is the identity.

    Returns:
        r (B, C, D), zero where absent, and bool (B, C): which exist.
    """
    grid = (cam.f4_BDhw.shape[-2], cam.f4_BDhw.shape[-1])
    size = (batch.images_B3HW.shape[-2], batch.images_B3HW.shape[-1])
    b, f = batch.tags_BF.shape
    inside_BN = inside_cells(batch.boxes_B4, size, grid).flatten(1).float().to(cam.cam_PHW)
    cam_BFN = scatter_pairs(cell_means(cam.cam_PHW, grid), batch.pairs_P2, b, f).flatten(2)
    m_BCN = class_positions(cam_BFN, inside_BN)
    ahat_BNN = None
    if local and cam.affinity_BNN is not None:
        ahat_BNN = local_affinity(cam.affinity_BNN, grid=grid, radius=radius, inside_BN=inside_BN)
    return class_vectors(cam.f4_BDhw.flatten(2), m_BCN, batch.tags_BF, ahat_BNN)
