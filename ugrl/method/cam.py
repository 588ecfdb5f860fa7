"""Class activation maps of the classes an image shows (forward pass, step 3).

Only the P present (image, class) pairs are ever resized, mirrored or normalised: an image of
VOC shows 1.5 of 20 classes, so the absent ones would be more than nine tenths of the work.

Source: AFA (Ru et al., CVPR 2022), whose CAM recipe UGRL inherits: scales 1, 0.5, 1.5, each with
its mirror image (maximum of the two), summed over scales, min-max normalised per class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ugrl import bilinear
from ugrl.errors import UgrlError
from ugrl.model.specs import scaled

EPS = 1e-5

Forward = Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class CamOutput:
    """What the CAM passes yield; nothing here has a gradient.

    Attributes:
        cam_PHW: float32 (float64 for float64 scores), in [0, 1), zero outside the box.
        f4_BDhw: Last-stage features of the plain pass at scale 1.
        affinity_BNN: Affinity logits of the same pass, or ``None`` if ``forward`` gave none.
    """

    cam_PHW: Tensor
    f4_BDhw: Tensor
    affinity_BNN: Tensor | None


def spans(pairs_P2: Tensor, batch: int) -> list[tuple[int, int]]:
    """Where each image's pairs lie.

    Args:
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major.
        batch: Number of images B.

    Returns:
        B half-open ranges of pair indices; empty for an image without a tag.

    Raises:
        UgrlError: The pairs are not ascending without repetition, or name an image outside the batch.
    """
    pairs = [(int(b), int(f)) for b, f in pairs_P2.tolist()]
    for here, after in zip(pairs, pairs[1:], strict=False):
        if here >= after:
            raise UgrlError(f"pairs_P2: {after} follows {here}, expected ascending (image, class) pairs")
    if pairs and not 0 <= pairs[0][0] <= pairs[-1][0] < batch:
        raise UgrlError(f"pairs_P2: images {pairs[0][0]} to {pairs[-1][0]}, expected 0 to {batch - 1}")
    counts = [0] * batch
    for b, _ in pairs:
        counts[b] += 1
    out, start = [], 0
    for count in counts:
        out.append((start, start + count))
        start += count
    return out


def inside_mask(boxes_B4: Tensor, height: int, width: int, device: torch.device | str) -> Tensor:
    """Which pixels lie in the valid box.

    Args:
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` in pixels.
        height: H.
        width: W.
        device: Where the mask is wanted.

    Returns:
        bool (B, H, W).
    """
    box = boxes_B4.to(device, non_blocking=True)
    y_H = torch.arange(height, device=device)
    x_W = torch.arange(width, device=device)
    rows_BH = (y_H >= box[:, 0:1]) & (y_H < box[:, 1:2])
    cols_BW = (x_W >= box[:, 2:3]) & (x_W < box[:, 3:4])
    return rows_BH[:, :, None] & cols_BW[:, None, :]


def nearest_index(size: int, cells: int, device: torch.device | str = "cpu") -> Tensor:
    """Pixel that stands for each cell of a coarser axis: the one at the cell's centre.

    Args:
        size: Pixels of the axis.
        cells: Cells of the axis.
        device: Where the index is wanted.

    Returns:
        int64 (cells,), ``floor((i + 0.5) * size / cells)`` in integer arithmetic.
    """
    return (2 * torch.arange(cells, device=device) + 1) * size // (2 * cells)


def inside_grid(
    boxes_B4: Tensor, size: tuple[int, int], grid: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Which grid positions lie in the valid box, sampled at cell centres.

    Args:
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` in pixels.
        size: ``(H, W)`` of the crop.
        grid: ``(h, w)``.
        device: Where the result is wanted.

    Returns:
        float32 (B, N = h·w), 1 inside.
    """
    mask = inside_mask(boxes_B4, size[0], size[1], device)
    rows = nearest_index(size[0], grid[0], device)
    cols = nearest_index(size[1], grid[1], device)
    return mask[:, rows][:, :, cols].flatten(1).float()


def normalise(cam_PHW: Tensor, pairs_P2: Tensor, boxes_B4: Tensor) -> Tensor:
    """Min-max normalise every pair over its image's valid box.

    Args:
        cam_PHW: Non-negative scores.
        pairs_P2: int64 ``(b, f)`` on the CPU.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)``.

    Returns:
        (P, H, W) in [0, 1): the minimum of the box becomes 0 and its maximum m becomes m / (m + 1e-5) after
        the minimum was subtracted; 0 outside the box, and everywhere where the box is empty or the score is constant.
    """
    height, width = cam_PHW.shape[-2:]
    inside_PHW = inside_mask(boxes_B4[pairs_P2[:, 0]], height, width, cam_PHW.device)
    low_P11 = cam_PHW.masked_fill(~inside_PHW, torch.inf).amin((1, 2), keepdim=True)
    high_P11 = cam_PHW.masked_fill(~inside_PHW, -torch.inf).amax((1, 2), keepdim=True)
    scaled = (cam_PHW - low_P11) / (high_P11 - low_P11 + EPS)
    return torch.where(inside_PHW, scaled, torch.zeros_like(scaled))


def dense(cam_PHW: Tensor, pairs_P2: Tensor, images: int, classes: int) -> Tensor:
    """Spread pairs to all classes.

    Args:
        cam_PHW: One map per pair.
        pairs_P2: int64 ``(b, f)``.
        images: B.
        classes: F, without background.

    Returns:
        (B, F, H, W), zero for absent classes.
    """
    out = cam_PHW.new_zeros((images * classes, *cam_PHW.shape[1:]))
    flat_P = (pairs_P2[:, 0] * classes + pairs_P2[:, 1]).to(cam_PHW.device, non_blocking=True)
    return out.index_copy_(0, flat_P, cam_PHW).view(images, classes, *cam_PHW.shape[1:])


def to_grid(cam_PHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average the maps over the cells of a coarser grid.

    An average over the cell (adaptive pooling) and not a bilinear sample: a cell of 16x16 pixels that is read at four
    of them would make the class weights of Eq. 2 depend on which four.

    Args:
        cam_PHW: One map per pair.
        grid: ``(h, w)``.

    Returns:
        (P, h, w).
    """
    if cam_PHW.shape[0] == 0:
        return cam_PHW.new_zeros((0, *grid))
    return F.adaptive_avg_pool2d(cam_PHW[:, None], grid)[:, 0]


def resize(maps_PHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize (``align_corners=False``) of (P, H, W) maps; P may be 0."""
    if maps_PHW.shape[0] == 0 or tuple(maps_PHW.shape[-2:]) == size:
        return maps_PHW.new_zeros((0, *size)) if maps_PHW.shape[0] == 0 else maps_PHW
    return bilinear.resize(maps_PHW[:, None], size)[:, 0]


def _others(scales: Sequence[float]) -> list[float]:
    rest = list(scales)
    rest.remove(1.0)
    return rest


def passes(scales: Sequence[float], mirror: bool) -> list[tuple[float, bool]]:
    """The order in which :func:`multi_scale_cam` asks for (scale, mirrored); the affinity is wanted of the first.

    >>> passes((0.5, 1.0), mirror=True)
    [(1.0, False), (1.0, True), (0.5, False), (0.5, True)]
    """
    flips = (False, True) if mirror else (False,)
    return [(scale, flip) for scale in (1.0, *_others(scales)) for flip in flips]


@torch.no_grad()
def multi_scale_cam(
    forward: Forward,
    images_B3HW: Tensor,
    pairs_P2: Tensor,
    boxes_B4: Tensor,
    *,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    mirror: bool = True,
    least: int = 1,
) -> CamOutput:
    """CAM of the present pairs from several scales and mirror images.

    The passes run one by one and in the same number on every rank, whatever P is: the affinity's attention maps then
    exist for one pass only, and a network that communicates cannot hang. Their order is that of :func:`passes`.

    Args:
        forward: Takes images (B, 3, H', W') and whether the affinity is wanted; returns raw class scores per position
            (B, F, h, w), last-stage features (B, D, h, w) and affinity logits (B, N, N) or ``None``. The caller sees
            to evaluation mode.
        images_B3HW: Normalised images.
        pairs_P2: int64 ``(b, f)`` on the CPU, f from 0.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)``.
        scales: Factors of the image size, 1.0 among them; the sides are rounded to whole pixels.
        mirror: Whether every scale also sees the mirror image.
        least: Shortest side of a rescaled image, where the images may be small ones.

    Returns:
        The maps at (H, W), and features and affinity of the plain pass at scale 1.

    Raises:
        UgrlError: ``scales`` lacks 1.0 or holds a factor that is not positive.
    """
    if 1.0 not in scales or min(scales) <= 0:
        raise UgrlError(f"cam scales: got {list(scales)}, expected positive factors and 1.0 among them")
    height, width = int(images_B3HW.shape[-2]), int(images_B3HW.shape[-1])
    pairs = pairs_P2.to(images_B3HW.device, non_blocking=True)

    def present(raw_BFhw: Tensor) -> Tensor:
        raw_Phw = raw_BFhw[pairs[:, 0], pairs[:, 1]]
        return raw_Phw if raw_Phw.dtype == torch.float64 else raw_Phw.float()

    def both(images: Tensor, raw_BFhw: Tensor) -> Tensor:
        cam_PHW = resize(present(raw_BFhw), (height, width))
        if mirror:
            # Bilinear resizing commutes with mirroring: flip the small map, not the large one.
            flipped_Phw = present(forward(images.flip(-1), False)[0]).flip(-1)
            cam_PHW = torch.maximum(cam_PHW, resize(flipped_Phw, (height, width)))
        return cam_PHW.relu()

    raw_BFhw, f4_BDhw, affinity_BNN = forward(images_B3HW, True)
    total_PHW = both(images_B3HW, raw_BFhw)
    for scale in _others(scales):
        images = bilinear.resize(images_B3HW, scaled((height, width), scale, least))
        total_PHW = total_PHW + both(images, forward(images, False)[0])
    return CamOutput(normalise(total_PHW, pairs_P2, boxes_B4), f4_BDhw, affinity_BNN)
