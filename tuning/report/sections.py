"""The sections of a report, and the blocks that they are made of."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tuning.formatting import plural, short
from tuning.ledger.noise import show
from tuning.report.differences import DIFFERENCES, caption, compare, difference_table
from tuning.report.findings import (
    BEST,
    PAPER,
    Cost,
    baseline,
    best_tree,
    contender,
    cost,
    metric_names,
    objective_of,
    ordered,
    paper_trial,
    train_command,
    training_seconds,
)
from tuning.report.paper import PaperSection
from tuning.report.plots import importance
from tuning.report.read import Findings
from tuning.report.sentences import (
    STAR,
    collapse,
    dagger,
    duration,
    finalist_scores,
    paper_sentence,
    remark,
    star,
    states,
    verdict,
)
from tuning.report.spots import address
from tuning.space.axis import Axis
from tuning.study.record import TrialRow, label, pareto, ranked
from ugrl import config as configs
from ugrl.secrets import public
from ugrl.text import line

# Rows of a table of trials; more make a page that no browser likes, and all are in the CSV file.
LONGEST = 1000
# From so many complete trials on, the range of the best quarter says something.
QUARTER = 8


@dataclass(frozen=True)
class Rows:
    """A table.

    Attributes:
        header: Of the columns.
        rows: Cells, as text.
        marked: Index of a row → how it stands out: ``best``, ``weak`` or ``paper``.
        sortable: Whether a click on a column sorts.
        linked: Index of the column that has links.
        links: Index of a row → the address behind that cell.
    """

    kind: ClassVar[str] = "rows"
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: Mapping[int, str] = field(default_factory=dict)
    sortable: bool = False
    linked: int = 0
    links: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tiles:
    """A few numbers to see first: (what, value)."""

    kind: ClassVar[str] = "tiles"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Picture:
    """A picture in the folder of plots."""

    kind: ClassVar[str] = "picture"
    name: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Code:
    """A text to copy; a long one is folded under its title."""

    kind: ClassVar[str] = "code"
    text: str
    title: str = ""


Block = str | Rows | Tiles | Picture | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


def contents(findings: Findings, notes: Sequence[str], paper: PaperSection | None) -> list[Section]:
    """The sections of the report, those without anything to say left out."""
    made = [
        Section("", (*verdict(findings), Tiles(_tiles(findings)))),
        Section("Which values", _values(findings)),
        Section("Run again with fresh seeds", _finalists(findings)),
        Section("Beside the paper", _beside(paper)),
        Section("Seed by seed", _seed_by_seed(findings)),
        Section("Several objectives", _front(findings)),
        Section("All trials", _all_trials(findings)),
        Section("What mattered", (*_mattered(findings), *MATTERED)),
        Section("How the search went", WENT),
        Section("What it cost", _cost(findings)),
        Section("Failures", _failures(findings)),
        Section("How it was run", _conduct(findings)),
        Section("What could not be drawn", tuple(notes)),
    ]
    return [s for s in made if s.blocks]


EARLY = "Trials that were stopped have early scores; scores beyond the axis are hollow triangles at its edge."
MATTERED = (
    Picture("slices", f"The objective over each searched value. {EARLY}", True),
    Picture("contour", "The objective over pairs of values; complete trials interpolated, all trials shown.", True),
    Picture("parallel", "Every trial as a line; the darker, the better. Dashed: not complete.", True),
)
WENT = (
    Picture("history", f"Scores in the order of trials, with standard errors where there are several seeds. {EARLY}"),
    Picture("curves", "Learning curves, a line for each seed of each trial."),
    Picture("rungs", "How many trials reached each validation, by what became of them."),
)


def title_of(findings: Findings) -> str:
    """The title of a report."""
    return f"Search {line(findings.search.out.name)}"


def _tiles(findings: Findings) -> tuple[tuple[str, str], ...]:
    space, spent = findings.search.space, cost(findings)
    items = []
    found = contender(findings)
    if found is not None:
        row, tune, final = found
        seeds = plural(tune.count, "fresh seed" if findings.finalists else "seed")
        name, unit = label(tune.name).rsplit(", ", 1)
        items.append((f"{name} of trial {row.number} on {space.split}, {seeds}", f"{tune.short()} {unit}"))
        if final.known:
            items.append((f"{name} of the same on {space.final.split}, untouched", f"{final.short()} {unit}"))
        if math.isfinite(nothing := baseline(findings, tune.name)):
            items.append((f"{name} on {space.split} without learning anything", f"{show(tune.name, nothing)} {unit}"))
    items.append((f"of {plural(space.trials, 'planned trial')}", states(findings)))
    hours = f"{spent.gpu_hours:.3g} GPU-hours" if spent.gpu_hours else f"{spent.cpu_hours:.3g} CPU-hours"
    items.append(("held by trials", hours if spent.gpu_hours or spent.cpu_hours else duration(spent.held)))
    return tuple(items)


def _values(findings: Findings) -> tuple[Block, ...]:
    space, best, base = findings.search.space, findings.best, findings.search.base
    ranking = importance(findings)
    shares = ranking if isinstance(ranking, dict) else {}
    quarter = _best_quarter(findings)
    header = ["searched path", "best", "the paper's", "base", "searched"]
    header += ["in the best quarter"] if quarter else []
    header += ["importance"] if shares else []
    rows = []
    for axis in space.search:
        cells = [axis.path, short(best.params.get(axis.path)) if best else "", short(PAPER.get(axis.path))]
        cells += [short(configs.get(base, axis.path)), axis.describe()]
        cells += [_range(axis, quarter)] if quarter else []
        cells += [f"{100 * shares[axis.path]:.0f} %" if axis.path in shares else ""] if shares else []
        rows.append(tuple(cells))
    blocks: list[Block] = [Rows(tuple(header), tuple(rows)), paper_sentence(findings)]
    tree = best_tree(findings)
    if tree is not None:
        text = configs.dump(tree)
        blocks += ["The command that trains the best configuration:", Code(train_command(findings)), Code(text, BEST)]
    return tuple(blocks)


def _best_quarter(findings: Findings) -> list[TrialRow]:
    rows = ranked(findings.rows, findings.search.objectives[0])
    return rows[: max(3, len(rows) // 4)] if len(rows) >= QUARTER else []


def _range(axis: Axis, rows: Sequence[TrialRow]) -> str:
    values = [r.params[axis.path] for r in rows if axis.path in r.params]
    if not values:
        return "does not count"
    if axis.kind == "choice":
        return ", ".join(short(o) for o in axis.options if o in values)
    return short(values[0]) if min(values) == max(values) else f"{short(min(values))} … {short(max(values))}"


def _finalists(findings: Findings) -> tuple[Block, ...]:
    if not findings.finalists:
        return ()
    space, axes_ = findings.search.space, findings.search.space.search
    what = label(findings.search.objective)
    header = ["rank", "trial", "seeds", f"{what}, in the search", f"on {space.split}", f"on {space.final.split}"]
    rows = []
    for rank, found in enumerate(findings.finalists, 1):
        cells = finalist_scores(found, findings)
        points = [short(found.trial.params.get(a.path)) for a in axes_]
        rows.append((str(rank), str(found.trial.number), str(len(found.runs)), *cells, *points))
    text = (
        f"Means and standard errors over fresh seeds, ranked on split '{space.split}'; split '{space.final.split}' was "
        "never used to choose."
    )
    return text, Rows((*header, *(a.name for a in axes_)), tuple(rows), {0: "best"}, True)


def _beside(paper: PaperSection | None) -> tuple[Block, ...]:
    if paper is None:
        return ()
    table = (Rows(paper.header, paper.rows),) if paper.rows else ()
    picture = (Picture("paper", paper.title, True),) if paper.image else ()
    return paper.title, *table, *paper.sentences, *picture


def _seed_by_seed(findings: Findings) -> tuple[Block, ...]:
    found = compare(findings)
    if found is None:
        return ()
    header, rows = difference_table(found, findings)
    trials = [found.reference, *(p.row for p in found.pairs)]
    links = {k: where for k, r in enumerate(trials) if (where := address(r, findings))}
    return Picture(DIFFERENCES, caption(found, findings), True), Rows(header, rows, sortable=True, links=links)


def _front(findings: Findings) -> tuple[Block, ...]:
    objectives = findings.search.objectives
    if len(objectives) < 2:
        return ()
    rows = pareto(findings.rows, objectives)
    table = Rows(
        ("trial", *(label(o.name) for o in objectives)),
        tuple((str(r.number), *(objective_of(r, findings, i).short() for i in range(len(objectives)))) for r in rows),
        sortable=True,
    )
    text = f"{plural(len(rows), 'trial')} that no other trial beats in every objective; the first objective ranks."
    return text, table, Picture("pareto", "Objectives against each other.", True)


def _all_trials(findings: Findings) -> tuple[Block, ...]:
    if not findings.rows:
        return ()
    blocks = [*filter(None, (star(findings), collapse(findings)))]
    if len(findings.rows) > LONGEST:
        blocks.append(f"The first {LONGEST} of {len(findings.rows)} trials; trials.csv holds all of them.")
    return *blocks, _leaderboard(findings)


def _leaderboard(findings: Findings) -> Rows:
    objectives, others = findings.search.objectives, metric_names(findings)
    name, axes_, split = findings.search.objective, findings.search.space.search, findings.search.space.final.split
    finals = any(r.final for r in findings.rows)
    header = ["rank", "trial", "state", "step", "seeds", *(label(o.name) for o in objectives)]
    header += [f"{label(name)} on {split}"] if finals else []
    header += [*map(label, others), "held, s", *(a.name for a in axes_), "note"]
    able = {r.number for r in ranked(findings.rows, objectives[0])}
    best, paper = findings.best, paper_trial(findings)
    rows, marked = [], {}
    for position, r in enumerate(ordered(findings)[:LONGEST], 1):
        rank = str(position) if r.number in able else ""
        rank += f" {STAR}" if best is not None and r.number == best.number else ""
        cells = [rank, str(r.number), r.state, str(r.step), str(len(r.runs))]
        cells += [objective_of(r, findings, i).short() + dagger(r.runs) for i in range(len(objectives))]
        cells += [show(name, r.final.get(name))] if finals else []
        cells += [show(n, r.metrics.get(n)) for n in others]
        cells += [f"{r.seconds:.0f}" if math.isfinite(r.seconds) else ""]
        cells += [short(r.params.get(a.path)) for a in axes_]
        notes = [r.origin, "the paper's point" if paper is not None and r.number == paper.number else "", remark(r)]
        rows.append((*cells, "; ".join(filter(None, [*notes, "collapsed" if dagger(r.runs) else ""]))))
        if best is not None and r.number == best.number:
            marked[position - 1] = "best"
        elif r.number not in able:
            marked[position - 1] = "weak"
    links = {k: where for k, r in enumerate(ordered(findings)[:LONGEST]) if (where := address(r, findings))}
    return Rows(tuple(header), tuple(rows), marked, True, header.index("trial"), links)


def _mattered(findings: Findings) -> tuple[Block, ...]:
    ranking = importance(findings)
    if isinstance(ranking, str):
        return ()
    return (Picture("importance", "How much each searched value tells good trials from others (PED-ANOVA)."),)


def _cost(findings: Findings) -> tuple[Block, ...]:
    if not findings.rows:
        return ()
    spent = cost(findings)
    items = [
        ("GPU-hours held", f"{spent.gpu_hours:.3g}"),
        ("CPU-hours held", f"{spent.cpu_hours:.3g}"),
        ("time held by all trials", duration(spent.held)),
        (
            f"wall time of {plural(len(findings.sessions), 'session')}",
            duration(spent.wall) if findings.sessions else "–",
        ),
        ("utilisation: training time / (session time × slots)", _share(spent.utilisation)),
        ("held outside training, mean of a trial", duration(spent.outside)),
        ("saved by pruning, estimated", _saved(findings, spent)),
    ]
    if spent.skipped >= 0.5:
        items.append(("saved by seeds that were not run, estimated", duration(spent.skipped)))
    text = "What pruning saved are the steps that pruned trials did not run, at the mean pace of complete ones."
    if findings.finalists:
        text += " Runs with fresh seeds count with their training time."
    wide = any(r.value is not None for r in findings.rows)
    return (
        Rows(("what", "how much"), tuple(items)),
        text,
        Picture("cost", "What trials held, and what it bought.", wide),
    )


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else "–"


def _saved(findings: Findings, spent: Cost) -> str:
    pruned = sum(r.state == "PRUNED" for r in findings.rows)
    if not pruned:
        return "nothing: no trial was pruned"
    if not math.isfinite(spent.saved):
        return "not known without a complete trial"
    gpu = f", {spent.saved_gpu_hours:.3g} GPU-hours" if spent.saved_gpu_hours else ""
    training = sum(training_seconds(r) for r in findings.rows)
    share = spent.saved / (spent.saved + training) if spent.saved + training > 0 else math.nan
    return f"{duration(spent.saved)} of training ({_share(share)} of what all steps would have taken){gpu}"


def _failures(findings: Findings) -> tuple[Block, ...]:
    rows = [
        (str(r.number), str(r.step), r.host, r.error or "no reason was recorded")
        for r in findings.rows
        if r.state == "FAIL"
    ]
    table = Rows(("trial", "step", "host", "error"), tuple(rows[:LONGEST]))
    more = f"The first {LONGEST} of {len(rows)} failed trials; trials.csv holds all of them."
    return (*([more] if len(rows) > LONGEST else []), table) if rows else ()


def _conduct(findings: Findings) -> tuple[Block, ...]:
    search, space = findings.search, findings.search.space
    hosts = {r.host for r in findings.rows} | {s.host for s in findings.sessions}
    items = [
        ("base configuration", f"{space.config}, {search.steps} steps"),
        ("objectives", ", ".join(f"{o.direction} {o.name}" for o in search.objectives)),
        ("split that the search sees", space.split),
        ("untouched split", space.final.split),
        *_method(findings),
        ("constraints", ", ".join(f"{c.name} ≤ {c.limit:g}" for c in space.constraints) or "none"),
        ("workers of a trial", str(space.workers)),
        ("shards", public(search.shards.where)),
        ("hosts", ", ".join(sorted(filter(None, hosts))) or "–"),
        ("commit", ", ".join(sorted({r.commit for r in findings.rows if r.commit})) or "–"),
    ]
    table = Rows(("what", "how"), tuple(items))
    return table, *_sessions(findings), Code(space.to_yaml(), "the space that was searched")


def _method(findings: Findings) -> list[tuple[str, str]]:
    """Sampler, scheduler, budget and repeats in words."""
    space = findings.search.space
    scheduler = space.scheduler.name
    if scheduler != "none":
        scheduler += f", no stop before step {space.scheduler.grace_steps}, factor {space.scheduler.reduction_factor:g}"
    spent = (
        ("hours", space.budget.hours),
        ("GPU-hours", space.budget.gpu_hours),
        ("CPU-hours", space.budget.cpu_hours),
    )
    budget = [plural(space.trials, "trial"), *(f"{value:g} {unit}" for unit, value in spent if value)]
    spared = ", later ones skipped where the first lose" if space.repeats.seeds > 1 and space.repeats.skip else ""
    final = f"best {space.final.best} with {space.final.seeds} fresh seeds" if space.final.best else "nothing"
    return [
        ("sampler", f"{space.sampler.name}, seed {space.seed}"),
        ("scheduler", scheduler),
        ("budget", ", ".join(budget)),
        ("seeds of a configuration", f"{space.repeats.seeds}{spared}"),
        ("run again at the end", final),
    ]


def _sessions(findings: Findings) -> tuple[Block, ...]:
    rows = [
        (s.id, s.host, _moment(s.started), duration(s.seconds), str(s.slots), "ended" if s.ended else "not ended")
        for s in findings.sessions
    ]
    return (Rows(("session", "host", "started, UTC", "length", "slots", "end"), tuple(rows)),) if rows else ()


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if seconds else "–"
