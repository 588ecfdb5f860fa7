"""What a search found: a page, tables, a CSV file, the best configuration and plots.

Everything is read from the study's storage, so a report can be made of a search that is still
running, was interrupted, or ran elsewhere.
"""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuning.formatting import plural, short
from tuning.ledger.noise import show
from tuning.report.findings import BEST, best_tree, contender, metric_names, objective_of, ordered, train_command
from tuning.report.paper import PaperSection
from tuning.report.read import Findings
from tuning.report.sentences import STAR, dagger, finalist_scores, first_line, remark, verdict
from tuning.space.options import COSTS, METRICS
from tuning.study.record import BESIDE, label, pareto
from ugrl import config as configs
from ugrl.secrets import masked
from ugrl.storage import StorageError, place
from ugrl.text import csv_cell, line, plain

TABLE, PAGE, TEXT, PAPER_TEXT = "trials.csv", "report.html", "report.md", "paper.md"
PLOT_FOLDER = "plots"
# Trials that the terminal shows, and lines on failed ones; the files hold more.
SHOWN = 100


def write_report(findings: Findings, console: Console) -> None:
    """Write all files into the search's folder and print the tables.

    Files: ``trials.csv``, ``best.yaml`` (when a trial completed), ``plots/*.png``, ``report.md``, ``report.html``,
    and ``paper.md`` where the space names a table or figure of the paper.

    Args:
        findings: Of a search in any state.
        console: Where the tables go.

    Raises:
        StorageError: A file cannot be written.
    """
    try:
        notes, paper = _write_files(findings)
    except OSError as error:
        raise StorageError(line(error)) from None
    print_tables(findings, paper, console)
    print_failures(findings, console)
    for sentence in [*notes, *verdict(findings)]:
        _say(sentence, console)
    print_files(findings, console)


def _write_files(findings: Findings) -> tuple[list[str], PaperSection | None]:
    from tuning.report.page import write_html, write_markdown
    from tuning.report.paper import paper_section
    from tuning.report.plots import draw

    out = findings.search.out
    write_csv(findings)
    write_best(findings)
    drawn = draw(findings, out / PLOT_FOLDER)
    paper = paper_section(findings, out / PLOT_FOLDER)
    if paper is not None:
        place(out / PAPER_TEXT).write(paper.markdown().encode())
    write_markdown(findings, out / TEXT, drawn.notes, paper)
    write_html(findings, out / PAGE, drawn.notes, paper, drawn.spots)
    return drawn.notes, paper


def write_csv(findings: Findings) -> Path:
    """``trials.csv``: one line a trial in full precision, one column a searched path."""
    names = [o.name for o in findings.search.objectives]
    have = {n for r in findings.rows for n in r.metrics}
    others = [n for n in METRICS if n not in names] + [n for n in metric_names(findings) if n in COSTS]
    others += [n for n in BESIDE if n in have]
    finals = sorted({n for r in findings.rows for n in r.final if n in (*METRICS, *COSTS)})
    paths = [a.path for a in findings.search.space.search]
    header = ["number", "state", "step", *names, *(f"{n}.stderr" for n in names), "seeds", *others]
    header += [*(f"final.{n}" for n in finals), *paths, "seconds", "cpus", "gpus", "host", "from", "note", "error"]
    path = findings.search.out / TABLE
    file = io.StringIO(newline="")
    out = csv.writer(file)
    out.writerow(map(_cell, header))
    for r in findings.rows:
        values = r.values or [math.nan] * len(names)
        cells = [r.number, r.state, r.step, *values, *(r.metric(n)[1] for n in names), len(r.runs)]
        cells += [r.metrics.get(n) for n in others] + [r.final.get(n) for n in finals]
        cells += [r.params.get(p) for p in paths]
        cells += [r.seconds, r.cpus, r.gpus, r.host, r.origin, remark(r), r.error]
        out.writerow(map(_cell, cells))
    place(path).write(file.getvalue().encode(errors="backslashreplace"))
    return path


def write_best(findings: Findings) -> Path | None:
    """``best.yaml``: the best trial's configuration, validated on the base's own split again.

    Returns:
        ``None``, and no file, where no trial has completed.
    """
    path = findings.search.out / BEST
    tree, found = best_tree(findings), contender(findings)
    if tree is None or found is None:
        path.unlink(missing_ok=True)
        return None
    row, tune, final = found
    space = findings.search.space
    how = plural(max(1, tune.count), "fresh seed" if findings.finalists else "seed") + (
        "" if findings.finalists else " of the search"
    )
    text = (
        f"# Trial {row.number} of the search in {line(findings.search.out.name)}: {tune.name} {tune.short()} % on "
        f"split '{space.split}' ({how}),\n"
    )
    text += f"# {final.short()} % on split '{space.final.split}'" if final.known else "# not measured on another split"
    text += f"; {findings.search.steps} steps.\n# Train with it: {line(train_command(findings), 4000)}\n"
    place(path).write((text + configs.dump(tree)).encode(errors="backslashreplace"))
    return path


def print_tables(findings: Findings, paper: PaperSection | None, console: Console) -> None:
    """The trials, the finalists, the front of several objectives, and the paper's table beside the measured one."""
    print_trials(findings, console)
    if findings.finalists:
        _print(finalists_table(findings), console)
    if len(findings.search.objectives) > 1 and pareto(findings.rows, findings.search.objectives):
        _print(front_table(findings), console)
    if paper is not None:
        if paper.rows:
            _print(paper_table(paper), console)
        for sentence in paper.sentences:
            _say(sentence, console)


def print_trials(findings: Findings, console: Console) -> None:
    """The trials, best first; points beside results where the terminal is wide enough."""
    search, best = findings.search, findings.best
    names, others = [o.name for o in search.objectives], metric_names(findings)
    axes_ = search.space.search
    wide = console.width >= 40 + 11 * (len(names) + len(others)) + 9 * len(axes_)
    results = _table(f"{len(findings.rows)} trials, objective {', '.join(names)} on split '{search.space.split}'")
    points = _table("what was tried")
    for name in ("trial", "state", "step", *names, *others, "s"):
        results.add_column(name.replace("_", " "), justify="left" if name == "state" else "right")
    points.add_column("trial", justify="right")
    for axis in axes_:
        (results if wide else points).add_column(_plain(axis.name), justify="right")
    for r in ordered(findings)[:SHOWN]:
        chosen = best is not None and r.number == best.number
        style = "bold green" if chosen else "dim" if r.state == "FAIL" else ""
        cells = [f"{STAR} {r.number}" if chosen else str(r.number), r.state, str(r.step)]
        cells += [objective_of(r, findings, i).short(1) + dagger(r.runs) for i in range(len(names))]
        cells += [show(name, r.metrics.get(name), 1) for name in others]
        cells.append("" if math.isnan(r.seconds) else f"{r.seconds:.0f}")
        shown = [short(r.params.get(a.path)) for a in axes_]
        results.add_row(*map(_plain, [*cells, *(shown if wide else [])]), style=style)
        points.add_row(*map(_plain, [cells[0], *([] if wide else shown)]), style=style)
    _print(results, console)
    if not wide:
        _print(points, console)
    if len(findings.rows) > SHOWN:
        _say(f"The first {SHOWN} of {len(findings.rows)} trials; {TABLE} holds all of them.", console)


def finalists_table(findings: Findings) -> Table:
    """The configurations that were run again, with both splits side by side."""
    space = findings.search.space
    columns = ("trial", "seeds", "in the search", f"on {space.split}", f"on {space.final.split}, untouched")
    table = _table(f"run again with fresh seeds: {label(findings.search.objective)}", columns)
    for rank, found in enumerate(findings.finalists):
        cells = finalist_scores(found, findings)
        table.add_row(str(found.trial.number), str(len(found.runs)), *cells, style="" if rank else "bold green")
    return table


def front_table(findings: Findings) -> Table:
    """The trials that no other one beats in every objective."""
    objectives = findings.search.objectives
    table = _table("beaten by no other trial in every objective", ("trial", *(label(o.name) for o in objectives)))
    for r in pareto(findings.rows, objectives):
        table.add_row(str(r.number), *(objective_of(r, findings, i).short() for i in range(len(objectives))))
    return table


def paper_table(paper: PaperSection) -> Table:
    """Measured values beside printed ones."""
    table = _table(paper.title)
    for k, name in enumerate(paper.header):
        # A number stays on one line where the terminal is narrow; the words of the header wrap.
        longest = max((len(row[k]) for row in paper.rows), default=0)
        table.add_column(_plain(name), justify="right" if k else "left", min_width=longest)
    for row in paper.rows:
        table.add_row(*map(_plain, row))
    return table


def print_failures(findings: Findings, console: Console) -> None:
    """Why trials failed or were stopped by a constraint, a line each."""
    said = 0
    for r in findings.rows:
        reason = first_line(r.error) if r.state == "FAIL" else ""
        text = f"trial {r.number} failed: {reason or 'no reason was recorded'}" if r.state == "FAIL" else ""
        if r.violation and not text:
            text = f"trial {r.number} is out: {remark(r)}"
        if text and said < SHOWN:
            _say(text, console)
        said += bool(text)
    if said > SHOWN:
        _say(f"{said - SHOWN} more trials failed or are out; {TABLE} holds their reasons.", console)


def print_files(findings: Findings, console: Console) -> None:
    """Where to read on."""
    out = findings.search.out
    lines = [
        ("report", f"{out / PAGE}"),
        ("trials", f"{out / TABLE}"),
        ("plots", f"{out / PLOT_FOLDER}"),
        ("curves", f"tensorboard --logdir {shlex.quote(str(out / 'trials'))}"),
    ]
    if findings.search.space.paper:
        lines.insert(1, ("paper", f"{out / PAPER_TEXT}"))
    if findings.best is not None:
        lines += [("best", f"{out / BEST}"), ("train", train_command(findings))]
    for name, text in lines:
        console.print(f"{name:>7}: {line(text, 4000)}", highlight=False, soft_wrap=True, markup=False)


def _say(sentence: str, console: Console) -> None:
    """A line of its own, in which no markup and no escape code is read."""
    console.print(line(masked(sentence), 2000), highlight=False, soft_wrap=True, markup=False)


def _plain(cell: str) -> Text:
    return plain(masked(cell))


def _cell(value: Any) -> Any:
    """Of the CSV file: an empty one for what is unknown, nothing that a spreadsheet would run, no credentials."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return csv_cell(masked(value)) if isinstance(value, str) else value


def _table(title: str, columns: Sequence[str] = ()) -> Table:
    table = Table(title=plain(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _print(table: Table, console: Console) -> None:
    """A table under its title, which is not wrapped to the table's width."""
    title, table.title = table.title, None
    console.print(title or "", style="italic", highlight=False, soft_wrap=True)
    console.print(table)
