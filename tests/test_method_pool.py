"""The reliable pool against its loops, and what each kind promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference import reliable_pool_loops, stratified_quota_loops
from ugrl.errors import ConfigError
from ugrl.method.pool import reliable_pool, stratified_quota
from ugrl.seeding import derive, hash_uniform

KINDS = ("stratified", "ranked", "random")


def scene(seed: int, B: int = 3, C: int = 5, h: int = 7, w: int = 6, levels: int = 4):
    """Labels with a missing class and ignored pixels, u, and confidences with many ties."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C - 1, (B, h, w), generator=g)
    labels[torch.rand(B, h, w, generator=g) < 0.25] = 255
    u = torch.rand(B, C, generator=g) * 2
    conf = torch.randint(0, levels, (B, h, w), generator=g).float()
    keys = torch.tensor([derive(seed, b) for b in range(B)])
    return labels, u, conf, keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.01, 0.35, 0.8, 1.0])
def test_pool_equals_loops(kind, keep):
    for seed in range(6):
        labels, u, conf, keys = scene(seed)
        labels[1, :, :] = 255 if seed == 3 else labels[1]
        pool = reliable_pool(labels, u, conf, keep=keep, kind=kind, keys_B=keys)
        ties = hash_uniform(keys, labels[0].numel()).view(labels.shape).numpy()
        expected = reliable_pool_loops(labels.numpy(), u.double().numpy(), conf.numpy(), keep, kind, ties)
        assert pool.dtype == torch.bool and pool.shape == labels.shape
        assert np.array_equal(pool.numpy(), expected), (kind, keep, seed)


def test_quota_equals_bisection():
    rng = np.random.default_rng(0)
    for _ in range(300):
        C = int(rng.integers(1, 9))
        areas = rng.integers(0, rng.choice([3, 10, 400]), size=C)
        u = rng.uniform(0, 2, size=C)
        if areas.sum() == 0:
            continue
        budget = int(rng.integers(1, areas.sum() + 1))
        expected = stratified_quota_loops(areas.tolist(), u.tolist(), budget)
        quota = stratified_quota(torch.tensor(areas)[None], torch.tensor(u)[None], torch.tensor([budget]))[0]
        assert quota.tolist() == expected, (areas, u, budget)
        assert quota.sum() == max(budget, np.minimum(areas, 2).sum())
        assert (quota.numpy() <= areas).all() and (quota.numpy() >= np.minimum(areas, 2)).all()


def test_quota_of_a_full_class_goes_to_the_others():
    area, u = torch.tensor([[100, 100, 10, 0]]), torch.tensor([[2.0, 2.0, 0.0, 0.0]])
    # By area·e^−u class 2 would get 10/(10 + 200·e^−2) = 27 % of 42, but has 10; the rest is split evenly.
    assert stratified_quota(area, u, torch.tensor([42])).tolist() == [[16, 16, 10, 0]]
    # Equal remainders: the lower class takes the odd one.
    assert stratified_quota(area, u, torch.tensor([43])).tolist() == [[17, 16, 10, 0]]
    # The minimum goes before the budget.
    assert stratified_quota(area, u, torch.tensor([1])).tolist() == [[2, 2, 2, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_ignored(kind):
    labels, u, conf, keys = scene(11, levels=1000)
    labels[2] = 255
    pool = reliable_pool(labels, u, conf, keep=0.4, kind=kind, keys_B=keys)
    valid = (labels != 255).flatten(1).sum(1)
    assert not (pool & (labels == 255)).any()
    assert pool.flatten(1).sum(1).tolist() == [int(0.4 * n + 0.5) for n in valid.tolist()]
    assert reliable_pool(labels, u, conf, keep=1.0, kind=kind, keys_B=keys).equal(labels != 255)
    one = torch.full((1, 4, 4), 255)
    one[0, 2, 1] = 3
    assert reliable_pool(one, u[:1], conf[:1, :4, :4], keep=0.01, kind=kind, keys_B=keys[:1]).equal(one != 255)


def test_ranked_takes_whole_classes_and_stratified_does_not():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, :, 5:] = 1
    u, conf, keys = (
        torch.tensor([[0.1, 0.9]]),
        torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([7]),
    )
    ranked = reliable_pool(labels, u, conf, keep=0.35, kind="ranked", keys_B=keys)
    assert set(labels[ranked].tolist()) == {0}
    stratified = reliable_pool(labels, u, conf, keep=0.35, kind="stratified", keys_B=keys)
    assert set(labels[stratified].tolist()) == {0, 1}
    for c in (0, 1):
        inside, outside = conf[stratified & (labels == c)], conf[~stratified & (labels == c)]
        assert inside.min() >= outside.max()
    # A more uncertain class gets a smaller share than its area.
    assert stratified[labels == 1].float().mean() < stratified[labels == 0].float().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_batch(kind):
    labels, u, conf, keys = scene(5)
    conf = torch.ones_like(conf)  # ties everywhere
    whole = reliable_pool(labels, u, conf, keep=0.5, kind=kind, keys_B=keys)
    for b in range(len(labels)):
        s = slice(b, b + 1)
        assert reliable_pool(labels[s], u[s], conf[s], keep=0.5, kind=kind, keys_B=keys[s])[0].equal(whole[b])
    assert not reliable_pool(labels, u, conf, keep=0.5, kind=kind, keys_B=keys + 1).equal(whole)


def test_bad_values_are_refused():
    labels, u, conf, keys = scene(0)
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="keep"):
            reliable_pool(labels, u, conf, keep=keep, keys_B=keys)
    with pytest.raises(ConfigError, match="pool"):
        reliable_pool(labels, u, conf, keep=0.5, kind="best", keys_B=keys)
