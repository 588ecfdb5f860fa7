"""Plots of a search as PNG files, drawn without a display."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import optuna
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.tri import Triangulation
from optuna.trial import TrialState

from tuning.facts import baseline, paper_trial, paper_values, training_seconds
from tuning.record import TrialRow, collapsed, label, pareto, percent, ranked
from tuning.search import Findings, once
from tuning.space import Axis, SearchSpace
from ugrl.secrets import masked
from ugrl.storage import place
from ugrl.text import line as one_line

# Lines and marks on white: each has a contrast of 3:1 or more (WCAG 2.1, 1.4.11), and none is drawn translucent.
COLORS = {
    "COMPLETE": "#2563a8",
    "PRUNED": "#c26a00",
    "FAIL": "#7d7d7d",
    "RUNNING": "#3f8a2f",
    "WAITING": "#7e6bb5",
}
SHADES = LinearSegmentedColormap.from_list("shades", ["#c07a2b", "#a8506e", "#4b3a8c", "#101c4a"])
BEST = "#c2185b"
PAPER = "#111111"
# Measured on synthetic objectives of nine values, one of which matters most: with the best third as
# target PED-ANOVA ranks it first in 9 of 20 studies of 6 trials, 14 of 10, 20 of 20. (With Optuna's
# default, the best tenth: 8, 9, 14.) Below ENOUGH it is said and not drawn, below SURE it is a hint.
ENOUGH, SURE = 10, 20
TARGET_QUANTILE = 1 / 3
# Below so many complete trials a contour shows the triangles between the trials and nothing else.
CONTOUR = 8
CONTOUR_AXES = 3
# Trials that are drawn as a line each; of more, a sample is.
LINES = 500
# How far beyond the complete trials' scores others are marked, as a share of their range.
EDGE = 0.05

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a value with two dollar signs is no formula
    "figure.dpi": 110,
    "savefig.dpi": 130,
}


def draw(findings: Findings, folder: Path) -> list[str]:
    """Draw every plot of :data:`PLOTS` that the findings suffice for, and remove those that they do not.

    Args:
        findings: Of the search.
        folder: Where ``NAME.png`` go; made if needed.

    Returns:
        Lines to tell the user: what could not be drawn, and why.
    """
    scored = any(r.value is not None for r in findings.rows)
    notes = [] if scored else ["no trial has a score yet: no plots of scores"]
    with matplotlib.rc_context(STYLE):
        for name, plot in PLOTS.items():
            found = plot(findings) if scored or plot in UNSCORED else ""
            if isinstance(found, Figure):
                save(found, folder / f"{name}.png")
                continue
            (folder / f"{name}.png").unlink(missing_ok=True)
            if found:
                notes.append(found)
    return notes


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
    rows = _scored(findings)
    fig, ax = plt.subplots(figsize=(7, 4))
    _scatter(ax, [(r.number, r) for r in rows], findings)
    low, high = _limits(findings, rows)
    noisy = [r for r in rows if math.isfinite(r.stderr) and low <= _y(findings, r) <= high]
    if noisy:
        x, y, e = zip(*[(r.number, _y(findings, r), _scale(findings) * r.stderr) for r in noisy], strict=True)
        ax.errorbar(x, y, yerr=e, fmt="none", ecolor="#777777", elinewidth=0.9, capsize=2, zorder=1)
    line = [(r.number, v) for r, v in zip(rows, _so_far(findings, rows), strict=True)]
    ax.step(*zip(*line, strict=True), where="post", color=COLORS["COMPLETE"], lw=0.9, label="best so far")
    _baseline_line(ax, findings)
    ax.set(xlabel="trial", ylabel=_label(findings), title="Optimisation history")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(ax)
    return fig


def curves(findings: Findings) -> Figure | str:
    """The objective over steps, a line for each seed of each trial."""
    best = findings.best
    rows = [r for r in findings.rows if any(run.curve for run in r.runs)]
    if not rows:
        return "curves: no trial has validated yet; no plot"
    drawn = [(r, run.curve) for r in _sample(findings, rows) for run in r.runs if run.curve]
    fig, ax = plt.subplots(figsize=(7, 4))
    seen: set[str] = set()
    for r, curve in drawn:
        x, y = zip(*curve, strict=True)
        chosen = best is not None and r.number == best.number
        name = _best_label(findings) if chosen else r.state.lower()
        ax.plot(
            x,
            [_scale(findings) * v for v in y],
            color=BEST if chosen else COLORS[r.state],
            lw=2.2 if chosen else 0.9,
            zorder=3 if chosen else 2,
            marker="o" if len(x) < 30 else None,
            ms=4.5 if chosen else 3,
            label=None if name in seen else name,
        )
        seen.add(name)
    _rung_lines(ax, findings)
    _baseline_line(ax, findings)
    ax.set(xlabel="step", ylabel=_label(findings), title=f"Learning curves{_of_sample(rows)}")
    ax.set_xlim(0, findings.search.steps * 1.02)
    _legend(ax)
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
        placed = [(r.params[axis.path], r) for r in _scored(findings) if axis.path in r.params]
        _scatter(ax, [(options.index(v) if options else float(v), r) for v, r in placed], findings)
        if axis.path in marks:
            value = marks[axis.path]
            _paper_line(ax, options.index(value) if value in options else value)
        _slice_axis(ax, axis)
    for ax in list(grid.flat)[len(axes_) :]:
        ax.set_visible(False)
    for ax in grid[:, 0]:
        ax.set_ylabel(_label(findings))
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


# Characters of a value at an axis.
TICK = 24


def tick(value: Any) -> str:
    """A value at an axis."""
    return one_line(masked(value), TICK)


@dataclass(frozen=True)
class Scale:
    """Places the values of an axis between 0 and 1: even on its own scale, options side by side."""

    axis: Axis

    @property
    def options(self) -> list[Any]:
        """Of a choice; numbers in order."""
        options = list(self.axis.options)
        return sorted(options) if is_numeric(self.axis) else options

    def place(self, value: Any) -> float:
        """Where a value lies; NaN where it is no value of the axis."""
        if self.axis.kind == "choice":
            options = self.options
            return options.index(value) / max(1, len(options) - 1) if value in options else math.nan
        low, high, x = self.axis.low, self.axis.high, float(value)
        if self.axis.log:
            low, high, x = math.log(low), math.log(high), math.log(x)
        return (x - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels of a handful of values."""
        if self.axis.kind == "choice":
            return [(self.place(o), tick(o)) for o in self.options]
        low, high = self.axis.low, self.axis.high
        locator = LogLocator(subs=(1.0, 3.0)) if self.axis.log else MaxNLocator(5, integer=self.axis.integer)
        values = [v for v in locator.tick_values(low, high) if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        return [(self.place(v), f"{v:g}") for v in (values if len(values) > 1 else (low, high))]


def is_numeric(axis: Axis) -> bool:
    """Whether the values of an axis are numbers."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in axis.edges)


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
        _over_contour(ax, findings, [Scale(a) for a in pair])
    fig.colorbar(drawn, ax=list(grid.flat), label=_label(findings), format="%.1f")
    fig.suptitle("Objective over pairs of values, complete trials interpolated")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return fig


def parallel(findings: Findings) -> Figure | str:
    """Every trial as a line over all axes and the objective."""
    scales = [Scale(a) for a in findings.search.space.search]
    rows = _scored(findings)
    low, high = _limits(findings, rows)
    span = (high - low) or 1.0
    fig, ax = plt.subplots(figsize=(max(6.5, 1.25 * (len(scales) + 1) + 1.5), 4.6))
    best, seen = findings.best, set()
    for r in sorted(_sample(findings, rows), key=lambda r: _y(findings, r)):
        height = min(1.0, max(0.0, (_y(findings, r) - low) / span))
        whole, chosen = r.state == "COMPLETE", best is not None and r.number == best.number
        name = _best_label(findings) if chosen else "" if whole else "not complete"
        ax.plot(
            range(len(scales) + 1),
            [*_places(scales, r.params), height],
            color=BEST if chosen else SHADES(height) if whole else COLORS["FAIL"],
            lw=2.6 if chosen else 1.4 if whole else 0.8,
            ls="-" if whole else "--",
            zorder=4 if chosen else 3 if whole else 2,
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
    _parallel_axes(ax, [s.ticks() + (off if s.axis.when else []) for s in scales] + [own], bool(off))
    names = [s.axis.name for s in scales]
    ax.set_xticks(range(len(scales) + 1), [*names, _label(findings)])
    ax.set_title(f"Values of each trial, the darker the better{_of_sample(rows)}", pad=12)
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
    _rung_lines(ax, findings)
    ax.set(xlabel="step", ylabel="trials that reached it", title="What the scheduler let through")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(steps) <= 10:
        ax.set_xticks(steps)
    ax.grid(axis="x", visible=False)
    _legend(ax)
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
            _bars(ax, numbers, held, fc=to_rgba(color, 0.35), ec=color, lw=0.6)
            trained = [weigh(r, training_seconds(r)) for r in these]
            _bars(ax, numbers, trained, fc=color, ec="none", label=state.lower())
    _bars(ax, [rows[0].number], [0], fc=to_rgba("#777777", 0.35), ec="#777777", lw=0.6, label="held, not training")
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
            if these:
                ax.scatter(*_pair(findings, these, k), c=color, marker=marker, s=38, label=words, zorder=3)
        if len(objectives) == 2:
            ax.plot(*_pair(findings, best, k), color=BEST, lw=0.8)
        for r in best:
            x, y = _pair(findings, [r], k)
            ax.annotate(str(r.number), (x[0], y[0]), (5, 4), textcoords="offset points", fontsize=9)
        ax.set(xlabel=label(objectives[k].name), ylabel=_label(findings))
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
    "rungs": rungs,
    "cost": cost,
}
UNSCORED = (cost,)


def save(fig: Figure, path: Path) -> None:
    """Write a figure and forget it."""
    fig.set_layout_engine("constrained")
    picture = io.BytesIO()
    fig.savefig(picture, format="png")
    plt.close(fig)
    place(path).write(picture.getvalue())


def rung_steps(space: SearchSpace, steps: int) -> list[int]:
    """Steps at which the scheduler may stop a trial, the end left out.

    Args:
        space: The search.
        steps: Of a whole run.
    """
    asked, first = space.scheduler, int(space.scheduler.grace_steps)
    if asked.name != "asha":
        return [first] if asked.name in ("median", "hyperband") else []
    made = [first]
    while made[-1] * asked.reduction_factor < steps:
        made.append(int(made[-1] * asked.reduction_factor))
    return made if made[0] < steps else []


# -- parts of plots ---------------------------------------------------------------------------


def _scored(findings: Findings) -> list[TrialRow]:
    return [r for r in findings.rows if r.value is not None]


def _sample(findings: Findings, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """As many trials as can be told apart as lines, evenly over the search, with the best one and the paper's."""
    if len(rows) <= LINES:
        return list(rows)
    even = {rows[k * len(rows) // LINES].number for k in range(LINES)}
    named = {r.number for r in (findings.best, paper_trial(findings)) if r is not None}
    return [r for r in rows if r.number in even | named]


def _of_sample(rows: Sequence[TrialRow]) -> str:
    return f": a sample of {LINES} of {len(rows)} trials" if len(rows) > LINES else ""


def _bars(ax: Axes, x: Sequence[float], heights: Sequence[float], **style: Any) -> None:
    """Bars from zero as one artist: an artist each is slow for thousands."""
    sides = ((-0.4, 0), (-0.4, 1), (0.4, 1), (0.4, 0))
    corners = [[(at + aside, up * height) for aside, up in sides] for at, height in zip(x, heights, strict=True)]
    ax.add_collection(PolyCollection(corners, **style))


def _scale(findings: Findings) -> float:
    return 100.0 if percent(findings.search.objective) else 1.0


def _y(findings: Findings, row: TrialRow) -> float:
    return math.nan if row.value is None else _scale(findings) * row.value


def _label(findings: Findings) -> str:
    return label(findings.search.objective)


def _so_far(findings: Findings, rows: Sequence[TrialRow]) -> list[float]:
    """The best score after each of these trials, as drawn; NaN before the first complete one."""
    objective, sign = findings.search.objectives[0], 1.0 if findings.search.objectives[0].maximize else -1.0
    able = {r.number for r in ranked(rows, objective)}
    best, line = -math.inf, []
    for r in rows:
        if r.number in able:
            best = max(best, sign * _y(findings, r))
        line.append(sign * best if best > -math.inf else math.nan)
    return line


def _legend(ax: Axes) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _limits(findings: Findings, rows: Sequence[TrialRow]) -> tuple[float, float]:
    """The lowest and the highest score as drawn, without early and collapsed ones where two others are left."""
    done = [_y(findings, r) for r in rows if r.state == "COMPLETE" and not collapsed(r.runs)]
    ys = done if len(done) > 1 and max(done) > min(done) else [_y(findings, r) for r in rows]
    return min(ys), max(ys)


def _best_label(findings: Findings) -> str:
    number = findings.best.number if findings.best else ""
    return f"best with fresh seeds: trial {number}" if findings.finalists else f"best: trial {number}"


def _scatter(ax: Axes, placed: Sequence[tuple[float, TrialRow]], findings: Findings) -> None:
    best, paper = findings.best, paper_trial(findings)
    low, high = _limits(findings, _scored(findings))
    margin = EDGE * ((high - low) or 1.0)
    # What lies beyond the others would squeeze them: it is drawn hollow at the edge.
    at = {r.number: min(high + margin, max(low - margin, _y(findings, r))) for _, r in placed}
    for state, color in COLORS.items():
        these = [(x, r) for x, r in placed if r.state == state and (best is None or r.number != best.number)]
        inside = [(x, at[r.number]) for x, r in these if low <= at[r.number] <= high]
        _dots(ax, inside, color=color, marker="x" if state == "FAIL" else "o", s=32, label=state.lower())
        for marker, outside in (
            ("v", [(x, at[r.number]) for x, r in these if at[r.number] < low]),
            ("^", [(x, at[r.number]) for x, r in these if at[r.number] > high]),
        ):
            _dots(ax, outside, fc="none", ec=color, marker=marker, s=38, label=f"{state.lower()}, beyond the axis")
    for x, r in placed:
        if best is not None and r.number == best.number:
            ax.scatter([x], [at[r.number]], color=BEST, marker="*", s=150, zorder=4, label=_best_label(findings))
        if paper is not None and r.number == paper.number:
            name = f"the paper's: trial {r.number}"
            ax.scatter([x], [at[r.number]], fc="none", ec=PAPER, marker="D", s=70, lw=1.3, zorder=5, label=name)


def _baseline_line(ax: Axes, findings: Findings) -> None:
    """What is had without learning anything, where the axis shows it."""
    value = _scale(findings) * baseline(findings, findings.search.objective)
    low, high = ax.get_ylim()
    if low <= value <= high:
        ax.axhline(value, color="#444444", ls="-.", lw=1.0, zorder=1, label="without learning anything")


def _paper_line(ax: Axes, x: float, *, across: bool = False) -> None:
    (ax.axhline if across else ax.axvline)(x, color="#666666", ls="--", lw=0.9, label="the paper's value")


def _slice_axis(ax: Axes, axis: Axis) -> None:
    options = list(axis.options)
    if options:
        names = [tick(o) for o in options]
        wordy = max(map(len, names)) * len(options) > 28
        ax.set_xticks(range(len(options)), names, rotation=25 if wordy else 0)
        ax.set_xlim(-0.5, len(options) - 0.5)
    elif axis.log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(axis.low / 1.15, axis.high * 1.15)
    else:
        margin = 0.05 * (axis.high - axis.low)
        ax.set_xlim(axis.low - margin, axis.high + margin)
    ax.set_xlabel(axis.name)


def _rung_lines(ax: Axes, findings: Findings) -> None:
    space = findings.search.space
    name = {"asha": "rungs of ASHA"}.get(space.scheduler.name, "no stop before")
    for k, step in enumerate(rung_steps(space, findings.search.steps)):
        ax.axvline(step, color="#555555", ls=":", lw=1.1, label=None if k else name)


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
    for r in _scored(findings):
        if r.state == "COMPLETE" and all(s.axis.path in r.params for s in scales):
            at = tuple(round(s.place(r.params[s.axis.path]), 9) for s in scales)
            found.setdefault(at, []).append(_y(findings, r))
    if len(found) < CONTOUR:
        return None
    try:
        triangles = Triangulation(*zip(*found, strict=True))
    except (RuntimeError, ValueError):  # all on one line
        return None
    return triangles, [sum(v) / len(v) for v in found.values()]


def _over_contour(ax: Axes, findings: Findings, scales: Sequence[Scale]) -> None:
    """Trials, the best one and the paper's point on top of a contour, and its axes."""
    rows = [r for r in _scored(findings) if all(sc.axis.path in r.params for sc in scales)]
    whole = [_places(scales, r.params) for r in rows if r.state == "COMPLETE"]
    early = [_places(scales, r.params) for r in rows if r.state != "COMPLETE"]
    _dots(ax, whole, fc="white", ec="#333333", s=26, lw=0.9, zorder=3, label="complete")
    _dots(ax, early, fc="#bbbbbb", ec="#333333", marker="s", s=18, lw=0.7, zorder=3, label="not complete")
    best, marks = findings.best, paper_values(findings)
    top = [_places(scales, r.params) for r in rows if best is not None and r.number == best.number]
    _dots(ax, top, color=BEST, ec="white", marker="*", s=190, zorder=5, label=_best_label(findings))
    paper = paper_trial(findings)
    at = marks if paper is None else paper.params
    known = [s.place(at[s.axis.path]) if s.axis.path in at else math.nan for s in scales]
    if all(map(math.isfinite, known)):
        _dots(ax, [known], fc="none", ec="white", marker="D", s=80, lw=2.6, zorder=4)
        name = "the paper's" + (f": trial {paper.number}" if paper else "")
        _dots(ax, [known], fc="none", ec=PAPER, marker="D", s=80, lw=1.3, zorder=4, label=name)
    elif any(map(math.isfinite, known)):
        across = math.isfinite(known[1])
        _paper_line(ax, known[across], across=across)
    ax.set_xticks(*zip(*scales[0].ticks(), strict=True))
    ax.set_yticks(*zip(*scales[1].ticks(), strict=True))
    ax.set(xlabel=scales[0].axis.name, ylabel=scales[1].axis.name, xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    ax.grid(visible=False)


def _dots(ax: Axes, points: Sequence[Sequence[float]], **style: Any) -> None:
    if points:
        ax.scatter([p[0] for p in points], [p[1] for p in points], **style)


# Where a line crosses a parallel axis that does not count.
OFF = -0.12


def _places(scales: Sequence[Scale], params: Any) -> list[float]:
    """Where a point lies on each axis; below the axis where the axis does not count."""
    return [s.place(params[s.axis.path]) if s.axis.path in params else OFF for s in scales]


def _parallel_axes(ax: Axes, ticks: Sequence[Sequence[tuple[float, str]]], off: bool) -> None:
    """Upright axes with labels of their own."""
    for x, own in enumerate(ticks):
        ax.axvline(x, ymin=0, color="#666666", lw=1, zorder=1)
        last = x == len(ticks) - 1
        for y, text in own:
            ax.plot([x - 0.03, x + 0.03], [y, y], color="#666666", lw=1, zorder=1)
            ax.text(
                x + (0.07 if last else -0.07),
                y,
                text,
                ha="left" if last else "right",
                va="center",
                fontsize=8.5,
                color="#222222",
                zorder=7,
                bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.75},
            )
    ax.set_xlim(-0.6, len(ticks) - 0.4)
    ax.set_ylim(OFF - 0.06 if off else -0.05, 1.05)
    ax.set_yticks([])
    ax.tick_params(axis="x", length=0)
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


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
    _scatter(ax, [(x, r) for x, r in zip(spent, rows, strict=True) if r.value is not None], findings)
    ax.step(spent, _so_far(findings, rows), where="post", color=COLORS["COMPLETE"], lw=0.9, label="best so far")
    ax.set(xlabel=f"{unit} spent", ylabel=_label(findings), title="What the compute bought")
    ax.set_xlim(left=0)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _or_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _pair(findings: Findings, rows: Sequence[TrialRow], k: int) -> tuple[list[float], list[float]]:
    """The k-th and the first objective of trials, as drawn."""
    scale = 100.0 if percent(findings.search.objectives[k].name) else 1.0
    return [scale * r.values[k] for r in rows], [_y(findings, r) for r in rows]
