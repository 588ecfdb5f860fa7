"""Checkpoints written while the training goes on.

The loop hands over a copy of its state and goes on; a thread writes it, marks the best ones, drops old ones and, where
a run lives on a remote storage, sends everything there. A storage that is away, or full, is tried again for a while:
the training goes on meanwhile, and only when time is up does it end, with what was last saved still whole. At most one
state is being written and one waits; a third makes the loop wait.
"""

from __future__ import annotations

import math
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ugrl.errors import AwayError, CheckpointError, UgrlError
from ugrl.eval.evaluate import EvalResult
from ugrl.ownership import LostError
from ugrl.storage import Place, lasting, place, retry
from ugrl.text import line
from ugrl.train import checkpoint
from ugrl.train.observer import Observer, nothing

Parts = dict[str, dict[str, Tensor]]
# Beside the checkpoints, what makes a run's folder; sent to a remote storage after each of them. The notes of trackers
# come before what they tell of. Of W&B's own files it is those that `wandb sync` reads: nothing else has them yet.
FILES = (
    *("config.yaml", "metrics.jsonl", "nonfinite.jsonl", "mlflow.json", "wandb.json", "weights.json"),
    *("tb/*", "seen/*", "wandb/offline-run-*/*.wandb"),
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state to be written.

    Attributes:
        step: Number of steps done.
        metrics: Metrics of the last validation.
        parts: Tensors by file name, on the host once ``ready`` has passed.
        ready: CUDA event after which the copies are complete; ``None`` on a CPU.
    """

    step: int
    metrics: dict[str, float]
    parts: Parts
    ready: Any = None


def snapshot(step: int, metrics: Mapping[str, float], parts: Mapping[str, Mapping[str, Tensor]]) -> Snapshot:
    """Copy a state to the host; a GPU's copies run behind its present work, and nobody waits for them here."""
    on_gpu = any(t.is_cuda for tensors in parts.values() for t in tensors.values())
    copies: Parts = {name: {k: _to_host(t) for k, t in tensors.items()} for name, tensors in parts.items()}
    ready = None
    if on_gpu:
        ready = torch.cuda.Event()
        ready.record()
    return Snapshot(step, dict(metrics), copies, ready)


def _to_host(x: Tensor) -> Tensor:
    x = x.detach()
    if not x.is_cuda:
        return x.clone(memory_format=torch.contiguous_format)
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


@dataclass(slots=True)
class Saved:
    """A checkpoint that is whole."""

    step: int
    place: Place
    metrics: dict[str, float]


@dataclass(slots=True)
class _Shared:
    """What the thread and the loop share; the thread holds no more, so that a forgotten writer ends."""

    folder: Path
    mirror: Place | None
    config: dict[str, Any]
    class_names: tuple[str, ...]
    data: str | None
    objective: str
    keep: int
    keep_best: int
    patience_s: float
    log: Callable[[str], None]
    jobs: queue.Queue[Snapshot | None] = field(default_factory=lambda: queue.Queue(maxsize=1))
    done: queue.Queue[Saved] = field(default_factory=queue.Queue)
    check: Callable[[], None] = nothing
    error: UgrlError | None = None
    last: int | None = None


class CheckpointWriter:
    """Writes checkpoints of one run, in order; used by rank 0 alone.

    Args:
        folder: The run's local folder.
        mirror: Where the run lives, if that is a remote storage.
        config: The configuration as a plain dict.
        class_names: Names of the foreground classes, in the order of their indices.
        data: Fingerprint of the splits that the run reads.
        objective: Metric that the best are chosen by, larger is better.
        keep: Latest checkpoints that are kept.
        keep_best: Best ones that are kept besides.
        patience_s: How long a storage that refuses is tried again.
        log: Told in one line that the storage is waited for, and that it is back.
        check: Called before each try; raises where the run is another driver's by now.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mirror: Place | None,
        config: dict[str, Any],
        class_names: tuple[str, ...],
        objective: str,
        keep: int,
        keep_best: int,
        patience_s: float,
        log: Callable[[str], None],
        data: str | None = None,
        check: Callable[[], None] = nothing,
    ) -> None:
        shared = folder, mirror, config, class_names, data, objective, keep, keep_best, patience_s, log
        self._s = _Shared(*shared, check=check)
        self._thread = threading.Thread(target=_work, args=(self._s,), name="ugrl-checkpoints", daemon=True)
        self._thread.start()
        weakref.finalize(self, _end, self._s.jobs)

    def submit(self, state: Snapshot) -> None:
        """Have a state written; waits only where one is being written and another waits already.

        Raises:
            CheckpointError: An earlier one could not be written.
            LostError: The run is another driver's.
        """
        self._raise()
        self._s.jobs.put(state)

    def poll(self) -> list[Saved]:
        """Checkpoints that became whole since the last call.

        Raises:
            CheckpointError: One could not be written.
            LostError: The run is another driver's.
        """
        self._raise()
        found = []
        while not self._s.done.empty():
            found.append(self._s.done.get())
        return found

    def flush(self) -> list[Saved]:
        """Wait for what was submitted; as :meth:`poll`."""
        self._s.jobs.join()
        return self.poll()

    def close(self) -> None:
        """Wait for what was submitted, and end the thread; raises nothing."""
        if self._thread.is_alive():
            self._s.jobs.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._s.error is not None:
            raise self._s.error


class CheckpointTimes(Observer):
    """Has a checkpoint saved after each validation and every so many steps.

    Args:
        save: Saves the present state; a second call at the same step does nothing.
        every: Steps between two checkpoints.
    """

    def __init__(self, save: Callable[[], None], every: int) -> None:
        self.save, self.every = save, every

    def on_eval(self, done: int, result: EvalResult) -> None:
        """A checkpoint with the new metrics."""
        self.save()

    def on_step_end(self, done: int) -> None:
        """A checkpoint where it is time."""
        if done % self.every == 0:
            self.save()


def _end(jobs: queue.Queue[Snapshot | None]) -> None:
    try:
        jobs.put_nowait(None)
    except queue.Full:
        pass


def _work(s: _Shared) -> None:
    while True:
        state = s.jobs.get()
        try:
            if state is None:
                return
            if s.error is None:
                _write(s, state)
        except LostError as error:
            s.error = error
        except Exception as error:  # whatever it was, the loop must hear of it
            last = "none was saved" if s.last is None else f"the last whole one is of step {s.last}"
            reason = line(error) or type(error).__name__
            s.error = CheckpointError(
                f"{s.mirror or s.folder}: the checkpoint of step {state.step if state else '?'} could not be written "
                f"({reason}); {last}: make room or bring the storage back, then --resume"
            )
            s.error.status = CheckpointError.status if lasting(error) else AwayError.status
        finally:
            s.jobs.task_done()


def _write(s: _Shared, state: Snapshot) -> None:
    if state.ready is not None:
        state.ready.synchronize()
    what = f"checkpoint of step {state.step}"

    def to_disk() -> Path:
        s.check()
        path = checkpoint.save(
            s.folder / "checkpoints",
            state.step,
            config=s.config,
            class_names=s.class_names,
            metrics=state.metrics,
            parts=state.parts,
            data=s.data,
        )
        _rank(s, path, state)
        checkpoint.prune(path.parent, s.keep)
        return path

    path = retry(what, to_disk, patience_s=s.patience_s, log=s.log)
    where = place(path)
    if s.mirror is not None:
        target = s.mirror

        def to_mirror() -> None:
            s.check()
            _send(s.folder, path, target)

        retry(what, to_mirror, patience_s=s.patience_s, log=s.log)
        where = target / "checkpoints" / path.name
    s.last = state.step
    s.done.put(Saved(state.step, where, state.metrics))


def _rank(s: _Shared, path: Path, state: Snapshot) -> None:
    """Note a checkpoint that was validated among the best ``keep_best``."""
    value = state.metrics.get(s.objective, math.nan)
    if s.keep_best == 0 or state.metrics.get("step") != state.step or not math.isfinite(value):
        return
    try:
        known = checkpoint.ranking(path.parent)
    except CheckpointError as error:
        s.log(f"{error}; the ranking begins anew")
        known = []
    known = [r for r in known if r.checkpoint != path.name and (path.parent / r.checkpoint).is_dir()]
    known.append(checkpoint.Ranked(path.name, value))
    # Of equals the earlier one: a later one has to be better to replace it.
    known = sorted(known, key=lambda r: -r.value)[: s.keep_best]
    tree = {"checkpoint": known[0].checkpoint, "objective": s.objective, "value": known[0].value}
    checkpoint.write_json(path.parent / checkpoint.BEST, {**tree, "ranking": [asdict(r) for r in known]})


def _send(folder: Path, path: Path, mirror: Place) -> None:
    """A checkpoint and everything beside it, to the storage; then drop there what was dropped here.

    The logs come first: a checkpoint that is whole is continued, and what was logged before it is never logged again.
    """
    there = mirror / "checkpoints"
    send_files(folder, mirror)
    (there / path.name).upload(path, last="state.json")
    mark = path.parent / checkpoint.BEST
    if mark.is_file():
        (there / checkpoint.BEST).write(mark.read_bytes())
    here = {p.name for p in path.parent.iterdir()}
    for name in there.names():
        if name.startswith(checkpoint.PREFIX) and name not in here:
            (there / name).delete()


def send_files(folder: Path, mirror: Place) -> None:
    """What a run's folder holds beside checkpoints, to the storage.

    Raises:
        StorageError: The storage does not accept the files.
    """
    for pattern in FILES:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                (mirror / file.relative_to(folder).as_posix()).write(file.read_bytes())
