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
from ray import PlacementGroupID
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from cluster.data import ray_loader
from ugrl import config as configs
from ugrl.data.make import Loaded
from ugrl.train import checkpoint
from ugrl.train.loop import Hooks, LoaderSpec, Trainer

# Marks the reports of a validation; those of a checkpoint repeat the last validation's metrics.
EVALUATED = "evaluated"
PLACEMENT = ".placement_group"


def train_worker(config: dict[str, Any]) -> None:
    """Train as one rank of Ray Train's process group.

    Args:
        config: ``config`` (the run as a plain dict), ``shards`` and ``out`` (paths), ``data_tasks``
            (reading tasks at a time). A checkpoint in ``out`` is continued.
    """
    cfg = configs.build(config["config"])
    out = Path(config["out"])
    if ray.train.get_context().get_world_rank() == 0:
        note_placement(out)

    def loader(spec: LoaderSpec) -> Iterator[Loaded]:
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


def note_placement(out: Path) -> None:
    """Leave the id of the workers' placement group in the run's folder, for :func:`free_placement`."""
    group = get_current_placement_group()
    if group is not None:
        (out / PLACEMENT).write_text(group.id.hex(), encoding="utf-8")


def free_placement(out: Path) -> None:
    """Give back what the workers of a run hold, if its controller was killed before it could.

    Ray Train's own cleaner asks the dashboard whether the controller lives. Without ``ray[default]``
    there is none to ask, and the CPUs of a trial that Tune stopped would stay taken.
    """
    note = out / PLACEMENT
    if note.is_file():
        group = PlacementGroup(PlacementGroupID.from_hex(note.read_text(encoding="utf-8")))
        remove_placement_group(group)
        note.unlink()


def _start(out: Path) -> Path | None:
    """The newest checkpoint of this run: the one to resume from, or the last before a failure.

    The folder may hold a newer one than Ray Train was told of, and those it was told of may be gone.
    """
    known = ray.train.get_checkpoint()
    return checkpoint.latest(out) or (Path(known.path) if known is not None else None)
