"""The function that every training worker runs: the same trainer, told by Ray Train who it is.

Files are written where a run without Ray writes them (``OUT/checkpoints``, ``OUT/metrics.jsonl``,
``OUT/tb``), by rank 0. Ray Train is told about a checkpoint where it lies and copies nothing. So
``OUT`` must be one folder for all nodes: a local disk on one machine, a network mount on several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointUploadMode

from cluster.data import ray_loader
from ugrl import config as configs
from ugrl.train import checkpoint
from ugrl.train.loop import Hooks, LoaderSpec, Trainer
from ugrl.types import Batch

# Marks the reports of a validation; those of a checkpoint repeat the last validation's metrics.
EVALUATED = "evaluated"


def train_worker(config: dict[str, Any]) -> None:
    """Train as one rank of Ray Train's process group.

    Args:
        config: ``config`` (the run as a plain dict), ``shards`` and ``out`` (paths), ``data_tasks``
            (reading tasks at a time). A checkpoint in ``out`` is continued.
    """
    import faulthandler, os  # DEBUG
    faulthandler.dump_traceback_later(60, repeat=True, file=open(f"/tmp/rt/stack_{os.getpid()}.txt","w"))  # DEBUG
    cfg = configs.build(config["config"])
    out = Path(config["out"])

    def loader(spec: LoaderSpec) -> Iterator[Batch]:
        return ray_loader(replace(spec, prefetch=cfg.cluster.prefetch_batches), tasks=config["data_tasks"])

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        ray.train.report({**metrics, "step": float(step), EVALUATED: 1.0})

    def on_checkpoint(step: int, path: Path | None, metrics: dict[str, float]) -> None:
        ray.train.report(
            {**metrics, "step": float(step), EVALUATED: 0.0},
            checkpoint=None if path is None else Checkpoint.from_directory(path),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    Trainer(
        cfg,
        shards=Path(config["shards"]),
        out=out,
        loader=loader,
        hooks=Hooks(on_eval=on_eval, on_checkpoint=on_checkpoint),
        resume_from=_start(out),
        quiet=True,
        device=str(ray.train.torch.get_device()),
    ).fit()


def _start(out: Path) -> Path | None:
    """The newest checkpoint of this run: the one to resume from, or the last before a failure.

    The folder may hold a newer one than Ray Train was told of, and those it was told of may be gone.
    """
    known = ray.train.get_checkpoint()
    return checkpoint.latest(out) or (Path(known.path) if known is not None else None)
