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

from ugrl import bilinear
from ugrl.errors import UgrlError
from ugrl.grid import inside_pixels, resize_maps
from ugrl.model.specs import scaled

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class CamPass:
    """Which of the passes a forward pass serves.

    Attributes:
        scale: Factor of the image size.
        mirrored: Whether the images are mirrored.
        plain: Whether this is the first pass, over the images as they are. Its features are returned, and of it alone
            the affinity is of use, but for AFA's propagation.
        largest: Whether it is the pass of the largest scale over the images that are not mirrored.
    """

    scale: float
    mirrored: bool
    plain: bool = False
    largest: bool = False


# Images (B, 3, H', W') and what they are → raw class scores (B, F, h, w), last-stage features (B, D, h, w), affinity
# logits (B, N, N) or None.
Forward = Callable[[Tensor, CamPass], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class CamOutput:
    """What the CAM passes yield; nothing here has a gradient.

    Attributes:
        cam_PHW: float32 (float64 for float64 scores), in [0, 1), zero outside the box.
        f4_BDhw: Last-stage features of the plain pass at scale 1.
        affinity_BNN: Affinity logits of the same pass, or ``None`` if ``forward`` gave none.
        aux_PHW: The auxiliary classifier's maps of the same pairs, where they are wanted.
        largest_BNN: Affinity logits of the pass of the largest scale, or ``None`` if ``forward`` gave none.
        largest_grid: Cells ``(h, w)`` of that pass's last map.
    """

    cam_PHW: Tensor
    f4_BDhw: Tensor
    affinity_BNN: Tensor | None
    aux_PHW: Tensor | None = None
    largest_BNN: Tensor | None = None
    largest_grid: tuple[int, int] = (0, 0)


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
    inside_PHW = inside_pixels(boxes_B4[pairs_P2[:, 0]], (height, width), cam_PHW.device)
    low_P11 = cam_PHW.masked_fill(~inside_PHW, torch.inf).amin((1, 2), keepdim=True)
    high_P11 = cam_PHW.masked_fill(~inside_PHW, -torch.inf).amax((1, 2), keepdim=True)
    scaled = (cam_PHW - low_P11) / (high_P11 - low_P11 + EPS)
    return torch.where(inside_PHW, scaled, torch.zeros_like(scaled))


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
    exist for one pass only, and a network that communicates cannot hang. The plain pass comes first.

    Args:
        forward: Told which pass it serves (:class:`CamPass`). The caller sees to evaluation mode.
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
    size = (int(images_B3HW.shape[-2]), int(images_B3HW.shape[-1]))
    pairs = pairs_P2.to(images_B3HW.device, non_blocking=True)

    def present(raw_BFhw: Tensor) -> Tensor:
        raw_Phw = raw_BFhw[pairs[:, 0], pairs[:, 1]]
        return raw_Phw if raw_Phw.dtype == torch.float64 else raw_Phw.float()

    def both(images: Tensor, raw_BFhw: Tensor, scale: float) -> Tensor:
        cam_PHW = resize_maps(present(raw_BFhw), size)
        if mirror:
            # Bilinear resizing commutes with mirroring: flip the small map, not the large one.
            flipped_Phw = present(forward(images.flip(-1), CamPass(scale, mirrored=True))[0]).flip(-1)
            cam_PHW = torch.maximum(cam_PHW, resize_maps(flipped_Phw, size))
        return cam_PHW.relu()

    most = max(scales)
    plain = CamPass(1.0, mirrored=False, plain=True, largest=most == 1.0)
    raw_BFhw, f4_BDhw, affinity_BNN = forward(images_B3HW, plain)
    largest_BNN, grid = affinity_BNN, (int(f4_BDhw.shape[-2]), int(f4_BDhw.shape[-1]))
    total_PHW = both(images_B3HW, raw_BFhw, 1.0)
    others = list(scales)
    others.remove(1.0)
    for scale in others:
        images = bilinear.resize(images_B3HW, scaled(size, scale, least))
        raw_BFhw, last_BDhw, logits_BNN = forward(images, CamPass(scale, mirrored=False, largest=scale == most))
        if scale == most:
            largest_BNN, grid = logits_BNN, (int(last_BDhw.shape[-2]), int(last_BDhw.shape[-1]))
        total_PHW = total_PHW + both(images, raw_BFhw, scale)
    return CamOutput(
        normalise(total_PHW, pairs_P2, boxes_B4),
        f4_BDhw,
        affinity_BNN,
        largest_BNN=largest_BNN,
        largest_grid=grid,
    )
