"""Draws docs/img/walk.png: photograph, CAM, predicted mask and true mask, from a real run on generated images.

    ugrl-train --config shapes --out build/picture
    python docs/picture.py build/picture

The images are the first ones of ``val`` that show two classes or more: they are not chosen by what came out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from ugrl.config import EvalConfig
from ugrl.data.reader import ShardReader
from ugrl.eval.combine import combined_scores
from ugrl.eval.palette import PALETTE, denormalize
from ugrl.eval.passes import shape_batches
from ugrl.method.cam import multi_scale_cam
from ugrl.train.restore import restore

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

OUT = Path(__file__).parent / "img" / "walk.png"
IMAGES = 3
TITLES = ("image", "CAM of its tags", "predicted mask", "true mask (never seen)")


@torch.no_grad()
def panels(run: str) -> list[list[np.ndarray]]:
    """For each image its four pictures, uint8 (H, W, 3)."""
    got = restore(run, device=torch.device("cpu"))
    net, cam_cfg = got.net, got.cfg.method.cam
    assert got.cfg.data.shards is not None
    reader = ShardReader(got.cfg.data.shards, "val")
    at = [i for i in range(64) if len(reader[i].tags) >= 2][:IMAGES]

    def forward(images_B3HW: Tensor, affinity: bool) -> tuple[Tensor, Tensor, None]:
        features, _ = net.encoder(images_B3HW)
        return net.raw_from(features[3]), features[3], None

    (batch,) = shape_batches(reader, at, 0)
    maps_PHW = multi_scale_cam(
        forward,
        batch.images_B3HW,
        batch.pairs_P2,
        batch.boxes_B4,
        scales=cam_cfg.scales,
        mirror=cam_cfg.mirror,
        least=net.min_size,
    ).cam_PHW
    labels_BHW = combined_scores(net, batch.images_B3HW, EvalConfig()).argmax(1)
    assert batch.masks_BHW is not None
    rows = []
    for k in range(len(at)):
        image = denormalize(batch.images_B3HW[k].numpy())
        # Each class in its colour, as bright as its map.
        heat = np.zeros(image.shape)
        for (b, f), map_HW in zip(batch.pairs_P2.tolist(), maps_PHW.numpy(), strict=True):
            if b == k:
                heat = np.maximum(heat, map_HW[..., None] * PALETTE[f + 1])
        shown = (0.35 * image.mean(2, keepdims=True) + heat).clip(0, 255).astype(np.uint8)
        rows.append([image, shown, PALETTE[labels_BHW[k].numpy()], PALETTE[batch.masks_BHW[k].numpy()]])
    return rows


def draw(rows: list[list[np.ndarray]]) -> None:
    """All rows as one PNG."""
    figure, axes = plt.subplots(len(rows), len(TITLES), figsize=(8, 2.05 * len(rows) + 0.25), dpi=100)
    for row, line in zip(axes, rows, strict=True):
        for cell, pixels in zip(row, line, strict=True):
            cell.imshow(pixels, interpolation="nearest")
            cell.set_axis_off()
    for cell, title in zip(axes[0], TITLES, strict=True):
        cell.set_title(title, fontsize=10)
    figure.tight_layout(pad=0.4)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, facecolor="white")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    draw(panels(sys.argv[1]))
