"""Between Ray Tune, which places and runs trials, and the Optuna study, which says what to run and when to stop.

Ray's ``OptunaSearch`` hands suggestions out and results in, but tells a study too little: a trial that ASHA stopped
would count as complete with the score of its early steps, a score of NaN would leave a trial running for ever, and a
resumed study would sample its first points again. Its schedulers keep their rungs in the driver's memory, so that a
resumed search would stop trials by what it has seen since. Here the study's own pruner is asked, whose knowledge is in
the storage.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, Trial, TrialState
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from sqlalchemy.exc import OperationalError

from tuning.budget import spent
from tuning.lease import Lease
from tuning.options import COSTS, METRICS
from tuning.record import (
    BESIDE,
    COMMIT,
    CONFIG,
    DEATHS,
    ERROR,
    HELD,
    HOST,
    NOTE,
    OUT,
    RUNS,
    SEEDS,
    VIOLATION,
    Run,
    read_trials,
)
from tuning.report.noise import ROUNDING, Measure, difference, noise_of
from tuning.search import Search
from tuning.space import finite, trial_config
from tuning.study import STEP, make_sampler, put_back, queue, suggest_point, trial_folder
from ugrl import config as configs
from ugrl.command import complain
from ugrl.errors import AwayError, ConfigError
from ugrl.ownership import owned
from ugrl.storage import StorageError, place

T = TypeVar("T")
ERROR_FILE = "error.txt"
# In a trial's folder: the driver whose process is to leave with a checkpoint.
LEAVE = "leave"
# A search whose first trials all fail for one reason is stopped after so many.
ALIKE = 3
# A trial that has not got its resources after so many seconds is put back into the queue.
PLACE_S = 30.0
# How often a driver with nothing to begin looks whether that has changed, and how long its processes wait for that.
IDLE_S, REST_S = 0.5, 5.0
FINAL = "final/"
KEPT = (*METRICS, *COSTS, *BESIDE, "u_auroc", "p_auroc", "images_per_s", "data_wait", STEP)


@dataclass
class Job:
    """A trial that this driver looks after.

    Attributes:
        trial: Optuna's, RUNNING.
        point: Dotted path → value, of the configuration.
        seeds: Of the runs, in order.
        folder: Of its runs.
        runs: Seed → what is known of that run, as in :mod:`tuning.record`.
        verdict: How it ends, once that is known: a state and why.
        left: Whether its process was asked to leave, and did, with a checkpoint.
        unplaced: Why its workers found no place, if so.
        before: Seconds that it held its resources in earlier sessions.
        since: When this driver began it; when it was placed, once it is.
        placed: Whether it has got the resources that it asked for.
    """

    trial: Trial
    point: dict[str, Any]
    seeds: tuple[int, ...]
    folder: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdict: tuple[TrialState, str] | None = None
    left: bool = False
    unplaced: str = ""
    placed: bool = False
    before: float = 0.0
    since: float = field(default_factory=time.time)

    @property
    def number(self) -> int:
        """Optuna's."""
        return int(self.trial.number)

    def value(self, name: str) -> float | None:
        """Mean of a metric over the runs that have ended, or of the first one so far."""
        runs = [r for r in self.runs.values() if r.get("ended")] or list(self.runs.values())[:1]
        found = [r["metrics"].get(name) for r in runs if r.get("metrics")]
        return statistics.fmean(found) if found and all(finite(v) for v in found) else None


class StudySearch(Searcher):
    """Ray Tune's searcher over an open study.

    Args:
        study: From :func:`tuning.study.open_study`.
        search: The search.
        lease: This driver's.
        limit: Trials that may be begun in all; those of the budget by default.
        cpus: That a trial holds.
        gpus: That a trial holds.
    """

    def __init__(
        self,
        study: optuna.Study,
        search: Search,
        lease: Lease,
        *,
        limit: int | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> None:
        super().__init__(metric=None, mode=None)
        self.study, self.search, self.lease = study, search, lease
        self.limit = search.space.trials if limit is None else limit
        self.cpus, self.gpus = cpus, gpus
        self.jobs: dict[str, Job] = {}
        self.numbers: dict[str, int] = {}
        self.halted = ""
        self.full = ""  # which disk has no room, if that has ended the search
        self.closing = False
        self.room: Any = None  # of the cluster, for more trials; None where it is not asked for
        self.session = self._processes = 0
        self._idle_since = self._idle_until = 0.0
        self.fresh = True  # whether points are sampled, and not given
        self._failures: list[str] = []
        self._commit = code_commit()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing goes into Tune's snapshots."""
        return {}

    # -- what to run ---------------------------------------------------------------------------

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """Nothing to set: metric, mode and space are the study's."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial: an orphan to go on with, else one that waits.

        Returns:
            What :func:`tuning.trial.run_trial` takes; ``None`` while nothing can be begun but trials run here, which
            may come back; ``FINISHED`` when this driver has nothing to do: what others run is waited for outside of
            Tune, which hears no signal meanwhile.
        """
        return self.patiently(lambda: self._suggest(trial_id))

    def patiently(self, work: Callable[[], T]) -> T:
        """Do something with the storage, which may be away for a while; see :func:`patiently`."""
        return patiently(work, self.search.base.data.storage_patience_s)

    def open_session(self) -> None:
        """Ray Tune is started anew, and has no processes yet."""
        self.session += 1
        self._processes = 0

    def outlook(self) -> tuple[int, int]:
        """Trials that this driver might begin now, and those that run for others and may come back."""
        if self.closing or self.halted:
            return 0, 0
        if (why := self.exhausted()) is not None:
            self.halted = why
            return 0, 0
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        orphans = len(self.orphans())
        return len(queue(self.study, self.limit)) + orphans, len(running) - orphans

    def orphans(self) -> list[FrozenTrial]:
        """RUNNING trials that nobody looks after."""
        mine = {job.number for job in self.jobs.values()}
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [t for t in running if t.number not in mine and not owned(place(self.folder(t.number)))]

    def has_room(self) -> bool:
        """Whether one more trial finds a process of this driver that rests, or room on the cluster for a new one."""
        if self.room is None or len(self.jobs) < self._processes:
            return True
        coming = sum(not job.placed for job in self.jobs.values())
        return bool(self.room.trials() > coming)

    def placed(self, trial_id: str) -> None:
        """Note that a trial has got its resources."""
        if (job := self.jobs.get(trial_id)) is not None:
            job.since, job.placed = time.time(), True
            self._processes = max(self._processes, sum(j.placed for j in self.jobs.values()))

    def rests(self) -> bool:
        """Whether processes of this driver have had nothing to do for a while; they are ended then."""
        placed = sum(job.placed for job in self.jobs.values())
        rest = placed < self._processes and 0 < self._idle_since < time.monotonic() - REST_S
        if rest:
            self._processes = placed
        return rest

    def unplaced(self) -> list[str]:
        """Trials that have waited too long for a place; another driver may have one for them."""
        late = time.time() - PLACE_S
        return [] if self.room is None else [k for k, j in self.jobs.items() if not j.placed and j.since < late]

    def give_back(self, trial_id: str) -> None:
        """Put a trial that found no place back into the queue."""
        job = self.jobs.pop(trial_id)
        self.patiently(lambda: put_back(self.study, job.trial) if self.lease.holds(self.study, job.trial) else None)
        self.lease.release(job.trial)

    def _suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.closing or self.halted:
            return Searcher.FINISHED
        now = time.monotonic()
        if self.jobs and now < self._idle_until:
            return None
        trial = self._next() if self.has_room() else None
        if trial is None:
            self._idle_until = now + IDLE_S
            self._idle_since = self._idle_since or now
            return None if self.jobs and not self.halted else Searcher.FINISHED
        self._idle_since = 0.0
        try:
            job = self.begin(trial)
            task = self.task(job)
        except ConfigError as error:  # values that each are valid, but do not go together
            trial.set_user_attr(ERROR, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            self._failed(str(error))
            self.lease.release(trial)
            return None
        except BaseException:
            self.lease.release(trial)  # it is an orphan
            raise
        self.jobs[trial_id] = job
        self.numbers[trial_id] = job.number
        return task

    def _next(self) -> Trial | None:
        if (trial := self._first_of(self.orphans())) is not None:
            return trial
        if (why := self.exhausted()) is not None:
            self.halted = why
            return None
        return self._first_of(queue(self.study, self.limit))

    def _first_of(self, trials: Sequence[FrozenTrial]) -> Trial | None:
        """The first trial that no other driver takes, with its own sampler: an orphan may have no point yet."""
        for seen in trials:
            if (trial := self.lease.take(self.study, seen, self.folder(seen.number))) is not None:
                if self.fresh:
                    self.study.sampler = make_sampler(self.search.space, seen.number)
                return trial
        return None

    def exhausted(self) -> str | None:
        """Which part of the budget is spent, in words."""
        return spent(self.study).over(self.search.space.budget)

    def begin(self, trial: Trial) -> Job:
        """A job of a trial that was just taken, with all that is known of it from before."""
        frozen = self.study._storage.get_trial(trial._trial_id)
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

    def folder(self, number: int) -> Path:
        """Of a trial's runs."""
        return trial_folder(self.search.out, number)

    def point(self, trial: Trial) -> dict[str, Any]:
        """The configuration of a trial."""
        return suggest_point(trial, self.search.space.search)

    def seeds(self, trial: Trial) -> tuple[int, ...]:
        """The seeds of a trial's runs.

        A sampler may come to a point again (NSGA-II often does): with the same seed it would tell nothing new.
        """
        point, count = trial.params, self.search.space.repeats.seeds
        others = self.study.get_trials(deepcopy=False)[: trial.number]
        again = sum(t.params == point for t in others)
        return tuple(self.search.base.seed + count * again + k for k in range(count))

    def task(self, job: Job) -> dict[str, Any]:
        """What the trial's process is told."""
        return {
            "number": job.number,
            "point": job.point,
            "seeds": list(job.seeds),
            "folder": str(job.folder),
            "owner": self.lease.owner(job.trial),
            "before": {seed: run.get("seconds", 0.0) for seed, run in job.runs.items()},
            "final": self.search.space.final.split if self.measured() else None,
        }

    def measured(self) -> bool:
        """Whether a trial's runs are measured on the untouched split."""
        return self.search.space.final.every

    # -- what happened -------------------------------------------------------------------------

    def judge(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Note a trial's report; returns whether the trial is to be stopped."""
        return self.patiently(lambda: self._judge(trial_id, result))

    def _judge(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        job = self.jobs.get(trial_id)
        if job is None:
            return True  # late news of a trial that has been told
        if not self.lease.holds(self.study, job.trial):
            del self.jobs[trial_id]  # this driver was silent for too long, and another one has taken it
            self.lease.release(job.trial)
            return True
        if "left" in result:
            job.left = True
            return True
        if "full" in result:
            job.left = True
            self.full = self.full or str(result["full"])
            self.ask_to_leave()
            return True
        if "unplaced" in result:
            job.unplaced = str(result["unplaced"])
            return True
        if "error" in result:
            job.verdict = (TrialState.FAIL, str(result["error"]))
            return True
        if "seed" not in result:
            return False
        self._note(job, result)
        job.verdict = self._verdict(job, result)
        return job.verdict is not None

    def _note(self, job: Job, result: Mapping[str, Any]) -> None:
        seed, step = str(result["seed"]), int(result.get(STEP, 0))
        run = job.runs.setdefault(seed, {"curve": [], "step": 0})
        score = result.get(self.search.objective, math.nan)
        last = run["curve"][-1][0] if run["curve"] else 0
        if step > last and finite(score):
            run["curve"].append([step, float(score)])
            if seed == str(job.seeds[0]) and len(self.search.objectives) == 1:
                job.trial.report(float(score), step)
        if step >= last:
            run["step"], run["value"] = step, float(score) if finite(score) else None
            new = {k: float(result[k]) for k in KEPT if finite(result.get(k))}
            run["metrics"] = {**run.get("metrics", {}), **new}  # costs are not measured where nothing was left to do
        run["seconds"] = float(result.get("seconds", 0.0))
        if result.get("ended"):
            run["ended"] = True
            # Tune hands nested values on with their keys joined.
            found = {k.removeprefix(FINAL): float(v) for k, v in result.items() if k.startswith(FINAL) and finite(v)}
            run["final"] = found or run.get("final", {})
        job.trial.set_user_attr(RUNS, job.runs)
        self.hold(job)

    def hold(self, job: Job) -> None:
        """Write down what a trial has held so far."""
        seconds = job.before + time.time() - job.since
        job.trial.set_user_attr(HELD, {"seconds": seconds, "cpus": self.cpus, "gpus": self.gpus})

    def _verdict(self, job: Job, result: Mapping[str, Any]) -> tuple[TrialState, str] | None:
        name = self.search.objective
        if not finite(result.get(name)):
            why = f"is not a number at step {result.get(STEP)}" if name in result else "was not reported"
            return TrialState.FAIL, f"{name} {why}"
        if violated := self._violated(job, result):
            # What was stopped teaches these samplers nothing: they learn from complete trials alone.
            learns = self.search.space.sampler.name in ("gp", "nsga2")
            return TrialState.COMPLETE if learns else TrialState.PRUNED, violated
        if not result.get("ended"):
            first = str(result["seed"]) == str(job.seeds[0])
            early = int(result.get(STEP, 0)) < self.search.steps  # who has come to the end is complete, rung or not
            if first and early and len(self.search.objectives) == 1 and job.trial.should_prune():
                return TrialState.PRUNED, f"stopped by {self.search.space.scheduler.name} at step {result[STEP]}"
            return None
        left = [s for s in job.seeds if not job.runs.get(str(s), {}).get("ended")]
        if left and len(self.search.objectives) == 1 and self.search.space.repeats.skip and (why := self._loses(job)):
            return TrialState.COMPLETE, why
        return None

    def _violated(self, job: Job, result: Mapping[str, Any]) -> str:
        """Mark the constraints as kept or broken; what is broken, in words."""
        broken = {}
        for each in self.search.space.constraints:
            value = result.get(each.name, 0.0)
            if finite(value) and float(value) > each.limit:
                broken[each.name] = float(value)
        if broken:
            job.trial.set_user_attr(VIOLATION, broken)
            for each in self.search.space.constraints:
                job.trial.set_constraint(each.name, broken.get(each.name, each.limit) - each.limit)
        return ", ".join(f"{k} {v:.3g} is over the limit of {self._limit(k):g}" for k, v in broken.items())

    def _limit(self, name: str) -> float:
        return next(c.limit for c in self.search.space.constraints if c.name == name)

    def _loses(self, job: Job) -> str:
        """Why further seeds would change nothing, if so.

        The mean is behind the best one's by more than two standard errors of their difference, taken seed by seed
        where enough configurations have shared seeds for that.
        """
        name = self.search.objectives[0].name
        sign = 1.0 if self.search.objectives[0].maximize else -1.0
        rows = [r for r in read_trials(self.study, self.search.objectives) if r.number != job.number]
        others = [(r.state, _ended(r.runs, sign)) for r in rows]
        mine = _ended([Run.read(seed, run) for seed, run in job.runs.items()], sign)
        complete = [values for state, values in others if values and state == "COMPLETE"]
        if not complete or not mine:
            return ""
        noise = noise_of([values for _, values in others])
        best = max(complete, key=lambda values: statistics.fmean(values.values()))
        if noise.paired is not None and mine.keys() <= best.keys():
            best = {seed: best[seed] for seed in mine}
        gap = difference(_mean(name, best), _mean(name, mine), noise)
        if not gap.noise.known or gap.mean <= max(2 * gap.stderr, ROUNDING):
            return ""
        how = ", seed by seed" if gap.paired else ""
        errors = gap.mean / max(gap.stderr, ROUNDING)
        return f"seeds left out after {len(mine)}: {errors:.1f} standard errors behind{how}"

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: :meth:`judge` has heard of it, before the scheduler decided."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how a trial ended."""
        job = self.jobs.pop(trial_id, None)
        if job is not None:
            self.patiently(lambda: self._complete(job, error))
            self.lease.release(job.trial)

    def _complete(self, job: Job, error: bool) -> None:
        if not self.lease.holds(self.study, job.trial):
            return
        self.hold(job)
        if job.left:
            put_back(self.study, job.trial)
            return
        if (error or job.unplaced) and job.verdict is None and self._again(job):
            return
        state, why = self._end(job)
        if state == TrialState.FAIL:
            job.trial.set_user_attr(ERROR, why)
        elif why:
            job.trial.set_user_attr(NOTE, why)
        if state != TrialState.FAIL and VIOLATION not in self.study._storage.get_trial(job.trial._trial_id).user_attrs:
            for each in self.search.space.constraints:
                kept = job.value(each.name)
                job.trial.set_constraint(each.name, (kept if kept is not None else each.limit) - each.limit)
        values = [job.value(o.name) for o in self.search.objectives]
        if state == TrialState.COMPLETE:
            self.study.tell(job.trial, [float(v) for v in values if v is not None], state=state)
        else:
            self.study.tell(job.trial, state=state)
        if state == TrialState.FAIL:
            self._failed(why)
        else:
            self._failures.clear()

    def _again(self, job: Job) -> bool:
        """Whether a trial whose process died, or whose workers found no place, goes on from its checkpoint later.

        Tune would start it again by itself, but not where the process died before the trial had begun.
        """
        frozen = self.study._storage.get_trial(job.trial._trial_id)
        deaths = int(frozen.user_attrs.get(DEATHS, 0)) + 1
        job.trial.set_user_attr(DEATHS, deaths)
        if deaths > self.search.space.max_failures:
            job.verdict = (TrialState.FAIL, job.unplaced or why_failed(job.folder))
            return False
        put_back(self.study, job.trial)
        return True

    def _end(self, job: Job) -> tuple[TrialState, str]:
        if job.verdict is not None and job.verdict[0] != TrialState.COMPLETE:
            return job.verdict
        missing = [o.name for o in self.search.objectives if job.value(o.name) is None]
        if missing or not (job.verdict or any(r.get("ended") for r in job.runs.values())):
            return (
                TrialState.FAIL,
                f"no validation reported {missing[0]}" if missing else "it ended before its last step",
            )
        return TrialState.COMPLETE, job.verdict[1] if job.verdict else ""

    def _failed(self, why: str) -> None:
        """Stop a search in which nothing works."""
        self._failures.append(_kind(why))
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if len(self._failures) >= ALIKE and len(set(self._failures[-ALIKE:])) == 1 and not done:
            self.halted = f"{ALIKE} trials in a row failed alike, and none has worked: {why}"

    # -- the end -------------------------------------------------------------------------------

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
        for trial_id, job in list(self.jobs.items()):
            if self.lease.holds(self.study, job.trial):
                self.hold(job)
                put_back(self.study, job.trial)
                left.append(job.number)
            del self.jobs[trial_id]
            self.lease.release(job.trial)
        return left

    def number(self, trial_id: str) -> int | None:
        """Optuna's number of a Tune trial."""
        return self.numbers.get(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Write no snapshot: the study's storage is the record."""
        Path(checkpoint_path).write_text("the study's storage is the record\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a search is resumed from the study's storage."""
        raise ConfigError(f"{checkpoint_path}: not a snapshot; resume with ugrl-tune --resume")


class StudyScheduler(FIFOScheduler):
    """Asks the study whether a trial that has just reported is to be stopped.

    Args:
        searcher: Over the study.
    """

    def __init__(self, searcher: StudySearch) -> None:
        super().__init__()
        self.searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: tune.experiment.Trial, result: dict[str, Any]) -> str:
        """``STOP`` or ``CONTINUE``."""
        stop = self.searcher.judge(trial.trial_id, result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> tune.experiment.Trial | None:
        """The next pending trial; those that find no place are given back first."""
        late = set(self.searcher.unplaced())
        for trial in list(tune_controller.get_trials()) if late else []:
            if trial.trial_id in late and trial.status == tune.experiment.Trial.PENDING:
                self.searcher.give_back(trial.trial_id)
                tune_controller.stop_trial(trial)
        if self.searcher.rests():
            tune_controller._cleanup_cached_actors(force_all=True)  # others may want what they hold
        return super().choose_trial_to_run(tune_controller)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing goes into Tune's snapshots."""
        return {}


def _ended(runs: Sequence[Run], sign: float) -> dict[int, float]:
    """Seed → value of the runs that reached their end, the higher the better."""
    return {r.seed: sign * r.value for r in runs if r.ended and r.value is not None}


def _mean(name: str, values: Mapping[int, float]) -> Measure:
    return Measure(name, statistics.fmean(values.values()), count=len(values), seeds=tuple(sorted(values)))


def why_failed(folder: Path) -> str:
    """One line on why a trial's process died, from what it left behind."""
    try:
        lines = (folder / ERROR_FILE).read_text(encoding="utf-8").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "its process ended without a word (killed, or out of memory)"


def _kind(why: str) -> str:
    """An error without its numbers and paths, so that two of a kind are equal."""
    return " ".join(w for w in why.split() if not any(c.isdigit() or c in "/\\" for c in w))


def code_commit() -> str:
    """The commit of the code that runs, where it is a checkout; with ``+`` where files were changed."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        try:
            found = subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=5, env=env
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    # The code may lie within somebody's own repository, be it installed there or kept in a folder of it.
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != here.parents[1] or git("ls-files", "--error-unmatch", here.name) is None:
        return ""
    return git("describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*") or ""


def patiently(work: Callable[[], T], patience_s: float) -> T:
    """Do something with the storage; a database that is away for a while is waited for.

    Raises:
        AwayError: It was away for too long.
    """
    until, told = time.monotonic() + patience_s, False
    while True:
        try:
            return work()
        except (OperationalError, StorageInternalError, StorageError, OSError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            if time.monotonic() > until:
                raise AwayError(
                    f"the study's storage has been away for {patience_s:g} s (data.storage_patience_s; {why}); "
                    "continue with --resume once it answers"
                ) from None
            if not told:
                complain(f"the study's storage is away ({why}); trying again for up to {patience_s:g} s", word="")
                told = True
            time.sleep(2.0)
