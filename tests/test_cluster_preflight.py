"""What a cluster cannot place is refused with the arithmetic, and where a run runs is a file of its own."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest

from cluster import cli
from cluster.capacity import Capacity, Node, check_fits, data_tasks, on_what, sizes
from cluster.cli import load_config, load_place, shipped
from tests.raycluster import raylets
from ugrl import config as configs
from ugrl.errors import ConfigError, NoRoomError

BASE = {
    "train.steps": 24,
    "train.lr_warmup_iters": 2,
    "train.cls_warmup_iters": 6,
    "train.global_batch": 4,
    "cluster.cpus_per_worker": 0.5,
}


def cfg(**changes: object) -> configs.Config:
    return configs.load("shapes", BASE | {k.replace("__", "."): v for k, v in changes.items()})


def nodes(*cpus: float, gpus: float = 0) -> Capacity:
    made = tuple(Node(f"n{k}", c, gpus) for k, c in enumerate(cpus))
    return Capacity(sum(cpus), gpus * len(cpus), max(cpus), made)


@pytest.mark.parametrize(
    ("have", "workers", "changes", "words"),
    [
        (Capacity(2, 0, 2), 2, {"cluster__cpus_per_worker": 1}, "2 workers × 1 CPU + 1 for reading data = 3 CPUs"),
        (Capacity(8, 0, 2), 1, {"cluster__cpus_per_worker": 4}, "the cluster has 8 CPUs"),
        (Capacity(64, 1, 64), 2, {}, "2 workers × 1 GPU = 2 GPUs; the cluster has 64 CPUs and 1 GPUs"),
        (
            Capacity(64, 0, 64),
            3,
            {},
            "train.global_batch is 4; expected a multiple of the 3 workers (it divides by 1, 2, 4",
        ),
        (
            nodes(5, 5),
            2,
            {"cluster__cpus_per_worker": 3, "train__global_batch": 6},
            None,
        ),
        (
            nodes(5, 5),
            3,
            {"cluster__cpus_per_worker": 3, "train__global_batch": 6},
            "3 workers × 3 CPU: n0 (5 CPUs) takes 1, n1 (5 CPUs) takes 1; 2 of 3 can be placed, since none is split",
        ),
        (
            nodes(4),
            2,
            {"cluster__gpus_per_worker": 1},
            "2 workers × 1 GPU = 2 GPUs; the cluster has 4 CPUs; cluster.gpus_per_worker=0 trains on CPUs",
        ),
        (
            nodes(16, 16, gpus=1),
            2,
            {"cluster__gpus_per_worker": 0.5},
            "cluster.gpus_per_worker is 0.5: ranks of one NCCL group cannot share a GPU",
        ),
        (nodes(16, 16, gpus=1), 2, {"cluster__gpus_per_worker": 0.5, "cluster__backend": "gloo"}, None),
        (nodes(16, 1, gpus=1), 2, {"cluster__cpus_per_worker": 4}, "n1 (1 CPUs, 1 GPUs) takes 0; 1 of 2 can be placed"),
        (nodes(4), 2, {"cluster__cpus_per_worker": 1, "cluster__data_cpus": 3}, "+ 3 for reading data = 5 CPUs"),
    ],
)
def test_refusals_hold_the_numbers(have: Capacity, workers: int, changes: dict, words: str | None) -> None:
    if words is None:
        assert check_fits(cfg(**changes), workers, have) == workers
        return
    with pytest.raises(ConfigError) as caught:
        check_fits(cfg(**changes), workers, have)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_elastic_run_starts_with_the_most_workers_that_fit_and_divide() -> None:
    elastic = cfg(train__global_batch=6, cluster__min_workers=1, cluster__cpus_per_worker=1)
    assert sizes(elastic, 5) == [3, 2, 1]
    assert check_fits(elastic, 5, nodes(8)) == 3
    assert check_fits(elastic, 5, nodes(2, 1)) == 2
    assert check_fits(elastic, 5, nodes(1, 1)) == 1
    with pytest.raises(ConfigError, match="1 workers × 1 CPU"):
        check_fits(elastic, 5, nodes(1))
    never = cfg(train__global_batch=7, cluster__min_workers=2)
    with pytest.raises(ConfigError, match="expected a multiple of the 4 workers"):
        check_fits(never, 4, nodes(64))


def test_reading_tasks() -> None:
    assert data_tasks(cfg(), 2, Capacity(2, 0, 2)) == 1
    assert data_tasks(cfg(), 2, Capacity(64, 0, 64)) == 4
    assert data_tasks(cfg(cluster__data_tasks=7), 2, Capacity(64, 0, 64)) == 7


def test_gpus_that_would_be_used_if_there_were_any_are_missed_aloud() -> None:
    assert on_what(cfg(), nodes(2)) == "2 CPUs and no GPU: training on the CPU"
    assert on_what(cfg(cluster__gpus_per_worker=0), nodes(2)) == "2 CPUs"
    assert on_what(cfg(cluster__gpus_per_worker=1), nodes(2, gpus=1)) == "2 CPUs and 1 GPUs"


def arguments(*words: str) -> argparse.Namespace:
    return cli.build_parser().parse_intermixed_args(list(words))


def test_where_a_run_runs_is_a_file_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    file.write_text("workers: 3\nmin_workers: 1\nstorage: s3://bucket/runs\n")
    found = load_config(arguments("--config", "shapes", "--cluster", str(file), "cluster.min_workers=2"))
    assert (found.cluster.workers, found.cluster.min_workers) == (3, 2)
    assert found.cluster.storage == "s3://bucket/runs"
    assert load_config(arguments("--config", "shapes", "--cluster", str(file), "--workers", "5")).cluster.workers == 5
    assert load_config(arguments("--config", "shapes")).cluster.workers == 0


@pytest.mark.parametrize("name", shipped("cluster.places"))
def test_shipped_places_are_valid_and_divide_the_batch(name: str) -> None:
    found = configs.load("voc", load_place(name))
    if found.cluster.workers:
        assert sizes(found, found.cluster.workers)[0] == found.cluster.workers
    if found.cluster.gpus_per_worker:  # asked for, so a cluster that has registered none will not do
        with pytest.raises(ConfigError, match=r"GPUs; the cluster has 1024 CPUs; cluster.gpus_per_worker=0 trains on"):
            check_fits(found, found.cluster.workers, nodes(1024))
        told = configs.load("voc", {**load_place(name), "cluster.gpus_per_worker": 0})
        assert check_fits(told, told.cluster.workers, nodes(1024)) == told.cluster.workers


def test_a_typo_in_a_place_is_named(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    file.write_text("wrokers: 3\n")
    with pytest.raises(ConfigError, match=r"here.yaml: unknown key 'wrokers'; did you mean 'workers'\?"):
        load_place(str(file))
    with pytest.raises(ConfigError, match=r"--cluster slrum: no such file; did you mean 'slurm'\?"):
        load_place("slrum")
    file.write_text("- 3\n")
    with pytest.raises(ConfigError, match="expected keys and values"):
        load_place(str(file))


@pytest.mark.ray
def test_a_busy_cluster_and_leftovers_of_a_dead_job(tmp_path: Path) -> None:
    """On a real cluster: waiting ends with the numbers; a dead job's group is given back, a live one's is not."""
    pytest.importorskip("ray", reason="Ray is not installed")
    import subprocess
    import sys

    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    from cluster.placement_groups import sweep_placement_groups
    from cluster.preflight import wait_until_free

    with raylets(1, cpus=2):
        group = placement_group([{"CPU": 1.5}])
        ray.get(group.ready())
        said: list[str] = []
        busy = {"CPU": 0.5}
        with pytest.raises(NoRoomError, match="1 CPUs are needed, 0.5 are free of the cluster's 2 CPUs: other work"):
            wait_until_free(busy, 2, patience_s=1, say=said.append, every_s=0.2)
        assert len(said) == 1
        assert sweep_placement_groups() == []  # ours is a live job
        remove_placement_group(group)
        wait_until_free(busy, 2, patience_s=200, say=said.append, every_s=0.2)
        # A driver that is killed while its group, which outlives it, is placed.
        code = (
            "import ray, os; ray.init(address='auto', log_to_driver=False);"
            "from ray.util.placement_group import placement_group as make;"
            "g = make([{'CPU': 1}], lifetime='detached', name='left'); ray.get(g.ready());"
            "print(g.id.hex(), flush=True); os.kill(os.getpid(), 9)"
        )
        address = ray.get_runtime_context().gcs_address
        done = subprocess.run(
            [sys.executable, "-c", code.replace("'auto'", repr(address))], capture_output=True, text=True
        )
        left = done.stdout.split()[-1]
        until = time.monotonic() + 300
        while sweep_placement_groups() != [left]:
            assert time.monotonic() < until
            time.sleep(0.5)
        until = time.monotonic() + 300
        while placement_group_table()[left]["state"] != "REMOVED":
            assert time.monotonic() < until
            time.sleep(0.1)
