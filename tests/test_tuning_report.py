"""The report of a search, made of studies that were filled by hand: its numbers, its files and its page."""

from __future__ import annotations

import cProfile
import html
import math
import pstats
import random
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.story import SPACE, STEPS, Story, csv_rows, plots, report
from tuning.report import drawing, files, sections
from tuning.report import plots as plots_module
from tuning.report.files import write_csv
from tuning.report.findings import cost, paper_trial
from tuning.report.page import write_html, write_markdown
from tuning.report.paper import paper_section, spearman
from tuning.report.plots import draw, importance
from tuning.report.read import Findings
from tuning.report.sections import contents
from tuning.report.sentences import paper_sentence, verdict
from tuning.space.options import Objective
from tuning.study.record import TrialRow, pareto
from ugrl import config as configs
from ugrl.storage import Place
from ugrl.text import markdown

EVIL = "<script>alert('no')</script> & | [x](y)"


def full(out: Path) -> Story:
    """A search with everything: seeds, pruned, failed and running trials, and finalists."""
    story = Story(out, final={"best": 3, "seeds": 3})
    story.add(seeds=2, origin="first[0]", d_cls=1024, d_seg=512, keep=0.35, alpha=5.0, tau=0.1)
    story.fill(16, seeds=2)
    story.add("FAIL", last=0, attrs={"error": f"RuntimeError: {EVIL}\nat line 7"})
    story.add("RUNNING", last=80)
    story.add("WAITING", last=120, attrs={"note": "put back"})
    best = sorted((r for r in story.findings().rows if r.state == "COMPLETE"), key=lambda r: -(r.value or 0))
    for row in best[:3]:
        story.rerun(row.number)
    return story


def draw_only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """No other plots: drawing takes most of the time, and ``whole`` has all of them."""
    monkeypatch.setattr(plots_module, "PLOTS", {name: plots_module.PLOTS[name] for name in names})


# -- a search with everything -----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Findings, str]:
    out = tmp_path_factory.mktemp("tune") / "whole"
    return (out, *report(full(out)))


def test_every_file_is_written(whole: tuple[Path, Findings, str]) -> None:
    out, _, shown = whole
    names = {"history", "curves", "slices", "importance", "contour", "parallel", "rungs", "cost", "differences"}
    assert plots(out) == names
    for name in names:
        data = (out / "plots" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000, name
    for name in ("report.html", "trials.csv", "best.yaml", "plots"):
        assert str(out / name) in shown
    assert (out / "report.md").is_file() and not (out / "paper.md").exists()


def test_the_csv_holds_what_the_study_holds(whole: tuple[Path, Findings, str]) -> None:
    out, findings, _ = whole
    rows = csv_rows(out)
    assert [int(r["number"]) for r in rows] == list(range(20))
    trials = findings.study.get_trials()
    for row, trial in zip(rows, trials, strict=True):
        assert row["state"] == trial.state.name
        assert {p: row[p] for p in trial.params} == {p: str(v) for p, v in trial.params.items()}
        runs = list(trial.user_attrs["runs"].values())
        assert int(row["seeds"]) == len(runs)
        if trial.values:
            assert float(row["seg_miou"]) == trial.value
            cams = [r["metrics"]["cam_miou"] for r in runs]
            assert float(row["cam_miou"]) == pytest.approx(statistics.fmean(cams), rel=1e-12)
        if len(runs) == 2:
            values = [r["value"] for r in runs]
            assert float(row["seg_miou.stderr"]) == pytest.approx(abs(values[0] - values[1]) / 2)
    assert rows[17]["seg_miou"] == "" and EVIL in rows[17]["error"] and rows[0]["from"] == "first[0]"
    assert float(rows[3]["seconds"]) == 0.25 * 80 + 9 and rows[19]["note"] == "put back"


def test_best_yaml_is_the_best_point_on_the_split_of_the_base(whole: tuple[Path, Findings, str]) -> None:
    out, findings, shown = whole
    best = findings.best
    assert best is not None and best.number == findings.finalists[0].trial.number
    cfg = configs.load(out / "best.yaml")
    assert {p: configs.get(cfg, p) for p in best.params} == best.params
    assert (cfg.name, cfg.data.val_split, cfg.train.steps) == ("shapes-best", "val", STEPS)
    head = (out / "best.yaml").read_text().splitlines()[:3]
    mean = 100 * statistics.fmean(r.value or 0 for r in findings.finalists[0].runs)
    final = 100 * statistics.fmean(r.final["seg_miou"] for r in findings.finalists[0].runs)
    assert head[0].startswith(f"# Trial {best.number} of the search in whole: seg_miou {mean:.2f} ± ")
    assert head[0].endswith("on split 'tune_val' (3 fresh seeds),") and head[1].startswith(f"# {final:.2f} ± ")
    command = f"ugrl-train --config {out / 'best.yaml'} --data {out / 'shards'}"
    assert command in shown and head[2].endswith(command)


def test_both_reports_tell_the_finding(whole: tuple[Path, Findings, str]) -> None:
    out, findings, shown = whole
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    finding = verdict(findings)
    assert finding[0].startswith(f"Trial {findings.best.number} is the best of 12 complete trials: seg mIoU ")
    assert "(3 fresh seeds)" in finding[0] and "on the untouched split 'val'" in finding[0]
    for sentence in finding:
        assert html.escape(sentence) in page and markdown(sentence) in text and sentence in shown
    for words in (
        "Run again with fresh seeds",
        "What it cost",
        "node-a",
        "0123abc",
        "asha, no stop before step 80",
        "PED-ANOVA",
    ):
        assert words in page
    assert "the paper&#x27;s point" in page and "rank " in paper_sentence(findings)
    assert f"d_cls: {findings.best.params['method.uncertainty.d_cls']}" in page  # the best configuration, folded
    assert set(re.findall(r"\]\(plots/(\w+)\.png\)", text)) == plots(out)
    assert page.count("data:image/png;base64,") == len(plots(out))


def test_the_page_escapes_and_asks_nobody(whole: tuple[Path, Findings, str]) -> None:
    out, _, _ = whole
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert html.escape(EVIL) in page and "<script>alert" not in page and "<script>alert" not in text
    assert not re.search(r"https?://|//cdn|@import|url\(", page)
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'(?:href|src)="([^"]*)"', page))


def test_the_cost_adds_up(whole: tuple[Path, Findings, str]) -> None:
    _, findings, _ = whole
    spent = cost(findings)
    fresh = sum(r.seconds for f in findings.finalists for r in f.runs)
    held = sum(r.seconds for r in findings.rows)
    assert spent.held == pytest.approx(held + fresh)
    assert spent.gpu_hours == pytest.approx(0.5 * sum(r.seconds for r in findings.rows) / 3600 + 0.5 * fresh / 3600)
    assert spent.outside == pytest.approx(9.0)
    # Five pruned trials of two planned seeds each are one seed here: 4 s for 16 steps.
    assert spent.saved == pytest.approx(0.25 * sum(STEPS - r.step for r in findings.rows if r.state == "PRUNED"))
    training = sum(run.seconds for r in findings.rows for run in r.runs) + fresh
    assert spent.utilisation == pytest.approx(training / (findings.sessions[0].seconds * 2))


# -- states that are not whole ----------------------------------------------------------------


def test_nothing_but_failures(tmp_path: Path) -> None:
    story = Story(tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "history.png").write_bytes(b"of another time")
    story.add("FAIL", last=0, attrs={"error": "first\nsecond"})
    story.add("FAIL", last=0, attrs={"error": EVIL})
    _, shown = report(story)
    assert not (tmp_path / "best.yaml").exists() and plots(tmp_path) == {"cost"}
    assert "trial 0 failed: first\n" in shown and "no plots of scores" in shown
    assert "No trial has completed: there is no best configuration. States: 2 failed." in shown
    assert "train:" not in shown and html.escape(EVIL) in (tmp_path / "report.html").read_text()


def test_a_search_that_has_not_begun(tmp_path: Path) -> None:
    _, shown = report(
        Story(tmp_path, paper="table4", search={"method.contrast.keep": {"choice": [0.2, 0.35]}}, first=[])
    )
    assert plots(tmp_path) == set() and csv_rows(tmp_path) == []
    assert "States: none." in shown and "Fewer than two settings" in (tmp_path / "paper.md").read_text()


def test_a_search_that_runs_has_no_complete_trial_yet(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.add("RUNNING", last=80)
    story.add("PRUNED", last=80)
    story.add("WAITING", last=40)
    findings, shown = report(story)
    assert findings.best is None and not (tmp_path / "best.yaml").exists()
    assert {"history", "curves", "rungs", "slices", "parallel", "cost"} == plots(tmp_path)
    assert "contour: needs 8 complete trials" in shown and "importance: 0 complete trials are too few" in shown
    assert "not known without a complete trial" in (tmp_path / "report.html").read_text()


def test_one_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_only(monkeypatch, "slices", "contour", "parallel")
    story = Story(tmp_path, search={"method.contrast.keep": {"uniform": [0.05, 0.8]}}, first=[])
    story.fill(3)
    _, shown = report(story, width=80)
    assert "contour: needs two numeric axes; no plot" in shown and "slices" in plots(tmp_path)
    assert configs.load(tmp_path / "best.yaml").method.contrast.keep in [
        float(r["method.contrast.keep"]) for r in csv_rows(tmp_path)
    ]


def test_axes_that_do_not_always_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_only(monkeypatch, "slices", "parallel", "importance", "contour")
    axes = {
        "method.uncertainty.weighting": {"choice": ["inverse_exp", "none"]},
        "method.uncertainty.u_min": {
            "loguniform": [0.01, 0.2],
            "when": {"method.uncertainty.weighting": "inverse_exp"},
        },
        "method.contrast.keep": {"uniform": [0.05, 0.8]},
    }
    story = Story(tmp_path, search=axes, first=[])
    for k in range(12):
        story.add(weighting=("inverse_exp", "none")[k % 2])
    _, shown = report(story)
    rows = csv_rows(tmp_path)
    assert [bool(r["method.uncertainty.u_min"]) for r in rows] == [k % 2 == 0 for k in range(12)]
    assert {"slices", "parallel"} <= plots(tmp_path) and configs.load(tmp_path / "best.yaml")
    assert "where weighting is inverse_exp" in (tmp_path / "report.html").read_text() and "train:" in shown


def test_several_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_only(monkeypatch, "pareto", "importance")
    tree = {"objective": ["seg_miou", "step_s"], "scheduler": {"name": "none"}, "constraints": {"gflop": 18}}
    story = Story(tmp_path, **tree)
    for k in range(10):
        story.add(values=[0.3 + 0.01 * k, 0.2 + 0.01 * (k % 5)])
    story.add(values=[0.9, 0.1], attrs={"violation": {"gflop": 22.2}})
    findings, shown = report(story)
    assert findings.best is not None and findings.best.number == 9
    assert "pareto" in plots(tmp_path) and "beaten by no other trial" in shown
    front = shown.split("beaten by no other trial")[1].split("trial 10 is out: gflop 22.2 is beyond its limit")[0]
    assert re.findall(r"^ +(\d+) ", front, re.M) == ["9", "8", "7", "6", "5"]
    assert {"seg_miou", "step_s", "seg_miou.stderr", "step_s.stderr"} <= set(csv_rows(tmp_path)[0])
    assert isinstance(importance(findings), dict)


def test_plots_that_no_longer_apply_are_removed(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.fill(3)
    folder = tmp_path / "plots"
    folder.mkdir()
    for name in ("pareto", "importance", "contour"):
        (folder / f"{name}.png").write_bytes(b"old")
    notes = draw(story.findings(), folder).notes
    assert plots(tmp_path) == {"history", "curves", "slices", "parallel", "rungs", "cost"}
    assert [n.split(":")[0] for n in notes] == ["importance", "contour"]


def test_secrets_are_not_written(tmp_path: Path) -> None:
    story = Story(tmp_path, storage="postgresql://ann:pa55word@db/ugrl")
    story.add()
    findings = story.findings()
    findings = replace(findings, search=replace(findings.search, shards=Place("s3://key:pa55word@bucket/shards")))
    write_html(findings, tmp_path / "report.html", [])
    write_markdown(findings, tmp_path / "report.md", [])
    for name in ("report.html", "report.md"):
        assert "pa55word" not in (tmp_path / name).read_text()


# -- beside the paper -------------------------------------------------------------------------


def table3(out: Path, **changes: Any) -> Story:
    axes = {"method.setting": {"choice": ["Base", "I", "II", "III", "IV"]}}
    return Story(out, search=axes, first=[], paper="table3", scheduler={"name": "none"}, **changes)


def test_table_3_stands_beside_the_printed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_only(monkeypatch)
    story = table3(tmp_path)
    for setting in ("IV", "II", "I", "Base"):
        story.add(seeds=3, final=True, setting=setting)
    story.add("FAIL", last=0, setting="III")
    findings, shown = report(story)
    section = paper_section(findings, tmp_path / "plots")
    assert section is not None
    by_setting = {row[0]: row for row in section.rows}
    assert list(by_setting) == ["Base", "I", "II", "III", "IV"]
    printed = [(row[3], row[7]) for row in section.rows]
    assert printed == [("65.3", "63.4"), ("69.7", "68.2"), ("72.5", "70.4"), ("74.8", "74.0"), ("77.9", "77.4")]
    assert [row[9] for row in section.rows] == ["", "+4.8", "+7.0", "+10.6", "+14.0"]
    mean, _, count = findings.rows[0].metric("seg_miou", final=True)
    assert by_setting["IV"][1] == str(count) == "3" and by_setting["IV"][6].startswith(f"{100 * mean:.1f} ± ")
    assert by_setting["III"][6] == "failed"
    assert "rank agreement of 1.00" in section.sentences[0] and "the untouched split 'val'" in section.sentences[-1]
    # Two points between one setting and the next (so is the story), 0.6 between seeds.
    assert "Against Base, beyond noise: I +" in section.sentences[0] and "judged seed by seed" in section.sentences[-1]
    paper = (tmp_path / "paper.md").read_text()
    for text in (paper, (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text(), shown):
        assert "Table 3 of the paper" in text and "rank agreement of 1.00" in text
    found = paper_trial(findings)
    assert found is not None and found.params["method.setting"] == "IV"


def test_the_upper_bound_stands_below_table_3_with_nothing_printed(tmp_path: Path) -> None:
    axes = {"method.setting": {"choice": ["Base", "Full", "IV"]}}
    story = Story(tmp_path, search=axes, first=[], paper="table3", scheduler={"name": "none"})
    for setting in ("Base", "Full", "IV"):
        story.add(seeds=2, final=True, setting=setting)
    section = paper_section(story.findings(), tmp_path / "plots")
    assert section is not None
    assert [row[0] for row in section.rows] == ["Base", "I", "II", "III", "IV", "Full"]
    assert [section.rows[-1][k] for k in (3, 5, 7, 9)] == ["–"] * 4 and section.rows[-1][4] not in ("", "–")
    assert "Base < IV has" in section.sentences[0]


def test_a_trial_without_a_point_is_not_the_papers(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING))
    assert paper_trial(story.findings()) is None
    number = story.add(d_cls=1024, d_seg=512, keep=0.35, alpha=9.0, origin="first[0]")
    found = paper_trial(story.findings())
    assert found is not None and found.number == number
    assert paper_sentence(story.findings()).startswith("The values that the paper publishes")


def test_rows_are_compared_on_one_split(tmp_path: Path) -> None:
    story = table3(tmp_path)
    story.add(final=True, setting="Base")
    story.add(setting="I")
    section = paper_section(story.findings(), tmp_path / "plots")
    assert section is not None and "split 'tune_val', which the search sees" in section.sentences[-1]
    assert "With one seed each the noise is not known" in section.sentences[0]


def test_a_grid_on_the_split_that_is_measured_says_that_it_chose_nothing(tmp_path: Path) -> None:
    grid = {"sampler": "grid", "repeats": {"seeds": 2, "skip": False}, "split": "val"}
    story = table3(tmp_path, **grid)
    for setting in ("Base", "I"):
        story.add(seeds=2, setting=setting)
    section = paper_section(story.findings(), tmp_path / "plots")
    assert section is not None and "on split 'val', which steers nothing: every point" in section.sentences[-1]


def test_table_4_and_figure_7_invent_nothing(tmp_path: Path) -> None:
    keeps = {"method.contrast.keep": {"choice": [0.05, 0.2, 0.35, 0.4]}}
    story = Story(tmp_path / "t", search=keeps, first=[], paper="table4", scheduler={"name": "none"})
    for keep in (0.05, 0.2, 0.35, 0.4):
        story.add(seeds=2, keep=keep)
    section = paper_section(story.findings(), tmp_path / "t" / "plots")
    assert section is not None and section.image == "paper.png" and plots(tmp_path / "t") == {"paper"}
    assert section.header[-2:] == ("seg printed, VOC", "seg printed, COCO")
    printed = [("75.8", "44.1"), ("76.3", "47.3"), ("77.4", "48.2"), ("not printed", "not printed")]
    assert [row[-2:] for row in section.rows] == printed
    assert "its best, and its choice, is K 0.35 on both data sets" in section.sentences[0]
    assert [s.split("with ")[1].split(" mIoU")[0] for s in section.sentences[1:3]] == ["seg", "CAM"]

    widths = {p: SPACE["search"][p] for p in ("method.uncertainty.d_cls", "method.contrast.d_seg")}
    story = Story(tmp_path / "f", search=widths, first=[], paper="fig7", scheduler={"name": "none"})
    for d_cls, d_seg in ((256, 512), (1024, 512), (1024, 128), (2048, 512)):
        story.add(seeds=2, d_cls=d_cls, d_seg=d_seg)
    section = paper_section(story.findings(), tmp_path / "f" / "plots")
    assert section is not None and [row[:2] for row in section.rows][0] == ("256", "512")
    assert [row[4] for row in section.rows] == ["15.6", "13.3", "17.2", "19.2"]
    assert [row[5] for row in section.rows].count("the peak of both curves") == 1
    assert (tmp_path / "f" / "plots" / "paper.png").stat().st_size > 10_000


def test_a_table_whose_axis_is_not_searched_says_so(tmp_path: Path) -> None:
    section = paper_section(Story(tmp_path, paper="table3").findings(), tmp_path / "plots")
    assert section is not None and section.sentences == ("Nothing to compare: method.setting is not searched.",)
    assert paper_section(Story(tmp_path).findings(), tmp_path / "plots") is None


def test_rank_correlation_of_ties() -> None:
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)
    assert math.isnan(spearman([1, 1], [1, 2]))


# -- many trials ------------------------------------------------------------------------------


def calls(work: Callable[[], Any]) -> int:
    profile = cProfile.Profile()
    with profile:
        work()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def filled(trials: int, out: Path) -> Findings:
    story = Story(out, objective=["seg_miou", "step_s"], scheduler={"name": "none"})
    story.fill(trials, seeds=2)
    return story.findings()


def test_the_work_of_a_report_grows_as_its_trials(tmp_path: Path) -> None:
    def work(findings: Findings) -> None:
        write_csv(findings)
        contents(findings, [], None)

    few, many = (calls(partial(work, filled(n, tmp_path))) for n in (100, 400))
    assert many < 4.5 * few
    objectives = (Objective("seg_miou"), Objective("step_s"))
    few, many = (
        calls(partial(pareto, [TrialRow(k, "COMPLETE", (k / n, k / n)) for k in range(n)], objectives))
        for n in (100, 400)  # none beats another: each is better in one of the two
    )
    assert many < 5 * few


def test_the_importance_is_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    tell = optuna.importance.get_param_importances

    def counted(study: optuna.Study, **more: Any) -> dict[str, float]:
        told.append(len(study.trials))
        return tell(study, **more)

    monkeypatch.setattr(optuna.importance, "get_param_importances", counted)
    draw_only(monkeypatch, "importance", "contour")
    story = Story(tmp_path)
    story.fill(18)
    report(story)
    assert told == [12]


def test_of_many_trials_the_page_and_the_plots_show_a_part_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "LONGEST", 10)
    monkeypatch.setattr(files, "SHOWN", 5)
    monkeypatch.setattr(drawing, "LINES", 8)
    draw_only(monkeypatch, "curves")
    story = Story(tmp_path / "many")
    story.fill(30)
    for _ in range(12):
        story.add("FAIL", last=0, attrs={"error": "RuntimeError: no"})
    findings, shown = report(story)
    text = (tmp_path / "many" / "report.md").read_text()
    assert "The first 10 of 42 trials; trials.csv holds all of them." in text
    assert "The first 10 of 12 failed trials" in text and len(csv_rows(tmp_path / "many")) == 42
    assert "The first 5 of 42 trials" in shown and "7 more trials failed or are out" in shown
    assert re.search(r"^ *★ \d+ +COMPLETE", shown, re.M)
    for plot in (plots_module.curves, plots_module.parallel):
        figure = plot(findings)
        assert not isinstance(figure, str)
        axes = figure.axes[0]
        assert "a sample of 8 of 30 trials" in axes.get_title()
        best = [line for line in axes.lines if line.get_color() == drawing.BEST]
        assert len(best) == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    draw = random.Random(seed)
    rows = [TrialRow(k, "COMPLETE", (draw.randint(0, 9) / 9, draw.randint(0, 9) / 9)) for k in range(60)]
    objectives = (Objective("seg_miou"), Objective("step_s"))

    def beats(a: TrialRow, b: TrialRow) -> bool:
        pairs = ((a.values[0], b.values[0]), (-a.values[1], -b.values[1]))
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    slow = [r.number for r in rows if not any(beats(o, r) for o in rows)]
    assert sorted(r.number for r in pareto(rows, objectives)) == slow
