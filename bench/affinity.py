"""Eq. 1 on a 32×32 grid, 16 maps (two blocks of eight heads of 64), from queries and keys, forward and backward.

``full`` computes every logit (``full-forward`` without gradients, as a CAM pass does), ``pool`` those between the
35 % of positions that the affinity loss pairs, both against 16 materialised maps. ``apply`` is A·f for 21 maps f
without A, against the one product that makes A and then A·f; ``mlp`` is what a hidden layer over the maps costs: the
linear form against it. On the CPU each side has a process of its own (:mod:`bench.apart`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from bench.apart import Remote
from bench.baseline.affinity import Pairs, public_affinity, public_hidden
from bench.measure import Context, Entry, compare, same
from ugrl.model.affinity import AffinityHead

GRID, BLOCKS, HEADS, WIDTH, KEEP, MASKS = 32, 2, 8, 512, 0.35, 21
NAMES = ("affinity/full", "affinity/full-forward", "affinity/pool", "affinity/apply", "affinity/mlp")


def inputs(device: torch.device, dtype: torch.dtype, grid: int = GRID, width: int = WIDTH) -> Pairs:
    """Queries and keys of one image, leaves."""
    g = torch.Generator().manual_seed(0)

    def one() -> Tensor:
        return torch.randn(1, grid * grid, width, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()

    return tuple((one(), one()) for _ in range(BLOCKS))


def head(kind: str, device: torch.device, dtype: torch.dtype) -> AffinityHead:
    """A head whose maps weigh differently."""
    torch.manual_seed(1)
    made = AffinityHead(BLOCKS * HEADS, kind, head_dim=WIDTH // HEADS)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.01 * torch.randn_like(p)
    return made.to(device, dtype)


def pool(device: torch.device, cells: int) -> Tensor:
    """Positions that the loss pairs, (1, n)."""
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(2))
    return order[: int(KEEP * cells)].sort().values[None].to(device)


def apply(pairs: Pairs, g_cls: AffinityHead, f_BNK: Tensor) -> Tensor:
    """A·f of a linear head without A: Q_w(Kᵀf) + K(Q_wᵀf) + b·1ᵀf."""
    w = g_cls.out.weight.view(len(pairs), HEADS)
    q_BND = torch.cat(
        [(q.unflatten(-1, (HEADS, -1)) * v[:, None]).flatten(2) for (q, _), v in zip(pairs, w, strict=True)], dim=-1
    )
    k_BND = torch.cat([k for _, k in pairs], dim=-1)
    forth, back = q_BND @ (k_BND.transpose(1, 2) @ f_BNK), k_BND @ (q_BND.transpose(1, 2) @ f_BNK)
    return forth + back + g_cls.out.bias * f_BNK.sum(1, keepdim=True)


def with_gradients(out: Callable[[], Tensor], grad: Tensor, wrt: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Value and gradients as one call."""

    def run() -> tuple[Tensor, ...]:
        value = out()
        return value.detach(), *torch.autograd.grad(value, wrt, grad)

    return run


def without_gradients(out: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The value alone as one call."""

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (out(),)

    return run


class Problem:
    """Both sides of every comparison on the same inputs."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grid: int = GRID) -> None:
        self.pairs = inputs(device, dtype, grid)
        self.linear, self.mlp = head("linear", device, dtype), head("mlp", device, dtype)
        cells = grid * grid
        self.at_Bn = pool(device, cells)
        g = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

        n = self.at_Bn.shape[1]
        self.grad_full, self.grad_pool = random(1, cells, cells), random(1, n, n)
        self.f_BNK, self.grad_f = random(1, cells, MASKS), random(1, cells, MASKS)
        self.leaves = [x for pair in self.pairs for x in pair]

    def sides(self, name: str) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]:
        """Ours and the other side."""
        g, at = self.linear, self.at_Bn[0]
        wrt = [*self.leaves, g.out.weight, g.out.bias]

        def full() -> Tensor:
            return g.from_pairs(self.pairs, HEADS)

        def public() -> Tensor:
            return public_affinity(self.pairs, HEADS, g.out.weight, g.out.bias)

        if name == "affinity/full":
            return with_gradients(full, self.grad_full, wrt), with_gradients(public, self.grad_full, wrt)
        if name == "affinity/full-forward":
            return without_gradients(full), without_gradients(public)
        if name == "affinity/pool":
            return (
                with_gradients(lambda: g.from_pairs(self.pairs, HEADS, tokens_Bn=self.at_Bn), self.grad_pool, wrt),
                with_gradients(lambda: public()[:, at][:, :, at], self.grad_pool, wrt),
            )
        if name == "affinity/apply":
            return (
                with_gradients(lambda: apply(self.pairs, g, self.f_BNK), self.grad_f, wrt),
                with_gradients(lambda: full() @ self.f_BNK, self.grad_f, wrt),
            )
        deep = [*self.leaves, *self.mlp.parameters()]
        return (
            with_gradients(full, self.grad_full, wrt),
            with_gradients(lambda: self.mlp.from_pairs(self.pairs, HEADS), self.grad_full, deep),
        )

    def hidden(self) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]:
        """The hidden form, and its plain form."""
        hidden, out = self.mlp.hidden, self.mlp.out
        assert hidden is not None
        weights = hidden.weight, hidden.bias, out.weight, out.bias
        deep = [*self.leaves, *weights]
        return (
            with_gradients(lambda: self.mlp.from_pairs(self.pairs, HEADS), self.grad_full, deep),
            with_gradients(lambda: public_hidden(self.pairs, HEADS, *weights), self.grad_full, deep),
        )


def make(name: str, side: int, device: str) -> Callable[[], list[Any]]:
    """One side of a comparison in float32; on a CPU its results are arrays, which go from process to process."""
    run = Problem(torch.device(device), torch.float32).sides(name)[side]
    return (lambda: [x.numpy() for x in run()]) if device == "cpu" else (lambda: list(run()))


def entries(ctx: Context) -> Iterator[Entry]:
    """Each comparison, checked in float64 on a smaller grid and in float32 on its own."""
    gates = {"affinity/full": 6.0, "affinity/full-forward": 6.0, "affinity/pool": 20.0}
    notes = {
        "affinity/full": "all 1,024² logits by one product; 16 maps, S + Sᵀ, 1 x 1 convolution",
        "affinity/full-forward": "the same without gradients",
        "affinity/pool": "logits between 358 of 1,024 positions; all of them by 16 maps, then gathered",
        "affinity/apply": "A·f of 21 maps without A; A by one product, then A·f",
        "affinity/mlp": "the linear form; the hidden form, which computes something else",
    }
    small = Problem(ctx.device, torch.float64, 8)
    for name in NAMES:
        if not ctx.wants(name):
            continue
        hidden = name == "affinity/mlp"
        ours, plain = small.hidden() if hidden else small.sides(name)
        same(f"{name}, float64", ours(), plain(), 1e-12)

        def check(a: list[Any], b: list[Any], name: str = name) -> None:
            same(name, [torch.as_tensor(x) for x in a], [torch.as_tensor(x) for x in b], 2e-4)

        with ExitStack() as stack:
            sides: list[Callable[[], object]] = []
            for side in range(2):
                args = (name, side, str(ctx.device))
                on_cpu = ctx.device.type == "cpu"
                sides.append(stack.enter_context(Remote(make, *args, threads=ctx.threads)) if on_cpu else make(*args))
            yield compare(
                name,
                *sides,
                ctx=ctx,
                gate=gates.get(name),
                budget=2.5 if ctx.quick else None,
                check=None if hidden else check,
                note=f"{notes[name]}; float32, forward{'' if name == 'affinity/full-forward' else ' and backward'}",
            )
