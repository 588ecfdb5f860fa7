"""The short form of `make campaign`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import blows, campaign


def told(out: Path) -> dict:
    (text,) = (out / "campaign.jsonl").read_text().splitlines()
    return json.loads(text)


def test_a_run_is_killed_twice_and_is_whole(tmp_path: Path) -> None:
    words = ["--stories", "run", "--kills", "2", "--steps", "20", "--seed", "4842", "--out", str(tmp_path)]
    assert campaign.main(words) == 0
    result = told(tmp_path)
    assert sum(result["kills"].values()) == 2 and not result["skipped"]
    assert (
        "each step once, losses of an undisturbed run" in result["checked"] and "last checkpoint" in result["checked"]
    )
    assert campaign.main(words) == 0  # nothing is played again
    assert told(tmp_path) == result


@pytest.mark.ray
@pytest.mark.long
def test_two_drivers_on_one_cluster_are_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    assert campaign.main(["--stories", "two", "--kills", "2", "--out", str(tmp_path)]) == 0
    result = told(tmp_path)
    assert sum(result["kills"].values()) == 2 and not result["skipped"]
    assert {"planned trials once, none lost", "final runs once each", "no placement group"} <= set(result["checked"])


def test_what_does_not_hold_is_a_fault() -> None:
    result = campaign.Result("story", 0, 1)
    result.check("sum", lambda: campaign.no_more(lambda: ["left"], 0))
    result.check("other", lambda: None)
    (fault,) = result.faults
    assert fault.startswith("sum: AssertionError 1 left: ['left']")
    assert result.checked == ["other"]


def test_kills_are_shared_out() -> None:
    assert campaign.shares(list(campaign.STORIES), 100) == {k: part for k, (part, _) in campaign.STORIES.items()}
    assert campaign.shares(["run"], 2) == {"run": 2}
    assert sum(campaign.shares(list(campaign.STORIES), 7).values()) == 7


def test_a_process_that_only_looks_at_a_story_is_none_of_it(tmp_path: Path) -> None:
    (tmp_path / blows.MADE).touch()
    log = tmp_path / "driver-0.log"
    marked = {**os.environ, blows.MARK: str(tmp_path)}
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with log.open("w") as held:  # this process holds it, too
        story = subprocess.Popen(wait, stdin=subprocess.PIPE, env=marked)
        worker = subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=held)
        reader = subprocess.Popen(["tail", "-f", str(log)], stdout=subprocess.DEVNULL)
        try:
            assert {p.pid for p in blows.ours(tmp_path)} == {story.pid, worker.pid}
            os.utime(tmp_path / blows.MADE, (2e9, 2e9))  # older than its story
            assert {p.pid for p in blows.ours(tmp_path)} == {story.pid}
        finally:
            for process in (story, worker, reader):
                process.kill()
                process.communicate()


def test_the_table_is_one_for_a_text(tmp_path: Path) -> None:
    words = ["--stories", "run", "--kills", "0", "--out", str(tmp_path), "--markdown", str(tmp_path / "table.md")]
    assert campaign.main(words) == 0
    head, rule, row, _, total = (tmp_path / "table.md").read_text().splitlines()
    assert head.startswith("| story | kills |") and set(rule) == set("| -") and row.startswith("| run | 0 of 0:")
    assert head.count("|") == rule.count("|") == row.count("|") and total.startswith("0 kills in ")
