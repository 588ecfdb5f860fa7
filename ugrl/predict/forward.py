"""Passes of a network over images of any size: whole, in batches of one size, or in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ugrl.config import EvalConfig
from ugrl.data.augment import normalize
from ugrl.errors import DataError
from ugrl.eval.combine import combined_scores, first_size, with_tag_prior
from ugrl.eval.crf import sharpen
from ugrl.eval.passes import pad_small
from ugrl.grid import inside_cells
from ugrl.model.network import UGRLNet
from ugrl.predict.tiles import Span, Tiling, bands, weights

# Pixels of an image at its largest scale; probabilities of twenty classes are then some gigabytes.
MOST_PIXELS = 64_000_000
# Keys of ``eval`` that a mask depends on, beside those of the CRF.
COMBINED = ("combine", "combine_of", "combine_at", "tag_prior")
KEYS = ("seg_scales", "mirror", "mirror_by", "resize", "side", "rounding", *COMBINED)


@dataclass(frozen=True, slots=True)
class How:
    """How masks are computed.

    Attributes:
        scales: Scales of the input that are combined.
        mirror: Whether to combine with the mirror image.
        crf: Whether to sharpen with a dense CRF.
        tiling: How images are divided; ``None`` for whole images.
        batch: Images of one size, or parts of one image, that pass at a time.
        rest: The other keys of ``eval`` that masks depend on: sizes, how scores are combined, and the CRF's.
    """

    scales: tuple[float, ...] = (1.0,)
    mirror: bool = False
    crf: bool = False
    tiling: Tiling | None = None
    batch: int = 1
    rest: EvalConfig = EvalConfig()

    @property
    def eval(self) -> EvalConfig:
        """The keys of ``eval``, all together."""
        return replace(self.rest, seg_scales=self.scales, mirror=self.mirror, crf=self.crf)

    def options(self) -> dict[str, Any]:
        """The keys of ``eval`` that masks depend on, and their values."""
        names = [f.name for f in fields(EvalConfig)]
        used = [name for name in names if name in (*KEYS, "crf") or (self.crf and name.startswith("crf_"))]
        return {name: getattr(self.eval, name) for name in used}


@dataclass(frozen=True, slots=True)
class Labelled:
    """What the first passes give.

    Attributes:
        labels_HW: uint8, 0 background, 1…F classes.
        scores_F: float32, the classifier's probabilities at scale 1.
    """

    labels_HW: np.ndarray
    scores_F: np.ndarray


@torch.no_grad()
def segment(net: UGRLNet, pixels: Sequence[np.ndarray], how: How, device: torch.device) -> list[Labelled]:
    """Labels and class scores of images of one size.

    Args:
        net: Network in eval mode.
        pixels: uint8 (H, W, 3) each.
        how: See the class; ``batch`` is the caller's concern for whole images.
        device: Device of the network.

    Raises:
        DataError: The images are too large.
    """
    h, w = pixels[0].shape[:2]
    if how.tiling is not None and max(h, w) > how.tiling.size:
        return [_in_tiles(net, image, how, how.tiling, device) for image in pixels]
    first = first_size((h, w), how.eval, net.min_size)
    if max(h * w, first[0] * first[1] * max(how.scales) ** 2) > MOST_PIXELS:
        at = f" at scale {max(how.scales):g}" if max(how.scales) > 1 else ""
        raise DataError(
            f"{w} × {h} pixels{at}; expected at most {MOST_PIXELS // 10**6} million: --tile 1024 takes it in parts"
        )
    probs_BCHW, f4_BDhw = _pass(net, pixels, how, device)
    scores_BF = _scores(net, f4_BDhw).cpu().numpy()
    labels_BHW = probs_BCHW.argmax(1).to(torch.uint8).cpu().numpy()
    found = []
    for b, image in enumerate(pixels):
        labels = _sharpened(probs_BCHW[b], image, how) if how.crf else labels_BHW[b]
        found.append(Labelled(labels, scores_BF[b]))
    return found


def _pass(net: UGRLNet, pixels: Sequence[np.ndarray], how: How, device: torch.device) -> tuple[Tensor, Tensor]:
    """Probabilities (B, C, H, W), and F4 of the plain pass, which serves both (B, D, h, w).

    A part of an image is weighed by the classes that it shows itself.
    """
    h, w = pixels[0].shape[:2]
    x_B3HW = as_input(net, pixels, device)
    features, _ = net.encoder(x_B3HW)
    serves = how.rest.resize == "native" and 1.0 in how.scales
    known = {(1.0, False): net.decoder(features)[1]} if serves else None
    probs_BCHW, f4_BDhw = combined_scores(net, x_B3HW, how.eval, known)[:, :, :h, :w], features[3].float()
    return with_tag_prior(probs_BCHW, _scores(net, f4_BDhw), how.rest.tag_prior), f4_BDhw


def as_input(net: UGRLNet, pixels: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Images of one size, normalised, and padded where the encoder takes no such small ones."""
    return torch.from_numpy(np.stack([pad_small(normalize(image), net.min_size) for image in pixels])).to(device)


def _scores(net: UGRLNet, f4_BDhw: Tensor) -> Tensor:
    """The classifier's probabilities (B, F), float32, of F4 as it is pooled over all positions."""
    pooled_BD = f4_BDhw.amax((2, 3)) if net.pooling == "gmp" else f4_BDhw.mean((2, 3))
    weight_FD = net.classifier.weight.flatten(1).to(pooled_BD.dtype)
    return torch.nn.functional.linear(pooled_BD, weight_FD).sigmoid().float()


def _sharpened(probs_CHW: Tensor, pixels_HW3: np.ndarray, how: How) -> np.ndarray:
    return sharpen(probs_CHW.cpu().numpy(), pixels_HW3, how.eval).argmax(0).astype(np.uint8)


# -- parts ----------------------------------------------------------------------------------------


def _in_tiles(net: UGRLNet, image_HW3: np.ndarray, how: How, tiling: Tiling, device: torch.device) -> Labelled:
    """Rows of parts from top to bottom: no more probabilities than of one such row are ever held."""
    h, w = image_HW3.shape[:2]
    rows, columns = tiling.spans(h), tiling.spans(w)
    labels_HW = np.empty((h, w), np.uint8)
    sums_CHW: Tensor | None = None  # of the rows from `top` on
    top, pool = 0, _Pool(net)
    for i, row, done in bands(rows):
        if sums_CHW is not None and sums_CHW.shape[1] < row.stop - top:
            more = sums_CHW.new_zeros((sums_CHW.shape[0], row.stop - top - sums_CHW.shape[1], w))
            sums_CHW = torch.cat([sums_CHW, more], 1)
        for parts, probs_BCHW, f4_BDhw in _row_passes(net, image_HW3, row, columns, how, device):
            if sums_CHW is None:
                sums_CHW = probs_BCHW.new_zeros((probs_BCHW.shape[1], row.stop - top, w))
            for b, k in enumerate(parts):
                weight = np.outer(weights(rows, i), weights(columns, k))
                inside = sums_CHW[:, row.start - top : row.stop - top, columns[k].start : columns[k].stop]
                inside += probs_BCHW[b] * torch.from_numpy(weight).to(device)
                pool.add(f4_BDhw[b], row, columns[k])
        assert sums_CHW is not None
        ready = sums_CHW[:, : done - top]
        part = image_HW3[top:done]
        labels_HW[top:done] = _sharpened(ready, part, how) if how.crf else ready.argmax(0).to(torch.uint8).cpu().numpy()
        sums_CHW, top = sums_CHW[:, done - top :].clone(), done
    return Labelled(labels_HW, _scores(net, pool.value()[None, :, None, None])[0].cpu().numpy())


def _row_passes(
    net: UGRLNet, image_HW3: np.ndarray, row: Span, columns: list[Span], how: How, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Parts of one row, as many of one width at a time as a batch holds."""
    for parts in groups([span.length for span in columns], how.batch):
        cut = [image_HW3[row.start : row.stop, columns[k].start : columns[k].stop] for k in parts]
        yield parts, *_pass(net, cut, how, device)


def groups(kinds: Sequence[object], most: int) -> list[list[int]]:
    """Indices of equal things, at most so many together, in the order of their first ones.

    >>> groups([5, 5, 7, 5, 5], 3)
    [[0, 1, 3], [2], [4]]
    """
    found: list[list[int]] = []
    filling: dict[object, list[int]] = {}
    for i, kind in enumerate(kinds):
        group = filling.get(kind)
        if group is None or len(group) >= max(1, most):
            group = filling[kind] = []
            found.append(group)
        group.append(i)
    return found


class _Pool:
    """F4 pooled over the cells of all cores, each of which is a cell of the whole image."""

    def __init__(self, net: UGRLNet) -> None:
        self.largest = net.pooling == "gmp"
        self.total_D: Tensor | None = None
        self.cells = 0

    def add(self, f4_Dhw: Tensor, row: Span, column: Span) -> None:
        """Count a part."""
        box = [row.core[0] - row.start, row.core[1] - row.start, column.core[0] - column.start]
        box.append(column.core[1] - column.start)
        size = (row.length, column.length)
        inside_hw = inside_cells(torch.tensor([box]), size, (f4_Dhw.shape[-2], f4_Dhw.shape[-1]), f4_Dhw.device)[0]
        picked_DN = f4_Dhw[:, inside_hw]
        if picked_DN.shape[1] == 0:
            return
        own_D = picked_DN.amax(1) if self.largest else picked_DN.sum(1)
        if self.total_D is not None:
            own_D = torch.maximum(self.total_D, own_D) if self.largest else self.total_D + own_D
        self.total_D, self.cells = own_D, self.cells + picked_DN.shape[1]

    def value(self) -> Tensor:
        """The pooled vector, (D,)."""
        assert self.total_D is not None
        return self.total_D if self.largest else self.total_D / self.cells
