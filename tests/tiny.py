"""The smallest run that still touches every part of the method."""

from __future__ import annotations


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
