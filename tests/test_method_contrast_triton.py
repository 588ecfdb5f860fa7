"""The Triton form of the contrastive loss: under the interpreter on a CPU, compiled for a GPU that need not exist.

The interpreter must be chosen before triton is imported, so that a process of its own runs all cases and leaves
values and gradients in a file; here they are compared with the N×N matrix in float64.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from tests.test_method_contrast import degenerate, dense, scene, value_and_grad
from ugrl.errors import ConfigError
from ugrl.method.contrast import contrastive_loss

TAUS = (0.01, 0.02, 0.05, 0.1, 1.0)
SCOPES = ("image", "batch")
NAN = float("nan")


class Case(NamedTuple):
    scene: str  # of SCENES, or of the degenerate ones
    tau: float
    scope: str = "image"
    dtype: torch.dtype = torch.float64
    own_blocks: bool = False  # as on a GPU, not the smallest


# B, D, h, w, classes; blocks are 16 wide, and no D is a power of two.
SCENES = {
    "several": (2, 20, 5, 7, 3),
    "one_pixel": (2, 5, 1, 1, 1),
    "pair": (2, 5, 1, 2, 1),
    "two_classes": (1, 5, 1, 2, 2),
    "many_classes": (1, 33, 7, 9, 200),
    "large": (1, 200, 11, 17, 4),
}
DEGENERATE = ("no_positive", "one_class", "all_ignored", "empty_pool", "pool_off", "equal", "one_negative")
CASES = [
    *(Case("several", tau, scope) for tau in TAUS for scope in SCOPES),
    *(Case("several", tau, dtype=torch.float32) for tau in TAUS),
    *(Case("several", tau, dtype=torch.bfloat16) for tau in (0.01, 0.1)),
    Case("several", 0.1, dtype=torch.float16),
    *(Case(name, tau) for name in ("one_pixel", "pair", "two_classes", "many_classes") for tau in (0.01, 0.1)),
    *(Case(name, tau, scope) for name in DEGENERATE for tau, scope in ((0.01, "batch"), (0.1, "image"))),
    *(Case(name, 0.1, "batch") for name in ("no_positive", "one_class", "all_ignored")),
    *(Case("large", 0.1, dtype=dtype, own_blocks=True) for dtype in (torch.float32, torch.bfloat16)),
    Case("large", 0.01, own_blocks=True),
]  # fmt: skip


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    if case.scene in DEGENERATE:
        raw, labels, pool = degenerate(case.scene)
    else:
        B, D, h, w, classes = SCENES[case.scene]
        raw, labels, pool = scene(1, B, D, h, w, classes)
        if h * w <= 2:
            labels = torch.arange(w).clamp(max=classes - 1).expand(B, h, w).clone()
            pool[:] = True
        if case.scene == "several":  # most pixels; the second image has fewer than the first
            pool[0] = True
    return raw, labels, pool


def fused(case: Case, *parts: Tensor) -> tuple[Tensor, Tensor]:
    raw, labels, pool = parts
    return value_and_grad(
        lambda e: contrastive_loss(
            e.to(case.dtype),
            labels,
            pool,
            tau=case.tau,
            scope=case.scope,
            kernel="triton",
        ),
        raw,
    )


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """The N×N form in float64, of the embeddings as the case rounds them; its own gradient is not rounded."""
    raw, labels, pool = inputs(case)
    rounded = F.normalize(raw, dim=1).to(case.dtype).double()
    return value_and_grad(lambda e: dense(e + (rounded - e).detach(), labels, pool, case.tau, case.scope), raw)


def split_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Sorted float32 rows that bfloat16 holds, their classes, their number."""
    g = torch.Generator().manual_seed(3)
    x = F.normalize(torch.randn(1, 40, 24, generator=g), dim=2).bfloat16().float()
    c = torch.randint(0, 3, (1, 40), generator=g).sort(1).values
    return x, c.to(torch.uint8), torch.tensor([[40]], dtype=torch.int32)


RANKS = [Case("several", tau, "batch") for tau in (0.02, 0.1)]
RANKS += [Case("several", 0.1, "batch", dtype=torch.bfloat16), Case("several", 0.1)]


def small_blocks() -> None:
    """Blocks that even few anchors fill more than once."""
    from ugrl.method import contrast_triton

    for key in contrast_triton.BLOCKS:
        contrast_triton.BLOCKS[key] = contrast_triton.Blocks(16, 16, 16, 16, 4, 1)


def rank_inputs(rank: int | None, case: Case) -> tuple[Tensor, ...]:
    parts = inputs(case)
    return parts if rank is None else tuple(x[rank : rank + 1] for x in parts)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    small_blocks()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save([fused(case, *rank_inputs(rank, case)) for case in RANKS], f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def interpret(folder: str) -> None:
    """What the other process does."""
    from ugrl.method import contrast_triton

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out: dict[object, object] = {}
    real = dict(contrast_triton.BLOCKS)
    for case in CASES:
        if case.own_blocks:
            contrast_triton.BLOCKS.update(real)
        else:
            small_blocks()
        out[CASES.index(case)] = fused(case, *inputs(case))
    small_blocks()
    x, c, n = split_inputs()
    x.requires_grad_()
    total = contrast_triton._SumOfLosses.apply(x, c, n, 0, 0.1, True, True)
    out["split"] = torch.autograd.grad(total, x)[0]
    raw, labels, pool = inputs(CASES[0])
    contrast_triton.gradient_kernel = None  # no sweep may start
    with torch.no_grad():
        out["no_grad"] = contrastive_loss(F.normalize(raw, dim=1), labels, pool, tau=0.01, kernel="triton")
    torch.save(out, f"{folder}/cases.pt")


def ranks(folder: str) -> None:
    mp.spawn(worker, args=(folder,), nprocs=2)


def other_process(call: str, folder: Path) -> None:
    code = f"from tests.test_method_contrast_triton import {call}; {call}({str(folder)!r})"
    env = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=Path(__file__).parents[1])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")
    folder = tmp_path_factory.mktemp("interpreted")
    other_process("interpret", folder)
    return torch.load(folder / "cases.pt")


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_value_and_gradient(interpreted, index):
    case = CASES[index]
    loss, grad = interpreted[index]
    expected, expected_grad = exact(case)
    if case.dtype == torch.float64:
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
    else:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        # Half-precision embeddings get a half-precision gradient.
        tolerance = 1e-4 if case.dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=tolerance * float(expected_grad.abs().max()))
    if case.scene in ("one_class", "all_ignored", "pool_off", "one_pixel", "pair", "two_classes"):
        assert loss == 0 and not grad.any()
    elif case.scene in ("several", "many_classes", "large"):
        assert expected > 0 and expected_grad.any()


def test_bfloat16_products_keep_the_digits_of_the_gradient(interpreted):
    x, c, _ = split_inputs()
    x = x.double().requires_grad_()
    loss = dense(x.mT[..., None], c[..., None].long(), (c < 255)[..., None], 0.1) * x.shape[1]
    (expected,) = torch.autograd.grad(loss, x)
    found = interpreted["split"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_no_gradient_is_computed_when_none_is_wanted(interpreted):
    torch.testing.assert_close(interpreted["no_grad"], interpreted[0][0])


def test_two_ranks_equal_one(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")
    other_process("ranks", tmp_path)
    parts = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    for case, a, b in zip(RANKS, *parts, strict=True):
        expected, expected_grad = exact(case)
        mean, both = (a[0] + b[0]) / 2, torch.cat([a[1], b[1]]) / 2
        if case.dtype == torch.float64:
            torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
            torch.testing.assert_close(both, expected_grad, rtol=1e-9, atol=1e-12)
        else:
            torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=0)
            torch.testing.assert_close(both, expected_grad, rtol=0, atol=2.0**-7 * float(expected_grad.abs().max()))
        assert expected_grad.any()


@pytest.mark.parametrize("scope", SCOPES)
def test_the_host_waits_for_nothing(monkeypatch, scope):
    """Fake tensors have no values: whatever asks for one, as the torch form does, raises."""
    contrast_triton = pytest.importorskip(
        "ugrl.method.contrast_triton",
        reason="Triton is not installed: it comes with torch for CUDA",
        exc_type=ImportError,
    )
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    launched = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.name, grid))

    monkeypatch.setattr(contrast_triton, "sums_kernel", Kernel("sums"))
    monkeypatch.setattr(contrast_triton, "gradient_kernel", Kernel("gradient"))
    monkeypatch.setattr(contrast_triton, "runs_on", lambda device: True)
    with FakeTensorMode():
        emb = torch.randn(2, 512, 64, 64).requires_grad_()
        labels = torch.zeros(2, 64, 64, dtype=torch.int64)
        pool = labels == 0
        loss = contrastive_loss(emb, labels, pool, tau=0.1, scope=scope, kernel="triton")
        loss.backward()
        assert emb.grad.shape == emb.shape
        with pytest.raises(DataDependentOutputException):
            contrastive_loss(emb, labels, pool, tau=0.1, scope=scope, kernel="torch")
    assert launched == (
        [("sums", (32, 2)), ("gradient", (64, 2, 2))]
        if scope == "image"
        else [("sums", (64, 1)), ("gradient", (128, 2, 1))]
    )


def test_a_cpu_without_the_interpreter_is_refused():
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set: these kernels were made for the interpreter and cannot be compiled")
    raw, labels, pool = scene(0)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
        contrastive_loss(raw, labels, pool, tau=0.1, kernel="triton")


@pytest.mark.parametrize("kind", ["sums", "gradient"])
@pytest.mark.parametrize(
    ("dtype", "tau", "D", "segments"),
    [(torch.bfloat16, 0.1, 512, 1), (torch.float32, 0.01, 320, 2)],
)
def test_kernels_compile_for_sm_90(monkeypatch, tmp_path, kind, dtype, tau, D, segments):
    triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set: these kernels were made for the interpreter and cannot be compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "nvidia" not in triton.backends.backends:
        pytest.skip("this build of triton has no CUDA compiler to make PTX with")
    from ugrl.method import contrast_kernels, contrast_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(contrast_kernels, f"{kind}_kernel")
    constants = contrast_triton.constants(dtype, kind, D, tau) | {"SEGMENTS": segments}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    x = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    types = {"x_ptr": x, "class_ptr": "*u8", "counts_ptr": "*i32", "length": "i32", "own": "i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, whole)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert ".target sm_90" in ptx
    assert ("bf16.bf16" if dtype == torch.bfloat16 else "tf32.tf32") in ptx  # products on tensor cores
    assert compiled.metadata.shared <= 227 * 1024
    assert not re.search(r"\b(atom|red)\.", ptx)  # the order of sums is fixed
