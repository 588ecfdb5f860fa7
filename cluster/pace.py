"""How often Ray Data's scheduling thread looks. A module of its own: every reading task imports it."""

from __future__ import annotations

import time

# What DataContext.custom_execution_callback_classes holds; it has no public name.
from ray.data._internal.execution.execution_callback import ExecutionCallback


class Pace(ExecutionCallback):
    """Lets Ray Data's scheduling thread rest.

    While the stream is as far ahead as it may be and no task runs, that thread asks again and again whether anything
    has changed: most of a core, taken from the training that everybody waits for.
    """

    PAUSE_S = 0.05

    def __init__(self) -> None:
        self.ended = 0.0

    def on_execution_step(self, executor: object) -> None:
        """Called after each look at the tasks."""
        if time.perf_counter() - self.ended < self.PAUSE_S:  # one that waited for a task took longer
            time.sleep(self.PAUSE_S)
        self.ended = time.perf_counter()
