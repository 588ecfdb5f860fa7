"""Classification, segmentation and affinity losses against loops; every loss on two ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from bench.memory import LiveBytes
from tests.contracts import check_loss as check
from tests.reference import (
    affinity_loss_loops,
    bilinear_loops,
    classification_loss_loops,
    sample_nearest_loops,
    segmentation_loss_loops,
)
from ugrl.errors import ConfigError
from ugrl.grid import sample_nearest
from ugrl.method.contrast import contrastive_loss
from ugrl.method.losses import (
    affinity_loss,
    classification_loss,
    segmentation_loss,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Classification ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", ["mixed", "none", "all"])
def test_classification_equals_loops(tags):
    g = generator(0)
    x = torch.randn(3, 4, generator=g, dtype=torch.float64) * 5
    y = {"mixed": (torch.rand(3, 4, generator=g) < 0.5), "none": torch.zeros(3, 4), "all": torch.ones(3, 4)}[tags]
    y, w = y.float(), torch.rand(3, 4, generator=g, dtype=torch.float64) + 0.3
    check(lambda v: classification_loss(v, y, w), lambda v: classification_loss_loops(v, y.numpy(), w.numpy()), x)


def test_classification_weights_touch_only_present_classes():
    x, y = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    base = classification_loss(x, y, torch.ones(1, 2))
    assert classification_loss(x, y, torch.tensor([[1.0, 9.0]])) == base
    assert classification_loss(x, y, torch.tensor([[3.0, 9.0]])) == pytest.approx(2.0 * base.item())
    w = torch.ones(1, 2, requires_grad=True)
    assert classification_loss(x.requires_grad_(), y, w).grad_fn is not None
    classification_loss(x, y, w).backward()
    assert w.grad is None
    extreme = classification_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2))
    assert extreme == 1e4


# Segmentation --------------------------------------------------------------------------------------


def seg_case(name: str):
    g = generator(1)
    seg = torch.randn(2, 3, 2, 3, generator=g, dtype=torch.float64) * 2
    size = (2, 3) if name == "same_size" else (5, 7)
    labels = torch.randint(0, 3, (2, *size), generator=g)
    labels[torch.rand(2, *size, generator=g) < 0.2] = 255
    if name == "no_background":
        labels[labels == 0] = 255
    elif name == "no_foreground":
        labels[(labels == 1) | (labels == 2)] = 255
    elif name == "one_image_ignored":
        labels[1] = 255
    elif name == "all_ignored":
        labels[:] = 255
    return seg, labels, torch.rand(2, 3, generator=g, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("balance", ["none", "fg_bg"])
@pytest.mark.parametrize(
    "case", ["plain", "same_size", "no_background", "no_foreground", "one_image_ignored", "all_ignored"]
)
def test_segmentation_equals_loops(case, balance):
    seg, labels, w = seg_case(case)
    grad = check(
        lambda v: segmentation_loss(v, labels, w, balance=balance),
        lambda v: segmentation_loss_loops(v, labels.numpy(), w.numpy(), balance),
        seg,
    )
    assert bool(grad.any()) == (case != "all_ignored")


def test_bilinear_reference_is_torchs():
    x = torch.randn(3, 4, generator=generator(2), dtype=torch.float64)
    for size in ((7, 9), (2, 3), (3, 4)):
        up = F.interpolate(x[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        np.testing.assert_allclose(up.numpy(), bilinear_loops(x.numpy(), size), rtol=0, atol=1e-14)


def test_segmentation_fg_bg_is_the_mean_of_two_terms():
    seg, labels, w = seg_case("plain")
    terms = []
    for keep in (labels == 0, (labels != 0) & (labels != 255)):
        terms.append(segmentation_loss(seg, labels.where(keep, 255), w))
    assert segmentation_loss(seg, labels, w, balance="fg_bg").item() == pytest.approx(sum(terms).item() / 2, rel=1e-12)


def test_segmentation_holds_one_image_at_a_time():
    B, C, size = 6, 21, 64
    seg = torch.randn(B, C, 16, 16, generator=generator(3)).requires_grad_()
    labels, w = torch.randint(0, C, (B, size, size), generator=generator(4)), torch.ones(B, C)
    image = C * size * size * 4
    with LiveBytes() as book:
        (grad,) = torch.autograd.grad(segmentation_loss(seg, labels, w), seg)
    assert book.largest <= image
    with LiveBytes() as plain:
        up = F.interpolate(seg, size=(size, size), mode="bilinear", align_corners=False)
        (expected,) = torch.autograd.grad(F.cross_entropy(up, labels), seg)
    assert plain.largest >= B * image and book.peak < 0.5 * plain.peak
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-8)


def test_segmentation_under_autocast_is_float32():
    seg, labels, w = seg_case("plain")
    half = seg.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = segmentation_loss(half, labels, w)
    (grad,) = torch.autograd.grad(loss, half)
    exact = segmentation_loss(half.detach().double(), labels, w)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


# Affinity ------------------------------------------------------------------------------------------


def affinity_case(name: str):
    g = generator(5)
    h, w = 3, 4
    A = torch.randn(2, h * w, h * w, generator=g, dtype=torch.float64) * 3
    labels = torch.randint(0, 3, (2, h, w), generator=g)
    labels[0, 0, 0] = 255
    eligible = torch.rand(2, h, w, generator=g) < 0.8
    if name == "one_class":
        labels[labels != 255] = 1
    elif name == "all_ignored":
        labels[:] = 255
    elif name == "none_eligible":
        eligible[:] = False
    elif name == "empty_pool":
        eligible[1] = False
    elif name == "all_different":
        eligible[:] = False
        eligible[:, 1, :3] = True
        labels[:, 1, :3] = torch.arange(3)
    return A, labels, eligible


@pytest.mark.parametrize("radius", [1, 2, 8])
@pytest.mark.parametrize("case", ["plain", "one_class", "all_ignored", "none_eligible", "empty_pool", "all_different"])
def test_affinity_equals_loops(case, radius):
    A, labels, eligible = affinity_case(case)
    grad = check(
        lambda v: affinity_loss(v, labels, eligible, radius=radius),
        lambda v: affinity_loss_loops(v, labels.numpy(), eligible.numpy(), radius),
        A,
    )
    assert bool(grad.any()) == (case not in ("all_ignored", "none_eligible"))
    assert not grad.diagonal(dim1=1, dim2=2).any()


def test_affinity_descent_raises_same_and_lowers_different():
    A, labels, eligible = affinity_case("plain")
    eligible[:], labels[labels == 255] = True, 0
    A = A.requires_grad_()
    before = A.detach().sigmoid()
    affinity_loss(A, labels, eligible).backward()
    after = (A.detach() - 0.5 * A.grad).sigmoid()
    flat = labels.flatten(1)
    same = flat[:, :, None] == flat[:, None]
    other = ~torch.eye(same.shape[1], dtype=torch.bool)
    assert (after > before)[same & other].all()
    assert (after < before)[~same].all()
    assert torch.equal(after[:, ~other], before[:, ~other])


def test_affinity_ends_of_the_scale():
    labels, eligible = torch.tensor([[[1, 1, 2]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    same = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])[None]
    assert affinity_loss(200 * same - 100, labels, eligible) == 0.0
    assert affinity_loss(100 - 200 * same, labels, eligible) == 1.0


# Sampling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 3)])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 1), (9, 5)])
def test_sampling_equals_loops(size, grid):
    labels = torch.randint(0, 256, (2, *size), generator=generator(6))
    for x in (labels, labels.double(), labels > 100):
        out = sample_nearest(x, grid)
        assert out.dtype == x.dtype
        for b in range(2):
            np.testing.assert_array_equal(out[b].numpy(), sample_nearest_loops(x[b].numpy(), grid))


def test_bad_values_are_refused():
    seg, labels, w = seg_case("plain")
    with pytest.raises(ConfigError, match="balance"):
        segmentation_loss(seg, labels, w, balance="half")
    A, labels, eligible = affinity_case("plain")
    with pytest.raises(ConfigError, match="affinity"):
        affinity_loss(A[:, :-1], labels, eligible)


# Two ranks -----------------------------------------------------------------------------------------

# Which image has what: rank 0 holds images 0 and 1, rank 1 images 2 and 3.
SCENES = ("full", "rank1_empty", "rank0_empty", "rank0_one_class", "nothing")


def rank_scene(name: str) -> dict[str, Tensor]:
    g = generator(7)
    B, C, D, h, w = 4, 4, 3, 3, 4
    labels = torch.randint(0, C, (B, h, w), generator=g)
    pool = torch.rand(B, h, w, generator=g) < 0.8
    pool[0, 1:] = False  # ranks differ in their numbers of anchors
    big = labels.repeat_interleave(2, 1).repeat_interleave(2, 2).clone()
    big[torch.rand(big.shape, generator=g) < 0.2] = 255
    empty = {"rank1_empty": [2, 3], "rank0_empty": [0, 1], "nothing": [0, 1, 2, 3]}.get(name, [])
    labels[empty], big[empty], pool[empty] = 255, 255, False
    if name == "rank0_one_class":
        labels[:2], big[:2] = 2, 2
    f64 = {"generator": g, "dtype": torch.float64}
    return {
        "labels": labels,
        "big": big,
        "pool": pool,
        "tags": (torch.rand(B, C - 1, generator=g) < 0.5).float(),
        "w": torch.rand(B, C, **f64) + 0.3,
        "logits": torch.randn(B, C - 1, **f64),
        "seg": torch.randn(B, C, h, w, **f64),
        "affinity": torch.randn(B, h * w, h * w, **f64),
        "raw": torch.randn(B, D, h, w, **f64),
    }


def losses_of(s: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every loss of a (part of a) scene and its gradient by its own input."""

    def contrast(tau: float, scope: str, tile: int):
        return lambda x: contrastive_loss(
            F.normalize(x, dim=1), s["labels"], s["pool"], tau=tau, scope=scope, tile=tile
        )

    jobs = {
        "cls": ("logits", lambda x: classification_loss(x, s["tags"], s["w"][:, 1:])),
        "seg": ("seg", lambda x: segmentation_loss(x, s["big"], s["w"])),
        "seg_fg_bg": ("seg", lambda x: segmentation_loss(x, s["big"], s["w"], balance="fg_bg")),
        "aux": ("affinity", lambda x: affinity_loss(x, s["labels"], s["pool"], radius=2)),
    }
    for scope in ("image", "batch"):
        for tau in (0.02, 0.1):
            for tile in (3, 1000):
                jobs[f"ucl_{scope}_{tau}_{tile}"] = ("raw", contrast(tau, scope, tile))
    out = {}
    for name, (key, f) in jobs.items():
        x = s[key].clone().requires_grad_()
        loss = f(x)
        out[name] = loss.detach(), torch.autograd.grad(loss, x)[0]
    return out


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        results = {}
        for name in SCENES:
            part = {k: v[2 * rank : 2 * rank + 2] for k, v in rank_scene(name).items()}
            results[name] = losses_of(part)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(folder,), nprocs=2)
        yield [torch.load(Path(folder) / f"{r}.pt") for r in range(2)]


@pytest.mark.parametrize("name", SCENES)
def test_two_ranks_equal_one(two_ranks, name):
    whole = losses_of(rank_scene(name))
    for loss, (value, grad) in whole.items():
        parts = [ranks[name][loss] for ranks in two_ranks]
        mean = sum(p[0] for p in parts) / 2
        # A leaf belongs to one rank: averaging gradients over ranks divides it by their number.
        both = torch.cat([p[1] for p in parts]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-10, atol=1e-14, msg=lambda m, loss=loss: f"{loss}: {m}")
        torch.testing.assert_close(both, grad, rtol=1e-10, atol=1e-13, msg=lambda m, loss=loss: f"{loss}: {m}")
        if name == "nothing" and loss != "cls":
            assert value == 0 and not grad.any()
        elif name in ("full", "rank0_one_class"):
            assert value > 0 and grad.any()
