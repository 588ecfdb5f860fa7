"""The live page of a search: served here, to be looked at, for as long as the search runs."""

from __future__ import annotations

import http.client
import json
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.story import SPACE, Story
from tuning import cli
from tuning.dashboard import Dashboard, by_hand
from tuning.space.space_file import build_space
from tuning.study.search_folder import begin


def ask(url: str, path: str = "/api/studies", method: str = "GET", host: str | None = None) -> tuple[int, Any]:
    """Status and answer; 0 where nobody answers."""
    port = int(url.split(":")[2].partition("/")[0])
    there = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        there.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
        answer = there.getresponse()
        data = answer.read()
    except ConnectionRefusedError:
        return 0, None
    finally:
        there.close()
    return answer.status, json.loads(data) if path.startswith("/api") and answer.status == 200 else data


@pytest.fixture
def search(tmp_path: Path) -> tuple[Any, optuna.Study]:
    story = Story(tmp_path / "search")
    return story.search, begin(story.search, resume=False)


def test_it_shows_what_the_search_writes_and_ends_with_it(search: tuple[Any, optuna.Study]) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is optional: pip install 'ugrl[dashboard]'")
    found, study = search
    said: list[str] = []
    with Dashboard(found.space, found.out, said.append) as page:
        (text,) = said
        assert text.startswith(f"dashboard: {page.url}") and text.endswith(f"later: {by_hand(found.space, found.out)}")
        assert ask(page.url, "/dashboard/")[0] == 200
        status, answer = ask(page.url)
        (summary,) = answer["study_summaries"]
        assert status == 200 and summary["study_name"] == study.study_name
        path = f"/api/studies/{summary['study_id']}"
        assert ask(page.url, f"{path}?after=0")[1]["trials"] == []
        study.enqueue_trial({"method.contrast.keep": 0.5})  # by the driver, through another storage of the same study
        study.tell(study.ask({"method.contrast.keep": optuna.distributions.FloatDistribution(0.05, 0.8)}), 0.25)
        until = time.monotonic() + 120
        while not (trials := ask(page.url, f"{path}?after=0")[1]["trials"]) and time.monotonic() < until:
            time.sleep(0.5)  # the page looks into the storage every few seconds
        (trial,) = trials
        assert trial["state"] == "Complete" and float(trial["values"][0]) == 0.25
        # It is to be looked at.
        for method in ("DELETE", "POST", "PUT"):
            assert ask(page.url, path, method)[0] == 405
        assert ask(page.url, host="evil.example:80")[0] == 404
        assert ask(page.url, host=f"localhost:{page.url.split(':')[2][:4]}")[0] == 200
    assert len(study.get_trials()) == 1 and ask(page.url)[0] == 0


def test_a_taken_port_is_left_and_the_next_one_said(search: tuple[Any, optuna.Study]) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is optional: pip install 'ugrl[dashboard]'")
    found, _ = search
    said: list[str] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with Dashboard(found.space, found.out, said.append, first=taken) as page:
            port = int(page.url.split(":")[2].partition("/")[0])
            assert taken < port <= taken + 19 and f"(port {taken} is taken)" in said[0]
            assert ask(page.url)[0] == 200


def test_without_the_package_it_says_what_to_do(
    search: tuple[Any, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)  # as Python marks what cannot be imported
    found, _ = search
    said: list[str] = []
    with Dashboard(found.space, found.out, said.append) as page:
        assert page.url == ""
    text = "dashboard: optuna-dashboard is not installed: pip install 'ugrl[dashboard]'; then, beside the search: "
    assert said == [f"{text}optuna-dashboard {found.out / 'study.journal'}"]


def test_a_storage_that_cannot_be_opened_stops_no_search(search: tuple[Any, optuna.Study]) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is optional: pip install 'ugrl[dashboard]'")
    found, _ = search
    (found.out / "study.journal").unlink()
    (found.out / "study.journal").mkdir()
    said: list[str] = []
    with Dashboard(found.space, found.out, said.append) as page:
        assert page.url == "" and said[0].startswith("dashboard: cannot be shown (") and len(said) == 1


@pytest.mark.parametrize(
    ("storage", "where"),
    [
        ("journal", "{out}/study.journal"),
        ("sqlite:///study.db", "sqlite:///{out}/study.db"),
        ("postgresql+psycopg://ann:pa55word@db/ugrl", "postgresql+psycopg://ann:***@db/ugrl"),
    ],
)
def test_the_command_by_hand(storage: str, where: str, tmp_path: Path) -> None:
    space = build_space({**SPACE, "storage": storage})
    assert shlex.split(by_hand(space, tmp_path)) == ["optuna-dashboard", where.format(out=tmp_path)]


def test_a_dry_run_has_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--space", "shapes", "--dry-run", "--dashboard"]) == 2
    assert "--dashboard shows a search that runs" in capsys.readouterr().err
