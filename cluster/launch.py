"""Ray around the trainer: connect, run, run again with what is left, and hand errors back."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

from cluster.connect import begin_watched, connect, reason
from cluster.line import Line
from cluster.preflight import Capacity, capacity, check_fits, data_tasks, sizes, worker_resources
from ugrl import config as configs
from ugrl.config import Config
from ugrl.errors import ClusterError, ConfigError, NoRoomError, UgrlError
from ugrl.hear import descendants, end
from ugrl.storage import Place, StorageError, place
from ugrl.train import checkpoint
from ugrl.train.interrupt import Interrupted

SNAPSHOT = "checkpoint_manager_snapshot.json"
# Holds the workers' placement group, and says that they have begun.
PLACEMENT = ".placement_group"
# An elastic run that may have more workers looks for room this often, and wants to see it this many times in a row.
GROW_EVERY_S, GROW_LOOKS = 10.0, 3
# How much longer than for its batch (train.stall_s) a worker waits for the others.
COLLECTIVE_S = 30.0
# A killed process of a private cluster is waited for so long.
GONE_S = 5.0
# What Ray Train starts beside the workers, a process each, and this run has no use for: its batches come from streams
# of its own, and a private cluster's processes end with it.
NEEDLESS, NEEDLESS_ALONE = {"DatasetsCallback"}, {"PlacementGroupCleanerCallback"}

ENVIRONMENT = {
    # The controller asks workers for news this often; at the default of 2 s every report waits for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Paths in a configuration count from where the command was started, in every process.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Leave CUDA_VISIBLE_DEVICES alone in processes without a GPU: Ray's coming default.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # On nodes that this process starts: a reading process that rests for a second between two blocks is not ended and
    # started anew.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def start_ray(address: str | None = None, origin: str = "--address", *, cpus: int | None = None) -> Capacity:
    """Connect to a cluster, or start a private one on this machine.

    Args:
        address: Of a running cluster; ``None`` takes ``RAY_ADDRESS`` where it is set (as in
            ``ray job submit``), and else starts Ray here, for this process alone.
        origin: What gave the address, for messages.
        cpus: Logical CPUs of a private cluster; all of the machine's by default.

    Returns:
        What the cluster has.

    Raises:
        ConfigError: Nothing answers at ``address``, or Ray cannot start here.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if not ray.is_initialized():
        connect(address, origin, cpus=cpus)
    # What goes wrong comes back as an exception, and Tune would also print it with its traceback.
    for name in ("ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return capacity()


def stop_ray() -> None:
    """Disconnect; a private cluster ends with it.

    Nobody else uses its processes: they are killed. Ray asks one after the other to leave, and waits up to a second
    for each.
    """
    node = ray._private.worker._global_node
    if not is_private():
        ray.shutdown()
        return
    ray._private.worker._global_node = None  # so that what follows only disconnects
    ray.shutdown()
    with suppress(Exception):  # what it put on the disk
        node.destroy_external_storage()
    begun = [info.process for infos in node.all_processes.values() for info in infos]
    roots = [process.pid for process in begun if process.poll() is None]
    end([*roots, *descendants(roots)])
    for process in begun:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GONE_S)


def _silent(_: str) -> None:
    return None


@dataclass(slots=True)
class Attempt:
    """One start of the workers.

    Attributes:
        workers: How many.
        trainer: Ray's.
        line: To them.
        grew: Set once they were asked to leave since there is room for more of them.
    """

    workers: int
    trainer: TorchTrainer
    line: Line
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
    line: Line | None = None,
    say: Callable[[str], None] = _silent,
    owner: str | None = None,
) -> dict[str, float]:
    """Run the trainer on workers of Ray Train, fed by Ray Data.

    The folder ends up as a run of one process leaves it: ``config.yaml``, ``metrics.jsonl``, ``tb``
    and ``checkpoints/step_…`` under ``out``. Workers that die are replaced and the run goes on from
    its last checkpoint, ``cluster.max_failures`` times. Where ``cluster.min_workers`` allows fewer workers, it
    goes on with those that still fit, and takes more again when there is room; the global batch stays, so only
    numbers of workers that divide it are used.

    Args:
        cfg: The run.
        shards: A prepared folder, visible on every node.
        out: The run's folder, visible on every node; a checkpoint in it is continued.
        workers: Training workers, the most of them.
        callbacks: Ray Train's ``UserCallback`` objects.
        groups: Runs that share the cluster side by side; each leaves the others their share.
        max_failures: Instead of ``cluster.max_failures``.
        line: To the workers: what they tell, and how they are stopped; one is opened without it.
        say: Told in one line what happened to the workers.
        owner: Of the folder (:attr:`ugrl.ownership.Ownership.id`): its workers leave once another one owns it.

    Returns:
        Metrics of the last validation.

    Raises:
        UgrlError: What a worker raised as bad input, or one line on how the run failed.
        Interrupted: The workers were asked to stop, and did after a checkpoint.
        KeyboardInterrupt: Ray was told to stop them.
    """
    shards, out = place(shards), place(out)
    if out.local is not None:
        out.local.mkdir(parents=True, exist_ok=True)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{cfg.cluster.start_timeout_s:g}"
    # A worker that is stopped or cut off answers nobody; its partners wait in a collective.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{cfg.train.stall_s:g}"
    if is_private():  # nobody takes this machine's nodes away one by one
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        begin_helpers()
    own = line is None
    line = line or Line.open()
    try:
        number = check_fits(cfg, workers, capacity(), groups=groups)
        while True:
            made = _attempt(cfg, shards, out, number, line, callbacks, groups, max_failures, owner)
            try:
                with begin_watched((out / PLACEMENT).exists, cfg.cluster.start_timeout_s + cfg.train.stall_s, say):
                    _run(made, cfg, workers, groups)
            except ray.train.TrainingFailedError as error:
                number = _fewer(error, cfg, number, groups, out, say)
                continue
            except ray.exceptions.RayError as error:  # the controller, or the node that it and the driver are on
                raise ClusterError(
                    f"run '{out.name}': Ray itself failed: {reason(error)}; continue with --resume"
                ) from None
            found = checkpoint.latest(out)
            state = checkpoint.read_state(found) if found is not None else None
            if state is not None and state.step >= cfg.train.steps:
                return dict(state.metrics)
            if not made.grew.is_set():
                raise Interrupted(state.step if state else 0)
            number = check_fits(cfg, workers, capacity(), groups=groups)
            say(f"there is room again: going on with {number} workers")
            line.resume()
    finally:
        if own:
            line.close()
        _tidy(out)


def _attempt(
    cfg: Config,
    shards: Place,
    out: Place,
    workers: int,
    line: Line,
    callbacks: Sequence[Any],
    groups: int,
    max_failures: int | None,
    owner: str | None,
) -> Attempt:
    have = capacity()
    # Ray Train would continue what this file lists; what counts here is OUT/checkpoints.
    (out / SNAPSHOT).delete()
    (out / PLACEMENT).delete()  # until there are workers
    each = worker_resources(cfg, have)
    filesystem, path = out.parent.filesystem()
    backend = None if cfg.cluster.backend == "auto" else cfg.cluster.backend
    trainer = _Trainer(
        _train_worker,
        train_loop_config={
            "config": configs.to_dict(cfg),
            "shards": shards.where,
            "out": out.where,
            "data_tasks": data_tasks(cfg, workers, have, groups=groups),
            "streams": groups * workers,
            "line": line.handle,
            "owner": owner,
        },
        # Longer than a worker waits for its batch: the one that hangs is to be named, not those that wait for it.
        torch_config=TorchConfig(backend=backend, timeout_s=math.ceil(cfg.train.stall_s + COLLECTIVE_S)),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in each, resources_per_worker=each),
        run_config=RunConfig(
            storage_path=path,
            storage_filesystem=None if out.local is not None else filesystem,
            name=out.name,
            failure_config=FailureConfig(
                max_failures=cfg.cluster.max_failures if max_failures is None else max_failures,
                # A group that cannot be placed again is for us to decide on, not to be tried for ever.
                controller_failure_limit=0,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=list(callbacks),
        ),
    )
    return Attempt(workers, trainer, line)


class _Trainer(TorchTrainer):
    """Ray's, without helpers that this run has no use for."""

    def _create_default_callbacks(self) -> list[Any]:
        needless = NEEDLESS | (NEEDLESS_ALONE if is_private() else set())
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in needless]

    def _initialize_and_run_controller(self, **more: Any) -> Any:
        if is_private() and type(more.get("scaling_policy")) is FixedScalingPolicy:
            more["scaling_policy"] = _Fixed(self.scaling_config)
        return super()._initialize_and_run_controller(**more)


class _Fixed(FixedScalingPolicy):
    """Ray's, for a cluster that cannot grow: nobody is asked for more nodes, and no process is started for that."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing to ask for."""

    def _maybe_send_resource_request(self) -> None:
        pass


def begin_helpers() -> None:
    """Have Ray Data's two actors started while Ray Train starts; it would start them, and wait, at the first batch.

    On a cluster of this process alone: they take processes that Ray has started already.
    """
    with suppress(ImportError, AttributeError):  # Ray's own business
        from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
        from ray.data._internal.stats import get_or_create_stats_actor

        get_or_create_autoscaling_coordinator()
        get_or_create_stats_actor()


def is_private() -> bool:
    """Whether the cluster was started by this process, for itself alone."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def _train_worker(config: dict[str, Any]) -> None:
    from cluster.worker import train_worker

    train_worker(config)


def _run(made: Attempt, cfg: Config, most: int, groups: int) -> None:
    """Run one start of the workers to its end, and watch for room where there may be more of them."""
    ended = threading.Event()
    larger = [n for n in sizes(cfg, most) if n > made.workers]

    def look() -> None:
        seen = 0
        while larger and not ended.wait(GROW_EVERY_S):
            seen = seen + 1 if _room(cfg, made.workers, larger, groups) else 0
            if seen >= GROW_LOOKS:
                made.grew.set()
                made.line.stop()
                return

    thread = threading.Thread(target=look, name="grow", daemon=True)
    thread.start()
    try:
        made.trainer.fit()
    except SystemExit:  # how Ray Train's own handler of Ctrl-C ends, after it has stopped the workers
        raise KeyboardInterrupt from None
    finally:
        ended.set()
        thread.join(timeout=5)


def _room(cfg: Config, workers: int, larger: Sequence[int], groups: int) -> bool:
    """Whether a larger number of workers would fit, counting what the present ones hold."""
    have = capacity()
    free = ray.available_resources()
    for number in larger:
        try:
            check_fits(replace(cfg, cluster=replace(cfg.cluster, min_workers=0)), number, have, groups=groups)
        except ConfigError:
            continue
        each = worker_resources(cfg, have)
        if all((number - workers) * v <= free.get(k, 0.0) + 1e-6 for k, v in each.items()):
            return True
    return False


def _fewer(
    error: ray.train.TrainingFailedError, cfg: Config, number: int, groups: int, out: Place, say: Callable[[str], None]
) -> int:
    """With how many workers a run goes on whose workers could not be started again.

    Raises:
        UgrlError: With none: the run failed otherwise, or may not have fewer.
    """
    why = getattr(error, "controller_failure", None)
    if type(why).__name__ not in ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"):
        raise _plain(error, out) from None
    have, wait = capacity(), cfg.cluster.start_timeout_s
    text = f"{number} workers could not be started in {wait:g} s; the cluster has {have} now"
    for smaller in sizes(cfg, number)[1:]:
        try:
            check_fits(replace(cfg, cluster=replace(cfg.cluster, min_workers=0)), smaller, have, groups=groups)
        except ConfigError:
            continue
        say(f"{text}: going on with {smaller} workers")
        return smaller
    raise NoRoomError(
        f"run '{out.name}': {text}; continue with --resume when they fit, or with fewer: --workers N, or "
        "cluster.min_workers for a run that does so by itself"
    ) from None


def _tidy(out: Place) -> None:
    for leftover in (SNAPSHOT, PLACEMENT, ".validate_storage_marker"):
        try:
            (out / leftover).delete()
        except StorageError:
            return


def _plain(error: Exception, out: Place) -> UgrlError:
    """One line for a failed run: the bad input a worker met, else the first worker's last words."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {}) or {}
    causes = [_root(failure) for _, failure in sorted(failures.items())]
    for cause in causes:
        if isinstance(cause, UgrlError):
            return cause
    text = str(causes[0] if causes else getattr(error, "controller_failure", error)).strip()
    line = text.splitlines()[-1] if text else type(error).__name__
    rank = f"worker {min(failures)}" if failures else "the controller"
    if causes and _lost(causes[0]):
        return ClusterError(f"run '{out.name}': {rank} was lost: {line}; continue with --resume")
    return UgrlError(f"run '{out.name}': {rank} failed: {line}")


def _lost(error: BaseException) -> bool:
    """Whether a worker ended with its process, its node or its partners, and not by a fault of its own."""
    names = {kind.__name__ for kind in type(error).__mro__}
    hung = bool(names & {"WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError", "DistError"})
    return hung or isinstance(error, ray.exceptions.RayError) or "gloo/transport" in str(error)


def _root(error: BaseException) -> BaseException:
    for name in ("_base_exc", "cause", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _root(inner)
    return error
