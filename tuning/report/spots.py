"""Which mark of a plot is which trial, so that the page can answer whoever points at it.

Plots name the trial of a mark in matplotlib's own field for it, the URL of an artist; here the marks are looked up in
the finished figure. The page lays them over the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.figure import Figure

from tuning.formatting import plural, short
from tuning.ledger.noise import show
from tuning.report.findings import objective_of
from tuning.report.read import Findings
from tuning.report.sentences import dagger, remark
from tuning.study.record import TrialRow, label
from ugrl.secrets import masked
from ugrl.text import line

# Characters of a value or a note beside the pointer.
LONGEST = 80
# How far outside the axes the middle of a mark may lie, in pixels: half a mark.
MARGIN = 6.0

Form = Literal["circle", "polyline", "polygon"]


@dataclass(frozen=True)
class Spot:
    """A mark of a plot that stands for one trial.

    Attributes:
        trial: The number of the trial.
        form: A circle around one point, a line, or an area.
        points: Shares of the picture's width and height, from its upper left corner.
    """

    trial: int
    form: Form
    points: tuple[tuple[float, float], ...]

    def at(self, width: int, height: int) -> list[tuple[float, float]]:
        """The points in pixels of a picture, to a tenth."""
        return [(round(x * width, 1), round(y * height, 1)) for x, y in self.points]


def spots_of(fig: Figure) -> list[Spot]:
    """The marks of a figure that name a trial, in the order in which they are drawn; those on top come last."""
    found = [spot for ax in fig.axes for spot in _of_axes(ax)]
    return [spot for _, spot in sorted(found, key=lambda pair: pair[0])]


def _of_axes(ax: Axes) -> Iterator[tuple[float, Spot]]:
    size = np.array([ax.figure.bbox.width, ax.figure.bbox.height])
    low, high = (np.asarray(ax.bbox.min) - MARGIN) / size, (np.asarray(ax.bbox.max) + MARGIN) / size
    for order, trial, form, pixels in _named(ax):
        at = pixels[np.isfinite(pixels).all(axis=1)] / size
        # A mark beyond the axes is not drawn; of a line or a bar a part is.
        inside = ((at >= low) & (at <= high)).all(axis=1)
        if len(at) and (inside.all() or form != "circle"):
            yield order, Spot(trial, form, tuple((float(x), float(1 - y)) for x, y in at))


def _named(ax: Axes) -> Iterator[tuple[float, int, Form, np.ndarray]]:
    """Order, trial, form and pixels (K, 2) of all that names a trial."""
    for marks in ax.collections:
        form: Form = "circle"
        if isinstance(marks, PathCollection):
            shapes = list(np.asarray(marks.get_offset_transform().transform(marks.get_offsets()))[:, None])
        elif isinstance(marks, PolyCollection):
            form = "polygon"
            shapes = [np.asarray(marks.get_transform().transform(path.vertices)) for path in marks.get_paths()]
        else:
            continue
        for url, pixels in zip(marks.get_urls() or (), shapes, strict=False):
            if url is not None:
                yield marks.get_zorder(), int(url), form, pixels
    for drawn in ax.lines:
        if (url := drawn.get_url()) is not None:
            points = np.asarray(ax.transData.transform(drawn.get_xydata()))
            yield drawn.get_zorder(), int(url), "polyline" if len(points) > 1 else "circle", points


def answer(row: TrialRow, findings: Findings) -> str:
    """What a mark says: the trial, its scores, its values and what happened to it, a line each."""
    objectives, split = findings.search.objectives, findings.search.space.final.split
    best = findings.best
    chosen = ", the best" if best is not None and best.number == row.number else ""
    lines = [f"trial {row.number}{chosen}: {row.state.lower()} at step {row.step}, {plural(len(row.runs), 'seed')}"]
    for k, objective in enumerate(objectives):
        if len(row.values) > k:
            lines.append(f"{label(objective.name)}: {objective_of(row, findings, k).short()}{dagger(row.runs)}")
    if (untouched := row.final.get(objectives[0].name)) is not None:
        lines.append(f"on {split}: {show(objectives[0].name, untouched)}")
    if math.isfinite(row.seconds):
        lines.append(f"held: {row.seconds:.0f} s")
    lines += [f"{a.name}: {short(row.params[a.path])}" for a in findings.search.space.search if a.path in row.params]
    lines += [f"from: {row.origin}"] if row.origin else []
    lines += [text for text in (remark(row), row.error) if text]
    return "\n".join(line(masked(text), LONGEST) for text in lines)


def address(row: TrialRow, findings: Findings) -> str:
    """The folder of a trial as seen from the page; empty where it is not there."""
    folder = findings.search.folder(row.number)
    return f"{folder.relative_to(findings.search.out).as_posix()}/" if folder.is_dir() else ""


def answers(rows: Sequence[TrialRow], findings: Findings) -> dict[str, list[str]]:
    """Number of a trial → what its marks say, and where its runs are."""
    return {str(row.number): [answer(row, findings), address(row, findings)] for row in rows}
