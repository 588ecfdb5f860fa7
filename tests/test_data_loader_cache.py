from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.loaders import local
from ugrl.data import make
from ugrl.data.cache import PixelCache
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.shards import write_rows
from ugrl.errors import DataError
from ugrl.types import Row

SIZE, COUNT = 100, 48


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    source = ShapesSource(ShapesSpec(train=COUNT, val=1, size=SIZE))
    return ShardReader(prepare(source, tmp_path_factory.mktemp("cache") / "out", tune_val=0), "train")


def run(reader, cache_mb, threads=0, epochs=3):
    """All images of some epochs, and the loader's cache."""
    images = []
    with local(reader, 32, 6, seed=1, global_batch=8, threads=threads, cache_mb=cache_mb, prefetch=1) as loader:
        for _ in range(epochs * COUNT // 8):
            batch = next(loader)
            images.append(torch.cat([batch.images_B3HW.flatten(), batch.masks_BHW.flatten()]).clone())
    return torch.cat(images), loader.cache


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("megabytes", [1, 100])
def test_outputs_do_not_depend_on_the_cache(reader, threads, megabytes):
    expected, none = run(reader, 0)
    found, cache = run(reader, megabytes, threads)
    assert none is None and torch.equal(found, expected)
    assert cache.hits > 0


def test_a_large_cache_decodes_once(reader, monkeypatch):
    decoded = []
    real = make.decode_pixels
    monkeypatch.setattr(make, "decode_pixels", lambda data, where: decoded.append(where) or real(data, where))
    _, cache = run(reader, 100)
    assert len(decoded) == COUNT == len(set(decoded)) == len(cache)
    assert (cache.hits, cache.misses) == (2 * COUNT, COUNT)


def test_a_row_that_is_kept_is_not_read_again(reader, monkeypatch):
    _, cache = run(reader, 100, epochs=1)
    reads = []
    real = ShardReader.__getitem__
    monkeypatch.setattr(ShardReader, "__getitem__", lambda self, i: reads.append(i) or real(self, i))
    run(reader, 100)
    assert sorted(reads) == list(range(COUNT))
    assert all(cache.get(id).row.image == b"" for id in reader.ids)


def test_what_comes_first_stays(reader):
    _, cache = run(reader, 1)
    room = 1_000_000 // (SIZE * SIZE * 3 + max(len(reader[i].mask) for i in range(COUNT)))
    assert room <= len(cache) < COUNT and cache.bytes <= cache.budget
    assert cache.hits == 2 * len(cache)  # every kept row, at each of two later epochs


def test_the_budget_counts_masks_and_holds_at_all_times():
    cache, seen = PixelCache(1), []
    image = np.zeros((100, 100, 3), np.uint8)

    def put(k):
        cache.put(Row(str(k), b"jpeg", 100, 100, (1,), b"m" * 5000), image)
        seen.append(cache.bytes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(200)))
    assert max(seen) <= 1_000_000 and len(cache) == 1_000_000 // 35_000 and cache.bytes == len(cache) * 35_000
    kept = next(k for k in map(str, range(200)) if cache.get(k) is not None)
    assert cache.put(Row(kept, b"jpeg", 100, 100, (1,), None), image) and cache.bytes == len(cache) * 35_000


def test_a_small_image_still_fits_after_a_large_one_did_not():
    cache = PixelCache(1)
    assert not cache.put(Row("large", b"", 1000, 1000, ()), np.zeros((1000, 1000, 3), np.uint8))
    assert cache.put(Row("small", b"", 10, 10, ()), np.zeros((10, 10, 3), np.uint8))
    assert cache.get("large") is None and cache.get("small").image_HW3.shape == (10, 10, 3)


def test_a_broken_row_is_refused_every_time(tmp_path):
    source = ShapesSource(ShapesSpec(train=8, val=1, size=32))
    manifest = prepare(source, tmp_path / "out", tune_val=0)
    rows = [source.row("train", id) for id in source.splits()["train"]]
    other = source.row("val", "val_000000")
    rows[3] = replace(rows[3], mask=other.mask[: len(other.mask) // 2])
    write_rows(tmp_path / "out" / "train-00000.parquet", iter(rows))
    with local(ShardReader(manifest, "train"), 32, 6, seed=0, global_batch=8, threads=0, cache_mb=10) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"train-00000\.parquet: row train_000003: "):
                next(loader)
        assert loader.cache.get("train_000003") is None


def test_images_of_another_data_set_are_not_taken_for_those_of_this_one(tmp_path):
    """A folder prepared anew has the same ids; what was kept of the old one goes."""
    cache, seen = PixelCache(10), []
    for k, seed in enumerate((1, 2, 2)):
        source = ShapesSource(ShapesSpec(train=8, val=1, size=32, seed=seed))
        reader = ShardReader(prepare(source, tmp_path / str(k), tune_val=0), "train")
        batches = []
        for kept in (cache, None):
            mb = 0 if kept is None else 10
            with local(reader, 32, 6, seed=0, global_batch=8, threads=0, cache_mb=mb, cache=kept) as loader:
                batches.append(next(loader).images_B3HW.clone())
        assert torch.equal(*batches)
        seen.append((cache.hits, cache.misses, len(cache)))
    assert seen == [(0, 8, 8), (0, 16, 8), (8, 16, 8)]
