"""A row and a random state make a sample; nothing else goes in.

Only the pixels that the crop shows are resampled (:mod:`ugrl.data.warp`), so the cost is bounded by the
image and the crop and not by the scaled image. JPEG's reduced-size decoding is not used: its pixels
differ between decoder builds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ugrl.config import DataConfig
from ugrl.data.images import decode_labels, decode_pixels
from ugrl.data.warp import Axis, nearest, opencv, resample
from ugrl.errors import DataError
from ugrl.types import IGNORE, Row, Sample

# ImageNet statistics of RGB in [0, 1], those of the published encoder weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The same as one factor and one offset for values in 0…255.
FACTOR = (1 / (255 * np.array(IMAGENET_STD))).astype(np.float32)
OFFSET = (np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)).astype(np.float32)

# What `data.pad` puts around an image, normalised: the mean colour is 0, and black is what normalising makes of 0.
PADDING = {"mean": np.zeros(3, np.float32), "black": -OFFSET}


def normalize(pixels_HW3: np.ndarray, out_3HW: np.ndarray | None = None) -> np.ndarray:
    """uint8 RGB (H, W, 3) as ImageNet-normalised float32 (3, H, W), into ``out_3HW`` where given."""
    if out_3HW is None:
        out_3HW = np.empty((3, *pixels_HW3.shape[:2]), np.float32)
    cv2 = opencv()
    planes = cv2.split(pixels_HW3) if cv2 is not None else pixels_HW3.transpose(2, 0, 1)
    for c in range(3):
        plane_HW = out_3HW[c]  # a view: three passes in place are four times as fast as a table
        plane_HW[...] = planes[c]
        plane_HW *= FACTOR[c]
        plane_HW -= OFFSET[c]
    return out_3HW


def tags_vector(tags: tuple[int, ...], num_classes: int) -> np.ndarray:
    """Tags 1…F as float32 (F,) of 0 and 1."""
    tags_F = np.zeros(num_classes, np.float32)
    tags_F[[t - 1 for t in tags]] = 1
    return tags_F


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of the scaled image a sample shows, and where.

    Attributes:
        y: The cut along rows.
        x: Columns, before any mirroring.
        top: First row of the crop that shows the image.
        left: First column of the crop that shows the image, after any mirroring.
        flip: Whether the sample is mirrored.
    """

    y: Axis
    x: Axis
    top: int
    left: int
    flip: bool

    @property
    def box_4(self) -> tuple[int, int, int, int]:
        """``(y0, y1, x0, x1)`` in the crop."""
        return self.top, self.top + self.y.size, self.left, self.left + self.x.size


@dataclass(frozen=True, slots=True)
class Augment:
    """Random scale, mirror and crop.

    Attributes:
        crop: Side of the square sample, pixels.
        num_classes: F, the foreground classes.
        scale_min: Smallest scale, relative to the original image.
        scale_max: Largest scale, relative to the original image; drawn uniformly.
        mirror: Whether half of the samples are mirrored.
        pad: Colour around the image, a key of :data:`PADDING`.
        rounding: How a scaled side becomes whole pixels: to the ``nearest``, or down (``floor``).
    """

    crop: int
    num_classes: int
    scale_min: float = 0.5
    scale_max: float = 2.0
    mirror: bool = True
    pad: str = "mean"
    rounding: str = "nearest"

    @classmethod
    def of(cls, data: DataConfig, num_classes: int) -> Augment:
        """What the section ``data`` of a run says."""
        return cls(data.crop, num_classes, data.scale_min, data.scale_max, data.mirror, data.pad, data.rounding)

    def __call__(self, row: Row, rng: np.random.Generator) -> Sample:
        """Cut a sample.

        Args:
            row: Image, tags and perhaps a mask.
            rng: See :func:`ugrl.data.order.sample_rng`.

        Returns:
            A sample of side ``crop``; where the scaled image is smaller it lies at a random offset in
            the padding, and its box says where.

        Raises:
            DataError: The image or mask is broken.
        """
        image_HW3 = decode_pixels(row.image, f"row {row.id}")
        cut = self.cut(image_HW3.shape[0], image_HW3.shape[1], rng)
        image_3HW = np.empty((3, self.crop, self.crop), np.float32)
        self.floats(image_HW3, cut, image_3HW)
        return Sample(
            id=row.id,
            image_3HW=image_3HW,
            tags_F=tags_vector(row.tags, self.num_classes),
            mask_HW=self.mask(row, cut),
            box_4=np.array(cut.box_4, np.int64),
            teacher_HW=self.teacher(row, cut),
        )

    def cut(self, height: int, width: int, rng: np.random.Generator) -> Cut:
        """Draw a cut of an image of that size.

        Always four uniform draws, in this order: scale, mirror, row offset, column offset.
        """
        u_scale, u_mirror, u_y, u_x = (float(u) for u in rng.random(4))
        scale = self.scale_min + (self.scale_max - self.scale_min) * u_scale
        y, top = self._place(height, scale, u_y)
        x, left = self._place(width, scale, u_x)
        flip = self.mirror and u_mirror < 0.5
        return Cut(y, x, top, self.crop - left - x.size if flip else left, flip)

    def _place(self, length: int, scale: float, u: float) -> tuple[Axis, int]:
        """One axis: what is shown of the image, and where in the crop it begins."""
        scaled = max(1, int(length * scale) if self.rounding == "floor" else round(length * scale))
        offset = int(u * (abs(scaled - self.crop) + 1))
        if scaled <= self.crop:
            return Axis(length, scaled, 0, scaled), offset
        return Axis(length, scaled, offset, self.crop), 0

    def pixels(self, image_HW3: np.ndarray, cut: Cut, out_CC3: np.ndarray | None = None) -> np.ndarray:
        """What a cut shows of an image, resampled and mirrored: uint8 (y.size, x.size, 3).

        Args:
            image_HW3: The decoded image, uint8 (H, W, 3).
            cut: What :meth:`cut` drew.
            out_CC3: uint8 (crop, crop, 3) to write it into, zeros around it; then a view of it returns.
        """
        part_HW3 = resample(image_HW3, cut.y, cut.x)
        if out_CC3 is None:
            return mirrored(part_HW3) if cut.flip else part_HW3
        clear_outside(out_CC3, cut)
        y0, y1, x0, x1 = cut.box_4
        box_HW3 = out_CC3[y0:y1, x0:x1]
        if cut.flip:
            mirrored(part_HW3, box_HW3)
        else:
            box_HW3[...] = part_HW3
        return box_HW3

    def floats(self, image_HW3: np.ndarray, cut: Cut, out_3CC: np.ndarray) -> None:
        """What a cut shows, normalised, into float32 (3, crop, crop) of any content; padding around it."""
        clear_outside(out_3CC.transpose(1, 2, 0), cut, PADDING[self.pad])
        y0, y1, x0, x1 = cut.box_4
        normalize(self.pixels(image_HW3, cut), out_3CC[:, y0:y1, x0:x1])

    def mask(self, row: Row, cut: Cut) -> np.ndarray | None:
        """The row's labels under a cut, 255 around them: uint8 (crop, crop), ``None`` without a mask.

        Raises:
            DataError: The mask is broken, or of another size than the image.
        """
        return self._cut_labels(row.mask, cut, f"row {row.id}: the mask")

    def teacher(self, row: Row, cut: Cut) -> np.ndarray | None:
        """The row's teacher mask under a cut; as :meth:`mask`."""
        return self._cut_labels(row.teacher, cut, f"row {row.id}: the teacher mask")

    def _cut_labels(self, data: bytes | None, cut: Cut, where: str) -> np.ndarray | None:
        if data is None:
            return None
        labels = nearest(_labels(data, (cut.x.length, cut.y.length), where), cut.y, cut.x)
        mask_CC = np.full((self.crop, self.crop), IGNORE, np.uint8)
        y0, y1, x0, x1 = cut.box_4
        mask_CC[y0:y1, x0:x1] = labels[:, ::-1] if cut.flip else labels
        return mask_CC


def mirrored(image_HW3: np.ndarray, out_HW3: np.ndarray | None = None) -> np.ndarray:
    """An image with left and right exchanged, into ``out_HW3`` where given; a view where nothing moves it faster."""
    cv2 = opencv()
    if cv2 is not None:
        flipped: np.ndarray = cv2.flip(image_HW3, 1, dst=out_HW3)
        return flipped
    if out_HW3 is None:
        return image_HW3[:, ::-1]
    out_HW3[...] = image_HW3[:, ::-1]
    return out_HW3


def clear_outside(canvas: np.ndarray, cut: Cut, colour_3: np.ndarray | int = 0) -> None:
    """One colour where a crop (crop, crop, 3) does not show the image."""
    y0, y1, x0, x1 = cut.box_4
    canvas[:y0] = colour_3
    canvas[y1:] = colour_3
    canvas[y0:y1, :x0] = colour_3
    canvas[y0:y1, x1:] = colour_3


def _labels(data: bytes, size: tuple[int, int], where: str) -> Image.Image:
    labels = decode_labels(data, where.removesuffix(": the mask"))
    if labels.size != size:
        raise DataError(f"{where} is {labels.width}×{labels.height}; expected {size[0]}×{size[1]} as the image")
    return labels


def eval_sample(row: Row, num_classes: int) -> Sample:
    """The whole image as it is: no scaling, no padding.

    Args:
        row: Image, tags and perhaps a mask.
        num_classes: F, the foreground classes.

    Raises:
        DataError: The image or mask is broken.
    """
    image_HW3 = decode_pixels(row.image, f"row {row.id}")
    height, width = image_HW3.shape[:2]

    def whole(data: bytes | None, what: str) -> np.ndarray | None:
        return None if data is None else np.array(_labels(data, (width, height), f"row {row.id}: the {what}"))

    return Sample(
        id=row.id,
        image_3HW=normalize(image_HW3),
        tags_F=tags_vector(row.tags, num_classes),
        mask_HW=whole(row.mask, "mask"),
        box_4=np.array([0, height, 0, width], np.int64),
        teacher_HW=whole(row.teacher, "teacher mask"),
    )
