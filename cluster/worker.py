"""The function that every training worker runs: the same trainer, told by Ray Train who it is.

Files are written where a run without Ray writes them (``OUT/checkpoints``, ``OUT/metrics.jsonl``,
``OUT/tb``), by rank 0. Ray Train is told about a checkpoint where it lies and copies nothing. So
``OUT`` must be one folder for all nodes: a local disk on one machine, a network mount on several.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint
from ray.train.v2.api.report_config import CheckpointUploadMode

from cluster.data import ray_loader
from ugrl import config as configs
from ugrl.train import checkpoint
from ugrl.train.loop import Hooks, Trainer

# Given to the stored metrics of every report, so that a listener can tell the two kinds apart.
EVENT = "event"
EVALUATED, SAVED = 1.0, 2.0


def train_worker(config: dict[str, Any]) -> None:
    """Train as one rank of Ray Train's process group.

    Args:
        config: ``config`` (the run as a plain dict), ``shards``, ``out`` and ``resume`` (paths; resume
            may be ``None``), ``data_cpus`` (what Ray Data may use for this worker).
    """
    _crash_for_tests()
    cfg = configs.build(config["config"])
    out, shards = Path(config["out"]), Path(config["shards"])
    folder = _newest(out, ray.train.get_checkpoint(), config.get("resume"))

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        ray.train.report({**metrics, "step": float(step), EVENT: EVALUATED})

    def on_checkpoint(step: int, path: Path | None, metrics: dict[str, float]) -> None:
        saved = None if path is None else Checkpoint.from_directory(path)
        ray.train.report(
            {**metrics, "step": float(step), EVENT: SAVED},
            checkpoint=saved,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def loader(spec):  # noqa: ANN001, ANN202
        return ray_loader(replace(spec, prefetch=cfg.cluster.prefetch_batches), cpus=config["data_cpus"])

    Trainer(
        cfg,
        shards=shards,
        out=out,
        loader=loader,
        hooks=Hooks(on_eval=on_eval, on_checkpoint=on_checkpoint),
        resume_from=folder,
        quiet=True,
        device=str(ray.train.torch.get_device()),
    ).fit()
