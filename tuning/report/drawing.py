"""What the plots of a search are put together from: colours, scales, axes, marks."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tuning.report.findings import baseline, paper_trial, paper_values
from tuning.report.read import Findings
from tuning.report.spots import Spot, spots_of
from tuning.space.axis import Axis
from tuning.space.space import SearchSpace
from tuning.study.record import TrialRow, collapsed, label, percent, ranked
from ugrl.secrets import masked
from ugrl.storage import place
from ugrl.text import line as one_line

matplotlib.use("Agg")
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


def save(fig: Figure, path: Path) -> list[Spot]:
    """Write a figure and forget it; the marks in it that stand for trials."""
    fig.set_layout_engine("constrained")
    picture = io.BytesIO()
    fig.savefig(picture, format="png")
    spots = spots_of(fig)
    plt.close(fig)
    place(path).write(picture.getvalue())
    return spots


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


def scored_rows(findings: Findings) -> list[TrialRow]:
    """The trials that have a score."""
    return [r for r in findings.rows if r.value is not None]


def sample_rows(findings: Findings, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """As many trials as can be told apart as lines, evenly over the search, with the best one and the paper's."""
    if len(rows) <= LINES:
        return list(rows)
    even = {rows[k * len(rows) // LINES].number for k in range(LINES)}
    named = {r.number for r in (findings.best, paper_trial(findings)) if r is not None}
    return [r for r in rows if r.number in even | named]


def of_sample(rows: Sequence[TrialRow]) -> str:
    """What a title says where a sample of the trials is drawn."""
    return f": a sample of {LINES} of {len(rows)} trials" if len(rows) > LINES else ""


def draw_bars(ax: Axes, x: Sequence[float], heights: Sequence[float], trials: Sequence[int] = (), **style: Any) -> None:
    """Bars from zero as one artist: an artist each is slow for thousands. ``trials`` are those that they stand for."""
    sides = ((-0.4, 0), (-0.4, 1), (0.4, 1), (0.4, 0))
    corners = [[(at + aside, up * height) for aside, up in sides] for at, height in zip(x, heights, strict=True)]
    ax.add_collection(PolyCollection(corners, urls=_urls(trials), **style))


def factor(findings: Findings) -> float:
    """From a score to what is drawn: percent for ratios."""
    return 100.0 if percent(findings.search.objective) else 1.0


def drawn_value(findings: Findings, row: TrialRow) -> float:
    """A trial's score as drawn; NaN without one."""
    return math.nan if row.value is None else factor(findings) * row.value


def axis_label(findings: Findings) -> str:
    """The first objective with its unit."""
    return label(findings.search.objective)


def best_so_far(findings: Findings, rows: Sequence[TrialRow]) -> list[float]:
    """The best score after each of these trials, as drawn; NaN before the first complete one."""
    objective, sign = findings.search.objectives[0], 1.0 if findings.search.objectives[0].maximize else -1.0
    able = {r.number for r in ranked(rows, objective)}
    best, line = -math.inf, []
    for r in rows:
        if r.number in able:
            best = max(best, sign * drawn_value(findings, r))
        line.append(sign * best if best > -math.inf else math.nan)
    return line


def legend_beside(ax: Axes) -> None:
    """The legend, to the right of the axes."""
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def score_limits(findings: Findings, rows: Sequence[TrialRow]) -> tuple[float, float]:
    """The lowest and the highest score as drawn, without early and collapsed ones where two others are left."""
    done = [drawn_value(findings, r) for r in rows if r.state == "COMPLETE" and not collapsed(r.runs)]
    ys = done if len(done) > 1 and max(done) > min(done) else [drawn_value(findings, r) for r in rows]
    return min(ys), max(ys)


def best_label(findings: Findings) -> str:
    """How a legend names the best trial."""
    number = findings.best.number if findings.best else ""
    return f"best with fresh seeds: trial {number}" if findings.finalists else f"best: trial {number}"


def scatter_trials(ax: Axes, placed: Sequence[tuple[float, TrialRow]], findings: Findings) -> None:
    """Trials as marks by their state, with the best one and the paper's."""
    best, paper = findings.best, paper_trial(findings)
    low, high = score_limits(findings, scored_rows(findings))
    margin = EDGE * ((high - low) or 1.0)
    # What lies beyond the others would squeeze them: it is drawn hollow at the edge.
    at = {r.number: min(high + margin, max(low - margin, drawn_value(findings, r))) for _, r in placed}
    for state, color in COLORS.items():
        these = [(x, r) for x, r in placed if r.state == state and (best is None or r.number != best.number)]
        for marker, there, style in (
            ("x" if state == "FAIL" else "o", lambda y: low <= y <= high, {"color": color, "s": 32}),
            ("v", lambda y: y < low, {"fc": "none", "ec": color, "s": 38}),
            ("^", lambda y: y > high, {"fc": "none", "ec": color, "s": 38}),
        ):
            shown = [(x, r) for x, r in these if there(at[r.number])]
            words = state.lower() if "color" in style else f"{state.lower()}, beyond the axis"
            points, trials = [(x, at[r.number]) for x, r in shown], [r.number for _, r in shown]
            draw_dots(ax, points, trials, marker=marker, label=words, **style)
    for x, r in placed:
        if best is not None and r.number == best.number:
            star = {"color": BEST, "marker": "*", "s": 150, "zorder": 4, "label": best_label(findings)}
            draw_dots(ax, [(x, at[r.number])], [r.number], **star)
        if paper is not None and r.number == paper.number:
            name = f"the paper's: trial {r.number}"
            ax.scatter([x], [at[r.number]], fc="none", ec=PAPER, marker="D", s=70, lw=1.3, zorder=5, label=name)


def baseline_line(ax: Axes, findings: Findings) -> None:
    """What is had without learning anything, where the axis shows it."""
    value = factor(findings) * baseline(findings, findings.search.objective)
    low, high = ax.get_ylim()
    if low <= value <= high:
        ax.axhline(value, color="#444444", ls="-.", lw=1.0, zorder=1, label="without learning anything")


def paper_line(ax: Axes, x: float, *, across: bool = False) -> None:
    """A line at the paper's value."""
    (ax.axhline if across else ax.axvline)(x, color="#666666", ls="--", lw=0.9, label="the paper's value")


def slice_axis(ax: Axes, axis: Axis) -> None:
    """Ticks and limits of a searched value."""
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


def rung_lines(ax: Axes, findings: Findings) -> None:
    """Lines at the steps where the scheduler may stop a trial."""
    space = findings.search.space
    name = {"asha": "rungs of ASHA"}.get(space.scheduler.name, "no stop before")
    for k, step in enumerate(rung_steps(space, findings.search.steps)):
        ax.axvline(step, color="#555555", ls=":", lw=1.1, label=None if k else name)


def over_contour(ax: Axes, findings: Findings, scales: Sequence[Scale]) -> None:
    """Trials, the best one and the paper's point on top of a contour, and its axes."""
    rows = [r for r in scored_rows(findings) if all(sc.axis.path in r.params for sc in scales)]
    best, marks = findings.best, paper_values(findings)

    def dots(these: Sequence[TrialRow], **style: Any) -> None:
        draw_dots(ax, [places_of(scales, r.params) for r in these], [r.number for r in these], **style)

    whole, early = [[r for r in rows if (r.state == "COMPLETE") is done] for done in (True, False)]
    dots(whole, fc="white", ec="#333333", s=26, lw=0.9, zorder=3, label="complete")
    dots(early, fc="#bbbbbb", ec="#333333", marker="s", s=18, lw=0.7, zorder=3, label="not complete")
    top = [r for r in rows if best is not None and r.number == best.number]
    dots(top, color=BEST, ec="white", marker="*", s=190, zorder=5, label=best_label(findings))
    paper = paper_trial(findings)
    at = marks if paper is None else paper.params
    known = [s.place(at[s.axis.path]) if s.axis.path in at else math.nan for s in scales]
    if all(map(math.isfinite, known)):
        draw_dots(ax, [known], fc="none", ec="white", marker="D", s=80, lw=2.6, zorder=4)
        name = "the paper's" + (f": trial {paper.number}" if paper else "")
        draw_dots(ax, [known], fc="none", ec=PAPER, marker="D", s=80, lw=1.3, zorder=4, label=name)
    elif any(map(math.isfinite, known)):
        across = math.isfinite(known[1])
        paper_line(ax, known[across], across=across)
    ax.set_xticks(*zip(*scales[0].ticks(), strict=True))
    ax.set_yticks(*zip(*scales[1].ticks(), strict=True))
    ax.set(xlabel=scales[0].axis.name, ylabel=scales[1].axis.name, xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    ax.grid(visible=False)


def draw_dots(ax: Axes, points: Sequence[Sequence[float]], trials: Sequence[int] = (), **style: Any) -> None:
    """Marks at points, if there are any; ``trials`` are those that they stand for."""
    if points:
        ax.scatter([p[0] for p in points], [p[1] for p in points], urls=_urls(trials), **style)


def _urls(trials: Sequence[int]) -> list[str] | None:
    """The trials of marks as matplotlib keeps them, see :mod:`tuning.report.spots`."""
    return [str(number) for number in trials] or None


# Where a line crosses a parallel axis that does not count.
OFF = -0.12


def places_of(scales: Sequence[Scale], params: Any) -> list[float]:
    """Where a point lies on each axis; below the axis where the axis does not count."""
    return [s.place(params[s.axis.path]) if s.axis.path in params else OFF for s in scales]


def parallel_axes(ax: Axes, ticks: Sequence[Sequence[tuple[float, str]]], off: bool) -> None:
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
