"""What a network says of one image."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ugrl.data.coco_masks import rle_of
from ugrl.errors import DataError
from ugrl.eval.palette import write_mask
from ugrl.eval.palettes import palette
from ugrl.predict.overlay import overlay
from ugrl.text import line

if TYPE_CHECKING:
    from ugrl.predict.maps import Maps


@dataclass
class Prediction:
    """The mask of one image, and what else is known of it.

    Attributes:
        mask: uint8 (H, W): 0 is background, k is class ``names[k - 1]``.
        scores: Class name → probability of the classifier that the image shows it, for every class.
        image: The image, uint8 RGB (H, W, 3), upright.
        names: Names of the classes 1…F.
        path: The file that the image came from, if there is one.
        palette: Name of the colours: ``voc``, ``safe`` or ``tol``.

    Example::

        prediction = ugrl.load("run").predict("photos/images/a.jpg")
        prediction.classes                    # what the mask shows, largest first
        prediction.save("mask.png")           # a palette mask
        prediction.overlay().save("look.jpg")
        annotations = prediction.to_coco()
    """

    mask: np.ndarray
    scores: dict[str, float]
    image: np.ndarray = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    path: Path | None = None
    palette: str = "voc"
    look: Callable[[Prediction], Maps] | None = field(default=None, repr=False, compare=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the mask shows, the largest first; background is none."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.names) + 1)[1 : len(self.names) + 1]
        return tuple(self.names[k] for k in np.argsort(-counts, kind="stable") if counts[k])

    @cached_property
    def _maps(self) -> Maps:
        if self.look is None:
            raise DataError("a prediction that no network stands behind: it has no cam and no uncertainty")
        return self.look(self)

    @property
    def cam(self) -> dict[str, np.ndarray]:
        """Class name → class activation map, float32 (H, W) in [0, 1), of each shown class.

        Shown are the classes of the mask and those with a score of at least 0.5. The map is computed when it is first
        asked for, with the scales of ``eval.cam_scales``, or else those of ``method.cam``, and its mirror images.
        """
        return {self.names[label - 1]: self._maps.cam_KHW[k] for k, label in enumerate(self._maps.shown)}

    @property
    def class_uncertainty(self) -> dict[str, float]:
        """``background`` and each shown class → u in [0, 2] against the checkpoint's prototypes (Eq. 5).

        A class whose u is unknown is left out: one without a prototype, or without any mass under its CAM.
        """
        found = {"background": self._maps.u_C[0], **{self.names[k - 1]: self._maps.u_C[k] for k in self._maps.shown}}
        return {name: float(u) for name, u in found.items() if np.isfinite(u)}

    @property
    def uncertainty(self) -> np.ndarray:
        """float32 (H, W): at each pixel the u of the mask's class there (Eq. 7); NaN where it is unknown."""
        return self._maps.uncertainty_HW

    def overlay(self, *, alpha: float = 0.5, legend: bool = True, palette: str | None = None) -> Image.Image:
        """The image with the mask's colours over it, and a legend below.

        Args:
            alpha: Share of the colour, 0…1.
            legend: Whether the shown classes are named, with their shares of the pixels.
            palette: Other colours than :attr:`palette`.

        Returns:
            A Pillow image (RGB). A small image is enlarged by a whole factor, so that the names can be read.
        """
        if not 0 <= alpha <= 1:
            raise DataError(f"alpha is {alpha}; expected 0 … 1")
        return overlay(self.image, self.mask, self.names, _colours(palette or self.palette), alpha=alpha, legend=legend)

    def save(self, path: str | Path) -> Path:
        """Write the mask as a palette PNG: the value of a pixel is its class.

        Args:
            path: A name that ends in ``.png``; its folder is made.

        Raises:
            DataError: Another ending, the image's own file, or a place that cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise DataError(f"{line(path)}: a mask is written as .png; for a picture use overlay().save(…)")
        if self.path is not None and path.exists() and os.path.samefile(path, self.path):
            raise DataError(f"{line(path)}: is the image itself; choose another name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mask(path, self.mask, _colours(self.palette))
        except OSError as error:
            raise DataError(f"{line(path)}: cannot be written ({error.strerror or error})") from None
        return path

    def to_coco(self, image_id: int = 1, first_id: int = 1) -> list[dict[str, Any]]:
        """COCO annotations, one for each class that the mask shows, with compressed RLE.

        Args:
            image_id: Id of the image.
            first_id: Id of the first annotation; the others follow.

        Returns:
            Each with ``category_id`` (the label 1…F), ``segmentation``, ``area`` and ``bbox`` in pixels, ``score`` (the
            classifier's probability) and ``iscrowd`` 0.
        """
        return coco_annotations(self.mask, self.names, self.scores, image_id, first_id)


def _colours(name: str) -> np.ndarray:
    return palette(name)


def coco_annotations(
    labels_HW: np.ndarray, names: tuple[str, ...], scores: dict[str, float], image_id: int, first_id: int
) -> list[dict[str, Any]]:
    """See :meth:`Prediction.to_coco`."""
    found: list[dict[str, Any]] = []
    for label in np.flatnonzero(np.bincount(labels_HW.ravel(), minlength=256)[: len(names) + 1]).tolist():
        if label == 0:
            continue
        where_HW = labels_HW == label
        rows, columns = np.flatnonzero(where_HW.any(1)), np.flatnonzero(where_HW.any(0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        found.append(
            {
                "id": first_id + len(found),
                "image_id": image_id,
                "category_id": label,
                "segmentation": rle_of(where_HW),
                "area": int(where_HW.sum()),
                "bbox": [int(v) for v in box],
                "iscrowd": 0,
                "score": round(float(scores[names[label - 1]]), 6),
            }
        )
    return found
