"""COCO's instances JSON and images, as published in 2014 and 2017.

Expected under the root::

    annotations/instances_train2017.json    annotations/instances_val2017.json
    train2017/000000000009.jpg              val2017/…
    (2014: instances_train2014.json and train2014/COCO_train2014_000000000009.jpg)

Category ids in ascending order become 1…F (the raw ids have gaps). Objects are painted in file order,
later over earlier; crowd regions become 255 where no object lies. Crowds set tags like objects do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ugrl.data.coco_masks import spans
from ugrl.data.images import encode_labels, image_size
from ugrl.data.source import RowError, check_root, make_row, read_bytes
from ugrl.errors import DataError
from ugrl.types import IGNORE, Row

YEARS = (2014, 2017)
_SPLITS = ("train", "val")


class _Annotation(NamedTuple):
    id: int
    image_id: int
    category_id: int
    crowd: bool
    segmentation: Any


class _Image(NamedTuple):
    id: int
    file: str
    width: int
    height: int
    annotations: list[_Annotation]


class CocoSource:
    """See the module; a :class:`ugrl.data.source.Source`.

    Args:
        root: Folder with ``annotations`` and the image folders.
        year: 2014 or 2017; found from the files where ``None``.
        keep_unannotated: Whether images without any annotation stay, as pure background.

    Raises:
        DataError: Missing files, broken JSON, annotations of unknown images or categories, categories
            that differ between the splits.
    """

    name = "coco"

    def __init__(self, root: str | Path | None, *, year: int | None = None, keep_unannotated: bool = False) -> None:
        self.root = check_root(root, self.name)
        self._year = _find_year(self.root, year)
        self._keep = keep_unannotated
        self.left_out: dict[str, dict[str, int]] = {}
        self._images: dict[str, dict[str, _Image]] = {}
        categories: dict[int, str] | None = None
        for split in _SPLITS:
            path = self.root / "annotations" / f"instances_{split}{self._year}.json"
            images, found = _read_json(path)
            if categories is not None and found != categories:
                raise DataError(f"{path}: its categories differ from those of the train split; expected the same")
            categories = found
            self._images[split] = self._keep_annotated(split, images)
        ordered = sorted((categories or {}).items())
        self.class_names = tuple(name for _, name in ordered)
        self._label = {category: f + 1 for f, (category, _) in enumerate(ordered)}

    def _keep_annotated(self, split: str, images: dict[int, _Image]) -> dict[str, _Image]:
        out: dict[str, _Image] = {}
        for image in images.values():
            if not image.annotations and not self._keep:
                counts = self.left_out.setdefault(split, {"unannotated": 0})
                counts["unannotated"] += 1
                continue
            stem = Path(image.file).stem
            if stem in out:
                raise DataError(f"images {out[stem].id} and {image.id} of split '{split}' share the file stem '{stem}'")
            out[stem] = image
        return out

    @property
    def options(self) -> dict[str, Any]:
        """Year and whether unannotated images stay."""
        return {"year": self._year, "keep_unannotated": self._keep}

    def splits(self) -> dict[str, list[str]]:
        """File stems in the JSON's order."""
        return {split: list(images) for split, images in self._images.items()}

    def tags(self, split: str, id: str) -> tuple[int, ...]:
        """Classes of all annotations, crowds among them."""
        return tuple(sorted({self._label[a.category_id] for a in self._images[split][id].annotations}))

    def row(self, split: str, id: str) -> Row:
        """Read the image and paint its annotations.

        Raises:
            RowError: A missing or broken image, a size that differs from the JSON's, a broken annotation.
        """
        image = self._images[split][id]
        path = self.root / f"{split}{self._year}" / image.file
        where = f"{path} (image id {image.id})"
        if not path.is_file():
            raise RowError(f"{where}: missing image file that instances_{split}{self._year}.json names", "missing file")
        data = read_bytes(path)
        try:
            size = image_size(data, where)
        except DataError as error:
            raise RowError(str(error)) from None
        if size != (image.width, image.height):
            raise RowError(f"{where}: {size[0]}×{size[1]}; the JSON expects {image.width}×{image.height}", "other size")
        mask = encode_labels(self._paint(image, where))
        tags = self.tags(split, id)
        return make_row(id=id, image=data, tags=tags, mask=mask, num_classes=len(self.class_names), where=where)

    def _paint(self, image: _Image, where: str) -> np.ndarray:
        """uint8 labels (H, W)."""
        flat = np.zeros(image.width * image.height, np.uint8)
        # Objects first, in file order; then crowds, only where nothing lies.
        for annotation in sorted(image.annotations, key=lambda a: a.crowd):
            try:
                parts = spans(annotation.segmentation, image.height, image.width)
            except (ValueError, OverflowError) as error:
                raise RowError(f"{where}: annotation {annotation.id} has {error}", "broken annotation") from None
            for start, inside in parts:
                view = flat[start : start + len(inside)]
                if annotation.crowd:
                    view[inside & (view == 0)] = IGNORE
                else:
                    view[inside] = self._label[annotation.category_id]
        return flat.reshape(image.width, image.height).T


def _find_year(root: Path, year: int | None) -> int:
    if year is not None and year not in YEARS:
        raise DataError(f"coco: year is {year}; expected 2014 or 2017")
    names = {y: root / "annotations" / f"instances_train{y}.json" for y in YEARS}
    have = [y for y in YEARS if names[y].is_file()]
    if year is not None:
        have = [year]
    if not have:
        raise DataError(f"{root}: no annotations/instances_train2014.json or …2017.json; expected the COCO layout")
    if len(have) > 1:
        raise DataError(f"{root}: holds both 2014 and 2017; choose one with --year")
    return have[0]


def _slim(tree: dict[str, Any]) -> Any:
    """Keeps of each annotation what is needed, while the JSON is read: the whole train JSON as Python
    numbers would take gigabytes.
    """
    if "image_id" not in tree or "category_id" not in tree:
        return tree
    shape = tree.get("segmentation")
    if isinstance(shape, list):
        try:
            shape = tuple(np.asarray(p, np.float64) for p in shape)
        except (TypeError, ValueError):
            shape = None  # refused with the annotation's id when it is painted
    return _Annotation(tree.get("id", -1), tree["image_id"], tree["category_id"], bool(tree.get("iscrowd")), shape)


def _read_json(path: Path) -> tuple[dict[int, _Image], dict[int, str]]:
    """Images by id with their annotations in file order, and category names by id."""
    try:
        with path.open(encoding="utf-8") as handle:
            tree = json.load(handle, object_hook=_slim)
    except FileNotFoundError:
        raise DataError(f"{path}: missing annotation file") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    try:
        categories = {int(c["id"]): str(c["name"]) for c in tree["categories"]}
        images = {
            int(i["id"]): _Image(int(i["id"]), str(i["file_name"]), int(i["width"]), int(i["height"]), [])
            for i in tree["images"]
        }
        for a in tree["annotations"]:
            if not isinstance(a, _Annotation):
                raise DataError(f"{path}: an annotation without image_id or category_id")
            if a.image_id not in images:
                raise DataError(f"{path}: annotation {a.id} names image_id {a.image_id}, which is not among the images")
            if a.category_id not in categories:
                raise DataError(f"{path}: annotation {a.id} names category_id {a.category_id}, which is not a category")
            images[a.image_id].annotations.append(a)
    except (KeyError, TypeError, ValueError) as error:
        what = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not an instances JSON ({what}); expected images, annotations, categories") from None
    if not 1 <= len(categories) < IGNORE:
        raise DataError(f"{path}: {len(categories)} categories; expected 1…{IGNORE - 1}")
    return images, categories
