"""Progress of a search: a bar for each running trial on a terminal, a line for each that ended."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from ray import tune
from rich import progress as bars
from rich.console import Console

from tuning.report import TrialRow, best_trial, read_trials
from tuning.study import STEP, StudySearch


class TrialProgress(tune.Callback):
    """Tune's callback that shows what happens.

    Args:
        objective: Key of the score.
        steps: Of a whole trial.
        console: Where to show it.
        enabled: Whether to show anything.
    """

    def __init__(self, objective: str, steps: int, console: Console, *, enabled: bool = True) -> None:
        self.searcher: StudySearch | None = None
        self.objective, self.steps, self.console, self.enabled = objective, steps, console, enabled
        self.tasks: dict[str, bars.TaskID] = {}
        self.bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
        )

    def __enter__(self) -> TrialProgress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.bar.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of a terminal goes into Tune's snapshots."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has got its resources."""
        number = self._number(trial)
        self.tasks[trial.trial_id] = self.bar.add_task(f"trial {number}", total=self.steps, note="starts")
        if self.enabled and not self.console.is_terminal:
            self.console.print(f"trial {number} starts", highlight=False)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has validated."""
        task = self.tasks.get(trial.trial_id)
        if task is not None:
            note = f"{self.objective} {float(result.get(self.objective, float('nan'))):.4f}"
            self.bar.update(task, completed=int(result.get(STEP, 0)), note=note)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, by itself or stopped by the scheduler."""
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed."""
        self._ended(trial)

    def _number(self, trial: Any) -> int | str:
        number = self.searcher.number(trial.trial_id) if self.searcher else None
        return trial.trial_id if number is None else number

    def _ended(self, trial: Any) -> None:
        task = self.tasks.pop(trial.trial_id, None)
        if task is not None:
            self.bar.remove_task(task)
        if not self.enabled or self.searcher is None:
            return
        rows = read_trials(self.searcher.study)
        row = next((r for r in rows if r.number == self._number(trial)), None)
        if row is not None:
            self.console.print(
                line(row, best_trial(rows), self.objective), highlight=False, soft_wrap=True, markup=False
            )


def line(row: TrialRow, best: TrialRow | None, objective: str) -> str:
    """One trial that ended, in one line.

    >>> line(TrialRow(3, "PRUNED", 200, 0.25, seconds=12.3), None, "seg_miou")
    'trial 3  PRUNED    step 200  seg_miou 0.2500  12 s'
    """
    score = "" if row.value is None else f"  {objective} {row.value:.4f}"
    tail = f"  {row.error}" if row.error else ""
    if best is not None and row.number == best.number:
        tail += "  best so far"
    return f"trial {row.number}  {row.state:8s}  step {row.step}{score}  {row.seconds:.0f} s{tail}"
