"""What an exported file says, held against the network that it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ugrl.bilinear import resize
from ugrl.data.augment import normalize
from ugrl.data.images import decode_pixels
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.errors import UgrlError
from ugrl.eval.metrics import Confusion
from ugrl.model.network import UGRLNet
from ugrl.model.specs import fitted
from ugrl.predict.inputs import find_images, read_picture

#: Least mean IoU of an exported file's masks with the network's.
LEAST_IOU = 0.999
#: Images of a batch (B, H, W, 3) uint8 → logits (B, C, H, W) and, where the format has them, scores (B, F).
Runner = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far an exported file is from its network.

    Attributes:
        sizes: (H, W) of the images.
        iou: Mean IoU of the masks (argmax of the logits), in [0, 1].
        logits: Largest difference of a logit.
        largest: Largest logit, without its sign.
        scores: Largest difference of a class score; ``None`` where the format has none.
        seconds: Of the exported file's passes, in seconds of this process on all cores.
    """

    sizes: tuple[tuple[int, int], ...]
    iou: float
    logits: float
    largest: float
    scores: float | None
    seconds: float

    @property
    def text(self) -> str:
        """In words."""
        sizes = ", ".join(f"{h} × {w}" for h, w in dict.fromkeys(self.sizes))
        scores = "" if self.scores is None else f", of a class score {self.scores:.1e}"
        return (
            f"{len(self.sizes)} images ({sizes}): mean IoU of the masks {self.iou:.5f}, largest difference of a logit "
            f"{self.logits:.1e} (logits up to {self.largest:.1f}){scores}"
        )


def sample_images(paths: Sequence[Path], size: tuple[int, int] | None, least: int, cell: int = 1) -> list[np.ndarray]:
    """Images to compare on, uint8 (H, W, 3): those given, or four generated ones.

    Args:
        paths: Images or folders of images.
        size: (H, W) to which all are resized; ``None``: the given ones keep theirs, the generated ones have odd sides.
        least: Shortest side; smaller images are enlarged.
        cell: Sides must be multiples of it; others are resized to the nearest ones.

    Raises:
        DataError: An image cannot be used.
    """
    if paths:
        images = [read_picture(path).pixels_HW3 for path in find_images(paths)]
    else:
        sides = [(1.0, 1.0), (1.0, 1.0), (1.4, 2.1), (2.3, 1.2)]
        wanted = [size or (int(max(least, 40) * h) | 1, int(max(least, 40) * w) | 1) for h, w in sides]
        source = ShapesSource(ShapesSpec(train=len(wanted), size=max(32, *(max(s) for s in wanted))))
        rows = [source.row("train", f"train_{k:06d}") for k in range(len(wanted))]
        images = [decode_pixels(r.image, r.id)[:h, :w] for r, (h, w) in zip(rows, wanted, strict=True)]
    return [_fitted(image, size, least, cell) for image in images]


def _fitted(image_HW3: np.ndarray, size: tuple[int, int] | None, least: int, cell: int) -> np.ndarray:
    h, w = size or (fitted(image_HW3.shape[0], cell, least), fitted(image_HW3.shape[1], cell, least))
    if (h, w) == image_HW3.shape[:2]:
        return np.ascontiguousarray(image_HW3)
    return np.asarray(Image.fromarray(image_HW3).resize((w, h), Image.Resampling.BILINEAR))


@torch.no_grad()
def reference(net: UGRLNet, images_BHW3: np.ndarray) -> tuple[Tensor, Tensor]:
    """What `ugrl predict` and `ugrl eval` make of images at scale 1: logits (B, C, H, W) and scores (B, F)."""
    device = next(net.parameters()).device
    x_B3HW = torch.stack([torch.from_numpy(normalize(image)) for image in images_BHW3]).to(device)
    features, _ = net.encoder(x_B3HW)
    logits = net.decoder(features)[1].float()
    size = (images_BHW3.shape[1], images_BHW3.shape[2])
    return resize(logits, size).cpu(), net.scores(features[3]).sigmoid().float().cpu()


def _batches(images: Sequence[np.ndarray], most: int) -> Iterator[np.ndarray]:
    """Images of one size that follow each other, at most ``most`` at a time."""
    group: list[np.ndarray] = []
    for image in images:
        if group and (group[0].shape != image.shape or len(group) >= most):
            yield np.stack(group)
            group = []
        group.append(image)
    yield np.stack(group)


def compare(net: UGRLNet, run: Runner, images: Sequence[np.ndarray], *, at_once: int = 2) -> Comparison:
    """Run both on the same images.

    Args:
        net: In eval mode.
        run: The exported file.
        images: uint8 (H, W, 3).
        at_once: Most images of a batch.
    """
    confusion: Confusion | None = None
    logits_off = scores_off = largest = seconds = 0.0
    scored = True
    for batch in _batches(images, at_once):
        wanted, wanted_scores = reference(net, batch)
        began = time.perf_counter()
        found, scores = run(batch)
        seconds += time.perf_counter() - began
        if tuple(found.shape) != tuple(wanted.shape):
            raise UgrlError(f"the exported file gives logits of shape {found.shape}; expected {tuple(wanted.shape)}")
        confusion = confusion or Confusion(wanted.shape[1])
        confusion.add(torch.from_numpy(found.argmax(1)), wanted.argmax(1))
        # Of a NaN, torch's maximum is NaN.
        logits_off = _most(logits_off, torch.from_numpy(np.array(found)) - wanted)
        largest = _most(largest, wanted)
        scored = scored and scores is not None
        if scores is not None:
            scores_off = _most(scores_off, torch.from_numpy(np.array(scores)) - wanted_scores)
    assert confusion is not None
    sizes = tuple((image.shape[0], image.shape[1]) for image in images)
    return Comparison(sizes, confusion.miou, logits_off, largest, scores_off if scored else None, seconds)


def _most(before: float, x: Tensor) -> float:
    return float(torch.stack([torch.tensor(before), x.abs().amax().float()]).amax())


def refuse_worse(found: Comparison, what: str) -> None:
    """Refuse a file whose masks are others than the network's.

    Raises:
        UgrlError: Tells the figures.
    """
    if not (found.iou >= LEAST_IOU and np.isfinite(found.logits)):
        raise UgrlError(
            f"{what} does not say what the network says, and was not written: {found.text}; "
            f"expected a mean IoU of at least {LEAST_IOU}"
        )
