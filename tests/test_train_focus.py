"""The heads answer only where a loss reads them: the same values and gradients as everywhere and then chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.errors import ConfigError
from ugrl.method.losses import affinity_loss, eligible_tokens
from ugrl.method.pool import chosen, pool_bound, positions, reliable_pool
from ugrl.model.affinity import AffinityHead
from ugrl.model.decoder import ProjectionHead, unit
from ugrl.model.encoder import rows
from ugrl.train.loop import Trainer
from ugrl.types import IGNORE


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("focus") / "shards"
    prepare(ShapesSource(ShapesSpec(train=24, val=8, size=48)), out)
    return out


def test_unit_is_normalize_with_its_gradient() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0.0
    x[1, 1] *= 1e-8  # shorter than eps: divided by eps, not by its length
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = unit(mine)
    torch.testing.assert_close(y, F.normalize(plain, dim=-1, eps=1e-6), rtol=1e-14, atol=1e-14)
    (y * weight).sum().backward()
    (F.normalize(plain, dim=-1, eps=1e-6) * weight).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-9, atol=1e-9)
    # finite differences, away from the kink at eps
    assert torch.autograd.gradcheck(unit, (x[2].clone().requires_grad_(),))


@pytest.mark.parametrize("norm", ["sync_batch", "group"])
def test_embeddings_at_positions_are_those_of_the_whole_map(norm: str) -> None:
    torch.manual_seed(0)
    head = ProjectionHead(8, 6, norm=norm).double().train()
    at = torch.tensor([[0, 5, 11, 3], [7, 2, 1, 10]])
    weight = torch.randn(2, 6, 1, 4, dtype=torch.float64)
    found = []
    for focus in (True, False):
        head.zero_grad()
        z = torch.randn(2, 8, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        e = head(z, at) if focus else head(z).flatten(2).gather(2, at[:, None].expand(-1, 6, -1))[:, :, None]
        (e * weight).sum().backward()
        found.append([e, z.grad, *(p.grad.clone() for p in head.parameters())])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_affinity_between_positions_is_a_part_of_the_whole(kind: str) -> None:
    torch.manual_seed(0)
    head = AffinityHead(4, kind, head_dim=3).double()
    at = torch.tensor([[0, 5, 11, 11], [7, 2, 2, 2]])
    found = []
    for focus in (True, False):
        g = torch.Generator().manual_seed(3)
        leaves = [torch.randn(2, 12, 6, dtype=torch.float64, generator=g).requires_grad_() for _ in range(4)]
        pairs = ((leaves[0], leaves[1]), (leaves[2], leaves[3]))
        head.zero_grad()
        if focus:
            a = head.from_pairs(pairs, 2, at)
        else:
            full = head.from_pairs(pairs, 2)
            a = full.gather(1, at[:, :, None].expand(-1, -1, 12)).gather(2, at[:, None].expand(-1, 4, -1))
        a.square().sum().backward()
        found.append([a, *(x.grad for x in leaves), *(p.grad.clone() for p in head.parameters())])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-10)


def _random_labels(seed: int, share: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (3, 5, 6), generator=g)
    labels[torch.rand(3, 5, 6, generator=g) < 0.2] = IGNORE
    return labels, torch.rand(3, 5, 6, generator=g) < share


@pytest.mark.parametrize("seed, share", [(0, 0.5), (1, 0.1), (2, 1.0), (3, 0.0)])
def test_affinity_loss_on_tokens(seed: int, share: float) -> None:
    labels, eligible = _random_labels(seed, share)
    eligible[0] &= share == 1.0  # an image without any
    tokens = eligible_tokens(labels, eligible)
    usable = (eligible & (labels != IGNORE)).flatten(1)
    assert tokens.shape[1] == max(1, int(usable.sum(1).max()))
    full = torch.randn(3, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    plain = affinity_loss(full, labels, eligible, radius=2)
    (grad,) = torch.autograd.grad(plain, full)
    n = tokens.shape[1]
    part = full.gather(1, tokens[:, :, None].expand(-1, -1, 30)).gather(2, tokens[:, None].expand(-1, n, -1))
    mine = affinity_loss(part, labels, eligible, radius=2, tokens_Bn=tokens)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(mine, full)[0], grad, rtol=1e-12, atol=1e-14)
    assert (plain.item() > 0) == (share > 0)
    with pytest.raises(ConfigError, match="affinity: shape"):
        affinity_loss(full, labels, eligible, tokens_Bn=tokens)


def test_rows_pick_and_give_back() -> None:
    x = torch.arange(24.0).view(2, 4, 3).requires_grad_()
    picked = rows(x, torch.tensor([[3, 0], [1, 1]]))
    assert picked[0, 0].tolist() == [9, 10, 11] and picked[1, 1].tolist() == [15, 16, 17]
    picked.sum().backward()
    assert x.grad is not None and x.grad[..., 0].tolist() == [[1, 0, 0, 1], [0, 2, 0, 0]]


@pytest.mark.parametrize("keep", [0.02, 0.35, 1.0])
@pytest.mark.parametrize("kind", ["stratified", "ranked", "random"])
def test_no_pool_is_larger_than_its_bound(kind: str, keep: float) -> None:
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        classes = 2 + 5 * (seed % 4)
        labels = torch.randint(0, classes, (2, 6, 7), generator=g)
        labels[torch.rand(2, 6, 7, generator=g) < 0.1 * seed] = IGNORE
        u, conf = torch.rand(2, classes, generator=g), torch.rand(2, 6, 7, generator=g)
        pool = reliable_pool(labels, u, conf, keep=keep, kind=kind, keys_B=torch.tensor([seed, seed + 1]))
        most = pool_bound(42, classes, keep)
        at = positions(pool, most)
        assert int(pool.flatten(1).sum(1).max()) <= most == at.shape[1]
        assert int(chosen(pool, at).sum()) == int(pool.sum())
        assert all(len(set(row)) == most for row in at.tolist())


@pytest.mark.parametrize("setting", ["IV", "II"])
def test_a_bound_instead_of_the_count_changes_no_loss(setting: str, shards: Path) -> None:
    """What a GPU does (no wait for the pool's size, affinity of all positions) against what a CPU does."""
    found = []
    for counts in (True, False):
        tree = tiny_tree()
        tree["method"]["setting"] = setting
        trainer = Trainer(build(tree), shards=shards, out=None, quiet=True, device="cpu", dtype=torch.float64)
        trainer.step_fn.target_maker.counts_on_host = counts
        trainer.net.train()
        batches = trainer.loader(trainer.loader_spec())
        for step in range(4):
            out = trainer.step_fn(next(batches).to("cpu", torch.float64), step)
            out.loss.backward()
            if step < 3:
                trainer.optimizer.step(step)
                trainer.optimizer.zero_grad()
        found.append([out.loss.detach(), *(p.grad for p in trainer.net.parameters())])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)
