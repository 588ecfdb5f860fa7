"""The function that every training worker runs: the same trainer as without Ray. Ray Train gives it its rank.

Rank 0 writes the files where a run without Ray writes them: ``OUT/checkpoints``, ``OUT/metrics.jsonl``, ``OUT/tb``. Ray
Train learns where a checkpoint lies, and copies nothing. ``OUT`` must be one folder for all nodes: a local disk on one
machine, a network mount or a storage's URI on several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointUploadMode

from cluster.blocks import store_part
from cluster.channel import (
    WorkerChannel,
    checkpoint_record,
    event_record,
    left_record,
    log_record,
    start_record,
    val_record,
)
from cluster.live import RayGauges
from cluster.placement_groups import note_placement
from cluster.ray_data import ray_loader
from cluster.read_tasks import start_reading_process
from ugrl import config as configs
from ugrl.data.make import Loaded
from ugrl.data.spec import LoaderSpec
from ugrl.ownership import fence
from ugrl.storage import Place, place
from ugrl.train import checkpoint
from ugrl.train.interrupt import Interrupted
from ugrl.train.loop import Trainer
from ugrl.train.observer import Hooks, nothing

# Set in the reports of a validation. The reports of a checkpoint repeat the metrics of the last validation.
EVALUATED = "evaluated"
# Values of a training record that a search may have a constraint on.
COSTS = ("step_s", "device_memory_mb", "images_per_s")


def train_worker(config: dict[str, Any]) -> None:
    """Train as one rank of Ray Train's process group. A checkpoint in ``out`` is continued.

    Args:
        config: ``config`` (the run as a plain dict), ``shards`` and ``out`` (paths or URIs), ``data_tasks`` (reading
            tasks at a time), ``streams`` (workers of all runs side by side, which share the object store),
            ``channel`` (the actor of a :class:`cluster.channel.DriverChannel`), ``owner`` (the owner of ``out``).
    """
    cfg = configs.build(config["config"])
    out = place(config["out"])
    context = ray.train.get_context()
    world, first = context.get_world_size(), context.get_world_rank() == 0
    channel = WorkerChannel(config["channel"])
    hooks = _hooks(channel, RayGauges(out.name, context.get_world_rank()), out, config["owner"], first=first)
    if first:
        note_placement(out)
    store = store_part(config["streams"])
    start_reading_process()

    def loader(spec: LoaderSpec) -> Iterator[Loaded]:
        asked = replace(spec, data=replace(spec.data, prefetch=cfg.cluster.prefetch_batches))
        return ray_loader(asked, tasks=config["data_tasks"], store_bytes=store)

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
            channel.send(start_record(trainer.done, world, world // max(1, context.get_local_world_size())))
        trainer.fit()
    except Interrupted as left:  # the driver asked for it; there is a checkpoint
        if first:
            channel.send(left_record(left.step))
    finally:
        channel.close()


def _hooks(channel: WorkerChannel, gauges: RayGauges, out: Place, owner: str | None, *, first: bool) -> Hooks:
    """What the trainer calls: it reports to Ray Train, to the channel (rank 0) and to the gauges."""
    logged: dict[str, float] = {}

    def on_log(step: int, values: dict[str, float]) -> None:
        gauges(step, values)
        logged.update({k: values[k] for k in COSTS if k in values})
        if first:
            channel.send(log_record(step, values))

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        if first:
            channel.send(val_record(step, metrics))
        ray.train.report({**metrics, **logged, "step": float(step), EVALUATED: 1.0})

    def on_checkpoint(step: int, where: Place | None, metrics: dict[str, float]) -> None:
        if where is not None:
            channel.send(checkpoint_record(checkpoint.step_of(where.name), where))
        path = where.local if where is not None else None
        ray.train.report(
            {**metrics, "step": float(step), EVALUATED: 0.0},
            checkpoint=None if path is None else Checkpoint.from_directory(path),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    return Hooks(
        on_eval=on_eval,
        on_checkpoint=on_checkpoint,
        on_log=on_log,
        on_event=lambda text: channel.send(event_record(text)),
        stop=channel.stop_requested,
        before_write=fence(out, owner) if owner else nothing,
    )
