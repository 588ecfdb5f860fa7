"""What dead jobs left behind, and nodes that cannot see a run: both are found before it starts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import ray
from ray import PlacementGroupID
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ugrl.errors import AwayError, ConfigError
from ugrl.storage import Place, StorageError

WORD_S = 10.0


def sweep_placement_groups() -> list[str]:
    """Remove placement groups of jobs that have ended; returns their ids.

    A driver that dies while its group is pending leaves it behind, and the next run waits for what it holds
    (ray-project/ray#58515). Groups of live jobs are not touched.
    """
    from ray.util.state import list_jobs, list_placement_groups

    # Without its address, the state asked for may be that of another cluster on this machine.
    asked = {"address": ray.get_runtime_context().gcs_address, "limit": 10_000}
    try:
        ended = {job.job_id for job in list_jobs(**asked) if job.status in ("SUCCEEDED", "FAILED", "STOPPED")}
        groups = list_placement_groups(**asked, detail=True)
    except Exception:  # a cluster without a dashboard has no state to ask for
        return []
    swept = []
    for group in groups:
        if group.state != "REMOVED" and group.creator_job_id in ended:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.placement_group_id)))
            swept.append(group.placement_group_id)
    return swept


def check_visible(out: Place, shards: Place, timeout_s: float, say: Callable[[str], None]) -> None:
    """Have every node write to the run's folder and read the shards' manifest.

    Args:
        out: The run's folder.
        shards: The prepared folder.
        timeout_s: How long the nodes have for it, all together.
        say: Told in one line that one takes long.

    Raises:
        ConfigError: A node that cannot, by name.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if len(nodes := [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]) < 2:
        return
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {
        n["NodeManagerHostname"] + " " + n["NodeID"][:6]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        ).remote(out.where, shards.where)
        for n in nodes
    }
    until = time.monotonic() + timeout_s
    for name, task in asked.items():
        try:
            if not ray.wait([task], timeout=min(WORD_S, timeout_s))[0]:
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


def _look(out: str, shards: str) -> str:
    mark = Place(out) / f".visible_{uuid.uuid4().hex[:8]}"
    try:
        (Place(shards) / "manifest.json").read()
        mark.write(b"")
        mark.delete()
    except StorageError as error:
        return str(error)
    return ""
