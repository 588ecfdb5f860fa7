"""Batches whose last steps are done where the training is: normalising, or scaling, mirroring and cutting too.

A loader yields something with ``to(device, dtype)`` that returns a :class:`ugrl.types.Batch`: a batch, or
one of the two below. :class:`PixelBatch` holds finished crops as 8-bit pixels; it gives the floats of the
host, bit for bit, from a quarter of the bytes. :class:`RawBatch` holds the parts of the decoded images that
the crops show, of any size; one pass of two matrix products per axis cuts the whole batch. It differs from
the host by roundings: the host rounds to 8 bits after each axis, this one never.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ugrl.data.augment import FACTOR, OFFSET, Cut
from ugrl.types import Batch


@dataclass(frozen=True, slots=True)
class Labels:
    """A :class:`ugrl.types.Batch` but for its images; the fields are the same."""

    ids: tuple[str, ...]
    tags_BF: Tensor
    boxes_B4: Tensor
    masks_BHW: Tensor | None
    pairs_P2: Tensor
    teachers_BHW: Tensor | None = None

    def batch(self, images_B3HW: Tensor) -> Batch:
        """The batch with these images."""
        return Batch(
            self.ids,
            images_B3HW,
            self.tags_BF,
            self.boxes_B4,
            self.masks_BHW,
            self.pairs_P2,
            self.teachers_BHW,
        )


@dataclass(frozen=True, slots=True)
class PixelBatch:
    """Crops as 8-bit pixels.

    Attributes:
        labels: Everything of the batch but its images.
        pixels_BHW3: uint8 RGB, 0 outside the boxes.
        pad: Colour outside the boxes (``data.pad``).
    """

    labels: Labels
    pixels_BHW3: Tensor
    pad: str = "mean"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch on ``device``, normalised there."""
        pixels_BHW3 = self.pixels_BHW3.to(device, non_blocking=True)
        b, height, width, _ = pixels_BHW3.shape
        images_B3HW = torch.empty(b, 3, height, width, device=device)
        images_B3HW.copy_(pixels_BHW3.permute(0, 3, 1, 2))
        images_B3HW = _normalize(images_B3HW, self.labels.boxes_B4, self.pad)
        return self.labels.batch(images_B3HW).to(device, dtype)


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Decoded images, and the cuts to make of them.

    Attributes:
        labels: Everything of the batch but its images.
        images: B parts of images, uint8 (h, w, 3) each.
        axes_B23: float64: for rows and columns of each image, the place of the first kept pixel's centre
            in it, source pixels per pixel, and 1 where the axis is mirrored.
        crop: Side of the samples, in pixels.
        pad: Colour around the images (``data.pad``).
    """

    labels: Labels
    images: tuple[Tensor, ...]
    axes_B23: Tensor
    crop: int
    pad: str = "mean"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch on ``device``, made there."""
        sizes = [tuple(i.shape[:2]) for i in self.images]
        b, height, width = len(sizes), max(h for h, _ in sizes), max(w for _, w in sizes)
        canvas_BHW3 = torch.zeros(b, height, width, 3, dtype=torch.float32, device=device)
        for k, (h, w) in enumerate(sizes):
            canvas_BHW3[k, :h, :w] = self.images[k].to(device, non_blocking=True)
        lengths_B2 = torch.tensor(sizes, dtype=torch.float64)
        boxes_B22 = self.labels.boxes_B4.view(b, 2, 2).double()
        # One small transfer: centre, ratio, mirrored, length, first and last row (or column) of the box.
        facts_B26 = torch.cat([self.axes_B23, lengths_B2[..., None], boxes_B22], dim=2).to(device)
        wy_BCh = triangles(facts_B26[:, 0], self.crop, height)
        wx_BCw = triangles(facts_B26[:, 1], self.crop, width)
        rows_BCw3 = torch.bmm(wy_BCh, canvas_BHW3.view(b, height, width * 3)).view(b, self.crop, width, 3)
        rows_B3Cw = rows_BCw3.permute(0, 3, 1, 2).reshape(b, 3 * self.crop, width)
        images_B3CC = torch.bmm(rows_B3Cw, wx_BCw.transpose(1, 2)).view(b, 3, self.crop, self.crop)
        images_B3CC = _normalize(images_B3CC, self.labels.boxes_B4, self.pad)
        return self.labels.batch(images_B3CC).to(device, dtype)


def cut_axes(cut: Cut) -> tuple[tuple[slice, slice], tuple[tuple[float, float, float], ...]]:
    """What :class:`RawBatch` needs of a cut: the part of the image to carry, and its two rows of ``axes_B23``."""
    regions, axes = [], []
    for axis, flip in ((cut.y, False), (cut.x, cut.flip)):
        first, last = axis.reach
        regions.append(slice(first, last))
        axes.append(((axis.offset + 0.5) * axis.ratio - first, axis.ratio, float(flip)))
    return (regions[0], regions[1]), tuple(axes)


def triangles(facts_B6: Tensor, crop: int, length: int) -> Tensor:
    """One axis of an antialiased bilinear resize of many images, as matrices.

    Pillow's filter: a triangle around the output pixel's centre in the source, one source pixel wide to
    either side, or one output pixel where that is more, over the pixels that exist, of sum 1. It is 0 where
    Pillow cuts it off, so nothing is cut off here.

    Args:
        facts_B6: float64: centre of the first kept pixel, ratio, mirrored, length, first and last + 1
            position in the crop.
        crop: Positions along the crop.
        length: Pixels of the longest image.

    Returns:
        float32 (B, crop, length); rows outside the box are 0.
    """
    centre_B1, ratio_B1, flip_B1, length_B1, first_B1, last_B1 = facts_B6[:, :, None].unbind(1)
    i_C = torch.arange(crop, device=facts_B6.device, dtype=torch.float64)
    k_BC = torch.where(flip_B1 > 0, last_B1 - 1 - i_C, i_C - first_B1)
    centres_BC = centre_B1 + k_BC * ratio_B1
    j_L = torch.arange(length, device=facts_B6.device, dtype=torch.float64)
    # Distances in float64, as they are small differences of large numbers.
    distance_BCL = (j_L + 0.5 - centres_BC[..., None]).abs_().div_(ratio_B1.clamp(min=1.0)[..., None])
    w_BCL = (1.0 - distance_BCL).clamp_(min=0.0).float()
    w_BCL *= (j_L < length_B1).float()[:, None, :]
    w_BCL *= ((i_C >= first_B1) & (i_C < last_B1)).float()[..., None]
    return w_BCL.div_(w_BCL.sum(2, keepdim=True).clamp_(min=1e-6))


def outside(boxes_B4: Tensor, height: int, width: int, device: torch.device) -> Tensor | None:
    """Where crops do not show their images: bool (B, H, W), or ``None`` if that is nowhere."""
    if bool((boxes_B4 == torch.tensor([0, height, 0, width])).all()):  # on the CPU: waits for nothing
        return None
    y0_B11, y1_B11, x0_B11, x1_B11 = boxes_B4.to(device, non_blocking=True)[:, :, None, None].unbind(1)
    i_H1 = torch.arange(height, device=device)[:, None]
    j_W = torch.arange(width, device=device)
    return (i_H1 < y0_B11) | (i_H1 >= y1_B11) | (j_W < x0_B11) | (j_W >= x1_B11)


@lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    factor_311, offset_311 = (torch.from_numpy(v).to(device)[:, None, None] for v in (FACTOR, OFFSET))
    return factor_311, offset_311


def _normalize(images_B3HW: Tensor, boxes_B4: Tensor, pad: str) -> Tensor:
    """In place, with the host's two roundings. Pixels outside the boxes are 0 on entry: black, unless it is to be 0."""
    factor_311, offset_311 = _statistics(images_B3HW.device)
    images_B3HW.mul_(factor_311).sub_(offset_311)
    if pad == "black":
        return images_B3HW
    outside_BHW = outside(boxes_B4, images_B3HW.shape[-2], images_B3HW.shape[-1], images_B3HW.device)
    if outside_BHW is not None:
        images_B3HW.masked_fill_(outside_BHW[:, None], 0.0)
    return images_B3HW
