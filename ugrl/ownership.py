"""Who may write to a folder: one owner at a time, on a disk or in a bucket, without locks and without a server.

Runs, the trials of a search and the search itself are owned by this one rule. Network mounts lack locks, and buckets
lack an exchange. What both have is files that are seen as soon as they are written. Lamport's bakery algorithm (CACM
17(8), 1974) needs no more: each who wants the folder writes a claim of its own to ``OUT/owner/``, takes a number above
all that it sees, and owns the folder if nobody alive owns it or has a smaller one. Of two who want it at the same
moment, one sees the other's number, or sees that it is being chosen, and waits.

An owner renews its claim. One that has not been renewed for :data:`STALE_S`, or whose process is gone from this very
machine, counts no more and is removed by the next owner. Who was cut off that long finds out before its next write
(:meth:`Ownership.check`): it renews and then looks for another owner, where a new owner marks itself as one and then
looks for an old one that has come back. So one of the two sees the other, and whoever does steps back. One that slept
while it waited takes a new number. Clocks must agree within half of :data:`STALE_S`, as they do with NTP.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ugrl import foreign
from ugrl.errors import BusyError, UgrlError
from ugrl.storage import Place, StorageError

FOLDER = "owner"
RENEW_S, STALE_S = 5.0, 30.0
POLL_S = 0.02
# All claims have one size: who reads an object asks for its size first, and would get half of a longer successor.
CLAIM_BYTES = 1024
_OURS: set[str] = set()  # claims of this process: a dead one's number may be ours by now


class LostError(UgrlError):
    """This process owned a folder, was cut off, and another one owns it now."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One who wants a folder.

    Attributes:
        id: Of the claim.
        host: Its machine.
        pid: Its process there.
        space: Its space of process numbers; containers of one host may share its name.
        time: When it was last renewed.
        number: Its place in the queue; 0 while it is being chosen.
        owner: Whether it has found that nobody is before it.
    """

    id: str
    host: str
    pid: int
    space: str
    time: float
    number: int = 0
    owner: bool = False

    def alive(self) -> bool:
        """Whether it still counts."""
        if time.time() - self.time > STALE_S:
            return False
        if self.host != socket.gethostname() or self.space != process_space():
            return True
        if self.pid == os.getpid():
            return self.id in _OURS
        try:  # on this machine there is no need to wait until it is stale
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, ValueError, OverflowError):
            return True
        return True

    def bytes(self) -> bytes:
        """As it is written."""
        return json.dumps(asdict(self)).encode().ljust(CLAIM_BYTES)


class Ownership:
    """A folder that this process owns, from :func:`own`."""

    def __init__(self, folder: Place, claim: Claim) -> None:
        self.folder, self.claim = folder, claim
        self._lost: str | None = None
        self._renewed = time.time()
        self._lock = threading.Lock()
        self._leave = threading.Event()

    @property
    def id(self) -> str:
        """Of the claim: what processes of other machines, which write for the owner, are told (:func:`fence`)."""
        return self.claim.id

    def check(self) -> None:
        """Called before a write.

        Raises:
            LostError: Another process owns the folder.
        """
        if self._lost is None and time.time() - self._renewed > STALE_S / 2:
            self._renew()
        if self._lost is not None:
            raise LostError(f"{self.folder.parent}: {self._lost}")

    def give_back(self) -> None:
        """Let the next one have it, where this process is about to end."""
        self._leave.set()
        (self.folder / f"{self.claim.id}.json").delete()

    def _renew(self) -> None:
        with self._lock:
            if self._lost is not None:
                return
            try:
                # A silence this long may have ended the claim: then it must not come back to life.
                if _late(self.claim) and not (self.folder / f"{self.claim.id}.json").exists():
                    self._lost = "another driver has taken it over"
                    return
                claim = replace(self.claim, time=time.time())
                _write(self.folder, claim)
                self.claim = claim
                if (other := _owner_but(claim.id, read_claims(self.folder))) is not None:
                    self._lost = f"another driver has taken it over ({_who(other)})"
                    (self.folder / f"{claim.id}.json").delete()
                self._renewed = claim.time
            except StorageError:
                return  # away for a moment; the run has its own patience for that

    def _keep(self) -> None:
        while not self._leave.wait(RENEW_S):
            self._renew()


@contextmanager
def own(out: Place, *, patience_s: float = 0.0) -> Iterator[Ownership]:
    """Own a folder.

    Args:
        out: The folder; it is made.
        patience_s: How long to wait for its owner to leave.

    Raises:
        BusyError: Another process owns it.
        StorageError: It cannot be written.
    """
    folder = out / FOLDER
    until = time.monotonic() + patience_s
    claim = Claim(uuid.uuid4().hex, socket.gethostname(), os.getpid(), process_space(), time.time())
    _OURS.add(claim.id)
    mine = folder / f"{claim.id}.json"
    keeper: threading.Thread | None = None
    try:
        claim = _join(folder, claim)
        while True:
            other = _before(folder, claim)
            if other is None:
                first = replace(claim, owner=True, time=time.time())
                _write(folder, first)
                claims = read_claims(folder)
                if not _late(claim) and _owner_but(claim.id, claims) is None:
                    claim = first
                    break
                claim = _join(folder, claim)  # this one may have been counted out, or an owner has come back
            # Who is before us without owning it yet will own it or leave in a moment.
            elif other.owner and time.monotonic() > until:
                raise BusyError(
                    f"{out}: another driver is running it ({_who(other)}); wait for it to end, or try again "
                    f"{STALE_S:g} s after it died"
                )
            else:
                time.sleep(POLL_S)
            if _late(claim):
                claim = _join(folder, claim)
            elif time.time() - claim.time > RENEW_S:
                claim = replace(claim, time=time.time())
                _write(folder, claim)
        for dead in claims:
            if not dead.alive():
                (folder / f"{dead.id}.json").delete()
        held = Ownership(folder, claim)
        keeper = threading.Thread(target=held._keep, name="owner", daemon=True)
        keeper.start()
        try:
            yield held
        finally:
            held._leave.set()
            keeper.join(timeout=RENEW_S)
    finally:
        _OURS.discard(claim.id)
        try:
            mine.delete()
        except StorageError:
            pass  # it goes stale


def owned(out: Place) -> bool:
    """Whether somebody alive owns a folder, or is about to."""
    return any(claim.alive() for claim in read_claims(out / FOLDER))


def _join(folder: Place, claim: Claim) -> Claim:
    """Take a number above all others; whoever takes one at the same time is seen as choosing."""
    _write(folder, replace(claim, number=0, owner=False, time=time.time()))
    numbers = [c.number for c in read_claims(folder)]
    claim = replace(claim, number=1 + max(numbers, default=0), owner=False, time=time.time())
    _write(folder, claim)
    return claim


def _late(claim: Claim) -> bool:
    """Whether others may soon count a claim out, or have done so."""
    return time.time() - claim.time > STALE_S / 2


def _before(folder: Place, claim: Claim) -> Claim | None:
    """One who is alive and before a claim; one that is still choosing may turn out to be, and counts as before."""
    others = [c for c in read_claims(folder) if c.id != claim.id and c.alive()]
    before = [c for c in others if c.owner or (c.number, c.id) < (claim.number, claim.id)]
    return max(before, key=lambda c: c.owner, default=None)


def _owner_but(id: str, claims: list[Claim]) -> Claim | None:
    return next((c for c in claims if c.owner and c.id != id and c.alive()), None)


def fence(out: Place, id: str, every_s: float = RENEW_S) -> Callable[[], None]:
    """A check for processes that write on an owner's behalf: it raises :class:`LostError` once it owns no more.

    Args:
        out: The folder.
        id: :attr:`Ownership.id`.
        every_s: Pause between two looks at the storage.
    """
    folder, looked = out / FOLDER, -every_s

    def check() -> None:
        nonlocal looked
        if time.monotonic() - looked < every_s:
            return
        try:
            other, there = _owner_but(id, read_claims(folder)), (folder / f"{id}.json").exists()
        except StorageError:
            return
        looked = time.monotonic()
        if other is not None:
            raise LostError(f"{out}: another driver has taken it over ({_who(other)})")
        if not there:
            raise LostError(f"{out}: its driver has given it up, or another one has taken it over")

    return check


def read_claims(folder: Place) -> list[Claim]:
    """The claims of a folder; what is no claim is passed over.

    Raises:
        StorageError: One may be there and cannot be read now.
    """
    found = []
    for name in folder.names():
        if name.endswith(".json") and not name.startswith("."):
            try:
                tree = foreign.parse_json((folder / name).read(), name)
                claim = Claim(**foreign.as_dict(tree, name))
            except (UgrlError, TypeError) as error:
                if isinstance(error, StorageError) and not error.lasting and (folder / name).exists():
                    raise
                continue  # deleted meanwhile, or not ours
            if claim.id == name.removesuffix(".json") and _typed(claim):
                found.append(claim)
    return found


def _typed(claim: Claim) -> bool:
    kinds: dict[str, Any] = {"host": str, "pid": int, "space": str, "time": int | float, "number": int}
    return all(isinstance(getattr(claim, name), kind) for name, kind in kinds.items())


def _write(folder: Place, claim: Claim) -> None:
    (folder / f"{claim.id}.json").write(claim.bytes())


def _who(claim: Claim) -> str:
    return f"process {claim.pid} on {claim.host}"


def process_space() -> str:
    """In which space of process numbers this process is: containers of one host may share its name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
