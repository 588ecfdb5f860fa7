"""What a search shows while it runs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.searches import NO_STOP, SOUND, ledger, report, search_of
from tuning.run.progress import TrialProgress, logged_step


@pytest.fixture
def bar(tmp_path: Path) -> Iterator[TrialProgress]:
    """Of a search of four trials of two seeds and nine steps, of which two run."""
    search = search_of(SOUND, tmp_path, trials=4, repeats={"seeds": 2}, **NO_STOP)
    with ledger(search) as found:
        made = TrialProgress(search.objectives, search.steps, Console(file=io.StringIO(), width=80), title="demo")
        made.ledger = found
        for name in ("a", "b"):
            found.take(name)
            made.started(name)
        yield made


def log(bar: TrialProgress, name: str, seed: int, text: str) -> None:
    """Leave lines in the log of a trial's run."""
    file = bar.running[name].folder / f"seed_{seed}" / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def ended(bar: TrialProgress, name: str) -> None:
    assert bar.ledger is not None
    for seed in (0, 1):
        assert not bar.ledger.judge(name, report(9, 0.5, seed, ended=True))
    bar.ledger.end(name)
    bar.ended(name)


def test_it_moves_between_validations_and_says_how_long_it_takes(bar: TrialProgress) -> None:
    assert bar.headline().startswith("demo: 0 of 4 ended · 0:00:0")
    log(bar, "a", 0, '{"step": 3}\n{"step": 5}\n{"ste')
    bar.looked -= 10
    bar.look()
    assert (bar.running["a"].step, bar.running["b"].step) == (5, 0)
    bar.began -= 40  # five steps in 40 s: of a, 13 are left, of the three others 18 each
    assert bar.headline().startswith("demo: 0 of 4 ended · about 9 min left")
    bar.reported("a", report(6, 0.25))
    log(bar, "a", 1, '{"step": 2}\n')
    bar.looked -= 10
    bar.look()
    assert (bar.running["a"].seed, bar.running["a"].step, bar.running["a"].score) == (1, 2, 0.25)
    ended(bar, "a")
    # 18 steps in 40 s, 54 are left.
    assert bar.headline().startswith("demo: 1 of 4 ended · about 2 min left · best 50.0 % (trial 0)")


def test_its_words_do_not_break_at_80_columns(bar: TrialProgress) -> None:
    bar.steps = 80_000
    log(bar, "a", 0, '{"step": 61000}\n')
    bar.looked -= 10
    bar.reported("a", report(60_000, 0.25))
    with bar.console.capture() as caught:
        bar.console.print(bar.render())
    lines = caught.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("61000/80000" in text and "1/2" in text and "25.0 %" in text for text in lines)
    assert any("trial" in text and "seg miou" in text and "time" in text for text in lines)


def test_off_a_terminal_the_whole_is_heard_of_now_and_then(bar: TrialProgress) -> None:
    file: Any = bar.console.file
    bar.stepped()
    assert "ended" not in file.getvalue()
    log(bar, "b", 0, '{"step": 4}\n')
    bar.said, bar.looked, bar.began = bar.said - 60, bar.looked - 60, bar.began - 60
    bar.stepped()
    bar.stepped()
    (text,) = [t for t in file.getvalue().splitlines() if "ended" in t]
    assert text.startswith("demo: 0 of 4 ended · about 17 min left")
    assert text.endswith("trial 0 0/9 of seed 1 · trial 1 4/9 of seed 1")


def test_a_log_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    assert logged_step(tmp_path / "none") == logged_step(tmp_path) == 0
    file = tmp_path / "metrics.jsonl"
    file.write_text("[]\n" + json.dumps({"step": 7.0, "text": "x" * 5000}) + "\n" + '{"step": null}\n"s"\n')
    assert logged_step(file) == 0  # the only one that counts is longer than what is looked at
    file.write_text('{"step": 7.0}\n{"step": null}\n"s"\n\xff')
    assert logged_step(file) == 7
