"""Which metric a run or a search may be judged by, given what the shards hold."""

from __future__ import annotations

from ugrl.config import Config, nearest
from ugrl.data.shards import Manifest
from ugrl.errors import ConfigError

NEEDS_MASKS = ("seg_miou", "cam_miou")
NEEDS_TAGS = ("tag_map", "tag_f1")


def available(cfg: Config, manifest: Manifest, split: str) -> tuple[str, ...]:
    """Objectives that a split of these shards can supply, the preferred one first."""
    info = manifest.split(split)
    masks = info.rows > 0 and info.with_masks == info.rows
    with_masks = tuple(name for name in NEEDS_MASKS if name != "cam_miou" or cfg.eval.cam)
    return (*with_masks, *NEEDS_TAGS) if masks else NEEDS_TAGS


def resolve_objective(cfg: Config, manifest: Manifest, split: str, name: str | None = None) -> str:
    """The metric to judge by; ``auto`` is segmentation mIoU with masks and tag mAP without.

    Raises:
        ConfigError: An unknown name, or one that the split cannot supply; those it can are named.
    """
    wanted = name or cfg.eval.objective
    have = available(cfg, manifest, split)
    if wanted == "auto":
        return have[0]
    if wanted not in NEEDS_MASKS + NEEDS_TAGS:
        raise ConfigError(f"objective '{wanted}' is unknown{nearest(wanted, NEEDS_MASKS + NEEDS_TAGS)}")
    if wanted not in have:
        why = "has no masks" if wanted in NEEDS_MASKS and have == NEEDS_TAGS else "does not measure it"
        raise ConfigError(f"objective '{wanted}': split '{split}' {why}; it can supply {', '.join(have)}")
    return wanted
