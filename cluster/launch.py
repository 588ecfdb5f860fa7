"""Ray around the trainer: connect, check that everything fits, run, and hand errors back.

Checks come first because a cluster that is too small does not fail by itself: workers that hold
every CPU leave none for the tasks that read data, and the run waits without end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ugrl import config as configs
from ugrl.config import Config
from ugrl.errors import ConfigError, UgrlError

# At least this much stays free for the tasks that read data.
DATA_CPUS = 1.0
SNAPSHOT = "checkpoint_manager_snapshot.json"

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
}


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, as logical resources."""

    cpus: float
    gpus: float
    node_cpus: float

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.cpus:g} CPUs{gpus}"


def start_ray(address: str | None = None, *, cpus: int | None = None) -> Capacity:
    """Connect to a cluster, or start a private one on this machine.

    Args:
        address: Of a running cluster; ``None`` takes ``RAY_ADDRESS`` where it is set (as in
            ``ray job submit``), and else starts Ray here, for this process alone.
        cpus: Logical CPUs of a private cluster; all of the machine's by default.

    Returns:
        What the cluster has.

    Raises:
        ConfigError: Nothing answers at ``address``.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS") or None
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", num_cpus=cpus, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at '{address}': {str(error).splitlines()[0]}") from None
    # What goes wrong comes back as an exception, and Tune would also print it with its traceback.
    for name in ("ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return capacity()


def stop_ray() -> None:
    """Disconnect; a private cluster ends with it."""
    ray.shutdown()


def capacity() -> Capacity:
    """What the connected cluster has now; nodes that an autoscaler might add do not count."""
    total = ray.cluster_resources()
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return Capacity(total.get("CPU", 0.0), total.get("GPU", 0.0), max(nodes, default=0.0))


def worker_resources(cfg: Config, have: Capacity) -> dict[str, float]:
    """What one training worker holds; a GPU only where the cluster has any."""
    made = {"CPU": cfg.cluster.cpus_per_worker}
    if have.gpus and cfg.cluster.gpus_per_worker:
        made["GPU"] = cfg.cluster.gpus_per_worker
    return made


def check_fits(cfg: Config, workers: int, have: Capacity, *, groups: int = 1) -> None:
    """Refuse what the cluster cannot place, with the numbers.

    Args:
        cfg: The run.
        workers: Training workers of a run.
        have: The cluster.
        groups: Runs side by side.

    Raises:
        ConfigError: Too few CPUs (one must stay free for the tasks that read data) or GPUs, or a
            global batch that does not divide by the workers.
    """
    if cfg.train.global_batch % workers:
        raise ConfigError(
            f"train.global_batch is {cfg.train.global_batch}; expected a multiple of the {workers} workers"
        )
    each = worker_resources(cfg, have)
    runs = f"{groups} runs × " if groups > 1 else ""
    need = groups * workers * each["CPU"]
    if need + DATA_CPUS > have.cpus + 1e-6 or each["CPU"] > have.node_cpus + 1e-6:
        room = (have.cpus - DATA_CPUS) / (groups * workers)
        hint = f"; set cluster.cpus_per_worker={room:.2g} or less, or take fewer workers" if room > 0 else ""
        raise ConfigError(
            f"{runs}{workers} workers × {each['CPU']:g} CPU + {DATA_CPUS:g} for reading data = "
            f"{need + DATA_CPUS:g} CPUs; the cluster has {have}{hint}"
        )
    if groups * workers * each.get("GPU", 0.0) > have.gpus + 1e-6:
        raise ConfigError(
            f"{runs}{workers} workers × {each['GPU']:g} GPU = {groups * workers * each['GPU']:g} GPUs; "
            f"the cluster has {have}"
        )


def data_tasks(cfg: Config, workers: int, have: Capacity, *, groups: int = 1) -> int:
    """Reading tasks that one worker may run at a time: its share of the CPUs that the workers leave free."""
    free = have.cpus - groups * workers * cfg.cluster.cpus_per_worker
    return max(1, min(4, int(free / (groups * workers))))


def launch(
    cfg: Config,
    *,
    shards: Path,
    out: Path,
    workers: int,
    callbacks: Sequence[Any] = (),
    groups: int = 1,
    max_failures: int | None = None,
) -> dict[str, float]:
    """Run the trainer on ``workers`` workers of Ray Train, fed by Ray Data.

    The folder ends up as a run of one process leaves it: ``config.yaml``, ``metrics.jsonl``, ``tb``
    and ``checkpoints/step_…`` under ``out``. A worker that dies is replaced and the run goes on from
    its last checkpoint, ``cluster.max_failures`` times.

    Args:
        cfg: The run.
        shards: A prepared folder, visible on every node.
        out: The run's folder, visible on every node; a checkpoint in it is continued.
        workers: Training workers.
        callbacks: Ray Train's ``UserCallback`` objects.
        groups: Runs that share the cluster side by side; each leaves the others their share.
        max_failures: Instead of ``cluster.max_failures``.

    Returns:
        Metrics of the last validation.

    Raises:
        UgrlError: What a worker raised as bad input, or one line on how the run failed.
        KeyboardInterrupt: After Ctrl-C; the workers have been stopped.
    """
    from cluster.worker import EVALUATED, PLACEMENT, train_worker

    have = capacity()
    out.mkdir(parents=True, exist_ok=True)
    # Ray Train would continue what this file lists; what counts here is OUT/checkpoints.
    (out / SNAPSHOT).unlink(missing_ok=True)
    each = worker_resources(cfg, have)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": configs.to_dict(cfg),
            "shards": str(shards),
            "out": str(out),
            "data_tasks": data_tasks(cfg, workers, have, groups=groups),
        },
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in each, resources_per_worker=each),
        run_config=RunConfig(
            storage_path=str(out.parent),
            name=out.name,
            failure_config=FailureConfig(
                max_failures=cfg.cluster.max_failures if max_failures is None else max_failures,
                controller_failure_limit=1,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            callbacks=list(callbacks),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _plain(error, out) from None
    except SystemExit:  # how Ray Train's own handler of Ctrl-C ends, after it has stopped the workers
        raise KeyboardInterrupt from None
    for leftover in (SNAPSHOT, PLACEMENT, ".validate_storage_marker"):
        (out / leftover).unlink(missing_ok=True)
    metrics = {k: float(v) for k, v in (result.metrics or {}).items() if isinstance(v, int | float)}
    metrics.pop(EVALUATED, None)
    return metrics


def _plain(error: Exception, out: Path) -> UgrlError:
    """One line for a failed run: the bad input a worker met, else the first worker's last words."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {}) or {}
    causes = [_root(failure) for _, failure in sorted(failures.items())]
    for cause in causes:
        if isinstance(cause, UgrlError):
            return cause
    text = str(causes[0] if causes else getattr(error, "controller_failure", error)).strip()
    line = text.splitlines()[-1] if text else type(error).__name__
    rank = f"worker {min(failures)}" if failures else "the controller"
    return UgrlError(f"run '{out.name}': {rank} failed: {line}")


def _root(error: BaseException) -> BaseException:
    for name in ("_base_exc", "cause", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _root(inner)
    return error
