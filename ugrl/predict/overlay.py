"""A photograph with its mask over it, and a legend of the classes below."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ugrl.row import IGNORE
from ugrl.text import line

#: Pixels. A picture whose longer side is shorter is enlarged by a whole factor, so that names can be read below it.
LEAST_SIDE = 320


def overlay(
    image_HW3: np.ndarray,
    labels_HW: np.ndarray,
    names: Sequence[str],
    colours: np.ndarray,
    *,
    alpha: float = 0.5,
    legend: bool = True,
) -> Image.Image:
    """The mask's classes as colours over the image; background stays as it is, and classes have an outline.

    Args:
        image_HW3: uint8 RGB.
        labels_HW: uint8, 0 background, 1…F classes, 255 ignored.
        names: Names of the classes 1…F.
        colours: uint8 (256, 3), by label.
        alpha: Share of the colour.
        legend: Whether the shown classes are named below, largest first, with their shares of the pixels.

    Returns:
        RGB, as large as the image times a whole factor, and higher by the legend.
    """
    photo, colour = Image.fromarray(image_HW3), Image.fromarray(colours[labels_HW])
    labelled = labels_HW != 0
    picture = Image.composite(Image.blend(photo, colour, alpha), photo, Image.fromarray(labelled))
    picture.paste(colour, mask=Image.fromarray(_edges(labels_HW) & labelled))
    factor = max(1, round(LEAST_SIDE / max(picture.size)))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    entries = legend_entries(labels_HW, names) or [(0, "background", "100 %")] if legend else []
    return _with_legend(picture, [(name, share, tuple(colours[label].tolist())) for label, name, share in entries])


def legend_entries(labels_HW: np.ndarray, names: Sequence[str]) -> list[tuple[int, str, str]]:
    """Label, name and share of the pixels of each class in a mask, largest first; background is left out.

    >>> legend_entries(np.array([[0, 2], [2, 2]], np.uint8), ["cat", "dog"])
    [(2, 'dog', '75 %')]
    """
    counts = np.bincount(labels_HW.ravel(), minlength=256)
    order = sorted((label for label in np.flatnonzero(counts).tolist() if label), key=lambda v: (-counts[v], v))
    return [(v, "ignored" if v == IGNORE else line(names[v - 1], 40), _share(counts[v] / counts.sum())) for v in order]


def _share(share: float) -> str:
    return "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _edges(labels_HW: np.ndarray) -> np.ndarray:
    """Pixels whose right, lower, left or upper neighbour has another label."""
    edge = np.zeros(labels_HW.shape, bool)
    down, right = labels_HW[1:] != labels_HW[:-1], labels_HW[:, 1:] != labels_HW[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _with_legend(picture: Image.Image, entries: list[tuple[str, str, Any]]) -> Image.Image:
    """Swatches and names on white below a picture, in as many rows as they need."""
    if not entries:
        return picture
    size = max(12, min(32, max(picture.size) // 28))
    font, gap, row = _font(size), size // 2, round(1.6 * size)
    placed, x, y = [], gap, gap // 2
    for name, share, colour in entries:
        text = _fitting(name, share, font, picture.width - 3 * gap - size)
        width = size + gap + round(font.getlength(text)) + 2 * gap
        if x > gap and x + width > picture.width:
            x, y = gap, y + row
        placed.append((x, y, text, colour))
        x += width
    canvas = Image.new("RGB", (picture.width, picture.height + y + row), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for x, y, text, colour in placed:
        top = picture.height + y + (row - size) // 2
        draw.rectangle((x, top, x + size - 1, top + size - 1), fill=colour, outline="black")
        draw.text((x + size + gap, picture.height + y + row // 2), text, fill="black", font=font, anchor="lm")
    return canvas


def _fitting(name: str, share: str, font: Any, width: int) -> str:
    """A name and its share, no wider than a picture if the name can be cut."""
    text = f"{name} {share}"
    while len(name) > 3 and font.getlength(text) > width:
        name = name[:-2].rstrip("…") + "…"
        text = f"{name} {share}"
    return text
