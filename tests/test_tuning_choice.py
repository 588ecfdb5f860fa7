"""How a search chooses without Ray: samplers, pruners, seeds, constraints, budgets."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from tests.searches import NO_STOP, SOUND, ledger, load, play, report, search_of, states
from tuning.ledger.noise import noise_of
from tuning.study.lease import Lease
from tuning.study.record import collapsed, read_trials
from tuning.study.study import open_study

# -- samplers and pruners ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "trials"), [("random", 24), ("tpe", 24), ("gp", 12), ("cmaes", 24), ("nsga2", 24)])
def test_every_sampler_finds_a_simple_optimum(name: str, trials: int, tmp_path: Path) -> None:
    search = search_of(
        {
            **SOUND,
            "search": {
                "train.lr": {"loguniform": [1e-5, 1e-1]},
                "method.contrast.keep": {"uniform": [0.05, 0.8]},
                "method.uncertainty.radius": {"int": [2, 16], "step": 2},
            },
        },
        tmp_path,
        trials=trials,
        sampler=name,
        **NO_STOP,
    )

    def score(point: Any, *_: int) -> float:
        assert point["method.uncertainty.radius"] % 2 == 0
        return 1 - abs(math.log10(point["train.lr"]) + 3) / 2 - abs(point["method.contrast.keep"] - 0.4)

    with ledger(search) as found:
        while play(found, "t", score) != "FINISHED":
            pass
        assert Counter(states(found.study)) == {"COMPLETE": trials}
        assert found.study.best_value > 0.55
        # A point that comes again has another seed.
        runs = [(*t.params.values(), *t.user_attrs["runs"]) for t in found.study.get_trials()]
        assert len(set(runs)) == trials and len({run[:-1] for run in runs}) >= 8


def test_a_grid_is_run_once_each_and_in_order(tmp_path: Path) -> None:
    tree = {
        **SOUND,
        "search": {"train.global_batch": {"choice": [4, 8]}, "method.contrast.keep": {"choice": [0.2, 0.4]}},
    }
    search = search_of({k: v for k, v in tree.items() if k != "trials"}, tmp_path, sampler="grid", **NO_STOP)
    with ledger(search) as found:
        points = []
        while isinstance(task := play(found, "t", lambda *_: 0.1), dict):
            points.append(tuple(task["point"].values()))
    assert points == [(4, 0.2), (4, 0.4), (8, 0.2), (8, 0.4)]


def test_conditional_axes_are_sampled_where_they_count(tmp_path: Path) -> None:
    weighting, u_min = "method.uncertainty.weighting", "method.uncertainty.u_min"
    tree = {
        **SOUND,
        "search": {
            weighting: {"choice": ["inverse_exp", "none"]},
            u_min: {"loguniform": [0.01, 0.2], "when": {weighting: "inverse_exp"}},
        },
    }
    search = search_of(tree, tmp_path, trials=16, **NO_STOP)
    with ledger(search) as found:
        while play(found, "t", lambda point, *_: point.get(u_min, 0.05)) != "FINISHED":
            pass
        for trial in found.study.get_trials():
            assert (u_min in trial.params) == (trial.params[weighting] == "inverse_exp")
        assert {t.params[weighting] for t in found.study.get_trials()} == {"inverse_exp", "none"}


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    from tuning.study.record import pareto

    search = search_of(SOUND, tmp_path, trials=16, objective=["seg_miou", "step_s"], sampler="nsga2", **NO_STOP)

    def score(point: Any, *_: int) -> dict[str, float]:
        good = 0.5 - abs(math.log10(point["train.lr"]) + 3) / 4
        return {"seg_miou": good, "step_s": point["train.global_batch"] / 10 + good}

    with ledger(search) as found:
        while play(found, "t", score) != "FINISHED":
            pass
        assert [d.name for d in found.study.directions] == ["MAXIMIZE", "MINIMIZE"]
        front = {r.number for r in pareto(read_trials(found.study, search.objectives), search.objectives)}
        assert front == {t.number for t in found.study.best_trials}


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_every_scheduler_stops_the_weak_and_remembers_over_drivers(name: str, tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=30, scheduler={"name": name, "grace_steps": 3, "reduction_factor": 3})

    def score(point: Any, seed: int, step: int) -> float:
        return 0.5 + 0.01 * step - abs(math.log10(point["train.lr"]) + 3)

    for part in range(3):  # a new driver after every ten trials: rungs are in the storage
        with ledger(search, create=part == 0) as found:
            for k in range(10):
                play(found, f"{part}-{k}", score)
    study = load(search)
    found = Counter(states(study))
    assert found["PRUNED"] >= (3 if name == "hyperband" else 6) and found["COMPLETE"] >= 1 and sum(found.values()) == 30
    last = {t.number: max(t.intermediate_values) for t in study.get_trials()}
    for trial in study.get_trials():
        assert (last[trial.number] == 9) == (trial.state == TrialState.COMPLETE) or name == "median"
        assert trial.value == trial.intermediate_values[last[trial.number]]
    kept = [t.params["train.lr"] for t in study.get_trials(states=(TrialState.COMPLETE,))]
    lost = [t.params["train.lr"] for t in study.get_trials(states=(TrialState.PRUNED,))]
    far = lambda rates: sum(abs(math.log10(r) + 3) for r in rates) / len(rates)  # noqa: E731
    assert far(kept) < far(lost)
    if name == "asha":  # the first trial of a later session is judged by those before it
        later = [t for t in study.get_trials() if t.number >= 10]
        assert any(t.state == TrialState.PRUNED and max(t.intermediate_values) == 3 for t in later)


# -- seeds, constraints, budget -----------------------------------------------------------------------


def test_seeds_are_a_mean_and_a_standard_error_and_losers_are_spared(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=4, repeats={"seeds": 3}, **NO_STOP)
    scores = {0: (0.50, 0.52, 0.54), 1: (0.53, 0.51, 0.55), 2: (0.20, 0.2, 0.2), 3: (0.51, 0.53, 0.52)}
    with ledger(search) as found:
        for k in range(4):
            play(found, str(k), lambda point, seed, step, k=k: scores[k][seed])
        rows = read_trials(found.study, search.objectives)
    assert [r.state for r in rows] == ["COMPLETE"] * 4
    assert [len(r.runs) for r in rows] == [3, 3, 1, 3]
    assert rows[0].value == pytest.approx(0.52) and rows[0].stderr == pytest.approx(0.02 / math.sqrt(3))
    assert rows[2].note.startswith("seeds left out after 1: ")
    # Seed by seed: the differences -0.03, 0.01, -0.01 leave 0.02 / √2 for each, and trial 1 had 0.53 on seed 0.
    noise = noise_of([{0: 0.5, 1: 0.52, 2: 0.54}, {0: 0.53, 1: 0.51, 2: 0.55}])
    assert noise.deviation == pytest.approx(0.02) and noise.paired is not None
    assert noise.paired.deviation == pytest.approx(0.02 / math.sqrt(2))
    assert rows[2].note == "seeds left out after 1: 16.5 standard errors behind, seed by seed"


def test_a_seed_that_is_low_for_all_leaves_nobody_out(tmp_path: Path) -> None:
    """Seeds are apart by twenty points; a trial that is behind by one point on its first seed gets its second."""
    search = search_of(SOUND, tmp_path, trials=5, repeats={"seeds": 2}, **NO_STOP)
    scores = {0: (0.30, 0.50), 1: (0.31, 0.52), 2: (0.305, 0.50), 3: (0.30, 0.51), 4: (0.25, 0.45)}
    with ledger(search) as found:
        for k in range(5):
            play(found, str(k), lambda point, seed, step, k=k: scores[k][seed])
        rows = read_trials(found.study, search.objectives)
    assert [len(r.runs) for r in rows] == [2, 2, 2, 2, 1]
    assert rows[4].note.endswith("standard errors behind, seed by seed")


def test_what_learning_nothing_gives_is_kept_with_the_scores(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=2, **NO_STOP)
    beside = {"seg_background_miou": 0.12, "tag_prevalence": 0.25}
    with ledger(search) as found:
        for k, score in enumerate((0.12, 0.3)):
            told = {"seg_miou": score, "cam_miou": 0.2, **beside, "collapsed": float(score <= 0.12)}
            play(found, str(k), lambda *_, told=told: told)
        rows = read_trials(found.study, search.objectives)
    assert all(beside.items() <= r.metrics.items() for r in rows)
    assert [collapsed(r.runs) for r in rows] == [True, False]


def test_without_skipping_every_seed_runs(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=3, repeats={"seeds": 2, "skip": False}, **NO_STOP)
    with ledger(search) as found:
        for k in range(3):
            play(found, str(k), lambda point, seed, step, k=k: 0.5 - 0.2 * k + 0.01 * seed)
        assert [len(r.runs) for r in read_trials(found.study, search.objectives)] == [2, 2, 2]


def test_an_orphan_repeats_no_seed_that_has_ended(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=1, repeats={"seeds": 2}, **NO_STOP)
    with ledger(search) as found:
        found.take("a")
        for step in (3, 6, 9):
            found.judge("a", report(step, 0.4))
        found.judge("a", report(9, 0.4, ended=True))
        found.leave()
    with ledger(search, create=False) as found:
        task = found.take("b")
        assert task["before"] == {"0": 9.0}
        found.judge("b", report(9, 0.4, ended=True))  # read from its checkpoint, not trained again
        assert not found.judge("b", report(9, 0.6, seed=1, ended=True))
        found.end("b")
        (trial,) = found.study.get_trials()
    assert trial.value == pytest.approx(0.5) and trial.intermediate_values == {3: 0.4, 6: 0.4, 9: 0.4}


def test_a_trial_over_a_limit_is_stopped_and_never_the_best(tmp_path: Path) -> None:
    from tuning.study.record import best_trial

    search = search_of(SOUND, tmp_path, trials=12, constraints={"step_s": 0.5}, **NO_STOP)

    def score(point: Any, seed: int, step: int) -> dict[str, float]:
        slow = point["train.global_batch"] == 8
        return {"seg_miou": 0.9 if slow else 0.4, "step_s": 0.8 if slow else 0.2}

    with ledger(search) as found:
        while play(found, "t", score) != "FINISHED":
            pass
        rows = read_trials(found.study, search.objectives)
        broken = [r for r in rows if r.violation]
        assert broken and all(r.state == "PRUNED" and r.params["train.global_batch"] == 8 for r in broken)
        assert broken[0].note == "step_s 0.8 is over the limit of 0.5" and broken[0].step == 3
        assert best_trial(rows, search.objectives[0]).params["train.global_batch"] == 4
        # The sampler has learned it: the last ones keep the limit.
        assert [r.params["train.global_batch"] for r in rows[-3:]].count(4) >= 2
        assert found.study.best_value == 0.4


@pytest.mark.parametrize(("name", "trials"), [("gp", 14), ("nsga2", 24)])
def test_samplers_that_learn_from_complete_trials_alone_learn_a_limit(name: str, trials: int, tmp_path: Path) -> None:
    tree = {**SOUND, "search": {"train.lr": {"uniform": [0.001, 0.1]}, "method.contrast.keep": {"uniform": [0.1, 0.8]}}}
    search = search_of(tree, tmp_path, trials=trials, sampler=name, constraints={"step_s": 0.5}, **NO_STOP)

    def score(point: Any, seed: int, step: int) -> dict[str, float]:
        return {"seg_miou": point["method.contrast.keep"], "step_s": 10 * point["train.lr"]}

    with ledger(search) as found:
        while play(found, "t", score) != "FINISHED":
            pass
        rows = read_trials(found.study, search.objectives)
    late = [bool(r.violation) for r in rows[trials // 2 :]]
    assert sum(late) <= trials // 6  # at random, half of them
    assert all(r.step == 3 and r.state == "COMPLETE" for r in rows if r.violation)


@pytest.mark.parametrize("limit", ["hours", "gpu_hours", "cpu_hours"])
def test_a_spent_budget_starts_nothing_new(limit: str, tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, budget={"trials": 5, limit: 0.5}, **NO_STOP)
    study = open_study(search.space, search.out, create=True, objectives=search.objectives, steps=search.steps)
    from tuning.ledger.ledger import Ledger
    from tuning.ledger.trial_queue import TrialQueue

    with Lease(study) as lease:
        found = Ledger(TrialQueue(study, search, lease), cpus=2.0, gpus=2.0)
        play(found, "0", lambda *_: 0.1)
        running = found.take("1")
        if limit == "hours":
            study.set_user_attr("session:before", {"id": "before", "started": 1.0, "seen": 1801.0, "ended": True})
        else:
            found.jobs["1"].before = 901.0  # 901 s × 2 of them are half an hour
            found.jobs["1"].hold(2.0, 2.0)
        assert found.take("2") == "FINISHED"
        assert found.halted.startswith(f"budget.{limit} is spent: 0.50 of 0.5")
        assert not found.judge("1", report(9, 0.2, ended=True))  # what runs is finished
        found.end("1")
        assert found.take("2") == "FINISHED"
    assert isinstance(running, dict)
    assert states(load(search)) == ["COMPLETE", "COMPLETE", "WAITING", "WAITING", "WAITING"]


def test_a_search_in_which_nothing_works_is_stopped_with_the_reason(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=20)
    with ledger(search) as found:
        for k in range(3):
            found.take(str(k))
            found.judge(str(k), {"error": f"shard /data/{k}/x.parquet: row {k} cannot be decoded"})
            found.end(str(k))
        assert found.take("3") == "FINISHED"
        assert found.halted == (
            "3 trials in a row failed alike, and none has worked: shard /data/2/x.parquet: row 2 cannot be decoded"
        )
    assert Counter(states(load(search))) == {"FAIL": 3, "WAITING": 17}


def test_failures_of_different_kinds_stop_nothing(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=20)
    with ledger(search) as found:
        for k, why in enumerate(("out of memory", "not a number", "out of memory", "not a number")):
            found.take(str(k))
            found.judge(str(k), {"error": why})
            found.end(str(k))
        assert isinstance(found.take("4"), dict)
