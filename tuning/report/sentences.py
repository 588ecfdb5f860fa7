"""What the findings of a search say: which trial is best, how sure that is, what learning nothing gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from tuning.formatting import plural
from tuning.ledger.noise import ROUNDING, Measure, difference, measure, show
from tuning.report.findings import ORDER, baseline, contender, objective_of, paper_trial, runner_up
from tuning.report.luck import expected_best, loss, seed_noise
from tuning.report.read import Finalist, Findings, once
from tuning.space.advice import weak_rung as rung_rule
from tuning.study.record import BASELINES, Run, TrialRow, collapsed, label, ranked

# A score so near to that of a predictor that has learned nothing says nothing (half a point).
NEAR = 0.005
# How tables mark the trial that is recommended, and a score that a predictor has which has learned nothing.
STAR, DAGGER = "★", "†"


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


def first_line(text: str) -> str:
    """The first line of a message that says anything."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def remark(row: TrialRow) -> str:
    """Why a trial was stopped, and which constraints it broke."""
    broken = [f"{name} {value:.4g} is beyond its limit" for name, value in row.violation.items()]
    return "; ".join([*([row.note] if row.note else []), *broken])


def states(findings: Findings) -> str:
    """How many trials are in which state, as ``5 complete, 2 pruned``."""
    found = Counter(r.state for r in findings.rows)
    words = {"FAIL": "failed"}
    order = [*sorted(ORDER, key=ORDER.__getitem__), "FAIL"]
    return ", ".join(f"{found[s]} {words.get(s, s.lower())}" for s in order if found[s]) or "none"


@once
def verdict(findings: Findings) -> list[str]:
    """The finding: the first sentence says what is best, the others how sure that is."""
    first = contender(findings)
    if first is None:
        text = f"No trial has completed{_within(findings)}: there is no best configuration. States: {states(findings)}."
        return [line for line in (text, baselines(findings), weak_rung(findings)) if line]
    row, tune, final = first
    lines = [_headline(findings, row, tune, final), baselines(findings), collapse(findings), weak_rung(findings)]
    lines += _fresh(findings, row, tune) if findings.finalists else [_optimism(findings)]
    lines += [star(findings), _second(findings, tune)]
    noise = seed_noise(findings)
    if noise.known:
        text = f"Between seeds of one configuration the standard deviation is {points(noise.deviation)} "
        text += f"({noise.freedom} degrees of freedom)"
        if (left := noise.paired) is not None:
            text += (
                f", {100 * left.deviation:.2f} ({left.freedom}) without what a seed does to all configurations alike"
            )
        lines.append(text + ".")
    return [line for line in lines if line]


def points(value: float) -> str:
    """The size of a difference of two scores.

    >>> points(-0.012)
    '1.20 points'
    """
    return f"{100 * abs(value):.2f} points"


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
        seeds, change = ", ".join(str(r.seed) for r in row.runs), tune.mean - row.value
        where = f" on {'seeds' if len(row.runs) > 1 else 'seed'} {seeds}" if seeds else ""
        text = f"In the search it had {show(tune.name, row.value)} %{where}; with fresh seeds it has "
        same = abs(change) <= ROUNDING
        more = "more" if change > 0 else "less"
        lines.append(f"{text}the same." if same else f"{text}{points(change)} {more}. {_chance(findings)}")
    return lines


def _chance(findings: Findings) -> str:
    """What picking and other seeds explain of the change, and whether that is all of it."""
    found = loss(findings)
    if found is None or not (math.isfinite(found.picked) or math.isfinite(found.seeds)):
        return "With one seed each it is not known how much of that is chance."
    parts = []
    if found.lost > 0 and found.trials > 1 and math.isfinite(found.picked):
        parts.append(f"picking the best of {found.trials} adds {points(found.picked)} on average at most")
    if math.isfinite(found.seeds):
        parts.append(f"other seeds alone move such a number by up to {points(found.seeds)} (19 cases of 20)")
    else:
        parts.append("with one fresh seed it is not known what other seeds alone do")
    text = ", and ".join(parts)
    if found.explained is not None:
        words = "both together explain" if len(parts) > 1 else "that explains"
        text += f": {words} it" if found.explained else f": it is more than {words}"
    if found.shared is not None:
        text += f". The {len(findings.finalists)} finalists {'lost' if found.shared > 0 else 'gained'} "
        text += f"{points(found.shared)} on average, which picking does not explain: it is the search's own seed, "
        text += "which all its trials shared"
    return text[0].upper() + text[1:] + "."


def _optimism(findings: Findings) -> str:
    text = "Nothing was run again with fresh seeds (final.best)"
    able = ranked(findings.rows, findings.search.objectives[0])
    if len(able) < 2:
        return text + "."
    if abs((able[0].value or 0.0) - (able[-1].value or 0.0)) <= ROUNDING:
        return f"{text}, and all {len(able)} complete trials have the same score: it picks none of them."
    text += f": the number is the best of {len(able)}, picked for being the best, and therefore optimistic"
    noise = seed_noise(findings)
    noise = noise.paired or noise
    if noise.known:
        most = expected_best(len(able)) * noise.deviation / math.sqrt(max(1, len(able[0].runs)))
        text += f", by {points(most)} on average at most"
    return text + "."


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
        least = points(gap.least)
        return f"{text}within noise, the two cannot be told apart (a difference counts from {least} on)."
    return f"{text}beyond noise."


def star(findings: Findings) -> str:
    """Why the trial with the star is not the first of the search, where it is not."""
    best, able = findings.best, ranked(findings.rows, findings.search.objectives[0])
    place = next((k for k, r in enumerate(able, 1) if best is not None and r.number == best.number), 1)
    if best is None or place == 1:
        return ""
    return (
        f"{STAR} marks trial {best.number}, which has rank {place} in the search and is the first of "
        f"{plural(len(findings.finalists), 'finalist')} with fresh seeds: these decide, since the search's scores are "
        f"what finalists were picked by. Rank 1 in the search is trial {able[0].number}."
    )


def baselines(findings: Findings) -> str:
    """The scores to hold the objective against, on both splits."""
    name, space = findings.search.objective, findings.search.space
    here, there = baseline(findings, name), baseline(findings, name, final=True)
    if not math.isfinite(here):
        return ""
    text = f"Without learning anything ({BASELINES[name][1]}) {label(name).rsplit(',', 1)[0]} is {show(name, here)} % "
    text += f"on split '{space.split}'"
    return text + (f" and {show(name, there)} % on split '{space.final.split}'." if math.isfinite(there) else ".")


def dagger(runs: Iterable[Run]) -> str:
    """The mark of a score that says nothing, or nothing."""
    return f" {DAGGER}" if collapsed(runs) else ""


@once
def collapse(findings: Findings) -> str:
    """Which complete trials have learned nothing, and whether the best one is among them."""
    done = [r for r in findings.rows if collapsed(r.runs)]
    if not done:
        return ""
    numbers = ", ".join(str(r.number) for r in done[:12]) + (", …" if len(done) > 12 else "")
    best = findings.best
    text = f"{DAGGER} marks collapsed runs, whose score is no better than without learning anything: "
    text += f"{'trial' if len(done) == 1 else 'trials'} {numbers}."
    if best is not None and collapsed(findings.finalists[0].runs if findings.finalists else best.runs):
        text += f" The best trial, {best.number}, is one: this search has found nothing yet."
    return text


def weak_rung(findings: Findings) -> str:
    """A warning where the first rung compared trials that had not learned anything yet.

    By what they scored there; where runs do not say what learning nothing gives, by the rule for spaces.
    """
    search = findings.search
    name, scheduler = search.objective, search.space.scheduler
    base = baseline(findings, name)
    if not math.isfinite(base) and (why := rung_rule(search.space, search.base)):
        return f"{why[0].upper()}{why[1:]}."
    if scheduler.name == "none" or not math.isfinite(base):
        return ""
    first = [next(((s, v) for s, v in r.curve if s >= scheduler.grace_steps), None) for r in findings.rows]
    there = [pair for pair in first if pair is not None]
    weak = [pair for pair in there if abs(pair[1] - base) <= NEAR]
    if len(there) < 2 or 2 * len(weak) < len(there):
        return ""
    return (
        f"At the first rung, step {min(s for s, _ in weak)}, {len(weak)} of {len(there)} trials were within "
        f"{points(NEAR)} of what is had without learning anything ({show(name, base)} %): what was stopped there "
        "was not compared. Set scheduler.grace_steps to a step where scores have left it."
    )


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


def finalist_scores(found: Finalist, findings: Findings) -> tuple[str, str, str]:
    """A finalist's first objective as tables show it: in the search, with fresh seeds, and on the untouched split."""
    name = findings.search.objective
    return (
        objective_of(found.trial, findings).short() + dagger(found.trial.runs),
        measure(found.runs, name).short() + dagger(found.runs),
        measure(found.runs, name, final=True).short(),
    )
