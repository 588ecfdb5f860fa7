"""The files of arms: what each begins with, and those of the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import real_arms
from bench.real_arms import variants_of
from ugrl import config as configs


def test_an_arm_begins_with_that_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "arms.yaml").write_text("A: {train.lr: 0.1}\nIV: {like: A, method.setting: IV, train.steps: 8}\n")
    (tmp_path / "below" / "more.yaml").write_text(
        "more: {like: '../arms.yaml:IV', train.lr: 0.2}\nlast: {like: more, train.steps: 9}\n"
    )
    found = variants_of(tmp_path / "below" / "more.yaml")
    assert found["more"] == {"method.setting": "IV", "train.steps": 8, "train.lr": 0.2}
    assert found["last"] == {**found["more"], "train.steps": 9}


@pytest.mark.parametrize(
    ("file", "config", "default"),
    [
        ("finding", "voc676", "IV-eta"),
        ("one_at_a_time", "voc676", ""),
        ("transfer", "voc676", ""),
        ("over_time", "voc676", ""),
        ("few", "own", "IV-eta+few"),
        ("shapes", "shapes", ""),
    ],
)
def test_every_arm_of_the_project_can_be_built(file: str, config: str, default: str) -> None:
    """Also that the arm that docs/finding.md calls the default of a configuration is it."""
    variants = variants_of(Path(real_arms.__file__).with_name(f"{file}.yaml"))
    built = {name: configs.load(config, values) for name, values in variants.items()}
    assert len({repr(cfg) for cfg in built.values()}) == len(built)  # no arm is another one
    if default:
        assert built[default] == configs.load(config)
