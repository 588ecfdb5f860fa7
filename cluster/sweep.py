"""What dead jobs left behind, and a second driver on the same run: both are found before a run starts."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ugrl.errors import ConfigError
from ugrl.storage import Place, StorageError

OWNER = "owner.json"
REFRESH_S, STALE_S = 5.0, 30.0


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


@contextmanager
def owned(out: Place) -> Iterator[None]:
    """Hold a run's folder: a second driver on it is refused while the first one lives.

    The lease is a file that is written again every few seconds; on any storage, and without locks, which network mounts
    lack. A dead driver's lease goes stale.

    Raises:
        ConfigError: Another driver holds it.
    """
    lease, mine = out / OWNER, uuid.uuid4().hex
    found = _read(lease)
    if found is not None and _alive(found):
        raise ConfigError(
            f"{out}: another driver is running it (process {found['pid']} on {found['host']}); wait for it to end, or "
            f"try again {STALE_S:g} s after it died"
        )
    tree = {"id": mine, "host": socket.gethostname(), "pid": os.getpid()}
    leave = threading.Event()

    def write() -> None:
        try:
            lease.write(json.dumps({**tree, "time": time.time()}).encode())
        except StorageError:
            pass  # away for a moment: the run has its own patience for that

    def refresh() -> None:
        while not leave.wait(REFRESH_S):
            write()

    write()
    thread = threading.Thread(target=refresh, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join(timeout=REFRESH_S)
        try:
            if (_read(lease) or {}).get("id") == mine:
                lease.delete()
        except StorageError:
            pass


def _read(lease: Place) -> dict | None:
    try:
        return dict(json.loads(lease.read())) if lease.exists() else None
    except (StorageError, ValueError):
        return None


def _alive(found: dict) -> bool:
    if time.time() - float(found.get("time", 0)) > STALE_S:
        return False
    if found.get("host") != socket.gethostname():
        return True
    try:  # on this machine there is no need to wait until the lease is stale
        os.kill(int(found.get("pid", 0)), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return int(found["pid"]) != os.getpid()


def check_visible(out: Place, shards: Place, timeout_s: float = 60.0) -> None:
    """Have every node write to the run's folder and read the shards' manifest.

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
    for name, task in asked.items():
        try:
            problem = ray.get(task, timeout=timeout_s)
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
