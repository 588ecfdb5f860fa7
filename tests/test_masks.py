"""Masks of any method, scored beside a run's own: ``ugrl eval --masks``."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.teachers import WRONG, labels_of, spoiled, truth
from ugrl.cli import main
from ugrl.data.reader import ShardReader
from ugrl.eval.masks import Masks, comparison
from ugrl.eval.metrics import Confusion
from ugrl.types import IGNORE

CPU = torch.device("cpu")


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_masks_of_a_run_score_what_the_run_scores(
    base: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own labels, written and read back; perfect ones beside it, as palette, grey, and of 4 bits."""
    words = ["--data", shards, "--split", "val"]
    truth(shards, "val", tmp_path / "perfect")
    for k, path in enumerate(sorted((tmp_path / "perfect").iterdir())):
        image = Image.fromarray(labels_of(path.read_bytes()))
        if k % 3:
            image = image.convert("P") if k % 3 == 1 else image
            image.putpalette([*range(256)] * 3)
            image.save(path, bits=4 if k % 3 == 2 and labels_of(path.read_bytes()).max() < 16 else 8)
    own = told(capsys, base, *words, "--device", "cpu", "--out", tmp_path / "own")
    found = told(
        capsys, base, *words, "--device", "cpu", "--masks", tmp_path / "own/seg", "--masks", tmp_path / "perfect"
    )
    assert {k: found[k] for k in own if k != "masks"} == own
    seg, perfect = found["masks"]
    assert (seg["name"], perfect["name"], perfect["miou"], perfect["left_out"]) == ("seg", "perfect", 1.0, 0.0)
    assert seg["miou"] == pytest.approx(own["metrics"]["seg_miou"]) and seg["iou"] == own["classes"]["seg_iou"]
    # The same without the run.
    alone = told(capsys, "--masks", tmp_path / "own/seg", *words)
    assert (alone["masks"], alone["images"], alone["split"]) == ([seg], 16, "val")
    few = told(capsys, "--masks", tmp_path / "own/seg", *words, "--set", "eval.limit=5")
    assert few["images"] == 5 and few["masks"][0]["miou"] != seg["miou"]
    ids = ShardReader(shards, "val").ids[3:7]
    (tmp_path / "list.txt").write_text("\n".join(ids))
    listed = told(capsys, "--masks", tmp_path / "own/seg", "--data", shards, "--list", tmp_path / "list.txt")
    counts = Confusion(7)
    reader = ShardReader(shards, "val")
    for k in range(3, 7):
        mask = labels_of((tmp_path / "own/seg" / f"{reader.ids[k]}.png").read_bytes())
        counts.add(
            torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(labels_of(reader[k].mask).astype(np.int64))
        )
    assert listed["images"] == 4 and listed["masks"][0]["miou"] == pytest.approx(counts.miou)


def test_pixels_that_a_mask_leaves_out_are_not_counted_and_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsure(labels_HW: np.ndarray) -> np.ndarray:
        labels_HW[:12] = IGNORE
        return labels_HW

    folder = truth(shards, "val", tmp_path / "unsure", unsure)
    found = told(capsys, "--masks", folder, "--data", shards)
    assert found["masks"][0]["miou"] == 1.0 and found["masks"][0]["left_out"] == pytest.approx(0.25, abs=0.02)
    assert main(["eval", "--masks", str(folder), "--data", str(shards)]) == 0
    assert re.search(r"pixels left out \(255\)\s+│\s+2\d\.\d", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("how", "words"),
    [*WRONG[:4], ("gone", "{id}.png: missing mask; 1 of 16 images have none; expected one"), *WRONG[4:]],
)
def test_masks_that_cannot_be_scored_are_one_line(
    how: str, words: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = truth(shards, "val", tmp_path / "sam")
    spoiled(folder, "val_000002", how)
    assert main(["eval", "--masks", str(folder), "--data", str(shards)]) == 2
    text = capsys.readouterr().err
    assert words.format(id="val_000002") in text and text.count("error: ") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "neither a run nor --masks; expected one of the two"),
        (["--masks", "m", "--crf"], "--crf is for a run; expected one before --masks"),
        (["--masks", "m", "--best"], "--best is for a run"),
        (["--masks", "m", "--protocol", "toco"], "--protocol is for a run"),
        (["--masks", "m", "--set", "eval.crf_bi_w=5"], "--set eval.crf_bi_w=5 is for a run; expected eval.limit alone"),
        (["--masks", "m", "--compare"], "--compare of one thing; expected a second run, or --masks beside it"),
        (["a", "b", "c"], "3 runs (c is the third); expected one, or two to compare"),
        (["a", "b", "--out", "o"], "--out and two runs; expected one run, whose labels are written"),
    ],
)
def test_options_that_need_a_run_are_refused_without(
    words: list[str], error: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words, "--data", str(shards)]) == 2
    assert error in capsys.readouterr().err


def test_a_comparison_marks_the_best_of_each_class(
    base: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = Masks("a", {"background": 0.8, "cat": 0.5, "dog": float("nan")}, 0.65)
    b = Masks("b", {"background": 0.8004, "cat": 0.45, "dog": float("nan")}, 0.6252)

    def cells(differences: bool) -> list[list[str]]:
        table = comparison([a, b], "title", differences=differences)
        return [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]

    assert cells(False) == [
        ["background", "80.0*", "80.0*"],
        ["cat", "50.0*", "45.0 "],
        ["dog", "- ", "- "],
        ["mean", "65.0*", "62.5 "],
    ]
    assert [row[2] for row in cells(True)] == ["+0.0*", "-5.0 ", "- ", "-2.5 "]
    # Two runs, and masks beside them: the table of the command.
    other = Path(shutil.copytree(base, tmp_path / "other"))
    truth(shards, "val", tmp_path / "sam")
    words = ["eval", str(base), str(other), "--data", str(shards), "--what", "seg", "--device", "cpu"]
    assert main([*words, "--masks", str(tmp_path / "sam"), "--compare"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"mean\s+│\s+\d+\.\d\s+│\s+\+0\.0\s+│\s+\+\d+\.\d\*", text)
    assert "after base seg: the difference to it, in points" in " ".join(text.split())
