"""Blows that drivers, their processes, disks and buckets get, and what to look for afterwards."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.raycluster import Head, kill_raylet
from ugrl.errors import ClusterError, NoRoomError
from ugrl.storage import Place
from ugrl.text import line

ROOT = Path(__file__).parents[1]
MARK = "UGRL_CAMPAIGN"
# In a story's folder: a file of the time when it began.
MADE = "made"
SIGNALS = {
    "KILL": [signal.SIGKILL],
    "TERM": [signal.SIGTERM],
    "INT": [signal.SIGINT],
    "INT twice": [signal.SIGINT, signal.SIGINT],
}
# How a driver may end then; by the signal itself where it came before the program listens.
STATUSES = {"KILL": {-9}, "TERM": {143, -15}, "INT": {130, -2}, "INT twice": {130, -2}}
# How processes of Ray are called that train.
TRAINS = ("ray::ImplicitFunc", "ray::trial", "RayTrainWorker")
# How a driver may end by a full disk: it is no bad input.
FULL = (NoRoomError.status,)
SOON_S, END_S, FINISH_S = 10.0, 120.0, 900.0

Act = Callable[["Stage", random.Random], bool]


@dataclass
class Result:
    """What happened in a story.

    Attributes:
        story: Its name.
        seed: Of the campaign.
        planned: Blows.
        kills: Kind → how many were dealt.
        rounds: How often it was played, each time in a new folder.
        seconds: In all.
        end_s: Longest time from a signal (but SIGKILL), or from the end of the cluster's head, to the driver's end, by
            kind.
        idle_s: Longest time without a step of any training between two blows, start-up excluded.
        differs: Largest relative difference of a loss from the undisturbed run's.
        checked: What was found to hold, in each round.
        faults: What was not.
        notes: What is worth knowing.
        skipped: Why it could not be played.
    """

    story: str
    seed: int
    planned: int
    kills: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0
    end_s: dict[str, float] = field(default_factory=dict)
    idle_s: float = 0.0
    differs: float = 0.0
    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""

    def check(self, what: str, test: Callable[[], object]) -> None:
        """Note whether something holds."""
        try:
            test()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.faults.append(f"{what}: {type(error).__name__} {line(error)} ({where.line})")
        else:
            self.checked += [what] if what not in self.checked else []


@dataclass
class Stage:
    """A story in one folder.

    Attributes:
        home: The folder; its name is short, since sockets lie in it.
        words: Of the driver's command.
        progress: Changes whenever a training gets on.
        check: Looks at what it left, once it has ended.
        drivers: How many at a time.
        acts: Blows beside signals.
        signals: Those of :data:`SIGNALS` that it gets.
        address: Of a cluster apart from the drivers.
        running: The drivers.
        excused: Those that lived through a blow that a driver may end by, and the statuses that it may end with then;
            none for any.
        took: As ``Result.end_s``, of acts that drivers end by.
    """

    home: Path
    words: list[str]
    progress: Callable[[], object]
    check: Callable[[Result], None]
    drivers: int = 1
    acts: Mapping[str, Act] = field(default_factory=dict)
    address: str = ""
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    excused: dict[int, set[int]] = field(default_factory=dict)
    signals: Sequence[str] = tuple(SIGNALS)
    took: dict[str, float] = field(default_factory=dict)

    def excuse(self, *statuses: int) -> None:
        """What happens now, any driver may end by."""
        self.excused |= {k: set(statuses) for k in range(self.drivers)}

    def excuses(self, k: int, status: int) -> bool:
        """Whether a driver may have ended like that."""
        return k in self.excused and (not self.excused[k] or status in self.excused[k])

    def start(self, k: int) -> subprocess.Popen[bytes]:
        """A driver, by the same command as ever."""
        with (self.home / f"driver-{k}.log").open("ab") as log:
            return subprocess.Popen(self.words, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

    def said(self, k: int) -> str:
        """The last line of a driver."""
        lines = (self.home / f"driver-{k}.log").read_text(errors="replace").split("\n")
        return line(next((s for s in reversed(lines) if s.strip()), ""), most=300)


class Pulse:
    """Looks for the longest time without progress between two blows."""

    def __init__(self, progress: Callable[[], object]) -> None:
        self.progress, self.longest = progress, 0.0
        self._armed, self._leave = False, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def blow(self) -> None:
        """What follows counts from the next progress."""
        self._armed = False

    def close(self) -> float:
        """The longest time, in seconds."""
        self._leave.set()
        self._thread.join()
        return self.longest

    def _look(self) -> None:
        last, since = self.progress(), time.monotonic()
        while not self._leave.wait(0.5):
            now = self.progress()
            if now != last:
                if self._armed:
                    self.longest = max(self.longest, time.monotonic() - since)
                last, since, self._armed = now, time.monotonic(), True


# -- processes, files -------------------------------------------------------------------------------------


def ours(home: Path) -> list[psutil.Process]:
    """Processes that a story has started: by the mark in their environment, or by a file of its folder that they hold.

    Ray writes the names of its workers over their environment. What merely holds a file is a story's only if it runs
    the interpreter or a program of Ray, and has begun after the folder was made: neither a shell or a pager that looks
    at a log, nor anything that this process descends from.
    """
    found = []
    since = (home / MADE).stat().st_mtime
    above = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            if process.pid in above or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == str(home) or (
                process.create_time() >= since - 1 and _of_ray(process) and _holds(process, home)
            ):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _of_ray(process: psutil.Process) -> bool:
    exe = process.exe().removesuffix(" (deleted)")
    return exe == os.path.realpath(sys.executable) or "/ray/" in exe


def _holds(process: psutil.Process, home: Path) -> bool:
    return any(os.readlink(fd).startswith(f"{home}/") for fd in Path(f"/proc/{process.pid}/fd").iterdir())


def training(home: Path) -> list[psutil.Process]:
    """Those that train for a driver."""
    return [p for p in ours(home) if any(word in called(p) for word in TRAINS)]


def called(process: psutil.Process) -> str:
    """Its command, or what Ray has put in its place."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def no_more(found: Callable[[], list[Any]], patience_s: float = 60.0) -> None:
    """Wait until there are none, or say which there are."""
    until = time.monotonic() + patience_s
    while left := found():
        if time.monotonic() > until:
            raise AssertionError(f"{len(left)} left: {left[:4]}")
        time.sleep(0.5)


def shared_memory(before: set[str]) -> list[str]:
    """New files in /dev/shm that no process holds."""
    new = set(os.listdir("/dev/shm")) - before
    for process in psutil.process_iter() if new else ():
        with suppress(OSError):
            text = Path(f"/proc/{process.pid}/maps").read_text()
            links = [os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
            new -= {n for n in new if f"/dev/shm/{n}" in text or f"/dev/shm/{n}" in links}
    return sorted(new)


def files(out: Place) -> list[str]:
    """All files of a folder, on a disk or in a bucket."""
    from pyarrow import fs

    found, path = out.filesystem()
    return [
        info.path for info in found.get_file_info(fs.FileSelector(path, recursive=True)) if info.type.name == "File"
    ]


def drafts(out: Place) -> list[str]:
    """Drafts and locks in a folder."""
    ends = (".tmp", ".old", ".lock", ".partial")
    return [f for f in files(out) if any(part.endswith(ends) for part in f.split("/"))]


def grown(out: Path) -> int:
    """Bytes of all training logs."""
    return sum(p.stat().st_size for p in out.rglob("metrics.jsonl"))


def groups_left(address: str) -> list[str]:
    """Placement groups of a cluster."""
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)\n"
    code += "from ray.util import placement_group_table as t\n"
    code += "print('FOUND', *[k for k, g in t().items() if g['state'] != 'REMOVED'])"
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=300)
    (found,) = [s for s in done.stdout.splitlines() if s.startswith("FOUND")]
    return found.split()[1:]


# -- blows ------------------------------------------------------------------------------------------------


def strike(stage: Stage, kind: str, dice: random.Random, result: Result) -> bool:
    """Signal one driver, see it end in time, and start it again."""
    k = dice.randrange(len(stage.running))
    driver, began = stage.running[k], time.monotonic()
    if driver.poll() is not None:
        return False
    for i, number in enumerate(SIGNALS[kind]):
        time.sleep(dice.uniform(0.05, 1.5) if i else 0)
        driver.send_signal(number)
    try:
        status = driver.wait(END_S)
    except subprocess.TimeoutExpired:
        result.faults.append(f"driver {k}: still there {END_S:g} s after {kind}")
        driver.kill()
        status = driver.wait()
    else:
        took = round(time.monotonic() - began, 1)
        if kind != "KILL" and status != 0:  # it may have been about to end by itself
            result.end_s[kind] = max(result.end_s.get(kind, 0.0), took)
        if kind != "KILL" and took > SOON_S:
            result.notes.append(f"driver {k}: status {status} {took:g} s after {kind}: {stage.said(k)}")
        if status not in STATUSES[kind] | {0}:
            text = f"driver {k}: status {status} after {kind}: {stage.said(k)}"
            (result.notes if stage.excuses(k, status) else result.faults).append(text)
    if status != 0:
        time.sleep(dice.uniform(0, 2))
        stage.running[k] = stage.start(k)
        stage.excused.pop(k, None)
    return True


def kill_training(stage: Stage, dice: random.Random) -> bool:
    """A process that trains dies."""
    until = time.monotonic() + 30
    while not (found := training(stage.home)):
        if time.monotonic() > until or any(d.poll() is not None for d in stage.running):
            return False
        time.sleep(0.1)
    with suppress(psutil.Error):  # which looks whether the number is another process's by now
        dice.choice(found).kill()
    return True


def kill_node(made: Any, stage: Stage, dice: random.Random) -> bool:
    """A raylet dies with all that ran on it, and another node joins."""
    kill_raylet(made.nodes.pop(dice.randrange(len(made.nodes))))
    stage.excuse()
    time.sleep(dice.uniform(0, 3))
    made.nodes.append(made.add_node(num_cpus=1, object_store_memory=100 * 2**20))
    return True


def lose_head(head: Head, stage: Stage, dice: random.Random) -> bool:
    """The head of the cluster dies with its raylet; drivers say so and leave in time, and another head begins."""
    until = time.monotonic() + 60
    while not training(stage.home):  # a driver that still looks for its cluster finds none, which is another matter
        if time.monotonic() > until or any(d.poll() is not None for d in stage.running):
            return False
        time.sleep(0.1)
    began = time.monotonic()
    head.kill("gcs_server", "raylet")
    for k, driver in enumerate(stage.running):
        try:
            status = driver.wait(END_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"driver {k}: still there {END_S:g} s after its head died: {stage.said(k)}") from None
        if status != 0:  # it may have been about to end by itself
            said = stage.said(k)
            assert status == ClusterError.status and "--resume" in said, f"driver {k}: status {status}: {said}"
            stage.took["head"] = max(stage.took.get("head", 0.0), round(time.monotonic() - began, 1))
    time.sleep(dice.uniform(0, 3))
    head.kill()
    head.start()
    stage.running = [d if d.poll() == 0 else stage.start(k) for k, d in enumerate(stage.running)]
    return True


def fill_disk(disk: Path | None, stage: Stage, dice: random.Random) -> bool:
    """The disk is full for some seconds, or, where none can be mounted, no file of the driver's may grow."""
    stage.excuse(*(FULL if disk is not None else ()))
    seconds = dice.uniform(1, 8)
    if disk is not None:
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * 2**16):
                pass
        time.sleep(seconds)
        filler.unlink()
        return True
    try:
        pid = stage.running[0].pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
        time.sleep(seconds)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    except ProcessLookupError:
        pass
    return True


def leave_bucket(server: Any, stage: Stage, dice: random.Random) -> bool:
    """The bucket neither answers nor refuses for some seconds."""
    stage.excuse()
    server.pause(dice.uniform(1, 10)).join()
    return True


# -- a story's course --------------------------------------------------------------------------------------


def tend(stage: Stage, result: Result) -> None:
    """Start drivers again that ended without being asked; a fault, unless a blow may have had that effect."""
    for k, driver in enumerate(stage.running):
        if (status := driver.poll()) not in (None, 0):
            text = f"driver {k} ended with status {status}: {stage.said(k)}"
            (result.notes if stage.excuses(k, status) else result.faults).append(text)
            stage.running[k] = stage.start(k)
            stage.excused.pop(k, None)


def over(stage: Stage) -> bool:
    """Whether some driver has found that nothing is left to do."""
    return any(d.poll() == 0 for d in stage.running)


def moment(stage: Stage, dice: random.Random) -> None:
    """Mostly while something trains, else at any time since the last blow."""
    until, seen = time.monotonic() + 60, stage.progress()
    if dice.random() < 0.7:
        while stage.progress() == seen and time.monotonic() < until and all(d.poll() is None for d in stage.running):
            time.sleep(0.2)
    until = time.monotonic() + dice.uniform(0, 4)
    while time.monotonic() < until and not over(stage):
        time.sleep(0.05)


def torment(stage: Stage, kinds: Iterator[str], dice: random.Random, result: Result) -> None:
    """Deal blows until they are spent or the story has ended; then let it end."""
    stage.running = [stage.start(k) for k in range(stage.drivers)]
    pulse = Pulse(stage.progress)
    try:
        while sum(result.kills.values()) < result.planned and len(result.faults) < 5:
            moment(stage, dice)
            tend(stage, result)
            if over(stage):
                break
            kind = next(kinds)
            pulse.blow()
            if strike(stage, kind, dice, result) if kind in SIGNALS else stage.acts[kind](stage, dice):
                result.kills[kind] = result.kills.get(kind, 0) + 1
                result.end_s |= {k: max(s, result.end_s.get(k, 0.0)) for k, s in stage.took.items()}
        until = time.monotonic() + FINISH_S
        while any(d.poll() != 0 for d in stage.running):
            assert time.monotonic() < until, f"has not ended {FINISH_S:g} s after the last blow"
            tend(stage, result)
            assert len(result.faults) < 5, "is given up"
            time.sleep(0.2)
        if stage.address:
            result.check("no placement group", lambda: no_more(lambda: groups_left(stage.address)))
            result.check("no process still at work on the cluster", lambda: no_more(lambda: training(stage.home)))
        stage.check(result)
        for log in stage.home.glob("driver-*.log"):
            _, trace, text = log.read_text(errors="replace").partition("Traceback (most recent call last)")
            if trace:
                result.notes.append(f"{log.name} has a traceback: {line(text, most=1500)}")
    except AssertionError as error:
        result.faults.append(str(error))
    finally:
        result.idle_s = max(result.idle_s, round(pulse.close(), 1))
        for driver in stage.running:
            driver.kill()
            driver.wait()


def endless(kinds: Sequence[str], dice: random.Random) -> Iterator[str]:
    """All kinds in random order, again and again."""
    while True:
        yield from dice.sample(kinds, len(kinds))
