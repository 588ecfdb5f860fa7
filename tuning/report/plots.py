"""Plots of a search as PNG files, drawn without a display."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import optuna
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation
from optuna.trial import TrialState

from tuning.report.differences import DIFFERENCES, differences
from tuning.report.drawing import (
    BEST,
    COLORS,
    OFF,
    PAPER,
    SHADES,
    STYLE,
    Scale,
    axis_label,
    baseline_line,
    best_label,
    best_so_far,
    draw_bars,
    draw_dots,
    drawn_value,
    factor,
    is_numeric,
    legend_beside,
    of_sample,
    over_contour,
    paper_line,
    parallel_axes,
    places_of,
    rung_lines,
    sample_rows,
    save,
    scatter_trials,
    score_limits,
    scored_rows,
    slice_axis,
)
from tuning.report.findings import paper_values, training_seconds
from tuning.report.read import Findings, once
from tuning.report.spots import Spot
from tuning.space.axis import Axis
from tuning.study.record import TrialRow, label, pareto, percent

# Measured on synthetic objectives of nine values, one of which matters most: with the best third as
# target PED-ANOVA ranks it first in 9 of 20 studies of 6 trials, 14 of 10, 20 of 20. (With Optuna's
# default, the best tenth: 8, 9, 14.) Below ENOUGH it is said and not drawn, below SURE it is a hint.
ENOUGH, SURE = 10, 20
TARGET_QUANTILE = 1 / 3
# Below so many complete trials a contour shows the triangles between the trials and nothing else.
CONTOUR = 8
CONTOUR_AXES = 3


@dataclass(frozen=True)
class Drawn:
    """What :func:`draw` has done.

    Attributes:
        notes: Lines to tell the user: what could not be drawn, and why.
        spots: Name of a plot → its marks that stand for trials.
    """

    notes: list[str]
    spots: dict[str, list[Spot]]


def draw(findings: Findings, folder: Path) -> Drawn:
    """Draw every plot of :data:`PLOTS` that the findings suffice for, and remove those that they do not.

    Args:
        findings: Of the search.
        folder: Where ``NAME.png`` go; made if needed.
    """
    scored = any(r.value is not None for r in findings.rows)
    drawn = Drawn([] if scored else ["no trial has a score yet: no plots of scores"], {})
    with matplotlib.rc_context(STYLE):
        for name, plot in PLOTS.items():
            found = plot(findings) if scored or plot in UNSCORED else ""
            if isinstance(found, Figure):
                drawn.spots[name] = save(found, folder / f"{name}.png")
                continue
            (folder / f"{name}.png").unlink(missing_ok=True)
            if found:
                drawn.notes.append(found)
    return drawn


@once
def importance(findings: Findings) -> dict[str, float] | str:
    """Each searched path's importance for the first objective, or a line that says why there is none.

    COMPLETE trials count alone.
    """
    study = findings.study
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < ENOUGH:
        return f"importance: {len(complete)} complete trials are too few to tell (from {ENOUGH} on); no plot"
    # Optuna would count the early scores of pruned trials too, and takes a target for something to minimise: give
    # it the complete ones alone, with one value each.
    whole = optuna.create_study(direction=study.directions[0])
    whole.add_trials(
        [optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=t.values[0]) for t in complete]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TARGET_QUANTILE)
    try:
        found = dict(optuna.importance.get_param_importances(whole, evaluator=evaluator))
    except (ValueError, RuntimeError) as error:
        return f"importance: cannot be told ({str(error).splitlines()[0]})"
    return found or "importance: no axis counts in every complete trial; no plot"


def history(findings: Findings) -> Figure | str:
    """Score of each trial in order, and the best one so far."""
    rows = scored_rows(findings)
    fig, ax = plt.subplots(figsize=(7, 4))
    scatter_trials(ax, [(r.number, r) for r in rows], findings)
    low, high = score_limits(findings, rows)
    noisy = [r for r in rows if math.isfinite(r.stderr) and low <= drawn_value(findings, r) <= high]
    if noisy:
        x, y, e = zip(*[(r.number, drawn_value(findings, r), factor(findings) * r.stderr) for r in noisy], strict=True)
        ax.errorbar(x, y, yerr=e, fmt="none", ecolor="#777777", elinewidth=0.9, capsize=2, zorder=1)
    line = [(r.number, v) for r, v in zip(rows, best_so_far(findings, rows), strict=True)]
    ax.step(*zip(*line, strict=True), where="post", color=COLORS["COMPLETE"], lw=0.9, label="best so far")
    baseline_line(ax, findings)
    ax.set(xlabel="trial", ylabel=axis_label(findings), title="Optimisation history")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_beside(ax)
    return fig


def curves(findings: Findings) -> Figure | str:
    """The objective over steps, a line for each seed of each trial."""
    best = findings.best
    rows = [r for r in findings.rows if any(run.curve for run in r.runs)]
    if not rows:
        return "curves: no trial has validated yet; no plot"
    drawn = [(r, run.curve) for r in sample_rows(findings, rows) for run in r.runs if run.curve]
    fig, ax = plt.subplots(figsize=(7, 4))
    seen: set[str] = set()
    for r, curve in drawn:
        x, y = zip(*curve, strict=True)
        chosen = best is not None and r.number == best.number
        name = best_label(findings) if chosen else r.state.lower()
        ax.plot(
            x,
            [factor(findings) * v for v in y],
            color=BEST if chosen else COLORS[r.state],
            lw=2.2 if chosen else 0.9,
            zorder=3 if chosen else 2,
            marker="o" if len(x) < 30 else None,
            ms=4.5 if chosen else 3,
            url=str(r.number),
            label=None if name in seen else name,
        )
        seen.add(name)
    rung_lines(ax, findings)
    baseline_line(ax, findings)
    ax.set(xlabel="step", ylabel=axis_label(findings), title=f"Learning curves{of_sample(rows)}")
    ax.set_xlim(0, findings.search.steps * 1.02)
    legend_beside(ax)
    return fig


def slices(findings: Findings) -> Figure | str:
    """The objective over each searched value."""
    axes_ = findings.search.space.search
    cols = min(3, len(axes_))
    lines = -(-len(axes_) // cols)
    width = {1: 6.5, 2: 8.5}.get(cols, 10.5)
    fig, grid = plt.subplots(lines, cols, figsize=(width, 2.7 * lines + 0.8), sharey=True, squeeze=False)
    marks = paper_values(findings)
    for ax, axis in zip(grid.flat, axes_, strict=False):
        options = list(axis.options)
        placed = [(r.params[axis.path], r) for r in scored_rows(findings) if axis.path in r.params]
        scatter_trials(ax, [(options.index(v) if options else float(v), r) for v, r in placed], findings)
        if axis.path in marks:
            value = marks[axis.path]
            paper_line(ax, options.index(value) if value in options else value)
        slice_axis(ax, axis)
    for ax in list(grid.flat)[len(axes_) :]:
        ax.set_visible(False)
    for ax in grid[:, 0]:
        ax.set_ylabel(axis_label(findings))
    fig.suptitle("Each searched value against the objective")
    found: dict[str, Any] = {}
    for ax in grid.flat:
        handles, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=cols + 1, frameon=False)
    return fig


def importances(findings: Findings) -> Figure | str:
    """Importances, the largest on top."""
    ranking = importance(findings)
    if isinstance(ranking, str):
        return ranking
    complete = sum(r.state == "COMPLETE" for r in findings.rows)
    names, values = list(ranking)[::-1], list(ranking.values())[::-1]
    fig, ax = plt.subplots(figsize=(7, 0.42 * len(names) + 1.4))
    bars = ax.barh([n.rsplit(".", 1)[-1] for n in names], values, color=COLORS["COMPLETE"], height=0.65)
    ax.bar_label(bars, [f"{100 * v:.0f} %" for v in values], padding=3)
    hint = "" if complete >= SURE else ": a hint"
    title = f"Importance for {findings.search.objective}, from {complete} complete trials{hint}"
    ax.set(xlabel="share of importance", title=title)
    ax.set_xlim(0, max([*values, 1e-9]) * 1.15)
    ax.grid(axis="y", visible=False)
    return fig


def contour(findings: Findings) -> Figure | str:
    """The objective over pairs of the numeric axes that matter most."""
    axes_ = _leading(findings)
    if len(axes_) < 2:
        return "contour: needs two numeric axes; no plot"
    made = {}
    for pair in itertools.combinations(axes_, 2):
        found = _field(findings, [Scale(a) for a in pair])
        if found is not None:
            made[pair] = found
    if not made:
        return f"contour: needs {CONTOUR} complete trials that do not lie on one line; no plot"
    fig, grid = plt.subplots(1, len(made), figsize=(4.3 * len(made) + 1.4, 4.2), squeeze=False)
    values = [v for _, field in made.values() for v in field]
    low, high = min(values), max(values)
    levels = [low + (high - low or 1e-6) * k / 12 for k in range(13)]
    for ax, (pair, (triangles, field)) in zip(grid.flat, made.items(), strict=True):
        drawn = ax.tricontourf(triangles, field, levels=levels, cmap="viridis", extend="both")
        over_contour(ax, findings, [Scale(a) for a in pair])
    fig.colorbar(drawn, ax=list(grid.flat), label=axis_label(findings), format="%.1f")
    fig.suptitle("Objective over pairs of values, complete trials interpolated")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return fig


def parallel(findings: Findings) -> Figure | str:
    """Every trial as a line over all axes and the objective."""
    scales = [Scale(a) for a in findings.search.space.search]
    rows = scored_rows(findings)
    low, high = score_limits(findings, rows)
    span = (high - low) or 1.0
    fig, ax = plt.subplots(figsize=(max(6.5, 1.25 * (len(scales) + 1) + 1.5), 4.6))
    best, seen = findings.best, set()
    for r in sorted(sample_rows(findings, rows), key=lambda r: drawn_value(findings, r)):
        height = min(1.0, max(0.0, (drawn_value(findings, r) - low) / span))
        whole, chosen = r.state == "COMPLETE", best is not None and r.number == best.number
        name = best_label(findings) if chosen else "" if whole else "not complete"
        ax.plot(
            range(len(scales) + 1),
            [*places_of(scales, r.params), height],
            color=BEST if chosen else SHADES(height) if whole else COLORS["FAIL"],
            lw=2.6 if chosen else 1.4 if whole else 0.8,
            ls="-" if whole else "--",
            zorder=4 if chosen else 3 if whole else 2,
            url=str(r.number),
            label=None if name in seen else name or None,
        )
        seen.add(name)
    marks = paper_values(findings)
    points = [(x, s.place(marks[s.axis.path])) for x, s in enumerate(scales) if s.axis.path in marks]
    if points:
        ax.scatter(*zip(*points, strict=True), marker="D", s=42, fc="white", ec=PAPER, zorder=6, label="the paper's")
    shown = [float(v) for v in MaxNLocator(5).tick_values(low, high)]
    own = [((v - low) / span, f"{v:g}") for v in shown if low <= v <= high]
    off = [(OFF, "off")] if any(s.axis.when for s in scales) else []
    parallel_axes(ax, [s.ticks() + (off if s.axis.when else []) for s in scales] + [own], bool(off))
    names = [s.axis.name for s in scales]
    ax.set_xticks(range(len(scales) + 1), [*names, axis_label(findings)])
    ax.set_title(f"Values of each trial, the darker the better{of_sample(rows)}", pad=12)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    return fig


def rungs(findings: Findings) -> Figure | str:
    """How many trials reached each validation, by what became of them."""
    steps = sorted({step for r in findings.rows for step, _ in r.curve})
    if not steps:
        return "rungs: no trial has validated yet; no plot"
    gap = min((b - a for a, b in itertools.pairwise(steps)), default=steps[0])
    fig, ax = plt.subplots(figsize=(7, 3.6))
    bottom = [0] * len(steps)
    for state, color in COLORS.items():
        these = [r for r in findings.rows if r.state == state]
        counts = [sum(r.step >= step for r in these) for step in steps]
        if any(counts):
            ax.bar(steps, counts, 0.75 * gap, bottom=bottom, color=color, label=state.lower())
            bottom = [b + c for b, c in zip(bottom, counts, strict=True)]
    if len(steps) <= 20:
        for step, count in zip(steps, bottom, strict=True):
            ax.annotate(
                str(count),
                (step, count),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                zorder=5,
                bbox={"boxstyle": "round,pad=0.05", "fc": "white", "ec": "none"},
            )
    ax.set_ylim(0, 1.1 * bottom[0] if any(bottom) else 1)
    rung_lines(ax, findings)
    ax.set(xlabel="step", ylabel="trials that reached it", title="What the scheduler let through")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(steps) <= 10:
        ax.set_xticks(steps)
    ax.grid(axis="x", visible=False)
    legend_beside(ax)
    return fig


def cost(findings: Findings) -> Figure | str:
    """What each trial held, how much of it was training, and the best score that the compute bought."""
    rows = [r for r in findings.rows if math.isfinite(r.seconds)]
    if not rows:
        return "cost: no trial has ended yet; no plot"
    unit, weigh = _compute(rows)
    scored = [r for r in rows if r.value is not None]
    fig, panels = plt.subplots(1, 1 + bool(scored), figsize=(11 if scored else 7, 3.9), squeeze=False)
    ax = panels[0, 0]
    for state, color in COLORS.items():
        these = [r for r in rows if r.state == state]
        if these:
            numbers, held = [r.number for r in these], [weigh(r, r.seconds) for r in these]
            draw_bars(ax, numbers, held, numbers, fc=to_rgba(color, 0.35), ec=color, lw=0.6)
            trained = [weigh(r, training_seconds(r)) for r in these]
            draw_bars(ax, numbers, trained, fc=color, ec="none", label=state.lower())
    draw_bars(ax, [rows[0].number], [0], fc=to_rgba("#777777", 0.35), ec="#777777", lw=0.6, label="held, not training")
    ax.autoscale_view()
    ax.set_ylim(bottom=0)
    ax.set(xlabel="trial", ylabel=unit, title="What each trial held")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    if scored:
        _bought(panels[0, 1], findings, sorted(rows, key=lambda r: (_or_last(r.ended), r.number)), unit, weigh)
    return fig


def front(findings: Findings) -> Figure | str:
    """The first objective against each other one, with the trials that nothing beats."""
    objectives = findings.search.objectives
    if len(objectives) < 2:
        return ""
    rows = [r for r in findings.rows if r.state == "COMPLETE" and r.values]
    best = pareto(findings.rows, objectives)
    unbeaten = {r.number for r in best}
    if not best:
        return "pareto: no trial has completed within the constraints; no plot"
    fig, grid = plt.subplots(1, len(objectives) - 1, figsize=(5.6 * (len(objectives) - 1) + 1, 4.2), squeeze=False)
    for k, ax in enumerate(grid.flat, 1):
        others = [r for r in rows if r.number not in unbeaten]
        for marker, words, these, color in (
            ("o", "complete", [r for r in others if not r.violation], COLORS["COMPLETE"]),
            ("x", "beyond a constraint", [r for r in others if r.violation], COLORS["FAIL"]),
            ("D", "beaten by none", best, BEST),
        ):
            points = list(zip(*_pair(findings, these, k), strict=True))
            draw_dots(ax, points, [r.number for r in these], c=color, marker=marker, s=38, label=words, zorder=3)
        if len(objectives) == 2:
            ax.plot(*_pair(findings, best, k), color=BEST, lw=0.8)
        for r in best:
            x, y = _pair(findings, [r], k)
            ax.annotate(str(r.number), (x[0], y[0]), (5, 4), textcoords="offset points", fontsize=9)
        ax.set(xlabel=label(objectives[k].name), ylabel=axis_label(findings))
    fig.suptitle("Objectives against each other, numbers of trials")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return fig


PLOTS: dict[str, Callable[[Findings], Figure | str]] = {
    "history": history,
    "curves": curves,
    "importance": importances,
    "slices": slices,
    "contour": contour,
    "parallel": parallel,
    "pareto": front,
    DIFFERENCES: differences,
    "rungs": rungs,
    "cost": cost,
}
UNSCORED = (cost,)


def _leading(findings: Findings) -> list[Axis]:
    """The numeric axes by importance, as many as a contour shows; in the file's order where it is not known."""
    axes_ = [a for a in findings.search.space.search if is_numeric(a)]
    ranking = importance(findings)
    if isinstance(ranking, dict):
        axes_.sort(key=lambda a: -ranking.get(a.path, 0.0))
    return axes_[:CONTOUR_AXES]


def _field(findings: Findings, scales: Sequence[Scale]) -> tuple[Triangulation, list[float]] | None:
    """The plane of two axes cut into triangles, and the objective at their corners; ``None`` with too little."""
    found: dict[tuple[float, ...], list[float]] = {}
    for r in scored_rows(findings):
        if r.state == "COMPLETE" and all(s.axis.path in r.params for s in scales):
            at = tuple(round(s.place(r.params[s.axis.path]), 9) for s in scales)
            found.setdefault(at, []).append(drawn_value(findings, r))
    if len(found) < CONTOUR:
        return None
    try:
        triangles = Triangulation(*zip(*found, strict=True))
    except (RuntimeError, ValueError):  # all on one line
        return None
    return triangles, [sum(v) / len(v) for v in found.values()]


def _compute(rows: Sequence[TrialRow]) -> tuple[str, Callable[[TrialRow, float], float]]:
    """The unit of compute that fits these trials, and what a trial's seconds are in it."""
    kind = "GPU-" if any(r.gpus for r in rows) else "CPU-" if any(r.cpus for r in rows) else ""

    def parts(row: TrialRow) -> float:
        return row.gpus if kind == "GPU-" else row.cpus if kind == "CPU-" else 1.0

    total = sum(parts(r) * r.seconds for r in rows)
    unit, size = ("hours", 3600.0) if total > 1800 else ("minutes", 60.0)
    return f"{kind}{unit}", lambda row, seconds: parts(row) * seconds / size


def _bought(
    ax: Axes, findings: Findings, rows: Sequence[TrialRow], unit: str, weigh: Callable[[TrialRow, float], float]
) -> None:
    """Scores over the compute that was spent when each trial ended."""
    spent = list(itertools.accumulate(weigh(r, r.seconds) for r in rows))
    scatter_trials(ax, [(x, r) for x, r in zip(spent, rows, strict=True) if r.value is not None], findings)
    ax.step(spent, best_so_far(findings, rows), where="post", color=COLORS["COMPLETE"], lw=0.9, label="best so far")
    ax.set(xlabel=f"{unit} spent", ylabel=axis_label(findings), title="What the compute bought")
    ax.set_xlim(left=0)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _or_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _pair(findings: Findings, rows: Sequence[TrialRow], k: int) -> tuple[list[float], list[float]]:
    """The k-th and the first objective of trials, as drawn."""
    scale = 100.0 if percent(findings.search.objectives[k].name) else 1.0
    return [scale * r.values[k] for r in rows], [drawn_value(findings, r) for r in rows]
