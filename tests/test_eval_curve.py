from __future__ import annotations

import math

import pytest
import torch

from ugrl.errors import UgrlError
from ugrl.eval.curve import GRID, ThresholdCurve
from ugrl.eval.metrics import Confusion
from ugrl.method.pseudo import pseudo_labels
from ugrl.types import IGNORE

SIZE = (9, 13)


def batch_of(seed: int, dtype: torch.dtype = torch.float32):
    """Four images: two classes, none, one, three; maps with values on thresholds, ties, and ignored pixels."""
    g = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([[0, 0], [0, 2], [2, 1], [3, 0], [3, 1], [3, 2]])
    cam = torch.rand(len(pairs), *SIZE, generator=g, dtype=dtype)
    cam = torch.where(torch.rand(cam.shape, generator=g) < 0.5, (cam * 20).round() / 20, cam).clamp(max=0.999)
    mask = torch.randint(0, 4, (4, *SIZE), generator=g, dtype=torch.uint8)
    mask[torch.rand(mask.shape, generator=g) < 0.2] = IGNORE
    return cam, pairs, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_threshold_equals_labels_made_at_it(dtype):
    grid = (0.05, 0.2, 0.3, 0.45, 0.5, 0.95)
    curve = ThresholdCurve(4, grid)
    slow = {t: Confusion(4) for t in grid}
    boxes = torch.tensor([[0, SIZE[0], 0, SIZE[1]]] * 4)
    for seed in range(3):
        cam, pairs, mask = batch_of(seed, dtype)
        curve.add(cam, pairs, mask)
        for t, found in slow.items():
            found.add(pseudo_labels(cam, pairs, boxes, batch=4, high=t, low=t)[0], mask)
    for t, found in slow.items():
        assert torch.equal(curve.at(t).matrix_CC, found.matrix_CC)
    mious = [found.miou for found in slow.values()]
    assert curve.mious() == mious and len(set(mious)) > 3
    threshold, confusion = curve.best()
    assert threshold == grid[mious.index(max(mious))] and confusion.miou == max(mious)


def test_best_is_the_lowest_of_equals():
    curve = ThresholdCurve(2, (0.1, 0.2, 0.3, 0.6))
    curve.add(torch.tensor([[[0.15, 0.5]]]), torch.tensor([[0, 0]]), torch.tensor([[[0, 1]]]))
    assert curve.mious() == [0.25, 1.0, 1.0, 0.25] and curve.best()[0] == 0.2


def test_images_without_a_class_are_background():
    curve = ThresholdCurve(3)
    curve.add(torch.zeros(0, 2, 2), torch.zeros(0, 2, dtype=torch.int64), torch.tensor([[[0, 1], [2, IGNORE]]]))
    assert curve.at(GRID[0]).matrix_CC[:, 0].tolist() == [1, 1, 1]
    assert int(curve.at(0.5).matrix_CC.sum()) == 3


def test_nothing_counted_has_no_score():
    assert math.isnan(ThresholdCurve(3).best()[1].miou)


@pytest.mark.parametrize("grid", [(), (0.3, 0.2), (0.2, 0.2), (0.0, 0.5), (0.5, 1.0)])
def test_grids_that_are_refused(grid):
    with pytest.raises(UgrlError, match="ascending"):
        ThresholdCurve(3, grid)


def test_wrong_uses():
    curve, (cam, pairs, mask) = ThresholdCurve(3), batch_of(0)
    with pytest.raises(UgrlError, match="labels from 0 to 3"):
        curve.add(cam, pairs, mask)
    with pytest.raises(UgrlError, match="expected one map"):
        curve.add(cam[:, 1:], pairs, mask)
    with pytest.raises(UgrlError, match="the nearest is 0.5"):
        curve.at(0.503)
    curve.reduce()
    with pytest.raises(UgrlError, match="after reduce"):
        curve.add(cam, pairs, mask)
