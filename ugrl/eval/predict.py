"""Masks for images of any size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ugrl.data.augment import normalize
from ugrl.data.images import decode_pixels
from ugrl.errors import DataError
from ugrl.eval.palette import WRITER, write_mask
from ugrl.eval.passes import pad_small, seg_scores
from ugrl.foreign import read_bytes
from ugrl.model.network import UGRLNet
from ugrl.text import line

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# Pixels of an image at its largest scale; probabilities of twenty classes are then some gigabytes.
MOST_PIXELS = 64_000_000


def find_images(paths: list[Path]) -> list[Path]:
    """The images among files and folders (searched one level deep), in order, each once.

    Raises:
        DataError: A path that does not exist, or a folder without an image.
    """
    found: list[Path] = []
    for path in paths:
        try:
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
            if not inside:
                raise DataError(f"{path}: no image in this folder; expected files ending in {', '.join(SUFFIXES)}")
            if not path.exists():
                raise DataError(f"{path}: no such image")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        found += inside
    return list(dict.fromkeys(found))


def plan_targets(images: list[Path], out: Path) -> dict[Path, Path]:
    """Where the mask of each image goes: ``out/<stem>.png``.

    Raises:
        DataError: Two masks of one name, a mask in place of an image, or of a file that ``ugrl predict`` has not
            written.
    """
    stems: dict[str, Path] = {}
    for path in images:
        other = stems.setdefault(path.stem, path)
        if other is not path:
            raise DataError(f"{path} and {other} would both be written as {path.stem}.png; rename one")
    inputs = {key: path for path in images for key in _identities(path)}
    targets = {path: out / f"{path.stem}.png" for path in images}
    for path, target in targets.items():
        taken = next((inputs[key] for key in _identities(target) if key in inputs), None)
        if taken is not None:
            raise DataError(f"{target}: the mask of {path} would take the place of {taken}; choose another --out")
        if os.path.lexists(target) and not _written_here(target):
            raise DataError(f"{target}: exists already, and ugrl predict has not written it; choose another --out")
    return targets


def _identities(path: Path) -> Iterator[tuple[int, int]]:
    """What a path is on the disk, as it stands and behind its links: names differ in case, or lead elsewhere."""
    for ask in (os.lstat, os.stat):
        try:
            found = ask(path)
        except OSError:
            continue
        yield found.st_dev, found.st_ino


def _written_here(target: Path) -> bool:
    try:
        with Image.open(target, formats=("PNG",)) as image:
            return target.is_file() and image.info.get("Software") == WRITER
    except Exception:  # whatever a file that is no PNG of ours may make of Pillow
        return False


def read_image(path: Path) -> np.ndarray:
    """An image as uint8 (H, W, 3).

    Raises:
        DataError: Not an image, or truncated.
    """
    return decode_pixels(read_bytes(path, "image"), line(path))


@torch.no_grad()
def predict_image(
    net: UGRLNet,
    image_HW3: np.ndarray,
    *,
    device: torch.device,
    scales: tuple[float, ...] = (1.0,),
    mirror: bool = False,
    crf: bool = False,
) -> np.ndarray:
    """Labels (H, W) uint8 of one image of any size.

    Args:
        net: Network in eval mode.
        image_HW3: uint8.
        device: Device of the network.
        scales: Scales of the input that are averaged.
        mirror: Whether to average with the mirror image.
        crf: Whether to sharpen with a dense CRF.

    Raises:
        DataError: The image is too large.
    """
    h, w = image_HW3.shape[:2]
    if h * w * max(1.0, *scales) ** 2 > MOST_PIXELS:
        at = f" at scale {max(scales):g}" if max(scales) > 1 else ""
        raise DataError(f"{w} × {h} pixels{at}; expected at most {MOST_PIXELS // 10**6} million: cut it into parts")
    x = torch.from_numpy(pad_small(normalize(image_HW3), net.min_size))[None].to(device)
    probs = seg_scores(net, x, scales, mirror)[0, :, :h, :w]
    if crf:
        from ugrl.eval.crf import dense_crf

        return dense_crf(probs.cpu().numpy(), image_HW3).argmax(0).astype(np.uint8)
    return probs.argmax(0).to(torch.uint8).cpu().numpy()


def predict(
    net: UGRLNet,
    targets: Mapping[Path, Path],
    *,
    device: torch.device,
    scales: tuple[float, ...] = (1.0,),
    mirror: bool = False,
    crf: bool = False,
    on_error: Callable[[DataError], None] | None = None,
) -> Iterator[tuple[Path, np.ndarray]]:
    """Write the mask of each image and yield its path with its labels.

    Args:
        net: Network; it is put into eval mode.
        targets: Image → mask, from :func:`plan_targets`.
        device: Device of the network.
        scales: Scales of the input that are averaged.
        mirror: Whether to average with the mirror image.
        crf: Whether to sharpen with a dense CRF.
        on_error: Told of an image that cannot be used, before the next one; without it the first one is raised.

    Raises:
        DataError: An image cannot be used, or a mask cannot be written; masks written before it stay.
    """
    net.eval()
    for path, target in targets.items():
        try:
            image = read_image(path)
            try:
                labels = predict_image(net, image, device=device, scales=scales, mirror=mirror, crf=crf)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and "memory" not in str(error):
                    raise
                raise DataError(
                    f"{path}: {image.shape[1]} × {image.shape[0]} pixels do not fit into the memory of {device}"
                ) from None
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_mask(target, labels)
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({error.strerror or error})") from None
        yield target, labels
