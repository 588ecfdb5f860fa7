"""Rules between the keys of a space file: each key is fine by itself, but some do not go together.

Both ends of every range and every choice also go through the configuration's own checks: a value that ``ugrl-train``
refuses is refused here in the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuning.space.options import warm_steps
from tuning.space.space import SearchSpace
from ugrl import config as configs
from ugrl.config import Config
from ugrl.errors import ConfigError


@dataclass(frozen=True)
class Case:
    """What the rules look at.

    Attributes:
        space: The space, but for its starting points.
        base: The configuration that all trials share.
        points: The starting points as the file gives them.
    """

    space: SearchSpace
    base: Config
    points: Sequence[Any] = ()

    @property
    def again(self) -> bool:
        """Whether trials are measured on the split of the final runs."""
        return bool(self.space.final.best or self.space.final.every)

    @property
    def stops(self) -> bool:
        """Whether weak trials are stopped early."""
        return self.space.scheduler.name != "none"

    @property
    def choices(self) -> list[str]:
        """Paths of the axes that are lists."""
        return [a.path for a in self.space.search if a.kind == "choice"]

    def samples(self, name: str) -> bool:
        """Whether points come from this sampler."""
        return self.space.sampler.name == name


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        broken: Whether a space breaks the rule.
        says: One line that names the key, its value and what was expected.
    """

    broken: Callable[[Case], bool]
    says: Callable[[Case], str]


# The first rule that is broken is told.
RULES = (
    Rule(
        lambda c: c.again and c.space.final.split == c.space.split,
        lambda c: (
            f"space key 'final.split' is '{c.space.final.split}', which the search sees; expected an untouched split"
        ),
    ),
    Rule(
        lambda c: c.space.split == c.base.data.train_split,
        lambda c: f"space key 'split' is '{c.space.split}', the training split; expected another, such as tune_val",
    ),
    Rule(
        lambda c: c.again and c.space.final.split == c.base.data.train_split,
        lambda c: f"space key 'final.split' is '{c.space.final.split}', the training split; expected an untouched one",
    ),
    Rule(
        lambda c: c.stops and len(c.space.objectives) > 1,
        lambda c: (
            f"space key 'scheduler.name' is '{c.space.scheduler.name}'; "
            f"with {len(c.space.objectives)} objectives no trial can be stopped early: expected none"
        ),
    ),
    Rule(
        lambda c: c.stops and c.space.scheduler.grace_steps <= warm_steps(c.base),
        lambda c: (
            f"space key 'scheduler.grace_steps' is {c.space.scheduler.grace_steps:g}; expected > both warm-ups "
            f"(train.lr_warmup_iters {c.base.train.at(c.base.train.lr_warmup_iters)}, "
            f"train.cls_warmup_iters {c.base.train.at(c.base.train.cls_warmup_iters)})"
        ),
    ),
    Rule(
        lambda c: c.stops and c.space.scheduler.grace_steps > c.base.train.steps,
        lambda c: (
            f"space key 'scheduler.grace_steps' is {c.space.scheduler.grace_steps:g}; "
            f"expected ≤ train.steps {c.base.train.steps}"
        ),
    ),
    Rule(
        lambda c: c.samples("cmaes") and bool(c.choices),
        lambda c: f"space key 'sampler.name' is 'cmaes', which cannot vary the choice '{c.choices[0]}'",
    ),
    Rule(
        lambda c: c.samples("cmaes") and bool(c.space.constraints),
        lambda c: "space key 'sampler.name' is 'cmaes', which cannot handle constraints; expected tpe or gp",
    ),
    Rule(
        lambda c: c.samples("cmaes") and len(c.space.search) < 2,
        lambda c: "space key 'sampler.name' is 'cmaes', which cannot handle a single axis; expected tpe or gp",
    ),
    Rule(
        lambda c: c.samples("grid") and bool(c.points),
        lambda c: "space key 'first' has points, but a grid has all of its own",
    ),
    Rule(
        lambda c: c.samples("cmaes") and any(a.when for a in c.space.search),
        lambda c: "space key 'sampler.name' is 'cmaes', which cannot vary conditional axes",
    ),
    Rule(
        lambda c: c.samples("cmaes") and len(c.space.objectives) > 1,
        lambda c: "space key 'sampler.name' is 'cmaes', which has one objective; expected tpe, nsga2 or gp",
    ),
)


def check_space(space: SearchSpace, base: Config, points: Sequence[Any] = ()) -> None:
    """Refuse a space whose keys do not go together.

    Args:
        space: The space, but for its starting points.
        base: The configuration that all trials share.
        points: The starting points as the file gives them.

    Raises:
        ConfigError: One line that names the key, the value and what was expected.
    """
    _check_axes(space, base)
    case = Case(space, base, points)
    for rule in RULES:
        if rule.broken(case):
            raise ConfigError(rule.says(case))


def _check_axes(space: SearchSpace, base: Config) -> None:
    tree = configs.to_dict(base)
    for axis in space.search:
        if axis.path in space.overrides:
            raise ConfigError(f"space key 'overrides.{axis.path}' is also searched; expected it in one of the two")
        for value in axis.edges:
            try:
                configs.build(configs.override(tree, {axis.path: value}))
            except ConfigError as error:
                raise ConfigError(f"space key 'search.{axis.path}': {error}") from None
        if space.sampler.name == "grid":
            axis.values()  # raises where it has no end of them
