"""The loop's clock: how fast, how long a step, how much of it waiting for data, how much memory, how long still."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ugrl.distributed import mean_over_ranks
from ugrl.types import StepOutput

STATM = Path("/proc/self/statm")


class Meter:
    """Wall-clock times of the training loop since the last :meth:`values`, of this process alone.

    It never waits for the device. The loop reads losses before it asks for values, so the device has done by then what
    was counted.

    Args:
        device: Whose memory counts; of a CPU, the memory of the process.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._restart()

    def _restart(self) -> None:
        self._since, self._waited, self._paused = time.perf_counter(), 0.0, 0.0
        self._steps, self._images = 0, 0

    @contextmanager
    def data(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training: validations. Not inside of :meth:`data`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def step(self, images: int) -> None:
        """A step has ended.

        Args:
            images: Images of all workers together: the global batch.
        """
        self._steps += 1
        self._images += images

    def values(self) -> dict[str, float]:
        """What was measured since the last call; begins anew.

        Returns:
            ``images_per_s`` (all workers' images by this worker's clock), ``step_s`` (mean seconds a step),
            ``data_wait`` (share of the time, 0 … 1) and ``device_memory_mb`` (2**20 bytes: the most that tensors
            took on a CUDA device, the process's resident memory now on a CPU, absent where neither can be told).
            Before the first step only the memory.
        """
        seconds = time.perf_counter() - self._since - self._paused
        found: dict[str, float] = {}
        if self._steps and seconds > 0:
            found["images_per_s"] = self._images / seconds
            found["step_s"] = seconds / self._steps
            found["data_wait"] = min(1.0, self._waited / seconds)
        memory = self._memory()
        if memory is not None:
            found["device_memory_mb"] = memory / 2**20
        self._restart()
        return found

    def _memory(self) -> int | None:
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return most
        if self.device.type == "cpu" and STATM.is_file():
            return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return None


class LogWindow:
    """Losses and statistics of the steps since the last line of the log.

    Args:
        device: Device of the losses and statistics.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._steps: list[dict[str, Tensor]] = []
        self._taken: list[bool] = []

    def add(self, out: StepOutput) -> None:
        """A step has been made."""
        self._steps.append({**out.terms, **{f"stat/{k}": v for k, v in out.stats.items()}})

    def judge(self, verdicts: Sequence[bool]) -> None:
        """Whether the next steps were taken; the others do not count."""
        self._taken += verdicts

    def means(self, local: Mapping[str, float]) -> dict[str, float]:
        """Mean of each named value over the steps that have it, over ranks; one transfer. Begins anew.

        Args:
            local: Further values of this rank.
        """
        window = [values for values, taken in zip(self._steps, self._taken, strict=True) if taken]
        self._steps, self._taken = [], []
        names = sorted({k for values in window for k in values})
        means = [torch.stack([values[k].double() for values in window if k in values]).mean() for k in names]
        more = torch.tensor(list(local.values()), dtype=torch.float64).to(self.device, non_blocking=True)
        found = mean_over_ranks(torch.cat([torch.stack(means), more]) if means else more).tolist()
        return dict(zip([*names, *local], found, strict=True))


class Pace:
    """How long a run still takes. A step of the warm-up costs a fraction of a later one, and validations cost theirs.

    Args:
        total: Steps of the run.
        warmup: Steps of the classification warm-up.
        eval_every: Steps between two validations.
    """

    # The first step of a kind also pays for what is made once; these are few enough to wait for, and enough to tell.
    LEAST = 4

    def __init__(self, total: int, warmup: int, eval_every: int) -> None:
        self.total, self.warmup, self.eval_every = total, warmup, eval_every
        self._steps: dict[bool, list[float]] = {True: [], False: []}
        self._validation: float | None = None
        self._since: float | None = None
        self._told: set[bool] = set()

    def step(self, done: int, seconds: float | None = None) -> None:
        """A step has ended, that many are done; ``seconds`` since the last call by default."""
        now = time.perf_counter()
        if seconds is None and self._since is not None:
            seconds = now - self._since
        self._since = now
        if seconds is not None:
            kind = self._steps[done <= self.warmup]
            kind.append(seconds)
            del kind[1:-50]  # the first one, and the newest

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Around a validation."""
        start = time.perf_counter()
        yield
        self._since = time.perf_counter()
        self._validation = self._since - start

    def step_s(self, warm: bool) -> float | None:
        """Mean seconds of a step in the warm-up or after it, or of the other kind where that is all there is."""
        found = self._steps[warm] or self._steps[not warm]
        kept = found[1:] or found
        return sum(kept) / len(kept) if kept else None

    def left(self, done: int) -> float | None:
        """Seconds still to go after so many steps, as far as one knows."""
        warm_s, full_s = self.step_s(True), self.step_s(False)
        if warm_s is None or full_s is None:
            return None
        warm = max(0, min(self.warmup, self.total) - done)
        validations = -(-self.total // self.eval_every) - done // self.eval_every
        return warm * warm_s + (self.total - done - warm) * full_s + validations * (self._validation or 0.0)

    def news(self, done: int) -> bool:
        """Whether this step is the one after which a kind of step is known well enough to tell."""
        kind = done <= self.warmup
        if kind in self._told or len(self._steps[kind]) <= self.LEAST or done == self.total:
            return False
        self._told.add(kind)
        return True
