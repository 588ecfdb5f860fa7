"""Which trial a driver begins next, and what the trial is made of: its point, its seeds, its folder."""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from tuning.ledger.job import Job
from tuning.space.search import Search
from tuning.space.space import trial_config
from tuning.study.budget import spent
from tuning.study.commit import code_commit
from tuning.study.lease import Lease
from tuning.study.record import COMMIT, CONFIG, HELD, HOST, OUT, RUNS, SEEDS
from tuning.study.sampling import make_sampler, suggest_point
from tuning.study.store import read_frozen
from tuning.study.study import queue
from ugrl import config as configs
from ugrl.ownership import owned
from ugrl.storage import place


class TrialQueue:
    """The trials of a study that this driver may begin.

    Args:
        study: From :func:`tuning.study.study.open_study`.
        search: The search.
        lease: Says which trials this driver owns.
    """

    def __init__(self, study: optuna.Study, search: Search, lease: Lease) -> None:
        self.study, self.search, self.lease = study, search, lease
        self._commit = code_commit()

    # -- which -----------------------------------------------------------------------------------------

    def waiting(self) -> list[FrozenTrial]:
        """The trials that wait, in their order, as far as the budget of trials has room."""
        return queue(self.study, self.search.space.trials)

    def orphans(self, mine: Collection[int] = ()) -> list[FrozenTrial]:
        """RUNNING trials that nobody looks after.

        Args:
            mine: The numbers of the trials that this driver looks after.
        """
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [t for t in running if t.number not in mine and not owned(place(self.folder(t.number)))]

    def take(self, trials: Sequence[FrozenTrial]) -> Trial | None:
        """The first of some trials that no other driver takes, with its own sampler: an orphan may have no point."""
        for seen in trials:
            if (trial := self.lease.take(self.study, seen, self.folder(seen.number))) is not None:
                self.study.sampler = self.sampler(seen.number)
                return trial
        return None

    def over_budget(self) -> str | None:
        """Which part of the budget is spent, in words."""
        return spent(self.study).over(self.search.space.budget)

    # -- what it is made of ----------------------------------------------------------------------------

    def begin(self, trial: Trial) -> Job:
        """A job of a trial that was just taken, with all that is known of it from before.

        Raises:
            ConfigError: The values of its point do not go together.
        """
        frozen = read_frozen(self.study, trial)
        folder = self.folder(trial.number)
        job = Job(
            trial,
            self.point(trial),
            tuple(frozen.user_attrs.get(SEEDS) or self.seeds(trial)),
            folder,
            runs=dict(frozen.user_attrs.get(RUNS, {})),
            before=float(frozen.user_attrs.get(HELD, {}).get("seconds", 0.0)),
        )
        cfg = trial_config(self.search.base, job.point, self.search.space.split, job.seeds[0])
        known = {
            SEEDS: list(job.seeds),
            OUT: str(folder),
            HOST: socket.gethostname(),
            COMMIT: self._commit,
            CONFIG: configs.public_dict(cfg),
        }
        for key, value in known.items():
            if frozen.user_attrs.get(key) != value:
                trial.set_user_attr(key, value)
        return job

    def task(self, job: Job) -> dict[str, Any]:
        """What the trial's process is told; see :func:`tuning.run.trial.run_trial`."""
        return {
            "number": job.number,
            "point": job.point,
            "seeds": list(job.seeds),
            "folder": str(job.folder),
            "owner": self.lease.owner(job.trial),
            "before": {seed: run.get("seconds", 0.0) for seed, run in job.runs.items()},
            "final": self.final_split(),
        }

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """The sampler of a trial."""
        return make_sampler(self.search.space, number)

    def folder(self, number: int) -> Path:
        """Where the runs of a trial are written."""
        return self.search.folder(number)

    def point(self, trial: Trial) -> dict[str, Any]:
        """Dotted path → value of a trial."""
        return suggest_point(trial, self.search.space.search)

    def seeds(self, trial: Trial) -> tuple[int, ...]:
        """The seeds of a trial's runs.

        A sampler may come to a point again (NSGA-II often does): with the same seed it would tell nothing new.
        """
        point, count = trial.params, self.search.space.repeats.seeds
        others = self.study.get_trials(deepcopy=False)[: trial.number]
        again = sum(t.params == point for t in others)
        return tuple(self.search.base.seed + count * again + k for k in range(count))

    def final_split(self) -> str | None:
        """The untouched split on which the runs are measured as well; ``None`` where they are not."""
        return self.search.space.final.split if self.search.space.final.every else None
