"""Contrastive loss, forward and backward: the N×N matrix against tiles.

One image of N anchors in three classes, d = 512, τ = 0.1, float32; 5,734 is the pool of a 512 px crop, 16,384 all of
its stride-4 grid. Before anything is measured, loss and gradient are compared in float64 at 300 anchors, and the
gradients of the very calls that are measured in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baseline.contrast import naive
from bench.measure import Context, Entry, Skipped, compare, entry, same, seconds
from ugrl.method.contrast import contrastive_loss

DIM, CLASSES, TAU = 512, 3, 0.1
#: N, gate in time, gate in memory.
CASES = ((2048, None, None), (5734, 2.5, 25.0), (16384, 3.5, 80.0))
NAMES = (*(f"contrast/{n}" for n, _, _ in CASES), "contrast/5734-cuda")
#: Dense bf16 peak without sparsity, TFLOP/s, by a part of the device's name; the first that fits.
BF16_PEAK = (("H200", 989.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("A100", 312.0))
#: Matrices of N×N floats that live at once in the plain form, masks included.
NAIVE_MATRICES = 6


def problem(n: int, device: torch.device, dtype: torch.dtype, images: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (leaf), labels and pool of images with ``n`` anchors each."""
    g = torch.Generator().manual_seed(0)
    emb = F.normalize(torch.randn(images, DIM, 1, n, generator=g, dtype=torch.float64), dim=1)
    labels = torch.randint(0, CLASSES, (images, 1, n), generator=g).to(device)
    return emb.to(device, dtype).requires_grad_(), labels, torch.ones_like(labels, dtype=torch.bool)


def sides(emb: Tensor, labels: Tensor, pool: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Gradient by the embeddings: ours, and the plain form's."""

    def tiled() -> Tensor:
        return torch.autograd.grad(contrastive_loss(emb, labels, pool, tau=TAU), emb)[0]

    def plain() -> Tensor:
        return torch.autograd.grad(naive(emb, labels, pool, TAU), emb)[0]

    return tiled, plain


def entries(ctx: Context) -> Iterator[Entry | Skipped]:
    """Three sizes; on CUDA also the share of the device's peak."""
    exact = problem(300, ctx.device, torch.float64)
    ours, plain = sides(*exact)
    same("contrast, float64", (contrastive_loss(*exact, tau=TAU), ours()), (naive(*exact, TAU), plain()), 1e-12)
    for n, gate, memory_gate in CASES:
        name = f"contrast/{n}"
        if not ctx.wants(name):
            continue
        needed = NAIVE_MATRICES * 4 * n * n
        if needed > _free(ctx.device):
            yield Skipped(name, f"the plain form needs about {needed / 1e9:.1f} GB of free memory")
            continue
        ours, plain = sides(*problem(n, ctx.device, torch.float32))
        yield compare(
            name,
            ours,
            plain,
            ctx=ctx,
            gate=gate,
            memory_gate=memory_gate,
            budget=15.0 if ctx.quick and n < 16384 else None,
            check=lambda a, b, name=name: same(name, a, b, 1e-4),
            note=f"{n} anchors, d {DIM}, {CLASSES} classes, float32, forward and backward; the N x N form",
        )
    if ctx.wants("contrast/5734-cuda"):
        if ctx.device.type == "cuda":
            yield share_of_peak(ctx)
        else:
            yield Skipped("contrast/5734-cuda", "needs a CUDA device (goal: 60 % of the bf16 peak)")


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# --- CUDA -------------------------------------------------------------------------------------------------------


def share_of_peak(ctx: Context, images: int = 8, n: int = 5734) -> Entry:
    """TFLOP/s of what the loss needs, 4N²d an image with its symmetry, as a share of the device's bf16 peak.

    ``ours`` is the achieved rate, ``baseline`` the peak: ``ratio`` is the share.
    """
    check_bf16 = problem(n, ctx.device, torch.bfloat16)
    got = sides(*check_bf16)[0]().float()
    emb = check_bf16[0].detach().float().requires_grad_()
    same("contrast/5734-cuda", got, sides(emb, *check_bf16[1:])[1](), 2e-2)
    ours = sides(*problem(n, ctx.device, torch.bfloat16, images))[0]
    name = torch.cuda.get_device_name(ctx.device)
    known = next((peak for part, peak in BF16_PEAK if _fits(part, name)), None)
    peak = known if known is not None else _gemm_peak(ctx)
    for _ in range(3):
        ours()
    calls = 5
    work = 4.0 * n * n * DIM * images * calls / 1e12
    rates = [work / seconds(lambda: [ours() for _ in range(calls)], ctx) for _ in range(5 if ctx.quick else 15)]
    middle = sorted(rates)[len(rates) // 2]
    time = work / calls / middle
    return entry(
        "contrast/5734-cuda",
        rates,
        [peak] * len(rates),
        unit="TFLOP/s",
        gate=0.6,
        note=(
            f"{images} images of {n} anchors, bf16, {1e3 * time:.2f} ms: 4N²d FLOPs an image against {name}'s bf16 "
            f"{'peak' if known is not None else 'rate of an 8,192² product'}; 6N²d, as without the symmetry, are "
            f"{1.5 * middle / peak:.0%}"
        ),
    )


def _fits(part: str, name: str) -> bool:
    return all(word in name for word in part.split())


def _gemm_peak(ctx: Context, n: int = 8192) -> float:
    """TFLOP/s of the library's own bf16 product."""
    a, b = (torch.randn(n, n, device=ctx.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return max(2.0 * n**3 / seconds(lambda: a @ b, ctx) / 1e12 for _ in range(10))
