"""Threads that end a driver which would wait for ever: for a cluster that is lost, or for workers that do not begin.

Ray has no deadline in either case.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.connect import answers
from ugrl.command import complain
from ugrl.errors import ClusterError
from ugrl.storage import StorageError

# Pause between two looks, and how long an answer may take.
LOOK_S = 5.0
# Workers that take longer than this to begin are reported.
BEGIN_S = 60.0


@contextmanager
def head_watched(patience_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """End the process when the cluster's head has not answered for a while.

    Without its head, a driver hangs in Ray, which ends it a minute later with messages of its own.

    Args:
        patience_s: How long the head may be silent.
        say: Gets one line when the head stops to answer, and one when it answers again.
    """
    import ray

    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")

    def watch(ended: threading.Event) -> None:
        since: float | None = None
        while not ended.wait(LOOK_S):
            if not answers(host.strip("[]"), int(port), LOOK_S):
                now = time.monotonic()
                if since is None:
                    since = now
                    say(f"the cluster's head at {address} does not answer; waiting up to {patience_s:g} s for it")
                elif now - since > patience_s:
                    leave(
                        f"the cluster was lost: its head at {address} has not answered for {patience_s:g} s "
                        "(cluster.head_s); continue with --resume on one that runs"
                    )
                continue
            if since is not None:
                since = None
                say("the cluster's head answers again")

    with beside(watch, "head"):
        yield


@contextmanager
def beside(look: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Run a function in a thread while the block runs.

    Args:
        look: Gets the event that is set when the block ends, and returns soon after.
        name: What the thread is called.
    """
    ended = threading.Event()
    thread = threading.Thread(target=look, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=LOOK_S)


def leave(text: str) -> None:
    """End the process from a thread, with one line: the main thread waits in Ray."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a live display has hidden the cursor
    complain(text)
    os._exit(ClusterError.status)


@contextmanager
def startup_watched(begun: Callable[[], bool], patience_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """End the process when the workers have not begun to train for a while.

    Ray Train waits for free resources (``cluster.start_timeout_s``), but without end for the worker processes. On a
    mount that hangs, a process never gets to its first line.

    Args:
        begun: Tells whether the workers have begun.
        patience_s: How long they may take.
        say: Gets one line when they take long.
    """

    def watch(ended: threading.Event) -> None:
        since, told = time.monotonic(), False
        while not ended.wait(min(LOOK_S, patience_s)):
            waited = time.monotonic() - since
            try:
                if begun():
                    return
            except StorageError:
                continue
            if waited > patience_s:
                leave(f"the cluster was lost: its workers have not begun for {patience_s:g} s; continue with --resume")
            if waited > BEGIN_S and not told:
                say(f"the workers have not begun for {BEGIN_S:g} s; waiting up to {patience_s:g} s for them")
                told = True

    with beside(watch, "begin"):
        yield
