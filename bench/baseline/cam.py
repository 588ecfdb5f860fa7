"""CAM and pseudo-labels the way the public recipe computes them: every class, every pass whole, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baseline.network import PublicNet
from bench.baseline.par import naive_par
from ugrl.method.refine import PAR
from ugrl.types import IGNORE


@torch.no_grad()
def multi_scale_cam(
    net: PublicNet, images_B3HW: Tensor, boxes_B4: Tensor, *, scales: Sequence[float], mirror: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """CAM of all F classes, the image and its mirror side by side in one batch.

    Returns:
        Min-max normalised maps (B, F, H, W), absent classes included, and F4 and affinity logits of the plain half at
        scale 1.
    """
    batch, _, height, width = images_B3HW.shape
    training = net.net.training
    net.net.eval()
    maps: list[Tensor] = []

    def one(images: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([images, images.flip(-1)]) if mirror else images
        cam, f4_BDhw, affinity_BNN = net.cam_only(both)
        cam = F.interpolate(cam, size=(height, width), mode="bilinear", align_corners=False)
        if mirror:
            cam = torch.max(cam[:batch], cam[batch:].flip(-1))
        maps.append(F.relu(cam))
        return f4_BDhw[:batch], affinity_BNN[:batch]

    f4_BDhw, affinity_BNN = one(images_B3HW)
    kept = [affinity_BNN]  # of every scale, though one is read
    for scale in scales:
        if scale != 1.0:
            size = max(1, round(height * scale)), max(1, round(width * scale))
            kept.append(one(F.interpolate(images_B3HW, size=size, mode="bilinear", align_corners=False))[1])
    net.net.train(training)
    cam_BFHW = torch.sum(torch.stack(maps), dim=0)
    out = torch.zeros_like(cam_BFHW)
    for b, (y0, y1, x0, x1) in enumerate(boxes_B4.tolist()):
        part = cam_BFHW[b : b + 1, :, y0:y1, x0:x1]
        if part.numel() == 0:
            continue
        part = part + F.adaptive_max_pool2d(-part, (1, 1))
        part = part / (F.adaptive_max_pool2d(part, (1, 1)) + 1e-5)
        out[b : b + 1, :, y0:y1, x0:x1] = part
    return out, f4_BDhw, kept[0]


def valid_cam(cam_BFHW: Tensor, tags_BF: Tensor) -> Tensor:
    """Maps of absent classes set to zero by a mask of full size."""
    return tags_BF[:, :, None, None].repeat(1, 1, *cam_BFHW.shape[2:]) * cam_BFHW


@torch.no_grad()
def threshold_labels(valid_BFHW: Tensor, boxes_B4: Tensor, *, high: float, low: float) -> tuple[Tensor, Tensor]:
    """Pseudo-labels by thresholds (B, H, W) and their confidence."""
    best_BHW, label_BHW = valid_BFHW.max(dim=1)
    label_BHW += 1
    confidence_BHW = best_BHW - high
    confidence_BHW[best_BHW <= high] = 0
    label_BHW[best_BHW <= high] = IGNORE
    label_BHW[best_BHW <= low] = 0
    ground_BHW = best_BHW <= low
    confidence_BHW[ground_BHW] = low - best_BHW[ground_BHW]
    return inside(label_BHW, boxes_B4, IGNORE), inside(confidence_BHW, boxes_B4, 0)


def inside(x_BHW: Tensor, boxes_B4: Tensor, outside: int) -> Tensor:
    """A copy with ``outside`` beyond each image's box."""
    out = torch.ones_like(x_BHW) * outside
    for b, (y0, y1, x0, x1) in enumerate(boxes_B4.tolist()):
        out[b, y0:y1, x0:x1] = x_BHW[b, y0:y1, x0:x1]
    return out


@torch.no_grad()
def refined_labels(
    par: PAR, images_B3HW: Tensor, cam_BFHW: Tensor, tags_BF: Tensor, boxes_B4: Tensor, *, high: float, low: float
) -> tuple[Tensor, Tensor]:
    """Pseudo-labels by two runs of PAR, each with its own affinity, and their confidence.

    The public recipe refines the whole crop, padding included, and cuts to the box afterwards.
    """
    batch, _, height, width = images_B3HW.shape
    half = [height // 2, width // 2]
    small = F.interpolate(images_B3HW, size=half, mode="bilinear", align_corners=False)
    runs = []
    for score in (high, low):
        ground = torch.ones_like(cam_BFHW[:, :1]) * score
        with_ground = torch.cat([ground, cam_BFHW], dim=1)
        runs.append(F.interpolate(with_ground, size=half, mode="bilinear", align_corners=False))
    tags_BC = torch.cat([torch.ones_like(tags_BF[:, :1]), tags_BF], dim=1)
    label_BHW = torch.full((batch, height, width), IGNORE, dtype=torch.int64, device=images_B3HW.device)
    confidence_BHW = cam_BFHW.new_zeros((batch, height, width))
    for b, (y0, y1, x0, x1) in enumerate(boxes_B4.tolist()):
        key = torch.nonzero(tags_BC[b])[:, 0]
        won, margins = [], []
        for logits in runs:
            masks = logits[b, key][None].softmax(dim=1)
            fine = naive_par(par, small[b : b + 1], masks)
            fine = F.interpolate(fine, size=(height, width), mode="bilinear", align_corners=False)[0]
            won.append(key[fine.argmax(dim=0)])
            if len(key) > 1:
                margins.append(fine[1:].max(dim=0).values.log() - fine[0].log())
            else:
                margins.append(torch.full_like(fine[0], -low))
        label = won[0].clone()
        label[won[0] == 0] = IGNORE
        label[(won[0] + won[1]) == 0] = 0
        confidence = margins[0].clone()
        confidence[label == IGNORE] = 0
        confidence[label == 0] = -margins[1][label == 0]
        label_BHW[b, y0:y1, x0:x1] = label[y0:y1, x0:x1]
        confidence_BHW[b, y0:y1, x0:x1] = confidence[y0:y1, x0:x1]
    return label_BHW, confidence_BHW
