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

Of ``images/x/a.jpg``, the mask may be ``masks/a.png`` or ``masks/x/a.png``, with ``_mask`` before its suffix or
without. Images of one stem in different folders are told apart by these folders, their masks too. How other
people's tables are read is said in :mod:`ugrl.data.table`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ugrl.data.images import without_suffix
from ugrl.data.source import Stray, check_root, file_under, make_row, read_bytes
from ugrl.data.table import SPLITS, Entry, read_classes, read_table
from ugrl.errors import DataError
from ugrl.row import IGNORE, Row
from ugrl.text import brief, line


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
        table = self.root / "tags.csv"
        classes = read_classes(self.root / "classes.txt")
        images = self.root / "images"
        there: dict[str, list[str]] = {}
        for name in sorted(_files(images)):
            if without_suffix(name) != name:
                there.setdefault(without_suffix(name), []).append(name)
        entries = [_below(e, images, there) for e in read_table(table, classes)]
        names = tuple(sorted({t for e in entries for t in e.tags})) if classes is None else classes
        if not 1 <= len(names) < IGNORE:
            raise DataError(f"{line(self.root)}: {len(names)} classes; expected 1…{IGNORE - 1}")
        self.class_names = names
        self._index = {name: f + 1 for f, name in enumerate(names)}
        self._entries = _by_id(entries, line(table))
        self._masks, self.stray = _masks(self.root / "masks", self._entries)
        named = {e.file for e in entries}
        extra = [name for names in there.values() for name in names if name not in named]
        self.left_out: dict[str, dict[str, int]] = {}
        if extra:
            self.left_out["train"] = {"not in tags.csv": len(extra)}
            self.stray["image not in tags.csv"] = Stray(len(extra), line(f"images/{extra[0]}"))
        known = {"tags.csv", "classes.txt", "images", "masks"}
        # Of what lies there too, shards and runs are ours.
        ours = ("manifest.json", "journal.json", "config.yaml")
        beside = sorted(
            n
            for n in os.listdir(self.root)
            if n not in known and not n.startswith(".") and not any((self.root / n / f).is_file() for f in ours)
        )
        if beside:
            self.stray["not read, beside images and masks"] = Stray(len(beside), line(beside[0]))

    @property
    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def splits(self) -> dict[str, list[str]]:
        """Ids in the order of the table; ``val`` only where the table names it."""
        found: dict[str, list[str]] = {"train": []}
        for id, entry in self._entries.items():
            found.setdefault(entry.split, []).append(id)
        return {split: found[split] for split in SPLITS if split in found}

    def tags(self, split: str, id: str) -> tuple[int, ...]:
        """The tags of the table."""
        return tuple(sorted({self._index[t] for t in self._entries[id].tags}))

    def row(self, split: str, id: str) -> Row:
        """Read an image, and its mask where there is one.

        Raises:
            RowError: A missing or broken image, or an unusable mask.
        """
        entry = self._entries[id]
        path = file_under(self.root / "images", entry.file, f"{line(self.root)}/tags.csv: line {entry.line}")
        mask_path = self._masks.get(id)
        return make_row(
            id=id,
            image=read_bytes(path),
            tags=self.tags(split, id),
            mask=None if mask_path is None else read_bytes(mask_path, "mask"),
            num_classes=len(self.class_names),
            where=f"{line(path)} (tags.csv line {entry.line})",
            mask_where=line(mask_path),
        )


def _below(entry: Entry, images: Path, there: dict[str, list[str]]) -> Entry:
    """An entry whose file is a path below ``images``; other programs name that folder too, or leave the suffix out."""
    path = PurePosixPath(entry.file.replace("\\", "/"))
    if path.parts[:1] == ("images",) and not os.path.lexists(images / "images"):
        path = path.relative_to("images")
    found = there.get(str(path), [])
    return entry._replace(file=found[0] if len(found) == 1 else str(path))


def _by_id(entries: list[Entry], where: str) -> dict[str, Entry]:
    """Entries by the stem of their file; where files share it, by their whole path without suffix."""
    keys = [without_suffix(e.file) for e in entries]
    stems = Counter(PurePosixPath(k).name for k in keys)
    found: dict[str, Entry] = {}
    for entry, key in zip(entries, keys, strict=True):
        stem = PurePosixPath(key).name
        id = stem if stems[stem] == 1 else key
        if id in found:
            first = found[id]
            raise DataError(
                f"{where}: line {entry.line}: file {brief(entry.file)} was used on line {first.line} "
                f"({brief(first.file)}); expected unique names, suffixes left aside"
            )
        found[id] = entry
    return found


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, as paths from there; folders that are links are followed once."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        below = PurePosixPath(Path(place).relative_to(folder).as_posix())
        yield from (str(below / name) for name in names)


def _masks(folder: Path, entries: dict[str, Entry]) -> tuple[dict[str, Path], dict[str, Stray]]:
    """The mask of each image that has one, and those of none.

    Raises:
        DataError: An image has two masks.
    """
    names = sorted(n for n in _files(folder) if not n.rpartition("/")[2].startswith("."))
    files: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(".png"):
            files.setdefault(name[:-4], []).append(name)
    found: dict[str, str] = {}
    used: set[str] = set()
    # Exact names first: "a_mask.png" is the mask of "a_mask.jpg", where that is an image too.
    for ending in ("", "_mask"):
        for id, entry in entries.items():
            bare = without_suffix(entry.file)
            suffix = entry.file.removeprefix(bare)  # "a.jpg.png" is what some tools make of "a.jpg"
            keys = dict.fromkeys(name + more + ending for name in (bare, id) for more in ("", suffix))
            masks = [name for key in keys for name in files.get(key, ()) if name not in used]
            if id in found:
                masks.insert(0, found[id])
            if len(masks) > 1:
                both = f"{line(masks[0])} and {line(masks[1])}"
                raise DataError(f"{line(folder)}: {both} are both masks of {brief(entry.file)}; keep one")
            if masks:
                used.add(masks[0])
                found[id] = masks[0]
    kinds = {
        "mask of no image": [name for name in names if name not in used],
        "taken as a mask though not named STEM.png": [name for id, name in found.items() if name != f"{id}.png"],
    }
    stray = {kind: Stray(len(them), line(f"masks/{them[0]}")) for kind, them in kinds.items() if them}
    return {id: folder / name for id, name in found.items()}, stray
