"""Trials against a reference seed by seed: which are paired, what the picture and its table say."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from tests.story import STEPS, Story, plots, report
from tuning.report import differences as module
from tuning.report import plots as plots_module
from tuning.report.differences import Comparison, caption, compare, difference_table, differences
from tuning.report.read import Finalist
from tuning.study.record import Run
from ugrl import config as configs

SETTINGS = {"method.setting": {"choice": ["Base", "I", "II", "III", "IV"]}}
KEEP = {"method.contrast.keep": {"uniform": [0.05, 0.8]}}
# Student's t, 97.5 %, for 1 and 2 degrees of freedom, from a printed table.
T1, T2 = 12.706, 4.303


def tree(value: float, name: str = "seg_miou", *, final: float | None = None, ended: bool = True) -> dict[str, Any]:
    """A run as the record keeps it."""
    untouched = {} if final is None else {name: final}
    return {"value": value, "step": STEPS, "metrics": {name: value}, "final": untouched, "ended": ended}


def put(
    story: Story, runs: Mapping[int, float | dict[str, Any]], state: str = "COMPLETE", *, violation: bool = False,
    **given: Any,
) -> int:  # fmt: skip
    """A trial with the given value of each seed; its number."""
    name = story.objectives[0].name
    trees = {str(s): v if isinstance(v, dict) else tree(v, name) for s, v in runs.items()}
    attrs: dict[str, Any] = {"runs": trees} | ({"violation": {"gflop": 9.0}} if violation else {})
    told = None if state == "FAIL" else [statistics.fmean(t["metrics"][name] for t in trees.values())]
    return story.add(state, values=told, attrs=attrs, **given)


def grid(out: Path, **changes: Any) -> Story:
    given = {"search": SETTINGS, "first": [], "paper": "table3", "scheduler": {"name": "none"}, "split": "val"}
    return Story(out, **(given | changes))


def found_in(story: Story) -> Comparison:
    found = compare(story.findings())
    assert found is not None
    return found


def gaps(found: Comparison) -> dict[int, dict[int, float]]:
    """Trial → seed → difference, in points."""
    return {p.row.number: {s: round(v, 6) for s, v in p.gaps.items()} for p in found.pairs}


# -- numbers ----------------------------------------------------------------------------------


def test_a_difference_its_mean_and_its_interval_are_those_of_the_shared_seeds(tmp_path: Path) -> None:
    story = grid(tmp_path)
    put(story, {0: 0.41, 1: 0.53, 2: 0.65}, setting="II")
    put(story, {0: 0.40, 1: 0.50, 2: 0.60}, setting="Base")
    put(story, {0: 0.42, 1: 0.50}, setting="I")
    found = found_in(story)
    assert (found.reference.number, found.name, found.left_out) == (1, "setting Base (trial 1)", 0)
    # The order of the searched value, not of the means.
    assert gaps(found) == {2: {0: 2.0, 1: 0.0}, 0: {0: 1.0, 1: 3.0, 2: 5.0}}
    two, three = found.pairs
    # 1, 3, 5: mean 3, standard deviation 2. 2, 0: mean 1, standard deviation √2, standard error 1.
    assert three.mean == pytest.approx(3) and three.half == pytest.approx(T2 * 2 / 3**0.5, rel=1e-3)
    assert two.mean == pytest.approx(1) and two.half == pytest.approx(T1, rel=1e-3)


def test_trials_are_paired_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    story = grid(tmp_path)
    put(story, {0: 0.4, 1: 0.5, 2: 0.6}, setting="Base")
    put(story, {1: 0.52, 2: 0.63, 3: 0.9}, setting="I")
    put(story, {2: 0.9, 3: 0.9, 4: 0.9}, setting="II")  # shares one seed with the reference, which has no interval
    put(story, {0: 0.41, 1: 0.5, 2: tree(0.1, ended=False)}, setting="III")
    assert gaps(found_in(story)) == {1: {1: 2.0, 2: 3.0}, 3: {0: 1.0, 1: 0.0}}


def test_trials_that_have_no_score_of_their_own_are_left_out(tmp_path: Path) -> None:
    story = grid(tmp_path, search=KEEP, paper="")
    put(story, {0: 0.4, 1: 0.4}, keep=0.1)
    put(story, {0: 0.5, 1: 0.5}, "FAIL", keep=0.2)
    put(story, {0: 0.6, 1: 0.6}, "PRUNED", keep=0.3)
    put(story, {0: 0.7, 1: 0.7}, keep=0.4, violation=True)
    put(story, {0: 0.8, 1: 0.8}, "RUNNING", keep=0.6)
    assert compare(story.findings()) is None
    put(story, {0: 0.3, 1: 0.3}, keep=0.5)
    assert gaps(found_in(story)) == {5: {0: -10.0, 1: -10.0}}


# -- the reference ----------------------------------------------------------------------------


def test_the_reference_is_the_configurations_own_trial_or_else_the_best(tmp_path: Path) -> None:
    story = grid(tmp_path, search=KEEP, paper="")
    own = configs.get(story.search.base, "method.contrast.keep")
    put(story, {0: 0.4, 1: 0.4}, keep=0.1)
    put(story, {0: 0.5, 1: 0.5}, keep=0.2)
    found = found_in(story)
    assert found.name == "the best of these (trial 1)" and gaps(found) == {0: {0: -10.0, 1: -10.0}}
    assert "picked for its score" in caption(found, story.findings())
    put(story, {0: 0.3, 1: 0.3}, keep=own)
    found = found_in(story)
    assert found.name == "the configuration's own values (trial 2)"
    assert gaps(found) == {0: {0: 10.0, 1: 10.0}, 1: {0: 20.0, 1: 20.0}}
    assert "picked for its score" not in caption(found, story.findings())


def test_a_base_that_shares_no_seeds_is_no_reference(tmp_path: Path) -> None:
    story = grid(tmp_path)
    put(story, {7: 0.4, 8: 0.4}, setting="Base")
    put(story, {0: 0.4, 1: 0.4}, setting="I")
    put(story, {0: 0.5, 1: 0.5}, setting="II")
    found = found_in(story)
    assert found.reference.number == 2 and gaps(found) == {1: {0: -10.0, 1: -10.0}}


def test_finalists_are_compared_on_fresh_seeds_alone(tmp_path: Path) -> None:
    story = grid(tmp_path, search=KEEP, paper="", final={"best": 2, "seeds": 2}, split="tune_val")
    for k, keep in enumerate((0.1, 0.2, 0.3)):
        put(story, {0: 0.5 + 0.1 * k, 1: 0.5 + 0.1 * k}, keep=keep)
    rows = story.findings().rows

    def again(number: int, values: Mapping[int, float]) -> None:
        runs = tuple(Run.read(str(s), tree(v)) for s, v in values.items())
        story.finalists = [f for f in story.finalists if f.trial.number != number] + [Finalist(rows[number], runs)]

    again(1, {1000: 0.56})
    again(2, {1000: 0.54})
    assert set(gaps(found_in(story))) == {0, 1}  # one fresh seed so far: the search's own seeds
    again(1, {1000: 0.56, 1001: 0.57})
    again(2, {1000: 0.54, 1001: 0.53})
    found = found_in(story)
    assert found.name == "the best of these (trial 1)" and gaps(found) == {2: {1000: -2.0, 1001: -4.0}}


def test_beside_the_papers_table_the_split_is_that_of_the_table(tmp_path: Path) -> None:
    story = grid(tmp_path, split="tune_val")
    put(story, {s: tree(0.5, final=0.4) for s in (0, 1)}, setting="Base")
    put(story, {s: tree(0.5, final=0.43) for s in (0, 1)}, setting="I")
    found = found_in(story)
    assert gaps(found) == {1: {0: 3.0, 1: 3.0}} and "on split 'val'" in caption(found, story.findings())
    put(story, {0: 0.6, 1: 0.6}, setting="II")  # not measured there: the split that all of them have
    found = found_in(story)
    assert gaps(found)[1] == {0: 0.0, 1: 0.0} and "on split 'tune_val'" in caption(found, story.findings())


# -- the picture and the report ---------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other plots: drawing takes most of the time."""
    monkeypatch.setattr(plots_module, "PLOTS", {"differences": differences})


def test_the_picture_shows_each_seed_the_mean_and_its_interval(tmp_path: Path) -> None:
    story = grid(tmp_path)
    put(story, {0: 0.40, 1: 0.50, 2: 0.60}, setting="Base")
    put(story, {0: 0.41, 1: 0.53, 2: 0.65}, setting="I")
    put(story, {0: 0.42, 1: 0.52}, setting="IV")
    figure = differences(story.findings())
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    plt.close(figure)
    dots = {str(d.get_label()): d for d in ax.collections if isinstance(d, PathCollection)}
    seen = {n: [tuple(map(float, p)) for p in d.get_offsets().round(4)] for n, d in dots.items()}
    assert [x for x, _ in seen["seed 0"]] == [1.0, 2.0] and [x for x, _ in seen["seed 2"]] == [5.0]
    assert seen["mean"] == [(2.0, 1.0)] and seen["best: trial 1"] == [(3.0, 0.0)]
    assert seen["the paper's: trial 2"] == [(2.0, 1.0)]
    (low, high) = next(line.get_xdata() for line in ax.lines if line.get_url() == "1")
    assert (low, high) == (pytest.approx(3 - T2 * 2 / 3**0.5, rel=1e-3), pytest.approx(3 + T2 * 2 / 3**0.5, rel=1e-3))
    zero = [line for line in ax.lines if list(line.get_xdata()) == [0, 0]]
    assert len(zero) == 1 and zero[0].get_url() is None
    assert ax.get_xlabel() == "seg mIoU minus that of setting Base (trial 0), points"
    names = [t.get_text().replace("\u00a0", " ") for t in ax.get_yticklabels()]
    assert names == ["trial 1: setting I", "trial 2: setting IV"]


@pytest.mark.usefixtures("alone")
def test_the_report_has_the_picture_its_table_and_marks_that_answer(tmp_path: Path) -> None:
    story = grid(tmp_path / "out")
    put(story, {0: 0.40, 1: 0.50, 2: 0.60}, setting="Base")
    put(story, {0: 0.41, 1: 0.53, 2: 0.65}, setting="I")
    report(story)
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert plots(tmp_path / "out") == {"differences"} and text.count("](plots/differences.png)") == 1
    section = text.partition("## Seed by seed")[2].partition("\n## ")[0]
    assert "minus that of setting Base" in section and "on split 'val'" in section
    rows = [[c.replace("\\", "").strip() for c in row.split("|")[1:-1]] for row in section.splitlines() if "|" in row]
    assert rows[0] == ["trial", "values", "difference from trial 0, points", "95 % interval", "shared seeds"]
    assert rows[2] == ["0", "setting Base (reference)", "", "", ""]
    assert rows[3] == ["1", "setting I", "+3.00", "-1.97 … +7.97", "0, 1, 2"]
    (svg,) = re.findall(r'aria-label="differences">.*?(<svg.*?</svg>)', page, re.DOTALL)
    assert re.findall(r'<(\w+) data-t="1"', svg).count("circle") == 4 and 'polyline data-t="1"' in svg
    assert 'data-t="0"' not in svg


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("seeds", [((0,), (0,)), ((0, 1), (1, 2)), ((0, 1), (2, 3))])
def test_without_two_shared_seeds_there_is_no_picture_and_no_link(
    seeds: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    story = grid(tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "differences.png").write_bytes(b"of another time")
    for each, setting in zip(seeds, ("Base", "I"), strict=True):
        put(story, dict.fromkeys(each, 0.5), setting=setting)
    findings, shown = report(story)
    assert compare(findings) is None and plots(tmp_path) == set() and "differences" not in shown
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "Seed by seed" not in text and "differences.png" not in text


def test_of_many_trials_the_best_are_shown_and_the_caption_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    story = grid(tmp_path, search=KEEP | {"method.contrast.tau": {"uniform": [0.03, 1]}}, paper="")
    for k in (2, 0, 4, 1, 3, 5):
        put(story, {0: 0.3 + 0.01 * k, 1: 0.3 + 0.01 * k}, keep=0.3, tau=0.1 + 0.1 * k)
    findings = story.findings()
    found = found_in(story)
    assert found.reference.number == 5 and [p.row.number for p in found.pairs] == [2, 4, 0]
    assert caption(found, findings).endswith("2 trials with lower means are left out.")
    # A value that all of them share tells none of them from others.
    assert [row[1] for row in difference_table(found, findings)[1]] == [
        "tau 0.6 (reference)",
        "tau 0.5",
        "tau 0.4",
        "tau 0.3",
    ]
