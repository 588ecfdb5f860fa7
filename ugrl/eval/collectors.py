"""What a validation measures: each collector is shown every batch and gives its scores at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ugrl.config import Config, EvalConfig
from ugrl.eval.crf import find_backend, sharpen
from ugrl.eval.metrics import Confusion, TagMetrics, UncertaintyMetrics
from ugrl.eval.palette import denormalize
from ugrl.eval.passes import BatchPasses
from ugrl.method.class_vectors import batch_vectors
from ugrl.method.doubts import pair_doubts
from ugrl.method.prototypes import Prototypes
from ugrl.method.pseudo import pseudo_labels
from ugrl.method.refine import PAR, refine_labels
from ugrl.types import IGNORE

# Told the name of the scores (``seg``, ``cam``, …), the id of an image and its uint8 labels (H, W).
Keep = Callable[[str, str, np.ndarray], None]


@dataclass(slots=True)
class Scores:
    """What a collector has found.

    Attributes:
        metrics: Values by the name of the metric.
        classes: Metric → class name → value.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)


class Collector(Protocol):
    """One kind of score."""

    def add(self, seen: BatchPasses) -> None:
        """Count a batch of this rank."""
        ...

    def result(self) -> Scores:
        """The scores over all ranks; a collective call, made once, also by a rank that saw no batch."""
        ...


class TagScores:
    """How well the classifier finds the classes of an image."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.found = names, TagMetrics(len(names))

    def add(self, seen: BatchPasses) -> None:
        """Count a batch."""
        self.found.add(seen.probs_BF, seen.batch.tags_BF)

    def result(self) -> Scores:
        """``tag_map, tag_prevalence, tag_f1, tag_f1_micro, tag_f1_image``."""
        self.found.reduce()
        return Scores(self.found.compute(), self.found.tables(self.names))


class MaskScores:
    """IoU of some labels with the ground truth.

    Args:
        name: ``seg``, ``cam``, …: scores are called ``<name>_miou`` and ``<name>_iou``.
        names: Names of the foreground classes, in the order of their indices.
        device: Device that the counts are added up on.
        labels_of: The labels of a batch, (B, H, W).
        keep: Told the labels of every image, where they are wanted.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        device: torch.device,
        labels_of: Callable[[BatchPasses], Tensor],
        keep: Keep | None = None,
    ) -> None:
        self.name, self.names, self.labels_of, self.keep = name, ("background", *names), labels_of, keep
        self.found = Confusion(len(self.names), device=device)

    def add(self, seen: BatchPasses) -> None:
        """Count a batch; one without masks is only kept."""
        labels_BHW, batch = self.labels_of(seen), seen.batch
        if batch.masks_BHW is not None:
            self.found.add(labels_BHW, seen.labels_BHW)
        if self.keep is not None:
            host_BHW = labels_BHW.to(torch.uint8).cpu().numpy()
            for id, labels_HW, (y0, y1, x0, x1) in zip(batch.ids, host_BHW, batch.boxes_B4.tolist(), strict=True):
                self.keep(self.name, id, labels_HW[y0:y1, x0:x1])

    def result(self) -> Scores:
        """``<name>_miou``, and what an empty mask scores, ``<name>_background_miou``."""
        self.found.reduce()
        metrics = {f"{self.name}_miou": self.found.miou, f"{self.name}_background_miou": self.found.background_miou}
        return Scores(metrics, {f"{self.name}_iou": self.found.table(self.names)})

    @property
    def only(self) -> str | None:
        """The class that every pixel was predicted as, if there is such a one."""
        return None if self.found.only is None else self.names[self.found.only]


class CrfScores(MaskScores):
    """IoU of the segmentation after a dense CRF, image by image."""

    def __init__(self, names: Sequence[str], device: torch.device, how: EvalConfig, keep: Keep | None = None) -> None:
        super().__init__("crf", names, device, self._sharpened, keep)
        self.how, self.backend = how, find_backend(how.crf_backend)

    def _sharpened(self, seen: BatchPasses) -> Tensor:
        probs_BCHW = seen.seg_probs_BCHW
        labels_BHW = torch.full((len(probs_BCHW), *probs_BCHW.shape[-2:]), IGNORE)
        for k, (_, h, _, w) in enumerate(seen.batch.boxes_B4.tolist()):  # without what small images were padded with
            image_HW3 = denormalize(seen.images_host_B3HW[k, :, :h, :w].numpy())
            sharp = sharpen(probs_BCHW[k, :, :h, :w].cpu().numpy(), image_HW3, self.how)
            labels_BHW[k, :h, :w] = torch.from_numpy(sharp.argmax(0))
        return labels_BHW.to(probs_BCHW.device)


class UncertaintyScores:
    """How well u tells the (image, class) pairs with a bad CAM from the others, beside the classifier."""

    def __init__(self, cfg: Config, prototypes: Prototypes, affinity_trained: bool) -> None:
        self.cfg, self.prototypes, self.affinity_trained = cfg, prototypes, affinity_trained
        self.found = UncertaintyMetrics()

    def add(self, seen: BatchPasses) -> None:
        """Count a batch."""
        radius = self.cfg.method.uncertainty.radius
        r_BCD, present_BC = batch_vectors(seen.batch, seen.cam, radius=radius, local=self.affinity_trained)
        doubts = pair_doubts(self.cfg.method.uncertainty, seen, seen.cam, seen.batch)
        u_BC, known_BC = self.prototypes.uncertainty(r_BCD, present_BC, doubts)
        self.found.add(*uncertain_pairs(seen, u_BC, known_BC))

    def result(self) -> Scores:
        """``u_auroc, p_auroc``."""
        self.found.reduce()
        return Scores({k: v for k, v in self.found.compute().items() if k != "u_pairs"})


def uncertain_pairs(seen: BatchPasses, u_BC: Tensor, known_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, IoU of the CAM with the ground truth, and the classifier's probability, of each present pair, (P,) each.

    The IoU is NaN where there is no u, or neither CAM nor truth has a pixel of the class.
    """
    batch, labels_BHW = seen.batch, seen.labels_BHW
    pb, pf = batch.pairs_P2.to(labels_BHW.device).unbind(1)
    hot = seen.cam.cam_PHW > seen.cfg.eval.cam_background
    truth = labels_BHW[pb] == (pf + 1)[:, None, None]
    valid = labels_BHW[pb] != IGNORE
    inter = (hot & truth & valid).flatten(1).sum(1)
    union = ((hot | truth) & valid).flatten(1).sum(1)
    ok = known_BC[pb, pf + 1] & (union > 0)
    # A NaN is left out by the metrics; masking would have to wait for the device.
    iou = (inter / union.clamp_min(1)).where(ok, torch.nan)
    return u_BC[pb, pf + 1], iou, seen.probs_BF[pb, pf]


def segmentation_labels(seen: BatchPasses) -> Tensor:
    """What the segmentation predicts."""
    return seen.seg_probs_BCHW.argmax(1)


def cam_labels(seen: BatchPasses) -> Tensor:
    """The labels of the CAM at ``eval.cam_background``: one threshold, so every pixel inside the image is decided."""
    t, batch = seen.cfg.eval.cam_background, seen.batch
    labels_BHW, _ = pseudo_labels(seen.cam.cam_PHW, batch.pairs_P2, batch.boxes_B4, batch=len(batch.ids), high=t, low=t)
    return labels_BHW


def refined_labels(par: PAR) -> Callable[[BatchPasses], Tensor]:
    """The labels of the CAM refined by PAR; what stays undecided is background."""

    def labels_of(seen: BatchPasses) -> Tensor:
        e, batch = seen.cfg.eval, seen.batch
        t = e.cam_background if e.refined_background is None else e.refined_background
        fine_BHW, _ = refine_labels(
            seen.cam.cam_PHW,
            batch.pairs_P2,
            batch.boxes_B4,
            batch.images_B3HW,
            batch=len(batch.ids),
            par=par,
            high=t,
            low=t,
        )
        return fine_BHW.where(fine_BHW != IGNORE, torch.zeros_like(fine_BHW))

    return labels_of
