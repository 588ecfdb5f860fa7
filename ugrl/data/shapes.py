"""A generated benchmark on which classification alone does not find the objects.

An object is a large textured *body* with a small coloured *emblem* on it. The emblem decides the class;
bodies come in three kinds that two classes each share. A class activation map that is trained on tags
therefore lights up the emblem, while the ground truth is the whole object. ``difficulty`` raises the
share of objects that blend into the background or hide behind a bar, of body-like clutter that belongs
to no class, and the habit of a class to appear on one background: then some image–class pairs are
visibly less reliable than others.

Each image is a function of (seed, split, index) alone.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ugrl.data.images import encode_labels
from ugrl.data.source import RowError
from ugrl.errors import DataError
from ugrl.row import Row
from ugrl.seeding import generator

# Class f has body (f - 1) // 2: neighbours share it.
CLASS_NAMES = ("egg-cross", "egg-ring", "brick-bar", "brick-check", "kite-dot", "kite-ray")
# Emblem colours, ink on ground, one pair a class.
_GROUND = np.array([[214, 36, 40], [242, 206, 22], [30, 70, 214], [24, 164, 62], [214, 44, 196], [28, 196, 214]], float)
_INK = np.array([[255, 255, 255], [30, 24, 20], [250, 240, 225], [16, 24, 16], [250, 246, 120], [120, 20, 20]], float)
# Tints of the six backgrounds: muted, so that emblems stay the only saturated thing.
_TINT = np.array(
    [[120, 128, 112], [138, 126, 110], [112, 124, 138], [132, 132, 132], [100, 112, 104], [140, 130, 134]], float
)


@dataclass(frozen=True, slots=True)
class ShapesSpec:
    """What is generated.

    Attributes:
        train: Number of training images.
        val: Number of validation images.
        size: Side, pixels, at least 32.
        difficulty: 0 (clear objects) to 1.
        seed: Another seed, another data set.
    """

    train: int = 1200
    val: int = 200
    size: int = 64
    difficulty: float = 0.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Thing:
    """An object, or body-like clutter (``label`` 0); lengths in image sides."""

    label: int
    body: int
    x: float
    y: float
    radius: float
    angle: float
    contrast: float
    hidden: bool


class ShapesSource:
    """See the module; a :class:`ugrl.data.source.Source`."""

    name = "shapes"
    class_names = CLASS_NAMES
    root: Path | None = None

    def __init__(self, spec: ShapesSpec | None = None) -> None:
        self.spec = spec or ShapesSpec()
        s = self.spec
        for key, ok, wanted in (
            ("train", s.train >= 1, "≥ 1"),
            ("val", s.val >= 1, "≥ 1"),
            ("size", 32 <= s.size <= 4096, "32…4096"),
            ("difficulty", 0 <= s.difficulty <= 1, "0…1"),
            ("seed", s.seed >= 0, "≥ 0"),
        ):
            if not ok:
                raise DataError(f"shapes: {key} is {getattr(s, key)}; expected {wanted}")

    @property
    def options(self) -> dict[str, Any]:
        """The specification."""
        return asdict(self.spec)

    @property
    def left_out(self) -> dict[str, dict[str, int]]:
        """Nothing ever is."""
        return {}

    def splits(self) -> dict[str, list[str]]:
        """``train_000000``… and ``val_000000``…."""
        sizes = {"train": self.spec.train, "val": self.spec.val}
        return {split: [f"{split}_{i:06d}" for i in range(n)] for split, n in sizes.items()}

    def tags(self, split: str, id: str) -> tuple[int, ...]:
        """The tags of an image, without painting it."""
        return _tags(self._scene(split, id)[0])

    def row(self, split: str, id: str) -> Row:
        """Paint an image: a JPEG of quality 90 and an exact mask."""
        things, background, rng = self._scene(split, id)
        pixels, labels = _paint(things, background, self.spec, rng)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=90)
        size = self.spec.size
        return Row(id, out.getvalue(), size, size, _tags(things), encode_labels(labels))

    def _scene(self, split: str, id: str) -> tuple[list[_Thing], int, np.random.Generator]:
        number = id.removeprefix(f"{split}_")
        if not number.isdigit():
            raise RowError(f"shapes: no image '{id}' in split '{split}'", "missing file")
        rng = generator(self.spec.seed, "shapes", split, int(number))
        things, background = _compose(self.spec.difficulty, rng)
        return things, background, rng


def open_shapes(
    train: int = 1200, val: int = 200, size: int = 64, difficulty: float = 0.5, seed: int = 0
) -> ShapesSource:
    """A source from the fields of :class:`ShapesSpec`.

    Raises:
        DataError: A value out of bounds.
    """
    return ShapesSource(ShapesSpec(train, val, size, difficulty, seed))


def _tags(things: list[_Thing]) -> tuple[int, ...]:
    return tuple(sorted({t.label for t in things if t.label}))


def _compose(difficulty: float, rng: np.random.Generator) -> tuple[list[_Thing], int]:
    """Decide what is where; returns things in painting order and the background."""
    wanted = int(rng.choice(3, p=[0.4, 0.4, 0.2])) + 1
    labels = rng.permutation(6)[:wanted] + 1
    if wanted > 1 and rng.random() < 0.15:  # two of a kind
        labels[1] = labels[0]
    # A habit: the first class's own background, more often at higher difficulty.
    habit = rng.random() < 0.7 * difficulty
    background = int(labels[0]) - 1 if habit else int(rng.integers(6))
    clutter = int(rng.random() < 0.1 + 0.4 * difficulty)

    things: list[_Thing] = []
    for label in [int(v) for v in labels] + [0] * clutter:
        radius = rng.uniform(0.2, 0.34 if wanted < 3 else 0.26) * (1.0 if label else 0.7)
        angle = rng.uniform(0, 2 * np.pi)
        faint = rng.random() < 0.35 * difficulty
        contrast = rng.uniform(0.3, 0.5) if faint else 1.0
        hidden = rng.random() < 0.35 * difficulty
        body = (label - 1) // 2 if label else int(rng.integers(3))
        for x, y in rng.uniform(radius * 0.9, 1 - radius * 0.9, (12, 2)):
            # Bodies may touch, but none may cover another's emblem.
            if all(np.hypot(x - t.x, y - t.y) > 0.95 * (radius + t.radius) for t in things):
                things.append(_Thing(label, body, x, y, radius, angle, float(contrast), bool(label and hidden)))
                break
    return things, background


def _background(kind: int, spec: ShapesSpec, rng: np.random.Generator) -> np.ndarray:
    """float32 (size, size, 3): a tint, slow shading and one of three fine patterns."""
    size = spec.size
    coarse = rng.normal(0, 4, (5, 5, 3)) + rng.normal(0, 18, (5, 5, 1))
    shading = np.asarray(Image.fromarray(np.clip(coarse + 128, 0, 255).astype(np.uint8)).resize((size, size), 3), float)
    y, x = np.mgrid[0:size, 0:size] * (96 / size)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 6.28)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind % 3 == 0:
        pattern = np.sin(u * 0.9 + phase)
    elif kind % 3 == 1:
        pattern = np.sin(u * 0.7 + phase) * np.sin(v * 0.7)
    else:
        blots = rng.normal(0, 1, (size // 4 + 1, size // 4 + 1)).astype(np.float32)
        pattern = np.asarray(Image.fromarray(blots).resize((size, size), 2), float)
    noise = rng.normal(0, 6, (size, size, 1))
    return _TINT[kind] + (shading - 128) + pattern[:, :, None] * rng.uniform(8, 18) + noise


def _silhouette(body: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Inside of a body in its own frame, where it reaches from -1 to 1 along u."""
    if body == 0:
        return u**2 + (v / 0.66) ** 2 <= 1
    if body == 1:
        return (u / 0.92) ** 6 + (v / 0.56) ** 6 <= 1
    return np.abs(v) <= np.where(u < -0.35, (u + 1) / 0.65, (1 - u) / 1.35) * 0.74


def _texture(body: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A pattern in [-1, 1] in the body's frame."""
    if body == 0:
        return np.sign(np.sin(u * 11))
    if body == 1:
        return np.where(np.sin(u * 9) * np.sin(v * 9) > 0, 1.0, -1.0)
    return np.where(np.sin(u * 12) * np.sin(v * 12) > 0.45, 1.0, -0.6)


def _emblem(label: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where an emblem shows ink, in its own frame of radius 1."""
    r = np.hypot(a, b)
    return (
        (np.abs(a) < 0.28) | (np.abs(b) < 0.28),
        np.abs(r - 0.55) < 0.22,
        np.abs(b) < 0.34,
        a * b > 0,
        r < 0.5,
        np.sin(3 * np.arctan2(b, a)) > 0,
    )[label - 1]


def _paint(
    things: list[_Thing], background: int, spec: ShapesSpec, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 pixels (size, size, 3) and labels (size, size)."""
    size = spec.size
    canvas = _background(background, spec, rng)
    labels = np.zeros((size, size), np.uint8)
    for thing in things:
        radius = thing.radius * size
        y0, y1 = max(0, int(thing.y * size - radius)), min(size, int(thing.y * size + radius) + 2)
        x0, x1 = max(0, int(thing.x * size - radius)), min(size, int(thing.x * size + radius) + 2)
        y, x = np.mgrid[y0:y1, x0:x1]
        dx, dy = (x + 0.5 - thing.x * size) / radius, (y + 0.5 - thing.y * size) / radius
        cos, sin = np.cos(thing.angle), np.sin(thing.angle)
        u, v = dx * cos + dy * sin, dy * cos - dx * sin
        view, marks = canvas[y0:y1, x0:x1], labels[y0:y1, x0:x1]
        before = view.copy()

        # Two muted tones, lighter or darker than the background at random.
        middle = rng.uniform(60, 110) if rng.random() < 0.5 else rng.uniform(150, 205)
        tone = middle + rng.uniform(-14, 14, 3)
        swing = rng.uniform(18, 34)
        shape = _silhouette(thing.body, u, v)
        body = tone + _texture(thing.body, u, v)[:, :, None] * swing
        view[shape] = (before + thing.contrast * (body - before))[shape]

        if thing.label:
            # The emblem sits towards one end of the body and stays inside the object.
            reach = max(0.5, 4.0 / radius)
            a, b = (u + 0.35 if thing.body == 2 else u - 0.42) / reach, v / reach
            inside = a**2 + b**2 <= 1
            jitter = rng.normal(0, 6 + 12 * spec.difficulty, 3)
            ink = _emblem(thing.label, a, b)[:, :, None]
            colour = np.where(ink, _INK[thing.label - 1], _GROUND[thing.label - 1] + jitter)
            strength = 0.5 + 0.5 * thing.contrast
            view[inside] = (before + strength * (colour - before))[inside]
            shape = shape | inside
            marks[shape] = thing.label
            if thing.hidden:  # a bar over the middle of the body, beside most of the emblem
                lean, width = rng.uniform(-0.5, 0.5), rng.uniform(0.22, 0.4)
                side = 0.3 if thing.body == 2 else -0.3
                bar = (np.abs(u - side + lean * v) < width) & (np.abs(v) < 1.0)
                view[bar] = rng.uniform(70, 170) + rng.uniform(-8, 8, 3)
                marks[bar & (u**2 + v**2 <= 4)] = 0
        else:
            marks[shape] = 0
    return np.clip(canvas, 0, 255).astype(np.uint8), labels
