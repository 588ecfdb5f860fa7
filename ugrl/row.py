"""One row of a shard. Apart from the other types, so that processes that only read need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One image as the shards hold it.

    Attributes:
        id: File stem, unique within a split.
        image: The original JPEG (or PNG) bytes, untouched.
        width: Pixels.
        height: Pixels.
        tags: Class indices 1…F that the image shows, ascending.
        mask: Label PNG (indices, 255 ignored) or ``None``.
    """

    id: str
    image: bytes
    width: int
    height: int
    tags: tuple[int, ...]
    mask: bytes | None = None
