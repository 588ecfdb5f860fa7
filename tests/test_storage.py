"""Places: a local folder and a bucket of a real S3 server behave alike."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.s3server import Server, bucket_server
from tests.tiny import tiny_tree
from ugrl.cli import main as ugrl
from ugrl.config import DataConfig, build
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.errors import CheckpointError, DataError
from ugrl.storage import Place, StorageError, place, retry
from ugrl.train import checkpoint
from ugrl.train.batches import local_loader
from ugrl.train.checkpoint_writer import send_files
from ugrl.train.loop import Trainer
from ugrl.train.observer import Hooks


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with bucket_server() as made:
        yield made


@pytest.fixture(params=["local", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return place(tmp_path / "home")
    return place(request.getfixturevalue("server").uri(f"bucket/{tmp_path.name}"))


def test_a_place_holds_what_was_written(home: Place, tmp_path: Path) -> None:
    assert not home.exists() and home.names() == [] and home.sizes() == {}
    (home / "a" / "one.txt").write(b"first")
    (home / "two.txt").write(b"22")
    (home / "two.txt").write(b"second")
    assert home.names() == ["a", "two.txt"] and home.sizes() == {"two.txt": 6}
    assert (home / "a").is_dir() and not (home / "two.txt").is_dir()
    assert (home / "a" / "one.txt").read() == b"first" and (home / "two.txt").read() == b"second"
    assert pickle.loads(pickle.dumps(home / "a")) == home / "a" and (home / "a").parent == home
    assert (home / "a" / "one.txt").name == "one.txt"
    with pytest.raises(StorageError, match="none.txt: "):
        (home / "none.txt").read()
    (home / "a").delete()
    (home / "nothing").delete()
    assert home.names() == ["two.txt"]
    copy = (home / "two.txt").download(tmp_path / "copy.txt")
    assert copy.read_bytes() == b"second"


def test_a_folder_is_whole_when_its_mark_is_there(home: Place, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("state.json", "model", "zebra"):
        (folder / name).write_text(name)
    target = home / "step_00000001"
    target.upload(folder, last="state.json")
    assert target.names() == ["model", "state.json", "zebra"]
    back = target.download(tmp_path / "back")
    assert {p.name: p.read_text() for p in back.iterdir()} == {n: n for n in ("state.json", "model", "zebra")}
    # Again over the old one, and dying in the middle: what is there is not taken for whole.
    (folder / "model").unlink()
    (folder / "model").mkdir()  # cannot be read as a file: it is left out, as a killed writer leaves things out
    written: list[str] = []
    real = Place.write

    def dying(self: Place, data: bytes) -> None:
        written.append(self.name)
        if self.name == "state.json":
            raise KeyboardInterrupt
        real(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            target.upload(folder, last="state.json")
    assert written == ["zebra", "state.json"] and "state.json" not in target.names()


def test_credentials_are_never_shown(server: Server) -> None:
    there = place("s3://name:hidden-word@bucket/runs?scheme=http&endpoint_override=127.0.0.1:1")
    assert str(there / "voc") == "s3://bucket/runs/voc" and "hidden" not in repr(there)
    with pytest.raises(StorageError) as caught:
        there.read()
    assert "hidden" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="s3://nobucket/x"):
        place(server.uri("nobucket/x")).read()


def test_relative_file_and_plain_paths_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place("runs").local == tmp_path / "runs"
    assert place(f"file://{tmp_path}/runs") == place(tmp_path / "runs")
    assert Path(place("runs")) == tmp_path / "runs"
    with pytest.raises(StorageError, match="s3://b/x: is on a remote storage; expected a local path"):
        Path(place("s3://b/x"))


def upload(shards: Path, there: Place) -> None:
    there.upload(shards, last="manifest.json")


def test_rows_and_batches_are_those_of_the_local_folder(shards: Path, server: Server, tmp_path: Path) -> None:
    there = place(server.uri(f"bucket/{tmp_path.name}"))
    upload(shards, there)
    assert Manifest.load(there).fingerprint() == Manifest.load(shards).fingerprint()
    assert Manifest.load(there).ids("train") == Manifest.load(shards).ids("train")
    here, remote = ShardReader(shards, "train"), ShardReader(there, "train")
    for index in torch.randperm(len(here), generator=torch.Generator().manual_seed(0)).tolist():
        assert here[index] == remote[index]
    cfg = build(tiny_tree(steps=6))
    specs = [Trainer(cfg, shards=s, out=None, quiet=True, device="cpu").loader_spec() for s in (shards, there)]
    a, b = (local_loader(spec) for spec in specs)
    for _ in range(6):
        x, y = next(a), next(b)
        assert x.ids == y.ids and torch.equal(x.images_B3HW, y.images_B3HW)
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        ShardReader(there, "trian")
    with pytest.raises(DataError, match="no manifest.json"):
        Manifest.load(there / "nothing")


def test_copies_on_the_node(shards: Path, server: Server, tmp_path: Path) -> None:
    there = place(server.uri(f"bucket/{tmp_path.name}"))
    upload(shards, there)
    here, cache = ShardReader(shards, "train"), tmp_path / "cache"

    def reader(most: int = 100) -> ShardReader:
        return ShardReader(there, "train", DataConfig(cache_dir=str(cache), cache_disk_mb=most))

    assert reader()[0] == here[0]
    (copy,) = cache.glob("*.parquet")
    assert copy.stat().st_size == here.manifest.split("train").shards[0].bytes
    real, reads = Place.read, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "read", lambda self: (reads.append(self.name), real(self))[1])
        assert [reader()[k] for k in range(len(here))] == [here[k] for k in range(len(here))]
        assert set(reads) == {"manifest.json"}  # another process finds the copy
        copy.write_bytes(copy.read_bytes()[:100])  # cut short by a crash
        assert reader()[1] == here[1]
        assert any(name.startswith("train-") for name in reads)
    assert list(cache.glob("*.tmp")) == []
    # A shard that is not what the manifest says.
    copy.unlink()
    name = here.manifest.split("train").shards[0].file
    data = bytearray((there / name).read())
    data[50] ^= 1
    (there / name).write(bytes(data))
    with pytest.raises(DataError, match=f"{name}: checksum .*; the manifest expects"):
        reader()[0]
    # A cache that cannot be written to: rows come from the storage.
    upload(shards, there)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert ShardReader(there, "train", DataConfig(cache_dir=str(blocked), cache_disk_mb=9))[2] == here[2]


def test_old_copies_make_room(shards: Path, server: Server, tmp_path: Path) -> None:
    from ugrl.data.shard_cache import ShardCache
    from ugrl.data.shards import ShardInfo, sha256

    there, infos = place(server.uri(f"bucket/{tmp_path.name}")), []
    for k in range(3):
        file = tmp_path / f"s{k}"
        file.write_bytes(bytes([k]) * 400_000)
        (there / file.name).write(file.read_bytes())
        infos.append(ShardInfo(file.name, 1, 400_000, sha256(file)))
    cache = ShardCache(tmp_path / "cache", 1)
    for k in (0, 1, 0, 2):  # 1 was used longest ago
        assert cache.file(there / f"s{k}", infos[k]).read_bytes()[:1] == bytes([k])
        time.sleep(0.02)
    kept = {p.read_bytes()[0] for p in (tmp_path / "cache").glob("*.parquet")}
    assert kept == {0, 2}


def test_a_server_that_is_away_for_a_while_is_waited_for(shards: Path, server: Server, tmp_path: Path) -> None:
    there = place(server.uri(f"bucket/{tmp_path.name}"))
    upload(shards, there)
    reader, here = ShardReader(there, "train", DataConfig(storage_patience_s=60)), ShardReader(shards, "train")
    assert reader[0] == here[0]
    timer = server.pause(4)
    assert reader[len(here) - 1] == here[len(here) - 1]  # another row group
    timer.join()
    said: list[str] = []
    timer = server.pause(4)
    assert retry("it", (there / "manifest.json").read, patience_s=60, log=said.append).startswith(b"{")
    timer.join()
    assert len(said) == 2 and "trying again for up to 60 s" in said[0] and said[1] == "it: the storage is back"
    timer = server.pause(9)
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        retry("it", (there / "manifest.json").read, patience_s=1)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("s3://bucket/")
    assert time.monotonic() - began < 60
    timer.join()


def test_a_run_on_a_bucket_is_a_run_on_a_disk(
    shards: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UGRL_CACHE", str(tmp_path / "cache"))
    there = place(server.uri(f"bucket/{tmp_path.name}"))
    upload(shards, there / "shards")
    tree = tiny_tree(steps=6, checkpoint_every=1, eval_every=3, record_ids=True)
    Trainer(build(tree), shards=shards, out=tmp_path / "disk", quiet=True, device="cpu").fit()

    whole: list[str] = []
    hooks = Hooks(
        stop=lambda: len(whole) >= 2, on_checkpoint=lambda _, where, __: whole.append(str(where)) if where else None
    )
    out = there / "runs" / "a"
    with pytest.raises(KeyboardInterrupt):
        Trainer(build(tree), shards=there / "shards", out=out, quiet=True, device="cpu", hooks=hooks).fit()
    assert all(w.startswith(f"s3://bucket/{tmp_path.name}/runs/a/checkpoints/step_") for w in whole)
    left = checkpoint.step_of(checkpoint.latest(out).name)
    assert 2 <= left < 6
    (out / "checkpoints" / "step_00000099" / "model.safetensors").write(b"half")  # of a writer that was killed
    assert checkpoint.step_of(checkpoint.latest(out).name) == left
    said: list[str] = []
    timer = server.pause(3) if left < 5 else None
    Trainer(
        build(tree),
        shards=there / "shards",
        out=out,
        quiet=True,
        device="cpu",
        resume_from=checkpoint.find(out)
        if timer is None
        else retry("find", lambda: checkpoint.find(out), patience_s=60),
        hooks=Hooks(on_event=said.append),
    ).fit()

    def losses(text: str) -> list[dict]:
        timing = ("images_per_s", "step_s", "data_wait", "device_memory_mb")
        return [{k: v for k, v in json.loads(s).items() if k not in timing} for s in text.splitlines()]

    a, b = losses((tmp_path / "disk" / "metrics.jsonl").read_text()), losses((out / "metrics.jsonl").read().decode())
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-5, abs=1e-6)
    names = [n for n in (out / "checkpoints").names() if (out / "checkpoints" / n / "state.json").exists()]
    kept = [p.name for p in (tmp_path / "disk" / "checkpoints").glob("step_*")]
    assert sorted(names) == sorted(kept)  # what is pruned here is pruned there
    assert json.loads((out / "checkpoints" / "best.json").read())["checkpoint"] in names
    assert (out / "seen").names() == ["rank_00.jsonl"]
    assert ugrl(["eval", out.where, "--data", (there / "shards").where, "--split", "val"]) == 0
    assert "checkpoint: step_00000006, the newest, and the best; split 'val': 16 images" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        checkpoint.find(there / "runs" / "none")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "hidden-word"


def test_a_bucket_gets_what_belongs_to_a_run_and_nothing_else(server: Server, tmp_path: Path) -> None:
    """Of W&B's folder, what `wandb sync` reads of a run without a network."""
    sent = ["config.yaml", "seen/rank_00.jsonl", "tb/events.1", "wandb.json"]
    sent += ["wandb/offline-run-20260101_000000-a/run-a.wandb", "wandb/offline-run-20260102_000000-a/run-a.wandb"]
    kept = ["lock", "wandb/run-20260101_000000-b/run-b.wandb", "wandb/debug.log"]
    kept += ["wandb/offline-run-20260101_000000-a/logs/debug.log"]
    for name in sent + kept:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    (tmp_path / "run/wandb/latest-run").symlink_to("offline-run-20260102_000000-a")
    there = place(server.uri(f"bucket/{tmp_path.name}"))
    send_files(tmp_path / "run", there)

    def names(folder: Place, above: str = "") -> Iterator[str]:
        for name in folder.names():
            inner = folder / name
            yield from names(inner, f"{above}{name}/") if inner.is_dir() else [above + name]

    assert sorted(names(there)) == sorted(sent)
    assert all((there / name).read().decode() == name for name in sent)


MAKES = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from ugrl.train.run_folder import make_scratch
path, _ = make_scratch()
(path / "metrics.jsonl").write_text("{}")
print(path, flush=True)
sys.stdin.read()
"""


def test_the_scratch_folder_of_a_process_that_was_killed_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ugrl.train.run_folder import LOCK, SCRATCH, YOUNG_S, make_scratch

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    there = [
        subprocess.Popen(
            [sys.executable, "-c", MAKES, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    folders = [Path(p.stdout.readline().strip()) for p in there if p.stdout is not None]
    elsewhere, young, old = (tmp_path / f"{SCRATCH}{name}" for name in ("elsewhere", "young", "old"))
    for folder in (elsewhere, young, old):
        folder.mkdir()
    (elsewhere / LOCK).write_text("another-machine 1")
    os.utime(old, (time.time() - 2 * YOUNG_S,) * 2)
    try:
        there[0].kill()
        there[0].wait()
        mine, lock = make_scratch()
        assert {p for p in tmp_path.iterdir()} == {folders[1], elsewhere, young, mine}
        assert (folders[1] / "metrics.jsonl").exists()
        os.close(lock)
    finally:
        for process in there:
            process.kill()
            process.communicate()


def test_the_query_of_an_s3_uri_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"^s3://b: unknown option 'regoin'; did you mean 'region'\?$"):
        place("s3://key:word@b/x?regoin=eu-west-1").exists()
    found, path = place("s3://key:w%2Ford@b/x/y?region=eu-west-1&allow_bucket_creation=true").filesystem()
    assert (found.region, path) == ("eu-west-1", "b/x/y")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # as pyarrow takes it for a URI
    with pytest.raises(StorageError, match="^s3://other/x: "):
        place("s3://key:word@other/x").exists()
