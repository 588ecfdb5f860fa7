"""What a cluster has, what a run takes, and whether it fits: arithmetic that is done before anything starts.

Ray does not refuse a run that is too large for a cluster; it waits without end. Three examples: workers that hold every
CPU leave none for the tasks that read data; workers may fit in sum and still on no single node; a run waits for CPUs
that another run holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ugrl.config import Config
from ugrl.errors import ConfigError

EPS = 1e-6


@dataclass(frozen=True)
class Node:
    """One machine of a cluster, in Ray's logical resources."""

    name: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, in Ray's logical resources.

    Attributes:
        cpus: Sum over all nodes.
        gpus: Sum over all nodes.
        node_cpus: CPUs of the largest node.
        nodes: The nodes one by one. Without them, nodes of equal size are assumed.
    """

    cpus: float
    gpus: float
    node_cpus: float
    nodes: tuple[Node, ...] = ()

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.cpus:g} CPUs{gpus}"

    def each(self) -> tuple[Node, ...]:
        """The nodes."""
        if self.nodes or not self.node_cpus:
            return self.nodes
        count = max(1, round(self.cpus / self.node_cpus))
        return tuple(Node(f"node {k + 1}", self.node_cpus, self.gpus / count) for k in range(count))


def capacity() -> Capacity:
    """What the connected cluster has now. Nodes that an autoscaler might add do not count."""
    import ray  # takes half a second, which the arithmetic alone does not need

    nodes = tuple(
        Node(n["NodeManagerHostname"], n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0))
        for n in ray.nodes()
        if n["Alive"]
    )
    return Capacity(
        sum(n.cpus for n in nodes), sum(n.gpus for n in nodes), max((n.cpus for n in nodes), default=0.0), nodes
    )


def worker_resources(cfg: Config, have: Capacity) -> dict[str, float]:
    """What one training worker holds. Where the configuration does not say it, a GPU if the cluster has any."""
    held, gpus = {"CPU": cfg.cluster.cpus_per_worker}, cfg.cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if have.gpus else 0.0
    return {**held, "GPU": gpus} if gpus else held


def sizes(cfg: Config, workers: int) -> list[int]:
    """Numbers of workers that a run may have, the largest first. Each divides the global batch.

    >>> from ugrl.config import build
    >>> sizes(build({"train": {"global_batch": 6}, "cluster": {"min_workers": 1}}), 4)
    [3, 2, 1]
    >>> sizes(build({"train": {"global_batch": 6}}), 3)
    [3]
    """
    least = min(cfg.cluster.min_workers or workers, workers)
    return [n for n in range(workers, least - 1, -1) if cfg.train.global_batch % n == 0]


def check_fits(cfg: Config, workers: int, have: Capacity, *, groups: int = 1) -> int:
    """Refuse a run that the cluster cannot place, with the numbers.

    Args:
        cfg: The run's configuration.
        workers: Training workers of a run; the largest number where ``cluster.min_workers`` allows fewer.
        have: What the cluster has.
        groups: Number of runs side by side.

    Returns:
        Number of workers to start with.

    Raises:
        ConfigError: There are too few CPUs or GPUs, in sum or on each node; some CPUs must stay free for the tasks
            that read data. Or ranks of NCCL share a GPU. Or the workers do not divide the global batch.
    """
    allowed = sizes(cfg, workers)
    if not allowed:
        batch = cfg.train.global_batch
        fitting = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise ConfigError(
            f"train.global_batch is {batch}; expected a multiple of the {workers} workers (it divides by {fitting})"
        )
    refusal: ConfigError | None = None
    for number in allowed:
        try:
            _check(cfg, number, have, groups)
        except ConfigError as error:
            refusal = error
            continue
        return number
    assert refusal is not None
    raise refusal


def fits(cfg: Config, workers: int, have: Capacity, *, groups: int = 1) -> bool:
    """Whether the cluster can place exactly this number of workers."""
    try:
        check_fits(replace(cfg, cluster=replace(cfg.cluster, min_workers=0)), workers, have, groups=groups)
    except ConfigError:
        return False
    return True


def _check(cfg: Config, workers: int, have: Capacity, groups: int) -> None:
    each, free = worker_resources(cfg, have), cfg.cluster.data_cpus
    runs = f"{groups} runs × " if groups > 1 else ""
    need = groups * workers * each["CPU"]
    if need + free > have.cpus + EPS or each["CPU"] > have.node_cpus + EPS:
        room = (have.cpus - free) / (groups * workers)
        hint = f"; set cluster.cpus_per_worker={room:.2g} or less, or take fewer workers" if room > 0 else ""
        raise ConfigError(
            f"{runs}{workers} workers × {each['CPU']:g} CPU + {free:g} for reading data = "
            f"{need + free:g} CPUs; the cluster has {have}{hint}"
        )
    gpu = each.get("GPU", 0.0)
    if groups * workers * gpu > have.gpus + EPS:
        instead = "; cluster.gpus_per_worker=0 trains on CPUs" if not have.gpus else ""
        raise ConfigError(
            f"{runs}{workers} workers × {gpu:g} GPU = {groups * workers * gpu:g} GPUs; the cluster has {have}{instead}"
        )
    if 0 < gpu < 1 and workers > 1 and cfg.cluster.backend != "gloo":
        raise ConfigError(
            f"cluster.gpus_per_worker is {gpu:g}: ranks of one NCCL group cannot share a GPU; expected 1 or more, or "
            "cluster.backend=gloo"
        )
    counts = [_room(node, each["CPU"], gpu) for node in have.each()]
    if sum(counts) < groups * workers:
        on = ", ".join(f"{n.name} ({_resources(n)}) takes {k}" for n, k in zip(have.each(), counts, strict=True))
        what = f"{each['CPU']:g} CPU" + (f" and {gpu:g} GPU" if gpu else "")
        raise ConfigError(
            f"{runs}{workers} workers × {what}: {on}; {sum(counts)} of {groups * workers} can be placed, since none is "
            "split over nodes; lower cluster.cpus_per_worker or take fewer workers"
        )


def _room(node: Node, cpus: float, gpus: float) -> int:
    """How many workers a node takes."""
    room = node.cpus / cpus
    return math.floor((min(room, node.gpus / gpus) if gpus else room) + EPS)


def _resources(node: Node) -> str:
    return f"{node.cpus:g} CPUs" + (f", {node.gpus:g} GPUs" if node.gpus else "")


def data_tasks(cfg: Config, workers: int, have: Capacity, *, groups: int = 1) -> int:
    """How many reading tasks one worker may run at a time: its share of the CPUs that the workers leave free."""
    if cfg.cluster.data_tasks:
        return cfg.cluster.data_tasks
    free = have.cpus - groups * workers * cfg.cluster.cpus_per_worker
    return max(1, min(4, int(free / (groups * workers))))


def on_what(cfg: Config, have: Capacity) -> str:
    """What a cluster has, for a message. It also says when a run would use GPUs and there are none."""
    lacks = cfg.cluster.gpus_per_worker is None and not have.gpus
    return f"{have} and no GPU: training on the CPU" if lacks else str(have)
