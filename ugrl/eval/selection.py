"""Which metric a run or a search may be judged by, given what the shards hold."""

from __future__ import annotations

from ugrl.config import Config
from ugrl.data.shards import Manifest
from ugrl.errors import ConfigError
from ugrl.text import nearest

NEEDS_MASKS = ("seg_miou", "cam_miou")
NEEDS_TAGS = ("tag_map", "tag_f1")


def available(cfg: Config, manifest: Manifest, split: str) -> tuple[str, ...]:
    """Objectives that a split of these shards can supply, the preferred one first; none where it has no labels."""
    info = manifest.split(split)
    found: tuple[str, ...] = ()
    if info.rows > 0 and info.with_masks == info.rows:
        found = tuple(name for name in NEEDS_MASKS if name != "cam_miou" or cfg.eval.cam)
    # A class counts where an image shows it: without one there is nothing to rank.
    if any(manifest.tags(split)[: cfg.eval.limit or None]):
        found += NEEDS_TAGS
    return found


def resolve_objective(cfg: Config, manifest: Manifest, split: str, name: str | None = None) -> str:
    """The metric to judge by; ``auto`` is segmentation mIoU with masks and tag mAP without.

    Raises:
        ConfigError: An unknown name, or one that the split cannot supply; those it can are named.
    """
    wanted = name or cfg.eval.objective
    if wanted not in ("auto", *NEEDS_MASKS, *NEEDS_TAGS):
        raise ConfigError(f"objective '{wanted}' is unknown{nearest(wanted, NEEDS_MASKS + NEEDS_TAGS)}")
    have = available(cfg, manifest, split)
    if not have:
        raise ConfigError(
            f"objective '{wanted}': split '{split}' can score nothing: none of its images has a tag, and "
            f"{masks_text(manifest, split)}; expected tags in it, or a mask for every image"
        )
    if wanted == "auto":
        return have[0]
    if wanted not in have:
        why = "does not measure it"
        if wanted in NEEDS_TAGS:
            why = "has no image with a tag"
        elif have == NEEDS_TAGS:
            why = "has no masks" if not manifest.split(split).with_masks else masks_text(manifest, split)
        raise ConfigError(f"objective '{wanted}': split '{split}' {why}; it can supply {', '.join(have)}")
    return wanted


def masks_text(manifest: Manifest, split: str) -> str:
    """How many images of a split have a mask, in words."""
    info = manifest.split(split)
    return (
        f"{info.with_masks or 'none'} of {info.rows} has a mask"
        if info.with_masks < 2
        else (f"{info.with_masks} of {info.rows} have masks")
    )


def why_no_masks(manifest: Manifest, split: str, objective: str) -> str:
    """Why ``auto`` judges by tags: empty where it judges by masks."""
    if objective in NEEDS_MASKS:
        return ""
    return (
        f"split '{split}': {masks_text(manifest, split)}, and seg_miou needs one for every image: judged by {objective}"
    )
