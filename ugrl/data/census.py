"""What a data set holds by class and split: tags and masks held against each other.

Nothing here stops anybody. A mask may rightly show what no tag says; that half of all masks do hints at labels in
another order than the classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from ugrl import foreign
from ugrl.data.images import decode_labels, orientation
from ugrl.data.source import Stray
from ugrl.row import IGNORE, Row
from ugrl.text import brief, line, plain

# What is counted of each class, and of each split.
_BY_CLASS = ("tagged", "shown", "unshown", "untold", "pixels")
_COUNTS = ("images", "masks", "untagged", "binary", "turned", "background", "ignored")
_MANY = 10**15


@dataclass(slots=True)
class Census:
    """Counts over rows.

    Attributes:
        classes: F, the foreground classes.
        images: Number of rows.
        masks: Number of rows with a mask.
        untagged: Number of rows without a tag.
        binary: Rows whose mask holds 255 and nothing else but 0.
        turned: Rows with a mask whose image is stored turned (EXIF).
        background: Number of pixels with label 0.
        ignored: Number of pixels with label 255.
        tagged: Rows that are tagged with a class, for each class.
        shown: Rows whose mask shows it.
        unshown: Rows that are tagged with it and whose mask does not show it.
        untold: Rows that are not tagged with it and whose mask shows it.
        pixels: Number of pixels with its label.
        examples: An id for each count above that is a remark, the first: ``unshown``, or ``unshown 3`` of class 3.
    """

    classes: int
    images: int = 0
    masks: int = 0
    untagged: int = 0
    binary: int = 0
    turned: int = 0
    background: int = 0
    ignored: int = 0
    tagged: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    unshown: list[int] = field(default_factory=list)
    untold: list[int] = field(default_factory=list)
    pixels: list[int] = field(default_factory=list)
    examples: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _BY_CLASS:
            if not getattr(self, name):
                setattr(self, name, [0] * self.classes)

    def add(self, row: Row) -> None:
        """Count a row.

        Raises:
            DataError: Its image or mask cannot be read.
        """
        self.images += 1
        for tag in row.tags:
            self.tagged[tag - 1] += 1
        if not row.tags:
            self.untagged += 1
            self._note("untagged", row)
        if row.mask is None:
            return
        self.masks += 1
        counts = decode_labels(row.mask, f"row {line(row.id)}").histogram()
        pixels = counts[1 : self.classes + 1]
        self.background += counts[0]
        self.ignored += counts[IGNORE]
        if counts[IGNORE] and not any(pixels):
            self.binary += 1
            self._note("binary", row)
        if orientation(row.image) != 1:
            self.turned += 1
            self._note("turned", row)
        for f, n in enumerate(pixels):
            self.pixels[f] += n
            self.shown[f] += n > 0
            if (n > 0) != (f + 1 in row.tags):
                kind = "untold" if n else "unshown"
                getattr(self, kind)[f] += 1
                self._note(f"{kind} {f + 1}", row)

    def _note(self, kind: str, row: Row) -> None:
        self.examples.setdefault(kind, line(row.id))

    def merge(self, other: Census) -> None:
        """Add another's counts; examples stay the first."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _BY_CLASS:
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)])
        self.examples = {**other.examples, **self.examples}

    def to_tree(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_tree(tree: Any, where: str) -> Census:
        """The census that :meth:`to_tree` wrote.

        Raises:
            DataError: The tree does not hold a census.
        """
        classes = foreign.as_int(foreign.field(tree, "classes", where), where, least=1, most=IGNORE - 1)
        made = Census(classes)
        for name in _COUNTS:
            setattr(made, name, foreign.as_int(foreign.field(tree, name, where), where, least=0, most=_MANY))
        for name in _BY_CLASS:
            found = foreign.as_list(foreign.field(tree, name, where), where, most=classes)
            counts = [foreign.as_int(n, where, least=0, most=_MANY) for n in found]
            setattr(made, name, counts + [0] * (classes - len(counts)))
        for kind, id in foreign.as_dict(foreign.field(tree, "examples", where), where).items():
            made.examples[kind] = foreign.as_str(id, where)
        return made


def census_of(rows: Iterable[Row], classes: int) -> Census:
    """Count rows."""
    census = Census(classes)
    for row in rows:
        census.add(row)
    return census


@dataclass(frozen=True, slots=True)
class Inventory:
    """The census of each split of a data set, and the files that are worth a word, by what they are."""

    class_names: tuple[str, ...]
    splits: dict[str, Census]
    stray: Mapping[str, Stray] = field(default_factory=dict)

    def to_tree(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "splits": {name: census.to_tree() for name, census in self.splits.items()},
            "stray": {kind: {"files": s.files, "example": s.example} for kind, s in self.stray.items()},
        }

    @staticmethod
    def from_tree(tree: Any, class_names: Sequence[str], where: str) -> Inventory:
        """What :meth:`to_tree` wrote.

        Raises:
            DataError: It is none, or one of other classes.
        """
        splits = {
            name: Census.from_tree(found, f"{where}: census of '{line(name, 40)}'")
            for name, found in foreign.as_dict(foreign.field(tree, "splits", where), where).items()
        }
        for census in splits.values():
            foreign.as_int(
                census.classes, f"{where}: classes of a census", least=len(class_names), most=len(class_names)
            )
        stray = {
            kind: Stray(
                foreign.as_int(foreign.field(found, "files", where), where, least=0),
                foreign.as_str(foreign.field(found, "example", where), where),
            )
            for kind, found in foreign.as_dict(foreign.field(tree, "stray", where), where).items()
        }
        return Inventory(tuple(class_names), splits, stray)

    def table(self) -> Table:
        """Per class and split: images that are tagged, images whose mask shows it, and where these disagree."""
        table = Table(title="images by class", caption="tagged / with pixels / where these disagree")
        table.add_column("class", overflow="fold")
        for name in self.splits:
            table.add_column(plain(name), justify="right")
        for f, name in enumerate(self.class_names):
            cells = []
            for census in self.splits.values():
                shown = f"{census.shown[f]} / {census.unshown[f] + census.untold[f]}" if census.masks else "–"
                cells.append(f"{census.tagged[f]} / {shown}")
            table.add_row(plain(name), *cells)
        table.add_section()
        for words, name in (("images", "images"), ("without tags", "untagged"), ("with a mask", "masks")):
            table.add_row(words, *(str(getattr(census, name)) for census in self.splits.values()))
        return table

    def notes(self) -> list[str]:
        """Files that are worth a word."""
        return [f"{s.files} × {kind} (such as {s.example})" for kind, s in self.stray.items()]

    def warnings(self) -> list[str]:
        """What may be wrong, one line each."""
        return [
            *self._of_names(),
            *self._of_tags(),
            *(w for name, census in self.splits.items() for w in self._of_masks(name, census)),
            *(
                f"{s.files} mask files belong to no image and are not used (such as {s.example})"
                for kind, s in self.stray.items()
                if kind.startswith("mask")
            ),
        ]

    def _of_names(self) -> list[str]:
        keys: dict[str, str] = {}
        found = []
        for name in self.class_names:
            first = keys.setdefault(_alike(name), name)
            parts = [p.strip() for p in re.split(r"[,;|/#&+]", name) if p.strip()]
            known = [p for p in parts if p != name and p in self.class_names]
            if first != name:
                found.append(f"classes {brief(first)} and {brief(name)} differ in little; one class or two?")
            elif known:
                found.append(f"class {brief(name)} looks like several joined, beside class {brief(known[0])}")
        return found

    def _of_tags(self) -> list[str]:
        found = []
        train = self.splits.get("train")
        taught = [0] * len(self.class_names) if train is None else train.tagged
        elsewhere = [sum(c.tagged[f] + c.shown[f] for c in self.splits.values()) for f in range(len(taught))]
        words = [line(n, 60) for n in self.class_names]
        for f, name in enumerate(words):
            if not elsewhere[f]:
                found.append(f"class '{name}' owns nothing: no image is tagged with it, no mask shows it")
            elif not taught[f]:
                where = ", ".join(n for n, c in self.splits.items() if n != "train" and c.tagged[f] + c.shown[f])
                found.append(
                    f"class '{name}' is tagged in no image of train" + (f", but is in {where}" if where else "")
                )
        if train is not None and train.images > 1:
            for f, name in enumerate(words):
                if train.tagged[f] == train.images:
                    found.append(f"class '{name}' is tagged in all {train.images} images of train: none is without it")
                elif len(words) > 1 and train.tagged[f] and train.tagged[f] == sum(train.tagged):
                    found.append(f"class '{name}' has all tags of train; the other {len(words) - 1} have none")
        return found

    def _of_masks(self, split: str, census: Census) -> list[str]:
        if not census.masks:
            return []
        found = []
        where = f"masks of {line(split, 40)}"

        def such(kind: str) -> str:
            return f" (such as {census.examples[kind]})" if kind in census.examples else ""

        for f, name in enumerate(self.class_names):
            if census.unshown[f] and not census.shown[f]:
                found.append(
                    f"{where}: class '{line(name, 60)}' is tagged in {census.unshown[f]} images with a mask and has no "
                    f"pixel in any{such(f'unshown {f + 1}')}"
                )
        if total := sum(census.untold):
            f = int(np.argmax(census.untold))
            found.append(
                f"{where} show classes that are not among their images' tags, {total} times, most often "
                f"'{line(self.class_names[f], 60)}'{such(f'untold {f + 1}')}: are these the classes' numbers?"
            )
        if census.binary:
            found.append(
                f"{where}: {census.binary} of {census.masks} hold only 0 and 255{such('binary')}; 255 is ignored, "
                f"a class is a number from 1 to {census.classes}"
            )
        labelled = [census.background, *census.pixels]
        if sum(labelled) and max(labelled) == sum(labelled):
            k = labelled.index(max(labelled))
            found.append(f"{where}: '{line(('background', *self.class_names)[k], 60)}' covers every labelled pixel")
        if census.turned:
            found.append(
                f"{where}: {census.turned} belong to images that are stored turned (EXIF){such('turned')}; images are "
                "turned upright, and so must the masks be"
            )
        return found


def _alike(name: str) -> str:
    """What is left of a name without case, spaces, joints and ending dots."""
    return re.sub(r"[\s_\-]+", "", name.casefold()).rstrip(".:,;") or name
