"""Parts of an image that a network sees one at a time, and how what it says of them is put together.

Parts overlap. In an overlap the probabilities are averaged with weights that fall linearly towards the border of a
part. Parts begin at multiples of :data:`GRID` pixels, so that the cells of a part are cells of the whole image. A pixel
that lies in one part alone is as far from that part's inner borders as the overlap is wide: there a network whose
receptive field reaches no farther computes what it would compute from the whole image. One with attention sees all of
an image at once, and computes something else from a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ugrl.errors import ConfigError

#: Pixels. The coarsest map of all encoders has one cell for so many.
GRID = 32
LEAST_TILE, DEFAULT_OVERLAP = 128, 0.25


@dataclass(frozen=True, slots=True)
class Span:
    """A part of one axis, half-open.

    Attributes:
        start: First pixel.
        stop: Pixel after the last.
        core: ``(start, stop)`` of what is nearer to this part's middle than to another's: cores do not overlap.
    """

    start: int
    stop: int
    core: tuple[int, int]

    @property
    def length(self) -> int:
        """Pixels."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Tiling:
    """How images are divided.

    Attributes:
        size: Longest side of a part, in pixels.
        overlap: Pixels that neighbours share.
        grid: Parts begin at multiples of it, in pixels.
    """

    size: int
    overlap: int
    grid: int = GRID

    @classmethod
    def of(cls, size: int, overlap: int | None = None, multiple: int = 1) -> Tiling:
        """The tiling of a size, with both lengths rounded to the grid (up).

        Args:
            size: Of a part, in pixels.
            overlap: Of neighbours, in pixels; a quarter of the size by default.
            multiple: Sides that the encoder takes without resizing are multiples of it.

        Raises:
            ConfigError: The size is too small, or the overlap is more than half of it.
        """
        grid = math.lcm(GRID, multiple)
        if size < LEAST_TILE:
            raise ConfigError(f"tile is {size}; expected at least {LEAST_TILE} pixels")
        size = -(-size // grid) * grid
        shared = round(size * DEFAULT_OVERLAP) if overlap is None else overlap
        if not 0 <= shared <= size // 2:
            raise ConfigError(f"overlap is {overlap}; expected 0 … {size // 2}, half of the tile of {size} pixels")
        return cls(size, -(-shared // grid) * grid if shared else 0, grid)

    def spans(self, length: int) -> list[Span]:
        """The parts of an axis, in order.

        >>> [(s.start, s.stop) for s in Tiling(128, 32).spans(300)]
        [(0, 128), (96, 224), (192, 300)]
        """
        if length <= self.size:
            return [Span(0, length, (0, length))]
        step = max(self.grid, self.size - self.overlap)
        starts = list(range(0, length - self.size, step))
        last = -(-(length - self.size) // self.grid) * self.grid  # on the grid: its cells are those of the others
        starts.append(last)
        stops = [min(start + self.size, length) for start in starts]
        middles = [(starts[i + 1] + stops[i]) // 2 // self.grid * self.grid for i in range(len(starts) - 1)]
        edges = [0, *middles, length]
        return [
            Span(start, stop, (edges[i], edges[i + 1]))
            for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]


def weights(spans: list[Span], index: int) -> np.ndarray:
    """float32 (length,): how much each pixel of a part counts; those of all parts sum to 1 at every pixel.

    >>> spans = Tiling(128, 32).spans(224)
    >>> one, two = weights(spans, 0), weights(spans, 1)
    >>> bool(one[95] == 1) and bool(abs(one[96:] + two[:32] - 1).max() < 1e-6)
    True
    """
    rows = [_tent(span, i, spans) for i, span in enumerate(spans)]
    own, total = rows[index], rows[index].copy()
    for other, row in zip(spans, rows, strict=True):
        low, high = max(other.start, spans[index].start), min(other.stop, spans[index].stop)
        if other is not spans[index] and low < high:
            total[low - spans[index].start : high - spans[index].start] += row[low - other.start : high - other.start]
    return (own / total).astype(np.float32)


def _tent(span: Span, index: int, spans: list[Span]) -> np.ndarray:
    """Weights of one part alone: 1, and lower where a neighbour begins or ends."""
    at = np.arange(span.length) + 0.5
    row = np.ones(span.length)
    if index > 0 and (shared := spans[index - 1].stop - span.start) > 0:
        row = np.minimum(row, at / shared)
    if index + 1 < len(spans) and (shared := span.stop - spans[index + 1].start) > 0:
        row = np.minimum(row, (span.length - at) / shared)
    return row


def bands(spans: list[Span]) -> Iterator[tuple[int, Span, int]]:
    """Rows of parts from top to bottom: index, span, and the row up to which the image is finished after it."""
    for i, span in enumerate(spans):
        yield i, span, spans[i + 1].start if i + 1 < len(spans) else span.stop
