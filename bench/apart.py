"""A side of a comparison in a process of its own.

Two sides in one process share the C library's heap, and what one leaves there decides how many fresh pages the other
has to be given: half of the time of a side with large maps. Apart, each pays what it pays alone.
"""

from __future__ import annotations

import multiprocessing as mp
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from bench.memory import LiveBytes


class Remote:
    """A call that happens elsewhere; each process serves one side, from the ``with`` statement's begin to its end.

    Args:
        make: A module's function; called in the process, it returns what to measure.
        args: Its arguments, to be pickled.
        threads: Inside an operator.

    Raises:
        RuntimeError: From any method, with the process's traceback, where a call failed there.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *args: Any, threads: int) -> None:
        self.make, self.args, self.threads = make, args, threads

    def __enter__(self) -> Remote:
        # A server that has imported what all need, and computed nothing, forks the processes: that is quick.
        server = mp.get_context("forkserver")
        server.set_forkserver_preload(["bench.memory", "ugrl.train.step"])
        self.pipe, theirs = server.Pipe()
        self.process = server.Process(target=_serve, args=(theirs, self.make, self.args, self.threads), daemon=True)
        self.process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def __call__(self) -> object:
        """One call; what it returned, pickled."""
        return self._ask("call")

    def seconds(self, repeats: int) -> float:
        """Time of so many calls: process time with one thread, else wall time."""
        return cast(float, self._ask("seconds", repeats))

    def peak(self) -> tuple[int, object]:
        """Peak of live bytes during a call, and what it returned."""
        return cast(tuple[int, object], self._ask("peak"))

    def _ask(self, *words: Any) -> object:
        try:
            self.pipe.send(words)
            good, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(f"a side's process ended with exit code {self.process.exitcode}") from None
        if not good:
            raise RuntimeError(f"a side failed in its process:\n{answer}")
        return answer


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], args: tuple, threads: int) -> None:
    torch.set_num_threads(threads)
    now = time.process_time if threads == 1 else time.perf_counter
    step: Callable[[], object] | None = None
    while True:
        try:
            word, *more = pipe.recv()
        except EOFError:
            return
        try:
            step = step or make(*args)
            answer: object
            if word == "seconds":
                start = now()
                for _ in range(more[0]):
                    step()
                answer = now() - start
            elif word == "peak":
                with LiveBytes() as book:
                    result = step()
                answer = book.peak, result
            else:
                answer = step()
            pipe.send((True, answer))
        except Exception:  # whatever it is, the other process reports it
            pipe.send((False, traceback.format_exc()))
