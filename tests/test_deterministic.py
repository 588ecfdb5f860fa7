"""The deterministic mode: gradients without atomics, and runs that repeat to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import tiny_tree
from ugrl import config as configs
from ugrl.bilinear import resize, resize_gradient
from ugrl.method.losses import segmentation_loss
from ugrl.train import checkpoint
from ugrl.train.deterministic import make_deterministic
from ugrl.train.loop import Trainer

SIZES = [((12, 12), (48, 48)), ((7, 5), (31, 18)), ((1, 3), (4, 4)), ((16, 9), (16, 20)), ((20, 24), (9, 7))]


@pytest.fixture
def mode() -> Iterator[None]:
    """The deterministic mode, and the flags of before afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    make_deterministic(torch.device("cpu"))
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn


def plain(x: torch.Tensor, size: tuple[int, int], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and gradient as torch computes them."""
    x = x.clone().requires_grad_()
    y = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    (y * weight).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(("small", "big"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_resize_and_its_gradient_are_torchs(
    small: tuple[int, int], big: tuple[int, int], dtype: torch.dtype, mode: None
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *small, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(2, 3, *big, generator=g, dtype=torch.float64).to(dtype)
    values, gradient = plain(x, big, weight)
    x = x.requires_grad_()
    y = resize(x, big)
    (y * weight).sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    assert torch.equal(y, values)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(x.grad, gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_gradients_that_float64_holds_exactly_are_equal_to_the_last_bit(factor: int, mode: None) -> None:
    """Weights of a power of two are multiples of 1/16², and whole numbers times them add up without rounding."""
    g = torch.Generator().manual_seed(1)
    grad = torch.randint(-1000, 1000, (2, 3, 6 * factor, 10 * factor), generator=g).double()
    ours = resize_gradient(grad, (6, 10))
    torch.use_deterministic_algorithms(False)
    assert torch.equal(resize_gradient(grad, (6, 10)), ours)
    assert torch.equal(plain(torch.zeros(2, 3, 6, 10, dtype=torch.float64), tuple(grad.shape[-2:]), grad)[1], ours)


def test_without_the_mode_nothing_changes() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    g = torch.Generator().manual_seed(2)
    x, weight = torch.randn(2, 3, 7, 5, generator=g), torch.randn(2, 3, 31, 18, generator=g)
    values, gradient = plain(x, (31, 18), weight)
    x = x.requires_grad_()
    y = resize(x, (31, 18))
    (y * weight).sum().backward()
    assert torch.equal(y, values)
    assert x.grad is not None and torch.equal(x.grad, gradient)
    assert torch.equal(resize_gradient(weight, (7, 5)), gradient)


def test_the_segmentation_loss_is_the_same_in_both_modes(mode: None) -> None:
    g = torch.Generator().manual_seed(3)
    seg = torch.randn(2, 4, 6, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 24, 21), generator=g)
    labels[0, :5] = 255
    w = torch.rand(2, 4, generator=g, dtype=torch.float64)
    found = []
    for on in (True, False):
        torch.use_deterministic_algorithms(on)
        x = seg.clone().requires_grad_()
        loss = segmentation_loss(x, labels, w)
        loss.backward()
        found.append((loss.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-13, atol=1e-16)


def test_the_flags_are_set_for_the_process(mode: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_deterministic(torch.device("cpu"))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic(torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own choice
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    make_deterministic(torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_two_runs_end_in_the_same_bits_also_across_a_resume(shards: Path, tmp_path: Path, mode: None) -> None:
    tree = tiny_tree(deterministic=True, checkpoint_every=3, keep_checkpoints=10)
    cfg = configs.build(tree)
    torch.use_deterministic_algorithms(False)  # the trainer sets it

    def run(name: str, start: Path | None = None) -> dict[str, torch.Tensor]:
        trainer = Trainer(cfg, shards=shards, out=tmp_path / name, quiet=True, device="cpu", resume_from=start)
        assert torch.are_deterministic_algorithms_enabled()
        trainer.fit()
        return {**trainer.net.state_dict(), **{f"p/{k}": v for k, v in trainer.prototypes.state_dict().items()}}

    one, two = run("one"), run("two")
    middle = tmp_path / "one" / "checkpoints" / "step_00000003"
    assert checkpoint.read_state(middle).step == 3
    torch.manual_seed(99)  # a new process has another state
    three = run("three", middle)
    assert one.keys() == two.keys() == three.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
        assert torch.equal(one[name], three[name]), name


# What raises on CUDA in this mode: torch's list, and what its sources refuse beyond it.
REFUSED = {
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "_upsample_bilinear2d_aa_backward",
    "upsample_bicubic2d_backward",
    "_upsample_bicubic2d_aa_backward",
    "upsample_trilinear3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "median",
    "nanmedian",
    "kthvalue",
    "histc",
    "put_",
    "_embedding_bag",
    "segment_reduce",
}


class Ops(TorchDispatchMode):
    """Names of the operators that run, those of backward passes among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


def ops_of_a_run(shards: Path, **changes: object) -> set[str]:
    """Operators of a few steps and a validation, as far as a CPU takes a GPU's way through the code."""
    tree = tiny_tree(steps=4, cls_warmup_iters=1, eval_every=4, **changes.pop("train", {}))
    cfg = configs.build(configs.override(tree, changes))
    trainer = Trainer(cfg, shards=shards, out=None, quiet=True, device="cpu")
    trainer.step_fn.target_maker.counts_on_host = False
    with Ops() as ops:
        trainer.fit()
    return ops.names


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"micro_batch": 1}, "method.uncertainty.encoding": "fourier", "method.cam.refine": "par"},
        {
            "model.pooling": "gap",
            "model.affinity": "mlp",
            "model.norm": "group",
            "method.cam.propagate": "affinity",
            "method.cam.propagate_after": 1,
            "method.contrast.scope": "batch",
            "method.contrast.pool": "ranked",
        },
        {"method.contrast.pool": "random", "method.loss.balance": "fg_bg", "eval.seg_scales": [0.75, 1.0]},
    ],
    ids=["parts", "heads", "pool"],
)
def test_no_operator_of_a_step_is_one_that_a_gpu_refuses(changes: dict, shards: Path, mode: None) -> None:
    names = ops_of_a_run(shards, **changes)
    assert "upsample_bilinear2d" in names and "convolution_backward" in names
    assert names & REFUSED == set()


def test_the_check_sees_an_operator_that_a_gpu_refuses(shards: Path) -> None:
    assert ops_of_a_run(shards) & REFUSED == {"upsample_bilinear2d_backward"}
