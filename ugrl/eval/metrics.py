"""Evaluation: mIoU, image-level scores, and how well the uncertainty tells bad CAMs from good ones.

Each collector is filled on every rank with what that rank saw; at the end every rank, also one that saw nothing, calls
``reduce()``, a collective, and all of them read the same values. Samples that a sampler repeats must be left out by the
caller. A second ``reduce()`` does nothing, and nothing may be added after the first: counts would be counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ugrl.distributed import all_gather_rows, all_reduce_sum, world_size
from ugrl.errors import UgrlError
from ugrl.types import IGNORE


def gather_uneven(rows_nX: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order; every rank may hold a different number, also none.

    Args:
        rows_nX: (n, …) on any device.

    Returns:
        All rows, on the device where the argument is.
    """
    if world_size() == 1:
        return rows_nX
    home = rows_nX.device
    if "nccl" in dist.get_backend():
        # A rank that saw nothing never learnt which device to use, and NCCL takes no CPU tensor.
        rows_nX = rows_nX.to(torch.device("cuda", torch.cuda.current_device()))
    counts = all_gather_rows(torch.tensor([rows_nX.shape[0]], device=rows_nX.device)).tolist()
    most = max(counts)
    padded = rows_nX.new_zeros((most, *rows_nX.shape[1:]))
    padded[: rows_nX.shape[0]] = rows_nX
    everything = all_gather_rows(padded)
    return torch.cat([everything[r * most : r * most + count] for r, count in enumerate(counts)]).to(home)


def _refuse_late(name: str, reduced: bool) -> None:
    if reduced:
        raise UgrlError(f"{name}: add() after reduce(), expected a new collector")


class Confusion:
    """int64 confusion matrix over a split; rows are the ground truth, columns the prediction.

    Args:
        num_classes: Number of classes C (with background).
        device: Where the matrix lives; it never leaves it while it is being filled.

    Attributes:
        matrix_CC: Counts of pixels.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.classes = num_classes
        self.matrix_CC = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)
        self._impossible = torch.zeros((), dtype=torch.int64, device=device)
        self._reduced = False

    def add(self, pred_HW: Tensor, label_HW: Tensor) -> None:
        """Count pixels; those labelled 255 are dropped whatever their prediction is.

        Args:
            pred_HW: Integer predictions 0…C-1, of any shape.
            label_HW: Integer labels 0…C-1 or 255, of the same shape.

        On a GPU the host does not wait: a value that cannot be is then reported by :meth:`reduce`.

        Raises:
            UgrlError: Shapes differ, or a counted pixel holds a value outside 0…C-1 (nothing is counted then); or
                the matrix is reduced already.
        """
        _refuse_late("confusion", self._reduced)
        if pred_HW.shape != label_HW.shape:
            raise UgrlError(f"confusion: prediction {tuple(pred_HW.shape)}, label {tuple(label_HW.shape)}")
        c = self.classes
        pred = pred_HW.to(self.matrix_CC.device).flatten().long()
        label = label_HW.to(self.matrix_CC.device).flatten().long()
        good = (pred >= 0) & (pred < c) & (label >= 0) & (label < c)
        # Two bins more than cells: masking would have to wait for the device to know how many pixels are left.
        cell = torch.where(good, label * c + pred, c * c + 1)
        cell = torch.where(label == IGNORE, c * c, cell)
        if cell.device.type == "cpu":
            counts = torch.bincount(cell, minlength=c * c + 2)
            if int(counts[-1]):
                row = int((cell == c * c + 1).nonzero()[0])
                raise UgrlError(
                    f"confusion: pixel {row} has prediction {int(pred[row])} and label {int(label[row])}, "
                    f"expected 0 to {c - 1} (label {IGNORE} is dropped)"
                )
        else:  # bincount asks the device for the largest value
            counts = torch.zeros(c * c + 2, dtype=torch.int64, device=cell.device)
            counts.scatter_add_(0, cell, torch.ones_like(cell))
            self._impossible += counts[-1]
        self.matrix_CC += counts[:-2].view(c, c)

    def reduce(self) -> None:
        """Sum the matrix over ranks, in place; a collective call.

        Raises:
            UgrlError: On a GPU, that an added pixel held a value outside 0…C-1.
        """
        if not self._reduced:
            self.matrix_CC = all_reduce_sum(self.matrix_CC)
            impossible = int(all_reduce_sum(self._impossible))
            if impossible:
                raise UgrlError(
                    f"confusion: {impossible} pixels have a prediction or label outside 0 to {self.classes - 1} "
                    f"(label {IGNORE} is dropped)"
                )
            self._reduced = True

    @property
    def iou_C(self) -> Tensor:
        """float64 (C,) on the CPU: intersection over union, NaN for a class absent from the ground truth."""
        matrix = self.matrix_CC.cpu().double()
        hit, truth, guess = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        return torch.where(truth > 0, hit / (truth + guess - hit), torch.nan)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes of the ground truth, in [0, 1]; NaN when nothing was counted."""
        return float(self.iou_C.nanmean())

    @property
    def background_miou(self) -> float:
        """What predicting nothing but background would score: the least that a mean IoU must beat."""
        matrix = torch.zeros_like(self.matrix_CC)
        matrix[:, 0] = self.matrix_CC.sum(1)
        empty = Confusion(self.classes)
        empty.matrix_CC = matrix
        return empty.miou

    @property
    def only(self) -> int | None:
        """The class that every counted pixel was predicted as, if there is such a one."""
        guessed = self.matrix_CC.cpu().sum(0).nonzero().flatten().tolist()
        return guessed[0] if len(guessed) == 1 else None

    def table(self, class_names: Sequence[str]) -> dict[str, float]:
        """IoU by class name, in order.

        Args:
            class_names: C names, background first.

        Raises:
            UgrlError: The number of names is not C.
        """
        if len(class_names) != self.classes:
            raise UgrlError(f"confusion: got {len(class_names)} class names, expected {self.classes}")
        return dict(zip(class_names, self.iou_C.tolist(), strict=True))


def average_precision(score_n: Tensor, positive_n: Tensor) -> float:
    """Area under the precision-recall steps: sum of (R_k - R_{k-1}) P_k over distinct thresholds.

    The definition of scikit-learn's ``average_precision_score``: equal scores are one threshold, no interpolation.

    Args:
        score_n: Scores, higher means positive.
        positive_n: bool.

    Returns:
        In [0, 1]; NaN without a positive.
    """
    total = int(positive_n.sum())
    if total == 0:
        return math.nan
    score, order = score_n.double().sort(descending=True)
    hits = positive_n[order].double().cumsum(0)
    last = torch.ones_like(score, dtype=torch.bool)
    last[:-1] = score[1:] != score[:-1]
    rank = torch.arange(1, len(score) + 1, dtype=torch.float64, device=score.device)[last]
    hits = hits[last]
    return float((hits.diff(prepend=hits.new_zeros(1)) * hits / rank).sum() / total)


def auroc(score_n: Tensor, positive_n: Tensor) -> float:
    """:func:`weighted_auroc` of single positives and negatives.

    Args:
        score_n: Scores, higher means positive.
        positive_n: bool.
    """
    return weighted_auroc(score_n, positive_n, ~positive_n)


def weighted_auroc(score_n: Tensor, positive_n: Tensor, negative_n: Tensor) -> float:
    """Probability that a positive scores above a negative, equal scores counting one half.

    Exact: the Mann-Whitney U statistic.

    Args:
        score_n: Scores, higher means positive.
        positive_n: How many positives have the score.
        negative_n: How many negatives have it.

    Returns:
        In [0, 1]; NaN where one of the two kinds is missing.
    """
    score, group = score_n.double().unique(return_inverse=True)
    positive, negative = (torch.zeros_like(score).index_add_(0, group, x.double()) for x in (positive_n, negative_n))
    pairs = float(positive.sum() * negative.sum())
    below = negative.cumsum(0) - negative / 2
    return float((positive * below).sum()) / pairs if pairs else math.nan


# A probability above this is a predicted tag.
PREDICTED = 0.5


class TagMetrics:
    """Image-level classification: mean average precision and F1.

    Args:
        classes: Number of foreground classes F (without background).
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._rows = torch.zeros((0, 2, classes), dtype=torch.float64)
        self._new: list[Tensor] = []
        self._reduced = False

    def add(self, score_BF: Tensor, tags_BF: Tensor) -> None:
        """Collect a batch.

        Args:
            score_BF: Probabilities.
            tags_BF: 0 or 1.

        Raises:
            UgrlError: Not two (B, F) tensors, or reduced already.
        """
        _refuse_late("tag metrics", self._reduced)
        if score_BF.shape != tags_BF.shape or score_BF.ndim != 2 or score_BF.shape[1] != self.classes:
            raise UgrlError(
                f"tag metrics: scores {tuple(score_BF.shape)}, tags {tuple(tags_BF.shape)}, "
                f"expected two (B, {self.classes})"
            )
        self._new.append(torch.stack([score_BF.detach().double(), tags_BF.detach().double()], 1))

    def reduce(self) -> None:
        """Collect the rows of all ranks; a collective call."""
        if not self._reduced:
            self._rows = gather_uneven(torch.cat([self._rows, *(x.cpu() for x in self._new)]))
            self._new, self._reduced = [], True

    def compute(self) -> dict[str, float]:
        """The metrics, over all ranks after :meth:`reduce`.

        Returns:
            ``tag_map`` and ``tag_f1``, means over the classes that have a positive; ``tag_prevalence``, the share of
            images that show a class, over the same: the ``tag_map`` of a ranking by chance; ``tag_f1_micro``, F1 of
            all entries pooled; ``tag_f1_image``, the mean of F1 over the images that show a class (AFA's). NaN where
            nothing has a positive.
        """
        score_nF, tags_nF = self._found()
        guess_nF = score_nF > PREDICTED
        hit_F = (guess_nF & tags_nF).sum(0).double()
        both_F = (guess_nF.sum(0) + tags_nF.sum(0)).double()
        classes = tags_nF.any(0).nonzero().flatten().tolist()
        if not classes:
            names = ("tag_map", "tag_prevalence", "tag_f1", "tag_f1_micro", "tag_f1_image")
            return dict.fromkeys(names, math.nan)
        hit_n = (guess_nF & tags_nF).sum(1).double()
        both_n = (guess_nF.sum(1) + tags_nF.sum(1)).double()
        precision = [average_precision(score_nF[:, f], tags_nF[:, f]) for f in classes]
        return {
            "tag_map": math.fsum(precision) / len(precision),
            "tag_prevalence": float(tags_nF.double().mean(0)[classes].mean()),
            "tag_f1": float((2 * hit_F / both_F)[classes].mean()),
            "tag_f1_micro": float(2 * hit_F.sum() / both_F.sum()),
            "tag_f1_image": float((2 * hit_n / both_n)[tags_nF.any(1)].mean()),
        }

    def tables(self, class_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Average precision and prevalence by class name; a class without a positive has no precision (NaN).

        Args:
            class_names: Names of the F foreground classes, in the order of their indices.
        """
        score_nF, tags_nF = self._found()
        precision = [average_precision(score_nF[:, f], tags_nF[:, f]) for f in range(self.classes)]
        return {
            "tag_ap": dict(zip(class_names, precision, strict=True)),
            "tag_prevalence": dict(zip(class_names, tags_nF.double().mean(0).tolist(), strict=True)),
        }

    def _found(self) -> tuple[Tensor, Tensor]:
        score_nF, tags_nF = torch.cat([self._rows, *(x.cpu() for x in self._new)]).unbind(1)
        return score_nF, tags_nF > 0.5


class UncertaintyMetrics:
    """Whether u tells the (image, class) pairs with a bad CAM from the others, and whether 1 - p does it better."""

    def __init__(self) -> None:
        self._rows = torch.zeros((0, 3), dtype=torch.float64)
        self._new: list[Tensor] = []
        self._reduced = False

    def add(self, u_P: Tensor, cam_iou_P: Tensor, prob_P: Tensor) -> None:
        """Collect pairs; one with a NaN (no u, or no ground truth) is left out.

        Args:
            u_P: Uncertainty of each pair, in [0, 2].
            cam_iou_P: IoU of the class's CAM with the ground truth.
            prob_P: The classifier's probability.

        Raises:
            UgrlError: Lengths differ, or reduced already.
        """
        _refuse_late("uncertainty metrics", self._reduced)
        if not u_P.shape == cam_iou_P.shape == prob_P.shape or u_P.ndim != 1:
            raise UgrlError(
                f"uncertainty metrics: u {tuple(u_P.shape)}, IoU {tuple(cam_iou_P.shape)}, "
                f"probability {tuple(prob_P.shape)}, expected three (P,)"
            )
        self._new.append(torch.stack([x.detach().double() for x in (u_P, cam_iou_P, prob_P)], 1))

    def reduce(self) -> None:
        """Collect the pairs of all ranks; a collective call."""
        if not self._reduced:
            self._rows = gather_uneven(torch.cat([self._rows, *(x.cpu() for x in self._new)]))
            self._new, self._reduced = [], True

    def compute(self) -> dict[str, float]:
        """The metrics, over all ranks after :meth:`reduce`.

        Returns:
            ``u_auroc`` and ``p_auroc``: how well u and 1 - p, on the same pairs, tell those whose CAM IoU is below the
            median from the rest (NaN where none is); ``u_pairs``, their number.
        """
        rows = torch.cat([self._rows, *(x.cpu() for x in self._new)])
        rows = rows[~rows.isnan().any(1)]
        if not len(rows):
            return {"u_auroc": math.nan, "p_auroc": math.nan, "u_pairs": 0.0}
        u, iou, prob = rows.unbind(1)
        # Not Tensor.quantile: it refuses more than 16 million values.
        ordered = iou.sort().values
        bad = iou < (ordered[(len(iou) - 1) // 2] + ordered[len(iou) // 2]) / 2
        return {"u_auroc": auroc(u, bad), "p_auroc": auroc(1.0 - prob, bad), "u_pairs": float(len(rows))}
