"""Rows that a list names, whatever split they are in: the 1,464 images of VOC's ``train.txt``, say."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from ugrl.config import DataConfig
from ugrl.data.reader import DEFAULTS, ShardReader
from ugrl.data.shards import Manifest
from ugrl.data.voc import list_entry
from ugrl.errors import DataError
from ugrl.foreign import read_text
from ugrl.row import Row
from ugrl.text import brief, line

MOST_LINE = 1000


class ListReader(ShardReader):
    """Random access to listed rows, in the order of the list.

    Args:
        manifest: Of a prepared folder.
        path: Text file: one id of an image a line, or the two paths of VOC's augmented lists; empty lines do not count.
        data: As for :class:`ugrl.data.reader.ShardReader`.

    Attributes:
        splits: Splits that the rows lie in.

    Raises:
        DataError: The list cannot be read, is empty, names an image twice, or one that no split has.
    """

    def __init__(self, manifest: Manifest, path: Path, data: DataConfig = DEFAULTS) -> None:
        where = {id: (split, k) for split in manifest.splits for k, id in enumerate(manifest.ids(split))}
        self.path, self._at = path, dict[str, tuple[str, int]]()
        missing: list[str] = []
        for number, text in enumerate(read_text(path, "list of images").splitlines(), 1):
            if not text.strip():
                continue
            place = f"{line(path)}: line {number}"
            if len(text) > MOST_LINE:
                raise DataError(f"{place}: {len(text)} characters; expected an id of an image")
            id = next((found for found in list_entry(text.strip()) if found in where), None)
            if id is None:
                missing.append(f"{place}: {brief(text.strip())}")
            elif id in self._at:
                raise DataError(f"{place}: {brief(id)} was named before; expected each image once")
            else:
                self._at[id] = where[id]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]} is in no split of {manifest.root}{more}; expected ids of its images")
        if not self._at:
            raise DataError(f"{line(path)}: names no image; expected an id a line")
        self.splits = tuple(dict.fromkeys(split for split, _ in self._at.values()))
        super().__init__(manifest, self.splits[0], data)
        self._rows = list(self._at.values())
        self._readers = {split: ShardReader(manifest, split, data) for split in self.splits}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids in the order of the list."""
        return tuple(self._at)

    @property
    def has_masks(self) -> bool:
        """Whether every listed row has a mask."""
        return self._has_masks

    @cached_property
    def _has_masks(self) -> bool:
        if all(reader.has_masks for reader in self._readers.values()):
            return True
        return all(self[k].mask is not None for k in range(len(self)))

    def __getitem__(self, index: int) -> Row:
        """The row at a position of the list."""
        split, row = self._rows[index]
        return self._readers[split][row]

    def shard_of(self, index: int) -> str:
        """The shard that a row lies in."""
        split, row = self._rows[index]
        return self._readers[split].shard_of(row)
