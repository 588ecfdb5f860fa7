"""A trained network, measured on a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ugrl.config import Config
from ugrl.data.reader import ShardReader
from ugrl.device import resolve
from ugrl.eval.collectors import Keep
from ugrl.eval.evaluate import EvalResult, evaluate
from ugrl.method.refine import PAR
from ugrl.method.schedule import Schedule
from ugrl.storage import Place, place
from ugrl.train.build import build_par
from ugrl.train.restore import Restored, restore


def measure(
    got: Restored,
    reader: ShardReader,
    *,
    device: torch.device,
    cfg: Config | None = None,
    par: PAR | None = None,
    on_batch: Callable[[Sequence[str]], None] | None = None,
    segment: bool = True,
    keep: Keep | None = None,
) -> EvalResult:
    """Evaluate what a checkpoint holds.

    Args:
        got: From :func:`ugrl.train.restore.restore`, on the device.
        reader: Reader of the split to measure on.
        device: Device to compute on.
        cfg: Instead of the checkpoint's own configuration.
        par: Refinement of the CAM, where it is wanted.
        on_batch: Called with the ids of each batch, once it is through.
        segment: Whether the segmentation is measured.
        keep: Told the labels of every image.
    """
    cfg = cfg or got.cfg
    return evaluate(
        got.net,
        reader,
        cfg,
        device=device,
        prototypes=got.prototypes,
        affinity_trained=Schedule.of(cfg).affinity_trained(got.step),
        par=par,
        on_batch=on_batch,
        segment=segment,
        keep=keep,
    )


def measure_run(out: str | Place, shards: str | Place, split: str) -> dict[str, float]:
    """Metrics of a run's newest checkpoint on a split, as its own validation would find them.

    Args:
        out: The run's folder, a path or a URI.
        shards: Folder that ``ugrl prepare`` has written.
        split: Name of a split of the shards.

    Raises:
        UgrlError: There is no checkpoint, or no such split.
    """
    device = resolve()
    got = restore(place(out), device=device)
    return dict(measure(got, ShardReader(place(shards), split), device=device, par=build_par(got.cfg)).metrics)
