"""What the losses of a step are told: the half of the step that has no gradient.

The order: CAM → class vectors → uncertainty (and the prototypes move) → weights of the tags → pseudo-labels → their
weights → reliable pool → the positions that the affinity loss may pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ugrl.config import Config
from ugrl.distributed import all_reduce_sum, world_size
from ugrl.errors import DataError
from ugrl.grid import inside_pixels, sample_nearest, whole_boxes
from ugrl.method.cam import CamOutput, CamPass, Forward, multi_scale_cam
from ugrl.method.class_vectors import batch_vectors
from ugrl.method.doubts import Heads, pair_doubts
from ugrl.method.losses import eligible_tokens
from ugrl.method.per_position import judge_pixels, label_maps
from ugrl.method.pool import pool_bound, positions, reliable_pool
from ugrl.method.prototypes import Prototypes
from ugrl.method.pseudo import propagate_cam, pseudo_labels
from ugrl.method.published import walk_of, walked_labels
from ugrl.method.refine import PAR, refine_labels
from ugrl.method.schedule import FULL, Schedule
from ugrl.method.teacher import agreed_labels, teacher_labels
from ugrl.method.weighting import effective_share, modulation_weights, pixel_weights
from ugrl.seeding import derive
from ugrl.types import IGNORE, Batch, Focus

# Confidences are compared in steps of this size. Those that differ by rounding alone are ties then, and the hash of
# the image decides. Otherwise the way a batch is split over ranks would.
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


@dataclass(slots=True)
class Targets:
    """What the losses are told; ``None`` where this step has no use for it.

    Attributes:
        w_BF: Weights of the tags in the classification loss.
        cam_PHW: Normalised CAM of each pair, in [0, 1).
        u_BC: Uncertainty of each image and class, in [0, 2].
        labels_BHW: Pseudo-labels, or the masks with the setting Full, int64: 0 background, 1…F classes, 255 ignored.
        w_BC: Weights of the pixels of each class in the segmentation loss.
        u_BHW: Uncertainty of each pixel's label, 0 where unknown (``method.uncertainty.level: pixel``).
        w_BHW: Weights of the pixels in the segmentation loss, in the place of ``w_BC``.
        small_Bhw: The pseudo-labels on F1's grid.
        pool_Bhw: bool, the reliable pool on F1's grid.
        embed_Bn: Positions of the pool, and some others where an image has fewer than the most.
        coarse_Bhw: Pseudo-labels on F4's grid.
        eligible_Bhw: bool, the positions that the affinity loss may pair.
        affinity_Bn: Those positions, where the host knows their number.
        stats: Named scalars worth logging.
    """

    w_BF: Tensor
    cam_PHW: Tensor | None = None
    u_BC: Tensor | None = None
    labels_BHW: Tensor | None = None
    w_BC: Tensor | None = None
    u_BHW: Tensor | None = None
    w_BHW: Tensor | None = None
    small_Bhw: Tensor | None = None
    pool_Bhw: Tensor | None = None
    embed_Bn: Tensor | None = None
    coarse_Bhw: Tensor | None = None
    eligible_Bhw: Tensor | None = None
    affinity_Bn: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)

    def focus(self) -> Focus:
        """Where the losses will read the heads."""
        return Focus(self.embed_Bn, self.affinity_Bn)


def _share(x: Tensor, where: Tensor) -> Tensor:
    """This rank's part of the global mean of ``x`` where ``where``; the mean over ranks is the mean."""
    count = all_reduce_sum(where.to(x).sum())
    return (x * where).sum() * world_size() / count.clamp_min(1)


class TargetMaker:
    """Makes the targets of a batch. The prototypes are its only state, and they move after they were read.

    Args:
        cfg: Configuration of the run.
        prototypes: Prototypes of the C classes.
        par: The refinement of ``method.cam.refine``, if there is one.
        stride: Pixels of the image per cell of F1.

    Attributes:
        counts_on_host: Whether the host may wait to learn how large the pool is, to cut the heads' work to it; by
            default (``None``) on a CPU, where it costs nothing. Elsewhere an upper bound serves, for the same losses.
    """

    def __init__(self, cfg: Config, prototypes: Prototypes, par: PAR | None, *, stride: float) -> None:
        self.cfg, self.prototypes, self.par, self.stride = cfg, prototypes, par, stride
        self.schedule = Schedule.of(cfg)
        self.counts_on_host: bool | None = None

    def wants_affinity(self, step: int, view: CamPass) -> bool:
        """Whether a pass of a step's CAM must give the affinity."""
        schedule = self.schedule
        if view.plain and schedule.uses_affinity and not schedule.warm(step):
            return True
        return schedule.propagates(step) and (view.largest if schedule.as_afa else view.plain)

    def wants_aux(self, step: int) -> bool:
        """Whether a step's CAM passes must give the auxiliary classifier's maps behind the others."""
        return self.schedule.aux_labels and not self.schedule.warm(step)

    @torch.no_grad()
    def __call__(self, batch: Batch, step: int, forward: Forward, heads: Heads) -> Targets:
        """The targets of a batch; moves the prototypes.

        Args:
            batch: Samples of this rank, on the network's device.
            step: Number of the training step, counted from 0.
            forward: The CAM's passes; of the plain one the affinity is read where :meth:`wants_affinity` says so, and
                all have 2F raw maps where :meth:`wants_aux` does.
            heads: What they say of the batch.
        """
        schedule = self.schedule
        if schedule.supervised:
            return self._from_masks(batch, step)
        warm = schedule.warm(step)
        if step == schedule.warmup:
            self.prototypes.freeze()
        cam = self.cam(batch, step, forward)
        # What a position is like is judged by the prototypes that judge its image: those before this batch.
        r_BCD, present_BC = batch_vectors(
            batch, cam, radius=self.cfg.method.uncertainty.radius, local=schedule.uses_affinity and not warm
        )
        doubts = pair_doubts(self.cfg.method.uncertainty, heads, cam, batch, warm=warm)
        u_BC, known_BC = self.prototypes.uncertainty(r_BCD, present_BC, doubts)
        out = Targets(torch.ones_like(u_BC[:, 1:]), cam.cam_PHW, u_BC)
        told = cam if warm else self.told(batch, cam, present_BC, heads, step)
        self._fill(out, batch, step, cam, told, (u_BC, known_BC, present_BC), heads)
        if self.cfg.method.uncertainty.votes == "position":
            labels_BN = self._votes(batch, told.cam_PHW, cam.f4_BDhw)
            self.prototypes.update(r_BCD, present_BC, cam.f4_BDhw.flatten(2), labels_BN, doubts)
        else:
            self.prototypes.update(r_BCD, present_BC, doubts=doubts)
        return out

    def _votes(self, batch: Batch, maps_PHW: Tensor, f4_BDhw: Tensor) -> Tensor:
        """The class that each position of F4 votes for (B, N): by the thresholds of the pseudo-labels, without PAR."""
        c, grid = self.cfg.method.cam, (int(f4_BDhw.shape[-2]), int(f4_BDhw.shape[-1]))
        labels_BHW, _ = pseudo_labels(
            maps_PHW, batch.pairs_P2, batch.boxes_B4, batch=len(batch.ids), high=c.high, low=c.low
        )
        return sample_nearest(labels_BHW, grid).flatten(1)

    def _fill(
        self,
        out: Targets,
        batch: Batch,
        step: int,
        cam: CamOutput,
        told: CamOutput,
        judged: tuple[Tensor, Tensor, Tensor],
        heads: Heads,
    ) -> None:
        """All targets that follow from the maps of labels and the u of the pairs: which are known, which present."""
        schedule, (u_BC, known_BC, present_BC) = self.schedule, judged
        out.stats["u_fg"] = _share(u_BC[:, 1:], known_BC[:, 1:])
        out.stats["u_bg"] = _share(u_BC[:, :1], known_BC[:, :1])
        if schedule.warm(step):
            return
        if schedule.weighs_cls:
            n_BF = batch.tags_BF.to(u_BC)
            out.w_BF = self._weights(u_BC[:, 1:], known_BC[:, 1:], n_BF, per_class=False)
            out.stats["share_cls"] = effective_share(out.w_BF, known_BC[:, 1:], n_BF)
        labels_BHW, conf_BHW = self.pseudo(batch, told.cam_PHW, u_BC, known_BC)
        pairs_BHW = labels_BHW
        if schedule.as_afa and schedule.propagates(step):
            labels_BHW, conf_BHW = self.walked(batch, told)
        out.labels_BHW = labels_BHW
        n_BC = pixel_counts(labels_BHW, u_BC.shape[1]).to(u_BC)
        out.stats["labelled"] = n_BC.sum() / labels_BHW.numel()
        out.w_BC = torch.ones_like(u_BC)
        if self.cfg.method.uncertainty.level == "pixel" and (schedule.weighs_seg or schedule.contrasts):
            self._judge_pixels(out, cam.f4_BDhw, batch, present_BC, conf_BHW, heads)
        elif schedule.weighs_seg:
            out.w_BC = self._weights(u_BC, known_BC, n_BC, per_class=True)
            out.stats["share_seg"] = effective_share(out.w_BC, known_BC, n_BC, per_class=True)
        counts = u_BC.device.type == "cpu" if self.counts_on_host is None else self.counts_on_host
        if schedule.contrasts:
            self._choose_pool(out, batch, step, u_BC, labels_BHW, conf_BHW, counts)
        if schedule.uses_affinity:
            grid = (cam.f4_BDhw.shape[-2], cam.f4_BDhw.shape[-1])
            self._choose_pairs(out, self._pair_labels(out, pairs_BHW, batch, cam), grid, counts)

    def _from_masks(self, batch: Batch, step: int) -> Targets:
        """The masks are the labels, and every weight is 1: no CAM, no uncertainty, prototypes that stay."""
        if batch.masks_BHW is None:
            raise DataError(
                f"step {step + 1}: an image among {', '.join(batch.ids)} has no mask; method.setting={FULL} needs the "
                "mask of every training image"
            )
        labels_BHW = batch.masks_BHW.long()
        w_BC = batch.images_B3HW.new_ones(len(batch.ids), batch.tags_BF.shape[1] + 1)
        out = Targets(torch.ones_like(batch.tags_BF), labels_BHW=labels_BHW, w_BC=w_BC)
        out.stats["labelled"] = (labels_BHW != IGNORE).to(w_BC).mean()
        return out

    def cam(self, batch: Batch, step: int, forward: Forward) -> CamOutput:
        """CAM of the present pairs, by either classifier."""
        c, warm, boxes_B4 = self.cfg.method.cam, self.schedule.warm(step), self._extent(batch)
        pairs, count = batch.pairs_P2, len(batch.pairs_P2)
        if self.wants_aux(step):
            pairs = torch.cat([pairs, pairs + torch.tensor([0, batch.tags_BF.shape[1]])])
        out = multi_scale_cam(
            forward,
            batch.images_B3HW,
            pairs,
            boxes_B4,
            # During the warm-up nothing but the prototypes reads the CAM: one scale is enough for them.
            scales=(1.0,) if warm else c.scales,
            mirror=c.mirror and not (warm and c.share == "warmup"),
        )
        if self.wants_aux(step):
            out = replace(out, cam_PHW=out.cam_PHW[:count], aux_PHW=out.cam_PHW[count:])
        if self.schedule.propagates(step) and not self.schedule.as_afa and out.affinity_BNN is not None:
            cam_PHW = propagate_cam(
                out.cam_PHW,
                batch.pairs_P2,
                out.affinity_BNN,
                boxes_B4,
                grid=(out.f4_BDhw.shape[-2], out.f4_BDhw.shape[-1]),
                radius=self.cfg.method.uncertainty.radius,
            )
            out = replace(out, cam_PHW=cam_PHW)
        return out

    def told(self, batch: Batch, cam: CamOutput, present_BC: Tensor, heads: Heads, done: int) -> CamOutput:
        """The CAM with the maps that labels are made of, once so many steps are done."""
        return replace(cam, cam_PHW=label_maps(self.cfg, cam, batch, self.prototypes, present_BC, heads, done))

    def _judge_pixels(
        self, out: Targets, f4_BDhw: Tensor, batch: Batch, present_BC: Tensor, conf_BHW: Tensor, heads: Heads
    ) -> None:
        """The u of each pixel's label and, where the segmentation loss is weighed, its weight."""
        assert out.labels_BHW is not None
        u, mixture = self.cfg.method.uncertainty, self.prototypes.calibration.pixels
        labelled = out.labels_BHW, conf_BHW
        judged = judge_pixels(self.cfg, self.prototypes, heads, f4_BDhw, labelled, batch.pairs_P2, present_BC)
        known_BHW, out.u_BHW = judged[1], mixture(*judged)
        mixture.update(*judged)
        labelled_BHW = out.labels_BHW != IGNORE
        for name, where in (("u_px_fg", out.labels_BHW > 0), ("u_px_bg", out.labels_BHW == 0)):
            out.stats[name] = _share(out.u_BHW, known_BHW & labelled_BHW & where)
        if self.schedule.weighs_seg:
            out.w_BHW, out.stats["share_seg"] = pixel_weights(
                out.u_BHW,
                known_BHW,
                out.labels_BHW,
                present_BC.shape[1],
                strength=u.beta,
                kind=u.weighting,
                u_min=u.u_min,
                bound=u.bound,
            )

    def pseudo(self, batch: Batch, cam_PHW: Tensor, u_BC: Tensor, known_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels by ``method.pseudo.source``, and their confidence; as :meth:`labels`."""
        c = self.cfg.method.pseudo
        if c.source == "teacher":
            return teacher_labels(batch, cam_PHW)
        found = self.labels(batch, cam_PHW)
        return agreed_labels(batch, *found, u_BC, known_BC, u_max=c.u_max) if c.source == "agree" else found

    def labels(self, batch: Batch, cam_PHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels (B, H, W) and the confidence of each: distance to the deciding threshold."""
        c, b, boxes_B4 = self.cfg.method.cam, len(batch.ids), self._extent(batch)
        if self.par is None:
            return pseudo_labels(cam_PHW, batch.pairs_P2, batch.boxes_B4, batch=b, high=c.high, low=c.low)
        images = batch.images_B3HW
        labels_BHW, conf_BHW = refine_labels(
            cam_PHW, batch.pairs_P2, boxes_B4, images, batch=b, par=self.par, high=c.high, low=c.low
        )
        if boxes_B4 is not batch.boxes_B4:
            size = (int(images.shape[-2]), int(images.shape[-1]))
            outside_BHW = ~inside_pixels(batch.boxes_B4, size, labels_BHW.device)
            labels_BHW.masked_fill_(outside_BHW, IGNORE)
            conf_BHW.masked_fill_(outside_BHW, 0.0)
        return labels_BHW, conf_BHW

    def walked(self, batch: Batch, cam: CamOutput) -> tuple[Tensor, Tensor]:
        """AFA's labels of the segmentation loss, once the CAM is propagated; as :meth:`labels`."""
        c = self.cfg.method.cam
        assert self.par is not None and cam.largest_BNN is not None
        walk_BNN = walk_of(cam.largest_BNN, cam.largest_grid, self.cfg.method.uncertainty.radius)
        return walked_labels(
            cam.cam_PHW,
            batch.pairs_P2,
            batch.boxes_B4,
            batch.images_B3HW,
            walk_BNN,
            cam.largest_grid,
            par=self.par,
            high=c.high,
            low=c.low,
        )

    def _extent(self, batch: Batch) -> Tensor:
        """Boxes within which the CAM is normalised, propagated and refined."""
        if self.cfg.method.cam.extent == "box":
            return batch.boxes_B4
        return whole_boxes(batch.boxes_B4, (int(batch.images_B3HW.shape[-2]), int(batch.images_B3HW.shape[-1])))

    def _weights(self, u_BC: Tensor, known_BC: Tensor, n_BC: Tensor, *, per_class: bool) -> Tensor:
        u = self.cfg.method.uncertainty
        return modulation_weights(
            u_BC,
            known_BC,
            n_BC,
            strength=u.beta if per_class else u.alpha,
            kind=u.weighting,
            per_class=per_class,
            u_min=u.u_min,
            bound=u.bound,
        )

    def _choose_pool(
        self,
        out: Targets,
        batch: Batch,
        step: int,
        u_BC: Tensor,
        labels_BHW: Tensor,
        conf_BHW: Tensor,
        counts: bool,
    ) -> None:
        """The pixels that the contrastive loss reads, on F1's grid."""
        k = self.cfg.method.contrast
        height, width = batch.images_B3HW.shape[-2:]
        grid = (int((height - 1) // self.stride) + 1, int((width - 1) // self.stride) + 1)
        out.small_Bhw = sample_nearest(labels_BHW, grid)
        keys = torch.tensor([derive(self.cfg.seed, "pool", step, i) for i in batch.ids])
        out.pool_Bhw = reliable_pool(
            out.small_Bhw,
            u_BC,
            (sample_nearest(conf_BHW, grid) * CONF_STEPS).round(),
            keep=k.keep,
            kind="random" if self.cfg.method.setting == "III" else k.pool,
            keys_B=keys.to(u_BC.device, non_blocking=True),
            u_Bhw=None if out.u_BHW is None else (sample_nearest(out.u_BHW, grid) * CONF_STEPS).round(),
        )
        most = pool_bound(out.small_Bhw[0].numel(), u_BC.shape[1], k.keep)
        if counts:
            most = max(1, int(out.pool_Bhw.flatten(1).sum(1).max()))
        out.embed_Bn = positions(out.pool_Bhw, most)
        out.stats["pool"] = out.pool_Bhw.to(u_BC).mean()

    def _pair_labels(self, out: Targets, labels_BHW: Tensor, batch: Batch, cam: CamOutput) -> Tensor:
        """The labels, on any grid, that say which pairs of cells belong together.

        Those of the auxiliary CAM are cut from it by the thresholds alone, as ToCo does: no PAR.
        """
        if cam.aux_PHW is not None:
            c = self.cfg.method.cam
            return pseudo_labels(
                cam.aux_PHW, batch.pairs_P2, batch.boxes_B4, batch=len(batch.ids), high=c.high, low=c.low
            )[0]
        if out.small_Bhw is None:
            return labels_BHW
        # Every coarser label is a sample of the next finer one, as its pool membership is. Those that AFA's walk made
        # are for L_seg and the pool alone.
        if labels_BHW is out.labels_BHW:
            return out.small_Bhw
        return sample_nearest(labels_BHW, (out.small_Bhw.shape[-2], out.small_Bhw.shape[-1]))

    def _choose_pairs(self, out: Targets, labels_Bhw: Tensor, grid: tuple[int, int], counts: bool) -> None:
        """The cells of F4 that the affinity loss may pair: in the pool, where there is one."""
        corner = self.cfg.method.loss.affinity_labels == "corner"
        out.coarse_Bhw = sample_nearest(labels_Bhw, grid, corner=corner)
        out.eligible_Bhw = out.coarse_Bhw != IGNORE
        if out.pool_Bhw is not None:
            out.eligible_Bhw = out.eligible_Bhw & sample_nearest(out.pool_Bhw, grid, corner=corner)
        if counts:
            out.affinity_Bn = eligible_tokens(out.coarse_Bhw, out.eligible_Bhw)
