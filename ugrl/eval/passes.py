"""Forward passes over images of any size: read in batches of one size, and shared by what needs the same pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ugrl.bilinear import resize
from ugrl.config import Config
from ugrl.data.augment import eval_sample
from ugrl.data.reader import ShardReader
from ugrl.eval.combine import combined_scores, shares_passes, with_tag_prior
from ugrl.grid import resize_maps
from ugrl.method.cam import CamOutput, CamPass, multi_scale_cam
from ugrl.model.network import UGRLNet
from ugrl.types import IGNORE, Batch, ModelOutput, Sample, collate

# Pixels that one evaluation batch may hold: images of one size are batched up to it.
BATCH_PIXELS = 512 * 512 * 2


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


class BatchPasses:
    """The forward passes over one batch. Each is made once, when it is first asked for, and serves all that need it.

    Args:
        net: Network in eval mode.
        cfg: The run: ``eval`` and ``method.cam`` are read.
        batch: On the network's device.
        images_host_B3HW: Images of the batch as they were read, on the CPU.
        plain: Output of the plain pass at scale 1.

    Attributes:
        logits: Decoder logits by (scale, mirrored) of the passes that were made and that the segmentation needs.
    """

    def __init__(self, net: UGRLNet, cfg: Config, batch: Batch, images_host_B3HW: Tensor, plain: ModelOutput) -> None:
        self.net, self.cfg, self.batch, self.images_host_B3HW, self.plain = net, cfg, batch, images_host_B3HW, plain
        flips = (False, True) if cfg.eval.mirror else (False,)
        decodes = plain.seg_BChw is not None
        shared = decodes and shares_passes(cfg.eval)
        self._wanted = {(scale, flip) for scale in cfg.eval.seg_scales for flip in flips} if shared else set()
        self.logits: dict[tuple[float, bool], Tensor] = {}
        if plain.seg_BChw is not None and cfg.eval.resize == "native":
            self.logits[1.0, False] = plain.seg_BChw

    @cached_property
    def labels_BHW(self) -> Tensor:
        """The ground truth, int64."""
        assert self.batch.masks_BHW is not None
        return self.batch.masks_BHW.long()

    @cached_property
    def probs_BF(self) -> Tensor:
        """The classifier's probabilities."""
        return self.plain.logits_BF.float().sigmoid()

    def scores(self, f4_BDhw: Tensor) -> Tensor:
        """The classifier's scores of the plain pass, as :class:`ugrl.method.doubts.Heads` has it."""
        return self.plain.logits_BF.float()

    def probabilities(self) -> Tensor:
        """The decoder's probabilities of the plain pass on its own grid, likewise."""
        return self._grid_probs_BChw

    @cached_property
    def _grid_probs_BChw(self) -> Tensor:
        seg_BChw = self.plain.seg_BChw
        return self.net.probabilities(self.plain.features) if seg_BChw is None else seg_BChw.float().softmax(1)

    @cached_property
    def cam(self) -> CamOutput:
        """The CAM of the present pairs. Its passes also give the segmentation's logits where both want the same."""
        c, batch = self.cfg.method.cam, self.batch
        if self.cfg.eval.cam_side:
            return self._squeezed_cam(self.cfg.eval.cam_side)
        return multi_scale_cam(
            self._forward,
            batch.images_B3HW,
            batch.pairs_P2,
            batch.boxes_B4,
            scales=self.cfg.eval.cam_scales or c.scales,
            mirror=c.mirror,
            least=self.net.min_size,
        )

    def _squeezed_cam(self, side: int) -> CamOutput:
        """The CAM of the images squeezed to squares, enlarged to the images; features are those of the plain pass."""
        c, batch, boxes = self.cfg.method.cam, self.batch, self.batch.boxes_B4.tolist()
        squares = [
            resize(image[None, :, y0:y1, x0:x1], (side, side))
            for image, (y0, y1, x0, x1) in zip(batch.images_B3HW, boxes, strict=True)
        ]

        def forward(images: Tensor, view: CamPass) -> tuple[Tensor, Tensor, Tensor | None]:
            features, _ = self.net.encoder(images)
            return self.net.raw_from(features[3]), features[3], None

        whole_B4 = torch.tensor([[0, side, 0, side]] * len(boxes))
        squeezed = multi_scale_cam(
            forward,
            torch.cat(squares),
            batch.pairs_P2,
            whole_B4,
            scales=self.cfg.eval.cam_scales or c.scales,
            mirror=c.mirror,
            least=self.net.min_size,
        )
        cam_PHW = squeezed.cam_PHW.new_zeros((len(batch.pairs_P2), *batch.images_B3HW.shape[-2:]))
        for pair, b in enumerate(batch.pairs_P2[:, 0].tolist()):
            y0, y1, x0, x1 = boxes[b]
            cam_PHW[pair : pair + 1, y0:y1, x0:x1] = resize_maps(squeezed.cam_PHW[pair : pair + 1], (y1 - y0, x1 - x0))
        return CamOutput(cam_PHW, self.plain.features[3], self.plain.affinity_BNN)

    def _forward(self, images_B3HW: Tensor, view: CamPass) -> tuple[Tensor, Tensor, Tensor | None]:
        net, key = self.net, (view.scale, view.mirrored)
        if view.plain:
            f4_BDhw = self.plain.features[3]
            return net.raw_from(f4_BDhw), f4_BDhw, self.plain.affinity_BNN
        features, _ = net.encoder(images_B3HW)
        if key in self._wanted:
            self.logits[key] = net.decoder(features)[1]
        return net.raw_from(features[3]), features[3], None

    @cached_property
    def seg_probs_BCHW(self) -> Tensor:
        """The segmentation's probabilities. Ask for :attr:`cam` before, if at all: some passes are the same."""
        how = self.cfg.eval
        probs_BCHW = combined_scores(self.net, self.batch.images_B3HW, how, known=self.logits)
        return with_tag_prior(probs_BCHW, self.probs_BF, how.tag_prior)
