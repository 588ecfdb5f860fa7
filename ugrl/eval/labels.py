"""The pseudo-labels that a trained run gives to whole images, made as its training makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ugrl.eval.passes import BatchPasses
from ugrl.method.cam import CamOutput
from ugrl.method.class_vectors import batch_vectors
from ugrl.method.doubts import pair_doubts
from ugrl.method.pseudo import propagate_cam
from ugrl.method.targets import TargetMaker


class Labelled(NamedTuple):
    """What a batch is labelled with.

    Attributes:
        labels_BHW: Pseudo-labels, int64: 0 background, 1…F classes, 255 undecided, also outside of the boxes.
        conf_BHW: Their confidence, the distance to the threshold that decided.
        r_BCD: Class vectors.
        present_BC: bool, which of them exist.
        u_BC: Uncertainty of each image and class, in [0, 2].
        known_BC: bool, where there is one.
    """

    labels_BHW: Tensor
    conf_BHW: Tensor
    r_BCD: Tensor
    present_BC: Tensor
    u_BC: Tensor
    known_BC: Tensor


@torch.no_grad()
def label(maker: TargetMaker, seen: BatchPasses, step: int) -> Labelled:
    """The pseudo-labels of a batch; the prototypes stay as they are.

    Thresholds, PAR, the walk along the affinity and ``method.pseudo.source`` act as in training. Where the batch has no
    teacher masks, the labels are those that the run would make without them.

    Args:
        maker: Of the run.
        seen: The batch, and the passes of its CAM.
        step: Steps that the run has done.
    """
    cfg, batch, cam = maker.cfg, seen.batch, seen.cam
    radius, local = cfg.method.uncertainty.radius, maker.schedule.affinity_trained(step)
    r_BCD, present_BC = batch_vectors(batch, cam, radius=radius, local=local)
    doubts = pair_doubts(cfg.method.uncertainty, seen, cam, batch)
    u_BC, known_BC = maker.prototypes.uncertainty(r_BCD, present_BC, doubts)
    cam_PHW = maker.told(batch, replace(cam, cam_PHW=_spread(maker, seen, cam, step)), present_BC, seen, step).cam_PHW
    if batch.teachers_BHW is None:
        labels_BHW, conf_BHW = maker.labels(batch, cam_PHW)
    else:
        labels_BHW, conf_BHW = maker.pseudo(batch, cam_PHW, u_BC, known_BC)
    return Labelled(labels_BHW, conf_BHW, r_BCD, present_BC, u_BC, known_BC)


def _spread(maker: TargetMaker, seen: BatchPasses, cam: CamOutput, step: int) -> Tensor:
    """The CAM that pseudo-labels are made of: after its walk along the affinity, where the run has come to it."""
    if not maker.schedule.propagates(step) or cam.affinity_BNN is None:
        return cam.cam_PHW
    return propagate_cam(
        cam.cam_PHW,
        seen.batch.pairs_P2,
        cam.affinity_BNN,
        seen.batch.boxes_B4,
        grid=(cam.f4_BDhw.shape[-2], cam.f4_BDhw.shape[-1]),
        radius=maker.cfg.method.uncertainty.radius,
    )
