"""COCO's instances JSON and images, as published in 2014 and 2017.

Expected under the root::

    annotations/instances_train2017.json    annotations/instances_val2017.json
    train2017/000000000009.jpg              val2017/…
    (2014: instances_train2014.json and train2014/COCO_train2014_000000000009.jpg)

Category ids in ascending order become 1…F (the raw ids have gaps). By default objects are painted in file order,
later over earlier; crowd regions become 255 where no object lies. With ``masks="smallest-on-top"`` the object of the
smallest ``area`` is painted last and a crowd is painted as its class, as a converter does by which several papers
measure (of equal areas the first in the file stays on top). Crowds set tags like objects do. An image with an
object of which only the box is known has tags and no mask: one without that object would be wrong.

What is wrong with one image or annotation is a row that cannot be used, so that ``--on-error skip`` leaves it out and
counts it; what makes the ids ambiguous is refused.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ugrl import foreign
from ugrl.data.coco_masks import spans
from ugrl.data.images import encode_labels, image_size
from ugrl.data.source import RowError, check_root, make_row, read_bytes
from ugrl.errors import DataError
from ugrl.text import brief, line
from ugrl.types import IGNORE, Row

YEARS = (2014, 2017)
MASKS = ("file-order", "smallest-on-top")
_SPLITS = ("train", "val")
_MOST_JSON = 4096 * foreign.MB
_MOST_SIDE = 1 << 16
_MOST_ID = 10**18 - 1
_CROWD = {"0": False, "false": False, "1": True, "true": True}
_LOG = logging.getLogger(__name__)


class _Found(NamedTuple):
    """An annotation as the file has it; ``segmentation`` is ``None`` where there is none."""

    id: Any
    image_id: Any
    category_id: Any
    crowd: Any
    segmentation: Any
    area: Any


class _Object(NamedTuple):
    id: Any
    category_id: int
    crowd: bool
    segmentation: Any
    area: float | None


@dataclass(slots=True)
class _Image:
    """An image, its objects in file order, and why it cannot be used, if it cannot."""

    id: int
    file: str = ""
    width: int = 0
    height: int = 0
    objects: list[_Object] = field(default_factory=list)
    problem: RowError | None = None

    @property
    def key(self) -> str:
        """What the row is called."""
        return Path(self.file).stem or f"image id {self.id}"


class CocoSource:
    """See the module; a :class:`ugrl.data.source.Source`.

    Args:
        root: Folder with ``annotations`` and the image folders.
        year: 2014 or 2017; found from the files where ``None``.
        keep_unannotated: Whether images without any annotation stay, as pure background.
        masks: How objects that overlap are painted, one of :data:`MASKS`.

    Raises:
        DataError: Another value of ``masks``; missing files, broken JSON, ids or names that occur twice, categories
            that differ between the splits.
    """

    name = "coco"

    def __init__(
        self,
        root: str | Path | None,
        *,
        year: int | None = None,
        keep_unannotated: bool = False,
        masks: str = MASKS[0],
    ) -> None:
        if masks not in MASKS:
            raise DataError(f"coco: masks is {brief(masks)}; expected {' or '.join(MASKS)}")
        self._masks = masks
        self.root = check_root(root, self.name)
        self._year = _find_year(self.root, year)
        self._keep = keep_unannotated
        self.left_out: dict[str, dict[str, int]] = {}
        self._images: dict[str, dict[str, _Image]] = {}
        self._strays: dict[str, dict[str, RowError]] = {}
        categories: dict[int, str] | None = None
        for split in _SPLITS:
            path = self.root / "annotations" / f"instances_{split}{self._year}.json"
            images, found, self._strays[split] = _read(path)
            if categories is not None and found != categories:
                raise DataError(f"{path}: its categories differ from those of the train split; expected the same")
            categories = found
            self._images[split] = self._keep_annotated(split, path, images)
        ordered = sorted((categories or {}).items())
        self.class_names = tuple(name for _, name in ordered)
        self._label = {category: f + 1 for f, (category, _) in enumerate(ordered)}

    def _keep_annotated(self, split: str, path: Path, images: Iterable[_Image]) -> dict[str, _Image]:
        out: dict[str, _Image] = {}
        for image in images:
            if not image.objects and image.problem is None and not self._keep:
                counts = self.left_out.setdefault(split, {"unannotated": 0})
                counts["unannotated"] += 1
                continue
            if image.key in out:
                first = out[image.key]
                raise DataError(
                    f"{path}: images {first.id} ({brief(first.file)}) and {image.id} ({brief(image.file)}) share the "
                    f"file stem {brief(image.key)}; rename one of the files"
                )
            out[image.key] = image
        _tell(path, list(out.values()))
        return out

    @property
    def options(self) -> dict[str, Any]:
        """Year, whether unannotated images stay, and how masks are painted."""
        return {"year": self._year, "keep_unannotated": self._keep, "masks": self._masks}

    def splits(self) -> dict[str, list[str]]:
        """File stems in the JSON's order, then what belongs to no image of it."""
        return {split: [*images, *self._strays[split]] for split, images in self._images.items()}

    def tags(self, split: str, id: str) -> tuple[int, ...]:
        """Classes of all annotations, crowds among them."""
        image = self._images[split].get(id)
        return tuple(sorted({self._label[a.category_id] for a in image.objects})) if image else ()

    def row(self, split: str, id: str) -> Row:
        """Read the image and paint its annotations.

        Raises:
            RowError: A missing or broken image, a size that differs from the JSON's, a broken annotation.
        """
        problem = self._strays[split].get(id) or self._images[split][id].problem
        if problem is not None:
            raise problem
        image = self._images[split][id]
        folder = self.root / f"{split}{self._year}"
        try:
            path = foreign.under(folder, image.file, f"instances_{split}{self._year}.json: image {image.id}")
        except DataError as error:
            raise RowError(str(error), "file outside of its folder") from None
        where = f"{line(path)} (image id {image.id})"
        if not os.path.lexists(path):
            raise RowError(f"{where}: missing image file that instances_{split}{self._year}.json names", "missing file")
        data = read_bytes(path)
        try:
            size = image_size(data, where)
        except DataError as error:
            raise RowError(str(error)) from None
        if size != (image.width, image.height):
            raise RowError(f"{where}: {size[0]}×{size[1]}; the JSON expects {image.width}×{image.height}", "other size")
        mask = None if any(a.segmentation is None for a in image.objects) else encode_labels(self._paint(image, where))
        tags = self.tags(split, id)
        return make_row(id=id, image=data, tags=tags, mask=mask, num_classes=len(self.class_names), where=where)

    def _paint(self, image: _Image, where: str) -> np.ndarray:
        """uint8 labels (H, W)."""
        flat = np.zeros(image.width * image.height, np.uint8)
        found = []
        for annotation in image.objects:
            try:
                found.append((annotation, spans(annotation.segmentation, image.height, image.width)))
            except ValueError as error:
                raise RowError(f"{where}: annotation {brief(annotation.id)} has {error}", "broken annotation") from None
        by_size = self._masks == "smallest-on-top"
        if by_size:
            found = [found[k] for k in _largest_first([_area(a, parts) for a, parts in found])]
        else:  # objects in file order; then crowds, only where nothing lies
            found.sort(key=lambda pair: pair[0].crowd)
        for annotation, parts in found:
            for start, inside in parts:
                view = flat[start : start + len(inside)]
                if annotation.crowd and not by_size:
                    view[inside & (view == 0)] = IGNORE
                else:
                    view[inside] = self._label[annotation.category_id]
        return flat.reshape(image.width, image.height).T


def _largest_first(areas: list[float]) -> list[int]:
    """Positions from the largest to the smallest area; of equal ones the first comes last, and so lies on top.

    >>> _largest_first([5, 9, 5])
    [1, 2, 0]
    """
    return sorted(range(len(areas)), key=lambda k: areas[k])[::-1]


def _area(annotation: _Object, parts: list[tuple[int, np.ndarray]]) -> float:
    """The area that the file gives, else the pixels."""
    return float(sum(inside.sum() for _, inside in parts)) if annotation.area is None else annotation.area


def _tell(path: Path, images: list[_Image]) -> None:
    """Log what a user may not expect of the masks."""
    objects = [a for image in images for a in image.objects]
    if objects and all(a.crowd for a in objects):
        _LOG.warning(
            "%s: every one of its %d objects is a crowd (iscrowd 1): all their pixels become %d, which is ignored, and "
            "only background is left; expected iscrowd 0 of single objects",
            *(line(path), len(objects), IGNORE),
        )
    boxes = [image for image in images if any(a.segmentation is None for a in image.objects)]
    if boxes:
        mixed = sum(any(a.segmentation is not None for a in image.objects) for image in boxes)
        _LOG.warning(
            "%s: %d of %d images have objects without a segmentation: their rows have tags and no mask (%d of them "
            "have other objects with one)",
            *(line(path), len(boxes), len(images), mixed),
        )


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
    shape = tree.get("segmentation") or None
    if isinstance(shape, list):
        if all(isinstance(n, int | float) for n in shape):
            shape = [shape]  # one polygon, without the list around it
        try:
            shape = tuple(np.asarray(p, np.float64) for p in shape)
        except (TypeError, ValueError, OverflowError):
            shape = ("broken",)  # refused with the annotation's id when it is painted
        if all(not len(np.atleast_1d(p)) for p in shape):
            shape = None
    keys = (tree.get("id", "?"), tree["image_id"], tree["category_id"], tree.get("iscrowd", 0))
    return _Found(*keys, shape, tree.get("area"))


def _entries(tree: Any, key: str, where: str) -> list[Any]:
    """A list of the JSON; some write a dictionary by id instead."""
    found = foreign.field(tree, key, where)
    return list(found.values()) if isinstance(found, dict) else foreign.as_list(found, f"{where}: {key}")


def _read(path: Path) -> tuple[list[_Image], dict[int, str], dict[str, RowError]]:
    """Images with their objects, category names by id, and what belongs to no image, by what to call it."""
    where = line(path)
    # A number that is none (NaN) concerns the annotation that it stands in.
    data = foreign.read_bytes(path, "annotation file", most=_MOST_JSON)
    tree = foreign.parse_json(data, where, hook=_slim, nan=True)
    del data
    annotations = _entries(tree, "annotations", where)
    categories = _read_categories(_entries(tree, "categories", where), where)
    images: dict[int, _Image] = {}
    for k, entry in enumerate(_entries(tree, "images", where)):
        at = f"{where}: image {k}"
        id = _id(foreign.field(entry, "id", at), f"{at}: id")
        image = _read_image(id, entry, f"{where}: image {id}")
        if id in images:
            raise DataError(
                f"{where}: images {brief(images[id].file)} and {brief(image.file)} both have id {id}; expected each id "
                "once (a merge has to number anew)"
            )
        images[id] = image
    strays: dict[str, RowError] = {}
    for k, found in enumerate(annotations):
        owner: _Image | None = None
        try:
            if not isinstance(found, _Found):
                raise DataError(f"{brief(found)}; expected image_id, category_id and segmentation")
            owner = images.get(_id(found.image_id, "image_id"))
            if owner is None:
                raise DataError(f"image_id {found.image_id} is not among the images")
            owner.objects.append(_read_object(found, categories))
        except DataError as error:
            name = f"id {brief(found.id)}" if isinstance(found, _Found) else f"{k}"
            problem = RowError(f"{where}: annotation {name}: {error}", "broken annotation")
            if owner is None:
                problem.reason = "annotation of no image"
                strays[f"annotation {k}"] = problem
            else:
                owner.problem = owner.problem or problem
    return list(images.values()), categories, strays


def _id(value: Any, where: str) -> int:
    id = foreign.as_int(value, where, text=True)
    if abs(id) > _MOST_ID:
        raise DataError(f"{where}: {brief(id)}; expected a whole number of at most 18 digits")
    return id


def _read_categories(entries: list[Any], where: str) -> dict[int, str]:
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    for k, entry in enumerate(entries):
        at = f"{where}: category {k}"
        id = _id(foreign.field(entry, "id", at), f"{at}: id")
        name = foreign.as_str(foreign.field(entry, "name", at), f"{at}: name", most=200)
        if not name.strip():
            raise DataError(f"{at}: an empty name; expected the name of a class")
        if id in names:
            raise DataError(f"{where}: categories {brief(names[id])} and {brief(name)} both have id {id}; expected one")
        if name in ids:
            raise DataError(f"{where}: categories {ids[name]} and {id} are both called {brief(name)}; merge or rename")
        names[id], ids[name] = name, id
    if not 1 <= len(names) < IGNORE:
        raise DataError(f"{where}: {len(names)} categories; expected 1…{IGNORE - 1}")
    return names


def _read_image(id: int, entry: dict[str, Any], where: str) -> _Image:
    image = _Image(id)
    try:
        image.file = foreign.as_str(foreign.field(entry, "file_name", where), f"{where}: file_name", most=4000)
        for side in ("width", "height"):
            number = foreign.as_int(
                foreign.field(entry, side, where), f"{where}: {side}", least=1, most=_MOST_SIDE, text=True
            )
            setattr(image, side, number)
    except DataError as error:
        image.problem = RowError(str(error), "broken image entry")
    return image


def _read_object(found: _Found, categories: dict[int, str]) -> _Object:
    category = _id(found.category_id, "category_id")
    if category not in categories:
        raise DataError(f"category_id {category} is not a category")
    crowd = found.crowd
    if isinstance(crowd, str):
        crowd = _CROWD.get(crowd.strip().lower(), crowd)
    if crowd not in (0, 1, None):
        raise DataError(f"iscrowd {brief(crowd)}; expected 0 or 1")
    # Only the order of masks follows from it: an area that is none is as good as no area.
    area = found.area if isinstance(found.area, int | float) and math.isfinite(found.area) else None
    return _Object(found.id, category, bool(crowd), found.segmentation, area)
