"""Ctrl-C and SIGTERM wait for the step to end, so that what is saved is a state the run really had."""

from __future__ import annotations

import signal
import threading
from collections import deque
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from ugrl.distributed import all_reduce_sum, world_size
from ugrl.hear import SIGNALS, tell

# Said at the first signal, where something is saved then.
STOPPING = "stopping after a checkpoint; once more to stop at once"


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and did.

    Attributes:
        step: Steps done, of which a checkpoint was written.
        number: The signal that asked, if one did.
    """

    def __init__(self, step: int, number: int | None = None) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.number = step, number


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts at once, as it would without this.

    A step moves the prototypes before it moves the weights: stopped in between, a resumed run would add
    the same votes twice. Outside of the main thread, where Python allows no handlers, it does nothing.

    Args:
        word: The line that is said at the first signal: a step, or what it saves, may take a while.
    """

    def __init__(self, word: str = "") -> None:
        self.word, self.requested = word, False
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested, self.number = True, number
        self._restore()
        if self.word:
            tell(self.word, "\n")  # below a bar, which is drawn again

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Agreement:
    """Ranks stop after the same step, or one of them waits for ever in a collective.

    On a GPU the answer is read a few steps after it was asked for, when it has long been there: asking must not make
    the host wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lag = 4 if device.type == "cuda" else 0
        self._asked: deque[tuple[Tensor, Any]] = deque()

    def stop(self, wanted: bool) -> bool:
        """Whether some rank wanted to stop; called by every rank after every step."""
        if world_size() == 1:
            return wanted
        votes = all_reduce_sum(torch.full((), float(wanted), device=self.device))
        if self.lag == 0:
            return bool(votes > 0)
        answer = torch.empty((), pin_memory=True).copy_(votes, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._asked.append((answer, event))
        if len(self._asked) <= self.lag:
            return False
        answer, event = self._asked.popleft()
        event.synchronize()
        return bool(answer > 0)
