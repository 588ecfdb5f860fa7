"""What the findings of a search say, in numbers and in sentences: the best trial, how sure that is, what it cost."""

from __future__ import annotations

import math
import random
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tuning.budget import covered
from tuning.options import COSTS, METRICS
from tuning.record import Run, TrialRow, label, percent, ranked
from tuning.search import Finalist, Findings
from tuning.space import trial_config
from ugrl import config as configs

# The values that the paper publishes; α, β, τ, η and λ1-λ3 it does not give.
PAPER = {"method.uncertainty.d_cls": 1024, "method.contrast.d_seg": 512, "method.contrast.keep": 0.35}
# From so many standard errors on a difference counts as real: the 97.5 % point of Student's t with 1, 2, … degrees of
# freedom, beyond them by its expansion around the normal distribution's.
FEW_FREEDOM, NORMAL = (12.71, 4.30, 3.18, 2.78), 1.96
# Draws of what seeds alone would give.
DRAWS = 4000
# The best trial's configuration, in the search's folder.
BEST = "best.yaml"
ORDER = {"COMPLETE": 0, "PRUNED": 2, "RUNNING": 3, "WAITING": 4}


@dataclass(frozen=True)
class Measure:
    """A mean over seeds.

    Attributes:
        name: Of the metric or cost.
        mean: In the metric's own unit, ratios as fractions; NaN without a measurement.
        stderr: Its standard error; NaN with fewer than two seeds.
        count: Seeds.
    """

    name: str
    mean: float
    stderr: float = math.nan
    count: int = 0

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
    return Measure(name, *TrialRow(0, "", runs=tuple(runs)).metric(name, final=final))


def objective_of(row: TrialRow, findings: Findings, index: int = 0) -> Measure:
    """An objective of a trial as the study was told it, with the spread over the trial's seeds."""
    name = findings.search.objectives[index].name
    found = measure(row.runs, name)
    return Measure(name, row.values[index] if row.values else math.nan, found.stderr, found.count)


def show(name: str, value: float | None, digits: int = 2) -> str:
    """A metric in percent, a cost with three significant digits; empty where it is unknown.

    >>> show("seg_miou", 0.123456), show("step_s", 0.123456), show("seg_miou", None)
    ('12.35', '0.123', '')
    """
    if value is None or not math.isfinite(value):
        return ""
    return f"{100 * value:.{digits}f}" if percent(name) else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in its natural unit; a dash where it is unknown.

    >>> duration(42), duration(200), duration(9000), duration(float("nan"))
    ('42 s', '3.3 min', '2.5 h', '–')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plural(count: int, word: str) -> str:
    """A number of things.

    >>> plural(1, "trial"), plural(2, "trial")
    ('1 trial', '2 trials')
    """
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def first_line(text: str) -> str:
    """The first line of a message that says anything."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def remark(row: TrialRow) -> str:
    """Why a trial was stopped, and which constraints it broke."""
    broken = [f"{name} {value:.4g} is beyond its limit" for name, value in row.violation.items()]
    return "; ".join([*([row.note] if row.note else []), *broken])


def ordered(findings: Findings) -> list[TrialRow]:
    """All trials: those that may be the best by rank, then the rest by what became of them."""
    top = ranked(findings.rows, findings.search.objectives[0])
    chosen = {r.number for r in top}
    rest = [r for r in findings.rows if r.number not in chosen]
    rest.sort(key=lambda r: (ORDER.get(r.state, 5), -(r.value if r.value is not None else -math.inf), r.number))
    return top + rest


def metric_names(findings: Findings) -> list[str]:
    """Metrics and costs that any trial has and that are no objectives."""
    have = {name for r in findings.rows for run in r.runs for name in run.metrics}
    objectives = [o.name for o in findings.search.objectives]
    return [name for name in (*METRICS, *COSTS) if name in have and name not in objectives]


def states(findings: Findings) -> str:
    """How many trials are in which state, as ``5 complete, 2 pruned``."""
    found = Counter(r.state for r in findings.rows)
    words = {"FAIL": "failed"}
    order = [*sorted(ORDER, key=ORDER.__getitem__), "FAIL"]
    return ", ".join(f"{found[s]} {words.get(s, s.lower())}" for s in order if found[s]) or "none"


# -- how sure ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """What seeds alone do to a metric.

    Attributes:
        deviation: Standard deviation between seeds of one configuration; NaN where none has two.
        freedom: Degrees of freedom behind it.
    """

    deviation: float = math.nan
    freedom: int = 0

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
        n, z = max(1, self.freedom), NORMAL
        if n <= len(FEW_FREEDOM):
            return FEW_FREEDOM[n - 1]
        return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def seed_noise(findings: Findings, name: str = "", *, final: bool = False) -> Noise:
    """The noise of a metric, pooled over all configurations with two or more seeds.

    Args:
        findings: Of the search.
        name: Of the metric; the first objective by default.
        final: On the untouched split.
    """
    name = name or findings.search.objective
    groups = [r.runs for r in findings.rows if r.state == "COMPLETE"] + [f.runs for f in findings.finalists]
    squares, freedom = 0.0, 0
    for runs in groups:
        values = [(r.final if final else r.metrics).get(name, math.nan) for r in runs]
        values = [v for v in values if math.isfinite(v)]
        if len(values) > 1:
            squares += statistics.variance(values) * (len(values) - 1)
            freedom += len(values) - 1
    return Noise(math.sqrt(squares / freedom), freedom) if freedom else Noise()


def difference(a: Measure, b: Measure, noise: Noise) -> Measure:
    """How much higher ``a`` is than ``b``.

    The standard error is that of the pooled noise: two or three seeds tell little of their own spread.
    """
    error = noise.deviation * math.sqrt(1 / max(1, a.count) + 1 / max(1, b.count))
    return Measure(a.name, a.mean - b.mean, error, min(a.count, b.count))


def beyond_noise(gap: Measure, noise: Noise) -> bool | None:
    """Whether a difference is real; ``None`` where the noise is not known."""
    return abs(gap.mean) > noise.bar * gap.stderr if noise.known else None


def by_luck(found: Sequence[Measure], noise: Noise, against: int | None = None) -> float:
    """How often seeds alone put the best so far above the lowest of some measures, or above one of them.

    The best of many is high by luck, so its distance must not be judged like that of two given ones.

    Args:
        found: Measures of configurations, the higher the better.
        noise: Between seeds.
        against: Index of the measure to compare the best with; ``None`` for the lowest.

    Returns:
        A share of draws; NaN where the noise is not known.
    """
    if not noise.known or len(found) < 2:
        return math.nan
    means = [m.mean for m in found]
    gap = max(means) - (min(means) if against is None else means[against])
    draw, hits = random.Random(0), 0
    for _ in range(DRAWS):
        # The deviation is an estimate itself: a draw of what it may be, given its degrees of freedom.
        scale = noise.deviation * math.sqrt(noise.freedom / (2 * draw.gammavariate(noise.freedom / 2, 1.0)))
        these = [draw.gauss(0.0, scale / math.sqrt(max(1, m.count))) for m in found]
        hits += max(these) - (min(these) if against is None else these[against]) >= gap
    return hits / DRAWS


def contender(findings: Findings) -> tuple[TrialRow, Measure, Measure] | None:
    """The best trial with its objective on the split of the search and on the untouched one; ``None`` without one.

    Both are over the fresh seeds, where the trial was run again.
    """
    return _entry(findings, 0)


def runner_up(findings: Findings) -> tuple[TrialRow, Measure, Measure] | None:
    """The second as in :func:`contender`, among those that were run again if any was."""
    return _entry(findings, 1)


def _entry(findings: Findings, place: int) -> tuple[TrialRow, Measure, Measure] | None:
    name = findings.search.objective
    if findings.finalists:
        if place >= len(findings.finalists):
            return None
        found = findings.finalists[place]
        return found.trial, measure(found.runs, name), measure(found.runs, name, final=True)
    rows = ranked(findings.rows, findings.search.objectives[0])
    if place >= len(rows):
        return None
    return rows[place], objective_of(rows[place], findings), measure(rows[place].runs, name, final=True)


def verdict(findings: Findings) -> list[str]:
    """The finding: the first sentence says what is best, the others how sure that is."""
    first = contender(findings)
    if first is None:
        return [
            f"No trial has completed{_within(findings)}: there is no best configuration. States: {states(findings)}."
        ]
    row, tune, final = first
    lines = [_headline(findings, row, tune, final)]
    if findings.finalists:
        lines += _fresh(findings, row, tune)
    else:
        lines.append(_optimism(findings))
    lines.append(_second(findings, tune))
    noise = seed_noise(findings)
    if noise.known:
        lines.append(
            f"Between seeds of one configuration the standard deviation is {100 * noise.deviation:.2f} points "
            f"({noise.freedom} degrees of freedom)."
        )
    return [line for line in lines if line]


def _within(findings: Findings) -> str:
    return " within the constraints" if any(r.violation for r in findings.rows) else ""


def _headline(findings: Findings, row: TrialRow, tune: Measure, final: Measure) -> str:
    space = findings.search.space
    complete = len(ranked(findings.rows, findings.search.objectives[0]))
    how = plural(tune.count, "fresh seed" if findings.finalists else "seed") if tune.count else ""
    text = (
        f"Trial {row.number} is the best of {plural(complete, 'complete trial')}{_within(findings)}: {tune.text()} on "
        f"split '{space.split}'" + (f" ({how})" if how else "")
    )
    if final.known:
        text += f", {final.short()} % on the untouched split '{space.final.split}'"
    return text + "."


def _fresh(findings: Findings, row: TrialRow, tune: Measure) -> list[str]:
    lines = []
    asked, have = findings.search.space.final.best, len(findings.finalists)
    if have < asked:
        lines.append(f"{have} of {asked} finalists have been run again with fresh seeds so far.")
    if row.value is not None:
        drop = 100 * (row.value - tune.mean)
        lines.append(
            f"In the search it had {show(tune.name, row.value)} %; with fresh seeds it has {abs(drop):.2f} points "
            + ("less, which is what picking the best of many adds." if drop > 0 else "more.")
        )
    return lines


def _optimism(findings: Findings) -> str:
    complete = len(ranked(findings.rows, findings.search.objectives[0]))
    if complete < 2:
        return "Nothing was run again with fresh seeds (final.best)."
    return (
        f"Nothing was run again with fresh seeds (final.best): the number is the best of {complete}, picked for being "
        "the best, and therefore optimistic."
    )


def _second(findings: Findings, tune: Measure) -> str:
    second = runner_up(findings)
    if second is None:
        return "There is no second to compare it with."
    row, other, _ = second
    noise = seed_noise(findings)
    gap = difference(tune, other, noise)
    text = f"Second is trial {row.number} with {other.short()} %, {gap.short()} points below: "
    real = beyond_noise(gap, noise)
    if real is None:
        return text + "with one seed each the noise is not known, so which of the two is better is not known either."
    if not real:
        least = 100 * noise.bar * gap.stderr
        return f"{text}within noise, the two cannot be told apart (a difference counts from {least:.2f} points on)."
    return f"{text}beyond noise."


# -- the paper's point ------------------------------------------------------------------------


def paper_trial(findings: Findings) -> TrialRow | None:
    """The trial at the paper's values: those of the base wherever the paper gives none, else a starting point."""
    base, axes_ = findings.search.base, findings.search.space.search
    rows = sorted(findings.rows, key=lambda r: (ORDER.get(r.state, 5), r.number))
    whole = [r for r in rows if all(a.path in r.params for a in axes_ if a.active(r.params))]
    published = [r for r in whole if all(_same(r.params.get(p, configs.get(base, p)), v) for p, v in PAPER.items())]
    exact = [r for r in published if all(p in PAPER or _same(v, configs.get(base, p)) for p, v in r.params.items())]
    given = [r for r in published if r.origin.startswith("first")]
    return next(iter([*exact, *given]), None)


def paper_values(findings: Findings) -> dict[str, Any]:
    """The searched paths whose value the paper publishes."""
    return {a.path: PAPER[a.path] for a in findings.search.space.search if a.path in PAPER}


def paper_sentence(findings: Findings) -> str:
    """How the paper's point did."""
    row = paper_trial(findings)
    values = "d_cls 1024, d_seg 512, K 0.35"
    if row is None:
        return f"No trial is at the values that the paper publishes ({values})."
    rows = ranked(findings.rows, findings.search.objectives[0])
    place = next((i for i, r in enumerate(rows, 1) if r.number == row.number), None)
    text = f"The values that the paper publishes ({values}; the rest, which it does not give, as configured) are trial "
    text += f"{row.number}"
    if place is None:
        score = f" with {show(findings.search.objective, row.value)} %" if row.value is not None else ""
        return f"{text}: {row.state.lower()} at step {row.step}{score}."
    gap = (rows[0].value or 0.0) - (row.value or 0.0)
    behind = f", {100 * gap:.2f} points behind the first" if place > 1 else ""
    score = objective_of(row, findings).short()
    return f"{text}: rank {place} of {len(rows)} in the search with {score} %{behind}."


def _same(a: Any, b: Any) -> bool:
    both = isinstance(a, int | float) and isinstance(b, int | float)
    return math.isclose(a, b, rel_tol=1e-9) if both else bool(a == b)


# -- what it cost -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a search took.

    Attributes:
        held: Seconds that trials held resources, side by side ones counted each.
        gpu_hours: Held.
        cpu_hours: Held.
        wall: Seconds in which any driver was at work.
        training: Seconds of all runs.
        slots: Seconds of all sessions, each times the trials it could run side by side.
        outside: Mean seconds that a trial held resources without training; NaN where unknown.
        saved: Seconds that pruned trials would have trained on, at the pace of complete ones; NaN where unknown.
        saved_gpu_hours: The same, times the GPUs they held.
        skipped: Seconds of seeds that complete trials were spared.
    """

    held: float
    gpu_hours: float
    cpu_hours: float
    wall: float
    training: float
    slots: float
    outside: float
    saved: float
    saved_gpu_hours: float
    skipped: float

    @property
    def utilisation(self) -> float:
        """Share of the sessions' slots in which training ran; NaN without sessions."""
        return self.training / self.slots if self.slots else math.nan


def cost(findings: Findings) -> Cost:
    """The cost of a search, finalists included: these count their training times what their trials held."""
    again = [(f.trial, sum(r.seconds for r in f.runs)) for f in findings.finalists]
    held = [(r, r.seconds) for r in findings.rows if math.isfinite(r.seconds)] + again
    done = [r for r in findings.rows if r.state in ("COMPLETE", "PRUNED") and math.isfinite(r.seconds)]
    outside = [max(0.0, r.seconds - training_seconds(r)) for r in done]
    pace = _pace(findings)
    missing = [(r, pace * _missing_steps(r, findings)) for r in findings.rows if r.state in ("COMPLETE", "PRUNED")]
    return Cost(
        held=sum(s for _, s in held),
        gpu_hours=sum(s * r.gpus for r, s in held) / 3600,
        cpu_hours=sum(s * r.cpus for r, s in held) / 3600,
        wall=covered(findings.sessions),
        training=sum(training_seconds(r) for r in findings.rows) + sum(s for _, s in again),
        slots=sum(s.seconds * s.slots for s in findings.sessions),
        outside=statistics.fmean(outside) if outside else math.nan,
        saved=sum(s for r, s in missing if r.state == "PRUNED"),
        saved_gpu_hours=sum(s * r.gpus for r, s in missing if r.state == "PRUNED") / 3600,
        skipped=sum(s for r, s in missing if r.state == "COMPLETE"),
    )


def training_seconds(row: TrialRow) -> float:
    """Seconds that the runs of a trial trained."""
    return sum(r.seconds for r in row.runs)


def _pace(findings: Findings) -> float:
    """Mean seconds of a step over the runs of complete trials; NaN without one."""
    runs = [run for r in findings.rows if r.state == "COMPLETE" for run in r.runs if run.step and run.seconds]
    return sum(r.seconds for r in runs) / sum(r.step for r in runs) if runs else math.nan


def _missing_steps(row: TrialRow, findings: Findings) -> int:
    whole = findings.search.steps * findings.search.space.repeats.seeds
    return max(0, whole - sum(run.step for run in row.runs))


def finalist_measures(found: Finalist, findings: Findings) -> tuple[Measure, Measure, Measure]:
    """A finalist's first objective: in the search, with fresh seeds, and on the untouched split."""
    name = findings.search.objective
    return (
        objective_of(found.trial, findings),
        measure(found.runs, name),
        measure(found.runs, name, final=True),
    )


# -- the best configuration -------------------------------------------------------------------


def best_tree(findings: Findings) -> dict[str, Any] | None:
    """The recommended trial's whole configuration, validated on the base's own split; ``None`` without one.

    Raises:
        ConfigError: The values do not go together.
    """
    best, search = findings.best, findings.search
    if best is None:
        return None
    tree = configs.to_dict(trial_config(search.base, best.params))
    if search.base.data.source != "shapes" or search.base.data.shards:
        tree["data"]["shards"] = search.shards.public
    tree["name"] = f"{search.base.name}-best"
    return configs.to_dict(configs.build(tree))


def train_command(findings: Findings) -> str:
    """The command that trains the best configuration."""
    search = findings.search
    return shlex.join(["ugrl-train", "--config", str(search.out / BEST), "--data", search.shards.public])


def masked(text: str) -> str:
    """A text without the credentials of the addresses in it.

    >>> masked("storage: postgresql://ann:secret@db/ugrl")
    'storage: postgresql://***@db/ugrl'
    """
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", text)
