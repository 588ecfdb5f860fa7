"""What the findings of a search say, in numbers and in sentences: the best trial, how sure that is, what it cost."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from tuning.budget import covered
from tuning.noise import Measure, difference, measure, seed_noise, show
from tuning.options import COSTS, METRICS
from tuning.record import TrialRow, ranked
from tuning.search import Finalist, Findings
from tuning.space import trial_config
from ugrl import config as configs

# The values that the paper publishes; α, β, τ, η and λ1-λ3 it does not give.
PAPER = {"method.uncertainty.d_cls": 1024, "method.contrast.d_seg": 512, "method.contrast.keep": 0.35}
# The best trial's configuration, in the search's folder.
BEST = "best.yaml"
ORDER = {"COMPLETE": 0, "PRUNED": 2, "RUNNING": 3, "WAITING": 4}


def objective_of(row: TrialRow, findings: Findings, index: int = 0) -> Measure:
    """An objective of a trial as the study was told it, with the spread over the trial's seeds."""
    name = findings.search.objectives[index].name
    found = measure(row.runs, name)
    return replace(found, mean=row.values[index] if row.values else math.nan)


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


# -- the finding ------------------------------------------------------------------------------


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
        text = f"Between seeds of one configuration the standard deviation is {100 * noise.deviation:.2f} points "
        text += f"({noise.freedom} degrees of freedom)"
        if (left := noise.paired) is not None:
            text += (
                f", {100 * left.deviation:.2f} ({left.freedom}) without what a seed does to all configurations alike"
            )
        lines.append(text + ".")
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
    gap = difference(tune, other, seed_noise(findings))
    how = " (seed by seed)" if gap.paired else ""
    text = f"Second is trial {row.number} with {other.short()} %, {gap.short()} points below{how}: "
    if gap.real is None:
        return text + "with one seed each the noise is not known, so which of the two is better is not known either."
    if not gap.real:
        least = 100 * gap.least
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
