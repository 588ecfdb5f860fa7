"""What a data source is: ordered ids per split, and one verified row per id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ugrl import foreign
from ugrl.data.images import decode_labels, decode_rgb, encode_labels, orientation
from ugrl.errors import DataError
from ugrl.row import IGNORE, Row
from ugrl.text import brief, line, nearest

_FACTORIES = {
    "shapes": ("ugrl.data.shapes", "open_shapes"),
    "coco": ("ugrl.data.coco", "CocoSource"),
    "voc": ("ugrl.data.voc", "VocSource"),
    "folder": ("ugrl.data.folder", "FolderSource"),
}
SOURCES = tuple(_FACTORIES)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # in no name


class RowError(DataError):
    """One row cannot be used; ``prepare`` may leave it out and count it under ``reason``."""

    def __init__(self, message: str, reason: str = "unreadable image") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # the default would lose the reason between processes
        return RowError, (str(self), self.reason)


class Stray(NamedTuple):
    """Files that a source has no use for, or uses though they are unusual: how many, and one of them."""

    files: int
    example: str


@runtime_checkable
class Source(Protocol):
    """A data set on disk, or a generated one.

    Attributes:
        name: ``shapes``, ``coco``, ``voc`` or ``folder``.
        class_names: The F foreground classes; ``class_names[f - 1]`` names class f.
        root: The folder it reads, ``None`` for a generated one.
        options: What decides the rows besides the root, JSON-able; kept in the manifest.
        left_out: Per split, how many images are left out from the start, by reason.

    It may have ``stray: dict[str, Stray]``, files worth a word, by what they are.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """See the class."""
        ...

    @property
    def root(self) -> Path | None:
        """See the class."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """See the class."""
        ...

    @property
    def left_out(self) -> dict[str, dict[str, int]]:
        """See the class."""
        ...

    def splits(self) -> dict[str, list[str]]:
        """Ordered ids of ``train`` and ``val`` (either may be absent where the source has none)."""
        ...

    def tags(self, split: str, id: str) -> tuple[int, ...] | None:
        """The tags of a row where they are known without reading images, else ``None``."""
        ...

    def row(self, split: str, id: str) -> Row:
        """Read and verify one image.

        Raises:
            RowError: The row cannot be used; the message names the file, what was found and what was
                expected.
        """
        ...


def make_row(
    *,
    id: str,
    image: bytes,
    tags: Iterable[int],
    mask: bytes | None,
    num_classes: int,
    where: str,
    mask_where: str = "",
) -> Row:
    """A row whose image and mask have been decoded in full and agree.

    Args:
        id: See :class:`ugrl.row.Row`.
        image: Bytes of an image file, kept as they are.
        tags: Class indices in any order.
        mask: Label PNG or ``None``; one of another depth than 8 bits is written anew.
        num_classes: F, the foreground classes.
        where: Names the image file in errors.
        mask_where: Names the mask file in errors.

    Raises:
        RowError: A broken image or mask, sizes that differ, a label or tag outside 1…F.
    """
    try:
        height, width, _ = decode_rgb(image, where).shape
    except DataError as error:
        raise RowError(str(error)) from None
    if mask is not None:
        mask = checked_mask(mask, image, (width, height), num_classes, mask_where or where)
    ordered = tuple(sorted(set(int(t) for t in tags)))
    if any(not 1 <= t <= num_classes for t in ordered):
        raise RowError(f"{where}: tags {brief(ordered)}; expected class indices 1…{num_classes}", "unknown class")
    return Row(id=id, image=image, width=width, height=height, tags=ordered, mask=mask)


def checked_mask(mask: bytes, image: bytes, size: tuple[int, int], num_classes: int, where: str) -> bytes:
    """A label PNG that fits its image; one of another depth than 8 bits is written anew.

    Args:
        mask: Bytes of the file.
        image: Bytes of the image's file.
        size: Width and height of the upright image.
        num_classes: F, the foreground classes.
        where: Names the mask's file in errors.

    Raises:
        RowError: A broken mask, another size, or a label outside 0…F that is not 255.
    """
    width, height = size
    try:
        labels = decode_labels(mask, where)
    except DataError as error:
        raise RowError(str(error), "unusable mask") from None
    if labels.size != size:
        found = f"{where}: the mask is {labels.width}×{labels.height}"
        if labels.size == (height, width) and orientation(image) > 4:
            raise RowError(
                f"{found}, as the image is stored, but a note in it (EXIF) turns it to {width}×{height}; expected "
                "a mask of the upright image: turn the mask, or remove the note",
                "unusable mask",
            )
        raise RowError(f"{found}; expected {width}×{height} as the image", "unusable mask")
    bad = [v for v, n in enumerate(labels.histogram()) if n and v > num_classes and v != IGNORE]
    if bad:
        raise RowError(f"{where}: the mask holds label {bad[0]}; expected 0…{num_classes} or {IGNORE}", "unusable mask")
    # So that every reader of the shards sees these labels.
    return mask if mask[24:25] == b"\x08" else encode_labels(np.asarray(labels))


class _MissingError(RowError):
    """A file that a row needs and that is not there, or is no regular file."""

    def __init__(self, message: str, reason: str = "missing file") -> None:
        super().__init__(message, reason)


def read_bytes(path: Path, what: str = "image") -> bytes:
    """A file's bytes.

    Raises:
        RowError: It is missing, cannot be read, or is no regular file.
    """
    return foreign.read_bytes(path, f"{what} file", error=_MissingError)


def file_under(root: Path, name: str, where: str) -> Path:
    """The file below a folder that a name in a table or list stands for.

    Raises:
        RowError: The name leads out of the folder.
    """
    return foreign.under(root, name, where, error=_MissingError)


def check_root(root: str | Path | None, source: str) -> Path:
    """The root folder of a source.

    Raises:
        DataError: None was given, or there is no such folder.
    """
    if root is None:
        raise DataError(f"source '{source}' needs a root folder; none was given")
    path = Path(root)
    if not os.path.isdir(path):
        raise DataError(f"{line(path)}: no such folder; expected the root of a {source} data set")
    return path


def open_source(name: str, root: str | Path | None = None, **options: Any) -> Source:
    """The source of that name.

    Args:
        name: One of :data:`SOURCES`.
        root: Folder of the data set; ``shapes`` has none.
        options: What the source's class takes.

    Raises:
        DataError: Another name, no such folder, an option of another source, or a broken data set.

    >>> open_source("shapes", train=2, val=1, size=32).splits()["val"]
    ['val_000000']
    """
    if name not in SOURCES:
        raise DataError(f"unknown source '{name}'{nearest(name, SOURCES)}")
    # Each source is imported when it is asked for: whoever reads shards needs none of them.
    module, attribute = _FACTORIES[name]
    factory = getattr(import_module(module), attribute)
    try:
        source: Source = factory(**options) if name == "shapes" and root is None else factory(root=root, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        word = str(error).rsplit("'", 2)[-2]
        raise DataError(f"source '{name}' has no option '{word}'") from None
    return source
