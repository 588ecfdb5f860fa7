"""Pseudo-labels out of the masks of another method (``method.pseudo.source``): tags and u decide what is believed.

The tags come first: a class that an image is not tagged with is ignored wherever the teacher drew it. What is left has
the CAM's support as its confidence, so that the reliable pool takes those pixels first that both methods are sure of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ugrl.config import Config
from ugrl.errors import DataError
from ugrl.grid import stack_pairs
from ugrl.method.schedule import FULL
from ugrl.types import IGNORE, Batch

TAUGHT = ("teacher", "agree")


def taught(cfg: Config) -> bool:
    """Whether a run reads teacher masks."""
    return cfg.method.pseudo.source in TAUGHT and cfg.method.setting != FULL


@torch.no_grad()
def teacher_labels(batch: Batch, cam_PHW: Tensor) -> tuple[Tensor, Tensor]:
    """The labels of the teacher masks (``source: teacher``).

    Args:
        batch: Samples with teacher masks, on the network's device.
        cam_PHW: Normalised CAM of each pair, in [0, 1).

    Returns:
        int64 (B, H, W): 0, a tagged class, or 255 where the teacher has 255, another class, or nothing (outside of the
        box). And the confidence in the CAM's dtype: the CAM of the class, 1 − the largest CAM for background, 0 where
        ignored.

    Raises:
        DataError: The batch has no teacher masks.
    """
    labels_BHW = tagged(batch)
    cam_BnHW, _ = stack_pairs(cam_PHW, batch.pairs_P2, len(batch.ids))
    class_Bn, _ = stack_pairs(batch.pairs_P2[:, 1] + 1, batch.pairs_P2, len(batch.ids))
    conf_BHW = (1 - cam_BnHW.amax(1)) * (labels_BHW == 0)
    for slot, class_B in enumerate(class_Bn.to(labels_BHW.device, non_blocking=True).unbind(1)):
        # An empty slot is class 0 with a CAM of 0: it adds nothing.
        conf_BHW += cam_BnHW[:, slot] * (labels_BHW == class_B[:, None, None])
    return labels_BHW, conf_BHW


@torch.no_grad()
def agreed_labels(
    batch: Batch, labels_BHW: Tensor, conf_BHW: Tensor, u_BC: Tensor, known_BC: Tensor, *, u_max: float
) -> tuple[Tensor, Tensor]:
    """The labels that CAM and teacher agree on (``source: agree``).

    Where the CAM is undecided, the teacher alone is believed, if the u of its class in the image is known and at most
    ``u_max``. Where the two differ, or the teacher says nothing, the pixel is ignored.

    Args:
        batch: Samples with teacher masks, on the network's device.
        labels_BHW: Labels of the CAM, 255 where it is undecided.
        conf_BHW: Their confidence.
        u_BC: Uncertainty of each image and class, in [0, 2].
        known_BC: bool, where there is one.
        u_max: Largest u of a class for which the teacher is believed alone.

    Returns:
        Labels as of :func:`teacher_labels`; and the CAM's confidence, which is 0 where the teacher is believed alone.

    Raises:
        DataError: The batch has no teacher masks.
    """
    taught_BHW = tagged(batch)
    silent = taught_BHW == IGNORE
    alone_BC = known_BC & (u_BC <= u_max)
    alone_BHW = alone_BC.gather(1, taught_BHW.masked_fill(silent, 0).flatten(1)).view_as(silent)
    believed = ~silent & ((labels_BHW == taught_BHW) | ((labels_BHW == IGNORE) & alone_BHW))
    return taught_BHW.masked_fill(~believed, IGNORE), conf_BHW.masked_fill(~believed, 0.0)


def tagged(batch: Batch) -> Tensor:
    """The teacher masks without the classes that the tags do not show: int64 (B, H, W).

    Raises:
        DataError: The batch has no teacher masks.
    """
    if batch.teachers_BHW is None:
        raise DataError(
            f"an image among {', '.join(batch.ids)} has no teacher mask; method.pseudo.source needs one for every "
            "training image: ugrl prepare … --teacher DIR"
        )
    shown_BF = batch.tags_BF > 0
    f_F = torch.arange(1, shown_BF.shape[1] + 1, device=shown_BF.device)
    table_BL = torch.full((len(batch.ids), 256), IGNORE, device=shown_BF.device)
    table_BL[:, 0] = 0
    table_BL[:, 1 : shown_BF.shape[1] + 1] = torch.where(shown_BF, f_F, IGNORE)
    teachers_BHW = batch.teachers_BHW
    return table_BL.gather(1, teachers_BHW.long().flatten(1)).view(teachers_BHW.shape)
