"""What the classifier and the decoder doubt: of a pair, that the image shows the class where its map lies; of a pixel,
that its label is right. :mod:`ugrl.method.calibrate` mixes them with the u of the prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ugrl.config import UncertaintyConfig
from ugrl.grid import cell_means, inside_cells, resize_maps, stack_pairs
from ugrl.method.cam import CamOutput
from ugrl.types import IGNORE, Batch


class Heads(Protocol):
    """What the heads say of a batch, without gradients; asked only where it has a say in u."""

    def scores(self, f4_BDhw: Tensor) -> Tensor:
        """The classifier's scores (B, F) of F4, before the sigmoid."""

    def probabilities(self) -> Tensor:
        """The decoder's probabilities on its own grid, (B, C, h, w), with running statistics in its norm."""


def shares(u: UncertaintyConfig) -> dict[str, float]:
    """Who else has a say in u, and its share."""
    found = {"classifier": u.classifier_weight, "decoder": u.decoder_weight}
    return {name: weight for name, weight in found.items() if weight > 0}


@torch.no_grad()
def pair_doubts(
    u: UncertaintyConfig, heads: Heads, cam: CamOutput, batch: Batch, *, warm: bool = False
) -> dict[str, Tensor]:
    """The doubts of everyone who has a say, (B, C) each, NaN where there is none.

    Args:
        u: Says who.
        heads: Of the batch.
        cam: CAM and F4 of the batch.
        batch: Tags, pairs and boxes are read.
        warm: Whether nothing has trained the decoder yet: it has nothing to say then.
    """
    silent_BC = cam.f4_BDhw.new_full((len(batch.tags_BF), batch.tags_BF.shape[1] + 1), torch.nan)
    made: dict[str, Callable[[], Tensor]] = {
        "classifier": lambda: of_classifier(heads.scores(cam.f4_BDhw), batch.tags_BF),
        "decoder": lambda: silent_BC if warm else of_decoder(heads.probabilities(), cam.cam_PHW, batch),
    }
    return {name: made[name]() for name in shares(u)}


def of_classifier(logits_BF: Tensor, tags_BF: Tensor) -> Tensor:
    """−logit p of each tag; (B, C), NaN for background and for classes that an image does not show."""
    doubt_BF = -logits_BF.where(tags_BF > 0, torch.nan)
    return torch.cat([torch.full_like(doubt_BF[:, :1], torch.nan), doubt_BF], 1)


def of_decoder(probs_BChw: Tensor, cam_PHW: Tensor, batch: Batch) -> Tensor:
    """1 − Σ min(M_c, S_c) / Σ max(M_c, S_c) over the cells of an image: how little CAM and decoder agree on a class.

    Args:
        probs_BChw: S, the decoder's probabilities.
        cam_PHW: M, the CAM of the present pairs; background has 1 − max_c M_c.
        batch: Pairs and boxes are read.

    Returns:
        (B, C) in [0, 1], NaN for classes that an image does not show.
    """
    b, c, *_ = probs_BChw.shape
    grid, size = (probs_BChw.shape[-2], probs_BChw.shape[-1]), (cam_PHW.shape[-2], cam_PHW.shape[-1])
    inside_Bhw = inside_cells(batch.boxes_B4, size, grid, probs_BChw.device)
    low_BC, high_BC = overlaps(probs_BChw, cell_means(cam_PHW, grid).to(probs_BChw), batch.pairs_P2, inside_Bhw)
    return (1 - low_BC / high_BC).where(high_BC > 0, torch.nan)


def overlaps(probs_BChw: Tensor, cam_Phw: Tensor, pairs_P2: Tensor, inside_Bhw: Tensor) -> tuple[Tensor, Tensor]:
    """Σ min(M_c, S_c) and Σ max(M_c, S_c) over the cells inside, (B, C) each, 0 for classes that are not shown."""
    b, c = probs_BChw.shape[:2]
    image_P, class_P = pairs_P2.to(probs_BChw.device).unbind(1)
    stacked_Bnhw, _ = stack_pairs(cam_Phw, pairs_P2, b)
    ground_Bhw = 1 - stacked_Bnhw.amax(1)
    out = []
    for choose in (torch.minimum, torch.maximum):
        sums_BC = probs_BChw.new_zeros(b, c)
        sums_BC[:, 0] = (choose(ground_Bhw, probs_BChw[:, 0]) * inside_Bhw).sum((1, 2))
        of_pairs_P = (choose(cam_Phw, probs_BChw[image_P, class_P + 1]) * inside_Bhw[image_P]).sum((1, 2))
        out.append(sums_BC.index_put((image_P, class_P + 1), of_pairs_P))
    return out[0], out[1]


@torch.no_grad()
def pixel_doubts(
    u: UncertaintyConfig, heads: Heads, labels_BHW: Tensor, conf_BHW: Tensor, pairs_P2: Tensor
) -> dict[str, Tensor]:
    """The doubts in the labels of pixels of everyone who has a say, (B, H, W) each, NaN where there is no label.

    That of the classifier is −confidence: the distance of its map to the threshold that decided. That of the decoder is
    1 − its probability of the label.

    Args:
        u: Says who.
        heads: Of the batch.
        labels_BHW: int64 labels, each of background or of a class with a pair, or 255.
        conf_BHW: Their confidence.
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
    """
    made: dict[str, Callable[[], Tensor]] = {
        "classifier": lambda: -conf_BHW,
        "decoder": lambda: 1 - at_labels(heads.probabilities(), labels_BHW, pairs_P2),
    }
    return {name: made[name]().where(labels_BHW != IGNORE, torch.nan) for name in shares(u)}


def at_labels(maps_BChw: Tensor, labels_BHW: Tensor, pairs_P2: Tensor) -> Tensor:
    """Maps of classes, resized bilinearly; of these the one of each pixel's label, (B, H, W), of any value at 255."""
    batch, size = labels_BHW.shape[0], (int(labels_BHW.shape[-2]), int(labels_BHW.shape[-1]))
    # Slots of an image: background, then its classes, then background again where others have more; only these maps
    # are ever enlarged.
    own_Bn, _ = stack_pairs(pairs_P2[:, 1] + 1, pairs_P2, batch)
    class_Bn = torch.cat([own_Bn.new_zeros(batch, 1), own_Bn], 1).to(maps_BChw.device, non_blocking=True)
    number_n = torch.arange(class_Bn.shape[1], device=class_Bn.device).expand_as(class_Bn)
    slots_BC = torch.zeros(maps_BChw.shape[:2], dtype=torch.int64, device=maps_BChw.device)
    slot_BC = slots_BC.scatter_reduce_(1, class_Bn, number_n, "amax")
    maps_Bnhw = maps_BChw.gather(1, class_Bn[:, :, None, None].expand(-1, -1, *maps_BChw.shape[-2:]))
    safe_BN = labels_BHW.where(labels_BHW != IGNORE, 0).flatten(1)
    slot_B1HW = slot_BC.gather(1, safe_BN).view_as(labels_BHW)[:, None]
    return resize_maps(maps_Bnhw.flatten(0, 1), size).view(batch, -1, *size).gather(1, slot_B1HW)[:, 0]
