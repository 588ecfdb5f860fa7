"""Which parts of the method act at a step: the setting (a row of Table 3), the losses in use and the warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ugrl.config import Config

# Settings of Table 3 by what the uncertainty does there.
WEIGHS_CLS = {"I", "II", "III", "IV"}
WEIGHS_SEG = {"II", "IV"}
CONTRASTS = {"III", "IV"}
# The supervised upper bound: labels are the masks, and nothing that makes pseudo-labels acts.
FULL = "Full"


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a configuration uses, and from which step on. Steps count from 0.

    Attributes:
        warmup: Steps at the start that train the classification alone; 0 with the setting Full.
        weighs_cls: Whether the classification loss is weighted (Eq. 6).
        weighs_seg: Whether the segmentation loss is weighted (Eq. 8).
        contrasts: Whether the contrastive loss is in use (Eq. 10).
        uses_affinity: Whether the affinity loss is in use (Eq. 12).
        propagates_from: First step whose CAM walks along the affinity; ``None``: no step's does.
        as_afa: Whether what walks is for L_seg's labels alone (``propagate: afa``).
        aux_labels: Whether the auxiliary classifier's CAM gives the labels of the affinity loss.
        share: ``method.cam.share``, with ``exact`` resolved to what it means here.
        supervised: Whether the labels are the masks of the batch, so that no CAM is computed.
        decoder_weight: Share of the decoder in the maps of pseudo-labels once all steps are done.
        steps: Steps of the run.
    """

    warmup: int
    weighs_cls: bool
    weighs_seg: bool
    contrasts: bool
    uses_affinity: bool
    propagates_from: int | None
    as_afa: bool
    aux_labels: bool
    share: Literal["warmup", "always", "never"]
    supervised: bool = False
    decoder_weight: float = 0.0
    steps: int = 1

    @classmethod
    def of(cls, cfg: Config) -> Schedule:
        """The schedule of a run."""
        method, cam = cfg.method, cfg.method.cam
        if method.setting == FULL:
            return cls(0, False, False, False, False, None, False, False, "never", supervised=True)
        warmup = cfg.train.at(cfg.train.cls_warmup_iters)
        share = cam.share
        if share == "exact":  # nothing is dropped: the two passes are one
            same = (not cfg.train.stochastic or cfg.model.drop_path == 0) and cam.mode == "eval"
            share = "always" if same else "never"
        return cls(
            warmup=warmup,
            weighs_cls=method.setting in WEIGHS_CLS,
            weighs_seg=method.setting in WEIGHS_SEG,
            contrasts=method.setting in CONTRASTS and method.loss.lambda2 > 0,
            uses_affinity=method.loss.lambda3 > 0,
            propagates_from=max(cfg.train.at(cam.propagate_after), warmup) if cam.propagate != "none" else None,
            as_afa=cam.propagate == "afa",
            aux_labels=method.loss.lambda3 > 0 and cam.affinity_from == "aux",
            share=share,
            decoder_weight=method.pseudo.decoder_weight if method.setting in WEIGHS_SEG else 0.0,
            steps=cfg.train.steps,
        )

    def warm(self, step: int) -> bool:
        """Whether a step belongs to the warm-up."""
        return step < self.warmup

    def shares(self, step: int) -> bool:
        """Whether the training pass stands in for the plain CAM pass at a step."""
        return self.share == "always" or (self.share == "warmup" and self.warm(step))

    def propagates(self, step: int) -> bool:
        """Whether the CAM walks along the affinity at a step."""
        return self.propagates_from is not None and step >= self.propagates_from

    def decoder_share(self, done: int) -> float:
        """Share of the decoder in the maps that labels are made of, once so many steps are done."""
        if self.warm(done):
            return 0.0
        return self.decoder_weight * min(1.0, (done - self.warmup) / max(1, self.steps - self.warmup))

    def affinity_trained(self, done: int) -> bool:
        """Whether the affinity has been trained once so many steps are done."""
        return self.uses_affinity and done > self.warmup

    def heads(self, step: int) -> dict[str, bool]:
        """Which heads the losses of a step read, by the network's argument names."""
        late = not self.warm(step)
        return {"decode": late, "affinity": self.uses_affinity and late, "embed": self.contrasts and late}
