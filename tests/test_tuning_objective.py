"""What a search is steered by, and what its split is too small for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.searches import SOUND, write_space
from tuning import cli
from ugrl.data.folder import FolderSource
from ugrl.data.prepare import prepare


def folder(root: Path, held: int, masks: bool, owls: bool) -> Path:
    """Shards of 60 tagged photographs of which some are held out; whether they have masks, and show an owl."""
    for name in ("images", "masks"):
        (root / "raw" / name).mkdir(parents=True)
    rng, lines = np.random.default_rng(0), ["file,tags"]
    for k in range(60):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "raw" / "images" / f"{k:03}.png")
        lines.append(f"{k:03}.png," + ("cat", "dog")[k % 2] + ";owl" * owls)
        if masks:
            Image.fromarray(np.full((16, 16), 1, np.uint8)).save(root / "raw" / "masks" / f"{k:03}.png")
    (root / "raw" / "tags.csv").write_text("\n".join(lines))
    (root / "raw" / "classes.txt").write_text("cat\ndog\nowl\n")
    prepare(FolderSource(root / "raw"), root / "shards", tune_val=held, progress=False)
    return root / "shards"


@pytest.mark.parametrize(
    ("held", "masks", "owls", "said", "unsaid"),
    [
        (30, True, True, [], ["warning"]),
        (
            30,
            False,
            True,
            ["objective auto: split 'tune_val': none of 30 has a mask", "judged by tag_map"],
            ["too few"],
        ),
        (
            15,
            True,
            False,
            [
                "warning: split 'tune_val' steers the search with 15 images: too few to tell configurations apart",
                "warning: split 'tune_val' has no image of 1 of 3 classes (owl)",
            ],
            ["objective auto"],
        ),
    ],
)
def test_a_dry_run_says_what_steers_the_search(
    held: int,
    masks: bool,
    owls: bool,
    said: list[str],
    unsaid: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = folder(tmp_path, held, masks, owls)
    space = write_space(tmp_path / "space.yaml", SOUND, scheduler={"grace_steps": 6, "reduction_factor": 2})
    words = ["--dry-run", "--space", str(space), "--data", str(shards), "--step-s", "1"]
    capsys.readouterr()
    assert cli.main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"objective: {'seg_miou' if masks else 'tag_map'} (max) on 'tune_val'" in shown
    for text in said:
        assert text in shown
    for text in unsaid:
        assert text not in shown


def test_a_limit_of_the_validation_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = folder(tmp_path, 30, True, True)
    space = write_space(tmp_path / "space.yaml", SOUND, scheduler={"grace_steps": 6, "reduction_factor": 2})
    assert cli.main(["--dry-run", "--space", str(space), "--data", str(shards), "--step-s", "1", "eval.limit=10"]) == 0
    assert "with 10 images, by eval.limit: too few" in " ".join(capsys.readouterr().out.split())


def test_shards_that_cannot_steer_a_search_are_refused_by_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--dry-run", "--space", "shapes", "--data", str(tmp_path), "--step-s", "1"]) == 2
    assert "manifest.json" in capsys.readouterr().err
