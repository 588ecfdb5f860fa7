"""What a search found: a table, a CSV file, the best configuration and plots.

Everything is read from the study's storage, so a report can be made of a search that is still
running, was interrupted, or ran elsewhere.
"""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState
from rich import box
from rich.console import Console
from rich.table import Table

from tuning.driver import Search
from tuning.space import trial_config
from ugrl import config as configs

BEST = "best.yaml"
TABLE = "trials.csv"
METRICS = ("seg_miou", "cam_miou", "tag_map", "tag_f1")


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the report shows it.

    Attributes:
        number: Optuna's.
        state: COMPLETE, PRUNED, FAIL, RUNNING or WAITING.
        step: Of its last validation.
        value: The objective there.
        metrics: All metrics of that validation.
        params: Dotted path → value.
        curve: (step, objective) of all validations.
        seconds: Wall time.
        error: Why it failed.
        interrupted: Whether it ended with its search and not by itself.
    """

    number: int
    state: str
    step: int
    value: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = math.nan
    error: str = ""
    interrupted: bool = False


def read_trials(study: optuna.Study) -> list[TrialRow]:
    """All trials of a study that were started, by number."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        curve = tuple(sorted(trial.intermediate_values.items()))
        seconds = trial.duration.total_seconds() if trial.duration else math.nan
        metrics = dict(trial.user_attrs.get("metrics", {}))
        rows.append(
            TrialRow(
                number=trial.number,
                state=trial.state.name,
                step=curve[-1][0] if curve else 0,
                value=trial.value if trial.values else (curve[-1][1] if curve else None),
                metrics=metrics,
                params=dict(trial.params),
                curve=curve,
                seconds=seconds,
                error=str(trial.user_attrs.get("error", "")),
                interrupted="interrupted" in trial.user_attrs,
            )
        )
    return rows


def best_trial(rows: Sequence[TrialRow]) -> TrialRow | None:
    """The complete trial with the highest objective; the earlier one of equals."""
    done = [r for r in rows if r.state == "COMPLETE" and r.value is not None]
    return max(done, key=lambda r: (r.value, -r.number), default=None)


def write_report(search: Search, study: optuna.Study, console: Console) -> None:
    """Write all files into the search's folder and print the table.

    Files: ``trials.csv``, ``best.yaml`` (when a trial completed) and ``plots/*.png``.
    """
    from tuning.plots import draw

    rows = read_trials(study)
    best = best_trial(rows)
    write_csv(search, rows)
    print_table(search, rows, best, console)
    notes = draw(search, study, rows, best, search.out / "plots")
    stopped = [str(r.number) for r in rows if r.interrupted]
    if stopped:
        console.print(f"interrupted, and their points queued again: trials {', '.join(stopped)}", highlight=False)
    for row in rows:
        if row.state == "FAIL" and not row.interrupted:
            console.print(f"trial {row.number} failed: {row.error}", highlight=False, soft_wrap=True, markup=False)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    if best is None:
        console.print("no trial completed: no best configuration", highlight=False)
    else:
        write_best(search, best)
    print_files(search, best, console)


def write_csv(search: Search, rows: Sequence[TrialRow]) -> None:
    """``trials.csv``: one line a trial, full precision, one column per searched path."""
    paths = [a.path for a in search.space.search]
    with (search.out / TABLE).open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["number", "state", "step", search.objective, *_others(search), *paths, "seconds", "error"])
        for r in rows:
            values = [r.metrics.get(name, "") for name in _others(search)]
            points = [r.params.get(p, "") for p in paths]
            seconds = "" if math.isnan(r.seconds) else round(r.seconds, 1)
            out.writerow(
                [r.number, r.state, r.step, "" if r.value is None else r.value, *values, *points, seconds, r.error]
            )


def write_best(search: Search, best: TrialRow) -> Path:
    """``best.yaml``: the best trial's configuration, validated on the base's own split again."""
    cfg = trial_config(search.base, best.params)
    tree = configs.to_dict(cfg)
    if search.base.data.source != "shapes" or search.base.data.shards:
        tree["data"]["shards"] = str(search.shards)
    tree["name"] = f"{search.base.name}-best"
    configs.build(tree)
    text = (
        f"# Trial {best.number} of the search in {search.out.name}: {search.objective} {best.value:.4f} "
        f"on split '{search.space.split}' at step {best.step}.\n"
        f"# Train with it: ugrl-train --config {BEST}\n"
    )
    path = search.out / BEST
    path.write_text(text + yaml.safe_dump(tree, sort_keys=False, width=100), encoding="utf-8")
    return path


def print_table(search: Search, rows: Sequence[TrialRow], best: TrialRow | None, console: Console) -> None:
    """The trials, best first among the complete ones; points beside results where the terminal is wide enough."""
    paths = [a.path for a in search.space.search]
    wide = console.width >= 62 + 9 * len(paths)
    results = _table(f"{len(rows)} trials, objective {search.objective} on split '{search.space.split}'")
    points = _table("what was tried")
    for name in ("trial", "state", "step", search.objective, *_others(search), "s"):
        results.add_column(name.replace("_", " "), justify="left" if name == "state" else "right")
    points.add_column("trial", justify="right")
    for path in paths:
        (results if wide else points).add_column(path.rsplit(".", 1)[-1], justify="right")
    for r in sorted(rows, key=_rank):
        style = "bold green" if r is best else "dim" if r.state == "FAIL" else ""
        cells = [str(r.number), r.state, str(r.step), _percent(r.value)]
        cells += [_percent(r.metrics.get(name)) for name in _others(search)]
        cells.append("" if math.isnan(r.seconds) else f"{r.seconds:.0f}")
        shown = [_short(r.params.get(p)) for p in paths]
        results.add_row(*cells, *(shown if wide else []), style=style)
        points.add_row(str(r.number), *([] if wide else shown), style=style)
    console.print(results)
    if not wide:
        console.print(points)


def print_files(search: Search, best: TrialRow | None, console: Console) -> None:
    """Where to read on."""
    lines = [
        ("trials", f"{search.out / TABLE}"),
        ("plots", f"{search.out / 'plots'}"),
        ("curves", f"tensorboard --logdir {shlex.quote(str(search.out / 'trials'))}"),
    ]
    if best is not None:
        words = ["ugrl-train", "--config", str(search.out / BEST), "--data", str(search.shards)]
        lines += [("best", f"{search.out / BEST}"), ("train", shlex.join(words))]
    for name, text in lines:
        console.print(f"{name:>7}: {text}", highlight=False, soft_wrap=True, markup=False)


def _others(search: Search) -> list[str]:
    return [name for name in METRICS if name != search.objective]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _rank(row: TrialRow) -> tuple[int, float, int]:
    order = {"COMPLETE": 0, "PRUNED": 1, "RUNNING": 2}
    return order.get(row.state, 3), -(row.value if row.value is not None else -math.inf), row.number


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
