"""One training step: a batch goes in, named losses come out.

The walk of a batch: CAM (no gradient) → class vectors → uncertainty → pseudo-labels → reliable pool → the
training pass, whose heads answer only where a loss will read them → weights made of the uncertainty → four
losses → their weighted sum (Eq. 13). The prototypes are the only state, and they move after they were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ugrl.config import Config
from ugrl.distributed import all_reduce_sum, world_size
from ugrl.grid import sample_nearest
from ugrl.method.cam import CamOutput, CamPass, multi_scale_cam
from ugrl.method.contrast import contrastive_loss
from ugrl.method.losses import (
    affinity_loss,
    classification_loss,
    eligible_tokens,
    segmentation_loss,
)
from ugrl.method.pool import MIN_PER_CLASS, reliable_pool
from ugrl.method.prototypes import Prototypes
from ugrl.method.pseudo import propagate_cam, pseudo_labels
from ugrl.method.refine import PAR, refine_labels
from ugrl.method.vectors import batch_vectors
from ugrl.method.weighting import effective_share, modulation_weights
from ugrl.model.network import Pairs, UGRLNet
from ugrl.model.noise import Noise, sample_noise
from ugrl.seeding import derive
from ugrl.types import IGNORE, Batch, Focus, ModelOutput, StepOutput

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


def pool_bound(cells: int, classes: int, keep: float) -> int:
    """The most pixels that an image's pool can hold, known without looking: K's share, or two of every class.

    >>> pool_bound(16384, 21, 0.35), pool_bound(16, 21, 0.1)
    (5734, 16)
    """
    return min(cells, max(1, int(keep * cells + 0.5), MIN_PER_CLASS * classes))


def positions(mask_Bhw: Tensor, most: int) -> Tensor:
    """Where a mask is set: int64 (B, most), ascending; a shorter row goes on with positions where it is not.

    >>> positions(torch.tensor([[[False, True], [True, True]], [[True, False], [False, False]]]), 3).tolist()
    [[1, 2, 3], [0, 1, 2]]
    """
    return (~mask_Bhw.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


def chosen(mask_Bhw: Tensor, at_Bn: Tensor) -> Tensor:
    """The mask at some positions, bool (B, n)."""
    return mask_Bhw.flatten(1).gather(1, at_Bn)


class _Zero(torch.autograd.Function):
    """A zero to which every given parameter belongs, with gradient zero; nothing of them is read."""

    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> Tensor:
        ctx.params = params
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(p) for p in ctx.params)


def zero_of(*modules: nn.Module) -> Tensor:
    """A zero to which every parameter of some modules belongs."""
    zero: Tensor = _Zero.apply(*(p for module in modules for p in module.parameters()))
    return zero


@dataclass(slots=True)
class Targets:
    """What the losses are told, without gradients; ``None`` where this step has no use for it.

    Attributes:
        cam_PHW: Normalised maps.
        u_BC: Uncertainty.
        known_BC: bool, which entries have one.
        labels_BHW: Pseudo-labels.
        small_Bhw: The same on F1's grid.
        pool_Bhw: bool, the reliable pool on F1's grid.
        embed_Bn: Positions of the pool, and some others where an image has fewer than the most.
        coarse_Bhw: Pseudo-labels on F4's grid.
        eligible_Bhw: bool, the positions that the affinity loss may pair.
        affinity_Bn: Those positions, where the host knows their number.
    """

    cam_PHW: Tensor
    u_BC: Tensor
    known_BC: Tensor
    labels_BHW: Tensor | None = None
    small_Bhw: Tensor | None = None
    pool_Bhw: Tensor | None = None
    embed_Bn: Tensor | None = None
    coarse_Bhw: Tensor | None = None
    eligible_Bhw: Tensor | None = None
    affinity_Bn: Tensor | None = None

    def focus(self) -> Focus:
        """Where the losses will read the heads."""
        return Focus(self.embed_Bn, self.affinity_Bn)


def _share(x: Tensor, where: Tensor) -> Tensor:
    """This rank's part of the global mean of ``x`` where ``where``; the mean over ranks is the mean."""
    count = all_reduce_sum(where.to(x).sum())
    return (x * where).sum() * world_size() / count.clamp_min(1)


class Step:
    """The method's training step for one configuration (Table 3's settings included).

    Attributes:
        counts_on_host: Whether the host may wait to learn how large the pool is, to cut the heads' work to it; by
            default (``None``) on a CPU, where it costs nothing. Elsewhere an upper bound serves, for the same losses.
    """

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
        self.warmup = cfg.train.at(cfg.train.cls_warmup_iters)
        self.counts_on_host: bool | None = None

    def cam(
        self,
        batch: Batch,
        scales: tuple[float, ...],
        *,
        propagate: bool,
        mirror: bool,
        affinity: bool,
        plain: tuple[Tensor, Pairs] | None,
    ) -> CamOutput:
        """CAM of the present pairs, from the bare network: no drop-path, no decoder.

        Args:
            batch: This rank's samples.
            scales: Of the images.
            propagate: Whether the CAM walks along the affinity.
            mirror: Whether mirror images take part.
            affinity: Whether somebody reads the affinity.
            plain: F4, queries and keys of the plain images, where they are known already.
        """

        def forward(images: Tensor, view: CamPass) -> tuple[Tensor, Tensor, Tensor | None]:
            if plain is None or not view.plain:
                return self.net.cam(images, affinity=view.plain and affinity, at_once=self.cfg.train.micro_batch)
            f4_BDhw, pairs = plain
            return (
                self.net.raw_from(f4_BDhw),
                f4_BDhw,
                self.net.g_cls.from_pairs(pairs, self.net.heads) if affinity else None,
            )

        out = multi_scale_cam(forward, batch.images_B3HW, batch.pairs_P2, batch.boxes_B4, scales=scales, mirror=mirror)
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

    def shares(self, step: int) -> bool:
        """Whether the training pass stands in for the plain CAM pass at a step (``method.cam.share``)."""
        share = self.cfg.method.cam.share
        if share == "exact":  # nothing is dropped: the two passes are one
            return not self.cfg.train.stochastic or self.cfg.model.drop_path == 0
        return share == "always" or (share == "warmup" and step < self.warmup)

    @torch.no_grad()
    def targets(self, batch: Batch, step: int, plain: tuple[Tensor, Pairs] | None = None) -> Targets:
        """Everything that has no gradient: CAM, uncertainty, pseudo-labels, pool. Moves the prototypes.

        Args:
            batch: This rank's samples, on the network's device.
            step: Counted from 0.
            plain: F4, queries and keys of the training pass, where it stands in for the plain CAM pass.
        """
        cfg, method = self.cfg, self.cfg.method
        c, u_cfg, k_cfg = method.cam, method.uncertainty, method.contrast
        warm = step < self.warmup
        if step == self.warmup:
            self.prototypes.freeze()
        propagate = c.propagate == "affinity" and step >= max(cfg.train.at(c.propagate_after), self.warmup)
        local = self.uses_affinity and not warm
        cam = self.cam(
            batch,
            # During the warm-up nothing but the prototypes reads the CAM: one scale is enough for them.
            (1.0,) if warm else c.scales,
            propagate=propagate,
            mirror=c.mirror and not (warm and c.share == "warmup"),
            affinity=local or propagate,
            plain=plain,
        )
        r_BCD, present_BC = batch_vectors(batch, cam, radius=u_cfg.radius, local=local)
        u_BC, known_BC = self.prototypes.uncertainty(r_BCD, present_BC)
        self.prototypes.update(r_BCD, present_BC)
        out = Targets(cam.cam_PHW, u_BC, known_BC)
        if warm:
            return out
        counts = u_BC.device.type == "cpu" if self.counts_on_host is None else self.counts_on_host

        out.labels_BHW, conf_BHW = self.labels(batch, cam.cam_PHW)
        # Every coarser label is a sample of the next finer one, as its pool membership is.
        coarse_of = out.labels_BHW
        first = self.net.encoder.spec.strides[0]
        if self.contrasts:
            height, width = batch.images_B3HW.shape[-2:]
            grid4 = ((height - 1) // first + 1, (width - 1) // first + 1)
            out.small_Bhw = coarse_of = sample_nearest(out.labels_BHW, grid4)
            keys = torch.tensor([derive(cfg.seed, "pool", step, i) for i in batch.ids]).to(
                u_BC.device, non_blocking=True
            )
            out.pool_Bhw = reliable_pool(
                out.small_Bhw,
                u_BC,
                # In steps: confidences that differ by rounding alone are ties, and the hash decides
                # them; otherwise the batch's split over ranks would.
                (sample_nearest(conf_BHW, grid4) * CONF_STEPS).round(),
                keep=k_cfg.keep,
                kind="random" if method.setting == "III" else k_cfg.pool,
                keys_B=keys,
            )
            most = pool_bound(out.small_Bhw[0].numel(), u_BC.shape[1], k_cfg.keep)
            if counts:
                most = max(1, int(out.pool_Bhw.flatten(1).sum(1).max()))
            out.embed_Bn = positions(out.pool_Bhw, most)
        if self.uses_affinity:
            grid = (cam.f4_BDhw.shape[-2], cam.f4_BDhw.shape[-1])
            out.coarse_Bhw = sample_nearest(coarse_of, grid)
            out.eligible_Bhw = out.coarse_Bhw != IGNORE
            if out.pool_Bhw is not None:
                out.eligible_Bhw = out.eligible_Bhw & sample_nearest(out.pool_Bhw, grid)
            if counts:
                out.affinity_Bn = eligible_tokens(out.coarse_Bhw, out.eligible_Bhw)
        return out

    def noise(self, batch: Batch, step: int) -> Noise | None:
        """What drop-path and dropout are decided by, or ``None`` where nothing is dropped."""
        if not self.cfg.train.stochastic:
            return None
        return sample_noise(
            self.cfg.seed,
            step,
            batch.ids,
            layers=self.net.layers,
            channels=self.cfg.model.decoder_dim,
            device=batch.images_B3HW.device,
        )

    def wants(self, step: int) -> dict[str, bool]:
        """Which heads a step's losses read."""
        warm = step < self.warmup
        return {
            "decode": not warm,
            "affinity": self.uses_affinity and not warm,
            "embed": self.contrasts and not warm,
        }

    def __call__(self, batch: Batch, step: int, *, model: nn.Module | None = None, views: bool = False) -> StepOutput:
        """Losses of one batch at one step; moves the prototypes.

        Args:
            batch: This rank's samples, on the network's device.
            step: Counted from 0.
            model: The network as wrapped by DDP; the bare one by default.
            views: Whether to keep tensors for pictures.
        """
        # The targets come first, so that their passes do not share the memory with the training pass's activations;
        # where the training pass is one of them, they are made between its encoder and its heads.
        made = [] if self.shares(step) else [self.targets(batch, step)]

        def focus(f4_BDhw: Tensor, pairs: Pairs) -> Focus:
            if not made:
                made.append(self.targets(batch, step, (f4_BDhw, pairs)))
            return made[0].focus()

        out = (model or self.net)(
            batch.images_B3HW,
            noise=self.noise(batch, step),
            boxes=batch.boxes_B4,
            focus=focus,
            **self.wants(step),
        )
        return self.losses(batch, out, made[0], step, views=views)

    def contrast(self, emb_BDhw: Tensor, labels_Bhw: Tensor, pool_Bhw: Tensor) -> Tensor:
        """The contrastive loss as configured."""
        c = self.cfg.method.contrast
        return contrastive_loss(emb_BDhw, labels_Bhw, pool_Bhw, tau=c.tau, scope=c.scope, tile=c.tile)

    def losses(self, batch: Batch, out: ModelOutput, t: Targets, step: int, *, views: bool = False) -> StepOutput:
        """The weighted sum of the losses (Eq. 13) and its terms, given what the heads answered.

        Args:
            batch: This rank's samples.
            out: Of the heads that :meth:`wants` names.
            t: Of :meth:`targets`.
            step: Counted from 0.
            views: Whether to keep tensors for pictures.
        """
        method = self.cfg.method
        u_cfg, lam = method.uncertainty, method.loss
        num_classes = batch.tags_BF.shape[1] + 1
        warm = step < self.warmup
        u_BC, known_BC = t.u_BC, t.known_BC

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
        if t.labels_BHW is not None:
            n_BC = pixel_counts(t.labels_BHW, num_classes).to(u_BC)
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
            terms["seg"] = segmentation_loss(out.seg_BChw, t.labels_BHW, w_BC, balance=lam.balance)
            loss = loss + lam.lambda1 * terms["seg"]
            stats["labelled"] = n_BC.sum() / t.labels_BHW.numel()

            if t.embed_Bn is not None:
                assert out.emb_BDhw is not None and t.small_Bhw is not None and t.pool_Bhw is not None
                terms["ucl"] = self.contrast(
                    out.emb_BDhw,
                    t.small_Bhw.flatten(1).gather(1, t.embed_Bn)[:, None],
                    chosen(t.pool_Bhw, t.embed_Bn)[:, None],
                )
                loss = loss + lam.lambda2 * terms["ucl"]
                stats["pool"] = t.pool_Bhw.to(u_BC).mean()

            if t.coarse_Bhw is not None:
                assert out.affinity_BNN is not None and t.eligible_Bhw is not None
                terms["aux"] = affinity_loss(
                    out.affinity_BNN, t.coarse_Bhw, t.eligible_Bhw, radius=u_cfg.radius, tokens_Bn=t.affinity_Bn
                )
                loss = loss + lam.lambda3 * terms["aux"]

            if views:
                assert out.seg_BChw is not None
                labelled = t.labels_BHW != IGNORE
                u_pixel = torch.gather(u_BC, 1, t.labels_BHW.where(labelled, 0).flatten(1)).view_as(t.labels_BHW)
                keep["labels"] = t.labels_BHW
                keep["prediction"] = out.seg_BChw.detach()
                keep["u"] = u_pixel.where(labelled, torch.zeros(()).to(u_BC))
        if views:
            keep["cam"] = t.cam_PHW

        # Parameters without a role this step still take part, with a zero: DDP waits for all of them.
        loss = loss + self.idle(step)
        terms["total"] = loss
        return StepOutput(
            loss=loss,
            terms={k: v.detach() for k, v in terms.items()},
            stats={k: v.detach() for k, v in stats.items()},
            views=keep,
        )

    def idle(self, step: int) -> Tensor:
        """A zero that depends on the parameters that no loss of a step reads."""
        wants = self.wants(step)
        heads: list[nn.Module] = []
        if not wants["decode"]:
            heads.append(self.net.decoder)
        if not wants["embed"]:
            heads.append(self.net.g_seg)
        if not wants["affinity"]:
            heads.append(self.net.g_cls)
        return zero_of(*heads, self.net.classifier)
