"""One training step of the public recipe; the same losses and gradients as :class:`ugrl.train.step.Step`.

The training pass comes first and its graph lives through the CAM passes, which share nothing with it. What costs next
to nothing and is the method's own (class vectors, prototypes, weights, pool) is the project's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.baseline.cam import multi_scale_cam, refined_labels, threshold_labels, valid_cam
from bench.baseline.losses import (
    affinity_labels,
    affinity_loss,
    classification_loss,
    contrastive_loss,
    radius_mask,
    segmentation_loss,
)
from bench.baseline.network import PublicNet
from ugrl.config import Config
from ugrl.errors import ConfigError
from ugrl.grid import sample_nearest
from ugrl.method.cam import CamOutput
from ugrl.method.class_vectors import batch_vectors
from ugrl.method.pool import reliable_pool
from ugrl.method.prototypes import Prototypes
from ugrl.method.refine import PAR
from ugrl.method.schedule import CONTRASTS, WEIGHS_CLS, WEIGHS_SEG
from ugrl.method.targets import CONF_STEPS
from ugrl.method.weighting import modulation_weights
from ugrl.model.network import UGRLNet
from ugrl.model.noise import sample_noise
from ugrl.seeding import derive
from ugrl.types import IGNORE, Batch, StepOutput


class PublicStep:
    """The public recipe's step for one configuration.

    During the classification warm-up it computes everything and multiplies it by zero, as the public code does, so that
    prototypes are then fed by the CAM of all scales.

    Args:
        cfg: As for ``Step``; ``contrast.scope: image`` and ``cam.propagate: none`` only.
        net: Owns the parameters.
        prototypes: Moved by every call.
        par: The refinement's constants, or ``None`` for thresholds.

    Raises:
        ConfigError: A configuration that has no public counterpart here.
    """

    def __init__(self, cfg: Config, net: UGRLNet, prototypes: Prototypes, par: PAR | None) -> None:
        method = cfg.method
        if method.contrast.scope != "image" or method.cam.propagate != "none" or method.setting == "Full":
            raise ConfigError(
                "the public recipe: expected contrast.scope image, cam.propagate none and a setting without masks"
            )
        self.cfg = cfg
        self.net = PublicNet(net)
        self.prototypes = prototypes
        self.par = par
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.logged: dict[str, float] = {}

    def __call__(self, batch: Batch, step: int, *, model: nn.Module | None = None, views: bool = False) -> StepOutput:
        """Losses of one batch; ``model`` and ``views`` are accepted and not used."""
        cfg, method = self.cfg, self.cfg.method
        u_cfg, lam, c = method.uncertainty, method.loss, method.cam
        setting = method.setting
        contrasts = setting in CONTRASTS and lam.lambda2 > 0
        warmup = cfg.train.at(cfg.train.cls_warmup_iters)
        warm = step < warmup
        if step == warmup:
            self.prototypes.freeze()
        images, device = batch.images_B3HW, batch.images_B3HW.device

        noise = None
        if cfg.train.stochastic:
            net = self.net.net
            noise = sample_noise(
                cfg.seed, step, batch.ids, layers=net.layers, channels=cfg.model.decoder_dim, device=device
            )
        out = self.net(images, noise=noise, boxes_B4=batch.boxes_B4, embed=contrasts)

        cam_BFHW, f4_BDhw, affinity_BNN = multi_scale_cam(
            self.net, images, batch.boxes_B4, scales=c.scales, mirror=c.mirror
        )
        valid_BFHW = valid_cam(cam_BFHW, batch.tags_BF)
        with torch.no_grad():
            pairs = batch.pairs_P2.to(device)
            cam_PHW = valid_BFHW[pairs[:, 0], pairs[:, 1]]
            r_BCD, present_BC = batch_vectors(
                batch,
                CamOutput(cam_PHW, f4_BDhw, affinity_BNN),
                radius=u_cfg.radius,
                local=lam.lambda3 > 0 and not warm,
            )
            u_BC, known_BC = self.prototypes.uncertainty(r_BCD, present_BC)
            self.prototypes.update(r_BCD, present_BC)

        if self.par is None:
            labels_BHW, conf_BHW = threshold_labels(valid_BFHW, batch.boxes_B4, high=c.high, low=c.low)
        else:
            labels_BHW, conf_BHW = refined_labels(
                self.par, images, cam_BFHW, batch.tags_BF, batch.boxes_B4, high=c.high, low=c.low
            )

        def weights(u: Tensor, known: Tensor, n: Tensor, strength: float, per_class: bool) -> Tensor:
            return modulation_weights(
                u,
                known,
                n,
                strength=strength,
                kind=u_cfg.weighting,
                per_class=per_class,
                u_min=u_cfg.u_min,
                bound=u_cfg.bound,
            )

        w_BF = torch.ones_like(u_BC[:, 1:])
        if setting in WEIGHS_CLS and not warm:
            w_BF = weights(u_BC[:, 1:], known_BC[:, 1:], batch.tags_BF.to(u_BC), u_cfg.alpha, False)
        w_BC = torch.ones_like(u_BC)
        if setting in WEIGHS_SEG and not warm:
            counts = [[int((y == k).sum()) for k in range(u_BC.shape[1])] for y in labels_BHW]
            w_BC = weights(u_BC, known_BC, torch.tensor(counts).to(u_BC), u_cfg.beta, True)

        terms = {
            "cls": classification_loss(out.logits_BF, batch.tags_BF, w_BF),
            "seg": segmentation_loss(out.seg_BChw, labels_BHW, w_BC, balance=lam.balance),
        }
        on = 0.0 if warm else 1.0
        loss = terms["cls"] + on * lam.lambda1 * terms["seg"]
        coarse_BHW, pool_Bhw = labels_BHW, None
        if contrasts:
            assert out.emb_BDhw is not None
            grid4 = (out.emb_BDhw.shape[-2], out.emb_BDhw.shape[-1])
            coarse_BHW = sample_nearest(labels_BHW, grid4)
            pool_Bhw = reliable_pool(
                coarse_BHW,
                u_BC,
                (sample_nearest(conf_BHW, grid4) * CONF_STEPS).round(),
                keep=method.contrast.keep,
                kind="random" if setting == "III" else method.contrast.pool,
                keys_B=torch.tensor([derive(cfg.seed, "pool", step, i) for i in batch.ids], device=device),
            )
            terms["ucl"] = contrastive_loss(out.emb_BDhw, coarse_BHW, pool_Bhw, tau=method.contrast.tau)
            loss = loss + on * lam.lambda2 * terms["ucl"]
        if lam.lambda3 > 0:
            h, w = f4_BDhw.shape[-2:]
            grid_labels = sample_nearest(coarse_BHW, (h, w))
            eligible = grid_labels != IGNORE
            if pool_Bhw is not None:
                eligible = eligible & sample_nearest(pool_Bhw, (h, w))
            if (h, w) not in self.masks:
                self.masks[h, w] = radius_mask(h, w, u_cfg.radius, device)
            pair_labels = affinity_labels(grid_labels, eligible, self.masks[h, w])
            terms["aux"] = affinity_loss(out.affinity_BNN, pair_labels)
            loss = loss + on * lam.lambda3 * terms["aux"]
        terms["total"] = loss
        self.logged = {name: term.item() for name, term in terms.items()}
        return StepOutput(loss=loss, terms={name: term.detach() for name, term in terms.items()})
