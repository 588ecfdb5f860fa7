"""Whether a search can be steered by what it looks at, said before anything is paid for."""

from __future__ import annotations

from tuning.search import Search
from tuning.space import weak_rung
from ugrl.data.shards import Manifest
from ugrl.eval.selection import why_no_masks
from ugrl.text import line
from ugrl.train.check import judged_rows

# Images by whose mean score two configurations can hardly be told apart.
FEW = 30
# Classes that a line names.
NAMED = 5


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
    if rows < FEW:
        limit = ", by eval.limit" if rows < manifest.rows(space.split) else ""
        found.append(
            f"split '{space.split}' steers the search with {rows} images{limit}: too few to tell configurations apart; "
            f"expected {FEW} or more"
        )
    shown = {tag for tags in manifest.tags(space.split)[:rows] for tag in tags}
    if absent := [line(name, 40) for k, name in enumerate(manifest.class_names, 1) if k not in shown]:
        names = ", ".join(absent[:NAMED]) + (" …" if len(absent) > NAMED else "")
        found.append(
            f"split '{space.split}' has no image of {len(absent)} of {len(manifest.class_names)} classes ({names}): "
            "how well they are learned does not steer the search"
        )
    weak = weak_rung(space, search.base)
    return [*found, *([weak] if weak else [])]
