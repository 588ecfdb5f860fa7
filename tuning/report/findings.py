"""The findings of a search in numbers: the best trial, the paper's point, what learning nothing gives, what it cost."""

from __future__ import annotations

import math
import shlex
import statistics
from dataclasses import dataclass, replace
from typing import Any

from tuning.ledger.noise import Measure, measure
from tuning.report.read import Findings, once
from tuning.space.options import COSTS, METRICS
from tuning.space.space import trial_config
from tuning.study.budget import covered
from tuning.study.record import BASELINES, TrialRow, ranked
from ugrl import config as configs
from ugrl.secrets import public

# The values that the paper publishes; α, β, τ, η and λ1-λ3 it does not give.
PAPER = {"method.uncertainty.d_cls": 1024, "method.contrast.d_seg": 512, "method.contrast.keep": 0.35}
# The best trial's configuration, in the search's folder.
BEST = "best.yaml"
ORDER = {"COMPLETE": 0, "PRUNED": 2, "RUNNING": 3, "WAITING": 4}


def objective_of(row: TrialRow, findings: Findings, index: int = 0) -> Measure:
    """An objective of a trial as the study was told it, with the spread over the trial's seeds."""
    name = findings.search.objectives[index].name
    found = measure(row.runs, name)
    return replace(found, mean=row.values[index] if row.values else math.nan)


@once
def ordered(findings: Findings) -> list[TrialRow]:
    """All trials: those that may be the best by rank, then the rest by what became of them."""
    top = ranked(findings.rows, findings.search.objectives[0])
    chosen = {r.number for r in top}
    rest = [r for r in findings.rows if r.number not in chosen]
    rest.sort(key=lambda r: (ORDER.get(r.state, 5), -(r.value if r.value is not None else -math.inf), r.number))
    return top + rest


@once
def metric_names(findings: Findings) -> list[str]:
    """Metrics and costs that any trial has and that are no objectives."""
    have = {name for r in findings.rows for run in r.runs for name in run.metrics}
    objectives = [o.name for o in findings.search.objectives]
    return [name for name in (*METRICS, *COSTS) if name in have and name not in objectives]


def contender(findings: Findings) -> tuple[TrialRow, Measure, Measure] | None:
    """The best trial with its objective on the split of the search and on the untouched one; ``None`` without one.

    Both are over the fresh seeds, where the trial was run again.
    """
    return _entry(findings, 0)


def runner_up(findings: Findings) -> tuple[TrialRow, Measure, Measure] | None:
    """The second as in :func:`contender`, among those that were run again if any was."""
    return _entry(findings, 1)


def _entry(findings: Findings, place: int) -> tuple[TrialRow, Measure, Measure] | None:
    name = findings.search.objective
    if findings.finalists:
        if place >= len(findings.finalists):
            return None
        found = findings.finalists[place]
        return found.trial, measure(found.runs, name), measure(found.runs, name, final=True)
    rows = ranked(findings.rows, findings.search.objectives[0])
    if place >= len(rows):
        return None
    return rows[place], objective_of(rows[place], findings), measure(rows[place].runs, name, final=True)


@once
def baseline(findings: Findings, name: str, *, final: bool = False) -> float:
    """The score of a predictor that has learned nothing; NaN where no run has noted it.

    Args:
        findings: Of the search.
        name: Of a metric.
        final: On the untouched split.
    """
    key, _ = BASELINES.get(name, ("", ""))
    runs = [run for found in [r.runs for r in findings.rows] + [f.runs for f in findings.finalists] for run in found]
    values = [(run.final if final else run.metrics).get(key, math.nan) for run in runs]
    return next(filter(math.isfinite, values), math.nan)


@once
def paper_trial(findings: Findings) -> TrialRow | None:
    """The trial at the paper's values: those of the base wherever the paper gives none, else a starting point."""
    base, axes_ = findings.search.base, findings.search.space.search
    rows = sorted(findings.rows, key=lambda r: (ORDER.get(r.state, 5), r.number))
    whole = [r for r in rows if all(a.path in r.params for a in axes_ if a.active(r.params))]
    published = [
        r for r in whole if all(same_value(r.params.get(p, configs.get(base, p)), v) for p, v in PAPER.items())
    ]
    exact = [
        r for r in published if all(p in PAPER or same_value(v, configs.get(base, p)) for p, v in r.params.items())
    ]
    given = [r for r in published if r.origin.startswith("first")]
    return next(iter([*exact, *given]), None)


def paper_values(findings: Findings) -> dict[str, Any]:
    """The searched paths whose value the paper publishes."""
    return {a.path: PAPER[a.path] for a in findings.search.space.search if a.path in PAPER}


def same_value(a: Any, b: Any) -> bool:
    """Whether two values of a key are the same, numbers but for rounding."""
    both = isinstance(a, int | float) and isinstance(b, int | float)
    return math.isclose(a, b, rel_tol=1e-9) if both else bool(a == b)


@dataclass(frozen=True)
class Cost:
    """What a search took.

    Attributes:
        held: Seconds that trials held resources, side by side ones counted each.
        gpu_hours: Held.
        cpu_hours: Held.
        wall: Seconds in which any driver was at work.
        training: Seconds of all runs.
        slots: Seconds of all sessions, each times the trials it could run side by side.
        outside: Mean seconds that a trial held resources without training; NaN where unknown.
        saved: Seconds that pruned trials would have trained on, at the pace of complete ones; NaN where unknown.
        saved_gpu_hours: The same, times the GPUs they held.
        skipped: Seconds of seeds that complete trials were spared.
    """

    held: float
    gpu_hours: float
    cpu_hours: float
    wall: float
    training: float
    slots: float
    outside: float
    saved: float
    saved_gpu_hours: float
    skipped: float

    @property
    def utilisation(self) -> float:
        """Share of the sessions' slots in which training ran; NaN without sessions."""
        return self.training / self.slots if self.slots else math.nan


@once
def cost(findings: Findings) -> Cost:
    """The cost of a search, finalists included: these count their training times what their trials held."""
    again = [(f.trial, sum(r.seconds for r in f.runs)) for f in findings.finalists]
    held = [(r, r.seconds) for r in findings.rows if math.isfinite(r.seconds)] + again
    done = [r for r in findings.rows if r.state in ("COMPLETE", "PRUNED") and math.isfinite(r.seconds)]
    outside = [max(0.0, r.seconds - training_seconds(r)) for r in done]
    pace = _pace(findings)
    missing = [(r, pace * _missing_steps(r, findings)) for r in findings.rows if r.state in ("COMPLETE", "PRUNED")]
    return Cost(
        held=sum(s for _, s in held),
        gpu_hours=sum(s * r.gpus for r, s in held) / 3600,
        cpu_hours=sum(s * r.cpus for r, s in held) / 3600,
        wall=covered(findings.sessions),
        training=sum(training_seconds(r) for r in findings.rows) + sum(s for _, s in again),
        slots=sum(s.seconds * s.slots for s in findings.sessions),
        outside=statistics.fmean(outside) if outside else math.nan,
        saved=sum(s for r, s in missing if r.state == "PRUNED"),
        saved_gpu_hours=sum(s * r.gpus for r, s in missing if r.state == "PRUNED") / 3600,
        skipped=sum(s for r, s in missing if r.state == "COMPLETE"),
    )


def training_seconds(row: TrialRow) -> float:
    """Seconds that the runs of a trial trained."""
    return sum(r.seconds for r in row.runs)


@once
def _pace(findings: Findings) -> float:
    """Mean seconds of a step over the runs of complete trials; NaN without one."""
    runs = [run for r in findings.rows if r.state == "COMPLETE" for run in r.runs if run.step and run.seconds]
    return sum(r.seconds for r in runs) / sum(r.step for r in runs) if runs else math.nan


def _missing_steps(row: TrialRow, findings: Findings) -> int:
    whole = findings.search.steps * findings.search.space.repeats.seeds
    return max(0, whole - sum(run.step for run in row.runs))


@once
def best_tree(findings: Findings) -> dict[str, Any] | None:
    """The recommended trial's whole configuration, validated on the base's own split; ``None`` without one.

    Raises:
        ConfigError: The values do not go together.
    """
    best, search = findings.best, findings.search
    if best is None:
        return None
    tree = configs.to_dict(trial_config(search.base, best.params))
    if search.base.data.source != "shapes" or search.base.data.shards:
        tree["data"]["shards"] = public(search.shards.where)
    tree["name"] = f"{search.base.name}-best"
    return configs.public_dict(configs.build(tree))


def train_command(findings: Findings) -> str:
    """The command that trains the best configuration."""
    search = findings.search
    return shlex.join(["ugrl-train", "--config", str(search.out / BEST), "--data", public(search.shards.where)])
