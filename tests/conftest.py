from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ugrl.config import Config, build
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


def tiny_tree(**train: object) -> dict:
    """A run of a few steps that touches every part of the method."""
    return {
        "data": {"crop": 48, "scale_min": 0.75, "scale_max": 1.25, "threads": 0},
        "model": {"backbone": "tiny", "decoder_dim": 16, "drop_path": 0.2, "dropout": 0.2},
        "method": {
            "cam": {"scales": [1.0, 0.5], "refine": "none"},
            "uncertainty": {"d_cls": 32, "radius": 3},
            "contrast": {"d_seg": 16},
        },
        "train": {
            "steps": 6,
            "global_batch": 4,
            "lr": 6e-4,
            "head_lr_ratio": 1.0,
            "norm_lr_mult": 1.0,
            "lr_warmup_iters": 2,
            "cls_warmup_iters": 2,
            "log_every": 1,
            "eval_every": 100,
            "picture_every": 100,
            "checkpoint_every": 100,
            **train,
        },
    }


@pytest.fixture
def tiny_config() -> Config:
    return build(tiny_tree())
