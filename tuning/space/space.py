"""A search space: the axes, how they are searched, and the points in it. One typed and frozen object.

The keys under ``search`` are the dotted paths of the configuration tree. So an axis of the search, a command-line
override and a line of ``best.yaml`` have the same name. :mod:`tuning.space.space_file` reads a space from YAML.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tuning.space.axis import Axis
from tuning.space.options import (
    MOST_TRIALS,
    Budget,
    Constraint,
    Final,
    Objective,
    Repeats,
    Resources,
    Sampler,
    Scheduler,
    as_float,
    mapping,
)
from ugrl import config as configs
from ugrl.config import Config, nearest
from ugrl.errors import ConfigError
from ugrl.secrets import public_database as public
from ugrl.text import brief, line


@dataclass(frozen=True)
class SearchSpace:
    """A validated search.

    Attributes:
        config: Name or path of the base configuration.
        search: The searched paths and their ranges; those that others depend on come first.
        overrides: Dotted path → value, shared by all trials.
        objectives: What is optimised; the first one ranks. ``auto`` is resolved when the shards are known.
        split: The split that trials are validated on. Never the one that results are reported on.
        budget: How much is spent.
        seed: Seed of the sampler; the trials' own seeds begin at the configuration's.
        concurrent: Trials side by side; 0 means as many as fit.
        workers: Training workers of one trial.
        resources: What a trial of one worker is given.
        sampler: Where points come from.
        scheduler: When a weak trial is stopped.
        repeats: Seeds of each configuration.
        final: What is run again at the end.
        constraints: Upper limits of costs; a trial over one of them is stopped and is never the best.
        storage: ``journal`` (a file in the search's folder) or a database URL.
        max_failures: How often a trial whose process died is started again, from its checkpoint.
        paper: A table or figure of the paper that the report sets the results beside.
        first: Points that are tried before anything is sampled; what a file leaves out comes from the base.
    """

    config: str
    search: tuple[Axis, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    objectives: tuple[Objective, ...] = (Objective("auto"),)
    split: str = "tune_val"
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    concurrent: int = 0
    workers: int = 1
    resources: Resources = field(default_factory=Resources)
    sampler: Sampler = field(default_factory=Sampler)
    scheduler: Scheduler = field(default_factory=Scheduler)
    repeats: Repeats = field(default_factory=Repeats)
    final: Final = field(default_factory=Final)
    constraints: tuple[Constraint, ...] = ()
    storage: str = "journal"
    max_failures: int = 3
    paper: str = ""
    first: tuple[Mapping[str, Any], ...] = ()

    @property
    def steers(self) -> bool:
        """Whether scores decide anything: not in a grid whose points all run to the end with all their seeds."""
        whole = self.sampler.name == "grid" and self.scheduler.name == "none" and not self.repeats.skip
        return not whole or bool(self.final.best)

    @property
    def trials(self) -> int:
        """Trials that are to end."""
        return self.budget.trials

    def axis(self, path: str) -> Axis:
        """The axis of a path."""
        return next(a for a in self.search if a.path == path)

    def base(self) -> Config:
        """The base configuration with the overrides, validated on the split it names itself."""
        return configs.load(self.config, self.overrides)

    def grid(self) -> list[dict[str, Any]]:
        """All points of a finite space, the last axis moving fastest; an axis that does not count is left out.

        Raises:
            ConfigError: An axis is not finite, or there are too many points.
        """
        points: list[dict[str, Any]] = [{}]
        for axis in self.search:
            values = axis.values()
            points = list(
                itertools.chain.from_iterable(
                    [{**p, axis.path: v} for v in values] if axis.active(p) else [p] for p in points
                )
            )
            if len(points) > MOST_TRIALS:
                raise ConfigError(
                    f"space key 'search' is a grid of {len(points):,} points or more; expected at most {MOST_TRIALS:,}"
                )
        return points

    def to_dict(self) -> dict[str, Any]:
        """The space as it stands in YAML, without credentials."""
        hidden = {"overrides": configs.public_tree(dict(self.overrides)), "storage": public(self.storage)}
        tree: dict[str, Any] = {"config": self.config, "overrides": {}, **options_dict(self), **hidden}
        tree["first"] = [dict(point) for point in self.first]
        tree["search"] = {a.path: a.spec() for a in self.search}
        return tree

    def to_yaml(self) -> str:
        """The space as a file that :func:`load_space` reads back to an equal one, but for credentials."""
        return configs.dump(self.to_dict(), default_flow_style=None, width=100)


def options_dict(space: SearchSpace) -> dict[str, Any]:
    """The options as they stand in YAML."""
    names = [o.name for o in space.objectives]
    tree: dict[str, Any] = {"objective": names[0] if len(names) == 1 else names, "split": space.split}
    for name in ("budget", "sampler", "scheduler", "repeats", "final", "resources"):
        part = getattr(space, name)
        tree[name] = {f.name: getattr(part, f.name) for f in fields(part)}
    tree["constraints"] = {c.name: c.limit for c in space.constraints}
    for name in ("seed", "concurrent", "workers", "storage", "max_failures", "paper"):
        tree[name] = getattr(space, name)
    return tree


def trial_config(base: Config, point: Mapping[str, Any], split: str | None = None, seed: int | None = None) -> Config:
    """The configuration of one trial: the base with the values of a point, validated on ``split``."""
    values = dict(point)
    if split is not None:
        values["data.val_split"] = split
    if seed is not None:
        values["seed"] = seed
    return configs.build(configs.override(configs.to_dict(base), values))


def complete_point(space: SearchSpace, key: str, point: Any, base: Config | None = None) -> dict[str, Any]:
    """A complete starting point: the values given, the base's for the rest, all inside the search.

    Args:
        space: The search.
        key: How the point is called in messages.
        point: Path → value; may be partial.
        base: The space's base configuration, where it is at hand.

    Raises:
        ConfigError: A path that is not searched, a value outside the search, values that do not go together.
    """
    base = base or space.base()
    given = mapping(key, point)
    searched = [a.path for a in space.search]
    for path in given:
        if path not in searched:
            raise ConfigError(f"space key '{key}.{line(path)}' is not searched{nearest(path, searched)}")
    made: dict[str, Any] = {}
    for axis in space.search:
        if not axis.active(made):
            if axis.path in given:
                raise ConfigError(
                    f"space key '{key}.{axis.path}' is given, but counts only {axis.describe().split(' where ')[1]}"
                )
            continue
        value = given.get(axis.path, configs.get(base, axis.path))
        number = as_float(value) if axis.kind != "choice" else None
        value = value if number is None else int(number) if axis.integer and number.is_integer() else number
        if not axis.contains(value):
            origin = "" if axis.path in given else " (from the base configuration)"
            raise ConfigError(
                f"space key '{key}.{axis.path}' is {brief(value)}{origin}; expected it within {axis.describe()}"
            )
        made[axis.path] = value
    try:
        trial_config(base, made, space.split)
    except ConfigError as error:
        raise ConfigError(f"space key '{key}': {error}") from None
    return made


def differences(a: SearchSpace, b: SearchSpace, ignore: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys in which two spaces differ, with both values."""
    flat_a, flat_b = _flatten(a.to_dict()), _flatten(b.to_dict())
    for key in [*flat_a, *(k for k in flat_b if k not in flat_a)]:
        if not {key, key.split(".")[0]} & set(ignore) and flat_a.get(key) != flat_b.get(key):
            yield key, flat_a.get(key), flat_b.get(key)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(_flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out
