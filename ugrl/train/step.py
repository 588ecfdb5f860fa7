"""One training step: a batch goes in, named losses come out.

It orders two halves: the targets, which have no gradient (:mod:`ugrl.method.targets`), and the losses
(:mod:`ugrl.method.objective`). Between them is the training pass, whose heads answer only where a loss reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ugrl.config import Config
from ugrl.method.cam import CamPass
from ugrl.method.objective import Objective
from ugrl.method.prototypes import Prototypes
from ugrl.method.refine import PAR
from ugrl.method.schedule import Schedule
from ugrl.method.targets import TargetMaker, Targets
from ugrl.model.backbone import Features
from ugrl.model.network import Encoded, UGRLNet
from ugrl.model.noise import Noise, sample_noise
from ugrl.train.cam_passes import TrainingPasses
from ugrl.types import IGNORE, Batch, Focus, ModelOutput, StepOutput


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


class Step:
    """The method's training step for one configuration (Table 3's settings and Full included).

    Args:
        cfg: Configuration of the run.
        net: Network, not wrapped by DDP.
        prototypes: Prototypes of the C classes; every step moves them.
        par: The refinement of ``method.cam.refine``, if there is one.
        objective: The losses; by default those of the configuration.
    """

    def __init__(
        self, cfg: Config, net: UGRLNet, prototypes: Prototypes, par: PAR | None, objective: Objective | None = None
    ) -> None:
        self.cfg, self.net = cfg, net
        self.schedule = Schedule.of(cfg)
        self.target_maker = TargetMaker(cfg, prototypes, par, stride=net.stride)
        self.objective = objective or Objective(cfg)

    def __call__(self, batch: Batch, step: int, *, model: nn.Module | None = None, views: bool = False) -> StepOutput:
        """Losses of one batch at one step; moves the prototypes.

        Args:
            batch: Samples of this rank, on the network's device.
            step: Number of the training step, counted from 0.
            model: The network as wrapped by DDP; the bare one by default.
            views: Whether to keep tensors for pictures.
        """
        # The targets come first, so that their passes do not share the memory with the training pass's activations.
        # Where the training pass is one of them, they are made between its encoder and its heads.
        made = [] if self.schedule.shares(step) else [self.targets(batch, step)]

        def focus(encoded: Encoded) -> Focus:
            if not made:
                made.append(self.targets(batch, step, encoded))
            return made[0].focus()

        out = (model or self.net)(
            batch.images_B3HW,
            noise=self.noise(batch, step),
            boxes=self.pool_boxes(batch),
            focus=focus,
            **self.schedule.heads(step),
        )
        return self.losses(batch, out, made[0], step, views=views)

    @torch.no_grad()
    def targets(self, batch: Batch, step: int, plain: Encoded | None = None) -> Targets:
        """The targets of a batch; moves the prototypes.

        The CAM's passes go through the bare network: no drop-path, no decoder, unless ``method.cam.mode`` is ``train``.

        Args:
            batch: Samples of this rank, on the network's device.
            step: Number of the training step, counted from 0.
            plain: What the encoder gave in the training pass, where that stands in for the plain CAM pass.
        """
        net, cam, at_once = self.net, self.cfg.method.cam, self.cfg.train.micro_batch
        aux = self.target_maker.wants_aux(step)
        training = TrainingPasses(
            net,
            lambda view: self.noise(batch, step, view),
            at_once=at_once,
            mirror=cam.mirror,
            moves=not self.schedule.warm(step),
        )

        heads = _Heads(self, batch)
        asked = self.cfg.method.uncertainty.decoder_weight > 0 and not self.schedule.warm(step)
        wanted = asked or self.schedule.decoder_share(step) > 0

        def forward(images: Tensor, view: CamPass) -> tuple[Tensor, Tensor, Tensor | None]:
            affinity = self.target_maker.wants_affinity(step, view)
            show = heads.show if wanted and view.plain else None
            if plain is not None and view.plain:
                if show:
                    show(plain.features)
                return net.cam_of(plain, affinity=affinity, aux=aux)
            if cam.mode == "train":
                return training(images, view, affinity=affinity, aux=aux, show=show)
            return net.cam(images, affinity=affinity, at_once=at_once, aux=aux, show=show)

        return self.target_maker(batch, step, forward, heads)

    def pool_boxes(self, batch: Batch) -> Tensor | None:
        """Boxes whose positions the class scores pool; ``None``: all positions of the crop."""
        return batch.boxes_B4 if self.cfg.model.pool_extent == "box" else None

    def noise(self, batch: Batch, step: int, view: CamPass | None = None) -> Noise | None:
        """What drop-path and dropout are decided by, or ``None`` where nothing is dropped.

        Args:
            batch: Its ids are read.
            step: Number of the training step, counted from 0.
            view: The CAM's pass that it is for; ``None``: the training pass.
        """
        if not self.cfg.train.stochastic:
            return None
        suffix = "" if view is None else f"/cam/{view.scale:g}/{'mirrored' if view.mirrored else 'plain'}"
        return sample_noise(
            self.cfg.seed,
            step,
            [id + suffix for id in batch.ids],
            layers=self.net.layers,
            channels=self.cfg.model.decoder_dim,
            device=batch.images_B3HW.device,
        )

    def losses(self, batch: Batch, out: ModelOutput, targets: Targets, step: int, *, views: bool = False) -> StepOutput:
        """The losses, given what the heads answered.

        Args:
            batch: Samples of this rank.
            out: Output of the heads that the schedule names.
            targets: Result of :meth:`targets`.
            step: Number of the training step, counted from 0.
            views: Whether to keep tensors for pictures.
        """
        loss, terms = self.objective(batch, out, targets)
        # Parameters without a role this step still take part, with a zero: DDP waits for all of them.
        loss = loss + self._idle(step)
        return StepOutput(
            loss=loss,
            terms={k: v.detach() for k, v in {**terms, "total": loss}.items()},
            stats={k: v.detach() for k, v in targets.stats.items()},
            views=_views(out, targets) if views else {},
        )

    def _idle(self, step: int) -> Tensor:
        """A zero that depends on the parameters that no loss of a step reads."""
        heads: dict[str, nn.Module] = {
            "decode": self.net.decoder,
            "embed": self.net.g_seg,
            "affinity": self.net.g_cls,
        }
        wanted = self.schedule.heads(step)
        return zero_of(*(head for name, head in heads.items() if not wanted[name]), self.net.classifier)


class _Heads:
    """What the heads say of a batch in the plain pass of the CAM, whose features it is shown."""

    def __init__(self, step: Step, batch: Batch) -> None:
        self.step, self.batch = step, batch
        self._probs: list[Tensor] = []

    def show(self, features: Features) -> None:
        self._probs.append(self.step.net.probabilities(features))

    def scores(self, f4_BDhw: Tensor) -> Tensor:
        height, width = self.batch.images_B3HW.shape[-2:]
        return self.step.net.scores(f4_BDhw, self.step.pool_boxes(self.batch), (int(height), int(width)))

    def probabilities(self) -> Tensor:
        return torch.cat(self._probs)


def _views(out: ModelOutput, targets: Targets) -> dict[str, Tensor]:
    """What pictures show of a step: CAM, and after the warm-up (pseudo-)labels, prediction and uncertainty."""
    views = {} if targets.cam_PHW is None else {"cam": targets.cam_PHW}
    labels_BHW, u_BC = targets.labels_BHW, targets.u_BC
    if labels_BHW is not None:
        assert out.seg_BChw is not None
        views["labels"] = labels_BHW
        views["prediction"] = out.seg_BChw.detach()
        if u_BC is not None:
            labelled = labels_BHW != IGNORE
            u_BHW = targets.u_BHW
            if u_BHW is None:
                u_BHW = torch.gather(u_BC, 1, labels_BHW.where(labelled, 0).flatten(1)).view_as(labels_BHW)
            views["u"] = u_BHW.where(labelled, torch.zeros(()).to(u_BC))
    return views
