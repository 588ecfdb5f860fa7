"""The function that every training worker runs: the same trainer, told by Ray Train who it is.

Files are written where a run without Ray writes them (``OUT/checkpoints``, ``OUT/metrics.jsonl``,
``OUT/tb``), by rank 0. Ray Train is told about a checkpoint where it lies and copies nothing. ``OUT`` must be
one folder for all nodes: a local disk on one machine, a network mount or a storage's URI on several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray import PlacementGroupID
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from cluster.data import ray_loader, store_part
from cluster.launch import PLACEMENT
from cluster.line import WorkerEnd, checkpoint_record, event_record, left_record, log_record, start_record, val_record
from cluster.metrics import RayGauges
from cluster.reading import begin_process
from ugrl import config as configs
from ugrl.data.make import Loaded
from ugrl.data.spec import LoaderSpec
from ugrl.ownership import fence
from ugrl.storage import Place, place
from ugrl.train import checkpoint
from ugrl.train.interrupt import Interrupted
from ugrl.train.loop import Trainer
from ugrl.train.observer import Hooks, nothing

# Marks the reports of a validation; those of a checkpoint repeat the last validation's metrics.
EVALUATED = "evaluated"
# Of the training line, what a search may be constrained by.
COSTS = ("step_s", "device_memory_mb", "images_per_s")


def train_worker(config: dict[str, Any]) -> None:
    """Train as one rank of Ray Train's process group.

    Args:
        config: ``config`` (the run as a plain dict), ``shards`` and ``out`` (paths or URIs), ``data_tasks`` (reading
            tasks at a time), ``streams`` (workers of all runs side by side, which share the object store), ``line`` (to
            the driver), ``owner`` (of ``out``). A checkpoint in ``out`` is continued.
    """
    cfg = configs.build(config["config"])
    out = place(config["out"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    end = WorkerEnd(config["line"])
    gauges = RayGauges(out.name, rank)
    first = rank == 0
    if first:
        note_placement(out)
    store = store_part(config["streams"])
    begin_process()

    def loader(spec: LoaderSpec) -> Iterator[Loaded]:
        asked = replace(spec, data=replace(spec.data, prefetch=cfg.cluster.prefetch_batches))
        return ray_loader(asked, tasks=config["data_tasks"], store_bytes=store)

    logged: dict[str, float] = {}

    def on_log(step: int, values: dict[str, float]) -> None:
        gauges(step, values)
        logged.update({k: values[k] for k in COSTS if k in values})
        if first:
            end.tell(log_record(step, values))

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        if first:
            end.tell(val_record(step, metrics))
        ray.train.report({**metrics, **logged, "step": float(step), EVALUATED: 1.0})

    def on_checkpoint(step: int, where: Place | None, metrics: dict[str, float]) -> None:
        if where is not None:
            end.tell(checkpoint_record(checkpoint.step_of(where.name), where))
        path = where.local if where is not None else None
        ray.train.report(
            {**metrics, "step": float(step), EVALUATED: 0.0},
            checkpoint=None if path is None else Checkpoint.from_directory(path),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    hooks = Hooks(
        on_eval=on_eval,
        on_checkpoint=on_checkpoint,
        on_log=on_log,
        on_event=lambda text: end.tell(event_record(text)),
        stop=end.stopping,
        before_write=fence(out, config["owner"]) if config["owner"] else nothing,
    )
    try:
        trainer = Trainer(
            cfg,
            shards=place(config["shards"]),
            out=out,
            loader=loader,
            hooks=hooks,
            resume_from=checkpoint.latest(out),
            quiet=True,
            device=str(ray.train.torch.get_device()),
        )
        if first:
            end.tell(start_record(trainer.done, world, world // max(1, context.get_local_world_size())))
        trainer.fit()
    except Interrupted as left:  # with a checkpoint; the driver asked for it
        if first:
            end.tell(left_record(left.step))
    finally:
        end.close()


def note_placement(out: Place | Path) -> None:
    """Leave the id of the workers' placement group in the run's folder, for :func:`free_placement`."""
    group = get_current_placement_group()
    if group is not None:
        (place(out) / PLACEMENT).write(group.id.hex().encode())


def free_placement(out: Place | Path) -> None:
    """Give back what the workers of a run hold, if its controller was killed before it could.

    Ray Train's own cleaner asks the dashboard whether the controller lives. Without ``ray[default]``
    there is none to ask, and the CPUs of a trial that Tune stopped would stay taken.
    """
    note = place(out) / PLACEMENT
    if note.exists():
        group = PlacementGroup(PlacementGroupID.from_hex(note.read().decode()))
        remove_placement_group(group)
        note.delete()
