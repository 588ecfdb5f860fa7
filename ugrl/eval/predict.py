"""Masks for images of any size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ugrl.data.augment import normalize
from ugrl.errors import DataError
from ugrl.eval.evaluate import pad_small, seg_scores
from ugrl.eval.palette import write_mask
from ugrl.model.network import UGRLNet

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def find_images(paths: list[Path]) -> list[Path]:
    """The images among files and folders (searched one level deep), in order.

    Raises:
        DataError: A path that does not exist, a folder without an image, or two images whose masks
            would get the same name.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise DataError(f"{path}: no image in this folder; expected files ending in {', '.join(SUFFIXES)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such image")
    stems: dict[str, Path] = {}
    for path in found:
        if path.stem in stems:
            raise DataError(f"{path} and {stems[path.stem]} would both be written as {path.stem}.png; rename one")
        stems[path.stem] = path
    return found


def read_image(path: Path) -> np.ndarray:
    """An image as uint8 (H, W, 3).

    Raises:
        DataError: Not an image, or truncated.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be decoded: {error}") from None


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
        net: In eval mode.
        image_HW3: uint8.
        device: Where the network is.
        scales: Scales of the input that are averaged.
        mirror: Whether to average with the mirror image.
        crf: Whether to sharpen with a dense CRF.
    """
    h, w = image_HW3.shape[:2]
    x = torch.from_numpy(pad_small(normalize(image_HW3), net.encoder.spec.min_size))[None].to(device)
    probs = seg_scores(net, x, scales, mirror)[0, :, :h, :w]
    if crf:
        from ugrl.eval.crf import dense_crf

        return dense_crf(probs.cpu().numpy(), image_HW3).argmax(0).astype(np.uint8)
    return probs.argmax(0).to(torch.uint8).cpu().numpy()


def predict(
    net: UGRLNet,
    images: list[Path],
    out: Path,
    *,
    device: torch.device,
    scales: tuple[float, ...] = (1.0,),
    mirror: bool = False,
    crf: bool = False,
) -> Iterator[tuple[Path, np.ndarray]]:
    """Write ``out/<stem>.png`` for each image and yield it with its labels.

    Raises:
        DataError: An image cannot be decoded; masks written before it stay.
    """
    net.eval()
    out.mkdir(parents=True, exist_ok=True)
    for path in images:
        labels = predict_image(net, read_image(path), device=device, scales=scales, mirror=mirror, crf=crf)
        target = out / f"{path.stem}.png"
        write_mask(target, labels)
        yield target, labels
