"""The ledger of one driver: it takes trials from the study, judges what they report, and tells how they ended.

It decides, and runs nothing: :mod:`tuning.run.tune_adapter` lets Ray Tune run what the ledger hands out, a test or a
benchmark plays the trials itself. All that it knows is in the storage, so that a driver may be killed at any moment.

Ray's ``OptunaSearch`` does less: to it a trial that was stopped early is complete with the score of its early steps, a
score of NaN leaves a trial running for ever, and a resumed study samples its first points again. Its schedulers keep
their rungs in the driver's memory. Here the study's own pruner is asked, whose knowledge is in the storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from optuna.trial import Trial, TrialState

from tuning.ledger.job import LEAVE, Job, why_failed
from tuning.ledger.processes import Processes
from tuning.ledger.stopping import Failures, judge_end, judge_report, mark_kept
from tuning.ledger.trial_queue import TrialQueue
from tuning.study.record import DEATHS, ERROR, NOTE, VIOLATION
from tuning.study.store import put_back, read_frozen, retry_storage
from ugrl.errors import ConfigError
from ugrl.storage import StorageError, place

T = TypeVar("T")
# What :meth:`Ledger.take` returns where this driver has nothing more to do.
FINISHED = "FINISHED"


class Ledger:
    """The trials that one driver looks after.

    Args:
        queue: Where the trials come from.
        cpus: CPUs that a trial holds.
        gpus: GPUs that a trial holds.

    Attributes:
        jobs: The trials that run, by the names that whoever runs them gives them.
        numbers: Name → number in the study, also of trials that have ended.
        halted: Why the search has ended before its last trial; empty while it has not.
        full: Which disk has no room, if that has ended the search.
        closing: Whether nothing more is begun.
        processes: Those that run the trials.
    """

    def __init__(self, queue: TrialQueue, *, cpus: float = 1.0, gpus: float = 0.0) -> None:
        self.queue, self.cpus, self.gpus = queue, cpus, gpus
        self.study, self.search, self.lease = queue.study, queue.search, queue.lease
        self.jobs: dict[str, Job] = {}
        self.numbers: dict[str, int] = {}
        self.halted = self.full = ""
        self.closing = False
        self.processes = Processes(self.jobs)
        self._failures = Failures()

    # -- take ------------------------------------------------------------------------------------------

    def outlook(self) -> tuple[int, int]:
        """Trials that this driver might begin now, and those that run for others and may come back."""
        if self.closing or self.halted:
            return 0, 0
        if (why := self.queue.over_budget()) is not None:
            self.halted = why
            return 0, 0
        orphans = len(self.queue.orphans(self._mine()))
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return len(self.queue.waiting()) + orphans, len(running) - orphans

    def take(self, key: str) -> dict[str, Any] | str | None:
        """Begin the next trial: an orphan to go on with, else one that waits.

        Args:
            key: What the trial is called from now on.

        Returns:
            What :func:`tuning.run.trial.run_trial` takes; ``None`` while nothing can be begun but trials run here,
            which may come back; :data:`FINISHED` when this driver has nothing to do.
        """
        return self._retry(lambda: self._take(key))

    def _take(self, key: str) -> dict[str, Any] | str | None:
        if self.closing or self.halted:
            return FINISHED
        if self.processes.pausing():
            return None
        trial = self._next() if self.processes.has_room() else None
        if trial is None:
            self.processes.idle()
            return None if self.jobs and not self.halted else FINISHED
        self.processes.busy()
        try:
            job = self.queue.begin(trial)
            task = self.queue.task(job)
        except ConfigError as error:  # values that each are valid, but do not go together
            trial.set_user_attr(ERROR, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            self.halted = self._failures.add(str(error), self.study) or self.halted
            self.lease.release(trial)
            return None
        except BaseException:
            self.lease.release(trial)  # it is an orphan
            raise
        self.jobs[key] = job
        self.numbers[key] = job.number
        return task

    def _next(self) -> Trial | None:
        if (trial := self.queue.take(self.queue.orphans(self._mine()))) is not None:
            return trial
        if (why := self.queue.over_budget()) is not None:
            self.halted = why
            return None
        return self.queue.take(self.queue.waiting())

    def give_back(self, key: str) -> None:
        """Put a trial that found no place back into the queue."""
        job = self.jobs.pop(key)
        self._retry(lambda: put_back(self.study, job.trial) if self.lease.holds(self.study, job.trial) else None)
        self.lease.release(job.trial)

    # -- judge -----------------------------------------------------------------------------------------

    def judge(self, key: str, result: Mapping[str, Any]) -> bool:
        """Note a trial's report; returns whether the trial is to be stopped."""
        return self._retry(lambda: self._judge(key, result))

    def _judge(self, key: str, result: Mapping[str, Any]) -> bool:
        job = self.jobs.get(key)
        if job is None:
            return True  # late news of a trial that has been told
        if not self.lease.holds(self.study, job.trial):
            del self.jobs[key]  # this driver was silent for too long, and another one has taken it
            self.lease.release(job.trial)
            return True
        if "full" in result:
            self.full = self.full or str(result["full"])
            self.ask_to_leave()
        job.left = job.left or "left" in result or "full" in result
        job.unplaced = str(result.get("unplaced", job.unplaced))
        if "error" in result:
            job.verdict = (TrialState.FAIL, str(result["error"]))
        if any(word in result for word in ("left", "full", "unplaced", "error")):
            return True
        if "seed" not in result:
            return False
        job.note(result, self.search)
        job.hold(self.cpus, self.gpus)
        job.verdict = judge_report(job, result, self.study, self.search)
        return job.verdict is not None

    # -- end -------------------------------------------------------------------------------------------

    def end(self, key: str, *, died: bool = False) -> None:
        """Tell the study how a trial ended.

        Args:
            key: The trial's name.
            died: Whether it lost its process.
        """
        job = self.jobs.pop(key, None)
        if job is not None:
            self._retry(lambda: self._end(job, died))
            self.lease.release(job.trial)

    def _end(self, job: Job, died: bool) -> None:
        if not self.lease.holds(self.study, job.trial):
            return
        job.hold(self.cpus, self.gpus)
        if job.left or ((died or job.unplaced) and job.verdict is None and self._again(job)):
            put_back(self.study, job.trial)
            return
        state, why = judge_end(job, self.search)
        if why:
            job.trial.set_user_attr(ERROR if state == TrialState.FAIL else NOTE, why)
        if state != TrialState.FAIL and VIOLATION not in read_frozen(self.study, job.trial).user_attrs:
            mark_kept(job, self.search.space.constraints)
        values = [v for v in (job.value(o.name) for o in self.search.objectives) if v is not None]
        self.study.tell(job.trial, list(map(float, values)) if state == TrialState.COMPLETE else None, state=state)
        if state == TrialState.FAIL:
            self.halted = self._failures.add(why, self.study) or self.halted
        else:
            self._failures.clear()

    def _again(self, job: Job) -> bool:
        """Whether a trial whose process died, or whose workers found no place, goes on from its checkpoint later.

        Tune would start it again by itself, but not where the process died before the trial had begun.
        """
        deaths = int(read_frozen(self.study, job.trial).user_attrs.get(DEATHS, 0)) + 1
        job.trial.set_user_attr(DEATHS, deaths)
        if deaths > self.search.space.max_failures:
            job.verdict = (TrialState.FAIL, job.unplaced or why_failed(job.folder))
            return False
        return True

    # -- leave -----------------------------------------------------------------------------------------

    def ask_to_leave(self) -> None:
        """Begin nothing more, and have the processes of what runs write a checkpoint and go."""
        self.closing = True
        for job in list(self.jobs.values()):
            try:
                (place(job.folder) / LEAVE).write(self.lease.owner(job.trial).encode())
            except StorageError:
                continue  # it is ended the hard way

    def leave(self) -> list[int]:
        """Put the trials that still run back into the queue; returns their numbers.

        To be called when their processes are gone.
        """
        self.closing = True
        left = []
        for key, job in list(self.jobs.items()):
            if self.lease.holds(self.study, job.trial):
                job.hold(self.cpus, self.gpus)
                put_back(self.study, job.trial)
                left.append(job.number)
            del self.jobs[key]
            self.lease.release(job.trial)
        return left

    def _mine(self) -> set[int]:
        return {job.number for job in self.jobs.values()}

    def _retry(self, work: Callable[[], T]) -> T:
        return retry_storage(work, self.search.base.data.storage_patience_s)
