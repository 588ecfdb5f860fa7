"""What a trial holds, and how many of them fit side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from cluster.capacity import Capacity, check_fits, worker_resources
from tuning.space.search import Search
from ugrl.config import Config
from ugrl.errors import ConfigError


def concurrent_trials(search: Search, have: Capacity) -> int:
    """How many trials run side by side.

    Raises:
        ConfigError: Not even one trial fits the cluster, or fewer than ``concurrent`` asks for.
    """
    space, cfg = search.space, search.base
    wanted = space.concurrent
    if space.workers > 1:
        check_fits(cfg, space.workers, have, groups=max(1, wanted))
        fits = 1
        while not wanted and _fits(cfg, space.workers, have, fits + 1):
            fits += 1
        return wanted or fits
    cpus, gpus = held(search, have)
    each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    # A trial is placed on one node, and a fraction of a GPU on one GPU.
    fits = sum(_takes(n.cpus, cpus, n.gpus, gpus) for n in have.each())
    if fits < 1:
        nodes = ", ".join(f"{n.name}: {n.cpus:g} CPUs" + (f", {n.gpus:g} GPUs" if gpus else "") for n in have.each())
        raise ConfigError(
            f"a trial takes {each}; the cluster has {have} ({nodes}); lower resources.cpus_per_trial or gpus_per_trial"
        )
    if wanted > fits:
        raise ConfigError(f"{wanted} concurrent trials × {each}; the cluster has {have}: at most {fits} fit")
    return wanted or fits


def _takes(cpus: float, each_cpus: float, gpus: float, each_gpus: float) -> int:
    """Trials that one node takes.

    >>> _takes(8, 1, 1, 0.4), _takes(8, 1, 4, 2), _takes(1, 1, 4, 0.5)
    (2, 2, 1)
    """
    most = math.floor(cpus / each_cpus + 1e-6)
    if not each_gpus:
        return most
    if each_gpus < 1:
        return min(most, math.floor(gpus + 1e-6) * math.floor(1 / each_gpus + 1e-6))
    return min(most, math.floor(gpus / each_gpus + 1e-6))


def _fits(cfg: Config, workers: int, have: Capacity, groups: int) -> bool:
    try:
        check_fits(cfg, workers, have, groups=groups)
    except ConfigError:
        return False
    return True


def held(search: Search, have: Capacity) -> tuple[float, float]:
    """CPUs and GPUs that a trial holds."""
    space, cfg = search.space, search.base
    if space.workers > 1:
        each = worker_resources(cfg, have)
        return space.workers * each["CPU"], space.workers * each.get("GPU", 0.0)
    asked = space.resources
    gpus = cfg.cluster.gpus_per_worker if asked.gpus_per_trial is None else asked.gpus_per_trial
    gpus = min(1.0, have.gpus) if gpus is None else gpus
    if asked.cpus_per_trial is not None:
        return asked.cpus_per_trial, gpus
    # A GPU's share of its node's CPUs decodes and cuts for it.
    shares = [n.cpus / (n.gpus / gpus) for n in have.each() if gpus and n.gpus]
    return max(1.0, math.floor(min(shares))) if shares else 1.0, gpus


class Room:
    """Whether the cluster has room for one more trial of a search.

    Args:
        search: The search.
        have: What the cluster has.
        free: Says what each node has free now, as :func:`tuning.run.tune_adapter.free_resources`.
    """

    def __init__(self, search: Search, have: Capacity, free: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        cfg, self._free = search.base, free
        self.count = search.space.workers
        if self.count > 1:
            each = worker_resources(cfg, have)
            self.cpus, self.gpus, self.spare = each["CPU"], each.get("GPU", 0.0), cfg.cluster.data_cpus
        else:
            self.cpus, self.gpus = held(search, have)
            self.spare = 0.0

    def trials(self) -> int:
        """Trials that what is free now would take."""
        free = [(n.get("CPU", 0.0), n.get("GPU", 0.0)) for n in self._free().values()]
        if self.count > 1 and sum(cpus for cpus, _ in free) < self.count * self.cpus + self.spare - 1e-6:
            return 0
        return sum(_takes(cpus, self.cpus, gpus, self.gpus) for cpus, gpus in free) // self.count
