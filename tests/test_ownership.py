"""One owner at a time: starts at the same moment, owners that die or sleep, on a disk and in a bucket."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pytest

from tests.s3server import bucket_server
from tests.starts import ONE_EACH, together
from ugrl import ownership
from ugrl.errors import BusyError
from ugrl.ownership import CLAIM_BYTES, Claim, LostError, fence, own, process_space, read_claims
from ugrl.storage import place


def owning(where: str):
    """How a process wants the folder of a round."""

    @contextmanager
    def attempt(k: int):
        with ExitStack() as stack:
            try:
                stack.enter_context(own(place(where) / f"run{k}"))
            except BusyError:
                yield False
            else:
                yield True

    return attempt


def test_of_those_who_start_at_once_one_owns_a_folder(tmp_path):
    assert together(owning, str(tmp_path)) == ONE_EACH
    assert not list(tmp_path.rglob("*.json"))


def test_an_owner_is_named_to_the_next_one_and_leaves_nothing(tmp_path):
    with own(place(tmp_path)) as held:
        held.check()
        with pytest.raises(BusyError, match=f"process {os.getpid()} on .*wait for it to end"), own(place(tmp_path)):
            pass
        assert [c.id for c in read_claims(place(tmp_path) / "owner")] == [held.id]
    with own(place(tmp_path)):
        pass
    assert not list((tmp_path / "owner").iterdir())


def foreign_claim(tmp_path, **more) -> Claim:
    claim = Claim("other", "elsewhere", 1, "", time.time(), number=1, owner=True)
    claim = Claim(**{**{f: getattr(claim, f) for f in Claim.__slots__}, **more})
    (place(tmp_path) / "owner" / f"{claim.id}.json").write(claim.bytes())
    return claim


def test_an_owner_on_another_machine_counts_until_its_claim_is_stale(tmp_path):
    foreign_claim(tmp_path)
    with pytest.raises(BusyError, match="process 1 on elsewhere"), own(place(tmp_path)):
        pass
    foreign_claim(tmp_path, time=time.time() - ownership.STALE_S - 1)
    with own(place(tmp_path)) as held:
        assert [c.id for c in read_claims(place(tmp_path) / "owner")] == [held.id]


def test_an_owner_on_this_machine_counts_as_long_as_its_process(tmp_path):
    import socket

    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    here = {"host": socket.gethostname(), "space": process_space()}
    foreign_claim(tmp_path, pid=dead.pid, **here)
    with own(place(tmp_path)):
        pass
    foreign_claim(tmp_path, pid=os.getppid(), **here)
    with pytest.raises(BusyError), own(place(tmp_path)):
        pass
    foreign_claim(tmp_path, pid=os.getpid(), **here)  # of a process before this one, which had its number
    with own(place(tmp_path)):
        pass


def test_who_wants_it_waits_as_long_as_it_was_told(tmp_path):
    claim = foreign_claim(tmp_path)

    def leave():
        time.sleep(0.3)
        (tmp_path / "owner" / f"{claim.id}.json").unlink()

    process = multiprocessing.get_context("fork").Process(target=leave)
    process.start()
    with own(place(tmp_path), patience_s=300):
        assert not (tmp_path / "owner" / "other.json").exists()
    process.join()


def test_a_claim_in_the_making_is_waited_for(tmp_path):
    """Without that, one that took the same number, or a smaller one, would be overlooked."""
    claim = foreign_claim(tmp_path, id="0", number=0, owner=False)

    def choose():
        time.sleep(0.3)
        foreign_claim(tmp_path, id=claim.id, number=1)

    process = multiprocessing.get_context("fork").Process(target=choose)
    process.start()
    with pytest.raises(BusyError), own(place(tmp_path)):
        pass
    process.join()


def hold(where: str, told) -> None:
    with own(place(where)) as held:
        told.put("owned")
        told.get()
        try:
            held.check()
            told.put("still mine")
        except LostError as error:
            told.put(str(error))


def test_an_owner_that_slept_too_long_finds_out_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "STALE_S", 1.0)
    context = multiprocessing.get_context("fork")
    told, asked = context.Queue(), context.Queue()

    class Both:
        put, get = told.put, asked.get

    process = context.Process(target=hold, args=(str(tmp_path), Both))
    process.start()
    assert told.get(timeout=300) == "owned"
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(ownership.Claim, "alive", lambda c: time.time() - c.time < 1.0 or c.pid == os.getpid())
    try:
        with own(place(tmp_path), patience_s=300) as held:
            asked.put("go")
            os.kill(process.pid, signal.SIGCONT)
            assert "another driver has taken it over" in told.get(timeout=300)
            held.check()  # it did not bring its claim back to life
            process.join(timeout=300)
            assert [c.id for c in read_claims(place(tmp_path) / "owner")] == [held.id]
    finally:
        if process.is_alive():
            process.kill()


def test_processes_that_write_for_an_owner_are_fenced(tmp_path):
    with own(place(tmp_path)) as held:
        check = fence(place(tmp_path), held.id, every_s=0.0)
        check()
        foreign_claim(tmp_path, number=9)
        with pytest.raises(LostError, match="process 1 on elsewhere"):
            check()
        (tmp_path / "owner" / "other.json").unlink()
        check()
    with pytest.raises(LostError, match="its driver has given it up"):
        check()


@pytest.mark.parametrize("asleep", ["while it waited", "before it said so"])
def test_one_that_slept_before_it_owned_does_not_pass_who_owns_it_now(asleep, tmp_path, monkeypatch):
    """Its number is smaller, and others have counted it out."""
    monkeypatch.setattr(ownership, "POLL_S", 0.0)
    before, real = ownership._before, ownership._before

    def sleeps(folder, claim):
        monkeypatch.setattr(ownership, "_before", before)
        found = real(folder, claim) if asleep == "before it said so" else claim
        now = time.time() + ownership.STALE_S
        foreign_claim(tmp_path, number=9, time=now)
        monkeypatch.setattr(time, "time", lambda: now)
        return found

    monkeypatch.setattr(ownership, "_before", sleeps)
    with pytest.raises(BusyError, match="process 1 on elsewhere"), own(place(tmp_path)):
        pass
    assert [c.id for c in read_claims(place(tmp_path) / "owner")] == ["other"]


def test_claims_have_one_size_and_what_is_none_is_passed_over(tmp_path):
    claim = foreign_claim(tmp_path)
    assert (tmp_path / "owner" / "other.json").stat().st_size == len(claim.bytes()) == CLAIM_BYTES
    assert len(Claim("x" * 32, "h" * 200, 2**40, "pid:[4026531836]", 1e10, owner=True).bytes()) == CLAIM_BYTES
    for name, text in {
        "a.json": "[]",
        "b.json": "[" * 3000,
        "c.json": json.dumps({"id": "c"}),
        "d.json": claim.bytes().decode().replace('"number": 1', '"number": "1"').replace("other", "d"),
        "note.txt": "x",
    }.items():
        (tmp_path / "owner" / name).write_text(text)
    assert read_claims(place(tmp_path) / "owner") == [claim]


def test_of_those_who_start_at_once_one_owns_a_folder_in_a_bucket():
    with bucket_server() as server:  # its client does not survive a fork
        assert together(owning, server.uri("bucket/runs"), starters=2, method="spawn") == ONE_EACH


def test_of_two_commands_that_continue_one_run_one_does(tmp_path):
    """Both would write one run's log and checkpoints, each step twice."""
    from tests.small import TINY

    out = tmp_path / "run"
    tiny = [f"{key}={value}" for key, value in TINY.items()]
    words = [sys.executable, "-m", "cluster.cli", "--config", "shapes", "--out", str(out), "--resume", "--quiet", *tiny]
    env = {**os.environ, "UGRL_DATA": str(tmp_path / "data")}
    runs = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    said = [run.communicate(timeout=500)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    assert "another driver is running it" in "".join(said)
    steps = [json.loads(text)["step"] for text in (out / "metrics.jsonl").read_text().splitlines() if "total" in text]
    assert steps == sorted(set(steps))
