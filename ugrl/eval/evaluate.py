"""Validation: one pass over a split, counts added up, reduced over ranks, divided once.

Each collector takes every batch and gives its part of the result at the end (:mod:`ugrl.eval.collectors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ugrl.config import Config
from ugrl.data.reader import ShardReader
from ugrl.distributed import all_reduce_sum, rank, world_size
from ugrl.eval.collectors import (
    Collector,
    CrfScores,
    Keep,
    MaskScores,
    TagScores,
    UncertaintyScores,
    cam_labels,
    refined_labels,
    segmentation_labels,
)
from ugrl.eval.passes import BatchPasses, shape_batches
from ugrl.method.prototypes import Prototypes
from ugrl.method.refine import PAR
from ugrl.model.network import UGRLNet

# All metrics and all tables of a validation, in the order in which they are shown.
METRICS: tuple[str, ...] = ("seg_miou", "crf_miou", "cam_miou", "refined_miou", "seg_background_miou")
METRICS += ("tag_map", "tag_prevalence", "tag_f1", "tag_f1_micro", "tag_f1_image", "u_auroc", "p_auroc")
TABLES = ("seg_iou", "crf_iou", "cam_iou", "refined_iou", "tag_ap", "tag_prevalence")
# Score → what predicting nothing but background, or ranking by chance, scores on the same images.
BASELINES = {"seg_miou": "seg_background_miou", "tag_map": "tag_prevalence"}
# Scores that differ by less are the same one.
ROUNDING = 5e-4


@dataclass(slots=True)
class EvalResult:
    """Metrics of one split.

    Attributes:
        metrics: Flat name → value: ``seg_miou, cam_miou, refined_miou, crf_miou`` (where masks
            exist), ``tag_map, tag_f1``, ``u_auroc, p_auroc``; mIoU and the rest as shares of 1. Beside them what no
            skill scores (:data:`BASELINES`), and ``collapsed``: 1 where the segmentation, or the classifier where
            there are no masks, scores what a predictor without any skill does, else 0.
        classes: Metric → class name → value, for the table.
        images: Images seen, over all ranks.
        verdict: In which way the network is collapsed, in words; empty where it is not.
        crf: What computed the CRF, ``own`` or ``pydensecrf``; empty where none was.
    """

    metrics: dict[str, float]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    images: int = 0
    verdict: str = ""
    crf: str = ""


class GivenUp(Exception):
    """An evaluation was stopped before its end."""


@torch.no_grad()
def evaluate(
    net: UGRLNet,
    reader: ShardReader,
    cfg: Config,
    *,
    device: torch.device,
    prototypes: Prototypes | None = None,
    affinity_trained: bool = False,
    par: PAR | None = None,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[Sequence[str]], None] | None = None,
    stop: Callable[[], bool] | None = None,
    segment: bool = True,
    keep: Keep | None = None,
) -> EvalResult:
    """Evaluate a network on one split; each rank takes every W-th image.

    Args:
        net: The bare network; put into eval mode here and back afterwards.
        reader: Reader of the split to measure on.
        cfg: The run: ``eval`` and ``method.cam`` are read.
        device: Device of the network.
        prototypes: Given them, the uncertainty's AUROC is measured beside the classifier's.
        affinity_trained: Whether Â is in use (L_aux active), as in training.
        par: Refinement to measure where ``eval.refined_cam`` is set.
        dtype: Type of the network's weights.
        on_batch: Called with the ids of each batch of this rank, once it is through.
        stop: Asked before each batch; on every rank or on none. Once one says yes, all of them give up.
        segment: Whether the segmentation is measured.
        keep: Told the labels of every image, also of those without masks.

    Returns:
        The metrics, the same on every rank.

    Raises:
        GivenUp: It was to stop, on every rank.
    """
    was_training = net.training
    net.eval()
    names, masks = reader.manifest.class_names, reader.has_masks
    labels = masks or keep is not None
    with_cam, decode = labels and cfg.eval.cam, labels and segment
    n = len(reader) if cfg.eval.limit == 0 else min(cfg.eval.limit, len(reader))
    segmentation = MaskScores("seg", names, device, segmentation_labels, keep) if decode else None
    crf = CrfScores(names, device, cfg.eval, keep) if decode and cfg.eval.crf else None
    collectors: list[Collector] = [TagScores(names)]
    if with_cam:  # before the segmentation, which takes over some of the CAM's passes
        collectors += _cam_collectors(cfg, names, device, prototypes if masks else None, affinity_trained, par, keep)
    collectors += [scores for scores in (segmentation, crf) if scores is not None]

    given_up = False
    amp = cfg.eval.amp == "auto" and device.type == "cuda" and dtype == torch.float32
    indices = list(range(rank(), n, world_size()))
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for read in shape_batches(reader, indices, cfg.data.threads, net.min_size):
            if stop is not None and stop():
                given_up = True
                break
            batch = read.to(device, dtype)
            plain = net(batch.images_B3HW, decode=decode, affinity=with_cam and affinity_trained, embed=False)
            seen = BatchPasses(net, cfg, batch, read.images_B3HW, plain)
            for collector in collectors:
                collector.add(seen)
            if on_batch:
                on_batch(batch.ids)
    if stop is not None and bool(all_reduce_sum(torch.full((), float(given_up), device=device)) > 0):
        net.train(was_training)
        raise GivenUp

    found = [collector.result() for collector in collectors]
    values = {name: value for scores in found for name, value in scores.metrics.items()}
    tables = {name: table for scores in found for name, table in scores.classes.items()}
    # What cannot be computed (no pair of one kind, say) is absent rather than NaN.
    metrics = {name: values[name] for name in METRICS if math.isfinite(values.get(name, math.nan))}
    verdict = collapse(metrics, segmentation.only if masks and segmentation else None)
    metrics["collapsed"] = float(bool(verdict))
    net.train(was_training)
    return EvalResult(
        metrics, {name: tables[name] for name in TABLES if name in tables}, n, verdict, crf.backend if crf else ""
    )


def _cam_collectors(
    cfg: Config,
    names: Sequence[str],
    device: torch.device,
    prototypes: Prototypes | None,
    affinity_trained: bool,
    par: PAR | None,
    keep: Keep | None,
) -> list[Collector]:
    """What is measured of the CAM; arguments as of :func:`evaluate`."""
    found: list[Collector] = [MaskScores("cam", names, device, cam_labels, keep)]
    if cfg.eval.refined_cam and par is not None:
        found.append(MaskScores("refined", names, device, refined_labels(par), keep))
    if prototypes is not None:
        found.append(UncertaintyScores(cfg, prototypes, affinity_trained))
    return found


def collapse(metrics: Mapping[str, float], only: str | None = None) -> str:
    """In which way a score is that of a predictor without any skill; empty where it is not.

    Args:
        metrics: Metrics of a validation, by name.
        only: The one class that the segmentation predicts for every pixel, if there is such a one.

    >>> collapse({"seg_miou": 0.1204, "seg_background_miou": 0.12}, "background")
    'collapsed: it predicts background everywhere (an empty mask scores 12.0 %)'
    >>> collapse({"seg_miou": 0.5, "seg_background_miou": 0.12, "tag_map": 0.2, "tag_prevalence": 0.2})
    ''
    >>> collapse({"tag_map": 0.2, "tag_prevalence": 0.2})
    'collapsed: tag_map is that of a ranking by chance (20.0 %)'
    """
    score, chance = (metrics.get(k, math.nan) for k in ("seg_miou", "seg_background_miou"))
    if only is not None:
        return f"collapsed: it predicts {only} everywhere (an empty mask scores {100 * chance:.1f} %)"
    if math.isfinite(score):
        same = abs(score - chance) < ROUNDING
        return f"collapsed: seg_miou is that of an empty mask ({100 * chance:.1f} %)" if same else ""
    score, chance = (metrics.get(k, math.nan) for k in ("tag_map", "tag_prevalence"))
    same = abs(score - chance) < ROUNDING
    return f"collapsed: tag_map is that of a ranking by chance ({100 * chance:.1f} %)" if same else ""
