"""A channel between the driver of a run and its workers: records go to the driver, the request to stop to the workers.

The channel is an actor without CPUs on the driver's node. :class:`DriverChannel` is the driver's end,
:class:`WorkerChannel` the end of a worker. No result depends on the channel: if the driver dies, with its actor or with
its node, the channel closes and the run goes on. A driver that is started again opens another channel.
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

# So many training records are kept for a driver that does not read them; then the oldest are dropped. Records of other
# kinds are all kept.
MOST_LOGS = 2000
# Pause between two calls of a worker.
EVERY_S = 1.0
# A call has this long to be answered.
ANSWER_S = 2.0


def log_record(step: int, values: Mapping[str, float]) -> Record:
    """What the trainer logs at a step: losses, ``images_per_s``, ``step_s``, ``data_wait``, ``device_memory_mb``."""
    return {"kind": "log", "step": step, "values": dict(values)}


def val_record(step: int, metrics: Mapping[str, float]) -> Record:
    """A validation after ``step`` steps."""
    return {"kind": "val", "step": step, "metrics": dict(metrics)}


def checkpoint_record(step: int, place: object) -> Record:
    """A complete checkpoint of ``step`` steps, at ``place``."""
    return {"kind": "checkpoint", "step": step, "place": str(place)}


def start_record(step: int, world: int, nodes: int) -> Record:
    """Workers begin at ``step``. Every such record after the first means a restart."""
    return {"kind": "start", "step": step, "world": world, "nodes": nodes}


def left_record(step: int) -> Record:
    """Workers that were asked to stop leave with a checkpoint of ``step`` steps."""
    return {"kind": "left", "step": step}


def event_record(text: str) -> Record:
    """One sentence about an event: a skipped step, a wait for storage, another number of workers."""
    return {"kind": "event", "text": text}


class RecordQueue:
    """Records in order, with a limit for training records. For one thread at a time."""

    def __init__(self, most_logs: int = MOST_LOGS) -> None:
        self.most_logs, self.logs = most_logs, 0
        self.kept: deque[Record] = deque()

    def add(self, records: Iterable[Record]) -> None:
        """Append records; beyond the limit, the oldest training records are dropped."""
        for record in records:
            self.kept.append(record)
            self.logs += record.get("kind") == "log"
            if self.logs > self.most_logs:
                del self.kept[next(k for k, old in enumerate(self.kept) if old.get("kind") == "log")]
                self.logs -= 1

    def take(self) -> list[Record]:
        """Return all records and empty the queue."""
        taken = list(self.kept)
        self.kept.clear()
        self.logs = 0
        return taken


class _ChannelActor:
    """The actor between both ends. Every call is short."""

    def __init__(self) -> None:
        self.queue, self.stop_requested, self.exchanges = RecordQueue(), False, 0

    def exchange(self, records: list[Record]) -> bool:
        self.exchanges += 1
        self.queue.add(records)
        return self.stop_requested

    def take(self) -> tuple[list[Record], int]:
        return self.queue.take(), self.exchanges

    def request_stop(self, wanted: bool = True) -> None:
        self.stop_requested = wanted


class DriverChannel:
    """The driver's end of a channel.

    Attributes:
        actor: The actor, for the workers' :class:`WorkerChannel`.
        training: Whether :meth:`records` has seen that workers began to train.
        left: Whether :meth:`records` has seen that the workers left with a checkpoint, as they were asked to.
        last_call: When the last call of a worker was seen, by ``time.monotonic``.
    """

    def __init__(self, actor: ActorHandle) -> None:
        self.actor = actor
        self.training = self.left = False
        self.last_call = time.monotonic()
        self._exchanges = 0
        self._asked: Any = None
        self._closed = False

    @classmethod
    def open(cls) -> DriverChannel:
        """Start the actor on this node and return at once. The caller may be a driver, a job or a trial of Tune."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(_ChannelActor).options(
            num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here
        )
        return cls(actor.remote())

    def records(self) -> list[Record]:
        """The workers' records since the last call; none where the actor is slow or gone. Never raises."""
        if self._closed or not ray.is_initialized():
            return []
        try:
            # The next call waits for a slow answer. A second request would lose its records.
            self._asked = self._asked or self.actor.take.remote()
            found, exchanges = ray.get(self._asked, timeout=ANSWER_S)
        except GetTimeoutError:
            return []
        except Exception:  # an actor that died, a connection that ended
            self._asked = None
            return []
        self._asked = None
        if exchanges > self._exchanges:
            self._exchanges, self.last_call = exchanges, time.monotonic()
        self.training = self.training or any(record["kind"] == "start" for record in found)
        self.left = self.left or any(record["kind"] == "left" for record in found)
        return [record for record in found if record["kind"] != "left"]

    def request_stop(self) -> None:
        """Ask the workers to write a checkpoint and leave."""
        try:
            self.actor.request_stop.remote()
        except Exception:  # nobody left to ask
            return

    def withdraw_stop(self) -> None:
        """Withdraw the request, before workers are started again."""
        try:
            ray.get(self.actor.request_stop.remote(False), timeout=ANSWER_S)
        except Exception:  # nobody left to ask
            return

    def close(self) -> None:
        """End the actor. Workers that still call it go on without it."""
        if self._closed:
            return
        self._closed = True
        try:
            ray.kill(self.actor)
        except Exception:  # it is gone already
            return


class WorkerChannel:
    """A worker's end of a channel. Its own thread calls the actor, one call at a time, at most once a second.

    Args:
        actor: :attr:`DriverChannel.actor`.
    """

    def __init__(self, actor: ActorHandle) -> None:
        self.actor = actor
        self._queue, self._lock = RecordQueue(), threading.Lock()
        self._stop, self._closing, self._dead = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the actor answered so far."""
        return not self._dead

    def send(self, record: Record) -> None:
        """Put a record into the queue; returns at once, whatever happened to the driver."""
        if self._dead:
            return
        with self._lock:
            self._queue.add([record])

    def stop_requested(self) -> bool:
        """Whether the driver has asked the workers to stop."""
        return self._stop.is_set()

    def close(self) -> None:
        """Send the remaining records, for a few seconds at most, and end the thread."""
        self._closing.set()
        self._thread.join(timeout=2 * ANSWER_S)

    def _run(self) -> None:
        last = False
        while not last and not self._dead:
            last = self._closing.wait(EVERY_S)
            with self._lock:
                records = self._queue.take()
            try:
                self._exchange(records)
            except Exception:  # the actor, its driver or its node is gone, or Ray was shut down here
                self._dead = True

    def _exchange(self, records: list[Record]) -> None:
        """Make one call and wait for its answer. After a broken connection, the records are sent again."""
        answer, since = None, time.monotonic()
        while ray.is_initialized():
            try:
                answer = answer or self.actor.exchange.remote(records)
                if ray.get(answer, timeout=ANSWER_S):
                    self._stop.set()
                return
            except GetTimeoutError:
                pass
            except ActorUnavailableError:
                answer = None
                self._closing.wait(EVERY_S)
            if self._closing.is_set() and time.monotonic() - since > ANSWER_S:
                return
        self._dead = True
