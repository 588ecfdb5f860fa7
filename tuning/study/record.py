"""What a study's storage holds of each trial, and how it is read back.

A trial is one configuration. Its runs, one a seed, are kept in the trial's user attributes, so that a report needs
nothing but the storage:

==============  =====================================================================================
attribute       what it holds
==============  =====================================================================================
``runs``        seed → ``{"value", "step", "metrics", "curve": [[step, value], …], "seconds", "steps",
                "final": {metrics of the untouched split}, "ended"}``
``seeds``       of its runs
``held``        ``{"seconds", "cpus", "gpus"}``: how long the trial held what, over all its starts
``out``         the folder of its runs
``host``        where it ran last
``driver``      who looks after it, or did last
``commit``      of the code, where there is a repository
``config``      the whole configuration
``error``       why it failed
``note``        why it was stopped
``deaths``      how often its process died
``violation``   cost → value, where a constraint is broken
``from``        where its point came from, if nothing sampled it
==============  =====================================================================================
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from tuning.space.options import COSTS, METRICS, Objective

# What a validation has beside its metrics: the scores of predictors that have learned nothing (background everywhere;
# tags by how often each class occurs), and 1 where the run's own score is no better.
BACKGROUND, PREVALENCE, COLLAPSED = "seg_background_miou", "tag_prevalence", "collapsed"
BESIDE = (BACKGROUND, PREVALENCE, COLLAPSED)
BASELINES = {
    "seg_miou": (BACKGROUND, "background everywhere"),
    "cam_miou": (BACKGROUND, "background everywhere"),
    "tag_map": (PREVALENCE, "tags by their prevalence"),
}
RUNS, SEEDS, HELD, OUT, HOST, DRIVER, COMMIT = "runs", "seeds", "held", "out", "host", "driver", "commit"
CONFIG, ERROR, NOTE, VIOLATION, FROM, DEATHS = "config", "error", "note", "violation", "from", "deaths"
# What a report of a trial calls the step that the trainer counts.
STEP = "step"
# Attributes of a study that describe a driver's session begin so; their values are rewritten as a heartbeat.
SESSION = "session:"


@dataclass(frozen=True)
class Run:
    """One training of a configuration.

    Attributes:
        seed: The seed of the training.
        step: Step of its last validation.
        value: The first objective there; ``None`` without a validation.
        metrics: All metrics and costs of that validation, ratios as fractions.
        curve: (step, first objective) of all validations.
        seconds: Wall time of training, over all its starts, without what the harness adds.
        final: Metrics of the untouched split at the end; empty where it was not measured.
        ended: Whether it reached the last step.
    """

    seed: int
    step: int = 0
    value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    final: Mapping[str, float] = field(default_factory=dict)
    ended: bool = False

    @classmethod
    def read(cls, seed: str, tree: Mapping[str, Any]) -> Run:
        """A run from its attribute."""
        return cls(
            int(seed),
            int(tree.get("step", 0)),
            tree.get("value"),
            dict(tree.get("metrics", {})),
            tuple((int(s), float(v)) for s, v in tree.get("curve", [])),
            float(tree.get("seconds", 0.0)),
            dict(tree.get("final", {})),
            bool(tree.get("ended", False)),
        )


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the report shows it.

    Attributes:
        number: The number of the trial in its study.
        state: COMPLETE, PRUNED, FAIL, RUNNING or WAITING.
        values: One for each objective: what the study was told, else means over the runs so far; empty without any.
        runs: One for each seed that was begun.
        params: Dotted path → value; an axis that did not count is missing.
        seconds: How long the trial held its resources.
        cpus: CPUs that it held.
        gpus: GPUs that it held.
        error: Why it failed.
        note: Why it was stopped.
        violation: Cost → value, where a constraint is broken.
        origin: Where the point came from, if nothing sampled it.
        host: Where it ran.
        commit: Commit of the code that ran.
        out: Folder of its runs.
        started: Seconds since the epoch, or NaN.
        ended: Seconds since the epoch, or NaN.
    """

    number: int
    state: str
    values: tuple[float, ...] = ()
    runs: tuple[Run, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = math.nan
    cpus: float = 0.0
    gpus: float = 0.0
    error: str = ""
    note: str = ""
    violation: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""
    host: str = ""
    commit: str = ""
    out: str = ""
    started: float = math.nan
    ended: float = math.nan

    @property
    def value(self) -> float | None:
        """The first objective."""
        return self.values[0] if self.values else None

    @property
    def step(self) -> int:
        """Of the last validation of the first run."""
        return self.runs[0].step if self.runs else 0

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """(step, first objective) of the first run."""
        return self.runs[0].curve if self.runs else ()

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Means over the runs."""
        return mean_metrics(r.metrics for r in self.runs)

    @cached_property
    def final(self) -> dict[str, float]:
        """Means over the runs that were measured on the untouched split."""
        return mean_metrics(r.final for r in self.runs if r.final)

    @property
    def stderr(self) -> float:
        """Standard error of the first objective over the runs; NaN with fewer than two."""
        return standard_error([r.value for r in self.runs if r.value is not None])

    def metric(self, name: str, *, final: bool = False) -> tuple[float, float, int]:
        """Mean, standard error and number of the runs that have a metric.

        Args:
            name: The metric or cost.
            final: Whether it is that of the untouched split.
        """
        found = [(r.final if final else r.metrics).get(name) for r in self.runs]
        values = [v for v in found if v is not None and math.isfinite(v)]
        return (statistics.fmean(values) if values else math.nan), standard_error(values), len(values)


def collapsed(runs: Iterable[Run]) -> bool:
    """Whether any of some runs ended no better than a predictor that has learned nothing."""
    return any(r.ended and r.metrics.get(COLLAPSED, 0.0) >= 0.5 for r in runs)


def finite(value: Any) -> bool:
    """Whether a value is a finite number.

    >>> finite(float("nan")), finite(1)
    (False, True)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mean_metrics(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over those that have it.

    >>> mean_metrics([{"a": 1.0}, {"a": 3.0, "b": 4.0}])
    {'a': 2.0, 'b': 4.0}
    """
    gathered: dict[str, list[float]] = {}
    for each in found:
        for name, value in each.items():
            gathered.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in gathered.items()}


def standard_error(values: Sequence[float]) -> float:
    """Of a mean; NaN with fewer than two values.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def read_trial(trial: FrozenTrial, objectives: Sequence[Objective]) -> TrialRow:
    """A trial of a study."""
    attrs = trial.user_attrs
    runs = tuple(Run.read(seed, tree) for seed, tree in attrs.get(RUNS, {}).items())
    held = attrs.get(HELD, {})
    values: tuple[float, ...] = tuple(trial.values or ())
    if not values:
        means = mean_metrics(r.metrics for r in runs)
        values = tuple(means[o.name] for o in objectives if o.name in means)
        values = values if len(values) == len(objectives) else ()
    begun = trial.datetime_start.timestamp() if trial.datetime_start else math.nan
    ended = trial.datetime_complete.timestamp() if trial.datetime_complete else math.nan
    return TrialRow(
        number=trial.number,
        state=trial.state.name,
        values=values,
        runs=runs,
        params=dict(trial.params),
        seconds=float(held.get("seconds", ended - begun)),
        cpus=float(held.get("cpus", 0.0)),
        gpus=float(held.get("gpus", 0.0)),
        error=str(attrs.get(ERROR, "")),
        note=str(attrs.get(NOTE, "")),
        violation=dict(attrs.get(VIOLATION, {})),
        origin=str(attrs.get(FROM, "")),
        host=str(attrs.get(HOST, "")),
        commit=str(attrs.get(COMMIT, "")),
        out=str(attrs.get(OUT, "")),
        started=begun,
        ended=ended,
    )


def read_trials(study: optuna.Study, objectives: Sequence[Objective], *, waiting: bool = False) -> list[TrialRow]:
    """All trials of a study that were started, by number; those that wait as well if asked for."""
    return [
        read_trial(t, objectives)
        for t in study.get_trials(deepcopy=False)
        if waiting or t.state != TrialState.WAITING or t.user_attrs.get(RUNS)
    ]


def ranked(rows: Sequence[TrialRow], objective: Objective) -> list[TrialRow]:
    """The trials that may be the best, best first: complete, within the constraints; the earlier one of equals."""
    done = [r for r in rows if r.state == "COMPLETE" and r.value is not None and not r.violation]
    sign = -1.0 if objective.maximize else 1.0
    return sorted(done, key=lambda r: (sign * (r.value or 0.0), r.number))


def best_trial(rows: Sequence[TrialRow], objective: Objective) -> TrialRow | None:
    """The first of :func:`ranked`."""
    found = ranked(rows, objective)
    return found[0] if found else None


def pareto(rows: Sequence[TrialRow], objectives: Sequence[Objective]) -> list[TrialRow]:
    """The trials that no other one beats in every objective, by the first objective."""
    done = ranked(rows, objectives[0])
    if not done:
        return []
    values = np.array([r.values for r in done]) * [1.0 if o.maximize else -1.0 for o in objectives]

    def beaten(k: int, by: list[int]) -> bool:
        others = values[by]
        return bool(((others >= values[k]).all(axis=1) & (others > values[k]).any(axis=1)).any())

    # Whatever a beaten one beats, its own better beats too: each is held against those that are left so far.
    left: list[int] = []
    for k in range(len(done)):
        if not beaten(k, left):
            left.append(k)
    return [done[k] for k in left if not beaten(k, left)]  # of equals in the first objective, a later one may win


def percent(name: str) -> bool:
    """Whether a value is shown in percent."""
    return name in METRICS


def label(name: str) -> str:
    """A metric or cost in words, with its unit.

    >>> label("seg_miou"), label("cam_miou"), label("step_s")
    ('seg mIoU, %', 'CAM mIoU, %', 'step, s')
    """
    if name in COSTS:
        return {"step_s": "step, s", "memory_gb": "memory, GB", "gflop": "step, GFLOP"}[name]
    words = {"miou": "mIoU", "map": "mAP", "f1": "F1", "cam": "CAM"}
    return " ".join(words.get(word, word) for word in name.split("_")) + ", %"


@dataclass(frozen=True)
class Session:
    """One driver's time with a study.

    Attributes:
        id: Name of the driver.
        host: Where it ran.
        pid: Number of its process.
        slots: Trials that it runs at a time.
        started: Seconds since the epoch.
        seen: When it was last heard of.
        ended: Whether it said goodbye.
    """

    id: str
    host: str = ""
    pid: int = 0
    slots: int = 1
    started: float = 0.0
    seen: float = 0.0
    ended: bool = False

    @property
    def seconds(self) -> float:
        """Its length so far."""
        return max(0.0, self.seen - self.started)


def read_sessions(study: optuna.Study) -> tuple[Session, ...]:
    """The sessions of a study's drivers, by time."""
    found = [
        Session(**{k: v for k, v in attrs.items() if k in Session.__dataclass_fields__})
        for key, attrs in study.user_attrs.items()
        if key.startswith(SESSION)
    ]
    return tuple(sorted(found, key=lambda s: s.started))
