"""How a driver leaves its workers: they are asked for a checkpoint, but nobody waits for who cannot answer."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ugrl.hear import hear_again
from ugrl.train.interrupt import Interrupted, StopRequest

if TYPE_CHECKING:
    from cluster.line import Line

T = TypeVar("T")
LOOK_S = 0.1
# Workers talk once a second, whatever they do; after so long without a word there are none that could save anything.
SILENT_S = 5.0


class Talk:
    """What the main thread knows of the one that works with Ray.

    Attributes:
        line: To the workers, once there is one.
        left_behind: Whether that thread still runs, in something that nobody waits for.
    """

    def __init__(self) -> None:
        self.line: Line | None = None
        self.left_behind = False


def aside(work: Callable[[], T]) -> T:
    """Do the work in a thread, and let signals be heard here while it runs: in Ray's own code none is."""
    made: list[T] = []
    done, raised = _begin(lambda: made.append(work()))
    while not done.wait(LOOK_S):
        hear_again()
    hear_again()
    if raised:
        raise raised[0]
    return made[0]


def patiently(work: Callable[[], object], stop: StopRequest, talk: Talk, say: Callable[[str], None]) -> None:
    """Do the work in a thread, so that the first Ctrl-C or SIGTERM can ask its workers to save and leave.

    Where no workers train, there is nothing to save: then it returns at once, and the thread is left behind.

    Raises:
        Interrupted: It was stopped.
        BaseException: Whatever the work raised.
    """
    done, raised = _begin(work)
    asked = 0.0
    while not done.wait(LOOK_S):
        if not stop.requested:
            hear_again()
            continue
        signal.alarm(0)  # Ray's handler, where it came before ours, ends the process after three seconds
        line = talk.line
        if not asked and line is not None and line.training:
            asked = time.monotonic()
            say("stopping after a checkpoint; once more to stop at once")
            line.stop()
        elif not asked or line is None or _gone(line, asked):
            talk.left_behind = True
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # the cursor, which a live table has hidden
            break
    if raised:
        raise raised[0]
    if talk.left_behind:
        raise Interrupted(0, stop.number)


def _gone(line: Line, asked: float) -> bool:
    """Whether no worker has anything left to save; Ray takes a second more to find that out, and to tidy up."""
    from cluster.launch import is_private

    return (line.left and is_private()) or time.monotonic() - max(asked, line.heard) > SILENT_S


def _begin(work: Callable[[], object]) -> tuple[threading.Event, list[BaseException]]:
    done = threading.Event()
    raised: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
        done.set()
        threading.Event().wait()  # for ever: Linux kills the processes of a private cluster when this thread ends

    threading.Thread(target=body, name="launch", daemon=True).start()
    return done, raised
