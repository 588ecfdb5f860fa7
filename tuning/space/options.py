"""How a search is run: sampler, fidelity, budget, repeats, and what may not be exceeded.

======================  ================================================================================
key of a space file     values (the first is the default)
======================  ================================================================================
``objective``           ``auto``, a metric of the validation, a cost, or a list of them; metrics are
                        maximised, costs (``step_s``, ``memory_gb``, ``gflop``) minimised
``split``               ``tune_val``: the split that search sees
``trials``, ``budget``  ``{trials: 20, hours: 0, gpu_hours: 0, cpu_hours: 0}``; 0 is no limit. A spent budget
                        starts nothing new; what runs is finished
``sampler``             ``tpe | random | grid | gp | cmaes | nsga2``, or ``{name: tpe, startup: 0}``
``scheduler``           ``{name: asha | hyperband | median | none, grace_steps: 0, reduction_factor: 3}``; the
                        first rung in steps, or (below 1) as a share of the run; 0 derives it. A grid, and a
                        search with several objectives, stop nothing unless told to
``repeats``             ``{seeds: 1, skip: true}``: seeds of each configuration; later ones are skipped where
                        the first already lose
``final``               ``{best: 0, seeds: 3, split: val, every: false}``: the best k again with fresh seeds,
                        measured on the untouched split as well; ``every``: each trial is measured there
``constraints``         ``{step_s: …, memory_gb: …, gflop: …}``: upper limits of a trial
``resources``           ``{cpus_per_trial: auto, gpus_per_trial: auto}`` of a one-worker trial; fractions pack
                        trials on one GPU
``workers``             training workers of a trial
``storage``             ``journal``, or a database URL
``max_failures``        ``3``: how often a trial whose process died is started again
``paper``               ``table3 | table4 | fig7``: what the report sets the results beside
======================  ================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ugrl.config import Config, nearest
from ugrl.errors import ConfigError
from ugrl.eval.selection import NEEDS_MASKS, NEEDS_TAGS
from ugrl.text import brief

METRICS = (*NEEDS_MASKS, *NEEDS_TAGS)
COSTS = {
    "step_s": "seconds of a training step",
    "memory_gb": "peak memory of the device (of the process, on a CPU), GB",
    "gflop": "operations of a training step, GFLOP",
}
SAMPLERS = ("tpe", "random", "grid", "gp", "cmaes", "nsga2")
SCHEDULERS = ("asha", "hyperband", "median", "none")
PAPERS = ("table3", "table4", "fig7")
# Each of them is in the storage from the beginning.
MOST_TRIALS = 100_000


@dataclass(frozen=True)
class Objective:
    """What is optimised: a metric is maximised, a cost minimised."""

    name: str

    @property
    def maximize(self) -> bool:
        """The direction."""
        return self.name not in COSTS

    @property
    def direction(self) -> str:
        """In Optuna's words."""
        return "maximize" if self.maximize else "minimize"


@dataclass(frozen=True)
class Resources:
    """What a one-worker trial is given; larger trials take ``cluster.*_per_worker`` for each worker.

    ``None`` is ``auto``: a whole GPU where the cluster has any, and the CPUs that a node has for each of its GPUs; one
    CPU where it has none.
    """

    cpus_per_trial: float | None = None
    """CPUs of a one-worker trial; ``auto``: those that a node has for each of its GPUs, or one where it has none."""
    gpus_per_trial: float | None = None
    """GPUs of a one-worker trial: a fraction up to 1, or whole ones; ``auto``: one where the cluster has any."""


@dataclass(frozen=True)
class Sampler:
    """Where points come from; ``startup`` random ones first (0: a share of the budget)."""

    name: str = "tpe"
    """Where points come from."""
    startup: int = 0
    """Random points before the sampler begins; 0: a share of the budget."""


@dataclass(frozen=True)
class Scheduler:
    """When a weak trial is stopped: never before ``grace_steps``."""

    name: str = "asha"
    """How a weak trial is stopped early."""
    grace_steps: int = 0
    """The first step at which a trial may be stopped; below 1 a share of the run; 0 derives it from the warm-ups."""
    reduction_factor: float = 3.0
    """Of the trials that reach a rung, one in so many goes on; the next rung is so many times later."""


@dataclass(frozen=True)
class Budget:
    """What a search may spend; 0 is no limit. Hours count what trials hold, GPUs and CPUs by their fractions."""

    trials: int = 20
    """Trials that are to end."""
    hours: float = 0.0
    """Hours after which nothing new begins; 0 is no limit."""
    gpu_hours: float = 0.0
    """Hours of GPUs that trials may hold; 0 is no limit."""
    cpu_hours: float = 0.0
    """Hours of CPUs that trials may hold; 0 is no limit."""


@dataclass(frozen=True)
class Repeats:
    """Seeds of each configuration; ``skip`` leaves later ones out where the first already lose."""

    seeds: int = 1
    """Seeds of each configuration; their mean counts."""
    skip: bool = True
    """Whether later seeds are left out where the first already lose."""


@dataclass(frozen=True)
class Final:
    """The best ``best`` again with ``seeds`` fresh seeds, measured on ``split`` too; ``every`` trial, if asked for."""

    best: int = 0
    """How many of the best trials run again at the end; 0 is none."""
    seeds: int = 3
    """Fresh seeds of each of them."""
    split: str = "val"
    """The untouched split on which they are measured as well."""
    every: bool = False
    """Whether each trial is measured on that split, and not only the best."""


@dataclass(frozen=True)
class Constraint:
    """An upper limit of a cost."""

    name: str
    limit: float


def build_options(tree: Mapping[str, Any], base: Config) -> dict[str, Any]:
    """The typed options of a space file; keys and messages as in the module's text.

    Args:
        tree: The file's options.
        base: The configuration that all trials share: what is a share of the run becomes steps.

    Raises:
        ConfigError: One line that names the key, the value and what was expected.
    """
    made: dict[str, Any] = {}
    if "objective" in tree:
        made["objectives"] = _objectives(tree["objective"])
    made["budget"] = _budget(tree)
    if "sampler" in tree:
        made["sampler"] = _sampler(tree["sampler"])
    made["scheduler"] = _scheduler(tree.get("scheduler", _default_scheduler(made)), base)
    made["resources"] = _resources(mapping("resources", tree.get("resources", {})))
    made["repeats"] = _repeats(mapping("repeats", tree.get("repeats", {})))
    made["final"] = _final(mapping("final", tree.get("final", {})))
    made["constraints"] = tuple(_constraints(mapping("constraints", tree.get("constraints", {}))))
    for key in ("split", "storage"):
        if key in tree:
            made[key] = text(key, tree[key])
    for key, lowest in (("seed", 0), ("concurrent", 0), ("workers", 1), ("max_failures", 0)):
        if key in tree:
            made[key] = integer(key, tree[key], lowest)
    if made.get("storage", "journal") != "journal" and "://" not in made["storage"]:
        raise ConfigError(
            f"space key 'storage' is {brief(made['storage'])}; expected journal or a URL like sqlite:///study.db"
        )
    if tree.get("paper"):
        made["paper"] = _one_of("paper", tree["paper"], PAPERS)
    return made


def warm_steps(base: Config) -> int:
    """When both warm-ups have ended."""
    return max(base.train.at(base.train.lr_warmup_iters), base.train.at(base.train.cls_warmup_iters))


def first_rung(grace: float, base: Config) -> int:
    """The first rung in steps.

    Args:
        grace: In steps; as a share of the run (below 1), which is moved on to the next validation; or 0, which is half
            of what follows the warm-ups.
        base: The configuration whose steps are meant.
    """
    if grace >= 1:
        return int(grace)
    steps, every = base.train.steps, base.train.at(base.train.eval_every)
    wanted = grace * steps if grace else (warm_steps(base) + steps) / 2
    return min(steps, math.ceil(wanted / every - 1e-9) * every)


def mapping(key: str, value: Any) -> dict[str, Any]:
    """Keys and values, or a refusal."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"space key '{key}' is {brief(value)}; expected keys and values")
    return {str(k): v for k, v in value.items()}


def text(key: str, value: Any) -> str:
    """Text, or a refusal."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"space key '{key}' is {brief(value)}; expected text")
    return value


def integer(key: str, value: Any, lowest: int) -> int:
    """An integer that is large enough, or a refusal."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ConfigError(f"space key '{key}' is {brief(value)}; expected an integer ≥ {lowest}")
    return value


def number(key: str, value: Any, lowest: float) -> float:
    """A finite number that is large enough, or a refusal."""
    found = as_float(value)
    if found is None or found < lowest:
        raise ConfigError(f"space key '{key}' is {brief(value)}; expected a number ≥ {lowest:g}")
    return found


def as_float(value: Any) -> float | None:
    """A finite number, also where YAML reads ``1e-3`` as text; ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _known(key: str, tree: Mapping[str, Any], cls: type) -> None:
    names = [f.name for f in fields(cls)]
    for name in tree:
        if name not in names:
            raise ConfigError(f"unknown space key '{key}.{name}'{nearest(str(name), names)}")


def _one_of(key: str, value: Any, names: tuple[str, ...]) -> str:
    if value not in names:
        raise ConfigError(f"space key '{key}' is {brief(value)}; expected one of {', '.join(names)}")
    return str(value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"space key '{key}' is {brief(value)}; expected true or false")
    return value


def _objectives(value: Any) -> tuple[Objective, ...]:
    names = value if isinstance(value, list) else [value]
    if not names or len(set(map(str, names))) != len(names):
        raise ConfigError(f"space key 'objective' is {brief(value)}; expected a name, or a list of different ones")
    known = ("auto", *METRICS, *COSTS)
    for name in names:
        if name not in known:
            raise ConfigError(f"space key 'objective': {brief(name)} is measured by nothing{nearest(str(name), known)}")
    if names[0] in COSTS:
        raise ConfigError(
            f"space key 'objective' is {brief(value)}; expected a metric first: {', '.join(METRICS)} or auto"
        )
    return tuple(Objective(str(name)) for name in names)


def _budget(tree: Mapping[str, Any]) -> Budget:
    given = mapping("budget", tree.get("budget", {}))
    _known("budget", given, Budget)
    if "trials" in tree:
        given["trials"] = integer("trials", tree["trials"], 1)
    hours = {k: number(f"budget.{k}", v, 0.0) for k, v in given.items() if k != "trials"}
    trials = integer("budget.trials", given.get("trials", Budget.trials), 1)
    if trials > MOST_TRIALS:
        raise ConfigError(f"space key 'trials' is {brief(trials)}; expected at most {MOST_TRIALS:,}")
    return Budget(trials, **hours)


def _sampler(value: Any) -> Sampler:
    tree = {"name": value} if isinstance(value, str) else mapping("sampler", value)
    _known("sampler", tree, Sampler)
    name = _one_of("sampler.name", tree.get("name", "tpe"), SAMPLERS)
    return Sampler(name, integer("sampler.startup", tree.get("startup", 0), 0))


def _default_scheduler(made: Mapping[str, Any]) -> dict[str, Any]:
    """Stopping is for one objective, and for points that somebody sampled."""
    alone = len(made.get("objectives", "1")) == 1 and made.get("sampler", Sampler()).name != "grid"
    return {"name": "asha" if alone else "none"}


def _scheduler(value: Any, base: Config) -> Scheduler:
    tree = {"name": value} if isinstance(value, str) else mapping("scheduler", value)
    _known("scheduler", tree, Scheduler)
    name = _one_of("scheduler.name", tree.get("name", "asha"), SCHEDULERS)
    factor = number("scheduler.reduction_factor", tree.get("reduction_factor", 3.0), 0.0)
    if factor <= 1 or not factor.is_integer():
        raise ConfigError(f"space key 'scheduler.reduction_factor' is {factor:g}; expected an integer > 1")
    grace = number("scheduler.grace_steps", tree.get("grace_steps", 0), 0.0)
    if grace >= 1 and not grace.is_integer():
        raise ConfigError(
            f"space key 'scheduler.grace_steps' is {grace:g}; expected an integer, or a share of the run below 1"
        )
    return Scheduler(name, first_rung(grace, base) if name != "none" else int(grace), factor)


def _resources(tree: Mapping[str, Any]) -> Resources:
    _known("resources", tree, Resources)
    made = Resources(**{k: number(f"resources.{k}", v, 0.0) for k, v in tree.items() if v not in ("auto", None)})
    if made.cpus_per_trial is not None and made.cpus_per_trial <= 0:
        raise ConfigError(f"space key 'resources.cpus_per_trial' is {made.cpus_per_trial:g}; expected a number > 0")
    if made.gpus_per_trial is not None and made.gpus_per_trial > 1 and not made.gpus_per_trial.is_integer():
        raise ConfigError(
            f"space key 'resources.gpus_per_trial' is {made.gpus_per_trial:g}; expected a fraction ≤ 1, or whole GPUs"
        )
    return made


def _repeats(tree: Mapping[str, Any]) -> Repeats:
    _known("repeats", tree, Repeats)
    return Repeats(
        integer("repeats.seeds", tree.get("seeds", 1), 1), _flag("repeats.skip", tree.get("skip", Repeats.skip))
    )


def _final(tree: Mapping[str, Any]) -> Final:
    _known("final", tree, Final)
    return Final(
        integer("final.best", tree.get("best", 0), 0),
        integer("final.seeds", tree.get("seeds", 3), 1),
        text("final.split", tree.get("split", "val")),
        _flag("final.every", tree.get("every", False)),
    )


def _constraints(tree: Mapping[str, Any]) -> list[Constraint]:
    for name in tree:
        if name not in COSTS:
            raise ConfigError(f"unknown space key 'constraints.{name}'{nearest(name, COSTS)}")
    made = [Constraint(name, number(f"constraints.{name}", value, 0.0)) for name, value in tree.items()]
    for each in made:
        if each.limit <= 0:
            raise ConfigError(f"space key 'constraints.{each.name}' is {each.limit:g}; expected a number > 0")
    return made
