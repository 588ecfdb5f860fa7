"""What is looked at on the connected cluster before a run starts: object store, free resources, shared folders."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping

import ray
from ray.exceptions import GetTimeoutError

from cluster.blocks import mean_row_bytes, store_part, stream_bytes
from cluster.capacity import EPS, Capacity, capacity, data_tasks
from ugrl.config import Config
from ugrl.data.shards import Manifest
from ugrl.errors import AwayError, ConfigError, NoRoomError
from ugrl.storage import Place, StorageError

# A node that has not answered for this long is reported.
NODE_S = 10.0


def check_store(cfg: Config, shards: Manifest, workers: int, have: Capacity, *, groups: int = 1) -> None:
    """Refuse an object store that is too small for the workers' streams of rows, with the numbers.

    Raises:
        ConfigError: Even the smallest stream, a few rows long, does not fit.
    """
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


def wait_until_free(
    each: Mapping[str, float],
    count: int,
    *,
    say: Callable[[str], None],
    patience_s: float,
    every_s: float = 1.0,
) -> None:
    """Wait while other work holds the resources that are needed.

    Args:
        each: What one worker or trial holds, as from :func:`cluster.capacity.worker_resources`.
        count: Number of workers or trials.
        patience_s: How long to wait; ``inf`` waits as long as it takes.
        say: Gets one line when the wait begins.
        every_s: Pause between two looks.

    Raises:
        NoRoomError: The resources are still not free; the message has the numbers.
    """
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


def check_visible(out: Place, shards: Place, timeout_s: float, say: Callable[[str], None]) -> None:
    """Let every node write to the run's folder and read the manifest of the shards.

    Args:
        out: The run's folder.
        shards: The prepared folder.
        timeout_s: How long this may take for all nodes together.
        say: Gets one line for a node that takes long.

    Raises:
        ConfigError: A node cannot read or write; the message names it.
        AwayError: A node has not answered in time.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if len(nodes := [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]) < 2:
        return
    look = ray.remote(num_cpus=0, max_retries=0)(_problem_here)
    asked = {
        n["NodeManagerHostname"] + " " + n["NodeID"][:6]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        ).remote(out.where, shards.where)
        for n in nodes
    }
    until = time.monotonic() + timeout_s
    for name, task in asked.items():
        try:
            if not ray.wait([task], timeout=min(NODE_S, timeout_s))[0]:
                say(f"node {name} has not looked at {out} yet; waiting up to {timeout_s:g} s (cluster.start_timeout_s)")
            problem = ray.get(task, timeout=max(0.0, until - time.monotonic()))
        except GetTimeoutError:
            raise AwayError(
                f"node {name}: it has not read {shards} and written to {out} within {timeout_s:g} s "
                "(cluster.start_timeout_s); its mount may hang"
            ) from None
        except Exception as error:
            problem = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if problem:
            raise ConfigError(f"node {name}: {problem}; shards and runs must be visible on every node")


def _problem_here(out: str, shards: str) -> str:
    """What keeps this node from using the two folders; empty if nothing does."""
    mark = Place(out) / f".visible_{uuid.uuid4().hex[:8]}"
    try:
        (Place(shards) / "manifest.json").read()
        mark.write(b"")
        mark.delete()
    except StorageError as error:
        return str(error)
    return ""
