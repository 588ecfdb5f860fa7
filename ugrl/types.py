"""What flows through the project, and the legend of its tensor names.

A tensor's name ends in its axes, one letter each:

========  ======================================================================================
letter    meaning
========  ======================================================================================
B         images on this rank
F         foreground classes (classes 1…F; class 0 is background)
C         classes with background, C = F + 1
P         (image, class) pairs that are present, i.e. ``tags_BF[b, f] == 1``
H, W      image or label grid (the crop)
h, w      a feature grid: stride 16 for the encoder's last stage, stride 4 for the decoder
N         positions of a grid, N = h·w, or entries that are summed over
M         attention maps (2 · heads)
D         channels: of the encoder's last stage, of an embedding
========  ======================================================================================

Labels are ``0`` background, ``1…F`` classes, ``255`` ignored. Boxes are half-open
``(y0, y1, x0, x1)`` in pixels of the crop: the part that shows the image and not its padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ugrl.row import IGNORE as IGNORE
from ugrl.row import Row as Row


@dataclass(frozen=True, slots=True)
class Sample:
    """One augmented image.

    Attributes:
        id: Id of the row that it was made of.
        image_3HW: float32, normalised; around the image the colour of ``data.pad``.
        tags_F: float32 (F,): 1 for each class that the image shows, else 0.
        mask_HW: uint8 labels with 255 outside the box, or ``None``.
        box_4: int64 ``(y0, y1, x0, x1)``.
        teacher_HW: As ``mask_HW``, of the teacher.
    """

    id: str
    image_3HW: np.ndarray
    tags_F: np.ndarray
    mask_HW: np.ndarray | None
    box_4: np.ndarray
    teacher_HW: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of this rank, stacked.

    Attributes:
        ids: Ids of the B rows.
        images_B3HW: float32 (B, 3, H, W), normalised.
        tags_BF: float32 (B, F): 1 for each class that the image shows, else 0.
        boxes_B4: int64, always on the CPU: the step slices with it and must not wait for a device.
        masks_BHW: uint8, 255 outside the boxes, or ``None``; read by metrics and pictures, and by a loss only with the
            setting Full.
        pairs_P2: int64 ``(b, f)`` of every tag, row-major, on the CPU; f counts from 0.
        teachers_BHW: uint8 teacher masks, 255 outside the boxes, or ``None`` (``method.pseudo.source``).
    """

    ids: tuple[str, ...]
    images_B3HW: Tensor
    tags_BF: Tensor
    boxes_B4: Tensor
    masks_BHW: Tensor | None
    pairs_P2: Tensor
    teachers_BHW: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch with its large tensors on ``device`` (boxes and pairs stay)."""
        masks, teachers = self.masks_BHW, self.teachers_BHW
        return replace(
            self,
            images_B3HW=self.images_B3HW.to(device, dtype, non_blocking=True),
            tags_BF=self.tags_BF.to(device, dtype, non_blocking=True),
            masks_BHW=None if masks is None else masks.to(device, non_blocking=True),
            teachers_BHW=None if teachers is None else teachers.to(device, non_blocking=True),
        )


def collate(samples: list[Sample]) -> Batch:
    """Stack samples; the batch has masks (of either kind) only if every sample has one."""
    tags = torch.from_numpy(np.stack([s.tags_F for s in samples]))
    return Batch(
        ids=tuple(s.id for s in samples),
        images_B3HW=torch.from_numpy(np.stack([s.image_3HW for s in samples])),
        tags_BF=tags,
        boxes_B4=torch.from_numpy(np.stack([s.box_4 for s in samples])).long(),
        masks_BHW=stack_masks([s.mask_HW for s in samples]),
        pairs_P2=tags.nonzero(),
        teachers_BHW=stack_masks([s.teacher_HW for s in samples]),
    )


def stack_masks(masks: list[np.ndarray | None]) -> Tensor | None:
    """Masks of one size as a tensor (B, H, W), or ``None`` where one is missing."""
    found = [mask for mask in masks if mask is not None]
    return torch.from_numpy(np.stack(found)) if len(found) == len(masks) else None


@dataclass(frozen=True, slots=True)
class Focus:
    """Where the losses will read the heads, so that they need not answer anywhere else; ``None``: everywhere.

    Attributes:
        embed_Bn: int64 positions of F1's grid, for the embeddings.
        affinity_Bn: int64 positions of F4's grid, for the affinity.
    """

    embed_Bn: Tensor | None = None
    affinity_Bn: Tensor | None = None


@dataclass(slots=True)
class ModelOutput:
    """What the network returns.

    Attributes:
        features: F1…F4, each (B, D_i, h_i, w_i).
        attn_BMNN: Pre-softmax, unscaled attention logits of the last two blocks of stage 4, or
            ``None`` when they were not asked for.
        affinity_BNN: One logit per pair of positions (Eq. 1), of all or of those asked for, or ``None``.
        logits_BF: Class scores before the sigmoid, (B, F).
        seg_BChw: Decoder logits at stride 4, or ``None``.
        emb_BDhw: Unit-length embeddings of g_seg (Eq. 9) at stride 4, float32, or ``None``; (B, D, 1, n) where they
            were asked for at n positions.
        aux_BF: Class scores of the auxiliary classifier, or ``None`` where there is none.
    """

    features: tuple[Tensor, ...]
    logits_BF: Tensor
    attn_BMNN: Tensor | None = None
    affinity_BNN: Tensor | None = None
    seg_BChw: Tensor | None = None
    emb_BDhw: Tensor | None = None
    aux_BF: Tensor | None = None


@dataclass(slots=True)
class StepOutput:
    """What one training step yields; the loop knows no method.

    Attributes:
        loss: Scalar to call backward on: the local share of the global loss times the number of
            ranks, so that averaging gradients over ranks gives the gradient of the global loss.
        terms: Named losses, detached scalars; their mean over ranks is the loss of the global batch.
        stats: Named detached scalars worth logging (effective sample share, mean u, …).
        views: Tensors for pictures, filled only when asked for.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, Tensor] = field(default_factory=dict)
