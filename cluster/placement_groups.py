"""The placement groups of runs: their ids are noted, and groups that nobody will use any more are removed.

A placement group holds the resources of a run's workers. If the process that made it is killed, it may stay.
"""

from __future__ import annotations

from pathlib import Path

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from ugrl.storage import Place, place

# The file in a run's folder with the id of the workers' placement group. It also shows that the workers have begun.
PLACEMENT = ".placement_group"


def note_placement(out: Place | Path) -> None:
    """Write the id of the workers' placement group to the run's folder, for :func:`free_placement`."""
    group = get_current_placement_group()
    if group is not None:
        (place(out) / PLACEMENT).write(group.id.hex().encode())


def free_placement(out: Place | Path) -> None:
    """Free the resources of a run's workers, if its controller was killed before it could free them.

    Ray Train's own cleaner asks the dashboard whether the controller lives. Without ``ray[default]`` there is no
    dashboard, and the CPUs of a trial that Tune stopped would stay taken.
    """
    note = place(out) / PLACEMENT
    if note.exists():
        group = PlacementGroup(PlacementGroupID.from_hex(note.read().decode()))
        remove_placement_group(group)
        note.delete()


def sweep_placement_groups() -> list[str]:
    """Remove the placement groups of jobs that have ended; returns their ids.

    If a driver dies while its group is pending, the group stays, and the next run waits for its resources
    (ray-project/ray#58515). Groups of live jobs are not touched.
    """
    from ray.util.state import list_jobs, list_placement_groups

    # Without the address, Ray may report the state of another cluster on this machine.
    asked = {"address": ray.get_runtime_context().gcs_address, "limit": 10_000}
    try:
        ended = {job.job_id for job in list_jobs(**asked) if job.status in ("SUCCEEDED", "FAILED", "STOPPED")}
        groups = list_placement_groups(**asked, detail=True)
    except Exception:  # without a dashboard, Ray reports no state
        return []
    swept = []
    for group in groups:
        if group.state != "REMOVED" and group.creator_job_id in ended:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.placement_group_id)))
            swept.append(group.placement_group_id)
    return swept
