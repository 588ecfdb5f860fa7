"""Ctrl-C and SIGTERM while a command begins or ends: one line, what it began is ended, and it leaves at once.

There is nothing to save then, and an exception would come up in the middle of somebody's import, which makes a
traceback or another error of it. A part of a command that has something to save sets handlers of its own
(:class:`ugrl.train.interrupt.StopRequest`); they fall back to these.

The modules of the commands import this one first, so that a signal is heard while they import the others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a command owns is given back before it leaves, but storage that is away must not keep it.
GIVE_BACK_S = 2.0
COMMANDS, MODULES = ("ugrl-train", "ugrl-tune"), (["-m", "cluster.cli"], ["-m", "tuning.cli"])
_word = "interrupted"
_owned: list[Callable[[], object]] = []


@contextmanager
def heard(word: str) -> Iterator[None]:
    """Leave at once on a signal while the block runs; in the main thread, the only one that Python lets hear.

    Args:
        word: The line that is said then.
    """
    global _word
    before, said = _listen(), _word
    _word = word
    try:
        yield
    finally:
        _word = said
        for number, handler in before.items():
            signal.signal(number, handler)


def say_then(word: str) -> None:
    """From now on, this is the line that is said."""
    global _word
    _word = word


def hear_again() -> None:
    """Set the handlers once more: Ray may put one of its own before them when it starts, which prints a stack."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def tell(word: str, first: str = "") -> None:
    """Say a line from within a handler: a print may have been interrupted, and cannot be entered twice.

    Args:
        word: The line.
        first: What a terminal gets before it.
    """
    with suppress(OSError):
        os.write(2, f"{first if os.isatty(2) else ''}{word}\n".encode())


@contextmanager
def owning(give_back: Callable[[], object]) -> Iterator[None]:
    """Something is owned while the block runs, and is given back by who leaves from within it."""
    _owned.append(give_back)
    try:
        yield
    finally:
        _owned.remove(give_back)


def leave(status: int) -> NoReturn:
    """End this process and all that it began, whatever its threads do."""
    if _owned:
        thread = threading.Thread(target=_give_back, daemon=True)  # the main one may hold a lock that this needs
        thread.start()
        thread.join(GIVE_BACK_S)
    end(descendants([os.getpid()]))
    os._exit(status)


def ended(status: int) -> int:
    """The status of a command; one that was interrupted leaves here, without the seconds that libraries tidy up for."""
    if IS_COMMAND and status > 128:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        leave(status)
    return status


def descendants(roots: Iterable[int]) -> list[int]:
    """Processes that some began, and theirs; parents come first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            with suppress(OSError, IndexError, ValueError), open(f"/proc/{name}/stat", encoding="utf-8") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = list(roots)
    first = len(found)
    for pid in found:
        found.extend(children.get(pid, ()))
    return found[first:]


def end(processes: Iterable[int]) -> None:
    """Kill processes."""
    for pid in processes:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _listen() -> dict[int, Any]:
    """Set the handlers; returns those from before. A signal that is ignored stays so, as under ``nohup``."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _leave)
    return before


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    for each in SIGNALS:  # whatever comes now, comes too late
        signal.signal(each, signal.SIG_IGN)
    tell(_word, "\x1b[?25h")  # a live display has hidden the cursor
    leave(128 + number)


def _give_back() -> None:
    for give_back in reversed(_owned):
        with suppress(Exception):
            give_back()


# A command that is being imported; who imports a command's module to use it keeps the own handlers.
IS_COMMAND = os.path.basename(sys.argv[0]) in COMMANDS or sys.orig_argv[1:3] in MODULES
if IS_COMMAND:
    _listen()
