"""Space files: YAML in, one typed and frozen object out, refused as a whole before anything starts.

The keys under ``search`` are the dotted paths of the configuration tree, so an axis of the search,
a command-line override and a line of ``best.yaml`` have the same name::

    config: shapes                       # the base configuration: a shipped name or a file
    overrides: {train.steps: 400}        # constants that every trial shares
    search:
      method.uncertainty.alpha: {loguniform: [1, 50]}
      method.contrast.keep: {uniform: [0.05, 0.8], step: 0.05}
      method.uncertainty.d_cls: {choice: [256, 512, 1024, 2048]}
      method.uncertainty.u_min:          # only where another axis has one of these values
        {loguniform: [0.01, 0.2], when: {method.uncertainty.weighting: inverse_exp}}
    first:                               # tried before anything is sampled; missing keys from the base
      - {method.contrast.keep: 0.35}

What else a file may say is in :mod:`tuning.space.options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tuning.space.axis import read_axes
from tuning.space.options import build_options, mapping, text
from tuning.space.space import SearchSpace, complete_point
from tuning.space.validate import check_space
from ugrl import config as configs
from ugrl.config import nearest
from ugrl.errors import ConfigError
from ugrl.text import brief, line


def load_space(
    name: str | Path, *, overrides: Mapping[str, Any] | None = None, **changes: int | str | None
) -> SearchSpace:
    """Read and check a search space.

    Args:
        name: A file, or the name of a shipped one (``shapes``, ``voc``, ``table3``, …).
        overrides: Dotted paths and values that are added to the file's own overrides.
        **changes: Fields to replace (``trials=4``, ``config="shapes"``); ``None`` leaves the file's value.

    Raises:
        ConfigError: One line that names the file, the key, the value and what was expected.
    """
    path = configs.find_yaml(name, "tuning")
    tree = configs.read_yaml(path)
    try:
        return build_space(tree, overrides=overrides, **changes)
    except ConfigError as error:
        raise ConfigError(f"{line(path.name)}: {line(error, 400)}") from None


def build_space(
    tree: Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None, **changes: int | str | None
) -> SearchSpace:
    """The search space of a mapping; see :func:`load_space`."""
    names = [f.name for f in fields(SearchSpace) if f.name != "objectives"] + ["objective", "trials"]
    for key in tree:
        if key not in names:
            raise ConfigError(f"unknown space key '{key}'{nearest(str(key), names)}")
    for key in ("config", "search"):
        if key not in tree:
            raise ConfigError(f"space key '{key}' is missing")
    values: dict[str, Any] = {**tree, **{k: v for k, v in changes.items() if v is not None}}
    made: dict[str, Any] = {
        "config": text("config", values.pop("config")),
        "overrides": {**mapping("overrides", values.pop("overrides", {})), **(overrides or {})},
    }
    points = values.pop("first", None) or []
    if not isinstance(points, list | tuple):
        raise ConfigError(f"space key 'first' is {brief(points)}; expected a list of points")
    axes = mapping("search", values.pop("search"))
    base = configs.load(made["config"], made["overrides"])
    made.update(build_options(values, base))
    made["search"] = read_axes(axes, base)
    space = SearchSpace(**made)
    check_space(space, base, points)
    space = replace(space, first=tuple(complete_point(space, f"first[{i}]", p, base) for i, p in enumerate(points)))
    if space.sampler.name == "grid":
        count = len(space.grid())
        asked = "trials" in values or "trials" in mapping("budget", tree.get("budget", {}))
        trials = min(space.trials, count) if asked else count
        space = replace(space, budget=replace(space.budget, trials=trials))
    return space
