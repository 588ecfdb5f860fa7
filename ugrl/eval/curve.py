"""IoU of a CAM at every threshold of a grid, counted in one pass over the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ugrl.distributed import all_reduce_sum
from ugrl.errors import UgrlError
from ugrl.eval.metrics import Confusion
from ugrl.grid import stack_pairs
from ugrl.types import IGNORE

# Background thresholds that are tried on a normalised CAM: 0.02, 0.03, …, 0.95.
GRID = tuple(k / 100 for k in range(2, 96))


class ThresholdCurve:
    """Confusion counts of the labels that a CAM gives at each threshold of a grid.

    A pixel whose best class has a CAM above the threshold is of that class, any other is background: what
    :func:`ugrl.method.pseudo.pseudo_labels` says with both of its thresholds at that value. The threshold does not
    decide which class is best. So a histogram over (label, best class, number of thresholds below the CAM) holds the
    counts of all thresholds.

    Choose a threshold on images of the training split, then read the score of another split at that threshold.

    Args:
        num_classes: Number of classes C (with background).
        thresholds: The grid, ascending, each in (0, 1).
        device: Where the counts lie.

    Attributes:
        thresholds: The grid.

    Raises:
        UgrlError: The grid is empty, not ascending, or leaves (0, 1).
    """

    def __init__(
        self, num_classes: int, thresholds: Sequence[float] = GRID, device: torch.device | str = "cpu"
    ) -> None:
        self.classes, self.thresholds = num_classes, tuple(float(t) for t in thresholds)
        ends = (0.0, *self.thresholds, 1.0)
        if not self.thresholds or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise UgrlError(f"threshold curve: thresholds {list(self.thresholds)}, expected ascending values in (0, 1)")
        shape = (num_classes, num_classes, len(self.thresholds) + 1)
        self._counts_CCT = torch.zeros(shape, dtype=torch.int64, device=device)
        self._reduced = False

    @torch.no_grad()
    def add(self, cam_PHW: Tensor, pairs_P2: Tensor, mask_BHW: Tensor) -> None:
        """Count the pixels of a batch; those labelled 255 are dropped.

        Args:
            cam_PHW: Normalised CAM of each (image, class) pair, in [0, 1).
            pairs_P2: int64 ``(b, f)`` on the CPU, row-major, f from 0.
            mask_BHW: Integer labels 0…C-1, or 255 (also outside the box of a padded image).

        Raises:
            UgrlError: Shapes differ, a label is outside 0…C-1, or the counts are reduced already.
        """
        if self._reduced:
            raise UgrlError("threshold curve: add() after reduce(), expected a new one")
        batch, size = mask_BHW.shape[0], mask_BHW.shape[1:]
        if cam_PHW.shape[1:] != size or len(cam_PHW) != len(pairs_P2):
            raise UgrlError(
                f"threshold curve: CAM {tuple(cam_PHW.shape)} of {len(pairs_P2)} pairs, mask {tuple(mask_BHW.shape)}; "
                "expected one map of the mask's size for each pair"
            )
        home = self._counts_CCT.device
        if len(pairs_P2) == 0:
            best_BHW = torch.zeros(mask_BHW.shape, dtype=cam_PHW.dtype, device=cam_PHW.device)
            class_BHW = torch.zeros(mask_BHW.shape, dtype=torch.int64, device=cam_PHW.device)
        else:
            cam_BnHW, _ = stack_pairs(cam_PHW, pairs_P2, batch)
            class_Bn, _ = stack_pairs(pairs_P2[:, 1] + 1, pairs_P2, batch)
            best_BHW, slot_BHW = cam_BnHW.max(1)  # the first of equals, as in pseudo_labels
            class_BHW = class_Bn.to(cam_PHW.device).gather(1, slot_BHW.flatten(1)).view_as(slot_BHW)
        # In the CAM's own type, so that a value at a threshold falls on the side where a comparison would put it.
        grid_T = torch.tensor(self.thresholds, dtype=best_BHW.dtype, device=best_BHW.device)
        below_BHW = torch.bucketize(best_BHW.contiguous(), grid_T)
        label_n = mask_BHW.to(home).flatten().long()
        valid_n = label_n != IGNORE
        label_n = label_n[valid_n]
        if len(label_n) and (int(label_n.min()) < 0 or int(label_n.max()) >= self.classes):
            raise UgrlError(
                f"threshold curve: labels from {int(label_n.min())} to {int(label_n.max())}, "
                f"expected 0 to {self.classes - 1} (label {IGNORE} is dropped)"
            )
        pred_n, below_n = (x.to(home).flatten()[valid_n] for x in (class_BHW, below_BHW))
        cell_n = (label_n * self.classes + pred_n) * (len(self.thresholds) + 1) + below_n
        counts = torch.bincount(cell_n, minlength=self._counts_CCT.numel())
        self._counts_CCT += counts.view_as(self._counts_CCT)

    def reduce(self) -> None:
        """Sum the counts over ranks, in place; a collective call."""
        if not self._reduced:
            self._counts_CCT, self._reduced = all_reduce_sum(self._counts_CCT), True

    def at(self, threshold: float) -> Confusion:
        """The confusion of the labels at a threshold of the grid.

        Raises:
            UgrlError: The threshold is not one of the grid.
        """
        near = min(range(len(self.thresholds)), key=lambda k: abs(self.thresholds[k] - threshold))
        if abs(self.thresholds[near] - threshold) > 1e-9:
            raise UgrlError(
                f"threshold curve: {threshold} is not a threshold of the grid; the nearest is {self.thresholds[near]}"
            )
        return self._confusion(near)

    def best(self) -> tuple[float, Confusion]:
        """The threshold of the highest mean IoU (the lowest of equals), and its confusion."""
        mious = self.mious()
        # Without a counted pixel every mIoU is NaN, and any threshold is as good as another.
        found = max(range(len(mious)), key=lambda k: (mious[k] == mious[k], mious[k], -k))
        return self.thresholds[found], self._confusion(found)

    def mious(self) -> list[float]:
        """Mean IoU at each threshold of the grid, over the classes of the ground truth."""
        return [self._confusion(k).miou for k in range(len(self.thresholds))]

    def _confusion(self, k: int) -> Confusion:
        found = Confusion(self.classes)
        matrix_CC = self._counts_CCT[:, :, k + 1 :].sum(2)
        matrix_CC[:, 0] += self._counts_CCT[:, :, : k + 1].sum((1, 2))
        found.matrix_CC = matrix_CC.cpu()
        return found
