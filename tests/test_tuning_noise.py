"""How sure a search's finding is: the noise of seeds, and what it explains. Studies are filled by hand."""

from __future__ import annotations

import math
import random
import statistics
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.story import STEPS, Story
from tuning.ledger.noise import Measure, Noise, difference, noise_of
from tuning.report.luck import Loss, by_luck, expected_best, loss, seed_noise
from tuning.report.read import Finalist, Findings
from tuning.report.sentences import verdict
from tuning.study.record import Run, TrialRow

# -- differences ------------------------------------------------------------------------------


def test_without_fresh_seeds_the_number_is_called_optimistic(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.fill(6)
    text = " ".join(verdict(story.findings()))
    assert "best of 4, picked for being the best, and therefore optimistic" in text
    assert "with one seed each the noise is not known" in text


def _runs(values: Mapping[int, float]) -> tuple[Run, ...]:
    return tuple(Run(s, STEPS, v, {"seg_miou": v}, final={"seg_miou": v - 0.1}) for s, v in values.items())


@pytest.mark.parametrize(
    ("gap", "words"), [(0.01, "within noise, the two cannot be told apart"), (0.1, "beyond noise")]
)
def test_the_second_is_judged_by_the_noise(gap: float, words: str, tmp_path: Path) -> None:
    story = Story(tmp_path, final={"best": 2})
    for _ in range(2):
        story.add(seeds=1)
    rows = story.findings().rows
    runs = [_runs({s + k: m + d for s, d in enumerate((-0.01, 0.0, 0.01))}) for k, m in ((0, 0.5), (10, 0.5 - gap))]
    story.finalists = [Finalist(rows[1], runs[0]), Finalist(rows[0], runs[1])]
    found = story.findings()
    assert found.best is not None and found.best.number == 1
    noise = seed_noise(found)
    assert noise.deviation == pytest.approx(0.01) and noise.freedom == 4 and noise.paired is None
    text = verdict(found)
    assert "50.00 ± 0.58 % on split 'tune_val' (3 fresh seeds), 40.00 ± 0.58 % on the untouched split 'val'" in text[0]
    second = next(t for t in text if t.startswith("Second"))
    assert words in second and f"{100 * gap:.2f} ± 0.82 points below: " in second


def test_on_the_same_seeds_a_difference_is_judged_seed_by_seed(tmp_path: Path) -> None:
    """Seeds are apart by ten points, and the two configurations by one on each of them."""
    story = Story(tmp_path, final={"best": 2})
    for _ in range(2):
        story.add(seeds=1)
    rows = story.findings().rows
    first = {1000: 0.40, 1001: 0.50, 1002: 0.60}
    second = {1000: 0.389, 1001: 0.490, 1002: 0.591}
    story.finalists = [Finalist(rows[0], _runs(first)), Finalist(rows[1], _runs(second))]
    noise = seed_noise(story.findings())
    assert noise.paired is not None and noise.freedom == 4 and noise.paired.freedom == 2
    assert noise.deviation == pytest.approx(0.1005, abs=1e-4)
    # The differences 0.011, 0.010, 0.009 have deviation 0.001, and a difference has the noise of both.
    assert noise.paired.deviation == pytest.approx(0.001 / math.sqrt(2))
    text = verdict(story.findings())
    assert any("1.00 ± 0.06 points below (seed by seed): beyond noise" in t for t in text)
    assert any("is 10.05 points (4 degrees of freedom), 0.07 (2) without what a seed does to all" in t for t in text)
    # With one seed of its own, the second is judged by what seeds do as a whole.
    story.finalists[1] = Finalist(rows[1], _runs({**second, 1003: 0.49}))
    assert any("points below: within noise" in t for t in verdict(story.findings()))


def test_rounding_is_no_difference_where_seeds_leave_no_noise() -> None:
    noise = Noise(0.1, 4, Noise(0.0, 2))
    a, b = (Measure("seg_miou", m, count=3, seeds=(0, 1, 2)) for m in (0.3 + 1e-12, 0.3))
    assert difference(a, b, noise).real is False
    assert difference(replace(a, mean=0.31), b, noise).real is True


def test_noise_with_gaps_in_the_table_is_that_of_least_squares(tmp_path: Path) -> None:
    """Three configurations, of which one has all seeds: what is added by configuration and by seed is no noise."""
    story = Story(tmp_path, final={"best": 3})
    for _ in range(3):
        story.add(seeds=1)
    rows, seed = story.findings().rows, {1: 0.3, 2: 0.1, 3: 0.25}
    tables = [(0.0, (1, 2)), (0.05, (2, 3)), (0.1, (1, 2, 3))]
    story.finalists = [
        Finalist(r, _runs({s: c + seed[s] for s in have})) for r, (c, have) in zip(rows, tables, strict=True)
    ]
    noise = seed_noise(story.findings())
    assert noise.paired is not None and noise.paired.freedom == 2
    assert noise.paired.deviation == pytest.approx(0, abs=1e-9) and noise.deviation > 0.05
    # Two configurations on two seeds tell too little of what is left.
    story.finalists = [Finalist(r, _runs({1: c, 2: c + 0.1})) for r, c in zip(rows[:2], (0.3, 0.4), strict=True)]
    assert seed_noise(story.findings()).paired is None


def test_the_best_of_many_equals_is_seen_as_luck() -> None:
    noise, normal = Noise(0.01, 16), statistics.NormalDist(0.5, 0.01 / math.sqrt(2))
    measures = [Measure("seg_miou", normal.inv_cdf((k + 0.5) / 16), count=2) for k in range(16)]
    top, low = max(measures, key=lambda m: m.mean), min(measures, key=lambda m: m.mean)
    # Taken by themselves the two ends look different; as ends of sixteen they are not.
    assert difference(top, low, noise).real
    assert by_luck(measures, noise) > 0.1
    assert by_luck([*measures, Measure("seg_miou", 0.6, count=2)], noise) < 0.01
    assert math.isnan(by_luck(measures, Noise()))
    # The same sixteen on the same two seeds, which do much the same to all of them.
    shared = [replace(m, seeds=(0, 1)) for m in measures]
    assert by_luck(shared, Noise(0.01, 16, Noise(0.001, 15))) < 0.01 < by_luck(measures, noise)


# -- what other seeds take away ---------------------------------------------------------------


def _made(story: Story, searched: list[dict[int, float]], fresh: Mapping[int, dict[int, float]]) -> Findings:
    """Findings of trials with these values by seed, and of these fresh runs of some of them."""
    rows = tuple(TrialRow(k, "COMPLETE", (statistics.fmean(v.values()),), _runs(v), {}) for k, v in enumerate(searched))
    again = [Finalist(rows[k], _runs(v)) for k, v in fresh.items()]
    again.sort(key=lambda f: -(f.value or 0))
    return replace(story.findings(), rows=rows, finalists=tuple(again))


def _told(findings: Findings) -> str:
    return next(t for t in verdict(findings) if t.startswith("In the search"))


def test_the_best_of_many_is_that_of_tables() -> None:
    # Harter, Expected values of normal order statistics, Biometrika 48 (1961).
    found = [expected_best(n) for n in (2, 3, 5, 10, 100)]
    assert found == pytest.approx([0.56419, 0.84628, 1.16296, 1.53875, 2.50759], abs=1e-5)


def test_a_drop_that_seeds_did_is_not_called_picking(tmp_path: Path) -> None:
    """Seed 0 gives all trials seven points; what is left between configurations is a tenth of a point."""
    searched = [{0: 0.40 + 0.07 + 0.01 * k} for k in range(4)]
    effect, rest = {1000: -0.01, 1001: 0.0, 1002: 0.01}, {1000: 0.001, 1001: -0.001, 1002: 0.0}
    fresh = {
        3: {s: 0.43 + effect[s] + rest[s] for s in effect},
        2: {s: 0.42 + effect[s] - rest[s] for s in effect},
    }
    found = _made(Story(tmp_path), searched, fresh)
    told = loss(found)
    assert told is not None and told.trials == 4 and told.lost == pytest.approx(0.07)
    # Two configurations on four seeds: three degrees of freedom; residuals ± 0.001 on two seeds of each.
    alike = math.sqrt(4 * 0.001**2 / 3)
    assert told.picked == pytest.approx(expected_best(4) * alike)
    # Fresh seeds are the same three for both finalists: two degrees of freedom, Student's t of 4.303.
    spread = math.sqrt((statistics.variance(fresh[3].values()) + statistics.variance(fresh[2].values())) / 2)
    assert told.seeds == pytest.approx(4.30265 * spread * math.sqrt(1 + 1 / 3), rel=1e-5)
    assert told.shared == pytest.approx(0.07) and told.explained is False
    assert _told(found) == (
        "In the search it had 50.00 % on seed 0; with fresh seeds it has 7.00 points less. Picking the best of 4 adds "
        "0.12 points on average at most, and other seeds alone move such a number by up to 4.99 points (19 cases of "
        "20): it is more than both together explain. The 2 finalists lost 7.00 points on average, which picking does "
        "not explain: it is the search's own seed, which all its trials shared."
    )


def test_a_drop_that_picking_did_is_not_laid_on_the_seed(tmp_path: Path) -> None:
    """Sixteen equals whose scores differ by noise alone; fresh seeds bring the first two back to the mean."""
    scores = [statistics.NormalDist(0.4, 0.01).inv_cdf((k + 0.5) / 16) for k in range(16)]
    fresh = {
        15: {1000: 0.41, 1001: 0.39, 1002: 0.403},
        14: {1000: 0.392, 1001: 0.41, 1002: 0.398},
    }
    found = _made(Story(tmp_path), [{0: s} for s in scores], fresh)
    told = loss(found)
    assert told is not None and told.explained is True and told.shared is None
    assert told.lost == pytest.approx(scores[15] - 0.401) and 0.01 < told.picked < 0.03
    assert "both together explain it." in _told(found) and "own seed" not in _told(found)


def test_what_is_said_of_a_drop_holds_where_the_model_does(tmp_path: Path) -> None:
    """Trials that are equally good, seeds that matter: both explain the drop in 19 of 20 searches, and the average of
    what is lost without what seeds do is no more than what picking adds."""
    story, draw = Story(tmp_path), random.Random(3)
    told: list[Loss] = []
    own = []
    for _ in range(200):
        seeds = {s: draw.gauss(0, 0.02) for s in (0, 1000, 1001, 1002)}
        searched = [{0: 0.4 + seeds[0] + draw.gauss(0, 0.01)} for _ in range(8)]
        best = sorted(range(8), key=lambda k: -searched[k][0])[:2]
        fresh = {k: {s: 0.4 + seeds[s] + draw.gauss(0, 0.01) for s in (1000, 1001, 1002)} for k in best}
        found = loss(_made(story, searched, fresh))
        assert found is not None
        told.append(found)
        own.append(found.lost - seeds[0] + statistics.fmean(seeds[s] for s in (1000, 1001, 1002)))
    assert statistics.fmean(bool(t.explained) for t in told) >= 0.93
    assert 0.005 < statistics.fmean(own) <= statistics.fmean(t.picked for t in told) * 1.05


@pytest.mark.parametrize("searched", [[0.3], [0.3, 0.3]], ids=["one trial", "a tie of two"])
def test_where_scores_picked_nothing_nothing_is_said_of_picking(searched: list[float], tmp_path: Path) -> None:
    fresh = {0: {1000: 0.21, 1001: 0.25}}
    found = _made(Story(tmp_path), [{0: s} for s in searched], fresh)
    told = loss(found)
    assert told is not None and told.picked == 0.0 and told.trials == 1
    text = " ".join(verdict(found))
    assert "7.00 points less. Other seeds alone move such a number by up to" in text and "icking" not in text
    # Nothing was run again: nothing is optimistic about a tie.
    text = " ".join(verdict(replace(found, finalists=())))
    assert "optimistic" not in text and ("all 2 complete trials have the same score" in text) == (len(searched) == 2)


@pytest.mark.parametrize(
    ("fresh", "words"),
    [
        ({0: {1000: 0.25}}, "5.00 points less. With one seed each it is not known how much of that is chance."),
        ({0: {1000: 0.34, 1001: 0.36}}, "5.00 points more. Other seeds alone move such a number by up to 22.01 points"),
        ({0: {1000: 0.3}}, "with fresh seeds it has the same."),
        ({0: {1000: 0.29999, 1001: 0.29999}}, "it is more than both together explain."),
    ],
)
def test_a_change_in_words(fresh: dict[int, dict[int, float]], words: str, tmp_path: Path) -> None:
    assert words in _told(_made(Story(tmp_path), [{0: 0.3}, {0: 0.2}], fresh))


def test_without_fresh_seeds_how_optimistic_is_told_where_the_noise_is_known(tmp_path: Path) -> None:
    values = [{0: 0.40, 1: 0.42}, {0: 0.38, 1: 0.36}]
    text = " ".join(verdict(_made(Story(tmp_path), values, {})))
    # Two seeds of two configurations leave too little of a remainder: the whole noise, √2 / 100, over √2 seeds.
    assert "therefore optimistic, by 0.56 points on average at most." in text


@pytest.mark.parametrize("seed", range(4))
def test_the_noise_of_pairs_is_that_of_a_fit_with_a_column_for_each_configuration(seed: int) -> None:
    draw = random.Random(seed)
    groups = [{s: draw.gauss(k + s, 1.0) for s in draw.sample(range(9), draw.randint(1, 5))} for k in range(12)]
    groups += [{100 + k: draw.random(), 0: draw.random()} for k in range(3)]  # seeds that nobody shares
    several = [g for g in groups if len(g) > 1]
    cells = [(k, s, v) for k, g in enumerate(several) for s, v in g.items()]
    seeds = sorted({s for _, s, _ in cells})
    table = np.zeros((len(cells), len(several) + len(seeds)))
    for row, (k, s, _) in enumerate(cells):
        table[row, k] = table[row, len(several) + seeds.index(s)] = 1.0
    values = np.array([v for *_, v in cells])
    fitted, _, rank, _ = np.linalg.lstsq(table, values, rcond=None)
    found = noise_of(groups).paired
    assert found is not None and found.freedom == len(cells) - rank
    assert found.deviation == pytest.approx(math.sqrt(np.square(values - table @ fitted).sum() / found.freedom))


def test_the_noise_of_many_configurations_takes_memory_as_they_are_many() -> None:
    def peak(count: int) -> int:
        groups = [{s: k + 0.1 * s * k for s in range(3)} for k in range(count)]
        tracemalloc.start()
        noise_of(groups)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(1600) < 6 * peak(400)
