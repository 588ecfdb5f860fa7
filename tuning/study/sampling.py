"""What Optuna decides in a search: the sampler chooses the points, the pruner stops weak trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FixedTrial, Trial

from tuning.space.axis import Axis
from tuning.space.space import SearchSpace


def suggest_point(trial: Trial | FixedTrial, axes: Sequence[Axis]) -> dict[str, Any]:
    """The point of a trial: sampled, or what it has already; an axis that does not count is left out."""
    point: dict[str, Any] = {}
    for axis in axes:
        if not axis.active(point):
            continue
        if axis.kind == "choice":
            point[axis.path] = trial.suggest_categorical(axis.path, axis.options)
        elif axis.integer:
            point[axis.path] = trial.suggest_int(
                axis.path, int(axis.low), int(axis.high), step=int(axis.step or 1), log=axis.log
            )
        else:
            point[axis.path] = trial.suggest_float(axis.path, axis.low, axis.high, step=axis.step or None, log=axis.log)
    return point


def make_sampler(space: SearchSpace, number: int) -> BaseSampler:
    """The sampler of a trial.

    Args:
        space: The search.
        number: Of the trial: it moves the seed on, so that a resumed search goes on sampling instead of repeating its
            first points, and drivers side by side do not sample the same ones. What a sampler has learned is in the
            storage.
    """
    seed = (space.seed + 7919 * number) % 2**32
    # Points drawn before the model of good and bad ones starts: ten by default, too many for a small budget.
    startup = space.sampler.startup or min(10, max(3, space.trials // 4))
    name = space.sampler.name
    if name in ("random", "grid"):
        return RandomSampler(seed=seed)
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=startup, deterministic_objective=False)
    if name == "cmaes":
        return CmaEsSampler(seed=seed, n_startup_trials=startup)
    if name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=max(4, min(50, space.trials // 4)))
    conditional = any(a.when for a in space.search)
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=conditional)


def make_pruner(space: SearchSpace, steps: int) -> BasePruner:
    """The pruner: its knowledge is in the storage, so it survives its driver and is shared by several.

    Args:
        space: The search.
        steps: Steps of a whole run.
    """
    asked = space.scheduler
    factor = int(asked.reduction_factor)
    if asked.name == "asha":
        return SuccessiveHalvingPruner(min_resource=asked.grace_steps, reduction_factor=factor)
    if asked.name == "hyperband":
        return HyperbandPruner(min_resource=asked.grace_steps, max_resource=steps, reduction_factor=factor)
    if asked.name == "median":
        # "Below the median at a step": not before the grace period, nor with fewer than five trials to compare with.
        return MedianPruner(n_startup_trials=5, n_warmup_steps=asked.grace_steps - 1)
    return NopPruner()
