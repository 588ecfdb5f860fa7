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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from tuning.record import Run, TrialRow, label, percent, ranked
from tuning.report.read import Findings, once

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


@once
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


# -- what other seeds take away ---------------------------------------------------------------


def expected_best(count: int) -> float:
    """The mean of the highest of so many draws from a standard normal distribution.

    >>> [round(expected_best(n), 3) for n in (1, 2, 8, 20)]
    [0.0, 0.564, 1.424, 1.867]
    """
    x = np.linspace(-9.0, 9.0, 3601)
    density = count * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) * ndtr(x) ** (count - 1)
    return abs(float(np.sum(x * density) * (x[1] - x[0]))) if count > 1 else 0.0


@dataclass(frozen=True)
class Loss:
    """What the first finalist's score lost when other seeds ran it, and what chance explains of that.

    Two things do: it was picked for a high score, and the search's own seed is only one of many. Picking works on the
    noise that trials do not share; what a seed does to all trials alike picks none of them, but goes with the seed.

    Attributes:
        lost: The score in the search less that with fresh seeds.
        trials: Among which it was picked; 1 where scores picked nothing, since there is one or all are equal.
        picked: What picking adds on average, at most (that much if all trials were equally good); NaN if unknown.
        seeds: How far other seeds alone move it either way in 19 of 20 cases; NaN if unknown.
        shared: What all finalists lost on average, where that is beyond what picking and the noise of each explain: the
            search's own seed did it; else ``None``.
    """

    lost: float
    trials: int
    picked: float
    seeds: float
    shared: float | None = None

    @property
    def explained(self) -> bool | None:
        """Whether both together are enough; ``None`` where the noise is not known."""
        if not math.isfinite(self.picked + self.seeds):
            return None
        return abs(self.lost) <= (self.picked if self.lost > 0 else 0.0) + self.seeds + ROUNDING


@once
def loss(findings: Findings) -> Loss | None:
    """What the first finalist lost with fresh seeds; ``None`` without one, or without a score in the search."""
    if not findings.finalists or findings.finalists[0].trial.value is None:
        return None
    name = findings.search.objective
    able = ranked(findings.rows, findings.search.objectives[0])
    values = [r.value or 0.0 for r in able]
    count = len(able) if values and max(values) - min(values) > ROUNDING else 1

    def lost(k: int) -> float:
        found = findings.finalists[k]
        return (found.trial.value or 0.0) - measure(found.runs, name).mean

    total, alike = seed_noise(findings), _alike(findings, name)
    before, after = len(findings.finalists[0].trial.runs) or 1, len(findings.finalists[0].runs) or 1
    common = set.intersection(*({run.seed for run in r.runs} for r in able)) if able else set()
    own = alike if alike is not None and common else total
    picked = expected_best(count) * own.deviation / math.sqrt(before) if count > 1 else 0.0
    several = math.sqrt(1 / before + 1 / after)
    bar = Noise(freedom=_draws(findings, name)).bar
    here = len(findings.finalists)
    mean = statistics.fmean(map(lost, range(here)))
    shared = None
    if alike is not None and common and here > 1:
        beyond = alike.bar * alike.deviation * several / math.sqrt(here) + ROUNDING
        shared = mean if mean > picked + beyond or -mean > beyond else None
    return Loss(lost(0), count, picked, bar * total.deviation * several, shared)


def _groups(findings: Findings, name: str) -> Iterable[tuple[dict[int, float], dict[int, float]]]:
    """For each complete trial its values by seed: in the search, and with fresh seeds."""
    fresh = {f.trial.number: f.runs for f in findings.finalists}
    for r in findings.rows:
        if r.state == "COMPLETE":
            yield _values(r.runs, name), _values(fresh.get(r.number, ()), name)


def _values(runs: Iterable[Run], name: str) -> dict[int, float]:
    return {r.seed: r.metrics[name] for r in runs if _finite(r, name, False)}


@once
def _alike(findings: Findings, name: str) -> Noise | None:
    """The noise without what a seed does to all trials alike, the search's own seeds among the seeds."""
    return noise_of(a | b for a, b in _groups(findings, name)).paired


@once
def _draws(findings: Findings, name: str) -> int:
    """Degrees of freedom of what seeds do: trials on the same seeds saw the same draws, and count once."""
    return sum(len(seeds) - 1 for seeds in {frozenset(g) for pair in _groups(findings, name) for g in pair if g})
