"""Progress of a search: a live table on a terminal, a readable log elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ray import tune
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuning.options import Objective
from tuning.plain import clock, score_text, short
from tuning.record import TrialRow, best_trial, read_trials
from tuning.searcher import StudySearch
from tuning.study import STEP

# Off a terminal, a running trial is heard of at most so often.
EVERY_S = 30.0


@dataclass(slots=True)
class _Shown:
    """A running trial on the screen."""

    name: str
    seeds: int
    since: float = field(default_factory=time.monotonic)
    seed: int = 1
    step: int = 0
    score: float | None = None
    last: float = field(default_factory=time.monotonic)


class TrialProgress(tune.Callback):
    """Tune's callback that shows what happens.

    Args:
        objectives: Of the search.
        steps: Of a whole run.
        console: Where to show it.
        enabled: Whether to show anything.
        title: Of the live table.
        word: What a trial is called.
    """

    def __init__(
        self,
        objectives: tuple[Objective, ...],
        steps: int,
        console: Console,
        *,
        enabled: bool = True,
        title: str = "search",
        word: str = "trial",
    ) -> None:
        self.searcher: StudySearch | None = None
        self.objectives, self.steps, self.console, self.enabled = objectives, steps, console, enabled
        self.title, self.word = title, word
        self.running: dict[str, _Shown] = {}
        self.rows: list[TrialRow] = []
        self.began = time.monotonic()
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> TrialProgress:
        if self.enabled and self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of a terminal goes into Tune's snapshots."""
        return {}

    @property
    def objective(self) -> str:
        """The name of what ranks."""
        return self.objectives[0].name

    # -- what is shown -------------------------------------------------------------------------

    def render(self) -> Group:
        """The live table: a line of the whole, then a line for each running trial."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, justify in ((self.word, "right"), ("seed", "right"), ("step", "right"), ("", "left")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column(self.objective.replace("_", " "), justify="right")
        table.add_column("time", justify="right")
        for shown in list(self.running.values()):
            table.add_row(
                shown.name,
                f"{shown.seed}/{shown.seeds}",
                f"{shown.step}/{self.steps}",
                ProgressBar(total=self.steps, completed=shown.step, width=24),
                "" if shown.score is None else score_text(self.objective, shown.score),
                clock(time.monotonic() - shown.since),
            )
        return Group(Text(self.headline(), style="bold"), table)

    def headline(self) -> str:
        """How far the search is, in one line."""
        states = Counter(r.state for r in self.rows)
        ended = states["COMPLETE"] + states["PRUNED"] + states["FAIL"]
        words = [f"{self.title}: {ended} ended"]
        words += [f"{states[s]} {s.lower()}" for s in ("COMPLETE", "PRUNED", "FAIL") if states[s]]
        best = best_trial(self.rows, self.objectives[0])
        if best is not None and best.value is not None:
            words.append(f"best {score_text(self.objective, best.value)} ({self.word} {best.number})")
        words.append(clock(time.monotonic() - self.began))
        return " · ".join(words)

    # -- what happens ---------------------------------------------------------------------------

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has got its resources."""
        job = self.searcher.jobs.get(trial.trial_id) if self.searcher else None
        if job is None:
            return
        if self.searcher is not None and not self.rows:  # of a search that was resumed
            self.rows = read_trials(self.searcher.study, self.objectives)
        self.running[trial.trial_id] = _Shown(str(job.number), len(job.seeds))
        if not self.console.is_terminal:
            point = "  ".join(f"{p.rsplit('.', 1)[-1]} {short(v)}" for p, v in job.point.items())
            self._say(f"{self.word} {job.number} starts  {point}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has validated."""
        shown = self.running.get(trial.trial_id)
        job = self.searcher.jobs.get(trial.trial_id) if self.searcher else None
        if shown is None or job is None or "seed" not in result:
            return
        shown.seed = job.seeds.index(int(result["seed"])) + 1 if int(result["seed"]) in job.seeds else 1
        shown.step, shown.score = int(result.get(STEP, 0)), result.get(self.objective)
        if not self.console.is_terminal and time.monotonic() - shown.last >= EVERY_S and shown.score is not None:
            shown.last = time.monotonic()
            seed = f"  seed {shown.seed}/{shown.seeds}" if shown.seeds > 1 else ""
            score = score_text(self.objective, shown.score)
            self._say(f"{self.word} {shown.name}  step {shown.step}/{self.steps}{seed}  {self.objective} {score}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, by itself or stopped by the scheduler."""
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has lost its process too often."""
        self._ended(trial)

    def _ended(self, trial: Any) -> None:
        self.running.pop(trial.trial_id, None)
        if not self.enabled or self.searcher is None:
            return
        self.rows = read_trials(self.searcher.study, self.objectives)
        number = self.searcher.number(trial.trial_id)
        row = next((r for r in self.rows if r.number == number), None)
        if row is None or row.state == "WAITING":
            self._say(f"{self.word} {number}: its process died; it goes on from its checkpoint")
        else:
            self._say(line(row, best_trial(self.rows, self.objectives[0]), self.objective, self.word))

    def _say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def line(row: TrialRow, best: TrialRow | None, objective: str, word: str = "trial") -> str:
    """One trial that ended, in one line.

    >>> from tuning.record import Run
    >>> line(TrialRow(3, "PRUNED", (0.25,), (Run(0, 200),), seconds=12.3, note="by asha"), None, "seg_miou")
    'trial 3  PRUNED    step 200  seg_miou 25.0 %  12 s  by asha'
    """
    score = "" if row.value is None else f"  {objective} {score_text(objective, row.value)}"
    if len(row.runs) > 1:
        score += f" ± {score_text(objective, row.stderr)} ({len(row.runs)} seeds)"
    tail = f"  {row.error or row.note}" if row.error or row.note else ""
    if best is not None and row.number == best.number:
        tail += "  best so far"
    return f"{word} {row.number}  {row.state:8s}  step {row.step}{score}  {row.seconds:.0f} s{tail}"
