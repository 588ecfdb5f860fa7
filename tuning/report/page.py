"""The report of a search as pages to read.

The same sections are written as Markdown with pictures beside it, and as one HTML file that holds all it shows.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from tuning.report.drawing import sample_rows
from tuning.report.paper import PaperSection
from tuning.report.read import Findings
from tuning.report.sections import Block, Code, Picture, Rows, Section, Tiles, contents, title_of
from tuning.report.spots import Spot, answers
from ugrl.secrets import masked
from ugrl.storage import place
from ugrl.text import html, markdown

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write_markdown(findings: Findings, path: Path, notes: Sequence[str], paper: PaperSection | None = None) -> None:
    """The report as Markdown.

    Args:
        findings: Of the search.
        path: The file; pictures are those in ``plots`` beside it.
        notes: What could not be drawn, and why.
        paper: The paper's table beside the measured one.
    """
    lines = [f"# {_plain(title_of(findings))}", ""]
    for section in contents(findings, notes, paper):
        lines += [f"## {section.title}", ""] if section.title else []
        for block in _present(section.blocks, path.parent):
            lines += [_markdown(block), ""]
    place(path).write("\n".join(lines).encode(errors="backslashreplace"))


def write_html(
    findings: Findings,
    path: Path,
    notes: Sequence[str],
    paper: PaperSection | None = None,
    spots: Mapping[str, Sequence[Spot]] | None = None,
) -> None:
    """The report as one HTML file that needs no network and no other file.

    Args:
        findings: As of :func:`write_markdown`, and so are the next three.
        path: The file.
        notes: What could not be drawn, and why.
        paper: The paper's table beside the measured one.
        spots: Name of a plot → its marks, which tell their trial to whoever points at them.
    """
    rows = sample_rows(findings, findings.rows)
    known = {r.number for r in rows}
    marks = {name: [s for s in these if s.trial in known] for name, these in (spots or {}).items()}
    marked = {s.trial for these in marks.values() for s in these}
    pages = Environment(
        loader=PackageLoader("tuning.report"), autoescape=True, finalize=_escape, trim_blocks=True, lstrip_blocks=True
    )
    text = pages.get_template("page.html.j2").render(
        title=title_of(findings),
        sections=[Section(s.title, _present(s.blocks, path.parent)) for s in contents(findings, notes, paper)],
        lined_up=_lined_up,
        numeric_columns=_numeric_columns,
        png=partial(_png, path.parent),
        spots=marks,
        answers=_script(answers([r for r in rows if r.number in marked], findings)),
        page_css=_as_it_is("page.css"),
        page_js=_as_it_is("page.js"),
    )
    place(path).write(text.encode(errors="backslashreplace"))


def _present(blocks: Sequence[Block], folder: Path) -> tuple[Block, ...]:
    """Without pictures that were not drawn."""
    return tuple(b for b in blocks if not isinstance(b, Picture) or _file(b, folder).is_file())


def _file(picture: Picture, folder: Path) -> Path:
    return folder / "plots" / f"{picture.name}.png"


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


def _escape(value: Any) -> Any:
    """What a template shows: every text without credentials and markup, but for what the templates made."""
    return value if isinstance(value, Markup) else Markup(html(masked(str(value))))


def _as_it_is(name: str) -> Markup:
    """A style or a script of this package: no template, and nothing to escape."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _lined_up(blocks: Sequence[Block]) -> list[Block | list[Picture]]:
    """The blocks in order; pictures that are not wide share lines."""
    made: list[Block | list[Picture]] = []
    for block in blocks:
        if not isinstance(block, Picture) or block.wide:
            made.append(block)
        elif made and isinstance(made[-1], list):
            made[-1].append(block)
        else:
            made.append([block])
    return made


def _png(folder: Path, picture: Picture) -> tuple[Markup, int, int]:
    """The picture as a part of the page, and its width and height in pixels."""
    data = _file(picture, folder).read_bytes()
    size = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    return Markup(f"data:image/png;base64,{base64.b64encode(data).decode()}"), *size


def _script(value: Any) -> Markup:
    """A value as a script reads it, without anything that the page could take for its own."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e"))


def _numeric_columns(table: Rows) -> list[bool]:
    return [_is_numeric([row[k] for row in table.rows]) for k in range(len(table.header))]


def _is_numeric(cells: Sequence[Any]) -> bool:
    """Whether a column holds numbers, which are aligned right."""
    known = [c for c in cells if c]
    return bool(known) and all(re.match(r"[-+−]?[\d.]", c) for c in known) and all(len(c) < 24 for c in known)
