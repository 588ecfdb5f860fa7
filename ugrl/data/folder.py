"""Images and a table of their tags: the least that training needs.

Expected under the root::

    tags.csv        columns file, tags and, if wanted, split (train or val; empty means train)
    images/         the files that the table names
    masks/STEM.png  optional label PNGs (0 background, 1…F classes, 255 ignored)
    classes.txt     optional: one class a line, in the order of the labels 1…F

``tags`` holds class names joined by semicolons; nothing means that the image shows no class. Without
``classes.txt`` the classes are those of the table in alphabetical order. Example::

    file,split,tags
    street_01.jpg,train,car;person
    street_02.jpg,val,
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

from ugrl.config import nearest
from ugrl.data.source import check_root, make_row, read_bytes
from ugrl.errors import DataError
from ugrl.types import IGNORE, Row

_SPLITS = ("train", "val")
_SUFFIXES = (".jpg", ".jpeg", ".png")


class _Entry(NamedTuple):
    file: str
    tags: tuple[str, ...]
    line: int


class FolderSource:
    """See the module; a :class:`ugrl.data.source.Source`.

    Args:
        root: See the module.

    Raises:
        DataError: A missing or malformed table, an unknown class or split, or a file named twice.
    """

    name = "folder"

    def __init__(self, root: str | Path | None) -> None:
        self.root = check_root(root, self.name)
        self._entries: dict[str, dict[str, _Entry]] = {}
        self._read_table(self.root / "tags.csv")
        self.class_names = self._classes()
        self._index = {name: f + 1 for f, name in enumerate(self.class_names)}
        for entries in self._entries.values():
            for entry in entries.values():
                for name in entry.tags:
                    if name not in self._index:
                        where = f"{self.root / 'tags.csv'}: line {entry.line}"
                        raise DataError(f"{where}: unknown class '{name}'{nearest(name, self.class_names)}")
        named = {e.file for entries in self._entries.values() for e in entries.values()}
        images = self.root / "images"
        files = (p for p in images.rglob("*") if p.suffix.lower() in _SUFFIXES)
        extra = sum(p.relative_to(images).as_posix() not in named for p in files)
        self.left_out: dict[str, dict[str, int]] = {"train": {"not in tags.csv": extra}} if extra else {}

    def _read_table(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"{path}: missing table; expected columns file, tags and perhaps split") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
        columns = [c.strip() for c in reader.fieldnames or []]
        for column in ("file", "tags"):
            if column not in columns:
                raise DataError(f"{path}: no column '{column}' among {', '.join(columns) or 'none'}")
        for column in columns:
            if column not in ("file", "tags", "split"):
                raise DataError(f"{path}: unknown column '{column}'{nearest(column, ('file', 'tags', 'split'))}")
        reader.fieldnames = columns
        seen: dict[str, int] = {}
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            file = (row["file"] or "").strip()
            if None in row:
                raise DataError(f"{where}: more values than columns; tags are joined by semicolons")
            if not file:
                raise DataError(f"{where}: no file name")
            split = (row.get("split") or "").strip() or "train"
            if split not in _SPLITS:
                raise DataError(f"{where}: split '{split}'{nearest(split, _SPLITS)}")
            stem = Path(file).stem
            if stem in seen:
                raise DataError(f"{where}: file stem '{stem}' was used on line {seen[stem]}; expected unique stems")
            seen[stem] = reader.line_num
            tags = tuple(t.strip() for t in (row["tags"] or "").split(";") if t.strip())
            self._entries.setdefault(split, {})[stem] = _Entry(file, tags, reader.line_num)
        self._entries.setdefault("train", {})

    def _classes(self) -> tuple[str, ...]:
        path = self.root / "classes.txt"
        if path.is_file():
            names = [n.strip() for n in path.read_text(encoding="utf-8-sig").splitlines() if n.strip()]
        else:
            names = sorted({t for entries in self._entries.values() for e in entries.values() for t in e.tags})
        if len(set(names)) != len(names):
            double = next(n for n in names if names.count(n) > 1)
            raise DataError(f"{path}: class '{double}' appears twice")
        if not 1 <= len(names) < IGNORE:
            raise DataError(f"{self.root}: {len(names)} classes; expected 1…{IGNORE - 1}")
        return tuple(names)

    @property
    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def splits(self) -> dict[str, list[str]]:
        """File stems in the order of the table; ``val`` only where the table names it."""
        return {split: list(self._entries[split]) for split in _SPLITS if split in self._entries}

    def tags(self, split: str, id: str) -> tuple[int, ...]:
        """The tags of the table."""
        return tuple(sorted({self._index[t] for t in self._entries[split][id].tags}))

    def row(self, split: str, id: str) -> Row:
        """Read an image, and its mask where there is one.

        Raises:
            RowError: A missing or broken image, or an unusable mask.
        """
        entry = self._entries[split][id]
        path = self.root / "images" / entry.file
        mask_path = self.root / "masks" / f"{id}.png"
        return make_row(
            id=id,
            image=read_bytes(path),
            tags=self.tags(split, id),
            mask=read_bytes(mask_path, "mask") if mask_path.is_file() else None,
            num_classes=len(self.class_names),
            where=f"{path} (tags.csv line {entry.line})",
            mask_where=str(mask_path),
        )
