"""Between the ledger, which decides, and Ray Tune, which places trials and runs them.

Tune's own snapshots are neither written nor read: the study's storage is the record, and Tune is started anew from it.
The end of processes that rest is private to Ray Tune, and used only here; what is private to the rest of Ray is in
:mod:`cluster.ray_internals`. It was written for the version :data:`MADE_FOR`; ``tests/test_versions.py`` fails with
another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuning.ledger.ledger import FINISHED, Ledger
from ugrl import config as configs
from ugrl.errors import ConfigError, UgrlError

# The version of Ray whose private attributes are used below.
MADE_FOR = "2.60"


# -- what is private to Ray --------------------------------------------------------------------------


def free_resources() -> dict[str, dict[str, float]]:
    """Node → what it has free now, by the names of Ray's resources."""
    from cluster.ray_internals import available_resources_per_node

    return dict(available_resources_per_node())


def _end_resting_processes(controller: Any) -> None:
    """Have Tune end the processes that it keeps for another trial."""
    if not hasattr(controller, "_cleanup_cached_actors"):
        raise UgrlError(_other("TuneController._cleanup_cached_actors"))
    controller._cleanup_cached_actors(force_all=True)


def _other(name: str) -> str:
    return f"ray {ray.__version__} has no {name}; ugrl-tune was made for ray {MADE_FOR}: install ray=={MADE_FOR}.*"


# -- Tune's searcher and scheduler -------------------------------------------------------------------


class StudySearch(Searcher):
    """Tune's searcher: asks the ledger for trials, and tells it how they ended.

    Args:
        ledger: Hands out this driver's trials, and judges them.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(metric=None, mode=None)
        self.ledger = ledger

    def __getstate__(self) -> dict[str, Any]:
        """Nothing goes into Tune's snapshots."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """Nothing to set: metric, mode and space are the study's."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial.

        Where the ledger has nothing to do, Tune is ended: what others run is waited for outside of Tune, which hears no
        signal meanwhile.
        """
        task = self.ledger.take(trial_id)
        return Searcher.FINISHED if task == FINISHED else task

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: the scheduler has told the ledger already, before it decided."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell the ledger that a trial has ended."""
        self.ledger.end(trial_id, died=error)

    def save(self, checkpoint_path: str) -> None:
        """Write no snapshot: the study's storage is the record."""
        Path(checkpoint_path).write_text("the study's storage is the record\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a search is resumed from the study's storage."""
        raise ConfigError(f"{checkpoint_path}: not a snapshot; resume with ugrl-tune --resume")


class StudyScheduler(FIFOScheduler):
    """Tune's scheduler: asks the ledger whether a trial that has just reported is to be stopped.

    Args:
        ledger: Hands out this driver's trials, and judges them.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __getstate__(self) -> dict[str, Any]:
        """Nothing goes into Tune's snapshots."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: tune.experiment.Trial, result: dict[str, Any]) -> str:
        """``STOP`` or ``CONTINUE``."""
        stop = self.ledger.judge(trial.trial_id, result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> tune.experiment.Trial | None:
        """The next pending trial; those that find no place are given back first."""
        late = set(self.ledger.processes.unplaced())
        for trial in list(tune_controller.get_trials()) if late else []:
            if trial.trial_id in late and trial.status == tune.experiment.Trial.PENDING:
                self.ledger.give_back(trial.trial_id)
                tune_controller.stop_trial(trial)
        if self.ledger.processes.end_resting():
            _end_resting_processes(tune_controller)  # others may want what they hold
        return super().choose_trial_to_run(tune_controller)


# -- Tune's callbacks --------------------------------------------------------------------------------


class Observer(Protocol):
    """Hears what happens to the trials that Tune runs. ``key`` is Tune's name of a trial."""

    def started(self, key: str) -> None:
        """A trial has got its resources."""

    def reported(self, key: str, result: Mapping[str, Any]) -> None:
        """A trial has validated."""

    def stepped(self) -> None:
        """Tune has looked around once more."""

    def ended(self, key: str) -> None:
        """A trial has ended, by itself, stopped, or with its process; the ledger knows it."""


class _Events(tune.Callback):
    """Tune's callback: passes what happens on to the ledger and the observers."""

    def __init__(self, ledger: Ledger, observers: Sequence[Observer]) -> None:
        self.ledger, self.observers = ledger, observers

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ledger.processes.placed(trial.trial_id)  # what a trial holds counts from now on
        for each in self.observers:
            each.started(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        for each in self.observers:
            each.reported(trial.trial_id, result)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for each in self.observers:
            each.stepped()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial.trial_id)

    def _ended(self, key: str) -> None:
        for each in self.observers:
            each.ended(key)
        if self.ledger.search.space.workers > 1 and key in self.ledger.numbers:
            _free_workers(self.ledger.queue.folder(self.ledger.numbers[key]))


def _free_workers(folder: Path) -> None:
    """Give back what the workers of a trial hold: a driver of Ray Train that Tune stops is killed, not asked."""
    from cluster.placement_groups import free_placement

    for run_folder in folder.glob("seed_*"):
        free_placement(run_folder)


# -- a session ---------------------------------------------------------------------------------------


def run_session(
    ledger: Ledger, name: str, *, side_by_side: int, observers: Sequence[Observer] = (), reuse: bool = True
) -> None:
    """Have Tune run trials until this driver has nothing to begin.

    Args:
        ledger: Hands out this driver's trials, and judges them.
        name: Of the session, another one each time: Tune would mix a known one with what it finds there.
        side_by_side: Trials at a time.
        observers: Told what happens.
        reuse: Whether a process is used again for the next trial.
    """
    search = ledger.search
    ledger.processes.none_yet()
    sessions = search.out / "tune"
    sessions.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the trainer writes its own logs
    tune.Tuner(
        tune.with_resources(_trainable(ledger, side_by_side), _placement(ledger)),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            max_concurrent_trials=side_by_side,
            search_alg=StudySearch(ledger),
            scheduler=StudyScheduler(ledger),
            # A driver of Ray Train is killed when it is stopped: it waits for its workers and hears nothing.
            reuse_actors=reuse and search.space.workers == 1,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(sessions),
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),  # the ledger's to repair
            callbacks=[_Events(ledger, observers)],
            verbose=0,
        ),
    ).fit()


def _placement(ledger: Ledger) -> dict[str, float] | tune.PlacementGroupFactory:
    if ledger.search.space.workers > 1:
        # Tune wants some resource from every trial; the driver only waits for its workers.
        return {"cpu": 0, "memory": 2**20}
    return {"cpu": ledger.cpus, "gpu": ledger.gpus}


def _trainable(ledger: Ledger, groups: int) -> Callable[[dict[str, Any]], None]:
    """The function that a trial runs.

    What it needs goes through Ray's object store: Tune pickles the function itself into the search's folder, where
    credentials of the configuration have no place.
    """
    search = ledger.search
    space = search.space
    costs = {*(o.name for o in search.objectives), *(c.name for c in space.constraints)}
    shared = {
        "base": configs.to_dict(search.base),
        "split": space.split,
        "shards": search.shards.where,
        "workers": space.workers,
        "cpus": ledger.cpus,
        "gpus": ledger.gpus,
        "groups": groups,
        "flops": "gflop" in costs or space.paper == "fig7",
    }

    def trial(task: dict[str, Any], shared: dict[str, Any]) -> None:
        from tuning.run.trial import run_trial

        # Read by Tune in this process: a trial that is stopped ends its step and closes its files before the process
        # takes the next one. After the two seconds of the default, Tune would drop the next one instead.
        os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "300")
        run_trial(task, shared, tune.report)

    return tune.with_parameters(trial, shared=shared)
