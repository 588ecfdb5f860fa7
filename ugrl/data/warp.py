"""Resampling of one crop: what "resize the whole image, then cut" shows, at the cost of about the crop alone.

The resize is the antialiased bilinear one that Pillow defines: a triangle as wide as the step between
output pixels, at least two source pixels, its weights normalised over the pixels that exist. Where it
enlarges that is plain bilinear interpolation, and OpenCV does it; where it shrinks, torch's 8-bit kernel,
a vectorised form of Pillow's. Both differ from Pillow by single levels of 255; OpenCV, which cuts off where
Pillow rounds, is up to a third of a level darker on average. Without OpenCV, Pillow does its part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# OpenCV's resize starts at the image's corner and passes by what it does not need, at half of the cost
# per pixel of its warp, which does not.
_DETOUR = 2
# The same for torch's resize, of the whole image, against Pillow's of a box.
_WHOLE = 4


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a resize and a cut.

    Attributes:
        length: Pixels of the image along the axis.
        scaled: Pixels of the resized image.
        offset: First of them that is kept.
        size: How many of them are kept.
    """

    length: int
    scaled: int
    offset: int
    size: int

    @property
    def ratio(self) -> float:
        """Source pixels per pixel of the resized image."""
        return self.length / self.scaled

    @property
    def source(self) -> tuple[float, float]:
        """The part of the image that is shown, in its pixels."""
        return self.offset * self.ratio, min((self.offset + self.size) * self.ratio, float(self.length))

    @property
    def reach(self) -> tuple[int, int]:
        """Half-open range of the source pixels that any kept pixel depends on."""
        first, last = self.source
        support = max(1.0, self.ratio)
        return max(0, math.floor(first - support)), min(self.length, math.ceil(last + support))


@cache
def opencv() -> Any | None:
    """OpenCV on one thread, or ``None``; before version 5 its warp rounds positions to 1/32 pixel."""
    try:
        import cv2
    except ImportError:
        return None
    if int(cv2.__version__.split(".")[0]) < 5:
        return None
    cv2.setNumThreads(0)  # the loader's threads are enough
    return cv2


def resample(image_HW3: np.ndarray, y: Axis, x: Axis) -> np.ndarray:
    """The kept part of the resized image.

    Args:
        image_HW3: uint8, of ``y.length`` × ``x.length`` pixels.
        y: The cut along rows.
        x: The cut along columns.

    Returns:
        uint8 (y.size, x.size, 3); may be a view.
    """
    if y.scaled == y.length and x.scaled == x.length:
        return image_HW3[y.offset : y.offset + y.size, x.offset : x.offset + x.size]
    if y.scaled >= y.length and x.scaled >= x.length:
        return _enlarge(image_HW3, y, x)
    return _shrink(image_HW3, y, x)


def _enlarge(image_HW3: np.ndarray, y: Axis, x: Axis) -> np.ndarray:
    cv2 = opencv()
    if cv2 is None:
        return _pillow(image_HW3, y, x)
    bottom, right = y.reach[1], x.reach[1]
    if bottom / y.ratio * right / x.ratio <= _DETOUR * y.size * x.size:
        wide_HW3 = cv2.resize(
            image_HW3[:bottom, :right], None, fx=1 / x.ratio, fy=1 / y.ratio, interpolation=cv2.INTER_LINEAR
        )
        return wide_HW3[y.offset : y.offset + y.size, x.offset : x.offset + x.size]
    top, left = y.reach[0], x.reach[0]
    # Four channels: OpenCV warps them in a third of the time of three.
    part_HW4 = cv2.cvtColor(image_HW3[top:bottom, left:right], cv2.COLOR_RGB2RGBA)
    source_23 = np.array(
        [
            [x.ratio, 0.0, (x.offset + 0.5) * x.ratio - 0.5 - left],
            [0.0, y.ratio, (y.offset + 0.5) * y.ratio - 0.5 - top],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    crop_HW4 = cv2.warpAffine(part_HW4, source_23, (x.size, y.size), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(crop_HW4, cv2.COLOR_RGBA2RGB)


def _shrink(image_HW3: np.ndarray, y: Axis, x: Axis) -> np.ndarray:
    (top, bottom), (left, right) = y.reach, x.reach
    if _WHOLE * (bottom - top) * (right - left) < y.length * x.length:
        return _pillow(image_HW3, y, x)
    # This kernel runs in the calling thread, whatever torch's number of threads.
    image_13HW = torch.from_numpy(image_HW3).permute(2, 0, 1)[None]
    small_13HW = F.interpolate(image_13HW, size=(y.scaled, x.scaled), mode="bilinear", antialias=True)
    small_HW3 = small_13HW[0].permute(1, 2, 0).numpy()
    return small_HW3[y.offset : y.offset + y.size, x.offset : x.offset + x.size]


def _pillow(image_HW3: np.ndarray, y: Axis, x: Axis) -> np.ndarray:
    (top, bottom), (left, right) = y.source, x.source
    image = Image.fromarray(image_HW3)
    return np.asarray(image.resize((x.size, y.size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def nearest(labels: Image.Image, y: Axis, x: Axis) -> np.ndarray:
    """The same part of a label image, without blending: uint8 (y.size, x.size)."""
    (top, bottom), (left, right) = y.source, x.source
    if (top, bottom, left, right) == (0, y.size, 0, x.size) and labels.size == (x.size, y.size):
        return np.asarray(labels)
    return np.asarray(labels.resize((x.size, y.size), Image.Resampling.NEAREST, box=(left, top, right, bottom)))
