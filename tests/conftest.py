from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty generated images of 48 px: train 20, tune_val 4, val 16."""
    out = tmp_path_factory.mktemp("shards") / "shapes"
    prepare(
        ShapesSource(ShapesSpec(train=24, val=16, size=48, difficulty=0.5, seed=3)),
        out,
        tune_val=0.17,
        seed=0,
        progress=False,
    )
    return out
