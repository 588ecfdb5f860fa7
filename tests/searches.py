"""A search of seconds, and a stand-in for Tune that hands its trials' reports to the ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

from tuning.ledger.ledger import Ledger
from tuning.ledger.trial_queue import TrialQueue
from tuning.space.options import Objective
from tuning.space.search import Search
from tuning.space.space_file import build_space
from tuning.study.lease import Lease
from tuning.study.store import open_storage
from tuning.study.study import open_study, study_name
from ugrl.errors import ConfigError
from ugrl.storage import place
from ugrl.train import checkpoint

SPACE: dict[str, Any] = {
    "config": "shapes",
    "overrides": {
        "data.crop": 32,
        "data.shapes.train": 40,
        "data.shapes.val": 6,
        "data.shapes.size": 32,
        "data.threads": 1,
        "train.steps": 9,
        "train.lr_warmup_iters": 1,
        "train.cls_warmup_iters": 2,
        "train.eval_every": 3,
        "train.checkpoint_every": 9,
        "train.picture_every": 1000,
        "train.keep_checkpoints": 1,
        "method.uncertainty.d_cls": 64,
        "method.contrast.d_seg": 32,
    },
    "trials": 5,
    "scheduler": {"grace_steps": 3, "reduction_factor": 2},
    "first": [
        {"train.global_batch": 4, "train.lr": 1e-3},
        {"train.global_batch": 4096, "train.lr": 1e-3},  # more than there are images: fails when it starts
    ],
    "search": {
        "train.global_batch": {"choice": [4, 8, 4096]},
        "train.lr": {"loguniform": [1e-4, 1e-2]},
    },
}
# The same without what fails.
SOUND = SPACE | {
    "first": [],
    "search": {"train.global_batch": {"choice": [4, 8]}, "train.lr": {"loguniform": [1e-4, 1e-2]}},
}

STORAGES = ["journal", "sqlite:///study.db"]
NO_STOP = {"scheduler": {"name": "none"}}


def write_space(path: Path, tree: Mapping[str, Any], **changes: Any) -> Path:
    """A space file."""
    path.write_text(yaml.safe_dump({**tree, **changes}))
    return path


def search_of(tree: Mapping[str, Any], out: Path, **changes: Any) -> Search:
    """A search whose shards nobody reads."""
    space = build_space({**tree, **changes})
    names = [replace(o, name="seg_miou") if o.name == "auto" else o for o in space.objectives]
    return Search(space, space.base(), place(out / "shards"), tuple(Objective(o.name) for o in names), out)


@contextmanager
def ledger(search: Search, *, create: bool = True, **more: Any) -> Any:
    """An open ledger with a lease of its own."""
    study = open_study(search.space, search.out, create=create, objectives=search.objectives, steps=search.steps)
    with Lease(study, **more) as lease:
        yield Ledger(TrialQueue(study, search, lease))


def fall_asleep(found: Ledger) -> None:
    """Have a driver not renew what it owns, for longer than that counts."""
    for _, held in found.lease._held.values():
        held._leave.set()
        held._renewed = 0.0
        (held.folder / f"{held.id}.json").write(replace(held.claim, time=0.0).bytes())


Score = Callable[[Mapping[str, Any], int, int], float | dict[str, float]]


def report(step: int, score: float | dict[str, float], seed: int = 0, **more: Any) -> dict[str, Any]:
    """What a trial's process reports, as Tune hands it on."""
    scores = score if isinstance(score, dict) else {"seg_miou": score, "cam_miou": score / 2}
    return {**scores, "step": step, "seed": seed, "seconds": float(step), **more}


def play(found: Ledger, name: str, score: Score, *, steps: tuple[int, ...] = (3, 6, 9)) -> dict[str, Any] | str | None:
    """Run one trial as Tune would: every report is judged, and the end is told.

    Args:
        found: The ledger.
        name: Of Tune's trial.
        score: (point, seed, step) → the objective, or all that is reported.
        steps: Of validations.

    Returns:
        What the ledger handed out.
    """
    task = found.take(name)
    if not isinstance(task, dict):
        return task
    stopped = False
    for seed in task["seeds"]:
        for step in steps:
            stopped = found.judge(name, report(step, score(task["point"], seed, step), seed))
            if stopped:
                break
        if not stopped:
            stopped = found.judge(name, report(steps[-1], score(task["point"], seed, steps[-1]), seed, ended=True))
        if stopped:
            break
    found.end(name)
    return task


def states(study: optuna.Study) -> list[str]:
    """Of all trials, by number."""
    return [t.state.name for t in study.get_trials(deepcopy=False)]


def load(search: Any) -> optuna.Study:
    """The study as somebody else would open it."""
    return open_study(search.space, search.out, create=False, objectives=search.objectives, steps=search.steps)


def study_of(out: Path, storage: str = "journal") -> optuna.Study | None:
    """A search's study, read while it runs."""
    if storage == "journal" and not (out / "study.journal").is_file():
        return None
    try:
        return optuna.load_study(study_name=study_name(storage, out), storage=open_storage(storage, out))
    except (KeyError, ConfigError):
        return None


def count(out: Path, storage: str, *states: TrialState) -> int:
    """Trials in some states."""
    found = study_of(out, storage)
    return 0 if found is None else len(found.get_trials(deepcopy=False, states=states))


ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def check_whole(out: Path, planned: int, storage: str = "journal", *, failed: int = 0) -> optuna.Study:
    """Exactly the planned trials, each once, none lost, none left RUNNING; and their files agree."""
    study = study_of(out, storage)
    assert study is not None
    trials = study.get_trials()
    states = Counter(t.state for t in trials)
    assert len(trials) == planned == states[TrialState.COMPLETE] + states[TrialState.PRUNED] + states[TrialState.FAIL]
    assert states[TrialState.FAIL] == failed
    points = [tuple(sorted(t.params.items())) for t in trials]
    assert len(set(points)) == planned  # nothing was sampled twice
    for trial in trials:
        last = max(trial.intermediate_values, default=0)
        for run in trial.user_attrs.get("runs", {}).values():
            steps = [step for step, _ in run["curve"]]
            assert steps == sorted(set(steps))
        if trial.state == TrialState.COMPLETE:
            assert last == 9 and trial.value is not None
            for seed in trial.user_attrs["runs"]:
                run = out / "trials" / f"{trial.number:03d}" / f"seed_{seed}"
                lines = (run / "metrics.jsonl").read_text().splitlines()
                steps = [r["step"] for r in map(json.loads, lines) if "val/seg_miou" in r]
                assert steps == [3, 6, 9]  # one training, whatever happened to it
                assert checkpoint.read_state(checkpoint.find(run)).step == 9
        if trial.state == TrialState.PRUNED:
            assert 3 <= last < 9 and trial.value == trial.intermediate_values[last]
    return study
