"""Every test is run by exactly one line of the Makefile, and every file with tests is found."""

from __future__ import annotations

import itertools
import re
import subprocess
import tomllib
from pathlib import Path

from _pytest.mark.expression import Expression

ROOT = Path(__file__).parents[1]
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
MARKS = [text.partition(":")[0] for text in OPTIONS["markers"]]


def test_every_mark_is_run_once_by_test_full() -> None:
    said = subprocess.run(["make", "-n", "test-full"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [Expression.compile(found) for found in re.findall(r'pytest .*?-m "?([a-z ]+)', said)]
    assert len(lines) == 4 and len(MARKS) >= 3
    for chosen in itertools.product([False, True], repeat=len(MARKS)):
        marks = dict(zip(MARKS, chosen, strict=True))
        assert sum(each.evaluate(lambda name, **_: marks[name]) for each in lines) == 1, marks  # noqa: B023


def test_every_file_with_tests_is_under_a_path_that_is_searched() -> None:
    assert "--strict-markers" in OPTIONS["addopts"]
    held = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in held.split():
        text = (ROOT / name).read_text(encoding="utf-8")
        if Path(name).name.startswith("test_") or re.search(r"^\s*>>> ", text, re.MULTILINE):
            assert name.split("/")[0] in OPTIONS["testpaths"], name
