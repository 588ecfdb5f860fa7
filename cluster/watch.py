"""Progress of a run that goes on elsewhere, read from the ``metrics.jsonl`` that its rank 0 writes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

LOSSES = ("total", "cls", "seg", "ucl", "aux")


class Tail:
    """Reads whole new lines of a file that another process appends to, or rewrites shorter."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0

    def lines(self) -> Iterator[dict[str, float]]:
        """Records since the last call."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return
        if len(data) < self.at:  # a restarted run dropped the lines it will write again
            self.at = 0
        end = data.rfind(b"\n") + 1
        for line in data[self.at : end].splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
        self.at = max(self.at, end)


@contextmanager
def watch(out: Path, steps: int, *, console: Console, enabled: bool = True, every_s: float = 1.0) -> Iterator[None]:
    """Print a run's progress while the block runs.

    Args:
        out: The run's folder.
        steps: Of the whole run.
        console: Where to print.
        enabled: Whether to print at all.
        every_s: Seconds between two looks at the file.
    """
    stop = threading.Event()

    def follow() -> None:
        tail, shown, last_line = Tail(out / "metrics.jsonl"), -1, 0.0
        list(tail.lines())
        while True:
            ended = stop.wait(every_s)
            for record in tail.lines():
                step = int(record.get("step", 0))
                scores = {k.removeprefix("val/"): v for k, v in record.items() if k.startswith("val/")}
                if step < shown:
                    console.print(f"step {step}: restarted from a checkpoint", highlight=False)
                    shown = step
                if scores:
                    text = "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
                    console.print(f"step {step}  validation  {text}", highlight=False, soft_wrap=True)
                elif time.monotonic() - last_line >= 10 or step == steps:
                    last_line = time.monotonic()
                    text = "  ".join(f"{k} {record[k]:.4f}" for k in LOSSES if k in record)
                    speed = f"  {record['images_per_s']:.1f} img/s" if "images_per_s" in record else ""
                    console.print(f"step {step}/{steps}  {text}{speed}", highlight=False, soft_wrap=True)
                shown = max(shown, step)
            if ended:
                return

    thread = threading.Thread(target=follow, name="watch", daemon=True)
    if enabled:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if enabled:
            thread.join(timeout=5)
