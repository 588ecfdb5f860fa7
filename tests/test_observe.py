"""What a run tells: the loop's clock, the boards it is drawn on, and how it is shown elsewhere."""

from __future__ import annotations

import io
import json
import mmap
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from cluster.channel import checkpoint_record, event_record, log_record, start_record, val_record
from cluster.live import Display, RunState, watch
from ugrl.errors import ConfigError
from ugrl.eval.evaluate import EvalResult
from ugrl.train.background import MOST, BackgroundWriter
from ugrl.train.meter import Meter
from ugrl.train.observer import Observers
from ugrl.train.progress import Progress
from ugrl.train.tensorboard import EventFileWriter, TensorBoard
from ugrl.train.tracking import MlflowObserver, check_mlflow, scalars_of
from ugrl.types import Batch

VALUES = {
    "total": 2.1234,
    "cls": 0.12345,
    "seg": 1.2345,
    "lr": 1e-4,
    "images_per_s": 81.25,
    "step_s": 0.0985,
    "data_wait": 0.034,
    "device_memory_mb": 10444.0,
}


# -- the meter -------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_meter_counts_what_is_training_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    meter = Meter("cpu")
    assert set(meter.values()) <= {"device_memory_mb"}  # no step yet
    for _ in range(4):
        with meter.data():
            clock.now += 0.25
        clock.now += 0.75
        meter.step(6)
    with meter.pause():
        clock.now += 1000
    values = meter.values()
    assert values["images_per_s"] == pytest.approx(6.0)
    assert values["step_s"] == pytest.approx(1.0)
    assert values["data_wait"] == pytest.approx(0.25)
    clock.now += 2  # since the last call
    meter.step(6)
    assert meter.values()["images_per_s"] == pytest.approx(3.0)
    with pytest.raises(StopIteration), meter.data():
        clock.now += 1
        next(iter(()))
    meter.step(6)
    assert meter.values()["data_wait"] == pytest.approx(1.0)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="this system tells no process its memory")
def test_on_a_cpu_the_memory_is_that_of_the_process() -> None:
    meter = Meter(torch.device("cpu"))
    before = meter.values()["device_memory_mb"]
    # 256 MiB of the system's own, touched: an array could lie in memory that the process had already.
    with mmap.mmap(-1, 2**28) as kept:
        np.frombuffer(kept, np.uint8)[:] = 1
        assert 200 < meter.values()["device_memory_mb"] - before < 400


# -- boards ----------------------------------------------------------------------------------------


def points(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard shows of a folder: files by name, what a later start has declared void left out."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: list[tuple[str, int, float]] = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at + 12 <= len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            if at + 16 + size > len(data):
                break  # a record that was cut off
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == SessionLog.START:
                shown = [p for p in shown if p[1] < event.step]
            shown += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return shown


def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path / "tb")
    for step in range(1, 8):
        first.scalars("train", {"total": float(step)}, step)
    first.leave("KILLED")
    first.close()
    again = TensorBoard(tmp_path / "tb", step=4)  # the last checkpoint
    for step in range(5, 10):
        again.scalars("train", {"total": 10.0 * step}, step)
    again.leave("FINISHED")
    again.close()
    expected = [(float(k) if k < 5 else 10.0 * k) for k in range(1, 10)]
    assert points(tmp_path / "tb") == [("train/total", k + 1, v) for k, v in enumerate(expected)]
    assert len(list((tmp_path / "tb").iterdir())) == 2  # also within one second


def test_pictures_are_written_beside_the_scalars(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tb")
    batch = Batch(
        ids=("a", "b"),
        images_B3HW=torch.zeros(2, 3, 16, 16),
        tags_BF=torch.ones(2, 1),
        boxes_B4=torch.tensor([[0, 16, 0, 16]] * 2),
        masks_BHW=None,
        pairs_P2=torch.tensor([[0, 0], [1, 0]]),
    )
    labels = torch.tensor([0, 1, 255, 0]).repeat(2, 16, 4)
    views = {"cam": torch.rand(2, 16, 16), "labels": labels, "u": torch.rand(2, 16, 16)}
    board.on_pictures(3, batch, views)
    board.close()
    assert [(tag, step) for tag, step, _ in points(tmp_path / "tb")] == [("train/walk", 3)]


FULL = """
import resource, sys, time
from pathlib import Path
from ugrl.train.tensorboard import EventFileWriter
from ugrl.train.background import BackgroundWriter
from ugrl.train.tracking import scalars_of

said = []
writer = BackgroundWriter("TensorBoard", EventFileWriter(Path(sys.argv[1]), 0), said.append, every_s=0.02)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))
for step in range(1, 201):
    writer.put(scalars_of("train", {"total": float(step)}, step))
    time.sleep(0.001)
while not said:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
writer.close()
print("\\n".join(said))
"""


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """The system's limit on file sizes stands for the disk: writes fail in the middle of a record."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "tb")], capture_output=True, text=True, timeout=120, check=True
    )
    said = done.stdout.splitlines()
    refused, works = said[::2], said[1::2]  # few records fit into a new file, too: how often, the machine decides
    assert all(s.startswith("TensorBoard: OSError: [Errno 27]") and "training goes on" in s for s in refused)
    assert set(works) == {"TensorBoard: works again"} and len(works) == len(refused)
    assert points(tmp_path / "tb") == [("train/total", k, float(k)) for k in range(1, 201)]
    assert len(list((tmp_path / "tb").iterdir())) > 1


def test_what_waits_for_a_writer_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    writer = BackgroundWriter(
        "board", EventFileWriter(tmp_path / "file" / "tb", 0), said.append, every_s=0.01
    )  # no folder there
    writer.put(scalars_of("train", {str(k): 0.0 for k in range(MOST + 5)}, 1))
    writer.close()
    assert len(said) == 2 and said[0].startswith("board: NotADirectoryError")
    assert said[1] == f"board: {MOST + 5} points were not written"


# -- MLflow ----------------------------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    # Beside other loads a first database takes its time.
    monkeypatch.setitem(BackgroundWriter.close.__kwdefaults__, "patience_s", 300.0)


def test_a_resumed_run_is_one_run_in_mlflow(tmp_path: Path, patient: None) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is optional: pip install mlflow-skinny")
    said: list[str] = []
    store, out = tmp_path / "tracked", tmp_path / "run"
    params = {"seed": 3, "train": {"lr": 0.1, **{f"key{k}": k for k in range(150)}}}

    def tracker() -> MlflowObserver:
        return MlflowObserver(str(store), out / "mlflow.json", name="shapes", params=params, say=said.append)

    out.mkdir()
    first = tracker()
    for step in range(1, 8):
        first.scalars("train", {"total": float(step), "a@b": float("nan")}, step)
    first.leave("KILLED")
    first.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    note = json.loads((out / "mlflow.json").read_text())
    run = client.get_run(note["run_id"])
    assert run.info.status == "KILLED" and run.info.run_name == "shapes"
    assert len(run.data.params) == 152 and run.data.params["train.lr"] == "0.1"

    again = tracker()
    for step in range(5, 10):
        again.scalars("train", {"total": float(step)}, step)
    again.scalars("val", {"mIoU": 0.5}, 9)
    again.leave("FINISHED")
    again.close()
    experiment = client.get_experiment_by_name("ugrl")
    assert [r.info.run_id for r in client.search_runs([experiment.experiment_id])] == [note["run_id"]]
    run = client.get_run(note["run_id"])
    assert run.info.status == "FINISHED" and run.data.metrics["val/mIoU"] == 0.5
    history = client.get_metric_history(note["run_id"], "train/total")
    assert [(m.step, m.value) for m in history] == [(k, float(k)) for k in range(1, 10)]
    assert "train/a_b" in run.data.metrics
    assert said == []


def test_a_lost_tracking_server_is_told_of_once_and_waited_for_by_nobody(tmp_path: Path, patient: None) -> None:
    pytest.importorskip("mlflow", reason="MLflow is optional: pip install mlflow-skinny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said: list[str] = []
    where = f"http://me:secret@127.0.0.1:{port}"
    tracker = MlflowObserver(where, tmp_path / "mlflow.json", name="run", params={}, say=said.append)
    board = TensorBoard(tmp_path / "tb", say=said.append)
    both = Observers([tracker, board])
    for step in range(1, 50):
        both.on_log(step, {"total": 1.0})
    both.leave("FINISHED")
    both.close()
    assert len(said) == 2
    assert said[0].startswith(f"MLflow at http://127.0.0.1:{port}: ") and "training goes on" in said[0]
    assert said[1] == f"MLflow at http://127.0.0.1:{port}: 49 points were not written"
    assert "secret" not in "".join(said)
    assert len(points(tmp_path / "tb")) == 49  # the other observer has everything


def test_a_tracking_server_that_never_answers_is_given_up(tmp_path: Path, patient: None) -> None:
    pytest.importorskip("mlflow", reason="MLflow is optional: pip install mlflow-skinny")
    said: list[str] = []
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        where = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        tracker = MlflowObserver(where, tmp_path / "mlflow.json", name="run", params={}, say=said.append)
        tracker.scalars("train", {"total": 1.0}, 1)
        tracker.writer.close("KILLED", patience_s=0.3)
        assert said[-1].endswith("1 points were not written")


def test_mlflow_that_is_not_installed_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as Python marks what cannot be imported
    with pytest.raises(ConfigError) as caught:
        MlflowObserver("https://me:secret@host/", tmp_path / "mlflow.json", name="run", params={})
    text = "train.mlflow is 'https://host/', but MLflow is not installed: pip install mlflow-skinny"
    assert str(caught.value) == text
    with pytest.raises(ConfigError):
        check_mlflow("runs/tracked")


# -- shown here ------------------------------------------------------------------------------------


class Script:
    """A source with one batch of records for each look."""

    def __init__(self, *batches: list[dict]) -> None:
        self.batches = list(batches)

    def records(self) -> list[dict]:
        return self.batches.pop(0) if self.batches else []


STORY = [
    start_record(0, 2, 1),
    log_record(20, VALUES),
    log_record(40, VALUES),
    checkpoint_record(40, "s3://runs/a/checkpoints/step_00000040"),
    val_record(50, {"mIoU": 0.5123, "cam_mIoU": 0.4, "step": 50.0}),
    event_record("waiting for storage: 10 s"),
    start_record(40, 3, 2),
    log_record(60, VALUES),
    log_record(100, VALUES),
]


def test_off_a_terminal_there_are_sparse_plain_lines() -> None:
    file = io.StringIO()
    script = Script(STORY[:4], STORY[4:])
    with watch(script, 100, console=Console(file=file, width=80), every_s=0.01):
        while script.batches:
            time.sleep(0.01)
    lines = [re.sub(r"  [\d a-z]+ left", "", line) for line in file.getvalue().splitlines()]
    values = "81.2 img/s  98 ms/step  3% data wait  10.4 GB  total 2.1234  cls 0.1235  seg 1.2345"
    assert lines == [
        "started: 2 workers on 1 node",
        f"step 20/100  {values}",
        "step 40  checkpoint  s3://runs/a/checkpoints/step_00000040",
        "step 50  validation  mIoU 0.5123  cam_mIoU 0.4000",
        "waiting for storage: 10 s",
        "restarted from the checkpoint of step 40: 3 workers on 2 nodes",
        f"step 100/100  {values}",
    ]


def test_records_are_taken_though_nothing_is_shown() -> None:
    file, script = io.StringIO(), Script(STORY)
    with watch(script, 100, console=Console(file=file), enabled=False, every_s=0.01):
        pass
    assert file.getvalue() == "" and script.batches == []


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_display_is_tidy(width: int) -> None:
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO())
    display = Display(RunState(20000), console)
    for record in STORY:
        display.show(record)
    above = console.export_text().splitlines()
    assert above == [
        "started: 2 workers on 1 node",
        "step 50  validation  mIoU 0.5123  cam_mIoU 0.4000",
        "waiting for storage: 10 s",
        "restarted from the checkpoint of step 40: 3 workers on 2 nodes",
    ]
    console.print(display.render())
    rows = [row.rstrip() for row in console.export_text().splitlines()]
    assert rows[0].startswith("step 100/20000  ━") and rows[0].endswith(" left")
    assert rows[1:] == [
        "total 2.1234  cls 0.1235  seg 1.2345",
        "81.2 img/s  98 ms/step  3% data wait  10.4 GB",
        "3 workers on 2 nodes · checkpoint of step 40 · 1 restart",
        "validation  mIoU 0.5123  cam_mIoU 0.4000",
    ]
    assert all(len(row) <= width for row in rows)


def test_on_a_terminal_the_display_lives_while_the_run_does() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with watch(Script(STORY), 100, console=console, every_s=0.01):
        pass
    assert "restarted from the checkpoint of step 40" in file.getvalue()
    assert "100/100" in file.getvalue()
    console.print("after")  # the display has given the terminal back
    assert file.getvalue().endswith("after\n")


def test_a_single_run_shows_the_same_figures(tmp_path: Path) -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=80), 100, 0, enabled=True) as progress:
        progress.on_log(100, VALUES)
        progress.on_step(100)
        progress.on_eval(50, EvalResult(metrics={"mIoU": 0.5}, classes={}, images=7))
    lines = file.getvalue().splitlines()
    assert lines[0] == (
        "step 100/100  81.2 img/s  98 ms/step  3% data wait  10.4 GB  total 2.1234  cls 0.1235  seg 1.2345"
    )
    assert lines[1] == "step 50  validation on 7 images  mIoU 0.5000"
