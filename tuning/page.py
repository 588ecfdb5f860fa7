"""The report of a search to read: which values, how sure, what mattered, what it cost.

The same sections are written as Markdown with pictures beside it, and as one HTML file that holds all it shows.
"""

from __future__ import annotations

import base64
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.facts import (
    BEST,
    PAPER,
    STAR,
    Cost,
    baseline,
    best_tree,
    collapse,
    contender,
    cost,
    dagger,
    duration,
    finalist_scores,
    metric_names,
    objective_of,
    ordered,
    paper_sentence,
    paper_trial,
    plural,
    remark,
    star,
    states,
    train_command,
    training_seconds,
    verdict,
)
from tuning.noise import show
from tuning.paper import PaperSection
from tuning.plain import short
from tuning.plots import importance
from tuning.record import TrialRow, label, pareto, ranked
from tuning.search import Findings
from tuning.space import Axis
from ugrl import config as configs
from ugrl.secrets import masked, public
from ugrl.storage import place
from ugrl.text import html, line, markdown

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
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
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: Mapping[int, str] = field(default_factory=dict)
    sortable: bool = False


@dataclass(frozen=True)
class Tiles:
    """A few numbers to see first: (what, value)."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Picture:
    """A picture in the folder of plots."""

    name: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Code:
    """A text to copy; a long one is folded under its title."""

    text: str
    title: str = ""


Block = str | Rows | Tiles | Picture | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


def write_markdown(findings: Findings, path: Path, notes: Sequence[str], paper: PaperSection | None = None) -> None:
    """The report as Markdown.

    Args:
        findings: Of the search.
        path: The file; pictures are those in ``plots`` beside it.
        notes: What could not be drawn, and why.
        paper: The paper's table beside the measured one.
    """
    lines = [f"# {_plain(_title(findings))}", ""]
    for section in contents(findings, notes, paper):
        lines += [f"## {section.title}", ""] if section.title else []
        for block in _present(section.blocks, path.parent):
            lines += [_markdown(block), ""]
    place(path).write("\n".join(lines).encode(errors="backslashreplace"))


def write_html(findings: Findings, path: Path, notes: Sequence[str], paper: PaperSection | None = None) -> None:
    """The report as one HTML file that needs no network and no other file; arguments as of :func:`write_markdown`."""
    body = []
    sections = contents(findings, notes, paper)
    for k, section in enumerate(sections):
        blocks = "\n".join(_pictures_side_by_side(_present(section.blocks, path.parent), path.parent))
        heading = f'<h2 id="s{k}">{_escape(section.title)}</h2>\n' if section.title else ""
        body.append(f"<section>\n{heading}{blocks}\n</section>")
    links = " ".join(f'<a href="#s{k}">{_escape(s.title)}</a>' for k, s in enumerate(sections) if s.title)
    title = _escape(_title(findings))
    # In one pass: a name in the search may hold what another pass would replace.
    parts = {"TITLE": title, "STYLE": STYLE, "SCRIPT": SCRIPT, "LINKS": links, "BODY": "\n".join(body)}
    place(path).write(re.sub(r"@([A-Z]+)@", lambda m: parts[m[1]], PAGE).encode(errors="backslashreplace"))


def contents(findings: Findings, notes: Sequence[str], paper: PaperSection | None) -> list[Section]:
    """The sections of the report, those without anything to say left out."""
    made = [
        Section("", (*verdict(findings), Tiles(_tiles(findings)))),
        Section("Which values", _values(findings)),
        Section("Run again with fresh seeds", _finalists(findings)),
        Section("Beside the paper", _beside(paper)),
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


# -- the sections -----------------------------------------------------------------------------

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


def _title(findings: Findings) -> str:
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
    return Rows(tuple(header), tuple(rows), marked, True)


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


def _present(blocks: Sequence[Block], folder: Path) -> list[Block]:
    """Without pictures that were not drawn."""
    return [b for b in blocks if not isinstance(b, Picture) or _file(b, folder).is_file()]


def _file(picture: Picture, folder: Path) -> Path:
    return folder / "plots" / f"{picture.name}.png"


# -- Markdown ---------------------------------------------------------------------------------


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return _plain(block)
    if isinstance(block, Tiles):
        return "\n".join(f"- {_plain(what)}: **{_plain(value)}**" for what, value in block.items)
    if isinstance(block, Picture):
        return f"![{_plain(block.caption)}](plots/{block.name}.png)"
    if isinstance(block, Code):
        text = CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", masked(block.text.rstrip()))
        ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        fence = f"{ticks}{'yaml' if block.title else 'sh'}\n{text}\n{ticks}"
        if not block.title:
            return fence
        return f"<details><summary>{_plain(block.title)}</summary>\n\n{fence}\n\n</details>"
    head, *rows = ("| " + " | ".join(map(_plain, row)) + " |" for row in (block.header, *block.rows))
    return "\n".join((head, "| --- " * len(block.header) + "|", *rows))


def _plain(text: str) -> str:
    """Text that is neither markup nor the end of a table's cell, without credentials."""
    return markdown(masked(text))


# -- HTML -------------------------------------------------------------------------------------


def _escape(text: str) -> str:
    return html(masked(text))


def _pictures_side_by_side(blocks: Sequence[Block], folder: Path) -> list[str]:
    """The blocks as HTML; pictures that are not wide share lines."""
    made: list[str] = []
    row: list[str] = []
    for block in [*blocks, ""]:
        if isinstance(block, Picture) and not block.wide:
            row.append(_figure(block, folder))
            continue
        if row:
            made.append(f'<div class="figures">{"".join(row)}</div>')
            row = []
        if block:
            made.append(_html(block, folder))
    return made


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, str):
        return f"<p>{_escape(block)}</p>"
    if isinstance(block, Picture):
        return _figure(block, folder)
    if isinstance(block, Tiles):
        items = "".join(f"<div><dd>{_escape(v)}</dd><dt>{_escape(k)}</dt></div>" for k, v in block.items)
        return f'<dl class="tiles">{items}</dl>'
    if isinstance(block, Code):
        text = f"<pre>{_escape(block.text)}</pre>"
        return f"<details><summary>{_escape(block.title)}</summary>{text}</details>" if block.title else text
    return _table(block)


def _figure(picture: Picture, folder: Path) -> str:
    data = _file(picture, folder).read_bytes()
    text, width = _escape(picture.caption), int.from_bytes(data[16:20])  # PNG keeps its width there
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img alt="{text}" style="--pixels: {width}" src="{source}">'
    return f"<figure>{_wide(image, picture.name)}<figcaption>{text}</figcaption></figure>"


def _wide(content: str, name: str) -> str:
    """What may be wider than the page: it is moved sideways by itself, which keys can do too, and says so."""
    return (
        '<p class="hint" hidden>more to the right: scroll sideways →</p>'
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}">{content}</div>'
    )


def _table(table: Rows) -> str:
    numeric = [_is_numeric([row[k] for row in table.rows]) for k in range(len(table.header))]

    def cells(tag: str, row: Sequence[str]) -> str:
        wrap: Callable[[str], str] = (lambda t: f"<button>{t}</button>") if tag == "th" and table.sortable else str
        return "".join(
            f"<{tag}{' class=n' if n else ''}>{wrap(_escape(c))}</{tag}>" for c, n in zip(row, numeric, strict=True)
        )

    lines = [f"<tr>{cells('th', table.header)}</tr>"]
    for k, row in enumerate(table.rows):
        mark = f' class="{table.marked[k]}"' if k in table.marked else ""
        lines.append(f"<tr{mark}>{cells('td', row)}</tr>")
    kind = f' class="{"sort " * table.sortable}{"many" if len(table.header) > 3 else ""}"'
    head, body = lines[0], "\n".join(lines[1:])
    return _wide(f"<table{kind}><thead>{head}</thead><tbody>\n{body}\n</tbody></table>", "table")


def _is_numeric(cells: Sequence[Any]) -> bool:
    """Whether a column holds numbers, which are aligned right."""
    known = [c for c in cells if c]
    return bool(known) and all(re.match(r"[-+−]?[\d.]", c) for c in known) and all(len(c) < 24 for c in known)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>@TITLE@</title>
<style>@STYLE@</style>
</head>
<body>
<header><h1>@TITLE@</h1><nav>@LINKS@</nav></header>
<main>
@BODY@
</main>
<script>@SCRIPT@</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dfe3e8; --page: #f6f7f9; --card: #fff;
  --accent: #2563a8; --best: #fce8f0; --bestink: #a3124d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --soft: #9aa5b3; --line: #333b46; --page: #14181d;
  --card: #1c2229; --accent: #7fb2e8; --best: #3a1c2a; --bestink: #ff9cc2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
header, main { max-width: 1500px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 28px; }
h1 { font-size: 26px; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 10px; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-bottom: 14px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 22px;
  margin-bottom: 18px; }
section:first-child > p:first-child { font-size: 18px; font-weight: 600; line-height: 1.4; }
p { margin: 0 0 8px; max-width: 92ch; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin: 16px 0 2px; }
.tiles > div { display: flex; flex-direction: column; gap: 2px; border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
dd { margin: 0; font-size: 17px; font-weight: 600; }
dt { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; margin: 6px 0 12px; }
.wide.more { box-shadow: inset -18px 0 14px -14px rgb(0 0 0 / .4); }
.hint { color: var(--soft); font-size: 13px; text-align: right; max-width: none; margin: 4px 0 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td:last-child { overflow-wrap: anywhere; max-width: 72ch; white-space: pre-wrap; }
td:last-child:not(.n) { min-width: 17ch; }
th:first-child, td:first-child { padding-left: 8px; position: sticky; left: 0; background: var(--card); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.many td:not(:last-child) { white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
th.n { white-space: normal; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort="ascending"] button::after { content: " ▲"; font-size: 9px; }
th[aria-sort="descending"] button::after { content: " ▼"; font-size: 9px; }
tr.best td { background: var(--best); color: var(--bestink); font-weight: 600; }
tr.weak td { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(430px, 1fr)); gap: 14px; }
.figures > figure { min-width: 0; }
figure { margin: 10px 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px; padding: 6px; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 8px 0;
  overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 640px) {
  body { font-size: 16px; }
  header, main { padding: 0 10px; }
  section { padding: 14px; }
  .tiles, .figures { grid-template-columns: minmax(0, 1fr); }
  table { font-size: 14.5px; }
  nav { gap: 8px 18px; font-size: 15.5px; }
  img { max-width: none; width: max(100%, var(--pixels) * .65px); }
}
"""

SCRIPT = """
for (const box of document.querySelectorAll(".wide")) {
  const look = () => {
    const left = box.scrollWidth - box.clientWidth - box.scrollLeft;
    box.classList.toggle("more", left > 2);
    box.previousElementSibling.hidden = box.scrollWidth - box.clientWidth <= 2;
  };
  box.addEventListener("scroll", look);
  new ResizeObserver(look).observe(box);
  look();
}
for (const table of document.querySelectorAll("table.sort")) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].textContent.trim();
    const rows = [...table.tBodies[0].rows];
    const order = (a, b) => {
      const s = key(a), t = key(b);
      if (!s || !t) return (s ? 0 : 1) - (t ? 0 : 1);
      const x = parseFloat(s), y = parseFloat(t);
      const found = isNaN(x) || isNaN(y) ? s.localeCompare(t) : x - y;
      return up ? found : -found;
    };
    table.tBodies[0].append(...rows.sort(order));
  });
}
"""
