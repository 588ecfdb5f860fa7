"""The search itself: a Tuner over trials that are the trainer.

A one-worker trial is a plain function trial that runs the trainer in its own process; one with more
workers is a driver that holds no CPU and starts Ray Train, whose reports come back to Tune. Either
way Tune sees one report per validation, under the step that the trainer counts, so that a scheduler
compares like with like.
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from cluster.launch import launch
from cluster.preflight import Capacity, check_fits
from tuning.space import SearchSpace, trial_config
from tuning.study import ERROR_FILE, STEP, StudySearch, is_spent, trial_folder
from ugrl import config as configs
from ugrl.config import Config
from ugrl.errors import ConfigError, UgrlError
from ugrl.storage import Place, place


@dataclass(frozen=True)
class Search:
    """A search that was checked as a whole.

    Attributes:
        space: What is searched.
        base: The configuration that all trials share.
        shards: Prepared folder.
        objective: The metric, larger is better.
        out: The search's folder.
    """

    space: SearchSpace
    base: Config
    shards: Place
    objective: str
    out: Path


def concurrent_trials(search: Search, have: Capacity) -> int:
    """How many trials run side by side.

    Raises:
        ConfigError: Not even one trial fits the cluster, or fewer than ``concurrent`` asks for.
    """
    space, cfg = search.space, search.base
    wanted = space.concurrent
    if space.workers > 1:
        check_fits(cfg, space.workers, have, groups=max(1, wanted))
        fits = 1
        while not wanted and _fits(cfg, space.workers, have, fits + 1):
            fits += 1
        return min(wanted or fits, space.trials)
    cpus, gpus = space.resources.cpus_per_trial, space.resources.gpus_per_trial
    each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    fits = math.floor(have.cpus / cpus + 1e-6)
    if gpus:
        fits = min(fits, math.floor(have.gpus / gpus + 1e-6))
    if fits < 1 or cpus > have.node_cpus + 1e-6:
        raise ConfigError(
            f"a trial takes {each}; the cluster has {have}; lower resources.cpus_per_trial or gpus_per_trial"
        )
    if wanted > fits:
        raise ConfigError(f"{wanted} concurrent trials × {each}; the cluster has {have}: at most {fits} fit")
    return min(wanted or fits, space.trials)


def _fits(cfg: Config, workers: int, have: Capacity, groups: int) -> bool:
    try:
        check_fits(cfg, workers, have, groups=groups)
    except ConfigError:
        return False
    return True


def scheduler(search: Search) -> TrialScheduler:
    """ASHA over the trainer's own step, or none."""
    asked = search.space.scheduler
    if asked.name == "none":
        return FIFOScheduler()
    # One more than the last step: a trial that gets there ends by itself and keeps its last checkpoint.
    return ASHAScheduler(
        time_attr=STEP,
        grace_period=asked.grace_steps,
        max_t=search.base.train.steps + 1,
        reduction_factor=asked.reduction_factor,
    )


def run_search(
    search: Search, study: optuna.Study, have: Capacity, *, callbacks: Sequence[tune.Callback] = ()
) -> StudySearch:
    """Run what is left of a search's budget; returns when it is spent or the user interrupts.

    Args:
        search: The search.
        study: From :func:`tuning.study.open_study`, without RUNNING trials.
        have: The cluster.
        callbacks: Tune callbacks; one with an attribute ``searcher`` is given the searcher.

    Returns:
        The searcher, which knows the numbers of Tune's trials.
    """
    left = search.space.trials - sum(is_spent(t) for t in study.get_trials(deepcopy=False))
    searcher = StudySearch(
        study, search.space, metric=search.objective, max_step=search.base.train.steps, out=search.out
    )
    if left <= 0:
        return searcher
    side_by_side = concurrent_trials(search, have)
    callbacks = [*callbacks, _Free(search.out)] if search.space.workers > 1 else callbacks
    for callback in callbacks:
        if hasattr(callback, "searcher"):
            callback.searcher = searcher
    sessions = search.out / "tune"
    sessions.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the trainer writes its own logs
    tuner = tune.Tuner(
        tune.with_resources(_trainable(search, side_by_side), _placement(search)),
        tune_config=tune.TuneConfig(
            metric=search.objective,
            mode="max",
            num_samples=left,
            max_concurrent_trials=side_by_side,
            search_alg=searcher,
            scheduler=scheduler(search),
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            # A name of its own for each session: Tune would mix a reused one with what it finds there.
            name=f"session_{sum(1 for _ in sessions.iterdir()):03d}",
            storage_path=str(sessions),
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
            callbacks=list(callbacks),
            verbose=0,
        ),
    )
    tuner.fit()
    return searcher


class _Free(tune.Callback):
    """Give back the workers of a trial that ended: a driver that Tune stops is killed, not asked."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.searcher: StudySearch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._free(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._free(trial.trial_id)

    def _free(self, trial_id: str) -> None:
        from cluster.worker import free_placement

        number = self.searcher.number(trial_id) if self.searcher else None
        if number is not None:
            free_placement(trial_folder(self.out, number))


def _placement(search: Search) -> dict[str, float] | tune.PlacementGroupFactory:
    space = search.space
    if space.workers > 1:
        # Tune wants some resource from every trial; the driver only waits for its workers.
        return {"cpu": 0, "memory": 2**20}
    return {"cpu": space.resources.cpus_per_trial, "gpu": space.resources.gpus_per_trial}


def _trainable(search: Search, groups: int) -> Callable[[dict[str, Any]], None]:
    """The function that a trial runs. It carries plain values: it is pickled to another process."""
    shared = {
        "base": configs.to_dict(search.base),
        "split": search.space.split,
        "shards": search.shards.where,
        "out": str(search.out),
        "workers": search.space.workers,
        "cpus": search.space.resources.cpus_per_trial,
        "groups": groups,
    }

    def trial(config: dict[str, Any]) -> None:
        run_trial(config, shared)

    return trial


def run_trial(config: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    """One trial: train at a point, report each validation.

    Args:
        config: ``number`` and ``point`` as :meth:`StudySearch.suggest` gives them.
        shared: What all trials share.

    Raises:
        Exception: Whatever ended the training; its last line is left in the trial's ``error.txt``.
    """
    folder = trial_folder(Path(shared["out"]), int(config["number"]))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cfg = trial_config(configs.build(shared["base"]), config["point"], shared["split"])
        shards = place(shared["shards"])
        if shared["workers"] > 1:
            _train_on_workers(cfg, shards, folder, shared)
        else:
            _train_here(cfg, shards, folder, shared["cpus"])
    except Exception as error:
        text = str(error) if isinstance(error, UgrlError) else "".join(traceback.format_exception(error))
        (folder / ERROR_FILE).write_text(text.strip() + "\n", encoding="utf-8")
        raise


def _train_here(cfg: Config, shards: Place, folder: Path, cpus: float) -> None:
    import torch

    from ugrl.train.loop import Hooks, Trainer

    torch.set_num_threads(max(1, int(cpus)))
    since = time.monotonic()

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        tune.report({**metrics, STEP: step, "seconds": time.monotonic() - since})

    Trainer(cfg, shards=shards, out=folder, hooks=Hooks(on_eval=on_eval), quiet=True).fit()


def _train_on_workers(cfg: Config, shards: Place, folder: Path, shared: Mapping[str, Any]) -> None:
    from tuning.relay import Relay

    # An inner failure is Train's to repair; the trial fails when Train gives up.
    launch(
        cfg,
        shards=shards,
        out=folder,
        workers=shared["workers"],
        callbacks=[Relay()],
        groups=shared["groups"],
    )
