"""What is asked of a loader: one object from the trainer to the tasks that read. It needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ugrl.config import DataConfig
from ugrl.storage import Place

OnDevice = Literal["none", "normalize", "augment"]


# What is said where a teacher mask is missing, after the place.
NEEDS_TEACHER = "method.pseudo.source needs one for every training image: ugrl prepare … --teacher DIR"


def silent(_: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """One rank's batches of the steps ``start_step … total_steps - 1``.

    Attributes:
        shards: The prepared folder, a path or a URI.
        split: Split that is trained on.
        num_classes: F, the foreground classes.
        data: The section ``data`` of the run: how samples are cut, and with which threads and caches they are loaded.
        seed: Seed of the run, from which order and cuts are drawn.
        global_batch: Rows of all ranks at a step.
        rank: Rank whose batches are wanted, from 0.
        world: Number of ranks, among which each global batch is divided.
        start_step: First step, counted from 0 over the whole run.
        total_steps: Of the run; a local loader goes on without end.
        pin_memory: Whether images lie in page-locked memory, for copies that overlap with a GPU's work.
        stall_s: Seconds that a step waits for its batch, where threads make it.
        say: Told in one line what is waited for.
        masks_every: Steps n, 2n, … (counted from 1) have masks where the rows do; 0 leaves them out.
        teacher: Whether every step has teacher masks, which all rows then need.
    """

    shards: str | Path | Place
    split: str
    num_classes: int
    seed: int
    global_batch: int
    data: DataConfig = DataConfig()
    rank: int = 0
    world: int = 1
    start_step: int = 0
    total_steps: int = 0
    pin_memory: bool = False
    masks_every: int = 1
    stall_s: float = 600.0
    say: Callable[[str], None] = silent
    teacher: bool = False

    @property
    def local_batch(self) -> int:
        """Rows of this rank at a step."""
        return self.global_batch // self.world

    @property
    def on_device(self) -> OnDevice:
        """What is left to the device: with ``auto`` a GPU, for which memory is pinned, gets 8-bit pixels.

        A quarter of the bytes is enough for a GPU; a CPU gains nothing.
        """
        if self.data.on_device == "auto":
            return "normalize" if self.pin_memory else "none"
        return self.data.on_device
