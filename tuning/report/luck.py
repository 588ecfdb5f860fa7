"""What fresh seeds took from the best configuration's score, and how much of that is luck."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from tuning.ledger.noise import ROUNDING, Measure, Noise, has_metric, measure, noise_of
from tuning.report.read import Findings, once
from tuning.study.record import Run, ranked

# Draws of what seeds alone would give.
DRAWS = 4000


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
    groups = [{r.seed: (r.final if final else r.metrics)[name] for r in g if has_metric(r, name, final)} for g in runs]
    return noise_of(groups)


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
    return {r.seed: r.metrics[name] for r in runs if has_metric(r, name, False)}


@once
def _alike(findings: Findings, name: str) -> Noise | None:
    """The noise without what a seed does to all trials alike, the search's own seeds among the seeds."""
    return noise_of(a | b for a, b in _groups(findings, name)).paired


@once
def _draws(findings: Findings, name: str) -> int:
    """Degrees of freedom of what seeds do: trials on the same seeds saw the same draws, and count once."""
    return sum(len(seeds) - 1 for seeds in {frozenset(g) for pair in _groups(findings, name) for g in pair if g})
