"""The shapes of the encoders, as numbers: whoever checks a configuration needs no torch for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Four = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class MiTSpec:
    """The shape of an encoder; one entry per stage.

    Attributes:
        dims: Channels of the stage's map.
        depths: Number of transformer blocks.
        heads: Number of attention heads.
        sr_ratios: Side of the square of positions that share one key and value.
        mlp_ratio: Hidden width of the feed-forward part over the stage's width.
        strides: Factor of downsampling on entry to the stage.
        drop_path: Drop rate of the last block; the others rise to it linearly from 0.
    """

    dims: Four
    depths: Four
    heads: Four = (1, 2, 5, 8)
    sr_ratios: Four = (8, 4, 2, 1)
    mlp_ratio: int = 4
    strides: Four = (4, 2, 2, 1)
    drop_path: float = 0.1

    @property
    def min_size(self) -> int:
        """Shortest image side, in pixels, that leaves every stage a key."""
        return max(math.prod(self.strides[: i + 1]) * sr for i, sr in enumerate(self.sr_ratios))


_WIDE = (64, 128, 320, 512)

SPECS: dict[str, MiTSpec] = {
    "mit_b0": MiTSpec((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": MiTSpec(_WIDE, (2, 2, 2, 2)),
    "mit_b2": MiTSpec(_WIDE, (3, 4, 6, 3)),
    "mit_b3": MiTSpec(_WIDE, (3, 4, 18, 3)),
    "mit_b4": MiTSpec(_WIDE, (3, 8, 27, 3)),
    "mit_b5": MiTSpec(_WIDE, (3, 6, 40, 3)),
    # A CPU size: stride 8 at the end, so that a 96 px crop still has a 12 x 12 grid.
    "tiny": MiTSpec((32, 64, 128, 192), (1, 1, 1, 2), (1, 2, 4, 6), (4, 2, 1, 1), 3, (4, 2, 1, 1)),
}


def scaled(size: tuple[int, int], scale: float, least: int) -> tuple[int, int]:
    """Sides of a rescaled image: whole pixels, and no fewer than the encoder needs.

    >>> scaled((100, 40), 0.5, 32)
    (50, 32)
    """
    return max(least, round(size[0] * scale)), max(least, round(size[1] * scale))


def least_crop(backbone: str, scales: Sequence[float]) -> int:
    """The smallest crop whose smallest rescaled image still feeds every stage.

    >>> least_crop("mit_b1", (1.0, 0.5)), least_crop("tiny", (1.0,))
    (63, 16)
    """
    least, smallest = SPECS[backbone].min_size, max(1e-6, min(*scales, 1.0))
    crop = math.ceil((least - 0.5) / smallest)
    return crop if round(crop * smallest) >= least else crop + 1
