"""What ``ugrl-train`` says before and after the first steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from tests.own import ROWS, own_shards
from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.train.loop import Trainer
from ugrl.train.observer import Hooks

TREE = tiny_tree(steps=8, cls_warmup_iters=1, lr_warmup_iters=1)
TREE["data"]["crop"] = 32


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images to train on; one of the two to judge by has a mask."""
    return own_shards(tmp_path_factory.mktemp("own"), [*ROWS[:-1], (*ROWS[-1][:3], None)])


def test_a_run_says_what_it_is_and_how_long_it_takes(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TREE))
    argv = ["--config", str(file), "--data", str(own), "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"device cpu  tiny with \d\.\d M parameters  2 classes", lines[0])
    assert lines[1:4] == [
        "images 6 train, 2 val  judged by tag_map",
        "steps 8 of 4 crops of 32 px = 8.0 epochs",
        "split 'val': 1 of 2 has a mask, and seg_miou needs one for every image: judged by tag_map",
    ]
    assert [s for s in lines if re.fullmatch(r"step 6  [\d.]+ m?s a step: about .* left", s)]
    assert main([*argv, "--out", str(tmp_path / "quiet"), "--quiet"]) == 0
    assert [s.split()[0] for s in capsys.readouterr().err.splitlines()] == ["run:", "next:"]


def test_workers_tell_the_same_to_their_driver(own: Path) -> None:
    said: list[str] = []
    hooks = Hooks(on_event=said.append)
    Trainer(build(TREE), shards=own, out=None, quiet=True, device="cpu", hooks=hooks).fit()
    assert said[0].startswith("device cpu  tiny with") and said[2].startswith("steps 8 of 4 crops")
    assert [s for s in said if " a step: about " in s]
