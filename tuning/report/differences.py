"""Trials against a reference, seed by seed: what a seed does to all trials alike is not in their difference.

The interval of a mean difference is that of its own seeds alone (Student's t of paired differences), so that it can be
read off the dots beside it. The sentences of a report pool the noise of all trials, see :mod:`tuning.ledger.noise`.
"""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuning.formatting import plural, short
from tuning.ledger.noise import Noise, has_metric
from tuning.report.drawing import BEST, COLORS, PAPER, SHADES, best_label, draw_dots, legend_beside
from tuning.report.findings import paper_trial, same_value
from tuning.report.paper import SETTING, SETTINGS
from tuning.report.read import Findings, once
from tuning.study.record import Run, TrialRow, label, ranked, standard_error
from ugrl import config as configs
from ugrl.secrets import masked
from ugrl.text import line

# The name of the picture.
DIFFERENCES = "differences"
# Seeds that two trials must share: one has no interval.
SHARED = 2
# Trials that are shown.
MOST = 12
# Seeds that a legend names: shades of more cannot be told apart.
NAMED = 6
# Characters of a line, and lines, of a trial's name beside the axis.
NAME, NAME_LINES = 36, 3
# Why a trial is the reference where no other one offers itself.
BEST_OF = "the best of these"

# A trial, and its value with each seed.
Valued = tuple[TrialRow, dict[int, float]]


@dataclass(frozen=True)
class Pairing:
    """One trial against the reference.

    Attributes:
        row: The trial.
        gaps: Shared seed → the trial's first objective less the reference's, in points; two or more.
    """

    row: TrialRow
    gaps: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Of the differences."""
        return statistics.fmean(self.gaps.values())

    @property
    def half(self) -> float:
        """Half the width of the mean's 95 % interval by Student's t, one degree of freedom less than seeds."""
        return Noise(freedom=len(self.gaps) - 1).bar * standard_error(list(self.gaps.values()))


@dataclass(frozen=True)
class Comparison:
    """Trials against a reference.

    Attributes:
        reference: The trial that the others are held against.
        why: Why it is, in words.
        pairs: The others: in the order of the searched value where there is one alone, else the best mean first.
        left_out: Trials with worse means that are not shown.
        final: Whether the values are those of the untouched split.
    """

    reference: TrialRow
    why: str
    pairs: tuple[Pairing, ...]
    left_out: int = 0
    final: bool = False

    @property
    def name(self) -> str:
        """The reference in words."""
        return f"{self.why} (trial {self.reference.number})"


@once
def compare(findings: Findings) -> Comparison | None:
    """The comparison that a search allows; ``None`` where no two trials share two seeds.

    Fresh seeds are taken where finalists share them: the search picked these by its own. A search beside a table of the
    paper takes both, and the split, as that table does. Trials that have not completed or are beyond a constraint, and
    runs that have not ended, are left out.
    """
    objective = findings.search.objectives[0]
    rows, fresh, final = ranked(findings.rows, objective), findings.finalists, False
    if findings.search.space.paper:
        again = {f.trial.number: f.runs for f in fresh}
        whole = [(r, (*r.runs, *again.get(r.number, ()))) for r in rows]
        final = all(any(has_metric(run, objective.name, True) for run in runs) for _, runs in whole)
        able = _sharing([(r, _values(runs, objective.name, final)) for r, runs in whole])
    else:
        able = _sharing([(f.trial, _values(f.runs, objective.name)) for f in fresh])
        able = able or _sharing([(r, _values(r.runs, objective.name)) for r in rows])
    if not able:
        return None
    place, why = _reference(findings, [r for r, _ in able])
    reference, own = able.pop(place)
    pairs = [Pairing(r, {s: 100 * (v - own[s]) for s, v in values.items() if s in own}) for r, values in able]
    pairs = sorted((p for p in pairs if len(p.gaps) >= SHARED), key=lambda p: (-p.mean, p.row.number))
    return Comparison(reference, why, _in_order(findings, pairs[:MOST]), len(pairs[MOST:]), final)


def caption(found: Comparison, findings: Findings) -> str:
    """What the picture shows, against what, and what it leaves out."""
    space = findings.search.space
    split = space.final.split if found.final else space.split
    text = (
        f"{_metric(findings)} on split '{split}' minus that of {found.name} with the same seed: a dot for each seed "
        "that both have, their mean, and its 95 % interval by Student's t, from these seeds of this pair alone. "
        "Sentences on noise pool that of all trials, and can be surer."
    )
    if found.why == BEST_OF:
        text += " The reference was picked for its score, which makes it look better than it is."
    if found.left_out:
        are = "is" if found.left_out == 1 else "are"
        text += f" {plural(found.left_out, 'trial')} with lower means {are} left out."
    return text


def difference_table(found: Comparison, findings: Findings) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows, the reference first: trial, values, difference, interval, shared seeds."""
    names, number = _names(findings, found), found.reference.number
    rows = [(str(number), f"{', '.join(names[number])} (reference)".strip(), "", "", "")]
    for p in found.pairs:
        mean, low, high = (_signed(v) for v in (p.mean, p.mean - p.half, p.mean + p.half))
        seeds = ", ".join(map(str, sorted(p.gaps)))
        rows.append((str(p.row.number), ", ".join(names[p.row.number]), mean, f"{low} … {high}", seeds))
    header = ("trial", "values", f"difference from trial {number}, points", "95 % interval", "shared seeds")
    return header, tuple(rows)


def differences(findings: Findings) -> Figure | str:
    """Each compared trial less the reference: a dot for each shared seed, the mean, and its interval."""
    found = compare(findings)
    if found is None:
        return ""
    seeds = sorted({seed for p in found.pairs for seed in p.gaps})
    height = max(0.55 * len(found.pairs) + 1.7, 2.6)  # the legend needs as much
    fig, ax = plt.subplots(figsize=(9, height))
    ax.axvline(0, color="#444444", lw=1.1, zorder=1)
    _draw_seeds(ax, found, seeds)
    _draw_means(ax, found, findings)
    names = _names(findings, found)
    ax.set_yticks(range(len(found.pairs)), [_beside(p.row, names[p.row.number]) for p in found.pairs])
    ax.set_ylim(len(found.pairs) - 0.4, -0.6)
    words = f"{_metric(findings)} minus that of {found.name}, points"
    ax.set(xlabel=words, title="Differences seed by seed")
    ax.grid(axis="y", visible=False)
    legend_beside(ax)
    return fig


# -- what is compared -------------------------------------------------------------------------


def _values(runs: Sequence[Run], name: str, final: bool = False) -> dict[int, float]:
    """Seed → value of the runs that reached their end."""
    return {r.seed: (r.final if final else r.metrics)[name] for r in runs if r.ended and has_metric(r, name, final)}


def _sharing(found: Sequence[Valued]) -> list[Valued]:
    """Those that share enough seeds with any other one."""

    def sets(values: Mapping[int, float]) -> list[tuple[int, ...]]:
        return list(itertools.combinations(sorted(values), SHARED))

    count = Counter(each for _, values in found for each in sets(values))
    return [(r, values) for r, values in found if any(count[each] > 1 for each in sets(values))]


def _reference(findings: Findings, rows: Sequence[TrialRow]) -> tuple[int, str]:
    """Which of some trials, best first, the others are held against, and why."""
    base = findings.search.base
    for k, r in enumerate(rows):
        if findings.search.space.paper == "table3" and r.params.get(SETTING) == SETTINGS[0]:
            return k, f"setting {SETTINGS[0]}"
    for k, r in enumerate(rows):
        if r.params and all(same_value(v, configs.get(base, path)) for path, v in r.params.items()):
            return k, "the configuration's own values"
    return 0, BEST_OF


def _in_order(findings: Findings, pairs: Sequence[Pairing]) -> tuple[Pairing, ...]:
    """In the order of the searched value, where there is one alone and its order can be told."""
    axes = findings.search.space.search
    if len(axes) > 1:
        return tuple(pairs)
    axis = axes[0]

    def place(pair: Pairing) -> float:
        value = pair.row.params[axis.path]
        return axis.options.index(value) if axis.options else value

    return tuple(sorted(pairs, key=place))


# -- words ------------------------------------------------------------------------------------


def _metric(findings: Findings) -> str:
    """The first objective, which is a ratio in any search, without its unit."""
    return label(findings.search.objective).rsplit(",", 1)[0]


def _signed(value: float) -> str:
    """Points; adding zero takes the sign from what is rounded to nothing."""
    return f"{round(value, 2) + 0.0:+.2f}"


def _names(findings: Findings, found: Comparison) -> dict[int, list[str]]:
    """Number of a trial → the searched values by which it differs from others."""
    rows = [found.reference, *(p.row for p in found.pairs)]
    axes = [a for a in findings.search.space.search if len({short(r.params.get(a.path)) for r in rows}) > 1]
    return {r.number: [f"{a.name} {short(r.params[a.path])}" for a in axes if a.path in r.params] for r in rows}


def _beside(row: TrialRow, names: Sequence[str]) -> str:
    """A trial beside the axis; a name and its value stay on one line."""
    words = [line(masked(name), NAME).replace(" ", "\u00a0") for name in names]
    text = f"trial\u00a0{row.number}" + (f": {', '.join(words)}" if words else "")
    return "\n".join(textwrap.wrap(text, NAME, max_lines=NAME_LINES, placeholder=" …"))


# -- the picture ------------------------------------------------------------------------------


def _draw_seeds(ax: Axes, found: Comparison, seeds: Sequence[int]) -> None:
    """A dot for each shared seed below its trial's mean, the same shade for the same seed."""
    for k, seed in enumerate(seeds):
        these = [(y, p) for y, p in enumerate(found.pairs) if seed in p.gaps]
        points = [(p.gaps[seed], y + 0.24) for y, p in these]
        shade, name = SHADES(k / max(1, len(seeds) - 1)), f"seed {seed}"
        if len(seeds) > NAMED:
            shade, name = SHADES(1.0), "" if k else "seeds"
        draw_dots(ax, points, [p.row.number for _, p in these], color=shade, s=26, zorder=3, label=name or None)


def _draw_means(ax: Axes, found: Comparison, findings: Findings) -> None:
    """The mean of each trial and its interval, with the best trial and the paper's."""
    best, paper = findings.best, paper_trial(findings)
    for y, p in enumerate(found.pairs):
        ends = [p.mean - p.half, p.mean + p.half]
        words = None if y else "95 % interval of the mean"
        ax.plot(ends, [y, y], color=COLORS["COMPLETE"], lw=2.2, zorder=2, url=str(p.row.number), label=words)
    places = {p.row.number: (p.mean, y) for y, p in enumerate(found.pairs)}
    top = best.number if best is not None and best.number in places else None
    others = [number for number in places if number != top]
    draw_dots(ax, [places[n] for n in others], others, color=COLORS["COMPLETE"], s=52, zorder=4, label="mean")
    if top is not None:
        star: dict[str, Any] = {"color": BEST, "marker": "*", "s": 150, "zorder": 4, "label": best_label(findings)}
        draw_dots(ax, [places[top]], [top], **star)
    if paper is not None and paper.number in places:
        name = f"the paper's: trial {paper.number}"
        ax.scatter(*places[paper.number], fc="none", ec=PAPER, marker="D", s=70, lw=1.3, zorder=5, label=name)
