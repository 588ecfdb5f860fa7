"""The run that tests of clusters repeat: twenty steps of the whole method in seconds."""

from __future__ import annotations

TINY = {
    "data.crop": 32,
    "data.shapes.train": 32,
    "data.shapes.val": 7,
    "data.shapes.size": 32,
    "data.threads": 1,
    "train.steps": 20,
    "train.global_batch": 6,
    "train.lr_warmup_iters": 2,
    "train.cls_warmup_iters": 6,
    "train.eval_every": 20,
    "train.checkpoint_every": 4,
    "train.picture_every": 1000,
    "train.log_every": 1,
    "train.record_ids": True,
    "train.dtype": "float64",
    "cluster.cpus_per_worker": 1,
    "cluster.data_cpus": 0,
    "cluster.start_timeout_s": 20,
    "method.uncertainty.d_cls": 64,
    "method.contrast.d_seg": 32,
}
