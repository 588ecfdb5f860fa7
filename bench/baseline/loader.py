"""The public input recipe: everything is done to the whole image, in floats, on the host.

Decode with Pillow; for each view a copy of the image, resized whole, turned to floats and mirrored; laid into a float
canvas of at least the crop's size, whose colour is set first; the crop sliced, normalised channel by channel, channels
first. An item has two views. The random numbers are those of our cuts, so that both sides make the same crops, but for
the padding: here it is black before it is normalised, ours is 0 after. Left out here: the label image that the public
code reads for each item and does not use, and its image reading library's own overhead.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ugrl.data.augment import Augment, Cut
from ugrl.data.order import sample_rng
from ugrl.data.reader import ShardReader

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
PADDING = (0.0, 0.0, 0.0)


def view(image_HW3: np.ndarray, cut: Cut, crop: int) -> np.ndarray:
    """One crop of an image: float32 (3, crop, crop), a view of (crop, crop, 3)."""
    size = (cut.x.scaled, cut.y.scaled)
    resized = Image.fromarray(image_HW3.copy()).resize(size, Image.Resampling.BILINEAR)
    scaled_HW3 = np.asarray(resized).astype(np.float32)
    if cut.flip:
        scaled_HW3 = np.fliplr(scaled_HW3)

    height, width = scaled_HW3.shape[:2]
    canvas_HW3 = np.zeros((max(crop, height), max(crop, width), 3), np.float32)
    for c in range(3):
        canvas_HW3[:, :, c] = PADDING[c]
    top, left = cut.top, cut.left  # 0 where the image is larger than the crop
    canvas_HW3[top : top + height, left : left + width] = scaled_HW3
    row = cut.y.offset
    column = cut.x.scaled - cut.x.offset - cut.x.size if cut.flip else cut.x.offset
    crop_CC3 = canvas_HW3[row : row + crop, column : column + crop]

    normal_CC3 = np.empty_like(crop_CC3, np.float32)
    for c in range(3):
        normal_CC3[..., c] = (crop_CC3[..., c] - MEAN[c]) / STD[c]
    return normal_CC3.transpose(2, 0, 1)


def item(data: bytes, id: str, augment: Augment, seed: int, views: int) -> list[np.ndarray]:
    """The views of one image: those that our loader makes of it in the first epochs."""
    image_HW3 = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width = image_HW3.shape[:2]
    cuts = [augment.cut(height, width, sample_rng(seed, epoch, id)) for epoch in range(views)]
    return [view(image_HW3, cut, augment.crop) for cut in cuts]


def stack(items: list[list[np.ndarray]]) -> list[Tensor]:
    """What torch's default collation makes of items: one tensor (B, 3, crop, crop) a view."""
    return [torch.stack([torch.as_tensor(x) for x in view]) for view in zip(*items, strict=True)]


class PublicDataset(Dataset[list[np.ndarray]]):
    """The recipe over a split of shards."""

    def __init__(self, open_reader: Callable[[], ShardReader], augment: Augment, seed: int, views: int) -> None:
        self.open_reader, self.augment, self.seed, self.views = open_reader, augment, seed, views
        self.reader: ShardReader | None = None
        self.rows = len(open_reader())

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> list[np.ndarray]:
        """The views of a row."""
        if self.reader is None:  # opened in the process that reads
            self.reader = self.open_reader()
        row = self.reader[index]
        return item(row.image, row.id, self.augment, self.seed, self.views)
