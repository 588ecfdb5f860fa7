"""A run in Weights & Biases: its files are read back, in offline mode; and what a missing or lost W&B does to a run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.s3server import bucket_server
from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.errors import ConfigError
from ugrl.storage import place
from ugrl.train.background import BackgroundWriter
from ugrl.train.loop import Trainer
from ugrl.train.wandb_tracking import WandbObserver, check_wandb

OPTIONAL = "W&B is optional: pip install wandb"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # Beside other loads a first start takes its time.
    monkeypatch.setitem(BackgroundWriter.close.__kwdefaults__, "patience_s", 300.0)


def records(out: Path, starts: int = 1) -> list[Any]:
    """The records of all W&B runs in a folder, in order of their starts, once each has its end.

    W&B's own process writes the files, and may still do so after a run has ended here.
    """
    until = time.monotonic() + 120
    while True:
        found = [r for file in sorted((out / "wandb").glob("*run-*/run-*.wandb")) for r in records_of(file)]
        if sum(r.WhichOneof("record_type") == "exit" for r in found) >= starts or time.monotonic() > until:
            return found
        time.sleep(0.1)


def records_of(file: Path) -> list[Any]:
    """The records of one run: protocol buffers in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(found: list[Any]) -> list[dict[str, float]]:
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows


def test_a_resumed_run_is_one_run_and_sends_no_step_twice(tmp_path: Path, offline: None) -> None:
    pytest.importorskip("wandb", reason=OPTIONAL)
    said: list[str] = []
    params = {"seed": 3, "train": {"lr": 0.1, "mlflow": None}}

    def tracker() -> WandbObserver:
        return WandbObserver("ann/ugrl", tmp_path, name="shapes", params=params, say=said.append)

    first = tracker()
    for step in range(1, 8):
        first.scalars("train", {"total": float(step), "a@b": 0.5}, step)
    first.leave("KILLED")
    first.close()
    time.sleep(1.1)  # the folder of a start has its second in its name
    again = tracker()
    for step in range(5, 10):
        again.scalars("train", {"total": 10.0 * step}, step)
    again.scalars("val", {"seg_miou": 0.5}, 9)
    again.leave("FINISHED")
    again.close()
    assert said == []
    found = records(tmp_path, starts=2)
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    note = json.loads((tmp_path / "wandb.json").read_text())
    assert len({run.run_id for run in runs}) == 1 and runs[0].run_id == note["id"]
    assert (runs[0].project, runs[0].entity, runs[0].display_name) == ("ugrl", "ann", "shapes")
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["train.lr"] == "0.1" and config["seed"] == "3"
    rows = history(found)
    totals = [(row["step"], row["train/total"]) for row in rows if "train/total" in row]
    assert totals == [(k, float(k)) for k in range(1, 8)] + [(8, 80.0), (9, 90.0)]
    assert rows[-1] == {"step": 9, "val/seg_miou": 0.5} and rows[0]["train/a@b"] == 0.5
    ends = [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"]
    assert ends == [130, 0]
    assert note == {"id": runs[0].run_id, "project": "ann/ugrl", "sent": {"train": 9, "val": 9}}


def test_a_training_is_tracked_and_nothing_of_the_machine_is(shards: Path, tmp_path: Path, offline: None) -> None:
    pytest.importorskip("wandb", reason=OPTIONAL)
    out = tmp_path / "run"
    cfg = build(tiny_tree(wandb="ugrl", eval_every=3))
    metrics = Trainer(cfg, shards=shards, out=out, quiet=True, device="cpu").fit()
    found = records(out)
    rows = history(found)
    assert {row["step"] for row in rows} == set(range(1, 7))
    (last,) = [row for row in rows if row["step"] == 6 and "val/seg_miou" in row]
    assert last["val/seg_miou"] == pytest.approx(metrics["seg_miou"])
    assert any(key.startswith("val_seg_iou/") for row in rows for key in row)
    kinds = {record.WhichOneof("record_type") for record in found}
    assert not kinds & {"output", "output_raw", "stats", "files"}, kinds
    written = {p.name for p in (out / "wandb").rglob("*") if p.is_file()}
    assert not [name for name in written if name in ("requirements.txt", "wandb-metadata.json", "output.log", "code")]
    assert {r.run.host for r in found if r.WhichOneof("record_type") == "run"} == {"not told"}


def test_what_stays_offline_goes_to_the_bucket_of_the_run(shards: Path, tmp_path: Path, offline: None) -> None:
    """Of W&B's folder, what `wandb sync` reads: the run is whole there, and nothing is left on the node."""
    pytest.importorskip("wandb", reason=OPTIONAL)
    with bucket_server() as server:
        out = place(server.uri(f"bucket/{tmp_path.name}"))
        metrics = Trainer(build(tiny_tree(wandb="ugrl")), shards=shards, out=out, quiet=True, device="cpu").fit()
        (name,) = (out / "wandb").names()
        (file,) = (out / "wandb" / name).names()
        (out / "wandb" / name / file).download(tmp_path / "copy" / "wandb" / name / file)
        note = json.loads((out / "wandb.json").read())
    assert name.startswith("offline-run-") and file == f"run-{note['id']}.wandb"
    found = records(tmp_path / "copy")
    rows = history(found)
    assert {row["step"] for row in rows} == set(range(1, 7)) and set(note["sent"].values()) == {6}
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0]
    assert [row["val/seg_miou"] for row in rows if "val/seg_miou" in row] == [pytest.approx(metrics["seg_miou"])]


DEAD = """
import sys, time
from pathlib import Path
from ugrl.train import wandb_tracking
from ugrl.train.wandb_tracking import WandbObserver
wandb_tracking.START_S = 3.0
tracker = WandbObserver("ugrl", Path(sys.argv[1]), name="run", params={}, say=lambda text: print(text, flush=True))
for step in range(1, 50):
    tracker.on_log(step, {"total": 1.0})
while not Path(sys.argv[1], "wandb").is_dir():
    time.sleep(0.05)
tracker.leave("FINISHED")
tracker.close()
print("goes on")
"""


def test_a_server_that_is_away_is_told_of_once_and_ends_nothing(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason=OPTIONAL)
    root = str(Path(__file__).parents[1])
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path)}
    env |= {"PYTHONPATH": ":".join([root, *(p for p in sys.path if p)]), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DEAD, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert said[-1] == "goes on" and said[-2] == "W&B project ugrl: 49 points were not written"
    assert len(said) == 3 and "training goes on, and this is tried again" in said[0] and "in use" not in said[0]


def test_what_is_missing_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected PROJECT or ENTITY/PROJECT"):
        check_wandb("https://me:secret@host/x")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks what cannot be imported
    with pytest.raises(ConfigError) as caught:
        check_wandb("ugrl")
    assert str(caught.value) == "train.wandb is 'ugrl', but W&B is not installed: pip install wandb"


def test_without_a_key_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason=OPTIONAL)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    with pytest.raises(ConfigError, match="no key of W&B is known: run `wandb login`"):
        check_wandb("ugrl")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb("ann/ugrl")
