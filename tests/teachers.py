"""Masks that another method made, for the tests of what is done with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny import tiny_tree
from ugrl.data.images import decode_labels, encode_labels
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSpec
from ugrl.types import IGNORE

SPEC = ShapesSpec(train=24, val=16, size=48, difficulty=0.5, seed=3)


def labels_of(data: bytes | None) -> np.ndarray:
    return np.asarray(decode_labels(data or b"", "a mask"))


def write(folder: Path, id: str, labels_HW: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{id}.png").write_bytes(encode_labels(labels_HW))


def truth(shards: Path, split: str, folder: Path, change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Path:
    """A folder of the true masks of a split, changed."""
    reader = ShardReader(shards, split)
    for k, id in enumerate(reader.ids):
        write(folder, id, change(labels_of(reader[k].mask).copy()))
    return folder


def shifted(labels_HW: np.ndarray) -> np.ndarray:
    """What a teacher gets wrong: all is moved, a strip is class 5 in every image, another one is undecided."""
    out = np.roll(labels_HW, 2, axis=1)
    out[:6, :20] = 5
    out[40:, 30:] = IGNORE
    return out


def tree(source: str, **method: Any) -> dict[str, Any]:
    made = tiny_tree()
    made["method"] |= {"pseudo": {"source": source}, **method}
    return made


def spoiled(folder: Path, id: str, how: str) -> None:
    path = folder / f"{id}.png"
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "size":
        write(folder, id, np.zeros((48, 40), np.uint8))
    elif how == "label":
        write(folder, id, np.full((48, 48), 7, np.uint8))
    elif how == "colours":
        Image.new("RGB", (48, 48)).save(path)
    elif how == "gone":
        path.unlink()
    elif how == "other names":
        for old in folder.iterdir():
            old.rename(old.with_name(f"x{old.name}"))
    else:
        shutil.rmtree(folder)


WRONG = [
    ("cut off", "{id}.png: truncated image"),
    ("size", "{id}.png: the mask is 40×48; expected 48×48 as the image"),
    ("label", "{id}.png: the mask holds label 7; expected 0…6 or 255"),
    ("colours", "{id}.png: mask of mode RGB; expected class indices (a palette or gray PNG), not colours"),
    ("other names", "PNG files such as x"),
    ("no folder", "sam: no such folder; expected one of masks, ID.png for each image"),
]
