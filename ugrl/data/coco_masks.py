"""COCO segmentations as pixels, equal to the official mask code pixel for pixel.

The official rasteriser (``rleFrPoly`` of the COCO API) walks the boundary on a grid five times as fine,
keeps the points at which the walk crosses the centre line of a pixel column, and fills each column
between crossings. The same arithmetic is done here, at the crossings alone: what a polygon costs follows from its
points and the image's width, however far away a point lies. Masks are flat and column-major, as run-length codes are;
only the span from the first to the last set pixel is ever materialised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ugrl.text import brief

_FINE = 5.0
# The official code counts in 32 bits, of which a walk needs a few for itself.
FARTHEST = 10_000_000
_AT_ONCE = 1 << 22  # crossings
_BITS = 60


def polygon_span(xy: np.ndarray, height: int, width: int) -> tuple[int, np.ndarray]:
    """A polygon's pixels.

    Args:
        xy: float64 (2k,), ``x0, y0, x1, y1, …`` in pixels.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.

    Returns:
        ``(start, inside)``: flat column-major pixels ``start … start + len(inside)`` are set where
        ``inside`` (bool) is.
    """
    # Truncation, not floor: the official code casts to int, also below zero.
    x = np.trunc(_FINE * xy[0::2] + 0.5).astype(np.int64)
    y = np.trunc(_FINE * xy[1::2] + 0.5).astype(np.int64)
    edges = np.stack([x, y, np.roll(x, -1), np.roll(y, -1)])
    step = max(1, _AT_ONCE // width)
    found = [_crossings(edges[:, k : k + step], height, width) for k in range(0, len(x), step)]
    return _fill(np.concatenate(found), height * width)


def _crossings(edges: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where edges (x, y, x to, y to) cross the centre lines of pixel columns, as flat pixels.

    A centre line lies between the fine columns 5c + 2 and 5c + 3, and each edge crosses it once or not at all.
    """
    x, y, x_to, y_to = edges
    dx, dy = np.abs(x_to - x), np.abs(y_to - y)
    level = dx >= dy  # edges that walk along x
    flip = np.where(level, x > x_to, y > y_to)  # each edge is walked upwards
    xs, xe = np.where(flip, x_to, x), np.where(flip, x, x_to)
    ys, ye = np.where(flip, y_to, y), np.where(flip, y, y_to)
    rise = np.where(level, ye - ys, xe - xs) / np.maximum(np.maximum(dx, dy), 1)

    # Columns c with min ≤ 5c + 2 and 5c + 3 ≤ max, within the image.
    first = np.maximum(-((2 - np.minimum(x, x_to)) // 5), 0)
    last = np.minimum((np.maximum(x, x_to) - 3) // 5, width - 1)
    number = np.maximum(last - first + 1, 0)
    edge = np.repeat(np.arange(len(x)), number)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(number) - number - first, number)
    line, xs, ys, rise, level = 5 * column + 3, xs[edge], ys[edge], rise[edge], level[edge]

    # Along x, step t to t + 1 crosses; of the two points the upper one counts.
    t = line - 1 - xs
    low = np.minimum(np.trunc(ys + rise * t + 0.5), np.trunc(ys + rise * (t + 1) + 0.5))
    # Along y, t is the last point before the line: a guess, set right by the very comparison that the walk makes.
    up = rise > 0
    slope = np.where(level, 1.0, rise)
    t = np.ceil((line - 0.5 - xs) / slope) - 1
    for move in (-1.0, 1.0):
        while True:
            over = xs + rise * (t + max(move, 0.0)) + 0.5 >= line
            wrong = (over != up if move > 0 else over == up) & ~level
            if not wrong.any():
                break
            t += move * wrong
    v = np.where(level, low, ys + t)
    row = np.ceil(np.clip((v + 0.5) / _FINE - 0.5, 0, height)).astype(np.int64)
    return column * height + row


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
            raise ValueError(f"character {character!a} in a compressed RLE")
        if shift > _BITS:
            raise ValueError("a compressed RLE with an endless number")
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


def rle_span(counts: list[int], height: int, width: int) -> tuple[int, np.ndarray]:
    """A run-length code's pixels, as :func:`polygon_span`; runs of 0 and 1 alternate, 0 first.

    Raises:
        ValueError: Runs that are negative or do not add up to the image.
    """
    total = sum(counts)
    if total != height * width or min(counts, default=0) < 0:
        raise ValueError(f"RLE runs that add up to {brief(total)}; expected {width}×{height}, none below zero")
    runs = np.asarray(counts, np.int64)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    start = counts[0] if counts else 0
    return start, inside[start:]


def spans(segmentation: Any, height: int, width: int) -> list[tuple[int, np.ndarray]]:
    """The pixels of an annotation's ``segmentation``: polygons (their union), or RLE of either form.

    Raises:
        ValueError: Anything else; the text says what was found and what was expected.
    """
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if size != [height, width]:
            raise ValueError(f"RLE size {brief(size)}; expected [{height}, {width}]")
        if isinstance(counts, str):
            if len(counts) > 14 * (height * width + 2):
                raise ValueError(f"a compressed RLE of {len(counts)} characters for {width}×{height} pixels")
            counts = decode_counts(counts)
        if not isinstance(counts, list):
            raise ValueError(f"RLE counts of type {type(counts).__name__}; expected a list or a string")
        if not all(type(n) is int for n in counts):
            raise ValueError(f"RLE counts {brief(counts)}; expected whole numbers")
        return [rle_span(counts, height, width)]
    if not isinstance(segmentation, list | tuple) or not segmentation:
        raise ValueError("no polygon and no RLE")
    out = []
    for polygon in segmentation:
        try:
            xy = np.asarray(polygon, np.float64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("a polygon that is no list of numbers") from None
        if xy.ndim != 1 or len(xy) < 6 or len(xy) % 2 or not np.isfinite(xy).all():
            raise ValueError(f"a polygon of {xy.size} numbers; expected x and y of at least 3 points")
        if (far := np.abs(xy).max()) > FARTHEST:
            raise ValueError(f"a coordinate of {far:g} for {width}×{height} pixels; expected one near the image")
        out.append(polygon_span(xy, height, width))
    return out


def encode_counts(counts: list[int]) -> str:
    """The compressed RLE string of run lengths: the inverse of :func:`decode_counts`.

    >>> encode_counts([0, 3, 2, 5, 2]), decode_counts(encode_counts([7, 1, 300, 2]))
    ('03220', [7, 1, 300, 2])
    """
    text = []
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != (-1 if bits & 0x10 else 0)
            text.append(chr(48 + bits + 0x20 * more))
    return "".join(text)


def rle_of(mask_HW: np.ndarray) -> dict[str, Any]:
    """A mask (bool) as COCO's compressed RLE, ``{"size": [H, W], "counts": text}``: equal to the official encoder's.

    >>> rle_of(np.array([[False, True], [False, True]]))
    {'size': [2, 2], 'counts': '22'}
    """
    flat = np.asarray(mask_HW, bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask_HW.shape), "counts": encode_counts([0, *counts] if flat[:1].any() else counts)}
