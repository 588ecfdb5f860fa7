"""One row of a shard. Apart from the other types, so that processes that only read need no torch."""

from __future__ import annotations

from dataclasses import dataclass

IGNORE = 255  # the label of pixels that count for nothing


@dataclass(frozen=True, slots=True)
class Row:
    """One image as the shards hold it.

    Attributes:
        id: File name without its suffix (with its folders where it needs them), unique within a data set.
        image: The original bytes of the image file, untouched.
        width: Pixels of the upright picture.
        height: Pixels of the upright picture.
        tags: Class indices 1…F that the image shows, ascending.
        mask: Label PNG (indices, 255 ignored) or ``None``.
        teacher: Label PNG that another method made, where a reader was asked for it, or ``None``.
    """

    id: str
    image: bytes
    width: int
    height: int
    tags: tuple[int, ...]
    mask: bytes | None = None
    teacher: bytes | None = None
