"""Several raylets on this machine, for tests that kill them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ugrl.train import checkpoint

# float64: only the order of sums differs between numbers of workers.
CLOSE = 1e-7


@contextmanager
def raylets(count: int, *, cpus: float = 1) -> Iterator[Any]:
    """A head without CPUs and ``count`` nodes; yields Ray's ``Cluster`` with the nodes as ``nodes``."""
    pytest.importorskip("ray", reason="Ray is not installed")
    import ray
    from ray.cluster_utils import Cluster

    from cluster.connect import ENVIRONMENT, start_ray, stop_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        # A node that is gone is to be noticed within seconds.
        patch.setenv("RAY_health_check_period_ms", "1000")
        patch.setenv("RAY_health_check_failure_threshold", "3")
        memory = {"object_store_memory": 100 * 2**20}
        with socket.socket() as free:  # another cluster on this machine may have the usual port
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "dashboard_port": port, **memory})
        made.nodes = [made.add_node(num_cpus=cpus, **memory) for _ in range(count)]
        made.wait_for_nodes()
        try:
            start_ray(made.address)
            yield made
        finally:
            stop_ray()
            ray.shutdown()
            made.shutdown()


class Head:
    """A cluster of one node that `ray start --head` begins, apart from this process.

    Attributes:
        address: The same after each start.
    """

    def __init__(self, home: Path, cpus: float) -> None:
        self.home, self.cpus, self.mark = home, cpus, uuid.uuid4().hex
        with socket.socket() as one, socket.socket() as other:
            for free in (one, other):
                free.bind(("127.0.0.1", 0))
            self.port, self.client = one.getsockname()[1], other.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin it, or one in the place of a head that died."""
        ray = shutil.which("ray", path=str(Path(sys.executable).parent))
        assert ray is not None
        words = [ray, "start", "--head", f"--port={self.port}", f"--num-cpus={self.cpus:g}"]
        words += ["--include-dashboard=false", "--num-gpus=0", f"--ray-client-server-port={self.client}"]
        words += [f"--temp-dir={self.home}", "--object-store-memory=200000000"]
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "UGRL_TEST_MARK": self.mark}
        subprocess.run(words, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._answers)

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Its own, by name."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("UGRL_TEST_MARK") == self.mark and name in process.name():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, *names: str) -> None:
        """All of its processes, or those of these names, by SIGKILL."""
        for process in [p for name in names or ("",) for p in self.processes(name)]:
            with suppress(psutil.Error):
                process.kill()

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return bool(self.processes("raylet"))


@contextmanager
def own_head(home: Path, *, cpus: float = 2) -> Iterator[Head]:
    """A :class:`Head`, started, and ended afterwards."""
    head = Head(home, cpus)
    try:
        head.start()
        yield head
    finally:
        head.kill()


@contextmanager
def started_head(home: Path, *, cpus: float = 2) -> Iterator[tuple[str, int]]:
    """As :func:`own_head`; yields its address and its head's process."""
    with own_head(home, cpus=cpus) as head:
        yield head.address, head.processes("gcs_server")[0].pid


def raylet_pid(node: Any) -> int:
    """The process of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)


def kill_raylet(node: Any) -> None:
    """As if a machine had lost power: the raylet and all its workers at once."""
    raylet = psutil.Process(raylet_pid(node))
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.Error):  # which looks whether the number is another process's by now
            process.kill()


def training_workers(root: int | None = None) -> list[int]:
    """Processes of Ray Train's workers that descend from this test (or from ``root``)."""
    found = []
    for process in psutil.Process(root or os.getpid()).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def lines(out: Path) -> list[dict[str, float]]:
    """Records of ``metrics.jsonl``."""
    return [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path, key: str = "total") -> dict[int, float]:
    """A value by step."""
    return {int(r["step"]): r[key] for r in lines(out) if key in r}


def wait_for(condition: Any, timeout_s: float = 400.0) -> None:
    """Poll until something is true."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.05)


def check_same(out: Path, alone: Path) -> None:
    """Curves and scores of a run are those of another one."""
    for key in ("total", "seg", "ucl", "aux"):
        a, b = curve(out, key), curve(alone, key)
        assert a.keys() == b.keys() and b
        for step in b:
            assert a[step] == pytest.approx(b[step], rel=CLOSE, abs=1e-9), (key, step)
    for name in ("val/seg_miou", "val/cam_miou", "val/tag_map"):
        assert [r[name] for r in lines(out) if name in r] == pytest.approx(
            [r[name] for r in lines(alone) if name in r], abs=1e-6
        )
    assert checkpoint.read_state(checkpoint.find(out)).step == 20


def when_saved(out: Path, step: int, action: Callable[[], None]) -> threading.Thread:
    """Do something once a checkpoint of ``step`` is whole."""

    def body() -> None:
        wait_for(lambda: (found := checkpoint.latest(out)) is not None and checkpoint.step_of(found.name) >= step, 300)
        action()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread
