"""Signals while Ray works: the first one asks the workers for a checkpoint, and nobody waits for workers that are gone.

Ray's own code does not let the main thread hear a signal. So Ray works in a second thread.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ugrl.hear import hear_again
from ugrl.train.interrupt import STOPPING, Interrupted, StopRequest

if TYPE_CHECKING:
    from cluster.channel import DriverChannel

T = TypeVar("T")
# Pause between two looks.
LOOK_S = 0.1
# Workers call once a second, whatever they do. After so long without a call, none is left that could save anything.
SILENT_S = 5.0


@dataclass(slots=True)
class RayWork:
    """What the main thread knows of the thread that works with Ray.

    Attributes:
        channel: The channel to the workers, when it is open.
        abandoned: Whether that thread still runs, in a call that nobody waits for.
    """

    channel: DriverChannel | None = None
    abandoned: bool = False


def run_in_thread(work: Callable[[], T]) -> T:
    """Do the work in a second thread, and let this one hear signals meanwhile."""
    made: list[T] = []
    done, raised = _start(lambda: made.append(work()))
    while not done.wait(LOOK_S):
        hear_again()
    hear_again()
    if raised:
        raise raised[0]
    return made[0]


def run_stoppable(work: Callable[[], object], stop: StopRequest, state: RayWork, say: Callable[[str], None]) -> None:
    """Do the work in a second thread. The first Ctrl-C or SIGTERM asks its workers to save and leave.

    Where no workers train, there is nothing to save: this returns at once, and the thread is abandoned.

    Args:
        work: Starts workers, and sets ``state.channel``.
        stop: Tells whether a signal came.
        state: Shared with ``work``.
        say: Gets one line when the workers are asked.

    Raises:
        Interrupted: A signal came.
        BaseException: Whatever the work raised.
    """
    done, raised = _start(work)
    asked = 0.0
    while not done.wait(LOOK_S):
        if not stop.requested:
            hear_again()
            continue
        signal.alarm(0)  # Ray's handler, where it came before ours, ends the process after three seconds
        channel = state.channel
        if not asked and channel is not None and channel.training:
            asked = time.monotonic()
            say(STOPPING)
            channel.request_stop()
        elif not asked or channel is None or _gone(channel, asked):
            state.abandoned = True
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # a live display has hidden the cursor
            break
    if raised:
        raise raised[0]
    if state.abandoned:
        raise Interrupted(0, stop.number)


def _gone(channel: DriverChannel, asked: float) -> bool:
    """Whether no worker has anything left to save. Ray needs a second more to find that out and to clean up."""
    from cluster.ray_internals import is_private

    return (channel.left and is_private()) or time.monotonic() - max(asked, channel.last_call) > SILENT_S


def _start(work: Callable[[], object]) -> tuple[threading.Event, list[BaseException]]:
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
