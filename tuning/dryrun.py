"""What a search would do and cost, said without data and without starting it."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import optuna
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.preflight import Capacity
from tuning.options import Objective
from tuning.placement import concurrent_trials, held
from tuning.plain import clock, short
from tuning.search import Search
from tuning.space import SearchSpace
from tuning.study import make_pruner, make_sampler, plan, suggest_point, take_waiting
from ugrl.errors import ConfigError

# Classes that a step is measured with where no data tell: they hardly matter.
CLASSES = 20
FIRST = 5


def machine() -> Capacity:
    """What a private cluster on this machine would have."""
    import torch

    cpus = float(os.cpu_count() or 1)
    return Capacity(cpus, float(torch.cuda.device_count()), cpus)


def dry_run(search: Search, have: Capacity, console: Console, *, step_s: float | None = None, where: str = "") -> None:
    """Print the resolved space, the first suggestions, how many trials fit at once, and what it would cost.

    Args:
        search: The search.
        have: The cluster.
        console: Where to print.
        step_s: Seconds of a training step; measured here without it.
        where: What ``have`` is, in words.
    """
    space = search.space
    console.print(_space_table(search))
    for text in _words(search):
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    console.print(_suggestions(space, search.objectives, search.steps))
    cpus, gpus = held(search, have)
    each = f"{cpus:g} CPU" + (f", {gpus:g} GPU" if gpus else "")
    on = f"{have}{f' ({where})' if where else ''}"
    try:
        fits = concurrent_trials(search, have)
        console.print(f"side by side: {fits} trials of {each} each on {on}", highlight=False, soft_wrap=True)
    except ConfigError as error:  # the search may be meant for another machine
        fits = 1
        console.print(f"side by side: none on {on}: {error}", highlight=False, soft_wrap=True)
    for text in _cost(search, min(fits, space.trials), cpus, gpus, step_s):
        console.print(text, highlight=False, soft_wrap=True)


def _space_table(search: Search) -> Table:
    from ugrl import config as configs

    table = Table(title="searched", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("key", "values", "base"):
        table.add_column(name)
    for axis in search.space.search:
        table.add_row(axis.path, axis.describe(), short(configs.get(search.base, axis.path)))
    return table


def _words(search: Search) -> list[str]:
    space, budget = search.space, search.space.budget
    limits = [f"{getattr(budget, n):g} {n.replace('_', ' ')}" for n in ("hours", "gpu_hours", "cpu_hours")]
    limits = [text for text in limits if not text.startswith("0 ")]
    told = ", ".join(f"{o.name} ({'max' if o.maximize else 'min'})" for o in search.objectives)
    seeds = f"{space.repeats.seeds} seeds each" + (
        " (later ones skipped where the first lose)" if space.repeats.skip and space.repeats.seeds > 1 else ""
    )
    final = space.final
    again = f"the best {final.best} again with {final.seeds} fresh seeds, then on '{final.split}'" if final.best else ""
    rows = [
        f"objective: {told} on '{space.split}'",
        f"budget: {space.trials} trials" + "".join(f", {text}" for text in limits) + f"; {seeds}",
        f"sampler: {space.sampler.name}; fidelity: {_fidelity(search)}",
        f"base: {space.config}, {search.steps} steps"
        + "".join(f"; {path} = {value}" for path, value in space.overrides.items()),
    ]
    rows += (
        [f"constraints: {', '.join(f'{c.name} ≤ {c.limit:g}' for c in space.constraints)}"] if space.constraints else []
    )
    return [*rows, *([f"at the end: {again}"] if again else [])]


def _fidelity(search: Search) -> str:
    asked = search.space.scheduler
    if asked.name == "none":
        return "every trial runs to its end"
    rungs = ", ".join(str(r) for r in rung_steps(search.space, search.steps))
    return f"{asked.name}, rungs at {rungs} of {search.steps} steps, 1 in {asked.reduction_factor:g} goes on"


def rung_steps(space: SearchSpace, steps: int) -> list[int]:
    """The steps at which weak trials are stopped.

    >>> from tuning.options import Scheduler
    >>> from tuning.space import SearchSpace
    >>> rung_steps(SearchSpace("shapes", (), scheduler=Scheduler("asha", 100, 3)), 1000)
    [100, 300, 900]
    """
    found, at = [], max(1, space.scheduler.grace_steps)
    while at < steps:
        found.append(at)
        at = math.ceil(at * space.scheduler.reduction_factor)
    return found


def expected_share(space: SearchSpace, steps: int) -> float:
    """Which share of a whole run a trial takes on average.

    Of the trials that reach a rung, one in ``reduction_factor`` goes on; a median stops half of them once.
    """
    name, factor = space.scheduler.name, space.scheduler.reduction_factor
    if name == "none":
        return 1.0
    if name == "median":
        return 0.5 * (1 + space.scheduler.grace_steps / steps)
    share, alive, last = 0.0, 1.0, 0
    for rung in [*rung_steps(space, steps), steps]:
        share += alive * (rung - last) / steps
        alive, last = alive / factor, rung
    return share


def _suggestions(space: SearchSpace, objectives: tuple[Objective, ...], steps: int) -> Table:
    study = optuna.create_study(directions=[o.direction for o in objectives])
    few = replace(space, budget=replace(space.budget, trials=min(FIRST, space.trials)))
    study.sampler, study.pruner = make_sampler(space, 0), make_pruner(space, steps)
    plan(study, few)
    table = Table(title="first suggestions", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", justify="right")
    for axis in space.search:
        table.add_column(axis.name, justify="right")
    while (trial := take_waiting(study, few.trials)) is not None:
        point = suggest_point(trial, space.search)
        table.add_row(str(trial.number), *(short(point[a.path]) if a.path in point else "" for a in space.search))
    return table


def _cost(search: Search, fits: int, cpus: float, gpus: float, step_s: float | None) -> list[str]:
    import torch

    from ugrl.train.flops import step_gflop, step_seconds

    space = search.space
    classes = {"voc": 20, "coco": 80}.get(space.config, CLASSES)
    gflop = step_gflop(search.base, classes)
    measured = ""
    if step_s is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(max(1, int(cpus)))
        step_s = step_seconds(search.base, classes, device, gflop)
        measured = f", measured on one image on this machine's {device.type.upper()}: --step-s says otherwise"
    share = expected_share(space, search.steps)
    runs = space.trials * (share if space.repeats.seeds == 1 else share + space.repeats.seeds - 1)
    finals = space.final.best * space.final.seeds
    total = (runs + finals) * search.steps * step_s
    batch = search.base.train.global_batch
    lines = [
        f"a step: {gflop:.3g} GFLOP an image, {batch * gflop:.3g} a batch of {batch}; {step_s:.3g} s{measured}",
        f"a whole run: {clock(search.steps * step_s)} without validations; a trial takes {100 * share:.0f} % of it on "
        f"average, by what {space.scheduler.name} lets through",
        f"the search: about {runs:.1f} whole runs"
        + (f" and {finals} final ones" if finals else "")
        + f", {total * cpus / 3600:.3g} CPU-hours"
        + (f" and {total * gpus / 3600:.3g} GPU-hours" if gpus else "")
        + f"; about {clock(total / max(1, fits))} with {fits} side by side (seeds that are skipped would save more)",
    ]
    return lines
