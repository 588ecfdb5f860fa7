"""A search space: YAML in, one typed and frozen object out, refused as a whole before anything starts.

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

An axis must fit the type of its key: a float range on an integer is refused. Both ends of every
range, every choice and every starting point go through the configuration's own checks: K = 1.2 is
refused here with the words in which ``ugrl-train`` would refuse it. What else a file may say is in
:mod:`tuning.options`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tuning.options import (
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
    build_options,
    mapping,
    options_dict,
    text,
    warm_steps,
)
from ugrl import config as configs
from ugrl.config import Config, nearest
from ugrl.errors import ConfigError
from ugrl.secrets import public_database as public
from ugrl.text import brief, line

KINDS = {
    "uniform": "any number between two",
    "loguniform": "any number between two, even on a log scale",
    "int": "any integer from one to another, both included",
    "logint": "any integer from one to another, both included, even on a log scale",
    "choice": "one of a list",
}
# Floats, in which a range is kept, hold every integer up to it.
MOST_INTEGER = 2**53
# Keys that a search must not vary: trials would not be comparable, or it is the harness that sets them.
FIXED = {
    "train.steps": "makes trials that cannot be compared",
    "train.eval_every": "makes trials that cannot be compared",
    "data.val_split": "makes trials that cannot be compared",
    "seed": "is what 'repeats' is for",
}


@dataclass(frozen=True)
class Axis:
    """One searched path: a range (``low``, ``high``) or a list of ``options``.

    Attributes:
        path: Dotted path of the configuration.
        kind: One of :data:`KINDS`.
        low: Lower end of a range.
        high: Upper end of a range, included.
        options: Of a choice.
        step: Distance of the values of a range; 0 for any value.
        when: Path → values: the axis counts only where these other axes have one of these values.
    """

    path: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    options: tuple[Any, ...] = ()
    step: float = 0.0
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @property
    def name(self) -> str:
        """The last word of the path."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def log(self) -> bool:
        """Whether the axis is even on a log scale."""
        return self.kind in ("loguniform", "logint")

    @property
    def integer(self) -> bool:
        """Whether the values are integers by kind."""
        return self.kind in ("int", "logint")

    @property
    def edges(self) -> tuple[Any, ...]:
        """The values to check: both ends of a range, all of a list."""
        return self.options if self.kind == "choice" else (self.low, self.high)

    def contains(self, value: Any) -> bool:
        """Whether a point may have this value.

        >>> Axis("method.contrast.keep", "uniform", 0.05, 0.8).contains(0.9)
        False
        >>> Axis("method.contrast.keep", "uniform", 0.1, 0.8, step=0.1).contains(0.25)
        False
        """
        if self.kind == "choice":
            return any(value == o and isinstance(value, bool) == isinstance(o, bool) for o in self.options)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.low <= value <= self.high or (self.integer and not float(value).is_integer()):
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return abs(steps - round(steps)) < 1e-6

    def active(self, point: Mapping[str, Any]) -> bool:
        """Whether the axis counts, given the values of the axes before it."""
        return all(path in point and point[path] in values for path, values in self.when)

    def values(self) -> tuple[Any, ...]:
        """All values of a finite axis.

        >>> Axis("method.contrast.keep", "uniform", 0.2, 0.8, step=0.3).values()
        (0.2, 0.5, 0.8)

        Raises:
            ConfigError: The axis has no end of them.
        """
        if self.kind == "choice":
            return self.options
        if not self.step and self.kind != "int":
            raise ConfigError(
                f"space key 'search.{self.path}' is {self.describe()}; a grid needs a choice, an int, or a range with "
                "a step"
            )
        step = self.step or 1
        count = int(round((self.high - self.low) / step)) + 1
        if count > MOST_TRIALS:
            raise ConfigError(
                f"space key 'search.{self.path}' has {count:,} values; a grid has at most {MOST_TRIALS:,}"
            )
        made = [self.low + k * step for k in range(count)]
        return tuple(int(v) for v in made) if self.integer else tuple(round(v, 12) for v in made)

    def describe(self) -> str:
        """The axis in a few characters, for tables and messages."""
        if self.kind == "choice":
            shown = "{" + ", ".join(str(o) for o in self.options) + "}"
        else:
            shown = f"[{self.low:g}, {self.high:g}]{' log' if self.log else ''}"
            shown += f" step {self.step:g}" if self.step else ""
        for path, values in self.when:
            shown += f" where {path.rsplit('.', 1)[-1]} is {' or '.join(str(v) for v in values)}"
        return shown

    def spec(self) -> dict[str, Any]:
        """The axis as it stands in YAML."""
        made: dict[str, Any] = {self.kind: list(self.edges)}
        if self.step:
            made["step"] = self.step
        if self.when:
            made["when"] = {path: list(values) for path, values in self.when}
        return made


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


def trial_config(base: Config, point: Mapping[str, Any], split: str | None = None, seed: int | None = None) -> Config:
    """The configuration of one trial: the base with the values of a point, validated on ``split``."""
    values = dict(point)
    if split is not None:
        values["data.val_split"] = split
    if seed is not None:
        values["seed"] = seed
    return configs.build(configs.override(configs.to_dict(base), values))


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
    made["search"] = tuple(_ordered(list(_axes(axes, base))))
    space = SearchSpace(**made)
    _check_search(space, base, points)
    space = replace(space, first=tuple(complete_point(space, f"first[{i}]", p, base) for i, p in enumerate(points)))
    if space.sampler.name == "grid":
        count = len(space.grid())
        asked = "trials" in values or "trials" in mapping("budget", tree.get("budget", {}))
        trials = min(space.trials, count) if asked else count
        space = replace(space, budget=replace(space.budget, trials=trials))
    return space


# Steps after the warm-ups by which a network tells its classes apart; half of what follows them where that is less.
ROOM = 1000


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


def _axes(tree: Mapping[str, Any], base: Config) -> Iterator[Axis]:
    if not tree:
        raise ConfigError("space key 'search' is empty; expected at least one path with a range")
    for path, spec in tree.items():
        try:
            configs.check_path(path)
        except ConfigError as error:
            raise ConfigError(f"space key 'search.{line(path)}': {error}") from None
        if path in FIXED or path.startswith("cluster."):
            why = FIXED.get(path, "says where a run runs, not what it is")
            raise ConfigError(f"space key 'search.{line(path)}' {why}; expected another path")
        kinds = [k for k in spec if k not in ("step", "when")] if isinstance(spec, Mapping) else []
        if len(kinds) > 1 and (wrong := [k for k in kinds if k not in KINDS]):
            names = [*KINDS, "step", "when"]
            raise ConfigError(f"unknown space key 'search.{path}.{line(str(wrong[0]))}'{nearest(str(wrong[0]), names)}")
        if len(kinds) != 1:
            raise ConfigError(
                f"space key 'search.{path}' is {brief(spec)}; expected one of {', '.join(KINDS)}, as "
                "{uniform: [0, 1]} (a constant belongs to 'overrides')"
            )
        if kinds[0] not in KINDS:
            kind = str(kinds[0])
            raise ConfigError(f"space key 'search.{path}': unknown kind '{line(kind)}'{nearest(kind, KINDS)}")
        axis = _axis(path, kinds[0], spec[kinds[0]], spec.get("step"))
        if isinstance(configs.get(base, path), bool) and axis.kind != "choice":
            raise ConfigError(f"space key 'search.{path}' is a {axis.kind} range, but the key is true or false")
        if isinstance(configs.get(base, path), int) and axis.kind in ("uniform", "loguniform"):
            other = "logint" if axis.log else "int"
            raise ConfigError(
                f"space key 'search.{path}' is a {axis.kind} range, but the key is an integer; expected {other} or a "
                "choice"
            )
        yield replace(axis, when=_conditions(path, spec.get("when"), tree))


def _axis(path: str, kind: str, value: Any, step: Any) -> Axis:
    key = f"search.{path}.{kind}"
    if kind == "choice":
        scalars = isinstance(value, list) and all(isinstance(v, str | int | float | bool) for v in value)
        if not scalars or len(value) < 2 or len(set(value)) != len(value):
            raise ConfigError(f"space key '{key}' is {brief(value)}; expected a list of two or more different values")
        if step is not None:
            raise ConfigError(f"space key 'search.{path}.step' is {brief(step)}; a choice has no step")
        return Axis(path, kind, options=tuple(value))
    numbers = [as_float(v) for v in value] if isinstance(value, list) and len(value) == 2 else []
    low, high = (numbers + [None, None])[:2]
    if low is None or high is None or low >= high:
        raise ConfigError(f"space key '{key}' is {brief(value)}; expected [low, high] with low < high")
    if kind in ("loguniform", "logint") and low <= 0:
        raise ConfigError(f"space key '{key}' is {brief(value)}; expected low > 0 on a log scale")
    if kind in ("int", "logint"):
        if not (low.is_integer() and high.is_integer()):
            raise ConfigError(f"space key '{key}' is {brief(value)}; expected integers")
        low, high = int(low), int(high)
        if max(-low, high) > MOST_INTEGER:
            raise ConfigError(f"space key '{key}' is {brief(value)}; expected integers up to {MOST_INTEGER}")
    return Axis(path, kind, low, high, step=_step(path, kind, low, high, step))


def _step(path: str, kind: str, low: float, high: float, step: Any) -> float:
    if step is None:
        return 0.0
    number = as_float(step)
    if number is None or number <= 0 or number > high - low or (kind == "int" and not number.is_integer()):
        expected = "an integer" if kind == "int" else "a number"
        raise ConfigError(
            f"space key 'search.{path}.step' is {brief(step)}; expected {expected} > 0 and ≤ {high - low:g}"
        )
    if kind in ("loguniform", "logint"):
        raise ConfigError(f"space key 'search.{path}.step' is {brief(step)}; a log scale has no step")
    count = (high - low) / number
    if abs(count - round(count)) > 1e-6:
        raise ConfigError(
            f"space key 'search.{path}.step' is {brief(step)}; {high:g} is not a whole number of steps away"
        )
    return int(number) if kind == "int" else number


def _conditions(path: str, when: Any, tree: Mapping[str, Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    made = []
    for other, values in mapping(f"search.{path}.when", when or {}).items():
        if other not in tree or other == path:
            raise ConfigError(
                f"space key 'search.{path}.when.{other}' is not a searched path"
                f"{nearest(other, [p for p in tree if p != path])}"
            )
        spec = tree[other]
        options = spec.get("choice") if isinstance(spec, Mapping) else None
        wanted = tuple(values) if isinstance(values, list) else (values,)
        if not isinstance(options, list) or not all(v in options for v in wanted):
            raise ConfigError(
                f"space key 'search.{path}.when.{other}' is {brief(values)}; expected values of a choice"
                + (f" among {', '.join(map(str, options))}" if isinstance(options, list) else "")
            )
        made.append((other, wanted))
    return tuple(made)


def _ordered(axes: list[Axis]) -> Iterator[Axis]:
    """The axes, each after those it depends on, else in the file's order."""
    given: set[str] = set()
    while axes:
        ready = next((a for a in axes if all(p in given for p, _ in a.when)), None)
        if ready is None:
            raise ConfigError(
                f"space key 'search.{axes[0].path}.when': conditions that depend on each other in a circle"
            )
        axes.remove(ready)
        given.add(ready.path)
        yield ready


def _check_search(space: SearchSpace, base: Config, points: Sequence[Any]) -> None:
    """Everything that needs the base configuration: ends of ranges, warm-ups, what must not be searched."""
    tree = configs.to_dict(base)
    for axis in space.search:
        if axis.path in space.overrides:
            raise ConfigError(f"space key 'overrides.{axis.path}' is also searched; expected it in one of the two")
        for value in axis.edges:
            try:
                configs.build(configs.override(tree, {axis.path: value}))
            except ConfigError as error:
                raise ConfigError(f"space key 'search.{axis.path}': {error}") from None
    if space.split == base.data.train_split:
        raise ConfigError(
            f"space key 'split' is '{space.split}', the training split; expected another, such as tune_val"
        )
    if (space.final.best or space.final.every) and space.final.split == base.data.train_split:
        raise ConfigError(
            f"space key 'final.split' is '{space.final.split}', the training split; expected an untouched one"
        )
    train = base.train
    if space.scheduler.name != "none":
        if len(space.objectives) > 1:
            raise ConfigError(
                f"space key 'scheduler.name' is '{space.scheduler.name}'; with {len(space.objectives)} objectives no "
                "trial can be stopped early: expected none"
            )
        grace, warm = space.scheduler.grace_steps, warm_steps(base)
        if grace <= warm:
            raise ConfigError(
                f"space key 'scheduler.grace_steps' is {grace:g}; expected > both warm-ups "
                f"(train.lr_warmup_iters {train.at(train.lr_warmup_iters)}, "
                f"train.cls_warmup_iters {train.at(train.cls_warmup_iters)})"
            )
        if grace > train.steps:
            raise ConfigError(f"space key 'scheduler.grace_steps' is {grace:g}; expected ≤ train.steps {train.steps}")
    if space.sampler.name == "grid":
        for axis in space.search:
            axis.values()
    if space.sampler.name == "cmaes" and (choices := [a.path for a in space.search if a.kind == "choice"]):
        raise ConfigError(f"space key 'sampler.name' is 'cmaes', which cannot vary the choice '{choices[0]}'")
    if space.sampler.name == "cmaes" and (len(space.search) < 2 or space.constraints):
        what = "constraints" if space.constraints else "a single axis"
        raise ConfigError(f"space key 'sampler.name' is 'cmaes', which cannot handle {what}; expected tpe or gp")
    if space.sampler.name == "grid" and points:
        raise ConfigError("space key 'first' has points, but a grid has all of its own")
    if space.sampler.name == "cmaes" and any(a.when for a in space.search):
        raise ConfigError("space key 'sampler.name' is 'cmaes', which cannot vary conditional axes")
    if len(space.objectives) > 1 and space.sampler.name == "cmaes":
        raise ConfigError("space key 'sampler.name' is 'cmaes', which has one objective; expected tpe, nsga2 or gp")


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


def finite(value: Any) -> bool:
    """Whether a value is a finite number.

    >>> finite(float("nan")), finite(1)
    (False, True)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
