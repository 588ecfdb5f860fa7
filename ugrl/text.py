"""Text that came from outside, on its way to a terminal, a page or a table.

A class name, a folder's name or a library's message may hold markup, escape codes and line breaks. Each medium has
its own rule here, and everything that prints goes through one of them.
"""

from __future__ import annotations

import difflib
import html as _html
import re
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

_SPACE = re.compile(r"\s+")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~>-])")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?%?")


def line(value: object, most: int = 200) -> str:
    r"""Any text as one printable line: control characters as escapes, white space as single spaces.

    Args:
        value: Text, or what ``str`` makes text of.
        most: Characters; the middle of a longer text is left out, since both ends say what it is.

    >>> line("a\n\x1b[31mb\t[/b]")
    'a \\x1b[31mb [/b]'
    >>> line("0123456789", most=7)
    '012…789'
    """
    text = _SPACE.sub(" ", str(value)).strip()
    if not text.isprintable():
        text = "".join(c if c.isprintable() else _escaped(c) for c in text)
    if len(text) > most:
        half = (most - 1) // 2
        text = text[:half] + "…" + text[len(text) - half :]
    return text


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 60, 60, 40
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 4

    def repr_int(self, x: int, level: int) -> str:
        # The text of an endless number takes time that grows with its square, and may be refused.
        return repr(x) if x.bit_length() < 130 else f"a number of about {x.bit_length() * 3 // 10} digits"


def brief(value: object, most: int = 80) -> str:
    """A bounded ``repr`` of any tree, one printable line: it never walks through all of a large or recursive value.

    >>> brief([[1, 2, 3, 4, 5, 6], "x"])
    "[[1, 2, 3, 4, ...], 'x']"
    """
    return line(_Brief().repr(value), most)


MOST_NAMED = 24


def nearest(word: str, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest option, else the list of options.

    >>> nearest("trian", ["train", "model"]), nearest("x", ["train", "model"])
    ("; did you mean 'train'?", '; expected one of train, model')
    """
    options = [line(option, 60) for option in options]
    close = difflib.get_close_matches(word[:100], options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; expected one of {', '.join(options[:MOST_NAMED])}{', …' if len(options) > MOST_NAMED else ''}"


def plain(value: object, style: str = "") -> Text:
    """Text for a terminal in which no markup and no emoji code is read."""
    from rich.text import Text

    return Text(line(value, most=1000), style=style)


def html(value: object) -> str:
    """Text for HTML, in an element or an attribute."""
    return _html.escape("".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in str(value)))


def markdown(value: object) -> str:
    r"""Text for one line of Markdown, a table's cell among them.

    >>> markdown("a|b [x](y) <b>")
    'a\\|b \\[x\\]\\(y\\) &lt;b\\>'
    """
    return _MARKDOWN.sub(r"\\\1", line(value, most=10_000).replace("&", "&amp;").replace("<", "&lt;"))


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula; numbers stay numbers.

    >>> csv_cell("=cmd()"), csv_cell("-1.5e3"), csv_cell(-2)
    ("'=cmd()", '-1.5e3', -2)
    """
    if isinstance(value, str) and value[:1] in "=+-@\t\r" and value[:1] and not _NUMBER.fullmatch(value):
        return "'" + value
    return value
