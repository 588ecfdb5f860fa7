"""What the benchmark of searches counts: compute, true values, noise as measured, seconds outside training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna", reason="Optuna is not installed")

from bench import __main__ as program
from bench import search as bench_search
from bench.measure import matches
from bench.search import Found, World, costs, named, play, reached
from bench.surrogate import DATA, SPACE, Curve, Measured, Surrogate, collect, main, repeats_space, unit
from tests.searches import ledger
from tuning.ledger.ledger import Ledger
from tuning.space.options import Objective
from tuning.space.search import Search
from tuning.space.space_file import build_space
from tuning.study.record import Run, TrialRow
from ugrl.storage import place

STEPS = (60, 120, 180, 240)
# Covariance along the curve: neighbours share most of their noise.
NOISE = 0.02**2 * (0.25 * np.eye(4) + 0.75)


@pytest.fixture(scope="module")
def known() -> tuple[Measured, np.ndarray]:
    """Runs of a function that two of the values decide, and their values without noise."""
    space = build_space(SPACE)
    rng = np.random.default_rng(3)
    points = []
    for row in rng.random((90, len(space.search))):
        point = {}
        for axis, u in zip(space.search, row, strict=True):
            if axis.kind == "choice":
                point[axis.path] = axis.options[int(u * len(axis.options))]
            else:
                ends = np.log([axis.low, axis.high]) if axis.log else np.array([axis.low, axis.high])
                value = ends[0] + u * (ends[1] - ends[0])
                point[axis.path] = float(np.exp(value) if axis.log else value)
        points.append(point)
    x = unit(space.search, points)
    height = 0.3 - 0.4 * (x[:, 0] - 0.6) ** 2 + 0.05 * np.sin(4 * x[:, 4])
    truth = height[:, None] * np.array([0.3, 0.6, 0.9, 1.0])
    noisy = truth + rng.multivariate_normal(np.zeros(4), NOISE, len(points))
    runs = tuple(Curve(p, 0, tuple(map(float, y)), 1.0) for p, y in zip(points, noisy, strict=True))
    return Measured(space, "seg_miou", STEPS, runs), truth


@pytest.fixture(scope="module")
def fitted(known: tuple[Measured, np.ndarray]) -> Surrogate:
    return Surrogate(known[0])


@pytest.fixture(scope="module")
def measured() -> Surrogate:
    return Surrogate(Measured.load(DATA))


# --- the surrogate ------------------------------------------------------------------------------------------------


def test_the_process_finds_the_function_and_the_noise(known: tuple[Measured, np.ndarray], fitted: Surrogate) -> None:
    data, truth = known
    assert np.sqrt(((fitted.truth([c.point for c in data.curves]) - truth) ** 2).mean()) < 0.5 * 0.02
    deviation = np.sqrt(np.diag(fitted.noise_SS))
    assert deviation == pytest.approx([0.02] * 4, rel=0.3)
    assert fitted.noise_SS[0, 3] / (deviation[0] * deviation[3]) == pytest.approx(0.75, abs=0.15)
    assert sorted(np.argsort(fitted.lengths_D)[:2]) == [0, 4]  # the two values that matter


def test_simulated_noise_is_as_large_as_measured(measured: Surrogate, fitted: Surrogate) -> None:
    drawn = np.array([fitted.noise(0.25, np.random.default_rng((0, k))) for k in range(4000)])
    wanted = np.outer(fitted.noise_scale(0.25), fitted.noise_scale(0.25)) * fitted.noise_SS
    assert np.cov(drawn.T) == pytest.approx(wanted, abs=0.1 * np.diag(wanted).max())
    assert drawn.mean(0) == pytest.approx(np.zeros(4), abs=0.002)
    assert (fitted.noise(0.25, np.random.default_rng((0, 7))) == drawn[7]).all()
    # Over the measured runs, simulated ones are as noisy as the process says that they are.
    truth = measured.truth([c.point for c in Measured.load(DATA).curves])[:, -1]
    assert np.mean([measured.noise_scale(v) ** 2 for v in truth], 0) == pytest.approx(np.ones(4), abs=0.3)


def test_noise_is_larger_where_it_was_measured_to_be(known: tuple[Measured, np.ndarray], fitted: Surrogate) -> None:
    assert fitted.noise_scale(0.2) == pytest.approx(fitted.noise_scale(0.3), rel=0.35)
    data, truth = known
    calm = [
        Curve(c.point, 0, tuple(map(float, t if t[-1] < 0.25 else c.scores)), 1.0)
        for c, t in zip(data.curves, truth, strict=True)
    ]
    made = Surrogate(Measured(data.space, data.objective, STEPS, tuple(calm)), fixed=fitted.parameters)
    assert (made.noise_scale(0.2) < 0.7 * made.noise_scale(0.3)).all()


def test_the_process_reproduces_the_measured_runs_within_their_noise() -> None:
    data = Measured.load(DATA)
    made = Surrogate(data)
    far = np.sqrt(((data.y_NS - made.truth([c.point for c in data.curves])) ** 2).mean(0))
    assert (far < 1.2 * np.sqrt(np.diag(made.noise_SS))).all()
    assert made.explained()[-1] > 0.0  # better than a constant where it has not looked


def test_a_run_left_out_is_predicted_without_the_others_of_its_point(known: tuple[Measured, np.ndarray]) -> None:
    data = known[0]
    twice = Measured(data.space, data.objective, STEPS, data.curves[:30] + data.curves[:1])
    made = Surrogate(twice, fixed=Surrogate(data).parameters)
    assert made.left_out()[0] == pytest.approx(made.left_out()[-1])
    deviation, degrees = twice.repeated_deviation()
    assert degrees == 1 and deviation == pytest.approx(np.zeros(4))


def test_the_file_keeps_what_was_measured(tmp_path: Path, known: tuple[Measured, np.ndarray]) -> None:
    known[0].save(tmp_path / "x.json")
    back = Measured.load(tmp_path / "x.json")
    assert back.x_ND == pytest.approx(known[0].x_ND, abs=1e-3) and back.y_NS == pytest.approx(known[0].y_NS, abs=1e-4)
    assert back.space == known[0].space and back.steps == STEPS
    assert DATA.stat().st_size < 200_000


def test_the_space_of_the_file_is_the_one_that_is_simulated() -> None:
    assert Measured.load(DATA).space.search == build_space(SPACE).search
    assert dict(Measured.load(DATA).space.overrides) == SPACE["overrides"]


def test_curves_are_collected_from_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.searches import play as whole

    assert main(["space"]) == 0 and "train.lr" in capsys.readouterr().out
    search = _search(tmp_path, {"budget": {"trials": 3}})
    (tmp_path / "space.yaml").write_text(search.space.to_yaml())
    (tmp_path / "base.yaml").write_text("name: shapes\n" + _base(search))
    with ledger(search) as found:
        whole(found, "a", lambda point, seed, step: step / 1000, steps=STEPS)
        whole(found, "b", lambda point, seed, step: step / 500, steps=STEPS[:2])  # ended, but with a hole
    data = collect([tmp_path])
    assert [c.scores for c in data.curves] == [(0.06, 0.12, 0.18, 0.24)]
    assert data.steps == STEPS and data.objective == "seg_miou"
    again = repeats_space(data, points=1, seeds=3)
    assert again["first"] == [dict(data.curves[0].point)] and build_space(again).repeats.seeds == 3


def _base(search: Search) -> str:
    import yaml

    from ugrl import config as configs

    tree = configs.to_dict(search.base)
    tree.pop("name")
    return yaml.safe_dump(tree, sort_keys=False)


# --- compute ------------------------------------------------------------------------------------------------------


def _search(out: Path, changes: dict) -> Search:
    space = build_space(SPACE | changes)
    return Search(space, space.base(), place(out / "shards"), (Objective("seg_miou"),), out)


def simulate(tmp_path: Path, curves: list[tuple[float, ...]], *, slots: int, **changes: object) -> dict[int, int]:
    """Play a study whose k-th trial has the k-th curve; trial → compute when it came to its end."""
    points: dict[int, dict] = {}

    def run(point, number):
        points[number] = dict(point)
        return curves[number]

    with ledger(_search(tmp_path, {"budget": {"trials": len(curves)}, **changes})) as made:
        assert isinstance(made, Ledger)
        found = play(made, run, STEPS, slots=slots, until=lambda *_: False)
        done = [t.number for t in made.study.trials if t.state.name == "COMPLETE"]
    numbers = {tuple(p.items()): k for k, p in points.items()}
    by_number = {numbers[tuple(f.point.items())]: f for f in found}
    assert sorted(by_number) == done and all(f.score == curves[k][-1] for k, f in by_number.items())
    return {k: f.compute for k, f in by_number.items()}


CURVES = [(0.1, 0.2, 0.2, 0.2), (0.1, 0.1, 0.1, 0.9), (0.1, 0.3, 0.4, 0.5)]


def test_compute_of_whole_trials(tmp_path: Path) -> None:
    assert simulate(tmp_path, CURVES, slots=1) == {0: 240, 1: 480, 2: 720}


def test_compute_of_all_slots(tmp_path: Path) -> None:
    # Side by side, trials 0 and 1 end at the same moment, when both slots have made their steps.
    assert simulate(tmp_path, CURVES, slots=2) == {0: 480, 1: 480, 2: 960}


def test_a_stopped_trial_costs_what_it_trained(tmp_path: Path) -> None:
    # Trial 1 is stopped at step 120, below trial 0: the third one ends at 240 + 120 + 240.
    assert simulate(tmp_path, CURVES, slots=1, scheduler=bench_search.ASHA) == {0: 240, 2: 600}


def test_when_a_target_is_reached() -> None:
    found = [Found(240, {"v": 0.1}, 0.4), Found(480, {"v": 0.3}, 0.2), Found(720, {"v": 0.2}, 0.5)]

    def value(point):
        return point["v"]

    assert reached(found, value, 0.2, 999) == 480
    assert reached(found, value, 0.4, 999) == 999
    # What the search would name is the best by the score, which is noisy.
    assert [named(found, value, c) for c in (240, 480, 720)] == [0.1, 0.1, 0.2]


def test_a_simulated_search_is_a_function_of_its_seed(tmp_path: Path, fitted: Surrogate) -> None:
    world = World(fitted, "seg_miou", tmp_path)
    most = 12 * STEPS[-1]

    def go(seed: int) -> list[Found]:
        return world.search(bench_search.METHODS["search/tpe-asha"], seed, lambda compute, _: compute >= most)

    one = go(1)
    assert one == go(1) != go(2)
    assert 0 < len(one) < 14 and all(0 < world.final(f.point) < 0.5 for f in one)


# --- overhead -----------------------------------------------------------------------------------------------------


def row(number: int, started: float, ended: float, trained: float) -> TrialRow:
    return TrialRow(number, "COMPLETE", runs=(Run(0, seconds=trained),), started=started, ended=ended)


def test_seconds_outside_training() -> None:
    # Slot one: 10 s with 4 of training, a pause of 1 s, then 5 s with 3 of training; slot two: 8 s with 6, 8 s with 7.
    rows = [row(0, 100, 110, 4), row(1, 100, 108, 6), row(2, 108, 116, 7), row(3, 111, 116, 3)]
    found = costs(rows, 2)
    assert found.first == (6, 2) and found.later == (1, 3)
    assert found.busy == pytest.approx(20 / 32)


def test_the_registry_knows_the_entries() -> None:
    for name, names in (("search", bench_search.NAMES), ("tuning", bench_search.overhead.NAMES)):
        module = program._load(name)
        assert module.NAMES == names and callable(module.entries)
        assert all(matches(n, name) for n in names)
        assert name in program.QUICK_SECONDS and name in str(program.__doc__)
