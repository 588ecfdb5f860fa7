"""Processes that want the same thing at the same moment."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

ROUNDS = 50
ONE_EACH = {k: 1 for k in range(ROUNDS)}
HANG_S = 300.0

Attempt = Callable[[int], AbstractContextManager[bool]]


def together(make: Callable[..., Attempt], *args: Any, starters: int = 4, method: str = "fork") -> dict[int, int]:
    """How many get it, round by round.

    Args:
        make: Called in each process; gives what tries to get the thing of a round, tells whether it did, and holds it
            until all have tried.
        *args: Of ``make``.
        starters: Processes.
        method: How they are started.
    """
    context: Any = multiprocessing.get_context(method)
    barrier, told = context.Barrier(starters), context.SimpleQueue()
    processes = [context.Process(target=_start, args=(make, args, barrier, told)) for _ in range(starters)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = []
    while not told.empty():
        found.append(told.get())
    assert not [text for text in found if isinstance(text, str)], found
    return {k: found.count(k) for k in range(ROUNDS)}


def _start(make: Callable[..., Attempt], args: tuple[Any, ...], barrier: Any, told: Any) -> None:
    try:
        attempt = make(*args)
        for k in range(ROUNDS):
            barrier.wait(HANG_S)
            with attempt(k) as mine:
                if mine:
                    told.put(k)
                barrier.wait(HANG_S)
    except BaseException as error:
        barrier.abort()
        told.put(f"{type(error).__name__}: {error}")
