"""The final runs: the best configurations again, with seeds that nothing was chosen by, on the untouched split too.

They are a study of their own beside that of the search. Each of its trials is one candidate with one fresh seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from tuning.ledger.trial_queue import TrialQueue
from tuning.space.options import Repeats, Scheduler
from tuning.space.search import Search
from tuning.study.lease import Lease
from tuning.study.record import TrialRow, ranked, read_trials
from tuning.study.store import fixed_params, storage_of
from tuning.study.study import PLANNED, is_spent, queue, study_name
from ugrl.errors import ConfigError

# What the name of the study of the final runs ends with.
FINALS = ":final"
# The seeds of the final runs begin so far above the search's own.
FRESH = 1000
READY = "ready"


def _nothing() -> None:
    return None


def open_finals(search: Search, study: optuna.Study, *, create: bool = True) -> optuna.Study | None:
    """The study of the final runs, beside that of the search; ``None`` where there is none and none is to be made."""
    storage, name = storage_of(study), study_name(search.space.storage, search.out) + FINALS
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
    have |= {(fixed.get("candidate"), fixed.get("seed")) for fixed in map(fixed_params, found)}
    # Seed by seed: if the time is cut short, every candidate has as many.
    for k in range(search.space.final.seeds):
        for row in best:
            made = {"candidate": row.number, "seed": search.base.seed + FRESH + k}
            if (made["candidate"], made["seed"]) not in have:
                check()
                finals.enqueue_trial(made)
    check()
    finals.set_user_attr(READY, _wanted(search, study))


def finals_planned(search: Search, study: optuna.Study, finals: optuna.Study) -> bool:
    """Whether the final runs of the trials that are the best now are in their study."""
    return bool(finals.user_attrs.get(READY) == _wanted(search, study))


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
    if finals is None or not finals_planned(search, study, finals):
        return False
    return all(is_spent(t) for t in finals.get_trials(deepcopy=False))


class FinalQueue(TrialQueue):
    """The final runs that this driver may begin.

    Args:
        finals: The study of the final runs.
        search: The search.
        lease: Says which final runs this driver owns.
        study: That of the search, whose trials are the candidates.
    """

    def __init__(self, finals: optuna.Study, search: Search, lease: Lease, study: optuna.Study) -> None:
        # A candidate is not stopped early, whatever the search's own scheduler and repeats are.
        space = replace(search.space, scheduler=Scheduler("none"), repeats=Repeats(1), constraints=())
        super().__init__(finals, replace(search, space=space), lease)
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self.points = {t.number: dict(t.params) for t in complete}

    def waiting(self) -> list[FrozenTrial]:
        """All that wait: each of them was planned."""
        return queue(self.study, 10**9)

    def over_budget(self) -> None:
        """Never: what the search was for is not left out because it was long."""
        return

    def sampler(self, number: int) -> BaseSampler:
        """The study's own: all of them were planned, and nothing is sampled."""
        return self.study.sampler

    def folder(self, number: int) -> Path:
        """Beside the trials."""
        return self.search.out / "final" / f"{number:03d}"

    def point(self, trial: Trial) -> dict[str, Any]:
        """The point of its candidate.

        Raises:
            ConfigError: The candidate is no trial of the search.
        """
        number = trial.suggest_int("candidate", 0, 10**6)
        if number not in self.points:
            raise ConfigError(f"final run {trial.number}: candidate {number} is no trial of the search")
        return dict(self.points[number])

    def seeds(self, trial: Trial) -> tuple[int, ...]:
        """One that the search has not seen."""
        return (trial.suggest_int("seed", 0, 2**31 - 1),)

    def final_split(self) -> str:
        """Always the untouched one."""
        return self.search.space.final.split
