"""One training run on workers of Ray Train: start them, start again what is left of them, and pass errors on."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from cluster.capacity import capacity, check_fits, data_tasks, worker_resources
from cluster.channel import DriverChannel
from cluster.connect import reason
from cluster.elastic import smaller, watch_for_room
from cluster.failures import as_ours, not_started
from cluster.placement_groups import PLACEMENT
from cluster.ray_internals import SNAPSHOT, STORAGE_MARKER, is_private, start_data_actors, torch_trainer
from cluster.watchdog import startup_watched
from ugrl import config as configs
from ugrl.config import Config
from ugrl.errors import ClusterError, NoRoomError
from ugrl.storage import Place, StorageError, place
from ugrl.train import checkpoint
from ugrl.train.interrupt import Interrupted

# A worker waits for the others this much longer than for its own batch (train.stall_s).
COLLECTIVE_S = 30.0


def _silent(_: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Launch:
    """A run and how it is started; the arguments of :func:`launch`."""

    cfg: Config
    shards: Place
    out: Place
    workers: int
    channel: DriverChannel
    callbacks: Sequence[Any]
    groups: int
    max_failures: int
    say: Callable[[str], None]
    owner: str | None


@dataclass(slots=True)
class Attempt:
    """One start of a run's workers.

    Attributes:
        workers: Number of workers.
        grew: Set when the workers were asked to leave because there is room for more of them.
    """

    workers: int
    grew: threading.Event = field(default_factory=threading.Event)


def launch(
    cfg: Config,
    *,
    shards: str | Path | Place,
    out: str | Path | Place,
    workers: int,
    callbacks: Sequence[Any] = (),
    groups: int = 1,
    max_failures: int | None = None,
    channel: DriverChannel | None = None,
    say: Callable[[str], None] = _silent,
    owner: str | None = None,
) -> dict[str, float]:
    """Run the trainer on workers of Ray Train, fed by Ray Data.

    The folder looks as after a run of one process: ``config.yaml``, ``metrics.jsonl``, ``tb`` and
    ``checkpoints/step_…`` under ``out``. Workers that die are replaced, ``cluster.max_failures`` times; the run goes
    on from its last checkpoint. Where ``cluster.min_workers`` allows fewer workers, the run goes on with as many as
    still fit, and takes more again when there is room. The global batch stays the same, so only numbers of workers that
    divide it are used.

    Args:
        cfg: The run's configuration.
        shards: A prepared folder that every node sees.
        out: The run's folder, which every node sees. A checkpoint in it is continued.
        workers: The largest number of training workers.
        callbacks: ``UserCallback`` objects of Ray Train.
        groups: Number of runs that share the cluster side by side. Each leaves the others their share.
        max_failures: Replaces ``cluster.max_failures``.
        channel: Carries the workers' records, and the request to stop. Without it, one is opened here.
        say: Gets one line when the number of workers changes.
        owner: The folder's owner (:attr:`ugrl.ownership.Ownership.id`). The workers leave when another one owns it.

    Returns:
        Metrics of the last validation.

    Raises:
        UgrlError: A worker met bad input, or the run failed; the message is one line.
        Interrupted: The workers were asked to stop, and did after a checkpoint.
        KeyboardInterrupt: Ray was asked to stop the workers.
    """
    shards, out = place(shards), place(out)
    own = channel is None
    channel = channel or DriverChannel.open()
    run = Launch(
        cfg=cfg,
        shards=shards,
        out=out,
        workers=workers,
        channel=channel,
        callbacks=callbacks,
        groups=groups,
        max_failures=cfg.cluster.max_failures if max_failures is None else max_failures,
        say=say,
        owner=owner,
    )
    try:
        _prepare(run)
        return _attempts(run)
    finally:
        if own:
            channel.close()
        _clean(run.out)


def _prepare(run: Launch) -> None:
    if run.out.local is not None:
        run.out.local.mkdir(parents=True, exist_ok=True)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{run.cfg.cluster.start_timeout_s:g}"
    # A worker that is stopped or cut off does not answer, and its partners wait in a collective.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{run.cfg.train.stall_s:g}"
    if is_private():  # its one node is not taken away alone
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        start_data_actors()


def _attempts(run: Launch) -> dict[str, float]:
    """Start workers until the run has ended; returns the metrics of its last validation."""
    number = check_fits(run.cfg, run.workers, capacity(), groups=run.groups)
    while True:
        attempt = Attempt(number)
        try:
            _attempt(run, attempt)
        except ray.train.TrainingFailedError as error:
            if not not_started(error):
                raise as_ours(error, run.out) from None
            number = _fewer(run, number)
            continue
        except ray.exceptions.RayError as error:  # the controller died, or the node with the controller and the driver
            raise ClusterError(
                f"run '{run.out.name}': Ray itself failed: {reason(error)}; continue with --resume"
            ) from None
        found = checkpoint.latest(run.out)
        state = checkpoint.read_state(found) if found is not None else None
        if state is not None and state.ends(run.cfg.train.steps):
            return dict(state.metrics)
        if not attempt.grew.is_set():
            raise Interrupted(state.step if state else 0)
        number = check_fits(run.cfg, run.workers, capacity(), groups=run.groups)
        run.say(f"there is room again: going on with {number} workers")
        run.channel.withdraw_stop()


def _attempt(run: Launch, attempt: Attempt) -> None:
    """Start the workers once, and wait until they have ended."""
    trainer = _trainer(run, attempt.workers)

    def leave() -> None:
        attempt.grew.set()
        run.channel.request_stop()

    wait_s = run.cfg.cluster.start_timeout_s + run.cfg.train.stall_s
    with (
        startup_watched((run.out / PLACEMENT).exists, wait_s, run.say),
        watch_for_room(run.cfg, attempt.workers, run.workers, groups=run.groups, found=leave),
    ):
        try:
            trainer.fit()
        except SystemExit:  # how Ray Train's own handler of Ctrl-C ends, after it has stopped the workers
            raise KeyboardInterrupt from None


def _trainer(run: Launch, workers: int) -> Any:
    cfg, out, have = run.cfg, run.out, capacity()
    # Ray Train would continue from what this file lists, but the run continues from OUT/checkpoints.
    (out / SNAPSHOT).delete()
    (out / PLACEMENT).delete()  # until there are workers
    each = worker_resources(cfg, have)
    filesystem, path = out.parent.filesystem()
    return torch_trainer(
        train_loop_per_worker=_train_worker,
        train_loop_config={
            "config": configs.to_dict(cfg),
            "shards": run.shards.where,
            "out": out.where,
            "data_tasks": data_tasks(cfg, workers, have, groups=run.groups),
            "streams": run.groups * workers,
            "channel": run.channel.actor,
            "owner": run.owner,
        },
        torch_config=TorchConfig(
            backend=None if cfg.cluster.backend == "auto" else cfg.cluster.backend,
            # Longer than a worker waits for its batch: the error then names the worker that hangs, not its partners.
            timeout_s=math.ceil(cfg.train.stall_s + COLLECTIVE_S),
        ),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in each, resources_per_worker=each),
        run_config=RunConfig(
            storage_path=path,
            storage_filesystem=None if out.local is not None else filesystem,
            name=out.name,
            failure_config=FailureConfig(
                max_failures=run.max_failures,
                # Ray Train would try for ever to place a group again. This module decides instead.
                controller_failure_limit=0,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=list(run.callbacks),
        ),
    )


def _train_worker(config: dict[str, Any]) -> None:
    from cluster.worker import train_worker  # the driver does not need torch's data modules

    train_worker(config)


def _fewer(run: Launch, number: int) -> int:
    """The number of workers to go on with when ``number`` workers could not be started again.

    Raises:
        NoRoomError: The run may not have fewer, or no smaller number fits.
    """
    have, wait_s = capacity(), run.cfg.cluster.start_timeout_s
    text = f"{number} workers could not be started in {wait_s:g} s; the cluster has {have} now"
    fewer = smaller(run.cfg, number, have, groups=run.groups)
    if fewer is None:
        raise NoRoomError(
            f"run '{run.out.name}': {text}; continue with --resume when they fit, or with fewer: --workers N, or "
            "cluster.min_workers for a run that does so by itself"
        ) from None
    run.say(f"{text}: going on with {fewer} workers")
    return fewer


def _clean(out: Place) -> None:
    for leftover in (SNAPSHOT, PLACEMENT, STORAGE_MARKER):
        try:
            (out / leftover).delete()
        except StorageError:
            return
