"""The versions of Ray and Optuna whose private attributes are used: another one is looked at before it is taken."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.storages.journal import JournalFileBackend

from tuning.study import store
from ugrl.errors import UgrlError

ROOT = Path(__file__).parents[1]
# Attributes that are private to Ray or Optuna, and the one file of tuning/ that may name each of them.
OPTUNA = re.compile(r"\b(?:study|self|storage)\._storage\b|\._trial_id\b|\.system_attrs\b|self\._(?:lock|file_path)\b")
RAY = re.compile(r"\bray\._private\b|\b_cleanup_cached_actors\b")


def test_optunas_internals_are_those_of_the_version_that_the_store_was_made_for(tmp_path: Path) -> None:
    assert optuna.__version__.startswith(store.MADE_FOR + "."), "look at tuning/study/store.py, then change MADE_FOR"
    study = optuna.create_study(storage=InMemoryStorage())
    store.check_internals(study)
    study.enqueue_trial({"x": 1})
    (seen,) = study.get_trials()
    trial = store.begin_trial(study, seen, "me")
    assert trial is not None and store.read_frozen(study, trial).user_attrs == {"driver": "me"}
    assert store.begin_trial(study, seen, "other") is None  # it has changed since it was looked at
    assert store.fixed_params(seen) == {"x": 1}
    backend = JournalFileBackend(str(tmp_path / "study.journal"))
    assert hasattr(backend, "_lock") and backend._file_path == str(tmp_path / "study.journal")


def test_another_optuna_is_refused_in_one_line() -> None:
    study: Any = SimpleNamespace(_storage=SimpleNamespace(get_trial=None))
    with pytest.raises(UgrlError, match=r"has no set_trial_user_attr, .*; ugrl-tune was made for optuna 5\.0: install"):
        store.check_internals(study)
    nothing: Any = SimpleNamespace()
    with pytest.raises(UgrlError, match=r"has no study\._storage"):
        store.check_internals(nothing)


def test_rays_internals_are_those_of_the_version_that_the_adapter_was_made_for() -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.search import Searcher

    from tuning.ledger import ledger
    from tuning.run import tune_adapter

    assert ray.__version__.startswith(tune_adapter.MADE_FOR + "."), "look at tuning/run/tune_adapter.py"
    assert callable(TuneController._cleanup_cached_actors)
    assert tune_adapter.StudySearch.FINISHED == Searcher.FINISHED == ledger.FINISHED
    with pytest.raises(UgrlError, match=r"has no TuneController\._cleanup_cached_actors; ugrl-tune was made for ray"):
        tune_adapter._end_resting_processes(object())


@pytest.mark.parametrize(("private", "home"), [(OPTUNA, "store.py"), (RAY, "tune_adapter.py")])
def test_private_attributes_are_used_in_one_file(private: re.Pattern[str], home: str) -> None:
    found = {file.name for file in (ROOT / "tuning").rglob("*.py") if private.search(file.read_text())}
    assert found == {home}
