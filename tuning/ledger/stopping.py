"""What ends a trial before its last step, and a search before its last trial. Pure: the study is asked, nobody is told.

A trial ends where its score is not a number, where it breaks a constraint, where the pruner finds it weak, and where
further seeds would change nothing. A search ends where all its first trials fail for the same reason; what its budget
allows is in :mod:`tuning.study.budget`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from tuning.ledger.job import Job, Verdict
from tuning.ledger.noise import ROUNDING, Measure, difference, noise_of
from tuning.space.options import Constraint
from tuning.space.search import Search
from tuning.study.record import STEP, VIOLATION, Run, finite, read_trials

# A search whose first trials all fail for one reason is stopped after so many.
ALIKE = 3


def judge_report(job: Job, result: Mapping[str, Any], study: optuna.Study, search: Search) -> Verdict | None:
    """How a trial ends by what it has just reported; ``None`` where it goes on."""
    name, alone = search.objective, len(search.objectives) == 1
    if not finite(result.get(name)):
        why = f"is not a number at step {result.get(STEP)}" if name in result else "was not reported"
        return TrialState.FAIL, f"{name} {why}"
    if broken := mark_broken(job, result, search.space.constraints):
        # What was stopped teaches these samplers nothing: they learn from complete trials alone.
        learns = search.space.sampler.name in ("gp", "nsga2")
        return TrialState.COMPLETE if learns else TrialState.PRUNED, broken
    if not result.get("ended"):
        early = int(result.get(STEP, 0)) < search.steps  # who has come to the end is complete, rung or not
        if job.first(result) and early and alone and job.trial.should_prune():
            return TrialState.PRUNED, f"stopped by {search.space.scheduler.name} at step {result[STEP]}"
        return None
    if job.unfinished() and alone and search.space.repeats.skip and (why := why_behind(job, study, search)):
        return TrialState.COMPLETE, why
    return None


def judge_end(job: Job, search: Search) -> Verdict:
    """How a trial whose process has ended ends."""
    if job.verdict is not None and job.verdict[0] != TrialState.COMPLETE:
        return job.verdict
    missing = [o.name for o in search.objectives if job.value(o.name) is None]
    if missing or not (job.verdict or any(r.get("ended") for r in job.runs.values())):
        why = f"no validation reported {missing[0]}" if missing else "it ended before its last step"
        return TrialState.FAIL, why
    return TrialState.COMPLETE, job.verdict[1] if job.verdict else ""


# -- constraints -------------------------------------------------------------------------------------


def mark_broken(job: Job, result: Mapping[str, Any], constraints: Sequence[Constraint]) -> str:
    """Tell the sampler which constraints a report breaks; returns them in words, empty if there are none."""
    limits = {c.name: c.limit for c in constraints}
    found = {name: result.get(name, 0.0) for name in limits}
    broken = {name: float(v) for name, v in found.items() if finite(v) and float(v) > limits[name]}
    if broken:
        job.trial.set_user_attr(VIOLATION, broken)
        for name, limit in limits.items():
            job.trial.set_constraint(name, broken.get(name, limit) - limit)
    return ", ".join(f"{name} {v:.3g} is over the limit of {limits[name]:g}" for name, v in broken.items())


def mark_kept(job: Job, constraints: Sequence[Constraint]) -> None:
    """Tell the sampler how far a trial stayed below each limit."""
    for each in constraints:
        kept = job.value(each.name)
        job.trial.set_constraint(each.name, (kept if kept is not None else each.limit) - each.limit)


# -- seeds left out ----------------------------------------------------------------------------------


def why_behind(job: Job, study: optuna.Study, search: Search) -> str:
    """Why further seeds of a trial would change nothing; empty where they might.

    The mean is behind the best one's by more than two standard errors of their difference, taken seed by seed
    where enough configurations have shared seeds for that.
    """
    name, sign = search.objective, 1.0 if search.objectives[0].maximize else -1.0
    rows = [r for r in read_trials(study, search.objectives) if r.number != job.number]
    others = [(r.state, _ended(r.runs, sign)) for r in rows]
    mine = _ended([Run.read(seed, run) for seed, run in job.runs.items()], sign)
    complete = [values for state, values in others if values and state == "COMPLETE"]
    if not complete or not mine:
        return ""
    noise = noise_of([values for _, values in others])
    best = max(complete, key=lambda values: statistics.fmean(values.values()))
    if noise.paired is not None and mine.keys() <= best.keys():
        best = {seed: best[seed] for seed in mine}
    gap = difference(_mean(name, best), _mean(name, mine), noise)
    if not gap.noise.known or gap.mean <= max(2 * gap.stderr, ROUNDING):
        return ""
    how = ", seed by seed" if gap.paired else ""
    errors = gap.mean / max(gap.stderr, ROUNDING)
    return f"seeds left out after {len(mine)}: {errors:.1f} standard errors behind{how}"


def _ended(runs: Sequence[Run], sign: float) -> dict[int, float]:
    """Seed → value of the runs that reached their end, the higher the better."""
    return {r.seed: sign * r.value for r in runs if r.ended and r.value is not None}


def _mean(name: str, values: Mapping[int, float]) -> Measure:
    return Measure(name, statistics.fmean(values.values()), count=len(values), seeds=tuple(sorted(values)))


# -- a search in which nothing works -----------------------------------------------------------------


class Failures:
    """The failures since a trial last worked."""

    def __init__(self) -> None:
        self._kinds: list[str] = []

    def clear(self) -> None:
        """A trial has worked."""
        self._kinds.clear()

    def add(self, why: str, study: optuna.Study) -> str:
        """Count a failure.

        Returns:
            Why the search is to be stopped: :data:`ALIKE` trials in a row failed alike, and none has worked.
        """
        self._kinds.append(_kind(why))
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if len(self._kinds) >= ALIKE and len(set(self._kinds[-ALIKE:])) == 1 and not done:
            return f"{ALIKE} trials in a row failed alike, and none has worked: {why}"
        return ""


def _kind(why: str) -> str:
    """An error without its numbers and paths, so that two of a kind are equal."""
    return " ".join(w for w in why.split() if not any(c.isdigit() or c in "/\\" for c in w))
