"""Validation the way the public recipe does it: one image at a time, whole passes, labels brought to the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baseline.cam import multi_scale_cam, valid_cam
from bench.baseline.network import PublicNet
from ugrl.config import Config
from ugrl.data.augment import eval_sample
from ugrl.data.reader import ShardReader
from ugrl.model.network import UGRLNet
from ugrl.types import IGNORE


def mean_iou(truths: Sequence[np.ndarray], guesses: Sequence[np.ndarray], classes: int) -> float:
    """Mean IoU over the classes of the ground truth, from one histogram per image on the host."""
    matrix = np.zeros((classes, classes))
    for truth, guess in zip(truths, guesses, strict=True):
        valid = (truth >= 0) & (truth < classes)
        cells = classes * truth[valid].astype(int) + guess[valid]
        matrix += np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    hit, here = np.diag(matrix), matrix.sum(axis=1) > 0
    return float(np.mean((hit / np.maximum(matrix.sum(axis=1) + matrix.sum(axis=0) - hit, 1))[here]))


def scores(net: PublicNet, images_B3HW: Tensor, scales: Sequence[float], mirror: bool) -> Tensor:
    """Class probabilities at the image's size; every scale's image and its mirror in one batch."""
    size = (images_B3HW.shape[-2], images_B3HW.shape[-1])
    total = None
    for scale in scales:
        x = images_B3HW
        if scale != 1.0:
            least = net.net.encoder.spec.min_size
            to = [max(least, round(n * scale)) for n in size]
            x = F.interpolate(x, size=to, mode="bilinear", align_corners=False)
        if mirror:
            x = torch.cat([x, x.flip(-1)])
        seg = F.interpolate(net(x).seg_BChw, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
        if mirror:
            seg = seg[:1] + seg[1:].flip(-1)
        total = seg if total is None else total + seg
    assert total is not None
    return total / (len(scales) * (2 if mirror else 1))


@torch.no_grad()
def public_validation(
    net: UGRLNet, reader: ShardReader, cfg: Config, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Segmentation and CAM mIoU of a split.

    Args:
        net: Put into eval mode and back.
        reader: The split, with masks.
        cfg: ``eval`` and ``method.cam`` are read.
        device: Where the network is.
        dtype: Of the network.

    Returns:
        ``seg_miou`` and ``cam_miou``, named as in :func:`ugrl.eval.evaluate.evaluate`, and ``tags``: classes that
        the classifier found in an image.
    """
    training = net.training
    net.eval()
    public = PublicNet(net)
    classes = len(reader.manifest.class_names) + 1
    truths: list[np.ndarray] = []
    guesses: list[np.ndarray] = []
    cams: list[np.ndarray] = []
    tagged = 0
    several = cfg.eval.mirror or tuple(cfg.eval.seg_scales) != (1.0,)
    for index in range(len(reader)):
        sample = eval_sample(reader[index], num_classes=classes - 1)
        image = torch.from_numpy(sample.image_3HW)[None].to(device, dtype)
        tags = torch.from_numpy(sample.tags_F)[None].to(device, dtype)
        truth = sample.mask_HW
        assert truth is not None
        out = public(image)
        tagged += int((out.logits_BF > 0).sum().item())
        seg = F.interpolate(out.seg_BChw, size=truth.shape, mode="bilinear", align_corners=False)
        if several:
            seg = scores(public, image, cfg.eval.seg_scales, cfg.eval.mirror)
        box = torch.tensor([[0, truth.shape[0], 0, truth.shape[1]]])
        cam, _, _ = multi_scale_cam(public, image, box, scales=cfg.method.cam.scales, mirror=cfg.method.cam.mirror)
        best, label = valid_cam(cam, tags).max(dim=1)
        label += 1
        label[best <= cfg.eval.cam_background] = 0
        guesses.append(seg.argmax(dim=1).cpu().numpy().astype(np.int16)[0])
        cams.append(label.cpu().numpy().astype(np.int16)[0])
        truths.append(np.where(truth == IGNORE, -1, truth.astype(np.int16)))
    net.train(training)
    return {
        "seg_miou": mean_iou(truths, guesses, classes),
        "cam_miou": mean_iou(truths, cams, classes),
        "tags": tagged / len(reader),
    }
