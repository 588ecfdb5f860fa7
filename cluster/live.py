"""What can be seen of a run on workers: the driver's display, and each worker's metrics for Prometheus.

On a terminal the display is live; elsewhere it is a line every few seconds. Ray prefixes the names of metrics
(``ray_ugrl_images_per_second``) and serves them from every node's metrics port.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from ray.util.metrics import Gauge
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ugrl.train.progress import LOSSES, bar_line, left_text, losses_text, scores_text, speed_text, tell

GAUGES = {
    "images_per_s": ("ugrl_images_per_second", "Training images a second, of all workers together."),
    "step_s": ("ugrl_step_seconds", "Mean seconds a training step."),
    "data_wait": ("ugrl_data_wait_share", "Share of the time spent waiting for the next batch, 0 to 1."),
    "device_memory_mb": ("ugrl_device_memory_mb", "Most memory that tensors took on the device, in 2**20 bytes."),
}


class RecordSource(Protocol):
    """Hands out new records; :mod:`cluster.channel` lists their kinds."""

    def records(self) -> list[dict[str, Any]]:
        """The records since the last call; never raises."""
        ...


class RunState:
    """What the records tell about a run.

    Attributes:
        steps: Steps of the whole run.
        step: Steps done.
        values: Values of the last training record.
        starts: How often workers have begun.
        world: Number of workers.
        nodes: Number of nodes with workers.
        saved: Step of the last checkpoint.
        score: The last validation, as text.
        began: Time and step of the last start.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self.values: Mapping[str, float] = {}
        self.starts, self.world, self.nodes = 0, 0, 0
        self.saved: int | None = None
        self.score = ""
        self.began: tuple[float, int] | None = None

    def take(self, record: Mapping[str, Any]) -> str | None:
        """Take in a record; returns the line to print for it, ``None`` for a training record."""
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
        """Numbers of workers and nodes, as text."""
        return f"{_count(self.world, 'worker')} on {_count(self.nodes, 'node')}"

    def left_s(self) -> float | None:
        """Seconds that remain at the pace since the last start, with all waits."""
        if self.began is None or self.step <= self.began[1]:
            return None
        return (time.monotonic() - self.began[0]) / (self.step - self.began[1]) * (self.steps - self.step)

    def line(self) -> str:
        """The last training record as a line."""
        words = [f"step {self.step}/{self.steps}", left_text(self.left_s()) if self.step < self.steps else ""]
        words += [speed_text(self.values), losses_text(self.values)]
        return "  ".join(w for w in words if w)

    def status(self) -> str:
        """Workers, last checkpoint and restarts, for the live display."""
        words = [self.workers()] if self.starts else ["waiting for the workers"]
        words += [] if self.saved is None else [f"checkpoint of step {self.saved}"]
        words += [_count(self.starts - 1, "restart")] if self.starts > 1 else []
        return " · ".join(words)


class Display:
    """Shows a :class:`RunState` on a console."""

    def __init__(self, state: RunState, console: Console, *, every_s: float = 10.0) -> None:
        self.state, self.console, self.every_s = state, console, every_s
        self.last_line = -every_s
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=4, transient=False)

    def render(self) -> Group:
        """The live display: progress bar, losses, speed, status and validation."""
        state, options = self.state, self.console.options
        bar = bar_line(
            options.max_width, state.step, state.steps, left_text(state.left_s()), ascii_only=options.ascii_only
        )
        score = f"validation  {state.score}" if state.score else ""
        rows = [losses_text(state.values), speed_text(state.values), state.status(), score]
        return Group(bar, *(Text(row, style="dim", overflow="ellipsis", no_wrap=True) for row in rows if row))

    def start(self) -> None:
        """Begin the live display, on a terminal."""
        if self.console.is_terminal:
            self.live.start()

    def stop(self) -> None:
        """End the live display; its last state stays on the terminal."""
        if self.console.is_terminal:
            self.live.stop()

    def show(self, record: Mapping[str, Any]) -> None:
        """Take in a record and print its line, if it is time for one."""
        text = self.state.take(record)
        if self.console.is_terminal:
            if text is None or record.get("kind") == "checkpoint":  # the live display has it
                return
        elif text is None:
            now = time.monotonic()
            if now - self.last_line < self.every_s and self.state.step < self.state.steps:
                return
            self.last_line, text = now, self.state.line()
        tell(self.console, text)


@contextmanager
def watch(
    source: RecordSource, steps: int, *, console: Console, enabled: bool = True, every_s: float = 0.5
) -> Iterator[None]:
    """Show a run while the block runs.

    Args:
        source: Hands out the records: a :class:`cluster.channel.DriverChannel`.
        steps: Steps of the whole run.
        console: Where to print.
        enabled: Whether to print. The records are taken in any case.
        every_s: Seconds between two looks.
    """
    ended = threading.Event()
    display = Display(RunState(steps), console)

    def follow() -> None:
        last = False
        while not last:
            last = ended.wait(every_s)
            for record in source.records():
                if enabled:
                    try:
                        display.show(record)
                    except (OSError, ValueError):  # a closed pipe or terminal: the run goes on unseen
                        continue

    thread = threading.Thread(target=follow, name="watch", daemon=True)
    if enabled:
        display.start()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)
        if enabled:
            display.stop()


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


class RayGauges:
    """Sets this worker's metrics in Ray; called with each training record.

    Args:
        run: The run's name, for the tag ``run``.
        rank: The worker's rank, for the tag ``rank``.
    """

    def __init__(self, run: str, rank: int) -> None:
        tags = {"run": run, "rank": str(rank)}

        def gauge(name: str, text: str, *more: str) -> Gauge:
            made = Gauge(name, description=text, tag_keys=(*tags, *more))
            made.set_default_tags(tags)
            return made

        self._gauges = {key: gauge(name, text) for key, (name, text) in GAUGES.items()}
        self._step = gauge("ugrl_step", "Training steps done.")
        self._loss = gauge("ugrl_loss", "Losses of the global batch, one series a term.", "term")

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Set the gauges to the number of steps done and to the values that have a gauge."""
        self._step.set(step)
        for key, gauge in self._gauges.items():
            if key in values:
                gauge.set(values[key])
        for term in LOSSES:
            if term in values:
                self._loss.set(values[term], tags={"term": term})
