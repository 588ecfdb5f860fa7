"""Runs with encoders of timm, one of each kind: two ranks are one rank, and a resumed run is an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_train import close, losses, run
from tests.tiny import tiny_tree
from ugrl.train import checkpoint


@pytest.mark.parametrize(("name", "aux"), [("test_resnet", 0), ("test_vit", 0), ("test_vit", 2), ("pvt_v2_b0", 0)])
def test_two_ranks_and_a_resumed_run_are_one(name: str, aux: int, shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(steps=4, cls_warmup_iters=1, lr_warmup_iters=1, checkpoint_every=2, keep_checkpoints=9)
    tree["data"]["crop"] = 64
    tree["model"]["backbone"] = f"timm/{name}"
    tree["method"]["setting"] = "IV"
    if aux:
        tree["model"]["aux_classifier"] = aux
        tree["method"]["cam"]["affinity_from"] = "aux"
    run(tree, shards, tmp_path / "one")
    run(tree, shards, tmp_path / "two", world=2)
    start = tmp_path / "one" / "checkpoints" / "step_00000002"
    run(tree, shards, tmp_path / "rest", resume=start)
    one = losses(tmp_path / "one")
    assert ("cls_aux" in one[0]) == (aux > 0)
    # Position embeddings are resampled in float32.
    rel = 1e-5 if name == "test_vit" else 1e-7
    for other, first in (("two", 0), ("rest", 2)):
        found = losses(tmp_path / other)
        assert len(found) == len(one) - first
        for a, b in zip(one[first:], found, strict=True):
            close(a, b, rel=rel, floor=1e-9)
        a, b = (load_file(checkpoint.find(tmp_path / x) / "model.safetensors") for x in ("one", other))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=10 * rel, atol=1e-7)
