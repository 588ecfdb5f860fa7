"""What a search would do and cost, said without data and without starting it."""

from __future__ import annotations

import math
import os
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import optuna
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.capacity import Capacity
from tuning.formatting import few, hours, plural, short, span
from tuning.run.placement import concurrent_trials, held
from tuning.space.advice import remarks, weak_rung
from tuning.space.options import Objective
from tuning.space.search import Search
from tuning.space.space import SearchSpace
from tuning.study.sampling import make_pruner, make_sampler, suggest_point
from tuning.study.study import plan
from ugrl.data.shards import Manifest
from ugrl.errors import ConfigError

# Classes that a step is measured with where no data tell: they hardly matter.
CLASSES = 20
FIRST = 5
# Trials that the median rule never stops.
STARTUP = 5
# Trials that are played through to know what a scheduler lets through.
PLAYED = 5_000
# What a GPU is taken to reach on this network, where there is none to ask.
GPU_TFLOPS = 10.0
# Nobody waits longer for one machine.
ABSURD_S = 14 * 86400.0


def machine() -> Capacity:
    """What a private cluster on this machine would have."""
    import torch

    cpus = float(os.cpu_count() or 1)
    return Capacity(cpus, float(torch.cuda.device_count()), cpus)


def dry_run(
    search: Search,
    have: Capacity,
    console: Console,
    *,
    step_s: float | None = None,
    where: str = "",
    data: bool = False,
) -> None:
    """Print the resolved space, the first suggestions, how many trials fit at once, and what it would cost.

    Args:
        search: The search.
        have: What the cluster has.
        console: Where to print.
        step_s: Seconds of a training step; measured here without it.
        where: What ``have`` is, in words.
        data: Whether the shards are there to be looked at.
    """
    space = search.space
    console.print(_space_table(search))
    for text in [*_words(search), *(f"warning: {text}" for text in _weak(search, data))]:
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    console.print(_suggestions(space, search.objectives, search.steps))
    cpus, gpus = held(search, have)
    each = f"{cpus:g} CPU" + (f", {gpus:g} GPU" if gpus else "")
    on = f"{have}{f' ({where})' if where else ''}"
    try:
        fits = concurrent_trials(search, have)
        console.print(f"side by side: {fits} trials of {each} each on {on}", highlight=False, soft_wrap=True)
    except ConfigError as error:  # the search may be meant for another machine
        fits = 0
        console.print(f"side by side: none on {on}: {error}", highlight=False, soft_wrap=True)
    there = gpus if have.gpus else 0.0
    for text in _cost(search, min(fits, space.trials), cpus, there, step_s, data):
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
    seeds = f"{plural(space.repeats.seeds, 'seed')} each" + (
        " (later ones skipped where the first lose)" if space.repeats.skip and space.repeats.seeds > 1 else ""
    )
    final = space.final
    again = (
        f"the best {final.best} again with {plural(final.seeds, 'fresh seed')}, then on '{final.split}'"
        if final.best
        else ""
    )
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


def _weak(search: Search, data: bool) -> list[str]:
    if data:
        return remarks(search)
    weak = weak_rung(search.space, search.base)
    return [weak] if weak else []


def _fidelity(search: Search) -> str:
    asked, rungs = search.space.scheduler, rung_steps(search.space, search.steps)
    if asked.name == "none" or not rungs:
        return "every trial runs to its end"
    if asked.name == "median":
        return f"median, from step {asked.grace_steps:g} of {search.steps} on, what is below the median is stopped"
    shown = ", ".join(map(str, rungs))
    return f"{asked.name}, rungs at {shown} of {search.steps} steps, 1 in {asked.reduction_factor:g} goes on"


def rung_steps(space: SearchSpace, steps: int) -> list[int]:
    """The steps at which weak trials are stopped.

    >>> from tuning.space.options import Scheduler
    >>> from tuning.space.space import SearchSpace
    >>> rung_steps(SearchSpace("shapes", (), scheduler=Scheduler("asha", 100, 3)), 1000)
    [100, 300, 900]
    """
    found, at = [], max(1, space.scheduler.grace_steps)
    while at < steps:
        found.append(at)
        at = math.ceil(at * space.scheduler.reduction_factor)
    return found


@dataclass(frozen=True)
class Expected:
    """How much of its budget a search is expected to spend.

    Attributes:
        share: Of a whole run that a trial takes with its first seed.
        whole: Trials that come to the end with it; the others are stopped and have no further seed.
    """

    share: float
    whole: float


def expected(space: SearchSpace, steps: int) -> Expected:
    """What the scheduler is expected to let through: the mean of searches whose trials have a random merit each.

    In a small search that is far more than one in ``reduction_factor``: each trial is compared with those that were
    there before it, the first one with nobody.
    """
    rng, played = random.Random(0), math.ceil(PLAYED / space.trials)
    spent = whole = 0
    for _ in range(played):
        for end in _ends([rng.random() for _ in range(space.trials)], space, steps, rng):
            spent, whole = spent + end, whole + (end == steps)
    return Expected(spent / played / space.trials / steps, whole / played)


def _ends(merits: list[float], space: SearchSpace, steps: int, rng: random.Random) -> Iterator[int]:
    """The last step of each trial with its first seed."""
    name, factor, rungs = space.scheduler.name, int(space.scheduler.reduction_factor), rung_steps(space, steps)
    complete: list[float] = []
    # Hyperband: one ladder begins at each rung, and those that begin early get more of the trials.
    first = range(len(rungs) + 1 if name == "hyperband" else 1)
    weights = [math.ceil(len(first) * factor**k / (k + 1)) for k in reversed(first)]
    seen: dict[tuple[int, int], list[float]] = {}
    for merit in merits:
        if name == "median" and len(complete) >= STARTUP and merit < statistics.median(complete):
            yield space.scheduler.grace_steps
            continue
        (ladder,) = rng.choices(first, weights)
        for rung in rungs[ladder:] if name in ("asha", "hyperband") else ():
            there = seen.setdefault((ladder, rung), [])
            there.append(merit)
            if sum(other > merit for other in there) >= max(1, len(there) // factor):
                yield rung
                break
        else:
            complete.append(merit)
            yield steps


def _suggestions(space: SearchSpace, objectives: tuple[Objective, ...], steps: int) -> Table:
    study = optuna.create_study(directions=[o.direction for o in objectives])
    few = replace(space, budget=replace(space.budget, trials=min(FIRST, space.trials)))
    study.sampler, study.pruner = make_sampler(space, 0), make_pruner(space, steps)
    plan(study, few)
    points = [suggest_point(study.ask(), space.search) for _ in range(few.trials)]
    table = Table(title="first suggestions", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial")
    for k in range(len(points)):
        table.add_column(str(k), justify="right", no_wrap=True)
    for axis in space.search:
        table.add_row(axis.name, *(short(p[axis.path]) if axis.path in p else "" for p in points))
    return table


@dataclass(frozen=True)
class Cost:
    """What a search takes.

    Attributes:
        share: Of a whole run that a trial takes with its first seed.
        runs: Whole runs of the search itself, in steps.
        finals: Whole runs with fresh seeds afterwards.
        seconds: Of all of them, one after the other.
    """

    share: float
    runs: float
    finals: int
    seconds: float


def cost_of(space: SearchSpace, steps: int, step_s: float) -> Cost:
    """The cost of a search whose step takes ``step_s``, without validations."""
    found = expected(space, steps)
    runs = space.trials * found.share + found.whole * (space.repeats.seeds - 1)
    finals = space.final.best * space.final.seeds
    return Cost(found.share, runs, finals, (runs + finals) * steps * step_s)


def wanted_gpus(search: Search) -> float:
    """GPUs that a trial is meant to have, wherever this is asked; 0 where the space says nothing of them."""
    space = search.space
    if space.workers > 1:
        return space.workers * (search.base.cluster.gpus_per_worker or 0.0)
    return space.resources.gpus_per_trial or 0.0


def _cost(search: Search, fits: int, cpus: float, gpus: float, step_s: float | None, data: bool) -> list[str]:
    import torch

    from ugrl.train.flops import step_gflop, step_seconds

    space, steps, batch = search.space, search.steps, search.base.train.global_batch
    classes = len(Manifest.load(search.shards).class_names) if data else {"coco": 80}.get(space.config, CLASSES)
    gflop = step_gflop(search.base, classes)
    given, wanted = step_s is not None, 0.0 if gpus else wanted_gpus(search)
    where = "with --step-s"
    if step_s is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        threads = 1 if device.type == "cuda" else max(1, min(int(cpus), os.cpu_count() or 1))
        step_s = step_seconds(search.base, classes, device, gflop) / threads
        where = f"on this machine's {device.type.upper()}"
    found = cost_of(space, steps, step_s)
    wall, seeds = found.seconds / max(1, fits), space.repeats.seeds
    lines = [
        f"a step: {few(gflop)} GFLOP an image, {few(batch * gflop)} a batch of {batch}",
        f"the search: about {found.runs:.1f} whole runs"
        + (f" and {found.finals} final ones" if found.finals else "")
        + f"; a trial takes {100 * found.share:.0f} % of a run"
        + (f", by what {space.scheduler.name} lets through" if found.share < 1 else "")
        + (f", and {seeds - 1} more seeds if it comes to the end" if seeds > 1 else ""),
        f"{where}: {few(step_s)} s a step, {span(steps * step_s)} a run without validations, {span(wall)} the search, "
        + (f"{fits} side by side" if fits > 1 else "one trial at a time"),
    ]
    on_gpus = gpus or (wanted if given else 0.0)
    if fits or on_gpus:
        each = f"{hours(found.seconds * on_gpus)} GPU-hours, " if on_gpus else ""
        lines[-1] += f" ({each}{hours(found.seconds * cpus)} CPU-hours)"
    if (limit := space.budget.hours) and wall > 3600 * limit:
        lines.append(f"budget.hours ends it after {limit:g} h, with what has run by then")
    if wanted and not given:
        gpu_s = batch * gflop / (1e3 * GPU_TFLOPS * wanted)
        lines.append(
            f"on {wanted:g} GPUs a trial, as the space wants: {few(gpu_s)} s a step and {span(steps * gpu_s)} a run, "
            f"if one does {GPU_TFLOPS:g} TFLOP/s (--step-s says otherwise), "
            f"{hours(found.seconds / step_s * gpu_s * wanted)} GPU-hours the search"
        )
    if wall > ABSURD_S:
        lines.append(
            ("too much: " if given else "too much for this machine: ")
            + ("" if given or gpus else "run it where the GPUs are (--address), or " if wanted else "use a GPU, or ")
            + f"make it smaller: train.steps={max(1, steps // 10)}, data.crop, model.backbone, --trials"
        )
    return lines
