"""Cells, boxes, neighbours and pairs: the geometry that method, network and evaluation share.

A *cell* is one position of a coarser grid over the image. The pixel that stands for it is the one at its centre. A
*box* is the part of a crop that shows the image and not its padding. *Pairs* are the (image, class) pairs that are
present, in row-major order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ugrl import bilinear
from ugrl.errors import UgrlError

# -- cells ----------------------------------------------------------------------------------------


def cell_centres(size: int, cells: int, device: torch.device | str = "cpu") -> Tensor:
    """Pixel at the centre of each cell of an axis.

    Args:
        size: Pixels of the axis.
        cells: Cells of the axis.
        device: Where the index is wanted.

    Returns:
        int64 (cells,), ``⌊(i + ½)·size / cells⌋`` in integer arithmetic: the lower right one of the pixels that meet
        where the centre is a corner.
    """
    return (2 * torch.arange(cells, device=device) + 1) * size // (2 * cells)


def cell_corners(size: int, cells: int, device: torch.device | str = "cpu") -> Tensor:
    """First pixel of each cell of an axis, ``⌊i·size / cells⌋``; as :func:`cell_centres`."""
    return torch.arange(cells, device=device) * size // cells


def sample_nearest(x_BHW: Tensor, grid: tuple[int, int], *, corner: bool = False) -> Tensor:
    """The values at the cells' centres; labels are never mixed.

    Args:
        x_BHW: (…, H, W) of any type.
        grid: (h, w).
        corner: Whether to take each cell's upper left pixel instead.

    Returns:
        (…, h, w), same type.

    >>> sample_nearest(torch.arange(16).view(1, 4, 4), (2, 2)).tolist()
    [[[5, 7], [13, 15]]]
    """
    (h, w), (H, W) = grid, x_BHW.shape[-2:]
    if (h, w) == (H, W):
        return x_BHW
    place = cell_corners if corner else cell_centres
    rows_h, cols_w = place(H, h, x_BHW.device), place(W, w, x_BHW.device)
    return x_BHW.index_select(-2, rows_h).index_select(-1, cols_w)


def cell_means(maps_PHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average maps over the cells of a coarser grid.

    This is an average over the cell (adaptive pooling) and not a bilinear sample. A sample would read four pixels of a
    cell of 16x16, and the class weights of Eq. 2 would depend on which four.

    Args:
        maps_PHW: One map per pair; P may be 0.
        grid: ``(h, w)``.

    Returns:
        (P, h, w).
    """
    if maps_PHW.shape[0] == 0:
        return maps_PHW.new_zeros((0, *grid))
    return F.adaptive_avg_pool2d(maps_PHW[:, None], grid)[:, 0]


def resize_maps(maps_PHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize (``align_corners=False``) of (P, H, W) maps to (P, *size); P may be 0."""
    if maps_PHW.shape[0] == 0:
        return maps_PHW.new_zeros((0, *size))
    if tuple(maps_PHW.shape[-2:]) == size:
        return maps_PHW
    return bilinear.resize(maps_PHW[:, None], size)[:, 0]


# -- boxes ----------------------------------------------------------------------------------------


def _inside(boxes_B4: Tensor, y_h: Tensor, x_w: Tensor) -> Tensor:
    """Which of some rows and columns, in pixels, lie in the boxes: bool (B, h, w)."""
    box = boxes_B4.to(y_h.device, non_blocking=True)
    rows_Bh = (y_h >= box[:, 0:1]) & (y_h < box[:, 1:2])
    cols_Bw = (x_w >= box[:, 2:3]) & (x_w < box[:, 3:4])
    return rows_Bh[:, :, None] & cols_Bw[:, None, :]


def inside_pixels(boxes_B4: Tensor, size: tuple[int, int], device: torch.device | str) -> Tensor:
    """Which pixels lie in the valid box.

    Args:
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` in pixels.
        size: ``(H, W)`` of the crop.
        device: Where the mask is wanted.

    Returns:
        bool (B, H, W).
    """
    return _inside(boxes_B4, torch.arange(size[0], device=device), torch.arange(size[1], device=device))


def whole_boxes(boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes of the whole crop ``(H, W)``, as many as there are in ``boxes_B4``."""
    return torch.tensor([0, size[0], 0, size[1]]).expand_as(boxes_B4)


def inside_cells(
    boxes_B4: Tensor, size: tuple[int, int], grid: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Which cells have their centre in the valid box.

    Args:
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` in pixels.
        size: ``(H, W)`` of the crop.
        grid: ``(h, w)``.
        device: Where the mask is wanted.

    Returns:
        bool (B, h, w).
    """
    return _inside(boxes_B4, cell_centres(size[0], grid[0], device), cell_centres(size[1], grid[1], device))


# -- neighbours -----------------------------------------------------------------------------------


def near(grid: tuple[int, int], radius: int, device: torch.device | str = "cpu") -> Tensor:
    """Pairs of cells that are at most ``radius`` apart in rows and in columns (Chebyshev distance).

    Args:
        grid: ``(h, w)``, N = h·w in row-major order.
        radius: In cells.
        device: Where the mask is wanted.

    Returns:
        bool (N, N), symmetric; a cell is near itself.
    """
    h, w = grid
    y_h, x_w = torch.arange(h, device=device), torch.arange(w, device=device)
    rows_hh = (y_h[:, None] - y_h).abs() <= radius
    cols_ww = (x_w[:, None] - x_w).abs() <= radius
    return (rows_hh[:, None, :, None] & cols_ww[None, :, None, :]).reshape(h * w, h * w)


def near_tokens(tokens_Bn: Tensor, width: int, radius: int) -> Tensor:
    """:func:`near` for chosen cells.

    Args:
        tokens_Bn: int64 cells 0…N-1 of each image.
        width: Cells of a row, w.
        radius: In cells.

    Returns:
        bool (B, n, n).
    """
    y_Bn, x_Bn = tokens_Bn // width, tokens_Bn % width
    near_Bnn = (y_Bn[:, :, None] - y_Bn[:, None, :]).abs() <= radius
    near_Bnn &= (x_Bn[:, :, None] - x_Bn[:, None, :]).abs() <= radius
    return near_Bnn


# -- pairs ----------------------------------------------------------------------------------------


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


def stack_pairs(maps_Px: Tensor, pairs_P2: Tensor, batch: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Pack pairs image by image.

    Args:
        maps_Px: (P, …), one entry per pair.
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major.
        batch: Number of images B.

    Returns:
        (B, n, …) with n the largest number of classes of an image (at least 1), zero where an image has fewer, and
        the B ranges of :func:`spans`.
    """
    ranges = spans(pairs_P2, batch)
    most = max([1, *(end - start for start, end in ranges)])
    slot_P = torch.tensor([b * most + j for b, (start, end) in enumerate(ranges) for j in range(end - start)])
    out = maps_Px.new_zeros((batch * most, *maps_Px.shape[1:]))
    out.index_copy_(0, slot_P.long().to(maps_Px.device, non_blocking=True), maps_Px)
    return out.view(batch, most, *maps_Px.shape[1:]), ranges


def scatter_pairs(maps_PHW: Tensor, pairs_P2: Tensor, images: int, classes: int) -> Tensor:
    """Spread pairs to all classes.

    Args:
        maps_PHW: One map per pair.
        pairs_P2: int64 ``(b, f)``.
        images: B.
        classes: F, without background.

    Returns:
        (B, F, H, W), zero for absent classes.
    """
    out = maps_PHW.new_zeros((images * classes, *maps_PHW.shape[1:]))
    flat_P = (pairs_P2[:, 0] * classes + pairs_P2[:, 1]).to(maps_PHW.device, non_blocking=True)
    return out.index_copy_(0, flat_P, maps_PHW).view(images, classes, *maps_PHW.shape[1:])
