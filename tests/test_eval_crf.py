from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.reference_metrics import ref_gaussian_filter
from ugrl.errors import UgrlError
from ugrl.eval.crf import PermutohedralLattice, dense_crf, gaussian_filter
from ugrl.eval.metrics import Confusion


def two_regions(size: int = 24):
    """A noisy image of a disc, its truth, and a probability map that is noisy and displaced."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    truth = ((y - size / 2) ** 2 + (x - size / 2) ** 2 < (size / 3) ** 2).astype(np.int64)
    image = np.where(truth[..., None] == 1, [200, 80, 60], [60, 120, 180]) + rng.normal(0, 2, (size, size, 3))
    logit = 1.5 * (2 * np.roll(truth, 2, 1) - 1) + rng.normal(0, 1.5, truth.shape)
    p = 1 / (1 + np.exp(-logit))
    return image.clip(0, 255).astype(np.uint8), truth, np.stack([1 - p, p]).astype(np.float32)


def features(image, xy, rgb):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.concatenate([np.stack([y, x], -1) / xy, image.astype(np.float64) / rgb], -1).reshape(-1, 5)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_barycentric_weights_are_a_partition(d):
    points = 3 * torch.randn(500, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    lattice = PermutohedralLattice(points)
    weights = lattice._slice.to_dense()
    assert weights.min() > -1e-6
    torch.testing.assert_close(weights.sum(1), torch.ones(500))
    assert int((weights > 0).sum(1).max()) <= d + 1


def test_lattice_filter_is_close_to_the_exact_gaussian():
    image, truth, _ = two_regions(16)
    f = features(image, 6.0, 20.0)
    values = np.stack([truth.reshape(-1), np.linspace(0, 1, 256), np.ones(256)], 1).astype(np.float64)
    exact = ref_gaussian_filter(f, values)
    lattice = PermutohedralLattice(torch.from_numpy(f)).filter(torch.from_numpy(values).float()).double().numpy()
    a, b = exact[:, :2] / exact[:, 2:], lattice[:, :2] / lattice[:, 2:]
    assert np.abs(a - b).mean() < 0.02 and np.abs(a - b).max() < 0.08
    # The filter does mix: the values themselves are far from their means.
    assert np.abs(values[:, 1] - a[:, 1]).mean() > 0.1


def test_lattice_filter_is_symmetric_and_linear():
    g = torch.Generator().manual_seed(1)
    lattice = PermutohedralLattice(2 * torch.randn(200, 3, dtype=torch.float64, generator=g))
    u, v = torch.rand(200, 1, generator=g), torch.rand(200, 1, generator=g)
    torch.testing.assert_close(lattice.filter(u + 2 * v), lattice.filter(u) + 2 * lattice.filter(v))
    one, two = float((u * lattice.filter(v)).sum()), float((v * lattice.filter(u)).sum())
    assert one == pytest.approx(two, rel=0.02)


def test_position_filter_equals_loops():
    values = torch.rand(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y, x = np.mgrid[:6, :7]
    want = ref_gaussian_filter(np.stack([y, x], -1).reshape(-1, 2) / 2.5, values.flatten(1).t().numpy())
    got = gaussian_filter(values, 2.5).flatten(1).t()
    torch.testing.assert_close(got, torch.from_numpy(want))


def exact_mean_field(probs, image, iterations, pos_w, pos_std, bi_w, bi_std, rgb_std):
    """The same model with dense kernels."""
    classes, height, width = probs.shape
    y, x = np.mgrid[:height, :width]
    total = 0.0
    for weight, f in (
        (pos_w, np.stack([y, x], -1).reshape(-1, 2) / pos_std),
        (bi_w, features(image, bi_std, rgb_std)),
    ):
        kernel = np.exp(-0.5 * ((f[:, None] - f[None]) ** 2).sum(-1))
        norm = 1 / np.sqrt(kernel.sum(1))
        total = total + weight * norm[:, None] * kernel * norm[None]
    unary = np.log(probs.reshape(classes, -1).astype(np.float64))
    belief = np.exp(unary) / np.exp(unary).sum(0)
    for _ in range(iterations):
        logits = unary + belief @ total
        belief = np.exp(logits - logits.max(0))
        belief /= belief.sum(0)
    return belief.reshape(probs.shape)


def test_crf_is_close_to_exact_mean_field():
    image, _, probs = two_regions()
    settings = dict(iterations=3, pos_w=0.5, pos_xy_std=2.0, bi_w=1.0, bi_xy_std=6.0, bi_rgb_std=20.0)
    got = dense_crf(probs, image, **settings)
    want = exact_mean_field(probs, image, *settings.values())
    assert np.abs(got - want).mean() < 0.005 and np.abs(want - probs).mean() > 0.08
    assert (got.argmax(0) == want.argmax(0)).mean() > 0.98


def test_crf_sharpens_a_noisy_map():
    image, truth, probs = two_regions()
    before, after = Confusion(2), Confusion(2)
    sharp = dense_crf(probs, image)
    before.add(torch.from_numpy(probs.argmax(0)), torch.from_numpy(truth))
    after.add(torch.from_numpy(sharp.argmax(0)), torch.from_numpy(truth))
    assert before.miou < 0.75 and after.miou > 0.9
    np.testing.assert_allclose(sharp.sum(0), 1, atol=1e-5)


def test_negligible_classes_take_no_part():
    image, _, probs = two_regions()
    tiny = np.full((3, *probs.shape[1:]), 1e-4, np.float32)
    out = dense_crf(np.concatenate([probs, tiny]), image, iterations=2)
    assert (out[2:] == 0).all()
    np.testing.assert_allclose(out[:2], dense_crf(probs, image, iterations=2), atol=1e-6)


def test_no_iteration_and_bad_arguments():
    image, _, probs = two_regions()
    np.testing.assert_allclose(dense_crf(probs, image, iterations=0), probs, atol=1e-5)
    with pytest.raises(UgrlError, match="expected CHW and HW3"):
        dense_crf(probs, image[:-1])
    with pytest.raises(UgrlError, match="deviations"):
        dense_crf(probs, image, bi_xy_std=0.0)
    with pytest.raises(UgrlError, match="lattice cells"):
        PermutohedralLattice(torch.tensor([[0.0] * 5, [math.pi * 1e6] * 5], dtype=torch.float64))
