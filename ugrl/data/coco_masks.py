"""COCO segmentations as pixels, equal to the official mask code pixel for pixel.

The official rasteriser (``rleFrPoly`` of the COCO API) walks the boundary on a grid five times as fine,
keeps the points at which the walk crosses the centre line of a pixel column, and fills each column
between crossings. The same arithmetic is done here on whole arrays. Masks are flat and column-major, as
run-length codes are; only the span from the first to the last set pixel is ever materialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_FINE = 5.0


def polygon_span(xy: np.ndarray, height: int, width: int) -> tuple[int, np.ndarray]:
    """A polygon's pixels.

    Args:
        xy: float64 (2k,), ``x0, y0, x1, y1, …`` in pixels.
        height: Of the image.
        width: Of the image.

    Returns:
        ``(start, inside)``: flat column-major pixels ``start … start + len(inside)`` are set where
        ``inside`` (bool) is.
    """
    # Truncation, not floor: the official code casts to int, also below zero.
    x = np.trunc(_FINE * xy[0::2] + 0.5).astype(np.int64)
    y = np.trunc(_FINE * xy[1::2] + 0.5).astype(np.int64)
    x_to, y_to = np.roll(x, -1), np.roll(y, -1)
    dx, dy = np.abs(x_to - x), np.abs(y_to - y)
    flat = dx >= dy  # edges that walk along x
    flip = np.where(flat, x > x_to, y > y_to)  # each edge is walked upwards, then turned round
    xs, xe = np.where(flip, x_to, x), np.where(flip, x, x_to)
    ys, ye = np.where(flip, y_to, y), np.where(flip, y, y_to)
    length = np.maximum(dx, dy)
    rise = np.where(flat, ye - ys, xe - xs) / np.maximum(length, 1)

    edge = np.repeat(np.arange(len(x)), length + 1)
    d = np.arange(len(edge)) - np.repeat(np.cumsum(length + 1) - (length + 1), length + 1)
    t = np.where(flip[edge], length[edge] - d, d)
    other = np.trunc(np.where(flat, ys, xs)[edge] + rise[edge] * t + 0.5).astype(np.int64)
    u = np.where(flat[edge], t + xs[edge], other)
    v = np.where(flat[edge], other, t + ys[edge])

    # Crossings of column centres: u changes by one, and the smaller value is a column's centre.
    before, after = slice(None, -1), slice(1, None)
    column = (np.minimum(u[before], u[after]) + 0.5) / _FINE - 0.5
    cross = (u[before] != u[after]) & (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    row = (np.minimum(v[before], v[after])[cross] + 0.5) / _FINE - 0.5
    row = np.ceil(np.clip(row, 0, height)).astype(np.int64)
    return _fill(column[cross].astype(np.int64) * height + row, height * width)


def _fill(toggles: np.ndarray, pixels: int) -> tuple[int, np.ndarray]:
    """Set everything between the 1st and 2nd, the 3rd and 4th, … toggle; an odd last one runs to the end."""
    if len(toggles) == 0:
        return 0, np.zeros(0, bool)
    start = int(toggles.min())
    stop = pixels if len(toggles) % 2 else int(toggles.max())
    counts = np.bincount(toggles - start, minlength=stop - start + 1)[: stop - start]
    return start, np.bitwise_xor.accumulate((counts & 1).astype(np.uint8)).astype(bool)


def decode_counts(text: str) -> list[int]:
    """The run lengths of a compressed RLE string: 5 bits a character, least first, differences from the 4th on.

    Raises:
        ValueError: A character outside of the code, or a string that ends within a number.

    >>> decode_counts("03N20")
    [0, 3, -2, 5, -2]
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        c = ord(character) - 48
        if not 0 <= c < 64:
            raise ValueError(f"character {character!r} in a compressed RLE")
        value |= (c & 0x1F) << shift
        shift += 5
        if c & 0x20:
            continue
        if c & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("a compressed RLE that ends within a number")
    return counts


def rle_span(counts: Sequence[int], height: int, width: int) -> tuple[int, np.ndarray]:
    """A run-length code's pixels, as :func:`polygon_span`; runs of 0 and 1 alternate, 0 first.

    Raises:
        ValueError: Runs that are negative or do not add up to the image.
    """
    runs = np.asarray(counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"RLE runs that add up to {int(runs.sum())}; expected {width}×{height}")
    ends = np.cumsum(runs)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    start = int(ends[0]) if len(ends) else 0
    return start, inside[start:]


def spans(segmentation: Any, height: int, width: int) -> list[tuple[int, np.ndarray]]:
    """The pixels of an annotation's ``segmentation``: polygons (their union), or RLE of either form.

    Raises:
        ValueError: Anything else; the text says what was found and what was expected.
    """
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if not isinstance(size, list) or [int(n) for n in size] != [height, width]:
            raise ValueError(f"RLE size {size}; expected [{height}, {width}]")
        if isinstance(counts, str):
            counts = decode_counts(counts)
        if not isinstance(counts, list):
            raise ValueError(f"RLE counts of type {type(counts).__name__}; expected a list or a string")
        return [rle_span(counts, height, width)]
    if not isinstance(segmentation, list | tuple) or not segmentation:
        raise ValueError("no polygon and no RLE")
    out = []
    for polygon in segmentation:
        try:
            xy = np.asarray(polygon, np.float64)
        except (TypeError, ValueError):
            raise ValueError("a polygon that is no list of numbers") from None
        if xy.ndim != 1 or len(xy) < 6 or len(xy) % 2 or not np.isfinite(xy).all():
            raise ValueError(f"a polygon of {xy.size} numbers; expected x and y of at least 3 points")
        out.append(polygon_span(xy, height, width))
    return out
