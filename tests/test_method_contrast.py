"""The contrastive loss against loops, finite differences and the N×N matrix; and its memory."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from bench.baseline.contrast import naive
from bench.memory import LiveBytes
from tests.reference import contrastive_loss_loops, numeric_gradient
from ugrl.errors import ConfigError
from ugrl.method import contrast
from ugrl.method.contrast import contrastive_loss

TAUS = (0.02, 0.1, 1.0)  # the first is below the fixed shift


def scene(seed: int = 0, B: int = 3, D: int = 4, h: int = 4, w: int = 4, classes: int = 3):
    """Raw embeddings (float64), labels with ignored pixels, a pool that misses some."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(B, D, h, w, generator=g, dtype=torch.float64)
    labels = torch.randint(0, classes, (B, h, w), generator=g)
    labels[torch.rand(B, h, w, generator=g) < 0.2] = 255
    return raw, labels, torch.rand(B, h, w, generator=g) < 0.7


def dense(emb: Tensor, labels: Tensor, pool: Tensor, tau: float, scope: str = "image") -> Tensor:
    """The same loss with every matrix in full, differentiable, for sets that may be empty."""
    B, D, h, w = emb.shape
    x = emb.flatten(2).transpose(1, 2).reshape(-1, D)
    image = torch.arange(B).repeat_interleave(h * w)
    c, usable = labels.flatten(), (pool & (labels != 255)).flatten()
    pair = usable[:, None] & usable & ~torch.eye(len(c), dtype=torch.bool)
    if scope == "image":
        pair &= image[:, None] == image
    positive = pair & (c[:, None] == c)
    anchor = positive.any(1)
    s = (x @ x.T / tau)[anchor]
    terms = s.masked_fill(~pair[anchor], -torch.inf).logsumexp(1) - s.masked_fill(
        ~positive[anchor], -torch.inf
    ).logsumexp(1)
    return terms.sum() / max(int(anchor.sum()), 1)


def value_and_grad(f, raw: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    raw = raw.clone().requires_grad_()
    loss = f(F.normalize(raw, dim=1))
    return loss.detach(), torch.autograd.grad(loss * scale, raw)[0]


def degenerate(name: str):
    raw, labels, pool = scene(1)
    if name == "no_positive":
        pool[:] = False
        pool[:, 0, :3] = True
        labels[:, 0, :3] = torch.arange(3)
    elif name == "one_class":
        labels[labels != 255] = 2
    elif name == "all_ignored":
        labels[:] = 255
    elif name == "empty_pool":
        pool[1] = False
    elif name == "pool_off":
        pool[:] = False
    elif name == "equal":
        raw[:] = raw[:1, :, :1, :1]
    elif name == "one_negative":
        labels[0], labels[0, 0, 0], pool[0] = 1, 0, True
    return raw, labels, pool


CASES = ("plain", "no_positive", "one_class", "all_ignored", "empty_pool", "pool_off", "equal", "one_negative")


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case, tau, scope):
    raw, labels, pool = degenerate(case)
    expected = contrastive_loss_loops(F.normalize(raw, dim=1).numpy(), labels.numpy(), pool.numpy(), tau, scope)
    _, expected_grad = value_and_grad(lambda e: dense(e, labels, pool, tau, scope), raw, 2.5)
    for tile in (1, 4, 7, 1000):
        loss, grad = value_and_grad(
            lambda e, tile=tile: contrastive_loss(e, labels, pool, tau=tau, scope=scope, tile=tile), raw, 2.5
        )
        assert loss.dtype == torch.float64
        assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-13), tile
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)
        if case in ("one_class", "all_ignored", "pool_off") or (case == "no_positive" and scope == "image"):
            assert loss == 0 and not grad.any()
    if case == "plain":
        assert expected > 0 and expected_grad.any()


@pytest.mark.parametrize("tau", TAUS)
def test_gradient_equals_differences_of_the_loops(tau):
    raw, labels, pool = scene(2, B=2, D=3, h=3, w=3)

    def loops(values):
        return contrastive_loss_loops(
            F.normalize(torch.from_numpy(values), dim=1).numpy(), labels.numpy(), pool.numpy(), tau
        )

    expected = torch.from_numpy(numeric_gradient(loops, raw.numpy()))
    for tile in (2, 100):
        _, grad = value_and_grad(lambda e, tile=tile: contrastive_loss(e, labels, pool, tau=tau, tile=tile), raw)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("tile", [4, 1000])
def test_gradcheck(tau, tile, scope):
    raw, labels, pool = scene(3, B=2, D=3, h=3, w=3)
    raw.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r: contrastive_loss(F.normalize(r, dim=1), labels, pool, tau=tau, tile=tile, scope=scope), (raw,)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_whole_pool_and_memory_layout(layout):
    raw, labels, _ = scene(4)
    pool = torch.ones_like(labels, dtype=torch.bool)  # K = 1
    a, grad_a = value_and_grad(lambda e: dense(e, labels, pool, 0.1), raw)
    raw = raw.contiguous(memory_format=layout)
    b, grad_b = value_and_grad(lambda e: contrastive_loss(e, labels, pool, tau=0.1, tile=5), raw)
    torch.testing.assert_close(b, a, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_b, grad_a, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tau", TAUS)
def test_nearly_perfect_anchors_keep_their_digits(tau):
    # Classes are orthogonal, all members equal: ℓ = log(1 + n_neg/n_pos·e^(−1/τ)), far below an ulp of lse.
    labels = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    emb = torch.zeros(1, 2, 1, 6, dtype=torch.float64)
    emb[0, 0, 0, :3] = emb[0, 1, 0, 3:] = 1
    expected = math.log1p(1.5 * math.exp(-1 / tau))
    for tile in (2, 100):
        loss = contrastive_loss(emb, labels, torch.ones_like(labels, dtype=torch.bool), tau=tau, tile=tile)
        assert float(loss) == pytest.approx(expected, rel=1e-12)
        single = contrastive_loss(emb.float(), labels, torch.ones_like(labels, dtype=torch.bool), tau=tau, tile=tile)
        assert single.dtype == torch.float32 and float(single) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tau", [0.01, 0.03, 1.0])
def test_float32_survives_the_worst_similarities(tau):
    # Positives are opposite, negatives equal: ℓ ≈ 2/τ, the widest range of exponents there is.
    labels = torch.tensor([[[0, 0, 1, 1]]])
    emb = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4).div(math.sqrt(3)).clone()
    pool = torch.ones_like(labels, dtype=torch.bool)
    exact, exact_grad = value_and_grad(lambda e: dense(e, labels, pool, tau), emb.double())
    for tile in (1, 3, 100):
        emb = emb.detach().requires_grad_()
        loss = contrastive_loss(emb, labels, pool, tau=tau, tile=tile)
        (grad,) = torch.autograd.grad(loss, emb)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
        assert grad.isfinite().all()
    x = emb.detach().double().requires_grad_()
    (unprojected,) = torch.autograd.grad(dense(x, labels, pool, tau), x)
    torch.testing.assert_close(grad.double(), unprojected, rtol=1e-3, atol=1e-3 * float(unprojected.abs().max()))
    assert exact_grad.isfinite().all()


def test_half_precision_embeddings_and_autocast_use_float32():
    raw, labels, pool = scene(5)
    half = F.normalize(raw, dim=1).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(half, labels, pool, tau=0.1)
        single = contrastive_loss(half.detach().float(), labels, pool, tau=0.1)
    (grad,) = torch.autograd.grad(loss, half)
    assert loss.dtype == torch.float32 and loss == single.detach()
    assert grad.dtype == torch.bfloat16 and grad.any()


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_no_matrix_of_all_pairs_exists(scope):
    N, D = 4096, 64
    g = torch.Generator().manual_seed(0)
    emb = F.normalize(torch.randn(1, D, 64, 64, generator=g), dim=1).requires_grad_()
    labels = torch.randint(0, 4, (1, 64, 64), generator=g)
    pool = torch.ones_like(labels, dtype=torch.bool)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().nbytes())
        return x

    with LiveBytes() as tiled, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = contrastive_loss(emb, labels, pool, tau=0.1, scope=scope, tile=256)
        (grad,) = torch.autograd.grad(loss, emb)
    rows = N * D * 4
    assert saved and sum(saved) <= 2.5 * rows
    assert tiled.largest <= 1.01 * rows
    assert tiled.peak <= 4 * rows + 8 * 256 * 256 * 4
    with LiveBytes() as full:  # the ruler measures: it sees the matrix where there is one
        (expected,) = torch.autograd.grad(naive(emb, labels, pool, 0.1), emb)
    assert full.largest >= N * N * 4
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


EXTREMES = {  # h, w, classes
    "one_anchor": (1, 1, 1),
    "pair": (1, 2, 1),
    "two_classes": (1, 2, 2),
    "one_class": (7, 9, 1),
    "many_classes": (15, 17, 200),
}


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("tau", [0.01, 0.02, 0.03, 0.05, 0.1, 1.0])
@pytest.mark.parametrize("name", EXTREMES)
def test_any_number_of_anchors_and_classes(name, tau, scope):
    h, w, classes = EXTREMES[name]
    raw, labels, _ = scene(10, B=2, D=5, h=h, w=w, classes=classes)
    labels[labels == 255] = 0
    if name == "two_classes":
        labels[:] = torch.arange(2)
    pool = torch.ones_like(labels, dtype=torch.bool)
    expected, expected_grad = value_and_grad(lambda e: dense(e, labels, pool, tau, scope), raw)
    for tile in (16, 1000):
        loss, grad = value_and_grad(
            lambda e, tile=tile: contrastive_loss(e, labels, pool, tau=tau, scope=scope, tile=tile), raw
        )
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
        single = contrastive_loss(F.normalize(raw, dim=1).float(), labels, pool, tau=tau, scope=scope, tile=tile)
        assert float(single) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


def rank_jobs(raw: Tensor, labels: Tensor, pool: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [
        value_and_grad(
            lambda e: contrastive_loss(e, labels, pool, tau=tau, scope=scope, tile=tile),  # noqa: B023
            raw,
        )
        for scope in ("image", "batch")
        for tau in (0.02, 0.1)
        for tile in (3, 1000)
    ]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        raw, labels, pool = scene(11, B=4)
        mine = slice(2 * rank, 2 * rank + 2)
        torch.save(rank_jobs(*(x[mine] for x in (raw, labels, pool))), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_one():
    raw, labels, pool = scene(11, B=4)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(folder,), nprocs=2)
        ranks = [torch.load(Path(folder) / f"{r}.pt") for r in range(2)]
    whole = rank_jobs(raw, labels, pool)
    for one, a, b in zip(whole, *ranks, strict=True):
        torch.testing.assert_close((a[0] + b[0]) / 2, one[0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(torch.cat([a[1], b[1]]) / 2, one[1], rtol=1e-10, atol=1e-13)
        assert one[0] > 0 and one[1].any()


def test_cpu_never_imports_triton_by_itself():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ugrl.errors import ConfigError\n"
        "from ugrl.method.contrast import contrastive_loss\n"
        "x, c = torch.ones(1, 2, 1, 3), torch.tensor([[[0, 0, 1]]])\n"
        "assert contrastive_loss(x, c, c < 255, tau=0.1).isfinite()\n"
        "assert 'ugrl.method.contrast_triton' not in sys.modules\n"
        "try: contrastive_loss(x, c, c < 255, tau=0.1, kernel='triton')\n"
        "except ConfigError as error: assert 'installed triton' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pairs_visit_upper_tiles_once_and_most_need_no_mask():
    counts = [300, 0, 500, 200]
    tiles = contrast.tiles_of(counts, 0, 100, True)
    assert [(t.start, t.stop) for t in tiles] == [(i, i + 100) for i in range(0, 1000, 100)]
    pairs = list(contrast._pairs(tiles))
    assert len(pairs) == 55 and len(set(pairs)) == 55
    assert {a.relation(b) for a, b in pairs} == {"same", "different"}
    uneven = contrast.tiles_of([150, 250], 0, 100, True)
    kinds = [a.relation(b) for a, b in contrast._pairs(uneven)]
    assert (uneven[1].low, uneven[1].high) == (0, 1) and kinds.count("mixed") == 4


def test_no_gradient_is_computed_when_none_is_wanted(monkeypatch):
    raw, labels, pool = scene(6)
    emb = F.normalize(raw, dim=1)
    wanted = contrastive_loss(emb.clone().requires_grad_(), labels, pool, tau=0.1)
    monkeypatch.setattr(contrast, "_gradient", lambda *_: pytest.fail("gradient sweep without a gradient"))
    assert contrastive_loss(emb, labels, pool, tau=0.1) == wanted
    with torch.no_grad():
        assert contrastive_loss(emb.clone().requires_grad_(), labels, pool, tau=0.1) == wanted


def test_bad_values_are_refused():
    raw, labels, pool = scene(0)
    for options, word in (
        ({"tau": 0.0}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"tau": 0.1, "tile": 0}, "tile"),
        ({"tau": 0.1, "scope": "world"}, "contrast"),
        ({"tau": 0.1, "kernel": "cuda"}, "kernel"),
    ):
        with pytest.raises(ConfigError, match=word):
            contrastive_loss(raw, labels, pool, **options)
