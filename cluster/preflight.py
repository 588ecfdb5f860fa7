"""What a cluster cannot place is said before anything starts, with the arithmetic.

A cluster that is too small does not fail by itself: workers that hold every CPU leave none for the tasks that read
data, workers that fit in sum but on no node wait without end, and so does a run that waits for another one's CPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ugrl.config import Config
from ugrl.data.shards import Manifest
from ugrl.errors import ConfigError, NoRoomError

EPS = 1e-6


@dataclass(frozen=True)
class Node:
    """One machine of a cluster, as logical resources."""

    name: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, as logical resources.

    Attributes:
        cpus: Of all nodes.
        gpus: Of all nodes.
        node_cpus: Of the largest node.
        nodes: One by one; without them, equal ones are assumed.
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
    """What the connected cluster has now; nodes that an autoscaler might add do not count."""
    import ray  # half a second that arithmetic alone does not need

    nodes = tuple(
        Node(n["NodeManagerHostname"], n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0))
        for n in ray.nodes()
        if n["Alive"]
    )
    return Capacity(
        sum(n.cpus for n in nodes), sum(n.gpus for n in nodes), max((n.cpus for n in nodes), default=0.0), nodes
    )


def worker_resources(cfg: Config, have: Capacity) -> dict[str, float]:
    """What one training worker holds; where no GPUs were asked for, one if the cluster has any."""
    made, gpus = {"CPU": cfg.cluster.cpus_per_worker}, cfg.cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if have.gpus else 0.0
    return {**made, "GPU": gpus} if gpus else made


def sizes(cfg: Config, workers: int) -> list[int]:
    """Numbers of workers that a run may have, the largest first: those that its global batch divides by.

    >>> from ugrl.config import build
    >>> sizes(build({"train": {"global_batch": 6}, "cluster": {"min_workers": 1}}), 4)
    [3, 2, 1]
    >>> sizes(build({"train": {"global_batch": 6}}), 3)
    [3]
    """
    least = min(cfg.cluster.min_workers or workers, workers)
    return [n for n in range(workers, least - 1, -1) if cfg.train.global_batch % n == 0]


def check_fits(cfg: Config, workers: int, have: Capacity, *, groups: int = 1) -> int:
    """Refuse what the cluster cannot place, with the numbers.

    Args:
        cfg: The run.
        workers: Training workers of a run, the most of them where ``cluster.min_workers`` allows fewer.
        have: The cluster.
        groups: Runs side by side.

    Returns:
        Workers to start with.

    Raises:
        ConfigError: Too few CPUs (some must stay free for the tasks that read data) or GPUs, in sum or node by
            node; GPUs shared by ranks of NCCL; a global batch that does not divide by the workers.
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
    places = [_takes(node, each["CPU"], gpu) for node in have.each()]
    if sum(places) < groups * workers:
        on = ", ".join(f"{n.name} ({_has(n)}) takes {k}" for n, k in zip(have.each(), places, strict=True))
        what = f"{each['CPU']:g} CPU" + (f" and {gpu:g} GPU" if gpu else "")
        raise ConfigError(
            f"{runs}{workers} workers × {what}: {on}; {sum(places)} of {groups * workers} can be placed, since none is "
            "split over nodes; lower cluster.cpus_per_worker or take fewer workers"
        )


def _takes(node: Node, cpus: float, gpus: float) -> int:
    room = node.cpus / cpus
    return math.floor((min(room, node.gpus / gpus) if gpus else room) + EPS)


def _has(node: Node) -> str:
    return f"{node.cpus:g} CPUs" + (f", {node.gpus:g} GPUs" if node.gpus else "")


def data_tasks(cfg: Config, workers: int, have: Capacity, *, groups: int = 1) -> int:
    """Reading tasks that one worker may run at a time: its share of the CPUs that the workers leave free."""
    if cfg.cluster.data_tasks:
        return cfg.cluster.data_tasks
    free = have.cpus - groups * workers * cfg.cluster.cpus_per_worker
    return max(1, min(4, int(free / (groups * workers))))


def check_store(cfg: Config, shards: Manifest, workers: int, have: Capacity, *, groups: int = 1) -> None:
    """Refuse an object store that is too small for the streams of a run's workers, with the numbers.

    Raises:
        ConfigError: Even the smallest stream, of a few rows, does not fit.
    """
    from cluster.data import mean_row_bytes, store_part, stream_bytes

    room = store_part(groups * workers)
    if room <= 0:
        return
    row = mean_row_bytes(shards, cfg.data.train_split)
    need = stream_bytes(row, tasks=data_tasks(cfg, workers, have, groups=groups), store_bytes=room)
    if need > room + 1:
        raise ConfigError(
            f"{groups * workers} streams × {need / 1e6:.1f} MB of the object store (rows of {row / 1e6:.2f} MB); a "
            f"stream's share of the smallest store is {room / 1e6:.1f} MB: start Ray with a larger "
            "--object-store-memory, or take fewer workers"
        )


def on_what(cfg: Config, have: Capacity) -> str:
    """What a cluster has, with a word on GPUs that would be used if there were any."""
    lacks = cfg.cluster.gpus_per_worker is None and not have.gpus
    return f"{have} and no GPU: training on the CPU" if lacks else str(have)


def wait_until_free(
    each: Mapping[str, float],
    count: int,
    *,
    say: Callable[[str], None],
    patience_s: float,
    every_s: float = 1.0,
) -> None:
    """Wait while other work holds what is needed, but not for ever.

    Args:
        each: What one worker or trial holds, as of :func:`worker_resources`.
        count: How many of them.
        patience_s: How long to wait; ``inf`` for as long as it takes.
        say: Told in one line that it waits.
        every_s: Pause between two looks.

    Raises:
        NoRoomError: Still not free, with the numbers.
    """
    import ray

    until, told = time.monotonic() + patience_s, False
    while True:
        have = capacity()
        free = ray.available_resources()
        lack = {k: (count * v, free.get(k, 0.0)) for k, v in each.items() if count * v > free.get(k, 0.0) + EPS}
        if not lack:
            return
        text = " and ".join(f"{need:g} {k}s are needed, {left:g} are free" for k, (need, left) in lack.items())
        if time.monotonic() > until:
            raise NoRoomError(
                f"{text} of the cluster's {have}: other work holds the rest, for more than {patience_s:g} s "
                "(cluster.busy_s) now; try again when it has ended, take less, or --wait as long as it takes"
            )
        if not told:
            limit = "as long as it takes" if math.isinf(patience_s) else f"up to {patience_s:g} s (cluster.busy_s)"
            say(f"waiting {limit}: {text} of the cluster's {have}")
            told = True
        time.sleep(every_s)
