"""Predictions of many images in the files that other programs read; all of them are made from the masks on the disk."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ugrl import __version__
from ugrl.data.voc import CLASS_NAMES
from ugrl.errors import ConfigError, DataError
from ugrl.eval.palette import WRITER, write_mask
from ugrl.eval.palettes import palette
from ugrl.files import replacing, write_whole
from ugrl.predict.folder import Made
from ugrl.predict.prediction import coco_annotations
from ugrl.text import csv_cell, line

#: Where VOC's server looks for the masks of an archive, below its root.
SUBMISSION = "results/VOC2012/Segmentation/comp6_test_cls"
# Mask → its note.
Masks = Mapping[Path, Made]


def check_submission(names: tuple[str, ...]) -> None:
    """Refuse an archive for VOC's server by a network of other classes.

    Raises:
        ConfigError: The classes are not VOC's twenty in their order.
    """
    if names != CLASS_NAMES:
        raise ConfigError(
            f"--export voc-server: the network has {len(names)} classes ({line(', '.join(names), 60)}); expected VOC's "
            "twenty in their order"
        )


def scores_csv(out: Path, masks: Masks, names: tuple[str, ...]) -> Path:
    """``scores.csv``: one line for each image: its file, its mask, and the score of each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "mask", *(csv_cell(name) for name in names)])
    for path, made in masks.items():
        writer.writerow([csv_cell(made.name), csv_cell(path.name), *(made.scores[name] for name in names)])
    return _write(out / "scores.csv", text.getvalue())


def scores_json(out: Path, masks: Masks, names: tuple[str, ...]) -> Path:
    """``scores.json``: ``image, mask, scores`` of each image, and ``uncertainty`` where it was asked for."""
    rows = []
    for path, made in masks.items():
        row: dict[str, Any] = {"image": made.name, "mask": path.name, "scores": {n: made.scores[n] for n in names}}
        rows.append(row | ({} if made.u is None else {"uncertainty": made.u}))
    return _write(out / "scores.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def coco(out: Path, masks: Masks, names: tuple[str, ...]) -> Path:
    """``coco.json``: a data set of COCO's layout, one annotation for each image and class, with compressed RLE."""
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, (path, made) in enumerate(masks.items(), start=1):
        labels_HW = read_labels(path)
        height, width = labels_HW.shape
        images.append({"id": number, "file_name": made.name, "width": width, "height": height})
        found += coco_annotations(labels_HW, names, made.scores, number, len(found) + 1)
    tree = {
        "info": {"description": f"{WRITER} {__version__}"},
        "images": images,
        "categories": [{"id": label, "name": name} for label, name in enumerate(names, start=1)],
        "annotations": found,
    }
    return _write(out / "coco.json", json.dumps(tree, ensure_ascii=False) + "\n")


def voc(out: Path, masks: Masks, names: tuple[str, ...], colours: str) -> Path:
    """``voc``: a folder of VOC's layout with ``labelmap.txt``, as CVAT imports it once it is zipped."""
    root = out / "voc"
    try:
        if root.is_dir():
            shutil.rmtree(root)
        with replacing(root, durable=False) as draft:
            (draft / "ImageSets" / "Segmentation").mkdir(parents=True)
            (draft / "SegmentationClass").mkdir()
            (draft / "labelmap.txt").write_text(labelmap(names, colours), encoding="utf-8")
            listed = "".join(f"{path.stem}\n" for path in masks)
            (draft / "ImageSets" / "Segmentation" / "default.txt").write_text(listed, encoding="utf-8")
            for path in masks:
                shutil.copyfile(path, draft / "SegmentationClass" / path.name)
    except OSError as error:
        raise DataError(f"{line(root)}: cannot be written ({error.strerror or error})") from None
    return root


def labelmap(names: tuple[str, ...], colours: str) -> str:
    """What ``labelmap.txt`` says: the name and colour of each class, background first."""
    rgb = palette(colours)
    rows = ["# label:color_rgb:parts:actions"]
    for label, name in enumerate(("background", *names)):
        rows.append(f"{plain_name(name)}:{','.join(map(str, rgb[label].tolist()))}::")
    return "\n".join(rows) + "\n"


def plain_name(name: str) -> str:
    """A class name as ``labelmap.txt`` can hold it."""
    return line(name).replace(":", " ")


def submission(out: Path, masks: Masks, names: tuple[str, ...]) -> Path:
    """``submission.tar.gz``: the masks as VOC's evaluation server takes them, with VOC's own palette.

    Raises:
        ConfigError: See :func:`check_submission`.
    """
    check_submission(names)
    path = out / "submission.tar.gz"
    try:
        with replacing(path, durable=False) as draft, tarfile.open(draft, "w:gz") as archive:
            for mask in masks:
                plain = draft.with_name(f"{draft.name}.png")
                write_mask(plain, read_labels(mask))
                archive.add(plain, f"{SUBMISSION}/{mask.name}", filter=_anonymous)
                plain.unlink()
    except OSError as error:
        raise DataError(f"{line(path)}: cannot be written ({error.strerror or error})") from None
    return path


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the time and the user: the same masks give the same members."""
    info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode = 0, 0, 0, "", "", 0o644
    return info


def read_labels(path: Path) -> np.ndarray:
    """The labels of a mask, uint8 (H, W).

    Raises:
        DataError: It is no mask.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.array(image)
    except Exception as error:
        raise DataError(f"{line(path)}: cannot be read as a mask ({line(error)})") from None


def _write(path: Path, text: str) -> Path:
    try:
        write_whole(path, text)
    except OSError as error:
        raise DataError(f"{line(path)}: cannot be written ({error.strerror or error})") from None
    return path


Export = Callable[[Path, Masks, tuple[str, ...]], Path]
