"""What workers tell: their channel to the driver and their gauges, on a real private cluster with real deaths."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console

from cluster.channel import (
    DriverChannel,
    RecordQueue,
    WorkerChannel,
    event_record,
    log_record,
    start_record,
    val_record,
)
from cluster.connect import end_without_destructors
from cluster.live import RayGauges, watch

pytestmark = pytest.mark.ray


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


PORT = free_port()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A private cluster; its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        end_without_destructors()
        started = ray.init(
            address="local",
            num_cpus=1,
            log_to_driver=False,
            _metrics_export_port=PORT,
            _system_config={"metrics_report_interval_ms": 500},
        )
        yield started.address_info["gcs_address"]
        ray.shutdown()


def until(seen: Callable[[], object], seconds: float = 300) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not seen():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@ray.remote(num_cpus=0)
class Teller:
    """A worker process with one end of a channel."""

    def __init__(self, handle: object) -> None:
        self.end, self.errors, self.told = WorkerChannel(handle), [], 0
        self.going = False

    def tell(self, records: list[dict]) -> None:
        for record in records:
            self.end.send(record)

    def start(self) -> int:
        """Tell without an end, as a run does; the process id."""
        self.going = True
        threading.Thread(target=self._run, daemon=True).start()
        return os.getpid()

    def _run(self) -> None:
        while self.going:
            try:
                self.end.send(log_record(self.told, {"total": 1.0}))
                self.end.stop_requested()
            except Exception as error:
                self.errors.append(repr(error))
            self.told += 1
            time.sleep(0.01)

    def state(self) -> dict:
        return {
            "told": self.told,
            "errors": self.errors,
            "alive": self.end.connected,
            "waiting": len(self.end._queue.kept),
            "stopping": self.end.stop_requested(),
            "threads": [t.name for t in threading.enumerate()],
        }

    def close(self) -> list[str]:
        self.going = False
        self.end.close()
        self.end.send(event_record("too late"))
        return [t.name for t in threading.enumerate()]


def test_records_arrive_in_order_and_the_request_to_stop_reaches_the_worker(cluster: str) -> None:
    channel = DriverChannel.open()
    worker = Teller.remote(channel.actor)
    sent = [log_record(k, {"total": float(k)}) for k in range(30)] + [val_record(30, {"mIoU": 0.5})]
    assert channel.records() == []
    ray.get(worker.tell.remote(sent))
    found: list[dict] = []
    assert until(lambda: found.extend(channel.records()) or len(found) >= 31)
    assert found == sent
    assert channel.records() == []
    assert not ray.get(worker.state.remote())["stopping"]
    channel.request_stop()
    assert until(lambda: ray.get(worker.state.remote())["stopping"])
    ray.get(worker.tell.remote([event_record("the last word")]))
    assert "channel" not in ray.get(worker.close.remote())  # the thread has ended, with nothing left unsent
    assert until(lambda: found.extend(channel.records()) or len(found) >= 32)
    assert found[31:] == [event_record("the last word")]
    channel.close()
    assert channel.records() == []


@ray.remote(num_cpus=1)
def as_in_a_trial() -> tuple[list[dict], str, str]:
    """Open a channel where the caller holds all CPUs: what arrived, and the nodes of both ends."""
    channel = DriverChannel.open()
    end = WorkerChannel(channel.actor)
    end.send(event_record("here"))
    end.close()
    there = ray.get(channel.actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
    found = channel.records()
    channel.close()
    return found, there, ray.get_runtime_context().get_node_id()


def test_a_channel_needs_no_cpu_and_ends_on_the_drivers_node_also_in_a_trial(cluster: str) -> None:
    group = placement_group([{"CPU": 1}])  # Tune gives a trial one, and its children share it
    captures = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    found, there, here = ray.get(as_in_a_trial.options(scheduling_strategy=captures).remote(), timeout=120)
    assert found == [event_record("here")]
    assert there == here
    remove_placement_group(group)


def test_a_killed_actor_leaves_worker_and_driver_as_they_are(cluster: str) -> None:
    channel = DriverChannel.open()
    worker = Teller.remote(channel.actor)
    ray.get(worker.start.remote())
    assert until(lambda: bool(channel.records()))
    os.kill(ray.get(channel.actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    assert until(lambda: not ray.get(worker.state.remote())["alive"])
    before = ray.get(worker.state.remote())
    assert until(lambda: ray.get(worker.state.remote())["told"] > before["told"] + 20)
    after = ray.get(worker.state.remote())
    assert after["errors"] == []
    assert not after["stopping"]
    assert after["waiting"] == before["waiting"]  # nothing is kept for nobody
    assert channel.records() == []
    channel.request_stop()
    channel.close()


DRIVER = """
import sys, time, ray
from cluster.channel import DriverChannel
from tests.test_channel import Teller
ray.init(address=sys.argv[1], namespace="apart", log_to_driver=False)
channel = DriverChannel.open()
worker = Teller.options(name="teller", lifetime="detached").remote(channel.actor)
ray.get(worker.start.remote())
while not channel.records():
    time.sleep(0.05)
print("heard", flush=True)
time.sleep(600)
"""


def test_a_killed_driver_leaves_a_worker_that_outlives_it_as_it_is(cluster: str) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None and driver.stdout.readline().strip() == "heard"
    finally:
        driver.kill()
        driver.wait()
    worker = ray.get_actor("teller", namespace="apart")
    assert until(lambda: not ray.get(worker.state.remote())["alive"])
    told = ray.get(worker.state.remote())["told"]
    assert until(lambda: ray.get(worker.state.remote())["told"] > told + 20)
    assert ray.get(worker.state.remote())["errors"] == []
    ray.kill(worker)


def test_a_full_queue_drops_old_training_lines_and_nothing_else() -> None:
    queue = RecordQueue(most_logs=3)
    queue.add([val_record(0, {}), log_record(1, {}), event_record("a"), log_record(2, {})])
    queue.add([log_record(k, {}) for k in (3, 4)] + [val_record(4, {})])
    kept = queue.take()
    assert [r["kind"] for r in kept] == ["val", "event", "log", "log", "log", "val"]
    assert [r["step"] for r in kept if r["kind"] == "log"] == [2, 3, 4]
    assert queue.take() == []
    queue.add([log_record(5, {})])
    assert len(queue.take()) == 1


def test_a_watched_channel_is_read_to_its_end(cluster: str) -> None:
    channel, file = DriverChannel.open(), io.StringIO()
    with watch(channel, 30, console=Console(file=file, width=80)):
        worker = Teller.remote(channel.actor)
        ray.get(worker.tell.remote([start_record(0, 1, 1)]))
        assert until(file.getvalue)  # the actor has begun; the end waits for it only some seconds
        ray.get(worker.tell.remote([log_record(k, {"total": 1.0}) for k in range(1, 31)]))
        ray.get(worker.close.remote())
    channel.close()
    lines = file.getvalue().splitlines()
    assert lines[0] == "started: 1 worker on 1 node"
    assert lines[-1].startswith("step 30/30  total 1.0000")


@ray.remote(num_cpus=0)
class Gauged:
    """A worker that sets its gauges."""

    def __init__(self, rank: int) -> None:
        self.gauges = RayGauges("runs/a", rank)

    def set(self, step: int, values: dict[str, float]) -> None:
        self.gauges(step, values)


def test_gauges_are_served_to_prometheus(cluster: str) -> None:
    values = {"total": 2.5, "cls": 0.5, "lr": 0.1, "stat/pool": 0.3, "images_per_s": 81.25, "step_s": 0.125}
    values |= {"data_wait": 0.0625, "device_memory_mb": 512.0}
    workers = [Gauged.remote(rank) for rank in range(2)]
    ray.get([worker.set.remote(40 + rank, values) for rank, worker in enumerate(workers)])
    expected = {
        ("ugrl_images_per_second", ""): 81.25,
        ("ugrl_step_seconds", ""): 0.125,
        ("ugrl_data_wait_share", ""): 0.0625,
        ("ugrl_device_memory_mb", ""): 512.0,
        ("ugrl_loss", "total"): 2.5,
        ("ugrl_loss", "cls"): 0.5,
    }
    wanted = {(name, str(rank), term): value for (name, term), value in expected.items() for rank in range(2)}
    wanted |= {("ugrl_step", str(rank), ""): 40.0 + rank for rank in range(2)}
    found: dict[tuple[str, str, str], float] = {}

    def scrape() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return False
        found.clear()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                tags = sample.labels
                if sample.name.startswith("ray_ugrl_") and tags["run"] == "runs/a":
                    found[sample.name.removeprefix("ray_"), tags["rank"], tags.get("term", "")] = sample.value
        return found.keys() >= wanted.keys()

    assert until(scrape), found
    assert found == wanted
