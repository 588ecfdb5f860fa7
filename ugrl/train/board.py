"""Scalars and pictures for TensorBoard, through tensorboardX where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ugrl.eval.palette import PALETTE, denormalize
from ugrl.types import Batch


class Board:
    """Writes to ``folder``; does nothing without tensorboardX (``ugrl`` runs without it)."""

    def __init__(self, folder: Path | None) -> None:
        self.writer: Any = None
        if folder is None:
            return
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self.writer = SummaryWriter(str(folder))

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """One point per value under ``group/``."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def pictures(self, batch: Batch, views: Mapping[str, Tensor], step: int, most: int = 4) -> None:
        """One row per image: image, CAM of its classes, pseudo-label, prediction, uncertainty (and mask)."""
        if self.writer:
            self.writer.add_image("train/walk", sheet(batch, views, most), step, dataformats="HWC")
            self.writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if self.writer:
            self.writer.close()


def heat(x_HW: np.ndarray) -> np.ndarray:
    """A map in [0, 1] as blue–yellow–red, uint8 (H, W, 3)."""
    x = np.clip(x_HW, 0.0, 1.0)[..., None]
    stops = np.array([[13, 8, 80], [60, 120, 200], [250, 230, 90], [200, 20, 20]], dtype=np.float64)
    at = x[..., 0] * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    part = (at - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).astype(np.uint8)


def sheet(batch: Batch, views: Mapping[str, Tensor], most: int = 4) -> np.ndarray:
    """The picture of :meth:`Board.pictures`, uint8 (rows·H, columns·W, 3)."""
    rows = []
    pairs = batch.pairs_P2
    for k in range(min(most, len(batch.ids))):
        image = denormalize(batch.images_B3HW[k].float().cpu().numpy())
        h, w = image.shape[:2]
        columns = [image]
        if "cam" in views:
            own = (pairs[:, 0] == k).nonzero().flatten()
            cam = views["cam"][own.to(views["cam"].device)].float()
            top = cam.amax(0).cpu().numpy() if len(own) else np.zeros((h, w))
            columns.append((0.4 * image + 0.6 * heat(top)).astype(np.uint8))
        if "labels" in views:
            columns.append(PALETTE[views["labels"][k].cpu().numpy()])
        if "prediction" in views:
            logits = views["prediction"][k : k + 1].float()
            full = torch.nn.functional.interpolate(logits, size=(h, w), mode="bilinear", align_corners=False)
            columns.append(PALETTE[full.argmax(1)[0].cpu().numpy()])
        if "u" in views:
            columns.append(heat(views["u"][k].float().cpu().numpy()))
        if batch.masks_BHW is not None:
            columns.append(PALETTE[batch.masks_BHW[k].cpu().numpy()])
        rows.append(np.concatenate(columns, axis=1))
    return np.concatenate(rows, axis=0)
