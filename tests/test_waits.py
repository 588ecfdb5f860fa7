"""What waits has a deadline and says so; docs/waits.md lists all of it."""

from __future__ import annotations

import fcntl
import os
import pickle
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tests.tiny import tiny_tree
from ugrl.config import build, dump, public_dict
from ugrl.data import make
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.errors import AwayError, ClusterError, ConfigError, DataError, HungError, UgrlError
from ugrl.storage import StorageError, retry

# Reads some rows, then hangs as a mount does whose server is away.
HANGS = """
import sys, time
import ugrl.data.reader as reading
plain, asked = reading.ShardReader.__getitem__, []
def read(self, index):
    asked.append(index)
    if len(asked) > 12:
        time.sleep(3600)
    return plain(self, index)
reading.ShardReader.__getitem__ = read
from cluster.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("waits") / "shards"
    prepare(ShapesSource(ShapesSpec(train=12, val=4, size=48)), out)
    return out


def test_a_batch_that_is_late_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "WORD_S", 0.5)
    said: list[str] = []
    answers = iter([False, True])
    make.awaited(lambda _: next(answers), 7, stall_s=9, say=said.append)
    assert said == ["step 8: no batch for 0.5 s; waiting up to 9 s (train.stall_s)", "step 8: its batch is here"]
    make.awaited(lambda _: True, 8, stall_s=9, say=said.append)
    assert len(said) == 2
    asked: list[float] = []
    with pytest.raises(HungError, match=r"^step 9: no batch for 9 s \(train.stall_s\): .*--resume") as caught:
        make.awaited(lambda s: bool(asked.append(s)), 8, stall_s=9, say=said.append)
    assert asked == [0.5, 8.5] and caught.value.status == 4


def test_a_disk_that_hangs_ends_a_run_though_its_thread_never_ends(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump(public_dict(build(tiny_tree(steps=50, stall_s=2.0)))))
    words = ["--config", str(config), "--data", str(shards), "--out", str(tmp_path / "run"), "data.threads=1"]
    done = subprocess.run([sys.executable, "-c", HANGS, *words], capture_output=True, text=True, timeout=400)
    assert done.returncode == 4, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: step ")
    assert "no batch for 2 s (train.stall_s)" in done.stderr and "Traceback" not in done.stderr


def test_a_storage_that_stays_away_is_told_from_bad_input() -> None:
    def refuse(lasting: bool) -> Any:
        raise StorageError("s3://bucket/it: no answer", lasting=lasting)

    with pytest.raises(StorageError) as caught:
        retry("it", lambda: refuse(False), patience_s=0.3)
    assert str(caught.value) == "s3://bucket/it: no answer, for 0.3 s (data.storage_patience_s)"
    assert caught.value.status == AwayError.status == 4
    with pytest.raises(StorageError) as caught:
        retry("it", lambda: refuse(True), patience_s=60)
    assert caught.value.status == 2
    assert [pickle.loads(pickle.dumps(StorageError("it", lasting=k))).status for k in (False, True)] == [4, 2]


def test_the_difference_survives_a_reading_task() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    from cluster.ray_data import _own_error
    from cluster.read_tasks import ERRORS

    assert ERRORS["StorageError"]("away").status == 4 and ERRORS["lasting"]("gone").status == 2
    wrapped = UgrlError("outside")
    wrapped.__cause__ = StorageError("gone", lasting=True)
    assert _own_error(wrapped) is wrapped
    assert isinstance(ERRORS["DataError"]("row"), DataError)


def test_images_that_another_run_makes_are_waited_for_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from ugrl.train import run

    monkeypatch.setattr(run, "generated_root", lambda: tmp_path)
    tree = tiny_tree()
    tree["data"] = {**tree["data"], "source": "shapes", "storage_patience_s": 0.5, "shapes": {"train": 4, "val": 2}}
    cfg, console = build(tree), Console(record=True, width=400)
    with console.capture():
        made = run.ensure_shards(cfg, None).local
    assert made is not None
    partial = made.with_name(made.name + ".partial")
    made.rename(partial)
    holder = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(AwayError, match=r"another process is writing it, for 0.5 s \(data.storage_patience_s\)"):
            run.ensure_shards(cfg, None, console=console)
    finally:
        os.close(holder)
    assert "another process is writing it; waiting up to 0.5 s (data.storage_patience_s)" in console.export_text()


def test_a_head_that_is_stopped_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes the connection for it."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from cluster import connect

    monkeypatch.setattr(connect, "ANSWER_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not connect.answers(*silent.getsockname(), timeout_s=0.3)


def test_a_lost_worker_is_told_from_one_that_fails(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from cluster.failures import as_ours
    from ugrl.storage import place

    class Failed(Exception):
        def __init__(self, *failures: Exception) -> None:
            self.worker_failures = dict(enumerate(failures))

    def told(*failures: Exception) -> UgrlError:
        return as_ours(Failed(*failures), place(tmp_path / "run"))

    gloo = RuntimeError("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 50000ms for recv")
    for lost in (ray.exceptions.WorkerCrashedError(), gloo):
        assert isinstance(told(lost), ClusterError) and "continue with --resume" in str(told(lost))
    assert told(ValueError("a fault")).status == 2
    hung = HungError("step 3: no batch")
    assert told(gloo, hung) is hung


def test_a_locked_sqlite_file_is_told_from_one_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    from tuning.study import store

    monkeypatch.setattr(store, "LOCKED_S", 1)
    with pytest.raises(ConfigError):
        store.open_storage("sqlite:///nowhere/study.db", tmp_path)
    other = sqlite3.connect(tmp_path / "study.db")
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(AwayError, match="locked") as caught:
            store.open_storage("sqlite:///study.db", tmp_path)
    finally:
        other.close()
    assert caught.value.status == 4 and "\n" not in str(caught.value)
    with pytest.raises(UgrlError) as caught:
        store.open_storage("postgresql+psycopg://ann:secret@127.0.0.1:1/ugrl", tmp_path)
    assert "secret" not in str(caught.value) and caught.value.status == 4


def test_a_studys_storage_that_is_away_is_told_of_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    from tuning.study import store

    def away() -> None:
        raise OperationalError("SELECT 1", {}, Exception("database is locked"))

    with pytest.raises(AwayError, match=r"away for 1 s \(data.storage_patience_s; .*--resume once it") as caught:
        store.retry_storage(away, 1.0)
    assert caught.value.status == 4
    assert capsys.readouterr().err.count("the study's storage is away (") == 1


@pytest.mark.long
def test_a_journals_lock_that_a_dead_process_holds_is_taken_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    import optuna

    from tuning.study.store import open_storage, quiet_optuna

    quiet_optuna()
    storage = open_storage("journal", tmp_path)
    os.symlink(tmp_path / "study.journal", tmp_path / "study.journal.lock")
    optuna.create_study(storage=storage, study_name="one")
    assert "It is taking longer than 10.0 seconds to acquire the lock file" in caplog.text
    assert "Forcibly releasing the lock file" in caplog.text
    assert optuna.get_all_study_names(open_storage("journal", tmp_path)) == ["one"]


# The main thread waits as Ray does for a process that does not start.
WAITS = """
import sys, time
from cluster import watchdog
watchdog.LOOK_S = watchdog.BEGIN_S = 0.2
with watchdog.startup_watched(lambda: False, 1.0, lambda text: print(text, file=sys.stderr)):
    time.sleep(3600)
"""


def test_workers_that_do_not_begin_are_not_waited_for_without_end() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=400)
    assert done.returncode == ClusterError.status
    assert done.stderr.splitlines() == [
        "the workers have not begun for 0.2 s; waiting up to 1 s for them",
        "error: the cluster was lost: its workers have not begun for 1 s; continue with --resume",
    ]
