"""From class activation maps to one vector per class and image (Eqs. 2 and 3, repaired).

The paper sums features under a map to one *scalar* per class; the cosine of two scalars times the
same row of Φ is a sign, so its u is 0 or 2 whatever the image shows. Here a class is the mean
last-stage feature under its map: a vector of width D, which :mod:`ugrl.method.prototypes` encodes
and compares. Nothing here has a gradient: u is a weight, not something to minimise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ugrl.errors import UgrlError
from ugrl.grid import cell_means, inside_cells, near, scatter_pairs
from ugrl.method.cam import CamOutput
from ugrl.precision import full_precision
from ugrl.types import Batch

MIN_MASS = 1e-6
"""Smallest Σω (positions' worth of map) that still makes a class vector."""


@torch.no_grad()
def class_positions(cam_BFN: Tensor, inside_BN: Tensor) -> Tensor:
    """Where each class is seen, background included.

    Args:
        cam_BFN: CAM on the feature grid in [0, 1], 0 for classes the image is not tagged with.
        inside_BN: 1 where the position shows the image, 0 on padding.

    Returns:
        m (B, C, N): row 0 is 1 − max_c M_c (all ones for an image without a tag), rows 1…F are M_c;
        all 0 on padding. float32, float64 for float64 maps.
    """
    m_BFN = cam_BFN if cam_BFN.dtype == torch.float64 else cam_BFN.float()
    background_B1N = 1 - m_BFN.amax(dim=1, keepdim=True)
    return torch.cat([background_B1N, m_BFN], dim=1) * inside_BN[:, None].to(m_BFN.dtype)


@torch.no_grad()
def local_affinity(
    affinity_BNN: Tensor, *, grid: tuple[int, int], radius: int = 8, inside_BN: Tensor | None = None
) -> Tensor:
    """Â: sigmoid of the affinity, where it was trained, with rows that sum to 1 (Eq. 1 → Eq. 2).

    A position is its own neighbour. Beyond the radius the affinity loss never looks, so those logits
    mean nothing; neither do those of padding.

    Args:
        affinity_BNN: Logits, one per pair of positions, N = h·w in row-major order.
        grid: Cells ``(h, w)`` of the affinity's map.
        radius: Chebyshev distance in grid cells; the one the affinity loss uses.
        inside_BN: 1 where the position shows the image, or ``None`` for everywhere.

    Returns:
        Â (B, N, N); the rows of padding are all 0. float32, float64 for float64 logits.

    Raises:
        UgrlError: N is not h·w.
    """
    h, w = grid
    if affinity_BNN.shape[-2:] != (h * w, h * w):
        raise UgrlError(f"affinity: {tuple(affinity_BNN.shape[-2:])} pairs, expected {(h * w, h * w)} for grid {grid}")
    a_BNN = affinity_BNN if affinity_BNN.dtype == torch.float64 else affinity_BNN.float()
    near_NN = near(grid, radius, a_BNN.device)
    if inside_BN is None:
        keep_BNN = near_NN.expand_as(a_BNN)
    else:
        inside = inside_BN > 0
        keep_BNN = near_NN & inside[:, :, None] & inside[:, None, :]
    # σ / Σσ is the softmax of log σ, which survives a row of very negative logits.
    log_BNN = torch.nn.functional.logsigmoid(a_BNN).masked_fill_(~keep_BNN, -torch.inf)
    return log_BNN.softmax(dim=-1).masked_fill_(~keep_BNN, 0)


@torch.no_grad()
def class_vectors(
    f4_BDN: Tensor, m_BCN: Tensor, tags_BF: Tensor, ahat_BNN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """r_c = Σ_p ω_c,p F4_p with ω_c ∝ Â·M_c (Eqs. 2 and 3, a vector instead of a scalar).

    Args:
        f4_BDN: Features of the encoder's last stage, flattened.
        m_BCN: Maps of the classes, from :func:`class_positions`.
        tags_BF: 1 for the classes the image shows; background always counts as shown.
        ahat_BNN: :func:`local_affinity`, or ``None`` for the identity (while the affinity is untrained).

    Returns:
        r (B, C, D), 0 where there is none, and bool (B, C): which exist, that is shown and with a
        total weight Σω of at least 1e-6 before ω is normalised. r is float32, float64 for float64 features.
    """
    with full_precision(f4_BDN):
        f_BDN = f4_BDN if f4_BDN.dtype == torch.float64 else f4_BDN.float()
        omega_BCN = m_BCN.to(f_BDN.dtype)
        if ahat_BNN is not None:
            omega_BCN = omega_BCN @ ahat_BNN.to(f_BDN.dtype).mT
        mass_BC = omega_BCN.sum(dim=-1)
        shown_BC = torch.cat([torch.ones_like(tags_BF[:, :1]), tags_BF], dim=1) > 0
        present_BC = shown_BC & (mass_BC >= MIN_MASS)
        omega_BCN = omega_BCN / mass_BC.clamp(min=MIN_MASS)[..., None]
        r_BCD = omega_BCN @ f_BDN.mT
        return r_BCD.masked_fill(~present_BC[..., None], 0), present_BC


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
