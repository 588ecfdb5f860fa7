"""PASCAL VOC in its devkit layout.

The root may be ``VOCdevkit``, ``VOCdevkit/VOC2012`` or the folder above. Read under it::

    ImageSets/Segmentation/{train,val,train_aug}.txt    split lists
    JPEGImages/ID.jpg
    Annotations/ID.xml                                   tags, with labels="xml"
    SegmentationClassAug/ID.png or SegmentationClass/ID.png

    labelmap.txt                                         optional: other classes than VOC's twenty, see read_labelmap

Images may have another suffix of an image. A line of a list is an id, whatever its characters, or the two paths of
the augmented set's lists. Masks are read as indices, whatever their palette. Tags come from the XML's objects
(``xml``, difficult ones among them) or from the labels in the mask (``mask``).
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ugrl.data.images import decode_labels, without_suffix
from ugrl.data.source import CONTROL, RowError, Stray, check_root, file_under, make_row, read_bytes
from ugrl.errors import DataError
from ugrl.foreign import parse_xml, read_text, under
from ugrl.row import IGNORE, Row
from ugrl.text import brief, line, nearest

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LABELS = ("xml", "mask")
_MASKS = ("SegmentationClassAug", "SegmentationClass")
# What follows "JPEGImages/" in "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png", the second of the same ID.
_PATHS = re.compile(r"(.+?)\.\w{1,5}(?:\s+\S*SegmentationClass\w*/\1\.png)?")
MOST_LINE = 1000


def list_entry(text: str) -> tuple[str, ...]:
    """The ids that a line of a list may stand for: the line itself, else without a suffix, else out of its two paths.

    >>> list_entry("2007_000032"), list_entry("2007_000032.jpg")
    (('2007_000032',), ('2007_000032.jpg', '2007_000032'))
    >>> list_entry("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png")[-1]
    '2007_000032'
    """
    if found := _PATHS.fullmatch(text.partition("JPEGImages/")[2]):
        return text, found[1]
    bare = without_suffix(text)
    return (text, bare) if bare != text else (text,)


def read_labelmap(path: Path) -> tuple[str, ...] | None:
    """The classes that a ``labelmap.txt`` names in the order of their labels, without background; ``None``: no file.

    A line is ``NAME:R,G,B:parts:actions`` as CVAT writes it (or ``NAME`` alone), a comment begins with ``#``, and the
    first name is ``background``. Colours are not looked at: masks hold the numbers of the lines.

    Raises:
        DataError: Another first name, a name twice or empty, or too many.
    """
    if not os.path.lexists(path):
        return None
    rows = [text.strip() for text in read_text(path, "label map").splitlines()]
    names = [text.partition(":")[0].strip() for text in rows if text and not text.startswith("#")]
    if not names or names[0] != "background":
        raise DataError(f"{line(path)}: begins with {brief(names[0]) if names else 'nothing'}; expected background")
    for name in names:
        if not name or CONTROL.search(name) or names.count(name) > 1:
            raise DataError(f"{line(path)}: class {brief(name)}; expected a name on each line, each once")
    if not 1 < len(names) <= IGNORE:
        raise DataError(f"{line(path)}: {len(names) - 1} classes; expected 1…{IGNORE - 1}")
    return tuple(names[1:])


class VocSource:
    """See the module; a :class:`ugrl.data.source.Source`.

    Args:
        root: See the module.
        labels: ``xml`` or ``mask``: where tags come from.
        train_list: Split list used as ``train``; ``None`` for ``train_aug`` where there is one, else
            ``train``.

    Raises:
        DataError: No devkit there, a missing split list, or another value of ``labels``.
    """

    name = "voc"

    def __init__(self, root: str | Path | None, *, labels: str = "xml", train_list: str | None = None) -> None:
        if labels not in LABELS:
            raise DataError(f"voc: labels is {brief(labels)}; expected xml or mask")
        self.root = _devkit(check_root(root, self.name))
        self.class_names = read_labelmap(self.root / "labelmap.txt") or CLASS_NAMES
        self._index = {name: i + 1 for i, name in enumerate(self.class_names)}
        self._labels = labels
        self._lists = self.root / "ImageSets" / "Segmentation"
        if train_list is None:
            train_list = "train_aug" if (self._lists / "train_aug.txt").is_file() else "train"
        self._train_list = train_list.removesuffix(".txt")
        self.left_out: dict[str, dict[str, int]] = {}
        self._lines: dict[str, str] = {}
        self._ids = {"train": self._read_list(self._train_list), "val": self._read_list("val")}
        self.stray = self._unused()

    def _read_list(self, name: str) -> list[str]:
        path = under(self._lists, f"{name}.txt", "voc: train_list")
        if not os.path.lexists(path):
            have = sorted(without_suffix(p.name).removesuffix(".txt") for p in self._lists.glob("*.txt"))
            raise DataError(f"{line(path)}: missing split list{line(nearest(name[:60], have)) if have else ''}")
        ids = []
        for at, text in enumerate(read_text(path, "split list").splitlines(), 1):
            if not text.strip():
                continue
            where = f"{line(path)}: line {at}"
            if len(text) > MOST_LINE:
                raise DataError(f"{where}: {len(text)} characters; expected an id of an image")
            id = self._id(text.strip())
            if CONTROL.search(id):
                raise DataError(f"{where}: id {brief(id)}; expected no control characters")
            if id in self._lines:
                raise DataError(f"{where}: id {brief(id)} was used before ({self._lines[id]}); expected unique ids")
            self._lines[id] = f"{path.name} line {at}"
            ids.append(id)
        return ids

    def _id(self, text: str) -> str:
        """What a line of a list names."""
        whole, *rest = list_entry(text)
        if rest and "JPEGImages/" in text:
            return rest[-1]
        return next((id for id in rest if id in self._names and whole not in self._names), whole)

    @cached_property
    def _names(self) -> dict[str, str]:
        """The images that are there, by id."""
        found: dict[str, str] = {}
        for name in sorted(_listed(self.root / "JPEGImages"), key=lambda n: (not n.endswith(".jpg"), n)):
            if (id := without_suffix(name)) != name:
                found.setdefault(id, name)
        return found

    def _unused(self) -> dict[str, Stray]:
        """Masks that belong to no image, and images in no list."""
        masks = [f"{d}/{n}" for d in _MASKS for n in sorted(_listed(self.root / d)) if _stem(n) not in self._names]
        images = [f"JPEGImages/{name}" for id, name in self._names.items() if id not in self._lines]
        kinds = {"mask of no image": masks, "image in no list": images}
        return {kind: Stray(len(names), line(names[0])) for kind, names in kinds.items() if names}

    @property
    def options(self) -> dict[str, Any]:
        """Where tags come from and the list used as train."""
        return {"labels": self._labels, "train_list": self._train_list}

    def splits(self) -> dict[str, list[str]]:
        """Ids in the order of the lists."""
        return {split: list(ids) for split, ids in self._ids.items()}

    def tags(self, split: str, id: str) -> tuple[int, ...] | None:
        """Tags from the XML; ``None`` where they come from masks, or where the XML is unusable."""
        if self._labels == "mask":
            return None
        try:
            return self._xml_tags(id)
        except RowError:
            return None  # refused or counted when the row is read

    def row(self, split: str, id: str) -> Row:
        """Read image, tags and mask.

        Raises:
            RowError: A missing or broken file, an unknown class, or a mask of colours. A mask may be
                missing only in train and with tags from XML.
        """
        where = self._lines[id]
        path = file_under(self.root / "JPEGImages", self._names.get(id, f"{id}.jpg"), where)
        mask_path = self._mask_path(id, where)
        mask = None
        if mask_path is not None:
            mask = read_bytes(mask_path, "mask")
        elif self._labels == "mask" or split != "train":
            why = "labels come from masks" if self._labels == "mask" else f"split '{split}' is evaluated"
            raise RowError(f"{line(self.root / _MASKS[1] / f'{id}.png')}: missing mask, and {why}", "missing file")
        image = read_bytes(path)
        tags = (
            self._xml_tags(id)
            if self._labels == "xml"
            else _mask_tags(mask or b"", line(mask_path), len(self.class_names))
        )
        return make_row(
            id=id,
            image=image,
            tags=tags,
            mask=mask,
            num_classes=len(self.class_names),
            where=f"{line(path)} ({where})",
            mask_where=line(mask_path),
        )

    def _mask_path(self, id: str, where: str) -> Path | None:
        for folder in _MASKS:
            for suffix in (".png", ".PNG"):
                path = file_under(self.root / folder, id + suffix, where)
                if os.path.lexists(path):
                    return path
        return None

    def _xml_tags(self, id: str) -> tuple[int, ...]:
        path = file_under(self.root / "Annotations", f"{id}.xml", self._lines[id])
        try:
            tree = parse_xml(read_bytes(path, "annotation"), line(path))
        except RowError:
            raise
        except DataError as error:
            raise RowError(str(error), "broken annotation") from None
        tags = set()
        for item in tree.iter("object"):
            name = (item.findtext("name") or "").strip()
            if name not in self._index:
                hint = line(nearest(name[:60], self.class_names), 60)
                raise RowError(f"{line(path)}: unknown class {brief(name)}{hint}", "unknown class")
            tags.add(self._index[name])
        return tuple(sorted(tags))


def _listed(folder: Path) -> list[str]:
    """Names in a folder, none where there is no such folder."""
    try:
        return [n for n in os.listdir(folder) if not n.startswith(".")]
    except OSError:
        return []


def _stem(mask: str) -> str:
    return mask[:-4] if mask.lower().endswith(".png") else mask


def _devkit(root: Path) -> Path:
    places = [root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"]
    for place in places:
        if os.path.isdir(place / "ImageSets" / "Segmentation"):
            return place
    raise DataError(f"{line(root)}: no ImageSets/Segmentation in it, in VOC2012 or in VOCdevkit/VOC2012 below it")


def _mask_tags(mask: bytes, where: str, num_classes: int) -> tuple[int, ...]:
    try:
        labels = np.unique(np.asarray(decode_labels(mask, where)))
    except DataError as error:
        raise RowError(str(error), "unusable mask") from None
    return tuple(int(v) for v in labels if v not in (0, IGNORE) and v <= num_classes)
