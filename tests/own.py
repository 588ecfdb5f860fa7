"""A folder of tagged photographs, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ugrl.data.folder import FolderSource
from ugrl.data.prepare import prepare

# Split, tags, width and height, and the label of a filled square in its mask (None: no mask).
Row = tuple[str, str, tuple[int, int], int | None]
ROWS: tuple[Row, ...] = (
    *(("train", "cat" if k % 2 else "dog", (40, 40), None) for k in range(6)),
    ("val", "cat", (40, 40), 1),
    ("val", "dog", (40, 40), 2),
)


def own_shards(root: Path, rows: Sequence[Row] = ROWS) -> Path:
    """Shards of a folder with these rows; the classes are cat and dog."""
    lines = ["file,split,tags"]
    for k, (split, tags, (width, height), label) in enumerate(rows):
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)
        (root / "own" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "own" / "images" / f"p{k}.jpg")
        lines.append(f"p{k}.jpg,{split},{tags}")
        if label is not None:
            labels = np.full((height, width), 255 if label == 255 else 0, np.uint8)
            labels[2 : height - 3, 5 : width // 2] = label
            (root / "own" / "masks").mkdir(exist_ok=True)
            Image.fromarray(labels).save(root / "own" / "masks" / f"p{k}.png")
    (root / "own" / "tags.csv").write_text("\n".join(lines))
    (root / "own" / "classes.txt").write_text("cat\ndog\n")
    prepare(FolderSource(root / "own"), root / "shards", tune_val=0, seed=0, progress=False)
    return root / "shards"
