"""A folder of masks that another method made: one PNG of class indices for each image, named after its id.

SAM, CLIP or any other program may have written them, as grey or palette PNGs of any depth; 255 is ignored. Such masks
are scored (:mod:`ugrl.eval.masks`), or teach (:class:`TaughtSource`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ugrl.data.source import Source, Stray, checked_mask, file_under, read_bytes
from ugrl.errors import DataError
from ugrl.row import Row
from ugrl.text import brief, line


class MaskFolder:
    """Masks by the ids of their images: ``ROOT/ID.png``.

    Args:
        root: The folder.

    Raises:
        DataError: There is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not os.path.isdir(root):
            raise DataError(f"{line(root)}: no such folder; expected one of masks, ID.png for each image")
        self.root = root

    def path(self, id: str) -> Path:
        """Where the mask of an image lies, or should."""
        path = file_under(self.root, f"{id}.png", f"image {brief(id)}")
        upper = path.with_suffix(".PNG")
        return upper if not os.path.lexists(path) and os.path.lexists(upper) else path

    def has(self, id: str) -> bool:
        """Whether there is a mask of an image."""
        return os.path.lexists(self.path(id))

    def missing(self, ids: Sequence[str], what: str) -> list[str]:
        """The ids without a mask.

        Args:
            ids: Of the images.
            what: They are, for the message.

        Raises:
            DataError: There is a mask of none of them.
        """
        found = [id for id in ids if not self.has(id)]
        if ids and len(found) == len(ids):
            there = sorted(name for name in os.listdir(self.root) if name.lower().endswith(".png"))
            holds = f"{len(there)} PNG files such as {line(there[0], 60)}" if there else "no PNG file"
            raise DataError(
                f"{line(self.root)}: has a mask of none of {what}, but {holds}; expected {line(ids[0], 60)}.png and so "
                "on: files named after the ids of the images"
            )
        return found

    def read(self, row: Row, num_classes: int) -> bytes:
        """The checked mask of a row.

        Raises:
            RowError: It is missing, broken, of another size than the image, or has a label outside 0…F and 255.
        """
        path = self.path(row.id)
        return checked_mask(read_bytes(path, "mask"), row.image, (row.width, row.height), num_classes, line(path))


class TaughtSource:
    """A source whose rows have the masks of a folder beside them, where there are any; a ``Source`` itself.

    Args:
        source: The data set.
        folder: Where the teacher masks lie.

    Raises:
        DataError: No such folder, or a mask of no image of the data set.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self.source, self.masks = source, MaskFolder(folder)
        self.name, self.class_names, self.root = source.name, source.class_names, source.root
        self.left_out = source.left_out
        ids = [id for ids in source.splits().values() for id in ids]
        missing = self.masks.missing(ids, f"the {len(ids)} images")
        self.stray: dict[str, Stray] = dict(getattr(source, "stray", {}))
        known = set(ids)
        names = (name for name in sorted(os.listdir(folder)) if name.lower().endswith(".png"))
        unused = [name for name in names if name[:-4] not in known]
        if unused:
            self.stray["teacher mask of no image"] = Stray(len(unused), line(unused[0]))
        if missing:
            self.stray["image without a teacher mask"] = Stray(len(missing), line(missing[0]))

    @property
    def options(self) -> dict[str, Any]:
        """Those of the source, and the name of the folder."""
        return {**self.source.options, "teacher": self.masks.root.resolve().name}

    def splits(self) -> dict[str, list[str]]:
        """As the source has them."""
        return self.source.splits()

    def tags(self, split: str, id: str) -> tuple[int, ...] | None:
        """As the source has them."""
        return self.source.tags(split, id)

    def row(self, split: str, id: str) -> Row:
        """The row of the source, with its teacher mask.

        Raises:
            RowError: As the source's, or the teacher mask cannot be used.
        """
        row = self.source.row(split, id)
        if not self.masks.has(id):
            return row
        return replace(row, teacher=self.masks.read(row, len(self.class_names)))
