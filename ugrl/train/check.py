"""What cannot work is refused before the first step: one function for every command and every worker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ugrl.config import Config
from ugrl.data.images import decode_labels
from ugrl.data.order import steps_per_epoch
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.errors import DataError
from ugrl.eval.crf import find_backend
from ugrl.eval.selection import NEEDS_MASKS, masks_text, resolve_objective
from ugrl.method.schedule import FULL
from ugrl.method.teacher import taught
from ugrl.model.specs import TIMM
from ugrl.text import line
from ugrl.types import IGNORE


def check_run(
    cfg: Config, manifest: Manifest, *, split: str | None = None, objective: str | None = None, fresh: bool = False
) -> str:
    """Refuse a run that could not be trained, or not be judged, on these shards.

    Args:
        cfg: The run; its own values go together (:func:`ugrl.config.build` has seen to crops, scales and warm-ups).
        manifest: Manifest of the prepared shards.
        split: Judged on; ``data.val_split`` by default.
        objective: Judged by; ``eval.objective`` by default.
        fresh: Whether it starts from ``model.weights``, which must be at hand then.

    Returns:
        The objective by its real name.

    Raises:
        DataError: A split is missing or empty, has too few rows for a batch, or shows no class; no mask has a pixel
            that counts; with the setting Full, a training image has no mask, and with ``method.pseudo.source`` teacher
            or agree no teacher mask.
        ConfigError: There is no such backbone; the split cannot supply the objective; the CRF's package is missing.
        CheckpointError: The weights cannot be had.
    """
    if cfg.model.backbone.startswith(TIMM):
        from ugrl.model.families import check_backbone

        check_backbone(cfg.model.backbone, cfg.model.aux_classifier)
    if cfg.eval.crf:
        find_backend(cfg.eval.crf_backend)
    split = split or cfg.data.val_split
    train = cfg.data.train_split
    steps_per_epoch(manifest.split(train).rows, cfg.train.global_batch)
    if not any(manifest.tags(train)):
        raise DataError(f"{manifest.root}: split '{train}': no image has a tag; expected images tagged with classes")
    if manifest.split(split).rows == 0:
        raise DataError(f"{manifest.root}: split '{split}' is empty; expected at least one image")
    if cfg.method.setting == FULL:
        _check_masks(cfg, manifest, train)
    if taught(cfg):
        check_teachers(cfg, manifest, train)
    name = resolve_objective(cfg, manifest, split, objective)
    if name in NEEDS_MASKS and not _any_label(cfg, manifest, split, judged_rows(cfg, manifest, split)):
        raise DataError(
            f"{manifest.root}: split '{split}': every pixel of every mask is {IGNORE} (ignored); expected labels, "
            "or eval.objective=tag_map"
        )
    if fresh and cfg.model.weights:
        from ugrl.model.pretrained import check_weights

        check_weights(cfg.model.backbone, cfg.model.weights)
    return name


def _check_masks(cfg: Config, manifest: Manifest, train: str) -> None:
    """Refuse to learn from masks that are not there."""
    info = manifest.split(train)
    needs = f"method.setting={FULL} learns from the mask of every training image"
    if info.with_masks < info.rows:
        reader = ShardReader(manifest, train, replace(cfg.data, cache_dir=None))
        missing = next((r.id for r in (reader[i] for i in range(info.rows)) if r.mask is None), None)
        raise DataError(
            f"{manifest.root}: split '{train}': {masks_text(manifest, train)}"
            + (f" (the first without one is '{line(missing, 80)}')" if missing is not None and info.with_masks else "")
            + f"; {needs}"
        )
    if not _any_label(cfg, manifest, train, info.rows):
        raise DataError(f"{manifest.root}: split '{train}': every pixel of every mask is {IGNORE} (ignored); {needs}")


def check_teachers(cfg: Config, manifest: Manifest, split: str) -> None:
    """Refuse to learn from, or to label by, teacher masks that are not there.

    Raises:
        DataError: An image of the split has none.
    """
    info = manifest.split(split)
    if info.with_teachers == info.rows:
        return
    reader = ShardReader(manifest, split, replace(cfg.data, cache_dir=None), teacher=True)
    first = next((r.id for r in (reader[i] for i in range(info.rows)) if r.teacher is None), "") if info.rows else ""
    raise DataError(
        f"{manifest.root}: split '{split}': {info.with_teachers or 'none'} of {info.rows} images have a teacher mask "
        f"(the first without one is '{line(first, 80)}'); method.pseudo.source={cfg.method.pseudo.source} needs all of "
        "them: ugrl prepare … --teacher DIR"
    )


def _any_label(cfg: Config, manifest: Manifest, split: str, count: int) -> bool:
    """Whether a mask of the first ``count`` images has a pixel that counts: mostly the first one has."""
    reader = ShardReader(manifest, split, replace(cfg.data, cache_dir=None))
    rows = (reader[i] for i in range(count))
    return any(bool((np.asarray(decode_labels(r.mask or b"", f"row {r.id}")) != IGNORE).any()) for r in rows)


def judged_rows(cfg: Config, manifest: Manifest, split: str) -> int:
    """Rows of a split that a validation looks at."""
    rows = manifest.rows(split)
    return min(cfg.eval.limit or rows, rows)
