"""Warnings: what makes a search that is allowed a weak one, said before anything is paid for."""

from __future__ import annotations

import math

from tuning.space.options import warm_steps
from tuning.space.search import Search
from tuning.space.space import SearchSpace
from ugrl.config import Config
from ugrl.data.shards import Manifest
from ugrl.eval.selection import why_no_masks
from ugrl.text import line
from ugrl.train.check import judged_rows

# The split that is cut out of train for searches.
TUNE_VAL = "tune_val"
# Steps after the warm-ups by which a network tells its classes apart; half of what follows them where that is less.
ROOM = 1000
# Images by whose mean score two configurations can hardly be told apart.
FEW = 30
# Classes that a line names.
NAMED = 5


def weak_rung(space: SearchSpace, base: Config) -> str | None:
    """Why the first rung would compare trials that have learned nothing yet, in one line; ``None`` where it is sound.

    Until the warm-ups end, no segmentation loss is there: every trial scores as a predictor does that sees nothing but
    background, and for a while after.
    """
    steps, warm, grace = base.train.steps, warm_steps(base), space.scheduler.grace_steps
    least = warm + min(ROOM, (steps - warm) // 2)
    if space.scheduler.name == "none" or grace >= least:
        return None
    return (
        f"the first rung, at step {grace:g}, is {grace - warm:g} steps after the warm-ups: scores there are hardly "
        "more than those of a predictor of nothing but background; expected scheduler.grace_steps "
        f"≥ {least} of {steps}, or a share such as {math.ceil(100 * least / steps) / 100:g}"
    )


def remarks(search: Search) -> list[str]:
    """What makes a search with known shards a weak one, one line each.

    Args:
        search: With its objectives by their real names.
    """
    space, manifest = search.space, Manifest.load(search.shards)
    rows = judged_rows(search.base, manifest, space.split)
    found = []
    if space.objectives[0].name == "auto" and (why := why_no_masks(manifest, space.split, search.objective)):
        found.append(f"objective auto: {why}")
    if rows < FEW and space.steers:
        limit = ", by eval.limit" if rows < manifest.rows(space.split) else ""
        found.append(
            f"split '{space.split}' steers the search with {rows} images{limit}: too few to tell configurations apart; "
            f"expected {FEW} or more"
        )
    shown = {tag for tags in manifest.tags(space.split)[:rows] for tag in tags}
    if absent := [line(name, 40) for k, name in enumerate(manifest.class_names, 1) if k not in shown]:
        names = ", ".join(absent[:NAMED]) + (" …" if len(absent) > NAMED else "")
        without = "steer the search" if space.steers else "show in its scores"
        found.append(
            f"split '{space.split}' has no image of {len(absent)} of {len(manifest.class_names)} classes ({names}): "
            f"how well they are learned does not {without}"
        )
    if space.paper and TUNE_VAL in manifest.splits:
        rows, held = manifest.rows(search.base.data.train_split), manifest.rows(TUNE_VAL)
        found.append(
            f"{space.paper} trains on {rows} of {rows + held} training images: '{TUNE_VAL}' was cut out of them, and "
            "the paper trains on all; expected shards of ugrl prepare with --tune-val 0"
        )
    weak = weak_rung(space, search.base)
    return [*found, *([weak] if weak else [])]
