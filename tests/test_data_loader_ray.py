"""The consumer's side of Ray Data's loader, without a cluster: every way of making batches is the local loader's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ugrl.data.augment import Augment
from ugrl.data.cache import PixelCache
from ugrl.data.make import BatchMaker
from ugrl.train.loop import LoaderSpec, local_loader

ray_data = pytest.importorskip("cluster.data", exc_type=ImportError)


@pytest.mark.parametrize("mode", ["none", "normalize", "augment"])
@pytest.mark.parametrize("cache_mb", [0, 1])
@pytest.mark.parametrize("masks_every", [1, 2, 0])
def test_batches_are_those_of_the_local_loader(shards, mode, cache_mb, masks_every):
    spec = LoaderSpec(
        shards=shards,
        split="train",
        augment=Augment(crop=40, num_classes=6),
        seed=3,
        global_batch=8,
        rank=1,
        world=2,
        start_step=1,
        total_steps=9,
        threads=0,
        prefetch=2,
        on_device=mode,
        cache_mb=cache_mb,
        masks_every=masks_every,
    )
    local = local_loader(replace(spec, threads=2))
    maker = BatchMaker(
        spec.augment, seed=3, on_device=mode, cache=PixelCache(cache_mb) if cache_mb else None, pin_memory=False
    )
    decode = ray_data.Decode(maker, threads=0)
    table = ray_data.fetch({"start": np.array([0]), "stop": np.array([8 * 4])}, spec)
    for k in range(8):
        step, carried = decode(table.slice(4 * k, 4))
        found, expected = carried.to("cpu"), next(local).to("cpu")
        assert step == 1 + k and found.ids == expected.ids
        assert (found.masks_BHW is not None) == (masks_every > 0 and (step + 1) % masks_every == 0)
        for name in ("images_B3HW", "tags_BF", "boxes_B4", "masks_BHW", "pairs_P2"):
            a, b = getattr(found, name), getattr(expected, name)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
    local.close()
    assert cache_mb == 0 or maker.cache.hits > 0


def test_an_error_reaches_the_consumer_from_a_thread(shards):
    maker = BatchMaker(Augment(crop=40, num_classes=6), seed=3)
    decode = ray_data.Decode(maker, threads=2)
    spec = LoaderSpec(shards, "train", maker.augment, 3, 4, 0, 1, 0, 1, 0, 1)
    rows = ray_data.from_table(table := ray_data.fetch({"start": np.array([0]), "stop": np.array([4])}, spec))
    rows[2] = replace(rows[2], image=rows[2].image[:-40])
    spoiled = ray_data.to_table(rows)
    for name in ("step", "epoch"):
        spoiled = spoiled.append_column(name, table.column(name))
    with pytest.raises(ray_data.DataError, match=f"^row {rows[2].id}: truncated image"):
        decode(spoiled)
    decode.close()
