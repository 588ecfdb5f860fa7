"""A run to predict with, pictures, and the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.tiny import tiny_tree
from ugrl.cli import main
from ugrl.config import build, override
from ugrl.train.loop import Trainer


def trained(shards: Path, out: Path, **values: object) -> Path:
    """Past its warm-up: prototypes and affinity are in use. The masks show several classes."""
    cfg = build(override(tiny_tree(eval_every=6), values))
    trainer = Trainer(cfg, shards=shards, out=out, quiet=True, device="cpu")
    trainer.net.decoder.classify.weight.data *= 20
    trainer.fit()
    return out


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Patches of colours, so that a network has something to see."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.kron(small, np.ones((8, 8, 1), np.uint8))[:height, :width]


def photos(folder: Path, names: str = "a b c", size: tuple[int, int] = (40, 56)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names.split()):
        Image.fromarray(noise(*size, seed=k)).save(folder / f"{name}.png")
    return folder


def predict(*words: object) -> int:
    return main(["predict", *map(str, words), "--device", "cpu"])
