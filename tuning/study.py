"""The Optuna study: its storage, its sampler, and trial states that say what happened.

Ray's ``OptunaSearch`` hands suggestions out and results in, but tells a study too little: a trial
that ASHA stopped would count as complete with the score of its early steps, a score of NaN would
leave a trial running for ever, and a resumed study would sample its first points again.
:class:`StudySearch` tells each trial's true end:

=========  =================================================================================
state      what happened
=========  =================================================================================
COMPLETE   reached the last step, with the score of that step
PRUNED     stopped by the scheduler, with the score of the step where it was stopped
FAIL       raised an error, scored NaN, or was interrupted (user attribute ``interrupted``)
=========  =================================================================================

The study in the storage is the one record of a search. A resumed search is built anew from it;
Ray Tune's own snapshots are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from tuning.space import Axis, SearchSpace
from ugrl.errors import ConfigError, UgrlError

STEP = "step"
STUDY = "ugrl"
JOURNAL = "study.journal"
ERROR_FILE = "error.txt"


def open_storage(storage: str, out: Path) -> BaseStorage:
    """The storage of a search.

    Args:
        storage: ``journal`` for the file ``study.journal`` in ``out``, or a database URL. A relative
            SQLite path counts from ``out``.
        out: The search's folder.

    Raises:
        ConfigError: The database cannot be opened.
    """
    if storage == "journal":
        return JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    prefix = "sqlite:///"
    if storage.startswith(prefix) and not storage.startswith(prefix + "/"):
        storage = f"{prefix}{(out / storage.removeprefix(prefix)).absolute()}"
    try:
        return RDBStorage(storage, heartbeat_interval=None)
    except Exception as error:  # SQLAlchemy's errors, and a missing database driver
        raise ConfigError(f"storage {storage!r} cannot be opened: {str(error).splitlines()[0]}") from None


def study_name(storage: str, out: Path) -> str:
    """One name per file; where searches may share a database, the search's folder tells them apart."""
    return STUDY if storage == "journal" or storage.startswith("sqlite:") else f"{STUDY}:{out.name}"


def distributions(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    """The axes in Optuna's terms, keyed by dotted path."""
    made: dict[str, BaseDistribution] = {}
    for axis in axes:
        if axis.kind == "choice":
            made[axis.path] = CategoricalDistribution(axis.options)
        elif axis.kind in ("int", "logint"):
            made[axis.path] = IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        else:
            made[axis.path] = FloatDistribution(axis.low, axis.high, log=axis.log)
    return made


def is_spent(trial: FrozenTrial) -> bool:
    """Whether a trial counts against the budget: it ended by itself, well or badly."""
    if trial.state == TrialState.FAIL:
        return "interrupted" not in trial.user_attrs
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def close_orphans(study: optuna.Study) -> list[int]:
    """Tell FAIL for every RUNNING trial and queue its point again.

    To be called while nobody runs trials of the study: at the start of a resumed search, or at the
    end of an interrupted one.

    Returns:
        Numbers of the trials that were closed.
    """
    closed = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study._storage.set_trial_user_attr(trial._trial_id, "interrupted", True)
        study._storage.set_trial_user_attr(trial._trial_id, "error", "interrupted")
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(dict(trial.params), skip_if_exists=False)
        closed.append(trial.number)
    return closed


def open_study(space: SearchSpace, out: Path, *, create: bool) -> optuna.Study:
    """Create the study of a search, with its starting points queued, or load an existing one.

    The sampler's seed moves on with the trials that the study has: a resumed search goes on
    sampling instead of repeating its first points.
    """
    storage, name = open_storage(space.storage, out), study_name(space.storage, out)
    exists = name in optuna.get_all_study_names(storage)
    if exists and create:
        raise UgrlError(
            f"storage {space.storage!r} already holds a study named '{name}'; choose another --out or --resume"
        )
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    if not exists:
        for point in space.first:
            study.enqueue_trial(dict(point))
    # Points drawn before the model of good and bad ones starts: ten by default, too many for a small budget.
    startup = min(10, max(3, space.trials // 4))
    seed = space.seed + len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    return study


class StudySearch(OptunaSearch):
    """Ray Tune's searcher over an open study; see the module's text for what it tells.

    Args:
        study: From :func:`open_study`.
        space: The search.
        metric: The objective's key in reported results; larger is better.
        max_step: The step at which a trial is complete.
        out: Where trials write, ``out/trials/NNN``.
    """

    def __init__(self, study: optuna.Study, space: SearchSpace, *, metric: str, max_step: int, out: Path) -> None:
        # An empty space keeps the parent from creating a study of its own.
        super().__init__(space=None, metric=metric, mode="max")
        self._space = distributions(space.search)
        self._ot_study = study
        self._max_step = max_step
        self._out = out
        self._reported: dict[str, int] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """Nothing to set: metric, mode and space are the study's."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next point: ``{"number": …, "point": {dotted path: value}}``."""
        point = super().suggest(trial_id)
        trial = self._ot_trials[trial_id]
        trial.set_user_attr("tune_trial_id", trial_id)
        trial.set_user_attr("out", str(trial_folder(self._out, trial.number)))
        return None if point is None else {"number": trial.number, "point": dict(trial.params)}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Pass one validation on, under the step that the trainer itself counts."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return  # late news of a trial that has been told
        score, step = _float(result.get(self.metric)), int(result.get(STEP, 0))
        if score is None or step <= self._reported.get(trial_id, -1):
            return
        self._reported[trial_id] = step
        trial = self._ot_trials[trial_id]
        trial.report(score, step)
        trial.set_user_attr("metrics", _scalars(result))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how a trial ended."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return
        self._completed_trials.add(trial_id)
        trial = self._ot_trials[trial_id]
        if result and not error:
            # The scheduler decides before the searcher hears of the deciding result.
            self.on_late_result(trial_id, result)
        score = _float(result.get(self.metric)) if result else None
        step = int(result.get(STEP, 0)) if result else 0
        if error or score is None:
            trial.set_user_attr("error", self._reason(trial.number, result, error))
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif step < self._max_step:
            self._ot_study.tell(trial, state=TrialState.PRUNED)
        else:
            self._ot_study.tell(trial, score, state=TrialState.COMPLETE)

    def _reason(self, number: int, result: Mapping[str, Any] | None, error: bool) -> str:
        if error:
            return why_failed(self._out, number)
        return "the objective is not a number" if result and self.metric in result else "no validation was reported"

    def on_late_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Report the last result of a trial that is about to be told."""
        self._completed_trials.discard(trial_id)
        self.on_trial_result(trial_id, result)
        self._completed_trials.add(trial_id)

    @property
    def study(self) -> optuna.Study:
        """The study that is told."""
        return self._ot_study

    def number(self, trial_id: str) -> int | None:
        """Optuna's number of a Tune trial."""
        trial = self._ot_trials.get(trial_id)
        return None if trial is None else int(trial.number)

    def save(self, checkpoint_path: str) -> None:
        """Write no snapshot: the study's storage is the record."""
        Path(checkpoint_path).write_text("the study's storage is the record\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a search is resumed from the study's storage."""
        raise UgrlError(f"{checkpoint_path}: not a snapshot; resume with ugrl-tune --resume")


def quiet_optuna() -> None:
    """Leave Optuna's warnings; drop its line for each trial."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def trial_folder(out: Path, number: int) -> Path:
    """Where a trial writes."""
    return out / "trials" / f"{number:03d}"


def why_failed(out: Path, number: int) -> str:
    """One line on why a trial failed, from what it left behind."""
    try:
        lines = (trial_folder(out, number) / ERROR_FILE).read_text(encoding="utf-8").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "its process ended without a word (killed, or out of memory)"


def _float(value: Any) -> float | None:
    """A finite number or ``None``."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


_KEPT = ("seg_miou", "cam_miou", "tag_map", "tag_f1", "loss", "images_per_s", STEP, "seconds")


def _scalars(result: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(result[k]) for k in _KEPT if _float(result.get(k)) is not None}
