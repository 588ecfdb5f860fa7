"""One driver of a search: lets Ray Tune run what its ledger hands out, waits where there is no room, hears signals.

A search has two parts. The first spends the budget. The second, where ``final.best`` asks for it, is a study of its own
beside it; see :mod:`tuning.ledger.finals`.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from cluster.capacity import Capacity
from tuning.ledger.finals import FinalQueue, finals_planned, plan_finals
from tuning.ledger.ledger import Ledger
from tuning.ledger.processes import IDLE_S
from tuning.ledger.trial_queue import TrialQueue
from tuning.run.placement import Room, concurrent_trials, held
from tuning.space.search import Search
from tuning.study.lease import Lease, once
from tuning.study.store import retry_storage
from ugrl.errors import NoRoomError, UgrlError
from ugrl.hear import SIGNALS
from ugrl.ownership import FOLDER, own
from ugrl.storage import place
from ugrl.train import checkpoint
from ugrl.train.interrupt import Interrupted

# How long the end of a process that Tune has ended is waited for, in seconds.
SWEEP_S = 2.0


def _silent(_: str) -> None:
    return None


def run_search(search: Search, study: optuna.Study, have: Capacity, lease: Lease, **more: Any) -> Ledger:
    """Run what is left of a search's budget; returns when it is spent or the user interrupts.

    Args:
        search: The search.
        study: From :func:`tuning.study.study.open_study`.
        have: What the cluster has.
        lease: Says which trials this driver owns.
        **more: As of :func:`run`.

    Returns:
        The ledger; ``halted`` says why the search stopped early, if it did.
    """
    cpus, gpus = held(search, have)
    ledger = Ledger(TrialQueue(study, search, lease), cpus=cpus, gpus=gpus)
    run(ledger, have, **more)
    return ledger


def run_finals(
    search: Search, study: optuna.Study, finals: optuna.Study, have: Capacity, lease: Lease, **more: Any
) -> Ledger:
    """Run the best trials again with fresh seeds; as :func:`run_search`."""
    retry_storage(
        lambda: once(
            search.out,
            lambda check: plan_finals(search, study, finals, check),
            lambda: finals_planned(search, study, finals),
        ),
        search.base.data.storage_patience_s,
    )
    cpus, gpus = held(search, have)
    ledger = Ledger(FinalQueue(finals, search, lease, study), cpus=cpus, gpus=gpus)
    run(ledger, have, part="_final", **more)
    return ledger


def run(
    ledger: Ledger,
    have: Capacity,
    *,
    observers: Sequence[Any] = (),
    reuse: bool = True,
    patience_s: float = math.inf,
    say: Callable[[str], None] = _silent,
    part: str = "",
) -> None:
    """Let Ray Tune run what a ledger hands out.

    Args:
        ledger: Hands out this driver's trials.
        have: What the cluster has.
        observers: As :class:`tuning.run.tune_adapter.Observer`; one with an attribute ``ledger`` is given the ledger.
        reuse: Whether a process is used again for the next trial.
        patience_s: Of :func:`wait_for_work`.
        say: Told in one line what is waited for.
        part: What the names of the sessions end with.

    Raises:
        Interrupted: It was; trials that were running are still the ledger's.
        NoRoomError: A disk has been full for longer than its trials wait; they are in the queue again.
    """
    from tuning.run.tune_adapter import free_resources, run_session  # brings Ray, which the ledger does not need

    search, patience = ledger.search, ledger.search.base.data.storage_patience_s
    side_by_side = concurrent_trials(search, have)
    for each in observers:
        if hasattr(each, "ledger"):
            each.ledger = ledger
    ledger.processes.room = Room(search, have, free_resources)
    sessions = itertools.count(1)
    with _Stop(ledger, search.base.cluster.stop_s) as stop:
        while wait_for_work(ledger, patience_s=patience_s, say=say):
            name = f"session_{ledger.lease.id}_{next(sessions)}{part}"
            run_session(ledger, name, side_by_side=side_by_side, observers=observers, reuse=reuse)
    if ledger.full:
        retry_storage(ledger.leave, patience)
        raise NoRoomError(ledger.full)
    if stop.asked or ledger.jobs:  # Tune returns from an interrupt as if nothing had been
        raise Interrupted(0, stop.number)
    sweep_stopped(ledger)


def wait_for_work(ledger: Ledger, *, patience_s: float, say: Callable[[str], None]) -> bool:
    """Wait until this driver can begin a trial, or nothing is left that it might have to begin.

    Outside of Tune, which would hold processes, and hear no signal, while it waits.

    Args:
        ledger: Hands out this driver's trials.
        patience_s: How long room is waited for while no driver gets on with the search; ``inf`` for ever.
        say: Told in one line what is waited for.

    Returns:
        Whether there is something to begin.

    Raises:
        NoRoomError: It was not there by then.
    """
    told, since, patience = "", time.monotonic(), ledger.search.base.data.storage_patience_s
    while not ledger.closing:
        waiting, running = retry_storage(ledger.outlook, patience)
        if not waiting and not running:
            return False
        if waiting and ledger.processes.has_room():
            return True
        if not waiting:
            text, since = f"{running} trials run for other drivers; waiting for them to end", time.monotonic()
        else:
            text = f"{waiting} trials wait; no room for one now"
            if running:
                since = time.monotonic()
            elif time.monotonic() - since > patience_s:
                raise NoRoomError(
                    f"{text}, for {patience_s:g} s (cluster.busy_s): other work holds the cluster; continue with "
                    "--resume, or wait as long as it takes with --wait"
                )
            else:
                limit = "as long as it takes" if math.isinf(patience_s) else f"up to {patience_s:g} s (cluster.busy_s)"
                text += f"; waiting {limit}"
        if text != told:
            say(text)
            told = text
        time.sleep(IDLE_S)
    return False


class _Stop:
    """The first Ctrl-C or SIGTERM has trials write a checkpoint and go; the second, or ``cluster.stop_s``, ends them.

    Tune's own handler would end them at once. Tune still ends them where that is wanted, by the signal that it keeps
    for this. A third signal ends the driver.
    """

    def __init__(self, ledger: Ledger, patience_s: float) -> None:
        self.ledger = ledger
        self.number: int | None = None
        self._timer = threading.Timer(patience_s, self._end)
        self._timer.daemon = True
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until Tune listens: it would end this process
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            self._restore()
            self._end()
            return
        self.number = number
        self.ledger.ask_to_leave()
        self._timer.start()

    def _end(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


def sweep_stopped(ledger: Ledger) -> None:
    """Take away what the processes of trials that were stopped early left half-done.

    Tune ends a process that gets no other trial at once; it may own the run of the last one still, or write to it.
    """
    for trial in ledger.study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)):
        for run_folder in ledger.queue.folder(trial.number).glob("seed_*"):
            if any(run_folder.glob(f"{FOLDER}/*.json")) or any(run_folder.glob("checkpoints/.*")):
                try:
                    with own(place(run_folder), patience_s=SWEEP_S):
                        checkpoint.sweep(run_folder / "checkpoints")
                except (UgrlError, OSError):
                    continue  # the process of another driver, which comes here as well
