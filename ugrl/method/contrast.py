"""Pixel-to-pixel contrastive loss on the reliable pool (Eqs. 10–11): exact, in O(N·D) memory.

With s_ij the cosine of anchors i and j, P_i = Σ_{j≠i, same class} e^{s_ij/τ} and N_i the same sum over
the other classes, the loss of an anchor is

    ℓ_i = log(P_i + N_i) − log P_i = log(1 + N_i/P_i).

The second form loses no digits where N_i ≪ P_i. With r_i = N_i/(P_i + N_i), its derivative by s_ij/τ is
−r_i·e^{s_ij/τ}/P_i for a positive j and e^{s_ij/τ}/(P_i + N_i) for a negative one, so the gradient of
the sum by the embeddings is a product of tiles of e^{S/τ} with the embeddings. What follows from it:

- Two sweeps over tiles of S: one for P and N, one for the gradient. No N×N tensor exists.
- S is symmetric and i is both an anchor and a key of others: upper tiles do for both.
- Anchors are sorted by class: most tiles are of one kind, and only the others need a mask.
- |s| ≤ 1, so that e^{(s−1)/τ} can neither overflow nor vanish in float32 for τ ≥ 0.03: a fixed
  shift replaces the running maximum. Below, sums are kept as logarithms.

The gradient sweep runs in the forward call, where a single tile is still at hand, and keeps only its
(N, D) result; the backward call scales it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ugrl.distributed import all_gather_rows, all_gather_rows_grad, rank, world_size
from ugrl.errors import ConfigError
from ugrl.method.contrast_anchors import FIXED_SHIFT_TAU, Take, class_counts, loss_from_sums
from ugrl.method.losses import unit_shares
from ugrl.precision import full_precision
from ugrl.types import IGNORE


class Tile(NamedTuple):
    """A run of anchors that are sorted by class."""

    start: int
    stop: int
    low: int  # class of the first
    high: int  # class of the last
    own: bool  # anchors whose loss is computed here; the others only serve as keys

    def relation(self, other: Tile) -> Literal["same", "different", "mixed"]:
        """Whether all pairs of the two are of one class, none is, or some are."""
        if self.low == self.high == other.low == other.high:
            return "same"
        return "different" if self.high < other.low or other.high < self.low else "mixed"


def tiles_of(counts: Sequence[int], start: int, size: int, own: bool) -> list[Tile]:
    """Tiles of a block of anchors that begins at ``start`` and holds ``counts[c]`` of class c in turn."""
    ends = list(accumulate(counts[:IGNORE]))
    edges = range(0, ends[-1], size)
    return [
        Tile(start + a, start + b, bisect_right(ends, a), bisect_right(ends, b - 1), own)
        for a, b in ((a, min(a + size, ends[-1])) for a in edges)
    ]


def _pairs(tiles: Sequence[Tile]) -> Iterator[tuple[Tile, Tile]]:
    """Rows are own tiles; of two own ones only (earlier, later), which serves both directions."""
    for i, rows in enumerate(tiles):
        if rows.own:
            yield from ((rows, keys) for j, keys in enumerate(tiles) if j >= i or not keys.own)


class _Similarity:
    """Tiles of S/τ with the excluded pairs at −∞, and of e^{S/τ − shift} with them at 0."""

    def __init__(self, x_GND: Tensor, class_GN: Tensor, tau: float, padded: bool) -> None:
        self.x_GND, self.class_GN, self.tau, self.padded = x_GND, class_GN, tau, padded
        self.shift = 1.0 / tau

    def _tile(self, rows: Tile, keys: Tile, offset: float) -> Tensor:
        return torch.baddbmm(
            self.x_GND.new_full((1, 1, 1), offset),
            self.x_GND[:, rows.start : rows.stop],
            self.x_GND[:, keys.start : keys.stop].transpose(1, 2),
            alpha=1.0 / self.tau,
        )

    def _exclude(self, tile: Tensor, rows: Tile, keys: Tile, value: float) -> Tensor:
        if rows is keys:
            tile.diagonal(dim1=1, dim2=2).fill_(value)
        if self.padded:
            out_GN = self.class_GN == IGNORE
            out = out_GN[:, rows.start : rows.stop, None] | out_GN[:, None, keys.start : keys.stop]
            tile.masked_fill_(out, value)
        return tile

    def logits(self, rows: Tile, keys: Tile) -> Tensor:
        return self._exclude(self._tile(rows, keys, 0.0), rows, keys, float("-inf"))

    def exps(self, rows: Tile, keys: Tile) -> Tensor:
        return self._exclude(self._tile(rows, keys, -self.shift).exp_(), rows, keys, 0.0)

    def same(self, rows: Tile, keys: Tile) -> Tensor:
        """bool: pairs of one class."""
        return self.class_GN[:, rows.start : rows.stop, None] == self.class_GN[:, None, keys.start : keys.stop]

    def by_kind(self, tile: Tensor, rows: Tile, keys: Tile, absent: float) -> Iterator[tuple[int, Tensor]]:
        """The tile as (0, positives) and (1, negatives), what is not of the kind being ``absent``."""
        relation = rows.relation(keys)
        if relation == "mixed":
            same = self.same(rows, keys)
            yield 0, tile.masked_fill(~same, absent)
            yield 1, tile.masked_fill(same, absent)
        else:
            yield (0 if relation == "same" else 1), tile


def _log_sums(sim: _Similarity, tiles: Sequence[Tile], kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums log P and log N of the own anchors, (G, N) each, −∞ where a sum is empty.

    ``kept`` is the only tile's e^{S/τ − shift}, if there is a single one and the shift is fixed.
    """
    fixed = sim.tau >= FIXED_SHIFT_TAU
    sums_2GN = sim.x_GND.new_full((2, *sim.class_GN.shape), 0.0 if fixed else float("-inf"))
    for rows, keys in _pairs(tiles):
        if fixed:
            tile = sim.exps(rows, keys) if kept is None else kept
        else:
            tile = sim.logits(rows, keys)
        # Rows get the sum over columns; two different own tiles also give the keys theirs over rows.
        ways = [(rows, 2), (keys, 1)] if keys.own and keys is not rows else [(rows, 2)]
        for k, part in sim.by_kind(tile, rows, keys, 0.0 if fixed else float("-inf")):
            for side, dim in ways:
                acc = sums_2GN[k, :, side.start : side.stop]
                if fixed:
                    acc += part.sum(dim)
                else:
                    acc.copy_(torch.logaddexp(acc, part.logsumexp(dim)))
        del tile, part  # or they would live beside the next tile
    if fixed:
        sums_2GN = sums_2GN.log_().add_(sim.shift)
    return sums_2GN[0], sums_2GN[1]


def _gradient(sim: _Similarity, tiles: Sequence[Tile], logk_2GN: Tensor, kept: Tensor | None) -> Tensor:
    """Gradient of the sum of own losses by every embedding, as anchor and as key.

    Args:
        sim: Similarities of all anchors, tile by tile.
        tiles: Own and foreign tiles.
        logk_2GN: log of what multiplies −e^{S/τ} of a positive and +e^{S/τ} of a negative pair, per anchor; −∞ for
            anchors that do not count and for foreign ones.
        kept: As in :func:`_log_sums`; it is overwritten.
    """
    grad_GND = torch.zeros_like(sim.x_GND)
    k_2GN = logk_2GN
    if sim.tau >= FIXED_SHIFT_TAU:
        k_2GN = (logk_2GN + sim.shift).exp_()
        k_2GN[0].neg_()
    for rows, keys in _pairs(tiles):
        g = _gradient_tile(sim, k_2GN, rows, keys, kept)
        grad_GND[:, rows.start : rows.stop].baddbmm_(g, sim.x_GND[:, keys.start : keys.stop])
        if keys is not rows:
            grad_GND[:, keys.start : keys.stop].baddbmm_(g.transpose(1, 2), sim.x_GND[:, rows.start : rows.stop])
        del g  # or it would live beside the next tile
    return grad_GND.mul_(1.0 / sim.tau)


def _gradient_tile(sim: _Similarity, k_2GN: Tensor, rows: Tile, keys: Tile, kept: Tensor | None) -> Tensor:
    """Derivative of the sum of own losses by the tile of S/τ: e^{S/τ} times (k of the row + k of the key).

    ``k_2GN`` is shifted and signed with a fixed shift, else it is the logarithm that :func:`_gradient` got.
    """
    kinds = {"same": [0], "different": [1], "mixed": [0, 1]}[rows.relation(keys)]
    rows_2Gn, keys_2Gm = k_2GN[:, :, rows.start : rows.stop, None], k_2GN[:, :, None, keys.start : keys.stop]
    if sim.tau >= FIXED_SHIFT_TAU:
        tile = sim.exps(rows, keys) if kept is None else kept
        parts = [rows_2Gn[k] + keys_2Gm[k] for k in kinds]
    else:
        tile = sim.logits(rows, keys)
        parts = [(tile + rows_2Gn[k]).exp_().add_((tile + keys_2Gm[k]).exp_()) for k in kinds]
        if 0 in kinds:
            parts[0].neg_()
    factor = parts[0]
    if len(parts) == 2:
        torch.where(sim.same(rows, keys), parts[0], parts[1], out=factor)
    return tile.mul_(factor) if sim.tau >= FIXED_SHIFT_TAU else factor


class _SumOfLosses(torch.autograd.Function):
    """Σ ℓ_i over the own anchors that have a positive, and its gradient by all embeddings."""

    @staticmethod
    def forward(
        ctx: Any,
        x_GND: Tensor,
        class_GN: Tensor,
        tiles: Sequence[Tile],
        tau: float,
        padded: bool,
        with_grad: bool,
    ) -> Tensor:
        sim = _Similarity(x_GND, class_GN, tau, padded)
        kept = sim.exps(tiles[0], tiles[0]) if len(tiles) == 1 and tau >= FIXED_SHIFT_TAU else None
        # Foreign anchors have sums of nothing here, hence no positive either.
        loss_GN, logk_2GN = loss_from_sums(*_log_sums(sim, tiles, kept), with_grad)
        if logk_2GN is not None:
            ctx.save_for_backward(_gradient(sim, tiles, logk_2GN, kept))
        return loss_GN.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_GND,) = ctx.saved_tensors
        return grad_GND * grad, None, None, None, None, None


def contrastive_loss(
    emb_BDhw: Tensor,
    labels_Bhw: Tensor,
    pool_Bhw: Tensor,
    *,
    tau: float,
    scope: Literal["image", "batch"] = "image",
    tile: int | None = None,
    kernel: Literal["auto", "torch", "triton"] = "auto",
) -> Tensor:
    """Mean of ℓ_i = lse_all(i) − lse_pos(i) over anchors (Eq. 10 as printed, the positive sum inside the log).

    Anchors are the pool's pixels with a label. One without a positive is left out of the mean; one
    without a negative counts and contributes exactly 0. The mean goes over the anchors of all ranks;
    as everywhere, its mean over ranks is the global loss.

    Both forms are exact up to rounding and need O(N·D) memory: the anchors' rows, their gradient, and in
    the torch form a few tiles. The torch form waits once for the class counts, which size the tiles. The Triton form
    (:mod:`ugrl.method.contrast_triton`, where the precision is described) waits for nothing.

    Args:
        emb_BDhw: Unit-length embeddings; the arithmetic is float32, or float64 for float64.
        labels_Bhw: Labels on the same grid, 255 is ignored.
        pool_Bhw: bool, the reliable pool.
        tau: Temperature τ > 0.
        scope: ``image``: j runs over the anchors of the same image; ``batch``: over those of all images on all
            ranks, whose embeddings are gathered with their gradients.
        tile: Side of a tile of S in the torch form; by default 512 on a CPU, where it should fit the cache, and 2048
            elsewhere. With no more anchors than this in any image, all images share one batched tile.
        kernel: ``auto``: Triton for float32, bfloat16 and float16 on CUDA from compute capability 8.0 where it can be
            imported, else torch. ``triton`` also runs on a CPU under Triton's interpreter.

    Returns:
        Scalar; a zero that is connected to the embeddings where nothing counts.

    Raises:
        ConfigError: τ not positive, tile < 1, an unknown ``scope`` or ``kernel``, or ``triton`` where it cannot run.
    """
    if tile is None:
        tile = 512 if emb_BDhw.device.type == "cpu" else 2048
    if not tau > 0.0:
        raise ConfigError(f"tau: {tau!r}, expected a positive temperature")
    if tile < 1:
        raise ConfigError(f"tile: {tile!r}, expected at least 1")
    if scope not in ("image", "batch"):
        raise ConfigError(f"contrast: {scope!r}, expected 'image' or 'batch'")
    fused = _wants_triton(emb_BDhw, kernel)
    with full_precision(emb_BDhw):
        key_BN = labels_Bhw.where(pool_Bhw, IGNORE).flatten(1).long()
        emb_BND = emb_BDhw.flatten(2).transpose(1, 2)
        if fused:
            from ugrl.method.contrast_triton import fused_loss

            return fused_loss(emb_BND, key_BN, tau=tau, scope=scope)
        return (_per_image if scope == "image" else _across_batch)(emb_BND, key_BN, tau, tile)


def _wants_triton(emb_BDhw: Tensor, kernel: str) -> bool:
    """Whether the Triton form runs. Nothing is imported for a CPU tensor under ``auto``."""
    if kernel not in ("auto", "torch", "triton"):
        raise ConfigError(f"kernel: {kernel!r}, expected 'auto', 'torch' or 'triton'")
    if kernel == "torch":
        return False
    on_cuda = emb_BDhw.device.type == "cuda"
    if kernel == "auto" and not on_cuda:
        return False
    if on_cuda and not _compiles(emb_BDhw):
        if kernel == "triton":
            raise ConfigError("kernel: 'triton', expected no float64 and an NVIDIA device of compute capability ≥ 8.0")
        return False
    try:
        from ugrl.method.contrast_triton import runs_on
    except ImportError as error:
        if kernel == "triton":
            raise ConfigError("kernel: 'triton', expected an installed triton") from error
        return False
    if not runs_on(emb_BDhw.device):
        raise ConfigError(f"kernel: 'triton' for {emb_BDhw.device}, expected a CUDA tensor or TRITON_INTERPRET=1")
    return True


def _compiles(emb_BDhw: Tensor) -> bool:
    """Not for devices before 8.0 (no bfloat16, no TF32), ROCm (no threefold TF32 product) and float64."""
    if emb_BDhw.dtype == torch.float64 or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(emb_BDhw.device) >= (8, 0)


def sum_of_losses(x_GND: Tensor, class_GN: Tensor, tiles: Sequence[Tile], tau: float, padded: bool) -> Tensor:
    """Σ ℓ_i over the own anchors that have a positive.

    Args:
        x_GND: Unit-length rows of G groups of anchors, sorted by class.
        class_GN: Class of each row, 255 where it is no anchor.
        tiles: Runs of rows; those of other ranks only serve as keys.
        tau: Temperature τ > 0.
        padded: Whether rows that are no anchors lie within the tiles.
    """
    with_grad = x_GND.requires_grad and torch.is_grad_enabled()
    # uint8 classes make the masks of mixed tiles cheap; 255 marks padding.
    total: Tensor = _SumOfLosses.apply(x_GND, class_GN.to(torch.uint8), tiles, tau, padded, with_grad)
    return total


def _per_image(emb_BND: Tensor, key_BN: Tensor, tau: float, tile: int) -> Tensor:
    class_BN, order_BN = key_BN.sort(dim=1, stable=True)
    counts_BL = class_counts(key_BN).tolist()  # the host waits here
    sizes_B = [sum(counts[:IGNORE]) for counts in counts_BL]
    longest = max(sizes_B, default=0)
    # Without a negative or without a positive there is nothing to compute.
    active = [b for b, counts in enumerate(counts_BL) if _has_loss(counts)]
    index_BN = order_BN + torch.arange(len(order_BN), device=order_BN.device)[:, None] * order_BN.shape[1]
    groups: list[tuple[slice, int, list[Tile]]]
    if longest <= tile:  # all images at once, padded with pixels that are no anchors
        groups = [(slice(None), longest, [Tile(0, longest, 0, IGNORE, True)])] if active else []
    else:
        groups = [(slice(b, b + 1), sizes_B[b], tiles_of(counts_BL[b], 0, tile, True)) for b in active]
    if not groups:
        total = _zero(emb_BND)
    else:
        rows = list(Take.apply(emb_BND, *(index_BN[images, :n] for images, n, _ in groups)))[::-1]
        sums = [
            sum_of_losses(
                rows.pop(),
                class_BN[images, :n],
                tiles,
                tau,
                padded=longest <= tile,
            )
            for images, n, tiles in groups
        ]
        total = torch.stack(sums).sum()
    anchors = sum(n for counts in counts_BL for n in counts[:IGNORE] if n > 1)
    return total * unit_shares(torch.full((), anchors, device=key_BN.device), total.dtype)


def _across_batch(emb_BND: Tensor, key_BN: Tensor, tau: float, tile: int) -> Tensor:
    class_1N, order_1N = key_BN.view(1, -1).sort(dim=1, stable=True)
    counts_RL = all_gather_rows(class_counts(key_BN.view(1, -1))).tolist()  # the host waits here
    sizes_R = [sum(counts[:IGNORE]) for counts in counts_RL]
    totals_L = [sum(column) for column in zip(*counts_RL, strict=True)]
    if not _has_loss(totals_L):
        return _zero(emb_BND)
    longest, own = max(sizes_R), sizes_R[rank()]
    (x_1ND,) = Take.apply(emb_BND, order_1N[:, :own])
    class_1N = class_1N[:, :own]
    if world_size() > 1:  # blocks of equal length; no tile reaches into the padding
        pad = longest - own
        x_1ND = all_gather_rows_grad(torch.nn.functional.pad(x_1ND[0], (0, 0, 0, pad)))[None]
        class_1N = all_gather_rows(torch.nn.functional.pad(class_1N[0], (0, pad), value=IGNORE))[None]
    tiles = [t for r, counts in enumerate(counts_RL) for t in tiles_of(counts, r * longest, tile, r == rank())]
    anchors = sum(n for n in totals_L[:IGNORE] if n > 1)
    return sum_of_losses(x_1ND, class_1N, tiles, tau, padded=False) * (world_size() / anchors)


def _has_loss(counts: Sequence[int]) -> bool:
    """Whether some anchor has a positive and a negative."""
    return max(counts[:IGNORE]) > 1 and sum(n > 0 for n in counts[:IGNORE]) > 1


def _zero(emb: Tensor) -> Tensor:
    """A zero whose gradient is zero everywhere."""
    zero: Tensor = ((emb if emb.dtype == torch.float64 else emb.float()) * 0).sum()
    return zero
