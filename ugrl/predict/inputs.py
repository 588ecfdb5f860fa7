"""What a prediction is asked for: files, folders, patterns, pictures and arrays."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ugrl.data.images import SUFFIXES, decode_pixels
from ugrl.errors import DataError
from ugrl.foreign import read_bytes
from ugrl.text import brief, line

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoded image.

    Attributes:
        pixels_HW3: uint8 RGB, upright.
        path: The file that it came from, if there is one.
    """

    pixels_HW3: np.ndarray
    path: Path | None = None


def natural_key(path: Path) -> tuple[Any, ...]:
    """Sorts numbers in names by their value, so that frames come in the order of time.

    >>> sorted([Path("f10.png"), Path("f2.png"), Path("e.png")], key=natural_key)[1].name
    'f2.png'
    """
    parts = _DIGITS.split(path.name)
    return (*((int(p), p) if i % 2 else (-1, p) for i, p in enumerate(parts)), str(path.parent))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The images among files, folders (searched one level deep) and patterns, each once.

    Files of a folder or a pattern come in the order of the numbers in their names.

    Args:
        paths: A path that does not exist and holds ``*``, ``?`` or ``[`` is a pattern; ``**`` goes through folders.

    Raises:
        DataError: A path that does not exist, or a folder or a pattern without an image.
    """
    found: list[Path] = []
    for path in paths:
        try:
            found += _images_at(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return list(dict.fromkeys(found))


def _images_at(path: Path) -> list[Path]:
    ends = f"expected files ending in {', '.join(SUFFIXES)}"
    if path.is_dir():
        inside = _sorted(path.iterdir())
        if not inside:
            raise DataError(f"{path}: no image in this folder; {ends}")
        return inside
    if not path.exists() and glob.has_magic(str(path)):
        inside = _sorted(Path(p) for p in glob.iglob(str(path), recursive=True))
        if not inside:
            raise DataError(f"{path}: no image has a name of this pattern; {ends}")
        return inside
    if not path.exists():
        raise DataError(f"{path}: no such image")
    return [path]


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted((p for p in paths if p.suffix.lower() in SUFFIXES and not p.is_dir()), key=natural_key)


def read_picture(path: Path) -> Picture:
    """An image file.

    Raises:
        DataError: Not an image, or truncated.
    """
    return Picture(decode_pixels(read_bytes(path, "image"), line(path)), path)


def as_picture(image: Any, where: str = "image") -> Picture:
    """A file's path, a Pillow image (turned as its EXIF note says) or an array of 8-bit samples.

    Args:
        image: The array is (H, W, 3) RGB, (H, W, 4) RGBA, whose transparency is passed over, or (H, W) grey.
        where: Names it in errors.

    Raises:
        DataError: Anything else, or a file that is no image.
    """
    if isinstance(image, str | os.PathLike):
        return read_picture(Path(image))
    if isinstance(image, Image.Image):
        try:
            return Picture(np.array(ImageOps.exif_transpose(image).convert("RGB")))
        except Exception as error:  # a file behind it that ends too early raises here
            raise DataError(f"{where}: broken image ({line(error)})") from None
    if not isinstance(image, np.ndarray):
        raise DataError(f"{where}: {brief(type(image).__name__)}; expected a path, a Pillow image or a NumPy array")
    shape, kind = image.shape, image.dtype
    if kind != np.uint8:
        raise DataError(f"{where}: an array of {kind}; expected uint8 samples, 0…255")
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))) or min(shape) == 0:
        raise DataError(f"{where}: an array of shape {shape}; expected (height, width, 3), or (height, width) for grey")
    pixels = np.repeat(image[..., None], 3, axis=2) if len(shape) == 2 else image[..., :3]
    return Picture(np.ascontiguousarray(pixels))


def plan_targets(images: list[Path], out: Path) -> dict[Path, Path]:
    """Where the mask of each image goes: ``out/<stem>.png``.

    Raises:
        DataError: Two masks of one name, or a mask in place of an image.
    """
    stems: dict[str, Path] = {}
    for path in images:
        other = stems.setdefault(path.stem, path)
        if other is not path:
            raise DataError(f"{path} and {other} would both be written as {path.stem}.png; rename one")
    targets = {path: out / f"{path.stem}.png" for path in images}
    check_apart(images, targets, "mask")
    return targets


def check_apart(images: Iterable[Path], targets: Mapping[Path, Path], what: str) -> None:
    """Refuse to write over what is read.

    Args:
        images: All that are read.
        targets: Image → what is written of it.
        what: It is, for the message.

    Raises:
        DataError: A file to write is one of the images, perhaps by another name.
    """
    inputs = {key: path for path in images for key in _identities(path)}
    for path, target in targets.items():
        taken = next((inputs[key] for key in _identities(target) if key in inputs), None)
        if taken is not None:
            raise DataError(f"{target}: the {what} of {path} would take the place of {taken}; choose another --out")


def _identities(path: Path) -> Iterator[tuple[int, int]]:
    """What a path is on the disk, as it stands and behind its links: names differ in case, or lead elsewhere."""
    for ask in (os.lstat, os.stat):
        try:
            found = ask(path)
        except OSError:
            continue
        yield found.st_dev, found.st_ino
