"""The two sides of the loader's benchmark make the same crops, and a difference does not pass."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bench.baseline.loader import PublicDataset, stack
from bench.loader import Sides, cache_rates, local_epochs, photos, torch_epoch, write_shards
from bench.measure import Different
from ugrl.data.augment import Augment
from ugrl.data.reader import ShardReader

AUGMENT = Augment(128, 1, 0.15, 0.6)


@pytest.fixture(scope="module")
def rows():
    return photos(8)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("on_device", ["none", "normalize", "augment"])
def test_both_sides_make_the_same_crops(rows, on_device, views):
    assert Sides(rows, AUGMENT, views).far(on_device).startswith("crops differ by at most")


def test_a_shifted_crop_is_noticed(rows, monkeypatch):
    real = Augment.floats

    def shifted(self, image_HW3, cut, out_3CC):
        real(self, np.roll(image_HW3, 1, axis=1), cut, out_3CC)

    monkeypatch.setattr(Augment, "floats", shifted)
    with pytest.raises(Different, match="crops .none. differ by"):
        Sides(rows, AUGMENT).far("none")


def test_dirty_padding_is_noticed(rows, monkeypatch):
    real = Augment.floats

    def dirty(self, image_HW3, cut, out_3CC):
        real(self, image_HW3, cut, out_3CC)
        y0, _, x0, _ = cut.box_4
        if y0 and x0:
            out_3CC[:, 0, 0] = 1

    monkeypatch.setattr(Augment, "floats", dirty)
    with pytest.raises(Different, match="padding is not 0"):
        Sides(rows, AUGMENT).far("none")


def test_the_loaders_see_every_row(rows, tmp_path):
    folder = write_shards(rows, tmp_path / "shards")
    assert local_epochs(folder, AUGMENT, 0) == torch_epoch(folder, AUGMENT, 0) == 16
    dataset = PublicDataset(lambda: ShardReader(folder, "train"), AUGMENT, 0, 2)
    first, second = stack([dataset[k] for k in range(len(dataset))])
    assert first.shape == second.shape == (8, 3, 128, 128)
    assert max(Counter(x.numpy().tobytes() for x in (*first, *second)).values()) == 1
    assert all(rate > 0 for rate in cache_rates(rows, AUGMENT))
