"""Nodes, workers and drivers that die in the middle of a run: it ends with the numbers of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.raycluster import (
    check_same,
    curve,
    kill_raylet,
    raylets,
    started_head,
    training_workers,
    wait_for,
    when_saved,
)
from tests.small import TINY
from ugrl import config as configs
from ugrl.train import checkpoint

pytestmark = pytest.mark.ray

pytest.importorskip("ray", reason="Ray is not installed")


@pytest.mark.long
def test_a_worker_and_then_a_whole_node_are_killed(
    small: configs.Config, small_shards: Path, alone: Path, tmp_path: Path
) -> None:
    """Three nodes of one worker each. A worker dies and is replaced; then a raylet dies with all that ran on it, and
    the run goes on with the two that are left and the same global batch."""
    from cluster.launch import launch

    out, said, killed = tmp_path / "run", [], []
    elastic = replace(small, cluster=replace(small.cluster, min_workers=1, start_timeout_s=15))

    with raylets(3) as made:

        def kill_worker() -> None:
            pid = training_workers()[-1]
            os.kill(pid, signal.SIGKILL)
            killed.append("worker")

        def kill_node() -> None:
            kill_raylet(made.nodes[-1])
            killed.append("node")

        threads = [when_saved(out, 4, kill_worker), when_saved(out, 12, kill_node)]
        metrics = launch(elastic, shards=small_shards, out=out, workers=3, say=said.append)
        for thread in threads:
            thread.join(10)
    assert killed == ["worker", "node"]
    assert metrics["step"] == 20
    assert any("going on with 2 workers" in text for text in said)
    check_same(out, alone)


def command(shards: Path, out: Path, *more: str) -> list[str]:
    words = [
        f"{k}={json.dumps(v)}" for k, v in {**TINY, "cluster.data_cpus": 1, "cluster.cpus_per_worker": 0.4}.items()
    ]
    return [sys.executable, "-m", "cluster.cli", "--config", "shapes", "--workers", "2", "--data", str(shards)] + [
        *("--out", str(out), "--resume", *more, *words, "train.checkpoint_every=1")
    ]


def start(words: list[str], **more: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def saved(out: Path, step: int) -> bool:
    found = checkpoint.latest(out)
    return found is not None and checkpoint.step_of(found.name) >= step


def until(driver: subprocess.Popen[str], done) -> None:
    wait_for(lambda: done() or driver.poll() is not None, 300)
    assert driver.poll() is None, driver.stderr and driver.stderr.read()


@pytest.mark.long
def test_the_driver_is_killed_and_the_same_command_goes_on(small_shards: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    driver = start(command(small_shards, out))
    try:
        until(driver, lambda: list(out.glob("owner/*.json")))
        second = subprocess.run(command(small_shards, out), capture_output=True, text=True)
        assert second.returncode == 2 and "another driver is running it" in second.stderr
        until(driver, lambda: saved(out, 3))
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert list(out.glob("owner/*.json"))  # it had no time to take it away
    assert checkpoint.read_state(checkpoint.find(out)).step < 20

    driver = start(command(small_shards, out))
    _, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, err
    check_same(out, alone)


@pytest.mark.full
def test_the_driver_is_asked_to_leave_and_the_same_command_goes_on(
    small_shards: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    driver = start(command(small_shards, out))
    try:
        until(driver, lambda: saved(out, 2))
        driver.send_signal(signal.SIGTERM)
        _, err = driver.communicate(timeout=180)
    finally:
        driver.kill()
    assert driver.returncode == 143, err
    assert "stopping after a checkpoint" in err and "interrupted; continue with: ugrl-train --config shapes" in err
    left = checkpoint.read_state(checkpoint.find(out)).step
    assert 2 <= left < 20
    assert len(curve(out)) == left  # nothing was lost
    assert not list(out.glob("owner/*.json"))

    driver = start(command(small_shards, out))
    _, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, err
    check_same(out, alone)


@pytest.mark.full
def test_without_room_for_all_workers_a_run_says_so_and_ends(
    small: configs.Config, small_shards: Path, tmp_path: Path
) -> None:
    from cluster.launch import launch
    from ugrl.errors import UgrlError

    out = tmp_path / "run"
    fixed = replace(small, cluster=replace(small.cluster, start_timeout_s=8))
    with raylets(2) as made:
        killer = when_saved(out, 4, lambda: kill_raylet(made.nodes[-1]))
        with pytest.raises(
            UgrlError, match=r"2 workers could not be started in 8 s; the cluster has 1 CPUs now; .*--res"
        ):
            launch(fixed, shards=small_shards, out=out, workers=2)
        killer.join(10)
    assert 4 <= checkpoint.read_state(checkpoint.find(out)).step < 20


@pytest.mark.full
def test_many_kills_at_random_moments(small: configs.Config, small_shards: Path, alone: Path, tmp_path: Path) -> None:
    from cluster.launch import launch

    out, dice = tmp_path / "run", random.Random(0)
    patient = replace(
        small, cluster=replace(small.cluster, max_failures=20), train=replace(small.train, checkpoint_every=1)
    )
    kills: list[int] = []
    done = threading.Event()

    def killer() -> None:
        while not done.wait(dice.uniform(5, 40)) and len(kills) < 5:
            workers = training_workers()
            if workers:
                kills.append(dice.choice(workers))
                os.kill(kills[-1], signal.SIGKILL)

    with raylets(3):
        thread = threading.Thread(target=killer, daemon=True)
        thread.start()
        launch(patient, shards=small_shards, out=out, workers=2)
        done.set()
        thread.join(60)
    assert kills
    check_same(out, alone)


@pytest.mark.full
def test_a_node_that_comes_back_is_used_again(
    small: configs.Config, small_shards: Path, alone: Path, tmp_path: Path
) -> None:
    import cluster.elastic as elastic
    import cluster.launch as launching

    out, said = tmp_path / "run", []
    slow = replace(
        small,
        cluster=replace(small.cluster, min_workers=1, start_timeout_s=15),
        train=replace(small.train, checkpoint_every=1),
    )
    with raylets(2) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic, "GROW_EVERY_S", 0.5)
        patch.setattr(elastic, "GROW_LOOKS", 1)

        def change() -> None:
            kill_raylet(made.nodes[-1])
            wait_for(lambda: any("going on with 1 workers" in text for text in said), 200)
            made.add_node(num_cpus=1, object_store_memory=100 * 2**20)

        changer = when_saved(out, 2, change)
        launching.launch(slow, shards=small_shards, out=out, workers=2, say=said.append)
        changer.join(60)
    assert any("there is room again: going on with 2 workers" in text for text in said)
    check_same(out, alone)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.full)])
def test_a_head_that_dies_or_hangs_ends_the_driver_with_one_line(number: int, small_shards: Path) -> None:
    """Ray itself would end the driver a minute later, with words of its own and status 1; or never."""
    home = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # sockets have short names
    out = home / "run"
    try:
        with started_head(home / "ray") as (address, head):
            words = [*command(small_shards, out), "--address", address, "cluster.head_s=5", "train.steps=4000"]
            driver = start(words, RAY_AUTH_MODE="disabled")
            try:
                until(driver, lambda: saved(out, 2))
                os.kill(head, number)
                _, err = driver.communicate(timeout=400)
            finally:
                driver.kill()
        assert driver.returncode == 4, err
        port = address.partition(":")[2]
        assert "the cluster was lost: its head at " in err
        assert f":{port} has not answered for 5 s (cluster.head_s); continue with --resume" in err
        assert "Traceback" not in err
    finally:
        shutil.rmtree(home, ignore_errors=True)
