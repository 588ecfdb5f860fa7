"""A study that is filled by hand, trial by trial, and its report."""

from __future__ import annotations

import csv
import math
import random
import statistics
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console

from tuning.report.files import write_report
from tuning.report.read import Finalist, Findings
from tuning.space.options import Objective
from tuning.space.search import Search
from tuning.space.space import SearchSpace
from tuning.space.space_file import build_space
from tuning.study.record import Run, Session, read_trials
from tuning.study.sampling import suggest_point
from ugrl.storage import Place

STEPS, EVERY = 320, 40
BEGIN = datetime(2026, 3, 1, 12, 0, 0)
SPACE: dict[str, Any] = {
    "config": "shapes",
    "overrides": {"train.steps": STEPS, "train.lr_warmup_iters": 8, "train.cls_warmup_iters": 30},
    "trials": 24,
    "scheduler": {"name": "asha", "grace_steps": 80, "reduction_factor": 2},
    "first": [
        {"method.uncertainty.d_cls": 1024, "method.contrast.d_seg": 512, "method.contrast.keep": 0.35},
    ],
    "search": {
        "method.uncertainty.alpha": {"loguniform": [1, 50]},
        "method.contrast.tau": {"loguniform": [0.03, 1]},
        "method.contrast.keep": {"uniform": [0.05, 0.8]},
        "method.uncertainty.d_cls": {"choice": [256, 512, 1024, 2048]},
        "method.contrast.d_seg": {"choice": [128, 256, 512, 1024]},
    },
}


def quality(point: Mapping[str, Any]) -> float:
    """A smooth objective, mostly of alpha and keep."""
    alpha = math.log10(point.get("method.uncertainty.alpha", 5.0))
    keep, tau = point.get("method.contrast.keep", 0.35), math.log10(point.get("method.contrast.tau", 0.1))
    order = ["Base", "I", "II", "III", "IV", "Full"].index(point.get("method.setting", "IV"))
    return 0.40 - 0.14 * (alpha - 0.9) ** 2 - 0.25 * (keep - 0.45) ** 2 - 0.02 * (tau + 0.8) ** 2 - 0.02 * (4 - order)


class Story:
    """A study that is filled trial by trial, as a driver would."""

    def __init__(self, out: Path, tree: Mapping[str, Any] = SPACE, **changes: Any) -> None:
        tree = {**tree, **changes}
        self.space: SearchSpace = build_space(tree)
        names = [o.name for o in self.space.objectives]
        self.objectives = tuple(Objective("seg_miou" if n == "auto" else n) for n in names)
        self.search = Search(self.space, self.space.base(), Place(str(out / "shards")), self.objectives, out)
        self.study = optuna.create_study(directions=[o.direction for o in self.objectives])
        self.draw = random.Random(0)
        self.time = BEGIN
        self.finalists: list[Finalist] = []
        # Where it is set: the score of a predictor that has learned nothing, as validations up to step 80 have it.
        self.nothing: float | None = None

    def point(self, **given: Any) -> dict[str, Any]:
        """A random point; values by the last word of the path."""
        made: dict[str, Any] = {}
        for axis in self.space.search:
            if not axis.active(made):
                continue
            if axis.kind == "choice":
                value = self.draw.choice(axis.options)
            elif axis.log:
                value = math.exp(self.draw.uniform(math.log(axis.low), math.log(axis.high)))
            else:
                value = self.draw.uniform(axis.low, axis.high)
            made[axis.path] = given.get(axis.name, int(value) if axis.integer else value)
        return made

    def run(
        self, point: Mapping[str, Any], seed: int, last: int, *, final: bool = False, flat: bool = False
    ) -> dict[str, Any]:
        """A run as the record keeps it; a flat one has learned nothing."""
        top = quality(point) + self.draw.gauss(0, 0.006)
        curve = [[s, top * (1 - math.exp(-s / 70))] for s in range(EVERY, last + 1, EVERY)]
        if self.nothing is not None:
            curve = [[s, self.nothing if flat or s <= 80 else v] for s, v in curve]
        value = curve[-1][1] if curve else None
        d_cls, d_seg = point.get("method.uncertainty.d_cls", 1024), point.get("method.contrast.d_seg", 512)
        metrics = {} if value is None else {
            "seg_miou": value, "cam_miou": value * 0.9, "tag_map": 0.8, "tag_f1": 0.7, "step_s": 0.2 + d_cls / 1e4,
            "gflop": 10 + d_cls / 500 + d_seg / 100,
        }  # fmt: skip
        if value is not None and self.nothing is not None:
            beside = {"tag_prevalence": 0.25, "collapsed": float(value <= self.nothing)}
            metrics |= {"seg_background_miou": self.nothing, **beside}
        ended = last == STEPS
        untouched = {} if value is None else {"seg_miou": value - 0.02, "cam_miou": value * 0.85}
        if self.nothing is not None:
            untouched["seg_background_miou"] = self.nothing + 0.01
        return {
            "value": value, "step": last if curve else 0, "metrics": metrics, "curve": curve, "seconds": 0.25 * last,
            "steps": last, "final": untouched if final and ended else {},
            "ended": ended,
        }  # fmt: skip

    def add(
        self, state: str = "COMPLETE", *, last: int = STEPS, seeds: int = 1, final: bool = False, origin: str = "",
        values: list[float] | None = None, attrs: Mapping[str, Any] | None = None, flat: bool = False, **given: Any,
    ) -> int:  # fmt: skip
        """One trial; its number."""
        point = self.point(**given)
        runs = {str(s): self.run(point, s, last, final=final, flat=flat) for s in range(seeds)} if last else {}
        held = sum(r["seconds"] for r in runs.values()) + 9.0
        told = values
        if told is None and state in ("COMPLETE", "PRUNED"):
            told = [statistics.fmean(r["metrics"][o.name] for r in runs.values()) for o in self.objectives]
        fixed = optuna.trial.FixedTrial(point)  # knows the ranges once it has been asked
        suggest_point(fixed, self.space.search)
        trial = optuna.trial.create_trial(
            state=TrialState[state],
            values=told,
            params=point,
            distributions=fixed.distributions,
            user_attrs={
                "runs": runs,
                "held": {"seconds": held, "cpus": 1.0, "gpus": 0.5},
                "host": "node-a",
                "commit": "0123abc",
                **({"from": origin} if origin else {}),
                **(attrs or {}),
            },
        )
        trial.datetime_start, self.time = self.time, self.time + timedelta(seconds=held)
        trial.datetime_complete = self.time if state in ("COMPLETE", "PRUNED", "FAIL") else None
        self.study.add_trial(trial)
        return len(self.study.get_trials(deepcopy=False)) - 1

    def rerun(self, number: int, seeds: int = 3) -> None:
        """Fresh seeds of a trial."""
        row = next(r for r in read_trials(self.study, self.objectives) if r.number == number)
        trees = [self.run(row.params, 100 + s, STEPS, final=True) for s in range(seeds)]
        self.finalists.append(Finalist(row, tuple(Run.read(str(100 + s), t) for s, t in enumerate(trees))))

    def fill(self, count: int, **more: Any) -> None:
        """Complete and pruned trials, as a search has them."""
        for i in range(count):
            self.add("PRUNED", last=(80, 160)[i % 2]) if i % 3 == 2 else self.add(**more)

    def findings(self) -> Findings:
        rows = tuple(read_trials(self.study, self.objectives))
        started = BEGIN.timestamp()
        session = Session("abc", "node-a", 1, 2, started, started + 0.6 * (self.time - BEGIN).total_seconds(), True)
        found = tuple(sorted(self.finalists, key=lambda f: -(f.value or 0)))
        return Findings(self.search, self.study, rows, found, (session,))


def report(story: Story, width: int = 120) -> tuple[Findings, str]:
    """Write everything; the findings and what was printed."""
    findings = story.findings()
    story.search.out.mkdir(parents=True, exist_ok=True)
    log = story.search.out / "printed.txt"
    with log.open("w") as file:
        write_report(findings, Console(file=file, width=width))
    return findings, log.read_text()


def plots(out: Path) -> set[str]:
    return {p.stem for p in (out / "plots").glob("*.png")}


def csv_rows(out: Path) -> list[dict[str, str]]:
    with (out / "trials.csv").open() as file:
        return list(csv.DictReader(file))
