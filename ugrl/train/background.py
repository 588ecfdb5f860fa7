"""Writing in the background, so that no training step waits for a disk or a server."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from ugrl.secrets import masked
from ugrl.text import line

Item = TypeVar("Item")
Taken = TypeVar("Taken", contravariant=True)
Say = Callable[[str], None]

# Kept while a disk is full or a server away; beyond that the oldest are dropped.
MOST = 20_000
EVERY_S = 2.0
LONGEST_PAUSE_S = 60.0
CLOSE_S = 15.0


class Writer(Protocol[Taken]):
    """Writes items to where they end up. Used by one thread; whatever it raises is taken for a passing trouble."""

    def write(self, items: Sequence[Taken]) -> None:
        """Write all of them, or raise and be given them again."""
        ...

    def close(self, status: str) -> None:
        """The end of the run: ``FINISHED``, ``KILLED`` or ``FAILED``."""
        ...


class BackgroundWriter(Generic[Item]):
    """A queue, and the thread that hands its items to a writer.

    A writer that fails is tried again with growing pauses; the user reads of it once, and once more when it works
    again or when something was lost. Training never hears of it.

    Args:
        name: For messages: where the items go.
        writer: Writer that takes the items.
        say: Told in one line what the user should know; by default it goes to stderr.
    """

    def __init__(self, name: str, writer: Writer[Item], say: Say | None = None, *, every_s: float = EVERY_S) -> None:
        self.name, self.writer, self.say, self.every_s = name, writer, say or _to_stderr, every_s
        self._items: deque[Item] = deque()
        self._sending: list[Item] = []
        self._lock, self._leave, self._lost = threading.Lock(), threading.Event(), 0
        self._status = "FINISHED"
        self._thread = threading.Thread(target=self._run, name=f"writer-{name}", daemon=True)
        self._thread.start()

    def put(self, items: Sequence[Item]) -> None:
        """Leave items to be written; returns at once."""
        with self._lock:
            self._items.extend(items)
            self._make_room()

    def leave(self, status: str) -> None:
        """Have what is left written, and the writer closed; returns at once."""
        self._status = status
        self._leave.set()

    def close(self, status: str | None = None, *, patience_s: float = CLOSE_S) -> None:
        """:meth:`leave`, by default with the status that was given before, and wait.

        After ``patience_s``, what was not written is given up.
        """
        self.leave(status or self._status)
        self._thread.join(timeout=patience_s)
        with self._lock:
            lost = self._lost + len(self._sending) + len(self._items)
        if lost:
            self.say(f"{self.name}: {lost} points were not written")

    def _run(self) -> None:
        troubled, pause, last = False, self.every_s, False
        while not last:
            last = self._leave.wait(pause)
            with self._lock:
                self._sending = list(self._items)
                self._items.clear()
            try:
                if self._sending:
                    self.writer.write(self._sending)
                    if troubled:
                        self.say(f"{self.name}: works again")
                    troubled, pause = False, self.every_s
                with self._lock:
                    self._sending = []
                if last:
                    self.writer.close(self._status)
            except Exception as error:  # whatever a disk, a database or a server may come up with
                if not troubled:
                    self.say(f"{self.name}: {_first_line(error)}; training goes on, and this is tried again")
                troubled, pause = True, min(LONGEST_PAUSE_S, 2 * pause)
                with self._lock:
                    self._items.extendleft(reversed(self._sending))
                    self._sending = []
                    self._make_room()

    def _make_room(self) -> None:
        while len(self._items) > MOST:
            self._items.popleft()
            self._lost += 1


def _first_line(error: Exception) -> str:
    text = masked(str(error).strip())
    return f"{type(error).__name__}: {line(text.splitlines()[0])}" if text else type(error).__name__


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
