"""Searches: trial states in the storage, a search that is killed and resumed, and its report."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from cluster.preflight import Capacity
from tuning import cli
from tuning.driver import Search, concurrent_trials
from tuning.plots import importance
from tuning.report import best_trial, read_trials, write_report
from tuning.space import SearchSpace, build_space
from tuning.study import StudySearch, close_orphans, is_spent, open_study
from ugrl import config as configs
from ugrl.errors import ConfigError, UgrlError

pytestmark = pytest.mark.ray

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


@pytest.fixture
def space() -> SearchSpace:
    return build_space(SPACE)


def searcher(space: SearchSpace, out: Path, *, create: bool = True) -> StudySearch:
    study = open_study(space, out, create=create)
    return StudySearch(study, space, metric="seg_miou", max_step=9, out=out)


def states(study: optuna.Study) -> list[str]:
    return [t.state.name for t in study.get_trials() if t.state != TrialState.WAITING]


def result(step: int, score: float) -> dict[str, float]:
    return {"seg_miou": score, "cam_miou": score / 2, "step": step, "training_iteration": 1}


@pytest.mark.parametrize("storage", ["journal", "sqlite:///study.db"])
def test_states_are_true(storage: str, tmp_path: Path) -> None:
    found = searcher(build_space(SPACE | {"storage": storage}), tmp_path)
    points = {name: found.suggest(name) for name in ("full", "stopped", "nan", "error", "silent")}
    assert points["full"] == {"number": 0, "point": {"train.global_batch": 4, "train.lr": 1e-3}}
    for name in ("full", "stopped"):
        found.on_trial_result(name, result(3, 0.2))
    # Tune tells a searcher that a trial is complete without having told it the last result.
    found.on_trial_complete("full", result(9, 0.5))
    found.on_trial_complete("stopped", result(6, 0.3))
    found.on_trial_complete("nan", result(9, math.nan))
    found.on_trial_complete("error", None, error=True)
    found.on_trial_complete("silent", None)
    found.on_trial_result("full", result(9, 0.9))  # late news changes nothing
    found.on_trial_complete("full", result(9, 0.9))

    trials = open_study(build_space(SPACE | {"storage": storage}), tmp_path, create=False).get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "FAIL"]
    assert [t.value for t in trials[:2]] == [0.5, 0.3]
    assert trials[0].intermediate_values == {3: 0.2, 9: 0.5}
    assert trials[1].intermediate_values == {3: 0.2, 6: 0.3}
    assert trials[1].user_attrs["metrics"] == {"seg_miou": 0.3, "cam_miou": 0.15, "step": 6.0}
    assert trials[2].user_attrs["error"] == "the objective is not a number"
    assert all(is_spent(t) for t in trials)


def test_a_resumed_study_goes_on_where_it_was(space: SearchSpace, tmp_path: Path) -> None:
    first = searcher(space, tmp_path)
    points = [first.suggest(str(i))["point"] for i in range(5)]
    first.on_trial_complete("0", result(9, 0.5))
    study = open_study(space, tmp_path, create=False)
    assert close_orphans(study) == [1, 2, 3, 4]
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", "FAIL", "FAIL"]
    assert sum(is_spent(t) for t in study.get_trials()) == 1
    again = searcher(space, tmp_path, create=False)
    # The points that were interrupted come again; what is sampled after them is new.
    assert [again.suggest(f"again {i}")["point"] for i in range(4)] == points[1:]
    assert again.suggest("new")["point"] not in points


def test_a_second_study_of_one_name_is_refused(space: SearchSpace, tmp_path: Path) -> None:
    open_study(space, tmp_path, create=True)
    with pytest.raises(UgrlError, match="already holds a study"):
        open_study(space, tmp_path, create=True)


def search_of(space: SearchSpace, out: Path) -> Search:
    return Search(space, space.base(), out / "shards", "seg_miou", out)


def test_trials_side_by_side_are_what_fits(tmp_path: Path) -> None:
    def fits(have: Capacity, **changes: Any) -> int:
        return concurrent_trials(search_of(build_space(SPACE, **changes), tmp_path), have)

    assert fits(Capacity(2, 0, 2)) == 2
    assert fits(Capacity(64, 0, 64)) == 5  # never more than trials
    assert fits(Capacity(2, 0, 2), workers=2) == 1  # two half CPUs, and one for reading data
    assert fits(Capacity(4, 0, 4), workers=2) == 3
    with pytest.raises(ConfigError, match="3 concurrent trials × 1 CPU; the cluster has 2 CPUs: at most 2 fit"):
        fits(Capacity(2, 0, 2), concurrent=3)
    with pytest.raises(ConfigError, match=r"2 runs × 2 workers × 0.5 CPU \+ 1 for reading data = 3 CPUs"):
        fits(Capacity(2, 0, 2), concurrent=2, workers=2)


def test_importance_of_few_trials_is_not_told(space: SearchSpace, tmp_path: Path) -> None:
    found = searcher(space, tmp_path)
    for i in range(12):
        found.suggest(str(i))
        found.on_trial_complete(str(i), result(9 if i < 9 else 6, 0.1 * i))
    assert importance(found.study) == "importance: 9 complete trials are too few to tell (from 10 on); no plot"


def test_a_report_of_many_trials_has_every_plot(space: SearchSpace, tmp_path: Path) -> None:
    from rich.console import Console

    found = searcher(space, tmp_path)
    for i in range(16):
        point = found.suggest(str(i))["point"]
        score = 0.3 + 0.1 * math.log10(point["train.lr"] / 1e-4) + 0.01 * (point["train.global_batch"] == 8)
        found.on_trial_result(str(i), result(3, score / 2))
        found.on_trial_complete(str(i), result(6 if i % 4 == 3 else 9, score))
    with (tmp_path / "table.txt").open("w") as file:
        write_report(search_of(space, tmp_path), found.study, Console(file=file, width=120))
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "history.png",
        "curves.png",
        "slices.png",
        "importance.png",
    }
    ranking = importance(found.study)
    assert isinstance(ranking, dict) and next(iter(ranking)) == "train.lr"
    best = best_trial(read_trials(found.study))
    assert best is not None and best.state == "COMPLETE"
    assert best.value == max(t.value for t in found.study.get_trials(states=(TrialState.COMPLETE,)))
    assert configs.load(tmp_path / "best.yaml").train.lr == best.params["train.lr"]


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the space, where generated data go too."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "mine.yaml").write_text(yaml.safe_dump(SPACE))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("UGRL_DATA", str(folder / "data"))
        yield folder


def ended(out: Path) -> int:
    """Trials of a search that have ended, read while it runs."""
    if not (out / "study.journal").is_file():
        return 0
    try:
        study = optuna.load_study(study_name="ugrl", storage=study_storage(out))
    except KeyError:
        return 0
    return sum(is_spent(t) for t in study.get_trials())


def study_storage(out: Path) -> optuna.storages.BaseStorage:
    from tuning.study import open_storage

    return open_storage("journal", out)


def test_a_search_that_was_killed_is_resumed_to_its_budget(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = home / "search"
    args = ["--space", str(home / "mine.yaml"), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tuning.cli", *args], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        while ended(out) < 1 and process.poll() is None:
            time.sleep(0.2)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 1 <= ended(out) < 5

    assert cli.main(args) == 2
    assert "search 'search' exists already" in capsys.readouterr().err
    assert cli.main([*args, "--resume", "train.weight_decay=0.5"]) == 2
    assert "was started with overrides.train.weight_decay = None, not 0.5" in capsys.readouterr().err

    assert cli.main(["--out", str(out), "--resume"]) == 0
    shown = capsys.readouterr().err
    study = optuna.load_study(study_name="ugrl", storage=study_storage(out))
    trials = study.get_trials()
    assert sum(is_spent(t) for t in trials) == 5
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    for trial in trials:
        last = max(trial.intermediate_values, default=0)
        if trial.state == TrialState.COMPLETE:
            assert last == 9 and trial.value == trial.intermediate_values[9]
        if trial.state == TrialState.PRUNED:
            assert 3 <= last < 9 and trial.value == trial.intermediate_values[last]
    failed = [t for t in trials if t.state == TrialState.FAIL and is_spent(t)]
    assert any(t.params["train.global_batch"] == 4096 for t in failed)
    assert all("do not fill one global batch of 4096" in t.user_attrs["error"] for t in failed)
    assert "do not fill one global batch of 4096" in shown

    best = configs.load(out / "best.yaml")
    assert best.data.val_split == "val"
    assert (
        best.train.lr == max(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda t: t.value).params["train.lr"]
    )
    with (out / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["number"]) for r in rows] == [t.number for t in trials]
    assert {"seg_miou", "cam_miou", "tag_map", "tag_f1", "train.lr", "seconds"} <= set(rows[0])
    for name in ("history.png", "curves.png", "slices.png"):
        assert (out / "plots" / name).read_bytes().startswith(b"\x89PNG")

    assert cli.main(["--out", str(out), "--resume", "--quiet"]) == 0  # nothing is left to run


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--space", "shaeps"], "did you mean 'shapes'?"),
        (["train.stpes=3"], "did you mean 'train.steps'?"),
        (["--trials", "0"], "'trials' is 0; expected an integer ≥ 1"),
        (["--space", "voc"], "no shards"),
        (["eval.cam=false", "--space", "WRONG"], "objective 'cam_miou': split 'tune_val' does not measure it"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], text: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = home / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(SPACE | {"objective": "cam_miou"}))
    words = [str(wrong) if w == "WRONG" else w for w in words]
    assert cli.main([*words, "--out", str(home / "refused")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert text in error[-1]
    assert error[-1].startswith("error: ")
    assert not (home / "refused").exists()


def test_a_bare_command_names_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "coco, coco100, shapes, voc" in capsys.readouterr().out
