"""What the prototypes say of single positions: a u for each pixel's label, and labels that are not of the CAM alone.

The paper knows one u for each class of an image (Eq. 7). A position of F4 can be encoded as a class vector is (Eq. 3),
and compared with the same prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ugrl.config import Config
from ugrl.grid import inside_pixels, resize_maps
from ugrl.method.calibrate import Doubts
from ugrl.method.cam import CamOutput
from ugrl.method.doubts import Heads, at_labels, pixel_doubts
from ugrl.method.prototypes import Prototypes
from ugrl.method.schedule import Schedule
from ugrl.types import IGNORE, Batch

# A map stays below 1, as a normalised CAM does.
BELOW_ONE = 1 - 1e-6
# Nothing is divided by less.
TINY = 1e-12


@torch.no_grad()
def label_uncertainty(
    prototypes: Prototypes, f4_BDhw: Tensor, labels_BHW: Tensor, pairs_P2: Tensor, present_BC: Tensor
) -> tuple[Tensor, Tensor]:
    """The u of each pixel's label, from the feature at the pixel (in the place of Eq. 7).

    The u of the shown classes on F4's grid, resized bilinearly; of these the one of the label.

    Args:
        prototypes: As they were before this batch.
        f4_BDhw: Features of the encoder's last stage.
        labels_BHW: int64 labels, each of background or of a class with a pair, or 255.
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
        present_BC: bool, the classes that the images show, background among them.

    Returns:
        u (B, H, W) in [0, 2], 0 where unknown; and bool (B, H, W): known.
    """
    u_BChw, known_BChw = prototypes.position_uncertainty(f4_BDhw, present_BC)
    u_BHW = at_labels(u_BChw, labels_BHW, pairs_P2)
    labelled_BHW = labels_BHW != IGNORE
    safe_BN = labels_BHW.where(labelled_BHW, 0).flatten(1)
    # A resized u mixes positions, so all of them must have one; they do where the class and a rival have prototypes.
    known_BC = known_BChw.flatten(2).all(2)
    known_BHW = known_BC.gather(1, safe_BN).view_as(labels_BHW) & labelled_BHW
    return u_BHW.masked_fill(~known_BHW, 0), known_BHW


@torch.no_grad()
def judge_pixels(
    cfg: Config,
    prototypes: Prototypes,
    heads: Heads,
    f4_BDhw: Tensor,
    labelled: tuple[Tensor, Tensor],
    pairs_P2: Tensor,
    present_BC: Tensor,
) -> tuple[Tensor, Tensor, Doubts, Tensor]:
    """What is said of each pixel's label: what ``prototypes.calibration.pixels`` is told, and mixes.

    Args:
        cfg: Configuration of the run.
        prototypes: As they were before this batch.
        heads: Of the batch.
        f4_BDhw: Features of the encoder's last stage.
        labelled: Labels and their confidence, (B, H, W) each.
        pairs_P2: As of :func:`label_uncertainty`.
        present_BC: As there.

    Returns:
        u of the prototypes, which are known, the doubts of everyone else who has a say, and 0 for labels of background
        and 1 for others.
    """
    labels_BHW, conf_BHW = labelled
    u_BHW, known_BHW = label_uncertainty(prototypes, f4_BDhw, labels_BHW, pairs_P2, present_BC)
    doubts = pixel_doubts(cfg.method.uncertainty, heads, labels_BHW, conf_BHW, pairs_P2)
    return u_BHW, known_BHW, doubts, (labels_BHW > 0).long()


@torch.no_grad()
def with_prototypes(
    cam: CamOutput,
    pairs_P2: Tensor,
    boxes_B4: Tensor,
    prototypes: Prototypes,
    present_BC: Tensor,
    *,
    weight: float,
    bias: float,
) -> Tensor:
    """The CAM with what the prototypes say: CAM + w·(cos(H_p, P_c) − cos(H_p, P_0) − b), within [0, 1).

    Thresholds and PAR read it in the CAM's unit. A class without a prototype, and an image whose background has none,
    keeps its CAM.

    Args:
        cam: CAM and F4 of the batch.
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` on the CPU.
        prototypes: As they were before this batch.
        present_BC: bool, the classes that the images show, background among them.
        weight: w.
        bias: b.

    Returns:
        (P, H, W), zero outside the box.
    """
    size = (int(cam.cam_PHW.shape[-2]), int(cam.cam_PHW.shape[-1]))
    cosine_BNC, known_BNC = prototypes.cosines(cam.f4_BDhw.to(prototypes.mean_CD.dtype).flatten(2).mT)
    image_P, class_P = pairs_P2.to(cosine_BNC.device).unbind(1)
    class_P = class_P + 1
    known_PN = known_BNC[image_P, :, class_P] & known_BNC[image_P, :, 0] & present_BC[image_P, class_P][:, None]
    gain_PN = cosine_BNC[image_P, :, class_P] - cosine_BNC[image_P, :, 0] - bias
    gain_Phw = gain_PN.masked_fill(~known_PN, 0).unflatten(1, tuple(cam.f4_BDhw.shape[-2:])).to(cam.cam_PHW)
    inside_PHW = inside_pixels(boxes_B4[pairs_P2[:, 0]], size, cam.cam_PHW.device)
    return (cam.cam_PHW + weight * resize_maps(gain_Phw, size)).clamp(0, BELOW_ONE) * inside_PHW


@torch.no_grad()
def with_decoder(maps_PHW: Tensor, pairs_P2: Tensor, boxes_B4: Tensor, probs_BChw: Tensor, share: float) -> Tensor:
    """(1 − v)·M_c + v·S_c / (S_0 + Σ_t S_t): maps with the decoder's probability of each class among those shown.

    Tags leave the decoder fewer classes than it must tell apart for itself, so it is right more often than its masks.

    Args:
        maps_PHW: M, of the present pairs, in [0, 1).
        pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
        boxes_B4: int64 half-open ``(y0, y1, x0, x1)`` on the CPU.
        probs_BChw: S, the decoder's probabilities on its own grid; the sum is over the tags t of an image.
        share: v in [0, 1).

    Returns:
        (P, H, W), zero outside the box.
    """
    size = (int(maps_PHW.shape[-2]), int(maps_PHW.shape[-1]))
    image_P, class_P = pairs_P2.to(probs_BChw.device).unbind(1)
    own_Phw = probs_BChw[image_P, class_P + 1]
    shown_Bhw = probs_BChw[:, 0].index_add(0, image_P, own_Phw)
    told_Phw = (own_Phw / shown_Bhw[image_P].clamp(min=TINY)).to(maps_PHW)
    inside_PHW = inside_pixels(boxes_B4[pairs_P2[:, 0]], size, maps_PHW.device)
    mixed_PHW = (1 - share) * maps_PHW + share * resize_maps(told_Phw, size)
    return mixed_PHW.clamp(max=BELOW_ONE) * inside_PHW


def label_maps(
    cfg: Config,
    cam: CamOutput,
    batch: Batch,
    prototypes: Prototypes,
    present_BC: Tensor,
    heads: Heads,
    done: int,
) -> Tensor:
    """The maps that pseudo-labels are made of: the CAM, or with what others say (``method.pseudo.source``).

    Prototypes and decoder have a say where u has one in the segmentation loss: in the settings II and IV.

    Args:
        cfg: Configuration of the run.
        cam: CAM and F4 of the batch.
        batch: Pairs and boxes are read.
        prototypes: As they were before this batch.
        present_BC: bool, the classes that the images show, background among them.
        heads: Of the batch.
        done: Steps that the run has done.

    Returns:
        (P, H, W) in [0, 1), zero outside the box.
    """
    p, schedule = cfg.method.pseudo, Schedule.of(cfg)
    if p.source != "cam+prototypes" or not schedule.weighs_seg:
        return cam.cam_PHW
    maps_PHW = with_prototypes(
        cam, batch.pairs_P2, batch.boxes_B4, prototypes, present_BC, weight=p.prototype_weight, bias=p.background_bias
    )
    share = schedule.decoder_share(done)
    if share == 0:
        return maps_PHW
    return with_decoder(maps_PHW, batch.pairs_P2, batch.boxes_B4, heads.probabilities(), share)
