"""The study of a search without Ray: states, queue, orphans, final runs, warm starts."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from cluster.capacity import Capacity
from tests.searches import NO_STOP, SOUND, SPACE, STORAGES, fall_asleep, ledger, load, play, report, search_of, states
from tuning.ledger.finals import open_finals, plan_finals
from tuning.run.placement import Room
from tuning.study.lease import Lease
from tuning.study.record import read_trials
from tuning.study.store import open_storage, put_back
from tuning.study.study import open_study, plan, queue
from ugrl.errors import UgrlError

# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_states_are_true(storage: str, tmp_path: Path) -> None:
    search = search_of(SPACE, tmp_path, storage=storage, trials=6)
    with ledger(search) as found:
        names = ("full", "stopped", "nan", "error", "silent", "died")
        tasks = {name: found.take(name) for name in names}
        assert tasks["full"]["point"] == {"train.global_batch": 4, "train.lr": 1e-3}
        assert states(found.study) == ["RUNNING"] * 6
        assert not found.judge("full", report(3, 0.2))
        assert not found.judge("full", report(6, 0.4))
        assert not found.judge("full", report(9, 0.5))
        assert not found.judge("full", report(9, 0.5, ended=True))
        assert found.judge("stopped", report(3, 0.1))  # the worse half is stopped at the first rung
        assert found.judge("nan", report(3, math.nan))
        assert found.judge("error", {"error": "it broke"})
        for name in names:
            found.end(name, died=name == "died")
        for again in range(3):  # goes on, three times
            assert found.take(f"died {again}")["point"] == tasks["died"]["point"]
            found.end(f"died {again}", died=True)
        assert found.judge("full", report(9, 0.9))  # late news changes nothing
        found.end("full")

    trials = load(search).get_trials()
    assert states(load(search)) == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "FAIL", "FAIL"]
    assert [t.value for t in trials[:2]] == [0.5, 0.1]
    assert trials[0].intermediate_values == {3: 0.2, 6: 0.4, 9: 0.5}
    assert trials[1].user_attrs["note"] == "stopped by asha at step 3"
    assert [t.user_attrs["error"] for t in trials[2:]] == [
        "seg_miou is not a number at step 3",
        "it broke",
        "no validation reported seg_miou",
        "its process ended without a word (killed, or out of memory)",
    ]
    (run,) = read_trials(load(search), search.objectives)[0].runs
    assert run.curve == ((3, 0.2), (6, 0.4), (9, 0.5)) and run.ended and run.metrics["cam_miou"] == 0.25
    attrs = trials[0].user_attrs
    assert attrs["config"]["train"]["lr"] == 1e-3 and attrs["config"]["data"]["val_split"] == "tune_val"
    assert attrs["host"] and attrs["held"]["cpus"] == 1.0 and attrs["out"].endswith("trials/000")


def test_a_study_of_a_taken_name_or_of_other_objectives_is_refused(tmp_path: Path) -> None:
    search = search_of(SPACE, tmp_path)
    with ledger(search):
        pass
    with pytest.raises(UgrlError, match="already holds a study"), ledger(search):
        pass
    other = search_of(SPACE, tmp_path, objective="tag_f1")
    with pytest.raises(UgrlError, match="optimises seg_miou, not tag_f1"):
        load(other)


# -- the queue -------------------------------------------------------------------------------------


def test_all_trials_of_the_budget_wait_from_the_beginning(tmp_path: Path) -> None:
    search = search_of(SPACE, tmp_path)
    with ledger(search) as found:
        assert states(found.study) == ["WAITING"] * 5
        plan(found.study, search.space)
        assert len(found.study.get_trials()) == 5
    more = search_of(SPACE, tmp_path, trials=8)
    with ledger(more, create=False) as found:
        assert states(found.study) == ["WAITING"] * 8
        asked = [found.take(str(i)) for i in range(9)]
        assert [t["number"] for t in asked[:8]] == list(range(8))
        # Eight are running here, and nothing waits; but one of them might have to go on elsewhere.
        assert asked[8] is None
    (tmp_path / "few").mkdir()
    few = search_of(SOUND, tmp_path / "few", trials=5)
    with ledger(few) as found:
        play(found, "0", lambda *_: 0.5)
        play(found, "1", lambda *_: 0.5)
    fewer = search_of(SOUND, tmp_path / "few", trials=3)
    with ledger(fewer, create=False) as found:
        assert isinstance(play(found, "2", lambda *_: 0.5), dict)
        assert play(found, "3", lambda *_: 0.5) == "FINISHED"
        assert len([t for t in found.study.get_trials() if t.state == TrialState.WAITING]) == 2


def _drive(storage: str, out: str, seed: int, quit_after: int | None) -> None:
    search = search_of(SOUND, Path(out), storage=storage, trials=24, **NO_STOP)
    with ledger(search, create=False, beat_s=0.2) as found:
        done = 0
        while True:
            if done == quit_after and isinstance(found.take("left behind"), dict):
                os.kill(os.getpid(), signal.SIGKILL)
            task = play(found, f"{seed}-{done}", lambda point, *_: -abs(math.log(point["train.lr"] / 1e-3)))
            time.sleep(0.3)  # so that no driver is too late for its share
            if task == "FINISHED" and found.outlook() == (0, 0):  # nor may another driver's trial come back
                return
            if task is None or task == "FINISHED":
                time.sleep(0.1)
            else:
                done += 1


@pytest.mark.parametrize("storage", STORAGES)
def test_three_drivers_of_which_one_is_killed_run_each_trial_once(storage: str, tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, storage=storage, trials=24, **NO_STOP)
    with ledger(search):
        pass
    context = multiprocessing.get_context("spawn")
    drivers = [
        context.Process(target=_drive, args=(storage, str(tmp_path), k, 1 if k == 0 else None)) for k in range(3)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(90)
    assert [d.exitcode for d in drivers] == [-signal.SIGKILL, 0, 0]
    study = load(search)
    assert Counter(states(study)) == {"COMPLETE": 24}
    whose = Counter(t.user_attrs["driver"] for t in study.get_trials())
    # The killed one ended one, and the one that it left behind was ended by another.
    assert len(whose) == 3 and 1 in whose.values()


def _open(folder: str, gate: Any, told: Any) -> None:

    gate.wait(60)
    try:
        open_storage("sqlite:///study.db", Path(folder)).get_all_studies()
        told.put("")
    except Exception as error:
        told.put(f"{type(error).__name__}: {error}")


def test_processes_that_open_a_new_database_at_once_all_get_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate, told = context.Barrier(4), context.SimpleQueue()
    crowd = [context.Process(target=_open, args=(str(tmp_path), gate, told)) for _ in range(4)]
    for each in crowd:
        each.start()
    assert [told.get() for _ in crowd] == [""] * 4
    for each in crowd:
        each.join(30)


# -- orphans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_an_orphan_is_continued_with_the_same_parameters_and_counts_once(storage: str, tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, storage=storage)
    study = open_study(search.space, search.out, create=True, objectives=search.objectives, steps=search.steps)
    from tuning.ledger.ledger import Ledger
    from tuning.ledger.trial_queue import TrialQueue

    lost = Ledger(TrialQueue(study, search, Lease(study)))
    task = lost.take("lost")
    assert isinstance(task, dict)
    lost.judge("lost", report(3, 0.3))
    fall_asleep(lost)
    with ledger(search, create=False) as found:
        again = found.take("again")
        assert (again["number"], again["point"]) == (task["number"], task["point"])
        assert again["before"] == {"0": 3.0}  # seconds that it has trained already
        assert not found.judge("again", report(6, 0.4))
        assert not found.judge("again", report(9, 0.5, ended=True))
        # The dead one wakes up: what it says counts no more, and it is told to stop.
        assert lost.judge("lost", report(9, 0.9))
        lost.end("lost")
        found.end("again")
        (trial,) = found.study.get_trials(states=(TrialState.COMPLETE,))
        assert trial.value == 0.5 and trial.intermediate_values == {3: 0.3, 6: 0.4, 9: 0.5}
        assert len(found.study.get_trials()) == 5


def test_a_driver_that_is_alive_keeps_its_trials(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path)
    with ledger(search) as first:
        task = first.take("mine")
        with ledger(search, create=False) as other:
            assert other.queue.orphans() == [] and other.outlook() == (4, 1)
            fall_asleep(first)
            assert [t.number for t in other.queue.orphans()] == [task["number"]]
            assert other.outlook() == (5, 0)


def test_an_orphan_that_lost_its_driver_before_it_had_a_point_is_sampled_as_itself(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    with ledger(search_of(SOUND, tmp_path / "whole")) as found:
        points = [found.take(name)["point"] for name in "abc"]
    assert len({str(point) for point in points}) == 3
    search = search_of(SOUND, tmp_path / "cut")
    with ledger(search) as found:
        assert found.take("a")["point"] == points[0]
        assert Lease(found.study).take(found.study, queue(found.study, 5)[0], tmp_path / "elsewhere") is not None
        orphan = found.take("b")
        assert (orphan["number"], orphan["point"]) == (1, points[1])


def test_what_is_put_back_goes_on_as_it_was(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path)
    with ledger(search) as found:
        task = found.take("mine")
        found.judge("mine", report(3, 0.3))
        assert found.leave() == [task["number"]]
        assert states(found.study) == ["WAITING"] * 5
        assert found.take("none") == "FINISHED"
    with ledger(search, create=False) as found:
        again = found.take("again")
        assert (again["number"], again["point"]) == (task["number"], task["point"])
        assert found.take("next")["point"] != task["point"]


def test_a_trial_is_begun_only_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuning.ledger.processes.IDLE_S", 0.0)
    free = 0
    with ledger(search_of(SOUND, tmp_path)) as found:
        found.processes.room = SimpleNamespace(trials=lambda: free)
        assert found.take("a") == "FINISHED"  # and not None, at which Tune would wait and hear no signal
        free = 1
        first = found.take("a")
        assert found.take("b") is None  # the room is meant for the first one, which has not got it yet
        found.processes.placed("a")
        free = 0
        assert found.take("b") is None
        found.end("a")
        second = found.take("b")  # in the process of the first one
        assert (first["number"], second["number"]) == (0, 1)
        assert found.take("c") is None


def test_a_trial_that_finds_no_place_is_given_back(tmp_path: Path) -> None:
    with ledger(search_of(SOUND, tmp_path)) as found:
        found.processes.room = SimpleNamespace(trials=lambda: 2)
        found.take("a")
        found.take("b")
        found.processes.placed("b")
        assert found.processes.unplaced() == []
        for job in found.jobs.values():
            job.since -= 31
        assert found.processes.unplaced() == ["a"]
        found.give_back("a")
        assert states(found.study) == ["WAITING", "RUNNING", "WAITING", "WAITING", "WAITING"]


def test_processes_without_work_are_ended_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuning.ledger.processes.IDLE_S", 0.0)
    monkeypatch.setattr("tuning.ledger.processes.REST_S", 0.0)
    with ledger(search_of(SOUND, tmp_path, trials=3)) as found:
        for name in "abc":
            found.take(name)
            found.processes.placed(name)
        found.end("a")
        assert not found.processes.end_resting()
        assert found.take("d") is None  # nothing waits
        assert found.processes.end_resting()
        assert not found.processes.end_resting()


def test_workers_are_placed_node_by_node(tmp_path: Path) -> None:
    def trials(workers: int, *nodes: float) -> int:
        free = {str(k): {"CPU": cpus} for k, cpus in enumerate(nodes)}
        whole = {"cluster.cpus_per_worker": 1.0, "cluster.data_cpus": 1.0}
        search = search_of(SOUND, tmp_path, overrides={**SOUND["overrides"], **whole})
        return Room(
            replace(search, space=replace(search.space, workers=workers)), Capacity(8, 0, 4), lambda: free
        ).trials()

    assert trials(1, 1.0, 1.0) == 2
    assert trials(1, 0.5, 0.5) == 0  # a trial is not split over nodes
    assert trials(2, 1.0, 1.0, 1.0) == 1
    assert trials(2, 1.0, 1.0) == 0  # one CPU is left for those who read
    assert trials(2, 2.0, 0.5, 2.5) == 2


def test_the_commit_is_of_the_code_and_not_of_what_lies_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuning.study import commit as module

    file = tmp_path / "tuning" / "study" / "commit.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "around"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(module, "__file__", str(file))
    assert module.code_commit() == ""
    vendored = tmp_path / "vendor" / "tuning" / "study" / "commit.py"
    vendored.parent.mkdir(parents=True)
    vendored.write_text("")
    for words in (["add", "."], ["commit", "-q", "-m", "within"]):
        subprocess.run([*git, *words], check=True)
    assert len(module.code_commit()) == 10
    monkeypatch.setattr(module, "__file__", str(vendored))  # tracked, but by a repository that is another's
    assert module.code_commit() == ""


def test_a_takeover_keeps_the_seeds(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=3, first=[{"train.global_batch": 4, "train.lr": 1e-3}] * 2)
    with ledger(search) as found:
        first, second = found.take("a"), found.take("b")
        assert (first["seeds"], second["seeds"]) == ([0], [1])  # the same point tells more with another seed
        found.leave()
    with ledger(search, create=False) as found:
        assert found.take("a")["seeds"] == [0] and found.take("b")["seeds"] == [1]


def test_costs_are_of_the_run_and_not_of_its_last_line() -> None:
    from tuning.run.trial import Reports

    reports = Reports(0, 0.0, {})
    for step_s, memory in ((9.0, 100.0), (1.0, 300.0), (2.0, 200.0)):  # the first line holds the warm-up
        reports.log({"step_s": step_s, "device_memory_mb": memory})
    assert reports.costs == {"step_s": 1.5, "memory_gb": pytest.approx(300 * 2**20 / 1e9)}


def test_a_sampler_goes_on_where_it_was(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=6)
    with ledger(search) as found:
        before = [play(found, str(i), lambda *_: 0.5)["point"] for i in range(3)]
    with ledger(search, create=False) as found:
        after = [play(found, str(i), lambda *_: 0.5)["point"] for i in range(3)]
    assert not [p for p in after if p in before]


# -- final runs and warm starts ---------------------------------------------------------------------------


def test_the_best_are_planned_with_fresh_seeds_once(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=4, final={"best": 2, "seeds": 3}, **NO_STOP)
    with ledger(search) as found:
        for k in range(4):
            play(found, str(k), lambda *_, k=k: (0.3, 0.6, 0.1, 0.5)[k])
        finals = open_finals(search, found.study)
        plan_finals(search, found.study, finals)
        plan_finals(search, found.study, finals)
        asked = [t.system_attrs["fixed_params"] for t in finals.get_trials()]
        assert [(a["candidate"], a["seed"]) for a in asked] == [(c, s) for s in (1000, 1001, 1002) for c in (1, 3)]
        # They are started in this order, and none twice.
        trial = Lease(finals).take(finals, queue(finals, 10**9)[0], tmp_path / "final")
        assert trial is not None
        assert (trial.suggest_int("candidate", 0, 10**6), trial.suggest_int("seed", 0, 2**31 - 1)) == (1, 1000)
        put_back(finals, trial)
        plan_finals(search, found.study, finals)
        assert len(finals.get_trials()) == 6


def test_a_search_begins_with_what_was_best_elsewhere(tmp_path: Path) -> None:
    from tuning.study.search_folder import warm_points

    first = search_of(SOUND, tmp_path / "voc", trials=6, **NO_STOP)
    (tmp_path / "voc").mkdir()
    with ledger(first) as found:
        for k in range(6):
            play(found, str(k), lambda point, *_: point["train.lr"])
        (tmp_path / "voc" / "space.yaml").write_text(first.space.to_yaml())
        (tmp_path / "voc" / "base.yaml").write_text("name: voc\n")
        best = sorted((t.params["train.lr"] for t in found.study.get_trials()), reverse=True)
    # Elsewhere another range is searched, so one of the points does not fit, and another axis is added.
    tree = {
        **SOUND,
        "search": {"train.lr": {"loguniform": [1e-4, 0.9 * best[0]]}, "method.contrast.keep": {"uniform": [0.1, 0.5]}},
    }
    second = search_of(tree, tmp_path / "coco", trials=4, **NO_STOP)
    (tmp_path / "coco").mkdir()
    warm = warm_points(second, str(tmp_path / "voc"), 2)
    assert [p["train.lr"] for _, p in warm] == [rate for rate in best if rate <= 0.9 * best[0]][:2]
    assert all(p["method.contrast.keep"] == 0.35 for _, p in warm)
    study = open_study(
        second.space, second.out, create=True, objectives=second.objectives, steps=second.steps, planned=False
    )
    plan(study, second.space, warm)
    with Lease(study) as lease:
        from tuning.ledger.ledger import Ledger
        from tuning.ledger.trial_queue import TrialQueue

        found = Ledger(TrialQueue(study, second, lease))
        tasks = [found.take(str(k)) for k in range(3)]
    assert [t["point"] for t in tasks[:2]] == [p for _, p in warm]
    assert study.get_trials()[0].user_attrs["from"].startswith("warm: voc trial ")
