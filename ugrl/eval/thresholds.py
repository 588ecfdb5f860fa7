"""Background thresholds of the CAM and of the refined CAM, searched on images whose masks may be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ugrl.config import Config
from ugrl.data.reader import ShardReader
from ugrl.eval.curve import ThresholdCurve
from ugrl.eval.metrics import Confusion
from ugrl.eval.passes import BatchPasses, shape_batches
from ugrl.method.refine import PAR, refined_at
from ugrl.model.network import UGRLNet

# Background scores that are tried for PAR; a mask is refined for each, so the grid is a coarse one.
REFINED_GRID = tuple(k / 20 for k in range(2, 15))


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold, and the mean IoU at it on the images on which it was searched."""

    value: float
    miou: float


@torch.no_grad()
def search_thresholds(
    net: UGRLNet,
    reader: ShardReader,
    cfg: Config,
    *,
    device: torch.device,
    par: PAR | None = None,
    on_batch: Callable[[Sequence[str]], None] | None = None,
) -> dict[str, Threshold]:
    """The thresholds of the highest mean IoU, in one pass over the images.

    Args:
        net: Network; put into eval mode.
        reader: Images with masks: those of training, never those that the score is for.
        cfg: The run: ``eval.cam_side``, ``eval.cam_scales``, ``eval.limit`` and ``method.cam`` are read.
        device: Device of the network.
        par: Refinement whose threshold is wanted as well.
        on_batch: Called with the ids of each batch, once it is through.

    Returns:
        ``cam``, and with ``par`` also ``refined``.
    """
    net.eval()
    classes = reader.manifest.num_classes + 1
    curve = ThresholdCurve(classes, device=device)
    refined = {t: Confusion(classes, device) for t in REFINED_GRID} if par is not None else {}
    n = min(cfg.eval.limit or len(reader), len(reader))
    for read in shape_batches(reader, list(range(n)), cfg.data.threads, net.min_size):
        batch = read.to(device)
        plain = net(batch.images_B3HW, decode=False, affinity=False, embed=False)
        seen = BatchPasses(net, cfg, batch, read.images_B3HW, plain)
        curve.add(seen.cam.cam_PHW, batch.pairs_P2, seen.labels_BHW)
        if par is not None:
            labels_TBHW, _ = refined_at(
                seen.cam.cam_PHW, batch.pairs_P2, batch.boxes_B4, batch.images_B3HW, par=par, grounds=REFINED_GRID
            )
            for confusion, labels_BHW in zip(refined.values(), labels_TBHW, strict=True):
                confusion.add(labels_BHW, seen.labels_BHW)
        if on_batch:
            on_batch(batch.ids)
    curve.reduce()
    value, best = curve.best()
    found = {"cam": Threshold(value, best.miou)}
    if refined:
        value = max(refined, key=lambda t: refined[t].miou)
        found["refined"] = Threshold(value, refined[value].miou)
    return found
