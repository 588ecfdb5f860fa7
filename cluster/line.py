"""A line between the driver and its workers: records go up to be shown, the wish to stop goes down.

It is an actor without CPUs on the driver's node. Nothing that is computed depends on it: a driver that has gone, with
its actor or its node, ends the talk and not the run. Its restart opens another line.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Record = dict[str, Any]

# Training lines kept for a driver that does not read them; older ones make room. Every other kind is kept.
MOST_LINES = 2000
EVERY_S = 1.0
PATIENCE_S = 2.0


def log_record(step: int, values: Mapping[str, float]) -> Record:
    """A training line: losses, ``images_per_s``, ``step_s``, ``data_wait``, ``device_memory_mb``."""
    return {"kind": "log", "step": step, "values": dict(values)}


def val_record(step: int, metrics: Mapping[str, float]) -> Record:
    """A validation after ``step`` steps."""
    return {"kind": "val", "step": step, "metrics": dict(metrics)}


def checkpoint_record(step: int, place: object) -> Record:
    """A checkpoint of ``step`` steps that lies whole at ``place``."""
    return {"kind": "checkpoint", "step": step, "place": str(place)}


def start_record(step: int, world: int, nodes: int) -> Record:
    """Workers that begin at ``step``: every such record after the first is a restart."""
    return {"kind": "start", "step": step, "world": world, "nodes": nodes}


def left_record(step: int) -> Record:
    """The last word of workers that were asked to leave, and have a checkpoint of ``step`` steps."""
    return {"kind": "left", "step": step}


def event_record(text: str) -> Record:
    """One sentence: a skipped step, waiting for storage, another number of workers."""
    return {"kind": "event", "text": text}


class Outbox:
    """Records in order, of which only so many are training lines. Not for several threads at once."""

    def __init__(self, most_lines: int = MOST_LINES) -> None:
        self.most_lines, self.lines = most_lines, 0
        self.kept: deque[Record] = deque()

    def add(self, records: Iterable[Record]) -> None:
        """Append; the oldest training lines make room for newer ones."""
        for record in records:
            self.kept.append(record)
            self.lines += record.get("kind") == "log"
            if self.lines > self.most_lines:
                del self.kept[next(k for k, old in enumerate(self.kept) if old.get("kind") == "log")]
                self.lines -= 1

    def take(self) -> list[Record]:
        """All of them; the box is empty afterwards."""
        taken = list(self.kept)
        self.kept.clear()
        self.lines = 0
        return taken


class _Desk:
    """What the actor does; every call is short."""

    def __init__(self) -> None:
        self.box, self.stopped, self.exchanges = Outbox(), False, 0

    def exchange(self, records: list[Record]) -> bool:
        self.exchanges += 1
        self.box.add(records)
        return self.stopped

    def take(self) -> tuple[list[Record], int]:
        return self.box.take(), self.exchanges

    def stop(self, wish: bool = True) -> None:
        self.stopped = wish


class Line:
    """The driver's end.

    Attributes:
        handle: For :class:`WorkerEnd`; goes to the workers with their configuration.
        training: Whether workers have begun to train, as far as :meth:`records` knows.
        left: Whether they have left with a checkpoint, as they were asked to.
        heard: When a worker was last heard, by ``time.monotonic``, as far as :meth:`records` knows.
    """

    def __init__(self, handle: ActorHandle) -> None:
        self.handle = handle
        self.training = self.left = False
        self.heard = time.monotonic()
        self._exchanges = 0
        self._asked: Any = None
        self._closed = False

    @classmethod
    def open(cls) -> Line:
        """Start the actor on this node and return at once; the caller may be a driver, a job or a Tune trial."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = ray.remote(_Desk).options(num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here)
        return cls(desk.remote())

    def records(self) -> list[Record]:
        """What workers told since the last call; an empty list where the actor is slow, or gone."""
        if self._closed or not ray.is_initialized():
            return []
        try:
            # A slow answer is waited for in the next call: asked again, it would be lost.
            self._asked = self._asked or self.handle.take.remote()
            found, exchanges = ray.get(self._asked, timeout=PATIENCE_S)
        except GetTimeoutError:
            return []
        except Exception:  # an actor that died, a connection that ended
            self._asked = None
            return []
        self._asked = None
        if exchanges > self._exchanges:
            self._exchanges, self.heard = exchanges, time.monotonic()
        self.training = self.training or any(record["kind"] == "start" for record in found)
        self.left = self.left or any(record["kind"] == "left" for record in found)
        return [record for record in found if record["kind"] != "left"]

    def stop(self) -> None:
        """Ask the workers to write a checkpoint and leave."""
        try:
            self.handle.stop.remote()
        except Exception:  # nobody left to ask
            return

    def resume(self) -> None:
        """Take the wish back, for workers that start anew."""
        try:
            ray.get(self.handle.stop.remote(False), timeout=PATIENCE_S)
        except Exception:  # nobody left to ask
            return

    def close(self) -> None:
        """End the actor; workers that still talk are not disturbed."""
        if self._closed:
            return
        self._closed = True
        try:
            ray.kill(self.handle)
        except Exception:  # it is gone already
            return


class WorkerEnd:
    """A worker's end. A thread of its own does the talking, one call at a time, at most once a second.

    Args:
        handle: :attr:`Line.handle`.
    """

    def __init__(self, handle: ActorHandle) -> None:
        self.handle = handle
        self._box, self._lock = Outbox(), threading.Lock()
        self._stopping, self._leave, self._dead = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._talk, name="line", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anybody is thought to listen."""
        return not self._dead

    def tell(self, record: Record) -> None:
        """Leave a record to be sent; returns at once, whatever happened to the driver."""
        if self._dead:
            return
        with self._lock:
            self._box.add([record])

    def stopping(self) -> bool:
        """Whether the driver has asked for the end."""
        return self._stopping.is_set()

    def close(self) -> None:
        """Send what is left, for a few seconds at most, and end the thread."""
        self._leave.set()
        self._thread.join(timeout=2 * PATIENCE_S)

    def _talk(self) -> None:
        last = False
        while not last and not self._dead:
            last = self._leave.wait(EVERY_S)
            with self._lock:
                records = self._box.take()
            try:
                self._exchange(records)
            except Exception:  # the actor, its driver or its node is gone, or Ray was shut down here
                self._dead = True

    def _exchange(self, records: list[Record]) -> None:
        """One call and its answer; records that a broken connection may have lost are sent again."""
        answer, since = None, time.monotonic()
        while ray.is_initialized():
            try:
                answer = answer or self.handle.exchange.remote(records)
                if ray.get(answer, timeout=PATIENCE_S):
                    self._stopping.set()
                return
            except GetTimeoutError:
                pass
            except ActorUnavailableError:
                answer = None
                self._leave.wait(EVERY_S)
            if self._leave.is_set() and time.monotonic() - since > PATIENCE_S:
                return
        self._dead = True
