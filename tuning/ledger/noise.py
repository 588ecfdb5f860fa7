"""A mean over seeds, and which differences of means are real.

A seed decides the first weights, the crops and the order of the images. It does much the same to every configuration:
until the classification warm-up ends, many of them are one and the same run. Where two configurations were measured on
the same seeds, their difference is therefore judged seed by seed, by the noise that is left when each seed's common
part is taken out (a randomised block design; Fisher, The Design of Experiments, 1935).

The search itself asks this, to leave seeds out, and so does the report.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from tuning.study.record import Run, TrialRow, label, percent

# Of Student's t: a difference beyond it would be luck in one of twenty cases.
QUANTILE = 0.975
# Two configurations on two seeds leave one degree of freedom: too little to believe a small remainder.
LEAST_FREEDOM = 2
# Fractions are equal below this: seeds may agree to the last digit, and then rounding is no difference.
ROUNDING = 1e-9


def show(name: str, value: float | None, digits: int = 2) -> str:
    """A metric in percent, a cost with three significant digits; empty where it is unknown.

    >>> show("seg_miou", 0.123456), show("step_s", 0.123456), show("seg_miou", None)
    ('12.35', '0.123', '')
    """
    if value is None or not math.isfinite(value):
        return ""
    return f"{100 * value:.{digits}f}" if percent(name) else f"{value:.3g}"


@dataclass(frozen=True)
class Measure:
    """A mean over seeds.

    Attributes:
        name: The metric or cost.
        mean: In the metric's own unit, ratios as fractions; NaN without a measurement.
        stderr: Its standard error; NaN with fewer than two seeds.
        count: Number of seeds.
        seeds: Which; empty where it does not matter.
    """

    name: str
    mean: float
    stderr: float = math.nan
    count: int = 0
    seeds: tuple[int, ...] = ()

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return math.isfinite(self.mean)

    def short(self, digits: int = 2) -> str:
        """The number, without its unit.

        >>> Measure("seg_miou", 0.5, 0.01, 3).short(), Measure("seg_miou", 0.5, count=1).short()
        ('50.00 ± 1.00', '50.00')
        """
        if not self.known:
            return ""
        noise = f" ± {show(self.name, self.stderr, digits)}" if math.isfinite(self.stderr) else ""
        return show(self.name, self.mean, digits) + noise

    def text(self) -> str:
        """The number in words.

        >>> Measure("seg_miou", 0.5, 0.01, 3).text()
        'seg mIoU 50.00 ± 1.00 %'
        """
        name, unit = label(self.name).rsplit(", ", 1)
        return f"{name} {self.short()} {unit}"


def measure(runs: Iterable[Run], name: str, *, final: bool = False) -> Measure:
    """A metric over runs.

    Args:
        runs: The runs of one configuration.
        name: The metric or cost.
        final: Whether it is that of the untouched split.
    """
    runs = tuple(runs)
    seeds = tuple(sorted(r.seed for r in runs if has_metric(r, name, final)))
    return Measure(name, *TrialRow(0, "", runs=runs).metric(name, final=final), seeds)


def has_metric(run: Run, name: str, final: bool) -> bool:
    """Whether a run has a finite value of a metric, on the untouched split if ``final``."""
    return math.isfinite((run.final if final else run.metrics).get(name, math.nan))


@dataclass(frozen=True)
class Noise:
    """What seeds alone do to a metric.

    Attributes:
        deviation: Standard deviation between seeds of one configuration; NaN where none has two.
        freedom: Degrees of freedom behind it.
        paired: The same without what a seed does to all configurations alike; ``None`` where too few seeds
            are shared.
    """

    deviation: float = math.nan
    freedom: int = 0
    paired: Noise | None = None

    @property
    def known(self) -> bool:
        """Whether any configuration has two seeds."""
        return self.freedom > 0

    @property
    def bar(self) -> float:
        """Standard errors from which on a difference counts as real.

        >>> round(Noise(1.0, 1).bar, 1), round(Noise(1.0, 10).bar, 1)
        (12.7, 2.2)
        """
        return float(stdtrit(max(1, self.freedom), QUANTILE))

    def judges_pairs(self, found: Iterable[Measure]) -> bool:
        """Whether differences between some measures are taken seed by seed: all of them have the same seeds."""
        seeds = {m.seeds for m in found}
        return self.paired is not None and len(seeds) == 1 and () not in seeds

    def between(self, found: Iterable[Measure]) -> Noise:
        """The noise by which differences between some measures are judged."""
        return self.paired if self.paired is not None and self.judges_pairs(found) else self


def noise_of(groups: Iterable[Mapping[int, float]]) -> Noise:
    """The noise of a metric.

    Args:
        groups: For each configuration, its value on each of its seeds.

    >>> noise_of([{0: 1.0, 1: 3.0}, {0: 5.0}]).deviation
    1.4142135623730951
    """
    several = [g for g in groups if len(g) > 1]
    freedom = sum(len(g) - 1 for g in several)
    if not freedom:
        return Noise()
    squares = sum(statistics.variance(g.values()) * (len(g) - 1) for g in several)
    return Noise(math.sqrt(squares / freedom), freedom, _paired(several))


def _paired(groups: Sequence[Mapping[int, float]]) -> Noise | None:
    """What is left of seeds' noise beside one number for each configuration and one for each seed."""
    groups = _crossed(groups)
    if not groups:
        return None
    seeds = {seed: k for k, seed in enumerate(sorted({seed for group in groups for seed in group}))}
    values = np.array([value for group in groups for value in group.values()])
    table = np.zeros((len(values), len(seeds)))
    table[range(len(values)), [seeds[seed] for group in groups for seed in group]] = 1.0
    # Each configuration's number is its mean: taken from both sides, it needs no column (Frisch and Waugh, 1933).
    sizes = np.array([len(group) for group in groups])
    starts = np.cumsum(sizes) - sizes
    values -= np.repeat(np.add.reduceat(values, starts) / sizes, sizes)
    table -= np.repeat(np.add.reduceat(table, starts) / sizes[:, None], sizes, axis=0)
    fitted, _, rank, _ = np.linalg.lstsq(table, values, rcond=None)
    freedom = len(values) - len(groups) - int(rank)
    if freedom < LEAST_FREEDOM:
        return None
    return Noise(math.sqrt(float(np.square(values - table @ fitted).sum()) / freedom), freedom)


def _crossed(groups: Sequence[Mapping[int, float]]) -> list[dict[int, float]]:
    """The values that have others of the same configuration and of the same seed; the rest fit without remainder."""
    left = [dict(group) for group in groups]
    while True:
        shared = Counter(seed for group in left for seed in group)
        kept = [{s: v for s, v in group.items() if shared[s] > 1} for group in left]
        kept = [group for group in kept if len(group) > 1]
        if sum(map(len, kept)) == sum(map(len, left)):
            return kept
        left = kept


@dataclass(frozen=True)
class Gap(Measure):
    """A difference of two measures.

    Attributes:
        noise: What it is judged by.
        paired: Whether it was taken seed by seed.
    """

    noise: Noise = Noise()
    paired: bool = False

    @property
    def least(self) -> float:
        """From how much on it would count as real."""
        return max(self.noise.bar * self.stderr, ROUNDING)

    @property
    def real(self) -> bool | None:
        """Whether it is; ``None`` where the noise is not known."""
        return abs(self.mean) > self.least if self.noise.known else None


def difference(a: Measure, b: Measure, noise: Noise) -> Gap:
    """How much higher ``a`` is than ``b``.

    The standard error is that of the pooled noise: two or three seeds tell little of their own spread.
    """
    by = noise.between((a, b))
    error = by.deviation * math.sqrt(1 / max(1, a.count) + 1 / max(1, b.count))
    return Gap(a.name, a.mean - b.mean, error, min(a.count, b.count), noise=by, paired=by is not noise)
