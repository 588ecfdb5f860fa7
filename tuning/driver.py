"""The search itself: Ray Tune runs the trials that the study hands out, until none is left.

A search has two parts. The first spends the budget. The second, where ``final.best`` asks for it, is a study of its own
beside it, whose trials are (candidate, seed): the best configurations again with seeds that nothing was chosen by,
measured on the untouched split too.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState
from ray import tune

from cluster.capacity import Capacity
from tuning.lease import Lease, once
from tuning.options import Repeats, Scheduler
from tuning.placement import Room, concurrent_trials, held
from tuning.record import TrialRow, ranked, read_trials
from tuning.search import Search
from tuning.searcher import IDLE_S, StudyScheduler, StudySearch, patiently
from tuning.study import FINALS, PLANNED, is_spent, study_name
from ugrl import config as configs
from ugrl.errors import ConfigError, NoRoomError, UgrlError
from ugrl.hear import SIGNALS
from ugrl.ownership import FOLDER, own
from ugrl.storage import place
from ugrl.train import checkpoint
from ugrl.train.interrupt import Interrupted

# The seeds of the final runs begin so far above the search's own.
FRESH = 1000
READY = "ready"
# How long the end of a process that Tune has ended is waited for, in seconds.
SWEEP_S = 2.0


def _silent(_: str) -> None:
    return None


def _nothing() -> None:
    return None


def run_search(
    search: Search,
    study: optuna.Study,
    have: Capacity,
    lease: Lease,
    *,
    callbacks: Sequence[tune.Callback] = (),
    reuse: bool = True,
    patience_s: float = math.inf,
    say: Callable[[str], None] = _silent,
) -> StudySearch:
    """Run what is left of a search's budget; returns when it is spent or the user interrupts.

    Args:
        search: The search.
        study: From :func:`tuning.study.open_study`.
        have: The cluster.
        lease: This driver's.
        callbacks: Tune callbacks; one with an attribute ``searcher`` is given the searcher.
        reuse: Whether a process is used again for the next trial.
        patience_s: Of :func:`wait_for_work`.
        say: Told in one line what is waited for.

    Returns:
        The searcher; ``halted`` says why it stopped early, if it did.
    """
    cpus, gpus = held(search, have)
    searcher = StudySearch(study, search, lease, cpus=cpus, gpus=gpus)
    run(searcher, have, callbacks=callbacks, reuse=reuse, patience_s=patience_s, say=say)
    return searcher


def run(
    searcher: StudySearch,
    have: Capacity,
    *,
    callbacks: Sequence[tune.Callback] = (),
    reuse: bool = True,
    patience_s: float = math.inf,
    say: Callable[[str], None] = _silent,
) -> None:
    """Let Ray Tune run what a searcher hands out.

    Raises:
        Interrupted: It was; trials that were running are still the searcher's.
        NoRoomError: A disk has been full for longer than its trials wait; they are in the queue again.
    """
    search = searcher.search
    side_by_side = concurrent_trials(search, have)
    callbacks = [_Clock(searcher), *callbacks]
    callbacks += [_Free(searcher)] if search.space.workers > 1 else []
    for callback in callbacks:
        if hasattr(callback, "searcher"):
            callback.searcher = searcher
    searcher.room = Room(search, have)
    with _Stop(searcher, search.base.cluster.stop_s) as stop:
        while wait_for_work(searcher, patience_s=patience_s, say=say):
            _session(searcher, side_by_side, callbacks, reuse)
    if searcher.full:
        searcher.patiently(searcher.leave)
        raise NoRoomError(searcher.full)
    if stop.asked or searcher.jobs:  # Tune returns from an interrupt as if nothing had been
        raise Interrupted(0, stop.number)
    sweep_stopped(searcher)


def sweep_stopped(searcher: StudySearch) -> None:
    """Take away what the processes of trials that were stopped early left half-done.

    Tune ends a process that gets no other trial at once; it may own the run of the last one still, or write to it.
    """
    for trial in searcher.study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)):
        for run_folder in searcher.folder(trial.number).glob("seed_*"):
            if any(run_folder.glob(f"{FOLDER}/*.json")) or any(run_folder.glob("checkpoints/.*")):
                try:
                    with own(place(run_folder), patience_s=SWEEP_S):
                        checkpoint.sweep(run_folder / "checkpoints")
                except (UgrlError, OSError):
                    continue  # the process of another driver, which comes here as well


def wait_for_work(searcher: StudySearch, *, patience_s: float, say: Callable[[str], None]) -> bool:
    """Wait until this driver can begin a trial, or nothing is left that it might have to begin.

    Outside of Tune, which would hold processes, and hear no signal, while it waits.

    Args:
        searcher: Over the study.
        patience_s: How long room is waited for while no driver gets on with the search; ``inf`` for ever.
        say: Told in one line what is waited for.

    Returns:
        Whether there is something to begin.

    Raises:
        NoRoomError: It was not there by then.
    """
    told, since = "", time.monotonic()
    while not searcher.closing:
        waiting, running = searcher.patiently(searcher.outlook)
        if not waiting and not running:
            return False
        if waiting and searcher.has_room():
            return True
        if not waiting:
            text, since = f"{running} trials run for other drivers; waiting for them to end", time.monotonic()
        else:
            text = f"{waiting} trials wait; no room for one now"
            if running:
                since = time.monotonic()
            elif time.monotonic() - since > patience_s:
                raise NoRoomError(
                    f"{text}, for {patience_s:g} s (cluster.busy_s): other work holds the cluster; continue with "
                    "--resume, or wait as long as it takes with --wait"
                )
            else:
                limit = "as long as it takes" if math.isinf(patience_s) else f"up to {patience_s:g} s (cluster.busy_s)"
                text += f"; waiting {limit}"
        if text != told:
            say(text)
            told = text
        time.sleep(IDLE_S)
    return False


def _session(searcher: StudySearch, side_by_side: int, callbacks: list[tune.Callback], reuse: bool) -> None:
    """Have Tune run trials until this driver has nothing to begin."""
    search = searcher.search
    searcher.open_session()
    sessions = search.out / "tune"
    sessions.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the trainer writes its own logs
    tune.Tuner(
        tune.with_resources(_trainable(searcher, side_by_side), _placement(searcher)),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            max_concurrent_trials=side_by_side,
            search_alg=searcher,
            scheduler=StudyScheduler(searcher),
            # A driver of Ray Train is killed when it is stopped: it waits for its workers and hears nothing.
            reuse_actors=reuse and search.space.workers == 1,
        ),
        run_config=tune.RunConfig(
            # A name of its own for each session: Tune would mix a reused one with what it finds there.
            name=f"session_{searcher.lease.id}_{searcher.session}"
            + ("_final" if isinstance(searcher, FinalSearch) else ""),
            storage_path=str(sessions),
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),  # the searcher's to repair
            callbacks=callbacks,
            verbose=0,
        ),
    ).fit()


class _Stop:
    """The first Ctrl-C or SIGTERM has trials write a checkpoint and go; the second, or ``cluster.stop_s``, ends them.

    Tune's own handler would end them at once. Tune still ends them where that is wanted, by the signal that it keeps
    for this. A third signal ends the driver.
    """

    def __init__(self, searcher: StudySearch, patience_s: float) -> None:
        self.searcher = searcher
        self.number: int | None = None
        self._timer = threading.Timer(patience_s, self._end)
        self._timer.daemon = True
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until Tune listens: it would end this process
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            self._restore()
            self._end()
            return
        self.number = number
        self.searcher.ask_to_leave()
        self._timer.start()

    def _end(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


class _Clock(tune.Callback):
    """What a trial holds counts from when it has got it."""

    def __init__(self, searcher: StudySearch) -> None:
        self._searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.placed(trial.trial_id)


class _Free(tune.Callback):
    """Give back the workers of a trial that ended: a driver that Tune stops is killed, not asked."""

    def __init__(self, searcher: StudySearch) -> None:
        self._searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._free(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._free(trial.trial_id)

    def _free(self, trial_id: str) -> None:
        from cluster.placement_groups import free_placement

        number = self._searcher.number(trial_id)
        if number is not None:
            folder = self._searcher.folder(number)
            for run_folder in folder.glob("seed_*"):
                free_placement(run_folder)


def _placement(searcher: StudySearch) -> dict[str, float] | tune.PlacementGroupFactory:
    if searcher.search.space.workers > 1:
        # Tune wants some resource from every trial; the driver only waits for its workers.
        return {"cpu": 0, "memory": 2**20}
    return {"cpu": searcher.cpus, "gpu": searcher.gpus}


def _trainable(searcher: StudySearch, groups: int) -> Callable[[dict[str, Any]], None]:
    """The function that a trial runs.

    What it needs goes through Ray's object store: Tune pickles the function itself into the search's folder, where
    credentials of the configuration have no place.
    """
    search = searcher.search
    space = search.space
    costs = {*(o.name for o in search.objectives), *(c.name for c in space.constraints)}
    shared = {
        "base": configs.to_dict(search.base),
        "split": space.split,
        "shards": search.shards.where,
        "workers": space.workers,
        "cpus": searcher.cpus,
        "gpus": searcher.gpus,
        "groups": groups,
        "flops": "gflop" in costs or space.paper == "fig7",
    }

    def trial(task: dict[str, Any], shared: dict[str, Any]) -> None:
        from tuning.trial import run_trial

        # Read by Tune in this process: a trial that is stopped ends its step and closes its files before the process
        # takes the next one. After the two seconds of the default, Tune would drop the next one instead.
        os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "300")
        run_trial(task, shared)

    return tune.with_parameters(trial, shared=shared)


# -- the final runs ------------------------------------------------------------------------------


class FinalSearch(StudySearch):
    """The searcher of the final runs: each trial is one candidate with one fresh seed.

    Args:
        points: Candidate's number → its point.
        **more: As of :class:`StudySearch`.
    """

    def __init__(self, study: optuna.Study, search: Search, lease: Lease, points: Mapping[int, Any], **more: Any):
        # A candidate is not stopped early, whatever the search's own scheduler and repeats are.
        space = replace(search.space, scheduler=Scheduler("none"), repeats=Repeats(1), constraints=())
        super().__init__(study, replace(search, space=space), lease, limit=10**9, **more)
        self.fresh = False
        self.points = points

    def point(self, trial: Trial) -> dict[str, Any]:
        """Of its candidate."""
        number = trial.suggest_int("candidate", 0, 10**6)
        if number not in self.points:
            raise ConfigError(f"final run {trial.number}: candidate {number} is no trial of the search")
        return dict(self.points[number])

    def seeds(self, trial: Trial) -> tuple[int, ...]:
        """One that the search has not seen."""
        return (trial.suggest_int("seed", 0, 2**31 - 1),)

    def measured(self) -> bool:
        """Always."""
        return True

    def exhausted(self) -> None:
        """Never: what the search was for is not left out because it was long."""
        return

    def folder(self, number: int) -> Path:
        """Beside the trials."""
        return self.search.out / "final" / f"{number:03d}"


def open_finals(search: Search, storage: BaseStorage, *, create: bool = True) -> optuna.Study | None:
    """The study of the final runs; ``None`` where there is none and none is to be made."""
    name = study_name(search.space.storage, search.out) + FINALS
    if name not in optuna.get_all_study_names(storage):
        if not create:
            return None
        try:
            optuna.create_study(storage=storage, study_name=name, directions=[o.direction for o in search.objectives])
        except optuna.exceptions.DuplicatedStudyError:
            pass  # another driver was faster
    return optuna.load_study(
        storage=storage,
        study_name=name,
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.NopPruner(),
    )


def finalists_of(search: Search, study: optuna.Study) -> list[TrialRow]:
    """The trials that are run again."""
    return ranked(read_trials(study, search.objectives), search.objectives[0])[: search.space.final.best]


def plan_finals(
    search: Search, study: optuna.Study, finals: optuna.Study, check: Callable[[], None] = _nothing
) -> None:
    """Put the final runs of the best trials into their study, waiting; calling it again adds nothing.

    ``check`` is called before each write; it raises where another driver plans by now.
    """
    best = finalists_of(search, study)
    found = finals.get_trials(deepcopy=False)
    have = {(t.params.get("candidate"), t.params.get("seed")) for t in found}
    have |= {tuple(t.system_attrs.get("fixed_params", {}).get(k) for k in ("candidate", "seed")) for t in found}
    # Seed by seed: if the time is cut short, every candidate has as many.
    for k in range(search.space.final.seeds):
        for row in best:
            made = {"candidate": row.number, "seed": search.base.seed + FRESH + k}
            if (made["candidate"], made["seed"]) not in have:
                check()
                finals.enqueue_trial(made)
    check()
    finals.set_user_attr(READY, _wanted(search, study))


def _wanted(search: Search, study: optuna.Study) -> list[Any]:
    """What the final runs are of, as the study of the final runs remembers it."""
    return [sorted(r.number for r in finalists_of(search, study)), search.space.final.seeds]


def nothing_left(search: Search, study: optuna.Study, finals: optuna.Study | None) -> bool:
    """Whether the trials of the budget and the final runs have all ended."""
    trials = study.get_trials(deepcopy=False)
    if study.user_attrs.get(PLANNED) != search.space.trials or not all(is_spent(t) for t in trials):
        return False
    if search.space.final.best == 0 or not finalists_of(search, study):
        return True
    if finals is None or finals.user_attrs.get(READY) != _wanted(search, study):
        return False
    return all(is_spent(t) for t in finals.get_trials(deepcopy=False))


def run_finals(
    search: Search, study: optuna.Study, finals: optuna.Study, have: Capacity, lease: Lease, **more: Any
) -> FinalSearch:
    """Run the best trials again with fresh seeds; as :func:`run_search`."""
    wanted = _wanted(search, study)

    def planned() -> bool:
        return bool(finals.user_attrs.get(READY) == wanted)

    patiently(
        lambda: once(search.out, lambda check: plan_finals(search, study, finals, check), planned),
        search.base.data.storage_patience_s,
    )
    points = {t.number: dict(t.params) for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE}
    cpus, gpus = held(search, have)
    searcher = FinalSearch(finals, search, lease, points, cpus=cpus, gpus=gpus)
    run(searcher, have, **more)
    return searcher
