"""The losses of a step and their weighted sum (Eq. 13)."""

from __future__ import annotations

from torch import Tensor

from ugrl.config import Config
from ugrl.method.contrast import contrastive_loss
from ugrl.method.losses import affinity_loss, classification_loss, segmentation_loss
from ugrl.method.pool import chosen
from ugrl.method.schedule import FULL
from ugrl.method.targets import Targets
from ugrl.types import Batch, ModelOutput


class Objective:
    """L = L_cls + λ1·L_seg + λ2·L_ucl + λ3·L_aux, each where the targets have what it needs.

    With the setting Full, λ1' (``method.loss.lambda1_full``) is in the place of λ1.
    Where the network has an auxiliary classifier, its L_cls is added with the weight of the first, 1 (ToCo).
    """

    def __init__(self, cfg: Config) -> None:
        self.method = cfg.method
        loss = cfg.method.loss
        self.lambda1 = loss.lambda1_full if cfg.method.setting == FULL else loss.lambda1

    def __call__(self, batch: Batch, out: ModelOutput, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and its terms ``cls, cls_aux, seg, ucl, aux`` without their factors.

        Args:
            batch: Samples of this rank.
            out: Output of the heads that :meth:`ugrl.method.schedule.Schedule.heads` names.
            targets: Targets of the same batch and step.
        """
        terms = self.terms(batch, out, targets)
        lam = self.method.loss
        total = terms["cls"] + terms["cls_aux"] if "cls_aux" in terms else terms["cls"]
        for name, factor in (("seg", self.lambda1), ("ucl", lam.lambda2), ("aux", lam.lambda3)):
            if name in terms:
                total = total + factor * terms[name]
        return total, terms

    def terms(self, batch: Batch, out: ModelOutput, targets: Targets) -> dict[str, Tensor]:
        """The losses by name; arguments as of the call."""
        t = targets
        terms = {"cls": classification_loss(out.logits_BF, batch.tags_BF, t.w_BF)}
        if out.aux_BF is not None:
            terms["cls_aux"] = classification_loss(out.aux_BF, batch.tags_BF, t.w_BF)
        if t.labels_BHW is not None:
            w = t.w_BC if t.w_BHW is None else t.w_BHW
            assert out.seg_BChw is not None and w is not None
            terms["seg"] = segmentation_loss(out.seg_BChw, t.labels_BHW, w, balance=self.method.loss.balance)
        if t.embed_Bn is not None:
            assert out.emb_BDhw is not None and t.small_Bhw is not None and t.pool_Bhw is not None
            labels_B1n = t.small_Bhw.flatten(1).gather(1, t.embed_Bn)[:, None]
            terms["ucl"] = self.contrast(out.emb_BDhw, labels_B1n, chosen(t.pool_Bhw, t.embed_Bn)[:, None])
        if t.coarse_Bhw is not None:
            assert out.affinity_BNN is not None and t.eligible_Bhw is not None
            terms["aux"] = affinity_loss(
                out.affinity_BNN,
                t.coarse_Bhw,
                t.eligible_Bhw,
                radius=self.method.uncertainty.radius,
                tokens_Bn=t.affinity_Bn,
                as_afa=self.method.loss.affinity_labels == "corner",
            )
        return terms

    def contrast(self, emb_BDhw: Tensor, labels_Bhw: Tensor, pool_Bhw: Tensor) -> Tensor:
        """The contrastive loss as configured."""
        c = self.method.contrast
        return contrastive_loss(emb_BDhw, labels_Bhw, pool_Bhw, tau=c.tau, scope=c.scope, tile=c.tile)
