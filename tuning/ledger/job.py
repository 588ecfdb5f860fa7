"""A trial that this driver looks after: what its runs have reported, and what it has held so far."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import Trial, TrialState

from tuning.space.options import COSTS, METRICS
from tuning.space.search import Search
from tuning.study.record import BESIDE, HELD, RUNS, STEP, finite

# In a trial's folder: why its process ended, and which driver wants the process to leave with a checkpoint.
ERROR_FILE, LEAVE = "error.txt", "leave"
# What the names of metrics on the untouched split begin with: Tune joins the keys of nested values.
FINAL = "final/"
KEPT = (*METRICS, *COSTS, *BESIDE, "u_auroc", "p_auroc", "images_per_s", "data_wait", STEP)
# How a trial ends, and why.
Verdict = tuple[TrialState, str]


@dataclass
class Job:
    """A trial that this driver looks after.

    Attributes:
        trial: The trial in the study; its state is RUNNING.
        point: Dotted path of the configuration → value.
        seeds: One for each run, in the order in which they run.
        folder: Where the runs are written, one folder a seed.
        runs: Seed → what is known of that run, as in :mod:`tuning.study.record`.
        verdict: How it ends, once that is known.
        left: Whether its process was asked to leave, and did, with a checkpoint.
        unplaced: Why its workers found no place; empty if they did.
        before: Seconds for which it held its resources in earlier sessions.
        since: When this driver began it; when it was placed, once it is. Seconds since the epoch.
        placed: Whether it has got the resources that it asked for.
    """

    trial: Trial
    point: dict[str, Any]
    seeds: tuple[int, ...]
    folder: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdict: Verdict | None = None
    left: bool = False
    unplaced: str = ""
    placed: bool = False
    before: float = 0.0
    since: float = field(default_factory=time.time)

    @property
    def number(self) -> int:
        """The number of the trial in its study."""
        return int(self.trial.number)

    def value(self, name: str) -> float | None:
        """Mean of a metric over the runs that have ended, or of the first one so far."""
        runs = [r for r in self.runs.values() if r.get("ended")] or list(self.runs.values())[:1]
        found = [r["metrics"].get(name) for r in runs if r.get("metrics")]
        return statistics.fmean(found) if found and all(finite(v) for v in found) else None

    def first(self, result: Mapping[str, Any]) -> bool:
        """Whether a report is of the first seed, whose scores the pruner compares."""
        return str(result["seed"]) == str(self.seeds[0])

    def unfinished(self) -> list[int]:
        """The seeds whose runs have not ended."""
        return [s for s in self.seeds if not self.runs.get(str(s), {}).get("ended")]

    def note(self, result: Mapping[str, Any], search: Search) -> None:
        """Write a report of a validation, or of the end of a seed, into the storage."""
        seed, step = str(result["seed"]), int(result.get(STEP, 0))
        run = self.runs.setdefault(seed, {"curve": [], "step": 0})
        score = result.get(search.objective, math.nan)
        last = run["curve"][-1][0] if run["curve"] else 0
        if step > last and finite(score):
            run["curve"].append([step, float(score)])
            if self.first(result) and len(search.objectives) == 1:
                self.trial.report(float(score), step)
        if step >= last:
            run["step"], run["value"] = step, float(score) if finite(score) else None
            new = {k: float(result[k]) for k in KEPT if finite(result.get(k))}
            run["metrics"] = {**run.get("metrics", {}), **new}  # costs are not measured where nothing was left to do
        run["seconds"] = float(result.get("seconds", 0.0))
        if result.get("ended"):
            run["ended"] = True
            found = {k.removeprefix(FINAL): float(v) for k, v in result.items() if k.startswith(FINAL) and finite(v)}
            run["final"] = found or run.get("final", {})
        self.trial.set_user_attr(RUNS, self.runs)

    def hold(self, cpus: float, gpus: float) -> None:
        """Write down for how long the trial has held what, over all its starts."""
        seconds = self.before + time.time() - self.since
        self.trial.set_user_attr(HELD, {"seconds": seconds, "cpus": cpus, "gpus": gpus})


def why_failed(folder: Path) -> str:
    """One line on why a trial's process died, from what it left behind."""
    try:
        lines = (folder / ERROR_FILE).read_text(encoding="utf-8").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "its process ended without a word (killed, or out of memory)"
