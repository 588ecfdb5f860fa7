"""One training step: a batch goes in, named losses come out.

The walk of a batch: CAM (no gradient) → class vectors → uncertainty → pseudo-labels → the training
pass → weights made of the uncertainty → four losses → their weighted sum (Eq. 13). The prototypes
are the only state, and they move after they were read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ugrl.config import Config
from ugrl.distributed import all_reduce_sum, world_size
from ugrl.method.cam import CamOutput, multi_scale_cam
from ugrl.method.contrast import contrastive_loss
from ugrl.method.losses import affinity_loss, classification_loss, sample_nearest, segmentation_loss
from ugrl.method.pool import reliable_pool
from ugrl.method.prototypes import Prototypes
from ugrl.method.pseudo import propagate_cam, pseudo_labels
from ugrl.method.refine import PAR, refine_labels
from ugrl.method.vectors import batch_vectors
from ugrl.method.weighting import effective_share, modulation_weights
from ugrl.model.network import UGRLNet
from ugrl.model.noise import sample_noise
from ugrl.seeding import derive
from ugrl.types import IGNORE, Batch, StepOutput

WEIGHS_CLS = {"I", "II", "III", "IV"}
WEIGHS_SEG = {"II", "IV"}
CONTRASTS = {"III", "IV"}
CONF_STEPS = 2.0**16


def pixel_counts(labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Pixels of each image and class, ignored ones left out: float (B, C).

    >>> pixel_counts(torch.tensor([[[0, 2, 255, 2]]]), 3)
    tensor([[1., 0., 2.]])
    """
    flat = labels_BHW.flatten(1)
    valid = flat != IGNORE
    out = torch.zeros(flat.shape[0], num_classes, device=flat.device)
    return out.scatter_add_(1, flat.where(valid, torch.zeros_like(flat)), valid.to(out.dtype))


def _share(x: Tensor, where: Tensor) -> Tensor:
    """This rank's part of the global mean of ``x`` where ``where``; the mean over ranks is the mean."""
    count = all_reduce_sum(where.to(x).sum())
    return (x * where).sum() * world_size() / count.clamp_min(1)


class Step:
    """The method's training step for one configuration (Table 3's settings included)."""

    def __init__(self, cfg: Config, net: UGRLNet, prototypes: Prototypes, par: PAR | None) -> None:
        self.cfg = cfg
        self.net = net
        self.prototypes = prototypes
        self.par = par
        method = cfg.method
        self.weighs_cls = method.setting in WEIGHS_CLS
        self.weighs_seg = method.setting in WEIGHS_SEG
        self.contrasts = method.setting in CONTRASTS and method.loss.lambda2 > 0
        self.uses_affinity = method.loss.lambda3 > 0

    def cam(self, batch: Batch, scales: tuple[float, ...], *, propagate: bool) -> CamOutput:
        """CAM of the present pairs, from the bare network in eval mode: no drop-path, no decoder."""
        c = self.cfg.method.cam
        out = multi_scale_cam(
            lambda images, affinity: self.net.cam(images, affinity=affinity),
            batch.images_B3HW,
            batch.pairs_P2,
            batch.boxes_B4,
            scales=scales,
            mirror=c.mirror,
        )
        if propagate and out.affinity_BNN is not None:
            cam = propagate_cam(
                out.cam_PHW,
                batch.pairs_P2,
                out.affinity_BNN,
                batch.boxes_B4,
                grid=(out.f4_BDhw.shape[-2], out.f4_BDhw.shape[-1]),
                radius=self.cfg.method.uncertainty.radius,
            )
            out = CamOutput(cam, out.f4_BDhw, out.affinity_BNN)
        return out

    def labels(self, batch: Batch, cam_PHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels (B, H, W) and the confidence of each: distance to the deciding threshold."""
        c = self.cfg.method.cam
        b = len(batch.ids)
        if self.par is None:
            return pseudo_labels(cam_PHW, batch.pairs_P2, batch.boxes_B4, batch=b, high=c.high, low=c.low)
        return refine_labels(
            cam_PHW,
            batch.pairs_P2,
            batch.boxes_B4,
            batch.images_B3HW,
            batch=b,
            par=self.par,
            high=c.high,
            low=c.low,
        )

    def __call__(self, batch: Batch, step: int, *, model: nn.Module | None = None, views: bool = False) -> StepOutput:
        """Losses of one batch at one step; moves the prototypes.

        Args:
            batch: This rank's samples, on the network's device.
            step: Counted from 0.
            model: The network as wrapped by DDP; the bare one by default.
            views: Whether to keep tensors for pictures.
        """
        cfg, method = self.cfg, self.cfg.method
        u_cfg, k_cfg, lam = method.uncertainty, method.contrast, method.loss
        model = model or self.net
        num_classes = batch.tags_BF.shape[1] + 1
        b = len(batch.ids)
        device = batch.images_B3HW.device
        warm = step < cfg.train.cls_warmup_iters
        if step == cfg.train.cls_warmup_iters:
            self.prototypes.freeze()
        propagate = method.cam.propagate == "affinity" and step >= max(
            method.cam.propagate_after, cfg.train.cls_warmup_iters
        )

        # During the warm-up nothing but the prototypes reads the CAM: one scale is enough for them.
        cam = self.cam(batch, (1.0,) if warm else method.cam.scales, propagate=propagate)
        with torch.no_grad():
            r_BCD, present_BC = batch_vectors(batch, cam, radius=u_cfg.radius, local=self.uses_affinity and not warm)
            u_BC, known_BC = self.prototypes.uncertainty(r_BCD, present_BC)
            self.prototypes.update(r_BCD, present_BC)

        noise = None
        if cfg.train.stochastic:
            noise = sample_noise(
                cfg.seed, step, batch.ids, layers=self.net.layers, channels=cfg.model.decoder_dim, device=device
            )
        out = model(
            batch.images_B3HW,
            noise=noise,
            boxes=batch.boxes_B4,
            decode=not warm,
            affinity=self.uses_affinity and not warm,
            embed=self.contrasts and not warm,
        )

        terms: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        w_BF = torch.ones_like(u_BC[:, 1:])
        if self.weighs_cls and not warm:
            n_BF = batch.tags_BF.to(u_BC)
            w_BF = modulation_weights(
                u_BC[:, 1:],
                known_BC[:, 1:],
                n_BF,
                strength=u_cfg.alpha,
                kind=u_cfg.weighting,
                per_class=False,
                u_min=u_cfg.u_min,
                bound=u_cfg.bound,
            )
            stats["share_cls"] = effective_share(w_BF, known_BC[:, 1:], n_BF)
        terms["cls"] = classification_loss(out.logits_BF, batch.tags_BF, w_BF)
        loss = terms["cls"]
        stats["u_fg"] = _share(u_BC[:, 1:], known_BC[:, 1:])
        stats["u_bg"] = _share(u_BC[:, :1], known_BC[:, :1])

        keep: dict[str, Tensor] = {}
        if not warm:
            labels_BHW, conf_BHW = self.labels(batch, cam.cam_PHW)
            n_BC = pixel_counts(labels_BHW, num_classes).to(u_BC)
            w_BC = torch.ones_like(u_BC)
            if self.weighs_seg:
                w_BC = modulation_weights(
                    u_BC,
                    known_BC,
                    n_BC,
                    strength=u_cfg.beta,
                    kind=u_cfg.weighting,
                    per_class=True,
                    u_min=u_cfg.u_min,
                    bound=u_cfg.bound,
                )
                stats["share_seg"] = effective_share(w_BC, known_BC, n_BC, per_class=True)
            assert out.seg_BChw is not None
            terms["seg"] = segmentation_loss(out.seg_BChw, labels_BHW, w_BC, balance=lam.balance)
            loss = loss + lam.lambda1 * terms["seg"]
            stats["labelled"] = n_BC.sum() / labels_BHW.numel()

            # Every coarser label is a sample of the next finer one, as its pool membership is.
            coarse_of_BHW, pool_Bhw = labels_BHW, None
            if self.contrasts:
                assert out.emb_BDhw is not None
                grid4 = (out.emb_BDhw.shape[-2], out.emb_BDhw.shape[-1])
                small_Bhw = coarse_of_BHW = sample_nearest(labels_BHW, grid4)
                keys = torch.tensor([derive(cfg.seed, "pool", step, i) for i in batch.ids], device=device)
                pool_Bhw = reliable_pool(
                    small_Bhw,
                    u_BC,
                    # In steps: confidences that differ by rounding alone are ties, and the hash decides
                    # them; otherwise the batch's split over ranks would.
                    (sample_nearest(conf_BHW, grid4) * CONF_STEPS).round(),
                    keep=k_cfg.keep,
                    kind="random" if method.setting == "III" else k_cfg.pool,
                    keys_B=keys,
                )
                terms["ucl"] = contrastive_loss(
                    out.emb_BDhw, small_Bhw, pool_Bhw, tau=k_cfg.tau, scope=k_cfg.scope, tile=k_cfg.tile
                )
                loss = loss + lam.lambda2 * terms["ucl"]
                stats["pool"] = pool_Bhw.to(u_BC).mean()

            if self.uses_affinity:
                assert out.affinity_BNN is not None
                grid = (out.features[3].shape[-2], out.features[3].shape[-1])
                coarse_Bhw = sample_nearest(coarse_of_BHW, grid)
                eligible = coarse_Bhw != IGNORE
                if pool_Bhw is not None:
                    eligible = eligible & sample_nearest(pool_Bhw, grid)
                terms["aux"] = affinity_loss(out.affinity_BNN, coarse_Bhw, eligible, radius=u_cfg.radius)
                loss = loss + lam.lambda3 * terms["aux"]

            if views:
                assert out.seg_BChw is not None
                u_pixel = torch.gather(u_BC, 1, labels_BHW.where(labels_BHW != IGNORE, 0).flatten(1))
                keep["labels"] = labels_BHW
                keep["prediction"] = out.seg_BChw.detach()
                keep["u"] = u_pixel.view(b, *labels_BHW.shape[1:]).where(labels_BHW != IGNORE, torch.zeros(()).to(u_BC))
        if views:
            keep["cam"] = cam.cam_PHW

        # Parameters without a role this step still take part, with a zero: DDP waits for all of them.
        loss = loss + self._idle(warm)
        terms["total"] = loss
        return StepOutput(
            loss=loss,
            terms={k: v.detach() for k, v in terms.items()},
            stats={k: v.detach() for k, v in stats.items()},
            views=keep,
        )

    def _idle(self, warm: bool) -> Tensor:
        heads: list[nn.Module] = []
        if warm:
            heads.append(self.net.decoder)
        if warm or not self.contrasts:
            heads.append(self.net.g_seg)
        if warm or not self.uses_affinity:
            heads.append(self.net.g_cls)
        zero = self.net.classifier.weight.sum() * 0.0
        for head in heads:
            for p in head.parameters():
                zero = zero + p.sum() * 0.0
        return zero
