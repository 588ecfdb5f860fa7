"""Masks of any method, scored as a run's own are, and set beside each other class by class."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ugrl.data.images import decode_labels
from ugrl.data.mask_folder import MaskFolder
from ugrl.data.reader import ShardReader
from ugrl.errors import DataError
from ugrl.eval.metrics import Confusion
from ugrl.text import line, plain
from ugrl.types import IGNORE

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Masks:
    """What some masks score.

    Attributes:
        name: For people.
        iou: Class name → IoU, background first; NaN for a class that no ground truth shows.
        miou: Their mean, in [0, 1].
        left_out: Share of the pixels that count where these masks have 255, and which are not counted for them.
    """

    name: str
    iou: dict[str, float]
    miou: float
    left_out: float = 0.0


def score_masks(
    name: str, root: Path, reader: ShardReader, count: int, *, on_image: Callable[[str], None] | None = None
) -> Masks:
    """Score the masks of a folder against the ground truth, each at its image's own size.

    Args:
        name: What they are called.
        root: The folder, see :class:`ugrl.data.mask_folder.MaskFolder`.
        reader: Of the images; all have masks.
        count: The first so many are scored.
        on_image: Called with the id of each image, once it is counted.

    Raises:
        DataError: The folder, or the mask of an image, is missing; a mask is broken, of another size, or has a label
            outside 0…F and 255.
    """
    folder, names = MaskFolder(root), reader.manifest.class_names
    ids = reader.ids[:count]
    if missing := folder.missing(ids, f"the {len(ids)} images"):
        raise DataError(
            f"{line(folder.path(missing[0]))}: missing mask; {len(missing)} of {len(ids)} images have none; expected "
            "one for each: add them, or measure the images of a --list"
        )
    found, counted, left_out = Confusion(len(names) + 1), 0, 0
    for index, id in enumerate(ids):
        row = reader[index]
        truth_HW = np.asarray(decode_labels(row.mask or b"", f"row {line(id, 80)}"))
        labels_HW = np.asarray(decode_labels(folder.read(row, len(names)), line(folder.path(id))))
        judged_HW = truth_HW != IGNORE
        silent_HW = labels_HW == IGNORE
        counted += int(judged_HW.sum())
        left_out += int((judged_HW & silent_HW).sum())
        kept_HW = np.where(silent_HW, IGNORE, truth_HW)
        found.add(torch.from_numpy(labels_HW.astype(np.int64)), torch.from_numpy(kept_HW.astype(np.int64)))
        if on_image is not None:
            on_image(id)
    return Masks(name, found.table(("background", *names)), found.miou, left_out / max(1, counted))


def names_of(folders: Sequence[Path]) -> list[str]:
    """What folders are called in a table: their last part, or all of it where two share that.

    >>> names_of([Path("a/sam"), Path("b/clip")]), names_of([Path("a/x"), Path("b/x")])
    (['sam', 'clip'], ['a/x', 'b/x'])
    """
    last = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return [str(f) if last.count(name) > 1 or not name else name for f, name in zip(folders, last, strict=True)]


def comparison(columns: Sequence[Masks], title: str, *, differences: bool = False) -> Table:
    """IoU by class of several methods in percent, the best of each row marked by a star.

    Args:
        columns: At least one, all of the same classes.
        title: What was measured.
        differences: Whether the columns after the first show how much they differ from it.
    """
    from rich.table import Table

    first, *others = columns
    notes = ["* the best of its row"] * bool(others)
    if others and differences:
        notes.append(f"after {line(first.name, 60)}: the difference to it, in points")
    table = Table(title=plain(title), caption=plain("; ".join(notes)) if notes else None)
    table.add_column("class")
    for column in columns:
        table.add_column(plain(column.name), justify="right")
    rows = {name: [c.iou[name] for c in columns] for name in first.iou}
    for name, values in rows.items():
        table.add_row(plain(name), *_cells(values, differences))
    table.add_section()
    table.add_row("mean", *_cells([c.miou for c in columns], differences))
    if any(c.left_out for c in columns):
        table.add_row("pixels left out (255)", *(f"{100 * c.left_out:.1f} " for c in columns))
    return table


def _cells(values: Sequence[float], differences: bool) -> list[str]:
    """A row of percentages; those that look like the largest one have a star."""
    shown = [f"{100 * v:.1f}" if math.isfinite(v) else "-" for v in values]
    best = max((v for v in values if math.isfinite(v)), default=math.nan)
    stars = ["*" if len(values) > 1 and text == f"{100 * best:.1f}" else " " for text in shown]
    if differences:
        shown[1:] = [f"{100 * (v - values[0]):+.1f}" if math.isfinite(v) else "-" for v in values[1:]]
    return [text + star for text, star in zip(shown, stars, strict=True)]
