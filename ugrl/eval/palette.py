"""Pixels for people: the Pascal VOC colour map, palette PNGs, and images back from their normalised form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ugrl.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ugrl.files import replacing


def voc_palette() -> np.ndarray:
    """The 256 colours of the VOC devkit, uint8 (256, 3): bits of the index dealt to R, G, B in turn.

    >>> voc_palette()[[0, 1, 15, 255]].tolist()
    [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.int64)
    for shift in range(7, -1, -1):
        for channel in range(3):
            colours[:, channel] |= (index >> channel & 1) << shift
        index = index >> 3
    return colours.astype(np.uint8)


PALETTE = voc_palette()
# Stands in the masks that are written here, so that they are known from those that somebody drew.
WRITER = "ugrl predict"


def write_mask(
    path: Path, labels_HW: np.ndarray, colours: np.ndarray = PALETTE, notes: Mapping[str, str] | None = None
) -> None:
    """Write uint8 labels as a palette PNG (the format of VOC's submissions).

    Args:
        path: The file.
        labels_HW: uint8.
        colours: uint8 (256, 3), by label.
        notes: Texts to keep in the file, by keyword.
    """
    image = Image.fromarray(labels_HW.astype(np.uint8), mode="P")
    image.putpalette(colours.flatten().tolist())
    texts = PngInfo()
    texts.add_text("Software", WRITER)
    for name, text in (notes or {}).items():
        texts.add_itxt(name, text)
    with replacing(path, durable=False) as draft:
        image.save(draft, format="PNG", pnginfo=texts)


def denormalize(image_3HW: np.ndarray) -> np.ndarray:
    """Undo the ImageNet normalisation: float (3, H, W) → uint8 (H, W, 3)."""
    unit = image_3HW.transpose(1, 2, 0) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    return (unit * 255.0).round().clip(0, 255).astype(np.uint8)
