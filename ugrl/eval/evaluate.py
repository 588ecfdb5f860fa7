"""Validation: one pass over a split, counts added up, reduced over ranks, divided once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

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
from ugrl.method.cam import multi_scale_cam, passes
from ugrl.method.prototypes import Prototypes
from ugrl.method.pseudo import pseudo_labels
from ugrl.method.refine import PAR, refine_labels
from ugrl.method.vectors import batch_vectors
from ugrl.model.network import UGRLNet
from ugrl.types import Batch, ModelOutput, Sample, collate

# Pixels that one evaluation batch may hold: images of one size are batched up to it.
BATCH_PIXELS = 512 * 512 * 2


@dataclass(slots=True)
class EvalResult:
    """Metrics of one split.

    Attributes:
        metrics: Flat name → value: ``seg_miou, cam_miou, refined_miou, crf_miou`` (where masks
            exist), ``tag_map, tag_f1``, ``u_auroc, p_auroc``; mIoU and the rest as shares of 1.
        classes: Metric → class name → value, for the table.
        images: Images seen, over all ranks.
    """

    metrics: dict[str, float]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    images: int = 0


def shape_batches(reader: ShardReader, indices: list[int], threads: int) -> Iterator[Batch]:
    """Batches of images of one size, at most :data:`BATCH_PIXELS` each, decoded by ``threads``."""
    buckets: dict[tuple[int, int], list[Sample]] = {}

    def load(i: int) -> Sample:
        return eval_sample(reader[i], num_classes=len(reader.manifest.class_names))

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


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Sides of a rescaled image, at least the 32 px that the encoder needs."""
    return max(32, round(size[0] * scale)), max(32, round(size[1] * scale))


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
                        x = resize(x, scaled(size, scale))
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
        order: Of :func:`ugrl.method.cam.passes`.
        wanted: (scale, mirrored) of the segmentation.

    Attributes:
        logits: Decoder logits by (scale, mirrored), of the passes that were made and are wanted.
    """

    def __init__(
        self,
        net: UGRLNet,
        images_B3HW: Tensor,
        plain: ModelOutput,
        order: list[tuple[float, bool]],
        wanted: set[tuple[float, bool]],
    ) -> None:
        self.net, self.plain, self.wanted = net, plain, wanted
        self.size = (int(images_B3HW.shape[-2]), int(images_B3HW.shape[-1]))
        self.order = iter(order)
        self.logits: dict[tuple[float, bool], Tensor] = {}
        if plain.seg_BChw is not None:
            self.logits[1.0, False] = plain.seg_BChw

    def __call__(self, images_B3HW: Tensor, affinity: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """What :func:`ugrl.method.cam.multi_scale_cam` asks for, in its order."""
        key = next(self.order)
        if key == (1.0, False):
            features = self.plain.features
            return self.net.raw_from(features[3]), features[3], self.plain.affinity_BNN
        features, _ = self.net.encoder(images_B3HW)
        same = tuple(images_B3HW.shape[-2:]) == scaled(self.size, key[0])  # but for images that are tiny
        if key in self.wanted and same:
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
    seg_passes = {(scale, flip) for scale in cfg.eval.seg_scales for flip in flips} if masks else set()

    amp = cfg.eval.amp == "auto" and device.type == "cuda" and dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for batch_cpu in shape_batches(reader, indices, cfg.data.threads):
            batch = batch_cpu.to(device, dtype)
            images, b = batch.images_B3HW, len(batch.ids)
            out = net(images, decode=masks, affinity=want_cam and affinity_trained, embed=False)
            tags_m.add(out.logits_BF.float().sigmoid(), batch.tags_BF)
            shared = SharedPasses(net, images, out, passes(c.scales, c.mirror), seg_passes)
            if want_cam:
                assert batch.masks_BHW is not None
                labels = batch.masks_BHW.long()
                cam = multi_scale_cam(shared, images, batch.pairs_P2, batch.boxes_B4, scales=c.scales, mirror=c.mirror)
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
                        sharp = dense_crf(probs[k].cpu().numpy(), denormalize(batch_cpu.images_B3HW[k].numpy()))
                        crf_c.add(torch.from_numpy(sharp.argmax(0))[None].to(device), labels[k : k + 1])
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
    metrics.update(tags_m.compute())
    if want_cam and prototypes is not None:
        u_m.reduce()
        metrics.update({k: v for k, v in u_m.compute().items() if k != "u_pairs"})
    # What cannot be computed (no pair of one kind, say) is absent rather than NaN.
    metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}
    net.train(was_training)
    return EvalResult(metrics, classes, n)
