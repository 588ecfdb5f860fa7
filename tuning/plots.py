"""Plots of a search as PNG files, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from optuna.trial import TrialState

if TYPE_CHECKING:
    from tuning.driver import Search
    from tuning.report import TrialRow

COLORS = {"COMPLETE": "#2563a8", "PRUNED": "#e08a1e", "FAIL": "#9a9a9a", "RUNNING": "#6aa84f"}
BEST = "#c2185b"
# Measured on synthetic objectives of nine values, one of which matters most: with the best third as
# target PED-ANOVA ranks it first in 9 of 20 studies of 6 trials, 14 of 10, 20 of 20. (With Optuna's
# default, the best tenth: 8, 9, 14.) Below ENOUGH it is said and not drawn, below SURE it is a hint.
ENOUGH, SURE = 10, 20
TARGET_QUANTILE = 1 / 3

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 130,
}


def draw(
    search: Search, study: optuna.Study, rows: Sequence[TrialRow], best: TrialRow | None, folder: Path
) -> list[str]:
    """Draw ``history.png``, ``curves.png``, ``slices.png`` and, with enough trials, ``importance.png``.

    Returns:
        Lines to tell the user: what could not be drawn, and why.
    """
    scored = [r for r in rows if r.value is not None]
    if not scored:
        return ["no trial has a score yet: no plots"]
    folder.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    with matplotlib.rc_context(STYLE):
        _save(history(search, scored, best), folder / "history.png")
        _save(curves(search, scored, best), folder / "curves.png")
        _save(slices(search, scored, best), folder / "slices.png")
        ranking = importance(study)
        target = folder / "importance.png"
        if isinstance(ranking, str):
            notes.append(ranking)
            target.unlink(missing_ok=True)
        else:
            complete = sum(r.state == "COMPLETE" for r in scored)
            _save(importance_bars(ranking, complete, search.objective), target)
    return notes


def importance(study: optuna.Study) -> dict[str, float] | str:
    """Each searched path's importance over COMPLETE trials, or a line that says why there is none."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < ENOUGH:
        return f"importance: {len(complete)} complete trials are too few to tell (from {ENOUGH} on); no plot"
    # Optuna would count the early scores of pruned trials too: give it the complete ones alone.
    whole = optuna.create_study(direction="maximize")
    whole.add_trials(complete)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TARGET_QUANTILE)
    try:
        return dict(optuna.importance.get_param_importances(whole, evaluator=evaluator))
    except (ValueError, RuntimeError) as error:
        return f"importance: cannot be told ({str(error).splitlines()[0]})"


def history(search: Search, rows: Sequence[TrialRow], best: TrialRow | None) -> Figure:
    """Score of each trial in order, and the best complete one so far."""
    fig, ax = plt.subplots(figsize=(7, 4))
    _scatter(ax, [(r.number, r) for r in rows], best)
    so_far, line = -math.inf, []
    for r in rows:
        if r.state == "COMPLETE" and r.value is not None:
            so_far = max(so_far, r.value)
        line.append((r.number, 100 * so_far if so_far > -math.inf else math.nan))
    ax.step(*zip(*line, strict=True), where="post", color=COLORS["COMPLETE"], alpha=0.5, label="best so far")
    ax.set(xlabel="trial", ylabel=_label(search), title="Optimisation history")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(ax)
    return fig


def curves(search: Search, rows: Sequence[TrialRow], best: TrialRow | None) -> Figure:
    """The objective over steps of every trial."""
    fig, ax = plt.subplots(figsize=(7, 4))
    seen: set[str] = set()
    for r in rows:
        if not r.curve:
            continue
        x, y = zip(*r.curve, strict=True)
        chosen = best is not None and r.number == best.number
        color = BEST if chosen else COLORS[r.state]
        name = f"best: trial {r.number}" if chosen else r.state.lower()
        ax.plot(
            x,
            [100 * v for v in y],
            color=color,
            lw=2.4 if chosen else 1.2,
            alpha=1 if chosen else 0.7,
            zorder=3 if chosen else 2,
            marker="o" if len(x) < 30 else None,
            ms=5 if chosen else 3.5,
            label=None if name in seen else name,
        )
        seen.add(name)
    if search.space.scheduler.name == "asha":
        ax.axvline(search.space.scheduler.grace_steps, color="#555555", ls=":", lw=1, label="first rung of ASHA")
    ax.set(xlabel="step", ylabel=_label(search), title="Learning curves")
    ax.set_xlim(0, search.base.train.steps * 1.02)
    _legend(ax)
    return fig


def slices(search: Search, rows: Sequence[TrialRow], best: TrialRow | None) -> Figure:
    """The objective over each searched value."""
    axes_ = search.space.search
    cols = min(3, len(axes_))
    lines = -(-len(axes_) // cols)
    fig, grid = plt.subplots(lines, cols, figsize=(3.5 * cols, 2.7 * lines + 0.5), sharey=True, squeeze=False)
    for ax, axis in zip(grid.flat, axes_, strict=False):
        options = list(axis.options)
        place: list[tuple[float, TrialRow]] = []
        for r in rows:
            value: Any = r.params.get(axis.path)
            if value is not None:
                place.append((options.index(value) if options else float(value), r))
        _scatter(ax, place, best)
        if options:
            ax.set_xticks(range(len(options)), [str(o) for o in options])
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
        ax.set_xlabel(axis.path.rsplit(".", 1)[-1])
    for ax in list(grid.flat)[len(axes_) :]:
        ax.set_visible(False)
    for ax in grid[:, 0]:
        ax.set_ylabel(_label(search))
    found: dict[str, Any] = {}
    for ax in grid.flat:
        handles, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    fig.suptitle("Each searched value against the objective")
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), frameon=False)
    return fig


def importance_bars(ranking: dict[str, float], complete: int, objective: str) -> Figure:
    """Importances, the largest on top."""
    names, values = list(ranking)[::-1], list(ranking.values())[::-1]
    fig, ax = plt.subplots(figsize=(7, 0.42 * len(names) + 1.4))
    bars = ax.barh([n.rsplit(".", 1)[-1] for n in names], values, color=COLORS["COMPLETE"], height=0.65)
    ax.bar_label(bars, [f"{100 * v:.0f} %" for v in values], padding=3)
    hint = "" if complete >= SURE else ": a hint"
    ax.set(xlabel="share of importance", title=f"Importance for {objective}, from {complete} complete trials{hint}")
    ax.set_xlim(0, max([*values, 1e-9]) * 1.15)
    ax.grid(axis="y", visible=False)
    return fig


def _scatter(ax: Axes, placed: Sequence[tuple[float, TrialRow]], best: TrialRow | None) -> None:
    for state, color in COLORS.items():
        these = [(x, r) for x, r in placed if r.state == state and (best is None or r.number != best.number)]
        if these:
            marker = "x" if state == "FAIL" else "o"
            xs, ys = [x for x, _ in these], [_percent(r.value) for _, r in these]
            ax.scatter(xs, ys, color=color, marker=marker, s=32, alpha=0.85, label=state.lower())
    for x, r in placed:
        if best is not None and r.number == best.number:
            ax.scatter(
                [x], [_percent(r.value)], color=BEST, marker="*", s=150, zorder=4, label=f"best: trial {best.number}"
            )


def _percent(value: float | None) -> float:
    return math.nan if value is None else 100 * value


def _label(search: Search) -> str:
    return search.objective.replace("_", " ").replace("miou", "mIoU").replace("map", "mAP").replace("f1", "F1") + ", %"


def _legend(ax: Axes) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _save(fig: Figure, path: Path) -> None:
    fig.set_layout_engine("constrained")
    fig.savefig(path)
    plt.close(fig)
