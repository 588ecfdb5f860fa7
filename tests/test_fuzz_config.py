"""Configurations that nobody would write: each is used, or refused in one line. ``UGRL_FUZZ`` says how many."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuning.space import space_file as spaces
from ugrl import config
from ugrl.errors import ConfigError
from ugrl.foreign import parse_yaml

fuzz = settings(
    max_examples=int(os.environ.get("UGRL_FUZZ", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)

# Words that mean something to some version of YAML, to a number's parser, to a shell or to a terminal.
ODD = [
    "off",
    "On",
    "y",
    "no",
    "~",
    "null",
    "",
    "1e-3",
    "1e400",
    "-0",
    ".inf",
    ".nan",
    "010",
    "0o10",
    "0x1f",
    "1_000",
    "1:30",
]
ODD += [
    "2026-01-01",
    "=",
    "<<",
    "!!python/name:os.system",
    "&a",
    "*a",
    "[[[[",
    "{a: 1, a: 2}",
    "[1, 0.5]",
    "'",
    "\t",
    "# x",
]
ODD += [
    "\x1b[31m",
    "[/b]",
    ":smile:",
    "9" * 400,
    "s3://key:word@b/x",
    "../../x",
    "%s",
    "a: b: c",
    "- - -",
    "\ud800",
    "\x00",
]
words = st.sampled_from(ODD) | st.text(max_size=12)
texts = st.sampled_from([w for w in ODD if w not in ("\ud800",)]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=12
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))

PATHS = sorted(config.paths())
NAMES = sorted({part for path in PATHS for part in path.split(".")})
junk = st.recursive(
    scalars | st.just(float("nan")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.integers() | texts, inner),
    max_leaves=8,
)


def used_or_refused(make: Callable[[], Any]) -> Any:
    """What is made, or ``None`` where it is refused; anything but a short line fails."""
    try:
        return make()
    except ConfigError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 1500, said
        return None


@fuzz
@given(trees)
def test_what_is_dumped_is_read_back(tree: Any) -> None:
    text = config.dump({"tree": tree})
    assert parse_yaml(text, "text") == {"tree": tree}
    assert yaml.safe_load(text) == {"tree": tree}  # whoever reads by the rules of 1.1


@fuzz
@given(st.lists(st.tuples(st.sampled_from([*PATHS, "train", "x.y", ""]), words | junk.map(repr)), max_size=3))
def test_overrides_are_used_or_refused(pairs: list[tuple[str, str]]) -> None:
    cfg = used_or_refused(lambda: config.load("shapes", config.parse_overrides(f"{k}={v}" for k, v in pairs)))
    if cfg is not None:
        assert config.build(parse_yaml(config.dump(config.to_dict(cfg)), "text")) == cfg


@fuzz
@given(st.sampled_from(NAMES), junk, junk)
def test_trees_are_used_or_refused(key: str, a: Any, b: Any) -> None:
    used_or_refused(lambda: config.build({key: a, "train": b}))
    used_or_refused(lambda: config.build(config.override({key: a}, {"train.steps": 9, "method.cam.scales": b})))
    used_or_refused(lambda: config.build(a))


SHIPPED = config.find_yaml("shapes").read_bytes()


@fuzz
@given(st.lists(st.tuples(st.integers(0, len(SHIPPED)), st.integers(0, 9), words), min_size=1, max_size=4))
def test_damaged_files_are_used_or_refused(tmp_path_factory: Any, cuts: list[tuple[int, int, str]]) -> None:
    data = SHIPPED
    for at, length, word in cuts:
        data = data[:at] + word.encode("utf-8", "surrogatepass") + data[at + length :]
    file = Path(tmp_path_factory.getbasetemp()) / "damaged.yaml"
    file.write_bytes(data)
    used_or_refused(lambda: config.load(file))


@fuzz
@given(st.sampled_from(["config", "overrides", "search", "first", "objective", "trials", "storage", "sampler"]), junk)
def test_search_spaces_are_used_or_refused(key: str, value: Any) -> None:
    tree = {"config": "shapes", "search": {"method.contrast.tau": {"uniform": [0.05, 0.5]}}, key: value}
    space = used_or_refused(lambda: spaces.build_space(tree))
    if space is not None:
        again = spaces.build_space(parse_yaml(space.to_yaml(), "text"))
        assert again.to_dict() == space.to_dict()
