"""Progress of a search: a live table on a terminal, a readable log elsewhere."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuning.formatting import clock, score_text, short, span
from tuning.ledger.ledger import Ledger
from tuning.space.options import Objective
from tuning.study.record import STEP, TrialRow, best_trial, read_trials

# Off a terminal, the search is heard of at least so often; the trials' logs are looked at so often.
EVERY_S, LOOK_S = 30.0, 2.0
ENDED = ("COMPLETE", "PRUNED", "FAIL")
# Widest bar of a trial, and what the other columns take.
BAR, OTHERS = 24, 56


@dataclass(slots=True)
class _Shown:
    """A running trial on the screen."""

    name: str
    seeds: tuple[int, ...]
    folder: Path
    since: float = field(default_factory=time.monotonic)
    seed: int = 0  # which of them
    step: int = 0
    score: float | None = None

    def look(self) -> None:
        """Where it is by the log of its run, between two validations."""
        for k in range(len(self.seeds) - 1, self.seed - 1, -1):
            if step := logged_step(self.folder / f"seed_{self.seeds[k]}" / "metrics.jsonl"):
                self.step = step if k > self.seed else max(step, self.step)
                self.seed = k
                return

    def done(self, steps: int) -> int:
        """Steps of all its seeds so far."""
        return self.seed * steps + self.step


class TrialProgress:
    """An observer of the trials (:class:`tuning.run.tune_adapter.Observer`) that shows what happens.

    Args:
        objectives: What is optimised; the first one is shown.
        steps: Steps of a whole run.
        console: Where to show it.
        enabled: Whether to show anything.
        title: Title of the live table.
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
        self.ledger: Ledger | None = None
        self.objectives, self.steps, self.console, self.enabled = objectives, steps, console, enabled
        self.title, self.word = title, word
        self.running: dict[str, _Shown] = {}
        self.rows: list[TrialRow] = []
        self.began = self.said = self.looked = time.monotonic()
        self.planned = 0  # trials; all of them are in the storage from the beginning
        self.before = 0  # steps of the trials that ran before this session
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> TrialProgress:
        if self.enabled and self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.live.stop()

    @property
    def objective(self) -> str:
        """The name of what ranks."""
        return self.objectives[0].name

    # -- what is shown -------------------------------------------------------------------------

    def render(self) -> Group:
        """The live table: a line of the whole, then a line for each running trial."""
        self.look()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        score = self.objective.replace("_", " ")
        for name, justify in ((self.word, "right"), ("seed", "right"), ("step", "right"), ("", "left")):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column(score, justify="right", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        for shown in list(self.running.values()):
            table.add_row(
                shown.name,
                f"{shown.seed + 1}/{len(shown.seeds)}",
                f"{shown.step}/{self.steps}",
                ProgressBar(
                    total=self.steps, completed=shown.step, width=max(4, min(BAR, self.console.width - OTHERS))
                ),
                "" if shown.score is None else score_text(self.objective, shown.score),
                clock(time.monotonic() - shown.since),
            )
        return Group(Text(self.headline(), style="bold", no_wrap=True, overflow="ellipsis"), table)

    def headline(self) -> str:
        """How far the search is, in one line, what matters most first."""
        states = Counter(r.state for r in self.rows)
        ended = states["COMPLETE"] + states["PRUNED"] + states["FAIL"]
        words = [f"{self.title}: {ended} of {self.planned} ended"]
        left = self.left_s()
        words += [f"about {span(left)} left"] if left is not None else []
        best = best_trial(self.rows, self.objectives[0])
        if best is not None and best.value is not None:
            words.append(f"best {score_text(self.objective, best.value)} ({self.word} {best.number})")
        words += [f"{states[s]} {s.lower()}" for s in ("PRUNED", "FAIL") if states[s]]
        words.append(clock(time.monotonic() - self.began))
        return " · ".join(words)

    def left_s(self) -> float | None:
        """Seconds until the last trial has ended, by the steps so far; ``None`` before there is any.

        A trial takes what the ended ones have taken on average, and all its seeds while none has ended.
        """
        ended = [sum(r.step for r in row.runs) for row in self.rows if row.state in ENDED]
        now = [s.done(self.steps) for s in list(self.running.values())]
        made = sum(ended) + sum(now) - self.before
        if made <= 0:
            return None
        whole = self.steps * max((len(s.seeds) for s in list(self.running.values())), default=1)
        each = sum(ended) / len(ended) if ended else whole
        waiting = max(0, self.planned - len(ended) - len(now))
        left = waiting * each + sum(each - n if n < each else max(0, whole - n) for n in now)
        return left * (time.monotonic() - self.began) / made

    def look(self) -> None:
        """Read how far the running trials are, now and then."""
        if time.monotonic() - self.looked >= LOOK_S:
            self.looked = time.monotonic()
            for shown in list(self.running.values()):
                shown.look()

    # -- what happens ---------------------------------------------------------------------------

    def started(self, key: str) -> None:
        """A trial has got its resources."""
        job = self.ledger.jobs.get(key) if self.ledger else None
        if job is None:
            return
        self.planned = max(self.planned, len(self.ledger.study.get_trials(deepcopy=False)) if self.ledger else 0)
        if self.ledger is not None and not self.rows:  # of a search that was resumed
            self.rows = read_trials(self.ledger.study, self.objectives)
            self.before = sum(r.step for row in self.rows if row.state in ENDED for r in row.runs)
        self.running[key] = _Shown(str(job.number), tuple(job.seeds), job.folder)
        if not self.console.is_terminal:
            point = "  ".join(f"{p.rsplit('.', 1)[-1]} {short(v)}" for p, v in job.point.items())
            self._say(f"{self.word} {job.number} starts  {point}")

    def reported(self, key: str, result: Mapping[str, Any]) -> None:
        """A trial has validated."""
        shown = self.running.get(key)
        job = self.ledger.jobs.get(key) if self.ledger else None
        if shown is None or job is None or "seed" not in result:
            return
        seed = int(result["seed"])
        shown.seed = job.seeds.index(seed) if seed in job.seeds else shown.seed
        shown.step, shown.score = int(result.get(STEP, 0)), result.get(self.objective)

    def stepped(self) -> None:
        """Tune has looked around once more: off a terminal, the search is heard of now and then."""
        if self.console.is_terminal or time.monotonic() - self.said < EVERY_S:
            return
        self.said = time.monotonic()
        self.look()
        seeds = any(len(s.seeds) > 1 for s in self.running.values())
        now = [
            f"{self.word} {s.name} {s.step}/{self.steps}" + (f" of seed {s.seed + 1}" if seeds else "")
            for s in list(self.running.values())
        ]
        self._say(" · ".join([self.headline(), *now]))

    def ended(self, key: str) -> None:
        """A trial has ended, by itself, stopped, or because it has lost its process."""
        self.running.pop(key, None)
        if not self.enabled or self.ledger is None:
            return
        self.rows = read_trials(self.ledger.study, self.objectives)
        number = self.ledger.numbers.get(key)
        row = next((r for r in self.rows if r.number == number), None)
        if row is None or row.state == "WAITING":
            how = "has left" if self.ledger.closing else "its process died"
            self._say(f"{self.word} {number}: {how}; it goes on from its checkpoint")
        else:
            self._say(line(row, best_trial(self.rows, self.objectives[0]), self.objective, self.word))

    def _say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def logged_step(log: Path) -> int:
    """The last step in a run's log; 0 while there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for text in reversed(lines):
        try:
            return int(json.loads(text)["step"])
        except (ValueError, KeyError, TypeError):  # half a line
            continue
    return 0


def line(row: TrialRow, best: TrialRow | None, objective: str, word: str = "trial") -> str:
    """One trial that ended, in one line.

    >>> from tuning.study.record import Run
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
