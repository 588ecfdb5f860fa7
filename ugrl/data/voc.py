"""PASCAL VOC in its devkit layout.

The root may be ``VOCdevkit``, ``VOCdevkit/VOC2012`` or the folder above. Read under it::

    ImageSets/Segmentation/{train,val,train_aug}.txt    split lists
    JPEGImages/ID.jpg
    Annotations/ID.xml                                   tags, with labels="xml"
    SegmentationClassAug/ID.png or SegmentationClass/ID.png

Masks are read as indices, whatever their palette. Tags come from the XML's objects (``xml``, difficult
ones among them) or from the labels in the mask (``mask``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ugrl.config import nearest
from ugrl.data.images import decode_labels
from ugrl.data.source import RowError, check_root, make_row, read_bytes
from ugrl.errors import DataError
from ugrl.types import IGNORE, Row

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LABELS = ("xml", "mask")
_INDEX = {name: i + 1 for i, name in enumerate(CLASS_NAMES)}
_MASKS = ("SegmentationClassAug", "SegmentationClass")


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
    class_names = CLASS_NAMES

    def __init__(self, root: str | Path | None, *, labels: str = "xml", train_list: str | None = None) -> None:
        if labels not in LABELS:
            raise DataError(f"voc: labels is '{labels}'; expected xml or mask")
        self.root = _devkit(check_root(root, self.name))
        self._labels = labels
        self._lists = self.root / "ImageSets" / "Segmentation"
        if train_list is None:
            train_list = "train_aug" if (self._lists / "train_aug.txt").is_file() else "train"
        self._train_list = train_list.removesuffix(".txt")
        self.left_out: dict[str, dict[str, int]] = {}
        self._ids = {"train": self._read_list(self._train_list), "val": self._read_list("val")}

    def _read_list(self, name: str) -> list[str]:
        path = self._lists / f"{name}.txt"
        if not path.is_file():
            have = sorted(p.stem for p in self._lists.glob("*.txt"))
            raise DataError(f"{path}: missing split list{nearest(name, have) if have else ''}")
        # A line is an id; lists of the augmented set hold "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png".
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Path(line.split()[0]).stem for line in lines if line.strip()]

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
        path = self.root / "JPEGImages" / f"{id}.jpg"
        mask_path = next((p for d in _MASKS if (p := self.root / d / f"{id}.png").is_file()), None)
        mask = None
        if mask_path is not None:
            mask = read_bytes(mask_path, "mask")
        elif self._labels == "mask" or split != "train":
            why = "labels come from masks" if self._labels == "mask" else f"split '{split}' is evaluated"
            raise RowError(f"{self.root / _MASKS[1] / f'{id}.png'}: missing mask, and {why}", "missing file")
        image = read_bytes(path)
        tags = self._xml_tags(id) if self._labels == "xml" else _mask_tags(mask or b"", str(mask_path))
        return make_row(
            id=id,
            image=image,
            tags=tags,
            mask=mask,
            num_classes=len(CLASS_NAMES),
            where=str(path),
            mask_where=str(mask_path or path),
        )

    def _xml_tags(self, id: str) -> tuple[int, ...]:
        path = self.root / "Annotations" / f"{id}.xml"
        try:
            tree = ElementTree.fromstring(read_bytes(path, "annotation"))
        except ElementTree.ParseError as error:
            raise RowError(f"{path}: broken XML: {error}", "broken annotation") from None
        tags = set()
        for item in tree.iter("object"):
            name = (item.findtext("name") or "").strip()
            if name not in _INDEX:
                raise RowError(f"{path}: unknown class '{name}'{nearest(name, CLASS_NAMES)}", "unknown class")
            tags.add(_INDEX[name])
        return tuple(sorted(tags))


def _devkit(root: Path) -> Path:
    places = [root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"]
    for place in places:
        if (place / "ImageSets" / "Segmentation").is_dir():
            return place
    raise DataError(f"{root}: no ImageSets/Segmentation in it, in VOC2012 or in VOCdevkit/VOC2012 below it")


def _mask_tags(mask: bytes, where: str) -> tuple[int, ...]:
    try:
        labels = np.unique(np.asarray(decode_labels(mask, where)))
    except DataError as error:
        raise RowError(str(error), "unusable mask") from None
    return tuple(int(v) for v in labels if v not in (0, IGNORE) and v <= len(CLASS_NAMES))
