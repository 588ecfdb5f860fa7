"""A run that goes on elsewhere, shown where it was started: live on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ugrl.train.progress import bar_line, left_text, losses_text, scores_text, speed_text, tell


class Source(Protocol):
    """Whatever hands out new records (see :mod:`cluster.line` for their kinds)."""

    def records(self) -> list[dict[str, Any]]:
        """Those since the last call; never raises."""
        ...


class View:
    """What is known of a run, from its records.

    Attributes:
        step: Steps done.
        values: Those of the last training line.
        starts: How often workers have begun.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self.values: Mapping[str, float] = {}
        self.starts, self.world, self.nodes = 0, 0, 0
        self.saved: int | None = None
        self.score = ""
        self.began: tuple[float, int] | None = None

    def take(self, record: Mapping[str, Any]) -> str | None:
        """Note a record; returns the line it is worth, ``None`` for a training line."""
        kind = record.get("kind")
        if kind == "event":
            return str(record["text"])
        step = int(record.get("step", self.step))
        self.step = step if kind == "start" else max(self.step, step)
        if kind == "log":
            self.values = record["values"]
            return None
        if kind == "val":
            self.score = scores_text(record["metrics"])
            return f"step {step}  validation  {self.score}"
        if kind == "checkpoint":
            self.saved = step
            return f"step {step}  checkpoint  {record['place']}"
        if kind == "start":
            self.starts += 1
            self.world, self.nodes = int(record["world"]), int(record["nodes"])
            self.began = (time.monotonic(), step)
            word = "started" if self.starts == 1 else "restarted"
            from_ = f" from the checkpoint of step {step}" if step else ""
            return f"{word}{from_}: {self.workers()}"
        return None

    def workers(self) -> str:
        """How many workers on how many nodes."""
        return f"{_count(self.world, 'worker')} on {_count(self.nodes, 'node')}"

    def left_s(self) -> float | None:
        """Seconds to go at the pace since the last start, all waits included."""
        if self.began is None or self.step <= self.began[1]:
            return None
        return (time.monotonic() - self.began[0]) / (self.step - self.began[1]) * (self.steps - self.step)

    def line(self) -> str:
        """The last training line as plain text."""
        words = [f"step {self.step}/{self.steps}", left_text(self.left_s()) if self.step < self.steps else ""]
        words += [speed_text(self.values), losses_text(self.values)]
        return "  ".join(w for w in words if w)

    def state(self) -> str:
        """Workers, last checkpoint and restarts, for the live display."""
        words = [self.workers()] if self.starts else ["waiting for the workers"]
        words += [] if self.saved is None else [f"checkpoint of step {self.saved}"]
        words += [_count(self.starts - 1, "restart")] if self.starts > 1 else []
        return " · ".join(words)


class Screen:
    """Puts a :class:`View` on a console."""

    def __init__(self, view: View, console: Console, *, every_s: float = 10.0) -> None:
        self.view, self.console, self.every_s = view, console, every_s
        self.last_line = -every_s
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=4, transient=False)

    def render(self) -> Group:
        """The live display: the bar, losses, speed, state."""
        view, options = self.view, self.console.options
        bar = bar_line(
            options.max_width, view.step, view.steps, left_text(view.left_s()), ascii_only=options.ascii_only
        )
        score = f"validation  {view.score}" if view.score else ""
        rows = [losses_text(view.values), speed_text(view.values), view.state(), score]
        return Group(bar, *(Text(row, style="dim", overflow="ellipsis", no_wrap=True) for row in rows if row))

    def start(self) -> None:
        """Begin the live display, on a terminal."""
        if self.console.is_terminal:
            self.live.start()

    def stop(self) -> None:
        """End it; the last state stays."""
        if self.console.is_terminal:
            self.live.stop()

    def show(self, record: Mapping[str, Any]) -> None:
        """Take a record and print what is due."""
        text = self.view.take(record)
        if self.console.is_terminal:
            if text is None or record.get("kind") == "checkpoint":  # in the live rows
                return
        elif text is None:
            now = time.monotonic()
            if now - self.last_line < self.every_s and self.view.step < self.view.steps:
                return
            self.last_line, text = now, self.view.line()
        tell(self.console, text)


@contextmanager
def watch(
    source: Source, steps: int, *, console: Console, enabled: bool = True, every_s: float = 0.5
) -> Iterator[None]:
    """Show a run while the block runs.

    Args:
        source: Where records come from: a :class:`cluster.line.Line`.
        steps: Of the whole run.
        console: Where to print.
        enabled: Whether to print at all; the records are taken in any case.
        every_s: Seconds between two looks.
    """
    ended = threading.Event()
    screen = Screen(View(steps), console)

    def follow() -> None:
        last = False
        while not last:
            last = ended.wait(every_s)
            for record in source.records():
                if enabled:
                    try:
                        screen.show(record)
                    except (OSError, ValueError):  # a closed pipe or terminal: the run goes on unseen
                        continue

    thread = threading.Thread(target=follow, name="watch", daemon=True)
    if enabled:
        screen.start()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)
        if enabled:
            screen.stop()


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
