"""A progress bar on a terminal, a few plain lines elsewhere; both on stderr."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from ugrl.terminal import Terminal

LINE_SECONDS = 30.0


class Progress:
    """Counts up to a total.

    Args:
        total: Count at which the work is done.
        what: Counted things, plural.
        enabled: Whether anything is shown.
        stream: Where, stderr by default.
    """

    def __init__(self, *, total: int, what: str, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._total, self._what = total, what
        self._stream = stream or sys.stderr
        self._enabled = enabled
        self._count = 0
        self._next = time.monotonic() + LINE_SECONDS
        self._bar: RichProgress | None = None
        if enabled and self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Terminal(file=self._stream),
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file is no line of the display
            )
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self._enabled:
            self._line()

    def advance(self, n: int) -> None:
        """Count n more."""
        self._count += n
        if self._bar:
            self._bar.advance(self._task, n)
        elif self._enabled and time.monotonic() >= self._next:
            self._line()

    def _line(self) -> None:
        share = 100 * self._count // max(1, self._total)
        print(f"{self._count}/{self._total} {self._what} ({share} %)", file=self._stream, flush=True)
        self._next = time.monotonic() + LINE_SECONDS
