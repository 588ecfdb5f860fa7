"""The contrastive loss on CUDA: two Triton sweeps over tiles of S that exist only on chip.

The formulas are those of :mod:`ugrl.method.contrast`. Here, too, anchors are gathered and sorted by class (and so
freed of all other pixels), log P and log N come from one sweep, and the gradient from a second that makes the tiles
again; each program owns a block of rows and loops over all keys. S is not halved by its symmetry, which would take
atomics. A sweep over S is 2N²D FLOPs. The gradient sweep's programs own a chunk of D each, at most 256 components,
since registers hold no more: for D = 512 S is made three times in all, and a call costs 8N²D (float32) or 10N²D
(bfloat16, whose gradient takes two products) where the plain form with its backward pass has 6N²D.

Memory: the anchors' rows, their gradient (both float32) and, for bfloat16, a bfloat16 copy of the rows; O(N·D).

Waiting: the host waits for nothing. Counts stay on the device, grids come from shapes, and blocks beyond the counts
leave at once. Only a first call compiles, per D, dtype and shift kind.

Precision: products are accumulated and everything else is computed in float32.

- float32 (and float16, which becomes float32): products are ``tf32x3``, three TF32 products that keep about 22 bits,
  at a third of the TF32 rate; ``ieee`` has 24 bits but none of the tensor cores.
- bfloat16: similarities are exact products. In the gradient the float32 factor of a row is split into two bfloat16,
  16 bits of it, which is twice the work of one and 256 times finer than the gradient that is returned.
- float64 is for the interpreter: its products do not compile in this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

from ugrl.distributed import all_gather_rows, all_gather_rows_grad, rank, world_size
from ugrl.method.contrast_anchors import FIXED_SHIFT_TAU, Take, class_counts, loss_from_sums
from ugrl.method.contrast_kernels import gradient_kernel, sums_kernel
from ugrl.method.losses import unit_shares
from ugrl.types import IGNORE


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sides of the blocks of one kernel, powers of two from 16 up, and how it is run."""

    m: int  # rows of S
    n: int  # keys
    d: int  # components per step of the similarities
    chunk: int  # components of the gradient that one program owns; more make another one repeat the tiles
    warps: int
    stages: int


# By (bfloat16?, kernel). The gradient's accumulator, m × chunk floats, lives in registers. With these sides the
# compiler spills at most 80 bytes per thread for sm_90 (280 for sm_80), with a chunk of 512 nearly 4,000.
BLOCKS = {
    (True, "sums"): Blocks(128, 128, 64, 0, 8, 3),
    (True, "gradient"): Blocks(64, 64, 64, 256, 8, 2),
    (False, "sums"): Blocks(128, 64, 32, 0, 8, 3),
    (False, "gradient"): Blocks(64, 32, 16, 256, 8, 2),
}


def interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter."""
    return not isinstance(sums_kernel, triton.JITFunction)


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run on tensors of the device: CUDA, or a CPU under the interpreter."""
    return device.type == "cuda" or (device.type == "cpu" and interpreted())


def constants(dtype: torch.dtype, kind: Literal["sums", "gradient"], D: int, tau: float) -> dict:
    """The compile-time arguments of a kernel for embeddings of ``dtype``, all but the number of segments."""
    half = dtype == torch.bfloat16
    blocks = BLOCKS[half, kind]
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    fit = max(16, triton.next_power_of_2(D))
    out = {
        "D": D,
        "FIXED": tau >= FIXED_SHIFT_TAU,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_D": min(blocks.d, fit),
        "ACC": acc,
        "DOT": tl.bfloat16 if half and not interpreted() else acc,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }
    if kind == "gradient":
        out |= {"CHUNK": min(blocks.chunk, fit), "SPLIT": half}
    return out | {"num_warps": blocks.warps, "num_stages": blocks.stages}


class _SumOfLosses(torch.autograd.Function):
    """Σ ℓ_i over the own anchors that have a positive, and its gradient by all embeddings."""

    @staticmethod
    def forward(
        ctx: Any,
        x_GKD: Tensor,
        class_GK: Tensor,
        counts_GR: Tensor,
        own: int,
        tau: float,
        half: bool,
        with_grad: bool,
    ) -> Tensor:
        acc = x_GKD.dtype
        x_GKD = (x_GKD.to(torch.bfloat16) if half else x_GKD).contiguous()
        (G, K, D), R = x_GKD.shape, counts_GR.shape[1]
        L = K // R
        # 1/τ in the type of the arithmetic; filled on the device.
        scale = torch.full((1,), 1.0 / tau, dtype=acc, device=x_GKD.device)
        shared = (x_GKD, class_GK, counts_GR, scale)

        logs_2GL = torch.full((2, G, L), float("-inf"), dtype=acc, device=x_GKD.device)
        options = constants(x_GKD.dtype, "sums", D, tau)
        grid: tuple[int, ...] = (triton.cdiv(L, options["BLOCK_M"]), G)
        with torch.cuda.device_of(x_GKD):
            sums_kernel[grid](*shared, logs_2GL[0], logs_2GL[1], L, own, SEGMENTS=R, **options)
        loss_GL, logk_2GL = loss_from_sums(logs_2GL[0], logs_2GL[1], with_grad)
        if logk_2GL is not None:
            fixed = tau >= FIXED_SHIFT_TAU
            k_2GK = torch.full((2, G, K), 0.0 if fixed else float("-inf"), dtype=acc, device=x_GKD.device)
            k_2GK[:, :, own * L : own * L + L] = (logk_2GL + 1.0 / tau).exp_() if fixed else logk_2GL
            if fixed:
                k_2GK[0].neg_()
            grad_GKD = torch.zeros(G, K, D, dtype=acc, device=x_GKD.device)
            options = constants(x_GKD.dtype, "gradient", D, tau)
            grid = (R * triton.cdiv(L, options["BLOCK_M"]), triton.cdiv(D, options["CHUNK"]), G)
            with torch.cuda.device_of(x_GKD):
                gradient_kernel[grid](*shared, k_2GK[0], k_2GK[1], grad_GKD, L, own, SEGMENTS=R, **options)
            ctx.save_for_backward(grad_GKD)
        return loss_GL.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_GKD,) = ctx.saved_tensors
        return grad_GKD * grad, None, None, None, None, None, None


def fused_loss(
    emb_BND: Tensor,
    key_BN: Tensor,
    *,
    tau: float,
    scope: Literal["image", "batch"],
) -> Tensor:
    """What :func:`ugrl.method.contrast.contrastive_loss` returns, without a wait.

    Args:
        emb_BND: Embeddings. In ``batch`` scope all ranks come with the same shape.
        key_BN: int64 class of each anchor, 255 where there is none.
        tau: Temperature τ > 0.
        scope: ``image`` or ``batch``.

    Returns:
        Scalar.
    """
    per_image = scope == "image"
    if not per_image:
        key_BN = key_BN.view(1, -1)
    half, with_grad = emb_BND.dtype == torch.bfloat16, emb_BND.requires_grad and torch.is_grad_enabled()
    class_GL, order_GL = key_BN.sort(dim=1, stable=True)
    class_GL = class_GL.to(torch.uint8)
    offset_G1 = torch.arange(len(key_BN), device=key_BN.device)[:, None] * key_BN.shape[1]
    (x_GLD,) = Take.apply(emb_BND, order_GL + offset_G1)
    n_GR = (key_BN != IGNORE).sum(1, keepdim=True).to(torch.int32)
    counts_GL = class_counts(key_BN)
    own = 0
    if not per_image and world_size() > 1:
        own = rank()
        n_GR = all_gather_rows(n_GR).view(1, -1)
        x_GLD = all_gather_rows_grad(x_GLD[0])[None]
        class_GL = all_gather_rows(class_GL[0])[None]
        counts_GL = all_gather_rows(counts_GL).sum(0, keepdim=True)
    total: Tensor = _SumOfLosses.apply(
        x_GLD,
        class_GL.contiguous(),
        n_GR.contiguous(),
        own,
        tau,
        half,
        with_grad,
    )
    anchors = counts_GL[:, :IGNORE].where(counts_GL[:, :IGNORE] > 1, 0).sum()
    # In batch scope every rank has the sum over ranks already.
    share = unit_shares(anchors, total.dtype) if per_image else world_size() / anchors.clamp(min=1).to(total.dtype)
    return total * share
