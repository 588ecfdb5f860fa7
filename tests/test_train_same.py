"""A run is resumed on the images that it began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.shards import Manifest
from ugrl.errors import CheckpointError
from ugrl.train import checkpoint
from ugrl.train.loop import Trainer
from ugrl.train.run import plan_run


def test_resume_on_other_images_of_the_same_classes_is_refused(shards: Path, tmp_path: Path) -> None:
    cfg, out = build(tiny_tree(steps=3)), tmp_path / "run"
    Trainer(cfg, shards=shards, out=out, quiet=True, device="cpu").fit()
    spec = ShapesSpec(train=24, val=16, size=48, difficulty=0.5, seed=4)
    other = prepare(ShapesSource(spec), tmp_path / "other", tune_val=0.17, seed=0)
    first = Manifest.load(shards)
    assert first.class_names == other.class_names
    found = checkpoint.latest(out)
    assert found is not None and checkpoint.read_state(found).data == first.fingerprint("train", "val")
    words = rf"trained on data {first.fingerprint('train', 'val')}, while those of .*other are " + other.fingerprint(
        "train", "val"
    )
    with pytest.raises(CheckpointError, match=words) as caught:
        plan_run(cfg, data=tmp_path / "other", out=out, resume=True)
    assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError, match=words):  # whoever does not plan, as a worker of a cluster
        Trainer(cfg, shards=tmp_path / "other", out=out, resume_from=out, quiet=True, device="cpu")

    # The same images in another place are the same; so is what a search holds out of them.
    moved = shutil.copytree(shards, tmp_path / "moved")
    assert plan_run(cfg, data=moved, out=out, resume=True).checkpoint == found
    tree = json.loads((moved / "manifest.json").read_text())
    del tree["splits"]["tune_val"]
    (moved / "manifest.json").write_text(json.dumps(tree))
    plan_run(cfg, data=moved, out=out, resume=True)

    # A checkpoint of before does not know its data.
    state = Path(found) / "state.json"
    tree = json.loads(state.read_text())
    del tree["data"]
    state.write_text(json.dumps(tree))
    plan_run(cfg, data=tmp_path / "other", out=out, resume=True)
    assert Trainer(cfg, shards=tmp_path / "other", out=out, resume_from=out, quiet=True, device="cpu").done == 3
