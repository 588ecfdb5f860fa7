"""A row and a random state make a sample; nothing else goes in.

The crop is taken before the resize: only the pixels that the crop shows are resampled, so the cost is
bounded by the crop and not by the scaled image. JPEG's reduced-size decoding is not used: its pixels
differ between decoder builds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ugrl.data.images import decode_labels, decode_rgb
from ugrl.errors import DataError
from ugrl.types import IGNORE, Row, Sample

# ImageNet statistics of RGB in [0, 1], those of the published encoder weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The same as one factor and one offset for values in 0…255.
_FACTOR = (1 / (255 * np.array(IMAGENET_STD))).astype(np.float32)
_OFFSET = (np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)).astype(np.float32)


def normalize(pixels_HW3: np.ndarray, out_3HW: np.ndarray | None = None) -> np.ndarray:
    """uint8 RGB (H, W, 3) as ImageNet-normalised float32 (3, H, W), into ``out_3HW`` where given."""
    if out_3HW is None:
        out_3HW = np.empty((3, *pixels_HW3.shape[:2]), np.float32)
    for c in range(3):
        plane_HW = out_3HW[c]  # a view: three passes in place are four times as fast as a table
        plane_HW[...] = pixels_HW3[:, :, c]
        plane_HW *= _FACTOR[c]
        plane_HW -= _OFFSET[c]
    return out_3HW


def tags_vector(tags: tuple[int, ...], num_classes: int) -> np.ndarray:
    """Tags 1…F as float32 (F,) of 0 and 1."""
    tags_F = np.zeros(num_classes, np.float32)
    tags_F[[t - 1 for t in tags]] = 1
    return tags_F


@dataclass(frozen=True, slots=True)
class Augment:
    """Random scale, mirror and crop.

    Attributes:
        crop: Side of the square sample, pixels.
        num_classes: F.
        scale_min: Smallest scale, relative to the original image.
        scale_max: Largest scale.
        mirror: Whether half of the samples are mirrored.
    """

    crop: int
    num_classes: int
    scale_min: float = 0.5
    scale_max: float = 2.0
    mirror: bool = True

    def __call__(self, row: Row, rng: np.random.Generator) -> Sample:
        """Cut a sample.

        Always four uniform draws, in this order: scale, mirror, row offset, column offset.

        Args:
            row: Image, tags and perhaps a mask.
            rng: See :func:`ugrl.data.order.sample_rng`.

        Returns:
            A sample of side ``crop``; where the scaled image is smaller it lies at a random offset in
            zeros, and its box says where.

        Raises:
            DataError: The image or mask is broken.
        """
        u_scale, u_mirror, u_y, u_x = rng.random(4)
        image = decode_rgb(row.image, f"row {row.id}")
        scale = self.scale_min + (self.scale_max - self.scale_min) * u_scale
        x0, x1, left, right = _place(image.width, scale, self.crop, u_x)
        y0, y1, top, bottom = _place(image.height, scale, self.crop, u_y)
        size, region = (x1 - x0, y1 - y0), (left, top, right, bottom)
        flip = self.mirror and u_mirror < 0.5
        if flip:
            x0, x1 = self.crop - x1, self.crop - x0

        step = -1 if flip else 1
        pixels_HW3 = np.asarray(_resample(image, size, region, Image.Resampling.BILINEAR))[:, ::step]
        image_3HW = np.zeros((3, self.crop, self.crop), np.float32)
        normalize(pixels_HW3, image_3HW[:, y0:y1, x0:x1])
        mask_HW = None
        if row.mask is not None:
            labels = _labels(row, image.size)
            mask_HW = np.full((self.crop, self.crop), IGNORE, np.uint8)
            nearest = _resample(labels, size, region, Image.Resampling.NEAREST)
            mask_HW[y0:y1, x0:x1] = np.asarray(nearest)[:, ::step]
        return Sample(
            id=row.id,
            image_3HW=image_3HW,
            tags_F=tags_vector(row.tags, self.num_classes),
            mask_HW=mask_HW,
            box_4=np.array([y0, y1, x0, x1], np.int64),
        )


def _place(length: int, scale: float, crop: int, u: float) -> tuple[int, int, float, float]:
    """One axis: where the image lies in the crop (two integers), and which of its pixels (two numbers)."""
    scaled = max(1, round(length * scale))
    offset = int(u * (abs(scaled - crop) + 1))
    if scaled <= crop:
        return offset, offset + scaled, 0.0, float(length)
    ratio = length / scaled
    return 0, crop, offset * ratio, min((offset + crop) * ratio, float(length))


def _resample(
    image: Image.Image, size: tuple[int, int], region: tuple[float, float, float, float], how: Image.Resampling
) -> Image.Image:
    if region == (0, 0, *image.size) and size == image.size:
        return image
    return image.resize(size, how, box=region)


def _labels(row: Row, size: tuple[int, int]) -> Image.Image:
    labels = decode_labels(row.mask or b"", f"row {row.id}")
    if labels.size != size:
        raise DataError(
            f"row {row.id}: the mask is {labels.width}×{labels.height}; expected {size[0]}×{size[1]} as the image"
        )
    return labels


def eval_sample(row: Row, num_classes: int) -> Sample:
    """The whole image as it is: no scaling, no padding.

    Args:
        row: Image, tags and perhaps a mask.
        num_classes: F.

    Raises:
        DataError: The image or mask is broken.
    """
    image = decode_rgb(row.image, f"row {row.id}")
    return Sample(
        id=row.id,
        image_3HW=normalize(np.asarray(image)),
        tags_F=tags_vector(row.tags, num_classes),
        mask_HW=None if row.mask is None else np.array(_labels(row, image.size)),
        box_4=np.array([0, image.height, 0, image.width], np.int64),
    )
