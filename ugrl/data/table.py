"""Tables of images and tags as other people write them.

What is unambiguous is read: commas, semicolons or tabs between the columns, other names of the columns, tags joined
by ``;``, ``|`` or ``,``, as a list, or ``nan`` for none. Anything else is one line that says what to write instead.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ugrl import foreign
from ugrl.data.source import CONTROL
from ugrl.errors import DataError
from ugrl.text import brief, line, nearest

SPLITS = ("train", "val")
_SPLIT_WORDS = {"": "train", "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_COLUMNS = {
    "file": ("file", "filename", "filepath", "image", "imagefile", "imagename", "imagepath", "imageid", "img", "path"),
    "tags": ("tags", "tag", "labels", "label", "classes", "class", "categories", "category"),
    "split": ("split", "subset", "set", "partition"),
}
_ROLES = {word: role for role, words in _COLUMNS.items() for word in words}
_NOTHING = {"", "nan", "none", "null", "n/a", "na", "<na>"}
_QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""")
# What joins tags, the documented one first; of the others a table is asked to write that one instead.
_JOINTS = (";", "|", ",")
_OTHERS = ("#", "/", "&", "+", ":", "\\", " ")
MOST_NAME = 200


class Entry(NamedTuple):
    """One image of a table: its file, its tags by name, its split and the line that says so."""

    file: str
    tags: tuple[str, ...]
    split: str
    line: int


class _Record(NamedTuple):
    file: str
    tags: str
    split: str
    line: int


def read_table(path: Path, classes: tuple[str, ...] | None) -> list[Entry]:
    """The images of a table.

    Args:
        path: The CSV file.
        classes: What is a class name, where that is known; otherwise the table says so.

    Raises:
        DataError: A table that is missing, malformed or can be read in two ways, or an unknown class.
    """
    records = _records(path)
    cells = {r.tags for r in records}
    split_up = _known(cells, classes) if classes is not None else _found(cells)
    entries = []
    for record in records:
        tags = split_up[record.tags]
        if isinstance(tags, str):
            raise DataError(f"{line(path)}: line {record.line}: {tags}")
        entries.append(Entry(record.file, tags, record.split, record.line))
    return entries


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The class names of a ``classes.txt``, one a line; ``None`` where there is no such file.

    Raises:
        DataError: A file that cannot be read, or a class that appears twice.
    """
    if not os.path.lexists(path):
        return None
    seen: dict[str, int] = {}
    for at, text in enumerate(foreign.read_text(path, "list of classes").splitlines(), 1):
        name = text.strip()
        if not name:
            continue
        if wrong := _unusable(name):
            raise DataError(f"{line(path)}: line {at}: {wrong}")
        if name in seen:
            raise DataError(f"{line(path)}: class {brief(name)} appears twice, on lines {seen[name]} and {at}")
        seen[name] = at
    first = next(iter(seen), "")
    if first.casefold() in ("background", "_background_", "__background__"):
        raise DataError(f"{line(path)}: line {seen[first]}: {brief(first)} is label 0 by itself; remove the line")
    return tuple(seen)


# -- lines and columns -----------------------------------------------------------------------------


def _records(path: Path) -> list[_Record]:
    text = foreign.read_text(path, "table of columns file, tags and perhaps split")
    skipped = 0
    delimiters: tuple[str, ...] = (",", ";", "\t", "|")
    if told := re.match(r"sep=([,;\t|])\r?\n", text):  # a spreadsheet's
        text, skipped, delimiters = text[told.end() :], 1, (told[1],)
    where = line(path)
    header = _header(text)
    delimiter = max(delimiters, key=lambda d: len({_role(c) for c in header.split(d)} - {None}))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: dict[str, int] = {}
    width = 0
    out: list[_Record] = []
    try:
        for cells in reader:
            if not any(c.strip() for c in cells):
                continue
            at = reader.line_num + skipped
            if not columns:
                columns, width = _columns(cells, where), len(cells)
            elif len(cells) > width:
                why = "tags are joined by semicolons, or stand in quotes"
                raise DataError(f"{where}: line {at}: more values than columns; {why}")
            else:
                out.append(_record(cells + [""] * (width - len(cells)), columns, f"{where}: line {at}", at))
    except csv.Error as error:
        raise DataError(f"{where}: line {reader.line_num + skipped}: not a table ({line(error)})") from None
    if not columns:
        raise DataError(f"{where}: no column 'file' among none; expected columns file, tags and perhaps split")
    return out


def _header(text: str) -> str:
    return next((row for row in text.splitlines() if row.strip()), "")


def _role(name: str) -> str | None:
    return _ROLES.get(re.sub(r"[\s_\-\"']", "", name).casefold())


def _columns(cells: list[str], where: str) -> dict[str, int]:
    roles = [_role(c) for c in cells]
    for column in ("file", "tags"):
        if column not in roles:
            have = ", ".join(line(c, 30) for c in cells[:8])
            more = "; expected one column with the names of an image's classes" if column == "tags" else ""
            raise DataError(f"{where}: no column '{column}' among {have}{more}")
    columns: dict[str, int] = {}
    for k, (cell, role) in enumerate(zip(cells, roles, strict=True)):
        if role is None:
            if cell.strip():  # a column without a name numbers the lines
                raise DataError(f"{where}: unknown column {brief(cell.strip())}{_near(cell, _COLUMNS)}")
        elif role in columns:
            raise DataError(f"{where}: columns {brief(cells[columns[role]])} and {brief(cell)}; expected one of them")
        else:
            columns[role] = k
    return columns


def _near(word: str, options: Iterable[str]) -> str:
    return line(nearest(word.strip()[:60], options), 160)


def _record(cells: list[str], columns: dict[str, int], where: str, at: int) -> _Record:
    file = cells[columns["file"]].strip()
    if not file or CONTROL.search(file):
        raise DataError(
            f"{where}: " + (f"file name {brief(file)}; expected no control characters" if file else "no file name")
        )
    word = cells[columns["split"]].strip() if "split" in columns else ""
    split = _SPLIT_WORDS.get("" if word.casefold() in _NOTHING else word.casefold())
    if split is None:
        raise DataError(f"{where}: split {brief(word)}{_near(word, SPLITS)}")
    return _Record(file, cells[columns["tags"]].strip(), split, at)


# -- tags ------------------------------------------------------------------------------------------


def _unusable(name: str) -> str:
    if len(name) > MOST_NAME:
        return f"a class name of {len(name)} characters ({line(name, 40)}); expected at most {MOST_NAME}"
    return f"class name {brief(name)}; expected no control characters" if CONTROL.search(name) else ""


def _list(cell: str) -> tuple[str, ...] | None:
    """The items of a list as Python, JSON or NumPy writes it; ``None`` where it is none."""
    if len(cell) < 2 or cell[0] + cell[-1] not in ("[]", "()", "{}"):
        return None
    inside = cell[1:-1].strip()
    if not _QUOTED.sub("", inside).strip(", \n"):
        return tuple(re.sub(r"\\(.)", r"\1", a or b).strip() for a, b in _QUOTED.findall(inside))
    if cell[0] == "[" and "," in inside and not _QUOTED.search(inside):
        return tuple(part.strip() for part in inside.split(","))
    return None


def _parts(cell: str, joint: str) -> tuple[str, ...]:
    return tuple(p for part in cell.split(joint) if (p := part.strip()))


def _known(cells: Iterable[str], classes: tuple[str, ...]) -> dict[str, tuple[str, ...] | str]:
    """Cells → class names, or what is wrong with the cell, where the class names are known."""
    known = set(classes)
    out: dict[str, tuple[str, ...] | str] = {}
    for cell in cells:
        listed = _list(cell)
        ways = [
            w
            for w in [(cell,), *(_parts(cell, j) for j in _JOINTS + _OTHERS), listed or ()]
            if w and known.issuperset(w)
        ]
        if ways:
            out[cell] = ways[0]
        elif cell.casefold() in _NOTHING or listed == () or not cell.strip(";|, "):
            out[cell] = ()
        else:
            joint = next((j for j in _JOINTS if j in cell), ";")
            name = next(n for n in listed or _parts(cell, joint) or (cell,) if n not in known)
            out[cell] = f"unknown class {brief(name)}{_near(name, classes)}"
    return out


def _found(cells: Iterable[str]) -> dict[str, tuple[str, ...] | str]:
    """Cells → class names, or what is wrong with the cell, where the table alone says what is a class."""
    out: dict[str, tuple[str, ...] | str] = {}
    plain: list[str] = []
    for cell in sorted(cells):
        listed = _list(cell)
        if listed is not None and any(n.replace(".", "", 1).isdigit() for n in listed):
            out[cell] = (
                f"tags {brief(cell)} are numbers; expected class names, or classes.txt with the numbers as names"
            )
        elif listed is not None:
            out[cell] = listed
        elif cell.casefold() in _NOTHING or not cell.strip(";|, "):
            out[cell] = ()
        else:
            plain.append(cell)
    used = [j for j in _JOINTS if any(j in c for c in plain)]
    joint = used[0] if used else ";"
    alone = {c for c in plain if joint not in c}
    for cell in plain:
        out[cell] = _parts(cell, joint)
        if joint == "," and "," in cell and not alone.intersection(out[cell]):
            n = len(out[cell])
            out[cell] = (
                f"tags {brief(cell)} could be 1 class or {n}; join tags by ';', or list the classes in classes.txt"
            )
    names = {n for tags in out.values() if isinstance(tags, tuple) for n in tags}
    for cell, tags in out.items():
        for name in tags if isinstance(tags, tuple) else ():
            if wrong := _unusable(name) or _joined(name, names):
                out[cell] = wrong
                break
    return out


def _joined(name: str, names: set[str]) -> str:
    """What is wrong with a class name that looks like several, joined by something else than the table's joint."""
    if name[0] + name[-1] == "[]" and name[1:-1].strip() in names:
        return f"tag {brief(name)} looks like a list; join tags by ';', or list the classes in classes.txt"
    for joint in ("|", ",", *_OTHERS):
        parts = [p.strip() for p in name.split(joint) if p.strip()]
        others = sum(p in names for p in parts)
        # Spaces are common in names ("hot dog" beside "dog"), so all words must be classes; a hash or a bar is not.
        certain = joint in "|#" or (others == len(parts) if joint == " " else others > 0)
        if len(parts) > 1 and certain:
            shown = "a space" if joint == " " else repr(joint)
            return (
                f"tag {brief(name)} looks like {len(parts)} classes joined by {shown}; join tags by ';', "
                "or list the classes in classes.txt"
            )
    return ""
