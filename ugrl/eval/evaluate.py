"""Validation: one pass over a split, counts added up, reduced over ranks, divided once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ugrl.bilinear import resize
from ugrl.config import Config
from ugrl.data.augment import eval_sample
from ugrl.data.reader import ShardReader
from ugrl.distributed import rank, world_size
from ugrl.eval.crf import dense_crf
from ugrl.eval.metrics import Confusion, TagMetrics, UncertaintyMetrics
from ugrl.eval.palette import denormalize
from ugrl.method.cam import CamPass, multi_scale_cam
from ugrl.method.prototypes import Prototypes
from ugrl.method.pseudo import pseudo_labels
from ugrl.method.refine import PAR, refine_labels
from ugrl.method.vectors import batch_vectors
from ugrl.model.network import UGRLNet
from ugrl.model.specs import scaled
from ugrl.types import IGNORE, Batch, ModelOutput, Sample, collate

# Score → what predicting nothing but background, or ranking by chance, scores on the same images.
BASELINES = {"seg_miou": "seg_background_miou", "tag_map": "tag_prevalence"}
# Scores that differ by less are the same one.
ROUNDING = 5e-4

# Pixels that one evaluation batch may hold: images of one size are batched up to it.
BATCH_PIXELS = 512 * 512 * 2


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
        verdict: Where it is collapsed, in which way, in words.
    """

    metrics: dict[str, float]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    images: int = 0
    verdict: str = ""


def shape_batches(reader: ShardReader, indices: list[int], threads: int, least: int = 1) -> Iterator[Batch]:
    """Batches of images of one size (``least`` a side), at most :data:`BATCH_PIXELS` each, decoded by ``threads``."""
    buckets: dict[tuple[int, int], list[Sample]] = {}

    def load(i: int) -> Sample:
        sample = eval_sample(reader[i], num_classes=len(reader.manifest.class_names))
        mask_HW = sample.mask_HW
        return replace(
            sample,
            image_3HW=pad_small(sample.image_3HW, least),
            mask_HW=None if mask_HW is None else pad_small(mask_HW, least, "ignore"),
        )

    def flush(size: tuple[int, int]) -> Batch:
        return collate(buckets.pop(size))

    def walk(samples: Iterator[Sample]) -> Iterator[Batch]:
        for sample in samples:
            size = (sample.image_3HW.shape[1], sample.image_3HW.shape[2])
            buckets.setdefault(size, []).append(sample)
            if len(buckets[size]) >= max(1, BATCH_PIXELS // (size[0] * size[1])) or len(buckets[size]) >= 32:
                yield flush(size)
        for size in list(buckets):
            yield flush(size)

    if threads <= 0:
        yield from walk(load(i) for i in indices)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from walk(_ahead(pool, load, indices, 8 * threads))


def _ahead(pool: ThreadPoolExecutor, load: Callable[[int], Sample], indices: list[int], most: int) -> Iterator[Sample]:
    """Samples in order, a bounded number of them ahead: threads decode while the model works."""
    queue: deque[Future[Sample]] = deque()
    rest = iter(indices)
    try:
        while True:
            queue.extend(pool.submit(load, i) for i in islice(rest, most - len(queue)))
            if not queue:
                return
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()


def pad_small(image_XHW: np.ndarray, least: int, mode: Literal["edge", "ignore"] = "edge") -> np.ndarray:
    """An image or a label map, larger at its right and lower side where it is too small for the encoder.

    Args:
        image_XHW: (…, H, W).
        least: Shortest side that the encoder takes.
        mode: ``edge`` repeats the last row and column, ``ignore`` fills labels with 255.
    """
    extra = [(0, max(0, least - side)) for side in image_XHW.shape[-2:]]
    if not any(after for _, after in extra):
        return image_XHW
    widths = [(0, 0)] * (image_XHW.ndim - 2) + extra
    return np.pad(image_XHW, widths, "edge") if mode == "edge" else np.pad(image_XHW, widths, constant_values=IGNORE)


def seg_scores(
    net: UGRLNet,
    images_B3HW: Tensor,
    scales: tuple[float, ...],
    mirror: bool,
    known: Mapping[tuple[float, bool], Tensor] | None = None,
) -> Tensor:
    """Class probabilities (B, C, H, W), averaged over scales and mirror images.

    Args:
        net: In eval mode.
        images_B3HW: Normalised images of any size.
        scales: Of the input.
        mirror: Whether to add each scale's mirror image.
        known: Logits by (scale, mirrored) of passes that were made already.
    """
    size = (images_B3HW.shape[-2], images_B3HW.shape[-1])
    total: Tensor | None = None
    for scale in scales:
        x: Tensor | None = None
        for flip in (False, True) if mirror else (False,):
            logits = (known or {}).get((scale, flip))
            if logits is None:
                if x is None:
                    x = images_B3HW
                    if scale != 1.0:
                        x = resize(x, scaled(size, scale, net.encoder.spec.min_size))
                logits = net.segment(x.flip(-1) if flip else x)
            p = resize(logits.float(), size).softmax(1)
            p = p.flip(-1) if flip else p
            total = p if total is None else total + p
    assert total is not None
    return total / (len(scales) * (2 if mirror else 1))


class SharedPasses:
    """The CAM's passes over one batch, which also give the segmentation logits of the scales that both want.

    Args:
        net: In eval mode.
        images_B3HW: The batch.
        plain: What the plain pass at scale 1 has given already.
        wanted: (scale, mirrored) of the segmentation.

    Attributes:
        logits: Decoder logits by (scale, mirrored), of the passes that were made and are wanted.
    """

    def __init__(
        self,
        net: UGRLNet,
        images_B3HW: Tensor,
        plain: ModelOutput,
        wanted: set[tuple[float, bool]],
    ) -> None:
        self.net, self.plain, self.wanted = net, plain, wanted
        self.logits: dict[tuple[float, bool], Tensor] = {}
        if plain.seg_BChw is not None:
            self.logits[1.0, False] = plain.seg_BChw

    def __call__(self, images_B3HW: Tensor, view: CamPass) -> tuple[Tensor, Tensor, Tensor | None]:
        """What :func:`ugrl.method.cam.multi_scale_cam` asks for."""
        key = (view.scale, view.mirrored)
        if view.plain:
            features = self.plain.features
            return self.net.raw_from(features[3]), features[3], self.plain.affinity_BNN
        features, _ = self.net.encoder(images_B3HW)
        if key in self.wanted:
            self.logits[key] = self.net.decoder(features)[1]
        return self.net.raw_from(features[3]), features[3], None


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
) -> EvalResult:
    """Evaluate a network on one split; each rank takes every W-th image.

    Args:
        net: The bare network; put into eval mode here and back afterwards.
        reader: The split.
        cfg: The run: ``eval`` and ``method.cam`` are read.
        device: Where the network is.
        prototypes: Given them, the uncertainty's AUROC is measured beside the classifier's.
        affinity_trained: Whether Â is in use (L_aux active), as in training.
        par: For ``eval.refined_cam``.
        dtype: Of the network.
        on_batch: Called with the ids of each batch of this rank, once it is through.

    Returns:
        The metrics, the same on every rank.
    """
    was_training = net.training
    net.eval()
    names = reader.manifest.class_names
    num = len(names)
    n = len(reader) if cfg.eval.limit == 0 else min(cfg.eval.limit, len(reader))
    indices = list(range(rank(), n, world_size()))
    masks = reader.has_masks
    want_cam = cfg.eval.cam and masks
    seg, cam_c, refined, crf_c = (Confusion(num + 1, device=device) for _ in range(4))
    tags_m, u_m = TagMetrics(num), UncertaintyMetrics()
    c = cfg.method.cam
    flips = (False, True) if cfg.eval.mirror else (False,)
    least = net.encoder.spec.min_size
    seg_passes = {(scale, flip) for scale in cfg.eval.seg_scales for flip in flips} if masks else set()

    amp = cfg.eval.amp == "auto" and device.type == "cuda" and dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for batch_cpu in shape_batches(reader, indices, cfg.data.threads, least):
            batch = batch_cpu.to(device, dtype)
            images, b = batch.images_B3HW, len(batch.ids)
            out = net(images, decode=masks, affinity=want_cam and affinity_trained, embed=False)
            tags_m.add(out.logits_BF.float().sigmoid(), batch.tags_BF)
            shared = SharedPasses(net, images, out, seg_passes)
            if want_cam:
                assert batch.masks_BHW is not None
                labels = batch.masks_BHW.long()
                cam = multi_scale_cam(
                    shared,
                    images,
                    batch.pairs_P2,
                    batch.boxes_B4,
                    scales=c.scales,
                    mirror=c.mirror,
                    least=least,
                )
                # One threshold, so every pixel inside the image is decided.
                t = cfg.eval.cam_background
                decided, _ = pseudo_labels(cam.cam_PHW, batch.pairs_P2, batch.boxes_B4, batch=b, high=t, low=t)
                cam_c.add(decided, labels)
                if cfg.eval.refined_cam and par is not None:
                    fine, _ = refine_labels(
                        cam.cam_PHW,
                        batch.pairs_P2,
                        batch.boxes_B4,
                        images,
                        batch=b,
                        par=par,
                        high=t,
                        low=t,
                    )
                    refined.add(fine.where(fine != 255, torch.zeros_like(fine)), labels)
                if prototypes is not None:
                    r, present = batch_vectors(batch, cam, radius=cfg.method.uncertainty.radius, local=affinity_trained)
                    u_BC, known_BC = prototypes.uncertainty(r, present)
                    pb, pf = batch.pairs_P2.to(device).unbind(1)
                    hot = cam.cam_PHW > cfg.eval.cam_background
                    truth = labels[pb] == (pf + 1)[:, None, None]
                    valid = labels[pb] != 255
                    inter = (hot & truth & valid).flatten(1).sum(1)
                    union = ((hot | truth) & valid).flatten(1).sum(1)
                    ok = known_BC[pb, pf + 1] & (union > 0)
                    # A NaN is left out by the collector; masking would have to wait for the device.
                    iou = (inter / union.clamp_min(1)).where(ok, torch.nan)
                    u_m.add(u_BC[pb, pf + 1], iou, out.logits_BF.float().sigmoid()[pb, pf])
            if masks:
                assert batch.masks_BHW is not None
                labels = batch.masks_BHW.long()
                probs = seg_scores(net, images, cfg.eval.seg_scales, cfg.eval.mirror, known=shared.logits)
                seg.add(probs.argmax(1), labels)
                if cfg.eval.crf:
                    for k in range(b):
                        _, h, _, w = batch.boxes_B4[k].tolist()  # without what small images were padded with
                        image_HW3 = denormalize(batch_cpu.images_B3HW[k, :, :h, :w].numpy())
                        sharp = dense_crf(probs[k, :, :h, :w].cpu().numpy(), image_HW3)
                        crf_c.add(torch.from_numpy(sharp.argmax(0)).to(device), labels[k, :h, :w])
            if on_batch:
                on_batch(batch.ids)

    metrics: dict[str, float] = {}
    classes: dict[str, dict[str, float]] = {}
    with_bg = ("background", *names)
    wanted = [("seg", seg, masks), ("crf", crf_c, masks and cfg.eval.crf), ("cam", cam_c, want_cam)]
    wanted.append(("refined", refined, want_cam and cfg.eval.refined_cam and par is not None))
    for name, confusion, on in wanted:
        if on:
            confusion.reduce()
            metrics[f"{name}_miou"] = float(confusion.miou)
            classes[f"{name}_iou"] = confusion.table(with_bg)
    tags_m.reduce()
    if masks:
        metrics["seg_background_miou"] = seg.background_miou
    metrics.update(tags_m.compute())
    classes.update(tags_m.tables(names))
    if want_cam and prototypes is not None:
        u_m.reduce()
        metrics.update({k: v for k, v in u_m.compute().items() if k != "u_pairs"})
    # What cannot be computed (no pair of one kind, say) is absent rather than NaN.
    metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}
    verdict = collapse(metrics, None if seg.only is None else with_bg[seg.only])
    metrics["collapsed"] = float(bool(verdict))
    net.train(was_training)
    return EvalResult(metrics, classes, n, verdict)


def collapse(metrics: Mapping[str, float], only: str | None = None) -> str:
    """In which way a score is that of a predictor without any skill; empty where it is not.

    Args:
        metrics: Of a validation.
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
