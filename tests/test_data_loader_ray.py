"""Both sides of Ray Data's loader, without a cluster: every way of making batches is the local loader's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.loaders import changed
from ugrl.config import DataConfig
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.data.spec import LoaderSpec
from ugrl.errors import DataError
from ugrl.storage import StorageError
from ugrl.train.batches import local_loader

NO_RAY = "Ray Data is not installed: pip install 'ray[data]'"
ray_data = pytest.importorskip("cluster.ray_data", reason=NO_RAY, exc_type=ImportError)
reading = pytest.importorskip("cluster.read_tasks", reason=NO_RAY)
plans = pytest.importorskip("cluster.blocks", reason=NO_RAY)


def asked(shards: Path, **changes: Any) -> LoaderSpec:
    made = LoaderSpec(
        shards=shards,
        split="train",
        num_classes=6,
        data=DataConfig(crop=40, threads=0, prefetch=2),
        seed=3,
        global_batch=8,
        rank=1,
        world=2,
        start_step=1,
        total_steps=9,
    )
    return changed(made, **changes)


def blocks(spec: LoaderSpec, sizes: list[int], block_bytes: int = 10**9, stream: str = "") -> Iterator[Any]:
    """What tasks of these sizes yield."""
    stops = np.cumsum(sizes)
    manifest = Manifest.load(spec.shards)
    for start, stop in zip([0, *stops], stops, strict=False):
        span = {"start": np.array([start]), "stop": np.array([stop])}
        name = stream or f"{spec.shards}"
        yield from reading.fetch(span, spec=spec, manifest=manifest, block_bytes=block_bytes, stream=name)


@pytest.mark.parametrize("mode", ["none", "normalize", "augment"])
@pytest.mark.parametrize("cache_mb", [0, 1])
@pytest.mark.parametrize("masks_every", [1, 2, 0])
def test_batches_are_those_of_the_local_loader(shards, mode, cache_mb, masks_every):
    spec = asked(shards, on_device=mode, cache_mb=cache_mb, masks_every=masks_every)
    local = local_loader(changed(spec, threads=2))
    with ray_data.Feeder(spec, blocks(spec, [3, 2, 9, 18], block_bytes=12_000)) as feeder:
        for k in range(8):
            found, expected = feeder.next().to("cpu"), next(local).to("cpu")
            assert found.ids == expected.ids
            assert (found.masks_BHW is not None) == (masks_every > 0 and (2 + k) % masks_every == 0)
            for name in ("images_B3HW", "tags_BF", "boxes_B4", "masks_BHW", "pairs_P2"):
                a, b = getattr(found, name), getattr(expected, name)
                assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
        assert cache_mb == 0 or feeder.maker.cache.hits > 0
    local.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_broken_image_is_named_when_its_step_is_reached_and_not_before(shards, threads):
    spec = asked(shards, threads=threads, prefetch=4)
    rows = [r for block in blocks(spec, [32]) for r in reading.unpack(block)]
    rows[6] = replace(rows[6], row=replace(rows[6].row, image=rows[6].row.image[:-40]))
    with ray_data.Feeder(spec, iter([reading.pack(rows)])) as feeder:
        assert feeder.next().ids == tuple(r.row.id for r in rows[:4])
        with pytest.raises(DataError, match=rf"train-00000\.parquet: row {rows[6].row.id}: truncated image"):
            feeder.next()


@pytest.mark.parametrize("error", [DataError("shard 7: gone"), StorageError("s3://bucket: away")])
def test_what_a_task_meets_is_raised_as_what_it_was_at_its_step(shards, monkeypatch, error):
    spec, read, count = asked(shards), ShardReader.__getitem__, 0

    def broken(self: ShardReader, index: int) -> Any:
        nonlocal count
        count += 1
        if count == 10:
            raise error
        return read(self, index)

    monkeypatch.setattr(ShardReader, "__getitem__", broken)
    with ray_data.Feeder(spec, blocks(spec, [32], stream=str(error))) as feeder:
        feeder.next(), feeder.next()  # 8 rows
        with pytest.raises(type(error), match=str(error)) as caught:
            feeder.next()
    assert type(caught.value) is type(error)
    assert count == 10  # nothing is read after it


def test_a_missing_or_misplaced_row_is_refused(shards):
    spec = asked(shards)
    rows = [r for block in blocks(spec, [32]) for r in reading.unpack(block)]
    for wrong in ([*rows[:5], *rows[6:]], [*rows[:5], rows[6], rows[5], *rows[7:]], [rows[0], *rows]):
        with ray_data.Feeder(spec, iter([reading.pack(wrong)])) as feeder, pytest.raises(DataError, match="expected"):
            for _ in range(8):
                feeder.next()
    with ray_data.Feeder(spec, iter([reading.pack(rows[:30])])) as feeder:
        for _ in range(7):
            feeder.next()
        with pytest.raises(DataError, match="ended before the run"):
            feeder.next()


def test_blocks_end_at_their_size_and_lose_nothing(shards):
    spec = asked(shards)
    whole = [r for block in blocks(spec, [32]) for r in reading.unpack(block)]
    limit = sum(r.bytes for r in whole[:5])
    small = [reading.unpack(block) for block in blocks(spec, [20, 12], block_bytes=limit)]
    assert [r for block in small for r in block] == whole
    assert len(small[0]) == 5 and len(small) > 4
    largest = max(r.bytes for r in whole)
    assert all(sum(r.bytes for r in block) < limit + largest for block in small)


@pytest.mark.parametrize("tasks", [1, 3, 8])
@pytest.mark.parametrize("row_bytes", [100.0, 60_000.0, 5e6])
@pytest.mark.parametrize("store", [1e6, 40e6, 2e9])
def test_a_cut_stays_within_its_part_of_the_store(tasks, row_bytes, store):
    made = plans.plan_blocks(row_bytes, tasks=tasks, store_bytes=store)
    spans = made.spans(total := 10_000, 8)
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and spans[-1][1] == total
    assert spans[0][1] <= 8 and max(b - a for a, b in spans) == min(made.rows, total)
    assert 1 <= made.tasks <= tasks
    assert made.block_bytes >= row_bytes and made.rows * row_bytes <= max(made.block_bytes, row_bytes)
    bound = plans.stream_bytes(row_bytes, tasks=tasks, store_bytes=store)
    few = (2 + plans.WAITING + plans.TAKEN) * row_bytes
    assert bound <= max(store, few * 1.01)
