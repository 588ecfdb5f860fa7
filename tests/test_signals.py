"""A signal at any moment of a command ends in one line and the documented status, and nothing is left running."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from bench.ray_use import processes
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec

ROOT = Path(__file__).parents[1]
MARK = "UGRL_TEST_SIGNAL"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
HANG_S = 300.0
COMMANDS = {
    "train": ("cluster.cli", "--config", "shapes"),
    "workers": ("cluster.cli", "--config", "shapes", "--workers", "1"),
    "tune": ("tuning.cli", "--space", "shapes"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signals") / "shards"
    prepare(ShapesSource(ShapesSpec()), out)
    return out


def begin(words: list[str], mark: str, **more: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    env |= {MARK: mark, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **more}
    return subprocess.Popen(
        [sys.executable, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def listens(process: subprocess.Popen) -> bool:
    """Whether the process has a handler of SIGTERM; Python by itself has none."""
    caught = next(s for s in Path(f"/proc/{process.pid}/status").read_text().splitlines() if s.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait_for(what: object, process: subprocess.Popen | None = None) -> None:
    until = time.monotonic() + HANG_S
    while not what():  # type: ignore[operator]
        assert time.monotonic() < until and (process is None or process.poll() is None)
        time.sleep(0.01)


def strike(name: str, shards: Path, out: Path, number: int, after_s: float) -> None:
    """Begin a command, send it a signal so long after it began to listen, and look at its end."""
    mark = uuid.uuid4().hex
    process = begin(["-m", *COMMANDS[name], "--data", str(shards), "--out", str(out)], mark)
    try:
        wait_for(lambda: listens(process), process)
        time.sleep(after_s)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(number)
        said, _ = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert process.returncode == 128 + number, (after_s, said)
    assert not any(word in said for word in ("Traceback", "Error", "***")), (after_s, said)
    assert sum(line.startswith("interrupted") for line in said.splitlines()) == 1, (after_s, said)
    wait_for(lambda: not processes(mark))


def moments(count: int, most_s: float, seed: int) -> list[tuple[int, float]]:
    """Signals and moments, early ones as often as late ones."""
    rng = random.Random(seed)
    return [(rng.choice(SIGNALS), most_s ** rng.uniform(-1, 1)) for _ in range(count)]


@pytest.mark.parametrize("number, after_s", moments(3, 8.0, 0))
def test_a_run_that_begins(number: int, after_s: float, shards: Path, tmp_path: Path) -> None:
    strike("train", shards, tmp_path / "out", number, after_s)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["workers", "tune"])
@pytest.mark.parametrize("number, after_s", moments(2, 8.0, 1))
def test_one_on_ray_that_begins(name: str, number: int, after_s: float, shards: Path, tmp_path: Path) -> None:
    strike(name, shards, tmp_path / "out", number, after_s)


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("number, after_s", moments(20, 25.0, 2))
def test_any_that_begins(name: str, number: int, after_s: float, shards: Path, tmp_path: Path) -> None:
    strike(name, shards, tmp_path / "out", number, after_s)


LEAVES = """
import subprocess, sys, time
import ugrl.hear
with ugrl.hear.heard("a word"), ugrl.hear.owning(lambda: print("given back", flush=True)):
    subprocess.Popen(["sleep", "1000"])
    print("begun", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_who_leaves_gives_back_what_it_owns_and_ends_what_it_began(number: int) -> None:
    mark = uuid.uuid4().hex
    process = begin(["-c", LEAVES], mark)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    wait_for(lambda: len(processes(mark)) == 2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + number and sorted(said.splitlines()) == ["a word", "given back"]
    wait_for(lambda: not processes(mark))


TWICE = """
import time
import ugrl.hear
from ugrl.train.interrupt import STOPPING, StopRequest
with ugrl.hear.heard("too early"):
    ugrl.hear.say_then("at once")
    with StopRequest(STOPPING):
        print("begun", flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_answered_and_the_second_acts(number: int) -> None:
    process = begin(["-c", TWICE], "")
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.stdout.readline() == "stopping after a checkpoint; once more to stop at once\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + number and said == "at once\n"


def test_what_is_ignored_stays_ignored() -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import ugrl.hear\n"
    code += "with ugrl.hear.heard('x'): assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
    process = begin(["-c", code], "")
    said, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, said


def test_handlers_are_put_back() -> None:
    from ugrl.hear import heard

    before = [signal.getsignal(n) for n in SIGNALS]
    with heard("a word"):
        assert [signal.getsignal(n) for n in SIGNALS] != before
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_nobody_waits_for_workers_that_are_not_there() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    import threading

    from cluster.stop import RayWork, run_stoppable
    from ugrl.train.interrupt import Interrupted, StopRequest

    begun, state, stop = threading.Event(), RayWork(), StopRequest()

    def work() -> None:
        begun.set()
        threading.Event().wait()

    def ask() -> None:
        begun.wait()
        stop.requested, stop.number = True, signal.SIGTERM

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Interrupted) as stopped:
        run_stoppable(work, stop, state, lambda text: None)
    assert state.abandoned and stopped.value.number == signal.SIGTERM
