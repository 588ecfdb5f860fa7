"""Progress of a run: a live bar on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich import progress as bars
from rich.console import Console
from rich.table import Table

from ugrl.eval.evaluate import EvalResult

LOSSES = ("total", "cls", "seg", "ucl", "aux")


def losses_text(values: Mapping[str, float]) -> str:
    """The losses among a training line's values.

    >>> losses_text({"total": 1.5, "cls": 0.25, "lr": 1e-4})
    'total 1.5000  cls 0.2500'
    """
    return "  ".join(f"{k} {values[k]:.4f}" for k in LOSSES if k in values)


def speed_text(values: Mapping[str, float]) -> str:
    """Pace, step time, share of it spent waiting for data, memory: those that are known.

    >>> speed_text({"images_per_s": 81.25, "step_s": 0.0985, "data_wait": 0.034, "device_memory_mb": 10444.0})
    '81.2 img/s  98 ms/step  3% data wait  10.4 GB'
    """
    words = [f"{values['images_per_s']:.1f} img/s"] if "images_per_s" in values else []
    if "step_s" in values:
        s = values["step_s"]
        words.append(f"{s:.2f} s/step" if s >= 1 else f"{1000 * s:.0f} ms/step")
    if "data_wait" in values:
        words.append(f"{100 * values['data_wait']:.0f}% data wait")
    if "device_memory_mb" in values:
        mb = values["device_memory_mb"]
        words.append(f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB")
    return "  ".join(words)


class Progress:
    """Shows steps, losses, images/s and time left; a line at most every few seconds off a terminal."""

    def __init__(self, console: Console, total: int, done: int, *, enabled: bool, every_s: float = 10.0) -> None:
        self.console, self.total, self.enabled, self.every_s = console, total, enabled, every_s
        self.live = enabled and console.is_terminal
        self.started, self.first, self.last_line = time.monotonic(), done, 0.0
        self.bar = bars.Progress(
            bars.TextColumn("train"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.live:
            self.bar.stop()

    def advance(self, done: int) -> None:
        """Steps done so far."""
        if self.live:
            self.bar.update(self.task, completed=done)

    def losses(self, done: int, values: dict[str, float]) -> None:
        """Means since the last call."""
        if not self.enabled:
            return
        note = "  ".join(text for text in (losses_text(values), speed_text(values)) if text)
        if self.live:
            self.bar.update(self.task, note=note)
            return
        now = time.monotonic()
        if now - self.last_line >= self.every_s or done == self.total:
            self.last_line = now
            left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            self.console.print(f"step {done}/{self.total}  {note}  left {left:.0f} s", highlight=False, soft_wrap=True)

    def evaluated(self, done: int, result: EvalResult, objective: str) -> None:
        """One line a validation; the whole table at the end."""
        if not self.enabled:
            return
        text = "  ".join(f"{k} {v:.4f}" for k, v in result.metrics.items())
        self.console.print(
            f"step {done}  validation on {result.images} images  {text}", highlight=False, soft_wrap=True
        )
        if done == self.total:
            self.console.print(result_table(result))


def result_table(result: EvalResult) -> Table:
    """Per-class values and the means, in percent."""
    table = Table(title=f"{result.images} images (percent)")
    table.add_column("class")
    groups = list(result.classes)
    for group in groups:
        table.add_column(group.replace("_", " "), justify="right")
    for name in dict.fromkeys(c for g in groups for c in result.classes[g]):
        values = [result.classes[g].get(name) for g in groups]
        table.add_row(name, *("-" if v is None or v != v else f"{100 * v:.1f}" for v in values))
    if groups:
        table.add_section()
    for name, value in result.metrics.items():
        table.add_row(name, f"{100 * value:.1f}", *[""] * (len(groups) - 1)) if groups else None
    if not groups:
        table.add_column("value", justify="right")
        for name, value in result.metrics.items():
            table.add_row(name, f"{100 * value:.1f}")
    return table
