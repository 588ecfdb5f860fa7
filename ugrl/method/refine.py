"""Pixel-adaptive refinement of CAMs (PAR) and the pseudo-labels it gives (step 4, ``refine: par``).

Source: AFA (Ru et al., CVPR 2022), section 3.4, and its released code for what the paper leaves open: the standard
deviation is taken over the 48 neighbours (unbiased), the colour term is the mean over the three channels, the position
term is a softmax of its own that is added with weight w2, so that one iteration scales a mask by 1 + w2.

The rewrite is exact and differs in cost only: neighbours are views of one padded image instead of the output of
one-hot convolutions, the affinity is computed once for both runs, and the background is never refined: a softmax sums
to one over its channels and PAR is linear, so the background is ``(1 + w2)^iterations`` minus the classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ugrl.errors import UgrlError
from ugrl.grid import resize_maps, spans
from ugrl.method.pseudo import check_thresholds
from ugrl.types import IGNORE

EPS = 1e-8
AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


@dataclass(frozen=True)
class PAR:
    """Pixel-adaptive refinement.

    A neighbour q of p weighs ``softmax_q(-mean_c((I_q - I_p) / (s_p w1))^2) + w2 softmax_q(-(|q - p| / (s w1))^2)``,
    s_p being the standard deviation of channel c over the neighbours of p and s that of the distances. An affine change
    of an image channel cancels, so normalised images need no de-normalisation (AFA refines with 8-bit values; the
    difference is their rounding).

    Attributes:
        iterations: How often every mask is replaced by the weighted sum of its neighbours.
        dilations: Distances of the 8 neighbours.
        w1: Width of both kernels, in standard deviations.
        w2: Weight of the position term.

    Raises:
        UgrlError: No dilation, one that is not positive, or a negative number of iterations.
    """

    iterations: int = 10
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    w1: float = 0.3
    w2: float = 0.01

    def __post_init__(self) -> None:
        if self.iterations < 0 or not self.dilations or min(self.dilations) < 1 or self.w1 <= 0 or self.w2 < 0:
            raise UgrlError(
                f"PAR: got iterations {self.iterations}, dilations {self.dilations}, w1 {self.w1}, w2 {self.w2}, "
                "expected iterations >= 0, dilations >= 1, w1 > 0, w2 >= 0"
            )

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """``(dy, dx)`` of every neighbour, dilation by dilation."""
        return [(dy * d, dx * d) for d in self.dilations for dy, dx in AROUND]

    @property
    def gain(self) -> float:
        """What a constant mask is multiplied by: the weights of one iteration sum to 1 + w2."""
        return float((1.0 + self.w2) ** self.iterations)

    def position(self) -> list[float]:
        """The position term of every neighbour, w2 included."""
        far = [math.hypot(dy, dx) for dy, dx in self.offsets]
        mean = math.fsum(far) / len(far)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in far) / (len(far) - 1))
        energy = [-((x / (std + EPS) / self.w1) ** 2) for x in far]
        top = max(energy)
        weight = [math.exp(e - top) for e in energy]
        total = math.fsum(weight)
        return [self.w2 * x / total for x in weight]

    def affinity(self, images_BDhw: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Weights of the neighbours of every pixel.

        Args:
            images_BDhw: Images of any scale and any number of channels D.
            sizes: ``(h_b, w_b)`` of the part of each image that counts, from its upper left corner; a neighbour
                beyond it is the nearest pixel of the part. ``None``: all of it.

        Returns:
            (B, 8·dilations, h, w), summing to 1 + w2 over the neighbours.
        """
        padded, views = self._pad(images_BDhw, sizes), self._views(images_BDhw.shape)
        count = len(views)
        mean = torch.zeros_like(images_BDhw)
        for rows, cols in views:
            mean += padded[:, :, rows, cols]
        mean /= count
        # Two passes: the one-pass variance loses every digit where the neighbours agree, and there it matters most.
        spread, gap = torch.zeros_like(mean), torch.empty_like(mean)
        for rows, cols in views:
            torch.sub(padded[:, :, rows, cols], mean, out=gap)
            spread.addcmul_(gap, gap)
        inverse = spread.div_(count - 1).sqrt_().add_(EPS).mul_(self.w1).reciprocal_()
        out = images_BDhw.new_empty((images_BDhw.shape[0], count, *images_BDhw.shape[-2:]))
        for n, (rows, cols) in enumerate(views):
            torch.sub(padded[:, :, rows, cols], images_BDhw, out=gap)
            gap.mul_(inverse).square_()
            torch.mean(gap, 1, out=out[:, n])
        out = out.neg_().softmax(1)
        return out.add_(torch.tensor(self.position(), dtype=out.dtype).to(out.device, non_blocking=True)[:, None, None])

    def refine(
        self, affinity_BNhw: Tensor, masks_BKhw: Tensor, sizes: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """Apply the affinity ``iterations`` times.

        Args:
            affinity_BNhw: Weights of the neighbours, from :meth:`affinity`.
            masks_BKhw: Any number of masks per image.
            sizes: As given to :meth:`affinity`.

        Returns:
            (B, K, h, w). A mask of ones becomes :attr:`gain`.
        """
        views = self._views(masks_BKhw.shape)
        for _ in range(self.iterations):
            padded = self._pad(masks_BKhw, sizes)
            masks_BKhw = torch.zeros_like(masks_BKhw)
            for n, (rows, cols) in enumerate(views):
                masks_BKhw.addcmul_(affinity_BNhw[:, n : n + 1], padded[:, :, rows, cols])
        return masks_BKhw

    def __call__(
        self, images_BDhw: Tensor, masks_BKhw: Tensor, sizes: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """:meth:`affinity`, then :meth:`refine`.

        Raises:
            UgrlError: Images and masks differ in number or size.
        """
        one, two = images_BDhw.shape, masks_BKhw.shape
        if (one[0], *one[2:]) != (two[0], *two[2:]):
            raise UgrlError(f"PAR: images {tuple(one)} and masks {tuple(two)}, expected the same number and size")
        return self.refine(self.affinity(images_BDhw, sizes), masks_BKhw, sizes)

    def _views(self, shape: torch.Size) -> list[tuple[slice, slice]]:
        reach, height, width = max(self.dilations), shape[-2], shape[-1]
        return [
            (slice(reach + dy, reach + dy + height), slice(reach + dx, reach + dx + width)) for dy, dx in self.offsets
        ]

    def _pad(self, x_BKhw: Tensor, sizes: Sequence[tuple[int, int]] | None) -> Tensor:
        """Repeat the border of every part by the longest distance."""
        reach = max(self.dilations)
        images, channels, height, width = x_BKhw.shape
        if sizes is None:
            return F.pad(x_BKhw, [reach] * 4, mode="replicate")
        last_B2 = (torch.tensor(list(sizes)) - 1).to(x_BKhw.device, non_blocking=True)
        row = torch.arange(-reach, height + reach, device=x_BKhw.device).clamp(min=0)
        col = torch.arange(-reach, width + reach, device=x_BKhw.device).clamp(min=0)
        row_By, col_Bx = torch.minimum(row, last_B2[:, :1]), torch.minimum(col, last_B2[:, 1:])
        index = (row_By[:, :, None] * width + col_Bx[:, None, :]).view(images, 1, -1).expand(-1, channels, -1)
        padded = x_BKhw.flatten(2).gather(2, index)
        return padded.view(images, channels, height + 2 * reach, width + 2 * reach)


@torch.no_grad()
def refine_labels(
    cam_PHW: Tensor,
    pairs_P2: Tensor,
    boxes_B4: Tensor,
    images_B3HW: Tensor,
    *,
    batch: int,
    par: PAR,
    high: float = 0.55,
    low: float = 0.35,
    together: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Pseudo-labels of PAR-refined CAMs.

    Every image is cut to its valid box and halved, so that padding has no say. Two runs, with a background channel
    of ``high`` and of ``low``: softmax over background and the classes present, PAR, back to the box's size. The class
    that wins the high run is the label; background where it wins both; else ignored.

    The confidence is a difference of log-probabilities, which for zero iterations is the distance of
    :func:`ugrl.method.pseudo.pseudo_labels` in the same unit: ``log p_class - log p_background`` of the high run,
    and ``log p_background - log p_best`` of the low run for background.

    Args:
        cam_PHW: Normalised maps in [0, 1).
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` on the CPU.
        images_B3HW: Normalised images (any affine scale per channel).
        batch: Number of images B.
        par: Pixel-adaptive refinement to apply.
        high: Background score of the first run.
        low: Background score of the second run.
        together: Refine all images in one batch instead of one by one; the same labels. ``None``: except on a CPU,
            whose cache one image fills, while one image starves a GPU.

    Returns:
        int64 (B, H, W) labels 0, 1…F or 255 (outside the box: 255); their confidence, 0 where ignored.

    Raises:
        UgrlError: Not ``0 <= low <= high``.
    """
    check_thresholds(high, low)
    height, width = int(cam_PHW.shape[-2]), int(cam_PHW.shape[-1])
    labels_BHW = torch.full((batch, height, width), IGNORE, dtype=torch.int64, device=cam_PHW.device)
    conf_BHW = cam_PHW.new_zeros((batch, height, width))
    images_B3HW = images_B3HW.to(cam_PHW.dtype)
    ranges = spans(pairs_P2, batch)
    boxes: list[list[int]] = boxes_B4.tolist()
    wanted: list[int] = []
    for b, (y0, y1, x0, x1) in enumerate(boxes):
        if ranges[b][0] < ranges[b][1] and y0 < y1 and x0 < x1:
            wanted.append(b)
        else:
            # No class to refine: the same answer as the plain thresholds give for a best CAM of 0.
            labels_BHW[b, y0:y1, x0:x1] = 0
            conf_BHW[b, y0:y1, x0:x1] = low
    if together is None:
        together = cam_PHW.device.type != "cpu"
    groups = [wanted] if together and wanted else [[b] for b in wanted]
    scores_2 = torch.tensor([high, low], dtype=cam_PHW.dtype).to(cam_PHW.device, non_blocking=True)
    for group in groups:
        parts = [_halved(cam_PHW[slice(*ranges[b])], images_B3HW[b], boxes[b], scores_2) for b in group]
        halves, masks = [image for image, _ in parts], [mask for _, mask in parts]
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in halves]
        refined_BKhw = par(*_canvas(halves, masks), None if len(group) == 1 else sizes)
        for b, (h, w), refined_Khw in zip(group, sizes, refined_BKhw, strict=True):
            y0, y1, x0, x1 = boxes[b]
            start, end = ranges[b]
            full_Khw = resize_maps(refined_Khw[: 2 * (end - start), :h, :w], (y1 - y0, x1 - x0))
            classes_2nhw = full_Khw.view(2, end - start, y1 - y0, x1 - x0)
            label, conf = decide(classes_2nhw, par.gain - classes_2nhw.sum(1), pairs_P2[start:end, 1])
            labels_BHW[b, y0:y1, x0:x1] = label
            conf_BHW[b, y0:y1, x0:x1] = conf
    return labels_BHW, conf_BHW


def _halved(cam_nHW: Tensor, image_3HW: Tensor, box: Sequence[int], scores_2: Tensor) -> tuple[Tensor, Tensor]:
    """One image cut to its box and halved, and the softmax of its classes in the high and the low run: (2n, h, w)."""
    y0, y1, x0, x1 = box
    half = max(1, (y1 - y0) // 2), max(1, (x1 - x0) // 2)
    cam_nhw = resize_maps(cam_nHW[:, y0:y1, x0:x1], half)
    background_21hw = scores_2.view(2, 1, 1, 1).expand(2, 1, *half)
    logits_2chw = torch.cat([background_21hw, cam_nhw.expand(2, -1, -1, -1)], 1)
    return resize_maps(image_3HW[:, y0:y1, x0:x1], half), logits_2chw.softmax(1)[:, 1:].flatten(0, 1)


def _canvas(images: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images and masks of different size (and number) in the upper left corners of common zero tensors."""
    if len(images) == 1:
        return images[0][None], masks[0][None]
    height, width = max(x.shape[-2] for x in images), max(x.shape[-1] for x in images)
    most = max(x.shape[0] for x in masks)
    images_B3hw = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    masks_BKhw = masks[0].new_zeros((len(masks), most, height, width))
    for b, (image, mask) in enumerate(zip(images, masks, strict=True)):
        images_B3hw[b, :, : image.shape[-2], : image.shape[-1]] = image
        masks_BKhw[b, : mask.shape[0], : mask.shape[-2], : mask.shape[-1]] = mask
    return images_B3hw, masks_BKhw


def decide(refined_2nhw: Tensor, background_2hw: Tensor, classes_n: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and confidence of one image, from the scores of its classes in the high and the low run.

    Args:
        refined_2nhw: Positive scores of the n classes.
        background_2hw: Those of the background.
        classes_n: int64 classes f, from 0.

    Returns:
        int64 (h, w) labels and their confidence, see :func:`refine_labels`.
    """
    best_2hw, slot_2hw = refined_2nhw.max(1)
    margin_2hw = best_2hw.log() - background_2hw.log()
    # argmax takes the first of equals, and background is channel 0: a class must exceed it.
    is_class, is_ground = margin_2hw[0] > 0, (margin_2hw <= 0).all(0)
    label = torch.full_like(slot_2hw[0], IGNORE)
    for slot, f in enumerate(classes_n.tolist()):
        label = torch.where(is_class & (slot_2hw[0] == slot), f + 1, label)
    label = torch.where(is_ground, 0, label)
    return label, torch.where(is_class, margin_2hw[0], torch.where(is_ground, -margin_2hw[1], 0.0))


@torch.no_grad()
def refined_at(
    cam_PHW: Tensor,
    pairs_P2: Tensor,
    boxes_B4: Tensor,
    images_B3HW: Tensor,
    *,
    par: PAR,
    grounds: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Labels of PAR-refined CAMs at several background scores: the affinity of an image is computed once for all.

    Args:
        cam_PHW: Normalised maps in [0, 1).
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` on the CPU.
        images_B3HW: Normalised images (any affine scale per channel).
        par: Pixel-adaptive refinement to apply.
        grounds: T background scores.

    Returns:
        int64 (T, B, H, W), background where no class exceeds it; and the margin of the best class over background as a
        difference of log-probabilities, of which :func:`refine_labels` makes labels and confidence.
    """
    batch, device = images_B3HW.shape[0], cam_PHW.device
    size = (len(grounds), batch, *cam_PHW.shape[1:])
    scores_T111 = torch.tensor(list(grounds), dtype=cam_PHW.dtype, device=device).view(-1, 1, 1, 1)
    # An image without a class is background by the distance of a CAM of 0.
    labels, margins = torch.zeros(size, dtype=torch.int64, device=device), -scores_T111.expand(size).clone()
    for b, (y0, y1, x0, x1) in enumerate(boxes_B4.tolist()):
        own = (pairs_P2[:, 0] == b).nonzero().flatten()
        if len(own) == 0:
            continue
        half = max(1, (y1 - y0) // 2), max(1, (x1 - x0) // 2)
        cam_nhw = resize_maps(cam_PHW[own.to(device), y0:y1, x0:x1], half)
        ground = scores_T111.expand(-1, 1, *half)
        masks = torch.cat([ground, cam_nhw.expand(len(grounds), -1, -1, -1)], 1).softmax(1)[:, 1:]
        image_3hw = resize_maps(images_B3HW[b, :, y0:y1, x0:x1], half)
        fine = resize_maps(par(image_3hw[None], masks.flatten(0, 1)[None])[0], (y1 - y0, x1 - x0))
        fine = fine.view(len(grounds), len(own), *fine.shape[1:])
        best, slot = fine.max(1)
        margin = best.log() - (par.gain - fine.sum(1)).log()
        classes = (pairs_P2[own, 1] + 1).to(device)[slot]
        labels[:, b, y0:y1, x0:x1] = torch.where(margin > 0, classes, 0)
        margins[:, b, y0:y1, x0:x1] = margin
    return labels, margins
