"""The loop's clock: how fast, how long a step, how much of it waiting for data, how much memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

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
            images: Of all workers together: the global batch.
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
