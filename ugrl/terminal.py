"""The one kind of console that the project prints to."""

from __future__ import annotations

import re
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from ugrl.text import line

# All but the line break and the tab; marks that turn the direction of what follows are among them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Terminal(Console):
    """A console on which text is text: it holds no markup, no emoji codes, and no codes of the terminal.

    Class names, folder names and a library's messages come from outside; styles are given by argument. Tables, titles
    and headings come through here as well; for a cell or a bar's text made elsewhere there is
    :func:`ugrl.text.plain`.
    """

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None, **more: Any) -> None:
        super().__init__(stderr=stderr, file=file, markup=False, emoji=False, highlight=False, **more)

    def render_str(self, text: str, **more: Any) -> Text:
        """Every string on its way to the screen."""
        more.update(markup=False, emoji=False, highlight=False)
        return super().render_str(_CONTROL.sub(lambda found: line(found[0]) or " ", text), **more)

    def on_broken_pipe(self) -> None:
        """The reader went away: left to the top of the command, where Rich would end the process."""
        raise BrokenPipeError
