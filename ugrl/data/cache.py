"""Decoded images kept in memory, within a budget."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np

from ugrl.row import Row


@dataclass(frozen=True, slots=True)
class Decoded:
    """A row without its JPEG, and its pixels: uint8 (H, W, 3), never written to."""

    row: Row
    image_HW3: np.ndarray

    @property
    def bytes(self) -> int:
        """What keeping it costs."""
        return self.image_HW3.nbytes + len(self.row.mask or b"") + len(self.row.teacher or b"")


class PixelCache:
    """Decoded rows by id. What comes first stays: every row is seen once an epoch, in random order, so
    whatever was thrown out for another one would have been needed just as soon.

    Safe to use from any number of threads. A loader with a cache yields the same batches as one without.

    Args:
        megabytes: Budget, in 10⁶ bytes of pixels and mask files; never exceeded.
    """

    def __init__(self, megabytes: int) -> None:
        self.budget = megabytes * 1_000_000
        self.bytes = self.hits = self.misses = 0
        self._rows: dict[str, Decoded] = {}
        self._data = ""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def belong(self, data: str) -> None:
        """Say which data set (a fingerprint) the ids are of; rows of another one are dropped."""
        with self._lock:
            if data != self._data:
                self._rows, self.bytes, self._data = {}, 0, data

    def get(self, id: str) -> Decoded | None:
        """The row of that id, if it was kept."""
        with self._lock:
            found = self._rows.get(id)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
            return found

    def put(self, row: Row, image_HW3: np.ndarray) -> bool:
        """Keep a row if there is room for it; returns whether it is kept now."""
        entry = Decoded(replace(row, image=b""), image_HW3)
        with self._lock:
            if row.id in self._rows:
                return True
            if self.bytes + entry.bytes > self.budget:
                return False
            self._rows[row.id] = entry
            self.bytes += entry.bytes
            return True
