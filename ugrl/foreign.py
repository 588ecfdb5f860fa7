"""The one layer between foreign bytes and the program.

Whatever somebody else wrote (images, tables, lists, JSON, XML, YAML, and the program's own files, which may have been
damaged or edited) is read, parsed, typed and bounded here before anything uses it. A file that cannot be used is one
line that names the file, the place in it, what was found and what is expected.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import yaml

from ugrl.errors import ConfigError, DataError, UgrlError
from ugrl.text import brief, line

Refusal = type[UgrlError]

MB = 1 << 20
MOST_BYTES = 512 * MB  # of any one file, unless its reader says otherwise
MOST_TEXT = 64 * MB
MOST_YAML = 2 * MB
MOST_XML = 8 * MB
YAML_DEPTH, YAML_NODES = 40, 200_000
XML_DEPTH = 40
DIGITS = 40


# -- files -----------------------------------------------------------------------------------------


def read_bytes(path: Path | str, what: str = "file", *, most: int = MOST_BYTES, error: Refusal = DataError) -> bytes:
    """The contents of a regular file.

    A pipe, a device or a link to nowhere is refused and never opened for waiting.

    Args:
        path: The file to read.
        what: It is, for the message ("image", "mask", "table").
        most: Largest size that is read, in bytes.
        error: Class of the exception that refuses it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as found:
        raise error(f"{line(path)}: {_no_file(path, what, found)}") from None
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise error(f"{line(path)}: {_kind(state.st_mode)}; expected a regular file ({what})")
        if state.st_size > most:
            raise error(f"{line(path)}: {state.st_size / MB:.0f} MB; expected at most {most / MB:.0f} MB of a {what}")
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(most + 1)
    except OSError as found:
        raise error(f"{line(path)}: cannot be read: {found.strerror or line(found)}") from None
    finally:
        os.close(handle)
    if len(data) > most:  # a file of /proc has no size, one that grows has another
        raise error(f"{line(path)}: more than {most / MB:.0f} MB; expected less of a {what}")
    return data


def _no_file(path: Path | str, what: str, found: OSError | ValueError) -> str:
    if isinstance(found, OSError):
        if found.errno == errno.ENOENT:
            return f"missing {what}" + (" (a link to nowhere)" if os.path.islink(path) else "")
        if found.errno == errno.ENXIO:
            return f"a pipe or a socket; expected a regular file ({what})"
        return f"cannot be read: {found.strerror}"
    return "no usable name of a file"


def _kind(mode: int) -> str:
    names = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in names if test(mode)), "a device")


def under(root: Path, name: str, where: str, *, error: Refusal = DataError) -> Path:
    r"""The file below a folder that a name in foreign data stands for.

    The name may not lead out of the folder. A link below it that somebody set is followed: it is not the data's word.

    Args:
        root: The folder that the name belongs to.
        name: With ``/`` between its parts; Windows' ``\`` is read as one.
        where: Of the name, for the message.
        error: Class of the exception that refuses it.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name.strip() or "\0" in name or len(name) > 4000:
        raise error(f"{where}: file name {brief(name)}; expected one below {line(root)}")
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:/", str(parts)):
        raise error(f"{where}: file name {brief(name)} leads out of {line(root)}; expected one below it")
    return root / parts


# -- text ------------------------------------------------------------------------------------------


def decode_text(data: bytes, where: str, *, error: Refusal = DataError) -> str:
    """Bytes as text: UTF-8, with or without a byte-order mark, or UTF-16 with one."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as found:
        at = data[: found.start].count(b"\n") + 1
        wrong = f"byte 0x{data[found.start]:02x} is not {encoding.removesuffix('-sig').upper()}"
        raise error(f"{where}: line {at}: {wrong}; save the file as UTF-8") from None
    if "\0" in text:
        at = text[: text.index("\0")].count("\n") + 1
        raise error(f"{where}: line {at}: a zero byte; expected text in UTF-8")
    return text


def read_text(path: Path | str, what: str = "file", *, most: int = MOST_TEXT, error: Refusal = DataError) -> str:
    """A text file, see :func:`read_bytes` and :func:`decode_text`."""
    return decode_text(read_bytes(path, what, most=most, error=error), line(path), error=error)


# -- JSON ------------------------------------------------------------------------------------------


def parse_json(
    data: bytes | str,
    where: str,
    *,
    error: Refusal = DataError,
    hook: Callable[[dict[str, Any]], Any] | None = None,
    nan: bool = False,
) -> Any:
    """A JSON tree in which no key occurs twice.

    Args:
        data: Bytes are decoded by :func:`decode_text`.
        where: Name of the file, with which the message begins.
        error: Class of the exception that refuses it.
        hook: Makes what stands for each object, as soon as it is read.
        nan: Whether ``NaN`` and ``Infinity`` are taken, which JSON does not know; by default they are refused.
    """

    def pairs(found: list[tuple[str, Any]]) -> Any:
        tree = dict(found)
        if len(tree) != len(found):
            keys = [key for key, _ in found]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise error(f"{where}: key {brief(twice)} occurs twice in one object")
        return tree if hook is None else hook(tree)

    def constant(name: str) -> float:
        if not nan:
            raise error(f"{where}: {name} is no number of JSON")
        return float(name)

    text = data if isinstance(data, str) else decode_text(data, where, error=error)
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as found:
        raise error(f"{where}: broken JSON at line {found.lineno}, column {found.colno}: {found.msg}") from None
    except RecursionError:
        raise error(f"{where}: JSON nested too deep") from None
    except ValueError:  # Python's limit of digits
        raise error(f"{where}: a number with too many digits") from None


def read_json(
    path: Path | str,
    what: str = "file",
    *,
    most: int = MOST_TEXT,
    error: Refusal = DataError,
    hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """A JSON file, see :func:`read_bytes` and :func:`parse_json`."""
    return parse_json(read_bytes(path, what, most=most, error=error), line(path), error=error, hook=hook)


# -- YAML ------------------------------------------------------------------------------------------


class _Core(yaml.SafeLoader):
    """YAML 1.2's core schema: ``on``, ``off``, ``yes`` and ``no`` are words, ``1e-3`` is a number, ``010`` is ten.

    ruamel.yaml reads 1.2 as well, but takes more than its core schema (``1_000`` and ``0b11`` as numbers, dates, merge
    keys), and an alias of itself, infinite numbers and keys that are lists, so that all of these would be refused here.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | type(None)):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key that is a list or a mapping", node.start_mark
                )
            if key in made:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {brief(key)} occurs twice", key_node.start_mark
                )
            made[key] = self.construct_object(value_node, deep=deep)
        return made

    def _int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number with too many digits", node.start_mark)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def _float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node)).lower()
        if text.lstrip("+-") in (".inf", ".nan"):
            return float(text.replace(".", ""))
        value = float(text)
        if math.isinf(value):
            raise yaml.constructor.ConstructorError(
                None, None, f"number {brief(text)} is out of range", node.start_mark
            )
        return value

    def _bool(self, node: yaml.ScalarNode) -> bool:
        return str(self.construct_scalar(node)).lower() == "true"


_Core.add_constructor("tag:yaml.org,2002:int", _Core._int)
_Core.add_constructor("tag:yaml.org,2002:float", _Core._float)
_Core.add_constructor("tag:yaml.org,2002:bool", _Core._bool)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _Core.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str, where: str, *, error: Refusal = ConfigError) -> Any:
    """A YAML document by the rules of version 1.2, bounded, in which no key occurs twice.

    Aliases are taken as long as what they stand for, written out, stays small.
    """
    if len(text) > MOST_YAML:
        raise error(f"{where}: {len(text) / MB:.1f} MB of YAML; expected at most {MOST_YAML / MB:.0f} MB")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Core):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > YAML_DEPTH:
                at = event.start_mark.line + 1 if event.start_mark else 1
                raise error(f"{where}: line {at}: YAML nested deeper than {YAML_DEPTH} levels")
        loader = _Core(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _written_out(node, {}, set()) > YAML_NODES:
                raise error(f"{where}: aliases that stand for more than {YAML_NODES} values; write them out")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as found:
        mark = getattr(found, "problem_mark", None) or getattr(found, "context_mark", None)
        spot = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        why = getattr(found, "problem", None) or getattr(found, "reason", None) or found
        raise error(f"{where}:{spot} not valid YAML: {line(why)}") from None
    except RecursionError:
        raise error(f"{where}: YAML nested too deep") from None
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError) as found:  # of a tag such as !!timestamp
        raise error(f"{where}: not valid YAML: {line(found)}") from None


def _written_out(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values that a node stands for with its aliases written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.constructor.ConstructorError(None, None, "an alias of what it stands in", node.start_mark)
    if id(node) not in known:
        above.add(id(node))
        children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_written_out(child, known, above) for child in children)
        above.discard(id(node))
    return known[id(node)]


# -- XML -------------------------------------------------------------------------------------------


class _Bounded(ElementTree.TreeBuilder):
    depth = 0

    def start(self, tag: Any, attrs: Any) -> Any:
        self.depth += 1
        if self.depth > XML_DEPTH:
            raise ValueError(f"nested deeper than {XML_DEPTH} levels")
        return super().start(tag, attrs)

    def end(self, tag: Any) -> Any:
        self.depth -= 1
        return super().end(tag)

    def doctype(self, name: Any, pubid: Any, system: Any) -> None:
        raise ValueError("a document type, which may define entities; expected none")


def parse_xml(data: bytes, where: str, *, error: Refusal = DataError) -> ElementTree.Element:
    """The root of an XML document, bounded, without a document type and thus without entities of its own."""
    if len(data) > MOST_XML:
        raise error(f"{where}: {len(data) / MB:.0f} MB of XML; expected at most {MOST_XML / MB:.0f} MB")
    parser = ElementTree.XMLParser(target=_Bounded())
    try:
        parser.feed(data)
        found: ElementTree.Element = parser.close()
    except (ElementTree.ParseError, expat.ExpatError, ValueError, LookupError, UnicodeError) as problem:
        raise error(f"{where}: broken XML: {line(problem)}") from None
    return found


# -- types -----------------------------------------------------------------------------------------


def field(tree: Any, key: str, where: str, *, error: Refusal = DataError) -> Any:
    """The value of a key that must be there."""
    found = as_dict(tree, where, error=error)
    if key not in found:
        have = ", ".join(brief(k, 30) for k in list(found)[:6]) or "none"
        raise error(f"{where}: no key '{key}' among {have}")
    return found[key]


def as_dict(value: Any, where: str, *, error: Refusal = DataError) -> dict[str, Any]:
    """A mapping."""
    if not isinstance(value, dict):
        raise error(f"{where}: {brief(value)}; expected keys and values")
    return value


def as_list(value: Any, where: str, *, most: int = 100_000_000, error: Refusal = DataError) -> list[Any]:
    """A list of a bounded length."""
    if not isinstance(value, list):
        raise error(f"{where}: {brief(value)}; expected a list")
    if len(value) > most:
        raise error(f"{where}: a list of {len(value)}; expected at most {most}")
    return value


def as_str(value: Any, where: str, *, most: int = 10_000, error: Refusal = DataError) -> str:
    """A text of a bounded length."""
    if not isinstance(value, str) or len(value) > most:
        raise error(f"{where}: {brief(value)}; expected a text of at most {most} characters")
    return value


def as_int(
    value: Any,
    where: str,
    *,
    least: int | None = None,
    most: int | None = None,
    text: bool = False,
    error: Refusal = DataError,
) -> int:
    """A whole number within bounds; ``text`` also takes one that is written as text, as ids often are.

    >>> as_int(3.0, "x"), as_int("12", "x", text=True)
    (3, 12)
    """
    found: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        found = int(value)
    elif text and isinstance(value, str) and re.fullmatch(rf"\s*[-+]?[0-9]{{1,{DIGITS}}}\s*", value, re.ASCII):
        found = int(value)
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        raise error(f"{where}: {brief(value)}; expected a whole number{_range(least, most)}")
    return found


def as_number(
    value: Any,
    where: str,
    *,
    least: float | None = None,
    most: float | None = None,
    error: Refusal = DataError,
) -> float:
    """A finite number within bounds."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1.7e308
    if not usable or (least is not None and value < least) or (most is not None and value > most):
        raise error(f"{where}: {brief(value)}; expected a finite number{_range(least, most)}")
    return float(value)


def _range(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    return f" ≥ {least:g}" if least is not None else f" ≤ {most:g}" if most is not None else ""
