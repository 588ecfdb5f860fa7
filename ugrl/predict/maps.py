"""CAM and uncertainty of an image without tags.

Training takes them for the classes of the image's tags. Here the *shown* classes stand in for the tags: those that the
mask has, and those whose score is at least :data:`SHOWN`. All else is as in the validation of a run:

- The CAM has the scales of ``eval.cam_scales``, or else those of ``method.cam``, and its mirror images. It is min-max
  normalised per class over the image.
- The vector of a class is the mean of F4 under its CAM, spread by the affinity where that was trained (Eqs. 2 and 3).
- u = 1 − cos(H, P) (Eq. 5) compares the code of this vector with the checkpoint's prototype of the class.
- The map gives each pixel the u of the class that the mask has there (Eq. 7).

Of an image in parts, a part's raw CAM and features are those of the part, blended as its probabilities are. The
normalisation is over the whole image, and so are the class vectors; the affinity reaches as far as the part's core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ugrl import bilinear
from ugrl.config import CamConfig
from ugrl.grid import cell_means, inside_cells, resize_maps
from ugrl.method.cam import normalise
from ugrl.method.class_vectors import MIN_MASS, class_positions, local_affinity
from ugrl.method.doubts import of_classifier, overlaps
from ugrl.method.prototypes import Prototypes
from ugrl.model.network import Encoded, UGRLNet
from ugrl.model.specs import scaled
from ugrl.precision import full_precision
from ugrl.predict.forward import as_input
from ugrl.predict.tiles import Span, Tiling, weights

#: Score from which on a class counts as shown though the mask has none of it.
SHOWN = 0.5


@dataclass(frozen=True, slots=True)
class Maps:
    """What is known of an image beside its mask.

    Attributes:
        shown: Labels 1…F of the shown classes, ascending.
        cam_KHW: float32 in [0, 1), one for each of them.
        u_C: float32 in [0, 2], u of background and of each class; NaN where it is unknown: not shown, no mass under the
            CAM, or a class without a prototype.
        uncertainty_HW: float32, u of the mask's class at each pixel; NaN where unknown.
    """

    shown: tuple[int, ...]
    cam_KHW: np.ndarray
    u_C: np.ndarray
    uncertainty_HW: np.ndarray


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the image, and how much each of its pixels counts."""

    row: Span
    column: Span
    weight_HW: np.ndarray

    def of(self, image_HW3: np.ndarray) -> np.ndarray:
        return image_HW3[self.row.start : self.row.stop, self.column.start : self.column.stop]


def shown_classes(labels_HW: np.ndarray, scores_F: np.ndarray) -> tuple[int, ...]:
    """Labels of the classes that an image is taken to show, ascending."""
    in_mask = np.flatnonzero(np.bincount(labels_HW.ravel(), minlength=len(scores_F) + 1)[1 : len(scores_F) + 1]) + 1
    return tuple(sorted({*in_mask.tolist(), *(np.flatnonzero(scores_F >= SHOWN) + 1).tolist()}))


@torch.no_grad()
def maps_of(
    net: UGRLNet,
    prototypes: Prototypes,
    cam: CamConfig,
    image_HW3: np.ndarray,
    labels_HW: np.ndarray,
    scores_F: np.ndarray,
    *,
    radius: int,
    affinity: bool,
    tiling: Tiling | None,
    device: torch.device,
) -> Maps:
    """CAM and uncertainty, see the module.

    Args:
        net: Network in eval mode.
        prototypes: Those of its checkpoint.
        cam: How the CAM is made: ``scales`` and ``mirror`` are read.
        image_HW3: uint8.
        labels_HW: The mask.
        scores_F: The classifier's probabilities.
        radius: Chebyshev radius of Â, in cells of F4 (``method.uncertainty.radius``).
        affinity: Whether the affinity was trained.
        tiling: How the image is divided; ``None`` for a whole image.
        device: Device of the network.
    """
    h, w = image_HW3.shape[:2]
    shown = shown_classes(labels_HW, scores_F)
    index_K = torch.tensor(shown, dtype=torch.long, device=device) - 1
    whole = torch.tensor([[0, h, 0, w]])
    pairs_K2 = torch.stack([torch.zeros(len(shown), dtype=torch.long), torch.tensor(shown, dtype=torch.long)], 1)
    cam_KHW = torch.zeros(len(shown), h, w, device=device)
    if shown:
        for part in _parts(h, w, tiling):
            raw_KHW = _raw(net, cam, part.of(image_HW3), index_K, device)
            where = cam_KHW[:, part.row.start : part.row.stop, part.column.start : part.column.stop]
            where += raw_KHW * torch.from_numpy(part.weight_HW).to(device)
        cam_KHW = normalise(cam_KHW, pairs_K2, whole)
    u_C = _uncertainties(net, prototypes, image_HW3, scores_F, cam_KHW, shown, radius, affinity, tiling, device)
    labels = torch.from_numpy(labels_HW).to(device).long()
    return Maps(shown, cam_KHW.cpu().numpy(), u_C.cpu().numpy(), u_C[labels].cpu().numpy())


def _parts(h: int, w: int, tiling: Tiling | None) -> Iterator[_Part]:
    whole = tiling is None or max(h, w) <= tiling.size
    rows = [Span(0, h, (0, h))] if whole or tiling is None else tiling.spans(h)
    columns = [Span(0, w, (0, w))] if whole or tiling is None else tiling.spans(w)
    for i, row in enumerate(rows):
        for k, column in enumerate(columns):
            yield _Part(row, column, np.outer(weights(rows, i), weights(columns, k)))


def _raw(net: UGRLNet, cam: CamConfig, pixels: np.ndarray, index_K: Tensor, device: torch.device) -> Tensor:
    """The sum over scales of the rectified maps, (K, H, W): :func:`ugrl.method.cam.multi_scale_cam` before its norm."""
    h, w = pixels.shape[:2]
    x_13HW = as_input(net, [pixels], device)
    size = (x_13HW.shape[-2], x_13HW.shape[-1])
    total = torch.zeros(len(index_K), *size, device=device)
    for scale in cam.scales:
        x = x_13HW if scale == 1.0 else bilinear.resize(x_13HW, scaled(size, scale, net.min_size))
        one = resize_maps(net.raw_from(net.encoder(x)[0][3])[0, index_K], size)
        if cam.mirror:
            flipped = net.raw_from(net.encoder(x.flip(-1))[0][3])[0, index_K].flip(-1)
            one = torch.maximum(one, resize_maps(flipped, size))
        total += one.relu()
    return total[:, :h, :w]


def _uncertainties(
    net: UGRLNet,
    prototypes: Prototypes,
    image_HW3: np.ndarray,
    scores_F: np.ndarray,
    cam_KHW: Tensor,
    shown: tuple[int, ...],
    radius: int,
    affinity: bool,
    tiling: Tiling | None,
    device: torch.device,
) -> Tensor:
    """Uncertainties (C,), NaN where unknown."""
    classes = prototypes.counts_C.numel()
    here = [0, *shown]
    sums_KD, mass_K = torch.zeros(len(here), net.dim, device=device), torch.zeros(len(here), device=device)
    overlap_21C = torch.zeros(2, 1, classes, device=device)
    for part in _parts(image_HW3.shape[0], image_HW3.shape[1], tiling):
        cam = cam_KHW[:, part.row.start : part.row.stop, part.column.start : part.column.stop]
        seen = _Seen.of(net, part, part.of(image_HW3), cam, device)
        sums, mass = seen.weighted(net, radius, affinity)
        sums_KD += sums
        mass_K += mass
        if "decoder" in prototypes.calibration.pairs.weights:
            overlap_21C += seen.overlaps(net, shown)
    present_K = mass_K >= MIN_MASS
    r_1CD = torch.zeros(1, classes, net.dim, device=device)
    present_1C = torch.zeros(1, classes, dtype=torch.bool, device=device)
    r_1CD[0, here] = torch.where(present_K[:, None], sums_KD / mass_K.clamp(min=MIN_MASS)[:, None], 0)
    present_1C[0, here] = present_K
    logits_1F = torch.from_numpy(scores_F)[None].to(device).logit(eps=1e-7)
    low_1C, high_1C = overlap_21C
    doubts = {
        "classifier": of_classifier(logits_1F, present_1C[:, 1:].float()),
        "decoder": (1 - low_1C / high_1C).where(high_1C > 0, torch.nan),
    }
    u_1C, known_1C = prototypes.uncertainty(r_1CD, present_1C, doubts)
    return torch.where(known_1C[0], u_1C[0], torch.nan).float()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one pass over a part of an image gives.

    Attributes:
        encoded: Of the encoder.
        cam_KHW: CAM of the shown classes, with zeros where the part is padded.
        box_14: The part's core: what of it no other part counts.
    """

    encoded: Encoded
    cam_KHW: Tensor
    box_14: Tensor

    @classmethod
    def of(cls, net: UGRLNet, part: _Part, pixels: np.ndarray, cam_KHW: Tensor, device: torch.device) -> _Seen:
        h, w = pixels.shape[:2]
        x_13HW = as_input(net, [pixels], device)
        top, bottom = (edge - part.row.start for edge in part.row.core)
        left, right = (edge - part.column.start for edge in part.column.core)
        box = torch.tensor([[top, bottom, left, right]])  # without what a small image is padded with
        padded = torch.nn.functional.pad(cam_KHW, (0, x_13HW.shape[-1] - w, 0, x_13HW.shape[-2] - h))
        return cls(Encoded(*net.encoder(x_13HW)), padded, box)

    def _on(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The CAM's means over the cells of a grid, and which of these are inside (1, h, w)."""
        size, device = (int(self.cam_KHW.shape[-2]), int(self.cam_KHW.shape[-1])), self.cam_KHW.device
        return cell_means(self.cam_KHW, grid), inside_cells(self.box_14, size, grid).to(device)

    def weighted(self, net: UGRLNet, radius: int, affinity: bool) -> tuple[Tensor, Tensor]:
        """Σω·F4 (K, D) and Σω (K,) over the core's cells; the first row is background (Eqs. 2 and 3)."""
        _, f4_1Dhw, affinity_1NN = net.cam_of(self.encoded, affinity=affinity)
        grid = (f4_1Dhw.shape[-2], f4_1Dhw.shape[-1])
        cam_Khw, inside_1hw = self._on(grid)
        inside_1N = inside_1hw.flatten(1).float()
        m_1KN = class_positions(cam_Khw.flatten(1)[None], inside_1N) if len(cam_Khw) else inside_1N[:, None]
        omega_KN = m_1KN[0]
        with full_precision(f4_1Dhw):
            if affinity and affinity_1NN is not None:
                ahat_1NN = local_affinity(affinity_1NN, grid=grid, radius=radius, inside_BN=inside_1N)
                omega_KN = omega_KN @ ahat_1NN[0].to(omega_KN.dtype).mT
            return omega_KN @ f4_1Dhw[0].flatten(1).float().mT, omega_KN.sum(-1)

    def overlaps(self, net: UGRLNet, shown: tuple[int, ...]) -> Tensor:
        """Σ min and Σ max of CAM and decoder over the core's cells, (2, 1, C)."""
        probs_1Chw = net.probabilities(self.encoded.features)
        cam_Khw, inside_1hw = self._on((probs_1Chw.shape[-2], probs_1Chw.shape[-1]))
        pairs_K2 = torch.tensor([[0, label - 1] for label in shown], dtype=torch.long).view(-1, 2)
        return torch.stack(overlaps(probs_1Chw, cam_Khw, pairs_K2, inside_1hw))
