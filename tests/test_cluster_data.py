"""Ray Data's loader on a real cluster with a small object store: nothing lost, nothing doubled, memory bounded."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from bench.ray_use import StoreWatch, private_cluster, processes, write_noise
from cluster import blocks, ray_data
from cluster.ray_internals import SchedulerPause
from tests.loaders import changed
from ugrl.config import DataConfig
from ugrl.data.make import Loaded
from ugrl.data.order import batch_rows, epoch_order, steps_per_epoch
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest, ShardInfo, SplitInfo, sha256, write_rows
from ugrl.data.spec import LoaderSpec
from ugrl.errors import DataError
from ugrl.files import write_whole

pytestmark = pytest.mark.ray

STORE = 80_000_000  # about the smallest that Ray takes


@pytest.fixture(scope="module")
def mark() -> Iterator[str]:
    """A private cluster; what its processes have in their environment."""
    with private_cluster(cpus=2, store_bytes=STORE) as made:
        yield made


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than twice the object store."""
    return write_noise(tmp_path_factory.mktemp("noise") / "shards", 180)


def asked(shards: Path, steps: int, **changes: Any) -> LoaderSpec:
    made = LoaderSpec(
        shards=shards,
        split="train",
        num_classes=6,
        data=DataConfig(crop=16, threads=1, prefetch=2, on_device="normalize"),
        seed=3,
        global_batch=8,
        rank=0,
        world=1,
        start_step=0,
        total_steps=steps,
    )
    return changed(made, **changes)


def ids_of(batch: Loaded) -> tuple[str, ...]:
    return batch.to("cpu").ids


def expected_ids(spec: LoaderSpec) -> list[tuple[str, ...]]:
    """Of every step, by the one who decides."""
    manifest = Manifest.load(spec.shards)
    ids = manifest.ids(spec.split)
    out = []
    for step in range(spec.start_step, spec.total_steps):
        _, rows = batch_rows(
            step,
            seed=spec.seed,
            manifest=manifest,
            global_batch=spec.global_batch,
            rank=spec.rank,
            world=spec.world,
        )
        out.append(tuple(ids[int(i)] for i in rows))
    return out


def drained(mark: str, watch: StoreWatch) -> bool:
    """Whether the store is empty and no task runs; waits a while for it."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        busy = [name for name in processes(mark).values() if "fetch" in name]
        if watch.now().object_store_bytes_primary_copy < 100_000 and not busy:
            return True
        time.sleep(0.1)
    return False


def test_three_ranks_see_every_sample_once_an_epoch(shards: Path, mark: str) -> None:
    manifest = Manifest.load(shards)
    rows, batch = manifest.rows("train"), 6
    per_epoch = steps_per_epoch(rows, batch)
    assert rows % batch  # a ragged epoch
    streams = [
        ray_data.ray_loader(asked(shards, 2 * per_epoch, rank=rank, world=3, global_batch=batch)) for rank in range(3)
    ]
    seen = [[ids_of(b) for b in parts] for parts in zip(*streams, strict=True)]
    assert len(seen) == 2 * per_epoch
    assert [sum(parts, ()) for parts in seen] == expected_ids(asked(shards, 2 * per_epoch, global_batch=batch))
    orders = []
    for epoch in range(2):
        flat = [i for parts in seen[epoch * per_epoch : (epoch + 1) * per_epoch] for part in parts for i in part]
        left = {manifest.ids("train")[int(k)] for k in epoch_order(3, epoch, manifest)[per_epoch * batch :]}
        assert len(flat) == len(set(flat)) == rows - rows % batch
        assert set(flat) == set(manifest.ids("train")) - left and len(left) == rows % batch
        orders.append(flat)
    assert orders[0] != orders[1]


def test_a_stream_larger_than_the_object_store_is_bounded_and_whole(noise: Path, mark: str) -> None:
    manifest = Manifest.load(noise)
    spec = asked(noise, manifest.rows("train") // 8)
    size = sum(s.bytes for s in manifest.split("train").shards)
    assert size >= 2 * STORE
    part = blocks.store_part(1)
    bound = blocks.stream_bytes(blocks.mean_row_bytes(manifest, "train"), tasks=2, store_bytes=part)
    assert bound <= part <= 0.5 * STORE * 1.01
    with StoreWatch() as watch:
        seen = [ids_of(b) for b in ray_data.ray_loader(spec, tasks=2)]
    assert seen == expected_ids(spec)
    assert 0 < watch.pinned <= bound
    assert watch.used <= STORE and watch.beyond == 0
    assert watch.grown() < 40e6  # of 180 MB that went through
    assert drained(mark, watch)


def test_a_consumer_that_waits_holds_the_tasks_back(noise: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers' streams side by side; and Ray Data's scheduler rests meanwhile."""
    looks, step = [], SchedulerPause.on_execution_step

    def counted(self: Any, executor: object) -> None:
        step(self, executor)
        looks.append(time.perf_counter())

    monkeypatch.setattr(SchedulerPause, "on_execution_step", counted)
    specs = [asked(noise, Manifest.load(noise).rows("train") // 8, rank=rank, world=2) for rank in range(2)]
    row_bytes = blocks.mean_row_bytes(Manifest.load(noise), "train")
    bound = 2 * blocks.stream_bytes(row_bytes, tasks=2, store_bytes=blocks.store_part(2))
    with StoreWatch() as watch:
        streams = [ray_data.ray_loader(spec, tasks=2) for spec in specs]
        first = [ids_of(next(stream)) for stream in streams]
        settled, since = 0, time.monotonic()
        # Until nothing comes in any more.
        while time.monotonic() - since < 3 or (watch.pinned <= 0.2 * bound and time.monotonic() - since < 200):
            if watch.pinned > settled:
                settled, since = watch.pinned, time.monotonic()
            time.sleep(0.05)
        begin = time.perf_counter()
        time.sleep(1)
        rested = [t for t in looks if begin <= t < begin + 1]
        assert len(rested) <= 2 * (1 / SchedulerPause.PAUSE_S + 1)
        assert 0.2 * bound < watch.pinned <= bound
        more = [[ids_of(next(stream)) for _ in range(4)] for stream in streams]
        for spec, one, some in zip(specs, first, more, strict=True):
            assert [one, *some] == expected_ids(replace(spec, total_steps=5))
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
    assert watch.beyond == 0
    assert drained(mark, watch)
    names = [t.name for t in threading.enumerate()]
    assert not [n for n in names if n.startswith("ugrl-") or "StreamingExecutor" in n]


def test_killed_reading_processes_change_nothing(noise: Path, mark: str) -> None:
    spec = asked(noise, Manifest.load(noise).rows("train") // 8)
    ended, killed = threading.Event(), []

    def kill() -> None:
        while not ended.is_set() and len(killed) < 3:
            for pid, name in processes(mark).items():
                if name.startswith("ray::") and "fetch" in name and pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break
            time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    seen = [ids_of(b) for b in ray_data.ray_loader(spec, tasks=2)]
    ended.set()
    killer.join()
    assert killed
    assert seen == expected_ids(spec)


def copy_of(shards: Path, to: Path, change: Callable[[Path, Manifest], None]) -> Path:
    shutil.copytree(shards, to)
    change(to, Manifest.load(to))
    return to


def last_shard_gone(folder: Path, manifest: Manifest) -> None:
    (folder / manifest.split("train").shards[-1].file).unlink()


def last_shard_short(folder: Path, manifest: Manifest) -> None:
    path = folder / manifest.split("train").shards[-1].file
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "words"),
    [(last_shard_gone, "missing shard of split 'train'"), (last_shard_short, "bytes; the manifest")],
)
def test_a_shard_that_is_gone_or_short_is_named_at_once(
    shards: Path, mark: str, tmp_path: Path, change: Callable[[Path, Manifest], None], words: str
) -> None:
    broken = copy_of(shards, tmp_path / "broken", change)
    name = Manifest.load(shards).split("train").shards[-1].file
    with pytest.raises(DataError, match=f"{broken}/{name}: .*{words}"):
        next(ray_data.ray_loader(asked(broken, 5)))


def unreadable_group(folder: Path, manifest: Manifest) -> None:
    """Zeros where the second of two row groups begins: found when one of its rows is wanted."""
    import pyarrow.parquet as pq

    path = folder / manifest.split("train").shards[0].file
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 64] = bytes(64)
    path.write_bytes(data)


def cut_image(folder: Path, manifest: Manifest) -> None:
    """An image that ends early, in a shard that is as its manifest says."""
    rows = ShardReader(manifest, "train").rows(range(manifest.rows("train")))
    rows[11] = replace(rows[11], image=rows[11].image[:-60])
    path = folder / "train-00000.parquet"
    path.unlink()
    write_rows(path, iter(rows))
    shard = ShardInfo(path.name, len(rows), path.stat().st_size, sha256(path))
    split = SplitInfo(len(rows), len(rows), (shard,))
    write_whole(folder / "manifest.json", replace(manifest, splits={"train": split}).to_json())


@pytest.mark.parametrize(
    ("change", "bad", "words"),
    [
        (unreadable_group, set(range(8, 16)), "train-00000.parquet: row group 1 is unreadable"),
        (cut_image, {11}, "train-00000.parquet: row .*: truncated image"),
    ],
)
def test_a_broken_row_is_named_at_its_step(
    shards: Path, mark: str, tmp_path: Path, change: Callable[[Path, Manifest], None], bad: set[int], words: str
) -> None:
    broken = copy_of(shards, tmp_path / "broken", change)
    spec = asked(broken, 30, global_batch=2)
    order = epoch_order(3, 0, Manifest.load(broken))
    step = next(k for k in range(10) if bad & {int(i) for i in order[2 * k : 2 * k + 2]})
    assert step > 0
    stream = ray_data.ray_loader(spec)
    whole = expected_ids(replace(spec, shards=shards, total_steps=step))
    assert [ids_of(next(stream)) for _ in range(step)] == whole
    with pytest.raises(DataError, match=f"{broken}/{words}"):
        next(stream)


@pytest.mark.full
def test_five_epochs_of_a_larger_stream_leave_no_trace(mark: str, tmp_path: Path) -> None:
    folder = write_noise(tmp_path / "noise", 400)
    rows = Manifest.load(folder).rows("train")
    spec = asked(folder, 5 * (rows // 8))
    with StoreWatch() as watch:
        count = np.zeros(rows, int)
        index = {name: k for k, name in enumerate(Manifest.load(folder).ids("train"))}
        for batch in ray_data.ray_loader(spec, tasks=2):
            count[[index[i] for i in ids_of(batch)]] += 1
    assert count.sum() == 5 * (rows // 8) * 8 and count.max() == 5 and count.min() >= 4
    assert watch.used <= STORE and watch.beyond == 0
    assert watch.grown() < 40e6  # of 2 GB
    assert drained(mark, watch)
