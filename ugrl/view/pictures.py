"""Small pictures of photographs, maps and labels, as bytes of files that a browser shows."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ugrl.eval.palettes import HEAT as HEAT
from ugrl.eval.palettes import heat as heat
from ugrl.types import IGNORE

LEVELS = 64


def fitted(size: Sequence[int], most: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side is at most ``most``; nothing is enlarged.

    >>> fitted((300, 500), 200), fitted((64, 48), 200)
    ((200, 120), (48, 64))
    """
    h, w = size[0], size[1]
    share = min(1.0, most / max(h, w))
    return max(1, round(w * share)), max(1, round(h * share))


def photo(image_HW3: np.ndarray, size: tuple[int, int]) -> bytes:
    """A photograph as WebP."""
    return _webp(Image.fromarray(image_HW3).resize(size, Image.Resampling.BOX), 76)


def warm(map_HW: np.ndarray, size: tuple[int, int]) -> bytes:
    """A map in [0, 1] as WebP."""
    small = Image.fromarray(map_HW.astype(np.float32), mode="F").resize(size, Image.Resampling.BILINEAR)
    return _webp(Image.fromarray(heat(np.asarray(small))), 68)


def labels(labels_HW: np.ndarray, size: tuple[int, int], palette: np.ndarray) -> bytes:
    """Labels as a palette PNG in which background is clear."""
    return _indexed(labels_HW, size, palette, {0: 0, IGNORE: 150})


def levels(map_HW: np.ndarray, size: tuple[int, int]) -> bytes:
    """A map of few values in [0, 1] as a palette PNG; what is NaN is clear, what is more has the last colour."""
    known = np.isfinite(map_HW)
    steps = np.where(known, np.clip(np.nan_to_num(map_HW), 0, 1) * (LEVELS - 1), 0).round().astype(np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    palette[1 : LEVELS + 1] = heat(np.linspace(0, 1, LEVELS))
    return _indexed(np.where(known, steps + 1, 0).astype(np.uint8), size, palette, {0: 0})


def _indexed(index_HW: np.ndarray, size: tuple[int, int], palette: np.ndarray, alpha: dict[int, int]) -> bytes:
    image = Image.fromarray(index_HW, mode="L").resize(size, Image.Resampling.NEAREST)
    index = np.asarray(image)
    most = int(index.max(initial=0))
    if most == IGNORE:  # the label of ignored pixels goes down to the first free one: a short palette is a small file
        free = int(index[index < IGNORE].max(initial=0)) + 1
        palette = np.concatenate([palette[:free], palette[IGNORE:]])
        alpha = {**alpha, free: alpha.get(IGNORE, 255)}
        index, most = np.where(index == IGNORE, free, index).astype(np.uint8), free
    made = Image.fromarray(index, mode="P")
    made.putpalette(palette[: most + 1].flatten().tolist())
    out = io.BytesIO()
    made.save(out, "PNG", optimize=True, transparency=bytes(alpha.get(v, 255) for v in range(most + 1)))
    return out.getvalue()


def _webp(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality, method=4)
    return out.getvalue()
