"""A search space: YAML in, one typed and frozen object out, refused as a whole before anything starts.

The keys under ``search`` are the dotted paths of the configuration tree, so an axis of the search,
a command-line override and a line of ``best.yaml`` have the same name::

    config: shapes                       # the base configuration: a shipped name or a file
    overrides: {train.steps: 400}        # what every trial shares
    search:
      method.uncertainty.alpha: {loguniform: [1, 50]}
      method.uncertainty.d_cls: {choice: [256, 512, 1024, 2048]}
    first:                               # tried before anything is sampled; missing keys from the base
      - {method.contrast.keep: 0.35}

Both ends of every range, every choice and every starting point go through the configuration's own
checks: K = 1.2 is refused here with the words in which ``ugrl-train`` would refuse it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ugrl import config as configs
from ugrl.config import Config, nearest
from ugrl.errors import ConfigError

KINDS = {
    "uniform": "any number between two",
    "loguniform": "any number between two, even on a log scale",
    "int": "any integer from one to another, both included",
    "logint": "any integer from one to another, both included, even on a log scale",
    "choice": "one of a list",
}


@dataclass(frozen=True)
class Axis:
    """One searched path: a range (``low``, ``high``) or a list of ``options``."""

    path: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    options: tuple[Any, ...] = ()

    @property
    def log(self) -> bool:
        """Whether the axis is even on a log scale."""
        return self.kind in ("loguniform", "logint")

    @property
    def edges(self) -> tuple[Any, ...]:
        """The values to check: both ends of a range, all of a list."""
        return self.options if self.kind == "choice" else (self.low, self.high)

    def contains(self, value: Any) -> bool:
        """Whether a point may have this value.

        >>> Axis("method.contrast.keep", "uniform", 0.05, 0.8).contains(0.9)
        False
        """
        if self.kind == "choice":
            return value in self.options
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and (self.kind not in ("int", "logint") or float(value).is_integer())

    def describe(self) -> str:
        """The axis in a few characters, for tables and messages."""
        if self.kind == "choice":
            return "{" + ", ".join(str(o) for o in self.options) + "}"
        return f"[{self.low:g}, {self.high:g}]{' log' if self.log else ''}"

    def spec(self) -> dict[str, Any]:
        """The axis as it stands in YAML."""
        return {self.kind: list(self.edges)}


@dataclass(frozen=True)
class Resources:
    """What a one-worker trial is given; larger trials take ``cluster.*_per_worker`` for each worker."""

    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0


@dataclass(frozen=True)
class Scheduler:
    """When a weak trial is stopped."""

    name: str = "asha"
    grace_steps: int = 0
    reduction_factor: float = 3.0


@dataclass(frozen=True)
class SearchSpace:
    """A validated search.

    Attributes:
        config: Name or path of the base configuration.
        overrides: Dotted path → value, shared by all trials.
        search: The axes, in file order.
        objective: ``auto`` or one of the validation's metrics; larger is better.
        split: The split that trials are validated on. Never the one that results are reported on.
        trials: How many trials are to end.
        seed: Of the sampler; the trials' own seed is the configuration's.
        concurrent: Trials side by side; 0 means as many as fit.
        workers: Training workers of one trial.
        resources: See :class:`Resources`.
        scheduler: See :class:`Scheduler`.
        storage: ``journal`` (a file in the run's folder) or a database URL.
        first: Complete points that are tried before anything is sampled.
    """

    config: str
    search: tuple[Axis, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "auto"
    split: str = "tune_val"
    trials: int = 20
    seed: int = 0
    concurrent: int = 0
    workers: int = 1
    resources: Resources = field(default_factory=Resources)
    scheduler: Scheduler = field(default_factory=Scheduler)
    storage: str = "journal"
    first: tuple[Mapping[str, Any], ...] = ()

    def axis(self, path: str) -> Axis:
        """The axis of a path."""
        return next(a for a in self.search if a.path == path)

    def base(self) -> Config:
        """The base configuration with the overrides, validated on the split it names itself."""
        return configs.load(self.config, self.overrides)

    def to_dict(self) -> dict[str, Any]:
        """The space as it stands in YAML."""
        tree: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tree["overrides"] = dict(self.overrides)
        tree["resources"] = {f.name: getattr(self.resources, f.name) for f in fields(Resources)}
        tree["scheduler"] = {f.name: getattr(self.scheduler, f.name) for f in fields(Scheduler)}
        tree["first"] = [dict(point) for point in self.first]
        tree["search"] = {a.path: a.spec() for a in self.search}
        return tree

    def to_yaml(self) -> str:
        """The space as a file that :func:`load_space` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)


def trial_config(base: Config, point: Mapping[str, Any], split: str | None = None) -> Config:
    """The configuration of one trial: the base with the values of a point, validated on ``split``."""
    values = dict(point)
    if split is not None:
        values["data.val_split"] = split
    return configs.build(configs.override(configs.to_dict(base), values))


def load_space(
    name: str | Path, *, overrides: Mapping[str, Any] | None = None, **changes: int | str | None
) -> SearchSpace:
    """Read and check a search space.

    Args:
        name: A file, or the name of a shipped one (``shapes``, ``coco100``, ``voc``, ``coco``).
        overrides: Dotted paths and values that are added to the file's own overrides.
        **changes: Fields to replace (``trials=4``); ``None`` leaves the file's value.

    Raises:
        ConfigError: One line that names the file, the key, the value and what was expected.
    """
    path = configs.find_yaml(name, "tuning")
    tree = configs.read_yaml(path)
    try:
        return build_space(tree, overrides=overrides, **changes)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def build_space(
    tree: Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None, **changes: int | str | None
) -> SearchSpace:
    """The search space of a mapping; see :func:`load_space`."""
    _known("", tree, SearchSpace)
    for key in ("config", "search"):
        if key not in tree:
            raise ConfigError(f"space key '{key}' is missing")
    values: dict[str, Any] = {**tree, **{k: v for k, v in changes.items() if v is not None}}
    values["config"] = _text("config", values["config"])
    values["overrides"] = {**_mapping("overrides", tree.get("overrides", {})), **(overrides or {})}
    values["search"] = tuple(_axes(_mapping("search", tree["search"])))
    values["resources"] = _resources(_mapping("resources", tree.get("resources", {})))
    values["scheduler"] = _scheduler(_mapping("scheduler", tree.get("scheduler", {})))
    for key in ("objective", "split", "storage"):
        if key in values:
            values[key] = _text(key, values[key])
    for key, lowest in (("trials", 1), ("seed", 0), ("concurrent", 0), ("workers", 1)):
        if key in values:
            values[key] = _integer(key, values[key], lowest)
    if values.get("storage", "journal") != "journal" and "://" not in values["storage"]:
        raise ConfigError(
            f"space key 'storage' is {values['storage']!r}; expected journal or a URL like sqlite:///study.db"
        )
    points = values.pop("first", [])
    if not isinstance(points, list | tuple):
        raise ConfigError(f"space key 'first' is {points!r}; expected a list of points")
    space = SearchSpace(**values)
    _check_search(space)
    return replace(space, first=tuple(_point(space, i, p) for i, p in enumerate(points)))


def differences(a: SearchSpace, b: SearchSpace, ignore: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys in which two spaces differ, with both values."""
    flat_a, flat_b = _flatten(a.to_dict()), _flatten(b.to_dict())
    for key in [*flat_a, *(k for k in flat_b if k not in flat_a)]:
        if key.split(".")[0] not in ignore and flat_a.get(key) != flat_b.get(key):
            yield key, flat_a.get(key), flat_b.get(key)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(_flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _known(prefix: str, tree: Mapping[str, Any], cls: type) -> None:
    names = [f.name for f in fields(cls)]
    for key in tree:
        if key not in names:
            raise ConfigError(f"unknown space key '{prefix}{key}'{nearest(str(key), names)}")


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"space key '{key}' is {value!r}; expected keys and values")
    return {str(k): v for k, v in value.items()}


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"space key '{key}' is {value!r}; expected text")
    return value


def _integer(key: str, value: Any, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ConfigError(f"space key '{key}' is {value!r}; expected an integer ≥ {lowest}")
    return value


def _number(key: str, value: Any, lowest: float) -> float:
    number = _as_float(value)
    if number is None or number < lowest:
        raise ConfigError(f"space key '{key}' is {value!r}; expected a number ≥ {lowest:g}")
    return number


def _as_float(value: Any) -> float | None:
    """A finite number, also where YAML reads ``1e-3`` as text; ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _axes(tree: Mapping[str, Any]) -> Iterator[Axis]:
    if not tree:
        raise ConfigError("space key 'search' is empty; expected at least one path with a range")
    for path, spec in tree.items():
        try:
            configs.check_path(path)
        except ConfigError as error:
            raise ConfigError(f"space key 'search.{path}': {error}") from None
        if not isinstance(spec, Mapping) or len(spec) != 1:
            raise ConfigError(
                f"space key 'search.{path}' is {spec!r}; expected one of {', '.join(KINDS)}, as {{uniform: [0, 1]}}"
            )
        ((kind, value),) = spec.items()
        if kind not in KINDS:
            raise ConfigError(f"space key 'search.{path}': unknown kind '{kind}'{nearest(str(kind), KINDS)}")
        yield _axis(path, kind, value)


def _axis(path: str, kind: str, value: Any) -> Axis:
    key = f"search.{path}.{kind}"
    if kind == "choice":
        scalars = isinstance(value, list) and all(isinstance(v, str | int | float | bool) for v in value)
        if not scalars or len(value) < 2 or len(set(value)) != len(value):
            raise ConfigError(f"space key '{key}' is {value!r}; expected a list of two or more different values")
        return Axis(path, kind, options=tuple(value))
    numbers = [_as_float(v) for v in value] if isinstance(value, list) and len(value) == 2 else []
    low, high = (numbers + [None, None])[:2]
    if low is None or high is None or low >= high:
        raise ConfigError(f"space key '{key}' is {value!r}; expected [low, high] with low < high")
    if kind in ("loguniform", "logint") and low <= 0:
        raise ConfigError(f"space key '{key}' is {value!r}; expected low > 0 on a log scale")
    if kind in ("int", "logint"):
        if not (low.is_integer() and high.is_integer()):
            raise ConfigError(f"space key '{key}' is {value!r}; expected integers")
        return Axis(path, kind, int(low), int(high))
    return Axis(path, kind, low, high)


def _resources(tree: Mapping[str, Any]) -> Resources:
    _known("resources.", tree, Resources)
    made = Resources(**{k: _number(f"resources.{k}", v, 0.0) for k, v in tree.items()})
    if made.cpus_per_trial <= 0:
        raise ConfigError(f"space key 'resources.cpus_per_trial' is {made.cpus_per_trial:g}; expected a number > 0")
    return made


def _scheduler(tree: Mapping[str, Any]) -> Scheduler:
    _known("scheduler.", tree, Scheduler)
    name = tree.get("name", "asha")
    if name not in ("asha", "none"):
        raise ConfigError(f"space key 'scheduler.name' is {name!r}; expected one of asha, none")
    factor = _number("scheduler.reduction_factor", tree.get("reduction_factor", 3.0), 0.0)
    if factor <= 1:
        raise ConfigError(f"space key 'scheduler.reduction_factor' is {factor:g}; expected a number > 1")
    return Scheduler(name, _integer("scheduler.grace_steps", tree.get("grace_steps", 0), 0), factor)


def _check_search(space: SearchSpace) -> None:
    """Everything that needs the base configuration: ends of ranges, warm-ups, what must not be searched."""
    base = space.base()
    tree = configs.to_dict(base)
    for axis in space.search:
        if axis.path in ("train.steps", "data.val_split", "train.eval_every"):
            raise ConfigError(
                f"space key 'search.{axis.path}' makes trials that cannot be compared; expected another path"
            )
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
    train = base.train
    if space.scheduler.name == "asha":
        grace, warm = space.scheduler.grace_steps, max(train.lr_warmup_iters, train.cls_warmup_iters)
        if grace <= warm:
            raise ConfigError(
                f"space key 'scheduler.grace_steps' is {grace}; expected > both warm-ups "
                f"(train.lr_warmup_iters {train.lr_warmup_iters}, train.cls_warmup_iters {train.cls_warmup_iters})"
            )
        if grace > train.steps:
            raise ConfigError(f"space key 'scheduler.grace_steps' is {grace}; expected ≤ train.steps {train.steps}")
    if train.eval_every > train.steps:
        raise ConfigError(f"train.eval_every is {train.eval_every}; expected ≤ train.steps {train.steps}")


def _point(space: SearchSpace, index: int, point: Any) -> dict[str, Any]:
    """A complete starting point: the values given, the base's for the rest, all inside the search."""
    key = f"first[{index}]"
    given = _mapping(key, point)
    searched = [a.path for a in space.search]
    for path in given:
        if path not in searched:
            raise ConfigError(f"space key '{key}.{path}' is not searched{nearest(path, searched)}")
    base = space.base()
    made: dict[str, Any] = {}
    for axis in space.search:
        value = given.get(axis.path, configs.get(base, axis.path))
        number = _as_float(value) if axis.kind != "choice" else None
        value = value if number is None else int(number) if "int" in axis.kind and number.is_integer() else number
        if not axis.contains(value):
            origin = "" if axis.path in given else " (from the base configuration)"
            raise ConfigError(
                f"space key '{key}.{axis.path}' is {value!r}{origin}; expected it within {axis.describe()}"
            )
        made[axis.path] = value
    try:
        trial_config(base, made, space.split)
    except ConfigError as error:
        raise ConfigError(f"space key '{key}': {error}") from None
    return made
