"""Who is told how a run goes. The loop tells all observers; what they do with it is no business of the loop.

The observers of a run, in the order in which they are told: log files, TensorBoard, MLflow, the progress display, the
estimate of the time left, checkpoints, and the hooks of whoever started the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ugrl.distributed import is_main
from ugrl.eval.evaluate import EvalResult
from ugrl.eval.looks import Look
from ugrl.storage import Place
from ugrl.types import Batch


class Observer:
    """Told on every rank what happens. Each method does nothing by default; ``done`` counts the steps that are done."""

    draws = False
    """Whether it has a use for :meth:`on_pictures` and :meth:`on_looks`."""

    def on_batch(self, done: int, ids: Sequence[str]) -> None:
        """A step begins, the ``done``-th, with these images of this rank."""

    def on_log(self, done: int, values: Mapping[str, float]) -> None:
        """Every ``train.log_every`` steps: means of losses and statistics, and the speed."""

    def on_step(self, done: int) -> None:
        """A step has been taken."""

    def on_pictures(self, done: int, batch: Batch, views: Mapping[str, Tensor]) -> None:
        """Every ``train.picture_every`` steps, where an observer draws: a batch and what the step made of it."""

    def on_eval_batch(self, done: int, ids: Sequence[str], images: int, total: int) -> None:
        """During a validation: these images are through, so many of all."""

    def on_eval(self, done: int, result: EvalResult) -> None:
        """A validation has ended."""

    def on_looks(self, done: int, looks: Sequence[Look]) -> None:
        """After a validation, on rank 0 and where an observer draws: a few images of it, the same ones each time."""

    def on_step_end(self, done: int) -> None:
        """Everything that belongs to a step is done, a validation among it."""

    def on_checkpoint(self, done: int, where: Place | None, metrics: Mapping[str, float]) -> None:
        """What :attr:`Hooks.on_checkpoint` is told."""

    def leave(self, status: str) -> None:
        """The run has ended as ``FINISHED``, ``KILLED`` (asked to stop) or ``FAILED``; returns at once."""

    def close(self) -> None:
        """Wait, for a bounded time, until everything is written."""


def _told(name: str) -> Any:
    """A method that calls the one of that name of every observer in turn."""

    def tell(self: Observers, *args: Any) -> None:
        for observer in self.all:
            getattr(observer, name)(*args)

    return tell


class Observers(Observer):
    """Several observers as one: each is told in turn."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self.all = list(observers)
        self.draws = any(o.draws for o in self.all)

    on_batch, on_log, on_step, on_pictures = map(_told, ("on_batch", "on_log", "on_step", "on_pictures"))
    on_eval_batch, on_eval, on_step_end = map(_told, ("on_eval_batch", "on_eval", "on_step_end"))
    on_looks = _told("on_looks")
    on_checkpoint, leave, close = map(_told, ("on_checkpoint", "leave", "close"))


def nothing(*_: Any) -> None:
    """What a hook does that nobody set."""


def _never() -> bool:
    return False


@dataclass(slots=True)
class Hooks:
    """What whoever starts a run wants to be told, and may say. Called on every rank, but for ``on_event``.

    Attributes:
        on_eval: ``(steps done, metrics)`` after each validation.
        on_checkpoint: ``(steps done, place, metrics)`` at each step that has a checkpoint, and once at the end: the
            newest one that is whole by now and was not told before (rank 0, else ``None``), with its metrics. They are
            written in the background, so that it is usually the one before.
        on_log: ``(steps done, values)`` every ``train.log_every`` steps: losses, statistics, speed.
        on_event: One line on what happened besides; rank 0.
        stop: Asked after each step; ranks stop together if one of them is told to.
        before_write: Called on rank 0 before something is written to the run's folder; raises where it is another's.
    """

    on_eval: Callable[[int, dict[str, float]], None] = nothing
    on_checkpoint: Callable[[int, Place | None, dict[str, float]], None] = nothing
    on_log: Callable[[int, dict[str, float]], None] = nothing
    on_event: Callable[[str], None] = nothing
    stop: Callable[[], bool] = _never
    before_write: Callable[[], None] = nothing

    def check_write(self) -> None:
        """:attr:`before_write` on rank 0."""
        if is_main():
            self.before_write()


class HookObserver(Observer):
    """Passes on what the hooks want to know."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_log(self, done: int, values: Mapping[str, float]) -> None:
        """Losses, statistics, speed."""
        self.hooks.on_log(done, dict(values))

    def on_eval(self, done: int, result: EvalResult) -> None:
        """The metrics and their step."""
        self.hooks.on_eval(done, {**result.metrics, "step": float(done)})

    def on_checkpoint(self, done: int, where: Place | None, metrics: Mapping[str, float]) -> None:
        """The checkpoint that is whole by now."""
        self.hooks.on_checkpoint(done, where, dict(metrics))
