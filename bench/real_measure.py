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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from ugrl.eval.combine import combined_scores, with_tag_prior
from ugrl.eval.curve import ThresholdCurve
from ugrl.eval.metrics import Confusion, TagMetrics, UncertaintyMetrics, weighted_auroc
from ugrl.eval.passes import BatchPasses, shape_batches
from ugrl.files import write_whole
from ugrl.method.class_vectors import batch_vectors
from ugrl.method.doubts import at_labels, of_decoder, pair_doubts
from ugrl.method.per_position import judge_pixels, label_maps, label_uncertainty
from ugrl.method.prototypes import Prototypes
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
VERSION = 2
# Digits of what is kept of each pair.
PLACES = 5


# -- what judges a batch ----------------------------------------------------------------------

# Kinds of u that are measured beside the run's own, whatever it was trained with.
KINDS = {"distance": ("distance", "all"), "margin": ("margin", "all"), "margin_shown": ("margin", "shown")}


class Judged:
    """What the prototypes say of a batch.

    Attributes:
        pairs: Name of a u → its values (B, C) and which are known; ``u`` is the run's own.
        maps_PHW: The maps that labels are made of.
    """

    def __init__(
        self, prototypes: Prototypes, cfg: Config, seen: BatchPasses, r_BCD: Tensor, present_BC: Tensor, done: int
    ) -> None:
        self._prototypes, self._seen, self._present_BC = prototypes, seen, present_BC
        self._cfg = cfg
        doubts = pair_doubts(cfg.method.uncertainty, seen, seen.cam, seen.batch)
        self.pairs = {"u": prototypes.uncertainty(r_BCD, present_BC, doubts)}
        decoder_BC = of_decoder(seen.probabilities(), seen.cam.cam_PHW, seen.batch)
        self.pairs["decoder"] = decoder_BC.nan_to_num(0.0), ~decoder_BC.isnan()
        for name in KINDS:
            with self._as(name):
                self.pairs[name] = prototypes.plain_uncertainty(r_BCD, present_BC)
        self.maps_PHW = label_maps(cfg, seen.cam, seen.batch, prototypes, present_BC, seen, done)

    def pixels(self, labels_BHW: Tensor, conf_BHW: Tensor) -> dict[str, Tensor]:
        """Name of a u → that of each pixel's label, (B, H, W); ``own``: the run's, if it judges pixels."""
        pairs_P2, f4_BDhw = self._seen.batch.pairs_P2, self._seen.cam.f4_BDhw

        out = {}
        if self._cfg.method.uncertainty.level == "pixel":
            labelled = labels_BHW, conf_BHW
            judged = judge_pixels(
                self._cfg, self._prototypes, self._seen, f4_BDhw, labelled, pairs_P2, self._present_BC
            )
            out["own"] = self._prototypes.calibration.pixels(*judged)
        out["decoder"] = 1 - at_labels(self._seen.probabilities(), labels_BHW, pairs_P2)
        for name in ("distance", "margin_shown"):
            with self._as(name):
                out[name], _ = label_uncertainty(self._prototypes, f4_BDhw, labels_BHW, pairs_P2, self._present_BC)
        return out

    @contextmanager
    def _as(self, name: str) -> Iterator[None]:
        """The prototypes with another kind of u."""
        p = self._prototypes
        before = p.kind, p.against
        p.kind, p.against = KINDS[name]
        try:
            yield
        finally:
            p.kind, p.against = before


# -- counts of an image -----------------------------------------------------------------------

# Image → rows ``[class, pixels right, pixels predicted, pixels true]`` of the classes that it has; of these an interval
# over images is made.
Counts = dict[str, list[list[int]]]


def image_counts(ids: Sequence[str], labels_BHW: Tensor, truth_BHW: Tensor, classes: int) -> Counts:
    """The counts of some images; pixels whose truth is 255 are left out."""
    out = {}
    for id, labels, truth in zip(ids, labels_BHW, truth_BHW, strict=True):
        real = truth != IGNORE
        cell = (truth[real] * classes + labels[real]).long()
        table = torch.bincount(cell, minlength=classes * classes).view(classes, classes)
        right, predicted, true = table.diagonal(), table.sum(0), table.sum(1)
        some = (predicted + true > 0).nonzero().flatten().tolist()
        out[id] = [[c, int(right[c]), int(predicted[c]), int(true[c])] for c in some]
    return out


# -- counts of a split ------------------------------------------------------------------------


class PairScores:
    """u, p and CAM IoU of each (image, class) pair; the IoU at each threshold of a grid."""

    def __init__(self, thresholds: tuple[float, ...]) -> None:
        self.thresholds = thresholds
        self._u: dict[str, list[Tensor]] = {}
        self._p: list[Tensor] = []
        self._image: list[int] = []
        self._images = 0
        self._iou: list[Tensor] = []

    def add(self, seen: BatchPasses, judged: Judged) -> None:
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
        for name, (u_BC, known_BC) in judged.pairs.items():
            self._u.setdefault(name, []).append(u_BC[pb, pf + 1].double().where(known_BC[pb, pf + 1], torch.nan))
        self._image += (self._images + pb).tolist()
        self._images += len(seen.batch.ids)
        self._p.append(seen.probs_BF[pb, pf].double())

    def rows(self, threshold: float) -> dict[str, list[float | None]]:
        """Every number of every pair, by name: each u, ``p`` and the CAM's ``iou``; ``None`` where there is none."""
        found = {name: torch.cat(parts) for name, parts in self._u.items()}
        found |= {"p": torch.cat(self._p), "iou": torch.cat(self._iou)[:, self.thresholds.index(threshold)]}
        return {
            name: [round(x, PLACES) if math.isfinite(x) else None for x in values.tolist()]
            for name, values in found.items()
        } | {"image": list(self._image)}

    def aurocs(self, threshold: float) -> dict[str, float]:
        """How well each u and 1 - p tell the pairs whose CAM IoU is below the median; without any u, 1 - p alone.

        All judge the same pairs: those that the run's own u knows.
        """
        p, iou = torch.cat(self._p), torch.cat(self._iou)[:, self.thresholds.index(threshold)]
        own = torch.cat(self._u["u"])
        has_u = not bool(own.isnan().all())
        out = {}
        for name, parts in self._u.items():
            u = torch.cat(parts)
            found = UncertaintyMetrics()
            found.add(
                u.nan_to_num(1.0) if has_u else torch.zeros_like(u), iou.where(~own.isnan() | (not has_u), torch.nan), p
            )
            scores = found.compute()
            out[name], out["p"] = scores["u_auroc"] if has_u else math.nan, scores["p_auroc"]
        return out


class LabelScores:
    """The labels that a training with pseudo-labels would get: IoU, and what tells the wrong ones from the right."""

    def __init__(self, classes: int, has_u: bool) -> None:
        self.has_u, self.found = has_u, Confusion(classes)
        # By kind and name of a pixel's u: right and wrong pixels by bin.
        self._pixel: dict[tuple[bool, str], Tensor] = {}
        self.labelled = self.pixels = 0
        # By kind (background, foreground): u and its right and wrong pixels; right and wrong by bin of confidence.
        self._u: dict[bool, list[Tensor]] = {False: [], True: []}
        self._conf = {kind: torch.zeros(2, BINS, dtype=torch.int64) for kind in (False, True)}

    def add(self, labels_BHW: Tensor, conf_BHW: Tensor, truth_BHW: Tensor, judged: Judged) -> None:
        """Count the pixels of a batch; those without a label are left out."""
        u_BC, known_BC = judged.pairs["u"]
        real = truth_BHW != IGNORE
        told = real & (labels_BHW != IGNORE)
        self.labelled, self.pixels = self.labelled + int(told.sum()), self.pixels + int(real.sum())
        self.found.add(labels_BHW.where(told, 0), truth_BHW.where(told, IGNORE))
        c = u_BC.shape[1]
        image = torch.arange(len(u_BC))[:, None, None].expand_as(labels_BHW)
        cell = image * c + labels_BHW.where(told, 0)
        told = told & (known_BC.flatten()[cell] | (not self.has_u))  # u and the confidence judge the same pixels
        if self.has_u:
            for name, u_BHW in judged.pixels(labels_BHW, conf_BHW).items():
                at = (u_BHW * (BINS / 2)).long().clamp(max=BINS - 1)
                for kind in (False, True):
                    here = told & ((labels_BHW > 0) == kind)
                    cells = (labels_BHW != truth_BHW)[here] * BINS + at[here]
                    self._pixel.setdefault((kind, name), torch.zeros(2, BINS, dtype=torch.int64)).add_(
                        torch.bincount(cells, minlength=2 * BINS).view(2, BINS)
                    )
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
            for (also, u_name), (right, wrong) in self._pixel.items():
                if also == kind:
                    out[f"pixel_{u_name}_{name}"] = weighted_auroc(torch.arange(BINS), wrong, right)
        return out


class TrainScores:
    """What is measured on the training images: thresholds, CAM, pseudo-labels and what tells bad ones."""

    def __init__(self, cfg: Config, classes: int, par: PAR | None) -> None:
        self.cam, self.par, c = ThresholdCurve(classes), par, cfg.method.cam
        self.mixed, self.classes, self.images = ThresholdCurve(classes), classes, Counts()
        self.pairs = PairScores(self.cam.thresholds)
        self.labels = LabelScores(classes, has_u=not Schedule.of(cfg).supervised)
        self.high, self.low = c.high, c.low
        self.grid = tuple(sorted({*REFINED_AT, c.low, c.high}))
        self.refined = [Confusion(classes) for _ in self.grid]

    def add(self, seen: BatchPasses, judged: Judged) -> None:
        """Count a batch."""
        batch, cam_PHW, truth = seen.batch, judged.maps_PHW, seen.labels_BHW
        self.cam.add(seen.cam.cam_PHW, batch.pairs_P2, truth)
        self.mixed.add(cam_PHW, batch.pairs_P2, truth)
        self.pairs.add(seen, judged)
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
        self.labels.add(labels, conf, truth, judged)
        told = truth.where(labels != IGNORE, IGNORE)
        self.images |= image_counts(batch.ids, labels.where(labels != IGNORE, 0), told, self.classes)

    def scores(self) -> tuple[dict[str, float], float, float]:
        """The scores, and the thresholds that were chosen: of the CAM, and of the maps that labels are made of."""
        threshold, best = self.cam.best()
        mixed, found = self.mixed.best()
        out = {"cam_train": best.miou, "cam_threshold": threshold, "maps_train": found.miou, "maps_threshold": mixed}
        out |= self.labels.scores()
        if self.par is not None:
            mious = [found.miou for found in self.refined]
            out |= {"refined_train": max(mious), "refined_threshold": self.grid[mious.index(max(mious))]}
        return out | {f"{k}_auroc_train": v for k, v in self.pairs.aurocs(threshold).items()}, threshold, mixed


class ValScores:
    """What is measured on the validation images, at the threshold of the training images."""

    def __init__(self, classes: int, threshold: float, mixed: float) -> None:
        self.mixed, self.maps = mixed, Confusion(classes)
        self.classes, self.images = classes, Counts()
        self.threshold, self.pairs = threshold, PairScores((threshold,))
        self.tags = TagMetrics(classes - 1)
        self.cam, self.plain, self.averaged, self.prior = (Confusion(classes) for _ in range(4))

    def add(self, seen: BatchPasses, judged: Judged) -> None:
        """Count a batch; ``eval.cam_background`` of its configuration is the threshold."""
        batch = seen.batch
        labels_BHW, _ = pseudo_labels(
            judged.maps_PHW, batch.pairs_P2, batch.boxes_B4, batch=len(batch.ids), high=self.mixed, low=self.mixed
        )
        self.maps.add(labels_BHW, seen.labels_BHW)
        self.tags.add(seen.probs_BF, seen.batch.tags_BF)
        self.cam.add(cam_labels(seen), seen.labels_BHW)
        self.pairs.add(seen, judged)
        native = combined_scores(seen.net, seen.batch.images_B3HW, EvalConfig(), known=seen.logits)
        self.plain.add(native.argmax(1), seen.labels_BHW)
        averaged_BHW = segmentation_labels(seen)
        self.averaged.add(averaged_BHW, seen.labels_BHW)
        self.prior.add(with_tag_prior(seen.seg_probs_BCHW, seen.probs_BF, 1.0).argmax(1), seen.labels_BHW)
        self.images |= image_counts(batch.ids, averaged_BHW, seen.labels_BHW, self.classes)

    def scores(self) -> dict[str, float]:
        """Shares of 1, by name."""
        out = {"tag_map": self.tags.compute()["tag_map"], "cam_val": self.cam.miou, "maps_val": self.maps.miou}
        out |= {"seg_val_plain": self.plain.miou, "seg_val": self.averaged.miou, "seg_val_prior": self.prior.miou}
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
        scores.add(seen, Judged(got.prototypes, cfg, seen, r_BCD, present_BC, got.step))
        on_batch(len(batch.ids))


def measure(run: Path, shards: Path, cfg: Config, on_batch: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Measure a checkpoint, of a run its last one, on ``train`` and ``val``.

    Args:
        run: Folder of the run, or of a checkpoint.
        shards: The prepared devkit.
        cfg: Of the arm; its section ``eval`` may differ from the one that the run was trained with.
        on_batch: Called with the number of images that are through.

    Returns:
        ``scores``: shares of 1 by name, ``None`` where there is none, as for the u of a run without prototypes;
        ``images``: ``seg_val`` and ``pseudo_train``, each a :data:`Counts`; ``pairs``: ``train`` and ``val``, each as
        :meth:`PairScores.rows` has it.
    """
    got = restore(run, device=resolve("cpu"))
    classes = len(got.class_names) + 1
    train = TrainScores(cfg, classes, build_par(cfg))
    walk(got, cfg, ShardReader(shards, cfg.data.train_split, cfg.data), train, on_batch)
    found, threshold, mixed = train.scores()
    val = ValScores(classes, threshold, mixed)
    judged = replace(cfg, eval=replace(cfg.eval, cam_background=threshold, tag_prior=0.0))
    walk(got, judged, ShardReader(shards, cfg.data.val_split, cfg.data), val, on_batch)
    return {
        "scores": {k: v if math.isfinite(v) else None for k, v in {**found, **val.scores()}.items()},
        "images": {"pseudo_train": train.images, "seg_val": val.images},
        "pairs": {"train": train.pairs.rows(threshold), "val": val.pairs.rows(threshold)},
    }


# -- the process ------------------------------------------------------------------------------


def stamp(cfg: Config, step: int) -> dict[str, Any]:
    """What a result is a result of, beside the run's configuration."""
    return {"version": VERSION, "step": step, "eval": configs.to_dict(cfg.eval)}


def trained(run: Path, cfg: Config) -> bool:
    """Whether nothing is left of a run."""
    newest = checkpoint.latest(run)
    if newest is None or checkpoint.step_of(newest.name) < cfg.train.steps:
        return False
    return checkpoint.read_state(newest).ends(cfg.train.steps)


def kept_before(last: Path) -> list[Path]:
    """The checkpoints of a run before its last one, by step."""
    found = [path for path in last.parent.glob(f"{checkpoint.PREFIX}*") if path.name != last.name]
    return sorted(found, key=lambda path: checkpoint.step_of(path.name))


def result_at(result: Path, step: int) -> Path:
    """Where an earlier checkpoint's result lies: ``ARM@STEP-SEED.json``.

    >>> result_at(Path("results/IV-0.json"), 200).name
    'IV@200-0.json'
    """
    arm, _, seed = result.stem.rpartition("-")
    return result.with_name(f"{arm}@{step}-{seed}.json")


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
    parser.add_argument("--checkpoints", action="store_true", help="measure the earlier ones that the run kept, too")
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

    last = checkpoint.find(args.run)
    # The last one comes last: with its result the arm is done.
    for path in [*(kept_before(last) if args.checkpoints else []), last]:
        step = checkpoint.step_of(path.name)
        file = args.result if path == last else result_at(args.result, step)
        if path != last and file.exists():
            on_batch(sum(map(len, json.loads(file.read_text())["images"].values())))
        else:
            write_whole(file, json.dumps({**stamp(cfg, step), **measure(path, args.shards, cfg, on_batch)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
