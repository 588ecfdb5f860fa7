"""All that a report is made of, read from the storage of a search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna

from tuning.space.search import Search
from tuning.study.record import (
    Run,
    Session,
    TrialRow,
    best_trial,
    mean_metrics,
    read_sessions,
    read_trials,
    standard_error,
)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Finalist:
    """A configuration that was run again with fresh seeds.

    Attributes:
        trial: Its trial in the search.
        runs: The fresh ones that ended.
    """

    trial: TrialRow
    runs: tuple[Run, ...]

    @property
    def value(self) -> float | None:
        """Mean of the first objective over the fresh seeds, on the split that the search sees."""
        found = [r.value for r in self.runs if r.value is not None]
        return sum(found) / len(found) if found else None

    @property
    def stderr(self) -> float:
        """Its standard error."""
        return standard_error([r.value for r in self.runs if r.value is not None])

    @property
    def final(self) -> dict[str, float]:
        """Mean metrics on the untouched split."""
        return mean_metrics(r.final for r in self.runs if r.final)


@dataclass(frozen=True)
class Findings:
    """All that a report is made of.

    Attributes:
        search: The search.
        study: Optuna's.
        rows: Its trials that were started, by number.
        finalists: Ranked by their fresh seeds, best first; empty where none have run.
        sessions: Of all drivers, by time.
    """

    search: Search
    study: optuna.Study
    rows: tuple[TrialRow, ...]
    finalists: tuple[Finalist, ...] = ()
    sessions: tuple[Session, ...] = field(default_factory=tuple)
    # What :func:`once` has worked out of them.
    known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def best(self) -> TrialRow | None:
        """The trial to recommend: the first finalist, or the best complete one where nothing was run again."""
        return _best(self)


def once(work: Callable[Concatenate[Findings, P], T]) -> Callable[Concatenate[Findings, P], T]:
    """A function of findings whose result is kept with them: many parts of a report ask for it."""

    @wraps(work)
    def found(findings: Findings, /, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (work, args, tuple(sorted(kwargs.items())))
        if key not in findings.known:
            findings.known[key] = work(findings, *args, **kwargs)
        result: T = findings.known[key]
        return result

    return found


@once
def _best(findings: Findings) -> TrialRow | None:
    if findings.finalists:
        return findings.finalists[0].trial
    return best_trial(findings.rows, findings.search.objectives[0])


def read_finalists(
    rows: list[TrialRow] | tuple[TrialRow, ...], finals: optuna.Study | None, search: Search
) -> tuple[Finalist, ...]:
    """The finalists of a search, ranked by their fresh seeds.

    Args:
        rows: Of the search.
        finals: The study whose trials are (candidate, seed).
        search: The search.
    """
    if finals is None:
        return ()
    by_number = {r.number: r for r in rows}
    runs: dict[int, dict[int, Run]] = {}
    for row in read_trials(finals, search.objectives):
        if row.state == "COMPLETE" and (number := row.params.get("candidate")) in by_number:
            runs.setdefault(int(number), {}).update({r.seed: r for r in row.runs})
    made = [
        Finalist(by_number[number], tuple(sorted(found.values(), key=lambda r: r.seed)))
        for number, found in runs.items()
        if any(r.value is not None for r in found.values())
    ]
    sign = -1.0 if search.objectives[0].maximize else 1.0
    return tuple(sorted(made, key=lambda f: (sign * (f.value or 0.0), f.trial.number)))


def read_findings(search: Search, study: optuna.Study, finals: optuna.Study | None) -> Findings:
    """All that the storage tells of a search."""
    rows = tuple(read_trials(study, search.objectives))
    return Findings(search, study, rows, read_finalists(rows, finals, search), read_sessions(study))
