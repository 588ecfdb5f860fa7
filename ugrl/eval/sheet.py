"""A sheet of pictures: a row for each photograph, a titled column for each stage, the tags above, a legend below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ugrl.eval.palettes import U_COLOURS, heat, palette
from ugrl.text import line
from ugrl.types import IGNORE

# Pixels: the longest side of a picture, the height of a line of words, and what lies between pictures.
SIDE, LINE, GAP = 160, 18, 6
UNKNOWN = (205, 205, 205)
COLOURS = "safe"


@dataclass(frozen=True, slots=True)
class Row:
    """One photograph.

    Attributes:
        id: Its id.
        tags: Classes 1…F that it is tagged with.
        pictures: Title of a column → uint8 (H, W, 3); a column that it has none for stays empty.
        labels: The classes that its pictures show, for the legend; 0 is background.
    """

    id: str
    tags: Sequence[int]
    pictures: dict[str, np.ndarray]
    labels: frozenset[int]


def row_of(id: str, tags: Sequence[int], image_HW3: np.ndarray, layers: dict[str, np.ndarray]) -> Row:
    """A row of a photograph and what is known of it.

    Args:
        id: Of the photograph.
        tags: Its classes 1…F.
        image_HW3: uint8.
        layers: Title → uint8 labels (H, W), 255 undecided; or a map in [0, 1], float (H, W), NaN unknown. A map whose
            title begins with ``CAM`` is laid over the photograph.
    """
    pictures, shown = {"photograph": image_HW3}, set()
    for title, layer_HW in layers.items():
        if layer_HW.dtype == np.uint8:
            pictures[title] = palette(COLOURS)[layer_HW]
            shown |= set(np.unique(layer_HW).tolist())
            continue
        known = np.isfinite(layer_HW)
        warm = heat(np.where(known, layer_HW, 0.0))
        warm = (0.4 * image_HW3 + 0.6 * warm).astype(np.uint8) if title.startswith("CAM") else warm
        pictures[title] = np.where(known[..., None], warm, np.array(UNKNOWN, np.uint8))
    return Row(id, tags, pictures, frozenset(shown))


def draw(title: str, rows: Sequence[Row], names: Sequence[str], u_kind: str = "distance") -> np.ndarray:
    """The sheet, uint8 (H, W, 3).

    Args:
        title: Above all.
        rows: One photograph each; their columns are named alike.
        names: Of the classes 1…F.
        u_kind: ``method.uncertainty.kind``, for the legend.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row.pictures))
    heights = [max((_fitted(p)[1] for p in row.pictures.values()), default=0) for row in rows]
    width = max(1, len(columns)) * (SIDE + GAP) + GAP
    entries = _entries(rows, names, width, u_kind)
    high = (2 + len(entries)) * LINE + sum(LINE + h + GAP for h in heights) + 2 * GAP
    canvas = Image.new("RGB", (width, high), "white")
    pen = ImageDraw.Draw(canvas)
    _write(pen, GAP, GAP, title, width - 2 * GAP, bold=True)
    for k, column in enumerate(columns):
        _write(pen, GAP + k * (SIDE + GAP), GAP + LINE, column, SIDE)
    y = GAP + 2 * LINE
    for row, height in zip(rows, heights, strict=True):
        _write(pen, GAP, y, f"{line(row.id, 60)}: {_tags(row.tags, names)}", width - 2 * GAP)
        y += LINE
        for k, column in enumerate(columns):
            if column in row.pictures:
                picture = row.pictures[column]
                small = Image.fromarray(picture).resize(_fitted(picture), _filter(column))
                canvas.paste(small, (GAP + k * (SIDE + GAP), y))
        y += height + GAP
    for placed in entries:
        for x, colours, words in placed:
            for k, colour in enumerate(colours):
                box = (x + k * LINE // len(colours), y + 3, x + (k + 1) * LINE // len(colours) - 1, y + LINE - 4)
                pen.rectangle(box, fill=colour)
            pen.rectangle((x, y + 3, x + LINE - 1, y + LINE - 4), outline="black")
            _write(pen, x + LINE + GAP, y, words, width)
        y += LINE
    return np.asarray(canvas)


def _filter(column: str) -> Image.Resampling:
    """Photographs and CAMs are smooth; labels have no colours between."""
    return Image.Resampling.BILINEAR if column.startswith(("photograph", "CAM")) else Image.Resampling.NEAREST


def _fitted(picture: np.ndarray) -> tuple[int, int]:
    """Width and height in the sheet: the longer side is :data:`SIDE`."""
    h, w = picture.shape[:2]
    return max(1, round(w * SIDE / max(h, w))), max(1, round(h * SIDE / max(h, w)))


def _tags(tags: Iterable[int], names: Sequence[str]) -> str:
    return ", ".join(_name(tag, names) for tag in tags) or "no tag"


def _name(label: int, names: Sequence[str]) -> str:
    if label == 0:
        return "background"
    if label == IGNORE:
        return "undecided, ignored"
    return line(names[label - 1], 40) if label <= len(names) else f"class {label}"


Entry = tuple[int, list[tuple[int, ...]], str]


def _entries(rows: Sequence[Row], names: Sequence[str], width: int, u_kind: str) -> list[list[Entry]]:
    """The legend in lines: place, colours, words."""
    shown = sorted({label for row in rows for label in row.labels})
    found = [([tuple(palette(COLOURS)[label].tolist())], _name(label, names)) for label in shown]
    scale = [tuple(c) for c in heat(np.linspace(0, 1, LINE // 2)).tolist()]
    low, high = U_COLOURS[u_kind]
    found += [(scale, f"CAM: 0 … 1, u: {low:g} … {high:g} and more"), ([UNKNOWN], "u not known")]
    lines: list[list[Entry]] = [[]]
    x = GAP
    for colours, words in found:
        needed = LINE + GAP + round(_font(False).getlength(words)) + 3 * GAP
        if lines[-1] and x + needed > width:
            lines.append([])
            x = GAP
        lines[-1].append((x, colours, words))
        x += needed
    return lines


@lru_cache(maxsize=2)
def _font(bold: bool) -> Any:
    return ImageFont.load_default(14 if bold else 12)


def _write(pen: ImageDraw.ImageDraw, x: int, y: int, words: str, width: int, *, bold: bool = False) -> None:
    font = _font(bold)
    while len(words) > 1 and font.getlength(words) > width:
        words = words[:-2].rstrip("…") + "…"
    pen.text((x, y + LINE // 2), words, fill="black", font=font, anchor="lm")
