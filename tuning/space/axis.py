"""An axis of a search: one key of the configuration, and the values that it may have.

An axis must fit the type of its key: a float range on an integer is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tuning.space.options import MOST_TRIALS, as_float, mapping
from ugrl import config as configs
from ugrl.config import Config, nearest
from ugrl.errors import ConfigError
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
        options: The values of a choice; empty for a range.
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


def read_axes(tree: Mapping[str, Any], base: Config) -> tuple[Axis, ...]:
    """The axes of the section ``search`` of a space file, each after those that it depends on.

    Args:
        tree: Dotted path → the kind of the axis and its values.
        base: The configuration that all trials share.

    Raises:
        ConfigError: A path that cannot be searched, or values that do not fit it.
    """
    return tuple(_ordered(list(_axes(tree, base))))


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
