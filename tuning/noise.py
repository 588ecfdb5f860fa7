"""Numbers over seeds, and which of their differences are real.

A seed decides the first weights, the crops and the order of the images, and does much the same to every configuration:
until the classification warm-up ends, many of them are one and the same run. Where two were measured on the same seeds,
their difference is therefore judged seed by seed, by the noise that is left when each seed's common part is taken out
(a randomised block design; Fisher, The Design of Experiments, 1935).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from tuning.record import Run, TrialRow, label, percent
from tuning.search import Findings

# Of Student's t: a difference beyond it would be luck in one of twenty cases.
QUANTILE = 0.975
# Two configurations on two seeds leave one degree of freedom: too little to believe a small remainder.
LEAST_FREEDOM = 2
# Draws of what seeds alone would give.
DRAWS = 4000
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
        name: Of the metric or cost.
        mean: In the metric's own unit, ratios as fractions; NaN without a measurement.
        stderr: Its standard error; NaN with fewer than two seeds.
        count: Seeds.
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
        runs: Of one configuration.
        name: Of a metric or cost.
        final: On the untouched split.
    """
    runs = tuple(runs)
    seeds = tuple(sorted(r.seed for r in runs if _finite(r, name, final)))
    return Measure(name, *TrialRow(0, "", runs=runs).metric(name, final=final), seeds)


def _finite(run: Run, name: str, final: bool) -> bool:
    return math.isfinite((run.final if final else run.metrics).get(name, math.nan))


# -- noise ------------------------------------------------------------------------------------


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


def seed_noise(findings: Findings, name: str = "", *, final: bool = False) -> Noise:
    """The noise of a metric, pooled over all configurations with two or more seeds.

    Args:
        findings: Of the search.
        name: Of the metric; the first objective by default.
        final: On the untouched split.
    """
    name = name or findings.search.objective
    runs = [r.runs for r in findings.rows if r.state == "COMPLETE"] + [f.runs for f in findings.finalists]
    groups = [{r.seed: (r.final if final else r.metrics)[name] for r in g if _finite(r, name, final)} for g in runs]
    return noise_of(groups)


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
    cells = [(k, seed, value) for k, group in enumerate(groups) for seed, value in group.items()]
    seeds = sorted({seed for _, seed, _ in cells})
    table = np.zeros((len(cells), len(groups) + len(seeds)))
    for row, (k, seed, _) in enumerate(cells):
        table[row, k] = table[row, len(groups) + seeds.index(seed)] = 1.0
    values = np.array([value for *_, value in cells])
    fitted, _, rank, _ = np.linalg.lstsq(table, values, rcond=None)
    freedom = len(cells) - int(rank)
    if freedom < LEAST_FREEDOM:
        return None
    return Noise(math.sqrt(float(np.square(values - table @ fitted).sum()) / freedom), freedom)


@dataclass(frozen=True)
class Gap(Measure):
    """A difference of two measures.

    Attributes:
        noise: That it is judged by.
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


def by_luck(found: Sequence[Measure], noise: Noise, against: int | None = None) -> float:
    """How often seeds alone put the best so far above the lowest of some measures, or above one of them.

    The best of many is high by luck, so its distance must not be judged like that of two given ones.

    Args:
        found: Measures of configurations, the higher the better.
        noise: Of seeds.
        against: Index of the measure to compare the best with; ``None`` for the lowest.

    Returns:
        A share of draws; NaN where the noise is not known.
    """
    if not noise.known or len(found) < 2:
        return math.nan
    noise, means = noise.between(found), [m.mean for m in found]
    gap = max(means) - (min(means) if against is None else means[against])
    draw, hits = random.Random(0), 0
    for _ in range(DRAWS):
        # The deviation is an estimate itself: a draw of what it may be, given its degrees of freedom.
        scale = noise.deviation * math.sqrt(noise.freedom / (2 * draw.gammavariate(noise.freedom / 2, 1.0)))
        these = [draw.gauss(0.0, scale / math.sqrt(max(1, m.count))) for m in found]
        hits += max(these) - (min(these) if against is None else these[against]) >= gap - ROUNDING
    return hits / DRAWS
