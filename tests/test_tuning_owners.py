"""One driver for each trial, and for what is planned: starts at the same moment, and drivers that were cut off."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from tests.searches import NO_STOP, SOUND, STORAGES, fall_asleep, ledger, load, play, search_of, states
from tests.starts import ONE_EACH, ROUNDS, Attempt, together
from tuning.ledger.finals import open_finals, plan_finals
from tuning.space.options import Final
from tuning.space.search import Search
from tuning.study.lease import Lease, once
from tuning.study.store import id_of, put_back, read_frozen, storage_of
from tuning.study.study import plan
from ugrl import ownership
from ugrl.errors import ConfigError
from ugrl.ownership import Claim, LostError, fence, process_space
from ugrl.storage import place


def a_search(out: str | Path, storage: str, **changes: Any) -> Search:
    return search_of(SOUND, Path(out), storage=storage, trials=ROUNDS, **changes, **NO_STOP)


# -- trials ----------------------------------------------------------------------------------------


def taking(out: str, storage: str) -> Attempt:
    """A driver that wants the trial of each round."""
    search = a_search(out, storage)
    study = load(search)
    lease, trials = Lease(study), study.get_trials(deepcopy=False)

    @contextmanager
    def attempt(k: int) -> Iterator[bool]:
        seen = read_frozen(study, trials[k])
        trial = lease.take(study, seen, search.folder(k))
        yield trial is not None and lease.holds(study, trial)
        if trial is not None:
            put_back(study, trial)
            lease.release(trial)

    return attempt


@pytest.mark.parametrize("storage", STORAGES)
def test_of_drivers_that_begin_a_trial_at_once_one_does(storage: str, tmp_path: Path) -> None:
    search = a_search(tmp_path, storage)
    with ledger(search):
        pass
    # The second time, one of them has had the trial before: a journal would tell that one that it has it again.
    for _ in range(2 if storage == "journal" else 1):
        assert together(taking, str(tmp_path), storage) == ONE_EACH
    assert states(load(search)) == ["WAITING"] * ROUNDS


@pytest.mark.parametrize("storage", STORAGES)
def test_of_drivers_that_take_an_orphan_over_at_once_one_does(storage: str, tmp_path: Path) -> None:
    search = a_search(tmp_path, storage)
    gone = multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    assert gone.pid is not None
    claim = Claim("gone", socket.gethostname(), gone.pid, process_space(), time.time(), number=1, owner=True)
    with ledger(search) as found:
        for trial in found.study.get_trials(deepcopy=False):
            storage_of(found.study).set_trial_state_values(id_of(trial), TrialState.RUNNING)
            (place(found.queue.folder(trial.number)) / "owner" / "gone.json").write(claim.bytes())
        assert len(found.queue.orphans()) == ROUNDS
    assert together(taking, str(tmp_path), storage) == ONE_EACH


def test_a_driver_that_was_cut_off_hears_of_it_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the trial that another one took, of one whose folder alone it cannot see, and in the trial's processes."""
    search = a_search(tmp_path, "journal")
    with ledger(search) as found:
        first, second = found.take("first"), found.take("second")
        check = fence(place(first["folder"]), first["owner"], every_s=0.0)
        check()
        fall_asleep(found)
        with ledger(search, create=False) as other:
            assert other.take("first")["number"] == 0
            with pytest.raises(LostError, match="another driver has taken it over"):
                check()
            assert found.judge("first", {"seed": 0, "step": 3, "seg_miou": 0.9})
            assert "first" not in found.jobs
            assert other.lease.holds(other.study, other.jobs["first"].trial)
            assert other.take("second")["number"] == 1
            monkeypatch.setattr(ownership.Ownership, "check", lambda self: None)
            found.end("second")
            assert states(load(search))[:2] == ["RUNNING"] * 2
            assert second["number"] == 1 and not found.study.get_trials()[0].intermediate_values


# -- what is planned -------------------------------------------------------------------------------


def planning(out: str, storage: str, part: str) -> Attempt:
    """A driver that plans more trials, or more final runs, in each round."""
    search = a_search(out, storage)
    study = load(search)
    finals = open_finals(search, study)
    assert finals is not None

    @contextmanager
    def attempt(k: int) -> Iterator[bool]:
        worked = []
        budget, final = replace(search.space.budget, trials=ROUNDS + 2 * (k + 1)), Final(2, k + 1)
        more = replace(search, space=replace(search.space, budget=budget, final=final))

        def trials(check: Any) -> None:
            worked.append(k)
            plan(study, more.space, check=check)

        def runs(check: Any) -> None:
            worked.append(k)
            plan_finals(more, study, finals, check)

        if part == "trials":
            once(more.out, trials, lambda: study.user_attrs.get("planned") == budget.trials)
        else:
            once(more.out, runs, lambda: finals.user_attrs.get("ready", [0, 0])[1] == k + 1)
        yield bool(worked)

    return attempt


@pytest.mark.parametrize("part", ["trials", "final runs"])
@pytest.mark.parametrize("storage", STORAGES)
def test_of_drivers_that_plan_at_once_one_does(storage: str, part: str, tmp_path: Path) -> None:
    search = a_search(tmp_path, storage)
    with ledger(search) as found:
        for k in range(2):
            play(found, str(k), lambda *_: 0.5)
        finals = open_finals(search, found.study)
    assert together(planning, str(tmp_path), storage, part) == ONE_EACH
    study = load(search)
    finals = open_finals(search, study)
    assert finals is not None
    grown = [t.system_attrs["fixed_params"] for t in finals.get_trials()] if part != "trials" else study.get_trials()
    assert len(grown) == 2 * ROUNDS + (ROUNDS if part == "trials" else 0)
    assert part == "trials" or len({tuple(run.values()) for run in grown}) == 2 * ROUNDS


def beginning(out: str) -> Attempt:
    """A command that begins the search of each round."""
    from tuning.study.search_folder import begin

    @contextmanager
    def attempt(k: int) -> Iterator[bool]:
        try:
            begin(search_of(SOUND, Path(out) / f"search{k}", storage="journal"), resume=False)
        except ConfigError as error:
            assert "exists already" in str(error)
            yield False
        else:
            yield True

    return attempt


def test_of_commands_that_begin_a_search_at_once_one_does(tmp_path: Path) -> None:
    assert together(beginning, str(tmp_path)) == ONE_EACH


def test_who_lost_the_search_plans_no_further(tmp_path: Path) -> None:
    search = a_search(tmp_path, "journal")
    with ledger(search) as found:
        more = replace(search.space, budget=replace(search.space.budget, trials=ROUNDS + 3))
        left = [None, None]

        def check() -> None:
            if not left:
                raise LostError("another driver has taken it over")
            left.pop()

        with pytest.raises(LostError):
            plan(found.study, more, check=check)
        assert len(found.study.get_trials()) == ROUNDS + 2
        assert found.study.user_attrs["planned"] == ROUNDS
