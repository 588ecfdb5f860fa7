"""What a run shows of itself: on terminals of any width, and in a file."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ugrl.eval.evaluate import EvalResult
from ugrl.train.meter import Pace
from ugrl.train.progress import Progress, bar_line, result_table, scores_text, tell

NOTES = ["81.2 img/s", "98 ms/step", "3% data wait", "total 2.1234", "cls 0.1235", "seg 1.2345"]
VALUES = {"images_per_s": 81.2, "step_s": 0.098, "data_wait": 0.03, "total": 2.1234, "cls": 0.1235, "seg": 1.2345}


@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_row_fits_and_drops_whole_words_losses_first(ascii_only: bool) -> None:
    shown_before = -1
    for width in range(20, 160):
        text = bar_line(width, 1234, 20000, "3 h 12 min left", NOTES, ascii_only=ascii_only).plain
        assert len(text) <= width and text.startswith("step 1234/20000")
        words = [w for w in text.split("  ")[1:] if not re.fullmatch("[━#-]+", w)]
        assert words == ["3 h 12 min left", *NOTES][: len(words)]  # whole, and in their order
        assert len(words) >= (width >= 32)
        assert bool(re.search("[━#-]{4}", text)) == (width >= 38)
        assert len(words) >= shown_before
        shown_before = len(words)
    assert shown_before == 1 + len(NOTES)
    eighty = bar_line(80, 1234, 20000, "3 h 12 min left", NOTES).plain
    assert eighty == "step 1234/20000  ━━━━━━━━━━━━━━━━━━━━  3 h 12 min left  81.2 img/s  98 ms/step"


def paced(done: int = 10) -> Pace:
    pace = Pace(total=100, warmup=20, eval_every=50)
    for k in range(1, done + 1):
        pace.step(k, 10.0 if k == 1 else 2.0 if k <= 20 else 5.0)
    return pace


def test_time_left_knows_that_later_steps_cost_more() -> None:
    assert Pace(100, 20, 50).left(0) is None
    assert paced(10).left(10) == 90 * 2.0  # the first step, which also pays for what is made once, does not count
    assert paced(30).left(30) == 70 * 5.0
    assert paced(30).left(10) == 10 * 2.0 + 80 * 5.0  # a resumed run, say
    pace = paced(60)
    pace._validation = 7.0
    assert pace.left(40) == 60 * 5.0 + 2 * 7.0 and pace.left(60) == 40 * 5.0 + 7.0
    assert pace.left(100) == 0.0


def test_it_is_told_once_for_each_kind_of_step() -> None:
    pace, told = Pace(total=40, warmup=10, eval_every=50), []
    for k in range(1, 41):
        pace.step(k, 1.0)
        told += [k] if pace.news(k) else []
    assert told == [5, 15]
    short = Pace(total=4, warmup=2, eval_every=50)
    for k in range(1, 5):
        short.step(k, 1.0)
        assert not short.news(k)  # over before anything is known


def test_off_a_terminal_lines_have_the_time_left_and_go_on_during_a_validation() -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=40), 100, 0, enabled=True, pace=paced(30), every_s=0) as progress:
        progress.on_step(29)
        progress.on_log(30, VALUES)
        progress.on_step(30)
        progress.on_step(31)
        progress.on_eval_batch(5, (), 4, 10)
        progress.on_eval_batch(5, (), 10, 10)
    assert file.getvalue().splitlines() == [
        "step 30/100  5 min 50 s left  81.2 img/s  98 ms/step  3% data wait  total 2.1234  cls 0.1235  seg 1.2345",
        "step 31/100  5 min 45 s left  81.2 img/s  98 ms/step  3% data wait  total 2.1234  cls 0.1235  seg 1.2345",
        "step 31/100  5 min 45 s left  validation 4/10",
    ]
    quiet = io.StringIO()
    with Progress(Console(file=quiet), 100, 0, enabled=False, pace=paced(30), every_s=0) as progress:
        progress.on_log(30, VALUES)
        progress.on_step(30)
        progress.on_eval(100, EvalResult({"tag_map": 0.5}))
    assert quiet.getvalue() == ""


def test_on_a_terminal_the_row_lives() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    with Progress(console, 100, 0, enabled=True, pace=paced(30)) as progress:
        progress.on_log(30, VALUES)
        progress.on_step(30)
        progress.on_eval_batch(5, (), 4, 10)
        assert progress.render().plain == "step 30/100  " + "━" * 20 + "  5 min 50 s left  validation 4/10"
        progress.on_step(31)
    assert "step 31/100" in file.getvalue()


def test_words_do_not_break_in_a_narrow_terminal() -> None:
    text = "step 100  validation on 200 images  seg_miou 0.1234 (empty masks 0.1200)  [/b] tag_map 0.5000"
    for width in (24, 40, 80):
        file = io.StringIO()
        tell(Console(file=file, force_terminal=True, width=width, color_system=None), text)
        lines = file.getvalue().splitlines()
        assert all(len(line.rstrip()) <= width for line in lines)
        assert " ".join(lines).split() == text.split()
    file = io.StringIO()
    tell(Console(file=file, width=24), text)
    assert file.getvalue() == text + "\n"


def test_baselines_stand_beside_the_scores() -> None:
    metrics = {"seg_miou": 0.1204, "seg_background_miou": 0.12, "tag_map": 0.4, "tag_prevalence": 0.3, "collapsed": 1.0}
    assert scores_text(metrics) == "seg_miou 0.1204 (empty masks 0.1200)  tag_map 0.4000 (by chance 0.3000)"
    classes = {"seg_iou": {"background": 0.9, "[/b]": float("nan")}, "tag_ap": {"[/b]": 0.4}}
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(result_table(EvalResult(metrics, classes, 7, "collapsed: it predicts background everywhere")))
    text = " ".join(console.export_text().split())
    for row in ("background | 90.0 | -", "[/b] | - | 40.0", "seg_background_miou | 12.0", "tag_prevalence | 30.0"):
        cells = [re.escape(cell) for cell in row.split(" | ")]
        assert re.search(r"\W+".join(cells), text), row
    assert "collapsed: it predicts background everywhere" in text and "100.0" not in text
