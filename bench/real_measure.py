"""One arm of ``bench.real``, in a process of its own: train it to the end, then measure what it is worth.

    python -m bench.real_measure ARM.yaml --shards DIR --run DIR --result FILE --progress FILE

What is measured is a function of the last checkpoint and of the section ``eval`` of the configuration. Background
thresholds are chosen on ``train`` and then used on ``val``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ugrl import config as configs
from ugrl.config import Config, EvalConfig
from ugrl.data.reader import ShardReader
from ugrl.device import resolve
from ugrl.eval.collectors import cam_labels, segmentation_labels
from ugrl.eval.combine import combined_scores
from ugrl.eval.curve import ThresholdCurve
from ugrl.eval.metrics import Confusion, TagMetrics, UncertaintyMetrics, weighted_auroc
from ugrl.eval.passes import BatchPasses, shape_batches
from ugrl.files import write_whole
from ugrl.method.class_vectors import batch_vectors
from ugrl.method.pseudo import pseudo_labels
from ugrl.method.refine import PAR, refined_at
from ugrl.method.schedule import Schedule
from ugrl.ownership import STALE_S, owned
from ugrl.storage import place
from ugrl.train import checkpoint
from ugrl.train.build import build_par
from ugrl.train.restore import Restored, restore
from ugrl.types import IGNORE

# Background scores at which the refined CAM is tried.
REFINED_AT = (0.25, 0.35, 0.45, 0.55)
# Confidences are counted in so many bins.
BINS = 4096
# Tells results of another way of measuring from those of this one.
VERSION = 1


# -- counts of a split ------------------------------------------------------------------------


class PairScores:
    """u, p and CAM IoU of each (image, class) pair; the IoU at each threshold of a grid."""

    def __init__(self, thresholds: tuple[float, ...]) -> None:
        self.thresholds = thresholds
        self._u: list[Tensor] = []
        self._p: list[Tensor] = []
        self._iou: list[Tensor] = []

    def add(self, seen: BatchPasses, u_BC: Tensor, known_BC: Tensor) -> None:
        """Count the pairs of a batch."""
        pb, pf = seen.batch.pairs_P2.unbind(1)
        bins, cam = len(self.thresholds) + 1, seen.cam.cam_PHW
        label_PHW = seen.labels_BHW[pb]
        truth = label_PHW == (pf + 1)[:, None, None]
        below = torch.bucketize(cam, torch.tensor(self.thresholds, dtype=cam.dtype))
        cell = (torch.arange(len(pb))[:, None, None] * 2 + truth) * bins + below
        count = torch.bincount(cell[label_PHW != IGNORE], minlength=2 * bins * len(pb)).view(len(pb), 2, bins)
        above = count.flip(2).cumsum(2).flip(2)[:, :, 1:]  # pixels above each threshold
        union = count[:, 1].sum(1, keepdim=True) + above[:, 0]
        self._iou.append((above[:, 1] / union.double()).where(union > 0, torch.nan))
        self._u.append(u_BC[pb, pf + 1].double().where(known_BC[pb, pf + 1], torch.nan))
        self._p.append(seen.probs_BF[pb, pf].double())

    def aurocs(self, threshold: float) -> dict[str, float]:
        """How well u and 1 - p tell the pairs whose CAM IoU is below the median; without any u, 1 - p alone."""
        u, p, iou = torch.cat(self._u), torch.cat(self._p), torch.cat(self._iou)
        has_u = not bool(u.isnan().all())
        found = UncertaintyMetrics()
        found.add(u if has_u else torch.zeros_like(u), iou[:, self.thresholds.index(threshold)], p)
        scores = found.compute()
        return {"u": scores["u_auroc"] if has_u else math.nan, "p": scores["p_auroc"]}


class LabelScores:
    """The labels that a training with pseudo-labels would get: IoU, and what tells the wrong ones from the right."""

    def __init__(self, classes: int, has_u: bool) -> None:
        self.has_u, self.found = has_u, Confusion(classes)
        self.labelled = self.pixels = 0
        # By kind (background, foreground): u and its right and wrong pixels; right and wrong by bin of confidence.
        self._u: dict[bool, list[Tensor]] = {False: [], True: []}
        self._conf = {kind: torch.zeros(2, BINS, dtype=torch.int64) for kind in (False, True)}

    def add(self, labels_BHW: Tensor, conf_BHW: Tensor, truth_BHW: Tensor, u_BC: Tensor, known_BC: Tensor) -> None:
        """Count the pixels of a batch; those without a label are left out."""
        real = truth_BHW != IGNORE
        told = real & (labels_BHW != IGNORE)
        self.labelled, self.pixels = self.labelled + int(told.sum()), self.pixels + int(real.sum())
        self.found.add(labels_BHW.where(told, 0), truth_BHW.where(told, IGNORE))
        c = u_BC.shape[1]
        image = torch.arange(len(u_BC))[:, None, None].expand_as(labels_BHW)
        cell = image * c + labels_BHW.where(told, 0)
        told = told & (known_BC.flatten()[cell] | (not self.has_u))  # u and the confidence judge the same pixels
        cell, wrong = cell[told], (labels_BHW != truth_BHW)[told]
        count_2BC = torch.bincount(wrong * len(u_BC) * c + cell, minlength=2 * len(u_BC) * c).view(2, len(u_BC), c)
        bins = ((1 - 1 / (1 + conf_BHW[told])) * BINS).long().clamp(max=BINS - 1)
        ground = cell % c == 0
        for kind in (False, True):
            chosen, columns = (~ground, slice(1, c)) if kind else (ground, slice(0, 1))
            rows = torch.stack([u_BC.double(), *count_2BC.double()])[:, :, columns]
            self._u[kind].append(rows.flatten(1))
            self._conf[kind] += torch.bincount(wrong[chosen] * BINS + bins[chosen], minlength=2 * BINS).view(2, BINS)

    def scores(self) -> dict[str, float]:
        """Shares of 1, by name."""
        out = {"pseudo_train": self.found.miou, "labelled_train": self.labelled / max(1, self.pixels)}
        for kind, name in ((True, "fg"), (False, "bg")):
            u, right, wrong = torch.cat(self._u[kind], 1)
            out[f"pixel_u_{name}"] = weighted_auroc(u, wrong, right) if self.has_u else math.nan
            right, wrong = self._conf[kind]
            out[f"pixel_conf_{name}"] = weighted_auroc(-torch.arange(BINS), wrong, right)
        return out


class TrainScores:
    """What is measured on the training images: thresholds, CAM, pseudo-labels and what tells bad ones."""

    def __init__(self, cfg: Config, classes: int, par: PAR | None) -> None:
        self.cam, self.par, c = ThresholdCurve(classes), par, cfg.method.cam
        self.pairs = PairScores(self.cam.thresholds)
        self.labels = LabelScores(classes, has_u=not Schedule.of(cfg).supervised)
        self.high, self.low = c.high, c.low
        self.grid = tuple(sorted({*REFINED_AT, c.low, c.high}))
        self.refined = [Confusion(classes) for _ in self.grid]

    def add(self, seen: BatchPasses, u_BC: Tensor, known_BC: Tensor) -> None:
        """Count a batch."""
        batch, cam_PHW, truth = seen.batch, seen.cam.cam_PHW, seen.labels_BHW
        self.cam.add(cam_PHW, batch.pairs_P2, truth)
        self.pairs.add(seen, u_BC, known_BC)
        if self.par is None:
            labels, conf = pseudo_labels(
                cam_PHW, batch.pairs_P2, batch.boxes_B4, batch=len(batch.ids), high=self.high, low=self.low
            )
        else:
            at, margins = refined_at(
                cam_PHW, batch.pairs_P2, batch.boxes_B4, batch.images_B3HW, par=self.par, grounds=self.grid
            )
            for found, one in zip(self.refined, at, strict=True):
                found.add(one, truth)
            high, low = (self.grid.index(t) for t in (self.high, self.low))
            ground = (margins[high] <= 0) & (margins[low] <= 0)
            labels = torch.where(margins[high] > 0, at[high], torch.where(ground, 0, IGNORE))
            conf = torch.where(margins[high] > 0, margins[high], torch.where(ground, -margins[low], 0.0))
        self.labels.add(labels, conf, truth, u_BC, known_BC)

    def scores(self) -> tuple[dict[str, float], float]:
        """The scores, and the threshold that was chosen."""
        threshold, best = self.cam.best()
        out = {"cam_train": best.miou, "cam_threshold": threshold} | self.labels.scores()
        if self.par is not None:
            mious = [found.miou for found in self.refined]
            out |= {"refined_train": max(mious), "refined_threshold": self.grid[mious.index(max(mious))]}
        return out | {f"{k}_auroc_train": v for k, v in self.pairs.aurocs(threshold).items()}, threshold


class ValScores:
    """What is measured on the validation images, at the threshold of the training images."""

    def __init__(self, classes: int, threshold: float) -> None:
        self.threshold, self.pairs = threshold, PairScores((threshold,))
        self.tags = TagMetrics(classes - 1)
        self.cam, self.plain, self.averaged = (Confusion(classes) for _ in range(3))

    def add(self, seen: BatchPasses, u_BC: Tensor, known_BC: Tensor) -> None:
        """Count a batch; ``eval.cam_background`` of its configuration is the threshold."""
        self.tags.add(seen.probs_BF, seen.batch.tags_BF)
        self.cam.add(cam_labels(seen), seen.labels_BHW)
        self.pairs.add(seen, u_BC, known_BC)
        native = combined_scores(seen.net, seen.batch.images_B3HW, EvalConfig(), known=seen.logits)
        self.plain.add(native.argmax(1), seen.labels_BHW)
        self.averaged.add(segmentation_labels(seen), seen.labels_BHW)

    def scores(self) -> dict[str, float]:
        """Shares of 1, by name."""
        out = {"tag_map": self.tags.compute()["tag_map"], "cam_val": self.cam.miou}
        out |= {"seg_val_plain": self.plain.miou, "seg_val": self.averaged.miou}
        return out | {f"{k}_auroc_val": v for k, v in self.pairs.aurocs(self.threshold).items()}


# -- passes over the splits -------------------------------------------------------------------


@torch.no_grad()
def walk(
    got: Restored, cfg: Config, reader: ShardReader, scores: TrainScores | ValScores, on_batch: Callable[[int], None]
) -> None:
    """Show all images of a split to what counts them; without masks of their own they could not be here."""
    net, dtype = got.net, next(got.net.parameters()).dtype
    local = Schedule.of(cfg).affinity_trained(got.step)
    for read in shape_batches(reader, list(range(len(reader))), cfg.data.threads, net.min_size):
        batch = read.to("cpu", dtype)
        plain = net(batch.images_B3HW, decode=isinstance(scores, ValScores), affinity=local, embed=False)
        seen = BatchPasses(net, cfg, batch, read.images_B3HW, plain)
        r_BCD, present_BC = batch_vectors(batch, seen.cam, radius=cfg.method.uncertainty.radius, local=local)
        u_BC, known_BC = got.prototypes.uncertainty(r_BCD, present_BC)
        scores.add(seen, u_BC, known_BC)
        on_batch(len(batch.ids))


def measure(
    run: Path, shards: Path, cfg: Config, on_batch: Callable[[int], None] = lambda _: None
) -> dict[str, float | None]:
    """Measure the last checkpoint of a run on ``train`` and ``val``.

    Args:
        run: Folder of the run.
        shards: The prepared devkit.
        cfg: Of the arm; its section ``eval`` may differ from the one that the run was trained with.
        on_batch: Called with the number of images that are through.

    Returns:
        Scores by name, shares of 1; ``None`` where there is none, as for the u of a run without prototypes.
    """
    got = restore(run, device=resolve("cpu"))
    classes = len(got.class_names) + 1
    train = TrainScores(cfg, classes, build_par(cfg))
    walk(got, cfg, ShardReader(shards, cfg.data.train_split, cfg.data), train, on_batch)
    found, threshold = train.scores()
    val = ValScores(classes, threshold)
    judged = replace(cfg, eval=replace(cfg.eval, cam_background=threshold))
    walk(got, judged, ShardReader(shards, cfg.data.val_split, cfg.data), val, on_batch)
    return {k: v if math.isfinite(v) else None for k, v in {**found, **val.scores()}.items()}


# -- the process ------------------------------------------------------------------------------


def stamp(cfg: Config, step: int) -> dict[str, Any]:
    """What a result is a result of, beside the run's configuration."""
    return {"version": VERSION, "step": step, "eval": configs.to_dict(cfg.eval)}


def trained(run: Path, cfg: Config) -> bool:
    """Whether a run has done all of its steps."""
    newest = checkpoint.latest(run)
    return newest is not None and checkpoint.step_of(newest.name) >= cfg.train.steps


def die_with_parent(parent: int) -> None:
    """Be asked to leave when the process that began this one is gone, on Linux; elsewhere this one goes on alone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def main(words: list[str] | None = None) -> int:
    """Train and measure one arm; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.real_measure", description=__doc__)
    parser.add_argument("arm", type=Path)
    for name in ("shards", "run", "result", "progress"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--device")
    args = parser.parse_args(words)
    if args.parent:
        die_with_parent(args.parent)
    cfg = configs.load(args.arm)
    if not trained(args.run, cfg):
        from cluster import cli

        # A trainer whose parent was killed still writes its checkpoint.
        until = time.monotonic() + 2 * STALE_S
        while owned(place(args.run)) and time.monotonic() < until:
            time.sleep(0.2)
        device = ["--device", args.device] if args.device else []
        shown = ["--config", str(args.arm), "--data", str(args.shards), "--out", str(args.run)]
        status = cli.main([*shown, *device, "--resume", "--quiet"])
        if status:
            return status
    images = 0

    def on_batch(count: int) -> None:
        nonlocal images
        images += count
        args.progress.write_text(str(images))

    scores = measure(args.run, args.shards, cfg, on_batch)
    step = checkpoint.read_state(checkpoint.find(args.run)).step
    write_whole(args.result, json.dumps({**stamp(cfg, step), "scores": scores}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
